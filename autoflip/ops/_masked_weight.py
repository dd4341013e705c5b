"""``where(mask, weight, 0)``, and when the CPU extension may be asked for it or for anything else."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from autoflip.ops import backend

CPP: Any = backend.extension("_C")[0]
_PARAMETER = torch.nn.Parameter
# bound once: kernel_here is asked twice a training step, and each microsecond is two percent of a small layer's
_depth, _stack = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_tracing, _compiling = torch._C._is_tracing, torch.compiler.is_compiling
# is_grads_batched=True runs under an older vmap that functorch's stack does not show
_old_vmap = torch._C._functorch.is_legacy_batchedtensor


def channels_last(tensor: Tensor) -> bool:
    """Tell whether a tensor lies in memory with its channels last, by its strides: sizes of 1 leave both open."""
    if tensor.ndim != 4 or tensor.stride(1) != 1 or tensor.stride(3) != tensor.shape[1] or tensor.stride(0) == 1:
        return False  # stride(0) == 1: one entry a sample has no order
    return tensor.is_contiguous(memory_format=torch.channels_last)


def transformed(*tensors: Tensor) -> bool:
    """Tell whether a function transform (vmap, grad, jvp) or forward-mode AD is at work on the tensors."""
    return _stack() is not None or forward_ad._current_level >= 0 or any(map(_old_vmap, tensors))


def traced() -> bool:
    """Tell whether ``torch.jit.trace`` is at work, to which a kernel's result would look like a constant."""
    return not _compiling() and bool(_tracing())


def counted(*tensors: Tensor) -> bool:
    """Tell whether ordinary float32 CPU tensors meet a dispatch mode, say a counter of FLOPs.

    What is computed then are the bits that are computed without it.
    """
    if _compiling() or traced() or transformed(*tensors):
        return False
    if not _depth() or backend.serve("masked_matmul", torch.device("cpu")) != "cpp":
        return False
    return all(type(t) in (Tensor, _PARAMETER) and t.dtype is torch.float32 and t.is_cpu for t in tensors)


def has_memory(t: Tensor) -> bool:
    """Tell whether ``t`` is an ordinary tensor outside any dispatch mode, so that its address means something."""
    return type(t) in (Tensor, _PARAMETER) and not _depth()


if CPP is not None:
    CPP.masked_meet(
        {
            "tensor": Tensor,
            "parameter": _PARAMETER,
            "float32": torch.float32,
            "float64": torch.float64,
            "float16": torch.float16,
            "bfloat16": torch.bfloat16,
            "modes": _depth,
            "tracing": _tracing,
            "transforms": _stack,
            "batched": _old_vmap,
            "forward_ad": vars(forward_ad),
            "strided": torch.strided,
            "grad_enabled": torch.is_grad_enabled,
            "autocast": torch.is_autocast_enabled,
            "threads": torch.get_num_threads,
        }
    )


def kernel_here(*tensors: Tensor) -> bool:
    """Tell whether the CPU extension may read the tensors: float32 on the CPU, addresses, no transform or trace."""
    return CPP is not None and not _compiling() and CPP.masked_kernel_here(*tensors)


def _word(tensor: Tensor) -> int:
    """Return the bytes of an entry where the CPU extension may read a floating tensor, see kernel_here; else 0."""
    return CPP.masked_word_here(tensor) if CPP is not None and not _compiling() else 0


# whether a layer's step may go the way that it went before; asked only of what went it before
again: Any = None if CPP is None else CPP.masked_linear_again


def looker(mask: Tensor) -> Callable[[Tensor], bool] | None:
    """Return a function that tells whether a weight is contiguous floats on the CPU and zero wherever it is pruned.

    None where the CPU extension cannot look. Not to be called where torch.compile is at work.
    """
    if CPP is None or not mask.is_cpu or not mask.is_contiguous():
        return None
    found: Callable[[Tensor], bool] = CPP.masked_look(mask.data_ptr(), mask.numel(), mask)
    return found


def gradient_hook(mask: Tensor) -> Callable[[Tensor], Tensor | None]:
    """Return a hook for a parameter that sets its gradient to zero wherever ``mask`` is not set.

    The gradient is written in place where autograd alone holds it and wants no derivative of it: what is returned in
    its place costs a small layer's step a quarter.
    """
    otherwise = partial(_masked_gradient, mask)
    if CPP is None or not mask.is_cpu or not mask.is_contiguous():
        return otherwise
    _count_holders()
    hook: Callable[[Tensor], Tensor | None] = CPP.masked_hook(mask.data_ptr(), mask.numel(), otherwise)
    return hook


def _masked_gradient(mask: Tensor, gradient: Tensor) -> Tensor:
    return select(gradient, mask if mask.device == gradient.device else mask.to(gradient.device))


@cache
def _count_holders() -> None:
    """Show the extension gradients that autograd alone holds: how many references that is differs between torchs."""
    # autocast would cast the weight, and so hold a gradient of the cast beside ours
    plain = torch.autocast("cpu", enabled=False)
    alone = temporarily_clear_interpreter_stack()  # the first call may be inside a function transform
    with _disable_current_modes(), alone, torch.inference_mode(False), torch.enable_grad(), plain:
        weight = torch.zeros(2, 2, requires_grad=True)
        weight.register_hook(CPP.masked_gradient_probe)
        (2 * weight).sum().backward()
        torch.nn.functional.linear(torch.zeros(1, 2), weight).sum().backward()  # a view: turned round


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.mask = mask
        return _select_kernel(weight, mask)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return select(g, ctx.mask), None


def _select_kernel(weight: Tensor, mask: Tensor) -> Tensor:
    mask, weight = mask.contiguous(), weight.contiguous()
    out = weight.new_empty(weight.shape)
    sizes = mask.numel(), weight.element_size()
    CPP.masked_matmul_select(weight.data_ptr(), mask.data_ptr(), *sizes, out.data_ptr(), torch.get_num_threads())
    return out


def select(weight: Tensor, mask: Tensor) -> Tensor:
    """Return ``torch.where(mask, weight, 0)``, on the CPU about 20 times as fast; equal shapes, any number of dims."""
    if weight.layout is torch.sparse_coo:  # an embedding's gradient: rows
        found = weight.coalesce()
        values = torch.where(mask[found.indices().unbind()], found.values(), 0)
        return torch.sparse_coo_tensor(found.indices(), values, found.shape, is_coalesced=True, check_invariants=False)
    if not _word(weight):
        return torch.where(mask, weight, 0)
    if weight.requires_grad and torch.is_grad_enabled():
        return _Select.apply(weight, mask)
    return _select_kernel(weight, mask)


def is_clean(weight: Tensor, mask: Tensor) -> bool | None:
    """Tell whether all pruned entries are zero; None where the CPU extension cannot look."""
    bytes_each = _word(weight)
    if not (bytes_each and weight.is_contiguous() and mask.is_contiguous()):
        return None
    return bool(CPP.masked_matmul_is_clean(weight.data_ptr(), mask.data_ptr(), mask.numel(), bytes_each))


def operand(weight: Tensor, mask: Tensor) -> Tensor:
    """Return what the dense path multiplies by: ``weight`` itself where its pruned entries are zero already.

    Layers keep them at zero, and to look (read only) costs a third of a masked copy or less; a copy of a 784x200
    weight costs half of its product with 32 rows.
    """
    return weight if is_clean(weight, mask) else select(weight, mask)
