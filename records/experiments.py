"""The experiments of RESULTS.md: runs of train_gpt.py at `smoke` scale over several seeds, and their tables.

    python records/experiments.py ablations             run what is missing, then print the table
    python records/experiments.py all --jobs 2          every study, two runs at a time, which share the cores
    python records/experiments.py qat --dry-run         list what would run
    python records/experiments.py qat --table --write   write the table of what is there into RESULTS.md
    DATA_PATH=... TOKENIZER_PATH=... VOCAB_SIZE=... python records/experiments.py ttt --corpus NAME
                                                        the same on another text

A run is a folder under --logs, and a finished one is never repeated: the same command continues after an
interruption. Of the caller's settings only those of the data and the device reach the runs.
"""
from __future__ import annotations

import runs as shared

# isort: split
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from runs import BOOKKEEPING, ROOT, Mistake, Run, as_markdown, exit_status, script, show, write_atomically

KEPT = ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE", "DEVICE")
CONSOLE = "console.txt"  # what a run printed; locked while it lives, it marks a folder that may be made anew
SHORT = "ITERATIONS=320 WARMDOWN_ITERS=250 LATE_QAT_THRESHOLD=0"  # every ablation: a minute on two cores
ABLATIONS = {  # label: what is removed, and how
    "full": ("nothing", ""),
    "value_residual": ("value residual", "VALUE_RESIDUAL=0"),
    "gated_attention": ("gated attention", "GATED_ATTENTION=0"),
    "xsa": ("XSA", "XSA_LAST_N=0"),
    "smear_gate": ("SmearGate", "SMEAR_GATE=0"),
    "bigram_hash": ("BigramHash", "BIGRAM_VOCAB_SIZE=0"),
    "value_embedding": ("value embedding", "VE_ENABLED=0"),
    "ln_scale": ("LN scale", "LN_SCALE=0"),
    "ema": ("EMA", "AVERAGING=none"),
    "partial_rope": ("partial RoPE (all dimensions turn)", "ROPE_DIMS=64"),
    "ortho_init": ("OrthoInit", "ORTHO_INIT=0"),
}
RECIPES = {  # label: title, and what differs from the preset
    "pr606": ("#606's recipe", "TTT_OPTIMIZER=adamw TTT_LR=1e-4 TTT_EPOCHS=3 TTT_PARAMS=blocks "
              "TTT_SCHEDULE=run TTT_TEMPERATURE=0.98 TTT_BATCH_SEQS=2 TTT_CHUNK_TOKENS=512"),
    "pr601": ("#601's SGD recipe", "TTT_OPTIMIZER=sgd TTT_LR=0.002 TTT_MOMENTUM=0.9 TTT_EPOCHS=2 "
              "TTT_PARAMS=control TTT_SCHEDULE=chunk TTT_TEMPERATURE=1 TTT_BATCH_SEQS=1 "
              "TTT_CHUNK_TOKENS=8192"),
    "smoke": ("`smoke`'s recipe", ""),
}


@dataclass(frozen=True)
class Variant:
    """One configuration, run once per seed: its settings, and the variant whose result it starts from."""

    label: str
    env: dict[str, str]
    parent: Variant | None = None

    @property
    def scores(self) -> list[str]:
        """The scores that a finished run of it has."""
        if "evaluate" not in self.env["STAGES"]:
            return ["float"]
        optional = {"sliding": self.env["SKIP_SLIDING"] == "0", "ttt": self.env["TTT_ENABLED"] == "1"}
        return ["roundtrip", *(name for name, wanted in optional.items() if wanted)]


def variant(label: str, settings: str, parent: Variant | None = None) -> Variant:
    """A variant with the settings `NAME=value ...` over its parent's, or over those of training alone."""
    inherited = parent.env if parent else {"PRESET": "smoke", "STAGES": "train"}
    return Variant(label, inherited | dict(word.split("=") for word in settings.split()), parent)


# No clock: test-time training would otherwise stop early on a slow machine.
SCORED = "STAGES=quantize,evaluate TTT_ENABLED=0 SKIP_SLIDING=1 EVAL_SECONDS=0"


def rounded(trained: Variant, kind: str, attn: int, mlp: int) -> Variant:
    """A trained model quantised, packed, loaded and scored.

    kind is rtn, lite or gptq. GPTQ keeps the steps of a model that was trained for them by QAT, and searches
    them for any other.
    """
    bits = f"int{attn}" if attn == mlp else f"int{attn}int{mlp}"
    steps = "clip" if trained is NONE else "absmax"
    rule = {"rtn": "QUANTIZER=rtn STEP_RULE=absmax", "lite": "QUANTIZER=rtn STEP_RULE=lite",
            "gptq": f"QUANTIZER=gptq STEP_RULE={steps}"}[kind]
    settings = f"{SCORED} {rule} ATTN_BITS={attn} MLP_BITS={mlp}"
    return variant(f"{trained.label}-{bits}-{kind}", settings, trained)


ABLATION = {label: variant(f"ablation-{label}", f"{SHORT} {env}") for label, (_, env) in ABLATIONS.items()}
NONE, SOFT = variant("qat-none", "LATE_QAT_THRESHOLD=0"), variant("qat-soft", "")
SHARP = variant("qat-sharp", "LATE_QAT_THRESHOLD=0.3 SOFT_ROUND_ALPHA=16")
STE = variant("qat-ste", "SOFT_ROUND_QAT=0 LATE_QAT_THRESHOLD=0.3")
STE4 = variant("qat-ste4", "SOFT_ROUND_QAT=0 LATE_QAT_THRESHOLD=0.3 ATTN_BITS=4 MLP_BITS=4")
QAT = (("none", NONE, 5), ("soft-round, `smoke`'s", SOFT, 5),
       ("soft-round below 0.3 to alpha 16", SHARP, 5), ("straight-through below 0.3", STE, 5),
       ("none", NONE, 4), ("straight-through below 0.3", STE4, 4))
QUANTIZERS = {(f"int{attn} / int{mlp}", title): rounded(NONE, name, attn, mlp)
              for attn, mlp in ((6, 6), (6, 5), (5, 5))
              for name, title in (("rtn", "plain rounding"), ("lite", "GPTQ-lite"), ("gptq", "GPTQ"))}
RATES = (3.5, 3.0, 2.75, 2.5)


def at_rate(trained: Variant, rule: str, bits: float) -> Variant:
    """A trained model by GPTQ with so many bits a matrix weight, side information included."""
    settings = f"{SCORED} STEP_RULE={rule} ATTN_BITS=8 MLP_BITS=8 TARGET_BITS={bits}"
    return variant(f"{trained.label}-{rule}-{bits}", settings, trained)


STEPS = {(rule, bits): at_rate(NONE, rule, bits) for bits in RATES for rule in ("absmax", "sigma", "water")}
STEPS_AFTER_QAT = {(what.label, rule): at_rate(what, rule, 3.0) for what in (NONE, SOFT, STE)
                   for rule in ("absmax", "sigma", "water")}
# Half a run whose QAT trains on the steps that its own file will have.
AT_RATE = {title: variant(f"qat-{label}-at3", "ITERATIONS=425 WARMDOWN_ITERS=330 ATTN_BITS=8 MLP_BITS=8 "
                          f"TARGET_BITS=3 {settings}")
           for label, title, settings in (
               ("none", "none", "LATE_QAT_THRESHOLD=0"), ("soft", "soft-round below 0.15", ""),
               ("ste", "straight-through below 0.3", "SOFT_ROUND_QAT=0 LATE_QAT_THRESHOLD=0.3"))}
QAT_AT_RATE = {(title, q): variant(f"{what.label}-{q}", f"{SCORED} QUANTIZER={q}", what)
               for title, what in AT_RATE.items() for q in ("rtn", "gptq")}
# #1855's twin takes twice the time of `smoke` for a step (medians of both in turn, one thread: 1.96).
TWIN = {label: variant(f"twin-{label}", f"PRESET={preset} ITERATIONS={steps} WARMDOWN_ITERS={warmdown} "
                       f"{SCORED} STAGES=train,quantize,evaluate")
        for label, preset, steps, warmdown in (
            ("1855", "pr1855_smoke", 425, 0), ("smoke", "smoke", 425, 333),
            ("smoke-clock", "smoke", 850, 667), ("1855-long", "pr1855_smoke", 850, 0),
            ("smoke-long", "smoke", 1700, 1333))}
TWINS = [(title, TWIN[twin], TWIN[label])  # what a row is compared with, and what it shows
         for twin, tokens, clock in (("1855", "smoke", "smoke-clock"),
                                     ("1855-long", "smoke-clock", "smoke-long"))
         for title, label in (("`pr1855_smoke`", twin), ("`smoke`, as many tokens", tokens),
                              ("`smoke`, as much time", clock))]
# Documents by themselves: one setting for both presets, the full lengths of the twins' study.
LEARNING = ("TTT_ENABLED=1 TTT_MODE=documents TTT_LORA_RANK=16 TTT_LR=5e-4 TTT_CHUNKS=1024:16,inf:32 "
            "TTT_CONTEXT=256 TTT_FRESH=16 TTT_TEMPERATURE=1")
DOCUMENTS = {
    (preset, title): variant(f"documents-{label}-{kind}", f"{SCORED} STAGES=evaluate {env}", TWIN[label])
    for label, preset in (("1855-long", "`pr1855_smoke`"), ("smoke-clock", "`smoke`"))
    for kind, title, env in (
        ("plain", "by documents, no adapters", f"{LEARNING} TTT_LR=0 SKIP_SLIDING=0"),
        ("mask", "the mask", f"{LEARNING} TTT_LR=0 CANONICAL_MASK=1"),
        ("learn", "adapters", LEARNING),
        ("both", "adapters and the mask", f"{LEARNING} CANONICAL_MASK=1"),
        ("chunks", "chunk-wise TTT of the split", "TTT_ENABLED=1"))
    if (label, kind) != ("1855-long", "chunks")}
PLAIN = variant("ttt-none", f"{SCORED} SKIP_SLIDING=0", SOFT)
TTT = {label: variant(f"ttt-{label}", f"{SCORED} STAGES=evaluate TTT_ENABLED=1 {env}", PLAIN)
       for label, (_, env) in RECIPES.items()}


def with_parents(variants: Iterable[Variant]) -> list[Variant]:
    """The variants and all that they start from, parents first, each once."""
    found: dict[str, Variant] = {}
    for what in variants:
        for link in (*(with_parents([what.parent]) if what.parent else ()), what):
            found.setdefault(link.label, link)
    return list(found.values())


def unread(hp) -> set[str]:
    """The settings that a run does not read, so that its preset may change them."""
    fields, stages = hp.fields, hp.stages.split(",")
    names = {*BOOKKEEPING, *map(str.lower, KEPT)}
    if "evaluate" not in stages:
        names |= fields("score").keys()
    if not hp.ttt_enabled:
        names |= {name for name in fields("score") if name.startswith("ttt_")}
    if "quantize" not in stages:  # QAT trains on the grid that these give
        grid = {"attn_bits", "mlp_bits", "artifact_limit", "target_bits"} if hp.late_qat_threshold else set()
        names |= fields("quantise").keys() - grid
    if not hp.late_qat_threshold:
        names |= {"soft_round_qat", "soft_round_alpha"}
    if not hp.soft_round_qat:
        names |= {"soft_round_alpha"}
    return names


@dataclass(frozen=True)
class Bench:
    """Where the runs lie, over which seeds and which text, and what --set lays over every run's settings."""

    logs: Path
    seeds: Sequence[int]
    corpus: str = ""
    overrides: Mapping[str, str] = field(default_factory=dict)

    def folder(self, what: Variant, seed: int) -> Path:
        """A run's folder, named by its RUN_ID."""
        return self.logs / f"{self.corpus}{'-' * bool(self.corpus)}{what.label}-seed{seed}"

    def settings(self, what: Variant, seed: int) -> dict[str, str]:
        """A run's settings, but for the data."""
        own = {"SEED": str(seed), "RUN_ID": self.folder(what, seed).name}
        if what.env["STAGES"] == "evaluate":
            own["ARTIFACT"] = str(self.folder(what.parent, seed) / "artifact.bin")
        return {**what.env, **self.overrides, **own}

    def finished(self, what: Variant, seed: int) -> Run | None:
        """The run if its scores are there and its parent is the one it started from.

        Raises Mistake where it was made with other settings.
        """
        folder = self.folder(what, seed)
        run = Run.open(folder) if (folder / "result.json").is_file() else None
        if run is None or any(run.result["bpb"].get(score) is None for score in what.scores):
            return None
        hp = script().Hyperparameters.from_env(self.settings(what, seed))
        wanted = json.loads(json.dumps(asdict(hp)))
        for name, value in run.result.get("scored_with", run.result).get("settings", {}).items():
            if value != wanted.get(name, value) and name not in unread(hp):
                raise Mistake(f"{folder} was run with {name.upper()}={show(value)}, this study wants "
                              f"{show(wanted[name])}; remove it, or choose another --logs")
        if what.parent:
            source = self.finished(what.parent, seed)
            if source is None:
                return None
            left, reads = source.result.get("started"), run.result.get("started")
            if hp.artifact:
                left = source.result["artifact"].get("sha256")
                reads = run.result.get("scored_artifact_sha256")
            if left is None or left != reads:
                return None
        return run

    def values(self, what: Variant, path: str) -> dict[int, float]:
        """A number of result.json, `bpb.float` for one, for each seed whose run is finished and has it."""
        found = {seed: run.result for seed in self.seeds if (run := self.finished(what, seed))}
        for key in path.split("."):
            found = {seed: part[key] for seed, part in found.items() if part.get(key) is not None}
        return found


def spread(values: Mapping[int, float], form: str = ".4f") -> str:
    """Mean ± sample deviation; the deviation only where there are two values."""
    numbers = list(values.values())
    deviation = f" ± {stdev(numbers):{form.replace('+', '')}}" if len(numbers) > 1 else ""
    return f"{fmean(numbers):{form}}{deviation}" if numbers else "–"


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    """a - b on the seeds that both have."""
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def on_seeds(differences: Mapping[int, float], sign: float) -> str:
    """On how many seeds a difference has a sign."""
    return f"{sum(d * sign > 0 for d in differences.values())} of {len(differences)}"


def markdown(*rows: Sequence[str]) -> list[str]:
    """A Markdown table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = (rows[0], ["-" * width for width in widths], *rows[1:])
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]


def ablations_table(bench: Bench) -> list[str]:
    """What each technique is worth: the difference on the same seed when it is removed, largest first."""
    full, rows = bench.values(ABLATION["full"], "bpb.float"), []
    for label, (title, _) in list(ABLATIONS.items())[1:]:
        effect = paired(bpb := bench.values(ABLATION[label], "bpb.float"), full)
        mean = fmean(effect.values()) if effect else 0.0
        rows.append((mean, (title, spread(bpb), spread(effect, "+.4f"), on_seeds(effect, mean))))
    rows.sort(key=lambda row: -row[0])
    return markdown(("removed", "float bpb", "effect of removing it", "seeds with that sign"),
                    ("nothing", spread(full), "–", "–"), *(row for _, row in rows))


def qat_table(bench: Bench) -> list[str]:
    """What QAT costs and saves, against the run's own float score and against the run without QAT."""
    base, notes = bench.values(NONE, "bpb.float"), [""]
    rows = [("QAT", "bits", "float bpb", "rounded bpb", "GPTQ bpb", "rounded - own float",
             "rounded - float without QAT", "grid distance: before, raw, averaged")]
    for title, trained, bits in QAT:
        own = bench.values(trained, "bpb.float")
        scores, without = ([bench.values(rounded(what, quantizer, bits, bits), "bpb.roundtrip")
                            for quantizer in ("rtn", "gptq")] for what in (trained, NONE))
        distances = [spread(bench.values(trained, f"proofs.qat.distance_{at}"), ".3f").split(" ")[0]
                     for at in ("before", "raw", "averaged")]
        costs = [spread(paired(scores[0], floats), "+.4f") for floats in (own, base)]
        rows.append((title, f"int{bits}", spread(own), *map(spread, scores), *costs,
                     "–" if trained is NONE else ", ".join(distances)))
        if trained is not NONE:
            gains = zip(("rounded", "GPTQ"), map(paired, scores, without))
            texts = (f"{kind} {spread(gain, '+.4f')} bpb, lower on {on_seeds(gain, -1)} seeds"
                     for kind, gain in gains)
            notes.append(f"- {title} against no QAT, both int{bits}: {'; '.join(texts)}")
    return markdown(*rows) + notes


def quantizers_table(bench: Bench) -> list[str]:
    """Three ways to round the same trained models, at three sizes."""
    head = ("attention / MLP", "quantiser", "bpb after loading", "cost against float", "model bytes")
    base, rows = bench.values(NONE, "bpb.float"), []
    for titles, what in QUANTIZERS.items():
        bpb, size = bench.values(what, "bpb.roundtrip"), bench.values(what, "artifact.model_bytes")
        rows.append((*titles, spread(bpb), spread(paired(bpb, base), "+.4f"), spread(size, ",.0f")))
    return markdown(head, *rows)


def steps_table(bench: Bench) -> list[str]:
    """Step rules at equal bits of the same trained models, and the bits at which costs are equal."""
    base, rows, cost = bench.values(NONE, "bpb.float"), [], {}
    for (rule, bits), what in STEPS.items():
        bpb, size = (bench.values(what, path) for path in ("bpb.roundtrip", "artifact.model_bytes"))
        cost[rule, bits] = paired(bpb, base)
        known = cost["absmax", bits]
        ratios = {seed: c / known[seed] for seed, c in cost[rule, bits].items() if known.get(seed)}
        rows.append((f"{bits:g}", rule, spread(bpb), spread(cost[rule, bits], "+.4f"), spread(ratios, ".2f"),
                     spread(size, ",.0f")))
    head = ("bits", "rule", "bpb after loading", "cost against float", "of absmax's", "model bytes")
    lines = markdown(head, *rows)
    means = {key: fmean(values.values()) for key, values in cost.items() if values}
    wanted = means.get(("absmax", RATES[0]))
    for (_, high), (_, low) in itertools.pairwise(key for key in means if key[0] == "water"):
        above, below = means["water", low], means["water", high]
        if wanted and below <= wanted <= above:
            share = math.log(wanted / below) / math.log(above / below)
            lines += ["", f"- the cost of absmax at {RATES[0]} bits is that of water at "
                          f"{high + share * (low - high):.2f}, between two rows by the logarithm"]
    return lines


def after_qat_table(bench: Bench) -> list[str]:
    """Whether QAT, which trains on absmax's grid, pays when the file has another."""
    rows = [("QAT", "float bpb", *(f"{rule}, 3 bits" for rule in ("absmax", "sigma", "water")))]
    for what in (NONE, SOFT, STE):
        scores = (bench.values(STEPS_AFTER_QAT[what.label, rule], "bpb.roundtrip")
                  for rule in ("absmax", "sigma", "water"))
        title = {title for title, trained, _ in QAT if trained is what}.pop()
        rows.append((title, spread(bench.values(what, "bpb.float")), *map(spread, scores)))
    return markdown(*rows)


def qat_at_rate_table(bench: Bench) -> list[str]:
    """Whether QAT pays at a low rate, when it trains on the grid that the file has."""
    rows = []
    for title, what in AT_RATE.items():
        row = [title, spread(bench.values(what, "bpb.float"))]
        for quantizer in ("rtn", "gptq"):
            bpb, base = (bench.values(QAT_AT_RATE[each, quantizer], "bpb.roundtrip")
                         for each in (title, "none"))
            row += [spread(bpb), spread(paired(bpb, base), "+.4f")]
        rows.append(row)
    return markdown(("QAT", "float bpb", "plain rounding", "effect", "GPTQ", "effect"), *rows)


def twins_table(bench: Bench) -> list[str]:
    """#1855's twin against `smoke` at equal tokens and at equal time."""
    rows = []
    for title, twin, what in TWINS:
        row = [title]
        for score in ("bpb.float", "bpb.roundtrip"):
            bpb = bench.values(what, score)
            row += [spread(bpb), spread(paired(bpb, bench.values(twin, score)), "+.4f")]
        size, steps, seconds = (bench.values(what, path)
                                for path in ("artifact.model_bytes", "steps", "train_seconds"))
        rows.append((*row, spread(size, ",.0f"), spread(steps, ".0f").split(" ")[0], spread(seconds, ".0f")))
    return markdown(("preset", "float bpb", "above the twin", "packed bpb", "above the twin", "model bytes",
                     "steps", "seconds of training"), *rows)


def documents_table(bench: Bench) -> list[str]:
    """Plain windows, sliding ones, documents with adapters and with the mask, of the same artifacts."""
    rows = []
    for (preset, title), what in DOCUMENTS.items():
        plain = DOCUMENTS[preset, "by documents, no adapters"]
        base = bench.values(plain, "bpb.ttt")
        kinds = [(title, "bpb.ttt", "budget.evaluation.counted.ttt")]
        if what is plain:
            kinds = [(name, f"bpb.{name}", f"budget.evaluation.counted.{name}")
                     for name in ("roundtrip", "sliding")] + kinds
        for name, score, seconds in kinds:
            gain = paired(bpb := bench.values(what, score), base)
            rows.append((preset, name, spread(bpb), spread(gain, "+.4f"), on_seeds(gain, -1),
                         spread(bench.values(what, seconds), ".0f")))
    return markdown(("preset", "scored", "bpb", "against no adapters", "seeds where it is lower", "seconds"),
                    *rows)


def ttt_table(bench: Bench) -> list[str]:
    """The same artifacts scored without and with test-time training."""
    base = bench.values(PLAIN, "bpb.sliding")
    rows = [("none, sliding windows", spread(base), "–", "–")]
    for label, (title, _) in RECIPES.items():
        gain = paired(bpb := bench.values(TTT[label], "bpb.ttt"), base)
        rows.append((title, spread(bpb), spread(gain, "+.4f"), on_seeds(gain, -1)))
    return markdown(("test-time training", "bpb", "effect", "seeds where it is lower"), *rows)


STUDIES = {  # name: variants, and the table over their finished runs
    "ablations": (list(ABLATION.values()), ablations_table),
    "qat": ([rounded(what, q, bits, bits) for _, what, bits in QAT for q in ("rtn", "gptq")], qat_table),
    "quantizers": (list(QUANTIZERS.values()), quantizers_table),
    "steps": (list(STEPS.values()), steps_table),
    "steps-after-qat": (list(STEPS_AFTER_QAT.values()), after_qat_table),
    "qat-at-rate": (list(QAT_AT_RATE.values()), qat_at_rate_table),
    "ttt": (list(TTT.values()), ttt_table),
    "twins": ([*TWIN.values()], twins_table),
    "documents": ([*DOCUMENTS.values()], documents_table),
}


def report(bench: Bench, name: str) -> tuple[str, int]:
    """A study's table with a line on where it comes from, and how many of its runs are missing."""
    variants, table = STUDIES[name]
    runs = [bench.finished(what, seed) for what in with_parents(variants) for seed in bench.seeds]
    corpora = sorted({run.result["corpus"] for run in runs if run})
    if len(corpora) > 1:
        raise Mistake(f"the runs in {bench.logs} are of several texts ({', '.join(corpora)}); use --corpus")
    steps = sorted({str(run.result["steps"]) for run in runs if run and "steps" in run.result})
    missing = f"Incomplete: {runs.count(None)} of {len(runs)} runs are missing. " if None in runs else ""
    command = f"python records/experiments.py {name}{f' --corpus {bench.corpus}' if bench.corpus else ''}"
    corpus = as_markdown("".join(corpora))
    note = (f"{missing}Preset `smoke`, {corpus}, {' or '.join(steps)} steps; mean ± sample "
            f"deviation over seeds {', '.join(map(str, bench.seeds))}; differences by seed. `{command}`")
    return "\n".join([*table(bench), "", note]), runs.count(None)


def with_block(page: str, name: str, text: str) -> str:
    """RESULTS.md with a text between the two markers of an experiment."""
    start, end = f"<!-- experiment:{name} -->", f"<!-- end of experiment:{name} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise Mistake(f"records/RESULTS.md needs one pair of {start} and {end}")
    return page[:page.index(start)] + f"{start}\n{text}\n" + page[page.index(end):]


def environment(overrides: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without settings of train_gpt.py, but for KEPT; paths become absolute."""
    tg = script()
    fields = {name.upper() for name in tg.Hyperparameters.fields()}
    if unknown := overrides.keys() - fields:
        raise Mistake(f"--set {min(unknown)}: no such setting; see python train_gpt.py --help")
    known = fields.union(tg.SPELLINGS, tg.FIXED, tg.IGNORED_NAMES) - {*KEPT}
    env = {name: text for name, text in os.environ.items()
           if name not in known and not name.startswith(tg.OWN_PREFIXES)}
    paths = {name: env.get(name) or ROOT / tg.PRESETS["smoke"][name.lower()] for name in KEPT[:2]}
    return env | {name: os.path.abspath(path) for name, path in paths.items()}


def check_free(folder: Path) -> None:
    """Raise Mistake unless a folder is missing, empty, or left by a run of this program that has ended."""
    if folder.exists() and any(folder.iterdir()):
        try:
            with open(folder / CONSOLE, "rb") as console:
                fcntl.flock(console, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError):
            raise Mistake(f"{folder} holds a run that is under way, or that this program did not start; "
                          f"wait for it, or remove it") from None


def hand_over(parent: Run, folder: Path) -> None:
    """What quantising reads of the training: model.pt, and result.json as training left it."""
    try:
        os.link(parent.folder / "model.pt", folder / "model.pt")
    except OSError:  # another file system, or one without links
        shutil.copyfile(parent.folder / "model.pt", folder / "model.pt")
    later = ("artifact", "scored_with", "scored_artifact_sha256")
    result = {key: value for key, value in parent.result.items() if key not in later}
    result |= {kind: {"float": result.get(kind, {}).get("float")} for kind in ("bpb", "val_loss")}
    write_atomically(folder / "result.json", json.dumps(result, indent=1).encode())


def start(bench: Bench, what: Variant, seed: int, env: Mapping[str, str]) -> subprocess.Popen:
    """Make a run's folder anew and start the script on it."""
    folder = bench.folder(what, seed)
    check_free(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with open(folder / CONSOLE, "wb") as console:
        fcntl.flock(console, fcntl.LOCK_EX)  # the run inherits it, and holds it while it lives
        if what.parent and "quantize" in what.env["STAGES"]:
            hand_over(bench.finished(what.parent, seed), folder)
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train_gpt.py")], cwd=bench.logs.parent, stdin=subprocess.DEVNULL,
            stdout=console, stderr=subprocess.STDOUT, env={**env, **bench.settings(what, seed)})


def execute(bench: Bench, tasks: Sequence[tuple[Variant, int]], env: Mapping[str, str], jobs: int) -> None:
    """Run the tasks, several at a time, with a line for each start and end; Mistake where one fails."""
    waiting, running, began = list(tasks), [], time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            pending = {bench.folder(*task) for task in (*waiting, *(task for task, _ in running))}
            ready = [(what, seed) for what, seed in waiting
                     if not what.parent or bench.folder(what.parent, seed) not in pending]
            for task in ready[:jobs - len(running)]:
                print(f"start run:{bench.folder(*task).name}", flush=True)
                running.append((task, start(bench, *task, env)))
                waiting.remove(task)
            time.sleep(0.2)
            for task, process in [entry for entry in running if entry[1].poll() is not None]:
                running.remove((task, process))
                folder, run = bench.folder(*task), bench.finished(*task)
                if process.returncode or run is None:
                    said = (folder / CONSOLE).read_text(encoding="utf-8", errors="replace").splitlines()
                    raise Mistake(f"{folder} ended with status {process.returncode}: {' '.join(said[-1:])}")
                done, seconds = len(tasks) - len(waiting) - len(running), time.monotonic() - began
                scores = " ".join(f"{name}_bpb:{bpb:.4f}" for name, bpb in run.bpb.items())
                print(f"done run:{folder.name} {scores} runs:{done}/{len(tasks)} time:{seconds / 60:.1f}min "
                      f"left:{seconds / done * (len(tasks) - done) / 60:.1f}min", flush=True)
    except KeyboardInterrupt:
        raise Mistake("stopped; the same command continues with what is missing") from None
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()


def program() -> None:
    """Run what is missing, print the tables."""
    parser = shared.parser(__doc__)
    parser.add_argument("study", choices=[*STUDIES, "all"])
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
    parser.add_argument("--seeds", default="1337,42,7", help="%(default)s")
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="where the run folders lie")
    parser.add_argument("--corpus", default="", metavar="NAME", help="prefix of folders and markers")
    parser.add_argument("--only", metavar="A,B", help="these variants alone, and their parents")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="for every run")
    parser.add_argument("--dry-run", action="store_true", help="list what would run")
    parser.add_argument("--table", action="store_true", help="run nothing, only print the table")
    parser.add_argument("--write", action="store_true", help="write the table into records/RESULTS.md")
    arguments = parser.parse_args()
    logs = arguments.logs.resolve()
    try:
        seeds = tuple(dict.fromkeys(int(seed) for seed in arguments.seeds.split(",")))
        if bad := [seed for seed in seeds if not shared.SEED.holds(seed)]:
            raise Mistake(f"--seeds: {bad[0]} is not {shared.SEED.name}")
        if not re.fullmatch(r"[\w.-]*", arguments.corpus) or arguments.corpus.startswith("."):
            raise Mistake(f"--corpus {arguments.corpus}: write letters, digits, and . _ - between them")
        bench = Bench(logs, seeds, arguments.corpus, dict(text.split("=", 1) for text in arguments.set))
        script().Hyperparameters.from_env({"PRESET": "smoke", **bench.overrides})
    except ValueError as error:
        raise Mistake(f"--seeds takes 1337,42,7 and --set takes NAME=VALUE: {error}") from None
    if arguments.jobs < 1 or logs.name != "logs":
        raise Mistake("--jobs must be at least 1, and --logs a folder named logs: train_gpt.py writes there")
    names = list(STUDIES) if arguments.study == "all" else [arguments.study]
    variants = with_parents(what for name in names for what in STUDIES[name][0])
    if arguments.only:
        labels, chosen = [what.label for what in variants], arguments.only.split(",")
        if unknown := {*chosen}.difference(labels):
            raise Mistake(f"--only {min(unknown)} is none of {', '.join(labels)}")
        variants = with_parents(what for what in variants if what.label in chosen)
    tasks = [(what, seed) for seed in bench.seeds for what in variants if not bench.finished(what, seed)]
    if arguments.dry_run:
        for task in tasks:
            print(" ".join(f"{name}={text}" for name, text in bench.settings(*task).items()))
        return
    if tasks and not arguments.table:
        for task in tasks:
            check_free(bench.folder(*task))
        logs.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": str(max(os.cpu_count() // arguments.jobs, 1))}
        execute(bench, tasks, environment(bench.overrides) | threads, arguments.jobs)
    for name in names:
        text, missing = report(bench, name)
        print(f"\n{name}\n\n{text}")
        if arguments.write:
            if missing:
                raise Mistake(f"{missing} runs of {name} are missing; RESULTS.md takes whole tables only")
            block = f"{arguments.corpus}{'-' * bool(arguments.corpus)}{name}"
            page = ROOT / "records/RESULTS.md"
            write_atomically(page, with_block(page.read_text(encoding="utf-8"), block, text).encode())


if __name__ == "__main__":
    sys.exit(exit_status(program))
