"""records/benchmark.py: its baselines compute what the script computes, its figures are what they say."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
import time

import benchmark
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, random_model

import train_gpt as tg

TINY = {
    "NUM_LAYERS": "2", "MODEL_DIM": "64", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "ROPE_DIMS": "8",
    "MLP_MULT": "2", "XSA_LAST_N": "1", "VOCAB_SIZE": "128", "BIGRAM_VOCAB_SIZE": "64", "BIGRAM_DIM": "16",
    "VE_DIM": "16", "VE_LAYERS": "1", "TRAIN_SEQ_LEN": "32", "TRAIN_BATCH_TOKENS": "256",
    "EVAL_SEQ_LEN": "64", "EVAL_STRIDE": "32", "TTT_CHUNK_TOKENS": "128", "TTT_BATCH_SEQS": "2",
    "GPTQ_CALIB_SEQUENCES": "4",
}  # fmt: skip
WITHOUT_VE = {key: value for key, value in TINY.items() if not key.startswith("VE_")}
STEPS = ("micro-step", "optimiser", "step")
ROW = set(
    "name median_s min_s max_s repeats first_s extrapolated_times tokens_per_s tflops matrix_share "
    "peak_memory_bytes ratio remark".split()
)


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Scoring batches of 256 tokens, and a known matrix rate: the large product alone takes a second."""
    patch.setitem(tg.TUNING, "cpu", dataclasses.replace(tg.TUNING["cpu"], scoring=256 * 64))
    patch.setattr(benchmark, "matrix_rate", lambda device, dtype: 0.5)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """For every test."""
    make_small(monkeypatch)


def run(folder, *arguments: str, **settings: str) -> dict:
    """One subcommand at tiny sizes; what its JSON file holds."""
    pairs = [part for pair in (TINY | settings).items() for part in ("--set", "=".join(pair))]
    path = folder / "out" / "result.json"
    assert benchmark.main([*arguments, "--device", "cpu", "--repeats", "2", *pairs, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def check_rows(everything: tuple[dict, str], name: str) -> dict[str, dict]:
    """The rows of a subcommand by name; each has the fields, and they fit together."""
    report = next(one for one in everything[0]["reports"] if one["subcommand"] == name)
    assert {"subcommand", "preset", "changed", "dtype", "compiled", "hardware", "notes"} <= report.keys()
    for row in report["rows"]:
        assert row.keys() == ROW
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"] and row["repeats"] == 2
        assert row["peak_memory_bytes"] > 1e6 and row["first_s"] > 0
        assert (row["tflops"] is None) == (row["matrix_share"] is None)
        if row["tflops"]:
            assert row["matrix_share"] == pytest.approx(row["tflops"] / 0.5)
    return {row["name"]: row for row in report["rows"]}


# ----------------------------------------------------------------------------------------------------------
# The baselines compute the same
# ----------------------------------------------------------------------------------------------------------


def models(preset: str, settings: dict[str, str]) -> tuple[tg.Hyperparameters, tg.World, tg.GPT]:
    """A tiny model of a preset with every parameter random."""
    hp = tg.Hyperparameters.from_env({"PRESET": preset, "DEVICE": "cpu"} | settings)
    world = tg.World(hp, {})
    return hp, world, random_model(hp, seed=3, spread=0.3).use(tg.choose_attention(hp, world)[1])


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("bf16", 1e-3)])
@pytest.mark.parametrize("preset, tiny", [("smoke", TINY), ("pr606", TINY), ("pr601", WITHOUT_VE)])
def test_the_plain_model_has_the_same_loss_and_gradients(preset, tiny, dtype, tolerance):
    hp, world, model = models(preset, tiny | {"DTYPE": dtype, "ROPE_NTK_REFERENCE": "32"})
    plain = benchmark.PlainGPT(hp, dict(model.named_parameters()), world.dtype)
    tokens = torch.randint(hp.vocab_size, (4, 65), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1], tokens[:, 1:]
    losses = []
    for one in (model, plain):
        with world.autocast():
            loss = one(x, y)
        loss.backward()
        losses.append(loss.item())
    unread = [name for name, w in plain.w.items() if w.grad is None and not name.endswith("0.attn.vr_lambda")]
    assert not unread, f"PlainGPT in records/benchmark.py does not use {unread}"
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    if dtype == "fp32":
        for name, p in model.named_parameters():
            expected = plain.w[name].grad
            assert p.grad is expected is None or (p.grad - expected).norm() <= 1e-4 * expected.norm(), name


def test_a_baseline_that_computes_something_else_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "norm", lambda x: 0.5 * F.rms_norm(x, (x.size(-1),)))
    pairs = [part for pair in TINY.items() for part in ("--set", "=".join(pair))]
    arguments = ["train", "--versus", "--dtype", "fp32", *pairs, "--json", str(tmp_path / "x.json")]
    assert benchmark.main(arguments) == 1
    assert "the plain model's loss" in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_a_plain_step_moves_the_weights_as_the_scripts_does():
    """Two steps: the same clipping, learning rates, decays and momentum, within the bf16 of torch's Muon."""
    hp, world, model = models("smoke", TINY | {"DTYPE": "fp32"})
    tokens = np.random.default_rng(0).integers(hp.vocab_size, size=2000).astype(np.uint16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = benchmark.PlainTrainer(model, world)
    stepper = tg.Stepper(hp, model, tg.TokenStream([tokens]), world, False)
    stream = tg.TokenStream([tokens])
    for _ in range(2):
        stepper.step(1.0, hp.muon_momentum, False)
        rows = torch.from_numpy(stream.step(hp.train_batch_tokens, hp.train_seq_len))
        plain.step(rows[:, :-1], rows[:, 1:], 3)
    for name, p in model.named_parameters():
        if plain.model.w[name].grad is None:  # the first layer has no V before it
            assert name == "blocks.0.attn.vr_lambda"
            continue
        ours, theirs = p.detach() - before[name], plain.model.w[name].detach() - before[name]
        assert (ours - theirs).norm() <= 0.05 * theirs.norm(), name


def test_the_plain_column_loop_is_gptq():
    torch.manual_seed(0)
    W, x = torch.randn(24, 160), torch.randn(400, 160) @ torch.randn(160, 160)
    H = x.mT @ x / len(x)
    scales = tg.storable(tg.row_scales(W, 15))
    codes = benchmark.plain_gptq(W, H, scales, 15, 0.01)
    ours = tg.gptq(W, H, 15, 0.01, scales)
    assert codes.abs().max() <= 15 and (codes != ours.codes).float().mean() < 0.01
    rounded = tg.round_to_grid(W, scales, 15).dequantize()
    assert tg.weighted_error(W, codes * scales[:, None], H) < 0.6 * tg.weighted_error(W, rounded, H)


def test_the_plain_scorer_is_evaluate():
    hp, world, model = models("smoke", TINY | {"DTYPE": "fp32"})
    tokens = torch.randint(hp.vocab_size, (301,), dtype=torch.int32)
    windows = tg.sliding_windows(300, 64, 20)
    score = tg.evaluate(model, tokens, torch.ones(300, dtype=torch.uint8), windows, world)
    assert score.positions == 300
    assert benchmark.plain_evaluate(model, tokens, windows, world) == pytest.approx(score.val_loss, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------
# The figures
# ----------------------------------------------------------------------------------------------------------


def test_measure_alternates_and_counts(tmp_path, monkeypatch):
    """Two calls of known length: order, medians, rates, ratio and extrapolation."""
    calls = []
    monkeypatch.setattr(benchmark, "seconds_of", lambda run, device: run())
    args = benchmark.parser().parse_args(["train", "--repeats", "3", "--device", "cpu"])
    hp = benchmark.settings_for("train", args)
    bench = benchmark.Bench("train", args, hp, tg.World(hp, {}))
    lengths = {"a": iter([9.0, 2.0, 1.0, 4.0]), "b": iter([8.0, 3.0, 3.0, 3.0])}
    call = lambda name: lambda: (calls.append(name), next(lengths[name]))[1]
    a, b = bench.measure(
        {
            "a": benchmark.Work(call("a"), tokens=100, flops=1e12),
            "b": benchmark.Work(call("b"), tokens=10, times=4),
        }
    )
    assert "".join(calls) == "ab" + "abbaab"
    assert (a["first_s"], a["min_s"], a["median_s"], a["max_s"]) == (9.0, 1.0, 2.0, 4.0)
    assert (a["tokens_per_s"], a["tflops"], a["matrix_share"], a["ratio"]) == (50.0, 0.5, 1.0, None)
    assert (b["median_s"], b["ratio"], b["extrapolated_times"]) == (12.0, 6.0, 4)
    assert b["tokens_per_s"] == pytest.approx(10 / 3)
    text = benchmark.table([bench.report()])
    assert "2.00 s" in text and "1.00..4.00" in text and "100.0%" in text and "6.00" in text


def test_stage_seconds_exclude_what_a_stage_calls(monkeypatch):
    """gptq's own time is without the clip search that it calls; both functions are back afterwards."""
    slow = lambda *_: time.sleep(0.1)
    monkeypatch.setattr(tg, "search_scales", slow)
    monkeypatch.setattr(tg, "gptq", lambda: (time.sleep(0.02), tg.search_scales()))
    with benchmark.stage_clock(torch.device("cpu"), ["gptq", "search_scales", "no such function"]) as seconds:
        tg.gptq()
    assert seconds.keys() == {"gptq", "search_scales"}
    assert 0.015 < seconds["gptq"] < 0.08 and seconds["search_scales"] >= 0.1
    assert tg.search_scales is slow


def test_flops_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    hp, _, model = models("smoke", TINY | {"DTYPE": "fp32"})
    tokens = torch.randint(hp.vocab_size, (2, 32))

    def attend(q, k, v):  # its products run over all T positions, not T / 2
        q, k, v = (
            x.transpose(1, 2) for x in (q, *(x.repeat_interleave(q.size(2) // x.size(2), 2) for x in (k, v)))
        )
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)

    for block in model.blocks:
        block.attn.attend = attend
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    full_attention = 2 * hp.num_layers * hp.model_dim * 32
    assert counter.get_total_flops() / tokens.numel() == benchmark.forward_flops(model, 32) + full_attention
    half = benchmark.forward_flops(model, 32) - benchmark.forward_flops(model, 32, 0.5)
    assert half == hp.vocab_size * hp.model_dim


def test_entropy_of_known_codes():
    codes = torch.tensor([[-3, -3, 5, 5], [-3, -3, 5, 5]], dtype=torch.int8)
    assert benchmark.entropy_bytes([codes]) == pytest.approx(1.0)  # eight codes of one bit
    assert benchmark.entropy_bytes([codes[:1], codes[1:]]) == pytest.approx(1.0)


def test_hessians_are_correlated_and_positive():
    _, _, model = models("smoke", TINY)
    hessians = benchmark.correlated_hessians(model, torch.device("cpu"))
    assert len(hessians) == 12
    assert hessians["blocks.0.attn.c_q.weight"] is hessians["blocks.0.attn.c_v.weight"]
    H = hessians["blocks.1.mlp.proj.weight"]
    assert torch.linalg.eigvalsh(H).min() > 0
    size = H.diagonal().sqrt()
    assert ((H / size / size[:, None]).abs() > 0.2).float().mean() > 2 / len(H)  # more than the diagonal


# ----------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(tmp_path_factory, corpus) -> tuple[dict, str]:
    """`all` with the baselines, measured once: what its file holds, and what it printed."""
    tokenizer = {"TOKENIZER_PATH": corpus["TOKENIZER_PATH"], "VOCAB_SIZE": "512"}
    words = ("all", "--no-start", "--versus", "--preset", "smoke", "--dtype", "bf16")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        make_small(patch)
        report = run(tmp_path_factory.mktemp("everything"), *words, **tokenizer)
    return report, printed.getvalue()


@pytest.mark.whole
def test_all_is_one_table_and_one_file(everything):
    report, printed = everything
    assert [one["subcommand"] for one in report["reports"]] == list(benchmark.SUBCOMMANDS)
    assert printed.count("fastest..slowest") == 1 and printed.count("tokens/s") == 1
    assert report["command"].startswith("python records/benchmark.py all")


@pytest.mark.whole
@pytest.mark.parametrize(
    "name, expected",
    [
        ("train", {f"{kind}{plain}" for kind in STEPS for plain in ("", ", plain eager")}),
        ("muon", {"Muon", "torch.optim.Muon"}),
        ("qat", {"step without QAT", "step with QAT"}),
        ("eval", {"side by side", "side by side, plain", "sliding", "sliding, plain"}),
        ("ttt", {"score a chunk", "train on a chunk"}),
        ("pack", {"pack", "plain zstd -22", "unpack"}),
        ("data", {"read_shard", "TokenStream.step", "ByteTable.count"}),
        ("count", set()),
    ],
)
def test_subcommand(everything, name, expected):
    assert set(check_rows(everything, name)) == expected


@pytest.mark.whole
def test_count(everything):
    """tests/test_traffic.py holds the figures."""
    report = next(one for one in everything[0]["reports"] if one["subcommand"] == "count")
    assert report["counts"]["tokens"] == 32 and report["counts"]["graph_breaks"] == 0
    assert f"moved by {report['counts']['launches']} generated kernels" in everything[1]


@pytest.mark.whole
def test_train(everything):
    rows = check_rows(everything, "train")
    for kind in STEPS:
        ours, plain = rows[kind], rows[f"{kind}, plain eager"]
        assert ours["ratio"] is None and plain["ratio"] == pytest.approx(plain["median_s"] / ours["median_s"])
    assert rows["step"]["tokens_per_s"] == pytest.approx(256 / rows["step"]["median_s"])
    assert "train: a step of 4096 tokens would take" in everything[1] and "plain eager" in everything[1]
    report = everything[0]["reports"][0]
    assert report["dtype"] == "bfloat16" and report["changed"]["num_layers"] == 2


@pytest.mark.whole
def test_gptq(everything):
    rows = check_rows(everything, "gptq")
    assert rows["quantise the model"]["remark"] == "12 matrices, 57344 weights, steps by clip"
    loops = [row for name, row in rows.items() if name.startswith("plain loop")]
    assert sum(row["extrapolated_times"] for row in loops) == 12
    assert all("extrapolated" in row["remark"] for row in loops)
    stages = everything[1].split("stages: ")[1].splitlines()[0].split(", ")
    wanted = {"clip search", "column loop", "factorisation", "rest"}
    assert wanted <= {stage.rsplit(" ", 2)[0] for stage in stages}


def test_without_a_tokenizer_its_row_is_missing(tmp_path, capsys):
    report = run(tmp_path, "data", "--no-start", TOKENIZER_PATH="nowhere.model")
    assert {row["name"] for row in report["rows"]} == {"read_shard", "TokenStream.step"}
    assert "skipped, no tokenizer nowhere.model" in capsys.readouterr().out


@pytest.mark.whole
def test_launch_to_first_step_ends_the_run_there(tmp_path):
    code = "import time; print('header'); time.sleep(0.3); print('step:1/9 x', flush=True); time.sleep(60)"
    assert 0.3 < benchmark.first_step_seconds([sys.executable, "-c", code], {}, str(tmp_path)) < 20
    with pytest.raises(tg.UserError, match="before its first step: error: no shards"):
        benchmark.first_step_seconds([sys.executable, "-c", "print('error: no shards')"], {}, str(tmp_path))


def test_full_presets_are_cut_on_a_cpu_and_only_there():
    args = benchmark.parser().parse_args(["train", "--preset", "pr606", "--device", "cpu"])
    assert benchmark.settings_for("train", args).train_batch_tokens == 4096
    assert benchmark.settings_for("gptq", args).train_seq_len == 2048
    assert benchmark.settings_for("eval", args).eval_stride == 64
    args = benchmark.parser().parse_args(["pack", "--device", "cpu"])
    assert benchmark.settings_for("pack", args).preset == "pr606"
    assert benchmark.settings_for("train", args).preset == "smoke"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "subcommand"),
        (["banana"], "banana"),
        (["train", "--repeats", "0"], "positive"),
        (["train", "--repeats", "\u00b2"], "positive"),
        (["train", "--set", "NUM_LAYERS"], "NAME=VALUE"),
        (["train", "--set", "NUM_LAYERZ=3"], "NUM_LAYERS"),
        (["train", "--set", "NUM_HEADS=3", "--set", "NUM_KV_HEADS=2"], "multiple"),
        (["pack", "--json", "/dev/null/x.json"], "/dev/null"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, said):
    assert benchmark.main(arguments) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and said in printed and len(printed.splitlines()) == 1


def test_device_that_is_not_there(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    assert benchmark.main(["muon", "--device", "cuda", "--json", str(tmp_path / "x.json")]) == 1
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.whole
def test_help_shows_examples():
    command = [sys.executable, str(ROOT / "records/benchmark.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "examples:\n    python records/benchmark.py train" in done.stdout
