"""Whole training steps of masked layers against torch's dense ones, and against everything else that can be installed.

    python bench/bench_layers.py [--only linear conv strided blocks peers never-slower threads] [--minutes 7] [--again]

A step is the layer as a user calls it: ``.grad`` set to None, forward, backward, with dx and dw, through autograd.
Every way runs in turns with the dense layer in one process; a figure is the median of paired ratios (its quartiles
stand in the file), CPU time on one thread. Lower is better. A case already measured with these sources is not
measured again, so a long bench may run in pieces. glibc is told to keep freed memory (timing.keep_memory). Writes
bench/results/layers-cpu.json (layers-cpu-avx2.json where that is the best the CPU has, layers-cpu-intel.json on an
Intel) and prints what is in it.

``pytest bench/bench_layers.py --benchmark-enable`` runs a small subset.
"""

import argparse
import hashlib
import os
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import layer_marks
import layer_peers
import limits
from layer_marks import DENSITIES, NEVER_SLOWER
from timing import fma_peak, interleaved, keep_memory, machine, quartiles

from autoflip import nn

ROOT = Path(__file__).resolve().parents[1]
LINEAR = ["784x200", "200x200", "2304x512", "3136x512", "4096x4096"]  # in x out
BATCHES = [16, 32, 64, 256]
CONV = ["64-64 3x3 16x16", "128-128 3x3 8x8", "32-64 5x5 24x24"]  # in-out kernel map, padded to the same map
STRIDED = ["32-64 3x3 32x32 /2", "64-128 3x3 16x16 /2", "64-128 1x1 16x16 /2"]  # the map is the input's, halved
ODD = ["1x1", "5x3", "33x17", "129x63", "784x200", "1000x100", "2304x512"]
ODD_CONV = ["1-1 1x1 3x3", "3-5 3x3 7x7", "17-33 3x3 9x9", "64-64 3x3 16x16", "3-5 3x3 8x8 /2"]


def cases(section: str) -> list[dict]:
    """Return the cases of a section, in the order in which they are measured."""

    def grid(layer, shapes, batches, densities, blocks=("1x1",)):
        return [
            {"layer": layer, "shape": s, "batch": b, "density": d, "block": k}
            for k in blocks
            for s in shapes
            for b in batches
            for d in densities
        ]

    every = [1.0, 0.9, *DENSITIES]
    return {
        "linear": lambda: grid("linear", LINEAR, BATCHES, DENSITIES),
        "conv": lambda: grid("conv", CONV, [16, 32], DENSITIES),
        "strided": lambda: grid("conv", STRIDED, [16, 32], DENSITIES),
        "blocks": lambda: grid("linear", LINEAR, BATCHES, DENSITIES, ["4x1", "16x1"]),
        "peers": lambda: (
            grid("linear", LINEAR[:4], [16, 64], DENSITIES)
            + grid("linear", LINEAR[4:], [64], DENSITIES)
            + grid("linear", ["2304x512"], [16, 64], DENSITIES, ["16x16"])
            + grid("conv", CONV, [16], DENSITIES)
        ),
        "never-slower": lambda: (
            grid("linear", ODD, [1, 2, 7, 16, 33, 40, 64, 200, 512], every)
            + grid("conv", ODD_CONV, [1, 5, 7, 17, 32], every)
        ),
        "threads": lambda: (
            grid("linear", ["784x200", "2304x512", "4096x4096"], [64, 256], [0.5, 0.2, 0.1, 0.05])
            + grid("conv", CONV, [16], [0.5, 0.2, 0.1])
        ),
    }[section]()


SECTIONS = ("linear", "conv", "strided", "blocks", "peers", "never-slower", "threads")


class Problem:
    """The tensors of one case."""

    def __init__(self, case: dict) -> None:
        g = torch.Generator().manual_seed(0)
        batch, high, wide = case["batch"], *map(int, case["block"].split("x"))
        self.stride = 1
        if case["layer"] == "linear":
            inputs, outputs = map(int, case["shape"].split("x"))
            shape, x, dy, self.padding = (outputs, inputs), (batch, inputs), (batch, outputs), 0
        else:
            channels, kernel, size, *step = case["shape"].split()
            self.stride = int(step[0][1:]) if step else 1
            (inputs, outputs), k, side = map(int, channels.split("-")), int(kernel[0]), int(size.split("x")[0])
            shape, self.padding = (outputs, inputs, k, k), k // 2
            x, dy = (batch, inputs, side, side), (batch, outputs, *2 * [-(-side // self.stride)])
        drawn = torch.rand(-(-shape[0] // high), -(-shape[1] // wide), *shape[2:], generator=g) < case["density"]
        self.mask = drawn.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: shape[0], : shape[1]].contiguous()
        self.weight = torch.randn(shape, generator=g) / max(1.0, case["density"] * self.mask[0].numel()) ** 0.5
        self.bias, self.dy = torch.randn(shape[0], generator=g), torch.randn(dy, generator=g)
        self.x = torch.randn(x, generator=g).requires_grad_()
        self.multiply_adds = dy[0] * int(self.mask.sum()) * (dy[2] * dy[3] if len(dy) == 4 else 1)

    def plain(self, weight: torch.Tensor) -> torch.nn.Module:
        """Return torch's own layer."""
        return layer_peers.plain(weight, self.bias, self.padding, self.stride)

    def dense(self) -> layer_peers.Step:
        """Return torch's own layer's step; nothing is pruned."""
        return layer_peers.through_autograd(self.plain(self.weight), self.x, self.dy)

    def ours(self) -> layer_peers.Step:
        """Return the masked layer's step, checked."""
        o, i, *k = self.weight.shape
        layer = nn.MaskedConv2d(i, o, k, self.stride, self.padding) if k else nn.MaskedLinear(i, o)
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            layer.bias.copy_(self.bias)
        layer.set_mask(self.mask)
        step = self.checked(layer_peers.through_autograd(layer, self.x, self.dy))
        step()
        want = self.plain(self.weight * self.mask)
        layer_peers.through_autograd(want, self.x, self.dy)()
        # float32 sums over the batch (and the map) on both sides
        scale = want.weight.grad.abs().max().item() + 1
        torch.testing.assert_close(layer.weight.grad, want.weight.grad * self.mask, rtol=0, atol=1e-4 * scale)
        return step

    def peer(self, build) -> layer_peers.Step:
        """Return a peer's step, checked."""
        return self.checked(build(self.weight, self.bias, self.mask, self.x, self.dy, self.padding))

    def checked(self, step: layer_peers.Step) -> layer_peers.Step:
        """Refuse to time a wrong result: y and dx against torch's layer on ``weight * mask``."""
        layer = self.plain(self.weight * self.mask)
        want = layer_peers.through_autograd(layer, self.x, self.dy)()
        for a, b in zip(step(), want, strict=True):
            # float32 sums on both sides; a Winograd convolution rounds more
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * (b.abs().max().item() + 1))
        return step


def measure(section: str, case: dict, peak: float | None) -> dict:
    """Return ``case`` with its figures."""
    problem, why = Problem(case), {}
    others = {"ours": problem.ours()}
    if section == "never-slower":
        others["dense"] = problem.dense()  # against itself: what noise looks like here
    if section == "peers":
        table = layer_peers.CONV if case["layer"] == "conv" else layer_peers.LINEAR
        for name, build in (layer_peers.BLOCKS if case["block"] == "16x16" else table).items():
            try:
                others[name] = problem.peer(build)
            except (ImportError, RuntimeError, IndexError, AssertionError, ValueError) as error:
                why[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    if section == "threads":
        return {**case, **threads(problem)}
    if section in ("linear", "conv", "strided", "blocks"):
        nothing = limits.Nothing(problem.weight, problem.bias, tuple(problem.dy.shape))
        others["nothing"] = layer_peers.through_autograd(nothing, problem.x, problem.dy)
        others["memory"] = limits.memory(problem.mask)
    pairs, seconds = (7, 0.002) if section == "peers" else (15, 0.003)
    dense = problem.dense()
    found, base = interleaved(dense, others, pairs, seconds, limit=10)
    if section == "never-slower" and statistics.median(found["ours"]) > NEVER_SLOWER:
        found, base = interleaved(dense, others, 31, 0.005)  # again, longer: noise does not come back
    ratio = {name: quartiles(values) for name, values in found.items()}
    # three products, each a multiply-add a kept weight, at this core's rate from registers
    roof = round(3 * 2 * problem.multiply_adds / (peak * 1e9) / base, 4) if peak else None
    kept = float(problem.mask.float().mean())
    return {**case, "dense_us": round(base * 1e6, 1), "ratio": ratio, "kept": round(kept, 4), "roof": roof, "why": why}


def threads(problem: Problem) -> dict:
    """Return the speed-up of two threads over one, ours and dense: medians of turns, wall time."""
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("bench_layers: --only threads needs two cores; this process may use one")
    steps, speed = {"ours": problem.ours(), "dense": problem.dense()}, {"ours": [], "dense": []}
    for step in steps.values():
        for n in (1, 2):
            torch.set_num_threads(n)
            for _ in range(3):
                step()
    start = time.perf_counter()
    steps["dense"]()
    calls = max(1, int(0.01 / (time.perf_counter() - start)))
    for _ in range(11):
        for name, step in steps.items():
            seconds = []
            for n in (1, 2):
                torch.set_num_threads(n)
                step()  # the other thread wakes up
                start = time.perf_counter()
                for _ in range(calls):
                    step()
                seconds.append(time.perf_counter() - start)
            speed[name].append(seconds[0] / seconds[1])
    torch.set_num_threads(1)
    return {"speed_up": {name: quartiles(values) for name, values in speed.items()}}


def sources() -> str:
    """Return a hash of everything that a figure depends on here: not the delta and Hessian kernels."""
    found = hashlib.sha256()
    bindings = "csrc/[!d]*.h", "csrc/bind_[!cdh]*.cpp", "csrc/bind_hook.cpp"
    kernels = "csrc/cpu/[!dh]*", "csrc/common/*", "autoflip/ops/[!dh]*.py", "autoflip/nn/[lcm]*.py"
    for pattern in (*bindings, *kernels):
        for path in sorted(ROOT.glob(pattern)):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def key(case: dict) -> tuple:
    return tuple(case[name] for name in ("layer", "shape", "batch", "density", "block"))


def run(section: str, content: dict, path: Path, until: float, again: bool, wanted: list[str]) -> int:
    """Measure what ``content`` lacks of a section, write after every case; return how many cases are left."""
    here = {**machine(), "load": None}
    old = content["sections"].get(section, {})
    same = old.get("sources") == sources() and {**old["machine"], "load": None} == here
    kept = [] if again or not same else old["cases"]
    known = {key(case) for case in kept}
    todo = [case for case in cases(section) if key(case) not in known]
    if wanted:
        todo = [case for case in todo if case["shape"] in wanted]
    content["sections"][section] = {"machine": machine(), "sources": sources(), "cases": kept}
    for done, case in enumerate(todo):
        if time.perf_counter() > until:
            return len(todo) - done
        row = measure(section, case, content["fma_peak_gflops"])
        kept.append(row)
        figures = {name: f"{values[1]:.3f}" for name, values in (row.get("ratio") or row["speed_up"]).items()}
        print(section, *key(case), figures, row.get("why") or "", flush=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text(layer_marks.dumps(content))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long; run again to go on")
    parser.add_argument("--again", action="store_true", help="measure again what the file holds")
    parser.add_argument("--shapes", nargs="+", default=[], help="only these, as they stand in the tables")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what the file holds, measure nothing")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    keep_memory()
    here = machine()
    path = layer_marks.results(here["isa"], here["cpu"])
    if chosen.threads != 1:
        path = path.with_stem(f"{path.stem}-{chosen.threads}threads")
    until, content, left = time.perf_counter() + 60 * chosen.minutes, layer_marks.load(path), 0
    if not chosen.table:
        content["fma_peak_gflops"] = fma_peak()
        for section in chosen.only:
            left += run(section, content, path, until, chosen.again, chosen.shapes)
    print("\n".join(layer_marks.report(content)))
    if left:
        print(f"{left} cases are left: run the same command again")
    return 0


@pytest.mark.parametrize("density", [0.5, 0.1])
@pytest.mark.parametrize("layer, shape, batch", [("linear", "784x200", 64), ("conv", "64-64 3x3 16x16", 16)])
def test_layers(benchmark, layer, shape, batch, density):
    problem = Problem({"layer": layer, "shape": shape, "batch": batch, "density": density, "block": "1x1"})
    ours, dense = problem.ours(), problem.dense()
    found, _ = interleaved(dense, {"ours": ours})
    low, middle, high = quartiles(found["ours"])
    benchmark.group = f"step {shape} batch {batch}"
    benchmark.extra_info.update(ratio_to_dense=middle, ratio_low=low, ratio_high=high, density=density)
    benchmark(ours)


if __name__ == "__main__":
    sys.exit(main())
