"""train_gpt.py: tokenised text in, a scored language model of at most 16,000,000 bytes out.

A GPT for OpenAI's Parameter Golf challenge, after submissions #606 (int5 GPTQ, soft-round QAT) and #601
(value residual, gated attention, late QAT). One run trains, averages the weights, quantises and packs them
into one file, throws the model away, loads the file and scores it.

    python train_gpt.py                                    one process: CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt.py  8xH100, PRESET=pr606 (the default)
    PRESET=smoke python train_gpt.py                       two CPU cores, a few minutes
    ARTIFACT=FILE STAGES=evaluate python train_gpt.py      score an artifact, nothing else
    python train_gpt.py --help                             every setting: an environment variable

A run writes logs/<RUN_ID>/: log.txt, metrics.jsonl, result.json, model.pt, artifact.bin, and checkpoint.pt.

Parts above, the processes that use them below:
    1 Settings   2 Machine     3 Run log       4 Data         5 Grid and QAT   6 Model      7 Scoring
    8 Optimisers   9 Averaging   10 Quantiser   11 Coder   12 Training   13 Test-time training   14 Main

Shapes: B batch, T tokens, D width, H query heads, G key and value heads, d width of a head, V vocabulary.
"""
from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import difflib
import errno
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import sys
import time
import timeit
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache, partial
from pathlib import Path

if __name__ == "__main__":  # waiting threads that spin make a step fifty times slower on a busy CPU
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is loaded
try:
    import numpy as np
    import sentencepiece
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    import zstandard
    from torch import Tensor, nn
except ImportError as missing:  # a silent fallback from zstd to zlib has put artifacts over the cap
    raise SystemExit(f"error: {missing}; run `pip install -r requirements.txt`, or use ./run.sh") from None


class UserError(ValueError):
    """A user's mistake: printed as it stands, without a traceback."""


def brief(value: object, most: int = 60) -> str:
    """A value from outside in one short line."""
    return " ".join(str(value)[:most].split())


@contextlib.contextmanager
def reading(path: Path | str, remedy: str) -> Iterator[None]:
    """UserError with file and remedy, whatever a missing or damaged one runs into."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = getattr(error, "strerror", None) or f"{type(error).__name__}: {brief(error, 200)}"
        raise UserError(f"{path}: {told}; {remedy}") from None


# ----------------------------------------------------------
# 1 Settings
# The environment goes over the preset, the preset over the default.
# All mistakes are reported at once.

# An artifact holds the model's; a resumed run may change those of the run and of the score.
SCOPES = ("run", "model", "train", "quantise", "score")
STAGES = ("train", "quantize", "evaluate")
COUNT, SIZE = "[1, 1e9]", "[1, 65536]"
SPANS_PER_STEP = 8  # of the text, whatever the number of ranks
NUMERALS = frozenset("0123456789+-.eE")  # int() also takes 1_000, blanks, and the digits of any script


def setting(scope: str, default, meaning: str, within: str = "[0, 1e9]", choices: tuple = (), off=None):
    """A field with its scope, meaning, interval or choices, and the value that is off."""
    meaning += f" ({', '.join(choices)})" * bool(choices)
    facts = dict(scope=scope, meaning=meaning, within=within, choices=choices, off=off)
    return field(default=default, metadata=facts)


_run, _model, _train, _quantise, _score = (partial(setting, scope) for scope in SCOPES)

PRESETS: dict[str, dict[str, object]] = {
    "pr606": {},
    "pr601": dict(
        num_kv_heads=4, mlp_mult=3.0, mlp_slope=0.0, rope_ntk_reference=0, xsa_last_n=4,
        bigram_vocab_size=1024, ve_enabled=False, value_residual=True, gated_attention=True,
        iterations=9500, max_wallclock_seconds=0.0, train_batch_tokens=524288, train_seq_len=1024,
        muon_row_norm=True, late_qat_threshold=0.15, soft_round_qat=False,
        attn_bits=6, prune_pct=0.0, eval_seq_len=1024, eval_stride=128, skip_sliding=False,
        ttt_enabled=False, ttt_optimizer="sgd", ttt_lr=0.002, ttt_epochs=2, ttt_chunk_tokens=32768,
        ttt_batch_seqs=1, ttt_params="control", ttt_schedule="chunk", ttt_temperature=1.0,
    ),
    "pr1855": dict(
        data_path="./data/datasets/fineweb10B_sp8192",
        tokenizer_path="./data/tokenizers/fineweb_8192_bpe.model", vocab_size=8192, num_kv_heads=4,
        mlp_mult=4.0, rope_ntk_reference=0, smear_gate="token", bigram_vocab_size=0, ve_enabled=False,
        sparse_attn_gate_enabled=True, skip_gates_enabled=True, document_mask=True,
        num_loops=2, enable_looping_at=0.35, parallel_start_layer=8, qk_gain_init=5.0,
        matrix_lr=0.026, tied_embed_lr=0.03, scalar_lr=0.02, muon_momentum=0.97, muon_equalise=True,
        muon_coefficients="polar", muon_wd=0.095, embed_wd=0.085, adam_wd=0.02, beta2=0.99,
        warmdown_frac=0.85, min_lr=0.1, ema_decay=0.9965, late_qat_threshold=0.0,
        step_rule="sigma", attn_bits=6, mlp_bits=6, embed_bits=7, embed_gptq=True, prune_pct=0.0,
        gptq_calib_sequences=768, ttt_mode="documents", ttt_lr=7e-5, ttt_temperature=1.0,
    ),
}
# What two CPU cores take in minutes.
SMALL = dict(
    data_path="./data/datasets/sotu_sp4096", tokenizer_path="./data/tokenizers/sotu_4096_bpe.model",
    train_log_every=50, val_loss_every=0, vocab_size=4096, model_dim=128, num_heads=2, num_kv_heads=1,
    rope_ntk_reference=0, iterations=850, max_wallclock_seconds=0.0, warmup_steps=2,
    train_batch_tokens=4096, train_seq_len=256, muon_momentum=0.95, muon_momentum_warmup_start=0.85,
    muon_momentum_warmup_steps=100, ema_decay=0.98, gptq_calib_sequences=128, eval_seq_len=256,
    eval_stride=64, skip_sliding=False, ttt_chunk_tokens=512,
)
PRESETS["smoke"] = SMALL | dict(
    num_layers=3, mlp_mult=3.0, xsa_last_n=3, smear_reset_at_bos=True, bigram_vocab_size=2048, bigram_dim=64,
    ve_dim=64, ve_layers=(1, 2), value_residual=True, gated_attention=True, warmdown_iters=660,
    late_qat_threshold=0.15, soft_round_alpha=8.0, ttt_optimizer="sgd", ttt_momentum=0.0, ttt_lr=0.1,
    ttt_epochs=2, ttt_batch_seqs=2, ttt_params="all", ttt_schedule="constant", ttt_temperature=0.99,
)
PRESETS["pr1855_smoke"] = PRESETS["pr1855"] | SMALL | dict(
    num_layers=5, loop_start=1, loop_end=2, num_loops=1, parallel_start_layer=3, qk_gain_init=3.0,
    train_seq_schedule="128@0.1", ttt_lora_rank=16, ttt_lr=5e-4, ttt_chunks="1024:16,inf:32",
    ttt_context=256, ttt_fresh=16)

# The submissions' other spellings: the setting, and of a switch what 0 and 1 say of it, - for nothing.
SPELLINGS = {
    "BIGRAM_BUCKETS": "bigram_vocab_size", "XSA_LAYERS": "xsa_last_n", "PARTIAL_ROPE_DIMS": "rope_dims",
    "WEIGHT_DECAY_MUON": "muon_wd", "WEIGHT_DECAY_ADAM": "adam_wd", "QUANT_BITS": "attn_bits",
    "SGD_TTT_LR": "ttt_lr", "SGD_TTT_MOMENTUM": "ttt_momentum", "SGD_TTT_EPOCHS": "ttt_epochs",
    "SGD_TTT_PARAM_SET": "ttt_params", "TTT_CHUNK_SIZE": "ttt_chunk_tokens",
    "TTT_COSINE_LR": "ttt_schedule constant chunk", "FULL_GPTQ": "quantizer rtn gptq",
    "GPTQ_LITE": "step_rule - lite", "INT5_MLP": "mlp_bits 6 5", "BIGRAM_HASH": "bigram_vocab_size 0 -",
    "EMA_ENABLED": "averaging none ema", "SWA_ENABLED": "averaging - swa",
    "LATE_QAT": "late_qat_threshold 0 -",
    "SMEAR_GATE": "smear_gate 0 vector vector token",
}
# Techniques not carried, constants, run.sh's own: the one value that may be said.
FIXED = {
    "TIE_EMBEDDINGS": "1", "TTT_LEGAL": "1", "PPM_ALPHA": "1.0", "BETA1": "0.9", "ADAM_EPS": "1e-8",
    "MUON_BACKEND_STEPS": "5", "TIED_EMBED_INIT_STD": "0.005", "SGD_TTT_SEQ_LEN": "1024",
    **dict.fromkeys("""DTG_ENABLED HYPER_CONNECTIONS ADAPTIVE_VR TTT_GA_GUIDED CACHE_MIXTURE OGD_BIAS
        USE_CACHE KV_CACHE_LEN USE_MIXER BYTE_WEIGHTED_TTT ADAPTIVE_LR QTTT VR_V0_FP16 TTT_PERLAYER_LR
        GPTQ_LITE_SEARCH INT6_LAST_N QAT_ENABLED USE_POLYAK""".split(), "0"),
    "LOAD_ARTIFACT": "", "SEEDS": "", "NPROC": "",
}
# Without effect in the submissions: accepted, and logged as ignored.
IGNORED_NAMES = ("EMBED_LR", "HEAD_LR", "MUON_BETA2", "CACHE_ALPHA", "ADAPTIVE_LR_MAX", "MIXER_ETA",
                 "GPTQ_LITE_GRID", "GPTQ_CALIB_BATCHES", "VAL_BATCH_SIZE", "POLYAK_DECAY")
OWN_PREFIXES = ("TTT_", "GPTQ_", "QAT_", "EMA_", "SWA_", "MUON_", "ADAM_")


def _parse(text: str, like: object) -> object:
    if isinstance(like, bool):
        return ("0", "1", "false", "true").index(text.lower()) % 2 == 1
    if isinstance(like, tuple):
        return tuple(_parse(part.strip(" "), 0) for part in text.split(",") if part.strip(" "))
    if not isinstance(like, str) and not NUMERALS.issuperset(text):
        raise ValueError
    return type(like)(text)


def doubtful_names(env: Iterable[str], settings: Iterable[str]) -> tuple[list[str], list[str]]:
    """Unknown names meant as settings: errors, and cautions for common words."""
    errors, cautions, known = [], [], {*map(str.upper, settings), *SPELLINGS, *FIXED, *IGNORED_NAMES}
    for name in sorted(set(env) - known):
        for meant in difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            sure = name.startswith(OWN_PREFIXES) or len(name) > 5 and "_" in name
            (errors if sure else cautions).append(f"{name} is not a setting; did you mean {meant}?")
    return errors, cautions


def read_setting(name: str, text: str, fields: Mapping[str, dataclasses.Field]) -> tuple[str, object] | None:
    """The setting that a name means, and its value; None for nothing; ValueError."""
    plain, only = {"true": "1", "false": "0"}.get(text.lower(), text), FIXED.get(name)
    if only is not None and text and (not only or float(plain) != float(only)):
        raise ValueError
    key, *said = SPELLINGS[name].split() if name in SPELLINGS else [name.swapcase()]
    if text and plain not in said[2:] and said:
        text = said[("0", "1").index(plain)].strip("-")
    return (key, _parse(text, fields[key].default)) if text and key in fields else None


def problems(hp: Hyperparameters) -> list[str]:
    """A line for every value out of bounds, else for every combination that no run can use."""
    found = []
    for name, f in hp.fields().items():
        value, choices, within = getattr(hp, name), f.metadata["choices"], f.metadata["within"]
        low, high = map(float, within[1:-1].split(","))
        if choices and value not in choices:
            found.append(f"{name.upper()}={brief(value)} is unknown; choose one of {', '.join(choices)}")
        elif isinstance(value, (int, float)) and not (low <= value < high or value == high and "]" in within):
            found.append(f"{name.upper()}={brief(value)} must lie in {within}")
    stages, layers = {*hp.stages.split(",")}, range(hp.num_layers)
    return found or [message for broken, message in (
        (hp.model_dim % hp.num_heads, "MODEL_DIM must be a multiple of NUM_HEADS"),
        (hp.num_heads % hp.num_kv_heads, "NUM_HEADS must be a multiple of NUM_KV_HEADS"),
        (hp.rope_dims % 2 or hp.rope_dims * hp.num_heads > hp.model_dim or hp.rope_dims == 2,
         "ROPE_DIMS must be even, not 2, and at most MODEL_DIM / NUM_HEADS"),
        (hp.bigram_vocab_size == 1, "BIGRAM_VOCAB_SIZE must be 0 (off) or at least 2"),
        (hp.num_loops and not hp.loop_start <= hp.loop_end < (hp.parallel_start_layer or hp.num_layers),
         "NUM_LOOPS needs LOOP_START <= LOOP_END < PARALLEL_START_LAYER, or < NUM_LAYERS where that is 0"),
        (hp.parallel_start_layer >= hp.num_layers, "PARALLEL_START_LAYER must be below NUM_LAYERS"),
        (hp.ve_enabled and not 0 < len({*hp.ve_layers}.intersection(layers)) == len(hp.ve_layers),
         f"VE_LAYERS must be different layers below NUM_LAYERS={hp.num_layers}; VE_ENABLED=0 needs none"),
        (hp.document_mask and (hp.train_batch_tokens % SPANS_PER_STEP or hp.rope_ntk_reference),
         f"DOCUMENT_MASK needs TRAIN_BATCH_TOKENS % {SPANS_PER_STEP} = 0 and ROPE_NTK_REFERENCE=0"),
        (hp.document_mask and hp.ttt_enabled and hp.ttt_mode == "chunks",
         "TTT on chunks knows no documents: set TTT_MODE=documents, TTT_ENABLED=0 or DOCUMENT_MASK=0"),
        (not re.fullmatch(r"([1-9]\d{0,8}:[1-9]\d{0,4},)*inf:[1-9]\d{0,4}", hp.ttt_chunks, re.ASCII),
         "TTT_CHUNKS must read LENGTH:CHUNK,LENGTH:CHUNK,inf:CHUNK"),
        (max(map(int, re.findall(r":(\d{1,9})", hp.ttt_chunks)), default=0) > hp.ttt_context,
         "TTT_CONTEXT must hold the largest chunk of TTT_CHUNKS"),
        (hp.ttt_enabled and hp.ttt_mode == "documents" and hp.rope_ntk_reference,
         "TTT_MODE=documents needs ROPE_NTK_REFERENCE=0: keys are kept as they were turned"),
        (hp.train_batch_tokens % hp.train_seq_len, "TRAIN_BATCH_TOKENS must be a multiple of TRAIN_SEQ_LEN"),
        (not re.fullmatch(r"([1-9]\d{0,8}@(1|0?\.\d+)(,|$))*", hp.train_seq_schedule, re.ASCII)
         or max(map(int, re.findall(r"(\d+)@", hp.train_seq_schedule)), default=0) > hp.train_seq_len,
         "TRAIN_SEQ_SCHEDULE must read LENGTH@SHARE,LENGTH@SHARE, no length above TRAIN_SEQ_LEN"),
        (hp.eval_stride > hp.eval_seq_len, "EVAL_STRIDE must be at most EVAL_SEQ_LEN"),
        (hp.ttt_chunk_tokens % hp.eval_seq_len, "TTT_CHUNK_TOKENS must be a multiple of EVAL_SEQ_LEN"),
        (hp.ttt_params == "blocks" and hp.ttt_freeze_blocks > len(layers),
         "TTT_FREEZE_BLOCKS must be at most NUM_LAYERS"),
        (hp.late_qat_threshold and hp.step_rule != "absmax" and "train" in stages,
         f"STEP_RULE={hp.step_rule} is not what QAT trains on; set LATE_QAT_THRESHOLD=0"),
        (hp.step_rule == "water" and min(hp.attn_bits, hp.mlp_bits, hp.embed_bits) < 8,
         "STEP_RULE=water sets codes by rate, up to 127: set ATTN_BITS=8 MLP_BITS=8 EMBED_BITS=8"),
        (not re.fullmatch(r"(\w[\w.+=,@-]{0,199})?", hp.run_id, re.ASCII),
         "RUN_ID must name a folder under logs/: letters, digits, and . _ - + = , @ within"),
        (not stages <= {*STAGES}, f"STAGES={brief(hp.stages)}: use some of {','.join(STAGES)}"),
        (hp.artifact and hp.stages != "evaluate", "ARTIFACT is for STAGES=evaluate"),
    ) if broken]


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting; its environment variable is the name in capitals."""
    preset: str = _run("pr606", "set of defaults", choices=(*PRESETS,))
    run_id: str = _run("", "folder under logs/ (empty: preset-seed-time)")
    stages: str = _run("train,quantize,evaluate", "parts to run")
    artifact: str = _run("", "file to score (empty: the run's own)")
    resume: bool = _run(False, "continue RUN_ID from its checkpoint")
    device: str = _run("auto", "where it runs", choices=("auto", "cuda", "cpu"))
    dtype: str = _run("auto", "of the matrix products", choices=("auto", "bf16", "fp32"))
    compile: str = _run("auto", "torch.compile", choices=("auto", "0", "1"))
    attention: str = _run("auto", "its kernel", choices=("auto", "fa3", "varlen", "flash", "cudnn", "sdpa"))
    train_log_every: int = _run(500, "steps between log lines", COUNT)
    val_loss_every: int = _run(4000, "steps between validations (0: none)")
    checkpoint_every: int = _run(0, "steps between checkpoints (0: only on SIGTERM)")
    grad_accum_steps: int = _run(0, "micro-steps per step and rank (0: what fits)")

    vocab_size: int = _model(1024, "V, vocabulary", SIZE)
    num_layers: int = _model(11, "blocks", "[1, 1000]")
    model_dim: int = _model(512, "D, width of the residual stream", SIZE)
    num_heads: int = _model(8, "H, query heads", SIZE)
    num_kv_heads: int = _model(8, "G, key and value heads", SIZE)
    mlp_mult: float = _model(3.5, "MLP width in units of D", "[1, 64]")
    mlp_slope: float = _model(0.5, "slope below zero of the squared ReLU", "[0, 1]")
    rope_base: float = _model(10000.0, "RoPE base frequency", COUNT)
    rope_dims: int = _model(16, "dimensions of a head that RoPE turns")
    rope_ntk_reference: int = _model(1024, "T above which the RoPE base grows (0: never)")
    logit_softcap: float = _model(30.0, "bound of the logits, by tanh", "[1e-3, 1e6]")
    xsa_last_n: int = _model(11, "last layers with XSA", off=0)
    ln_scale: bool = _model(True, "divide normed inputs by sqrt(layer + 1)", off=False)
    smear_gate: str = _model("vector", "mix each embedding with the previous one, by channel or by token",
                             choices=("0", "vector", "token"), off="0")
    smear_reset_at_bos: bool = _model(False, "but not across documents", off=False)
    document_mask: bool = _model(False, "attention stays inside documents", off=False)
    bigram_vocab_size: int = _model(8192, "buckets of the bigram hash (0: off)", off=0)
    bigram_dim: int = _model(128, "width of the bigram table", SIZE)
    ve_enabled: bool = _model(True, "add a shared value embedding to V", off=False)
    ve_dim: int = _model(128, "width of the value embedding", SIZE)
    ve_layers: tuple[int, ...] = _model((9, 10), "layers that get the value embedding")
    value_residual: bool = _model(False, "mix the first layer's V into every later one", off=False)
    gated_attention: bool = _model(False, "a sigmoid gate per head and token", off=False)
    sparse_attn_gate_enabled: bool = _model(False, "the same from the first 12 channels", off=False)
    num_loops: int = _model(0, "times that layers LOOP_START to LOOP_END run again", "[0, 100]", off=0)
    loop_start: int = _model(3, "first looped layer", "[0, 1000]")
    loop_end: int = _model(5, "last looped layer", "[0, 1000]")
    skip_gates_enabled: bool = _model(False, "skips mixed in by a gate per channel", off=False)
    parallel_start_layer: int = _model(0, "first with a lane each for attention and MLP (0: none)", off=0)

    seed: int = _train(1337, "of NumPy and torch", f"[0, {2 ** 32})")
    data_path: str = _train("./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin")
    tokenizer_path: str = _train("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model")
    qk_gain_init: float = _train(1.5, "initial gain of the queries")
    ortho_init: bool = _train(True, "orthogonal initial matrices", off=False)
    iterations: int = _train(20000, "steps, at most", COUNT)
    max_wallclock_seconds: float = _train(600.0, "training clock, calibration included (0: none)")
    warmup_steps: int = _train(20, "first steps, undone")
    warmdown_iters: int = _train(3500, "steps of the learning rate's fall")
    warmdown_frac: float = _train(0.0, "its share of the run (0: WARMDOWN_ITERS)", "[0, 1]")
    min_lr: float = _train(0.0, "learning-rate scale at the end", "[0, 1]")
    enable_looping_at: float = _train(0.0, "share of the run before layers loop", "[0, 1]")
    train_batch_tokens: int = _train(786432, "tokens per step over all ranks", COUNT)
    train_seq_len: int = _train(2048, "T while training", COUNT)
    train_seq_schedule: str = _train("", "documents' segments at first: 512@0.1 for a tenth of the run")
    tied_embed_lr: float = _train(0.035, "AdamW learning rate of the tables")
    matrix_lr: float = _train(0.025, "Muon learning rate of the matrices")
    scalar_lr: float = _train(0.025, "AdamW learning rate of the rest")
    muon_momentum: float = _train(0.99, "Muon momentum after its warm-up", "[0, 1)")
    muon_momentum_warmup_start: float = _train(0.92, "Muon momentum at step 0", "[0, 1)")
    muon_momentum_warmup_steps: int = _train(1500, "steps of that warm-up")
    muon_row_norm: bool = _train(False, "Muon's updates have rows of length 1 (#601)")
    muon_equalise: bool = _train(False, "so have its gradients, before they are orthogonalised (#1855)")
    muon_coefficients: str = _train("jordan", "of Newton-Schulz", choices=("jordan", "polar"))
    muon_wd: float = _train(0.04, "weight decay of the matrices")
    adam_wd: float = _train(0.04, "weight decay of the rest")
    embed_wd: float = _train(0.0, "weight decay of the tables (0: ADAM_WD)")
    beta2: float = _train(0.95, "AdamW second moment", "[0, 1)")
    grad_clip_norm: float = _train(0.3, "global gradient norm (0: no clipping)")
    averaging: str = _train("ema", "exported weights", choices=("ema", "swa", "none"), off="none")
    ema_decay: float = _train(0.997, "EMA decay per step", "[0, 1)")
    swa_every: int = _train(50, "steps between SWA snapshots", COUNT)
    swa_threshold: float = _train(0.2, "learning-rate scale below which they are taken")
    late_qat_threshold: float = _train(0.5, "learning-rate scale below which it runs (0: never)", off=0.0)
    soft_round_qat: bool = _train(True, "soft rounding in QAT (0: hard)", off=False)
    soft_round_alpha: float = _train(16.0, "last sharpness of soft rounding, from 1")

    quantizer: str = _quantise("gptq", "GPTQ, or rounding to nearest", choices=("gptq", "rtn"), off="rtn")
    step_rule: str = _quantise("absmax", "of the steps", choices=("absmax", "clip", "lite", "sigma", "water"))
    attn_bits: int = _quantise(5, "bits of the attention matrices", "[2, 8]")
    mlp_bits: int = _quantise(5, "bits of the MLP matrices", "[2, 8]")
    embed_bits: int = _quantise(8, "bits of the embedding tables", "[2, 8]")
    embed_gptq: bool = _quantise(False, "the tied table is quantised as the matrices are")
    prune_pct: float = _quantise(0.02, "share of weights, the smallest, set to zero", "[0, 1)", off=0.0)
    gptq_calib_sequences: int = _quantise(256, "training sequences behind the Hessians", COUNT)
    artifact_limit: int = _quantise(16_000_000, "bytes of code and model, at most", COUNT)
    target_bits: float = _quantise(0.0, "bits of a matrix weight in the file (0: what fits)", "[0, 9]")

    eval_seq_len: int = _score(2048, "T while scoring", COUNT)
    eval_stride: int = _score(32, "tokens between sliding windows", COUNT)
    skip_sliding: bool = _score(True, "no sliding score without test-time training")
    eval_seconds: float = _score(600.0, "evaluation clock; TTT stops in time (0: none)")
    canonical_mask: bool = _score(False, "no probability on what the tokenizer never emits")
    ttt_enabled: bool = _score(True, "score-first test-time training", off=False)
    ttt_mode: str = _score("chunks", "of the split, or of each document", choices=("chunks", "documents"))
    ttt_lora_rank: int = _score(64, "of a document's adapters", SIZE)
    ttt_chunks: str = _score("256:8,2048:16,inf:48", "chunks of documents up to a length")
    ttt_context: int = _score(2560, "tokens that a document's chunk sees, with its own", COUNT)
    ttt_fresh: int = _score(64, "of these, computed again before a chunk; older keys and values are kept")
    ttt_optimizer: str = _score("adamw", "optimiser of TTT", choices=("adamw", "sgd"))
    ttt_lr: float = _score(1e-4, "learning rate at the first chunk")
    ttt_momentum: float = _score(0.9, "momentum of sgd")
    ttt_epochs: int = _score(3, "passes over a scored chunk", COUNT)
    ttt_chunk_tokens: int = _score(131072, "positions scored before they are trained on", COUNT)
    ttt_batch_seqs: int = _score(64, "sequences per TTT step over all ranks", COUNT)
    ttt_params: str = _score("blocks", "what TTT trains", choices=("blocks", "control", "all"))
    ttt_freeze_blocks: int = _score(2, "last blocks that TTT trains")
    ttt_schedule: str = _score("run", "span of the cosine", choices=("run", "chunk", "constant"))
    ttt_temperature: float = _score(0.98, "temperature at zero entropy (1: off)", off=1.0)

    @staticmethod
    def fields(*scopes: str) -> dict[str, dataclasses.Field]:
        """By name, those of the given scopes, or all."""
        return {f.name: f for f in dataclasses.fields(Hyperparameters)
                if not scopes or f.metadata["scope"] in scopes}

    @staticmethod
    def from_env(env: Mapping[str, str]) -> Hyperparameters:
        """Settings from a mapping; ValueError tells every mistake."""
        said, fields = {}, Hyperparameters.fields()
        errors, _ = doubtful_names(env, fields)
        full = env.get("FULL_GPTQ", "").lower() in ("1", "true")  # #601's full path never asks for GPTQ_LITE
        for name in sorted(env.keys() - {"GPTQ_LITE" if full else ""}):
            try:
                key, value = read_setting(name, env[name], fields) or ("", None)
            except ValueError:
                errors.append(f"{name}={brief(env[name])} is no value that it can have; see --help, "
                              "or unset it")
            else:
                other, earlier = said.setdefault(key, (name, value))
                if earlier != value:
                    errors.append(f"{other} and {name} say different things; set one of them")
        given = {key: value for key, (_, value) in said.items() if key}
        hp = Hyperparameters(**PRESETS.get(given.get("preset"), {}) | given)
        if errors := [*errors, *problems(hp)]:
            raise UserError("\n".join(errors))
        return hp

    @property
    def row_tokens(self) -> int:
        """T while training: a span of the text whole, or a part of it."""
        return self.train_batch_tokens // SPANS_PER_STEP if self.document_mask else self.train_seq_len


def changed(hp: Hyperparameters) -> dict[str, object]:
    """What differs from the preset."""
    usual = vars(Hyperparameters(preset=hp.preset, **PRESETS[hp.preset]))
    return {name: value for name, value in vars(hp).items() if value != usual[name]}


def settings_table() -> str:
    """Every setting with its value in each preset, in Markdown."""
    show = lambda value: f"{value:g}" if isinstance(value, (bool, float)) else str(value).strip("()") or '""'
    presets = [Hyperparameters(preset=preset, **given) for preset, given in PRESETS.items()]
    rows = [("name", *PRESETS, "meaning"), ("---",) * (len(PRESETS) + 2)]
    for name, f in Hyperparameters.fields().items():
        values = (show(getattr(hp, name)) for hp in presets)
        rows.append((name.upper(), *values, f.metadata["meaning"]))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


# ----------------------------------------------------------
# 2 Machine
# `World` makes every operation the identity where a process is alone.
# What was tuned to a kind of device stands in one table.

def key_values(values: Mapping[str, object]) -> str:
    """A mapping in the log's grammar."""
    show = lambda value: f"{value:.5g}" if isinstance(value, float) else str(value)
    return " ".join(f"{key}:{show(value)}" for key, value in values.items())


@dataclass(frozen=True)
class Tuning:
    """What was tuned to a kind of device; on a CPU a batch should stay in its caches."""
    less_target: Callable[[Tensor, Tensor], Tensor]  # p (N, V) less 1 at y (N, 1)
    logits: int   # elements of the logits held at a time while training
    scored: int   # positions whose logits are held at a time while scoring
    scoring: int  # activations of the stream in a scoring batch; twice as many in a micro-batch
    probe: int    # rows of the matrices that measure the device's rate
    bounds: int   # of segments, in multiples of so many a TRAIN_SEQ_LEN: one graph serves nearly every text
    lag: int      # steps by which losses are read late, so that the host never waits


TUNING = {
    "cpu": Tuning(lambda p, y: p.scatter_add_(1, y, torch.full_like(y, -1, dtype=p.dtype)),
                  logits=1 << 19, scored=256, scoring=1 << 20, probe=768, bounds=0, lag=0),
    # in the kernel of its neighbours, where a scatter is one of its own
    "cuda": Tuning(lambda p, y: p - (torch.arange(p.size(1), device=p.device) == y).to(p.dtype),
                   logits=1 << 27, scored=1 << 30, scoring=1 << 26, probe=8192, bounds=8, lag=1),
}


def tuning_of(x: Tensor) -> Tuning:
    """A tensor's row; the compiler fuses as CUDA does."""
    return TUNING["cuda" if torch.compiler.is_compiling() else x.device.type]


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square in the last dimension."""
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)  # autocast would make the whole stream float32


PATIENCE = timedelta(minutes=20)  # of ranks with each other
DEVICE_FILES, DRIVER = "/dev/nvidia[0-9]*", Path("/proc/driver/nvidia/version")
ARITHMETIC = {"bf16": torch.bfloat16, "fp32": torch.float32}


def launched_as(env: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, number of ranks, and rank on this machine; UserError for what torchrun never says."""
    usual = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}
    told = usual | {name: text for name, text in env.items() if name in usual}
    numbers = [int(text) for text in [*told.values()][:3] if re.fullmatch("[0-9]{1,6}", text)]
    alone = numbers[1:2] == [1] or all(map(env.get, usual))
    if len(numbers) < 3 or not numbers[0] < numbers[1] or not alone:
        said = " ".join(f"{name}={brief(text)}" for name, text in told.items())
        raise UserError(f"{said}: torchrun starts no process so; start all with it, or unset these")
    return tuple(numbers)


def meet(env: Mapping[str, str], facts: Mapping[str, str]) -> dist.Store | None:
    """The ranks' store; UserError on all where their facts differ, or tell of an error."""
    rank, size, _ = launched_as(env)
    store, others = None, []
    if size > 1:
        with reading("MASTER_ADDR and MASTER_PORT", "there is no rank 0 to be found"):
            store, *_ = next(dist.rendezvous("env://", rank, size, timeout=PATIENCE))
            store.set(f"facts{rank}", json.dumps(facts))
            others = [json.loads(store.get(f"facts{other}")) for other in range(size)]
            store.set(f"read{rank}", "")
            if rank == 0:  # which may hold the store: it stays until all have read
                store.wait([f"read{other}" for other in range(size)])
    for other, theirs in enumerate(others):
        for name in (name for name in theirs if theirs[name] != others[0].get(name)):
            here, there = others[0].get(name), theirs[name]
            raise UserError(f"{name} is {there} on rank {other}, {here} on rank 0; start all ranks alike")
    if facts["error"] != "none":
        raise UserError(facts["error"])
    return store


class World:
    """This process among its equals, and the collectives that a run needs."""
    def __init__(self, hp: Hyperparameters, env: Mapping[str, str], store: dist.Store | None = None):
        self.rank, self.size, local = launched_as(env)
        devices, self.grouped = torch.cuda.device_count(), self.size > 1
        hidden = not devices and (glob.glob(DEVICE_FILES) or shutil.which("nvidia-smi"))
        if hidden and hp.device == "auto":
            driver = brief(DRIVER.read_text(), 80) if DRIVER.is_file() else "unknown"
            raise UserError(f"torch {torch.__version__} does not see this machine's NVIDIA device (driver: "
                            f"{driver}); install a torch for that driver, or set DEVICE=cpu")
        self.on_cuda = hp.device == "cuda" or hp.device == "auto" and devices > 0
        if self.on_cuda and local >= devices:
            raise UserError(f"{local + 1} processes want a CUDA device, but PyTorch sees {devices}; lower "
                            f"--nproc_per_node (NPROC), install torch for CUDA, or set DEVICE=cpu")
        self.device = torch.device(f"cuda:{local}" if self.on_cuda else "cpu")
        self.tuning, self.api = TUNING[self.device.type], torch.get_device_module(self.device)
        self.api.set_device(self.device)
        if self.grouped:
            backend = "nccl" if self.on_cuda else "gloo"
            with reading(f"the network of {backend}", f"check {backend.upper()}_SOCKET_IFNAME"):
                dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=self.rank,
                                        world_size=self.size)
        self.dtype = ARITHMETIC.get(hp.dtype, torch.float32)  # auto: until choose_dtype has measured

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.grouped:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: float) -> float:
        if not self.grouped:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def broadcast_(self, tensor: Tensor) -> Tensor:
        if self.grouped:
            dist.broadcast(tensor, 0)
        return tensor

    def gather(self, part: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """All ranks' parts in order, and what waits for them."""
        if not self.grouped:
            return part, lambda: None
        whole = part.new_empty(len(part) * self.size, *part.shape[1:])
        return whole, dist.all_gather_single(whole, part.contiguous(), async_op=True).wait

    def shard(self, count: int) -> range:
        """This rank's share; shares differ by at most one."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def synchronize(self) -> None:
        self.api.synchronize(self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)

    def to_device(self, tensor: Tensor) -> Tensor:
        """On the device; the copy runs while the device computes."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.on_cuda else tensor

    def to_host(self, tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """A copy, and what waits for it."""
        copy, event = torch.empty_like(tensor, device="cpu", pin_memory=self.on_cuda), self.api.Event()
        copy.copy_(tensor, non_blocking=True)
        event.record()
        return copy, event.synchronize

    def peak_memory(self) -> int:
        if self.on_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        import resource  # POSIX only
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def seconds(self, work: Callable[[], object], repeats: int = 1) -> float:
        """The shortest time that some work took."""
        run = lambda: (work(), self.synchronize())
        return min(timeit.repeat(run, self.synchronize, time.perf_counter, repeats, number=1))

    def matrix_rate(self) -> float:
        """Measured FLOP per second."""
        i = torch.arange(self.tuning.probe, device=self.device, dtype=torch.float32)
        a = torch.outer(i, i).sin().to(self.dtype)  # equal entries take less power: a GPU clocks higher
        return 2 * len(a) ** 3 / self.seconds(lambda: a @ a, repeats=4)

    def hardware(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.on_cuda else \
            torch.cpu.get_capabilities().get("cpu_name", "CPU")
        versions = {m.__name__: m.__version__ for m in (torch, np, sentencepiece, zstandard)}
        return (f"device:{self.size}x {name} threads:{torch.get_num_threads()} "
                f"python:{sys.version.split()[0]} {key_values(versions)}")


def both_ways(function: Callable, *given: Tensor) -> list[Tensor]:
    """What a function returns, and its gradients; the last of what is given comes back to the output."""
    *inputs, to_y = (x.detach().requires_grad_() for x in given)
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, to_y)]


def choose_dtype(hp: Hyperparameters, world: World, known: str | None = None) -> str:
    """Set the world's dtype: DTYPE's, an earlier stage's, else the faster one; returns a log line."""
    N, D, why = world.tuning.probe, hp.model_dim, "as DTYPE says"
    hidden = int(hp.mlp_mult * D)
    names = {str(dtype)[6:]: dtype for dtype in ARITHMETIC.values()}
    if hp.dtype == "auto" and known in names:
        world.dtype, why = names[known], "as the run had it"
    elif hp.dtype == "auto":
        def passes(dtype) -> None:
            ones = partial(torch.ones, dtype=dtype, device=world.device)
            for rows, columns in ((D, D), (hidden, D), (D, hidden), (hp.vocab_size, D)):
                both_ways(F.linear, ones(N, columns), ones(rows, columns), ones(N, rows))
        times = {name: 1000 * world.max(world.seconds(partial(passes, dtype), repeats=3))
                 for name, dtype in ARITHMETIC.items()}
        world.dtype = ARITHMETIC["bf16" if times["bf16"] < 0.95 * times["fp32"] else "fp32"]
        why = f"ms of a layer's products, both ways: {key_values(times)}"
    return f"dtype:{str(world.dtype)[6:]} ({why})"


def by_padding(attend: Callable, longest: int = 0) -> Callable:
    """Attention inside segments, by one of whole rows: each segment is a row, padded to the longest.

    segments (S + 1,) int32 bound the flattened (B, T); without them the rows of q are attended to
    """
    def inside(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None = None) -> Tensor:
        if segments is None:
            return attend(q, k, v)
        begins, at = segments[:-1], torch.arange(q.size(0) * q.size(1), device=q.device)
        most = longest if torch.compiler.is_compiling() else int(segments.diff().max())
        rows = (begins.unsqueeze(1) + torch.arange(most, device=q.device)).clamp_max(len(at) - 1)
        y = attend(*(x.flatten(0, 1)[rows] for x in (q, k, v)))  # (S, most, H, d)
        which = torch.searchsorted(segments, at, right=True) - 1
        return y.flatten(0, 1)[which * most + at - begins[which]].view_as(q)
    return inside


@by_padding
def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's causal attention; q (B, T, H, d), k and v (B, T, G, d) -> (B, T, H, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def by_operator(longest: int, operator: str, *options) -> Callable:
    """PyTorch's attention by one kernel; a context would keep the graph out of the cache."""
    run = getattr(torch.ops.aten, f"_scaled_dot_product_{operator}_attention")

    def attend(q, k, v):
        return run(*(x.transpose(1, 2) for x in (q, k, v)), *options)[0].transpose(1, 2)
    return by_padding(attend, longest)


def flash_attention_3(longest: int) -> Callable:
    """FlashAttention 3; ImportError or worse without it, or with that of another torch."""
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    def attend(q, k, v, segments=None):
        if segments is None:
            out = flash_attn_func(q, k, v, causal=True)
        else:
            flat = (x.flatten(0, 1) for x in (q, k, v))
            out = flash_attn_varlen_func(*flat, segments, segments, longest, longest, causal=True)
        out = out[0] if isinstance(out, tuple) else out  # older builds also return the log-sum-exp
        return out.view_as(q)
    return attend


def varlen_attention(longest: int) -> Callable:
    """PyTorch's attention of variable length."""
    from torch.nn.attention.varlen import varlen_attn

    def attend(q, k, v, segments=None):
        if segments is None:
            return sdpa_attention(q, k, v)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attn(*flat, segments, segments, longest, longest, window_size=(-1, 0),
                           enable_gqa=q.size(2) != k.size(2)).view_as(q)
    return attend


KERNELS = {  # of CUDA's attention: what makes them for segments of a length; the last takes every input
    "fa3": flash_attention_3,
    "varlen": varlen_attention,
    "flash": lambda longest: by_operator(longest, "flash", 0.0, True),
    "cudnn": lambda longest: by_operator(longest, "cudnn", None, True, 0.0, True),
    "sdpa": lambda longest: by_padding(sdpa_attention, longest),
}
MOST_OFF = 0.02  # of outputs and gradients against float32, in norm; bf16 is 0.005 off


def try_attention(attend: Callable, hp: Hyperparameters, world: World, compiling: bool) -> float:
    """Milliseconds of 16,384 tokens in a layer, both ways; else ArithmeticError."""
    attend = torch.compile(attend, fullgraph=True, dynamic=False) if compiling else attend
    H, G, draw = hp.num_heads, hp.num_kv_heads, torch.Generator(world.device).manual_seed(0)
    for T in (hp.eval_seq_len, hp.train_seq_len):
        shapes = [(max(16384 // T, 1), T, heads, hp.model_dim // H) for heads in (H, G, G, H)]
        drawn = (torch.randn(shape, generator=draw, device=world.device) for shape in shapes)
        given = [each.to(world.dtype) for each in drawn]
        n = len(given[0]) * T
        bounds = torch.tensor(sorted({*range(0, n, T), *range(0, n, 700), n}), dtype=torch.int32)
        inside = {"segments": bounds.to(world.device)} if hp.document_mask else {}
        ours, exact = partial(attend, **inside), partial(sdpa_attention, **inside)
        wanted = both_ways(exact, *map(Tensor.float, given))
        for found, exact in zip(both_ways(ours, *given), wanted):
            off = ((found.float() - exact).norm() / exact.norm()).item()
            if not off <= MOST_OFF:
                raise ArithmeticError(f"differs from float32 by {off:.3g} where {MOST_OFF} is allowed")
    return 1000 * world.seconds(lambda: both_ways(ours, *given), repeats=4)


def choose_attention(hp: Hyperparameters, world: World, compiling: bool = False,
                     log: Callable[[str], None] = lambda line: None) -> tuple[str, Callable]:
    """Name and function of the fastest that is right."""
    longest = max(hp.train_seq_len, hp.eval_seq_len)
    if not world.on_cuda and hp.attention == "auto":
        return "sdpa", by_padding(sdpa_attention, longest)
    times, functions = {}, {}  # of the slowest rank, so that all choose alike
    for name in (KERNELS if hp.attention == "auto" else [hp.attention]):
        taken, fault = math.inf, "on another rank"
        try:
            functions[name] = KERNELS[name](longest)
            taken = try_attention(functions[name], hp, world, compiling)
        except Exception as error:  # whatever a kernel or its compilation does
            fault = f"{type(error).__name__}: {brief(error, 160)}"
        times[name] = world.max(taken)
        if times[name] == math.inf:
            log(f"attention:{name} dropped: {fault}")
    best = min(times, key=times.get)
    if times[best] == math.inf:
        raise UserError(f"ATTENTION={hp.attention}: no kernel gives what float32 gives; the log says why")
    if best != "fa3" and world.on_cuda and torch.cuda.get_device_capability(world.device)[0] == 9:
        log("attention:WITHOUT FlashAttention 3, with which a Hopper GPU takes about a sixth more steps; pip "
            "install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130")
    return f"{best} (ms per layer and 16,384 tokens: {key_values(times)})", functions[best]


def wants_compile(hp: Hyperparameters, world: World) -> bool:
    """COMPILE, or where it is auto: on CUDA; two cores take a step faster eagerly."""
    if hp.compile != "auto" or not world.on_cuda:
        return hp.compile == "1"
    needs = {"g++": any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))),
             "triton": importlib.util.find_spec("triton")}
    if missing := [name for name, there in needs.items() if not there]:
        raise UserError(f"torch.compile needs {' and '.join(missing)}: apt-get install g++, pip install "
                        f"triton; COMPILE=0 goes on eagerly")
    return True


def activation_bytes(hp: Hyperparameters, world: World, compiling: bool) -> float:
    """What a token leaves for the backward pass, as records/traffic.py counts; eagerly 2.5 times."""
    wide = 9 + 4 * hp.num_kv_heads / hp.num_heads + 3 * hp.mlp_mult
    visits = hp.num_layers + hp.num_loops * (hp.loop_end + 1 - hp.loop_start)
    fused = 2 * visits * wide * hp.model_dim + 12 * hp.vocab_size  # the latter of the loss
    return 2.5 * fused if world.on_cuda and not compiling else fused


def micro_batch(hp: Hyperparameters, world: World, sequences: int, compiling: bool) -> int:
    """Sequences per micro-step: GRAD_ACCUM_STEPS, or as many as memory or caches take."""
    tokens = 2 * world.tuning.scoring / hp.model_dim
    if world.on_cuda:
        tokens = torch.cuda.mem_get_info(world.device)[0] * 0.7 / activation_bytes(hp, world, compiling)
    least = max(math.ceil(sequences * hp.row_tokens / tokens), 1)
    # parts of one size share a graph
    equal = next((n for n in range(least, 2 * least) if sequences % n == 0), least)
    return max(math.ceil(sequences / (hp.grad_accum_steps or equal)), 1)


def scoring_batch_tokens(hp: Hyperparameters, world: World, chunk: float = math.inf) -> int:
    """Tokens per scoring batch: a window or more, at most those of `chunk` positions."""
    in_chunk = chunk / hp.eval_stride / world.size * hp.eval_seq_len
    return int(max(hp.eval_seq_len, min(world.tuning.scoring // hp.model_dim, in_chunk)))


# ----------------------------------------------------------
# 3 Run log
# Lines and metrics of rank 0, the training clock, ledgers of the challenge's two budgets, and the `Run`
# that carries them.

def parse_json(data: bytes) -> dict:
    """A JSON object in UTF-8, finite and with unique keys; else ValueError."""
    def unique(pairs: list) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    found = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=int)  # which takes no NaN
    if type(found) is not dict:
        raise ValueError("not an object")
    return found


def sha256(data: bytes) -> str:
    """The checksum in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def say(text: str, stream: str = "stdout", end: str = "\n") -> None:
    """Print while somebody listens: a console that is gone is silenced."""
    try:
        print(text, end=end, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w", errors="replace"))


def saved(state: object) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


class RunLog:
    """Lines to console and log.txt, JSON to metrics.jsonl, given a folder."""
    def __init__(self, folder: Path | None):
        self.live, self.shown, self.text = bool(folder) and sys.stdout.isatty(), 0.0, None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            how = dict(encoding="utf-8", errors="backslashreplace", buffering=1 << 22)
            self.text = open(folder / "log.txt", "a", **how)
            self.metrics = open(folder / "metrics.jsonl", "a", **how)

    def __call__(self, line: str, console: bool = True) -> None:
        if self.text:
            if console:
                say("\r\x1b[2K" * self.live + line)
            self.write(self.text, line)

    @staticmethod
    def write(file, line: str) -> None:
        with contextlib.suppress(OSError):  # of a full disk: the buffer keeps the line for the next time
            print(line, file=file, flush=True)

    def status(self, line: str) -> None:
        """A line that the next one replaces, on a terminal."""
        if self.live and time.perf_counter() - self.shown > 0.2:
            self.shown = time.perf_counter()
            say(f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}", end="")

    def metric(self, event: str, **values) -> None:
        if self.text:
            self.write(self.metrics, json.dumps({"event": event, **values}))

    def proof(self, technique: str, values: Mapping[str, object] | None) -> None:
        if values:
            self(f"proof technique:{technique} {key_values(values)}")


class Clock:
    """Seconds of training, and where ranks agree it stood after some step."""
    def __init__(self, limit: float):
        self.limit, self.before, self.started = limit, 0.0, None  # a limit of 0 is none
        self.agreed, self.agreed_step = 0.0, 0

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.before, self.started = self.elapsed, None

    @property
    def elapsed(self) -> float:
        return self.before + (time.perf_counter() - self.started if self.started else 0.0)

    def at(self, step: int) -> float:
        return self.agreed * step / self.agreed_step if self.agreed_step else 0.0

    def out_of_time(self, step: int) -> bool:
        return 0 < self.limit < self.at(step)

    def state_dict(self) -> dict:
        return {"before": self.elapsed, "agreed": self.agreed, "agreed_step": self.agreed_step}

    def load_state_dict(self, state: Mapping) -> None:
        vars(self).update(state)


class Budget:
    """Seconds per phase on a clock of the challenge, and those that do not count."""
    def __init__(self, name: str, world: World, limit: float):
        self.name, self.world, self.limit = name, world, limit
        self.counted, self.uncounted = collections.Counter(), collections.Counter()

    @contextlib.contextmanager
    def phase(self, name: str, counted: bool = True) -> Iterator[None]:
        self.world.synchronize()
        start = time.perf_counter()
        yield
        self.world.synchronize()
        phases = self.counted if counted else self.uncounted
        phases[name] += self.world.max(time.perf_counter() - start)

    @property
    def left(self) -> float:
        return (self.limit or math.inf) - self.counted.total()

    def report(self, log: RunLog) -> dict:
        """Log the phases; returns what result.json holds."""
        used, limit = self.counted.total(), f"{self.limit:.0f}s" if self.limit else "none"
        for phases, note in ((self.counted, ""), (self.uncounted, " (not counted)")):
            for phase, seconds in phases.items():
                log(f"budget clock:{self.name} phase:{phase} seconds:{seconds:.1f}{note}")
        within = "yes" if self.left >= 0 else "NO"
        log(f"budget clock:{self.name} used:{used:.1f}s limit:{limit} within:{within}")
        return dict(limit=self.limit, used=used, within=self.left >= 0, counted=self.counted,
                    uncounted=self.uncounted)


@dataclass
class Run:
    """What every stage is given."""
    hp: Hyperparameters
    world: World
    log: RunLog
    folder: Path
    code_bytes: int  # of the script, which count against the limit
    training: Budget
    evaluation: Budget
    result: dict     # what result.json holds
    attend: Callable = sdpa_attention  # chosen once for all stages

    @property
    def room(self) -> int:
        return self.hp.artifact_limit - self.code_bytes

    def write(self, name: str, data: bytes, tries: int = 60) -> None:
        """Rank 0's file, there whole or not at all; room on a full disk is waited for."""
        path, temporary = self.folder / name, self.folder / f"{name}.tmp"
        for left in reversed(range(tries * (self.world.rank == 0))):
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                return os.replace(temporary, path)
            except OSError as error:
                fault = f"{path} cannot be written: {error.strerror}"
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not left:
                    raise UserError(fault) from None
            finally:
                temporary.unlink(missing_ok=True)
            if left == tries - 1:
                self.log(f"{fault}; free {len(data)} bytes within {10 * left}s")
            time.sleep(10)

    def record(self, found: Mapping) -> None:
        """Findings into result.json, beside others of their kind."""
        for kind, value in found.items():
            self.result[kind] = self.result.get(kind, {}) | value if isinstance(value, dict) else value
        self.write("result.json", json.dumps(self.result, indent=1).encode())


class ProgressLine:
    """Now and then a line of score, speed and time left."""
    def __init__(self, log: RunLog, name: str, total: int):
        self.log, self.name, self.total = log, name, total
        self.start = self.last = time.perf_counter()

    def due(self) -> bool:
        return time.perf_counter() - self.last > 15.0

    def __call__(self, done: int, val_bpb: float, extra: str = "") -> None:
        elapsed = time.perf_counter() - self.start
        if 0 < done < self.total:
            self.last = time.perf_counter()
            self.log(f"{self.name} positions:{done}/{self.total} val_bpb:{val_bpb:.4f} "
                     f"tokens/s:{done / elapsed:.0f} left:{elapsed / done * (self.total - done):.0f}s{extra}")


# ----------------------------------------------------------
# 4 Data
# Shards of 16-bit token ids come in, batches of sequences go out, in the submissions' order: files by name,
# eight spans per step on any number of ranks. Bytes make scores of different tokenizers comparable.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256
BOS = 1


def read_shard(path: str | Path) -> np.ndarray:
    """A shard's token ids, uint16, memory-mapped; UserError for a damaged file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; run data/prepare.py")
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER)
    if header[:2].tolist() != [SHARD_MAGIC, SHARD_VERSION] or header.size < SHARD_HEADER:
        raise UserError(f"{path} is not a token shard of version {SHARD_VERSION}; fetch it again")
    count, size = int(header[2]), path.stat().st_size
    if count < 1 or size != header.nbytes + 2 * count:
        raise UserError(f"{path} has {size} bytes where its header promises {count} tokens; fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=header.nbytes, shape=(count,))


def read_split(folder: str, split: str, needed: bool = True) -> list[np.ndarray]:
    """A split's shards in order of their names."""
    files = sorted(Path(folder).glob(f"fineweb_{split}_[0-9]*.bin"))
    if needed and not files:
        raise UserError(f"no fineweb_{split}_*.bin in {folder}; set DATA_PATH or run data/prepare.py")
    return [read_shard(file) for file in files]


def check_ids(shards: list[np.ndarray], vocab_size: int, world: World) -> None:
    """UserError unless every id is below vocab_size; ranks share the reading."""
    largest = [int(shard.max()) for shard in shards[world.rank:: world.size]]
    if (top := int(world.max(max(largest, default=0)))) >= vocab_size:
        raise UserError(f"the shards hold token id {top}, but VOCAB_SIZE={vocab_size}")


def segment_starts(tokens: Tensor, longest: int) -> Tensor:
    """Bounds of the segments of (B, T), flattened: (S + 1,) int32.

    A segment begins with a row, with a BOS, and `longest` tokens after the last of these.
    """
    flat, at = tokens.flatten(), torch.arange(tokens.numel(), device=tokens.device)
    begins = (flat == BOS) | (at % tokens.size(1) == 0)
    since = at - torch.where(begins, at, 0).cummax(0).values
    return F.pad((since % longest == 0).nonzero().flatten(), (0, 1), value=len(at)).to(torch.int32)


def document_bounds(hp: Hyperparameters, tokens: Tensor, longest: int, world: World) -> Tensor | None:
    """The segments that attention stays inside, the last bound repeated; None without DOCUMENT_MASK."""
    if not hp.document_mask:
        return None
    bounds, size = segment_starts(tokens, longest), tokens.numel()
    multiple = max(world.tuning.bounds * size // hp.train_seq_len, 1)
    return world.to_device(F.pad(bounds, (0, -len(bounds) % multiple), value=size))


class ByteTable:
    """UTF-8 bytes per token by the challenge's rule.

    Control, unknown and unused pieces are boundaries of no bytes, a byte piece counts one, any other its
    text without one leading U+2581, which counts a byte unless a boundary comes before.
    """
    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        ids = [*range(processor.get_piece_size())]
        pieces = processor.id_to_piece(ids)
        self.processor = processor
        kinds = processor.is_control(ids), processor.is_unknown(ids), processor.is_unused(ids)
        self.boundary = np.any(kinds, axis=0)
        self.space = np.array([piece.startswith("\u2581") for piece in pieces]) & ~self.boundary
        lengths = [len(piece.removeprefix("\u2581").encode()) for piece in pieces]
        self.bytes = np.select([self.boundary, processor.is_byte(ids)], [0, 1], lengths).astype(np.int32)

    def count(self, previous: Tensor, target: Tensor) -> Tensor:
        """Bytes of each target after its previous token; ints of one shape, int32 out."""
        p, t = previous.cpu().numpy(), target.cpu().numpy()
        return torch.from_numpy(self.bytes[t] + (self.space[t] & ~self.boundary[p]))


def canonical_mask(processor: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """(V, V) bool, True where the encoder never emits piece b after a: it would split their text otherwise.

    Each piece is merged from its characters as the encoder does, best score first, leftmost of equals. Side
    by side, two pieces take their merges in order of the lowest score so far. Where a merge across their
    border comes first, a and b do not follow each other. modded-nanogpt PR #350 has the idea.
    """
    count = processor.get_piece_size()
    score = {processor.id_to_piece(i): processor.get_score(i) for i in range(count) if not (
        processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i) or processor.is_byte(i))}
    ends, begins = collections.defaultdict(list), collections.defaultdict(list)  # of a symbol: states
    for i in range(count):
        parts, enter, head, states = [*processor.id_to_piece(i)], math.inf, math.inf, []
        while head > -math.inf:
            heads = [score.get(a + b, -math.inf) for a, b in itertools.pairwise(parts)]
            head = max(heads, default=-math.inf)
            states.append((parts[0], parts[-1], head, min(enter, head), enter))
            if head > -math.inf:
                enter, at = min(enter, head), heads.index(head)
                parts[at: at + 2] = ["".join(parts[at: at + 2])]
        for first, last, *state in states if parts[1:] == [] and parts[0] in score else ():  # it arises whole
            begins[first].append((i, *state))
            ends[last].append((i, *state))
    columns = lambda states: np.array(states).T if states else np.zeros((4, 0))
    ends, begins = ({symbol: columns(states) for symbol, states in side.items()} for side in (ends, begins))
    never = np.zeros((count, count), bool)
    for piece, c in score.items():
        for split in range(1, len(piece)):
            if piece[:split] in ends and piece[split:] in begins:
                a, b = ends[piece[:split]], begins[piece[split:]]
                a, b = a[:, a[1] < c], b[:, b[1] <= c]
                of_a, of_b = np.nonzero((a[2][:, None] <= b[3]) & (b[2] <= a[3][:, None]))
                never[a[0, of_a].astype(int), b[0, of_b].astype(int)] = True
    return never


NOT_CANONICAL = "this tokenizer does not encode these documents so in one call each; set CANONICAL_MASK=0"


def check_mask(never: np.ndarray, shards: list[np.ndarray], most: int = 10_000_000) -> None:
    """UserError where training tokens follow each other that the mask forbids."""
    for shard in shards:
        text, most = shard[:most], max(most - len(shard), 0)
        if wrong := int(never[text[:-1], text[1:]].sum()):
            raise UserError(f"CANONICAL_MASK forbids {wrong} of {len(text)} training tokens; {NOT_CANONICAL}")


class TokenStream:
    """Training tokens in their published order, wrapping around."""
    def __init__(self, shards: list[np.ndarray]):
        self.shards, self.position = shards, 0
        self.ends = np.cumsum([len(shard) for shard in shards])
        self.total = int(self.ends[-1])

    def read(self, at: int, count: int) -> np.ndarray:
        pieces = []
        while count:
            index = np.searchsorted(self.ends, at % self.total, side="right")
            offset = at % self.total - self.ends[index]  # from the shard's end
            pieces.append(self.shards[index][offset:][:count])
            at, count = at + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces).astype(np.int64)

    def step(self, batch_tokens: int, seq_len: int) -> np.ndarray:
        """The next optimiser step's sequences, (batch_tokens / seq_len, seq_len + 1) int64.

        They lie in eight spans, or in one where eight would not hold whole sequences.
        """
        spans = SPANS_PER_STEP if batch_tokens % (SPANS_PER_STEP * seq_len) == 0 else 1
        count = batch_tokens + spans
        text = self.read(self.position, count).reshape(spans, -1)
        self.position += count
        rows = np.lib.stride_tricks.sliding_window_view(text, seq_len + 1, axis=1)[:, ::seq_len]
        return np.concatenate(rows)

    def sample(self, count: int, seq_len: int, seed: int) -> np.ndarray:
        starts = np.random.default_rng(seed).integers(self.total, size=count)
        return np.stack([self.read(int(at), seq_len) for at in starts])


def load_tokenizer(path: str, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model, checked against VOCAB_SIZE."""
    with reading(path, "set TOKENIZER_PATH to a SentencePiece model"):
        processor = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
    if (pieces := processor.get_piece_size()) != vocab_size:
        raise UserError(f"{path} has {pieces} pieces, but VOCAB_SIZE={vocab_size}; set one or the other")
    return processor


def check_tokenizer(table: ByteTable, tokens: Tensor, sidecar: bool = False) -> None:
    """Decode some documents, to text of their ids and, without sidecar, the table's bytes (#1143, #1719)."""
    sample, processor, spare = tokens[:1_000_000], table.processor, 0
    starts = (sample == BOS).nonzero().flatten().tolist()[:201]
    if len(starts) < 2:
        starts, spare = [0, 8192], 12  # a cut character decodes to U+FFFD
    text = sample[starts[0]: starts[-1]]
    ids = [sample[start + 1: end].tolist() for start, end in itertools.pairwise(starts)]
    decoded = [text.replace("\u2581", " ") for text in processor.decode(ids)]
    charged, size = int(table.count(text[:-1], text[1:]).sum()), len("".join(decoded).encode())
    pairs = lambda rows: collections.Counter(pair for row in rows for pair in itertools.pairwise([BOS, *row]))
    total, same = sum(map(len, ids)), (pairs(ids) & pairs(processor.encode(decoded))).total()
    miscounted = not sidecar and abs(charged - size) > len(ids) + spare
    if miscounted or total - same > 0.01 * total + spare:
        raise UserError(f"tokenizer and shards do not belong together: of {total} tokens, decoded and "
                        f"encoded, {total - same} differ (bytes counted: {charged}, decoded: {size})")


@dataclass
class Validation:
    """The validation split on the device, and the tokenizer's byte table."""
    tokens: Tensor       # (positions + 1,) int32, cut to a multiple of EVAL_SEQ_LEN positions
    byte_counts: Tensor  # (positions,) int32
    corpus: str
    table: ByteTable
    sidecar: bool = False  # fineweb_val_bytes_*.bin charge the text as it was before a transformation

    @property
    def bytes(self) -> int:
        return int(self.byte_counts.sum())

    @staticmethod
    def load(hp: Hyperparameters, world: World) -> Validation:
        processor = load_tokenizer(hp.tokenizer_path, hp.vocab_size)
        shards = read_split(hp.data_path, "val")
        sidecar = read_split(hp.data_path, "val_bytes", needed=False)
        counted, held = (sum(map(len, files)) for files in (sidecar, shards))
        if sidecar and counted != held:
            raise UserError(f"{hp.data_path}/fineweb_val_bytes_*.bin count bytes for {counted} tokens, the "
                            f"shards hold {held}; fetch both again")
        check_ids(shards, hp.vocab_size, world)
        whole, table = np.concatenate(shards), ByteTable(processor)
        meta = Path(hp.data_path) / "meta.json"
        positions = (len(whole) - 1) // hp.eval_seq_len * hp.eval_seq_len
        if not positions:
            raise UserError(f"validation has {len(whole)} tokens; EVAL_SEQ_LEN={hp.eval_seq_len} needs more")
        with reading(meta, "make the data again with data/prepare.py"):
            known = parse_json(meta.read_bytes()) if meta.is_file() else {}
        tokens = torch.from_numpy(whole[: positions + 1].astype(np.int32))
        check_tokenizer(table, tokens, bool(sidecar))
        counts = torch.from_numpy(np.concatenate(sidecar)[1: positions + 1].astype(np.int32)) if sidecar \
            else table.count(tokens[:-1], tokens[1:])
        corpus = str(known.get("corpus") or Path(hp.data_path).name)
        return Validation(tokens.to(world.device), counts.to(world.device), corpus, table, bool(sidecar))


# ----------------------------------------------------------
# 5 Grid and QAT
# The grid that QAT trains towards, GPTQ rounds to and the coder stores. Around a step's passes the matrices
# hold their rounded values: a flag inside the graph is folded away, which is how #606, #545 and #576 trained
# without the QAT that they logged (#315).

def steps_of(scales: Tensor, columns: Tensor | None) -> Tensor:
    """A step for every weight, (..., out, in), or (..., out, 1) where columns are alike."""
    steps = scales.unsqueeze(-1)
    return steps if columns is None else steps * torch.exp2(columns.float() / 8).unsqueeze(-2)


@dataclass
class QuantizedTensor:
    """Codes int8 (..., out, in) within +-max_code; codes of one role are alike.

    A step is its row's, scales (..., out), times its column's, int8 (..., in) in eighths of an octave.
    """
    codes: Tensor
    scales: Tensor
    max_code: int
    role: str = ""
    columns: Tensor | None = None

    def dequantize(self) -> Tensor:
        return self.codes.float() * steps_of(self.scales.float(), self.columns)


Tensors = Mapping[str, QuantizedTensor | Tensor]
SCALE_FLOOR = 2.0 ** -24  # the smallest step that fp16 holds; #606's 1/15 coarsened nearly every row


def row_scales(weight: Tensor, max_code: int, multiplier: float | Tensor = 1.0) -> Tensor:
    """A row's step: absmax / max_code, times the rate multiplier; (..., out, in) -> (..., out)."""
    return (weight.abs().amax(dim=-1) * (multiplier / max_code)).clamp_min(SCALE_FLOOR)


def storable(scales: Tensor) -> Tensor:
    """Scales as the artifact will hold them."""
    return scales.clamp_max(65504.0).half().float().clamp_min(SCALE_FLOOR)


def round_to_grid(weight: Tensor, scales: Tensor, max_code: int,
                  columns: Tensor | None = None) -> QuantizedTensor:
    """Round to the nearest code; weight (..., out, in), scales (..., out), columns (..., in)."""
    codes = torch.round(weight / steps_of(scales, columns)).clamp_(-max_code, max_code)
    return QuantizedTensor(codes.to(torch.int8), scales, max_code, columns=columns)


def soft_round(y: Tensor, alpha: float | Tensor) -> Tensor:
    """A smooth staircase, elementwise: the identity as alpha -> 0, rounding as it grows.

    floor(y) + 1/2 + tanh(alpha r) / (2 tanh(alpha / 2)), r = y - floor(y) - 1/2.  arXiv:2006.09952.
    """
    alpha = torch.as_tensor(alpha, dtype=y.dtype, device=y.device)
    low = torch.floor(y)
    return low + 0.5 + torch.tanh(alpha * (y - low - 0.5)) / (2 * torch.tanh(alpha / 2))


def soft_round_gradient(y: Tensor, alpha: float | Tensor) -> Tensor:
    """The derivative of soft_round, elementwise."""
    alpha = torch.as_tensor(alpha, dtype=y.dtype, device=y.device)
    slope = torch.tanh(alpha * (y - torch.floor(y) - 0.5))
    return alpha * (1 - slope * slope) / (2 * torch.tanh(alpha / 2))


def grid_units(weights: Tensor, max_code: int, multiplier: float | Tensor) -> tuple[Tensor, Tensor]:
    """Weights in steps of the export grid, clamped to it, and the steps (..., out, 1)."""
    scales = storable(row_scales(weights, max_code, multiplier)).unsqueeze(-1)
    return (weights / scales).clamp_(-max_code, max_code), scales


def soft_quantize(weights: Tensor, max_code: int, multiplier: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Weights drawn towards the grid with sharpness alpha, and the derivative."""
    y, scales = grid_units(weights, max_code, multiplier)
    return soft_round(y, alpha) * scales, soft_round_gradient(y, alpha)


def hard_quantize(weights: Tensor, max_code: int, multiplier: Tensor, alpha: Tensor) -> tuple[Tensor, float]:
    """Weights on the grid, and 1 for a derivative: straight through (arXiv:1308.3432)."""
    y, scales = grid_units(weights, max_code, multiplier)
    return torch.round(y) * scales, 1.0


class FakeQuantizer:
    """Puts weights on the export grid for a step's passes, and takes them off again.

    stacks   (max_code, weights, gradients), views of the parameters (k, out, in)
    Multiplier and sharpness are tensors: a number would wait for the device and recompile.
    """
    def __init__(self, stacks: list[tuple[int, Tensor, Tensor]], soft: bool = True,
                 wrap: Callable = lambda function: function):
        self.stacks, self.slopes = stacks, []
        self.rounding = wrap(soft_quantize if soft else hard_quantize)
        self.kept = [torch.empty_like(weights) for _, weights, _ in stacks]
        self.on_device = torch.ones(2, dtype=torch.float64, device=stacks[0][1].device)
        self.started_at: int | None = None  # the first step, from 0, whose weights were rounded
        self.multiplier, self.distance_before = 1.0, math.nan

    @property
    def on(self) -> bool:
        """It stays on, though a clock's learning rate may rise for a step."""
        return self.started_at is not None

    def begin(self, step: int, multiplier: float) -> None:
        self.started_at, self.multiplier = step, multiplier
        self.distance_before = self.distance()

    @torch.no_grad()
    def quantize(self, alpha: float, rounding: Callable | None = None) -> None:
        """Round, softly with sharpness alpha or as `rounding` does."""
        self.slopes.clear()
        for tensor, value in zip(self.on_device, (self.multiplier, alpha)):
            tensor.fill_(value)
        for (max_code, weights, _), kept in zip(self.stacks, self.kept):
            kept.copy_(weights)
            rounded, slope = (rounding or self.rounding)(kept, max_code, *self.on_device)
            weights.copy_(rounded)
            self.slopes.append(slope)

    @torch.no_grad()
    def restore(self) -> None:
        """Weights bit for bit as before, gradients times the derivative."""
        for (_, weights, grads), kept, slope in zip(self.stacks, self.kept, self.slopes):
            weights.copy_(kept)
            grads.mul_(slope)

    @torch.no_grad()
    def distance(self) -> float:
        """Mean distance of the weights to their grid in steps; 0.25 by chance."""
        off = [grid_units(weights, max_code, self.multiplier)[0]
               for max_code, weights, _ in self.stacks]
        total = sum((y - torch.round(y)).abs().sum(dtype=torch.float64) for y in off)
        return total.item() / sum(kept.numel() for kept in self.kept)

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("started_at", "multiplier", "distance_before")}

    def load_state_dict(self, state: Mapping) -> None:
        vars(self).update(state)


# ----------------------------------------------------------
# 6 Model
# Token ids in, soft-capped logits out. The order of layers and the skips between them are data: the plan.
# What the submissions added to a plain GPT are parts, which own their parameters' initial values and those
# that silence them. Weights are cast to the activations' dtype, which is autocast's.
# Names in the state dict are the submissions' own.

GATE_WINDOW = 12  # channels that #1855's gates read
# What a tensor is: its optimiser's group, and where it is quantised the setting of its bits, and at how many
# deviations of its row SDClip has the largest code (#1855's).
ROLES = {"attn": ("matrix", "attn_bits", 13.0), "mlp": ("matrix", "mlp_bits", 11.5),
         "embed": ("embed", "embed_bits", 14.0), "matrix": ("matrix", None, 0.0),
         "control": ("control", None, 0.0)}


class CastLinear(nn.Module):
    """A linear layer in the dtype of its input; it starts orthogonal, times a gain."""
    def __init__(self, columns: int, rows: int, role: str, gain: float = 1.0, orthogonal: bool = True):
        super().__init__()
        self.weight, self.role = nn.Parameter(torch.empty(rows, columns)), role
        with torch.no_grad():
            if not gain:
                self.weight.zero_()
            elif orthogonal and min(rows, columns) >= 64:
                nn.init.orthogonal_(self.weight).mul_(gain)
            else:
                nn.init.kaiming_uniform_(self.weight, a=5 ** 0.5).mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Module):
    """A table whose rows start with a normal distribution."""
    role = "embed"

    def __init__(self, rows: int, columns: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        if not self.weight.is_meta:  # where a draw would import the compiler: a second
            nn.init.normal_(self.weight, std=std)

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


def rotary_tables(length: int, dims: int, base: float, reference: int, device, dtype) -> Tensor:
    """Cosines and sines, (2, length, 1, dims / 2); NTK-stretched beyond `reference` (#606), 0: never."""
    if reference and length > reference:
        base *= (length / reference) ** (dims / (dims - 2))
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float64, device=device) / dims)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency).unsqueeze(1)
    return torch.stack((angle.cos(), angle.sin())).to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first dimensions of every head, half against half; x (B, T, H, d)."""
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half: 2 * half], x[..., 2 * half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class BigramHash(nn.Module):
    """Add an embedding of each pair of neighbouring tokens, hashed into a table."""
    silent = {"bigram.scale": 0.0}

    def __init__(self, hp: Hyperparameters, host: nn.Module):
        super().__init__()
        self.buckets = hp.bigram_vocab_size
        self.embed = Embedding(self.buckets, hp.bigram_dim, std=0.0)
        gain = (2 * hp.num_layers) ** -0.5
        self.proj = CastLinear(hp.bigram_dim, hp.model_dim, "matrix", gain, hp.ortho_init)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        t, last = tokens.to(torch.int32), self.buckets - 1
        pair = torch.bitwise_xor(36313 * t[:, 1:], 27191 * t[:, :-1]) % last
        index = F.pad(pair, (1, 0), value=last)  # where there is no token before
        return x + self.proj(self.embed(index).to(x.dtype)) * self.scale.to(x.dtype)


def embedding_before(x: Tensor, tokens: Tensor, reset: bool) -> Tensor:
    """Of the token before, (B, T, D); with `reset` none leaks into the next document (#1797, #1851)."""
    previous = F.pad(x[:, :-1], (0, 0, 1, 0))
    return previous * (tokens != BOS).unsqueeze(-1) if reset else previous


class SmearGate(nn.Module):
    """Mix each embedding with the one before it, by a learnt share per channel."""
    silent = {"smear.gate": -30.0}

    def __init__(self, hp: Hyperparameters, host: nn.Module):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(hp.model_dim))
        self.reset_at_bos = hp.smear_reset_at_bos

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        previous = embedding_before(x, tokens, self.reset_at_bos)
        return torch.lerp(x, previous, torch.sigmoid(self.gate).to(x.dtype))


class TokenSmear:
    """Add a share of the embedding before, by a gate that reads the token's first channels (#1855)."""
    silent = {"smear_lambda": 0.0}

    def __init__(self, hp: Hyperparameters, host: nn.Module):
        host.smear_gate = CastLinear(GATE_WINDOW, 1, "control", gain=0.0)
        host.smear_lambda, self.host = nn.Parameter(torch.zeros(1)), host

    def __call__(self, x: Tensor, tokens: Tensor) -> Tensor:
        gate = torch.sigmoid(self.host.smear_gate(x[..., :GATE_WINDOW]))  # (B, T, 1)
        return x + self.host.smear_lambda.to(x.dtype) * gate * embedding_before(x, tokens, True)


class ValueEmbedding(nn.Module):
    """A token embedding that some layers add to their V."""
    silent = {"ve_shared.scale": 0.0}

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        kv_dim = hp.model_dim // hp.num_heads * hp.num_kv_heads
        self.embed = Embedding(hp.vocab_size, hp.ve_dim, std=0.01)
        self.proj = CastLinear(hp.ve_dim, kv_dim, "matrix", (2 * hp.num_layers) ** -0.5, hp.ortho_init)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.proj(self.embed(tokens).to(dtype)) * self.scale.to(dtype)


@dataclass
class Context:
    """What the blocks of one forward pass share."""
    x0: Tensor                 # (B, T, D), the stream before the first block
    rotary: Tensor             # (2, T, 1, rope_dims / 2)
    values: dict[int, Tensor]  # by layer: (B, T, G d), to be added to V
    segments: tuple[Tensor, ...]  # () or bounds (S + 1,) that attention stays inside
    document: Callable | None = None  # what a document's adapters add, and its earlier keys and values
    visit: int = 0             # the position in the plan
    first_value: Tensor | None = None  # (B, T, G, d), V of the first layer that ran

    def adapted(self, y: Tensor, target: str, x: Tensor) -> Tensor:
        """A projection's output, with the adapters' own of x where there are any."""
        return y if self.document is None else self.document.add(y, target, x, self.visit)


class ValueResidual:
    """Mix the first layer's V into every later one (arXiv:2410.17897)."""
    silent = {"vr_lambda": (0.0, 1.0)}

    def __init__(self, hp: Hyperparameters, layer: int, host: nn.Module):
        host.vr_lambda, self.host = nn.Parameter(torch.tensor([0.5, 0.5])), host

    def __call__(self, v: Tensor, context: Context) -> Tensor:
        if context.first_value is None:  # the first layer's own pair is never read
            context.first_value = v
            return v
        mix = self.host.vr_lambda.to(v.dtype)
        return mix[0] * context.first_value + mix[1] * v


def remove_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self attention: y (B, T, H, d) without its part along the token's v (B, T, G, d)."""
    grouped, v = y.unflatten(2, (v.size(2), -1)), v.unsqueeze(3)
    dot = lambda a: (a * v).sum(-1, keepdim=True, dtype=torch.promote_types(v.dtype, torch.float32))
    share = dot(grouped) / dot(v).clamp_min(1e-24)  # nothing is saved in float32
    return (grouped - share.to(y.dtype) * v).flatten(2, 3)


class HeadGate(CastLinear):
    """A sigmoid gate per head and token, from the attention's input (arXiv:2505.06708)."""
    silent = {"attn_gate.weight": 0.0, "attn_gate.bias": 30.0}

    def __init__(self, hp: Hyperparameters, layer: int, host: nn.Module):
        super().__init__(hp.model_dim, hp.num_heads, "matrix", gain=0.0)
        self.bias, host.attn_gate = nn.Parameter(torch.full((hp.num_heads,), 4.0)), self

    def forward(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return y * torch.sigmoid(super().forward(x) + self.bias.to(x.dtype)).unsqueeze(-1)


class SparseGate:
    """A gate per head and token, one half at first, from the input's first channels (#1855)."""
    silent = {"attn_gate_w": 0.0}

    def __init__(self, hp: Hyperparameters, layer: int, host: nn.Module):
        host.attn_gate_w, self.host = nn.Parameter(torch.zeros(hp.num_heads, GATE_WINDOW)), host

    def __call__(self, y: Tensor, v: Tensor, x: Tensor) -> Tensor:
        gate = F.linear(x[..., :GATE_WINDOW], self.host.attn_gate_w.to(x.dtype))
        return y * torch.sigmoid(0.5 * gate).unsqueeze(-1)


# The parts, in the order in which they act: technique, how it is made, who wants it. Parameters lie on the
# host (the model, or the layer's attention) under their published names.
EMBEDDING_PARTS = {  # (x, tokens) -> x, with x (B, T, D), tokens (B, T); made from hp, host
    "bigram": (BigramHash, lambda hp: hp.bigram_vocab_size),
    "token_smear": (TokenSmear, lambda hp: hp.smear_gate == "token"),
    "norm": (lambda hp, host: lambda x, tokens: rms_norm(x), lambda hp: True),
    "smear": (SmearGate, lambda hp: hp.smear_gate == "vector"),
}
VALUE_PARTS = {  # (v, context) -> v, with v (B, T, G, d); made from hp, layer, host
    "value_embedding": (lambda hp, layer, host: lambda v, context: v + context.values[layer].view(v.shape),
                        lambda hp, layer: hp.ve_enabled and layer in hp.ve_layers),
    "value_residual": (ValueResidual, lambda hp, layer: hp.value_residual),
}
OUTPUT_PARTS = {  # (y, v, x) -> y, with y (B, T, H, d), x (B, T, D) the attention's input
    "xsa": (lambda hp, layer, host: lambda y, v, x: remove_own_value(y, v),
            lambda hp, layer: layer >= hp.num_layers - hp.xsa_last_n),
    "gated_attention": (HeadGate, lambda hp, layer: hp.gated_attention),
    "sparse_gate": (SparseGate, lambda hp, layer: hp.sparse_attn_gate_enabled),
}


class CausalSelfAttention(nn.Module):
    """Causal attention, normalised queries and keys, partial RoPE, and the chosen parts."""
    def __init__(self, hp: Hyperparameters, layer: int):
        super().__init__()
        D, self.width = hp.model_dim, hp.model_dim // hp.num_heads
        kv_dim = self.width * hp.num_kv_heads
        self.c_q, self.c_k, self.c_v = (
            CastLinear(D, rows, "attn", orthogonal=hp.ortho_init) for rows in (D, kv_dim, kv_dim))
        self.proj = CastLinear(D, D, "attn", gain=0.0)
        self.q_gain = nn.Parameter(torch.full((hp.num_heads,), hp.qk_gain_init))
        self.value_parts, self.output_parts = (
            {name: part(hp, layer, self) for name, (part, wanted) in parts.items() if wanted(hp, layer)}
            for parts in (VALUE_PARTS, OUTPUT_PARTS))
        self.attend = sdpa_attention

    def forward(self, x: Tensor, context: Context) -> Tensor:
        heads = -1, self.width
        q, k, v = (context.adapted(linear(x), name, x).unflatten(2, heads) for name, linear in (
            ("q", self.c_q), ("k", self.c_k), ("v", self.c_v)))
        q, k = rms_norm(q), rms_norm(k)  # (B, T, H, d), (B, T, G, d)
        for value_part in self.value_parts.values():
            v = value_part(v, context)
        q = q * self.q_gain.to(q.dtype).view(-1, 1).expand(*q.shape[:3], 1)  # its gradient is summed in rows
        q, k = (apply_rotary(x, *context.rotary) for x in (q, k))
        if context.document is None:
            y = self.attend(q, k, v, *context.segments)
        else:
            y = context.document.attend(q, k, v, context.visit)
        for output_part in self.output_parts.values():
            y = output_part(y, v, x)
        return context.adapted(self.proj(y.flatten(2)), "o", x)


class MLP(nn.Module):
    """Two matrices around a squared (leaky) ReLU."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        hidden = int(hp.mlp_mult * hp.model_dim)
        self.fc = CastLinear(hp.model_dim, hidden, "mlp", orthogonal=hp.ortho_init)
        self.proj = CastLinear(hidden, hp.model_dim, "mlp", gain=0.0)
        self.slope = hp.mlp_slope

    def forward(self, x: Tensor) -> Tensor:
        active = F.leaky_relu(self.fc(x), self.slope)
        return self.proj(active * active)  # square() would be float32 under CUDA's autocast


class Block(nn.Module):
    """Attention and MLP on a mix of stream and embedding, with gains per channel."""
    def __init__(self, hp: Hyperparameters, layer: int):
        super().__init__()
        self.attn, self.mlp, D = CausalSelfAttention(hp, layer), MLP(hp), hp.model_dim
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(D), torch.zeros(D))))
        self.input_scale = (layer + 1) ** -0.5 if hp.ln_scale else 1.0

    def attended(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The mix, and what attention adds."""
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * context.x0
        return x, self.attn_scale.to(x.dtype) * self.attn(rms_norm(x) * self.input_scale, context)

    def transformed(self, x: Tensor, context: Context) -> Tensor:
        """What the MLP adds."""
        x = rms_norm(x) * self.input_scale
        return self.mlp_scale.to(x.dtype) * context.adapted(self.mlp(x), "mlp", x)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x, added = self.attended(x, context)
        x = x + added
        return x + self.transformed(x, context)


class SoftcapCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of soft-capped logits, in chunks that stay in cache.

    Gradients are computed on the way forward (Liger kernels, arXiv:2410.10989). With u = sigmoid(2 z / c),
    c tanh(z / c) is 2 c u less a constant, and its slope 4 u (1 - u): four times faster than tanh on a CPU.
    """
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float,
                tokens: Tensor | None = None, never: Tensor | None = None) -> Tensor:
        N, V = hidden.size(0), weight.size(0)
        chunk = max(tuning_of(hidden).logits // V, 1)
        tokens = targets if never is None else tokens
        cast, wide = weight.to(hidden.dtype), torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=weight.dtype, device=hidden.device)
        to_hidden, to_weight = [], torch.zeros_like(weight)
        for h, y, before in zip(*(x.split(chunk) for x in (hidden, targets.unsqueeze(1), tokens))):
            u = (h @ cast.mT).to(wide).mul_(2 / softcap).sigmoid_()
            capped = u * (2 * softcap)
            capped = capped if never is None else capped.masked_fill(never[before], -math.inf)
            log_p = F.log_softmax(capped, dim=-1)
            loss = loss - log_p.gather(1, y).sum()
            to_capped = tuning_of(h).less_target(log_p.exp_(), y)
            to_logits = to_capped.mul_(torch.addcmul(u, u, u, value=-1)).to(h.dtype)
            to_hidden.append(to_logits @ cast)
            to_weight += to_logits.mT @ h
        ctx.save_for_backward(torch.cat(to_hidden).mul_(4 / N), to_weight.mul_(4 / N))
        return loss / N

    @staticmethod
    def backward(ctx, to_loss: Tensor):
        to_hidden, to_weight = ctx.saved_tensors
        return to_hidden * to_loss.to(to_hidden.dtype), to_weight * to_loss, *4 * (None,)


@dataclass(frozen=True)
class Visit:
    """One run of a layer, the skip added before it, whether its output is kept for a later one."""
    layer: int
    skip_from: int | None = None  # position whose output is added, by a row of skip_weights
    skip_row: int = 0
    pushes: bool = False
    lanes: int = 1  # that the stream parts into before it


def plan(hp: Hyperparameters, looping: bool = True) -> tuple[Visit, ...]:
    """The layers as they run: the first half of the visits pushes outputs, the second pops them."""
    order, after = [*range(hp.num_layers)], hp.loop_end + 1
    order[after:after] = [*range(hp.loop_start, after)] * (hp.num_loops * looping)
    half = len(order) // 2
    return tuple(Visit(layer, pushes=position < half, lanes=1 + (0 < layer == hp.parallel_start_layer),
                       skip_from=2 * half - 1 - position if half <= position < 2 * half else None,
                       skip_row=max(position - half, 0)) for position, layer in enumerate(order))


class GPT(nn.Module):
    """model(tokens) -> logits (B, T, V); model(tokens, targets) -> mean nats; any T.

    segments  bounds that attention stays inside, as of segment_starts
    looping   whether layers run again; a plain attribute, and a graph of its own where it is compiled
    never     canonical_mask's (V, V) on the device, or None; tokens that it forbids get no probability
    """
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.hp, self.looping, self.plans = hp, hp.num_loops > 0, (plan(hp, False), plan(hp, True))
        self.never: Tensor | None = None
        self.tok_emb = Embedding(hp.vocab_size, hp.model_dim, std=0.005)
        self.embedding_parts = {
            name: part(hp, self) for name, (part, wanted) in EMBEDDING_PARTS.items() if wanted(hp)}
        for name, part in self.embedding_parts.items():
            setattr(self, name, part)
        skips, layers = len(self.plans[True]) // 2, hp.num_layers
        self.skip_weights = nn.Parameter(torch.ones(skips, hp.model_dim))
        self.silent = {"skips": {"skip_weights": 0.0}} if skips else {}  # by technique
        if hp.skip_gates_enabled:
            self.skip_gates = nn.Parameter(torch.zeros(skips, hp.model_dim))
            self.silent = {"skips": {"skip_gates": 30.0}}
        if hp.parallel_start_layer:
            self.parallel_resid_lambdas = nn.Parameter(torch.full((layers, 2), 1.1))
            self.parallel_post_lambdas = nn.Parameter(torch.ones(layers, 2, 2))  # layer, source, lane
            self.silent["lanes"] = {"parallel_post_lambdas": ((1.0, 0.0), (0.0, 1.0))}
        self.blocks = nn.ModuleList(Block(hp, layer) for layer in range(layers))
        self.ve_shared = ValueEmbedding(hp) if hp.ve_enabled else None
        self.ve_layer_scales = nn.ParameterList(torch.ones(1) for _ in hp.ve_layers * hp.ve_enabled)

    def roles(self) -> dict[str, str]:
        """By name, a key of ROLES."""
        owned = {f"{name}.weight": module.role for name, module in self.named_modules()
                 if isinstance(module, (CastLinear, Embedding))}
        return {name: owned.get(name, "control") for name, _ in self.named_parameters()}

    def max_codes(self, group: str) -> dict[str, int]:
        """Largest codes of what is quantised as a matrix, or as a table: of the group embed."""
        groups = {name: ROLES[role] for name, role in self.roles().items()}
        if self.hp.embed_gptq:
            groups["tok_emb.weight"] = "matrix", *ROLES["embed"][1:]
        chosen = {name: bits for name, (kind, bits, *_) in groups.items() if kind == group}
        return {name: 2 ** (getattr(self.hp, bits) - 1) - 1 for name, bits in chosen.items() if bits}

    def use(self, attend: Callable) -> GPT:
        for block in self.blocks:
            block.attn.attend = attend
        return self

    def values(self, tokens: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """By layer, what is added to its V."""
        if self.ve_shared is None:
            return {}
        shared, scales = self.ve_shared(tokens, dtype), zip(self.hp.ve_layers, self.ve_layer_scales)
        return {layer: shared * scale.to(dtype) for layer, scale in scales}

    def with_skip(self, x: Tensor, row: int, output: Tensor) -> Tensor:
        """The stream and an earlier output, added or, by a gate, in its place (#1855)."""
        weighted = self.skip_weights[row].to(x.dtype) * output
        if not self.hp.skip_gates_enabled:
            return x + weighted
        return torch.lerp(weighted, x, torch.sigmoid(self.skip_gates[row]).to(x.dtype))

    def in_lanes(self, layer: int, lanes: list[Tensor], context: Context) -> list[Tensor]:
        """Attention of the first lane and MLP of the second side by side, each added to both (#1855)."""
        block, dtype = self.blocks[layer], lanes[0].dtype
        added = block.attended(lanes[0], context)[1], block.transformed(lanes[1], context)
        keep, take = (p[layer].to(dtype) for p in (self.parallel_resid_lambdas, self.parallel_post_lambdas))
        return [keep[lane] * x + take[0, lane] * added[0] + take[1, lane] * added[1]
                for lane, x in enumerate(lanes)]

    def hidden(self, tokens: Tensor, segments: Tensor | None = None,
               document: Callable | None = None) -> Tensor:
        """The normed stream before the output layer; (B, T) -> (B, T, D)."""
        hp, device, x = self.hp, tokens.device, self.tok_emb(tokens)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else x.dtype
        x = x.to(dtype)
        for part in self.embedding_parts.values():
            x = part(x, tokens)
        rope = hp.rope_dims, hp.rope_base, hp.rope_ntk_reference, device, dtype
        inside = () if segments is None else (segments,)
        first = document.first if document else 0
        rotary = rotary_tables(first + tokens.size(1), *rope)[:, first:]
        context = Context(x, rotary, self.values(tokens, dtype), inside, document)
        lanes, outputs = [x], {}
        for position, visit in enumerate(self.plans[self.looping]):
            lanes, context.visit = lanes * visit.lanes, position
            if visit.skip_from is not None:
                lanes[0] = self.with_skip(lanes[0], visit.skip_row, outputs.pop(visit.skip_from))
            if len(lanes) == 1:
                lanes = [self.blocks[visit.layer](*lanes, context)]
            else:
                lanes = self.in_lanes(visit.layer, lanes, context)
            if visit.pushes:
                outputs[position] = lanes[0]
        return rms_norm(sum(lanes[1:], lanes[0]))  # whose mean has the same direction

    def logits(self, hidden: Tensor, document: Callable | None = None) -> Tensor:
        """Soft-capped, at least float32; (..., D) -> (..., V)."""
        z = F.linear(hidden, self.tok_emb.weight.to(hidden.dtype))
        z = document.add(z, "head", hidden) if document else z
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return self.hp.logit_softcap * torch.tanh(z / self.hp.logit_softcap)

    def forward(self, tokens: Tensor, targets: Tensor | None = None,
                segments: Tensor | None = None) -> Tensor:
        hidden = self.hidden(tokens, segments)
        if targets is None:
            return self.logits(hidden)
        return SoftcapCrossEntropy.apply(hidden.flatten(0, 1), self.tok_emb.weight, targets.flatten(),
                                         self.hp.logit_softcap, tokens.flatten(), self.never)


def shell(hp: Hyperparameters) -> GPT:
    """The model without values, to be given a file's or to be counted."""
    with torch.device("meta"):
        return GPT(hp)


def flops_per_token(model: GPT, seq_len: int) -> float:
    """Of training: six per weight met, and causal attention (arXiv:2204.02311)."""
    visits, linear = model.plans[model.looping], lambda part: sum(
        module.weight.numel() for module in part.modules() if isinstance(module, CastLinear))
    met = model.tok_emb.weight.numel() + linear(model) - linear(model.blocks)
    met += sum(linear(model.blocks[visit.layer]) for visit in visits)
    return 6.0 * met + 6.0 * seq_len * model.hp.model_dim * len(visits)


def compiled(function: Callable, **options) -> Callable:
    """torch.compile, a graph per shape, RoPE's tables as constants."""
    torch.compiler.assume_constant_result(rotary_tables)  # here, for it imports the compiler: a second
    torch._dynamo.config.recompile_limit = 64  # graphs of a function; beyond 8 it would go on eagerly
    return torch.compile(function, dynamic=False, **options)


def log_compiler(log: RunLog) -> None:
    """A line for each break of the graph."""
    counters = torch._dynamo.utils.counters
    for what in counters["graph_break"] | counters["unimplemented"]:
        log(f"compile:split {what.splitlines()[0]}")


# ----------------------------------------------------------
# 7 Scoring
# One scorer for validation, sliding windows and test-time training. Windows say what is read and which
# positions count. The loss of position p is that of token p + 1 given tokens 0..p.

@dataclass(frozen=True)
class Score:
    """Summed nats over scored positions, and the bytes of their targets."""
    nats: float = 0.0
    positions: int = 0
    bytes: int = 0

    @property
    def val_loss(self) -> float:
        return self.nats / max(self.positions, 1)

    @property
    def val_bpb(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.positions + other.positions, self.bytes + other.bytes)

    def __str__(self) -> str:
        return f"val_loss:{self.val_loss:.8f} val_bpb:{self.val_bpb:.8f}"


Window = tuple[int, int, int]  # start, end, first scored position


def sliding_windows(positions: int, seq_len: int, stride: int) -> list[Window]:
    """Windows (start, end, first_scored), half-open, that score every position once."""
    ends = 0, *range(seq_len, positions, stride), positions
    return [(max(end - seq_len, 0), end, first) for first, end in itertools.pairwise(ends) if first < end]


def adaptive_temperature(logits: Tensor, low: float) -> Tensor:
    """Logits over clamp(1 - (1 - low)(1 - H / ln V), 0.9, 1.05), H their entropy (#606)."""
    log_p = F.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    return logits / (1 - (1 - low) * (1 - entropy / math.log(logits.size(-1)))).clamp(0.9, 1.05)


def token_losses(model: GPT, tokens: Tensor, targets: Tensor, scored: int, temperature: float = 1.0,
                 segments: Tensor | None = None, document: Callable | None = None) -> Tensor:
    """Nats of each window's last `scored` targets; (B, T), (B, T) -> (B, scored) float32."""
    hidden = model.hidden(tokens, segments, document)[:, -scored:]
    part, losses = max(tuning_of(hidden).scored // scored, 1), []
    part = len(hidden) if document else part  # whose rows have adapters of their own
    for h, before, y in zip(*(x.split(part) for x in (hidden, tokens[:, -scored:], targets[:, -scored:]))):
        logits = model.logits(h, document)
        if temperature != 1.0:
            logits = adaptive_temperature(logits, temperature)
        if model.never is not None:
            logits = logits.masked_fill(model.never[before], -math.inf)
        losses.append(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(-1, scored))
    return torch.cat(losses)


def finite(score: Score) -> Score:
    """The score; UserError for a realised token that the mask forbids."""
    if math.isinf(score.nats):
        raise UserError(f"CANONICAL_MASK forbids a token of the text; {NOT_CANONICAL}")
    return score


def document_windows(tokens: Tensor, most: int) -> list[Window]:
    """Windows of whole documents, of at most `most` positions or of one document; tokens (positions + 1,)."""
    bounds, start, windows = segment_starts(tokens[None, :-1], len(tokens)).tolist(), 0, []
    for at, end in itertools.pairwise(bounds):
        if end - start > most and at > start:
            windows.append((start, at, start))
            start = at
    return [*windows, (start, bounds[-1], start)]


def window_batches(windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Neighbouring windows of one shape, at most batch_tokens together."""
    shape = lambda window: (window[1] - window[0], window[1] - window[2])
    for (length, _), group in itertools.groupby(windows, shape):
        most, alike = max(batch_tokens // length, 1), list(group)
        yield from (alike[at: at + most] for at in range(0, len(alike), most))


@torch.no_grad()
def evaluate(model: GPT, tokens: Tensor, byte_counts: Tensor, windows: list[Window], world: World,
             batch_tokens: int = 4096, temperature: float = 1.0, score_fn: Callable = token_losses,
             nll: Tensor | None = None, progress: ProgressLine | None = None) -> Score:
    """Score windows exactly once; the same Score on every rank, by float64 sums.

    tokens, byte_counts   (positions + 1,) and (positions,) int on the device
    batch_tokens          per forward pass and rank
    score_fn              token_losses or its compiled form, which gets whole batches only
    nll                   (positions,) float32 on the CPU: receives this rank's losses
    """
    mine = world.shard(len(windows))
    total = torch.zeros(3, dtype=torch.float64, device=world.device)
    for batch in window_batches(windows[mine.start: mine.stop], batch_tokens):
        starts = world.to_device(torch.tensor([start for start, *_ in batch]))
        start, end, first = batch[0]
        length, scored = end - start, end - first
        index = starts.unsqueeze(1) + torch.arange(length + 1, device=world.device)  # (B, T + 1)
        text = tokens[index].to(torch.int64)
        scorer = score_fn if len(batch) == max(batch_tokens // length, 1) else token_losses
        segments = document_bounds(model.hp, text[:, :-1], model.hp.eval_seq_len, world)
        with world.autocast():
            losses = scorer(model, text[:, :-1], text[:, 1:], scored, temperature, segments)
        where = index[:, length - scored: length]  # (B, scored)
        total[0] += losses.double().sum()
        total[1] += losses.numel()
        total[2] += byte_counts[where].sum()
        if nll is not None:
            nll[where.cpu()] = losses.float().cpu()
        if progress and progress.due():
            progress(batch[-1][1] - windows[mine.start][2], Score(*total.tolist()).val_bpb)
    nats, positions, count = world.sum_(total).tolist()
    return finite(Score(nats, int(positions), int(count)))


def score_split(run: Run, model: GPT, validation: Validation, stride: int, name: str,
                score_fn: Callable = token_losses, nll: Tensor | None = None) -> Score:
    """Score the whole validation split, a window every `stride` positions, or by documents."""
    hp, world, positions = run.hp, run.world, len(validation.byte_counts)
    batch_tokens = scoring_batch_tokens(hp, world)
    windows = sliding_windows(positions, hp.eval_seq_len, stride)
    if hp.document_mask and stride == hp.eval_seq_len:  # windows of any length: not compiled
        windows, score_fn = document_windows(validation.tokens, batch_tokens), token_losses
    progress = ProgressLine(run.log, name, positions // world.size)
    return evaluate(model, validation.tokens, validation.byte_counts, windows, world, batch_tokens,
                    score_fn=score_fn, nll=nll, progress=progress)


# ----------------------------------------------------------
# 8 Optimisers
# All parameters live in one vector and all gradients in another, equal shapes side by side: averaging,
# clipping and reducing are one operation each, and a stack of equal matrices is a view.

class FlatParameters:
    """The trained parameters of a model and their gradients as two vectors; each becomes a view."""
    SLOTS = ("loss", "clock", "stop")  # they end the gradients, and ride along when ranks reduce them

    def __init__(self, model: nn.Module):
        shape_and_name = lambda item: (tuple(item[1].shape), item[0])
        trained = [item for item in model.named_parameters() if item[1].requires_grad]
        self.parameters = dict(sorted(trained, key=shape_and_name))
        # a multiple of 64 bytes, so that every view is aligned
        self.sizes = {name: -(-p.numel() // 16) * 16 for name, p in self.parameters.items()}
        *starts, total = itertools.accumulate(self.sizes.values(), initial=0)
        self.offsets = dict(zip(self.parameters, starts))
        self.reduced = trained[0][1].data.new_zeros(total + len(self.SLOTS))
        self.grads, self.slots = self.reduced[:total], self.reduced[total:]
        self.slot = dict(zip(self.SLOTS, self.slots))
        self.weights = torch.zeros_like(self.grads)
        for name, p in self.parameters.items():
            view = self.view(self.weights, name)
            view.copy_(p.data)
            p.data, p.grad = view, self.view(self.grads, name)

    def view(self, vector: Tensor, name: str) -> Tensor:
        p = self.parameters[name]
        return vector[self.offsets[name]: self.offsets[name] + p.numel()].view(p.shape)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.data for name, p in self.parameters.items()}

    def stacks(self, keys: Mapping[str, object]) -> list[tuple[object, Tensor, Tensor]]:
        """Key, weights, gradients (k, m, n) of neighbours of one shape and key; None is left out."""
        found = []
        kind = lambda name: (keys.get(name), self.parameters[name].shape)
        for (key, shape), group in itertools.groupby(self.parameters, kind):
            names = list(group)
            if key is not None:
                strides = self.sizes[names[0]], shape[1], 1
                stack = (len(names), *shape), strides, self.offsets[names[0]]
                found.append((key, self.weights.as_strided(*stack), self.grads.as_strided(*stack)))
        return found


COEFFICIENTS = {  # of each iteration; those of Polar Express (arXiv:2505.16932) reach 0.86 to 1.14 from 0.001
    "jordan": 5 * ((3.4445, -4.7750, 2.0315),),
    "polar": ((8.156554524902461, -22.48329292557795, 15.878769915207462),
              (4.042929935166739, -2.808917465908714, 0.5000178451051316),
              (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
              (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
              (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)),
}


def newton_schulz(G: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16,
                  coefficients: str = "jordan") -> Tensor:
    """Push singular values of (m, n) or (k, m, n) to 1. Jordan 2024, kellerjordan.github.io/posts/muon."""
    X = G.to(dtype).reshape(-1, *G.shape[-2:])
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = G.size(-2) > G.size(-1)
    X = X.mT if tall else X
    for a, b, c in COEFFICIENTS[coefficients][:steps]:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # sums inside the products
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)


def unit_rows(update: Tensor) -> Tensor:
    """Every row over its length."""
    return update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)


class Muon(torch.optim.Optimizer):
    """MomentUm Orthogonalized by Newton-Schulz, for matrices: Nesterov momentum, decoupled weight decay."""
    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.0, row_norm: bool = False, equalise: bool = False,
                 world: World | None = None, orthogonalise: Callable = newton_schulz):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.row_norm, self.equalise, self.orthogonalise = row_norm, equalise, orthogonalise
        rank, size, self.gather = 0, 1, lambda part: (part, lambda: None)
        if world:
            rank, size, self.gather = world.rank, world.size, world.gather
        shapes = collections.defaultdict(list)
        for p in self.param_groups[0]["params"]:
            shapes[p.shape].append(p)
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError("Muon is for matrices; give AdamW the other parameters")
        self.stacks = []  # matrices of one shape, the slice of them that is this rank's, its momentum
        for shape, stack in shapes.items():
            part = -(-len(stack) // size)  # equally long on all ranks
            own = slice(rank * part, (rank + 1) * part)
            self.stacks.append((stack, own, torch.zeros(part, *shape, device=stack[0].device)))

    @torch.no_grad()
    def step(self) -> None:
        group, pending = self.param_groups[0], []
        for stack, own, buffer in self.stacks:
            update = torch.zeros_like(buffer)
            if there := [(slot, p.grad) for slot, p in zip(update, stack[own]) if p.grad is not None]:
                torch._foreach_copy_(*zip(*there))
            buffer.mul_(group["momentum"]).add_(update)
            update.add_(buffer, alpha=group["momentum"])
            update = self.orthogonalise(unit_rows(update) if self.equalise else update)
            update = unit_rows(update) if self.row_norm else update  # (#601)
            pending.append((stack, *self.gather(update)))
        for stack, update, wait in pending:
            wait()
            rows, columns = stack[0].shape
            scale = 1.0 if self.row_norm else max(1.0, rows / columns) ** 0.5
            if moved := [(p, u) for p, u in zip(stack, update) if p.grad is not None]:
                weights, updates = zip(*moved)
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, updates, alpha=-group["lr"] * scale)

    def state_dict(self) -> dict:
        whole = []
        for stack, _, buffer in self.stacks:
            full, wait = self.gather(buffer)
            wait()
            whole.append(full[:len(stack)].cpu())
        return {"momentum": whole}

    def load_state_dict(self, state: dict) -> None:
        for (_, own, buffer), full in zip(self.stacks, state["momentum"]):
            buffer[:len(full[own])] = full[own]


class Optimisers:
    """Muon for matrices, AdamW for embeddings and control tensors, one schedule."""
    def __init__(self, flat: FlatParameters, roles: Mapping[str, str], hp: Hyperparameters, world: World,
                 orthogonalise: Callable):
        members = {"matrix": [], "embed": [], "control": []}
        for name, p in flat.parameters.items():
            members[ROLES[roles[name]][0]].append(p)
        matrices, tables, control = members.values()
        self.muon = Muon(matrices, hp.matrix_lr, hp.muon_momentum, hp.muon_wd, hp.muon_row_norm,
                         hp.muon_equalise, world, orthogonalise)
        self.adamw = torch.optim.AdamW(
            [dict(params=tables, lr=hp.tied_embed_lr, weight_decay=hp.embed_wd or hp.adam_wd),
             dict(params=control, lr=hp.scalar_lr, weight_decay=hp.adam_wd)],
            betas=(0.9, hp.beta2), eps=1e-8, fused=True)
        self.base_lr = {kind: group["lr"] for kind, group in zip(members, self.groups)}

    @property
    def groups(self) -> list[dict]:
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self, scale: float, momentum: float) -> None:
        for group, lr in zip(self.groups, self.base_lr.values()):
            group["lr"] = lr * scale
        self.groups[0]["momentum"] = momentum
        self.muon.step()
        self.adamw.step()

    def reset(self) -> None:
        for _, _, buffer in self.muon.stacks:
            buffer.zero_()
        self.adamw.state.clear()

    def describe(self) -> Iterator[str]:
        for (kind, lr), group in zip(self.base_lr.items(), self.groups):
            yield (f"optimiser group:{kind} method:{'muon' if kind == 'matrix' else 'adamw'} "
                   f"tensors:{len(group['params'])} params:{sum(p.numel() for p in group['params'])} lr:{lr} "
                   f"weight_decay:{group['weight_decay']}")

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: Mapping) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


Progress = collections.namedtuple("Progress", "step total")  # done, and at the present pace in all


def progress_at(hp: Hyperparameters, step: int, clock: Clock) -> Progress:
    """By the clock where that ends a run, else by its steps."""
    by_clock = step * clock.limit / clock.at(step) if clock.limit and clock.at(step) else math.inf
    return Progress(step, min(by_clock, hp.iterations))


def warmdown_steps(hp: Hyperparameters, progress: Progress) -> float:
    """WARMDOWN_ITERS, or the last 60 % of a run that is shorter: none starts below its full rate."""
    if hp.warmdown_frac:
        return hp.warmdown_frac * progress.total
    return hp.warmdown_iters if hp.warmdown_iters <= progress.total else 0.6 * progress.total


def lr_scale(hp: Hyperparameters, progress: Progress) -> float:
    """The learning rate's share, 1, and over the last steps down to MIN_LR."""
    left, steps = max(progress.total - progress.step, 0), warmdown_steps(hp, progress)
    return max(min(1.0, left / steps), hp.min_lr) if steps else 1.0


def muon_momentum(hp: Hyperparameters, progress: Progress) -> float:
    """Muon's momentum: a linear warm-up by steps."""
    warm_up = hp.muon_momentum_warmup_steps
    share = min(progress.step / warm_up, 1.0) if warm_up else 1.0
    return hp.muon_momentum_warmup_start + (hp.muon_momentum - hp.muon_momentum_warmup_start) * share


def loops_on(hp: Hyperparameters, progress: Progress) -> bool:
    """Whether a step runs the looped layers again."""
    return hp.num_loops > 0 and progress.step >= hp.enable_looping_at * progress.total


def segment_length(hp: Hyperparameters, progress: Progress) -> int:
    """The longest segment of a step, PR #2014: of the schedule's first stage that is not over, else T."""
    stages = re.findall(r"(\d+)@([\d.]+)", hp.train_seq_schedule)
    now = (int(length) for length, until in stages if progress.step < float(until) * progress.total)
    return next(now, hp.train_seq_len)


def qat_active(hp: Hyperparameters, scale: float) -> bool:
    """Whether a step of this learning rate is fake-quantised."""
    return scale < hp.late_qat_threshold


def soft_round_alpha(hp: Hyperparameters, scale: float) -> float:
    """Sharpness: 1 at the threshold, soft_round_alpha at the end."""
    return 1 + (hp.soft_round_alpha - 1) * max(0.0, 1 - scale / hp.late_qat_threshold)


def clip_gradients(grads: Tensor, limit: float) -> None:
    """Scale the gradients down to a norm, without a host synchronisation."""
    if limit:
        grads.mul_((limit / (grads.norm() + 1e-6)).clamp(max=1.0))


# ----------------------------------------------------------
# 9 Averaging
# The average of late weights is better than the last weights, and kept in fp32: bf16 would lose what a
# step adds.

class EMA:
    """Exponential moving average, the first value divided out (arXiv:1412.6980, 3); of decay 1 the mean."""
    def __init__(self, tensor: Tensor, decay: float = 1.0):
        self.average, self.decay, self.count = tensor.detach().float().clone(), decay, 0

    def update(self, tensor: Tensor) -> None:
        self.count += 1
        d = self.decay
        newest = (1 - d) / (1 - d ** self.count) if d < 1 else 1 / self.count
        self.average.lerp_(tensor.detach().float(), newest)

    def state_dict(self) -> dict:
        return {"average": self.average.cpu(), "count": self.count}

    def load_state_dict(self, state: Mapping) -> None:
        self.average.copy_(state["average"])
        self.count = state["count"]


class SWA(EMA):
    """Stochastic weight averaging, the mean of snapshots (arXiv:1803.05407)."""


# ----------------------------------------------------------
# 10 Quantiser
# A step rule gives every row and column its step, a rounder its codes. Both see training data, so they run
# inside the training clock (#606 was closed because it did not).

@torch.no_grad()
def output_curvature(model: GPT, sequences: np.ndarray, world: World, batch: int = 4) -> dict[str, Tensor]:
    """How the loss, in nats, bends at each matrix's outputs, (), and in each table's rows, (rows,), by name.

    The mean squared gradient, K-FAC's other factor (arXiv:1503.05671), times a row's frequency; at the output
    the squared error of the probabilities.
    """
    tables, seen = model.max_codes("embed"), []
    names = [*model.max_codes("matrix"), *tables]
    layers = {model.get_submodule(name.removesuffix(".weight")): i for i, name in enumerate(names)}
    power = torch.zeros(len(names), device=world.device)
    counts = {name: torch.zeros(len(model.get_parameter(name)), device=world.device) for name in tables}
    mine = torch.from_numpy(sequences[world.rank:: world.size]).to(world.device)
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(lambda *visit: seen.append(visit)))
        for rows in filter(len, mine.split(batch)):  # a rank may have none
            seen.clear()
            x, y = rows[:, :-1], rows[:, 1:]
            with world.autocast(), torch.enable_grad():
                logits = model(x, None, document_bounds(model.hp, x, x.size(1), world))
                loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
            to_logits, *to_outputs = torch.autograd.grad(loss, [logits, *(output for *_, output in seen)])
            power[layers[model.tok_emb]] += to_logits.square().sum()
            for (layer, inputs, _), to_output in zip(seen, to_outputs):
                power[layers[layer]] += to_output.float().square().mean(-1).sum()
                if (name := names[layers[layer]]) in counts:
                    counts[name] += torch.bincount(inputs[0].flatten(), minlength=len(layer.weight))
    found = dict(zip(names, world.sum_(power) / sequences[:, 1:].size))
    return found | {name: found[name] * world.sum_(count) / count.sum() for name, count in counts.items()}


@torch.no_grad()
def collect_hessians(model: GPT, sequences: np.ndarray, world: World,
                     batch_tokens: int = 16384) -> dict[str, Tensor]:
    """Mean x xT of matrices' inputs over (N, T), (in, in) by name; for water the loss's Hessians."""
    read_by = {name: model.get_submodule(re.sub("c_[kv]", "c_q", name).removesuffix(".weight"))
               for name in model.max_codes("matrix")}
    hessians = {layer: torch.zeros(2 * [layer.weight.size(1)], device=world.device)
                for layer in read_by.values()}

    def add(layer, inputs, _output) -> None:
        x = inputs[0].flatten(0, -2).float()
        hessians[layer].addmm_(x.mT, x)

    mine = torch.from_numpy(sequences[world.rank:: world.size]).to(world.device)
    with contextlib.ExitStack() as hooks, world.autocast():
        for layer in hessians.keys() - {model.tok_emb}:
            hooks.enter_context(layer.register_forward_hook(add))
        for rows in filter(len, mine.split(max(batch_tokens // sequences.shape[1], 1))):
            hidden = model.hidden(rows, document_bounds(model.hp, rows, rows.size(1), world))
            if model.tok_emb in hessians:  # it reads the stream at the output
                add(model.tok_emb, (hidden,), None)
    for hessian in hessians.values():
        world.sum_(hessian).div_(sequences.size)
    bent = output_curvature(model, sequences[::4], world) if model.hp.step_rule == "water" else {}
    found = {name: hessians[layer] for name, layer in read_by.items()}
    return bent | {name: bent[name] * found[name] for name in found} if bent else found


def inverse_cholesky(hessian: Tensor, damp: float) -> Tensor:
    """Upper triangular U, inverse(H + damp mean(diag H) I) = UT U; H and U (k, n, n)."""
    eye = torch.eye(hessian.size(-1), dtype=hessian.dtype, device=hessian.device)
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    scaled = mean.where(mean > 0, 1.0) * eye
    # read backwards, Cholesky's H = R RT: R inverts to U, where the paper factorises three times
    damped = (hessian + damp * scaled).flip(-2, -1)
    factor, failed = torch.linalg.cholesky_ex(damped)
    for extra in (0.0, *(10.0 ** power for power in range(-2, 7))):  # in float64, then with more damping
        if bad := failed.nonzero().flatten().tolist():
            again, failed[bad] = torch.linalg.cholesky_ex(damped[bad].double() + extra * scaled[bad])
            factor[bad] = again.to(factor.dtype)
    if failed.any():
        raise UserError("a hessian's entries overflow; QUANTIZER=rtn does without")
    return torch.linalg.solve_triangular(factor.flip(-2, -1), eye.expand_as(hessian), upper=True)


def act_order(hessian: Tensor, damp: float) -> tuple[Tensor, Tensor, Tensor]:
    """The columns by descending diagonal (k, n), U in that order, and which never fire."""
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    ordered = hessian.take_along_dim(order.unsqueeze(-1), 1).take_along_dim(order.unsqueeze(1), 2)
    return order, inverse_cholesky(ordered, damp), ordered.diagonal(dim1=-2, dim2=-1) <= 0


def best_scales(weight: Tensor, max_code: int, importance: Tensor, candidates: Iterable[Tensor]) -> Tensor:
    """Each row's candidate (k, out) of least error; weight (k, out, in), importance (k, in)."""
    tried = [storable(scales) for scales in candidates]
    errors = (weight - round_to_grid(weight, scales, max_code).dequantize() for scales in tried)
    weighted = torch.cat([error.square_() @ importance.unsqueeze(-1) for error in errors], -1)
    return torch.stack(tried, -1).take_along_dim(weighted.argmin(-1, keepdim=True), -1).squeeze(-1)


def factor_diagonal(hessian: Tensor, damp: float = 0.01) -> Tensor:
    """U's diagonal by column (k, in): 1 over an input's deviation, given those rounded later."""
    order, U, _ = act_order(hessian, damp)
    return U.diagonal(dim1=-2, dim2=-1).take_along_dim(order.argsort(), -1)


def search_scales(weight: Tensor, max_code: int, multiplier: float, diagonal: Callable, *_) -> Tensor:
    """The clip of least GPTQ error, sum e_j^2 / U_jj^2, times the multiplier."""
    full = row_scales(weight, max_code)
    shares = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62, 0.54)
    return multiplier * best_scales(weight, max_code, diagonal() ** -2, (full * share for share in shares))


def lite_scales(weight: Tensor, max_code: int, multiplier: float, *_) -> Tensor:
    """GPTQ-lite: each row's best of five clip percentiles by squared error."""
    magnitude, most = weight.abs().sort(dim=-1).values, weight.size(-1) - 1
    clips = (magnitude[..., round(share * most)] for share in (0.999, 0.9995, 0.9999, 0.99999, 1.0))
    candidates = (clip * (multiplier / max_code) for clip in clips)
    return best_scales(weight, max_code, torch.ones_like(weight[:, 0]), candidates)


def water_columns(weight: Tensor, scales: Tensor, max_code: int, diagonal: Tensor) -> Tensor:
    """Steps in proportion to U's diagonal: reverse water-filling, as in WaterSIC (arXiv:2603.04956).

    Columns rounded first have so small a diagonal that their codes would leave the grid, which costs more
    than all else gains: a step holds 1.6 times the largest weight.
    """
    octaves = diagonal.log2() - diagonal.log2().mean(-1, keepdim=True)
    least = (weight.abs().amax(-2) * (1.6 / max_code) / scales[:, :1]).log2()
    return (8 * torch.maximum(octaves, least)).round().clamp_(-127, 127)


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, max_code: int, damp: float = 0.01,
         scales: Tensor | None = None, columns: Tensor | None = None) -> QuantizedTensor:
    """Round a weight column by column, moving each column's error onto the columns not yet rounded.

    weight (out, in), hessian (in, in), mean of x xT, scales (out,), None: searched, columns (in,) as in
    QuantizedTensor; all may be batched.
    Frantar et al. 2023, algorithm 1, arXiv:2210.17323, the largest diagonal first.
    """
    if weight.ndim == 2:
        steps = [each if each is None else each[None] for each in (scales, columns)]
        one = gptq(weight[None], hessian[None], max_code, damp, *steps)
        return QuantizedTensor(one.codes[0], one.scales[0], max_code, columns=columns)
    k, out, n = weight.shape
    shapes = {"weight": (k, out, n), "hessian": (k, n, n), "scales": (k, out), "columns": (k, n)}
    for (what, shape), each in zip(shapes.items(), (weight, hessian, scales, columns)):
        if each is not None and (each.shape != shape or not torch.isfinite(each).all()):
            raise ValueError(f"{what} must be finite and of shape {shape}, got {tuple(each.shape)}")
    weight, hessian = weight.float(), hessian.float()
    order, U, dead = act_order(hessian, damp)
    # transposed, so that a column of the weight is contiguous; what never fires does not matter
    W = weight.mT.take_along_dim(order.unsqueeze(-1), 1).masked_fill_(dead.unsqueeze(-1), 0.0)
    if scales is None:
        scales = search_scales(W.mT, max_code, 1.0, partial(U.diagonal, dim1=-2, dim2=-1))
    scales = storable(scales)
    if columns is not None:  # in units of its step a column is rounded as any other
        units = torch.exp2(columns.float() / 8).take_along_dim(order, -1)
        W, U = W / units.unsqueeze(-1), U / units.unsqueeze(-2)
    Q, E = torch.empty_like(W), torch.empty_like(W)
    for low in range(0, n, 128):
        high = min(low + 128, n)
        for j in range(low, high):
            Q[:, j] = torch.round(W[:, j] / scales).clamp_(-max_code, max_code)
            E[:, j] = (W[:, j] - Q[:, j] * scales) / U[:, j, j, None]
            W[:, j + 1: high].baddbmm_(U[:, j, j + 1: high, None], E[:, j, None], alpha=-1)
        # the rest has the errors of a block in one product
        W[:, high:].baddbmm_(U[:, low:high, high:].mT, E[:, low:high], alpha=-1)
    codes = Q.take_along_dim(order.argsort().unsqueeze(-1), 1).mT.to(torch.int8).contiguous()
    return QuantizedTensor(codes, scales, max_code, columns=columns)


FINEST = 2.0 ** -20  # of water's steps; a weight costs a 24th of its square, in nats
STEP_RULES = {  # (weights (k, out, in), max_code, multiplier, -> U's diagonal (k, in), role) -> (k, out)
    "absmax": lambda weight, max_code, multiplier, *_: row_scales(weight, max_code, multiplier),
    "clip": search_scales,
    "lite": lite_scales,
    "sigma": lambda weight, max_code, multiplier, _, role:  # SDClip, before the rate's factor
        weight.std(-1) * (ROLES[role][2] * multiplier / max_code),
    "water": lambda weight, _, multiplier, diagonal, role:  # every weight then costs as many nats
        (FINEST * multiplier * diagonal().log2().mean(-1, keepdim=True).exp2()).expand(weight.shape[:-1]),
}
QUANTIZERS = {  # (weights, hessians, max_code, scales, columns) -> codes
    "gptq": lambda weight, hessian, max_code, *steps: gptq(weight, hessian, max_code, 0.01, *steps),
    "rtn": lambda weight, _, max_code, scales, columns: round_to_grid(weight, scales, max_code, columns),
}


def grid_of(rule: str, weight: Tensor, max_code: int, multiplier: float,
            diagonal: Callable[[], Tensor], role: str = "attn") -> tuple[Tensor, Tensor]:
    """A rule's steps for (k, out, in) as the artifact will hold them: scales (k, out), columns (k, in)."""
    scales = storable(STEP_RULES[rule](weight, max_code, multiplier, diagonal, role))
    columns = torch.zeros_like(weight[:, 0])
    if rule == "water":
        columns = water_columns(weight, scales, max_code, diagonal())
    return scales, columns.to(torch.int8)


def weighted_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """trace(E H ET) of each matrix: the mean squared error of the layer's output."""
    error = rounded - weight
    return ((error @ hessian) * error).sum((-2, -1))


def prune_smallest(weight: Tensor, share: float) -> Tensor:
    """Zero a share of a tensor's entries, the smallest by magnitude."""
    smallest = weight.abs().flatten().topk(int(share * weight.numel()), largest=False).indices
    return weight.flatten().index_fill(0, smallest, 0.0).view_as(weight)


def quantize_rest(model: GPT, weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor] = {},
                  multiplier: float = 1.0) -> Tensors:
    """All but the matrices, on the CPU: tables rounded plainly, frequent rows finer; the rest fp16."""
    tables, matrices = model.max_codes("embed"), model.max_codes("matrix")
    done = {name: weight.cpu().half() for name, weight in weights.items() if name not in matrices}
    for name, max_code in tables.items():
        pruned = prune_smallest(weights[name].float().cpu(), model.hp.prune_pct)
        scales = row_scales(pruned, max_code)
        if name in hessians and not model.hp.target_bits:  # half as if all rows were as frequent
            eighths = (hessians[name] + hessians[name].mean()).cpu().rsqrt().log2().mul(8).round()
            scales = torch.maximum(scales, FINEST * multiplier * torch.exp2(eighths / 8))
        q = round_to_grid(pruned, storable(scales), max_code)
        done[name] = dataclasses.replace(q, role=model.roles()[name])
    return done


@torch.no_grad()
def quantize_model(model: GPT, weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor], world: World,
                   multiplier: float = 1.0) -> tuple[Tensors, dict]:
    """Quantised tensors on the CPU; by role and matrix the errors of plain rounding and of these."""
    hp, roles, matrices = model.hp, model.roles(), model.max_codes("matrix")
    done, report = quantize_rest(model, weights, hessians, multiplier), {"matrices": {}}
    kind = lambda name: (tuple(weights[name].shape), matrices[name], roles[name])
    for (shape, max_code, role), group in itertools.groupby(sorted(matrices, key=kind), kind):
        names = list(group)
        own = world.shard(len(names))
        codes = torch.zeros(len(names), *shape, dtype=torch.int8, device=world.device)
        columns = torch.zeros_like(codes[:, 0])
        scales = torch.zeros(len(names), shape[0], device=world.device)
        errors = torch.zeros(len(names), 2, dtype=torch.float64, device=world.device)
        if own:
            latent = torch.stack([weights[names[i]] for i in own]).to(world.device, torch.float32)
            W = torch.stack([prune_smallest(weight, hp.prune_pct) for weight in latent])
            H = torch.stack([hessians[names[i]] for i in own])
            grid = grid_of(hp.step_rule, W, max_code, multiplier, partial(factor_diagonal, H), role)
            q = QUANTIZERS[hp.quantizer](W, H, max_code, *grid)
            grid = grid if hp.quantizer == "gptq" else grid_of("absmax", W, max_code, multiplier, None, role)
            plain = QUANTIZERS["rtn"](W, None, max_code, *grid)
            codes[own], scales[own], columns[own] = q.codes, q.scales, q.columns
            for column, each in enumerate((plain, q)):
                errors[own, column] = weighted_error(latent, each.dequantize(), H).double()
        codes, scales, columns, errors = (world.sum_(part).cpu() for part in (codes, scales, columns, errors))
        for i, name in enumerate(names):
            done[name] = QuantizedTensor(codes[i], scales[i], max_code, role, columns[i])
            before, after = report["matrices"][name] = errors[i].tolist()
            floored_rows = int((scales[i] <= SCALE_FLOOR).sum())
            report.setdefault(role, collections.Counter()).update(
                matrices=1, error_rounding=before, error=after, floored_rows=floored_rows)
    return done, report


# ----------------------------------------------------------
# 11 Coder
# One file: a prefix, a JSON header, a rANS frame for the codes of each role, zstd frames of the rest, the
# SHA-256 of all; nothing in it is executed. Columns whose codes are alike in size share their frequencies.
# All steps grow by one factor until the file fits.

MAGIC, FORMAT_VERSION = b"PGOLFGPT", 3
LEVEL = 22  # of zstd, for what is not codes
RANS = ("attn.", "mlp.")  # sections of Gaussian codes; in the rest there are matches to find
SHARES = 1 << 14  # that a class's frequencies add up to
LANES, CLASSES = 1 << 12, 20  # states and classes, at most
COARSEST = 1e7  # multiplier of the steps: every code is zero
SPARE = 0.003  # of what is left for the matrices may stay empty; a forecast aims at half of it
PREFIX = struct.Struct("<8sIII")  # magic, version, bytes of the packed and of the plain header
MOST_HEADER_BYTES, MOST_BYTES, MOST_DIMS = 1 << 22, 1 << 31, 64
MOST_DENSE = 1000  # plain bytes per byte of a file; a model of zeros alone has fewer
DTYPES = {"codes": torch.uint8} | {name: getattr(torch, name) for name in (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")}


def require(sound: bool, fault: str) -> None:
    """Refuse an artifact."""
    if not sound:
        raise UserError(f"damaged artifact: {fault}")


def zstd_content(frame: bytes, size: int) -> bytes:
    """The content of a frame, of exactly `size` bytes."""
    require(zstandard.frame_content_size(frame) == size >= 0, "a frame holds not what the header says")
    return zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's elements in row order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_tensor(stream: io.BytesIO, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """The next tensor of a stream that tensor_bytes wrote."""
    data = np.frombuffer(bytearray(stream.read(math.prod(shape) * dtype.itemsize)), np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape)


def by_class(codes: Tensor, max_code: int) -> tuple[Tensor, list[bytes]]:
    """Each column's class, of codes (..., in), and by class the offset codes.

    A class is an octave of the mean square, in integers: all machines write the same bytes.
    """
    columns = codes.reshape(math.prod(codes.shape[:-1]), codes.shape[-1]).T.contiguous()
    power = 16 * columns.long().square().sum(1) // max(columns.size(1), 1)
    classes = torch.frexp(power.double()).exponent.to(torch.uint8)
    offset = columns + max_code  # wraps into 0..254
    return classes, [tensor_bytes(offset[classes == each]) for each in range(CLASSES)]


def histogram(parts: list[bytes]) -> np.ndarray:
    """How often each byte occurs in each part, (CLASSES, 256)."""
    return np.stack([np.bincount(np.frombuffer(part, np.uint8), minlength=256) for part in parts])


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts (CLASSES, 256) as shares of SHARES, at least one for what occurs."""
    occurs, total = counts > 0, counts.sum(1, keepdims=True)
    shares = occurs + counts * (SHARES - occurs.sum(1, keepdims=True)) // np.maximum(total, 1)
    shares[np.arange(CLASSES), counts.argmax(1)] += (SHARES - shares.sum(1)) * (total[:, 0] > 0)
    return shares


def rans_head(shares: np.ndarray, sizes: np.ndarray, states: np.ndarray) -> bytes:
    """What opens a rANS frame: frequencies, symbols by class, last states."""
    plain = np.concatenate([shares.ravel(), sizes, states]).astype("<u4")
    planes = np.ascontiguousarray(plain.view(np.uint8).reshape(-1, 4).T).tobytes()
    return struct.pack("<II", len(packed := zstandard.compress(planes, LEVEL)), len(planes)) + packed


def rans_frame(parts: list[bytes]) -> bytes:
    """Symbols by class at their frequencies' cost: static rANS, arXiv:1311.2540, in lanes, arXiv:1402.3392.

    States have 32 bits and emit 16 at a time; integers alone.
    """
    counts = histogram(parts)
    shares, sizes = frequencies(counts), counts.sum(1)
    symbols = np.frombuffer(b"".join(parts), np.uint8)
    keys = np.repeat(np.arange(CLASSES, dtype=np.uint16) << 8, sizes) | symbols
    share, start = (each.astype(np.uint32).ravel() for each in (shares, shares.cumsum(1) - shares))
    states = np.full(min(max(len(keys) >> 12, 1), LANES), 1 << 16, np.uint32)
    words = []
    for at in reversed(range(0, len(keys), len(states))):  # what is written last is read first
        here = keys[at: at + len(states)]
        x, f = states[:len(here)], share[here]
        full = x >> 18 >= f
        words.append(x[full].astype("<u2").tobytes())
        x = np.where(full, x >> 16, x)
        whole = x // f
        states[:len(here)] = (whole << 14) + x - whole * f + start[here]
    return rans_head(shares, sizes, states) + b"".join(reversed(words))


def rans_content(frame: bytes, size: int) -> list[io.BytesIO]:
    """The symbols of a rANS frame by class, `size` in all."""
    packed, plain = struct.unpack_from("<II", frame)
    require(plain <= MOST_HEADER_BYTES, "impossible frequencies")
    planes = np.frombuffer(zstd_content(frame[8: 8 + packed], plain), np.uint8).reshape(4, -1)
    head = np.ascontiguousarray(planes.T).view("<u4").ravel()
    shares, sizes, states = np.split(head, [CLASSES << 8, CLASSES * 257])
    held = shares.reshape(CLASSES, 256).sum(1, dtype=np.uint64)
    require(sizes.sum(dtype=np.uint64) == size and 0 < len(states) <= LANES
            and (held == SHARES * (sizes > 0)).all(), "impossible frequencies")
    keys = np.repeat(np.arange(len(shares), dtype=np.uint16), shares)  # by class and slot
    into = np.arange(len(keys), dtype=np.uint32) - (shares.cumsum(dtype=np.uint32) - shares)[keys]
    begins = held.cumsum().astype(np.uint32) - SHARES
    classes = np.repeat(np.arange(CLASSES, dtype=np.uint8), sizes)
    words = np.frombuffer(frame[8 + packed:], "<u2")
    found = np.empty(size, np.uint8)
    for at in range(0, size, len(states)):
        own = begins[classes[at: at + len(states)]]
        x = states[:len(own)]
        slot = own + (x & (SHARES - 1))
        key = keys[slot]
        found[at: at + len(own)] = key  # the low byte, its symbol
        x = shares[key] * (x >> 14) + into[slot]
        low = np.flatnonzero(x < 1 << 16)
        x[low] = (x[low] << 16) | words[:len(low)]
        states[:len(own)] = x
        words = words[len(low):]
    require(not len(words) and (states == 1 << 16).all(), "its codes do not end where they should")
    return [io.BytesIO(part) for part in np.split(found, sizes.cumsum()[:-1])]


def pack(config: dict, tensors: Tensors, level: int = LEVEL) -> bytes:
    """A JSON dict and tensors as one file; ValueError for what it cannot hold."""
    sections, entries = collections.defaultdict(list), []
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, QuantizedTensor):
            data, scales, max_code = tensor.codes.cpu(), tensor.scales.cpu().half(), tensor.max_code
            if not 1 <= max_code <= 127 or (data.int().abs() > max_code).any():
                raise ValueError(f"{name}: needs codes within +-max_code, and that within 1..127")
            if scales.shape != data.shape[:-1] or not torch.isfinite(scales).all():
                raise ValueError(f"{name}: needs a scale per row, finite in fp16")
            columns = data.new_zeros(data.shape[-1:]) if tensor.columns is None else tensor.columns.cpu()
            if columns.shape != data.shape[-1:] or columns.dtype != torch.int8:
                raise ValueError(f"{name}: needs an int8 per column")
            sections["scales"].append([tensor_bytes(scales)])
            sections["columns"].append([tensor_bytes(columns)])
            kind, section = "codes", f"{tensor.role}.{max_code}"
            parts = [tensor_bytes(data + max_code)]
            if section.startswith(RANS):
                classes, parts = by_class(data, max_code)
                sections["classes"].append([tensor_bytes(classes)])
        else:
            kind, max_code, data = str(tensor.dtype).removeprefix("torch."), 0, tensor
            section = f"raw.{kind}"
            if kind not in DTYPES:
                raise ValueError(f"{name}: tensors of {tensor.dtype} cannot be packed")
            parts = [tensor_bytes(data)]
        sections[section].append(parts)
        entries.append([name, kind, list(data.shape), section, max_code])
    plain = {key: [*map(b"".join, zip(*parts))] for key, parts in sorted(sections.items())}  # by class
    packed = {key: rans_frame(parts) if key.startswith(RANS) else zstandard.compress(*parts, level)
              for key, parts in plain.items()}
    sizes = [[key, len(frame), sum(map(len, plain[key]))] for key, frame in packed.items()]
    header = json.dumps({"config": config, "tensors": entries, "sections": sizes},
                        separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    small = zstandard.compress(header, LEVEL)
    body = b"".join([PREFIX.pack(MAGIC, FORMAT_VERSION, len(small), len(header)), small, *packed.values()])
    return body + hashlib.sha256(body).digest()


def read_header(blob: bytes) -> tuple[dict, int]:
    """A file's header, its claims checked before anything is decompressed, and where it ends."""
    if len(blob) < PREFIX.size + 32 or blob[:8] != MAGIC:
        raise UserError("not an artifact of this script, or a truncated one")
    _, version, small, size = PREFIX.unpack_from(blob)
    if version != FORMAT_VERSION:
        raise UserError(f"artifact format {version}, not {FORMAT_VERSION}: use the script that made it")
    require(sha256(blob[:-32]) == blob[-32:].hex(), "its checksum does not match its content")
    require(size <= MOST_HEADER_BYTES, "impossible header size")
    end = PREFIX.size + small
    with reading("damaged artifact: its header", "make it again"):
        header = parse_json(zstd_content(blob[PREFIX.size: end], size))
        tensors, sections = header["tensors"], header["sections"]
        numbers = [number for _, *sizes in sections for number in sizes]
        for name, _, shape, _, max_code in tensors:
            require(isinstance(name, str) and len(shape) <= MOST_DIMS, "impossible name or shape")
            numbers += [max_code, *shape]
        require(all(type(n) is int and 0 <= n <= MOST_BYTES for n in numbers), "impossible number")
        require(type(header["config"]) is dict and len({name for name, *_ in tensors}) == len(tensors)
                and len({key for key, *_ in sections}) == len(sections), "impossible names")
        require(sum(packed for _, packed, _ in sections) == len(blob) - 32 - end
                and sum(plain for *_, plain in sections) <= MOST_BYTES, "impossible sections")
    return header, end


def unpack(blob: bytes) -> tuple[dict, Tensors]:
    """What `pack` was given; executes nothing. ValueError on damage or an impossible claim."""
    header, end = read_header(blob)
    frames, tensors = io.BytesIO(blob[end:-32]), {}
    with reading("damaged artifact: its content", "make it again"):
        plain = {key: rans_content(frames.read(packed), size) if key.startswith(RANS)
                 else [io.BytesIO(zstd_content(frames.read(packed), size))]
                 for key, packed, size in header["sections"]}
        for name, kind, shape, section, max_code in header["tensors"]:
            if kind == "codes" and section.startswith(RANS):
                classes = read_tensor(*plain["classes"], torch.uint8, shape[-1:])
                counts, rows = classes.bincount(minlength=CLASSES).tolist(), math.prod(shape[:-1])
                parts = [read_tensor(part, torch.uint8, [count, rows])
                         for part, count in zip(plain[section], counts, strict=True)]
                data = torch.cat(parts)[classes.argsort(stable=True).argsort()].T.reshape(shape)
            else:
                data = read_tensor(*plain[section], DTYPES[kind], shape)
            tensors[name] = data
            if kind == "codes":
                require(1 <= max_code <= 127 and not (data > 2 * max_code).any(), "a code is off its grid")
                scales = read_tensor(*plain["scales"], torch.float16, shape[:-1])
                require((scales.isfinite() & (scales >= 0)).all(), "a scale negative or not finite")
                columns = read_tensor(*plain["columns"], torch.int8, shape[-1:])
                codes, role = (data - max_code).view(torch.int8), section.rpartition(".")[0]
                tensors[name] = QuantizedTensor(codes, scales.float(), max_code, role, columns)
        require(not any(part.read(1) for parts in plain.values() for part in parts), "bytes of no tensor")
    return header["config"], tensors


def byte_report(blob: bytes) -> dict[str, dict[str, int]]:
    """Packed and plain bytes of each section of a file."""
    header, end = read_header(blob)
    return {"header": {"bytes": end + 32}} | {
        key: {"bytes": size, "plain_bytes": plain} for key, size, plain in header["sections"]}


def artifact_config(hp: Hyperparameters, facts: dict) -> dict:
    """The model's settings, and where the file comes from."""
    return {"model": {name: getattr(hp, name) for name in hp.fields("model")}, "facts": facts}


class Rate:
    """Forecasts the packed bytes by the coder's lengths of a sample of rows, rounded plainly."""
    def __init__(self, model: GPT, weights: Mapping[str, Tensor], room: int,
                 hessians: Mapping[str, Tensor] = {}):
        hp, roles, side = model.hp, model.roles(), {}
        adapts = not hp.target_bits and hessians.keys() & model.max_codes("embed")
        level = 3 if adapts else LEVEL  # quickly, where again and again
        size = lambda multiplier, side={}: len(pack(artifact_config(hp, {}), {
            **quantize_rest(model, weights, hessians, multiplier), **side}, level))
        self.rule, self.samples = hp.step_rule, collections.defaultdict(list)
        for name, max_code in model.max_codes("matrix").items():
            weight = weights[name][None].float()
            diagonal = cache(lambda name=name: factor_diagonal(hessians[name][None]).cpu())
            rows = weight[:, :: max(weight.numel() >> 16, 1)].cpu()
            self.samples[roles[name], max_code].append((rows, weight.numel() / rows.numel(), diagonal))
            scales, columns = grid_of(self.rule, weight.cpu(), max_code, 1.0, diagonal, roles[name])
            codes = torch.zeros(weight.shape[1:], dtype=torch.int8)
            side[name] = QuantizedTensor(codes, scales[0], max_code, roles[name], columns[0])
        fixed, counted = size(1.0), sum(weights[name].numel() for name in side)
        self.side = size(1.0, side) - fixed  # what the matrices need beside their codes
        self.rest = size if adapts else lambda _: fixed
        self.room = min(room, fixed + int(hp.target_bits * counted / 8) if hp.target_bits else room)
        self.spare = max(self.room - self.rest(COARSEST), 0) * SPARE
        self.limit = self.room - self.spare / 2
        if self.bytes(COARSEST) > self.limit:
            raise UserError(f"no step fits the {self.room}B that the code and ARTIFACT_LIMIT or TARGET_BITS "
                            "leave; lower VOCAB_SIZE or MODEL_DIM")

    def bytes(self, multiplier: float) -> float:
        total, classes = self.side + self.rest(multiplier), []
        for (role, max_code), samples in self.samples.items():
            counts = np.zeros((CLASSES, 256))
            for rows, times, diagonal in samples:
                scales, columns = grid_of(self.rule, rows, max_code, multiplier, diagonal, role)
                found, parts = by_class(round_to_grid(rows, scales, max_code, columns).codes, max_code)
                counts += times * histogram(parts)
                classes.append(tensor_bytes(found))
            shares = frequencies(counts.astype(np.int64))
            total += (counts * (14 - np.log2(shares.clip(1)))).sum() / 8
            total += len(rans_head(shares, counts.sum(1), np.zeros(0)))
        return total + len(zstandard.compress(b"".join(classes), LEVEL))

    def multiplier(self, over: float = 0.0) -> float:
        """The smallest multiplier, from 1, to fit, where the forecast is so many bytes too low."""
        limit = self.limit - over
        steps = range(math.ceil(math.log(COARSEST, 1.0005)))
        return 1.0005 ** bisect.bisect_left(steps, True, key=lambda step: self.bytes(1.0005 ** step) <= limit)


def fit_artifact(run: Run, model: GPT, weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor],
                 facts: dict, passes: int = 6) -> tuple[bytes, dict]:
    """The file that fills what the code leaves, and the quantiser's report."""
    rate, best = Rate(model, weights, run.room, hessians), b""
    multiplier = run.world.max(rate.multiplier())
    for _ in range(passes):
        tensors, errors = quantize_model(model, weights, hessians, run.world, multiplier)
        blob, forecast_bytes = pack(artifact_config(run.hp, facts), tensors), rate.bytes(multiplier)
        run.log(f"pack multiplier:{multiplier:.4f} forecast:{forecast_bytes:.0f}B model:{len(blob)}B "
                f"room:{rate.room}B")
        if len(best) < len(blob) <= rate.room:
            best, report = blob, errors | {"multiplier": multiplier}
        if best and (multiplier == 1.0 or len(best) > rate.room - rate.spare):
            break
        multiplier = run.world.max(rate.multiplier(over=len(blob) - forecast_bytes))
    if not best:
        raise UserError(f"no file fits the {rate.room}B that ARTIFACT_LIMIT and the code leave; model.pt is "
                        "kept, so try STAGES=quantize with fewer ATTN_BITS or MLP_BITS")
    return best, report


def artifact_settings(header: dict, hp: Hyperparameters) -> Hyperparameters:
    """hp with the model of a file, techniques that the file does not name off."""
    fields, given = hp.fields("model"), header["config"].get("model")
    with reading("the artifact's model", "it is none of this script"):
        settings = {name: f.metadata["off"] for name, f in fields.items()} | given
        settings = {name: tuple(value) if type(value) is list else value for name, value in settings.items()}
        wrong = [f"it does not know {brief(name)}" for name in settings.keys() - fields.keys()]
        wrong += [f"{name} is missing or of the wrong type" for name, f in fields.items()
                  if type(settings[name]) is not type(f.default)]
        hp = hp if wrong else dataclasses.replace(hp, **settings)
        wrong = wrong or problems(hp)
    if wrong:
        raise UserError(f"the artifact's settings do not fit this script: {wrong[0]}")
    return hp


def settings_for(blob: bytes, env: Mapping[str, str]) -> Hyperparameters:
    """Settings that score a file: its model's, its preset's unless PRESET is set, the environment's."""
    header, _ = read_header(blob)
    facts = header["config"].get("facts", {})
    with reading("the artifact's preset", "set PRESET"):
        known = {"PRESET": facts.get("preset")} if facts.get("preset") in PRESETS else {}
    return artifact_settings(header, Hyperparameters.from_env(known | dict(env)))


def load_artifact(blob: bytes, hp: Hyperparameters, world: World) -> tuple[GPT, dict]:
    """The model from the file alone, and its facts; nothing is taken that the model does not need."""
    header, _ = read_header(blob)
    hp, claimed = artifact_settings(header, hp), {name: shape for name, _, shape, *_ in header["tensors"]}
    require(sum(size for *_, size in header["sections"]) <= MOST_DENSE * len(blob), "it claims too much")
    require(hp.num_layers < len(claimed), "it has more layers than tensors")
    model = shell(hp)
    needed = {name: [*p.shape] for name, p in model.state_dict().items()}
    require(claimed == needed, "its tensors are not those of its settings")
    config, tensors = unpack(blob)
    weights = {name: t.dequantize() if isinstance(t, QuantizedTensor) else t.float()
               for name, t in tensors.items()}
    require(all(weight.isfinite().all() for weight in weights.values()), "a weight is not finite")
    model.load_state_dict(weights, strict=True, assign=True)
    return model.to(world.device), config.get("facts", {})


# ----------------------------------------------------------
# 12 Training
# Nothing in a step waits for the device: loss, clock and stop request travel at the end of the gradient
# vector, so all ranks read the same, a step late on CUDA, and decide alike.

@contextlib.contextmanager
def on_stop(heard: list[str] | None = None) -> Iterator[None]:
    """Add stop signals to a list, or raise KeyboardInterrupt; what is ignored (nohup) stays so."""
    def handler(number, _frame) -> None:
        name = signal.Signals(number).name
        if heard is None:
            raise KeyboardInterrupt(f"stopped by {name}; what was finished is kept, STAGES does the rest")
        heard.append(name)

    before = {number: signal.signal(number, handler)
              for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
              if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Stepper:
    """Data, compiled model, parameters, optimisers, fake quantiser."""
    def __init__(self, hp: Hyperparameters, model: GPT, stream: TokenStream, world: World, compiling: bool):
        wrap = compiled if compiling else (lambda function: function)
        self.hp, self.world, self.stream, self.compiling = hp, world, stream, compiling
        self.gpt, self.model, self.score_fn = model, wrap(model), wrap(token_losses)
        self.flat = FlatParameters(model)
        world.broadcast_(self.flat.weights)  # another CPU makes other orthogonal matrices of a seed
        orthogonalise = wrap(partial(newton_schulz, dtype=world.dtype, coefficients=hp.muon_coefficients))
        self.optimisers = Optimisers(self.flat, model.roles(), hp, world, orthogonalise)
        self.qat = FakeQuantizer(self.flat.stacks(model.max_codes("matrix")), hp.soft_round_qat, wrap)
        self.sequences = hp.train_batch_tokens // hp.row_tokens
        self.mine = world.shard(self.sequences)
        self.micro, self.longest = micro_batch(hp, world, len(self.mine), compiling), hp.train_seq_len

    def batch(self) -> tuple[Tensor, Tensor]:
        rows = self.stream.step(self.hp.train_batch_tokens, self.hp.row_tokens)
        rows = torch.from_numpy(rows[self.mine.start: self.mine.stop])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step(self, scale: float, momentum: float, qat_on: bool, elapsed: float = 0.0, stop: bool = False):
        flat, (x, y) = self.flat, self.batch()
        if qat_on:
            self.qat.quantize(soft_round_alpha(self.hp, scale))
        flat.reduced.zero_()
        for at in range(0, len(x), self.micro):
            micro = x[at: at + self.micro]
            segments = document_bounds(self.hp, micro, self.longest, self.world)
            on_device = (self.world.to_device(part) for part in (micro, y[at: at + self.micro]))
            with self.world.autocast():
                loss = self.model(*on_device, segments) * (len(micro) / self.sequences)
            loss.backward()
            flat.slot["loss"] += loss.detach()
        if qat_on:
            self.qat.restore()
        flat.slot["clock"].fill_(elapsed / self.world.size)
        flat.slot["stop"].fill_(float(stop))
        self.world.sum_(flat.reduced)
        clip_gradients(flat.grads, self.hp.grad_clip_norm)
        self.optimisers.step(scale, momentum)

    def warm_up(self) -> None:
        """Compile everything, QAT and both orders of the layers included, and undo the steps."""
        initial, orders = self.flat.weights.clone(), sorted({False, self.hp.num_loops > 0})
        for i, looping in itertools.product(range(self.hp.warmup_steps), orders):
            self.gpt.looping = looping
            self.step(1.0, self.hp.muon_momentum, qat_on=i == 0 and self.hp.late_qat_threshold > 0)
        self.flat.weights.copy_(initial)
        self.optimisers.reset()
        self.stream.position = 0

    def state_dict(self) -> dict:
        return {"weights": self.flat.weights.cpu(), "optimisers": self.optimisers.state_dict(),
                "position": self.stream.position, "qat": self.qat.state_dict()}

    def load_state_dict(self, state: Mapping) -> None:
        self.flat.weights.copy_(state["weights"])
        self.optimisers.load_state_dict(state["optimisers"])
        self.qat.load_state_dict(state["qat"])
        self.stream.position = state["position"]


class Telemetry:
    """Carries losses, clock and stop requests to the host."""
    def __init__(self, world: World, clock: Clock):
        self.world, self.clock, self.stopping, self.pending = world, clock, False, collections.deque()

    def post(self, step: int, scale: float, slots: Tensor) -> None:
        self.pending.append((step, step - len(self.pending), scale, *self.world.to_host(slots)))

    def read(self, lag: int) -> Iterator[tuple[int, float, float]]:
        """Steps done, learning-rate scale and loss of all but the newest `lag` steps."""
        while len(self.pending) > lag:
            step, self.clock.agreed_step, scale, copy, wait = self.pending.popleft()
            wait()
            loss, self.clock.agreed, stop = copy.tolist()
            self.stopping |= stop > 0
            yield step + 1, scale, loss


class StepLog:
    """A finished step's metric and line."""
    def __init__(self, run: Run, clock: Clock, first_step: int, bpb_per_nat: float, flops: float):
        self.hp, self.log, self.clock, self.bpb_per_nat = run.hp, run.log, clock, bpb_per_nat
        self.first_step, self.first_second = first_step, clock.elapsed
        rate = run.world.matrix_rate() * run.world.size
        self.ideal = flops / rate  # seconds of a step at the devices' own matrix rate
        run.log(f"machine matrix_rate:{rate / 1e12:.3f}TFLOP/s (measured) step:{flops / 1e12:.3f}TFLOP")

    def pace(self, step: int) -> float:
        return (self.clock.elapsed - self.first_second) / max(step - self.first_step, 1)

    def __call__(self, step: int, scale: float, loss: float) -> None:
        hp, seconds, pace = self.hp, self.clock.elapsed, self.pace(step)
        self.log.metric("train", step=step, loss=loss, lr_scale=scale, seconds=round(seconds, 3))
        left = min((hp.iterations - step) * pace, max((self.clock.limit or math.inf) - seconds, 0.0))
        brief = step > 5 and step % hp.train_log_every and step < hp.iterations
        (self.log.status if brief else self.log)(
            f"step:{step}/{hp.iterations} train_loss:{loss:.4f} train_bpb:{loss * self.bpb_per_nat:.4f} "
            f"left:{left:.0f}s tokens/s:{hp.train_batch_tokens / pace:.0f} step_avg:{1000 * pace:.1f}ms "
            f"mfu:{100 * self.ideal / pace:.1f}% lr_scale:{scale:.4f} time:{seconds:.1f}s")


class Checkpoint:
    """checkpoint.pt: the states of a run's parts, there whole or not at all."""
    def __init__(self, run: Run, settings: Mapping[str, object], parts: Mapping[str, object]):
        self.run, self.settings, self.parts, self.step = run, settings, parts, 0

    def __str__(self) -> str:
        return f"the last checkpoint is of step {self.step}" if self.step else "there is no checkpoint"

    def save(self, step: int, tries: int = 1) -> None:
        """Write it, unless weights are not finite: the next loss ends the run."""
        if torch.isfinite(self.parts["stepper"].flat.weights).all():
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"settings": self.settings, "step": step}
            try:
                self.run.write("checkpoint.pt", saved(state), tries)
                self.step, line = step, f"checkpoint step:{step}"
            except UserError as error:
                line = f"no checkpoint of step {step}: {error}"
            self.run.world.max(0.0)  # no rank may end the others before the file is whole
            self.run.log(line)

    def load(self) -> int:
        path = self.run.folder / "checkpoint.pt"
        with reading(path, "start under another RUN_ID"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            kept, self.step, *parts = (state[name] for name in ("settings", "step", *self.parts))
            if differ := [name.upper() for name, value in self.settings.items() if kept.get(name) != value]:
                raise UserError(f"{path} was made with other {', '.join(differ)}; resume with the same")
            for part, own in zip(self.parts.values(), parts):
                part.load_state_dict(own)
        return self.step


def measure_reserve(run: Run, model: GPT, stream: TokenStream) -> float:
    """Seconds for calibration and two solves, by doing a part of it."""
    hp, world, limit = run.hp, run.world, run.hp.max_wallclock_seconds
    if "quantize" not in hp.stages:
        return 0.0
    share, weights = max(hp.gptq_calib_sequences // 8, world.size), model.state_dict()
    sample = stream.sample(share, hp.train_seq_len, hp.seed)
    with run.training.phase("rehearsal", counted=False):
        hessians = collect_hessians(model, sample, world)  # fills caches
        calibration = world.seconds(lambda: collect_hessians(model, sample, world))
        solving = world.seconds(lambda: Rate(model, weights, run.room, hessians).multiplier())
        solving += world.seconds(lambda: pack({}, quantize_model(model, weights, hessians, world)[0]))
    reserve = world.max(calibration * hp.gptq_calib_sequences / share + 2 * solving) * 1.15 + 0.5
    run.log(f"reserve seconds:{reserve:.1f} for calibration, quantisation and packing, measured")
    if reserve > limit / 2 > 0:
        raise UserError(f"quantising takes {reserve:.0f}s; raise MAX_WALLCLOCK_SECONDS to over twice that")
    return reserve


def forecast(run: Run, positions: int, reserve: float, pace: float) -> str:
    """A run's seconds by a step's: a scored token is a third of a trained one, one of TTT three."""
    hp, token, limit = run.hp, pace / run.hp.train_batch_tokens, run.hp.max_wallclock_seconds
    steps = min(hp.iterations, (limit - reserve) / pace) if limit else hp.iterations
    plain, scores = positions * token / 3, "evaluate" in hp.stages
    sliding = scores * plain * hp.eval_seq_len / hp.eval_stride
    documents = hp.ttt_mode == "documents"
    passes = 1 + hp.ttt_fresh / int(hp.ttt_chunks.split(":")[-1]) if documents else hp.ttt_epochs
    ttt = sliding * (not documents) + scores * passes * positions * 3 * token
    ttt = min(ttt, hp.eval_seconds or math.inf)
    seconds = {"training": steps * pace, "ttt": ttt * hp.ttt_enabled, "quantising": reserve,
               "sliding": sliding * (not hp.skip_sliding), "plain": plain * (1 + scores)}
    cheaper = {"training": f"ITERATIONS={steps / 2:.0f}", "sliding": f"EVAL_STRIDE={2 * hp.eval_stride}",
               "ttt": "TTT_ENABLED=0"}
    parts = " ".join(f"{part}:{value:.0f}s" for part, value in seconds.items())
    less = cheaper[max(cheaper, key=seconds.get)]
    return f"forecast total:{sum(seconds.values()):.0f}s {parts} less_with:{less}"


def begin_qat(run: Run, model: GPT, stepper: Stepper, step: int, scale: float) -> None:
    """Settle the grid that the file will need."""
    flat, qat, multiplier, size = stepper.flat, stepper.qat, 1.0, math.nan
    if torch.isfinite(flat.weights).all():  # else the next loss ends the run
        rate = Rate(model, flat.state_dict(), run.room)
        multiplier = run.world.max(rate.multiplier())
        size = rate.bytes(multiplier)
    qat.begin(step, multiplier)
    run.log(f"qat:on step:{step + 1} lr_scale:{scale:.4f} soft:{int(run.hp.soft_round_qat)} "
            f"matrices:{sum(map(len, qat.kept))} multiplier:{multiplier:.4f} "
            f"grid_distance:{qat.distance_before:.4f} forecast:{size:.0f}B")


@torch.no_grad()
def export_average(run: Run, model: GPT, stepper: Stepper, ema: EMA, swa: SWA) -> dict:
    """Put the average in place of the weights; returns the proofs of training."""
    hp, flat, qat, chosen = run.hp, stepper.flat, stepper.qat, run.hp.averaging
    raw, distance_raw = flat.weights.clone(), qat.distance()
    if chosen == "swa" and not swa.count:
        run.log("averaging: SWA has no snapshot (SWA_EVERY, SWA_THRESHOLD), the raw weights are exported")
        chosen = "none"
    average = {"ema": ema.average, "swa": swa.average, "none": raw}[chosen]
    distance = ((average - raw).norm() / raw.norm()).item()
    proofs = {"averaging": {"distance_from_raw": distance, "exported": chosen, "swa_snapshots": swa.count},
              "qat": None}
    flat.weights.copy_(average)
    if qat.on:
        rows = torch.from_numpy(stepper.stream.sample(8, hp.train_seq_len + 1, hp.seed)).to(run.world.device)
        x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        text = x, y, document_bounds(hp, x, hp.train_seq_len, run.world)
        with run.world.autocast():
            proofs["qat"] = proof = {
                "first_step": qat.started_at + 1, "multiplier": qat.multiplier,
                "distance_before": qat.distance_before, "distance_averaged": qat.distance(),
                "distance_raw": distance_raw, "loss": model(*text).item()}
            qat.quantize(0.0, hard_quantize)
            proof["loss_rounded"] = model(*text).item()
        flat.weights.copy_(average)
    for technique, proof in proofs.items():
        run.log.proof(technique, proof)
    return proofs


def train(run: Run, model: GPT, stream: TokenStream, validation: Validation) -> tuple[dict, dict]:
    """The average of the weights, and findings; KeyboardInterrupt after a stop signal."""
    hp, world, log, lag = run.hp, run.world, run.log, run.world.tuning.lag
    # 1. what a step needs; graphs and allocators are warm before the clock starts
    flops = flops_per_token(model, hp.train_seq_len) * hp.train_batch_tokens
    stepper = Stepper(hp, model, stream, world, wants_compile(hp, world))
    flat, qat = stepper.flat, stepper.qat
    for line in stepper.optimisers.describe():
        log(line)
    log(f"train compile:{int(stepper.compiling)} dtype:{str(world.dtype)[6:]} "
        f"sequences_per_step:{stepper.sequences} micro_batch:{stepper.micro}x{hp.row_tokens} "
        f"micro_steps:{-(-len(stepper.mine) // stepper.micro)}")
    order, looping = (",".join(str(visit.layer) for visit in visits) for visits in model.plans)
    log(f"plan layers:{order} looping:{looping}")
    with run.training.phase("warm-up", counted=False):
        stepper.warm_up()
    if stepper.compiling:
        log_compiler(log)
    reserve = measure_reserve(run, model, stream)
    # 2. the state of a new run, or that of its checkpoint
    clock = Clock(max(hp.max_wallclock_seconds - reserve, 0.0))
    ema, swa, step, scale = EMA(flat.weights, hp.ema_decay), SWA(flat.weights), 0, 1.0
    matters = {name: getattr(hp, name) for name in hp.fields("model", "train", "quantise")}
    matters |= {"dtype": str(world.dtype)[6:], "train_tokens": stream.total}
    checkpoint = Checkpoint(run, matters, dict(stepper=stepper, ema=ema, swa=swa, clock=clock))
    model.looping = False
    if hp.resume:
        step = checkpoint.load()
        log(f"resumed step:{step} elapsed:{clock.elapsed:.1f}s")
    telemetry = Telemetry(world, clock)
    positions = len(validation.byte_counts)
    bpb_per_nat = Score(positions, positions, validation.bytes).val_bpb  # of validation's bytes per token
    step_log = StepLog(run, clock, step, bpb_per_nat, flops)
    stops, remedy = [], "lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR"

    def follow(lag) -> None:
        for done, scale, loss in telemetry.read(lag):
            step_log(done, scale, loss)
            if done == step_log.first_step + 10:
                log(forecast(run, positions, reserve, step_log.pace(done)))
            if not math.isfinite(loss):
                raise UserError(f"the loss of step {done} is {loss}; {remedy}; {checkpoint}")

    with on_stop(stops):
        world.max(0.0)
        clock.start()
        while True:
            # 3. what is known of finished steps
            saving = hp.checkpoint_every and step > checkpoint.step and step % hp.checkpoint_every == 0
            follow(0 if saving else lag)
            if saving:
                checkpoint.save(step)
            if telemetry.stopping or step >= hp.iterations or clock.out_of_time(step + 1 + lag):
                break
            # 4. validation, the step, the averages
            progress = progress_at(hp, step, clock)
            before, scale = scale, lr_scale(hp, progress)
            if scale < 1 == before:
                log(f"warmdown step:{step + 1}/{progress.total:.0f} steps:{warmdown_steps(hp, progress):.0f} "
                    f"asked:{hp.warmdown_frac or hp.warmdown_iters}")
            if hp.val_loss_every and step and step % hp.val_loss_every == 0:
                with run.training.phase("validation", counted=False):
                    clock.stop()
                    found = score_split(run, model, validation, hp.eval_seq_len, "validation",
                                        stepper.score_fn)
                log(f"step:{step}/{hp.iterations} {found} time:{clock.elapsed:.1f}s")
                log.metric("validation", step=step, loss=found.val_loss, bpb=found.val_bpb,
                           seconds=clock.elapsed)
                clock.start()
            if loops_on(hp, progress) and not model.looping:  # for good
                model.looping = True
                log(f"looping:on step:{step + 1}/{progress.total:.0f} visits:{len(model.plans[True])}")
            if hp.document_mask and (longest := segment_length(hp, progress)) != stepper.longest:
                stepper.longest = longest
                log(f"segments step:{step + 1}/{progress.total:.0f} longest:{longest}")
            if qat_active(hp, scale) and not qat.on:
                begin_qat(run, model, stepper, step, scale)
            stepper.step(scale, muon_momentum(hp, progress), qat.on, clock.elapsed, bool(stops))
            ema.update(flat.weights)
            if scale < hp.swa_threshold and (step + 1) % hp.swa_every == 0:
                swa.update(flat.weights)
            telemetry.post(step, scale, flat.slots)
            step += 1
        follow(lag=0)
        world.synchronize()
        clock.stop()
        if not torch.isfinite(flat.weights).all():
            raise UserError(f"the weights are not finite after step {step}; {remedy}; {checkpoint}")
        if world.max(float(len(stops))):  # also one that came in the last step
            checkpoint.save(step, tries=60)
            raise KeyboardInterrupt(f"stopped by {', '.join(stops) or 'another rank'} after step {step}; "
                                    f"{checkpoint}; RUN_ID={run.folder.name} RESUME=1 goes on")
    model.looping = hp.num_loops > 0
    # 5. the average that is exported, and what is known of the training
    seconds, step_ms, memory = world.max(clock.elapsed), 1000 * step_log.pace(step), world.peak_memory()
    run.training.counted["train"] = seconds
    tokens = step * hp.train_batch_tokens
    log(f"trained steps:{step} time:{seconds:.1f}s step_avg:{step_ms:.2f}ms tokens:{tokens} "
        f"peak_memory:{memory / 2**20:.0f}MiB")
    with run.training.phase("average and proofs"):
        proofs = export_average(run, model, stepper, ema, swa)
        weights = {name: weight.cpu().clone() for name, weight in flat.state_dict().items()}
    return weights, {
        "params": sum(p.numel() for p in model.parameters()), "steps": step, "train_seconds": seconds,
        "step_ms": step_ms, "tokens_seen": tokens, "compiled": stepper.compiling, "peak_memory": memory,
        "reserve_seconds": reserve, "proofs": proofs}


# ----------------------------------------------------------
# 13 Test-time training
# Score first, train afterwards: a chunk's losses are banked under no-grad, then the model is trained on it,
# so no token is scored by weights that have seen it. The last chunk is not trained (#461, #549, #1413).

def ttt_parameters(model: GPT) -> dict[str, nn.Parameter]:
    """What TTT_PARAMS says; control tensors are #601's 25,689 parameters."""
    hp = model.hp
    last = [f"blocks.{i}." for i in range(hp.num_layers - hp.ttt_freeze_blocks, hp.num_layers)]
    control = "attn_scale mlp_scale resid_mix q_gain skip_weight smear bigram.scale".split()
    parts = {"blocks": [*last, "scale"], "control": control, "all": [""]}[hp.ttt_params]
    return {name: p for name, p in model.named_parameters() if any(part in name for part in parts)}


def ttt_lr_scale(hp: Hyperparameters, chunk: int, chunks: int, step: int, steps: int) -> float:
    """The learning rate's share, by TTT_SCHEDULE."""
    share = {"run": chunk / max(chunks - 1, 1), "chunk": step / steps, "constant": 0.0}[hp.ttt_schedule]
    return 0.5 * (1 + math.cos(math.pi * share))


class ChunkTrainer:
    """Trains on scored chunks; batch and steps are the same on any number of ranks."""
    def __init__(self, model: GPT, hp: Hyperparameters, world: World):
        self.model, self.hp, self.world, self.steps = model, hp, world, 0
        chosen = ttt_parameters(model)
        for name, p in model.named_parameters():
            p.requires_grad_(name in chosen)
        self.flat = FlatParameters(model)
        trained, self.start = [*self.flat.parameters.values()], self.flat.weights.clone()
        self.optimiser = torch.optim.AdamW(trained, hp.ttt_lr, weight_decay=0.0)
        if hp.ttt_optimizer == "sgd":
            self.optimiser = torch.optim.SGD(trained, hp.ttt_lr, momentum=hp.ttt_momentum)
        self.trained = sum(p.numel() for p in trained)
        self.part = max(min(scoring_batch_tokens(hp, world), 16384) // hp.eval_seq_len, 1)  # 5 GB at pr606

    def gradients(self, batch: Tensor) -> None:
        """Of a batch's mean loss (B, T + 1), clipped to norm 1."""
        mine = self.world.shard(len(batch))
        self.flat.reduced.zero_()
        for at in range(mine.start, mine.stop, self.part):
            part = batch[at: min(at + self.part, mine.stop)]
            with self.world.autocast():
                loss = self.model(part[:, :-1].contiguous(), part[:, 1:].contiguous())
            (loss * (len(part) / len(batch))).backward()
        clip_gradients(self.world.sum_(self.flat.grads), 1.0)

    @torch.enable_grad()
    def train(self, tokens: Tensor, first: int, end: int, chunk: int, chunks: int) -> None:
        """Train on positions first..end - 1; their last target is token `end`."""
        hp, world, seq_len = self.hp, self.world, self.hp.eval_seq_len
        rows = tokens[first: end + 1].to(world.device, torch.int64).unfold(0, seq_len + 1, seq_len)
        batches = rows.split(hp.ttt_batch_seqs)
        total = len(batches) * hp.ttt_epochs
        for step in range(total):
            self.gradients(batches[step % len(batches)])
            scale = ttt_lr_scale(hp, chunk, chunks, step, total)
            for group in self.optimiser.param_groups:
                group["lr"] = hp.ttt_lr * scale
            self.optimiser.step()
            self.steps += 1
        if not math.isfinite(whole := self.flat.weights.double().sum().item()):
            raise UserError(f"test-time training diverged in chunk {chunk}; lower TTT_LR")
        if world.max(whole) != -world.max(-whole):
            raise UserError(f"the ranks' weights differ after TTT chunk {chunk}")

    def change(self) -> float:
        """Distance of the trained weights from their start, relative to that."""
        return ((self.flat.weights - self.start).norm() / self.start.norm()).item()


def evaluate_ttt(model: GPT, tokens: Tensor, byte_counts: Tensor, world: World, log: RunLog,
                 seconds: float = math.inf, score_fn: Callable = token_losses, nll: Tensor | None = None,
                 trainer: ChunkTrainer | None = None) -> tuple[Score, dict]:
    """Score every position once with sliding windows, training on each chunk after it is scored.

    Changes the model. Training stops in time for `seconds`.
    """
    start, hp, positions, size = time.perf_counter(), model.hp, len(tokens) - 1, model.hp.ttt_chunk_tokens
    windows, chunks = sliding_windows(positions, hp.eval_seq_len, hp.eval_stride), -(-positions // size)
    of_first_scored = lambda window: window[2] // size
    parts = {chunk: list(part) for chunk, part in itertools.groupby(windows, of_first_scored)}
    trainer = trainer or ChunkTrainer(model, hp, world)
    batch_tokens = scoring_batch_tokens(hp, world, size)
    log(f"ttt chunks:{chunks}x{size} windows:{len(windows)} params:{trainer.trained} "
        f"optimizer:{hp.ttt_optimizer} lr:{hp.ttt_lr} epochs:{hp.ttt_epochs} "
        f"batch:{hp.ttt_batch_seqs}x{hp.eval_seq_len}")
    progress, total, untrained_from = ProgressLine(log, "ttt", positions), Score(), None
    scoring, training = [], []  # windows and seconds; seconds
    for chunk in range(chunks):
        part = parts.get(chunk, [])
        for some in (part[:len(part) // 4], part[len(part) // 4:]) if chunk == 0 else (part,):
            began = time.perf_counter()
            total += evaluate(model, tokens, byte_counts, some, world, batch_tokens, hp.ttt_temperature,
                              score_fn, nll)
            scoring.append((len(some), time.perf_counter() - began))
        end = min((chunk + 1) * size, positions)
        if progress.due():
            progress(end, total.val_bpb, f" steps:{trainer.steps}")
        elapsed = time.perf_counter() - start
        log.metric("ttt", step=chunk, bpb=total.val_bpb, positions=total.positions, seconds=elapsed)
        if chunk + 1 == chunks or untrained_from is not None:
            continue
        done, seconds_of_them = map(sum, zip(*scoring[1:]))
        per_window = seconds_of_them / max(done, 1)
        # a pass over a chunk takes three times what scoring its sequences does
        one_more = max(training, default=3 * hp.ttt_epochs * size / hp.eval_seq_len * per_window)
        ahead = (len(windows) - done - scoring[0][0]) * per_window + one_more
        if world.max(elapsed + 1.1 * ahead) > seconds:
            untrained_from = chunk
            log(f"ttt training stops after chunk {chunk} of {chunks}, to end before {seconds:.0f}s")
        else:
            lesson = partial(trainer.train, tokens, chunk * size, end, chunk, chunks)
            training.append(world.seconds(lesson))
    if total.positions != positions:
        raise RuntimeError(f"scored {total.positions} of {positions} positions")
    return total, {"chunks": chunks, "steps": trainer.steps, "untrained_from_chunk": untrained_from,
                   "weight_change": trainer.change(), "parameters": trainer.trained,
                   "score_seconds": sum(taken for _, taken in scoring), "train_seconds": sum(training)}


# Adam's steps make alpha times the rate what counts; targets are worth within 0.0005 bpb of each other.
ADAPTED, ALPHA = ("k", "v", "o", "mlp", "head"), 144.0


class DocumentAdapters:
    """Low-rank additions to projections, a set for each document of a batch, and its keys and values.

    At every visit y gets alpha / rank * B A x (arXiv:2106.09685), where x is the input of the attention (for
    k, v, o), of the MLP or of the head (#1855). A is drawn by SEED, alike for all documents; B starts at 0.
    So what a document gets depends on it and the artifact alone, in any order and batch, on any rank.
    """
    def __init__(self, model: GPT, documents: int):
        hp, like = model.hp, model.tok_emb.weight
        D, rank, draw = hp.model_dim, hp.ttt_lora_rank, torch.Generator().manual_seed(hp.seed)
        widths = dict.fromkeys("kv", D // hp.num_heads * hp.num_kv_heads) | {"head": hp.vocab_size}
        slots = [(target, visit) for target in ADAPTED
                 for visit in range(1 if target == "head" else len(model.plans[model.looping]))]
        self.hp, self.scale, self.pairs = hp, ALPHA / rank, {}
        for target, visit in slots:
            A = (2 * torch.rand(rank, D, generator=draw) - 1) / D ** 0.5
            A = A.to(like).repeat(documents, 1, 1)
            B = A.new_zeros(documents, widths.get(target, D), rank)
            self.pairs[target, visit] = A.requires_grad_(), B.requires_grad_()
        trained = [each for pair in self.pairs.values() for each in pair]
        self.optimiser = torch.optim.AdamW(trained, hp.ttt_lr, (0.0, 0.99), 1e-10, 0.5, fused=True)
        self.kept, self.kept_from, self.first, self.steps = {}, 0, 0, 0

    def add(self, y: Tensor, target: str, x: Tensor, visit: int = 0) -> Tensor:
        """y (B, T, out) and the adapters' of x (B, T, D)."""
        if (target, visit) not in self.pairs:
            return y
        A, B = (each[: len(x)] for each in self.pairs[target, visit])
        return y + self.scale * (x @ A.mT) @ B.mT

    def place(self, end: int, chunk: int) -> int:
        """Go on to the chunk that ends there; returns the first token to be read again.

        Two tokens before the first fresh one are read for what they hand on to it at the embedding
        """
        self.seen_from = max(end - self.hp.ttt_context, 0)
        fresh = max(end - chunk - self.hp.ttt_fresh, self.seen_from)
        self.first = max(fresh - 2, 0)
        self.lead = fresh - self.first
        self.old = slice(self.seen_from - self.kept_from, fresh - self.kept_from)
        device, n = self.optimiser.param_groups[0]["params"][0].device, end - self.first
        own = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        own[self.lead:, : self.lead] = False
        self.mask = F.pad(own, (fresh - self.seen_from, 0), value=True)
        self.kept_from = self.seen_from
        return self.first

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visit: int) -> Tensor:
        """Causal attention over the kept keys and values and these, which are kept in turn."""
        before = self.kept.get(visit, (k[:, :0].detach(), v[:, :0].detach()))
        before = [x[: len(q), self.old] for x in before]
        self.kept[visit] = [torch.cat((old, x[:, self.lead:].detach()), 1) for old, x in zip(before, (k, v))]
        heads = q.size(2) // k.size(2)
        k, v = (torch.cat((old, x), 1).repeat_interleave(heads, 2) for old, x in zip(before, (k, v)))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2)

    def learn(self, losses: Tensor, weights: Tensor) -> None:
        """One step on the losses (B, T) of a scored chunk; weights of zero leave out a document's last."""
        (losses * weights).sum().backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.steps += 1


def document_batches(hp: Hyperparameters, tokens: Tensor, most: int) -> list[tuple[int, list[Window]]]:
    """Chunk length and documents (start, end, length), longest first, of at most `most` tokens of context."""
    bounds = segment_starts(tokens[None, :-1], len(tokens)).tolist()
    limits = [(float(limit), int(chunk)) for limit, chunk in re.findall(r"(\w+):(\d+)", hp.ttt_chunks)]
    chunk_of = lambda length: next((chunk for limit, chunk in limits if length <= limit), limits[-1][1])
    found = []
    documents = [(start, end, end - start) for start, end in itertools.pairwise(bounds)]
    documents.sort(key=lambda each: (-chunk_of(each[2]), -each[2], each[0]))
    for chunk, alike in itertools.groupby(documents, lambda each: chunk_of(each[2])):
        alike = collections.deque(alike)
        while alike:
            count = max(most // min(alike[0][2], hp.ttt_context), 1)
            found.append((chunk, [alike.popleft() for _ in range(min(count, len(alike)))]))
    return found


def evaluate_documents(model: GPT, tokens: Tensor, byte_counts: Tensor, world: World, log: RunLog,
                       seconds: float = math.inf, nll: Tensor | None = None, most: int = 0,
                       adapters: Callable = DocumentAdapters) -> tuple[Score, dict]:
    """Score every position once, each document by itself, chunk by chunk, while its adapters learn it.

    A chunk's losses are banked, then the mean of the same losses is trained on; a document's last chunk is
    not. Training stops in time for `seconds`; what is left is scored without. `most` tokens are in a batch.
    """
    hp, start, device = model.hp, time.perf_counter(), world.device
    batches = document_batches(hp, tokens, most or scoring_batch_tokens(hp, world))
    cost = lambda chunk, part: len(part) * -(-part[0][2] // chunk) * (chunk + hp.ttt_fresh)
    batches.sort(key=lambda batch: -cost(*batch))
    loads, mine = [0] * world.size, []  # dealt by cost, the dearest first
    for batch in batches:
        rank = loads.index(min(loads))
        loads[rank] += cost(*batch)
        mine += [batch] * (rank == world.rank)
    model.requires_grad_(False)
    total = torch.zeros(3, dtype=torch.float64, device=device)
    counts, spent, training = torch.zeros(3, dtype=torch.float64, device=device), 0.0, hp.ttt_lr > 0
    documents = sum(len(part) for _, part in mine)
    progress = ProgressLine(log, "ttt", sum(length for _, part in mine for *_, length in part))
    log(f"ttt batches:{len(batches)} chunks:{hp.ttt_chunks} context:{hp.ttt_context} fresh:{hp.ttt_fresh} "
        f"rank:{hp.ttt_lora_rank} lr:{hp.ttt_lr}")
    for chunk, part in mine:
        document = adapters(model, len(part))
        starts, lengths = (torch.tensor(each, device=device).unsqueeze(1) for each in list(zip(*part))[::2])
        for at in range(0, part[0][2], chunk):
            # 1. whether time is left to learn: scoring alone takes a third
            active, end = sum(length > at for *_, length in part), at + chunk
            step, elapsed = active * (chunk + hp.ttt_fresh), time.perf_counter() - start
            ahead = step + (loads[world.rank] - spent) / 3
            training = training and (not spent or elapsed * (1 + 1.1 * ahead / spent) <= seconds)
            # 2. the chunk's losses are banked
            first = document.place(end, chunk)
            index = starts[:active] + torch.arange(first, end + 1, device=device)
            text = tokens[index.clamp_max(len(tokens) - 1)].to(torch.int64)
            with torch.set_grad_enabled(training), world.autocast():
                losses = token_losses(model, text[:, :-1], text[:, 1:], chunk, hp.ttt_temperature,
                                      document=document)
            there = torch.arange(at, end, device=device) < lengths[:active]
            losses, where = losses.masked_fill(~there, 0.0), index[:, -chunk - 1: -1][there]
            found = losses.detach(), there, byte_counts[where]
            total += torch.stack([each.double().sum() for each in found])
            if nll is not None:
                nll[where.cpu()] = losses.detach()[there].float().cpu()
            # 3. and then trained on
            weights = (lengths[:active] > end) / chunk
            if training and part[0][2] > end:
                document.learn(losses, weights)
            spent += step
            if progress.due():
                progress(int(total[1]), Score(*total.tolist()).val_bpb,
                         f" documents:{counts[0]:.0f}/{documents}")
        counts += torch.tensor([len(part), len(part) * training, document.steps], device=device)
        log.metric("ttt", step=int(counts[0]), bpb=Score(*total.tolist()).val_bpb, positions=int(total[1]),
                   seconds=time.perf_counter() - start)
    nats, positions, count = world.sum_(total).tolist()
    if positions != len(byte_counts):
        raise RuntimeError(f"scored {positions:.0f} of {len(byte_counts)} positions")
    documents, learnt, steps = map(int, world.sum_(counts).tolist())
    return finite(Score(nats, int(positions), int(count))), {
        "documents": documents, "untrained_documents": documents - learnt, "steps": steps,
        "seconds": time.perf_counter() - start}


def by_length(tokens: Tensor, byte_counts: Tensor, world: World, **nll: Tensor) -> dict[str, dict]:
    """Documents, positions and bits per byte of each scorer's losses, by powers of two of the length."""
    bounds = segment_starts(tokens[None, :-1], len(tokens)).cpu().long()
    lengths = bounds.diff()
    octave = lengths.double().log2().floor().long()
    kinds = octave.repeat_interleave(lengths)
    sums = {name: world.sum_(torch.bincount(kinds, losses.double()).to(world.device)).tolist()
            for name, losses in nll.items()}
    counts = torch.bincount(kinds, byte_counts.cpu().double()).tolist()
    return {f"{2 ** k}..{2 ** (k + 1) - 1}": {
        "documents": int((octave == k).sum()), "positions": int((kinds == k).sum()),
        **{name: each[k] / math.log(2) / max(counts[k], 1) for name, each in sums.items()}}
        for k in sorted({*octave.tolist()})}


# ----------------------------------------------------------
# 14 Main
# Train, compress, forget, load, score. A stage hands the next one a plain value, and leaves files for a
# later run.

def record_score(run: Run, name: str, found: Score) -> None:
    """A score into log, metrics and result.json."""
    run.record({"bpb": {name: found.val_bpb}, "val_loss": {name: found.val_loss}})
    run.log.metric("score", name=name, loss=found.val_loss, bpb=found.val_bpb)
    run.log(f"final_{name} {found}")


def never_of(run: Run, validation: Validation) -> Tensor | None:
    """The mask of CANONICAL_MASK on the device, made anew: on a clock where there is one."""
    if not run.hp.canonical_mask:
        return None
    return torch.from_numpy(canonical_mask(validation.table.processor)).to(run.world.device)


def train_stage(run: Run, validation: Validation) -> dict[str, Tensor]:
    """Train, keep the weights in model.pt, score them."""
    hp, stream = run.hp, TokenStream(read_split(run.hp.data_path, "train"))
    run.log(f"data path:{hp.data_path} train_shards:{len(stream.shards)} train_tokens:{stream.total}")
    model = GPT(hp).to(run.world.device).use(run.attend)
    weights, trained = train(run, model, stream, validation)
    with run.training.phase("save", counted=False):
        run.write("model.pt", saved(weights))
        run.record(trained)
    with run.training.phase("float", counted=False):
        model.never = never_of(run, validation)
        found = score_split(run, model, validation, hp.eval_seq_len, "float")
    record_score(run, "float", found)
    return weights


def compress(run: Run, weights: dict[str, Tensor] | None) -> None:
    """Calibrate on training tokens, quantise, pack into a file; no weights: model.pt."""
    hp, world, log, path = run.hp, run.world, run.log, run.folder / "model.pt"
    with run.training.phase("load"), reading(path, "set what it trained with, or train again"):
        model = shell(hp)
        weights = weights or torch.load(path, map_location="cpu", weights_only=True)
        weights = {name: weight.float() for name, weight in weights.items()}
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError("a weight is not finite")
        model.load_state_dict(weights, assign=True)
        model.to(world.device).use(run.attend)
    with run.training.phase("calibrate"):
        stream = TokenStream(read_split(hp.data_path, "train"))
        sample = stream.sample(hp.gptq_calib_sequences, hp.train_seq_len, hp.seed)
        hessians = collect_hessians(model, sample, world)
    log(f"calibrated sequences:{hp.gptq_calib_sequences}x{hp.train_seq_len} "
        f"peak_memory:{world.peak_memory() / 2**20:.0f}MiB")
    facts = {key: run.result.get(key) for key in ("preset", "seed", "steps", "script_sha256", "corpus")}
    with run.training.phase("quantise and pack"):
        blob, report = fit_artifact(run, model, weights, hessians, facts)
    for role, found in report.items():
        if role in ROLES:
            ratio = found["error"] / max(found["error_rounding"], 1e-30)
            log.proof(hp.quantizer, {"role": role, **found, "ratio": ratio})
    sections = byte_report(blob)
    for name, section in sections.items():
        log(f"bytes section:{name} {key_values(section)}")
    run.write("artifact.bin", blob)
    run.record({"proofs": {"quantizer": report}, "artifact": {
        "model_bytes": len(blob), "code_bytes": run.code_bytes, "total_bytes": len(blob) + run.code_bytes,
        "limit": hp.artifact_limit, "codec": f"rans, zstd-{LEVEL}", "sections": sections,
        "sha256": sha256(blob)}})
    world.max(0.0)  # there for all ranks


def score(run: Run, validation: Validation) -> None:
    """Rebuild the model from the artifact alone and score it."""
    hp, world, clock = run.hp, run.world, run.evaluation
    blob = Path(hp.artifact or run.folder / "artifact.bin").read_bytes()
    with clock.phase("load"):
        model = load_artifact(blob, hp, world)[0].use(run.attend)
        model.never = never_of(run, validation)
    scorer = compiled(token_losses) if wants_compile(hp, world) else token_losses
    strides = {"roundtrip": hp.eval_seq_len} | ({} if hp.skip_sliding else {"sliding": hp.eval_stride})
    split = validation.tokens, validation.byte_counts
    plain, learnt = (torch.zeros(len(validation.byte_counts)) for _ in range(2))
    for name, stride in strides.items():
        with clock.phase(name):
            found = score_split(run, model, validation, stride, name, scorer,
                                plain if name == "roundtrip" else None)
        record_score(run, name, found)
    if hp.ttt_enabled:
        with clock.phase("ttt"):
            if hp.ttt_mode == "chunks":
                found, proof = evaluate_ttt(model, *split, world, run.log, clock.left, scorer, learnt)
            else:
                found, proof = evaluate_documents(model, *split, world, run.log, clock.left, learnt)
        record_score(run, "ttt", found)
        technique = {"chunks": "ttt", "documents": "documents"}[hp.ttt_mode]
        run.log.proof(technique, proof)
        lengths = by_length(*split, world, roundtrip=plain, ttt=learnt)
        for length, values in lengths.items():
            run.log(f"ttt length:{length} {key_values(values)}")
        run.record({"proofs": {technique: proof}, "by_length": lengths})
    run.record({"scored_artifact_sha256": sha256(blob), "val_tokens": len(validation.byte_counts),
                "val_bytes": validation.bytes})


def check_machine(hp: Hyperparameters, world: World) -> None:
    """UserError where a training step certainly needs more than the device has."""
    model, tokens = shell(hp), hp.train_batch_tokens + hp.gptq_calib_sequences * hp.train_seq_len
    there = torch.cuda.mem_get_info(world.device)[1] if world.on_cuda else \
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = 24 * sum(p.numel() for p in model.parameters()) + 16 * tokens
    needed += hp.train_seq_len * activation_bytes(hp, world, compiling=True)
    if needed > there:
        raise UserError(f"training needs {needed / 1e9:.0f} GB, {world.device} has {there / 1e9:.0f}; lower "
                        f"MODEL_DIM, NUM_LAYERS, BIGRAM_VOCAB_SIZE, TRAIN_SEQ_LEN or TRAIN_BATCH_TOKENS")
    flops = flops_per_token(model, hp.train_seq_len) * hp.train_batch_tokens
    if hp.device == "auto" and not world.on_cuda and flops > 1e13:
        raise UserError(f"no CUDA device is there, and a step takes {flops / 1e12:.0f} TFLOP, minutes on a "
                        f"CPU; take PRESET=smoke, or say DEVICE=cpu")


def open_run(hp: Hyperparameters, world: World, validation: Validation) -> Path:
    """The run's folder, the same on every rank, with all that its stages read."""
    when = datetime.fromtimestamp(world.max(time.time()))
    folder = Path("logs") / (hp.run_id or f"{hp.preset}-seed{hp.seed}-{when:%Y%m%d-%H%M%S}")
    taken, kept = (world.max((folder / name).exists()) for name in ("log.txt", "checkpoint.pt"))
    going_on = "continue it with RESUME=1, or " * bool(kept)
    if "train" in hp.stages and taken and not hp.resume:
        raise UserError(f"{folder} exists; {going_on}choose another RUN_ID")
    if hp.resume and not kept:
        raise UserError(f"RESUME=1 finds no {folder}/checkpoint.pt; set RUN_ID to a run that left one")
    if hp.stages.startswith("quantize") and not (folder / "model.pt").is_file():
        raise UserError(f"{folder}/model.pt is missing; {going_on}train under another RUN_ID")
    if hp.stages != "evaluate":
        shards = read_split(hp.data_path, "train")
        check_ids(shards, hp.vocab_size, world)
        sample = torch.from_numpy(shards[0][:1_000_000].astype(np.int32))
        check_tokenizer(validation.table, sample, validation.sidecar)
        if hp.canonical_mask:
            check_mask(canonical_mask(validation.table.processor), shards)
        check_machine(hp, world)
    return folder


def begin_run(hp: Hyperparameters, world: World, validation: Validation, cautions: list[str]) -> Run:
    """Folder, log and ledgers; the log begins with all that repeats the run."""
    source = Path(__file__).read_bytes()
    folder = open_run(hp, world, validation)
    log = RunLog(folder if world.rank == 0 else None)
    log(source.decode(), console=False)
    log(f"run:{folder.name} preset:{hp.preset} stages:{hp.stages} changed:{json.dumps(changed(hp))}")
    for line in (*cautions, world.hardware()):
        log(line)
    log(f"corpus:{validation.corpus!r} val_positions:{len(validation.byte_counts)} "
        f"val_bytes:{validation.bytes} counted_by:{('tokenizer', 'sidecar')[validation.sidecar]}")
    path = folder / "result.json"
    with reading(path, "delete it, or choose another RUN_ID"):
        known = parse_json(path.read_bytes()) if path.is_file() else {}
        for kind in ("bpb", "val_loss", "proofs", "budget", "artifact"):
            known[kind] = dict(known.get(kind, {}))
        earlier = known["budget"].get("training", {}).get("counted", {})
        earlier = {name: float(seconds) for name, seconds in earlier.items()}
    log(choose_dtype(hp, world, known.get("dtype")))
    attention, attend = choose_attention(hp, world, wants_compile(hp, world), log)
    log(f"attention:{attention}")
    settings = {"preset": hp.preset, "seed": hp.seed, "changed": changed(hp), "dtype": str(world.dtype)[6:],
                "settings": vars(hp), "started": datetime.now().isoformat(timespec="seconds")}
    run = Run(hp, world, log, folder, len(source), Budget("training", world, hp.max_wallclock_seconds),
              Budget("evaluation", world, hp.eval_seconds), settings | known | {
        "script_sha256": sha256(source), "corpus": validation.corpus, "attention": attention,
        "data_path": hp.data_path, "hardware": world.hardware(), "world_size": world.size}, attend)
    if "evaluate" in hp.stages:
        run.result["scored_with"] = settings
    if "train" in hp.stages:
        run.result |= settings
        run.record({})  # whoever resumes finds what was chosen
    else:  # one clock over stages that run one at a time
        again = ("load", "calibrate", "quantise and pack") if "quantize" in hp.stages else ()
        run.training.counted.update({name: earlier[name] for name in earlier if name not in again})
    return run


def run_stages(hp: Hyperparameters, world: World, cautions: list[str]) -> None:
    """The stages that STAGES names."""
    torch.manual_seed(hp.seed)
    validation = Validation.load(hp, world)
    run = begin_run(hp, world, validation, cautions)
    weights = train_stage(run, validation) if "train" in hp.stages else None
    if "quantize" in hp.stages:
        compress(run, weights)
    del weights  # what is scored comes from the file alone
    if "evaluate" in hp.stages:
        score(run, validation)
    for budget in (run.training, run.evaluation):
        if budget.counted:
            run.result["budget"][budget.name] = budget.report(run.log)
    run.record({"bpb": dict.fromkeys(("float", "roundtrip", "sliding", "ttt")) | run.result["bpb"]})
    if sizes := run.result["artifact"]:
        line = "artifact model:{model_bytes}B code:{code_bytes}B total:{total_bytes}B limit:{limit}B"
        run.log(line.format_map(sizes))
    if wants_compile(hp, world):
        log_compiler(run.log)
    run.log(f"files:{run.folder}")


def settings_of(env: Mapping[str, str]) -> tuple[Hyperparameters | None, dict[str, str]]:
    """Settings, and what ranks must have alike: these or their mistakes, script, and data."""
    try:
        hp = Hyperparameters.from_env(env)
        artifact = Path(hp.artifact or f"logs/{hp.run_id}/artifact.bin")
        if hp.stages == "evaluate":
            with reading(artifact, "run STAGES=train,quantize first, or set ARTIFACT or RUN_ID"):
                hp = settings_for(artifact.read_bytes(), env)
    except UserError as error:
        return None, {"error": str(error)}
    files = [Path(hp.tokenizer_path), artifact, *Path(hp.data_path).glob("*.bin")]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    facts = {"error": "none"} | {name.upper(): str(value) for name, value in vars(hp).items()}
    facts |= {"script": sha256(Path(__file__).read_bytes()), "data": f"{len(sizes)} files, {sum(sizes)}B"}
    return hp, facts


def main() -> int:
    """The command line: --help or a run; returns the exit status."""
    status, told, rank, env = 0, "", 0, os.environ
    if sys.argv[1:] in (["--help"], ["-h"]):
        say(f"{__doc__}\n{settings_table()}")
        return 0
    try:
        # an older torch gives the loss a wrong gradient (pytorch#180642)
        release = tuple(map(int, torch.__version__.split(".")[:2]))
        for name, there, least in (("Python", sys.version_info, (3, 11)), ("PyTorch", release, (2, 13))):
            if there < least:
                raise UserError("{} {}.{} or newer is needed, this is {}.{}".format(name, *least, *there))
        if len(sys.argv) > 1:
            raise UserError("settings are environment variables; try --help")
        with on_stop():
            rank, *_ = launched_as(env)
            hp, facts = settings_of(env)
            store = meet(env, facts)
            rank = 0  # what all ranks find was said by one; the rest is a rank's own
            world = World(hp, env, store)
            ignored = [f"ignored:{name}" for name in IGNORED_NAMES if name in env]
            threads = (os.cpu_count() or 1) // int(env.get("LOCAL_WORLD_SIZE", world.size))
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(threads, 1)))
            run_stages(hp, world, [*doubtful_names(env, hp.fields())[1], *ignored])
    except (UserError, OSError) as error:
        status, told = 1, f"error: {error}" * (rank == 0)
    except KeyboardInterrupt as stop:
        status, told = 143, stop
    except Exception:
        status, told = 1, traceback.format_exc()
    if told:
        say(told, "stderr")
    if dist.is_initialized():
        if status:  # other ranks may wait in a collective, and leaving the group would wait for them
            os._exit(status)
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # as that of errors is
    sys.exit(main())
