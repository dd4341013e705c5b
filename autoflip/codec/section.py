"""Sections of a frame: bytes with their entropy stage, zstd's or our own, whichever is smaller."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

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
_FEW = 16  # bytes that stay as they are: a zstd frame has 9 beside what it holds, our own coder's 32
_LITTLE = 1 << 9  # bytes that are packed thoroughly and in no other way: that takes 5 to 20 us
_TINY, _SMALL = 1 << 15, 1 << 17  # bytes that may be packed thoroughly, and of which a part does not tell
_NOISY = 1 << 14  # bytes of which a quarter tells whether they are noise
_LARGE = 1 << 20  # bytes of which both coders' sizes are compared, where the part speaks for ours
_PAYS = 0.97  # of the bytes, under which they are packed
_MIDDLE, _SURE = 1 << 18, 0.92  # beyond that size, and below that share of zstd's, only ours is tried
# of zstd's bytes, from which our own coder is taken: zstd is faster, which counts where there is much to pack (half a
# percent of a bf16 frame of 10 M weights took as long again as the frame, and what a link of 8 Mbit/s gains by it)
_WORTH, _WORTH_MUCH = 0.995, 0.98
_NEAR = 1.03  # estimates are as good as that
# a thorough search is for what our own coder does not see: where the quick one found repetitions that pay, or is
# smaller than ours would be
_REPEATS, _UNSEEN = 0.99, 1.02


class _Kept(threading.local):
    """What a thread packs and unpacks little with: making one costs as much as packing 10 kB."""

    def __init__(self) -> None:
        self.packers: dict[tuple[int, bool], Any] = {}
        self.unpacker: Any = None


_kept = _Kept()


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
        if length(packed) < _PAYS * size:
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
        known = (PLAIN, None) if _little(size, level) else _beside(planes, i)
        stage, packed = _smallest(planes[i].data, level, *known)
        stored = length(packed) >= _PAYS * size
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
    keep = level <= _CHEAP or length(raw) <= _TINY  # high levels hold on to megabytes for more
    packer = _kept.packers.get((level, plain)) if keep else None
    if packer is None:
        zstd = _zstd()
        packer = zstd.ZstdCompressor(level=level)
        if plain:
            settings = zstd.ZstdCompressionParameters.from_level(level, hash_log=6, min_match=7)
            packer = zstd.ZstdCompressor(compression_params=settings)
        if keep:
            _kept.packers[level, plain] = packer
    return packer.compress(raw)


def packed_size(raw: Buffer, level: int, times: float) -> int:
    """Return about how many bytes ``times`` as much as ``raw``, and like it, would take after the entropy stage."""
    size = len(_squeeze(raw, level))
    own = None
    if length(raw) >= _LITTLE:  # what a sample of more bytes tells is 2 % off, too much to choose by
        own, _ = ans.encode_below(raw, PLAIN, 0 if length(raw) <= ans.SAMPLE else int(_NEAR * size))
    return int(times * (size if own is None else min(size, own)))


def _little(size: int, level: int) -> bool:
    return size < _LITTLE and level <= _CHEAP


def _smallest(
    raw: Buffer, level: int, key: int, beside: np.ndarray | None = None, *, tries: int = 3
) -> tuple[int, Buffer]:
    """Pack ``raw`` in that of some ways which suits it; return the stage and the bytes.

    Short repetitions are mostly chance among codes with many zeros (the CNN's of bench/real_deltas.py are 3 % smaller
    without), and all that there is to find among the MLP's, where higher levels find more (2 %). Our own coder sees
    what neighbours tell of each other: 2 to 7 % on codes, a quarter on the low bytes of float32.
    """
    view = memoryview(raw)
    if len(view) < _FEW:
        return _STORED, raw
    if tries == 1 or _little(len(view), level):
        return _ZSTD, _squeeze(raw, level if tries == 1 else _THOROUGH)
    whole = len(view) <= _SMALL
    part: Buffer = view if whole else _sample(view)
    packed = {plain: _squeeze(part, level, plain=plain) for plain in ((False, True) if level <= _CHEAP else (False,))}
    plain, best = min(packed.items(), key=lambda item: len(item[1]))
    expected, worth = len(best) * len(view) / len(part), _WORTH if whole else _WORTH_MUCH
    if whole and len(view) > _NOISY and len(best) >= len(view):  # zstd found nothing: does a quarter show anything?
        quarter = len(view) // 4
        seen = ans.estimate(view[:quarter], key, None if beside is None else beside[:quarter])
        if seen is not None and seen > _WORTH_MUCH * quarter:
            return _STORED, raw
    own, coded = ans.encode_below(raw, key, int(min(worth * expected, _PAYS * len(view))), beside)
    if coded is not None:
        # zstd finds far repetitions, which a sample does not have; hardly a tenth of larger parts
        if not whole and len(view) <= (_MIDDLE if len(coded) < _SURE * expected else _LARGE):
            part, best = view, _squeeze(raw, level, plain=plain)
            expected = len(best)
        head = varint(len(view))
        if len(head) + len(coded) < worth * expected:
            return _FOLLOWS if beside is None else _BESIDE, head + coded
    elif (
        whole
        and level <= _CHEAP
        and expected < _PAYS * len(view)
        and (own is None or own > _UNSEEN * expected or len(packed[False]) < _REPEATS * len(packed[True]))
    ):
        best = min(best, _squeeze(raw, _CHEAP if len(view) > _TINY else _THOROUGH), key=len)
    return _ZSTD, best if part is view else _squeeze(raw, level, plain=plain)


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
        raw = _unpacker(most).decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstd.ZstdError as error:
        raise DecodeError(f"a section is no zstd frame ({error}); the frame is damaged") from error
    if len(raw) != size:
        raise DecodeError(f"a section unpacked to {len(raw)} bytes, wanted {size}; the frame is damaged")
    return memoryview(raw)


def _unpacker(most: int) -> Any:
    """Return what unpacks to ``most`` bytes, and refuses windows that are of no use for so few."""
    if most > _SMALL:
        return _zstd().ZstdDecompressor(max_window_size=min(1 << 27, 2 * most))
    if _kept.unpacker is None:
        _kept.unpacker = _zstd().ZstdDecompressor(max_window_size=2 * _SMALL)
    return _kept.unpacker


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
