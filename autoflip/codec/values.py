"""Streams of kept values: float32, bf16, int8 or int4 with a scale per block of 256, and whole integers."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

from autoflip.codec.frame import read_section, section
from autoflip.codec.reader import DecodeError, Reader
from autoflip.ops import delta_coding as ops

__all__ = ["BF16", "FP32", "INT", "INT4", "INT8", "NAMES", "check_finite_words", "read_values", "widen", "write_values"]

FP32, BF16, INT8, INT4, INT = range(5)
NAMES = ("fp32", "bf16", "int8", "int4", "int")
_LEVELS = {INT8: 127, INT4: 7}


def rounding_key(seed: int, round: int, client: int, tensor: int) -> tuple[int, int]:
    """Return the two uint32 that key the random numbers of one tensor in one update."""
    wrapped = (value & 0xFFFFFFFFFFFFFFFF for value in (seed, round, client, tensor))
    digest = hashlib.blake2b(struct.pack("<4Q", *wrapped), digest_size=8).digest()
    low, high = struct.unpack("<2I", digest)
    return low, high


def value_bytes(codec: int, count: int) -> int:
    """Bytes of ``count`` values before the entropy stage, scales included."""
    scales = 4 * -(-count // ops.BLOCK)
    return (4 * count, 2 * count, count + scales, -(-count // 2) + scales, count)[codec]


def write_values(
    streams: Sequence[tuple[int, np.ndarray]], keys: Sequence[tuple[int, int]], entropy: str
) -> list[bytes]:
    """Code streams (codec, values) and gather them by codec, in the order of the codec numbers.

    Args:
        streams: float32 for FP32, BF16, INT8, INT4; uint16 words for BF16 that are not to be rounded; bytes for INT.
        keys: one rounding key a stream.
        entropy: "zstd" or "none".
    """
    sections: list[list[bytes]] = [[] for _ in range(7)]  # fp32, bf16, int8 codes, scales, int4 codes, scales, int
    words: dict[int, list[np.ndarray]] = {0: [], 1: [], 3: [], 5: []}
    for (codec, values), key in zip(streams, keys, strict=True):
        if len(values) == 0:
            continue
        if codec == FP32:
            words[0].append(values)
        elif codec == BF16:
            words[1].append(values if values.dtype == np.uint16 else ops.round_bf16(values, key))
        elif codec == INT:
            sections[6].append(values.tobytes())
        else:
            codes, scales = ops.quantise(values, _LEVELS[codec], key)
            place = 2 if codec == INT8 else 4
            sections[place].append(codes.tobytes() if codec == INT8 else _nibbles(codes))
            words[place + 1].append(scales)
    for place, arrays in words.items():
        if arrays:  # byte planes of the whole section: like bytes of all tensors lie together
            sections[place] = [ops.split_planes(np.concatenate(arrays))]
    return [section(b"".join(parts), entropy) for parts in sections if parts]


def read_values(reader: Reader, wanted: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Read streams of hostile origin; the sections must have exactly the sizes that ``wanted`` implies.

    Args:
        reader: stands at the first value section.
        wanted: per stream (codec, number of values; number of bytes for INT).

    Returns:
        Per stream float32 (FP32, INT8, INT4), uint16 words (BF16) or uint8 (INT). Words are not yet checked for NaN.
    """
    out = [np.empty(0, (np.float32, np.uint16, np.float32, np.float32, np.uint8)[codec]) for codec, _ in wanted]
    for codec in range(5):
        mine = [(i, count) for i, (kind, count) in enumerate(wanted) if kind == codec and count]
        if not mine:
            continue
        counts = [count for _, count in mine]
        if codec in (FP32, BF16):
            dtype = np.dtype("<f4" if codec == FP32 else "<u2")
            stream = _planes(reader, sum(counts), dtype)
            parts = np.split(stream, np.cumsum(counts)[:-1])
            if codec == FP32:
                _check_finite(stream)
        elif codec == INT:
            raw = np.frombuffer(read_section(reader, sum(counts), sum(counts)), np.uint8)
            parts = np.split(raw, np.cumsum(counts)[:-1])
        else:
            parts = _read_quantised(reader, codec, counts)
        for (i, _), part in zip(mine, parts, strict=True):
            out[i] = part
    return out


def _read_quantised(reader: Reader, codec: int, counts: list[int]) -> list[np.ndarray]:
    sizes = counts if codec == INT8 else [-(-count // 2) for count in counts]
    blocks = [-(-count // ops.BLOCK) for count in counts]
    raw = np.frombuffer(read_section(reader, sum(sizes), sum(sizes)), np.int8)
    scales = _planes(reader, sum(blocks), np.dtype("<f4"))
    levels = _LEVELS[codec]
    if not bool((scales.view(np.uint32) <= np.float32(ops.largest_scale(levels)).view(np.uint32)).all()):
        raise DecodeError("a scale is negative, infinite or NaN; the frame is damaged")
    codes = np.split(raw, np.cumsum(sizes)[:-1])
    if codec == INT4:
        codes = [_codes(part, count) for part, count in zip(codes, counts, strict=True)]
    if any(int(part.min()) < -levels for part in codes):
        raise DecodeError(f"a code lies outside -{levels} to {levels}; the frame is damaged")
    each = np.split(scales, np.cumsum(blocks)[:-1])
    return [ops.dequantise(part, scale) for part, scale in zip(codes, each, strict=True)]


def _planes(reader: Reader, count: int, dtype: np.dtype) -> np.ndarray:
    size = count * dtype.itemsize
    return ops.merge_planes(read_section(reader, size, size), dtype)


def _nibbles(codes: np.ndarray) -> bytes:
    even = np.zeros(len(codes) + len(codes) % 2, np.uint8)
    even[: len(codes)] = codes.view(np.uint8) & 15
    return (even[::2] | even[1::2] << np.uint8(4)).tobytes()


def _codes(packed: np.ndarray, count: int) -> np.ndarray:
    codes = np.empty(2 * len(packed), np.int8)
    codes[::2] = packed << np.int8(4) >> np.int8(4)
    codes[1::2] = packed >> np.int8(4)
    if codes[count:].any():
        raise DecodeError("an int4 stream has a code past its end; the frame is damaged")
    return codes[:count]


def _check_finite(values: np.ndarray) -> None:
    if not bool(np.isfinite(values).all()):
        raise DecodeError("the frame holds NaN or infinity; its sender diverged or it is hostile")


def widen(words: np.ndarray) -> np.ndarray:
    """Return bf16 words as float32."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def check_finite_words(words: np.ndarray) -> None:
    """Raise DecodeError if a bf16 word is NaN or infinite."""
    if bool(((words & 0x7F80) == 0x7F80).any()):
        raise DecodeError("the frame holds NaN or infinity; its sender diverged or it is hostile")
