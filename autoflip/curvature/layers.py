"""Squares of per-sample gradients, layer by layer, from what a layer read and the gradient at what it wrote.

Known kinds: Linear (also on sequences), Conv1d/Conv2d, Embedding, and the affine part of normalisation layers
(BatchNorm in evaluation mode, LayerNorm, GroupNorm). Any other parameter is the caller's to handle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from autoflip import ops


class Layer(ABC):
    """One run of one layer: what it read, where its output stands in the graph, and its squares so far.

    Args:
        module: the layer.
        x: what it read.
        y: what it wrote.
        chunk: factors that are held before they are squared together.
    """

    def __init__(self, module: nn.Module, x: Tensor, y: Tensor, chunk: int) -> None:
        self.module, self.x, self.version, self.chunk = module, x.detach(), x._version, chunk
        self.edge = get_gradient_edge(y)  # taken now: an in-place ReLU would move y to another node
        self.shape = y.shape
        self.before: Layer | None = None  # gets its gradient from this layer, not from autograd
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
        self.waiting.append(d)
        if len(self.waiting) >= self.chunk:
            self.flush()

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
        return tensor[rows]

    def take(self) -> Iterator[tuple[int, str, Tensor]]:
        """Yield (segment, parameter name, sums shaped like the parameter), and begin anew."""
        self.flush()
        sums, self.sums = self.sums, {}
        for (i, name), value in sums.items():
            if name in self.params:
                yield i, name, value.reshape(self.params[name].shape)

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


class _Linear(Layer):
    squared: Tensor | None = None
    summed = False

    def add(self, d: Tensor) -> None:
        # all factors share the input's square, so theirs are added first: one product serves all of them
        if d.dim() > 2:
            super().add(d)
        elif self.squared is not None:
            self.squared.addcmul_(d, d)
        elif self.waiting:
            self.squared = self.waiting.pop().square().addcmul_(d, d)
        else:
            self.waiting.append(d)

    def flush(self) -> None:
        if self.squared is not None:
            self.waiting, self.squared = [self.squared], None
            self.summed = True
        super().flush()
        self.summed = False

    def squares(self, d: Sequence[Tensor], x: Tensor, rows: slice) -> dict[str, Tensor]:
        if self.summed:  # d holds the factors' sum of squares
            return {"weight": ops.squared_matmul(d[0], x, squared=True), "bias": d[0].sum(0)}
        if x.dim() == 2:
            return {"weight": ops.squared_matmul(d[0], x), "bias": d[0].square().sum(0)}
        d = [one.flatten(1, -2).transpose(1, 2) for one in d]  # (N, O, P)
        return {"weight": ops.sequence_squares(d, x.flatten(1, -2)), "bias": _squares_of(d, lambda g: g.sum(2))}


class _Conv(Layer):
    at: Tensor | None = None
    gate: Tensor | None = None
    node: Any = None  # of the convolution itself

    def seen_through(self, readers: Mapping[Any, Sequence[Any]]) -> None:
        """Look at the gradient behind ReLU and max-pooling: one value a window instead of zeros with one value."""
        gate = None
        later = readers.get(self.edge.node, ())
        if len(later) == 1 and later[0].name().startswith("ReluBackward"):
            gate, later = later[0], readers.get(later[0], ())
        if len(later) != 1 or not later[0].name().startswith("MaxPool2DWithIndices") or len(self.shape) != 4:
            return
        self.at = later[0]._saved_result1
        self.node = self.edge.node
        self.edge = GradientEdge(later[0], 0)
        if gate is not None:
            kept = gate._saved_result.flatten(2).gather(2, self.at.flatten(2)).view(self.at.shape)
            self.gate = kept.detach().gt_(0)  # in the gradient's dtype: a product with a bool converts it every time

    def follow(self, others: Sequence[Layer], readers: Mapping[Any, Sequence[Any]]) -> None:
        """Find the convolution that this one's gradient can be handed to without autograd."""
        if self.at is None or isinstance(self.module.padding, str) or not self.node.name().startswith("Convolution"):
            return
        source = self.node.next_functions[0][0]
        for other in others:
            if isinstance(other, _Conv) and other.at is not None and other.edge.node is source:
                self.before = other if len(readers[source]) == 1 else None

    @property
    def dense(self) -> bool:
        return self.at is None

    def add(self, d: Tensor) -> None:
        super().add(d if self.gate is None else d * self.gate)

    def flush(self) -> None:
        if self.before is not None and self.waiting:
            assert self.at is not None
            m: Any = self.module
            geometry = {"stride": m.stride, "padding": m.padding, "dilation": m.dilation, "groups": m.groups}
            _, *size = self.x.shape
            # the weight that ran: a masked layer's is not its parameter
            for d in ops.conv_pull_back(
                self.waiting, self.node._saved_weight, (size[0], size[1], size[2]), self.at, **geometry
            ):
                self.before.add(d)
        super().flush()

    def squares(self, d: Sequence[Tensor], x: Tensor, rows: slice) -> dict[str, Tensor]:
        m: Any = self.module
        flat, at = isinstance(m, nn.Conv1d), None if self.at is None else self.at[rows]
        padding = m.padding
        if isinstance(padding, str) or m.padding_mode != "zeros":
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
            x, padding = F.pad(x, m._reversed_padding_repeated_twice, mode=mode), (0,) * (1 if flat else 2)
        bias = _squares_of(d, lambda g: g.flatten(2).sum(2)) if "bias" in self.params else None
        kernel, stride, dilation = m.kernel_size, m.stride, m.dilation
        if flat:
            d, x = [one.unsqueeze(2) for one in d], x.unsqueeze(2)
            kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
        weight = ops.conv_squares(
            d, x, kernel, stride=stride, padding=padding, dilation=dilation, groups=m.groups, at=at
        )  # fmt: skip
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _squares_of(d: Sequence[Tensor], reduced: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum the squares of what each factor leaves ``(N, ...)``, over factors and samples."""
    total = reduced(d[0]).square()
    for one in d[1:]:
        part = reduced(one)
        total.addcmul_(part, part)
    return total.sum(0)


class _Norm(Layer):
    def squares(self, d: Sequence[Tensor], x: Tensor, rows: slice) -> dict[str, Tensor]:
        m: Any = self.module
        if isinstance(m, nn.LayerNorm):
            normal = F.layer_norm(x, m.normalized_shape, None, None, m.eps)
            positions = tuple(range(1, x.dim() - len(m.normalized_shape)))
        elif isinstance(m, nn.GroupNorm):
            normal = F.group_norm(x, m.num_groups, None, None, m.eps)
            positions = tuple(range(2, x.dim()))
        else:
            normal = F.batch_norm(x, m.running_mean, m.running_var, None, None, False, 0.0, m.eps)
            positions = tuple(range(2, x.dim()))

        def summed(g: Tensor) -> Tensor:
            return g.sum(positions) if positions else g

        return {"weight": _squares_of(d, lambda g: summed(g * normal)), "bias": _squares_of(d, summed)}


class _Embedding(Layer):
    def squares(self, d: Sequence[Tensor], x: Tensor, rows: slice) -> dict[str, Tensor]:
        m: Any = self.module
        tokens = x.reshape(len(x), -1)  # (N, P)
        pairs, where = torch.unique(
            torch.arange(len(tokens), device=tokens.device)[:, None] * m.num_embeddings + tokens, return_inverse=True
        )
        total = d[0].new_zeros(m.num_embeddings, m.embedding_dim)
        for one in d:
            # a token that a sample reads twice adds up before it is squared
            sums = one.new_zeros(len(pairs), m.embedding_dim)
            sums.index_add_(0, where.flatten(), one.reshape(-1, m.embedding_dim))
            total.index_add_(0, pairs % m.num_embeddings, sums.square())
        if m.padding_idx is not None:
            total[m.padding_idx] = 0
        return {"weight": total}


def _kind(module: nn.Module) -> type[Layer] | None:
    """Return who can square this module's gradients; None for a subclass that computes something else."""

    def plain(base: type[nn.Module]) -> bool:
        # our masked layers are linear in their weight like their bases; of strangers only an unchanged forward is
        ours = type(module).__module__.startswith("autoflip.") and getattr(module, "activation", None) is None
        return isinstance(module, base) and (ours or type(module).forward is base.forward)

    if "weight" not in module._parameters:  # reparametrised: weight is computed from other tensors
        return None
    if "inputs" in module._buffers:  # nn.SelectingLinear: its weight does not read all that reaches it
        return None
    if plain(nn.Linear):
        return _Linear
    if plain(nn.Conv2d) or plain(nn.Conv1d):
        return _Conv
    if plain(nn.Embedding):
        return None if module.max_norm is not None or module.scale_grad_by_freq or module.sparse else _Embedding
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if isinstance(module, batch_norms):
        frozen = not module.training and module.running_mean is not None
        return _Norm if frozen and type(module) in batch_norms else None
    return _Norm if type(module) in (nn.LayerNorm, nn.GroupNorm) else None


@contextmanager
def watch(modules: Iterable[nn.Module], samples: int, chunk: int) -> Iterator[list[Layer]]:
    """Collect the known layers that run inside the block; hooks are gone afterwards, whatever happens."""
    layers: list[Layer] = []

    def hook(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        x = args[0] if args else None
        kind = _kind(module)
        if kind is None or not isinstance(x, Tensor) or not isinstance(y, Tensor) or not y.requires_grad:
            return
        if _first_is_sample(module, x, samples):
            layers.append(kind(module, x, y, chunk))

    handles = [module.register_forward_hook(hook, prepend=True) for module in modules if _kind(module) is not None]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _first_is_sample(module: nn.Module, x: Tensor, samples: int) -> bool:
    if x.dim() == 0 or x.shape[0] != samples:
        return False  # rows of several samples mixed, or time first
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return x.dim() == (3 if isinstance(module, nn.Conv1d) else 4)
    if isinstance(module, nn.Embedding):
        return x.dim() == 1 or samples == 1 or x.shape[1] != samples
    if isinstance(module, (nn.Linear, nn.LayerNorm)):
        # (T, N, K) with T == N cannot be told from (N, T, K)
        return x.dim() == 2 or (x.dim() > 2 and (samples == 1 or x.shape[1] != samples))
    return x.dim() >= 2
