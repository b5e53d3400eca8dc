"""Seeded manifests and meta.json of any content: data/prepare.py takes them or says in one line why not."""

from __future__ import annotations

import copy
import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))

prepare = importlib.import_module("prepare")

VARIANT = "fineweb10B_sp1024"
MANIFEST = {
    "datasets": [
        {
            "name": f"fineweb10B_sp{size}",
            "stats": {"files_train": 80, "files_val": 1, "tokens_val": 62_000_000},
            "tokenizer_name": f"sp_bpe_{size}",
        }
        for size in (1024, 4096)
    ],
    "tokenizers": [
        {
            "name": f"sp_bpe_{size}",
            "model_path": f"tokenizers/fineweb_{size}_bpe.model",
            "vocab_path": f"tokenizers/fineweb_{size}_bpe.vocab",
        }
        for size in (1024, 4096)
    ],
}
ODD = [
    None, True, False, 0, -1, 1, 3, 101, 10_001, 300_000, 10**400, 2.0, 0.5, 1e308,
    float("nan"), float("inf"), "", "3", "x" * 10_000, "two\nlines", "\x1b[31m", "nul\0", "\ud800", "\u2028",
    "日本", VARIANT, "sp_bpe_1024", "../../up.model", "/etc/passwd", "..", ".", "a/", "~/x", "a\\b",
    "tokenizers/fineweb_1024_bpe.vocab", f"datasets/{VARIANT}/fineweb_train_000000.bin",
    [], [[]], [None], [{}], {}, {"name": []}, {"name": {}}, {"name": VARIANT}, {"a": {"b": [1, {"c": None}]}},
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    keys = {dict: list, list: lambda items: range(len(items))}.get(type(value), lambda _: ())(value)
    for key in keys:
        yield value, key
        yield from places(value[key])


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy with one to three of its values replaced, removed, renamed, repeated or swapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice([*places(value)] or [([value], 0)])
        change = rng.choice(["replace", "replace", "replace", "remove", "nest", "rename", "repeat", "swap"])
        if change == "replace":
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif change == "remove":
            del container[key]
        elif change == "nest":
            container[key] = rng.choice([[container[key]], {"name": container[key]}])
        elif change == "rename" and isinstance(container, dict):
            container[rng.choice(["", "name", "path", "\ud800\n", "x" * 300])] = container.pop(key)
        elif change == "repeat" and isinstance(container, list):
            container += copy.deepcopy(container)
        elif change == "swap":
            other, place = rng.choice([*places(value)])
            container[key] = copy.deepcopy(other[place])
    return value


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """The bytes with some of them cut out, replaced, repeated or in another encoding."""
    start, length = rng.randrange(len(raw)), rng.choice([1, 1, 2, 8, 100])
    middle = rng.choice([b"", rng.randbytes(length), raw[start : start + length] * 2, b"[" * 2000, b"null"])
    raw = raw[:start] + middle + raw[start + rng.choice([0, length]) :]
    return rng.choice(
        [raw, raw, raw, raw.decode("latin-1").encode("utf-16"), raw[:start], b"\xef\xbb\xbf" + raw]
    )


def cases(value: Any, number: int) -> Iterator[bytes]:
    """That many mutations as bytes: of values in two thirds, of the bytes in the rest."""
    for seed in range(number):
        rng = random.Random(seed)
        changed = json.dumps(mutated(value, rng)).encode()
        yield damaged(json.dumps(value).encode(), rng) if seed % 3 == 0 else changed


@pytest.mark.whole
def test_fuzzed_manifests_are_taken_or_refused_in_a_line(tmp_path: Path) -> None:
    path, folder, taken, refused = tmp_path / "manifest.json", tmp_path / "datasets" / VARIANT, 0, set()
    for raw in cases(MANIFEST, 2000):
        path.write_bytes(raw)
        try:
            items, published = prepare.wanted_files(
                "root/", prepare.read_json(path), folder, random.Random(len(raw)).choice([None, 1, 5])
            )
        except prepare.PrepareError as error:
            (line,) = str(error).splitlines()
            assert len(line) < 500 and line.isprintable(), line
            refused.add(line[:25])
            continue
        taken += 1
        # What is taken lies in its place, once, and is of a number that makes sense.
        assert all(type(count) is int and count > 0 for count in published.values())
        assert len(items) <= 10_100 and len({item.local for item in items}) == len(items)
        assert {item.local.parent for item in items} <= {folder, tmp_path / "tokenizers"}
        assert not any(prepare.is_good(item, {}) for item in items[-3:])
    assert taken > 300 and len(refused) > 5, (taken, refused)


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A dataset that looks whole, and its meta.json."""
    folder = tmp_path / "datasets" / VARIANT
    ids = prepare.np.array([prepare.BOS, 300, 301], dtype="<u2")
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "fineweb_1024_bpe.model").write_bytes(b"no model")
    paths = [tmp_path / "tokenizers" / "fineweb_1024_bpe.model"]
    for split in prepare.SPLITS:
        paths += prepare.write_shards(folder, split, [ids], 10)
    items = [prepare.Item(path.name, path) for path in paths]
    about = prepare.fineweb_meta(tmp_path, folder, items)
    made_by = {"command": "fineweb", "repository": "made/up", "prefix": "", "variant": "sp1024"}
    about |= {"published": {"train": 1, "val": 1}, "made_by": made_by}
    prepare.write_meta(tmp_path, folder, about, dict.fromkeys(paths))
    return folder, json.loads((folder / "meta.json").read_bytes())


@pytest.mark.whole
def test_fuzzed_meta_is_read_or_said_to_be_damaged(
    dataset: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    folder, meta = dataset
    root, path, kept = folder.parent.parent, folder / "meta.json", 0
    for raw in cases(meta, 600):
        path.write_bytes(raw)
        found = prepare.read_meta(root, folder, meta["made_by"])
        if found:
            kept += 1
            assert found["published"]["train"] >= 0 and found["splits"]["train"]["shards"] >= 0
        prepare.whole_files(root, prepare.load_meta(folder))
        assert prepare.main(["verify", str(folder)]) == 1  # its tokenizer is none
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: ") and all(line.startswith("problem: ") for line in lines[:-1])
    assert 50 < kept < 550
