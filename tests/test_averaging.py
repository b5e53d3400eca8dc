"""EMA and SWA against their closed forms."""

import pytest
import torch
from reference import reference_ema, reference_swa

import train_gpt as tg


def walk(count=60, dtype=torch.float32):
    """Weights of a run: a start and `count` steps away from it."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count + 1, 5, 3, generator=generator).cumsum(dim=0).to(dtype))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.997, 0.9999])
def test_ema_equals_its_closed_form(decay):
    values = walk()
    ema = tg.EMA(values[0], decay)
    for i in range(1, len(values)):
        ema.update(values[i])
        expected = torch.from_numpy(reference_ema(values[: i + 1], decay))
        torch.testing.assert_close(ema.average.double(), expected, rtol=1e-5, atol=1e-5)


def test_nothing_of_the_start_is_left_after_one_step():
    """As a first value 84 % of it would be left after 60 steps with decay 0.997, 16 % after 600."""
    ema = tg.EMA(torch.full((4,), 10.0), 0.997)
    assert ema.average.tolist() == [10.0] * 4
    ema.update(torch.zeros(4))
    assert ema.average.tolist() == [0.0] * 4


def test_a_long_average_is_what_it_would_be_with_the_start():
    """After 6,000 updates with #606's decay the start weighs 1.5e-8."""
    values = torch.randn(6001, 4, generator=torch.Generator().manual_seed(1)).double().numpy()
    ema, plain = tg.EMA(torch.from_numpy(values[0]), 0.997), values[0]
    for value in values[1:]:
        ema.update(torch.from_numpy(value))
        plain = 0.997 * plain + (1 - 0.997) * value
    torch.testing.assert_close(ema.average.double(), torch.from_numpy(plain), rtol=0, atol=1e-6)


def test_ema_moves_by_less_than_bfloat16_can_hold():
    """1e-3 of a small difference disappears in bfloat16; the average of bfloat16 weights is float32."""
    low, high = (torch.full((8,), value, dtype=torch.bfloat16) for value in (1.0, 1.0078125))
    ema = tg.EMA(low, 0.999)
    ema.update(low)
    for _ in range(100):
        ema.update(high)
    assert ema.average.dtype == torch.float32
    share = (1 - 0.999**100) / (1 - 0.999**101)
    torch.testing.assert_close(ema.average, torch.full((8,), 1 + 0.0078125 * share), rtol=1e-6, atol=0)


def test_averages_are_copies():
    """Optimisers write weights in place; neither the start nor an update may follow them, nor be written."""
    weight = torch.ones(4)
    ema, swa = tg.EMA(weight, 0.5), tg.SWA(weight)
    ema.update(weight)
    swa.update(weight)
    weight.mul_(100)
    assert ema.average.tolist() == swa.average.tolist() == [1.0] * 4
    ema.update(weight)
    swa.update(weight)
    assert weight.tolist() == [100.0] * 4
    assert swa.average.tolist() == [50.5] * 4
    torch.testing.assert_close(ema.average, torch.full((4,), 67.0))  # (1 / 4 + 100 / 2) / (1 / 4 + 1 / 2)


@pytest.mark.parametrize("count", [1, 2, 14, 60])
def test_swa_equals_the_mean(count):
    values = walk()[1 : count + 1]
    swa = tg.SWA(torch.full((5, 3), 99.0))  # no snapshot is taken of what it is made with
    assert swa.count == 0
    for i, value in enumerate(values):
        swa.update(value)
        assert swa.count == i + 1
        expected = torch.from_numpy(reference_swa(values[: i + 1]))
        torch.testing.assert_close(swa.average.double(), expected, rtol=1e-5, atol=1e-5)


def test_swa_of_bfloat16_weights_is_float32():
    """A sum of 400 ones plus small differences kept in bfloat16 would stop at 256."""
    weights = torch.full((8,), 1.0078125, dtype=torch.bfloat16)
    swa = tg.SWA(weights)
    for _ in range(400):
        swa.update(weights)
    assert swa.average.dtype == torch.float32
    torch.testing.assert_close(swa.average, torch.full((8,), 1.0078125), rtol=1e-5, atol=0)


def test_averages_of_trained_parameters_carry_no_gradient():
    parameter = torch.nn.Parameter(torch.ones(3))
    ema, swa = tg.EMA(parameter, 0.9), tg.SWA(parameter)
    ema.update(parameter)
    swa.update(parameter)
    assert not ema.average.requires_grad and not swa.average.requires_grad


@pytest.mark.parametrize("make", [lambda tensor: tg.EMA(tensor, 0.9), tg.SWA], ids=["ema", "swa"])
def test_an_average_goes_on_from_its_state(make):
    values = walk(20)
    whole, first, second = make(values[0]), make(values[0]), make(torch.zeros(5, 3))
    for i, value in enumerate(values[1:]):
        whole.update(value)
        (first if i < 7 else second).update(value)
        if i == 6:
            second.load_state_dict(first.state_dict())
    assert torch.equal(second.average, whole.average) and not torch.equal(first.average, whole.average)
