"""Log lines, the status line, metrics and the optional TensorBoard files."""
import json
import sys
import types

import pytest

import train_gpt as tg


def test_lines_go_to_console_and_file_and_metrics_are_json(tmp_path, capsys):
    log = tg.RunLog(tmp_path)
    log("one thing:1")
    log("the script's source", console=False)
    log.status("never in a pipe")
    log.metric("train", step=3, loss=1.5)
    assert capsys.readouterr().out == "one thing:1\n"
    assert (tmp_path / "log.txt").read_text() == "one thing:1\nthe script's source\n"
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"event": "train", "step": 3, "loss": 1.5}


def test_ranks_above_zero_are_silent(capsys):
    log = tg.RunLog(None)
    log("a line")
    log.status("a status")
    log.metric("train", step=1, loss=1.0)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_one_status_line_that_the_next_line_replaces(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    log = tg.RunLog(tmp_path)
    log.status("step:1 " + "x" * 500)
    log.status("too soon")
    log("step:2")
    out = capsys.readouterr().out
    assert out.startswith("\r\x1b[2Kstep:1 ") and "too soon" not in out and out.endswith("\r\x1b[2Kstep:2\n")
    assert len(out.split("\r")[1]) < 300 and out.count("\n") == 1
    assert (tmp_path / "log.txt").read_text() == "step:2\n"


def test_tensorboard_curves(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    tg.RunLog(tmp_path, tensorboard=True).metric("train", step=7, loss=2.0, name="text")
    assert written == [str(tmp_path), ("train/loss", 2.0, 7)]


def test_tensorboard_that_is_not_installed_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(tg.UserError, match="pip install tensorboard"):
        tg.RunLog(tmp_path, tensorboard=True)
