"""What only a GPU can show; skipped without one. TEST_DEVICE=cpu runs what a CPU can of it, to check the tests."""

import dataclasses
import json
import os

import pytest
import torch
from conftest import run_script

import train_gpt as tg

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def hp(tiny):
    """Every technique on, heads of 64 as the presets have, bf16."""
    wide = {"MODEL_DIM": "128", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "DTYPE": "bf16", "DEVICE": DEVICE}
    return tg.Hyperparameters.from_env(tiny | wide | {"TRAIN_SEQ_LEN": "128", "TRAIN_BATCH_TOKENS": "2048"})


def model_of(hp, world):
    """A model with every parameter random, on the device."""
    torch.manual_seed(0)
    model = tg.GPT(hp)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(world.device)


def stepper_of(hp, compiling):
    world = tg.World(hp, {})
    model = model_of(hp, world)
    tg.choose_attention(hp, model, world)
    return tg.Stepper(hp, model, tg.TokenStream(tg.read_split(hp.data_path, "train")), world, compiling)


def test_bf16_on_the_device_is_fp32_on_the_cpu_within_rounding(hp):
    world = tg.World(hp, {})
    model, plain = model_of(hp, world), model_of(hp, tg.World(dataclasses.replace(hp, device="cpu"), {}))
    tg.choose_attention(hp, model, world)
    tokens = torch.randint(0, hp.vocab_size, (4, 129), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1], tokens[:, 1:]
    with world.autocast():
        assert model.hidden(x.to(world.device)).dtype == torch.bfloat16  # no operation makes the stream float32
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


@pytest.mark.parametrize("kernel", tg.SDPA_KERNELS)
def test_every_kernel_of_sdpa_gives_the_same(hp, kernel):
    q, k, v = (torch.randn(2, 128, heads, 64, device=DEVICE, dtype=torch.bfloat16) for heads in (4, 2, 2))
    exact = tg.sdpa_attention(*(x.double() for x in (q, k, v)))
    torch.testing.assert_close(tg.sdpa_by(kernel)(q, k, v).double(), exact, atol=0.02, rtol=0.02)


def test_a_step_does_not_wait_for_the_gpu(hp):
    stepper = stepper_of(hp, compiling=False)
    for on in (False, True):
        stepper.step(0.2, 0.9, on)  # states exist
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for on in (False, True):
            stepper.step(0.2, 0.9, on)
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(stepper.flat.weights).all()


def test_qat_starts_under_the_compiler_without_a_new_graph(hp):
    """The compiled step with QAT has the loss of the eager one, and its start compiles nothing."""
    compiled, eager = stepper_of(hp, compiling=True), stepper_of(hp, compiling=False)
    compiled.warm_up()
    graphs = torch._dynamo.utils.counters["stats"]
    before, kept = graphs["unique_graphs"], eager.flat.weights.clone()
    losses = {}
    for stepper in (compiled, eager):
        for scale, on in ((1.0, False), (0.3, True), (0.0, True)):
            stepper.flat.weights.copy_(kept)
            stepper.stream.position = 0
            stepper.step(scale, 0.9, on)
            losses.setdefault((scale, on), []).append(float(stepper.flat.slots[0]))
    assert graphs["unique_graphs"] == before > 0
    for pair in losses.values():
        assert pair[0] == pytest.approx(pair[1], rel=5e-3)


def test_gptq_on_the_device_is_gptq_on_the_cpu():
    torch.manual_seed(0)
    x, weight = torch.randn(512, 96) @ torch.randn(96, 96), torch.randn(3, 64, 96)
    hessian = (x.T @ x / 512).expand(3, 96, 96)
    here = tg.gptq(weight, hessian, 15)
    there = tg.gptq(weight.to(DEVICE), hessian.to(DEVICE), 15)
    errors = [tg.weighted_error(weight, q.dequantize().cpu(), hessian) for q in (here, there)]
    torch.testing.assert_close(*errors, rtol=0.05, atol=0.0)
    assert (here.codes == there.codes.cpu()).float().mean() > 0.9


@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_run_through_every_stage(tmp_path, tiny, switch):
    """Compiled and eager, with a clock: artifact written and scored, proofs present, both budgets kept."""
    clock = {"MAX_WALLCLOCK_SECONDS": "20", "ITERATIONS": "1000000", "WARMDOWN_ITERS": "100", "TRAIN_LOG_EVERY": "100"}
    env = tiny | clock | {"DEVICE": DEVICE, "DTYPE": "bf16", "COMPILE": switch, "RUN_ID": "run"}
    done = run_script(tmp_path, env, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "logs/run/result.json").read_text())
    assert all(result["bpb"][name] < 6 for name in ("float", "roundtrip", "sliding", "ttt"))
    assert result["proofs"]["qat"]["first_step"] and result["proofs"]["ttt"]["steps"]
    assert result["budget"]["training"]["within"] and result["budget"]["evaluation"]["within"]
