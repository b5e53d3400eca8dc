"""Whole runs through the command line: techniques proved, artifacts alone, ranks, the compiler, mistakes."""

import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, write_shard

import train_gpt as tg

SCORES = ("float", "roundtrip", "sliding", "ttt")


def read(folder, name="run"):
    return json.loads((folder / "logs" / name / "result.json").read_text())


def training_losses(folder, name="run"):
    lines = [json.loads(line) for line in (folder / "logs" / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "train"]


def run_here(folder, env):
    """The script as a program, in this process: no second import of torch. Exit status, stdout, stderr."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    os.chdir(folder)
    try:
        with (
            mock.patch.dict(os.environ, kept | env, clear=True),
            mock.patch.object(sys, "argv", ["train_gpt.py"]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as stop,
        ):
            runpy.run_path(str(ROOT / "train_gpt.py"), run_name="__main__")
    finally:
        os.chdir(before)
    return stop.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, tiny):
    """One run through all stages: its folder and the finished process."""
    folder = tmp_path_factory.mktemp("full")
    return folder, run_script(folder, tiny | {"RUN_ID": "run"})


@pytest.fixture(scope="module")
def artifact(full_run):
    return full_run[0] / "logs/run/artifact.bin"


# ----------------------------------------------------------------------------------------------------------
# One full run
# ----------------------------------------------------------------------------------------------------------


def test_a_full_run_ends_well_and_says_its_scores(full_run):
    folder, process = full_run
    assert process.returncode == 0 and process.stderr == "", process.stderr
    result = read(folder)
    for name in SCORES:
        (line,) = re.findall(rf"^final_{name} val_loss:(\S+) val_bpb:(\S+)$", process.stdout, re.M)
        assert float(line[1]) == pytest.approx(result["bpb"][name], abs=1e-7)
        assert 1 < result["bpb"][name] < 6
    sizes = result["artifact"]
    line = "artifact model:{model_bytes}B code:{code_bytes}B total:{total_bytes}B limit:{limit}B"
    assert line.format(**sizes) in process.stdout.splitlines()
    log = (folder / "logs/run/log.txt").read_text()
    assert log.startswith((ROOT / "train_gpt.py").read_text().split("\n")[0])
    assert all(line in log for line in process.stdout.splitlines())
    assert {path.name for path in (folder / "logs/run").iterdir()} >= {
        "log.txt", "metrics.jsonl", "result.json", "model.pt", "artifact.bin",
    }  # fmt: skip
    assert not list((folder / "logs/run").glob("*.tmp"))


def test_the_result_has_every_field(full_run, tiny):
    folder, _ = full_run
    result = read(folder)
    assert result["preset"] == "smoke" and result["steps"] == 24 and result["tokens_seen"] == 24 * 1024
    assert result["changed"]["model_dim"] == 64 and result["changed"]["iterations"] == 24
    script = (ROOT / "train_gpt.py").read_bytes()
    assert result["script_sha256"] == hashlib.sha256(script).hexdigest()
    hp = tg.Hyperparameters.from_env(tiny)
    assert result["params"] == sum(p.numel() for p in tg.GPT(hp).parameters())
    assert result["train_seconds"] > 0 and result["step_ms"] > 0 and result["corpus"]
    assert result["step_ms"] == pytest.approx(1000 * result["train_seconds"] / 24, rel=0.01)
    val = np.fromfile(Path(tiny["DATA_PATH"]) / "fineweb_val_000000.bin", "<u2")[512:]
    assert result["val_tokens"] == (len(val) - 1) // 128 * 128
    assert 1 < result["val_bytes"] / result["val_tokens"] < 4
    assert set(result["bpb"]) == set(SCORES)
    sizes, blob = result["artifact"], (folder / "logs/run/artifact.bin").read_bytes()
    assert sizes["model_bytes"] == len(blob) and sizes["code_bytes"] == len(script)
    assert (
        sizes["total_bytes"] == len(blob) + len(script) < sizes["limit"] == 16_000_000
        and "zstd" in sizes["codec"]
    )
    for clock, phases in (("training", {"train", "calibrate"}), ("evaluation", {"load", "roundtrip", "ttt"})):
        budget = result["budget"][clock]
        assert phases <= set(budget["counted"]) and budget["within"]
        assert budget["used"] == pytest.approx(sum(budget["counted"].values()))


def test_every_technique_proves_itself(full_run):
    folder, process = full_run
    proofs = read(folder)["proofs"]
    expected = {"value_residual", "gated_attention", "smear_gate", "bigram_hash", "value_embedding"}
    expected |= {"unet_skips", "xsa"}
    assert set(proofs["techniques"]) == expected
    for name, proof in proofs["techniques"].items():
        assert proof["loss"] != proof["loss_without"], name
    qat = proofs["qat"]
    assert qat["first_step"] == 18 and abs(qat["distance_before"] - 0.25) < 0.01
    assert qat["distance_raw"] < qat["distance_before"] - 0.02 and qat["loss"] != qat["loss_rounded"]
    assert proofs["averaging"]["exported"] == "ema" and proofs["averaging"]["distance_from_raw"] > 0.01
    for role in ("attn", "mlp"):
        solved = proofs["quantizer"][role]
        assert 0 < solved["error"] < 0.7 * solved["error_rounding"] and solved["floored_rows"] == 0
    assert proofs["quantizer"]["attn"]["matrices"] == 12 and proofs["quantizer"]["mlp"]["matrices"] == 6
    ttt = proofs["ttt"]
    assert ttt["chunks"] == 6 and ttt["steps"] == 20 and ttt["weight_change"] > 0
    assert ttt["untrained_from_chunk"] is None
    for name in [*expected, "qat", "averaging", "gptq", "ttt"]:
        assert f"proof technique:{name} " in process.stdout


def test_scores_are_in_the_order_of_the_techniques(full_run):
    bpb = read(full_run[0])["bpb"]
    assert abs(bpb["roundtrip"] - bpb["float"]) < 0.01
    assert bpb["sliding"] != bpb["roundtrip"]
    assert bpb["ttt"] < bpb["sliding"] - 0.02


def test_the_artifact_is_the_model_that_was_scored(full_run, tiny):
    """The file's weights are near those of model.pt, on a grid of at most 31 codes, pruned."""
    folder, _ = full_run
    config, tensors = tg.unpack((folder / "logs/run/artifact.bin").read_bytes())
    weights = torch.load(folder / "logs/run/model.pt", weights_only=True)
    assert tensors.keys() == weights.keys() and config["model"]["model_dim"] == 64
    for name, tensor in tensors.items():
        whole = tensor.dequantize() if isinstance(tensor, tg.QuantizedTensor) else tensor.float()
        error = float((whole - weights[name]).norm())
        assert error < 0.2 * float(weights[name].norm()) + 1e-6, name
        if name.startswith("blocks.") and isinstance(tensor, tg.QuantizedTensor):
            assert tensor.max_code == 15 and tensor.codes.abs().max() <= 15
    assert sum(isinstance(tensor, tg.QuantizedTensor) for tensor in tensors.values()) == 18 + 3


# ----------------------------------------------------------------------------------------------------------
# An artifact alone, stages alone
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny, artifact):
    """The artifact alone, scored by 1, 2 and 3 processes, each in a folder of its own: processes, results."""
    runs = {}
    for processes in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"scored{processes}")
        shutil.copy(artifact, folder / "sent.bin")
        env = tiny | {"ARTIFACT": "sent.bin", "STAGES": "evaluate", "RUN_ID": "run"}
        process = run_script(folder, env, processes)
        assert process.returncode == 0, process.stderr
        runs[processes] = process, read(folder)
    return runs


def test_an_artifact_alone_gives_the_same_score(full_run, scored):
    process, result = scored[1]
    _, full = full_run
    for name in ("roundtrip", "sliding", "ttt"):
        assert result["bpb"][name] == read(full_run[0])["bpb"][name]  # to the last digit
        line = re.search(rf"^final_{name} .*$", full.stdout, re.M)[0]
        assert line in process.stdout
    assert result["bpb"]["float"] is None


@pytest.mark.parametrize("processes", [2, 3])
def test_the_score_does_not_depend_on_the_number_of_processes(scored, processes):
    one, many = scored[1][1]["bpb"], scored[processes][1]["bpb"]
    assert many["roundtrip"] == pytest.approx(one["roundtrip"], abs=1e-6)
    assert many["sliding"] == pytest.approx(one["sliding"], abs=1e-6)
    assert many["ttt"] == pytest.approx(one["ttt"], abs=1e-4)
    assert scored[processes][1]["proofs"]["ttt"]["steps"] == scored[1][1]["proofs"]["ttt"]["steps"]
    stdout = scored[processes][0].stdout
    assert stdout.count("final_ttt") == 1  # one rank speaks
    assert re.search(rf"device:{processes}x", stdout)


def test_stages_one_at_a_time_equal_all_at_once(full_run, tiny, tmp_path):
    whole = read(full_run[0])
    for stage in ("train", "quantize", "evaluate"):
        code, _, errors = run_here(tmp_path, tiny | {"RUN_ID": "run", "STAGES": stage})
        assert code == 0, errors
    result = read(tmp_path)
    assert result["bpb"] == whole["bpb"]
    assert result["proofs"]["qat"] == whole["proofs"]["qat"]
    assert result["artifact"]["sha256"] == whole["artifact"]["sha256"]
    assert (tmp_path / "logs/run/artifact.bin").read_bytes() == (
        full_run[0] / "logs/run/artifact.bin"
    ).read_bytes()
    assert set(result["budget"]) == {"training", "evaluation"}
    assert {"train", "calibrate"} <= set(result["budget"]["training"]["counted"])


def test_two_processes_train_like_one(tiny, tmp_path):
    """Two ranks are two micro-steps: the same partial sums in the same order, so the same numbers, with QAT.

    Against one micro-step the sums are rounded differently, which orthogonalising in bf16 makes larger.
    """
    calm = tiny | {"MATRIX_LR": "0.008", "SCALAR_LR": "0.008", "TIED_EMBED_LR": "0.01"}
    calm |= {"RUN_ID": "run", "STAGES": "train"}
    runs = {}
    for name, processes, changes in (
        ("two", 2, {}),
        ("halves", 1, {"GRAD_ACCUM_STEPS": "2"}),
        ("one", 1, {}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        if processes == 1:
            code, _, errors = run_here(folder, calm | changes)
        else:
            process = run_script(folder, calm | changes, processes)
            code, errors = process.returncode, process.stderr
        assert code == 0, errors
        runs[name] = training_losses(folder)
    assert len(runs["two"]) == 24 and len({round(loss, 2) for loss in runs["two"]}) > 10
    assert runs["two"] == pytest.approx(runs["halves"], rel=2e-5)
    assert runs["two"][:20] == pytest.approx(runs["one"][:20], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(tg.cpp_compiler() is None, reason="no C++ compiler")
def test_the_compiled_run_equals_the_eager_one(tiny, tmp_path):
    """Few shapes, so that the compiler has little to do; scores from compiled windows."""
    small = tiny | {
        "NUM_LAYERS": "2", "NUM_KV_HEADS": "4", "MLP_MULT": "1", "BIGRAM_DIM": "64", "VE_DIM": "64",
        "VE_LAYERS": "1", "XSA_LAST_N": "1", "EVAL_STRIDE": "128", "SKIP_SLIDING": "1",
        "VAL_BATCH_SIZE": "2048", "WARMUP_STEPS": "1",
    }  # fmt: skip
    for compiled in "01":
        process = run_script(tmp_path, small | {"COMPILE": compiled, "RUN_ID": f"run{compiled}"}, timeout=600)
        assert process.returncode == 0, process.stderr
    eager, fast = read(tmp_path, "run0"), read(tmp_path, "run1")
    assert fast["compiled"] and not eager["compiled"]
    assert training_losses(tmp_path, "run1")[:20] == pytest.approx(
        training_losses(tmp_path, "run0")[:20], rel=1e-3
    )
    assert fast["bpb"]["ttt"] == pytest.approx(eager["bpb"]["ttt"], abs=0.01)
    qat = fast["proofs"]["qat"]
    assert qat["first_step"] == eager["proofs"]["qat"]["first_step"]
    assert qat["distance_raw"] == pytest.approx(eager["proofs"]["qat"]["distance_raw"], abs=0.01)
    assert qat["distance_raw"] < qat["distance_before"] - 0.02
    assert "recompile_limit" not in process.stderr


def test_compile_auto_runs_eagerly_without_a_compiler(tiny, tmp_path):
    env = tiny | {
        "RUN_ID": "run",
        "STAGES": "train",
        "ITERATIONS": "1000000",
        "PATH": str(tmp_path),
        "CXX": "",
    }
    env |= {"MAX_WALLCLOCK_SECONDS": "1", "TRAIN_LOG_EVERY": "1000"}
    code, out, errors = run_here(tmp_path, env)
    assert code == 0, errors
    assert len(re.findall(r"^compile:off .*C\+\+ compiler.*$", out, re.M)) == 1
    assert not read(tmp_path)["compiled"]


# ----------------------------------------------------------------------------------------------------------
# The program from outside
# ----------------------------------------------------------------------------------------------------------


def test_importing_does_nothing(tmp_path):
    """In an empty folder with an empty environment: no output, no file, no device, no process group."""
    code = (
        f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(ROOT)!r}); "
        "import train_gpt, torch; "
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_help_lists_every_setting(tmp_path):
    command = [sys.executable, str(ROOT / "train_gpt.py"), "--help"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == ""
    lines = [line for line in process.stdout.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    table = {row[0]: row for row in rows}
    header = rows[0]
    presets = {name: header.index(name) for name in ("smoke", "pr606", "pr601")}
    settings = [name for name in tg.Hyperparameters.__dataclass_fields__ if name not in ("ignored", "preset")]
    assert {name.upper() for name in settings} <= set(table)
    assert all(len(table[name.upper()][-1]) > 10 for name in settings)  # a meaning
    assert [table["NUM_LAYERS"][presets[name]] for name in ("smoke", "pr606", "pr601")] == ["3", "11", "11"]
    assert table["ITERATIONS"][presets["pr601"]] == "9500" and table["MATRIX_LR"][presets["pr606"]] == "0.025"
    assert not list(tmp_path.iterdir())


def wrong(name, tiny, folder):
    """Settings with one mistake in them, and what the message must hold."""
    data = Path(folder / "data")
    shutil.copytree(tiny["DATA_PATH"], data)
    own = tiny | {"DATA_PATH": str(data)}
    shard = data / "fineweb_train_000001.bin"
    if name == "misspelt":
        return tiny | {"MATRX_LR": "0.01"}, ("MATRX_LR", "MATRIX_LR")
    if name == "bad value":
        return tiny | {"NUM_LAYERS": "many"}, ("NUM_LAYERS", "many")
    if name == "no data":
        return tiny | {"DATA_PATH": str(folder / "nowhere")}, ("nowhere", "DATA_PATH")
    if name == "no training data":
        for path in data.glob("fineweb_train_*"):
            path.unlink()
        return own, ("train", "data/prepare.py")
    if name == "short shard":
        shard.write_bytes(shard.read_bytes()[:-100])
        return own, (shard.name, "fetch it again")
    if name == "empty shard":
        shard.write_bytes(b"")
        return own, (shard.name, "not a token shard")
    if name == "damaged validation":
        path = data / "fineweb_val_000000.bin"
        path.write_bytes(b"\0" * 4096)
        return own, (path.name, "not a token shard")
    if name == "foreign ids":
        write_shard(shard, [5, 6, 40000] * 500)
        return own, ("40000", "VOCAB_SIZE")
    if name == "no tokenizer":
        return tiny | {"TOKENIZER_PATH": str(folder / "none.model")}, ("none.model", "TOKENIZER_PATH")
    if name == "not a tokenizer":
        (folder / "bad.model").write_bytes(b"hello")
        return tiny | {"TOKENIZER_PATH": str(folder / "bad.model")}, ("bad.model", "SentencePiece")
    if name == "wrong tokenizer size":
        return tiny | {"VOCAB_SIZE": "1024"}, ("512", "VOCAB_SIZE=1024")
    if name == "short validation":
        write_shard(data / "fineweb_val_000000.bin", [1, 5, 6] * 20)
        return own, ("60 tokens", "EVAL_SEQ_LEN")
    if name == "missing artifact":
        return tiny | {"ARTIFACT": "gone.bin", "STAGES": "evaluate"}, ("gone.bin",)
    if name == "no model":
        return tiny | {"STAGES": "quantize", "RUN_ID": "never"}, ("model.pt", "STAGES=train")
    if name == "no run":
        return tiny | {"RESUME": "1", "RUN_ID": "never"}, ("never", "RUN_ID")
    raise KeyError(name)


MISTAKES = (
    "misspelt", "bad value", "no data", "no training data", "short shard", "empty shard",
    "damaged validation", "foreign ids", "no tokenizer", "not a tokenizer", "wrong tokenizer size",
    "short validation", "missing artifact", "no model", "no run",
)  # fmt: skip


def check_error(errors, *parts):
    assert errors.startswith("error: ") and "Traceback" not in errors, errors
    assert 1 <= len(errors.splitlines()) <= 2, errors
    for part in parts:
        assert part in errors


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_line_and_writes_nothing(tiny, tmp_path, name):
    """Found before the run's folder is made, or at least before anything of value is in it."""
    env, parts = wrong(name, tiny, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, errors = run_here(tmp_path, {"RUN_ID": "run"} | env)
    check_error(errors, *parts)
    assert code == 1 and "step:1/" not in out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mistake_at_the_command_line(tiny, tmp_path):
    process = run_script(tmp_path, tiny | {"MATRX_LR": "0.01", "NUM_LAYERS": "x"})
    assert process.returncode == 1 and process.stdout == "" and not list(tmp_path.iterdir())
    assert process.stderr.startswith("error: ") and "Traceback" not in process.stderr
    assert "MATRX_LR" in process.stderr and "NUM_LAYERS" in process.stderr  # all mistakes at once


def test_an_existing_run_is_not_overwritten(full_run, tiny):
    folder, _ = full_run
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _, errors = run_here(folder, tiny | {"RUN_ID": "run"})
    check_error(errors, "logs/run", "RUN_ID", "RESUME=1")
    assert code == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_artifact_over_the_limit_is_not_called_valid(full_run, tiny, tmp_path):
    """Nothing fits: the run ends with an error and keeps the model; a wider limit then finishes it."""
    run = tmp_path / "logs/run"
    run.mkdir(parents=True)
    for name in ("log.txt", "metrics.jsonl", "result.json", "model.pt"):
        shutil.copy(full_run[0] / "logs/run" / name, run)
    result = read(tmp_path)
    result.pop("artifact")
    (run / "result.json").write_text(json.dumps(result))
    code_bytes = (ROOT / "train_gpt.py").stat().st_size
    env = tiny | {"RUN_ID": "run", "STAGES": "quantize"}
    code, out, errors = run_here(tmp_path, env | {"ARTIFACT_LIMIT": str(code_bytes + 20_000)})
    check_error(errors, "ARTIFACT_LIMIT", "model.pt")
    assert code == 1 and not re.search("^artifact model:", out, re.M)
    assert (run / "model.pt").is_file() and not (run / "artifact.bin").exists()
    full = read(full_run[0])["artifact"]["model_bytes"]
    code, out, errors = run_here(tmp_path, env | {"ARTIFACT_LIMIT": str(code_bytes + full * 9 // 10)})
    assert code == 0, errors
    assert (run / "artifact.bin").stat().st_size <= full * 9 // 10  # the ladder brought it under
    assert read(tmp_path)["proofs"]["quantizer"]["multiplier"] > 1


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "empty"])
def test_a_damaged_artifact_is_refused(artifact, tiny, tmp_path, damage):
    blob = bytearray(artifact.read_bytes())
    if damage == "flipped":
        blob[len(blob) // 2] ^= 4
    blob = {"truncated": blob[:-500], "longer": blob + b"\0", "empty": b""}.get(damage, blob)
    (tmp_path / "bad.bin").write_bytes(blob)
    code, out, errors = run_here(
        tmp_path, tiny | {"ARTIFACT": "bad.bin", "STAGES": "evaluate", "RUN_ID": "run"}
    )
    check_error(errors, "artifact")
    assert code == 1 and "final_" not in out


def test_a_failing_rank_ends_all_of_them(tiny, tmp_path):
    """Under torchrun a mistake in the settings is told once."""
    process = run_script(tmp_path, tiny | {"MATRX_LR": "0.01"}, processes=2, timeout=60)
    assert process.returncode == 1
    assert process.stderr.count("error: MATRX_LR") == 1 and not list(tmp_path.iterdir())
