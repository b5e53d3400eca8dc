"""The experiments of RESULTS.md: made-up results in tables, what is run again, a tiny real study."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import experiments as ex
import numpy as np
import pytest
from conftest import ROOT, write_shard
from runs import Mistake, Run

import train_gpt as tg

SEEDS = (1337, 42, 7)
# What a run's file holds of an artifact and of QAT, whichever part a test is about.
SIZES = {"model_bytes": 1, "code_bytes": 1, "total_bytes": 2, "limit": 16_000_000}
QAT = dict.fromkeys(("first_step", "distance_before", "distance_raw", "loss", "loss_rounded"), 0.5)
VARIANTS = {what.label: what for study in ex.STUDIES.values() for what in ex.with_parents(study[0])}


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "logs").mkdir()
    return ex.Bench(tmp_path / "logs", SEEDS)


def settings(bench, label, seed):
    return dataclasses.asdict(tg.Hyperparameters.from_env(bench.settings(VARIANTS[label], seed)))


def finish(bench, label, values, score, **more):
    """Made-up results: a score for each seed, None for a seed without a run."""
    for seed, value in zip(bench.seeds, values):
        if value is not None:
            folder = bench.folder(VARIANTS[label], seed)
            folder.mkdir()
            result = {"preset": "smoke", "seed": seed, "corpus": "a text", "steps": 850, "started": "noon"}
            result |= {"bpb": {score: value}, "settings": settings(bench, label, seed)} | more
            if "artifact" in more:
                result["artifact"] = SIZES | more["artifact"]
            if more.get("proofs", {}).get("qat"):
                result["proofs"] = {"qat": QAT | more["proofs"]["qat"]}
            (folder / "result.json").write_text(json.dumps(result))


def cells(table, *first):
    """The row of a Markdown table that begins with these cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("|")]
    return next(row for row in rows if row[: len(first)] == list(first))[len(first) :]


# --- the studies


def test_run_ids_and_settings_of_the_studies():
    bench = ex.Bench(ROOT / "logs", (7,))
    ours = {label: bench.settings(what, 7) for label, what in VARIANTS.items()}
    assert ours["ablation-xsa"] == {
        "PRESET": "smoke", "STAGES": "train", "ITERATIONS": "320", "WARMDOWN_ITERS": "250",
        "LATE_QAT_THRESHOLD": "0", "XSA_LAST_N": "0", "SEED": "7", "RUN_ID": "ablation-xsa-seed7",
    }  # fmt: skip
    assert ours["qat-soft"] == {"PRESET": "smoke", "STAGES": "train", "SEED": "7", "RUN_ID": "qat-soft-seed7"}
    four = ours["qat-ste4-int4-gptq"]
    assert four["STAGES"] == "quantize,evaluate" and four["SOFT_ROUND_QAT"] == "0"
    assert (four["ATTN_BITS"], four["MLP_BITS"], four["QUANTIZER"]) == ("4", "4", "gptq")
    assert ours["ttt-pr601"]["ARTIFACT"] == str(ROOT / "logs/ttt-none-seed7/artifact.bin")
    assert {label for label in ours if label.startswith("ablation")} == {
        f"ablation-{n}" for n in ex.ABLATIONS
    }
    trained = {what.label for _, what, _ in ex.QAT}
    rounded = {what.label for study in ("qat", "quantizers") for what in ex.STUDIES[study][0]}
    for study in ("steps", "steps-after-qat", "qat-at-rate"):
        rounded |= {what.label for what in ex.STUDIES[study][0]}
    trained |= {what.label for what in ex.AT_RATE.values()}
    assert {label for label in ours if label.startswith("qat")} - rounded == trained
    at_rate = [
        ours[f"qat-{kind}-at3{rest}"] for kind in ("none", "soft", "ste") for rest in ("", "-rtn", "-gptq")
    ]
    assert {(each["TARGET_BITS"], each["ATTN_BITS"], each["ITERATIONS"]) for each in at_rate} == {
        ("3", "8", "425")
    }
    three = ours["qat-none-water-3.0"]
    assert (three["STEP_RULE"], three["TARGET_BITS"], three["MLP_BITS"]) == ("water", "3.0", "8")


@pytest.mark.parametrize(
    "label, quantizer, rule",
    [
        ("qat-none-int5-rtn", "rtn", "absmax"),
        ("qat-none-int6int5-lite", "rtn", "lite"),
        ("qat-none-int5-gptq", "gptq", "clip"),  # nothing tells the steps of a model that no QAT has hardened
        ("qat-soft-int5-gptq", "gptq", "absmax"),  # QAT's own steps
        ("qat-ste4-int4-rtn", "rtn", "absmax"),
    ],
)
def test_how_the_steps_of_each_quantiser_are_chosen(label, quantizer, rule):
    made = settings(ex.Bench(ROOT / "logs", (7,)), label, 7)
    assert (made["quantizer"], made["step_rule"]) == (quantizer, rule)
    assert ("qat-none" in label) == (made["late_qat_threshold"] == 0)


def test_every_ablation_changes_one_thing_and_keeps_the_preset_otherwise():
    """And takes a technique away: what its field says of off is what the run has."""
    bench, fields = ex.Bench(ROOT / "logs", (1,)), tg.Hyperparameters.fields()
    full, preset = (settings(bench, label, 1) for label in ("ablation-full", "qat-soft"))
    assert {name for name in full if full[name] != preset[name]} == {
        "run_id", "iterations", "warmdown_iters", "late_qat_threshold",
    }  # fmt: skip
    for label in ex.ABLATIONS:
        ours = settings(bench, f"ablation-{label}", 1)
        differing = {name for name in ours if ours[name] != full[name]} - {"run_id"}
        assert len(differing) == (label != "full"), label
        for name in differing - {"rope_dims"}:
            assert ours[name] == fields[name].metadata["off"], label


def test_another_text_has_folders_of_its_own(bench):
    other = ex.Bench(bench.logs, SEEDS, "prose")
    assert other.folder(VARIANTS["qat-soft"], 42).name == "prose-qat-soft-seed42"
    artifact = str(bench.logs / "prose-ttt-none-seed42/artifact.bin")
    assert other.settings(VARIANTS["ttt-smoke"], 42)["ARTIFACT"] == artifact


# --- the tables


def test_ablations_are_paired_by_seed(bench):
    finish(bench, "ablation-full", (1.30, 1.32, 1.31), "float")
    finish(bench, "ablation-xsa", (1.33, 1.33, 1.33), "float")
    finish(bench, "ablation-ema", (1.29, 1.31, 1.315), "float")
    finish(bench, "ablation-ln_scale", (None, 1.35, None), "float")  # 1.35 - 1.32, not 1.35 - the mean
    table = ex.ablations_table(bench)
    assert cells(table, "nothing") == ["1.3100 ± 0.0100", "–", "–"]
    assert cells(table, "XSA") == ["1.3300 ± 0.0000", "+0.0200 ± 0.0100", "3 of 3"]
    assert cells(table, "EMA") == ["1.3050 ± 0.0132", "-0.0050 ± 0.0087", "2 of 3"]
    assert cells(table, "LN scale") == ["1.3500", "+0.0300", "1 of 1"]
    assert cells(table, "SmearGate") == ["–", "–", "0 of 0"]
    order = [line.split("|")[1].strip() for line in table]
    assert order.index("LN scale") < order.index("XSA") < order.index("EMA")  # largest effect first


def test_qat_costs_against_both_floats(bench):
    proof = {"qat": {"distance_before": 0.25, "distance_raw": 0.14, "distance_averaged": 0.12}}
    finish(bench, "qat-none", (1.30, 1.40, 1.50), "float", proofs={"qat": None})
    finish(bench, "qat-soft", (1.31, 1.42, 1.53), "float", proofs=proof)
    finish(bench, "qat-soft-int5-rtn", (1.312, 1.422, 1.535), "roundtrip")
    finish(bench, "qat-none-int4-rtn", (1.36, 1.46, 1.56), "roundtrip")
    finish(bench, "qat-none-int4-gptq", (1.34, 1.44, 1.54), "roundtrip")
    finish(bench, "qat-ste4", (1.305, 1.405, 1.505), "float", proofs=proof)
    finish(bench, "qat-ste4-int4-rtn", (1.35, 1.45, 1.57), "roundtrip")
    table = ex.qat_table(bench)
    assert cells(table, "soft-round, `smoke`'s", "int5") == [
        "1.4200 ± 0.1100", "1.4230 ± 0.1115", "–", "+0.0030 ± 0.0017", "+0.0230 ± 0.0115",
        "0.250, 0.140, 0.120",
    ]  # fmt: skip
    assert cells(table, "none", "int4") == [
        "1.4000 ± 0.1000", "1.4600 ± 0.1000", "1.4400 ± 0.1000", "+0.0600 ± 0.0000", "+0.0600 ± 0.0000", "–",
    ]  # fmt: skip
    start = "- straight-through below 0.3 against no QAT, both int4"
    line = next(line for line in table if line.startswith(start))
    assert "rounded -0.0033 ± 0.0115 bpb, lower on 2 of 3 seeds" in line and "GPTQ – bpb" in line


def test_quantizers_cost_and_bytes(bench):
    finish(bench, "qat-none", (1.30, 1.40, 1.50), "float")
    for seed, value, size in zip(SEEDS, (1.301, 1.402, 1.503), (1000, 1200, 1400)):
        one = ex.Bench(bench.logs, (seed,))
        finish(one, "qat-none-int6int5-lite", (value,), "roundtrip", artifact={"model_bytes": size})
    row = cells(ex.quantizers_table(bench), "int6 / int5", "GPTQ-lite")
    assert row == ["1.4020 ± 0.1010", "+0.0020 ± 0.0010", "1,200 ± 200"]


def test_ttt_is_compared_with_the_sliding_score(bench):
    finish(bench, "qat-soft", (1.39, 1.39, 1.39), "float")
    for seed, sliding, ttt in zip(SEEDS, (1.30, 1.40, 1.50), (1.29, 1.41, 1.49)):
        one = ex.Bench(bench.logs, (seed,))
        scores = {"float": 1.39, "roundtrip": sliding + 0.1, "sliding": sliding}
        finish(one, "ttt-none", (0.0,), "", artifact={"sha256": "a"}, bpb=scores)
        scores = {"roundtrip": 9.0, "ttt": ttt}
        finish(one, "ttt-pr601", (0.0,), "", scored_artifact_sha256="a", bpb=scores)
    table = ex.ttt_table(bench)
    assert cells(table, "none, sliding windows")[0] == "1.4000 ± 0.1000"
    assert cells(table, "#601's SGD recipe") == ["1.3967 ± 0.1007", "-0.0033 ± 0.0115", "2 of 3"]


def test_report_says_what_is_missing_and_refuses_two_texts(bench):
    finish(bench, "ablation-full", (1.30, 1.32, 1.31), "float")
    text, missing = ex.report(bench, "ablations")
    whole = len(SEEDS) * len(ex.ABLATIONS)
    assert missing == whole - len(SEEDS) and f"Incomplete: {missing} of {whole}" in text
    assert "a text" in text and "1337, 42, 7" in text
    finish(bench, "ablation-xsa", (1.30, None, None), "float", corpus="another text")
    with pytest.raises(Mistake, match="several texts"):
        ex.report(bench, "ablations")


def test_a_block_of_the_page_is_replaced():
    page = "a\n<!-- experiment:qat -->\nold\n<!-- end of experiment:qat -->\nb\n"
    block = "a\n<!-- experiment:qat -->\n| x | \\1\n<!-- end of experiment:qat -->\nb\n"
    assert ex.with_block(page, "qat", "| x | \\1") == block == ex.with_block(block, "qat", "| x | \\1")
    for name, text in (("ttt", page), ("qat", page + page)):
        with pytest.raises(Mistake, match="one pair"):
            ex.with_block(text, name, "")


def test_results_has_a_place_for_every_study():
    page = (ROOT / "records/RESULTS.md").read_text(encoding="utf-8")
    for name in ex.STUDIES:
        assert "a table" in ex.with_block(page, name, "a table")


def test_a_whole_table_is_written(bench, monkeypatch, capsys):
    """Into a RESULTS.md under another root, and nothing else of it changes."""
    for label in ex.ABLATIONS:
        finish(bench, f"ablation-{label}", (1.3, 1.3, 1.3), "float")
    root = bench.logs.parent
    (root / "records").mkdir()
    head, tail = "a\n<!-- experiment:ablations -->\n", "<!-- end of experiment:ablations -->\nb\n"
    (root / "records/RESULTS.md").write_text(f"{head}old\n{tail}")
    monkeypatch.setattr(ex, "ROOT", root)
    command = ["experiments.py", "ablations", "--table", "--write", "--logs", str(bench.logs)]
    monkeypatch.setattr(sys, "argv", command)
    assert ex.exit_status(ex.program) == 0, capsys.readouterr().err
    written = (root / "records/RESULTS.md").read_text()
    assert written.startswith(head) and written.endswith(tail)
    assert "| nothing" in written and "old" not in written


def test_the_name_of_a_text_is_escaped_in_the_page(bench):
    for label in ex.ABLATIONS:
        finish(bench, f"ablation-{label}", (1.3, 1.3, 1.3), "float", corpus="<!-- a|b -->")
    assert r"Preset `smoke`, &lt;!-- a\|b --&gt;, 850 steps" in ex.report(bench, "ablations")[0]


def test_a_run_that_does_not_say_when_it_was_trained_is_not_finished(bench):
    scores = {"float": 1.3, "roundtrip": 1.4, "sliding": 1.2}
    for label in ("qat-soft", "ttt-none"):
        finish(bench, label, (1.3, None, None), "float", bpb=scores)
        path = bench.folder(VARIANTS[label], 1337) / "result.json"
        result = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in result.items() if key != "started"}))
    assert bench.finished(VARIANTS["qat-soft"], 1337) and not bench.finished(VARIANTS["ttt-none"], 1337)


# --- what is run again


def test_half_a_run_is_not_finished(bench):
    finish(bench, "qat-none-int5-rtn", (1.3, 1.3, None), "float")  # as handed over, before the stages ran
    finish(bench, "qat-none", (1.3, None, None), "float")
    assert not bench.values(VARIANTS["qat-none-int5-rtn"], "bpb.float")
    assert bench.values(VARIANTS["qat-none"], "bpb.float") == {1337: 1.3}


@pytest.mark.parametrize(
    "label, other, refused",
    [
        ("qat-soft", {"iterations": 3}, True),
        ("ablation-xsa", {"xsa_last_n": 1}, True),
        ("qat-soft", {"late_qat_threshold": 0.1}, True),
        ("qat-none", {"late_qat_threshold": 0.1}, True),
        ("qat-soft", {"attn_bits": 6}, True),
        ("qat-none", {"attn_bits": 6, "soft_round_alpha": 3.0}, False),
        ("qat-soft", {"ttt_lr": 0.5, "prune_pct": 0.5, "data_path": "elsewhere"}, False),
        ("qat-none-int5-gptq", {"prune_pct": 0.5}, True),
        ("qat-none-int5-gptq", {"step_rule": "absmax"}, True),
        ("qat-none-int5-gptq", {"ttt_lr": 0.5}, False),
        ("ttt-smoke", {"ttt_lr": 0.5}, True),
    ],
)
def test_a_run_is_refused_where_a_setting_that_it_reads_differs(bench, label, other, refused):
    scores = dict.fromkeys(("float", "roundtrip", "sliding", "ttt"), 1.3)
    artifact = {"artifact": {"sha256": "a"}, "scored_artifact_sha256": "a"}
    made = settings(bench, label, 1337) | other
    finish(bench, label, (1.3, None, None), "", settings=made, bpb=scores, **artifact)
    for parent in ex.with_parents([VARIANTS[label]])[:-1]:
        finish(bench, parent.label, (1.3, None, None), "", bpb=scores, **artifact)
    if refused:
        with pytest.raises(Mistake, match=next(iter(other)).upper()):
            bench.finished(VARIANTS[label], 1337)
    else:
        assert bench.finished(VARIANTS[label], 1337)


def test_a_run_from_an_earlier_training_or_artifact_is_not_finished(bench):
    one, scores = ex.Bench(bench.logs, (7,)), {"float": 1.3, "roundtrip": 1.4, "sliding": 1.2, "ttt": 1.1}
    finish(one, "qat-soft", (1.3,), "float", bpb=scores)
    finish(one, "ttt-none", (1.3,), "float", bpb=scores, artifact={"sha256": "a"})
    finish(one, "ttt-pr601", (1.3,), "float", bpb=scores, scored_artifact_sha256="a")
    finish(one, "ttt-pr606", (1.3,), "float", bpb=scores, scored_artifact_sha256="b")
    for label, fits in (("ttt-none", True), ("ttt-pr601", True), ("ttt-pr606", False)):
        assert (one.finished(VARIANTS[label], 7) is not None) == fits
    path = one.folder(VARIANTS["qat-soft"], 7) / "result.json"
    path.write_text(path.read_text().replace("noon", "midnight"))
    assert one.finished(VARIANTS["qat-soft"], 7) and not one.finished(VARIANTS["ttt-none"], 7)


def test_overrides_reach_every_run_and_are_part_of_what_is_compared(bench):
    small = ex.Bench(bench.logs, SEEDS, overrides={"ITERATIONS": "3"})
    assert small.settings(VARIANTS["ablation-full"], 7)["ITERATIONS"] == "3"
    finish(bench, "qat-soft", (1.3, 1.3, 1.3), "float")
    with pytest.raises(Mistake, match="ITERATIONS"):
        small.finished(VARIANTS["qat-soft"], 7)


def test_folders_of_others_and_of_living_runs_are_left_alone(bench):
    folder = bench.logs / "x"
    ex.check_free(folder)
    folder.mkdir()
    ex.check_free(folder)
    (folder / "log.txt").write_text("someone else's")
    with pytest.raises(Mistake, match="did not start"):
        ex.check_free(folder)
    with open(folder / ex.CONSOLE, "w") as console:
        ex.check_free(folder)
        fcntl.flock(console, fcntl.LOCK_EX)
        with pytest.raises(Mistake, match="under way"):
            ex.check_free(folder)
    ex.check_free(folder)


def test_quantising_starts_from_the_training_alone(bench):
    scores = {"float": 1.3, "roundtrip": 1.4, "ttt": 1.2}
    finish(
        bench,
        "qat-soft",
        (1.3, None, None),
        "float",
        proofs={"qat": QAT},
        artifact={"sha256": "a"},
        bpb=scores,
    )
    parent, folder = bench.folder(VARIANTS["qat-soft"], 1337), bench.logs / "next"
    (parent / "model.pt").write_bytes(b"weights")
    folder.mkdir()
    ex.hand_over(Run.open(parent), folder)
    result = json.loads((folder / "result.json").read_text())
    assert result["proofs"] == {"qat": QAT} and result["bpb"] == {"float": 1.3} and "artifact" not in result
    assert (folder / "model.pt").read_bytes() == b"weights"


def test_environment_drops_the_callers_settings_but_not_the_data(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    dropped = {"SEED": "5", "RUN_ID": "x", "TTT_LRR": "1", "BIGRAM_BUCKETS": "4", "PRESET": "pr606"}
    dropped |= {"SEEDS": "1,2", "EMBED_LR": "1"}
    kept = {"DATA_PATH": "my/shards", "VOCAB_SIZE": "512", "UNRELATED": "stays"}
    for name, value in (dropped | kept).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TOKENIZER_PATH", raising=False)
    env = ex.environment({})
    assert not dropped.keys() & env.keys()
    assert env["DATA_PATH"] == str(tmp_path / "my/shards") and env["VOCAB_SIZE"] == "512"
    assert env["TOKENIZER_PATH"] == str(ROOT / "data/tokenizers/sotu_4096_bpe.model")
    assert env["UNRELATED"] == "stays"
    with pytest.raises(Mistake, match="ITERATION:"):
        ex.environment({"ITERATION": "3"})


# --- running, with a stand-in for train_gpt.py

STAND_IN = """
import json, os, pathlib, sys, time
folder = pathlib.Path("logs") / os.environ["RUN_ID"]
with open("calls", "a") as calls:
    calls.write(f"start {folder.name}\\n")
if os.environ["RUN_ID"] == os.environ.get("BREAK"):
    sys.exit("error: broken on purpose")
time.sleep(float(os.environ["SECONDS"]))
settings = json.loads(pathlib.Path("settings.json").read_text())[folder.name]
scores = dict.fromkeys(("float", "roundtrip", "sliding", "ttt"), 1.25)
result = {"preset": "smoke", "seed": 1, "corpus": "a text", "settings": settings, "bpb": scores,
          "started": "noon"}
(folder / "model.pt").write_text("weights")
(folder / "result.json").write_text(json.dumps(result))
with open("calls", "a") as calls:
    calls.write(f"end {folder.name}\\n")
"""


@pytest.fixture
def stand_in(bench, monkeypatch):
    """Runs a study of three trainings, two of them with a run derived from it, by a stand-in."""
    chosen = ["qat-none", "qat-none-int5-rtn", "qat-soft", "ttt-none", "qat-ste"]
    home = bench.logs.parent
    (home / "train_gpt.py").write_text(STAND_IN)
    every = {bench.folder(VARIANTS[label], 7).name: settings(bench, label, 7) for label in chosen}
    (home / "settings.json").write_text(json.dumps(every))
    monkeypatch.setattr(ex, "ROOT", home)
    before = signal.getsignal(signal.SIGTERM)

    def run(jobs=2, **env):
        tasks = [(VARIANTS[label], 7) for label in chosen if not bench.finished(VARIANTS[label], 7)]
        (home / "calls").write_text("")
        try:
            ex.execute(bench, tasks, {"PATH": os.environ["PATH"], "SECONDS": "0.05"} | env, jobs)
        finally:
            run.calls = [line.split() for line in (home / "calls").read_text().splitlines()]

    run.chosen = chosen
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.whole
def test_parents_come_first_and_no_more_than_the_jobs(stand_in, bench, capsys):
    stand_in(jobs=2)
    order, alive = [" ".join(call) for call in stand_in.calls], 0
    assert len(order) == 2 * len(stand_in.chosen)
    for parent, child in (("qat-none", "qat-none-int5-rtn"), ("qat-soft", "ttt-none")):
        assert order.index(f"end {parent}-seed7") < order.index(f"start {child}-seed7")
    for event, _ in stand_in.calls:
        alive += 1 if event == "start" else -1
        assert alive <= 2
    printed = capsys.readouterr().out.splitlines()
    count = len(stand_in.chosen)
    assert sum(line.startswith("start run:") for line in printed) == count
    assert f"runs:{count}/{count}" in printed[-1] and "left:0.0min" in printed[-1]
    assert (bench.logs / "ttt-none-seed7/model.pt").read_text() == "weights"


@pytest.mark.whole
def test_a_failure_is_told_and_the_rest_resumes(stand_in, bench):
    with pytest.raises(Mistake, match="qat-soft-seed7 ended with status 1: error: broken on purpose"):
        stand_in(jobs=1, BREAK="qat-soft-seed7")
    ended = [name for event, name in stand_in.calls if event == "end"]
    assert ended == ["qat-none-seed7", "qat-none-int5-rtn-seed7"]
    stand_in(jobs=1)  # made anew: the broken one and what comes after it
    assert [name for event, name in stand_in.calls if event == "start"] == [
        "qat-soft-seed7",
        "ttt-none-seed7",
        "qat-ste-seed7",
    ]
    stand_in(jobs=1)
    assert stand_in.calls == []


@pytest.mark.whole
def test_sigterm_takes_the_runs_along(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "train_gpt.py").write_text(STAND_IN)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'records')!r}); import experiments as ex, pathlib\n"
        f"home = pathlib.Path({str(tmp_path)!r}); ex.ROOT = home\n"
        "run = lambda: ex.execute(ex.Bench(home / 'logs', (7,)), [(ex.SOFT, 7)], {'SECONDS': '60'}, 1)\n"
        "sys.exit(ex.exit_status(run))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "calls").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(Mistake, match="under way"):
        ex.check_free(tmp_path / "logs/qat-soft-seed7")
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and said.startswith("error: stopped")
    ex.check_free(tmp_path / "logs/qat-soft-seed7")  # the run is dead: its lock is free


# --- the real thing, tiny


@pytest.mark.whole
def test_tiny_study_through_the_command_line(tmp_path, tiny, monkeypatch, capsys):
    small = tiny | {
        "ITERATIONS": "4", "WARMDOWN_ITERS": "4", "LATE_QAT_THRESHOLD": "0.9", "SEED": "9", "NUM_LAYERS": "2",
        "VE_LAYERS": "1", "EVAL_STRIDE": "128", "TTT_CHUNK_TOKENS": "4096",
        "WARMUP_STEPS": "0", "GPTQ_CALIB_SEQUENCES": "4", "DATA_PATH": str(tmp_path / "data"),
    }  # fmt: skip
    shutil.copytree(tiny["DATA_PATH"], small["DATA_PATH"])
    val = Path(small["DATA_PATH"]) / "fineweb_val_000000.bin"
    write_shard(val, np.fromfile(val, "<u2", offset=1024)[:1500])
    data = {name: small.pop(name) for name in ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE")}
    overrides = [f"--set={name}={value}" for name, value in small.items() if name != "PRESET"]
    for name, value in {**data, "SEED": "99", "RUN_ID": "elsewhere"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def call(*words):
        command = ["experiments.py", "ttt", "--seeds", "3", "--jobs", "2", *words, *overrides]
        monkeypatch.setattr(sys, "argv", command)
        status, said = ex.exit_status(ex.program), capsys.readouterr()
        signal.signal(signal.SIGTERM, handler)
        assert status == 0, said.err
        return said.out.splitlines()

    logs, names = tmp_path / "logs", ["qat-soft-seed3", "ttt-none-seed3", "ttt-pr601-seed3"]
    call("--only", "ttt-none")
    assert [path.name for path in sorted(logs.iterdir())] == names[:2]
    trained, packed = (Run.open(logs / name).result for name in names[:2])
    assert trained["seed"] == 3 and trained["steps"] == 4
    assert trained["proofs"]["qat"] and packed["proofs"]["qat"] == trained["proofs"]["qat"]
    assert packed["bpb"]["float"] == trained["bpb"]["float"] and packed["bpb"]["ttt"] is None

    (logs / names[2]).mkdir()  # half a run, as a kill leaves it
    for name in (ex.CONSOLE, "log.txt"):
        (logs / names[2] / name).write_text("half a run\n")
    written = [(logs / name / "log.txt").stat().st_mtime_ns for name in names[:2]]
    planned = call("--only", "ttt-pr601", "--dry-run")
    assert len(planned) == 1 and f"RUN_ID={names[2]}" in planned[0]
    lines = call("--only", "ttt-pr601")
    assert [line for line in lines if line.startswith("start")] == [f"start run:{names[2]}"]
    assert [(logs / name / "log.txt").stat().st_mtime_ns for name in names[:2]] == written
    assert "half a run" not in (logs / names[2] / "log.txt").read_text()
    scored = Run.open(logs / names[2]).result
    assert scored["bpb"]["roundtrip"] == packed["bpb"]["roundtrip"]
    assert scored["scored_artifact_sha256"] == packed["artifact"]["sha256"]
    assert f"{scored['bpb']['ttt']:.4f}" in cells(lines, "#601's SGD recipe")


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--jobs", "0"], "--jobs"),
        (["--seeds", "1,x"], "--seeds"),
        (["--seeds=-1"], "--seeds: -1 is not a whole number from 0 to 4294967295"),
        (["--corpus", "../x"], "--corpus ../x"),
        (["--set", "ITERATIONS"], "--set"),
        (["--set", "ITERATIONS=x"], "ITERATIONS=x"),
        (["--only", "ablation-nothing"], "ablation-nothing"),
        (["--logs", "elsewhere"], "named logs"),
        (["--table", "--write", "--logs", "no/logs"], f"{len(SEEDS) * len(ex.ABLATIONS)} runs"),
    ],
)
def test_mistakes_end_in_one_line(monkeypatch, capsys, tmp_path, words, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiments.py", "ablations", *words])
    assert ex.exit_status(ex.program) == 1
    said = capsys.readouterr().err
    assert said.startswith("error:") and len(said.splitlines()) == 1 and reason in said
    assert not list(tmp_path.iterdir())
