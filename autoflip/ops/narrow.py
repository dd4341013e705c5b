"""Masked products in bfloat16 and float16 on a CPU: the float32 kernels where they are faster than the dense product.

The kernels multiply float32 only. Widened operands lose nothing and sums are float32; the result is rounded once, as
that of torch's own dense product of the narrow type is. Under autocast the weight is float32 already and is not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from autoflip.ops import _masked_conv as conv_steps
from autoflip.ops import _masked_matmul as linear_steps
from autoflip.ops import _masked_weight as weights
from autoflip.ops import conv_paths, trials
from autoflip.ops.batches import bucket
from autoflip.ops.pack import Pack

if TYPE_CHECKING:
    from autoflip.ops.masked_conv import ConvPack

__all__ = ["narrow_conv2d", "narrow_linear"]

_NARROW = (torch.bfloat16, torch.float16)
_Layer = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x, weight, bias -> y


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pack: Pack, *, relu: bool = False) -> Tensor | None:
    """Return ``act(x @ (weight * mask).T + bias)``, rounded once to bfloat16 or float16.

    Args:
        x: ``(..., K)``.
        weight: ``(O, K)``.
        bias: ``(O,)`` or None.
        pack: of the mask.
        relu: apply it.

    Returns:
        ``(..., O)``; None where the types are not narrow, or the dense product is as fast.
    """
    narrow = _narrow_type(x, weight)
    if narrow is None or x.dim() < 1 or weight.shape != pack.mask.shape or x.shape[-1] != weight.shape[1]:
        return None
    n_rows = x.shape[:-1].numel()
    parts = pack.parts(n_rows)
    if not n_rows or not parts.layout.numel():
        return None

    def wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weights.kernel_here(x, weight):
            return linear_steps.linear_step(x, weight, bias, pack.cpu_job(len(x), relu=relu))
        return linear_steps.linear(x, weight, bias, parts, relu=relu)

    rows = x.reshape(n_rows, x.shape[-1])
    if not _faster(pack, f"path {parts.path}", bucket(n_rows), rows, weight, narrow, F.linear, wide):
        return None
    return _rounded(wide, rows, weight, bias, narrow).reshape(*x.shape[:-1], len(weight))


def narrow_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, pack: ConvPack) -> Tensor | None:
    """Return ``conv2d(x, weight * mask, bias)``, one group, rounded once to bfloat16 or float16.

    Args:
        x: ``(N, C, H, W)``.
        weight: ``(O, C, KH, KW)``.
        bias: ``(O,)`` or None.
        pack: of the mask.

    Returns:
        ``(N, O, H', W')``; None where the types are not narrow, or the dense convolution is as fast.
    """
    narrow = _narrow_type(x, weight)
    if narrow is None or x.dim() != 4 or weight.shape != pack.mask.shape or x.shape[1] != weight.shape[1]:
        return None
    parts = pack.parts(x, weight)
    if parts is None:
        return None

    def wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weights.kernel_here(x, weight):
            return conv_steps.conv_step(x, weight, bias, conv_steps.make_job(x, weight, parts))
        return conv_steps.forward_op(x, weight, bias, *parts)  # type: ignore[no-any-return]

    dense = partial(F.conv2d, stride=pack.stride, padding=pack.padding, dilation=pack.dilation)
    stride = f" stride {pack.stride}" * (pack.stride > 1)
    name = f"padding {pack.padding} dilation {pack.dilation}{stride} path {parts.path}"
    if not _faster(pack, name, bucket(len(x), conv_paths.MOST), x, weight, narrow, dense, wide):
        return None
    return _rounded(wide, x, weight, bias, narrow)


def _narrow_type(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """Return the type in which the dense product of CPU tensors would be taken, where it is narrower than float32."""
    if not x.is_cpu or not weight.is_cpu or torch.compiler.is_compiling():
        return None
    if weights.traced() or weights.transformed(x, weight):
        return None
    if torch.is_autocast_enabled("cpu"):
        found = torch.get_autocast_dtype("cpu")
        return found if found in _NARROW and {x.dtype, weight.dtype} <= {found, torch.float32} else None
    return x.dtype if x.dtype in _NARROW and weight.dtype is x.dtype else None


def _rounded(layer: _Layer, x: Tensor, weight: Tensor, bias: Tensor | None, narrow: torch.dtype) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return layer(x.float(), weight.float(), None if bias is None else bias.float()).to(narrow)


def _faster(
    pack: Pack | ConvPack,
    name: str,
    n: int,
    x: Tensor,
    weight: Tensor,
    narrow: torch.dtype,
    dense: _Layer,
    wide: _Layer,
) -> bool:
    """Tell whether ``wide`` on float32 takes less time for a training step than ``dense`` in the narrow type.

    ``n`` samples shaped and laid out like those of ``x`` are tried, once; a pack whose path is "sparse" asks for no
    trial, and without trials (``AUTOFLIP_TRIALS=off``) dense is taken.
    """
    if pack.path != "auto" or not trials.enabled():
        return pack.path == "sparse"
    last = weights.channels_last(x), weights.channels_last(weight)
    key = (n, *x.shape[1:], *last, torch.get_num_threads(), narrow, weight.dtype)
    if key not in pack.narrow:
        density = pack.kept / pack.mask.numel()
        sizes = " on ".join("x".join(map(str, shape)) for shape in (weight.shape, x.shape[1:]))
        text = (
            f"masked {sizes} n{n} {name} density {trials.near(density)} layout {''.join('nl'[f] for f in last)} "
            f"threads {torch.get_num_threads()} {weight.dtype} to {narrow}"
        )
        with trials.unseen():  # inference mode has no gradients to time
            ways = _ways(pack, n, x, weight, narrow, dense, wide)
        pack.narrow[key] = trials.choose(text, ways, seconds=0.05) == "wide"
    return pack.narrow[key]


def _ways(
    pack: Pack | ConvPack, n: int, x: Tensor, weight: Tensor, narrow: torch.dtype, dense: _Layer, wide: _Layer
) -> dict[str, Callable[[], object]]:
    g = torch.Generator().manual_seed(0)
    form = torch.channels_last if weights.channels_last(x) else torch.contiguous_format
    like = torch.randn(n, *x.shape[1:], generator=g).to(narrow).contiguous(memory_format=form).requires_grad_()
    kept = torch.where(pack.mask, torch.randn(pack.mask.shape, generator=g), 0)
    # preserves strides: as the weight lies in memory
    kept = torch.empty_like(weight, requires_grad=False).copy_(kept).requires_grad_()
    hooked = kept.detach().clone().requires_grad_()  # as the layers of autoflip.nn do it
    hooked.register_hook(weights.gradient_hook(pack.mask))
    bias, look = torch.zeros(len(weight), dtype=weight.dtype, requires_grad=True), weights.looker(pack.mask)
    cast = weight.dtype is torch.float32

    def step(way: Callable[[], Tensor]) -> None:
        with torch.enable_grad():
            for leaf in (like, kept, hooked, bias):
                leaf.grad = None
            y = way()
            y.backward(torch.ones_like(y))

    def run_dense() -> Tensor:
        if look is not None:
            look(hooked)
        with torch.autocast("cpu", narrow, enabled=cast, cache_enabled=False):
            return dense(like, hooked, bias)

    return {
        "dense": partial(step, run_dense),
        "wide": partial(step, lambda: _rounded(wide, like, kept, bias, narrow)),
    }
