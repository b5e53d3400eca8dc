"""records/sample.py: what is drawn, what is printed and when, and a packed model that speaks."""

import subprocess
import sys

import pytest
import runs as shared
import sample
import torch
from conftest import ROOT, run_here

import train_gpt as tg

LOGITS = torch.tensor([0.5, 2.0, 1.0, -1.0, 1.5])


def draws(count, temperature=1.0, top_p=1.0):
    generator = torch.Generator().manual_seed(1)
    return [sample.choose(LOGITS, temperature, top_p, generator) for _ in range(count)]


def test_temperature_zero_takes_the_likeliest():
    assert set(draws(5, temperature=0.0)) == {1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_that_temperature(temperature):
    counts = torch.bincount(torch.tensor(draws(4000, temperature=temperature)), minlength=5) / 4000
    assert torch.allclose(counts, torch.softmax(LOGITS / temperature, 0), atol=0.03)


@pytest.mark.parametrize("temperature", [1e-320, 1e-300, 1e-3])
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    assert set(draws(5, temperature=temperature)) == {1}


def test_a_huge_temperature_draws_evenly():
    counts = torch.bincount(torch.tensor(draws(4000, temperature=1e308)), minlength=5) / 4000
    assert torch.allclose(counts, torch.full((5,), 0.2), atol=0.03)


def test_logits_that_are_not_finite_are_a_mistake():
    with pytest.raises(shared.Mistake, match="not finite"):
        sample.choose(torch.tensor([0.0, float("nan")]), 1.0, 1.0, None)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    """The likeliest tokens are 1, 4 and 2: two of them hold less than 0.8, three more."""
    odds = torch.softmax(LOGITS, 0)
    assert odds[1] + odds[4] < 0.8 < odds[1] + odds[4] + odds[2]
    assert set(draws(300, top_p=0.8)) == {1, 4, 2}
    assert set(draws(300, top_p=1e-6)) == {1}
    assert set(draws(2000, top_p=1.0)) == {0, 1, 2, 3, 4}


class Counting:
    """A model whose next token is the number of tokens it was shown."""

    def hidden(self, tokens):
        self.seen = tokens
        return torch.zeros(1, tokens.size(1), 1)

    def logits(self, hidden):
        return torch.nn.functional.one_hot(torch.tensor(self.seen.size(1)), 64).float()


def test_context_grows_to_the_window_and_is_its_end():
    world, model = tg.World(tg.Hyperparameters(device="cpu", dtype="fp32"), {}), Counting()
    out = list(sample.generate(model, world, [9, 8], 5, 4, lambda logits: int(logits.argmax())))
    assert out == [2, 3, 4, 4, 4]
    assert model.seen.tolist() == [[2, 3, 4, 4]]


def test_text_comes_token_by_token_and_characters_whole(corpus):
    words = tg.load_tokenizer(corpus["TOKENIZER_PATH"], 512)
    prompt, rest = words.encode("The"), words.encode(" value of \u20ac is an int")
    assert any(words.is_byte(token) for token in rest)
    pulled = []
    texts = sample.stream(words, prompt, (pulled.append(token) or token for token in rest))
    assert next(texts) == "The" and not pulled
    assert next(texts) and len(pulled) == 1
    others = list(texts)
    assert not any("\ufffd" in text for text in others)
    assert words.decode(prompt + rest).endswith("".join(others)) and "\u20ac" in "".join(others)


def test_the_end_of_a_document_ends_the_text(corpus):
    words = tg.load_tokenizer(corpus["TOKENIZER_PATH"], 512)
    tokens = words.encode("one two")
    assert "".join(sample.stream(words, tokens, iter([tg.BOS, *words.encode("three")]))) == "one two"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    """A trained and packed model."""
    folder = tmp_path_factory.mktemp("sample")
    short = {"RUN_ID": "run", "STAGES": "train,quantize", "ITERATIONS": "8", "WARMUP_STEPS": "0"}
    assert run_here(folder, tiny | short) == 0
    return folder / "logs" / "run"


def speak(capsys, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
    status = shared.exit_status(sample.program)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.whole
def test_the_packed_model_speaks(run, capsys, monkeypatch):
    def text(*words):
        status, out, err = speak(capsys, monkeypatch, run, "--tokens", 12, *words)
        assert status == 0 and not err
        return out

    first = text("--prompt", "The value of", "--seed", 3)
    assert first.startswith("The value of") and len(first.strip()) > len("The value of")
    assert text("--prompt", "The value of", "--seed", 3) == first
    assert text("--prompt", "The value of", "--seed", 4) != first
    likeliest = ("--prompt", "The value of", "--temperature", 0, "--seed")
    assert text(*likeliest, 3) == text(*likeliest, 4) != first


@pytest.mark.whole
def test_samples_come_from_the_artifact(run, capsys, monkeypatch, tmp_path, tiny):
    """Another model in artifact.bin says something else; none, or half of one, says what to do."""
    copy = tmp_path / "logs" / "copy"
    copy.mkdir(parents=True)
    (copy / "result.json").write_text((run / "result.json").read_text())
    assert "artifact.bin is missing" in speak(capsys, monkeypatch, copy)[2]
    blob = (run / "artifact.bin").read_bytes()
    (copy / "artifact.bin").write_bytes(blob[:-40])
    status, _, err = speak(capsys, monkeypatch, copy)
    assert status == 1 and err.startswith("error:") and len(err.splitlines()) == 1
    config, tensors = tg.unpack(blob)
    tensors["tok_emb.weight"].codes.copy_(tensors["tok_emb.weight"].codes.flip(0))
    (copy / "artifact.bin").write_bytes(tg.pack(config, tensors))
    options = ("--tokens", 12, "--temperature", 0)
    assert speak(capsys, monkeypatch, copy, *options)[1] != speak(capsys, monkeypatch, run, *options)[1]


@pytest.mark.whole
def test_an_artifact_and_a_tokenizer_are_enough(run, capsys, monkeypatch, tmp_path, tiny):
    """No result.json: the context window is the preset's, 256, where the run's was 128."""
    blob = run / "artifact.bin"
    (tmp_path / "some.bin").write_bytes(blob.read_bytes())
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/artifact.bin").write_bytes(blob.read_bytes())
    windows, generate = [], sample.generate

    def watched(model, world, tokens, count, window, pick):
        windows.append(window)
        return generate(model, world, tokens, count, window, pick)

    monkeypatch.setattr(sample, "generate", watched)
    monkeypatch.chdir(tmp_path)
    options = ("--tokens", 9, "--seed", 2, "--prompt", "The value of")
    said = [
        speak(capsys, monkeypatch, place, "--tokenizer", tiny["TOKENIZER_PATH"], *options)
        for place in ("some.bin", "alone", run)
    ]
    assert said[0] == said[1] and all(status == 0 and not err for status, _, err in said)
    assert said[0][1].startswith("The value of") and len(said[0][1]) > len("The value of\n")
    assert windows == [256, 256, 128]
    monkeypatch.setattr(sample, "ROOT", tmp_path)
    status, _, err = speak(capsys, monkeypatch, "some.bin", *options)
    assert status == 1 and err.endswith("sotu_4096_bpe.model is missing; name it with --tokenizer\n")
    (tmp_path / "some.bin").write_bytes(blob.read_bytes()[:500])
    status, _, err = speak(capsys, monkeypatch, "some.bin", *options)
    assert status == 1 and err.startswith("error: some.bin: ") and len(err.splitlines()) == 1


@pytest.mark.whole
def test_a_tokenizer_of_another_model_is_told(run, capsys, monkeypatch, tmp_path):
    import sentencepiece

    model = tmp_path / "small.model"
    with open(model, "wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(["one two three"]), model_writer=file, vocab_size=20, model_type="bpe",
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model)).get_piece_size()
    status, _, err = speak(capsys, monkeypatch, run, "--tokenizer", model)
    told = f"{model} has {pieces} pieces, but the model's vocabulary has 512; name the model's own tokenizer"
    assert status == 1 and err == f"error: {told} with --tokenizer\n"
    model.write_bytes(b"no model")
    status, _, err = speak(capsys, monkeypatch, run, "--tokenizer", model)
    assert status == 1 and str(model) in err and "--tokenizer" in err and len(err.splitlines()) == 1


@pytest.mark.whole
@pytest.mark.parametrize(
    "words, part",
    [
        (["--tokens", "0"], "at least 1"),
        (["--tokens", "x"], "invalid int value"),
        (["--temperature", "nan"], "finite"),
        (["--temperature", "inf"], "finite"),
        (["--top-p", "nan"], "(0, 1]"),
        (["--seed", str(2**70)], "below 2^64"),
        (["--seed", "-1"], "at least 0"),
        (["--prompt", "a\udcff"], "not text in UTF-8"),
        (["--prompt", "a\ud800"], "not text in UTF-8"),
        (["--top-p", "0"], "(0, 1]"),
        (["--temperature", "-1"], "at least 0"),
        (["--tokenizer", "nowhere.model"], "nowhere.model is missing"),
    ],
)
def test_mistakes_are_one_line(run, capsys, monkeypatch, words, part):
    status, out, err = speak(capsys, monkeypatch, run, *words)
    assert status == 1 and not out and err.startswith("error:") and len(err.splitlines()) == 1 and part in err


@pytest.mark.whole
def test_command_line_of_an_empty_folder(tmp_path):
    command = [sys.executable, str(ROOT / "records/sample.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error:") and "Traceback" not in done.stderr
