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

import pytest
import torch
from conftest import ROOT

import train_gpt as tg

Q = tg.QuantizedTensor
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool]
ZEROS = torch.zeros(2, 3, dtype=torch.int8)
CONFIG = {"model": {"dim": 4, "ratio": 0.5, "layers": [1, 2], "on": True, "off": None},
"ü": "\u2581 \U0001f600"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def quantized(rows, columns, max_code=15, seed=0, spread=None):
    """Codes over the whole grid, or Gaussian ones, and scales that fp16 holds exactly."""
    codes = torch.randint(-max_code, max_code + 1, (rows, columns), generator=generator(seed))
    if spread:
        codes = (torch.randn(rows, columns, generator=generator(seed)) * spread).round().clamp(-max_code,
        max_code)
    return Q(codes.to(torch.int8), (torch.rand(rows, generator=generator(seed)) + 0.01).half().float(),
    max_code)


def a_model():
    """A bit of everything."""
    return {"blocks.0.attn.c_q.weight": quantized(6, 5), "blocks.0.mlp.fc.weight": quantized(7, 5, 15, 1),
            "blocks.1.mlp.fc.weight": quantized(7, 5, 31, 2), "tok_emb.weight": quantized(9, 5, 127, 3),
            "skip_weights": torch.randn(2, 5, generator=generator()).half(),
            "bigram.scale": torch.tensor(0.05),
            "count": torch.tensor([3, -4]), "empty": torch.zeros(0, 3)}


def same(a, b):
    """Equal kind, shape, dtype and bits."""
    if isinstance(a, Q):
        return isinstance(b, Q) and a.max_code == b.max_code and type(b.max_code) is int \
            and b.codes.dtype == torch.int8 and a.codes.shape == b.codes.shape and torch.equal(a.codes,
            b.codes) \
            and b.scales.shape == a.scales.shape and torch.equal(a.scales.half().float(), b.scales.float())
    return isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) \
        and tg.tensor_bytes(a) == tg.tensor_bytes(b)


def assert_round_trip(config, tensors, **options):
    got_config, got = tg.unpack(tg.pack(config, tensors, **options))
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
    assert_round_trip({}, {"blocks.0.attn.c_q.weight": tensor, "other": tensor})
    back = tg.unpack(tg.pack({}, {"w": tensor}))[1]["w"]
    torch.testing.assert_close(back.dequantize(), tensor.dequantize(), rtol=0, atol=0)


def test_many_tensors_of_every_kind_come_back_under_their_own_names():
    tensors = {f"{prefix}.{i}.{part}.weight": quantized(i + 1, 4, code, i) for i in range(4)
               for prefix, part, code in (("blocks", "attn.c_q", 15), ("blocks", "mlp.fc", 31), ("odd",
                   "one", 7))}
    tensors |= {f"raw.{i}": torch.full((i,), float(i), dtype=dtype) for i, dtype in enumerate(DTYPES[:4])}
    assert_round_trip(CONFIG, a_model() | tensors)


@pytest.mark.parametrize("name", [
    "", " ", "a b", "ü.é", "\u2581", "\U0001f600", "../../etc/passwd", "a\nb", "\0", '"quoted"', "codes",
    "scales", "raw.float32", "attn.15", "config", "__class__", "blocks.", "blocks.weight",
    "blocks.x.weight", "x" * 5000])
def test_odd_names(name):
    assert_round_trip({}, {name: quantized(3, 4), name + "2": torch.ones(2), "x": torch.zeros(1)})


@pytest.mark.parametrize("config", [
    {}, CONFIG, {"": ""}, {"a": {"b": {"c": [[], {}, [{}]]}}}, {"n": [0, -1, 2**70, 1e-300, 0.1, 1e308]},
    {"lone": "\ud800", "nul": "\0", "long": "x" * 100_000}, {"config": 1, "tensors": [], "sections": None}])
def test_any_json_config(config):
    assert_round_trip(config, {"x": torch.ones(2)})
    assert_round_trip(config, {})


def test_inputs_need_not_be_contiguous_and_are_left_alone():
    base, codes = torch.randn(6, 8, generator=generator()), quantized(8, 6).codes
    views = {"transposed": base.mT, "strided": base[::2, 1::3], "expanded": base[:1].expand(4, 8),
             "parameter": torch.nn.Parameter(base), "reversed": base.flip(0),
             "codes": Q(codes.mT, torch.ones(6, 2)[:, 1], 15)}
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


@pytest.mark.parametrize("level", [1, 3, 19, 22])
def test_any_level_says_the_same(level):
    assert_round_trip(CONFIG, a_model(), level=level)


def test_the_same_tensors_give_the_same_bytes():
    model = a_model()
    blob = tg.pack(CONFIG, model)
    assert blob == tg.pack(CONFIG, model)
    backwards = dict(reversed(CONFIG.items()))
    assert blob == tg.pack(backwards, dict(reversed(model.items())))
    moved = {name: Q(t.codes.mT.contiguous().mT, t.scales.half(), t.max_code) if isinstance(t,
    Q) else t.clone()
             for name, t in model.items()}
    assert blob == tg.pack(CONFIG, moved) == tg.pack(*tg.unpack(blob))


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


def test_another_process_gives_the_same_bytes():
    """With other hashes of text and another number of threads."""
    blob = tg.pack(CONFIG, a_model() | {"blocks.2.mlp.fc.weight": quantized(300, 500)})
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": ""}
    command = [sys.executable, "-c", ELSEWHERE, str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == hashlib.sha256(blob).hexdigest(), done.stderr


@pytest.mark.parametrize("tensor", [
    torch.ones(2, dtype=torch.complex64), Q(torch.full((2, 3), 16, dtype=torch.int8), torch.ones(2), 15),
    Q(torch.full((2, 3), -16, dtype=torch.int8), torch.ones(2), 15),
    Q(torch.full((2, 3), -128, dtype=torch.int8), torch.ones(2), 127),
    Q(ZEROS, torch.ones(2), 0), Q(ZEROS, torch.ones(2), 128), Q(ZEROS, torch.ones(3), 15),
    Q(ZEROS, torch.ones(2, 1), 15), Q(ZEROS, torch.tensor([1.0, math.nan]), 15),
    Q(ZEROS, torch.tensor([1.0, 1e6]), 15)],
    ids=["complex", "code high", "code low", "code -128", "no grid", "wide grid", "scales short",
    "scales 2-D",
         "scale NaN", "scale beyond fp16"])
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


@pytest.mark.parametrize("level", [1, 3, 22])
def test_gaussian_codes_come_close_to_their_entropy(level):
    tensors = {f"blocks.{i}.{part}.weight": quantized(1000, 500, 15, 2 * i + (part < "b"), spread=2.85)
               for i in range(2) for part in ("attn.c_q", "mlp.fc")}
    blob = tg.pack({}, tensors, level=level)
    bound = entropy_bytes(torch.cat([t.codes.flatten() for t in tensors.values()]))
    scales = 2 * 4 * 1000
    assert bound < len(blob) <= 1.007 * bound + scales + 2000
    report = tg.byte_report(blob, tensors)
    assert sum(section["bytes"] for section in report.values()) == len(blob)
    for role in ("attn", "mlp"):
        section = report[f"{role}.15"]
        expected = entropy_bytes(torch.cat([t.codes for n, t in tensors.items() if f".{role}." in n]))
        assert section["entropy_bytes"] == pytest.approx(expected) and section["plain_bytes"] == 1_000_000
        assert section["bytes"] <= 1.007 * expected
    assert report["scales"]["plain_bytes"] == scales


def test_tables_whose_rows_repeat_take_less_than_their_entropy():
    """Rows of tokens that never occur are nearly alike, and zstd may look for matches there."""
    rows = torch.randint(-9, 10, (40, 64), generator=generator())
    codes = torch.cat([rows[torch.randint(0, 40, (300,), generator=generator())], rows]).to(torch.int8)
    tensors = {"tok_emb.weight": Q(codes, torch.ones(340), 127)}
    section = tg.byte_report(tg.pack({}, tensors), tensors)["embed.127"]
    assert section["bytes"] < 0.35 * section["entropy_bytes"]


@pytest.mark.slow
def test_a_pr606_sized_model_is_packed_tightly_and_quickly():
    """31.7 M Gaussian codes, 1.7 M of tables: 1.007 times the entropy, raw tensors and scales, and 40 kB."""
    hp = tg.Hyperparameters.from_env({"PRESET": "pr606"})
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in tg.GPT(hp).named_parameters()}
    max_codes = tg.matrix_max_codes(hp, shapes)
    tensors = {name: quantized(*shape, max_codes.get(name, 127), i, 2.85 if name in max_codes else 30)
               if name in max_codes or tg.role_of(name) == "embed" else torch.ones(shape).half()
               for i, (name, shape) in enumerate(shapes.items())}
    start = time.perf_counter()
    blob = tg.pack(tg.artifact_config(hp, {}), tensors)
    assert time.perf_counter() - start < 5
    coded = [t for t in tensors.values() if isinstance(t, Q)]
    assert sum(t.codes.numel() for t in coded if t.max_code == 15) == 31_719_424
    bound = sum(entropy_bytes(torch.cat([t.codes.flatten() for t in coded if t.max_code == max_code]))
                for max_code in (15, 127))
    beside = sum(2 * (t.scales if isinstance(t, Q) else t).numel() for t in tensors.values())
    assert len(blob) <= 1.007 * bound + beside + 40_000


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
        assert size % 3 or refused(seal(blob[:size]))


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
            del data[at: at + span]
        elif kind == 3:
            other = rng.randrange(len(data))
            data[at: at + span] = data[other: other + span]
        else:
            data[at: at + 4] = struct.pack("<I", rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1)))
    return bytes(data)


def test_no_mutation_is_accepted():
    blob, rng = tg.pack(CONFIG, a_model()), random.Random(0)
    count = 0
    with bounded(30):
        while count < 5000:
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
        for _ in range(2500):
            assert_sound(seal(mutate(blob[:-32], rng)))


def split(blob):
    """The plain header and the payload of a file."""
    _, _, small, size = tg.PREFIX.unpack_from(blob)
    at = tg.PREFIX.size
    return tg.decompress(blob[at: at + small], size), blob[at + small: -32]


def join(header, payload, size=None, small=None):
    """A sealed file of a header (anything JSON, or bytes) and a payload."""
    plain = header if isinstance(header, bytes) else json.dumps(header).encode()
    packed = tg.compress(plain, 3, literals=False)
    prefix = tg.PREFIX.pack(tg.MAGIC, tg.FORMAT_VERSION, len(packed) if small is None else small,
                            len(plain) if size is None else size)
    return seal(prefix + packed + payload)


def test_mutations_inside_the_header_do_no_harm():
    """Past the compression, where the mutations of above rarely get."""
    header, payload = split(tg.pack(CONFIG, a_model()))
    rng, accepted = random.Random(2), 0
    assert_sound(join(header, payload))
    with bounded(30):
        for _ in range(2500):
            accepted += assert_sound(join(mutate(header, rng), payload))
    assert 0 < accepted < 2000  # a letter of a name may change


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
    bomb = tg.compress(bytes(10_000_000), 3, literals=False)
    payload, at = b"", 0
    whole = split(tg.pack(CONFIG, a_model()))[1]
    for s in header["sections"]:
        part = whole[at: at + s[1]]
        at += s[1]
        if s[0] == "raw.int64":
            part, s[1] = bomb, len(bomb)
        payload += part
    return payload


def negative_pieces(header):
    header["sections"][0][1] += 50
    header["sections"][1][1] -= 50


EDITS = {
    "2^60 elements": huge_everywhere, "2^60 elements, small section": set_("count", 2, [2**60]),
    "2^30 rows of nothing": a_billion_rows, "overflowing product": set_("count", 2, [2**31, 2**31, 2]),
    "negative shape": set_("count", 2, [-2]), "two negatives": set_("count", 2, [-1, -2]),
    "shape of floats": set_("count", 2, [2.0]), "shape of text": set_("count", 2, ["2"]),
    "shape of truth": set_("bigram.scale", 2, [True]), "no shape": set_("count", 2, None),
    "shape a number": set_("count", 2, 2), "shape a text": set_("bigram.scale", 2, ""),
    "shape an object": set_("bigram.scale", 2, {}), "other shape": set_("count", 2, [3]),
    "200,000 dimensions": set_("count", 2, [2**31] * 200_000),
    "million zeros": set_("empty", 2, [0] * 1_000_000), "scalar codes": set_("blocks.0.attn.c_q.weight", 2,
    []),
    "unknown kind": set_("count", 1, "float4"), "object kind": set_("count", 1, "object"),
    "code as a kind": set_("count", 1, "__import__('os')"), "number as a kind": set_("count", 1, 5),
    "unknown section": set_("count", 3, "raw.int32"),
    "section a list": set_("count", 3, []), "name a number": set_("count", 0, 7),
    "name null": set_("count", 0, None),
    "name true": set_("count", 0, True), "name a list": set_("count", 0, ["count"]),
    "duplicate name": duplicate_tensor, "duplicate section": duplicate_section,
    "code off its grid": wider_grid_than_the_codes, "no grid": set_("tok_emb.weight", 4, 0),
    "negative grid": set_("tok_emb.weight", 4, -127), "wide grid": set_("tok_emb.weight", 4, 128),
    "vast grid": set_("tok_emb.weight", 4, 2**70), "float grid": set_("tok_emb.weight", 4, 127.0),
    "text grid": set_("tok_emb.weight", 4, "127"), "true grid": set_("tok_emb.weight", 4, True),
    "null grid": set_("tok_emb.weight", 4, None), "fraction of a grid": set_("tok_emb.weight", 4, 126.5),
    "bomb": frame_of_another_size, "pieces moved": negative_pieces, "negative piece": section(0, 1, -1),
    "piece a float": section(0, 1, 1.5), "piece a text": section(0, 1, "1"),
    "section smaller": section(0, 2, 1),
    "section larger": section(0, 2, 2**31), "section vast": section(0, 2, 2**63),
    "section null": section(0, 2, None),
    "section renamed": section(0, 0, "other"), "section short": lambda h: h["sections"][0].pop(),
    "entry short": lambda h: h["tensors"][0].pop(), "entry long": lambda h: h["tensors"][0].append(0),
    "entry a text": lambda h: h["tensors"].append("abcde"), "no tensors": lambda h: h.pop("tensors"),
    "no sections": lambda h: h.pop("sections"), "no config": lambda h: h.pop("config"),
    "tensors an object": lambda h: h.update(tensors={}), "sections null": lambda h: h.update(sections=None),
    "config a list": lambda h: h.update(config=[1]), "config null": lambda h: h.update(config=None),
    "tensor missing": lambda h: h["tensors"].pop(), "all missing": lambda h: h["tensors"].clear(),
    "section missing": lambda h: h["sections"].pop()}


@pytest.mark.parametrize("name", EDITS)
def test_forged_headers_are_refused(name):
    blob = forged(EDITS[name])
    with bounded(5, 200), pytest.raises(ValueError) as caught:
        tg.unpack(blob)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("header", [
    b"", b"{", b"null", b"[]", b"5", b'"x"', b"{}", b"\xff\xfe", b"[" * 1_000_000, b'{"a":' * 300_000,
    b"1" * 1_000_000,
    b'{"config":{},"tensors":[],"sections":[["x",0,0]]}',
    b'{"config":{},"tensors":[],"sections":[]} ' + b" " * 2**24,
    b'{"config":{},"tensors":[],"sections":[]}{}'])
def test_headers_that_are_none(header):
    with bounded(5, 300), pytest.raises(ValueError):
        tg.unpack(join(header, b""))


@pytest.mark.parametrize(("size", "small"), [
    (2**32 - 1, None), (None, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0, None), (None, 0), (0, 0), (1, None),
    (None, 5)])
def test_impossible_header_sizes(size, small):
    header = {"config": {}, "tensors": [], "sections": []}
    assert tg.unpack(join(header, b"")) == ({}, {})
    with bounded(2, 100), pytest.raises(ValueError):
        tg.unpack(join(header, b"", size, small))


def test_a_header_that_decompresses_to_more_than_it_says():
    """A gigabyte of blanks in a few kilobytes: refused before it is taken, whether announced or not."""
    bomb = tg.compress(b" " * 2**27, 1, literals=False)
    assert len(bomb) < 20_000
    for size in (100, 2**24, 2**27, 2**31):
        with bounded(2, 100), pytest.raises(ValueError):
            tg.unpack(seal(tg.PREFIX.pack(tg.MAGIC, tg.FORMAT_VERSION, len(bomb), size) + bomb))


def test_a_frame_that_lies_about_its_size():
    """zstd's own content size agrees with the header, and the blocks behind it hold more, less or nothing."""
    frame = bytearray(tg.compress(bytes(range(200)), 3, literals=False))
    assert tg.zstandard.frame_content_size(bytes(frame)) == 200 and frame[5] == 200
    for claimed in (100, 199, 201, 255):
        frame[5] = claimed
        header = {"config": {}, "tensors": [["x", "uint8", [claimed], "raw.uint8", 0]],
                  "sections": [["raw.uint8", len(frame), claimed]]}
        with pytest.raises(ValueError):
            tg.unpack(join(header, bytes(frame)))
    frame[5] = 200
    header = {"config": {}, "tensors": [["x", "uint8", [200], "raw.uint8", 0]],
              "sections": [["raw.uint8", len(frame), 200]]}
    assert tg.unpack(join(header, bytes(frame)))[1]["x"].tolist() == list(range(200))
    two = bytes(frame) + tg.compress(b"more", 3, literals=False)
    header["sections"][0][1] = len(two)
    with pytest.raises(ValueError):
        tg.unpack(join(header, two))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scales_that_are_not_finite_are_refused(scale):
    """pack never writes them, and one would make every loss NaN."""
    codes, scales = tg.compress(b"\x0f" * 6, 3, True), tg.compress(struct.pack("<2e", 1, scale), 3, True)
    header = {"config": {}, "tensors": [["w", "codes", [2, 3], "attn.15", 15]],
              "sections": [["attn.15", len(codes), 6], ["scales", len(scales), 4]]}
    with pytest.raises(ValueError):
        tg.unpack(join(header, codes + scales))


def foreign_files():
    zipped, saved = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("data.pkl", pickle.dumps({"a": 1}))
    torch.save({"w": torch.ones(3)}, saved)
    payload = tg.pack({}, {})
    return {"empty": b"", "one byte": b"P", "magic": tg.MAGIC, "zip": zipped.getvalue(),
    "torch": saved.getvalue(),
            "pickle": pickle.dumps({"a": [1] * 100}), "zeros": bytes(1000), "text": b"hello world\n" * 100,
            "zstd": tg.compress(bytes(5000), 3, False), "magic and zeros": tg.MAGIC + bytes(1000),
            "sealed zip": seal(zipped.getvalue()), "sealed zeros": seal(tg.MAGIC + bytes(100)),
            "next version": seal(payload[:8] + struct.pack("<I", 2) + payload[12:-32]),
            "other magic": seal(b"PGOLFGPU" + payload[8:-32])}


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

    refused = False
    with monkeypatch.context() as patch:
        for place in ("pickle.loads", "pickle.load", "pickle.Unpickler", "torch.load", "builtins.eval",
            "builtins.exec"):
            patch.setattr(place, forbidden)
        config, tensors = tg.unpack(blob)
        try:
            tg.unpack(foreign)
        except ValueError:
            refused = True
    assert refused and config["code"].startswith("__import__") and same(harmful, tensors["__reduce__"])


# ----------------------------------------------------------------------------------------------------------
# From a file to a model
# ----------------------------------------------------------------------------------------------------------

SETTINGS = dict(PRESET="smoke", DEVICE="cpu", NUM_LAYERS="2", MODEL_DIM="32", NUM_HEADS="2", NUM_KV_HEADS="1",
                VOCAB_SIZE="64", BIGRAM_VOCAB_SIZE="16", BIGRAM_DIM="8", VE_DIM="8", VE_LAYERS="1",
                ROPE_DIMS="8",
                MLP_MULT="2", DTYPE="fp32")


@pytest.fixture(scope="module")
def artifact():
    hp = tg.Hyperparameters.from_env(SETTINGS)
    torch.manual_seed(0)
    return hp, tg.World(hp, {}), {name: tensor.half() for name, tensor in tg.GPT(hp).state_dict().items()}


def packed_model(hp, weights, **changes):
    model = tg.artifact_config(hp, {"steps": 3})["model"] | changes
    return tg.pack({"model": model, "facts": {"steps": 3}}, weights)


def test_the_model_is_rebuilt_from_the_file_alone(artifact):
    hp, world, weights = artifact
    other = tg.Hyperparameters.from_env({"PRESET": "pr601", "DEVICE": "cpu", "TTT_LR": "0.5"})
    model, settings, facts = tg.load_artifact(packed_model(hp, weights), other, world)
    assert facts == {"steps": 3} and settings.ttt_lr == 0.5 and settings.preset == "pr601"
    for name in tg.MODEL_SETTINGS:
        assert getattr(settings, name) == getattr(hp, name)
    assert all(torch.equal(tensor, weights[name].float()) for name, tensor in model.state_dict().items())
    tokens = torch.arange(12).view(1, 12)
    assert torch.isfinite(model(tokens)).all()


@pytest.mark.parametrize("config", [
    {}, {"model": {}}, {"model": []}, {"model": None}, {"model": 5}, {"facts": {}},
    {"model": {"num_layers": 2}}])
def test_a_file_that_is_no_model_is_refused(artifact, config):
    hp, world, weights = artifact
    for tensors in ({}, weights):
        with pytest.raises(ValueError) as caught:
            tg.load_artifact(tg.pack(config, tensors), hp, world)
        assert len(str(caught.value).splitlines()) == 1


def usable(name, value):
    """Whether a model may have this setting, odd as it is."""
    kind = tg.Hyperparameters.__dataclass_fields__[name].type
    return type(value) in (int, float) and value > 0 and kind == "float" and name != "mlp_mult" \
        or value == 10**9 and name in ("rope_ntk_reference", "xsa_last_n")


@pytest.mark.parametrize("name", tg.MODEL_SETTINGS)
def test_settings_of_a_file_that_no_model_has(artifact, name):
    """Refused when the file is loaded, not by a traceback in the first forward pass, nor after hours."""
    hp, world, weights = artifact
    accepted = []
    for value in ("8", None, -1, {}, [[1]], 3.5, 10**9):
        if usable(name, value):
            continue
        with bounded(5):
            try:
                tg.load_artifact(packed_model(hp, weights, **{name: value}), hp, world)
                accepted.append(value)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1
    assert accepted == []


def test_a_million_value_embeddings_are_refused(artifact):
    hp, world, weights = artifact
    with bounded(5), pytest.raises(ValueError):
        tg.load_artifact(packed_model(hp, weights, ve_layers=[1] * 1_000_000), hp, world)


def test_tensors_that_are_not_the_models_are_refused(artifact):
    hp, world, weights = artifact
    name = "blocks.0.attn.c_q.weight"
    for bad in ({k: v for k, v in weights.items() if k != name}, weights | {"more": torch.ones(1)},
                weights | {name: torch.ones(3, 3)}, weights | {name: weights[name].flatten()},
                {k.upper(): v for k, v in weights.items()}):
        with pytest.raises(ValueError) as caught:
            tg.load_artifact(packed_model(hp, bad), hp, world)
        assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_artifact_is_refused_before_anything_is_built(artifact, monkeypatch):
    hp, world, weights = artifact
    blob = bytearray(packed_model(hp, weights))
    blob[len(blob) // 2] ^= 4
    monkeypatch.setattr(tg, "GPT", None)
    with pytest.raises(ValueError, match="checksum"):
        tg.load_artifact(bytes(blob), hp, world)


def test_packing_is_quick():
    """2 M codes at the default level, where a search for matches would take many seconds."""
    tensors = {"blocks.0.mlp.fc.weight": quantized(2000, 1000, spread=2.85)}
    start = time.perf_counter()
    blob = tg.pack({}, tensors)
    assert time.perf_counter() - start < 3
    assert dataclasses.is_dataclass(tg.unpack(blob)[1]["blocks.0.mlp.fc.weight"])
