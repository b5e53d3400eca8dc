"""Compare runs: seeds of one configuration, two configurations, or runs against a published record.

    python records/compare.py logs/A-*                              mean and deviation of each score
    python records/compare.py logs/A-* --against logs/B-*           are A's runs better than B's?
    python records/compare.py logs/A-* --against pr606              than a published record?
    python records/compare.py logs/A-* --against 1.1162,0.0006,3    than a mean, its deviation, n runs?
    python records/compare.py --list                                the published records

The rule for a record: at least 0.005 nats per token better than the last one, at p < 0.01. Two one-sided
p-values of Welch's t-test are printed: that A is better at all, and that it is better by 0.005 nats, which is
what the rule asks. Where A and B have the same seeds, so the same data in the same order, their differences
seed by seed tell more; they are tested too.
"""
from __future__ import annotations

import runs as shared

# isort: split
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runs import SCORES, Mistake, Run, differing_settings, need, open_runs, show

RECORD_NATS, RECORD_P = 0.005, 0.01
RECORDS = Path(__file__).with_name("records.json")


@dataclass(frozen=True)
class Sample:
    """Mean, sample deviation and number of scores; the deviation is None where it is not known."""

    mean: float
    deviation: float | None
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Sample:
        """The sample of some scores."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return Sample(statistics.fmean(values), deviation, len(values))

    def times(self, factor: float) -> Sample:
        """The same sample in another unit."""
        return Sample(self.mean * factor, self.deviation and self.deviation * factor, self.count)

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.5f}"
        return f"{self.mean:.5f}{spread} (n={self.count})"


class Test(NamedTuple):
    """A one-sided t-test of whether A is lower than B by more than a margin."""

    name: str
    t: float
    freedom: float
    p: float


def one_sided(a: Sample, b: Sample, margin: float = 0.0) -> Test | None:
    """Welch's t-test of mean(A) < mean(B) - margin; None where no deviation is known.

    Against a B of unknown deviation it is the one-sample test against B's value, as its name says.
    """
    need("scipy")
    from scipy import stats

    if a.deviation is None:
        return None
    variances = [a.deviation**2 / a.count, (b.deviation or 0.0) ** 2 / b.count]
    if sum(variances) == 0:
        return None
    t = (a.mean - b.mean + margin) / math.sqrt(sum(variances))
    if b.deviation is None:
        name, freedom = "one-sample t", a.count - 1.0
    else:  # Welch and Satterthwaite, by shares: the square of a tiny variance is zero
        parts = [(v / sum(variances)) ** 2 / (n - 1) for v, n in zip(variances, (a.count, b.count))]
        name, freedom = "Welch's t", 1 / sum(parts)
    return Test(name, t, freedom, float(stats.t.cdf(t, freedom)))


def published() -> list[dict]:
    """The records of records.json."""
    return json.loads(RECORDS.read_text(encoding="utf-8"))["records"]


def record_sample(record: dict) -> Sample:
    """A published record's bits per byte."""
    return Sample.of(record["runs"]) if "runs" in record else Sample(record["bpb"], None, 1)


@dataclass(frozen=True)
class Reference:
    """What A is compared with: runs, or a published number."""

    name: str
    runs: tuple[Run, ...] = ()
    bpb: Sample | None = None
    note: str = ""

    @staticmethod
    def parse(words: Sequence[str]) -> Reference:
        """The words after --against: a record's name, mean,deviation,count, or runs' folders."""
        records = {record["name"]: record for record in published()}
        if len(words) == 1 and words[0] in records:
            record = records[words[0]]
            note = f"{record['about']} (from {record['source']})"
            return Reference(f"#{record['pr']}", bpb=record_sample(record), note=note)
        if len(words) == 1 and words[0].count(",") == 2 and not Path(words[0]).exists():
            return Reference("the given numbers", bpb=parse_numbers(words[0]))
        if missing := [word for word in words if not Path(word).is_dir()]:
            known = f"nor mean,deviation,count, nor one of {', '.join(records)}"
            raise Mistake(f"{missing[0]} is neither a run's folder, {known}")
        return Reference("B", runs=tuple(open_runs(words)))


def parse_numbers(text: str) -> Sample:
    """mean,deviation,count in bits per byte."""
    try:
        mean, deviation, count = text.split(",")
        sample = Sample(float(mean), float(deviation), int(count))
    except ValueError:
        raise Mistake(f"{text} is not mean,deviation,count as in 1.1162,0.0006,3") from None
    fits = shared.SCORE.holds(sample.mean) and shared.SIZE.holds(sample.count)
    if not fits or not 0 <= sample.deviation <= 1e6:
        limits = "the mean must be above 0, the deviation at least 0 and the count at least 1"
        raise Mistake(f"{text}: {limits}, and none of them huge")
    return sample if sample.count > 1 else Sample(sample.mean, None, 1)


def common_scores(runs: Sequence[Run]) -> list[str]:
    """The scores that all runs have."""
    return [name for name in SCORES if all(name in run.bpb and name in run.nats for run in runs)]


def final_score(runs: Sequence[Run], wanted: str | None = None) -> str:
    """The score to judge by: the one asked for, else the last that all runs have."""
    names = common_scores(runs)
    if wanted and wanted not in names:
        lacking = [run.name for run in runs if wanted not in run.bpb]
        raise Mistake(f"{', '.join(lacking)} has no {wanted} score")
    if not names:
        raise Mistake("these runs have no score in common")
    return wanted or names[-1]


def score_table(title: str, runs: Sequence[Run]) -> list[str]:
    """Every run's scores in bits per byte, then mean and deviation of each, in bits per byte and in nats."""
    names, width = common_scores(runs), max(24, *(len(run.name) for run in runs))
    row = lambda label, cells: f"  {label:<{width}}" + "".join(f"{cell:>11}" for cell in cells)
    first, count = runs[0].result, f"{len(runs)} run{'s' * (len(runs) > 1)}"
    about = f"{title}: {count}, preset {first['preset']}, corpus {first['corpus']}"
    lines = ["", about, row("bits per byte", names)]
    lines += [row(run.name, [f"{run.bpb[name]:.5f}" for name in names]) for run in runs]
    for unit, scores in (("bpb", [run.bpb for run in runs]), ("nats", [run.nats for run in runs])):
        samples = [Sample.of([score[name] for score in scores]) for name in names]
        lines.append(row(f"mean, {unit}", [f"{sample.mean:.5f}" for sample in samples]))
        if len(runs) > 1:
            lines.append(row(f"deviation, {unit}", [f"{sample.deviation:.5f}" for sample in samples]))
    return lines


def verdict(a: Sample, b: Sample, a_nats: Sample, b_nats: Sample, nats_of: float) -> list[str]:
    """Differences and tests in both units, then what the rule for a record makes of them.

    a, b in bits per byte, a_nats, b_nats in nats per token; nats_of is nats per token in one bit per byte.
    """
    gain = b_nats.mean - a_nats.mean
    lines, strict = [f"  A - B      {a.mean - b.mean:+.5f} bpb   {-gain:+.5f} nats"], None
    units = (("bpb", a, b, RECORD_NATS / nats_of), ("nats", a_nats, b_nats, RECORD_NATS))
    for unit, mine, theirs, margin in units:
        test, strict = one_sided(mine, theirs), one_sided(mine, theirs, margin)
        if test is None:
            return lines + ["  no test: A needs at least two runs that differ"]
        lines.append(
            f"  {unit:<10} {test.name} = {test.t:.3f}, {test.freedom:.2f} degrees of freedom, one-sided "
            f"p = {test.p:.3g} (better at all), p = {strict.p:.3g} (by {margin:.5f} {unit})")
    answer, than = "yes" if strict.p < RECORD_P else "no", "better" if gain >= 0 else "worse"
    rule = f"better by {RECORD_NATS} at p = {strict.p:.3g}, where the rule asks for p < {RECORD_P}"
    lines.append(f"  a record?  {answer}: {than} by {abs(gain):.5f} nats; {rule}")
    return lines


def judge(a: Sequence[Run], reference: Reference, wanted: str | None) -> list[str]:
    """A's final score against a published one's, or against B's in every score that they share."""
    if reference.bpb is not None:
        name, factor = final_score(a, wanted), nats_per_bpb(a)
        mine, theirs = Sample.of([run.bpb[name] for run in a]), reference.bpb
        lines = ["", f"A {name}: {mine} bpb against {reference.name}: {theirs} bpb"]
        lines += [f"  {reference.note}"] if reference.note else []
        return lines + verdict(mine, theirs, mine.times(factor), theirs.times(factor), factor)
    both, groups = [*a, *reference.runs], (a, reference.runs)
    last, lines = final_score(both, wanted), []
    for name in [wanted] if wanted else common_scores(both):
        bpb = [Sample.of([run.bpb[name] for run in group]) for group in groups]
        nats = [Sample.of([run.nats[name] for run in group]) for group in groups]
        lines += ["", f"A {name}: {bpb[0]} bpb against B: {bpb[1]} bpb{'  <- the score' * (name == last)}"]
        lines += verdict(*bpb, *nats, nats_per_bpb(both)) + paired(a, reference.runs, name)
    return lines


def paired(a: Sequence[Run], b: Sequence[Run], name: str) -> list[str]:
    """The test of A's less B's score, seed by seed; nothing where their seeds are not the same."""
    mine, theirs = ({run.seed: run.bpb[name] for run in group} for group in (a, b))
    if not len(a) == len(b) == len(mine) == len(theirs) or set(mine) != set(theirs):
        return []
    gaps = Sample.of([mine[seed] - theirs[seed] for seed in mine])
    test = one_sided(gaps, Sample(0.0, None, 1))
    p = f", one-sided p = {test.p:.3g} (better at all)" if test else ""
    return [f"  by seed    A - B {gaps} bpb{p}"]


def nats_per_bpb(runs: Sequence[Run]) -> float:
    """Nats per token in one bit per byte, on these runs' validation text."""
    ratio = statistics.fmean([run.bytes_per_token for run in runs])
    return math.log(2) * ratio


# Training losses at equal steps and at equal time


def loss_near(run: Run, key: str, at: float, share: float = 0.05) -> float | None:
    """The mean training loss over the steps that lead up to `at` steps or seconds; None in a shorter run."""
    rows = run.metrics("train")
    if not rows or rows[-1][key] < at * 0.999:
        return None
    past = [row["loss"] for row in rows if row[key] <= at * 1.001]
    return statistics.fmean(past[-max(1, round(len(past) * share)) :]) if past else None


def mean_loss(runs: Sequence[Run], key: str, at: float) -> float:
    """The mean of several runs' losses near a point; not a number where one of them has none."""
    return statistics.fmean([math.nan if (loss := loss_near(run, key, at)) is None else loss for run in runs])


def curves(a: Sequence[Run], b: Sequence[Run]) -> list[str]:
    """The mean training losses of both at a quarter, a half, ... of the shortest run's steps and seconds."""
    rows = [run.metrics("train") for run in (*a, *b)]
    if not all(rows):
        return ["", "training curves: a run has no metrics.jsonl, so there is nothing to compare them by"]
    lines = ["", "training loss, nats per token (mean over the 5 % of steps before)"]
    for key, title in (("step", "equal steps"), ("seconds", "equal time")):
        end = min(row[-1][key] for row in rows)
        lines.append(f"  {title:<14}{'A':>10}{'B':>10}{'A - B':>10}")
        for part in (0.25, 0.5, 0.75, 1.0):
            at = end * part if key == "seconds" else max(1, round(end * part))
            mine, theirs = mean_loss(a, key, at), mean_loss(b, key, at)
            numbers = f"{mine:.4f}", f"{theirs:.4f}", f"{mine - theirs:+.4f}"
            cells = "".join(f"{'-' if 'nan' in number else number:>10}" for number in numbers)
            lines.append(f"    {f'{at:.1f} s' if key == 'seconds' else f'step {at}':<12}{cells}")
    return lines


# What makes a comparison less than it seems


def differences(a: Sequence[Run], b: Sequence[Run]) -> list[str]:
    """The settings in which A and B, or the runs of either, differ."""
    found = differing_settings([*a, *b], besides=("seed",))
    lines = ["", "settings that differ" if found else "settings that differ: none but the seed"]
    for name, values in found.items():
        sides = [" / ".join(dict.fromkeys(map(show, side))) for side in (values[: len(a)], values[len(a) :])]
        lines.append(f"  {name.upper():<28}" + (f"A {sides[0]}   B {sides[1]}" if b else sides[0]))
    return lines


def unlike(text: str, other: str) -> str:
    """The words of a text that another lacks."""
    return " ".join(word for word in text.split() if word not in other.split())


def warnings(a: Sequence[Run], reference: Reference) -> list[str]:
    """One line for everything that makes the numbers less comparable than they look."""
    both, lines = [*a, *reference.runs], []
    for key, what in (
        ("script_sha256", "script hashes differ, the runs were made by different versions"),
        ("corpus", "corpora differ, the scores are of different texts"),
        ("val_bytes", "validation splits differ in bytes, the scores are of different texts"),
    ):
        values = dict.fromkeys(str(value) for run in both if (value := run.result.get(key)) is not None)
        if len(values) > 1:
            lines.append(f"{what}: {' | '.join(v[:12] if key == 'script_sha256' else v for v in values)}")
    machines = [run.result.get("hardware", "") for run in both]
    if odd := [machine for machine in machines if machine != machines[0]]:
        words = f"{unlike(machines[0], odd[0])} | {unlike(odd[0], machines[0])}"
        lines.append(f"hardware or versions differ, equal time compares machines: {words}")
    if len({round(run.bytes_per_token or 0, 3) for run in both}) > 1:
        lines.append("bytes per token differ: nats per token are of different tokens, judge by bpb")
    for side, group in (("A", a), ("B", reference.runs)):
        if len({run.seed for run in group}) < len(group):
            lines.append(f"{side} has a seed twice: its runs are not independent")
        if mixed := ", ".join(map(str.upper, differing_settings(group, besides=("seed",)))):
            lines.append(f"{side} mixes settings ({mixed}): its deviation is not the seed's")
    corpus = a[0].result["corpus"]
    if reference.bpb is not None and "fineweb" not in corpus.lower():
        which = f"{reference.name} is a score on FineWeb, A's on {corpus}"
        lines.append(f"{which}: they say nothing about each other")
    return [f"warning: {line}" for line in lines]


def report(a: Sequence[Run], reference: Reference | None, wanted: str | None = None) -> str:
    """The whole comparison."""
    final_score(a, wanted)
    lines = score_table("A" if reference else "runs", a)
    if reference is None:
        lines += differences(a, ())[1:] if len(a) > 1 else []
        return "\n".join([*lines, "", *warnings(a, Reference(""))]).rstrip() + "\n"
    if reference.runs:
        lines += score_table("B", reference.runs)
    lines += judge(a, reference, wanted)
    if reference.runs:
        lines += curves(a, reference.runs) + differences(a, reference.runs)
    return "\n".join([*lines, "", *warnings(a, reference)]).rstrip() + "\n"


def record_list() -> str:
    """The published records as a table."""
    lines = [f"{'name':<18}{'bpb':>9}{'deviation':>11}{'runs':>6}  about"]
    for record in published():
        sample = record_sample(record)
        deviation = "" if sample.deviation is None else f"{sample.deviation:.5f}"
        count = len(record["runs"]) if "runs" in record else "?"
        lines.append(f"{record['name']:<18}{sample.mean:>9.5f}{deviation:>11}{count:>6}  {record['about']}")
    return "\n".join(lines)


def program() -> None:
    """The command line."""
    parser = shared.parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="LOGS", help="folders of finished runs: A")
    against = "folders, mean,deviation,count, or a record's name"
    parser.add_argument("--against", nargs="+", metavar="B", help=against)
    score = "judge by this score (default: the last that all have)"
    parser.add_argument("--score", choices=SCORES, help=score)
    parser.add_argument("--list", action="store_true", help="print the published records")
    arguments = parser.parse_args()
    if arguments.list:
        print(record_list())
        return
    if not arguments.runs:
        raise Mistake("name the folders of finished runs, as in `compare.py logs/A-*`; --help shows more")
    reference = Reference.parse(arguments.against) if arguments.against else None
    print(report(open_runs(arguments.runs), reference, arguments.score), end="")


if __name__ == "__main__":
    sys.exit(shared.exit_status(program))
