"""Masked products on a GPU against cuBLAS, 4096-class: ours, torch's BSR and 2:4, and ``weight * mask``.

    python bench/bench_masked_gpu.py [--rows 4096 256] [--size 4096]

Forward and step (forward, dx, dw; no autograd), bfloat16 and TF32. Kernels are timed with events, in turns with
cuBLAS; a figure is the median of paired ratios, lower is better; 2:4 and BSR are timed on weights already converted.
Prints tables and writes bench/results/masked-gpu.json. Unmeasured so far: without a CUDA device it only says so.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import timing

from autoflip import ops

RESULTS = Path(__file__).parent / "results" / "masked-gpu.json"
DENSITIES = [0.5, 0.3, 0.2, 0.1, 0.05]
# forward over cuBLAS, at most; a step may be 10 % above, vectors 1.2 times that
MARKS = {0.5: 0.67, 0.3: 0.42, 0.2: 0.29, 0.1: 0.16}
KINDS = ["64x64", "64x32", "32x1", "element", "2:4"]
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32}
NO_GPU = "torch sees no CUDA device"


def make_mask(kind: str, o: int, k: int, density: float, device: str) -> Tensor:
    """Return a bool mask ``(o, k)``; "2:4" keeps the first two of every four whatever the density."""
    g = torch.Generator().manual_seed(0)
    if kind == "2:4":
        return (torch.arange(k) % 4 < 2).expand(o, k).contiguous().to(device)
    rows, cols = (1, 1) if kind == "element" else map(int, kind.split("x"))
    live = torch.rand(-(-o // rows), -(-k // cols), generator=g) < density
    return live.repeat_interleave(rows, 0)[:o].repeat_interleave(cols, 1)[:, :k].contiguous().to(device)


def ours(x, w, dy, mask, step):
    """Return the Triton block kernels' run (see kernels/masked_blocks.py), no allocation counted but results."""
    from autoflip.kernels import masked_blocks as blocks

    table = blocks.serves(x, mask)
    if table is None:
        raise ValueError("no whole blocks: the tile kernel serves, see 'ours, op'")

    def run():
        y = x.new_empty(len(x), len(w))
        blocks.forward(x, w, None, table, y, relu=False)
        if step == "forward":
            return (y,)
        dx, dw = torch.empty_like(x), torch.zeros_like(w)
        blocks.dx(dy, w, mask, table, dx)
        blocks.dw(dy, x, table, dw)
        return y, dx, dw

    return run


def op(x, w, dy, mask, step):
    """Return the public op's run, autograd included in a step."""
    pack = ops.Pack(mask, path="sparse")
    if step == "forward":
        return lambda: (ops.masked_linear(x, w, None, pack),)
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()

    def run():
        with torch.enable_grad():
            y = ops.masked_linear(x, w, None, pack)
            return y.detach(), *torch.autograd.grad(y, (x, w), dy)

    return run


def dense(x, w, dy, mask, step):
    """Return cuBLAS's run; nothing is masked."""
    if step == "forward":
        return lambda: (F.linear(x, w),)
    return lambda: (F.linear(x, w), dy @ w, dy.T @ x)


def product(x, w, dy, mask, step):
    """Return the run of ``weight * mask`` and cuBLAS."""
    m = mask.to(w.dtype)
    if step == "forward":
        return lambda: (F.linear(x, w * m),)

    def run():
        masked = w * m
        return F.linear(x, masked), dy @ masked, (dy.T @ x) * m

    return run


def converted(convert):
    """Return a builder for weights in one of torch's sparse layouts: forward only, converted beforehand."""

    def build(x, w, dy, mask, step):
        if step != "forward":
            raise ValueError("torch has no backward for it")
        held = convert(w * mask)
        return lambda: (F.linear(x, held),)

    return build


def _blocks(kind: str) -> tuple[int, int]:
    return (64, 64) if kind == "64x64" else (64, 32)


def builders(kind: str) -> dict:
    """Return name -> builder of what can serve a kind of mask."""
    made = {"ours": ours, "ours, op": op, "weight*mask": product}
    if kind in ("64x64", "64x32"):
        made["torch BSR"] = converted(lambda w: w.to_sparse_bsr(_blocks(kind)))
    if kind == "2:4":
        made["torch 2:4"] = converted(lambda w: torch.sparse.to_sparse_semi_structured(w))
    return made


def measure(case: dict, device: str = "cuda", pairs: int = 15) -> dict:
    """Return ``case`` with the median ratios to cuBLAS, cuBLAS's TFLOP/s and why a way is missing."""
    dtype, (n, o, k), why = DTYPES[case["dtype"]], case["shape"], {}
    g = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(s, generator=g).to(device, dtype) for s in ((n, k), (o, k), (n, o)))
    mask = make_mask(case["kind"], o, k, case["density"], device)
    want = product(x, w, dy, mask, case["step"])()
    others = {}
    for name, build in builders(case["kind"]).items():
        try:
            run = build(x, w, dy, mask, case["step"])
            got = run()
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            why[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            continue
        for a, b in zip(got, want, strict=True):
            # one rounding to bfloat16 or TF32 of each factor and of the result
            torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0.02 * float(b.abs().max()) + 1e-3)
        others[name] = run
    base = dense(x, w, dy, mask, case["step"])
    clock = timing.gpu_clock if device == "cuda" else timing.clock
    found, seconds = timing.interleaved(base, others, pairs, 0.005, clock=clock)
    flops = 2 * n * o * k * (1 if case["step"] == "forward" else 3)
    ratio = {name: timing.quartiles(values) for name, values in found.items()}
    return {**case, "ratio": ratio, "cublas_tflops": round(flops / seconds / 1e12, 1), "why": why}


def call_microseconds(device: str = "cuda") -> float:
    """Return what one call of the op costs the host, over torch's own: a 64 x 64 weight, nothing waited for."""
    x, w, mask = torch.randn(1, 64, device=device), torch.randn(64, 64, device=device), torch.eye(64).bool().to(device)
    pack, both = ops.Pack(mask, path="sparse"), []
    for call in (lambda: ops.masked_linear(x, w, None, pack), lambda: F.linear(x, w)):
        times = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(50):
                call()
            times.append((time.perf_counter() - start) / 50)
        both.append(statistics.median(times))
    return (both[0] - both[1]) * 1e6


def cases(rows: list[int], size: int) -> list[dict]:
    return [
        {"step": step, "dtype": dtype, "kind": kind, "shape": [n, size, size], "density": density}
        for step in ("forward", "step")
        for dtype in DTYPES
        for kind in KINDS
        for n in rows
        for density in ([0.5] if kind == "2:4" else DENSITIES)
    ]


def line(row: dict) -> str:
    """Return one line of the table, with the mark where there is one."""
    mark = MARKS.get(row["density"]) if "x" in row["kind"] else None
    if mark:
        mark *= (1.1 if row["step"] == "step" else 1) * (1.2 if row["kind"] == "32x1" else 1)
    told = "  ".join(f"{name} {values[1]:.2f}" for name, values in row["ratio"].items())
    missing = "  ".join(f"[{name}: {why}]" for name, why in row["why"].items())
    end = f"  mark {mark:.2f}" if mark else ""
    what = f"{row['step']:7} {row['dtype']} {row['kind']:7} {'x'.join(map(str, row['shape'])):15} {row['density']:4g}"
    return f"{what}  cuBLAS {row['cublas_tflops']:5.0f} TFLOP/s  {told}{end}  {missing}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[4096, 256])
    parser.add_argument("--size", type=int, default=4096)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"bench_masked_gpu: {NO_GPU}; nothing was measured")
        return int(os.environ.get("AUTOFLIP_REQUIRE_GPU") == "1")
    torch.set_float32_matmul_precision("high")  # TF32, for cuBLAS too
    os.environ["AUTOFLIP_BACKEND"] = "triton"
    rows = []
    with torch.no_grad():
        for case in cases(chosen.rows, chosen.size):
            rows.append(measure(case))
            print(line(rows[-1]), flush=True)
    overhead = round(call_microseconds(), 1)
    print(f"one call of the op costs the host {overhead} us more than torch's")
    told = {"machine": timing.machine(), "call_overhead_us": overhead, "cases": rows}
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
