"""One direction of one LSTM or GRU layer whose pruned weights do no work, over a whole sequence.

What does not depend on the step before is one product over all steps: the input's share of the gates forwards, the
gradients of both weights backwards. The rest, the state's share of the gates and the elementwise cell, is one call of
the CPU extension for all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from autoflip.ops import _masked_kernels as kernels
from autoflip.ops import _masked_weight as weights
from autoflip.ops import backend
from autoflip.ops._masked_weight import CPP
from autoflip.ops.masked_matmul import masked_linear
from autoflip.ops.pack import Pack

__all__ = ["GATES", "RecurrentPack", "masked_recurrent", "recurrent_here"]

GATES = {"LSTM": 4, "GRU": 3}  # in torch's order: i, f, g, o and r, z, n


class RecurrentPack(NamedTuple):
    """The Packs of one direction's two weights, of the kind ``"LSTM"`` or ``"GRU"``.

    Attributes:
        kind: a key of GATES.
        input: of ``weight_ih``, (gates * H, I).
        state: of ``weight_hh``, (gates * H, H), for its gradient over all steps.
        step: of ``weight_hh``, path "sparse", for the products of single steps.
    """

    kind: str
    input: Pack
    state: Pack
    step: Pack

    @classmethod
    def of(cls, kind: str, input: Tensor, state: Tensor) -> RecurrentPack:
        """Return the packs of two masks."""
        return cls(kind, Pack(input), Pack(state), Pack(state, path="sparse"))


def masked_recurrent(
    x: Tensor, state: tuple[Tensor, ...], parameters: tuple[Tensor, ...], pack: RecurrentPack, *, reverse: bool = False
) -> tuple[Tensor, ...]:
    """Run a sequence through one direction of a recurrent layer; torch's formulas, on ``weight * mask``.

    LSTM: ``i, f, o = sigmoid(.)``, ``g = tanh(.)`` of ``x W_ih.T + b_ih + h W_hh.T + b_hh``,
    ``c' = f c + i g``, ``h' = o tanh(c')``. GRU: ``r, z = sigmoid(.)`` of the same sum,
    ``n = tanh(x W_in.T + b_in + r (h W_hn.T + b_hn))``, ``h' = (1 - z) n + z h``.

    Args:
        x: ``(T, N, I)``, float32 or float64.
        state: ``(h,)`` for a GRU or ``(h, c)`` for an LSTM, each ``(N, H)``.
        parameters: ``weight_ih`` (gates * H, I), ``weight_hh`` (gates * H, H), ``bias_ih`` and ``bias_hh``
                (gates * H,).
        pack: of the masks of the two weights.
        reverse: whether the last step comes first.

    Returns:
        ``y`` (T, N, H), then the state after the last step, (N, H) each. Gradients of weights are exactly zero at
        pruned entries. Every order of derivative exists; only the first one is fast.

    Cost: ``2 * T * N * (kept_ih + kept_hh)`` FLOPs forwards, twice that backwards; elementwise work is not counted.
    The CPU extension serves float32; anything else, and any dispatch mode, takes masked products step by step.
    """
    if weights.kernel_here(x, *state, *parameters) and len(x):
        return _Recurrent.apply(x, (pack, reverse), *state, *parameters)  # type: ignore[no-any-return]
    return _by_steps(x, state, parameters, pack, reverse)


def recurrent_here(x: Tensor) -> bool:
    """Tell whether :func:`masked_recurrent` may be worth its while: eager float32 on the CPU, extension built.

    Also true under a FLOP counter, which is to see the work that is done without it.
    """
    if not (x.is_cpu and x.dtype is torch.float32 and type(x) is not FakeTensor and x.numel()):
        return False
    if torch.compiler.is_compiling() or weights.traced() or weights.transformed(x):
        return False
    return backend.serve("masked_matmul", x.device) == "cpp" and not torch.is_autocast_enabled("cpu")


# --- any device, any order of derivative


def _by_steps(
    x: Tensor, state: tuple[Tensor, ...], parameters: tuple[Tensor, ...], pack: RecurrentPack, reverse: bool
) -> tuple[Tensor, ...]:
    weight_ih, weight_hh, bias_ih, bias_hh = parameters
    shares = masked_linear(x, weight_ih, bias_ih, pack.input)
    cell, outputs = _CELLS[pack.kind], []
    for share in reversed(shares.unbind()) if reverse else shares.unbind():
        state = cell(share, masked_linear(state[0], weight_hh, bias_hh, pack.step), *state)
        outputs.append(state[0])
    y = torch.stack(outputs[::-1] if reverse else outputs) if outputs else x.new_empty(0, *state[0].shape)
    return y, *state


def _lstm_cell(share: Tensor, back: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (share + back).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(share: Tensor, back: Tensor, h: Tensor) -> tuple[Tensor]:
    (r, z, n), (back_r, back_z, back_n) = share.chunk(3, 1), back.chunk(3, 1)
    z = (z + back_z).sigmoid()
    return ((1 - z) * (n + (r + back_r).sigmoid() * back_n).tanh() + z * h,)


_CELLS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"LSTM": _lstm_cell, "GRU": _gru_cell}


# --- the CPU extension


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, job: tuple[RecurrentPack, bool], *rest: Tensor) -> Any:
        pack, reverse = ctx.job = job
        lstm = pack.kind == "LSTM"
        state, (weight_ih, weight_hh, bias_ih, bias_hh) = rest[:-4], rest[-4:]
        steps, n, _ = x.shape
        h = weight_hh.shape[1]
        rows = x.reshape(steps * n, -1)
        gates = kernels.linear_kernel(rows, weight_ih, bias_ih, False, *pack.input.cpu_parts(steps * n))
        states = [gates.new_empty(steps + 1, n, h) for _ in state]
        for whole, first in zip(states, state, strict=True):
            whole[-1 if reverse else 0] = first
        extra = states[1] if lstm else gates.new_empty(steps, n, h)
        parts = pack.step.cpu_parts(n)
        run = CPP.recurrent_lstm_forward if lstm else CPP.recurrent_gru_forward
        run(
            gates.data_ptr(),
            weight_hh.contiguous().data_ptr(),
            parts.layout.data_ptr(),
            parts.chunk,
            bias_hh.contiguous().data_ptr(),
            steps,
            n,
            h,
            reverse,
            states[0].data_ptr(),
            extra.data_ptr(),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(x, *rest, gates, states[0], extra)
        # copies: what the caller writes into the results must not reach what the gradient reads
        y = states[0][:-1] if reverse else states[0][1:]
        return y.clone(), *(s[0 if reverse else -1].clone() for s in states)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *dstate: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pack, reverse = ctx.job
        saved = ctx.saved_tensors
        (x, *rest), (gates, states, extra) = saved[:-3], saved[-3:]
        state, parameters = tuple(rest[:-4]), tuple(rest[-4:])
        if torch.is_grad_enabled() or not weights.kernel_here(dy):  # a second derivative is wanted, or a transform
            return _again(ctx, x, state, parameters, (dy, *dstate))
        weight_ih, weight_hh = parameters[:2]
        steps, n, _ = x.shape
        lstm, h = pack.kind == "LSTM", weight_hh.shape[1]
        dy, dh = dy.contiguous(), dstate[0].clone(memory_format=torch.contiguous_format)
        dgates = torch.empty_like(gates)
        parts = pack.step.cpu_parts(n)
        first = (gates.data_ptr(), weight_hh.contiguous().data_ptr(), parts.layout.data_ptr(), parts.chunk)
        sizes = (steps, n, h, reverse, ctx.needs_input_grad[2])
        if lstm:
            dback, dc = dgates, dstate[1].clone(memory_format=torch.contiguous_format)
            ends = (dy.data_ptr(), dh.data_ptr(), dc.data_ptr(), dgates.data_ptr(), torch.get_num_threads())
            CPP.recurrent_lstm_backward(*first, *sizes, extra.data_ptr(), *ends)
            dfirst: tuple[Tensor, ...] = (dh, dc)
        else:
            dback, dfirst = torch.empty_like(gates), (dh,)
            ends = (dy.data_ptr(), dh.data_ptr(), dgates.data_ptr(), dback.data_ptr(), torch.get_num_threads())
            CPP.recurrent_gru_backward(*first, *sizes, states.data_ptr(), extra.data_ptr(), *ends)
        before = (states[1:] if reverse else states[:-1]).reshape(steps * n, h)
        need = ctx.needs_input_grad
        need_ih, need_hh, need_b_ih, need_b_hh = need[-4:]
        input_parts, state_parts = pack.input.cpu_parts(steps * n), pack.state.cpu_parts(steps * n)
        rows = x.reshape(steps * n, -1)
        bias = dgates.sum(0) if need_b_ih or (lstm and need_b_hh) else None
        return (
            kernels.dx_kernel(dgates, weight_ih, *input_parts).view(x.shape) if need[0] else None,
            None,
            *(d if wanted else None for d, wanted in zip(dfirst, need[2:], strict=False)),
            kernels.dw_kernel(dgates, rows, *input_parts) if need_ih else None,
            kernels.dw_kernel(dback, before, *state_parts) if need_hh else None,
            bias if need_b_ih else None,
            (bias if lstm else dback.sum(0)) if need_b_hh else None,
        )


def _again(
    ctx: Any, x: Tensor, state: tuple[Tensor, ...], parameters: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients through products that can be differentiated once more, the forward pass run again."""
    inputs = (x, None, *state, *parameters)
    wanted, again = [i for i, need in enumerate(ctx.needs_input_grad) if need], torch.is_grad_enabled()
    with torch.enable_grad():
        outputs = _by_steps(x, state, parameters, *ctx.job)
        found = torch.autograd.grad(
            outputs, [t for i in wanted if (t := inputs[i]) is not None], grads, create_graph=again
        )
    result: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        result[i] = gradient
    return tuple(result)
