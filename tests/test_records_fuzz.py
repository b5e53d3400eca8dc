"""Damaged files of a run: every program ends in a mistake of few lines, or writes a page without their code.

The mutants come from a seed; a failure names the file as it was. `python tests/test_records_fuzz.py 20000 7`
tries more of them, from another seed.
"""

import copy
import json
import random
import re
import sys
from pathlib import Path

import audit
import compare
import pytest
import report
import runs as shared
import submit
import summary
from test_report import TECHNIQUES, metrics, result_of

import train_gpt as tg

MUTANTS = 600
DRAWN = 200  # one in so many is drawn, too
READERS = {
    "result.json": ("report", "reports", "summary", "submit", "compare", "audit"),
    "audit.json": ("submit",),
    "techniques.json": ("report", "submit"),
    "metrics.jsonl": ("reports", "compare"),
}
SCRIPT = "<script>alert(1)</script>"
ODD = [
    None, True, False, 0, 1, -1, 3, 0.5, 1e-320, 1e308, -1e308, 1e18, 10**30, 10**400, float("nan"),
    float("inf"), "", "x", SCRIPT, f"'\"|`{SCRIPT}`|$x^{{2}}$ | \n# a", "\ud800", "\x00\x1b[31m", "../../x",
    "7" * 5000, [], [1], [[1, 2], {}], {}, {"a": 1}, {SCRIPT: 1}, {"": None}, {SCRIPT: {"bytes": 2}},
    {SCRIPT: {"limit": 1, "used": 2, "within": False, "counted": {SCRIPT: 1.5}, "uncounted": {SCRIPT: 2}}},
    {SCRIPT: {"loss": 1.0, "loss_without": 2.0}}, {f"blocks.0.{SCRIPT}.weight": [1.0, 0.5]},
]  # fmt: skip
WHOLE = [
    b"", b"{", b"[1]", b"null", b"1", b'"x"', b'{"bpb": null}', b'{"seed": 1, "seed": 2}', b"\xff\xfe{\x00",
    b"[" * 100_000, b'{"a":' * 100_000, b"\xef\xbb\xbf{}", b"NaN", b'{"seed": ' + b"9" * 5000 + b"}", b"\x00",
]  # fmt: skip
AUDIT = {
    "passed": True,
    "checks": [{"name": "causal", "status": "pass", "evidence": "64 positions"}] * 2,
    "positions": None,
}


def whole_run() -> dict[str, object]:
    """The files of a run with everything in it."""
    result = result_of(dtype="float32", scored_artifact_sha256="beef", started="noon", compiled=False)
    result["changed"] |= {"run_id": "r", "ve_layers": [1, 2], "ttt_lr": 0.1}
    result["settings"] = {"preset": "smoke", "ema_decay": 0.98, "swa_threshold": 0.2, "eval_seq_len": 256}
    result["settings"] |= {"data_path": "data/x", "tokenizer_path": "x.model", **result["changed"]}
    result["scored_with"] = {key: result[key] for key in ("preset", "seed", "changed", "settings", "dtype")}
    return {
        "result.json": result,
        "audit.json": AUDIT,
        "techniques.json": TECHNIQUES,
        "metrics.jsonl": metrics(8),
    }


def places(value, path=()):
    """The paths to all parts of a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def mutated(value, rng: random.Random):
    """A copy with one to three parts replaced, removed, renamed or moved."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *way, last = rng.choice([path for path in places(value) if path] or [(0,)])
        host = value
        for key in way:
            host = host[key]
        if not host:
            return rng.choice(ODD)
        action = rng.choice(("replace", "replace", "replace", "remove", "rename", "other"))
        if action == "replace":
            host[last] = copy.deepcopy(rng.choice(ODD))
        elif action == "remove":
            del host[last]
        elif action == "rename" and isinstance(host, dict):
            host[rng.choice((SCRIPT, "", "a|b", "\x07", "ttt", "0", "x" * 300))] = host.pop(last)
        else:
            host[last] = copy.deepcopy(rng.choice([*(host.values() if isinstance(host, dict) else host)]))
    return value


def written(name: str, value) -> str:
    """A file's text: of a list one line for each part, or JSON."""
    return "\n".join(map(json.dumps, value)) if type(value) is list and name[-1] == "l" else json.dumps(value)


def damaged(name: str, value, rng: random.Random) -> bytes:
    """A mutant of a file: of its values, or of its bytes."""
    kind = rng.random()
    if kind < 0.08:
        return rng.choice(WHOLE)
    value = mutated(value, rng) if kind < 0.9 else value
    text = written(name, value)
    if kind < 0.9:
        return text.encode()
    data = bytearray(text.encode(rng.choice(("utf-8", "utf-8", "utf-16", "utf-8-sig"))))
    at = rng.randrange(len(data))
    return rng.choice((
        bytes(data[:at]), bytes(data[:at]) + bytes([rng.randrange(256)]) + bytes(data[at:]),
        bytes(data[:at]) + bytes([data[at] ^ 1 << rng.randrange(8)]) + bytes(data[at + 1 :]),
        bytes(data).replace(b"1", b"1e999"), bytes(data) * 2,
    ))  # fmt: skip


def programs(folder: Path, other: shared.Run) -> dict:
    """What each program does with a run's folder; they hand back the texts that they would write."""

    def submitted():
        pair = [shared.Run.open(folder), other]
        lines = list(submit.breaches(pair))
        assert all(re.fullmatch(r"train_seed\d{1,10}(_\d+)?\.log", name) for name in submit.log_names(pair))
        json.dumps(submit.submission(pair, lines, {}), allow_nan=False)
        fenced = submit.readme(pair, "A title", "", lines).split("```")
        return "".join(fenced[::2])  # between the fences stands a command, as it is typed

    def compared():
        run = shared.Run.open(folder)
        compare.report([run, other], compare.Reference("B", runs=(other,)))
        compare.report([run], compare.Reference("x", bpb=compare.Sample(1.1, 0.01, 3)))

    def audited():
        result = audit.read_result(folder / "artifact.bin")
        audit.check_identity(b"blob", result)
        for clock in ("training", "evaluation"):
            audit.check_clock(clock, result, "ttt")
        audit.run_settings(result, {"PRESET": "smoke"}, {})

    def drawn():
        pair = [shared.Run.open(folder), other]
        for figure in (report.draw_loss(pair, report.SMALL, "seconds"), report.draw_ttt(pair, report.SMALL)):
            report.as_svg(figure, "a label")

    return {
        "report": lambda: report.page([shared.Run.open(folder)]),
        "reports": lambda: report.page([other, shared.Run.open(folder)]),
        "summary": lambda: summary.summary(folder, None) and "",  # of a console
        "submit": submitted,
        "compare": compared,
        "audit": audited,
        "draw": drawn,
    }


def try_mutants(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Let the programs read so many mutants; how many of their runs ended in a mistake, and how many not."""
    rng, files, ends = random.Random(seed), whole_run(), {"mistake": 0, "fine": 0}
    for name in ("mutant", "other"):
        (folder / name).mkdir()
    texts = {name: written(name, value) for name, value in files.items()}
    for name, text in texts.items():
        (folder / "other" / name).write_text(text)
        (folder / "mutant" / name).write_text(text)
    other = shared.Run.open(folder / "other")
    weights = {"result.json": 6, "audit.json": 1, "techniques.json": 1, "metrics.jsonl": 2}
    for i in range(count):
        name = rng.choices([*weights], weights.values())[0]
        data = damaged(name, files[name], rng)
        (folder / "mutant" / name).write_bytes(data)
        todo = programs(folder / "mutant", other)
        for program in (*READERS[name], *["draw"] * (i % DRAWN == 0)):
            try:
                page = todo[program]() or ""
            except (shared.Mistake, tg.UserError) as error:
                ends["mistake"] += 1
                lines = str(error).splitlines()
                assert 1 <= len(lines) <= 9 and max(map(len, lines)) < 400, (program, name, data[:2000])
            except Exception as error:
                raise AssertionError(f"{program} of {name}: {data[:3000]!r}") from error
            else:
                ends["fine"] += 1
                page.encode()
                assert "<script" not in page, (program, name, data[:3000])
        (folder / "mutant" / name).write_text(texts[name])
    return ends


@pytest.mark.whole
def test_damaged_files_end_in_a_mistake_or_in_a_clean_page(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "picture", lambda *_, **__: "")
    ends = try_mutants(tmp_path, MUTANTS, seed=1)
    assert min(ends.values()) > MUTANTS


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        import tempfile

        patch.setattr(report, "picture", lambda *_, **__: "")
        with tempfile.TemporaryDirectory() as place:
            print(try_mutants(Path(place), int(sys.argv[1]), int(sys.argv[2])))
