"""Peak memory of curvature estimators, each call in a process of its own."""

import subprocess
import sys
from pathlib import Path

import hessian_models
import hessian_peers as peers
import torch
import torch.nn.functional as F

from autoflip import curvature


def memory(case, which):
    """Return the growth of this process's peak memory in one call, MiB; call it in a fresh process."""
    model, batch = hessian_models.make(case, "start")
    loss_fn, params = F.cross_entropy, list(model.parameters())
    calls = {
        "gradient": lambda b: torch.autograd.grad(loss_fn(model(b[0]), b[1]), params),
        "ggn-mc, 1 draw": lambda b: curvature.hessian_diagonal(model, loss_fn, b, method="ggn-mc"),
        "ggn-exact": lambda b: curvature.hessian_diagonal(model, loss_fn, b, method="ggn-exact"),
        "hutchinson trace, 16 draws": lambda b: curvature.hessian_trace(model, loss_fn, b, 16, method="hutchinson"),
        "PyHessian trace, 16 probes": lambda b: peers.pyhessian_trace(model, b, 16),
    }
    calls[which]((batch[0][:2], batch[1][:2]))  # libraries load and caches fill
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def status(word):
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(word))
        return int(line.split()[1]) / 1024

    before = status("VmRSS")
    calls[which](batch)
    return status("VmHWM") - before


def memories(cases=("cnn B64", "cnn B256", "resnet8 B64")):  # an MLP's is too small to see
    """Return rows: peak memory of each method, each in a process of its own."""
    hutchinson = "hutchinson trace, 16 draws", "PyHessian trace, 16 probes"
    rows = []
    for case in cases:
        for which in ("gradient", "ggn-mc, 1 draw", "ggn-exact", *hutchinson):
            command = [sys.executable, "-c", f"import hessian_memory as m; print(m.memory({case!r}, {which!r}))"]
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
            if done.returncode == 0:
                rows.append({"case": case, "method": which, "peak_mib": float(done.stdout.split()[-1])})
    return rows
