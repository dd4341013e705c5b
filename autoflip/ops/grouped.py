"""Many clients' small masked layers at once: ``y[c] = x[c] @ (w[c] * mask[c]).T + b[c]`` and its derivatives.

A small layer of one client (784x200 with 64 rows: 20 MFLOP) takes a GPU less time than its launch; a simulation has
many such layers of one shape, each with its own weight and mask. Triton runs them in one launch a step, tiles of the
weight that keep nothing skipped (unmeasured on GPU); elsewhere torch's batched product runs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from autoflip.ops import backend
from autoflip.ops._masked_kernels import TILE

__all__ = ["GroupedPack", "grouped_linear"]

backend.register("grouped_linear", "triton", optional=True, asked=("triton",))  # unmeasured on GPU
MOST = 65535  # clients of a launch: CUDA's limit on a grid's second axis


class GroupedPack:
    """Many clients' masks of one shape, and which of their tiles a GPU may skip.

    Args:
        masks: ``(C, O, K)``, bool, True = kept; one layer's mask of each of C clients. Copied nowhere: change it
            only by making another GroupedPack.

    Raises:
        ValueError: ``masks`` is no 3-d bool tensor, or there are more than 65535 clients.
    """

    def __init__(self, masks: Tensor) -> None:
        if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.dim() != 3:
            got = f"{masks.dtype} of shape {tuple(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
            raise ValueError(f"GroupedPack: masks is {got}, wanted a (clients, O, K) torch.bool tensor (True = kept)")
        if len(masks) > MOST:
            raise ValueError(f"GroupedPack: {len(masks)} clients in one launch, wanted at most {MOST}; cut them in two")
        self.masks = masks.contiguous()
        c, o, k = masks.shape
        padded = F.pad(masks.to(torch.uint8), (0, -k % TILE, 0, -o % TILE))
        tiles = padded.view(c, padded.shape[1] // TILE, TILE, padded.shape[2] // TILE, TILE)
        # uint8 (C, ceil(O / 32), ceil(K / 32)), 1 where a tile keeps any entry
        self.live = tiles.amax((2, 4)) if tiles.numel() else padded.new_zeros(c, tiles.shape[1], tiles.shape[3])
        self.tiles = int(self.live.sum())

    def __repr__(self) -> str:
        return f"GroupedPack({tuple(self.masks.shape)}, {self.tiles} of {self.live.numel()} tiles live)"


def _triton(a: Tensor) -> Any:
    """Return the kernels where they serve, else None."""
    if a.dtype is not torch.float32 or backend.serve("grouped_linear", a.device) != "triton":
        return None
    return import_module("autoflip.kernels.masked_matmul")


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, masks: Tensor, live: Tensor, tiles: int) -> Tensor:
    if kernels := _triton(x):
        y = x.new_empty(*x.shape[:2], weight.shape[1])
        bias = None if bias is None else bias.contiguous()
        kernels.forward(x.contiguous(), weight.contiguous(), bias, masks, live, y, relu=False)
        return y
    kept = torch.where(masks, weight, 0).mT
    return torch.bmm(x, kept) if bias is None else torch.baddbmm(bias[:, None], x, kept)


def _dx(dy: Tensor, weight: Tensor, masks: Tensor, live: Tensor, tiles: int) -> Tensor:
    if kernels := _triton(dy):
        out = dy.new_empty(*dy.shape[:2], weight.shape[2])
        kernels.dx(dy.contiguous(), weight.contiguous(), masks, live, out)
        return out
    return torch.bmm(dy, torch.where(masks, weight, 0))


def _dw(dy: Tensor, x: Tensor, masks: Tensor, live: Tensor, tiles: int) -> Tensor:
    if kernels := _triton(dy):
        out = dy.new_zeros(masks.shape)
        kernels.dw(dy.contiguous(), x.contiguous(), masks, live, out)
        return out
    return torch.where(masks, torch.bmm(dy.mT, x), 0)


_lib = torch.library.Library("autoflip", "FRAGMENT")


def _register(name: str, arguments: str, kernel: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    _lib.define(f"{name}({arguments}, Tensor masks, Tensor live, int tiles) -> Tensor")
    _lib.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autoflip::{name}", fake, lib=_lib)
    return getattr(torch.ops.autoflip, name).default


_forward_op = _register(
    "grouped_linear",
    "Tensor x, Tensor weight, Tensor? bias",
    _forward,
    lambda x, weight, *_: x.new_empty(*x.shape[:2], weight.shape[1]),
)
_dx_op = _register(
    "grouped_linear_dx",
    "Tensor dy, Tensor weight",
    _dx,
    lambda dy, weight, *_: dy.new_empty(*dy.shape[:2], weight.shape[2]),
)
_dw_op = _register("grouped_linear_dw", "Tensor dy, Tensor x", _dw, lambda dy, x, masks, *_: dy.new_empty(masks.shape))


def _flops(a: Tensor, b: Tensor, *rest: Any, out_val: Any = None, **_: Any) -> int:
    """Return what ran: rows times live tiles (whole ones) on Triton, else the dense products."""
    masks, _live, tiles = rest[-3:]
    return 2 * a.shape[1] * (tiles * TILE * TILE if _triton(a) else masks.numel())


for _op in (_forward_op, _dx_op, _dw_op):
    register_flop_formula(_op.overloadpacket, get_raw=True)(_flops)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2], *inputs[-3:-1])
    ctx.tiles = inputs[-1]


def _forward_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *table = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx = _dx_op(dy, weight, *table, ctx.tiles) if need[0] else None
    dw = _dw_op(dy, x, *table, ctx.tiles) if need[1] else None
    return dx, dw, dy.sum(1) if need[2] else None, None, None, None


# each of the three maps is bilinear, and the other two are its derivatives
def _dx_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight, *table = ctx.saved_tensors
    need = ctx.needs_input_grad
    first = _forward_op(g, weight, None, *table, ctx.tiles) if need[0] else None
    return first, _dw_op(dy, g, *table, ctx.tiles) if need[1] else None, None, None, None


def _dw_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, *table = ctx.saved_tensors
    need = ctx.needs_input_grad
    first = _forward_op(x, g, None, *table, ctx.tiles) if need[0] else None
    return first, _dx_op(dy, g, *table, ctx.tiles) if need[1] else None, None, None, None


for _name, _backward in (("", _forward_backward), ("_dx", _dx_backward), ("_dw", _dw_backward)):
    torch.library.register_autograd(f"autoflip::grouped_linear{_name}", _backward, setup_context=_save, lib=_lib)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pack: GroupedPack) -> Tensor:
    """Multiply each client's rows by its kept weights: ``y[c] = x[c] @ (weight[c] * masks[c]).T + bias[c]``.

    Args:
        x: ``(C, N, K)``, any float dtype: N rows of each of C clients.
        weight: ``(C, O, K)``, dtype and device of ``x``; what stands at pruned entries is ignored.
        bias: ``(C, O)`` or None.
        pack: ``GroupedPack(masks)``, made once per set of masks, on the device of ``x``.

    Returns:
        ``(C, N, O)``, dtype of ``x``. The gradient of ``weight`` is exactly zero at pruned entries.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: one launch a step (forward, dx, dw); ``2 * N * 1024`` FLOPs a live 32x32 tile with Triton (float32 on a GPU),
    ``2 * C * N * O * K`` elsewhere.
    Source: tile skipping as in Gale et al., "Sparse GPU Kernels for Deep Learning", SC 2020.

    Example:
        >>> x, w = torch.ones(2, 1, 3), torch.tensor([[[1., 2., 4.]], [[1., 2., 4.]]])
        >>> masks = torch.tensor([[[True, False, True]], [[False, True, False]]])
        >>> grouped_linear(x, w, None, GroupedPack(masks))
        tensor([[[5.]],
        <BLANKLINE>
                [[2.]]])
    """
    masks = pack.masks
    if weight.shape != masks.shape:
        raise ValueError(
            f"grouped_linear: masks have shape {tuple(masks.shape)} but weight has {tuple(weight.shape)}; masks cover "
            "their weights entry by entry: (clients, out_features, in_features)"
        )
    if x.dim() != 3 or len(x) != len(masks) or x.shape[2] != masks.shape[2]:
        wanted = f"({len(masks)}, N, {masks.shape[2]})"
        raise ValueError(f"grouped_linear: x has shape {tuple(x.shape)}, wanted {wanted}: one batch of rows a client")
    if bias is not None and bias.shape != masks.shape[:2]:
        raise ValueError(f"grouped_linear: bias has shape {tuple(bias.shape)}, wanted {tuple(masks.shape[:2])}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"grouped_linear: {name} is {t.dtype} on {t.device} but x is {x.dtype} on {x.device}")
    if masks.device != x.device:
        raise ValueError(f"grouped_linear: masks are on {masks.device} but x on {x.device}; move them before packing")
    result: Tensor = _forward_op(x, weight, bias, masks, pack.live, pack.tiles)
    return result
