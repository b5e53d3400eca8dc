"""What CUDA's path compiles, on a CPU: its branches, a backend that generates no code, the whole pipeline."""

import dataclasses
import functools

import pytest
import torch
from conftest import random_model, result_of, run_here
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as tg

pytestmark = pytest.mark.whole
SMALL = {
    "NUM_LAYERS": "11", "MODEL_DIM": "64", "NUM_HEADS": "4", "MLP_MULT": "2", "ROPE_DIMS": "8",
    "BIGRAM_VOCAB_SIZE": "256", "BIGRAM_DIM": "32", "TRAIN_BATCH_TOKENS": "1024", "TRAIN_SEQ_LEN": "64",
    "ITERATIONS": "12", "WARMDOWN_ITERS": "8", "WARMUP_STEPS": "2", "MAX_WALLCLOCK_SECONDS": "0",
    "EVAL_SEQ_LEN": "128", "EVAL_STRIDE": "64", "GPTQ_CALIB_SEQUENCES": "16", "TTT_CHUNK_TOKENS": "4096",
    "TTT_BATCH_SEQS": "4", "TTT_EPOCHS": "1", "TRAIN_LOG_EVERY": "10", "LATE_QAT_THRESHOLD": "0.5",
    "NUM_KV_HEADS": "4", "DTYPE": "bf16", "DEVICE": "cpu", "COMPILE": "1", "ATTENTION": "sdpa",
    "GRAD_ACCUM_STEPS": "2", "RUN_ID": "run",
}  # fmt: skip
RUNS = {  # settings; graphs of a step, attention's two included, and with scoring
    "pr606": ({"VE_DIM": "32"}, 10, 11),
    "pr606 of 2 layers": ({"VE_DIM": "32", "NUM_LAYERS": "2", "XSA_LAST_N": "2", "VE_LAYERS": "0,1"}, 10, 11),
    "pr601 of 2 layers": (
        {"NUM_KV_HEADS": "2", "NUM_LAYERS": "2", "XSA_LAST_N": "1", "TTT_ENABLED": "1"},
        13,
        15,
    ),
    "pr1855 of 3 layers": (
        {"NUM_KV_HEADS": "2", "NUM_LAYERS": "3", "NUM_LOOPS": "1", "LOOP_START": "1", "LOOP_END": "1",
         "PARALLEL_START_LAYER": "2", "LATE_QAT_THRESHOLD": "0", "TRAIN_SEQ_SCHEDULE": "32@0.5"},
        9,
        9,
    ),
}  # fmt: skip


@pytest.fixture
def cuda_branches(monkeypatch):
    """The rules of a CUDA device at a CPU's sizes; the compiler traces and differentiates, and runs ATen."""
    sizes = {name: getattr(tg.TUNING["cpu"], name) for name in ("logits", "scored", "scoring", "probe")}
    monkeypatch.setitem(tg.TUNING, "cpu", dataclasses.replace(tg.TUNING["cuda"], **sizes))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def phases(monkeypatch):
    """How many graphs there were at the end of each phase, in order."""
    seen = {}

    def counted(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            seen[function.__name__] = graphs()
            return result

        return call

    monkeypatch.setattr(tg.Stepper, "warm_up", counted(tg.Stepper.warm_up))
    for name in ("begin_run", "measure_reserve", "begin_qat", "train", "compress", "score"):
        monkeypatch.setattr(tg, name, counted(getattr(tg, name)))
    return seen


@pytest.mark.parametrize("name", [pytest.param("pr606", marks=pytest.mark.slow), *list(RUNS)[1:]])
def test_nothing_compiles_on_the_clock_and_no_graph_breaks(tmp_path, corpus, cuda_branches, phases, name):
    """QAT, rehearsal, quantising and proofs included; scoring has its own clock and its own graphs."""
    settings, in_step, with_scoring = RUNS[name]
    assert run_here(tmp_path, corpus | SMALL | settings | {"PRESET": name.split()[0]}) == 0
    log = (tmp_path / "logs" / "run" / "log.txt").read_text()
    assert not counters["graph_break"] and "\ncompile:split" not in log
    assert phases == dict.fromkeys(phases, in_step) | {"begin_run": 2, "score": with_scoring}
    qat = ["begin_qat"] * ("pr1855" not in name)
    assert list(phases) == ["begin_run", "warm_up", "measure_reserve", *qat, "train", "compress", "score"]
    if qat:
        assert "\nqat:on step:" in log and result_of(tmp_path)["proofs"]["qat"]["first_step"] == 10
    else:  # a graph for each order of the layers
        assert "\nlooping:on step:6/12 visits:4" in log and "\nsegments step:7/12 longest:64" in log


def stepper_of(tiny_hp, compiling: bool, **changed) -> tg.Stepper:
    """Two micro-steps of a model whose every parameter is random."""
    hp = dataclasses.replace(tiny_hp, grad_accum_steps=2, attention="sdpa", **changed)
    stream = tg.TokenStream(tg.read_split(hp.data_path, "train"))
    model = random_model(hp).use(tg.sdpa_attention)
    return tg.Stepper(hp, model, stream, tg.World(hp, {}), compiling)


def test_compiled_gradients_are_the_eager_ones_and_add_up_in_their_views(tiny_hp, monkeypatch, request):
    """CUDA's branches compiled, the CPU's eager, QAT on; the optimisers are kept out of it."""
    found = []
    for compiling in (False, True):
        if compiling:
            request.getfixturevalue("cuda_branches")
        stepper = stepper_of(tiny_hp, compiling)
        stepper.qat.begin(0, 1.0)
        stepper.optimisers.step = lambda *_: None
        where = {name: p.grad.data_ptr() for name, p in stepper.flat.parameters.items()}
        stepper.step(0.3, 0.9, qat_on=True)
        for name, p in stepper.flat.parameters.items():
            assert p.grad.data_ptr() == where[name], name
            assert p.grad.data_ptr() == stepper.flat.view(stepper.flat.grads, name).data_ptr(), name
        found.append({name: p.grad for name, p in stepper.flat.parameters.items()})
    assert graphs() >= 2
    largest = max(gradient.abs().max() for gradient in found[0].values())
    for name, expected in found[0].items():
        assert expected.abs().max() > 0 or name == "blocks.0.attn.vr_lambda", name
        off = (found[1][name] - expected).abs().max()
        assert off <= 1e-6 * largest and off <= 5e-5 * expected.abs().max(), name


READS = "item tolist cpu numpy __bool__ __int__ __float__ __index__ nonzero is_nonzero".split()


class NoHostReads(TorchFunctionMode):
    """A value that comes to the host makes it wait for the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in READS:
            raise AssertionError(f"the host reads a tensor: {function.__name__}")
        return function(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """Operations that would start a kernel; one that needs a value on the host is an error."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            raise AssertionError(f"the host reads a tensor: {name}")
        if not function.is_view and not name.startswith(("empty", "detach", "_record_function")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def log_interval(stepper: tg.Stepper) -> None:
    """What the loop does between two lines of its log, as long as nobody reads them."""
    telemetry, ema = tg.Telemetry(stepper.world, tg.Clock(0.0)), tg.EMA(stepper.flat.weights, 0.9)
    for step, qat_on in enumerate((False, True)):
        stepper.step(0.3, 0.9, qat_on, 1.0)
        ema.update(stepper.flat.weights)
        telemetry.post(step, 0.3, stepper.flat.slots)


def planted(kind: str, stepper: tg.Stepper, monkeypatch) -> None:
    """A host read of each kind in the loop."""
    step, slots = stepper.optimisers.step, stepper.flat.slots
    reads = {
        "item": lambda: slots[0].item(), "cpu": lambda: slots.cpu(), "branch": lambda: bool(slots[0] > 0),
        "mask": lambda: slots[slots > 0],
    }  # fmt: skip
    monkeypatch.setattr(stepper.optimisers, "step", lambda *given: (reads[kind](), step(*given)))


@pytest.mark.parametrize("read", ["none", "item", "cpu", "branch", "mask"])
def test_the_host_reads_nothing_between_two_lines_of_the_log(tiny_hp, monkeypatch, read):
    stepper = stepper_of(tiny_hp, compiling=False)
    stepper.qat.begin(0, 1.0)
    log_interval(stepper)  # states exist
    if read != "none":
        planted(read, stepper, monkeypatch)
    try:
        with NoHostReads(), Launches():
            log_interval(stepper)
        assert read == "none"
    except AssertionError as error:
        assert read != "none" and "the host reads" in str(error), error


def test_an_optimiser_step_starts_few_kernels(tiny_hp):
    """Matrices of one shape go through Newton-Schulz together, and AdamW is one kernel for each group."""
    for layers in (3, 6):
        stepper = stepper_of(tiny_hp, compiling=False, num_layers=layers)
        stepper.step(1.0, 0.9, False)
        with Launches() as launches:
            stepper.optimisers.step(1.0, 0.9)
        shapes = len(stepper.optimisers.muon.stacks)
        # a shape: 15 products of Newton-Schulz, momentum, decay and update
        assert len(launches.names) <= 31 * shapes and shapes == 7, layers


@pytest.mark.parametrize(
    ("limit", "said"), [(64, "Call to `torch._dynamo.graph_break()`"), (2, "recompile limit")]
)
def test_what_is_not_compiled_as_a_whole_is_told(limit, said):
    torch._dynamo.reset()
    counters.clear()
    lines, breaks = [], limit == 64

    def work(x):
        if breaks:
            torch._dynamo.graph_break()
        return x + 1

    function = tg.compiled(work, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=limit):
        for size in range(4):
            function(torch.ones(size + 2))
    tg.log_compiler(lines.append)
    assert len(lines) == 1 and lines[0].startswith("compile:split ") and said in lines[0]
    counters.clear()
