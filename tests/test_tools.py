"""What stands around the script: run.sh, the summary, and what all programs in records/ share."""

import ast
import errno
import json
import os
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


def test_summary_says_that_a_text_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    monkeypatch.setattr(sys, "argv", ["summary.py", str(tmp_path), "--text", "nowhere.txt"])
    assert runs.exit_status(summary.program) == 1
    assert "nowhere.txt is missing" in capsys.readouterr().err


# --- an older Python

MODULES = "runs.py", "traffic.py"  # what the programs import
PROGRAMS = sorted(path for path in (ROOT / "records").glob("*.py") if path.name not in MODULES)
# Any module but runs.py may be one that an older Python lacks.
OLDER = """
import __future__, pkgutil, runpy, sys
class Closed:
    def find_spec(self, name, path=None, target=None):
        if name != "runs":
            raise ImportError(name)
sys.version_info = (3, 10, 4, "final", 0)
sys.meta_path.insert(0, Closed())
sys.path.insert(0, sys.argv.pop(1))
for path in sys.argv[1:]:
    sys.modules.pop("runs", None)
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        print(stop.code)
"""


@pytest.mark.whole
def test_an_older_python_is_told_in_one_line_by_every_program():
    command = [sys.executable, "-c", OLDER, str(ROOT / "records"), *map(str, PROGRAMS)]
    done = subprocess.run(command, capture_output=True, text=True)
    line = "error: Python 3.11 or newer is needed, this is 3.10.4"
    assert not done.stderr and done.stdout.splitlines() == [line] * len(PROGRAMS)
    assert {"audit.py", "benchmark.py", "pipeline.py", "sample.py"} <= {path.name for path in PROGRAMS}


@pytest.mark.parametrize(
    "path", [*PROGRAMS, *(ROOT / "records" / name for name in MODULES)], ids=lambda path: path.name
)
def test_an_older_python_can_read_the_programs(path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))


# --- what is printed


def run_records(code, **env):
    """Lines of a program in a process of its own, with records/ on its path."""
    head = "import sys; sys.path.insert(0, 'records'); import runs\n"
    options = {"cwd": ROOT, "env": {"PATH": os.environ["PATH"], **env}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", head + code], **options, **pipes)


PRINTS = r"sys.exit(runs.exit_status(lambda: print('caf\u00e9 \U0001f680 \udcff')))"


@pytest.mark.whole
@pytest.mark.parametrize(
    "env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_console_that_cannot_show_a_character_shows_its_number(env):
    out, err = run_records(PRINTS, **env).communicate()
    assert (out, err) == (b"caf\\xe9 \\U0001f680 \\udcff\n", b"")


@pytest.mark.whole
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "code",
    [
        "print('x' * 1000)",
        "(print('x' * 100_000), print('y'))",
        "runs.parser('about').parse_args(['--help'])",
    ],
)
def test_a_reader_that_has_seen_enough_is_no_mistake(unbuffered, code):
    done = run_records(
        f"sys.stdin.read(); sys.exit(runs.exit_status(lambda: {code} and None))",
        PYTHONUNBUFFERED=unbuffered,
    )
    done.stdout.close()  # before anything is printed
    assert done.wait() == 0 and done.stderr.read() == b""


@pytest.mark.whole
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this machine")
def test_output_that_cannot_be_written_is_one_line():
    command = [sys.executable, str(ROOT / "records/compare.py"), "--list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    line = "error: the output cannot be written: No space left on device"
    assert done.returncode == 1 and done.stderr.splitlines() == [line]


def test_mistakes_of_every_kind_are_a_line_and_a_status(capsys):
    def stop(error):
        raise error

    for error, status, line in (
        (runs.Mistake("one\ntwo"), 1, "error: one\nerror: two\n"),
        (tg.UserError("the script's"), 1, "error: the script's\n"),
        (
            OSError(errno.EACCES, "Permission denied", "a/file"),
            1,
            "error: a/file: Permission denied\n",
        ),
        (KeyboardInterrupt(), 130, "error: stopped\n"),
        (SystemExit(3), 3, ""),
    ):
        assert runs.exit_status(lambda error=error: stop(error)) == status
        assert capsys.readouterr().err == line
    assert runs.exit_status(lambda: runs.parser("about").parse_args(["--nothing"])) == 1
    assert capsys.readouterr().err == "error: unrecognized arguments: --nothing; try --help\n"
    assert runs.exit_status(lambda: 1) == 1 and runs.exit_status(lambda: None) == 0


# --- what is written


def test_a_failed_write_names_its_file_and_leaves_nothing(tmp_path, monkeypatch):
    path, kept = tmp_path / "a.html", b"what was there"
    path.write_bytes(kept)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(runs.Mistake, match="a.html cannot be written: No space left on device"):
        runs.write_atomically(path, b"new")
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    (tmp_path / "folder").mkdir()
    for place in (path / "b.html", tmp_path / "folder", tmp_path / "missing/b.html"):
        with pytest.raises(runs.Mistake, match=f"{place} cannot be written: "):
            runs.write_atomically(place, b"new")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.html", "folder"]
    runs.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


# --- what is read


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"seed": "<script>"}, "seed is '<script>', not a whole number from 0 to 4294967295"),
        ({"seed": True}, "seed is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"bpb": None}, "bpb is None, not a mapping"),
        ({"bpb": {"ttt": "1.1"}}, "bpb.ttt is '1.1'"),
        ({"bpb": {"ttt": 0}}, "bpb.ttt is 0"),
        ({"corpus": ["a"]}, "corpus is ['a'], not one line of text"),
        ({"corpus": "a\nb"}, "corpus is"),
        ({"steps": 10**400}, "steps is"),
        ({"changed": {"a; curl x #": 1}}, "'a; curl x #' in changed is no name"),
        ({"changed": {"a": {}}}, "changed.a is {}"),
        ({"artifact": {"total_bytes": 5}}, "model_bytes, code_bytes, limit is missing in artifact"),
        ({"budget": {"training": 5}}, "budget.training is 5, not a mapping"),
        ({"proofs": {"quantizer": {"matrices": {"x": [1]}}}}, "matrices.x is [1], not a list of 2"),
        ({"other": float("nan")}, "not JSON compliant"),
        ({"other": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_a_result_of_wrong_types_is_refused(tmp_path, changes, said):
    (tmp_path / "result.json").write_text(json.dumps(RESULT | changes))
    with pytest.raises(runs.Mistake) as mistake:
        runs.Run.open(tmp_path)
    line = str(mistake.value)
    assert line.startswith(f"{tmp_path}/result.json is not a finished run's (") and said in line
    assert line.endswith("; name another run, or make this one again") and len(line.splitlines()) == 1


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1]", "the whole is [1], not a mapping"),
        (b'{"bpb": null}', "preset, seed, corpus is missing"),
        (json.dumps(RESULT)[:-9].encode(), "line 1"),
        (json.dumps(RESULT).encode("utf-16"), "can't decode byte 0xff"),
        (json.dumps(RESULT).encode() + b"\xff", "can't decode byte 0xff"),
        (b"[" * 100_000, "recursion"),
        (b'{"seed": 1, "seed": 2}', "a name stands there twice"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "integer string conversion"),
    ],
)
def test_a_result_that_is_no_json_is_refused(tmp_path, data, said):
    (tmp_path / "result.json").write_bytes(data)
    with pytest.raises(runs.Mistake) as mistake:
        runs.Run.open(tmp_path)
    assert said in str(mistake.value) and len(str(mistake.value).splitlines()) == 1


@pytest.mark.whole
def test_a_result_is_read_whatever_the_locale(tmp_path):
    text = json.dumps(RESULT | {"corpus": "caf\u00e9"}, ensure_ascii=False)
    (tmp_path / "result.json").write_text(text, encoding="utf-8")
    code = f"print(ascii(runs.Run.open({str(tmp_path)!r}).result['corpus']))"
    out, err = run_records(code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0").communicate()
    assert (out, err) == (b"'caf\\xe9'\n", b"")


def test_lines_of_wrong_types_are_left_out(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    good = {"event": "train", "step": 1, "loss": 2.5, "lr_scale": 1.0, "seconds": 0.5}
    rows = [good, good | {"step": 2, "loss": "2.4"}, good | {"step": True}, good | {"step": 3, "loss": 2.3}]
    lines = [*map(json.dumps, rows), "[1]", "null", "", '{"event": []}', '{"event": "train", "lo', "[" * 9999]
    lines += [json.dumps(good | {"step": 4, "loss": float("nan")}), json.dumps({"event": "of another kind"})]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    run = runs.Run.open(tmp_path)
    assert [(row["step"], row["loss"]) for row in run.metrics("train")] == [(1, 2.5), (3, 2.3)]
    assert len(run.lines) == 3


# --- what enters Markdown


def test_text_is_shown_as_it_is_in_markdown():
    assert runs.as_markdown("a_b_c 1.5 (fail), x-y: z") == "a_b_c 1.5 (fail), x-y: z"
    assert runs.as_markdown("a|b\n# `c` *d* _e_") == r"a\|b # \`c\` \*d\* \_e\_"
    assert runs.as_markdown("<script>&[x](y) $z$ ~ \\") == r"&lt;script&gt;&amp;\[x\](y) \$z\$ \~ \\"
    assert runs.as_code("MATRIX_LR") == "`MATRIX_LR`" and runs.as_code("") == "<code></code>"
    assert runs.as_code("`a|b`") == r"<code>\`a\|b\`</code>"
