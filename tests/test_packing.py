"""The container: equal to what was packed, close to the entropy, and nothing else is accepted."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, random_model

import train_gpt as tg

Q = tg.QuantizedTensor
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
CONFIG = {
    "model": {"dim": 4, "ratio": 0.5, "layers": [1, 2], "on": True, "off": None},
    "ü": "\u2581 \U0001f600",
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def quantized(rows, columns, max_code=15, seed=0, spread=None, role="attn"):
    """Codes over the whole grid, or Gaussian ones, and scales that fp16 holds exactly."""
    codes = torch.randint(-max_code, max_code + 1, (rows, columns), generator=generator(seed))
    if spread:
        drawn = torch.randn(rows, columns, generator=generator(seed)) * spread
        codes = drawn.round().clamp(-max_code, max_code)
    scales = (torch.rand(rows, generator=generator(seed)) + 0.01).half().float()
    steps = torch.randint(-128, 128, (columns,), generator=generator(seed)).to(torch.int8)
    return Q(codes.to(torch.int8), scales, max_code, role, steps)


def a_model():
    """A bit of everything."""
    return {
        "blocks.0.attn.c_q.weight": quantized(6, 5),
        "blocks.0.mlp.fc.weight": quantized(7, 5, 15, 1, role="mlp"),
        "blocks.1.mlp.fc.weight": quantized(7, 5, 31, 2, role="mlp"),
        "tok_emb.weight": quantized(9, 5, 127, 3, role="embed"),
        "skip_weights": torch.randn(2, 5, generator=generator()).half(),
        "bigram.scale": torch.tensor(0.05),
        "count": torch.tensor([3, -4]),
        "empty": torch.zeros(0, 3),
    }


def same(a, b):
    """Equal kind, shape, dtype and bits."""
    if isinstance(a, Q):
        return (
            isinstance(b, Q)
            and (a.max_code, a.role) == (b.max_code, b.role)
            and type(b.max_code) is int
            and b.codes.dtype == torch.int8
            and a.codes.shape == b.codes.shape
            and torch.equal(a.codes, b.codes)
            and b.scales.shape == a.scales.shape
            and torch.equal(a.scales.half().float(), b.scales.float())
            and b.columns.dtype == torch.int8
            and torch.equal(b.columns, torch.zeros_like(b.columns) if a.columns is None else a.columns)
        )
    return (
        isinstance(b, torch.Tensor)
        and (a.dtype, a.shape) == (b.dtype, b.shape)
        and tg.tensor_bytes(a) == tg.tensor_bytes(b)
    )


def assert_round_trip(config, tensors):
    got_config, got = tg.unpack(tg.pack(config, tensors))
    assert got_config == json.loads(json.dumps(config)) == config and got.keys() == tensors.keys()
    for name in tensors:
        assert same(tensors[name], got[name]), name


@contextlib.contextmanager
def bounded(seconds=10, megabytes=400):
    """The body must be quick, and the process must not grow much."""

    def late(*_):
        raise TimeoutError(f"still busy after {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes * 1024


# ----------------------------------------------------------------------------------------------------------
# Round trip
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (5,), (3, 4), (2, 3, 2, 2), (1, 1, 1)])
def test_raw_tensors_of_every_dtype(dtype, shape):
    values = torch.randint(0, 2 if dtype == torch.bool else 120, shape, generator=generator())
    tensor = (values - 60).to(dtype) if dtype.is_signed else values.to(dtype)
    assert_round_trip({}, {"x": tensor / 7 if dtype.is_floating_point else tensor})


def test_values_that_are_not_numbers_keep_their_bits():
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3.4e38])
    assert_round_trip({}, {"x": special, "y": special.double(), "z": special.half()})
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    assert_round_trip({}, {"i": torch.tensor([low, high]), "b": torch.tensor([-128, 127], dtype=torch.int8)})


@pytest.mark.parametrize("max_code", [1, 2, 3, 7, 15, 31, 63, 100, 127])
@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (5, 1), (1, 9), (0, 4), (4, 0), (2, 3, 4)])
def test_codes_of_any_width(max_code, shape):
    codes = torch.randint(-max_code, max_code + 1, shape, generator=generator()).to(torch.int8)
    if codes.numel() > 1:
        codes.view(-1)[0], codes.view(-1)[-1] = -max_code, max_code
    tensor = Q(codes, torch.rand(shape[:-1], generator=generator()).half().float(), max_code)
    assert_round_trip({}, {"one": tensor, "other": dataclasses.replace(tensor, role="embed")})
    back = tg.unpack(tg.pack({}, {"w": tensor}))[1]["w"]
    torch.testing.assert_close(back.dequantize(), tensor.dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("role", ["", "attn", "embed", "a.b", ".", "15", "raw", "raw.int8", "scales", "ü \n"])
def test_any_role(role):
    tensors = {name: quantized(3, 4, code, role=role) for name, code in (("a", 15), ("b", 127), ("c", 15))}
    assert_round_trip({}, tensors | {"x": torch.ones(2, dtype=torch.int8)})


def test_many_tensors_of_every_kind_come_back_under_their_own_names():
    tensors = {
        f"{role}.{i}.weight": quantized(i + 1, 4, code, i, role=role)
        for i in range(4)
        for role, code in (("attn", 15), ("mlp", 31), ("", 7))
    }
    tensors |= {f"raw.{i}": torch.full((i,), float(i), dtype=dtype) for i, dtype in enumerate(DTYPES[:4])}
    assert_round_trip(CONFIG, a_model() | tensors)


NAMES = [
    "", " ", "a b", "ü.é", "\u2581", "\U0001f600", "../../etc/passwd", "a\nb", "\0", '"quoted"', "codes",
    "scales", "raw.float32", "attn.15", "config", "__class__", "blocks.", "blocks.weight", "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:20]))
def test_odd_names(name):
    assert_round_trip({}, {name: quantized(3, 4), name + "2": torch.ones(2), "x": torch.zeros(1)})


@pytest.mark.parametrize(
    "config",
    [
        {},
        CONFIG,
        {"": ""},
        {"a": {"b": {"c": [[], {}, [{}]]}}},
        {"n": [0, -1, 2**70, 1e-300, 0.1, 1e308]},
        {"lone": "\ud800", "nul": "\0", "long": "x" * 100_000},
        {"config": 1, "tensors": [], "sections": None},
    ],
)
def test_any_json_config(config):
    assert_round_trip(config, {"x": torch.ones(2)})
    assert_round_trip(config, {})


def test_inputs_need_not_be_contiguous_and_are_left_alone():
    base, codes = torch.randn(6, 8, generator=generator()), quantized(8, 6).codes
    views = {
        "transposed": base.mT,
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(4, 8),
        "parameter": torch.nn.Parameter(base),
        "reversed": base.flip(0),
        "codes": Q(codes.mT, torch.ones(6, 2)[:, 1], 15),
    }
    kept = base.clone(), codes.clone()
    assert_round_trip({}, views)
    assert torch.equal(base, kept[0]) and torch.equal(codes, kept[1])


def test_scales_are_kept_to_fp16():
    scales = torch.tensor([1 / 3, 1e-4, 2.0**-24, 6e4, 0.0])
    back = tg.unpack(tg.pack({}, {"w": Q(torch.ones(5, 2, dtype=torch.int8), scales, 15)}))[1]["w"].scales
    assert torch.equal(back.float(), scales.half().float())
    torch.testing.assert_close(back.float(), scales, rtol=2**-11, atol=0)


def test_what_comes_back_can_be_written():
    tensors = tg.unpack(tg.pack({}, a_model()))[1]
    for tensor in tensors.values():
        (tensor.codes if isinstance(tensor, Q) else tensor).zero_()


def test_the_same_tensors_give_the_same_bytes():
    model = a_model()
    blob = tg.pack(CONFIG, model)
    assert blob == tg.pack(CONFIG, model)
    backwards = dict(reversed(CONFIG.items()))
    assert blob == tg.pack(backwards, dict(reversed(model.items())))
    moved = {
        name: dataclasses.replace(t, codes=t.codes.mT.contiguous().mT, scales=t.scales.half())
        for name, t in model.items()
        if isinstance(t, Q)
    }
    assert blob == tg.pack(CONFIG, model | moved) == tg.pack(*tg.unpack(blob))


ELSEWHERE = """
import hashlib, sys
sys.path[:0] = sys.argv[1:]
import torch
import test_packing as t
import train_gpt as tg
torch.set_num_threads(3)
more = {"blocks.2.mlp.fc.weight": t.quantized(300, 500)}
print(hashlib.sha256(tg.pack(t.CONFIG, t.a_model() | more)).hexdigest())
"""


@pytest.mark.whole
def test_another_process_gives_the_same_bytes():
    """With other hashes of text and another number of threads."""
    blob = tg.pack(CONFIG, a_model() | {"blocks.2.mlp.fc.weight": quantized(300, 500)})
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": ""}
    command = [sys.executable, "-c", ELSEWHERE, str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == hashlib.sha256(blob).hexdigest(), done.stderr


def eight(value):
    return torch.full((2, 3), value, dtype=torch.int8)


UNFIT = {
    "complex": torch.ones(2, dtype=torch.complex64),
    "code high": Q(eight(16), torch.ones(2), 15),
    "code low": Q(eight(-16), torch.ones(2), 15),
    "code -128": Q(eight(-128), torch.ones(2), 127),
    "no grid": Q(eight(0), torch.ones(2), 0),
    "wide grid": Q(eight(0), torch.ones(2), 128),
    "scales short": Q(eight(0), torch.ones(3), 15),
    "scales 2-D": Q(eight(0), torch.ones(2, 1), 15),
    "scale NaN": Q(eight(0), torch.tensor([1.0, math.nan]), 15),
    "scale beyond fp16": Q(eight(0), torch.tensor([1.0, 1e6]), 15),
    "columns short": Q(eight(0), torch.ones(2), 15, columns=torch.zeros(2, dtype=torch.int8)),
    "columns wide": Q(eight(0), torch.ones(2), 15, columns=torch.zeros(3, dtype=torch.int16)),
}


@pytest.mark.parametrize("tensor", UNFIT.values(), ids=UNFIT.keys())
def test_what_the_format_cannot_hold_is_refused(tensor):
    with pytest.raises(ValueError, match="the-name"):
        tg.pack({}, {"the-name": tensor})


@pytest.mark.parametrize("config", [{"x": math.nan}, {"x": math.inf}])
def test_configs_that_are_not_json_are_refused(config):
    with pytest.raises(ValueError):
        tg.pack(config, {})


# ----------------------------------------------------------------------------------------------------------
# Bytes
# ----------------------------------------------------------------------------------------------------------


def entropy_bytes(codes):
    _, counts = torch.unique(codes, return_counts=True)
    share = counts.double() / counts.sum()
    return float(-(share * share.log2()).sum() * counts.sum() / 8)


def test_gaussian_codes_come_close_to_their_entropy():
    """And a frame holds one role and width: codes of two roles differ in their statistics."""
    spreads = {"attn": 2.85, "mlp": 5.0}
    tensors = {
        f"{role}.{i}": quantized(1000, 500, 15, i, spread, role)
        for i in range(2)
        for role, spread in spreads.items()
    }
    blob = tg.pack({}, tensors)
    report, scales = tg.byte_report(blob), 2 * 4 * 1000
    assert report.keys() == {"header", "attn.15", "mlp.15", "classes", "columns", "scales"}
    assert sum(section["bytes"] for section in report.values()) == len(blob)
    assert report["scales"]["plain_bytes"] == scales and report["header"]["bytes"] < 1000
    for role in spreads:
        bound = entropy_bytes(torch.cat([t.codes for t in tensors.values() if t.role == role]))
        assert report[f"{role}.15"]["plain_bytes"] == 1_000_000
        assert bound < report[f"{role}.15"]["bytes"] <= 1.002 * bound


def test_columns_of_another_size_have_frequencies_of_their_own():
    """At most 1.004 of the classes' entropy, where these codes together have a tenth more."""
    sizes = (1.2, 2.4, 4.8)
    spreads = torch.tensor(sizes).repeat(100)
    codes = (torch.randn(2000, 300, generator=generator()) * spreads).round_().clamp_(-15, 15).to(torch.int8)
    blob = tg.pack({}, {"w": Q(codes, torch.ones(2000), 15, "mlp")})
    assert torch.equal(tg.unpack(blob)[1]["w"].codes, codes)
    of_classes = sum(entropy_bytes(codes[:, spreads == size]) for size in sizes)
    size = tg.byte_report(blob)["mlp.15"]["bytes"]
    assert of_classes < size < 1.004 * of_classes < 0.95 * entropy_bytes(codes)


def test_equal_steps_cost_next_to_nothing():
    """Steps of `water`: one scale for all rows, and columns that several matrices share."""
    codes, columns = quantized(500, 400, spread=3.0).codes, quantized(1, 400).columns
    same = {f"{i}": Q(codes, torch.full((500,), 0.01), 15, "mlp", columns) for i in range(4)}
    report = tg.byte_report(tg.pack({}, same))
    assert report["scales"]["bytes"] < 100 and report["columns"]["bytes"] < 500


# ----------------------------------------------------------------------------------------------------------
# rANS
# ----------------------------------------------------------------------------------------------------------


def parts_of(*symbols):
    """Symbols by class, the classes behind them empty."""
    given = [np.array(each, dtype=np.uint8).tobytes() for each in symbols]
    return given + [b""] * (tg.CLASSES - len(given))


def drawn_symbols(count, spread, seed=0):
    return np.random.default_rng(seed).normal(127, spread, count).round().clip(0, 254).astype(np.uint8)


RANS = {
    "nothing": parts_of(),
    "one symbol": parts_of([7]),
    "one kind": parts_of([7] * 5000),
    "one kind in each class": parts_of(*([each] * 300 for each in range(tg.CLASSES))),
    "every kind": parts_of(range(256), [], range(255, -1, -1)),
    "a rare one": parts_of([0] * 100_000 + [255] + [0] * 100_000),
    "wide and narrow": parts_of(drawn_symbols(5000, 40), drawn_symbols(70_001, 0.3), [], drawn_symbols(3, 9)),
    "all lanes": parts_of(drawn_symbols((tg.LANES << 12) + 12345, 1.5)),
}


@pytest.mark.parametrize("parts", RANS.values(), ids=RANS)
def test_rans_gives_back_every_symbol_near_the_entropy(parts):
    frame, size = tg.rans_frame(parts), sum(map(len, parts))
    assert all(got.read() == part for got, part in zip(tg.rans_content(frame, size), parts, strict=True))
    bound = sum(entropy_bytes(torch.tensor(list(part))) for part in parts if part)
    kinds, lanes = sum(len(set(part)) for part in parts), min(max(size >> 12, 1), tg.LANES)
    assert len(frame) <= 1.001 * bound + 2 * kinds + 4 * lanes + 150


def test_shares_are_whole_and_follow_the_counts():
    counts = np.zeros((tg.CLASSES, 256), dtype=np.int64)
    counts[0, :3], counts[1, 9], counts[2], counts[3, 5:7] = (1, 10**9, 3), 4, 1, (10**12, 1)
    shares = tg.frequencies(counts)
    assert (shares.sum(1) == [tg.SHARES] * 4 + [0] * (tg.CLASSES - 4)).all() and (
        (shares > 0) == (counts > 0)
    ).all()
    assert shares[1, 9] == tg.SHARES and shares[2].tolist() == [64] * 256 and shares[3, 6] == 1
    uneven = np.zeros_like(counts)
    uneven[0, :4] = 1000, 2000, 3000, 10000
    np.testing.assert_allclose(tg.frequencies(uneven)[0, :4], uneven[0, :4] * tg.SHARES / 16000, rtol=2e-3)


def test_damaged_rans_frames_are_refused():
    """Whatever a forger who also makes the checksum changes: an error, or other symbols, in bounded time."""
    parts, rng = RANS["wide and narrow"], random.Random(0)
    frame, size = tg.rans_frame(parts), sum(map(len, parts))
    ends = struct.unpack_from("<I", frame)[0] + 8
    damaged = [
        frame[:-1],
        frame[:-2],
        frame + b"\0\0",
        frame[:ends],
        frame[:3],
        b"",
        frame[:ends] + frame[ends + 2 :],
    ]
    for _ in range(150):
        bad = bytearray(frame)
        bad[rng.randrange(ends if rng.random() < 0.5 else len(bad))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(bad))
    came_back = 0
    with bounded(20, 100):
        for bad in damaged:
            with contextlib.suppress(ValueError, IndexError, struct.error, tg.zstandard.ZstdError):
                came_back += sum(len(part.read()) for part in tg.rans_content(bad, size)) == size
        for wrong in (0, 1, size - 1, size + 1, 2**31):
            with pytest.raises(ValueError):
                tg.rans_content(frame, wrong)
    assert came_back <= 2


def forged_frame(shares, sizes, states, words=b""):
    plain = np.concatenate([np.ravel(shares), sizes, states]).astype("<u4")
    planes = tg.zstandard.compress(np.ascontiguousarray(plain.view(np.uint8).reshape(-1, 4).T).tobytes())
    return struct.pack("<II", len(planes), plain.nbytes) + planes + words


@pytest.mark.parametrize(
    "fault", ["none", "shares", "all shares", "no states", "states", "sizes", "wrap", "words", "head"]
)
def test_forged_rans_frames_are_refused(fault):
    """A frame of one kind of symbol needs no words, so that all depends on the head."""
    shares, sizes, states = np.zeros((tg.CLASSES, 256)), np.zeros(tg.CLASSES), np.full(1, 1 << 16)
    shares[0, 7], sizes[0], words = tg.SHARES, 100, b""
    if fault == "shares":
        shares[0, 7] -= 1
    if fault == "all shares":
        shares[:] = 2**32 - 1
    if fault == "no states":
        states = states[:0]
    if fault == "states":
        states = np.full(tg.LANES + 1, 1 << 16)
    if fault == "sizes":
        sizes[0], sizes[1] = 99, 1
    if fault == "wrap":
        sizes[1] = 2**32 - 100
    if fault == "words":
        words = b"\1\2"
    frame = forged_frame(shares, sizes, states, words)
    if fault == "head":
        frame = frame[:4] + struct.pack("<I", 2**31) + frame[8:]
    with bounded(5, 100):
        if fault == "none":
            assert tg.rans_content(frame, 100)[0].read() == b"\7" * 100
        else:
            with pytest.raises((ValueError, struct.error)):
                tg.rans_content(frame, 100)


def test_damaged_classes_are_refused():
    """Another class for a column asks it for more than it holds, or for one that is not there."""
    codes = torch.tensor([[9, 1, 9, 1], [9, 1, 9, 1]], dtype=torch.int8)
    header, payload = split(tg.pack({}, {"w": Q(codes, torch.ones(2), 15, "mlp")}))
    header, at = json.loads(header), 0
    for section in header["sections"]:
        if section[0] == "classes":
            break
        at += section[1]
    end, (low, high) = at + section[1], sorted({*tg.by_class(codes, 15)[0].tolist()})
    for classes in ([high, high, high, low], [high, low, high, 77], [low, high, low, low]):
        frame = tg.zstandard.compress(bytes(classes))
        section[1] = len(frame)
        assert refused(join(header, payload[:at] + frame + payload[end:]))


def test_tables_whose_rows_repeat_take_less_than_their_entropy():
    """Rows of tokens that never occur are nearly alike, and zstd may look for matches there."""
    rows = torch.randint(-9, 10, (40, 64), generator=generator())
    codes = torch.cat([rows[torch.randint(0, 40, (300,), generator=generator())], rows]).to(torch.int8)
    sizes = {
        role: tg.byte_report(tg.pack({}, {"w": Q(codes, torch.ones(340), 127, role)}))[f"{role}.127"]["bytes"]
        for role in ("embed", "mlp")
    }
    assert sizes["embed"] < 0.35 * entropy_bytes(codes) < sizes["mlp"]


# ----------------------------------------------------------------------------------------------------------
# Damage
# ----------------------------------------------------------------------------------------------------------


def seal(body):
    """A body with the checksum that belongs to it."""
    return body + hashlib.sha256(body).digest()


def refused(blob):
    """Whether unpack refuses a file, in one clear line; nothing but a ValueError may come out of it."""
    try:
        tg.unpack(blob)
    except ValueError as error:
        (line,) = str(error).splitlines()
        assert "artifact" in line and len(line) < 300
        return True
    return False


def test_trailing_bytes_are_refused():
    blob = tg.pack(CONFIG, a_model())
    for extra in (b"\0", b"x", blob[-32:], blob):
        assert refused(blob + extra) and refused(seal(blob[:-32] + extra))


def test_every_truncation_is_refused():
    blob = tg.pack(CONFIG, a_model())
    assert len(blob) < 5000
    for size in range(len(blob)):
        assert refused(blob[:size])
        assert size % 3 or size == len(blob) - 32 or refused(seal(blob[:size]))


def test_every_flipped_bit_is_refused():
    blob = tg.pack({}, {"w": quantized(3, 4), "b": torch.ones(2)})
    for at in range(8 * len(blob)):
        bad = bytearray(blob)
        bad[at // 8] ^= 1 << at % 8
        assert refused(bytes(bad))


def mutate(data, rng):
    """One to four edits: bytes changed, inserted, dropped, swapped, repeated, or blocks moved."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, span = rng.randrange(len(data)), rng.choice((1, 1, 2, 4, 17))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] = rng.choice((0, 255, data[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
        elif kind == 1:
            data[at:at] = rng.randbytes(span)
        elif kind == 2 and len(data) > span + 1:
            del data[at : at + span]
        elif kind == 3:
            other = rng.randrange(len(data))
            data[at : at + span] = data[other : other + span]
        else:
            data[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1)))
    return bytes(data)


def test_no_mutation_is_accepted():
    blob, rng = tg.pack(CONFIG, a_model()), random.Random(0)
    count = 0
    with bounded(30):
        while count < 3000:
            bad = mutate(blob, rng)
            if bad != blob:
                assert refused(bad)
                count += 1


def assert_sound(blob):
    """A forged file is refused with a ValueError, or what it returns is of the types that unpack promises."""
    try:
        config, tensors = tg.unpack(blob)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 300
        return False
    assert isinstance(config, dict)
    for name, tensor in tensors.items():
        assert isinstance(name, str)
        if isinstance(tensor, Q):
            assert type(tensor.max_code) is int and 1 <= tensor.max_code <= 127
            assert tensor.codes.dtype == torch.int8 and int(tensor.codes.int().abs().max()) <= tensor.max_code
            assert tensor.scales.shape == tensor.codes.shape[:-1]
        else:
            assert isinstance(tensor, torch.Tensor)
    return True


def test_mutations_with_a_repaired_checksum_do_no_harm():
    blob, rng = tg.pack(CONFIG, a_model()), random.Random(1)
    with bounded(30):
        for _ in range(1000):
            assert_sound(seal(mutate(blob[:-32], rng)))


def split(blob):
    """The plain header and the payload of a file."""
    _, _, small, size = tg.PREFIX.unpack_from(blob)
    at = tg.PREFIX.size
    return tg.zstd_content(blob[at : at + small], size), blob[at + small : -32]


def join(header, payload, size=None, small=None):
    """A sealed file of a header (anything JSON, or bytes) and a payload."""
    plain = header if isinstance(header, bytes) else json.dumps(header).encode()
    packed = tg.zstandard.compress(plain, 3)
    prefix = tg.PREFIX.pack(
        tg.MAGIC,
        tg.FORMAT_VERSION,
        len(packed) if small is None else small,
        len(plain) if size is None else size,
    )
    return seal(prefix + packed + payload)


def test_mutations_inside_the_header_do_no_harm():
    """Past the compression, where the mutations of above rarely get."""
    header, payload = split(tg.pack(CONFIG, a_model()))
    rng, accepted = random.Random(2), 0
    assert_sound(join(header, payload))
    with bounded(30):
        for _ in range(1000):
            accepted += assert_sound(join(mutate(header, rng), payload))
    assert 0 < accepted < 800  # a letter of a name may change


# ----------------------------------------------------------------------------------------------------------
# Forgeries
# ----------------------------------------------------------------------------------------------------------


def forged(edit, model=None):
    """A sealed file whose header went through `edit`, which may also return another payload, as bytes."""
    header, payload = split(tg.pack(CONFIG, model or a_model()))
    header = json.loads(header)
    replaced = edit(header)
    return join(header, replaced if isinstance(replaced, bytes) else payload)


def entry(header, name):
    return next(e for e in header["tensors"] if e[0] == name)


def set_(name, at, value):
    return lambda header: entry(header, name).__setitem__(at, value)


def section(at, field, value):
    return lambda header: header["sections"][at].__setitem__(field, value)


def huge_everywhere(header):
    entry(header, "count")[2] = [2**60]
    next(s for s in header["sections"] if s[0] == "raw.int64")[2] = 2**63


def a_billion_rows(header):
    entry(header, "empty")[2] = [2**30, 0]
    header["tensors"].append(["more", "codes", [2**30, 0], "scales", 15])


def duplicate_tensor(header):
    """The same name twice, the sizes still adding up."""
    entry(header, "blocks.0.mlp.fc.weight")[0] = "blocks.0.attn.c_q.weight"


def duplicate_section(header):
    """A section twice; the second copy of its bytes is there too."""
    header["sections"].append(list(header["sections"][0]))
    payload = split(tg.pack(CONFIG, a_model()))[1]
    return payload + payload[: header["sections"][0][1]]


def wider_grid_than_the_codes(header):
    for e in header["tensors"]:
        if e[0] == "blocks.0.attn.c_q.weight":
            e[4] = 3


def frame_of_another_size(header):
    """Ten million zeros where the header says a few bytes."""
    bomb = tg.zstandard.compress(bytes(10_000_000), 3)
    payload, at = b"", 0
    whole = split(tg.pack(CONFIG, a_model()))[1]
    for s in header["sections"]:
        part = whole[at : at + s[1]]
        at += s[1]
        if s[0] == "raw.int64":
            part, s[1] = bomb, len(bomb)
        payload += part
    return payload


def negative_pieces(header):
    header["sections"][0][1] += 50
    header["sections"][1][1] -= 50


EDITS = {
    "2^60 elements": huge_everywhere,
    "2^60 elements, small section": set_("count", 2, [2**60]),
    "2^30 rows of nothing": a_billion_rows,
    "overflowing product": set_("count", 2, [2**31, 2**31, 2]),
    "negative shape": set_("count", 2, [-2]),
    "two negatives": set_("count", 2, [-1, -2]),
    "shape of floats": set_("count", 2, [2.0]),
    "shape of text": set_("count", 2, ["2"]),
    "shape of truth": set_("bigram.scale", 2, [True]),
    "no shape": set_("count", 2, None),
    "shape a number": set_("count", 2, 2),
    "shape a text": set_("bigram.scale", 2, ""),
    "shape an object": set_("bigram.scale", 2, {}),
    "other shape": set_("count", 2, [3]),
    "200,000 dimensions": set_("count", 2, [2**31] * 200_000),
    "million zeros": set_("empty", 2, [0] * 1_000_000),
    "scalar codes": set_("blocks.0.attn.c_q.weight", 2, []),
    "unknown kind": set_("count", 1, "float4"),
    "object kind": set_("count", 1, "object"),
    "code as a kind": set_("count", 1, "__import__('os')"),
    "number as a kind": set_("count", 1, 5),
    "unknown section": set_("count", 3, "raw.int32"),
    "section a list": set_("count", 3, []),
    "section a number": set_("tok_emb.weight", 3, 5),
    "codes in a raw section": set_("tok_emb.weight", 3, "raw.float16"),
    "name a number": set_("count", 0, 7),
    "name null": set_("count", 0, None),
    "name true": set_("count", 0, True),
    "name a list": set_("count", 0, ["count"]),
    "duplicate name": duplicate_tensor,
    "duplicate section": duplicate_section,
    "code off its grid": wider_grid_than_the_codes,
    "no grid": set_("tok_emb.weight", 4, 0),
    "negative grid": set_("tok_emb.weight", 4, -127),
    "wide grid": set_("tok_emb.weight", 4, 128),
    "vast grid": set_("tok_emb.weight", 4, 2**70),
    "float grid": set_("tok_emb.weight", 4, 127.0),
    "text grid": set_("tok_emb.weight", 4, "127"),
    "true grid": set_("tok_emb.weight", 4, True),
    "null grid": set_("tok_emb.weight", 4, None),
    "fraction of a grid": set_("tok_emb.weight", 4, 126.5),
    "bomb": frame_of_another_size,
    "pieces moved": negative_pieces,
    "negative piece": section(0, 1, -1),
    "piece a float": section(0, 1, 1.5),
    "piece a text": section(0, 1, "1"),
    "section smaller": section(0, 2, 1),
    "section larger": section(0, 2, 2**31),
    "section vast": section(0, 2, 2**63),
    "section null": section(0, 2, None),
    "section renamed": section(0, 0, "other"),
    "section short": lambda h: h["sections"][0].pop(),
    "entry short": lambda h: h["tensors"][0].pop(),
    "entry long": lambda h: h["tensors"][0].append(0),
    "entry a text": lambda h: h["tensors"].append("abcde"),
    "no tensors": lambda h: h.pop("tensors"),
    "no sections": lambda h: h.pop("sections"),
    "no config": lambda h: h.pop("config"),
    "tensors an object": lambda h: h.update(tensors={}),
    "sections null": lambda h: h.update(sections=None),
    "config a list": lambda h: h.update(config=[1]),
    "config null": lambda h: h.update(config=None),
    "tensor missing": lambda h: h["tensors"].pop(),
    "all missing": lambda h: h["tensors"].clear(),
    "section missing": lambda h: h["sections"].pop(),
}


@pytest.mark.parametrize("name", EDITS)
def test_forged_headers_are_refused(name):
    blob = forged(EDITS[name])
    with bounded(5, 200), pytest.raises(ValueError) as caught:
        tg.unpack(blob)
    assert len(str(caught.value).splitlines()) == 1


NO_HEADERS = [
    b"", b"{", b"null", b"[]", b"5", b'"x"', b"{}", b"\xff\xfe", b"[" * 1_000_000, b'{"a":' * 300_000,
    b"1" * 1_000_000, b'{"config":{},"tensors":[],"sections":[["x",0,0]]}',
    b'{"config":{},"tensors":[],"sections":[]}{}',
    b'{"config":{},"tensors":[],"sections":[]} ' + b" " * 2**24,
]  # fmt: skip


@pytest.mark.parametrize("header", NO_HEADERS, ids=lambda header: repr(header[:10]))
def test_headers_that_are_none(header):
    with bounded(5, 300), pytest.raises(ValueError):
        tg.unpack(join(header, b""))


SIZES = [(size, small) for size in (None, 0, 1, 2**32 - 1) for small in (None, 0, 5, 2**32 - 1)][1:]


@pytest.mark.parametrize(("size", "small"), SIZES)
def test_impossible_header_sizes(size, small):
    header = {"config": {}, "tensors": [], "sections": []}
    assert tg.unpack(join(header, b"")) == ({}, {})
    with bounded(2, 100), pytest.raises(ValueError):
        tg.unpack(join(header, b"", size, small))


def test_a_header_that_decompresses_to_more_than_it_says():
    """A gigabyte of blanks in a few kilobytes: refused before it is taken, whether announced or not."""
    bomb = tg.zstandard.compress(b" " * 2**27, 1)
    assert len(bomb) < 20_000
    for size in (100, 2**24, 2**27, 2**31):
        with bounded(2, 100), pytest.raises(ValueError):
            tg.unpack(seal(tg.PREFIX.pack(tg.MAGIC, tg.FORMAT_VERSION, len(bomb), size) + bomb))


def test_a_frame_that_lies_about_its_size():
    """zstd's own content size agrees with the header, and the blocks behind it hold more, less or nothing."""
    frame = bytearray(tg.zstandard.compress(bytes(range(200)), 3))
    assert tg.zstandard.frame_content_size(bytes(frame)) == 200 and frame[5] == 200

    def file(size, frames):
        frame[5] = size
        tensors, sections = [["x", "uint8", [size], "raw", 0]], [["raw", len(frame + frames), size]]
        return join(dict(config={}, tensors=tensors, sections=sections), bytes(frame + frames))

    for claimed in (100, 199, 201, 255):
        assert refused(file(claimed, b""))
    assert tg.unpack(file(200, b""))[1]["x"].tolist() == list(range(200))
    assert refused(file(200, tg.zstandard.compress(b"more")))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scales_that_are_not_finite_are_refused(scale):
    """pack never writes them, and one would make every loss NaN."""

    def file(scale):
        parts = {"embed.15": b"\x0f" * 6, "columns": bytes(3), "scales": struct.pack("<2e", 1, scale)}
        frames = [tg.zstandard.compress(data) for data in parts.values()]
        sections = [[key, len(frame), len(parts[key])] for key, frame in zip(parts, frames)]
        tensors = [["w", "codes", [2, 3], "embed.15", 15]]
        return join(dict(config={}, tensors=tensors, sections=sections), b"".join(frames))

    assert refused(file(scale)) and tg.unpack(file(2.0))[1]["w"].scales.tolist() == [1, 2]


def foreign_files():
    zipped, saved = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("data.pkl", pickle.dumps({"a": 1}))
    torch.save({"w": torch.ones(3)}, saved)
    payload = tg.pack({}, {})
    return {
        "empty": b"",
        "one byte": b"P",
        "magic": tg.MAGIC,
        "zip": zipped.getvalue(),
        "torch": saved.getvalue(),
        "pickle": pickle.dumps({"a": [1] * 100}),
        "zeros": bytes(1000),
        "text": b"hello world\n" * 100,
        "zstd": tg.zstandard.compress(bytes(5000)),
        "magic and zeros": tg.MAGIC + bytes(1000),
        "sealed zip": seal(zipped.getvalue()),
        "sealed zeros": seal(tg.MAGIC + bytes(100)),
        "next version": seal(payload[:8] + struct.pack("<I", tg.FORMAT_VERSION + 1) + payload[12:-32]),
        "other magic": seal(b"PGOLFGPU" + payload[8:-32]),
    }


@pytest.mark.parametrize("name", foreign_files())
def test_foreign_files_are_refused(name):
    with bounded(2, 100):
        assert refused(foreign_files()[name])


def test_nothing_in_a_file_is_executed(monkeypatch):
    """No way leads to pickle, eval or an import, for a good file and for one that holds a pickle."""

    class Harm:
        def __reduce__(self):
            return exec, ("raise SystemExit('executed')",)

    foreign = pickle.dumps(Harm())
    harmful = torch.frombuffer(bytearray(foreign), dtype=torch.uint8)
    blob = tg.pack({"code": "__import__('os').abort()"}, a_model() | {"__reduce__": harmful})

    def forbidden(*_args, **_options):
        raise AssertionError("this may execute what a file says")

    with monkeypatch.context() as patch:
        for (
            place
        ) in "pickle.loads pickle.load pickle.Unpickler torch.load builtins.eval builtins.exec".split():
            patch.setattr(place, forbidden)
        config, tensors = tg.unpack(blob)
        harmless = refused(foreign)
    assert harmless and config["code"].startswith("__import__") and same(harmful, tensors["__reduce__"])


# ----------------------------------------------------------------------------------------------------------
# From a file to a model
# ----------------------------------------------------------------------------------------------------------

TECHNIQUES = {
    name: f.metadata["off"]
    for name, f in tg.Hyperparameters.fields("model").items()
    if f.metadata["off"] is not None
}


@pytest.fixture(scope="module")
def artifact(tiny_hp):
    """A world, the settings of a small model, its artifact."""
    sizes = dict(num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, vocab_size=64, ve_layers=(1,))
    hp = dataclasses.replace(tiny_hp, **sizes)
    return tg.World(hp, {}), hp, packed_model(hp)


def packed_model(hp):
    """The artifact of a model with random weights, fp16."""
    weights = {name: weight.half() for name, weight in random_model(hp).state_dict().items()}
    return tg.pack(tg.artifact_config(hp, {"steps": 3}), weights)


def with_settings(blob, without=(), **changes):
    """The same file with other settings, as a forger or another version of the script writes it."""
    header, payload = split(blob)
    header = json.loads(header)
    kept = {name: value for name, value in header["config"]["model"].items() if name not in without}
    header["config"]["model"] = kept | changes
    return join(header, payload)


def refusal(blob, hp, world):
    """The one line with which load_artifact refuses a file; None where it takes it."""
    try:
        tg.load_artifact(blob, hp, world)
    except ValueError as error:
        (line,) = str(error).splitlines()
        return line
    return None


def test_the_model_is_rebuilt_from_the_file_alone(artifact):
    world, hp, blob = artifact
    other = tg.Hyperparameters.from_env({"PRESET": "pr601", "DEVICE": "cpu", "TTT_LR": "0.5"})
    model, facts = tg.load_artifact(blob, other, world)
    assert facts == {"steps": 3}
    for name in hp.fields():
        giver = hp if name in hp.fields("model") else other
        assert getattr(model.hp, name) == getattr(giver, name), name
    weights = random_model(hp).state_dict()
    assert all(torch.equal(w, weights[name].half().float()) for name, w in model.state_dict().items())
    assert torch.isfinite(model(torch.arange(12).view(1, 12))).all()


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_that_the_file_does_not_name_is_off(artifact, name):
    """It was written before there was such a technique; what the caller's settings say does not count."""
    world, hp, _ = artifact
    on = dict(num_layers=4, sparse_attn_gate_enabled=True, num_loops=2, loop_start=1, loop_end=2)
    on |= dict(skip_gates_enabled=True, parallel_start_layer=3, document_mask=True, ttt_enabled=False)
    hp = dataclasses.replace(hp, **on)
    plain = dataclasses.replace(hp, **{name: TECHNIQUES[name]})
    assert getattr(hp, name) != TECHNIQUES[name]
    earlier = with_settings(packed_model(plain), without=(name,))
    model, _ = tg.load_artifact(earlier, hp, world)
    assert model.hp == plain
    expected, _ = tg.load_artifact(packed_model(plain), hp, world)
    tokens = torch.randint(0, 64, (2, 16), generator=generator())
    assert torch.equal(model(tokens), expected(tokens))


@pytest.mark.parametrize("name", tg.Hyperparameters.fields("model").keys() - TECHNIQUES)
def test_a_size_that_the_file_does_not_name_is_an_error(artifact, name):
    world, hp, blob = artifact
    line = refusal(with_settings(blob, without=(name,)), hp, world)
    assert line and "artifact" in line and (name in line or name == "ve_layers")


@pytest.mark.parametrize("name", ["num_lanes", "NUM_LAYERS", "seed", "", "x" * 100])
def test_a_setting_that_this_script_does_not_know_is_an_error(artifact, name):
    """What a later script wrote would be computed otherwise there, though the tensors may fit."""
    world, hp, blob = artifact
    line = refusal(with_settings(blob, **{name: 0}), hp, world)
    assert line and "artifact" in line and name[:60] in line


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model": {}},
        {"model": []},
        {"model": None},
        {"model": 5},
        {"facts": {}},
        {"model": {"num_layers": 2}},
    ],
)
def test_a_file_that_is_no_model_is_refused(artifact, config):
    world, hp, blob = artifact
    for tensors in ({}, tg.unpack(blob)[1]):
        assert refusal(tg.pack(config, tensors), hp, world)


def usable(hp, name, value):
    """Whether a model may have this setting, odd as it is."""
    if type(value) is not type(getattr(hp, name)) or name == "mlp_mult":
        return False
    if value == 10**9:
        return name in ("rope_ntk_reference", "xsa_last_n")
    return value == 3.5 and name != "mlp_slope"


@pytest.mark.parametrize("name", tg.Hyperparameters.fields("model"))
def test_settings_of_a_file_that_no_model_has(artifact, name):
    """Refused when the file is loaded, not by a traceback in the first forward pass, nor after hours."""
    world, hp, blob = artifact
    with bounded(5):
        for value in ("8", None, -1, -0.5, {}, [[1]], 3.5, 10**9):
            taken = refusal(with_settings(blob, **{name: value}), hp, world) is None
            assert taken == usable(hp, name, value), value


def test_a_million_value_embeddings_are_refused(artifact):
    world, hp, blob = artifact
    with bounded(5):
        assert refusal(with_settings(blob, ve_layers=[1] * 1_000_000), hp, world)


def test_tensors_that_are_not_the_models_are_refused(artifact):
    world, hp, blob = artifact
    (config, weights), name = tg.unpack(blob), "blocks.0.attn.c_q.weight"
    for bad in (
        {k: v for k, v in weights.items() if k != name},
        weights | {"more": torch.ones(1)},
        weights | {name: torch.ones(3, 3)},
        weights | {name: weights[name].flatten()},
        {k.upper(): v for k, v in weights.items()},
    ):
        assert refusal(tg.pack(config, bad), hp, world)


def test_a_damaged_artifact_is_refused_before_anything_is_built(artifact):
    """Without settings and a world nothing could be."""
    blob = bytearray(artifact[2])
    blob[len(blob) // 2] ^= 4
    with pytest.raises(ValueError, match="checksum"):
        tg.load_artifact(bytes(blob), None, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_raw_tensor_that_is_not_finite_is_refused(artifact, value):
    """One such number makes every loss NaN, which scored as val_bpb:nan with exit status 0."""
    world, hp, blob = artifact
    config, weights = tg.unpack(blob)
    for name in ("skip_weights", "blocks.0.attn.q_gain", "tok_emb.weight"):
        bad = weights[name].clone()
        bad.view(-1)[-1] = value
        assert "not finite" in refusal(tg.pack(config, weights | {name: bad}), hp, world)
    wide = weights | {"skip_weights": weights["skip_weights"].double() + 1e300}  # infinite as float32
    assert "not finite" in refusal(tg.pack(config, wide), hp, world)


def test_a_negative_scale_is_refused(artifact):
    """It turns a row's sign around; scales of zero, of a row of zeros, are fine."""
    world, hp, blob = artifact
    (config, weights), name = tg.unpack(blob), "blocks.0.attn.c_q.weight"
    for low, fine in ((0.0, True), (0.5, True), (-0.5, False)):
        scales = torch.ones(len(weights[name]))
        scales[-1] = low
        q = Q(torch.ones(weights[name].shape, dtype=torch.int8), scales, 15, "attn")
        told = refusal(tg.pack(config, weights | {name: q}), hp, world)
        assert told is None if fine else "scale negative" in told


def grown(hp, blob, **sizes):
    """A forgery of few bytes: the settings of a large model with all its tensors, of zeros."""
    with torch.device("meta"):
        large = tg.GPT(dataclasses.replace(hp, **sizes))
    shapes = {name: [*p.shape] for name, p in large.state_dict().items()}
    header, _ = split(with_settings(blob, **sizes))
    header, total = json.loads(header), sum(map(math.prod, shapes.values()))
    zeros = tg.zstandard.compress(bytes(2 * total), 1)
    header["tensors"] = [[name, "float16", shape, "raw.float16", 0] for name, shape in shapes.items()]
    header["sections"] = [["raw.float16", len(zeros), 2 * total]]
    return join(header, zeros)


BOMBS = {
    "sections without tensors": lambda hp, blob: forged_bomb(blob, tensors=False),
    "tensors of no model": lambda hp, blob: forged_bomb(blob, tensors=True),
    "a large model of zeros": lambda hp, blob: grown(hp, blob, vocab_size=65536, bigram_vocab_size=10**6),
    "wide": lambda hp, blob: with_settings(blob, model_dim=65536, num_heads=64, mlp_mult=64.0),
    "deep": lambda hp, blob: with_settings(blob, num_layers=1000),
    "many buckets": lambda hp, blob: with_settings(blob, bigram_vocab_size=10**9, bigram_dim=65536),
    "header of lists": lambda hp, blob: join(b'{"config":[' + b"[]," * 5_000_000 + b"[]]}", b""),
}


def forged_bomb(blob, tensors):
    """1.5 GB of zeros beside a small model's settings."""
    header, payload = split(blob)
    header, size = json.loads(header), 3 << 29
    zeros = tg.zstandard.ZstdCompressor(level=1).compress(bytes(size))
    header["sections"].append(["raw.uint8", len(zeros), size])
    if tensors:
        header["tensors"].append(["more", "uint8", [size], "raw.uint8", 0])
    return join(header, payload + zeros)


@pytest.mark.whole
def test_a_small_file_takes_no_memory_before_it_is_refused(artifact, tmp_path):
    """In a process of its own, whose peak is what all refusals together took."""
    world, hp, blob = artifact
    for name, forge in BOMBS.items():
        (tmp_path / name).write_bytes(forge(hp, blob))
        assert (tmp_path / name).stat().st_size < 3_000_000
    code = (
        "import resource, sys, time; sys.path.insert(0, sys.argv[1]); import train_gpt as tg\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "hp = tg.Hyperparameters(device='cpu')\n"
        "with tg.torch.device('meta'): tg.GPT(hp)  # the first imports for a second\n"
        "world, before = tg.World(hp, {}), peak()\n"
        "for path in sys.argv[2:]:\n"
        "    blob, start = open(path, 'rb').read(), time.process_time()\n"
        "    try: tg.load_artifact(blob, hp, world)\n"
        "    except tg.UserError as error: print(f'{time.process_time() - start} {peak() - before} {error}')"
    )
    command = [sys.executable, "-c", code, str(ROOT), *(str(tmp_path / name) for name in BOMBS)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == len(BOMBS)
    for line in said:
        seconds, megabytes, error = line.split(maxsplit=2)
        assert float(seconds) < 0.5 and float(megabytes) < 300 and "artifact" in error, line


def test_packing_is_quick():
    """2 M codes, where a search for matches would take many seconds."""
    tensors = {"blocks.0.mlp.fc.weight": quantized(2000, 1000, spread=2.85)}
    start = time.perf_counter()
    tg.pack({}, tensors)
    assert time.perf_counter() - start < 3
