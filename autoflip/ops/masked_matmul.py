"""Multiply by the kept weights only: ``y = act(x @ (w * mask).T + b)``, with every derivative."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from autoflip.ops import _masked_matmul as steps
from autoflip.ops import _masked_weight as weights
from autoflip.ops.narrow import narrow_linear
from autoflip.ops.pack import Pack

__all__ = ["Pack", "masked_linear", "masked_matmul", "masked_weight", "version_of", "zero_pruned"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pack: Pack, activation: str | None = None) -> Tensor:
    """Apply a linear layer whose pruned weights do no work: ``y = act(x @ (weight * mask).T + bias)``.

    Args:
        x: ``(..., K)``, float32, bfloat16, float16 or float64.
        weight: ``(O, K)``, dtype and device of ``x``; what stands at pruned entries is ignored.
        bias: ``(O,)`` or None.
        pack: ``Pack(mask)``, made once per mask.
        activation: None, "relu" (fused into the sparse kernel) or "gelu" (exact, a second pass over the result).

    Returns:
        ``(..., O)``, dtype of ``x``. The gradient of ``weight`` is exactly zero at pruned entries.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``2 * N * pack.kept`` FLOPs on the sparse path (CPU, float32, see :mod:`autoflip.ops.paths`; bfloat16, float16
    and autocast where widening pays, see :mod:`autoflip.ops.narrow`), the same for each gradient; ``2 * N * O * K`` on
    the dense path.
    """
    if activation == "gelu":
        return F.gelu(masked_linear(x, weight, bias, pack))
    if activation not in (None, "relu"):
        raise ValueError(f"masked_linear: activation={activation!r}; wanted None, 'relu' or 'gelu'")
    job = linear_job(x, weight, bias, pack, relu=activation == "relu")
    if job is not None:
        return steps.linear_step(x, weight, bias, job)
    y = narrow_linear(x, weight, bias, pack, relu=activation == "relu")
    if y is not None:
        return y
    if torch.is_autocast_enabled(x.device.type) or weights.traced():
        y = F.linear(x, weights.select(weight, pack.mask), bias)
        return y.relu() if activation else y
    _check(x, weight, bias, pack.mask, "masked_linear")
    if x.dim() != 2:
        rows = x.reshape(x.shape[:-1].numel(), weight.shape[1])
        return masked_linear(rows, weight, bias, pack, activation).reshape(*x.shape[:-1], weight.shape[0])
    return steps.linear(x, weight, bias, pack.parts(x.shape[0]), relu=activation == "relu")


def linear_job(x: Tensor, weight: Tensor, bias: Tensor | None, pack: Pack, *, relu: bool = False) -> steps.Job | None:
    """Return what :func:`linear_step` takes, where the CPU extension serves these tensors; else None."""
    here = (
        x.dim() == 2
        and (weights.kernel_here(x, weight) if bias is None else weights.kernel_here(x, weight, bias))
        and weight.shape == pack.mask.shape
        and x.shape[1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and not torch.is_autocast_enabled("cpu")
    )
    return pack.cpu_job(x.shape[0], relu=relu) if here else None


def masked_matmul(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Multiply by the kept weights only: ``y = x @ (weight * mask).T``.

    The mask's Pack is remembered as long as the mask lives and is not changed; loops that make a new mask
    tensor per call should make the Pack themselves and call :func:`masked_linear`. Under ``torch.compile``
    the dense path is taken.

    Args:
        x: ``(N, K)``, float32, bfloat16, float16 or float64.
        weight: ``(O, K)``, dtype and device of ``x``.
        mask: ``(O, K)``, bool, True = kept.

    Returns:
        ``(N, O)``, dtype of ``x``; sums are kept in float32 at least.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``2 * N * mask.sum()`` FLOPs on the sparse path, else ``2 * N * O * K``.
    Source: column buckets by row pattern are ours; row groups as in Gale et al., "Sparse GPU Kernels for Deep
    Learning", SC 2020.

    Example:
        >>> x, w = torch.ones(1, 3), torch.tensor([[1., 2., 4.]])
        >>> masked_matmul(x, w, torch.tensor([[True, False, True]]))
        tensor([[5.]])
    """
    if x.dim() != 2:
        raise ValueError(f"masked_matmul: x has shape {tuple(x.shape)}, wanted (N, K)")
    _check(x, weight, None, mask, "masked_matmul")
    if torch.compiler.is_compiling():
        return F.linear(x, torch.where(mask, weight, 0))
    return masked_linear(x, weight, None, _pack_of(mask))


def masked_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """Set pruned entries to zero: ``torch.where(mask, weight, 0)``, NaN at a pruned entry included.

    Args:
        weight: any shape, any float dtype.
        mask: shape and device of ``weight``, bool, True = kept.

    Returns:
        A new tensor like ``weight``; its gradient is exactly zero at pruned entries.

    Raises:
        ValueError: ``mask`` is not a bool tensor shaped like ``weight``.

    Cost: 0 FLOPs, 9 bytes moved per float32 entry.
    """
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"masked_weight: mask has shape {tuple(mask.shape)} and dtype {mask.dtype} but weight has "
            f"{tuple(weight.shape)}; a bool mask covers its weight entry by entry"
        )
    return weights.select(weight, mask)


def zero_pruned(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write zeros at the pruned entries, in place, of the tensors in which one of them is not zero.

    The others are only read: a backward pass that saved them still works. Nothing is looked at or written under
    ``torch.compile``, ``torch.jit.trace``, a function transform or CUDA graph capture, nor in tensors without data.

    Args:
        pairs: tensor and its mask: equal shapes and devices, bool, True = kept.

    Cost: 0 FLOPs, 5 bytes read per float32 entry; one wait for each device that is not the CPU.
    """
    if torch.compiler.is_compiling() or weights.traced():
        return
    if torch._C._len_torch_dispatch_stack() and detect_fake_mode() is not None:
        return
    with torch.no_grad():
        looks: list[tuple[Tensor, Tensor, bool | Tensor]] = []
        for tensor, mask in pairs:
            clean = weights.is_clean(tensor, mask)
            if clean is not None:
                looks.append((tensor, mask, not clean))
            elif _readable(tensor):
                # not yet a bool: all looks are on their way to the device before the first is waited for
                looks.append((tensor, mask, torch.where(mask, 0, tensor).any()))
        for tensor, mask, dirty in looks:
            if dirty:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(torch.where(mask, tensor, 0))


def _readable(tensor: Tensor) -> bool:
    capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (capturing or tensor.is_meta or isinstance(tensor, FakeTensor) or weights.transformed(tensor))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, op: str) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; wanted (..., K) and (O, K)"
        )
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"{op}: mask has shape {tuple(mask.shape)} and dtype {mask.dtype} but weight has "
            f"{tuple(weight.shape)}; a bool mask covers its weight entry by entry. "
            "Did the layer get compacted after the mask was made?"
        )
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        raise ValueError(
            f"{op}: x is {x.dtype} and weight is {weight.dtype}; wanted one dtype of "
            f"{', '.join(map(str, _DTYPES))} for both. Convert one with .to(dtype)"
        )
    if weight.device != x.device or mask.device != x.device:
        raise ValueError(
            f"{op}: x is on {x.device}, weight on {weight.device}, mask on {mask.device}; "
            "wanted all on one device. Move the module with .to(device)"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"{op}: bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}, wanted {x.dtype} "
            f"({weight.shape[0]},) on {x.device}"
        )


def version_of(tensor: Tensor) -> int:
    """Return the count of in-place writes to a tensor; 0 for inference tensors, which keep none."""
    return 0 if tensor.is_inference() else tensor._version


_packs: dict[int, tuple[weakref.ref, int, Pack]] = {}


def _pack_of(mask: Tensor) -> Pack:
    key, version = id(mask), version_of(mask)
    if (found := _packs.get(key)) and found[0]() is mask and found[1] == version:
        return found[2]
    # the Pack must not hold the key itself, or the mask would live for good
    pack = Pack(mask.detach())
    _packs[key] = (weakref.ref(mask, lambda _: _packs.pop(key, None)), version, pack)
    return pack
