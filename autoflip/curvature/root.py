"""Factors of the loss's second derivative at the model's output: ``H_out = S S^T``, sample by sample.

The loss is only asked for products ``H_out r``. Two structures are recognised from them, whatever the loss is
called: softmax cross-entropy (``s_n (diag p - p p^T)``: class weights, ignored targets and label smoothing
included) and elementwise losses (a diagonal: MSE, binary cross-entropy with logits). Any other loss that is a
sum over samples gets its block a sample by as many products as a sample has outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoflip import ops
from autoflip.curvature.problem import NotFiniteError, Problem

# a generic loss is factored with one product an output; beyond this many outputs a sample it is not worth it
_MAX_BLOCK = 512
_PLAIN_CROSS_ENTROPY = nn.CrossEntropyLoss()


class NotDescribedError(ValueError):
    """A Gauss-Newton matrix does not describe this loss; the message says why."""


@dataclass(frozen=True)
class Root:
    """``S`` in ``H_out = S S^T``, block diagonal over samples.

    Attributes:
        factors: columns of ``S`` that a sample has.
        weight: ``() -> (rows,)``, each row's trace of ``S S^T``.
        draw: (signs, rows) -> ``S @ signs``, whose expected outer product is ``H_out``; signs are shaped like the
            output, or like those of its rows that are named, which may come twice.
        columns: the columns of all samples side by side, each shaped like the output.
        softmax: logits ``(N, classes)`` and each row's factor, where ``S S^T`` is ``factor (diag p - p p^T)``.
    """

    factors: int
    weight: Callable[[], Tensor]
    draw: Callable[[Tensor, Tensor | None], Tensor]
    columns: Callable[[], Iterator[Tensor]]
    softmax: tuple[Tensor, Tensor] | None = None


def output_root(problem: Problem, output: Tensor, seed: int) -> Root:
    """Factor the loss's second derivative at ``output``.

    Raises:
        NotDescribedError: the loss is linear in the output, not convex, couples samples, depends on the weights
            other than through the output, or cannot be differentiated twice.
    """
    f = output.detach()
    f = f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
    if f.dim() == 2 and (scale := cross_entropy_scale(problem, f)) is not None:
        return _softmax_root(f, 1, scale)
    hvp = _hvp(problem, f)
    r1, r2 = (ops.rademacher(seed, -1 - i, tuple(f.shape), dtype=f.dtype, device=f.device) for i in (0, 1))
    # signs alone agree with a wrong structure by chance where a batch has a few outputs
    r2 = r2 * _spread(f)
    h1, h2 = hvp(r1), hvp(r2)
    for dim in {1: (), 2: (1,)}.get(f.dim(), (1, f.dim() - 1)):
        scale = _softmax_scale(problem, f, dim)
        if scale is not None and _close(_softmax_product(f, dim, scale, r2), h2, scale):
            return _softmax_root(f, dim, scale)
    if _close(h1 * r1 * r2, h2):
        return _diagonal_root(h1 * r1)
    return _block_root(f, hvp, r2, h2)


def side_by_side(roots: Sequence[Root], segments: Sequence[slice]) -> Root:
    """Join clients' roots: ``roots[k]`` is that of the samples ``segments[k]``."""

    def draw(signs: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is None  # clients' rows are not dealt
        return torch.cat([root.draw(signs[s], None) for root, s in zip(roots, segments)])

    def columns() -> Iterator[Tensor]:
        for parts in zip_longest(*(root.columns() for root in roots)):
            there = next(part for part in parts if part is not None)
            fill = [there.new_zeros(s.stop - s.start, *there.shape[1:]) for s in segments]
            yield torch.cat([f if part is None else part for part, f in zip(parts, fill)])

    def weight() -> Tensor:
        return torch.cat([root.weight() for root in roots])

    parts = [root.softmax for root in roots if root.softmax is not None]
    softmax = (torch.cat([f for f, _ in parts]), torch.cat([s for _, s in parts])) if len(parts) == len(roots) else None
    return Root(max(root.factors for root in roots), weight, draw, columns, softmax)


def cross_entropy_scale(problem: Problem, f: Tensor) -> Tensor | None:
    """Return each row's factor for torch's own cross-entropy on labels, whose second derivative needs no asking."""
    fn, y = problem.loss_fn, problem.target
    module = (
        fn
        if type(fn) is nn.CrossEntropyLoss and not _changed(fn)
        else _PLAIN_CROSS_ENTROPY
        if fn is F.cross_entropy
        else None
    )
    if module is None or module.weight is not None or module.reduction == "none" or y.dtype != torch.int64:
        return None
    if y.shape == f.shape[:1] and _labels(y, f.shape[1], module.ignore_index) and ops.all_finite([f]):
        return f.new_full((len(f), 1), 1 / len(f) if module.reduction == "mean" else 1.0)
    problem.loss(f)  # says what is wrong with shapes, labels or finiteness
    valid = (y != module.ignore_index).to(f.dtype)
    return (valid / valid.sum() if module.reduction == "mean" else valid).unsqueeze(1)


def _changed(module: nn.Module) -> bool:
    """Whether hooks, or a forward put in its place, may make it another function."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _labels(y: Tensor, classes: int, ignored: int) -> bool:
    """Whether all are classes, and none is one that is left out."""
    return not 0 <= ignored < classes and ops.all_rows(y, classes)


def _hvp(problem: Problem, f: Tensor) -> Callable[[Tensor], Tensor]:
    f = f.requires_grad_()
    loss = problem.loss(f)
    if not loss.requires_grad:
        raise ValueError("curvature: the loss does not depend on the model's output")
    wanted = [f, *problem.params.values()]
    gradient, *direct = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    penalised = [name for name, g in zip(problem.params, direct) if g is not None]
    if penalised:
        raise NotDescribedError(
            f"curvature: the loss depends on {', '.join(penalised[:4])} other than through the model's output (a "
            "weight penalty?), which Gauss-Newton does not see; leave that term out and add its own second derivative, "
            "or use method='hutchinson'"
        )
    if gradient is None:
        raise ValueError("curvature: the loss does not depend on the model's output")

    def product(r: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(f)
        try:
            (hr,) = torch.autograd.grad(gradient, f, r, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise NotDescribedError(f"curvature: the loss cannot be differentiated twice ({error})") from error
        return torch.zeros_like(f) if hr is None else hr.detach()

    return product


def _spread(f: Tensor) -> Tensor:
    """Return sizes from 1 to 2 of which no few have sums in common: fractions of squares' multiples of sqrt(2)."""
    count = torch.arange(1, f.numel() + 1, dtype=torch.float64)
    return (1 + (count.square() * 2**0.5).frac()).to(f).view(f.shape)


def _close(guess: Tensor, truth: Tensor, scale: Tensor | None = None) -> bool:
    # both come from a handful of operations on numbers of the same size; a wrong structure is off by order one.
    # Of a saturated softmax only rounding is left, at the size of its scale.
    eps = torch.finfo(truth.dtype).eps
    tolerance = 1000 * eps * truth.abs().max()
    if scale is not None:
        tolerance = tolerance + 256 * eps * scale.max()
    return bool((guess - truth).abs().max() <= tolerance)


def _softmax_product(f: Tensor, dim: int, scale: Tensor, r: Tensor) -> Tensor:
    p = f.detach().softmax(dim)
    return scale * p * (r - (p * r).sum(dim, keepdim=True))


def _softmax_scale(problem: Problem, f: Tensor, dim: int) -> Tensor | None:
    """Return each row's factor (1/N for a mean), read off at uniform logits where no row is saturated."""
    flat = torch.zeros_like(f)
    first = torch.zeros_like(f)
    first.select(dim, 0).fill_(1)
    try:
        product = _hvp(problem, flat)(first).select(dim, 0).unsqueeze(dim)
    except NotFiniteError:  # softmax's loss is finite there
        return None
    classes = f.shape[dim]
    scale = product * classes**2 / max(classes - 1, 1)
    return scale if bool(scale.any()) and bool((scale >= 0).all()) else None


def _softmax_root(f: Tensor, dim: int, scale: Tensor) -> Root:
    """Factor ``scale (diag p - p p^T)`` by Cholesky (:func:`ops.softmax_factor`)."""
    classes = f.shape[dim]

    def draw(signs: Tensor, rows: Tensor | None) -> Tensor:
        return ops.softmax_draw(f if rows is None else f[rows], scale if rows is None else scale[rows], signs, dim)

    def columns() -> Iterator[Tensor]:
        if f.dim() == 2:
            yield from ops.softmax_columns(f, scale)
            return
        here, below, p, order = ops.softmax_factor(f, scale, dim)
        for c in range(classes - 1):
            column = -p * below.narrow(dim, c, 1)
            column.narrow(dim, 0, c).zero_()
            column.narrow(dim, c, 1).copy_(here.narrow(dim, c, 1))
            yield from _one_position_each(torch.empty_like(p).scatter_(dim, order, column), dim)

    factors = max(1, (classes - 1) * (f[0].numel() // classes))  # of one class: one that is zero
    softmax = (f, scale) if f.dim() == 2 else None
    return Root(factors, lambda: ops.softmax_weight(f, scale, dim), draw, columns, softmax)


def _one_position_each(column: Tensor, dim: int) -> Iterator[Tensor]:
    """Split a column of several positions a sample: their outputs must not add up before they are squared."""
    rows = column.movedim(dim, -1).flatten(1, -2) if column.dim() > 2 else column.unsqueeze(1)
    if rows.shape[1] == 1:
        yield column
        return
    for i in range(rows.shape[1]):
        alone = torch.zeros_like(rows)
        alone[:, i] = rows[:, i]
        yield alone.view(column.movedim(dim, -1).shape).movedim(-1, dim)


def _diagonal_root(h: Tensor) -> Root:
    if not bool(h.any()):
        raise NotDescribedError(
            "curvature: the loss is linear in the model's output, so its Gauss-Newton matrix is zero; a model "
            "that ends in log_softmax wants cross_entropy on the logits instead, others method='hutchinson'"
        )
    if bool((h < 0).any()):
        raise _not_convex()
    q = h.sqrt()

    def columns() -> Iterator[Tensor]:
        for j in range(q[0].numel()):
            column = torch.zeros_like(q).view(len(q), -1)
            column[:, j] = q.reshape(len(q), -1)[:, j]
            yield column.view(q.shape)

    def draw(signs: Tensor, rows: Tensor | None) -> Tensor:
        return (q if rows is None else q[rows]) * signs

    return Root(q[0].numel(), lambda: h.flatten(1).sum(1), draw, columns)


def _block_root(f: Tensor, hvp: Callable[[Tensor], Tensor], r: Tensor, hr: Tensor) -> Root:
    rows, width = len(f), f[0].numel()
    if width > _MAX_BLOCK:
        raise NotDescribedError(
            f"curvature: the loss is neither cross-entropy nor elementwise and has {width} outputs a sample; "
            f"its second derivative is factored up to {_MAX_BLOCK} only"
        )
    block = f.new_empty(rows, width, width)
    for j in range(width):
        unit = torch.zeros(rows, width, dtype=f.dtype, device=f.device)
        unit[:, j] = 1
        block[:, :, j] = hvp(unit.view(f.shape)).reshape(rows, width)
    vectors = r.reshape(rows, width, 1)
    # where a row's terms nearly cancel, both are off by rounding of the terms' size
    size = (block.abs() @ vectors.abs()).max()
    if not _close((block @ vectors).view(f.shape), hr, size):
        raise NotDescribedError("curvature: the loss couples the samples of a batch; it is no sum over samples")
    values, axes = torch.linalg.eigh((block + block.mT) / 2)
    if bool((values < -1000 * torch.finfo(f.dtype).eps * values.abs().max()).any()):
        raise _not_convex()
    s = axes * values.clamp(min=0).sqrt()[:, None]

    def draw(signs: Tensor, rows: Tensor | None) -> Tensor:
        return ((s if rows is None else s[rows]) @ signs.reshape(-1, width, 1)).view(signs.shape)

    def columns() -> Iterator[Tensor]:
        return (s[:, :, j].reshape(f.shape) for j in range(width))

    return Root(width, lambda: s.square().sum((1, 2)), draw, columns)


def _not_convex() -> NotDescribedError:
    return NotDescribedError("curvature: the loss is not convex in the model's output; use method='hutchinson'")
