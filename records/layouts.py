"""The ways to lay out and compress a model's codes, measured, as a Markdown table.

    python records/layouts.py logs/RUN
    python records/layouts.py --gaussian

Each row differs from the first in one thing, the last ones in the coder. Bytes are those of the frames of
the codes, of the block matrices and of the embedding tables, with their ratio to the order-0 entropy of each
role and width. Bold is what train_gpt.py does: those very frames stand in the file that it writes.
"""

from __future__ import annotations

import runs as shared

# isort: split
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import zstandard
from runs import Mistake, exit_status, script
from tqdm import tqdm

GAUSSIAN_STEPS = 2.85  # standard deviation of a pr606 model's codes when the file just fits


def offset(codes: np.ndarray, max_code: int) -> np.ndarray:
    """0 to 2 max_code, in the order of the codes."""
    return (codes + np.int16(max_code)).astype(np.uint8)


def zigzag(codes: np.ndarray, _max_code: int) -> np.ndarray:
    """0, -1, 1, -2, 2, ... as 0, 1, 2, 3, 4, ..."""
    wide = codes.astype(np.int16)
    return np.where(wide < 0, -2 * wide - 1, 2 * wide).astype(np.uint8)


def signed(codes: np.ndarray, _max_code: int) -> np.ndarray:
    """Two's complement bytes."""
    return codes.view(np.uint8)


def bits(codes: np.ndarray, max_code: int) -> np.ndarray:
    """The bits of the offset codes without gaps, as many for each as max_code needs."""
    width = (2 * max_code).bit_length()
    return np.packbits(np.unpackbits(offset(codes, max_code).reshape(-1, 1), axis=1)[:, -width:])


def by_role_and_width(_name: str, tensor) -> str:
    """The frame of a tensor: one for each role and number of bits."""
    return f"{tensor.role}.{tensor.max_code}"


def literals(strategy: int = zstandard.STRATEGY_FAST, **options: int) -> Callable[[bytes], bytes]:
    """zstd's search for matches turned down as far as it goes, or as far as `options` say."""
    options = dict(min_match=7, target_length=0, hash_log=6, window_log=17) | options

    def compress(data: bytes) -> bytes:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            1, source_size=len(data), strategy=strategy, **options)
        return zstandard.ZstdCompressor(compression_params=parameters).compress(data)

    return compress


@dataclass(frozen=True)
class Layout:
    """One way; the defaults are the table's first row."""

    name: str
    values: Callable[[np.ndarray, int], np.ndarray] = offset
    columns_first: bool = False
    frame: Callable[[str, object], str] = by_role_and_width
    classes: bool = False
    rans: bool = False
    compress: Callable[[bytes], bytes] = field(default_factory=literals)

    def frames(self, tensors: Mapping) -> list[bytes]:
        """The compressed frames of all codes."""
        plain: dict[str, list[list[bytes]]] = {}
        for name, tensor in sorted(tensors.items()):
            codes = tensor.codes.numpy()
            ordered = np.ascontiguousarray(codes.swapaxes(-2, -1) if self.columns_first else codes)
            parts = [self.values(ordered, tensor.max_code).tobytes()]
            if self.classes:
                _, parts = script().by_class(tensor.codes, tensor.max_code)
            plain.setdefault(self.frame(name, tensor), []).append(parts)
        joined = [[*map(b"".join, zip(*each))] for _, each in sorted(plain.items())]
        if self.rans:
            return [script().rans_frame(parts + [b""] * (script().CLASSES - len(parts))) for parts in joined]
        return [self.compress(part) for parts in joined for part in parts if part]


def layouts() -> Iterator[Layout]:
    """A plain way, then every other, then rANS, the last of which is the script's for matrices."""
    base = Layout("rows first, offset codes, a frame per role and width, literals only")
    yield base
    yield replace(base, name="a frame per role, width and class of columns", classes=True)
    yield replace(base, name="columns first", columns_first=True)
    yield replace(base, name="zigzag codes", values=zigzag)
    yield replace(base, name="two's complement codes", values=signed)
    yield replace(base, name="bits packed first", values=bits)
    yield replace(base, name="one frame", frame=lambda name, tensor: "")
    yield replace(base, name="a frame per width", frame=lambda name, tensor: str(tensor.max_code))
    yield replace(base, name="a frame per tensor", frame=lambda name, tensor: name)
    for level in (1, 3, 9, 15, 19, 22):
        plain = partial(zstandard.compress, level=level)
        yield replace(base, name=f"level {level}", compress=plain)
    for min_match in (3, 4, 5, 6):
        yield replace(base, name=f"literals, min_match {min_match}", compress=literals(min_match=min_match))
    for log in (10, 14, 20, 24):
        yield replace(base, name=f"literals, window_log {log}", compress=literals(window_log=log))
    yield replace(base, name="literals, hash_log 17", compress=literals(hash_log=17))
    yield replace(base, name="literals, target_length 64", compress=literals(target_length=64))
    for name in ("DFAST", "GREEDY", "LAZY2", "BTOPT", "BTULTRA2"):
        strategy = getattr(zstandard, f"STRATEGY_{name}")
        yield replace(base, name=f"literals, strategy {name.lower()}", compress=literals(strategy))
    yield replace(base, name="rANS", rans=True)
    yield replace(base, name="rANS, frequencies by class of columns", rans=True, classes=True)


def gaussian_codes() -> dict:
    """The matrices of pr606, their codes Gaussian."""
    import torch

    tg = script()
    with torch.device("meta"):
        model = tg.GPT(tg.Hyperparameters.from_env({"PRESET": "pr606"}))
    generator, roles, codes = torch.Generator().manual_seed(0), model.roles(), {}
    for name, max_code in model.max_codes("matrix").items():
        shape = model.get_parameter(name).shape
        drawn = torch.randn(shape, generator=generator).mul_(GAUSSIAN_STEPS).round_()
        drawn, scales = drawn.clamp_(-max_code, max_code).to(torch.int8), torch.ones(shape[0])
        codes[name] = tg.QuantizedTensor(drawn, scales, max_code, roles[name])
    return codes


def artifact_codes(path: Path) -> dict:
    """The quantised tensors of an artifact, or of the one in a run's folder."""
    path = path / "artifact.bin" if path.is_dir() else path
    if not path.is_file():
        raise Mistake(f"{path} is missing; name the folder of a finished run, or an artifact")
    tg = script()
    try:
        tensors = tg.unpack(path.read_bytes())[1]
    except ValueError as error:
        raise Mistake(f"{path}: {error}") from None
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, tg.QuantizedTensor)}


def entropy_bytes(tensors: Mapping, classes: bool = False) -> float:
    """What an ideal order-0 coder of each role and width would need, or of each class of columns as well."""
    histograms: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        key, (_, parts) = by_role_and_width(name, tensor), script().by_class(tensor.codes, tensor.max_code)
        counts = script().histogram(parts if classes else [b"".join(parts)])
        histograms[key] = histograms.get(key, 0) + counts
    seen = [row[row > 0] for counts in histograms.values() for row in counts]
    return sum(float(counts @ np.log2(counts.sum() / counts)) for counts in seen) / 8


def cell(frames: list[bytes], bound: float, blob: bytes) -> str:
    """Bytes and their ratio to the entropy, bold where the file holds these very frames."""
    size = sum(map(len, frames))
    text = f"{size:,} ({size / max(bound, 1):.4f})" if frames else "-"
    return f"**{text}**" if frames and all(frame in blob for frame in frames) else text


def table(tensors: Mapping) -> str:
    """Every layout in Markdown, and below it what the codes are."""
    blob, parts = script().pack({}, tensors), ({}, {})
    for name, tensor in tensors.items():
        parts[tensor.role == "embed"][name] = tensor
    bounds = [entropy_bytes(part) for part in parts]
    lines = ["| layout | matrices | tables | seconds |", "|---|---:|---:|---:|"]
    for layout in tqdm(list(layouts()), desc="layouts", leave=False, disable=None):
        start = time.perf_counter()
        frames = [layout.frames(part) for part in parts]
        seconds = time.perf_counter() - start
        cells = [cell(some, bound, blob) for some, bound in zip(frames, bounds)]
        lines.append(f"| {layout.name} | {' | '.join(cells)} | {seconds:.2f} |")
    counts = [sum(tensor.codes.numel() for tensor in part.values()) for part in parts]
    known = entropy_bytes(parts[0], classes=True)  # the last row adds tables, states, rounding
    ratio = sum(map(len, frames[0])) / max(known, 1)
    return "\n".join([
        *lines, "", f"{counts[0]:,} codes of matrices, entropy {bounds[0]:,.0f} bytes, given the class of "
        f"the column {known:,.0f} (the last row: {ratio:.4f}); "
        f"{counts[1]:,} codes of tables, entropy {bounds[1]:,.0f} bytes."])


def program() -> None:
    """The command line."""
    parser = shared.parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("run", type=Path, nargs="?", help="a run's folder, logs/RUN_ID, or an artifact")
    source.add_argument("--gaussian", action="store_true", help="Gaussian codes of the size of pr606")
    arguments = parser.parse_args()
    print(table(gaussian_codes() if arguments.gaussian else artifact_codes(arguments.run)))


if __name__ == "__main__":
    sys.exit(exit_status(program))
