"""Hutchinson's estimator of the true Hessian's diagonal, and of its trace by parameter.

``diag H = E[r * (H r)]`` for signs r, with variance ``sum_{j != i} H_ij^2`` a draw: right for every smooth model, but
hundreds of draws are needed where the Gauss-Newton route needs one. Products are those of :mod:`products`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autoflip import ops
from autoflip.curvature.problem import Problem
from autoflip.curvature.products import Products, Vectors


def draws(problem: Problem, count: int, seed: int, chunk: int | None = None) -> Iterator[Vectors]:
    """Yield ``count`` independent estimates ``r * (H r)`` of the Hessian's diagonal, ``chunk`` of them a pass."""
    product = Products(problem, list(problem.params), chunk)
    for signs in _signs(problem, count, seed, product.chunk):
        products = product(signs)
        for i in range(len(next(iter(signs.values())))):
            yield {name: signs[name][i] * products[name][i] for name in signs}


def dots(problem: Problem, count: int, seed: int, chunk: int | None = None) -> Iterator[Vectors]:
    """Yield the same estimates summed by parameter, which is less work."""
    product = Products(problem, list(problem.params), chunk)
    for signs in _signs(problem, count, seed, product.chunk):
        sums = product.dots(signs)
        for i in range(len(next(iter(signs.values())))):
            yield {name: sums[name][i] for name in signs}


def _signs(problem: Problem, count: int, seed: int, chunk: int) -> Iterator[Vectors]:
    """Yield probes, ``(P, *parameter.shape)`` each; pruned weights do not move, so they get 0."""
    params = problem.params
    sizes = [p.numel() for p in params.values()]
    first = next(iter(params.values()))
    for begin in range(0, count, chunk):
        rows = [
            ops.rademacher(seed, i, (sum(sizes),), dtype=torch.float32, device=first.device)
            for i in range(begin, min(count, begin + chunk))
        ]
        flat: Tensor = rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)
        parts = zip(params.items(), flat.split(sizes, 1))
        yield problem.kept({n: v.reshape(len(rows), *p.shape).to(p.dtype) for (n, p), v in parts})
