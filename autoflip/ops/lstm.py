"""A dense LSTM layer's steps, forwards and, for many output gradients at once, backwards.

Torch's fused layer hides its gates, whose gradients curvature squares sample by sample. Nothing here is differentiable.
``T`` steps, ``N`` samples, ``H`` hidden units, time first; gates side by side in torch's order i, f, g, o.

Source: Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 1997.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from autoflip.ops import _hessian_checks as checks
from autoflip.ops import backend, memory
from autoflip.ops._hessian_checks import Factors
from autoflip.ops._hessian_registered import traced

__all__ = ["Pulled", "lstm_pull_back", "lstm_states"]

backend.register("lstm_states", "cpp", optional=True)
backend.register("lstm_pull_back", "cpp", optional=True)

Wanted = dict[str, tuple[Tensor, tuple[int, ...]]]


class Pulled(NamedTuple):
    """What :func:`lstm_pull_back` returns.

    Attributes:
        d: Q tensors ``(T, N, 4 H)``: gradients at the gates, before their activation.
        dx: Q tensors ``(T, N, I)``: at the layer's input; none where no input weight was given.
        dh: ``(Q, N, H)``: at the first hidden state.
        dc: ``(Q, N, H)``: at the first cell state.
    """

    d: list[Tensor]
    dx: list[Tensor]
    dh: Tensor
    dc: Tensor


def lstm_states(
    x: Tensor, input_weight: Tensor, weight: Tensor, bias: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk forwards: ``i, f, o = sigmoid``, ``g = tanh`` of ``x W_x.T + b + h W.T``; ``c' = f c + i g``;
    ``h' = o tanh(c')``.

    Args:
        x: ``(T, N, I)``, floating.
        input_weight: ``(4 H, I)``, dtype and device of ``x``, like all that follow.
        weight: ``(4 H, H)``.
        bias: ``(4 H,)``, both in one.
        h: ``(N, H)``: the first hidden state.
        c: ``(N, H)``: the first cell state.

    Returns:
        ``(T, N, 4 H)``: the gates, activated; ``(T + 1, N, H)`` twice: the cell states and the hidden states, the first
        with them.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``8 T N H (H + I)`` FLOPs.
    """
    size = h.shape[-1]
    wanted: Wanted = {"input_weight": (input_weight, (4 * size, x.shape[-1])), "weight": (weight, (4 * size, size))}
    wanted |= {"bias": (bias, (4 * size,)), "h": (h, (*x.shape[1:2], size)), "c": (c, (*x.shape[1:2], size))}
    _check("lstm_states", "x", x, wanted)
    run = torch.ops.autoflip.lstm_states.default if traced() else _states
    weights = input_weight.detach(), weight.detach().contiguous(), bias.detach().contiguous()
    gates, cells, states = run(x.detach(), *weights, h.detach(), c.detach())
    return gates, cells, states


def lstm_pull_back(
    dy: Factors,
    weight: Tensor,
    gates: Tensor,
    cells: Tensor,
    *,
    dh: Tensor | None = None,
    dc: Tensor | None = None,
    input_weight: Tensor | None = None,
    coarse: bool = False,
) -> Pulled:
    """Walk backwards with Q gradients at once: one product a step for all of them.

    Args:
        dy: Q tensors ``(T, N, H)`` (or one with Q in front), floating: gradients at the hidden states.
        weight: ``(4 H, H)``, as for :func:`lstm_states`, dtype and device of ``dy``, like all that follow.
        gates: ``(T, N, 4 H)``, contiguous, as lstm_states returned them.
        cells: ``(T + 1, N, H)``, contiguous, as lstm_states returned them.
        dh: ``(Q, N, H)``: gradients that reach the last hidden state otherwise; None: zeros.
        dc: ``(Q, N, H)``: those of the last cell state; None: zeros.
        input_weight: ``(4 H, I)``: gradients at the input are wanted, too.
        coarse: products may round to bfloat16 (sums are float32), and ``d`` is bfloat16 then: where the CPU has
            products of it, AVX-512's or AMX's.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``8 Q T N H (H + I)`` FLOPs.
    """
    op = "lstm_pull_back"
    d = checks.factors(op, dy, contiguous=False)
    (steps, n), h = gates.shape[:2], weight.shape[-1]
    wanted: Wanted = {"dy's factors": (d[0], (steps, n, h)), "weight": (weight, (4 * h, h))}
    wanted |= {"cells": (cells, (steps + 1, n, h)), "gates": (gates, (steps, n, 4 * h))}
    wanted |= {name: (t, (len(d), n, h)) for name, t in (("dh", dh), ("dc", dc)) if t is not None}
    if input_weight is not None:
        wanted["input_weight"] = input_weight, (4 * h, input_weight.shape[-1])
    _check(op, "gates", gates, wanted)
    first_h, first_c = (gates.new_zeros(len(d), n, h) if t is None else t.detach().clone() for t in (dh, dc))
    weights = weight.detach().contiguous(), None if input_weight is None else input_weight.detach().contiguous()
    run = torch.ops.autoflip.lstm_pull_back.default if traced() else _pull_back
    return Pulled(*run(d, *weights, gates.contiguous(), cells.contiguous(), first_h, first_c, coarse))


def _check(op: str, name: str, first: Tensor, wanted: Wanted) -> None:
    if first.dim() != 3 or not first.is_floating_point():
        raise ValueError(f"{op}: {name} is {first.dtype} {tuple(first.shape)}; wanted floating (T, N, ...), time first")
    for other, (t, shape) in wanted.items():
        if t.dtype != first.dtype or t.device != first.device or t.shape != shape:
            raise ValueError(
                f"{op}: {other} is {t.dtype} {tuple(t.shape)} on {t.device}; beside {name} {tuple(first.shape)} wanted "
                f"{first.dtype} {tuple(shape)} on {first.device}"
            )


def _kernels(op: str, tensor: Tensor) -> Any:
    """Return the CPU extension; None where it does not serve: it is for float32, the loops below do the rest."""
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or backend.serve(op, tensor.device) != "cpp":
        return None
    return backend.extension("_C")[0]


def _empty(*sizes: int) -> Tensor:
    return memory.empty(math.prod(sizes)).view(sizes)


def _states(
    x: Tensor, input_weight: Tensor, weight: Tensor, bias: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (steps, n), size = x.shape[:2], h.shape[1]
    if (kernels := _kernels("lstm_states", x)) is not None:
        gates, both = _empty(steps, n, 4 * size), _empty(2, steps + 1, n, size)
        torch.mm(x.reshape(steps * n, -1), input_weight.T, out=gates.view(steps * n, -1))
    else:
        gates, both = F.linear(x, input_weight, bias), x.new_empty(2, steps + 1, n, size)
    cells, states = both.unbind()
    cells[0], states[0] = c, h
    if kernels is not None:
        where = (t.data_ptr() for t in (weight, bias, states, gates, cells, states[1:]))
        kernels.lstm_forward(*where, (steps, n, size, 0), torch.get_num_threads())
        return gates, cells, states
    turned = weight.T.contiguous()
    for t, g in enumerate(gates):
        g.addmm_(states[t], turned)
        g[:, : 2 * size].sigmoid_()
        g[:, 2 * size : 3 * size].tanh_()
        g[:, 3 * size :].sigmoid_()
        i, f, new, o = g.chunk(4, 1)
        torch.mul(f, cells[t], out=cells[t + 1]).addcmul_(i, new)
        torch.mul(o, cells[t + 1].tanh(), out=states[t + 1])
    return gates, cells, states


def _pull_back(
    dy: list[Tensor],
    weight: Tensor,
    input_weight: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    dh: Tensor,
    dc: Tensor,
    coarse: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    steps, n, width = gates.shape
    inputs = 0 if input_weight is None else input_weight.shape[1]
    kernels = _kernels("lstm_pull_back", gates)
    if kernels is not None:
        coarse = coarse and kernels.coarse()
        dx = [_empty(steps, n, inputs) for _ in dy if inputs]
        d = [_empty(steps, n, width // 2).view(torch.bfloat16) if coarse else _empty(steps, n, width) for _ in dy]
        if any(one.stride() != dy[0].stride() or one.stride(2) != 1 for one in dy):
            dy = [one.contiguous() for one in dy]
        from_dy, to_d, to_dx = ([one.data_ptr() for one in factors] for factors in (dy, d, dx))
        weights = weight.data_ptr(), 0 if input_weight is None else input_weight.data_ptr()
        states = gates.data_ptr(), cells.data_ptr(), from_dy, *dy[0].stride()[:2], dh.data_ptr(), dc.data_ptr()
        sizes = steps, n, width // 4, inputs
        kernels.lstm_back(*weights, *states, to_d, to_dx, sizes, coarse, torch.get_num_threads())
        return d, dx, dh, dc
    d, dx = ([gates.new_empty(steps, n, columns) for _ in dy if columns] for columns in (width, inputs))
    for t in range(steps - 1, -1, -1):
        i, f, new, o = gates[t].chunk(4, 1)
        tanh = cells[t + 1].tanh()
        dh = dh + torch.stack([one[t] for one in dy])
        dc = dc + dh * (o * (1 - tanh * tanh))
        at_i, at_f, at_new = dc * (new * i * (1 - i)), dc * (cells[t] * f * (1 - f)), dc * (i * (1 - new * new))
        here = torch.cat([at_i, at_f, at_new, dh * (tanh * o * (1 - o))], 2)
        dh, dc = here @ weight, dc * f
        for q, one in enumerate(here):
            d[q][t] = one
            if input_weight is not None:
                torch.mm(one, input_weight, out=dx[q][t])
    return d, dx, dh, dc


_lib = torch.library.Library("autoflip", "FRAGMENT")
_lib.define(
    "lstm_states(Tensor x, Tensor input_weight, Tensor weight, Tensor bias, Tensor h, Tensor c)"
    " -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "lstm_pull_back(Tensor[] dy, Tensor weight, Tensor? input_weight, Tensor gates, Tensor cells, Tensor dh, Tensor dc,"
    " bool coarse) -> (Tensor[], Tensor[], Tensor, Tensor)"
)


def _registered_states(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gates, cells, states = _states(*tensors)
    return gates, cells, states.clone()  # results of a registered op share no memory


def _registered_pull_back(
    dy: list[Tensor], weight: Tensor, input_weight: Tensor | None, gates: Tensor, cells: Tensor, dh: Tensor, dc: Tensor,
    coarse: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:  # fmt: skip
    return _pull_back(dy, weight, input_weight, gates, cells, dh.clone(), dc.clone(), coarse)


for _device in ("CPU", "CUDA"):
    _lib.impl("lstm_states", _registered_states, _device)
    _lib.impl("lstm_pull_back", _registered_pull_back, _device)


@register_flop_formula(torch.ops.autoflip.lstm_states, get_raw=True)
def _states_flops(x: Tensor, input_weight: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.shape[0] * x.shape[1] * (input_weight.numel() + weight.numel())


@register_flop_formula(torch.ops.autoflip.lstm_pull_back, get_raw=True)
def _pull_back_flops(
    dy: list[Tensor], weight: Tensor, input_weight: Tensor | None, gates: Tensor, *_: Any, **__: Any
) -> int:
    inputs = 0 if input_weight is None else input_weight.shape[1]
    return 2 * len(dy) * gates.numel() * (weight.shape[1] + inputs)
