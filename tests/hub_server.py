"""A dataset hub on the loopback interface: the few paths and headers that huggingface_hub needs."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `files` ("<owner>/<repository>/<path>" -> bytes) until the `with` block ends.

    requests: (method, key, Range header) of every request for a file, in order.
    breaks: key -> bytes after which the connection of the next GET is cut.
    busy: "<METHOD> <key>" -> answers, each a status and headers, that the next such requests get.
    lies: key -> bytes served instead of the file's own, under the file's own ETag.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.requests: list[tuple[str, str, str | None]] = []
        self.breaks: dict[str, int] = {}
        self.busy: dict[str, list[tuple[int, dict[str, str]]]] = {}
        self.lies: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(self))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def gets(self) -> list[str]:
        """Keys of the GET requests so far."""
        return [key for method, key, _ in self.requests if method == "GET"]


def handler_for(hub: Hub) -> type:
    """A request handler bound to one hub."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, *_: object) -> None:
            """Keep the tests' output clean."""

        def answer(self) -> None:
            repo, _, rest = unquote(self.path).removeprefix("/datasets/").partition("/resolve/")
            key = f"{repo}/{rest.partition('/')[2]}"
            asked = self.headers.get("Range")
            # The client may also ask the hub's API about itself; only files are of interest here.
            if "/resolve/" in self.path:
                hub.requests.append((self.command, key, asked))
            if answers := hub.busy.get(f"{self.command} {key}"):
                self.empty(*answers.pop(0))
                return
            if key not in hub.files:
                self.empty(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            body = hub.lies.get(key, hub.files[key])
            start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("ETag", f'"{hashlib.sha256(hub.files[key]).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            if self.command == "GET":
                self.send_body(key, body[start:])

        def send_body(self, key: str, body: bytes) -> None:
            cut = hub.breaks.pop(key, None)
            self.wfile.write(body[:cut])
            self.close_connection = self.close_connection or cut is not None

        def empty(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

    return Handler
