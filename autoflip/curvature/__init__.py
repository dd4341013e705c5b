"""Curvature of a loss in a model's parameters: Hessian diagonal, traces and products, at about a gradient's price.

Where the model is piecewise linear in each parameter tensor (ReLU, pooling, convolutions, residuals, BatchNorm in
evaluation mode) the diagonal of the Hessian *is* that of the Gauss-Newton matrix, which needs no second derivative
of the model: one backward pass for each class gives it exactly, one with random signs estimates it well. Elsewhere
(GELU, tanh, LSTM, LayerNorm, BatchNorm in training mode) Gauss-Newton is an approximation and results say so in
``matrix``. Whether a model is piecewise linear is read off autograd's graph of the very forward pass.

========== ================= ==================================== =========================================
method      matrix            cost (1 = forward + backward)        error
========== ================= ==================================== =========================================
ggn-exact   Gauss-Newton      1/3 + about 2/3 a class              rounding
ggn-mc      Gauss-Newton      1/3 + about 2/3 a draw               diagonal 5 to 50 % with one draw
hutchinson  Hessian           1 + about 2 a draw                   diagonal of the order of the Hessian's rows
========== ================= ==================================== =========================================

Parameters of other layers than Linear, Conv1d/2d, Embedding and normalisations (and any that are used twice) go a
general way that is right but costs more: see ``curvature.gauss_newton``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoflip.curvature import hutchinson, sketch
from autoflip.curvature.gauss_newton import GaussNewton
from autoflip.curvature.problem import LossFn, Problem
from autoflip.curvature.root import NotDescribedError

__all__ = ["METHODS", "Diagonal", "NotDescribedError", "Trace", "hessian_diagonal", "hessian_trace", "hvp"]

METHODS = ("auto", "ggn-mc", "ggn-exact", "hutchinson", "hutch++", "xtrace")
# one draw ranks weights well, but its trace can be 20 % off on a trained model with few samples
_TRACE_DRAWS = 16
_DIAGONAL_DRAWS = 4
# draws with orthogonal signs: their errors cancel; the spread of the blocks is what the standard error comes from
_TRACE_BLOCK = 4
# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Diagonal(dict[str, Tensor]):
    """Parameter name -> diagonal entries shaped like the parameter, and how they came about.

    Attributes:
        method: "ggn-exact", "ggn-mc" or "hutchinson".
        matrix: "hessian" when the expected value is the Hessian's diagonal, "ggn" when it is only Gauss-Newton's.
        note: why "auto" did not take the exact method; empty when it did, or was not asked.
    """

    def __init__(self, entries: Mapping[str, Tensor], method: str, matrix: str, note: str = "") -> None:
        super().__init__(entries)
        self.method, self.matrix, self.note = method, matrix, note


@dataclass(frozen=True)
class Trace:
    """A trace and its parts.

    Attributes:
        total: sum of the diagonal over all parameters that require grad.
        stderr: standard error of ``total``, from the spread of independent repeats; 0 for an exact method, infinite
            for a single one (which says nothing about its own error).
        repeats: how many independent repeats that was; draws of ``ggn-mc`` are repeats in blocks of four.
        by_parameter: parameter name -> its part of ``total``.
        by_channel: parameter name -> ``(shape[0],)`` sums over all but the first axis, or None if not asked for.
        method: "ggn-exact", "ggn-mc" or "hutchinson".
        matrix: "hessian" or "ggn", as in Diagonal.
        note: as in Diagonal.
    """

    total: float
    stderr: float
    by_parameter: dict[str, float]
    by_channel: dict[str, Tensor] | None
    method: str
    matrix: str
    repeats: int
    note: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        """Interval that holds the expected value 19 times in 20: Student's t for the few repeats that there are."""
        freedom = self.repeats - 1
        quantile = _STUDENT[freedom - 1] if 0 < freedom <= len(_STUDENT) else 1.96 + 2.4 / max(freedom, 1)
        half = quantile * self.stderr if self.stderr else 0.0
        return self.total - half, self.total + half


def hessian_diagonal(
    model: nn.Module,
    loss_fn: LossFn,
    batch: tuple[Tensor, Tensor],
    num_probes: int = 1,
    seed: int = 0,
    method: str = "auto",
    *,
    chunk: int = 4,
) -> Diagonal:
    """Return ``d^2 L / d w_i^2`` for every weight, ``L = loss_fn(model(inputs), target)``.

    The model is asked in the mode it is in (train or eval); its mode, gradients, buffers and the random state are
    left as they were. Pruned weights of masked layers get 0.

    Args:
        model: maps one tensor ``(N, ...)`` to one floating tensor.
        loss_fn: ``(output, target) -> scalar``; mean or sum over samples.
        batch: ``(inputs, target)``.
        num_probes: draws for "ggn-mc" and "hutchinson"; unused by "ggn-exact".
        seed: of the draws.
        method: one of METHODS. "auto" takes "ggn-exact" for piecewise-linear models with up to 16 factors a sample
            (classes - 1 for cross-entropy), else at least 4 draws of "ggn-mc" (large maps without pooling, more
            classes, curved models: ``note`` says which), and "hutchinson" for losses that Gauss-Newton does not
            describe.
        chunk: factors held at once by "ggn-exact" and "ggn-mc"; bounds the peak memory.

    Returns:
        Diagonal: name -> tensor shaped and typed like the parameter, for all that require grad.

    Raises:
        NotDescribedError: a Gauss-Newton method was asked for, and the loss has none.
        ValueError: model, loss, batch or arguments do not fit; the message says which.

    Source: Monte-Carlo Gauss-Newton diagonal as in Dangel et al., "BackPACK", ICLR 2020 (there with sampled labels;
    signs have less variance).

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> hessian_diagonal(layer, nn.functional.mse_loss, batch)["weight"]
        tensor([[2., 8.]])
    """
    problem = _checked(model, loss_fn, batch, num_probes, method, chunk)
    with problem.undisturbed(seed):
        gn = _gauss_newton(problem, seed, chunk, method)
        if gn is None:
            name = "hutchinson" if method == "auto" else method
            return Diagonal(_mean(_hessian_draws(problem, name, num_probes, seed)), name, "hessian")
        matrix = "ggn" if gn.graph.curved else "hessian"
        note = _against_exact(gn, matrix) if method == "auto" else ""
        if method == "ggn-exact" or (method == "auto" and not note):
            return Diagonal(gn.exact(), "ggn-exact", matrix)
        count = max(num_probes, _DIAGONAL_DRAWS) if method == "auto" else num_probes
        return Diagonal(gn.mean(count), "ggn-mc", matrix, note)


def hessian_trace(
    model: nn.Module,
    loss_fn: LossFn,
    batch: tuple[Tensor, Tensor],
    num_probes: int = 32,
    seed: int = 0,
    per: str = "parameter",
    method: str = "auto",
    *,
    chunk: int = 4,
) -> Trace:
    """Return the sum of the Hessian's diagonal, by parameter or by output channel, with its standard error.

    Args:
        model: as for :func:`hessian_diagonal`, like the next two.
        loss_fn: scalar loss.
        batch: ``(inputs, target)``.
        num_probes: draws, rounded up to whole blocks of four for "ggn-mc" from 8 on; "auto" makes at least 16 where
            it draws Gauss-Newton factors.
        seed: of the draws.
        per: "parameter", or "channel" for sums over each parameter's first axis as well.
        method: one of METHODS. "auto" takes "ggn-exact" as hessian_diagonal does, "ggn-mc" for piecewise-linear
            models with more classes, and "hutchinson" (the true Hessian) for all others.
        chunk: factors held at once by "ggn-exact"; bounds the peak memory.

    Raises:
        NotDescribedError: a Gauss-Newton method was asked for, and the loss has none.
        ValueError: model, loss, batch or arguments do not fit; the message says which.
    """
    if per not in ("parameter", "channel"):
        raise ValueError(f"hessian_trace: per={per!r}; wanted 'parameter' or 'channel'")
    problem = _checked(model, loss_fn, batch, num_probes, method, chunk)
    with problem.undisturbed(seed):
        gn = _gauss_newton(problem, seed, chunk, method)
        matrix = "ggn" if gn is not None and gn.graph.curved else "hessian"
        if gn is None or (method == "auto" and matrix == "ggn"):
            name = "hutchinson" if method == "auto" else method
            return _trace(_hessian_draws(problem, name, num_probes, seed), per, name, "hessian")
        note = _against_exact(gn, matrix) if method == "auto" else ""
        if method == "ggn-exact" or (method == "auto" and not note):
            return _trace(iter([gn.exact()]), per, "ggn-exact", matrix)
        count = max(num_probes, _TRACE_DRAWS) if method == "auto" else num_probes
        size = _TRACE_BLOCK if count >= 2 * _TRACE_BLOCK else 1
        return _trace(gn.blocks(-(-count // size), size), per, "ggn-mc", matrix, note)


def hvp(
    model: nn.Module, loss_fn: LossFn, batch: tuple[Tensor, Tensor], vectors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Multiply many vectors by the Hessian: ``H v_p`` for each p, the gradient's graph built once.

    Args:
        model: as for :func:`hessian_diagonal`, like the next two.
        loss_fn: scalar loss.
        batch: ``(inputs, target)``.
        vectors: parameter name -> ``(P, *parameter.shape)``; parameters that are not named stay fixed.

    Returns:
        The names of ``vectors`` -> ``(P, *parameter.shape)``.

    Raises:
        ValueError: a name, shape or dtype is not that of a parameter that requires grad; or as hessian_diagonal.
    """
    problem = Problem.of(model, loss_fn, batch)
    if not isinstance(vectors, Mapping) or not all(isinstance(v, Tensor) for v in vectors.values()):
        got = type(vectors).__name__
        if isinstance(vectors, Mapping):
            got += " of " + ", ".join(sorted({type(v).__name__ for v in vectors.values()}))
        raise ValueError(f"hvp: vectors is {got}, wanted a dict: parameter name -> tensor (probes, *parameter.shape)")
    names = list(vectors)
    if not names:
        raise ValueError("hvp: vectors is empty; wanted parameter name -> (probes, *parameter.shape)")
    probes = len(vectors[names[0]]) if vectors[names[0]].dim() else 0
    for name, v in vectors.items():
        if name not in problem.params:
            raise ValueError(
                f"hvp: {name!r} is no parameter that requires grad; there are {', '.join(list(problem.params)[:8])}"
            )
        p = problem.params[name]
        if v.shape != (probes, *p.shape) or v.dtype != p.dtype or v.device != p.device:
            raise ValueError(
                f"hvp: vectors[{name!r}] is {v.dtype} {tuple(v.shape)} on {v.device}, wanted {p.dtype} "
                f"{(probes, *p.shape)} on {p.device}: one leading axis of probes, the same for all"
            )
    out = {name: torch.empty_like(v) for name, v in vectors.items()}
    with problem.undisturbed(0):
        product = hutchinson.hessian_product(problem, names)
        for i in range(probes):
            for name, value in product({name: v[i] for name, v in vectors.items()}).items():
                out[name][i] = value
    return out


def _checked(
    model: nn.Module, loss_fn: LossFn, batch: tuple[Tensor, Tensor], num_probes: int, method: str, chunk: int
) -> Problem:
    if method not in METHODS:
        raise ValueError(f"curvature: there is no method {method!r}; there are {', '.join(METHODS)}")
    if not all(isinstance(count, int) and count >= 1 for count in (num_probes, chunk)):
        raise ValueError(f"curvature: num_probes={num_probes!r}, chunk={chunk!r}; both must be whole and at least 1")
    if num_probes < sketch.LEAST.get(method, 1):
        raise ValueError(
            f"curvature: {method} with num_probes={num_probes}; it needs at least {sketch.LEAST[method]} products"
        )
    return Problem.of(model, loss_fn, batch)


def _gauss_newton(problem: Problem, seed: int, chunk: int, method: str) -> GaussNewton | None:
    if method in ("hutchinson", *sketch.LEAST):
        return None
    try:
        return GaussNewton.of(problem, seed, chunk)
    except NotDescribedError:
        if method != "auto":
            raise
        return None


def _hessian_draws(problem: Problem, method: str, count: int, seed: int) -> Iterator[dict[str, Tensor]]:
    if method == "hutchinson":
        return hutchinson.draws(problem, count, seed)
    return sketch.draws(problem, method, count, seed)


def _mean(draws: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    total, count = dict(next(draws)), 1
    for draw in draws:
        count += 1
        for name, value in draw.items():
            total[name] += value
    return {name: value / count for name, value in total.items()}


def _against_exact(gn: GaussNewton, matrix: str) -> str:
    if matrix == "ggn":
        return f"the model is curved ({', '.join(sorted(gn.graph.curved)[:3])}), so Gauss-Newton is an approximation"
    return gn.against_exact()


def _trace(draws: Iterator[dict[str, Tensor]], per: str, method: str, matrix: str, note: str = "") -> Trace:
    totals: list[dict[str, float]] = []
    channels: dict[str, Tensor] = {}
    for draw in draws:
        rows = {n: d.reshape(len(d) if d.dim() else 1, -1).sum(1, dtype=torch.float64) for n, d in draw.items()}
        totals.append({name: float(row.sum()) for name, row in rows.items()})
        if per == "channel":
            channels = {name: channels[name] + row if channels else row for name, row in rows.items()}
    count = len(totals)
    by_parameter = {name: math.fsum(t[name] for t in totals) / count for name in totals[0]}
    sums = [math.fsum(t.values()) for t in totals]
    total = math.fsum(sums) / count
    if method == "ggn-exact":
        stderr = 0.0
    elif count == 1:
        stderr = math.inf
    else:
        stderr = math.sqrt(math.fsum((s - total) ** 2 for s in sums) / (count - 1) / count)
    by_channel = {name: value / count for name, value in channels.items()} if per == "channel" else None
    return Trace(total, stderr, by_parameter, by_channel, method, matrix, count, note)
