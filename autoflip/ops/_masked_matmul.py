"""Masked matmul as registered ops with autograd and FLOP formulas.

Three bilinear maps, each of which is the gradient of the other two, so that every order of derivative exists:
``linear(x, w)`` (N, K) x (O, K) -> (N, O), ``dx(dy, w)`` -> (N, K) and ``dw(dy, x)`` -> (O, K). Each one is a
registered op; in eager mode its kernel is called directly (a registered call costs 10 to 25 us more), under
``torch.compile`` or any dispatch mode (FlopCounterMode, fake tensors) the op is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from autoflip.ops import _masked_kernels as kernels
from autoflip.ops import _masked_weight as weights
from autoflip.ops._masked_kernels import Parts

# --- registration

_PARTS = "Tensor mask, Tensor layout, int chunk, Tensor live, int kept, str path"
_lib = torch.library.Library("autoflip", "FRAGMENT")


def _register(name: str, arguments: str, kernel: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    _lib.define(f"{name}({arguments}, {_PARTS}) -> Tensor")
    for key in ("CPU", "CUDA"):
        _lib.impl(name, kernel, key)
    torch.library.register_fake(f"autoflip::{name}", fake, lib=_lib)
    return getattr(torch.ops.autoflip, name).default


_linear_op = _register(
    "masked_linear",
    "Tensor x, Tensor weight, Tensor? bias, bool relu",
    kernels.linear_kernel,
    lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
)
_dx_op = _register(
    "masked_linear_dx",
    "Tensor dy, Tensor weight",
    kernels.dx_kernel,
    lambda dy, weight, *_: dy.new_empty(dy.shape[0], weight.shape[1]),
)
_dw_op = _register(
    "masked_linear_dw",
    "Tensor dy, Tensor x",
    kernels.dw_kernel,
    lambda dy, x, *_: dy.new_empty(dy.shape[1], x.shape[1]),
)


def _flops(step: str) -> Callable[..., int]:
    def count(a: Tensor, b: Tensor, *rest: Any, out_val: Any = None, **_: Any) -> int:
        parts = Parts(*rest[-6:])
        every = parts.path[kernels.STEPS.index(step)] == "f"
        all_of_them = every or kernels.serves(a, parts, step) == "dense"
        return 2 * len(a) * (parts.mask.numel() if all_of_them else parts.kept)

    return count


for _op, _step in ((_linear_op, "forward"), (_dx_op, "dx"), (_dw_op, "dw")):
    register_flop_formula(_op.overloadpacket, get_raw=True)(_flops(_step))


# --- autograd: the same two functions serve the eager Functions and the registered ops


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.parts = Parts(*inputs[2:])
    ctx.save_for_backward(*inputs[:2])


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, relu, *rest = inputs
    ctx.parts = Parts(*rest)
    ctx.save_for_backward(x, weight, output if relu else None)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    if y is not None:
        dy = _relu_backward(dy, y)
    need = ctx.needs_input_grad
    return (
        dx(dy, weight, ctx.parts) if need[0] else None,
        dw(dy, x, ctx.parts) if need[1] else None,
        _bias_gradient(dy, ctx.parts, need) if need[2] else None,
        *(None,) * 7,
    )


def _bias_gradient(dy: Tensor, parts: Parts, need: Sequence[bool]) -> Tensor:
    """Return the sums of ``dy``, added up in the order in which the step does it where no mode looks on."""
    sparse = any(need[i] and parts.path[1 + i] != "d" for i in (0, 1))
    if sparse and not torch.is_grad_enabled() and weights.counted(dy):
        found = kernels.cpu_backward(dy, None, None, parts, db=True)[2]
        assert found is not None
        return found
    return dy.sum(0)


def _dx_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        linear(g, weight, None, ctx.parts) if need[0] else None,
        dw(dy, g, ctx.parts) if need[1] else None,
        *(None,) * 6,
    )


def _dw_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, x = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        linear(x, g, None, ctx.parts) if need[0] else None,
        dx(dy, g, ctx.parts) if need[1] else None,
        *(None,) * 6,
    )


def _function(name: str, op: Any, kernel: Callable[..., Tensor], save: Any, backward: Any) -> Callable[..., Tensor]:
    """Return a callable that takes the shortest way into one op which the caller's situation allows."""
    torch.library.register_autograd(f"autoflip::{name}", backward, setup_context=save, lib=_lib)

    def call(*args: Any) -> Tensor:
        if weights.has_memory(args[0]):
            return kernel(*args)
        return op(*args)

    def forward(ctx: Any, *args: Any) -> Tensor:
        y = call(*args)
        save(ctx, args, y)
        return y

    function = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )

    def run(*args: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return op(*args)
        if weights.transformed(args[0], args[1]):
            return kernel(*args[:-1], "ddd")  # function transforms compose with plain torch, not with kernels
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args[:3]):
            return function.apply(*args)  # type: ignore[attr-defined]
        return call(*args)

    return run


_run_linear = _function("masked_linear", _linear_op, kernels.linear_kernel, _save_linear, _linear_backward)
_run_dx = _function("masked_linear_dx", _dx_op, kernels.dx_kernel, _save, _dx_backward)
_run_dw = _function("masked_linear_dw", _dw_op, kernels.dw_kernel, _save, _dw_backward)


def _relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(dy, y, 0)


# --- the way that training on a CPU takes: one call forward, one back


# relu, parts, what returns a tensor for the weight's gradient, (O, K), whatever stands in it (None: any new one), and
# kernels.plan(parts)
Job = tuple[bool, Parts, Callable[[], Tensor] | None, Any]


def _step_forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> Tensor:
    relu, parts, *_ = ctx.job = job
    ctx.operand = ctx.values = None
    if parts.path[0] != "d":
        if parts.path[1] != "d" and ctx.needs_input_grad[0]:
            ctx.values = kernels.new_values(parts)
        y = kernels.cpu_forward(x, weight, bias, relu, parts, ctx.values)
    else:
        ctx.operand = weights.operand(weight, parts.mask)
        y = torch.nn.functional.linear(x, ctx.operand, bias)
        y = y.relu_() if relu else y
    ctx.save_for_backward(x, weight, y if relu else None)
    return y


def _step_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    if y is not None:
        dy = _relu_backward(dy, y)
    _, parts, new, _ = ctx.job
    if torch.is_grad_enabled() or not weights.kernel_here(dy):  # a second derivative is wanted, or a transform
        grad_x, grad_w = dx(dy, weight, parts) if need_x else None, dw(dy, x, parts) if need_w else None
        return grad_x, grad_w, dy.sum(0) if need_b else None, None
    sparse_x, sparse_w = need_x and parts.path[1] != "d", need_w and parts.path[2] != "d"
    grad_x = grad_b = None
    grad_w = None if not need_w else new() if new else dy.new_empty(parts.mask.shape)
    if sparse_x or sparse_w:
        target = grad_w if sparse_w else None
        grad_x, _, grad_b = kernels.cpu_backward(
            dy, x, weight, parts, dx=sparse_x, dw=target, db=need_b, values=ctx.values
        )
    elif need_b:
        grad_b = dy.sum(0)
    if need_x and not sparse_x:
        grad_x = dy @ (ctx.operand if ctx.operand is not None else weights.operand(weight, parts.mask))
    if grad_w is not None and not sparse_w:
        kernels.cpu_outer(dy, x, parts, grad_w)
    return grad_x, grad_w, grad_b, None


class _Linear(torch.autograd.Function):
    # the extension's own steps take jobs with a plan and no relu, and leave the others to these two
    if weights.CPP is not None:
        forward, backward = map(staticmethod, weights.CPP.masked_steps(_step_forward, _step_backward))


# without torch's look for function transforms, which the caller has had: 3 us of some 50
_apply_linear = super(torch.autograd.Function, _Linear).apply  # type: ignore[misc]


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> Tensor:
    """Do what :func:`linear` does where ``weights.kernel_here`` of all tensors, in fewer steps."""
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _apply_linear(x, weight, bias, job)
    relu, parts, *_ = job
    if parts.path[0] == "d":
        return kernels.linear_kernel(x, weight, bias, relu, *parts)
    return kernels.cpu_forward(x, weight, bias, relu, parts)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts, *, relu: bool = False) -> Tensor:
    """Return ``act(x @ (weight * mask).T + bias)``, (N, O)."""
    return _run_linear(x, weight, bias, relu, *parts)


def dx(dy: Tensor, weight: Tensor, parts: Parts) -> Tensor:
    """Return ``dy @ (weight * mask)``, (N, K)."""
    return _run_dx(dy, weight, *parts)


def dw(dy: Tensor, x: Tensor, parts: Parts) -> Tensor:
    """Return ``dy.T @ x`` where the mask is set and zero elsewhere, (O, K)."""
    return _run_dw(dy, x, *parts)
