"""Audit a finished run from its artifact: is the score right, and was it reached by the rules?

    python records/audit.py logs/RUN/artifact.bin --data data/datasets/NAME --tokenizer TOKENIZER
    python records/audit.py logs/RUN/artifact.bin --positions 300000        a slice of validation first
    python records/audit.py logs/RUN/artifact.bin --techniques              what each technique is worth in it

The artifact is scored again by train_gpt.py's own `evaluate` or `evaluate_ttt`, with the settings of the
result.json beside it, or those of the environment (PRESET, ...) where there is none. DEVICE, COMPILE and
ATTENTION of the environment always count: they say where the audit runs. The audited score is the run's last
one: with test-time training where that is on, else sliding, else plain windows.

Repeated passes on a CPU are compared bit for bit. CUDA kernels may add in another order each time: there, one
pass is repeated unchanged, and four times its largest difference is what counts as equal.

Prints a table with pass, fail or not checked, and the evidence; writes audit.json beside the artifact, where
`passed` says that every check passed. Exits 1 where one failed, and on a mistake; a check that could not be
made is neither a failure nor a pass.

--techniques makes no check. It prints the loss on a batch of validation text as trained, and with each
technique of the model switched off, and leaves techniques.json beside the artifact. It costs no budget: the
artifact is finished, and nothing is chosen by these numbers.
"""
from __future__ import annotations

import runs as shared

import train_gpt as tg  # before the others: it says in one line which package is missing

# isort: split
import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import secrets
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from runs import ROOT, Mistake
from torch import Tensor

SCRIPT = ROOT / "train_gpt.py"
CAP, CLOCK = 16_000_000, 600.0  # the challenge's, whatever limits the run set itself
PASS, FAIL, NOT_CHECKED = "pass", "fail", "not checked"
OF_THIS_MACHINE = ("DEVICE", "COMPILE", "ATTENTION")
OF_THE_RUN_ALONE = ("run_id", "stages", "artifact", "resume")
ON_THE_CLOCK = {"training": ("train", "average and proofs", "calibrate", "quantise and pack"),
                "evaluation": ("load", "roundtrip")}
OFF_THE_CLOCK = {"training": {"warm-up", "rehearsal", "validation", "save", "float"}, "evaluation": set()}
SUM_TOLERANCE = 1e-4  # of the probabilities of a vocabulary, each from a float32 loss
MOST_NOISE = 0.2  # nats; where equal passes differ by more, comparing them says nothing
WINDOW_CUTS = 32  # windows cut singly
MOST_PASSES = 1000
SWEEP_TOKENS = 1 << 16  # read to sum the probabilities of one place


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    status: str
    evidence: str


def verdict(name: str, faults: list[str], evidence: str) -> Check:
    """Pass with the evidence, or fail with the faults."""
    return Check(name, FAIL if faults else PASS, "; ".join(faults) or evidence)


# ----------------------------------------------------------------------------------------------------------
# The scoring path
#
# Every pass starts from the artifact's bytes and runs the script's own scorer. Two things are handed to it: a
# Pass in the place of the tensor that receives losses, and a trainer that notes what it is told to do.

class Pass:
    """One run of the scorer: receives losses as `nll` does, and remembers what was trained on, and when."""

    def __init__(self, model: tg.GPT, positions: int, in_order: bool = True):
        self.model, self.in_order = model, in_order
        self.losses = torch.full((positions,), math.nan)  # nats
        self.counts = torch.zeros(positions, dtype=torch.int32)
        self.reached = 0  # every position before this one is scored, in order
        self.disorder = 0
        self.trained: list[tuple[int, int, int]] = []  # chunk, its end, positions scored then
        self.score: tg.Score | None = None  # none where the pass ended early or the scorer stopped
        self.refusal = ""

    def __setitem__(self, where: Tensor, losses: Tensor) -> None:
        where = where.flatten()
        if torch.equal(where, torch.arange(self.reached, self.reached + len(where))):
            self.reached += len(where)
        else:
            self.disorder += self.in_order
        self.counts.index_add_(0, where, torch.ones_like(where, dtype=torch.int32))
        self.losses[where] = losses.flatten()

    def faults(self) -> list[str]:
        """What is wrong with the way positions were scored."""
        missing, repeated = int((self.counts == 0).sum()), int((self.counts > 1).sum())
        bad = int((~torch.isfinite(self.losses)).sum()) - missing
        return [text for number, text in (
            (missing, f"{missing} positions were not scored"),
            (repeated, f"{repeated} positions were scored more than once"),
            (bad, f"{bad} losses are not finite"),
            (self.disorder, f"{self.disorder} batches came out of order")) if number]


class Enough(Exception):
    """The scores that a pass was made for are there."""


class Narrator:
    """Stands in for the run's log: what comes next, and the lines that tell the time left, go to stderr."""

    stage = ""

    def begin(self, stage: str) -> None:
        """Say what comes next."""
        self.stage = stage
        print(f"audit: {stage}", file=sys.stderr, flush=True)

    def __call__(self, line: str, console: bool = True) -> None:
        if " left:" in line:
            print(f"audit: {self.stage}: {line}", file=sys.stderr, flush=True)

    def metric(self, event: str, **values) -> None:
        """Metrics are the run's."""


class WatchedTrainer(tg.ChunkTrainer):
    """The script's trainer; it notes what it is told to train on and when, and may be given noise instead."""

    def __init__(self, path: ScoringPath, done: Pass, noise: Tensor, noise_from: float | None,
                 stop_after: int | None):
        """noise: tokens for noise_from, of which and of stop_after see ScoringPath.score."""
        super().__init__(done.model, path.hp, path.world)
        self.path, self.done, self.noise = path, done, noise
        self.noise_from, self.stop_after = noise_from, stop_after

    def train(self, tokens: Tensor, first: int, end: int, chunk: int, chunks: int) -> None:
        path, done, seen = self.path, self.done, self.done.reached + 1
        done.trained.append((chunk, end, done.reached))
        if self.stop_after is not None and chunk > self.stop_after:
            raise Enough
        if self.noise_from is not None:
            noisy = torch.cat((tokens[:seen], self.noise[seen:]))
            tokens = noisy if chunk < self.noise_from else self.noise
        if path.untrained_from is None or chunk < path.untrained_from:
            super().train(tokens, first, end, chunk, path.chunks)


@contextlib.contextmanager
def watched(done: Pass) -> Iterator[None]:
    """A pass may end early, and a scorer that finds its own positions wrong is a finding."""
    try:
        yield
    except Enough:
        pass
    except RuntimeError as error:
        if not done.faults():
            raise
        done.refusal = str(error)


def watched_documents(done: Pass, noisy_from: float) -> type:
    """The script's adapters, for evaluate_documents; they note each training, and may train on noise."""
    class Watched(tg.DocumentAdapters):
        def learn(self, losses: Tensor, weights: Tensor) -> None:
            done.trained.append((self.steps, 0, 0))
            super().learn(-losses if self.steps >= noisy_from else losses, weights)
    return Watched


class ScoringPath:
    """The run's own way from artifact and tokens to losses."""

    def __init__(self, blob: bytes, hp: tg.Hyperparameters, world: tg.World, whole: int,
                 untrained_from: int | None):
        """whole: positions of the split; untrained_from: the chunk from which the clock left no training."""
        self.blob, self.hp, self.world, self.untrained_from = blob, hp, world, untrained_from
        self.whole = whole
        self.chunks = -(-whole // hp.ttt_chunk_tokens)  # a slice keeps the learning rates of the whole
        self.log, self.tolerance = Narrator(), 0.0
        self.never: Tensor | None = None
        if hp.canonical_mask:
            processor = tg.load_tokenizer(hp.tokenizer_path, hp.vocab_size)
            self.never = torch.from_numpy(tg.canonical_mask(processor)).to(world.device)
        compiling = tg.wants_compile(hp, world)
        self.score_fn = tg.compiled(tg.token_losses) if compiling else tg.token_losses
        self.attend = tg.choose_attention(hp, world)[1]
        self.batch_tokens = tg.scoring_batch_tokens(hp, world)

    @property
    def name(self) -> str:
        """The score that this path leads to, as result.json names it."""
        return "ttt" if self.hp.ttt_enabled else "roundtrip" if self.hp.skip_sliding else "sliding"

    @property
    def by_documents(self) -> bool:
        """Whether the last score is that of documents, each by itself."""
        return self.hp.ttt_enabled and self.hp.ttt_mode == "documents"

    def load(self) -> tg.GPT:
        """The model, from the artifact alone, with the mask where the run has one and it is not set aside."""
        model = tg.load_artifact(self.blob, self.hp, self.world)[0].use(self.attend)
        model.never = self.never
        return model

    def documents(self, tokens: Tensor, byte_counts: Tensor, noisy_from: float = math.inf,
                  most: int = 0) -> Pass:
        """Score by documents; from a step on training climbs, and `most` tokens are in a batch."""
        done = Pass(self.load(), len(tokens) - 1, in_order=False)
        with watched(done):
            adapters = watched_documents(done, noisy_from)
            done.score, _ = tg.evaluate_documents(done.model, tokens, byte_counts, self.world, self.log,
                                                  nll=done, most=most, adapters=adapters)
        return done

    def score(self, tokens: Tensor, byte_counts: Tensor, noise_from: float | None = None,
              stop_after: int | None = None) -> Pass:
        """Score tokens (positions + 1,) from the artifact's weights on.

        noise_from  training sees random tokens beyond what is scored, and from this chunk on everywhere
        stop_after  scores after this chunk and the next are not needed
        """
        if self.by_documents:
            return self.documents(tokens, byte_counts)
        done = Pass(self.load(), len(tokens) - 1)
        noise = torch.randint_like(tokens, self.hp.vocab_size)
        with watched(done):
            if self.hp.ttt_enabled:
                trainer = WatchedTrainer(self, done, noise, noise_from, stop_after)
                done.score, _ = tg.evaluate_ttt(done.model, tokens, byte_counts, self.world, self.log,
                                                score_fn=self.score_fn, nll=done, trainer=trainer)
            else:
                done.score = self._windows(done, tokens, byte_counts)
        return done

    def _windows(self, done: Pass, tokens: Tensor, byte_counts: Tensor) -> tg.Score:
        """The call that the last score of a run without test-time training came from."""
        hp, positions = self.hp, len(tokens) - 1
        stride = hp.eval_seq_len if hp.skip_sliding else hp.eval_stride
        windows = tg.sliding_windows(positions, hp.eval_seq_len, stride)
        progress = tg.ProgressLine(self.log, self.name, positions)
        return tg.evaluate(done.model, tokens, byte_counts, windows, self.world, self.batch_tokens,
                           score_fn=self.score_fn, nll=done, progress=progress)

    def rows(self, model: tg.GPT, rows: Tensor, scored: int, at_once: int = 0) -> Tensor:
        """Losses of the last `scored` positions of each row by itself, so many rows at once (0: what fits).

        rows (N, T + 1) -> (N, scored)
        """
        N, length = rows.shape
        ends = [(i + 1) * length - 1 for i in range(N)]
        windows = [(end - length + 1, end, end - scored) for end in ends]
        nll = torch.zeros(rows.numel())
        no_bytes = torch.zeros(rows.numel(), dtype=torch.int32, device=rows.device)
        temperature = self.hp.ttt_temperature if self.hp.ttt_enabled else 1.0
        batch_tokens = at_once * (length - 1) or self.batch_tokens
        tg.evaluate(model, rows.flatten(), no_bytes, windows, self.world, batch_tokens, temperature,
                    self.score_fn, nll)
        return nll.view(N, length)[:, length - 1 - scored: length - 1]

    def differing(self, a: Tensor, b: Tensor) -> int:
        """How many losses are not the same; NaN is never the same."""
        return int((~((a - b).abs() <= self.tolerance)).sum())

    @property
    def same(self) -> str:
        """How equal losses are that count as the same."""
        return f"equal to {self.tolerance:.1g} nats" if self.tolerance else "equal bit for bit"


@dataclass
class Case:
    """What is audited: the path, the positions on it, the pass over them, and a source of random places."""

    path: ScoringPath
    tokens: Tensor
    byte_counts: Tensor
    base: Pass
    rng: random.Random
    passes: int

    @property
    def positions(self) -> int:
        """How many positions are audited."""
        return len(self.tokens) - 1

    @property
    def trained(self) -> list[int]:
        """The chunks that were trained on."""
        last = self.path.untrained_from
        return [chunk for chunk, _, _ in self.base.trained if last is None or chunk < last]

    def too_short(self) -> str:
        """Why nothing can be said of test-time training, where the run has it and these positions do not."""
        path, size = self.path, self.path.hp.ttt_chunk_tokens
        least = size + 2  # after the first training a token to change, and a loss before it
        trains = path.hp.ttt_enabled and path.chunks > 1 and path.untrained_from != 0
        if not trains or self.positions >= least:
            return ""
        remedy = f"; use --positions {min(2 * size, path.whole)} or more" if path.whole >= least else ""
        return f"the first {self.positions:,} positions hold no training, or no text to see it by{remedy}"


def repeat_pass(case: Case) -> None:
    """On CUDA, let a second pass over the same tokens say which differences mean nothing."""
    if case.path.world.device.type == "cuda":
        case.path.log.begin("the same pass again, for the differences that CUDA kernels make by themselves")
        again = case.path.score(case.tokens, case.byte_counts)
        case.path.tolerance = 4 * float((again.losses - case.base.losses).abs().nan_to_num(math.inf).max())


# ----------------------------------------------------------------------------------------------------------
# The four conditions

def changed_from(tokens: Tensor, t: int, vocab_size: int, rng: random.Random) -> Tensor:
    """A copy in which every token from t on is another one; (..., T)."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    shift = torch.randint(1, vocab_size, tokens[..., t:].shape, generator=generator).to(tokens)
    return torch.cat((tokens[..., :t], (tokens[..., t:] + shift) % vocab_size), dim=-1)


def random_cuts(case: Case) -> list[int]:
    """Tokens to change from on, one in each part of what is trained on; the last comes after a training."""
    k, size = case.passes, case.path.hp.ttt_chunk_tokens
    end = (case.trained[-1] + 1) * size if len(case.trained) > 1 else case.positions
    bounds = [2 + (end - 2) * i // k for i in range(k + 1)]
    if case.trained:
        bounds[-2] = min(max(bounds[-2], size + 2), end)
    return [case.rng.randrange(low, max(low + 1, high)) for low, high in zip(bounds, bounds[1:])]


def cut_single_windows(case: Case) -> tuple[list[str], int]:
    """Change the end of single windows, at many places: the faults found, the windows looked at."""
    path, n = case.path, case.positions
    windows = tg.sliding_windows(n, path.hp.eval_seq_len, path.hp.eval_stride)
    chosen = case.rng.sample(windows, min(WINDOW_CUTS, len(windows)))
    length = min(path.hp.eval_seq_len, n)
    rows = torch.stack([case.tokens[end - length: end + 1] for _, end, _ in chosen])
    cuts = [case.rng.randint(1, length) for _ in chosen]
    others = torch.stack([changed_from(row, t, path.hp.vocab_size, case.rng) for row, t in zip(rows, cuts)])
    before, after = (path.rows(case.base.model, each, length) for each in (rows, others))
    wrong = sum(path.differing(a[: t - 1], b[: t - 1]) > 0 for a, b, t in zip(before, after, cuts))
    faults = [f"in {wrong} of {len(cuts)} single windows a loss depends on tokens after its target"]
    return faults[: wrong > 0], len(cuts)


@contextlib.contextmanager
def unmasked(path: ScoringPath) -> Iterator[None]:
    """The path without its mask, inside the body: texts that are made up hold pairs that it forbids."""
    never, path.never = path.never, None
    try:
        yield
    finally:
        path.never = never


def document_bounds(tokens: Tensor) -> list[tuple[int, int]]:
    """Start and end of every document among the positions of tokens (positions + 1,)."""
    starts = [0, *((tokens[1:-1] == tg.BOS).nonzero().flatten() + 1).tolist(), len(tokens) - 1]
    return [(start, end) for start, end in zip(starts, starts[1:]) if end > start]


def check_documents_causal(case: Case) -> Check:
    """Other tokens from t on in a document leave its earlier losses and every other document as they were."""
    path, faults, told = case.path, [], []
    with unmasked(path):
        base = path.documents(case.tokens, case.byte_counts).losses if path.hp.canonical_mask else \
            case.base.losses
        longest = sorted(document_bounds(case.tokens), key=lambda each: each[0] - each[1])
        for i, (start, end) in enumerate(longest[: case.passes], 1):
            t = case.rng.randrange(start + 1, end) if end - start > 1 else end
            path.log.begin(f"causality {i} of {case.passes}: a document's tokens from {t} on changed")
            other = case.tokens.clone()
            other[t:end] = (case.tokens[t:end] - 2 + case.rng.randrange(1, path.hp.vocab_size - 2)) % (
                path.hp.vocab_size - 2) + 2  # no BOS: the documents stay
            losses = path.documents(other, case.byte_counts).losses
            inside = torch.zeros(case.positions, dtype=torch.bool)
            inside[t - 1: end] = True
            if wrong := path.differing(base[~inside], losses[~inside]):
                faults.append(f"tokens {t} to {end} change {wrong} losses before them or in other documents")
            if end > t and not path.differing(base[inside], losses[inside]):
                faults.append(f"tokens {t} to {end} change nothing at all: the path does not read them")
            told.append(str(t))
    return verdict("causal", faults, f"with training on, a document's tokens changed from {', '.join(told)} "
                   f"on: all losses before them and of other documents are {path.same}")


def check_documents_learning(case: Case) -> Check:
    """Training changes later chunks only, and neither order nor batch of the documents the score."""
    path, base, hp, faults = case.path, case.base, case.path.hp, []
    bounds, name = document_bounds(case.tokens), "score before update"
    if not base.trained:
        return Check(name, NOT_CHECKED, "no document is longer than a chunk, so nothing was trained")
    chunk_of = {start: chunk for chunk, part in tg.document_batches(hp, case.tokens, 1) for start, *_ in part}
    chunks = torch.cat([torch.arange(end - start) // chunk_of[start] for start, end in bounds])
    step = case.rng.randrange(max(int(chunks.max()), 1))
    path.log.begin(f"score before update: from step {step} on, training climbs")
    losses = path.documents(case.tokens, case.byte_counts, noisy_from=step).losses
    if wrong := path.differing(base.losses[chunks <= step], losses[chunks <= step]):
        faults.append(f"training from step {step} on changes {wrong} losses of chunks up to it")
    if not path.differing(base.losses[chunks > step], losses[chunks > step]):
        faults.append(f"training from step {step} on changes nothing: it has no effect, or is not watched")
    path.log.begin("documents in another order and in other batches")
    inner = bounds[1:-1]
    case.rng.shuffle(inner)
    order = [*bounds[:1], *inner, *bounds[1:][-1:]]
    index = torch.cat([torch.arange(start, end) for start, end in order])
    tokens = torch.cat((case.tokens[index], case.tokens[-1:]))
    again = path.documents(tokens, case.byte_counts[index], most=4 * hp.ttt_context)
    off = abs(again.score.val_bpb - base.score.val_bpb) if again.score and base.score else math.nan
    if not off <= 1e-4:
        faults.append(f"another order of the documents, in other batches, changes the score by {off:.1e}")
    return verdict(name, faults, f"training from step {step} on, turned round, leaves all losses of chunks "
                   f"up to it {path.same} and changes later ones; {len(bounds)} documents in another order "
                   f"and in other batches score the same within {off:.1e} bpb (limit 1e-04)")


def check_canonical(case: Case) -> Check:
    """Masked probabilities sum to 1; which are 0 depends on the previous token and the tokenizer alone."""
    path, V, faults, sums = case.path, case.path.hp.vocab_size, [], []
    processor = tg.load_tokenizer(path.hp.tokenizer_path, V)
    model, never = path.load(), torch.from_numpy(tg.canonical_mask(processor))
    for _ in range(case.passes):
        start = case.rng.randrange(max(case.positions - 8, 1))
        text = case.tokens[start: start + 8].long().repeat(V, 1)
        targets = torch.arange(V, device=text.device).unsqueeze(1)
        wanted = torch.cat((text[:, 1:], targets), 1)
        with torch.no_grad(), path.world.autocast():
            parts = zip(text.split(256), wanted.split(256))
            losses = [tg.token_losses(model, *part, 1)[:, 0] for part in parts]
        p = (-torch.cat(losses).double()).exp().cpu()
        sums.append(float(p.sum()))
        if not torch.equal(p == 0, never[int(text[0, -1])]):
            faults.append("tokens without a probability are not those that the previous token forbids")
    faults += [f"the probabilities sum to {total:.6f}" for total in sums if abs(total - 1) > SUM_TOLERANCE]
    return verdict("canonical mask", faults, f"in {len(sums)} places the probabilities sum to 1 within "
                   f"{max(abs(total - 1) for total in sums):.1e}, and those that are 0 are the ones that the "
                   f"tokenizer's merges forbid after the previous token")


def check_causal(case: Case) -> Check:
    """Changing tokens from t on leaves every loss before t as it was: position p scores token p + 1."""
    if case.positions < 2:
        return Check("causal", NOT_CHECKED, "one position has none before it; use --positions 2 or more")
    path, base, cuts = case.path, case.base.losses, random_cuts(case)
    faults, windows = cut_single_windows(case)
    if path.tolerance > MOST_NOISE:
        faults.append(f"two passes over the same tokens differ by {path.tolerance / 4:.2g} nats")
    for i, t in enumerate(cuts, 1):
        path.log.begin(f"causality {i} of {len(cuts)}: tokens from {t} on changed")
        changed = changed_from(case.tokens, t, path.hp.vocab_size, case.rng)
        other = path.score(changed, case.byte_counts, stop_after=t // path.hp.ttt_chunk_tokens)
        if wrong := path.differing(base[: t - 1], other.losses[: t - 1]):
            faults.append(f"tokens from {t} on change {wrong} losses of tokens before {t}")
        later = slice(t - 1, other.reached)
        if not path.differing(base[later], other.losses[later]):
            faults.append(f"tokens from {t} on change nothing at all: the path does not read them")
    if not faults and (reason := case.too_short()):
        return Check("causal", NOT_CHECKED, reason)
    how = "with test-time training on, " if case.trained else ""
    return verdict("causal", faults, f"{how}tokens changed from {', '.join(map(str, cuts))} on: all "
                   f"{sum(cuts) - len(cuts):,} losses before them are {path.same}; so in {windows} windows "
                   f"taken singly")


def check_normalised(case: Case) -> Check:
    """Put every token of the vocabulary in one place of a text and score it there, by the path's own scorer.

    Probabilities that are fixed before the target is looked at sum to 1; those that look at it do not.
    """
    path, V = case.path, case.path.hp.vocab_size
    length = min(path.hp.eval_seq_len, case.positions, max(SWEEP_TOKENS // V, 16))
    batch = min(max(path.batch_tokens // length, 1), V)
    copies, sums = -(-V // batch) * batch, []  # full batches only: another shape may round another way
    path.log.begin(f"normalisation: {case.passes} texts of {length} tokens, {V} targets in one place of each")
    with unmasked(path):
        models = path.load(), case.base.model
    for model in models:
        model.never = None
        for _ in range(case.passes):
            start = case.rng.randint(0, case.positions - length)
            place = case.rng.randint(1, max(1, length - 1))  # text goes on behind it, for a model that peeks
            rows = case.tokens[start: start + length + 1].repeat(copies, 1)
            rows[:, place] = torch.arange(copies).to(rows) % V
            losses = path.rows(model, rows, length - place + 1, batch)[:V, 0].double()
            sums.append(float((-losses).exp().sum()) if torch.isfinite(losses).all() else math.nan)
    wrong = [total for total in sums if not abs(total - 1) <= SUM_TOLERANCE]
    faults = [f"the probabilities sum to {total:.6f}, to other than 1 in {len(wrong)} of {len(sums)} places"
              for total in wrong[:1]]
    return verdict("normalised", faults, f"in {len(sums)} places the probabilities of all {V} tokens, each "
                   f"measured as the target, sum to 1 within {max(abs(total - 1) for total in sums):.1e} "
                   f"(limit {SUM_TOLERANCE:.0e}), with the artifact's weights and with those after the pass")


def check_score_before_update(case: Case) -> Check:
    """Training sees what is scored, and noise in its place changes no score up to there."""
    name, path, base = "score before update", case.path, case.base
    if reason := case.too_short():
        return Check(name, NOT_CHECKED, reason)
    if not case.trained:
        fresh, used = path.load().state_dict(), base.model.state_dict()
        moved = [key for key in fresh if not torch.equal(fresh[key], used[key])]
        faults = [f"{key} has changed without a training that could be watched" for key in moved[:1]]
        return verdict(name, faults, "nothing is trained: after the pass the weights are the artifact's")
    faults = [f"training on chunk {chunk} goes up to position {end - 1} when {reached} positions are scored"
              for chunk, end, reached in base.trained if end > reached][:1]
    path.log.begin("score before update: training sees noise where no position is scored yet")
    blind = path.score(case.tokens, case.byte_counts, noise_from=math.inf)
    if path.differing(base.losses, blind.losses):
        faults.append("training reads targets that are not scored yet: without them losses are other ones")
    starts = sorted(case.rng.sample(case.trained, min(case.passes, len(case.trained))))
    effects = 0
    for i, chunk in enumerate(starts, 1):
        path.log.begin(f"score before update {i} of {len(starts)}: noise for training from chunk {chunk} on")
        other = path.score(case.tokens, case.byte_counts, noise_from=chunk, stop_after=chunk)
        border = (chunk + 1) * path.hp.ttt_chunk_tokens
        if wrong := path.differing(base.losses[:border], other.losses[:border]):
            faults.append(f"training from chunk {chunk} on changes {wrong} losses of chunks up to {chunk}")
        later = slice(border, other.reached)
        effects += path.differing(base.losses[later], other.losses[later]) > 0
    if not faults and not effects:
        return Check(name, NOT_CHECKED, "noise in the place of the training text changes no later loss: the "
                                        "training has no effect")
    return verdict(name, faults, f"each of {len(case.trained)} chunks was scored to its end before its "
                   f"training began, and training reads no target beyond; noise for training from chunk "
                   f"{', '.join(map(str, starts))} on leaves all losses up to that chunk's end {path.same}, "
                   f"and changes later ones")


def check_positions(case: Case, shards: np.ndarray, whole: Tensor) -> Check:
    """Every position once, in order; the split and the sums recounted."""
    base, n, seq_len = case.base, case.positions, case.path.hp.eval_seq_len
    faults = base.faults() + ([f"the scorer stopped: {base.refusal}"] if base.refusal else [])
    expected = (len(shards) - 1) // seq_len * seq_len
    if len(whole) != expected + 1 or not np.array_equal(whole.cpu().numpy(), shards[: expected + 1]):
        faults.append(f"the scored tokens are not the first {expected + 1} of the validation shards")
    if base.score is not None:
        nats = float(base.losses.double().sum())
        if base.score.positions != n:
            faults.append(f"the score counts {base.score.positions} positions, not {n}")
        if not math.isclose(base.score.nats, nats, rel_tol=1e-9):
            faults.append(f"the score sums to {base.score.nats:.6f} nats, its losses to {nats:.6f}")
    part = "the whole split" if n == expected else f"the first of {expected:,}"
    return verdict("each position once", faults, f"{n:,} positions ({part}), one loss each, from left to "
                   f"right; the score is their float64 sum; the shards, read by other code, hold them")


# ----------------------------------------------------------------------------------------------------------
# Bytes, counted by other code

def read_validation(folder: str, kind: str = "val") -> np.ndarray:
    """What all validation shards, or their sidecars, hold behind headers of 1,024 bytes; empty without."""
    files = sorted(p for p in Path(folder).iterdir() if re.fullmatch(rf"fineweb_{kind}_\d+\.bin", p.name))
    return np.frombuffer(b"".join(path.read_bytes()[1024:] for path in files), "<u2").astype(np.int32)


@dataclass
class ByteRule:
    """The official rule once more: bytes of a piece, whether it opens with a blank, whether it is no text."""

    size: np.ndarray
    blank: np.ndarray
    silent: np.ndarray

    @staticmethod
    def of(processor) -> ByteRule:
        """Read every piece of a SentencePiece model."""
        ids = range(processor.get_piece_size())
        silent = [processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i) for i in ids]
        text = [b"" if silent[i] else b"x" if processor.is_byte(i) else processor.id_to_piece(i).encode()
                for i in ids]
        blank = np.array([piece.startswith("\u2581".encode()) for piece in text])
        return ByteRule(np.array([len(piece) for piece in text]) - 3 * blank, blank, np.array(silent))

    def count(self, previous: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Bytes of each target."""
        return self.size[target] + (self.blank[target] & ~self.silent[previous])


def decoded_faults(processor, rule: ByteRule, tokens: np.ndarray,
                   counted: np.ndarray) -> tuple[list[str], str]:
    """Compare counted bytes with decoded text, from one boundary to the next: faults and evidence.

    A blank right after a boundary is text that is not charged: the one byte that may lie between the two.
    """
    targets = tokens[1:]
    borders = [-1, *np.flatnonzero(rule.silent[targets]).tolist(), len(targets)]
    pieces = [(low + 1, high) for low, high in zip(borders, borders[1:]) if high > low + 1]
    ends = (pieces[0], pieces[-1]) if pieces else ()  # a slice may cut a character in two
    total, off = 0, 0
    for piece in pieces:
        low, high = piece
        text = len(processor.decode(targets[low:high].tolist()).encode())
        gap = text - int(counted[low:high].sum())
        total += text
        off += not (-12 <= gap <= 12 if piece in ends else 0 <= gap <= 1)
    faults = [f"in {off} of {len(pieces)} documents the bytes are not those of the decoded text"]
    return faults[: off > 0], f"{len(pieces):,} documents decode to {total:,} bytes, at most one more each"


def charge_faults(case: Case, counted: np.ndarray, source: str) -> list[str]:
    """Where positions are charged, or the score divides by, other bytes than were counted."""
    score, faults = case.base.score, []
    if wrong := int((case.byte_counts.cpu().numpy() != counted).sum()):
        faults.append(f"{wrong} positions are charged other bytes than {source}")
    if score is not None and score.bytes != counted.sum():
        faults.append(f"the score divides by {score.bytes} bytes; there are {counted.sum()}")
    return faults


def check_sidecar(case: Case, sidecar: np.ndarray, processor) -> Check:
    """The bytes of the score against the file that counts them, whose own truth no decoded text can show."""
    tokens, counted = case.tokens.cpu().numpy(), sidecar[1: len(case.tokens)]
    pieces = ByteRule.of(processor).count(tokens[:-1], tokens[1:]).sum()
    charged = int((counted[tokens[1:] == tg.BOS] > 0).sum())
    faults = [f"fineweb_val_bytes_*.bin charges {charged} targets that begin a document"][: charged > 0]
    return verdict("bytes", charge_faults(case, counted, "fineweb_val_bytes_*.bin says") + faults,
                   f"{counted.sum():,} bytes by fineweb_val_bytes_*.bin, read by other code, position by "
                   f"position; the pieces of the transformed text have {pieces:,}; that the file is right is "
                   f"not checked: that takes the original text")


def check_bytes(case: Case, processor) -> Check:
    """The bytes of the score against the rule written a second time, and against decoded text."""
    rule, table, tokens = ByteRule.of(processor), tg.ByteTable(processor), case.tokens.cpu().numpy()
    counted, faults = rule.count(tokens[:-1], tokens[1:]), []
    ids = np.arange(len(rule.size))
    for before in (ids[rule.silent][0], ids[~rule.silent][0]):
        previous = np.full_like(ids, before)
        got = table.count(torch.from_numpy(previous), torch.from_numpy(ids)).numpy()
        if wrong := np.flatnonzero(got != rule.count(previous, ids)).tolist():
            faults.append(f"the byte table is wrong for {len(wrong)} tokens, such as "
                          f"{processor.id_to_piece(wrong[0])!r}: {got[wrong[0]]}")
    faults += charge_faults(case, counted, "the rule says")
    case.path.log.begin("bytes of the decoded text")
    more, decoded = decoded_faults(processor, rule, tokens, counted)
    return verdict("bytes", faults + more, f"{counted.sum():,} bytes by a second implementation of the rule, "
                   f"position by position; the table agrees on {len(ids)} pieces; {decoded}")


# ----------------------------------------------------------------------------------------------------------
# What the run says of itself

def check_size(blob: bytes) -> Check:
    """Code and artifact against the cap."""
    code, total = SCRIPT.stat().st_size, len(blob) + SCRIPT.stat().st_size
    text = f"model {len(blob):,} B + code {code:,} B = {total:,} B of {CAP:,} B"
    return verdict("size", [text] if total > CAP else [], text)


def check_identity(blob: bytes, result: Mapping) -> Check:
    """The result beside the artifact is about this file, and came from this script."""
    name = "script and artifact"
    if "script_sha256" not in result or "scored_artifact_sha256" not in result:
        return Check(name, NOT_CHECKED, "no result.json beside the artifact says what was scored by what")
    sizes, code, faults = result.get("artifact", {}), SCRIPT.read_bytes(), []
    if result["scored_artifact_sha256"] != hashlib.sha256(blob).hexdigest():
        faults.append("result.json is about another artifact")
    if result["script_sha256"] != hashlib.sha256(code).hexdigest():
        faults.append("the run's train_gpt.py was another one than this; its source opens the run's log.txt")
    for key, actual in (("model_bytes", len(blob)), ("code_bytes", len(code))):
        if sizes.get(key, actual) != actual:
            faults.append(f"result.json says {key} {sizes[key]:,}; the file has {actual:,}")
    return verdict(name, faults, f"SHA-256 of script and artifact{', and their bytes,' if sizes else ''} are "
                                 f"those of result.json")


def check_clock(clock: str, result: Mapping, score: str) -> Check:
    """One of the 600 s clocks, added up again, with everything on it that belongs there."""
    report = result.get("budget", {}).get(clock)
    if not report:
        return Check(f"{clock} clock", NOT_CHECKED, "no result.json beside the artifact holds this clock")
    counted, free = report["counted"], report["uncounted"]
    needed = {*ON_THE_CLOCK[clock], *([score] if clock == "evaluation" else [])}
    used = sum(counted.values())
    faults = [f"{used:.1f} s of {CLOCK:.0f} s"] if used > CLOCK else []
    faults += [f"{phase} is not on the clock" for phase in sorted(needed - counted.keys())]
    faults += [f"{phase} is left out of the clock" for phase in sorted(free.keys() - OFF_THE_CLOCK[clock])]
    if abs(used - report["used"]) > 0.01:
        faults.append(f"the phases add up to {used:.2f} s, not {report['used']:.2f} s")
    return verdict(f"{clock} clock", faults, f"{used:.1f} s of {CLOCK:.0f} s in {len(counted)} phases; "
                                             f"not counted: {', '.join(free) or 'nothing'}")


def check_score(case: Case, result: Mapping, whole: int) -> Check:
    """The audited score against the one that the run reported."""
    path, score = case.path, case.base.score
    name = f"{path.name} score of the run"
    if score is None:
        return Check(name, FAIL, f"the scorer gave none: {case.base.refusal}")
    mine, theirs = score.val_bpb, result.get("bpb", {}).get(path.name)
    if case.positions != whole:
        return Check(name, NOT_CHECKED, f"val_bpb {mine:.6f} on the first {case.positions:,} of {whole:,} "
                                        f"positions; leave --positions out to compare")
    if theirs is None:
        return Check(name, NOT_CHECKED, f"val_bpb {mine:.6f}; no result.json beside the artifact holds it")
    exact = path.world.dtype == torch.float32 and not path.hp.ttt_enabled
    limit = 1e-6 if exact else 1e-4  # other ranks, batches and kernels
    faults = [f"{key} is {result[key]} in result.json, {value} here"
              for key, value in (("val_tokens", whole), ("val_bytes", score.bytes))
              if result.get(key, value) != value]
    text = f"val_bpb {mine:.8f}, reported {theirs:.8f}, difference {mine - theirs:+.1e} (limit {limit:.0e})"
    return verdict(name, faults + ([] if abs(mine - theirs) <= limit else [text]), text)


# ----------------------------------------------------------------------------------------------------------
# The audit

def read_result(artifact: Path) -> dict:
    """The result.json beside the artifact; empty where there is none."""
    path = artifact.parent / "result.json"
    if not path.is_file():
        return {}
    about = "is not a run's result", "move it away to audit without it"
    result = shared.read_json(path, shared.RESULT, *about)
    return result if {"preset", "changed"} <= result.keys() else {}


def run_settings(result: Mapping, env: Mapping[str, str], places: Mapping[str, str]) -> tg.Hyperparameters:
    """The settings that the run was scored with, of its result, else of the environment; data at `places`."""
    given = dict(env)
    if result:
        result = result.get("scored_with", result)
        show = lambda value: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        changed = {key: value for key, value in result["changed"].items() if key not in OF_THE_RUN_ALONE}
        given = {"PRESET": result["preset"]} | {key.upper(): show(value) for key, value in changed.items()}
        if "dtype" in result:
            given["DTYPE"] = {"bfloat16": "bf16", "float32": "fp32"}[result["dtype"]]
        given |= {key: env[key] for key in OF_THIS_MACHINE if key in env}
    fixed = {"STAGES": "evaluate", "RESUME": "0", "ARTIFACT": ""}
    return tg.Hyperparameters.from_env({**given, **places, **fixed})


@dataclass
class Finished:
    """A finished run's artifact, what its result.json says, and all that scoring it needs."""

    blob: bytes
    result: dict
    world: tg.World
    validation: tg.Validation
    path: ScoringPath

    @staticmethod
    def open(artifact: Path, places: Mapping[str, str], env: Mapping[str, str]) -> Finished:
        """Read artifact, result and validation; places are those of the data where they are not the run's."""
        if not artifact.is_file():
            raise Mistake(f"{artifact} is missing; name the artifact.bin of a finished run")
        blob, result = artifact.read_bytes(), read_result(artifact)
        hp = run_settings(result, env, places)
        world = tg.World(hp, {})
        tg.choose_dtype(hp, world)
        hp = tg.load_artifact(blob, hp, world)[0].hp
        validation = tg.Validation.load(hp, world)
        stopped = (result.get("proofs", {}).get("ttt") or {}).get("untrained_from_chunk")
        path = ScoringPath(blob, hp, world, len(validation.byte_counts), stopped)
        return Finished(blob, result, world, validation, path)


def audit(artifact: Path, places: Mapping[str, str], positions: int | None = None, passes: int = 3,
          seed: int = 0, env: Mapping[str, str] = os.environ) -> list[Check]:
    """Every check of the artifact, on the first `positions` of validation (none: on all).

    places: DATA_PATH and TOKENIZER_PATH where they are not the run's own. Raises UserError on a mistake.
    """
    run = Finished.open(artifact, places, env)
    path, result, hp, whole = run.path, run.result, run.path.hp, len(run.validation.byte_counts)
    torch.manual_seed(seed)
    count = min(positions or whole, whole)
    tokens, byte_counts = run.validation.tokens[: count + 1], run.validation.byte_counts[:count]
    path.log.begin(f"the {path.name} score of {count:,} of {whole:,} positions")
    case = Case(path, tokens, byte_counts, path.score(tokens, byte_counts), random.Random(seed), passes)
    processor = tg.load_tokenizer(hp.tokenizer_path, hp.vocab_size)
    sidecar = read_validation(hp.data_path, "val_bytes")
    repeat_pass(case)
    causal, learning = (check_documents_causal, check_documents_learning) if path.by_documents else \
        (check_causal, check_score_before_update)
    masked = [check_canonical(case)] if hp.canonical_mask else []
    return [causal(case), check_normalised(case), *masked, learning(case),
            check_positions(case, read_validation(hp.data_path), run.validation.tokens),
            check_sidecar(case, sidecar, processor) if len(sidecar) else check_bytes(case, processor),
            check_score(case, result, whole), check_size(run.blob), check_identity(run.blob, result),
            check_clock("training", result, path.name), check_clock("evaluation", result, path.name)]


# ----------------------------------------------------------------------------------------------------------
# What each technique is worth
#
# Each technique is switched off in the trained model, and the scorer's loss on a batch tells what it did.
# A part says which weights silence it; one without weights is taken out. All is put back.

@dataclass
class Switch:
    """What switches a technique off: other weights, places without a part, layers that run once."""

    weights: dict[str, float | tuple[float, ...]] = field(default_factory=dict)
    places: list[dict] = field(default_factory=list)
    once: bool = False


def switches(model: tg.GPT) -> dict[str, Switch]:
    """A switch for each technique that acts in the model, but for what no setting turns off."""
    fields = tg.Hyperparameters.fields("model").items()
    off = dataclasses.replace(model.hp, **{
        name: f.metadata["off"] for name, f in fields if f.metadata["off"] is not None})
    shared = model.silent | ({"value_embedding": model.ve_shared.silent} if model.hp.ve_enabled else {})
    found = {name: Switch(dict(silent)) for name, silent in shared.items()}
    found |= {"loops": Switch(once=True)} if model.looping else {}
    places = [("", model.embedding_parts, tg.EMBEDDING_PARTS, (off,))]
    for layer, block in enumerate(model.blocks):
        attn, host = block.attn, f"blocks.{layer}.attn."
        places += [(host, attn.value_parts, tg.VALUE_PARTS, (off, layer)),
                   (host, attn.output_parts, tg.OUTPUT_PARTS, (off, layer))]
    for host, parts, table, without in places:
        for name, part in parts.items():
            if name not in shared and not table[name][1](*without):
                switch = found.setdefault(name, Switch())
                if silent := getattr(part, "silent", None):
                    switch.weights |= {host + key: value for key, value in silent.items()}
                else:
                    switch.places.append(parts)
    return found


@contextlib.contextmanager
def switched_off(model: tg.GPT, name: str, switch: Switch) -> Iterator[None]:
    """The model without a technique, inside the body."""
    weights = {key: model.get_parameter(key) for key in switch.weights}
    kept = {key: p.detach().clone() for key, p in weights.items()}
    whole, looping = [dict(place) for place in switch.places], model.looping
    try:
        model.looping &= not switch.once
        with torch.no_grad():
            for key, p in weights.items():
                p.copy_(torch.as_tensor(switch.weights[key]).expand_as(p))
        for place in switch.places:
            del place[name]
        yield
    finally:
        model.looping = looping
        with torch.no_grad():
            for key, p in weights.items():
                p.copy_(kept[key])
        for place, parts in zip(switch.places, whole):
            place.clear()
            place.update(parts)  # in the order in which they act


def techniques(model: tg.GPT, validation: tg.Validation, world: tg.World,
               sequences: int = 8) -> dict[str, dict[str, float]]:
    """For each technique the loss on some sequences of validation text, and the loss without it, in nats."""
    tokens, counts, length = validation.tokens, validation.byte_counts, model.hp.eval_seq_len
    starts = sorted({(len(counts) - length) * i // (sequences - 1) for i in range(sequences)})
    windows = [(start, start + length, start) for start in starts]
    batch_tokens = tg.scoring_batch_tokens(model.hp, world)
    loss = lambda: tg.evaluate(model, tokens, counts, windows, world, batch_tokens).val_loss
    whole, found = loss(), {}
    for name, switch in switches(model).items():
        with switched_off(model, name, switch):
            found[name] = {"loss": whole, "loss_without": loss()}
    return found


def techniques_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """One line for each technique, the largest effect first."""
    lines = [f"{'technique':<18}{'loss':>9}{'without':>10}{'effect':>10}"]
    effect = {name: each["loss_without"] - each["loss"] for name, each in found.items()}
    for name in sorted(found, key=lambda name: -effect[name]):
        loss, without = found[name].values()
        said = f"{effect[name]:>+10.5f}" if effect[name] else f"{'none':>10}  it does nothing in this model"
        lines.append(f"{name.replace('_', ' '):<18}{loss:>9.4f}{without:>10.4f}{said}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------
# The command line

def table(checks: list[Check], width: int = 110) -> str:
    """Names, statuses and evidence in columns."""
    first = max(len(check.name) for check in checks) + 2
    second = len(NOT_CHECKED) + 2
    lines = []
    for check in checks:
        evidence = textwrap.wrap(check.evidence, width - first - second) or [""]
        lines.append(f"{check.name:<{first}}{check.status:<{second}}{evidence[0]}")
        lines += [" " * (first + second) + line for line in evidence[1:]]
    return "\n".join(lines)


def summary(checks: list[Check]) -> str:
    """The last line."""
    failed, open_ = (sum(check.status == status for check in checks) for status in (FAIL, NOT_CHECKED))
    if failed:
        return f"audit: FAILED, {failed} of {len(checks)} checks"
    return f"audit: incomplete, {open_} of {len(checks)} not checked, the others passed" if open_ else \
        f"audit: passed, all {len(checks)} checks"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    return shared.exit_status(partial(program, arguments))


def program(arguments: list[str] | None) -> int:
    """The command line; returns whether a check failed."""
    parser = shared.parser(__doc__)
    parser.add_argument("artifact", type=Path, help="e.g. logs/RUN/artifact.bin")
    parser.add_argument("--data", help="folder of the validation shards (default: the run's)")
    parser.add_argument("--tokenizer", help="SentencePiece model (default: the run's)")
    parser.add_argument("--positions", type=int, metavar="N", help="the first N positions (default: all)")
    parser.add_argument("--passes", type=int, default=3, help="perturbed passes per condition (default: 3)")
    parser.add_argument("--seed", type=int, help="of the random places (default: another one each time)")
    about = "no checks: the loss with each technique switched off; costs no budget, nothing is chosen by it"
    parser.add_argument("--techniques", action="store_true", help=about)
    given = parser.parse_args(arguments)
    named = {"DATA_PATH": given.data, "TOKENIZER_PATH": given.tokenizer}
    places = {key: value for key, value in named.items() if value}
    if given.techniques:
        return print_techniques(given.artifact, places)
    if given.passes < 1 or given.positions is not None and given.positions < 1:
        raise Mistake("--positions and --passes must be at least 1")
    if given.passes > MOST_PASSES:
        raise Mistake(f"--passes must be at most {MOST_PASSES}")
    if given.seed is not None and not shared.SEED.holds(given.seed):
        raise Mistake(f"--seed must be {shared.SEED.name}")
    return print_audit(given, places)


def print_techniques(artifact: Path, places: Mapping[str, str]) -> int:
    """Print the table of techniques and leave it as techniques.json."""
    run = Finished.open(artifact, places, os.environ)
    found = techniques(run.path.load(), run.validation, run.world)
    report = {"artifact_sha256": hashlib.sha256(run.blob).hexdigest(), "techniques": found}
    write_beside(artifact, "techniques.json", report)
    print(f"{artifact}: nats per token on a batch of validation text, with each technique and without\n")
    print(techniques_table(found))
    return 0


def write_beside(artifact: Path, name: str, report: Mapping) -> None:
    """Leave a report beside the artifact, before it is printed: the reader of a pipe may go."""
    shared.write_atomically(artifact.parent / name, json.dumps(report, indent=1).encode())


def print_audit(given: argparse.Namespace, places: Mapping[str, str]) -> int:
    """Make the checks, print them, leave them as audit.json; returns whether one failed."""
    seed = secrets.randbits(32) if given.seed is None else given.seed
    checks = audit(given.artifact, places, given.positions, given.passes, seed)
    report = {"passed": all(check.status == PASS for check in checks),
              "artifact_sha256": hashlib.sha256(given.artifact.read_bytes()).hexdigest(), "seed": seed,
              "positions": given.positions, "checks": [dataclasses.asdict(check) for check in checks]}
    write_beside(given.artifact, "audit.json", report)
    print(f"{given.artifact} (seed {seed})\n\n{table(checks)}\n\n{summary(checks)}")
    return int(any(check.status == FAIL for check in checks))


if __name__ == "__main__":
    sys.exit(main())
