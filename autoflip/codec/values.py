"""Streams of kept values: float32, bf16, int8 or int4 with a scale per block of 256, and whole integers."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from torch import Tensor

from autoflip.codec import arguments
from autoflip.codec.packing import Buffer
from autoflip.codec.reader import DecodeError, Reader
from autoflip.codec.section import (
    PLAIN,
    SIGNED,
    code_section,
    numbers,
    plane_section,
    read_planes,
    read_section,
    section,
)
from autoflip.ops import delta_coding as codes
from autoflip.ops import delta_stream as streams
from autoflip.ops.delta_stream import BF16, FP32, INT4, INT8, LEVELS, Coded

__all__ = [
    "BF16",
    "FP32",
    "INT",
    "INT4",
    "INT8",
    "NAMES",
    "Stream",
    "check",
    "check_finite_words",
    "check_levels",
    "check_scales",
    "exceeds",
    "from_words",
    "plain_bytes",
    "read_values",
    "rounding_key",
    "to_words",
    "value_bytes",
    "widen",
    "write_values",
]

INT = 4
NAMES = ("fp32", "bf16", "int8", "int4", "int")
Stream = Coded | np.ndarray  # an array of bytes for INT
_PLANES = {FP32: 4, BF16: 2}
_MANY = 3 << 17  # codes whose scales, a hundredth of them, are packed in one way only


def check_levels(levels: int | None, codec: int) -> None:
    """Raise ValueError unless ``levels`` is None or a largest code that ``codec`` can have."""
    if levels is None:
        return
    if codec not in LEVELS:
        raise ValueError(
            f"encode: levels={levels} with values={NAMES[codec]!r}, wanted None; int8 and int4 have levels"
        )
    if not 1 <= arguments.whole("encode", "levels", levels) <= LEVELS[codec]:
        raise ValueError(f"encode: levels={levels}, wanted 1 to {LEVELS[codec]}, the largest code of {NAMES[codec]}")


def check_scales(name: str, coded: Coded, levels: int | None) -> None:
    """Raise ValueError where fewer ``levels`` than the codec has made a scale that no reader takes."""
    most = LEVELS.get(coded.kind, 0)
    if levels is None or levels >= most or not len(coded.scales):
        return
    largest = float(coded.scales.max())
    if largest > codes.largest_scale(most):
        raise ValueError(
            f"encode: {name!r} has entries of {levels * largest:.3g}, too large for levels={levels}, at most "
            f"{levels * codes.largest_scale(most):.3g}: readers refuse their scale; leave levels out"
        )


def plain_bytes(tensor: Tensor) -> np.ndarray:
    """Return the bytes of an integer or bool tensor, in the order of its entries."""
    # numpy's view: torch's wants a stride of one even of a single entry, where contiguous() leaves any stride alone
    return tensor.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8)


def exceeds(coded: Coded | Tensor, cap: float) -> bool:
    """Tell whether a value of a valid stream is above ``cap`` in magnitude; values are made only where one may be."""
    if isinstance(coded, Tensor):  # of integers
        return bool((coded.double().abs() > cap).any())
    if not coded.count:
        return False
    if coded.kind in _PLANES:  # the highest byte holds the sign and all but the last bit of the exponent
        bound = np.float32(min(cap, float(np.finfo(np.float32).max)))
        if int((coded.streams[-1] & 0x7F).max()) < int(bound.view(np.uint32)) >> 24:
            return False
    elif LEVELS[coded.kind] * float(coded.scales.max()) <= cap:
        return False
    return float(streams.decode(coded, None).abs().max()) > cap


def rounding_key(seed: int, round: int, client: int, tensor: int) -> tuple[int, int]:
    """Return the two uint32 that key the random numbers of one tensor in one update."""
    wrapped = (value & 0xFFFFFFFFFFFFFFFF for value in (seed, round, client, tensor))
    digest = hashlib.blake2b(struct.pack("<4Q", *wrapped), digest_size=8).digest()
    low, high = struct.unpack("<2I", digest)
    return low, high


def value_bytes(codec: int, count: int, blocks: int = 0) -> int:
    """Bytes of ``count`` values before the entropy stage, scales included; ``blocks`` of codes without zeros."""
    scales = 5 * blocks or 4 * -(-count // codes.BLOCK)
    return (4 * count, 2 * count, count + scales, -(-count // 2) + scales, count)[codec]


def write_values(coded: Sequence[Stream], entropy: str, level: int = 1) -> list[Buffer]:
    """Gather streams by codec, in the order of the codec numbers; each codec's scales follow its codes, then survivors.

    Args:
        coded: one stream a tensor.
        entropy: "zstd" or "none".
        level: of zstd.
    """
    out: list[Buffer] = []
    floats = [c for c in coded if isinstance(c, Coded) and c.count]
    for kind in (FP32, BF16, INT8, INT4):
        mine = [c for c in floats if c.kind == kind]
        if not mine:
            continue
        if kind in _PLANES:  # like bytes of all tensors lie together
            planes = [_joined([c.streams[i] for c in mine]) for i in range(_PLANES[kind])]
            out += plane_section(planes, entropy, level)
        else:
            key = SIGNED if kind == INT8 else PLAIN
            out += code_section([c.streams[0] for c in mine], entropy, level, key)
            scales = np.frombuffer(codes.split_planes(np.concatenate([c.scales for c in mine])), np.uint8)
            minor = sum(c.count for c in mine) >= _MANY
            out += plane_section([*scales.reshape(4, -1)], entropy, level, minor=minor)
            survivors: list[Buffer] = [c.survivors.data for c in mine if c.survivors is not None]
            out += section(survivors, entropy, level) if survivors else []
    integers: list[Buffer] = [c.data for c in coded if not isinstance(c, Coded) and len(c)]
    return [*out, *section(integers, entropy, level)] if integers else out


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_values(reader: Reader, wanted: Sequence[tuple[int, int, int]]) -> list[Stream]:
    """Read streams of hostile origin; the sections must have exactly the sizes that ``wanted`` implies.

    Args:
        reader: stands at the first value section.
        wanted: per stream (codec, number of values; number of bytes for INT, blocks of codes without zeros or 0).

    Returns:
        One stream each; bf16 words are not yet checked for NaN, all else is valid.
    """
    none = np.empty(0, np.uint8)  # what the others are is read below
    out: list[Stream] = [none if kind == INT or count else streams.new_streams(kind, 0) for kind, count, _ in wanted]
    for kind in range(5):
        mine = [(i, count) for i, (codec, count, _) in enumerate(wanted) if codec == kind and count]
        if not mine:
            continue
        counts = [count for _, count in mine]
        if kind == INT:
            (raw,) = read_section(reader, [(sum(counts), sum(counts))])
            parts: list[Stream] = [*_cut(np.frombuffer(raw, np.uint8), counts)]
        elif kind in _PLANES:
            planes = [_cut(plane, counts) for plane in read_planes(reader, sum(counts), _PLANES[kind])]
            empty = np.empty(0, np.float32)
            parts = [Coded(kind, n, tuple(p[i] for p in planes), empty) for i, n in enumerate(counts)]
        else:
            parts = [*_read_quantised(reader, kind, counts, [wanted[i][2] for i, _ in mine])]
        for (i, _), part in zip(mine, parts, strict=True):
            if isinstance(part, Coded) and kind != BF16:
                check(part)
            out[i] = part
    return out


def check(part: Coded) -> None:
    """Raise DecodeError unless ``part`` holds only what a sender writes."""
    if streams.valid(part):
        return
    if part.kind in _PLANES:
        raise DecodeError("the frame holds NaN or infinity; its sender diverged or it is hostile")
    levels = LEVELS[part.kind]
    raise DecodeError(
        f"a code lies outside -{levels} to {levels}, there is a code past its end, or a scale is negative, infinite "
        "or NaN; the frame is damaged"
    )


def _read_quantised(reader: Reader, kind: int, counts: list[int], thinned: list[int]) -> list[Coded]:
    sizes = counts if kind == INT8 else [-(-count // 2) for count in counts]
    blocks = [n or -(-count // codes.BLOCK) for n, count in zip(thinned, counts, strict=True)]
    (raw,) = read_section(reader, [(sum(sizes), sum(sizes))], lambda: numbers(sizes))
    parts = _cut(np.frombuffer(raw, np.uint8), sizes)
    scales = codes.merge_planes(np.concatenate(read_planes(reader, sum(blocks), 4)).data, np.dtype("<f4"))
    each = _cut(scales, blocks)
    left = _read_survivors(reader, counts, thinned)
    found = zip(counts, parts, each, left, strict=True)
    return [Coded(kind, n, (part,), scale, survivors) for n, part, scale, survivors in found]


def _read_survivors(reader: Reader, counts: list[int], thinned: list[int]) -> list[np.ndarray | None]:
    if not any(thinned):
        return [None] * len(counts)
    (raw,) = read_section(reader, [(sum(thinned), sum(thinned))])
    out: list[np.ndarray | None] = []
    for part, blocks, count in zip(_cut(np.frombuffer(raw, np.uint8), thinned), thinned, counts, strict=True):
        if blocks and int(part.sum(dtype=np.int64)) + blocks != count:
            raise DecodeError(f"blocks of codes without zeros do not make up {count} codes; the frame is damaged")
        out.append(part if blocks else None)
    return out


def _cut(array: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    ends = [0, *accumulate(sizes)]
    return [array[start:end] for start, end in pairwise(ends)]


def from_words(words: np.ndarray) -> Coded:
    """Return bf16 words (uint16) as a stream."""
    planes = np.frombuffer(codes.split_planes(words), np.uint8).reshape(2, len(words))
    return Coded(BF16, len(words), tuple(planes), np.empty(0, np.float32))


def to_words(coded: Stream) -> np.ndarray:
    """Return a bf16 stream as words, bytes as they are."""
    if not isinstance(coded, Coded):
        return coded
    return codes.merge_planes(np.concatenate(coded.streams).data, np.dtype("<u2"))


def widen(words: np.ndarray) -> np.ndarray:
    """Return bf16 words as float32."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def check_finite_words(words: np.ndarray) -> None:
    """Raise DecodeError if a bf16 word is NaN or infinite."""
    if bool(((words & 0x7F80) == 0x7F80).any()):
        raise DecodeError("the frame holds NaN or infinity; its sender diverged or it is hostile")
