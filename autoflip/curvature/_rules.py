"""How tangents and gradients pass an operation, many probes at once: the rules of the batched R-operator.

Every tangent ``t`` and every gradient ``d`` has an axis of probes in front. With ``J`` an operation's derivative in
one operand: ``tangent`` adds up ``J t`` over operands, ``pull`` is ``J^T d``, and ``cross`` is ``(R J)^T d``, what the
tangents change in ``J``; it is None where ``J`` does not depend on what moves. Primal values are held once, whatever
the number of probes.

Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Tangents = Sequence[Any]  # a tensor, or None for what does not move


def folded(t: Tensor) -> Tensor:
    """Lay probes and samples on one axis."""
    return t.flatten(0, 1)


class Rule:
    """One operation that ran."""

    @property
    def crosses(self) -> bool:
        """Whether its derivative depends on what moves."""
        return type(self).cross is not Rule.cross

    @staticmethod
    def operands(args: Sequence[Any]) -> Sequence[Any]:
        """Return those arguments that may move."""
        return args[:1]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Rule | None:
        """Look at a call; None when it is a variant that the rule does not know."""
        return cls(args, out) if not kwargs else None

    def __init__(self, args: Sequence[Any], out: Any) -> None:
        self.args, self.shape, self.source = list(args), out.shape, args[0].shape
        self.args[0] = None  # linear operations need shapes only

    def kept(self) -> list[Tensor]:
        """Return the primal tensors that it will read."""
        return []

    def tangent(self, t: Tangents) -> Tensor:
        """Push the operands' tangents forward."""
        raise NotImplementedError

    def pull(self, d: Tensor, which: int) -> Tensor:
        """Pull a gradient at the output back to an operand."""
        raise NotImplementedError

    def cross(self, d: Tensor, t: Tangents, which: int) -> Tensor | None:
        """Pull the primal gradient (no axis of probes) back through what the tangents change."""
        return None


class Shape(Rule):
    def tangent(self, t: Tangents) -> Tensor:
        return t[0].reshape(len(t[0]), *self.shape)

    def pull(self, d: Tensor, which: int) -> Tensor:
        return d.reshape(len(d), *self.source)


class Expand(Shape):
    def tangent(self, t: Tangents) -> Tensor:
        return widened(t[0], len(self.shape)).expand(len(t[0]), *self.shape)

    def pull(self, d: Tensor, which: int) -> Tensor:
        return narrowed(d, self.source)


class Transpose(Rule):
    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Rule | None:
        dims = args[0].dim()
        order = list(range(dims))
        if len(args) == 1:
            order.reverse()
        elif len(args) == 2:
            order = [i % dims for i in args[1]]
        else:
            a, b = (i % dims for i in args[1:3])
            order[a], order[b] = b, a
        made = cls(args, out)
        made.args = [[0, *(i + 1 for i in order)]]
        return made

    def tangent(self, t: Tangents) -> Tensor:
        return t[0].permute(self.args[0])

    def pull(self, d: Tensor, which: int) -> Tensor:
        back = [0] * len(self.args[0])
        for i, j in enumerate(self.args[0]):
            back[j] = i
        return d.permute(back)


class Sum(Rule):
    """Sums and means over axes."""

    axes: list[int]
    kept_shape: list[int]
    scale = 1.0

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Rule | None:
        if kwargs or len(args) < 2 or not args[1]:
            return None
        made = cls(args, out)
        axes = [i % len(made.source) for i in args[1]]
        made.axes = [i + 1 for i in axes]
        made.kept_shape = [1 if i in axes else n for i, n in enumerate(made.source)]
        if cls is Mean:
            made.scale = out.numel() / args[0].numel()
        return made

    def tangent(self, t: Tangents) -> Tensor:
        return t[0].sum(self.axes).mul_(self.scale).view(len(t[0]), *self.shape)

    def pull(self, d: Tensor, which: int) -> Tensor:
        return (d * self.scale).reshape(len(d), *self.kept_shape).expand(len(d), *self.source)


class Mean(Sum):
    pass


class Add(Rule):
    sign = 1.0

    @staticmethod
    def operands(args: Sequence[Any]) -> Sequence[Any]:
        return args[:2]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Rule | None:
        return None if kwargs else cls(args[:2], out)

    def __init__(self, args: Sequence[Any], out: Any) -> None:
        self.shape = out.shape
        self.sources = [a.shape if isinstance(a, Tensor) else torch.Size() for a in args]

    def tangent(self, t: Tangents) -> Tensor:
        parts = [one if i == 0 else one * self.sign for i, one in enumerate(t) if one is not None]
        wide = [widened(one, len(self.shape)).expand(len(one), *self.shape) for one in parts]
        return wide[0] + wide[1] if len(wide) == 2 else wide[0]

    def pull(self, d: Tensor, which: int) -> Tensor:
        d = narrowed(d, self.sources[which])
        return d * self.sign if which else d


class Sub(Add):
    sign = -1.0


class Mul(Rule):
    @staticmethod
    def operands(args: Sequence[Any]) -> Sequence[Any]:
        return args[:2]

    def __init__(self, args: Sequence[Any], out: Any) -> None:
        self.args, self.shape = list(args[:2]), out.shape

    def kept(self) -> list[Tensor]:
        return [a for a in self.args if isinstance(a, Tensor)]

    def tangent(self, t: Tangents) -> Tensor:
        parts = [widened(one, len(self.shape)) * self.args[1 - i] for i, one in enumerate(t) if one is not None]
        return parts[0] + parts[1] if len(parts) == 2 else parts[0]

    def pull(self, d: Tensor, which: int) -> Tensor:
        return narrowed(d * self.args[1 - which], self.args[which].shape)

    def cross(self, d: Tensor, t: Tangents, which: int) -> Tensor | None:
        other = t[1 - which] if len(t) == 2 else None
        return None if other is None else narrowed(d * widened(other, len(self.shape)), self.args[which].shape)


class Div(Mul):
    """By what does not move: a product with the reciprocal."""

    @staticmethod
    def operands(args: Sequence[Any]) -> Sequence[Any]:
        return args[:1]

    def __init__(self, args: Sequence[Any], out: Any) -> None:
        super().__init__([args[0], 1 / args[1]], out)


def widened(t: Tensor, dims: int) -> Tensor:
    """Add axes behind that of probes until the rest has ``dims``, as broadcasting would."""
    return t.view(len(t), *(1,) * (dims + 1 - t.dim()), *t.shape[1:]) if t.dim() <= dims else t


def narrowed(d: Tensor, shape: torch.Size) -> Tensor:
    """Sum what was broadcast from ``shape``."""
    return (
        d
        if d.shape[1:] == shape
        else d.sum_to_size(len(d), *(1,) * (d.dim() - 1 - len(shape)), *shape).view(len(d), *shape)
    )


# operations that only change how a tensor is laid out; a parameter behind them is still that parameter
SHAPES = frozenset(("view", "_unsafe_view", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "clone"))
