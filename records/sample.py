"""Let the packed model of a run speak.

    python records/sample.py logs/RUN --prompt "My fellow citizens"
    python records/sample.py logs/RUN --tokens 300 --temperature 0.7 --top-p 0.9 --seed 7

The weights come from artifact.bin alone, the tokenizer from the run's settings. Tokens are printed as they
come; the end of a document ends the text.
"""
from __future__ import annotations

import runs as shared

# isort: split
import sys
from collections.abc import Iterator
from pathlib import Path

from runs import ROOT, Mistake, Run, script


def find_file(path: str, run: Run) -> Path:
    """A path of a run's settings, from here, from the run's own place, or from the repository's root."""
    places = [Path(path), run.folder.resolve().parent.parent / path, ROOT / path]
    found = [place for place in places if place.is_file()]
    if not found:
        raise Mistake(f"tokenizer {path} is missing; name it with --tokenizer")
    return found[0]


def load(run: Run, tokenizer: Path | None, device: str):
    """The model from the run's artifact, its settings, the tokenizer, and the process that computes."""
    tg = script()
    path = run.folder / "artifact.bin"
    if not path.is_file():
        raise Mistake(f"{path} is missing; run STAGES=quantize under the same RUN_ID")
    known = tg.Hyperparameters.fields()
    settings = {name: value for name, value in run.settings.items() if name in known}
    try:
        hp = tg.Hyperparameters(**settings | {"device": device})
        world = tg.World(hp, {})
        model, _ = tg.load_artifact(path.read_bytes(), hp, world)
        hp = model.use(tg.choose_attention(model.hp, world)[1]).hp
        words = tg.load_tokenizer(str(tokenizer or find_file(hp.tokenizer_path, run)), hp.vocab_size)
    except ValueError as error:
        raise Mistake(str(error)) from None
    return model.eval(), hp, words, world


def choose(logits, temperature: float, top_p: float, generator) -> int:
    """Draw a token from the smallest set of the likeliest ones whose probabilities reach top_p.

    logits (V,); temperature 0 takes the likeliest token.
    """
    import torch

    if temperature == 0:
        return int(logits.argmax())
    odds, tokens = torch.softmax(logits.double().cpu() / temperature, -1).sort(descending=True)
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


def program() -> None:
    """The command line."""
    parser = shared.parser(__doc__)
    parser.add_argument("run", metavar="LOGS", help="the folder of a finished run")
    parser.add_argument("--prompt", default="", help="the text to continue (default: a document's start)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add, at most (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    top_p = "share of the probability to draw from (0.95)"
    parser.add_argument("--top-p", type=float, default=0.95, help=top_p)
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: the run's)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    arguments = parser.parse_args()
    lowest = min(arguments.tokens - 1, arguments.temperature, arguments.seed)
    if lowest < 0 or not 0 < arguments.top_p <= 1:
        raise Mistake("--tokens must be at least 1, --temperature and --seed at least 0, --top-p in (0, 1]")
    model, hp, words, world = load(Run.open(arguments.run), arguments.tokenizer, arguments.device)

    import torch

    generator = torch.Generator().manual_seed(arguments.seed)
    prompt = [script().BOS, *words.encode(arguments.prompt)]
    pick = lambda logits: choose(logits, arguments.temperature, arguments.top_p, generator)
    tokens = generate(model, world, prompt, arguments.tokens, hp.eval_seq_len, pick)
    for text in stream(words, prompt, tokens):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(shared.exit_status(program))
