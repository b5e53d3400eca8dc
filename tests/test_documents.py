"""Scoring by documents: adapters that learn one document, cached context, and the canonical mask."""

import math
import random

import numpy as np
import pytest
import torch
from conftest import random_model

import train_gpt as tg

BASE = {
    "PRESET": "pr1855_smoke", "DTYPE": "fp32", "DEVICE": "cpu", "VOCAB_SIZE": "48", "NUM_LAYERS": "4",
    "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "MLP_MULT": "2", "ROPE_DIMS": "8",
    "LOOP_START": "1", "LOOP_END": "1", "PARALLEL_START_LAYER": "2", "TRAIN_SEQ_LEN": "32",
    "TRAIN_SEQ_SCHEDULE": "16@0.1", "TRAIN_BATCH_TOKENS": "256", "EVAL_SEQ_LEN": "32", "EVAL_STRIDE": "8",
    "TTT_LORA_RANK": "4", "TTT_LR": "0.0005", "TTT_CHUNKS": "40:4,inf:8", "TTT_CONTEXT": "32",
    "TTT_FRESH": "8", "TTT_CHUNK_TOKENS": "64",
}  # fmt: skip
# Boundaries of every kind: before the first BOS, of one token, of a whole chunk, of more than the context.
LENGTHS = (5, 24, 1, 41, 8, 90, 33, 40, 2, 64)


def settings(**changes):
    return tg.Hyperparameters.from_env(BASE | {name.upper(): str(value) for name, value in changes.items()})


def some_documents(lengths=LENGTHS, seed=0):
    """Their tokens (length,) int32; all but the first begin with BOS."""
    draw = torch.Generator().manual_seed(seed)
    found = [torch.randint(2, 48, (n,), generator=draw, dtype=torch.int32) for n in lengths]
    for document in found[1:]:
        document[0] = tg.BOS
    return found


def joined(documents):
    """As a split: its last target begins a document that is not scored."""
    return torch.cat((*documents, torch.tensor([tg.BOS], dtype=torch.int32)))


def score(hp, tokens, world=None, model=None, dtype=torch.float64, **options):
    """Score, losses of all positions, proof; in float64, where nothing hides behind rounding."""
    model = model or random_model(hp, seed=3, spread=0.3).to(dtype)
    nll = torch.full((len(tokens) - 1,), math.nan)
    counts = torch.arange(len(tokens) - 1) % 5
    world = world or tg.World(hp, {})
    found, proof = tg.evaluate_documents(model, tokens, counts, world, tg.RunLog(None), nll=nll, **options)
    return found, nll, proof


def parts(nll, lengths=LENGTHS):
    return nll.split(list(lengths))


# ----------------------------------------------------------------------------------------------------------
# Every position once, and what it depends on
# ----------------------------------------------------------------------------------------------------------


def test_every_position_is_scored_once():
    tokens = joined(some_documents())
    found, nll, proof = score(settings(), tokens)
    assert found.positions == len(tokens) - 1 and nll.isfinite().all()
    assert found.nats == pytest.approx(nll.double().sum().item(), rel=1e-6)
    assert found.bytes == int((torch.arange(len(tokens) - 1) % 5).sum())
    assert proof["documents"] == len(LENGTHS) and proof["untrained_documents"] == 0 and proof["steps"] > 10


@pytest.mark.parametrize("preset", ["pr1855_smoke", "smoke"])
@pytest.mark.parametrize("fresh", [0, 3, 8, 4096])
def test_without_a_learning_rate_kept_keys_and_values_change_nothing(fresh, preset):
    """Each document by itself, in one forward pass; of smoke too, whose embeddings read the token before."""
    changes = {} if preset != "smoke" else {"ve_layers": "1", "num_layers": 3, "bigram_vocab_size": 64}
    hp = settings(preset=preset, ttt_mode="documents", ttt_temperature=1, ttt_lr=0, ttt_context=4096,
                  ttt_fresh=fresh, **changes)  # fmt: skip
    model, documents = random_model(hp, seed=3, spread=0.3).double(), some_documents()
    _, nll, proof = score(hp, tokens := joined(documents), model=model)
    at = 0
    for document, losses in zip(documents, parts(nll), strict=True):
        text = tokens[at : at + len(document) + 1].long()
        with torch.no_grad():
            wanted = tg.token_losses(model, text[None, :-1], text[None, 1:], len(document))[0]
        assert torch.allclose(losses.double(), wanted, rtol=1e-5, atol=1e-6)
        at += len(document)
    assert proof["steps"] == 0


def test_the_context_ends_where_it_says():
    """A token further back than TTT_CONTEXT is not seen; one within is."""
    one_layer = {"num_layers": 1, "num_loops": 0, "parallel_start_layer": 0, "ttt_freeze_blocks": 0}
    hp = settings(ttt_lr=0, ttt_chunks="inf:8", ttt_context=32, **one_layer)
    (document,) = some_documents([96])
    for changed, seen in ((64 - 1, True), (47, False)):
        other = document.clone()
        other[changed] = (other[changed] + 1) % 46 + 2
        before, after = (score(hp, joined([each]))[1] for each in (document, other))
        assert torch.equal(before[80:88], after[80:88]) != seen


def test_learning_lowers_the_loss_of_a_document_that_repeats_itself():
    document = some_documents([8])[0].repeat(20)
    document[0] = tg.BOS
    with_, without = (score(settings(ttt_lr=lr), joined([document]))[0].val_loss for lr in (5e-4, 0))
    assert with_ < without - 0.05


def test_order_batch_and_neighbours_change_nothing():
    documents = some_documents()
    base = parts(score(settings(), joined(documents))[1])
    for most in (1, 50, 10_000):
        again = parts(score(settings(), joined(documents), most=most)[1])
        assert all(torch.allclose(a, b, atol=1e-5, rtol=0) for a, b in zip(base, again, strict=True))
    order = [0, *random.Random(1).sample(range(1, len(documents)), len(documents) - 1)]
    moved = [documents[i] for i in order]
    again = score(settings(), joined(moved))[1].split([len(each) for each in moved])
    assert all(torch.allclose(base[i], a, atol=1e-5, rtol=0) for i, a in zip(order, again, strict=True))


def test_ranks_share_the_documents_and_change_nothing():
    hp, tokens = settings(), joined(some_documents())
    whole = score(hp, tokens, most=50)[1]
    shares = []
    for rank in range(3):
        world = tg.World(hp, {})
        world.rank, world.size = rank, 3
        nll = torch.full((len(tokens) - 1,), math.nan)
        model = random_model(hp, seed=3, spread=0.3).double()
        with pytest.raises(RuntimeError, match=f"of {len(tokens) - 1} positions"):  # the others never report
            tg.evaluate_documents(
                model, tokens, torch.zeros(len(nll)), world, tg.RunLog(None), nll=nll, most=50
            )
        shares.append(nll)
    there = torch.stack([share.isfinite() for share in shares])
    assert (there.sum(0) == 1).all() and there.any(1).all()
    assert torch.allclose(torch.stack(shares).nan_to_num(0.0).sum(0), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("place", [3, 17, 60, 89])
def test_a_token_changes_nothing_before_it_and_no_other_document(place):
    documents = some_documents()
    base = parts(score(settings(), joined(documents))[1])
    documents[5][place] = (documents[5][place] + 1) % 46 + 2
    again = parts(score(settings(), joined(documents))[1])
    for i, (a, b) in enumerate(zip(base, again, strict=True)):
        assert torch.equal(a, b) == (i != 5)
    assert torch.equal(base[5][: place - 1], again[5][: place - 1])
    assert not torch.equal(base[5][place - 1 :], again[5][place - 1 :])


class Noisy(tg.DocumentAdapters):
    """From a step on, trains on the losses with the sign turned."""

    turned = 2

    def learn(self, losses, weights):
        super().learn(-losses if self.steps >= self.turned else losses, weights)


def test_training_changes_later_chunks_only():
    hp, tokens = settings(ttt_chunks="inf:8"), joined(some_documents([80]))
    base, other = score(hp, tokens)[1], score(hp, tokens, adapters=Noisy)[1]
    border = (Noisy.turned + 1) * 8
    assert torch.equal(base[:border], other[:border]) and not torch.equal(base[border:], other[border:])


def test_the_last_chunk_of_a_document_is_not_trained():
    _, _, proof = score(settings(ttt_chunks="inf:8"), joined(some_documents([8])))
    assert proof["steps"] == 0
    _, _, proof = score(settings(ttt_chunks="inf:8"), joined(some_documents([9])))
    assert proof["steps"] == 1


def test_a_short_clock_stops_training_and_never_scoring():
    hp, tokens = settings(), joined(some_documents())
    found, nll, proof = score(hp, tokens, seconds=1e-9)
    assert nll.isfinite().all() and proof["steps"] <= 1 and proof["untrained_documents"] >= len(LENGTHS) - 1
    assert found.positions == len(tokens) - 1


def test_gain_by_length_adds_up():
    hp, tokens = settings(), joined(some_documents())
    counts = torch.ones(len(tokens) - 1, dtype=torch.int32)
    nll = score(hp, tokens)[1]
    table = tg.by_length(tokens, counts, tg.World(hp, {}), ttt=nll, plain=torch.zeros(len(nll)))
    assert sum(row["documents"] for row in table.values()) == len(LENGTHS)
    assert table["8..15"] == {"documents": 1, "positions": 8, "plain": 0.0, "ttt": pytest.approx(
        parts(nll)[4].double().sum().item() / math.log(2) / 8)}  # fmt: skip
    whole = sum(row["ttt"] * row["positions"] for row in table.values())
    assert whole * math.log(2) == pytest.approx(nll.double().sum().item())


# ----------------------------------------------------------------------------------------------------------
# The canonical mask
# ----------------------------------------------------------------------------------------------------------


def test_the_mask_forbids_nothing_that_the_encoder_emits(tiny):
    """Random pairs between two characters that merge with nothing, and the corpus itself."""
    processor = tg.load_tokenizer(tiny["TOKENIZER_PATH"], int(tiny["VOCAB_SIZE"]))
    never, rng, wall = tg.canonical_mask(processor), random.Random(0), "\u2603"
    for split in ("train", "val"):
        for shard in tg.read_split(tiny["DATA_PATH"], split):
            assert not never[shard[:-1], shard[1:]].any()
    kinds = processor.is_control, processor.is_unknown, processor.is_byte, processor.is_unused
    plain = [i for i in range(processor.get_piece_size()) if not any(kind(i) for kind in kinds)]
    head, tail = processor.encode(wall), processor.encode(wall + wall)
    tail = tail[len(head) :]
    forbidden = 0
    for _ in range(20_000):
        a, b = rng.choice(plain), rng.choice(plain)
        text = (processor.id_to_piece(a) + processor.id_to_piece(b)).replace("\u2581", " ")
        emitted = processor.encode(wall + text + wall)[len(head) : -len(tail)] == [a, b]
        assert not (emitted and never[a, b]), (a, b)
        forbidden += bool(never[a, b])
    assert forbidden > 20, "of 20,000 pairs"
    special = sorted({*range(processor.get_piece_size())} - {*plain})
    assert not never[special].any() and not never[:, special].any()


def masked(hp, share=0.1):
    model = random_model(hp, seed=3, spread=0.3)
    never = torch.rand(48, 48, generator=torch.Generator().manual_seed(1)) < share
    never[:, : tg.BOS + 1] = False
    return model, never


def test_masked_tokens_get_no_probability_and_the_rest_sums_to_one():
    """In the scorer and in the loss that TTT trains on, whose gradient reaches no masked logit."""
    model, never = masked(settings())
    tokens, targets = torch.full((1, 6), 5), torch.arange(48)
    model.never = never
    every = tokens.expand(48, 6), torch.cat((tokens.expand(48, 6)[:, 1:], targets[:, None]), 1)
    with torch.no_grad():
        p = (-tg.token_losses(model, *every, 1)[:, 0]).exp()
    assert (
        p.sum().item() == pytest.approx(1, abs=1e-5) and (p[never[5]] == 0).all() and (p[~never[5]] > 0).all()
    )
    allowed = int((~never[5]).nonzero()[3])
    y = torch.full_like(tokens, allowed)
    loss = model(tokens, y)
    with torch.no_grad():
        assert loss.item() == pytest.approx(tg.token_losses(model, tokens, y, 6).mean().item(), rel=1e-5)
    weights = dict(model.named_parameters())
    for p in weights.values():
        p.grad = None
    loss.backward()
    ours = model.tok_emb.weight.grad.clone()
    model.zero_grad()
    tg.token_losses(model, tokens, y, 6).mean().backward()
    assert torch.allclose(ours, model.tok_emb.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_realised_masked_token_is_an_error_and_training_text_is_checked(tiny):
    hp, tokens = settings(), joined(some_documents())
    model, never = masked(hp, share=0.0)
    model.never = never
    score(hp, tokens, model=model.double())
    never[int(tokens[2]), int(tokens[3])] = True
    with pytest.raises(tg.UserError, match="CANONICAL_MASK forbids a token"):
        score(hp, tokens, model=model)
    shard = np.array([4, 5, 6], np.uint16)
    tg.check_mask(np.zeros((48, 48), bool), [shard])
    with pytest.raises(tg.UserError, match="forbids 2 of 3 training tokens"):
        tg.check_mask(np.ones((48, 48), bool), [shard])
