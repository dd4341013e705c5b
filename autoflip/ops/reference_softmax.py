"""What softmax.py computes, written as its formulas say; any floating dtype, any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from autoflip.ops.reference import dense_pull_back


def softmax_factor(f: Tensor, scale: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See softmax.softmax_factor."""
    p, order, after, tail = _sorted_softmax(f, dim)
    tiny = torch.finfo(p.dtype).tiny
    size = scale.sqrt()
    here = size * (p * after / tail.clamp(min=tiny)).sqrt()
    return here, size * (p / (tail * after).clamp(min=tiny)).sqrt(), p, order


def softmax_columns(f: Tensor, scale: Tensor) -> Tensor:
    """``S``'s columns but the last."""
    here, below, p, order = softmax_factor(f, scale, 1)
    lower = (p.unsqueeze(1) * -below.unsqueeze(2)).triu_(1)  # (N, column, class)
    lower.diagonal(dim1=1, dim2=2).copy_(here)
    at = order.unsqueeze(1).expand_as(lower)
    return torch.empty_like(lower).scatter_(2, at, lower).transpose(0, 1)[: f.shape[1] - 1]


def softmax_draw(f: Tensor, scale: Tensor, signs: Tensor, dim: int) -> Tensor:
    """``S signs``; what the columns before an entry add to it is their sum so far."""
    here, below, p, order = softmax_factor(f, scale, dim)
    classes = f.shape[dim]
    s, before = here * signs, (below * signs).narrow(dim, 0, classes - 1).cumsum(dim)
    s.narrow(dim, 1, classes - 1).addcmul_(p.narrow(dim, 1, classes - 1), before, value=-1)
    return torch.empty_like(s).scatter_(dim, order, s)


def softmax_pull_back(
    f: Tensor,
    scale: Tensor,
    last: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    before: Tensor | None,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of a class and those before it, pulled through one layer after the other."""
    p = f.detach().softmax(1)
    total = p.cumsum(1)
    here, past = total[:, 1:], total[:, :-1].clamp(min=torch.finfo(p.dtype).tiny)
    own = (scale * p[:, 1:] * past / here).sqrt()
    lower = (p.unsqueeze(1) * -(own / past).unsqueeze(2)).tril(0)  # (N, column, class)
    lower.diagonal(1, 1, 2).copy_(own)
    columns = lower.transpose(0, 1).contiguous()
    hidden = dense_pull_back(columns, last, gate)
    pulled = dense_pull_back(hidden, weight, before, squared)
    return columns.square().sum(0), hidden.square().sum(0), pulled


def softmax_weight(f: Tensor, scale: Tensor, dim: int) -> Tensor:
    """``scale (1 - sum p^2)``, which would cancel: as ``2 sum_i<j p_i p_j``."""
    p, _, after, _ = _sorted_softmax(f, dim)
    return (2 * scale * p * after).flatten(1).sum(1)


def _sorted_softmax(f: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return p, largest first, its order, and what comes after each class without and with itself."""
    p, order = f.detach().softmax(dim).sort(dim, descending=True)
    tail = p.flip(dim).cumsum(dim).flip(dim)  # sums of small numbers first: 1 - cumsum would cancel
    after = torch.cat([tail.narrow(dim, 1, f.shape[dim] - 1), torch.zeros_like(p.narrow(dim, 0, 1))], dim)
    return p, order, after, tail


def deal_rows(weight: Tensor, budget: float, most: int, chance: float) -> tuple[Tensor, ...]:
    """See softmax.deal_rows."""
    w = weight.numpy()
    order = np.argsort(-w, kind="stable")
    due = np.minimum(w[order] * (budget / w.sum()), most)
    light = due < 1
    place = np.floor(np.cumsum(due * light) + chance)  # a row for every whole number that is passed
    passed = np.diff(place, prepend=0.0)
    count = np.where(light, passed, np.exp2(np.floor(np.log2(np.maximum(due, 1))))).astype(np.int64)
    scale = np.where(light, np.maximum(due, np.finfo(w.dtype).tiny), np.maximum(count, 1)) ** -0.5
    ends = np.cumsum(count)
    turns = np.arange(ends[-1]) - np.repeat(ends - count, count)
    parts = np.repeat(order, count), turns, np.repeat(scale, count)
    return tuple(torch.from_numpy(part) for part in parts)
