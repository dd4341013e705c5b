"""LSTM layers: all factors that wait walk back through time together, one product a step for all of them.

Where only such layers, known ones and reshapes stand between the loss and the input, gradients are taken in at the
layer's output and go from layer to layer by hand; otherwise autograd brings them to the gates, a factor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge

from autoflip import ops
from autoflip.curvature.layer import Layer


class Walk:
    """One pass of one layer in one direction.

    Attributes:
        gates: ``(T, N, 4 H)``, activated.
        cells: ``(T + 1, N, H)``.
        states: ``(T + 1, N, H)``: the hidden ones.
        weight_gradient: whether autograd wants the hidden weight's.
    """

    gates: Tensor
    cells: Tensor
    states: Tensor
    weight_gradient = True


class _Steps(torch.autograd.Function):
    """``(walk, x, input weight, hidden weight, entry, h, c) -> (y, last c)``.

    ``entry`` is both biases in one, or 0, expanded to all gates: there the gradient at them can be asked for.
    """

    @staticmethod
    def forward(
        ctx: Any, walk: Walk, x: Tensor, w_ih: Tensor, w_hh: Tensor, entry: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        walk.gates, walk.cells, walk.states = ops.lstm_states(x, w_ih, w_hh, entry[0, 0], h, c)
        ctx.walk, ctx.x, ctx.weights = walk, x.detach(), (w_ih.detach(), w_hh.detach())
        return walk.states[1:], walk.cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Any, ...]:
        walk, (dy, dc), (w_ih, w_hh) = ctx.walk, d_out, ctx.weights
        inputs = w_ih if ctx.needs_input_grad[1] else None
        (d,), dx, dh, dc = ops.lstm_pull_back(
            [dy], w_hh, walk.gates, walk.cells, dc=dc.unsqueeze(0), input_weight=inputs
        )
        weights: list[Tensor | None] = [None, None]
        if walk.weight_gradient:  # else squares are taken elsewhere, and nobody asks for the whole
            rows = d.flatten(0, 1).T
            weights = [rows @ ctx.x.flatten(0, 1), rows @ walk.states[:-1].flatten(0, 1)]
        return None, dx[0] if dx else None, *weights, d, dh[0], dc[0]


class Recurrent(Layer):
    """One direction of an LSTM layer.

    Args:
        module: it.
        x: ``(T, N, K)``: what it read.
        entry: ``(T, N, 4 H)``: where the gates' gradients come in.
        suffix: of its parameters' names.
        weights: that ran, of the input and of the hidden state; a masked layer's are not its parameters.
        walk: the pass.
        begun: whether the first states have no gradient.

    Attributes:
        node: autograd's, of the outputs. (The walk would keep itself alive by it.)
    """

    node: Any

    def __init__(
        self,
        module: nn.Module,
        x: Tensor,
        entry: Tensor,
        suffix: str,
        weights: Sequence[Tensor],
        walk: Walk,
        begun: bool,
    ) -> None:
        super().__init__(module, x, entry)
        kinds = ("weight_hh", "weight_ih", "bias_hh", "bias_ih")
        self.params = {kind: self.params[kind + suffix] for kind in kinds if kind + suffix in self.params}
        self.weights = [w.detach() for w in weights]
        self.run, self.begun = walk, begun
        self.source: Any = x.grad_fn
        self.by_hand = self.turned = False

    def follow(self, others: Sequence[Layer], readers: Mapping[Any, Sequence[Any]]) -> None:
        """See whether all that gradients reach behind this layer can be handed on; then wait at its output."""
        node = self.node
        at_y = all(n == 0 for one in readers.get(node, ()) for child, n in one.next_functions if child is node)
        if not self.begun or not at_y:
            return
        source: Any = self.source
        if source is not None and source.name() == "TransposeBackward0" and len(readers.get(source, ())) == 1:
            self.turned = (source._saved_dim0, source._saved_dim1) == (0, 1)
            source = source.next_functions[0][0] if self.turned else source
        if source is not None:
            known = {
                other.node if isinstance(other, Recurrent) else other.edge.node: other
                for other in others
                if getattr(other, "by_hand", other.receives)
            }
            if source not in known or len(readers.get(source, ())) != 1:
                return
            self.before = known[source]
        self.by_hand = True
        self.edge = GradientEdge(node, 0)

    def cut(self, tensor: Tensor, rows: slice) -> Tensor:
        """Return some samples' part, time first."""
        return tensor[:, rows]

    def flush(self) -> None:
        """Square what waits; hand it on."""
        if self.by_hand and self.waiting:
            hidden, inputs = self.weights
            wanted = None if self.before is None else inputs
            walk = self.run
            d, dx, _, _ = ops.lstm_pull_back(
                self.waiting, hidden, walk.gates, walk.cells, input_weight=wanted, coarse=self.coarse
            )
            self.waiting = d
            for one in dx:
                self.before.add(one.transpose(0, 1) if self.turned else one)
        super().flush()

    def squares(self, d: Sequence[Tensor], x: Tensor, rows: slice) -> dict[str, Tensor]:
        """Return sums of squared gradients: what the products read and a one for the biases is one input."""
        states = self.cut(self.run.states[:-1], rows)
        h, k = states.shape[2], x.shape[2]
        ones = x.new_ones(1, 1, 1).expand(x.shape[1], len(x), 1)
        total = ops.sequence_squares(
            [one.permute(1, 2, 0) for one in d], [states.transpose(0, 1), x.transpose(0, 1), ones]
        )
        bias = total[:, h + k]
        return {"weight_hh": total[:, :h], "weight_ih": total[:, h : h + k], "bias_hh": bias, "bias_ih": bias.clone()}


def lstm(
    module: nn.Module, x: Tensor, start: Sequence[Tensor], suffix: str, weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], Recurrent | None]:  # fmt: skip
    """Compute one direction of one layer.

    Args:
        module: the whole layer.
        x: ``(T, N, K)``.
        start: the first hidden and cell state, ``(N, H)``.
        suffix: of the parameters' names.
        weights: input's and hidden state's.
        biases: both, or none.

    Returns:
        ``(outputs, last hidden state, last cell state)``, and who squares; None where nothing has a gradient.
    """
    (w_ih, w_hh), (h, c) = weights, start
    own = any(p.requires_grad for p in (*weights, *biases))
    bias = biases[0] + biases[1] if biases else x.new_zeros(4 * w_hh.shape[1])
    if own and not bias.requires_grad:
        bias.requires_grad_()
    entry = bias.expand(*x.shape[:2], -1)
    walk, begun = Walk(), not (h.requires_grad or c.requires_grad)
    y, last = _Steps.apply(walk, x, w_ih, w_hh, entry, h, c)
    layer = Recurrent(module, x, entry, suffix, (w_hh, w_ih), walk, begun) if own else None
    if layer is not None:
        layer.node = y.grad_fn
    return (y, y[-1], last), layer
