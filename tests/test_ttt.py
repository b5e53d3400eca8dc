"""Score-first test-time training: each position once, nothing seen before its score, loops in float64."""

import copy
import dataclasses
import functools
import itertools
import math
import threading
import time

import numpy as np
import pytest
import torch
from conftest import random_model

import train_gpt as tg

SIZE, SEQ, STRIDE = 64, 32, 8
POSITIONS = 5 * SIZE + SEQ  # the last chunk is half a chunk
SMALL = {
    "PRESET": "smoke", "DTYPE": "fp32", "DEVICE": "cpu", "VOCAB_SIZE": "48", "NUM_LAYERS": "2",
    "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "MLP_MULT": "2", "ROPE_DIMS": "8",
    "XSA_LAST_N": "1", "BIGRAM_VOCAB_SIZE": "64", "BIGRAM_DIM": "16", "VE_DIM": "16", "VE_LAYERS": "1",
    "TRAIN_BATCH_TOKENS": "256", "TRAIN_SEQ_LEN": "32", "EVAL_SEQ_LEN": f"{SEQ}",
    "EVAL_STRIDE": f"{STRIDE}", "TTT_CHUNK_TOKENS": f"{SIZE}", "TTT_BATCH_SEQS": "2", "TTT_EPOCHS": "2",
    "TTT_LR": "0.003", "TTT_OPTIMIZER": "adamw", "TTT_SCHEDULE": "run", "TTT_TEMPERATURE": "0.98",
    "TTT_PARAMS": "blocks", "TTT_FREEZE_BLOCKS": "2",
}  # fmt: skip


def settings(**changes):
    return tg.Hyperparameters.from_env(SMALL | {name.upper(): str(value) for name, value in changes.items()})


def a_model(hp, spread=0.2):
    return random_model(hp, seed=3, spread=spread)


def some_text(positions=POSITIONS, seed=0, vocab=48):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab, (positions + 1,), generator=generator, dtype=torch.int32)


def byte_counts(tokens):
    return torch.arange(len(tokens) - 1) % 5


def run_ttt(hp, tokens, model=None, world=None, log=None, nll=None, **options):
    """Score, losses per position, proof."""
    nll = torch.full((len(tokens) - 1,), math.nan) if nll is None else nll
    given = (
        model or a_model(hp),
        tokens,
        byte_counts(tokens),
        world or tg.World(hp, {}),
        log or tg.RunLog(None),
    )
    score, proof = tg.evaluate_ttt(*given, nll=nll, **options)
    return score, nll, proof


@functools.cache
def usual_losses(**changes):
    """Of some_text(), left alone by its readers."""
    return run_ttt(settings(**changes), some_text())[1]


class Watched(tg.ChunkTrainer):
    """Calls before(tokens, first, end, chunk) ahead of a chunk's training; keeps the targets of every step.

    Where `before` returns tokens, the training is on those.
    """

    def __init__(self, model, before=lambda *_: None):
        super().__init__(model, model.hp, tg.World(model.hp, {}))
        self.before, self.targets = before, []

    def train(self, tokens, first, end, chunk, chunks):
        other = self.before(tokens, first, end, chunk)
        super().train(tokens if other is None else other, first, end, chunk, chunks)

    def gradients(self, batch):
        self.targets.append(batch[:, 1:].flatten())
        super().gradients(batch)


# ----------------------------------------------------------------------------------------------------------
# Every position once
# ----------------------------------------------------------------------------------------------------------


class Counting:
    """Takes losses as `nll` does; counts how often each position comes."""

    def __init__(self, positions):
        self.counts, self.nats = np.zeros(positions, int), 0.0

    def __setitem__(self, where, losses):
        np.add.at(self.counts, where.numpy(), 1)
        self.nats += losses.double().sum().item()


LAYOUTS = [(POSITIONS, 8, 64), (POSITIONS, 12, 64), (320, 5, 96), (32, 32, 64), (64, 32, 64), (416, 32, 32)]


@pytest.mark.parametrize(("positions", "stride", "size"), [*LAYOUTS, (160, 1, 64)])
def test_every_position_is_scored_once(positions, stride, size):
    hp = settings(eval_stride=stride, ttt_chunk_tokens=size, ttt_epochs=1)
    tokens, counting = some_text(positions), Counting(positions)
    score, _, proof = run_ttt(hp, tokens, nll=counting)
    assert (counting.counts == 1).all() and score.positions == positions
    assert score.nats == pytest.approx(counting.nats, rel=1e-6)
    assert score.bytes == int(byte_counts(tokens).sum())
    assert proof["chunks"] == -(-positions // size)


def test_without_a_learning_rate_it_is_the_sliding_score():
    hp, tokens = settings(ttt_lr=0, eval_stride=12), some_text()
    nll = torch.zeros(POSITIONS)
    windows = tg.sliding_windows(POSITIONS, SEQ, 12)
    expected = tg.evaluate(
        a_model(hp), tokens, byte_counts(tokens), windows, tg.World(hp, {}), temperature=0.98, nll=nll
    )
    score, losses, proof = run_ttt(hp, tokens)
    torch.testing.assert_close(losses, nll, rtol=1e-5, atol=1e-5)
    assert score.val_bpb == pytest.approx(expected.val_bpb, rel=1e-7)
    assert proof["steps"] > 0 and proof["weight_change"] == 0
    assert float(usual_losses(eval_stride=12).mean()) != pytest.approx(expected.val_loss, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------
# Score before update
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "cut"),
    [(8, 1), (8, SIZE), (8, 3 * SIZE + 17), (8, POSITIONS), (12, 40), (12, SIZE + 1), (12, 3 * SIZE)],
)
def test_losses_do_not_depend_on_later_tokens(stride, cut):
    """The loss of position p is that of token p + 1: tokens from `cut` on change losses from cut - 1 on."""
    tokens, losses = some_text(), usual_losses(eval_stride=stride)
    tokens[cut:] = 2 + (tokens[cut:] + 11) % 40
    others = run_ttt(settings(eval_stride=stride), tokens)[1]
    assert torch.equal(losses[: cut - 1], others[: cut - 1])
    assert not torch.equal(losses[cut - 1 :], others[cut - 1 :])


@pytest.mark.parametrize(("stride", "chunk"), [(8, 0), (12, 2), (8, 4)])
def test_a_chunk_is_scored_before_it_is_trained_on(stride, chunk):
    """Training on chunk c and later ones is replaced by noise: the scores of chunks 0 to c stay."""
    hp, losses = settings(eval_stride=stride), usual_losses(eval_stride=stride)
    model, noise = a_model(hp), some_text(seed=9)
    trainer = Watched(model, lambda text, first, end, c: noise if c >= chunk else None)
    noisy = run_ttt(hp, some_text(), model, trainer=trainer)[1]
    border = (chunk + 1) * SIZE
    assert torch.equal(losses[:border], noisy[:border])
    later = range(border + stride, POSITIONS)  # windows that begin in chunk c may reach into the next one
    assert (losses[later] != noisy[later]).float().mean() > 0.9


@pytest.mark.parametrize(("positions", "stride", "size"), [each for each in LAYOUTS if each[0] > each[2]])
def test_no_target_is_trained_before_it_is_scored(positions, stride, size):
    hp, tokens = settings(eval_stride=stride, ttt_chunk_tokens=size), some_text(positions)
    nll, model, trained = torch.full((positions,), math.nan), None, []

    def check(text, first, end, chunk):
        largest_scored = int(torch.isfinite(nll).nonzero().max())
        assert torch.isfinite(nll[: largest_scored + 1]).all()
        assert end - 1 <= largest_scored  # the target of position end - 1 is token `end`
        assert first == chunk * size and end == (chunk + 1) * size
        trained.append(chunk)

    model = a_model(hp)
    trainer = Watched(model, check)
    run_ttt(hp, tokens, model, nll=nll, trainer=trainer)
    chunks = -(-positions // size)
    assert trained == list(range(chunks - 1))  # in order, and never the last one
    rows = tokens[1 : (chunks - 1) * size + 1].view(-1, size)
    expected = torch.cat([rows] * hp.ttt_epochs, dim=1).flatten().long()
    assert torch.equal(torch.cat(trainer.targets), expected)  # every epoch, each target once, in order


# ----------------------------------------------------------------------------------------------------------
# Any number of ranks
# ----------------------------------------------------------------------------------------------------------


class Meeting:
    """Where the threads that stand for ranks exchange tensors."""

    def __init__(self, size):
        self.brought, self.barrier = [None] * size, threading.Barrier(size, timeout=60)

    def gather(self, rank, thing):
        self.brought[rank] = thing
        self.barrier.wait()
        everything = list(self.brought)
        self.barrier.wait()
        return everything


def rank_world(hp, rank, size, meeting, after_sum=lambda rank, tensor, sums: None):
    """A World of one rank among `size` threads; its collectives add in the order of the ranks.

    after_sum  is given every sum, counted from 1, on every rank
    """
    world, sums = copy.copy(tg.World(hp, {})), itertools.count(1)
    world.rank, world.size, world.grouped = rank, size, size > 1

    def sum_(tensor):
        tensor.copy_(sum(meeting.gather(rank, tensor.clone())))
        after_sum(rank, tensor, next(sums))
        return tensor

    world.sum_ = sum_
    world.max = lambda value: max(meeting.gather(rank, value))
    return world


def run_ranks(size, hp, tokens, change=lambda rank, model: None, after_sum=lambda *_: None, **options):
    """Per rank: score, losses, proof and weights, or the error that stopped it."""
    meeting, results, models = Meeting(size), [None] * size, [a_model(hp) for _ in range(size)]

    def one(rank):
        change(rank, models[rank])
        world = rank_world(hp, rank, size, meeting, after_sum)
        try:
            results[rank] = *run_ttt(hp, tokens, models[rank], world, **options), models[rank].state_dict()
        except tg.UserError as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(("size", "batch"), [(2, 3), (3, 2), (5, 3)])
def test_ranks_take_equal_steps_and_agree(size, batch):
    """Batches of 2 and 3 sequences leave some of 5 ranks without any; their weights must not drift apart."""
    hp, tokens = settings(ttt_batch_seqs=batch, ttt_chunk_tokens=5 * SEQ), some_text(11 * SEQ + 8)
    one = run_ttt(hp, tokens)
    ranks = run_ranks(size, hp, tokens)
    steps = 2 * hp.ttt_epochs * -(-5 // batch)  # two of three chunks are trained
    assert [proof["steps"] for _, _, proof, _ in ranks] == [steps] * size
    for _, _, _, weights in ranks:
        assert all(torch.equal(weights[name], value) for name, value in ranks[0][3].items())
    for score, _, _, _ in ranks:
        assert (score.positions, score.bytes) == (one[0].positions, one[0].bytes)
        assert score.val_bpb == pytest.approx(one[0].val_bpb, abs=1e-5)
    scored = torch.stack([torch.isfinite(nll) for _, nll, _, _ in ranks]).sum(0)
    assert (scored == 1).all()  # each position by one rank
    assert ranks[0][2]["weight_change"] == pytest.approx(one[2]["weight_change"], rel=1e-3)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_drift_apart_stop_the_run(size):
    def drift(rank, model):
        with torch.no_grad():
            model.skip_weights[0, 0] += 1e-6 * (rank == size - 1)

    results = run_ranks(size, settings(ttt_params="all"), some_text(), drift)
    assert all("weights differ after TTT chunk 0" in str(error) for error in results)


@pytest.mark.parametrize("chunk", [1, 4])
def test_every_chunk_ends_with_a_checksum(chunk):
    """A sum of gradients that comes out otherwise on one of three ranks stops all, right after its chunk.

    A chunk makes three sums: its score's, and one for each of its two steps.
    """

    def spoil(rank, tensor, sums):
        if sums == 3 * chunk + 3 and rank == 2:
            tensor.add_(0.1)

    results = run_ranks(3, settings(), some_text(), after_sum=spoil)
    assert all(f"weights differ after TTT chunk {chunk}" in str(error) for error in results)


def test_in_bf16_ranks_agree_too():
    """From weights as training starts with, of which bf16 leaves more than of those that are drawn wide."""
    hp = settings(dtype="bf16", ttt_optimizer="sgd", ttt_lr=0.1, ttt_params="all")
    tokens = some_text(3 * SIZE + 8)
    torch.manual_seed(3)
    fresh = tg.GPT(hp).state_dict()

    def scores(size, hp):
        ranks = run_ranks(size, hp, tokens, lambda rank, model: model.load_state_dict(fresh))
        assert len({proof["steps"] for _, _, proof, _ in ranks}) == 1
        return [score.val_bpb for score, *_ in ranks]

    one = scores(1, hp)
    for size in (2, 5):
        assert scores(size, hp) == pytest.approx(one * size, rel=0, abs=1e-4)
    assert scores(1, dataclasses.replace(hp, dtype="fp32")) != one
    assert scores(1, dataclasses.replace(hp, ttt_lr=0.0)) != pytest.approx(one, rel=0, abs=4e-4)


@pytest.mark.parametrize("part", [1, 2, 5])
def test_gradients_are_those_of_the_whole_batch_in_parts(part):
    """Of the mean loss, clipped to norm 1, whatever passes at a time; in the arithmetic of the run."""
    hp, batch = settings(ttt_params="all"), some_text(5 * SEQ + 4)[: 5 * (SEQ + 1)].view(5, SEQ + 1).long()
    model, found = a_model(hp), {}
    loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True)
    expected = torch.cat([g.flatten() for g in grads])
    assert expected.norm() > 1
    for dtype in ("fp32", "bf16"):
        trainer = tg.ChunkTrainer(model, hp, tg.World(settings(dtype=dtype), {}))
        trainer.part = part
        trainer.gradients(batch)
        found[dtype] = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found["fp32"], expected / expected.norm(), rtol=1e-4, atol=1e-6)
    assert 1e-3 < (found["bf16"] - found["fp32"]).norm() < 0.3


# ----------------------------------------------------------------------------------------------------------
# Compiled scoring
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_compiled_scoring_is_the_same_and_compiles_nothing_per_chunk():
    """Weights move from chunk to chunk; the windows of all chunks share one graph, the first one is eager."""
    graphs, graphs_at, tokens = [], [], some_text()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = tg.compiled(tg.token_losses, backend=backend)

    def score_fn(*arguments):
        losses = compiled(*arguments)
        graphs_at.append(len(graphs))
        return losses

    hp = settings(num_layers=1, ve_layers=0, ttt_freeze_blocks=1)
    _, losses, proof = run_ttt(hp, tokens, score_fn=score_fn)
    torch.testing.assert_close(losses, run_ttt(hp, tokens)[1], rtol=1e-5, atol=1e-5)
    assert proof["chunks"] == 6 and proof["weight_change"] > 0
    # Not the first chunk, which the first window shortens, and not the last, with the tail.
    assert graphs_at == [1] * 4


# ----------------------------------------------------------------------------------------------------------
# The learning rate
# ----------------------------------------------------------------------------------------------------------


def test_schedules_at_their_corners():
    run, chunk, constant = (settings(ttt_schedule=kind) for kind in ("run", "chunk", "constant"))
    assert [tg.ttt_lr_scale(run, c, 474, 1, 3) for c in (0, 473)] == pytest.approx([1.0, 0.0])
    assert tg.ttt_lr_scale(run, 100, 474, 2, 3) == pytest.approx(0.5 * (1 + math.cos(math.pi * 100 / 473)))
    assert tg.ttt_lr_scale(run, 0, 1, 0, 3) == 1.0
    steps = (0, 16, 32, 63)
    expected = [0.5 * (1 + math.cos(math.pi * s / 64)) for s in steps]
    assert [tg.ttt_lr_scale(chunk, 7, 474, s, 64) for s in steps] == pytest.approx(expected)
    assert {tg.ttt_lr_scale(constant, c, 474, s, 3) for c in (0, 99, 473) for s in (0, 2)} == {1.0}


@pytest.mark.parametrize(("kind", "share"), [
    ("run", [c / 5 for c in range(5) for _ in range(4)]), ("constant", [0.0] * 20),
    ("chunk", [s / 4 for _ in range(5) for s in range(4)])])  # fmt: skip
def test_every_step_uses_the_schedule(kind, share):
    """Five chunks are trained; a chunk has two batches of one sequence, twice."""
    hp, used = settings(ttt_schedule=kind, ttt_lr=0.5, ttt_batch_seqs=1), []
    model = a_model(hp)
    trainer = Watched(model)
    trainer.optimiser.register_step_pre_hook(lambda opt, *_: used.append(opt.param_groups[0]["lr"]))
    run_ttt(hp, some_text(), model, trainer=trainer)
    assert used == pytest.approx([0.25 * (1 + math.cos(math.pi * x)) for x in share])


# ----------------------------------------------------------------------------------------------------------
# What is trained
# ----------------------------------------------------------------------------------------------------------


def parameter_set(preset):
    with torch.device("meta"):
        return tg.ttt_parameters(tg.GPT(tg.Hyperparameters.from_env({"PRESET": preset})))


def test_pr606_trains_two_blocks_and_all_scales():
    chosen = parameter_set("pr606")
    assert sum(p.numel() for p in chosen.values()) == 5_780_500
    assert "tok_emb.weight" not in chosen and "smear.gate" not in chosen and "skip_weights" not in chosen
    assert "blocks.10.mlp.proj.weight" in chosen and "blocks.9.attn.q_gain" in chosen
    assert "blocks.8.attn_scale" in chosen and "blocks.8.resid_mix" not in chosen and "bigram.scale" in chosen


def test_pr601_trains_control_tensors():
    assert sum(p.numel() for p in parameter_set("pr601").values()) == 25_689


@pytest.mark.parametrize(("kind", "blocks"), [("all", 2), ("blocks", 1), ("control", 2)])
def test_only_the_chosen_parameters_move(kind, blocks):
    hp = settings(ttt_params=kind, ttt_freeze_blocks=blocks)
    model = a_model(hp)
    chosen = set(tg.ttt_parameters(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, _, proof = run_ttt(hp, some_text(), model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    without_gradient = {"blocks.0.attn.vr_lambda"}  # the first layer has nothing to mix
    assert moved == chosen - without_gradient and moved
    assert {name for name, p in model.named_parameters() if p.requires_grad} == chosen
    change = sum(float((p.detach() - before[name]).square().sum()) for name, p in model.named_parameters())
    size = sum(float(before[name].square().sum()) for name in chosen)
    assert proof["weight_change"] == pytest.approx(math.sqrt(change / size), rel=1e-4)
    assert proof["parameters"] == sum(before[name].numel() for name in chosen)


# ----------------------------------------------------------------------------------------------------------
# Against a loop written out
# ----------------------------------------------------------------------------------------------------------


def temperature_of(logits, low):
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1, keepdim=True)
    return (1 - (1 - low) * (1 - entropy / math.log(logits.size(-1)))).clamp(0.9, 1.05)


class Loop:
    """Score-first TTT one window and one sequence at a time, with the optimisers' formulas."""

    def __init__(self, hp, model):
        self.hp, self.model = hp, model
        everything = hp.ttt_params == "all"
        self.weights = {name: p for name, p in model.named_parameters()
                        if everything or name.startswith("blocks.") or "scale" in name}  # fmt: skip
        self.first, self.second, self.steps, self.norms = {}, {}, 0, []

    @torch.no_grad()
    def score(self, tokens, low, high):
        """Losses of positions low..high - 1, each with the context that the layout gives it."""
        losses = []
        for position in range(low, high):
            end = SEQ if position < SEQ else SEQ + ((position - SEQ) // STRIDE + 1) * STRIDE
            end = min(end, len(tokens) - 1)
            logits = self.model(tokens[None, end - SEQ : end].long())[0, position - (end - SEQ)]
            logits = logits / temperature_of(logits, self.hp.ttt_temperature)
            losses.append(-float(logits.log_softmax(-1)[int(tokens[position + 1])]))
        return losses

    def train(self, tokens, chunk, chunks):
        hp, base = self.hp, chunk * SIZE
        rows = [tokens[base + i * SEQ : base + (i + 1) * SEQ + 1].long() for i in range(SIZE // SEQ)]
        for _ in range(hp.ttt_epochs):
            for at in range(0, len(rows), hp.ttt_batch_seqs):
                batch = rows[at : at + hp.ttt_batch_seqs]
                losses = [
                    torch.nn.functional.cross_entropy(self.model(row[None, :-1])[0], row[1:]) for row in batch
                ]
                grads = torch.autograd.grad(
                    sum(losses) / len(batch),
                    list(self.weights.values()),
                    allow_unused=True,
                    materialize_grads=True,
                )
                norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
                self.norms.append(norm)
                clip = min(1.0, 1.0 / (norm + 1e-6))
                self.update({name: g * clip for name, g in zip(self.weights, grads)}, chunk, chunks)

    @torch.no_grad()
    def update(self, grads, chunk, chunks):
        self.steps += 1
        for name, g in grads.items():
            lr = self.hp.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / (chunks - 1)))
            first, second = (state.get(name, torch.zeros_like(g)) for state in (self.first, self.second))
            if self.hp.ttt_optimizer == "sgd":
                self.first[name] = g = self.hp.ttt_momentum * first + g
            else:
                self.first[name], self.second[name] = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
                g = self.first[name] / (1 - 0.9**self.steps)
                g = g / ((self.second[name] / (1 - 0.999**self.steps)).sqrt() + 1e-8)
            self.weights[name] -= lr * g


@pytest.mark.parametrize(("spread", "changes"), [
    (0.2, dict(ttt_optimizer="adamw", ttt_lr=0.01)),
    (0.2, dict(ttt_optimizer="sgd", ttt_lr=0.05, ttt_momentum=0.9, ttt_epochs=3, ttt_batch_seqs=1)),
    (.02, dict(ttt_optimizer="sgd", ttt_lr=0.5, ttt_temperature=0.8, ttt_params="blocks")),
], ids=["adamw", "sgd", "no clip"])  # fmt: skip
def test_ttt_equals_a_loop_written_out(spread, changes):
    hp, positions = settings(**{"ttt_params": "all"} | changes), 2 * SIZE + SEQ
    tokens, model = some_text(positions), a_model(hp, spread).double()
    loop = Loop(hp, copy.deepcopy(model))
    _, losses, proof = run_ttt(hp, tokens, model)
    chunks, expected = 3, []
    for chunk in range(chunks):
        expected += loop.score(tokens, chunk * SIZE, min((chunk + 1) * SIZE, positions))
        if chunk + 1 < chunks:
            loop.train(tokens, chunk, chunks)
    # The clip is part of the comparison, and so is its absence.
    assert min(loop.norms) > 1 if hp.ttt_params == "all" else 0.1 < max(loop.norms) < 1
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    for (name, p), q in zip(model.named_parameters(), loop.model.parameters()):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-8, msg=name)
    assert proof["steps"] == loop.steps


def test_the_temperature_is_used():
    """Before any training the first window differs from the plain loss by the formula, at 1 not at all."""
    tokens = some_text(SIZE)
    targets = tokens[1 : SEQ + 1].long()
    with torch.no_grad():
        logits = a_model(settings())(tokens[None, :SEQ].long())[0]
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    for low in (1, 0.98, 0.8):
        losses = run_ttt(settings(ttt_temperature=low), tokens)[1][:SEQ]
        scaled = logits / temperature_of(logits, low)
        expected = torch.nn.functional.cross_entropy(scaled, targets, reduction="none")
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        assert torch.allclose(losses, plain, atol=1e-4) == (low == 1)


# ----------------------------------------------------------------------------------------------------------
# The clock, and the point of it all
# ----------------------------------------------------------------------------------------------------------


class Timed:
    """A clock that stands but for this: a window takes some seconds, the first more, a chunk's training 1."""

    def __init__(self, monkeypatch, window, compiling=0.0):
        self.now, evaluate = 0.0, tg.evaluate
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

        def timed(model, tokens, counts, windows, *rest):
            self.pass_by(window * len(windows) + compiling * (self.now == 0))
            return evaluate(model, tokens, counts, windows, *rest)

        monkeypatch.setattr(tg, "evaluate", timed)

    def pass_by(self, seconds):
        self.now += seconds

    def run(self, hp, **options):
        model = a_model(hp)
        trainer = Watched(model, lambda *_: self.pass_by(1.0))
        return run_ttt(hp, some_text(), model, tg.World(hp, {}), trainer=trainer, **options)


def test_a_short_clock_stops_the_training_and_not_the_scoring(tmp_path):
    hp, tokens = settings(eval_stride=12), some_text()
    score, nll, proof = run_ttt(hp, tokens, log=tg.RunLog(tmp_path), seconds=1e-9)
    assert proof["untrained_from_chunk"] == 0 and proof["steps"] == 0 and proof["weight_change"] == 0
    assert score.positions == POSITIONS
    torch.testing.assert_close(nll, usual_losses(eval_stride=12, ttt_lr=0), rtol=1e-5, atol=1e-5)
    assert "training stops after chunk 0" in (tmp_path / "log.txt").read_text()
    generous = run_ttt(hp, tokens, seconds=1e6)[2]
    assert generous["untrained_from_chunk"] is None and generous["steps"] == 10


def test_the_clock_is_forecast_from_what_chunks_took(monkeypatch):
    """41 windows and five trainings need 10.125 seconds: with 9.5 one or two chunks are not trained on, and
    that is said before the clock has run out."""
    clock = Timed(monkeypatch, 0.125)
    _, nll, proof = clock.run(settings(), seconds=9.5)
    assert torch.isfinite(nll).all()
    assert proof["untrained_from_chunk"] in (3, 4)  # the forecast keeps a margin
    assert clock.now <= 9.5
    assert (proof["score_seconds"], proof["train_seconds"]) == (41 / 8, proof["untrained_from_chunk"])


@pytest.mark.parametrize("seconds", [5.0, 5.2, 6.0, 7.0, 8.0])
def test_a_clock_with_hardly_room_for_the_scores_is_not_exceeded(monkeypatch, seconds):
    """Scoring takes 5.125 seconds whatever happens, and the first training is forecast before it was seen."""
    clock = Timed(monkeypatch, 0.125)
    _, _, proof = clock.run(settings(), seconds=seconds)
    assert proof["score_seconds"] == 41 / 8 and clock.now <= max(seconds, 41 / 8)
    assert (proof["steps"] > 0) == (seconds >= 8.0)


def test_a_slow_first_chunk_forecasts_nothing(monkeypatch):
    """A compiled scorer takes 100 seconds there and one later: 110 seconds are enough to train on all."""
    clock = Timed(monkeypatch, 0.125, compiling=100.0)
    _, _, proof = clock.run(settings(), seconds=111.0)
    assert proof["untrained_from_chunk"] is None and clock.now == 110.125


def test_progress_of_ttt(monkeypatch, tmp_path):
    """4 seconds a window: a line for every chunk but the last, with the score so far and the steps taken."""
    clock = Timed(monkeypatch, 4.0)
    _, nll, _ = clock.run(settings(), log=tg.RunLog(tmp_path))
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "positions:" in line]
    expected = []
    for chunk in range(5):
        done, seconds = (chunk + 1) * SIZE, 4 * (5 + 8 * chunk) + chunk
        bpb = float(nll[:done].double().sum()) / math.log(2) / int(byte_counts(some_text())[:done].sum())
        expected.append(
            f"ttt positions:{done}/{POSITIONS} val_bpb:{bpb:.4f} tokens/s:{done / seconds:.0f} "
            f"left:{seconds * (POSITIONS - done) / done:.0f}s steps:{2 * chunk}"
        )
    assert lines == expected


@pytest.mark.parametrize("slowest", [0, 1])
def test_ranks_stop_training_together(monkeypatch, slowest):
    """One rank's clock runs, the other's stands still: both leave off after the same chunk."""
    own = threading.local()
    monkeypatch.setattr(time, "perf_counter", lambda: getattr(own, "spent", 0.0))

    def later(rank, tensor, sums):
        """A chunk makes three sums: its score's, of float64, and two steps'; late ones are slow."""
        if rank == slowest and tensor.dtype == torch.float64:
            own.spent = getattr(own, "spent", 0.0) + (1.0 if getattr(own, "spent", 0.0) < 4 else 9.0)

    proofs = [proof for _, _, proof, _ in run_ranks(2, settings(), some_text(), after_sum=later, seconds=18)]
    assert proofs[0]["untrained_from_chunk"] == proofs[1]["untrained_from_chunk"] is not None
    assert proofs[0]["steps"] == proofs[1]["steps"] > 0


def test_weights_that_are_no_numbers_stop_the_run():
    hp = settings(ttt_optimizer="sgd", ttt_params="all", ttt_lr=1e9)
    with pytest.raises(tg.UserError, match="diverged in chunk 0; lower TTT_LR"):
        run_ttt(hp, some_text())


def test_ttt_learns_a_text_that_repeats():
    hp = settings(ttt_lr=0.01, ttt_params="all", ttt_schedule="constant")
    tokens = some_text(2 * SIZE).repeat(4)[: 8 * SIZE + 1]
    trained, still = run_ttt(hp, tokens)[1], run_ttt(settings(ttt_lr=0), tokens)[1]
    assert trained[:SIZE].mean() == pytest.approx(float(still[:SIZE].mean()), rel=1e-6)
    assert trained[-2 * SIZE :].mean() < still[-2 * SIZE :].mean() - 0.5
