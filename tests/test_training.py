"""The training loop: flat parameters, one batch on any ranks, averages, checkpoints, the clock, the log.

Runs are watched through their `World`, which every step asks for its arithmetic and hands its loss to.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import draw, random_model, result_of, write_shard
from reference import EPS32, reference_loss
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_gpt as tg

# ----------------------------------------------------------------------------------------------------------
# Parts of a run, and runs that are watched
# ----------------------------------------------------------------------------------------------------------

STEPS = 24  # of a run: warmdown from step 9 on, SWA from 13, QAT from 18
FIRST_QAT = 18
QUIET = {
    "STAGES": "train", "RUN_ID": "run", "COMPILE": "0", "WARMUP_STEPS": "0", "CHECKPOINT_EVERY": "4",
    "EMA_DECAY": "0.9", "SWA_EVERY": "3", "SWA_THRESHOLD": "0.8",
}  # fmt: skip


class Killed(BaseException):
    """Nothing in the script catches this."""


class Lines(tg.RunLog):
    """A log that is kept here."""

    def __init__(self):
        super().__init__(None)
        self.lines = []

    def __call__(self, line, console=True):
        self.lines.append(line)

    def status(self, line):
        self.lines.append(f"status {line}")


class Rank(tg.World):
    """One of several ranks, alone: what it would share stays its own."""

    def __init__(self, hp, rank, size):
        super().__init__(hp, {})
        self.rank, self.size = rank, size


class Watched(tg.World):
    """This machine, with something to do before and after every step, when one was waited for, before a
    forward pass that scores, and when a stack of matrices is quantised."""

    def __init__(self, hp, done=0, lag=0, **hooks):
        super().__init__(hp, {})
        self.done, self.weights, self.hooks = done, None, hooks
        self.tuning = dataclasses.replace(self.tuning, lag=lag)

    def call(self, name, *args):
        self.hooks.get(name, lambda *_: None)(self, *args)

    def broadcast_(self, tensor):
        if tensor.ndim:  # the vector of all weights
            self.weights = tensor
        return super().broadcast_(tensor)

    def autocast(self):
        self.call(*(("before", self.done + 1) if torch.is_grad_enabled() else ("scoring",)))
        return super().autocast()

    def sum_(self, tensor):
        if tensor.dtype == torch.int8 and tensor.ndim == 3:  # codes of a stack, and not its columns
            self.call("quantised")
        return super().sum_(tensor)

    def matrix_rate(self):
        return 1e12

    def to_host(self, tensor):
        self.done += 1
        self.call("after", self.done)
        copy, wait = super().to_host(tensor)
        return copy, lambda: (wait(), self.call("waited"))


def run(folder, env, clock=time.perf_counter, **watching):
    """A run in this process, in a folder of its own."""
    hp, handler = tg.Hyperparameters.from_env(env), signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.chdir(folder), mock.patch.object(time, "perf_counter", clock):
            tg.run_stages(hp, Watched(hp, **watching), [])
    finally:
        signal.signal(signal.SIGTERM, handler)


def metrics(folder, event="train"):
    """The last line of each step."""
    lines = map(json.loads, (folder / "logs/run/metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if line["event"] == event}


def losses(folder):
    return {step: line["loss"] for step, line in metrics(folder).items()}


def exported(folder):
    return torch.load(folder / "logs/run/model.pt", weights_only=True)


def kept(folder):
    return torch.load(folder / "logs/run/checkpoint.pt", weights_only=True)


def changed(a, b):
    """The names of the tensors that differ."""
    return {name for name in a if not torch.equal(a[name], b[name])}


def by_name(flat, vector):
    """A vector's parts by the names of the parameters."""
    return {name: flat.view(vector, name) for name in flat.parameters}


def same(a, b):
    return a.keys() == b.keys() and not changed(a, b)


@pytest.fixture(scope="module")
def env(tiny):
    return tiny | QUIET


@pytest.fixture(scope="module")
def hp(env):
    return tg.Hyperparameters.from_env(env)


@pytest.fixture(scope="module")
def shards(hp):
    return tg.read_split(hp.data_path, "train")


def stepper_of(hp, shards, world=None):
    world = world or tg.World(hp, {})
    return tg.Stepper(hp, random_model(hp), tg.TokenStream(shards), world, compiling=False)


@pytest.fixture
def stepper(hp, shards):
    return stepper_of(hp, shards)


def run_of(hp, folder=None, world=None):
    """What a stage is given."""
    world = world or tg.World(hp, {})
    ledgers = (tg.Budget(name, world, 0.0) for name in ("training", "evaluation"))
    return tg.Run(hp, world, Lines(), folder, 0, *ledgers, {})


# ----------------------------------------------------------------------------------------------------------
# Flat parameters
# ----------------------------------------------------------------------------------------------------------


def test_parameters_are_views_of_one_vector(hp):
    model = random_model(hp)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = tg.FlatParameters(model)
    assert same(before, {name: p.detach() for name, p in model.named_parameters()})
    assert all(p.data_ptr() % 64 == flat.weights.data_ptr() % 64 for p in model.parameters())
    spans = sorted((flat.offsets[name], flat.offsets[name] + w.numel()) for name, w in before.items())
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))
    assert spans[-1][1] <= len(flat.weights)
    flat.weights.mul_(2)
    assert all(torch.equal(p, 2 * before[name]) for name, p in model.named_parameters())
    x = torch.randint(0, hp.vocab_size, (2, 17))
    model(x[:, :-1], x[:, 1:]).backward()
    for name, p in model.named_parameters():
        view = flat.view(flat.grads, name)
        assert torch.equal(view, p.grad) and view.data_ptr() == p.grad.data_ptr()
    assert flat.grads.norm() > 0 and torch.equal(flat.grads, flat.reduced[: len(flat.grads)])
    padding = torch.ones(len(flat.weights), dtype=torch.bool)
    for low, high in spans:
        padding[low:high] = False
    assert flat.weights[padding].abs().sum() == 0 == flat.grads[padding].abs().sum()


def test_the_slots_ride_at_the_end_of_the_gradients(hp):
    flat = tg.FlatParameters(random_model(hp))
    for value, slot in enumerate(flat.slot.values(), start=1):
        slot.fill_(value)
    assert flat.reduced[len(flat.grads) :].tolist() == [1.0, 2.0, 3.0] == flat.slots.tolist()
    assert list(flat.slot) == ["loss", "clock", "stop"] and flat.grads.norm() == 0


def test_state_dict_is_the_model_s(hp):
    model = random_model(hp)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    flat = tg.FlatParameters(model)
    assert same(flat.state_dict(), before) and not any(w.requires_grad for w in flat.state_dict().values())
    tg.GPT(hp).load_state_dict(flat.state_dict(), strict=True)


def test_stacks_are_views_of_neighbours_of_one_shape(hp):
    model = random_model(hp)
    flat = tg.FlatParameters(model)
    wanted = [name for name in flat.parameters if ".attn.c_" in name]
    keys = {name: 1 if name.startswith("blocks.0.") else 2 for name in wanted}
    stacks = flat.stacks(keys)
    assert sum(len(weights) for _, weights, _ in stacks) == len(wanted) > len(stacks)
    members = iter(wanted)  # in the vector's order
    for key, weights, grads in stacks:
        for matrix, gradient in zip(weights, grads):
            name = next(members)
            p = model.get_parameter(name)
            assert keys[name] == key and torch.equal(matrix, p)
            assert (matrix.data_ptr(), gradient.data_ptr()) == (p.data_ptr(), p.grad.data_ptr())
        weights.fill_(7), grads.fill_(3)
    total = sum(model.get_parameter(name).numel() for name in wanted)
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


# ----------------------------------------------------------------------------------------------------------
# A step
# ----------------------------------------------------------------------------------------------------------


def test_a_step_clips_gradients_and_not_the_loss(stepper):
    x, y = stepper.batch()
    with torch.no_grad():
        expected = float(stepper.model(x, y))
    stepper.stream.position = 0
    stepper.step(1.0, 0.9, qat_on=False)
    assert float(stepper.flat.slot["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(stepper.flat.grads.norm()) == pytest.approx(stepper.hp.grad_clip_norm, rel=1e-4)


def test_ranks_start_from_the_weights_of_the_first(hp, shards):
    """A seed alone does not make the ranks equal: orthogonal matrices differ between kinds of CPU."""

    class Follower(tg.World):
        def broadcast_(self, tensor):
            return tensor.fill_(0.25)

    stepper = stepper_of(hp, shards, Follower(hp, {}))
    assert all((p == 0.25).all() for p in stepper.model.parameters())


def test_any_gpu_from_8_gb_runs_pr606_at_the_same_global_batch(monkeypatch):
    """Micro-batches fit into the memory, fill at least a third of what may be taken, and are of one size."""
    hp, free = tg.Hyperparameters.from_env({"PRESET": "pr606"}), 0.0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free / 0.7, math.inf))
    world = SimpleNamespace(on_cuda=True, device=torch.device("cuda"), tuning=tg.TUNING["cuda"])
    for gigabytes in (8, 12, 16, 24, 40, 80, 141):
        free = 0.7e9 * gigabytes
        for compiling in (True, False):
            token = tg.activation_bytes(hp, world, compiling)
            for ranks in (1, 2, 3, 8):
                sequences = hp.train_batch_tokens // hp.train_seq_len // ranks
                micro = tg.micro_batch(hp, world, sequences, compiling)
                share = micro * hp.train_seq_len * token / free
                assert share <= 1 and (share > 1 / 3 or micro == sequences), (gigabytes, ranks, compiling)
                assert sequences % micro == 0
    # 71 sequences are prime: nine parts of eight, the last of seven, rather than 71 of one
    free = 8.5 * hp.train_seq_len * tg.activation_bytes(hp, world, True)
    assert tg.micro_batch(hp, world, 71, compiling=True) == 8
    forced = dataclasses.replace(hp, grad_accum_steps=3)
    assert tg.micro_batch(forced, world, 71, compiling=True) == 24


def test_micro_batches_on_a_cpu_follow_the_width():
    whole_step, of_1024, of_2048 = 16, 4, 2
    for preset, micro in (("smoke", whole_step), ("pr601", of_1024), ("pr606", of_2048)):
        hp = tg.Hyperparameters.from_env({"PRESET": preset, "DEVICE": "cpu"})
        sequences = hp.train_batch_tokens // hp.train_seq_len
        assert tg.micro_batch(hp, tg.World(hp, {}), sequences, compiling=False) == micro


def spans_by_hand(text, batch_tokens, seq_len):
    """The sequences of the first step: eight spans in a row, over the ends of shards and epochs."""
    length = batch_tokens // 8
    endless = text * (2 * batch_tokens // len(text) + 2)
    spans = [endless[i * (length + 1) : (i + 1) * (length + 1)] for i in range(8)]
    return [tuple(span[at : at + seq_len + 1]) for span in spans for at in range(0, length, seq_len)]


def first_step(hp, shards, size=1, accumulation=1, qat_on=False):
    """The gradient vector of a first step, summed over ranks, and the sequences that their models got."""
    hp = dataclasses.replace(hp, grad_accum_steps=accumulation, grad_clip_norm=0.0)
    total, seen = 0, []
    for rank in range(size):
        stepper, calls = stepper_of(hp, shards, Rank(hp, rank, size)), []

        def watched(_, given, calls=calls):
            x, y, _ = given
            assert torch.equal(x[:, 1:], y[:, :-1])
            calls.append(len(x))
            seen.extend((*row, last) for row, last in zip(x.tolist(), y[:, -1].tolist()))

        stepper.model.register_forward_pre_hook(watched)
        stepper.step(0.2, 0.9, qat_on, elapsed=6.0, stop=rank == 1)
        total = total + stepper.flat.reduced
        assert max(calls) == -(-sum(calls) // accumulation) and len(calls) == -(-sum(calls) // max(calls))
    return total, seen


SLOTS = len(tg.FlatParameters.SLOTS)
RANKS_AND_STEPS = [(1, 5), (1, 16), (2, 1), (2, 4), (3, 1), (3, 2), (4, 4)]
SHARDS = {"long": (5000, 800), "short and many": (150, 65, 400), "one, shorter than a step": (300,)}


@pytest.mark.parametrize(("length", "qat_on"), [*zip(SHARDS, (True, False, False))])
def test_a_step_is_the_same_on_any_ranks_and_micro_steps(hp, length, qat_on):
    """Each sequence once; gradient and loss of the mean over all of them; clock and stop request arrive."""
    hp = dataclasses.replace(hp, train_batch_tokens=256, train_seq_len=16, num_layers=2, ve_layers=(1,))
    rng = np.random.default_rng(0)
    shards = [rng.integers(0, hp.vocab_size, size).astype(np.uint16) for size in SHARDS[length]]
    rows = spans_by_hand(np.concatenate(shards).tolist(), 256, 16)
    expected, seen = first_step(hp, shards, qat_on=qat_on)
    assert seen == rows
    if not qat_on:
        model, rows = random_model(hp), torch.tensor(rows)
        model(rows[:, :-1], rows[:, 1:]).backward()
        grads = by_name(tg.FlatParameters(random_model(hp)), expected[:-SLOTS])
        for name, p in model.named_parameters():
            expected_grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(grads[name], expected_grad, rtol=1e-3, atol=1e-6)
    for size, accumulation in RANKS_AND_STEPS if length == "long" else [(3, 2)]:
        total, again = first_step(hp, shards, size, accumulation, qat_on)
        assert again == seen, (size, accumulation)
        assert (total[:-SLOTS] - expected[:-SLOTS]).norm() <= 1e-5 * expected[:-SLOTS].norm(), (
            size,
            accumulation,
        )
        loss, clock, stop = total[-SLOTS:].tolist()
        assert loss == pytest.approx(float(expected[-SLOTS]), rel=1e-6)
        assert clock == pytest.approx(6.0) and stop == (size > 1)


@pytest.fixture(scope="module")
def documents(hp):
    """Settings, weights, a text of many documents, and the reference's loss with and without the reset."""
    hp = dataclasses.replace(
        hp, train_batch_tokens=64, train_seq_len=16, eval_seq_len=16, eval_stride=16, num_layers=2,
        ve_layers=(1,), ttt_lr=0.0, ttt_chunk_tokens=16, ttt_temperature=1.0,
    )  # fmt: skip
    text = torch.randint(2, hp.vocab_size, (65,), generator=torch.Generator().manual_seed(3))
    text[5::9] = 1
    state = random_model(hp).state_dict() | {"smear.gate": 1 + draw("smear.gate", (hp.model_dim,))}
    x, y, found = text[:-1].view(4, 16), text[1:].view(4, 16), {}
    for reset in (True, False):
        setting = dataclasses.replace(hp, smear_reset_at_bos=reset)
        found[reset] = float(reference_loss(state, setting, x, y, EPS32))
    assert abs(found[True] - found[False]) > 1e-3
    return hp, state, text, found


@pytest.mark.parametrize("reset", [True, False])
def test_smear_reset_holds_in_training_scoring_and_ttt(documents, reset):
    hp, state, text, expected = documents
    hp = dataclasses.replace(hp, smear_reset_at_bos=reset)
    model, world, right = tg.GPT(hp), tg.World(hp, {}), pytest.approx(expected[reset], rel=1e-5)
    model.load_state_dict(state)
    counts, tokens = torch.ones(64, dtype=torch.int32), text.int()
    assert tg.evaluate(model, tokens, counts, tg.sliding_windows(64, 16, 16), world).val_loss == right
    tested, proof = tg.evaluate_ttt(model, tokens, counts, world, tg.RunLog(None))
    assert proof["steps"] > 0 and tested.val_loss == right
    stepper = tg.Stepper(hp, model, tg.TokenStream([text.numpy().astype(np.uint16)]), world, compiling=False)
    stepper.step(0.0, 0.0, qat_on=False)
    assert float(stepper.flat.slot["loss"]) == right


def snapshot(part):
    """All of a part's state as text."""
    digest = lambda tensor: f"{tensor.dtype} {hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}"
    return json.dumps(part.state_dict(), default=digest, sort_keys=True)


def test_warm_up_restores_everything_bit_for_bit(hp, shards):
    stepper, met = stepper_of(dataclasses.replace(hp, warmup_steps=3), shards), []
    weights, initial = stepper.flat.weights.clone(), snapshot(stepper)
    stepper.model.register_forward_pre_hook(lambda *_: met.append(stepper.flat.weights.clone()))
    stepper.warm_up()
    moved = [changed(by_name(stepper.flat, weights), by_name(stepper.flat, each)) for each in met]
    assert moved[0] == set(stepper.model.max_codes("matrix"))  # once with QAT, so that it is compiled
    assert "tok_emb.weight" in moved[1] & moved[2] and not torch.equal(met[1], met[2])  # it did train
    assert torch.equal(stepper.flat.weights, weights) and snapshot(stepper) == initial


@pytest.mark.parametrize("qat_on", [False, True])
def test_a_step_does_not_wait_for_the_device(monkeypatch, stepper, qat_on):
    """No call that would copy a tensor to the host, nor a number to the device but by a kernel's argument."""
    stepper.step(0.2, 0.9, qat_on)  # states exist
    calls, reading = [], "item tolist __bool__ __float__ __int__ __index__ numpy nonzero cpu".split()

    def note(owner, name, counts=lambda *_: True):
        real = getattr(owner, name)

        def noted(value, *args, **options):
            calls.extend([name] * counts(value))
            return real(value, *args, **options)

        monkeypatch.setattr(owner, name, noted)

    for name in reading:
        note(torch.Tensor, name)
    for name in ("tensor", "as_tensor"):
        note(torch, name, lambda value: not isinstance(value, torch.Tensor))
    stepper.step(0.1, 0.9, qat_on)
    assert calls == []
    tg.soft_round(torch.zeros(2), 3.0)
    assert calls.pop() == "as_tensor"
    float(stepper.flat.slot["loss"])
    assert calls == ["__float__"]  # the spies work


# ----------------------------------------------------------------------------------------------------------
# What is known of finished steps
# ----------------------------------------------------------------------------------------------------------


def test_telemetry_is_read_late_where_the_host_runs_ahead(hp):
    clock, slots, reports = tg.Clock(0.0), torch.zeros(3), []
    telemetry = tg.Telemetry(tg.World(hp, {}), clock)
    for step in range(3):
        slots.copy_(torch.tensor([step / 2, 10.0 * step, step == 1]))  # the next step's overwrite these
        telemetry.post(step, 1.0 - step / 4, slots)
        reports.append([*telemetry.read(lag=1)])
        assert telemetry.stopping == (step == 2)
    assert reports == [[], [(1, 1.0, 0.0)], [(2, 0.75, 0.5)]]
    assert (clock.agreed, clock.agreed_step) == (10.0, 0)  # when step 2 began, none was known to be done
    assert [*telemetry.read(lag=0)] == [(3, 0.5, 1.0)] and (clock.agreed, clock.agreed_step) == (20.0, 1)


def test_a_log_line_gives_speed_and_share_of_the_matrix_rate(hp):
    run = run_of(hp, world=SimpleNamespace(matrix_rate=lambda: 4e12, size=2))
    clock = tg.Clock(30.0)
    clock.before = 10.0
    step_log = tg.StepLog(run, clock, first_step=5, bpb_per_nat=0.5, flops=1.6e12)
    clock.before = 14.0  # five steps of 0.8 s, of which the products take 0.2 s at two times 4 TFLOP/s
    for step in (hp.train_log_every, hp.train_log_every + 1):
        step_log(step, scale=0.5, loss=3.0)
    _, line, status = run.log.lines
    wanted = (
        f"step:10/{STEPS} train_loss:3.0000 train_bpb:1.5000 lr_scale:0.5000 time:14.0s step_avg:800.0ms "
        "tokens/s:1280 mfu:25.0% left:11s"
    )
    assert sorted(line.split()) == sorted(wanted.split())
    assert status.startswith(f"status step:11/{STEPS} train_loss:3.0000")
    assert step_log.pace(15) == 0.4


def test_compile_auto_is_for_cuda_where_the_compiler_is_whole(monkeypatch, tmp_path, hp):
    (tmp_path / "g++").touch(mode=0o755)
    (tmp_path / "triton").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    setting = lambda value: dataclasses.replace(hp, compile=value)
    cpu, cuda = SimpleNamespace(on_cuda=False), SimpleNamespace(on_cuda=True)
    assert tg.wants_compile(setting("auto"), cuda)
    assert not tg.wants_compile(setting("auto"), cpu)
    for world in (cpu, cuda):
        assert tg.wants_compile(setting("1"), world)
        assert not tg.wants_compile(setting("0"), world)
    for name in ("g++", "triton"):
        (tmp_path / name).rename(tmp_path / "elsewhere")
        with pytest.raises(
            tg.UserError, match=re.escape(f"torch.compile needs {name}: apt-get install g++, pip")
        ):
            tg.wants_compile(setting("auto"), cuda)
        assert not tg.wants_compile(setting("auto"), cpu)
        (tmp_path / "elsewhere").rename(tmp_path / name)


# ----------------------------------------------------------------------------------------------------------
# Averages
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "snapshots", "exports"), [
    ("ema", 0, "ema"), ("swa", 2, "swa"), ("swa", 0, "none"), ("none", 2, "none"),
])  # fmt: skip
def test_the_average_that_is_asked_for_is_exported(hp, shards, kind, snapshots, exports):
    run = run_of(dataclasses.replace(hp, averaging=kind))
    stepper = stepper_of(run.hp, shards)
    flat = stepper.flat
    ema, swa, raw = tg.EMA(flat.weights, 0.9), tg.SWA(flat.weights), flat.weights.clone()
    ema.average.mul_(2)
    for factor in (3, 5)[:snapshots]:
        swa.update(factor * raw)
    proof = tg.export_average(run, stepper.model, stepper, ema, swa)["averaging"]
    torch.testing.assert_close(flat.weights, {"ema": 2, "swa": 4, "none": 1}[exports] * raw)
    assert proof["exported"] == exports and proof["swa_snapshots"] == snapshots
    assert proof["distance_from_raw"] == pytest.approx({"ema": 1, "swa": 3, "none": 0}[exports], rel=1e-5)
    assert any("SWA has no snapshot" in line for line in run.log.lines) == (kind != exports)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, env):
    """A whole run: its folder, in which checkpoints stay (checkpoint-4.pt, ...), the weights that a step's
    model met, those that the step left, and what the optimisers were told."""
    folder, met, left, told = tmp_path_factory.mktemp("reference"), [], [], []

    def before(world, _):
        met.append(world.weights.clone())

    def after(world, step):
        left.append(world.weights.clone())
        if step > 4 and step % 4 == 1:
            shutil.copy(folder / "logs/run/checkpoint.pt", folder / f"checkpoint-{step - 1}.pt")

    def before_update(optimiser, *_):
        told.append([(group["lr"], group.get("momentum")) for group in optimiser.param_groups])

    hook = register_optimizer_step_pre_hook(before_update)
    run(folder, env, before=before, after=after)
    hook.remove()
    assert len(left) == STEPS
    return SimpleNamespace(folder=folder, met=met[:STEPS], left=left, told=told)


@pytest.mark.whole
def test_averages_follow_their_closed_forms(reference, hp):
    """Of the weights that all steps left; of every third step's, once the rate is low enough."""
    fading = [0.9 ** (STEPS - 1 - i) for i in range(STEPS)]
    ema = sum(w * weights.double() for w, weights in zip(fading, reference.left)) / sum(fading)
    taken = [i for i in range(STEPS) if (STEPS - i) / 16 < 0.8 and (i + 1) % 3 == 0]
    swa = torch.stack([reference.left[i].double() for i in taken]).mean(0)
    state = kept(reference.folder)
    for average, expected in ((state["ema"]["average"], ema), (state["swa"]["average"], swa)):
        torch.testing.assert_close(average.double(), expected, rtol=1e-4, atol=1e-6)
        assert (average - reference.left[-1]).norm() > 1e-3 * average.norm()
    assert state["swa"]["count"] == len(taken) >= 3
    assert same(exported(reference.folder), by_name(tg.FlatParameters(tg.GPT(hp)), state["ema"]["average"]))
    result, text = result_of(reference.folder), (reference.folder / "logs/run/log.txt").read_text()
    proof = result["proofs"]["averaging"]
    assert proof["exported"] == "ema" and proof["distance_from_raw"] > 0.01
    assert re.search(r"^proof technique:averaging .*exported:ema ", text, re.M)
    assert result["budget"]["training"]["counted"]["average and proofs"] > 0  # inside the budget


@pytest.mark.whole
def test_qat_rounds_the_matrices_of_late_steps_alone(reference, hp):
    """A step meets the weights as the one before left them, and from the start of QAT on rounded matrices."""
    model = tg.GPT(hp)
    flat, matrices = tg.FlatParameters(model), set(model.max_codes("matrix"))
    for step in range(2, STEPS + 1):
        met, left = (by_name(flat, each) for each in (reference.met[step - 1], reference.left[step - 2]))
        assert changed(met, left) == (matrices if step >= FIRST_QAT else set()), step
    qat = result_of(reference.folder)["proofs"]["qat"]
    assert qat["first_step"] == FIRST_QAT and qat["distance_before"] == pytest.approx(0.25, abs=0.01)
    assert qat["distance_raw"] < qat["distance_before"] - 0.02 and qat["loss"] != qat["loss_rounded"]
    text = (reference.folder / "logs/run/log.txt").read_text()
    for line in (f"qat:on step:{FIRST_QAT} ", f"proof technique:qat first_step:{FIRST_QAT} "):
        assert f"\n{line}" in text


@pytest.mark.whole
def test_the_schedules_reach_the_optimisers(reference, hp):
    """Muon's update and AdamW's of every step, by hand: a warmdown over 16 steps, momentum to 0.95 in 100."""
    lines, base = metrics(reference.folder), (hp.matrix_lr, hp.tied_embed_lr, hp.scalar_lr)
    assert len(reference.told) == 2 * STEPS
    for step, (muon, adamw) in enumerate(zip(reference.told[::2], reference.told[1::2])):
        scale = min(1, (STEPS - step) / 16)
        assert [lr for lr, _ in muon + adamw] == pytest.approx([scale * lr for lr in base])
        assert muon[0][1] == pytest.approx(0.85 + 0.10 * step / 100)
        assert lines[step + 1]["lr_scale"] == scale


@pytest.mark.whole
def test_the_log_lists_groups_that_hold_every_parameter(reference, hp):
    text = (reference.folder / "logs/run/log.txt").read_text()
    pattern = r"^optimiser group:(\w+) .*tensors:(\d+) params:(\d+) lr:(\S+) weight_decay:(\S+)"
    groups = re.findall(pattern, text, re.M)
    parameters = dict(tg.GPT(hp).named_parameters())
    assert sum(int(params) for _, _, params, _, _ in groups) == sum(p.numel() for p in parameters.values())
    assert sum(int(tensors) for _, tensors, _, _, _ in groups) == len(parameters)
    assert [float(lr) for *_, lr, _ in groups] == [hp.matrix_lr, hp.tied_embed_lr, hp.scalar_lr]
    assert {float(decay) for *_, decay in groups} == {hp.muon_wd, hp.adam_wd}
    matrices = [p.numel() for name, p in parameters.items() if name.endswith(".weight") and "emb" not in name]
    assert int(groups[0][2]) == sum(matrices)
    assert result_of(reference.folder)["params"] == sum(p.numel() for p in parameters.values())


# ----------------------------------------------------------------------------------------------------------
# A checkpoint
# ----------------------------------------------------------------------------------------------------------


def checkpoint_of(hp, shards, folder, **settings):
    """The checkpoint of a run that begins, and its parts."""
    run, stepper = run_of(hp, folder), stepper_of(hp, shards)
    parts = dict(stepper=stepper, ema=tg.EMA(stepper.flat.weights, 0.9), swa=tg.SWA(stepper.flat.weights))
    return tg.Checkpoint(run, {"seed": 1, "matrix_lr": 0.5} | settings, parts | {"clock": tg.Clock(50.0)})


@pytest.fixture
def saved(hp, shards, tmp_path):
    """One that is saved after two steps, the second with QAT."""
    checkpoint = checkpoint_of(hp, shards, tmp_path)
    stepper, ema, swa, clock = checkpoint.parts.values()
    for step in range(2):
        if step:
            stepper.qat.begin(step, 1.25)
        stepper.step(0.2, 0.9, stepper.qat.on)
        ema.update(stepper.flat.weights), swa.update(stepper.flat.weights)
    clock.limit, clock.before, clock.agreed, clock.agreed_step = 100.0, 7.0, 6.0, 2
    checkpoint.save(2)
    return checkpoint


def snapshots(checkpoint):
    return {name: snapshot(part) for name, part in checkpoint.parts.items()}


def test_a_checkpoint_brings_every_part_back(saved, hp, shards, tmp_path):
    """Bit for bit, and the next step is the same; the limit of the clock is the new run's."""
    fresh = checkpoint_of(hp, shards, tmp_path)
    assert all(a != b for a, b in zip(snapshots(fresh).values(), snapshots(saved).values()))
    assert fresh.load() == fresh.step == 2
    assert snapshots(fresh) == snapshots(saved) and str(fresh) == "the last checkpoint is of step 2"
    assert fresh.parts["clock"].elapsed == 7.0 and fresh.parts["clock"].limit == 50.0
    for checkpoint in (fresh, saved):
        checkpoint.parts["stepper"].step(0.1, 0.9, checkpoint.parts["stepper"].qat.on)
    assert snapshots(fresh) == snapshots(saved)


def test_other_settings_are_named_and_nothing_is_changed(saved, hp, shards, tmp_path):
    fresh = checkpoint_of(hp, shards, tmp_path, matrix_lr=1.0, train_tokens=5)
    before, data = snapshots(fresh), (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(tg.UserError, match="other MATRIX_LR, TRAIN_TOKENS;"):
        fresh.load()
    assert snapshots(fresh) == before and (tmp_path / "checkpoint.pt").read_bytes() == data


@pytest.mark.parametrize("damage", ["truncated", "empty", "not torch", "another file", "a list", "harm"])
def test_a_damaged_checkpoint_is_refused(saved, hp, shards, tmp_path, damage):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = tmp_path / "checkpoint.pt"
    data = path.read_bytes()
    bytes_of = {"truncated": data[: len(data) // 2], "empty": b"", "not torch": b"hello" * 99}
    objects = {"another file": {"weights": torch.zeros(3)}, "a list": [1, 2], "harm": {"settings": Harm()}}
    path.write_bytes(bytes_of[damage] if damage in bytes_of else tg.saved(objects[damage]))
    with pytest.raises(tg.UserError, match="checkpoint.pt: .*another RUN_ID"):
        checkpoint_of(hp, shards, tmp_path).load()
    assert not (tmp_path / "harm").exists()


def test_weights_that_are_not_finite_are_not_saved(saved, tmp_path):
    data = (tmp_path / "checkpoint.pt").read_bytes()
    saved.parts["stepper"].flat.weights[0] = math.inf
    saved.save(3)
    assert saved.step == 2 and (tmp_path / "checkpoint.pt").read_bytes() == data


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_checkpoint_before(monkeypatch, saved, hp, shards, tmp_path, call):
    """Half written, and before it takes its name."""

    def die(handle, *_):
        if call == "fsync":
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
        raise Killed

    before = snapshots(saved)
    saved.parts["stepper"].step(0.1, 0.9, qat_on=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, die)
        with pytest.raises(Killed):
            saved.save(3)
    fresh = checkpoint_of(hp, shards, tmp_path)
    assert fresh.load() == 2 and snapshots(fresh) == before
    saved.save(3)  # what is left over is in nobody's way
    assert fresh.load() == 3 and sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt"]


# ----------------------------------------------------------------------------------------------------------
# Runs that are interrupted and go on
# ----------------------------------------------------------------------------------------------------------


def interrupted(folder, reference, step):
    """What the reference left when its checkpoint was of that step."""
    (folder / "logs/run").mkdir(parents=True)
    (folder / "logs/run/log.txt").touch()
    shutil.copy(reference.folder / f"checkpoint-{step}.pt", folder / "logs/run/checkpoint.pt")
    return folder


def equals_reference(folder, reference, after=0):
    """Losses after some step, weights and proofs are those of the run that nobody stopped, bit for bit."""
    expected = {step: loss for step, loss in losses(reference.folder).items() if step > after}
    assert losses(folder) == expected and len(expected) == STEPS - after
    assert same(exported(folder), exported(reference.folder))
    assert result_of(folder)["proofs"] == result_of(reference.folder)["proofs"]


FREE = {"TRAIN_LOG_EVERY": "3", "CHECKPOINT_EVERY": "0", "EVAL_STRIDE": "32", "TTT_LR": "0.5"}


@pytest.mark.whole
def test_what_changes_the_weights_must_be_the_same(reference, hp, shards):
    """All settings of model, training and quantiser, arithmetic, text; none of the run and of the score."""
    settings = kept(reference.folder)["settings"]
    assert settings.keys() == {*hp.fields("model", "train", "quantise"), "dtype", "train_tokens"}
    assert settings["train_tokens"] == sum(map(len, shards)) and settings["dtype"] == "float32"
    assert all(settings[name] == getattr(hp, name) for name in hp.fields("model", "train", "quantise"))


@pytest.mark.whole
@pytest.mark.parametrize(("step", "changes"), [(4, {}), (20, FREE)])
def test_a_resumed_run_ends_like_one_that_nobody_stopped(tmp_path, env, reference, step, changes):
    """From before SWA and QAT have begun, and from after, then with other settings that do not matter."""
    run(interrupted(tmp_path, reference, step), env | {"RESUME": "1"} | changes)
    equals_reference(tmp_path, reference, after=step)


@pytest.mark.whole
def test_reading_a_step_late_changes_nothing(tmp_path, env, reference):
    """As on CUDA, where the host runs ahead of the device; nor does a kill after a checkpoint lose a loss."""

    def before(_, step):
        if step == 21:
            raise Killed

    env = env | {"RESUME": "1"}
    with pytest.raises(Killed):
        run(interrupted(tmp_path, reference, 16), env, done=16, lag=1, before=before)
    assert sorted(losses(tmp_path)) == [17, 18, 19, 20] and kept(tmp_path)["step"] == 20
    run(tmp_path, env, lag=1)
    equals_reference(tmp_path, reference, after=16)
    assert kept(tmp_path)["step"] == STEPS
    assert torch.equal(kept(tmp_path)["stepper"]["weights"], reference.left[-1])


@pytest.mark.whole
@pytest.mark.parametrize("last", [10, STEPS])
def test_sigterm_leaves_a_checkpoint_that_goes_on(tmp_path, env, reference, last):
    """In the midst of a run with a warm-up, which moves no loss, known a step later; and in the last step."""
    done, stops = (0, 11) if last == 10 else (20, STEPS)
    env = env | {"CHECKPOINT_EVERY": "0"} | ({"RESUME": "1"} if done else {"WARMUP_STEPS": "3"})
    if done:
        interrupted(tmp_path, reference, done)

    def after(_, step):
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match=f"after step {stops}; .* step {stops}; RUN_ID=run RESUME=1"):
        run(tmp_path, env, done=done, after=after)
    assert kept(tmp_path)["step"] == max(losses(tmp_path)) == stops
    assert not (tmp_path / "logs/run/model.pt").exists()
    run(tmp_path, env | {"RESUME": "1"})
    equals_reference(tmp_path, reference, after=done)


@pytest.mark.whole
def test_a_resume_with_other_settings_or_text_is_refused(tmp_path, env, reference):
    shutil.copytree(env["DATA_PATH"], tmp_path / "data")
    write_shard(tmp_path / "data/fineweb_train_000002.bin", [1] * 5000)
    changes = {"DATA_PATH": str(tmp_path / "data"), "ATTN_BITS": "4", "RESUME": "1"}
    with pytest.raises(tg.UserError, match="DATA_PATH, ATTN_BITS, TRAIN_TOKENS"):
        run(interrupted(tmp_path, reference, 4), env | changes)
    assert kept(tmp_path)["step"] == 4 and not (tmp_path / "logs/run/model.pt").exists()


def test_resume_needs_a_checkpoint(tmp_path, env):
    (tmp_path / "logs/run").mkdir(parents=True)
    (tmp_path / "logs/run/log.txt").write_text("a run that died early\n")
    with pytest.raises(tg.UserError, match="finds no logs/run/checkpoint.pt"):
        run(tmp_path, env | {"RESUME": "1"})
    written = [(path.name, path.read_text()) for path in (tmp_path / "logs/run").iterdir()]
    assert written == [("log.txt", "a run that died early\n")]  # refused before the log is opened


@pytest.mark.whole
def test_a_model_is_saved_before_it_is_scored(tmp_path, env, reference):
    """A run that dies while it scores can go on with STAGES=quantize,evaluate, and all is known of it."""

    def die(_):
        if (tmp_path / "logs/run/model.pt").exists():
            raise Killed

    with pytest.raises(Killed):
        run(interrupted(tmp_path, reference, 20), env | {"RESUME": "1"}, scoring=die)
    equals_reference(tmp_path, reference, after=20)
    assert result_of(tmp_path)["steps"] == STEPS and not result_of(tmp_path)["bpb"]


def poison(moment, step, value, where):
    def hook(world, n):
        if n == step:
            world.weights[where] = value

    return {moment: hook}


ALL = slice(None)


@pytest.mark.whole
@pytest.mark.parametrize(("begin", "every", "message", "finite", "hooks"), [
    pytest.param(4, 2, "loss of step 7 is nan", 6, poison("before", 7, math.nan, ALL), id="in a step"),
    pytest.param(4, 1, "loss of step 7 is nan", 5, poison("after", 6, math.inf, 0), id="by an update"),
    pytest.param(16, 4, "loss of step 18 is nan", 16, poison("after", 17, math.nan, ALL), id="before QAT"),
    pytest.param(20, 4, "not finite after step 24", 20, poison("after", 24, math.nan, ALL), id="at the end"),
])  # fmt: skip
def test_losses_that_are_not_finite(tmp_path, env, reference, begin, every, message, finite, hooks):
    """The message names the step and the last good checkpoint; what an update ruined is not kept."""
    changes = {"RESUME": "1", "CHECKPOINT_EVERY": str(every)}
    with pytest.raises(tg.UserError, match=f"{message}; lower MATRIX_LR.* checkpoint is of step {finite}"):
        run(interrupted(tmp_path, reference, begin), env | changes, done=begin, **hooks)
    state = kept(tmp_path)
    assert state["step"] == finite
    assert torch.isfinite(state["stepper"]["weights"]).all() and torch.isfinite(state["ema"]["average"]).all()
    assert not (tmp_path / "logs/run/model.pt").exists()


def test_without_a_checkpoint_the_message_says_so(hp, tmp_path):
    assert str(tg.Checkpoint(run_of(hp, tmp_path), {}, {})) == "there is no checkpoint"


# ----------------------------------------------------------------------------------------------------------
# The clock
# ----------------------------------------------------------------------------------------------------------


class Seconds:
    """A clock of the machine that goes when a test says so."""

    def __init__(self, now=5000.0):
        self.now = now

    def __call__(self):
        return self.now

    def takes(self, seconds):
        def pass_by(*_):
            self.now += seconds

        return pass_by


@pytest.fixture(scope="module")
def timed(tmp_path_factory, env):
    """20 s of steps of 1 s, the last ten the warmdown; a forward pass that scores takes 100 s. No QAT,
    whose proof would be a pass more."""
    folder, clock, weights = tmp_path_factory.mktemp("timed"), Seconds(), []
    env = env | {
        "MAX_WALLCLOCK_SECONDS": "20", "ITERATIONS": "1000", "WARMDOWN_ITERS": "10", "WARMUP_STEPS": "3",
        "VAL_LOSS_EVERY": "7", "LATE_QAT_THRESHOLD": "0",
    }  # fmt: skip

    def after(world, step):
        weights.append(world.weights.clone())
        if step == 13:
            shutil.copy(folder / "logs/run/checkpoint.pt", folder / "checkpoint-12.pt")

    run(folder, env, clock, before=clock.takes(1), scoring=clock.takes(100), after=after)
    return SimpleNamespace(folder=folder, env=env, left=weights)


WARMDOWN = [*[1.0] * 10, *[1 - i / 10 for i in range(10)]]


@pytest.mark.whole
def test_the_clock_stands_still_during_warm_up_and_validation(timed):
    lines = metrics(timed.folder)
    assert [lines[step]["seconds"] for step in sorted(lines)] == list(range(1, 21))
    validations = metrics(timed.folder, "validation")
    assert {step: line["seconds"] for step, line in validations.items()} == {7: 7, 14: 14}
    facts = result_of(timed.folder)
    assert facts["train_seconds"] == facts["steps"] == 20 and facts["step_ms"] == 1000
    budget = facts["budget"]["training"]
    assert budget["counted"]["train"] == budget["used"] == 20 and budget["within"]
    assert budget["uncounted"] == {"warm-up": 3, "validation": 200, "float": 100, "save": 0}


@pytest.mark.whole
def test_warmdown_and_end_follow_the_wall_clock(timed):
    lines = metrics(timed.folder)
    assert [lines[step]["lr_scale"] for step in sorted(lines)] == pytest.approx(WARMDOWN)


@pytest.mark.whole
def test_a_validation_scores_the_weights_of_its_step(timed, hp):
    model = tg.GPT(hp)
    tg.FlatParameters(model).weights.copy_(timed.left[6])
    tokens = tg.Validation.load(hp, tg.World(hp, {})).tokens.long()
    with torch.no_grad():
        expected = float(model(tokens[:-1].view(-1, hp.eval_seq_len), tokens[1:].view(-1, hp.eval_seq_len)))
    assert metrics(timed.folder, "validation")[7]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.whole
def test_a_resumed_clock_goes_on_where_it_stood(timed, tmp_path):
    """The checkpoint of step 12 holds 12 s, and the warmdown goes on from there, an hour later."""
    clock = Seconds(now=9000.0)
    env = timed.env | {"RESUME": "1"}
    run(interrupted(tmp_path, timed, 12), env, clock, before=clock.takes(1), scoring=clock.takes(100))
    lines = metrics(tmp_path)
    assert {step: line["seconds"] for step, line in lines.items()} == {step: step for step in range(13, 21)}
    assert [lines[step]["lr_scale"] for step in sorted(lines)] == pytest.approx(WARMDOWN[12:])


@pytest.mark.whole
def test_where_the_host_runs_ahead_it_stops_a_step_earlier(timed, tmp_path):
    env, clock = timed.env | {"MAX_WALLCLOCK_SECONDS": "6", "WARMUP_STEPS": "0"}, Seconds()
    run(tmp_path, env, clock, lag=1, waited=clock.takes(1))
    assert sorted(metrics(tmp_path)) == list(range(1, 6)) and result_of(tmp_path)["train_seconds"] == 5


@pytest.mark.whole
def test_the_wall_clock_holds_calibration_and_packing(tmp_path, env):
    """A step takes 4 s, a pass of the calibration 3 s, a stack of matrices 0.5 s: all ends inside 80 s."""
    env = env | {
        "MAX_WALLCLOCK_SECONDS": "80", "ITERATIONS": "1000", "WARMDOWN_ITERS": "5", "LATE_QAT_THRESHOLD": "0",
        "STAGES": "train,quantize",
    }  # fmt: skip
    clock, model = Seconds(), tg.GPT(tg.Hyperparameters.from_env(env))
    run(tmp_path, env, clock, before=clock.takes(4), scoring=clock.takes(3), quantised=clock.takes(0.5))
    facts = result_of(tmp_path)
    budget, reserve = facts["budget"]["training"], facts["reserve_seconds"]
    solve = 0.5 * len({model.get_parameter(name).shape for name in model.max_codes("matrix")})
    # an eighth of the calibration is one pass, like all of it; two solves; some more
    assert reserve == pytest.approx(1.15 * (8 * 3 + 2 * solve) + 0.5)
    assert budget["uncounted"]["rehearsal"] == 3 + 3 + solve
    assert budget["counted"]["calibrate"] == 3 and budget["counted"]["quantise and pack"] >= solve
    assert budget["used"] == pytest.approx(sum(budget["counted"].values())) and budget["limit"] == 80
    assert (
        76 - reserve < facts["train_seconds"] == 4 * facts["steps"] <= 80 - reserve
    )  # it used what was left
    scales = [line["lr_scale"] for _, line in sorted(metrics(tmp_path).items())]
    assert scales[0] == 1 and scales[-1] <= 0.4  # the warmdown ends with the clock, the reserve kept back
    assert budget["within"] and (tmp_path / "logs/run/artifact.bin").is_file()


def test_a_clock_too_short_to_quantise_is_refused(tmp_path, env):
    with pytest.raises(tg.UserError, match="MAX_WALLCLOCK_SECONDS"):
        run(tmp_path, env | {"MAX_WALLCLOCK_SECONDS": "0.2", "STAGES": "train,quantize"})


@pytest.mark.whole
def test_late_qat_stays_on_when_the_clock_relents(tmp_path, env, hp):
    """Step 4 takes 20 s of 40, so that the warmdown has come; fast steps after it raise the rate again."""
    clock, met, left = Seconds(), [], []

    def before(world, step):
        clock.now += 20 if step == 4 else 1 if step < 4 else 0.01
        met.append(world.weights.clone())

    def after(world, _):
        left.append(world.weights.clone())

    env = env | {"MAX_WALLCLOCK_SECONDS": "40", "ITERATIONS": "14", "WARMDOWN_ITERS": "5"}
    run(tmp_path, env, clock, before=before, after=after)
    rounded = [not torch.equal(a, b) for a, b in zip(met[1:8], left)]
    assert rounded == [False] * 4 + [True] * 3  # steps 2 to 8
    scales = [line["lr_scale"] for _, line in sorted(metrics(tmp_path).items())]
    assert scales[5] < hp.late_qat_threshold < min(scales[6:8])
