"""The GPU kernels compile without a GPU: Triton's ahead of time for sm_90, and none of them spills.

A process that interprets Triton cannot compile it, hence the subprocess.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from autoflip.ops import backend

COMPILE = """
import json, pathlib, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from autoflip.kernels import hessian as h
from autoflip.kernels import masked_matmul as m

def compile(kernel, types, constants, capability):
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {n: types.get(n, "constexpr") for n in names},
        {(names.index(k),): v for k, v in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in types if types[n][0] == "*"},
    )
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(done.asm["cubin"])
        f.flush()
        tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups()
    return int(registers), int(stack)

size = dict(N="i32", O="i32", K="i32")
tables = dict(p_mask="*i1", p_live="*u8")
fp = lambda *names: {n: "*fp32" for n in names}
out = {}
for flag in (True, False):
    out[f"forward {flag}"] = compile(
        m.masked_matmul_fwd_kernel,
        {**fp("p_x", "p_w", "p_bias", "p_y"), **tables, **size},
        dict(HAS_BIAS=flag, RELU=flag, B=m.TILE), 90)
out["dx"] = compile(m.masked_matmul_dx_kernel, {**fp("p_dy", "p_w", "p_dx"), **tables, **size}, dict(B=m.TILE), 90)
out["dw"] = compile(m.masked_matmul_dw_kernel, {**fp("p_dy", "p_x", "p_dw"), **tables, **size}, dict(B=m.TILE), 90)
out["squared_matmul"] = compile(
    h.squared_matmul_kernel, {**fp("p_d", "p_a", "p_out"), **size}, dict(BN=32, BO=64, BK=64), 90)
numbers = h.conv_squares_kernel.arg_names[3:-3]
out["conv_squares"] = compile(
    h.conv_squares_kernel, {**fp("p_d", "p_x", "p_out"), **{n: "i32" for n in numbers}}, dict(BO=32, BK=32, BP=32), 90)
out["rademacher"] = compile(
    h.rademacher_kernel, {"p_start": "*i64", **fp("p_out"), "count": "i32"}, dict(B=1024), 90)
print(json.dumps(out))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.filterwarnings("ignore:record_property")
def test_triton_kernels_compile_for_sm_90_without_spills(record_property):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    for name, (registers, stack) in json.loads(run.stdout).items():
        record_property(name, f"{registers} registers, {stack} bytes of stack")
        assert registers < 255, name
        assert stack == 0, name


def test_cuda_module_imports_and_counts_devices_without_a_driver():
    module, why = backend.extension("_cuda")
    if module is None:
        pytest.skip(why)
    assert module.device_count() >= 0
