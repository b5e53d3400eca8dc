"""What is believed about a device: nothing. Versions, drivers, arithmetic and forecasts."""

import dataclasses
import math
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, result_of, run_here
from test_end_to_end import told

import train_gpt as tg

SMOKE = tg.Hyperparameters.from_env({"PRESET": "smoke", "DEVICE": "cpu"})


@pytest.mark.parametrize(("module", "attribute", "value", "said"), [
    (sys, "version_info", (3, 10, 4, "final", 0), "Python 3.11 or newer is needed, this is 3.10"),
    (torch, "__version__", "2.11.0+cu130", "PyTorch 2.13 or newer is needed, this is 2.11"),
    (torch, "__version__", "2.9.1", "PyTorch 2.13 or newer is needed, this is 2.9"),
])  # fmt: skip
def test_an_older_python_or_torch_gets_one_line(tmp_path, monkeypatch, module, attribute, value, said):
    """An older torch has a silent wrong gradient for what the loss does (pytorch#180642)."""
    monkeypatch.setattr(module, attribute, value)
    assert told(tmp_path, {}) == (1, "", f"error: {said}\n") and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------
# A device that torch does not see
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def blind(tmp_path, monkeypatch):
    """A machine with /dev/nvidia0 and a driver, and a torch that sees no device."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10\nGCC 12\n")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(tg, "DEVICE_FILES", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.setattr(tg, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(tg.shutil, "which", lambda name: None)
    return tmp_path


def test_an_nvidia_device_that_torch_does_not_see_is_no_cpu(blind, monkeypatch):
    hp = dataclasses.replace(SMOKE, device="auto")
    match = r"torch 2\.\S+ does not see this machine's NVIDIA device \(driver: .* 570\.86\.10 .*DEVICE=cpu"
    with pytest.raises(tg.UserError, match=match):
        tg.World(hp, {})
    assert tg.World(SMOKE, {}).device.type == "cpu"  # the user said so
    (blind / "nvidia0").unlink()
    assert tg.World(hp, {}).device.type == "cpu"  # nvidiactl alone is of a driver without a device
    (blind / "version").unlink()
    monkeypatch.setattr(tg.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    with pytest.raises(tg.UserError, match="driver: unknown"):
        tg.World(hp, {})


@pytest.mark.parametrize("preset", ["pr606", "pr601"])
def test_a_large_preset_runs_on_a_cpu_only_if_the_user_says_so(preset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    hp = tg.Hyperparameters(preset=preset, **tg.PRESETS[preset])
    world = tg.World(dataclasses.replace(hp, device="cpu"), {})
    with pytest.raises(tg.UserError, match=r"a step takes \d\d+ TFLOP, minutes on a CPU; take PRESET=smoke"):
        tg.check_machine(hp, world)
    tg.check_machine(dataclasses.replace(hp, device="cpu"), world)
    tg.check_machine(dataclasses.replace(SMOKE, device="auto"), world)


# ----------------------------------------------------------------------------------------------------------
# Arithmetic
# ----------------------------------------------------------------------------------------------------------


def world_that_takes(bf16, fp32, others=lambda value: value):
    """A world whose products take so many seconds in each type, and what other ranks make of a time."""
    times = iter((bf16, fp32))
    world = SimpleNamespace(tuning=tg.TUNING["cpu"], device=torch.device("cpu"), dtype=torch.float32)
    world.seconds, world.max = lambda work, repeats: (work(), next(times))[1], others
    return world


@pytest.mark.parametrize(("bf16", "fp32", "taken"), [
    (0.9, 1.0, torch.bfloat16), (0.96, 1.0, torch.float32), (2.0, 1.0, torch.float32),
])  # fmt: skip
def test_bf16_is_taken_where_it_wins_by_a_twentieth(bf16, fp32, taken):
    hp, world = dataclasses.replace(SMOKE, dtype="auto"), world_that_takes(bf16, fp32)
    line = tg.choose_dtype(hp, world)
    assert world.dtype == taken
    assert line == (
        f"dtype:{str(taken)[6:]} (ms of a layer's products, both ways: bf16:{1000 * bf16:.5g} fp32:1000)"
    )


def test_the_slowest_rank_decides_on_the_arithmetic():
    slow = iter((3.0, 1.0))
    world = world_that_takes(0.5, 1.0, others=lambda value: max(value, next(slow)))
    tg.choose_dtype(dataclasses.replace(SMOKE, dtype="auto"), world)
    assert world.dtype == torch.float32


def test_what_is_set_or_was_chosen_is_not_measured():
    for dtype, known, taken, why in (
        ("fp32", "bfloat16", torch.float32, "as DTYPE says"),
        ("bf16", None, torch.bfloat16, "as DTYPE says"),
        ("auto", "bfloat16", torch.bfloat16, "as the run had it"),
    ):
        hp = dataclasses.replace(SMOKE, dtype=dtype)
        world = tg.World(hp, {})
        world.seconds = None
        assert tg.choose_dtype(hp, world, known) == f"dtype:{str(taken)[6:]} ({why})"
        assert world.dtype == taken


def test_the_measurement_takes_less_than_a_second_and_draws_nothing():
    world, state = tg.World(SMOKE, {}), torch.get_rng_state()
    seconds = tg.World.seconds(
        world, lambda: tg.choose_dtype(dataclasses.replace(SMOKE, dtype="auto"), world)
    )
    assert seconds < 5 and torch.equal(state, torch.get_rng_state())  # a second where nothing else runs


@pytest.mark.whole
def test_a_resumed_run_and_its_evaluation_keep_the_arithmetic(tmp_path, tiny, monkeypatch):
    """Measured again it might come out the other way, and the run could not go on."""
    env = tiny | {"DTYPE": "auto", "RUN_ID": "run", "STAGES": "train,quantize", "TTT_ENABLED": "0"}
    measured = iter((torch.bfloat16, torch.float32, torch.float32))

    def choose(hp, world, known=None):
        if known is None:
            known = str(next(measured))[6:]
        return real(hp, world, known)

    real = tg.choose_dtype
    monkeypatch.setattr(tg, "choose_dtype", choose)
    monkeypatch.setattr(tg.Checkpoint, "save", lambda self, step, tries=1: None)
    assert run_here(tmp_path, env) == 0
    assert run_here(tmp_path, env | {"STAGES": "evaluate"}) == 0
    assert result_of(tmp_path)["dtype"] == result_of(tmp_path)["scored_with"]["dtype"] == "bfloat16"


# ----------------------------------------------------------------------------------------------------------
# Waiting threads
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_waiting_threads_do_not_spin_in_a_run_and_an_import_sets_nothing(tmp_path):
    code = "import os, sys; sys.path.insert(0, {!r}); {}; print(os.environ.get('GOMP_SPINCOUNT'))"
    as_script = "import runpy; sys.argv = ['x', '--help']; sys.stdout = open(os.devnull, 'w')\ntry: {}\n" \
        "except SystemExit: sys.stdout = sys.__stdout__"  # fmt: skip
    as_script = as_script.format(f"runpy.run_path({str(ROOT / 'train_gpt.py')!r}, run_name='__main__')")
    for statement, given, seen in (
        ("import train_gpt", {}, "None"),
        (as_script, {}, "1000"),
        (as_script, {"GOMP_SPINCOUNT": "7"}, "7"),
    ):
        text = code.replace("; {}; ", "\n{}\n").format(str(ROOT), statement)
        command, env = [sys.executable, "-c", text], {"PATH": "/usr/bin"} | given
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.strip() == seen, done.stderr


# ----------------------------------------------------------------------------------------------------------
# Forecast and ledger
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "wanted"), [
    # a trained token takes 0.5 / 1000 s; 6,000 positions take 1 s side by side, 4 s by a stride of a quarter
    (dict(), "total:149s training:100s ttt:40s quantising:3s sliding:4s plain:2s less_with:ITERATIONS=100"),
    (dict(max_wallclock_seconds=13.0), "training:10s ttt:40s quantising:3s sliding:4s plain:2s"),
    (dict(max_wallclock_seconds=13.0), "less_with:TTT_ENABLED=0"),
    (dict(eval_seconds=10.0), "ttt:10s"),
    (dict(iterations=2, ttt_enabled=False), "ttt:0s quantising:3s sliding:4s plain:2s less_with:EVAL_STRIDE"),
    (dict(skip_sliding=True), "sliding:0s"),
    (dict(stages="train,quantize"), "ttt:0s quantising:3s sliding:0s plain:1s"),
])  # fmt: skip
def test_the_forecast_adds_up(changes, wanted):
    hp = dataclasses.replace(
        SMOKE, iterations=200, max_wallclock_seconds=0.0, train_batch_tokens=1000, eval_seq_len=100,
        eval_stride=25, ttt_epochs=4, eval_seconds=0.0, skip_sliding=False,
    )  # fmt: skip
    run = SimpleNamespace(hp=dataclasses.replace(hp, **changes))
    line = tg.forecast(run, positions=6000, reserve=3.0, pace=0.5)
    assert line.startswith("forecast total:") and wanted in line
    total, *parts = map(int, re.findall(r":(\d+)s", line))
    assert math.isclose(total, sum(parts), abs_tol=2)


@pytest.mark.whole
def test_a_run_forecasts_itself_and_books_every_second(tmp_path, tiny, monkeypatch):
    """Between the first step and the packed file no second is in neither column of the ledger."""
    began, packed, start, fit = [], [], tg.Clock.start, tg.fit_artifact

    def slow(function):
        return lambda *given, **named: (time.sleep(0.4), function(*given, **named))[1]

    monkeypatch.setattr(tg.Clock, "start", lambda clock: (began.append(time.perf_counter()), start(clock))[1])
    monkeypatch.setattr(
        tg, "fit_artifact", lambda *given: (fit(*given), packed.append(time.perf_counter()))[0]
    )
    for name in ("saved", "shell", "export_average"):  # of the stretches between the clock's phases
        monkeypatch.setattr(tg, name, slow(getattr(tg, name)))
    assert run_here(tmp_path, tiny | {"RUN_ID": "run", "ITERATIONS": "40"}) == 0
    ledger = result_of(tmp_path)["budget"]["training"]
    booked = sum(ledger["counted"].values()) + ledger["uncounted"]["save"] + ledger["uncounted"]["float"]
    assert abs(packed[0] - began[0] - booked) < 0.2
    lines = (tmp_path / "logs/run/log.txt").read_text().splitlines()
    steps = [line.split(":")[0] for line in lines if re.match("step:(5|20)/|forecast ", line)]
    assert steps == ["step", "forecast total", "step"]
