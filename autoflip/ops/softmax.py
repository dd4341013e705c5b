"""Factors of softmax's second derivative ``scale (diag p - p p^T)``, row by row.

The factor has the likeliest class first. Where two classes compete, as in a trained model, its first column is nearly
all there is: a draw of signs then has next to no variance, while the symmetric root's columns would cancel or add up
at random. Nothing here is differentiable.

Source: the closed form of the Cholesky factor of Tanabe and Sagae, "An exact Cholesky decomposition and the generalized
inverse of the variance-covariance matrix of the multinomial distribution", JRSS B 1992.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autoflip.ops import _hessian, backend
from autoflip.ops import reference_softmax as reference
from autoflip.ops._hessian_registered import traced

__all__ = ["softmax_columns", "softmax_draw", "softmax_factor", "softmax_pull_back", "softmax_weight"]

backend.register("softmax_draw", "cpp", optional=True)


def softmax_factor(f: Tensor, scale: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``S`` with ``S S^T = scale (diag p - p p^T)``, ``p = softmax(f, dim)``, in its closed form.

    Args:
        f: logits, ``(N, ..., classes, ...)``, floating.
        scale: like ``f`` with 1 class, no entry below 0.
        dim: of the classes.

    Returns:
        ``(here, below, p, order)`` like ``f``, classes sorted by ``order``: column c of S is ``here[c]`` at c,
        ``-p[i] below[c]`` at each later i, and 0 at earlier ones.
    """
    return reference.softmax_factor(f, scale, dim)


def softmax_columns(f: Tensor, scale: Tensor) -> Tensor:
    """Return the columns of :func:`softmax_factor`'s S but the last, which is zero.

    Args:
        f: logits, ``(N, classes)``, floating.
        scale: ``(N, 1)``.

    Returns:
        ``(classes - 1, N, classes)``: classes in ``f``'s order, columns in S's.

    Raises:
        ValueError: shapes do not fit.
    """
    if f.dim() != 2:
        raise ValueError(f"softmax_columns: f has shape {tuple(f.shape)}; wanted (N, classes)")
    check_scale("softmax_columns", f, scale, 1)
    if (kernels := rows_kernels(f)) is None:
        return reference.softmax_columns(f, scale)
    f, scale = f.detach().contiguous(), scale.to(f).contiguous()
    out = f.new_empty(f.shape[1] - 1, *f.shape)
    kernels.softmax_columns(f.data_ptr(), scale.data_ptr(), out.data_ptr(), *f.shape)
    return out


def softmax_draw(f: Tensor, scale: Tensor, signs: Tensor, dim: int = 1) -> Tensor:
    """Return ``S signs`` for :func:`softmax_factor`'s S, at each row and position.

    Args:
        f: logits, floating.
        scale: like ``f`` with 1 class.
        signs: like ``f``: one for each column, likeliest class first.
        dim: of the classes.

    Returns:
        Like ``f``, classes in its order.

    Raises:
        ValueError: shapes do not fit.
    """
    check_scale("softmax_draw", f, scale, dim)
    if signs.shape != f.shape:
        raise ValueError(f"softmax_draw: signs have shape {tuple(signs.shape)}, f {tuple(f.shape)}; wanted the same")
    if (kernels := rows_kernels(f)) is None:
        return reference.softmax_draw(f, scale, signs, dim)
    f, scale, signs = f.detach().contiguous(), scale.to(f).contiguous(), signs.to(f).contiguous()
    out = torch.empty_like(f)
    kernels.softmax_draw(f.data_ptr(), scale.data_ptr(), signs.data_ptr(), out.data_ptr(), *f.shape)
    return out


def softmax_pull_back(
    f: Tensor,
    scale: Tensor,
    last: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    before: Tensor | None = None,
    *,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull all columns of a softmax factor S through the two dense layers that end in the logits.

    ``u[q] = (S[q] @ last) * (gate > 0)``, ``v[q] = (u[q] @ weight) * (before > 0)``, where S is Cholesky's factor of
    ``scale (diag p - p p^T)`` with the classes as they come.

    Args:
        f: logits, ``(N, classes)``, floating.
        scale: ``(N, 1)``, no entry below 0.
        last: ``(classes, O)``, dtype and device of ``f`` like all others, the layer that wrote ``f``.
        gate: ``(N, O)``, what ReLU left in front of it; None where there is none.
        weight: ``(O, K)``, the layer before.
        before: ``(N, K)``, what ReLU left in front of that; None where there is none.
        squared: return the sum of squares of ``v``, which then never holds all columns.

    Returns:
        ``(S's sums of squares over columns (N, classes), u's (N, O), v (classes - 1, N, K) or its (N, K))``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: with the C++ kernel ``2 (classes - 1) K`` FLOPs for each unit that a sample has open otherwise than most of
    its likeliest class, and for each that most have open once in up to 64 samples; ``2 (classes - 1) N O (classes +
    K)`` elsewhere.
    """
    if f.dim() != 2 or last.dim() != 2 or weight.dim() != 2:
        got = ", ".join(str(tuple(t.shape)) for t in (f, last, weight))
        raise ValueError(f"softmax_pull_back: f, last and weight have shapes {got}; wanted two dimensions each")
    check_scale("softmax_pull_back", f, scale, 1)
    sizes = {
        "last": (last, (f.shape[1], last.shape[1])),
        "gate": (gate, (f.shape[0], last.shape[1])),
        "weight": (weight, (last.shape[1], weight.shape[1])),
        "before": (before, (f.shape[0], weight.shape[1])),
    }
    for name, (tensor, shape) in sizes.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != f.dtype or tensor.device != f.device):
            raise ValueError(
                f"softmax_pull_back: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; wanted "
                f"{f.dtype} {shape} on {f.device}"
            )
    f, last, weight = (t.detach().contiguous() for t in (f, last, weight))
    gate, before = (None if t is None else t.detach().contiguous() for t in (gate, before))
    op = torch.ops.autoflip.softmax_pull_back.default if traced() else _hessian.softmax_pull_back
    squares, hidden, pulled, _ = op(f, scale.to(f).contiguous(), last, gate, weight, before, squared)
    return squares, hidden, pulled


def softmax_weight(f: Tensor, scale: Tensor, dim: int = 1) -> Tensor:
    """Return the trace of ``scale (diag p - p p^T)`` a row: ``sum scale (1 - sum p^2)`` over positions.

    Args:
        f: logits, floating.
        scale: like ``f`` with 1 class.
        dim: of the classes.

    Returns:
        ``(N,)``, float64; small values are as exact as large ones.

    Raises:
        ValueError: shapes do not fit.
    """
    check_scale("softmax_weight", f, scale, dim)
    if (kernels := rows_kernels(f)) is None:
        return reference.softmax_weight(f.double(), scale.double(), dim)
    f, scale = f.detach().contiguous(), scale.to(f).contiguous()
    out = torch.empty(len(f), dtype=torch.float64)
    kernels.softmax_weight(f.data_ptr(), scale.data_ptr(), out.data_ptr(), *f.shape)
    return out


def check_scale(op: str, f: Tensor, scale: Tensor, dim: int) -> None:
    """Raise ValueError unless ``scale`` is shaped like ``f`` with one class."""
    wanted = (*f.shape[:dim], 1, *f.shape[dim + 1 :])
    if tuple(scale.shape) != wanted:
        raise ValueError(
            f"{op}: scale has shape {tuple(scale.shape)}; wanted {wanted}: f's with one class in axis {dim}"
        )


def rows_kernels(f: Tensor) -> Any:
    """Return the C++ kernels where they can: float32 rows with at least one class on the CPU."""
    if f.dim() != 2 or f.dtype != torch.float32 or f.shape[1] == 0:
        return None
    return backend.extension("_C")[0] if backend.serve("softmax_draw", f.device) == "cpp" else None
