"""Sums over samples of squared per-sample gradients, and the random signs that the estimators draw.

The diagonal of a Gauss-Newton matrix is ``sum_n (J_n^T s)^2`` over output factors ``s``: one squared gradient a
sample. A dense layer's is a product of two squares; a convolution's (or a sequence's) is summed over positions
before it is squared. Neither the samples' gradients nor the patches of more than a few samples are ever held.
Nothing here is differentiable: the results are statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from autoflip.ops import backend, reference

__all__ = ["conv_squares", "rademacher", "sequence_squares", "squared_matmul"]

# no C++ here: torch's matrix product of materialised squares was 1.6 to 2 times as fast as a fused kernel
# (N 256, O 200, K 784: 0.65 against 1.04 ms, one AVX-512 thread)
backend.register("squared_matmul", "triton", optional=True)
for _name in ("sequence_squares", "conv_squares", "rademacher"):
    backend.register(_name, "cpp", optional=True)

Pair = tuple[int, int]


def squared_matmul(d: Tensor, a: Tensor) -> Tensor:
    """Sum the squared per-sample gradients of a dense layer: ``D[o, k] = sum_n d[n, o]^2 a[n, k]^2``.

    Args:
        d: ``(N, O)``, floating, the loss factor's gradient at the layer's output.
        a: ``(N, K)``, dtype and device of ``d``, the layer's input.

    Returns:
        ``(O, K)``, dtype of ``d``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``2 * N * O * K`` FLOPs.

    Example:
        >>> squared_matmul(torch.tensor([[1., 2.]]), torch.tensor([[3., 1.]]))
        tensor([[ 9.,  1.],
                [36.,  4.]])
    """
    _check_pair("squared_matmul", "d", d, 2, "a", a, 2)
    if d.shape[0] != a.shape[0]:
        raise ValueError(
            f"squared_matmul: d has {d.shape[0]} samples and a has {a.shape[0]}; both need one row a sample. "
            "For a sequence (several rows a sample) use sequence_squares."
        )
    d, a = d.detach().contiguous(), a.detach().contiguous()
    return torch.ops.autoflip.squared_matmul.default(d, a) if _traced() else _squared_matmul(d, a)


def sequence_squares(d: Tensor, u: Tensor) -> Tensor:
    """Square what is summed over positions: ``D[o, k] = sum_qn (sum_p d[q, n, o, p] u[n, p, k])^2``.

    Args:
        d: ``(Q, N, O, P)``, floating: Q factors' gradients at the output of a layer that serves P positions.
        u: ``(N, P, K)``, dtype and device of ``d``, the layer's input at each position.

    Returns:
        ``(O, K)``, dtype of ``d``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``2 * Q * N * O * P * K`` FLOPs, less where the C++ kernel skips positions at which ``d`` is zero.
    """
    _check_pair("sequence_squares", "d", d, 4, "u", u, 3)
    if (d.shape[1], d.shape[3]) != (u.shape[0], u.shape[1]):
        raise ValueError(
            f"sequence_squares: d (Q, N, O, P) has shape {tuple(d.shape)} and u (N, P, K) has {tuple(u.shape)}; "
            "samples N and positions P must agree. Is u still (N, K, P)? Then transpose it."
        )
    d, u = d.detach().contiguous(), u.detach().contiguous()
    return (torch.ops.autoflip.sequence_squares.default(d, u) if _traced() else _sequence_squares(d, u))[0]


def conv_squares(
    d: Tensor,
    x: Tensor,
    kernel_size: Pair,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Sum the squared per-sample gradients of a 2-d convolution over samples and factors.

    ``D[o, k] = sum_qn (sum_p d[q, n, o, p] u[n, k, p])^2`` with ``u[n]`` the patches (im2col) of ``x[n]``, made
    for a few samples at a time.

    Args:
        d: ``(Q, N, O, H', W')``, floating: Q factors' gradients at the layer's output.
        x: ``(N, C, H, W)``, dtype and device of ``d``, the layer's input.
        kernel_size: height and width, as are the next three; positions, not elements.
        stride: step between patches.
        padding: zeros added on each side.
        dilation: step inside a patch.
        groups: as in ``torch.nn.Conv2d``.

    Returns:
        ``(O, C // groups * kernel height * kernel width)``, dtype of ``d``: the weight's, flattened.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``2 * Q * N * O * H' * W' * K`` FLOPs, less where the C++ kernel skips positions at which ``d`` is zero
    (after ReLU and max-pooling most are).
    """
    _check_pair("conv_squares", "d", d, 5, "x", x, 4)
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    if d.shape[1] != x.shape[0] or list(d.shape[3:]) != sizes:
        raise ValueError(
            f"conv_squares: x {tuple(x.shape)} gives {x.shape[0]} samples of {sizes[0]}x{sizes[1]} positions, but d "
            f"(Q, N, O, H', W') has shape {tuple(d.shape)}; pass the layer's own stride, padding and dilation"
        )
    if groups < 1 or x.shape[1] % groups or d.shape[2] % groups:
        raise ValueError(f"conv_squares: {groups} groups must divide {x.shape[1]} inputs and {d.shape[2]} outputs")
    d, x = d.detach().contiguous(), x.detach().contiguous()
    arguments = (d, x, list(kernel_size), list(stride), list(padding), list(dilation), groups)
    return (torch.ops.autoflip.conv_squares.default(*arguments) if _traced() else _conv_squares(*arguments))[0]


def rademacher(
    seed: int,
    stream: int,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw signs: each entry is +1 or -1 with equal chance, a function of (seed, stream, position) alone.

    Args:
        seed: any integer, taken modulo 2**64.
        stream: any integer; streams of one seed are independent of each other.
        shape: of the result.
        dtype: floating.
        device: of the result; the signs do not depend on it.

    Returns:
        ``shape``, ``dtype``.

    Source: SplitMix64, Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    device = torch.device(device)
    if backend.serve("rademacher", device) == "cpp":
        out = torch.empty(shape, dtype=torch.float32)
        kernels = backend.extension("_C")[0]
        assert kernels is not None
        words = (seed % (1 << 64), stream % (1 << 64))
        kernels.rademacher(*words, out.data_ptr(), out.numel(), torch.get_num_threads())
        return out.to(dtype)
    return reference.rademacher(seed, stream, tuple(shape)).to(device, dtype)


def _check_pair(op: str, left: str, a: Tensor, a_dims: int, right: str, b: Tensor, b_dims: int) -> None:
    if a.dim() != a_dims or b.dim() != b_dims:
        raise ValueError(
            f"{op}: {left} has shape {tuple(a.shape)} and {right} has {tuple(b.shape)}; "
            f"wanted {a_dims} and {b_dims} dimensions"
        )
    if a.dtype != b.dtype or a.device != b.device or not a.is_floating_point():
        raise ValueError(
            f"{op}: {left} is {a.dtype} on {a.device} and {right} is {b.dtype} on {b.device}; "
            "both need one floating dtype and one device"
        )


def _traced() -> bool:
    """Return whether someone watches (FlopCounterMode, compile, fake tensors): then the registered op must be seen."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _pair(sizes: list[int]) -> Pair:
    return sizes[0], sizes[1]


def _kernels(op: str, tensor: Tensor) -> Any:
    """Return the C++ kernels when they serve ``op``; they are written for float32, the reference for the rest."""
    if backend.serve(op, tensor.device) != "cpp" or tensor.dtype != torch.float32:
        return None
    return backend.extension("_C")[0]


def _squared_matmul(d: Tensor, a: Tensor) -> Tensor:
    if backend.serve("squared_matmul", d.device) == "triton" and d.dtype != torch.float64:
        from autoflip.kernels.hessian import squared_matmul

        return squared_matmul(d, a)
    return reference.squared_matmul(d, a)


def _sequence_squares(d: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    if (kernels := _kernels("sequence_squares", d)) is None:
        return reference.sequence_squares(d, u), torch.tensor(2 * d.numel() * u.shape[2])
    out = u.new_empty(d.shape[2], u.shape[2])
    pointers = (d.data_ptr(), u.data_ptr(), out.data_ptr())
    ran = kernels.sequence_squares(*pointers, *d.shape, u.shape[2], torch.get_num_threads())
    return out, torch.tensor(2 * ran)


def _conv_squares(
    d: Tensor, x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> tuple[Tensor, Tensor]:
    if (kernels := _kernels("conv_squares", d)) is None:
        out = reference.conv_squares(d, x, _pair(kernel), _pair(stride), _pair(padding), _pair(dilation), groups)
        return out, torch.tensor(2 * d.numel() * out.shape[1])
    out = x.new_empty(d.shape[2], x.shape[1] // groups * kernel[0] * kernel[1])
    sizes = (*d.shape[:3], groups, *x.shape[1:], *d.shape[3:], *kernel, *stride, *padding, *dilation)
    pointers = (d.data_ptr(), x.data_ptr(), out.data_ptr())
    return out, torch.tensor(2 * kernels.conv_squares(*pointers, *sizes, torch.get_num_threads()))


_lib = torch.library.Library("autoflip", "FRAGMENT")
_lib.define("squared_matmul(Tensor d, Tensor a) -> Tensor")
_lib.define("sequence_squares(Tensor d, Tensor u) -> (Tensor, Tensor)")
_lib.define(
    "conv_squares(Tensor d, Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups)"
    " -> (Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _lib.impl("squared_matmul", _squared_matmul, _device)
    _lib.impl("sequence_squares", _sequence_squares, _device)
    _lib.impl("conv_squares", _conv_squares, _device)


@torch.library.register_fake("autoflip::squared_matmul", lib=_lib)
def _(d: Tensor, a: Tensor) -> Tensor:
    return d.new_empty(d.shape[1], a.shape[1])


@torch.library.register_fake("autoflip::sequence_squares", lib=_lib)
def _(d: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return d.new_empty(d.shape[2], u.shape[2]), torch.empty((), dtype=torch.int64)


@torch.library.register_fake("autoflip::conv_squares", lib=_lib)
def _(d: Tensor, x: Tensor, kernel_size: list[int], *rest: Any) -> tuple[Tensor, Tensor]:
    columns = x.shape[1] // rest[-1] * kernel_size[0] * kernel_size[1]
    return d.new_empty(d.shape[2], columns), torch.empty((), dtype=torch.int64)


@register_flop_formula(torch.ops.autoflip.squared_matmul)
def _squared_matmul_flops(d_shape: Any, a_shape: Any, *, out_shape: Any = None, **_: Any) -> int:
    return 2 * d_shape[0] * d_shape[1] * a_shape[1]


@register_flop_formula([torch.ops.autoflip.sequence_squares, torch.ops.autoflip.conv_squares], get_raw=True)
def _squares_flops(*_: Any, out_val: tuple[Tensor, Tensor], **__: Any) -> int:
    return int(out_val[1])  # the kernel counts what it ran: zeros that it skips are known to it alone
