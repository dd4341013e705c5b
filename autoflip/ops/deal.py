"""Draws dealt to the samples of a batch by their weights: the rows that are looked at, and what a draw makes of them.

Nothing here is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autoflip.ops import backend
from autoflip.ops import reference_softmax as reference
from autoflip.ops.signs import flips, rademacher
from autoflip.ops.softmax import check_scale, rows_kernels, softmax_draw, softmax_weight

__all__ = ["deal_draw", "deal_rows", "effective", "softmax_deal"]


def effective(weight: Tensor) -> float:
    """Return how many samples would carry the weight if all carried alike: ``(sum h)^2 / sum h^2``."""
    total = float(weight.sum())
    return total * total / float(weight.dot(weight)) if total > 0 else 0.0


def deal_rows(weight: Tensor, budget: float, most: int, chance: float) -> tuple[Tensor, ...]:
    """Deal about ``budget`` rows to samples by their weights, most to the heaviest.

    A sample is due ``m = min(budget weight / sum, most)`` rows: from one on it gets k, the power of two below, else one
    with the chance m (systematic sampling, Madow 1949, begun at ``chance``).

    Args:
        weight: ``(N,)``, float64 on the CPU, no entry below 0, some above.
        budget: rows.
        most: of one sample, a power of two.
        chance: in [0, 1).

    Returns:
        ``(samples, turns, scale)``: of each row its sample, which of its sample's rows it is, and ``k^-1/2`` or
        ``m^-1/2``. int64 but for scale, float64; a sample's rows are next to each other.

    Raises:
        ValueError: weight is of another dtype, device or shape.
    """
    if weight.dtype != torch.float64 or weight.device.type != "cpu" or weight.dim() != 1:
        raise ValueError(
            f"deal_rows: weight is {weight.dtype} {tuple(weight.shape)} on {weight.device}; wanted torch.float64 (N,) "
            "on the CPU"
        )
    kernels = backend.extension("_C")[0] if backend.serve("softmax_draw", weight.device) == "cpp" else None
    if kernels is None:
        return reference.deal_rows(weight, budget, most, chance)
    weight = weight.contiguous()
    kinds = torch.int64, torch.int64, torch.float64
    parts = tuple(torch.empty(len(weight) * most, dtype=kind) for kind in kinds)
    out = [part.data_ptr() for part in parts]
    count = kernels.deal_rows(weight.data_ptr(), len(weight), budget, most, chance, *out)
    return tuple(part[:count] for part in parts)


def deal_draw(
    weight: Tensor,
    draw: Callable[[Tensor, Tensor], Tensor],
    signs: Tensor,
    budget: float,
    most: int,
    alike: float,
    chance: float,
) -> tuple[Tensor, Tensor] | None:
    """Deal rows (:func:`deal_rows`) and draw each: its sample's signs, orthogonal to those of the sample's other rows.

    Args:
        weight: ``(N,)``, no entry below 0.
        draw: (signs of some rows, the sample of each) -> what the draw makes of them.
        signs: ``(N, width)``, one draw of every sample.
        budget: rows.
        most: of one sample, a power of two.
        alike: share of the samples; None is returned where more than that carry the weight, or nothing is dealt.
        chance: in [0, 1).

    Returns:
        ``(samples, v)``: int64 ``(M,)``, and ``(M, width)``, weighted so that ``sum v v^T`` over a sample's rows is on
        average what one draw of it gives.
    """
    h = weight.detach().double().cpu()
    if not 0 < effective(h) <= alike * len(h):
        return None
    samples, turns, scale = (part.to(signs.device) for part in deal_rows(h, budget, most, chance))
    if not len(samples):
        return None
    signs = signs[samples]
    if (turned := int(turns.max()) + 1) > 1:
        signs *= flips(1 << (turned - 1).bit_length(), signs.shape[1]).to(signs)[turns]
    v = draw(signs, samples)
    return samples, v.mul_(scale.to(v).unsqueeze(1))


def softmax_deal(
    f: Tensor, scale: Tensor, seed: int, budget: float, most: int, alike: float, chance: float
) -> tuple[Tensor, Tensor] | None:
    """Do :func:`deal_draw` for :func:`softmax_factor`'s S, row by row: by its trace, with signs of the stream 0.

    Args:
        f: logits, ``(N, classes)``, floating.
        scale: ``(N, 1)``, no entry below 0.
        seed: of the signs, taken modulo 2**64.
        budget: see deal_draw, like the other three.
        most: of one sample.
        alike: share of the samples.
        chance: in [0, 1).

    Returns:
        See deal_draw; v is ``(M, classes)``, like ``f``, classes in its order.

    Raises:
        ValueError: shapes do not fit.
    """
    check_scale("softmax_deal", f, scale, 1)
    if (kernels := rows_kernels(f)) is None:

        def draw(signs: Tensor, rows: Tensor) -> Tensor:
            return softmax_draw(f[rows], scale[rows], signs)

        signs = rademacher(seed, 0, tuple(f.shape), dtype=f.dtype, device=f.device)
        return deal_draw(softmax_weight(f, scale), draw, signs, budget, most, alike, chance)
    f, scale = f.detach().contiguous(), scale.to(f).contiguous()
    rows = int(budget) + len(f)  # from one on, dues are rounded down; of the others at most one each
    samples, v = torch.empty(rows, dtype=torch.int64), f.new_empty(rows, f.shape[1])
    count = kernels.softmax_deal(
        f.data_ptr(), scale.data_ptr(), seed % (1 << 64), *f.shape, budget, most, alike, chance,
        samples.data_ptr(), v.data_ptr(),
    )  # fmt: skip
    return (samples[:count], v[:count]) if count else None
