"""Sums over samples of squared per-sample gradients, and the random signs that the estimators draw.

The diagonal of a Gauss-Newton matrix is ``sum_n (J_n^T s)^2`` over output factors ``s``: one squared gradient a
sample. A dense layer's is a product of two squares; a convolution's (or a sequence's) is summed over positions
before it is squared. Neither the samples' gradients nor the patches of more than a few samples are ever held.
Nothing here is differentiable: the results are statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
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
Factors = Tensor | Sequence[Tensor]  # iterating gives one tensor a factor


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


def sequence_squares(d: Factors, u: Tensor) -> Tensor:
    """Square what is summed over positions: ``D[o, k] = sum_qn (sum_p d[q][n, o, p] u[n, p, k])^2``.

    Args:
        d: Q tensors ``(N, O, P)`` (or one ``(Q, N, O, P)``), floating: Q factors' gradients at the output of a layer
            that serves P positions.
        u: ``(N, P, K)``, dtype and device of ``d``, the layer's input at each position.

    Returns:
        ``(O, K)``, dtype of ``d``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``2 * Q * N * O * P * K`` FLOPs, less where the C++ kernel skips positions at which ``d`` is zero.
    """
    d = _factors("sequence_squares", d)
    _check_pair("sequence_squares", "d", d[0], 3, "u", u, 3)
    if (d[0].shape[0], d[0].shape[2]) != (u.shape[0], u.shape[1]):
        raise ValueError(
            f"sequence_squares: d has {len(d)} factors (N, O, P) of shape {tuple(d[0].shape)} and u (N, P, K) has "
            f"{tuple(u.shape)}; samples N and positions P must agree. Is u still (N, K, P)? Then transpose it."
        )
    u = u.detach().contiguous()
    return (torch.ops.autoflip.sequence_squares.default(d, u) if _traced() else _sequence_squares(d, u))[0]


def conv_squares(
    d: Factors,
    x: Tensor,
    kernel_size: Pair,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    at: Tensor | None = None,
) -> Tensor:
    """Sum the squared per-sample gradients of a 2-d convolution over samples and factors.

    ``D[o, k] = sum_qn (sum_p d[q][n, o, p] u[n, k, p])^2`` with ``u[n]`` the patches (im2col) of ``x[n]``, made
    for a few samples at a time.

    Args:
        d: Q tensors ``(N, O, H', W')`` (or one with Q in front), floating: Q factors' gradients at the layer's output.
        x: ``(N, C, H, W)``, dtype and device of ``d``, the layer's input.
        kernel_size: height and width, as are the next three; positions, not elements.
        stride: step between patches.
        padding: zeros added on each side.
        dilation: step inside a patch.
        groups: as in ``torch.nn.Conv2d``.
        at: for gradients that are zero nearly everywhere, as under max-pooling: ``(N, O, h, w)``, int64, the position
            (row times W' plus column) of each value; ``d`` is shaped like it then. Values at one position add up.

    Returns:
        ``(O, C // groups * kernel height * kernel width)``, dtype of ``d``: the weight's, flattened.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``2 * d's values * K`` FLOPs, less where the C++ kernel skips values that are zero (after ReLU and
    max-pooling most are).
    """
    d = _factors("conv_squares", d)
    _check_pair("conv_squares", "d", d[0], 4, "x", x, 4)
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    sizes = (height, width) if at is None else tuple(at.shape[2:])
    if d[0].shape[0] != x.shape[0] or d[0].shape[2:] != sizes:
        raise ValueError(
            f"conv_squares: x {tuple(x.shape)} gives {x.shape[0]} samples of {sizes[0]}x{sizes[1]} positions, but d's "
            f"factors (N, O, H', W') have shape {tuple(d[0].shape)}; pass the layer's own stride, padding and dilation"
        )
    outputs = d[0].shape[1]
    if groups < 1 or x.shape[1] % groups or outputs % groups:
        raise ValueError(f"conv_squares: {groups} groups must divide {x.shape[1]} inputs and {outputs} outputs")
    if at is not None:
        _check_positions(at, d[0], height * width)
        at = at.contiguous()
    x = x.detach().contiguous()
    arguments = (d, x, list(kernel_size), list(stride), list(padding), list(dilation), groups, at)
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


def _factors(op: str, d: Factors) -> list[Tensor]:
    factors = [one.detach().contiguous() for one in d]
    if not factors or any(one.shape != factors[0].shape or one.dtype != factors[0].dtype for one in factors):
        got = ", ".join(f"{one.dtype} {tuple(one.shape)}" for one in factors[:4])
        raise ValueError(f"{op}: d holds {len(factors)} factors ({got}); wanted one or more of one shape and dtype")
    return factors


def _check_positions(at: Tensor, d: Tensor, positions: int) -> None:
    if at.shape != d.shape or at.dtype != torch.int64 or at.device != d.device:
        raise ValueError(
            f"conv_squares: at is {at.dtype} {tuple(at.shape)} on {at.device}; wanted torch.int64 {tuple(d.shape)} on "
            f"{d.device}, the position of each of d's values"
        )
    # on a GPU the answer would have to be waited for; there the kernel leaves out what is out of range
    if at.device.type == "cpu" and not torch.compiler.is_compiling() and at.numel():
        low, high = (int(v) for v in at.aminmax())
        if low < 0 or high >= positions:
            raise ValueError(f"conv_squares: at holds positions {low} to {high}; the output has {positions}")


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


def _sequence_squares(d: list[Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    full = 2 * len(d) * d[0].numel() * u.shape[2]
    if (kernels := _kernels("sequence_squares", u)) is None:
        return reference.sequence_squares(torch.stack(d), u), torch.tensor(full)
    out = u.new_empty(d[0].shape[1], u.shape[2])
    factors = [one.data_ptr() for one in d]
    ran = kernels.sequence_squares(
        factors, u.data_ptr(), out.data_ptr(), *d[0].shape, u.shape[2], torch.get_num_threads()
    )
    return out, torch.tensor(2 * ran)


def _conv_squares(
    d: list[Tensor],
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    columns = x.shape[1] // groups * kernel[0] * kernel[1]
    if (kernels := _kernels("conv_squares", x)) is None:
        shape = _pair(kernel), _pair(stride), _pair(padding), _pair(dilation), groups
        out = reference.conv_squares(torch.stack(d), x, *shape, at)
        return out, torch.tensor(2 * len(d) * d[0].numel() * columns)
    out = x.new_empty(d[0].shape[1], columns)
    positions = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    n, o, *entries = d[0].shape
    sizes = (entries[0] * entries[1], n, o, groups, *x.shape[1:], *positions, *kernel, *stride, *padding, *dilation)
    pointers = ([one.data_ptr() for one in d], x.data_ptr(), 0 if at is None else at.data_ptr(), out.data_ptr())
    return out, torch.tensor(2 * kernels.conv_squares(*pointers, *sizes, torch.get_num_threads()))


_lib = torch.library.Library("autoflip", "FRAGMENT")
_lib.define("squared_matmul(Tensor d, Tensor a) -> Tensor")
_lib.define("sequence_squares(Tensor[] d, Tensor u) -> (Tensor, Tensor)")
_lib.define(
    "conv_squares(Tensor[] d, Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups,"
    " Tensor? at=None) -> (Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _lib.impl("squared_matmul", _squared_matmul, _device)
    _lib.impl("sequence_squares", _sequence_squares, _device)
    _lib.impl("conv_squares", _conv_squares, _device)


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


@register_flop_formula(torch.ops.autoflip.squared_matmul)
def _squared_matmul_flops(d_shape: Any, a_shape: Any, *, out_shape: Any = None, **_: Any) -> int:
    return 2 * d_shape[0] * d_shape[1] * a_shape[1]


@register_flop_formula([torch.ops.autoflip.sequence_squares, torch.ops.autoflip.conv_squares], get_raw=True)
def _squares_flops(*_: Any, out_val: tuple[Tensor, Tensor], **__: Any) -> int:
    return int(out_val[1])  # the kernel counts what it ran: zeros that it skips are known to it alone
