"""Masked layers in bfloat16, float16 and under autocast on a CPU against torch's dense ones in the same type.

``python bench/bench_narrow.py`` prints ours / dense and writes bench/results/narrow-cpu.json, beside it weight * mask
in front of torch's layer. Whole training steps through autograd, one thread's CPU time, ways in turns; medians.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import layer_peers
import torch
from bench_layers import Problem
from timing import interleaved, keep_memory, machine
from torch import Tensor, nn

from autoflip import nn as sparse

TYPES = ("bfloat16", "bfloat16 autocast", "float16")
SHAPES = [("linear", shape, batch) for shape in ("784x200", "2304x512", "4096x4096") for batch in (32, 256)]
SHAPES += [("conv", shape, 16) for shape in ("64-64 3x3 16x16", "32-64 5x5 24x24")]
# torch multiplies float16 on a CPU a tenth as fast or slower: its large shapes would take minutes
SMALL = [("linear", "784x200", 32), ("conv", "64-64 3x3 16x16", 16)]
DENSITIES = (0.7, 0.5, 0.3, 0.1, 0.05)
OUT = Path(__file__).parent / "results" / "narrow-cpu.json"


class Cast(nn.Module):
    """The layer under autocast, its backward pass outside, as torch's manual has it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x)


def steps(problem: Problem, kind: str) -> dict[str, layer_peers.Step]:
    """Return dense's step and the others by name, all on the same kept weights."""
    dtype = torch.float32 if kind.endswith("autocast") else getattr(torch, kind)
    low = getattr(torch, kind.split()[0])
    wrap = Cast if kind.endswith("autocast") else lambda layer: layer
    o, i, *k = problem.weight.shape
    kept = problem.weight * problem.mask
    ours = sparse.MaskedConv2d(i, o, k, padding=problem.padding) if k else sparse.MaskedLinear(i, o)
    ours.load_state_dict({"weight": kept, "bias": problem.bias})
    ours.to(dtype).set_mask(problem.mask)
    dense, twin = (layer_peers.plain(kept, problem.bias, problem.padding).to(dtype) for _ in range(2))
    product = layer_peers.Product(twin, problem.mask)
    product.mask = product.mask.to(dtype)
    ways = {"dense": dense, "ours": ours, "weight*mask": product}
    x, dy = problem.x.detach().to(low).requires_grad_(), problem.dy.to(low)
    found = {name: layer_peers.through_autograd(wrap(way), x, dy) for name, way in ways.items()}
    want = found["dense"]()
    unit = torch.finfo(low).eps
    for one, other in zip(found["ours"](), want, strict=True):
        # each side rounds its result, and autocast's weight, to the narrow type; y and dx are of size 1 to 10
        torch.testing.assert_close(one.float(), other.float(), rtol=2 * unit, atol=8 * unit)
    return found


def cases() -> Iterator[tuple[str, str, str, int]]:
    for kind in TYPES:
        for case in SMALL if kind == "float16" else SHAPES:
            yield kind, *case


def table(path: Path = OUT) -> list[str]:
    """Return the lines of the table (markdown), one row a type and shape; empty without the result file."""
    if not path.exists():
        return []
    lines = ["| type, layer | " + " | ".join(f"{d:g}" for d in DENSITIES) + " |", "|---|" + "---|" * len(DENSITIES)]
    found: dict[str, dict[float, dict]] = {}
    for row in json.loads(path.read_text())["rows"]:
        name = f"{row['type']}, {row['layer']} {row['shape']}, batch {row['batch']}"
        found.setdefault(name, {})[row["density"]] = row
    for name, row in found.items():
        cells = [f"{row[d]['ratio']['ours']:.2f} ({row[d]['ratio']['weight*mask']:.2f})" for d in DENSITIES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    keep_memory()
    rows = []
    for kind, layer, shape, batch in cases():
        for density in DENSITIES:
            problem = Problem({"layer": layer, "shape": shape, "batch": batch, "density": density, "block": "1x1"})
            others = steps(problem, kind)
            pairs, seconds = interleaved(others.pop("dense"), others, 7, 0.005, limit=4)
            middle = {name: round(statistics.median(found), 3) for name, found in pairs.items()}
            case = {"type": kind, "layer": layer, "shape": shape, "batch": batch, "density": density}
            rows.append({**case, "dense_us": round(seconds * 1e6, 1), "ratio": middle})
            print(*case.values(), middle, flush=True)
    OUT.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
