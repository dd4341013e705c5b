"""y = act(x @ w.T + b), dx = dy @ w and dw = dy.T @ x over the live blocks of a block mask, on tensor cores.

Unmeasured on GPU: proven in the interpreter, compiled for sm_80, sm_90 and sm_100 without spills.

Masks    made of whole 64 x 64 or 64 x 32 blocks (rows of w x columns), or of 32 x 1 vectors; edges may cut a block.
         No mask is read: a dead block is not loaded, and a live one is kept whole.
Tables   CSR over row tiles: `start` int32 (tiles + 1), `tile` int32, the live column tiles of each row tile; for
         vectors the kept columns themselves, filled up to whole groups of 32 with the first index out of range.
Grid     forward, dx: one program per result tile, which walks its list; dw: one program per live block.
Types    bfloat16, float16, and float32 rounded to TF32; sums in float32; no atomics: the same bits on every run.
Layout   row-major. Vectors gather columns of x and w, so both are transposed first (one pass over each) and a
         gathered column is contiguous. dx of vectors is the dense product: a row of w.T keeps no common columns.
Source   block lists as in Gale et al., "MegaBlocks", MLSys 2023; gathered vectors as in Ma et al., "NM-SpMM",
         IPDPS 2025 (arXiv 2503.01253).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

BLOCKS = ((64, 64), (64, 32), (32, 1))
GROUP = 32  # gathered columns a step


@triton.jit
def block_matmul_kernel(
    p_a,
    p_b,
    p_start,
    p_tile,
    p_bias,
    p_c,
    M,
    I,
    J,
    s_am,
    s_aj,
    s_bi,
    s_bj,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    GATHER: tl.constexpr,
    BM: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
):
    """One tile of c[M, I] = act(a[M, J] @ b[I, J].T + bias); walks the live tiles of b's rows."""
    i_tile = tl.program_id(0).to(tl.int64)
    tiles_i = tl.cdiv(I, BI)
    i_m, i_i = i_tile // tiles_i, i_tile % tiles_i
    o_m, o_i = i_m * BM + tl.arange(0, BM), i_i * BI + tl.arange(0, BI)
    m_m, m_i = o_m < M, o_i < I
    b_c = tl.zeros((BM, BI), tl.float32)
    for at in range(tl.load(p_start + i_i), tl.load(p_start + i_i + 1)):
        if GATHER:
            o_j = tl.load(p_tile + at * BJ + tl.arange(0, BJ)).to(tl.int64)
        else:
            o_j = tl.load(p_tile + at).to(tl.int64) * BJ + tl.arange(0, BJ)
        m_j = o_j < J
        b_a = tl.load(p_a + o_m[:, None] * s_am + o_j[None, :] * s_aj, m_m[:, None] & m_j[None, :], 0.0)  # [m, j]
        b_b = tl.load(p_b + o_j[:, None] * s_bj + o_i[None, :] * s_bi, m_j[:, None] & m_i[None, :], 0.0)  # [j, i]
        b_c = tl.dot(b_a, b_b, b_c, input_precision="tf32")
    if HAS_BIAS:
        b_c += tl.load(p_bias + o_i, m_i, 0.0).to(tl.float32)[None, :]
    if RELU:
        b_c = tl.where(b_c < 0, 0.0, b_c)  # NaN stays NaN
    tl.store(p_c + o_m[:, None] * I + o_i[None, :], b_c.to(p_c.dtype.element_ty), m_m[:, None] & m_i[None, :])


@triton.jit
def block_dw_kernel(
    p_dy,
    p_x,
    p_row,
    p_tile,
    p_dw,
    N,
    O,
    K,
    s_xn,
    s_xk,
    GATHER: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
):
    """One live block of dw[O, K] = dy[N, O].T @ x[N, K]; walks N."""
    i_tile = tl.program_id(0).to(tl.int64)
    o_o = tl.load(p_row + i_tile).to(tl.int64) * BO + tl.arange(0, BO)
    if GATHER:
        o_k = tl.load(p_tile + i_tile * BK + tl.arange(0, BK)).to(tl.int64)
    else:
        o_k = tl.load(p_tile + i_tile).to(tl.int64) * BK + tl.arange(0, BK)
    m_o, m_k = o_o < O, o_k < K
    b_dw = tl.zeros((BO, BK), tl.float32)
    for i_n in range(tl.cdiv(N, BN)):
        o_n = (i_n * BN + tl.arange(0, BN)).to(tl.int64)
        m_n = o_n < N
        b_dy = tl.load(p_dy + o_n[None, :] * O + o_o[:, None], m_n[None, :] & m_o[:, None], 0.0)  # [o, n]
        b_x = tl.load(p_x + o_n[:, None] * s_xn + o_k[None, :] * s_xk, m_n[:, None] & m_k[None, :], 0.0)  # [n, k]
        b_dw = tl.dot(b_dy, b_x, b_dw, input_precision="tf32")
    tl.store(p_dw + o_o[:, None] * K + o_k[None, :], b_dw.to(p_dw.dtype.element_ty), m_o[:, None] & m_k[None, :])


class Table(NamedTuple):
    """Where a block mask is live; every tensor int32."""

    rows: int  # of a block
    cols: int
    start: Tensor  # (row tiles + 1,), in steps of the walk
    tile: Tensor  # column tile, or for vectors column, of each step
    row: Tensor  # row tile of each step
    start_t: Tensor  # the same of the transposed mask; empty for vectors
    tile_t: Tensor


_tables: MutableMapping[Tensor, Table | None] = WeakTensorKeyDictionary()


def table(mask: Tensor) -> Table | None:
    """Return the table of a bool mask ``(O, K)``, None unless it is made of whole blocks; remembered while it lives."""
    if mask not in _tables:
        _tables[mask] = next((t for rows, cols in BLOCKS if (t := _table(mask, rows, cols))), None)
    return _tables[mask]


def _table(mask: Tensor, rows: int, cols: int) -> Table | None:
    o, k = mask.shape
    live = mask[::rows, ::cols].contiguous()
    if not torch.equal(live.repeat_interleave(rows, 0)[:o].repeat_interleave(cols, 1)[:, :k], mask):
        return None
    if cols > 1:
        (start, tile, row), (start_t, tile_t, _) = _lists(live), _lists(live.t())
        return Table(rows, cols, start, tile, row, start_t, tile_t)
    # whole groups of columns: kept ones first, then the index that is out of range
    steps = (live.sum(1) + GROUP - 1) // GROUP
    wide = F.pad(torch.where(live, torch.arange(k, device=mask.device), k).sort(1).values, (0, -k % GROUP), value=k)
    groups = wide.view(len(live), -1, GROUP)
    used = torch.arange(groups.shape[1], device=mask.device) < steps[:, None]
    row = torch.arange(len(live), device=mask.device, dtype=torch.int32).repeat_interleave(steps)
    empty = row.new_empty(0)
    return Table(rows, cols, _starts(steps), groups[used].flatten().int(), row, empty, empty)


def _starts(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0)).int()


def _lists(live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row, tile = live.nonzero(as_tuple=True)
    return _starts(live.sum(1)), tile.int(), row.int()


def serves(x: Tensor, mask: Tensor) -> Table | None:
    """Return the mask's table where these kernels may run: half types, or float32 where torch may use TF32."""
    if x.dtype is torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return None
    return table(mask)


def _walk(
    a: Tensor,
    b: Tensor,
    start: Tensor,
    tile: Tensor,
    bias: Tensor | None,
    c: Tensor,
    relu: bool,
    gather: bool,
    size: tuple[int, int],
) -> None:
    (m, j), i = a.shape, len(b)
    bm = 128 if m > 64 else 64 if m > 32 else 32
    grid = (triton.cdiv(m, bm) * triton.cdiv(i, size[0]),)
    strides = (*a.stride(), *b.stride())
    flags = (bias is not None, relu, gather, bm, *size)
    # float32: 64 x 64 blocks spill on four warps (sm_80), 64 x 32 on eight (sm_100)
    warps = 8 if bm == 128 and a.dtype is torch.float32 and size == (64, 64) else 4
    p_bias = a if bias is None else bias
    block_matmul_kernel[grid](a, b, start, tile, p_bias, c, m, i, j, *strides, *flags, num_warps=warps)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, t: Table, y: Tensor, *, relu: bool) -> None:
    """Write ``y (N, O) = act(x @ (weight * mask).T + bias)``; contiguous, one dtype."""
    if t.cols == 1:
        x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    _walk(x, weight, t.start, t.tile, bias, y, relu, t.cols == 1, (t.rows, max(t.cols, GROUP)))


def dx(dy: Tensor, weight: Tensor, mask: Tensor, t: Table, out: Tensor) -> None:
    """Write ``out (N, K) = dy @ (weight * mask)``."""
    if t.cols == 1:
        torch.mm(dy, torch.where(mask, weight, 0), out=out)
        return
    _walk(dy, weight.t(), t.start_t, t.tile_t, None, out, False, False, (t.cols, t.rows))


def dw(dy: Tensor, x: Tensor, t: Table, out: Tensor) -> None:
    """Write ``dy.T @ x`` into the live blocks of ``out (O, K)``, which is zero elsewhere."""
    (n, o), k, gather = dy.shape, x.shape[1], t.cols == 1
    if gather:
        x = x.t().contiguous().t()
    if len(t.row):
        size = (64, t.rows, max(t.cols, GROUP))
        block_dw_kernel[(len(t.row),)](dy, x, t.row, t.tile, out, n, o, k, *x.stride(), gather, *size)
