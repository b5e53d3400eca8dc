"""The model against a dense float64 restatement, parameter by parameter and technique by technique."""

import dataclasses
import functools
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from reference import (
    EPS32,
    EPS64,
    random_state,
    reference_bigram_index,
    reference_logits,
    reference_loss,
    reference_rope_base,
    reference_shapes,
)

import train_gpt as tg

ROOT = Path(__file__).resolve().parent.parent


def env(text):
    """The mapping that "A=1 B=2" stands for."""
    return dict(pair.split("=") for pair in text.split())


SMALL = env(
    "MODEL_DIM=64 NUM_HEADS=4 VOCAB_SIZE=96 TRAIN_SEQ_LEN=32 EVAL_SEQ_LEN=32 EVAL_STRIDE=8 ROPE_DIMS=8"
    " BIGRAM_VOCAB_SIZE=50 BIGRAM_DIM=24"
)
CONFIGS = {
    "pr606": SMALL
    | env(
        "PRESET=pr606 NUM_LAYERS=6 NUM_KV_HEADS=4 XSA_LAST_N=6 VE_DIM=20 VE_LAYERS=4,5 ROPE_NTK_REFERENCE=8"
    ),
    "pr601": SMALL | env("PRESET=pr601 NUM_LAYERS=6 NUM_KV_HEADS=2 XSA_LAST_N=4"),
    "all": SMALL
    | env("PRESET=pr606 NUM_LAYERS=7 NUM_KV_HEADS=2 XSA_LAST_N=5 VE_ENABLED=1 VE_DIM=20 VE_LAYERS=0,3,6")
    | env("ROPE_NTK_REFERENCE=8 VALUE_RESIDUAL=1 GATED_ATTENTION=1 SMEAR_GATE=1 SMEAR_RESET_AT_BOS=1")
    | env("LN_SCALE=1 MLP_SLOPE=0.5"),
}
small = functools.partial(reference_shapes, dim=64, heads=4, vocab=96, bigram_buckets=50, bigram_dim=24)
SHAPES = {
    "pr606": small(layers=6, kv_heads=4, mlp_hidden=224, ve_dim=20, ve_layers=(4, 5)),
    "pr601": small(layers=6, kv_heads=2, mlp_hidden=192, value_residual=True, gated_attention=True),
    "all": small(
        layers=7,
        kv_heads=2,
        mlp_hidden=224,
        ve_dim=20,
        ve_layers=(0, 3, 6),
        value_residual=True,
        gated_attention=True,
    ),
}
published = functools.partial(reference_shapes, layers=11, dim=512, heads=8, vocab=1024, bigram_dim=128)
PUBLISHED = {
    "pr606": published(kv_heads=8, mlp_hidden=1792, bigram_buckets=8192, ve_dim=128, ve_layers=(9, 10)),
    "pr601": published(
        kv_heads=4, mlp_hidden=1536, bigram_buckets=1024, value_residual=True, gated_attention=True
    ),
}
PUBLISHED_COUNT = {"pr606": 33_580_124, "pr601": 26_744_007}


def settings(mapping):
    return tg.Hyperparameters.from_env(mapping)


def some_tokens(batch=2, length=20, seed=0):
    """Token ids with a BOS at the start of one row and inside both."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 96, (batch, length), generator=generator)
    tokens[0, length // 3] = 1
    tokens[-1, 0] = 1
    tokens[-1, 2 * length // 3] = 1
    return tokens


@functools.cache
def state_of(config):
    return random_state(SHAPES[config], seed=len(config))


@functools.cache
def expected_logits(config, eps=EPS32):
    with torch.no_grad():
        return reference_logits(state_of(config), settings(CONFIGS[config]), some_tokens(), eps)


def build(config, state=None, dtype=torch.float32, **changed):
    """The small model of a configuration, holding whatever part of the random state it has room for."""
    model = tg.GPT(settings(CONFIGS[config] | changed)).to(dtype).eval()
    state = state_of(config) if state is None else state
    if changed:
        own = model.state_dict()
        state = {name: state[name] for name in own}
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=True)
    return model


@torch.no_grad()
def relative_error(logits, expected):
    return float((logits.double() - expected).norm() / expected.norm())


# ----------------------------------------------------------------------------------------------------------
# Parameters
# ----------------------------------------------------------------------------------------------------------


@functools.cache
def fresh(preset):
    torch.manual_seed(0)
    return tg.GPT(settings({"PRESET": preset}))


@pytest.mark.parametrize("preset", ["pr606", "pr601"])
def test_parameter_count_is_the_submissions_own(preset):
    by_hand = sum(math.prod(shape) for shape in PUBLISHED[preset].values())
    assert sum(p.numel() for p in fresh(preset).parameters()) == by_hand == PUBLISHED_COUNT[preset]


@pytest.mark.parametrize("preset", ["pr606", "pr601"])
def test_a_published_state_dict_loads_strictly(preset):
    shapes = PUBLISHED[preset]
    assert {name: tuple(t.shape) for name, t in fresh(preset).state_dict().items()} == shapes
    assert set(dict(fresh(preset).named_parameters())) == set(shapes)
    state = {name: tensor.float() for name, tensor in random_state(shapes, seed=1).items()}
    with torch.device("meta"):
        model = tg.GPT(settings({"PRESET": preset}))
    model.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(model.state_dict()["blocks.10.mlp.proj.weight"], state["blocks.10.mlp.proj.weight"])


@pytest.mark.parametrize("preset", ["pr606", "pr601"])
def test_a_state_dict_of_mixed_dtypes_loads_as_float32(preset):
    """The submissions save embedding tables and gates in bf16, the rest in fp32."""
    half = ("tok_emb.weight", "embed.weight", "attn_gate.weight", "attn_gate.bias")
    state = {
        name: tensor.to(torch.bfloat16 if name.endswith(half) else torch.float32)
        for name, tensor in state_of(preset).items()
    }
    model = tg.GPT(settings(CONFIGS[preset])).eval()
    model.load_state_dict(state, strict=True)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        expected = reference_logits(state, settings(CONFIGS[preset]), some_tokens(length=9), EPS32)
        assert relative_error(model(some_tokens(length=9)), expected) <= 1e-5


@pytest.mark.parametrize("config", ["pr606", "pr601", "all"])
def test_state_dict_follows_the_settings(config):
    model = tg.GPT(settings(CONFIGS[config]))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == SHAPES[config]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("preset", ["pr606", "pr601"])
def test_initial_values(preset):
    state = fresh(preset).state_dict()
    assert float(state["tok_emb.weight"].std()) == pytest.approx(0.005, rel=0.01)
    assert float(state["tok_emb.weight"].mean().abs()) < 1e-4
    assert not state["bigram.embed.weight"].any() and float(state["bigram.scale"]) == pytest.approx(0.05)
    assert not state["smear.gate"].any() and (state["skip_weights"] == 1).all()
    for i in range(11):
        block = {name: state[f"blocks.{i}.{name}"] for name in ("attn_scale", "mlp_scale", "attn.q_gain")}
        assert (block["attn_scale"] == 1).all() and (block["mlp_scale"] == 1).all()
        assert (block["attn.q_gain"] == 1.5).all()
        ones, zeros = state[f"blocks.{i}.resid_mix"]
        assert (ones == 1).all() and not zeros.any()
        assert not state[f"blocks.{i}.attn.proj.weight"].any()
        assert not state[f"blocks.{i}.mlp.proj.weight"].any()
    for i in (0, 10):
        for name in ("attn.c_q", "attn.c_k", "attn.c_v", "mlp.fc"):
            assert_orthogonal(state[f"blocks.{i}.{name}.weight"], gain=1.0)
    assert not torch.equal(state["blocks.0.attn.c_q.weight"], state["blocks.1.attn.c_q.weight"])
    assert_orthogonal(state["bigram.proj.weight"], gain=1 / math.sqrt(22))


def test_initial_values_of_the_value_embedding():
    state = fresh("pr606").state_dict()
    assert float(state["ve_shared.embed.weight"].std()) == pytest.approx(0.01, rel=0.01)
    assert_orthogonal(state["ve_shared.proj.weight"], gain=1 / math.sqrt(22))
    assert float(state["ve_shared.scale"]) == pytest.approx(0.1)
    assert float(state["ve_layer_scales.0"]) == float(state["ve_layer_scales.1"]) == 1.0


def test_initial_values_of_value_residual_and_gated_attention():
    state = fresh("pr601").state_dict()
    for i in range(11):
        assert state[f"blocks.{i}.attn.vr_lambda"].tolist() == [0.5, 0.5]
        assert not state[f"blocks.{i}.attn.attn_gate.weight"].any()
        assert (state[f"blocks.{i}.attn.attn_gate.bias"] == 4.0).all()


def assert_orthogonal(weight, gain):
    """The smaller side's vectors are orthogonal and `gain` long."""
    w = weight.double()
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0)


def test_the_seed_decides_the_initial_values():
    first, again, other = (seeded_state(seed) for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tok_emb.weight"], other["tok_emb.weight"])


def seeded_state(seed):
    torch.manual_seed(seed)
    return tg.GPT(settings(CONFIGS["all"])).state_dict()


@pytest.mark.parametrize("preset", ["pr606", "pr601"])
def test_without_ortho_init_matrices_are_not_orthogonal(preset):
    """What has to start at zero still does."""
    small_one = CONFIGS[preset] | {"ORTHO_INIT": "0", "BIGRAM_DIM": "64", "VE_DIM": "64"}
    torch.manual_seed(0)
    state = tg.GPT(settings(small_one)).state_dict()
    on = tg.GPT(settings(small_one | {"ORTHO_INIT": "1"})).state_dict()
    names = ["blocks.0.attn.c_q.weight", "blocks.5.mlp.fc.weight", "bigram.proj.weight"]
    for name in names + ["ve_shared.proj.weight"] * (preset == "pr606"):
        assert_orthogonal(on[name], 1 / math.sqrt(12) if name.endswith(".proj.weight") else 1.0)
        with pytest.raises(AssertionError):
            assert_orthogonal(state[name], gain=float(state[name].norm()) / math.sqrt(64))
    for name, tensor in state.items():
        if name.endswith(("attn.proj.weight", "mlp.proj.weight", "attn_gate.weight")):
            assert not tensor.any() and not on[name].any(), name


def test_tied_embedding_std_and_qk_gain_are_settings():
    model = tg.GPT(settings(CONFIGS["pr606"] | {"TIED_EMBED_INIT_STD": "0.5", "QK_GAIN_INIT": "2.5"}))
    assert float(model.state_dict()["tok_emb.weight"].detach().std()) == pytest.approx(0.5, rel=0.05)
    assert (model.state_dict()["blocks.3.attn.q_gain"] == 2.5).all()


# ----------------------------------------------------------------------------------------------------------
# Forward and backward
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["pr606", "pr601", "all"])
def test_logits_equal_the_reference(config):
    expected = expected_logits(config)
    with torch.no_grad():
        logits = build(config)(some_tokens())
    assert logits.shape == (2, 20, 96)
    assert relative_error(logits, expected) <= 1e-5


@pytest.mark.parametrize("config", ["pr606", "pr601", "all"])
def test_logits_equal_the_reference_in_float64(config):
    with torch.no_grad():
        logits = build(config, dtype=torch.float64)(some_tokens())
    assert logits.dtype == torch.float64
    assert relative_error(logits, expected_logits(config, EPS64)) <= 1e-11


@pytest.mark.parametrize("config", ["pr606", "pr601", "all"])
def test_loss_and_gradients_equal_the_reference(config):
    tokens = some_tokens(length=15)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state_of(config).items()}
    expected = reference_loss(leaves, settings(CONFIGS[config]), inputs, targets, EPS32)
    expected.backward()
    model = build(config).train()
    loss = model(inputs, targets)
    assert loss.ndim == 0
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    unused = [name for name, leaf in leaves.items() if leaf.grad is None]
    assert unused == [name for name in leaves if name == "blocks.0.attn.vr_lambda"]
    for name, parameter in model.named_parameters():
        if name in unused:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert relative_error(parameter.grad, leaves[name].grad) <= 1e-4, name


@pytest.mark.parametrize("config", ["pr606", "pr601"])
def test_the_loss_is_the_cross_entropy_of_the_logits(config):
    tokens = some_tokens()
    model = build(config)
    with torch.no_grad():
        logits = model(tokens[:, :-1])
        loss = model(tokens[:, :-1], tokens[:, 1:])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten())
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


# Switching one technique off in the model, and only there, has to show.
SWITCHES = {
    "xsa": {"XSA_LAST_N": "0"},
    "xsa layers": {"XSA_LAST_N": "3"},
    "ln scale": {"LN_SCALE": "0"},
    "smear": {"SMEAR_GATE": "0"},
    "smear reset": {"SMEAR_RESET_AT_BOS": "0"},
    "bigram": {"BIGRAM_VOCAB_SIZE": "0"},
    "bigram buckets": {"BIGRAM_VOCAB_SIZE": "49"},
    "value embedding": {"VE_ENABLED": "0"},
    "value embedding layers": {"VE_LAYERS": "1,2,3"},
    "ntk": {"ROPE_NTK_REFERENCE": "0"},
    "rope base": {"ROPE_BASE": "500"},
    "rope dims": {"ROPE_DIMS": "16"},
    "value residual": {"VALUE_RESIDUAL": "0"},
    "gated attention": {"GATED_ATTENTION": "0"},
    "softcap": {"LOGIT_SOFTCAP": "1000"},
    "mlp slope": {"MLP_SLOPE": "0"},
}


# Where a preset differs: the other value of a switch that is off there, and what is not in it at all.
OTHER = {
    ("pr606", "smear reset"): {"SMEAR_RESET_AT_BOS": "1"},
    ("pr606", "value embedding layers"): {"VE_LAYERS": "2,3"},
    ("pr601", "smear reset"): {"SMEAR_RESET_AT_BOS": "1"},
    ("pr601", "mlp slope"): {"MLP_SLOPE": "0.5"},
    ("pr601", "ntk"): {"ROPE_NTK_REFERENCE": "4"},
}
ABSENT = {
    "all": set(),
    "pr606": {"value residual", "gated attention"},
    "pr601": {"value embedding", "value embedding layers"},
}
EVERY_SWITCH = [(config, name) for config in CONFIGS for name in SWITCHES if name not in ABSENT[config]]


@pytest.mark.parametrize(("config", "technique"), EVERY_SWITCH)
def test_every_switch_changes_the_logits_and_to_the_right_ones(config, technique):
    """Far from the reference with the technique as it was, equal to the reference with the other setting."""
    changes = OTHER.get((config, technique), SWITCHES[technique])
    state = dict(state_of(config))
    buckets = int(changes.get("BIGRAM_VOCAB_SIZE", 50))
    state["bigram.embed.weight"] = state["bigram.embed.weight"][:buckets]
    tokens = some_tokens(batch=1, length=12)
    with torch.no_grad():
        logits = build(config, state=state, **changes)(tokens)
        before = reference_logits(state_of(config), settings(CONFIGS[config]), tokens, EPS32)
        after = reference_logits(state, settings(CONFIGS[config] | changes), tokens, EPS32)
    assert relative_error(logits, before) > 1e-3
    assert relative_error(logits, after) <= 1e-5


# Techniques that are a parameter and no setting: their neutral value has to show as well.
NEUTRAL = {
    "skip_weights": 0.0,
    "smear.gate": -30.0,
    "bigram.scale": 0.0,
    "ve_shared.scale": 0.0,
    "ve_layer_scales": 1.0,
    "resid_mix": (1.0, 0.0),
    "attn_scale": 1.0,
    "mlp_scale": 1.0,
    "q_gain": 1.0,
    "vr_lambda": (0.0, 1.0),
    "attn_gate.weight": 0.0,
    "attn_gate.bias": 30.0,
}


EVERY_PARAMETER = [
    (config, name) for config in CONFIGS for name in NEUTRAL if any(name in key for key in SHAPES[config])
]


@pytest.mark.parametrize(("config", "name"), EVERY_PARAMETER)
def test_every_parameter_counts(config, name):
    state = {key: tensor.clone() for key, tensor in state_of(config).items()}
    for key in (key for key in state if name in key):
        value = torch.tensor(NEUTRAL[name], dtype=torch.float64)
        state[key].copy_(value[:, None] if name == "resid_mix" else value)
    with torch.no_grad():
        logits = build(config, state=state)(some_tokens())
    assert relative_error(logits, expected_logits(config)) > 1e-3


def test_every_technique_is_a_parameter_or_a_switch():
    """The two tables above leave out no parameter of any configuration but the matrices."""
    for config in CONFIGS:
        for name in SHAPES[config]:
            matrix = name.endswith(".weight") and "attn_gate" not in name
            assert matrix or any(key in name for key in NEUTRAL), name


@pytest.mark.parametrize("config", ["pr606", "pr601", "all"])
@pytest.mark.parametrize("kernel", ["sdpa_attention", "dense_attention", "cpu_attention", *tg.SDPA_KERNELS])
def test_every_attention_kernel_equals_the_reference(config, kernel):
    """A kernel of SDPA that does not run here leaves the work to the next one."""
    model = build(config)
    for block in model.blocks:
        block.attn.attend = tg.sdpa_by(kernel) if kernel in tg.SDPA_KERNELS else getattr(tg, kernel)
    with torch.no_grad():
        assert relative_error(model(some_tokens()), expected_logits(config)) <= 1e-5


def test_the_fastest_sdpa_kernel_is_taken_and_named(monkeypatch):
    """Measured where it runs; what does not run on a CPU has no time."""
    model = build("pr601")
    hp = dataclasses.replace(model.hp, attention="sdpa", train_seq_len=32)
    world = tg.World(hp, {})
    assert set(tg.time_sdpa(hp, world)) == {"flash"} and 0 < tg.time_sdpa(hp, world)["flash"] < 10_000
    assert tg.choose_attention(hp, model, world).startswith("sdpa-flash (milliseconds")
    chosen = []
    monkeypatch.setattr(tg, "sdpa_by", lambda name: chosen.append(name) or tg.sdpa_attention)
    for timings in ({"flash": 2.0, "cudnn": 1.0, "efficient": 3.0}, {"efficient": 1.0}, {}):
        monkeypatch.setattr(tg, "time_sdpa", lambda *_, timings=timings: timings)
        assert tg.choose_attention(hp, model, world).startswith(f"sdpa-{chosen[-1]} ")
    assert chosen == ["cudnn", "efficient", "math"]
    asked = []
    monkeypatch.undo()
    monkeypatch.setattr(tg, "sdpa_kernel", lambda order, **given: asked.append((order[0], given)) or nullcontext())
    assert torch.isfinite(tg.sdpa_by("cudnn")(*torch.randn(3, 1, 4, 2, 8))).all()
    assert asked == [(tg.SDPBackend.CUDNN_ATTENTION, {"set_priority": True})]


def test_a_chosen_sdpa_kernel_breaks_no_graph():
    model = build("pr601")
    for block in model.blocks:
        block.attn.attend = tg.sdpa_by("flash")
    torch._dynamo.reset()
    whole = tg.compiled(model, fullgraph=True, backend="aot_eager")
    assert relative_error(whole(some_tokens()), expected_logits("pr601")) <= 1e-5


def test_rotary_tables_are_constants_of_the_graph():
    """As operations they would be float64 powers and cosines in every attention kernel, at every step."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = tg.compiled(build("all"), fullgraph=True, backend=backend)
    for T in (10, 20):  # another length has other tables
        tokens = some_tokens()[:, :T]
        torch.testing.assert_close(compiled(tokens), build("all")(tokens))
    used = {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op != "placeholder"}
    assert len(graphs) == 2 and any("sigmoid" in name for name in used)
    assert not [name for name in used if "cos" in name or "pow" in name or "arange" in name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_loss_of_many_tokens_and_a_large_vocabulary(dtype):
    """The output layer is worked off in parts; here three, and the last one is shorter."""
    tiny = env("PRESET=pr606 NUM_LAYERS=2 MODEL_DIM=8 NUM_HEADS=1 NUM_KV_HEADS=1 ROPE_DIMS=4 XSA_LAST_N=0")
    tiny |= env("VE_ENABLED=0 MLP_MULT=1 VOCAB_SIZE=4096 BIGRAM_VOCAB_SIZE=0 LOGIT_SOFTCAP=3")
    torch.manual_seed(0)
    model = tg.GPT(settings(SMALL | tiny)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    tokens = torch.randint(0, 4096, (3, 101))
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


@pytest.mark.parametrize("config", ["pr606", "pr601", "all"])
@pytest.mark.parametrize("length", [1, 2, 7, 9, 45])
def test_any_length(config, length):
    """Shorter and longer than the reference length of the rotary base and than the training length."""
    tokens = some_tokens(batch=1, length=length, seed=length)
    with torch.no_grad():
        expected = reference_logits(state_of(config), settings(CONFIGS[config]), tokens, EPS32)
        assert relative_error(build(config)(tokens), expected) <= 1e-5


def test_length_is_read_at_every_call():
    """A longer window first must not change what a shorter one gets afterwards."""
    model, short, long = build("pr606"), some_tokens(length=6), some_tokens(length=30)
    with torch.no_grad():
        before = model(short)
        model(long)
        assert torch.equal(model(short), before)


def test_published_rotary_base():
    for preset, base in (("pr606", 22081.8), ("pr601", 10000.0)):
        hp = settings({"PRESET": preset})
        assert reference_rope_base(hp, 2048) == pytest.approx(base, rel=1e-5)
        assert reference_rope_base(hp, 1024) == 10000.0


@pytest.mark.parametrize("config", ["pr606", "pr601", "all"])
@pytest.mark.parametrize("position", [0, 1, 7, 13, 19])
def test_causality(config, position):
    """Another token at a position changes no logits before it, and does change those at and after it."""
    model, tokens = build(config, dtype=torch.float64), some_tokens()
    changed = tokens.clone()
    changed[:, position] = torch.where(tokens[:, position] == 60, 61, 60)
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert (difference[:position] <= 1e-11).all()
    assert (difference[position:] > 1e-6).all()


def test_rows_of_a_batch_do_not_mix():
    model, tokens = build("all", dtype=torch.float64), some_tokens(batch=3)
    with torch.no_grad():
        together = model(tokens)
        for i in range(3):
            torch.testing.assert_close(model(tokens[i : i + 1])[0], together[i], atol=1e-11, rtol=0)


@pytest.mark.parametrize("config", ["pr606", "pr601", "all"])
def test_bfloat16_weights_and_autocast(config):
    tokens, expected = some_tokens(), expected_logits(config)
    with torch.no_grad():
        lowered = build(config, dtype=torch.bfloat16)(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = build(config)(tokens)
    assert relative_error(lowered, expected) < 0.1
    assert relative_error(mixed, expected) < 0.1
    model = build(config).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_bigram_hash_is_int32():
    """The products overflow 32 bits for large ids, and the submissions hash the wrapped values."""
    vocab, buckets = 65_000, 61
    tiny = env("PRESET=pr606 NUM_LAYERS=2 MODEL_DIM=8 NUM_HEADS=1 NUM_KV_HEADS=1 ROPE_DIMS=4 XSA_LAST_N=0")
    tiny |= env(f"VE_ENABLED=0 MLP_MULT=1 VOCAB_SIZE={vocab} BIGRAM_VOCAB_SIZE={buckets} BIGRAM_DIM=4")
    ids = [5, 64_999, 60_001, 64_000, 3, 59_999, 1_023, 1_022, 64_001, 64_321]
    unwrapped = [((36313 * b) ^ (27191 * a)) % (buckets - 1) for a, b in zip(ids, ids[1:], strict=False)]
    indices = reference_bigram_index(ids, buckets)
    assert set(indices[1:]) != set(unwrapped)
    shapes = reference_shapes(
        layers=2, dim=8, heads=1, kv_heads=1, mlp_hidden=8, vocab=vocab, bigram_buckets=buckets, bigram_dim=4
    )
    model = tg.GPT(settings(SMALL | tiny))
    model.load_state_dict({name: t.float() for name, t in random_state(shapes, seed=3).items()}, strict=True)
    used = model.bigram.embed.weight
    model(torch.tensor([ids]), torch.tensor([ids])).backward()
    assert set(used.grad.abs().sum(dim=1).nonzero().flatten().tolist()) == set(indices)


# ----------------------------------------------------------------------------------------------------------
# The script as a module
# ----------------------------------------------------------------------------------------------------------


def test_import_has_no_side_effects(tmp_path):
    """No print, no file, no CUDA, no setting of torch, and no look at the environment, here nonsense."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch; before = torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype()\n"
        "import train_gpt\n"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
        "assert before == (torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype())\n"
    )
    for mapping in (
        {},
        {"PRESET": "nonsense", "SEED": "x", "ITERATIONS": "-1", "WORLD_SIZE": "many", "DEVICE": "cuda"},
    ):
        done = subprocess.run(
            [sys.executable, "-B", "-c", code],
            cwd=tmp_path,
            env=mapping,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not list(tmp_path.iterdir())
