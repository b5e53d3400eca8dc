"""The GPTQ solver against a float64 loop over columns, and on inputs that are not nice."""

import functools

import numpy as np
import pytest
import torch
from reference import hessian_error, reference_gptq, reference_round
from torch.overrides import TorchFunctionMode

import train_gpt as tg

# One block of columns, a partial one, several; more and fewer rows than columns.
SHAPES = [(32, 96), (16, 150), (48, 320), (200, 40)]


def some_weight(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def correlated_inputs(columns, seed=0, tokens=None):
    """Activations with a decaying spectrum and channels of different size, (tokens, columns) float64."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((columns, columns)))[0] * np.sqrt(columns)
    x = rng.standard_normal((tokens or 4 * columns, columns)) * np.geomspace(1, 0.15, columns) @ rotation
    return x * np.exp(0.5 * rng.standard_normal(columns))


def hessian_of(x):
    return torch.from_numpy(x.T @ x / len(x)).float()


def absmax_scales(weight, max_code=15):
    """Steps that fp16, in which they are stored, holds exactly."""
    return (weight.abs().amax(dim=1) / max_code).half().float()


def plain_error(weight, hessian, scales, max_code=15):
    codes = reference_round(weight.numpy(), scales.numpy(), max_code)
    return hessian_error(weight, codes * scales.double().numpy()[:, None], hessian)


def solved_error(weight, hessian, quantised):
    return hessian_error(weight, quantised.dequantize().double(), hessian)


def agreement(quantised, codes):
    return float(np.mean(quantised.codes.numpy() == codes))


def assert_valid(quantised, weight, max_code=15):
    assert quantised.codes.dtype == torch.int8 and quantised.codes.shape == weight.shape
    assert quantised.scales.shape == weight.shape[:-1] and quantised.max_code == max_code
    assert int(quantised.codes.abs().max()) <= max_code
    assert torch.isfinite(quantised.dequantize()).all()


# ----------------------------------------------------------------------------------------------------------
# The algorithm
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_about_half_of_plain_rounding(shape):
    weight, hessian = some_weight(*shape), hessian_of(correlated_inputs(shape[1]))
    plain = tg.round_to_grid(weight, tg.row_scales(weight, max_code=15), max_code=15)
    quantised = tg.gptq(weight, hessian, max_code=15)
    assert_valid(quantised, weight)
    assert solved_error(weight, hessian, quantised) <= 0.55 * solved_error(weight, hessian, plain)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_code", [7, 15, 31])
def test_equals_the_reference_on_the_same_scales(shape, max_code):
    """Columns in descending order: the largest inputs while there are columns left to correct them."""
    weight, hessian = some_weight(*shape), hessian_of(correlated_inputs(shape[1]))
    scales = absmax_scales(weight, max_code)
    quantised = tg.gptq(weight, hessian, max_code=max_code, scales=scales)
    assert_valid(quantised, weight, max_code)
    assert torch.equal(quantised.scales, scales)
    codes = reference_gptq(weight, hessian, scales, max_code)
    expected = hessian_error(weight, codes * scales.double().numpy()[:, None], hessian)
    assert solved_error(weight, hessian, quantised) == pytest.approx(expected, rel=0.02)
    assert expected <= 0.55 * plain_error(weight, hessian, scales, max_code)
    assert agreement(quantised, codes) > 0.99
    if max_code == 15:
        assert agreement(quantised, reference_gptq(weight, hessian, scales, max_code, descending=False)) < 0.9


@pytest.mark.parametrize("rule", tg.STEP_RULES)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_equals_the_reference_on_the_steps_of_every_rule(rule, shape):
    weight, hessian = some_weight(*shape), hessian_of(correlated_inputs(shape[1]))
    multiplier = {"sigma": 2.0, "water": 2.0**13}.get(rule, 0.6)
    diagonal = functools.partial(tg.factor_diagonal, hessian[None])
    scales, columns = (each[0] for each in tg.grid_of(rule, weight[None], 15, multiplier, diagonal))
    max_code = 127  # so that nothing is clipped
    quantised = tg.gptq(weight, hessian, max_code, scales=scales, columns=columns)
    assert_valid(quantised, weight, max_code)
    assert torch.equal(quantised.columns, columns) and bool(columns.any()) == (rule == "water")
    codes = reference_gptq(weight, hessian, scales, max_code, columns=columns.numpy())
    steps = tg.steps_of(scales, columns).double().numpy()
    expected = hessian_error(weight, codes * steps, hessian)
    assert solved_error(weight, hessian, quantised) == pytest.approx(expected, rel=0.02)
    assert agreement(quantised, codes) > 0.98
    plain = tg.round_to_grid(weight, scales, max_code, columns)
    assert expected <= 0.55 * solved_error(weight, hessian, plain)


def test_the_factors_diagonal_is_what_later_inputs_do_not_say():
    """1 / U_jj^2 is input j's variance once those of a smaller diagonal are known: a Schur complement."""
    hessian = hessian_of(correlated_inputs(40)).double()
    diagonal = tg.factor_diagonal(hessian[None], damp=0.0)[0]
    order = hessian.diagonal().argsort(descending=True).tolist()
    for at in (0, 1, 17, 38, 39):
        j, later = order[at], order[at + 1 :]
        told = hessian[j, later] @ torch.linalg.solve(hessian[later][:, later], hessian[later, j])
        assert float(diagonal[j] ** -2) == pytest.approx(float(hessian[j, j] - told), rel=1e-6)


def code_length(codes):
    """Bits a code, each column by its own statistics of the normal distribution that it is."""
    deviation = codes.double().square().mean(0).add(1 / 12).sqrt()
    return float((deviation * (2 * np.pi * np.e) ** 0.5).log2().mean())


def test_water_costs_less_than_equal_columns_at_the_same_rate():
    """The geometric mean of U_jj^-2 over the arithmetic one, as theory says."""
    weight, hessian = some_weight(400, 160), hessian_of(correlated_inputs(160))
    diagonal = functools.partial(tg.factor_diagonal, hessian[None])
    multiplier = 0.015 * 2**20 / float(diagonal().log().mean().exp())
    scales, columns = (each[0] for each in tg.grid_of("water", weight[None], 127, multiplier, diagonal))
    water = tg.gptq(weight, hessian, 127, scales=scales, columns=columns)
    flat = tg.gptq(weight, hessian, 127, scales=scales * 2 ** (columns.double().mean() / 8).float())
    assert code_length(flat.codes) == pytest.approx(code_length(water.codes), abs=0.03)
    variance = diagonal()[0].double() ** -2
    expected = float(variance.log().mean().exp() / variance.mean())
    ratio = solved_error(weight, hessian, water) / solved_error(weight, hessian, flat)
    assert expected < 0.9 and ratio == pytest.approx(expected, rel=0.05)


def test_columns_come_back_in_their_places():
    """Shuffling the inputs shuffles the codes and does nothing else."""
    weight, hessian = some_weight(32, 96), hessian_of(correlated_inputs(96))
    scales = absmax_scales(weight)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    straight = tg.gptq(weight, hessian, max_code=15, scales=scales)
    shuffled = tg.gptq(weight[:, order], hessian[order][:, order], max_code=15, scales=scales)
    assert float((shuffled.codes == straight.codes[:, order]).float().mean()) > 0.99


@pytest.mark.parametrize("damp", [0.01, 0.3])
def test_damping_is_a_share_of_the_mean_diagonal(damp):
    weight, hessian = some_weight(32, 96), hessian_of(correlated_inputs(96)) * 37.0
    scales = absmax_scales(weight)
    quantised = tg.gptq(weight, hessian, max_code=15, scales=scales, damp=damp)
    assert agreement(quantised, reference_gptq(weight, hessian, scales, 15, damp)) > 0.99
    assert agreement(quantised, reference_gptq(weight, hessian, scales, 15, 0.31 - damp)) < 0.9


def test_the_size_of_the_hessian_does_not_matter():
    weight, hessian = some_weight(32, 96), hessian_of(correlated_inputs(96))
    first = tg.gptq(weight, hessian, max_code=15)
    for factor in (2.0**-20, 2.0**20):
        again = tg.gptq(weight, hessian * factor, max_code=15)
        assert float((again.codes == first.codes).float().mean()) > 0.99


def test_uncorrelated_inputs_leave_plain_rounding():
    weight, scales = some_weight(32, 96), absmax_scales(some_weight(32, 96))
    quantised = tg.gptq(weight, torch.diag(torch.linspace(0.5, 2, 96)), max_code=15, scales=scales)
    assert agreement(quantised, reference_round(weight.numpy(), scales.numpy(), 15)) > 0.999


def test_its_own_scales_are_no_worse_than_the_largest_entry():
    """Rows with one outlier are where the search for a clip value pays."""
    weight, hessian = some_weight(48, 160), hessian_of(correlated_inputs(160))
    weight[:, 17] *= 6
    own = tg.gptq(weight, hessian, max_code=15)
    given = tg.gptq(weight, hessian, max_code=15, scales=absmax_scales(weight))
    assert solved_error(weight, hessian, own) <= 1.02 * solved_error(weight, hessian, given)


SHARES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62, 0.54)


@pytest.mark.parametrize("max_code", [7, 15, 31])
@pytest.mark.parametrize("shape", [(64, 64), (48, 160)])
def test_its_own_scales_pay_after_the_errors_were_moved(shape, max_code):
    """Against absmax, and against the best of eight clips that a full solve of each would find row by row.

    A search by what plain rounding does to H is up to 3 % worse than absmax here, one by squared error more.
    """
    own = absmax = best = 0.0
    for seed in range(4):
        weight, hessian = some_weight(*shape, seed=seed), hessian_of(correlated_inputs(shape[1], seed=seed))
        own += solved_error(weight, hessian, tg.gptq(weight, hessian, max_code=max_code))
        rows = []
        for share in SHARES:
            scales = (weight.abs().amax(dim=1) * (share / max_code)).half().float()
            quantised = tg.gptq(weight, hessian, max_code=max_code, scales=scales)
            error = quantised.dequantize().double() - weight
            rows.append(((error @ hessian.double()) * error).sum(1))
        absmax, best = absmax + float(rows[0].mean()), best + float(torch.stack(rows).amin(0).mean())
    assert own <= 1.01 * absmax and own <= 1.1 * best


def test_clips_follow_the_hessian_and_not_the_squared_error():
    """An outlier is clipped where its input is weak and kept where it is strong, one matrix in two places."""
    weight = some_weight(24, 96)
    weight[:, 17] = weight[:, 17].sign() * 6 * weight.abs().amax()
    share = {}
    for strength in (1e-3, 1e3):
        diagonal = torch.ones(96)
        diagonal[17] = strength
        scales = tg.gptq(weight, torch.diag(diagonal), max_code=15).scales
        share[strength] = scales / absmax_scales(weight)
    assert float(share[1e-3].max()) < 0.6 and float(share[1e3].min()) > 0.98


class Calls(TorchFunctionMode):
    """The names of PyTorch's functions and methods that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_stack_takes_as_many_calls_as_one_row():
    """Clips and columns are walked for all at once; quantiles, slow on a GPU, are not used."""
    hessian, seen = hessian_of(correlated_inputs(40)), []
    for matrices, rows in ((1, 1), (1, 50), (6, 50)):
        weight = torch.stack([some_weight(rows, 40, seed=i) for i in range(matrices)])
        with Calls() as calls:
            tg.gptq(weight, hessian.expand(matrices, 40, 40), max_code=15)
        seen.append(calls.names)
    assert seen[0] == seen[1] == seen[2] and "amax" in seen[0]
    assert not {"quantile", "nanquantile", "kthvalue"} & set(seen[0])


def test_a_stack_is_solved_matrix_by_matrix():
    """Each with its own column order, scales, damping and dead columns."""
    weight = torch.stack([some_weight(24, 150, seed=i) * 10.0**i for i in range(3)])
    hessian = torch.stack([hessian_of(correlated_inputs(150, seed=i)) * 100.0**i for i in range(3)])
    hessian[1, 20], hessian[1, :, 20] = 0, 0
    together = tg.gptq(weight, hessian, max_code=15)
    assert_valid(together, weight)
    for i in range(3):
        alone = tg.gptq(weight[i], hessian[i], max_code=15)
        torch.testing.assert_close(together.scales[i], alone.scales, rtol=1e-5, atol=0)
        assert float((together.codes[i] == alone.codes).float().mean()) > 0.99
        ratio = hessian_error(weight[i], together.dequantize()[i].double(), hessian[i]) / solved_error(
            weight[i], hessian[i], alone
        )
        assert ratio == pytest.approx(1, abs=0.02)


def test_inputs_are_left_alone():
    weight, hessian = some_weight(32, 96), hessian_of(correlated_inputs(96))
    hessian[11], hessian[:, 11] = 0, 0
    scales = absmax_scales(weight)
    kept = weight.clone(), hessian.clone(), scales.clone()
    tg.gptq(weight, hessian, max_code=15)
    tg.gptq(weight, hessian, max_code=15, scales=scales)
    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1]) and torch.equal(scales, kept[2])


def test_same_input_same_codes():
    weight, hessian = some_weight(32, 96), hessian_of(correlated_inputs(96))
    first, again = (tg.gptq(weight, hessian, max_code=15) for _ in range(2))
    assert torch.equal(first.codes, again.codes) and torch.equal(first.scales, again.scales)


# ----------------------------------------------------------------------------------------------------------
# Inputs that are not nice
# ----------------------------------------------------------------------------------------------------------


def test_dead_columns():
    """An input that was always zero: nothing depends on it, the others are solved as if it were not there."""
    weight, x = some_weight(32, 96), correlated_inputs(96)
    x[:, [0, 40, 95]] = 0
    weight[:, 40] = 7.0
    hessian, scales = hessian_of(x), absmax_scales(some_weight(32, 96))
    quantised = tg.gptq(weight, hessian, max_code=15, scales=scales)
    assert_valid(quantised, weight)
    codes = reference_gptq(weight, hessian, scales, 15)
    alive = [i for i in range(96) if i not in (0, 40, 95)]
    assert not quantised.codes[:, [0, 40, 95]].any()  # zeros cost nothing in the file
    expected = hessian_error(weight, codes * scales.double().numpy()[:, None], hessian)
    assert solved_error(weight, hessian, quantised) == pytest.approx(expected, rel=0.02)
    assert np.mean(quantised.codes.numpy()[:, alive] == codes[:, alive]) > 0.97


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**-10, 1.0, 2.0**20])
def test_dead_columns_do_not_set_the_damping(factor):
    """Squared ReLU leaves hidden units that never fire next to ones that are tiny."""
    weight, x = some_weight(32, 96), correlated_inputs(96)
    x[:, 60:] = 0
    hessian, scales = hessian_of(x), absmax_scales(weight)
    quantised = tg.gptq(weight, hessian * factor, max_code=15, scales=scales)
    codes = reference_gptq(weight, hessian, scales, 15)
    expected = hessian_error(weight, codes * scales.double().numpy()[:, None], hessian)
    assert solved_error(weight, hessian, quantised) == pytest.approx(expected, rel=0.02)


def test_fewer_tokens_than_columns():
    """A singular Hessian; damping makes it solvable, and there is much room to move errors to."""
    weight, hessian = some_weight(32, 96), hessian_of(correlated_inputs(96, tokens=30))
    quantised = tg.gptq(weight, hessian, max_code=15)
    assert_valid(quantised, weight)
    assert solved_error(weight, hessian, quantised) <= 0.3 * plain_error(
        weight, hessian, absmax_scales(weight)
    )


def test_a_hessian_that_is_not_positive_definite():
    """Eigenvalues a little below zero, which damping mends, and far below, which it does not."""
    weight, hessian = some_weight(32, 96), hessian_of(correlated_inputs(96, tokens=30))
    slightly = hessian - 1e-3 * hessian.diagonal().mean() * torch.eye(96)
    assert float(torch.linalg.eigvalsh(slightly).min()) < 0
    quantised = tg.gptq(weight, slightly, max_code=15)
    assert_valid(quantised, weight)
    assert solved_error(weight, hessian, quantised) <= 0.3 * plain_error(
        weight, hessian, absmax_scales(weight)
    )
    badly = hessian - 0.1 * hessian.diagonal().mean() * torch.eye(96)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(badly + 0.01 * badly.diagonal().mean() * torch.eye(96))
    quantised = tg.gptq(weight, badly, max_code=15)
    assert_valid(quantised, weight)
    assert solved_error(weight, hessian, quantised) <= 2 * plain_error(weight, hessian, absmax_scales(weight))


def test_one_bad_matrix_does_not_spoil_its_stack():
    weight = torch.stack([some_weight(24, 96, seed=i) for i in range(2)])
    good, bad = hessian_of(correlated_inputs(96)), hessian_of(correlated_inputs(96, tokens=30))
    bad = bad - 0.1 * bad.diagonal().mean() * torch.eye(96)
    together = tg.gptq(weight, torch.stack([good, bad]), max_code=15)
    assert_valid(together, weight)
    alone = tg.gptq(weight[0], good, max_code=15)
    assert float((together.codes[0] == alone.codes).float().mean()) > 0.99


def test_a_layer_that_saw_nothing():
    weight = some_weight(8, 20)
    assert_valid(tg.gptq(weight, torch.zeros(20, 20), max_code=15), weight)


def test_zero_rows():
    weight, hessian = some_weight(32, 96), hessian_of(correlated_inputs(96))
    weight[[0, 13]] = 0
    quantised = tg.gptq(weight, hessian, max_code=15)
    assert_valid(quantised, weight)
    assert not quantised.dequantize()[[0, 13]].any()
    others = [i for i in range(32) if i not in (0, 13)]
    alone = tg.gptq(weight[others], hessian, max_code=15)
    assert float((quantised.codes[others] == alone.codes).float().mean()) > 0.99


def test_one_row():
    weight, hessian = some_weight(1, 96), hessian_of(correlated_inputs(96))
    scales = absmax_scales(weight)
    quantised = tg.gptq(weight, hessian, max_code=15, scales=scales)
    assert_valid(quantised, weight)
    assert agreement(quantised, reference_gptq(weight, hessian, scales, 15)) > 0.95


def test_one_column():
    weight, scales = some_weight(32, 1), torch.full((32,), 11 / 1024)
    quantised = tg.gptq(weight, torch.tensor([[2.5]]), max_code=15, scales=scales)
    assert_valid(quantised, weight)
    assert agreement(quantised, reference_round(weight.numpy(), scales.numpy(), 15)) == 1
    assert_valid(tg.gptq(weight, torch.tensor([[2.5]]), max_code=15), weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    weight, hessian = some_weight(8, 20), hessian_of(correlated_inputs(20))
    broken = weight.clone()
    broken[3, 4] = value
    with pytest.raises(ValueError):
        tg.gptq(broken, hessian, max_code=15)
    broken = hessian.clone()
    broken[3, 4] = value
    with pytest.raises(ValueError):
        tg.gptq(weight, broken, max_code=15)
    broken = absmax_scales(weight)
    broken[2] = value
    with pytest.raises(ValueError):
        tg.gptq(weight, hessian, max_code=15, scales=broken)


@pytest.mark.parametrize(
    ("weight", "hessian"),
    [
        ((8, 20), (8, 8)),
        ((8, 20), (20, 19)),
        ((8, 20), (20,)),
        ((20,), (20, 20)),
        ((2, 8, 20), (20, 20)),
        ((2, 8, 20), (3, 20, 20)),
        ((8, 20), (2, 20, 20)),
    ],
)
def test_shapes_that_do_not_match_are_refused(weight, hessian):
    with pytest.raises(ValueError):
        tg.gptq(torch.ones(weight), torch.ones(hessian), max_code=15)


@pytest.mark.parametrize("columns", [(7,), (8,), (20, 1), (1,)])
def test_columns_of_another_shape_are_refused(columns):
    with pytest.raises(ValueError, match="columns"):
        tg.gptq(some_weight(8, 20), torch.eye(20), 15, scales=torch.ones(8), columns=torch.zeros(columns))


@pytest.mark.parametrize("scales", [(7,), (20,), (8, 1), (1,)])
def test_scales_of_another_shape_are_refused(scales):
    with pytest.raises(ValueError):
        tg.gptq(some_weight(8, 20), torch.eye(20), max_code=15, scales=torch.ones(scales))
