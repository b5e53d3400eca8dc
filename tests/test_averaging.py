"""EMA and SWA against their closed forms."""

import pytest
import torch
from reference import reference_ema, reference_swa

import train_gpt as tg


def walk(count=60, dtype=torch.float32):
    """Weights of a run: a start and `count` steps away from it."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count + 1, 5, 3, generator=generator).cumsum(dim=0).to(dtype))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.997, 1.0])
def test_ema_equals_its_closed_form(decay):
    values = walk()
    ema = tg.EMA(values[0], decay)
    for i in range(1, len(values)):
        ema.update(values[i])
        expected = torch.from_numpy(reference_ema(values[: i + 1], decay))
        torch.testing.assert_close(ema.average.double(), expected, rtol=1e-5, atol=1e-5)


def test_ema_starts_at_the_weights_and_has_no_bias_correction():
    ema = tg.EMA(torch.full((4,), 10.0), 0.997)
    assert ema.average.tolist() == [10.0] * 4
    for _ in range(3):
        ema.update(torch.zeros(4))
    torch.testing.assert_close(ema.average, torch.full((4,), 10 * 0.997**3))


def test_ema_moves_by_less_than_bfloat16_can_hold():
    """1e-3 of a small difference disappears in bfloat16; the average of bfloat16 weights is float32."""
    ema = tg.EMA(torch.ones(8, dtype=torch.bfloat16), 0.999)
    for _ in range(100):
        ema.update(torch.full((8,), 1.0078125, dtype=torch.bfloat16))
    assert ema.average.dtype == torch.float32
    torch.testing.assert_close(
        ema.average, torch.full((8,), 1 + 0.0078125 * (1 - 0.999**100)), rtol=1e-6, atol=0
    )


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
    assert ema.average.tolist() == swa.average.tolist() == [50.5] * 4


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
