"""Sparse-delta ops: quantise kept values, split them into byte planes, code kept positions.

Stochastic rounding draws ``u[i]`` from ``(key, i)`` alone, so every backend and instruction set gives the same bytes.
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoflip.ops import memory, reference
from autoflip.ops.delta import Array, Pack, cpp, new_words

__all__ = [
    "BLOCK",
    "Key",
    "crc32",
    "dequantise",
    "from_nibbles",
    "largest_scale",
    "merge_planes",
    "nibbles",
    "quantise",
    "rice_bits",
    "rice_decode",
    "rice_encode",
    "round_bf16",
    "split_planes",
    "varint_decode",
    "varint_encode",
    "words_of",
]

Key = tuple[int, int] | None

BLOCK = 256  # kept entries that share one scale
_SMALL = 1 << 12
_RICE_BYTES = 7  # the longest Rice code has 56 bits
_INDEX_ERRORS = {
    -1: "ends early",
    -2: "leaves the tensor",
    -3: "has padding that is not zero",
    -4: "holds a number that is too long",
}


@cache
def largest_scale(levels: int) -> float:
    """Return the largest float32 ``s`` for which ``levels * s`` is finite."""
    top = np.finfo(np.float32).max
    scale = top / np.float32(levels)
    with np.errstate(over="ignore"):
        fits = np.isfinite(scale * np.float32(levels))
    return float(scale if fits else np.nextafter(scale, np.float32(0)))


def words_of(key: Key) -> tuple[int, int, bool]:
    """Return ``key`` as the extension takes it: two words, and whether to round to the nearest."""
    return (0, 0, True) if key is None else (*key, False)


def quantise(values: Array, levels: int, key: Key) -> tuple[Array, Array]:
    """``codes[i] = stochastic_round(values[i] / scales[i // 256])``, unbiased; zeros stay zero.

    Args:
        values: ``(n,)`` float32, finite.
        levels: largest code: at most 127 (int8) or 7 (int4).
        key: two uint32 that the random numbers depend on; None = to the nearest, which is not unbiased.

    Returns:
        ``(n,)`` int8 in [-levels, levels] and ``(ceil(n / 256),)`` float32; the error of an entry is below its scale.

    Source: unbiased rounding as in Alistarh et al., "QSGD", NeurIPS 2017.
    """
    values = np.ascontiguousarray(values, np.float32)
    if ext := cpp():
        codes, scales = memory.empty_bytes(len(values)).view(np.int8), np.empty(-(-len(values) // BLOCK), np.float32)
        places = (codes.ctypes.data, scales.ctypes.data, torch.get_num_threads())
        ext.delta_quantise(values.ctypes.data, len(values), levels, largest_scale(levels), *words_of(key), *places)
        return codes, scales
    return reference.delta_quantise(values, levels, largest_scale(levels), key)


def dequantise(codes: Array, scales: Array) -> Array:
    """``values[i] = codes[i] * scales[i // 256]``: ``(n,)`` float32 from int8 codes."""
    assert len(scales) == -(-len(codes) // BLOCK)
    if ext := cpp():
        codes, scales = np.ascontiguousarray(codes, np.int8), np.ascontiguousarray(scales, np.float32)
        out = memory.empty_bytes(4 * len(codes)).view(np.float32)
        places = (codes.ctypes.data, scales.ctypes.data, len(codes), out.ctypes.data)
        ext.delta_dequantise(*places, torch.get_num_threads())
        return out
    return reference.delta_dequantise(codes, scales)


def nibbles(codes: Array) -> Array:
    """Return int8 codes of 4 bits two a byte, the first in the low half, a spare half 0."""
    even = np.zeros(len(codes) + len(codes) % 2, np.uint8)
    even[: len(codes)] = codes.view(np.uint8) & 15
    return even[::2] | even[1::2] << np.uint8(4)


def from_nibbles(pairs: Array, count: int) -> Array:
    """Undo :func:`nibbles`: ``(count,)`` int8."""
    signed, codes = pairs.view(np.int8), np.empty(2 * len(pairs), np.int8)
    codes[::2], codes[1::2] = signed << np.int8(4) >> np.int8(4), signed >> np.int8(4)
    return codes[:count]


def round_bf16(values: Array, key: Key) -> Array:
    """Round ``(n,)`` float32 to bf16 words (uint16), at random and unbiased (key None: to the nearest)."""
    values = np.ascontiguousarray(values, np.float32)
    if ext := cpp():
        out = memory.empty_bytes(2 * len(values)).view(np.uint16)
        ext.delta_round_bf16(values.ctypes.data, len(values), *words_of(key), out.ctypes.data, torch.get_num_threads())
        return out
    return reference.delta_round_bf16(values, key)


def split_planes(values: Array) -> bytes:
    """All lowest bytes, then all second bytes, ...: entropy coders see one kind of byte at a time.

    Args:
        values: ``(n,)`` of 2 or 4 bytes each.
    """
    if ext := cpp():
        values = np.ascontiguousarray(values)
        out = memory.empty_bytes(values.nbytes)
        ext.delta_split(values.ctypes.data, len(values), values.itemsize, out.ctypes.data)
        return out.tobytes()
    return reference.delta_split(values)


def merge_planes(raw: bytes | memoryview, dtype: np.dtype[Any]) -> Array:
    """Undo :func:`split_planes` into ``dtype``, which has 2 or 4 bytes."""
    planes = np.frombuffer(raw, np.uint8)
    if ext := cpp():
        out = np.empty(len(planes) // dtype.itemsize, dtype)
        ext.delta_merge(planes.ctypes.data, len(out), dtype.itemsize, out.ctypes.data)
        return out
    return reference.delta_merge(planes, dtype)


def crc32(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """CRC-32 as ``zlib.crc32`` computes it, by carry-less multiplication where the CPU has that.

    Args:
        data: contiguous bytes, a memoryview of format B.
        crc: checksum of what lies before them.
    """
    # below some kilobytes the way to the extension costs more than zlib
    if len(data) > _SMALL and (ext := cpp()) and ext.has_fast_crc():
        raw = np.frombuffer(data, np.uint8)
        return int(ext.crc32(crc, raw.ctypes.data, len(raw)))
    return zlib.crc32(data, crc)


def rice_bits(mask: Pack, k: int) -> int:
    """Bits that :func:`rice_encode` writes for parameter ``k``, 0 to 31."""
    if ext := cpp():
        return int(ext.delta_rice_bits(mask.words.data_ptr(), mask.numel, k))
    return reference.rice_bits(mask.words, mask.numel, k)


def rice_encode(mask: Pack, k: int) -> bytes:
    """Rice code of the gaps between kept entries (Golomb 1966, Rice 1979); at most 56 bits a gap.

    Raises:
        ValueError: the mask has 2^32 entries or more.
    """
    if mask.numel >= 1 << 32:
        raise ValueError(f"rice_encode: {mask.numel} entries, wanted fewer than 2^32; send a bitmap")
    if ext := cpp():
        # a gap costs gap >> k, 1 and k bits; only an escape costs more, by at most 31, and needs 24 << k entries
        skipped = mask.numel - mask.kept
        bits = (skipped >> k) + mask.kept * (1 + k) + 31 * min(mask.kept, skipped // (24 << k))
        out = np.empty(bits // 8 + 8, np.uint8)
        return out[: ext.delta_rice_encode(mask.words.data_ptr(), mask.numel, k, out.ctypes.data)].tobytes()
    return reference.rice_encode(mask.words, mask.numel, k)


def rice_decode(data: bytes | memoryview, numel: int, kept: int, k: int) -> tuple[Pack, int]:
    """Read ``kept`` positions below ``numel`` from the start of hostile ``data``.

    Returns:
        The mask, and how many bytes of ``data`` it took.

    Raises:
        ValueError: the stream ends early, leaves the range, or pads with ones.
    """
    raw = np.frombuffer(data, np.uint8)[: _RICE_BYTES * kept]
    words = new_words(numel)
    if ext := cpp():
        used = int(ext.delta_rice_decode(raw.ctypes.data, len(raw), numel, kept, k, words.data_ptr()))
    else:
        words, used = reference.rice_decode(raw, numel, kept, k)
    return _checked("a Rice stream", words, numel, used)


def varint_encode(mask: Pack) -> bytes | memoryview:
    """LEB128 code of the gaps between kept entries."""
    if ext := cpp():
        # each byte of a gap after the first one stands for 128 skipped entries or more
        room = mask.kept + (mask.numel - mask.kept) // 128 + len(mask.offsets) * ext.VARINT_RANGE
        out = np.empty(room, np.uint8)
        places = (mask.words.data_ptr(), mask.offsets.data_ptr(), mask.numel, out.ctypes.data)
        return out[: ext.delta_varint_encode(*places, torch.get_num_threads())].data
    return reference.varint_encode(mask.words, mask.numel)


def varint_decode(data: bytes | memoryview, numel: int, kept: int) -> tuple[Pack, int]:
    """Read ``kept`` positions below ``numel`` from the start of hostile ``data``, as :func:`rice_decode` does."""
    raw = np.frombuffer(data, np.uint8)
    words = new_words(numel)
    if ext := cpp():
        used = int(ext.delta_varint_decode(raw.ctypes.data, len(raw), numel, kept, words.data_ptr()))
    else:
        words, used = reference.varint_decode(raw, numel, kept)
    return _checked("a varint stream", words, numel, used)


def _checked(what: str, words: Tensor, numel: int, used: int) -> tuple[Pack, int]:
    if used < 0:
        raise ValueError(f"{what} {_INDEX_ERRORS[used]}")
    return Pack(words, numel), used
