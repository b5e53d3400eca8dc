"""The scores, bytes and seconds of a finished run as one table, beside what general compressors reach.

    python records/summary.py logs/RUN [--text data/datasets/NAME/val.txt]

The compressors' row is for scale: xz -9 and zstd -22 on the validation text, where it lies beside the shards.
"""
from __future__ import annotations

import runs as shared

# isort: split
import lzma
import sys
from pathlib import Path

from runs import SCORES, Mistake, Run, exit_status

MOST_TEXT_BYTES = 20_000_000  # xz -9 takes about a second per megabyte


def compressor_bpb(text: bytes) -> dict[str, float]:
    """Bits per byte of xz -9e and zstd -22 on a text."""
    shared.need("zstandard")
    import zstandard

    sizes = {"xz -9": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
             "zstd -22": len(zstandard.ZstdCompressor(level=22).compress(text))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def score_lines(result: dict, baselines: dict[str, float]) -> list[str]:
    """The score ladder, each step with its difference from the one before."""
    lines, last = [], None
    for name, text in SCORES.items():
        bpb = result["bpb"].get(name)
        if bpb is not None:
            change = "" if last is None else f"{bpb - last:+.4f}"
            lines.append(f"  {name:<10} {bpb:7.4f} bpb  {change:>8}  {text}")
            last = bpb
    return lines + [f"  {name:<10} {bpb:7.4f} bpb  {'':>8}  for scale, on the same validation text"
                    for name, bpb in baselines.items()]


def budget_lines(result: dict) -> list[str]:
    """Seconds per phase against both clocks."""
    lines = []
    for clock, budget in result.get("budget", {}).items():
        limit = f"of {budget['limit']:.0f} s" if budget["limit"] else "(no limit)"
        verdict = "" if budget["within"] else "  EXCEEDED"
        lines.append(f"  {clock:<11}{budget['used']:8.1f} s {limit}{verdict}")
        for kind, note in (("counted", ""), ("uncounted", "  not counted")):
            lines += [f"    {phase:<20}{seconds:7.1f} s{note}" for phase, seconds in budget[kind].items()]
    return lines


def summary(folder: Path, text_path: Path | None) -> str:
    """The whole table of a run's folder."""
    result = Run.open(folder).result
    text = text_path.read_bytes()[:MOST_TEXT_BYTES] if text_path and text_path.is_file() else b""
    about = f"{folder}: {result['preset']}, seed {result['seed']}, {result.get('params', 0):,} parameters"
    lines = ["", f"{about}, {result.get('steps', 0)} steps, corpus: {result['corpus']}", "",
             "score (lower is better)", *score_lines(result, compressor_bpb(text) if text else {})]
    if a := result["artifact"]:
        verdict = "fits" if a["total_bytes"] <= a["limit"] else "OVER THE LIMIT"
        lines += ["", "artifact", f"  model {a['model_bytes']:,} B + code {a['code_bytes']:,} B "
                  f"= {a['total_bytes']:,} B of {a['limit']:,} B ({verdict})"]
    lines += ["", "clocks", *budget_lines(result), "", "files"]
    lines += [f"  {path}" for path in sorted(folder.iterdir())
              if path.is_file() and not path.name.startswith("checkpoint")]
    return "\n".join(lines)


def program() -> None:
    """The command line."""
    parser = shared.parser(__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, e.g. logs/smoke-seed1337-...")
    about = "validation text for the compressors (default: beside the shards)"
    parser.add_argument("--text", type=Path, help=about)
    arguments = parser.parse_args()
    data = Path(Run.open(arguments.run).result.get("data_path", ""))
    if arguments.text and not arguments.text.is_file():
        raise Mistake(f"{arguments.text} is missing; name a text with --text, or leave it out")
    print(summary(arguments.run, arguments.text or data / "val.txt"))


if __name__ == "__main__":
    sys.exit(exit_status(program))
