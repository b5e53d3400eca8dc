"""records/compare.py: the statistics against scipy, the rule for a record, curves, differences, warnings."""

import json
import math
import os
import re
import subprocess
import sys

import compare
import pytest
import runs as shared
from conftest import ROOT
from scipy import stats

import train_gpt as tg

HARDWARE = "device:8x NVIDIA H100 80GB HBM3 threads:8 python:3.12.3 torch:2.13.0 numpy:2.4.6"
TOKENS, BYTES = 1000, 2436
NATS = math.log(2) * BYTES / TOKENS  # in one bit per byte


def write_run(folder, seed=1337, bpb=1.1, rows=(), **changes):
    """A run's folder by hand: a score, a training curve of (step, loss, seconds), and what else is given."""
    scores = {"float": bpb + 0.01, "roundtrip": bpb + 0.012, "sliding": None, "ttt": bpb}
    result = {
        "preset": "smoke", "seed": seed, "corpus": "FineWeb", "val_tokens": TOKENS, "val_bytes": BYTES,
        "bpb": scores, "val_loss": {name: value * NATS for name, value in scores.items() if value},
        "proofs": {}, "budget": {}, "changed": {"seed": seed, "run_id": folder.name}, "hardware": HARDWARE,
        "script_sha256": "a" * 64,
    }  # fmt: skip
    result |= changes
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    lines = [
        json.dumps({"event": "train", "step": step, "loss": loss, "lr_scale": 1.0, "seconds": seconds})
        for step, loss, seconds in rows
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def group(folder, name, values, **changes):
    return [write_run(folder / f"{name}{i}", seed=i, bpb=value, **changes) for i, value in enumerate(values)]


def call(capsys, monkeypatch, program, *words):
    """A command line in this process: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
    status = shared.exit_status(program)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


A, B = [1.1102, 1.1108, 1.1099], [1.1155, 1.1163, 1.1167, 1.1161]


@pytest.mark.parametrize("margin", [0.0, 0.003, 0.02])
def test_welch_is_scipys(margin):
    test = compare.one_sided(compare.Sample.of(A), compare.Sample.of(B), margin)
    wanted = stats.ttest_ind(A, [value - margin for value in B], equal_var=False, alternative="less")
    assert test.t == pytest.approx(wanted.statistic) and test.p == pytest.approx(wanted.pvalue)
    assert test.freedom == pytest.approx(wanted.df)


def test_one_sample_test_where_the_other_deviation_is_unknown():
    test = compare.one_sided(compare.Sample.of(A), compare.Sample(1.1117, None, 1))
    wanted = stats.ttest_1samp(A, 1.1117, alternative="less")
    assert test.p == pytest.approx(wanted.pvalue) and test.name == "one-sample t"


def test_no_test_without_a_deviation(tmp_path, monkeypatch, capsys):
    assert compare.one_sided(compare.Sample.of([1.0]), compare.Sample.of(B)) is None
    assert compare.one_sided(compare.Sample.of([1.0, 1.0]), compare.Sample(1.1, None, 1)) is None
    run = write_run(tmp_path / "a")
    status, out, _ = call(capsys, monkeypatch, compare.program, run, "--against", "1.2,0.001,3")
    assert status == 0 and "no test" in out and "a record?" not in out


def test_a_deviation_whose_square_is_lost_is_tested_too():
    """Its share of the variance is none: what is left is the one-sample test."""
    a, b = compare.Sample(1.0, 1e-100, 3), compare.Sample(1.1, 1e-110, 3)
    test = compare.one_sided(a, b)
    assert test.freedom == pytest.approx(2.0) and test.p == pytest.approx(0.0)


@pytest.mark.parametrize(
    "gain, spread, answer",
    [(0.0020, 1e-5, "no"), (0.0040, 1e-5, "yes"), (0.0040, 2e-3, "no"), (-0.004, 1e-5, "no")],
)
def test_rule_for_a_record(tmp_path, monkeypatch, capsys, gain, spread, answer):
    """0.005 nats are 0.00296 bpb here: 0.002 is too little, 0.004 enough where the seeds agree."""
    runs = group(tmp_path, "a", [1.1 - gain - spread, 1.1 - gain, 1.1 - gain + spread])
    status, out, _ = call(capsys, monkeypatch, compare.program, *runs, "--against", f"1.1,{spread},3")
    line = re.search(r"a record\?  (\w+): (better|worse) by ([\d.]+) nats", out)
    assert status == 0 and line[1] == answer and line[2] == ("better" if gain > 0 else "worse")
    assert float(line[3]) == pytest.approx(abs(gain) * NATS, abs=1e-5)
    limit = 1.1 - 0.005 / NATS
    p = stats.ttest_ind_from_stats(1.1 - gain, spread, 3, limit, spread, 3, False, "less").pvalue
    assert f"p = {p:.3g} (by 0.00500 nats)" in out and f"p = {p:.3g} (by {0.005 / NATS:.5f} bpb)" in out


def test_against_runs_tests_every_score_in_both_units(tmp_path, monkeypatch, capsys):
    a, b = group(tmp_path, "a", A), group(tmp_path, "b", B)
    status, out, _ = call(capsys, monkeypatch, compare.program, *a, "--against", *b)
    wanted = stats.ttest_ind(A, B, equal_var=False, alternative="less")
    both_units = 2 * 3  # in each of three scores
    assert status == 0 and out.count(f"p = {wanted.pvalue:.3g} (better at all)") == both_units
    titles = [line.split(":")[0] for line in out.splitlines() if "against B" in line]
    assert titles == ["A float", "A roundtrip", "A ttt"]
    difference = sum(A) / 3 - sum(B) / 4
    assert f"{difference:+.5f} bpb   {difference * NATS:+.5f} nats" in out


def test_equal_seeds_are_compared_in_pairs(tmp_path, monkeypatch, capsys):
    """Seeds that differ more than A and B do: Welch sees nothing, the pairs do."""
    a, b = [1.10, 1.14, 1.18], [1.1012, 1.1410, 1.1811]
    runs = group(tmp_path, "a", a), group(tmp_path, "b", b)
    _, out, _ = call(capsys, monkeypatch, compare.program, *runs[0], "--against", *reversed(runs[1]))
    p = stats.ttest_rel(a, b, alternative="less").pvalue
    welch = stats.ttest_ind(a, b, equal_var=False, alternative="less").pvalue
    assert p < 0.01 < 0.4 < welch and f"= {welch:.3g} (better at all)" in out
    assert out.count(f"by seed    A - B -0.00110 ± 0.00010 (n=3) bpb, one-sided p = {p:.3g}") == 3
    other = write_run(tmp_path / "c", seed=9)
    _, out, _ = call(capsys, monkeypatch, compare.program, *runs[0], "--against", *runs[1][:2], other)
    assert "Welch" in out and "by seed" not in out


def test_mean_and_deviation_of_seeds(tmp_path, monkeypatch, capsys):
    status, out, err = call(capsys, monkeypatch, compare.program, *group(tmp_path, "a", [1.0, 1.2, 1.4]))
    rows = {line[1]: line[2] for line in re.finditer(r"(?m)^  (\w+, \w+) .* ([\d.]+)$", out)}
    assert status == 0 and not err
    assert rows["mean, bpb"] == "1.20000" and rows["deviation, bpb"] == "0.20000"
    assert rows["mean, nats"] == f"{1.2 * NATS:.5f}" and rows["deviation, nats"] == f"{0.2 * NATS:.5f}"
    assert "none but the seed" in out and "warning" not in out


def test_published_records():
    records = {record["name"]: compare.record_sample(record) for record in compare.published()}
    assert records["pr606"].mean == pytest.approx(1.116153, abs=1e-6)
    assert records["pr606"].deviation == pytest.approx(0.00059, abs=5e-6) and records["pr606"].count == 3
    assert records["pr601"].mean == 1.1418 and records["pr601"].deviation is None
    assert all(record["source"] and record["about"] for record in compare.published())


def test_equal_steps_and_equal_time(tmp_path):
    """B learns as much per step and takes twice as long: equal after equal steps, behind at equal time."""
    a = write_run(tmp_path / "a", rows=[(step, 10 - 0.01 * step, 0.5 * step) for step in range(1, 401)])
    b = write_run(tmp_path / "b", rows=[(step, 10 - 0.01 * step, 1.0 * step) for step in range(1, 401)])
    a, b = shared.Run.open(a), shared.Run.open(b)
    lines = [line.split() for line in compare.curves([a], [b])]
    steps = {int(line[1]): float(line[-1]) for line in lines if line and line[0] == "step"}
    times = {float(line[0]): float(line[-1]) for line in lines if len(line) == 5 and line[1] == "s"}
    assert steps == {100: 0.0, 200: 0.0, 300: 0.0, 400: 0.0}
    assert list(times) == [50.0, 100.0, 150.0, 200.0]
    # At 200 s A is at step 400 and B at 200; each loss is the mean of the last 5 % of its steps.
    assert times[200.0] == pytest.approx((10 - 3.905) - (10 - 1.955), abs=1e-3)
    assert compare.loss_near(a, "step", 500) is None


def test_settings_that_differ_and_warnings(tmp_path, monkeypatch, capsys):
    a = group(tmp_path, "a", A, changed={"matrix_lr": 0.02})
    other = {"hardware": HARDWARE.replace("8x NVIDIA H100", "1x NVIDIA A100"), "script_sha256": "b" * 64}
    b = group(tmp_path, "b", B, changed={"matrix_lr": 0.03, "data_path": "elsewhere"}, **other)
    _, out, _ = call(capsys, monkeypatch, compare.program, *a, "--against", *b)
    assert re.search(r"MATRIX_LR +A 0.02   B 0.03", out) and "DATA_PATH" not in out and "MUON_WD" not in out
    assert "hardware or versions differ" in out and "A100" in out
    assert "script hashes differ" in out and "corpora differ" not in out and "seed twice" not in out
    c = group(tmp_path, "c", B, changed={})
    _, out, _ = call(capsys, monkeypatch, compare.program, *a, "--against", *c)
    assert "hardware" not in out and "script hashes" not in out


def test_settings_of_scoring_are_those_of_the_last_evaluation(tmp_path):
    """STAGES=evaluate with other settings changes the score, not what was trained."""
    later = {"preset": "smoke", "seed": 1, "changed": {"ttt_lr": 0.5, "matrix_lr": 9.0}, "dtype": "bfloat16"}
    changed = {"matrix_lr": 0.03, "ttt_epochs": 3}
    a = shared.Run.open(write_run(tmp_path / "a", changed=changed))
    b = shared.Run.open(write_run(tmp_path / "b", changed=changed, scored_with=later))
    assert a.changed == changed and b.changed == {"matrix_lr": 0.03, "ttt_lr": 0.5}
    assert set(shared.differing_settings([a, b])) == {"ttt_lr", "ttt_epochs"}


@pytest.mark.parametrize(
    "changes, warning",
    [
        ({"corpus": "another", "val_bytes": BYTES + 9}, "corpora differ"),
        ({"seed": 0}, "A has a seed twice"),
        ({"changed": {"iterations": 7}}, "A mixes settings (ITERATIONS)"),
        ({"val_bytes": 2 * BYTES}, "bytes per token differ"),
    ],
)
def test_warnings_within_a_group(tmp_path, changes, warning):
    runs = [write_run(tmp_path / "x", **{"seed": 0}), write_run(tmp_path / "y", **({"seed": 1} | changes))]
    lines = compare.warnings([shared.Run.open(run) for run in runs], compare.Reference(""))
    assert any(warning in line for line in lines)
    clean = [shared.Run.open(write_run(tmp_path / name, seed=i)) for i, name in enumerate("uv")]
    assert compare.warnings(clean, compare.Reference("")) == []


def test_other_corpus_than_the_records(tmp_path, monkeypatch, capsys):
    runs = group(tmp_path, "a", A, corpus="State of the Union")
    _, out, _ = call(capsys, monkeypatch, compare.program, *runs, "--against", "pr606")
    assert "warning: #606 is a score on FineWeb" in out


@pytest.mark.parametrize(
    "words, part",
    [
        (["nowhere"], "no result.json"),
        ([], "name the folders"),
        (["A0", "A0"], "named twice"),
        (["A0", "--against", "pr999"], "neither a run's folder"),
        (["A0", "--against", "1.1,x,3"], "mean,deviation,count"),
        (["A0", "--against", "1.1,-1,3"], "at least 0"),
        (["A0", "--score", "sliding"], "no sliding score"),
        (["damaged"], "not a finished run's"),
        (["A0", "--against", "nan,0.1,3"], "must be above 0"),
        (["A0", "--against", "1e308,0.1,3"], "none of them huge"),
        (["A0", "--against", "1.1,1e308,3"], "none of them huge"),
        (["A0", "--against", f"1.1,0.1,{'9' * 40}"], "none of them huge"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, part):
    group(tmp_path, "A", [1.1])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "result.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, monkeypatch, compare.program, *words)
    assert status == 1 and err.startswith("error:") and len(err.splitlines()) == 1 and part in err


@pytest.mark.whole
def test_command_line_has_an_example():
    command = [sys.executable, str(ROOT / "records/compare.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--against pr606" in done.stdout


STUB = """#!/usr/bin/env bash
# Stands in for Python: notes each call, and leaves what a run leaves.
env | grep -E '^(SEEDS|NPROC)=' >> calls
case "$*" in
  "-c import matplotlib") [ "$HAS_MATPLOTLIB" = 1 ]; exit ;;
  "-c import torch"*) echo 1; exit ;;
  -c*) exit 0 ;;
  -\\ *) [ -z "${REAL:-}" ] && cat >/dev/null || exec "$REAL" "$@"; exit ;;
  "-m venv"*) exit 1 ;;
  train_gpt.py*)
    mkdir -p "logs/$RUN_ID"
    [ "${STAGES:-}" = train ] || touch "logs/$RUN_ID/artifact.bin"
    echo "train $SEED $RUN_ID" >> calls ;;
  *) echo "$*" >> calls ;;
esac
case "$*" in *report.py*|*audit.py*|*sample.py*) exit "${EXTRA_STATUS:-0}" ;; esac
"""


@pytest.fixture
def run_sh(tmp_path):
    """run.sh in a folder of its own, with a stand-in for Python: what it called, and the finished process."""

    def run(*words, **env):
        (tmp_path / "run.sh").write_text((ROOT / "run.sh").read_text())
        (tmp_path / "stub").write_text(STUB)
        (tmp_path / "stub").chmod(0o755)
        (tmp_path / "calls").write_text("")
        env = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "stub"), "HAS_MATPLOTLIB": "1"} | env
        command = ["bash", str(tmp_path / "run.sh"), *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        return (tmp_path / "calls").read_text().splitlines(), done

    return run


def programs(folder):
    """What is called after a small run."""
    audited = f"records/audit.py {folder}/artifact.bin --techniques"
    reported = f"records/report.py {folder}"
    return [f"records/summary.py {folder}", audited, reported, f"records/sample.py {folder} --tokens 80"]


@pytest.mark.whole
def test_run_sh_runs_every_seed_then_compares(run_sh):
    """SEEDS and NPROC stay with run.sh: the script refuses them."""
    calls, done = run_sh("smoke", SEEDS="1337,42,7", RUN_ID="x", NPROC="1")
    assert done.returncode == 0, done.stderr
    wanted = [calls[0]]
    for seed in (1337, 42, 7):
        wanted += [f"train {seed} x-seed{seed}", *programs(f"logs/x-seed{seed}")]
    assert calls == [*wanted, "records/compare.py logs/x-seed1337 logs/x-seed42 logs/x-seed7"]
    assert calls[0] == "data/prepare.py sotu --vocab-size 4096"


@pytest.mark.whole
@pytest.mark.parametrize("preset", [*tg.PRESETS])
def test_run_sh_fetches_what_each_preset_reads(run_sh, preset):
    """The folder and the vocabulary that its settings name; after a small run comes what belongs to it."""
    calls, done = run_sh(preset, RUN_ID="x")
    hp = tg.Hyperparameters.from_env({"PRESET": preset})
    small = "sotu" in hp.data_path
    wanted = f"sotu --vocab-size {hp.vocab_size}"
    if not small:
        wanted = f"fineweb --variant sp{hp.vocab_size} --train-shards 80"
        assert "about 16 GB to download" in done.stdout
    assert done.returncode == 0 and calls[0] == f"data/prepare.py {wanted}"
    assert hp.data_path.endswith(f"_sp{hp.vocab_size}")
    rest = ["records/summary.py logs/x", "records/report.py logs/x"]
    assert calls[2:] == (programs("logs/x") if small else rest)


@pytest.mark.whole
def test_run_sh_with_one_seed_neither_compares_nor_renames(run_sh):
    calls, done = run_sh("smoke", RUN_ID="x", SEED="5")
    assert done.returncode == 0 and calls[1:] == ["train 5 x", *programs("logs/x")]
    assert run_sh("smoke", SEEDS=",")[1].returncode == 1


@pytest.mark.whole
def test_run_sh_without_an_artifact_speaks_of_none(run_sh):
    calls, done = run_sh("smoke", RUN_ID="x", STAGES="train")
    assert done.returncode == 0 and calls[2:] == ["records/summary.py logs/x", "records/report.py logs/x"]


@pytest.mark.whole
def test_run_sh_survives_what_comes_after_a_run(run_sh):
    """matplotlib is missing, or the report, the audit and the sample fail."""
    calls, done = run_sh("smoke", HAS_MATPLOTLIB="0", RUN_ID="x")
    lines = [line for line in done.stdout.splitlines() if "matplotlib" in line]
    assert done.returncode == 0 and not any("report" in call for call in calls)
    assert len(lines) == 1
    assert "-m pip install matplotlib" in lines[0] and "records/report.py logs/x" in lines[0]
    calls, done = run_sh("smoke", EXTRA_STATUS="1", RUN_ID="y")
    assert done.returncode == 0 and calls[2:] == programs("logs/y")


@pytest.mark.whole
def test_run_sh_says_how_much_fineweb_is_and_uses_several_processes(run_sh):
    calls, done = run_sh("pr606", TRAIN_SHARDS="10", RUN_ID="x", NPROC="2")
    assert done.returncode == 0 and "about 2 GB to download" in done.stdout
    assert calls == [
        "data/prepare.py fineweb --variant sp1024 --train-shards 10",
        "-m torch.distributed.run --standalone --nproc_per_node=2 train_gpt.py",
        "records/summary.py logs/x",
        "records/report.py logs/x",
    ]
    assert run_sh("pr606", TRAIN_SHARDS="ten")[1].stderr.startswith("error: TRAIN_SHARDS=ten")


@pytest.mark.whole
@pytest.mark.parametrize(
    "words, marks", [(["test"], "not slow"), (["test", "quick"], "not slow and not whole")]
)
def test_run_sh_tests(run_sh, words, marks):
    calls, done = run_sh(*words, SEEDS="1,2")
    checks = ["-m ruff check .", "-m ruff format --check tests"]
    assert done.returncode == 0 and calls == [*checks, f"-m pytest -q -m {marks} --durations=10 tests"]


@pytest.mark.whole
@pytest.mark.parametrize("version, taken", [("2.12.1", False), ("2.13.0+cpu", True), ("3.0.0", True)])
def test_run_sh_takes_a_python_whose_torch_is_new_enough(run_sh, tmp_path, version, taken):
    (tmp_path / f"fake/torch-{version}.dist-info").mkdir(parents=True)
    about = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    (tmp_path / f"fake/torch-{version}.dist-info/METADATA").write_text(about)
    calls, done = run_sh("smoke", RUN_ID="x", REAL=sys.executable, PYTHONPATH=str(tmp_path / "fake"))
    assert (done.returncode == 0) == taken == ("train 1337 x" in calls)
    assert taken or "cannot make .venv" in done.stderr
