"""The audit of a score by documents: a clean artifact passes, each planted violation fails its check."""

import sys

import pytest
import torch
from conftest import ROOT, random_model, result_of, run_here

import train_gpt as tg

sys.path.insert(0, str(ROOT / "records"))
import audit  # noqa: E402


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """An artifact of random weights and the settings that score it."""
    env = {name: tiny[name] for name in ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE")} | {
        "PRESET": "pr1855_smoke", "MODEL_DIM": "32", "ROPE_DIMS": "8", "TRAIN_SEQ_LEN": "32", "DTYPE": "fp32",
        "TRAIN_SEQ_SCHEDULE": "16@0.1", "TRAIN_BATCH_TOKENS": "256", "EVAL_SEQ_LEN": "32", "DEVICE": "cpu",
        "EVAL_STRIDE": "8", "TTT_LORA_RANK": "4", "TTT_CHUNKS": "inf:8", "TTT_CONTEXT": "32",
        "TTT_FRESH": "4", "TTT_CHUNK_TOKENS": "64", "CANONICAL_MASK": "1", "STAGES": "evaluate",
    }  # fmt: skip
    hp = tg.Hyperparameters.from_env(env)
    model = random_model(hp, seed=3, spread=0.2)
    path = tmp_path_factory.mktemp("audited") / "artifact.bin"
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    path.write_bytes(tg.pack(tg.artifact_config(hp, {}), weights))
    return path, env


@pytest.mark.parametrize("mode", ["documents", "chunks"])
def test_the_settings_switch_mask_and_documents_on(finished, tmp_path, mode):
    """Through the command line: the mask lowers every score, learning the last one; result.json says both."""
    path, env = finished
    env = env | {
        "ARTIFACT": str(path),
        "TTT_MODE": mode,
        "COMPILE": "0",
        "TTT_EPOCHS": "1",
        "TTT_LR": "0.001",
    }
    env |= {"TTT_TEMPERATURE": "1", "SKIP_SLIDING": "1"}
    if mode == "chunks":
        env |= {"ARTIFACT": str(unsegmented(tmp_path, env)), "DOCUMENT_MASK": "0"}
    found = {}
    for name, changes in (("masked", {}), ("plain", {"CANONICAL_MASK": "0"}), ("still", {"TTT_LR": "0"})):
        assert run_here(tmp_path, env | changes | {"RUN_ID": name}) == 0
        found[name] = result_of(tmp_path, name)
    masked, plain, still = (found[name]["bpb"] for name in ("masked", "plain", "still"))
    assert masked["roundtrip"] < plain["roundtrip"] - 1e-4 and masked["roundtrip"] == still["roundtrip"]
    assert masked["ttt"] < plain["ttt"] - 1e-4 and masked["ttt"] != still["ttt"]
    rows = found["masked"]["by_length"].values()
    assert sum(row["positions"] for row in rows) == found["masked"]["val_tokens"]
    assert found["masked"]["proofs"].keys() == {"documents" if mode == "documents" else "ttt"}


def unsegmented(folder, env):
    """The same artifact's weights, of a model without DOCUMENT_MASK."""
    hp = tg.Hyperparameters.from_env(env | {"DOCUMENT_MASK": "0", "ARTIFACT": ""})
    model = random_model(hp, seed=3, spread=0.2)
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    (folder / "other.bin").write_bytes(tg.pack(tg.artifact_config(hp, {}), weights))
    return folder / "other.bin"


def checks_of(finished, positions=416):
    path, env = finished
    return {check.name: check for check in audit.audit(path, {}, positions, passes=2, seed=0, env=env)}


def failed(checks):
    return {name for name, check in checks.items() if check.status == audit.FAIL}


def test_a_clean_artifact_passes(finished):
    checks = checks_of(finished)
    assert not failed(checks)
    for name in ("causal", "normalised", "canonical mask", "score before update", "each position once"):
        assert checks[name].status == audit.PASS, checks[name]


def test_an_adapter_carried_over_is_caught(finished, monkeypatch):
    class Carried(tg.DocumentAdapters):
        last = None

        def __init__(self, model, documents):
            super().__init__(model, documents)
            if Carried.last is not None:
                with torch.no_grad():
                    for key, pair in self.pairs.items():
                        for ours, theirs in zip(pair, Carried.last[key], strict=True):
                            ours.copy_(theirs[:1])
            Carried.last = self.pairs

    monkeypatch.setattr(tg, "DocumentAdapters", Carried)
    batches = tg.document_batches
    monkeypatch.setattr(tg, "document_batches", lambda hp, tokens, most: batches(hp, tokens, 1))
    assert {"causal", "score before update"} & failed(checks_of(finished))


def test_a_step_before_scoring_is_caught(finished, monkeypatch):
    losses = tg.token_losses

    def trained_first(model, tokens, targets, scored, *options, document=None):
        if document is not None and torch.is_grad_enabled():
            kept = dict(document.kept)
            losses(model, tokens, targets, scored, *options, document=document).sum().backward()
            document.optimiser.step()
            document.optimiser.zero_grad()
            document.kept = kept
        return losses(model, tokens, targets, scored, *options, document=document)

    monkeypatch.setattr(tg, "token_losses", trained_first)
    assert "causal" in failed(checks_of(finished))


def test_chunks_that_overlap_are_caught(finished, monkeypatch):
    batches = tg.document_batches

    def overlapping(hp, tokens, most):
        (chunk, part), *rest = batches(hp, tokens, most)
        (start, end, length), *others = part
        return [(chunk, [(start, end, length), *others, (start, end, length)]), *rest]

    monkeypatch.setattr(tg, "document_batches", overlapping)
    checks = checks_of(finished)
    assert "each position once" in failed(checks)
    assert "more than once" in checks["each position once"].evidence


def test_a_mask_that_looks_at_the_target_is_caught(finished, monkeypatch):
    losses = tg.token_losses

    def peeking(*given, **options):
        p = (-losses(*given, **options)).exp()
        return -(p / (p + (1 - p) / 2)).log()  # half of all others are forbidden

    monkeypatch.setattr(tg, "token_losses", peeking)
    assert "canonical mask" in failed(checks_of(finished))
