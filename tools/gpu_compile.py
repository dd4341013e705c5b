"""Compile every GPU kernel without a GPU and list registers, stack and spills: ``python tools/gpu_compile.py``.

CUDA: nvcc with ``-Xptxas -v``. Triton: ahead of time, for the tile sizes and types that the launchers use; then
cuobjdump on the cubin. Exits with 1 when a kernel spills, uses local memory or is missing from the list below.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHS = (80, 90, 100)


def find_nvcc() -> str | None:
    """Return nvcc as setup.py finds it."""
    homes = [str(Path(d, "bin")) for d in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if d]
    for path in (os.pathsep.join(homes) or None, None, "/usr/local/cuda/bin"):
        if nvcc := shutil.which("nvcc", path=path):
            return nvcc
    return None


def cuda(archs: list[int]) -> list[dict]:
    """Return one row a kernel and architecture of csrc/cuda; those that this nvcc does not know are left out."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs if f"sm_{a}" in known]
    rows = []
    for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", *codes]
            command += ["-c", str(source), "-o", f"{folder}/o"]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name}: {done.stderr[-2000:]}")
        names = re.findall(r"__global__\s+(?:__launch_bounds__\([^)]*\)\s*)?void\s+(\w+)", source.read_text())
        entry = re.compile(
            r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads.*?Used (\d+) registers",
            re.DOTALL,
        )
        found = set()
        for mangled, arch, stack, stores, loads, registers in entry.findall(done.stderr):
            name = max((n for n in names if n in mangled), key=len)
            found.add(name)
            rows.append(
                {"kernel": f"{source.name}: {name}", "arch": int(arch), "registers": int(registers)}
                | {"stack": int(stack), "spills": int(stores) + int(loads)}
            )
        assert found == set(names), f"{source.name}: nvcc said nothing about {sorted(set(names) - found)}"
    return rows


# --- Triton: kernel -> variants of (types of the pointers; what is not named is a 32-bit size, constants and options)


def _pointers(kind: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"*{kind}")


_TABLES = {"p_mask": "*i1", "p_live": "*u8"}
ALIGNED = {"aligned": True}  # sizes are multiples of 16, which the launcher's specialisation also sees
_LISTS = _pointers("i32", "p_start", "p_tile", "p_row")
_FORWARD, _DX, _GATHERED = {"s_aj": 1, "s_bj": 1}, {"s_aj": 1, "s_bi": 1}, {"s_am": 1, "s_bi": 1}


def _block_walks(kind: str) -> list[tuple[dict, dict]]:
    types = _pointers(kind, "p_a", "p_b", "p_bias", "p_c") | _LISTS
    cases = [  # strides that are 1, bias and ReLU, gathered, tile of b
        (_FORWARD, True, False, 64, 64),
        (_FORWARD, False, False, 64, 32),
        (_DX, False, False, 64, 64),
        (_DX, False, False, 32, 64),
        (_GATHERED, True, True, 32, 32),
    ]
    variants = []
    for ones, bias, gather, i, j in cases:
        warps = 8 if kind == "fp32" and (i, j) == (64, 64) else 4  # as the launcher has it
        flags = {"HAS_BIAS": bias, "RELU": bias, "GATHER": gather, "BM": 128, "BI": i, "BJ": j, "num_warps": warps}
        variants.append((types, {**ones, **flags, **ALIGNED}))
    return variants


def _block_dws(kind: str) -> list[tuple[dict, dict]]:
    types = _pointers(kind, "p_dy", "p_x", "p_dw") | _LISTS
    cases = [({"s_xk": 1}, False, 64, 64), ({"s_xk": 1}, False, 64, 32), ({"s_xn": 1}, True, 32, 32)]
    return [(types, {**one, "GATHER": g, "BN": 64, "BO": o, "BK": k, **ALIGNED}) for one, g, o, k in cases]


_BITS = {"p_words": "*u8", "p_offsets": "*i64"}
_KEY = {"key0": "u32", "key1": "u32"}


def _delta() -> dict[str, list[tuple[dict, dict]]]:
    both, still = (True, False), {"enable_fp_fusion": False}  # a fused multiply-add would not round as the CPU does
    wanted, codes = _pointers("fp32", "p_x", "p_base", "p_out"), {"p_codes": "*i8", "levels": "fp32", "largest": "fp32"}
    return {
        "delta_gather_kernel": [
            (wanted | _BITS | {"p_bad": "*i32"}, {"HAS_BASE": flag, "B": 1024, **still}) for flag in both
        ],
        "delta_quantise_kernel": [
            (_pointers("fp32", "p_x", "p_scales") | codes | _KEY, {"NEAREST": flag, "B": 256, **still}) for flag in both
        ],
        "delta_round_kernel": [
            (_pointers("fp32", "p_x") | {"p_words": "*i16"} | _KEY, {"NEAREST": flag, "B": 1024}) for flag in both
        ],
        "delta_expand_kernel": [
            (
                _pointers("fp32", "p_scales", "p_out")
                | _BITS
                | {"p_values": "*i8" if flag else "*fp32", "weight": "fp32"},
                {"CODES": flag, "ADD": add, "R": 256, "B": 1024, **still},
            )
            for flag in both
            for add in both
        ],
    }


TRITON = {
    **_delta(),
    "block_matmul_kernel": _block_walks("bf16") + _block_walks("fp32"),
    "block_dw_kernel": _block_dws("bf16") + _block_dws("fp32"),
    "masked_matmul_fwd_kernel": [
        (_pointers("fp32", "p_x", "p_w", "p_bias", "p_y") | _TABLES, {"HAS_BIAS": flag, "RELU": flag, "B": 32})
        for flag in (True, False)
    ],
    "masked_matmul_dx_kernel": [(_pointers("fp32", "p_dy", "p_w", "p_dx") | _TABLES, {"B": 32})],
    "masked_matmul_dw_kernel": [(_pointers("fp32", "p_dy", "p_x", "p_dw") | _TABLES, {"B": 32})],
    "squared_matmul_kernel": [(_pointers("fp32", "p_d", "p_a", "p_out"), {"BN": 32, "BO": 64, "BK": 64})],
    "conv_squares_kernel": [(_pointers("fp32", "p_d", "p_x", "p_out"), {"BO": 32, "BK": 32, "BP": 32, "num_warps": 8})],
    "rademacher_kernel": [({"p_start": "*i64", "p_out": "*fp32"}, {"B": 1024})],
}


def triton_kernels() -> dict:
    """Return name -> kernel, for every ``*_kernel`` in kernels/."""
    package = importlib.import_module("autoflip.kernels")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"autoflip.kernels.{info.name}")
        found |= {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    return found


def triton(archs: list[int]) -> list[dict]:
    """Return one row a kernel, variant and architecture of kernels/."""
    kernels = triton_kernels()
    assert set(kernels) == set(TRITON), f"not in tools/gpu_compile.py: {set(kernels) ^ set(TRITON)}"
    return [
        _triton_row(kernels[name], types, constants, arch)
        for name, variants in TRITON.items()
        for types, constants in variants
        for arch in archs
    ]


def _triton_row(kernel, types: dict[str, str], constants: dict, arch: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    options = {k: v for k, v in constants.items() if k not in (*names, "aligned")}  # num_warps, num_stages
    aligned = constants.get("aligned", False)
    constants = {k: v for k, v in constants.items() if k in names}
    types = {n: kind for n, kind in types.items() if n in names}
    pointers = [n for n, kind in types.items() if kind.startswith("*")]
    sizes = {n: "i32" for n in names if n not in types and n not in constants}
    source = ASTSource(
        kernel,
        {n: "constexpr" if n in constants else {**types, **sizes}[n] for n in names},
        {(names.index(k),): v for k, v in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in [*pointers, *(sizes if aligned else ())]},
    )
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(done.asm["cubin"])
        f.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        told = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", told).groups()
    variant = ", ".join(f"{k} {v}" for k, v in constants.items())
    kinds = sorted({kind[1:] for kind in types.values() if kind[1:] in ("fp32", "bf16", "fp16")})
    # a spilled register lies on the stack
    return {"kernel": f"{kernel.__name__} {'+'.join(kinds)} ({variant})", "arch": arch} | {
        "registers": int(registers),
        "stack": int(stack),
        "spills": int(local),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["cuda", "triton"], default=["cuda", "triton"])
    parser.add_argument("--archs", nargs="+", type=int, default=list(ARCHS))
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    chosen = parser.parse_args()
    # the interpreter cannot compile; the caller may be a test that interprets
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))
    rows = [row for name in chosen.only for row in globals()[name](chosen.archs)]
    if chosen.json:
        print(json.dumps(rows))
    else:
        wide = max(len(row["kernel"]) for row in rows)
        print(f"{'kernel':{wide}}  arch  registers  stack  spills")
        for r in rows:
            print(f"{r['kernel']:{wide}}  {r['arch']:>4}  {r['registers']:>9}  {r['stack']:>5}  {r['spills']:>6}")
    return int(any(row["stack"] or row["spills"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
