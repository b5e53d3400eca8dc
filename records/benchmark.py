"""How fast each stage of train_gpt.py is, measured on the script's own functions.

    python records/benchmark.py train --versus                the training step against a plain eager model
    python records/benchmark.py train --compile --dtype bf16  the same step under torch.compile
    python records/benchmark.py gptq --versus                 all matrices of pr606: calibration, clips, solve
    python records/benchmark.py eval --preset pr601 --set EVAL_STRIDE=128    any setting of the script
    python records/benchmark.py count --set NUM_LAYERS=9      what an H100 would move, on any machine
    python records/benchmark.py all --versus --json out.json  every stage, one table
    torchrun --standalone --nproc_per_node=2 records/benchmark.py muon         sharded over ranks

Every call is made once apart (warm-up, compilation), then in rounds that alternate between what is compared.
The table shows medians, the fastest and slowest round, matrix work as a share of what one large product of
that dtype reaches on this device, and each baseline's time over that of the row above it. Inputs are made up;
`data` alone looks for a corpus, and says when there is none.
"""
import runs as shared

import train_gpt as tg  # before the others: it says in one line which package is missing

# isort: split
import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import zstandard
from runs import ROOT, Mistake
from torch import Tensor, nn

POSITIONS = 62_000_000  # of the challenge's validation split, to which scoring is extrapolated
H100_BANDWIDTH = 3.35e12  # bytes a second
CODE_STD = 2.85  # in steps: what 31.7 M weights can afford per code under 16 MB
# The full presets' batches, cut to what a CPU does in seconds.
ON_CPU = {
    "train": {"TRAIN_SEQ_LEN": "1024", "TRAIN_BATCH_TOKENS": "4096"},
    "qat": {"TRAIN_SEQ_LEN": "1024", "TRAIN_BATCH_TOKENS": "4096"},
    "ttt": {"TTT_CHUNK_TOKENS": "4096", "TTT_BATCH_SEQS": "2", "EVAL_STRIDE": "512"},
}
# What a subcommand measures whatever the preset says: the costliest step rule, one stride.
OF_ITS_OWN = {"gptq": {"STEP_RULE": "clip", "STAGES": "quantize"}, "eval": {"EVAL_STRIDE": "64"},
              "gpucheck": {"TRAIN_BATCH_TOKENS": str(786_432 // 8)}}  # one of eight ranks' share


# ----------------------------------------------------------------------------------------------------------
# Measuring

@dataclasses.dataclass
class Work:
    """A call to time, its tokens and floating-point operations, how many such calls a row stands for."""

    run: Callable[[], object]
    tokens: float = 0
    flops: float = 0.0
    times: float = 1.0
    remark: str = ""


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, to the end of the device's work."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product, the best of several."""
    n, repeats = (8192, 10) if device.type == "cuda" else (2048, 4)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2e-12 * n ** 3 / min(seconds_of(lambda: a @ b, device) for _ in range(repeats))


def reset_peak(device: torch.device) -> None:
    """Watch the peak memory afresh; where the kernel does not allow that, it stays the process's peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Bench:
    """One subcommand's settings, and the rows and notes that it collects."""

    def __init__(self, name: str, args: argparse.Namespace, hp: tg.Hyperparameters, world: tg.World):
        self.name, self.args, self.hp, self.world = name, args, hp, world
        self.rows: list[dict] = []
        self.notes: list[str] = []
        self.rates: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.compiling = hp.compile == "1" or hp.compile == "auto" and world.device.type == "cuda"
        torch.manual_seed(hp.seed)

    def measure(self, work: dict[str, Work], dtype: torch.dtype | None = None) -> list[dict]:
        """Time calls against each other and add a row for each; later rows carry their ratio to the first."""
        world, names = self.world, list(work)
        first, peak, seconds = {}, {}, {name: [] for name in names}
        for name in names:
            reset_peak(world.device)
            first[name] = seconds_of(work[name].run, world.device)
            peak[name] = world.peak_memory()
        began = time.perf_counter()
        for i in range(self.args.repeats):
            for name in names[:: -1 if i % 2 else 1]:
                seconds[name].append(seconds_of(work[name].run, world.device))
            if world.max(time.perf_counter() - began) > self.args.seconds:
                break
        rows = []
        for name in names:
            item, median = work[name], statistics.median(seconds[name])
            low, middle, high = (s * item.times for s in (min(seconds[name]), median, max(seconds[name])))
            tflops = 1e-12 * item.flops / median if item.flops else None
            if tflops:
                rate = matrix_rate(world.device, dtype or world.dtype)
                self.rates[str(dtype or world.dtype)[6:]] = rate
            rows.append({
                "name": name, "median_s": middle, "min_s": low, "max_s": high, "repeats": len(seconds[name]),
                "first_s": first[name], "extrapolated_times": item.times, "tflops": tflops,
                "tokens_per_s": item.tokens / median if item.tokens else None,
                "matrix_share": tflops / rate if tflops else None, "peak_memory_bytes": peak[name],
                "ratio": middle / rows[0]["median_s"] if rows else None, "remark": item.remark})
        self.rows += rows
        return rows

    def report(self) -> dict:
        """What the JSON file holds."""
        return {"subcommand": self.name, "preset": self.hp.preset, "changed": tg.changed(self.hp),
                "dtype": str(self.world.dtype)[6:], "compiled": self.compiling,
                "hardware": self.world.hardware(), "matrix_tflops": self.rates, "rows": self.rows,
                "counts": self.counts, "notes": self.notes}


@contextlib.contextmanager
def stage_clock(device: torch.device, names: Iterable[str]) -> Iterator[dict[str, float]]:
    """Seconds that functions of train_gpt take inside the body, each without the others that it calls."""
    originals = {name: getattr(tg, name) for name in names if hasattr(tg, name)}
    seconds, inner = dict.fromkeys(originals, 0.0), [0.0]

    def timed(name: str) -> Callable:
        def call(*args, **kwargs):
            results = []
            inner.append(0.0)
            took = seconds_of(lambda: results.append(originals[name](*args, **kwargs)), device)
            seconds[name] += took - inner.pop()
            inner[-1] += took
            return results[0]
        return call
    try:
        for name in originals:
            setattr(tg, name, timed(name))
        yield seconds
    finally:
        for name, function in originals.items():
            setattr(tg, name, function)


def names_of(model: tg.GPT, group: str) -> list[str]:
    """The parameters of one of the optimisers' groups: matrix, embed or control."""
    return [name for name, role in model.roles().items() if tg.ROLES[role][0] == group]


def forward_flops(model: tg.GPT, T: int, output: float = 1.0) -> float:
    """Operations per token of a forward pass; `output` is the share of tokens that reach the output layer."""
    hp = model.hp
    matrices = sum(model.get_parameter(name).numel() for name in names_of(model, "matrix"))
    attention = 2 * hp.num_layers * hp.model_dim * T  # two products over T / 2 positions on average
    return 2 * (matrices + output * hp.vocab_size * hp.model_dim) + attention


def random_model(bench: Bench) -> tuple[tg.GPT, str]:
    """A model without zero matrices, so that all of it counts, and its attention kernel's name."""
    model = tg.GPT(bench.hp)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    kernel, attend = tg.choose_attention(bench.hp, bench.world)
    return model.to(bench.world.device).use(attend), kernel


# ----------------------------------------------------------------------------------------------------------
# The plain baselines: what a competent person writes first

def norm(x: Tensor) -> Tensor:
    """RMS norm in the dtype of x."""
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)


class PlainGPT:
    """The model of train_gpt.GPT in stock PyTorch operations, for eager use under autocast.

    F.rms_norm, RoPE tables made once, scaled_dot_product_attention on repeated key and value heads, all
    logits at once, F.cross_entropy. The stream has autocast's dtype, as in the submissions.
    """

    def __init__(self, hp: tg.Hyperparameters, state: dict[str, Tensor], dtype: torch.dtype):
        self.hp, self.dtype = hp, dtype
        self.w = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in state.items()}
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}

    def turn(self, x: Tensor) -> Tensor:
        """Partial RoPE on (B, T, H, d)."""
        hp, T = self.hp, x.size(1)
        if T not in self.tables:
            long = hp.rope_ntk_reference and T > hp.rope_ntk_reference
            stretch = (T / hp.rope_ntk_reference) ** (hp.rope_dims / (hp.rope_dims - 2)) if long else 1.0
            pairs = torch.arange(0, hp.rope_dims, 2, device=x.device) / hp.rope_dims
            angle = torch.outer(torch.arange(T, device=x.device), (hp.rope_base * stretch) ** -pairs)[:, None]
            self.tables[T] = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        (cos, sin), half = self.tables[T], hp.rope_dims // 2
        a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)

    def attention(self, layer: int, x: Tensor, ve: Tensor | None, v0: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> the attention's output and its raw V."""
        hp, w, at = self.hp, self.w, f"blocks.{layer}.attn."
        (B, T, D), H, G = x.shape, hp.num_heads, hp.num_kv_heads
        q, k, v = (F.linear(x, w[f"{at}c_{kind}.weight"]) for kind in "qkv")
        v = raw = (v if ve is None else v + ve).view(B, T, G, -1)
        if v0 is not None:
            mix = w[at + "vr_lambda"].to(v.dtype)
            v = mix[0] * v0 + mix[1] * v
        q = self.turn(norm(q.view(B, T, H, -1))) * w[at + "q_gain"].to(x.dtype)[:, None]
        k = self.turn(norm(k.view(B, T, G, -1)))
        k, v = (t.repeat_interleave(H // G, dim=2) for t in (k, v))
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
        if layer >= hp.num_layers - hp.xsa_last_n:
            direction = F.normalize(v, dim=-1).to(y.dtype)
            y = y - (y * direction).sum(-1, keepdim=True) * direction
        if hp.gated_attention:
            gate = F.linear(x, w[at + "attn_gate.weight"], w[at + "attn_gate.bias"])
            y = y * torch.sigmoid(gate)[..., None]
        return F.linear(y.reshape(B, T, D), w[at + "proj.weight"]), raw

    def embed(self, tokens: Tensor) -> Tensor:
        """Token and bigram embeddings, normed and smeared."""
        hp, w, dtype = self.hp, self.w, self.dtype
        x = F.embedding(tokens, w["tok_emb.weight"]).to(dtype)
        if hp.bigram_vocab_size:
            t = tokens.int()
            index = torch.full_like(t, hp.bigram_vocab_size - 1)
            index[:, 1:] = torch.bitwise_xor(36313 * t[:, 1:], 27191 * t[:, :-1]) % (hp.bigram_vocab_size - 1)
            pair = F.linear(F.embedding(index, w["bigram.embed.weight"]).to(dtype), w["bigram.proj.weight"])
            x = x + pair * w["bigram.scale"].to(dtype)
        x = norm(x)
        if hp.smear_gate:
            g = torch.sigmoid(w["smear.gate"]).to(dtype)
            previous = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
            if hp.smear_reset_at_bos:
                previous = previous * (tokens != tg.BOS)[..., None]
            x = (1 - g) * x + g * previous
        return x

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats; tokens, targets (B, T)."""
        hp, w, dtype = self.hp, self.w, self.dtype
        x = x0 = self.embed(tokens)
        v0, skips, encoder = None, [], hp.num_layers // 2
        if hp.ve_enabled:
            shared = F.embedding(tokens, w["ve_shared.embed.weight"]).to(dtype)
            shared = F.linear(shared, w["ve_shared.proj.weight"]) * w["ve_shared.scale"].to(dtype)
        for layer in range(hp.num_layers):
            at, ve = f"blocks.{layer}.", None
            if layer >= encoder and skips:
                x = x + w["skip_weights"][layer - encoder].to(dtype) * skips.pop()
            if hp.ve_enabled and layer in hp.ve_layers:
                ve = shared * w[f"ve_layer_scales.{hp.ve_layers.index(layer)}"].to(dtype)
            mix, scale = w[at + "resid_mix"].to(dtype), (layer + 1) ** -0.5 if hp.ln_scale else 1.0
            x = mix[0] * x + mix[1] * x0
            y, raw = self.attention(layer, norm(x) * scale, ve, v0)
            x = x + w[at + "attn_scale"].to(dtype) * y
            hidden = F.leaky_relu(F.linear(norm(x) * scale, w[at + "mlp.fc.weight"]), hp.mlp_slope).square()
            x = x + w[at + "mlp_scale"].to(dtype) * F.linear(hidden, w[at + "mlp.proj.weight"])
            if hp.value_residual and layer == 0:
                v0 = raw
            if layer < encoder:
                skips.append(x)
        logits = F.linear(norm(x), w["tok_emb.weight"]).flatten(0, 1)
        logits = hp.logit_softcap * torch.tanh(logits / hp.logit_softcap)
        return F.cross_entropy(logits.float(), targets.flatten())


def plain_muon(params: list[nn.Parameter], hp: tg.Hyperparameters) -> torch.optim.Optimizer:
    """PyTorch's own Muon, which takes one matrix after the other."""
    return torch.optim.Muon(params, lr=hp.matrix_lr, momentum=hp.muon_momentum, weight_decay=hp.muon_wd,
                            adjust_lr_fn="original")


class PlainTrainer:
    """A plain training step: micro-steps, clipping, torch's Muon, torch's AdamW."""

    def __init__(self, model: tg.GPT, world: tg.World):
        """Starts from the weights of a model, and leaves that alone."""
        hp = self.hp = model.hp
        self.world, self.model = world, PlainGPT(hp, dict(model.named_parameters()), world.dtype)
        of = lambda group: [self.model.w[name] for name in names_of(model, group)]
        groups = [dict(params=of("embed"), lr=hp.tied_embed_lr), dict(params=of("control"), lr=hp.scalar_lr)]
        self.optimisers = [plain_muon(of("matrix"), hp), torch.optim.AdamW(
            groups, betas=(0.9, hp.beta2), eps=1e-8, weight_decay=hp.adam_wd, fused=True)]

    def micro_step(self, x: Tensor, y: Tensor, share: float = 1.0) -> None:
        """Forward and backward."""
        with self.world.autocast():
            loss = self.model(x, y) * share
        loss.backward()

    def update(self) -> None:
        """Clip and step."""
        torch.nn.utils.clip_grad_norm_(self.model.w.values(), self.hp.grad_clip_norm or math.inf)
        for optimiser in self.optimisers:
            optimiser.step()

    def step(self, x: Tensor, y: Tensor, micro: int) -> None:
        """One update from a batch of sequences, `micro` at a time."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        for part_x, part_y in zip(x.split(micro), y.split(micro)):
            self.micro_step(part_x, part_y, len(part_x) / len(x))
        self.update()


def plain_gptq(weight: Tensor, hessian: Tensor, scales: Tensor, max_code: int, damp: float) -> Tensor:
    """GPTQ as in the paper: three factorisations, a loop over columns in blocks of 128; a matrix -> codes."""
    order = hessian.diagonal().argsort(descending=True)
    H, W = hessian[order][:, order].clone(), weight[:, order].clone()
    H.diagonal().add_(damp * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q = torch.zeros_like(W)
    for low in range(0, len(H), 128):
        high = min(low + 128, len(H))
        errors = torch.zeros_like(W[:, low:high])
        for j in range(low, high):
            Q[:, j] = torch.round(W[:, j] / scales).clamp(-max_code, max_code)
            errors[:, j - low] = (W[:, j] - Q[:, j] * scales) / U[j, j]
            W[:, j:high] -= errors[:, j - low, None] * U[j, j:high]
        W[:, high:] -= errors @ U[low:high, high:]
    return Q[:, order.argsort()]


@torch.no_grad()
def plain_evaluate(model: tg.GPT, tokens: Tensor, windows: list[tuple], world: tg.World) -> float:
    """Mean nats, one window after the other, with the logits of all its positions."""
    total = torch.zeros((), device=world.device)
    for start, end, first in windows:
        text = tokens[start: end + 1].long()
        with world.autocast():
            logits = model(text[None, :-1])[0]
        total += F.cross_entropy(logits[first - start:], text[1 + first - start:], reduction="sum")
    return total.item() / sum(end - first for _, end, first in windows)


# ----------------------------------------------------------------------------------------------------------
# The subcommands

def made_up_stepper(bench: Bench) -> tuple[tg.Stepper, tg.GPT]:
    """The script's own step on random tokens, and the model in it."""
    hp = bench.hp
    model, backend = random_model(bench)
    count = 3 * hp.train_batch_tokens + 1000
    tokens = np.random.default_rng(hp.seed).integers(hp.vocab_size, size=count).astype(np.uint16)
    bench.notes.append(f"{sum(p.numel() for p in model.parameters())} parameters, attention {backend}")
    return tg.Stepper(hp, model, tg.TokenStream([tokens]), bench.world, bench.compiling), model


def bench_train(bench: Bench) -> None:
    """Micro-step, optimiser and whole step."""
    hp, world = bench.hp, bench.world
    stepper, model = made_up_stepper(bench)
    flat, micro, T = stepper.flat, stepper.micro, hp.train_seq_len
    batch, flops = stepper.batch(), 3 * forward_flops(model, T)
    x, y = (t[:micro] for t in batch)
    plain = PlainTrainer(model, world) if bench.args.versus and world.size == 1 else None
    part = min(micro, max(32768 // T, 1)) if x.is_cuda else micro  # eager keeps more activations
    if plain:
        with world.autocast(), torch.no_grad():
            ours, theirs = model(x[:part], y[:part]).item(), plain.model(x[:part], y[:part]).item()
        if not math.isclose(ours, theirs, rel_tol=1e-4 if world.dtype == torch.float32 else 2e-3):
            raise tg.UserError(f"the plain model's loss is {theirs:.5f}, train_gpt.GPT's {ours:.5f}")
        bench.notes.append(f"loss on one micro-batch {ours:.5f}, plain {theirs:.5f}")

    def micro_step() -> None:
        with world.autocast():
            loss = stepper.model(x, y)
        loss.backward()

    def update() -> None:
        tg.clip_gradients(flat.grads, hp.grad_clip_norm)
        stepper.optimisers.step(1e-3, hp.muon_momentum)

    def compare(name: str, ours: Callable, theirs: Callable, sequences: int, remark: str, share: float = 1.0):
        """The row of ours; the plain call does a share of the sequences."""
        tokens = sequences * T
        work = {name: Work(ours, tokens * world.size, tokens * flops, remark=remark)}
        if plain:
            work[f"{name}, plain eager"] = Work(theirs, tokens * share, tokens * share * flops, 1 / share)
        return bench.measure(work)[0]

    one = compare("micro-step", micro_step, lambda: plain.micro_step(x[:part], y[:part]), micro,
                  f"{micro} x {T}", part / micro)
    optimiser = compare("optimiser", update, lambda: plain.update(), 0, "clip, Muon, AdamW")
    compare("step", lambda: stepper.step(1e-3, hp.muon_momentum, False), lambda: plain.step(*batch, part),
            len(batch[0]), f"{hp.train_batch_tokens} tokens, {-(-len(batch[0]) // micro)} micro-step(s)")
    full = tg.PRESETS[hp.preset].get("train_batch_tokens", tg.Hyperparameters.train_batch_tokens)
    if full != hp.train_batch_tokens:
        seconds = full / (micro * T) * one["median_s"] + optimiser["median_s"]
        bench.notes.append(f"a step of {full} tokens would take {seconds:.1f} s (extrapolated)")


def bench_muon(bench: Bench) -> None:
    """Muon alone on the model's matrices: stacked and sharded, against one matrix after the other."""
    hp, world = bench.hp, bench.world
    model = tg.GPT(hp)
    shapes = [model.get_parameter(name).shape for name in names_of(model, "matrix")]

    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.randn(shape, device=world.device)) for shape in shapes]
        for p in made:
            p.grad = torch.randn_like(p)
        return made
    squares = [(min(shape), max(shape)) for shape in shapes]
    flops = 5 * sum(4 * m * m * n + 2 * m ** 3 for m, n in squares)  # of Newton-Schulz's steps
    orthogonalise = partial(tg.newton_schulz, dtype=world.dtype, coefficients=hp.muon_coefficients)
    orthogonalise = tg.compiled(orthogonalise) if bench.compiling else orthogonalise
    muon = tg.Muon(parameters(), hp.matrix_lr, hp.muon_momentum, hp.muon_wd, hp.muon_row_norm,
                   hp.muon_equalise, world, orthogonalise)
    remark = f"{len(shapes)} matrices in {len(set(shapes))} stacks on {world.size} rank(s)"
    work = {"Muon": Work(muon.step, flops=flops / world.size, remark=remark)}
    if bench.args.versus:
        plain = plain_muon(parameters(), hp)
        work["torch.optim.Muon"] = Work(plain.step, flops=flops, remark="matrix by matrix, in bf16")
    bench.measure(work)


def bench_qat(bench: Bench) -> None:
    """A training step with fake quantisation against one without."""
    hp = bench.hp
    stepper, _ = made_up_stepper(bench)
    scale = 0.5 * hp.late_qat_threshold
    step = lambda qat_on: lambda: stepper.step(scale, hp.muon_momentum, qat_on)
    kind = "soft rounding" if hp.soft_round_qat else "straight-through"
    rows = bench.measure({"step without QAT": Work(step(False), hp.train_batch_tokens),
                          "step with QAT": Work(step(True), hp.train_batch_tokens, remark=kind)})
    bench.notes.append(f"QAT costs {100 * (rows[1]['ratio'] - 1):+.1f} % of a step")


def correlated_hessians(model: tg.GPT, device: torch.device) -> dict[str, Tensor]:
    """For every block matrix the Hessian of correlated inputs; q, k and v share theirs."""
    bases, shared, hessians = {}, {}, {}
    for name in model.max_codes("matrix"):
        key, n = name.replace("c_k", "c_q").replace("c_v", "c_q"), model.get_parameter(name).size(1)
        if n not in bases:
            x = torch.randn(2 * n, n, device=device)
            x += x @ torch.randn(n, n, device=device) * n ** -0.5
            bases[n] = x.mT @ x / len(x)
        if key not in shared:
            scale = torch.randn(n, device=device).mul_(0.4).exp_()
            shared[key] = bases[n] * scale * scale[:, None]
        hessians[name] = shared[key]
    return hessians


def gptq_flops(out: int, n: int) -> float:
    """Operations of a factorisation and its inverse, and of the error updates."""
    return 4 / 3 * n ** 3 + out * n * n


GPTQ_STAGES = {"search_scales": "clip search", "round_to_grid": "plain rounding", "prune_smallest": "pruning",
               "inverse_cholesky": "factorisation", "gptq": "column loop", "weighted_error": "error report",
               "quantize_model": "rest"}


def bench_gptq(bench: Bench) -> None:
    """Calibration, and the quantisation of the whole model; with a clip search, unless --set says other."""
    hp, world = bench.hp, bench.world
    model, _ = random_model(bench)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    hessians, max_codes = correlated_hessians(model, world.device), model.max_codes("matrix")
    quantise = lambda: tg.quantize_model(model, weights, hessians, world)
    shapes = [weights[name].shape for name in max_codes]
    remark = f"{len(shapes)} matrices, {sum(map(math.prod, shapes))} weights, steps by {hp.step_rule}"
    work = Work(quantise, flops=sum(gptq_flops(*shape) for shape in shapes) / world.size, remark=remark)
    solve = bench.measure({"quantise the model": work}, torch.float32)[0]
    with stage_clock(world.device, GPTQ_STAGES) as seconds:
        quantise()
    bench.notes.append("stages: " + ", ".join(f"{GPTQ_STAGES[key]} {s:.2f} s" for key, s in seconds.items()))
    count = hp.gptq_calib_sequences if world.device.type == "cuda" else min(8, hp.gptq_calib_sequences)
    tokens = np.random.default_rng(hp.seed).integers(hp.vocab_size, size=(count, hp.train_seq_len))
    calibrate = bench.measure({"calibrate": Work(
        lambda: tg.collect_hessians(model, tokens, world), tokens.size, times=hp.gptq_calib_sequences / count,
        remark=f"{hp.gptq_calib_sequences} x {hp.train_seq_len}, measured on {count}")})[0]
    bench.notes.append(f"calibration and quantisation {calibrate['median_s'] + solve['median_s']:.2f} s")
    if bench.args.versus:
        versus_column_loop(bench, weights, hessians, max_codes)


def versus_column_loop(bench: Bench, weights: dict, hessians: dict, max_codes: dict[str, int]) -> None:
    """Every shape's stack, scales given, against the plain loop on one of its matrices, extrapolated."""
    groups: dict[tuple, list[str]] = {}
    for name, max_code in max_codes.items():
        groups.setdefault((*weights[name].shape, max_code), []).append(name)
    totals, damp = [0.0, 0.0], 0.01
    for (out, n, max_code), names in groups.items():
        W, H = (torch.stack([tensors[name] for name in names]) for tensors in (weights, hessians))
        scales = tg.storable(tg.row_scales(W, max_code))
        batched = partial(tg.gptq, W, H, max_code, damp, scales)
        plain = partial(plain_gptq, W[0], H[0], scales[0], max_code, damp)
        ours, theirs = (tg.weighted_error(W[0], codes * scales[0][:, None], H[0]).item()
                        for codes in (batched().codes[0].float(), plain()))
        if not ours <= 1.02 * theirs:
            raise tg.UserError(f"gptq's weighted error is {ours:.6g}, the plain loop's {theirs:.6g}")
        rows = bench.measure({
            f"gptq {len(names)} x {out}x{n}": Work(batched, remark="scales given"),
            f"plain loop {out}x{n}": Work(plain, times=len(names),
                                          remark=f"extrapolated from 1 to {len(names)} matrices")})
        totals = [total + row["median_s"] for total, row in zip(totals, rows)]
    bench.notes.append(f"solving with given scales: {totals[0]:.2f} s, plain loop {totals[1]:.2f} s "
                       f"(extrapolated), ratio {totals[1] / totals[0]:.2f}")


def gaussian_tensors(hp: tg.Hyperparameters) -> dict[str, tg.QuantizedTensor | Tensor]:
    """A quantised model of the preset's shapes with Gaussian codes."""
    model = tg.GPT(hp)
    roles, matrices, tables = model.roles(), model.max_codes("matrix"), model.max_codes("embed")
    tensors = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    for name, max_code in (matrices | tables).items():
        noise = tensors[name]
        if name in matrices:
            steps = tg.storable(0.01 * torch.rand(len(noise)) + 0.01)
            q = tg.round_to_grid(CODE_STD * noise * steps.unsqueeze(-1), steps, max_code)
        else:
            q = tg.round_to_grid(noise, tg.storable(tg.row_scales(noise, max_code)), max_code)
        tensors[name] = dataclasses.replace(q, role=roles[name])
    return {name: t.half() if isinstance(t, Tensor) else t for name, t in tensors.items()}


def entropy_bytes(codes: list[Tensor]) -> float:
    """What an ideal order-0 coder needs for these int8 codes together."""
    counts = np.bincount(np.concatenate([c.numpy().ravel() for c in codes]).astype(np.int64) + 128)
    counts = counts[counts > 0].astype(np.float64)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def bench_pack(bench: Bench) -> None:
    """Packing and unpacking of Gaussian codes: seconds, and bytes against the entropy."""
    tensors = gaussian_tensors(bench.hp)
    kinds: dict[int, list[Tensor]] = {}
    parts, fp16 = [], []
    for t in tensors.values():
        if isinstance(t, tg.QuantizedTensor):
            kinds.setdefault(t.max_code, []).append(t.codes)
            parts.append(t.codes.numpy().tobytes())
        fp16.append((t.scales if isinstance(t, tg.QuantizedTensor) else t).half().numpy().tobytes())
    raw, entropy = sum(map(len, fp16)), sum(map(entropy_bytes, kinds.values()))
    blob = tg.pack({}, tensors)
    work = {"pack": Work(lambda: tg.pack({}, tensors), remark=f"{len(blob)} B")}
    if bench.args.versus:
        compress = lambda: zstandard.ZstdCompressor(level=22).compress(b"".join(parts + fp16))
        work["plain zstd -22"] = Work(compress, remark=f"{len(compress())} B, codes as int8")
    bench.measure(work)
    bench.measure({"unpack": Work(lambda: tg.unpack(blob))})
    limit = 1.007 * entropy + raw + 40_000
    bench.notes += [
        f"{sum(map(len, parts))} codes, entropy {entropy:.0f} B; fp16 {raw} B; file {len(blob)} B, without "
        f"the fp16 {(len(blob) - raw) / entropy:.4f} times the entropy",
        f"1.007 times the entropy, the fp16 and 40 kB make {limit:.0f} B: "
        f"{'kept' if len(blob) <= limit else 'EXCEEDED'}"]


def bench_eval(bench: Bench) -> None:
    """Scoring with windows side by side and sliding, against one window at a time."""
    hp, world, T = bench.hp, bench.world, bench.hp.eval_seq_len
    model, backend = random_model(bench)
    score_fn = tg.compiled(tg.token_losses) if bench.compiling else tg.token_losses
    batch_tokens = tg.scoring_batch_tokens(hp, world)
    count = (8 if world.device.type == "cuda" else 4) * batch_tokens // T * world.size
    for name, stride in (("side by side", T), ("sliding", hp.eval_stride)):
        tokens = torch.randint(hp.vocab_size, (T + count * stride + 1,), dtype=torch.int32).to(world.device)
        windows = tg.sliding_windows(len(tokens) - 1, T, stride)[1:]  # the first scores all that it reads
        ones = torch.ones(len(tokens) - 1, dtype=torch.uint8, device=world.device)
        score = partial(tg.evaluate, model, tokens, ones, windows, world, batch_tokens, score_fn=score_fn)
        plain, scored = partial(plain_evaluate, model, tokens, windows, world), count * stride
        flops = count * T / world.size
        work = {name: Work(score, scored, flops * forward_flops(model, T, stride / T),
                           remark=f"stride {stride} of {T}, {batch_tokens // T} windows at a time")}
        if bench.args.versus and world.size == 1:
            ours, theirs = score().val_loss, plain()
            if not math.isclose(ours, theirs, rel_tol=2e-3):
                raise tg.UserError(f"evaluate's loss is {ours:.6f}, one window at a time {theirs:.6f}")
            work[f"{name}, plain"] = Work(plain, scored, flops * forward_flops(model, T),
                                          remark="one window at a time, all logits")
        row = bench.measure(work)[0]
        seconds = POSITIONS / row["tokens_per_s"]
        bench.notes.append(f"{name}: {POSITIONS} positions would take {seconds:.0f} s "
                           f"(extrapolated from {scored})")
    bench.notes.append(f"attention {backend}")


def bench_ttt(bench: Bench) -> None:
    """Test-time training: scoring one chunk, training on it."""
    hp, world, size, T = bench.hp, bench.world, bench.hp.ttt_chunk_tokens, bench.hp.eval_seq_len
    model, _ = random_model(bench)
    score_fn = tg.compiled(tg.token_losses) if bench.compiling else tg.token_losses
    tokens = torch.randint(hp.vocab_size, (T + size + 1,), dtype=torch.int32).to(world.device)
    ones = torch.ones(len(tokens) - 1, dtype=torch.uint8, device=world.device)
    windows = tg.sliding_windows(T + size, T, hp.eval_stride)[1:]
    trainer = tg.ChunkTrainer(model, hp, world)
    batch_tokens = tg.scoring_batch_tokens(hp, world, size)
    score = partial(tg.evaluate, model, tokens, ones, windows, world, batch_tokens, hp.ttt_temperature,
                    score_fn)
    flops = len(windows) * T * forward_flops(model, T, hp.eval_stride / T) / world.size
    remark = f"{size} positions, stride {hp.eval_stride} of {T}"
    scoring = bench.measure({"score a chunk": Work(score, size, flops, remark=remark)})[0]
    training = bench.measure({"train on a chunk": Work(
        lambda: trainer.train(tokens, 0, size, 0, 2), size,
        remark=f"{hp.ttt_epochs} epochs of {hp.ttt_optimizer}, {trainer.trained} parameters")})[0]
    seconds = POSITIONS / size * (scoring["median_s"] + training["median_s"])
    bench.notes.append(f"{POSITIONS} positions would take {seconds:.0f} s at these settings (extrapolated)")


def first_step_seconds(command: list[str], env: dict[str, str], folder: str) -> float:
    """From the launch of a run to the line of its first step, where the run is ended."""
    start = time.perf_counter()
    text = {"encoding": "utf-8", "errors": "replace"}
    with subprocess.Popen(command, cwd=folder, env=env, **text, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        try:
            line = ""
            for line in process.stdout:
                if line.startswith("step:1/"):
                    return time.perf_counter() - start
        finally:
            process.kill()
    raise tg.UserError(f"the run ended before its first step: {line.strip()}")


def bench_start(bench: Bench) -> None:
    """Fresh processes: importing the script, and the time to a run's first step."""
    hp = bench.hp
    fresh = lambda code: lambda: subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    bench.measure({f"import {name}": Work(fresh(f"import {name}")) for name in ("train_gpt", "torch")})
    if not list((ROOT / hp.data_path).glob("fineweb_train_*.bin")):
        bench.notes.append(f"first step: skipped, no corpus in {hp.data_path} (see data/prepare.py)")
        return
    env = os.environ | {name.upper(): str(value) for name, value in tg.changed(hp).items()} | {
        "PRESET": hp.preset, "STAGES": "train", "RUN_ID": "", "DATA_PATH": str(ROOT / hp.data_path),
        "TOKENIZER_PATH": str(ROOT / hp.tokenizer_path)}
    command = [sys.executable, str(ROOT / "train_gpt.py")]

    def launch() -> None:
        with tempfile.TemporaryDirectory() as folder:
            first_step_seconds(command, env, folder)
    bench.measure({"launch to first step": Work(launch, remark=f"PRESET={hp.preset}")})


def bench_data(bench: Bench) -> None:
    """Reading shards, making batches, counting bytes, starting up."""
    hp, count = bench.hp, 10_000_000
    ids = np.random.default_rng(bench.hp.seed).integers(hp.vocab_size, size=count).astype("<u2")
    with tempfile.TemporaryDirectory() as folder:
        header = np.zeros(tg.SHARD_HEADER, "<i4")
        header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, count
        path = Path(folder) / "shard.bin"
        path.write_bytes(header.tobytes() + ids.tobytes())
        bench.measure({"read_shard": Work(lambda: tg.read_shard(path).max(), count, remark="every id once")})
        stream, rows = tg.TokenStream([tg.read_shard(path)]), hp.train_batch_tokens // hp.train_seq_len
        bench.measure({"TokenStream.step": Work(
            lambda: stream.step(hp.train_batch_tokens, hp.train_seq_len), hp.train_batch_tokens,
            remark=f"batches of {rows} x {hp.train_seq_len}")})
    if (ROOT / hp.tokenizer_path).is_file():
        byte_table = tg.ByteTable(tg.load_tokenizer(str(ROOT / hp.tokenizer_path), hp.vocab_size))
        tokens = torch.from_numpy(ids[:1_000_001].astype(np.int32))
        count_bytes = lambda: byte_table.count(tokens[:-1], tokens[1:])
        bench.measure({"ByteTable.count": Work(count_bytes, len(tokens) - 1)})
    else:
        bench.notes.append(f"byte table: skipped, no tokenizer {hp.tokenizer_path} (see data/prepare.py)")
    if not bench.args.no_start:
        bench_start(bench)


def bench_count(bench: Bench) -> None:
    """What one of eight ranks' step moves and launches on an H100."""
    import traffic  # the compiler's parts take a second and a half

    hp = bench.hp
    counted = traffic.count(hp, max(hp.train_batch_tokens // 8 // hp.train_seq_len, 1))
    bench.counts = dataclasses.asdict(counted)
    of_token = counted.saved / counted.tokens
    bench.notes += [
        f"{counted.tokens} tokens, forward and backward, compiled, in bf16, on an H100 that is not there",
        f"{counted.generated / 1e9:.1f} GB moved by {counted.launches} generated kernels "
        f"({counted.generated / H100_BANDWIDTH * 1e3:.0f} ms at the least)",
        f"{counted.extern / 1e9:.1f} GB moved by matrix products and attention",
        f"{counted.saved / 1e9:.2f} GB saved for the backward pass, {of_token:,.0f} bytes a token",
        f"{counted.graph_breaks} graph breaks"]


SUBCOMMANDS = {"train": bench_train, "muon": bench_muon, "qat": bench_qat, "gptq": bench_gptq,
               "pack": bench_pack, "eval": bench_eval, "ttt": bench_ttt, "data": bench_data,
               "count": bench_count}


# ----------------------------------------------------------------------------------------------------------
# The command line

def at_least_one(text: str) -> int:
    """A positive whole number."""
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def parser() -> shared.Parser:
    """The command line's grammar."""
    what, examples, how = __doc__.split("\n\n")
    made = shared.parser(f"{what}\n\n{how}", prog="benchmark.py", epilog=f"examples:\n{examples}")
    option = made.add_argument
    option("subcommand", choices=[*SUBCOMMANDS, "all"])
    option("--preset", choices=[*tg.PRESETS],
           help="sizes; default: pr606 on CUDA and for gptq, pack and count, else smoke; a CPU gets smaller "
                "batches")
    option("--repeats", type=at_least_one, default=5, help="rounds after the warm-up, default 5")
    option("--seconds", type=float, default=60.0, help="no further round after this long, default 60")
    choices = lambda name: tg.Hyperparameters.fields()[name].metadata["choices"]
    option("--device", choices=choices("device"), default="auto", help="default auto")
    option("--dtype", choices=choices("dtype"), default="auto", help="as the setting DTYPE")
    option("--compile", nargs="?", const="1", choices=choices("compile"), default="auto",
           help="compile the script's functions (never the plain ones); auto: on CUDA")
    option("--versus", action="store_true", help="also measure a straightforward baseline, if there is one")
    option("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting of train_gpt.py")
    option("--no-start", action="store_true", help="data: no fresh processes (import, launch to first step)")
    option("--json", type=Path, metavar="FILE", help="default logs/benchmark-SUBCOMMAND.json")
    return made


def settings_for(name: str, args: argparse.Namespace) -> tg.Hyperparameters:
    """The preset's settings, cut for a CPU or to a share, and the command line's over them."""
    cuda = args.device != "cpu" and torch.cuda.is_available()
    preset = args.preset or ("pr606" if cuda or name in ("gptq", "pack", "count") else "smoke")
    env = {"PRESET": preset, "DEVICE": args.device, "DTYPE": args.dtype, "COMPILE": args.compile}
    if not cuda and preset != "smoke":
        env |= ON_CPU.get(name, {})
    env |= OF_ITS_OWN.get(name, {})
    for pair in args.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise Mistake(f"--set {pair}: write NAME=VALUE")
        env[key] = value
    compilers = os.environ.get("CXX", "g++"), "g++", "clang++"
    if args.compile == "1" and not cuda and not any(map(shutil.which, compilers)):
        raise Mistake("--compile needs a C++ compiler (g++ or clang++)")
    try:
        return tg.Hyperparameters.from_env(env)
    except tg.UserError as error:
        raise Mistake("; ".join(str(error).splitlines())) from None


def table(reports: list[dict]) -> str:
    """Hardware, one line for each subcommand's settings, all rows under one head, all notes."""
    show = lambda value, form: "-" if value is None else format(value, form)
    lines = [("", "", "median", "fastest..slowest", "n", "first", "tokens/s", "TFLOP/s", "share", "MiB",
              "ratio", "")]
    heads, notes = [reports[0]["hardware"]], []
    for report in reports:
        name, rates = report["subcommand"], report["matrix_tflops"].items()
        mode = "compiled" if report["compiled"] else "eager"
        heads.append(f"{name}: preset {report['preset']}, {report['dtype']}, {mode}" + "".join(
            f", matrix product in {dtype} {rate:.3g} TFLOP/s" for dtype, rate in rates))
        notes += [f"{name}: {note}" for note in report["notes"]]
        for row in report["rows"]:
            unit, factor = ("ms", 1e3) if row["median_s"] < 1 else ("s", 1.0)
            lines.append((
                name, row["name"], f"{row['median_s'] * factor:.2f} {unit}",
                f"{row['min_s'] * factor:.2f}..{row['max_s'] * factor:.2f}", str(row["repeats"]),
                f"{row['first_s']:.1f} s", show(row["tokens_per_s"], ",.0f"), show(row["tflops"], ".3f"),
                show(row["matrix_share"], ".1%"), f"{row['peak_memory_bytes'] / 2 ** 20:.0f}",
                show(row["ratio"], ".2f"), row["remark"]))
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [[cell.ljust(w) if i in (0, 1, len(line) - 1) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths))] for line in lines]
    return "\n".join([*heads, "", *("  ".join(line).rstrip() for line in aligned), "", *notes])


def run(args: argparse.Namespace, arguments: list[str]) -> None:
    """Measure, print, write."""
    names = [*SUBCOMMANDS] if args.subcommand == "all" else [args.subcommand]
    settings = {name: settings_for(name, args) for name in names}
    path = args.json or Path("logs") / f"benchmark-{args.subcommand}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    world, reports = tg.World(settings[names[0]], os.environ), []
    tg.choose_dtype(settings[names[0]], world)
    for name, hp in settings.items():
        bench = Bench(name, args, hp, world)
        SUBCOMMANDS[name](bench)
        reports.append(bench.report())
    if world.rank == 0:
        result = reports[0] if len(names) == 1 else {"subcommand": "all", "reports": reports}
        command = " ".join(["python records/benchmark.py", *arguments])
        print(table(reports))
        shared.write_atomically(path, json.dumps({"command": command} | result, indent=1).encode())
        print(f"written to {path}")
    if world.grouped:
        tg.dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return shared.exit_status(lambda: run(parser().parse_args(arguments), arguments))


if __name__ == "__main__":
    sys.exit(main())
