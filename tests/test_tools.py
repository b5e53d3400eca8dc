"""What stands around the script: run.sh, the summary, what the programs in records/ know of the settings."""

import json
import subprocess
import sys

import pytest
import runs
import summary
from conftest import ROOT

import train_gpt as tg


@pytest.mark.whole
@pytest.mark.parametrize(
    "arguments",
    [["banana"], ["smoke", "extra"], ["smoke", "quick"], ["test", "slow"], ["test", "quick", "x"]],
)
def test_run_sh_refuses_what_it_does_not_know(arguments):
    done = subprocess.run(["bash", str(ROOT / "run.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error:") and len(done.stderr.splitlines()) == 1


def test_the_programs_know_which_settings_say_where_a_run_lies_and_which_only_score():
    """runs.py names them by hand, because importing the script takes seconds."""
    fields = tg.Hyperparameters.fields
    assert {name for name in fields() if name.startswith(runs.SCORING)} == set(fields("score"))
    data = {"data_path", "tokenizer_path"}
    assert set(runs.BOOKKEEPING) <= fields("run").keys() | data and data <= set(runs.BOOKKEEPING)


RESULT = {
    "preset": "smoke", "seed": 1, "params": 1234, "steps": 5, "corpus": "a corpus", "data_path": "",
    "bpb": {"float": 1.5, "roundtrip": 1.51, "sliding": 1.45, "ttt": None},
    "artifact": {"model_bytes": 900, "code_bytes": 200, "total_bytes": 1100, "limit": 1000},
    "budget": {"training": {"limit": 600.0, "used": 601.0, "within": False, "counted": {"train": 601.0},
                            "uncounted": {"warm-up": 2.0}}},
}  # fmt: skip


def test_summary_shows_scores_bytes_and_clocks(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    text = tmp_path / "val.txt"
    text.write_bytes(b"one two three " * 400)
    printed = summary.summary(tmp_path, text)
    for part in (
        "1.5000", "+0.0100", "-0.0600", "OVER THE LIMIT", "EXCEEDED", "warm-up", "xz -9", "zstd -22",
        "a corpus", "result.json",
    ):  # fmt: skip
        assert part in printed
    assert "ttt " not in printed


@pytest.mark.whole
def test_summary_of_a_folder_without_a_result(tmp_path):
    command = [sys.executable, str(ROOT / "records/summary.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error:") and "Traceback" not in done.stderr
