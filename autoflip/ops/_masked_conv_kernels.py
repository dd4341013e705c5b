"""Masked convolution's CPU kernels: panels, products, and torch's dense convolution beside them.

Every tensor that arrives here was checked by autoflip.ops.masked_conv: float32 on the CPU, stride 1, one group.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from autoflip.ops import _masked_weight as weights
from autoflip.ops._masked_weight import CPP

Pair = tuple[int, int]
Sizes = tuple[int, int, int, int, int, int]  # n, channels, height, width, padding


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


def x_sizes(n: int, height: int, width: int, parts: Parts) -> Sizes:
    """Return the sizes of the panel of x."""
    return (n, parts.mask.shape[1], height, width, *parts.padding)


def dy_sizes(n: int, height: int, width: int, parts: Parts) -> Sizes:
    """Return the sizes of the panel of dy, whose convolution with the turned kernel is dx; from those of x."""
    reach = span(parts)
    high, wide = (s + 2 * p - r for s, p, r in zip((height, width), parts.padding, reach, strict=True))
    return (n, parts.mask.shape[0], high, wide, reach[0] - parts.padding[0], reach[1] - parts.padding[1])


def span(parts: Parts) -> Pair:
    return ((parts.mask.shape[2] - 1) * parts.dilation[0], (parts.mask.shape[3] - 1) * parts.dilation[1])


def make_layout(mask: Tensor, sizes: Sizes, kernel: tuple[int, int, int, int], step: str) -> Tensor:
    """Return the layout (uint8) of a contiguous CPU mask for one step; empty where its offsets do not fit."""
    rows = mask.shape[step == "dx"]
    made = CPP.masked_conv_layout(mask.data_ptr(), rows, sizes, kernel, step == "dw", step == "dx")
    return torch.frombuffer(bytearray(made), dtype=torch.uint8) if made else torch.empty(0, dtype=torch.uint8)


# --- kernels


class _Panels(threading.local):
    """Panels that are out of use: fresh pages cost more than the conversion into them."""

    MOST = 1 << 24  # floats kept by a thread: 64 MB

    def __init__(self) -> None:
        self.free: dict[int, list[Tensor]] = {}
        self.floats = 0

    def take(self, floats: int) -> Tensor:
        found = self.free.get(floats)
        if not found:
            return torch.empty(floats)
        self.floats -= floats
        return found.pop()

    def give(self, panel: Tensor) -> None:
        if self.floats + panel.numel() > self.MOST:
            self.free.clear()
            self.floats = 0
        if panel.numel() <= self.MOST:
            self.free.setdefault(panel.numel(), []).append(panel)
            self.floats += panel.numel()


panels = _Panels()


def panel(x: Tensor, sizes: Sizes) -> Tensor:
    """Return ``x`` as the kernels read it: padded, samples last."""
    x = x.contiguous()
    out = panels.take(CPP.masked_conv_panel_size(sizes))
    CPP.masked_conv_panel(x.data_ptr(), sizes, out.data_ptr(), torch.get_num_threads())
    return out


def multiply(from_panel: Tensor, sizes: Sizes, layout: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor,
             parts: Parts) -> Tensor:  # fmt: skip
    """Write the convolution of a panel into ``y`` (n, rows, height, width)."""
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    CPP.masked_conv_multiply(
        from_panel.data_ptr(),
        sizes,
        kernel_sizes(parts),
        layout.data_ptr(),
        parts.kept,
        y.shape[1],
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def gradient(x_panel: Tensor, x_in: Sizes, dy_panel: Tensor, dy_in: Sizes, parts: Parts) -> Tensor:
    """Return dw, zeros where it is pruned."""
    dw = torch.zeros(parts.mask.shape)
    CPP.masked_conv_gradient(
        x_panel.data_ptr(),
        x_in,
        dy_panel.data_ptr(),
        dy_in,
        kernel_sizes(parts),
        parts.dw.data_ptr(),
        parts.kept,
        dw.data_ptr(),
        torch.get_num_threads(),
    )
    return dw


def cpu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts) -> tuple[Tensor, Tensor]:
    """Return (y, panel of x)."""
    sizes = x_sizes(len(x), x.shape[2], x.shape[3], parts)
    x_panel = panel(x, sizes)
    y = torch.empty(dy_sizes(len(x), x.shape[2], x.shape[3], parts)[:4])
    return multiply(x_panel, sizes, parts.forward, weight, bias, y, parts), x_panel


def cpu_backward(
    dy: Tensor, x: Tensor, x_panel: Tensor | None, weight: Tensor, parts: Parts, *, dx: bool, dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return (dx, dw); ``x`` gives sizes alone where ``x_panel`` is there or dw is not wanted.

    ``x_panel`` is used up: it must not be read again.
    """
    sizes = (len(x), x.shape[2], x.shape[3], parts)
    x_in, dy_in = x_sizes(*sizes), dy_sizes(*sizes)
    dy_panel = panel(dy, dy_in)
    out = multiply(dy_panel, dy_in, parts.dx, weight, None, torch.empty(x_in[:4]), parts) if dx else None
    grad = None
    if dw:
        x_panel = panel(x, x_in) if x_panel is None else x_panel
        grad = gradient(x_panel, x_in, dy_panel, dy_in, parts)
        panels.give(x_panel)
    panels.give(dy_panel)
    return out, grad


def dense_backward(
    dy: Tensor, x: Tensor, weight: Tensor, parts: Parts, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return (dx, dw) by torch; ``weight`` has zeros where it is pruned, dw is masked."""
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, (1, 1), parts.padding, parts.dilation, False, (0, 0), 1, (*wanted, False)
    )
    return dx, weights.select(dw, parts.mask) if wanted[1] else None
