"""What stands around the script: run.sh, the summary, the README's generated table."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

import train_gpt as tg

sys.path.insert(0, str(ROOT / "records"))
import summary  # noqa: E402
import table  # noqa: E402


def test_readme_table_is_the_scripts():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.with_table(readme, tg.Hyperparameters.table()) == readme, "run python records/table.py"


@pytest.mark.parametrize("arguments", [["banana"], ["smoke", "extra"]])
def test_run_sh_refuses_what_it_does_not_know(arguments):
    done = subprocess.run(["bash", str(ROOT / "run.sh"), *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error:") and len(done.stderr.splitlines()) == 1


def test_run_sh_is_valid_bash():
    assert subprocess.run(["bash", "-n", str(ROOT / "run.sh")]).returncode == 0


RESULT = {
    "preset": "smoke", "seed": 1, "params": 1234, "steps": 5, "corpus": "a corpus", "data_path": "",
    "bpb": {"float": 1.5, "roundtrip": 1.51, "sliding": 1.45, "ttt": None},
    "artifact": {"model_bytes": 900, "code_bytes": 200, "total_bytes": 1100, "limit": 1000},
    "budget": {"training": {"limit": 600.0, "used": 601.0, "within": False, "counted": {"train": 601.0},
                            "uncounted": {"warm-up": 2.0}}},
}


def test_summary_shows_scores_bytes_and_clocks(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    text = tmp_path / "val.txt"
    text.write_bytes(b"one two three " * 400)
    printed = summary.summary(tmp_path, text)
    for part in ("1.5000", "+0.0100", "-0.0600", "OVER THE LIMIT", "EXCEEDED", "warm-up", "xz -9", "zstd -22",
                 "a corpus", "result.json"):
        assert part in printed
    assert "ttt " not in printed


def test_summary_of_a_folder_without_a_result(tmp_path):
    command = [sys.executable, str(ROOT / "records/summary.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error:") and "Traceback" not in done.stderr
