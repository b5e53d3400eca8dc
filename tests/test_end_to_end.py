"""Whole runs through the command line: what they say and leave, artifacts alone, stages alone, mistakes."""

import contextlib
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, result_of, run_here, run_script, write_shard

import train_gpt as tg

SCORES = ("float", "roundtrip", "sliding", "ttt")


def told(folder, env):
    """A run in this process, without a second import of torch: exit status, standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_here(folder, {"RUN_ID": "run"} | env)
    return code, out.getvalue(), err.getvalue()


def training_losses(folder, name):
    lines = map(json.loads, (folder / "logs" / name / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "train"]


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, tiny):
    """One run through all stages: its folder and the finished process."""
    folder = tmp_path_factory.mktemp("full")
    return folder, run_script(folder, tiny | {"RUN_ID": "run"})


@pytest.fixture(scope="module")
def model(tiny_hp):
    return tg.GPT(tiny_hp)


# ----------------------------------------------------------------------------------------------------------
# One full run
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_a_full_run_ends_well_and_says_its_scores(full_run):
    folder, process = full_run
    assert process.returncode == 0 and process.stderr == "", process.stderr
    result = result_of(folder)
    for name in SCORES:
        (line,) = re.findall(rf"^final_{name} val_loss:(\S+) val_bpb:(\S+)$", process.stdout, re.M)
        known = [result["val_loss"][name], result["bpb"][name]]
        assert [float(value) for value in line] == pytest.approx(known, abs=1e-7)
        assert 1 < result["bpb"][name] < 6
    line = "artifact model:{model_bytes}B code:{code_bytes}B total:{total_bytes}B limit:{limit}B"
    assert line.format(**result["artifact"]) in process.stdout.splitlines()
    log = (folder / "logs/run/log.txt").read_text()
    assert log.startswith((ROOT / "train_gpt.py").read_text())
    assert all(line in log for line in process.stdout.splitlines())
    files = {path.name for path in (folder / "logs/run").iterdir()}
    assert files == {"log.txt", "metrics.jsonl", "result.json", "model.pt", "artifact.bin"}


@pytest.mark.whole
def test_the_log_holds_what_repeats_a_run_and_says_how_fast_it_is(full_run):
    _, process = full_run
    first, second, *_ = process.stdout.splitlines()
    assert first.startswith("run:run preset:smoke stages:train,quantize,evaluate changed:{")
    assert re.match(r"device:1x .+ threads:\d+ python:\S+ torch:\S+ numpy:\S+ sentencepiece:\S+ ", second)
    steps = re.findall(r"^step:(\d+)/24 (train_loss:.*)$", process.stdout, re.M)
    assert [int(step) for step, _ in steps] == [1, 2, 3, 4, 5, 10, 20, 24]
    for _, line in steps:
        told_of = dict(re.findall(r"(\S+):([\d.]+)", line))
        assert {"train_loss", "train_bpb", "lr_scale", "time", "step_avg", "left"} < told_of.keys()
        assert float(told_of["tokens/s"]) > 0 and float(told_of["mfu"]) > 0
    for start in (
        "corpus:",
        "budget clock:training used:",
        "budget clock:evaluation used:",
        "bytes section:",
    ):
        assert f"\n{start}" in process.stdout


@pytest.mark.whole
def test_the_result_has_every_field(full_run, tiny, tiny_hp, model):
    folder, _ = full_run
    result, hp = result_of(folder), tiny_hp
    assert result["preset"] == "smoke" and result["seed"] == hp.seed and result["dtype"] == "float32"
    assert result["steps"] == hp.iterations and result["tokens_seen"] == hp.iterations * hp.train_batch_tokens
    assert result["changed"] == json.loads(json.dumps(tg.changed(hp) | {"run_id": "run"}))
    script = (ROOT / "train_gpt.py").read_bytes()
    assert result["script_sha256"] == hashlib.sha256(script).hexdigest()
    assert result["params"] == sum(p.numel() for p in model.parameters())
    assert result["train_seconds"] > 0 and result["corpus"] == Path(tiny["DATA_PATH"]).name
    assert result["step_ms"] == pytest.approx(1000 * result["train_seconds"] / hp.iterations, rel=0.01)
    val = np.fromfile(Path(tiny["DATA_PATH"]) / "fineweb_val_000000.bin", "<u2")[512:]
    assert result["val_tokens"] == (len(val) - 1) // hp.eval_seq_len * hp.eval_seq_len
    assert 1 < result["val_bytes"] / result["val_tokens"] < 4
    assert set(result["bpb"]) == set(SCORES)
    sizes, blob = result["artifact"], (folder / "logs/run/artifact.bin").read_bytes()
    assert sizes["model_bytes"] == len(blob) and sizes["code_bytes"] == len(script)
    assert sizes["total_bytes"] == len(blob) + len(script) < sizes["limit"] == 16_000_000
    assert "zstd" in sizes["codec"] and sum(each["bytes"] for each in sizes["sections"].values()) <= len(blob)
    assert sizes["sha256"] == result["scored_artifact_sha256"] == hashlib.sha256(blob).hexdigest()
    for clock, phases in (("training", {"train", "calibrate"}), ("evaluation", {"load", "roundtrip", "ttt"})):
        budget = result["budget"][clock]
        assert phases <= set(budget["counted"]) and budget["within"]
        assert budget["used"] == pytest.approx(sum(budget["counted"].values()))


@pytest.mark.whole
def test_every_stage_proves_its_techniques(full_run, tiny_hp, model):
    folder, process = full_run
    proofs, result = result_of(folder)["proofs"], result_of(folder)
    qat = proofs["qat"]
    assert tiny_hp.iterations / 2 < qat["first_step"] < tiny_hp.iterations
    assert qat["distance_raw"] < qat["distance_before"] - 0.02 and qat["loss"] != qat["loss_rounded"]
    assert proofs["averaging"]["exported"] == "ema" and proofs["averaging"]["distance_from_raw"] > 0.01
    roles = list(model.roles().values())
    for role in ("attn", "mlp"):
        solved = proofs["quantizer"][role]
        assert 0 < solved["error"] < 0.7 * solved["error_rounding"] and solved["floored_rows"] == 0
        assert solved["matrices"] == roles.count(role)
    ttt, chunks = proofs["ttt"], -(-result["val_tokens"] // tiny_hp.ttt_chunk_tokens)
    per_chunk = -(-(tiny_hp.ttt_chunk_tokens // tiny_hp.eval_seq_len) // tiny_hp.ttt_batch_seqs)
    assert ttt["chunks"] == chunks > 2 and ttt["steps"] == (chunks - 1) * per_chunk * tiny_hp.ttt_epochs
    assert ttt["weight_change"] > 0 and ttt["untrained_from_chunk"] is None
    for name in ("qat", "averaging", "gptq", "ttt"):
        assert f"proof technique:{name} " in process.stdout


@pytest.mark.whole
def test_scores_are_in_the_order_of_the_techniques(full_run):
    bpb = result_of(full_run[0])["bpb"]
    assert abs(bpb["roundtrip"] - bpb["float"]) < 0.01
    assert bpb["sliding"] != bpb["roundtrip"]
    assert bpb["ttt"] < bpb["sliding"] - 0.02


@pytest.mark.whole
def test_the_artifact_is_the_model_that_was_scored(full_run, tiny_hp, model):
    """The weights of the file are near those of model.pt, on their grids, and give the roundtrip score."""
    folder, hp = full_run[0], tiny_hp
    config, tensors = tg.unpack((folder / "logs/run/artifact.bin").read_bytes())
    weights = torch.load(folder / "logs/run/model.pt", weights_only=True)
    assert tensors.keys() == weights.keys() and config["model"]["model_dim"] == 64
    assert config["facts"]["preset"] == "smoke" and config["facts"]["steps"] == hp.iterations
    whole = {
        name: t.dequantize() if isinstance(t, tg.QuantizedTensor) else t.float()
        for name, t in tensors.items()
    }
    for name, weight in weights.items():
        assert (whole[name] - weight).norm() < 0.2 * weight.norm() + 1e-6, name
    again, tokens = tg.GPT(hp), tg.Validation.load(hp, tg.World(hp, {})).tokens.long()
    again.load_state_dict(whole)
    with torch.no_grad():
        loss = again(tokens[:-1].view(-1, hp.eval_seq_len), tokens[1:].view(-1, hp.eval_seq_len))
    assert result_of(folder)["val_loss"]["roundtrip"] == pytest.approx(float(loss), rel=1e-6)
    grids = {name: t.max_code for name, t in tensors.items() if isinstance(t, tg.QuantizedTensor)}
    assert grids == model.max_codes("matrix") | model.max_codes("embed")
    assert all(tensors[name].codes.abs().max() <= top for name, top in grids.items())


# ----------------------------------------------------------------------------------------------------------
# An artifact alone, stages alone
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_an_artifact_alone_gives_the_same_score(full_run, tiny, tmp_path):
    """With nothing else from the run; to the last digit."""
    shutil.copy(full_run[0] / "logs/run/artifact.bin", tmp_path / "sent.bin")
    code, out, errors = told(tmp_path, tiny | {"ARTIFACT": "sent.bin", "STAGES": "evaluate"})
    assert code == 0, errors
    assert result_of(tmp_path)["bpb"] == result_of(full_run[0])["bpb"] | {"float": None}
    for name in SCORES[1:]:
        assert re.search(rf"^final_{name} .*$", full_run[1].stdout, re.M)[0] in out


@pytest.mark.whole
def test_stages_one_at_a_time_equal_all_at_once(full_run, tiny, tmp_path):
    whole = result_of(full_run[0])
    for stage in tg.STAGES:
        code, _, errors = told(tmp_path, tiny | {"STAGES": stage})
        assert code == 0, errors
    result = result_of(tmp_path)
    for key in ("bpb", "val_loss", "params", "steps", "val_tokens", "val_bytes", "scored_artifact_sha256"):
        assert result[key] == whole[key], key
    for technique in ("qat", "averaging", "quantizer"):
        assert result["proofs"][technique] == whole["proofs"][technique]
    both = [folder / "logs/run/artifact.bin" for folder in (tmp_path, full_run[0])]
    assert both[0].read_bytes() == both[1].read_bytes()
    for clock, budget in whole["budget"].items():
        assert result["budget"][clock]["counted"].keys() == budget["counted"].keys()


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_the_compiled_run_equals_the_eager_one(tiny, tmp_path):
    """Few shapes, so that the compiler has little to do; scores from compiled windows."""
    small = tiny | {
        "NUM_LAYERS": "2", "NUM_KV_HEADS": "4", "MLP_MULT": "1", "BIGRAM_DIM": "64", "VE_DIM": "64",
        "VE_LAYERS": "1", "XSA_LAST_N": "1", "EVAL_STRIDE": "128", "SKIP_SLIDING": "1", "WARMUP_STEPS": "1",
    }  # fmt: skip
    for compiled in "01":
        process = run_script(tmp_path, small | {"COMPILE": compiled, "RUN_ID": f"run{compiled}"}, timeout=600)
        assert process.returncode == 0, process.stderr
    eager, fast = result_of(tmp_path, "run0"), result_of(tmp_path, "run1")
    assert fast["compiled"] and not eager["compiled"]
    losses = training_losses(tmp_path, "run0")
    assert training_losses(tmp_path, "run1")[:20] == pytest.approx(losses[:20], rel=1e-3)
    assert fast["bpb"]["ttt"] == pytest.approx(eager["bpb"]["ttt"], abs=0.01)
    mine, theirs = fast["proofs"]["qat"], eager["proofs"]["qat"]
    assert mine["first_step"] == theirs["first_step"]
    assert mine["distance_raw"] == pytest.approx(theirs["distance_raw"], abs=0.01)
    assert mine["distance_raw"] < mine["distance_before"] - 0.02
    assert "recompile_limit" not in process.stderr


# ----------------------------------------------------------------------------------------------------------
# The program from outside
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_importing_does_nothing(tmp_path):
    """In an empty folder with an empty environment: no output, no file, no device, no process group."""
    code = (
        f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(ROOT)!r}); "
        "import train_gpt, torch; "
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.whole
def test_a_mistake_at_the_command_line(tiny, tmp_path):
    process = run_script(tmp_path, tiny | {"MATRX_LR": "0.01", "NUM_LAYERS": "x"})
    assert process.returncode == 1 and process.stdout == "" and not list(tmp_path.iterdir())
    assert process.stderr.startswith("error: ") and "Traceback" not in process.stderr
    assert "MATRX_LR" in process.stderr and "NUM_LAYERS" in process.stderr  # all mistakes at once


def arguments(capsys, *given):
    """Exit status, output and errors of the script with arguments."""
    with mock.patch.object(sys, "argv", ["train_gpt.py", *given]):
        code = tg.main()
    return code, *capsys.readouterr()


def test_help_lists_every_setting(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, errors = arguments(capsys, "--help")
    assert code == 0 and errors == "" and not list(tmp_path.iterdir())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[:1] == "|"]
    table = {row[0]: dict(zip(rows[0], row)) for row in rows}
    for name, field in tg.Hyperparameters.fields().items():
        meaning = field.metadata["meaning"]
        assert meaning and meaning in table[name.upper()]["meaning"]
    assert [table["NUM_LAYERS"][preset] for preset in ("smoke", "pr606", "pr601")] == ["3", "11", "11"]
    assert table["ITERATIONS"]["pr601"] == "9500" and table["MATRIX_LR"]["pr606"] == "0.025"
    assert "torchrun --standalone" in out
    code, out, errors = arguments(capsys, "PRESET=smoke")
    assert code == 1 and out == "" and "environment variables" in errors


def check_error(errors, *parts):
    """One line that a person can use, or two."""
    assert errors.startswith("error: ") and "Traceback" not in errors, errors
    assert 1 <= len(errors.splitlines()) <= 2, errors
    for part in parts:
        assert part in errors


def replace(name, data):
    """A mistake: a shard that holds other bytes, or tokens."""

    def damage(folder):
        path = folder / "data" / f"fineweb_{name}.bin"
        path.write_bytes(data(path.read_bytes())) if callable(data) else write_shard(path, data)

    return damage


def remove_training_shards(folder):
    for path in (folder / "data").glob("fineweb_train_*"):
        path.unlink()


def write_text(folder):
    (folder / "bad.model").write_text("hello")


SHARD, VAL = "train_000001", "val_000000"
# What is wrong: settings, what is done to a copy of the data, and what the message must hold.
MISTAKES = {
    "misspelt": ({"MATRX_LR": "0.01"}, None, ("MATRX_LR", "MATRIX_LR")),
    "bad value": ({"NUM_LAYERS": "many"}, None, ("NUM_LAYERS", "many")),
    "no data": ({"DATA_PATH": "nowhere"}, None, ("nowhere", "DATA_PATH")),
    "no training data": ({}, remove_training_shards, ("train", "data/prepare.py")),
    "short shard": ({}, replace(SHARD, lambda data: data[:-100]), (SHARD, "fetch it again")),
    "empty shard": ({}, replace(SHARD, lambda _: b""), (SHARD, "not a token shard")),
    "damaged validation": ({}, replace(VAL, lambda _: b"\0" * 4096), (VAL, "not a token shard")),
    "foreign ids": ({}, replace(SHARD, [5, 6, 40000] * 500), ("40000", "VOCAB_SIZE")),
    "short validation": ({}, replace(VAL, [1, 5, 6] * 20), ("60 tokens", "EVAL_SEQ_LEN")),
    "no tokenizer": ({"TOKENIZER_PATH": "none.model"}, None, ("none.model", "TOKENIZER_PATH")),
    "not a tokenizer": ({"TOKENIZER_PATH": "bad.model"}, write_text, ("bad.model", "SentencePiece")),
    "wrong tokenizer size": ({"VOCAB_SIZE": "1024"}, None, ("512", "VOCAB_SIZE=1024")),
    "missing artifact": ({"ARTIFACT": "gone.bin", "STAGES": "evaluate"}, None, ("gone.bin",)),
    "no model": ({"STAGES": "quantize", "RUN_ID": "never"}, None, ("model.pt", "train under another RUN_ID")),
    "no run": ({"RESUME": "1", "RUN_ID": "never"}, None, ("never", "RUN_ID")),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_line_and_writes_nothing(tiny, tmp_path, name):
    """Found before the run's folder is made."""
    changes, damage, parts = MISTAKES[name]
    if damage:
        shutil.copytree(tiny["DATA_PATH"], tmp_path / "data")
        damage(tmp_path)
        changes = {"DATA_PATH": "data"} | changes
    before = sorted(tmp_path.rglob("*"))
    code, out, errors = told(tmp_path, tiny | changes)
    check_error(errors, *parts)
    assert code == 1 and out == "" and sorted(tmp_path.rglob("*")) == before


@pytest.mark.whole
def test_an_existing_run_is_not_overwritten(full_run, tiny):
    folder, _ = full_run
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _, errors = told(folder, tiny)
    check_error(errors, "logs/run", "RUN_ID")
    assert "RESUME" not in errors  # there is nothing to resume
    assert code == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.whole
def test_an_artifact_over_the_limit_is_not_called_valid(full_run, tiny, tmp_path):
    """Nothing fits: the run ends with an error and keeps the model; a wider limit then finishes it."""
    run = tmp_path / "logs/run"
    run.mkdir(parents=True)
    for name in ("log.txt", "metrics.jsonl", "model.pt"):
        shutil.copy(full_run[0] / "logs/run" / name, run)
    known = result_of(full_run[0])
    full = known.pop("artifact")["model_bytes"]
    (run / "result.json").write_text(json.dumps(known))
    code_bytes, env = (ROOT / "train_gpt.py").stat().st_size, tiny | {"STAGES": "quantize"}
    code, out, errors = told(tmp_path, env | {"ARTIFACT_LIMIT": str(code_bytes + 20_000)})
    check_error(errors, "no step", "MODEL_DIM")
    assert code == 1 and not re.search("^artifact model:", out, re.M)
    assert (run / "model.pt").is_file() and not (run / "artifact.bin").exists()
    code, out, errors = told(tmp_path, env | {"ARTIFACT_LIMIT": str(code_bytes + full * 9 // 10)})
    assert code == 0, errors
    assert full * 8 // 10 < (run / "artifact.bin").stat().st_size <= full * 9 // 10
    assert result_of(tmp_path)["proofs"]["quantizer"]["multiplier"] > 1  # coarser steps brought it under


@pytest.mark.whole
@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "empty"])
def test_a_damaged_artifact_is_refused(full_run, tiny, tmp_path, damage):
    blob = (full_run[0] / "logs/run/artifact.bin").read_bytes()
    flipped = bytearray(blob)
    flipped[len(blob) // 2] ^= 4
    bad = {"flipped": flipped, "truncated": blob[:-500], "longer": blob + b"\0", "empty": b""}[damage]
    (tmp_path / "bad.bin").write_bytes(bad)
    code, out, errors = told(tmp_path, tiny | {"ARTIFACT": "bad.bin", "STAGES": "evaluate"})
    check_error(errors, "artifact")
    assert code == 1 and out == "" and [path.name for path in tmp_path.iterdir()] == ["bad.bin"]


@pytest.mark.parametrize("weights, kind", [(b"hello", "KeyError"), ({"x": torch.zeros(1)}, "RuntimeError")])
def test_a_model_that_does_not_load_is_told_of(tiny, tmp_path, weights, kind):
    (run := tmp_path / "logs/run").mkdir(parents=True)
    (run / "result.json").write_text('{"budget": {}}')
    torch.save(weights, run / "model.pt")
    if isinstance(weights, bytes):
        (run / "model.pt").write_bytes(weights)
    code, _, errors = told(tmp_path, tiny | {"STAGES": "quantize"})
    check_error(errors, "model.pt", kind, "train again")
    assert code == 1
