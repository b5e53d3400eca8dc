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
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, write_shard
from reference import EPS32, reference_loss

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


def test_ranks_start_from_the_weights_of_the_first(hp):
    """A seed alone does not make the ranks equal: orthogonal matrices differ between kinds of CPU."""
    world, sent = tg.World(hp, {}), []

    def broadcast_(tensor, source=0):
        sent.append(source)
        return tensor.fill_(0.25)

    world.broadcast_ = broadcast_
    model = random_model(hp)
    tg.Stepper(hp, model, tg.TokenStream(tg.read_split(hp.data_path, "train")), world, compiling=False)
    assert sent == [0] and all((p == 0.25).all() for p in model.parameters())


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


@pytest.mark.parametrize("gigabytes", [8, 12, 16, 24, 40, 80, 141])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("compiling", [True, False])
def test_any_gpu_from_8_gb_runs_pr606_at_the_same_global_batch(monkeypatch, gigabytes, ranks, compiling):
    """Micro-batches fit into 70 % of the memory, fill at least a third of that, and are all of one size."""
    hp = tg.Hyperparameters.from_env({"PRESET": "pr606"})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (gigabytes * 10**9, gigabytes * 10**9))
    sequences = hp.train_batch_tokens // hp.train_seq_len // ranks
    world = SimpleNamespace(device=torch.device("cuda"))
    micro = tg.micro_batch(hp, world, sequences, compiling)
    share = micro * hp.train_seq_len * tg.activation_bytes(hp, world, compiling) / (0.7 * gigabytes * 10**9)
    assert share <= 1 and (share > 1 / 3 or micro == sequences)
    assert sequences % micro == 0


def test_micro_batches_on_a_cpu_follow_the_width():
    for preset, micro in (("smoke", 16), ("pr601", 4), ("pr606", 2)):  # all 16 of a step; 4 of 1,024; 2 of 2,048
        hp = tg.Hyperparameters.from_env({"PRESET": preset})
        sequences = hp.train_batch_tokens // hp.train_seq_len
        assert tg.micro_batch(hp, tg.World(hp, {}), sequences, compiling=False) == micro


def test_micro_batches_without_an_equal_split_are_as_few_as_fit(monkeypatch):
    """71 sequences are prime: nine parts of eight, the last of seven, rather than 71 of one."""
    hp = tg.Hyperparameters.from_env({"PRESET": "pr606"})
    world = SimpleNamespace(device=torch.device("cuda"))
    eight = 8.5 * hp.train_seq_len * tg.activation_bytes(hp, world, compiling=True) / 0.7
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (eight, eight))
    assert tg.micro_batch(hp, world, 71, compiling=True) == 8


# ----------------------------------------------------------------------------------------------------------
# One batch, however many ranks and micro-steps
# ----------------------------------------------------------------------------------------------------------


def spans_by_hand(shards, batch_tokens, seq_len):
    """The sequences of the first step: eight spans in a row, over the ends of shards and epochs."""
    text, length = np.concatenate(shards).tolist(), batch_tokens // 8
    endless = text * (2 * batch_tokens // len(text) + 2)
    spans = [endless[i * (length + 1) : (i + 1) * (length + 1)] for i in range(8)]
    return [tuple(span[at : at + seq_len + 1]) for span in spans for at in range(0, length, seq_len)]


def step_of_ranks(hp, shards, size, accumulation, qat_on):
    """The gradient vector of a first step, summed over ranks, and the sequences that their models got."""
    total, seen = 0, []
    for rank in range(size):
        torch.manual_seed(0)
        changed = dataclasses.replace(hp, grad_accum_steps=accumulation, grad_clip_norm=0.0)
        world = tg.World(changed, {})
        world.rank, world.size, world.sum_ = rank, size, lambda tensor: tensor
        stepper = tg.Stepper(changed, random_model(changed), tg.TokenStream(shards), world, compiling=False)
        model, calls = stepper.model, []

        def watched(x, y, model=model, calls=calls):
            calls.append(len(x))
            seen.extend((*row, last) for row, last in zip(x.tolist(), y[:, -1].tolist()))
            assert torch.equal(x[:, 1:], y[:, :-1])
            return model(x, y)

        stepper.model, stepper.optimisers.step = watched, lambda *_: None
        stepper.step(0.2, 0.9, qat_on)
        total = total + stepper.flat.reduced
        assert max(calls) == -(-sum(calls) // accumulation) and len(calls) == -(-sum(calls) // max(calls))
    return total, seen


RANKS_AND_STEPS = [(1, 5), (1, 16), (2, 1), (2, 4), (3, 1), (3, 2), (4, 1), (4, 4)]
SHARDS = {"long": (5000, 800), "short and many": (150, 65, 400), "one, shorter than a step": (300,)}


@pytest.mark.parametrize(
    ("length", "qat_on"), [("long", True), ("short and many", False), ("one, shorter than a step", False)]
)
def test_a_step_is_the_same_on_any_ranks_and_micro_steps(hp, length, qat_on):
    """Each sequence once, and the gradient and the loss of the mean over all of them."""
    hp = dataclasses.replace(hp, train_batch_tokens=256, train_seq_len=16, num_layers=2, ve_layers=(1,))
    rng = np.random.default_rng(0)
    shards = [rng.integers(0, hp.vocab_size, size).astype(np.uint16) for size in SHARDS[length]]
    expected, seen = step_of_ranks(hp, shards, 1, 1, qat_on)
    trained = [*shards[:-1], shards[-1][: len(shards[-1]) - len(shards[-1]) // 100]]
    assert seen == spans_by_hand(trained, 256, 16)
    for size, accumulation in RANKS_AND_STEPS:
        total, again = step_of_ranks(hp, shards, size, accumulation, qat_on)
        assert again == seen, (size, accumulation)
        assert (total - expected).norm() <= 1e-5 * expected.norm(), (size, accumulation)
        slot = -tg.FlatParameters.SLOTS
        assert float(total[slot]) == pytest.approx(float(expected[slot]), rel=1e-6)  # the loss


# ----------------------------------------------------------------------------------------------------------
# Documents in one window
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [True, False])
def test_smear_reset_holds_in_training_scoring_and_ttt(hp, reset):
    """All three give the reference's loss for the setting, and not the one for the other."""
    hp = dataclasses.replace(
        hp, smear_reset_at_bos=reset, train_batch_tokens=64, train_seq_len=16, eval_seq_len=16, num_layers=2,
        ve_layers=(1,), ttt_lr=0.0, ttt_chunk_tokens=16, ttt_temperature=1.0, eval_stride=16,
    )  # fmt: skip
    other = dataclasses.replace(hp, smear_reset_at_bos=not reset)
    text = torch.randint(2, hp.vocab_size, (65,), generator=torch.Generator().manual_seed(3))
    text[5::9] = 1
    model, world = random_model(hp), tg.World(hp, {})
    with torch.no_grad():
        model.smear.gate.add_(1.0)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}

    def both(x, y):
        return [float(reference_loss(state, setting, x, y, EPS32).detach()) for setting in (hp, other)]

    stepper = tg.Stepper(hp, model, tg.TokenStream([text.numpy().astype(np.uint16)]), world, compiling=False)
    x, y = stepper.batch()
    stepper.stream.position = 0
    stepper.step(0.0, 0.0, qat_on=False)
    model.load_state_dict(state)
    right, wrong = both(x, y)
    assert float(stepper.flat.slots[0]) == pytest.approx(right, rel=1e-5) and abs(right - wrong) > 1e-3

    right, wrong = both(text[:-1].view(4, 16), text[1:].view(4, 16))
    counts, tokens = torch.ones(64, dtype=torch.int32), text.int()
    scored = tg.evaluate(model, tokens, counts, tg.sliding_windows(64, 16, 16), world)
    tested, proof = tg.evaluate_ttt(model, tokens, counts, hp, world, tg.RunLog(None))
    assert proof["steps"] > 0 and abs(right - wrong) > 1e-3
    assert scored.val_loss == pytest.approx(right, rel=1e-5)
    assert tested.val_loss == pytest.approx(right, rel=1e-5)


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


def test_the_log_says_what_was_exported_and_the_losses_compared(recorded):
    for kind, (folder, _) in recorded.items():
        text, proof = (folder / "logs/run/log.txt").read_text(), result(folder)["proofs"]["averaging"]
        (line,) = re.findall(r"^proof technique:averaging .*$", text, re.M)
        assert f"exported:{proof['exported']} " in line
        for name, loss in proof["held_out_losses"].items():
            assert f"'{name}': {loss}" in line
        assert bool(proof["held_out_losses"]) == (kind == "best")
        assert "average" in result(folder)["budget"]["training"]["counted"]  # inside the budget


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


def test_best_needs_something_held_out(capsys, tmp_path, tiny):
    shutil.copytree(tiny["DATA_PATH"], tmp_path / "data")
    write_shard(tmp_path / "data/fineweb_train_000002.bin", [1] * 150)
    assert start(tmp_path, tiny | {"AVERAGING": "best", "DATA_PATH": str(tmp_path / "data")}) == 1
    assert "150 tokens" in one_line_error(capsys)


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


@pytest.mark.parametrize("last", [14, 24])
def test_an_update_that_ruins_the_weights_at_a_log_step_or_at_the_end(
    monkeypatch, capsys, tmp_path, tiny, last
):
    """Step 14 of the warmdown is followed by a forecast of the bytes, step 24 by the export."""

    def poison(stepper, n):
        if n == last:
            stepper.flat.weights.fill_(math.nan)

    watch_steps(monkeypatch, after=poison)
    assert start(tmp_path, tiny | {"WARMUP_STEPS": "0", "TRAIN_LOG_EVERY": "1", "CHECKPOINT_EVERY": "10"}) == 1
    message = one_line_error(capsys)
    assert ("step 15 is nan" if last == 14 else "not finite after step 24") in message
    assert f"checkpoint is of step {last // 10 * 10}" in message
    assert not (tmp_path / "logs/run/model.pt").exists()


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
    written = (tmp_path / "logs/run/log.txt").read_bytes()
    assert start(tmp_path, tiny | {"RESUME": "1"}) == 1
    assert "checkpoint" in one_line_error(capsys)
    assert (tmp_path / "logs/run/log.txt").read_bytes() == written  # refused before the log is opened


@pytest.mark.parametrize("moment", ["half written", "before the old one moves", "before it takes its name"])
def test_a_kill_while_a_checkpoint_is_written_loses_only_that_one(tmp_path, tiny, uninterrupted, moment):
    """The second checkpoint, of step 8, is never whole under its name; the one of step 4 serves."""
    replace, fsync, replaced = os.replace, os.fsync, []
    dies_after = {"before the old one moves": 1, "before it takes its name": 2}

    def dying_fsync(handle):
        if replaced and moment == "half written":
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            raise Killed
        fsync(handle)

    def dying_replace(source, target):
        is_checkpoint = Path(target).name.startswith("checkpoint")
        if is_checkpoint and len(replaced) == dies_after.get(moment):
            raise Killed
        replace(source, target)
        replaced.extend([target] * is_checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", dying_replace)
        patch.setattr(os, "fsync", dying_fsync)
        with pytest.raises(Killed):
            start(tmp_path, tiny | SAVING)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert max(losses(tmp_path)) == 8
    whole = [path for path in (tmp_path / "logs/run").glob("checkpoint*.pt")]
    assert [torch.load(path, weights_only=True)["step"] for path in whole] == [4]
    kept = tg.load_checkpoint(tmp_path / "logs/run", settings={})
    reference = losses(uninterrupted)
    assert kept["step"] == 4 and losses(tmp_path) == {step: reference[step] for step in range(1, 9)}
    if moment == "half written":
        assert start(tmp_path, tiny | SAVING | {"RESUME": "1"}) == 0
        assert losses(tmp_path) == reference and same_weights(exported(tmp_path), exported(uninterrupted))


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


def test_sigterm_in_the_last_step_loses_nothing(monkeypatch, tmp_path, tiny, uninterrupted):
    def terminate(_, n):
        if n == 2 + 24:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        watch_steps(patch, after=terminate)
        assert start(tmp_path, tiny | SAVING) == 143
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert not (tmp_path / "logs/run/model.pt").exists()
    assert start(tmp_path, tiny | SAVING | {"RESUME": "1"}) == 0
    assert losses(tmp_path) == losses(uninterrupted)
    assert same_weights(exported(tmp_path), exported(uninterrupted))


def test_a_resume_on_another_amount_of_text_is_refused(capsys, tmp_path, tiny):
    """More shards under the same path would move the held-out tail and the end of the epoch."""
    shutil.copytree(tiny["DATA_PATH"], tmp_path / "data")
    env = tiny | SAVING | {"DATA_PATH": str(tmp_path / "data")}
    kill_at(tmp_path, env, 6)
    write_shard(tmp_path / "data/fineweb_train_000002.bin", [1] * 5000)
    assert start(tmp_path, env | {"RESUME": "1"}) == 1
    assert "TRAIN_TOKENS" in one_line_error(capsys)


def test_a_model_is_saved_before_it_is_scored(monkeypatch, tmp_path, tiny):
    """A run that dies while it scores can go on with STAGES=quantize,evaluate, on the grid of its QAT."""
    with monkeypatch.context() as patch:
        patch.setattr(tg.Validation, "score", mock.Mock(side_effect=Killed))
        with pytest.raises(Killed):
            start(tmp_path, tiny)
    assert exported(tmp_path) and result(tmp_path)["qat_ran"] and result(tmp_path)["steps"] == 24
    assert start(tmp_path, tiny | {"STAGES": "quantize,evaluate"}) == 0
    assert result(tmp_path)["bpb"]["ttt"] < 6


def test_the_schedules_reach_the_optimiser(monkeypatch, tmp_path, tiny, hp):
    applied, step = [], tg.Optimisers.step

    def spied(self, scale, momentum):
        applied.append((scale, momentum))
        step(self, scale, momentum)
        rates = [group["lr"] for group in self.groups]
        assert rates == pytest.approx([scale * lr for lr in (hp.matrix_lr, hp.tied_embed_lr, hp.scalar_lr)])
        assert self.muon.param_groups[0]["momentum"] == momentum

    monkeypatch.setattr(tg.Optimisers, "step", spied)
    assert start(tmp_path, tiny | {"WARMUP_STEPS": "0"}) == 0
    assert applied == [(tg.lr_scale(hp, i), tg.muon_momentum(hp, i)) for i in range(24)]
    assert applied[0][1] < applied[-1][1] and applied[-1][0] < applied[0][0]


def test_late_qat_stays_on_when_the_clock_relents(monkeypatch, tmp_path, tiny):
    """By the clock a fast step after a slow one can raise the learning rate above the threshold again."""
    on, step = [], tg.Stepper.step

    def spied(self, scale, momentum, qat_on, *args):
        on.append(qat_on)
        step(self, scale, momentum, qat_on, *args)

    monkeypatch.setattr(tg.Stepper, "step", spied)
    monkeypatch.setattr(tg, "lr_scale", lambda hp, step, *_: 0.4 if step in (3, 6) else 0.8)
    assert start(tmp_path, tiny | {"WARMUP_STEPS": "0", "ITERATIONS": "8"}) == 0
    assert on == [False] * 3 + [True] * 5


# ----------------------------------------------------------------------------------------------------------
# The clock
# ----------------------------------------------------------------------------------------------------------


class Clock:
    """Stands in for the module `time`: seconds pass when a test says so."""

    def __init__(self):
        self.now = 5000.0

    def perf_counter(self):
        return self.now

    def __getattr__(self, name):
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch):
    """A step takes one second, a validation 100, a checkpoint none."""
    clock, score = Clock(), tg.Validation.score

    def slow_score(*args, **kwargs):
        clock.now += 100
        return score(*args, **kwargs)

    def slow_step(_, __):
        clock.now += 1

    monkeypatch.setattr(tg, "time", clock)
    monkeypatch.setattr(tg.Validation, "score", slow_score)
    watch_steps(monkeypatch, after=slow_step)
    return clock


def test_the_clock_stands_still_during_warm_up_and_validation(clock, tmp_path, tiny):
    """A warm-up of 3 s and a validation of 100 s after every fifth of 12 steps."""
    assert start(tmp_path, tiny | {"WARMUP_STEPS": "3", "ITERATIONS": "12", "VAL_LOSS_EVERY": "5"}) == 0
    assert [line["seconds"] for _, line in sorted(metrics(tmp_path).items())] == list(range(1, 13))
    seconds = {step: line["seconds"] for step, line in metrics(tmp_path, "validation").items()}
    assert seconds == {5: 5, 10: 10}
    facts = result(tmp_path)
    assert facts["train_seconds"] == 12 and facts["step_ms"] == 1000
    budget = facts["budget"]["training"]
    assert budget["counted"]["train"] == budget["used"] == 12
    assert budget["uncounted"] == {"warm-up": 3, "validation": 200, "float": 100}


def test_warmdown_and_end_by_the_wall_clock(clock, tmp_path, tiny):
    """20 s of steps of 1 s, the last ten of them the warmdown, whatever warm-up and validation took."""
    env = {"MAX_WALLCLOCK_SECONDS": "20", "ITERATIONS": "1000", "WARMDOWN_ITERS": "10", "VAL_LOSS_EVERY": "7"}
    assert start(tmp_path, tiny | env) == 0
    scales = [line["lr_scale"] for _, line in sorted(metrics(tmp_path).items())]
    assert scales == pytest.approx([1.0] * 10 + [1 - step / 10 for step in range(10)])
    assert result(tmp_path)["train_seconds"] == 20 and result(tmp_path)["budget"]["training"]["within"]


def test_a_resumed_clock_goes_on_where_it_stood(clock, tmp_path, tiny):
    """Killed in step 15; the checkpoint of step 12 holds 12 s, and the warmdown goes on from there."""
    env = {
        "MAX_WALLCLOCK_SECONDS": "20",
        "ITERATIONS": "1000",
        "WARMDOWN_ITERS": "10",
        "CHECKPOINT_EVERY": "4",
    }
    kill_at(tmp_path, tiny | env, 15)
    clock.now += 3600
    (tmp_path / "logs/run/metrics.jsonl").write_text("")
    assert start(tmp_path, tiny | env | {"RESUME": "1"}) == 0
    lines = metrics(tmp_path)
    assert sorted(lines) == list(range(13, 21))
    assert [lines[step]["seconds"] for step in sorted(lines)] == list(range(13, 21))
    assert [lines[step]["lr_scale"] for step in sorted(lines)] == pytest.approx(
        [1 - i / 10 for i in range(2, 10)]
    )


def test_the_wall_clock_holds_calibration_and_packing(monkeypatch, clock, tmp_path, tiny):
    """A sequence of the calibration takes 0.25 s, quantising 2 s, packing 1 s; all of it ends inside 40 s."""

    def slowed(function, seconds):
        def slow(*args, **kwargs):
            clock.now += seconds(*args)
            return function(*args, **kwargs)

        return slow

    monkeypatch.setattr(
        tg, "collect_hessians", slowed(tg.collect_hessians, lambda _, rows, *__: len(rows) / 4)
    )
    monkeypatch.setattr(tg, "quantize_model", slowed(tg.quantize_model, lambda *_: 2))
    monkeypatch.setattr(tg, "pack", slowed(tg.pack, lambda *_: 1))
    env = {
        "MAX_WALLCLOCK_SECONDS": "40", "ITERATIONS": "1000", "WARMDOWN_ITERS": "10", "VAL_LOSS_EVERY": "7",
        "STAGES": "train,quantize",
    }  # fmt: skip
    assert start(tmp_path, tiny | env) == 0
    facts = result(tmp_path)
    budget, reserve = facts["budget"]["training"], facts["reserve_seconds"]
    assert budget["counted"]["calibrate"] == 16 / 4 and budget["counted"]["quantise and pack"] >= 3
    assert budget["limit"] == 40 and budget["within"] and budget["used"] <= 40
    assert budget["used"] == pytest.approx(sum(budget["counted"].values()))
    assert 7 <= reserve < 20  # what calibrating once, quantising and packing take, and some more
    assert 39 - reserve <= facts["train_seconds"] == facts["steps"] <= 40 - reserve  # it used what was left
    scales = [line["lr_scale"] for _, line in sorted(metrics(tmp_path).items())]
    assert scales[0] == 1 and scales[-1] <= 0.2  # the warmdown ends with the clock, the reserve kept back
    assert (tmp_path / "logs/run/artifact.bin").is_file()


def test_a_clock_too_short_to_quantise_is_refused(capsys, tmp_path, tiny):
    env = {"MAX_WALLCLOCK_SECONDS": "0.2", "STAGES": "train,quantize"}
    assert start(tmp_path, tiny | env) == 1
    assert "MAX_WALLCLOCK_SECONDS" in one_line_error(capsys)


@pytest.mark.parametrize("qat_on", [False, True])
def test_a_step_does_not_wait_for_the_device(monkeypatch, stepper, qat_on):
    """No call that would copy a tensor to the host, nor a number to the device but by a kernel's argument."""
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
    for name in ("tensor", "as_tensor"):
        real = getattr(torch, name)

        def noted(value, *args, _name=name, _real=real, **options):
            if not isinstance(value, torch.Tensor):
                calls.append(_name)
            return _real(value, *args, **options)

        monkeypatch.setattr(torch, name, noted)
    stepper.step(0.1, 0.9, qat_on)
    assert calls == []
    tg.soft_round(torch.zeros(2), 3.0)
    assert calls.pop() == "as_tensor"
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
