"""What becomes of each weight: by role, at the bits that were asked for, and small enough for the limit."""

import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import os
import re
import socket
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from reference import hessian_error, reference_round

import train_gpt as tg

ENV = {"PRESET": "smoke", "DEVICE": "cpu", "DTYPE": "fp32", "NUM_LAYERS": "3", "MODEL_DIM": "64",
       "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "MLP_MULT": "2", "VOCAB_SIZE": "256",
       "BIGRAM_VOCAB_SIZE": "128", "BIGRAM_DIM": "32", "VE_DIM": "32", "VE_LAYERS": "1,2", "ROPE_DIMS": "8"}
MATRICES = [f"blocks.{i}.{part}.weight" for i in range(3)
            for part in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")]
EMBEDDINGS = ["tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight"]


def settings(**changes):
    return dataclasses.replace(tg.Hyperparameters.from_env(ENV), **changes)


WORLD = tg.World(settings(), {})


def some_weights(hp, seed=0):
    """A model's tensors with rows of different sizes, as after training."""
    g = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in tg.GPT(hp).named_parameters()}
    return {name: torch.randn(shape, generator=g) * (0.02 + 0.08 * torch.rand(*shape[:-1], 1, generator=g))
            if len(shape) == 2 else torch.randn(shape, generator=g) for name, shape in shapes.items()}


def some_hessians(weights, seed=0):
    """Mean x xT of correlated inputs, one per matrix."""
    g = torch.Generator().manual_seed(seed)
    hessians = {}
    for name in weights:
        if name in MATRICES:
            n = weights[name].shape[1]
            mix = torch.randn(n, n, generator=g) * torch.logspace(0, -1.5, n)
            x = torch.randn(4 * n, n, generator=g) @ mix.mT
            hessians[name] = x.mT @ x / len(x)
    return hessians


@pytest.fixture(scope="module")
def given():
    weights = some_weights(settings())
    return weights, some_hessians(weights)


def quantise(given, multiplier=1.0, trained_grid=False, **changes):
    return tg.quantize_model(*given, settings(**changes), WORLD, multiplier, trained_grid)


def summed_error(weight, rounded, hessian):
    """trace(E H ET) in float64."""
    return hessian_error(weight, rounded.double(), hessian) * len(weight)


def total_error(given, tensors):
    weights, hessians = given
    return sum(summed_error(weights[name], tensors[name].dequantize(), hessians[name]) for name in MATRICES)


# ----------------------------------------------------------------------------------------------------------
# Roles
# ----------------------------------------------------------------------------------------------------------


def test_every_tensor_by_its_role(given):
    weights, _ = given
    tensors, _ = quantise(given, attn_bits=6, mlp_bits=4, embed_bits=7)
    assert tensors.keys() == weights.keys() and set(MATRICES + EMBEDDINGS) < set(weights)
    for name, tensor in tensors.items():
        if name in MATRICES + EMBEDDINGS:
            assert tensor.max_code == (63 if name in EMBEDDINGS else 31 if ".attn." in name else 7), name
            assert tensor.codes.shape == weights[name].shape and tensor.codes.dtype == torch.int8
            assert tensor.max_code >= int(tensor.codes.abs().max()) >= tensor.max_code // 2
            assert torch.equal(tensor.scales, tensor.scales.half().float())
        else:
            assert tensor.dtype == torch.float16 and torch.equal(tensor, weights[name].half()), name


def test_the_size_of_a_tensor_does_not_matter():
    """The submissions took what has over 65,536 elements; a matrix of four counts, a large gain does not."""
    g = torch.Generator().manual_seed(0)
    weights = {"blocks.0.attn.c_q.weight": torch.randn(2, 2, generator=g),
               "blocks.0.mlp.proj.weight": torch.randn(1, 3, generator=g),
               "tok_emb.weight": torch.randn(3, 2, generator=g), "bigram.proj.weight": torch.randn(400, 200,
               generator=g),
               "blocks.0.attn.attn_gate.weight": torch.randn(300, 300, generator=g),
               "ve_shared.proj.weight": torch.randn(300, 300, generator=g),
               "skip_weights": torch.randn(2, 70_000, generator=g),
               "blocks.0.resid_mix": torch.randn(2, 70_000)}
    hessians = {"blocks.0.attn.c_q.weight": torch.eye(2), "blocks.0.mlp.proj.weight": torch.eye(3)}
    tensors, _ = tg.quantize_model(weights, hessians, settings(num_layers=1), WORLD)
    coded = {name for name, tensor in tensors.items() if isinstance(tensor, tg.QuantizedTensor)}
    assert coded == {"blocks.0.attn.c_q.weight", "blocks.0.mlp.proj.weight", "tok_emb.weight"}
    assert all(tensors[name].dtype == torch.float16 for name in weights.keys() - coded)


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_the_last_layers_may_have_six_bits(given, last):
    tensors, _ = quantise(given, attn_bits=5, mlp_bits=4, int6_last_n=last)
    for name in MATRICES:
        expected = 31 if int(name.split(".")[1]) >= 3 - last else 15 if ".attn." in name else 7
        assert tensors[name].max_code == expected, name


def test_embeddings_are_rounded_plainly_to_eight_bits(given):
    weights, _ = given
    tensors, _ = quantise(given, prune_pct=0.0)
    for name in EMBEDDINGS:
        scales = (weights[name].abs().amax(1) / 127).half().float()
        assert torch.equal(tensors[name].scales, scales) and tensors[name].max_code == 127
        expected = reference_round(weights[name].numpy(), scales.numpy(), 127)
        assert (tensors[name].codes.numpy() == expected).mean() > 0.9999


def test_a_model_without_matrices_is_an_error():
    with pytest.raises(ValueError):
        tg.quantize_model({"tok_emb.weight": torch.ones(4, 4), "skip_weights": torch.ones(2, 4)}, {},
        settings(),
                          WORLD)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_solve_what_one_process_solves(given, size):
    """Each rank leaves the others' matrices zero; their sum, which a group takes, is the whole."""
    whole, report = quantise(given)
    parts = []
    for rank in range(size):
        world = tg.World(settings(), {})
        world.rank, world.size = rank, size
        parts.append(tg.quantize_model(*given, settings(), world))
    for name in MATRICES:
        assert torch.equal(sum(tensors[name].codes.int() for tensors, _ in parts), whole[name].codes.int())
        assert torch.equal(sum(tensors[name].scales for tensors, _ in parts), whole[name].scales)
        assert sum(bool(tensors[name].scales.any()) for tensors, _ in parts) == 1
    total = sum(part["mlp"]["error"] for _, part in parts)
    assert total == pytest.approx(report["mlp"]["error"])


# ----------------------------------------------------------------------------------------------------------
# Pruning
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9])
def test_pruning_takes_the_smallest(share):
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    kept = weight.clone()
    pruned = tg.prune_smallest(weight, share)
    assert torch.equal(weight, kept) and int((pruned == 0).sum()) == int(share * 2000)
    gone = pruned == 0
    assert torch.equal(pruned[~gone], weight[~gone])
    assert not share or float(weight[gone].abs().max()) < float(weight[~gone].abs().min())


def test_pruning_equal_weights_takes_no_more_than_the_share():
    weight = torch.ones(20, 50)
    weight[::2] = -1
    assert int((tg.prune_smallest(weight, 0.02) == 0).sum()) <= 20


def test_pruned_weights_get_the_code_zero(given):
    weights, _ = given
    half, none = (quantise(given, quantizer="rtn", prune_pct=share, attn_bits=8, mlp_bits=8)[0]
                  for share in (0.5, 0.0))
    for name in MATRICES + EMBEDDINGS:
        smallest = weights[name].abs() < weights[name].abs().median()
        assert not half[name].codes[smallest].any()
        assert float((none[name].codes == 0).float().mean()) < 0.2 and half[name].codes[~smallest].any()


# ----------------------------------------------------------------------------------------------------------
# Errors, grids, the report
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_gptq_is_better_than_what_does_not_compensate(given, bits):
    changes = dict(attn_bits=bits, mlp_bits=bits, prune_pct=0.0)
    error = {kind: total_error(given, quantise(given, quantizer=kind, **changes)[0])
             for kind in ("gptq", "gptq_lite", "rtn")}
    assert error["gptq"] < 0.55 * error["rtn"] and error["gptq"] < 0.6 * error["gptq_lite"]


def test_gptq_lite_takes_the_best_clip_by_plain_error():
    """Rows with outliers, where clipping pays; the submissions' five percentiles tried one by one."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 4000, generator=g)
    weight[:, 0] = 9
    given = {"blocks.0.mlp.fc.weight": weight}, {"blocks.0.mlp.fc.weight": torch.eye(4000)}
    tensors, report = tg.quantize_model(*given, settings(quantizer="gptq_lite", prune_pct=0.0), WORLD)
    q = tensors["blocks.0.mlp.fc.weight"]
    for row in range(16):
        magnitude = sorted(weight[row].abs().tolist())
        errors = []
        for share in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
            scale = torch.tensor([magnitude[round(share * 3999)] / 15]).half().float()
            codes = torch.from_numpy(reference_round(weight[row: row + 1].numpy(), scale.numpy(), 15))
            errors.append(float(((codes * scale.double() - weight[row]) ** 2).sum()))
        own = float(((q.dequantize()[row] - weight[row]).double() ** 2).sum())
        assert own == pytest.approx(min(errors), rel=1e-4)
    assert report["mlp"]["error"] < 0.9 * report["mlp"]["error_rounding"]


@pytest.mark.parametrize("multiplier", [1.0, 1.7])
def test_a_trained_grid_is_kept(given, multiplier):
    """What QAT hardened for is what is exported; without QAT the clip is searched, where no rate coarsens it."""
    weights, _ = given
    kept, _ = quantise(given, multiplier, True)
    searched, _ = quantise(given, multiplier, False)
    for name in MATRICES:
        pruned = tg.prune_smallest(weights[name], settings().prune_pct)
        scales = (pruned.abs().amax(1) * (multiplier / kept[name].max_code)).half().float()
        torch.testing.assert_close(kept[name].scales, scales, rtol=1e-3, atol=0)
        assert torch.equal(searched[name].scales, kept[name].scales) == (multiplier > 1)


@pytest.mark.parametrize("kind", ["gptq", "gptq_lite", "rtn"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_multiplier_coarsens_the_grid(given, kind, trained):
    fine, coarse = (quantise(given, m, trained, quantizer=kind)[0] for m in (1.0, 2.0))
    for name in MATRICES:
        assert int(coarse[name].codes.abs().max()) <= int(fine[name].codes.abs().max())
        entropy = [tg.code_entropy_bits(tg.code_histogram(q[name].codes, 15)) for q in (fine, coarse)]
        assert entropy[1] < entropy[0] - 0.5 * fine[name].codes.numel()
        if kind != "gptq" or trained:
            assert float((coarse[name].scales / fine[name].scales).median()) == pytest.approx(2, rel=0.01)
    assert total_error(given, coarse) > 2 * total_error(given, fine)
    for name in EMBEDDINGS:
        assert int(coarse[name].codes.abs().max()) == 127


def test_the_report_adds_up(given):
    """Against the errors of what came back, and of plain rounding of the pruned weights."""
    weights, hessians = given
    tensors, report = quantise(given, prune_pct=0.05)
    for role, count in (("attn", 12), ("mlp", 6)):
        names = [name for name in MATRICES if f".{role}." in name]
        assert report[role]["matrices"] == len(names) == count and report[role]["floored_rows"] == 0
        error = rounding = 0.0
        for name in names:
            pruned = tg.prune_smallest(weights[name], 0.05)
            scales = (pruned.abs().amax(1) / 15).half().float()
            codes = torch.from_numpy(reference_round(pruned.numpy(), scales.numpy(), 15))
            plain = codes * scales.double()[:, None]
            one = (summed_error(weights[name], plain, hessians[name]),
                   summed_error(weights[name], tensors[name].dequantize(), hessians[name]))
            assert report["matrices"][name] == pytest.approx(one, rel=1e-3)
            rounding, error = rounding + one[0], error + one[1]
        assert report[role]["error_rounding"] == pytest.approx(rounding, rel=1e-3)
        assert report[role]["error"] == pytest.approx(error, rel=1e-3)
    assert report["mlp"]["error"] < 0.6 * report["mlp"]["error_rounding"]


def test_pruning_is_part_of_the_error(given):
    """A rung that prunes more must not look better than the one before."""
    errors = [quantise(given, prune_pct=share)[1]["mlp"]["error"] for share in (0.0, 0.1, 0.3)]
    assert errors[0] < errors[1] < 0.5 * errors[2]


@pytest.mark.parametrize("kind", ["gptq", "gptq_lite", "rtn"])
def test_rows_on_the_floor_are_counted(given, kind):
    """Rows of zeros, or so small that fp16 has no step for them. #606's floor of 1/15 caught nearly all."""
    weights, hessians = dict(given[0]), given[1]
    for name, rows in (("blocks.0.mlp.fc.weight", [3, 60, 100]), ("blocks.2.attn.c_k.weight", [5])):
        weights[name] = weights[name].clone()
        weights[name][rows] = 0
        weights[name][rows[0]] = 1e-9
    tensors, report = tg.quantize_model(weights, hessians, settings(quantizer=kind), WORLD)
    assert report["mlp"]["floored_rows"] == 3 and report["attn"]["floored_rows"] == 1
    assert float(tensors["blocks.0.mlp.fc.weight"].dequantize()[[3, 60, 100]].abs().max()) < 1e-6
    weights["blocks.1.mlp.fc.weight"] = weights["blocks.1.mlp.fc.weight"] * 1e-3  # small, far from the floor
    report = tg.quantize_model(weights, hessians, settings(quantizer=kind), WORLD)[1]
    assert report["mlp"]["floored_rows"] == 3


# ----------------------------------------------------------------------------------------------------------
# Hessians
# ----------------------------------------------------------------------------------------------------------

PLAIN = dict(xsa_last_n=0, smear_gate=False, bigram_vocab_size=0, ve_enabled=False, value_residual=False,
             gated_attention=False, smear_reset_at_bos=False)


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1.2e-7).sqrt()


def matrix_inputs(model, hp, tokens):
    """The inputs of every block matrix for one sequence, float64, from a forward pass of our own.

    The parts that are checked elsewhere are off: what is left is attention, MLP, skips and the mix with x0.
    """
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    T, H, G, d = len(tokens), hp.num_heads, hp.num_kv_heads, hp.model_dim // hp.num_heads
    angle = torch.outer(torch.arange(T).double(),
                        hp.rope_base ** (-torch.arange(0, hp.rope_dims, 2).double() / hp.rope_dims))

    def turn(x):
        half = hp.rope_dims // 2
        out = x.clone()
        for h in range(x.shape[1]):
            a, b = x[:, h, :half], x[:, h, half: 2 * half]
            out[:, h, :half] = a * angle.cos() + b * angle.sin()
            out[:, h, half: 2 * half] = b * angle.cos() - a * angle.sin()
        return out

    inputs, skips = {}, []
    x = x0 = norm(w["tok_emb.weight"][tokens])
    for i in range(hp.num_layers):
        at = f"blocks.{i}."
        if i >= hp.num_layers // 2 and skips:
            x = x + w["skip_weights"][i - hp.num_layers // 2] * skips.pop()
        x = w[at + "resid_mix"][0] * x + w[at + "resid_mix"][1] * x0
        u = norm(x) / math.sqrt(i + 1)
        for kind in "qkv":
            inputs[f"{at}attn.c_{kind}.weight"] = u
        q, k, v = ((u @ w[f"{at}attn.c_{kind}.weight"].mT).view(T, -1, d) for kind in "qkv")
        q, k, y = turn(norm(q)) * w[at + "attn.q_gain"][:, None], turn(norm(k)), torch.zeros(T, H, d).double()
        for h in range(H):
            logits = q[:, h] @ k[:, h * G // H].mT / math.sqrt(d)
            future = torch.ones(T, T).triu(1).bool()
            y[:, h] = logits.masked_fill(future, -math.inf).softmax(-1) @ v[:, h * G // H]
        inputs[at + "attn.proj.weight"] = y.flatten(1)
        x = x + w[at + "attn_scale"] * (y.flatten(1) @ w[at + "attn.proj.weight"].mT)
        u = norm(x) / math.sqrt(i + 1)
        inputs[at + "mlp.fc.weight"] = u
        hidden = u @ w[at + "mlp.fc.weight"].mT
        inputs[at + "mlp.proj.weight"] = torch.where(hidden > 0, hidden, hp.mlp_slope * hidden).square()
        x = x + w[at + "mlp_scale"] * (inputs[at + "mlp.proj.weight"] @ w[at + "mlp.proj.weight"].mT)
        if i < hp.num_layers // 2:
            skips.append(x)
    return inputs


@pytest.fixture(scope="module")
def calibrated():
    hp = settings(**PLAIN)
    model = tg.GPT(hp)
    model.load_state_dict({name: w * 3 if name in MATRICES else w for name, w in some_weights(hp, 5).items()})
    sequences = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1)).numpy()
    return hp, model, sequences, tg.collect_hessians(model, sequences, WORLD)


def test_hessians_are_the_mean_outer_product_of_the_inputs(calibrated):
    hp, model, sequences, hessians = calibrated
    expected = {name: 0 for name in MATRICES}
    for sequence in sequences:
        for name, x in matrix_inputs(model, hp, sequence).items():
            expected[name] = expected[name] + x.mT @ x / sequences.size
    assert set(hessians) == set(MATRICES)
    for name in MATRICES:
        columns = model.get_parameter(name).shape[1]
        assert hessians[name].dtype == torch.float32 and hessians[name].shape == (columns, columns)
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(hessians[name].double(), expected[name], rtol=1e-3, atol=1e-4 * scale)


def test_queries_keys_and_values_share_one_hessian(calibrated):
    *_, hessians = calibrated
    for i in range(3):
        shared = [hessians[f"blocks.{i}.attn.c_{kind}.weight"] for kind in "qkv"]
        assert shared[0] is shared[1] is shared[2]
    assert len({id(h) for h in hessians.values()}) == 12


@pytest.mark.parametrize("batch_tokens", [1, 48, 100, 10**6])
def test_hessians_do_not_depend_on_the_batch(calibrated, batch_tokens):
    _, model, sequences, hessians = calibrated
    again = tg.collect_hessians(model, sequences, WORLD, batch_tokens)
    for name in MATRICES:
        torch.testing.assert_close(again[name], hessians[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_hessians_of_ranks_add_up(calibrated, size):
    """Every sequence is read by one rank; the sum over ranks, which a group takes, is the whole."""
    hp, model, sequences, hessians = calibrated
    total = {name: 0 for name in MATRICES}
    for rank in range(size):
        world = tg.World(hp, {})
        world.rank, world.size = rank, size
        for name, part in tg.collect_hessians(model, sequences, world).items():
            total[name] = total[name] + part
    for name in MATRICES:
        torch.testing.assert_close(total[name], hessians[name], rtol=1e-4, atol=1e-5)


def test_calibration_leaves_the_model_alone(calibrated):
    _, model, sequences, _ = calibrated
    before = {name: p.clone() for name, p in model.named_parameters()}
    tg.collect_hessians(model, sequences, WORLD)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def calibrate_and_quantise(world):
    """What a rank of any world makes of one model: Hessians, codes and scales, the report."""
    hp = settings()
    model = tg.GPT(hp)
    model.load_state_dict(some_weights(hp, 5))
    sequences = torch.randint(0, 256, (7, 24), generator=torch.Generator().manual_seed(1)).numpy()
    hessians = tg.collect_hessians(model, sequences, world)
    tensors, report = tg.quantize_model(dict(model.named_parameters()), hessians, hp, world)
    coded = {name: (t.codes, t.scales) for name, t in tensors.items() if isinstance(t, tg.QuantizedTensor)}
    return hessians, coded, report


def rank_process(rank, folder, ports):
    """A member of every world that is large enough for its rank; leaves what it computed in the folder."""
    torch.set_num_threads(1)
    for size, port in ports.items():
        if rank < size:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            world = tg.World(settings(), os.environ)
            torch.save(calibrate_and_quantise(world), Path(folder) / f"{size}-{rank}.pt")
            world.close()


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """(ranks, rank) -> what it computed, in real process groups over gloo."""
    folder, ports = tmp_path_factory.mktemp("ranks"), {}
    with contextlib.ExitStack() as stack:
        for size in (2, 3):
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            ports[size] = one.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=rank_process, args=(rank, str(folder), ports)) for rank in range(3)]
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        for process in processes:
            process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return {(size, rank): torch.load(folder / f"{size}-{rank}.pt") for size in ports for rank in range(size)}


@pytest.mark.parametrize("size", [2, 3])
def test_calibration_and_codes_do_not_depend_on_the_number_of_ranks(groups, size):
    """Seven sequences and stacks of six and three matrices, which neither two nor three ranks share evenly.

    Sums over ranks are rounded in another order, so that a weight on the edge between two codes may move.
    """
    hessians, coded, report = calibrate_and_quantise(WORLD)
    for rank in range(size):
        got_hessians, got, got_report = groups[size, rank]
        for name, hessian in hessians.items():
            tolerance = 1e-5 * float(hessian.max())
            torch.testing.assert_close(got_hessians[name], hessian, rtol=1e-4, atol=tolerance)
        assert got.keys() == coded.keys() and set(MATRICES) < set(got)
        same = sum(int((got[name][0] == coded[name][0]).sum()) for name in coded)
        assert same > 0.998 * sum(codes.numel() for codes, _ in coded.values())
        rows = torch.cat([got[name][1] == coded[name][1] for name in coded])
        assert float(rows.float().mean()) > 0.99
        for role in ("attn", "mlp"):
            assert got_report[role] == pytest.approx(report[role], rel=2e-3)
        assert all(torch.equal(a, b) for name in got for a, b in zip(got[name], groups[size, 0][1][name]))


# ----------------------------------------------------------------------------------------------------------
# Rate
# ----------------------------------------------------------------------------------------------------------

FACTS = {"preset": "smoke", "seed": 1, "steps": 2, "script_sha256": "0" * 64, "corpus": "none"}


@pytest.fixture(scope="module")
def large():
    """Four million near-Gaussian weights in matrices of several shapes, and tables beside them."""
    g = torch.Generator().manual_seed(0)
    shapes = {"attn.c_q": (512, 1024), "attn.c_k": (256, 1024), "mlp.fc": (1024, 1024),
        "mlp.proj": (512, 2048)}
    weights = {f"blocks.{i}.{part}.weight": torch.randn(shape, generator=g) * (0.02 + 0.01 * i)
               for i in range(3) for part, shape in shapes.items()}
    heavy = weights["blocks.1.attn.c_k.weight"]
    weights["blocks.1.attn.c_k.weight"] = heavy * heavy.abs()
    weights["tok_emb.weight"] = torch.randn(1024, 256, generator=g) * 0.05
    weights["bigram.embed.weight"] = torch.randn(512, 128, generator=g) ** 3
    weights["bigram.proj.weight"] = torch.randn(256, 128, generator=g)
    hessians = {name: torch.eye(w.shape[1]) for name, w in weights.items() if name.startswith("blocks.")}
    return weights, hessians


def forecast(weights, multiplier, **changes):
    return tg.RateForecast(weights, settings(**changes)).bytes(multiplier)


@pytest.mark.parametrize("changes", [
    {}, {"attn_bits": 6, "mlp_bits": 5}, {"embed_bits": 5, "prune_pct": 0.0}, {"int6_last_n": 1}], ids=str)
@pytest.mark.parametrize("multiplier", [1.0, 1.6, 2.8])
def test_the_forecast_is_what_packing_gives(large, changes, multiplier):
    changes = {"quantizer": "rtn"} | changes
    tensors, _ = tg.quantize_model(*large, settings(**changes), WORLD, multiplier)
    packed = len(tg.pack(tg.artifact_config(settings(), FACTS), tensors))
    assert packed < 2 * sum(w.numel() for w in large[0].values())
    assert forecast(large[0], multiplier, **changes) == pytest.approx(packed, rel=0.005)


@pytest.mark.parametrize("kind", ["rtn", "gptq"])
@pytest.mark.parametrize("multiplier", [1.0, 1.4])
def test_the_forecast_of_a_small_model_is_within_a_percent(given, kind, multiplier):
    """A file of 90 kB, where header, scales and fp16 tensors count."""
    hp = settings(quantizer=kind)
    tensors, _ = tg.quantize_model(*given, hp, WORLD, multiplier, True)
    packed = len(tg.pack(tg.artifact_config(hp, FACTS), tensors))
    assert forecast(given[0], multiplier, quantizer=kind) == pytest.approx(packed, rel=0.01)


def test_the_multiplier_is_the_smallest_that_fits(large):
    rate = tg.RateForecast(large[0], settings())
    most, least = rate.bytes(1.0), rate.bytes(rate.MOST)
    assert rate.multiplier(most) == rate.multiplier(10 * most) == 1.0
    for share in (0.02, 0.3, 0.7, 0.999):
        limit = least + share * (most - least)
        multiplier = rate.multiplier(limit)
        assert 1 < multiplier <= rate.MOST
        assert rate.bytes(multiplier) <= limit < rate.bytes(multiplier - 0.002)
    assert rate.multiplier(0.5 * least) == rate.MOST
    sizes = [rate.bytes(multiplier) for multiplier in (1, 1.5, 2, 4, 6)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("share", [0.9, 0.75])
def test_gaussian_rows_fit_by_the_rate_alone(large, share):
    """And just: the room is used."""
    hp, lines = settings(quantizer="rtn"), []
    room = int(share * forecast(large[0], 1.0))
    hp = dataclasses.replace(hp, artifact_limit=room + 1000)
    blob, errors, report = tg.fit_artifact(hp, *large, FACTS, WORLD, lines.append, 1000, False)
    assert 0.995 * room < len(blob) <= room and all("rung:rate" in line for line in lines)
    assert errors["multiplier"] > 1.05 and sum(section["bytes"] for section in report.values()) == len(blob)


def test_a_pr606_sized_model_fits_by_the_rate_alone():
    """33.6 M Gaussian weights end within half a percent below the limit, in the first rung."""
    hp, lines = tg.Hyperparameters.from_env({"PRESET": "pr606", "DEVICE": "cpu", "QUANTIZER": "rtn"}), []
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in tg.GPT(hp).named_parameters()}
    g = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=g) * 0.05 for name, shape in shapes.items()}
    eye = {n: torch.zeros(n, n) for n in (512, 1792)}
    hessians = {name: eye[shapes[name][1]] for name in tg.matrix_max_codes(hp, shapes)}
    code_bytes = 170_000
    blob, errors, _ = tg.fit_artifact(hp, weights, hessians, FACTS, WORLD, lines.append, code_bytes, True)
    assert 0.995 * 16_000_000 < len(blob) + code_bytes <= 16_000_000
    assert len(lines) <= 2 and all("rung:rate" in line for line in lines) and 1 < errors["multiplier"] < 3
    tensors = tg.unpack(blob)[1]
    assert len(hessians) == 66 and sum(tensors[name].codes.numel() for name in hessians) == 31_719_424


def pooled_entropy(tensors):
    """Bits per code of all matrices together, as numpy counts them."""
    _, counts = torch.unique(torch.cat([q.codes.flatten() for q in tensors]), return_counts=True)
    share = counts.double() / counts.sum()
    return float(-(share * share.log2()).sum())


def test_at_equal_entropy_the_rate_is_better_than_a_floor_on_scales():
    """#606 never let a step be finer than 1/15. Layers whose weights are small because their inputs are large
    do not differ from the others, and only a rate that goes by each row's size sees that."""
    given, g = [], torch.Generator().manual_seed(0)
    for size in (1.0, 0.4, 0.15):
        mix = torch.randn(96, 96, generator=g) * torch.logspace(0, -1, 96)
        x = torch.randn(400, 96, generator=g) @ mix.mT / size
        given.append((torch.randn(64, 96, generator=g) * 0.25 * size, x.mT @ x / 400))

    def solve(steps):
        solved = [tg.gptq(weight, hessian, 15, scales=steps(weight)) for weight, hessian in given]
        error = sum(summed_error(w, q.dequantize(), h) for (w, h), q in zip(given, solved))
        return pooled_entropy(solved), error

    bits, floored = solve(lambda weight: (weight.abs().amax(1) / 15).clamp_min(1 / 15))
    low, high = 1.0, 20.0
    while high - low > 1e-3 * low:
        middle = (low + high) / 2
        at, error = solve(lambda weight: tg.row_scales(weight, 15, middle))  # noqa: B023
        low, high = (middle, high) if at > bits else (low, middle)
    assert at == pytest.approx(bits, abs=0.01) and error < 0.8 * floored


def test_a_file_that_fits_anyway_is_not_coarsened(given):
    hp = settings()
    blob, errors, _ = tg.fit_artifact(hp, *given, FACTS, WORLD, tg.RunLog(None), 100_000, False)
    expected = tg.pack(tg.artifact_config(hp, FACTS), tg.quantize_model(*given, hp, WORLD)[0])
    assert errors["multiplier"] == 1.0 and blob == expected


def test_what_is_packed_is_what_was_quantised(given):
    hp = settings()
    blob, errors, _ = tg.fit_artifact(hp, *given, FACTS, WORLD, tg.RunLog(None), 0, True)
    tensors, report = tg.quantize_model(*given, hp, WORLD, 1.0, True)
    for name, tensor in tg.unpack(blob)[1].items():
        expected = tensors[name]
        if isinstance(expected, tg.QuantizedTensor):
            assert torch.equal(tensor.codes, expected.codes) and torch.equal(tensor.scales, expected.scales)
        else:
            assert torch.equal(tensor, expected)
    assert errors["mlp"] == report["mlp"]


# ----------------------------------------------------------------------------------------------------------
# The ladder
# ----------------------------------------------------------------------------------------------------------


def ladder(hp):
    return [name for name, _ in tg.rungs(hp)]


def test_each_rung_gives_up_something_more():
    hp, before = settings(prune_pct=0.02, attn_bits=6, mlp_bits=5, embed_bits=8, int6_last_n=1), None
    steps = list(tg.rungs(hp))
    assert steps[0] == ("rate", hp) and len({name for name, _ in steps}) == len(steps) >= 8
    for _, eased in steps:
        if before is not None:
            bits = [(-h.prune_pct, h.embed_bits, h.attn_bits + h.mlp_bits, h.int6_last_n)
                    for h in (before, eased)]
            assert bits[1] != bits[0] and all(new <= old for old, new in zip(*bits))
        before = eased
    assert any(eased.prune_pct > 0.02 and eased.embed_bits == 8 for _, eased in steps)
    assert any(eased.embed_bits < 8 and eased.mlp_bits == 5 for _, eased in steps)
    assert min(before.attn_bits, before.mlp_bits) == 2


def climb(given, limit, code_bytes=1000, **changes):
    """What fit_artifact does with a limit: the file or None, and the rungs of its log lines."""
    lines, hp = [], settings(artifact_limit=limit, **changes)
    try:
        blob = tg.fit_artifact(hp, *given, FACTS, WORLD, lines.append, code_bytes, False)[0]
    except tg.UserError as error:
        assert str(limit) in str(error) and "model.pt" in str(error) and len(str(error).splitlines()) == 1
        blob = None
    fields = [dict(re.findall(r"(\w+):(\S+)", line)) for line in lines]
    for one in fields:
        assert {"rung", "multiplier", "forecast", "model", "room", "error"} <= one.keys()
        assert one["model"].endswith("B") and float(one["error"]) > 0
        assert int(one["room"][:-1]) == limit - code_bytes
    return blob, fields


@pytest.mark.parametrize("rung", range(len(ladder(settings()))))
def test_every_rung_can_be_the_last(given, rung, monkeypatch):
    """The ladder is walked in order, each rung logged, until a file fits; it is the rung's own."""
    names, eased = ladder(settings()), [hp for _, hp in tg.rungs(settings())]
    quantize, pack, seen = tg.quantize_model, tg.pack, []

    def watched(weights, hessians, hp, *rest):
        seen.append(hp)
        return quantize(weights, hessians, hp, *rest)

    def heavy(config, tensors, level):
        """Files of the rungs before this one are too long."""
        blob = pack(config, tensors, level)
        return blob if eased.index(seen[-1]) >= rung else blob + bytes(LIMIT)

    LIMIT = 200_000
    eased = [dataclasses.replace(hp, artifact_limit=LIMIT) for hp in eased]
    monkeypatch.setattr(tg, "quantize_model", watched)
    monkeypatch.setattr(tg, "pack", heavy)
    blob, fields = climb(given, LIMIT)
    assert blob is not None and list(dict.fromkeys(one["rung"] for one in fields)) == names[: rung + 1]
    assert [one["rung"] for one in fields].count(names[rung]) == 1
    tensors = tg.unpack(blob)[1]
    for name in MATRICES + EMBEDDINGS:
        bits = eased[rung].embed_bits if name in EMBEDDINGS else \
            eased[rung].attn_bits if ".attn." in name else eased[rung].mlp_bits
        assert tensors[name].max_code == 2 ** (bits - 1) - 1


def test_smaller_limits_climb_further_down(given):
    """Real limits, from roomy to hopeless: the file fits, and no earlier rung did."""
    start = len(climb(given, 10**7)[0])
    names, reached = ladder(settings()), []
    for share in (1.0, 0.97, 0.9, 0.82, 0.76, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35):
        limit = int(share * start) + 1000
        blob, fields = climb(given, limit)
        walked = list(dict.fromkeys(one["rung"] for one in fields))
        assert walked == names[: len(walked)]
        if blob is not None:
            assert len(blob) == int(fields[-1]["model"][:-1]) <= limit - 1000
            assert all(int(one["model"][:-1]) > limit - 1000 for one in fields[:-1])
            config, tensors = tg.unpack(blob)
            assert config["facts"] == FACTS and tensors.keys() == given[0].keys()
        reached.append(len(walked))
    assert reached == sorted(reached) and len(set(reached)) >= 5 and reached[0] == 1


@pytest.fixture(scope="module")
def smallest(given):
    """The bytes of each rung's file at the coarsest rate."""
    sizes = []
    for _, hp in tg.rungs(settings()):
        tensors, _ = tg.quantize_model(*given, hp, WORLD, tg.RateForecast.MOST)
        sizes.append(len(tg.pack(tg.artifact_config(hp, FACTS), tensors)))
    return sizes


@pytest.mark.parametrize("rung", range(len(ladder(settings()))))
def test_a_small_limit_forces_every_rung(given, smallest, rung):
    """A limit between what this rung and the one before can reach: the file is this rung's, nothing is faked."""
    before = smallest[rung - 1] if rung else round(1.5 * smallest[0])
    limit = smallest[rung] + (before - smallest[rung]) // 3 + 1000
    blob, fields = climb(given, limit)
    assert blob is not None and len(blob) + 1000 <= limit < before + 1000
    assert list(dict.fromkeys(one["rung"] for one in fields)) == ladder(settings())[: rung + 1]
    assert all(int(one["model"][:-1]) + 1000 > limit for one in fields[:-1])


def test_code_counts_against_the_limit(given):
    size = len(climb(given, 10**7, 0)[0])
    blob, fields = climb(given, size + 60_000, 60_000 + size // 4)
    assert blob is not None and len(blob) <= size - size // 4
    assert climb(given, size + 60_000, 60_000)[0] is not None


@pytest.mark.parametrize(("limit", "code_bytes"), [(20_000, 1000), (1000, 1000), (1000, 5000)])
def test_nothing_fits(given, limit, code_bytes):
    blob, fields = climb(given, limit, code_bytes)
    assert blob is None and list(dict.fromkeys(one["rung"] for one in fields)) == ladder(settings())


# ----------------------------------------------------------------------------------------------------------
# The stage
# ----------------------------------------------------------------------------------------------------------


def run_main(folder, env):
    """The command line in this process: exit status, standard output, standard error."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with (mock.patch.dict(os.environ, {"PATH": os.environ["PATH"]} | env, clear=True),
              mock.patch.object(sys, "argv", ["train_gpt.py"]),
              contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
            return tg.main(), out.getvalue(), err.getvalue()
    finally:
        os.chdir(before)


ZEROED = {"blocks.0.attn.c_q.weight": 5, "blocks.1.mlp.fc.weight": 3}


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny):
    """STAGES=quantize on weights that were drawn, some rows of them zero: folder, settings, what it said."""
    folder = tmp_path_factory.mktemp("stage")
    hp = tg.Hyperparameters.from_env(tiny)
    weights = some_weights(hp)
    for name, rows in ZEROED.items():
        weights[name][:rows] = 0
    (folder / "logs/run").mkdir(parents=True)
    torch.save(weights, folder / "logs/run/model.pt")
    env = tiny | {"STAGES": "quantize", "RUN_ID": "run"}
    status, out, err = run_main(folder, env)
    assert status == 0, err
    return folder, env, out


def lines_of(out, start):
    """The key:value pairs of each line that starts so."""
    return [dict(re.findall(r"(\S+?):(\S+)", line)) for line in out.splitlines() if line.startswith(start)]


def test_the_log_states_the_memory_of_calibration(stage):
    """Sequences, what the Hessians hold (one for c_q, c_k and c_v), and the process's peak."""
    _, env, out = stage
    (line,) = lines_of(out, "calibrated ")
    hp = tg.Hyperparameters.from_env(env)
    assert line["sequences"] == f"{hp.gptq_calib_sequences}x{hp.train_seq_len}"
    held = 3 * (3 * 64 ** 2 + 128 ** 2) * 4 / 2 ** 20
    assert line["hessians"].endswith("MiB") and abs(float(line["hessians"][:-3]) - held) <= 0.5
    assert line["peak_memory"].endswith("MiB") and 50 < float(line["peak_memory"][:-3]) < 20_000


def test_the_log_states_errors_and_rows_on_the_floor(stage):
    folder, _, out = stage
    result = json.loads((folder / "logs/run/result.json").read_text())["proofs"]["quantizer"]
    for role, rows in (("attn", 5), ("mlp", 3)):
        (line,) = [line for line in lines_of(out, "proof technique:gptq") if line["role"] == role]
        assert int(line["floored_rows"]) == rows == result[role]["floored_rows"]
        assert float(line["error"]) == pytest.approx(result[role]["error"], rel=1e-3)
        ratio = result[role]["error"] / result[role]["error_rounding"]
        assert float(line["ratio"]) == pytest.approx(ratio, abs=1e-3)


def test_the_log_states_bytes_by_role_beside_the_entropy(stage):
    """Counted again from the file: every section, their sum, the codes' entropy and how near it they are."""
    folder, _, out = stage
    blob = (folder / "logs/run/artifact.bin").read_bytes()
    tensors = tg.unpack(blob)[1]
    sections = {line["section"]: line for line in lines_of(out, "bytes ")}
    assert sections.keys() == {"header", "attn.15", "mlp.15", "embed.127", "scales", "raw.float16"}
    assert sum(int(line["bytes"]) for line in sections.values()) == len(blob)
    for key, part in (("attn.15", ".attn."), ("mlp.15", ".mlp."), ("embed.127", "emb")):
        codes = [t for name, t in tensors.items() if part in name and isinstance(t, tg.QuantizedTensor)]
        entropy = pooled_entropy(codes) * sum(q.codes.numel() for q in codes) / 8
        assert float(sections[key]["entropy_bytes"]) == pytest.approx(entropy, abs=1)
        ratio = int(sections[key]["bytes"]) / entropy
        assert float(sections[key]["over_entropy"]) == pytest.approx(ratio, rel=1e-3) and ratio < 1.05


def test_warmdown_forecasts_the_bytes(tmp_path, tiny):
    """A line at every log step of the warmdown; the last is within a percent of the file that follows."""
    env = {"RUN_ID": "run", "STAGES": "train,quantize", "ITERATIONS": "9", "WARMDOWN_ITERS": "6",
           "WARMUP_STEPS": "0", "TRAIN_LOG_EVERY": "2", "COMPILE": "0"}
    status, out, err = run_main(tmp_path, tiny | env)
    assert status == 0, err
    lines = lines_of(out, "forecast ")
    assert [line["step"] for line in lines] == ["6", "8"]
    size = (tmp_path / "logs/run/artifact.bin").stat().st_size
    assert float(lines[-1]["model"].removesuffix("B")) == pytest.approx(size, rel=0.01)


def test_an_artifact_that_cannot_fit_is_an_error_and_the_model_is_kept(stage):
    """Exit status 1 and one line; neither log nor result.json speaks of an artifact, and there is none."""
    folder, env, _ = stage
    run = folder / "logs/hopeless"
    run.mkdir()
    weights = (folder / "logs/run/model.pt").read_bytes()
    (run / "model.pt").write_bytes(weights)
    limit = Path(tg.__file__).stat().st_size + 12_000
    status, out, err = run_main(folder, env | {"RUN_ID": "hopeless", "ARTIFACT_LIMIT": str(limit)})
    assert status == 1 and err.startswith("error: ") and len(err.splitlines()) == 1
    assert f"ARTIFACT_LIMIT={limit};" in err and "model.pt" in err
    walked = list(dict.fromkeys(line["rung"] for line in lines_of(out, "pack ")))
    assert walked == ladder(tg.Hyperparameters.from_env(env))
    assert not lines_of(out, "artifact ") and not lines_of(out, "proof ")
    assert (run / "model.pt").read_bytes() == weights and not (run / "artifact.bin").exists()
    result = run / "result.json"
    assert not result.exists() or "artifact" not in json.loads(result.read_text())
