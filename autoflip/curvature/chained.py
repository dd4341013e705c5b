"""Layers that hand their gradients on without autograd: Linear and convolutions, with what stands between them.

From one layer to the one before it a gradient passes reshapes, ReLU and max-pooling only, in the classic nets. All
factors that wait go there in one product, which reads the weight once and skips what ReLU has set to zero; and a chain
from the loss to the first layer can go on with some of the samples alone. Through the last two dense layers all columns
of softmax's factor go at once, where samples share what they have in common (:func:`ops.softmax_pull_back`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from autoflip import ops
from autoflip.curvature.deal import Rows
from autoflip.curvature.layer import Layer, squares_of

_RESHAPES = ("View", "UnsafeView", "ReshapeAlias")


class Chained(Layer):
    """A layer that finds who wrote what it read."""

    before: Chained | None
    gate: Tensor | None = None  # what ReLU left of the output of the layer before, shaped like this one's input

    @property
    def first(self) -> bool:
        """Whether it wants only the sum of the squares of what it is given."""
        return False

    def only(self, rows: Rows) -> None:
        """See these rows as the batch from here on."""
        self.x = self.input()[rows.samples]
        self.version = self.x._version
        self.gate = None if self.gate is None else self.gate[rows.samples]

    def receive(self, d: Tensor) -> None:
        """Take in a gradient that went through this layer's gate already."""
        self.add(d)

    def all_of_softmax(self, f: Tensor, scale: Tensor) -> bool:
        """Take in all columns of a softmax factor at this layer's output, where that is cheaper than one by one."""
        del f, scale
        return False

    def _find(self, node: Any, others: Sequence[Layer], readers: Mapping[Any, Sequence[Any]]) -> None:
        """Walk from what was read back to the layer that wrote it, past reshapes and one ReLU."""
        homes = {other.edge.node: other for other in others if isinstance(other, Chained)}
        gate = None
        while node is not None and len(readers.get(node, ())) == 1:
            if node in homes:
                self.before, self.gate = homes[node], gate
                return
            kind = node.name().partition("Backward")[0]
            if kind == "Relu" and gate is None:
                gate = node._saved_result.detach()
                gate = gate if gate.shape == self.x.shape else gate.reshape(self.x.shape)
            elif kind not in _RESHAPES:
                return
            node = node.next_functions[0][0]


class Linear(Chained):
    """``y = x W^T + b``; on sequences, too."""

    chunk = 10  # small, and the weight is read once for all of them
    squared: Tensor | None = None  # (N, O): all factors share the input's square, so theirs are added up first
    weight: Tensor  # that ran: a masked layer's is not its parameter
    samples: Tensor | None = None  # rows of x that the gradients' rows are of

    def only(self, rows: Rows) -> None:
        """See these rows as the batch from here on."""
        if self.x.dim() > 2:
            super().only(rows)
            return
        self.samples = rows.samples

    def follow(self, others: Sequence[Layer], readers: Mapping[Any, Sequence[Any]]) -> None:
        """Find who wrote what the product read."""
        node: Any = self.edge.node
        kind = node.name()
        if self.x.dim() != 2 or kind not in ("AddmmBackward0", "MmBackward0"):
            return
        self._find(node.next_functions[1 if kind.startswith("Addmm") else 0][0], others, readers)
        if self.before is not None:
            self.weight = node._saved_mat2.detach().T
        if self.gate is None and isinstance(self.before, Conv) and self.before.kept is not None:
            self.gate = self.x  # zero where kept is

    def flush(self) -> None:
        """Add up squares; hand what waits on."""
        if self.x.dim() > 2:
            super().flush()
            return
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        total = ops.factor_squares(waiting)
        self.squared = total if self.squared is None else self.squared.add_(total)
        if self.before is not None:
            first = self.before.first
            pulled = ops.dense_pull_back(
                waiting, self.weight, self.gate, squared=first, samples=self.samples, coarse=self.coarse
            )
            self._hand_on(pulled, first)

    def all_of_softmax(self, f: Tensor, scale: Tensor) -> bool:
        """See Chained; the layer before does the work for this one."""
        before = self.before
        if not isinstance(before, Linear) or before.before is None or self.weight.dtype != f.dtype:
            return False
        first = before.before.first
        if not first and self.chunk < f.shape[1] - 1:
            return False
        self.squared, before.squared, pulled = ops.softmax_pull_back(
            f, scale, self.weight, self.gate, before.weight, before.gate, squared=first
        )
        before._hand_on(pulled, first)
        return True

    @property
    def first(self) -> bool:
        """See Chained."""
        return self.before is None and self.x.dim() == 2

    def _hand_on(self, pulled: Tensor, squared: bool) -> None:
        before = self.before
        assert before is not None
        if squared:
            assert isinstance(before, Linear)
            pulled = before.alike(pulled)
            before.squared = pulled if before.squared is None else before.squared.add_(pulled)
            return
        for d in pulled:
            before.receive(d.view(len(d), *before.written))

    def take(self) -> Iterator[tuple[int, str, Tensor]]:
        """Yield as every layer does; one product serves all factors."""
        self.flush()
        squared, self.squared = self.squared, None
        if squared is None:
            yield from super().take()
            return
        x = self.input()
        for i, rows in enumerate(self.segments):
            d, read = self.cut(squared, rows), self.cut(x, rows)
            if "weight" in self.params:
                product = ops.squared_matmul(d, read, squared=True, samples=self.samples, coarse=self.coarse)
                yield i, "weight", product
            if "bias" in self.params:
                yield i, "bias", d.sum(0)

    def squares(self, d: Sequence[Tensor], x: Tensor, rows: slice) -> dict[str, Tensor]:
        """Return those of a sequence."""
        d = [one.flatten(1, -2).transpose(1, 2) for one in d]  # (N, O, P)
        return {"weight": ops.sequence_squares(d, x.flatten(1, -2)), "bias": squares_of(d, lambda g: g.sum(2))}


class Conv(Chained):
    """Convolutions in one and two dimensions; behind max-pooling with one value a window."""

    at: Tensor | None = None
    kept: Tensor | None = None  # 1 where ReLU, standing before the pooling, left a value
    node: Any = None  # of the convolution itself

    def seen_through(self, readers: Mapping[Any, Sequence[Any]]) -> None:
        """Look at the gradient behind ReLU and max-pooling: one value a window instead of zeros with one value."""
        gate = None
        later = readers.get(self.edge.node, ())
        if len(later) == 1 and later[0].name().startswith("ReluBackward"):
            gate, later = later[0], readers.get(later[0], ())
        if len(later) != 1 or not later[0].name().startswith("MaxPool2DWithIndices") or len(self.shape) != 4:
            return
        at: Tensor = later[0]._saved_result1
        self.at, self.node = at, self.edge.node
        self.edge = GradientEdge(later[0], 0)
        if gate is not None:
            kept = gate._saved_result.flatten(2).gather(2, at.flatten(2)).view(at.shape)
            self.kept = kept.detach().gt_(0)  # in the gradient's dtype: a product with a bool converts it every time

    def follow(self, others: Sequence[Layer], readers: Mapping[Any, Sequence[Any]]) -> None:
        """Find the convolution that wrote what this one read; only few values are worth handing on by ourselves."""
        if self.at is None or isinstance(self.module.padding, str) or not self.node.name().startswith("Convolution"):
            return
        self._find(self.node.next_functions[0][0], others, readers)
        if self.gate is not None:
            self.gate = (self.gate > 0).to(self.x.dtype)
        elif isinstance(self.before, Conv):
            self.gate = self.before.kept

    def only(self, rows: Rows) -> None:
        """See these rows as the batch from here on."""
        super().only(rows)
        self.at = None if self.at is None else self.at[rows.samples]
        self.kept = None if self.kept is None else self.kept[rows.samples]

    @property
    def dense(self) -> bool:
        """See Layer."""
        return self.at is None

    @property
    def written(self) -> torch.Size:
        """See Layer."""
        return super().written if self.at is None else self.at.shape[1:]

    def add(self, d: Tensor) -> None:
        """Take in a gradient at the output, or at the pooled output."""
        super().add(d if self.kept is None else d * self.kept)

    def receive(self, d: Tensor) -> None:
        """Take in a gradient that who gives it has let through the gate."""
        super().add(d)

    def flush(self) -> None:
        """Square what waits; hand it on."""
        if self.before is not None and self.waiting:
            assert self.at is not None
            m: Any = self.module
            geometry = {"stride": m.stride, "padding": m.padding, "dilation": m.dilation, "groups": m.groups}
            _, *size = self.x.shape
            # the weight that ran: a masked layer's is not its parameter
            for d in ops.conv_pull_back(
                self.waiting, self.node._saved_weight, (size[0], size[1], size[2]), self.at, **geometry
            ):
                self.before.receive(d if self.gate is None else d.mul_(self.gate))
        super().flush()

    def squares(self, d: Sequence[Tensor], x: Tensor, rows: slice) -> dict[str, Tensor]:
        """See Layer."""
        m: Any = self.module
        flat, at = isinstance(m, nn.Conv1d), None if self.at is None else self.at[rows]
        padding = m.padding
        if isinstance(padding, str) or m.padding_mode != "zeros":
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
            x, padding = F.pad(x, m._reversed_padding_repeated_twice, mode=mode), (0,) * (1 if flat else 2)
        bias = squares_of(d, lambda g: g.flatten(2).sum(2)) if "bias" in self.params else None
        kernel, stride, dilation = m.kernel_size, m.stride, m.dilation
        if flat:
            d, x = [one.unsqueeze(2) for one in d], x.unsqueeze(2)
            kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
        weight = ops.conv_squares(
            d, x, kernel, stride=stride, padding=padding, dilation=dilation, groups=m.groups, at=at
        )  # fmt: skip
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
