"""Sections of a frame: bytes with their entropy stage, zstd's or our own, whichever is smaller."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from autoflip.codec.reader import DecodeError, Reader, varint
from autoflip.ops import entropy as ans
from autoflip.ops.entropy import MAGNITUDE, PLAIN, SIGNED

__all__ = [
    "ENTROPIES",
    "PLAIN",
    "SIGNED",
    "Buffer",
    "length",
    "packed_size",
    "plane_section",
    "read_planes",
    "read_section",
    "section",
]

ENTROPIES = ("zstd", "none")  # what a writer may be asked for
Buffer = bytes | memoryview
_STORED, _ZSTD, _APART, _FOLLOWS, _BESIDE = range(5)  # entropy stages
_CHEAP, _THOROUGH = 6, 12  # levels of zstd: about 100 and 30 MB/s
_TINY, _SMALL = 1 << 15, 1 << 17  # bytes that are packed in several ways, one of them thorough; of more a part tells
_LARGE = 1 << 20  # bytes of which both coders' sizes are compared, where the part speaks for ours
_LEAST = 192  # bytes from which our own coder may win
# of zstd's bytes, from which our own coder is taken: zstd is faster, which counts where there is much to pack (half a
# percent of a bf16 frame of 10 M weights took as long again as the frame, and what a link of 8 Mbit/s gains by it)
_WORTH, _WORTH_MUCH = 0.995, 0.98
_NEAR = 1.03  # estimates of small parts are as good as that
_kept = threading.local()  # a thread's cheap compressors: making one costs as much as packing 10 kB


def length(buffer: Buffer) -> int:
    """Bytes of a buffer."""
    return memoryview(buffer).nbytes


def section(
    parts: Sequence[Buffer], entropy: str, level: int = 1, *, apart: bool = False, key: int = PLAIN, tries: int = 3
) -> list[Buffer]:
    """Return ``parts`` as one section: its entropy byte and length, then its bytes, packed where that pays.

    Args:
        parts: bytes in a row.
        entropy: "zstd" or "none".
        level: of zstd.
        apart: pack each part for itself: they are unlike each other.
        key: how our own coder is to order the byte before (:mod:`autoflip.ops.entropy`).
        tries: ways of zstd that are tried, the cheapest first; 1: our own coder neither.
    """
    if entropy == "zstd" and apart and len(parts) > 1:
        return _apart([section([part], entropy, level, key=key, tries=tries) for part in parts])
    size = sum(map(length, parts))
    if entropy == "zstd" and size:
        stage, packed = _smallest(parts[0] if len(parts) == 1 else b"".join(parts), level, key, tries=tries)
        if length(packed) < 0.97 * size:
            return [bytes([stage]) + varint(length(packed)), packed]
    return [bytes([_STORED]) + varint(size), *parts]


def _apart(parts: list[list[Buffer]]) -> list[Buffer]:
    body = [piece for part in parts for piece in part]
    return [bytes([_APART]) + varint(sum(map(length, body))), *body]


def plane_section(planes: Sequence[np.ndarray], entropy: str, level: int = 1, *, minor: bool = False) -> list[Buffer]:
    """Return the byte planes of 2- or 4-byte floats, lowest first, as one section, packed apart.

    ``minor``: they are a small part of their frame, not worth trying much.
    """
    if entropy != "zstd" or not len(planes[0]):
        return section([plane.data for plane in planes], entropy, level)
    if minor and level <= _CHEAP:
        return section([plane.data for plane in planes], entropy, level, apart=True, tries=1)
    parts = [section([planes[-1].data], entropy, level, key=MAGNITUDE)]
    for i in range(len(planes) - 2, -1, -1):
        size = len(planes[i])
        stage, packed = _smallest(planes[i].data, level, *_beside(planes, i))
        stored = length(packed) >= 0.97 * size
        kept: Buffer = planes[i].data if stored else packed
        parts.append([bytes([_STORED if stored else stage]) + varint(length(kept)), kept])
    return _apart(parts[::-1])


def _beside(planes: Sequence[np.ndarray], i: int) -> tuple[int, np.ndarray]:
    """Return how to order, and what tells about plane ``i`` from those above: the exponent, as far as it is known."""
    if i == len(planes) - 2:
        return MAGNITUDE, planes[-1]
    return PLAIN, planes[-1] << np.uint8(1) | planes[-2] >> np.uint8(7)


def _squeeze(raw: Buffer, level: int, *, plain: bool = False) -> bytes:
    """Return one zstd frame that declares its content size; ``plain``: of ``raw`` without short repetitions."""
    zstd, held, name = _zstd(), vars(_kept), f"{level}, {plain}"
    packer = held.get(name)
    if packer is None:
        packer = zstd.ZstdCompressor(level=level)
        if plain:
            settings = zstd.ZstdCompressionParameters.from_level(level, hash_log=6, min_match=7)
            packer = zstd.ZstdCompressor(compression_params=settings)
        if level <= _CHEAP:
            held[name] = packer
    return packer.compress(raw)


def packed_size(raw: Buffer, level: int, times: float) -> int:
    """Return about how many bytes ``times`` as much as ``raw``, and like it, would take after the entropy stage."""
    size = len(_squeeze(raw, level))
    own = ans.estimate(raw, PLAIN) if length(raw) >= _LEAST else None
    if own is not None and own < _NEAR * size:
        size = min(size, len(ans.encode(raw, PLAIN)))
    return int(times * size)


def _smallest(
    raw: Buffer, level: int, key: int, beside: np.ndarray | None = None, *, tries: int = 3
) -> tuple[int, Buffer]:
    """Pack ``raw`` in that of some ways which suits it; return the stage and the bytes.

    Short repetitions are mostly chance among codes with many zeros (the CNN's of bench/real_deltas.py are 3 % smaller
    without), and all that there is to find among the MLP's, where higher levels find more (2 %). Our own coder sees
    what neighbours tell of each other: 2 to 7 % on codes, a quarter on the low bytes of float32.
    """
    view = memoryview(raw)
    part: Buffer = view if len(view) <= _SMALL else _sample(view)
    if tries == 1:
        return _ZSTD, _squeeze(raw, level)
    tried = [(level, False)]
    if level <= _CHEAP:
        tried.append((level, True))
        if part is view:
            tried.append((_CHEAP if len(view) > _TINY else _THOROUGH, False))
    packed, best = min(((_squeeze(part, *way[:1], plain=way[1]), way) for way in tried), key=lambda p: len(p[0]))
    expected = len(packed) * len(view) / max(1, len(part))
    own = ans.estimate(raw, key, beside) if len(view) >= _LEAST else None
    if own is not None and own < (_NEAR if part is view else _WORTH_MUCH) * expected:
        coded = varint(len(view)) + bytes(ans.encode(raw, key, beside))
        if part is not view and len(view) <= _LARGE:  # zstd finds far repetitions, which a sample does not have
            part, packed = view, _squeeze(raw, best[0], plain=best[1])
            expected = len(packed)
        if len(coded) < (_WORTH if len(view) <= _SMALL else _WORTH_MUCH) * expected:
            return _FOLLOWS if beside is None else _BESIDE, coded
    return _ZSTD, packed if part is view else _squeeze(raw, best[0], plain=best[1])


def _sample(view: memoryview) -> bytes:
    size = _SMALL // 8
    starts = np.linspace(0, len(view) - size, 4).astype(int)
    return b"".join(view[start : start + size] for start in starts)


def read_section(reader: Reader, bounds: Sequence[tuple[int, int]]) -> list[memoryview]:
    """Read one section of parts between ``bounds`` (least, most) bytes unpacked.

    Nothing is allocated before the sizes are sure. Returns the parts apart if they were packed so, else all of them
    in one piece.
    """
    stage, stored = _take(reader)
    if stage == _APART and len(bounds) > 1:
        inner = Reader(stored, "a section")
        parts = [_unpack(*_take(inner), *bound) for bound in bounds]
        inner.finish()
        return parts
    return [_unpack(stage, stored, sum(b[0] for b in bounds), sum(b[1] for b in bounds))]


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
        beside = _beside(planes, i)[1] if parts[i][0] == _BESIDE and i < width - 1 else None
        planes[i] = np.frombuffer(_unpack(*parts[i], count, count, beside), np.uint8)
    return planes


def _take(reader: Reader) -> tuple[int, memoryview]:
    stage = reader.take(1)[0]
    return stage, reader.take(reader.varint())


def _unpack(stage: int, stored: memoryview, least: int, most: int, beside: np.ndarray | None = None) -> memoryview:
    if stage == _STORED:
        _check_size(len(stored), least, most)
        return stored
    if stage == _FOLLOWS or stage == _BESIDE and beside is not None:
        part = Reader(stored, "a section")
        size = part.varint()
        _check_size(size, least, most)
        try:
            return ans.decode(part.rest(), size, beside).data
        except ValueError as error:
            raise DecodeError(f"{error}; the frame is damaged") from error
    if stage != _ZSTD:
        raise DecodeError(f"a section has entropy stage {stage}, which this version does not know here")
    zstd = _zstd()
    try:
        # python-zstandard ignores max_output_size when the frame declares its size: compare that size first
        size = zstd.get_frame_parameters(stored).content_size
        _check_size(size, least, most)
        unpacker = zstd.ZstdDecompressor(max_window_size=max(1 << 10, min(1 << 27, 2 * most)))
        raw = unpacker.decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstd.ZstdError as error:
        raise DecodeError(f"a section is no zstd frame ({error}); the frame is damaged") from error
    if len(raw) != size:
        raise DecodeError(f"a section unpacked to {len(raw)} bytes, wanted {size}; the frame is damaged")
    return memoryview(raw)


def _check_size(size: int, least: int, most: int) -> None:
    if not least <= size <= most:
        raise DecodeError(f"a section unpacks to {size} bytes, wanted {least} to {most}; the frame is damaged")


def _zstd() -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            "autoflip.codec packs with the zstandard library, which is missing; run: pip install zstandard "
            '(or encode with entropy="none")'
        ) from error
    return zstandard
