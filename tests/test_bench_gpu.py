"""The GPU bench runs where there is no GPU: tiny shapes through the interpreter, and it says what it cannot do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import bench_masked_gpu as bench

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")


@NO_GPU
@pytest.mark.parametrize("step", ["forward", "step"])
@pytest.mark.parametrize("kind", ["64x32", "32x1", "element"])
def test_every_way_is_checked_before_it_is_timed(kind, step, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("AUTOFLIP_BACKEND", "triton")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    case = {"step": step, "dtype": "tf32", "kind": kind, "shape": [3, 64, 96], "density": 0.5}
    try:
        row = bench.measure(case, device="cpu", pairs=2)
        monkeypatch.setattr(bench, "op", lambda *a: lambda: tuple(t * 1.1 for t in bench.product(*a)()))
        with pytest.raises(AssertionError, match="not close"):
            bench.measure(case, device="cpu", pairs=2)
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(row["ratio"]) | set(row["why"]) == set(bench.builders(kind))
    assert {"ours, op", "weight*mask"} <= set(row["ratio"])
    assert ("ours" in row["ratio"]) == (kind != "element")
    assert f"{kind} " in bench.line(row)


def test_marks_of_the_table():
    row = {"step": "step", "dtype": "bf16", "kind": "32x1", "shape": [1, 2, 3], "density": 0.5}
    told = bench.line({**row, "ratio": {"ours": [0.1, 0.2, 0.3]}, "cublas_tflops": 600.0, "why": {"a": "b"}})
    assert told.endswith(f"ours 0.20  mark {0.67 * 1.1 * 1.2:.2f}  [a: b]")
    kept = bench.make_mask("2:4", 4, 8, 0.1, "cpu").view(4, 2, 4).sum(2)
    assert kept.eq(2).all()


@NO_GPU
@pytest.mark.parametrize("required, status", [("0", 0), ("1", 1)])
def test_without_a_gpu_it_says_so(required, status, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_REQUIRE_GPU", required)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = subprocess.run([sys.executable, bench.__file__], capture_output=True, text=True)
    assert run.returncode == status, run.stderr
    assert "no CUDA device; nothing was measured" in run.stdout
