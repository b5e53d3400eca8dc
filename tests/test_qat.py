"""Fake quantisation: the weights it shows, the gradients it passes on, its schedule, and the compiler."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import random_model
from reference import reference_soft_round

import train_gpt as tg


@pytest.fixture(scope="module")
def hp(tiny_hp):
    """Quick steps, every technique on."""
    quick = dict(vocab_size=64, train_batch_tokens=256, train_seq_len=32, warmup_steps=1)
    return dataclasses.replace(tiny_hp, **quick)


def quantizer_of(model, multiplier=1.0, soft=True):
    flat = tg.FlatParameters(model)
    qat = tg.FakeQuantizer(flat.stacks(model.max_codes("matrix")), soft)
    qat.begin(0, multiplier)
    return flat, qat


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def block_matrices(model):
    return {
        name
        for name, p in model.named_parameters()
        if name.startswith("blocks.") and p.ndim == 2 and "attn_gate" not in name and "resid_mix" not in name
    }


def some_text(hp, seed=0, rows=4, length=32):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, hp.vocab_size, (rows, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


# ----------------------------------------------------------------------------------------------------------
# What the forward pass sees, and what comes back
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [True, False])
def test_only_block_matrices_are_fake_quantised(hp, soft):
    """Decided by role: projections of the tables, gates, embeddings and vectors stay as they are."""
    model = random_model(hp)
    _, qat = quantizer_of(model, soft=soft)
    before = weights_of(model)
    qat.quantize(4.0)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == block_matrices(model)
    assert len(changed) == sum(map(len, qat.kept))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("multiplier", [1.0, 1.7])
def test_hard_rounding_shows_the_grid_of_each_role(hp, multiplier, given):
    """Of a quantiser that rounds hard, or of a soft one that is told to."""
    model = random_model(dataclasses.replace(hp, attn_bits=5, mlp_bits=4))
    _, qat = quantizer_of(model, multiplier, soft=given)
    before = weights_of(model)
    qat.quantize(4.0, tg.hard_quantize if given else None)
    for name in block_matrices(model):
        max_code = 15 if ".attn." in name else 7
        scales = (before[name].abs().amax(1) * (multiplier / max_code)).half().float()
        codes = (before[name] / scales[:, None]).round().clamp(-max_code, max_code)
        torch.testing.assert_close(model.get_parameter(name), codes * scales[:, None], rtol=0, atol=1e-7)
        assert codes.abs().max() == (max_code if multiplier == 1 else round(max_code / multiplier))


@pytest.mark.parametrize("alpha", [1.0, 5.5, 16.0])
def test_soft_rounding_shows_the_formula(hp, alpha):
    model = random_model(hp)
    _, qat = quantizer_of(model)
    before = weights_of(model)
    qat.quantize(alpha)
    for name in block_matrices(model):
        scales = (before[name].abs().amax(1) / 15).half().double()[:, None]
        soft = reference_soft_round((before[name].double() / scales).clamp(-15, 15), alpha) * scales
        torch.testing.assert_close(model.get_parameter(name).double(), soft, rtol=0, atol=2e-5)


@pytest.mark.parametrize("soft", [True, False])
def test_weights_come_back_bit_for_bit(hp, soft):
    model = random_model(hp)
    flat, qat = quantizer_of(model, 1.3, soft)
    before = flat.weights.clone()
    for alpha in (1.0, 4.0, 16.0):
        qat.quantize(alpha)
        assert not torch.equal(flat.weights, before)
        model(*some_text(hp)).backward()
        qat.restore()
        assert torch.equal(flat.weights, before)


# ----------------------------------------------------------------------------------------------------------
# Gradients
# ----------------------------------------------------------------------------------------------------------


def gradients_by_autograd(hp, model, shown):
    """Gradients of the latent weights when the model computes with `shown(weight)` for its block matrices."""
    latent = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    seen = {name: shown(w) if name in block_matrices(model) else w for name, w in latent.items()}
    loss = torch.func.functional_call(model, seen, some_text(hp))
    grads = torch.autograd.grad(loss, list(latent.values()), allow_unused=True)
    return {name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(latent.items(), grads)}


def fake_gradients(hp, model, alpha, soft):
    flat, qat = quantizer_of(model, soft=soft)
    qat.quantize(alpha)
    flat.grads.zero_()
    model(*some_text(hp)).backward()
    qat.restore()
    return {name: flat.view(flat.grads, name).clone() for name in flat.parameters}


def latent_grid(weight):
    """Weights in steps, the grid itself without a gradient."""
    scales = (weight.detach().abs().amax(1, keepdim=True) / 15).half().float()
    y = weight / scales
    return y + (y.clamp(-15, 15) - y).detach(), scales


def straight_through(weight):
    y, scales = latent_grid(weight)
    return weight + (y.round() * scales - weight).detach()


@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_gradients_of_soft_rounding_equal_autograd(hp, alpha):
    model = random_model(hp)
    expected = gradients_by_autograd(
        hp, model, lambda w: reference_soft_round(latent_grid(w)[0], alpha) * latent_grid(w)[1]
    )
    got, plain = fake_gradients(hp, model, alpha, soft=True), fake_gradients(hp, model, alpha, soft=False)
    for name in expected:
        assert (got[name] - expected[name]).norm() <= 2e-4 * expected[name].norm(), name
        if name in block_matrices(model):  # and the factor matters
            assert (plain[name] - expected[name]).norm() > 0.01 * expected[name].norm(), name


def test_hard_rounding_is_straight_through(hp):
    model = random_model(hp)
    expected = gradients_by_autograd(hp, model, straight_through)
    got, unrounded = fake_gradients(hp, model, 1.0, soft=False), gradients_by_autograd(hp, model, lambda w: w)
    for name in expected:
        assert (got[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
    for name in block_matrices(model):
        assert (unrounded[name] - expected[name]).norm() > 1e-3 * expected[name].norm(), name


# ----------------------------------------------------------------------------------------------------------
# One grid: training and export
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [1.0, 1.4])
def test_the_grid_is_the_export_grid(hp, multiplier):
    """What QAT shows is what rounding exports; GPTQ keeps the steps, and under an identity the codes too."""
    model, exported = random_model(dataclasses.replace(hp, prune_pct=0.0, mlp_bits=4)), {}
    _, qat = quantizer_of(model, multiplier, soft=False)
    latent = weights_of(model)
    hessians = {name: torch.eye(latent[name].size(1)) for name in block_matrices(model)}
    for quantizer in ("rtn", "gptq"):
        model.hp = dataclasses.replace(model.hp, quantizer=quantizer)
        exported[quantizer], _ = tg.quantize_model(model, latent, hessians, tg.World(hp, {}), multiplier)
    qat.quantize(1.0)
    for name in block_matrices(model):
        shown, plain, solved = (
            model.get_parameter(name).detach(),
            exported["rtn"][name],
            exported["gptq"][name],
        )
        assert torch.equal(plain.dequantize(), shown), name
        assert torch.equal(plain.codes, (shown / plain.scales[:, None]).round().to(torch.int8)), name
        assert torch.equal(solved.scales, plain.scales) and torch.equal(solved.codes, plain.codes), name


def test_the_distance_is_a_quarter_of_a_step_until_weights_are_drawn_to_the_grid(hp):
    model = random_model(dataclasses.replace(hp, model_dim=128, rope_dims=16))
    _, qat = quantizer_of(model)
    assert qat.distance() == qat.distance_before == pytest.approx(0.25, abs=0.005)
    qat.quantize(1.0, tg.hard_quantize)
    assert qat.distance() == pytest.approx(0.0, abs=1e-4)
    qat.restore()
    assert qat.distance() == pytest.approx(0.25, abs=0.005)
    qat.quantize(6.0)
    assert 0.02 < qat.distance() < 0.2


# ----------------------------------------------------------------------------------------------------------
# When it runs
# ----------------------------------------------------------------------------------------------------------


def settings(**changes):
    return tg.Hyperparameters.from_env({name.upper(): str(value) for name, value in changes.items()})


def test_qat_of_pr601_starts_at_step_8976():
    hp = settings(preset="pr601")
    scales = [tg.lr_scale(hp, tg.Progress(step, hp.iterations)) for step in range(hp.iterations)]
    assert [step for step, scale in enumerate(scales) if tg.qat_active(hp, scale)] == list(range(8976, 9500))


def test_qat_of_pr606_starts_below_half_the_learning_rate_or_never():
    hp, never = settings(preset="pr606"), settings(late_qat=0)
    assert not tg.qat_active(hp, 1.0) and not tg.qat_active(hp, 0.5)
    assert tg.qat_active(hp, 0.4999) and tg.qat_active(hp, 0.0)
    assert not any(tg.qat_active(never, scale) for scale in (0.0, 0.3, 1.0))


def test_alpha_goes_from_1_to_16():
    hp = settings(preset="pr606")
    alphas = [tg.soft_round_alpha(hp, scale) for scale in (1.0, 0.5, 0.4, 0.25, 0.1, 0.0)]
    assert alphas == pytest.approx([1.0, 1.0, 4.0, 8.5, 13.0, 16.0])
    other = settings(late_qat_threshold=0.2, soft_round_alpha=9)
    assert [tg.soft_round_alpha(other, scale) for scale in (0.3, 0.2, 0.1, 0.0)] == pytest.approx(
        [1, 1, 5, 9]
    )


def test_a_quantiser_says_when_it_began_and_takes_its_state_back(hp):
    model = random_model(hp)
    stacks = tg.FlatParameters(model).stacks(model.max_codes("matrix"))
    first, second = tg.FakeQuantizer(stacks), tg.FakeQuantizer(stacks)
    assert not first.on and first.started_at is None
    first.begin(0, 1.5)
    assert first.on and first.started_at == 0 and first.multiplier == 1.5
    second.load_state_dict(first.state_dict())
    assert second.on and second.distance() == first.distance() == first.distance_before
    shown = []
    for qat in (first, second, tg.FakeQuantizer(stacks)):
        qat.quantize(2.0)
        shown.append(stacks[0][1].clone())
        qat.restore()
    assert torch.equal(shown[0], shown[1]) and not torch.equal(shown[0], shown[2])


# ----------------------------------------------------------------------------------------------------------
# In a step, and under the compiler
# ----------------------------------------------------------------------------------------------------------


def stepper_of(hp, compiling=False, spread=0.1):
    text = np.random.default_rng(1).integers(0, hp.vocab_size, 20_000).astype("uint16")
    model, world = random_model(hp, spread=spread), tg.World(hp, {})
    return model, tg.Stepper(hp, model, tg.TokenStream([text]), world, compiling)


def loss_of_a_step(stepper, scale, qat_on):
    """The loss of the first batch at the first weights, which are put back."""
    kept = stepper.flat.weights.clone()
    stepper.stream.position = 0
    stepper.step(scale, 0.9, qat_on)
    stepper.flat.weights.copy_(kept)
    return float(stepper.flat.slot["loss"])


def score_of(model, score_fn):
    """Mean loss of the weights as they stand, on windows of one shape, as a validation between steps."""
    tokens = torch.arange(7 * 32 + 1, dtype=torch.int32) * 29 % model.hp.vocab_size
    windows, counts = tg.sliding_windows(7 * 32, 32, 32), torch.ones(7 * 32, dtype=torch.uint8)
    return tg.evaluate(
        model, tokens, counts, windows, tg.World(model.hp, {}), 3 * 32, score_fn=score_fn
    ).val_loss


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore:.*script_method")  # PyTorch's own, when it imports its compiler
def test_the_compiled_model_trains_with_qat_and_nothing_recompiles(hp):
    """The trap of #315, #421 and #606: a flag in the graph is folded away, or recompiles at every alpha.

    One graph trains and one scores, neither is broken: QAT that starts, an alpha that moves, QAT that stops
    and validations between make no other.
    """
    graphs, counters = [], torch._dynamo.utils.counters

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    one_shape = dict(num_layers=2, num_kv_heads=4, mlp_mult=1.0, bigram_dim=64, ve_dim=64, ve_layers=(1,))
    hp = dataclasses.replace(hp, attn_bits=2, mlp_bits=2, late_qat_threshold=0.5, **one_shape)  # few graphs
    (model, compiled), (plain, eager) = (stepper_of(hp, compiling, spread=0.2) for compiling in (True, False))
    cases = [(1.0, False), (0.49, True), (0.3, True), (0.1, True), (0.0, True), (0.7, False)]
    losses, scores = [], []
    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.set_stance(force_backend=backend):
        compiled.warm_up()
        trained = len(graphs)
        first = score_of(model, compiled.score_fn)
        before = len(graphs), counters["stats"]["unique_graphs"]
        for scale, on in cases:
            losses.append(loss_of_a_step(compiled, scale, on))
            scores.append(score_of(model, compiled.score_fn))
    used = {str(node.target) for graph in graphs[:trained] for node in graph.graph.nodes}
    assert any("embedding" in name for name in used), "the model is compiled"
    assert before == (trained + 1, trained + 1), "and the scorer"
    assert (len(graphs), counters["stats"]["unique_graphs"]) == before and not counters["graph_break"]
    assert losses == pytest.approx([loss_of_a_step(eager, scale, on) for scale, on in cases], rel=1e-5)
    assert losses[0] == pytest.approx(losses[-1], rel=1e-6)
    assert all(abs(loss - losses[0]) > 1e-3 for loss in losses[2:-1])  # QAT reaches the compiled model
    assert len({round(loss, 6) for loss in losses[1:-1]}) == 4  # and so does every alpha
    assert scores == [first] * len(cases)  # and no validation: it scores the latent weights
    assert first == pytest.approx(score_of(plain, tg.token_losses), rel=1e-5)


@pytest.mark.parametrize("soft", [True, False])
def test_a_step_with_qat_moves_the_latent_weights(hp, soft):
    """After the step the weights are the old ones plus the update, not the rounded ones plus the update."""
    model, stepper = stepper_of(
        dataclasses.replace(hp, soft_round_qat=soft, matrix_lr=0.0, attn_bits=3, mlp_bits=3)
    )
    before = weights_of(model)
    stepper.step(0.1, 0.9, qat_on=True)
    for name in block_matrices(model):
        assert torch.equal(model.get_parameter(name), before[name]), name
    assert not torch.equal(model.tok_emb.weight, before["tok_emb.weight"])


@pytest.mark.whole
def test_training_with_soft_rounding_draws_weights_to_the_grid(hp):
    """From a quarter of a step to at most 0.17, raw and averaged, with #606's alpha.

    The gradients of a sharp staircase are large at its edges: weights leave them and settle near codes.
    """
    short = dict(train_batch_tokens=128, late_qat_threshold=0.3, soft_round_alpha=16.0)
    hp, steps = dataclasses.replace(hp, **short), 40
    for on in (True, False):
        _, stepper = stepper_of(hp)
        assert stepper.qat.distance() == pytest.approx(0.25, abs=0.005)
        ema = tg.EMA(stepper.flat.weights, 0.9)
        for step in range(steps):
            scale = hp.late_qat_threshold * (1 - (step + 1) / steps)
            assert tg.qat_active(hp, scale)
            stepper.step(scale, 0.9, qat_on=on)
            ema.update(stepper.flat.weights)
        raw = stepper.qat.distance()
        stepper.flat.weights.copy_(ema.average)
        for distance in (raw, stepper.qat.distance()):
            assert distance <= 0.17 if on else distance > 0.24


def markov_text(vocab_size, seed):
    """A text with something to learn: every token has four successors."""
    rng = np.random.default_rng(seed)
    successors, text = rng.integers(0, vocab_size, (vocab_size, 4)), [0]
    for choice in rng.integers(0, 4, 20_000):
        text.append(successors[text[-1], choice])
    return np.array(text, np.uint16)


def rounded_loss(hp, seed, late_qat, steps=45):
    """Loss of the averaged weights on their grid, after a short training."""
    torch.manual_seed(seed)
    stream = tg.TokenStream([markov_text(hp.vocab_size, seed)])
    stepper = tg.Stepper(hp, tg.GPT(hp), stream, tg.World(hp, {}), compiling=False)
    ema = tg.EMA(stepper.flat.weights, 0.9)
    for step in range(steps):
        scale = min(1.0, (steps - step) / (0.8 * steps))
        stepper.step(scale, 0.9, qat_on=late_qat and tg.qat_active(hp, scale))
        ema.update(stepper.flat.weights)
    stepper.flat.weights.copy_(ema.average)
    stepper.qat.quantize(1.0)
    rows = torch.from_numpy(stream.sample(64, 33, seed))
    with torch.no_grad():
        return float(stepper.model(rows[:, :-1], rows[:, 1:]))


@pytest.mark.whole
def test_straight_through_lowers_the_rounded_loss(hp):
    """With so few levels that it shows in seconds."""
    few = dict(attn_bits=2, mlp_bits=2, late_qat_threshold=0.5, train_batch_tokens=128)
    hp = dataclasses.replace(hp, soft_round_qat=False, **few)
    without, with_qat = (rounded_loss(hp, 0, late_qat) for late_qat in (False, True))
    assert with_qat < without - 0.05
