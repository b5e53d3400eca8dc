"""Row scales, rounding, soft-round and the quantised tensor against their formulas."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from reference import reference_round, reference_soft_round

import train_gpt as tg

MAX_CODES = [1, 7, 15, 31, 127]


def some_weight(seed=0, rows=24, columns=40):
    """Rows of very different size, one of them zero, one with a single large entry."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight *= torch.logspace(-3, 1, rows)[:, None]
    weight[5] = 0
    weight[7, 3] = 50.0
    return weight


@pytest.mark.parametrize("max_code", MAX_CODES)
def test_row_scales_are_the_largest_entry_over_the_largest_code(max_code):
    weight = some_weight()
    scales = tg.row_scales(weight, max_code=max_code)
    assert scales.shape == (24,)
    alive = weight.abs().amax(dim=1) > 0
    torch.testing.assert_close(
        scales[alive].float(), weight.abs().amax(dim=1)[alive] / max_code, rtol=1e-3, atol=0
    )
    assert torch.isfinite(scales).all() and (scales > 0).all()


def test_the_rate_multiplier_coarsens_every_row():
    weight = some_weight()
    plain, coarse = tg.row_scales(weight, max_code=15), tg.row_scales(weight, max_code=15, multiplier=1.5)
    alive = weight.any(dim=1)
    torch.testing.assert_close(coarse[alive], 1.5 * plain[alive], rtol=1e-3, atol=0)
    assert int(tg.round_to_grid(weight, coarse, max_code=15).codes.abs().max()) == 10
    assert not tg.round_to_grid(weight, coarse, max_code=15).dequantize()[5].any()


def test_row_scales_of_a_stack():
    stack = torch.stack([some_weight(seed) for seed in range(3)])
    scales = tg.row_scales(stack, max_code=15)
    quantised = tg.round_to_grid(stack, scales, max_code=15)
    for i in range(3):
        alone = tg.round_to_grid(stack[i], tg.row_scales(stack[i], max_code=15), max_code=15)
        assert torch.equal(scales[i], alone.scales)
        assert torch.equal(quantised.codes[i], alone.codes)
        assert torch.equal(quantised.dequantize()[i], alone.dequantize())


def test_small_rows_keep_their_small_step():
    """A floor of 1/max_code, as in the submissions, would round this matrix to zero."""
    weight = some_weight() * 1e-2
    quantised = tg.round_to_grid(weight, tg.row_scales(weight, max_code=15), max_code=15)
    largest = weight.abs().amax(dim=1)
    assert ((quantised.dequantize().abs().amax(dim=1) - largest).abs() <= 1e-3 * largest).all()


@pytest.mark.parametrize("max_code", MAX_CODES)
def test_round_to_grid_equals_the_formula(max_code):
    weight = some_weight(seed=max_code)
    scales = tg.row_scales(weight, max_code=max_code) * torch.linspace(0.3, 3, 24)
    kept = weight.clone()
    quantised = tg.round_to_grid(weight, scales, max_code=max_code)
    assert quantised.codes.dtype == torch.int8 and quantised.max_code == max_code
    assert torch.equal(quantised.scales, scales) and torch.equal(weight, kept)
    expected = reference_round(weight.numpy(), scales.numpy(), max_code)
    assert np.mean(quantised.codes.numpy() != expected) <= 1e-3
    assert np.abs(quantised.codes.numpy() - expected).max() <= 1
    assert quantised.codes.max() == max_code and quantised.codes.min() == -max_code


def test_round_to_grid_by_hand():
    weight = torch.tensor([[0.0, 0.26, -0.74, 0.76, 9.0, -9.0], [10.0, -14.9, 15.1, 24.9, 25.1, -1000.0]])
    quantised = tg.round_to_grid(weight, torch.tensor([0.5, 10.0]), max_code=3)
    assert quantised.codes.tolist() == [[0, 1, -1, 2, 3, -3], [1, -1, 2, 2, 3, -3]]
    assert (quantised.max_code, quantised.role) == (3, "")
    assert quantised.dequantize().tolist() == [[0.0, 0.5, -0.5, 1.0, 1.5, -1.5], [10, -10, 20, 20, 30, -30]]


def test_dequantize_multiplies_every_row_by_its_scale():
    weight = some_weight()
    quantised = tg.round_to_grid(weight, tg.row_scales(weight, max_code=15), max_code=15)
    expected = quantised.codes.double() * quantised.scales.double()[:, None]
    assert quantised.dequantize().dtype == torch.float32
    torch.testing.assert_close(quantised.dequantize().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_code", MAX_CODES)
def test_rounding_is_within_half_a_step(max_code):
    weight = some_weight()
    quantised = tg.round_to_grid(weight, tg.row_scales(weight, max_code=max_code), max_code=max_code)
    error = (quantised.dequantize() - weight).abs() / quantised.scales[:, None]
    assert float(error.max()) <= 0.5 + 1e-3 * max_code
    assert float(error.max()) > 0.45


@pytest.mark.parametrize(("bits", "max_code"), [(2, 1), (5, 15), (6, 31), (8, 127)])
def test_the_largest_code_of_a_symmetric_grid(tiny_hp, bits, max_code):
    with torch.device("meta"):
        model = tg.GPT(dataclasses.replace(tiny_hp, attn_bits=bits, mlp_bits=bits, embed_bits=8))
    assert {*model.max_codes("matrix").values()} == {max_code} != {*model.max_codes("embed").values()} - {127}


def test_storable_scales_are_what_fp16_gives_back_and_never_zero():
    scales = torch.cat((torch.logspace(-12, 4, 400), torch.zeros(1)))
    assert tg.storable(torch.tensor([1e6])).item() == 65504  # not infinite
    stored = tg.storable(scales)
    expected = np.maximum(scales.numpy().astype(np.float16).astype(np.float32), 2.0**-24)
    assert np.array_equal(stored.numpy(), expected) and torch.equal(tg.storable(stored), stored)
    assert (stored > 0).all() and torch.equal(stored.half().float(), stored)
    assert (stored != scales).float().mean() > 0.9


def test_zero_rows():
    weight = torch.zeros(3, 8)
    weight[1, 2] = 1.0
    quantised = tg.round_to_grid(weight, tg.row_scales(weight, max_code=15), max_code=15)
    torch.testing.assert_close(quantised.dequantize(), weight, rtol=1e-3, atol=0)
    assert not quantised.codes[0].any() and not quantised.codes[2].any()


# ----------------------------------------------------------------------------------------------------------
# Soft-round
# ----------------------------------------------------------------------------------------------------------

ALPHAS = [0.5, 1.0, 3.0, 7.5, 16.0]


def some_points():
    """Points off the whole and half numbers, where rounding errors would decide."""
    return torch.linspace(-17.3, 17.3, 4001, dtype=torch.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_soft_round_equals_the_formula(alpha):
    y = some_points()
    torch.testing.assert_close(tg.soft_round(y, alpha), reference_soft_round(y, alpha), rtol=0, atol=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_soft_round_gradient_is_the_derivative(alpha):
    y = some_points().requires_grad_()
    (expected,) = torch.autograd.grad(reference_soft_round(y, alpha).sum(), y)
    (through,) = torch.autograd.grad(tg.soft_round(y, alpha).sum(), y)
    torch.testing.assert_close(through, expected, rtol=1e-8, atol=1e-9)
    analytic = tg.soft_round_gradient(y.detach(), alpha)
    torch.testing.assert_close(analytic, expected, rtol=1e-8, atol=1e-9)
    assert not analytic.requires_grad


def test_soft_round_by_hand():
    y = torch.tensor([0.75, -0.25, 3.0, 2.5], dtype=torch.float64)
    value = 0.5 + 0.5 * math.tanh(0.5) / math.tanh(1.0)
    assert tg.soft_round(y, 2.0).tolist() == pytest.approx([value, value - 1, 3.0, 2.5], abs=1e-9)
    assert value == pytest.approx(0.803388, abs=1e-6)


def test_soft_round_goes_from_the_identity_to_rounding():
    y = some_points()
    distances = [
        float((tg.soft_round(y, alpha) - torch.round(y)).abs().mean()) for alpha in (0.01, 1, 4, 16, 200)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] == pytest.approx(0.25, abs=0.002)
    assert distances[-1] < 0.005
    torch.testing.assert_close(tg.soft_round(y, 0.01), y, rtol=0, atol=1e-4)


def test_soft_round_takes_alpha_as_a_tensor():
    """Alpha changes at every step, and a tensor does not make a compiled function compile again."""
    y = some_points()
    alpha = torch.tensor(5.0, dtype=torch.float64)
    torch.testing.assert_close(tg.soft_round(y, alpha), tg.soft_round(y, 5.0), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        tg.soft_round_gradient(y, alpha), tg.soft_round_gradient(y, 5.0), rtol=0, atol=1e-9
    )


def test_soft_round_is_monotone_and_odd_about_the_half():
    y = some_points()
    for alpha in ALPHAS:
        soft = tg.soft_round(y, alpha)
        assert (soft.diff() > -1e-12).all()
        torch.testing.assert_close(tg.soft_round(-y, alpha), -soft, rtol=0, atol=1e-9)
