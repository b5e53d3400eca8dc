"""records/gpucheck.py: the same measurements on a CPU at tiny sizes, the parts of a step, the verdict."""

import json
import os
import subprocess
import sys

import gpucheck
import pytest
import torch
from conftest import ROOT
from gpucheck import ESTIMATES, Row
from test_benchmark import TINY, make_small


@pytest.mark.whole
def test_every_part_is_measured_and_the_verdict_follows(tmp_path, monkeypatch, capsys):
    make_small(monkeypatch)
    monkeypatch.setattr(gpucheck, "POSITIONS", 62_000)
    path = tmp_path / "out" / "found.json"
    words = [word for pair in (TINY | {"DTYPE": "fp32"}).items() for word in ("--set", "=".join(pair))]
    assert gpucheck.main(["--device", "cpu", "--steps", "3", "--json", str(path), *words]) == 0
    found, printed = json.loads(path.read_text()), capsys.readouterr().out
    rows = {row["part"]: row for row in found["rows"]}
    assert list(rows) == list(ESTIMATES) and f"verdict: {found['verdict']}" in printed
    assert not [row for row in rows.values() if not row["measured"] > 0]
    passes = sum(rows[part]["measured"] for part in gpucheck.KERNELS)
    whole = rows["step"]["measured"] - rows["clip, Muon, AdamW"]["measured"]
    assert 0.3 * whole < passes < 3 * whole  # the profiler and the clock speak of the same work
    assert "a step with QAT takes" in printed and "256 tokens in 1 micro-step(s)" in printed


@pytest.mark.parametrize(("kernel", "part"), [
    ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128", "attention"),
    ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
    ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
    ("aten::mm", "matrix products"),
    ("triton_red_fused__to_copy_mul_rms_norm_12", "pointwise and norms"),
    ("triton_poi_fused_mm_add_3", "pointwise and norms"),
    ("void at::native::vectorized_elementwise_kernel<4, ...>", "pointwise and norms"),
])  # fmt: skip
def test_a_kernel_s_name_says_what_it_is_of(kernel, part):
    assert gpucheck.part_of(kernel) == part


def test_eight_are_rented_where_every_part_is_within_a_tenth_of_its_estimate():
    rows = [Row(part, 1.09 * estimate[2], *estimate) for part, estimate in ESTIMATES.items()]
    assert gpucheck.verdict(rows) == ("rent eight: about 4882 steps in 600 s, and evaluation in 306 s of 600")
    rows[2].measured = 31.0  # attention
    assert gpucheck.verdict(rows).startswith(
        "profile first: attention takes 31 ms, estimated 26 to 28 (about"
    )
    assert gpucheck.table(rows).count("  over") == 1


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpucheck.main([]) == 1
    assert (
        capsys.readouterr().err == "error: no CUDA device is there; this is for the first minutes on a GPU\n"
    )


@pytest.mark.whole
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes ten minutes of a GPU")
def test_run_sh_has_it():
    """Its tests are skipped here, and the program says what is missing."""
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["./run.sh", "gpucheck"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "skipped" in done.stdout and "no CUDA device is there" in done.stderr
