"""y[N, O] = act(x[N, K] @ (w * mask)[O, K].T + b) and its two gradients, tiles with no kept weight skipped.

Unmeasured on GPU: proven in the interpreter and compiled for sm_90; autoflip.ops uses it when asked for by name.

Layout   row-major; `live[ceil(O/32), ceil(K/32)]` uint8, one flag per weight tile that keeps any entry; the
         element mask (bool, shaped like w) is applied while a live tile is loaded.
Grid     (32 x 32 tiles of the result, clients); sums in float32, IEEE (no TF32). Many clients' layers of one
         shape run in one launch: every tensor then has a leading axis of clients.
Source   tile skipping as in Gale et al., "Sparse GPU Kernels for Deep Learning", SC 2020.
"""

from __future__ import annotations

from typing import Any

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
    i_tile, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tiles_o, tiles_k = tl.cdiv(O, B), tl.cdiv(K, B)
    p_x, p_y, p_bias = p_x + i_c * N * K, p_y + i_c * N * O, p_bias + i_c * O
    p_w, p_mask, p_live = p_w + i_c * O * K, p_mask + i_c * O * K, p_live + i_c * tiles_o * tiles_k
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
    i_tile, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tiles_o, tiles_k = tl.cdiv(O, B), tl.cdiv(K, B)
    p_dy, p_dx = p_dy + i_c * N * O, p_dx + i_c * N * K
    p_w, p_mask, p_live = p_w + i_c * O * K, p_mask + i_c * O * K, p_live + i_c * tiles_o * tiles_k
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
    i_tile, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tiles_k = tl.cdiv(K, B)
    p_dy, p_x, p_dw = p_dy + i_c * N * O, p_x + i_c * N * K, p_dw + i_c * O * K
    p_mask, p_live = p_mask + i_c * O * K, p_live + i_c * tl.cdiv(O, B) * tiles_k
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


def _grid(rows: int, cols: int, clients: int = 1) -> tuple[int, int]:
    return triton.cdiv(rows, TILE) * triton.cdiv(cols, TILE), clients


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, live: Tensor, y: Tensor, *, relu: bool
) -> None:
    """Write ``y (N, O) = act(x @ (weight * mask).T + bias)``; contiguous, one dtype, bool mask, uint8 live.

    Masks of whole blocks go to ``masked_blocks`` where tensor cores may be used, here and in ``dx`` and ``dw``. With
    one more leading axis of clients on every tensor, also there, all clients run in one launch.
    """
    if table := _blocks(x, mask):
        masked_blocks.forward(x, weight, bias, table, y, relu=relu)
        return
    (n, k), o = x.shape[-2:], weight.shape[-2]
    if y.numel():
        masked_matmul_fwd_kernel[_grid(n, o, _clients(mask))](
            x, weight, mask, live, x if bias is None else bias, y, n, o, k, bias is not None, relu, TILE
        )


def dx(dy: Tensor, weight: Tensor, mask: Tensor, live: Tensor, out: Tensor) -> None:
    """Write ``out (N, K) = dy @ (weight * mask)``."""
    if table := _blocks(dy, mask):
        masked_blocks.dx(dy, weight, mask, table, out)
        return
    (n, o), k = dy.shape[-2:], weight.shape[-1]
    if out.numel():
        masked_matmul_dx_kernel[_grid(n, k, _clients(mask))](dy, weight, mask, live, out, n, o, k, TILE)


def dw(dy: Tensor, x: Tensor, mask: Tensor, live: Tensor, out: Tensor) -> None:
    """Write ``dy.T @ x`` where the mask is set into ``out (O, K)``, which holds zeros."""
    if table := _blocks(dy, mask):
        masked_blocks.dw(dy, x, table, out)
        return
    (n, o), k = dy.shape[-2:], x.shape[-1]
    if out.numel():
        masked_matmul_dw_kernel[_grid(o, k, _clients(mask))](dy, x, mask, live, out, n, o, k, TILE)


def _clients(mask: Tensor) -> int:
    return len(mask) if mask.dim() == 3 else 1


def _blocks(rows: Tensor, mask: Tensor) -> Any:
    return masked_blocks.serves(rows, mask) if mask.dim() == 2 else None
