"""records/submit.py: what the rules refuse, what the folder holds, that its script runs from inside it."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import runs as shared
import submit
from conftest import ROOT, run_script

SOURCE = (ROOT / "train_gpt.py").read_bytes()
SEEDS = (1337, 42, 7)
NAMES = ["--name", "A title", "--author", "A. Person", "--github-id", "aperson", "--date", "2026-03-25"]
CHECKS = [
    {"name": "causal", "status": "pass", "evidence": "64 positions, | and\nmore"},
    {"name": "score before update", "status": "pass", "evidence": "474 chunks"},
]


def result_of(seed: int, **changes) -> dict:
    """A run that may be submitted, but for the given changes."""
    bpb = {"float": 1.1243, "roundtrip": 1.128, "sliding": None, "ttt": round(1.1 + seed / 1e6, 6)}
    clock = {"limit": 600.0, "used": 598.0, "within": True, "uncounted": {"warm-up": 21.5}}
    clock |= {"counted": {"train": 590.0, "calibrate": 8.0}}
    changed = {"seed": seed, "run_id": "r", "matrix_lr": 0.03, "data_path": "/home/person/fineweb10B_sp1024"}
    size = {"model_bytes": 15_700_000, "code_bytes": len(SOURCE), "total_bytes": 15_700_000 + len(SOURCE)}
    result = {
        "preset": "pr606", "seed": seed, "corpus": "FineWeb", "val_tokens": 62021632, "val_bytes": 151080000,
        "bpb": bpb, "val_loss": {name: value * 1.688 for name, value in bpb.items() if value},
        "steps": 6100, "step_ms": 96.5, "script_sha256": hashlib.sha256(SOURCE).hexdigest(), "world_size": 8,
        "hardware": "device:8x NVIDIA H100 80GB HBM3 threads:8 python:3.12.3 torch:2.13.0",
        "changed": changed, "artifact": size | {"limit": 16_000_000, "sha256": f"{seed}"},
        "scored_artifact_sha256": f"{seed}",
        "budget": {"training": clock, "evaluation": clock | {"counted": {"ttt": 540.0}, "used": 540.0}},
        "proofs": {"qat": {"first_step": 4424, "distance_before": 0.25, "distance_raw": 0.13, "loss": 2.0,
                           "loss_rounded": 2.004}},
    }  # fmt: skip
    return result | changes


def write_run(folder: Path, seed: int, audit=True, source=SOURCE, **changes) -> Path:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result_of(seed, **changes)))
    (folder / "log.txt").write_bytes(source + b"\nrun:r preset:pr606\nstep:1 train_loss:6.9 seed:%d\n" % seed)
    techniques = {"artifact_sha256": f"{seed}", "techniques": {"xsa": {"loss": 2.0, "loss_without": 2.25}}}
    (folder / "techniques.json").write_text(json.dumps(techniques))
    if audit:
        report = {"passed": True, "checks": CHECKS} if audit is True else audit
        (folder / "audit.json").write_text(json.dumps(report))
    return folder


def submission(folder: Path, monkeypatch, capsys, runs, *words):
    """The command line in a folder: exit status, stdout, stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["submit.py", *map(str, runs), *NAMES, *map(str, words)])
    status = shared.exit_status(submit.program)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def good_runs(folder: Path) -> list[Path]:
    return [write_run(folder / f"logs/s{seed}", seed) for seed in SEEDS]


def test_folder_of_three_good_runs(tmp_path, monkeypatch, capsys):
    status, out, err = submission(tmp_path, monkeypatch, capsys, good_runs(tmp_path))
    folder = tmp_path / "submissions/2026-03-25_A_title"
    assert status == 0 and not err and str(folder.relative_to(tmp_path)) in out
    logs = ["train_seed1337.log", "train_seed42.log", "train_seed7.log"]
    files = ["README.md", "requirements.txt", "submission.json", "train_gpt.py", *logs]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert (folder / "train_gpt.py").read_bytes() == SOURCE
    assert (folder / "train_seed42.log").read_bytes() == (tmp_path / "logs/s42/log.txt").read_bytes()
    wanted = (folder / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in wanted] == ["torch", "numpy", "sentencepiece", "zstandard"]
    facts = json.loads((folder / "submission.json").read_text())
    mean = 1.1 + sum(SEEDS) / 3e6
    assert facts["val_bpb"] == pytest.approx(mean) and facts["val_loss"] == pytest.approx(1.688 * mean)
    assert facts["val_bpb_deviation"] == pytest.approx(0.000757988, rel=1e-4)  # of 1337, 42, 7 in millionths
    assert facts["bytes_total"] == 15_700_000 + len(SOURCE) and facts["bytes_code"] == len(SOURCE)
    assert facts["track"] == "record" and [run["seed"] for run in facts["runs"]] == list(SEEDS)
    assert (facts["author"], facts["github_id"], facts["date"]) == ("A. Person", "aperson", "2026-03-25")


def test_readme_is_filled_from_the_runs(tmp_path, monkeypatch, capsys):
    submission(tmp_path, monkeypatch, capsys, good_runs(tmp_path), "--out", "out", "--blurb", "What is new.")
    text = (tmp_path / "out/README.md").read_text()
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert rows["42"][:3] == ["1.12430", "1.12800", "1.10004"] and rows["42"][-2:] == ["6,100", "96.5"]
    assert rows["**mean**"][2] == "1.10046 ± 0.00076"
    assert rows["**training**, of 600 s"] == ["**598.0**"] * 3 and rows["training: calibrate"] == ["8.0"] * 3
    assert rows["xsa: loss without it"] == ["+0.2500"] * 3
    assert rows["QAT: distance to the grid, before and after"] == ["0.250, 0.130"] * 3
    assert rows["`MATRIX_LR`"] == ["`0.03`"] and "`RUN_ID`" not in rows and "What is new." in text
    assert text.count("| causal |") == 3 and "64 positions, \\| and more" in text
    assert "keeps this from" not in text and "/home/person" not in text
    command = text.split("pip install -r requirements.txt\n")[1].split("```")[0]
    assert command == (
        "PRESET=pr606 SEED=1337 DATA_PATH=../../../data/datasets/fineweb10B_sp1024 "
        "TOKENIZER_PATH=../../../data/tokenizers/fineweb_1024_bpe.model MATRIX_LR=0.03 \\\n"
        "    torchrun --standalone --nproc_per_node=8 train_gpt.py\n"
    )


def changed(**changes):
    return lambda folder: write_run(folder, 7, **changes)


OVER = {"limit": 600.0, "used": 600.4, "within": False, "counted": {"train": 600.4}, "uncounted": {}}
BREACHES = {
    "settings": (changed(changed={"matrix_lr": 0.04}), "differ in more than the seed: MATRIX_LR"),
    "script": (
        changed(source=b"pass\n", script_sha256=hashlib.sha256(b"pass\n").hexdigest()),
        "2 different scripts",
    ),
    "cap": (changed(artifact=result_of(7)["artifact"] | {"total_bytes": 16_000_001}), "16,000,001 bytes"),
    "a higher limit of its own": (
        changed(artifact=result_of(7)["artifact"] | {"total_bytes": 16_150_228, "limit": 17_000_000}),
        "over the cap of 16,000,000",
    ),
    "training": (changed(budget=result_of(7)["budget"] | {"training": OVER}), "training took 600.4 s"),
    "evaluation without a limit": (
        changed(budget=result_of(7)["budget"] | {"evaluation": OVER | {"limit": 0.0, "within": True}}),
        "evaluation took 600.4 s",
    ),
    "no clock": (changed(budget={}), "the evaluation clock was not read"),
    "audit": (
        changed(audit={"passed": False, "checks": [CHECKS[0], CHECKS[1] | {"status": "fail"}]}),
        "the audit was not passed: score before update (fail)",
    ),
    "unfinished audit": (
        changed(audit={"passed": False, "checks": [CHECKS[0] | {"status": "not checked"}]}),
        "causal (not checked)",
    ),
    "a passed audit with a failure": (
        changed(audit={"passed": True, "checks": [CHECKS[0] | {"status": "fail"}]}),
        "causal (fail)",
    ),
    "no audit": (changed(audit=False), "has not been audited"),
    "seeds": (lambda folder: write_run(folder, 42), "the seeds of the runs are 1337, 42, 42;"),
    "another artifact": (changed(scored_artifact_sha256="other"), "not of the run's own artifact"),
    "stages": (changed(bpb=result_of(7)["bpb"] | {"sliding": 1.1}), "not scored in the same stages"),
    "machine": (changed(hardware="device:1x NVIDIA A100 threads:8"), "made on 1x NVIDIA A100"),
    "another preset": (changed(scored_with={"preset": "smoke", "changed": {}}), "but scored with smoke"),
    "corpus": (changed(corpus="State of the Union"), "scored on State of the Union"),
}


@pytest.mark.parametrize("kind", BREACHES)
def test_a_breach_refuses_and_with_non_record_warns(tmp_path, monkeypatch, capsys, kind):
    make, part = BREACHES[kind]
    runs = [*good_runs(tmp_path)[:2], make(tmp_path / "logs/odd")]
    status, out, err = submission(tmp_path, monkeypatch, capsys, runs, "--out", "out")
    assert status == 1 and not out and not (tmp_path / "out").exists()
    assert part in err and all(line.startswith("error:") for line in err.splitlines())
    status, out, err = submission(tmp_path, monkeypatch, capsys, runs, "--out", "out", "--non-record")
    assert status == 0 and part in err and all(line.startswith("warning:") for line in err.splitlines())
    readme = (tmp_path / "out/README.md").read_text()
    assert part in readme.split("What keeps this from being a record")[1].split("##")[0]
    assert json.loads((tmp_path / "out/submission.json").read_text())["track"] == "non-record"


@pytest.mark.parametrize("seed", ["../../x", True, -1, 2**32, 1.5, "<script>"])
def test_a_seed_is_a_number_before_it_names_a_file(tmp_path, monkeypatch, capsys, seed):
    runs = [*good_runs(tmp_path)[:2], write_run(tmp_path / "logs/odd", 7)]
    (runs[2] / "result.json").write_text(json.dumps(result_of(7) | {"seed": seed}))
    status, out, err = submission(tmp_path, monkeypatch, capsys, runs, "--out", "out", "--non-record")
    assert status == 1 and "seed is" in err and len(err.splitlines()) == 1 and not out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs"]


def test_text_of_the_runs_is_escaped_in_the_readme(tmp_path, monkeypatch, capsys):
    bad = "`|<script>*x*"
    shown = r"\`\|&lt;script&gt;\*x\*"
    base = result_of(7)
    clock = base["budget"]["training"] | {"counted": {bad: 1.0}, "uncounted": {}}
    changes = {"corpus": bad, "hardware": bad, "budget": base["budget"] | {"training": clock, bad: clock}}
    changes |= {"changed": base["changed"] | {"matrix_lr": bad}, "preset": bad, "settings": {"a": 1}}
    changes |= {"proofs": {"averaging": {"exported": bad, "distance_from_raw": 0.1}}}
    audit = {"passed": False, "checks": [{"name": bad, "status": "fail", "evidence": bad}]}
    runs = [write_run(tmp_path / f"logs/s{seed}", seed, audit=audit, **changes) for seed in SEEDS]
    status, _, err = submission(tmp_path, monkeypatch, capsys, runs, "--out", "out", "--non-record")
    assert status == 0, err
    text, command, _ = (tmp_path / "out/README.md").read_text(encoding="utf-8").split("```")
    assert "<script" not in text and f"| {shown} | 1337 | fail | {shown} |" in text
    assert f"| `MATRIX_LR` | <code>{shown}</code> |" in text and f"The preset <code>{shown}</code>" in text
    assert f"| training: {shown} | 1.0 | 1.0 | 1.0 |" in text and f"| {shown}, 10.00 % |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert columns <= {3, 5, 9, 10} and f"MATRIX_LR='{bad}'" in command


def test_a_failed_write_leaves_no_folder(tmp_path, monkeypatch, capsys):
    def full(path, data):
        raise OSError(28, "No space left on device")

    runs = good_runs(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    status, _, err = submission(tmp_path, monkeypatch, capsys, runs, "--out", "out")
    assert status == 1 and err == "error: out cannot be written: No space left on device\n"
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    status, _, err = submission(tmp_path, monkeypatch, capsys, runs, "--out", "file/out")
    assert status == 1 and err == "error: file: File exists\n"


def test_two_seeds_are_too_few(tmp_path, monkeypatch, capsys):
    status, _, err = submission(tmp_path, monkeypatch, capsys, good_runs(tmp_path)[:2])
    assert status == 1 and "the seeds of the runs are 1337, 42; a record needs 3 seeds" in err


@pytest.mark.parametrize(
    "spoil, part",
    [
        (lambda run: (run / "log.txt").write_bytes(SOURCE[:-9] + b"\nrun:x\n"), "it has been changed"),
        (lambda run: (run / "log.txt").unlink(), "log.txt is missing"),
        (lambda run: (run / "audit.json").write_text("{}"), "not an audit's result"),
        (
            lambda run: (run / "audit.json").write_text(
                '{"passed": true, "checks": [{"name": "x", "status": "ok"}]}'
            ),
            "not an audit's result",
        ),
        (
            lambda run: (run / "result.json").write_text(json.dumps(result_of(7, bpb={"float": 1.0}))),
            "share no score",
        ),
    ],
)
def test_what_no_option_mends(tmp_path, monkeypatch, capsys, spoil, part):
    runs = good_runs(tmp_path)
    spoil(runs[2])
    status, _, err = submission(tmp_path, monkeypatch, capsys, runs, "--out", "out", "--non-record")
    assert status == 1 and part in err and not (tmp_path / "out").exists() and len(err.splitlines()) == 1


def test_an_existing_folder_stays(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    status, _, err = submission(tmp_path, monkeypatch, capsys, good_runs(tmp_path), "--out", "out")
    assert status == 1 and "out exists" in err and not list((tmp_path / "out").iterdir())
    status, _, err = submission(
        tmp_path, monkeypatch, capsys, good_runs(tmp_path / "b"), "--date", "25 March"
    )
    assert status == 1 and "YYYY-MM-DD" in err


@pytest.mark.whole
def test_the_folder_runs(tmp_path, monkeypatch, capsys, tiny):
    """The README's command, from inside the folder where it would lie in the challenge's repository."""
    small = {name.lower(): value for name, value in tiny.items() if name not in ("PRESET", "VE_LAYERS")}
    small |= {"ve_layers": [1, 2], "iterations": 3, "warmup_steps": 0, "ttt_enabled": False}
    small["skip_sliding"] = True
    runs = [write_run(tmp_path / f"logs/s{seed}", seed, preset="smoke", changed=small) for seed in SEEDS]
    folder = tmp_path / "records/track/folder"
    status, _, err = submission(tmp_path, monkeypatch, capsys, runs, "--out", folder)
    assert status == 0, err
    data = tmp_path / "data"
    shutil.copytree(tiny["DATA_PATH"], data / "datasets" / Path(tiny["DATA_PATH"]).name)
    (data / "tokenizers").mkdir()
    shutil.copy(tiny["TOKENIZER_PATH"], data / "tokenizers")
    command = re.search(r"requirements.txt\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    command = command.replace("torchrun", f"{sys.executable} -m torch.distributed.run")
    command = command.replace("node=8", "node=1").replace("PRESET", "RUN_ID=again PRESET", 1)
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env["OMP_NUM_THREADS"] = "1"
    options = {"cwd": folder, "env": env, "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run(["bash", "-c", command], **options)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "logs/again/result.json").read_text())
    assert result["steps"] == 3 and result["seed"] == 1337 and result["bpb"]["roundtrip"] > 0
    assert submit.script_of(shared.Run.open(folder / "logs/again")) == SOURCE


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """--pack-source, through the command line: the file, and what was said."""
    path = tmp_path_factory.mktemp("packed") / "below" / "train_gpt.py"
    command = [sys.executable, str(ROOT / "records/submit.py"), "--pack-source", str(path)]
    return path, subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_packed_script_is_small_and_names_the_readable_one(packed):
    path, said = packed
    data = path.read_bytes()
    assert said == f"{path}: {len(data):,} bytes, train_gpt.py has {len(SOURCE):,}\n"
    assert data == submit.packed_source(SOURCE) and len(data) < 0.3 * len(SOURCE)
    assert data.startswith(f"# train_gpt.py of SHA-256 {hashlib.sha256(SOURCE).hexdigest()}, ".encode())
    assert max(map(len, SOURCE.splitlines())) < 200 and len(data.splitlines()) == 3


def test_of_docstrings_the_script_s_own_stays():
    source = b'"""What --help says."""\nclass A:\n    """No."""\ndef f():\n    "no"  # no\n    return "yes"\n'
    code = submit.packed_source(source)
    names = {"__file__": "x"}
    exec(compile(code, "x", "exec"), names)
    assert names["__doc__"] == "What --help says." and names["A"].__doc__ is names["f"].__doc__ is None
    assert names["f"]() == "yes"


@pytest.mark.whole
def test_the_packed_script_makes_the_same_run_and_counts_itself(packed, tmp_path, tiny):
    """Every stage, bit for bit; its log begins with it, so a submission holds it."""

    def result(name, script):
        done = run_script(tmp_path, tiny | {"RUN_ID": name, "ITERATIONS": "8"}, script=script)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "logs" / name / "result.json").read_text())

    with ThreadPoolExecutor() as side_by_side:
        ours, theirs = side_by_side.map(result, ("packed", "readable"), (packed[0], ROOT / "train_gpt.py"))
    assert ours["bpb"] == theirs["bpb"] and ours["params"] == theirs["params"]
    assert ours["artifact"]["code_bytes"] == packed[0].stat().st_size < theirs["artifact"]["code_bytes"] / 3
    assert submit.script_of(shared.Run.open(tmp_path / "logs/packed")) == packed[0].read_bytes()


def test_the_readme_names_both_scripts(packed, tmp_path, monkeypatch, capsys):
    source = packed[0].read_bytes()
    same = {"source": source, "script_sha256": hashlib.sha256(source).hexdigest()}
    runs = [write_run(tmp_path / f"logs/s{seed}", seed, **same) for seed in SEEDS]
    status, _, err = submission(tmp_path, monkeypatch, capsys, runs, "--out", tmp_path / "out")
    assert status == 0, err
    readme = (tmp_path / "out/README.md").read_text()
    hashes = [hashlib.sha256(one).hexdigest() for one in (source, SOURCE)]
    assert "Script SHA-256: `{}`, packed from the readable one of SHA-256 `{}`.".format(*hashes) in readme
    assert (tmp_path / "out/train_gpt.py").read_bytes() == source
    assert "packed from" not in submit.packed_from(SOURCE)
