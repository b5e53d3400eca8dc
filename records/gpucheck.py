"""What one GPU says about eight, in ten minutes: the parts of a run measured beside their estimates.

    ./run.sh gpucheck               the tests that need a GPU, then this
    python records/gpucheck.py      this alone

It runs one of eight ranks' share of a step of pr606, 50 times, and asks the profiler where a step's time
goes; it packs a model, and scores and trains on a slice of made-up text. Scoring is extrapolated to the
challenge's validation text and divided by eight. The estimates are for an H100 (records/RESULTS.md); where a
part takes over a tenth more than its estimate, the verdict is to look for the reason before eight are rented.
"""
import runs as shared

import train_gpt as tg  # before the others: it says in one line which package is missing

# isort: split
import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import benchmark
import torch
from benchmark import POSITIONS, Bench
from runs import Mistake
from torch._dynamo.utils import counters

RANKS = 8
ESTIMATES = {  # unit, from, to
    "step": ("ms", 96, 109),
    "matrix products": ("ms", 35, 42),
    "attention": ("ms", 26, 28),
    "pointwise and norms": ("ms", 31, 35),
    "clip, Muon, AdamW": ("ms", 1.5, 2),
    "peak memory": ("GB", 29, 30),
    "scoring": ("s", 150, 165),
    "TTT steps": ("s", 50, 70),
    "compiling for both": ("s", 20, 40),
    "load and roundtrip": ("s", 4, 6),
}
OVER = 1.1  # times the estimate
TRAINING_MS = 580_000  # of 600 s, less calibration and packing
KERNELS = {  # a kernel is the first part's in whose pattern its name is
    "attention": "flash|fmha|attention|attn|sdpa",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|::(mm|bmm|addmm|baddbmm)$",
    "pointwise and norms": "",
}


@dataclass
class Row:
    """A part of a run: what was measured, and the estimate."""
    part: str
    measured: float
    unit: str
    low: float
    high: float

    @property
    def over(self) -> bool:
        return self.measured > OVER * self.high


def part_of(kernel: str) -> str:
    """The part of a step that a kernel belongs to."""
    return next(part for part, names in KERNELS.items() if re.search(names, kernel, re.IGNORECASE))


def kernel_ms(work: Callable[[], object], device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of each part's kernels in one call."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    activity = getattr(torch.profiler.ProfilerActivity, kind.upper())
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(repeats):
            work()
        if kind == "cuda":
            torch.cuda.synchronize(device)
    spent = dict.fromkeys(KERNELS, 0.0)
    for event in profile.key_averages():
        micro = event.self_device_time_total if kind == "cuda" else event.self_cpu_time_total
        spent[part_of(event.key)] += micro / 1000 / repeats
    return spent


def measure_training(bench: Bench, steps: int) -> dict[str, float]:
    """A step, its parts, its memory."""
    hp, world = bench.hp, bench.world
    stepper, _ = benchmark.made_up_stepper(bench)
    counters.clear()
    began = benchmark.seconds_of(stepper.warm_up, world.device)
    benchmark.reset_peak(world.device)
    plain = partial(stepper.step, 1e-3, hp.muon_momentum, False)
    seconds = benchmark.seconds_of(lambda: [plain() for _ in range(steps)], world.device) / steps
    memory = world.peak_memory()
    rounded = partial(stepper.step, 1e-3, hp.muon_momentum, True)
    with_qat = world.seconds(rounded, repeats=5)
    x, y = (t[:stepper.micro] for t in stepper.batch())
    micro_steps = -(-len(stepper.mine) // stepper.micro)

    def passes() -> None:
        with world.autocast():
            loss = stepper.model(x, y)
        loss.backward()

    def update() -> None:
        tg.clip_gradients(stepper.flat.grads, hp.grad_clip_norm)
        stepper.optimisers.step(1e-3, hp.muon_momentum)

    bench.notes += [
        f"{hp.train_batch_tokens} tokens in {micro_steps} micro-step(s), compiled {int(bench.compiling)}, "
        f"{str(world.dtype)[6:]}; warm-up {began:.0f} s",
        f"a step with QAT takes {1000 * with_qat:.1f} ms",
        *(f"graph break: {what.splitlines()[0]}" for what in counters["graph_break"])]
    parts = {name: micro_steps * ms for name, ms in kernel_ms(passes, world.device).items()}
    return {"step": 1000 * seconds} | parts | {
        "clip, Muon, AdamW": 1000 * world.seconds(update, repeats=5), "peak memory": memory / 1e9}


def measure_scoring(bench: Bench) -> dict[str, float]:
    """Seconds of eight for the validation text, from slices on this one."""
    for measure in (benchmark.bench_pack, benchmark.bench_eval, benchmark.bench_ttt):
        measure(bench)
    rows = {row["name"]: row for row in bench.rows}
    whole = lambda name: POSITIONS / rows[name]["tokens_per_s"] / RANKS
    bench.notes.append(f"packing takes {rows['pack']['median_s']:.1f} s")
    return {"scoring": whole("score a chunk"), "TTT steps": whole("train on a chunk"),
            "compiling for both": rows["score a chunk"]["first_s"] + rows["train on a chunk"]["first_s"],
            "load and roundtrip": rows["unpack"]["median_s"] + whole("side by side")}


def verdict(rows: list[Row]) -> str:
    """Rent eight, or profile first, and why."""
    over = [f"{row.part} takes {row.measured:.3g} {row.unit}, estimated {row.low:g} to {row.high:g}"
            for row in rows if row.over]
    of = {row.part: row.measured for row in rows}
    clocks = f"about {TRAINING_MS / of['step']:.0f} steps in 600 s, and evaluation in " \
             f"{sum(row.measured for row in rows if row.unit == 's'):.0f} s of 600"
    return f"profile first: {'; '.join(over)} ({clocks})" if over else f"rent eight: {clocks}"


def table(rows: list[Row]) -> str:
    """Parts in a step are indented."""
    lines = [f"{'part':24}{'measured':>10}{'estimate':>14}"]
    for row in rows:
        name = f"  {row.part}" if row.part in KERNELS else row.part
        lines.append(f"{name:24}{row.measured:10.1f}{f'{row.low:g}..{row.high:g}':>14} {row.unit}"
                     f"{'  over' * row.over}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    if args.device != "cpu" and not torch.cuda.is_available():
        raise Mistake("no CUDA device is there; this is for the first minutes on a GPU")
    words = ["train", "--preset", "pr606", "--device", args.device, "--repeats", "2", "--seconds", "20"]
    given = benchmark.parser().parse_args(words + [word for pair in args.set for word in ("--set", pair)])
    hp = benchmark.settings_for("gpucheck", given)
    world = tg.World(hp, {})
    tg.choose_dtype(hp, world)
    bench = Bench("gpucheck", given, hp, world)
    print(f"{world.hardware()}\nmeasuring a step of pr606 ({args.steps} times) ...", flush=True)
    measured = measure_training(bench, args.steps)
    print("measuring packing, scoring and TTT ...", flush=True)
    measured |= measure_scoring(bench)
    rows = [Row(part, measured[part], *estimate) for part, estimate in ESTIMATES.items()]
    print("\n".join(["", table(rows), "", *bench.notes, "", f"verdict: {verdict(rows)}"]))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    found = {"hardware": world.hardware(), "verdict": verdict(rows), "rows": [asdict(row) for row in rows],
             "notes": bench.notes}
    shared.write_atomically(args.json, json.dumps(found, indent=1).encode())
    print(f"written to {args.json}")


def parser() -> shared.Parser:
    """The command line's grammar."""
    made = shared.parser(__doc__, prog="gpucheck.py")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    made.add_argument("--steps", type=benchmark.at_least_one, default=50, help="steps to time, default 50")
    made.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                      help="any setting of train_gpt.py")
    made.add_argument("--json", type=Path, metavar="FILE", default=Path("logs/gpucheck.json"),
                      help="default logs/gpucheck.json")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    return shared.exit_status(lambda: run(parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
