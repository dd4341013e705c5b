"""Curvature of a loss in a model's parameters: Hessian diagonal, traces and products, at about a gradient's price.

Where the model is piecewise linear in each parameter tensor (ReLU, pooling, convolutions, residuals, BatchNorm in
evaluation mode) the diagonal of the Hessian *is* that of the Gauss-Newton matrix, which needs no second derivative
of the model: one backward pass for each class gives it exactly, one with random signs estimates it well. Elsewhere
(GELU, tanh, LSTM, LayerNorm, BatchNorm in training mode) Gauss-Newton is an approximation and results say so in
``matrix``. Whether a model is piecewise linear is read off autograd's graph of the very forward pass.

========== ================= ==================================== =========================================
method      matrix            cost (1 = forward + backward)        error
========== ================= ==================================== =========================================
ggn-exact   Gauss-Newton      1/3 + about 2/3 a class, a fraction  rounding
                              of it for dense layers and pooling
ggn-mc      Gauss-Newton      1/3 + about 2/3 a draw, less where   diagonal 4 to 30 % with one draw
                              few samples carry the curvature
hutchinson  Hessian           1 + about 2 a draw, 1 for a trace    diagonal of the order of the Hessian's rows
========== ================= ==================================== =========================================

Hessian products share one recorded pass where every operation has a rule (Linear, convolutions, pooling, smooth
activations, BatchNorm in evaluation mode, embeddings, sums and products), and go by double backward elsewhere
(LSTM, attention, LayerNorm): see ``curvature.products``.

Parameters of other layers than Linear, Conv1d/2d, Embedding and normalisations (and any that are used twice) go a
general way that is right but costs more: see ``curvature.gauss_newton``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from autoflip.curvature import hutchinson, sketch
from autoflip.curvature.arguments import METHODS, blocks_of, check_counts, check_per, checked, matrix_of
from autoflip.curvature.choice import against_exact
from autoflip.curvature.clients import client_diagonals, client_traces
from autoflip.curvature.gauss_newton import GaussNewton
from autoflip.curvature.problem import LossFn, Problem
from autoflip.curvature.products import Products
from autoflip.curvature.results import Diagonal, Trace, mean_of, trace_of
from autoflip.curvature.root import NotDescribedError

__all__ = [
    "METHODS",
    "Diagonal",
    "NotDescribedError",
    "Trace",
    "client_diagonals",
    "client_traces",
    "hessian_diagonal",
    "hessian_trace",
    "hvp",
]

# one draw ranks weights well, but its trace can be 20 % off on a trained model with few samples
_TRACE_DRAWS = 16
_DIAGONAL_DRAWS = 4


def hessian_diagonal(
    model: nn.Module,
    loss_fn: LossFn,
    batch: tuple[Tensor, Tensor],
    num_probes: int = 1,
    seed: int = 0,
    method: str = "auto",
    *,
    chunk: int | None = None,
) -> Diagonal:
    """Return ``d^2 L / d w_i^2`` for every weight, ``L = loss_fn(model(inputs), target)``.

    The model is asked in the mode it is in (train or eval); its mode, gradients, buffers and the random state are
    left as they were. Pruned weights of masked layers get 0.

    Args:
        model: maps one tensor ``(N, ...)`` to one floating tensor.
        loss_fn: ``(output, target) -> scalar``; mean or sum over samples.
        batch: ``(inputs, target)``.
        num_probes: draws for "ggn-mc" and "hutchinson"; unused by "ggn-exact". Up to four of "ggn-mc" are dealt to the
            samples that carry the curvature where few do (a trained model): at least as accurate as independent draws.
        seed: of the draws.
        method: one of METHODS. "auto" takes "ggn-exact" for piecewise-linear models with up to 16 factors a sample
            (classes - 1 for cross-entropy), else at least 4 draws of "ggn-mc" (large maps without pooling, more
            classes, curved models: ``note`` says which), and "hutchinson" for losses that Gauss-Newton does not
            describe.
        chunk: factors or probes held at once; bounds the peak memory. None: 5 factors (10 of dense layers), or as many
            probes as stay in the cache.

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
    problem = checked(model, loss_fn, batch, num_probes, method, chunk)
    with problem.undisturbed(seed):
        gn = _gauss_newton(problem, seed, chunk, method)
        if gn is None:
            name = "hutchinson" if method == "auto" else method
            return Diagonal(mean_of(_hessian_draws(problem, name, num_probes, seed, chunk)[0]), name, "hessian")
        note = against_exact(gn) if method == "auto" else ""
        if method == "ggn-exact" or (method == "auto" and not note):
            return Diagonal(gn.exact()[0], "ggn-exact", matrix_of(gn))
        count = max(num_probes, _DIAGONAL_DRAWS) if method == "auto" else num_probes
        gn = gn.dealt(count)
        return Diagonal(gn.mean(count)[0], "ggn-mc", matrix_of(gn), note)


def hessian_trace(
    model: nn.Module,
    loss_fn: LossFn,
    batch: tuple[Tensor, Tensor],
    num_probes: int = 32,
    seed: int = 0,
    per: str = "parameter",
    method: str = "auto",
    *,
    chunk: int | None = None,
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
        chunk: as for hessian_diagonal.

    Raises:
        NotDescribedError: a Gauss-Newton method was asked for, and the loss has none.
        ValueError: model, loss, batch or arguments do not fit; the message says which.
    """
    check_per("hessian_trace", per)
    problem = checked(model, loss_fn, batch, num_probes, method, chunk)
    with problem.undisturbed(seed):
        gn = _gauss_newton(problem, seed, chunk, method)
        matrix = "hessian" if gn is None else matrix_of(gn)
        if gn is None or (method == "auto" and matrix == "ggn"):
            name = "hutchinson" if method == "auto" else method
            if name == "hutchinson" and per == "parameter":
                return trace_of(hutchinson.dots(problem, num_probes, seed, chunk), per, name, "hessian")
            draws, covariance = _hessian_draws(problem, name, num_probes, seed, chunk)
            return trace_of(draws, per, name, "hessian", covariance=covariance)
        note = against_exact(gn) if method == "auto" else ""
        if method == "ggn-exact" or (method == "auto" and not note):
            return trace_of(iter(gn.exact()), per, "ggn-exact", matrix)
        count = max(num_probes, _TRACE_DRAWS) if method == "auto" else num_probes
        return trace_of((block[0] for block in gn.blocks(*blocks_of(count))), per, "ggn-mc", matrix, note)


def hvp(
    model: nn.Module,
    loss_fn: LossFn,
    batch: tuple[Tensor, Tensor],
    vectors: Mapping[str, Tensor],
    *,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Multiply many vectors by the Hessian: ``H v_p`` for each p, all of them on one forward pass.

    Args:
        model: as for :func:`hessian_diagonal`, like the next two.
        loss_fn: scalar loss.
        batch: ``(inputs, target)``.
        vectors: parameter name -> ``(P, *parameter.shape)``; parameters that are not named stay fixed.
        chunk: vectors multiplied in one pass; bounds the peak memory. None: as many as stay in the cache.

    Returns:
        The names of ``vectors`` -> ``(P, *parameter.shape)``.

    Raises:
        ValueError: a name, shape or dtype is not that of a parameter that requires grad; or as hessian_diagonal.
    """
    problem = Problem.of(model, loss_fn, batch)
    check_counts(1, chunk)
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
    if probes == 0:
        return {name: torch.empty_like(v) for name, v in vectors.items()}
    with problem.undisturbed(0):
        return Products(problem, names, chunk)({name: v.detach() for name, v in vectors.items()})


def _gauss_newton(problem: Problem, seed: int, chunk: int | None, method: str) -> GaussNewton | None:
    if method in ("hutchinson", *sketch.LEAST):
        return None
    try:
        return GaussNewton.of(problem, seed, chunk)
    except NotDescribedError:
        if method != "auto":
            raise
        return None


def _hessian_draws(
    problem: Problem, method: str, count: int, seed: int, chunk: int | None
) -> tuple[Iterator[dict[str, Tensor]], float]:
    if method == "hutchinson":
        return hutchinson.draws(problem, count, seed, chunk), 0.0
    return sketch.draws(problem, method, count, seed, chunk)
