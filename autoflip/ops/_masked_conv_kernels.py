"""Masked convolution's CPU kernels: panels, products, and torch's dense convolution beside them.

Every tensor that arrives here was checked by autoflip.ops.masked_conv: float32 on the CPU, one group.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoflip.ops import _masked_weight as weights
from autoflip.ops._masked_weight import CPP, channels_last

Pair = tuple[int, int]
# n, channels, height, width, zeros before, 1: channels last in memory, zeros behind, stride: zeros are counted in lines
# and columns of what a stride leaves side by side
Sizes = tuple[int, int, int, int, int, int, int, int, int, int]


class Parts(NamedTuple):
    """What the ops take of a ConvPack: see ``autoflip.ops.masked_conv.ConvPack``."""

    mask: Tensor
    forward: Tensor  # layouts, empty where the path needs none
    dx: Tensor
    dw: Tensor
    kept: int
    padding: Pair
    dilation: Pair
    stride: int  # along both axes
    path: str  # one letter a step (forward, dx, dw): s = sparse kernel, d = dense convolution


def reach(parts: Parts) -> Pair:
    """Return how far the kernel's last entry is from its first."""
    return ((parts.mask.shape[2] - 1) * parts.dilation[0], (parts.mask.shape[3] - 1) * parts.dilation[1])


def outputs(size: int, reach: int, padding: int, stride: int) -> int:
    """Return along one axis how many outputs ``size`` inputs have."""
    return (size + 2 * padding - reach - 1) // stride + 1


class Geometry(NamedTuple):
    """The sizes of one convolution."""

    x: Sizes  # of the panel of x
    dy: Sizes  # of the panel of dy, whose convolution with the turned kernel is dx
    shape: Any  # the extension's object for both


class _Axis(NamedTuple):
    """One axis: outputs, then zeros before and behind what panels of x and of dy hold of it."""

    out: int
    x_before: int
    x_behind: int
    dy_before: int
    dy_behind: int


def _axis(size: int, taps: int, padding: int, dilation: int, stride: int) -> _Axis | None:
    far = dilation * (taps - 1)
    # with its number o an output meets lines from o + least to o + most of what a stride leaves side by side
    least, most, lines = -padding // stride, (far - padding) // stride, size // stride
    out = outputs(size, far, padding, stride)
    found = _Axis(out, -least, out + most - lines, most, lines - least - out)
    return found if out > 0 and size % stride == 0 and min(found) >= 0 else None


@lru_cache(maxsize=256)
def _geometry(
    n: int, size: Pair, last: Pair, weight: tuple[int, ...], padding: Pair, dilation: Pair, stride: int
) -> Geometry | None:
    axes = [_axis(*axis, stride) for axis in zip(size, weight[2:], padding, dilation, strict=True)]
    down, across = axes
    if down is None or across is None:
        return None
    x = (n, weight[1], *size, down.x_before, across.x_before, last[0], down.x_behind, across.x_behind, stride)
    y = (down.out, across.out, down.dy_before, across.dy_before, last[1], down.dy_behind, across.dy_behind)
    dy = (n, weight[0], *y, 1)
    return Geometry(x, dy, CPP.MaskedConvShape(x, dy, (*weight[2:], *dilation, *padding, stride)))


def geometry(x: Tensor, parts: Parts, y_last: bool) -> Geometry | None:
    """Return the sizes for x of this shape and memory format, None where the kernels do not serve them.

    ``y_last``: channels come last in y, or in dy.
    """
    last = int(channels_last(x)), int(y_last)
    size, padding, dilation = (x.shape[2], x.shape[3]), tuple(parts.padding), tuple(parts.dilation)
    return _geometry(len(x), size, last, parts.mask.shape, padding, dilation, parts.stride)  # type: ignore[arg-type]


def served(x: Tensor, parts: Parts, y_last: bool) -> Geometry:
    """Return :func:`geometry` of what the kernels are known to serve."""
    found = geometry(x, parts, y_last)
    assert found is not None
    return found


def _laid_out(sizes: Sizes) -> Tensor:
    form = torch.channels_last if sizes[6] else torch.contiguous_format
    return torch.empty(sizes[:4], dtype=torch.float32, memory_format=form)  # whatever torch's default is


def _as(t: Tensor, sizes: Sizes) -> Tensor:
    return t if sizes[6] else t.contiguous()


def make_layout(mask: Tensor, sizes: Geometry, step: str) -> Tensor:
    """Return the layout (uint8) of a contiguous CPU mask for one step; empty where its offsets do not fit."""
    made = CPP.masked_conv_layout(mask.data_ptr(), sizes.shape, step == "dw", step == "dx")
    return torch.frombuffer(bytearray(made), dtype=torch.uint8) if made else torch.empty(0, dtype=torch.uint8)


# --- kernels


def plan(x: Tensor, weight: Tensor, parts: Parts) -> Any:
    """Return what the extension's own training step takes (csrc/bind_masked_conv.cpp) for x of this size.

    None where a step is dense or channels come last.
    """
    if "d" in parts.path or channels_last(x) or channels_last(weight):
        return None
    layouts = parts.forward, parts.dx, parts.dw
    return CPP.masked_conv_plan(served(x, parts, False).shape, *(t.data_ptr() for t in layouts), parts.kept, layouts)


def cpu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts) -> tuple[Tensor, Any]:
    """Return (y, panel of x); y's channels come last where those of x or of the weight do, as torch's would."""
    sizes = served(x, parts, channels_last(x) or channels_last(weight))
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
    sizes = served(x, parts, channels_last(dy))
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
        dy, x, weight, None, (parts.stride,) * 2, parts.padding, parts.dilation, False, (0, 0), 1, (*wanted, False)
    )
    return dx, weights.select(dw, parts.mask) if wanted[1] else None
