"""Fake quantisation: the weights it shows, the gradients it passes on, its schedule, and the compiler."""

import numpy as np
import pytest
import torch

import train_gpt as tg

SMALL = {
    "PRESET": "smoke", "DTYPE": "fp32", "DEVICE": "cpu", "VOCAB_SIZE": "64", "NUM_LAYERS": "3",
    "MODEL_DIM": "64", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "MLP_MULT": "2", "ROPE_DIMS": "8",
    "XSA_LAST_N": "2", "BIGRAM_VOCAB_SIZE": "64", "BIGRAM_DIM": "32", "VE_DIM": "32", "VE_LAYERS": "1,2",
    "TRAIN_BATCH_TOKENS": "256", "TRAIN_SEQ_LEN": "32", "EVAL_SEQ_LEN": "32", "EVAL_STRIDE": "16",
    "TTT_CHUNK_TOKENS": "64", "WARMUP_STEPS": "1",
}  # fmt: skip


ONE_SHAPE = dict(
    num_layers=2, num_kv_heads=4, mlp_mult=1, bigram_dim=64, ve_dim=64, ve_layers=1
)  # quick to compile


def settings(**changes):
    return tg.Hyperparameters.from_env(SMALL | {name.upper(): str(value) for name, value in changes.items()})


def random_model(hp, seed=0):
    """A model whose every parameter is random, so that nothing is hidden by a zero."""
    torch.manual_seed(seed)
    model = tg.GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    return model


def quantizer_of(hp, model, multiplier=1.0):
    flat = tg.FlatParameters(model)
    return flat, tg.FakeQuantizer(flat, tg.matrix_max_codes(hp, flat.parameters), multiplier)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def block_matrices(model):
    return {
        name for name, p in model.named_parameters()
        if name.startswith("blocks.") and p.ndim == 2 and "attn_gate" not in name and "resid_mix" not in name
    }  # fmt: skip


def some_text(hp, seed=0, rows=4, length=32):
    tokens = torch.randint(
        0, hp.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(seed)
    )
    return tokens[:, :-1], tokens[:, 1:]


# ----------------------------------------------------------------------------------------------------------
# What the forward pass sees, and what comes back
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 4.0])
def test_only_block_matrices_are_fake_quantised(alpha):
    """Decided by role: projections of the tables, gates, embeddings and vectors stay as they are."""
    hp = settings()
    model = random_model(hp)
    _, qat = quantizer_of(hp, model)
    before = weights_of(model)
    qat.quantize(alpha)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == block_matrices(model)
    assert len(changed) == 6 * hp.num_layers == qat.matrices


@pytest.mark.parametrize("multiplier", [1.0, 1.7])
def test_hard_rounding_shows_the_grid_of_each_role(multiplier):
    hp = settings(attn_bits=5, mlp_bits=4, int6_last_n=1)
    model = random_model(hp)
    _, qat = quantizer_of(hp, model, multiplier)
    before = weights_of(model)
    qat.quantize(None)
    for name in block_matrices(model):
        last = name.startswith(f"blocks.{hp.num_layers - 1}.")
        max_code = 31 if last else 15 if ".attn." in name else 7
        scales = (before[name].abs().amax(1) * (multiplier / max_code)).half().float()
        codes = (before[name] / scales[:, None]).round().clamp(-max_code, max_code)
        torch.testing.assert_close(model.get_parameter(name), codes * scales[:, None], rtol=0, atol=1e-7)
        assert codes.abs().max() == (max_code if multiplier == 1 else round(max_code / multiplier))


@pytest.mark.parametrize("alpha", [1.0, 5.5, 16.0])
def test_soft_rounding_shows_the_formula(alpha):
    hp = settings()
    model = random_model(hp)
    _, qat = quantizer_of(hp, model)
    before = weights_of(model)
    qat.quantize(alpha)
    for name in block_matrices(model):
        w = before[name].double()
        scales = (before[name].abs().amax(1) / 15).half().double()[:, None]
        y = (w / scales).clamp(-15, 15)
        r = y - y.floor() - 0.5
        soft = (
            y.floor()
            + 0.5
            + 0.5 * torch.tanh(alpha * r) / torch.tanh(torch.tensor(alpha / 2, dtype=torch.float64))
        )
        torch.testing.assert_close(model.get_parameter(name).double(), soft * scales, rtol=0, atol=2e-5)


@pytest.mark.parametrize("alpha", [None, 1.0, 16.0])
def test_weights_come_back_bit_for_bit(alpha):
    hp = settings()
    model = random_model(hp)
    flat, qat = quantizer_of(hp, model, 1.3)
    before = flat.weights.clone()
    for seed in range(3):
        qat.quantize(alpha)
        assert not torch.equal(flat.weights, before)
        model(*some_text(hp, seed)).backward()
        qat.restore()
        assert torch.equal(flat.weights, before)


# ----------------------------------------------------------------------------------------------------------
# Gradients
# ----------------------------------------------------------------------------------------------------------


def gradients_by_autograd(hp, model, shown):
    """Gradients of the latent weights when the model computes with `shown(name, weight)`."""
    latent = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss = torch.func.functional_call(
        model, {name: shown(name, w) for name, w in latent.items()}, some_text(hp)
    )
    names = list(latent)
    grads = torch.autograd.grad(loss, [latent[name] for name in names], allow_unused=True)
    return {name: torch.zeros_like(latent[name]) if g is None else g for name, g in zip(names, grads)}


def fake_gradients(hp, model, alpha):
    flat, qat = quantizer_of(hp, model)
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


@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_gradients_of_soft_rounding_equal_autograd(alpha):
    hp = settings()
    model = random_model(hp)
    quantised = block_matrices(model)

    def shown(name, w):
        if name not in quantised:
            return w
        y, scales = latent_grid(w)
        low = y.detach().floor()
        return (
            low + 0.5 + torch.tanh(alpha * (y - low - 0.5)) / (2 * torch.tanh(torch.tensor(alpha / 2)))
        ) * scales

    expected, got = gradients_by_autograd(hp, model, shown), fake_gradients(hp, model, alpha)
    plain = fake_gradients(hp, model, None)
    for name in expected:
        error = (got[name] - expected[name]).norm()
        assert error <= 2e-4 * expected[name].norm(), name
        if name in quantised:  # and the factor matters
            assert (plain[name] - expected[name]).norm() > 0.01 * expected[name].norm(), name


def test_hard_rounding_is_straight_through():
    hp = settings()
    model = random_model(hp)
    quantised = block_matrices(model)

    def shown(name, w):
        if name not in quantised:
            return w
        y, scales = latent_grid(w)
        return w + (y.round() * scales - w).detach()

    expected, got = gradients_by_autograd(hp, model, shown), fake_gradients(hp, model, None)
    unrounded = gradients_by_autograd(hp, model, lambda name, w: w)
    for name in expected:
        assert (got[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
    assert all((unrounded[name] - expected[name]).norm() > 1e-3 * expected[name].norm() for name in quantised)


# ----------------------------------------------------------------------------------------------------------
# One grid: training and export
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [1.0, 1.4])
def test_the_grid_is_the_export_grid(multiplier):
    """What QAT shows is what plain rounding exports; GPTQ keeps the same steps and a nearby code."""
    hp = settings(quantizer="rtn", prune_pct=0, mlp_bits=4)
    model = random_model(hp)
    _, qat = quantizer_of(hp, model, multiplier)
    latent = weights_of(model)
    world = tg.World(hp, {})
    hessians = {name: torch.eye(latent[name].size(1)) for name in block_matrices(model)}
    plain, _ = tg.quantize_model(latent, hessians, hp, world, multiplier, trained_grid=True)
    hp = settings(prune_pct=0, mlp_bits=4)
    solved, _ = tg.quantize_model(latent, hessians, hp, world, multiplier, trained_grid=True)
    qat.quantize(None)
    for name in block_matrices(model):
        shown = model.get_parameter(name).detach()
        assert torch.equal(plain[name].dequantize(), shown), name
        assert torch.equal(solved[name].scales, plain[name].scales), name
        assert torch.equal(plain[name].codes, (shown / plain[name].scales[:, None]).round().to(torch.int8)), (
            name
        )
        assert torch.equal(solved[name].codes, plain[name].codes), (
            name
        )  # nothing to compensate under an identity


def test_distance_is_a_quarter_of_a_step_until_weights_are_drawn_to_the_grid():
    hp = settings(model_dim=128, rope_dims=16)
    model = random_model(hp)
    _, qat = quantizer_of(hp, model)
    assert qat.distance() == pytest.approx(0.25, abs=0.005)
    qat.quantize(None)
    assert qat.distance() == pytest.approx(0.0, abs=1e-4)
    qat.restore()
    assert qat.distance() == pytest.approx(0.25, abs=0.005)
    qat.quantize(6.0)
    assert 0.02 < qat.distance() < 0.2


# ----------------------------------------------------------------------------------------------------------
# When it runs
# ----------------------------------------------------------------------------------------------------------


def test_qat_of_pr601_starts_at_step_8976():
    hp = tg.Hyperparameters.from_env({"PRESET": "pr601"})
    active = [step for step in range(hp.iterations) if tg.qat_active(hp, tg.lr_scale(hp, step))]
    assert active == list(range(8976, 9500))


def test_late_qat_of_pr606_starts_below_half_the_learning_rate():
    hp = tg.Hyperparameters.from_env({"PRESET": "pr606"})
    assert not tg.qat_active(hp, 1.0) and not tg.qat_active(hp, 0.5)
    assert tg.qat_active(hp, 0.4999) and tg.qat_active(hp, 0.0)


def test_switches_of_qat():
    never = tg.Hyperparameters.from_env({"LATE_QAT": "0"})
    always = tg.Hyperparameters.from_env({"QAT_ENABLED": "1", "LATE_QAT": "0"})
    for scale in (0.0, 0.3, 1.0):
        assert not tg.qat_active(never, scale)
        assert tg.qat_active(always, scale)


def test_alpha_goes_from_1_to_16():
    hp = tg.Hyperparameters.from_env({"PRESET": "pr606"})
    alphas = [tg.soft_round_alpha(hp, scale) for scale in (1.0, 0.5, 0.4, 0.25, 0.1, 0.0)]
    assert alphas == pytest.approx([1.0, 1.0, 4.0, 8.5, 13.0, 16.0])
    other = tg.Hyperparameters.from_env({"LATE_QAT_THRESHOLD": "0.2", "SOFT_ROUND_ALPHA": "9"})
    assert [tg.soft_round_alpha(other, scale) for scale in (0.3, 0.2, 0.1, 0.0)] == pytest.approx(
        [1, 1, 5, 9]
    )


# ----------------------------------------------------------------------------------------------------------
# Under the compiler
# ----------------------------------------------------------------------------------------------------------


def stepper_of(hp, compiling, seed=0):
    torch.manual_seed(seed)
    tokens = torch.randint(0, hp.vocab_size, (20_000,), generator=torch.Generator().manual_seed(1))
    stream, model = tg.TokenStream([tokens.numpy().astype("uint16")]), random_model(hp, seed)
    stepper = tg.Stepper(hp, model, stream, tg.World(hp, {}), compiling)
    stepper.plain = model  # not its compiled form
    return stepper


def loss_of_a_step(stepper, scale, qat_on):
    """The loss of the first batch at the first weights, which are put back."""
    kept = stepper.flat.weights.clone()
    stepper.stream.position = 0
    stepper.step(scale, 0.9, qat_on)
    loss = float(stepper.flat.slots[0])
    stepper.flat.weights.copy_(kept)
    return loss


def score_of(stepper, score_fn):
    """Mean loss of the weights as they stand, on windows of one shape, as a validation between steps."""
    tokens = torch.arange(7 * 32 + 1, dtype=torch.int32) * 29 % stepper.hp.vocab_size
    windows = tg.sliding_windows(7 * 32, 32, 32)
    counts = torch.ones(7 * 32, dtype=torch.uint8)
    return tg.evaluate(
        stepper.plain, tokens, counts, windows, stepper.world, 3 * 32, score_fn=score_fn
    ).val_loss


def test_the_compiled_model_trains_with_qat_and_nothing_recompiles(monkeypatch):
    """The trap of #315, #421 and #606: a flag in the graph is folded away, or recompiles at every alpha.

    One graph trains and one scores: QAT that starts, an alpha that moves, QAT that stops and validations
    between make no other.
    """
    graphs = []

    def counting(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def compiled_graphs():
        return len(graphs), torch._dynamo.utils.counters["stats"]["unique_graphs"]

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **options | {"backend": counting}))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    hp = settings(attn_bits=2, mlp_bits=2, late_qat_threshold=0.5, **ONE_SHAPE)
    compiled, eager = stepper_of(hp, compiling=True), stepper_of(hp, compiling=False)
    compiled.warm_up()
    assert graphs, "the model was not compiled"
    trained = compiled_graphs()
    first = score_of(compiled, compiled.score_fn)
    before = compiled_graphs()
    assert before[0] == trained[0] + 1  # the one that scores
    cases = [(1.0, False), (0.49, True), (0.3, True), (0.1, True), (0.0, True), (0.7, False)]
    losses, scores = [], []
    for scale, on in cases:
        losses.append(loss_of_a_step(compiled, scale, on))
        scores.append(score_of(compiled, compiled.score_fn))
    assert compiled_graphs() == before
    assert losses == pytest.approx([loss_of_a_step(eager, scale, on) for scale, on in cases], rel=1e-5)
    assert losses[0] == pytest.approx(losses[-1], rel=1e-6)
    assert all(abs(loss - losses[0]) > 1e-3 for loss in losses[2:-1])  # QAT reaches the compiled model
    assert len({round(loss, 6) for loss in losses[1:-1]}) == 4  # and so does every alpha
    assert scores == [first] * len(cases)  # and no validation: it scores the latent weights
    assert first == pytest.approx(score_of(eager, tg.token_losses), rel=1e-5)


@pytest.mark.parametrize("soft", [True, False])
def test_a_step_with_qat_moves_the_latent_weights(soft):
    """After the step the weights are the old ones plus the update, not the rounded ones plus the update."""
    hp = settings(soft_round_qat=int(soft), matrix_lr=0.0, attn_bits=3, mlp_bits=3)
    stepper = stepper_of(hp, compiling=False)
    before = weights_of(stepper.model)
    stepper.step(0.1, 0.9, qat_on=True)
    for name in block_matrices(stepper.model):
        assert torch.equal(stepper.model.get_parameter(name), before[name]), name


def test_training_with_soft_rounding_draws_weights_to_the_grid():
    """From a quarter of a step to at most 0.17, raw and averaged, with #606's alpha.

    The gradients of a sharp staircase are large at its edges: weights leave them and settle near codes.
    """
    hp, steps = settings(train_batch_tokens=128, late_qat_threshold=0.3, soft_round_alpha=16), 60
    raw, averaged = {}, {}
    for on in (True, False):
        stepper = stepper_of(hp, compiling=False)
        assert stepper.qat.distance() == pytest.approx(0.25, abs=0.005)
        ema = tg.EMA(stepper.flat.weights, 0.9)
        for step in range(steps):
            scale = hp.late_qat_threshold * (1 - (step + 1) / steps)
            assert tg.qat_active(hp, scale)
            stepper.step(scale, 0.9, qat_on=on)
            ema.update(stepper.flat.weights)
        raw[on] = stepper.qat.distance()
        stepper.flat.weights.copy_(ema.average)
        averaged[on] = stepper.qat.distance()
    assert raw[False] > 0.24 and averaged[False] > 0.24
    assert raw[True] <= 0.17 and averaged[True] <= 0.17


def markov_text(vocab_size, seed):
    """A text with something to learn: every token has four successors."""
    rng = np.random.default_rng(seed)
    successors, text = rng.integers(0, vocab_size, (vocab_size, 4)), [0]
    for choice in rng.integers(0, 4, 20_000):
        text.append(successors[text[-1], choice])
    return np.array(text, np.uint16)


def rounded_loss(hp, seed, late_qat, steps=60):
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
    stepper.qat.quantize(None)
    rows = torch.from_numpy(stream.sample(64, 33, seed))
    with torch.no_grad():
        return float(stepper.model(rows[:, :-1], rows[:, 1:]))


def test_straight_through_lowers_the_rounded_loss():
    """With so few levels that it shows in seconds."""
    hp = settings(soft_round_qat=0, attn_bits=3, mlp_bits=3, late_qat_threshold=0.5)
    without, with_qat = (rounded_loss(hp, 0, late_qat) for late_qat in (False, True))
    assert with_qat < without - 0.01
