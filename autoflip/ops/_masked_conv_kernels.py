"""Masked convolution's CPU kernels: panels, products, and torch's dense convolution beside them.

Every tensor that arrives here was checked by autoflip.ops.masked_conv: float32 on the CPU, stride 1, one group.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoflip.ops import _masked_weight as weights
from autoflip.ops._masked_weight import CPP, channels_last

Pair = tuple[int, int]
Sizes = tuple[int, int, int, int, int, int, int]  # n, channels, height, width, padding, 1: channels last in memory


class Parts(NamedTuple):
    """What the ops take of a ConvPack: see ``autoflip.ops.masked_conv.ConvPack``."""

    mask: Tensor
    forward: Tensor  # layouts, empty where the path needs none
    dx: Tensor
    dw: Tensor
    kept: int
    padding: Pair
    dilation: Pair
    path: str  # one letter a step (forward, dx, dw): s = sparse kernel, d = dense convolution


def kernel_sizes(parts: Parts) -> tuple[int, int, int, int]:
    """Return (height, width, dilation of both) of the kernel."""
    return (parts.mask.shape[2], parts.mask.shape[3], *parts.dilation)


def span(parts: Parts) -> Pair:
    """Return how far the kernel's last entry is from its first."""
    return ((parts.mask.shape[2] - 1) * parts.dilation[0], (parts.mask.shape[3] - 1) * parts.dilation[1])


class Geometry(NamedTuple):
    """The sizes of one convolution."""

    x: Sizes  # of the panel of x
    dy: Sizes  # of the panel of dy, whose convolution with the turned kernel is dx
    shape: Any  # the extension's object for both


@lru_cache(maxsize=256)
def _geometry(
    n: int, high: int, wide: int, last: Pair, weight: tuple[int, ...], padding: Pair, dilation: Pair
) -> Geometry:
    reach = [d * (k - 1) for d, k in zip(dilation, weight[2:], strict=True)]
    out = [s + 2 * p - r for s, p, r in zip((high, wide), padding, reach, strict=True)]
    x = (n, weight[1], high, wide, *padding, last[0])
    dy = (n, weight[0], out[0], out[1], reach[0] - padding[0], reach[1] - padding[1], last[1])
    return Geometry(x, dy, CPP.MaskedConvShape(x, dy, (weight[2], weight[3], *dilation)))


def geometry(x: Tensor, parts: Parts, y_last: bool) -> Geometry:
    """Return the sizes for x of this shape and memory format; ``y_last``: channels come last in y, or in dy."""
    last = int(channels_last(x)), int(y_last)
    return _geometry(len(x), *x.shape[2:], last, parts.mask.shape, tuple(parts.padding), tuple(parts.dilation))


def _laid_out(sizes: Sizes) -> Tensor:
    form = torch.channels_last if sizes[6] else torch.contiguous_format
    return torch.empty(sizes[:4], dtype=torch.float32, memory_format=form)  # whatever torch's default is


def _as(t: Tensor, sizes: Sizes) -> Tensor:
    return t if sizes[6] else t.contiguous()


def make_layout(mask: Tensor, sizes: Sizes, kernel: tuple[int, int, int, int], step: str) -> Tensor:
    """Return the layout (uint8) of a contiguous CPU mask for one step; empty where its offsets do not fit."""
    rows = mask.shape[step == "dx"]
    made = CPP.masked_conv_layout(mask.data_ptr(), rows, sizes, kernel, step == "dw", step == "dx")
    return torch.frombuffer(bytearray(made), dtype=torch.uint8) if made else torch.empty(0, dtype=torch.uint8)


# --- kernels


def plan(x: Tensor, weight: Tensor, parts: Parts) -> Any:
    """Return what the extension's own training step takes (csrc/bind_masked_conv.cpp) for x of this size.

    None where a step is dense or channels come last.
    """
    if "d" in parts.path or channels_last(x) or channels_last(weight):
        return None
    layouts = parts.forward, parts.dx, parts.dw
    return CPP.masked_conv_plan(geometry(x, parts, False).shape, *(t.data_ptr() for t in layouts), parts.kept, layouts)


def cpu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts) -> tuple[Tensor, Any]:
    """Return (y, panel of x); y's channels come last where those of x or of the weight do, as torch's would."""
    sizes = geometry(x, parts, channels_last(x) or channels_last(weight))
    x, weight = _as(x, sizes.x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    panel, y = CPP.MaskedConvPanel(sizes.shape.x_floats), _laid_out(sizes.dy)
    sizes.shape.forward(
        x.data_ptr(),
        panel.data_ptr(),
        parts.forward.data_ptr(),
        parts.kept,
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y, panel


class Gradients(NamedTuple):
    """What a backward pass found, None where it was not wanted; or which of them are wanted."""

    dx: Any
    dw: Any
    db: Any


def cpu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    parts: Parts,
    wanted: Gradients,
    *,
    x_panel: Any = None,
    dy_panel: Any = None,
) -> Gradients:
    """Return the wanted gradients; ``x`` gives sizes alone where ``x_panel`` is there or dw is not wanted."""
    sizes = geometry(x, parts, channels_last(dy))
    x_new = dy_new = None
    if wanted.dw and x_panel is None:
        x_new, x_panel = _as(x, sizes.x), CPP.MaskedConvPanel(sizes.shape.x_floats)
    if dy_panel is None:
        dy_new, dy_panel = _as(dy, sizes.dy), CPP.MaskedConvPanel(sizes.shape.dy_floats)
    weight = weight.contiguous() if wanted.dx else weight
    found = Gradients(
        _laid_out(sizes.x) if wanted.dx else None,
        torch.zeros(parts.mask.shape, dtype=torch.float32) if wanted.dw else None,  # zeros where it is pruned
        torch.empty(sizes.dy[1], dtype=torch.float32) if wanted.db else None,
    )
    sizes.shape.backward(
        0 if x_new is None else x_new.data_ptr(),
        0 if x_panel is None else x_panel.data_ptr(),
        0 if dy_new is None else dy_new.data_ptr(),
        dy_panel.data_ptr(),
        parts.dx.data_ptr(),
        parts.dw.data_ptr(),
        parts.kept,
        weight.data_ptr() if wanted.dx else 0,
        *(0 if out is None else out.data_ptr() for out in found),
        torch.get_num_threads(),
    )
    return found


def dense_backward(
    dy: Tensor, x: Tensor, weight: Tensor, parts: Parts, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return (dx, dw) by torch; ``weight`` has zeros where it is pruned, dw is masked."""
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, (1, 1), parts.padding, parts.dilation, False, (0, 0), 1, (*wanted, False)
    )
    return dx, weights.select(dw, parts.mask) if wanted[1] else None
