"""Hessian diagonals and traces from a sketch of its range: Hutch++ and XTrace, row by row.

Where few eigenvalues carry the Hessian, as in trained networks, a basis Q of its range met by a few products takes
them out exactly, and signs have to estimate the rest only. With ``P = Q Q^T``:
``diag H = diag(P H) + diag((I - P) H P) + diag((I - P) H (I - P))``, the first two known, the last by
``g * (I - P) H (I - P) g``. Summed over all rows the middle term is zero; over one parameter's it is not.

Memory: about 4 products' worth of parameters a probe; the products are those of :mod:`products`.

XTrace's estimates share their basis, so their spread alone says too little: a third less than their mean's variance,
and its 95 % interval held 89 % (bench_hessian.py --coverage). What is missing is their covariance. Given all other
probes, ``t_i - tr H`` and ``t_j - tr H`` have mean zero; so has what a basis without both leaves them, ``t_i^j`` and
``t_j^i``, against everything that probe j, or i, is not part of. Hence ``cov(t_i, t_j) = E (t_i - t_i^j)(t_j - t_j^i)``
exactly: known without bias from the products that there are.

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


def draws(
    problem: Problem, method: str, count: int, seed: int, chunk: int | None = None
) -> tuple[Iterator[Vectors], float]:
    """Estimate the Hessian's diagonal by ``count`` products in all.

    Returns:
        ``(estimates, covariance)``: their mean is the method's; the covariance of two of their totals, estimated
        without bias (so it may come out below 0).
    """
    operator = _Operator(problem, seed, chunk)
    rows, covariance = (_hutchpp if method == "hutch++" else _xtrace)(operator, min(count, 3 * operator.size))
    return (problem.kept(operator.parts(row)) for row in rows), covariance


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
        flat = torch.cat(
            [products[name].reshape(x.shape[1], -1).to(self.like.dtype) for name in self.problem.params], 1
        )
        return flat.T  # a vector's entries lie together

    def parts(self, flat: Tensor) -> Vectors:
        """Cut a flat vector into the parameters' shapes."""
        params = self.problem.params.items()
        return {n: v.view(p.shape).to(p.dtype) for (n, p), v in zip(params, flat.contiguous().split(self.sizes))}


def _hutchpp(a: _Operator, count: int) -> tuple[Iterator[Tensor], float]:
    k = min(count // 3, a.size)
    q = torch.linalg.qr(a(a.signs(0, k)))[0]
    z = a(q)
    known = (q * (2 * z - q @ (q.T @ z))).sum(1)
    return _left(a, q, known, a.signs(1, count - 2 * k)), 0.0  # given the basis they are independent


def _left(a: _Operator, q: Tensor, known: Tensor, probes: Tensor) -> Iterator[Tensor]:
    """Yield, for each column of ``probes``, what is known and an estimate of what the basis leaves."""
    for g in probes.T:
        r = g - q @ (q.T @ g)
        left = a(r[:, None])[:, 0]
        yield known + g * (left - q @ (q.T @ left))


def _exhausted(a: _Operator, q: Tensor, g: Tensor) -> bool:
    """Tell whether the operator's range is in the basis: then the product of a normal vector ``g`` ``(size, 1)`` is."""
    product = a(g)
    return bool((product - q @ (q.T @ product)).norm() <= _rounding(a) * product.norm())


def _rounding(a: _Operator) -> float:
    """Return how far, against its size, a product may be off."""
    return 16 * float(torch.finfo(a.like.dtype).eps) * a.size**0.5


def _xtrace(a: _Operator, count: int) -> tuple[Iterator[Tensor], float]:
    k = min(count // 2, a.size)
    omega = a.signs(0, k)
    y = a(omega)
    q, r = torch.linalg.qr(y)
    z = a(q)
    h = q.T @ z
    diagonal = r.diagonal().abs()
    if bool(diagonal.min() <= _rounding(a) * diagonal.max()):
        # fewer directions than probes: the basis holds the whole range, and nothing is left to estimate; or signs
        # happened to agree where it matters, and normal vectors, which never do, have to tell
        known = (q * (2 * z - q @ h)).sum(1)
        generator = torch.Generator().manual_seed(a.seed % (1 << 63))
        others = torch.randn(a.size, k, generator=generator, dtype=a.like.dtype).to(a.like.device)
        return (iter([known] * k) if _exhausted(a, q, others[:, :1]) else _left(a, q, known, others)), 0.0
    # Q's projector without probe i is Q (I - s s^T) Q^T, s the normalised column i of R^-T
    s = torch.linalg.solve_triangular(r.T, torch.eye(k, dtype=r.dtype, device=r.device), upper=False)
    s = s / s.norm(dim=0)
    w = q.T @ omega
    v = w - s * (s * w).sum(0)
    both, inner = (q * z).sum(1), (q * (q @ h)).sum(1)

    def rows() -> Iterator[Tensor]:
        for i in range(k):
            one = s[:, i]
            qs, zs, qhs = q @ one, z @ one, q @ (h @ one)
            known = 2 * (both - qs * zs) - (inner - 2 * qs * qhs + (one @ h @ one) * qs.square())
            left = y[:, i] - z @ v[:, i]
            seen = q.T @ left
            yield known + omega[:, i] * (left - q @ (seen - one * (one @ seen)))

    return rows(), _covariance(h, s, w, r - h @ v)


def _covariance(h: Tensor, s: Tensor, w: Tensor, seen: Tensor) -> float:
    """Return the mean of ``(t_i - t_i^j)(t_j - t_j^i)`` over the pairs; all arguments ``(k, k)``.

    Without j as well, probe i's basis loses ``u = (s_j - c s_i) / (1 - c^2)^1/2``, ``c = s_i s_j``, and with it
    ``t_i - t_i^j = u H u (1 - b^2) - 2 b (u e)``, ``b = u w_i``, ``e = Q^T (y_i - A Q v_i)``.

    Args:
        h: ``Q^T A Q``.
        s: column i is what the basis without probe i lacks.
        w: ``Q^T Omega``.
        seen: column i is e.
    """
    h, s, w, seen = h.double(), s.double(), w.double(), seen.double()
    c, among = s.T @ s, s.T @ h @ s
    own = among.diagonal()[:, None]
    square = (1 - c.square()).fill_diagonal_(1)

    def along(x: Tensor) -> Tensor:
        """Return u x_i, times the root, for row i and column j."""
        products = (s.T @ x).T  # s_j x_i
        return products - c * products.diagonal()[:, None]

    uhu = (among.diagonal() - c * (among + among.T) + c.square() * own) / square
    b, e = along(w), along(seen)
    lost = (uhu * (1 - b.square() / square) - 2 * b * e / square).fill_diagonal_(0)
    k = len(s)
    return float((lost * lost.T).sum()) / (k * (k - 1))
