"""Shared-mask coding of a delta: gather kept entries, quantise blocks of 256, expand codes again.

Unmeasured on GPU: proven in the interpreter and compiled for sm_90; autoflip.ops uses it when asked for by name.
The bits are the CPU's: the same counter-based random numbers, divisions rounded to nearest, no fused multiply-add
(launched with enable_fp_fusion=False).

Layout   words: the mask as bytes, bit i = entry i; offsets[b] = kept entries before block b of 1024 entries, made
         once a mask, so that no scan and no synchronisation is left.
Grid     gather, expand: one program per 1024 entries; quantise: one per 256 ranks; round: one per 1024.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 1024
RANKS = 256


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= tl.full((), 0x7FEB352D, tl.uint32)
    x ^= x >> 15
    x *= tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _random(ranks, key0, key1, NEAREST: tl.constexpr):
    if NEAREST:
        return tl.full(ranks.shape, 0x80000000, tl.uint32)
    return _mix(_mix(ranks.to(tl.uint32) + key0.to(tl.uint32)) ^ key1.to(tl.uint32))


@triton.jit
def _kept(p_words, o, m):
    """Which of the entries o are kept, and the rank of each within this program."""
    bit = (tl.load(p_words + o // 8, m, 0).to(tl.int32) >> (o % 8).to(tl.int32)) & 1
    return bit != 0, tl.cumsum(bit, 0) - bit


@triton.jit
def delta_gather_kernel(p_x, p_base, p_words, p_offsets, p_out, p_bad, n, HAS_BASE: tl.constexpr, B: tl.constexpr):
    """out[rank] = x - base at kept entries; bad = 1 where any difference is not finite."""
    i_b = tl.program_id(0).to(tl.int64)
    o = i_b * B + tl.arange(0, B)
    m = o < n
    b_d = tl.load(p_x + o, m, 0.0)
    if HAS_BASE:
        b_d -= tl.load(p_base + o, m, 0.0)
    kept, rank = _kept(p_words, o, m)
    bits = b_d.to(tl.uint32, bitcast=True)
    if tl.max(((bits & 0x7F800000) == 0x7F800000).to(tl.int32), 0) != 0:
        tl.store(p_bad, 1)
    tl.store(p_out + tl.load(p_offsets + i_b) + rank, b_d, kept)


@triton.jit(do_not_specialize=["key0", "key1"])
def delta_quantise_kernel(
    p_x, p_codes, p_scales, n, levels, largest, key0, key1, NEAREST: tl.constexpr, B: tl.constexpr
):
    """One block: its scale and its codes."""
    i_b = tl.program_id(0).to(tl.int64)
    o = i_b * B + tl.arange(0, B)
    m = o < n
    b_x = tl.load(p_x + o, m, 0.0)
    top = tl.max(tl.abs(b_x), 0)
    # the interpreter hands floats over as float64
    levels, largest = tl.cast(levels, tl.float32), tl.cast(largest, tl.float32)
    scale = tl.minimum(tl.maximum(tl.div_rn(top, levels), 1.1754943508222875e-38), largest)
    inverse = tl.where(top > 0, tl.div_rn(tl.full((), 1.0, tl.float32), scale), 0.0)
    tl.store(p_scales + i_b, tl.where(top > 0, scale, 0.0))
    y = b_x * inverse
    low = tl.floor(y)
    u = (_random(o, key0, key1, NEAREST) >> 8).to(tl.float32) * 5.9604644775390625e-08
    code = low + tl.where(u < y - low, 1.0, 0.0)
    code = tl.minimum(tl.maximum(code, -levels), levels)
    tl.store(p_codes + o, code.to(tl.int8), m)


@triton.jit(do_not_specialize=["key0", "key1"])
def delta_round_kernel(p_x, p_words, n, key0, key1, NEAREST: tl.constexpr, B: tl.constexpr):
    """float32 to bf16 words; a finite value stays finite."""
    o = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    m = o < n
    bits = tl.load(p_x + o, m, 0.0).to(tl.uint32, bitcast=True)
    up = (bits + (_random(o, key0, key1, NEAREST) >> 16)) >> 16
    words = tl.where((up & 0x7F80) == 0x7F80, bits >> 16, up)
    tl.store(p_words + o, words.to(tl.int16), m)


@triton.jit
def delta_expand_kernel(
    p_values, p_scales, p_words, p_offsets, p_out, n, weight,
    CODES: tl.constexpr, ADD: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """out[kept] = value, zero elsewhere; or out[kept] += weight * value."""
    i_b = tl.program_id(0).to(tl.int64)
    o = i_b * B + tl.arange(0, B)
    m = o < n
    kept, rank = _kept(p_words, o, m)
    at = tl.load(p_offsets + i_b) + rank
    b_v = tl.load(p_values + at, kept, 0).to(tl.float32)
    if CODES:
        b_v *= tl.load(p_scales + at // R, kept, 0.0)
    if ADD:
        tl.store(p_out + o, tl.load(p_out + o, kept, 0.0) + b_v * tl.cast(weight, tl.float32), kept)
    else:
        tl.store(p_out + o, b_v, m)


def gather(x: Tensor, base: Tensor | None, words: Tensor, offsets: Tensor, out: Tensor, bad: Tensor) -> None:
    """Launch; float32 contiguous tensors of one device, words uint8, offsets int64, bad (1,) int32."""
    n = x.numel()
    delta_gather_kernel[(triton.cdiv(n, ENTRIES),)](
        x, base if base is not None else x, words, offsets, out, bad, n,
        HAS_BASE=base is not None, B=ENTRIES, enable_fp_fusion=False,
    )  # fmt: skip


def quantise(
    values: Tensor, levels: int, largest: float, key: tuple[int, int, bool], codes: Tensor, scales: Tensor
) -> None:
    """Launch; key: two words and whether to round to the nearest."""
    n = values.numel()
    delta_quantise_kernel[(triton.cdiv(n, RANKS),)](
        values, codes, scales, n, float(levels), largest, key[0], key[1],
        NEAREST=key[2], B=RANKS, enable_fp_fusion=False,
    )  # fmt: skip


def round_bf16(values: Tensor, key: tuple[int, int, bool], words: Tensor) -> None:
    """Launch; words int16."""
    n = values.numel()
    delta_round_kernel[(triton.cdiv(n, ENTRIES),)](values, words, n, key[0], key[1], NEAREST=key[2], B=ENTRIES)


def expand(
    values: Tensor, scales: Tensor | None, words: Tensor, offsets: Tensor, weight: float | None, out: Tensor
) -> None:
    """Launch; values float32, or int8 codes with scales; a weight adds to out, None writes over it."""
    n = out.numel()
    delta_expand_kernel[(triton.cdiv(n, ENTRIES),)](
        values, scales if scales is not None else out, words, offsets, out, n, 0.0 if weight is None else weight,
        CODES=scales is not None, ADD=weight is not None, R=RANKS, B=ENTRIES, enable_fp_fusion=False,
    )  # fmt: skip
