"""Rules of products with weights: dense and convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoflip.curvature._rules import Rule, Tangents, folded, narrowed, widened

aten = torch.ops.aten


class Product(Rule):
    """``y = x @ w + b``; operands are x, w, b."""

    @staticmethod
    def operands(args: Sequence[Any]) -> Sequence[Any]:
        return [args[1], args[2], args[0]] if len(args) == 3 else args[:2]

    def __init__(self, args: Sequence[Any], out: Any) -> None:
        self.x, self.w, *bias = self.operands(args)
        self.bias = bias[0].shape if bias else torch.Size()

    def kept(self) -> list[Tensor]:
        return [self.x, self.w]

    def by_own(self, v: Tensor, b: Tensor | None = None) -> Tensor:
        """Return ``x @ v + b``: what the product's own parameters move."""
        if b is None:
            return self.x.expand(len(v), -1, -1) @ v
        return torch.baddbmm(widened(b, 2), self.x.expand(len(v), -1, -1), v)

    def tangent(self, t: Tangents, own: Tensor | None = None) -> Tensor:
        x, w, b = (*t, None)[:3]
        if own is None and w is not None:
            own = self.by_own(w, b)
        elif own is None and b is not None:
            own = widened(b, 2).expand(len(b), len(self.x), self.w.shape[1])
        if x is None:
            assert own is not None
            return own
        y = (folded(x) @ self.w).view(len(x), *x.shape[1:-1], -1)
        return y if own is None else y.add_(own)

    def pull(self, d: Tensor, which: int) -> Tensor:
        if which == 0:
            return (folded(d) @ self.w.T).view(len(d), *self.x.shape)
        if which == 1:
            return self.x.T.expand(len(d), -1, -1) @ d
        return narrowed(d, self.bias)

    def cross(self, d: Tensor, t: Tangents, which: int) -> Tensor | None:
        other = None if which == 2 else t[1 - which]
        if other is None:
            return None
        whole = d.expand(len(other), -1, -1)
        return whole @ other.mT if which == 0 else other.mT @ whole


class Convolution(Product):
    """``y = conv(x, w) + b``; operands are x, w, b."""

    @staticmethod
    def operands(args: Sequence[Any]) -> Sequence[Any]:
        return args[:3]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Rule | None:
        return None if kwargs or args[6] else cls(args, out)

    def __init__(self, args: Sequence[Any], out: Any) -> None:
        self.x, self.w, b = args[:3]
        self.shape = out.shape
        self.stride, self.padding, self.dilation, _, self.zeros, self.groups = args[3:9]

    def _run(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return aten.convolution(x, w, b, self.stride, self.padding, self.dilation, False, self.zeros, self.groups)

    def _back(self, d: Tensor, x: Tensor, w: Tensor, which: int) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, False, self.zeros, self.groups
        return aten.convolution_backward(d, x, w, None, *geometry, [which == 0, which == 1, False])[which]

    def by_own(self, v: Tensor, b: Tensor | None = None) -> Tensor:
        """Return ``conv(x, v) + b``: the probes' filters side by side read the input once."""
        if self.groups > 1:
            own = torch.stack([self._run(self.x, one) for one in v])
            return own if b is None else own.add_(self._wide(b))
        y = self._run(self.x, v.flatten(0, 1), None if b is None else b.flatten())
        return y.unflatten(1, (len(v), -1)).transpose(0, 1)

    def _wide(self, b: Tensor) -> Tensor:
        return b.view(len(b), 1, -1, *(1,) * (self.x.dim() - 2))

    def tangent(self, t: Tangents, own: Tensor | None = None) -> Tensor:
        x, w, b = t
        if own is None and w is not None:
            own = self.by_own(w, b)
        elif own is None and b is not None:
            own = self._wide(b).expand(len(b), *self.shape)
        if x is None:
            assert own is not None
            return own
        y = self._run(folded(x), self.w).unflatten(0, x.shape[:2])
        return y if own is None else y.add_(own)

    def pull(self, d: Tensor, which: int) -> Tensor:
        if which == 0:
            like = d.new_empty(1).expand(len(d) * len(self.x), *self.x.shape[1:])
            return self._back(folded(d), like, self.w, 0).view(len(d), *self.x.shape)
        if which == 1:
            return torch.stack([self._back(one, self.x, self.w, 1) for one in d])
        return d.sum([1, *range(3, d.dim())])

    def cross(self, d: Tensor, t: Tangents, which: int) -> Tensor | None:
        other = None if which == 2 else t[1 - which]
        if other is None:
            return None
        if which == 1:
            return torch.stack([self._back(d, one, self.w, 1) for one in other])
        if self.groups > 1:
            return torch.stack([self._back(d, self.x, one, 0) for one in other])
        count, (n, c, *size) = len(other), self.x.shape
        like = d.new_empty(1).expand(n, count * c, *size)
        back = self._back(d, like, other.transpose(0, 1).flatten(1, 2), 0)
        return back.unflatten(1, (count, c)).transpose(0, 1)
