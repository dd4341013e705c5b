"""Convolve with the kept weights only, where that is faster: ``y = conv2d(x, w * mask) + b`` and its derivatives.

A sparse kernel serves float32 on a CPU with one group, zero padding and a stride that divides the map, and narrower
types where widening pays (:mod:`autoflip.ops.narrow`); everything else is torch's dense convolution:
:mod:`autoflip.ops.conv_paths` chooses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoflip.ops import _masked_conv as steps
from autoflip.ops import _masked_conv_kernels as conv
from autoflip.ops import _masked_kernels as kernels
from autoflip.ops import _masked_weight as weights
from autoflip.ops import batches, conv_paths, paths
from autoflip.ops._masked_conv import conv_step
from autoflip.ops._masked_conv_kernels import Pair, Parts
from autoflip.ops.look import ones_and_zeros
from autoflip.ops.narrow import narrow_conv2d

__all__ = ["ConvPack", "conv_job", "conv_step", "conv_weight", "masked_conv2d"]

# sizes of maps that a layer has orders and trials for; each takes memory (0.65 MB where 64 channels meet 64) and a
# tenth of a second, so inputs of ever new sizes go the dense way
_MOST_SIZES = 16


class ConvPack:
    """A convolution's mask and the orders in which the kernels visit its kept entries, built when first needed.

    Args:
        mask: ``(O, C, KH, KW)``, bool, True = kept. Copied nowhere: change it only by making another ConvPack.
        padding: zeros on each side, (height, width).
        dilation: (height, width).
        stride: along both axes.
        path: "auto" chooses per shape and step; "sparse" or "dense" force one.

    Raises:
        ValueError: ``mask`` is not a 4-d bool tensor, or ``path`` is not one of the three.
    """

    def __init__(
        self, mask: Tensor, padding: Pair = (0, 0), dilation: Pair = (1, 1), *, stride: int = 1, path: str = "auto"
    ) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 4:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"ConvPack: mask is {got}, wanted a 4-d torch.bool tensor (True = kept)")
        if path not in paths.PATHS:
            raise ValueError(f"ConvPack: path={path!r}; wanted one of {', '.join(paths.PATHS)}")
        # torch.jit.trace would see a copy in its first run alone
        self.mask = ones_and_zeros(mask if mask.is_contiguous() else mask.contiguous())
        self.padding, self.dilation, self.stride, self.path = padding, dilation, stride, path
        self.kept = int(mask.sum())
        self._parts: dict[tuple[int, int, int, bool, bool, int], Parts | None] = {}
        self._layouts: dict[tuple[str, int, int], Tensor] = {}
        self._jobs: dict[tuple[Any, ...], steps.Job] = {}
        self.narrow: dict[tuple[Any, ...], bool] = {}  # of autoflip.ops.narrow

    @property
    def whole(self) -> bool:
        """Whether the mask keeps everything."""
        return self.kept == self.mask.numel()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": {}, "_layouts": {}, "_jobs": {}, "narrow": {}}

    def parts(self, x: Tensor, weight: Tensor) -> Parts | None:
        """Return what the ops take for tensors of these sizes and formats, None where all three steps are dense."""
        if weights.traced():  # sizes are no numbers there, and a kernel's result would look like a constant
            return None
        n, _, height, width = x.shape
        x_last, last = weights.channels_last(x), weights.channels_last(weight)
        key = (batches.bucket(n, conv_paths.MOST), height, width, x_last, x_last or last, torch.get_num_threads())
        if key not in self._parts:
            known = {other[1:3] for other in self._parts}
            if len(known) >= _MOST_SIZES and (height, width) not in known:
                return None
            self._parts[key] = self._make_parts(*key[:5])
        return self._parts[key]

    def job(self, x: Tensor, weight: Tensor) -> steps.Job | None:
        """Return what :func:`conv_step` takes for tensors of these sizes and formats, None where it serves none."""
        parts = self.parts(x, weight)
        if parts is None:
            return None
        key = (*x.shape, weights.channels_last(x), weights.channels_last(weight), id(parts))
        if key not in self._jobs:
            self._jobs[key] = steps.make_job(x, weight, parts)
        return self._jobs[key]

    def _make_parts(self, n: int, height: int, width: int, x_last: bool, last: bool) -> Parts | None:
        if self.path == "dense" or self.mask.numel() == 0:
            return None
        nothing = torch.empty(0, dtype=torch.uint8)
        bare = Parts(self.mask, nothing, nothing, nothing, self.kept, self.padding, self.dilation, self.stride, "sss")
        sizes = conv.geometry(torch.empty(1).expand(n, self.mask.shape[1], height, width), bare, False)
        if sizes is None:
            return None
        if self.path == "auto" and not conv_paths.tried(self.mask, self.kept, n, sizes.dy[2] * sizes.dy[3]):
            return None
        trial = conv_paths.Trial(n, height, width, x_last, last, bare, self._layout)
        if any(trial.layout(step).numel() == 0 for step in kernels.STEPS) and self.kept:
            return None
        path = "sss" if self.path == "sparse" else trial.letters()
        if path == "ddd":
            return None
        return trial.parts(path)

    def _layout(self, step: str, sizes: conv.Geometry) -> Tensor:
        key = (step, *sizes.x[2:4])
        if key not in self._layouts:
            self._layouts[key] = conv.make_layout(self.mask, sizes, step)
        return self._layouts[key]

    def __repr__(self) -> str:
        return f"ConvPack({tuple(self.mask.shape)}, {self.kept} kept, path {self.path!r})"


class _Clean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.mask = mask
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return weights.select(g, ctx.mask), None


def conv_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """Return :func:`autoflip.ops.masked_weight`, without a copy where the pruned entries are zero already.

    Args:
        weight: any shape.
        mask: shape and device of ``weight``, bool, True = kept.
    """
    if weights.is_clean(weight, mask):
        return _Clean.apply(weight, mask) if torch.is_grad_enabled() and weight.requires_grad else weight
    return weights.select(weight, mask)


def conv_job(x: Tensor, weight: Tensor, bias: Tensor | None, pack: ConvPack) -> steps.Job | None:
    """Return what :func:`conv_step` takes, where the CPU extension serves these tensors; else None."""
    here = (
        x.dim() == 4
        and (weights.kernel_here(x, weight) if bias is None else weights.kernel_here(x, weight, bias))
        and weight.shape == pack.mask.shape
        and x.shape[1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and not torch.is_autocast_enabled("cpu")
    )
    return pack.job(x, weight) if here else None


def masked_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, pack: ConvPack) -> Tensor:
    """Convolve with the kept weights: ``y = conv2d(x, weight * mask, bias)``, one group.

    Args:
        x: ``(N, C, H, W)``, any float dtype.
        weight: ``(O, C, KH, KW)``, dtype and device of ``x``; what stands at pruned entries is ignored.
        bias: ``(O,)`` or None.
        pack: ``ConvPack(mask, padding, dilation, stride=stride)``, made once per mask.

    Returns:
        ``(N, O, H', W')``, dtype of ``x``. The gradient of ``weight`` is exactly zero at pruned entries.

    Raises:
        ValueError: the mask does not cover the weight, or ``x`` or ``bias`` does not fit it.

    Cost: ``2 * N * H' * W' * pack.kept`` FLOPs on the sparse path, the same for each gradient; on the dense path
    ``2 * N * H' * W' * O * C * KH * KW``.
    """
    mask = pack.mask
    if weight.shape != mask.shape:
        raise ValueError(
            f"masked_conv2d: mask has shape {tuple(mask.shape)} but weight has {tuple(weight.shape)}; a mask covers "
            "its weight entry by entry. Did the layer get compacted after the mask was made?"
        )
    if x.dim() not in (3, 4) or x.shape[-3] != mask.shape[1]:
        raise ValueError(f"masked_conv2d: x has shape {tuple(x.shape)}, wanted (N, {mask.shape[1]}, H, W)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"masked_conv2d: bias has shape {tuple(bias.shape)}, wanted ({len(weight)},), one an output channel"
        )
    if (y := narrow_conv2d(x, weight, bias, pack)) is not None:
        return y
    if (job := conv_job(x, weight, bias, pack)) is not None:
        return conv_step(x, weight, bias, job)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if x.dim() == 4 and not torch.is_autocast_enabled("cpu") and weights.counted(*tensors):
        parts = pack.parts(x, weight)
        if parts is not None:
            return steps.forward_op(x, weight, bias, *parts)  # type: ignore[no-any-return]
    return F.conv2d(x, conv_weight(weight, mask), bias, pack.stride, pack.padding, pack.dilation)
