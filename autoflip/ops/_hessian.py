"""Who computes the ops of hessian.py: the C++ kernels, CUDA, Triton or the reference.

The functions here are called with checked, contiguous tensors. Two results: the op's, and the FLOPs that ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoflip.ops import backend, reference, reference_softmax

for _name in ("squared_matmul", "sequence_squares", "conv_squares", "rademacher"):
    # CUDA's kernels have no tensor cores and no GPU has measured them
    backend.register(_name, "cpp", "cuda", "triton", optional=True, asked=("cuda",))
# on a GPU torch's dense product is as good: values behind max-pooling are scattered first
backend.register("conv_pull_back", "cpp", optional=True)
# there torch's product reads the weight once, too
backend.register("dense_pull_back", "cpp", optional=True)

_FEW = 3

_HOMES = {"cpp": "_C", "cuda": "_cuda"}

Pair = tuple[int, int]
Ints = Sequence[int]


def _pair(sizes: list[int]) -> Pair:
    return sizes[0], sizes[1]


def _extension(served: str, tensor: Tensor) -> Any:
    """Return the kernels of ``served`` ("cpp" or "cuda"); None for other backends and for what they are not written
    for: they are for float32, the reference does the rest."""
    if served not in _HOMES or tensor.dtype != torch.float32:
        return None
    return backend.extension(_HOMES[served])[0]


def cuda_rademacher(start: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw signs from a stream's first state, on a GPU."""
    out = torch.empty(shape, dtype=torch.float32, device=device)
    kernels = backend.extension("_cuda")[0]
    assert kernels is not None
    with torch.cuda.device(device):
        kernels.rademacher(start % (1 << 64), out.numel(), out.data_ptr(), torch.cuda.current_stream().cuda_stream)
    return out


def _cuda_conv(kernels: Any, d: Tensor, x: Tensor, size: Pair, window: list[int], groups: int) -> Tensor:
    """Launch for ``d (Q, N, O, P)``; x is read by its strides; window: kernel, stride, padding, dilation."""
    q, n, o, p = d.shape
    channels, columns, outputs = x.shape[1] // groups, x.shape[1] // groups * window[0] * window[1], o // groups
    # enough blocks for the largest GPU of today, no more partial sums than samples
    tiles = -(-outputs // 32) * -(-columns // 32) * groups
    part = -(-n // max(1, min(n, 1024 // max(1, tiles))))
    parts = -(-n // part)
    if max(groups, parts) > 65535:
        raise ValueError(f"conv_squares: {groups} groups, {parts} parts of the samples; CUDA's grid ends at 65535")
    out = x.new_empty(parts, o, columns)
    sizes = [q, n, groups, outputs, columns, p, *x.shape[2:], size[1], *window, channels, *x.stride(), parts, part]
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        kernels.conv_squares(d.data_ptr(), x.data_ptr(), sizes, out.data_ptr(), stream)
    return out.sum(0)


def _triton(served: str, tensor: Tensor) -> bool:
    """Return whether Triton serves; its sums are float32, so float64 goes to the reference."""
    return served == "triton" and tensor.dtype != torch.float64


def squared_matmul(
    d: Tensor, a: Tensor, squared: bool = False, samples: Tensor | None = None, coarse: bool = False
) -> tuple[Tensor, int]:
    """See hessian.squared_matmul."""
    (n, o), k = d.shape, a.shape[1]
    served = backend.serve("squared_matmul", d.device)
    kernels = _extension(served, d)
    if kernels is not None and served == "cpp":
        out = d.new_empty(o, k)
        pointers = d.data_ptr(), a.data_ptr(), 0 if samples is None else samples.data_ptr(), out.data_ptr()
        return out, 2 * kernels.squared_matmul(*pointers, n, o, k, squared, coarse, torch.get_num_threads())
    if samples is not None:
        d, a, squared = _added_up(d, a, squared, samples)
        n = len(d)
    if _triton(served, d) and not squared:
        from autoflip.kernels import hessian

        return hessian.squared_matmul(d, a), 2 * n * o * k
    if kernels is not None and served == "cuda" and o < 32 * 65535:
        out = d.new_empty(o, k)
        with torch.cuda.device(d.device):
            stream = torch.cuda.current_stream().cuda_stream
            kernels.squared_matmul(d.data_ptr(), a.data_ptr(), n, o, k, squared, out.data_ptr(), stream)
        return out, 2 * n * o * k
    return reference.squared_matmul(d, a, squared), 2 * n * o * k


def _added_up(d: Tensor, a: Tensor, squared: bool, samples: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Add up the squares of neighbouring rows that read one row of ``a``; return them and what they read."""
    seen, places = torch.unique_consecutive(samples, return_inverse=True)
    v = d if squared else d.square()
    return v.new_zeros(len(seen), v.shape[1]).index_add_(0, places, v), a[seen], True


def sequence_squares(d: list[Tensor], u: list[Tensor]) -> tuple[Tensor, int]:
    """See hessian.sequence_squares."""
    columns = sum(one.shape[2] for one in u)
    full = 2 * len(d) * d[0].numel() * columns
    served = backend.serve("sequence_squares", u[0].device)
    kernels = _extension(served, u[0])
    if kernels is not None and served == "cpp":
        return _sequence_squares(kernels, d, u, columns)
    together = torch.cat(u, 2) if len(u) > 1 else u[0]
    d = [one.to(together.dtype) for one in d]
    if _triton(served, together):
        from autoflip.kernels import hessian

        one, (p, k) = (1, 1), together.shape[1:]
        image = together.contiguous().transpose(1, 2).unsqueeze(3)  # positions are an image's rows
        out = hessian.conv_squares(torch.stack(d), image, (p, 1), one, one, (0, 0), one, 1, (p * k, 1, k, 0))
        return out, full
    if kernels is None:
        return reference.sequence_squares(torch.stack(d), together), full
    p, k = together.shape[1:]
    image = together.contiguous().transpose(1, 2).unsqueeze(3).as_strided((len(together), k, p, 1), (p * k, 1, k, 0))
    return _cuda_conv(kernels, torch.stack(d), image, (p, 1), [1, 1, 1, 1, 0, 0, 1, 1], 1), full


def _sequence_squares(kernels: Any, d: list[Tensor], u: list[Tensor], columns: int) -> tuple[Tensor, int]:
    coarse = d[0].dtype == torch.bfloat16 and kernels.coarse()
    if d[0].dtype != torch.float32 and not coarse:
        d = [one.float() for one in d]
    if (coarse and d[0].stride(1) != 1) or any(one.stride() != d[0].stride() for one in d):
        d = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in d]
    u = [one if one.stride(2) == 1 else one.contiguous() for one in u]
    (n, o, p), (by_sample, by_output, by_position) = d[0].shape, d[0].stride()
    out = u[0].new_empty(o, columns)
    inputs = [(one.data_ptr(), one.shape[2], *one.stride()[:2]) for one in u]
    sizes = (n, o, p, by_sample, by_output, by_position)
    ran = kernels.sequence_squares(
        [one.data_ptr() for one in d], inputs, out.data_ptr(), sizes, coarse, torch.get_num_threads()
    )
    return out, 2 * ran


def conv_squares(
    d: list[Tensor],
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    at: Tensor | None = None,
) -> tuple[Tensor, int]:
    """See hessian.conv_squares."""
    columns = x.shape[1] // groups * kernel[0] * kernel[1]
    full = 2 * len(d) * d[0].numel() * columns
    served = backend.serve("conv_squares", x.device)
    kernels = _extension(served, x)
    if (kernels is not None and served == "cuda") or _triton(served, x):
        size = positions(x.shape[2:], kernel, stride, padding, dilation)
        rows = torch.stack(d).flatten(3)
        if at is not None:
            whole = rows.new_zeros(*rows.shape[:3], size[0] * size[1])
            rows = whole.scatter_add_(3, at.flatten(2).expand_as(rows), rows)
        if kernels is not None:
            return _cuda_conv(kernels, rows, x, size, [*kernel, *stride, *padding, *dilation], groups), full
        from autoflip.kernels import hessian

        out = hessian.conv_squares(rows, x, size, kernel, stride, padding, dilation, groups, x.stride())
        return out, full
    if kernels is None:
        shape = _pair(kernel), _pair(stride), _pair(padding), _pair(dilation), groups
        out = reference.conv_squares(torch.stack(d), x, *shape, at)
        return out, full
    out = x.new_empty(d[0].shape[1], columns)
    sizes = _sizes(d[0], x.shape[1:], kernel, stride, padding, dilation, groups)
    pointers = ([one.data_ptr() for one in d], x.data_ptr(), 0 if at is None else at.data_ptr(), out.data_ptr())
    return out, 2 * kernels.conv_squares(*pointers, sizes, torch.get_num_threads())


def conv_pull_back(
    d: list[Tensor],
    weight: Tensor,
    input_size: list[int],
    at: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, int]:
    """See hessian.conv_pull_back."""
    if (kernels := _extension(backend.serve("conv_pull_back", weight.device), weight)) is None:
        shape = _pair(stride), _pair(padding), _pair(dilation), groups
        out = reference.conv_pull_back(torch.stack(d), weight, tuple(input_size), at, *shape)
        return out, 2 * len(d) * d[0].numel() * weight[0].numel()
    out = weight.new_empty(len(d), len(d[0]), *input_size)
    sizes = _sizes(d[0], input_size, weight.shape[2:], stride, padding, dilation, groups)
    pointers = ([one.data_ptr() for one in d], weight.data_ptr(), at.data_ptr(), out.data_ptr())
    return out, 2 * kernels.conv_pull_back(*pointers, sizes, torch.get_num_threads())


def factor_squares(d: list[Tensor]) -> Tensor:
    """See hessian.factor_squares."""
    kernels = _extension(backend.serve("dense_pull_back", d[0].device), d[0])
    if kernels is None:
        return reference.factor_squares(torch.stack(d))
    out = torch.empty_like(d[0])
    kernels.factor_squares([one.data_ptr() for one in d], out.data_ptr(), out.numel())
    return out


def dense_pull_back(
    d: list[Tensor],
    weight: Tensor,
    gate: Tensor | None = None,
    squared: bool = False,
    samples: Tensor | None = None,
    coarse: bool = False,
) -> tuple[Tensor, int]:
    """See hessian.dense_pull_back."""
    (n, o), k = d[0].shape, weight.shape[1]
    # a few factors have too little to do with each weight that is loaded, a matrix product has all samples
    kernels = _extension(backend.serve("dense_pull_back", weight.device), weight)
    where = 0 if gate is None else gate.data_ptr(), 0 if samples is None else samples.data_ptr()
    tiled = coarse and kernels is not None and kernels.tiled()
    if kernels is not None and len(d) == 1 and not tiled:
        v = d[0] @ weight
        kernels.gate_rows(v.data_ptr(), *where, n, k, squared)
        return v if squared else v.unsqueeze(0), 2 * n * o * k
    if kernels is None or (len(d) < _FEW and not tiled):
        gate = gate if samples is None or gate is None else gate[samples]
        factors = torch.stack(d)
        return reference.dense_pull_back(factors, weight, gate, squared), 2 * len(d) * n * o * k
    out = weight.new_empty((n, k) if squared else (len(d), n, k))
    pointers = [one.data_ptr() for one in d], weight.data_ptr(), *where, out.data_ptr()
    ran = kernels.dense_pull_back(*pointers, n, o, k, squared, tiled, torch.get_num_threads())
    return out, 2 * ran


def softmax_pull_back(
    f: Tensor,
    scale: Tensor,
    last: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    before: Tensor | None,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """See softmax.softmax_pull_back."""
    (n, classes), (o, k) = f.shape, weight.shape
    kernels = _extension(backend.serve("dense_pull_back", f.device), f)
    if kernels is None or not n or not classes:
        out = reference_softmax.softmax_pull_back(f, scale, last, gate, weight, before, squared)
        return *out, 2 * max(classes - 1, 0) * n * o * (classes + k)
    squares, hidden = torch.empty_like(f), f.new_empty(n, o)
    pulled = f.new_empty((n, k) if squared else (classes - 1, n, k))
    layers = [0 if t is None else t.data_ptr() for t in (last, gate, weight, before)]
    where = [t.data_ptr() for t in (squares, hidden, pulled)]
    ran = kernels.softmax_pull(
        f.data_ptr(), scale.data_ptr(), layers, where, (n, classes, o, k), squared, torch.get_num_threads()
    )
    return squares, hidden, pulled, 2 * ran


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
