"""What becomes of each weight: by role, at the bits that were asked for, and small enough for the limit."""

import contextlib
import dataclasses
import io
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw, random_model, run_here
from reference import EPS32, hessian_error, reference_logits, reference_round
from torch.overrides import TorchFunctionMode

import train_gpt as tg

ATTN = [f"blocks.{i}.attn.{part}.weight" for i in range(3) for part in ("c_q", "c_k", "c_v", "proj")]
MLP = [f"blocks.{i}.mlp.{part}.weight" for i in range(3) for part in ("fc", "proj")]
MATRICES, PARTS = ATTN + MLP, tuple(name.removeprefix("blocks.0") for name in ATTN[:4] + MLP[:2])
EMBEDDINGS = ["tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight"]
WAYS = [(quantizer, rule) for quantizer in tg.QUANTIZERS for rule in tg.STEP_RULES]
FACTS = {"preset": "smoke", "seed": 1, "steps": 2, "script_sha256": "0" * 64, "corpus": "none"}


def some_weight(name, shape):
    sizes = 0.02 + 0.05 * draw(f"{name} rows", (*shape[:-1], 1)).abs() if len(shape) == 2 else 1.0
    return draw(name, shape) * sizes


def some_hessian(name, n):
    """Of correlated inputs."""
    x = draw(f"{name} inputs", (4 * n, n)) @ (draw(f"{name} mix", (n, n)) * torch.logspace(0, -1.5, n)).mT
    return x.mT @ x / len(x)


def described(hp):
    """A model that says what each tensor is, without memory for one."""
    with torch.device("meta"):
        return tg.GPT(hp)


@dataclass
class Given:
    """A model's weights, and for each matrix mean x xT of its inputs."""

    hp: tg.Hyperparameters
    weights: dict
    hessians: dict

    @staticmethod
    def drawn(hp, correlated=True):
        """Rows of different sizes, as after training."""
        shapes = {name: p.shape for name, p in described(hp).named_parameters()}
        weights = {name: some_weight(name, shape) for name, shape in shapes.items()}
        columns = {name: shape[1] for name, shape in shapes.items() if name.endswith(PARTS)}
        hessian = some_hessian if correlated else lambda _name, n: torch.eye(n)
        return Given(hp, weights, {name: hessian(name, n) for name, n in columns.items()})

    @property
    def world(self):
        return tg.World(self.hp, {})

    def quantise(self, multiplier=1.0, world=None, **changes):
        model = described(dataclasses.replace(self.hp, **changes))
        return tg.quantize_model(model, self.weights, self.hessians, world or self.world, multiplier)

    def packed(self, multiplier=1.0, **changes):
        """The file of one multiplier."""
        hp = dataclasses.replace(self.hp, **changes)
        return tg.pack(tg.artifact_config(hp, FACTS), self.quantise(multiplier, **changes)[0])

    def rate(self, room=1 << 30, **changes):
        return tg.Rate(described(dataclasses.replace(self.hp, **changes)), self.weights, room, self.hessians)

    def fit(self, room, code_bytes=1000, passes=(), **changes):
        """What fit_artifact returns for so much room, and the sizes of the files that it made on the way."""
        hp, lines = dataclasses.replace(self.hp, artifact_limit=room + code_bytes, **changes), []
        clock = tg.Budget("training", self.world, 0.0)
        run = tg.Run(hp, self.world, lines.append, Path(), code_bytes, clock, clock, {})
        found = tg.fit_artifact(run, described(hp), self.weights, self.hessians, FACTS, *passes)
        assert all(line.startswith("pack ") for line in lines)
        assert hp.target_bits or all(int(number("room", line)) == room for line in lines)
        return *found, [int(number("model", line)) for line in lines]


def number(key, line):
    """A number of a log line."""
    return float(re.search(rf"\b{key}:([\d.]+)", line)[1])


@pytest.fixture(scope="module")
def given(tiny_hp):
    return Given.drawn(tiny_hp)


def summed_error(weight, rounded, hessian):
    """trace(E H ET) in float64."""
    return hessian_error(weight, rounded.double(), hessian) * len(weight)


def total_error(given, tensors):
    weights, hessians = given.weights, given.hessians
    return sum(summed_error(weights[name], tensors[name].dequantize(), hessians[name]) for name in MATRICES)


def entropy(tensors):
    """Bits per code of several tensors together."""
    _, counts = torch.unique(torch.cat([q.codes.flatten() for q in tensors]), return_counts=True)
    share = counts.double() / counts.sum()
    return float(-(share * share.log2()).sum())


# ----------------------------------------------------------------------------------------------------------
# Roles
# ----------------------------------------------------------------------------------------------------------


def test_every_tensor_by_its_role(given):
    tensors, _ = given.quantise(attn_bits=6, mlp_bits=4, embed_bits=7)
    assert tensors.keys() == given.weights.keys() > set(MATRICES + EMBEDDINGS)
    groups = {"attn": (ATTN, 31), "mlp": (MLP, 7), "embed": (EMBEDDINGS, 63)}
    expected = {name: (role, code) for role, (names, code) in groups.items() for name in names}
    for name, tensor in tensors.items():
        weight = given.weights[name]
        if name in expected:
            assert (tensor.role, tensor.max_code) == expected[name], name
            assert tensor.codes.shape == weight.shape and tensor.codes.dtype == torch.int8
            assert tensor.max_code >= int(tensor.codes.abs().max()) >= tensor.max_code // 2
            assert torch.equal(tensor.scales, tensor.scales.half().float())
        else:
            assert tensor.dtype == torch.float16 and torch.equal(tensor, weight.half()), name


def test_the_size_of_a_tensor_does_not_matter(tiny_hp):
    """The submissions took what has over 65,536 elements; a small matrix counts, a large projection not."""
    sizes = dict(model_dim=8, num_heads=2, num_kv_heads=1, rope_dims=4, bigram_vocab_size=4, bigram_dim=9000)
    small = Given.drawn(dataclasses.replace(tiny_hp, **sizes))
    coded = {name for name, q in small.quantise()[0].items() if isinstance(q, tg.QuantizedTensor)}
    assert coded == {*MATRICES, *EMBEDDINGS}
    assert small.weights["bigram.proj.weight"].numel() > 65_536 > 64 >= small.weights[ATTN[0]].numel()


def test_embeddings_are_rounded_plainly_to_eight_bits(given):
    tensors, _ = given.quantise(prune_pct=0.0)
    for name in EMBEDDINGS:
        weight = given.weights[name]
        scales = (weight.abs().amax(1) / 127).half().float()
        assert torch.equal(tensors[name].scales, scales) and tensors[name].max_code == 127
        expected = reference_round(weight.numpy(), scales.numpy(), 127)
        assert (tensors[name].codes.numpy() == expected).mean() > 0.9999


# ----------------------------------------------------------------------------------------------------------
# Pruning
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9])
def test_pruning_takes_the_smallest(share):
    weight = draw("weight", (40, 50))
    kept = weight.clone()
    pruned = tg.prune_smallest(weight, share)
    gone = pruned == 0
    assert torch.equal(weight, kept) and int(gone.sum()) == int(share * weight.numel())
    assert torch.equal(pruned[~gone], weight[~gone])
    assert not share or float(weight[gone].abs().max()) < float(weight[~gone].abs().min())


def test_pruning_equal_weights_takes_no_more_than_the_share():
    weight = torch.ones(20, 50)
    weight[::2] = -1
    assert int((tg.prune_smallest(weight, 0.02) == 0).sum()) <= 20


def test_pruned_weights_get_the_code_zero(given):
    way = dict(quantizer="rtn", attn_bits=8, mlp_bits=8)
    half, none = (given.quantise(prune_pct=share, **way)[0] for share in (0.5, 0.0))
    for name in MATRICES + EMBEDDINGS:
        size = given.weights[name].abs()
        smallest = size < size.median()
        assert not half[name].codes[smallest].any()
        assert float((none[name].codes == 0).float().mean()) < 0.2 and half[name].codes[~smallest].any()


def test_pruning_is_part_of_the_error(given):
    """A file that is smaller because more is pruned must not look better."""
    errors = [given.quantise(prune_pct=share)[1]["mlp"]["error"] for share in (0.0, 0.1, 0.3)]
    assert errors[0] < errors[1] < 0.5 * errors[2]


# ----------------------------------------------------------------------------------------------------------
# Step rules, rounders, the report
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_gptq_is_better_than_what_does_not_compensate(given, bits):
    changes = dict(attn_bits=bits, mlp_bits=bits, prune_pct=0.0)
    ways = [("gptq", "absmax"), ("rtn", "absmax"), ("rtn", "lite")]
    gptq, plain, lite = (
        total_error(given, given.quantise(quantizer=quantizer, step_rule=rule, **changes)[0])
        for quantizer, rule in ways
    )
    assert gptq < 0.55 * plain and gptq < 0.6 * lite


@pytest.mark.parametrize("quantizer", tg.QUANTIZERS)
@pytest.mark.parametrize("multiplier", [1.0, 1.7])
def test_absmax_steps_are_kept(given, quantizer, multiplier):
    """What QAT hardened for is what is exported: the largest weight over the largest code, times the rate."""
    kept, _ = given.quantise(multiplier, quantizer=quantizer)
    for name in MATRICES:
        largest = given.weights[name].abs().amax(1)
        scales = (largest * (multiplier / kept[name].max_code)).half().float()
        torch.testing.assert_close(kept[name].scales, scales, rtol=1e-3, atol=0)


def test_clipped_steps_are_those_that_gptq_searches(given):
    clipped, _ = given.quantise(step_rule="clip", prune_pct=0.0)
    absmax, _ = given.quantise(prune_pct=0.0)
    for name in MATRICES:
        searched = tg.gptq(given.weights[name], given.hessians[name], 15)
        torch.testing.assert_close(clipped[name].scales, searched.scales, rtol=1e-3, atol=0)
        assert float((clipped[name].codes == searched.codes).float().mean()) > 0.99
        assert float((clipped[name].scales < 0.97 * absmax[name].scales).float().mean()) > 0.2


def test_lite_takes_the_best_clip_by_plain_error(tiny_hp):
    """Rows with outliers, where clipping pays; the submissions' five percentiles tried one by one."""
    sizes = dict(num_layers=1, ve_layers=(0,), mlp_mult=31.25, quantizer="rtn", prune_pct=0.0)
    model, name = (
        Given.drawn(dataclasses.replace(tiny_hp, **sizes), correlated=False),
        "blocks.0.mlp.proj.weight",
    )
    weight = model.weights[name] = draw("weight", (64, 2000))
    weight[:, 0] = 9
    tensors, report = model.quantise(step_rule="lite")
    errors = []
    for share in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        scales = (weight.abs().sort(dim=1).values[:, round(share * 1999)] / 15).half().float()
        codes = torch.from_numpy(reference_round(weight.numpy(), scales.numpy(), 15))
        errors.append((codes * scales.double()[:, None] - weight).square().sum(1))
    own = (tensors[name].dequantize() - weight).double().square().sum(1)
    torch.testing.assert_close(own, torch.stack(errors).amin(0), rtol=1e-4, atol=0)
    plain, lite = report["matrices"][name]
    assert lite < 0.9 * plain


@pytest.mark.parametrize("bits", [5, 8])
def test_sigma_is_the_deviation_of_a_row(given, bits):
    """SDClip: 13 deviations to the largest code of attention, 11.5 of the MLP."""
    tensors, _ = given.quantise(step_rule="sigma", attn_bits=bits, mlp_bits=bits, prune_pct=0.0)
    for name in MATRICES:
        deviations = torch.from_numpy(given.weights[name].double().numpy().std(axis=1, ddof=1))
        expected = deviations * (13.0 if ".attn." in name else 11.5) / (2 ** (bits - 1) - 1)
        torch.testing.assert_close(tensors[name].scales.double(), expected, rtol=1e-3, atol=0)
        assert not tensors[name].columns.any()


def test_water_is_the_factors_diagonal_in_nats(given):
    """One number times U's diagonal in all matrices, and in no column so small that codes leave the grid."""
    given, bounded, multiplier = Given.drawn(given.hp), 0, 1 << 14
    given.weights["blocks.1.mlp.fc.weight"][:3] *= 20  # rows far beyond their matrix's deviation
    given.hessians["blocks.0.mlp.fc.weight"] *= 9.0  # whose outputs matter three times as much
    tensors, _ = given.quantise(multiplier, step_rule="water", attn_bits=8, mlp_bits=8, prune_pct=0.0)
    for name in MATRICES:
        weight, q = given.weights[name].double(), tensors[name]
        assert len(q.scales.unique()) == 1 and int(q.codes.abs().max()) <= 127
        wanted = tg.factor_diagonal(given.hessians[name][None])[0].double() * multiplier / 2**20
        least = 1.6 * weight.abs().amax(0) / 127
        steps = tg.steps_of(q.scales, q.columns)[0].double()
        bounded += int((least > wanted).sum())
        torch.testing.assert_close(steps, torch.maximum(wanted, least), rtol=2 ** (1 / 16) - 0.999, atol=0)
    assert 0 < bounded < 100


def test_the_curvature_is_that_of_the_loss(tiny_hp):
    """By a finite difference: what signed noise on a matrix's outputs adds to the summed loss."""
    hp = dataclasses.replace(tiny_hp, step_rule="water", attn_bits=8, mlp_bits=8)
    model, world = random_model(hp).double(), tg.World(hp, {})
    rows = np.random.default_rng(0).integers(hp.vocab_size, size=(6, 33))
    power = tg.output_curvature(model, rows, world)
    assert power.keys() == {*MATRICES, *EMBEDDINGS}
    x, y = torch.from_numpy(rows[:, :-1]).contiguous(), torch.from_numpy(rows[:, 1:]).contiguous()
    for name in ("blocks.0.attn.c_v.weight", "blocks.1.mlp.fc.weight", "blocks.2.mlp.proj.weight"):
        layer, found = model.get_submodule(name.removesuffix(".weight")), []
        for seed in range(40):
            signs = 1e-5 * draw(f"noise {seed}", (*x.shape, layer.weight.size(0))).sign().double()
            losses = []
            for noise in (signs, -signs):
                hook = layer.register_forward_hook(lambda _layer, _inputs, out, noise=noise: out + noise)
                losses.append(model(x, y).item() * y.numel())
                hook.remove()
            found.append(((losses[0] - losses[1]) / 2e-5) ** 2 / signs.numel())
        assert sum(found) / len(found) == pytest.approx(float(power[name]), rel=0.5), (
            name
        )  # a mean of 40 squares
    both = tg.collect_hessians(model, rows, world)
    model.hp = dataclasses.replace(hp, step_rule="absmax")
    part, plain = tg.output_curvature(model, rows[::4], world), tg.collect_hessians(model, rows, world)
    for name in MATRICES:
        torch.testing.assert_close(both[name], part[name] * plain[name])
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_curvature_of_a_row_is_its_frequency_times_the_gradients(tiny_hp):
    model, world = random_model(tiny_hp).double(), tg.World(tiny_hp, {})
    rows = np.random.default_rng(0).integers(40, size=(6, 33))  # of which most rows are no tokens
    found = tg.output_curvature(model, rows, world)
    x, y = torch.from_numpy(rows[:, :-1]).contiguous(), torch.from_numpy(rows[:, 1:]).contiguous()
    count = torch.bincount(x.flatten(), minlength=tiny_hp.vocab_size)
    for name in ("ve_shared.embed.weight", "tok_emb.weight"):
        torch.testing.assert_close(found[name] / found[name].sum(), count / count.sum(), check_dtype=False)
    assert len(found["bigram.embed.weight"]) == tiny_hp.bigram_vocab_size
    table = model.get_submodule("ve_shared.embed")
    outputs = []
    hook = table.register_forward_hook(lambda _table, _ids, out: outputs.append(out))
    (to_out,) = torch.autograd.grad(model(x, y) * y.numel(), outputs)
    hook.remove()
    expected = to_out.square().mean(-1).sum() / y.numel()
    assert float(found["ve_shared.embed.weight"].sum()) == pytest.approx(float(expected), rel=1e-4)
    with torch.no_grad():
        missed = model(x).softmax(-1) - torch.nn.functional.one_hot(y, tiny_hp.vocab_size)
    output = float(missed.square().sum(-1).mean())
    table, outputs = model.tok_emb, []
    hook = table.register_forward_hook(lambda _table, _ids, out: outputs.append(out))
    (to_out,) = torch.autograd.grad(model(x, y) * y.numel(), outputs)
    hook.remove()
    read = float(to_out.square().mean(-1).sum() / y.numel())
    assert float(found["tok_emb.weight"].sum()) == pytest.approx(output + read, rel=1e-4)


def test_rows_of_tables_follow_their_frequency(given):
    """At most the square root of half, and never finer than the grid needs for the row's largest weight."""
    given, multiplier, name = Given.drawn(given.hp), 1 << 12, "tok_emb.weight"
    weight = given.weights[name]
    use = given.hessians[name] = torch.linspace(0, 2, len(weight)) ** 2
    tensors, _ = given.quantise(multiplier, step_rule="water", attn_bits=8, mlp_bits=8, prune_pct=0.0)
    expected = multiplier / 2**20 / (use + use.mean()).sqrt()
    least, steps = weight.abs().amax(1) / 127, tensors[name].scales
    assert 0 < int((least > expected).sum()) < len(weight) / 2
    torch.testing.assert_close(steps, torch.maximum(least, expected), rtol=2 ** (1 / 16) - 0.999, atol=0)
    plain, _ = given.quantise(1, prune_pct=0.0)
    assert int(tensors[name].codes.abs().max()) <= 127
    for other in EMBEDDINGS[1:]:  # of which nothing is known
        assert torch.equal(tensors[other].codes, plain[other].codes)
    kept, _ = given.quantise(
        multiplier, step_rule="water", attn_bits=8, mlp_bits=8, target_bits=3.0, prune_pct=0.0
    )
    assert torch.equal(kept[name].codes, plain[name].codes)  # bits are those of matrices


def test_tables_give_way_in_a_small_file(given):
    """The file fits where absmax has no step that would do."""
    room, plain = int(0.8 * given.rate().bytes(1e6)), given
    given = Given.drawn(given.hp)
    for name in EMBEDDINGS:
        given.hessians[name] = torch.linspace(0.001, 1, len(given.weights[name])) ** 2
    changes = dict(step_rule="water", attn_bits=8, mlp_bits=8)
    with pytest.raises(tg.UserError, match="no step fits"):
        plain.fit(room)
    blob, _, sizes = given.fit(room, **changes)
    assert 0.98 * room < len(blob) <= room and len(sizes) <= 6
    codes = tg.unpack(blob)[1]["tok_emb.weight"].codes.float()
    assert float(codes[-50:].square().mean()) > 2 * float(codes[:50].square().mean())


def test_a_forecast_that_nothing_meets_is_the_coarsest_step(given):
    """A file that was larger than its forecast by all that there is; one that fits may be kept already."""
    room = len(given.packed(1.3))
    rate = given.rate(room)
    assert 1.0 < rate.multiplier() < 2.0 and tg.COARSEST <= rate.multiplier(over=room) < 2 * tg.COARSEST


@pytest.mark.parametrize(("rule", "bits"), [*((rule, 2.5) for rule in tg.STEP_RULES), ("water", 3.5)])
def test_target_bits_are_what_the_matrices_take(given, rule, bits):
    """Side information included: their share of the file is what it is longer than one without matrices."""
    changes = dict(step_rule=rule, attn_bits=8, mlp_bits=8)
    hp = dataclasses.replace(given.hp, **changes)
    rest = len(tg.pack(tg.artifact_config(hp, {}), tg.quantize_rest(described(hp), given.weights)))
    counted = sum(given.weights[name].numel() for name in MATRICES)
    blob, report, _ = given.fit(1 << 30, target_bits=bits, **changes)
    assert 0.997 * bits < 8 * (len(blob) - rest) / counted <= bits and report["multiplier"] > 1


@pytest.mark.parametrize(("quantizer", "rule"), WAYS)
def test_the_multiplier_coarsens_the_grid(given, quantizer, rule):
    unit = 2.0**16 if rule == "water" else 1.0  # in nats, and far above its bound
    fine, coarse = (given.quantise(m * unit, quantizer=quantizer, step_rule=rule)[0] for m in (1.0, 2.0))
    for name in MATRICES:
        assert int(coarse[name].codes.abs().max()) <= int(fine[name].codes.abs().max())
        assert entropy([coarse[name]]) < entropy([fine[name]]) - 0.5
        assert float((coarse[name].scales / fine[name].scales).median()) == pytest.approx(2, rel=0.01)
    assert total_error(given, coarse) > 2 * total_error(given, fine)
    for name in EMBEDDINGS:
        assert torch.equal(coarse[name].codes, fine[name].codes)


def test_the_report_adds_up(given):
    """Against the errors of what came back, and of plain rounding of the pruned weights."""
    tensors, report = given.quantise(1.2, prune_pct=0.05)
    for role, names in (("attn", ATTN), ("mlp", MLP)):
        error = rounding = 0.0
        for name in names:
            weight, hessian = given.weights[name], given.hessians[name]
            pruned = tg.prune_smallest(weight, 0.05)
            scales = (pruned.abs().amax(1) * (1.2 / 15)).half().float()
            codes = torch.from_numpy(reference_round(pruned.numpy(), scales.numpy(), 15))
            results = codes * scales.double()[:, None], tensors[name].dequantize()
            one = [summed_error(weight, result, hessian) for result in results]
            assert report["matrices"][name] == pytest.approx(one, rel=1e-3)
            rounding, error = rounding + one[0], error + one[1]
        expected = dict(matrices=len(names), error_rounding=rounding, error=error, floored_rows=0)
        assert report[role] == pytest.approx(expected, rel=1e-3)
        assert error < 0.6 * rounding
    assert report["matrices"].keys() == set(MATRICES) and report.keys() == {"attn", "mlp", "matrices"}


@pytest.mark.parametrize(("quantizer", "rule"), WAYS)
def test_rows_on_the_floor_are_counted(given, quantizer, rule):
    """Rows of zeros, or so small that fp16 has no step for them. #606's floor of 1/15 caught nearly all."""
    special = Given.drawn(given.hp)
    for name, rows in (("blocks.0.mlp.fc.weight", [3, 60, 100]), ("blocks.2.attn.c_k.weight", [5])):
        special.weights[name][rows] = 0
        special.weights[name][rows[0]] = 1e-9
    special.weights["blocks.1.mlp.fc.weight"] *= 1e-3  # small, far from the floor
    tensors, report = special.quantise(quantizer=quantizer, step_rule=rule)
    counted = report["mlp"]["floored_rows"], report["attn"]["floored_rows"]
    assert counted == ((0, 0) if rule == "water" else (3, 1))  # whose rows have their matrix's step
    assert float(tensors["blocks.0.mlp.fc.weight"].dequantize()[[3, 60, 100]].abs().max()) < 1e-6


# ----------------------------------------------------------------------------------------------------------
# Hessians, ranks
# ----------------------------------------------------------------------------------------------------------


class Inputs(TorchFunctionMode):
    """Sums x xT over every product x @ weight.T that is made while it is on, by the weight's name."""

    def __init__(self, state, wanted):
        super().__init__()
        self.wanted = wanted
        self.names, self.sums = {weight.data_ptr(): name for name, weight in state.items()}, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = self.names.get(args[1].data_ptr()) if func.__name__ in ("__matmul__", "matmul") else None
        if name in self.wanted:
            self.sums[name] = self.sums.get(name, 0) + args[0].mT @ args[0]
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def calibrated(tiny_hp):
    """A model, sequences, their Hessians."""
    model = random_model(tiny_hp, seed=5)
    ids = torch.randint(0, tiny_hp.vocab_size, (7, 12), generator=torch.Generator().manual_seed(1))
    ids[2, 5] = tg.BOS
    return model, ids.numpy(), tg.collect_hessians(model, ids.numpy(), tg.World(tiny_hp, {}))


def assert_same_hessians(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys()
    for name, hessian in expected.items():
        scale = float(hessian.abs().max())
        torch.testing.assert_close(found[name].to(hessian.dtype), hessian, rtol=rtol, atol=1e-5 * scale)


def test_hessians_are_the_mean_outer_product_of_the_inputs(calibrated, tiny_hp):
    """Every part of the model is on, in the forward pass of tests/reference.py too."""
    model, sequences, hessians = calibrated
    state = {name: weight.double() for name, weight in model.state_dict().items()}
    with Inputs(state, MATRICES) as inputs:
        reference_logits(state, tiny_hp, sequences, eps=EPS32)
    assert hessians.keys() == set(MATRICES) and {h.dtype for h in hessians.values()} == {torch.float32}
    expected = {name: total / sequences.size for name, total in inputs.sums.items()}
    assert_same_hessians(hessians, expected, rtol=1e-3)


@pytest.fixture(scope="module")
def looped(tiny_hp):
    """pr1855's parts at small sizes, its sequences with documents inside, and their Hessians."""
    sizes = (
        "vocab_size",
        "model_dim",
        "num_heads",
        "num_kv_heads",
        "rope_dims",
        "eval_seq_len",
        "device",
        "dtype",
    )
    hp = tg.Hyperparameters.from_env({"PRESET": "pr1855_smoke"})
    hp = dataclasses.replace(hp, **{name: getattr(tiny_hp, name) for name in sizes})
    ids = torch.randint(2, hp.vocab_size, (7, 12), generator=torch.Generator().manual_seed(1))
    ids[2, 5], ids[4, 9] = tg.BOS, tg.BOS
    model = random_model(hp, seed=5)
    return model, ids.numpy(), tg.collect_hessians(model, ids.numpy(), tg.World(hp, {}))


def test_hessians_sum_the_visits_of_a_layer_and_the_table_reads_the_stream(looped):
    """With layers looped, inside documents; the tied table's is that of what the output layer reads."""
    model, sequences, hessians = looped
    matrices = [name for name in model.roles() if name.endswith(PARTS)] + ["tok_emb.weight"]
    state = {name: weight.double() for name, weight in model.state_dict().items()}
    with Inputs(state, matrices) as inputs:
        reference_logits(state, model.hp, sequences, eps=EPS32, longest=12)
    expected = {name: total / sequences.size for name, total in inputs.sums.items()}
    assert_same_hessians(hessians, expected, rtol=1e-3)


def test_the_table_is_solved_as_a_matrix(looped):
    model, _, hessians = looped
    assert "tok_emb.weight" in model.max_codes("matrix") and not model.max_codes("embed")
    weights, world = model.state_dict(), tg.World(model.hp, {})
    tensors, report = tg.quantize_model(model, weights, hessians, world)
    table = tensors["tok_emb.weight"]
    assert (
        table.role == "embed" and table.max_code == 63 and set(report) == {"attn", "mlp", "embed", "matrices"}
    )
    deviations = torch.from_numpy(weights["tok_emb.weight"].double().numpy().std(axis=1, ddof=1))
    torch.testing.assert_close(table.scales.double(), deviations * 14 / 63, rtol=1e-3, atol=0)
    rounded = tg.round_to_grid(weights["tok_emb.weight"], table.scales, 63).dequantize()
    errors = [summed_error(weights["tok_emb.weight"], each, hessians["tok_emb.weight"])
              for each in (table.dequantize(), rounded)]  # fmt: skip
    assert errors[0] < 0.9 * errors[1]
    assert report["embed"]["error"] == pytest.approx(errors[0], rel=1e-3)
    assert report["embed"]["error_rounding"] == pytest.approx(errors[1], rel=1e-3)  # on the same steps


def test_queries_keys_and_values_share_one_hessian(calibrated):
    *_, hessians = calibrated
    for i in range(3):
        shared = {id(hessians[f"blocks.{i}.attn.c_{kind}.weight"]) for kind in "qkv"}
        own = {id(hessians[f"blocks.{i}.{part}.weight"]) for part in ("attn.proj", "mlp.fc", "mlp.proj")}
        assert len(shared) == 1 and len(own - shared) == 3


@pytest.mark.parametrize("batch_tokens", [1, 24, 50, 10**6])
def test_hessians_do_not_depend_on_the_batch(calibrated, given, batch_tokens):
    model, sequences, hessians = calibrated
    assert_same_hessians(tg.collect_hessians(model, sequences, given.world, batch_tokens), hessians)


def test_calibration_leaves_the_model_alone(calibrated, given):
    model, sequences, _ = calibrated
    before = {name: p.clone() for name, p in model.named_parameters()}
    tg.collect_hessians(model, sequences, given.world)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def on_ranks(size, hp, work):
    """What work(world) returns on each of `size` ranks, which are threads, with the sums of a group."""
    barrier, parts = threading.Barrier(size, timeout=60), [None] * size

    class Rank(tg.World):
        def __init__(self, rank):
            super().__init__(hp, {})
            self.rank, self.size = rank, size

        def sum_(self, tensor):
            parts[self.rank] = tensor.clone()
            barrier.wait()
            total = sum(parts)
            barrier.wait()
            return tensor.copy_(total)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, map(Rank, range(size))))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_calibration_and_codes_do_not_depend_on_the_number_of_ranks(calibrated, given, size):
    """Seven sequences and stacks of six and three matrices: shares that are uneven, and ranks without any."""
    model, sequences, hessians = calibrated
    weights, (tensors, report) = model.state_dict(), given.quantise()

    def work(world):
        own = tg.GPT(given.hp)  # hooks hang on a model
        own.load_state_dict(weights)
        return tg.collect_hessians(own, sequences, world), *given.quantise(world=world)

    for found, codes, errors in on_ranks(size, given.hp, work):
        assert_same_hessians(found, hessians)
        for name in MATRICES:
            assert torch.equal(codes[name].codes, tensors[name].codes)
            assert torch.equal(codes[name].scales, tensors[name].scales)
        for role in ("attn", "mlp"):
            assert errors[role] == pytest.approx(report[role])


# ----------------------------------------------------------------------------------------------------------
# Rate
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(tiny_hp):
    """Three million weights, which are sampled, one matrix of them far from Gaussian."""
    larger = Given.drawn(
        dataclasses.replace(tiny_hp, model_dim=256, num_layers=4, quantizer="rtn"), correlated=False
    )
    heavy = larger.weights["blocks.1.mlp.fc.weight"]
    heavy *= heavy.abs()
    return larger


@pytest.mark.parametrize(
    "changes", [{}, dict(attn_bits=6, mlp_bits=4), dict(embed_bits=5, prune_pct=0.0)], ids=str
)
@pytest.mark.parametrize("multiplier", [1.0, 1.6, 2.8])
def test_the_rate_is_what_packing_plainly_rounded_codes_gives(given, larger, changes, multiplier):
    """Of three million weights, which are sampled, and of a file of 100 kB, where the header counts."""
    for model, tolerance in ((larger, 0.005), (given, 0.006)):
        packed = len(model.packed(multiplier, quantizer="rtn", **changes))
        assert model.rate(**changes).bytes(multiplier) == pytest.approx(packed, rel=tolerance)


def test_the_multiplier_is_the_smallest_that_fits(larger):
    rate = larger.rate()
    most, least = rate.bytes(1.0), rate.bytes(1e4)

    def fitted(limit):
        rate.limit = limit
        return rate.multiplier()

    assert fitted(most) == fitted(10 * most) == 1.0
    for share in (0.02, 0.3, 0.7, 0.999):
        limit = least + share * (most - least)
        multiplier = fitted(limit)
        assert multiplier > 1 and rate.bytes(multiplier) <= limit < rate.bytes(0.998 * multiplier)
    sizes = [rate.bytes(multiplier) for multiplier in (1, 1.5, 2, 4, 6)]
    assert sizes == sorted(sizes, reverse=True)


def room_for(model, share, **changes):
    """Bytes between what plain codes need at the finest step and what is left where every code is zero."""
    rate = model.rate(**changes)
    return int(rate.bytes(1e4) + share * (rate.bytes(1.0) - rate.bytes(1e4)))


@pytest.mark.parametrize("share", [0.95, 0.6])
@pytest.mark.parametrize(
    "changes", [{}, {"quantizer": "rtn"}, {"prune_pct": 0.3}, {"attn_bits": 6, "mlp_bits": 4}]
)
def test_a_small_limit_is_filled_and_never_passed(given, share, changes):
    """By GPTQ's codes, which cost more than plain ones here, and by pruned ones, which cost less."""
    room = room_for(given, 0.9 * share if "prune_pct" in changes else share, **changes)
    blob, report, sizes = given.fit(room, **changes)
    assert 0.997 * room <= len(blob) <= room and report["multiplier"] > 1
    assert len(blob) == max(size for size in sizes if size <= room)


def test_the_first_file_of_gptq_is_too_large_where_its_codes_cost_more(given):
    """What the test above stands on; and where one pass must do, that is an error and no file."""
    room = room_for(given, 0.7)
    _, _, sizes = given.fit(room)
    assert sizes[0] > room >= sizes[-1]
    with pytest.raises(tg.UserError) as caught:
        given.fit(room, passes=(1,))
    (line,) = str(caught.value).splitlines()
    assert f"{room}B" in line and "ARTIFACT_LIMIT" in line and "model.pt is kept" in line


@pytest.mark.parametrize("share", [1.5, 0.8])
def test_what_is_packed_is_what_was_quantised(given, share):
    """A file that fits anyway is not coarsened; any other is that of the multiplier in the report."""
    blob, report, sizes = given.fit(room_for(given, share))
    multiplier = report.pop("multiplier")
    assert (multiplier == 1.0 and len(sizes) == 1) if share > 1 else multiplier > 1
    assert report == given.quantise(multiplier)[1]
    assert blob == given.packed(multiplier, artifact_limit=room_for(given, share) + 1000)


def test_code_counts_against_the_limit(given):
    size = len(given.packed())
    room = round(1.01 * size)
    kept, smaller = (given.fit(room - longer, 60_000 + longer)[0] for longer in (0, 3000))
    assert len(kept) == size and 0.997 * (room - 3000) <= len(smaller) <= room - 3000


@pytest.mark.parametrize(("limit", "code_bytes"), [(20_000, 1000), (1000, 1000), (1000, 5000)])
def test_a_limit_that_nothing_meets_is_one_clear_error(given, limit, code_bytes):
    with pytest.raises(tg.UserError) as caught:
        given.fit(limit - code_bytes, code_bytes)
    (line,) = str(caught.value).splitlines()
    assert "no step" in line and "MODEL_DIM" in line


@pytest.mark.whole
def test_a_model_of_pr606_s_layers_fits_by_the_rate_alone():
    """Three of them, of Gaussian weights: 0.3 % below the limit at most, close to their codes' entropy."""
    three = {"NUM_LAYERS": "3", "VE_LAYERS": "1,2"}
    hp = tg.Hyperparameters.from_env({"PRESET": "pr606", "DEVICE": "cpu", "QUANTIZER": "rtn", **three})
    shapes = {name: p.shape for name, p in described(hp).named_parameters()}
    g, zeros = torch.Generator().manual_seed(0), {n: torch.zeros(n, n) for n in (512, 1792)}
    weights = {name: torch.randn(shape, generator=g).mul_(0.05) for name, shape in shapes.items()}
    hessians = {name: zeros[shape[1]] for name, shape in shapes.items() if name.endswith(PARTS)}
    model = Given(hp, weights, hessians)
    room = 5_300_000
    blob, report, sizes = model.fit(room, 170_000)
    assert 0.997 * room < len(blob) <= room
    assert len(sizes) <= 2 and 1 < report["multiplier"] < 3
    tensors = tg.unpack(blob)[1]
    codes = {
        role: [t for t in tensors.values() if getattr(t, "role", "") == role]
        for role in ("attn", "mlp", "embed")
    }
    count = {role: sum(t.codes.numel() for t in group) for role, group in codes.items()}
    assert count["attn"] + count["mlp"] == 3 * 31_719_424 // 11
    bound = sum(entropy(group) * count[role] / 8 for role, group in codes.items())
    beside = sum(2 * (t.scales if isinstance(t, tg.QuantizedTensor) else t).numel() for t in tensors.values())
    assert len(blob) <= 1.007 * bound + beside + 20_000


def test_at_equal_entropy_the_rate_is_better_than_a_floor_on_scales():
    """#606 never let a step be finer than 1/15. Layers whose weights are small because their inputs are large
    do not differ from the others, and only a rate that goes by each row's size sees that."""
    layers = []
    for size in (1.0, 0.4, 0.15):
        mix = draw(f"mix {size}", (96, 96)) * torch.logspace(0, -1, 96)
        x = draw(f"inputs {size}", (400, 96)) @ mix.mT / size
        layers.append((draw(f"weight {size}", (64, 96)) * 0.25 * size, x.mT @ x / 400))

    def solve(steps):
        solved = [tg.gptq(weight, hessian, 15, scales=steps(weight)) for weight, hessian in layers]
        error = sum(summed_error(w, q.dequantize(), h) for (w, h), q in zip(layers, solved))
        return entropy(solved), error

    bits, floored = solve(lambda weight: (weight.abs().amax(1) / 15).clamp_min(1 / 15))
    low, high = 1.0, 20.0
    while high - low > 1e-3 * low:
        middle = (low + high) / 2
        at, error = solve(lambda weight: tg.row_scales(weight, 15, middle))  # noqa: B023
        low, high = (middle, high) if at > bits else (low, middle)
    assert at == pytest.approx(bits, abs=0.01) and error < 0.8 * floored


# ----------------------------------------------------------------------------------------------------------
# The stage
# ----------------------------------------------------------------------------------------------------------

ZEROED = {"blocks.0.attn.c_q.weight": 5, "blocks.1.mlp.fc.weight": 3}


def compress_here(folder, env):
    """STAGES=quantize of what lies in a folder: exit status, standard output, standard error."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = run_here(folder, env | {"STAGES": "quantize"})
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny, given):
    """A run's folder with weights that were drawn, some rows zero, and an artifact; what the run said."""
    folder, weights = tmp_path_factory.mktemp("stage"), {name: w.clone() for name, w in given.weights.items()}
    for name, rows in ZEROED.items():
        weights[name][:rows] = 0
    (folder / "logs/run").mkdir(parents=True)
    torch.save(weights, folder / "logs/run/model.pt")
    status, out, err = compress_here(folder, tiny | {"RUN_ID": "run"})
    assert status == 0, err
    return folder, out


def lines_of(out, start):
    """The key:value pairs of each line that starts so."""
    return [dict(re.findall(r"(\S+?):(\S+)", line)) for line in out.splitlines() if line.startswith(start)]


def test_the_log_states_the_memory_of_calibration(stage, tiny_hp):
    """Sequences, and the process's peak."""
    (line,) = lines_of(stage[1], "calibrated ")
    assert line["sequences"] == f"{tiny_hp.gptq_calib_sequences}x{tiny_hp.train_seq_len}"
    assert line["peak_memory"].endswith("MiB") and 50 < float(line["peak_memory"][:-3]) < 20_000


def test_the_log_states_errors_and_rows_on_the_floor(stage):
    folder, out = stage
    result = json.loads((folder / "logs/run/result.json").read_text())["proofs"]["quantizer"]
    for role, rows in (("attn", 5), ("mlp", 3)):
        (line,) = [line for line in lines_of(out, "proof technique:gptq") if line["role"] == role]
        assert int(line["floored_rows"]) == rows == result[role]["floored_rows"]
        assert float(line["error"]) == pytest.approx(result[role]["error"], rel=1e-3)
        ratio = result[role]["error"] / result[role]["error_rounding"]
        assert float(line["ratio"]) == pytest.approx(ratio, abs=1e-3) and 0 < ratio < 1


def test_the_log_states_bytes_by_role(stage):
    """Counted again from the file: every section, plain and packed, and their sum."""
    folder, out = stage
    blob = (folder / "logs/run/artifact.bin").read_bytes()
    tensors = tg.unpack(blob)[1]
    sections = {line["section"]: line for line in lines_of(out, "bytes ")}
    assert sum(int(line["bytes"]) for line in sections.values()) == len(blob)
    coded = {"attn.15": ATTN, "mlp.15": MLP, "embed.127": EMBEDDINGS}
    plain = {key: sum(tensors[name].codes.numel() for name in names) for key, names in coded.items()}
    plain["scales"] = sum(2 * len(tensors[name].scales) for name in MATRICES + EMBEDDINGS)
    plain["classes"] = sum(tensors[name].codes.size(1) for name in MATRICES)
    plain["columns"] = plain["classes"] + sum(tensors[name].codes.size(1) for name in EMBEDDINGS)
    plain["raw.float16"] = sum(
        2 * tensors[name].numel() for name in tensors.keys() - {*MATRICES, *EMBEDDINGS}
    )
    assert {key: int(line["plain_bytes"]) for key, line in sections.items() if key != "header"} == plain
    result = json.loads((folder / "logs/run/result.json").read_text())["artifact"]
    assert result["model_bytes"] == len(blob) and set(result["sections"]) == set(sections)


def test_an_artifact_that_cannot_fit_is_an_error_and_the_model_is_kept(stage, tiny):
    """Exit status 1 and one line; neither log nor result.json speaks of an artifact, and there is none."""
    folder = stage[0]
    run, weights = folder / "logs/hopeless", (folder / "logs/run/model.pt").read_bytes()
    run.mkdir()
    (run / "model.pt").write_bytes(weights)
    limit = Path(tg.__file__).stat().st_size + 12_000
    status, out, err = compress_here(folder, tiny | {"RUN_ID": "hopeless", "ARTIFACT_LIMIT": str(limit)})
    assert status == 1 and err.startswith("error: ") and len(err.splitlines()) == 1
    assert not lines_of(out, "artifact ") and not lines_of(out, "proof ")
    assert (run / "model.pt").read_bytes() == weights and not (run / "artifact.bin").exists()
    result = run / "result.json"
    assert not result.exists() or "artifact" not in json.loads(result.read_text())
