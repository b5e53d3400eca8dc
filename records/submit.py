"""Write a submission folder for the challenge from the runs of one configuration.

    python records/submit.py logs/SEED1337 logs/SEED42 logs/SEED7 \\
        --name "Int5 GPTQ with live QAT" --author "A. Person" --github-id aperson
    python records/submit.py --pack-source packed/train_gpt.py       before the runs: fewer bytes of code

The folder holds README.md, submission.json, the runs' logs, train_gpt.py (the very script of the runs, taken
from their logs) and requirements.txt: copy it under records/ of the challenge's repository. What the rules
ask is checked first: one script, one configuration, three seeds, the byte cap, both clocks, and the audit of
each artifact (audit.json beside it). With --non-record a breach only warns, and the README repeats it.

--pack-source writes train_gpt.py without comments and docstrings, compressed, as a script that unpacks
itself. A run counts the file that runs, so make the runs with it; its first line names the readable one.
"""
from __future__ import annotations

import runs as shared

# isort: split
import argparse
import ast
import base64
import hashlib
import json
import lzma
import re
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from itertools import chain
from pathlib import Path

from runs import BOOKKEEPING, ROOT, SCORES, Mistake, Run, as_code, as_markdown, open_runs, show

LIMIT_BYTES, LIMIT_SECONDS, SEEDS = 16_000_000, 600.0, 3
DATA_ROOT = "../../../data"  # of the challenge's repository, seen from records/TRACK/FOLDER
AUDIT = {"passed": shared.FLAG, "checks": [{
    "name": shared.Kind("a name", lambda value: shared.TEXT.holds(value) and value != ""),
    "status": shared.Kind("a verdict", lambda value: value in ("pass", "fail", "not checked")),
    "evidence?": shared.STRING}]}


# The script, packed

PACKED = "# train_gpt.py of SHA-256 {}, without comments and docstrings, compressed\n"


def packed_source(source: bytes) -> bytes:
    """A script that unpacks and runs another; of its docstrings the first stays, which --help shows."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0}]
    small = lzma.compress(ast.unparse(tree).encode(), lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)
    return (
        PACKED.format(hashlib.sha256(source).hexdigest()) + "import base64,lzma\n"
        f'exec(compile(lzma.decompress(base64.b85decode("{base64.b85encode(small).decode()}")),__file__,"exec"))\n'
    ).encode()


class PackSource(argparse.Action):
    """--pack-source FILE: write it and end, as --help does."""

    def __call__(self, parser, namespace, values, option_string=None):
        source = (ROOT / "train_gpt.py").read_bytes()
        packed = packed_source(source)
        try:
            values.parent.mkdir(parents=True, exist_ok=True)
            shared.write_atomically(values, packed)
        except OSError as error:
            raise Mistake(f"{values} cannot be written: {error.strerror}") from None
        print(f"{values}: {len(packed):,} bytes, train_gpt.py has {len(source):,}")
        parser.exit()


# What the runs hand in


def script_of(run: Run) -> bytes:
    """The source that opens a run's log. Raises Mistake where the hash is not the run's."""
    path = run.folder / "log.txt"
    if not path.is_file():
        raise Mistake(f"{path} is missing; a submission holds the logs of its runs")
    log, wanted = path.read_bytes(), run.result.get("script_sha256")
    for end in re.finditer(rb"\nrun:", log):
        for source in (log[: end.start() + 1], log[: end.start()]):
            if hashlib.sha256(source).hexdigest() == wanted:
                return source
    raise Mistake(f"{path} does not begin with the script whose hash result.json names; it has been changed")


def packed_from(source: bytes) -> str:
    """Of what a packed script was made, for the README; nothing for a readable one."""
    found = re.match(re.escape(PACKED).replace(r"\{\}", "([0-9a-f]{64})"), source.decode())
    return f", packed from the readable one of SHA-256 {as_code(found[1])}" if found else ""


def audit_of(run: Run) -> dict | None:
    """The audit of a run's artifact; None where there is none. Raises Mistake where the file is damaged."""
    path = run.folder / "audit.json"
    if not path.is_file():
        return None
    return shared.read_json(path, AUDIT, "is not an audit's result", "run the audit again")


def final_score(runs: Sequence[Run]) -> str:
    """The last score that all runs have. Raises Mistake where they have none from an artifact."""
    names = [name for name in SCORES if name != "float" and all(name in run.nats for run in runs)]
    if not names:
        raise Mistake("these runs share no score that was taken from the artifact; run STAGES=evaluate")
    return names[-1]


# What the rules ask


def breaches(runs: Sequence[Run]) -> Iterator[str]:
    """One line for everything that keeps the runs from being a record."""
    hashes = {run.result.get("script_sha256") for run in runs}
    if len(hashes) > 1:
        yield f"the runs were made by {len(hashes)} different scripts; only one can be submitted"
    if mixed := shared.differing_settings(runs, besides=("seed",)):
        yield f"the runs differ in more than the seed: {', '.join(map(str.upper, mixed))}"
    seeds = {run.seed for run in runs}
    if len(seeds) < max(SEEDS, len(runs)):
        have = ", ".join(str(run.seed) for run in runs)
        yield f"the seeds of the runs are {have}; a record needs {SEEDS} seeds or more, each once"
    if len({tuple(run.bpb) for run in runs}) > 1:
        yield "the runs were not scored in the same stages"
    if len({(run.result["corpus"], run.result.get("val_bytes")) for run in runs}) > 1:
        yield "the runs were scored on different texts"
    for run in runs:
        yield from (f"{run.name}: {line}" for line in breaches_of(run))


def breaches_of(run: Run) -> Iterator[str]:
    """The breaches of a single run."""
    result = run.result
    artifact = result["artifact"]
    cap = min(LIMIT_BYTES, artifact.get("limit", LIMIT_BYTES))
    if not artifact:
        yield "it has no artifact"
    elif artifact["total_bytes"] > cap:
        yield f"{artifact['total_bytes']:,} bytes of code and model, over the cap of {cap:,}"
    if (scored := result.get("scored_with", {}).get("preset", result["preset"])) != result["preset"]:
        yield f"trained with the preset {result['preset']}, but scored with {scored}"
    if artifact and result.get("scored_artifact_sha256") != artifact.get("sha256"):
        yield "the score is not of the run's own artifact"
    for clock in ("training", "evaluation"):
        budget = result["budget"].get(clock)
        if budget is None:
            yield f"the {clock} clock was not read"
        elif budget["used"] > LIMIT_SECONDS or not budget["within"]:
            limit = min(LIMIT_SECONDS, budget["limit"] or LIMIT_SECONDS)
            yield f"{clock} took {budget['used']:.1f} s, over the clock of {limit:.0f} s"
    if "8x" not in result.get("hardware", "") or "H100" not in result.get("hardware", ""):
        yield f"made on {machine(run)}, where a record is made on 8xH100"
    if "fineweb" not in str(result["corpus"]).lower():
        yield f"scored on {result['corpus']}, where a record is scored on FineWeb"
    yield from audit_breaches(run)


def audit_breaches(run: Run) -> Iterator[str]:
    """What is wrong with a run's audit."""
    audit = audit_of(run)
    if audit is None:
        yield f"the artifact has not been audited; python records/audit.py {run.folder}/artifact.bin"
        return
    open_checks = [check for check in audit["checks"] if check["status"] != "pass"]
    wanting = [f"{check['name']} ({check['status']})" for check in open_checks]
    if not audit["passed"] or any(check["status"] == "fail" for check in audit["checks"]):
        yield f"the audit was not passed: {', '.join(wanting) or 'it names no check'}"


def machine(run: Run) -> str:
    """The device that a run was made on."""
    text = run.result.get("hardware", "an unknown machine").removeprefix("device:")
    return text.split(" threads:")[0].split(" python:")[0]


# The files


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of cells that are Markdown already; the first column is text, the others are numbers."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return "\n".join([line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, rows)])


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """1.11615 ± 0.00059; the mean alone where there is one value."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def results_table(runs: Sequence[Run]) -> str:
    """Scores, bytes and steps of each seed, and their mean."""
    names, final = [name for name in SCORES if all(name in run.bpb for run in runs)], final_score(runs)
    head = ["seed", *(f"{name}, bpb" for name in names), f"{final}, nats", "bytes", "steps", "ms/step"]
    rows = []
    for run in runs:
        scores = [f"{run.bpb[name]:.5f}" for name in names]
        size = run.result["artifact"].get("total_bytes")
        pace = f"{run.result.get('steps', 0):,}", f"{run.result.get('step_ms', 0):.1f}"
        rows.append([run.seed, *scores, f"{run.nats[final]:.5f}", f"{size:,}" if size else "none", *pace])
    means = [mean_and_deviation([run.bpb[name] for run in runs], 5) for name in names]
    loss = mean_and_deviation([run.nats[final] for run in runs], 5)
    return markdown_table(head, [*rows, ["**mean**", *means, loss, "", "", ""]])


def budget_table(runs: Sequence[Run]) -> str:
    """Seconds of every counted phase, and of the phases that do not count."""
    rows = []
    for clock in dict.fromkeys(clock for run in runs for clock in run.result["budget"]):
        budgets = [run.result["budget"].get(clock, {}) for run in runs]
        for kind, note in (("counted", ""), ("uncounted", " (not counted)")):
            for phase in dict.fromkeys(phase for budget in budgets for phase in budget.get(kind, {})):
                seconds = (f"{budget.get(kind, {}).get(phase, 0):.1f}" for budget in budgets)
                rows.append([as_markdown(f"{clock}: {phase}{note}"), *seconds])
        used = (f"**{budget.get('used', 0):.1f}**" for budget in budgets)
        rows.append([f"**{as_markdown(clock)}**, of {LIMIT_SECONDS:.0f} s", *used])
    return markdown_table(["seconds", *(f"seed {run.seed}" for run in runs)], rows)


def proof_rows(run: Run) -> dict[str, str]:
    """The measured traces of a run's techniques, by name."""
    proofs = run.result["proofs"]
    rows = {f"{name.replace('_', ' ')}: loss without it": f"{effect:+.4f}"
            for name, effect in run.techniques.items()}
    if qat := proofs.get("qat"):
        distances = f"{qat['distance_before']:.3f}, {qat['distance_raw']:.3f}"
        rows["QAT: first step"] = f"{qat['first_step']:.0f}"
        rows["QAT: distance to the grid, before and after"] = distances
        rows["QAT: loss by rounding"] = f"{qat['loss_rounded'] - qat['loss']:+.4f}"
    if averaging := proofs.get("averaging"):
        moved = f"{averaging.get('exported')}, {100 * averaging['distance_from_raw']:.2f} %"
        rows["averaging: exported, distance from the raw weights"] = moved
    for role in ("attn", "mlp"):
        if (part := proofs.get("quantizer", {}).get(role, {})).get("error_rounding"):
            share = f"{part['error'] / part['error_rounding']:.3f}"
            rows[f"{role}: error as a share of plain rounding's"] = share
    if ttt := proofs.get("ttt"):
        moved = f"{ttt['chunks']}, {ttt['steps']}, {100 * ttt['weight_change']:.2f} %"
        rows["test-time training: chunks, steps, change of the weights"] = moved
    if found := proofs.get("documents"):
        told = f"{found['documents']}, {found['steps']}, {found['untrained_documents']}"
        rows["test-time training: documents, steps, documents without"] = told
    return rows


def proofs_table(runs: Sequence[Run]) -> str:
    """The proofs of all runs side by side."""
    columns = [proof_rows(run) for run in runs]
    head = ["proof", *(f"seed {run.seed}" for run in runs)]
    names = dict.fromkeys(chain.from_iterable(columns))
    rows = [map(as_markdown, (name, *(column.get(name, "off") for column in columns))) for name in names]
    return markdown_table(head, rows)


def audit_table(runs: Sequence[Run]) -> str:
    """Every check of every run's audit with its evidence."""
    audits = [(run.seed, audit) for run in runs if (audit := audit_of(run))]
    rows = [map(as_markdown, (check["name"], seed, check["status"], check.get("evidence", "")))
            for seed, audit in audits for check in audit["checks"]]
    head = ["check", "seed", "status", "evidence"]
    return markdown_table(head, rows) if rows else "No artifact has been audited."


def changed_settings(run: Run) -> dict[str, str]:
    """The settings that were changed from the preset and decide what is computed, as one would type them."""
    kept = {name: value for name, value in run.changed.items() if name not in (*BOOKKEEPING, "seed")}
    return {name.upper(): show(value) for name, value in kept.items()}


def settings_text(run: Run) -> str:
    """The settings that were changed from the preset, as a table."""
    about, changed = f"The preset {as_code(run.result['preset'])} of the script", changed_settings(run)
    if not changed:
        return f"{about}, with nothing changed."
    rows = [map(as_code, setting) for setting in changed.items()]
    return f"{about}, with these changes:\n\n{markdown_table(['setting', 'value'], rows)}"


def reproduce_command(run: Run) -> str:
    """The command line that makes one of the runs again, from inside the folder."""
    name = lambda setting: Path(run.settings.get(setting, "")).name
    settings = {
        "PRESET": run.result["preset"], "SEED": run.seed,
        "DATA_PATH": f"{DATA_ROOT}/datasets/{name('data_path')}",
        "TOKENIZER_PATH": f"{DATA_ROOT}/tokenizers/{name('tokenizer_path')}"}
    settings |= changed_settings(run)
    given = (f"{name}={shlex.quote(str(value))}" for name, value in settings.items())
    processes = run.result.get("world_size", 1)
    return f"{' '.join(given)} \\\n    torchrun --standalone --nproc_per_node={processes} train_gpt.py"


def readme(runs: Sequence[Run], name: str, blurb: str, warnings: Sequence[str]) -> str:
    """README.md of the folder, every number from the runs."""
    final, first = final_score(runs), runs[0].result
    mean = mean_and_deviation([run.bpb[final] for run in runs], 5)
    count = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    about = f"{first['corpus']}, {first.get('val_tokens') or 0:,} positions, {machine(runs[0])}"
    about = as_markdown(about)
    parts = [f"# {as_markdown(name)}", f"**{mean} bits per byte** ({final}, {count}, {about})."]
    parts += [blurb] if blurb else []
    if warnings:
        lines = "\n".join(f"- {as_markdown(line)}" for line in warnings)
        parts += ["## What keeps this from being a record", lines]
    meaning = "; ".join(f"{key}: {text}" for key, text in SCORES.items())
    parts += [
        "## Results", results_table(runs), f"{meaning}.",
        "## Settings", settings_text(runs[0]),
        "## Clocks", budget_table(runs),
        "## Proofs",
        "Measured on the weights that are submitted; losses in nats on a batch of training text, where a "
        "technique of the model is switched off (`audit.py --techniques`) of validation text.",
        proofs_table(runs),
        "## Audit", audit_table(runs),
        "## Reproduce", f"From inside this folder, with the challenge's data under `{DATA_ROOT}`:",
        f"```\npip install -r requirements.txt\n{reproduce_command(runs[0])}\n```",
        f"Script SHA-256: {as_code(first.get('script_sha256', ''))}{packed_from(script_of(runs[0]))}. "
        f"Machine and versions: {as_code(first.get('hardware', ''))}.",
    ]
    return "\n\n".join(parts) + "\n"


def submission(runs: Sequence[Run], warnings: Sequence[str], given: dict[str, str]) -> dict:
    """submission.json of the folder; given: what only its author knows."""
    final = final_score(runs)
    bpb, nats = [run.bpb[final] for run in runs], [run.nats[final] for run in runs]
    deviation = lambda values: statistics.stdev(values) if len(values) > 1 else None
    artifacts = [run.result["artifact"] for run in runs]
    each = [
        {"seed": run.seed, "val_bpb": run.bpb[final], "val_loss": run.nats[final],
         "bytes_total": artifact.get("total_bytes"), "steps": run.result.get("steps")}
        for run, artifact in zip(runs, artifacts)]
    return {
        **given,
        "track": "non-record" if warnings else "record",
        "val_bpb": statistics.fmean(bpb),
        "val_bpb_deviation": deviation(bpb),
        "val_loss": statistics.fmean(nats),
        "val_loss_deviation": deviation(nats),
        "bytes_total": max(artifact.get("total_bytes", 0) for artifact in artifacts),
        "bytes_code": max(artifact.get("code_bytes", 0) for artifact in artifacts),
        "hardware": machine(runs[0]),
        "script_sha256": runs[0].result.get("script_sha256"),
        "runs": each}


def requirements() -> str:
    """What the script itself imports: the first group of requirements.txt."""
    groups = re.split(r"(?m)^#.*$", (ROOT / "requirements.txt").read_text(encoding="utf-8"))
    return next(group for group in groups if group.strip()).strip() + "\n"


def log_names(runs: Sequence[Run]) -> list[str]:
    """train_seed1337.log, ...; runs that share a seed are told apart by their place."""
    seeds = [run.seed for run in runs]
    place = lambda i: "" if seeds.count(seeds[i]) == 1 else f"_{i + 1}"
    return [f"train_seed{seed}{place(i)}.log" for i, seed in enumerate(seeds)]


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write a folder so that it is there whole or not at all; Mistake where it is not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        temporary.rename(folder)
    except OSError as error:
        raise Mistake(f"{folder} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def program() -> None:
    """The command line."""
    parser = shared.parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="LOGS", help="folders of finished runs, one for each seed")
    parser.add_argument("--name", required=True, help="the submission's title")
    parser.add_argument("--author", required=True)
    parser.add_argument("--github-id", required=True)
    parser.add_argument("--blurb", default="", help="one or two sentences on what is new")
    parser.add_argument("--date", help="YYYY-MM-DD (default: today)")
    parser.add_argument("--out", type=Path, help="the folder to write (default: submissions/DATE_NAME)")
    parser.add_argument("--non-record", action="store_true", help="breaches of the rules only warn")
    parser.add_argument("--pack-source", action=PackSource, type=Path, metavar="FILE",
                        help="write the script so that it takes fewer bytes, and nothing else")
    arguments = parser.parse_args()
    try:
        day = str(date.fromisoformat(arguments.date)) if arguments.date else str(datetime.now(UTC).date())
    except ValueError:
        raise Mistake(f"--date {arguments.date} is not YYYY-MM-DD") from None
    title = re.sub(r"[^A-Za-z0-9]+", "_", arguments.name).strip("_") or "submission"
    folder = arguments.out or Path("submissions") / f"{day}_{title}"
    if folder.exists():
        raise Mistake(f"{folder} exists; delete it, or choose another with --out")
    runs = open_runs(arguments.runs)
    final_score(runs)
    warnings, sources = list(breaches(runs)), [script_of(run) for run in runs]
    if warnings and not arguments.non_record:
        raise Mistake("\n".join(warnings))
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    given = {"name": arguments.name, "author": arguments.author, "github_id": arguments.github_id}
    facts = submission(runs, warnings, given | {"blurb": arguments.blurb, "date": day})
    files = {name: (run.folder / "log.txt").read_bytes() for name, run in zip(log_names(runs), runs)}
    files |= {
        "README.md": readme(runs, arguments.name, arguments.blurb, warnings).encode(),
        "submission.json": (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode(),
        "train_gpt.py": sources[0],
        "requirements.txt": requirements().encode()}
    write_folder(folder, files)
    print(f"submission: {folder} ({', '.join(sorted(path.name for path in folder.iterdir()))})")


if __name__ == "__main__":
    sys.exit(shared.exit_status(program))
