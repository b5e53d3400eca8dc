"""Real processes: 1, 2 and 3 ranks that train and score alike, Muon's shards, stops and kills, two nodes.

Starting one takes longer than most of what it does here, so three of them do all that needs no launcher.
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

import pytest
import torch
from conftest import ROOT, result_of, run_here

import train_gpt as tg

pytestmark = pytest.mark.whole
MAX_RANKS = 3
LIMIT = 240  # seconds for any of it


def free_ports(count):
    """Ports of the loopback interface that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start(folder, command, env):
    """A process in a folder, with no other environment."""
    names = ("PATH", "HOME", "LD_LIBRARY_PATH", "CXX")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    kept |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=kept | env, **pipes)


def finish(processes):
    """Exit statuses, and what each printed, standard output and error; nothing survives the limit."""
    try:
        said = [process.communicate(timeout=LIMIT) for process in processes]
        return [process.returncode for process in processes], said
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
VARIANTS = {"plain": {}, "row_norm": {"row_norm": True}, "equalise": {"equalise": True}}


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


def ranks_environment(rank, size, port):
    """What torchrun would give this rank."""
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}


def in_pass(number, which):
    """Send this process a signal in the midst of the model's forward pass of that number."""
    count = iter(range(1, number + 1))

    def hook(module, inputs):
        if isinstance(module, tg.GPT) and next(count, None) == number:
            os.kill(os.getpid(), which)

    torch.nn.modules.module.register_module_forward_pre_hook(hook)


def rank_main(job):
    """One process of the pool: a member of every world that is large enough; then it is stopped or killed."""
    rank, folder, ports, env = job["rank"], Path(job["folder"]), job["ports"], job["env"]
    torch.set_num_threads(1)
    os.chdir(folder)
    for size in range(2, MAX_RANKS + 1):
        if rank < size:
            os.environ |= ranks_environment(rank, size, ports[size])
            world = tg.World(tg.Hyperparameters.from_env(env), os.environ)
            torch.save(muon_results(world, folder), folder / f"muon-{size}-{rank}.pt")
            for changes in job["runs"][str(size)]:
                tg.run_stages(tg.Hyperparameters.from_env(env | changes), world, [])
            torch.distributed.destroy_process_group()
    if rank == 1:
        in_pass(STOPPED_IN, signal.SIGTERM)
    if rank == 2:
        in_pass(2 * KILLED_IN - 1, signal.SIGKILL)
    os.environ |= env | (ranks_environment(rank, 2, ports[0]) | STOPPED if rank < 2 else ALONE | KILLED)
    sys.argv = ["train_gpt.py"]
    sys.exit(tg.main())


# ----------------------------------------------------------------------------------------------------------
# The pool
# ----------------------------------------------------------------------------------------------------------

STEPS = 12
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
TRAINED = {"STAGES": "train,quantize", "RUN_ID": "trained3"}
# Loops from the fifth step on, lanes, documents; spans of two rows, dealt whole.
LOOPED = {
    "PRESET": "pr1855_smoke", "NUM_LOOPS": "1", "LOOP_START": "1", "LOOP_END": "1",
    "PARALLEL_START_LAYER": "2", "LATE_QAT_THRESHOLD": "0", "TTT_ENABLED": "1", "BIGRAM_VOCAB_SIZE": "0",
    "SKIP_SLIDING": "1", "TRAIN_SEQ_SCHEDULE": "32@0.5", "TTT_MODE": "documents", "TTT_LORA_RANK": "4",
    "TTT_TEMPERATURE": "1", "CANONICAL_MASK": "1",
}  # fmt: skip
STOPPED_IN, STOPPED = 7, {"STAGES": "train", "WARMUP_STEPS": "0", "RUN_ID": "stopped"}
KILLED_IN, KILLED = 7, STOPPED | {"RUN_ID": "killed", "GRAD_ACCUM_STEPS": "2", "CHECKPOINT_EVERY": "4"}


@pytest.fixture(scope="module")
def calm(tiny):
    """A run of a second, without the parts that say nothing about ranks."""
    return tiny | {
        "RUN_ID": "run", "COMPILE": "0", "ITERATIONS": str(STEPS), "WARMDOWN_ITERS": "8", "WARMUP_STEPS": "1",
        "MATRIX_LR": "0.008", "SCALAR_LR": "0.008", "TIED_EMBED_LR": "0.01",
    }  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, calm):
    """A run on one process, in two micro-steps: the partial sums of two ranks, in the same order."""
    folder, out = tmp_path_factory.mktemp("one"), io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run_here(folder, calm | {"GRAD_ACCUM_STEPS": "2"}) == 0
    return folder, out.getvalue()


@pytest.fixture(scope="module")
def pool(tmp_path_factory, calm, one_process):
    """The folder in which three processes have left their results, their exit codes and what they said."""
    folder, ports = tmp_path_factory.mktemp("pool"), free_ports(MAX_RANKS + 1)
    torch.save(muon_results(tg.World(tg.Hyperparameters.from_env(calm), {}), folder), folder / "muon-1-0.pt")
    scored = {"STAGES": "evaluate", "ARTIFACT": str(one_process[0] / "logs/run/artifact.bin")}
    with contextlib.redirect_stdout(io.StringIO()):
        assert run_here(folder, calm | LOOPED | {"RUN_ID": "looped1"}) == 0
    runs = {
        2: [scored | {"RUN_ID": "scored2"}, LOOPED | {"RUN_ID": "looped2"}],
        3: [scored | {"RUN_ID": "scored3"}, TRAINED, LOOPED | {"RUN_ID": "looped3"}],
    }
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import test_distributed as t; "
    code += "t.rank_main(json.loads(sys.argv[2]))"
    processes = []
    for rank in range(MAX_RANKS):
        job = {"rank": rank, "folder": str(folder), "ports": ports, "env": calm, "runs": runs}
        command = ["-W", "ignore", "-c", code, str(ROOT / "tests"), json.dumps(job)]
        processes.append(start(folder, command, {}))
    return folder, *finish(processes)


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


def losses(folder, run_id="run"):
    lines = (folder / "logs" / run_id / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if line["event"] == "train"}


def tensors_of(folder, run_id="run"):
    """The weights of a run, and what its artifact holds."""
    run = folder / "logs" / run_id
    weights = torch.load(run / "model.pt", weights_only=True)
    return weights, tg.unpack((run / "artifact.bin").read_bytes())[1]


def assert_like_one_process(folder, run_id, size, one):
    """Training with QAT, calibration, the packed file and all scores that there are."""
    mine, theirs = losses(folder, run_id), losses(one)
    assert sorted(mine) == [*range(1, STEPS + 1)] and len({round(loss, 2) for loss in mine.values()}) > 5
    assert [mine[step] for step in theirs] == pytest.approx(list(theirs.values()), rel=2e-5)
    many, single = result_of(folder, run_id), result_of(one)
    for name in filter(many["bpb"].get, many["bpb"]):
        assert many["bpb"][name] == pytest.approx(single["bpb"][name], abs=1e-4), name
    assert many["world_size"] == size and many["proofs"]["qat"]["first_step"] < STEPS
    for key in ("params", "steps", "tokens_seen"):
        assert many[key] == single[key], key
    assert many["proofs"]["qat"]["first_step"] == single["proofs"]["qat"]["first_step"]
    (weights, packed), (expected, codes) = tensors_of(folder, run_id), tensors_of(one)
    for name, weight in weights.items():
        assert (weight - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-6, name
    for name, tensor in packed.items():
        if isinstance(tensor, tg.QuantizedTensor):
            # A projection starts at zero and Muon raises its last digits; one rank's own Hessian moves 20 %.
            most = 0.05 if name.endswith("proj.weight") else 0.001
            assert (tensor.codes != codes[name].codes).float().mean() < most, name


def test_three_ranks_equal_one_process(pool, one_process):
    """Five, five and six sequences of a step's sixteen: other partial sums, so other last digits."""
    assert_like_one_process(pool[0], "trained3", 3, one_process[0])


@pytest.mark.parametrize("size", [2, 3])
def test_loops_lanes_and_documents_on_several_ranks(pool, size):
    """Eight spans do not divide by three ranks; each scores what it trained itself."""
    mine, theirs = losses(pool[0], f"looped{size}"), losses(pool[0], "looped1")
    assert len(theirs) == STEPS and len({round(loss, 2) for loss in theirs.values()}) > 5
    assert mine == pytest.approx(theirs, rel=1e-4)
    many, one = result_of(pool[0], f"looped{size}"), result_of(pool[0], "looped1")
    assert many["world_size"] == size
    for name in ("float", "roundtrip", "ttt"):
        assert many["bpb"][name] == pytest.approx(one["bpb"][name], rel=1e-3), name
    lengths, proof = one["by_length"], one["proofs"]["documents"]
    assert many["proofs"]["documents"]["documents"] == proof["documents"] > 4 and proof["steps"] > 0
    assert proof["untrained_documents"] == 0
    assert sum(row["documents"] for row in lengths.values()) == proof["documents"]
    for length, row in many["by_length"].items():
        assert row == pytest.approx(lengths[length], rel=1e-3), length
    assert "\nplan layers:0,1,2 looping:0,1,1,2\n" in (pool[0] / f"logs/looped{size}/log.txt").read_text()
    assert "\nlooping:on step:" in (pool[0] / f"logs/looped{size}/log.txt").read_text()


@pytest.mark.parametrize("size", [2, 3])
def test_the_score_does_not_depend_on_the_number_of_processes(pool, one_process, size):
    """Of the artifact that one process left, scored from that file alone."""
    many, one = result_of(pool[0], f"scored{size}"), result_of(one_process[0])
    for name, tolerance in (("roundtrip", 1e-6), ("sliding", 1e-6), ("ttt", 1e-5)):
        assert many["bpb"][name] == pytest.approx(one["bpb"][name], abs=tolerance), name
    assert many["world_size"] == size and many["proofs"]["ttt"]["steps"] == one["proofs"]["ttt"]["steps"]


def test_a_stop_request_to_one_rank_stops_all_after_the_same_step(pool, calm, one_process):
    """Rank 1 alone gets SIGTERM: both end with status 143 and one checkpoint, which one process continues."""
    folder, codes, said = pool
    assert codes[:2] == [143, 143], [errors for _, errors in said]
    for (_, errors), who in zip(said[:2], ("another rank", "SIGTERM")):
        assert f"stopped by {who} after step {STOPPED_IN + 1};" in errors and "RESUME=1" in errors
        assert "Traceback" not in errors
    state = torch.load(folder / "logs/stopped/checkpoint.pt", weights_only=True)
    assert state["step"] == max(losses(folder, "stopped")) == STOPPED_IN + 1
    assert not (folder / "logs/stopped/model.pt").exists()
    assert run_here(folder, calm | STOPPED | {"RESUME": "1"}) == 0
    assert losses(folder, "stopped") == pytest.approx(losses(one_process[0]), rel=2e-5)


def test_a_run_that_is_killed_resumes_bit_for_bit(pool, calm, one_process):
    """SIGKILL comes in the midst of a step, some steps after a checkpoint."""
    folder, codes, said = pool
    assert codes[2] == -signal.SIGKILL, said[2]
    assert max(losses(folder, "killed")) == KILLED_IN - 1
    assert torch.load(folder / "logs/killed/checkpoint.pt", weights_only=True)["step"] == 4
    assert run_here(folder, calm | KILLED | {"RESUME": "1"}) == 0
    assert losses(folder, "killed") == losses(one_process[0])
    runs = folder / "logs/killed", one_process[0] / "logs/run"
    mine, theirs = (torch.load(run / "model.pt", weights_only=True) for run in runs)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# ----------------------------------------------------------------------------------------------------------
# Two nodes
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory, calm):
    """The README's line for several nodes, for two agents of one process each on the loopback interface."""
    folder = tmp_path_factory.mktemp("nodes")
    command = [
        "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{free_ports(1)[0]}", "--local_addr=127.0.0.1", str(ROOT / "train_gpt.py"),
    ]  # fmt: skip
    return folder, *finish([start(folder, command, calm) for _ in range(2)])


def test_two_nodes_equal_one_process(two_nodes, one_process):
    folder, codes, said = two_nodes
    assert codes == [0, 0], [errors for _, errors in said]
    assert_like_one_process(folder, "run", 2, one_process[0])
    many, one = result_of(folder), result_of(one_process[0])
    assert all(many["bpb"].values()) and many["proofs"]["ttt"]["steps"] == one["proofs"]["ttt"]["steps"] > 0
    assert many["val_tokens"] == one["val_tokens"] and many["val_bytes"] == one["val_bytes"]


def test_one_rank_of_two_nodes_speaks(two_nodes, one_process):
    """What one process says once, two nodes say once, from whichever has rank 0; the other is silent."""
    said = [out for out, _ in two_nodes[2]]
    assert sorted(map(bool, said)) == [False, True] and "\ndevice:2x " in "".join(said)
    events = r"^(run|optimiser|qat|proof|final_[a-z]+|artifact|files)(?= |:)"
    assert re.findall(events, "".join(said), re.M) == re.findall(events, one_process[1], re.M)
