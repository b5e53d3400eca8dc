"""Real processes over gloo: Muon's shards, a stop request to one rank, two nodes that train like one process.

What needs no process group, because a rank is only a number there, is tested beside its section.
"""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT

import train_gpt as tg

MAX_RANKS = 3
LIMIT = 240  # seconds for any of it


def free_ports(count):
    """Ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def clean_environment(**more):
    names = ("PATH", "HOME", "LD_LIBRARY_PATH", "CXX")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return kept | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | more


def finish(processes):
    """What each process printed, standard output and error; nothing survives the limit."""
    try:
        return [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


# ----------------------------------------------------------------------------------------------------------
# What every rank does
# ----------------------------------------------------------------------------------------------------------

TALL, WIDE, SQUARE = (48, 16), (16, 48), (32, 32)
# Stacks of 4, 3, 2 and 1: more, as many and fewer matrices than ranks, and shares that do not divide.
SHAPES = [TALL, WIDE, SQUARE, TALL, WIDE, TALL, (64, 24), TALL, WIDE, SQUARE]
VARIANTS = {"plain": {}, "row_norm": {"row_norm": True}}


def noise(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def start_of_muon(world, **options):
    """Parameters of SHAPES and their optimiser, the same on every rank."""
    params = [torch.nn.Parameter(noise(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    return params, tg.Muon(params, lr=0.02, momentum=0.95, weight_decay=0.04, world=world, **options)


def muon_steps(params, optimiser, steps):
    """Steps on gradients that depend on the step alone, under a moving schedule; the last matrix has none."""
    for step in steps:
        for i, p in enumerate(params[:-1]):
            p.grad = noise(*p.shape, seed=1000 * (step + 1) + i)
        for group in optimiser.param_groups:
            group["lr"], group["momentum"] = 0.02 * (1 - step / 20), 0.85 + step / 100
        optimiser.step()


def muon_results(world, folder):
    """Ten steps of every variant, and six that continue from four on one rank fewer."""
    results = {}
    for name, options in VARIANTS.items():
        params, optimiser = start_of_muon(world, **options)
        muon_steps(params, optimiser, range(10))
        results[name] = [p.detach() for p in params], optimiser.state_dict()["momentum"]
    params, optimiser = start_of_muon(world)
    muon_steps(params, optimiser, range(4))
    saved = {"params": [p.detach() for p in params], "muon": optimiser.state_dict()}
    if world.rank == 0:
        torch.save(saved, folder / f"saved-{world.size}.pt")
    fewer = folder / f"saved-{world.size - 1}.pt"
    if fewer.exists():
        state = torch.load(fewer, weights_only=True)
        params, optimiser = start_of_muon(world)
        with torch.no_grad():
            for p, value in zip(params, state["params"]):
                p.copy_(value)
        optimiser.load_state_dict(state["muon"])
        muon_steps(params, optimiser, range(4, 10))
        results["continued"] = [p.detach() for p in params], optimiser.state_dict()["momentum"]
    return results


def join(rank, size, port):
    """The environment that torchrun would give this rank, and its World."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return tg.World(tg.Hyperparameters.from_env({"PRESET": "smoke", "DEVICE": "cpu"}), os.environ)


def stop_one_rank(rank, port, env, stop_after):
    """A run in which SIGTERM comes to rank 1 alone, in the middle of a step; ends this process."""
    step, count = tg.Stepper.step, [0]

    def watched(self, *args, **kwargs):
        count[0] += 1
        if rank == 1 and count[0] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    tg.Stepper.step = watched
    os.environ |= env | {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_PORT": str(port),
    }
    sys.argv = ["train_gpt.py"]
    sys.exit(tg.main())


def rank_main(job):
    """One process of the pool: a member of every world that is large enough for its rank."""
    rank, folder, ports = job["rank"], Path(job["folder"]), job["ports"]
    torch.set_num_threads(1)
    for size in range(2, MAX_RANKS + 1):
        if rank < size:
            world = join(rank, size, ports[size])
            torch.save(muon_results(world, folder), folder / f"muon-{size}-{rank}.pt")
            world.close()
    if rank < 2:
        os.chdir(folder)
        stop_one_rank(rank, ports[0], job["env"], job["stop_after"])


# ----------------------------------------------------------------------------------------------------------
# The pool
# ----------------------------------------------------------------------------------------------------------

STOP_AFTER = 7


@pytest.fixture(scope="module")
def calm(tiny):
    """A run of a second, without the parts that say nothing about ranks."""
    return tiny | {
        "RUN_ID": "run", "DEVICE": "cpu", "COMPILE": "0", "ITERATIONS": "12", "WARMDOWN_ITERS": "8",
        "WARMUP_STEPS": "1", "MATRIX_LR": "0.008", "SCALAR_LR": "0.008", "TIED_EMBED_LR": "0.01",
    }  # fmt: skip


@pytest.fixture(scope="module")
def pool(tmp_path_factory, calm):
    """The folder in which three processes have left their results, and their exit codes and errors."""
    folder = tmp_path_factory.mktemp("pool")
    ports = free_ports(MAX_RANKS + 1)
    one = tg.World(tg.Hyperparameters.from_env(calm), {})
    torch.save(muon_results(one, folder), folder / "muon-1-0.pt")
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import test_distributed as t; "
    code += "t.rank_main(json.loads(sys.argv[2]))"
    processes = []
    for rank in range(MAX_RANKS):
        job = {
            "rank": rank, "folder": str(folder), "ports": ports,
            "env": calm | {"STAGES": "train", "WARMUP_STEPS": "0"}, "stop_after": STOP_AFTER,
        }  # fmt: skip
        command = [sys.executable, "-W", "ignore", "-c", code, str(ROOT / "tests"), json.dumps(job)]
        processes.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env=clean_environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        )
    said = finish(processes)
    return folder, [process.returncode for process in processes], said


@pytest.fixture(scope="module")
def muon(pool):
    """(world size, rank) -> variant -> weights and momentum after ten steps."""
    folder, _, said = pool
    names = [(size, rank) for size in range(1, MAX_RANKS + 1) for rank in range(size)]
    missing = [name for name in names if not (folder / "muon-{}-{}.pt".format(*name)).exists()]
    assert not missing, [errors for _, errors in said]
    return {name: torch.load(folder / "muon-{}-{}.pt".format(*name)) for name in names}


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_muon_is_the_same_on_any_number_of_ranks(muon, size, variant):
    """Ten steps on the same gradients: bitwise on the ranks of one run, and between world sizes."""
    expected, momentum = muon[1, 0][variant]
    for rank in range(size):
        assert same(muon[size, rank][variant][0], expected), rank
        assert same(muon[size, rank][variant][1], momentum), rank
    begins = [noise(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    moved = [not torch.equal(end, begin) for end, begin in zip(expected, begins)]
    assert moved == [True] * (len(SHAPES) - 1) + [False]  # the last one has no gradient


@pytest.mark.parametrize("size", [2, 3])
def test_muon_continues_on_another_number_of_ranks(muon, size):
    """Four steps on one rank fewer, six on these: the same as ten without a break."""
    for rank in range(size):
        assert same(muon[size, rank]["continued"][0], muon[1, 0]["plain"][0])
        assert same(muon[size, rank]["continued"][1], muon[1, 0]["plain"][1])


def losses(folder):
    lines = (folder / "logs/run/metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if line["event"] == "train"}


def run_here(folder, env):
    """The script's main in this process, in a folder of its own; exit status and what it printed."""
    out, before = io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with (
            mock.patch.dict(os.environ, clean_environment(**env), clear=True),
            mock.patch.object(sys, "argv", ["train_gpt.py"]),
            contextlib.redirect_stdout(out),
        ):
            return tg.main(), out.getvalue()
    finally:
        os.chdir(before)


def test_a_stop_request_to_one_rank_stops_all_after_the_same_step(pool, calm):
    """Rank 1 alone gets SIGTERM: both end with status 143 and one checkpoint, which one process continues."""
    folder, codes, said = pool
    assert codes[:2] == [143, 143], [errors for _, errors in said]
    messages = [re.search(r"stopped by SIGTERM after step (\d+)", errors) for _, errors in said[:2]]
    state = torch.load(folder / "logs/run/checkpoint.pt", weights_only=True)
    assert [int(found[1]) for found in messages] == [state["step"]] * 2
    assert STOP_AFTER <= state["step"] <= STOP_AFTER + 1
    assert max(losses(folder)) == state["step"] and not (folder / "logs/run/model.pt").exists()
    code, _ = run_here(folder, calm | {"STAGES": "train", "WARMUP_STEPS": "0", "RESUME": "1"})
    assert code == 0 and sorted(losses(folder)) == list(range(1, 13))


# ----------------------------------------------------------------------------------------------------------
# Two nodes
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory, calm):
    """The README's line for several nodes, for two agents of one process each on the loopback interface."""
    folder = tmp_path_factory.mktemp("nodes")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
        "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_ports(1)[0]}",
        "--local_addr=127.0.0.1", str(ROOT / "train_gpt.py"),
    ]  # fmt: skip
    agents = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=clean_environment(**calm),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for _ in range(2)
    ]
    said = finish(agents)
    return folder, [agent.returncode for agent in agents], said


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, calm):
    """The same run on one process, in two micro-steps: the partial sums of two ranks, in the same order."""
    folder = tmp_path_factory.mktemp("one")
    code, out = run_here(folder, calm | {"GRAD_ACCUM_STEPS": "2"})
    assert code == 0, out
    return folder, out


def read(folder):
    return json.loads((folder / "logs/run/result.json").read_text())


def test_two_nodes_equal_one_process(two_nodes, one_process):
    """Training with QAT, calibration, the packed file and all four scores."""
    (folder, codes, said), (other, _) = two_nodes, one_process
    assert codes == [0, 0], [errors for _, errors in said]
    many, one = losses(folder), losses(other)
    assert sorted(many) == list(range(1, 13)) and len({round(loss, 2) for loss in many.values()}) > 5
    assert [many[step] for step in one] == pytest.approx(list(one.values()), rel=2e-5)
    many, one = read(folder), read(other)
    for name in ("float", "roundtrip", "sliding", "ttt"):
        assert many["bpb"][name] == pytest.approx(one["bpb"][name], abs=1e-4), name
    assert many["world_size"] == 2 and many["steps"] == one["steps"] == 12
    for key in ("params", "tokens_seen", "val_tokens", "val_bytes"):
        assert many[key] == one[key], key
    assert many["proofs"]["qat"]["first_step"] == one["proofs"]["qat"]["first_step"]
    assert many["proofs"]["ttt"]["steps"] == one["proofs"]["ttt"]["steps"] > 0
    weights, expected = (
        torch.load(path / "logs/run/model.pt", weights_only=True) for path in (folder, other)
    )
    for name, weight in weights.items():
        assert (weight - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-6, name
    mine, theirs = (tg.unpack((path / "logs/run/artifact.bin").read_bytes())[1] for path in (folder, other))
    for name, tensor in mine.items():
        if isinstance(tensor, tg.QuantizedTensor):
            assert (tensor.codes != theirs[name].codes).float().mean() < 0.02, name


def test_one_rank_of_two_nodes_speaks(two_nodes, one_process):
    """What one process says once, two nodes say once, from whichever has rank 0; the other is silent."""
    said = [out for out, _ in two_nodes[2]]
    assert sorted(map(bool, said)) == [False, True]
    events = r"^(run|optimiser|qat|proof|final_[a-z]+|artifact|files)(?= |:)"
    assert re.findall(events, "".join(said), re.M) == re.findall(events, one_process[1], re.M)
