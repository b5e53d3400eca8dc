"""Windows, bytes and scores against plain loops."""

import copy
import dataclasses
import functools
import io
import math
import random

import numpy as np
import pytest
import sentencepiece
import torch
from reference import reference_bytes, reference_sliding

import train_gpt as tg

# ----------------------------------------------------------------------------------------------------------
# Windows
# ----------------------------------------------------------------------------------------------------------


def some_layouts(count=600):
    """(positions, seq_len, stride): corners first, then random ones."""
    layouts = [
        (1, 1, 1),
        (1, 8, 8),
        (7, 8, 8),
        (8, 8, 8),
        (9, 8, 8),
        (9, 8, 1),
        (64, 8, 8),
        (65, 8, 3),
        (31, 8, 4),
    ]
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
    assert [tuple(w) for w in tg.sliding_windows(12, 6, 3)] == [(0, 6, 0), (3, 9, 6), (6, 12, 9)]
    assert [tuple(w) for w in tg.sliding_windows(12, 4, 4)] == [(0, 4, 0), (4, 8, 4), (8, 12, 8)]
    assert [tuple(w) for w in tg.sliding_windows(5, 8, 2)] == [(0, 5, 0)]


# ----------------------------------------------------------------------------------------------------------
# Bytes
# ----------------------------------------------------------------------------------------------------------

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Über den Wolken; déjà vu, naïve façade, smørrebrød.",
    "日本語のテキスト。 한국어 텍스트. Текст по-русски. نص عربي.",
    "emoji 🙂🚀👩‍👩‍👧 and symbols ∑ ∂ ≠ ½",
    "  several   blanks and\nnewlines\tand tabs  ",
    "numbers 1234567890, code x_1 = f(y[2]);",
    " leading blank",
    "▁ a lower block ▁▁ in the text",
    "",
]


@pytest.fixture(scope="module")
def sp():
    """A small tokenizer made as the challenge makes its own."""
    rng = random.Random(0)
    words = "the of and to in a is that for it with as was on be by he she not are this from have or".split()
    lines = [" ".join(rng.choices(words, k=12)) + rng.choice(".,!?") for _ in range(400)] + TEXTS[:2] * 5
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=380,
        character_coverage=0.999,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def expected_bytes(sp, previous, target):
    return [reference_bytes(sp, p, t) for p, t in zip(previous, target, strict=True)]


def test_every_pair_of_tokens_counts_its_bytes(sp):
    """All targets after all kinds of previous tokens, byte, control, unknown and blank pieces among them."""
    size = sp.get_piece_size()
    table = tg.ByteTable(sp)
    leading = [i for i in range(size) if sp.id_to_piece(i).startswith("▁")]
    assert sp.is_byte(4) and sp.is_byte(259) and sp.is_unknown(3) and sp.is_control(1) and len(leading) > 20
    for previous in [0, 1, 2, 3, 4, 200, 259, leading[0], leading[-1], *range(260, size)]:
        count = table.count(torch.full((size,), previous), torch.arange(size))
        assert not count.is_floating_point()
        assert count.tolist() == expected_bytes(sp, [previous] * size, range(size)), previous


def test_bytes_keep_their_shape(sp):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, sp.get_piece_size(), (3, 50), generator=generator)
    count = tg.ByteTable(sp).count(tokens[:, :-1], tokens[:, 1:])
    assert count.shape == (3, 49)
    for row, got in zip(tokens.tolist(), count.tolist(), strict=True):
        assert got == expected_bytes(sp, row[:-1], row[1:])


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_a_document_are_those_of_its_decoded_text(sp, text):
    """BOS and ids, as documents are stored; a blank right after BOS is the one byte that is not charged."""
    ids = sp.encode(text)
    tokens = torch.tensor([1, *ids])
    total = int(tg.ByteTable(sp).count(tokens[:-1], tokens[1:]).sum())
    missing = 1 if ids and sp.id_to_piece(ids[0]).startswith("▁") else 0
    assert total == len(sp.decode(ids).encode()) - missing
    assert total == sum(expected_bytes(sp, [1, *ids][:-1], ids))


def test_byte_fallback_counts_single_bytes(sp):
    """An emoji is four byte pieces of one byte, not four times the three letters of an unknown mark."""
    ids = sp.encode("🚀")
    byte_ids = [i for i in ids if sp.is_byte(i)]
    assert len(byte_ids) == 4
    count = tg.ByteTable(sp).count(torch.tensor([260] * 4), torch.tensor(byte_ids))
    assert count.tolist() == [1, 1, 1, 1]


def test_bos_counts_nothing_and_is_a_boundary(sp):
    blank = sp.piece_to_id("▁the")
    count = tg.ByteTable(sp).count(torch.tensor([260, 1, 260, 3]), torch.tensor([1, blank, blank, blank]))
    assert count.tolist() == [0, 3, 4, 3]


def edited(sp, piece, fields):
    """A copy of a tokenizer with fields appended to one piece's message: the last value of a field counts.

    A model file opens with its pieces, each a tag (0x0a), a length and a message; field 1 is text, 3 is type.
    """
    proto, at = sp.serialized_model_proto(), 0
    for _ in range(sp.piece_to_id(piece)):
        assert proto[at] == 0x0A and proto[at + 1] < 0x80
        at += 2 + proto[at + 1]
    length = proto[at + 1]
    message = proto[at + 2 : at + 2 + length] + fields
    changed = sentencepiece.SentencePieceProcessor()
    changed.load_from_serialized_proto(
        proto[:at] + bytes([0x0A, len(message)]) + message + proto[at + 2 + length :]
    )
    return changed


def test_unused_pieces_count_nothing_and_are_boundaries(sp):
    marked = edited(sp, "▁and", bytes([0x18, 5]))
    unused, blank = sp.piece_to_id("▁and"), sp.piece_to_id("▁the")
    assert marked.is_unused(unused) and not sp.is_unused(unused) and not marked.is_unused(blank)
    previous, target = torch.tensor([unused, blank]), torch.tensor([blank, unused])
    assert tg.ByteTable(marked).count(previous, target).tolist() == [3, 0]
    assert tg.ByteTable(sp).count(previous, target).tolist() == [4, 4]
    assert expected_bytes(marked, previous.tolist(), target.tolist()) == [3, 0]


def test_only_one_leading_blank_is_taken_off(sp):
    text = "▁▁an".encode()
    doubled = edited(sp, "▁and", bytes([0x0A, len(text)]) + text)
    token = sp.piece_to_id("▁and")
    assert doubled.id_to_piece(token) == "▁▁an"
    count = tg.ByteTable(doubled).count(torch.tensor([260, 1]), torch.tensor([token, token]))
    assert count.tolist() == [6, 5]


# ----------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------

SEQ_LEN = 16


@functools.cache
def scored_model():
    """A small model with random weights in every tensor, and the world of one process on the CPU."""
    hp = tg.Hyperparameters.from_env(
        {
            "PRESET": "pr606",
            "DTYPE": "fp32",
            "DEVICE": "cpu",
            "NUM_LAYERS": "3",
            "MODEL_DIM": "32",
            "NUM_HEADS": "2",
            "NUM_KV_HEADS": "2",
            "VOCAB_SIZE": "64",
            "TRAIN_SEQ_LEN": "16",
            "EVAL_SEQ_LEN": "16",
            "EVAL_STRIDE": "4",
            "ROPE_NTK_REFERENCE": "8",
            "XSA_LAST_N": "3",
            "VE_LAYERS": "2",
            "BIGRAM_VOCAB_SIZE": "40",
        }
    )
    torch.manual_seed(0)
    model = tg.GPT(hp).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, tg.World(hp, {})


@functools.cache
def some_text(positions):
    """Tokens and the bytes that each target counts."""
    generator = torch.Generator().manual_seed(positions)
    tokens = torch.randint(1, 64, (positions + 1,), generator=generator, dtype=torch.int32)
    return tokens, torch.randint(0, 6, (positions,), generator=generator)


def reference_scores(positions, stride, **options):
    model = copy.deepcopy(scored_model()[0]).double()

    def logits(ids):
        with torch.no_grad():
            return model(torch.from_numpy(ids).long()[None])[0].numpy()

    return reference_sliding(logits, some_text(positions)[0].numpy(), SEQ_LEN, stride, **options)


def score(positions, stride, **options):
    model, world = scored_model()
    windows = tg.sliding_windows(positions, SEQ_LEN, stride)
    return tg.evaluate(model, *some_text(positions), windows, world, **options)


# The length a whole number of strides after the first window, or not; one window; less than one.
@pytest.mark.parametrize(
    ("positions", "stride"), [(100, 4), (103, 4), (96, 16), (101, 16), (57, 1), (16, 4), (5, 4)]
)
def test_evaluate_equals_plain_windows(positions, stride):
    windows = tg.sliding_windows(positions, SEQ_LEN, stride)
    expected = reference_scores(positions, stride, windows=windows)
    if (positions - SEQ_LEN) % stride == 0 or positions <= SEQ_LEN:
        np.testing.assert_allclose(expected, reference_scores(positions, stride), rtol=1e-9)
    nll = torch.full((positions,), torch.nan)
    result = score(positions, stride, nll=nll)
    np.testing.assert_allclose(nll.numpy(), expected, rtol=1e-4, atol=1e-4)
    counted = int(some_text(positions)[1].sum())
    assert (result.positions, result.bytes) == (positions, counted)
    assert result.val_loss == pytest.approx(expected.mean(), rel=1e-5)
    assert result.val_bpb == pytest.approx(expected.sum() / math.log(2) / counted, rel=1e-5)


def test_context_counts():
    """A stride of 4 gives every position 12 tokens of context or more, and other losses than one of 16."""
    nll = {}
    for stride in (4, 16):
        nll[stride] = torch.empty(96)
        score(96, stride, nll=nll[stride])
    assert torch.allclose(nll[4][:16], nll[16][:16], atol=1e-4)
    assert ((nll[4] - nll[16]).abs()[16:] > 1e-3).float().mean() > 0.5


@functools.cache
def fresh_model():
    """Weights as training starts with: of the wide ones above bf16 leaves too little."""
    torch.manual_seed(0)
    return tg.GPT(scored_model()[0].hp).eval()


@pytest.mark.parametrize(
    ("model", "dtype", "limit"),
    [(lambda: scored_model()[0], torch.float32, 1e-6), (fresh_model, torch.bfloat16, 1e-4)],
    ids=["fp32", "bf16"],
)
def test_scores_do_not_depend_on_batch_and_ranks(model, dtype, limit):
    whole, windows = copy.copy(scored_model()[1]), tg.sliding_windows(403, SEQ_LEN, 4)
    whole.dtype = dtype
    one = tg.evaluate(model(), *some_text(403), windows, whole)
    for batch_tokens, size in ((1, 1), (50, 1), (100_000, 1), (4096, 2), (50, 3), (64, 5)):
        total = tg.Score()
        for rank in range(size):
            part = copy.copy(whole)
            part.rank, part.size = rank, size
            total += tg.evaluate(model(), *some_text(403), windows, part, batch_tokens)
        assert (total.positions, total.bytes) == (one.positions, one.bytes)
        assert total.val_bpb == pytest.approx(one.val_bpb, rel=0, abs=limit), (batch_tokens, size)
    if dtype == torch.bfloat16:
        exact = tg.evaluate(model(), *some_text(403), windows, scored_model()[1])
        assert 0 < abs(exact.val_bpb - one.val_bpb) < 1e-2  # bf16 is in play


@pytest.mark.parametrize("size", [2, 3, 5, 40])
def test_ranks_share_the_windows(size):
    """Every rank scores a part, some perhaps nothing; together they score each position once."""
    model, world = scored_model()
    windows = tg.sliding_windows(103, SEQ_LEN, 4)
    whole, nll = score(103, 4), torch.full((103,), torch.nan)
    total, parts = tg.Score(0.0, 0, 0), []
    for rank in range(size):
        part = copy.copy(world)
        part.rank, part.size = rank, size
        total = total + tg.evaluate(model, *some_text(103), windows, part, nll=nll)
        parts.append(total.positions)
    assert not nll.isnan().any() and max(parts) == parts[-1] == 103 and parts[0] < 103
    assert (total.positions, total.bytes) == (whole.positions, whole.bytes)
    assert total.val_bpb == pytest.approx(whole.val_bpb, rel=0, abs=1e-6)


class Digits:
    """A model whose loss of target t after token p is known by heart: logits are -|v - 3 p mod V|."""

    def hidden(self, tokens):
        return tokens.float().unsqueeze(-1)

    def logits(self, hidden):
        return -(torch.arange(16.0) - (3 * hidden) % 16).abs()

    @staticmethod
    def nats(previous, target):
        logits = -np.abs(np.arange(16.0) - (3 * previous[:, None]) % 16)
        return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(target)), target]


class Counting:
    """Takes losses as `nll` does; counts how often each position comes."""

    def __init__(self, positions):
        self.counts, self.losses = np.zeros(positions, int), np.full(positions, np.nan)

    def __setitem__(self, where, losses):
        np.add.at(self.counts, where.numpy(), 1)
        self.losses[where.numpy()] = losses.numpy()


def compiled_like(model, tokens, targets, scored, temperature):
    """A scoring function that is not the eager one: `evaluate` gives it whole batches only."""
    return tg.token_losses(model, tokens, targets, scored, temperature)


def numbers(positions):
    """Tokens below 16 and the bytes that each target counts, uint8 as a run holds them."""
    rng = np.random.default_rng(positions)
    return rng.integers(0, 16, positions + 1, np.int32), rng.integers(0, 256, positions, np.uint8)


@pytest.mark.parametrize("score_fn", [tg.token_losses, compiled_like])
def test_any_layout_scores_every_position_once(score_fn):
    """Any length, sequence length, stride, batch size and number of ranks, of which some find no work."""
    rng = random.Random(1)
    for positions, seq_len, stride in some_layouts(400):
        positions, size = min(positions, 150), rng.randint(1, 9)
        batch_tokens = rng.choice([1, seq_len, rng.randint(1, 500)])
        tokens, byte_counts = (torch.from_numpy(a) for a in numbers(positions))
        windows = tg.sliding_windows(positions, seq_len, stride)
        counting, total = Counting(positions), tg.Score()
        for rank in range(size):
            part = copy.copy(scored_model()[1])
            part.rank, part.size = rank, size
            total += tg.evaluate(
                Digits(), tokens, byte_counts, windows, part, batch_tokens, score_fn=score_fn, nll=counting
            )
        layout = (positions, seq_len, stride, batch_tokens, size)
        assert (counting.counts == 1).all(), layout
        expected = Digits.nats(tokens[:-1].numpy(), tokens[1:].numpy())
        np.testing.assert_allclose(counting.losses, expected, atol=1e-5, err_msg=str(layout))
        assert (total.positions, total.bytes) == (positions, int(byte_counts.sum())), layout
        assert total.val_loss == pytest.approx(expected.mean(), rel=1e-6), layout


class Watched(Digits):
    """Digits that remembers how many places are read, and how many go through the output layer."""

    def __init__(self):
        self.read = self.put_out = 0

    def hidden(self, tokens):
        self.read += tokens.numel()
        return super().hidden(tokens)

    def logits(self, hidden):
        self.put_out += hidden.shape[:2].numel()
        return super().logits(hidden)


@pytest.mark.parametrize("stride", [1, 4, 16])
def test_only_scored_positions_go_through_the_output_layer(stride):
    tokens, byte_counts = (torch.from_numpy(a) for a in numbers(200))
    windows, model = tg.sliding_windows(200, 16, stride), Watched()
    tg.evaluate(model, tokens, byte_counts, windows, scored_model()[1])
    assert model.put_out == 200
    assert model.read == sum(end - start for start, end, _ in windows)


def test_sums_are_float64(monkeypatch):
    """One loss of 2^27 nats among losses of 1: a float32 sum drops the small ones, 8 being its step there."""
    tokens, byte_counts = torch.ones(1001, dtype=torch.int32), torch.ones(1000, dtype=torch.uint8)
    tokens[500] = 2
    nats = torch.tensor([0.0, 1.0, 2.0**27])

    def losses(model, text, targets, scored, temperature):
        return nats[targets[:, -scored:]]

    monkeypatch.setattr(tg, "token_losses", losses)
    for batch_tokens in (16, 100_000):
        windows = tg.sliding_windows(1000, 16, 4)
        total = tg.evaluate(None, tokens, byte_counts, windows, scored_model()[1], batch_tokens, score_fn=losses)
        assert total.nats == 2.0**27 + 999
        assert (total.positions, total.bytes) == (1000, 1000)


def test_batches_are_sized_by_tokens_and_device():
    """By width on a CPU, whatever the windows' length, 131,072 on a GPU, VAL_BATCH_SIZE over all ranks."""

    def size(device, ranks=1, chunk=math.inf, **settings):
        world = copy.copy(scored_model()[1])
        world.device, world.size = torch.device(device), ranks
        return tg.scoring_batch_tokens(dataclasses.replace(scored_model()[0].hp, **settings), world, chunk)

    assert size("cpu", eval_seq_len=256, model_dim=512) == size("cpu", eval_seq_len=2048, model_dim=512) == 2048
    assert size("cpu", eval_seq_len=256, model_dim=128) == 8192
    assert size("cuda") == 131_072
    assert size("cuda", ranks=8) == 524_288 // 8
    assert size("cuda", ranks=4, val_batch_size=4096) == 1024
    assert size("cpu", eval_seq_len=8192, model_dim=512) == 8192  # a window is never cut
    windows = dict(eval_seq_len=1024, eval_stride=128)
    assert size("cuda", chunk=131_072, **windows) == 131_072  # 1,024 windows fill whole batches anyway
    assert size("cuda", ranks=8, chunk=32_768, **windows) == 32 * 1024  # 256 windows on 8 ranks
    assert size("cuda", ranks=8, chunk=128, **windows) == 1024

    shapes = []

    def watching(model, tokens, targets, scored, temperature):
        shapes.append(tuple(tokens.shape))
        return torch.zeros(len(tokens), scored)

    tokens, byte_counts = (torch.from_numpy(a) for a in numbers(103))
    windows = tg.sliding_windows(103, SEQ_LEN, 4)
    tg.evaluate(Digits(), tokens, byte_counts, windows, scored_model()[1], batch_tokens=100, score_fn=watching)
    assert set(shapes) == {(6, SEQ_LEN)}  # six windows of 16; the first window and the tail are scored eagerly


def test_progress_shows_the_running_score(monkeypatch):
    """A batch takes ten seconds, so every second one is told of: score so far, speed and time left by hand."""
    clock, lines = [0.0], []

    class Slow(Digits):
        def hidden(self, tokens):
            clock[0] += 10.0
            return super().hidden(tokens)

    monkeypatch.setattr(tg.time, "perf_counter", lambda: clock[0])
    tokens, byte_counts = (torch.from_numpy(a) for a in numbers(3000))
    windows, progress = tg.sliding_windows(3000, 16, 4), tg.Progress(lines.append, "sliding", 3000)
    tg.evaluate(Slow(), tokens, byte_counts, windows, scored_model()[1], batch_tokens=1600, progress=progress)
    nats = Digits.nats(tokens[:-1].numpy(), tokens[1:].numpy())
    expected = []
    for batch in (2, 4, 6, 8):  # the first batch is the first window, the others score 100 times 4
        done, seconds = 16 + 400 * (batch - 1), 10.0 * batch
        bpb = nats[:done].sum() / math.log(2) / int(byte_counts[:done].sum())
        expected.append(
            f"sliding positions:{done}/3000 val_bpb:{bpb:.4f} tokens/s:{done / seconds:.0f} "
            f"left:{seconds * (3000 - done) / done:.0f}s"
        )
    assert lines == expected


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bits_per_byte_equal_the_plain_ones(sp, seed):
    """From texts of many scripts to bpb, by the script and by NumPy: byte pieces, blanks, boundaries."""
    rng = random.Random(seed)
    documents = rng.sample([text for text in TEXTS if text], 4)
    ids = np.array([i for text in documents for i in (1, *sp.encode(text))], np.int32)
    positions = len(ids) - 1
    assert sum(sp.is_byte(int(i)) for i in ids) > 20
    world, stride = scored_model()[1], rng.choice([3, 4, 16])
    torch.manual_seed(seed)
    model = tg.GPT(dataclasses.replace(scored_model()[0].hp, vocab_size=sp.get_piece_size()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tokens = torch.from_numpy(ids)
    byte_counts = tg.ByteTable(sp).count(tokens[:-1], tokens[1:])
    windows = tg.sliding_windows(positions, SEQ_LEN, stride)
    result = tg.evaluate(model, tokens, byte_counts, windows, world, batch_tokens=64, temperature=0.95)

    double = copy.deepcopy(model).double()
    with torch.no_grad():
        nats = reference_sliding(
            lambda text: double(torch.from_numpy(text).long()[None])[0].numpy(), ids, SEQ_LEN, stride,
            windows=windows, temperature=0.95,
        )  # fmt: skip
    charged = sum(reference_bytes(sp, int(p), int(t)) for p, t in zip(ids, ids[1:]))
    assert result.bytes == charged
    assert result.val_bpb == pytest.approx(nats.sum() / math.log(2) / charged, rel=1e-5)
    blanks = sum(sp.id_to_piece(sp.encode(text)[0]).startswith("▁") for text in documents)
    assert charged == sum(len(sp.decode(sp.encode(text)).encode()) for text in documents) - blanks


def test_adaptive_temperature():
    expected = reference_scores(100, 4, temperature=0.9)
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
    model, world = scored_model()
    windows = tg.sliding_windows(103, SEQ_LEN, 4)
    parts = [
        tg.evaluate(model, *some_text(103), part, world) for part in (windows[:7], windows[7:8], windows[8:])
    ]
    total, whole = parts[0] + parts[1] + parts[2], score(103, 4)
    assert [part.positions for part in parts] == [40, 4, 59]
    assert (total.positions, total.bytes) == (whole.positions, whole.bytes)
    assert total.val_loss == pytest.approx(whole.val_loss, rel=1e-6)


def test_scoring_leaves_the_model_alone():
    model, _ = scored_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(57, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
