"""The ops of hessian.py as torch knows them: their schemas, shapes and FLOPs, for who watches what runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from autoflip.ops import _hessian


def _counted(op: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Return ``op`` as torch registers it: results are tensors."""

    def registered(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        *out, flops = op(*args, **kwargs)
        return *out, torch.tensor(flops)

    return registered


_lib = torch.library.Library("autoflip", "FRAGMENT")
_lib.define(
    "squared_matmul(Tensor d, Tensor a, bool squared=False, Tensor? samples=None, bool coarse=False)"
    " -> (Tensor, Tensor)"
)
_lib.define("sequence_squares(Tensor[] d, Tensor[] u) -> (Tensor, Tensor)")
_lib.define(
    "conv_squares(Tensor[] d, Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups,"
    " Tensor? at=None) -> (Tensor, Tensor)"
)
_lib.define(
    "conv_pull_back(Tensor[] d, Tensor weight, int[] input_size, Tensor at, int[] stride, int[] padding,"
    " int[] dilation, int groups) -> (Tensor, Tensor)"
)
_lib.define(
    "dense_pull_back(Tensor[] d, Tensor weight, Tensor? gate=None, bool squared=False, Tensor? samples=None,"
    " bool coarse=False) -> (Tensor, Tensor)"
)
_lib.define(
    "softmax_pull_back(Tensor f, Tensor scale, Tensor last, Tensor? gate, Tensor weight, Tensor? before,"
    " bool squared) -> (Tensor, Tensor, Tensor, Tensor)"
)
_COUNTED = (
    _hessian.softmax_pull_back,
    _hessian.conv_pull_back,
    _hessian.dense_pull_back,
    _hessian.squared_matmul,
    _hessian.sequence_squares,
    _hessian.conv_squares,
)
for _device in ("CPU", "CUDA"):
    for _op in _COUNTED:
        _lib.impl(_op.__name__, _counted(_op), _device)


@torch.library.register_fake("autoflip::squared_matmul", lib=_lib)
def _(
    d: Tensor, a: Tensor, squared: bool = False, samples: Tensor | None = None, coarse: bool = False
) -> tuple[Tensor, Tensor]:
    return d.new_empty(d.shape[1], a.shape[1]), torch.empty((), dtype=torch.int64)


@torch.library.register_fake("autoflip::sequence_squares", lib=_lib)
def _(d: list[Tensor], u: list[Tensor]) -> tuple[Tensor, Tensor]:
    return u[0].new_empty(d[0].shape[1], sum(one.shape[2] for one in u)), torch.empty((), dtype=torch.int64)


@torch.library.register_fake("autoflip::conv_squares", lib=_lib)
def _(
    d: list[Tensor],
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    columns = x.shape[1] // groups * kernel_size[0] * kernel_size[1]
    return x.new_empty(d[0].shape[1], columns), torch.empty((), dtype=torch.int64)


@torch.library.register_fake("autoflip::conv_pull_back", lib=_lib)
def _(d: list[Tensor], weight: Tensor, input_size: list[int], *rest: Any) -> tuple[Tensor, Tensor]:
    return weight.new_empty(len(d), len(d[0]), *input_size), torch.empty((), dtype=torch.int64)


@torch.library.register_fake("autoflip::dense_pull_back", lib=_lib)
def _(
    d: list[Tensor],
    weight: Tensor,
    gate: Tensor | None = None,
    squared: bool = False,
    samples: Tensor | None = None,
    coarse: bool = False,
) -> tuple[Tensor, Tensor]:
    size = len(d[0]), weight.shape[1]
    return weight.new_empty(size if squared else (len(d), *size)), torch.empty((), dtype=torch.int64)


@torch.library.register_fake("autoflip::softmax_pull_back", lib=_lib)
def _(
    f: Tensor,
    scale: Tensor,
    last: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    before: Tensor | None,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = len(f), weight.shape[1]
    pulled = f.new_empty(size if squared else (f.shape[1] - 1, *size))
    return torch.empty_like(f), f.new_empty(len(f), len(weight)), pulled, torch.empty((), dtype=torch.int64)


@register_flop_formula([getattr(torch.ops.autoflip, op.__name__) for op in _COUNTED], get_raw=True)
def _squares_flops(*_: Any, out_val: tuple[Tensor, ...], **__: Any) -> int:
    return int(out_val[-1])  # the kernel counts what it ran: zeros that it skips are known to it alone


def traced() -> bool:
    """Return whether someone watches (FlopCounterMode, compile, fake tensors): then the registered op must be seen."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
