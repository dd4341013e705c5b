"""Curvature estimators beside a plain gradient and a double-backward Hutchinson loop, as PyHessian has it.

Interleaved: every pass runs each method once, so that a busy moment hits all alike. Reported are the median of the
paired ratios to the gradient (1 = forward + backward of the same model and batch) and the middle half of them, and
the relative L2 error of the diagonal against "ggn-exact", whose own error is rounding (tests/test_curvature.py).

    python bench/bench_hessian.py [--passes 15]
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from conftest import machine
from torch import nn

from autoflip import curvature


def mlp():
    layers = nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    return nn.Sequential(nn.Flatten(), *layers), 256


def cnn():
    features = nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)), 64


def gradient(model, batch):
    return torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))


def hutchinson_loop(model, batch, probes):
    params = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), params, create_graph=True)
    total = [torch.zeros_like(p) for p in params]
    for _ in range(probes):
        signs = [torch.randint_like(p, 2) * 2 - 1 for p in params]
        for t, r, h in zip(total, signs, torch.autograd.grad(grads, params, signs, retain_graph=True)):
            t += r * h / probes
    return dict(zip(dict(model.named_parameters()), total))


def methods(model, batch):
    def ours(method, probes=1):
        return lambda: curvature.hessian_diagonal(model, F.cross_entropy, batch, probes, method=method)

    return {
        "gradient": lambda: gradient(model, batch),
        "ggn-mc, 1 draw": ours("ggn-mc"),
        "ggn-mc, 4 draws": ours("ggn-mc", 4),
        "ggn-exact": ours("ggn-exact"),
        "hutchinson, 4 draws": ours("hutchinson", 4),
        "double-backward loop, 4": lambda: hutchinson_loop(model, batch, 4),
    }


def measure(build, passes):
    """Return rows (method, median ratio to the gradient, quartiles, error, milliseconds)."""
    torch.manual_seed(0)
    model, samples = build()
    batch = torch.randn(samples, 1, 28, 28), torch.randint(10, (samples,))
    calls = methods(model, batch)
    results = {name: call() for name, call in calls.items()}
    exact = results["ggn-exact"]
    assert exact.matrix == "hessian"
    norm = sum(v.square().sum() for v in exact.values()).sqrt()
    seconds = {name: [] for name in calls}
    for _ in range(passes):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles([t / g for t, g in zip(times, seconds["gradient"])], n=4)
        error = float("nan")
        if name != "gradient":
            off = sum((results[name][n] - v).square().sum() for n, v in exact.items())
            error = (off.sqrt() / norm).item()
        rows.append((name, middle, low, high, error, 1000 * statistics.median(times)))
    return rows


def report(passes):
    print("machine:", ", ".join(f"{k} {v}" for k, v in machine().items()))
    for build in (mlp, cnn):
        print(f"\n{build.__name__:26} {'x gradient':>10} {'quartiles':>13} {'error':>8} {'ms':>8}")
        for name, middle, low, high, error, ms in measure(build, passes):
            print(f"  {name:24} {middle:10.2f} {low:6.2f} {high:6.2f} {error:8.1e} {ms:8.1f}")


def bench_hessian(capsys):
    with capsys.disabled():
        report(passes=7)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=15)
    report(parser.parse_args().passes)
