"""Bytes made smaller in the way that suits them: zstd at some of its levels, or our own coders."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import numpy as np

from autoflip.codec.reader import varint
from autoflip.ops import entropy
from autoflip.ops.entropy import PLAIN

__all__ = [
    "BESIDE",
    "CHEAP",
    "FOLLOWS",
    "SMALL",
    "STORED",
    "ZSTD",
    "Buffer",
    "length",
    "little",
    "packed_size",
    "pays",
    "smallest",
    "zstd",
]

Buffer = bytes | memoryview
STORED, ZSTD, _, FOLLOWS, BESIDE = range(5)  # entropy stages of a part
CHEAP, _THOROUGH = 6, 12  # levels of zstd: about 100 and 30 MB/s
_FEW = 16  # bytes that stay as they are: a zstd frame has 9 beside what it holds, our own coder 7 and a table
_LITTLE = 1 << 9  # bytes that are packed thoroughly and in no other way: that takes 5 to 20 us
_TINY, SMALL = 1 << 15, 1 << 17  # bytes that may be packed thoroughly, and of which a part does not tell
_NOISY = 1 << 14  # bytes: more are noise where neither zstd's quick try nor our own coder finds anything
_LARGE = 1 << 20  # bytes of which both coders' sizes are compared, where the part speaks for ours
_PAYS_MUCH, _PAYS = 0.97, 0.995  # of the bytes, under which they are packed: of many, and of others
_SLOW = (
    3 << 18
)  # bytes from which they are many: packing and unpacking takes as long as 10 Mbit/s take for what it saves
_MIDDLE, _SURE = 1 << 18, 0.92  # beyond that size, and below that share of zstd's, only ours is tried
_BARE = 0.4  # of the bytes, from which Huffman codes alone leave no long repetition to find
# of zstd's bytes, from which our own coder is taken where there is much to pack: zstd is faster (half a percent of a
# bf16 frame of 10 M weights took as long again as the frame, and what a link of 8 Mbit/s gains by it)
_WORTH_MUCH = 0.985
_NEAR = 1.03  # estimates are as good as that
# a thorough search is for what our own coder does not see: where the quick one found repetitions that pay, or is
# smaller than ours would be
_REPEATS, _UNSEEN = 0.99, 1.02
_NOTHING = 0.998  # of Huffman codes' bytes, below which zstd has found repetitions
_SAME = 1.001  # of zstd's bytes, to which Huffman codes alone are as good
# of Huffman codes' bytes, below which so much repeats that zstd tries everything: a sample shows too little of it, and
# our own coder, though better than zstd's first try, none (2 % of the MLP's int8, 15 % of the CNN's downlink)
_STRONG = 0.95  # and of little bytes where anything repeats
_CLOSE = 1.1  # of ours, below which zstd's quick try promises something of its thorough one


class _Kept(threading.local):
    """What a thread packs little with: making one costs as much as packing 10 kB."""

    def __init__(self) -> None:
        self.packers: dict[tuple[int, bool], Any] = {}


_kept = _Kept()


def length(buffer: Buffer) -> int:
    """Bytes of a buffer."""
    return memoryview(buffer).nbytes


def pays(packed: int, size: int) -> bool:
    """Tell whether ``packed`` bytes instead of ``size`` are worth the time."""
    return packed < _share(size) * size


def _share(size: int) -> float:
    return _PAYS_MUCH if size >= _SLOW else _PAYS


def _squeeze(raw: Buffer, level: int, *, plain: bool = False) -> bytes:
    """Return one zstd frame that declares its content size; ``plain``: of ``raw`` without short repetitions."""
    keep = level <= CHEAP or length(raw) <= _TINY  # high levels hold on to megabytes for more
    packer = _kept.packers.get((level, plain)) if keep else None
    if packer is None:
        library = zstd()
        packer = library.ZstdCompressor(level=level)
        if plain:
            settings = library.ZstdCompressionParameters.from_level(level, hash_log=6, min_match=7)
            packer = library.ZstdCompressor(compression_params=settings)
        if keep:
            _kept.packers[level, plain] = packer
    return packer.compress(raw)


def packed_size(raw: Buffer, level: int, times: float, wanted: int = 0) -> tuple[int, bool]:
    """Return about how many bytes ``times`` as much as ``raw``, and like it, would take after the entropy stage.

    And whether something repeats in ``raw``, as far as zstd sees. Our own coder is not asked where nothing does and
    zstd alone is below ``wanted`` bytes.
    """
    size = len(_squeeze(raw, level))
    bare, own = entropy.literals(raw, 0)[0], None
    repeats = bare is None or size < _NOTHING * bare
    # what a sample of more bytes tells is 2 % off, too much to choose by
    if length(raw) >= _LITTLE and (repeats or times * size >= wanted):
        own, _ = entropy.encode_below(raw, PLAIN, 0 if length(raw) <= entropy.SAMPLE else int(_NEAR * size))
    return int(times * (size if own is None else min(size, own))), repeats


def little(size: int, level: int) -> bool:
    """Tell whether so few bytes are packed in one way only."""
    return size < _LITTLE and level <= CHEAP


def smallest(
    raw: Buffer, level: int, key: int, beside: np.ndarray | None = None, *, tries: int = 3
) -> tuple[int, Buffer]:
    """Pack ``raw`` in that of some ways which suits it; return the stage and the bytes.

    Short repetitions are mostly chance among codes with many zeros (the CNN's of bench/real_deltas.py are 3 % smaller
    without), and all that there is to find among the MLP's, where higher levels find more (2 %). Our own coder sees
    what neighbours tell of each other: 2 to 7 % on codes, a quarter on the low bytes of float32.
    """
    view = memoryview(raw)
    if len(view) < _FEW:
        return STORED, raw
    if tries == 1:
        return ZSTD, _squeeze(raw, level)
    if little(len(view), level):
        packed_thoroughly = _squeeze(raw, _THOROUGH)
        _, coded = entropy.encode_below(raw, key, len(packed_thoroughly) - 2, beside)
        if coded is None:
            return ZSTD, packed_thoroughly
        return FOLLOWS if beside is None else BESIDE, varint(len(view)) + coded
    if len(view) > SMALL:
        return _of_many(view, level, key, beside)
    packed = {plain: _squeeze(view, level, plain=plain) for plain in ((False, True) if level <= CHEAP else (False,))}
    best = min(packed.values(), key=len)
    own, coded = entropy.encode_below(raw, key, int(min(len(best), _share(len(view)) * len(view))), beside)
    if len(view) > _NOISY and len(best) >= len(view) and own is not None and coded is None:
        return STORED, raw  # nobody finds anything
    head = varint(len(view))
    wins = coded is not None and len(head) + len(coded) < len(best)
    bare = entropy.literals(view, 0)[0]  # None for so few bytes that ours is to stand for them
    strong = (_STRONG if len(view) > _TINY else _NOTHING) * bare if bare else _CLOSE * (own or 0)
    if level <= CHEAP and (
        len(best) < strong
        or not wins
        and pays(len(best), len(view))
        and (own is None or own > _UNSEEN * len(best) or len(packed[False]) < _REPEATS * len(packed[True]))
    ):
        best = min(best, _squeeze(raw, CHEAP if len(view) > _TINY else _THOROUGH), key=len)
    if coded is not None and len(head) + len(coded) < len(best):
        return FOLLOWS if beside is None else BESIDE, head + coded
    return ZSTD, best


def _of_many(view: memoryview, level: int, key: int, beside: np.ndarray | None) -> tuple[int, Buffer]:
    """Pack what a sample says is best; our own Huffman codes stand for zstd where nothing repeats."""
    part = _sample(view)
    bare = entropy.literals(part, 0)[0] if level <= CHEAP else None
    found = len(_squeeze(part, level))
    best, plain = found, False
    if level <= CHEAP and (bare is None or bare > _SAME * found or bare < _BARE * len(part)):
        few = len(_squeeze(part, level, plain=True))
        best, plain = min((found, False), (few, True))
    repeats = bare is None or best < _NOTHING * bare
    expected = (best if repeats or bare is None else min(best, bare)) * len(view) / len(part)
    packed: Buffer | None = None
    if bare is not None and best < _STRONG * bare:
        packed = _squeeze(view, level, plain=plain)
        if len(view) <= _MIDDLE:
            packed = min(packed, _squeeze(view, CHEAP), key=length)
        expected = length(packed)
    most = _share(len(view)) * len(view)
    limit = _WORTH_MUCH * expected if expected < _PAYS_MUCH * len(view) else most  # else what nothing else packs
    _, coded = entropy.encode_below(view, key, int(min(limit, most)), beside)
    # zstd finds far repetitions, which a sample does not have; hardly a tenth of larger parts
    if packed is None and (
        len(view) <= _MIDDLE or repeats and coded and len(view) <= _LARGE and len(coded) >= _SURE * expected
    ):
        packed = _squeeze(view, level, plain=plain)
        expected = length(packed)
    if coded is not None:
        head = varint(len(view))
        if len(head) + len(coded) < (limit if packed is None else min(limit, expected)):
            return FOLLOWS if beside is None else BESIDE, head + coded
    if bare is not None and bare <= _SAME * best:
        packed = entropy.literals(view, int(most if packed is None else expected))[1] or packed
    return ZSTD, packed or _squeeze(view, level, plain=plain)


def _sample(view: memoryview) -> bytes:
    size = SMALL // (8 if len(view) <= _MIDDLE else 16)
    last = len(view) - size
    return b"".join(view[start : start + size] for start in (0, last // 3, 2 * last // 3, last))


def zstd() -> ModuleType:
    """Return the zstandard library.

    Raises:
        ImportError: it is missing.
    """
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            "autoflip.codec packs with the zstandard library, which is missing; run: pip install zstandard "
            '(or encode with entropy="none")'
        ) from error
    return zstandard
