"""The training loop: warm-up, flat parameters, averages, checkpoints, the clock, and its proofs."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, write_shard

import train_gpt as tg

QUIET = {"STAGES": "train", "RUN_ID": "run", "DEVICE": "cpu", "COMPILE": "0"}


def start(folder, env):
    """The script's main in this process, in a folder of its own; its exit status."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    before = os.getcwd()
    os.chdir(folder)
    try:
        with (
            mock.patch.dict(os.environ, kept | QUIET | env, clear=True),
            mock.patch.object(sys, "argv", ["train_gpt.py"]),
        ):
            return tg.main()
    finally:
        os.chdir(before)


def metrics(folder, event="train"):
    """The last line of each step."""
    lines = [json.loads(line) for line in (folder / "logs/run/metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["event"] == event}


def losses(folder):
    return {step: line["loss"] for step, line in metrics(folder).items()}


def exported(folder):
    return torch.load(folder / "logs/run/model.pt", weights_only=True)


def result(folder):
    return json.loads((folder / "logs/run/result.json").read_text())


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def random_model(hp, seed=0):
    """Every parameter random, so that nothing is hidden by a zero."""
    torch.manual_seed(seed)
    model = tg.GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture
def hp(tiny):
    return tg.Hyperparameters.from_env(tiny | {"DEVICE": "cpu"})


@pytest.fixture
def stepper(hp):
    return stepper_of(hp)


def stepper_of(hp):
    stream = tg.TokenStream(tg.read_split(hp.data_path, "train"))
    return tg.Stepper(hp, random_model(hp), stream, tg.World(hp, {}), compiling=False)


def watch_steps(monkeypatch, before=None, after=None):
    """Call before(stepper, n) and after(stepper, n) around the n-th step of a run."""
    step, count = tg.Stepper.step, [0]

    def watched(self, *args, **kwargs):
        count[0] += 1
        if before:
            before(self, count[0])
        value = step(self, *args, **kwargs)
        if after:
            after(self, count[0])
        return value

    monkeypatch.setattr(tg.Stepper, "step", watched)


# ----------------------------------------------------------------------------------------------------------
# Flat parameters
# ----------------------------------------------------------------------------------------------------------


def test_parameters_are_views_of_one_vector(hp):
    model = random_model(hp)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = tg.FlatParameters(model)
    assert same_weights(before, {name: p.detach() for name, p in model.named_parameters()})
    assert all(p.data_ptr() % 64 == flat.weights.data_ptr() % 64 for p in model.parameters())
    spans = sorted(
        (flat.offsets[name], flat.offsets[name] + p.numel()) for name, p in model.named_parameters()
    )
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:])) and spans[-1][1] <= len(
        flat.weights
    )
    flat.weights.mul_(2)
    assert all(torch.equal(p, 2 * before[name]) for name, p in model.named_parameters())
    x = torch.randint(0, hp.vocab_size, (2, 17))
    model(x[:, :-1], x[:, 1:]).backward()
    for name, p in model.named_parameters():
        assert (
            torch.equal(flat.view(flat.grads, name), p.grad)
            and p.grad.data_ptr() == flat.view(flat.grads, name).data_ptr()
        )
    assert flat.grads.norm() > 0
    assert torch.equal(flat.grads.square().sum(), flat.reduced[: len(flat.grads)].square().sum())
    padding = torch.ones(len(flat.weights), dtype=torch.bool)
    for low, high in spans:
        padding[low:high] = False
    assert flat.weights[padding].abs().sum() == 0 == flat.grads[padding].abs().sum()


def test_state_dict_is_a_copy_of_any_vector(hp):
    model = random_model(hp)
    flat = tg.FlatParameters(model)
    halves = flat.state_dict(flat.weights / 2)
    assert list(sorted(halves)) == sorted(model.state_dict())
    copies = flat.state_dict(flat.weights)
    flat.weights.zero_()
    assert all(copies[name].norm() > 0 and torch.equal(copies[name] / 2, halves[name]) for name in copies)
    tg.GPT(hp).load_state_dict(copies, strict=True)


def test_stacks_are_views_of_neighbours_of_one_shape(hp):
    model = random_model(hp)
    flat = tg.FlatParameters(model)
    key_of = lambda name: None if ".attn.c_" not in name else 1 if name.startswith("blocks.0.") else 2
    stacks = flat.stacks(key_of)
    names = [name for _, members, _, _ in stacks for name in members]
    assert sorted(names) == sorted(name for name in flat.parameters if key_of(name)) and len(stacks) < len(
        names
    )
    for key, members, weights, grads in stacks:
        assert {key_of(name) for name in members} == {key}
        assert torch.equal(weights, torch.stack([model.get_parameter(name) for name in members]))
        weights.fill_(7), grads.fill_(3)
        assert all(
            (model.get_parameter(name) == 7).all() and (flat.parameters[name].grad == 3).all()
            for name in members
        )
    total = sum(model.get_parameter(name).numel() for name in names)
    assert (flat.weights == 7).sum() == total == (flat.grads == 3).sum()  # and nothing beside them


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_clip_gradients_equals_torch(limit):
    parts = [torch.randn(5, 3), torch.randn(7)]
    flat = torch.cat([p.flatten() for p in parts])
    for p in parts:
        p.grad = p.clone()
    tg.clip_gradients(flat, limit)
    torch.nn.utils.clip_grad_norm_(parts, limit or math.inf)
    torch.testing.assert_close(flat, torch.cat([p.grad.flatten() for p in parts]))
    if limit == 0.5:
        assert flat.norm() == pytest.approx(0.5, rel=1e-4)


def test_a_step_clips_gradients_and_not_the_loss(stepper):
    x, y = stepper.batch()
    with torch.no_grad():
        expected = float(stepper.model(x, y))
    stepper.stream.position = 0
    stepper.step(1.0, 0.9, qat_on=False)
    assert float(stepper.flat.slots[0]) == pytest.approx(expected, rel=1e-5)
    assert float(stepper.flat.grads.norm()) == pytest.approx(stepper.hp.grad_clip_norm, rel=1e-4)


def test_micro_steps_add_up_to_the_batch(hp):
    """Any number of micro-steps gives the gradient of the mean over the whole batch."""
    vectors = []
    for steps in (1, 3, 16):
        stepper = stepper_of(dataclasses.replace(hp, grad_accum_steps=steps, grad_clip_norm=0.0))
        stepper.step(1.0, 0.9, qat_on=False)
        vectors.append(stepper.flat.reduced.clone())
    x, y = stepper_of(hp).batch()
    model = random_model(hp)
    model(x, y).backward()
    for name, p in stepper.flat.parameters.items():
        expected = model.get_parameter(name).grad
        if expected is not None:
            torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-6)
    for vector in vectors[1:]:
        torch.testing.assert_close(vector, vectors[0], rtol=1e-3, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------
# Warm-up
# ----------------------------------------------------------------------------------------------------------


def snapshot(stepper):
    state = stepper.state()
    return json.dumps(state, default=lambda value: [str(value.dtype), value.tolist()], sort_keys=True)


def test_warm_up_restores_everything_bit_for_bit(monkeypatch, hp):
    stepper, taken = stepper_of(dataclasses.replace(hp, warmup_steps=3)), []
    weights, before = stepper.flat.weights.clone(), snapshot(stepper)
    watch_steps(monkeypatch, after=lambda self, n: taken.append(torch.equal(self.flat.weights, weights)))
    stepper.warm_up()
    assert taken == [False] * 3  # it did train
    assert torch.equal(stepper.flat.weights, weights)
    assert snapshot(stepper) == before


def test_losses_do_not_depend_on_the_warm_up(tmp_path, tiny):
    runs = []
    for steps in ("0", "3"):
        folder = tmp_path / steps
        folder.mkdir()
        assert start(folder, tiny | {"WARMUP_STEPS": steps, "ITERATIONS": "10"}) == 0
        runs.append((losses(folder), exported(folder)))
    assert len(runs[0][0]) == 10
    assert runs[0][0] == runs[1][0]
    assert same_weights(runs[0][1], runs[1][1])


# ----------------------------------------------------------------------------------------------------------
# What a run says and exports
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, tiny):
    """For every AVERAGING: the folder, and the weights before the first and after each step."""
    runs = {}
    for kind in ("none", "ema", "swa", "best"):
        folder, weights = tmp_path_factory.mktemp(kind), []
        keep = lambda self, weights=weights: weights.append(self.flat.state_dict(self.flat.weights))
        with pytest.MonkeyPatch.context() as patch:
            watch_steps(
                patch,
                before=lambda self, n, keep=keep: keep(self) if n == 1 else None,
                after=lambda self, n, keep=keep: keep(self),
            )
            assert start(folder, averaging_env(tiny, kind)) == 0
        assert len(weights) == 25
        runs[kind] = folder, weights
    return runs


def averaging_env(tiny, kind):
    return tiny | {
        "AVERAGING": kind,
        "WARMUP_STEPS": "0",
        "SWA_EVERY": "3",
        "SWA_THRESHOLD": "0.8",
        "EMA_DECAY": "0.9",
    }


def ema_of(weights):
    average = {name: w.double() for name, w in weights[0].items()}
    for later in weights[1:]:
        average = {name: 0.9 * average[name] + 0.1 * later[name].double() for name in average}
    return average


def swa_of(hp, weights):
    """The mean of every third step's weights, of those steps whose rate was below the threshold."""
    steps = [step for step in range(24) if tg.lr_scale(hp, step) < 0.8 and (step + 1) % 3 == 0]
    assert len(steps) >= 3
    return {
        name: torch.stack([weights[step + 1][name].double() for step in steps]).mean(0) for name in weights[0]
    }


def close(a, b):
    return all(torch.allclose(a[name].double(), b[name].double(), rtol=1e-4, atol=1e-6) for name in b)


def test_none_exports_the_last_weights(recorded):
    folder, weights = recorded["none"]
    assert same_weights(exported(folder), weights[-1])
    assert result(folder)["proofs"]["averaging"]["distance_from_raw"] == 0


def test_ema_exports_its_closed_form(recorded):
    folder, weights = recorded["ema"]
    assert close(exported(folder), ema_of(weights)) and not close(exported(folder), weights[-1])
    proof = result(folder)["proofs"]["averaging"]
    assert proof["exported"] == "ema" and proof["distance_from_raw"] > 0.01


def test_swa_exports_the_mean_of_its_snapshots(recorded, hp):
    folder, weights = recorded["swa"]
    assert close(exported(folder), swa_of(hp, weights)) and not close(exported(folder), weights[-1])
    proof = result(folder)["proofs"]["averaging"]
    assert proof["exported"] == "swa" and proof["swa_snapshots"] >= 3 and proof["distance_from_raw"] > 0.001


def test_best_exports_the_lowest_loss_on_held_out_training_tokens(recorded, hp):
    folder, weights = recorded["best"]
    candidates = {"ema": ema_of(weights), "swa": swa_of(hp, weights), "none": weights[-1]}
    shard = np.fromfile(Path(hp.data_path) / "fineweb_train_000001.bin", "<u2")[512:]
    held_out = torch.from_numpy(shard[len(shard) - len(shard) // 100 :].astype(np.int64))
    rows = (len(held_out) - 1) // 64
    expected = {}
    for kind, average in candidates.items():
        model = tg.GPT(hp)
        model.load_state_dict(average)
        with torch.no_grad():
            expected[kind] = float(
                model(held_out[: rows * 64].view(-1, 64), held_out[1 : rows * 64 + 1].view(-1, 64))
            )
    proof = result(folder)["proofs"]["averaging"]
    for kind, loss in proof["held_out_losses"].items():
        assert loss == pytest.approx(expected[kind], rel=1e-4)
    assert {"ema", "swa"} <= set(proof["held_out_losses"])
    assert proof["exported"] == min(expected, key=expected.get)
    assert close(exported(folder), candidates[proof["exported"]])
    assert len({round(loss, 4) for loss in expected.values()}) == 3


def test_best_never_looks_at_validation(recorded, tiny, tmp_path):
    """The same training shards beside another validation text: the same choice, losses and weights."""
    other = tmp_path / "data"
    other.mkdir()
    for shard in Path(tiny["DATA_PATH"]).glob("fineweb_train_*.bin"):
        shutil.copy(shard, other)
    train = np.fromfile(other / "fineweb_train_000000.bin", "<u2")[512:]
    write_shard(other / "fineweb_val_000000.bin", train[:3000])
    assert start(tmp_path, averaging_env(tiny, "best") | {"DATA_PATH": str(other)}) == 0
    folder = recorded["best"][0]
    assert result(tmp_path)["val_loss"]["float"] != result(folder)["val_loss"]["float"]
    assert result(tmp_path)["proofs"]["averaging"] == result(folder)["proofs"]["averaging"]
    assert same_weights(exported(tmp_path), exported(folder))


def test_the_log_lists_groups_that_hold_every_parameter(recorded, hp):
    text = (recorded["none"][0] / "logs/run/log.txt").read_text()
    pattern = r"^optimiser group:(\w+) .*tensors:(\d+) params:(\d+) lr:(\S+) weight_decay:(\S+)"
    groups = re.findall(pattern, text, re.M)
    model = tg.GPT(hp)
    assert sum(int(params) for _, _, params, _, _ in groups) == sum(p.numel() for p in model.parameters())
    assert sum(int(tensors) for _, tensors, _, _, _ in groups) == len(list(model.parameters()))
    assert [float(lr) for *_, lr, _ in groups] == [hp.matrix_lr, hp.tied_embed_lr, hp.scalar_lr]
    assert {float(decay) for *_, decay in groups} == {hp.muon_wd, hp.adam_wd}
    matrices = [
        p.numel() for name, p in model.named_parameters() if name.endswith(".weight") and "embed" not in name
    ]
    assert int(groups[0][2]) == sum(matrices) - sum(p.numel() for p in model.tok_emb.parameters())
    assert result(recorded["none"][0])["params"] == sum(p.numel() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------
# Losses that are not finite
# ----------------------------------------------------------------------------------------------------------


def one_line_error(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.startswith("error: ") and len(captured.err.splitlines()) <= 2, captured.err
    return captured.err


def test_a_loss_that_is_not_finite_names_the_step_and_the_checkpoint(monkeypatch, capsys, tmp_path, tiny):
    def poison(stepper, n):
        if n == 7:  # the weights of step 7, after those of step 6 were good
            stepper.flat.weights.fill_(math.nan)

    watch_steps(monkeypatch, before=poison)
    assert start(tmp_path, tiny | {"WARMUP_STEPS": "0", "CHECKPOINT_EVERY": "2"}) == 1
    message = one_line_error(capsys)
    assert "step 7 " in message and "nan" in message
    state = torch.load(tmp_path / "logs/run/checkpoint.pt", weights_only=True)
    assert state["step"] == 6 and torch.isfinite(state["weights"]).all()
    assert not (tmp_path / "logs/run/model.pt").exists()
    assert "checkpoint" in message and "step 6" in message


def test_a_checkpoint_holds_finite_weights_only(monkeypatch, capsys, tmp_path, tiny):
    """An update that ruins the weights: their loss is known only in the next step, after the checkpoint."""

    def poison(stepper, n):
        if n == 6:
            stepper.flat.weights[0] = math.inf

    watch_steps(monkeypatch, after=poison)
    assert start(tmp_path, tiny | {"WARMUP_STEPS": "0", "CHECKPOINT_EVERY": "1"}) == 1
    assert "step 7 " in one_line_error(capsys)
    state = torch.load(tmp_path / "logs/run/checkpoint.pt", weights_only=True)
    assert state["step"] == 5
    assert torch.isfinite(state["weights"]).all() and torch.isfinite(state["ema"]).all()


# ----------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing in the script catches this."""


# With `best`, the proofs hold the losses of every average.
SAVING = {"CHECKPOINT_EVERY": "4", "AVERAGING": "best", "SWA_EVERY": "3", "SWA_THRESHOLD": "0.8"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert start(folder, tiny | SAVING) == 0
    return folder


def kill_at(folder, env, step):
    """A run that dies in its `step`-th step, the two warm-up steps not counted."""

    def die(_, n):
        if n == step + 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        watch_steps(patch, before=die)
        with pytest.raises(Killed):
            start(folder, env)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny):
    """A run that died in step 15, with checkpoints of steps 8 and 12."""
    folder = tmp_path_factory.mktemp("killed")
    kill_at(folder, tiny | SAVING, 15)
    return folder


@pytest.fixture
def damaged(killed, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(killed / "logs", tmp_path / "logs")
    return tmp_path


@pytest.mark.parametrize("step", [6, 21, 24])
def test_resume_after_a_kill_gives_the_same_losses(tmp_path, tiny, uninterrupted, step):
    """Before QAT (18) and SWA (12) have begun, and after."""
    kill_at(tmp_path, tiny | SAVING, step)
    before = losses(tmp_path)
    saved = (step - 1) // 4 * 4
    assert max(before) < step and not (tmp_path / "logs/run/model.pt").exists()
    (tmp_path / "logs/run/metrics.jsonl").write_text("")
    assert start(tmp_path, tiny | SAVING | {"RESUME": "1"}) == 0
    after, expected = losses(tmp_path), losses(uninterrupted)
    assert sorted(after) == list(range(saved + 1, 25))
    assert before | after == expected  # bit for bit
    assert same_weights(exported(tmp_path), exported(uninterrupted))
    mine, theirs = result(tmp_path)["proofs"], result(uninterrupted)["proofs"]
    assert mine == theirs


def test_settings_without_effect_may_change(damaged, tiny, uninterrupted):
    free = {
        "RESUME": "1",
        "TRAIN_LOG_EVERY": "3",
        "CHECKPOINT_EVERY": "0",
        "EVAL_STRIDE": "32",
        "TTT_LR": "0.5",
    }
    assert start(damaged, tiny | SAVING | free) == 0
    assert losses(damaged) == losses(uninterrupted)


@pytest.mark.parametrize(
    "name, value",
    [("MATRIX_LR", "0.01"), ("SEED", "5"), ("ITERATIONS", "30"), ("ATTN_BITS", "4"), ("AVERAGING", "ema")],
)
def test_settings_that_matter_may_not_change(capsys, damaged, tiny, name, value):
    before = {path: path.read_bytes() for path in damaged.rglob("*.pt")}
    assert start(damaged, tiny | SAVING | {"RESUME": "1", name: value}) == 1
    assert name in one_line_error(capsys)
    assert before == {path: path.read_bytes() for path in damaged.rglob("*.pt")}


@pytest.mark.parametrize("damage", ["truncated", "empty", "not torch", "another file", "a list"])
def test_a_damaged_checkpoint_is_refused(capsys, damaged, tiny, damage):
    path = damaged / "logs/run/checkpoint.pt"
    if damage in ("another file", "a list"):
        torch.save([1, 2] if damage == "a list" else {"weights": torch.zeros(3)}, path)
    else:
        data = path.read_bytes()
        path.write_bytes(
            {"truncated": data[: len(data) // 2], "empty": b"", "not torch": b"hello" * 99}[damage]
        )
    assert start(damaged, tiny | SAVING | {"RESUME": "1"}) == 1
    assert "checkpoint.pt" in one_line_error(capsys)


def test_the_checkpoint_before_serves_where_the_last_is_lost(damaged, tiny, uninterrupted):
    (damaged / "logs/run/checkpoint.pt").unlink()
    (damaged / "logs/run/metrics.jsonl").write_text("")
    assert start(damaged, tiny | SAVING | {"RESUME": "1"}) == 0
    assert losses(damaged) == {step: loss for step, loss in losses(uninterrupted).items() if step > 8}
    assert same_weights(exported(damaged), exported(uninterrupted))


def test_a_checkpoint_executes_nothing(capsys, damaged, tiny):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(damaged / "harm"),)

    torch.save({"settings": Harm()}, damaged / "logs/run/checkpoint.pt")
    assert start(damaged, tiny | SAVING | {"RESUME": "1"}) == 1
    assert "checkpoint.pt" in one_line_error(capsys)
    assert not (damaged / "harm").exists()


def test_resume_needs_a_checkpoint(capsys, tmp_path, tiny):
    assert start(tmp_path, tiny | {"RESUME": "1"}) == 1
    assert "RESUME" in one_line_error(capsys)
    kill_at(tmp_path, tiny, 2)
    assert start(tmp_path, tiny | {"RESUME": "1"}) == 1
    assert "checkpoint" in one_line_error(capsys)


def test_sigterm_writes_a_checkpoint(tmp_path, tiny):
    env = tiny | QUIET | {"ITERATIONS": "150", "TRAIN_LOG_EVERY": "1", "OMP_NUM_THREADS": "1"}
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt.py")], cwd=tmp_path, env=clean | env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("step:4/"):
                process.send_signal(signal.SIGTERM)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors and "RESUME=1" in errors
    state = torch.load(tmp_path / "logs/run/checkpoint.pt", weights_only=True)
    assert 4 <= state["step"] < 150
    before = losses(tmp_path)
    assert max(before) == state["step"]

    def enough(_, n):
        if n == 2 + 4:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:  # four more steps are enough
        watch_steps(patch, before=enough)
        with pytest.raises(Killed):
            start(tmp_path, env | {"RESUME": "1"})
    after = losses(tmp_path)
    (tmp_path / "b").mkdir()
    kill_at(tmp_path / "b", env, max(after) + 1)
    assert after == losses(tmp_path / "b") and len(after) == len(before) + 3


# ----------------------------------------------------------------------------------------------------------
# The clock
# ----------------------------------------------------------------------------------------------------------


def test_the_wall_clock_holds_everything_and_stops_during_validation(monkeypatch, tmp_path, tiny):
    """Validations of 0.3 s and more do not count; calibration and packing do, and fit in."""
    score = tg.Validation.score

    def slow(*args, **kwargs):
        time.sleep(0.3)
        return score(*args, **kwargs)

    monkeypatch.setattr(tg.Validation, "score", slow)
    env = {
        "MAX_WALLCLOCK_SECONDS": "3", "ITERATIONS": "100000", "STAGES": "train,quantize",
        "VAL_LOSS_EVERY": "15", "WARMDOWN_ITERS": "10",
    }  # fmt: skip
    began = time.perf_counter()
    assert start(tmp_path, tiny | env) == 0
    took = time.perf_counter() - began
    facts, validations = result(tmp_path), metrics(tmp_path, "validation")
    clock = facts["budget"]["training"]
    assert clock["limit"] == 3 and clock["within"] and clock["used"] <= 3
    assert clock["used"] == pytest.approx(sum(clock["counted"].values()))
    assert 0 < facts["reserve_seconds"] < 2 and facts["train_seconds"] <= 3 - facts["reserve_seconds"] + 0.1
    assert facts["train_seconds"] > 0.5  # it used what was left
    assert len(validations) >= 1 and clock["uncounted"]["validation"] >= 0.3 * len(validations)
    assert took > clock["used"] + clock["uncounted"]["validation"]
    steps = metrics(tmp_path)
    assert len(steps) == facts["steps"] >= 10 and steps[1]["lr_scale"] == 1
    assert steps[facts["steps"]]["lr_scale"] < 0.35  # the warmdown ended with the clock
    assert {"calibrate", "quantise and pack"} <= set(clock["counted"])
    assert (tmp_path / "logs/run/artifact.bin").is_file()


def test_a_clock_too_short_to_quantise_is_refused(capsys, tmp_path, tiny):
    env = {"MAX_WALLCLOCK_SECONDS": "0.2", "STAGES": "train,quantize"}
    assert start(tmp_path, tiny | env) == 1
    assert "MAX_WALLCLOCK_SECONDS" in one_line_error(capsys)


@pytest.mark.parametrize("qat_on", [False, True])
def test_a_step_does_not_wait_for_the_device(monkeypatch, stepper, qat_on):
    """No call that would copy a tensor to the host."""
    stepper.step(0.2, 0.9, qat_on)  # states exist
    calls = []
    for name in (
        "item",
        "tolist",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "numpy",
        "nonzero",
        "cpu",
    ):
        real = getattr(torch.Tensor, name)
        note = lambda self, *args, _name=name, _real=real: (calls.append(_name), _real(self, *args))[1]
        monkeypatch.setattr(torch.Tensor, name, note)
    stepper.step(0.1, 0.9, qat_on)
    assert calls == []
    float(stepper.flat.slots[0])
    assert calls == ["__float__"]  # the spies work


# ----------------------------------------------------------------------------------------------------------
# Proofs
# ----------------------------------------------------------------------------------------------------------

WITHOUT = {
    "value_residual": dict(value_residual=False), "gated_attention": dict(gated_attention=False),
    "smear_gate": dict(smear_gate=False), "bigram_hash": dict(bigram_vocab_size=0),
    "value_embedding": dict(ve_enabled=False), "xsa": dict(xsa_last_n=0), "unet_skips": {},
}  # fmt: skip


def test_proofs_are_the_losses_of_models_without_the_technique(hp):
    model = random_model(hp).double()
    with torch.no_grad():  # a value embedding that can be felt
        model.ve_shared.embed.weight.mul_(100)
    tokens = torch.randint(0, hp.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1], tokens[:, 1:]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        loss = float(model(x, y))
        proofs = tg.technique_proofs(model, x, y)
        assert same_weights(before, {name: p.detach() for name, p in model.named_parameters()})
        assert float(model(x, y)) == loss  # switches outside the weights are back as well
    assert proofs.keys() == WITHOUT.keys()
    for name, changes in WITHOUT.items():
        assert proofs[name]["loss"] == pytest.approx(loss, rel=1e-12)
        other = tg.GPT(dataclasses.replace(hp, **changes)).double()
        state = before | (
            {"skip_weights": torch.zeros_like(before["skip_weights"])} if name == "unet_skips" else {}
        )
        other.load_state_dict({key: state[key] for key in other.state_dict()}, strict=True)
        with torch.no_grad():
            expected = float(other(x, y))
        assert proofs[name]["loss_without"] == pytest.approx(expected, rel=1e-9), name
        assert abs(expected - loss) > 1e-6, name


def test_proofs_of_techniques_that_are_off_are_absent(hp):
    off = dataclasses.replace(
        hp, value_residual=False, gated_attention=False, smear_gate=False, bigram_vocab_size=0,
        ve_enabled=False, xsa_last_n=0,
    )  # fmt: skip
    x = torch.randint(0, hp.vocab_size, (2, 16))
    assert set(tg.technique_proofs(random_model(off), x, x)) <= {"unet_skips"}


def test_a_run_proves_its_techniques(recorded):
    proofs = result(recorded["ema"][0])["proofs"]
    assert proofs["techniques"].keys() == WITHOUT.keys()
    for name, proof in proofs["techniques"].items():
        assert proof["loss"] != proof["loss_without"], name
    qat = proofs["qat"]
    assert qat["first_step"] == 18 and qat["distance_before"] == pytest.approx(0.25, abs=0.01)
    assert qat["distance_raw"] < 0.23 and qat["loss"] != qat["loss_rounded"]
