"""Windows, bytes and scores against plain loops."""

import io
import math
import random

import pytest
import sentencepiece
import torch
from reference import reference_bytes, reference_sliding, reference_windows

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
    copy = sentencepiece.SentencePieceProcessor()
    copy.load_from_serialized_proto(
        proto[:at] + bytes([0x0A, len(message)]) + message + proto[at + 2 + length :]
    )
    return copy


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
