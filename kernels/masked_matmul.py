"""y[N, O] = act(x[N, K] @ (w * mask)[O, K].T + b) and its two gradients, tiles with no kept weight skipped.

Unmeasured on GPU: proven in the interpreter and compiled for sm_90; autoflip.ops uses it when asked for by name.

Layout   row-major; `live[ceil(O/32), ceil(K/32)]` uint8, one flag per weight tile that keeps any entry; the
         element mask (bool, shaped like w) is applied while a live tile is loaded.
Grid     one program per 32 x 32 tile of the result, one axis; sums in float32, IEEE (no TF32).
Source   tile skipping as in Gale et al., "Sparse GPU Kernels for Deep Learning", SC 2020.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import masked_blocks

TILE = 32


@triton.jit
def masked_matmul_fwd_kernel(
    p_x, p_w, p_mask, p_live, p_bias, p_y, N, O, K, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, B: tl.constexpr
):
    """One tile of y; walks K."""
    i_tile = tl.program_id(0).to(tl.int64)
    tiles_o, tiles_k = tl.cdiv(O, B), tl.cdiv(K, B)
    i_n, i_o = i_tile // tiles_o, i_tile % tiles_o
    o_n, o_o = i_n * B + tl.arange(0, B), i_o * B + tl.arange(0, B)
    m_n, m_o = o_n < N, o_o < O
    b_y = tl.zeros((B, B), tl.float32)  # [n, o]
    for i_k in range(tiles_k):
        if tl.load(p_live + i_o * tiles_k + i_k) != 0:
            o_k = i_k * B + tl.arange(0, B)
            m_k = o_k < K
            b_x = tl.load(p_x + o_n[:, None] * K + o_k[None, :], m_n[:, None] & m_k[None, :], 0.0)  # [n, k]
            at_w = o_o[None, :] * K + o_k[:, None]
            m_w = m_o[None, :] & m_k[:, None]
            kept = tl.load(p_mask + at_w, m_w, 0) != 0
            b_w = tl.load(p_w + at_w, m_w & kept, 0.0)  # [k, o]
            b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_o, m_o, 0.0)[None, :]
    if RELU:
        b_y = tl.where(b_y < 0, 0.0, b_y)  # NaN stays NaN
    tl.store(p_y + o_n[:, None] * O + o_o[None, :], b_y, m_n[:, None] & m_o[None, :])


@triton.jit
def masked_matmul_dx_kernel(p_dy, p_w, p_mask, p_live, p_dx, N, O, K, B: tl.constexpr):
    """One tile of dx; walks O."""
    i_tile = tl.program_id(0).to(tl.int64)
    tiles_o, tiles_k = tl.cdiv(O, B), tl.cdiv(K, B)
    i_n, i_k = i_tile // tiles_k, i_tile % tiles_k
    o_n, o_k = i_n * B + tl.arange(0, B), i_k * B + tl.arange(0, B)
    m_n, m_k = o_n < N, o_k < K
    b_dx = tl.zeros((B, B), tl.float32)  # [n, k]
    for i_o in range(tiles_o):
        if tl.load(p_live + i_o * tiles_k + i_k) != 0:
            o_o = (i_o * B + tl.arange(0, B)).to(tl.int64)
            m_o = o_o < O
            b_dy = tl.load(p_dy + o_n[:, None] * O + o_o[None, :], m_n[:, None] & m_o[None, :], 0.0)  # [n, o]
            at_w = o_o[:, None] * K + o_k[None, :]
            m_w = m_o[:, None] & m_k[None, :]
            kept = tl.load(p_mask + at_w, m_w, 0) != 0
            b_w = tl.load(p_w + at_w, m_w & kept, 0.0)  # [o, k]
            b_dx = tl.dot(b_dy, b_w, b_dx, input_precision="ieee")
    tl.store(p_dx + o_n[:, None] * K + o_k[None, :], b_dx, m_n[:, None] & m_k[None, :])


@triton.jit
def masked_matmul_dw_kernel(p_dy, p_x, p_mask, p_live, p_dw, N, O, K, B: tl.constexpr):
    """One tile of dw; walks N; writes every entry, zeros included."""
    i_tile = tl.program_id(0).to(tl.int64)
    tiles_k = tl.cdiv(K, B)
    i_o, i_k = i_tile // tiles_k, i_tile % tiles_k
    o_o, o_k = i_o * B + tl.arange(0, B), i_k * B + tl.arange(0, B)
    m_o, m_k = o_o < O, o_k < K
    b_dw = tl.zeros((B, B), tl.float32)  # [o, k]
    if tl.load(p_live + i_tile) != 0:
        for i_n in range(tl.cdiv(N, B)):
            o_n = (i_n * B + tl.arange(0, B)).to(tl.int64)
            m_n = o_n < N
            b_dy = tl.load(p_dy + o_n[None, :] * O + o_o[:, None], m_n[None, :] & m_o[:, None], 0.0)  # [o, n]
            b_x = tl.load(p_x + o_n[:, None] * K + o_k[None, :], m_n[:, None] & m_k[None, :], 0.0)  # [n, k]
            b_dw = tl.dot(b_dy, b_x, b_dw, input_precision="ieee")
    at_w = o_o[:, None] * K + o_k[None, :]
    m_w = m_o[:, None] & m_k[None, :]
    kept = tl.load(p_mask + at_w, m_w, 0) != 0
    tl.store(p_dw + at_w, tl.where(kept, b_dw, 0.0), m_w)


def _grid(rows: int, cols: int) -> tuple[int]:
    return (triton.cdiv(rows, TILE) * triton.cdiv(cols, TILE),)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, live: Tensor, y: Tensor, *, relu: bool
) -> None:
    """Write ``y (N, O) = act(x @ (weight * mask).T + bias)``; contiguous, one dtype, bool mask, uint8 live.

    Masks of whole blocks go to ``masked_blocks`` where tensor cores may be used, here and in ``dx`` and ``dw``.
    """
    if table := masked_blocks.serves(x, mask):
        masked_blocks.forward(x, weight, bias, table, y, relu=relu)
        return
    (n, k), o = x.shape, len(weight)
    if y.numel():
        masked_matmul_fwd_kernel[_grid(n, o)](
            x, weight, mask, live, x if bias is None else bias, y, n, o, k, bias is not None, relu, TILE
        )


def dx(dy: Tensor, weight: Tensor, mask: Tensor, live: Tensor, out: Tensor) -> None:
    """Write ``out (N, K) = dy @ (weight * mask)``."""
    if table := masked_blocks.serves(dy, mask):
        masked_blocks.dx(dy, weight, mask, table, out)
        return
    (n, o), k = dy.shape, weight.shape[1]
    if out.numel():
        masked_matmul_dx_kernel[_grid(n, k)](dy, weight, mask, live, out, n, o, k, TILE)


def dw(dy: Tensor, x: Tensor, mask: Tensor, live: Tensor, out: Tensor) -> None:
    """Write ``dy.T @ x`` where the mask is set into ``out (O, K)``, which holds zeros."""
    if table := masked_blocks.serves(dy, mask):
        masked_blocks.dw(dy, x, table, out)
        return
    (n, o), k = dy.shape, x.shape[1]
    if out.numel():
        masked_matmul_dw_kernel[_grid(o, k)](dy, x, mask, live, out, n, o, k, TILE)
