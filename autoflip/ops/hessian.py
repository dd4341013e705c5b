"""Sums over samples of squared per-sample gradients.

The diagonal of a Gauss-Newton matrix is ``sum_n (J_n^T s)^2`` over output factors ``s``: one squared gradient a
sample. A dense layer's is a product of two squares; a convolution's (or a sequence's) is summed over positions
before it is squared. Neither the samples' gradients nor the patches of more than a few samples are ever held.
Nothing here is differentiable: the results are statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autoflip.ops import _hessian, reference
from autoflip.ops import _hessian_checks as checks
from autoflip.ops._hessian import Pair
from autoflip.ops._hessian_checks import Factors
from autoflip.ops._hessian_registered import traced

__all__ = [
    "conv_pull_back",
    "conv_squares",
    "dense_pull_back",
    "factor_squares",
    "sequence_squares",
    "squared_matmul",
]


def squared_matmul(
    d: Tensor, a: Tensor, *, squared: bool = False, samples: Tensor | None = None, coarse: bool = False
) -> Tensor:
    """Sum the squared per-sample gradients of a dense layer: ``D[o, k] = sum_n d[n, o]^2 a[n, k]^2``.

    Args:
        d: ``(N, O)``, floating, the loss factor's gradient at the layer's output.
        a: ``(N, K)``, dtype and device of ``d``, the layer's input.
        squared: ``d`` holds squares already, such as the sum of several factors'.
        samples: ``(N,)``, int64, device of ``d``: the row of ``a`` that each row of ``d`` is of, ``a[samples[n]]``
            in place of ``a[n]``. A sample's rows cost as much as one where they follow each other.
        coarse: squares may round to bfloat16 (sums are float32), where the CPU multiplies tiles of it.

    Returns:
        ``(O, K)``, dtype of ``d``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``2 * N * O * K`` FLOPs, less where the C++ kernel skips zeros of ``d``.

    Example:
        >>> squared_matmul(torch.tensor([[1., 2.]]), torch.tensor([[3., 1.]]))
        tensor([[ 9.,  1.],
                [36.,  4.]])
    """
    checks.pair("squared_matmul", "d", d, 2, "a", a, 2)
    if samples is not None:
        checks.rows("squared_matmul", samples, d, "a", a)
    elif d.shape[0] != a.shape[0]:
        raise ValueError(
            f"squared_matmul: d has {d.shape[0]} samples and a has {a.shape[0]}; both need one row a sample. "
            "For a sequence (several rows a sample) use sequence_squares."
        )
    d, a = d.detach().contiguous(), a.detach().contiguous()
    op = torch.ops.autoflip.squared_matmul.default if traced() else _hessian.squared_matmul
    return op(d, a, squared, None if samples is None else samples.contiguous(), coarse)[0]


def sequence_squares(d: Factors, u: Tensor | Sequence[Tensor]) -> Tensor:
    """Square what is summed over positions: ``D[o, k] = sum_qn (sum_p d[q][n, o, p] u[n, p, k])^2``.

    Args:
        d: Q tensors ``(N, O, P)`` (or one ``(Q, N, O, P)``), floating: Q factors' gradients at the output of a layer
            that serves P positions. Views of tensors with another order of axes are fine, like ``u``'s. bfloat16
            beside a float32 ``u``: products round to bfloat16, sums are float32, and first and last positions that
            together are within 2^-12 of the largest, as gradients fade through time, may be left out.
        u: ``(N, P, K)``, dtype and device of ``d``, the layer's input at each position; or several, whose columns count
            as one tensor's side by side.

    Returns:
        ``(O, K)``, dtype of ``u``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``2 * Q * N * O * P * K`` FLOPs; the C++ kernel skips zeros in first and last positions.
    """
    d = checks.factors("sequence_squares", d, contiguous=False)
    u = [u.detach()] if isinstance(u, Tensor) else [one.detach() for one in u]
    for one in u:
        checks.pair("sequence_squares", "d", d[0], 3, "u", one, 3, rounded=True)
        if (d[0].shape[0], d[0].shape[2]) != (one.shape[0], one.shape[1]):
            raise ValueError(
                f"sequence_squares: d has {len(d)} factors (N, O, P) of shape {tuple(d[0].shape)} and u (N, P, K) has "
                f"{tuple(one.shape)}; samples N and positions P must agree. Is u still (N, K, P)? Then transpose it."
            )
    op = torch.ops.autoflip.sequence_squares.default if traced() else _hessian.sequence_squares
    return op(d, u)[0]


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
    d = checks.factors("conv_squares", d)
    checks.pair("conv_squares", "d", d[0], 4, "x", x, 4)
    height, width = _hessian.positions(x.shape[2:], kernel_size, stride, padding, dilation)
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
        checks.positions("conv_squares", at, d[0], height * width)
        at = at.contiguous()
    x = x.detach().contiguous()
    arguments = (d, x, list(kernel_size), list(stride), list(padding), list(dilation), groups, at)
    op = torch.ops.autoflip.conv_squares.default if traced() else _hessian.conv_squares
    return op(*arguments)[0]


def factor_squares(d: Factors) -> Tensor:
    """Return ``sum_q d[q]^2``.

    Args:
        d: Q tensors of one shape (or one with Q in front), floating.

    Returns:
        Shape and dtype of a factor.

    Raises:
        ValueError: they differ in shape or dtype.
    """
    d = checks.factors("factor_squares", d)
    return reference.factor_squares(torch.stack(d)) if traced() else _hessian.factor_squares(d)


def dense_pull_back(
    d: Factors,
    weight: Tensor,
    gate: Tensor | None = None,
    *,
    squared: bool = False,
    samples: Tensor | None = None,
    coarse: bool = False,
) -> Tensor:
    """Return a dense layer's gradient at its input, behind a ReLU: ``v[q] = (d[q] @ weight) * (gate > 0)``.

    Args:
        d: Q tensors ``(N, O)`` (or one with Q in front), floating: Q factors' gradients at the layer's output. A
            sample's are zero alike where a ReLU behind the layer was.
        weight: ``(O, K)``, dtype and device of ``d``.
        gate: ``(N, K)``, like ``weight``: what the ReLU in front of the layer left; None where there is none.
        squared: return ``sum_q v[q]^2``, which then never holds all factors.
        samples: ``(N,)``, int64, device of ``d``: the row of ``gate`` that each row of ``d`` is of,
            ``gate[samples[n]]`` in place of ``gate[n]``; ``gate`` may have any number of rows then.
        coarse: ``d`` and ``weight`` may round to bfloat16 (sums are float32), where the CPU multiplies tiles of it.

    Returns:
        ``(Q, N, K)``, or ``(N, K)`` when ``squared``; dtype of ``d``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``2 * Q * N * O * K`` FLOPs, less where the C++ kernel skips outputs that are zero for all of a sample's
    factors.
    """
    d = checks.factors("dense_pull_back", d)
    checks.pair("dense_pull_back", "d", d[0], 2, "weight", weight, 2)
    if d[0].shape[1] != weight.shape[0]:
        raise ValueError(
            f"dense_pull_back: d's factors (N, O) have shape {tuple(d[0].shape)} and weight (O, K) has "
            f"{tuple(weight.shape)}; O must agree"
        )
    wanted = len(d[0]), weight.shape[1]
    if samples is not None and gate is not None:
        checks.rows("dense_pull_back", samples, d[0], "gate", gate)
        wanted = len(gate), weight.shape[1]
    if gate is not None and (gate.shape != wanted or gate.dtype != weight.dtype or gate.device != weight.device):
        raise ValueError(
            f"dense_pull_back: gate is {gate.dtype} {tuple(gate.shape)} on {gate.device}; wanted {weight.dtype} "
            f"{wanted} on {weight.device}: what the layer read"
        )
    gate = None if gate is None else gate.detach().contiguous()
    samples = None if samples is None or gate is None else samples.contiguous()
    arguments = d, weight.detach().contiguous(), gate, squared, samples, coarse
    op = torch.ops.autoflip.dense_pull_back.default if traced() else _hessian.dense_pull_back
    return op(*arguments)[0]


def conv_pull_back(
    d: Factors,
    weight: Tensor,
    input_size: tuple[int, int, int],
    at: Tensor,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return a convolution's gradient at its input from few values of the gradient at its output, as max-pooling has.

    Args:
        d: Q tensors ``(N, O, h, w)`` (or one with Q in front), floating: values of the gradient at the output.
        weight: ``(O, C // groups, kernel height, kernel width)``, dtype and device of ``d``.
        input_size: ``(C, H, W)`` of the layer's input.
        at: ``(N, O, h, w)``, int64: the position in the output (row times W' plus column) of each value.
        stride: as the layer's, like the next three.
        padding: zeros added on each side.
        dilation: step inside a patch.
        groups: as in ``torch.nn.Conv2d``.

    Returns:
        ``(Q, N, C, H, W)``, dtype of ``d``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``2 * d's values * K`` FLOPs, K the weights of an output, less where the C++ kernel skips zeros.
    """
    d = checks.factors("conv_pull_back", d)
    checks.pair("conv_pull_back", "d", d[0], 4, "weight", weight, 4)
    height, width = _hessian.positions(input_size[1:], weight.shape[2:], stride, padding, dilation)
    if d[0].shape[1] != weight.shape[0] or weight.shape[1] * groups != input_size[0] or weight.shape[0] % groups:
        raise ValueError(
            f"conv_pull_back: d's factors (N, O, h, w) have shape {tuple(d[0].shape)}, weight has "
            f"{tuple(weight.shape)} in {groups} groups and the input {input_size}; outputs and channels must agree"
        )
    checks.positions("conv_pull_back", at, d[0], height * width)
    geometry = list(stride), list(padding), list(dilation), groups
    arguments = (d, weight.detach().contiguous(), list(input_size), at.contiguous(), *geometry)
    op = torch.ops.autoflip.conv_pull_back.default if traced() else _hessian.conv_pull_back
    return op(*arguments)[0]
