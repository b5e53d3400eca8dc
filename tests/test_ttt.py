"""Score-first test-time training: each position once, nothing seen before its score, loops in float64."""

import copy
import dataclasses
import itertools
import math
import threading

import pytest
import torch

import train_gpt as tg

SIZE, SEQ, STRIDE = 64, 32, 8
SMALL = {
    "PRESET": "smoke", "DTYPE": "fp32", "DEVICE": "cpu", "VOCAB_SIZE": "48", "NUM_LAYERS": "2",
    "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "MLP_MULT": "2", "ROPE_DIMS": "8",
    "XSA_LAST_N": "1", "BIGRAM_VOCAB_SIZE": "64", "BIGRAM_DIM": "16", "VE_DIM": "16", "VE_LAYERS": "1",
    "TRAIN_BATCH_TOKENS": "256", "TRAIN_SEQ_LEN": "32", "EVAL_SEQ_LEN": f"{SEQ}",
    "EVAL_STRIDE": f"{STRIDE}", "TTT_CHUNK_TOKENS": f"{SIZE}", "TTT_BATCH_SEQS": "2", "TTT_EPOCHS": "2",
    "TTT_LR": "0.003", "TTT_OPTIMIZER": "adamw", "TTT_SCHEDULE": "run", "TTT_TEMPERATURE": "0.98",
}  # fmt: skip
POSITIONS = 5 * SIZE + SEQ  # the last chunk is half a chunk


def settings(**changes):
    return tg.Hyperparameters.from_env(SMALL | {name.upper(): str(value) for name, value in changes.items()})


def random_model(hp, dtype=torch.float32):
    torch.manual_seed(3)
    model = tg.GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model.to(dtype)


def some_text(positions=POSITIONS, seed=0, vocab=48):
    return torch.randint(
        2, vocab, (positions + 1,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )


def run_ttt(hp, tokens, model=None, **options):
    """Score, losses per position, proof."""
    nll = torch.full((len(tokens) - 1,), math.nan)
    byte_counts = torch.arange(len(tokens) - 1) % 5
    score, proof = tg.evaluate_ttt(
        model or random_model(hp),
        tokens,
        byte_counts,
        hp,
        tg.World(hp, {}),
        tg.RunLog(None),
        nll=nll,
        **options,
    )
    return score, nll, proof


def spy_on_training(monkeypatch, before):
    """Call before(tokens, first, end, chunk) ahead of every chunk's training; it may return other tokens."""
    train = tg.ChunkTrainer.train

    def spied(self, tokens, first, end, chunk, chunks):
        other = before(tokens, first, end, chunk)
        return train(self, tokens if other is None else other, first, end, chunk, chunks)

    monkeypatch.setattr(tg.ChunkTrainer, "train", spied)


# ----------------------------------------------------------------------------------------------------------
# Every position once
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "positions, stride, size",
    [
        (POSITIONS, 8, 64),
        (POSITIONS, 12, 64),
        (320, 5, 96),
        (32, 32, 64),
        (64, 32, 64),
        (416, 32, 32),
        (352, 1, 64),
    ],
)
def test_every_position_is_scored_once(monkeypatch, positions, stride, size):
    hp = settings(eval_stride=stride, ttt_chunk_tokens=size, ttt_epochs=1)
    tokens, counted, evaluate = some_text(positions), torch.zeros(positions, dtype=torch.int), tg.evaluate

    def counting(model, text, byte_counts, windows, *args, **kwargs):
        for _, end, first in windows:
            counted[first:end] += 1
        return evaluate(model, text, byte_counts, windows, *args, **kwargs)

    monkeypatch.setattr(tg, "evaluate", counting)
    score, nll, proof = run_ttt(hp, tokens)
    assert torch.isfinite(nll).all() and (counted == 1).all()
    assert score.positions == positions
    assert score.nats == pytest.approx(float(nll.double().sum()), rel=1e-6)
    assert score.bytes == int((torch.arange(positions) % 5).sum())
    assert proof["chunks"] == -(-positions // size)


def test_without_a_learning_rate_it_is_the_sliding_score():
    hp, tokens = settings(ttt_lr=0, eval_stride=12), some_text()
    nll, counts = torch.zeros(POSITIONS), torch.arange(POSITIONS) % 5
    windows = tg.sliding_windows(POSITIONS, SEQ, 12)
    expected = tg.evaluate(
        random_model(hp), tokens, counts, windows, tg.World(hp, {}), temperature=0.98, nll=nll
    )
    score, losses, proof = run_ttt(hp, tokens)
    torch.testing.assert_close(losses, nll, rtol=1e-5, atol=1e-5)
    assert score.val_bpb == pytest.approx(expected.val_bpb, rel=1e-7)
    assert proof["steps"] > 0 and proof["weight_change"] == 0
    assert run_ttt(settings(eval_stride=12), tokens)[0].val_bpb != pytest.approx(expected.val_bpb, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------
# Score before update
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [8, 12])
@pytest.mark.parametrize("cut", [1, 40, SIZE, SIZE + 1, 3 * SIZE, 3 * SIZE + 17, POSITIONS])
def test_losses_do_not_depend_on_later_tokens(stride, cut):
    """The loss of position p is that of token p + 1: tokens from `cut` on change losses from cut - 1 on."""
    hp, tokens = settings(eval_stride=stride), some_text()
    changed = tokens.clone()
    changed[cut:] = 2 + (tokens[cut:] + 11) % 40
    losses, others = run_ttt(hp, tokens)[1], run_ttt(hp, changed)[1]
    assert torch.equal(losses[: cut - 1], others[: cut - 1])
    assert not torch.equal(losses[cut - 1 :], others[cut - 1 :])


@pytest.mark.parametrize("stride", [8, 12])
@pytest.mark.parametrize("chunk", [0, 2, 4])
def test_a_chunk_is_scored_before_it_is_trained_on(monkeypatch, stride, chunk):
    """Training on chunk c and later ones is replaced by noise: the scores of chunks 0 to c stay."""
    hp, tokens = settings(eval_stride=stride), some_text()
    losses = run_ttt(hp, tokens)[1]
    spy_on_training(
        monkeypatch, lambda text, first, end, c: some_text(len(text) - 1, seed=9) if c >= chunk else None
    )
    noisy = run_ttt(hp, tokens)[1]
    border = (chunk + 1) * SIZE
    assert torch.equal(losses[:border], noisy[:border])
    later = range(border + stride, POSITIONS)  # windows that begin in chunk c may reach into the next one
    assert (losses[later] != noisy[later]).float().mean() > 0.9


@pytest.mark.parametrize(
    "positions, stride, size", [(POSITIONS, 8, 64), (POSITIONS, 12, 64), (320, 5, 96), (416, 32, 32)]
)
def test_no_target_is_trained_before_it_is_scored(monkeypatch, positions, stride, size):
    hp, tokens = settings(eval_stride=stride, ttt_chunk_tokens=size), some_text(positions)
    nll, trained = torch.full((positions,), math.nan), []

    def check(text, first, end, chunk):
        largest_scored = int(torch.isfinite(nll).nonzero().max())
        assert torch.isfinite(nll[: largest_scored + 1]).all()
        assert end - 1 <= largest_scored  # the target of position end - 1 is token `end`
        assert first == chunk * size and end == (chunk + 1) * size
        trained.append(chunk)

    forward, targets_seen = tg.GPT.forward, []

    def watched(self, text, targets=None):
        if targets is not None:
            targets_seen.append(targets.clone())
        return forward(self, text, targets)

    monkeypatch.setattr(tg.GPT, "forward", watched)
    spy_on_training(monkeypatch, check)
    tg.evaluate_ttt(
        random_model(hp),
        tokens,
        torch.ones(positions, dtype=torch.int32),
        hp,
        tg.World(hp, {}),
        tg.RunLog(None),
        nll=nll,
    )
    chunks = -(-positions // size)
    assert trained == list(range(chunks - 1))  # in order, and never the last one
    last = (chunks - 1) * size
    seen = torch.cat([batch.flatten() for batch in targets_seen])
    expected = torch.cat([tokens[1 : last + 1].view(-1, size)] * hp.ttt_epochs, dim=1).flatten().long()
    assert torch.equal(seen.sort().values, expected.sort().values)  # every epoch, each target once


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


def rank_world(hp, rank, size, meeting, broken_sum):
    """A World of one rank among `size` threads; its collectives add in the order of the ranks.

    broken_sum  the number of a sum of which the last rank gets something else
    """
    world, sums = copy.copy(tg.World(hp, {})), itertools.count(1)
    world.rank, world.size, world.grouped = rank, size, size > 1

    def sum_(tensor):
        tensor.copy_(sum(meeting.gather(rank, tensor.clone())))
        return tensor.add_(0.1) if next(sums) == broken_sum and rank == size - 1 else tensor

    world.sum_ = sum_
    world.max = lambda value: max(meeting.gather(rank, value))
    return world


def run_ranks(size, hp, tokens, change=lambda rank, model: None, broken_sum=None, **options):
    """Per rank: score, losses, proof and weights, or the error that stopped it."""
    meeting, results = Meeting(size), [None] * size

    def one(rank):
        model, nll = random_model_of(rank, hp, change), torch.full((len(tokens) - 1,), math.nan)
        world = rank_world(hp, rank, size, meeting, broken_sum)
        try:
            score, proof = tg.evaluate_ttt(
                model, tokens, torch.arange(len(tokens) - 1) % 5, hp, world, tg.RunLog(None), nll=nll, **options
            )
            results[rank] = score, nll, proof, model.state_dict()
        except tg.UserError as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


BUILDING = threading.Lock()  # weights are drawn from the one global generator


def random_model_of(rank, hp, change):
    with BUILDING:
        model = random_model(hp)
        change(rank, model)
        return model


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [2, 3])
def test_ranks_take_equal_steps_and_agree(size, batch):
    """Batches of 2 and 3 sequences leave some of 5 ranks without any; their weights must not drift apart."""
    hp, tokens = settings(ttt_batch_seqs=batch, ttt_chunk_tokens=5 * SEQ), some_text(11 * SEQ + 8)
    one = run_ranks(1, hp, tokens)[0]
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
    results = run_ranks(3, settings(), some_text(), broken_sum=3 * chunk + 3)
    assert all(f"weights differ after TTT chunk {chunk}" in str(error) for error in results)


@pytest.mark.parametrize("size", [2, 5])
def test_in_bf16_ranks_agree_too(size):
    """From weights as training starts with, of which bf16 leaves more than of those that are drawn wide."""
    hp, tokens = settings(dtype="bf16", ttt_optimizer="sgd", ttt_lr=0.1), some_text()
    torch.manual_seed(3)
    fresh = tg.GPT(hp).state_dict()

    def scores(size, hp):
        ranks = run_ranks(size, hp, tokens, lambda rank, model: model.load_state_dict(fresh))
        assert len({proof["steps"] for _, _, proof, _ in ranks}) == 1
        return [score.val_bpb for score, *_ in ranks]

    one = scores(1, hp)
    assert scores(size, hp) == pytest.approx(one * size, rel=0, abs=1e-4)
    assert scores(1, dataclasses.replace(hp, dtype="fp32")) != one
    assert scores(1, dataclasses.replace(hp, ttt_lr=0.0)) != pytest.approx(one, rel=0, abs=4e-4)


# ----------------------------------------------------------------------------------------------------------
# Compiled scoring
# ----------------------------------------------------------------------------------------------------------


def test_compiled_scoring_is_the_same_and_compiles_nothing_per_chunk():
    """Weights move from chunk to chunk; the windows of all chunks share one graph, the first one is scored eagerly."""
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
    assert graphs_at == [1] * 4  # not the first chunk, which the first window shortens, and not the last, with the tail


# ----------------------------------------------------------------------------------------------------------
# The learning rate
# ----------------------------------------------------------------------------------------------------------


def test_schedules_at_their_corners():
    run, chunk, constant = (settings(ttt_schedule=kind) for kind in ("run", "chunk", "constant"))
    assert [tg.ttt_lr_scale(run, c, 474, 1, 3) for c in (0, 473)] == pytest.approx([1.0, 0.0])
    assert tg.ttt_lr_scale(run, 100, 474, 2, 3) == pytest.approx(0.5 * (1 + math.cos(math.pi * 100 / 473)))
    assert tg.ttt_lr_scale(run, 0, 1, 0, 3) == 1.0
    assert [tg.ttt_lr_scale(chunk, 7, 474, s, 64) for s in (0, 16, 32, 63)] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * s / 64)) for s in (0, 16, 32, 63)]
    )
    assert {tg.ttt_lr_scale(constant, c, 474, s, 3) for c in (0, 99, 473) for s in (0, 2)} == {1.0}


@pytest.mark.parametrize("kind", ["run", "chunk", "constant"])
def test_every_step_uses_the_schedule(monkeypatch, kind):
    """Five chunks are trained; a chunk has two batches of one sequence, twice."""
    hp, used = settings(ttt_schedule=kind, ttt_lr=0.5, ttt_batch_seqs=1), []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (used.append(self.param_groups[0]["lr"]), step(self))
    )
    run_ttt(hp, some_text())
    share = {
        "run": [c / 5 for c in range(5) for _ in range(4)],
        "chunk": [s / 4 for _ in range(5) for s in range(4)],
        "constant": [0.0] * 20,
    }[kind]
    assert used == pytest.approx([0.25 * (1 + math.cos(math.pi * x)) for x in share])


@pytest.mark.parametrize("perlayer", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rates_per_layer(optimizer, perlayer):
    hp = settings(ttt_optimizer=optimizer, ttt_lr=0.01, ttt_perlayer_lr=int(perlayer), ttt_params="all")
    trainer = tg.ChunkTrainer(random_model(hp), hp, tg.World(hp, {}))
    name_of = {p: name for name, p in trainer.parameters.items()}
    rates = {name_of[p]: group["lr"] for group in trainer.optimiser.param_groups for p in group["params"]}
    assert rates.keys() == trainer.parameters.keys()
    for name, rate in rates.items():
        factor = 3.0 if name.endswith("mlp.proj.weight") else 0.5 if name.endswith("mlp.fc.weight") else 1.0
        assert rate == pytest.approx(0.01 * (factor if perlayer else 1.0)), name


# ----------------------------------------------------------------------------------------------------------
# What is trained
# ----------------------------------------------------------------------------------------------------------


def parameter_set(env):
    hp = tg.Hyperparameters.from_env(env)
    with torch.device("meta"):
        model = tg.GPT(hp)
    return tg.ttt_parameters(model, hp)


def test_pr606_trains_two_blocks_and_all_scales():
    chosen = parameter_set({"PRESET": "pr606"})
    assert sum(p.numel() for p in chosen.values()) == 5_780_500
    assert "tok_emb.weight" not in chosen and "smear.gate" not in chosen and "skip_weights" not in chosen
    assert "blocks.10.mlp.proj.weight" in chosen and "blocks.9.attn.q_gain" in chosen
    assert "blocks.8.attn_scale" in chosen and "blocks.8.resid_mix" not in chosen and "bigram.scale" in chosen


def test_pr601_trains_control_tensors():
    chosen = parameter_set({"PRESET": "pr601"})
    assert sum(p.numel() for p in chosen.values()) == 25_689
    with_qk = parameter_set({"PRESET": "pr601", "TTT_PARAMS": "control_qk"})
    extra = set(with_qk) - set(chosen)
    assert extra == {f"blocks.{i}.attn.c_{kind}.weight" for i in range(11) for kind in "qk"}


def test_polyak_averages_nothing_unless_asked_to():
    for preset in tg.PRESETS:
        assert not tg.Hyperparameters.from_env({"PRESET": preset}).use_polyak
    hp = settings()
    assert not tg.ChunkTrainer(random_model(hp), hp, tg.World(hp, {})).polyak


@pytest.mark.parametrize("kind, count", [("all", None), ("blocks", 1), ("control", None)])
def test_only_the_chosen_parameters_move(kind, count):
    hp = settings(ttt_params=kind, ttt_freeze_blocks=count or 2)
    model = random_model(hp)
    chosen = set(tg.ttt_parameters(model, hp))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, _, proof = run_ttt(hp, some_text(), model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    without_gradient = {"blocks.0.attn.vr_lambda"}  # the first layer has nothing to mix
    assert moved == chosen - without_gradient and moved
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
        self.weights = dict(model.named_parameters())
        self.first, self.second, self.steps = {}, {}, 0
        self.polyak = {name: p.detach().clone() for name, p in self.weights.items()}

    def score(self, tokens, low, high):
        """Losses of positions low..high - 1, each with the context that the layout gives it."""
        losses = []
        latent = {name: p.detach().clone() for name, p in self.weights.items()}
        with torch.no_grad():
            if self.hp.use_polyak:
                for name, p in self.weights.items():
                    p.copy_(self.polyak[name])
            for position in range(low, high):
                if position < SEQ:
                    end = SEQ
                else:
                    end = min(SEQ + ((position - SEQ) // STRIDE + 1) * STRIDE, len(tokens) - 1)
                text = tokens[end - SEQ : end].long()
                logits = self.model(text[None])[0, position - (end - SEQ)]
                logits = logits / temperature_of(logits, self.hp.ttt_temperature)
                losses.append(-float(logits.log_softmax(-1)[int(tokens[position + 1])]))
            for name, p in self.weights.items():
                p.copy_(latent[name])
        return losses

    def train(self, tokens, chunk, chunks):
        hp, base = self.hp, chunk * SIZE
        rows = [tokens[base + i * SEQ : base + (i + 1) * SEQ + 1].long() for i in range(SIZE // SEQ)]
        for _ in range(hp.ttt_epochs):
            for at in range(0, len(rows), hp.ttt_batch_seqs):
                batch = rows[at : at + hp.ttt_batch_seqs]
                loss = sum(
                    torch.nn.functional.cross_entropy(self.model(row[None, :-1])[0], row[1:]) for row in batch
                ) / len(batch)
                names = list(self.weights)
                grads = torch.autograd.grad(loss, [self.weights[name] for name in names], allow_unused=True)
                grads = {
                    name: torch.zeros_like(self.weights[name]) if g is None else g
                    for name, g in zip(names, grads)
                }
                norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
                assert norm > hp.ttt_grad_clip  # the clip is part of the comparison
                clip = hp.ttt_grad_clip / (norm + 1e-6) if hp.ttt_grad_clip else 1.0
                self.update({name: g * clip for name, g in grads.items()}, chunk, chunks)

    @torch.no_grad()
    def update(self, grads, chunk, chunks):
        self.steps += 1
        for name, g in grads.items():
            lr = self.hp.ttt_lr * 0.5 * (1 + math.cos(math.pi * chunk / (chunks - 1)))
            if self.hp.ttt_perlayer_lr:
                lr *= 3.0 if "mlp.proj" in name else 0.5 if "mlp.fc" in name else 1.0
            first = self.first.setdefault(name, torch.zeros_like(g))
            if self.hp.ttt_optimizer == "sgd":
                self.first[name] = g = self.hp.ttt_momentum * first + g
            else:
                self.first[name] = first = 0.9 * first + 0.1 * g
                second = self.second[name] = (
                    0.999 * self.second.get(name, torch.zeros_like(g)) + 0.001 * g * g
                )
                g = (first / (1 - 0.9**self.steps)) / ((second / (1 - 0.999**self.steps)).sqrt() + 1e-8)
            self.weights[name] -= lr * g
            self.polyak[name] = (
                self.hp.polyak_decay * self.polyak[name] + (1 - self.hp.polyak_decay) * self.weights[name]
            )


@pytest.mark.parametrize(
    "changes",
    [
        dict(ttt_optimizer="adamw", ttt_lr=0.01, ttt_perlayer_lr=1),
        dict(ttt_optimizer="sgd", ttt_lr=0.05, ttt_momentum=0.9, ttt_epochs=3, ttt_batch_seqs=1),
        dict(ttt_optimizer="sgd", ttt_lr=0.005, ttt_grad_clip=0, ttt_perlayer_lr=1),
        dict(ttt_optimizer="sgd", ttt_lr=0.05, use_polyak=1, polyak_decay=0.7, ttt_temperature=0.8),
    ],
    ids=["adamw", "sgd", "no clip", "polyak"],
)
def test_ttt_equals_a_loop_written_out(changes):
    hp = settings(**{"ttt_params": "all", "ttt_grad_clip": 0.2} | changes)
    positions = 3 * SIZE + SEQ
    tokens = some_text(positions)
    model = random_model(hp, torch.float64)
    _, losses, proof = run_ttt(hp, tokens, model)
    loop = Loop(hp, random_model(hp, torch.float64))
    chunks, expected = 4, []
    for chunk in range(chunks):
        expected += loop.score(tokens, chunk * SIZE, min((chunk + 1) * SIZE, positions))
        if chunk + 1 < chunks:
            loop.train(tokens, chunk, chunks)
    torch.testing.assert_close(
        losses.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=2e-6
    )
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), loop.weights[name].detach(), rtol=1e-6, atol=1e-8, msg=name)
    assert proof["steps"] == loop.steps


def test_the_temperature_is_used():
    """At 0.98 and at 0.8 the first chunk, before any training, differs from the plain loss by the formula."""
    tokens = some_text()
    plain = run_ttt(settings(ttt_temperature=1), tokens)[1][:SIZE]
    for low in (0.98, 0.8):
        hp = settings(ttt_temperature=low)
        losses = run_ttt(hp, tokens)[1][:SEQ]
        with torch.no_grad():
            logits = random_model(hp)(tokens[None, :SEQ].long())[0]
        expected = torch.nn.functional.cross_entropy(
            logits / temperature_of(logits, low), tokens[1 : SEQ + 1].long(), reduction="none"
        )
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(losses, plain[:SEQ], atol=1e-4)


# ----------------------------------------------------------------------------------------------------------
# The clock, and the point of it all
# ----------------------------------------------------------------------------------------------------------


def test_a_short_clock_stops_the_training_and_not_the_scoring(tmp_path):
    hp, tokens = settings(eval_stride=12), some_text()
    nll = torch.full((POSITIONS,), math.nan)
    model, log = random_model(hp), tg.RunLog(tmp_path)
    counts = torch.ones(POSITIONS, dtype=torch.int32)
    score, proof = tg.evaluate_ttt(model, tokens, counts, hp, tg.World(hp, {}), log, seconds=1e-9, nll=nll)
    assert proof["untrained_from_chunk"] == 0 and proof["steps"] == 0 and proof["weight_change"] == 0
    assert score.positions == POSITIONS
    torch.testing.assert_close(
        nll, run_ttt(settings(eval_stride=12, ttt_lr=0), tokens)[1], rtol=1e-5, atol=1e-5
    )
    assert "training stops after chunk 0" in (tmp_path / "log.txt").read_text()
    generous = tg.evaluate_ttt(
        random_model(hp), tokens, counts, hp, tg.World(hp, {}), tg.RunLog(None), seconds=1e6
    )[1]
    assert generous["untrained_from_chunk"] is None and generous["steps"] == 10


@pytest.fixture
def slow(monkeypatch):
    """Call with seconds(chunk): scoring a chunk takes them, and training on one a second, of a clock that is read."""
    clock, evaluate = [0.0], tg.evaluate
    monkeypatch.setattr(tg.time, "perf_counter", lambda: clock[0])

    def install(seconds):
        chunks = itertools.count()

        def later(*args, **kwargs):
            clock[0] += seconds(next(chunks))
            return evaluate(*args, **kwargs)

        monkeypatch.setattr(tg, "evaluate", later)
        spy_on_training(monkeypatch, lambda *_: clock.__setitem__(0, clock[0] + 1.0))
        return clock

    return install


def test_the_clock_is_forecast_from_what_chunks_took(slow):
    """Ten seconds, one per chunk for scoring and one for training: six chunks need eleven, so one is not,
    and that is said before the clock has run out."""
    clock = slow(lambda chunk: 1.0)
    _, nll, proof = run_ttt(settings(), some_text(), seconds=10.0)
    assert torch.isfinite(nll).all()
    assert proof["untrained_from_chunk"] in (3, 4)  # the forecast keeps a margin
    assert clock[0] <= 10.0


def test_a_slow_first_chunk_forecasts_nothing(slow):
    """A compiled scorer takes 100 seconds there and one later: 110 seconds are enough to train on all."""
    clock = slow(lambda chunk: 100.0 if chunk == 0 else 1.0)
    _, _, proof = run_ttt(settings(), some_text(), seconds=112.0)
    assert proof["untrained_from_chunk"] is None and clock[0] == 110.0


def test_progress_of_ttt(slow, tmp_path):
    """20 seconds a chunk: a line for every one but the last, with the score so far and the steps taken."""
    slow(lambda chunk: 20.0)
    hp, tokens, counts = settings(), some_text(), torch.ones(POSITIONS, dtype=torch.int32)
    nll, log = torch.full((POSITIONS,), math.nan), tg.RunLog(tmp_path)
    tg.evaluate_ttt(random_model(hp), tokens, counts, hp, tg.World(hp, {}), log, nll=nll)
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "positions:" in line]
    assert len(lines) == 5
    for chunk, line in enumerate(lines):
        done = (chunk + 1) * SIZE
        bpb = float(nll[:done].double().mean()) / math.log(2)
        seconds = 20 * (chunk + 1) + chunk
        expected = (
            f"ttt positions:{done}/{POSITIONS} val_bpb:{bpb:.4f} tokens/s:{done / seconds:.0f} "
            f"left:{seconds * (POSITIONS - done) / done:.0f}s steps:{2 * chunk}"
        )
        assert line.endswith(expected)


@pytest.mark.parametrize("slowest", [0, 1])
def test_ranks_stop_training_together(monkeypatch, slowest):
    """One rank's clock runs, the other's stands still: both leave off after the same chunk."""
    evaluate, spent = tg.evaluate, {}
    rank_of = threading.local()

    def later(model, tokens, byte_counts, windows, world, *args, **kwargs):
        rank_of.value = world.rank
        spent[world.rank] = spent.get(world.rank, 0.0) + (world.rank == slowest)
        return evaluate(model, tokens, byte_counts, windows, world, *args, **kwargs)

    monkeypatch.setattr(tg, "evaluate", later)
    monkeypatch.setattr(tg.time, "perf_counter", lambda: spent.get(getattr(rank_of, "value", None), 0.0))
    proofs = [proof for _, _, proof, _ in run_ranks(2, settings(), some_text(), seconds=5.5)]
    assert proofs[0]["untrained_from_chunk"] == proofs[1]["untrained_from_chunk"] is not None
    assert proofs[0]["steps"] == proofs[1]["steps"] > 0


def test_weights_that_are_no_numbers_stop_the_run():
    hp = settings(ttt_optimizer="sgd", ttt_params="all", ttt_lr=1e30)
    with pytest.raises(tg.UserError, match="diverged in chunk 0; lower TTT_LR"):
        run_ttt(hp, some_text())


def test_ttt_learns_a_text_that_repeats():
    hp = settings(ttt_lr=0.01, ttt_params="all", ttt_schedule="constant")
    tokens = some_text(2 * SIZE).repeat(5)[: 10 * SIZE + 1]
    trained, still = run_ttt(hp, tokens)[1], run_ttt(settings(ttt_lr=0), tokens)[1]
    assert trained[:SIZE].mean() == pytest.approx(float(still[:SIZE].mean()), rel=1e-6)
    assert trained[-2 * SIZE :].mean() < still[-2 * SIZE :].mean() - 0.5
