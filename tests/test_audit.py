"""The audit passes an honest run and catches every planted violation."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import audit
import numpy as np
import pytest
import torch
from conftest import ROOT, run_here, write_shard
from runs import Run

import train_gpt as tg

pytestmark = pytest.mark.whole
SMALLER = {
    "NUM_LAYERS": "2", "VE_LAYERS": "1", "ITERATIONS": "8", "WARMDOWN_ITERS": "6", "WARMUP_STEPS": "0",
    "EVAL_SEQ_LEN": "16", "EVAL_STRIDE": "8", "TTT_CHUNK_TOKENS": "256", "TTT_SCHEDULE": "run",
}  # fmt: skip
SLICE = 600  # two chunks and a part of a third


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny) -> Path:
    """One finished run on a short validation split; the folder that its artifact lies in."""
    folder = tmp_path_factory.mktemp("audited")
    shutil.copytree(tiny["DATA_PATH"], folder / "data")
    val = folder / "data/fineweb_val_000000.bin"
    write_shard(val, np.fromfile(val, "<u2", offset=1024)[:800])
    assert run_here(folder, tiny | SMALLER | {"DATA_PATH": str(folder / "data"), "RUN_ID": "run"}) == 0
    return folder / "logs/run"


@pytest.fixture(scope="module")
def finished(run) -> audit.Finished:
    """The same, opened."""
    return audit.Finished.open(run / "artifact.bin", {}, {})


@pytest.fixture(scope="module")
def honest(finished) -> audit.Case:
    """A pass over all of it, for checks that read nothing else."""
    path, validation = finished.path, finished.validation
    base = path.score(validation.tokens, validation.byte_counts)
    return audit.Case(path, validation.tokens, validation.byte_counts, base, random.Random(5), 1)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the run's artifact and result, to be damaged."""
    for name in ("artifact.bin", "result.json"):
        shutil.copy(run / name, tmp_path)
    return tmp_path


def change_result(folder, change):
    """Edit result.json in place."""
    path = folder / "result.json"
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))


def checks_of(folder, positions=SLICE):
    """Checks by name."""
    done = audit.audit(folder / "artifact.bin", {}, positions, passes=1, seed=4, env={})
    return {check.name: check for check in done}


def counts_of(folder, positions=SLICE):
    """The checks of what was scored and counted, which need no further pass."""
    run = audit.Finished.open(folder / "artifact.bin", {}, {})
    path, hp, validation = run.path, run.path.hp, run.validation
    text = validation.tokens[: positions + 1], validation.byte_counts[:positions]
    case = audit.Case(path, *text, path.score(*text), random.Random(4), passes=1)
    checks = [
        audit.check_positions(case, audit.read_validation(hp.data_path), validation.tokens),
        audit.check_bytes(case, tg.load_tokenizer(hp.tokenizer_path, hp.vocab_size)),
    ]
    return {check.name: check for check in checks}


def failed(checks):
    return {name for name, check in checks.items() if check.status == "fail"}


# ----------------------------------------------------------------------------------------------------------
# Honest runs
# ----------------------------------------------------------------------------------------------------------


def test_an_honest_run_passes_whole_in_a_fresh_process(copy, tiny):
    """Through the command line, with nothing but artifact, result, shards and tokenizer."""
    command = [sys.executable, str(ROOT / "records/audit.py"), str(copy / "artifact.bin"), "--passes", "1"]
    data = audit.read_result(copy / "artifact.bin")["data_path"]
    command += ["--data", data, "--tokenizer", tiny["TOKENIZER_PATH"]]
    clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((copy / "audit.json").read_text())
    assert report["passed"] is True
    assert report["artifact_sha256"] == hashlib.sha256((copy / "artifact.bin").read_bytes()).hexdigest()
    names = [check["name"] for check in report["checks"]]
    assert names == [
        "causal", "normalised", "score before update", "each position once", "bytes", "ttt score of the run",
        "size", "script and artifact", "training clock", "evaluation clock",
    ]  # fmt: skip
    for check in report["checks"]:
        assert check["status"] == "pass" and check["evidence"], check
        assert check["name"] in done.stdout and check["evidence"].split()[0] in done.stdout
    assert "with test-time training on" in report["checks"][0]["evidence"]
    assert "difference +0.0e+00" in report["checks"][5]["evidence"]  # the same process count: the same digits
    assert done.stdout.splitlines()[-1] == "audit: passed, all 10 checks"
    assert "noise for training from chunk" in done.stderr  # progress
    assert not list(copy.glob("*.tmp"))


def test_a_slice_is_scored_as_in_the_whole_run(finished, honest):
    """The learning rates of a slice are those of the whole: its losses are the run's first ones."""
    hp, validation = finished.path.hp, finished.validation
    part = finished.path.score(validation.tokens[: SLICE + 1], validation.byte_counts[:SLICE]).losses
    full_chunks = SLICE // hp.ttt_chunk_tokens * hp.ttt_chunk_tokens
    assert part[:full_chunks].equal(honest.base.losses[:full_chunks])
    same = SLICE - hp.eval_stride  # the last window of a slice ends where the slice does
    assert part[:same].allclose(honest.base.losses[:same], rtol=1e-5, atol=1e-5)


def test_a_slice_and_a_missing_result_are_never_a_pass(run, copy, tiny, capsys, monkeypatch):
    (copy / "result.json").unlink()
    folder = audit.read_result(run / "artifact.bin")["data_path"]
    for key, value in (tiny | SMALLER | {"DATA_PATH": folder}).items():
        monkeypatch.setenv(key, value)
    assert audit.main([str(copy / "artifact.bin"), "--positions", str(SLICE), "--passes", "1"]) == 0
    report = json.loads((copy / "audit.json").read_text())
    statuses = {check["name"]: check["status"] for check in report["checks"]}
    open_ = {"ttt score of the run", "script and artifact", "training clock", "evaluation clock"}
    assert {name for name, status in statuses.items() if status == "not checked"} == open_
    assert report["passed"] is False and "fail" not in statuses.values()
    assert "incomplete, 4 of 10" in capsys.readouterr().out


def test_a_slice_without_training_says_so(run):
    checks = checks_of(run, positions=250)
    for name in ("causal", "score before update"):
        assert checks[name].status == "not checked" and "--positions 512" in checks[name].evidence
    assert not failed(checks)


@pytest.mark.parametrize(("positions", "passes"), [(1, 1), (2, 3), (3, 1), (256, 3), (257, 1), (258, 3)])
def test_a_slice_of_any_length_fails_no_sound_artifact(run, finished, positions, passes):
    """One position has none before it; a chunk and one more have no loss between a training and a cut."""
    text = finished.validation.tokens[: positions + 1], finished.validation.byte_counts[:positions]
    case = audit.Case(finished.path, *text, finished.path.score(*text), random.Random(4), passes)
    wanted = "not checked" if positions < finished.path.hp.ttt_chunk_tokens + 2 else "pass"
    assert audit.check_causal(case).status == wanted
    assert audit.check_score_before_update(case).status == wanted
    assert audit.check_normalised(case).status == "pass"
    assert all(t <= positions for t in audit.random_cuts(case)) or positions == 1


def test_one_position_without_test_time_training_is_not_checked(copy):
    change_result(copy, lambda result: result["scored_with"]["changed"].update(ttt_enabled=False))
    checks = checks_of(copy, positions=1)
    assert checks["causal"].status == "not checked" and not failed(checks)
    assert checks_of(copy, positions=2)["causal"].status == "pass"


def test_a_short_text_is_not_told_to_be_longer(finished, honest):
    """Where the whole validation text ends one position after the first training, no option helps."""
    path = audit.ScoringPath(finished.blob, finished.path.hp, finished.world, 257, None)
    text = finished.validation.tokens[:258], finished.validation.byte_counts[:257]
    short = audit.Case(path, *text, honest.base, random.Random(4), 1)
    assert short.too_short().startswith("the first 257 positions") and "--positions" not in short.too_short()


@pytest.mark.parametrize("skip_sliding, name", [("0", "sliding"), ("1", "roundtrip")])
def test_a_run_without_test_time_training(copy, skip_sliding, name):
    def change(result):
        result["scored_with"]["changed"] |= {"ttt_enabled": False, "skip_sliding": skip_sliding == "1"}
        result["bpb"]["ttt"] = None

    change_result(copy, change)
    checks = checks_of(copy, positions=None)
    assert {check.status for check in checks.values()} == {"pass"}
    assert "nothing is trained" in checks["score before update"].evidence
    assert "difference" in checks[f"{name} score of the run"].evidence


def test_training_that_the_clock_stopped_is_repeated_as_it_was(copy):
    """The run trained on one chunk only: so does the audit, whatever time it has."""
    change_result(copy, lambda result: result["proofs"]["ttt"].update(untrained_from_chunk=1))
    checks = checks_of(copy, positions=None)
    assert "each of 1 chunks" in checks["score before update"].evidence
    assert failed(checks) == {"ttt score of the run"}  # this run's own score came from more training


# ----------------------------------------------------------------------------------------------------------
# Planted violations: the distribution
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead, name", [(1, "normalised"), (2, "causal"), (5, "causal")])
def test_a_model_that_peeks_is_caught(run, monkeypatch, ahead, name):
    """A little of a later place in the stream: of the target's own, or of one behind it."""
    hidden = tg.GPT.hidden

    def peeking(self, tokens, *segments):
        x = hidden(self, tokens, *segments)
        return torch.cat((x[:, :-ahead] + 0.02 * x[:, ahead:], x[:, -ahead:]), dim=1)

    monkeypatch.setattr(tg.GPT, "hidden", peeking)
    checks = checks_of(run)
    assert name in failed(checks) <= {"causal", "normalised"}  # what comes behind the target knows the target
    if name == "causal":
        assert "single windows" in checks[name].evidence
        assert "losses of tokens before" in checks[name].evidence


def test_training_on_the_future_is_caught(run, monkeypatch):
    """Training that reads one token more than was scored, hidden in the trainer itself."""
    train = tg.ChunkTrainer.train
    monkeypatch.setattr(
        tg.ChunkTrainer,
        "train",
        lambda self, tokens, first, end, *rest: train(self, tokens, first + 1, end + 1, *rest),
    )
    checks = checks_of(run)
    assert failed(checks) == {"score before update"}
    assert "not scored yet" in checks["score before update"].evidence


def test_text_that_changes_the_scores_before_it_is_caught(run, monkeypatch):
    """A temperature chosen on the whole text: causal within a window, and not over the pass."""
    evaluate = tg.evaluate_ttt

    def chosen(model, tokens, *args, **kwargs):
        low = 0.98 - 0.01 * float(tokens.double().mean()) / model.hp.vocab_size
        model.hp = dataclasses.replace(model.hp, ttt_temperature=low)
        return evaluate(model, tokens, *args, **kwargs)

    monkeypatch.setattr(tg, "evaluate_ttt", chosen)
    checks = checks_of(run)
    assert "causal" in failed(checks) and "single windows" not in checks["causal"].evidence


@pytest.mark.parametrize("kind", ["too sharp", "looks at the target"])
def test_probabilities_that_do_not_sum_to_one_are_caught(run, monkeypatch, kind):
    losses = tg.token_losses

    def wrong(model, tokens, targets, scored, *rest):
        nll = losses(model, tokens, targets, scored, *rest)
        return nll * 0.99 if kind == "too sharp" else nll - 0.01 * (targets[:, -scored:] % 2)

    monkeypatch.setattr(tg, "token_losses", wrong)
    checks = checks_of(run)
    assert failed(checks) == {"normalised"} and "sum to 1." in checks["normalised"].evidence


# ----------------------------------------------------------------------------------------------------------
# Planted violations: the order of things
# ----------------------------------------------------------------------------------------------------------


def train_first(model, tokens, byte_counts, world, log, score_fn, nll, trainer):
    """Test-time training as it must not be: a chunk is trained on, then scored."""
    hp, positions, total = model.hp, len(tokens) - 1, tg.Score()
    size, windows = hp.ttt_chunk_tokens, tg.sliding_windows(positions, hp.eval_seq_len, hp.eval_stride)
    chunks = -(-positions // size)
    for chunk in range(chunks):
        if chunk + 1 < chunks:
            trainer.train(tokens, chunk * size, (chunk + 1) * size, chunk, chunks)
        part = [window for window in windows if window[2] // size == chunk]
        total += tg.evaluate(model, tokens, byte_counts, part, world, 4096, hp.ttt_temperature, nll=nll)
    return total, {}


def test_training_before_scoring_is_caught(run, monkeypatch):
    monkeypatch.setattr(tg, "evaluate_ttt", train_first)
    checks = checks_of(run)
    assert failed(checks) == {"causal", "score before update"}
    evidence = checks["score before update"].evidence
    assert "when 0 positions are scored" in evidence and "changes" in evidence


def test_training_behind_the_audits_back_is_caught(run, monkeypatch):
    """A trainer of its own instead of the one that was handed over: what it does cannot be watched."""
    evaluate = tg.evaluate_ttt

    def hidden(*args, trainer, **kwargs):
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(tg, "evaluate_ttt", hidden)
    checks = checks_of(run)
    assert failed(checks) == {"score before update"}
    assert "changed without a training" in checks["score before update"].evidence


def test_scoring_again_after_training_is_caught(run, monkeypatch):
    """Two passes, of which the second counts."""
    evaluate = tg.evaluate_ttt

    def twice(model, *args, **kwargs):
        evaluate(model, *args, **kwargs)
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(tg, "evaluate_ttt", twice)
    checks = checks_of(run)
    assert {"causal", "score before update", "each position once"} <= failed(checks)
    assert f"{SLICE} positions were scored more than once" in checks["each position once"].evidence


def doubled_tail(positions, seq_len, stride):
    """Windows as #606 lays them out: those near the end are cut, and all score the last stride again."""
    windows = [(0, min(seq_len, positions), 0)]
    for start in range(stride, positions - stride + 1, stride):
        end = min(start + seq_len, positions)
        windows.append((start, end, end - stride))
    return windows


def lost_tail(positions, seq_len, stride):
    """Windows as #601 lays them out: full ones only."""
    full = [(s, s + seq_len, s + seq_len - stride) for s in range(stride, positions - seq_len + 1, stride)]
    return [(0, seq_len, 0), *full]


@pytest.mark.parametrize(
    "layout, words", [(doubled_tail, "scored more than once"), (lost_tail, "were not scored")]
)
@pytest.mark.parametrize("ttt", [True, False])
def test_a_wrong_tail_is_caught(copy, monkeypatch, layout, words, ttt):
    change_result(copy, lambda result: result["scored_with"]["changed"].update(ttt_enabled=ttt))
    monkeypatch.setattr(tg, "sliding_windows", layout)
    checks = counts_of(copy, positions=SLICE + 7)
    assert "each position once" in failed(checks)
    assert words in checks["each position once"].evidence


@pytest.mark.parametrize(
    "field, change, name",
    [
        ("nats", lambda nats: nats * 0.999, "each position once"),
        ("positions", lambda positions: positions + 64, "each position once"),
        ("bytes", lambda count: count + 1, "bytes"),
    ],
)
def test_a_score_that_is_not_the_sum_of_its_losses_is_caught(run, monkeypatch, field, change, name):
    evaluate = tg.evaluate_ttt

    def flattered(*args, **kwargs):
        score, proof = evaluate(*args, **kwargs)
        return dataclasses.replace(score, **{field: change(getattr(score, field))}), proof

    monkeypatch.setattr(tg, "evaluate_ttt", flattered)
    checks = counts_of(run)
    assert failed(checks) == {name} and field in checks[name].evidence


def test_a_pass_from_right_to_left_is_caught(copy, monkeypatch):
    """Each position once, and not in order."""
    change_result(copy, lambda result: result["scored_with"]["changed"].update(ttt_enabled=False))
    layout = tg.sliding_windows
    monkeypatch.setattr(tg, "sliding_windows", lambda *where: layout(*where)[::-1])
    checks = counts_of(copy)
    assert "each position once" in failed(checks)
    evidence = checks["each position once"].evidence
    assert (
        "out of order" in evidence and "were not scored" not in evidence and "more than once" not in evidence
    )


def test_tokens_that_are_not_the_shards_are_caught(run, monkeypatch):
    read = tg.read_split
    monkeypatch.setattr(
        tg, "read_split", lambda *where, **given: [part[: 16 * 40 + 1] for part in read(*where, **given)[:1]]
    )
    checks = counts_of(run)
    assert failed(checks) == {"each position once"} and "shards" in checks["each position once"].evidence


# ----------------------------------------------------------------------------------------------------------
# Planted violations: bytes
# ----------------------------------------------------------------------------------------------------------


def blanks_twice(table):
    table.bytes[table.space] += 1


def fallback_as_three(table):
    table.bytes[4:260] = 3


@pytest.mark.parametrize("plant", [blanks_twice, fallback_as_three])
def test_a_wrong_byte_table_is_caught(run, monkeypatch, plant):
    build = tg.ByteTable.__init__
    monkeypatch.setattr(tg.ByteTable, "__init__", lambda self, sp: (build(self, sp), plant(self))[0])
    monkeypatch.setattr(tg, "check_tokenizer", lambda *_: None)
    checks = counts_of(run)
    assert failed(checks) == {"bytes"} and "the byte table is wrong" in checks["bytes"].evidence
    if plant is blanks_twice:
        assert "positions are charged other bytes" in checks["bytes"].evidence


def test_a_rule_that_is_wrong_twice_is_caught(run, monkeypatch):
    """Table and second rule agree on a blank too many; decoded text does not."""
    build, read = tg.ByteTable.__init__, audit.ByteRule.of

    def misread(processor):
        rule = read(processor)
        rule.size += rule.blank
        return rule

    monkeypatch.setattr(tg.ByteTable, "__init__", lambda self, sp: (build(self, sp), blanks_twice(self))[0])
    monkeypatch.setattr(tg, "check_tokenizer", lambda *_: None)
    monkeypatch.setattr(audit.ByteRule, "of", misread)
    checks = counts_of(run)
    assert failed(checks) == {"bytes"} and "not those of the decoded text" in checks["bytes"].evidence


@pytest.fixture
def beside(finished, honest):
    """A case whose bytes a sidecar counts; the sidecar, as the file holds it."""
    tokens = honest.tokens.numpy()
    sidecar = np.where(tokens == 1, 0, tokens % 7).astype(np.int32)
    counts = torch.from_numpy(sidecar[1:])
    base = SimpleNamespace(score=finished.path.score(honest.tokens, counts).score)
    return dataclasses.replace(honest, byte_counts=counts, base=base), sidecar


def test_bytes_of_a_sidecar_are_recounted_from_the_file(beside, finished, tmp_path):
    """By a reader that takes no sidecar for a shard and no shard for a sidecar."""
    case, sidecar = beside
    for number, (start, end) in enumerate([(0, 300), (300, None)]):
        write_shard(tmp_path / f"fineweb_val_{number:06d}.bin", case.tokens[start:end])
        write_shard(tmp_path / f"fineweb_val_bytes_{number:06d}.bin", sidecar[start:end])
    assert audit.read_validation(str(tmp_path)).tolist() == case.tokens.tolist()
    found = audit.read_validation(str(tmp_path), "val_bytes")
    assert found.tolist() == sidecar.tolist()
    processor = finished.validation.table.processor
    check = audit.check_sidecar(case, found, processor)
    assert check.status == "pass" and f"{sidecar[1:].sum():,} bytes by fineweb_val_bytes" in check.evidence
    table = tg.ByteTable(processor).count(case.tokens[:-1], case.tokens[1:])
    assert f"the transformed text have {int(table.sum()):,}" in check.evidence


@pytest.mark.parametrize("plant", ["one place", "off by one", "document"])
def test_bytes_other_than_the_sidecar_says_are_caught(beside, finished, plant):
    case, sidecar = beside
    processor, word = finished.validation.table.processor, "other bytes than fineweb_val_bytes"
    if plant == "one place":
        sidecar = sidecar + (np.arange(len(sidecar)) == 9)
    elif plant == "off by one":
        sidecar = np.roll(sidecar, 1)
    else:
        first = int(np.flatnonzero(case.tokens[1:].numpy() == 1)[0]) + 1
        sidecar, word = sidecar + (np.arange(len(sidecar)) == first), "charges 1 targets that begin"
    check = audit.check_sidecar(case, sidecar, processor)
    assert check.status == "fail" and word in check.evidence


def test_an_audit_takes_the_sidecar_that_lies_beside_the_shards(copy, tmp_path, tiny):
    data = tmp_path / "data"
    shutil.copytree(audit.read_result(copy / "artifact.bin")["data_path"], data)
    tokens = audit.read_validation(str(data))
    write_shard(data / "fineweb_val_bytes_000000.bin", np.where(tokens == 1, 0, 5))
    (copy / "result.json").unlink()
    env = tiny | SMALLER
    done = audit.audit(copy / "artifact.bin", {"DATA_PATH": str(data)}, SLICE, passes=1, seed=4, env=env)
    checks = {check.name: check for check in done}
    assert checks["bytes"].status == checks["each position once"].status == "pass"
    assert "by fineweb_val_bytes_*.bin" in checks["bytes"].evidence


def test_bytes_that_are_not_those_of_the_text_are_caught(tiny):
    """The second rule is itself held against decoded text."""
    processor = tg.load_tokenizer(tiny["TOKENIZER_PATH"], 512)
    rule = audit.ByteRule.of(processor)
    texts = ["naïve façade 🚀 Привет", "one more"]
    ids = np.array([token for text in texts for token in (1, *processor.encode(text))], np.int32)
    counted = rule.count(ids[:-1], ids[1:])
    assert counted.sum() == sum(len(text.encode()) for text in texts)
    faults, evidence = audit.decoded_faults(processor, rule, ids, counted)
    assert not faults and "2 documents" in evidence
    longer = np.concatenate((ids, ids, ids))
    more = rule.count(longer[:-1], longer[1:])
    more[len(ids) + 3] += 2
    assert "in 1 of 6 documents" in audit.decoded_faults(processor, rule, longer, more)[0][0]


# ----------------------------------------------------------------------------------------------------------
# Planted violations: what the run says of itself
# ----------------------------------------------------------------------------------------------------------


def quick(folder):
    """The checks that read nothing but the two files."""
    blob = (folder / "artifact.bin").read_bytes()
    result = audit.read_result(folder / "artifact.bin")
    checks = [
        audit.check_size(blob),
        audit.check_identity(blob, result),
        audit.check_clock("training", result, "ttt"),
        audit.check_clock("evaluation", result, "ttt"),
    ]
    return {check.name: check for check in checks}


def test_an_artifact_over_the_cap_is_caught(copy, monkeypatch):
    assert not failed(quick(copy))
    room = 16_000_000 - audit.SCRIPT.stat().st_size
    assert audit.check_size(bytes(room)).status == "pass"
    assert audit.check_size(bytes(room + 1)).status == "fail"
    monkeypatch.setattr(audit, "CAP", 100_000)
    checks = quick(copy)
    assert failed(checks) == {"size"} and "of 100,000 B" in checks["size"].evidence


@pytest.mark.parametrize(
    "clock, change, words",
    [
        ("training", lambda b: (b["counted"].update(train=601.0), b.update(used=602.0)), "of 600 s"),
        ("evaluation", lambda b: (b["counted"].update(ttt=600.0), b.update(used=600.5)), "of 600 s"),
        ("training", lambda b: b.update(used=b["used"] - 0.5), "add up to"),
        ("training", lambda b: b["uncounted"].update(calibrate=b["counted"].pop("calibrate")), "left out"),
        *[
            ("training", lambda b, phase=phase: b["counted"].pop(phase), "not on the clock")
            for phase in ("train", "average and proofs", "calibrate", "quantise and pack")
        ],
        *[
            ("evaluation", lambda b, phase=phase: b["counted"].pop(phase), "not on the clock")
            for phase in ("load", "roundtrip", "ttt")
        ],
    ],
)
def test_an_exceeded_or_shortened_clock_is_caught(copy, clock, change, words):
    change_result(copy, lambda result: change(result["budget"][clock]))
    checks = quick(copy)
    assert failed(checks) == {f"{clock} clock"} and words in checks[f"{clock} clock"].evidence


@pytest.mark.parametrize("limit", [0.0, 1e6])
def test_the_clock_is_the_challenges_whatever_the_run_allowed_itself(copy, limit):
    def change(result):
        budget = result["budget"]["training"]
        budget["counted"]["train"] += 700
        budget |= {"limit": limit, "used": budget["used"] + 700, "within": True}

    change_result(copy, change)
    assert failed(quick(copy)) == {"training clock"}


@pytest.mark.parametrize("key", ["script_sha256", "scored_artifact_sha256"])
def test_a_result_of_other_files_is_caught(copy, key):
    change_result(copy, lambda result: result.update({key: "0" * 64}))
    assert failed(quick(copy)) == {"script and artifact"}


def test_other_byte_counts_are_caught(copy):
    change_result(copy, lambda result: result["artifact"].update(code_bytes=70_000))
    assert "code_bytes 70,000" in quick(copy)["script and artifact"].evidence


def test_a_flattered_result_is_caught(finished, honest):
    """A lower score, other bytes, other tokens than those that were scored."""
    whole, result = honest.positions, finished.result
    assert audit.check_score(honest, result, whole).status == "pass"
    lower = {"bpb": result["bpb"] | {"ttt": result["bpb"]["ttt"] - 0.001}}
    for change, words in (
        (lower, "+1.0e-03"),
        ({"val_bytes": result["val_bytes"] + 9}, "val_bytes is"),
        ({"val_tokens": result["val_tokens"] - 64}, "val_tokens is"),
    ):
        check = audit.check_score(honest, result | change, whole)
        assert check.status == "fail" and words in check.evidence


def test_a_result_that_says_nothing_is_not_checked(copy):
    path = copy / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({key: result[key] for key in ("preset", "changed", "dtype")}))
    statuses = {name: check.status for name, check in quick(copy).items()}
    assert statuses.pop("size") == "pass" and set(statuses.values()) == {"not checked"}


def test_a_failure_is_the_exit_status(copy, capsys):
    change_result(copy, lambda result: result.update(script_sha256="0" * 64))
    arguments = [str(copy / "artifact.bin"), "--positions", "250", "--passes", "1", "--seed", "3"]
    assert audit.main(arguments) == 1
    report = json.loads((copy / "audit.json").read_text())
    assert report["passed"] is False and report["seed"] == 3 and report["positions"] == 250
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "audit: FAILED, 1 of 10 checks"
    assert all(len(line) <= 110 for line in out.splitlines()[1:])


def test_techniques_instead_of_checks(copy, capsys):
    """A table, and the numbers in a file that the other programs read; no audit."""
    assert audit.main([str(copy / "artifact.bin"), "--techniques"]) == 0
    report = json.loads((copy / "techniques.json").read_text())
    blob = (copy / "artifact.bin").read_bytes()
    assert report["artifact_sha256"] == hashlib.sha256(blob).hexdigest()
    found = report["techniques"]
    assert {"smear", "xsa", "value_residual", "skips"} <= found.keys()
    assert audit.techniques_table(found) in capsys.readouterr().out
    effects = {name: each["loss_without"] - each["loss"] for name, each in found.items()}
    assert Run.open(copy).techniques == effects and all(effects.values())
    assert not (copy / "audit.json").exists()


# ----------------------------------------------------------------------------------------------------------
# Mistakes
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake", ["no artifact", "damaged", "no data", "no tokenizer", "foreign data", "no result"]
)
@pytest.mark.parametrize("options", [[], ["--techniques"]])
def test_a_mistake_gets_one_line(copy, capsys, mistake, options):
    arguments = [str(copy / "artifact.bin"), *options]
    if mistake == "no artifact":
        arguments, word = [str(copy / "gone.bin"), *options], "gone.bin"
    elif mistake == "damaged":
        (copy / "artifact.bin").write_bytes((copy / "artifact.bin").read_bytes()[:-9])
        word = "artifact"
    elif mistake == "no data":
        arguments, word = [*arguments, "--data", str(copy)], "fineweb_val"
    elif mistake == "no tokenizer":
        arguments, word = [*arguments, "--tokenizer", str(copy / "none.model")], "none.model"
    elif mistake == "foreign data":
        write_shard(copy / "fineweb_val_000000.bin", [1, 5, 600] * 500)
        arguments, word = [*arguments, "--data", str(copy)], "600"
    else:
        (copy / "result.json").write_text("{")
        word = "result.json"
    assert audit.main(arguments) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("audit: ")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0]
    assert not (copy / "audit.json").exists() and not (copy / "techniques.json").exists()


@pytest.mark.parametrize(
    "option, value",
    [("--positions", 0), ("--positions", -1), ("--passes", 0), ("--passes", 1001), ("--seed", 2**70)],
)
def test_nothing_can_be_said_of_no_positions_or_passes(copy, capsys, option, value):
    assert audit.main([str(copy / "artifact.bin"), f"{option}={value}"]) == 1
    err = capsys.readouterr().err
    assert option in err and len(err.splitlines()) == 1 and not (copy / "audit.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda result: result.update(proofs=None),
        lambda result: result["scored_with"].pop("changed"),
        lambda result: result["scored_with"].update(dtype="float8"),
        lambda result: result["budget"]["training"]["counted"].update(train="1"),
        lambda result: result["proofs"]["ttt"].update(untrained_from_chunk=-1),
    ],
)
def test_a_result_of_wrong_types_gets_one_line(copy, capsys, change):
    change_result(copy, change)
    assert audit.main([str(copy / "artifact.bin")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {copy}/result.json is not a run's result")
    assert err.endswith("move it away to audit without it\n") and len(err.splitlines()) == 1


def test_the_settings_are_the_runs(run):
    """Those of result.json; of the environment only where the audit runs."""
    result = audit.read_result(run / "artifact.bin")
    env = {"DEVICE": "cpu", "EVAL_STRIDE": "1", "PRESET": "pr601", "TTT_LR": "9"}
    hp = audit.run_settings(result, env, {"DATA_PATH": "elsewhere"})
    assert (hp.preset, hp.eval_stride, hp.ttt_chunk_tokens, hp.dtype) == ("smoke", 8, 256, "fp32")
    assert (hp.device, hp.data_path, hp.stages, hp.run_id) == ("cpu", "elsewhere", "evaluate", "")
    assert hp.ve_layers == (1,) and hp.ttt_lr == tg.PRESETS["smoke"]["ttt_lr"]
    alone = audit.run_settings({}, {"PRESET": "smoke", "EVAL_STRIDE": "32", "STAGES": "train"}, {})
    assert (alone.eval_stride, alone.stages) == (32, "evaluate")
