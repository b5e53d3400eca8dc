"""Let a packed model speak.

    python records/sample.py logs/RUN --prompt "My fellow citizens"
    python records/sample.py logs/RUN --tokens 300 --temperature 0.7 --top-p 0.9 --seed 7
    python records/sample.py path/to/artifact.bin --tokenizer path/to/model

The weights come from the artifact alone, tokenizer and context window from the run, or from the preset of a
file by itself. Tokens are printed as they come; the end of a document ends the text.
"""
from __future__ import annotations

import runs as shared

# isort: split
import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from runs import ROOT, Mistake, Run, script

RUNS_OWN = ("dtype", "eval_seq_len", "tokenizer_path")  # settings of a run that sampling follows


def find_file(path: str, run: Run | None) -> Path:
    """A path of some settings, from here, from the run's own place, or from the repository's root."""
    above = [run.folder.resolve().parent.parent] if run else []
    found = [place / path for place in (Path(), *above, ROOT) if (place / path).is_file()]
    if not found:
        raise Mistake(f"tokenizer {path} is missing; name it with --tokenizer")
    return found[0]


@contextlib.contextmanager
def told_of(path: Path) -> Iterator[None]:
    """A mistake of the script's with the name of the file that it is about."""
    try:
        yield
    except script().UserError as error:
        raise Mistake(f"{path}: {'; '.join(str(error).splitlines())}") from None


def load(place: Path, tokenizer: Path | None, device: str):
    """The model of a run's folder or of a file, its settings, tokenizer, and the process that computes."""
    tg, path = script(), place / "artifact.bin" if place.is_dir() else place
    alone = path.is_file() and not (place / "result.json").is_file()
    run = Run.open(place) if place.is_dir() and not alone else None
    if not path.is_file():
        remedy = "run STAGES=quantize under the same RUN_ID" if run else "name a run's folder or an artifact"
        raise Mistake(f"{path} is missing; {remedy}")
    settings = {name: run.settings[name] for name in RUNS_OWN if name in run.settings} if run else {}
    env, blob = {name.upper(): str(value) for name, value in settings.items()}, path.read_bytes()
    with told_of(path):
        hp = tg.settings_for(blob, env | {"DEVICE": device})
    world = tg.World(hp, {})
    tg.choose_dtype(hp, world)
    with told_of(path):
        model = tg.load_artifact(blob, hp, world)[0].use(tg.choose_attention(hp, world)[1])
    words = find_file(str(tokenizer or hp.tokenizer_path), run)
    try:
        return model.eval(), hp, tg.load_tokenizer(str(words), hp.vocab_size), world
    except tg.UserError as error:
        told = str(error).split(";")[0].replace("VOCAB_SIZE=", "the model's vocabulary has ")
        raise Mistake(f"{told}; name the model's own tokenizer with --tokenizer") from None


def choose(logits, temperature: float, top_p: float, generator) -> int:
    """Draw a token from the smallest set of the likeliest ones whose probabilities reach top_p.

    logits (V,); temperature 0 takes the likeliest token.
    """
    import torch

    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double().cpu()
    if not logits.isfinite().all():
        raise Mistake("the model's logits are not finite; the artifact is damaged")
    odds = torch.softmax((logits - logits.max()) / temperature, -1)  # so that no quotient is infinite
    odds, tokens = odds.sort(descending=True)
    before = odds.cumsum(-1) - odds  # what the likelier ones hold; the first is always kept
    odds = odds * (before < top_p)
    return int(tokens[torch.multinomial(odds, 1, generator=generator)])


def generate(model, world, tokens: list[int], count: int, window: int, pick) -> Iterator[int]:
    """Up to `count` tokens that continue `tokens`, each from the last `window` ones."""
    import torch

    tokens = list(tokens)
    for _ in range(count):
        context = torch.tensor([tokens[-window:]], device=world.device)
        with torch.no_grad(), world.autocast():
            logits = model.logits(model.hidden(context)[0, -1])
        tokens.append(pick(logits))
        yield tokens[-1]


def stream(words, prompt: list[int], tokens: Iterator[int]) -> Iterator[str]:
    """The text of a prompt, then what each token adds to it, up to the end of the document.

    Bytes of a character that is not whole yet are held back.
    """
    ids, shown = list(prompt), words.decode(prompt)
    yield shown
    for token in tokens:
        if words.is_control(token):
            break
        ids.append(token)
        text = words.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = words.decode(ids)
    yield text[len(shown) :]


def utf8(argument: str) -> str:
    """The text of an argument, whatever the locale. Raises Mistake where its bytes are no UTF-8."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        raise Mistake("--prompt is not text in UTF-8") from None


def program() -> None:
    """The command line."""
    parser = shared.parser(__doc__)
    parser.add_argument("run", metavar="LOGS", type=Path, help="a finished run's folder, or an artifact")
    parser.add_argument("--prompt", default="", help="the text to continue (default: a document's start)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add, at most (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    top_p = "share of the probability to draw from (0.95)"
    parser.add_argument("--top-p", type=float, default=0.95, help=top_p)
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: the run's)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    arguments = parser.parse_args()
    temperature, prompt = arguments.temperature, utf8(arguments.prompt)
    if arguments.tokens < 1 or not 0 <= temperature < math.inf or not 0 < arguments.top_p <= 1:
        raise Mistake("--tokens must be at least 1, --temperature at least 0 and finite, --top-p in (0, 1]")
    if not 0 <= arguments.seed < 2**64:
        raise Mistake("--seed must be at least 0 and below 2^64")
    model, hp, words, world = load(arguments.run, arguments.tokenizer, arguments.device)

    import torch

    generator = torch.Generator().manual_seed(arguments.seed)
    prompt = [script().BOS, *words.encode(prompt)]
    pick = lambda logits: choose(logits, temperature, arguments.top_p, generator)
    tokens = generate(model, world, prompt, arguments.tokens, hp.eval_seq_len, pick)
    for text in stream(words, prompt, tokens):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(shared.exit_status(program))
