"""One run of one layer, as curvature looks at it: what it read, where its output stands, and its squares so far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


class Layer(ABC):
    """One run of one layer: what it read, where its output stands in the graph, and its squares so far.

    Attributes:
        chunk: factors that are held before they are squared together.
        coarse: an estimate's squares are wanted, whose own error is far above bfloat16's.
        receives: takes gradients from another layer, shaped like its output.

    Args:
        module: the layer.
        x: what it read.
        y: what it wrote.
    """

    chunk = 5  # nine of ten classes are squared in two goes, of as many rows as registers hold
    coarse = False
    receives = False

    def __init__(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        self.module, self.x, self.version = module, x.detach(), x._version
        self.edge = get_gradient_edge(y)  # taken now: an in-place ReLU would move y to another node
        self.shape = y.shape
        self.before: Any = None  # gets its gradient from this layer, not from autograd
        self.run: Any = None  # of a recurrent layer: told when nobody needs its weight's whole gradient
        self.waiting: list[Tensor] = []
        self.segments = [slice(None)]  # samples that are summed by themselves: one client's each
        self.sums: dict[tuple[int, str], Tensor] = {}
        # the layer's own trainable parameters by their short names
        self.params = {k: p for k, p in module._parameters.items() if p is not None and p.requires_grad}

    def seen_through(self, readers: Mapping[Any, Sequence[Any]]) -> None:
        """Move to a later place in the graph, where the gradient is smaller, if there is one."""
        del readers

    def follow(self, others: Sequence[Layer], readers: Mapping[Any, Sequence[Any]]) -> None:
        """Find the layer that this one can hand gradients to by itself, if there is one; after ``seen_through``."""
        del others, readers

    def input(self) -> Tensor:
        """Return what the layer read.

        Raises:
            ValueError: it was changed in place meanwhile.
        """
        if self.x._version != self.version:
            raise ValueError(
                f"curvature: the input of {type(self.module).__name__} was changed in place after the layer read "
                "it; use the out-of-place operation there"
            )
        return self.x

    def add(self, d: Tensor) -> None:
        """Take in one factor's gradient at the layer's output."""
        self.waiting.append(self.alike(d))
        if len(self.waiting) >= self.chunk:
            self.flush()

    def alike(self, d: Tensor) -> Tensor:
        """Return a gradient in the type of what the layer read: autocast inside a model has the two apart."""
        return d.to(self.x.dtype) if d.dtype != self.x.dtype and self.x.is_floating_point() else d

    def flush(self) -> None:
        """Square what waits and add it up."""
        if not self.waiting:
            return
        for i, rows in enumerate(self.segments):
            d = [self.cut(one, rows) for one in self.waiting]
            for name, value in self.squares(d, self.cut(self.input(), rows), rows).items():
                self.sums[i, name] = self.sums[i, name] + value if (i, name) in self.sums else value
        self.waiting.clear()

    def cut(self, tensor: Tensor, rows: slice) -> Tensor:
        """Return some samples' part of an input or output."""
        return tensor if rows.stop is None else tensor[rows]

    def take(self) -> Iterator[tuple[int, str, Tensor]]:
        """Yield (segment, parameter name, sums shaped like the parameter), and begin anew."""
        self.flush()
        sums, self.sums = self.sums, {}
        for (i, name), value in sums.items():
            if name in self.params:
                yield i, name, value.reshape(self.params[name].shape)

    @property
    def written(self) -> torch.Size:
        """Shape of one sample's gradient that the layer takes in."""
        return self.shape[1:]

    @property
    def dense(self) -> bool:
        """Whether each factor costs as much as the layer's forward pass, positions without gradient included."""
        return self.x.dim() > 2

    @property
    def work(self) -> int:
        """Multiply-adds of the layer's forward pass: values written times weights behind one."""
        weight = next((p for name, p in self.params.items() if p.dim() > 1), None)
        return 0 if weight is None else self.shape.numel() * weight[0].numel()

    @abstractmethod
    def squares(self, d: Sequence[Tensor], x: Tensor, rows: slice) -> dict[str, Tensor]:
        """Return sums of squared gradients over factors and samples, by parameter name.

        Args:
            d: each factor's gradient at the output.
            x: the input.
            rows: which of all samples these are of.
        """


def squares_of(d: Sequence[Tensor], reduced: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum the squares of what each factor leaves ``(N, ...)``, over factors and samples."""
    total = reduced(d[0]).square()
    for one in d[1:]:
        part = reduced(one)
        total.addcmul_(part, part)
    return total.sum(0)
