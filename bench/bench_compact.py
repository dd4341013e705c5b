"""What physically removed channels are worth: whole training steps, ours / dense torch, and oneDNN's staircase.

``python bench/bench_compact.py`` prints four tables and writes them to bench/results/compact.json:

* staircase: a convolution of c of C channels, in and out, against all C; the ideal is (c / C)^2;
* layers: MaskedConv2d with half its channels pruned, compacted, against torch's of the small shape;
* models: TwoCNN and residual networks at density 0.1 with 60 % of the channels gone, compacted, against dense;
* nothing pruned: ``sparsify`` with masks that keep everything, and a change of masks, in milliseconds.

``--staircase`` measures the first alone (another instruction set: ONEDNN_MAX_CPU_ISA=AVX2).
A step is forward, loss, backward and SGD with momentum. glibc is told to keep freed memory: what it gives back and
fetches again made the same 1x1 convolution 0.5 to 1.4 times itself. One thread's CPU time, pairs alternate, the middle
counts.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from bench_masked_matmul import ratios
from conftest import machine
from timing import keep_memory
from torch import nn

from autoflip import compact, prune, sparsify
from autoflip import nn as sparse
from autoflip.fed import models

# channels, kernel size, image size, batch
STAIRCASE = [(64, 3, 16, 16), (128, 3, 8, 16), (64, 5, 14, 16), (128, 1, 16, 16), (16, 3, 32, 16)]
MODELS = [("two-cnn", (1, 28, 28), 32), ("resnet8", (3, 32, 32), 32)]
WIDE = ("resnet of 64 and 128 channels", (3, 16, 16), 16)
OUT = Path(__file__).parent / "results" / "compact.json"


def step_of(model, x, y, loss=nn.functional.cross_entropy):
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step():
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return step


def passes_of(layer, size, batch):
    """Forward and both gradients of one layer."""
    x = torch.randn(batch, layer.in_channels, size, size, requires_grad=True)
    dy = torch.randn_like(layer(x))

    def step():
        x.grad = layer.weight.grad = None
        layer(x).backward(dy)

    return step


def middle(ours, dense, seconds=0.02, pairs=15):
    return round(statistics.median(ratios(ours, dense, pairs, seconds)), 3)


def staircase():
    rows = []
    for channels, kernel, size, batch in STAIRCASE:
        whole = passes_of(nn.Conv2d(channels, channels, kernel, padding=kernel // 2), size, batch)
        row = {}
        for kept in sorted({*range(4, channels, max(4, channels // 16)), channels * 45 // 64, channels // 2 + 1}):
            row[kept] = middle(passes_of(nn.Conv2d(kept, kept, kernel, padding=kernel // 2), size, batch), whole)
        rows.append({"channels": channels, "kernel": kernel, "image": size, "batch": batch, "kept": row})
        print(f"{channels} channels {kernel}x{kernel}, {size}x{size}, batch {batch}: kept, ours / whole (ideal)")
        print("  " + "  ".join(f"{c}: {r:.2f} ({(c / channels) ** 2:.2f})" for c, r in row.items()), flush=True)
    return rows


def layers():
    rows = []
    for channels, kernel, size, batch in STAIRCASE:
        net = nn.Sequential(*(nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(3)))
        masks = prune.hybrid(net, {n: w.abs() for n, w in prune.weights(net).items()}, 1, 0.5)
        middle_layer = compact(sparsify(net, masks))[1]
        masked = sparsify(nn.Sequential(copy.deepcopy(middle_layer)), {"0.weight": middle_layer.weight != 0})[0]
        assert type(masked) is sparse.MaskedConv2d
        fresh = nn.Conv2d(middle_layer.in_channels, middle_layer.out_channels, kernel, padding=kernel // 2)
        ratio = {
            name: middle(passes_of(layer, size, batch), passes_of(fresh, size, batch), pairs=31)
            for name, layer in (("compact", middle_layer), ("compact, then sparsify", masked))
        }
        shape = tuple(fresh.weight.shape)
        rows.append({"from": channels, "to": shape, "image": size, "batch": batch, "ratio": ratio})
        print(f"{channels} channels -> weight {shape}: {ratio}", flush=True)
    return rows


def twins(name, shape, batch, seed=0):
    torch.manual_seed(seed)
    if name == WIDE[0]:
        blocks = (models.BasicBlock(3, 64, 1, "batch"), models.BasicBlock(64, 128, 2, "batch"))
        model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    else:
        model = models.build(name, input_shape=shape, num_classes=10, seed=seed)
    g = torch.Generator().manual_seed(seed)
    return model, torch.randn(batch, *shape, generator=g), torch.randint(10, (batch,), generator=g)


def last(model):
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def whole_models():
    rows = []
    for name, shape, batch in [*MODELS, WIDE]:
        model, x, y = twins(name, shape, batch)
        scores = {n: w.abs() for n, w in prune.weights(model).items()}
        dense, dense_last = (step_of(m, x, y) for m in (copy.deepcopy(model), last(model)))
        format_alone = middle(dense_last, dense, 0.1)
        print(f"{name}, batch {batch}: dense, channels_last / dense: {format_alone}", flush=True)
        for round_to in (None, "auto", 4):
            masks = prune.hybrid(model, scores, density=0.1, channels=0.4, round_to=round_to)
            small = compact(model, x, masks)
            inside = small.plan.shrink_masks(masks)
            masked, masked_last = (sparsify(m, inside) for m in (copy.deepcopy(small), last(small)))
            ratio = {
                "compact": middle(step_of(copy.deepcopy(small), x, y), dense, 0.1),
                "compact, sparsify": middle(step_of(masked, x, y), dense, 0.1),
                "channels_last, compact": middle(step_of(last(small), x, y), dense, 0.1),
                "channels_last, compact, sparsify": middle(step_of(masked_last, x, y), dense, 0.1),
                "channels_last, compact / channels_last": middle(step_of(last(small), x, y), dense_last, 0.1),
            }
            kept = {n: list(p.shape) for n, p in small.named_parameters() if p.ndim > 1}
            rows.append(
                {"model": name, "batch": batch, "round_to": round_to, "density": round(masks.density, 4),
                 "dense channels_last": format_alone, "ratio": ratio, "kept": kept}
            )  # fmt: skip
            print(f"  round_to {round_to}: {ratio}", flush=True)
    return rows


def nothing_pruned():
    rows = []
    for name, shape, batch in [("mlp", (784,), 16), ("mlp", (784,), 64), ("digits-cnn", (1, 8, 8), 32), *MODELS]:
        model, x, y = twins(name, shape, batch)
        masked = sparsify(copy.deepcopy(model), {n: p.detach() == p for n, p in model.named_parameters()})
        ratio = middle(step_of(masked, x, y), step_of(model, x, y), 0.02, 61)
        rows.append({"model": name, "batch": batch, "ratio": ratio})
        print(f"{name}, batch {batch}, every mask keeps everything: {ratio}", flush=True)
    return rows


def set_mask():
    rows = []
    for layer in (sparse.MaskedLinear(784, 200), sparse.MaskedConv2d(64, 64, 3), sparse.MaskedEmbedding(10_000, 64)):
        for density in (0.5, 0.1):
            masks = [torch.rand(layer.weight.shape) < density for _ in range(10)]
            times = []
            for mask in masks:
                start = time.thread_time()
                layer.set_mask(mask)
                times.append(time.thread_time() - start)
            took = round(1e3 * statistics.median(times), 3)
            rows.append(
                {"layer": f"{type(layer).__name__} {tuple(layer.weight.shape)}", "density": density, "ms": took}
            )
            print(f"set_mask of {rows[-1]['layer']} at density {density}: {took} ms", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staircase", action="store_true", help="the first table alone, nothing is written")
    only_staircase = parser.parse_args().staircase
    keep_memory()
    torch.manual_seed(0)
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    if only_staircase:
        staircase()
        return
    found = {"machine": machine(), "staircase": staircase(), "layers": layers(), "models": whole_models()}
    found |= {"nothing_pruned": nothing_pruned(), "set_mask": set_mask()}
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
