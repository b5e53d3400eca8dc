"""Shards, the order of training tokens, bytes, and the checks before the first step."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import result_of, run_here, write_shard
from reference import reference_bytes

import train_gpt as tg

SMOKE = tg.Hyperparameters.from_env({"PRESET": "smoke", "DEVICE": "cpu"})


def ranks(size):
    """The processes of a group that never talk to each other."""
    for rank in range(size):
        world = tg.World(SMOKE, {})
        world.rank, world.size = rank, size
        yield world


def shards_of(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 60000, size, dtype=np.uint16) for size in sizes]


# ----------------------------------------------------------------------------------------------------------
# Segments
# ----------------------------------------------------------------------------------------------------------


def starts_by_hand(rows, longest):
    """A position at a time: where a row begins, a document, or a piece of one."""
    bounds, at = [], 0
    for row in rows:
        since = 0
        for i, token in enumerate(row):
            if i == 0 or token == 1 or at - since == longest:
                bounds.append(at)
                since = at
            at += 1
    return [*bounds, at]


@pytest.mark.parametrize("longest", [1, 3, 8, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (3, 50), (7, 9)])
def test_segments_begin_with_rows_documents_and_pieces(shape, longest):
    for seed, share in enumerate((0.0, 0.05, 0.5, 1.0)):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(2, 60, shape, generator=generator)
        tokens[torch.rand(shape, generator=generator) < share] = 1
        bounds = tg.segment_starts(tokens, longest)
        assert bounds.dtype == torch.int32 and bounds.tolist() == starts_by_hand(tokens.tolist(), longest)


def test_bounds_are_padded_to_few_lengths_and_only_where_documents_count():
    world, tokens = tg.World(SMOKE, {}), torch.tensor([[5, 1, 7, 8], [1, 1, 2, 3]])
    assert tg.document_bounds(SMOKE, tokens, 100, world) is None
    inside = dataclasses.replace(SMOKE, document_mask=True)
    assert tg.document_bounds(inside, tokens, 100, world).tolist() == [0, 1, 4, 5, 8]
    world.tuning = tg.TUNING["cuda"]
    inside = dataclasses.replace(inside, train_seq_len=4)  # eight for each row
    assert tg.document_bounds(inside, tokens, 100, world).tolist() == [0, 1, 4, 5] + [8] * 12


# ----------------------------------------------------------------------------------------------------------
# Shards
# ----------------------------------------------------------------------------------------------------------


def test_a_shard_comes_back(tmp_path):
    tokens = [1, 0, 65535, 256, 1024]
    write_shard(tmp_path / "a.bin", tokens)
    for path in (tmp_path / "a.bin", str(tmp_path / "a.bin")):
        shard = tg.read_shard(path)
        assert shard.tolist() == tokens and shard.dtype == np.dtype("<u2")


def damaged(tokens=(1, 2, 3), words=(), cut=None, extra=b""):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    for at, value in words:
        header[at] = value
    return (header.tobytes() + np.asarray(tokens, "<u2").tobytes())[:cut] + extra


DAMAGED = {
    "empty": b"", "zeros": b"\0" * 1023, "header cut": damaged(cut=1023), "no tokens": damaged(cut=1024),
    "magic": damaged(words=[(0, 20240521)]), "version": damaged(words=[(1, 2)]),
    "blank header": damaged(words=[(0, 0), (1, 0)]), "half a token short": damaged(cut=-1),
    "a token short": damaged(cut=-2), "half a token long": damaged(extra=b"\0"),
    "a token long": damaged(extra=b"\0\0"), "count low": damaged(words=[(2, 2)]),
    "count high": damaged(words=[(2, 4)]), "count negative": damaged(words=[(2, -3)]),
    "count zero": damaged(tokens=()), "short, and adds up": damaged(tokens=(1,), cut=302),
    "count huge": damaged(words=[(2, 2**31 - 1)]),
    "web page": b"<html>404 not found</html>" * 100}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_shards_are_refused(tmp_path, content):
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(tg.UserError) as caught:
        tg.read_shard(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_shards_name_the_next_command(tmp_path):
    with pytest.raises(tg.UserError, match="fineweb_train_000007.bin.*data/prepare.py"):
        tg.read_shard(tmp_path / "fineweb_train_000007.bin")
    write_shard(tmp_path / "fineweb_train_000000.bin", [1, 2])
    for folder, split in ((tmp_path, "val"), (tmp_path / "nowhere", "train")):
        with pytest.raises(tg.UserError, match=f"fineweb_{split}.*data/prepare.py"):
            tg.read_split(str(folder), split)


def test_a_split_is_its_files_in_order_of_names(tmp_path):
    for i in (10, 2, 0):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", [i + 1, i])
    write_shard(tmp_path / "fineweb_val_000001.bin", [9])
    write_shard(tmp_path / "fineweb_val_bytes_000001.bin", [3])
    (tmp_path / "notes.txt").write_text("x")
    assert [s.tolist() for s in tg.read_split(str(tmp_path), "train")] == [[1, 0], [3, 2], [11, 10]]
    assert [s.tolist() for s in tg.read_split(str(tmp_path), "val")] == [[9]]
    (tmp_path / "fineweb_train_000003.bin").write_bytes(b"")
    with pytest.raises(tg.UserError, match="000003"):
        tg.read_split(str(tmp_path), "train")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ids_beyond_the_vocabulary_are_refused(size):
    shards = [np.array(ids, np.uint16) for ids in ([5, 99], [0, 100], [7, 3])]
    for world in ranks(size):
        tg.check_ids(shards, 101, world)
    refused = 0
    for world in ranks(size):
        try:
            tg.check_ids(shards, 100, world)
        except tg.UserError as error:
            refused += "100" in str(error) and "VOCAB_SIZE" in str(error)
    assert refused == 1  # the rank that reads the second shard; over a group the maximum tells the others


# ----------------------------------------------------------------------------------------------------------
# The order
# ----------------------------------------------------------------------------------------------------------


def endless(shards):
    """Every training token, over and over, as the submissions read them."""
    return itertools.cycle([int(t) for shard in shards for t in shard])


def plain_step(source, batch_tokens, seq_len):
    """A step's rows, written with lists: spans of one token more than their sequences hold."""
    spans = 8 if batch_tokens % (8 * seq_len) == 0 else 1
    rows = []
    for _ in range(spans):
        span = list(itertools.islice(source, batch_tokens // spans + 1))
        for at in range(0, len(span) - 1, seq_len):
            rows.append(span[at : at + seq_len + 1])
    return rows


@pytest.mark.parametrize("sizes", [(1000,), (500, 300, 700), (50, 3000, 20, 1), (90,), (37, 61)])
@pytest.mark.parametrize(
    ("batch_tokens", "seq_len"), [(256, 16), (256, 32), (256, 64), (240, 16), (96, 96), (8, 1)]
)
def test_steps_are_read_straight_through(sizes, batch_tokens, seq_len):
    """Across ends of shards, of the epoch, and of shards shorter than a span."""
    shards = shards_of(*sizes)
    stream, source = tg.TokenStream(shards), endless(shards)
    for _ in range(8):
        rows = stream.step(batch_tokens, seq_len)
        assert rows.dtype == np.int64 and rows.shape == (batch_tokens // seq_len, seq_len + 1)
        assert rows.tolist() == plain_step(source, batch_tokens, seq_len)


def test_spans_by_hand():
    """Neighbouring sequences share a token, neighbouring spans do not."""
    stream = tg.TokenStream([np.arange(99, dtype=np.uint16)])
    rows = stream.step(32, 2)
    assert rows.tolist()[:4] == [[0, 1, 2], [2, 3, 4], [5, 6, 7], [7, 8, 9]]
    assert rows[-1].tolist() == [37, 38, 39] and stream.position == 40
    rows = tg.TokenStream([np.arange(99, dtype=np.uint16)]).step(12, 4)
    assert rows.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]


@pytest.mark.parametrize("counts", [[7] * 40, [1] * 30, [250, 1, 600], [100, 100], [99]])
def test_reading_goes_across_shards_and_epochs(counts):
    shards = shards_of(60, 30, 10)
    stream, source, at = tg.TokenStream(shards), endless(shards), 0
    for count in counts:
        read = stream.read(at, count)
        assert read.dtype == np.int64 and read.tolist() == list(itertools.islice(source, count))
        at += count
    assert stream.position == 0


def test_a_position_is_all_there_is_to_resume():
    shards = shards_of(300, 200)
    first, second = tg.TokenStream(shards), tg.TokenStream(shards)
    for _ in range(3):
        first.step(64, 8)
    second.position = first.position
    assert np.array_equal(first.step(64, 8), second.step(64, 8))


def test_every_token_of_every_shard_is_trained_on():
    shards = [np.full(size, size, dtype=np.uint16) for size in (5000, 250, 1)]
    stream = tg.TokenStream(shards)
    assert stream.total == 5251 and stream.step(5250, 10)[:, 0].tolist() == [5000] * 500 + [250] * 25
    assert stream.position == 5251


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("batch_tokens", "seq_len"), [(256, 16), (48, 16), (40, 8)])
def test_ranks_share_a_step_whatever_their_number(size, batch_tokens, seq_len):
    shards = shards_of(400, 300)
    whole = tg.TokenStream(shards).step(batch_tokens, seq_len).tolist()
    dealt, shares = [], []
    for world in ranks(size):
        rows, own = tg.TokenStream(shards).step(batch_tokens, seq_len), world.shard(batch_tokens // seq_len)
        dealt += rows[own.start : own.stop].tolist()
        shares.append(len(own))
    assert dealt == whole == plain_step(endless(shards), batch_tokens, seq_len)
    assert max(shares) - min(shares) <= 1


def test_samples_are_pieces_of_the_training_text():
    """From any place, each as likely as another, across shards and the end of the text."""
    shards = [np.arange(low, low + size, dtype=np.uint16) for low, size in ((0, 400), (400, 30), (430, 770))]
    stream = tg.TokenStream(shards)
    rows = stream.sample(600, 50, seed=3)
    assert rows.shape == (600, 50) and rows.dtype == np.int64 and stream.position == 0
    assert (np.diff(rows, axis=1) % 1200 == 1).all()
    starts = rows[:, 0]
    assert 0.28 < (starts < 400).mean() < 0.39 and len(np.unique(starts)) > 400
    assert (rows[:, -1] < starts).any() and ((starts < 400) & (rows[:, -1] >= 430)).any()


def test_samples_repeat_for_a_seed_and_for_no_other():
    stream = tg.TokenStream(shards_of(5000, 4000))
    first = stream.sample(16, 32, seed=1)
    stream.step(256, 16)
    np.random.seed(0)
    assert np.array_equal(first, stream.sample(16, 32, seed=1))
    assert not np.array_equal(first, stream.sample(16, 32, seed=2))


def test_a_text_shorter_than_a_sample_repeats():
    rows = tg.TokenStream([np.arange(20, dtype=np.uint16)]).sample(2, 64, seed=0)
    assert (np.diff(rows, axis=1) % 20 == 1).all()


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
def sp(corpus):
    """A small tokenizer made as the challenge makes its own."""
    return tg.load_tokenizer(corpus["TOKENIZER_PATH"], 512)


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
# Validation and tokenizer
# ----------------------------------------------------------------------------------------------------------


def trained(path, text, vocab_size=512, **more):
    """A tokenizer of another text, made as the challenge makes its own."""
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(text[at : at + 80] for at in range(0, len(text), 80)),
        model_prefix=str(path.with_suffix("")), vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=False, hard_vocab_limit=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
        **more,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def validation_of(corpus, **changes):
    usual = {"PRESET": "smoke", "DEVICE": "cpu", "EVAL_SEQ_LEN": "64", "EVAL_STRIDE": "1"}
    hp = tg.Hyperparameters.from_env(corpus | usual | changes)
    return tg.Validation.load(hp, tg.World(hp, {}))


@pytest.mark.parametrize(("sizes", "seq_len", "kept"), [
    ((17,), 16, 17), ((18,), 16, 17), ((32,), 16, 17), ((33,), 16, 33), ((10, 10, 13), 16, 33)])  # fmt: skip
def test_validation_is_cut_to_whole_sequences_and_a_token(corpus, tmp_path, sizes, seq_len, kept):
    text, ends = tg.read_split(corpus["DATA_PATH"], "val")[0], np.cumsum((0, *sizes))
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        write_shard(tmp_path / f"fineweb_val_{i:06d}.bin", text[start:end])
    found = validation_of(corpus, DATA_PATH=str(tmp_path), EVAL_SEQ_LEN=str(seq_len))
    assert found.tokens.dtype == torch.int32 and found.tokens.tolist() == text[:kept].tolist()
    assert len(found.byte_counts) == kept - 1


@pytest.mark.parametrize("size", [1, 16])
def test_validation_that_is_too_short_is_refused(corpus, tmp_path, size):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.arange(size))
    with pytest.raises(tg.UserError, match="EVAL_SEQ_LEN=16"):
        validation_of(corpus, DATA_PATH=str(tmp_path), EVAL_SEQ_LEN="16")


def test_tokenizers_are_checked(corpus, tmp_path):
    path = corpus["TOKENIZER_PATH"]
    assert tg.load_tokenizer(path, 512).get_piece_size() == 512
    with pytest.raises(tg.UserError, match="512 pieces.*VOCAB_SIZE=1024"):
        tg.load_tokenizer(path, 1024)
    with pytest.raises(tg.UserError, match="No such file.*TOKENIZER_PATH"):
        tg.load_tokenizer(str(tmp_path / "none.model"), 512)
    blob = Path(path).read_bytes()
    for name, content in (("empty", b""), ("text", b"not a model\n" * 50), ("half", blob[: len(blob) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(tg.UserError, match=name):
            tg.load_tokenizer(str(tmp_path / name), 512)


@pytest.fixture
def checked(corpus, sp):
    tokens = tg.read_split(corpus["DATA_PATH"], "val")[0].astype(np.int32)
    return tg.ByteTable(sp), sp, torch.from_numpy(tokens[: (len(tokens) - 1) // 64 * 64 + 1])


def test_the_right_table_passes(checked):
    table, processor, tokens = checked
    assert int((tokens == 1).sum()) > 3
    tg.check_tokenizer(table, tokens)
    tg.check_tokenizer(table, tokens[:200])


WRONG = {
    "spaces twice": lambda table: np.add(table.bytes, table.space, out=table.bytes),
    "byte pieces as their names": lambda table: table.bytes[4:260].fill(6),
    "all are boundaries": lambda table: table.boundary.fill(True),
    "no spaces": lambda table: table.space.fill(False),
    "frequent pieces": lambda table: table.bytes.__setitem__(table.bytes == 1, 2),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_wrong_tables_are_caught(checked, spoil):
    table, processor, tokens = checked
    spoil(table)
    with pytest.raises(tg.UserError, match=r"bytes counted: \d+, decoded: \d+"):
        tg.check_tokenizer(table, tokens)


def test_the_table_of_another_tokenizer_is_caught(checked, tmp_path):
    """Of the same size and even of the same pieces in another order."""
    _, processor, tokens = checked
    text = processor.decode(tokens[1:].tolist())[::-1]
    other = trained(tmp_path / "other.model", text)
    with pytest.raises(tg.UserError, match="do not belong together"):
        tg.check_tokenizer(tg.ByteTable(other), tokens)


def test_a_tokenizer_of_a_similar_text_is_caught_though_its_bytes_agree(corpus, checked, tmp_path):
    """Made from training text of the same corpus: it counts its own bytes rightly, and any score is wrong."""
    _, processor, tokens = checked
    train = np.concatenate(tg.read_split(corpus["DATA_PATH"], "train")).tolist()
    other = trained(tmp_path / "other.model", processor.decode(train[: len(train) // 3]))
    table, ids = tg.ByteTable(other), tokens[:1000].tolist()
    counted = int(table.count(tokens[:999], tokens[1:1000]).sum())
    assert abs(counted - len(other.decode(ids).encode())) < 20
    with pytest.raises(tg.UserError, match="do not belong together"):
        validation_of(corpus, TOKENIZER_PATH=str(tmp_path / "other.model"))
    # the right ids under this tokenizer pass, so it is the pair that is wrong
    own = [1, *other.encode(processor.decode(tokens[1:].tolist()))]
    tg.check_tokenizer(table, torch.tensor(own * 2, dtype=torch.int32))


def test_training_text_of_another_tokenizer_is_caught(corpus, checked, tmp_path):
    """In the stages that read it; scoring alone does not look at it."""
    table, processor, tokens = checked
    shuffled = np.random.default_rng(0).permutation(np.arange(260, 512))
    alien = [int(shuffled[t - 260]) if t >= 260 else t for t in tokens.tolist()]
    write_shard(tmp_path / "fineweb_train_000000.bin", alien)
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens.tolist())
    hp = tg.Hyperparameters.from_env(
        corpus | {"PRESET": "smoke", "DEVICE": "cpu", "DATA_PATH": str(tmp_path)}
    )
    with contextlib.chdir(tmp_path):
        with pytest.raises(tg.UserError, match="do not belong together"):
            tg.open_run(hp, tg.World(hp, {}), SimpleNamespace(table=table, sidecar=False))
        tg.open_run(dataclasses.replace(hp, stages="evaluate"), tg.World(hp, {}), None)


def test_a_tokenizer_without_a_piece_for_the_blank_is_refused(tmp_path):
    """Its blanks are the three bytes of U+2581, which decode to the mark and not to a blank: 4 % too many."""
    words = ["the", "cat", "sat", "mat", "hat"]
    other = trained(tmp_path / "other.model", "".join(words * 50), 290)
    assert other.piece_to_id("\u2581") == other.unk_id()
    ids = [1, *other.encode(" ".join(words * 40))] * 3
    assert sum(map(other.is_byte, ids)) >= 3 * 190
    with pytest.raises(tg.UserError, match=r"bytes counted: \d+, decoded: \d+"):
        tg.check_tokenizer(tg.ByteTable(other), torch.tensor(ids, dtype=torch.int32))


def test_a_piece_of_more_than_255_bytes_is_charged_in_full(checked, corpus, tmp_path):
    _, processor, tokens = checked
    path, piece = tmp_path / "long.model", "ab" * 150
    long = trained(path, processor.decode(tokens[1:].tolist()), user_defined_symbols=[piece])
    (token,) = long.encode(piece)
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, *[token] * 100] * 3)
    found = validation_of(corpus, DATA_PATH=str(tmp_path), TOKENIZER_PATH=str(path))
    assert found.byte_counts.tolist() == (([300] * 100 + [0]) * 3)[: len(found.byte_counts)]
    assert found.bytes > 255 * 250


def test_a_long_document_may_be_cut_inside_a_character(checked):
    """Bytes of a character that is not in the vocabulary, at the end of what is sampled."""
    table, processor, _ = checked
    word, hieroglyph = processor.encode("word"), processor.encode("\U00013000")
    assert len(hieroglyph) == 4 and all(processor.is_byte(i) for i in hieroglyph)
    for shift in range(4):
        document = [1, *(word[:1] * shift), *hieroglyph * 3000]
        tg.check_tokenizer(table, torch.tensor(document, dtype=torch.int32))


def test_validation_carries_the_bytes_of_its_targets(corpus, checked):
    table, _, tokens = checked
    found = validation_of(corpus)
    assert torch.equal(found.tokens, tokens) and len(found.byte_counts) == len(tokens) - 1
    assert torch.equal(found.byte_counts.int(), table.count(tokens[:-1], tokens[1:]))
    assert found.bytes == int(found.byte_counts.double().sum()) > 255
    assert np.array_equal(found.table.bytes, table.bytes) and found.corpus == Path(corpus["DATA_PATH"]).name


def test_validation_is_checked_and_named_by_its_folder(corpus, tmp_path):
    """meta.json beside the shards says what the text is; an id beyond the vocabulary is refused."""
    text = tg.read_split(corpus["DATA_PATH"], "val")[0]
    write_shard(tmp_path / "fineweb_val_000000.bin", text)
    (tmp_path / "meta.json").write_text(json.dumps({"corpus": "pydoc"}))
    assert validation_of(corpus, DATA_PATH=str(tmp_path)).corpus == "pydoc"
    write_shard(tmp_path / "fineweb_val_000000.bin", [*text, 512])
    with pytest.raises(tg.UserError, match="512.*VOCAB_SIZE"):
        validation_of(corpus, DATA_PATH=str(tmp_path))


def test_validation_whose_bytes_are_not_those_of_its_text_is_refused(corpus, sp, tmp_path):
    """A piece with two leading blanks decodes to fewer bytes than the challenge's rule counts."""
    text, path = "▁▁th".encode(), tmp_path / "tokenizer.model"
    path.write_bytes(edited(sp, "▁the", bytes([0x0A, len(text)]) + text).serialized_model_proto())
    with pytest.raises(tg.UserError, match="do not belong together"):
        validation_of(corpus, TOKENIZER_PATH=str(path))


# ----------------------------------------------------------------------------------------------------------
# Bytes counted by a file beside the shards
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def transformed(corpus, tmp_path):
    """The corpus with a sidecar that no table of pieces agrees with; its folder, and the counts."""
    shutil.copytree(corpus["DATA_PATH"], tmp_path / "data")
    tokens = tg.read_split(corpus["DATA_PATH"], "val")[0]
    counts = np.random.default_rng(1).integers(0, 900, len(tokens))
    counts[0] = 60_000  # of the one token that is nobody's target
    write_shard(tmp_path / "data/fineweb_val_bytes_000000.bin", counts)
    return tmp_path / "data", counts


def test_a_sidecar_counts_in_place_of_the_table(corpus, checked, transformed):
    """Each target at its own place; the same shards without it are charged by their pieces."""
    table, _, tokens = checked
    folder, counts = transformed
    found = validation_of(corpus, DATA_PATH=str(folder))
    assert found.sidecar and torch.equal(found.tokens, tokens) and found.byte_counts.dtype == torch.int32
    assert found.byte_counts.tolist() == counts[1 : len(tokens)].tolist()
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    found = validation_of(corpus, DATA_PATH=str(folder))
    assert not found.sidecar and torch.equal(found.byte_counts, table.count(tokens[:-1], tokens[1:]))


def test_a_sidecar_goes_on_over_shards_that_are_cut(corpus, transformed):
    folder, counts = transformed
    text = tg.read_split(str(folder), "val")[0].tolist()
    for number, (start, end) in enumerate([(0, 1000), (1000, 1003), (1003, None)]):
        write_shard(folder / f"fineweb_val_{number:06d}.bin", text[start:end])
        write_shard(folder / f"fineweb_val_bytes_{number:06d}.bin", counts[start:end])
    found = validation_of(corpus, DATA_PATH=str(folder))
    assert found.tokens.tolist() == text[: len(found.tokens)]
    assert found.byte_counts.tolist() == counts[1 : len(found.tokens)].tolist()


@pytest.mark.parametrize("more", [-1, 1])
def test_a_sidecar_of_other_size_is_refused(corpus, transformed, more):
    folder, counts = transformed
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.resize(counts, len(counts) + more))
    sizes = f"{len(counts) + more} tokens.*hold {len(counts)};"
    with pytest.raises(tg.UserError, match=rf"data/fineweb_val_bytes_.*{sizes}"):
        validation_of(corpus, DATA_PATH=str(folder))


def test_a_damaged_sidecar_is_named(corpus, transformed):
    (transformed[0] / "fineweb_val_bytes_000000.bin").write_bytes(b"x" * 2000)
    with pytest.raises(tg.UserError, match="fineweb_val_bytes_000000.bin is not a token shard"):
        validation_of(corpus, DATA_PATH=str(transformed[0]))


def test_a_sidecar_lifts_the_check_of_the_table_but_not_that_of_the_tokenizer(corpus, checked, tmp_path):
    """Bytes of transformed text are not those of the original; the ids are the tokenizer's all the same."""
    table, processor, tokens = checked
    WRONG["spaces twice"](table)
    tg.check_tokenizer(table, tokens, sidecar=True)
    other = trained(tmp_path / "other.model", processor.decode(tokens[1:].tolist())[::-1])
    with pytest.raises(tg.UserError, match="do not belong together"):
        tg.check_tokenizer(tg.ByteTable(other), tokens, sidecar=True)


def test_training_text_beside_a_sidecar_is_not_held_to_the_table(corpus, transformed):
    folder, _ = transformed
    hp = tg.Hyperparameters.from_env(corpus | {"PRESET": "smoke", "DEVICE": "cpu", "DATA_PATH": str(folder)})
    world = tg.World(hp, {})
    found = tg.Validation.load(hp, world)
    WRONG["spaces twice"](found.table)
    with contextlib.chdir(folder):
        tg.open_run(hp, world, found)
        with pytest.raises(tg.UserError, match="bytes counted"):
            tg.open_run(hp, world, dataclasses.replace(found, sidecar=False))


@pytest.mark.whole
def test_a_run_says_which_counted_and_an_artifact_is_scored_with_a_sidecar(tiny, transformed, capsys):
    """Its training loss, too, is told in bits per byte of the original text."""
    folder, counts = transformed
    small = {"ITERATIONS": "2", "WARMUP_STEPS": "0", "TTT_ENABLED": "0", "SKIP_SLIDING": "1"}
    env = tiny | small | {"DATA_PATH": str(folder), "RUN_ID": "run", "TRAIN_LOG_EVERY": "1"}
    assert run_here(folder, env) == 0
    out = capsys.readouterr().out
    result = result_of(folder)
    positions, size = result["val_tokens"], result["val_bytes"]
    assert size == int(counts[1 : positions + 1].sum()) and f"val_bytes:{size} counted_by:sidecar" in out
    assert result["bpb"]["roundtrip"] == pytest.approx(
        result["val_loss"]["roundtrip"] * positions / size / math.log(2), rel=1e-9
    )
    told = re.search(r"step:2/2 train_loss:(\S+) train_bpb:(\S+)", out)
    assert float(told[2]) == pytest.approx(float(told[1]) * positions / size / math.log(2), abs=1e-4)

    scored = {"ARTIFACT": "logs/run/artifact.bin", "STAGES": "evaluate", "RUN_ID": "again"}
    assert run_here(folder, env | scored) == 0
    assert result_of(folder, "again")["bpb"]["roundtrip"] == result["bpb"]["roundtrip"]
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    capsys.readouterr()
    assert run_here(folder, env | scored | {"RUN_ID": "pieces"}) == 0
    assert "counted_by:tokenizer" in capsys.readouterr().out
    assert result_of(folder, "pieces")["bpb"]["roundtrip"] > 9 * result["bpb"]["roundtrip"]
