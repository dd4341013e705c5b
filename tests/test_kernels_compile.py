"""The GPU kernels compile without a GPU, for sm_80, sm_90 and sm_100, and none of them spills (tools/gpu_compile.py).

A process that interprets Triton cannot compile it, hence the subprocess.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import gpu_compile

from autoflip.ops import backend

ROOT = gpu_compile.ROOT

needs_nvcc = pytest.mark.skipif(gpu_compile.find_nvcc() is None, reason="there is no nvcc")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
WAYS = [pytest.param("cuda", marks=needs_nvcc), pytest.param("triton", marks=needs_triton)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:record_property")
def test_gpu_kernels_compile_without_spills(way, record_property):
    run = subprocess.run(
        [sys.executable, gpu_compile.__file__, "--only", way, "--json"], capture_output=True, text=True
    )
    assert run.stdout, run.stderr[-3000:]
    rows = json.loads(run.stdout)
    for row in rows:
        name = f"{row['kernel']} sm_{row['arch']}"
        record_property(name, f"{row['registers']} registers, {row['stack']} bytes of stack")
        assert row["stack"] == row["spills"] == 0, name
        assert row["registers"] < 255, name
    # an older nvcc does not know sm_100
    assert {80, 90} <= {row["arch"] for row in rows} <= set(gpu_compile.ARCHS)
    assert run.returncode == 0, run.stderr[-3000:]


SPILL = """
import sys
sys.path.insert(0, "tools")
import gpu_compile as g
name = "masked_matmul_dx_kernel"
types, _ = g.TRITON[name][0]
print(g._triton_row(g.triton_kernels()[name], types, {"B": 32, "maxnreg": 48}, 90))
g.TRITON.popitem()
try:
    g.triton([])
except AssertionError as error:
    print(error)
"""


@needs_triton
def test_a_spill_and_a_kernel_that_nobody_lists_are_seen():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", SPILL], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "'registers': 48" in run.stdout, run.stderr[-3000:]
    assert "'stack': 0" not in run.stdout
    assert "not in tools/gpu_compile.py" in run.stdout


def test_cuda_module_imports_and_counts_devices_without_a_driver():
    module, why = backend.extension("_cuda")
    if module is None:
        pytest.skip(why)
    assert module.device_count() >= 0
