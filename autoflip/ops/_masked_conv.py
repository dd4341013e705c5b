"""Masked convolution's registered ops, derivatives and FLOP formulas.

Three bilinear maps, each of which is the gradient of the other two: ``forward(x, w)``, ``dx(dy, w)`` and
``dw(dy, x)``. Training calls the kernels directly; under a dispatch mode (FlopCounterMode) the registered ops run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from autoflip.ops import _masked_kernels as kernels
from autoflip.ops import _masked_weight as weights
from autoflip.ops._masked_conv_kernels import (
    Gradients,
    Parts,
    cpu_backward,
    cpu_forward,
    dense_backward,
    outputs,
    plan,
    reach,
)

# --- registered ops


def _forward_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    parts = Parts(*rest)
    if parts.path[0] == "s":
        return cpu_forward(x, weight, bias, parts)[0].contiguous()
    return F.conv2d(
        x, weights.operand(weight, parts.mask), bias, parts.stride, parts.padding, parts.dilation
    ).contiguous()


def _x_like(dy: Tensor, weight: Tensor, parts: Parts) -> Tensor:
    # the one size of these outputs that is a multiple of the stride
    least = [
        (dy.shape[2 + i] - 1) * parts.stride - 2 * parts.padding[i] + far + 1 for i, far in enumerate(reach(parts))
    ]
    high, wide = (-(-size // parts.stride) * parts.stride for size in least)
    return dy.new_empty(1).expand(dy.shape[0], weight.shape[1], high, wide)


def _dx_kernel(dy: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    parts = Parts(*rest)
    x = _x_like(dy, weight, parts)
    if parts.path[1] == "s":
        dx = cpu_backward(dy, x, weight, parts, Gradients(True, False, False)).dx
    else:
        dx, _ = dense_backward(dy, x, weights.operand(weight, parts.mask), parts, (True, False))
    assert dx is not None
    return dx.contiguous()


def _dw_kernel(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    parts = Parts(*rest)
    if parts.path[2] == "s":
        dw = cpu_backward(dy, x, x, parts, Gradients(False, True, False)).dw
    else:
        _, dw = dense_backward(dy, x, x.new_empty(1).expand(parts.mask.shape), parts, (False, True))
    assert dw is not None
    return dw.contiguous()


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    parts = Parts(*rest)
    high, wide = (outputs(x.shape[2 + i], far, parts.padding[i], parts.stride) for i, far in enumerate(reach(parts)))
    return x.new_empty(x.shape[0], weight.shape[0], high, wide)


def _fake_dx(dy: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty(_x_like(dy, weight, Parts(*rest)).shape)


_PARTS = (
    "Tensor mask, Tensor forward, Tensor dx, Tensor dw, int kept, int[] padding, int[] dilation, int stride, str path"
)
_lib = torch.library.Library("autoflip", "FRAGMENT")


def _register(name: str, arguments: str, kernel: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    _lib.define(f"{name}({arguments}, {_PARTS}) -> Tensor")
    _lib.impl(name, kernel, "CPU")
    torch.library.register_fake(f"autoflip::{name}", fake, lib=_lib)
    return getattr(torch.ops.autoflip, name).default


forward_op = _register("masked_conv2d", "Tensor x, Tensor weight, Tensor? bias", _forward_kernel, _fake_forward)
dx_op = _register("masked_conv2d_dx", "Tensor dy, Tensor weight", _dx_kernel, _fake_dx)
dw_op = _register(
    "masked_conv2d_dw", "Tensor dy, Tensor x", _dw_kernel, lambda dy, x, mask, *_: dy.new_empty(mask.shape)
)


def _flops(step: str) -> Callable[..., int]:
    def count(a: Tensor, b: Tensor, *rest: Any, out_val: Any = None, **_: Any) -> int:
        parts = Parts(*rest[-9:])
        maps = a if step != "forward" else out_val  # y or dy: each of its positions uses each kept weight once
        weights = parts.kept if parts.path[kernels.STEPS.index(step)] == "s" else parts.mask.numel()
        return 2 * len(maps) * maps.shape[2] * maps.shape[3] * weights

    return count


for _op, _step in ((forward_op, "forward"), (dx_op, "dx"), (dw_op, "dw")):
    register_flop_formula(_op.overloadpacket, get_raw=True)(_flops(_step))


# --- derivatives of the ops


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.parts = inputs[-9:]
    ctx.save_for_backward(*inputs[:2])


def _forward_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        dx_op(dy, weight, *ctx.parts) if need[0] else None,
        dw_op(dy, x, *ctx.parts) if need[1] else None,
        _bias_gradient(dy, x, weight, Parts(*ctx.parts), need) if need[2] else None,
        *(None,) * 9,
    )


def _bias_gradient(dy: Tensor, x: Tensor, weight: Tensor, parts: Parts, need: Sequence[bool]) -> Tensor:
    """Return the sums of ``dy``, added up in the order in which the step does it where no mode looks on."""
    sparse = any(need[i] and parts.path[1 + i] == "s" for i in (0, 1))
    if sparse and not torch.is_grad_enabled() and weights.counted(dy, x, weight):
        found: Tensor = cpu_backward(dy, x, weight, parts, Gradients(False, False, True)).db
        return found
    return dy.sum((0, 2, 3))


def _dx_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        forward_op(g, weight, None, *ctx.parts) if need[0] else None,
        dw_op(dy, g, *ctx.parts) if need[1] else None,
        *(None,) * 9,
    )


def _dw_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, x = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        forward_op(x, g, None, *ctx.parts) if need[0] else None,
        dx_op(dy, g, *ctx.parts) if need[1] else None,
        *(None,) * 9,
    )


for _name, _backward in (("", _forward_backward), ("_dx", _dx_backward), ("_dw", _dw_backward)):
    torch.library.register_autograd(f"autoflip::masked_conv2d{_name}", _backward, setup_context=_save, lib=_lib)


# --- the way that training on a CPU takes


class Job(NamedTuple):
    """What a step takes beside its tensors."""

    parts: Parts
    plan: Any  # kernels.plan's


def make_job(x: Tensor, weight: Tensor, parts: Parts) -> Job:
    """Return the job of all tensors of these sizes and formats."""
    return Job(parts, plan(x, weight, parts))


def _step_forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> Tensor:
    parts = job.parts
    ctx.job, ctx.panel = job, None
    ctx.save_for_backward(x, weight)
    if parts.path[0] == "d":
        return F.conv2d(x, weights.operand(weight, parts.mask), bias, parts.stride, parts.padding, parts.dilation)
    y, made = cpu_forward(x, weight, bias, parts)
    if parts.path[2] == "s" and ctx.needs_input_grad[1]:
        ctx.panel = made
    return y


def _step_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *_ = ctx.saved_tensors
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    parts: Parts = ctx.job.parts
    if torch.is_grad_enabled() or not weights.kernel_here(dy):  # a second derivative is wanted, or a transform
        db = dy.sum((0, 2, 3)) if need_b else None
        return *dense_backward(dy, x, weights.select(weight, parts.mask), parts, (need_x, need_w)), db, None
    sparse_x, sparse_w = need_x and parts.path[1] == "s", need_w and parts.path[2] == "s"
    dx = dw = db = None
    if sparse_x or sparse_w:
        made, ctx.panel = ctx.panel, None  # a second backward pass makes its own
        wanted = Gradients(sparse_x, sparse_w, need_b)
        dx, dw, db = cpu_backward(dy, x, weight, parts, wanted, x_panel=made)
    elif need_b:
        db = dy.sum((0, 2, 3))
    if (need_x and not sparse_x) or (need_w and not sparse_w):
        left = need_x and not sparse_x, need_w and not sparse_w
        others = dense_backward(dy, x, weights.operand(weight, parts.mask), parts, left)
        dx, dw = dx if others[0] is None else others[0], dw if others[1] is None else others[1]
    return dx, dw, db, None


class _Conv(torch.autograd.Function):
    # the extension's own steps take jobs with a plan, and leave the others to these two
    if weights.CPP is not None:
        forward, backward = map(staticmethod, weights.CPP.masked_conv_steps(_step_forward, _step_backward))


_apply = super(torch.autograd.Function, _Conv).apply  # type: ignore[misc]


def conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> Tensor:
    """Return the convolution where ``weights.kernel_here`` holds for all three."""
    return _apply(x, weight, bias, job)  # type: ignore[no-any-return]
