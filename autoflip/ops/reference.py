"""Each op in a few lines of torch, at home in float64: the truth that every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

# --- masked matmul


def masked_matmul(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """``y = x @ (weight * mask).T`` for ``x (N, K)``, ``weight (O, K)``, ``mask (O, K)``."""
    return x @ torch.where(mask, weight, 0).T


# --- delta (sparse-delta coding)


# --- hessian (Gauss-Newton diagonal and traces)


def rademacher(seed: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Signs +-1 (float32) that depend on (seed, stream, position) alone: bit i % 64 of SplitMix64's word i / 64."""
    count = 1
    for size in shape:
        count *= size
    start = _mix(_mix(torch.tensor(_int64(seed))) ^ _int64(stream))
    words = _mix(start + (torch.arange((count + 63) // 64) + 1) * _int64(0x9E3779B97F4A7C15))
    bits = words[:, None] >> torch.arange(64) & 1
    return (1.0 - 2.0 * bits.reshape(-1)[:count].float()).reshape(shape)


def _int64(value: int) -> int:
    """Return ``value`` modulo 2**64, read as a signed number: torch's int64 wraps like C's uint64."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def _mix(z: Tensor) -> Tensor:
    """Finish SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014)."""

    def right(z: Tensor, by: int) -> Tensor:
        return z >> by & ((1 << 64 - by) - 1)  # torch shifts the sign in; C's uint64 shifts in zeros

    z = (z ^ right(z, 30)) * _int64(0xBF58476D1CE4E5B9)
    z = (z ^ right(z, 27)) * _int64(0x94D049BB133111EB)
    return z ^ right(z, 31)


def squared_matmul(d: Tensor, a: Tensor) -> Tensor:
    """``D[o, k] = sum_n d[n, o]^2 a[n, k]^2`` for ``d (N, O)``, ``a (N, K)``."""
    return d.square().T @ a.square()


def sequence_squares(d: Tensor, u: Tensor) -> Tensor:
    """``D[o, k] = sum_qn (sum_p d[q, n, o, p] u[n, p, k])^2`` for ``d (Q, N, O, P)``, ``u (N, P, K)``."""
    out = u.new_zeros(d.shape[2], u.shape[2])
    for n in range(len(u)):  # one sample at a time: the gradients of all samples are never held at once
        out += (d[:, n] @ u[n]).square().sum(0)
    return out


def conv_squares(
    d: Tensor,
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """``D[o, k] = sum_qn (sum_p d[q, n, o, p] u[n, k, p])^2``, ``u`` the patches (im2col) of ``x (N, C, H, W)``.

    ``d`` is ``(Q, N, O, H', W')``, the result ``(O, C // groups * kernel height * kernel width)``.
    """
    o_group = d.shape[2] // groups
    out = [x.new_zeros(o_group, x.shape[1] // groups * kernel_size[0] * kernel_size[1]) for _ in range(groups)]
    for n in range(len(x)):
        patches = torch.nn.functional.unfold(x[n : n + 1], kernel_size, dilation, padding, stride)[0].chunk(groups)
        for i, (total, u) in enumerate(zip(out, patches)):
            total += (d[:, n, i * o_group : (i + 1) * o_group].flatten(2) @ u.T).square().sum(0)
    return torch.cat(out)
