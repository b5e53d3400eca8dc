"""The model against a dense float64 restatement, technique by technique and part by part."""

import dataclasses
import functools
import math
import sys
import types

import pytest
import torch
from reference import (
    EPS32,
    EPS64,
    TECHNIQUES,
    random_state,
    reference_bigram_index,
    reference_cross_entropy,
    reference_logits,
    reference_order,
    reference_rope_base,
    reference_shapes,
)
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as tg


def env(text):
    """The mapping that "A=1 B=2" stands for."""
    return dict(pair.split("=") for pair in text.split())


SMALL = env("VOCAB_SIZE=96 MODEL_DIM=64 ROPE_DIMS=8 TRAIN_SEQ_LEN=32 EVAL_SEQ_LEN=32 EVAL_STRIDE=8")
SMALL |= env("TTT_CHUNK_TOKENS=64 BIGRAM_VOCAB_SIZE=50 BIGRAM_DIM=24 VE_DIM=20")
MODEL_FIELDS = tg.Hyperparameters.fields("model")
# The settings that switch a technique of the model off, with the value that does.
OFF = {name: f.metadata["off"] for name, f in MODEL_FIELDS.items() if f.metadata["off"] is not None}
CALLERS = {"document_mask"}  # what a model is told with every call
# Every preset, shrunk, and every technique at once.
CONFIGS = {
    "pr606": "PRESET=pr606 NUM_LAYERS=6 NUM_HEADS=4 NUM_KV_HEADS=4 VE_LAYERS=4,5 ROPE_NTK_REFERENCE=8",
    "pr601": "PRESET=pr601 NUM_LAYERS=6 NUM_HEADS=4 NUM_KV_HEADS=2",
    "smoke": "PRESET=smoke",
    "pr1855": "PRESET=pr1855 NUM_LAYERS=6 NUM_HEADS=4 NUM_KV_HEADS=2 LOOP_START=1 LOOP_END=2"
    " PARALLEL_START_LAYER=3",
    "pr1855_smoke": "PRESET=pr1855_smoke TRAIN_SEQ_SCHEDULE=4@0.1",
    "all": "PRESET=pr606 NUM_LAYERS=5 NUM_HEADS=4 NUM_KV_HEADS=2 XSA_LAST_N=3 VE_LAYERS=0,2,4"
    " ROPE_NTK_REFERENCE=8 NUM_LOOPS=1 LOOP_START=1 LOOP_END=2 PARALLEL_START_LAYER=3 "
    + " ".join(f"{name.upper()}=1" for name, off in OFF.items() if off is False and name not in CALLERS),
}
ALL_ON = tg.Hyperparameters.from_env(SMALL | env(CONFIGS["all"]))  # also what the reference does not know


@functools.cache
def settings(config, **changed):
    """Of a configuration, less the techniques that the reference does not know."""
    hp = tg.Hyperparameters.from_env(SMALL | env(CONFIGS[config]))
    return dataclasses.replace(hp, **{name: OFF[name] for name in OFF.keys() - TECHNIQUES} | changed)


def some_tokens(batch=2, length=20, seed=0):
    """Token ids with a BOS at the start of one row and inside both."""
    tokens = torch.randint(2, 96, (batch, length), generator=torch.Generator().manual_seed(seed))
    tokens[0, length // 3] = 1
    tokens[-1, 0] = 1
    tokens[-1, 2 * length // 3] = 1
    return tokens


def build(hp, dtype=torch.float32):
    """A model with every parameter random, each by its own name."""
    model = tg.GPT(hp).to(dtype)
    model.load_state_dict(random_state({name: p.shape for name, p in model.state_dict().items()}))
    return model


@functools.cache
def expected_logits(config, eps=EPS32):
    hp = settings(config)
    with torch.no_grad():
        return reference_logits(random_state(reference_shapes(hp)), hp, some_tokens(), eps)


@torch.no_grad()
def relative_error(value, expected):
    return float((value.double() - expected).norm() / expected.norm())


def test_every_preset_and_every_technique_is_compared_with_the_reference():
    """What is missing is to be written down: a preset in CONFIGS, a formula in tests/reference.py."""
    presets, formulas = tg.PRESETS.keys() - CONFIGS.keys(), OFF.keys() - TECHNIQUES
    assert not presets, f"shrink {presets} in CONFIGS"
    assert not formulas, f"write the formula of {formulas} into tests/reference.py, its name into TECHNIQUES"
    silent = [name for name, off in OFF.items() if getattr(settings("all"), name) == off]
    silent = [name for name in silent if name not in CALLERS]
    assert not silent, f"switch {silent} on in CONFIGS['all']"


# ----------------------------------------------------------------------------------------------------------
# The plan
# ----------------------------------------------------------------------------------------------------------

# Of every visit: layer, position whose output is added, its row of skip_weights, whether its own is kept.
PLANS = {
    "pr606 NUM_LAYERS=11 VE_LAYERS=9": """
           0 - - kept   1 - - kept   2 - - kept   3 - - kept   4 - - kept
           5 4 0 -      6 3 1 -      7 2 2 -      8 1 3 -      9 0 4 -      10 - - -""",
    "smoke": "0 - - kept   1 0 0 -   2 - - -",
    "pr1855": """
           0 - - kept   1 - - kept   2 - - kept   3 - - kept   4 - - kept
           5 - - kept   3 - - kept   4 - - kept
           5 7 0 -      3 6 1 -      4 5 2 -      5 4 3 -      6 3 4 -      7 2 5 -      8 1 6 two    9 0 7 -
           10 - - -""",
    "pr1855 off": """
           0 - - kept   1 - - kept   2 - - kept   3 - - kept   4 - - kept
           5 4 0 -      6 3 1 -      7 2 2 -      8 1 3 two    9 0 4 -      10 - - -""",
    "pr1855_smoke": "0 - - kept   1 - - kept   2 - - kept   1 2 0 -   2 1 1 -   3 0 2 two   4 - - -",
    "pr1855_smoke off": "0 - - kept   1 - - kept   2 1 0 -   3 0 1 two   4 - - -",
}


def rows_of(visits):
    """A plan in the table's words."""
    skip = lambda v: ("-", "-") if v.skip_from is None else (str(v.skip_from), str(v.skip_row))
    last = lambda v: "kept" if v.pushes else "two" if v.lanes == 2 else "-"
    return [(str(v.layer), *skip(v), last(v)) for v in visits]


@pytest.mark.parametrize("preset", PLANS)
def test_the_plan_is_the_one_written_down(preset):
    words = PLANS[preset].split()
    table = [tuple(words[i : i + 4]) for i in range(0, len(words), 4)]
    name, *rest = preset.split()
    hp = tg.Hyperparameters.from_env({"PRESET": name} | env(" ".join(each for each in rest if each != "off")))
    assert rows_of(tg.plan(hp, "off" not in rest)) == table
    assert rows_of(tg.shell(hp).plans["off" not in rest]) == table


@pytest.mark.parametrize("loops", [0, 1, 2])
@pytest.mark.parametrize("layers", range(1, 13))
def test_the_plan_follows_the_rule(layers, loops):
    """The first half puts its outputs on a stack, the second half takes them, as in the submissions."""
    hp = settings("smoke", num_layers=layers, num_loops=loops, loop_start=layers // 3, loop_end=layers // 2)
    visits, stack, rows = tg.plan(hp), [], 0
    order = [v.layer for v in visits]
    assert order == reference_order(hp, True) and len(order) == layers + loops * (
        layers // 2 - layers // 3 + 1
    )
    for position, visit in enumerate(visits):
        if position < len(order) // 2:
            assert visit.pushes and visit.skip_from is None
            stack.append(position)
        else:
            assert not visit.pushes and visit.skip_from == (stack.pop() if stack else None)
        if visit.skip_from is not None:
            assert visit.skip_row == rows
            rows += 1
    assert not stack and rows == len(order) // 2


def test_a_plan_is_all_that_decides_on_order_and_skips():
    """A model runs the visits that it is given: without skips, or a layer twice."""
    hp, order, tokens = (
        dataclasses.replace(ALL_ON, xsa_last_n=8, ve_enabled=False, num_loops=0, parallel_start_layer=0),
        (0, 1, 1, 2, 3),
        some_tokens(),
    )
    model, longer = build(hp, torch.float64), build(hp, torch.float64)
    longer.plans = [tuple(tg.Visit(position) for position in range(len(order)))]
    for block, layer in zip(longer.blocks, order):
        block.load_state_dict(model.blocks[layer].state_dict())
        block.input_scale = model.blocks[layer].input_scale
    with torch.no_grad():
        logits = model(tokens)
        model.plans = [tuple(dataclasses.replace(v, skip_from=None, pushes=False) for v in tg.plan(hp))]
        plain = model(tokens)
        model.plans = [tuple(tg.Visit(layer) for layer in order)]
        assert relative_error(model(tokens), longer(tokens)) < 1e-12
        silence(model, model.silent["skips"])
        model.plans = [tg.plan(hp)]
        assert relative_error(logits, plain) > 1e-3 and relative_error(model(tokens), plain) < 1e-11


# ----------------------------------------------------------------------------------------------------------
# Parameters
# ----------------------------------------------------------------------------------------------------------

PUBLISHED_COUNT = {"pr606": 33_580_124, "pr601": 26_744_007, "pr1855": 35_945_671}


@pytest.mark.parametrize("preset", PUBLISHED_COUNT)
def test_a_published_state_dict_loads_strictly(preset):
    hp = tg.Hyperparameters.from_env({"PRESET": preset})
    shapes = reference_shapes(hp)
    assert sum(map(math.prod, shapes.values())) == PUBLISHED_COUNT[preset]
    with torch.device("meta"):
        model, state = tg.GPT(hp), {name: torch.empty(shape) for name, shape in shapes.items()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    model.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_state_dict_follows_the_settings(config):
    state = tg.GPT(settings(config)).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == reference_shapes(settings(config))
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


@pytest.mark.parametrize("preset", PUBLISHED_COUNT)
def test_a_state_dict_of_mixed_dtypes_loads_as_float32(preset):
    """The submissions save embedding tables and gates in bf16, the rest in fp32."""
    half = ("tok_emb.weight", "embed.weight", "attn_gate.weight", "attn_gate.bias")
    hp, tokens = settings(preset), some_tokens(length=9)
    state = {
        name: tensor.to(torch.bfloat16 if name.endswith(half) else torch.float32)
        for name, tensor in random_state(reference_shapes(hp)).items()
    }
    model = tg.GPT(hp)
    model.load_state_dict(state, strict=True)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        assert relative_error(model(tokens), reference_logits(state, hp, tokens, EPS32)) <= 1e-5


def orthogonal(weight, gain):
    """Whether the smaller side's vectors are orthogonal and `gain` long."""
    w = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
    return torch.allclose(w @ w.T, gain**2 * torch.eye(len(w), dtype=torch.float64), atol=1e-5, rtol=0)


WIDE = dict(vocab_size=1024, model_dim=128, bigram_dim=64, ve_dim=64)  # enough values for their deviation


def initial_state(hp, seed=0):
    torch.manual_seed(seed)
    return tg.GPT(hp).state_dict()


@pytest.mark.parametrize("config", ["pr606", "pr601", "pr1855", "all"])
def test_initial_values(config):
    """A matrix that ends a branch starts at zero, the others orthogonal, a part's scaled by the depth."""
    hp = settings(config, **WIDE, num_heads=4, qk_gain_init=2.5)
    constant = {"bigram.embed.weight": 0, "bigram.scale": 0.05, "smear.gate": 0, "ve_shared.scale": 0.1}
    constant |= {"skip_weights": 1, "attn_scale": 1, "mlp_scale": 1, "q_gain": 2.5, "vr_lambda": 0.5}
    constant |= {"attn.proj.weight": 0, "mlp.proj.weight": 0, "attn_gate.weight": 0, "attn_gate.bias": 4}
    constant |= {"skip_gates": 0, "attn_gate_w": 0, "smear_gate.weight": 0, "smear_lambda": 0}
    constant |= {"parallel_resid_lambdas": 1.1, "parallel_post_lambdas": 1}
    deviation = {"tok_emb.weight": 0.005, "ve_shared.embed.weight": 0.01}
    for name, tensor in initial_state(hp).items():
        key = next((key for key in constant if name.endswith(key)), None)
        if name in deviation:
            assert float(tensor.std()) == pytest.approx(deviation[name], rel=0.02), name
            assert float(tensor.mean().abs()) < 0.02 * deviation[name], name
        elif name.endswith("resid_mix"):
            assert (tensor[0] == 1).all() and not tensor[1].any()
        elif name.startswith("ve_layer_scales"):
            assert tensor.tolist() == [1.0]
        elif key is None:
            gain = 1 / math.sqrt(2 * hp.num_layers) if name.endswith(".proj.weight") else 1.0
            assert orthogonal(tensor, gain), f"{name}: not orthogonal; if it starts constant, say so above"
        else:
            torch.testing.assert_close(tensor, torch.full_like(tensor, constant[key]), msg=name)


def test_the_seed_decides_the_initial_values_and_ortho_init_their_kind():
    hp = settings("all", **WIDE, num_heads=4)
    first, again, other = (initial_state(hp, seed) for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = {name for name in first if not torch.equal(first[name], other[name])}
    assert not torch.equal(first["blocks.0.attn.c_q.weight"], first["blocks.1.attn.c_q.weight"])
    plain = initial_state(dataclasses.replace(hp, ortho_init=False), 5)
    for name in drawn - {"tok_emb.weight", "ve_shared.embed.weight"}:
        assert not orthogonal(plain[name], float(plain[name].norm()) / math.sqrt(min(plain[name].shape))), (
            name
        )
        assert float(plain[name].norm()) > 0, name
    assert {name for name in plain if not torch.equal(plain[name], other[name])} == drawn
    assert "blocks.4.mlp.fc.weight" in drawn and "blocks.4.mlp.proj.weight" not in drawn


# ----------------------------------------------------------------------------------------------------------
# Forward and backward
# ----------------------------------------------------------------------------------------------------------


def assert_equals_the_reference(hp, dtype=torch.float32, length=15, looping=True, longest=None):
    """Logits, loss and the gradient of every parameter; returns the logits."""
    tokens, eps = some_tokens(length=length), EPS64 if dtype == torch.float64 else EPS32
    x, y = tokens[:, :-1], tokens[:, 1:]
    leaves = {name: tensor.requires_grad_() for name, tensor in random_state(reference_shapes(hp)).items()}
    expected_logits = reference_logits(leaves, hp, x, eps, looping, longest)
    expected = reference_cross_entropy(expected_logits, y)
    expected.backward()
    model, exact = build(hp, dtype), 1e-11 if dtype == torch.float64 else 1e-5
    assert model.looping == (hp.num_loops > 0)
    model.looping &= looping
    segments = None if longest is None else tg.segment_starts(x, longest)
    logits, loss = model(x, segments=segments).detach(), model(x, y, segments)
    assert logits.dtype == dtype and logits.shape == (*x.shape, hp.vocab_size) and loss.ndim == 0
    assert relative_error(logits, expected_logits) <= exact
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=exact)
    loss.backward()
    unused = ["blocks.0.attn.vr_lambda"] if hp.value_residual else []
    assert unused == [name for name, leaf in leaves.items() if leaf.grad is None]
    for name, parameter in model.named_parameters():
        if name.startswith("parallel_"):  # of the layers before the lanes they are never read
            first = hp.parallel_start_layer
            assert not parameter.grad[:first].any() and parameter.grad[first:].abs().amin() > 0
        if name not in unused:
            assert relative_error(parameter.grad, leaves[name].grad) <= 10 * exact, name
        else:
            assert parameter.grad is None or not parameter.grad.any(), name
    return logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("config", CONFIGS)
def test_logits_loss_and_gradients_equal_the_reference(config, dtype):
    assert_equals_the_reference(settings(config), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("config", ["pr1855", "pr1855_smoke", "all"])
def test_the_order_without_loops_equals_the_reference_too(config, dtype):
    hp = settings(config)
    without = assert_equals_the_reference(hp, dtype, looping=False)
    with torch.no_grad():
        assert relative_error(build(hp, dtype)(some_tokens(length=15)[:, :-1]), without.double()) > 1e-3


@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize("longest", [4, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_inside_documents_equals_the_reference(dtype, longest, looping):
    """Cut by BOS alone, and into pieces of four tokens; far from the rows as they are."""
    hp = settings("pr1855")
    inside = assert_equals_the_reference(hp, dtype, looping=looping, longest=longest)
    model = build(hp, dtype)
    model.looping = looping
    with torch.no_grad():
        assert relative_error(model(some_tokens(length=15)[:, :-1]), inside.double()) > 1e-2


def test_another_token_of_one_document_changes_no_logit_of_another():
    """In a row of three documents, the first and the last cut into pieces."""
    tokens, model = some_tokens(batch=1, length=60, seed=3), build(settings("pr1855"), torch.float64)
    tokens[0, [25, 31]] = 1
    with torch.no_grad():
        inside = lambda text: model(text, segments=tg.segment_starts(text, 20))[0]
        before = inside(tokens)
        for at, document in ((3, range(25)), (27, range(25, 31)), (40, range(31, 60))):
            other = tokens.clone()
            other[0, at] = 61 if tokens[0, at] == 60 else 60
            moved = ((inside(other) - before).abs().amax(1) > 1e-9).nonzero().flatten().tolist()
            assert moved[0] == at and set(moved) <= set(document)


# Every technique off, and the other settings of the model elsewhere.
CHANGES = {f"{name} off": {name: off} for name, off in OFF.items() if name in TECHNIQUES - CALLERS} | {
    "xsa layers": dict(xsa_last_n=2),
    "bigram buckets": dict(bigram_vocab_size=49),
    "value embedding layers": dict(ve_layers=(1, 2, 3)),
    "ntk": dict(rope_ntk_reference=0),
    "rope base": dict(rope_base=500.0),
    "rope dims": dict(rope_dims=16),
    "no rope": dict(rope_dims=0),
    "softcap": dict(logit_softcap=1000.0),
    "mlp slope": dict(mlp_slope=0.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_setting_changes_the_model_and_to_the_right_one(change):
    """Equal to the reference with the other setting, far from the model with the setting as it was."""
    logits = assert_equals_the_reference(settings("all", **CHANGES[change]))
    with torch.no_grad():
        assert relative_error(logits, build(settings("all"))(some_tokens(length=15)[:, :-1]).double()) > 1e-3


@pytest.mark.parametrize("length", [1, 2, 8, 9, 45])
def test_any_length(length):
    """Shorter and longer than the reference length of the rotary base, here 8, and than in training."""
    tokens, hp = some_tokens(batch=1, length=length, seed=length), settings("all")
    with torch.no_grad():
        expected = reference_logits(random_state(reference_shapes(hp)), hp, tokens, EPS32)
        assert relative_error(build(hp)(tokens), expected) <= 1e-5


def test_the_length_is_read_at_every_call():
    """A longer window first must not change what a shorter one gets afterwards."""
    model, short, long = build(settings("pr606")), some_tokens(length=6), some_tokens(length=30)
    with torch.no_grad():
        before = model(short)
        model(long)
        assert torch.equal(model(short), before)


@pytest.mark.parametrize(("preset", "base"), [("pr606", 22081.8), ("pr601", 10000.0)])
def test_the_published_rotary_base(preset, base):
    """What the angles of the second token say it was, at the length of scoring and at that of training."""
    hp = tg.Hyperparameters.from_env({"PRESET": preset})
    for length, expected in ((2048, base), (1024, 10000.0)):
        cos, sin = tg.rotary_tables(
            length, hp.rope_dims, hp.rope_base, hp.rope_ntk_reference, "cpu", torch.float64
        )
        last = float(torch.atan2(sin[1, 0, -1], cos[1, 0, -1]))
        assert last ** (-hp.rope_dims / (hp.rope_dims - 2)) == pytest.approx(expected, rel=1e-5)
        assert reference_rope_base(hp, length) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_causality(config):
    """Another token at a position changes no logits before it, and does change those at and after it."""
    positions = (0, 1, 7, 13, 19)
    tokens = some_tokens(batch=1).repeat(1 + len(positions), 1)
    for row, position in enumerate(positions, 1):
        tokens[row, position] = 61 if tokens[row, position] == 60 else 60
    with torch.no_grad():
        logits = build(settings(config), torch.float64)(tokens)
    for row, position in enumerate(positions, 1):
        difference = (logits[row] - logits[0]).abs().amax(dim=1)
        assert (difference[:position] <= 1e-11).all() and (difference[position:] > 1e-6).all()


def test_rows_of_a_batch_do_not_mix():
    model, tokens = build(ALL_ON, torch.float64), some_tokens(batch=3)
    with torch.no_grad():
        together = model(tokens)
        for i in range(3):
            torch.testing.assert_close(model(tokens[i : i + 1])[0], together[i], atol=1e-11, rtol=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_bfloat16_weights_and_autocast(config):
    hp, tokens, expected = settings(config), some_tokens(), expected_logits(config)
    model = build(hp)
    with torch.no_grad():
        assert relative_error(build(hp, torch.bfloat16)(tokens), expected) < 0.1
        with torch.autocast("cpu", torch.bfloat16):
            assert model.hidden(tokens).dtype == torch.bfloat16
            assert relative_error(model(tokens), expected) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_loss_of_many_tokens_and_a_large_vocabulary(dtype):
    """The output layer is worked off in parts; here three, and the last one is shorter."""
    bare = dict(
        num_layers=2, model_dim=8, num_heads=1, num_kv_heads=1, rope_dims=4, ve_enabled=False, mlp_mult=1
    )
    model = build(settings("pr606", **bare, vocab_size=4096, bigram_vocab_size=0, logit_softcap=3.0), dtype)
    assert 2 < 300 * 4096 / tg.TUNING["cpu"].logits < 3
    tokens = torch.randint(0, 4096, (3, 101), generator=torch.Generator().manual_seed(0))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward(torch.tensor(0.5, dtype=dtype))
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    (0.5 * plain).backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=tolerance)
    for name, p in model.named_parameters():
        assert relative_error(got[name], p.grad.double()) <= 10 * tolerance, name


def test_the_bigram_hash_is_int32():
    """The products overflow 32 bits for large ids, and the submissions hash the wrapped values."""
    buckets, ids = 61, [5, 64_999, 60_001, 64_000, 3, 59_999, 1_023, 1_022, 64_001, 64_321]
    indices = reference_bigram_index(ids, buckets)
    assert indices[1:] != [((36313 * b) ^ (27191 * a)) % (buckets - 1) for a, b in zip(ids, ids[1:])]
    part = tg.BigramHash(settings("all", bigram_vocab_size=buckets), None)
    torch.nn.init.normal_(part.embed.weight)
    zeros = torch.zeros(1, len(ids), 64)
    expected = part.embed.weight[indices] @ part.proj.weight.T * part.scale
    torch.testing.assert_close(part(zeros, torch.tensor([ids]))[0], expected)


# ----------------------------------------------------------------------------------------------------------
# Parts
# ----------------------------------------------------------------------------------------------------------


def parts_of(model):
    """The tables that a model's parts stand in."""
    return [
        model.embedding_parts,
        *(t for b in model.blocks for t in (b.attn.value_parts, b.attn.output_parts)),
    ]


def silences(model):
    """By class or technique, the weights that silence a part of it."""
    owners = [*model.modules(), *(part for table in parts_of(model) for part in table.values())]
    found = {type(owner).__name__: owner.silent for owner in owners if hasattr(owner, "silent")}
    return found | found.pop("GPT")


@torch.no_grad()
def silence(model, weights):
    for name, p in model.named_parameters():
        for key in (key for key in weights if name.endswith(key)):
            p.copy_(torch.tensor(weights[key]).expand_as(p))


def loss_of(model):
    tokens = some_tokens()
    with torch.no_grad():
        return float(model(tokens[:, :-1], tokens[:, 1:]))


@pytest.mark.parametrize("technique", [name for name in OFF if name not in CALLERS])
def test_a_technique_is_off_where_its_part_is_gone_or_silent(technique):
    """Its setting changes the loss, as its part's removal does, and the weights that silence it."""
    on, off = build(ALL_ON), build(dataclasses.replace(ALL_ON, **{technique: OFF[technique]}))
    assert abs(loss_of(on) - loss_of(off)) > 1e-4
    silent = silences(on)
    own = [silent[name] for name in silent.keys() - silences(off).keys()]
    tables = list(zip(parts_of(on), parts_of(off), strict=True))
    gone = [(table, name) for table, left in tables for name in table.keys() - left.keys()]
    # numbers of a part that stays, and what the plan and the model's own loop do
    own_ways = ("num_loops", "skip_gates_enabled", "parallel_start_layer")
    assert gone or technique in ("ln_scale", "smear_reset_at_bos", *own_ways)
    if technique == "sparse_attn_gate_enabled":  # one half where it is silent, and one without it
        for block in off.blocks:
            block.attn.proj.weight.data *= 0.5
    if own and technique not in own_ways:
        quiet = build(ALL_ON)
        silence(quiet, {key: value for weights in own for key, value in weights.items()})
        assert loss_of(quiet) == pytest.approx(loss_of(off), rel=1e-6)
    for table, name in gone:
        del table[name]
    if gone:
        for block in off.blocks if technique == "sparse_attn_gate_enabled" else ():
            block.attn.proj.weight.data *= 2
        assert loss_of(on) == loss_of(off)
        gone_parameters = {name for name, _ in on.named_parameters()} - {
            name for name, _ in off.named_parameters()
        }
        assert bool(gone_parameters) == bool(own), "a part with parameters says which of them silence it"


@pytest.mark.parametrize("config", ["pr606", "pr601", "pr1855", "all"])
def test_every_part_of_the_tables_is_one_of_a_setting(config):
    """Parts act in the order of their table, in the layers that their settings name."""
    hp, model = settings(config), build(settings(config))
    for block, layer in zip(model.blocks, range(hp.num_layers)):
        # what is not in every layer; any other part has the name of its setting
        some = {"value_embedding": hp.ve_enabled and layer in hp.ve_layers}
        some |= {"xsa": layer >= hp.num_layers - hp.xsa_last_n, "sparse_gate": hp.sparse_attn_gate_enabled}
        for there, table in (
            (block.attn.value_parts, tg.VALUE_PARTS),
            (block.attn.output_parts, tg.OUTPUT_PARTS),
        ):
            wanted = {name: some[name] if name in some else getattr(hp, name) for name in table}
            assert list(there) == [name for name in table if wanted[name]]
    smear = ["token_smear", "norm"] if config == "pr1855" else ["norm", "smear"]
    assert list(model.embedding_parts) == ["bigram", *smear]


# ----------------------------------------------------------------------------------------------------------
# Roles
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_roles_are_the_submissions(config):
    """By name: tables, matrices of blocks, projections and gates; everything else is control."""
    hp = settings(config, attn_bits=5, mlp_bits=4, embed_bits=8)
    roles = tg.GPT(hp).roles()
    assert roles.keys() == reference_shapes(hp).keys()
    for name, role in roles.items():
        if name == "tok_emb.weight" or name.endswith("embed.weight"):
            assert role == "embed", name
        elif ".attn." in name and name.endswith(
            ("c_q.weight", "c_k.weight", "c_v.weight", "attn.proj.weight")
        ):
            assert role == "attn", name
        elif ".mlp." in name:
            assert role == "mlp", name
        else:
            matrix = name.endswith(".weight") and name != "smear_gate.weight"
            assert role == ("matrix" if matrix else "control"), name
    matrices = {name: {"attn": 15, "mlp": 7}[role] for name, role in roles.items() if role in ("attn", "mlp")}
    tables = {name: 127 for name, role in roles.items() if role == "embed"}
    if hp.embed_gptq:
        matrices["tok_emb.weight"] = tables.pop("tok_emb.weight")
    assert tg.GPT(hp).max_codes("matrix") == matrices and tg.GPT(hp).max_codes("embed") == tables


# ----------------------------------------------------------------------------------------------------------
# Attention kernels
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["pr606", "all"])
def test_attention_equals_the_reference(config):
    model = build(settings(config)).use(tg.sdpa_attention)
    with torch.no_grad():
        assert relative_error(model(some_tokens()), expected_logits(config)) <= 1e-5


def machine(**changed):
    usual = dict(device="cpu", dtype="fp32", attention="sdpa", document_mask=False)
    hp = settings("all", **usual | changed)
    return hp, tg.World(hp, {})


class Operators(TorchDispatchMode):
    """Every operator that ran, with what it was given besides tensors."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append((func.name(), [x for x in args if not isinstance(x, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kernel", "options"), [
    ("flash", [0.0, True]), ("cudnn", [None, True, 0.0, True]),
])  # fmt: skip
def test_a_kernel_is_its_operator_causal_and_without_dropout(kernel, options):
    """Called itself, with no context about it; without values, for no kernel of CUDA runs here."""
    q, k, v = (torch.empty(2, 16, heads, 8, device="meta") for heads in (4, 2, 2))
    with Operators() as operators:
        assert tg.KERNELS[kernel](16)(q, k, v).shape == (2, 16, 4, 8)
    wanted = f"aten::_scaled_dot_product_{kernel}_attention"
    assert [given for name, given in operators.ran if name == wanted] == [options]


def forced(monkeypatch, **kernels):
    """A machine that takes itself for one with CUDA, and has these kernels."""
    hp, world = machine(attention="auto")
    monkeypatch.setattr(
        tg, "KERNELS", {name: lambda _, kernel=kernel: kernel for name, kernel in kernels.items()}
    )
    world.on_cuda = True
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    world.seconds = lambda work, repeats=1: work() and 0.001
    return hp, world


def test_the_fastest_kernel_is_taken_and_named(monkeypatch):
    seconds = {"slow": 3.0, "fast": 1.0, "middle": 2.0}
    lines, kernels = [], {name: lambda *qkv: tg.sdpa_attention(*qkv) for name in seconds}
    hp, world = forced(monkeypatch, **kernels)
    passing = iter(seconds.values())
    world.seconds = lambda work, repeats: next(passing)
    name, attend = tg.choose_attention(hp, world, log=lines.append)
    assert name == "fast (ms per layer and 16,384 tokens: slow:3000 fast:1000 middle:2000)"
    assert attend is kernels["fast"] and not lines


def not_causal(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


class Wrong(torch.autograd.Function):
    """Right output, and a gradient of V that is 3 % too large."""

    @staticmethod
    def forward(ctx, v):
        return v.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.03 * grad


@pytest.mark.parametrize(("kernel", "fault"), [
    (not_causal, "ArithmeticError: differs from float32 by"),
    (lambda q, k, v: tg.sdpa_attention(q, k, Wrong.apply(v)), "differs from float32 by 0.03 where 0.02"),
    (lambda q, k, v: tg.sdpa_attention(q, k, v) * math.nan, "differs from float32 by nan"),
    (lambda q, k, v: tg.sdpa_attention(q, k, v).detach(), "RuntimeError: "),
    (lambda q, k, v: q.missing, "AttributeError: 'Tensor' object has no attribute 'missing'"),
])  # fmt: skip
def test_a_kernel_that_is_wrong_or_raises_is_dropped_with_a_line(monkeypatch, kernel, fault):
    lines, last = [], lambda *qkv: tg.sdpa_attention(*qkv)
    hp, world = forced(monkeypatch, bad=kernel, last=last)
    name, attend = tg.choose_attention(hp, world, log=lines.append)
    assert name.startswith("last (ms") and "bad:inf" in name and attend is last
    assert len(lines) == 1 and lines[0].startswith("attention:bad dropped: ") and fault in lines[0]
    hp, world = forced(monkeypatch, bad=kernel)
    with pytest.raises(tg.UserError, match="no kernel gives what float32 gives"):
        tg.choose_attention(hp, world)


def test_a_kernel_that_one_rank_drops_is_dropped_by_all(monkeypatch):
    """And where clocks differ all take the kernel whose slowest rank is the fastest."""
    lines, kernels = [], {name: lambda *qkv: tg.sdpa_attention(*qkv) for name in ("a", "b", "c")}
    hp, world = forced(monkeypatch, **kernels)
    world.max, others = lambda value: max(value, next(others)), iter([math.inf, 2.0, 1.0])
    name, attend = tg.choose_attention(hp, world, log=lines.append)
    assert name.startswith("c (ms") and attend is kernels["c"]
    assert lines == ["attention:a dropped: on another rank"]


@pytest.mark.whole
def test_a_kernel_that_breaks_the_graph_is_dropped_where_it_would_be_compiled(monkeypatch):
    def breaking(q, k, v):
        torch._dynamo.graph_break()
        return tg.sdpa_attention(q, k, v)

    compiled, lines = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, **given: compiled(f, backend="aot_eager", **given))
    for compiling, best in ((False, "breaking"), (True, "last")):
        hp, world = forced(monkeypatch, breaking=breaking, last=tg.sdpa_attention)
        times = iter([1.0, 2.0])
        world.seconds = lambda work, repeats, times=times: (work(), next(times))[1]
        name, _ = tg.choose_attention(hp, world, compiling, lines.append)
        assert name.startswith(f"{best} (ms")
    assert len(lines) == 1 and "breaking dropped: Unsupported" in lines[0]


def test_a_cpu_measures_no_kernels():
    name, attend = tg.choose_attention(*machine(attention="auto"))
    q, k, v = torch.randn(3, 2, 8, 2, 8)
    assert name == "sdpa" and torch.equal(attend(q, k, v), tg.sdpa_attention(q, k, v))


def varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, causal):
    """As FlashAttention's function of variable length: (n, H, d), bounds, lengths; a segment at a time."""
    assert causal and cu_q is cu_k and cu_q.dtype == torch.int32 and longest_q == longest_k
    ends = list(zip(cu_q.tolist(), cu_q[1:].tolist()))
    assert max(end - at for at, end in ends) <= longest_q
    parts = [tg.sdpa_attention(*(x[None, at:end] for x in (q, k, v)))[0] for at, end in ends if at < end]
    return torch.cat(parts)


def some_segments():
    """Inputs of two rows of twelve, and bounds of which the last is repeated."""
    q, k, v = torch.randn(3, 2, 12, 4, 8)
    return (q, k[:, :, :2], v[:, :, :2]), torch.tensor([0, 5, 6, 12, 20, 24, 24, 24], dtype=torch.int32)


@pytest.mark.parametrize("compiling", [False, True])
def test_attention_by_padding_is_that_of_each_segment(compiling):
    """Gradients too; under the compiler by the longest that there may be, for its shapes do not move."""
    torch._dynamo.reset()
    qkv, bounds = some_segments()
    attend = tg.by_padding(tg.sdpa_attention, longest=9)
    attend = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiling else attend
    results = []
    loop = lambda *given: varlen(*(x.flatten(0, 1) for x in given[:3]), bounds, bounds, 9, 9, causal=True)
    for function in (attend, lambda *given: loop(*given).view_as(given[0])):
        leaves = [x.clone().requires_grad_() for x in qkv]
        y = function(*leaves, bounds)
        results.append([y, *torch.autograd.grad(y, leaves, torch.cos(y.detach()))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert (results[0][0] - tg.sdpa_attention(*qkv)).abs().max() > 0.1


def test_attention_of_variable_length_is_called_as_it_wants(monkeypatch):
    """torch's and FlashAttention 3's, in place of which a loop stands here; the shapes of both come back."""
    qkv, bounds = some_segments()
    expected = tg.sdpa_attention(*qkv, bounds)

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):
        assert window_size == (-1, 0) and enable_gqa
        return varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal=True)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    interface = types.SimpleNamespace(
        flash_attn_func=lambda q, k, v, causal: tg.sdpa_attention(q, k, v),
        flash_attn_varlen_func=lambda *given, causal: (varlen(*given, causal), "log-sum-exp"),
    )
    monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
    for kernel in ("varlen", "fa3"):
        attend = tg.KERNELS[kernel](9)
        torch.testing.assert_close(attend(*qkv, bounds), expected)
        torch.testing.assert_close(attend(*qkv), tg.sdpa_attention(*qkv))


@pytest.mark.parametrize("attention", ["auto", "fa3"])
@pytest.mark.parametrize("documents", [False, True])
def test_flash_attention_3_is_taken_where_it_is_installed(monkeypatch, attention, documents):
    """Causal, whatever its build gives back; a Hopper GPU without it hears of it."""
    calls, lines = [], []
    for outputs in (lambda out: out, lambda out: (out, "log-sum-exp")):

        def flash_attn_func(q, k, v, outputs=outputs, **given):
            calls.append(given)
            return outputs(tg.sdpa_attention(q, k, v))

        def flash_attn_varlen_func(*given, outputs=outputs, **named):
            calls.append(named)
            return outputs(varlen(*given, **named))

        interface = types.SimpleNamespace(
            flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
        )
        monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
        hp, world = machine(attention=attention, document_mask=documents)
        world.on_cuda = True
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        world.seconds = lambda work, repeats: 1.0 + (not calls)
        name, attend = tg.choose_attention(hp, world, log=lines.append)
        assert name.startswith("fa3 (ms")
        q, k, v = torch.randn(3, 1, 8, 2, 8)
        assert torch.equal(attend(q, k, v), tg.sdpa_attention(q, k, v))
    assert calls and all(given == {"causal": True} for given in calls)
    assert not any("WITHOUT" in line for line in lines)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    if attention == "fa3":
        with pytest.raises(tg.UserError, match="ATTENTION=fa3: no kernel"):
            tg.choose_attention(hp, world, log=lines.append)
    else:
        tg.choose_attention(hp, world, log=lines.append)
        assert "attention:WITHOUT FlashAttention 3" in lines[-1] and "flash-attn-3 --index-url" in lines[-1]
    assert any(line.startswith("attention:fa3 dropped: ModuleNotFoundError") for line in lines)


# ----------------------------------------------------------------------------------------------------------
# Under the compiler
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_the_compiled_model_is_one_graph_in_which_the_rotary_tables_are_constants():
    """As operations they would be float64 powers and cosines in every attention kernel, at every step."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    model, eager = build(ALL_ON).use(tg.sdpa_attention), build(ALL_ON)
    torch._dynamo.reset()
    compiled = tg.compiled(model, fullgraph=True, backend=backend)
    for T in (10, 20):  # another length has other tables
        tokens = some_tokens()[:, :T]
        torch.testing.assert_close(compiled(tokens), eager(tokens))
    used = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op != "placeholder"}
    assert len(graphs) == 2 and any("sigmoid" in name for name in used)
    assert not [name for name in used if "cos" in name or "pow" in name or "arange" in name]
