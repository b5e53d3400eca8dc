"""What only a GPU can show; skipped without one. TEST_DEVICE=cpu: what a CPU can check of these tests."""

import contextlib
import dataclasses
import os

import pytest
import torch
from conftest import draw, random_model, result_of, run_script

import train_gpt as tg

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def hp(tiny_hp):
    """Every technique on, heads of 64 as the presets have, bf16."""
    wide = dict(model_dim=128, num_heads=2, num_kv_heads=1, train_seq_len=128, train_batch_tokens=2048)
    return dataclasses.replace(tiny_hp, **wide, dtype="bf16", device=DEVICE)


def model_of(hp, world):
    """A model with every parameter random, and the kernel that the device's measurement chose."""
    return random_model(hp).to(world.device).use(tg.choose_attention(hp, world)[1])


def stepper_of(hp, compiling):
    world = tg.World(hp, {})
    stream = tg.TokenStream(tg.read_split(hp.data_path, "train"))
    return tg.Stepper(hp, model_of(hp, world), stream, world, compiling)


@contextlib.contextmanager
def waiting_is_an_error():
    """Whatever makes the host wait for the device raises an exception."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_bf16_on_the_device_is_fp32_on_the_cpu_within_rounding(hp):
    world = tg.World(hp, {})
    model, plain = model_of(hp, world), random_model(hp)
    tokens = torch.randint(0, hp.vocab_size, (4, 129), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1], tokens[:, 1:]
    with world.autocast():
        # no operation makes the stream float32
        assert model.hidden(x.to(world.device)).dtype == torch.bfloat16
        loss = model(x.to(world.device), y.to(world.device))
    expected = plain(x, y)
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    loss.backward(), expected.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        if q.grad is None:  # the first layer's value residual
            assert p.grad is None, name
            continue
        alike = torch.nn.functional.cosine_similarity(p.grad.float().cpu().flatten(), q.grad.flatten(), dim=0)
        assert alike > 0.97 or q.grad.norm() < 1e-4, name


def test_the_kernel_that_is_chosen_gives_what_float32_does(hp):
    """Output and gradients; some kernel of a GPU is better than leaving PyTorch the choice."""
    lines = []
    name, attend = tg.choose_attention(hp, tg.World(hp, {}), compiling=DEVICE == "cuda", log=lines.append)
    assert tg.try_attention(attend, hp, tg.World(hp, {}), compiling=DEVICE == "cuda") > 0
    if DEVICE == "cuda":
        assert not name.startswith("sdpa "), lines


def test_the_measured_rate_is_a_device_s(hp):
    """Of large products in bf16, to a factor that no two GPUs of the last ten years have between them."""
    assert 1e8 < tg.World(hp, {}).matrix_rate() < 1e16


def test_a_step_and_its_telemetry_do_not_wait_for_the_gpu(hp):
    stepper = stepper_of(hp, compiling=False)
    telemetry, ema = tg.Telemetry(stepper.world, tg.Clock(0.0)), tg.EMA(stepper.flat.weights, 0.9)

    def steps():
        for step, on in enumerate((False, True)):
            stepper.step(0.2, 0.9, on)
            ema.update(stepper.flat.weights)
            telemetry.post(step, 0.2, stepper.flat.slots)

    stepper.qat.begin(0, 1.0)
    steps()  # states exist
    with waiting_is_an_error():
        steps()
    losses = [loss for *_, loss in telemetry.read(lag=0)]
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)
    assert torch.isfinite(stepper.flat.weights).all()


def test_qat_starts_under_the_compiler_without_a_new_graph(hp):
    """The compiled step with QAT has the loss of the eager one, and its start compiles and breaks nothing."""
    compiled, eager = stepper_of(hp, compiling=True), stepper_of(hp, compiling=False)
    counters, losses = torch._dynamo.utils.counters, {}
    counters.clear()
    compiled.warm_up()
    before, kept = counters["stats"]["unique_graphs"], eager.flat.weights.clone()
    for stepper in (compiled, eager):
        for scale, on in ((1.0, False), (0.3, True), (0.0, True)):
            stepper.flat.weights.copy_(kept)
            stepper.stream.position = 0
            stepper.step(scale, 0.9, on)
            losses.setdefault((scale, on), []).append(float(stepper.flat.slot["loss"]))
    assert counters["stats"]["unique_graphs"] == before > 0 and not counters["graph_break"]
    for ours, expected in losses.values():
        assert ours == pytest.approx(expected, rel=5e-3)


def test_gptq_on_the_device_is_gptq_on_the_cpu():
    x, weight = draw("x", (512, 96)) @ draw("mix", (96, 96)), draw("weight", (3, 64, 96))
    hessian = (x.T @ x / 512).expand(3, 96, 96)
    here = tg.gptq(weight, hessian, 15)
    there = tg.gptq(weight.to(DEVICE), hessian.to(DEVICE), 15)
    errors = [tg.weighted_error(weight, q.dequantize().cpu(), hessian) for q in (here, there)]
    torch.testing.assert_close(*errors, rtol=0.05, atol=0.0)
    assert (here.codes == there.codes.cpu()).float().mean() > 0.9


@pytest.mark.whole
@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_run_through_every_stage(tmp_path, tiny, switch):
    """Compiled and eager, with a clock: artifact written and scored, proofs present, both budgets kept."""
    clock = {"MAX_WALLCLOCK_SECONDS": "20", "ITERATIONS": "1000000", "WARMDOWN_ITERS": "100"}
    device = {"DEVICE": DEVICE, "DTYPE": "bf16", "COMPILE": switch}
    done = run_script(
        tmp_path, tiny | clock | device | {"TRAIN_LOG_EVERY": "100", "RUN_ID": "run"}, timeout=600
    )
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path)
    assert all(result["bpb"][name] < 6 for name in ("float", "roundtrip", "sliding", "ttt"))
    assert result["proofs"]["qat"]["first_step"] and result["proofs"]["ttt"]["steps"]
    assert result["budget"]["training"]["within"] and result["budget"]["evaluation"]["within"]


def test_compiled_gradients_are_the_eager_ones(hp):
    """In float32, over two micro-steps, into the views that the optimisers read."""
    found = []
    for compiling in (False, True):
        stepper = stepper_of(dataclasses.replace(hp, dtype="fp32", grad_accum_steps=2), compiling)
        stepper.optimisers.step = lambda *_: None
        stepper.step(1.0, 0.9, False)
        found.append({name: p.grad.clone() for name, p in stepper.flat.parameters.items()})
        assert all(p.grad.data_ptr() == stepper.flat.view(stepper.flat.grads, name).data_ptr()
                   for name, p in stepper.flat.parameters.items())  # fmt: skip
    largest = max(gradient.abs().max() for gradient in found[0].values())
    for name, expected in found[0].items():
        assert (found[1][name] - expected).abs().max() <= 1e-5 * largest, name


@pytest.mark.whole
@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_train_as_one(tmp_path, tiny):
    """NCCL's sums instead of one device's, through every stage; the launcher's environment decides."""
    runs = []
    for processes in (1, 2):
        env = tiny | {"DEVICE": DEVICE, "DTYPE": "fp32", "RUN_ID": f"on{processes}", "COMPILE": "0"}
        done = run_script(tmp_path, env, processes, timeout=600)
        assert done.returncode == 0, done.stderr
        runs.append(result_of(tmp_path, f"on{processes}"))
    one, two = runs
    assert (one["world_size"], two["world_size"]) == (1, 2) and one["steps"] == two["steps"]
    for name, score in one["bpb"].items():
        assert two["bpb"][name] == pytest.approx(score, rel=1e-3), name
