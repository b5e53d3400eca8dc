"""train_gpt.py: tokenised text in, a scored language model of at most 16,000,000 bytes out.

An 11-layer GPT for OpenAI's Parameter Golf challenge, after submissions #606 (int5 GPTQ, soft-round QAT) and
#601 (value residual, gated attention, late QAT). One run trains with Muon and AdamW, averages the weights,
hardens them for rounding, quantises them with GPTQ, packs them into one file, throws the model away, loads the
file and scores it on the validation split with sliding windows and score-first test-time training.

    python train_gpt.py                                              one process: CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py            8xH100, PRESET=pr606 (the default)
    PRESET=smoke python train_gpt.py                                 two CPU cores, a few minutes
    ARTIFACT=logs/RUN/artifact.bin STAGES=evaluate python train_gpt.py     score an artifact, nothing else
    python train_gpt.py --help                                       every setting, its meaning, the presets

Settings are environment variables. A run writes logs/<RUN_ID>/: log.txt, metrics.jsonl, result.json, model.pt,
artifact.bin, and checkpoint.pt while it trains.

Contents, in the order the data flows
     1 Hyperparameters        6 Scoring             11 GPTQ
     2 Processes and log      7 Optimisers          12 Packing
     3 Data                   8 Averaging           13 Test-time training
     4 Integer grid           9 QAT                 14 Main
     5 Model                 10 Training

Shapes: B batch, T tokens, D width, H heads, V vocabulary, L layers.
"""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import heapq
import io
import json
import math
import os
import platform
import random
import shutil
import signal
import struct
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

try:
    import numpy as np
    import sentencepiece
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    import zstandard
    from torch import Tensor, nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as missing:  # a silent fallback from zstd to zlib has put artifacts over the cap
    raise SystemExit(f"error: {missing}; run `pip install -r requirements.txt`, or use ./run.sh") from None


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: printed as it stands, without a traceback."""


# ----------------------------------------------------------------------------------------------------------
# 1 Hyperparameters
#
# One frozen dataclass. The defaults are #606's run; the other presets list only what differs. The environment
# goes over the preset, the preset over the default, and every mistake is reported at once, because a misspelt
# name that is silently ignored makes a run that was not what it said.

PRESETS: dict[str, dict[str, object]] = {
    "pr606": {},
    "pr601": dict(
        num_kv_heads=4, mlp_mult=3.0, mlp_slope=0.0, rope_ntk_reference=0, xsa_last_n=4, bigram_vocab_size=1024,
        ve_enabled=False, value_residual=True, gated_attention=True,
        iterations=9500, max_wallclock_seconds=0.0, train_batch_tokens=524288, train_seq_len=1024,
        muon_row_norm=True, late_qat_threshold=0.15, soft_round_qat=False,
        attn_bits=6, prune_pct=0.0, eval_seq_len=1024, eval_stride=128, skip_sliding=False,
        ttt_enabled=False, ttt_optimizer="sgd", ttt_lr=0.002, ttt_epochs=2, ttt_chunk_tokens=32768,
        ttt_batch_seqs=1, ttt_params="control", ttt_schedule="chunk", ttt_temperature=1.0,
    ),
    "smoke": dict(
        data_path="./data/datasets/sotu_sp4096", tokenizer_path="./data/tokenizers/sotu_4096_bpe.model",
        train_log_every=50, val_loss_every=0,
        vocab_size=4096, num_layers=3, model_dim=128, num_heads=2, num_kv_heads=1, mlp_mult=3.0, xsa_last_n=3,
        rope_ntk_reference=0, smear_reset_at_bos=True, bigram_vocab_size=2048, bigram_dim=64, ve_dim=64,
        ve_layers=(1, 2), value_residual=True, gated_attention=True,
        iterations=850, max_wallclock_seconds=0.0, warmup_steps=2, warmdown_iters=660,
        train_batch_tokens=4096, train_seq_len=256, muon_momentum=0.95, muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=100, ema_decay=0.98, late_qat_threshold=0.15, soft_round_alpha=8.0,
        gptq_calib_sequences=128, eval_seq_len=256, eval_stride=64, skip_sliding=False,
        ttt_optimizer="sgd", ttt_momentum=0.0, ttt_lr=0.1, ttt_epochs=2, ttt_chunk_tokens=512, ttt_batch_seqs=2,
        ttt_params="all", ttt_schedule="constant", ttt_temperature=0.99,
    ),
}

STAGES = ("train", "quantize", "evaluate")
CHOICES = {
    "device": ("auto", "cuda", "cpu"), "dtype": ("auto", "bf16", "fp32"), "compile": ("auto", "0", "1"),
    "attention": ("auto", "fa3", "sdpa"), "averaging": ("ema", "swa", "none"),
    "quantizer": ("gptq", "gptq_lite", "rtn"), "ttt_optimizer": ("adamw", "sgd"),
    "ttt_params": ("blocks", "control", "control_qk", "all"), "ttt_schedule": ("run", "chunk", "constant"),
}
AT_LEAST_ONE = (
    "vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "iterations",
    "train_batch_tokens", "train_seq_len", "eval_seq_len", "train_log_every", "muon_backend_steps", "swa_every",
    "gptq_calib_sequences", "ttt_epochs", "ttt_chunk_tokens", "ttt_batch_seqs", "artifact_limit", "bigram_dim",
    "ve_dim", "val_batch_size", "rope_base",
)
# Names of the submissions for settings that have another name here. A table of values maps a switch.
ALIASES: dict[str, str | dict[str, tuple[str, str]]] = {
    "BIGRAM_BUCKETS": "bigram_vocab_size", "XSA_LAYERS": "xsa_last_n", "PARTIAL_ROPE_DIMS": "rope_dims",
    "WEIGHT_DECAY_MUON": "muon_wd", "WEIGHT_DECAY_ADAM": "adam_wd", "QUANT_BITS": "attn_bits",
    "SGD_TTT_LR": "ttt_lr", "SGD_TTT_MOMENTUM": "ttt_momentum", "SGD_TTT_EPOCHS": "ttt_epochs",
    "SGD_TTT_SEQ_LEN": "ttt_seq_len", "SGD_TTT_PARAM_SET": "ttt_params", "TTT_CHUNK_SIZE": "ttt_chunk_tokens",
    "TTT_COSINE_LR": {"1": ("ttt_schedule", "chunk"), "0": ("ttt_schedule", "constant")},
    "FULL_GPTQ": {"1": ("quantizer", "gptq"), "0": ("quantizer", "rtn")},
    "GPTQ_LITE": {"1": ("quantizer", "gptq_lite"), "0": ("", "")},
    "INT5_MLP": {"1": ("mlp_bits", "5"), "0": ("mlp_bits", "6")},
    "BIGRAM_HASH": {"1": ("", ""), "0": ("bigram_vocab_size", "0")},
    "EMA_ENABLED": {"1": ("", ""), "0": ("", "")}, "SWA_ENABLED": {"1": ("", ""), "0": ("", "")},
}
# Techniques of the submissions' files that were off in their runs: the value that says off.
NOT_CARRIED = {
    "TIE_EMBEDDINGS": "1", "TTT_LEGAL": "1", "PPM_ALPHA": "1.0", "LOAD_ARTIFACT": "", **dict.fromkeys((
        "DTG_ENABLED", "HYPER_CONNECTIONS", "ADAPTIVE_VR", "TTT_GA_GUIDED", "CACHE_MIXTURE", "OGD_BIAS",
        "KV_CACHE_LEN", "USE_CACHE", "USE_MIXER", "BYTE_WEIGHTED_TTT", "ADAPTIVE_LR", "QTTT", "VR_V0_FP16",
        "GPTQ_LITE_SEARCH"), "0"),
}
# Read by the submissions without effect under their settings: accepted, and logged as ignored.
IGNORED_NAMES = ("EMBED_LR", "HEAD_LR", "MUON_BETA2", "CACHE_ALPHA", "ADAPTIVE_LR_MAX", "MIXER_ETA",
                 "GPTQ_LITE_GRID", "GPTQ_CALIB_BATCHES")
# Settings of run.sh and data/prepare.py.
FOREIGN_NAMES = ("SEEDS", "NPROC", "TORCH_INDEX_URL", "HF_ENDPOINT", "MATCHED_FINEWEB_REPO_ID",
                 "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX")
OWN_PREFIXES = ("TTT_", "GPTQ_", "QAT_", "EMA_", "SWA_", "MUON_", "ADAM_")


def _field_of(name: str, text: str, env: Mapping[str, str], fields: list[str]) -> tuple[str, str] | None:
    """The field that an environment name sets and the text of its value; an empty field means no effect."""
    overruled = {("GPTQ_LITE", "1"): env.get("FULL_GPTQ") == "1", ("FULL_GPTQ", "0"): env.get("GPTQ_LITE") == "1"}
    if name in FOREIGN_NAMES or overruled.get((name, text)):
        return "", ""
    meant = ALIASES.get(name, name.lower() if name.isupper() else None)
    if isinstance(meant, dict):
        return meant.get(text, ("late_qat", text))  # anything but 0 and 1 fails as a switch does, empty does nothing
    return (meant, text) if meant in fields else None


def _same_value(a: str, b: str) -> bool:
    """Whether two texts are equal, as numbers where both are."""
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b


def _edits(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def _near_miss(name: str, fields: list[str]) -> str | None:
    """The known name that an unknown one was probably meant to be."""
    known = [*map(str.upper, fields), *ALIASES, *NOT_CARRIED, *IGNORED_NAMES, *FOREIGN_NAMES]
    close = [other for other in known if abs(len(other) - len(name)) <= 2 and _edits(name, other) <= 2]
    if close or name.startswith(OWN_PREFIXES):
        return min(close or known, key=lambda other: _edits(name, other))
    return None


def _parse(text: str, like: object) -> object:
    """A setting's text as the type of its default."""
    if isinstance(like, bool):
        if text.lower() not in ("0", "1", "false", "true"):
            raise ValueError(text)
        return text.lower() in ("1", "true")
    if isinstance(like, tuple):
        return tuple(int(part) for part in text.split(",") if part.strip())
    return type(like)(text)


def _averaging_conflicts(averaging: str, env: Mapping[str, str]) -> Iterator[str]:
    """The submissions' two switches may repeat what AVERAGING says, not contradict it."""
    for switch, kind in (("EMA_ENABLED", "ema"), ("SWA_ENABLED", "swa")):
        if env.get(switch) in ("0", "1") and (env[switch] == "1") != (averaging == kind):
            yield f"{switch}={env[switch]} contradicts AVERAGING={averaging}; set AVERAGING=ema, swa or none"


def setting(default, meaning: str):
    """A dataclass field that carries its meaning for --help."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting of a run; the environment variable is the field's name in capitals."""

    # the run
    preset: str = setting("pr606", "set of defaults: pr606, pr601 or smoke")
    run_id: str = setting("", "folder under logs/ (empty: preset-seed-time)")
    stages: str = setting("train,quantize,evaluate", "parts of the pipeline to run, separated by commas")
    artifact: str = setting("", "artifact to score with STAGES=evaluate (empty: the run's own)")
    resume: bool = setting(False, "continue the interrupted run RUN_ID from its checkpoint")
    seed: int = setting(1337, "seeds Python, NumPy and torch")
    device: str = setting("auto", "auto, cuda or cpu")
    dtype: str = setting("auto", "arithmetic of the matrix products: auto, bf16 or fp32")
    compile: str = setting("auto", "torch.compile: auto, 0 or 1")
    attention: str = setting("auto", "attention kernel: auto, fa3 or sdpa")
    data_path: str = setting("./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin shards")
    tokenizer_path: str = setting("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model")
    train_log_every: int = setting(500, "steps between log lines")
    val_loss_every: int = setting(4000, "steps between validations while training (0: none)")
    val_batch_size: int = setting(524288, "tokens per scoring batch over all ranks, at most")
    checkpoint_every: int = setting(0, "steps between checkpoints (0: only on SIGTERM)")
    tensorboard: bool = setting(False, "also write TensorBoard event files")
    # the model
    vocab_size: int = setting(1024, "V, rows of the tied embedding")
    num_layers: int = setting(11, "L; the first half feeds skips to the second")
    model_dim: int = setting(512, "D, width of the residual stream")
    num_heads: int = setting(8, "H, query heads")
    num_kv_heads: int = setting(8, "key and value heads")
    mlp_mult: float = setting(3.5, "MLP width in units of D")
    mlp_slope: float = setting(0.5, "negative slope of the LeakyReLU that is squared (0: ReLU squared)")
    rope_base: float = setting(10000.0, "RoPE base frequency")
    rope_dims: int = setting(16, "dimensions of a head that RoPE turns")
    rope_ntk_reference: int = setting(1024, "window length above which the RoPE base grows (0: never)")
    qk_gain_init: float = setting(1.5, "initial gain of the normalised queries, per head")
    logit_softcap: float = setting(30.0, "logits are squashed into +- this by tanh")
    xsa_last_n: int = setting(11, "last layers with exclusive self attention")
    ln_scale: bool = setting(True, "divide a block's normed input by sqrt(layer + 1)")
    smear_gate: bool = setting(True, "mix each embedding with the previous one")
    smear_reset_at_bos: bool = setting(False, "the embedding before a document's first counts as zero")
    bigram_vocab_size: int = setting(8192, "buckets of the bigram hash (0: off)")
    bigram_dim: int = setting(128, "width of the bigram table")
    ve_enabled: bool = setting(True, "add a shared value embedding to V")
    ve_dim: int = setting(128, "width of the value embedding table")
    ve_layers: tuple[int, ...] = setting((9, 10), "layers that get the value embedding")
    value_residual: bool = setting(False, "mix the first layer's V into every later one")
    gated_attention: bool = setting(False, "a sigmoid gate per head and token")
    tied_embed_init_std: float = setting(0.005, "standard deviation of the initial embedding")
    ortho_init: bool = setting(True, "orthogonal initial matrices")
    # the training
    iterations: int = setting(20000, "steps, at most")
    max_wallclock_seconds: float = setting(600.0, "training clock, calibration included (0: no clock)")
    warmup_steps: int = setting(20, "uncounted first steps; weights, optimiser and data are restored")
    warmdown_iters: int = setting(3500, "last steps, over which the learning rate falls to zero")
    train_batch_tokens: int = setting(786432, "tokens per step over all ranks")
    train_seq_len: int = setting(2048, "T while training")
    grad_accum_steps: int = setting(0, "micro-steps per step and rank (0: what fits)")
    tied_embed_lr: float = setting(0.035, "AdamW learning rate of the embedding tables")
    matrix_lr: float = setting(0.025, "Muon learning rate of the matrices")
    scalar_lr: float = setting(0.025, "AdamW learning rate of gains, gates and scales")
    muon_momentum: float = setting(0.99, "Muon momentum after its warm-up")
    muon_momentum_warmup_start: float = setting(0.92, "Muon momentum at step 0")
    muon_momentum_warmup_steps: int = setting(1500, "steps of the momentum warm-up")
    muon_backend_steps: int = setting(5, "Newton-Schulz iterations")
    muon_row_norm: bool = setting(False, "give every row of a Muon update length 1")
    muon_wd: float = setting(0.04, "decoupled weight decay of the matrices")
    adam_wd: float = setting(0.04, "decoupled weight decay of everything else")
    beta1: float = setting(0.9, "AdamW first moment")
    beta2: float = setting(0.95, "AdamW second moment")
    adam_eps: float = setting(1e-8, "AdamW epsilon")
    grad_clip_norm: float = setting(0.3, "global gradient norm (0: no clipping)")
    averaging: str = setting("ema", "weights that are exported: ema, swa or none")
    ema_decay: float = setting(0.997, "EMA decay per step")
    swa_every: int = setting(50, "steps between SWA snapshots, once the learning rate is below swa_threshold")
    swa_threshold: float = setting(0.2, "learning-rate scale below which SWA collects")
    qat_enabled: bool = setting(False, "fake quantisation from the first step on")
    late_qat: bool = setting(True, "fake quantisation late in training")
    late_qat_threshold: float = setting(0.5, "learning-rate scale below which late QAT runs")
    soft_round_qat: bool = setting(True, "soft rounding (0: hard rounding, straight-through gradient)")
    soft_round_alpha: float = setting(16.0, "sharpness that soft rounding reaches at the end, from 1")
    # the artifact
    quantizer: str = setting("gptq", "gptq, gptq_lite (best clip per row, no compensation) or rtn (plain rounding)")
    attn_bits: int = setting(5, "bits of the attention matrices")
    mlp_bits: int = setting(5, "bits of the MLP matrices")
    embed_bits: int = setting(8, "bits of the embedding tables")
    int6_last_n: int = setting(0, "last layers whose matrices get 6 bits")
    prune_pct: float = setting(0.02, "share of the smallest weights of a matrix that become zero")
    gptq_calib_sequences: int = setting(256, "training sequences behind the Hessians")
    gptq_damp: float = setting(0.01, "share of the mean diagonal added to a Hessian")
    zstd_level: int = setting(22, "zstd level of what is not codes, which take literals alone")
    artifact_limit: int = setting(16_000_000, "bytes of code and model together, at most")
    # the score
    eval_seq_len: int = setting(2048, "T while scoring")
    eval_stride: int = setting(32, "tokens between the starts of sliding windows")
    skip_sliding: bool = setting(True, "no sliding score apart from the one with test-time training")
    eval_seconds: float = setting(600.0, "evaluation clock; training inside TTT stops early enough for it")
    ttt_enabled: bool = setting(True, "score-first test-time training")
    ttt_optimizer: str = setting("adamw", "adamw or sgd")
    ttt_lr: float = setting(1e-4, "learning rate at the first chunk")
    ttt_momentum: float = setting(0.9, "momentum of sgd")
    ttt_epochs: int = setting(3, "passes over a chunk once it is scored")
    ttt_chunk_tokens: int = setting(131072, "positions scored before they are trained on")
    ttt_seq_len: int = setting(0, "T of a training sequence (0: EVAL_SEQ_LEN)")
    ttt_batch_seqs: int = setting(64, "sequences per TTT step over all ranks")
    ttt_params: str = setting("blocks", "what TTT trains: blocks (last N and all scales), control, control_qk, all")
    ttt_freeze_blocks: int = setting(2, "the last N blocks are trained; the name is #606's")
    ttt_schedule: str = setting("run", "cosine over the run's chunks, over each chunk (chunk), or constant")
    ttt_perlayer_lr: bool = setting(False, "mlp.proj at 3x and mlp.fc at 0.5x the rate (#601)")
    ttt_grad_clip: float = setting(1.0, "gradient norm of a TTT step")
    ttt_temperature: float = setting(0.98, "lowest adaptive temperature, at zero entropy (1: off)")
    use_polyak: bool = setting(False, "score with the Polyak average of the weights that TTT trains")
    polyak_decay: float = setting(0.998, "Polyak decay per TTT step")
    # filled in by from_env
    ignored: tuple[str, ...] = ()

    @staticmethod
    def from_env(env: Mapping[str, str]) -> Hyperparameters:
        """Settings from a mapping of environment names to strings, and from nothing else.

        Raises ValueError with one line for every bad, misspelt or contradictory setting.
        """
        errors, given, ignored = [], {}, []
        fields = [f.name for f in dataclasses.fields(Hyperparameters) if f.metadata]
        preset = env.get("PRESET") or "pr606"
        if preset not in PRESETS:
            raise UserError(f"PRESET={preset} is unknown; choose one of {', '.join(PRESETS)}")
        for name, text in env.items():
            if name in IGNORED_NAMES:
                ignored.append(name)
            elif name in NOT_CARRIED:
                if text and not _same_value(text, NOT_CARRIED[name]):
                    errors.append(f"{name}={text}: this script does not carry that; leave it out, or set "
                                  f"{name}={NOT_CARRIED[name]}")
            elif (meant := _field_of(name, text, env, fields)) is None:
                if hint := _near_miss(name, fields):
                    errors.append(f"{name} is not a setting; did you mean {hint}?")
            elif meant[1] != "" and meant[0] not in ("", "preset"):
                field_name, value = meant
                try:
                    parsed = _parse(value, getattr(Hyperparameters, field_name))
                except ValueError:
                    kind = type(getattr(Hyperparameters, field_name)).__name__
                    errors.append(f"{name}={text} is not a valid {kind}")
                    continue
                first = given.setdefault(field_name, (name, parsed))
                if first[0] != name and first[1] != parsed:
                    errors.append(f"{given[field_name][0]} and {name} say different things; set one of them")
        values = {**PRESETS[preset], **{key: value for key, (_, value) in given.items()}}
        hp = Hyperparameters(**{**values, "preset": preset, "ignored": tuple(sorted(ignored))})
        errors += [*hp.problems(), *_averaging_conflicts(hp.averaging, env)]
        if errors:
            raise UserError("\n".join(errors))
        return hp

    def problems(self) -> Iterator[str]:
        """One line for every value that no run can use."""
        names = [f.name for f in dataclasses.fields(self) if f.metadata]
        for name in names:
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not 0 <= value < math.inf:
                yield f"{name.upper()}={value} must be a number of at least 0"
            if name in CHOICES and value not in CHOICES[name]:
                yield f"{name.upper()}={value} is unknown; choose one of {', '.join(CHOICES[name])}"
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                yield f"{name.upper()}={getattr(self, name)} must be at least 1"
        if any(getattr(self, name) < 1 for name in AT_LEAST_ONE):
            return  # the rules below divide by these
        for broken, message in (
            (self.model_dim % self.num_heads, "MODEL_DIM must be a multiple of NUM_HEADS"),
            (self.num_heads % self.num_kv_heads, "NUM_HEADS must be a multiple of NUM_KV_HEADS"),
            (self.rope_dims % 2 or self.rope_dims > self.model_dim // self.num_heads or self.rope_dims == 2,
             "ROPE_DIMS must be even, not 2, and at most MODEL_DIM / NUM_HEADS"),
            (self.vocab_size > 65536, "VOCAB_SIZE must be at most 65536: shards hold 16-bit ids"),
            (self.bigram_vocab_size == 1, "BIGRAM_VOCAB_SIZE must be 0 (off) or at least 2"),
            (self.ve_enabled and not self.ve_layers, "VE_LAYERS is empty; name layers, or set VE_ENABLED=0"),
            (self.ve_enabled and any(not 0 <= layer < self.num_layers for layer in self.ve_layers),
             f"VE_LAYERS must lie in 0..{self.num_layers - 1} (NUM_LAYERS={self.num_layers})"),
            (self.train_batch_tokens % self.train_seq_len, "TRAIN_BATCH_TOKENS must be a multiple of TRAIN_SEQ_LEN"),
            (not 1 <= self.eval_stride <= self.eval_seq_len, "EVAL_STRIDE must lie in 1..EVAL_SEQ_LEN"),
            (self.ttt_chunk_tokens % (self.ttt_seq_len or self.eval_seq_len),
             "TTT_CHUNK_TOKENS must be a multiple of TTT_SEQ_LEN (EVAL_SEQ_LEN where that is 0)"),
            (self.ttt_params == "blocks" and self.ttt_freeze_blocks > self.num_layers,
             "TTT_FREEZE_BLOCKS (the blocks that are trained) must be at most NUM_LAYERS"),
            (any(not 2 <= bits <= 8 for bits in (self.attn_bits, self.mlp_bits, self.embed_bits)),
             "ATTN_BITS, MLP_BITS and EMBED_BITS must lie in 2..8"),
            (self.beta1 >= 1 or self.beta2 >= 1, "BETA1 and BETA2 must be below 1"),
            (self.seed >= 2 ** 32, "SEED must be below 2^32"),
            (not self.logit_softcap, "LOGIT_SOFTCAP must be above 0"),
            (len(set(self.ve_layers)) < len(self.ve_layers), "VE_LAYERS names a layer twice"),
            (Path(self.run_id).name != self.run_id or self.run_id == "..",
             "RUN_ID is the name of a folder under logs/"),
            (self.prune_pct >= 1, "PRUNE_PCT is a share and must be below 1"),
            (self.zstd_level > 22, "ZSTD_LEVEL must lie in 0..22"),
            (self.muon_momentum >= 1 or self.ema_decay >= 1, "MUON_MOMENTUM and EMA_DECAY must be below 1"),
            (self.qat_enabled and self.soft_round_qat and not self.late_qat_threshold,
             "soft rounding sharpens below LATE_QAT_THRESHOLD, which is 0"),
            (not set(self.stages.split(",")) <= set(STAGES) or not self.stages,
             f"STAGES={self.stages} is unknown; use {', '.join(STAGES)}, separated by commas"),
            (self.artifact and self.stages != "evaluate", "ARTIFACT is for STAGES=evaluate"),
        ):
            if broken:
                yield message

    def changed(self) -> dict[str, object]:
        """The settings that differ from the preset."""
        usual = Hyperparameters(preset=self.preset, **PRESETS[self.preset])
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                if f.metadata and getattr(self, f.name) != getattr(usual, f.name)}

    @staticmethod
    def table() -> str:
        """Every setting with its value in each preset, as a Markdown table."""
        show = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else \
            str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        rows = [("name", *PRESETS, "meaning")]
        for f in dataclasses.fields(Hyperparameters):
            if f.metadata and f.name != "preset":
                values = [show(preset.get(f.name, f.default)) or '""' for preset in PRESETS.values()]
                rows.append((f.name.upper(), *values, f.metadata["meaning"]))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        rows.insert(1, tuple("-" * width for width in widths))
        return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows)


# ----------------------------------------------------------------------------------------------------------
# 2 Processes and log
#
# `World` is this process among its equals. On one process every operation is the identity, so no other section
# asks whether it runs alone. Its sums run over gloo on CPU and NCCL on CUDA. `RunLog` writes what rank 0 says.

def cpu_info() -> str:
    """What Linux says of the processor; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


class World:
    """Rank, size and device of this process, and the collectives that a run needs.

    env is the process's environment (torchrun's RANK, WORLD_SIZE, LOCAL_RANK, ...). Raises UserError where the
    device that `hp` asks for is not there.
    """

    def __init__(self, hp: Hyperparameters, env: Mapping[str, str]):
        self.rank, self.size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        if hp.device == "cuda" and not torch.cuda.is_available():
            raise UserError("DEVICE=cuda, but PyTorch sees no CUDA device; use DEVICE=auto or a CUDA build of torch")
        kind = hp.device if hp.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        local_rank = int(env.get("LOCAL_RANK", 0))
        if kind == "cuda" and local_rank >= torch.cuda.device_count():
            raise UserError(f"{local_rank + 1} processes on this node, but {torch.cuda.device_count()} CUDA devices; "
                            f"lower --nproc_per_node (run.sh: NPROC)")
        self.device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(self.device)
            units = torch.cuda.get_device_capability(self.device) >= (8, 0)
        else:  # where a CPU has bf16 units they pay from D = 128 on: 1.4x there, 1.9x at D = 256 (two EPYC cores)
            units = any(flag in cpu_info() for flag in ("avx512_bf16", "amx_bf16"))
        half = hp.dtype == "bf16" or hp.dtype == "auto" and units
        self.dtype = torch.bfloat16 if half else torch.float32
        self.grouped = self.size > 1
        if self.grouped:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=20))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.grouped:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: float) -> float:
        """The largest of the ranks' values."""
        if not self.grouped:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The source rank's tensor on every rank, in place."""
        if self.grouped:
            dist.broadcast(tensor, source)
        return tensor

    def shard(self, count: int, rank: int | None = None) -> range:
        """This rank's contiguous share of `count` things; shares differ by at most one."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def same_everywhere(self, tensor: Tensor) -> bool:
        """Whether all ranks hold the same numbers, by a float64 checksum."""
        checksum = tensor.double().sum().item()
        return self.max(checksum) == -self.max(-checksum)

    def barrier(self) -> None:
        """Wait for every rank."""
        self.max(0.0)

    def synchronize(self) -> None:
        """Wait for the device, before a host clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The arithmetic of every forward pass: bf16 matrix products on fp32 weights, or plain fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)

    def peak_memory(self) -> int:
        """Bytes: the device's peak on CUDA, the process's peak elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource  # POSIX only
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()


def key_values(values: Mapping[str, object]) -> str:
    """A mapping in the log's grammar, floats to five significant digits."""
    show = lambda value: f"{value:.5g}" if isinstance(value, float) else str(value)
    return " ".join(f"{key}:{show(value)}" for key, value in values.items())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class RunLog:
    """Log lines to console and log.txt, metrics as JSON lines to metrics.jsonl; silent on ranks above 0."""

    def __init__(self, folder: Path | None, tensorboard: bool = False):
        self.text = self.metrics = self.board = None
        self.live, self.shown = folder is not None and sys.stdout.isatty(), 0.0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.text = open(folder / "log.txt", "a", encoding="utf-8")
            self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")
            if tensorboard:
                try:
                    from torch.utils.tensorboard import SummaryWriter
                except ImportError:
                    raise UserError("TENSORBOARD=1 needs the tensorboard package: pip install tensorboard") from None
                self.board = SummaryWriter(str(folder))

    def __call__(self, line: str, console: bool = True) -> None:
        """One line: an event, then key:value pairs."""
        if self.text:
            if console:
                print(f"\r\x1b[2K{line}" if self.live else line, flush=True)
            print(line, file=self.text, flush=True)

    def status(self, line: str) -> None:
        """A line that the next one replaces: on a terminal only, a few times a second at most."""
        if self.live and time.perf_counter() - self.shown > 0.2:
            self.shown = time.perf_counter()
            print(f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def metric(self, event: str, **values) -> None:
        """One JSON line; `step` orders the TensorBoard curves."""
        if self.metrics:
            print(json.dumps({"event": event, **values}), file=self.metrics, flush=True)
            for key, value in values.items():
                if self.board and key != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(f"{event}/{key}", value, values.get("step", 0))


class Budget:
    """Seconds per phase against one of the challenge's two clocks; phases that do not count are listed apart."""

    def __init__(self, world: World, limit: float):
        self.world, self.limit = world, limit
        self.counted: dict[str, float] = {}
        self.uncounted: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str, counted: bool = True) -> Iterator[None]:
        """Time the body as one phase, to the slowest rank."""
        self.world.synchronize()
        start = time.perf_counter()
        yield
        self.world.synchronize()
        self.add(name, self.world.max(time.perf_counter() - start), counted)

    def add(self, name: str, seconds: float, counted: bool = True) -> None:
        """Book seconds that were measured elsewhere."""
        phases = self.counted if counted else self.uncounted
        phases[name] = phases.get(name, 0.0) + seconds

    @property
    def used(self) -> float:
        """Counted seconds so far."""
        return sum(self.counted.values())

    def report(self) -> dict:
        """What result.json holds."""
        return {"limit": self.limit, "used": self.used, "within": not self.limit or self.used <= self.limit,
                "counted": self.counted, "uncounted": self.uncounted}


# ----------------------------------------------------------------------------------------------------------
# 3 Data
#
# Shards of 16-bit token ids come in, batches of sequences go out. The order is the submissions': files by name,
# read straight through, eight spans per step, whatever the number of ranks. `ByteTable` turns tokens back into
# bytes, which is what makes scores of different tokenizers comparable.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256
BOS = 1
SPANS_PER_STEP = 8


def read_shard(path: str | Path) -> np.ndarray:
    """The token ids of one shard, uint16, memory-mapped.

    Raises UserError where the file is missing, is not a shard, or is shorter or longer than its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; `python data/prepare.py` makes or downloads shards")
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER)
    if header.size < SHARD_HEADER or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path} is not a token shard (magic {SHARD_MAGIC}, version {SHARD_VERSION}); fetch it again")
    count, size = int(header[2]), path.stat().st_size
    if count < 1 or size != SHARD_HEADER * 4 + 2 * count:
        raise UserError(f"{path} has {size} bytes where its header promises {SHARD_HEADER * 4 + 2 * count} "
                        f"({count} tokens); it is damaged or half downloaded, fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER * 4, shape=(count,))


def read_split(folder: str, split: str) -> list[np.ndarray]:
    """All shards of a split in order of their names."""
    files = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))
    if not files:
        raise UserError(f"no {split} shards (fineweb_{split}_*.bin) in {folder}; set DATA_PATH, or make them with "
                        f"`python data/prepare.py`")
    return [read_shard(file) for file in files]


def check_ids(shards: list[np.ndarray], vocab_size: int, world: World) -> None:
    """Raise UserError unless every id is below vocab_size; ranks share the reading."""
    largest = [int(shards[i].max()) for i in range(world.rank, len(shards), world.size)]
    if (top := int(world.max(max(largest, default=0)))) >= vocab_size:
        raise UserError(f"the shards hold token id {top}, but VOCAB_SIZE={vocab_size}; data and setting do not match")


class TokenStream:
    """Training tokens in their published order, wrapping around."""

    def __init__(self, shards: list[np.ndarray]):
        self.shards = shards
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.total = int(self.ends[-1])
        self.position = 0

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens, int64."""
        pieces = []
        while count:
            at = self.position % self.total
            index = int(np.searchsorted(self.ends, at, side="right"))
            offset = at - (int(self.ends[index]) - len(self.shards[index]))
            piece = self.shards[index][offset: offset + count]
            pieces.append(piece)
            self.position += len(piece)
            count -= len(piece)
        return np.concatenate(pieces).astype(np.int64)

    def step(self, batch_tokens: int, seq_len: int) -> np.ndarray:
        """The sequences of one optimiser step, (batch_tokens / seq_len, seq_len + 1) int64.

        Eight spans of batch_tokens / 8 + 1 tokens, as the submissions read them on 1 to 8 GPUs, or one span where
        that does not divide into sequences. A sequence's last token is the next one's first.
        """
        whole = batch_tokens % (SPANS_PER_STEP * seq_len) == 0
        spans = SPANS_PER_STEP if whole else 1
        length = batch_tokens // spans
        rows = [np.lib.stride_tricks.sliding_window_view(self.take(length + 1), seq_len + 1)[::seq_len]
                for _ in range(spans)]
        return np.concatenate(rows)

    def sample(self, count: int, seq_len: int, seed: int) -> np.ndarray:
        """`count` sequences from random places of the training tokens, (count, seq_len) int64."""
        shards = [shard for shard in self.shards if len(shard) >= seq_len]
        if not shards:
            raise UserError(f"no training shard holds {seq_len} tokens; use a smaller TRAIN_SEQ_LEN or more text")
        rng = np.random.default_rng(seed)
        sizes = np.array([len(shard) for shard in shards], dtype=np.float64)
        chosen = rng.choice(len(shards), size=count, p=sizes / sizes.sum())
        starts = [int(rng.integers(len(shards[i]) - seq_len + 1)) for i in chosen]
        return np.stack([shards[i][at: at + seq_len] for i, at in zip(chosen, starts)]).astype(np.int64)


def validation_tokens(folder: str, seq_len: int) -> Tensor:
    """The whole validation split, cut to a multiple of seq_len positions plus one token, int32."""
    tokens = np.concatenate(read_split(folder, "val"))
    positions = (len(tokens) - 1) // seq_len * seq_len
    if positions < seq_len:
        raise UserError(f"validation has {len(tokens)} tokens; EVAL_SEQ_LEN={seq_len} needs at least {seq_len + 1}")
    return torch.from_numpy(tokens[: positions + 1].astype(np.int32))


class ByteTable:
    """UTF-8 bytes per token by the challenge's official rule.

    Control, unknown and unused pieces count nothing and are boundaries; a byte piece counts one; any other piece
    counts its text without one leading U+2581, and that one counts a byte unless a boundary comes before.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        size = processor.get_piece_size()
        self.bytes, self.space, self.boundary = np.zeros(size, np.int32), np.zeros(size, bool), np.zeros(size, bool)
        for i in range(size):
            if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
                self.boundary[i] = True
            elif processor.is_byte(i):
                self.bytes[i] = 1
            else:
                piece = processor.id_to_piece(i)
                self.space[i] = piece.startswith("\u2581")
                self.bytes[i] = len(piece.removeprefix("\u2581").encode())

    def count(self, previous: Tensor, target: Tensor) -> Tensor:
        """Bytes charged for each target after its previous token; int tensors of one shape, int32 out."""
        p, t = previous.cpu().numpy(), target.cpu().numpy()
        return torch.from_numpy(np.asarray(self.bytes[t] + (self.space[t] & ~self.boundary[p]), dtype=np.int32))


def load_tokenizer(path: str, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model, checked against VOCAB_SIZE."""
    if not Path(path).is_file():
        raise UserError(f"tokenizer {path} is missing; set TOKENIZER_PATH, or make it with `python data/prepare.py`")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(path)
    except (RuntimeError, OSError):
        raise UserError(f"{path} is not a SentencePiece model; set TOKENIZER_PATH") from None
    if processor.get_piece_size() != vocab_size:
        raise UserError(f"{path} has {processor.get_piece_size()} pieces, but VOCAB_SIZE={vocab_size}; "
                        f"set VOCAB_SIZE={processor.get_piece_size()} or another TOKENIZER_PATH")
    return processor


def check_byte_table(table: ByteTable, processor, tokens: Tensor, documents: int = 200) -> None:
    """Decode the first validation documents and compare their bytes with the table's, to one byte per document.

    Wrong byte tables have made published scores 4 to 20 % too good (#1143, #1719, #1184).
    """
    sample = tokens[:1_000_000]
    starts = (sample == BOS).nonzero().flatten().tolist()[: documents + 1]
    spans = list(zip(starts, starts[1:])) or [(0, min(len(sample), 8192))]
    counted = decoded = 0
    for start, end in spans:
        ids = sample[start:end]
        counted += int(table.count(ids[:-1], ids[1:]).sum())
        decoded += len(processor.decode(ids[1:].tolist()).encode())
    if abs(counted - decoded) > len(spans) + 12 * (len(starts) < 2):  # a cut character decodes to U+FFFD
        raise UserError(f"the byte table counts {counted} bytes where {len(spans)} decoded validation documents "
                        f"have {decoded}; tokenizer and shards do not belong together")


# ----------------------------------------------------------------------------------------------------------
# 4 Integer grid
#
# The one grid that QAT trains towards, GPTQ rounds to and the packer stores: signed codes within +-max_code and
# one scale per row. Scales are kept as fp16 can hold them, so that what was scored is what was packed.

@dataclass
class QuantizedTensor:
    """Integer codes with one scale per row: codes int8 (..., out, in), scales float (..., out), max_code int."""

    codes: Tensor
    scales: Tensor
    max_code: int

    def dequantize(self) -> Tensor:
        """The weights that the codes stand for, float32."""
        return self.codes.float() * self.scales.float().unsqueeze(-1)


Tensors = Mapping[str, QuantizedTensor | Tensor]


def max_code_of(bits: int) -> int:
    """The largest code of a symmetric grid."""
    return 2 ** (bits - 1) - 1


# The smallest step that fp16 holds. #606's floor of 1/15 coarsened nearly every row.
SCALE_FLOOR = 2.0 ** -24


def row_scales(weight: Tensor, max_code: int, multiplier: float | Tensor = 1.0) -> Tensor:
    """The step of each row: its absmax over max_code, times the rate multiplier; (..., out, in) -> (..., out).

    A multiplier above 1 leaves the outermost codes unused: fewer bits after entropy coding, a coarser grid.
    """
    return (weight.abs().amax(dim=-1) * (multiplier / max_code)).clamp_min(SCALE_FLOOR)


def storable(scales: Tensor) -> Tensor:
    """Scales as the artifact will hold them, rounded to fp16."""
    return scales.half().float().clamp_min(SCALE_FLOOR)


def round_to_grid(weight: Tensor, scales: Tensor, max_code: int) -> QuantizedTensor:
    """Plain rounding to the nearest code; weight (..., out, in), scales (..., out)."""
    codes = torch.round(weight / scales.unsqueeze(-1)).clamp_(-max_code, max_code)
    return QuantizedTensor(codes.to(torch.int8), scales, max_code)


def soft_round(y: Tensor, alpha: float | Tensor) -> Tensor:
    """A smooth staircase through the half-integers, elementwise: the identity as alpha -> 0, rounding as it grows.

    floor(y) + 1/2 + tanh(alpha r) / (2 tanh(alpha / 2)) with r = y - floor(y) - 1/2. Agustsson and Theis 2020,
    arXiv:2006.09952.
    """
    alpha = torch.as_tensor(alpha, dtype=y.dtype, device=y.device)
    low = torch.floor(y)
    return low + 0.5 + torch.tanh(alpha * (y - low - 0.5)) / (2 * torch.tanh(alpha / 2))


def soft_round_gradient(y: Tensor, alpha: float | Tensor) -> Tensor:
    """The derivative of soft_round, elementwise."""
    alpha = torch.as_tensor(alpha, dtype=y.dtype, device=y.device)
    slope = torch.tanh(alpha * (y - torch.floor(y) - 0.5))
    return alpha * (1 - slope * slope) / (2 * torch.tanh(alpha / 2))


# ----------------------------------------------------------------------------------------------------------
# 5 Model
#
# Token ids in, soft-capped logits out. One class serves training, calibration and scoring. Weights are fp32
# masters that are cast to the dtype of the activations; the caller's autocast chooses that dtype. Parameter names
# are the submissions' own, so their state dicts load here.

def full_precision(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class RMSNorm(torch.autograd.Function):
    """F.rms_norm without a weight, its scale in the dtype of x, three times faster on a CPU: five passes in all."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) over the last dimension."""
        wide = torch.promote_types(x.dtype, torch.float32)  # vecdot would be bf16, and its eps, under autocast
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square() / x.size(-1)
        scale = torch.rsqrt(mean_square + torch.finfo(wide).eps).to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, to_y: Tensor):
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(to_y, y).unsqueeze(-1) / y.size(-1)
        return torch.addcmul(to_y, y, along, value=-1) * scale


def rms_norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, without a weight, in the dtype of x.

    CUDA's autocast would return float32 from here and make the whole stream float32.
    """
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype) if x.is_cuda else RMSNorm.apply(x)


class CastLinear(nn.Module):
    """A linear layer whose weight takes the dtype of its input; it starts orthogonal, times a gain."""

    def __init__(self, columns: int, rows: int, gain: float = 1.0, orthogonal: bool = True):
        super().__init__()
        self.weight, self.bias, self.in_features = nn.Parameter(torch.empty(rows, columns)), None, columns
        with torch.no_grad():
            if not gain:
                self.weight.zero_()
            elif orthogonal and min(rows, columns) >= 64:
                nn.init.orthogonal_(self.weight).mul_(gain)
            else:
                nn.init.kaiming_uniform_(self.weight, a=5 ** 0.5).mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Module):
    """A table of rows that start with a normal distribution."""

    def __init__(self, rows: int, columns: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(rows, columns), std=std))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


def rotary_tables(length: int, dims: int, base: float, reference: int, device, dtype) -> Tensor:
    """Cosines and sines of partial RoPE, (2, length, 1, dims / 2).

    Windows longer than `reference` stretch the base by (length / reference)^(dims / (dims - 2)), the NTK rule that
    #606 trained with; 0 never does.
    """
    if reference and length > reference:
        base *= (length / reference) ** (dims / (dims - 2))
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float64, device=device) / dims)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency).unsqueeze(1)
    return torch.stack((angle.cos(), angle.sin())).to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first dimensions of every head, half against half; x (B, T, H, D / H), the rest from rotary_tables."""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half: 2 * half], x[..., 2 * half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def flash_attention_3() -> Callable | None:
    """FlashAttention 3's function where it is installed and the GPU is a Hopper; looked up late, never at import."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        from flash_attn_interface import flash_attn_func
    except (ImportError, OSError, RuntimeError):  # also a build for another torch
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # older builds also return the log-sum-exp
    return attend


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's causal attention on (B, T, H, D / H), fewer key heads than query heads allowed."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


SDPA_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def sdpa_by(first: str) -> Callable:
    """sdpa_attention by the named kernel, by another one where that does not take the input."""
    order = [SDPA_KERNELS[first], *(kernel for name, kernel in SDPA_KERNELS.items() if name != first)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(order, set_priority=True):
            return sdpa_attention(q, k, v)
    return attend


def time_sdpa(hp: Hyperparameters, world: World) -> dict[str, float]:
    """Milliseconds of a layer's attention, forward and backward, by each of PyTorch's fused kernels that runs here."""
    B, T, width = max(16384 // hp.train_seq_len, 1), hp.train_seq_len, hp.model_dim // hp.num_heads
    q, k, v = (torch.ones(B, T, heads, width, device=world.device, dtype=world.dtype, requires_grad=True)
               for heads in (hp.num_heads, hp.num_kv_heads, hp.num_kv_heads))
    fastest: dict[str, float] = {}
    for name, kernel in list(SDPA_KERNELS.items())[:-1]:  # math writes the scores out: never the fastest, often too big
        with sdpa_kernel(kernel), contextlib.suppress(RuntimeError), warnings.catch_warnings(action="ignore"):
            for _ in range(4):
                world.synchronize()
                start = time.perf_counter()
                out = sdpa_attention(q, k, v)
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
                world.synchronize()
                fastest[name] = min(fastest.get(name, math.inf), 1000 * (time.perf_counter() - start))
    return fastest


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with the scores written out, a block of queries at a time against the keys before its end.

    On a CPU in bf16 1.6 to 2 times faster than SDPA for T = 256 to 2,048; in fp32 slower.
    """
    (B, T, H, width), G = q.shape, k.size(2)
    block, parts = 256 if T > 256 else 128, []
    q, k, v = (x.transpose(1, 2) for x in (q * width ** -0.5, k, v))
    for low in range(0, T, block):
        high = min(low + block, T)
        future = torch.full((high - low, high), -math.inf, dtype=q.dtype, device=q.device).triu(low + 1)
        scores = q[:, :, low:high].reshape(B, G, -1, width) @ k[:, :, :high].mT
        p = (scores.view(B, H, high - low, high) + future).softmax(-1)
        parts.append((p.view(B, G, -1, high) @ v[:, :, :high]).view(B, H, high - low, width))
    return torch.cat(parts, dim=2).transpose(1, 2)


def cpu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The faster of the two on a CPU, by dtype."""
    return dense_attention(q, k, v) if q.dtype == torch.bfloat16 else sdpa_attention(q, k, v)


def remove_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self attention (XSA): drop the part of each head's output that lies along its token's own value.

    y (B, T, H, d), v (B, T, G, d); the H / G heads of a group share a value.
    """
    grouped = y.unflatten(2, (v.size(2), -1))
    direction = F.normalize(v, dim=-1, eps=1e-12).to(v.dtype).unsqueeze(3)
    along = (grouped * direction).sum(-1, keepdim=True).to(y.dtype)
    return (grouped - along * direction).flatten(2, 3)


class CausalSelfAttention(nn.Module):
    """Causal attention with normalised queries and keys, partial RoPE, and the submissions' additions to V and to
    the output: value embedding, value residual (arXiv:2410.17897), exclusive self attention, gates (arXiv:2505.06708).
    """

    def __init__(self, hp: Hyperparameters, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.width = hp.num_heads, hp.num_kv_heads, hp.model_dim // hp.num_heads
        kv_dim = self.kv_heads * self.width
        self.c_q = CastLinear(hp.model_dim, hp.model_dim, orthogonal=hp.ortho_init)
        self.c_k = CastLinear(hp.model_dim, kv_dim, orthogonal=hp.ortho_init)
        self.c_v = CastLinear(hp.model_dim, kv_dim, orthogonal=hp.ortho_init)
        self.proj = CastLinear(hp.model_dim, hp.model_dim, gain=0.0)
        self.q_gain = nn.Parameter(torch.full((self.heads,), hp.qk_gain_init))
        self.vr_lambda = nn.Parameter(torch.tensor([0.5, 0.5])) if hp.value_residual else None
        self.attn_gate = CastLinear(hp.model_dim, self.heads, gain=0.0) if hp.gated_attention else None
        if hp.gated_attention:
            self.attn_gate.bias = nn.Parameter(torch.full((self.heads,), 4.0))
        self.exclusive = layer >= hp.num_layers - hp.xsa_last_n
        self.attend = sdpa_attention

    def forward(self, x: Tensor, rotary: Tensor, ve: Tensor | None, v0: Tensor | None):
        """x (B, T, D), ve (B, T, kv width) or None, v0 the first layer's V or None -> output (B, T, D), own raw V."""
        B, T, D = x.shape
        q = rms_norm(self.c_q(x).view(B, T, self.heads, self.width))
        k = rms_norm(self.c_k(x).view(B, T, self.kv_heads, self.width))
        v = self.c_v(x)
        v = raw = (v if ve is None else v + ve).view(B, T, self.kv_heads, self.width)
        if v0 is not None:
            mix = self.vr_lambda.to(v.dtype)
            v = mix[0] * v0 + mix[1] * v
        q = apply_rotary(q, *rotary) * self.q_gain.to(q.dtype).view(-1, 1)
        y = self.attend(q, apply_rotary(k, *rotary), v)
        if self.exclusive:
            y = remove_own_value(y, v)
        if self.attn_gate is not None:
            y = y * torch.sigmoid(self.attn_gate(x)).unsqueeze(-1)
        return self.proj(y.reshape(B, T, D)), raw


class MLP(nn.Module):
    """Two matrices around a squared (leaky) ReLU."""

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        hidden = int(hp.mlp_mult * hp.model_dim)
        self.fc = CastLinear(hp.model_dim, hidden, orthogonal=hp.ortho_init)
        self.proj = CastLinear(hidden, hp.model_dim, gain=0.0)
        self.slope = hp.mlp_slope

    def forward(self, x: Tensor) -> Tensor:
        active = F.leaky_relu(self.fc(x), self.slope)
        return self.proj(active * active)  # square() would be float32 under CUDA's autocast


class Block(nn.Module):
    """Attention and MLP on a mix of the stream and the embedding, with learnt gains per channel."""

    def __init__(self, hp: Hyperparameters, layer: int):
        super().__init__()
        self.attn, self.mlp = CausalSelfAttention(hp, layer), MLP(hp)
        self.attn_scale = nn.Parameter(torch.ones(hp.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(hp.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(hp.model_dim), torch.zeros(hp.model_dim))))
        self.input_scale = (layer + 1) ** -0.5 if hp.ln_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, rotary, ve: Tensor | None, v0: Tensor | None):
        """x, x0 (B, T, D) -> (B, T, D) and the attention's raw V."""
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        attended, raw = self.attn(rms_norm(x) * self.input_scale, rotary, ve, v0)
        x = x + self.attn_scale.to(x.dtype) * attended
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x) * self.input_scale), raw


class SmearGate(nn.Module):
    """Mix each token's embedding with the one before it, by a learnt share per channel."""

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(hp.model_dim))
        self.reset_at_bos = hp.smear_reset_at_bos

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, T, D), tokens (B, T) -> (B, T, D); before the first token stands zero."""
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        if self.reset_at_bos:  # a document does not leak into the next (#1797, #1851)
            previous = previous * (tokens != BOS).unsqueeze(-1)
        return torch.lerp(x, previous, torch.sigmoid(self.gate).to(x.dtype))


class BigramHash(nn.Module):
    """An embedding of each pair of neighbouring tokens, hashed into a table."""

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.buckets = hp.bigram_vocab_size
        self.embed = Embedding(self.buckets, hp.bigram_dim, std=0.0)
        self.proj = CastLinear(hp.bigram_dim, hp.model_dim, (2 * hp.num_layers) ** -0.5, hp.ortho_init)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """tokens (B, T) -> (B, T, D); the last bucket stands for "no token before"."""
        t = tokens.to(torch.int32)
        pair = torch.bitwise_xor(36313 * t[:, 1:], 27191 * t[:, :-1]) % (self.buckets - 1)
        index = F.pad(pair, (1, 0), value=self.buckets - 1)
        return self.proj(self.embed(index).to(dtype)) * self.scale.to(dtype)


class ValueEmbedding(nn.Module):
    """A token embedding that some layers add to their V."""

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.embed = Embedding(hp.vocab_size, hp.ve_dim, std=0.01)
        self.proj = CastLinear(hp.ve_dim, hp.model_dim // hp.num_heads * hp.num_kv_heads, (2 * hp.num_layers) ** -0.5,
                               hp.ortho_init)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """tokens (B, T) -> (B, T, kv width)."""
        return self.proj(self.embed(tokens).to(dtype)) * self.scale.to(dtype)


class SoftcapCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of soft-capped logits, which are made and used up in chunks that stay in cache.

    The gradient is computed on the way forward, as in Liger kernels (arXiv:2410.10989): the logits are never kept.
    With u = sigmoid(2 z / c), c tanh(z / c) is 2 c u less a constant that the softmax does not see, and its slope is
    4 u (1 - u); sigmoid is four times faster than tanh on a CPU.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
        """hidden (N, D), weight (V, D), targets (N,) -> the mean in nats."""
        N, V = hidden.size(0), weight.size(0)
        fused = hidden.is_cuda or torch.compiler.is_compiling()  # chunks are for a CPU's cache, run eagerly
        chunk = max((1 << 27 if fused else 1 << 19) // V, 1)
        cast, wanted = weight.to(hidden.dtype), any(ctx.needs_input_grad[:2])
        loss = torch.zeros((), dtype=weight.dtype, device=hidden.device)
        to_hidden, to_weight = [], torch.zeros_like(weight) if wanted else None
        for h, y in zip(hidden.split(chunk), targets.unsqueeze(1).split(chunk)):
            u = full_precision(h @ cast.mT).mul_(2 / softcap).sigmoid_()
            log_p = F.log_softmax(u * (2 * softcap), dim=-1)
            loss = loss - log_p.gather(1, y).sum()
            if wanted:
                to_capped = log_p.exp_().scatter_add_(1, y, torch.full_like(y, -1, dtype=log_p.dtype))
                to_logits = to_capped.mul_(torch.addcmul(u, u, u, value=-1)).to(h.dtype)
                to_hidden.append(to_logits @ cast)
                to_weight += to_logits.mT @ h
        if wanted:
            ctx.save_for_backward(torch.cat(to_hidden).mul_(4 / N), to_weight.mul_(4 / N))
        return loss / N

    @staticmethod
    def backward(ctx, to_loss: Tensor):
        to_hidden, to_weight = ctx.saved_tensors
        return to_hidden * to_loss.to(to_hidden.dtype), to_weight * to_loss, None, None


class GPT(nn.Module):
    """The language model; computes in the dtype of its weights, or of the caller's autocast, for any T.

    model(tokens) -> logits (B, T, V); model(tokens, targets) -> mean cross-entropy in nats.
    """

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        L, D = hp.num_layers, hp.model_dim
        self.hp = hp
        self.tok_emb = Embedding(hp.vocab_size, D, hp.tied_embed_init_std)
        self.bigram = BigramHash(hp) if hp.bigram_vocab_size else None
        self.smear = SmearGate(hp) if hp.smear_gate else None
        self.skip_weights = nn.Parameter(torch.ones(min(L // 2, L - L // 2), D))
        self.blocks = nn.ModuleList(Block(hp, layer) for layer in range(L))
        self.ve_shared = ValueEmbedding(hp) if hp.ve_enabled else None
        self.ve_layer_scales = nn.ParameterList(torch.ones(1) for _ in hp.ve_layers) if hp.ve_enabled else None

    def hidden(self, tokens: Tensor) -> Tensor:
        """The normed stream before the output layer; tokens (B, T) -> (B, T, D)."""
        hp, device = self.hp, tokens.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) \
            else self.tok_emb.weight.dtype
        x = self.tok_emb(tokens).to(dtype)
        if self.bigram is not None:
            x = x + self.bigram(tokens, dtype)
        x = rms_norm(x)
        if self.smear is not None:
            x = self.smear(x, tokens)
        x0, v0, skips = x, None, []
        rotary = rotary_tables(tokens.size(1), hp.rope_dims, hp.rope_base, hp.rope_ntk_reference, device, dtype)
        shared = self.ve_shared(tokens, dtype) if self.ve_shared is not None else None
        encoder = hp.num_layers // 2
        for layer, block in enumerate(self.blocks):
            if layer >= encoder and skips:
                x = x + self.skip_weights[layer - encoder].to(dtype) * skips.pop()
            ve = None
            if shared is not None and layer in hp.ve_layers:
                ve = shared * self.ve_layer_scales[hp.ve_layers.index(layer)].to(dtype)
            x, raw = block(x, x0, rotary, ve, v0)
            if hp.value_residual and layer == 0:
                v0 = raw
            if layer < encoder:
                skips.append(x)
        return rms_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits by the tied embedding, at least float32; (..., D) -> (..., V)."""
        z = full_precision(F.linear(hidden, self.tok_emb.weight.to(hidden.dtype)))
        return self.hp.logit_softcap * torch.tanh(z / self.hp.logit_softcap)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        hidden = self.hidden(tokens)
        if targets is None:
            return self.logits(hidden)
        return SoftcapCrossEntropy.apply(hidden.flatten(0, 1), self.tok_emb.weight, targets.flatten(),
                                         self.hp.logit_softcap)


def compiled(function: Callable, **options) -> Callable:
    """torch.compile with a graph per shape, in which RoPE's tables are constants.

    Traced, their float64 powers and cosines would be worked out again in every kernel that reads them.
    """
    torch.compiler.assume_constant_result(rotary_tables)  # here, because it imports the compiler: a second
    return torch.compile(function, dynamic=False, **options)


MODEL_SETTINGS = (
    "vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "mlp_slope", "rope_base",
    "rope_dims", "rope_ntk_reference", "logit_softcap", "xsa_last_n", "ln_scale", "smear_gate", "smear_reset_at_bos",
    "bigram_vocab_size", "bigram_dim", "ve_enabled", "ve_dim", "ve_layers", "value_residual", "gated_attention",
)
EMBEDDINGS = ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight")


def role_of(name: str) -> str:
    """What a tensor is to the optimiser and the quantiser: attn, mlp, embed, matrix or control."""
    if name in EMBEDDINGS:
        return "embed"
    if name.startswith("blocks.") and name.endswith(".weight") and "attn_gate" not in name:
        return "attn" if ".attn." in name else "mlp"
    return "matrix" if name.endswith(("proj.weight", "attn_gate.weight")) else "control"


def knockouts(model: GPT) -> dict[str, tuple[str, float]]:
    """For each technique with weights, a parameter suffix and the value that switches it off in a trained model."""
    hp = model.hp
    return {name: edit for name, on, edit in (
        ("value_residual", hp.value_residual, ("vr_lambda", 0.0)),
        ("gated_attention", hp.gated_attention, ("attn_gate.bias", 30.0)),
        ("smear_gate", hp.smear_gate, ("smear.gate", -30.0)),
        ("bigram_hash", hp.bigram_vocab_size, ("bigram.scale", 0.0)),
        ("value_embedding", hp.ve_enabled, ("ve_shared.scale", 0.0)),
        ("unet_skips", hp.num_layers > 1, ("skip_weights", 0.0)),
    ) if on}


@torch.no_grad()
def technique_proofs(model: GPT, tokens: Tensor, targets: Tensor) -> dict[str, dict[str, float]]:
    """The loss on one batch with each technique as trained and with it switched off, in nats.

    A technique that is silently off shows two equal numbers.
    """
    base, proofs = model(tokens, targets).item(), {}
    for name, (suffix, value) in knockouts(model).items():
        changed = {key: p for key, p in model.named_parameters() if key.endswith(suffix)}
        kept = {key: p.clone() for key, p in changed.items()}
        for p in changed.values():
            p.fill_(value)
            if name == "value_residual":
                p[1] = 1.0  # V alone
        proofs[name] = {"loss": base, "loss_without": model(tokens, targets).item(),
                        "mean": sum(p.mean().item() for p in kept.values()) / len(kept)}
        for key, p in changed.items():
            p.copy_(kept[key])
    exclusive = [block.attn for block in model.blocks if block.attn.exclusive]
    if exclusive:
        for attn in exclusive:
            attn.exclusive = False
        proofs["xsa"] = {"loss": base, "loss_without": model(tokens, targets).item(), "layers": len(exclusive)}
        for attn in exclusive:
            attn.exclusive = True
    return proofs


# ----------------------------------------------------------------------------------------------------------
# 6 Scoring
#
# One scorer for validation, sliding windows and test-time training. Windows say what is read and which positions
# count; every position counts exactly once. The loss of position p is that of token p + 1 given tokens 0..p.

@dataclass(frozen=True)
class Score:
    """Summed loss in nats over scored positions, and the bytes that their targets stand for."""

    nats: float = 0.0
    positions: int = 0
    bytes: int = 0

    @property
    def val_loss(self) -> float:
        """Mean nats per token."""
        return self.nats / max(self.positions, 1)

    @property
    def val_bpb(self) -> float:
        """Bits per byte."""
        return self.nats / math.log(2) / max(self.bytes, 1)

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.positions + other.positions, self.bytes + other.bytes)

    def __str__(self) -> str:
        return f"val_loss:{self.val_loss:.8f} val_bpb:{self.val_bpb:.8f}"


def sliding_windows(positions: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows (start, end, first_scored), half-open, that score every position once, from left to right.

    The first window scores all it reads, every later one its last `stride` positions. The last ends at the final
    position and scores what is left, where published scripts score the tail again and again.
    """
    windows = [(0, min(seq_len, positions), 0)] if positions else []
    while windows and (first := windows[-1][1]) < positions:
        end = min(first + stride, positions)
        windows.append((max(end - seq_len, 0), end, first))
    return windows


def adaptive_temperature(logits: Tensor, low: float) -> Tensor:
    """Logits over T = clamp(1 - (1 - low)(1 - H / ln V), 0.9, 1.05), H the entropy of their softmax (#606)."""
    log_p = F.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    return logits / (1 - (1 - low) * (1 - entropy / math.log(logits.size(-1)))).clamp(0.9, 1.05)


def token_losses(model: GPT, tokens: Tensor, targets: Tensor, scored: int, temperature: float = 1.0) -> Tensor:
    """Nats of the last `scored` targets of each window; tokens, targets (B, T) -> (B, scored) float32.

    Only those positions go through the output layer.
    """
    hidden, wanted = model.hidden(tokens)[:, -scored:], targets[:, -scored:]
    fused = hidden.is_cuda or torch.compiler.is_compiling()
    part = len(hidden) if fused else max(256 // scored, 1)  # windows whose logits stay in a CPU's cache: 1.4 to 2x
    losses = []
    for h, y in zip(hidden.split(part), wanted.split(part)):
        logits = model.logits(h)
        if temperature != 1.0:
            logits = adaptive_temperature(logits, temperature)
        losses.append(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(-1, scored))
    return torch.cat(losses)


def window_batches(windows: list[tuple[int, int, int]], batch_tokens: int) -> Iterator[list[tuple[int, int, int]]]:
    """Neighbouring windows of one shape, at most batch_tokens long together."""
    batch: list[tuple[int, int, int]] = []
    for window in windows:
        start, end, first = window
        same = batch and (end - start, end - first) == (batch[0][1] - batch[0][0], batch[0][1] - batch[0][2])
        if batch and (not same or (len(batch) + 1) * (end - start) > batch_tokens):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def scoring_batch_tokens(hp: Hyperparameters, world: World, chunk: float = math.inf) -> int:
    """Tokens per scoring batch and rank; on a CPU a million activations, which its caches hold (1.4x from two million).

    Where `chunk` positions are scored at a time with EVAL_STRIDE, no more than they have windows for.
    """
    most = 131072 if world.device.type == "cuda" else 2 ** 20 // hp.model_dim
    in_chunk = chunk / hp.eval_stride / world.size * hp.eval_seq_len
    return int(max(hp.eval_seq_len, min(hp.val_batch_size // world.size, most, in_chunk)))


class Progress:
    """A log line now and then with the running score, the speed and the time left."""

    def __init__(self, log: RunLog, name: str, total: int, every: float = 15.0):
        self.log, self.name, self.total, self.every = log, name, total, every
        self.start = self.last = time.perf_counter()

    def due(self) -> bool:
        """Whether it is time for a line; asked first, because reading a score waits for the device."""
        return time.perf_counter() - self.last > self.every

    def __call__(self, done: int, score: Score, extra: str = "") -> None:
        """`done` of `total` positions are scored."""
        elapsed = time.perf_counter() - self.start
        if 0 < done < self.total:
            self.last = time.perf_counter()
            self.log(f"{self.name} positions:{done}/{self.total} val_bpb:{score.val_bpb:.4f} "
                     f"tokens/s:{done / elapsed:.0f} left:{elapsed / done * (self.total - done):.0f}s{extra}")


@torch.no_grad()
def evaluate(model: GPT, tokens: Tensor, byte_counts: Tensor, windows: list[tuple[int, int, int]], world: World,
             batch_tokens: int = 4096, temperature: float = 1.0, score_fn: Callable = token_losses,
             nll: Tensor | None = None, progress: Progress | None = None) -> Score:
    """Score windows exactly once, split over ranks.

    tokens       (positions + 1,) int32 on any device; byte_counts (positions,) int, bytes of each target
    windows      from sliding_windows, or a part of them
    batch_tokens tokens per forward pass and rank; the result does not depend on it, nor on the number of ranks
    score_fn     token_losses or its compiled form, which is given whole batches only: a rare shape is not worth a graph
    nll          (positions,) float32 on the CPU: receives this rank's losses, for audits
    Returns the same Score on every rank; sums are float64.
    """
    mine = world.shard(len(windows))
    total = torch.zeros(3, dtype=torch.float64, device=world.device)
    for batch in window_batches(windows[mine.start: mine.stop], batch_tokens):
        starts = torch.tensor([start for start, _, _ in batch], pin_memory=tokens.is_cuda)
        starts = starts.to(tokens.device, non_blocking=True)
        length, scored = batch[0][1] - batch[0][0], batch[0][1] - batch[0][2]
        index = starts.unsqueeze(1) + torch.arange(length + 1, device=tokens.device)
        text = tokens[index].to(world.device, torch.int64, non_blocking=True)
        whole = len(batch) == max(batch_tokens // length, 1)
        with world.autocast():
            losses = (score_fn if whole else token_losses)(model, text[:, :-1], text[:, 1:], scored, temperature)
        where = index[:, length - scored: length].to(byte_counts.device)
        total[0] += losses.double().sum()
        total[1] += losses.numel()
        total[2] += byte_counts[where].sum().to(world.device)
        if nll is not None:
            nll[where.cpu()] = losses.float().cpu()
        if progress and progress.due():
            progress(batch[-1][1] - windows[mine.start][2], Score(total[0].item(), 1, int(total[2].item())))
    nats, positions, count = world.sum_(total).tolist()
    return Score(nats, int(positions), int(count))


# ----------------------------------------------------------------------------------------------------------
# 7 Optimisers
#
# All parameters live in one vector and all gradients in another, sorted so that equal shapes lie side by side.
# Averaging, clipping, reducing over ranks and restoring are then one operation each, and a stack of equal
# matrices is a view. Muon takes the matrices, AdamW the rest.

class FlatParameters:
    """A model's parameters and gradients as two fp32 vectors; each parameter becomes a view.

    The gradient vector ends in a few spare slots that ride along with the reduction over ranks.
    """

    SLOTS = 4

    def __init__(self, model: nn.Module):
        self.parameters = dict(sorted(model.named_parameters(), key=lambda item: (tuple(item[1].shape), item[0])))
        self.offsets, total = {}, 0
        for name, p in self.parameters.items():
            self.offsets[name], total = total, total + -(-p.numel() // 16) * 16  # keep every view 64-byte aligned
        device = next(iter(self.parameters.values())).device
        self.weights = torch.zeros(total, device=device)
        self.reduced = torch.zeros(total + self.SLOTS, device=device)
        self.grads, self.slots = self.reduced[:total], self.reduced[total:]
        for name, p in self.parameters.items():
            view = self.view(self.weights, name)
            view.copy_(p.data)
            p.data, p.grad = view, self.view(self.grads, name)

    def view(self, vector: Tensor, name: str) -> Tensor:
        """A parameter's part of a vector, in its shape."""
        p = self.parameters[name]
        return vector[self.offsets[name]: self.offsets[name] + p.numel()].view(p.shape)

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """All parameters as they stand in a vector."""
        return {name: self.view(vector, name).detach() for name in self.parameters}

    def state_dict(self, vector: Tensor) -> dict[str, Tensor]:
        """Copies of them, on the CPU."""
        return {name: view.cpu().clone() for name, view in self.views(vector).items()}

    def stacks(self, key_of: Callable[[str], object]) -> list[tuple[object, list[str], Tensor, Tensor]]:
        """Runs of neighbours with one shape and one key (None: left out): key, names, weights, gradients (k, m, n)."""
        runs: list[tuple[object, list[str]]] = []
        for name, p in self.parameters.items():
            key = key_of(name)
            if key is None:
                continue
            last = runs[-1][1][-1] if runs else None
            adjacent = last and self.offsets[last] + -(-p.numel() // 16) * 16 == self.offsets[name]
            if adjacent and runs[-1][0] == key and self.parameters[last].shape == p.shape:
                runs[-1][1].append(name)
            else:
                runs.append((key, [name]))
        return [(key, names, *(self._stack(vector, names) for vector in (self.weights, self.grads)))
                for key, names in runs]

    def _stack(self, vector: Tensor, names: list[str]) -> Tensor:
        m, n = self.parameters[names[0]].shape
        return vector.as_strided((len(names), m, n), (-(-m * n // 16) * 16, n, 1), self.offsets[names[0]])


def newton_schulz(G: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Push the singular values of G towards 1, keeping its singular vectors: (m, n) or (k, m, n), same shape out.

    Five quintic iterations, in bf16 where nothing else is asked for. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(dtype).reshape(-1, *G.shape[-2:])
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = G.size(-2) > G.size(-1)
    X = X.mT if tall else X
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # sums inside the products
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: MomentUm Orthogonalized by Newton-Schulz, for matrices.

    params       2-D parameters; equal shapes are orthogonalised in one batched call
    lr           scaled by sqrt(max(1, rows / columns))
    momentum     Nesterov
    weight_decay decoupled: p <- p (1 - lr weight_decay)
    row_norm     afterwards give every row length 1 (#601), which cancels the square root
    world        ranks own disjoint parts of every stack, and its momentum, and share the updates
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
                 steps: int = 5, row_norm: bool = False, world: World | None = None,
                 orthogonalise: Callable = newton_schulz):
        super().__init__(list(params), dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.steps, self.row_norm, self.orthogonalise, self.world = steps, row_norm, orthogonalise, world
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon is for matrices; give AdamW the other parameters")
        self.stacks: list[tuple[dict, list[nn.Parameter], range, int]] = []  # group, matrices, own part, part size
        rank, size = (world.rank, world.size) if world else (0, 1)
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for stack in shapes.values():
                part = -(-len(stack) // size)
                own = range(min(rank * part, len(stack)), min((rank + 1) * part, len(stack)))
                self.stacks.append((group, stack, own, part))
        self.buffers = [torch.zeros(part, *stack[0].shape, device=stack[0].device) for _, stack, _, part in self.stacks]

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a gradient in `.grad`."""
        pending = []
        for (group, stack, own, part), buffer in zip(self.stacks, self.buffers):
            grads = torch.zeros_like(buffer)
            for slot, i in enumerate(own):
                if stack[i].grad is not None:
                    grads[slot] = stack[i].grad
            buffer.mul_(group["momentum"]).add_(grads)
            update = self.orthogonalise(grads.add_(buffer, alpha=group["momentum"]), self.steps)
            if self.row_norm:
                update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
            if self.world is None or self.world.size == 1:
                pending.append((group, stack, update, None))
            else:
                shared = update.new_empty(part * self.world.size, *update.shape[1:])
                gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the latter before torch 2.13
                work = gather(shared, update.contiguous(), async_op=True)
                pending.append((group, stack, shared, work))
        for group, stack, update, work in pending:
            if work is not None:
                work.wait()
            rows, columns = stack[0].shape
            scale = 1.0 if self.row_norm else max(1.0, rows / columns) ** 0.5
            moved = [(p, u) for p, u in zip(stack, update) if p.grad is not None]
            if moved:
                weights, updates = zip(*moved)
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, updates, alpha=-group["lr"] * scale)

    def state_dict(self) -> dict:
        """Settings and the whole momentum of every stack, the same on any number of ranks; a collective."""
        whole = []
        for (_, stack, own, _), buffer in zip(self.stacks, self.buffers):
            full = buffer.new_zeros(len(stack), *buffer.shape[1:])
            full[own.start: own.stop] = buffer[: len(own)]
            whole.append((self.world.sum_(full) if self.world else full).cpu())
        return super().state_dict() | {"momentum": whole}

    def load_state_dict(self, state: dict) -> None:
        """Take this rank's part of what state_dict returned."""
        for group, saved in zip(self.param_groups, state["param_groups"]):  # in place: the stacks hold these groups
            group.update({key: value for key, value in saved.items() if key != "params"})
        for (_, _, own, _), buffer, full in zip(self.stacks, self.buffers, state["momentum"]):
            buffer[: len(own)] = full[own.start: own.stop].to(buffer.device)


class Optimisers:
    """Muon for the matrices, AdamW for embeddings and for control tensors, under one schedule."""

    def __init__(self, flat: FlatParameters, hp: Hyperparameters, world: World, orthogonalise: Callable):
        names: dict[str, list[str]] = {"matrix": [], "embed": [], "control": []}
        for name in flat.parameters:
            role = role_of(name)
            names["matrix" if role in ("attn", "mlp", "matrix") else role].append(name)
        of = lambda kind: [flat.parameters[name] for name in names[kind]]
        self.hp, self.names, self.flat = hp, names, flat
        self.muon = Muon(of("matrix"), hp.matrix_lr, hp.muon_momentum, hp.muon_wd, hp.muon_backend_steps,
                         hp.muon_row_norm, world, orthogonalise)
        self.adamw = torch.optim.AdamW(
            [dict(params=of("embed"), lr=hp.tied_embed_lr), dict(params=of("control"), lr=hp.scalar_lr)],
            betas=(hp.beta1, hp.beta2), eps=hp.adam_eps, weight_decay=hp.adam_wd, fused=True)
        self.base_lr = [group["lr"] for group in self.groups]

    @property
    def groups(self) -> list[dict]:
        """Muon's and AdamW's groups as they are; loading a state makes new ones."""
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self, scale: float, momentum: float) -> None:
        """Update all weights with every learning rate times `scale`."""
        for group, lr in zip(self.groups, self.base_lr):
            group["lr"] = lr * scale
        self.muon.param_groups[0]["momentum"] = momentum
        self.muon.step()
        self.adamw.step()

    def reset(self) -> None:
        """Forget all moments, as before the first step."""
        for buffer in self.muon.buffers:
            buffer.zero_()
        self.adamw.state.clear()

    def describe(self) -> Iterator[str]:
        """One log line per group, which together hold every parameter."""
        decays = {"matrix": self.hp.muon_wd}
        for (kind, names), lr in zip(self.names.items(), self.base_lr):
            count = sum(self.flat.parameters[name].numel() for name in names)
            yield (f"optimiser group:{kind} method:{'muon' if kind == 'matrix' else 'adamw'} tensors:{len(names)} "
                   f"params:{count} lr:{lr} weight_decay:{decays.get(kind, self.hp.adam_wd)}")


def lr_scale(hp: Hyperparameters, step: int, elapsed: float = 0.0, reserve: float = 0.0) -> float:
    """The learning rate at a step as a share of its base: 1, then linearly to 0.

    elapsed   training seconds so far; reserve  seconds of the clock that quantisation needs.
    With a wall clock the warmdown takes as long as warmdown_iters steps have taken on average; without one it is
    the last warmdown_iters steps.
    """
    if hp.max_wallclock_seconds and step and elapsed:
        warmdown = hp.warmdown_iters * elapsed / step
        left = max(hp.max_wallclock_seconds - reserve - elapsed, 0.0)
        by_clock = left / warmdown if left < warmdown else 1.0
    else:
        by_clock = 1.0
    if hp.max_wallclock_seconds or not hp.warmdown_iters:
        return by_clock
    return min(1.0, max(hp.iterations - step, 0) / hp.warmdown_iters)


def muon_momentum(hp: Hyperparameters, step: int) -> float:
    """Muon's momentum at a step: a linear warm-up."""
    share = min(step / hp.muon_momentum_warmup_steps, 1.0) if hp.muon_momentum_warmup_steps else 1.0
    return hp.muon_momentum_warmup_start + (hp.muon_momentum - hp.muon_momentum_warmup_start) * share


def clip_gradients(grads: Tensor, limit: float) -> None:
    """Scale the gradient vector down to the norm `limit`, without a host synchronisation."""
    if limit:
        grads.mul_((limit / (grads.norm() + 1e-6)).clamp(max=1.0))


# ----------------------------------------------------------------------------------------------------------
# 8 Averaging
#
# The average of late weights is better than the last weights. Both averages are fp32 vectors.

class EMA:
    """Exponential moving average from the first step on, without bias correction."""

    def __init__(self, tensor: Tensor, decay: float):
        self.average, self.decay = tensor.detach().float().clone(), decay

    def update(self, tensor: Tensor) -> None:
        """average <- decay average + (1 - decay) tensor."""
        self.average.lerp_(tensor.detach().float(), 1 - self.decay)


class SWA:
    """Stochastic weight averaging: the plain mean of the snapshots. Izmailov et al. 2018, arXiv:1803.05407."""

    def __init__(self):
        self.average: Tensor | None = None
        self.count = 0

    def update(self, tensor: Tensor) -> None:
        """Add a snapshot."""
        self.count += 1
        if self.average is None:
            self.average = tensor.detach().float().clone()
        else:
            self.average.lerp_(tensor.detach().float(), 1 / self.count)


# ----------------------------------------------------------------------------------------------------------
# 9 QAT
#
# Around a step's forward and backward passes every quantised matrix holds its fake-quantised value; afterwards
# its gradient is multiplied by the derivative of the rounding and the weight restored. The compiled model never
# knows: a flag inside the graph is folded away by the compiler, which is how #606, #545 and #576 trained without
# the QAT that they logged (#315).

def matrix_max_codes(hp: Hyperparameters, names: Iterable[str]) -> dict[str, int]:
    """The largest code of every matrix that is quantised, by role."""
    bits = {"attn": hp.attn_bits, "mlp": hp.mlp_bits}
    codes = {}
    for name in names:
        if (role := role_of(name)) in bits:
            late = int(name.split(".")[1]) >= hp.num_layers - hp.int6_last_n
            codes[name] = max_code_of(6 if late else bits[role])
    return codes


def qat_active(hp: Hyperparameters, scale: float) -> bool:
    """Whether a step with this learning-rate scale is fake-quantised."""
    return hp.qat_enabled or hp.late_qat and scale < hp.late_qat_threshold


def soft_round_alpha(hp: Hyperparameters, scale: float) -> float:
    """Sharpness of the soft rounding: 1 at the threshold, soft_round_alpha at the end."""
    return 1 + (hp.soft_round_alpha - 1) * max(0.0, 1 - scale / hp.late_qat_threshold)


def grid_units(weights: Tensor, max_code: int, multiplier: float | Tensor) -> tuple[Tensor, Tensor]:
    """Weights in steps of the export grid, clamped to it, and the steps (..., out, 1)."""
    scales = storable(row_scales(weights, max_code, multiplier)).unsqueeze(-1)
    return (weights / scales).clamp_(-max_code, max_code), scales


def fake_quantize(weights: Tensor, max_code: int, multiplier: Tensor, alpha: Tensor | None = None) -> Tensor:
    """Weights rounded to the grid: softly with sharpness alpha, hard without."""
    y, scales = grid_units(weights, max_code, multiplier)
    return (torch.round(y) if alpha is None else soft_round(y, alpha)) * scales


def fake_quantize_slope(weights: Tensor, max_code: int, multiplier: Tensor, alpha: Tensor) -> Tensor:
    """The derivative of the soft rounding at the weights."""
    return soft_round_gradient(grid_units(weights, max_code, multiplier)[0], alpha)


class FakeQuantizer:
    """Puts weights on the export grid for the forward and backward passes of a step, and takes them off again.

    The grid is row_scales with the rate multiplier, from the weights of each step. Multiplier and sharpness reach the
    device as tensors: a Python number would wait for it, and recompile at every change.
    """

    def __init__(self, flat: FlatParameters, max_codes: Mapping[str, int], multiplier: float = 1.0,
                 wrap: Callable = lambda function: function):
        self.stacks = flat.stacks(max_codes.get)
        self.kept = [torch.empty_like(weights) for _, _, weights, _ in self.stacks]
        self.matrices = sum(len(kept) for kept in self.kept)
        self.multiplier, self.soft = multiplier, False
        self.on_device = torch.ones(2, dtype=torch.float64, device=flat.weights.device)  # multiplier, sharpness
        self.rounding, self.slope = wrap(fake_quantize), wrap(fake_quantize_slope)

    @torch.no_grad()
    def quantize(self, alpha: float | None) -> None:
        """Replace the weights: soft rounding with sharpness alpha, or None for hard rounding."""
        self.soft = alpha is not None
        multiplier, sharpness = self.on_device
        multiplier.fill_(self.multiplier)
        sharpness.fill_(alpha or 0.0)
        for (max_code, _, weights, _), kept in zip(self.stacks, self.kept):
            kept.copy_(weights)
            rounded = self.rounding(weights, max_code, multiplier, sharpness) if self.soft else \
                fake_quantize(weights, max_code, multiplier)
            weights.copy_(rounded)

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the weights back bit for bit; straight through, or times the derivative of the soft rounding."""
        for (max_code, _, weights, grads), kept in zip(self.stacks, self.kept):
            weights.copy_(kept)
            if self.soft:
                grads.mul_(self.slope(weights, max_code, *self.on_device))

    @torch.no_grad()
    def distance(self) -> float:
        """Mean distance of the weights to their grid, in steps; 0.25 where nothing draws them there."""
        total = torch.zeros((), device=self.kept[0].device, dtype=torch.float64)
        for max_code, _, weights, _ in self.stacks:
            y, _ = grid_units(weights, max_code, self.multiplier)
            total += (y - torch.round(y)).abs().sum(dtype=torch.float64)
        return total.item() / sum(kept.numel() for kept in self.kept)


# ----------------------------------------------------------------------------------------------------------
# 10 Training
#
# The loop is below, in full. Its clock starts after the warm-up steps and stops during validation. Nothing in a
# step waits for the device: loss, clock and stop request travel at the end of the gradient vector, so all ranks
# read the same numbers, one step late, and take the same decisions.

def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use."""
    return next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))),
                None)


def wants_compile(hp: Hyperparameters, world: World, params: int, log: RunLog) -> bool:
    """COMPILE, or where it is auto: on CUDA always, on a CPU where the run is long enough to earn it back."""
    if hp.compile != "auto":
        return hp.compile == "1"
    if world.device.type == "cpu" and 6.0 * params * hp.iterations * hp.train_batch_tokens < 2e14:
        return False
    import importlib.util
    missing = "C++ compiler" if not cpp_compiler() else \
        "Triton" if world.device.type == "cuda" and not importlib.util.find_spec("triton") else ""
    if missing:
        log(f"compile:off reason:no {missing} found, running eagerly")
    return not missing


def activation_bytes(hp: Hyperparameters, world: World, compiling: bool) -> float:
    """About what a token leaves behind for the backward pass, fitted to #606's 26.2 GB for 98,304 tokens.

    Run eagerly on CUDA, autocast keeps float32 copies besides; two and a half times as much is counted, not measured.
    """
    fused = 2 * hp.num_layers * (14 + 3 * hp.mlp_mult) * hp.model_dim + 12 * hp.vocab_size
    return fused if compiling or world.device.type == "cpu" else 2.5 * fused


def micro_batch(hp: Hyperparameters, world: World, sequences: int, compiling: bool) -> int:
    """Sequences per micro-step on this rank: GRAD_ACCUM_STEPS, or as many as fit into the device's memory."""
    if world.device.type == "cuda":
        tokens = torch.cuda.mem_get_info(world.device)[0] * 0.7 / activation_bytes(hp, world, compiling)
    else:  # two million activations: 1.3 times faster than four million
        tokens = 2 ** 21 // hp.model_dim
    least = max(math.ceil(sequences * hp.train_seq_len / tokens), 1)
    equal = next((n for n in range(least, 2 * least) if sequences % n == 0), least)  # parts of one size share a graph
    return max(math.ceil(sequences / (hp.grad_accum_steps or equal)), 1)


class Stopwatch:
    """A clock that can stand still."""

    def __init__(self, elapsed: float = 0.0):
        self.before, self.started = elapsed, None

    def start(self) -> None:
        """Run."""
        self.started = time.perf_counter()

    def stop(self) -> None:
        """Stand still."""
        self.before, self.started = self.elapsed, None

    @property
    def elapsed(self) -> float:
        """Seconds that the clock has run."""
        return self.before + (time.perf_counter() - self.started if self.started is not None else 0.0)


class Interrupted(Exception):
    """SIGTERM came; a checkpoint is written."""


class Stepper:
    """What one optimiser step needs: data, compiled model, flat parameters, optimisers, fake quantiser."""

    def __init__(self, hp: Hyperparameters, model: GPT, stream: TokenStream, world: World, compiling: bool):
        wrap = compiled if compiling else (lambda function: function)
        self.hp, self.world, self.stream = hp, world, stream
        self.model, self.score_fn = wrap(model), wrap(token_losses)
        self.flat = FlatParameters(model)
        world.broadcast_(self.flat.weights)  # the same seed gives other orthogonal matrices on another CPU
        self.optimisers = Optimisers(self.flat, hp, world, wrap(partial(newton_schulz, dtype=world.dtype)))
        self.qat = FakeQuantizer(self.flat, matrix_max_codes(hp, self.flat.parameters), wrap=wrap)
        self.sequences = hp.train_batch_tokens // hp.train_seq_len
        self.mine = world.shard(self.sequences)
        self.micro = micro_batch(hp, world, len(self.mine), compiling)

    def batch(self) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of the next step; the copy runs while the device still computes."""
        rows = self.stream.step(self.hp.train_batch_tokens, self.hp.train_seq_len)
        rows = torch.from_numpy(rows[self.mine.start: self.mine.stop])
        pair = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if self.world.device.type == "cuda":
            pair = tuple(t.pin_memory().to(self.world.device, non_blocking=True) for t in pair)
        return pair

    def step(self, scale: float, momentum: float, qat_on: bool, elapsed: float = 0.0, stop: bool = False) -> None:
        """One update. Loss, clock and stop request end up, summed over ranks, in the gradient vector's slots."""
        hp, flat = self.hp, self.flat
        x, y = self.batch()
        if qat_on:
            self.qat.quantize(soft_round_alpha(hp, scale) if hp.soft_round_qat else None)
        flat.reduced.zero_()
        for micro_x, micro_y in zip(x.split(self.micro), y.split(self.micro)):
            if not len(micro_x):
                break  # more ranks than sequences
            with self.world.autocast():
                loss = self.model(micro_x, micro_y) * (len(micro_x) / self.sequences)
            loss.backward()
            flat.slots[0] += loss.detach()
        if qat_on:
            self.qat.restore()
        flat.slots[1].fill_(elapsed)
        flat.slots[2].fill_(float(stop))
        self.world.sum_(flat.reduced)
        clip_gradients(flat.grads, hp.grad_clip_norm)
        self.optimisers.step(scale, momentum)

    def warm_up(self) -> None:
        """Compile everything and fill the allocators, QAT included, then restore what the steps changed."""
        hp, initial = self.hp, self.flat.weights.clone()
        for i in range(hp.warmup_steps):
            self.step(1.0, hp.muon_momentum, qat_on=i == 0 and (hp.late_qat or hp.qat_enabled))
        self.flat.weights.copy_(initial)
        self.optimisers.reset()
        self.stream.position = 0

    def state(self) -> dict:
        """Everything a checkpoint needs of it; a collective."""
        return dict(weights=self.flat.weights.cpu(), muon=self.optimisers.muon.state_dict(),
                    adamw=self.optimisers.adamw.state_dict(), position=self.stream.position,
                    multiplier=self.qat.multiplier)

    def load_state(self, state: dict) -> None:
        """Continue from what `state` returned."""
        self.flat.weights.copy_(state["weights"])
        self.optimisers.muon.load_state_dict(state["muon"])
        self.optimisers.adamw.load_state_dict(state["adamw"])
        self.stream.position, self.qat.multiplier = state["position"], state["multiplier"]


class Reports:
    """Losses, clock and stop requests of finished steps, read one step late so that no step waits for the device."""

    def __init__(self, hp: Hyperparameters, world: World, log: RunLog, watch: Stopwatch, step: int, reserve: float,
                 bpb_per_nat: float):
        self.hp, self.world, self.log, self.watch, self.reserve = hp, world, log, watch, reserve
        self.bpb_per_nat = bpb_per_nat
        self.pending: deque[tuple[int, int, float, Tensor, torch.cuda.Event | None]] = deque()
        self.lag = 1 if world.device.type == "cuda" else 0
        self.first_step, self.first_second = step, watch.elapsed
        self.finished, self.clock = step, watch.elapsed  # the clock that all ranks agree on, and its step
        self.stopping, self.loss, self.saved = False, math.nan, step

    def post(self, step: int, scale: float, slots: Tensor) -> None:
        """A step is on its way; start to copy its slots to the host."""
        event = None
        if self.world.device.type == "cuda":
            slots = torch.empty(len(slots), pin_memory=True).copy_(slots, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            slots = slots.clone()
        self.pending.append((step, step - len(self.pending), scale, slots, event))

    def read(self, lag: int) -> None:
        """Read all but the newest `lag` steps. Raises UserError on a loss that is not finite."""
        while len(self.pending) > lag:
            step, self.finished, scale, slots, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            self.loss, clock, stop = slots[:3].tolist()
            if not math.isfinite(self.loss):
                raise UserError(f"the loss of step {step + 1} is {self.loss}; {self.remedy()}")
            self.clock = clock / self.world.size
            self.stopping |= stop > 0
            seconds = self.watch.elapsed
            self.log.metric("train", step=step + 1, loss=self.loss, lr_scale=scale, seconds=round(seconds, 3))
            if (step + 1) % self.hp.train_log_every == 0 or step < 5 or step + 1 == self.hp.iterations:
                self.log(self.line(step + 1, scale, seconds))
            else:
                self.log.status(self.line(step + 1, scale, seconds, brief=True))

    def remedy(self) -> str:
        """What to do about numbers that are not finite."""
        return f"lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR{self.last_checkpoint()}"

    def last_checkpoint(self) -> str:
        """Where a run that ends here can be taken up again."""
        return f"; the last checkpoint is of step {self.saved}" if self.saved else "; there is no checkpoint"

    def line(self, step: int, scale: float, seconds: float, brief: bool = False) -> str:
        """The log line of a finished step; a brief one fits a terminal of 80 columns."""
        hp, pace = self.hp, (seconds - self.first_second) / (step - self.first_step)
        left = (hp.iterations - step) * pace
        if hp.max_wallclock_seconds:
            left = min(left, max(hp.max_wallclock_seconds - self.reserve - seconds, 0.0))
        if brief:
            return (f"step:{step}/{hp.iterations} loss:{self.loss:.4f} bpb:{self.loss * self.bpb_per_nat:.4f} "
                    f"{1000 * pace:.1f}ms tokens/s:{hp.train_batch_tokens / pace:.0f} left:{left:.0f}s")
        return (f"step:{step}/{hp.iterations} train_loss:{self.loss:.4f} train_bpb:{self.loss * self.bpb_per_nat:.4f} "
                f"lr_scale:{scale:.4f} time:{seconds:.1f}s step_avg:{1000 * pace:.1f}ms "
                f"tokens/s:{hp.train_batch_tokens / pace:.0f} left:{left:.0f}s")

    def elapsed_at(self, step: int) -> float:
        """The agreed clock, carried forward to the start of a step."""
        return self.clock * step / self.finished if self.finished else 0.0

    def out_of_time(self, step: int) -> bool:
        """Whether the clock would run out in this step."""
        limit = self.hp.max_wallclock_seconds
        return bool(limit and self.finished) and self.elapsed_at(step + 1 + self.lag) > limit - self.reserve


# What a resumed run may change: nothing that its weights depend on.
FREE_ON_RESUME = ("run_id", "stages", "artifact", "resume", "device", "compile", "attention", "train_log_every",
                  "val_loss_every", "val_batch_size", "checkpoint_every", "tensorboard", "grad_accum_steps", "ignored",
                  "skip_sliding", "use_polyak", "polyak_decay")


def settings_that_matter(hp: Hyperparameters, world: World, stream: TokenStream) -> dict[str, object]:
    """What a checkpoint must share with the run that resumes it: settings, arithmetic, and how much text there is."""
    return {key: value for key, value in dataclasses.asdict(hp).items()
            if key not in FREE_ON_RESUME and not key.startswith(("eval_", "ttt_"))
            } | {"dtype": str(world.dtype)[6:], "train_tokens": stream.total}


CHECKPOINT_KEYS = {"settings", "step", "elapsed", "weights", "muon", "adamw", "position", "multiplier", "qat_proof",
                   "ema", "swa", "swa_count"}


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write checkpoint.pt whole or not at all; the one before it stays as checkpoint.previous.pt."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = folder / "checkpoint.pt"
    if path.exists():
        os.replace(path, folder / "checkpoint.previous.pt")
    write_atomically(path, buffer.getvalue())


def newest_checkpoint(folder: Path) -> Path:
    """The file that a run resumes from."""
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"RESUME=1, but {folder} has no checkpoint.pt; start without RESUME, under another RUN_ID")


def load_checkpoint(folder: Path, settings: Mapping[str, object]) -> dict:
    """The newest checkpoint of a run, refused where what settings_that_matter returns differs."""
    newest = newest_checkpoint(folder)
    try:
        state = torch.load(newest, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds on a damaged file
        raise UserError(f"{newest} cannot be read ({type(error).__name__}); delete it to resume from the one "
                        f"before it") from None
    if not isinstance(state, dict) or not CHECKPOINT_KEYS <= state.keys():
        raise UserError(f"{newest} is not a checkpoint of this script; delete it to resume from the one before it")
    if differ := [key.upper() for key, value in settings.items() if state["settings"].get(key) != value]:
        raise UserError(f"the checkpoint in {folder} was made with other settings: {', '.join(differ)}; resume with "
                        f"the same settings, or start another RUN_ID")
    return state


@torch.no_grad()
def training_proofs(model: GPT, flat: FlatParameters, qat: FakeQuantizer, qat_proof: dict, raw: Tensor,
                    x: Tensor, y: Tensor) -> dict[str, dict]:
    """Measured evidence that each technique of training was on, for the exported weights on one batch."""
    exported = flat.weights.clone()
    proofs = {"techniques": technique_proofs(model, x, y), "qat": None,
              "averaging": {"distance_from_raw": ((exported - raw).norm() / raw.norm()).item()}}
    if qat_proof:
        proofs["qat"] = qat_proof | {"distance_averaged": qat.distance(), "loss": model(x, y).item()}
        qat.quantize(None)
        proofs["qat"]["loss_rounded"] = model(x, y).item()
        flat.weights.copy_(raw)
        proofs["qat"]["distance_raw"] = qat.distance()
        flat.weights.copy_(exported)
    return proofs


@dataclass
class Trained:
    """What training hands on: the exported weights, whether QAT ran, facts and proofs for result.json."""

    weights: dict[str, Tensor]
    qat_ran: bool
    facts: dict
    proofs: dict


def train(hp: Hyperparameters, model: GPT, stream: TokenStream, world: World, log: RunLog, budget: Budget,
          folder: Path, compiling: bool, validate: Callable[[Callable], Score], rehearse: Callable[[], float],
          forecast: Callable[[Tensors], tuple[float, float]], bpb_per_nat: float = math.nan) -> Trained:
    """Train `model` in place and return the averaged weights.

    validate  scores the model as it stands, given a scoring function;  rehearse  quantises once and returns the
    seconds that it takes;  forecast  gives the rate multiplier with which weights will fit, and their bytes when
    packed;  bpb_per_nat  turns a loss into bits per byte of the validation text, for the log.
    Raises UserError on a loss that is not finite, Interrupted after SIGTERM.
    """
    stepper = Stepper(hp, model, stream, world, compiling)
    flat, qat = stepper.flat, stepper.qat
    for line in stepper.optimisers.describe():
        log(line)
    activations = stepper.micro * hp.train_seq_len * activation_bytes(hp, world, compiling)
    log(f"train compile:{int(compiling)} dtype:{str(world.dtype)[6:]} sequences_per_step:{stepper.sequences} "
        f"micro_batch:{stepper.micro}x{hp.train_seq_len} micro_steps:{math.ceil(len(stepper.mine) / stepper.micro)} "
        f"activations:{activations / 2**20:.0f}MiB (estimate)")
    with budget.phase("warm-up", counted=False):
        stepper.warm_up()
    if breaks := torch._dynamo.utils.counters["graph_break"] if compiling else {}:
        log(f"compile:split graph_breaks:{sum(breaks.values())} first:{next(iter(breaks)).splitlines()[0]}")
    rows = torch.from_numpy(stream.sample(8, hp.train_seq_len + 1, hp.seed)).to(world.device)
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # what the proofs are measured on
    reserve = 0.0
    if hp.max_wallclock_seconds and "quantize" in hp.stages:
        with budget.phase("rehearsal", counted=False):
            start = time.perf_counter()
            with world.autocast():
                technique_proofs(model, x, y)
            reserve = world.max(time.perf_counter() - start + rehearse()) * 1.15 + 0.5
        log(f"reserve seconds:{reserve:.1f} for calibration, quantisation and packing, measured")
        if reserve > hp.max_wallclock_seconds / 2:
            raise UserError(f"quantisation takes {reserve:.0f}s here, more than half of MAX_WALLCLOCK_SECONDS="
                            f"{hp.max_wallclock_seconds:.0f}; raise it or lower GPTQ_CALIB_SEQUENCES")

    ema, swa, watch, step, qat_proof = EMA(flat.weights, hp.ema_decay), SWA(), Stopwatch(), 0, {}
    matters = settings_that_matter(hp, world, stream)
    if hp.resume:
        state = load_checkpoint(folder, matters)
        stepper.load_state(state)
        ema.average.copy_(state["ema"])
        swa.count, swa.average = state["swa_count"], None if state["swa"] is None else state["swa"].to(world.device)
        watch, step, qat_proof = Stopwatch(state["elapsed"]), state["step"], state["qat_proof"]
        log(f"resumed step:{step} elapsed:{watch.elapsed:.1f}s")
    reports = Reports(hp, world, log, watch, step, reserve, bpb_per_nat)

    def checkpoint() -> None:
        reports.read(lag=0)  # never save weights whose loss is not finite
        if not torch.isfinite(flat.weights).all():  # the next step's loss will stop the run
            return
        state = stepper.state()
        if world.rank == 0:
            save_checkpoint(folder, state | dict(
                settings=matters, step=step, elapsed=watch.elapsed, qat_proof=qat_proof,
                ema=ema.average.cpu(), swa=None if swa.average is None else swa.average.cpu(), swa_count=swa.count))
        reports.saved = step
        world.barrier()  # no rank may end, and take the others with it, before the file is whole
        log(f"checkpoint step:{step} file:{folder / 'checkpoint.pt'}")

    stop_requested = threading.Event()
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: stop_requested.set())
    world.barrier()
    watch.start()
    while True:
        reports.read(reports.lag)
        last = step >= hp.iterations or reports.out_of_time(step)
        if last or reports.stopping:
            break
        scale = lr_scale(hp, step, reports.elapsed_at(step), reserve)
        # 1. validation, with the clock stopped
        if hp.val_loss_every and step and step % hp.val_loss_every == 0:
            world.synchronize()
            watch.stop()
            with budget.phase("validation", counted=False):
                score = validate(stepper.score_fn)
            log(f"step:{step}/{hp.iterations} {score} time:{watch.elapsed:.1f}s")
            log.metric("validation", step=step, loss=score.val_loss, bpb=score.val_bpb, seconds=watch.elapsed)
            watch.start()
        # 2. late QAT: settle the grid when it starts
        qat_on = bool(qat_proof) or qat_active(hp, scale)  # a clock's scale may rise again for a step
        if qat_on and not qat_proof:
            qat.multiplier = world.max(forecast(flat.views(flat.weights))[0])
            qat_proof = {"first_step": step + 1, "multiplier": qat.multiplier, "distance_before": qat.distance()}
            log(f"qat:on step:{step + 1} lr_scale:{scale:.4f} "
                f"kind:{'soft-round' if hp.soft_round_qat else 'straight-through'} matrices:{qat.matrices} "
                f"multiplier:{qat.multiplier:.4f} grid_distance:{qat_proof['distance_before']:.4f}")
        # 3. the step and the averages
        stepper.step(scale, muon_momentum(hp, step), qat_on, watch.elapsed, stop_requested.is_set())
        ema.update(flat.weights)
        if scale < hp.swa_threshold and (step + 1) % hp.swa_every == 0:
            swa.update(flat.weights)
        reports.post(step, scale, flat.slots)
        step += 1
        if scale < 1 and step % hp.train_log_every == 0 and world.rank == 0:
            multiplier, size = forecast(flat.views(ema.average))
            log(f"forecast step:{step} multiplier:{multiplier:.4f} model:{size:.0f}B")
        if hp.checkpoint_every and step % hp.checkpoint_every == 0:
            checkpoint()
    reports.read(lag=0)
    world.synchronize()
    watch.stop()
    if not torch.isfinite(flat.weights).all():
        raise UserError(f"the weights are not finite after step {step}; {reports.remedy()}")
    if world.max(float(stop_requested.is_set())):  # also one that came in the last step
        checkpoint()
        raise Interrupted(f"stopped by SIGTERM after step {step}{reports.last_checkpoint()}; "
                          f"RUN_ID={folder.name} RESUME=1 continues from there")
    signal.signal(signal.SIGTERM, previous_handler)

    seconds = world.max(watch.elapsed)
    budget.add("train", seconds)
    step_ms = 1000 * (seconds - reports.first_second) / max(step - reports.first_step, 1)
    facts = {"params": sum(p.numel() for p in model.parameters()), "steps": step, "train_seconds": seconds,
             "step_ms": step_ms, "tokens_seen": step * hp.train_batch_tokens,
             "compiled": compiling, "peak_memory": world.peak_memory(), "reserve_seconds": reserve}
    log(f"trained steps:{step} time:{seconds:.1f}s step_avg:{step_ms:.2f}ms tokens:{facts['tokens_seen']} "
        f"peak_memory:{facts['peak_memory'] / 2**20:.0f}MiB")
    with budget.phase("average"):
        raw = flat.weights.clone()
        averages = {"ema": ema.average, "swa": swa.average if swa.count else raw, "none": raw}
        chosen = hp.averaging
        if chosen == "swa" and not swa.count:
            log("averaging: SWA has no snapshot (SWA_EVERY, SWA_THRESHOLD), the raw weights are exported")
            chosen = "none"
        flat.weights.copy_(averages[chosen])
    with budget.phase("proofs"):
        with world.autocast():
            proofs = training_proofs(model, flat, qat, qat_proof, raw, x, y)
    proofs["averaging"] |= {"exported": chosen, "swa_snapshots": swa.count}
    return Trained(flat.state_dict(flat.weights), bool(qat_proof), facts, proofs)


# ----------------------------------------------------------------------------------------------------------
# 11 GPTQ
#
# Each matrix is rounded column by column, and every column's error is moved onto the columns that are not rounded
# yet, weighted by the Hessian of the layer's output error, H = mean x xT over training tokens. Everything here
# touches training data, so it runs inside the training clock (#606 was closed because it did not).

@torch.no_grad()
def collect_hessians(model: GPT, sequences: np.ndarray, world: World, batch_tokens: int = 16384) -> dict[str, Tensor]:
    """Mean x xT of the inputs of every block matrix, (in, in) float32, over sequences (N, T); summed over ranks.

    c_q, c_k and c_v read the same input and share one tensor.
    """
    hessians: dict[str, Tensor] = {}
    readers: list[tuple[nn.Module, list[str]]] = []
    for i, block in enumerate(model.blocks):
        readers += [(block.attn.c_q, [f"blocks.{i}.attn.c_{kind}.weight" for kind in "qkv"]),
                    (block.attn.proj, [f"blocks.{i}.attn.proj.weight"]),
                    (block.mlp.fc, [f"blocks.{i}.mlp.fc.weight"]), (block.mlp.proj, [f"blocks.{i}.mlp.proj.weight"])]

    def accumulate(hessian: Tensor) -> Callable:
        def hook(_module, inputs):
            x = inputs[0].flatten(0, -2).float()
            hessian.addmm_(x.mT, x)
        return hook

    hooks = []
    for module, names in readers:
        hessian = torch.zeros(module.in_features, module.in_features, device=world.device)
        hessians.update(dict.fromkeys(names, hessian))
        hooks.append(module.register_forward_pre_hook(accumulate(hessian)))
    mine = world.shard(len(sequences))
    for part in torch.from_numpy(sequences[mine.start: mine.stop]).split(max(batch_tokens // sequences.shape[1], 1)):
        if len(part):
            with world.autocast():
                model.hidden(part.to(world.device))
    for hook in hooks:
        hook.remove()
    for _, names in readers:
        world.sum_(hessians[names[0]]).div_(sequences.size)
    return hessians


def inverse_cholesky(hessian: Tensor, damp: float) -> Tensor:
    """Upper triangular U with inverse(H + damp mean(diag H) I) = UT U; (k, n, n), the dtype of H.

    With H = R RT for an upper triangular R (the Cholesky factor of H read backwards), U is the inverse of R: one
    factorisation where the paper takes three. What fails in float32 is tried in float64, then with more damping.
    """
    n = hessian.size(-1)
    eye = torch.eye(n, dtype=hessian.dtype, device=hessian.device)
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    mean = mean.where(mean > 0, 1.0)
    damped = hessian + damp * mean * eye
    factor, failed = torch.linalg.cholesky_ex(damped.flip(-2, -1))
    extra = 0.0
    while failed.any():
        bad = failed.nonzero().flatten()
        double = (damped[bad].double() + extra * mean[bad].double() * eye.double()).flip(-2, -1)
        again, still = torch.linalg.cholesky_ex(double)
        factor[bad], failed[bad] = again.to(factor.dtype), still
        extra = max(10 * extra, 0.01)
        if extra > 1e6:
            raise UserError("a hessian cannot be factorised: its entries overflow; QUANTIZER=rtn does without")
    return torch.linalg.solve_triangular(factor.flip(-2, -1), eye.expand_as(hessian), upper=True)


def search_scales(weight: Tensor, importance: Tensor, max_code: int) -> Tensor:
    """Per row, the clip with the least rounding error: weight (k, out, in), importance (k, in) of columns -> (k, out).

    GPTQ's Hessian-weighted error is the sum of e_j^2 / U_jj^2 over the columns, e_j what rounding the updated column
    leaves, so a column counts 1 / U_jj^2: the variance of its input, given the inputs that come after it.
    """
    full = row_scales(weight, max_code)
    best, best_error = full, torch.full_like(full, math.inf)
    for share in (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62, 0.54):
        scales = storable(full * share)
        codes = torch.round(weight / scales.unsqueeze(-1)).clamp_(-max_code, max_code)
        error = torch.addcmul(weight, codes, scales.unsqueeze(-1), value=-1)
        weighted = (error.square_() @ importance.unsqueeze(-1)).squeeze(-1)
        best, best_error = torch.where(weighted < best_error, scales, best), torch.minimum(weighted, best_error)
    return best


def lite_scales(weight: Tensor, max_code: int, multiplier: float = 1.0) -> Tensor:
    """Per row, the best of five clip percentiles by plain squared error (the submissions' GPTQ-lite)."""
    magnitude = weight.abs().sort(dim=-1).values
    best, best_error = None, None
    for share in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        clip = magnitude[..., round(share * (weight.size(-1) - 1))]
        scales = storable((clip * (multiplier / max_code)).clamp_min(SCALE_FLOOR))
        error = (weight - round_to_grid(weight, scales, max_code).dequantize()).square().sum(-1)
        if best is None:
            best, best_error = scales, error
        best, best_error = torch.where(error < best_error, scales, best), torch.minimum(error, best_error)
    return best


LEAF = 32  # columns that are rounded one by one before their error goes on in one matrix product


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, max_code: int, damp: float = 0.01,
         scales: Tensor | None = None) -> QuantizedTensor:
    """Round a weight column by column, moving each column's error onto the columns not yet rounded.

    weight   (out, in) float; hessian (in, in) float32, mean of x xT over the calibration tokens; both may have a
             leading batch dimension, and neither is changed
    scales   (out,): the step of each row; None: searched by Hessian-weighted error
    Returns int8 codes (out, in) within +-max_code and one float scale per row.
    Raises ValueError on mismatched shapes or non-finite input.
    Frantar et al. 2023, algorithm 1, arXiv:2210.17323, in descending order of the diagonal; the lazy updates are
    halved recursively instead of in blocks of 128, which keeps the column loop in cache.
    """
    if weight.ndim == 2:
        one = gptq(weight[None], hessian[None], max_code, damp, None if scales is None else scales[None])
        return QuantizedTensor(one.codes[0], one.scales[0], max_code)
    k, out, n = weight.shape
    if hessian.shape != (k, n, n) or scales is not None and scales.shape != (k, out):
        raise ValueError(f"weight {tuple(weight.shape)} needs a hessian ({k}, {n}, {n}) and scales ({k}, {out}), "
                         f"got {tuple(hessian.shape)}" + ("" if scales is None else f" and {tuple(scales.shape)}"))
    if not all(torch.isfinite(given).all() for given in (weight, hessian, scales) if given is not None):
        raise ValueError("weight, hessian and scales must be finite")
    weight, hessian = weight.float(), hessian.float()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    by_row, by_column = order.unsqueeze(-1).expand(k, n, n), order.unsqueeze(1).expand(k, n, n)
    ordered = hessian.gather(1, by_row).gather(2, by_column)
    dead = ordered.diagonal(dim1=-2, dim2=-1) <= 0  # inputs that never fire: their weights do not matter
    U = inverse_cholesky(ordered, damp)
    # Transposed, so that a column of the weight is contiguous.
    W = weight.mT.gather(1, order.unsqueeze(-1).expand(k, n, out)).masked_fill_(dead.unsqueeze(-1), 0.0)
    if scales is None:
        scales = search_scales(W.mT, U.diagonal(dim1=-2, dim2=-1) ** -2, max_code)
    scales = storable(scales)
    Q, E = torch.empty_like(W), torch.empty_like(W)

    def solve(low: int, high: int) -> None:
        if high - low > LEAF:
            middle = (low + high) // 2
            solve(low, middle)
            W[:, middle:high].baddbmm_(U[:, low:middle, middle:high].mT, E[:, low:middle], alpha=-1)
            solve(middle, high)
            return
        for j in range(low, high):
            Q[:, j] = torch.round(W[:, j] / scales).clamp_(-max_code, max_code)
            E[:, j] = (W[:, j] - Q[:, j] * scales) / U[:, j, j, None]
            if j + 1 < high:
                W[:, j + 1: high].baddbmm_(U[:, j, j + 1: high, None], E[:, j, None], alpha=-1)

    solve(0, n)
    codes = torch.empty_like(Q).scatter_(1, order.unsqueeze(-1).expand(k, n, out), Q)
    return QuantizedTensor(codes.mT.to(torch.int8).contiguous(), scales, max_code)


def weighted_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """trace(E H ET) of each matrix of a stack: the mean squared error of the layer's output."""
    error = rounded - weight
    return ((error @ hessian) * error).sum((-2, -1))


def prune_smallest(weight: Tensor, share: float) -> Tensor:
    """Zero the given share of a tensor's entries, the smallest by magnitude."""
    count = int(share * weight.numel())
    if not count:
        return weight
    smallest = weight.abs().flatten().topk(count, largest=False).indices
    return weight.flatten().index_fill(0, smallest, 0.0).view_as(weight)


def quantize_embedding(weight: Tensor, hp: Hyperparameters) -> QuantizedTensor:
    """An embedding table, pruned and rounded, on the CPU."""
    pruned, max_code = prune_smallest(weight.float().cpu(), hp.prune_pct), max_code_of(hp.embed_bits)
    return round_to_grid(pruned, storable(row_scales(pruned, max_code)), max_code)


@torch.no_grad()
def quantize_model(weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor], hp: Hyperparameters, world: World,
                   multiplier: float = 1.0, trained_grid: bool = False) -> tuple[Tensors, dict]:
    """Quantise a state dict by role: block matrices by QUANTIZER, embeddings by plain rounding, the rest to fp16.

    multiplier    of all matrix scales, see row_scales
    trained_grid  QAT ran: keep its rule for the scales instead of searching. A grid that the multiplier makes
                  coarser is not searched either: on trained models clips cost 1 to 4 % more error at equal entropy
    Ranks split the matrices of each shape between them. Returns the tensors, on the CPU, and per role the
    Hessian-weighted error of plain rounding and of the result, pruning included, with the rows on the scale floor.
    """
    max_codes = matrix_max_codes(hp, weights)
    if not max_codes:
        raise ValueError("there is no matrix to quantise")
    groups: dict[tuple, list[str]] = {}
    for name, max_code in max_codes.items():
        groups.setdefault((tuple(weights[name].shape), max_code), []).append(name)
    done: dict[str, QuantizedTensor | Tensor] = {}
    report: dict[str, dict] = {"matrices": {}}
    for role in ("attn", "mlp"):
        report[role] = {"matrices": 0, "error_rounding": 0.0, "error": 0.0, "floored_rows": 0}
    for (shape, max_code), names in groups.items():
        mine = world.shard(len(names))
        codes = torch.zeros(len(names), *shape, dtype=torch.int8, device=world.device)
        scales = torch.zeros(len(names), shape[0], device=world.device)
        errors = torch.zeros(2, len(names), dtype=torch.float64, device=world.device)
        if len(mine):
            own = slice(mine.start, mine.stop)
            latent = torch.stack([weights[name].to(world.device).float() for name in names[own]])
            W = torch.stack([prune_smallest(weight, hp.prune_pct) for weight in latent])
            H = torch.stack([hessians[name] for name in names[own]])
            cheap = storable(row_scales(W, max_code, multiplier))
            plain = round_to_grid(W, cheap, max_code)
            if hp.quantizer == "gptq":
                q = gptq(W, H, max_code, hp.gptq_damp, cheap if trained_grid or multiplier > 1 else None)
            elif hp.quantizer == "gptq_lite":
                q = round_to_grid(W, lite_scales(W, max_code, multiplier), max_code)
            else:
                q = plain
            codes[own], scales[own] = q.codes, q.scales
            errors[0, own] = weighted_error(latent, plain.dequantize(), H).double()
            errors[1, own] = weighted_error(latent, q.dequantize(), H).double()
        for part in (codes, scales, errors):
            world.sum_(part)
        for i, name in enumerate(names):
            done[name] = QuantizedTensor(codes[i].cpu(), scales[i].cpu(), max_code)
            role = report[role_of(name)]
            role["matrices"] += 1
            role["error_rounding"] += errors[0, i].item()
            role["error"] += errors[1, i].item()
            role["floored_rows"] += int((scales[i] <= SCALE_FLOOR).sum())
            report["matrices"][name] = [errors[0, i].item(), errors[1, i].item()]
    for name, weight in weights.items():
        if role_of(name) == "embed":
            done[name] = quantize_embedding(weight, hp)
        elif name not in done:
            done[name] = weight.cpu().half()
    return done, report


# ----------------------------------------------------------------------------------------------------------
# 12 Packing
#
# One file holds everything that is needed to rebuild the model: a fixed prefix, a JSON header, zstd frames of codes
# and of raw tensors, and the SHA-256 of all of it. No pickle; nothing in the file is executed. Codes of one role
# and one width share a frame: their statistics are alike. zstd gets them as literals: matches in near-Gaussian codes
# cost more than they save.

MAGIC, FORMAT_VERSION = b"PGOLFGPT", 1
PREFIX = struct.Struct("<8sIII")  # magic, version, bytes of the packed and of the plain header
MOST_HEADER_BYTES, MOST_BYTES, MOST_DIMS = 1 << 24, 1 << 31, 64
RAW_DTYPES = {str(dtype)[6:]: dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool)}


def compress(data: bytes, level: int, literals: bool) -> bytes:
    """One zstd frame with its content size; `literals` turns the search for matches off, as far as zstd can.

    For Gaussian codes of standard deviation 2.85: 1.006 times the entropy in 0.02 s per 8 MB, where a plain level 22
    takes 1.08 times and seconds.
    """
    options = dict(strategy=zstandard.STRATEGY_FAST, min_match=7, target_length=0, hash_log=6, window_log=17)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1 if literals else level, source_size=len(data), **(options if literals else {}))
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def decompress(data: bytes, size: int) -> bytes:
    """The content of one zstd frame of exactly `size` bytes; ValueError on anything else."""
    try:
        if zstandard.frame_content_size(data) != size:
            raise UserError("damaged artifact: a frame does not hold what the header says")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise UserError(f"damaged artifact: {error}") from None


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's elements in row order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def bytes_tensor(data: bytes, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """The tensor that tensor_bytes was given."""
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def pack(config: dict, tensors: Tensors, level: int = 22) -> bytes:
    """Config (any JSON dict) and tensors as one self-contained file; scales are stored as fp16.

    Raises ValueError for what the format cannot hold. The same input gives the same bytes.
    """
    sections: dict[str, list[bytes]] = {}
    entries = []
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, QuantizedTensor):
            codes = tensor.codes.cpu()
            if not 1 <= tensor.max_code <= 127 or codes.numel() and codes.int().abs().max() > tensor.max_code:
                raise ValueError(f"{name}: codes must lie within +-max_code, and max_code within 1..127")
            scales = tensor.scales.detach().cpu().half()
            if tuple(scales.shape) != tuple(codes.shape[:-1]) or not torch.isfinite(scales).all():
                raise ValueError(f"{name}: needs one finite scale per row that fp16 can hold")
            section = f"{role_of(name)}.{tensor.max_code}"
            sections.setdefault(section, []).append(tensor_bytes(codes + tensor.max_code))  # wraps into 0..254
            sections.setdefault("scales", []).append(tensor_bytes(scales))
            entries.append([name, "codes", list(codes.shape), section, tensor.max_code])
        else:
            dtype = str(tensor.dtype)[6:]
            if dtype not in RAW_DTYPES:
                raise ValueError(f"{name}: tensors of {tensor.dtype} cannot be packed")
            sections.setdefault(f"raw.{dtype}", []).append(tensor_bytes(tensor))
            entries.append([name, dtype, list(tensor.shape), f"raw.{dtype}", 0])
    plain = {key: b"".join(parts) for key, parts in sorted(sections.items())}
    if sum(map(len, plain.values())) > MOST_BYTES:
        raise ValueError(f"the tensors hold more than {MOST_BYTES} bytes")
    packed = {key: compress(data, level, literals=not key.startswith(("raw", "embed"))) for key, data in plain.items()}
    header = json.dumps({"config": config, "tensors": entries,
                         "sections": [[key, len(packed[key]), len(plain[key])] for key in plain]},
                        separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    small = compress(header, level, literals=False)
    body = b"".join([PREFIX.pack(MAGIC, FORMAT_VERSION, len(small), len(header)), small, *packed.values()])
    return body + hashlib.sha256(body).digest()


def _unpack_tensors(header: dict, payload: memoryview) -> Tensors:
    """Check every size that the header claims against the others, then take the memory."""
    needed: dict[str, int] = {}
    names = [entry[0] for entry in header["tensors"]]
    if any(not isinstance(name, str) for name in names) or len(set(names)) < len(names) \
            or not isinstance(header["config"], dict):
        raise UserError("damaged artifact: impossible names or config")
    for _name, kind, shape, section, max_code in header["tensors"]:
        whole = type(max_code) is int and len(shape) <= MOST_DIMS
        if not whole or any(type(n) is not int or not 0 <= n <= MOST_BYTES for n in shape) \
                or math.prod(shape) > MOST_BYTES:
            raise UserError("damaged artifact: impossible tensor shape")
        width = 1 if kind == "codes" else RAW_DTYPES[kind].itemsize
        needed[section] = needed.get(section, 0) + math.prod(shape) * width
        if kind == "codes":
            needed["scales"] = needed.get("scales", 0) + 2 * math.prod(shape[:-1])
    claimed = {key: plain for key, _, plain in header["sections"]}
    if claimed != needed or len(claimed) < len(header["sections"]) or sum(needed.values()) > MOST_BYTES \
            or sum(packed for _, packed, _ in header["sections"]) != len(payload):
        raise UserError("damaged artifact: sections and tensors do not add up")
    plain, at, taken = {}, 0, dict.fromkeys(needed, 0)
    for key, packed, size in header["sections"]:
        plain[key] = decompress(bytes(payload[at: at + packed]), size)
        at += packed

    def take(section: str, count: int) -> bytes:
        start = taken[section]
        taken[section] = start + count
        return plain[section][start: start + count]

    tensors: dict[str, QuantizedTensor | Tensor] = {}
    for name, kind, shape, section, max_code in header["tensors"]:
        if kind == "codes":
            codes = bytes_tensor(take(section, math.prod(shape)), torch.uint8, shape)
            if not 1 <= max_code <= 127 or codes.numel() and codes.max() > 2 * max_code:
                raise UserError("damaged artifact: a code is off its grid")
            scales = bytes_tensor(take("scales", 2 * math.prod(shape[:-1])), torch.float16, shape[:-1])
            if not torch.isfinite(scales).all():
                raise UserError("damaged artifact: a scale is not finite")
            tensors[name] = QuantizedTensor((codes - max_code).view(torch.int8), scales.float(), max_code)
        else:
            width = RAW_DTYPES[kind].itemsize
            tensors[name] = bytes_tensor(take(section, math.prod(shape) * width), RAW_DTYPES[kind], shape)
    return tensors


def unpack(blob: bytes) -> tuple[dict, Tensors]:
    """The config and tensors that `pack` was given; executes nothing from the file.

    Raises ValueError on any damage, on a trailing byte, and on a header that claims more than the file can hold.
    """
    if len(blob) < PREFIX.size + 32 or blob[:8] != MAGIC:
        raise UserError("not an artifact of this script, or a truncated one")
    _, version, small, size = PREFIX.unpack_from(blob)
    if version != FORMAT_VERSION:
        raise UserError(f"artifact format {version}; this script reads format {FORMAT_VERSION}")
    if hashlib.sha256(blob[:-32]).digest() != blob[-32:]:
        raise UserError("damaged artifact: its checksum does not match its content")
    if size > MOST_HEADER_BYTES or PREFIX.size + small + 32 > len(blob):
        raise UserError("damaged artifact: impossible header size")
    try:
        header = json.loads(decompress(blob[PREFIX.size: PREFIX.size + small], size))
        return header["config"], _unpack_tensors(header, memoryview(blob)[PREFIX.size + small: -32])
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, OverflowError, RecursionError,
            json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"damaged artifact: malformed header ({type(error).__name__})") from None


def code_entropy_bits(histogram: Tensor) -> float:
    """Bits that an order-0 entropy coder needs for codes with these counts."""
    counts = histogram[histogram > 0].double()
    return float((counts * (counts.sum() / counts).log2()).sum())


def code_histogram(codes: Tensor, max_code: int) -> Tensor:
    """How often each code occurs, -max_code first."""
    return torch.bincount(codes.flatten().int() + max_code, minlength=2 * max_code + 1)


def byte_report(blob: bytes, tensors: Tensors) -> dict:
    """Packed bytes by section, and the order-0 entropy that the codes of each could reach."""
    _, _, small, size = PREFIX.unpack_from(blob)
    header = json.loads(decompress(blob[PREFIX.size: PREFIX.size + small], size))
    histograms: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedTensor):
            key = f"{role_of(name)}.{tensor.max_code}"
            histograms[key] = histograms.get(key, 0) + code_histogram(tensor.codes, tensor.max_code)
    report = {"header": {"bytes": PREFIX.size + small + 32}}
    for key, packed, plain in header["sections"]:
        report[key] = {"bytes": packed, "plain_bytes": plain}
        if key in histograms:
            report[key]["entropy_bytes"] = round(code_entropy_bits(histograms[key]) / 8)
            report[key]["over_entropy"] = packed / max(report[key]["entropy_bytes"], 1)
    return report


HEADER_BYTES = 1_000
MARGIN = 0.9985  # share of the limit that a forecast may fill


def huffman_bits(histogram: Tensor) -> int:
    """Bits of codes with these counts under their best prefix code, in which zstd writes literals."""
    heap = [count for count in histogram.tolist() if count]
    heapq.heapify(heap)
    bits = 0  # and nothing for a single code, which zstd writes once
    while len(heap) > 1:
        bits += (pair := heapq.heappop(heap) + heapq.heappop(heap))
        heapq.heappush(heap, pair)
    return bits


class RateForecast:
    """The packed model's bytes as a function of the rate multiplier, from prefix codes for a sample of its codes.

    The step of the grid is set by rate: absmax steps on near-Gaussian int5 weights cost more than four bits each,
    where the limit leaves about 3.5, so all matrix scales grow by one factor until the file fits.
    """

    MOST = 6.0

    def __init__(self, weights: Mapping[str, Tensor], hp: Hyperparameters, sample: int = 1 << 16):
        max_codes = matrix_max_codes(hp, weights)
        parts: dict[tuple, list] = {}  # (role, max_code) -> weights, samples in grid steps
        tables, scales, raw = [], [], []  # what costs the same whatever the multiplier is packed to see what it costs
        for name, weight in weights.items():
            if name in max_codes:
                scales.append(storable(row_scales(weight, max_codes[name])))
                some = weight[:, :: max(weight.numel() // sample, 1)] / scales[-1].unsqueeze(-1)
                parts.setdefault((role_of(name), max_codes[name]), []).append((weight.numel(), some.flatten()))
            elif role_of(name) == "embed":
                table = quantize_embedding(weight, hp)
                tables.append(table.codes)
                scales.append(table.scales)
            else:
                raw.append(weight)
        plain = tables, [part.half() for part in scales], [part.half() for part in raw]
        self.fixed = HEADER_BYTES + sum(
            len(compress(b"".join(map(tensor_bytes, same)), 1, literals=False)) for same in plain)
        self.samples = {key: (sum(n for n, _ in these), torch.cat([units for _, units in these]))
                        for key, these in parts.items()}

    def bytes(self, multiplier: float) -> float:
        """Bytes of the packed model."""
        total = self.fixed
        for (_, max_code), (count, units) in self.samples.items():
            codes = torch.round(units / multiplier).clamp_(-max_code, max_code)
            total += count / units.numel() * huffman_bits(code_histogram(codes, max_code)) / 8
        return total

    def multiplier(self, limit: float) -> float:
        """The smallest multiplier in 1..MOST that is forecast to fit into `limit` bytes, else MOST."""
        low, high = 1.0, self.MOST
        if self.bytes(low) <= limit:
            return low
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (low, middle) if self.bytes(middle) <= limit else (middle, high)
        return high


def artifact_config(hp: Hyperparameters, facts: dict) -> dict:
    """What the artifact says of itself: the settings that rebuild the model, and where it comes from."""
    return {"model": {name: getattr(hp, name) for name in MODEL_SETTINGS}, "facts": facts}


def rungs(hp: Hyperparameters) -> Iterator[tuple[str, Hyperparameters]]:
    """The ladder below the rate multiplier: what is given up, step by step, when the artifact does not fit."""
    yield "rate", hp
    for share in (0.1, 0.3):
        if hp.prune_pct < share:
            hp = dataclasses.replace(hp, prune_pct=share)
            yield f"prune:{share}", hp
    for bits in (6, 5, 4):
        if hp.embed_bits > bits:
            hp = dataclasses.replace(hp, embed_bits=bits)
            yield f"embed_bits:{bits}", hp
    while max(hp.mlp_bits, hp.attn_bits) > 2:
        fewer = {"mlp_bits": max(hp.mlp_bits - 1, 2), "attn_bits": max(hp.attn_bits - 1, 2), "int6_last_n": 0}
        hp = dataclasses.replace(hp, **fewer)
        yield f"bits:{hp.attn_bits}/{hp.mlp_bits}", hp


def fit_artifact(hp: Hyperparameters, weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor], facts: dict,
                 world: World, log: RunLog, code_bytes: int, trained_grid: bool) -> tuple[bytes, dict, dict]:
    """Quantise and pack so that code and model fit under ARTIFACT_LIMIT.

    Returns the file, the error report and the byte report. Raises UserError where nothing fits.
    """
    room = hp.artifact_limit - code_bytes
    for rung, eased in rungs(hp):
        rate, target, last = RateForecast(weights, eased), room * MARGIN, None
        for _ in range(5):
            multiplier = rate.multiplier(target)
            forecast = rate.bytes(multiplier)
            tensors, errors = quantize_model(weights, hessians, eased, world, multiplier, trained_grid)
            blob = pack(artifact_config(hp, facts), tensors, hp.zstd_level)
            error = errors["attn"]["error"] + errors["mlp"]["error"]
            log(f"pack rung:{rung} multiplier:{multiplier:.4f} forecast:{forecast:.0f}B model:{len(blob)}B "
                f"room:{room}B error:{error:.6g}")
            if len(blob) <= room:
                errors["multiplier"] = multiplier
                return blob, errors, byte_report(blob, tensors)
            if forecast > target:
                break  # the multiplier is at its largest
            # Files of few levels shrink by less than is forecast; the last two tell by how much.
            slope = max((last[1] - len(blob)) / (last[0] - forecast), 0.1) if last else 1.0
            last, target = (forecast, len(blob)), forecast - 1.2 * (len(blob) - room) / slope - 0.001 * room
    raise UserError(f"no rung of the ladder brings {code_bytes}B of code and the model under ARTIFACT_LIMIT="
                    f"{hp.artifact_limit}; model.pt is kept. Use a smaller model, or fewer BIGRAM_VOCAB_SIZE")


def load_artifact(blob: bytes, hp: Hyperparameters, world: World) -> tuple[GPT, Hyperparameters, dict]:
    """Rebuild the model from the file alone; every other setting is the caller's."""
    config, tensors = unpack(blob)
    try:
        settings = {key: config["model"][key] for key in MODEL_SETTINGS}
        settings["ve_layers"] = tuple(settings["ve_layers"])
        if settings["num_layers"] > len(tensors) or any(
                type(value) is not type(getattr(hp, key)) for key, value in settings.items()):
            raise TypeError("a setting is of the wrong type, or far too large")
        hp = dataclasses.replace(hp, **settings)
        if wrong := list(hp.problems()):
            raise UserError(f"the artifact's settings do not fit this run: {wrong[0]}")
        with torch.device("meta"):
            model = GPT(hp)
        weights = {name: t.dequantize() if isinstance(t, QuantizedTensor) else t.float()
                   for name, t in tensors.items()}
        model.load_state_dict(weights, strict=True, assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the artifact does not describe a model of this script: {reason}") from None
    return model.to(world.device), hp, config.get("facts", {})


# ----------------------------------------------------------------------------------------------------------
# 13 Test-time training
#
# Score first, train afterwards: a chunk's losses are banked under no-grad, then the model is trained on it, so no
# token is scored by weights that have seen it. The last chunk is not trained. Accepted form: #461, #549, #1413.

# Substrings of the names of the tensors that are not matrices, as #601 counts them (25,689 parameters there).
CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "smear", "bigram.scale")


def ttt_parameters(model: GPT, hp: Hyperparameters) -> dict[str, nn.Parameter]:
    """What TTT trains, by TTT_PARAMS."""
    last = tuple(f"blocks.{i}." for i in range(hp.num_layers - hp.ttt_freeze_blocks, hp.num_layers))
    chosen = {
        "blocks": lambda name: name.startswith(last) or "scale" in name,
        "control": lambda name: any(part in name for part in CONTROL_NAMES),
        "control_qk": lambda name: any(part in name for part in (*CONTROL_NAMES, "c_q.weight", "c_k.weight")),
        "all": lambda name: True,
    }[hp.ttt_params]
    return {name: p for name, p in model.named_parameters() if chosen(name)}


def ttt_optimiser(parameters: Mapping[str, nn.Parameter], hp: Hyperparameters) -> torch.optim.Optimizer:
    """AdamW or SGD, with #601's rates per layer where they are asked for."""
    rates: dict[float, list[nn.Parameter]] = {}
    for name, p in parameters.items():
        factor = {"mlp.proj.weight": 3.0, "mlp.fc.weight": 0.5}.get(".".join(name.split(".")[-3:]), 1.0)
        rates.setdefault(factor if hp.ttt_perlayer_lr else 1.0, []).append(p)
    groups = [dict(params=params, lr=hp.ttt_lr * f, base_lr=hp.ttt_lr * f) for f, params in rates.items()]
    if hp.ttt_optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=hp.ttt_momentum)
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def ttt_lr_scale(hp: Hyperparameters, chunk: int, chunks: int, step: int, steps: int) -> float:
    """The TTT learning rate as a share of its base: a cosine over the run's chunks or over each chunk's steps."""
    if hp.ttt_schedule == "constant":
        return 1.0
    share = chunk / max(chunks - 1, 1) if hp.ttt_schedule == "run" else step / steps
    return 0.5 * (1 + math.cos(math.pi * share))


class ChunkTrainer:
    """Trains on chunks that are already scored; the global batch and the steps are the same on any number of ranks."""

    def __init__(self, model: GPT, hp: Hyperparameters, world: World):
        self.model, self.hp, self.world = model, hp, world
        self.parameters = ttt_parameters(model, hp)
        for name, p in model.named_parameters():
            p.requires_grad_(name in self.parameters)
        self.optimiser = ttt_optimiser(self.parameters, hp)
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.polyak = {name: p.clone() for name, p in self.start.items()} if hp.use_polyak else {}
        self.trained = sum(p.numel() for p in self.parameters.values())
        self.steps, self.seq_len = 0, hp.ttt_seq_len or hp.eval_seq_len
        self.part = max(min(scoring_batch_tokens(hp, world), 16384) // self.seq_len, 1)  # 5 GB at pr606, run eagerly

    @torch.enable_grad()
    def train(self, tokens: Tensor, first: int, end: int, chunk: int, chunks: int) -> None:
        """Train on positions first..end - 1; their last target is token `end`."""
        hp, world = self.hp, self.world
        rows = tokens[first: end + 1].to(world.device, torch.int64).unfold(0, self.seq_len + 1, self.seq_len)
        batches = rows.split(hp.ttt_batch_seqs)
        total = len(batches) * hp.ttt_epochs
        for step in range(total):
            batch = batches[step % len(batches)]
            mine = world.shard(len(batch))
            gradients = {p: torch.zeros_like(p) for p in self.parameters.values()}
            for p in gradients:
                p.grad = gradients[p]
            for part in batch[mine.start: mine.stop].split(self.part):
                if len(part):
                    with world.autocast():
                        loss = self.model(part[:, :-1].contiguous(), part[:, 1:].contiguous())
                    (loss * (len(part) / len(batch))).backward()
            if world.grouped:
                flat = world.sum_(torch.cat([g.flatten() for g in gradients.values()]))
                for p, summed in zip(gradients, flat.split([p.numel() for p in gradients])):
                    p.grad.copy_(summed.view_as(p))
            torch.nn.utils.clip_grad_norm_(gradients.keys(), hp.ttt_grad_clip or math.inf)
            scale = ttt_lr_scale(hp, chunk, chunks, step, total)
            for group in self.optimiser.param_groups:
                group["lr"] = group["base_lr"] * scale
            self.optimiser.step()
            self.steps += 1
            for name, average in self.polyak.items():
                average.lerp_(self.parameters[name].detach(), 1 - hp.polyak_decay)
        checksum = torch.stack([p.detach().double().sum() for p in self.parameters.values()])
        if not torch.isfinite(checksum).all():
            raise UserError(f"test-time training diverged in chunk {chunk}; lower TTT_LR")
        if not world.same_everywhere(checksum):
            raise UserError(f"the ranks' weights differ after TTT chunk {chunk}; the score would not be one model's")

    @contextlib.contextmanager
    def scoring_weights(self) -> Iterator[None]:
        """The weights that score: those that are trained, or their Polyak average."""
        kept = {name: self.parameters[name].detach().clone() for name in self.polyak}
        with torch.no_grad():
            for name, average in self.polyak.items():
                self.parameters[name].copy_(average)
            yield
            for name, value in kept.items():
                self.parameters[name].copy_(value)

    def change(self) -> float:
        """Distance of the trained weights from where they started, relative to those."""
        moved = sum((p.detach() - self.start[name]).square().sum() for name, p in self.parameters.items())
        return math.sqrt(moved / sum(p.square().sum() for p in self.start.values()))


def evaluate_ttt(model: GPT, tokens: Tensor, byte_counts: Tensor, hp: Hyperparameters, world: World, log: RunLog,
                 seconds: float = math.inf, score_fn: Callable = token_losses,
                 nll: Tensor | None = None) -> tuple[Score, dict]:
    """Score every position once with sliding windows, training on each chunk after it is scored.

    tokens, byte_counts, score_fn, nll as for `evaluate`; seconds is what is left of the evaluation clock: training
    stops early enough for scoring to finish inside it. Changes the model. Returns the Score and the proof.
    """
    positions = len(tokens) - 1
    windows = sliding_windows(positions, hp.eval_seq_len, hp.eval_stride)
    size = hp.ttt_chunk_tokens
    chunks = -(-positions // size)
    parts: list[list[tuple[int, int, int]]] = [[] for _ in range(chunks)]
    for window in windows:  # a window belongs to the chunk of its first scored position
        parts[window[2] // size].append(window)
    trainer = ChunkTrainer(model, hp, world)
    batch_tokens = scoring_batch_tokens(hp, world, size)
    log(f"ttt chunks:{chunks}x{size} windows:{len(windows)} params:{trainer.trained} "
        f"optimizer:{hp.ttt_optimizer} lr:{hp.ttt_lr} epochs:{hp.ttt_epochs} "
        f"batch:{hp.ttt_batch_seqs}x{trainer.seq_len}")
    total, progress = Score(), Progress(log, "ttt", positions)
    start = time.perf_counter()
    scoring: list[float] = []  # seconds per chunk; the first one compiles, so it forecasts nothing
    training: list[float] = []
    untrained_from = None
    for chunk, part in enumerate(parts):
        began = time.perf_counter()
        with trainer.scoring_weights():
            total += evaluate(model, tokens, byte_counts, part, world, batch_tokens, hp.ttt_temperature, score_fn, nll)
        scoring.append(time.perf_counter() - began)
        end = min((chunk + 1) * size, positions)
        if progress.due():
            progress(end, total, f" steps:{trainer.steps}")
        log.metric("ttt", step=chunk, bpb=total.val_bpb, positions=total.positions, seconds=time.perf_counter() - start)
        if chunk + 1 == chunks:
            break
        per_chunk = float(np.median(scoring[1:] or [0.0]))
        one_more = float(np.median(training[1:] or [0.0]))
        finish = world.max(time.perf_counter() - start + 1.05 * per_chunk * (chunks - chunk - 1) + one_more)
        if untrained_from is None and finish > seconds:
            untrained_from = chunk
            log(f"ttt training stops after chunk {chunk} of {chunks}: with it scoring would end at {finish:.0f}s "
                f"of {seconds:.0f}s")
        if untrained_from is None:
            began = time.perf_counter()
            trainer.train(tokens, chunk * size, end, chunk, chunks)
            world.synchronize()
            training.append(time.perf_counter() - began)
    if total.positions != positions:
        raise RuntimeError(f"scored {total.positions} of {positions} positions")
    proof = {"chunks": chunks, "steps": trainer.steps, "untrained_from_chunk": untrained_from,
             "weight_change": trainer.change(), "score_seconds": sum(scoring), "train_seconds": sum(training),
             "parameters": trainer.trained}
    return total, proof


# ----------------------------------------------------------------------------------------------------------
# 14 Main
#
# The pipeline: train, quantise, pack, forget, load, score. Stages hand each other files in the run's folder, so any
# part can be run alone.

def open_run(hp: Hyperparameters, world: World) -> Path:
    """The run's folder under logs/, the same on every rank."""
    stamp = world.broadcast_(torch.tensor(time.time(), dtype=torch.float64, device=world.device)).item()
    when = datetime.fromtimestamp(stamp).strftime("%Y%m%d-%H%M%S")
    folder = Path("logs") / (hp.run_id or f"{hp.preset}-seed{hp.seed}-{when}")
    taken = world.max(float((folder / "log.txt").exists()))
    if "train" in hp.stages and taken and not hp.resume:
        raise UserError(f"{folder} exists; choose another RUN_ID, or continue it with RESUME=1")
    if hp.resume and not taken:
        raise UserError(f"RESUME=1, but there is no run in {folder}; set RUN_ID to the run to continue")
    return folder


def hardware(world: World) -> str:
    """The machine and the versions, in one line."""
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    else:
        names = [line.split(": ")[1] for line in cpu_info().splitlines() if line.startswith("model name")]
        name = names[0] if names else platform.processor() or "CPU"
    return (f"device:{world.size}x {name} threads:{torch.get_num_threads()} python:{platform.python_version()} "
            f"torch:{torch.__version__} numpy:{np.__version__} sentencepiece:{sentencepiece.__version__} "
            f"zstandard:{zstandard.__version__}")


def choose_attention(hp: Hyperparameters, model: GPT, world: World) -> str:
    """Give every layer the fastest attention kernel at hand; returns its name for the log."""
    half_on_cuda = world.device.type == "cuda" and world.dtype == torch.bfloat16
    fa3 = flash_attention_3() if hp.attention != "sdpa" and half_on_cuda else None
    if fa3 is None and hp.attention == "fa3":
        raise UserError("ATTENTION=fa3 needs a Hopper GPU, bf16 and the flash_attn_interface package; "
                        "use ATTENTION=auto")
    if fa3:
        attend, name = fa3, "flash-attention-3"
    elif world.device.type == "cpu" and hp.attention == "auto":
        attend, name = cpu_attention, "dense in blocks in bf16, else sdpa-flash"
    else:
        timings = time_sdpa(hp, world)
        best = min(timings, key=timings.get, default="math")
        same = world.broadcast_(torch.tensor(list(SDPA_KERNELS).index(best), device=world.device))
        best = list(SDPA_KERNELS)[same.item()]
        attend = sdpa_by(best)
        name = f"sdpa-{best} (milliseconds per layer and 16,384 tokens: {key_values(timings)})"
        if half_on_cuda and torch.cuda.get_device_capability(world.device)[0] == 9 and hp.attention == "auto":
            name += " (FlashAttention 3 is not installed; with it a Hopper GPU takes more steps)"
    for block in model.blocks:
        block.attn.attend = attend
    return name


@dataclass
class Validation:
    """The validation split on the device, with the bytes of each target."""

    tokens: Tensor
    byte_counts: Tensor
    corpus: str

    @staticmethod
    def load(hp: Hyperparameters, world: World) -> Validation:
        """Read and check validation shards and tokenizer. Raises UserError on anything that does not fit."""
        processor = load_tokenizer(hp.tokenizer_path, hp.vocab_size)
        tokens = validation_tokens(hp.data_path, hp.eval_seq_len)
        check_ids(read_split(hp.data_path, "val"), hp.vocab_size, world)
        table = ByteTable(processor)
        check_byte_table(table, processor, tokens)
        meta = Path(hp.data_path) / "meta.json"
        corpus = json.loads(meta.read_text()).get("corpus") if meta.is_file() else None
        counts = table.count(tokens[:-1], tokens[1:]).to(torch.uint8)  # sentencepiece pieces are short
        return Validation(tokens.to(world.device), counts.to(world.device), corpus or Path(hp.data_path).name)

    @property
    def bpb_per_nat(self) -> float:
        """Bits per byte of a mean loss of one nat per token."""
        return len(self.byte_counts) / math.log(2) / int(self.byte_counts.sum(dtype=torch.int64))

    def score(self, model: GPT, hp: Hyperparameters, world: World, log: RunLog, stride: int, name: str,
              score_fn: Callable = token_losses) -> Score:
        """Score the whole split with windows of EVAL_SEQ_LEN."""
        positions = len(self.tokens) - 1
        windows = sliding_windows(positions, hp.eval_seq_len, stride)
        progress = Progress(log, name, positions // world.size)
        return evaluate(model, self.tokens, self.byte_counts, windows, world, scoring_batch_tokens(hp, world),
                        score_fn=score_fn, progress=progress)


def read_result(folder: Path) -> dict:
    """What earlier stages of the run have put down."""
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.is_file() else {"bpb": {}, "val_loss": {}, "proofs": {}, "budget": {}}


def run_train(hp: Hyperparameters, world: World, log: RunLog, folder: Path, result: dict, budget: Budget,
              validation: Validation, code_bytes: int, save: Callable[[], None]) -> None:
    """Train, write model.pt and what is known so far, score the averaged weights."""
    shards = read_split(hp.data_path, "train")
    stream = TokenStream(shards)
    log(f"data path:{hp.data_path} train_shards:{len(shards)} train_tokens:{stream.total}")
    model = GPT(hp).to(world.device)
    result["attention"] = choose_attention(hp, model, world)
    log(f"attention:{result['attention']}")

    def rehearse() -> float:
        """Seconds of one calibration and quantisation, extrapolated from a part of the calibration."""
        share = max(hp.gptq_calib_sequences // 8, world.size)
        sample = stream.sample(share, hp.train_seq_len, hp.seed)
        collect_hessians(model, sample, world)  # the first pass fills caches
        world.synchronize()
        start = time.perf_counter()
        hessians = collect_hessians(model, sample, world)
        world.synchronize()
        calibrated = time.perf_counter()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        tensors, _ = quantize_model(weights, hessians, hp, world, trained_grid=hp.late_qat)
        pack({}, tensors, hp.zstd_level)
        RateForecast(weights, hp).multiplier(limit=1.0)  # the whole bisection
        world.synchronize()
        solved = time.perf_counter() - calibrated
        return (calibrated - start) * hp.gptq_calib_sequences / share + 2 * solved  # a first file may miss the limit

    def forecast(weights: Tensors) -> tuple[float, float]:
        if not all(torch.isfinite(weight).all() for weight in weights.values()):
            return 1.0, math.nan  # the next loss will end the run
        rate = RateForecast(weights, hp)
        multiplier = rate.multiplier((hp.artifact_limit - code_bytes) * MARGIN)
        return multiplier, rate.bytes(multiplier)

    params = sum(p.numel() for p in model.parameters())
    trained = train(hp, model, stream, world, log, budget, folder, wants_compile(hp, world, params, log),
                    lambda score_fn: validation.score(model, hp, world, log, hp.eval_seq_len, "validation", score_fn),
                    rehearse, forecast, validation.bpb_per_nat)
    log(f"proof technique:averaging {key_values(trained.proofs['averaging'])}")
    for name, proof in {**trained.proofs["techniques"], "qat": trained.proofs["qat"]}.items():
        if proof:
            log(f"proof technique:{name} {key_values(proof)}")
    result |= trained.facts
    result["proofs"] |= trained.proofs
    result["qat_ran"] = trained.qat_ran
    if world.rank == 0:
        buffer = io.BytesIO()
        torch.save(trained.weights, buffer)
        write_atomically(folder / "model.pt", buffer.getvalue())
    save()
    with budget.phase("float", counted=False):
        score = validation.score(model, hp, world, log, hp.eval_seq_len, "float")
    log(f"final_float {score}")
    result["bpb"]["float"], result["val_loss"]["float"] = score.val_bpb, score.val_loss


def run_quantize(hp: Hyperparameters, world: World, log: RunLog, folder: Path, result: dict, budget: Budget,
                 code_bytes: int) -> None:
    """Calibrate on training tokens, quantise, pack, write artifact.bin."""
    path = folder / "model.pt"
    world.barrier()
    weights = torch.load(path, map_location=world.device, weights_only=True)
    model = GPT(hp)
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"{path} holds another model than the settings describe; use the settings it was "
                        f"trained with") from None
    model.to(world.device)
    choose_attention(hp, model, world)
    with budget.phase("calibrate"):
        stream = TokenStream(read_split(hp.data_path, "train"))
        sequences = stream.sample(hp.gptq_calib_sequences, hp.train_seq_len, hp.seed)
        hessians = collect_hessians(model, sequences, world)
    held = sum(hessian.numel() * 4 for hessian in {id(h): h for h in hessians.values()}.values())
    log(f"calibrated sequences:{len(sequences)}x{hp.train_seq_len} hessians:{held / 2**20:.0f}MiB "
        f"peak_memory:{world.peak_memory() / 2**20:.0f}MiB")
    facts = {key: result.get(key) for key in ("preset", "seed", "steps", "script_sha256", "corpus")}
    with budget.phase("quantise and pack"):
        blob, errors, sections = fit_artifact(hp, weights, hessians, facts, world, log, code_bytes,
                                              trained_grid=bool(result.get("qat_ran")))
    for role in ("attn", "mlp"):
        e = errors[role]
        ratio = e["error"] / max(e["error_rounding"], 1e-30)
        log(f"proof technique:{hp.quantizer} role:{role} {key_values(e)} ratio:{ratio:.3f}")
    for name, section in sections.items():
        log(f"bytes section:{name} {key_values(section)}")
    result["proofs"]["quantizer"] = errors
    result["artifact"] = {"model_bytes": len(blob), "code_bytes": code_bytes, "total_bytes": len(blob) + code_bytes,
                          "limit": hp.artifact_limit, "codec": f"zstd-{hp.zstd_level}", "sections": sections,
                          "sha256": hashlib.sha256(blob).hexdigest()}
    if world.rank == 0:
        write_atomically(folder / "artifact.bin", blob)
    world.barrier()


def run_evaluate(hp: Hyperparameters, world: World, log: RunLog, folder: Path, result: dict, budget: Budget,
                 validation: Validation, compiling: bool) -> None:
    """Rebuild the model from the artifact alone and score it."""
    path = Path(hp.artifact) if hp.artifact else folder / "artifact.bin"
    with budget.phase("load"):
        blob = path.read_bytes()
        model, hp, _ = load_artifact(blob, hp, world)
        choose_attention(hp, model, world)
    score_fn = compiled(token_losses) if compiling else token_losses

    def record(name: str, score: Score) -> None:
        log(f"final_{name} {score}")
        log.metric("score", name=name, loss=score.val_loss, bpb=score.val_bpb)
        result["bpb"][name], result["val_loss"][name] = score.val_bpb, score.val_loss

    with budget.phase("roundtrip"):
        record("roundtrip", validation.score(model, hp, world, log, hp.eval_seq_len, "roundtrip", score_fn))
    if not hp.skip_sliding:
        with budget.phase("sliding"):
            record("sliding", validation.score(model, hp, world, log, hp.eval_stride, "sliding", score_fn))
    if hp.ttt_enabled:
        with budget.phase("ttt"):
            score, proof = evaluate_ttt(model, validation.tokens, validation.byte_counts, hp, world, log,
                                        hp.eval_seconds - budget.used if hp.eval_seconds else math.inf, score_fn)
        record("ttt", score)
        log(f"proof technique:ttt {key_values(proof)}")
        result["proofs"]["ttt"] = proof
    result["val_tokens"] = len(validation.tokens) - 1
    result["val_bytes"] = int(validation.byte_counts.sum(dtype=torch.int64))
    result["scored_artifact_sha256"] = hashlib.sha256(blob).hexdigest()


def print_budget(log: RunLog, name: str, report: dict) -> None:
    """One clock as a table."""
    for phase, seconds in report["counted"].items():
        log(f"budget clock:{name} phase:{phase} seconds:{seconds:.1f}")
    for phase, seconds in report["uncounted"].items():
        log(f"budget clock:{name} phase:{phase} seconds:{seconds:.1f} (not counted)")
    limit = f"{report['limit']:.0f}s" if report["limit"] else "none"
    log(f"budget clock:{name} used:{report['used']:.1f}s limit:{limit} within:{'yes' if report['within'] else 'NO'}")


def check_inputs(hp: Hyperparameters, world: World, folder: Path) -> None:
    """Raise UserError, before anything is written, where a stage would not find what it reads."""
    stages = hp.stages.split(",")
    if "train" in stages or "quantize" in stages:
        check_ids(read_split(hp.data_path, "train"), hp.vocab_size, world)
    if "train" in stages and hp.resume:
        newest_checkpoint(folder)
    if "quantize" in stages and "train" not in stages and not (folder / "model.pt").is_file():
        raise UserError(f"{folder / 'model.pt'} is missing; run STAGES=train first, under the same RUN_ID")
    path = Path(hp.artifact) if hp.artifact else folder / "artifact.bin"
    if stages == ["evaluate"]:
        if not path.is_file():
            raise UserError(f"{path} is missing; run STAGES=train,quantize first, or set ARTIFACT")
        unpack(path.read_bytes())


def run(hp: Hyperparameters, world: World) -> None:
    """Every stage that STAGES names, in one folder."""
    random.seed(hp.seed)
    np.random.seed(hp.seed)
    torch.manual_seed(hp.seed)
    source = Path(__file__).read_bytes()
    stages = hp.stages.split(",")
    validation = Validation.load(hp, world)
    folder = open_run(hp, world)
    check_inputs(hp, world, folder)
    log = RunLog(folder if world.rank == 0 else None, hp.tensorboard)
    log(source.decode(), console=False)
    log(f"run:{folder.name} preset:{hp.preset} stages:{hp.stages} changed:{json.dumps(hp.changed())}"
        + (f" ignored:{','.join(hp.ignored)}" if hp.ignored else ""))
    log(hardware(world))
    log(f"corpus:{validation.corpus!r} val_positions:{len(validation.tokens) - 1} "
        f"val_bytes:{int(validation.byte_counts.sum(dtype=torch.int64))}")
    settings = {"preset": hp.preset, "seed": hp.seed, "changed": hp.changed(), "dtype": str(world.dtype)[6:],
                "settings": dataclasses.asdict(hp), "started": datetime.now().isoformat(timespec="seconds")}
    result = settings | read_result(folder) | {
        "script_sha256": hashlib.sha256(source).hexdigest(), "corpus": validation.corpus, "data_path": hp.data_path,
        "hardware": hardware(world), "world_size": world.size}
    if "train" in stages:
        result |= settings
    if "evaluate" in stages:
        result["scored_with"] = settings
    training, evaluation = Budget(world, hp.max_wallclock_seconds), Budget(world, hp.eval_seconds)
    if "train" not in stages:  # one clock over stages that run one at a time
        earlier = result["budget"].get("training", {}).get("counted", {})
        training.counted = {name: seconds for name, seconds in earlier.items()
                            if "quantize" not in stages or name not in ("calibrate", "quantise and pack")}

    def save() -> None:
        if world.rank == 0:
            write_atomically(folder / "result.json", json.dumps(result, indent=1).encode())

    if "train" in stages:
        run_train(hp, world, log, folder, result, training, validation, len(source), save)
        save()
    if "quantize" in stages:
        run_quantize(hp, world, log, folder, result, training, len(source))
        save()
    if "evaluate" in stages:
        compiling = hp.compile == "1" or world.device.type == "cuda" and wants_compile(hp, world, 0, log)
        run_evaluate(hp, world, log, folder, result, evaluation, validation, compiling)
    for name, budget in (("training", training), ("evaluation", evaluation)):
        if budget.counted:
            result["budget"][name] = budget.report()
            print_budget(log, name, budget.report())
    for name in ("float", "roundtrip", "sliding", "ttt"):
        result["bpb"].setdefault(name, None)
    save()
    if "artifact" in result:
        sizes = result["artifact"]
        log(f"artifact model:{sizes['model_bytes']}B code:{sizes['code_bytes']}B total:{sizes['total_bytes']}B "
            f"limit:{sizes['limit']}B")
    log(f"files:{folder}")


def main() -> int:
    """The command line: --help, or a run with the settings of the environment; returns the exit status."""
    if len(sys.argv) > 1:
        known = sys.argv[1:] in (["--help"], ["-h"])
        print(f"{__doc__}\n{Hyperparameters.table()}" if known else "settings are environment variables; try --help",
              file=sys.stdout if known else sys.stderr)
        return 0 if known else 1
    world, status = None, 0
    try:
        hp = Hyperparameters.from_env(os.environ)
        world = World(hp, os.environ)
        run(hp, world)
    except (UserError, OSError) as error:
        status = 1
        if world is not None or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
    except Interrupted as stop:
        status = 143
        print(stop, file=sys.stderr, flush=True)
    except Exception:
        if world is None or not world.grouped:
            raise
        status = 1
        traceback.print_exc()
    if world is not None and world.grouped:
        if status:  # other ranks may wait in a collective, and leaving the group would wait for them
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        world.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
