"""Newton-Schulz and Muon against float64 loops and torch.optim.Muon; the schedules at their corners."""

import copy
import functools
import math
import re

import numpy as np
import pytest
import torch
from conftest import draw, random_model
from reference import POLAR_EXPRESS, reference_lr_scale, reference_muon_step, reference_newton_schulz

import train_gpt as tg

TALL, WIDE, SQUARE = (48, 16), (16, 48), (32, 32)
BFLOAT16 = 0.05  # relative error of one orthogonalisation in bfloat16; measured: 0.03


def noise(*shape, seed=0):
    return draw("noise", shape, seed)


def distance(value, expected):
    return float((value.double() - expected.double()).norm() / expected.double().norm())


# ----------------------------------------------------------------------------------------------------------
# Newton-Schulz
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, (1, 8), (512, 96)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_newton_schulz_equals_float64(shape, scale):
    """In bf16 unless told, in a run of float32 as well as float32 can."""
    matrix = noise(*shape) * scale
    result, expected = tg.newton_schulz(matrix, steps=5), reference_newton_schulz(matrix)
    assert result.shape == shape and result.dtype == matrix.dtype
    assert 1e-4 < distance(result, expected) < BFLOAT16
    assert distance(tg.newton_schulz(matrix, dtype=torch.float32), expected) < 1e-4
    assert distance(result, reference_newton_schulz(matrix, steps=4)) > 2 * BFLOAT16


def test_newton_schulz_takes_five_steps_unless_told():
    matrix = noise(*TALL)
    assert torch.equal(tg.newton_schulz(matrix), tg.newton_schulz(matrix, steps=5))
    assert distance(tg.newton_schulz(matrix, steps=2), reference_newton_schulz(matrix, steps=2)) < BFLOAT16


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (64, 256), (512, 128)])
def test_newton_schulz_makes_singular_values_alike(shape):
    matrix = noise(*shape, seed=1)
    before = torch.linalg.svdvals(matrix / matrix.norm())
    after = torch.linalg.svdvals(tg.newton_schulz(matrix).float())
    assert float(before.max()) < 0.3
    assert float(after.min()) >= 0.3 and float(after.max()) <= 1.3


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_newton_schulz_of_a_stack_is_matrix_by_matrix(shape):
    """Matrices of one stack differ by a million in size; each is divided by its own norm."""
    stack = noise(4, *shape) * torch.tensor([1.0, 1e3, 1e-3, 1.0])[:, None, None]
    results = tg.newton_schulz(stack)
    assert results.shape == stack.shape
    for matrix, result in zip(stack, results, strict=True):
        assert distance(result, tg.newton_schulz(matrix)) < 0.01
        assert distance(result, reference_newton_schulz(matrix)) < BFLOAT16


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_polar_express_equals_float64_and_makes_singular_values_one(shape):
    """Those of at least 0.001 after normalisation end within 0.15 of 1; Jordan's are up to a half off."""
    u, _, v = torch.linalg.svd(noise(*shape).double(), full_matrices=False)
    values = torch.logspace(0, -2.8, min(shape), dtype=torch.float64)
    values = (values / values.norm()).clamp_min(0.00105)
    assert values.min() / values.norm() < 0.0013
    matrix = (7 * u * values @ v).float()
    found = {
        name: tg.newton_schulz(matrix, dtype=torch.float32, coefficients=name) for name in tg.COEFFICIENTS
    }
    assert distance(found["polar"], reference_newton_schulz(matrix, coefficients=POLAR_EXPRESS)) < 1e-4
    ends = {name: torch.linalg.svdvals(each) for name, each in found.items()}
    assert 0.85 < ends["polar"].min() and ends["polar"].max() < 1.15 and ends["jordan"].min() < 0.7


def test_newton_schulz_of_zeros_is_zero_and_its_input_stays():
    assert not tg.newton_schulz(torch.zeros(3, *TALL)).any()
    matrix = noise(*TALL)
    kept = matrix.clone()
    tg.newton_schulz(matrix)
    assert torch.equal(matrix, kept)


# ----------------------------------------------------------------------------------------------------------
# Muon
# ----------------------------------------------------------------------------------------------------------

SHAPES = [TALL, WIDE, SQUARE, TALL, WIDE, TALL, (64, 24)]


def run_muon(make, steps=20, seed=3):
    """Parameters of SHAPES before and after some steps on gradients that are the same in every call."""
    params = [torch.nn.Parameter(noise(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    start = [p.detach().clone() for p in params]
    optimiser = make(params)
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for _ in range(steps):
        gradients.append([torch.randn(p.shape, generator=generator) for p in params])
        for p, gradient in zip(params, gradients[-1], strict=True):
            p.grad = gradient.clone()
        optimiser.step()
    return start, [p.detach() for p in params], gradients


def moved_apart(start, ends, expected):
    """Largest distance between two ends of a run, in units of the way that was gone."""
    return max(
        float((end.double() - wanted.double()).norm() / (wanted.double() - begin.double()).norm())
        for begin, end, wanted in zip(start, ends, expected, strict=True)
    )


def torch_muon(**changed):
    options = dict(lr=0.02, momentum=0.95, weight_decay=0.04, nesterov=True, ns_steps=5)
    return lambda params: torch.optim.Muon(params, adjust_lr_fn="original", **(options | changed))


def test_muon_equals_torch():
    start, ends, _ = run_muon(lambda params: tg.Muon(params, lr=0.02, momentum=0.95, weight_decay=0.04))
    assert moved_apart(start, ends, run_muon(torch_muon())[1]) < 0.02
    for changed in ({"nesterov": False}, {"ns_steps": 4}, {"weight_decay": 0.0}, {"momentum": 0.9}):
        assert moved_apart(start, ends, run_muon(torch_muon(**changed))[1]) > 0.05, changed


@pytest.mark.parametrize("row_norm", [False, True])
def test_muon_equals_the_formula(row_norm):
    start, ends, gradients = run_muon(
        lambda params: tg.Muon(params, lr=0.02, momentum=0.95, weight_decay=0.04, row_norm=row_norm)
    )
    for index, (begin, end) in enumerate(zip(start, ends, strict=True)):
        expected, other = {}, {}
        for variant in (False, True):
            param, buffer = begin.double(), torch.zeros_like(begin)
            for step in gradients:
                param, buffer = reference_muon_step(
                    param, step[index], buffer, 0.02, 0.95, 0.04, row_norm=variant
                )
            (expected if variant == row_norm else other)["end"] = param
        assert moved_apart([begin], [end], [expected["end"]]) < 0.02
        assert moved_apart([begin], [end], [other["end"]]) > 0.05


def test_equalised_muon_with_polar_express_equals_the_formula():
    """#1855's step: rows of one length before they are orthogonalised; each half of it is needed."""
    orthogonalise = functools.partial(tg.newton_schulz, dtype=torch.float32, coefficients="polar")
    start, ends, gradients = run_muon(
        lambda params: tg.Muon(params, 0.02, 0.95, 0.04, equalise=True, orthogonalise=orthogonalise)
    )
    whole = dict(equalise=True, coefficients=POLAR_EXPRESS)
    for index, (begin, end) in enumerate(zip(start, ends, strict=True)):
        for options in (whole, dict(equalise=True), dict(coefficients=POLAR_EXPRESS)):
            param, buffer = begin.double(), torch.zeros_like(begin)
            for step in gradients:
                param, buffer = reference_muon_step(param, step[index], buffer, 0.02, 0.95, 0.04, **options)
            off = moved_apart([begin], [end], [param])
            assert off < 1e-4 if options is whole else off > 0.02, (index, options, off)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_row_norm_moves_every_row_by_the_learning_rate(shape):
    """Also where rows of the gradient differ by a factor of ten thousand."""
    param = torch.nn.Parameter(torch.zeros(shape))
    param.grad = noise(*shape) * torch.logspace(-2, 2, shape[0])[:, None]
    tg.Muon([param], lr=0.1, momentum=0.9, weight_decay=0.0, row_norm=True).step()
    torch.testing.assert_close(param.detach().norm(dim=1), torch.full((shape[0],), 0.1), rtol=0.01, atol=0)


def test_muon_scales_tall_matrices():
    """sqrt(rows / columns) for a tall matrix, 1 for a wide one."""
    for shape, factor in ((TALL, math.sqrt(3)), (WIDE, 1.0)):
        param = torch.nn.Parameter(torch.zeros(shape))
        param.grad = noise(*shape)
        tg.Muon([param], lr=1.0, momentum=0.0, weight_decay=0.0).step()
        assert distance(-param.detach(), factor * reference_newton_schulz(param.grad)) < BFLOAT16


def test_muon_weight_decay_is_decoupled():
    """With a gradient of zero a step only shrinks the weight, by lr times the decay."""
    param = torch.nn.Parameter(noise(*TALL))
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    tg.Muon([param], lr=0.5, momentum=0.9, weight_decay=0.1).step()
    torch.testing.assert_close(param.detach(), before * (1 - 0.5 * 0.1))


def test_muon_reads_lr_and_momentum_at_every_step():
    """A schedule writes them into the parameter groups."""
    param = torch.nn.Parameter(torch.zeros(TALL))
    optimiser = tg.Muon([param], lr=0.1, momentum=0.9, weight_decay=0.0)
    expected, buffer = param.detach().double(), torch.zeros(TALL)
    for i, (lr, momentum) in enumerate(((0.1, 0.5), (0.02, 0.95), (0.0, 0.99), (0.3, 0.0))):
        for group in optimiser.param_groups:
            group["lr"], group["momentum"] = lr, momentum
        param.grad = noise(*TALL, seed=i)
        optimiser.step()
        expected, buffer = reference_muon_step(expected, param.grad, buffer, lr, momentum, 0.0)
    assert distance(param.detach(), expected) < BFLOAT16


def test_muon_leaves_alone_what_has_no_gradient():
    """A parameter that a loss does not reach keeps its value, and its neighbours in the stack get theirs."""
    params = [torch.nn.Parameter(noise(*TALL, seed=i)) for i in range(3)]
    kept = params[1].detach().clone()
    params[0].grad, params[2].grad = noise(*TALL, seed=7), noise(*TALL, seed=8)
    tg.Muon(params, lr=0.1, momentum=0.9, weight_decay=0.1).step()
    assert torch.equal(params[1], kept)
    for i in (0, 2):
        zeros = torch.zeros(TALL)
        expected, _ = reference_muon_step(noise(*TALL, seed=i), params[i].grad, zeros, 0.1, 0.9, 0.1)
        assert distance(params[i].detach() - noise(*TALL, seed=i), expected - noise(*TALL, seed=i)) < BFLOAT16


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="matrices"):
        tg.Muon([torch.nn.Parameter(noise(*TALL)), torch.nn.Parameter(noise(5))], lr=0.1)


def test_muon_continues_from_its_saved_state():
    def step(optimiser, param, seed):
        param.grad = noise(*TALL, seed=seed)
        optimiser.step()

    options = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    param = torch.nn.Parameter(noise(*TALL))
    optimiser = tg.Muon([param], **options)
    step(optimiser, param, 1)
    twin = torch.nn.Parameter(param.detach().clone())
    resumed = tg.Muon([twin], **options)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    forgetful = torch.nn.Parameter(param.detach().clone())
    step(tg.Muon([forgetful], **options), forgetful, 2)
    step(optimiser, param, 2)
    step(resumed, twin, 2)
    assert torch.equal(param, twin)
    assert not torch.equal(param, forgetful)


# ----------------------------------------------------------------------------------------------------------
# Who gets which optimiser
# ----------------------------------------------------------------------------------------------------------

NARROW = {
    "DEVICE": "cpu", "DTYPE": "fp32", "VOCAB_SIZE": "64", "MODEL_DIM": "32", "NUM_LAYERS": "3",
    "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "ROPE_DIMS": "8", "BIGRAM_VOCAB_SIZE": "40", "BIGRAM_DIM": "16",
    "VE_DIM": "16", "VE_LAYERS": "2", "TRAIN_BATCH_TOKENS": "128", "TRAIN_SEQ_LEN": "16",
    "EVAL_SEQ_LEN": "32", "EVAL_STRIDE": "8", "TTT_CHUNK_TOKENS": "64",
}  # fmt: skip


def group_of(name):
    """As the submissions deal them out: by name, and matrices of blocks and projections to Muon."""
    if name == "tok_emb.weight" or name.endswith("embed.weight"):
        return "embed"
    return "matrix" if name.endswith(".weight") and name != "smear_gate.weight" else "control"


def settings(preset="pr606", **changed):
    return tg.Hyperparameters.from_env(
        {"PRESET": preset} | {name.upper(): str(v) for name, v in changed.items()}
    )


def stepper_of(preset):
    """A narrow model of a preset with every parameter random, ready for steps."""
    layers = {"NUM_LAYERS": "5", "TRAIN_SEQ_SCHEDULE": "4@0.5"} if preset.startswith("pr1855") else {}
    hp = tg.Hyperparameters.from_env(NARROW | layers | {"PRESET": preset})
    stream = tg.TokenStream([np.random.default_rng(0).integers(0, 64, 5000).astype("uint16")])
    return tg.Stepper(hp, random_model(hp, spread=0.2), stream, tg.World(hp, {}), compiling=False)


# Learning rates and decays of matrices, tables and the rest.
RATES = dict.fromkeys(("pr606", "pr601", "smoke"), ([0.025, 0.035, 0.025], [0.04] * 3))
RATES["pr1855_smoke"] = [0.026, 0.03, 0.02], [0.095, 0.085, 0.02]


@pytest.mark.parametrize("preset", RATES)
def test_groups_hold_every_parameter_once(preset):
    stepper, (rates, decays) = stepper_of(preset), RATES[preset]
    optimisers, parameters = stepper.optimisers, dict(stepper.model.named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    wanted = {
        kind: {name for name in parameters if group_of(name) == kind}
        for kind in ("matrix", "embed", "control")
    }
    for group, expected in zip(optimisers.groups, wanted.values(), strict=True):
        assert sorted(names[id(p)] for p in group["params"]) == sorted(expected)
    assert [group["lr"] for group in optimisers.groups] == rates
    assert [group["weight_decay"] for group in optimisers.groups] == decays
    logged = [
        re.fullmatch(
            r"optimiser group:(\w+) method:(\w+) tensors:(\d+) params:(\d+) lr:(\S+) weight_decay:(\S+)", line
        ).groups()
        for line in optimisers.describe()
    ]
    sizes = {
        kind: (len(them), sum(parameters[name].numel() for name in them)) for kind, them in wanted.items()
    }
    assert {kind: (int(tensors), int(params)) for kind, _, tensors, params, _, _ in logged} == sizes
    methods = ("muon", "adamw", "adamw")
    assert [each[1] for each in logged] == [*methods]
    assert [(float(lr), float(decay)) for *_, lr, decay in logged] == [*zip(rates, decays)]


@pytest.mark.parametrize("preset", ["pr606", "pr601", "pr1855_smoke"])
def test_steps_equal_plain_optimisers(preset):
    """Gradients, clipping, Muon (row-normalised in pr601, equalised in pr1855), AdamW and the schedule."""
    schedule = [(1.0, 0.92), (1.0, 0.93), (0.6, 0.95), (0.3, 0.99), (0.1, 0.99)]
    stepper, twin = stepper_of(preset), stepper_of(preset)
    groups = {"matrix": [], "embed": [], "control": []}
    parameters = {name: torch.nn.Parameter(p.detach().clone()) for name, p in twin.model.named_parameters()}
    for name, p in parameters.items():
        groups[group_of(name)].append(p)
    (matrix_lr, *rates), (matrix_wd, *decays) = RATES[preset]
    beta2, options = 0.95, dict(row_norm=preset == "pr601")
    if preset == "pr1855_smoke":
        beta2, options = 0.99, dict(equalise=True, coefficients=POLAR_EXPRESS)
    adamw = torch.optim.AdamW(
        [{"params": groups[kind], "weight_decay": wd} for kind, wd in zip(("embed", "control"), decays)],
        betas=(0.9, beta2), eps=1e-8,
    )  # fmt: skip
    buffers = [torch.zeros_like(p) for p in groups["matrix"]]
    begins = {name: p.detach().clone() for name, p in parameters.items()}
    for scale, momentum in schedule:
        x, y = twin.batch()
        text = x, y, tg.document_bounds(twin.hp, x, twin.hp.train_seq_len, twin.world)
        for p in parameters.values():
            p.grad = torch.zeros_like(p)
        torch.func.functional_call(twin.model, parameters, text).backward()
        assert torch.nn.utils.clip_grad_norm_(parameters.values(), 0.3) > 0.3
        for group, lr in zip(adamw.param_groups, rates, strict=True):
            group["lr"] = lr * scale
        adamw.step()
        for i, p in enumerate(groups["matrix"]):
            new, buffers[i] = reference_muon_step(
                p.data, p.grad, buffers[i], matrix_lr * scale, momentum, matrix_wd, **options
            )
            p.data = new.float()
        stepper.step(scale, momentum, qat_on=False)
    for name, p in stepper.model.named_parameters():
        assert moved_apart([begins[name]], [p.detach()], [parameters[name].detach()]) < 2e-3, name


def test_reset_forgets_all_moments():
    """The step after it is the first one again."""
    stepper = stepper_of("smoke")
    begin, ends = stepper.flat.weights.clone(), []
    for _ in range(3):
        stepper.flat.weights.copy_(begin)
        stepper.stream.position = 0
        stepper.step(1.0, 0.9, qat_on=False)
        ends.append(stepper.flat.weights.clone())
        if len(ends) == 2:
            stepper.optimisers.reset()
    assert torch.equal(ends[2], ends[0]) and not torch.equal(ends[1], ends[0])


# ----------------------------------------------------------------------------------------------------------
# Schedules
# ----------------------------------------------------------------------------------------------------------


def scale_at(hp, step, elapsed, reserve=0.0, agreed_step=None):
    """The learning rate of the step that begins when the clock says so, or said so some steps before."""
    clock = tg.Clock(hp.max_wallclock_seconds - reserve)
    clock.agreed, clock.agreed_step = elapsed, step if agreed_step is None else agreed_step
    return tg.lr_scale(hp, tg.progress_at(hp, step, clock))


def test_warmdown_by_the_wall_clock():
    """600 s, warmdown of 3,500 steps: it begins when the time left is 3,500 times the mean step so far."""
    hp = settings()
    step_seconds = 0.09736
    assert scale_at(hp, 0, 0.0) == 1.0
    assert scale_at(hp, 1, 50.0) == 1.0  # twelve steps at this pace: the warmdown is the last 7.2 of them
    assert scale_at(hp, 10, 500.0) == pytest.approx(2 / 7.2)
    begins = (600 - 3500 * step_seconds) / step_seconds
    assert 2600 < begins < 2700
    assert scale_at(hp, math.floor(begins), math.floor(begins) * step_seconds) == 1.0
    first = math.ceil(begins) + 1
    assert 0.999 < scale_at(hp, first, first * step_seconds) < 1.0
    assert scale_at(hp, 4000, 300.0) == 1.0
    assert scale_at(hp, 4000, 400.0) == pytest.approx(200 / (3500 * 0.1))
    assert scale_at(hp, 6000, 600.0) == 0.0
    assert scale_at(hp, 6000, 601.0) == 0.0


def test_the_clock_is_carried_forward_from_the_last_step_that_all_ranks_know():
    """On CUDA a step's clock is read a step late; before the first there is none."""
    hp = settings()
    assert scale_at(hp, 4000, 399.9, agreed_step=3999) == pytest.approx(scale_at(hp, 4000, 400.0))
    assert scale_at(hp, 1, 0.0, agreed_step=0) == 1.0


def test_the_observed_step_of_half_the_learning_rate():
    """The log of #606, seed 1337: scale 0.4997 at step 4,424 of 97.36 ms."""
    assert scale_at(settings(), 4424, 4424 * 0.09736) == pytest.approx(0.4997, abs=0.004)


def test_the_reserve_brings_the_end_forward():
    """Seconds kept back for calibration and solving: the rate is zero where training stops."""
    hp = settings()
    assert scale_at(hp, 5000, 500.0, reserve=20.0) == pytest.approx(80 / (3500 * 0.1))
    assert scale_at(hp, 5800, 580.0, reserve=20.0) == 0.0
    assert scale_at(hp, 2300, 230.0, reserve=20.0) == scale_at(hp, 2500, 250.0) == 1.0
    assert scale_at(hp, 2400, 240.0, reserve=20.0) < 1.0


def test_warmdown_by_steps():
    """Whatever the clock says; the first step of a scale below 0.15 is 8,976."""
    hp = settings("pr601")
    assert scale_at(hp, 0, 0.0) == scale_at(hp, 6000, 1e6) == 1.0
    assert scale_at(hp, 6001, 0.0) == pytest.approx(3499 / 3500)
    assert scale_at(hp, 7750, 0.0) == pytest.approx(0.5)
    assert scale_at(hp, 9499, 0.0) == pytest.approx(1 / 3500)
    below = [step for step in range(9500) if scale_at(hp, step, 1e6) < 0.15]
    assert below == list(range(8976, 9500))


@pytest.mark.parametrize("wallclock", [0, 600])
def test_a_warmdown_by_share_ends_on_its_floor(wallclock):
    """#1855: 1 below a share of 0.15, then straight down, but not below 0.1; by clock or by steps."""
    hp = settings("pr1855", max_wallclock_seconds=wallclock, iterations=6000 if wallclock else 1000)
    for f in (0.001, 0.14, 0.15, 0.2, 0.5, 0.9, 0.915, 0.95, 1.0):
        expected = 1.0 if f < 0.15 else max((1 - f) / 0.85, 0.1)
        assert scale_at(hp, round(1000 * f), 600 * f) == pytest.approx(expected, abs=2e-3), f
    assert scale_at(hp, 1100, 600.0) >= 0.1


def test_layers_loop_from_a_share_of_the_run():
    hp = settings("pr1855", max_wallclock_seconds=0, iterations=1000)
    looped = [tg.loops_on(hp, tg.progress_at(hp, step, tg.Clock(0))) for step in range(1000)]
    assert looped == [False] * 350 + [True] * 650
    clock = tg.Clock(600.0)
    clock.agreed, clock.agreed_step = 210.0, 77
    by_clock = settings("pr1855")
    assert tg.loops_on(by_clock, tg.progress_at(by_clock, 77, clock))
    clock.agreed = 209.0
    assert not tg.loops_on(by_clock, tg.progress_at(by_clock, 77, clock))
    assert not tg.loops_on(settings("pr606"), tg.Progress(999, 1000))


def test_segments_grow_by_the_share_of_the_run():
    hp = settings("pr1855", train_seq_schedule="512@0.1,1024@0.7")
    at = {step: tg.segment_length(hp, tg.Progress(step, 1000)) for step in (0, 99, 100, 699, 700, 999)}
    assert at == {0: 512, 99: 512, 100: 1024, 699: 1024, 700: 2048, 999: 2048}
    assert tg.segment_length(settings("pr1855"), tg.Progress(0, 1000)) == 2048
    for wrong in ("4096@0.1", "512", "512@1.5", "0@0.5", "512@0.1;1024@0.2"):
        with pytest.raises(ValueError, match="TRAIN_SEQ_SCHEDULE must read"):
            settings("pr1855", train_seq_schedule=wrong)


def test_a_step_is_trained_on_segments_of_the_length_that_is_set():
    losses = []
    for longest in (16, 4):
        stepper = stepper_of("pr1855_smoke")
        stepper.longest = longest
        stepper.step(1.0, 0.9, False)
        losses.append(stepper.flat.slot["loss"].item())
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("wallclock", [0, 600, 37.5])
def test_lr_scale_equals_the_formula(wallclock):
    hp = settings(max_wallclock_seconds=wallclock, iterations=900, warmdown_iters=400)
    scales = []
    for step in range(0, 900, 7):
        elapsed = step * 0.04 * (1 + 0.2 * math.sin(step))
        scales.append(scale_at(hp, step, elapsed))
        assert scales[-1] == pytest.approx(reference_lr_scale(step, elapsed, 900, 400, wallclock))
    assert max(scales) == 1.0 and (wallclock == 600 or min(scales) < 0.1)


@pytest.mark.parametrize("env", [
    {"PRESET": "smoke", "ITERATIONS": "30"}, {"PRESET": "pr606", "MAX_WALLCLOCK_SECONDS": "60"},
    {"PRESET": "pr606", "ITERATIONS": "30"}, {"PRESET": "pr601", "ITERATIONS": "3499"}])  # fmt: skip
def test_a_short_run_starts_at_its_full_rate_and_ends_at_none(env):
    """A warmdown of 660 steps in 30 would start at a rate of 0.05, 3,500 in a minute at 0.17, with QAT."""
    hp = tg.Hyperparameters.from_env(env)
    pace = 0.098  # seconds a step: a minute is 612 steps
    total = min(hp.iterations, round((hp.max_wallclock_seconds or 1e9) / pace))
    scales = [scale_at(hp, step, step * pace) for step in range(total + 1)]
    full = round(0.39 * total)
    assert scales[:full] == [1.0] * full and scales[-1] == pytest.approx(0, abs=0.01)
    assert scales[round(0.7 * total)] == pytest.approx(0.5, abs=0.05)
    assert not tg.qat_active(hp, scales[0]) and tg.qat_active(hp, scales[-1])


def test_a_run_as_long_as_its_warmdown_is_left_alone():
    hp = settings(max_wallclock_seconds=0, iterations=3500)
    assert [scale_at(hp, step, 0.0) for step in (0, 1750)] == [1.0, 0.5]


def test_no_warmdown():
    hp = settings(max_wallclock_seconds=0, iterations=10, warmdown_iters=0)
    assert [scale_at(hp, step, 1.0) for step in range(10)] == [1.0] * 10


def test_muon_momentum_warms_up():
    momentum = lambda hp, step: tg.muon_momentum(hp, tg.Progress(step, math.inf))
    hp = settings()
    assert momentum(hp, 0) == pytest.approx(0.92)
    assert momentum(hp, 1) == pytest.approx(0.92 + 0.07 / 1500)
    assert momentum(hp, 750) == pytest.approx(0.955)
    assert momentum(hp, 1499) < 0.99
    assert momentum(hp, 1500) == momentum(hp, 9000) == pytest.approx(0.99)
    changed = settings(muon_momentum=0.8, muon_momentum_warmup_start=0.6, muon_momentum_warmup_steps=10)
    assert momentum(changed, 5) == pytest.approx(0.7)
    assert momentum(settings(muon_momentum_warmup_steps=0), 0) == pytest.approx(0.99)
