"""Windows and scores against plain loops."""

import copy
import dataclasses
import functools
import math
import random
import types

import numpy as np
import pytest
import torch
from conftest import random_model
from reference import reference_bytes, reference_sliding

import train_gpt as tg

# ----------------------------------------------------------------------------------------------------------
# Windows
# ----------------------------------------------------------------------------------------------------------


def some_layouts(count=600):
    """(positions, seq_len, stride): corners first, then random ones."""
    layouts = [(1, 1, 1), (1, 8, 8), (7, 8, 8), (8, 8, 8), (9, 8, 8), (9, 8, 1), (64, 8, 8), (65, 8, 3)]
    rng = random.Random(0)
    while len(layouts) < count:
        seq_len = rng.randint(1, 64)
        layouts.append((rng.randint(1, 400), seq_len, rng.randint(1, seq_len)))
    return layouts


def test_sliding_windows_score_every_position_once():
    for layout in some_layouts():
        positions, seq_len, stride = layout
        windows = tg.sliding_windows(positions, seq_len, stride)
        scored = [i for start, end, first in windows for i in range(first, end)]
        assert scored == list(range(positions)), layout
        for start, end, first in windows:
            assert 0 <= start <= first < end <= positions, layout
            assert end - start <= seq_len, layout
            assert start == 0 or first - start >= seq_len - stride, layout


def test_sliding_windows_are_as_few_as_can_be():
    """A full window, then one per stride: fewer cannot keep the context, more cost time."""
    for layout in some_layouts():
        positions, seq_len, stride = layout
        needed = 1 + max(0, math.ceil((positions - seq_len) / stride))
        assert len(tg.sliding_windows(positions, seq_len, stride)) == needed, layout


def test_sliding_windows_by_hand():
    assert tg.sliding_windows(12, 6, 3) == [(0, 6, 0), (3, 9, 6), (6, 12, 9)]
    assert tg.sliding_windows(12, 4, 4) == [(0, 4, 0), (4, 8, 4), (8, 12, 8)]
    assert tg.sliding_windows(5, 8, 2) == [(0, 5, 0)] and tg.sliding_windows(0, 8, 2) == []


# ----------------------------------------------------------------------------------------------------------
# A model that is known by heart
# ----------------------------------------------------------------------------------------------------------

SEQ_LEN = 16
HP = tg.Hyperparameters.from_env({
    "DTYPE": "fp32", "DEVICE": "cpu", "NUM_LAYERS": "3", "MODEL_DIM": "32", "NUM_HEADS": "2",
    "NUM_KV_HEADS": "2", "VOCAB_SIZE": "64", "TRAIN_SEQ_LEN": "16", "EVAL_SEQ_LEN": f"{SEQ_LEN}",
    "EVAL_STRIDE": "4", "ROPE_NTK_REFERENCE": "8", "XSA_LAST_N": "3", "VE_LAYERS": "2",
    "BIGRAM_VOCAB_SIZE": "40"})  # fmt: skip


def a_world(rank=0, size=1, dtype=torch.float32):
    """One process of `size` that never talk to each other."""
    world = tg.World(HP, {})
    world.rank, world.size, world.dtype = rank, size, dtype
    return world


class Digits:
    """A model whose loss of target t after token p is known by heart: logits are -|v - 3 p mod V|.

    It remembers how many places are read, and how many go through the output layer.
    """

    read, put_out, hp = 0, 0, HP

    never = None

    def hidden(self, tokens, segments=None, document=None):
        self.read += tokens.numel()
        return tokens.float().unsqueeze(-1)

    def logits(self, hidden, document=None):
        self.put_out += hidden.shape[:2].numel()
        return -(torch.arange(16.0) - (3 * hidden) % 16).abs()

    @staticmethod
    def nats(tokens):
        previous, target = tokens[:-1].numpy(), tokens[1:].numpy()
        logits = -np.abs(np.arange(16.0) - (3 * previous[:, None]) % 16)
        return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(target)), target]


def numbers(positions):
    """Tokens below 16 and the bytes that each target counts, uint8 as a run holds them."""
    rng = np.random.default_rng(positions)
    tokens, byte_counts = (
        rng.integers(0, 16, positions + 1, np.int32),
        rng.integers(0, 256, positions, np.uint8),
    )
    return torch.from_numpy(tokens), torch.from_numpy(byte_counts)


class Counting:
    """Takes losses as `nll` does; counts how often each position comes."""

    def __init__(self, positions):
        self.counts, self.losses = np.zeros(positions, int), np.full(positions, np.nan)

    def __setitem__(self, where, losses):
        np.add.at(self.counts, where.numpy(), 1)
        self.losses[where.numpy()] = losses.numpy()


def compiled_like(model, tokens, targets, scored, temperature, segments):
    """A scoring function that is not the eager one: `evaluate` gives it whole batches only."""
    return tg.token_losses(model, tokens, targets, scored, temperature)


def test_any_layout_scores_every_position_once():
    """Any length, sequence length, stride, batch size and number of ranks, of which some find no work."""
    rng = random.Random(1)
    for positions, seq_len, stride in some_layouts(160):
        positions, size = min(positions, 150), rng.randint(1, 9)
        batch_tokens = rng.choice([1, seq_len, rng.randint(1, 500)])
        score_fn = rng.choice([tg.token_losses, compiled_like])
        tokens, byte_counts = numbers(positions)
        windows = tg.sliding_windows(positions, seq_len, stride)
        counting, total = Counting(positions), tg.Score()
        for rank in range(size):
            total += tg.evaluate(Digits(), tokens, byte_counts, windows, a_world(rank, size), batch_tokens,
                                 score_fn=score_fn, nll=counting)  # fmt: skip
        layout = (positions, seq_len, stride, batch_tokens, size)
        assert (counting.counts == 1).all(), layout
        expected = Digits.nats(tokens)
        np.testing.assert_allclose(counting.losses, expected, atol=1e-5, err_msg=str(layout))
        assert (total.positions, total.bytes) == (positions, int(byte_counts.sum())), layout
        assert total.val_loss == pytest.approx(expected.mean(), rel=1e-6), layout


@pytest.mark.parametrize("stride", [1, 4, 16])
def test_only_scored_positions_go_through_the_output_layer(stride):
    windows, model = tg.sliding_windows(200, 16, stride), Digits()
    tg.evaluate(model, *numbers(200), windows, a_world())
    assert (model.put_out, model.read) == (200, sum(end - start for start, end, _ in windows))


def test_sums_are_float64():
    """One loss of 2^30 nats among losses of 64, which a float32 sum drops: its step there is 128."""

    class Extremes(Digits):
        def logits(self, hidden, document=None):
            return torch.tensor([0.0, -64.0, -(2.0**30)]).expand(*hidden.shape[:2], 3)

    tokens, byte_counts = torch.ones(1001, dtype=torch.int32), torch.full((1000,), 255, dtype=torch.uint8)
    tokens[500] = 2
    for batch_tokens in (16, 100_000):
        windows = tg.sliding_windows(1000, 16, 4)
        total = tg.evaluate(Extremes(), tokens, byte_counts, windows, a_world(), batch_tokens)
        assert (total.nats, total.positions, total.bytes) == (2.0**30 + 64 * 999, 1000, 255_000)


def test_batches_are_sized_by_tokens_and_device():
    """By width on a CPU, whatever the windows' length, 131,072 on a GPU."""

    def size(device, ranks=1, chunk=math.inf, **settings):
        world = types.SimpleNamespace(tuning=tg.TUNING[device], size=ranks)
        hp = dict(eval_seq_len=1024, eval_stride=128, model_dim=512) | settings
        return tg.scoring_batch_tokens(dataclasses.replace(HP, **hp), world, chunk)

    assert size("cpu", eval_seq_len=256) == size("cpu", eval_seq_len=2048) == 2048
    assert size("cpu", model_dim=128) == 8192
    assert size("cpu", eval_seq_len=8192) == 8192  # a window is never cut
    assert size("cuda") == size("cuda", ranks=8) == 131_072
    assert size("cuda", chunk=131_072) == 131_072  # 1,024 windows fill whole batches anyway
    assert size("cuda", ranks=8, chunk=32_768) == 32 * 1024  # 256 windows on 8 ranks
    assert size("cuda", ranks=8, chunk=128) == 1024


def test_a_compiled_scorer_sees_one_shape():
    """Six windows of 16; the first window and the tail are scored eagerly."""
    shapes = []

    def watching(model, tokens, targets, scored, temperature, segments):
        shapes.append((tuple(tokens.shape), tuple(targets.shape), scored))
        return torch.zeros(len(tokens), scored)

    windows = tg.sliding_windows(103, SEQ_LEN, 4)
    tg.evaluate(Digits(), *numbers(103), windows, a_world(), batch_tokens=100, score_fn=watching)
    assert set(shapes) == {((6, SEQ_LEN), (6, SEQ_LEN), 4)}


def test_progress_is_told_the_running_score():
    """Every second batch, of what this rank has scored so far; the score is read only when a line is due."""
    told, batches = [], []

    class Progress:
        def due(self):
            batches.append(1)
            return len(batches) % 2 == 0

        def __call__(self, done, val_bpb):
            told.append((done, val_bpb))

    tokens, byte_counts = numbers(3000)
    windows = tg.sliding_windows(3000, 16, 4)
    tg.evaluate(Digits(), tokens, byte_counts, windows, a_world(), batch_tokens=1600, progress=Progress())
    nats, expected = Digits.nats(tokens), []
    for batch in range(
        2, len(batches) + 1, 2
    ):  # the first batch is the first window, the others score 100 times 4
        done = min(16 + 400 * (batch - 1), 3000)
        expected.append(
            (done, pytest.approx(nats[:done].sum() / math.log(2) / int(byte_counts[:done].sum())))
        )
    assert told == expected and told


# ----------------------------------------------------------------------------------------------------------
# The model, against windows one at a time in float64
# ----------------------------------------------------------------------------------------------------------


@functools.cache
def a_model(vocab_size=64):
    """Random weights in every tensor."""
    return random_model(dataclasses.replace(HP, vocab_size=vocab_size), spread=0.25).eval()


@functools.cache
def some_text(positions):
    """Tokens and the bytes that each target counts."""
    generator = torch.Generator().manual_seed(positions)
    tokens = torch.randint(1, 64, (positions + 1,), generator=generator, dtype=torch.int32)
    return tokens, torch.randint(0, 6, (positions,), generator=generator)


def reference_scores(model, tokens, stride, **options):
    double = copy.deepcopy(model).double()

    def logits(ids):
        with torch.no_grad():
            return double(torch.from_numpy(ids).long()[None])[0].numpy()

    return reference_sliding(logits, tokens.numpy(), SEQ_LEN, stride, **options)


def score(positions, stride, **options):
    windows = tg.sliding_windows(positions, SEQ_LEN, stride)
    return tg.evaluate(a_model(), *some_text(positions), windows, a_world(), **options)


# The length a whole number of strides after the first window, or not; one window; less than one.
@pytest.mark.parametrize(("positions", "stride"), [(100, 4), (103, 4), (101, 16), (57, 1), (16, 4), (5, 4)])
def test_evaluate_equals_plain_windows(positions, stride):
    tokens, byte_counts = some_text(positions)
    windows = tg.sliding_windows(positions, SEQ_LEN, stride)
    expected = reference_scores(a_model(), tokens, stride, windows=windows)
    if (positions - SEQ_LEN) % stride == 0 or positions <= SEQ_LEN:
        np.testing.assert_allclose(expected, reference_scores(a_model(), tokens, stride), rtol=1e-9)
    nll = torch.full((positions,), torch.nan)
    result = score(positions, stride, nll=nll)
    np.testing.assert_allclose(nll.numpy(), expected, rtol=1e-4, atol=1e-4)
    counted = int(byte_counts.sum())
    assert (result.positions, result.bytes) == (positions, counted)
    assert result.val_loss == pytest.approx(expected.mean(), rel=1e-5)
    assert result.val_bpb == pytest.approx(expected.sum() / math.log(2) / counted, rel=1e-5)


def test_context_counts():
    """A stride of 4 gives every position 12 tokens of context or more, and other losses than one of 16."""
    nll = {stride: torch.empty(96) for stride in (4, 16)}
    for stride, losses in nll.items():
        score(96, stride, nll=losses)
    assert torch.allclose(nll[4][:16], nll[16][:16], atol=1e-4)
    assert ((nll[4] - nll[16]).abs()[16:] > 1e-3).float().mean() > 0.5


@functools.cache
def fresh_model():
    """Weights as training starts with: of the wide ones above bf16 leaves too little."""
    torch.manual_seed(0)
    return tg.GPT(HP).eval()


@pytest.mark.parametrize(("model", "dtype", "limit"), [
    (a_model, torch.float32, 1e-6), (fresh_model, torch.bfloat16, 1e-4)], ids=["fp32", "bf16"])  # fmt: skip
def test_scores_do_not_depend_on_batch_and_ranks(model, dtype, limit):
    """Every rank scores a part, some perhaps nothing; together they score each position once."""
    windows, text = tg.sliding_windows(123, SEQ_LEN, 4), some_text(123)
    one = tg.evaluate(model(), *text, windows, a_world(dtype=dtype))
    for batch_tokens, size in ((1, 1), (50, 1), (100_000, 1), (4096, 2), (64, 5), (4096, 40)):
        total, nll, parts = tg.Score(), torch.full((123,), torch.nan), []
        for rank in range(size):
            part = tg.evaluate(model(), *text, windows, a_world(rank, size, dtype), batch_tokens, nll=nll)
            total += part
            parts.append(part.positions)
        assert not nll.isnan().any() and (size == 1 or max(parts) < 123)
        assert (total.positions, total.bytes) == (one.positions, one.bytes)
        assert total.val_bpb == pytest.approx(one.val_bpb, rel=0, abs=limit), (batch_tokens, size)
    if dtype == torch.bfloat16:
        exact = tg.evaluate(model(), *text, windows, a_world())
        assert 0 < abs(exact.val_bpb - one.val_bpb) < 1e-2  # bf16 is in play


TEXTS = [
    "Über den Wolken; déjà vu, naïve façade, smørrebrød.",
    "日本語のテキスト。 한국어 텍스트. Текст по-русски. نص عربي.",
    "emoji 🙂🚀👩‍👩‍👧 and symbols ∑ ∂ ≠ ½", "  several   blanks and\nnewlines\tand tabs  ",
    "the numbers 1234567890, code x_1 = f(y[2]);"]  # fmt: skip


@pytest.mark.parametrize("stride", [3, 16])
def test_bits_per_byte_equal_the_plain_ones(corpus, stride):
    """From texts of many scripts to bpb, by the script and by NumPy: byte pieces, blanks, boundaries."""
    sp = tg.load_tokenizer(corpus["TOKENIZER_PATH"], 512)
    tokens = torch.tensor([i for text in TEXTS for i in (1, *sp.encode(text))], dtype=torch.int32)
    ids = tokens.tolist()
    assert sum(map(sp.is_byte, ids)) > 20
    byte_counts = tg.ByteTable(sp).count(tokens[:-1], tokens[1:])
    windows = tg.sliding_windows(len(ids) - 1, SEQ_LEN, stride)
    model = a_model(vocab_size=512)
    result = tg.evaluate(model, tokens, byte_counts, windows, a_world(), batch_tokens=64, temperature=0.95)
    nats = reference_scores(model, tokens, stride, windows=windows, temperature=0.95)
    charged = sum(reference_bytes(sp, p, t) for p, t in zip(ids, ids[1:]))
    assert result.bytes == charged
    assert result.val_bpb == pytest.approx(nats.sum() / math.log(2) / charged, rel=1e-5)
    blanks = sum(sp.id_to_piece(sp.encode(text)[0]).startswith("▁") for text in TEXTS)
    assert charged == sum(len(sp.decode(sp.encode(text)).encode()) for text in TEXTS) - blanks


def test_adaptive_temperature():
    expected = reference_scores(a_model(), some_text(100)[0], 4, temperature=0.9)
    result = score(100, 4, temperature=0.9)
    assert result.val_loss == pytest.approx(expected.mean(), rel=1e-5)
    assert abs(score(100, 4).val_loss / result.val_loss - 1) > 1e-3


@pytest.mark.parametrize(("low", "expected"), [(0.98, 0.98), (0.95, 0.95), (0.5, 0.9), (1.5, 1.05)])
def test_temperature_at_its_corners(low, expected):
    """No entropy: the lowest temperature, kept within 0.9 and 1.05. All of it: 1. Half of it: half-way."""
    certain, uniform = torch.tensor([200.0, 0.0, 0.0, 0.0]), torch.zeros(4)
    halved = torch.tensor([200.0, 200.0, 0.0, 0.0])  # ln 2 of ln 4
    torch.testing.assert_close(tg.adaptive_temperature(certain, low), certain / expected)
    torch.testing.assert_close(tg.adaptive_temperature(uniform, low), uniform)
    half_way = min(max((1 + low) / 2, 0.9), 1.05)
    torch.testing.assert_close(tg.adaptive_temperature(halved, low), halved / half_way)


def test_a_part_of_the_windows():
    """Test-time training scores chunk by chunk: the parts sum to the whole."""
    windows, text = tg.sliding_windows(103, SEQ_LEN, 4), some_text(103)
    cuts = windows[:7], windows[7:8], windows[8:]
    parts = [tg.evaluate(a_model(), *text, part, a_world()) for part in cuts]
    total, whole = parts[0] + parts[1] + parts[2], score(103, 4)
    assert [part.positions for part in parts] == [40, 4, 59]
    assert (total.positions, total.bytes) == (whole.positions, whole.bytes)
    assert total.val_loss == pytest.approx(whole.val_loss, rel=1e-6)


@pytest.mark.parametrize("stride", [4, 16])
def test_a_split_is_scored_with_the_settings_of_the_run(stride):
    """By windows of EVAL_SEQ_LEN, `stride` apart, by the scorer that is handed in, without a temperature."""
    tokens, byte_counts = some_text(103)
    hp = dataclasses.replace(HP, ttt_temperature=0.9, ttt_enabled=True)
    run, used = types.SimpleNamespace(hp=hp, world=a_world(), log=tg.RunLog(None)), []

    def watching(*arguments):
        used.append(arguments[-2])
        return tg.token_losses(*arguments)

    validation = types.SimpleNamespace(tokens=tokens, byte_counts=byte_counts)
    run.world.tuning = dataclasses.replace(run.world.tuning, scoring=32 * HP.model_dim)  # two windows a batch
    assert tg.score_split(run, a_model(), validation, stride, "x", watching) == score(
        103, stride, batch_tokens=32
    )
    assert set(used) == {1.0}


def documents():
    """A text of documents of 1 to 60 tokens and their bounds, the last one cut off."""
    rng, text = np.random.default_rng(5), []
    while len(text) < 400:
        text += [1, *rng.integers(2, 64, rng.integers(1, 60)).tolist()]
    starts = [at for at, token in enumerate(text[:400]) if token == 1]
    return torch.tensor(text[:401], dtype=torch.int32), [*zip(starts, [*starts[1:], 400])]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("most", [SEQ_LEN, 40, 200, 1000])
def test_documents_are_scored_by_themselves(most, ranks):
    """By hand: each document's pieces of SEQ_LEN tokens, one at a time, whatever lies beside them."""
    plain = dict(smear_reset_at_bos=True, bigram_vocab_size=0, rope_ntk_reference=0)
    hp = dataclasses.replace(HP, document_mask=True, **plain)
    model, (tokens, bounds) = random_model(hp, spread=0.25).double().eval(), documents()
    assert max(end - at for at, end in bounds) > 2 * SEQ_LEN
    expected = []
    for at, end in bounds:
        for piece in range(at, end, SEQ_LEN):
            # from the document's start, as its smear gate sees across a cut; attention begins anew
            x = tokens[None, at : min(piece + SEQ_LEN, end)].long()
            segments = torch.tensor([*range(0, piece - at + 1, SEQ_LEN), x.numel()], dtype=torch.int32)
            logits = model(x, segments=segments)[0, piece - at :]
            targets = tokens[piece + 1 : min(piece + SEQ_LEN, end) + 1].long()
            expected.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    expected = torch.cat(expected).detach()
    windows, nll = tg.document_windows(tokens, most), torch.full((400,), math.nan)
    assert [window[:1] + window[2:] for window in windows] == [(at, at) for at, *_ in windows]
    starts = [at for at, _ in bounds]
    assert all(end - at <= most or (at, end) in bounds for at, end, _ in windows)
    assert windows[-1][1] == 400 and {at for at, *_ in windows} <= {*starts}
    total = tg.Score()
    for rank in range(ranks):
        counts = torch.ones(400, dtype=torch.int32)
        total += tg.evaluate(model, tokens, counts, windows, a_world(rank, ranks), most, nll=nll)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-6)
    assert total.positions == 400 and total.nats == pytest.approx(float(expected.sum()), rel=1e-9)


def test_a_split_of_documents_is_scored_by_them(monkeypatch):
    """Windows of plain scores are the documents', not compiled; sliding ones stay windows, with segments."""
    hp = dataclasses.replace(HP, document_mask=True, ttt_enabled=False)
    model, (tokens, _) = random_model(hp, spread=0.25).eval(), documents()
    validation = types.SimpleNamespace(tokens=tokens, byte_counts=torch.ones(400, dtype=torch.int32))
    run = types.SimpleNamespace(hp=hp, world=a_world(), log=tg.RunLog(None))
    compiled = []
    score_fn = lambda *given: compiled.append(given) or tg.token_losses(*given)
    plain = tg.score_split(run, model, validation, SEQ_LEN, "x", score_fn)
    windows = tg.document_windows(tokens, 10**6)
    assert not compiled and plain.positions == 400
    assert plain.nats == pytest.approx(
        tg.evaluate(model, tokens, validation.byte_counts, windows, a_world()).nats
    )
    sliding = tg.score_split(run, model, validation, 4, "x", score_fn)
    assert sliding.positions == 400 and abs(sliding.nats - plain.nats) > 1


def test_scoring_leaves_the_model_alone():
    before = {name: tensor.clone() for name, tensor in a_model().state_dict().items()}
    score(57, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in a_model().state_dict().items())
    assert all(parameter.grad is None for parameter in a_model().parameters())
