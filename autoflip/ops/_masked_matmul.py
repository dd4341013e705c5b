"""Masked matmul below its checks: which kernel runs, the registered ops, autograd and FLOP formulas.

Three bilinear maps, each of which is the gradient of the other two, so that every order of derivative exists:
``linear(x, w)`` (N, K) x (O, K) -> (N, O), ``dx(dy, w)`` -> (N, K) and ``dw(dy, x)`` -> (O, K), the last two
also known as the gradients of the first. Each one is a registered op; in eager mode its kernel is called
directly (a registered call costs 10 to 25 us more), under ``torch.compile`` or any dispatch mode
(FlopCounterMode, fake tensors) the op is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from autoflip.ops import backend

backend.register("masked_matmul", "cpp")

PATHS = ("auto", "sparse", "dense")
# PLACEHOLDER
CROSSOVER = {
    "avx512": {"forward": 0.5, "dx": 0.5, "dw": 0.5},
    "avx2": {"forward": 0.3, "dx": 0.3, "dw": 0.3},
    "base": {"forward": 0.1, "dx": 0.1, "dw": 0.1},
}
LEAST_WORK = 1 << 20


class Parts(NamedTuple):
    """What the ops take of a Pack: see ``autoflip.ops.masked_matmul.Pack``."""

    mask: Tensor
    layout: Tensor
    layout_t: Tensor
    kept: int
    path: str


def crossover() -> dict[str, float]:
    """Return, by step, the density below which this machine's CPU kernel is used; empty without a kernel."""
    module, _ = backend.extension("_C")
    return CROSSOVER[module.isa()] if module else {}


def path(n_rows: int, out_features: int, in_features: int, density: float, *, step: str = "forward") -> str:
    """Return "sparse" where the CPU kernel is known to beat the dense product, else "dense".

    A rule on numbers that were measured once, never a timing at run time: the path decides the order of
    float32 sums, and a run must repeat bit for bit.

    Args:
        n_rows: rows of ``x`` (all leading dimensions multiplied).
        out_features: rows of the weight.
        in_features: columns of the weight.
        density: kept share of the weight, 0 to 1.
        step: "forward", "dx" or "dw".
    """
    if n_rows * out_features * in_features < LEAST_WORK:
        return "dense"
    return "sparse" if density < crossover().get(step, 0.0) else "dense"


def serves(a: Tensor, n: int, mask: Tensor, kept: int, want: str, step: str) -> str:
    """Return what runs a step on ``n`` rows of ``a``'s dtype and device: "cpp", "cuda", "triton" or "dense"."""
    kind = a.device.type
    if want == "dense" or kind not in ("cpu", "cuda"):
        return "dense"
    name = backend.serve("masked_matmul", a.device)
    if name == "cpp":
        rows, cols = mask.shape
        density = kept / mask.numel() if mask.numel() else 1.0
        fast = want == "sparse" or path(n, rows, cols, density, step=step) == "sparse"
        return "cpp" if a.dtype is torch.float32 and fast else "dense"
    # no GPU has measured the others against dense: they run when asked for by name
    if name == "reference" or (want != "sparse" and os.environ.get("AUTOFLIP_BACKEND", "auto") == "auto"):
        return "dense"
    return name if a.dtype is torch.float32 else "dense"


def make_layout(mask: Tensor, *, transposed: bool) -> Tensor:
    """Return the CPU kernel's layout (uint8) of a contiguous 2-d CPU mask or of its transpose."""
    kernels = backend.extension("_C")[0]
    assert kernels is not None
    rows, cols = mask.shape
    layout = torch.empty(kernels.masked_matmul_layout_bound(rows, cols, transposed), dtype=torch.uint8)
    size = kernels.masked_matmul_layout(mask.data_ptr(), rows, cols, transposed, layout.data_ptr())
    return layout[:size].clone()


# --- where(mask, weight, 0): the dense path's weight


def _transformed(*tensors: Tensor) -> bool:
    """Tell whether a function transform (vmap, grad, jvp) is at work on the tensors."""
    # is_grads_batched=True runs under an older vmap that functorch's stack does not show
    old_vmap = torch._C._functorch.is_legacy_batchedtensor
    return torch._C._functorch.peek_interpreter_stack() is not None or any(old_vmap(t) for t in tensors)


def _has_memory(t: Tensor) -> bool:
    """Tell whether ``t`` is an ordinary tensor outside any dispatch mode, so that its address means something."""
    return type(t) in (Tensor, torch.nn.Parameter) and not torch._C._len_torch_dispatch_stack()


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.mask = mask
        return _select_kernel(weight, mask)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return select(g, ctx.mask), None


def _select_kernel(weight: Tensor, mask: Tensor) -> Tensor:
    out = torch.empty(weight.shape)
    mask, weight = mask.contiguous(), weight.contiguous()
    backend.extension("_C")[0].masked_matmul_select(  # type: ignore[union-attr]
        weight.data_ptr(), mask.data_ptr(), mask.numel(), out.data_ptr(), torch.get_num_threads()
    )
    return out


def select(weight: Tensor, mask: Tensor) -> Tensor:
    """Return ``torch.where(mask, weight, 0)``, on the CPU about 20 times as fast; equal shapes, any number of dims."""
    if (
        torch.compiler.is_compiling()
        or not (weight.dtype is torch.float32 and weight.device.type == "cpu" and _has_memory(weight))
        or _transformed(weight)
        or backend.serve("masked_matmul", weight.device) != "cpp"
    ):
        return torch.where(mask, weight, 0)
    if weight.requires_grad and torch.is_grad_enabled():
        return _Select.apply(weight, mask)
    return _select_kernel(weight, mask)


# --- the three kernels; every tensor is checked by the caller, 2-d, of one dtype and on one device


def _linear_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    mask: Tensor,
    layout: Tensor,
    layout_t: Tensor,
    kept: int,
    want: str,
) -> Tensor:
    name = serves(x, len(x), mask, kept, want, "forward")
    if name == "dense":
        y = F.linear(x, select(weight, mask), bias)
        return y.relu_() if relu else y
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty(len(x), len(mask))
    if name == "cpp":
        backend.extension("_C")[0].masked_matmul_forward(  # type: ignore[union-attr]
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else (bias := bias.contiguous()).data_ptr(),
            layout.data_ptr(),
            *(len(x), *mask.shape),
            relu,
            y.data_ptr(),
            torch.get_num_threads(),
        )
    return y


def _dx_kernel(
    dy: Tensor, weight: Tensor, mask: Tensor, layout: Tensor, layout_t: Tensor, kept: int, want: str
) -> Tensor:
    name = serves(dy, len(dy), mask, kept, want, "dx")
    if name == "dense":
        return dy @ select(weight, mask)
    dy, weight = dy.contiguous(), weight.contiguous()
    dx = dy.new_empty(len(dy), mask.shape[1])
    if name == "cpp":
        backend.extension("_C")[0].masked_matmul_dx(  # type: ignore[union-attr]
            dy.data_ptr(),
            weight.data_ptr(),
            layout_t.data_ptr(),
            *(len(dy), *mask.shape),
            dx.data_ptr(),
            torch.get_num_threads(),
        )
    return dx


def _dw_kernel(dy: Tensor, x: Tensor, mask: Tensor, layout: Tensor, layout_t: Tensor, kept: int, want: str) -> Tensor:
    name = serves(dy, len(dy), mask, kept, want, "dw")
    if name == "dense":
        return select(dy.T @ x, mask)
    dy, x = dy.contiguous(), x.contiguous()
    dw = dy.new_zeros(mask.shape)
    if name == "cpp":
        backend.extension("_C")[0].masked_matmul_dw(  # type: ignore[union-attr]
            dy.data_ptr(),
            x.data_ptr(),
            layout.data_ptr(),
            *(len(dy), *mask.shape),
            dw.data_ptr(),
            torch.get_num_threads(),
        )
    return dw


# --- registration

_PARTS = "Tensor mask, Tensor layout, Tensor layout_t, int kept, str want"
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
    _linear_kernel,
    lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
)
_dx_op = _register(
    "masked_linear_dx",
    "Tensor dy, Tensor weight",
    _dx_kernel,
    lambda dy, weight, *_: dy.new_empty(dy.shape[0], weight.shape[1]),
)
_dw_op = _register(
    "masked_linear_dw",
    "Tensor dy, Tensor x",
    _dw_kernel,
    lambda dy, x, *_: dy.new_empty(dy.shape[1], x.shape[1]),
)


def _flops(step: str) -> Callable[..., int]:
    def count(a: Tensor, b: Tensor, *rest: Any, out_val: Any = None, **_: Any) -> int:
        mask, _layout, _layout_t, kept, want = rest[-5:]
        sparse = serves(a, len(a), mask, kept, want, step) != "dense"
        return 2 * len(a) * (kept if sparse else mask.numel())

    return count


for _op, _step in ((_linear_op, "forward"), (_dx_op, "dx"), (_dw_op, "dw")):
    # executed multiply-adds, two FLOPs each: a tile-skipping GPU kernel is counted by its kept entries too
    register_flop_formula(_op.overloadpacket, get_raw=True)(_flops(_step))


# --- autograd: the same two functions serve the eager Functions and the registered ops


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, *_ = inputs
    *_, mask, layout, layout_t, kept, want = inputs
    ctx.parts = Parts(mask, layout, layout_t, kept, want)
    ctx.save_for_backward(a, b)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, relu, mask, layout, layout_t, kept, want = inputs
    ctx.parts = Parts(mask, layout, layout_t, kept, want)
    ctx.save_for_backward(x, weight, output if relu else None)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    if y is not None:
        dy = torch.where(y > 0, dy, 0)
    need = ctx.needs_input_grad
    return (
        dx(dy, weight, ctx.parts) if need[0] else None,
        dw(dy, x, ctx.parts) if need[1] else None,
        dy.sum(0) if need[2] else None,
        *(None,) * 6,
    )


def _dx_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        linear(g, weight, None, ctx.parts) if need[0] else None,
        dw(dy, g, ctx.parts) if need[1] else None,
        *(None,) * 5,
    )


def _dw_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, x = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        linear(x, g, None, ctx.parts) if need[0] else None,
        dx(dy, g, ctx.parts) if need[1] else None,
        *(None,) * 5,
    )


def _function(name: str, op: Any, kernel: Callable[..., Tensor], save: Any, backward: Any) -> Callable[..., Tensor]:
    """Return a callable that takes the shortest way into one op which the caller's situation allows."""
    torch.library.register_autograd(f"autoflip::{name}", backward, setup_context=save, lib=_lib)

    def call(*args: Any) -> Tensor:
        if _has_memory(args[0]):
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
        if _transformed(args[0], args[1]):
            return kernel(*args[:-1], "dense")  # function transforms compose with plain torch, not with kernels
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args[:3]):
            return function.apply(*args)  # type: ignore[attr-defined]
        return call(*args)

    return run


_run_linear = _function("masked_linear", _linear_op, _linear_kernel, _save_linear, _linear_backward)
_run_dx = _function("masked_linear_dx", _dx_op, _dx_kernel, _save, _dx_backward)
_run_dw = _function("masked_linear_dw", _dw_op, _dw_kernel, _save, _dw_backward)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts, *, relu: bool = False) -> Tensor:
    """Return ``act(x @ (weight * mask).T + bias)``, (N, O)."""
    return _run_linear(x, weight, bias, relu, *parts)


def dx(dy: Tensor, weight: Tensor, parts: Parts) -> Tensor:
    """Return ``dy @ (weight * mask)``, (N, K)."""
    return _run_dx(dy, weight, *parts)


def dw(dy: Tensor, x: Tensor, parts: Parts) -> Tensor:
    """Return ``dy.T @ x`` where the mask is set and zero elsewhere, (O, K)."""
    return _run_dw(dy, x, *parts)
