"""What the programs in this folder share: a run's folder as one object, error lines, atomic writes.

Every program imports this module before any other: here an older Python ends in one line.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"error: Python 3.11 or newer is needed, this is {'.'.join(map(str, sys.version_info[:3]))}")

import argparse
import contextlib
import dataclasses
import html
import io
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # for train_gpt
    sys.path.insert(0, str(ROOT))
SCORES = {
    "float": "averaged weights, plain windows",
    "roundtrip": "loaded from the artifact, plain windows",
    "sliding": "the same, sliding windows",
    "ttt": "the same, test-time training",
}
# Settings that say where and how a run is written down, not what it computes.
BOOKKEEPING = (
    "run_id", "stages", "artifact", "resume", "checkpoint_every", "train_log_every", "data_path",
    "tokenizer_path")
# How the names of the settings begin that only scoring reads.
SCORING = ("eval_", "ttt_", "skip_sliding", "canonical_mask")


class Mistake(Exception):
    """Something that the person at the keyboard can mend: printed as it stands, without a traceback."""


def exit_status(program: Callable[[], int | None]) -> int:
    """Run a command line; a user's mistake becomes one `error:` line for each of its lines and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that cannot show a character shows its number
            stream.reconfigure(errors="backslashreplace")
    status = 0
    try:
        try:
            status = program() or 0
        finally:
            flush_output()
        return status
    except SystemExit as stop:
        if isinstance(stop.code, int):  # argparse's
            return stop.code
        raise
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        return status
    except (Mistake, OSError, *script_mistakes()) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename or 'the output cannot be written'}: {error.strerror}"
        for line in text.splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 1


def flush_output() -> None:
    """Hand on what was printed; what cannot be written is dropped, so that the interpreter does not try."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def script_mistakes() -> tuple[type[Exception], ...]:
    """The script's own kind of mistake, where a program has imported it."""
    return (sys.modules["train_gpt"].UserError,) if "train_gpt" in sys.modules else ()


class Parser(argparse.ArgumentParser):
    """A parser of options whose mistakes are one line, with status 1."""

    def error(self, message: str) -> None:
        self.exit(1, f"error: {' '.join(message.split())}; try --help\n")


def parser(about: str, **options) -> Parser:
    """A parser of options whose help begins with a program's own docstring."""
    return Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def need(module: str) -> None:
    """Raise Mistake where a module that only these programs import is missing."""
    try:
        __import__(module)
    except ImportError:
        advice = f"pip install {module}, or pip install -r requirements.txt"
        raise Mistake(f"{module} is missing; {advice}") from None


def script():
    """The training script of this checkout as a module, imported where it is needed: torch takes seconds."""
    import train_gpt

    return train_gpt


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all. Raises Mistake with its name where it is not."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Mistake(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def as_markdown(text: object) -> str:
    """Text of unknown origin as one line of Markdown that shows it, in a table too."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"[\\`*|\[\]~$]|\b_|_\b", r"\\\g<0>", plain)


def as_code(text: str) -> str:
    """The same as code, where backticks alone would let a pipe or a backtick through."""
    escaped = as_markdown(text)
    return f"`{text}`" if text and escaped == text else f"<code>{escaped}</code>"


# The shapes of the files that a run leaves, as far as the programs read them. Files are handed around: what a
# program formats, divides by or puts into a page is checked where it is read.


@dataclass(frozen=True)
class Kind:
    """Values of one kind: what they are called, and which they are."""

    name: str
    holds: Callable[[object], bool]


def numbers(name: str, low: float, high: float = 1e18, types: tuple = (int, float)) -> Kind:
    """Numbers within bounds; true and false are none."""
    return Kind(name, lambda value: type(value) in types and low <= value <= high)


NO_CONTROLS = re.compile("[^\x00-\x1f\x7f-\x9f\u2028\u2029]*")
NUMBER, AMOUNT = numbers("a number", -1e18), numbers("a number from 0", 0)
SCORE = numbers("a score above 0", 1e-6, 1e6)
COUNT, SIZE = (numbers(f"a whole number from {low}", low, types=(int,)) for low in (0, 1))
SEED = numbers("a whole number from 0 to 4294967295", 0, 2**32 - 1, (int,))
FLAG = Kind("true or false", lambda value: type(value) is bool)
STRING = Kind("text", lambda value: type(value) is str)
TEXT = Kind("one line of text", lambda value: type(value) is str and NO_CONTROLS.fullmatch(value) is not None)
NULL, EMPTY = Kind("null", lambda value: value is None), Kind("empty", lambda value: value == {})
FINITE = numbers("a number", -sys.float_info.max, sys.float_info.max)
PLAIN = lambda value: any(kind.holds(value) for kind in (TEXT, FINITE, FLAG))
SETTING = Kind("a setting's value", lambda v: all(map(PLAIN, v)) if type(v) is list else PLAIN(v))

# A mapping's shape names its keys, `?` after those that may be missing; a pattern stands for the other keys.
# A list's shape has one part for all, or one for each; a tuple is a choice.
SETTINGS = {"ema_decay?": NUMBER, "swa_threshold?": NUMBER, "data_path?": TEXT, "tokenizer_path?": TEXT,
            re.compile("[a-z][a-z0-9_]*"): SETTING}
PREPARED = {"preset": TEXT, "changed": SETTINGS, "settings?": SETTINGS,
            "dtype?": Kind("bfloat16 or float32", lambda value: value in ("bfloat16", "float32"))}
CLOCK = {"limit": AMOUNT, "used": NUMBER, "within": FLAG, "counted": {NO_CONTROLS: AMOUNT},
         "uncounted": {NO_CONTROLS: AMOUNT}}
ARTIFACT = {"model_bytes": COUNT, "code_bytes": COUNT, "total_bytes": SIZE, "limit": SIZE, "sha256?": TEXT,
            "sections?": {NO_CONTROLS: {"bytes": COUNT, "plain_bytes?": COUNT}}}
ERRORS = {"error": NUMBER, "error_rounding": NUMBER, "floored_rows": COUNT}
PROOFS = {
    "qat?": (NULL, dict.fromkeys(("first_step", "distance_before", "distance_raw", "loss", "loss_rounded"),
                                    NUMBER) | {"distance_averaged?": NUMBER}),
    "averaging?": (NULL, {"exported?": TEXT, "distance_from_raw": NUMBER}),
    "quantizer?": {"attn?": ERRORS, "mlp?": ERRORS, "matrices?": {NO_CONTROLS: [NUMBER, NUMBER]}},
    "ttt?": (NULL, {"chunks": COUNT, "steps": COUNT, "parameters": COUNT, "weight_change": NUMBER,
                       "untrained_from_chunk?": (NULL, COUNT)}),
    "documents?": {"documents": COUNT, "untrained_documents": COUNT, "steps": COUNT}}
BY_LENGTH = {NO_CONTROLS: {"documents": COUNT, "positions": COUNT, "roundtrip": NUMBER, "ttt": NUMBER}}
RESULT = {f"{key}?": shape for key, shape in {
    "preset": TEXT, "seed": SEED, "changed": SETTINGS, "settings": SETTINGS, "dtype": PREPARED["dtype?"],
    "scored_with": PREPARED, "started": TEXT, "corpus": TEXT, "data_path": TEXT, "hardware": TEXT,
    "script_sha256": TEXT, "scored_artifact_sha256": TEXT, "world_size": SIZE, "compiled": FLAG,
    "params": COUNT, "steps": COUNT, "step_ms": NUMBER, "tokens_seen": COUNT, "peak_memory": NUMBER,
    "val_tokens": (NULL, SIZE), "val_bytes": (NULL, SIZE), "bpb": {NO_CONTROLS: (NULL, SCORE)},
    "val_loss": {NO_CONTROLS: (NULL, SCORE)}, "artifact": (EMPTY, ARTIFACT),
    "budget": {NO_CONTROLS: CLOCK}, "proofs": PROOFS, "by_length": BY_LENGTH}.items()}
FINISHED = dict.fromkeys(("preset", "seed", "bpb", "corpus"), Kind("there", lambda value: True))
TECHNIQUES = {"artifact_sha256": TEXT,
              "techniques": {NO_CONTROLS: {"loss": NUMBER, "loss_without": NUMBER}}}
METRICS = {
    "train": {"step": COUNT, "loss": NUMBER, "lr_scale": NUMBER, "seconds": AMOUNT},
    "validation": {"step": COUNT, "loss": NUMBER, "seconds": AMOUNT},
    "ttt": {"step": COUNT, "bpb": NUMBER, "positions": COUNT}}


def check(value: object, shape: object, place: str = "") -> None:
    """Raise ValueError with the place where a value has not the shape that it should have."""
    wrong = lambda what: ValueError(f"{place or 'the whole'} is {reprlib.repr(value)}, not {what}")
    if isinstance(shape, Kind):
        if not shape.holds(value):
            raise wrong(shape.name)
    elif isinstance(shape, tuple):
        if not any(isinstance(kind, Kind) and kind.holds(value) for kind in shape[:-1]):
            check(value, shape[-1], place)
    elif isinstance(shape, list):
        if type(value) is not list or len(shape) not in (1, len(value)):
            raise wrong("a list" if len(shape) == 1 else f"a list of {len(shape)}")
        for i, (part, one) in enumerate(zip(value, cycle(shape))):
            check(part, one, f"{place}[{i}]")
    else:
        if type(value) is not dict:
            raise wrong("a mapping")
        if missing := [key for key in shape if type(key) is str and key[-1] != "?" and key not in value]:
            raise ValueError(f"{', '.join(missing)} is missing{' in ' * bool(place)}{place}")
        check_entries(value, shape, place)


def check_entries(value: dict, shape: dict, place: str) -> None:
    """Check a mapping's entries, of which those that its shape does not name are free."""
    patterns = [key for key in shape if isinstance(key, re.Pattern)]
    for key, part in value.items():
        below = f"{place}.{key}" if place else key
        named = [name for name in (key, f"{key}?") if name in shape]
        for name in named:
            check(part, shape[name], below)
        for pattern in patterns[: not named]:
            if not pattern.fullmatch(key):
                raise ValueError(f"{reprlib.repr(key)} in {place or 'it'} is no name")
            check(part, shape[pattern], below)


def parse_json(data: bytes, shape: object):
    """JSON in UTF-8 that has a shape. Raises ValueError where it has not, or RecursionError."""

    def once(pairs: list[tuple[str, object]]) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name stands there twice")
        return found

    found = json.loads(data.decode(), object_pairs_hook=once)
    check(found, shape)
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # what is not checked can be written too
    return found


def read_json(path: Path, shape: object, wrong: str, advice: str):
    """A JSON file that has a shape. Raises Mistake with what is wrong, and with advice, where it has not."""
    try:
        return parse_json(path.read_bytes(), shape)
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        why = why if len(why) < 150 else f"{why[:150]}..."  # it may quote the file
        raise Mistake(f"{path} {wrong} ({why}); {advice}") from None


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its result.json."""

    folder: Path
    result: dict

    @staticmethod
    def open(folder: str | Path) -> Run:
        """Read a run's folder. Raises Mistake where it holds no finished run."""
        folder = Path(folder)
        path = folder / "result.json"
        if not path.is_file():
            raise Mistake(f"{folder} has no result.json; name the folder of a finished run, logs/RUN_ID")
        advice = "name another run, or make this one again"
        found = read_json(path, FINISHED | RESULT, "is not a finished run's", advice)
        result = {"changed": {}, "proofs": {}, "budget": {}, "artifact": {}} | found
        return Run(folder, result)

    @property
    def name(self) -> str:
        """The folder's name, which is RUN_ID; what no page or console can show is marked."""
        return "".join(c if c.isprintable() else "\ufffd" for c in self.folder.resolve().name)

    @property
    def seed(self) -> int:
        """SEED."""
        return self.result["seed"]

    @property
    def bpb(self) -> dict[str, float]:
        """Bits per byte of the scores that were taken, in the order of the ladder."""
        return {name: self.result["bpb"][name] for name in SCORES if self.result["bpb"].get(name) is not None}

    @property
    def nats(self) -> dict[str, float]:
        """Nats per token of the scores that were taken."""
        losses = self.result.get("val_loss", {})
        return {name: losses[name] for name in self.bpb if losses.get(name) is not None}

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes that a validation token stands for on average; None where nothing was scored."""
        tokens, size = self.result.get("val_tokens"), self.result.get("val_bytes")
        if tokens and size:
            return size / tokens
        ratios = [self.nats[name] / math.log(2) / self.bpb[name] for name in self.nats]
        return ratios[0] if ratios else None

    @property
    def changed(self) -> dict[str, object]:
        """What the run changed of its preset; for scoring, what the scores were taken with."""
        trained = self.result["changed"]
        scored = self.result.get("scored_with", {}).get("changed", trained)
        return {name: value for name, value in trained.items() if not name.startswith(SCORING)} | {
            name: value for name, value in scored.items() if name.startswith(SCORING)
        }

    @cached_property
    def settings(self) -> dict[str, object]:
        """Every setting of the run; for scoring, what the scores were taken with."""
        values = self.result.get("settings") or self.preset_settings() | self.changed
        scored = self.result.get("scored_with", {}).get("settings", {})
        values = values | {name: value for name, value in scored.items() if name.startswith(SCORING)}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    def preset_settings(self) -> dict[str, object]:
        """The preset as this checkout has it, for a result that holds changes only."""
        tg, preset = script(), self.result["preset"]
        if preset not in tg.PRESETS:
            raise Mistake(f"{self.folder}: train_gpt.py has no preset {preset}")
        defaults = {field.name: field.default for field in dataclasses.fields(tg.Hyperparameters)}
        return {**defaults, **tg.PRESETS[preset], "preset": preset}

    @cached_property
    def techniques(self) -> dict[str, float]:
        """By how much the loss rises without each technique, where audit.py --techniques has left that."""
        path = self.folder / "techniques.json"
        if not path.is_file():
            return {}
        found = read_json(path, TECHNIQUES, "is damaged", "run audit.py --techniques again")
        if found["artifact_sha256"] != self.result["artifact"].get("sha256"):
            return {}
        return {name: each["loss_without"] - each["loss"] for name, each in found["techniques"].items()}

    @cached_property
    def lines(self) -> list[dict]:
        """The lines of metrics.jsonl that are whole; a run that was killed leaves half a line."""
        path, rows = self.folder / "metrics.jsonl", []
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError, RecursionError):
                row = parse_json(line, {"event": STRING})
                check(row, METRICS.get(row["event"], {}))
                rows.append(row)
        return rows

    def metrics(self, event: str) -> list[dict]:
        """The lines of one event, by step; what a resumed run or a second evaluation repeats counts once."""
        rows: list[dict] = []
        for row in self.lines:
            if row.get("event") == event:
                while rows and rows[-1].get("step", 0) >= row.get("step", 0):
                    rows.pop()
                rows.append(row)
        return rows


def open_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read several folders. Raises Mistake where one is named twice."""
    runs = [Run.open(folder) for folder in folders]
    places = [run.folder.resolve() for run in runs]
    if twice := [str(run.folder) for i, run in enumerate(runs) if places[i] in places[:i]]:
        raise Mistake(f"{twice[0]} is named twice")
    return runs


def differing_settings(runs: Iterable[Run], besides: Iterable[str] = ()) -> dict[str, list]:
    """The settings in which runs differ, with each run's value; bookkeeping and `besides` do not count."""
    runs, skipped = list(runs), {*BOOKKEEPING, *besides}
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in skipped)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def show(value: object) -> str:
    """A setting's value as one would type it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
