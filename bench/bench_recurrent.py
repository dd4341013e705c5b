"""Masked LSTM and GRU against torch's fused layers: whole training steps, forward and every gradient.

``python bench/bench_recurrent.py`` prints ours / dense and writes bench/results/recurrent-cpu.json, beside it weight *
mask in front of the fused layer (``torch.nn.utils.prune``). One thread's CPU time, ways in turns, the middle counts.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from timing import interleaved, machine
from torch import nn
from torch.nn.utils import prune

from autoflip import nn as sparse

KINDS = {"LSTM": (nn.LSTM, sparse.MaskedLSTM), "GRU": (nn.GRU, sparse.MaskedGRU)}
# steps, batch, inputs, hidden: LEAF's character model's two layers, a small batch, a small model, one stream
SHAPES = [(80, 64, 8, 256), (80, 64, 256, 256), (80, 8, 256, 256), (20, 16, 64, 64), (30, 1, 32, 32)]
DENSITIES = (0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.01)
OUT = Path(__file__).parent / "results" / "recurrent-cpu.json"


def step_of(layer, x, dy):
    def step():
        y, _ = layer(x)
        return torch.autograd.grad(y, [x, *layer.parameters()], dy)

    return step


def case(kind, steps, batch, inputs, hidden, density):
    """Return dense's step and the others by name, all on the same kept weights."""
    torch.manual_seed(0)
    torchs, ours = KINDS[kind]
    layer = ours(inputs, hidden)
    layer.set_mask({n: torch.rand(p.shape) < density for n, p in layer.named_parameters() if "weight" in n})
    dense, pruned = torchs(inputs, hidden), torchs(inputs, hidden)
    dense.load_state_dict(layer.state_dict())
    pruned.load_state_dict(layer.state_dict())
    for name, mask in layer.masks().items():
        prune.custom_from_mask(pruned, name, mask)
    x, dy = torch.randn(steps, batch, inputs, requires_grad=True), torch.randn(steps, batch, hidden)
    ways = {"dense": dense, "ours": layer, "prune": pruned}
    found = {name: step_of(way, x, dy) for name, way in ways.items()}
    for got, want in zip(found["ours"]()[:1], found["dense"]()[:1], strict=True):
        # float32 sums handed on over up to 80 steps, gradients of size 10
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    return found.pop("dense"), found, layer._way(steps, batch)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind in KINDS:
        for shape in SHAPES:
            print(f"{kind} {shape[2]} -> {shape[3]}, {shape[0]} steps of {shape[1]}: ours (way), weight * mask / dense")
            for density in DENSITIES:
                dense, others, way = case(kind, *shape, density)
                pairs, seconds = interleaved(dense, others, 9, 0.02)
                middle = {name: round(statistics.median(found), 3) for name, found in pairs.items()}
                rows.append({"kind": kind, "shape": shape, "density": density, "way": way, "ratio": middle})
                print(f"  {density:<5} {middle['ours']:.2f} ({way}) {middle['prune']:.2f}", flush=True)
    OUT.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
