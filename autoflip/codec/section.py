"""Sections of a frame: bytes with their entropy stage, zstd's or our own, whichever is smaller."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from autoflip.codec.packing import (
    BESIDE,
    CHEAP,
    FOLLOWS,
    SMALL,
    STORED,
    ZSTD,
    Buffer,
    length,
    little,
    pays,
    smallest,
    zstd,
)
from autoflip.codec.reader import DecodeError, Reader, varint
from autoflip.ops import entropy as ans
from autoflip.ops.entropy import MAGNITUDE, PLAIN, SIGNED

__all__ = [
    "ENTROPIES",
    "PLAIN",
    "SIGNED",
    "code_section",
    "numbers",
    "plane_section",
    "read_planes",
    "read_section",
    "section",
]

ENTROPIES = ("zstd", "none")  # what a writer may be asked for
_APART = 2  # the entropy stage of parts that have their own; those of parts are packing's
_SHORT = 1 << 15  # bytes of codes to which their tensors are tried as companions


class _Kept(threading.local):
    """What a thread unpacks little with: making one costs as much as unpacking 10 kB."""

    unpacker: Any = None


_kept = _Kept()


def section(
    parts: Sequence[Buffer], entropy: str, level: int = 1, *, apart: bool = False, key: int = PLAIN, tries: int = 3
) -> list[Buffer]:
    """Return ``parts`` as one section: its entropy byte and length, then its bytes, packed where that pays.

    Args:
        parts: bytes in a row.
        entropy: "zstd" or "none".
        level: of zstd.
        apart: pack each part for itself, for they may be unlike each other, unless few bytes take less together.
        key: how our own coder is to order the byte before (:mod:`autoflip.ops.entropy`).
        tries: ways of zstd that are tried, the cheapest first; 1: our own coder neither.
    """
    size = sum(map(length, parts))
    if entropy == "zstd" and apart and len(parts) > 1:
        each = _apart([section([part], entropy, level, key=key, tries=tries) for part in parts])
        if size > SMALL or tries == 1:
            return each
        # many small parts, each with a frame and tables of its own: 9 % of the ResNet's top 1 %
        return min(each, section(parts, entropy, level, key=key, tries=tries), key=lambda out: sum(map(length, out)))
    if entropy == "zstd" and size:
        stage, packed = smallest(parts[0] if len(parts) == 1 else b"".join(parts), level, key, tries=tries)
        if pays(length(packed), size):
            return [bytes([stage]) + varint(length(packed)), packed]
    return [bytes([STORED]) + varint(size), *parts]


def code_section(parts: Sequence[np.ndarray], entropy: str, level: int, key: int) -> list[Buffer]:
    """Return the codes of tensors, one array of bytes each, as one section.

    A table for all codes fits no tensor well whose codes are spread unlike the others' (36 % of the MLP's second
    matrix are zeros, 2 % of its first): little is also tried with tables that neighbouring tensors share where that
    takes less, for half a millisecond. Of more, the byte before tells more than the tensor.
    """
    size = sum(map(len, parts))
    whole = section([part.data for part in parts], entropy, level, key=key)
    if entropy != "zstd" or len(parts) < 2 or size > _SHORT:
        return whole
    beside, head = numbers([len(part) for part in parts]), varint(size)
    coded = ans.encode_below(np.concatenate(parts), key, sum(map(length, whole)), beside)[1]
    if coded is None or not pays(len(head) + len(coded), size):
        return whole
    numbered: list[Buffer] = [bytes([BESIDE]) + varint(len(head) + len(coded)) + head, coded]
    return min(whole, numbered, key=lambda out: sum(map(length, out)))


def numbers(sizes: Sequence[int]) -> np.ndarray:
    """Return what codes of tensors stand beside: each byte's tensor, counted from 0, the 128th and later as one."""
    return np.repeat(np.minimum(np.arange(len(sizes)), 127).astype(np.uint8), sizes)


def _apart(parts: list[list[Buffer]]) -> list[Buffer]:
    body = [piece for part in parts for piece in part]
    return [bytes([_APART]) + varint(sum(map(length, body))), *body]


def plane_section(planes: Sequence[np.ndarray], entropy: str, level: int = 1, *, minor: bool = False) -> list[Buffer]:
    """Return the byte planes of 2- or 4-byte floats, lowest first, as one section, packed apart.

    ``minor``: they are a small part of their frame, not worth trying much.
    """
    if entropy != "zstd" or not len(planes[0]):
        return section([plane.data for plane in planes], entropy, level)
    if minor and level <= CHEAP:
        return section([plane.data for plane in planes], entropy, level, apart=True, tries=1)
    parts = [section([planes[-1].data], entropy, level, key=MAGNITUDE)]
    for i in range(len(planes) - 2, -1, -1):
        size = len(planes[i])
        known = (PLAIN, None) if little(size, level) else _beside(planes, i)
        stage, packed = smallest(planes[i].data, level, *known)
        stored = not pays(length(packed), size)
        kept: Buffer = planes[i].data if stored else packed
        parts.append([bytes([STORED if stored else stage]) + varint(length(kept)), kept])
    return _apart(parts[::-1])


def _beside(planes: Sequence[np.ndarray], i: int) -> tuple[int, np.ndarray]:
    """Return how to order, and what tells about plane ``i`` from those above: the exponent, as far as it is known."""
    if i == len(planes) - 2:
        return MAGNITUDE, planes[-1]
    return PLAIN, planes[-1] << np.uint8(1) | planes[-2] >> np.uint8(7)


def read_section(
    reader: Reader, bounds: Sequence[tuple[int, int]], beside: Callable[[], np.ndarray] | None = None
) -> list[memoryview]:
    """Read one section of parts between ``bounds`` (least, most) bytes unpacked.

    Nothing is allocated before the sizes are sure. Returns the parts apart if they were packed so, else all of them
    in one piece. ``beside``: makes what may stand beside all of them.
    """
    stage, stored = _take(reader)
    if stage == _APART and len(bounds) > 1:
        inner = Reader(stored, "a section")
        parts = [_unpack(*_take(inner), *bound) for bound in bounds]
        inner.finish()
        return parts
    known = beside() if beside and stage == BESIDE else None
    return [_unpack(stage, stored, sum(b[0] for b in bounds), sum(b[1] for b in bounds), known)]


def read_planes(reader: Reader, count: int, width: int) -> list[np.ndarray]:
    """Read a section of ``width`` byte planes of ``count`` bytes, lowest first."""
    stage, stored = _take(reader)
    if stage != _APART:
        raw = np.frombuffer(_unpack(stage, stored, width * count, width * count), np.uint8)
        return [raw[i * count : (i + 1) * count] for i in range(width)]
    inner = Reader(stored, "a section")
    parts = [_take(inner) for _ in range(width)]
    inner.finish()
    planes = [np.empty(0, np.uint8)] * width
    for i in range(width - 1, -1, -1):
        beside = _beside(planes, i)[1] if parts[i][0] == BESIDE and i < width - 1 else None
        planes[i] = np.frombuffer(_unpack(*parts[i], count, count, beside), np.uint8)
    return planes


def _take(reader: Reader) -> tuple[int, memoryview]:
    stage = reader.take(1)[0]
    return stage, reader.take(reader.varint())


def _unpack(stage: int, stored: memoryview, least: int, most: int, beside: np.ndarray | None = None) -> memoryview:
    if stage == STORED:
        _check_size(len(stored), least, most)
        return stored
    if stage == FOLLOWS or stage == BESIDE and beside is not None:
        part = Reader(stored, "a section")
        size = part.varint()
        _check_size(size, least, most)
        try:
            return ans.decode(part.rest(), size, beside).data
        except ValueError as error:
            raise DecodeError(f"{error}; the frame is damaged") from error
    if stage != ZSTD:
        raise DecodeError(f"a section has entropy stage {stage}, which this version does not know here")
    try:
        # python-zstandard ignores max_output_size when the frame declares its size: compare that size first
        size = zstd().get_frame_parameters(stored).content_size
        _check_size(size, least, most)
        if (known := ans.read_literals(stored, size)) is not None:
            return known.data
        raw = _unpacker(most).decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstd().ZstdError as error:
        raise DecodeError(f"a section is no zstd frame ({error}); the frame is damaged") from error
    if len(raw) != size:
        raise DecodeError(f"a section unpacked to {len(raw)} bytes, wanted {size}; the frame is damaged")
    return memoryview(raw)


def _unpacker(most: int) -> Any:
    """Return what unpacks to ``most`` bytes, and refuses windows that are of no use for so few."""
    if most > SMALL:
        return zstd().ZstdDecompressor(max_window_size=min(1 << 27, 2 * most))
    if _kept.unpacker is None:
        _kept.unpacker = zstd().ZstdDecompressor(max_window_size=2 * SMALL)
    return _kept.unpacker


def _check_size(size: int, least: int, most: int) -> None:
    if not least <= size <= most:
        raise DecodeError(f"a section unpacks to {size} bytes, wanted {least} to {most}; the frame is damaged")
