"""LSTM and GRU step by step, so that the gradients at their gates can be seen and squared sample by sample.

torch's fused layers hide their gates. While the model is looked at, they are computed here instead: the input's
products for all steps at once, then a step after the other (LSTM: :mod:`lstm`; GRU: Cho et al. 2014, torch's form with
the reset gate behind the product). Weights count once a sample however many steps use them: their gradients are
summed over steps before they are squared.

Left to torch, and so to the general way: packed sequences, single sequences without a batch, ``proj_size``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autoflip import ops
from autoflip.curvature.layer import Layer
from autoflip.curvature.lstm import lstm


class Projection(Layer):
    """Products of one weight at every step: what it read is ``(T, N, K)``, its outputs' gradients ``(T, N, G)``."""

    def cut(self, tensor: Tensor, rows: slice) -> Tensor:
        """Return some samples' part, time first."""
        return tensor[:, rows]

    def squares(self, d: Sequence[Tensor], x: Tensor, rows: slice) -> dict[str, Tensor]:
        """Return sums of squared gradients of the weight and, if there is one, the bias."""
        weight, bias = (next((n for n in self.params if n.startswith(kind)), "") for kind in ("weight", "bias"))
        total = ops.sequence_squares([factor.permute(1, 2, 0) for factor in d], x.transpose(0, 1))
        return {weight: total, bias: torch.stack([factor.sum(0).square().sum(0) for factor in d]).sum(0)}


class Run:
    """One pass of one layer in one direction."""

    read: Tensor  # (T, N, H): the hidden state before each step
    weight_gradient = True


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, gx: Tensor, gh: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        hidden, size, turned = gh.clone(memory_format=torch.contiguous_format), h.shape[1], weight.T.contiguous()
        gates, y, before = gx.clone(), gx.new_empty(len(gx), *h.shape), h
        for t, g in enumerate(gates):
            product = hidden[t].addmm_(before, turned)
            both = g[:, : 2 * size].add_(product[:, : 2 * size]).sigmoid_()
            r, z = both.chunk(2, 1)
            n = g[:, 2 * size :].addcmul_(r, product[:, 2 * size :]).tanh_()
            before = torch.lerp(n, before, z, out=y[t])
        run.read = torch.cat([h.unsqueeze(0), y[:-1]])
        ctx.run, ctx.weight = run, weight
        ctx.gates, ctx.hidden = gates, hidden[..., 2 * size :]
        return y, y[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Any, ...]:
        dy, dh = d_out
        gates, hidden, weight, read = ctx.gates, ctx.hidden, ctx.weight, ctx.run.read
        r, z, n = gates.chunk(3, 2)
        size = r.shape[2]
        slope_n = (1 - z) * (1 - n * n)
        slopes = torch.cat([slope_n * hidden * r * (1 - r), (read - n) * z * (1 - z), slope_n], 2)
        d = torch.empty_like(gates)  # at the input's products; at the hidden ones the last third has r in front
        d_hidden = torch.empty_like(gates)
        for t in range(len(gates) - 1, -1, -1):
            dh = dh + dy[t]
            torch.mul(slopes[t].unflatten(1, (3, size)), dh.unsqueeze(1), out=d[t].unflatten(1, (3, size)))
            d_hidden[t] = d[t]
            d_hidden[t, :, 2 * size :] *= r[t]
            dh = torch.addmm(dh * z[t], d_hidden[t], weight)
        # its squares are taken elsewhere, and nobody asks for the whole
        whole = d_hidden.flatten(0, 1).T @ read.flatten(0, 1) if ctx.run.weight_gradient else None
        return None, d, d_hidden, whole, dh


class _Unrolled:
    """Stands in for one module's ``forward``."""

    def __init__(self, module: nn.RNNBase, samples: int, layers: list[Layer]) -> None:
        self.module, self.samples, self.layers = module, samples, layers
        self.fused: Callable[..., Any] = module.forward

    def __call__(self, x: Any, hx: Any = None) -> Any:
        m = self.module
        if not isinstance(x, Tensor) or x.dim() != 3 or m.proj_size or x.shape[1 - int(m.batch_first)] == 0:
            return self.fused(x, hx)
        if x.shape[0 if m.batch_first else 1] != self.samples:
            return self.fused(x, hx)
        lstm, ways = isinstance(m, nn.LSTM), 2 if m.bidirectional else 1
        x = x.transpose(0, 1) if m.batch_first else x
        zeros = x.new_zeros(m.num_layers * ways, x.shape[1], m.hidden_size)
        states = (zeros, zeros) if hx is None else hx if lstm else (hx,)
        ends: list[tuple[Tensor, ...]] = []
        for k in range(m.num_layers):
            outputs = []
            for way in range(ways):
                suffix = f"_l{k}" + "_reverse" * way
                start = [state[len(ends)] for state in states[: 1 + lstm]]
                y, *end = self._one(x.flip(0) if way else x, suffix, start)
                outputs.append(y.flip(0) if way else y)
                ends.append(tuple(end))
            x = torch.cat(outputs, 2) if ways > 1 else outputs[0]
            if m.dropout and k < m.num_layers - 1:
                x = F.dropout(x, m.dropout, m.training)
        y = x.transpose(0, 1) if m.batch_first else x
        last = tuple(torch.stack(parts) for parts in zip(*ends))
        return y, (last if lstm else last[0])

    def _one(self, x: Tensor, suffix: str, start: list[Tensor]) -> tuple[Tensor, ...]:
        m = self.module
        effective = getattr(m, "_effective", None) or (lambda name: getattr(m, name))  # masked layers have their own
        w_ih, w_hh = effective("weight_ih" + suffix), effective("weight_hh" + suffix)
        b_ih, b_hh = (effective(kind + suffix) if m.bias else None for kind in ("bias_ih", "bias_hh"))
        if isinstance(m, nn.LSTM):
            biases = [] if b_ih is None else [b_ih, b_hh]
            outputs, steps = lstm(m, x, start, suffix, (w_ih, w_hh), biases)
            self.layers += [] if steps is None else [steps]
            return outputs
        gx = F.linear(x, w_ih, b_ih)
        # the hidden products' gradient is read off where their bias comes in; without one, where a zero does
        entry = x.new_zeros(()).requires_grad_() if b_hh is None else b_hh
        if not entry.requires_grad and w_hh.requires_grad:
            entry = entry.detach().requires_grad_()  # a frozen bias: its gradient is looked at, nobody keeps it
        gh, run = entry.expand(gx.shape), Run()
        results: tuple[Tensor, ...] = _GRU.apply(run, gx, gh, w_hh, *start)
        for kind, read, written in (("ih", x, gx), ("hh", run.read, gh)):
            if not written.requires_grad:
                continue
            layer = Projection(m, read, written)
            names = (f"weight_{kind}{suffix}", f"bias_{kind}{suffix}")
            layer.params = {name: p for name, p in layer.params.items() if name in names}
            layer.run = run
            self.layers.append(layer)
        return results


@contextmanager
def unrolled(modules: Iterable[nn.Module], samples: int, layers: list[Layer]) -> Iterator[None]:
    """Compute LSTMs and GRUs here inside the block, and add their projections to ``layers``."""
    changed: list[Any] = []
    for module in modules:
        if not isinstance(module, nn.RNNBase):
            continue
        base = nn.LSTM if isinstance(module, nn.LSTM) else nn.GRU if isinstance(module, nn.GRU) else None
        ours = type(module).__module__.startswith("autoflip.")
        if base is None or "forward" in vars(module) or not (ours or type(module).forward is base.forward):
            continue
        changed.append(module)
    try:
        for module in changed:
            module.forward = _Unrolled(module, samples, layers)
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)
