"""Rules of activations, pooling, normalisation and embeddings; the table of all rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoflip.curvature._product_rules import Convolution, Product
from autoflip.curvature._rules import (
    Add,
    Div,
    Expand,
    Mean,
    Mul,
    Rule,
    Shape,
    Sub,
    Sum,
    Tangents,
    Transpose,
    folded,
)

aten = torch.ops.aten


class Relu(Rule):
    def __init__(self, args: Sequence[Any], out: Any) -> None:
        self.y = out.detach()

    def kept(self) -> list[Tensor]:
        return [self.y]

    def tangent(self, t: Tangents) -> Tensor:
        return aten.threshold_backward(t[0], self.y.expand_as(t[0]), 0)

    def pull(self, d: Tensor, which: int) -> Tensor:
        return self.tangent([d])


class _Smooth(Rule):
    """An elementwise function by its two derivatives, which autograd finds once for all probes."""

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Rule | None:
        made = cls(args, out)
        made.call = lambda z: made.function(z, *args[1:], **kwargs)
        return made

    function: Any = None
    call: Any = None

    def __init__(self, args: Sequence[Any], out: Any) -> None:
        self.z = args[0]
        self.first: Tensor | None = None
        self.second: Tensor | None = None
        self.bent: Tensor | None = None

    def kept(self) -> list[Tensor]:
        return [self.z]

    def slopes(self) -> tuple[Tensor, Tensor | None]:
        if self.first is None:
            with torch.enable_grad():
                z = self.z.requires_grad_()
                (first,) = torch.autograd.grad(self.call(z).sum(), z, create_graph=True)
                second = torch.autograd.grad(first.sum(), z)[0] if first.requires_grad else None
            self.first, self.second, self.z = first.detach(), second, self.z.new_empty(0)
        return self.first, self.second

    def tangent(self, t: Tangents) -> Tensor:
        return t[0] * self.slopes()[0]

    def pull(self, d: Tensor, which: int) -> Tensor:
        return d * self.slopes()[0]

    def cross(self, d: Tensor, t: Tangents, which: int) -> Tensor | None:
        second = self.slopes()[1]
        if self.bent is None and second is not None:
            self.bent, self.second = second * d, second.new_empty(0)  # the primal gradient is always the same
        return None if self.bent is None else t[0] * self.bent


def _smooth(function: Any) -> type[_Smooth]:
    return type(f"_Smooth_{function}", (_Smooth,), {"function": staticmethod(function)})


class MaxPool(Rule):
    def __init__(self, args: Sequence[Any], out: Any) -> None:
        self.pool, self.y, self.at = [*args[1:]], out[0].detach(), out[1]
        self.source = args[0].shape
        defaults = [[], [0, 0], [1, 1], False]
        self.pool += defaults[len(self.pool) - 1 :]

    def tangent(self, t: Tangents) -> Tensor:
        at = self.at.flatten(-2).expand(len(t[0]), *(-1,) * (self.at.dim() - 1))
        return t[0].flatten(-2).gather(-1, at).view(len(t[0]), *self.at.shape)

    def pull(self, d: Tensor, which: int) -> Tensor:
        count, whole = len(d), folded(d)
        like = whole.new_empty(1).expand(count * self.source[0], *self.source[1:])
        at = self.at if count == 1 else self.at.repeat(count, *(1,) * (self.at.dim() - 1))
        return aten.max_pool2d_with_indices_backward(whole, like, *self.pool, at).view(count, *self.source)


class _AvgPool(Rule):
    def tangent(self, t: Tangents) -> Tensor:
        return aten.avg_pool2d(folded(t[0]), *self.args[1:]).view(len(t[0]), *self.shape)

    def pull(self, d: Tensor, which: int) -> Tensor:
        like = d.new_empty(1).expand(len(d) * self.source[0], *self.source[1:])
        defaults = [[], [0, 0], False, True, None]
        pool = [*self.args[1:], *defaults[len(self.args) - 2 :]]
        return aten.avg_pool2d_backward(folded(d), like, *pool).view(len(d), *self.source)


class _Normalise(Rule):
    """Batch normalisation by running statistics: ``y = (x - m) / s * w + b``."""

    @staticmethod
    def operands(args: Sequence[Any]) -> Sequence[Any]:
        return args[:3]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Rule | None:
        if kwargs or args[3] is None or (len(args) == 8 and args[5]):
            return None
        return cls(args, out)

    def __init__(self, args: Sequence[Any], out: Any) -> None:
        x, weight, _, mean, var = args[:5]
        self.side = (-1, *(1,) * (x.dim() - 2))
        self.inverse = (var + args[-1]).rsqrt()
        self.weight = torch.ones_like(var) if weight is None else weight
        self.x, self.mean = x, mean

    def kept(self) -> list[Tensor]:
        return [self.x]

    def _normal(self) -> Tensor:
        return (self.x - self.mean.view(self.side)) * self.inverse.view(self.side)

    def tangent(self, t: Tangents) -> Tensor:
        parts = [] if t[0] is None else [t[0] * (self.inverse * self.weight).view(self.side)]
        parts += [] if t[1] is None else [self._normal() * self._wide(t[1])]
        total = parts[0] + parts[1] if len(parts) == 2 else parts[0] if parts else torch.zeros_like(self.x)[None]
        return total if t[2] is None else total + self._wide(t[2])

    def pull(self, d: Tensor, which: int) -> Tensor:
        if which == 0:
            return d * (self.inverse * self.weight).view(self.side)
        return self._by_channel(d * self._normal() if which == 1 else d)

    def cross(self, d: Tensor, t: Tangents, which: int) -> Tensor | None:
        if which == 0 and t[1] is not None:
            return d * self._wide(t[1] * self.inverse)
        if which == 1 and t[0] is not None:
            return self._by_channel(t[0] * d) * self.inverse
        return None

    def _wide(self, t: Tensor) -> Tensor:
        return t.view(len(t), 1, *self.side)

    def _by_channel(self, d: Tensor) -> Tensor:
        return d.sum([1, *range(3, d.dim())])


class _Embedding(Rule):
    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Rule | None:
        return None if kwargs or any(args[3:]) else cls(args, out)

    def __init__(self, args: Sequence[Any], out: Any) -> None:
        self.rows, self.at, self.padding = len(args[0]), args[1], args[2] if len(args) > 2 else -1

    def tangent(self, t: Tangents) -> Tensor:
        read = t[0][:, self.at]
        return read if self.padding < 0 else read * (self.at != self.padding).unsqueeze(-1)

    def pull(self, d: Tensor, which: int) -> Tensor:
        total = d.new_zeros(len(d), self.rows, d.shape[-1])
        total.index_add_(1, self.at.flatten(), d.flatten(1, -2))
        if self.padding >= 0:
            total[:, self.padding] = 0
        return total


_SMOOTH = "gelu tanh sigmoid silu elu softplus mish exp leaky_relu hardtanh hardswish hardsigmoid celu abs neg square"
RULES: dict[str, type[Rule]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "clone"), Shape),
    "expand": Expand,
    **dict.fromkeys(("t", "transpose", "permute"), Transpose),
    **{name: _smooth(getattr(aten, name)) for name in _SMOOTH.split()},
    **{"add": Add, "sub": Sub, "mul": Mul, "div": Div, "relu": Relu, "sum": Sum, "mean": Mean},
    **{"max_pool2d_with_indices": MaxPool, "avg_pool2d": _AvgPool, "embedding": _Embedding},
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm"),
        _Normalise,
    ),
    **{"addmm": Product, "mm": Product, "convolution": Convolution},
}
