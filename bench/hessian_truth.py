"""What bench_hessian holds estimates against: the exact diagonal, and how far from it a result is."""

import copy

import hessian_gates
import torch
import torch.nn.functional as F

from autoflip import curvature


def flat(diagonal):
    return torch.cat([v.detach().flatten() for v in diagonal.values()]).double()


def spearman(a, b):
    """Ties (weights behind dead units, all exactly 0) share their middle rank."""

    def ranks(v):
        _, where, counts = v.unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2)[where]

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def in_float64(model, batch):
    return copy.deepcopy(model).double(), (batch[0].double(), batch[1])


def truth(model, batch):
    """Return the exact diagonal and what it is of; in float64, but for the LSTM's, which has 79 factors.

    It is that of the linear piece that the float32 run is on (hessian_gates). Where Gauss-Newton is not the Hessian,
    trace estimates of the latter have no truth here.
    """
    gates = []
    if batch[0].is_floating_point():
        gates = hessian_gates.gates_of(model, batch[0])
        model, batch = in_float64(model, batch)
    with hessian_gates.following(gates):
        diagonal = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")
    return flat(diagonal), diagonal.matrix


def kinks(model, batch, exact):
    """Return what float64 does otherwise because it is on another piece: gates, diagonal, and the plain gradient."""
    wide, wide_batch = in_float64(model, batch)
    apart = hessian_gates.apart(*(hessian_gates.gates_of(m, b[0]) for m, b in ((model, batch), (wide, wide_batch))))
    there = flat(curvature.hessian_diagonal(wide, F.cross_entropy, wide_batch, method="ggn-exact"))
    here, truly = (
        torch.cat(
            [g.flatten().double() for g in torch.autograd.grad(F.cross_entropy(m(b[0]), b[1]), [*m.parameters()])]
        )
        for m, b in ((model, batch), (wide, wide_batch))
    )
    return {
        "gates_that_float64_sets_otherwise": apart,
        "its_diagonal_is_off_by": ((there - exact).norm() / exact.norm()).item(),
        "plain_gradient_error_against_it": ((here - truly).norm() / truly.norm()).item(),
    }


def errors(result, exact):
    """Return (diagonal's relative L2 error, Spearman, trace's relative error); None where there is no such thing."""
    if isinstance(result, float):
        return None, None, abs(result / exact.sum().item() - 1)
    got = flat(result)
    return (
        ((got - exact).norm() / exact.norm()).item(),
        spearman(got, exact),
        (got.sum() / exact.sum() - 1).abs().item(),
    )
