"""Curvature estimators beside a plain gradient and beside PyHessian, curvlinops, BackPACK and torch.func.

Every pass runs each method once, so that a busy moment hits all alike; on one thread a method's time is its CPU
time. Reported are the median of the paired ratios to the gradient (1 = forward + backward of the same model and
batch), the middle half of them, and the middle error of the passes (each has its own seed): relative L2 error and
Spearman's rank correlation of the diagonal, relative error of the trace. The truth is the exact diagonal in float64
(for these networks the Hessian's; tests/test_curvature.py holds it against full Hessians). For the LSTM Gauss-Newton
is not the Hessian: there the errors of Gauss-Newton methods are against Gauss-Newton (in float32, whose rounding is far
below them), and the others have none.

    python bench/bench_hessian.py [--passes 9] [--accuracy] [--equal-error] [--coverage]
                                  [--memory] [--out bench/results/hessian-cpu.json]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import hessian_models
import hessian_peers as peers
import torch
import torch.nn.functional as F
from conftest import machine
from hessian_coverage import coverage
from hessian_memory import memories
from hessian_truth import errors, flat, kinks, truth

from autoflip import curvature

now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def methods(case, model, batch):
    """Return name -> (matrix, seed -> diagonal or trace); a peer that is missing or fails is left out by its words."""
    params = list(model.parameters())
    large, wide = case in ("cnn B256", "resnet8 B64", "lstm B64"), case.startswith("lstm")

    def ours(method, draws=1):
        return lambda seed: curvature.hessian_diagonal(model, F.cross_entropy, batch, draws, seed, method=method)

    probes = 4 if large else 16
    calls = {
        "gradient": ("", lambda seed: torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), params)),
        "ggn-mc, 1 draw": ("ggn", ours("ggn-mc")),
        "ggn-mc, 4 draws": ("ggn", ours("ggn-mc", 4)),
        f"hutchinson, {probes} draws": ("hessian", ours("hutchinson", probes)),
        f"hutchinson trace, {probes} draws": (
            "hessian",
            lambda seed: (
                curvature.hessian_trace(model, F.cross_entropy, batch, probes, seed, method="hutchinson").total
            ),
        ),
        f"PyHessian trace, {probes} probes": (
            "hessian",
            lambda seed: statistics.fmean(peers.pyhessian_trace(model, batch, probes)),
        ),
        f"double backward loop, {probes}": (
            "hessian",
            lambda seed: peers.double_backward_diagonal(model, batch, probes),
        ),
    }
    if not wide:
        calls["ggn-exact"] = ("ggn", ours("ggn-exact"))
    if not large:
        calls[f"torch.func vmap jvp grad, {probes}"] = (
            "hessian",
            lambda seed: peers.functional_diagonal(model, batch, probes, 4),
        )
        if not peers.missing("curvlinops"):
            calls[f"curvlinops hutchinson_diag, {probes}"] = (
                "hessian",
                lambda seed: peers.curvlinops_diagonal(model, batch, probes, "hutchinson"),
            )
    if not large:
        for method in ("hutch++", "xtrace"):
            calls[f"{method} trace, {probes} products"] = (
                "hessian",
                lambda seed, method=method: (
                    curvature.hessian_trace(model, F.cross_entropy, batch, probes, seed, method=method).total
                ),
            )
            if not peers.missing("curvlinops"):
                calls[f"curvlinops {method}, {probes}"] = (
                    "hessian",
                    lambda seed, method=method: (
                        peers.curvlinops_trace(model, batch, probes - probes % 3, method)
                        if method == "hutch++"
                        else peers.curvlinops_trace(model, batch, probes, method)
                    ),
                )
    if peers.missing("pyhessian"):
        del calls[f"PyHessian trace, {probes} probes"]
    if case.startswith(("mlp", "cnn", "digits B")) and not peers.missing("backpack"):
        extended = peers.backpack_extended(model)
        calls["BackPACK DiagGGNExact"] = ("ggn", lambda seed: peers.backpack_diagonal(extended, batch, True))
        calls["BackPACK DiagGGNMC, 1"] = ("ggn", lambda seed: peers.backpack_diagonal(extended, batch, False))
    return calls


def measure(case, passes, state="trained"):
    """Return rows (dicts), one a method."""
    model, batch = hessian_models.make(case, state)
    calls = methods(case, model, batch)
    exact, matrix = truth(model, batch)
    seconds = {name: [] for name in calls}
    found = {name: [] for name in calls}
    for n in range(passes + 1):
        for name, (_, call) in calls.items():
            torch.manual_seed(n)
            start = now()
            result = call(n)
            if n:  # the first pass warms up
                seconds[name].append(now() - start)
            if name != "gradient" and (calls[name][0] == "ggn" or matrix == "hessian"):
                found[name].append(errors(result, exact))
    rows = []
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles([t / g for t, g in zip(times, seconds["gradient"])], n=4)
        row = {"case": case, "state": state, "method": name, "gradients": middle, "low": low, "high": high}
        row["ms"] = 1000 * statistics.median(times)
        for key, values in zip(("diagonal_error", "spearman", "trace_error"), zip(*found[name])):
            row[key] = None if values[0] is None else statistics.median(values)
        rows.append(row)
    return rows


def accuracy(cases=("cnn B64", "resnet8 B64", "mlp B256", "cnn B256"), seeds=9):
    """Return rows: errors at three stages of training, on mixed and on two-class batches; the truth is float64's."""
    rows = []
    for case in cases:
        for state in hessian_models.STEPS:
            for what, classes in (("10 classes", range(10)), ("2 classes", (3, 8))):
                model, batch = hessian_models.make(case, state, classes)
                exact, matrix = truth(model, batch)
                for method, draws in (("ggn-exact", 1), ("ggn-mc", 1), ("ggn-mc", 4)):
                    got = [
                        errors(
                            curvature.hessian_diagonal(model, F.cross_entropy, batch, draws, s, method=method), exact
                        )
                        for s in range(1 if method == "ggn-exact" else seeds)
                    ]
                    d, r, t = (statistics.median(v) for v in zip(*got))
                    row = {"case": case, "state": state, "batch": what, "method": method, "draws": draws}
                    row |= {"matrix": matrix, "diagonal_error": d, "spearman": r, "trace_error": t}
                    rows.append(row | (kinks(model, batch, exact) if method == "ggn-exact" else {}))
    return rows


def hessian_by_products(model, batch, chunk=256):
    """Return the true Hessian's diagonal, a product an entry."""
    out = []
    for name, p in model.named_parameters():
        eye = torch.eye(p.numel(), dtype=p.dtype)
        for rows in eye.split(chunk):
            got = curvature.hvp(model, F.cross_entropy, batch, {name: rows.view(-1, *p.shape)})[name]
            out.append((got.flatten(1) * rows).sum(1))
    return torch.cat(out)


def curved(cases=("digits GELU B16", "digits BatchNorm B16")):
    """Return rows: where Gauss-Newton is not the Hessian, how far apart their diagonals are, float64."""
    rows = []
    for case in cases:
        for state in hessian_models.STEPS:
            model, (x, y) = hessian_models.make(case, state)
            model.double()
            truth, batch = hessian_by_products(model, (x.double(), y)), (x.double(), y)
            got = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")
            drawn = flat(curvature.hessian_diagonal(model, F.cross_entropy, batch, 16, method="hutchinson"))
            row = {"case": case, "state": state, "method": "ggn-exact", "matrix": got.matrix}
            row["apart_from_hessian"] = ((flat(got) - truth).norm() / truth.norm()).item()
            row["hutchinson_16_error"] = ((drawn - truth).norm() / truth.norm()).item()
            rows.append({**row, "negative_entries": (truth < 0).double().mean().item()})
    return rows


def equal_error(case="cnn B64", wanted=0.02):
    """Run PyHessian until its own spread promises ``wanted``, and hessian_trace; both end to end, once."""
    model, batch = hessian_models.make(case, "trained")
    exact = truth(model, batch)[0].sum().item()
    torch.manual_seed(0)
    first = peers.pyhessian_trace(model, batch, 200)
    count = max(2, round((statistics.stdev(first) / (wanted * exact)) ** 2))
    start = now()
    values = peers.pyhessian_trace(model, batch, count)
    theirs = now() - start
    curvature.hessian_trace(model, F.cross_entropy, batch)
    times = []
    for _ in range(9):
        start = now()
        trace = curvature.hessian_trace(model, F.cross_entropy, batch)
        times.append(now() - start)
    return {
        "case": case,
        "pyhessian_probes": count,
        "pyhessian_seconds": theirs,
        "pyhessian_error": statistics.fmean(values) / exact - 1,
        "pyhessian_stderr": statistics.stdev(values) / count**0.5 / exact,
        "seconds": statistics.median(times),
        "method": trace.method,
        "error": trace.total / exact - 1,
        "times_faster": theirs / statistics.median(times),
    }


def show(rows):
    for row in rows:
        if row["method"] == "gradient":
            print(
                f"\n{row['case']:34} {'gradients':>10} {'quartiles':>13} {'ms':>8} {'diag':>8} {'rank':>6} {'trace':>7}"
            )
        cells = [row.get(k) for k in ("diagonal_error", "spearman", "trace_error")]
        words = [" " * n if c is None else f"{c:{n}.{p}}" for c, n, p in zip(cells, (8, 6, 8), ("1e", "3f", "1e"))]
        head = f"  {row['method']:32} {row['gradients']:10.2f} {row['low']:6.2f} {row['high']:6.2f} {row['ms']:8.1f}"
        print(head, *words, flush=True)


def bench_hessian(capsys):
    with capsys.disabled():
        print(f"\nmachine: {machine()}")
        for case in ("mlp B256", "cnn B64"):
            show(measure(case, 5))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--cases", nargs="*", default=list(hessian_models.TIMED))
    parser.add_argument(
        "--accuracy", action="store_true", help="also at three stages of training, two kinds of batches"
    )
    parser.add_argument("--equal-error", action="store_true", help="also run PyHessian to 2 %% (minutes)")
    parser.add_argument("--coverage", action="store_true", help="also how often intervals hold the truth (minutes)")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of a call")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    content = {"machine": machine(), "rows": []}
    if args.out and args.out.exists():  # cases may be measured one by one
        content |= json.loads(args.out.read_text()) | {"machine": content["machine"]}
    print("machine:", ", ".join(f"{k} {v}" for k, v in content["machine"].items()))
    for case in args.cases:
        rows = measure(case, args.passes)
        show(rows)
        content["rows"] = [row for row in content["rows"] if row["case"] != case] + rows
        if args.out:  # what is measured stays measured, whatever comes later
            args.out.write_text(json.dumps(content, indent=1) + "\n")
    if args.accuracy:
        content["accuracy"], content["curved"] = accuracy(), curved()
        print(*content["accuracy"], *content["curved"], sep="\n")
    if args.equal_error:
        content["equal_error"] = equal_error()
        print(content["equal_error"])
    if args.coverage:
        content["coverage"] = coverage()
        print(*content["coverage"], sep="\n")
    if args.memory:
        content["memory"] = memories()
        print(*content["memory"], sep="\n")
    if args.out:
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
