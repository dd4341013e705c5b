"""How often the 95 % intervals of drawn traces hold the exact value."""

import hessian_models
import torch
import torch.nn.functional as F
from torch import nn

from autoflip import curvature


class _Characters(nn.Module):
    """The char LSTM's small brother: Gauss-Newton's draws round to bfloat16 on CPUs that have it."""

    def __init__(self):
        super().__init__()
        self.embed, self.cell = nn.Embedding(80, 8), nn.LSTM(8, 64, num_layers=2, batch_first=True)
        self.head = nn.Linear(64, 80)

    def forward(self, x):
        return self.head(self.cell(self.embed(x))[0][:, -1])


def coverage(seeds=400):
    """Return rows: the share of seeds whose interval holds the trace of the matrix that was asked for.

    The exact trace is Gauss-Newton's: of the classifier's Hessian, too.
    """
    torch.manual_seed(0)
    characters = _Characters(), hessian_models.characters(16, 40)
    cases = [("digits B16", method, 16) for method in ("ggn-mc", "hutchinson", "hutch++", "xtrace")]
    rows = []
    for case, method, probes in [*cases, ("characters B16", "ggn-mc", 16), ("characters B16", "ggn-mc", 64)]:
        model, batch = hessian_models.make(case, "trained") if case == "digits B16" else characters
        diagonal = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")
        exact = sum(v.sum(dtype=torch.float64).item() for v in diagonal.values())
        held, total, stderr = 0, 0.0, 0.0
        for seed in range(seeds):
            trace = curvature.hessian_trace(model, F.cross_entropy, batch, probes, seed, method=method)
            low, high = trace.interval
            held += low <= exact <= high
            total += trace.total / seeds
            stderr += trace.stderr / seeds
        row = {"case": case, "method": method, "probes": probes, "seeds": seeds, "covered": held / seeds}
        rows.append({**row, "stderr": stderr / exact, "mean_error": total / exact - 1})
    return rows
