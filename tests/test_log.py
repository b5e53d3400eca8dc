"""Log lines, metrics, files that are whole or not there, clocks, ledgers, and what a run records."""

import json
import math
import time
import types

import pytest

import train_gpt as tg


@pytest.fixture
def log(tmp_path):
    return tg.RunLog(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# Lines
# ----------------------------------------------------------------------------------------------------------


def test_lines_go_to_console_and_file_and_metrics_are_json(log, tmp_path, capsys):
    log("one thing:1")
    log("the script's source", console=False)
    log.status("never in a pipe")
    log.metric("train", step=3, loss=1.5)
    log.proof("qat", {"first_step": 7, "loss": 1 / 3, "kind": "soft"})
    log.proof("averaging", None)
    proof = "proof technique:qat first_step:7 loss:0.33333 kind:soft\n"
    assert capsys.readouterr().out == "one thing:1\n" + proof
    assert (tmp_path / "log.txt").read_text() == "one thing:1\nthe script's source\n" + proof
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"event": "train", "step": 3, "loss": 1.5}


def test_a_second_log_goes_on_where_the_first_ended(log, tmp_path):
    log("first")
    log.metric("a")
    again = tg.RunLog(tmp_path)
    again("second")
    again.metric("b")
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\n"
    events = [json.loads(line)["event"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert events == ["a", "b"]


def test_ranks_above_zero_are_silent(capsys):
    log = tg.RunLog(None)
    log("a line")
    log.status("a status")
    log.metric("train", step=1, loss=1.0)
    log.proof("qat", {"loss": 1.0})
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_one_status_line_that_the_next_line_replaces(log, tmp_path, capsys):
    log.live = True  # as on a terminal
    log.status("step:1 " + "x" * 500)
    log.status("too soon")
    log("step:2")
    out = capsys.readouterr().out
    assert out.startswith("\r\x1b[2Kstep:1 ") and "too soon" not in out and out.endswith("\r\x1b[2Kstep:2\n")
    assert len(out.split("\r")[1]) < 300 and out.count("\n") == 1
    assert (tmp_path / "log.txt").read_text() == "step:2\n"


def test_progress_lines_give_score_speed_and_the_time_left():
    lines = []
    progress = tg.ProgressLine(lines.append, "sliding", 3000)
    assert not progress.due()
    progress.start -= 1000.0
    progress.last -= 1000.0
    assert progress.due()
    for done in (0, 3000):  # nothing is known yet, nothing is left to tell
        progress(done, 1.25)
    assert lines == [] and progress.due()
    progress(2000, 1.25, " steps:7")
    assert lines == ["sliding positions:2000/3000 val_bpb:1.2500 tokens/s:2 left:500s steps:7"]
    assert not progress.due()


# ----------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------


def some_run(folder, rank=0, **settings):
    """A run as the stages get it."""
    hp, world = tg.Hyperparameters(**settings), types.SimpleNamespace(rank=rank)
    ledgers = (tg.Budget(name, world, 0.0) for name in ("training", "evaluation"))
    return tg.Run(hp, world, tg.RunLog(None), folder, 1000, *ledgers, {"bpb": {"float": 1.5}, "seed": 7})


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path, run = tmp_path / "result.json", some_run(tmp_path)
    for content in (b"old", b"new content"):
        run.write("result.json", content)
        assert path.read_bytes() == content and [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    run = some_run(tmp_path)
    run.write("model.pt", b"old")
    with pytest.raises(TypeError):
        run.write("model.pt", "no bytes")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_run_records_findings_beside_what_it_knows(tmp_path):
    run = some_run(tmp_path)
    run.record({"steps": 3, "bpb": {"sliding": 1.25}})
    run.record({"bpb": {"float": 1.0}, "proofs": {"qat": None}})
    expected = {"bpb": {"float": 1.0, "sliding": 1.25}, "seed": 7, "steps": 3, "proofs": {"qat": None}}
    assert run.result == json.loads((tmp_path / "result.json").read_text()) == expected
    assert run.room == 16_000_000 - 1000 and some_run(tmp_path, artifact_limit=5000).room == 4000


def test_only_rank_zero_writes(tmp_path):
    run = some_run(tmp_path, rank=1)
    run.write("model.pt", b"x")
    run.record({"steps": 3})
    assert list(tmp_path.iterdir()) == [] and run.result["steps"] == 3


def test_findings_of_one_kind_stand_beside_each_other_and_replace_all_else(tmp_path):
    run = some_run(tmp_path)
    run.result = {"a": {"x": 1, "y": 2}, "b": [1], "c": None, "d": 3}
    run.record({"a": {"y": {"w": 3}, "z": None}, "b": [2], "c": 4, "e": {"f": 5}})
    expected = {"a": {"x": 1, "y": {"w": 3}, "z": None}, "b": [2], "c": 4, "d": 3, "e": {"f": 5}}
    assert run.result == json.loads((tmp_path / "result.json").read_text()) == expected


# ----------------------------------------------------------------------------------------------------------
# Clocks and ledgers
# ----------------------------------------------------------------------------------------------------------


def test_a_clock_stands_still_while_it_is_stopped():
    clock = tg.Clock(10.0)
    assert clock.elapsed == 0.0
    clock.start()
    time.sleep(0.02)
    running = clock.elapsed
    clock.stop()
    first = clock.elapsed
    assert 0.02 <= running <= first
    time.sleep(0.02)
    assert clock.elapsed == first
    clock.start()
    time.sleep(0.02)
    assert clock.elapsed >= first + 0.02


def test_the_agreed_clock_is_carried_to_a_step():
    """While no step is known to be finished nothing is; 3 in 6 seconds make the tenth end after 20."""
    clock = tg.Clock(21.0)
    for clock.agreed in (0.0, 6.0):  # a device that is still at its first step
        assert clock.at(5) == 0.0 and not clock.out_of_time(10**6)
    clock.agreed_step = 3
    assert (clock.at(0), clock.at(3), clock.at(10)) == (0.0, 6.0, 20.0)
    assert not clock.out_of_time(10) and clock.out_of_time(11)
    clock.limit = 0.0  # none
    assert not clock.out_of_time(10**6)


def test_a_clock_goes_on_from_its_state():
    clock, other = tg.Clock(10.0), tg.Clock(10.0)
    clock.agreed, clock.agreed_step, clock.before = 6.0, 3, 5.0
    clock.start()
    time.sleep(0.02)
    other.load_state_dict(json.loads(json.dumps(clock.state_dict())))
    assert 5.02 <= other.elapsed <= clock.elapsed
    assert (other.at(10), other.limit, other.started) == (20.0, 10.0, None)


def slowest(extra):
    """A world of which another rank takes so many seconds more."""
    return types.SimpleNamespace(synchronize=lambda: None, max=lambda seconds: seconds + extra)


def test_a_phase_takes_as_long_as_on_the_slowest_rank():
    budget = tg.Budget("training", slowest(100.0), 250.0)
    for counted in (True, False, True):
        with budget.phase("train" if counted else "warm-up", counted):
            time.sleep(0.01)
    assert budget.counted.keys() == {"train"} and budget.uncounted.keys() == {"warm-up"}
    assert 200.02 <= budget.counted["train"] < 210 and 100.01 <= budget.uncounted["warm-up"] < 110
    assert budget.left == 250.0 - budget.counted["train"]


def test_a_ledger_tells_what_counts_and_what_is_left():
    budget, lines = tg.Budget("training", slowest(0.0), 250.0), []
    budget.counted["train"] += 150.0
    budget.uncounted["warm-up"] += 1000.0
    budget.counted["train"] += 50.0
    assert budget.left == 50.0
    expected = {"counted": {"train": 200.0}, "uncounted": {"warm-up": 1000.0}}
    assert budget.report(lines.append) == expected | {"limit": 250.0, "used": 200.0, "within": True}
    assert lines == [
        "budget clock:training phase:train seconds:200.0",
        "budget clock:training phase:warm-up seconds:1000.0 (not counted)",
        "budget clock:training used:200.0s limit:250s within:yes",
    ]
    budget.counted["pack"] += 50.5
    assert not budget.report(lines.append)["within"] and lines[-1].endswith("limit:250s within:NO")


def test_without_a_limit_there_is_no_end():
    budget, lines = tg.Budget("evaluation", slowest(0.0), 0.0), []
    budget.counted["ttt"] += 1e6
    assert budget.left == math.inf and budget.report(lines.append)["within"]
    assert lines[-1] == "budget clock:evaluation used:1000000.0s limit:none within:yes"
