"""Hessian diagonals and traces from a sketch of its range: Hutch++ and XTrace, row by row.

Where few eigenvalues carry the Hessian, as in trained networks, a basis Q of its range met by a few products takes
them out exactly, and signs have to estimate the rest only. With ``P = Q Q^T``:
``diag H = diag(P H) + diag((I - P) H P) + diag((I - P) H (I - P))``, the first two known, the last by
``g * (I - P) H (I - P) g``. Summed over all rows the middle term is zero; over one parameter's it is not.

Memory: about 4 products' worth of parameters a probe; the products are those of :mod:`products`.

Source: Hutch++, Meyer et al., SOSA 2021. XTrace, Epperly et al., SIAM J. Matrix Anal. Appl. 2024: every probe takes its
turn at estimating what the basis of all others leaves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autoflip import ops
from autoflip.curvature.problem import Problem
from autoflip.curvature.products import Products, Vectors

# products that a method needs for two estimates, without which there is no error to report
LEAST = {"hutch++": 6, "xtrace": 4}


def draws(problem: Problem, method: str, count: int, seed: int, chunk: int | None = None) -> Iterator[Vectors]:
    """Yield estimates of the Hessian's diagonal whose mean is the method's; ``count`` products in all."""
    operator = _Operator(problem, seed, chunk)
    for row in (_hutchpp if method == "hutch++" else _xtrace)(operator, min(count, 3 * operator.size)):
        yield problem.kept(operator.parts(row))


class _Operator:
    """The Hessian as a matrix on flat vectors."""

    def __init__(self, problem: Problem, seed: int, chunk: int | None) -> None:
        self.problem, self.seed = problem, seed
        self.sizes = [p.numel() for p in problem.params.values()]
        self.size = sum(self.sizes)
        self.product = Products(problem, list(problem.params), chunk)
        first = next(iter(problem.params.values()))
        self.like = torch.empty(0, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)

    def signs(self, stream: int, count: int) -> Tensor:
        """Return ``(size, count)`` signs."""
        shape = (count, self.size)
        return ops.rademacher(self.seed, stream, shape, dtype=self.like.dtype, device=self.like.device).T

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply ``(size, count)`` vectors."""
        params = self.problem.params.items()
        rows = x.T.split(self.sizes, 1)
        products = self.product({n: v.reshape(len(v), *p.shape).to(p.dtype) for (n, p), v in zip(params, rows)})
        flat = torch.cat([products[name].flatten(1).to(self.like.dtype) for name in self.problem.params], 1)
        return flat.T  # a vector's entries lie together

    def parts(self, flat: Tensor) -> Vectors:
        """Cut a flat vector into the parameters' shapes."""
        params = self.problem.params.items()
        return {n: v.view(p.shape).to(p.dtype) for (n, p), v in zip(params, flat.contiguous().split(self.sizes))}


def _hutchpp(a: _Operator, count: int) -> Iterator[Tensor]:
    k = min(count // 3, a.size)
    q = torch.linalg.qr(a(a.signs(0, k)))[0]
    z = a(q)
    known = (q * (2 * z - q @ (q.T @ z))).sum(1)
    for g in a.signs(1, count - 2 * k).T:
        r = g - q @ (q.T @ g)
        left = a(r[:, None])[:, 0]
        yield known + g * (left - q @ (q.T @ left))


def _xtrace(a: _Operator, count: int) -> Iterator[Tensor]:
    k = min(count // 2, a.size)
    omega = a.signs(0, k)
    y = a(omega)
    q, r = torch.linalg.qr(y)
    z = a(q)
    h = q.T @ z
    diagonal = r.diagonal().abs()
    if bool(diagonal.min() <= torch.finfo(r.dtype).eps * a.size * diagonal.max()):
        # fewer directions than probes: the basis holds the whole range, and nothing is left to estimate
        for _ in range(k):
            yield (q * (2 * z - q @ h)).sum(1)
        return
    # Q's projector without probe i is Q (I - s s^T) Q^T, s the normalised column i of R^-T
    s = torch.linalg.solve_triangular(r.T, torch.eye(k, dtype=r.dtype, device=r.device), upper=False)
    s = s / s.norm(dim=0)
    w = q.T @ omega
    v = w - s * (s * w).sum(0)
    both, inner = (q * z).sum(1), (q * (q @ h)).sum(1)
    for i in range(k):
        one = s[:, i]
        qs, zs, qhs = q @ one, z @ one, q @ (h @ one)
        known = 2 * (both - qs * zs) - (inner - 2 * qs * qhs + (one @ h @ one) * qs.square())
        left = y[:, i] - z @ v[:, i]
        seen = q.T @ left
        yield known + omega[:, i] * (left - q @ (seen - one * (one @ seen)))
