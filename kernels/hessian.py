"""Sums over samples of squared per-sample gradients, and signs drawn from a counter.

squared_matmul  D[O, K] = (d * d)[N, O].T @ (a * a)[N, K]; squares are taken after the load, they never exist in memory.
                Grid (cdiv(O, BO) * cdiv(K, BK),); each program walks N.
conv_squares    D[O, K] = sum_qn (sum_p d[Q, N, O, P] u[n, p, K])^2, u the patches of x, never in memory: a program
                computes addresses in x. Grid (tiles of O and K, groups, parts of N): parts have their own D and
                are added afterwards, in order, so that the sum does not depend on timing.
rademacher      out[i] = +-1, bit i % 64 of SplitMix64's word i / 64; grid over words' halves.
Layout   row-major; float32 sums, IEEE (no TF32).
Unmeasured on a GPU.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def squared_matmul_kernel(p_d, p_a, p_out, N, O, K, BN: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):  # noqa: E741
    """One tile of D."""
    i_tile = tl.program_id(0).to(tl.int64)
    n_k = tl.cdiv(K, BK)
    o_o = i_tile // n_k * BO + tl.arange(0, BO)
    o_k = i_tile % n_k * BK + tl.arange(0, BK)
    m_o, m_k = o_o < O, o_k < K
    b_out = tl.zeros([BO, BK], tl.float32)
    for i_n in range(0, N, BN):
        o_n = (i_n + tl.arange(0, BN)).to(tl.int64)
        m_n = o_n < N
        b_d = tl.load(p_d + o_n[None, :] * O + o_o[:, None], m_n[None, :] & m_o[:, None], 0.0)  # [BO, BN]
        b_a = tl.load(p_a + o_n[:, None] * K + o_k[None, :], m_n[:, None] & m_k[None, :], 0.0)  # [BN, BK]
        b_d, b_a = b_d.to(tl.float32), b_a.to(tl.float32)
        b_out = tl.dot(b_d * b_d, b_a * b_a, b_out, input_precision="ieee")
    p_tile = p_out + o_o[:, None] * K + o_k[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), m_o[:, None] & m_k[None, :])


def squared_matmul(d: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Launch; d and a are contiguous, of one dtype and on one device (checked by autoflip.ops)."""
    N, O, K = *d.shape, a.shape[1]  # noqa: E741
    out = torch.empty(O, K, dtype=d.dtype, device=d.device)
    BN, BO, BK = 32, 64, 64
    grid = (triton.cdiv(O, BO) * triton.cdiv(K, BK),)
    squared_matmul_kernel[grid](d, a, out, N, O, K, BN=BN, BO=BO, BK=BK, num_warps=4)
    return out


@triton.jit
def conv_squares_kernel(
    p_d, p_x, p_out, Q, N, OG, KG, P, C, H, W, OW, KH, KW, SH, SW, PH, PW, DH, DW, s_n, s_c, s_h, s_w, per_part,
    BO: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip  # noqa: E741
    """One tile of one group's D, for one part of the samples; OG, KG and C are a group's."""
    i_tile, i_g, i_part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n_k = tl.cdiv(KG, BK)
    o_o = i_tile // n_k * BO + tl.arange(0, BO)
    o_k = i_tile % n_k * BK + tl.arange(0, BK)
    m_o, m_k = o_o < OG, o_k < KG
    groups = tl.num_programs(1)
    # column k of a filter is (channel, row, column)
    k_c, k_i, k_j = o_k // (KH * KW), o_k // KW % KH * DH - PH, o_k % KW * DW - PW
    b_out = tl.zeros([BO, BK], tl.float32)
    for i_n in range(i_part * per_part, tl.minimum((i_part + 1) * per_part, N)):
        for i_q in range(0, Q):
            row = (i_q * N + i_n) * groups + i_g
            b_sum = tl.zeros([BO, BK], tl.float32)
            for i_p in range(0, P, BP):
                o_p = i_p + tl.arange(0, BP)
                m_p = o_p < P
                b_d = tl.load(p_d + (row * OG + o_o[:, None]) * P + o_p[None, :], m_o[:, None] & m_p[None, :], 0.0)
                h = (o_p // OW * SH)[:, None] + k_i[None, :]  # [BP, BK]
                w = (o_p % OW * SW)[:, None] + k_j[None, :]
                inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & m_p[:, None] & m_k[None, :]
                at = i_n * s_n + (i_g * C + k_c)[None, :] * s_c + h * s_h + w * s_w
                b_u = tl.load(p_x + at, inside, 0.0)
                b_sum = tl.dot(b_d.to(tl.float32), b_u.to(tl.float32), b_sum, input_precision="ieee")
            b_out += b_sum * b_sum
    p_tile = p_out + ((i_part * groups + i_g) * OG + o_o[:, None]) * KG + o_k[None, :]
    tl.store(p_tile, b_out, m_o[:, None] & m_k[None, :])


def conv_squares(d, x, size, kernel, stride, padding, dilation, groups, strides):
    """Launch for ``d (Q, N, O, P)``; x is read by its strides (sample, channel, row, column), OW = ``size[1]``."""
    Q, N, O, P = d.shape  # noqa: E741
    C, H, W = (n // g for n, g in zip(x.shape[1:], (groups, 1, 1)))
    columns, outputs = C * kernel[0] * kernel[1], O // groups
    BO, BK, BP = 32, 32, 32  # wider tiles of addresses spill, and so do these with four warps
    tiles = triton.cdiv(outputs, BO) * triton.cdiv(columns, BK)
    # enough programs for the largest GPU of today, no more partial sums than samples
    parts = max(1, min(N, 512 // (tiles * groups)))
    per_part = triton.cdiv(N, parts)
    parts = triton.cdiv(N, per_part)
    out = torch.empty(parts, O, columns, dtype=torch.float32, device=d.device)
    conv_squares_kernel[(tiles, groups, parts)](
        d, x, out, Q, N, outputs, columns, P, C, H, W, size[1], *kernel, *stride, *padding, *dilation, *strides,
        per_part, BO=BO, BK=BK, BP=BP, num_warps=8,
    )  # fmt: skip
    return out.sum(0).to(d.dtype)


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def rademacher_kernel(p_start, p_out, count, B: tl.constexpr):
    """B signs of the stream whose first state is at p_start."""
    o = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    word = (o // 64 + 1).to(tl.uint64)
    bits = _mix(tl.load(p_start).to(tl.uint64) + word * 0x9E3779B97F4A7C15)
    sign = 1.0 - 2.0 * ((bits >> (o % 64).to(tl.uint64)) & 1).to(tl.float32)
    tl.store(p_out + o, sign, o < count)


def rademacher(start: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Launch; ``start`` is the stream's first state, an int64 scalar."""
    out = torch.empty(shape, dtype=torch.float32, device=device)
    if out.numel():
        rademacher_kernel[(triton.cdiv(out.numel(), 1024),)](start.to(device), out, out.numel(), B=1024, num_warps=4)
    return out
