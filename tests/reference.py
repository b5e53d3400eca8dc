"""Slow, plain restatements of what train_gpt.py computes, to compare it with.

Everything here is float64 and as close to the formulas on paper as code can be: one sequence, one layer, one
head, one query position at a time. Nothing of the script is used. The forward pass is made of differentiable
torch operations, so gradients come from autograd; what needs no gradient is NumPy.

`hp` is any object with the settings as attributes, under their environment names in lower case.
"""

import math

import numpy as np
import torch
from conftest import draw

BOS = 1
EPS32 = float(torch.finfo(torch.float32).eps)
EPS64 = float(torch.finfo(torch.float64).eps)


# ----------------------------------------------------------------------------------------------------------
# The model's parameters
# ----------------------------------------------------------------------------------------------------------


# The techniques of the model, by the setting that switches each off, whose formulas stand below.
TECHNIQUES = {
    "xsa_last_n", "ln_scale", "smear_gate", "smear_reset_at_bos", "bigram_vocab_size", "ve_enabled",
    "value_residual", "gated_attention", "sparse_attn_gate_enabled", "num_loops", "skip_gates_enabled",
    "parallel_start_layer", "document_mask",
}  # fmt: skip


def reference_order(hp, looping):
    """The layers one after another."""
    order = list(range(hp.num_layers))
    if looping and hp.num_loops:
        loop = order[hp.loop_start : hp.loop_end + 1]
        order = order[: hp.loop_start] + loop * (1 + hp.num_loops) + order[hp.loop_end + 1 :]
    return order


def reference_shapes(hp):
    """Name and shape of every tensor in a saved model, as the two submissions name them."""
    layers, dim, heads, vocab = hp.num_layers, hp.model_dim, hp.num_heads, hp.vocab_size
    kv_dim, hidden = dim // heads * hp.num_kv_heads, int(hp.mlp_mult * dim)
    skips = len(reference_order(hp, True)) // 2
    shapes = {"tok_emb.weight": (vocab, dim), "skip_weights": (skips, dim)}
    if hp.skip_gates_enabled:
        shapes["skip_gates"] = (skips, dim)
    if hp.parallel_start_layer:
        shapes["parallel_post_lambdas"] = (layers, 2, 2)
        shapes["parallel_resid_lambdas"] = (layers, 2)
    if hp.smear_gate == "vector":
        shapes["smear.gate"] = (dim,)
    if hp.smear_gate == "token":
        shapes |= {"smear_gate.weight": (1, 12), "smear_lambda": (1,)}
    if hp.bigram_vocab_size:
        shapes["bigram.embed.weight"] = (hp.bigram_vocab_size, hp.bigram_dim)
        shapes["bigram.proj.weight"] = (dim, hp.bigram_dim)
        shapes["bigram.scale"] = ()
    if hp.ve_enabled:
        shapes["ve_shared.embed.weight"] = (vocab, hp.ve_dim)
        shapes["ve_shared.proj.weight"] = (kv_dim, hp.ve_dim)
        shapes["ve_shared.scale"] = ()
        shapes |= {f"ve_layer_scales.{i}": (1,) for i in range(len(hp.ve_layers))}
    block = {
        "attn_scale": (dim,),
        "mlp_scale": (dim,),
        "resid_mix": (2, dim),
        "attn.c_q.weight": (dim, dim),
        "attn.c_k.weight": (kv_dim, dim),
        "attn.c_v.weight": (kv_dim, dim),
        "attn.proj.weight": (dim, dim),
        "attn.q_gain": (heads,),
        "mlp.fc.weight": (hidden, dim),
        "mlp.proj.weight": (dim, hidden),
    }
    if hp.value_residual:
        block["attn.vr_lambda"] = (2,)
    if hp.gated_attention:
        block["attn.attn_gate.weight"] = (heads, dim)
        block["attn.attn_gate.bias"] = (heads,)
    if hp.sparse_attn_gate_enabled:
        block["attn.attn_gate_w"] = (heads, 12)
    return shapes | {f"blocks.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}


def random_state(shapes, seed=0):
    """Random float64 values for every tensor, by its name, none of them at a neutral value such as 0 or 1."""
    state = {}
    for name, shape in shapes.items():
        noise = draw(name, shape, seed).double()
        if name == "tok_emb.weight" or "embed" in name or name.endswith(("smear.gate", "attn_gate.bias")):
            state[name] = noise
        elif name.endswith(".weight"):
            state[name] = noise / math.sqrt(shape[1])
        else:
            state[name] = 0.8 + 0.4 * noise
    return state


# ----------------------------------------------------------------------------------------------------------
# The forward pass
# ----------------------------------------------------------------------------------------------------------


def reference_rms_norm(x, eps):
    """x / sqrt(mean(x^2) + eps) over the last dimension."""
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)


def wrap_int32(value):
    """The value that a 32-bit two's complement register would hold."""
    return (value + 2**31) % 2**32 - 2**31


def reference_bigram_index(ids, buckets):
    """Bucket of each position: the last one at position 0, else the hash of this and the previous token."""
    indices = [buckets - 1]
    for i in range(1, len(ids)):
        mixed = wrap_int32(36313 * ids[i]) ^ wrap_int32(27191 * ids[i - 1])
        indices.append(mixed % (buckets - 1))
    return indices


def reference_rotary(x, base, rope_dims):
    """Rotate pairs (j, j + rope_dims/2) of each row of x (T, head_dim) by position * base^(-2j/rope_dims)."""
    half = rope_dims // 2
    angles = [[t * base ** (-2.0 * j / rope_dims) for j in range(half)] for t in range(len(x))]
    cos = torch.tensor([[math.cos(angle) for angle in row] for row in angles], dtype=torch.float64)
    sin = torch.tensor([[math.sin(angle) for angle in row] for row in angles], dtype=torch.float64)
    x1, x2 = x[:, :half], x[:, half:rope_dims]
    return torch.cat([x1 * cos + x2 * sin, -x1 * sin + x2 * cos, x[:, rope_dims:]], dim=1)


def reference_rope_base(hp, length):
    """The base for a window of `length` tokens: stretched when it is longer than the reference length."""
    reference, d = hp.rope_ntk_reference, hp.rope_dims
    if reference and length > reference:
        return hp.rope_base * (length / reference) ** (d / (d - 2))
    return hp.rope_base


def reference_begins(ids, longest):
    """For each position the first one of its segment; longest None: the row is one."""
    begins = []
    for t, token in enumerate(ids):
        fresh = t == 0 or longest and (token == BOS or t - begins[-1] == longest)
        begins.append(t if fresh else begins[-1])
    return begins


def reference_head(q, k, v, begins):
    """Causal attention of one head from each position's begin on: q, k, v (T, head_dim)."""
    rows = []
    for t, begin in enumerate(begins):
        scores = k[begin : t + 1] @ q[t] / math.sqrt(q.shape[1])
        weights = torch.exp(scores - scores.max())
        rows.append(weights / weights.sum() @ v[begin : t + 1])
    return torch.stack(rows)


def _attention(state, hp, layer, a, value_embedding, first_value, eps, begins):
    """Attention of one block on its normed, scaled input a (T, D): (output, this layer's raw V)."""
    name = f"blocks.{layer}.attn."
    heads, kv_heads = hp.num_heads, hp.num_kv_heads
    head_dim = hp.model_dim // heads
    group = heads // kv_heads
    base = reference_rope_base(hp, a.shape[0])

    q = a @ state[name + "c_q.weight"].T
    k = a @ state[name + "c_k.weight"].T
    v = a @ state[name + "c_v.weight"].T
    if hp.ve_enabled and layer in hp.ve_layers:
        v = v + value_embedding * state[f"ve_layer_scales.{hp.ve_layers.index(layer)}"]
    raw_v = v
    if hp.value_residual and layer > 0:
        lam = state[name + "vr_lambda"]
        v = lam[0] * first_value + lam[1] * v

    outputs = []
    for h in range(heads):
        g = h // group
        q_h = reference_rms_norm(q[:, h * head_dim : (h + 1) * head_dim], eps)
        k_g = reference_rms_norm(k[:, g * head_dim : (g + 1) * head_dim], eps)
        v_g = v[:, g * head_dim : (g + 1) * head_dim]
        q_h = reference_rotary(q_h, base, hp.rope_dims) * state[name + "q_gain"][h]
        k_g = reference_rotary(k_g, base, hp.rope_dims)
        y = reference_head(q_h, k_g, v_g, begins)
        if layer >= hp.num_layers - hp.xsa_last_n:
            v_hat = v_g / torch.clamp(torch.sqrt((v_g * v_g).sum(dim=-1, keepdim=True)), min=1e-12)
            y = y - (y * v_hat).sum(dim=-1, keepdim=True) * v_hat
        if hp.gated_attention:
            z = a @ state[name + "attn_gate.weight"][h] + state[name + "attn_gate.bias"][h]
            y = y / (1 + torch.exp(-z))[:, None]
        if hp.sparse_attn_gate_enabled:
            z = 0.5 * (a[:, :12] @ state[name + "attn_gate_w"][h])
            y = y / (1 + torch.exp(-z))[:, None]
        outputs.append(y)
    return torch.cat(outputs, dim=1) @ state[name + "proj.weight"].T, raw_v


def _mlp(state, hp, layer, a):
    h = a @ state[f"blocks.{layer}.mlp.fc.weight"].T
    h = torch.where(h > 0, h, hp.mlp_slope * h)
    return (h * h) @ state[f"blocks.{layer}.mlp.proj.weight"].T


def _embed(state, hp, ids, eps):
    x = state["tok_emb.weight"][ids]
    if hp.bigram_vocab_size:
        rows = state["bigram.embed.weight"][reference_bigram_index(ids, hp.bigram_vocab_size)]
        x = x + rows @ state["bigram.proj.weight"].T * state["bigram.scale"]
    if hp.smear_gate == "token":
        rows = [x[0]]
        for t in range(1, len(ids)):
            share = 1 / (1 + torch.exp(-(state["smear_gate.weight"][0] @ x[t, :12])))
            rows.append(x[t] + (ids[t] != BOS) * state["smear_lambda"] * share * x[t - 1])
        x = torch.stack(rows)
    x = reference_rms_norm(x, eps)
    if hp.smear_gate == "vector":
        g = 1 / (1 + torch.exp(-state["smear.gate"]))
        smeared = []
        for t in range(len(ids)):
            reset = t == 0 or (hp.smear_reset_at_bos and ids[t] == BOS)
            previous = torch.zeros_like(x[t]) if reset else x[t - 1]
            smeared.append((1 - g) * x[t] + g * previous)
        x = torch.stack(smeared)
    return x


def _sequence_logits(state, hp, ids, eps, looping, longest):
    x = x0 = _embed(state, hp, ids, eps)
    value_embedding = None
    if hp.ve_enabled:
        rows = state["ve_shared.embed.weight"][ids]
        value_embedding = rows @ state["ve_shared.proj.weight"].T * state["ve_shared.scale"]
    order = reference_order(hp, looping)
    encoder = len(order) // 2
    stack, first_value, other = [], None, None
    for position, layer in enumerate(order):
        name = f"blocks.{layer}."
        if hp.parallel_start_layer and layer == hp.parallel_start_layer:
            other = x  # the second lane
        if position >= encoder and stack:
            added = state["skip_weights"][position - encoder] * stack.pop()
            if hp.skip_gates_enabled:
                g = 1 / (1 + torch.exp(-state["skip_gates"][position - encoder]))
                x = g * x + (1 - g) * added
            else:
                x = x + added
        ln_scale = 1 / math.sqrt(layer + 1) if hp.ln_scale else 1.0
        mix = state[name + "resid_mix"]
        u = mix[0] * x + mix[1] * x0
        a = reference_rms_norm(u, eps) * ln_scale
        begins = reference_begins(ids, longest)
        attended, raw_v = _attention(state, hp, layer, a, value_embedding, first_value, eps, begins)
        if first_value is None:
            first_value = raw_v
        attended = state[name + "attn_scale"] * attended
        h = u + attended if other is None else other
        moved = state[name + "mlp_scale"] * _mlp(state, hp, layer, reference_rms_norm(h, eps) * ln_scale)
        if other is None:
            x = h + moved
        else:
            r, p = state["parallel_resid_lambdas"][layer], state["parallel_post_lambdas"][layer]
            x, other = (
                r[j] * lane + p[0, j] * attended + p[1, j] * moved for j, lane in ((0, x), (1, other))
            )
        if position < encoder:
            stack.append(x)
    x = x if other is None else (x + other) / 2
    z = reference_rms_norm(x, eps) @ state["tok_emb.weight"].T
    return hp.logit_softcap * torch.tanh(z / hp.logit_softcap)


def reference_logits(state_dict, hp, tokens, eps=EPS64, looping=True, longest=None):
    """Soft-capped logits (B, T, V) in float64 for tokens (B, T); eps is that of the RMS norms.

    longest: attention stays inside documents, and inside pieces of so many tokens of one.
    A model in float32 or bfloat16 adds the machine epsilon of float32: compare it with eps=EPS32.
    """
    state = {name: tensor.double() for name, tensor in state_dict.items()}
    rows = torch.as_tensor(tokens).tolist()
    return torch.stack([_sequence_logits(state, hp, ids, eps, looping, longest) for ids in rows])


def reference_cross_entropy(logits, targets):
    """Mean in nats; logits (B, T, V), targets (B, T)."""
    total = 0.0
    for z, target in zip(logits.flatten(0, 1), torch.as_tensor(targets).flatten().tolist(), strict=True):
        total = total + z.max() + torch.log(torch.exp(z - z.max()).sum()) - z[target]
    return total / torch.as_tensor(targets).numel()


def reference_loss(state_dict, hp, tokens, targets, eps=EPS64):
    """Mean cross-entropy in nats."""
    return reference_cross_entropy(reference_logits(state_dict, hp, tokens, eps), targets)


# ----------------------------------------------------------------------------------------------------------
# Optimisers and schedules
# ----------------------------------------------------------------------------------------------------------


JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def reference_newton_schulz(matrix, steps=5, coefficients=JORDAN):
    """Five quintic steps towards the nearest semi-orthogonal matrix, one matrix, float64."""
    x = matrix.double()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (torch.sqrt((x * x).sum()) + 1e-7)
    for a, b, c in coefficients[:steps]:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def reference_muon_step(
    param, grad, buffer, lr, momentum, weight_decay, row_norm=False, equalise=False, coefficients=JORDAN
):
    """(new parameter, new momentum buffer) of one matrix after one step, float64."""
    buffer = momentum * buffer.double() + grad.double()
    update = grad.double() + momentum * buffer
    if equalise:
        for i in range(len(update)):
            update[i] = update[i] / max(float(torch.sqrt((update[i] ** 2).sum())), 1e-7)
    update = reference_newton_schulz(update, coefficients=coefficients)
    rows, columns = update.shape
    update = update * math.sqrt(max(1.0, rows / columns))
    if row_norm:
        for i in range(rows):
            update[i] = update[i] / max(float(torch.sqrt((update[i] ** 2).sum())), 1e-7)
    return param.double() * (1 - lr * weight_decay) - lr * update, buffer


def reference_lr_scale(step, elapsed_seconds, iterations, warmdown_iters, max_wallclock_seconds):
    """Linear decay to zero over the last warmdown_iters steps before clock or steps end the run.

    Where that would be more than the whole run, over the last 60 % of it.
    """
    total = iterations
    if max_wallclock_seconds > 0 and elapsed_seconds > 0:
        total = min(total, max_wallclock_seconds / (elapsed_seconds / step))
    if warmdown_iters > total:
        warmdown_iters = 0.6 * total
    return min(1.0, max(total - step, 0) / warmdown_iters)


def reference_ema(values, decay):
    """Mean of the values after values[0], the start, each with a weight that fades by decay a step."""
    weights = [decay ** (len(values) - 1 - i) for i in range(1, len(values))]
    total = sum(w * np.asarray(value, dtype=np.float64) for w, value in zip(weights, values[1:]))
    return total / sum(weights)


def reference_swa(values):
    """Arithmetic mean."""
    return sum(np.asarray(value, dtype=np.float64) for value in values) / len(values)


# ----------------------------------------------------------------------------------------------------------
# Quantisation
# ----------------------------------------------------------------------------------------------------------


def reference_soft_round(y, alpha):
    """floor(y) + 1/2 + tanh(alpha r) / (2 tanh(alpha/2)), r = y - floor(y) - 1/2; differentiable in y."""
    floor = torch.floor(y.detach())
    r = y - floor - 0.5
    return floor + 0.5 + 0.5 * torch.tanh(alpha * r) / (math.tanh(alpha / 2) + 1e-10)


def reference_round(weight, scales, max_code):
    """Codes of plain rounding, one scale per row."""
    weight, scales = np.asarray(weight, dtype=np.float64), np.asarray(scales, dtype=np.float64)
    return np.clip(np.round(weight / scales[:, None]), -max_code, max_code)


def reference_gptq(weight, hessian, scales, max_code, damp=0.01, descending=True, columns=0.0):
    """Codes (out, in): Frantar et al. 2023, algorithm 1, one column at a time.

    A step is its row's scale times its column's 2 ** (columns / 8).
    """
    work = torch.as_tensor(weight).double().numpy().copy()
    curvature = torch.as_tensor(hessian).double().numpy().copy()
    scales = np.asarray(scales, dtype=np.float64)
    units = 2 ** (np.broadcast_to(columns, work.shape[1]).astype(np.float64) / 8)
    diagonal = np.diag(curvature).copy()
    order = np.argsort(-diagonal if descending else diagonal, kind="stable")
    dead = diagonal == 0  # inputs that were always zero: their weights do not matter
    curvature[dead, dead] = diagonal.mean()
    work[:, dead] = 0.0
    curvature = curvature + damp * diagonal.mean() * np.eye(len(diagonal))
    inverse = np.linalg.inv(curvature[np.ix_(order, order)])
    upper = np.linalg.cholesky((inverse + inverse.T) / 2).T  # inverse = upperᵀ upper
    work = work[:, order]
    codes = np.zeros_like(work)
    for j in range(work.shape[1]):
        steps = scales * units[order[j]]
        codes[:, j] = np.clip(np.round(work[:, j] / steps), -max_code, max_code)
        error = (work[:, j] - codes[:, j] * steps) / upper[j, j]
        for k in range(j + 1, work.shape[1]):
            work[:, k] -= error * upper[j, k]
    result = np.zeros_like(codes)
    result[:, order] = codes
    return result


def hessian_error(weight, quantised, hessian):
    """Mean over rows of d H dᵀ, d the rounding error: the squared error of the layer's outputs."""
    d = np.asarray(weight, dtype=np.float64) - np.asarray(quantised, dtype=np.float64)
    return float(np.einsum("oi,ij,oj->o", d, np.asarray(hessian, dtype=np.float64), d).mean())


# ----------------------------------------------------------------------------------------------------------
# Scoring
# ----------------------------------------------------------------------------------------------------------


def reference_bytes(sp, previous, target):
    """Bytes that one target token stands for, given the token before it."""

    def is_boundary(token):
        return sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token)

    if is_boundary(target):
        return 0
    if sp.is_byte(target):
        return 1
    piece = sp.id_to_piece(target)
    leading_space = piece.startswith("\u2581")
    count = len((piece[1:] if leading_space else piece).encode("utf-8"))
    return count + (1 if leading_space and not is_boundary(previous) else 0)


def reference_windows(positions, seq_len, stride):
    """(start, end, first scored): a full window, then one every `stride`, the last one cut at the end."""
    windows, start, scored = [], 0, 0
    while scored < positions:
        end = min(start + seq_len, positions)
        windows.append((start, end, scored))
        scored, start = end, start + stride
    return windows


def reference_nats(z, target):
    """Cross-entropy of one row of logits."""
    return z.max() + np.log(np.exp(z - z.max()).sum()) - z[target]


def reference_temperature(z, low):
    """Logits of one position over T = clamp(1 - (1 - low)(1 - H / ln V), 0.9, 1.05), H their entropy."""
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    return z / min(max(1 - (1 - low) * (1 - entropy / math.log(len(z))), 0.9), 1.05)


def reference_sliding(logits_fn, tokens, seq_len, stride, windows=None, temperature=1.0):
    """Nats of every position 0..len(tokens)-2: position i is scored on tokens[i + 1].

    logits_fn takes a 1-D array of token ids and returns logits (T, V). Where the length is not a whole number
    of strides, the last windows may be laid out in more than one way: `windows` are those to use.
    """
    tokens = np.asarray(tokens)
    positions = len(tokens) - 1
    nats = np.full(positions, np.nan)
    for start, end, first in windows or reference_windows(positions, seq_len, stride):
        logits = np.asarray(logits_fn(tokens[start:end]), dtype=np.float64)
        for i in range(first, end):
            assert np.isnan(nats[i]), "scored twice"
            nats[i] = reference_nats(reference_temperature(logits[i - start], temperature), tokens[i + 1])
    assert not np.isnan(nats).any(), "a position was left out"
    return nats
