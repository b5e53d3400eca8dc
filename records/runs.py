"""What the programs in this folder share: a run's folder as one object, error lines, atomic writes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCORES = {
    "float": "averaged weights, plain windows",
    "roundtrip": "loaded from the artifact, plain windows",
    "sliding": "the same, sliding windows",
    "ttt": "the same, test-time training",
}
# Settings that say where and how a run is written down, not what it computes.
BOOKKEEPING = (
    "run_id", "stages", "artifact", "resume", "checkpoint_every", "train_log_every", "data_path",
    "tokenizer_path")
# How the names of the settings begin that only scoring reads.
SCORING = ("eval_", "ttt_", "skip_sliding")


class Mistake(Exception):
    """Something that the person at the keyboard can mend: printed as it stands, without a traceback."""


def exit_status(program: Callable[[], None]) -> int:
    """Run a command line; a user's mistake becomes one `error:` line for each of its lines and status 1."""
    try:
        program()
        return 0
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Mistake, OSError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 1


def parser(about: str) -> argparse.ArgumentParser:
    """A parser of options whose help begins with a program's own docstring."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def need(module: str) -> None:
    """Raise Mistake where a module that only these programs import is missing."""
    try:
        __import__(module)
    except ImportError:
        advice = f"pip install {module}, or pip install -r requirements.txt"
        raise Mistake(f"{module} is missing; {advice}") from None


def script():
    """The training script of this checkout as a module, imported where it is needed: torch takes seconds."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import train_gpt

    return train_gpt


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its result.json."""

    folder: Path
    result: dict

    @staticmethod
    def open(folder: str | Path) -> Run:
        """Read a run's folder. Raises Mistake where it holds no finished run."""
        folder = Path(folder)
        path = folder / "result.json"
        if not path.is_file():
            raise Mistake(f"{folder} has no result.json; name the folder of a finished run, logs/RUN_ID")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            result = {"changed": {}, "proofs": {}, "budget": {}} | found
            if missing := [key for key in ("preset", "seed", "bpb", "corpus") if key not in result]:
                raise ValueError(f"{', '.join(missing)} is missing")
        except (ValueError, TypeError) as error:
            raise Mistake(f"{path} is not a finished run's ({error})") from None
        return Run(folder, result)

    @property
    def name(self) -> str:
        """The folder's name, which is RUN_ID."""
        return self.folder.resolve().name

    @property
    def seed(self) -> int:
        """SEED."""
        return self.result["seed"]

    @property
    def bpb(self) -> dict[str, float]:
        """Bits per byte of the scores that were taken, in the order of the ladder."""
        return {name: self.result["bpb"][name] for name in SCORES if self.result["bpb"].get(name) is not None}

    @property
    def nats(self) -> dict[str, float]:
        """Nats per token of the scores that were taken."""
        losses = self.result.get("val_loss", {})
        return {name: losses[name] for name in self.bpb if losses.get(name) is not None}

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes that a validation token stands for on average; None where nothing was scored."""
        tokens, size = self.result.get("val_tokens"), self.result.get("val_bytes")
        if tokens and size:
            return size / tokens
        ratios = [self.nats[name] / math.log(2) / self.bpb[name] for name in self.nats]
        return ratios[0] if ratios else None

    @property
    def changed(self) -> dict[str, object]:
        """What the run changed of its preset; for scoring, what the scores were taken with."""
        trained = self.result["changed"]
        scored = self.result.get("scored_with", {}).get("changed", trained)
        return {name: value for name, value in trained.items() if not name.startswith(SCORING)} | {
            name: value for name, value in scored.items() if name.startswith(SCORING)
        }

    @cached_property
    def settings(self) -> dict[str, object]:
        """Every setting of the run; for scoring, what the scores were taken with."""
        values = self.result.get("settings") or self.preset_settings() | self.changed
        scored = self.result.get("scored_with", {}).get("settings", {})
        values = values | {name: value for name, value in scored.items() if name.startswith(SCORING)}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    def preset_settings(self) -> dict[str, object]:
        """The preset as this checkout has it, for a result that holds changes only."""
        tg, preset = script(), self.result["preset"]
        if preset not in tg.PRESETS:
            raise Mistake(f"{self.folder}: train_gpt.py has no preset {preset}")
        defaults = {field.name: field.default for field in dataclasses.fields(tg.Hyperparameters)}
        return {**defaults, **tg.PRESETS[preset], "preset": preset}

    @cached_property
    def techniques(self) -> dict[str, float]:
        """By how much the loss rises without each technique, where audit.py --techniques has left that."""
        path = self.folder / "techniques.json"
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            same = found["artifact_sha256"] == self.result.get("artifact", {}).get("sha256")
            rows = found["techniques"].items() if same else ()
            return {name: each["loss_without"] - each["loss"] for name, each in rows}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Mistake(f"{path} is damaged ({error}); run audit.py --techniques again") from None

    @cached_property
    def lines(self) -> list[dict]:
        """The lines of metrics.jsonl; half a line, which a run that was killed leaves, is dropped."""
        path, rows = self.folder / "metrics.jsonl", []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def metrics(self, event: str) -> list[dict]:
        """The lines of one event, by step; what a resumed run or a second evaluation repeats counts once."""
        rows: list[dict] = []
        for row in self.lines:
            if row.get("event") == event:
                while rows and rows[-1].get("step", 0) >= row.get("step", 0):
                    rows.pop()
                rows.append(row)
        return rows


def open_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read several folders. Raises Mistake where one is named twice."""
    runs = [Run.open(folder) for folder in folders]
    places = [run.folder.resolve() for run in runs]
    if twice := [str(run.folder) for i, run in enumerate(runs) if places[i] in places[:i]]:
        raise Mistake(f"{twice[0]} is named twice")
    return runs


def differing_settings(runs: Iterable[Run], besides: Iterable[str] = ()) -> dict[str, list]:
    """The settings in which runs differ, with each run's value; bookkeeping and `besides` do not count."""
    runs, skipped = list(runs), {*BOOKKEEPING, *besides}
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in skipped)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def show(value: object) -> str:
    """A setting's value as one would type it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
