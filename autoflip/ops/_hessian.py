"""Who computes the ops of hessian.py (the C++ kernels, Triton or the reference), and their registration with torch.

The functions here are called with checked, contiguous tensors. Two results: the op's, and the FLOPs that ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from autoflip.ops import backend, reference

# no C++ here: torch's matrix product of materialised squares was 1.6 to 2 times as fast as a fused kernel
# (N 256, O 200, K 784: 0.65 against 1.04 ms, one AVX-512 thread)
backend.register("squared_matmul", "triton", optional=True)
for _name in ("sequence_squares", "conv_squares", "rademacher"):
    backend.register(_name, "cpp", "triton", optional=True)
# on a GPU torch's dense product is as good: values behind max-pooling are scattered first
backend.register("conv_pull_back", "cpp", optional=True)

Pair = tuple[int, int]
Ints = Sequence[int]


def _pair(sizes: list[int]) -> Pair:
    return sizes[0], sizes[1]


def _kernels(op: str, tensor: Tensor) -> Any:
    """Return the C++ kernels when they serve ``op``; they are written for float32, the reference for the rest."""
    if backend.serve(op, tensor.device) != "cpp" or tensor.dtype != torch.float32:
        return None
    return backend.extension("_C")[0]


def _triton(op: str, tensor: Tensor) -> bool:
    """Return whether Triton serves ``op``; its sums are float32, so float64 goes to the reference."""
    return backend.serve(op, tensor.device) == "triton" and tensor.dtype != torch.float64


def squared_matmul(d: Tensor, a: Tensor) -> Tensor:
    """See hessian.squared_matmul."""
    if _triton("squared_matmul", d):
        from autoflip.kernels.hessian import squared_matmul

        return squared_matmul(d, a)
    return reference.squared_matmul(d, a)


def sequence_squares(d: list[Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """See hessian.sequence_squares."""
    full = 2 * len(d) * d[0].numel() * u.shape[2]
    if _triton("sequence_squares", u):
        from autoflip.kernels import hessian

        one, (p, k) = (1, 1), u.shape[1:]
        image = u.transpose(1, 2).unsqueeze(3)  # positions are an image's rows
        out = hessian.conv_squares(torch.stack(d), image, (p, 1), one, one, (0, 0), one, 1, (p * k, 1, k, 0))
        return out, torch.tensor(full)
    if (kernels := _kernels("sequence_squares", u)) is None:
        return reference.sequence_squares(torch.stack(d), u), torch.tensor(full)
    out = u.new_empty(d[0].shape[1], u.shape[2])
    factors = [one.data_ptr() for one in d]
    ran = kernels.sequence_squares(
        factors, u.data_ptr(), out.data_ptr(), *d[0].shape, u.shape[2], torch.get_num_threads()
    )
    return out, torch.tensor(2 * ran)


def conv_squares(
    d: list[Tensor],
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See hessian.conv_squares."""
    columns = x.shape[1] // groups * kernel[0] * kernel[1]
    full = 2 * len(d) * d[0].numel() * columns
    if _triton("conv_squares", x):
        from autoflip.kernels import hessian

        size = positions(x.shape[2:], kernel, stride, padding, dilation)
        rows = torch.stack(d).flatten(3)
        if at is not None:
            whole = rows.new_zeros(*rows.shape[:3], size[0] * size[1])
            rows = whole.scatter_add_(3, at.flatten(2).expand_as(rows), rows)
        out = hessian.conv_squares(rows, x, size, kernel, stride, padding, dilation, groups, x.stride())
        return out, torch.tensor(full)
    if (kernels := _kernels("conv_squares", x)) is None:
        shape = _pair(kernel), _pair(stride), _pair(padding), _pair(dilation), groups
        out = reference.conv_squares(torch.stack(d), x, *shape, at)
        return out, torch.tensor(full)
    out = x.new_empty(d[0].shape[1], columns)
    sizes = _sizes(d[0], x.shape[1:], kernel, stride, padding, dilation, groups)
    pointers = ([one.data_ptr() for one in d], x.data_ptr(), 0 if at is None else at.data_ptr(), out.data_ptr())
    return out, torch.tensor(2 * kernels.conv_squares(*pointers, sizes, torch.get_num_threads()))


def conv_pull_back(
    d: list[Tensor],
    weight: Tensor,
    input_size: list[int],
    at: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """See hessian.conv_pull_back."""
    if (kernels := _kernels("conv_pull_back", weight)) is None:
        shape = _pair(stride), _pair(padding), _pair(dilation), groups
        out = reference.conv_pull_back(torch.stack(d), weight, tuple(input_size), at, *shape)
        return out, torch.tensor(2 * len(d) * d[0].numel() * weight[0].numel())
    out = weight.new_empty(len(d), len(d[0]), *input_size)
    sizes = _sizes(d[0], input_size, weight.shape[2:], stride, padding, dilation, groups)
    pointers = ([one.data_ptr() for one in d], weight.data_ptr(), at.data_ptr(), out.data_ptr())
    return out, torch.tensor(2 * kernels.conv_pull_back(*pointers, sizes, torch.get_num_threads()))


def positions(size: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Pair:
    """Return a convolution's output height and width from its input's."""
    height, width = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    return height, width


def _sizes(
    d: Tensor, input_size: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> tuple[int, ...]:
    """Return what the C++ kernels want to know of a convolution, in their order."""
    n, o, *entries = d.shape
    outputs = positions(input_size[1:], kernel, stride, padding, dilation)
    return (entries[0] * entries[1], n, o, groups, *input_size, *outputs, *kernel, *stride, *padding, *dilation)


_lib = torch.library.Library("autoflip", "FRAGMENT")
_lib.define("squared_matmul(Tensor d, Tensor a) -> Tensor")
_lib.define("sequence_squares(Tensor[] d, Tensor u) -> (Tensor, Tensor)")
_lib.define(
    "conv_squares(Tensor[] d, Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups,"
    " Tensor? at=None) -> (Tensor, Tensor)"
)
_lib.define(
    "conv_pull_back(Tensor[] d, Tensor weight, int[] input_size, Tensor at, int[] stride, int[] padding,"
    " int[] dilation, int groups) -> (Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _lib.impl("conv_pull_back", conv_pull_back, _device)
    _lib.impl("squared_matmul", squared_matmul, _device)
    _lib.impl("sequence_squares", sequence_squares, _device)
    _lib.impl("conv_squares", conv_squares, _device)


@torch.library.register_fake("autoflip::squared_matmul", lib=_lib)
def _(d: Tensor, a: Tensor) -> Tensor:
    return d.new_empty(d.shape[1], a.shape[1])


@torch.library.register_fake("autoflip::sequence_squares", lib=_lib)
def _(d: list[Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    return u.new_empty(d[0].shape[1], u.shape[2]), torch.empty((), dtype=torch.int64)


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


@register_flop_formula(torch.ops.autoflip.squared_matmul)
def _squared_matmul_flops(d_shape: Any, a_shape: Any, *, out_shape: Any = None, **_: Any) -> int:
    return 2 * d_shape[0] * d_shape[1] * a_shape[1]


_COUNTED = (torch.ops.autoflip.sequence_squares, torch.ops.autoflip.conv_squares, torch.ops.autoflip.conv_pull_back)


@register_flop_formula([*_COUNTED], get_raw=True)
def _squares_flops(*_: Any, out_val: tuple[Tensor, Tensor], **__: Any) -> int:
    return int(out_val[1])  # the kernel counts what it ran: zeros that it skips are known to it alone
