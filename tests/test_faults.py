"""What comes from outside: launches, consoles that go away, full disks, dead ends, seeded hostile inputs."""

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import types
from unittest import mock

import pytest
import torch
from conftest import ROOT, result_of, run_here
from test_distributed import free_ports, ranks_environment
from test_end_to_end import told
from test_packing import assert_sound, forged

import train_gpt as tg

# ----------------------------------------------------------------------------------------------------------
# Launch
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", [
    {"WORLD_SIZE": "2"}, {"RANK": ""}, {"WORLD_SIZE": "auto"}, {"RANK": "1"}, {"RANK": "-1"},
    {"RANK": "\u0661"},
    {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "x"}, {"WORLD_SIZE": "9" * 5000}, {"RANK": "2", "WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": "1"},
], ids=str)  # fmt: skip
def test_a_process_that_torchrun_did_not_start_gets_a_line(tiny, tmp_path, env):
    code, out, errors = told(tmp_path, tiny | env)
    assert (
        code == 1
        and out == ""
        and len(errors.splitlines()) == 1
        and "torchrun" in errors
        and len(errors) < 300
    )
    assert not list(tmp_path.iterdir())


def test_what_torchrun_says_is_taken():
    assert tg.launched_as({}) == (0, 1, 0) and tg.launched_as({"WORLD_SIZE": "1", "RANK": "0"}) == (0, 1, 0)
    assert tg.launched_as(ranks_environment(3, 8, 29500)) == (3, 8, 3)


@pytest.fixture(autouse=True)
def clean_environment():
    with mock.patch.dict(os.environ):
        yield


def meeting(*facts):
    """What each rank, a thread here, is told where the ranks compare their facts."""
    (port,), found = free_ports(1), [None] * len(facts)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def attend(rank):
        try:
            found[rank] = tg.meet(ranks_environment(rank, len(facts), port), facts[rank])
        except tg.UserError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=attend, args=(rank,)) for rank in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return found


def test_ranks_that_were_given_the_same_go_on():
    facts = {"error": "none", "SEED": "1"}
    assert all(isinstance(found, torch.distributed.Store) for found in meeting(facts, facts, facts))
    assert tg.meet({}, facts) is None


@pytest.mark.parametrize("name", ["SEED", "MATRIX_LR", "script", "data", "error"])
def test_ranks_that_differ_all_end_with_the_same_line(name):
    facts = {"error": "none", "SEED": "1", "MATRIX_LR": "0.02", "script": "ab", "data": "3 files, 9B"}
    found = meeting(facts, facts | {name: "other"}, facts)
    assert (
        len(set(found)) == 1
        and found[0] == f"{name} is other on rank 1, {facts[name]} on rank 0; start all ranks alike"
    )


def test_a_mistake_of_all_ranks_is_told_as_it_is():
    facts = {"error": "NUM_LAYERS=-4 must lie in [1, 1000]"}
    assert meeting(facts, facts) == [facts["error"]] * 2


def test_what_ranks_compare_holds_settings_script_and_data(tiny, corpus, tmp_path):
    hp, facts = tg.settings_of(tiny)
    assert facts["error"] == "none" and {name.upper() for name in hp.fields()} <= facts.keys()
    assert facts["script"] == tg.sha256((ROOT / "train_gpt.py").read_bytes())
    shutil.copytree(corpus["DATA_PATH"], tmp_path / "data")
    with open(tmp_path / "data/fineweb_train_000001.bin", "ab") as file:
        file.write(b"xx")
    assert tg.settings_of(tiny | {"DATA_PATH": str(tmp_path / "data")})[1]["data"] != facts["data"]
    assert tg.settings_of(tiny | {"SEED": "x"}) == (None, {"error": mock.ANY})


@pytest.mark.whole
def test_two_ranks_with_other_rates_end_before_anything(tiny, tmp_path):
    """The whole script twice, without a launcher that would end the other one."""
    (port,), processes = free_ports(1), []
    for rank in (0, 1):
        names = ("PATH", "HOME", "LD_LIBRARY_PATH")
        env = (
            {name: os.environ[name] for name in names if name in os.environ}
            | tiny
            | ranks_environment(rank, 2, port)
        )
        env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MATRIX_LR": str(0.02 + 0.01 * rank)}
        command = [sys.executable, str(ROOT / "train_gpt.py")]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=env, **pipes))
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [1, 1] and not list(tmp_path.iterdir())
    assert said == [
        ("", "error: MATRIX_LR is 0.03 on rank 1, 0.02 on rank 0; start all ranks alike\n"),
        ("", ""),
    ]


def test_a_rank_says_what_it_alone_finds_and_leaves_the_rest_to_rank_zero(tiny, tmp_path, monkeypatch):
    def fails(*given):
        raise tg.UserError("three processes want a CUDA device")

    env = tiny | ranks_environment(1, 2, 1)
    monkeypatch.setattr(tg, "meet", fails)
    assert told(tmp_path, env) == (1, "", "")
    monkeypatch.setattr(tg, "meet", lambda *given: None)
    monkeypatch.setattr(tg, "World", fails)
    assert told(tmp_path, env) == (1, "", "error: three processes want a CUDA device\n")


@pytest.mark.parametrize("changes", [
    {"model_dim": 65536, "num_heads": 64, "num_kv_heads": 64}, {"bigram_vocab_size": 10**9},
    {"num_layers": 1000, "model_dim": 16384}, {"train_seq_len": 10**9, "train_batch_tokens": 10**9},
    {"gptq_calib_sequences": 10**9},
], ids=str)  # fmt: skip
def test_a_model_that_no_machine_holds_is_refused_before_it_is_made(changes):
    hp = dataclasses.replace(tg.Hyperparameters(device="cpu"), **changes)
    with pytest.raises(tg.UserError, match=r"training needs \d+ GB, cpu has"):
        tg.check_machine(hp, tg.World(hp, {}))


@pytest.mark.parametrize("preset", tg.PRESETS)
def test_every_preset_fits_into_twenty_gigabytes(preset, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 20 << 30}.get)
    hp = tg.Hyperparameters.from_env({"PRESET": preset, "DEVICE": "cpu"})
    tg.check_machine(hp, tg.World(hp, {}))


# ----------------------------------------------------------------------------------------------------------
# The terminal goes, the disk is full
# ----------------------------------------------------------------------------------------------------------


class Gone(io.StringIO):
    """A console whose terminal, or whose reader, is no more."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


def test_a_console_that_is_gone_is_silenced_and_the_log_goes_on(tmp_path, monkeypatch):
    log = tg.RunLog(tmp_path)
    monkeypatch.setattr(sys, "stdout", Gone())
    log("first")
    log.live = True
    log.status("a status")
    log("second")
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\n"


@pytest.mark.whole
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_leave_a_checkpoint(tiny, tmp_path, which, monkeypatch):
    step = tg.Stepper.step

    def struck(stepper, *given, **named):
        step(stepper, *given, **named)
        if len(given) > 3 and given[3] > 0:  # not in the warm-up
            os.kill(os.getpid(), which)

    outside = signal.signal(which, signal.SIG_DFL)  # under nohup it would be ignored, and stay so
    with monkeypatch.context() as patch:
        patch.setattr(tg.Stepper, "step", struck)
        code, _, errors = told(tmp_path, tiny)
    after = signal.signal(which, outside)
    assert code == 143, errors
    assert f"stopped by {which.name}" in errors and "RESUME=1 goes on" in errors
    assert (tmp_path / "logs/run/checkpoint.pt").is_file() and after is signal.SIG_DFL
    assert told(tmp_path, tiny | {"RESUME": "1", "STAGES": "train"})[0] == 0


def test_what_is_ignored_stays_ignored_and_the_rest_interrupts():
    """nohup ignores SIGHUP; outside the loop a signal ends the run with a line."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        heard = []
        with tg.on_stop(heard):
            for which in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), which)
        assert heard == ["SIGINT", "SIGTERM"] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with (
            pytest.raises(KeyboardInterrupt, match="stopped by SIGINT; what was finished is kept"),
            tg.on_stop(),
        ):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, before)


def a_run(folder, lines):
    world = types.SimpleNamespace(rank=0)
    return tg.Run(tg.Hyperparameters(), world, lines.append, folder, 0, None, None, {})


class FullDisk:
    """os.fsync on a disk that is full for some tries."""

    def __init__(self, monkeypatch, tries, code=errno.ENOSPC):
        self.tries, self.code, self.slept = tries, code, 0
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(tg.time, "sleep", self.sleep)

    def fsync(self, _):
        self.tries -= 1
        if self.tries >= 0:
            raise OSError(self.code, os.strerror(self.code))

    def sleep(self, seconds):
        self.slept += seconds


def test_room_on_a_full_disk_is_waited_for_with_one_line(tmp_path, monkeypatch):
    lines, disk = [], FullDisk(monkeypatch, 4)
    a_run(tmp_path, lines).write("model.pt", b"weights")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"] and disk.slept == 40
    assert len(lines) == 1 and "model.pt" in lines[0] and "free 7 bytes within 590s" in lines[0]


@pytest.mark.parametrize(("code", "slept"), [(errno.ENOSPC, 590), (errno.EIO, 0), (errno.EACCES, 0)])
def test_a_write_that_fails_for_good_names_its_file_and_leaves_nothing(tmp_path, monkeypatch, code, slept):
    disk = FullDisk(monkeypatch, 10**6, code)
    with pytest.raises(tg.UserError, match=f"model.pt cannot be written: {os.strerror(code)}"):
        a_run(tmp_path, []).write("model.pt", b"weights")
    assert disk.slept == slept and list(tmp_path.iterdir()) == []


@pytest.mark.whole
def test_a_checkpoint_that_finds_no_room_ends_no_training(tiny, tmp_path, monkeypatch):
    replace = os.replace

    def full(temporary, path):
        if path.name == "checkpoint.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", full)
    code, out, errors = told(tmp_path, tiny | {"STAGES": "train", "CHECKPOINT_EVERY": "10"})
    assert code == 0 and errors == "" and out.count("no checkpoint of step") == 2
    assert (tmp_path / "logs/run/model.pt").is_file()


# ----------------------------------------------------------------------------------------------------------
# Dead ends, and an artifact from elsewhere
# ----------------------------------------------------------------------------------------------------------


def test_advice_does_not_go_round_in_circles(tiny, tmp_path):
    """Only log.txt is left: nothing to resume, nothing to quantise, and the folder is taken."""
    (folder := tmp_path / "logs/run").mkdir(parents=True)
    (folder / "log.txt").write_text("a run that died early\n")
    for changes in ({}, {"STAGES": "quantize"}, {"RESUME": "1"}, {"STAGES": "evaluate"}):
        code, out, errors = told(tmp_path, tiny | changes)
        assert code == 1 and out == "" and "RUN_ID" in errors and len(errors.splitlines()) == 1
        assert changes or "RESUME" not in errors
    (folder / "checkpoint.pt").write_bytes(b"x")
    for changes in ({}, {"STAGES": "quantize"}):
        assert "RESUME=1" in told(tmp_path, tiny | changes)[2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tiny):
    """A trained and packed run."""
    folder = tmp_path_factory.mktemp("packed")
    with contextlib.redirect_stdout(io.StringIO()):
        assert run_here(folder, tiny | {"RUN_ID": "run", "STAGES": "train,quantize", "ITERATIONS": "3"}) == 0
    return folder


@pytest.mark.whole
def test_a_score_is_kept_before_it_is_told(tiny, tmp_path, packed, monkeypatch):
    """A kill right after the line final_roundtrip loses nothing."""
    shutil.copytree(packed / "logs", tmp_path / "logs")
    call = tg.RunLog.__call__

    def die(log, line, console=True):
        call(log, line, console)
        if line.startswith("final_roundtrip"):
            raise SystemExit

    monkeypatch.setattr(tg.RunLog, "__call__", die)
    with pytest.raises(SystemExit):
        told(tmp_path, tiny | {"STAGES": "evaluate"})
    assert result_of(tmp_path)["bpb"]["roundtrip"] > 0


@pytest.mark.whole
def test_an_artifact_and_its_data_are_all_that_a_score_needs(tiny, corpus, tmp_path, packed):
    """Model and vocabulary come from the file, and the preset of its maker."""
    shutil.copy(packed / "logs/run/artifact.bin", tmp_path / "theirs.bin")
    sizes = {name: tiny[name] for name in ("EVAL_SEQ_LEN", "EVAL_STRIDE", "DTYPE", "DEVICE")}
    data = {name: corpus[name] for name in ("DATA_PATH", "TOKENIZER_PATH")}
    alone = data | sizes | {"ARTIFACT": "theirs.bin", "STAGES": "evaluate", "TTT_ENABLED": "0"}
    code, out, errors = told(tmp_path, alone)
    assert code == 0 and errors == "" and "preset:smoke" in out
    known = told(packed, tiny | {"STAGES": "evaluate", "TTT_ENABLED": "0"})[1]
    lines = [[line for line in text.splitlines() if line.startswith("final_")] for text in (out, known)]
    assert lines[0] == lines[1] and len(lines[0]) == 2
    assert result_of(tmp_path)["settings"]["vocab_size"] == 512
    blob = (tmp_path / "theirs.bin").read_bytes()
    assert (
        tg.settings_for(blob, {}).preset == "smoke"
        and tg.settings_for(blob, {"PRESET": "pr601"}).preset == "pr601"
    )
    for preset in ("none", None, [1], {}):
        config, tensors = tg.unpack(blob)
        config["facts"] = {"preset": preset}
        with contextlib.suppress(tg.UserError):
            assert tg.settings_for(tg.pack(config, tensors), {}).preset == "pr606"


# ----------------------------------------------------------------------------------------------------------
# Seeded hostile inputs
# ----------------------------------------------------------------------------------------------------------

JUNK = [None, True, 0, -1, 2**70, 1e308, 0.5, "", "x", "\ud800", [], [1], [[]], {}, {"a": 1}, math.nan]


def spoil(value, dice):
    """The same JSON with one place of it replaced, dropped or doubled."""
    if isinstance(value, (dict, list)) and value and dice.random() < 0.8:
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = dice.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        if dice.random() < 0.2:
            del copy[key]
        else:
            copy[key] = spoil(copy[key], dice)
        return copy
    return dice.choice(JUNK)


def test_a_thousand_hostile_environments():
    names = [
        *map(str.upper, tg.Hyperparameters.fields()),
        *tg.SPELLINGS,
        *tg.FIXED,
        *tg.IGNORED_NAMES,
        "X" * 2000,
    ]
    texts = ["", "0", "1", "-1", "1e308", "1e-320", "nan", "inf", "9" * 400, "1_0", "\u0661", " 1", "1\n",
             "true", "smoke", "pr601", "train", ",", "1,2", "..", "\udcff", "evaluate", "65536", "4", "0.5",
             "swa", "a" * 5000]  # fmt: skip
    dice, good = random.Random(0), 0
    for _ in range(2000):
        env = {dice.choice(names): dice.choice(texts) for _ in range(dice.choice((1, 1, 2, 4)))}
        try:
            hp = tg.Hyperparameters.from_env(env)
            good += 1
            assert not tg.problems(hp)
        except tg.UserError as error:
            assert all(len(line) < 300 for line in str(error).splitlines())
    assert 200 < good < 1800


@pytest.mark.whole
def test_forged_headers(packed, tiny_hp):
    """With a checksum that holds: refused in one line, or a model that is finite and of its settings."""
    blob, dice, world, taken = (
        (packed / "logs/run/artifact.bin").read_bytes(),
        random.Random(1),
        tg.World(tiny_hp, {}),
        0,
    )
    header, end = tg.read_header(blob)
    for count in range(240):
        if count % 4 == 0:
            assert_sound(forged(lambda made: made.update({key: spoil(made[key], dice) for key in made})))
            continue
        config = spoil(header["config"], dice) if count % 2 else header["config"]
        bad = {**header, "config": config} if count % 2 else spoil(header, dice)
        plain = json.dumps(bad).encode()
        small = tg.zstandard.compress(plain, 1)
        body = tg.PREFIX.pack(tg.MAGIC, tg.FORMAT_VERSION, len(small), len(plain)) + small + blob[end:-32]
        try:
            model, _ = tg.load_artifact(body + bytes.fromhex(tg.sha256(body)), tiny_hp, world)
            assert all(torch.isfinite(p).all() for p in model.parameters()) and not tg.problems(model.hp)
            taken += 1
        except tg.UserError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 400
    assert 0 < taken < 96  # what is a fact or a number within its bounds


OWN_FILES = {
    "truncated": lambda data, dice: data[: dice.randrange(len(data))],
    "a byte": lambda data, dice: data.replace(data[:1], bytes([dice.randrange(256)]), 1),
    "no UTF-8": lambda data, dice: data[:9] + b"\xff\xfe" + data[9:],
    "UTF-16": lambda data, dice: data.decode().encode("utf-16"),
    "doubled": lambda data, dice: data.rstrip()[:-1] + b", " + data.lstrip()[1:],
    "spoilt": lambda data, dice: json.dumps(spoil(json.loads(data), dice)).encode(),
    "more": lambda data, dice: data + b"{",
    "deep": lambda data, dice: b"[" * 100_000,
}  # fmt: skip


@pytest.mark.whole
def test_a_thousand_damaged_files_of_our_own(packed, corpus, tiny, tmp_path):
    """result.json when a run begins and meta.json when validation is read: one line, or sound values."""
    (run := tmp_path / "logs/run").mkdir(parents=True)
    shutil.copy(packed / "logs/run/model.pt", run)
    shutil.copytree(corpus["DATA_PATH"], tmp_path / "data")
    env = tiny | {"RUN_ID": "run", "STAGES": "quantize", "DATA_PATH": "data"}
    hp, dice, fine = tg.Hyperparameters.from_env(env), random.Random(2), 0
    own = {
        "tokenizer": "t",
        "files": {"t": {"sha256": tg.sha256(open(hp.tokenizer_path, "rb").read())}},
        "corpus": "c",
    }
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
        world = tg.World(hp, {})
        validation = tg.Validation.load(hp, world)
        texts = {"logs/run/result.json": (packed / "logs/run/result.json").read_bytes(),
                 "data/meta.json": json.dumps(own).encode()}  # fmt: skip
        with (
            mock.patch.object(tg, "open_run", lambda *_: run),
            mock.patch.object(tg, "RunLog", lambda _: lambda *_, **__: None),
            mock.patch.object(tg, "check_tokenizer", lambda *_: None),
        ):
            for count in range(1000):
                name = [*texts][count % 2]
                data = dice.choice([*OWN_FILES.values()])(texts[name], dice)
                (tmp_path / name).write_bytes(data)
                try:
                    if count % 2:
                        assert isinstance(tg.Validation.load(hp, world).corpus, str)
                    else:
                        began = tg.begin_run(hp, world, validation, [])
                        assert all(isinstance(s, float) for s in began.training.counted.values())
                    fine += 1
                except tg.UserError as error:
                    told_of, other = str(error), "is not t, with which data was made"
                    assert len(told_of.splitlines()) == 1 and len(told_of) < 400
                    assert "json: " in told_of or other in told_of
    assert 50 < fine < 600


@pytest.mark.parametrize("spoilt", ["nan", "kind", "shape", "missing", "truncated", "empty", "list", "text"])
def test_a_damaged_model_is_told_of(packed, tiny, tmp_path, spoilt):
    shutil.copytree(packed / "logs", tmp_path / "logs")
    path = tmp_path / "logs/run/model.pt"
    data, weights = path.read_bytes(), torch.load(path, weights_only=True)
    if spoilt == "nan":
        weights["skip_weights"][0, 0] = math.nan
    elif spoilt == "kind":
        weights["skip_weights"] = "text"
    elif spoilt == "shape":
        weights["skip_weights"] = torch.zeros(3)
    elif spoilt == "missing":
        del weights["skip_weights"]
    torch.save([1] if spoilt == "list" else weights, path)
    if spoilt in ("truncated", "empty", "text"):
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello"}[spoilt])
    code, _, errors = told(tmp_path, tiny | {"STAGES": "quantize"})
    assert code == 1 and len(errors.splitlines()) == 1 and "model.pt" in errors and "train again" in errors
