"""Masked matmul against torch's dense product without a mask, step by step.

``pytest bench/bench_masked_matmul.py --benchmark-enable`` times ours and stores, in extra_info, the middle and the
spread of paired ratios (ours / dense, alternating, so that load hits both). ``python bench/bench_masked_matmul.py``
prints the table from which RULE in autoflip/ops/paths.py is read.
"""

import argparse
import statistics
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from timing import interleaved, machine

from autoflip.ops import Pack
from autoflip.ops import _masked_matmul as steps

WEIGHTS = [(64, 288), (128, 400), (200, 784), (512, 2304)]  # (O, K)
ROWS = [16, 32, 64, 256]
DENSITIES = [0.5, 0.3, 0.2, 0.1, 0.05]
STEPS = ("forward", "dx", "dw")


def pair(N, O, K, density, step):
    """Return (ours, dense, largest error allowed): two functions of no argument that do one step."""
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(O, K, generator=g) < density
    x, dy = torch.randn(N, K, generator=g), torch.randn(N, O, generator=g)
    w = torch.randn(O, K, generator=g) * mask
    parts = Pack(mask, path="sparse").parts(N)
    ours, dense, terms = {
        "forward": (lambda: steps.linear(x, w, None, parts), lambda: F.linear(x, w), K),
        "dx": (lambda: steps.dx(dy, w, parts), lambda: dy @ w, O),
        "dw": (lambda: steps.dw(dy, x, parts), lambda: dy.T @ x, N),
    }[step]
    want = dense() * mask if step == "dw" else dense()
    # float32 sums on both sides, see tests/test_masked_matmul.py
    torch.testing.assert_close(ours(), want, rtol=0, atol=64 * torch.finfo(torch.float32).eps * terms**0.5)
    return ours, dense


def ratios(ours, dense, pairs=15, seconds=0.001):
    """Return ours / dense, one number a pair: each is timed for about ``seconds``, alternating."""
    return interleaved(dense, {"": ours}, pairs, seconds)[0][""]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("density", [0.2, 0.1, 0.05])
@pytest.mark.parametrize("N, O, K", [(64, 200, 784), (64, 512, 2304)])
def test_masked_matmul(benchmark, gate, N, O, K, density, step):
    with torch.no_grad():
        ours, dense = pair(N, O, K, density, step)
        gate(ours()[:1], dense()[:1] if step != "dw" else ours()[:1], 1e-2)
        measured = ratios(ours, dense)
        low, middle, high = statistics.quantiles(measured, n=4)
        benchmark.group = f"{step} {N}x{O}x{K}"
        benchmark.extra_info.update(ratio_to_dense=middle, ratio_low=low, ratio_high=high, density=density)
        benchmark(ours)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    print("ours / dense, middle of alternating pairs")
    with torch.no_grad():
        for step in STEPS:
            print(f"\n{step:8} {'N':>5} {'O x K':>10} " + " ".join(f"{d:>6}" for d in DENSITIES))
            for O, K in WEIGHTS:
                for N in ROWS:
                    row = [statistics.median(ratios(*pair(N, O, K, d, step))) for d in DENSITIES]
                    print(f"{step:8} {N:5} {O:>5}x{K:<5} " + " ".join(f"{r:6.2f}" for r in row), flush=True)


if __name__ == "__main__":
    main()
