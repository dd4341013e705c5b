"""Which entries travel, told explicitly: bitmap, Rice code or varint gaps, whichever is smallest for that tensor."""

from __future__ import annotations

import math

import numpy as np
import torch

from autoflip.codec.packing import Buffer, packed_size
from autoflip.codec.reader import DecodeError, Reader
from autoflip.codec.section import read_section, section
from autoflip.ops import delta as ops
from autoflip.ops import delta_coding as codes
from autoflip.ops.delta import Pack

__all__ = [
    "BITMAP",
    "COLUMNS",
    "NAMES",
    "RANKS",
    "RICE",
    "SHARED",
    "VARINT",
    "WHOLE",
    "Set",
    "choose",
    "choose_order",
    "read_sets",
    "turn",
    "write_sets",
]

WHOLE, SHARED, BITMAP, RICE, VARINT, COLUMNS = range(6)
RANKS = 8  # added to BITMAP, RICE or VARINT: ranks among the entries that a shared mask keeps, not positions
NAMES = {WHOLE: "whole", SHARED: "shared mask", BITMAP: "bitmap", RICE: "rice", VARINT: "varint"}
NAMES[COLUMNS] = "varint, by columns"
NAMES |= {RANKS | coding: f"ranks, {NAMES[coding]}" for coding in (BITMAP, RICE, VARINT)}
_MAX_K = 31
# entries, and kept ones, of which columns are tried too: of more it takes longer than what it saves takes to send
_TURNED, _TURNED_KEPT = 1 << 20, 1 << 14
_SAMPLE = 1 << 14  # kept entries; of larger sets four runs stand for the whole when codings are compared

Set = tuple[int, int, Pack]  # (coding, Rice parameter, entries)


def _sample(mask: Pack) -> tuple[Pack, float]:
    """Return a smaller set that looks like ``mask``, and how many times larger ``mask`` is in kept entries."""
    run = -(-_SAMPLE * mask.numel // (4 * 64 * max(1, mask.kept)))  # words
    if mask.numel <= 8 * 64 * run:
        return mask, 1.0
    last = mask.numel // 64 - run
    starts = (0, last // 3, 2 * last // 3, last)
    part = ops.pack_words(torch.cat([mask.words[s : s + run] for s in starts]), 4 * 64 * run)
    return part, mask.kept / max(1, part.kept)


def _rice_parameter(part: Pack, times: float) -> tuple[int, int]:
    """Return (k, bits) of the shortest Rice code around the geometric guess for ``times`` as much as ``part``."""
    guess = int(math.log2(max(1.0, 0.69 * part.numel / max(1, part.kept))))
    tried = {k: codes.rice_bits(part, k) for k in range(max(0, guess - 1), min(_MAX_K, guess + 1) + 1)}
    best = min(tried, key=lambda k: tried[k])
    return best, int(tried[best] * times)


def choose(mask: Pack, entropy: str = "none", level: int = 1) -> tuple[int, int, int]:
    """Return (coding, Rice parameter, bytes) of the smallest coding of a set; of large ones a sample decides."""
    if mask.whole:
        return WHOLE, 0, 0
    part, times = _sample(mask)
    bitmap = -(-mask.numel // 8)
    best = (BITMAP, 0, bitmap)
    # a code has at least one bit, a gap of two or more at least two: above half density no Rice code wins
    if mask.numel < 1 << 32 and 2 * mask.kept <= mask.numel:
        k, bits = _rice_parameter(part, times)
        best = min(best, (RICE, k, -(-bits // 8)), key=lambda b: b[2])
    if entropy == "none" or not mask.kept:
        return best
    if 4 * mask.kept <= mask.numel:  # a varint has a byte or more: at higher density packing it is work for nothing
        size, repeats = packed_size(codes.varint_encode(part), level, times, best[2])
        best = min(best, (VARINT, 0, size), key=lambda b: b[2])
        if not repeats:  # then bits do not either, and gaps tell more of each other than bytes of bits do
            return best
    size, _ = packed_size(_bitmap(part), level, mask.numel / part.numel)
    return min(best, (BITMAP, 0, size), key=lambda b: b[2])


def turn(mask: Pack, columns: int) -> Pack:
    """Return the mask of the transpose: entry i of a matrix of so many columns becomes ``i % columns * rows + i //
    columns``.
    """
    rows = mask.numel // columns
    where = ops.bits(mask).nonzero().view(-1)
    out = torch.zeros(mask.numel, dtype=torch.bool)
    out[where % columns * rows + where // columns] = True
    return ops.pack(out)


def choose_order(mask: Pack, shape: tuple[int, ...], entropy: str, level: int) -> tuple[int, int, int, Pack]:
    """Return what :func:`choose` does, or COLUMNS where that is smaller; and the set as it is to be coded.

    The first dimension of ``shape`` counts the rows, all others together the columns. What a neuron's weights tell is
    in rows, what an input's do is in columns: of the MLP's second layer's top 1 % of bench/real_deltas.py they tell
    7 % more.
    """
    coding, k, size = choose(mask, entropy, level)
    rows = shape[0] if shape else 0
    small = mask.numel <= _TURNED and 0 < mask.kept <= min(_TURNED_KEPT, mask.numel // 4)
    if entropy == "none" or not small or not 1 < rows < mask.numel:
        return coding, k, size, mask
    turned = turn(mask, mask.numel // rows)
    part, times = _sample(turned)
    found, _ = packed_size(codes.varint_encode(part), level, times, size)
    return (COLUMNS, 0, found, turned) if found < size else (coding, k, size, mask)


def _bitmap(mask: Pack) -> memoryview:
    return mask.words.numpy().view(np.uint8)[: -(-mask.numel // 8)].data


def write_sets(sets: list[Set], entropy: str, level: int = 1) -> list[Buffer]:
    """Return the sections (bitmaps, Rice codes, varints) that hold the sets."""
    parts: dict[int, list[Buffer]] = {BITMAP: [], RICE: [], VARINT: []}
    for coding, k, mask in sets:
        if coding == BITMAP:
            parts[coding].append(_bitmap(mask))
        elif coding == RICE:
            parts[coding].append(codes.rice_encode(mask, k))
        elif coding in (VARINT, COLUMNS):
            parts[VARINT].append(codes.varint_encode(mask))
    out: list[Buffer] = []
    for coding, part in parts.items():
        if part:  # a tensor's bitmap is unlike the next one's; Rice codes have nothing left to pack
            packing = "none" if coding == RICE else entropy
            out += section(part, packing, level, apart=coding != RICE)
    return out


def read_sets(reader: Reader, wanted: list[tuple[int, int, int, int]]) -> list[Pack]:
    """Read sets of hostile origin.

    Args:
        reader: stands at the first index section.
        wanted: per set (coding without RANKS, Rice parameter, numel from schema or mask, kept <= numel).

    Returns:
        One Pack a set, in order, turned under COLUMNS.
    """
    if not wanted:
        return []
    masks: list[Pack] = [ops.pack(torch.ones(0, dtype=torch.bool))] * len(wanted)
    for coding in (BITMAP, RICE, VARINT):
        mine = [(i, *w[1:]) for i, w in enumerate(wanted) if w[0] == coding or (w[0], coding) == (COLUMNS, VARINT)]
        if not mine:
            continue
        sizes = [-(-numel // 8) for _, _, numel, _ in mine]
        bounds = [(n, n) for n in sizes] if coding == BITMAP else [(0, 8 * kept) for _, _, _, kept in mine]
        parts = read_section(reader, bounds)
        streams = [Reader(part, f"{NAMES[coding]} index") for part in parts]
        for j, (i, k, numel, count) in enumerate(mine):
            stream = streams[j if len(streams) > 1 else 0]
            if coding == BITMAP:
                masks[i] = _read_bitmap(stream, numel, count)
            else:
                masks[i] = _read_code(stream, coding, numel, count, k)
        for stream in streams:
            stream.finish()
    for i, (coding, _, numel, _) in enumerate(wanted):
        if coding == WHOLE:
            masks[i] = ops.pack(torch.ones(numel, dtype=torch.bool))
    return masks


def _read_bitmap(stream: Reader, numel: int, kept: int) -> Pack:
    raw = np.frombuffer(stream.take(-(-numel // 8)), np.uint8)
    if numel % 8 and raw[-1] >> numel % 8:
        raise DecodeError("a bitmap has bits past its end; the frame is damaged")
    words = np.zeros(-(-numel // 64) * 8, np.uint8)
    words[: len(raw)] = raw
    mask = ops.pack_words(torch.from_numpy(words.view(np.int64)), numel)
    if mask.kept != kept:
        raise DecodeError(f"a bitmap has {mask.kept} entries, the frame says {kept}; the frame is damaged")
    return mask


def _read_code(stream: Reader, coding: int, numel: int, kept: int, k: int) -> Pack:
    rest = stream.rest()
    try:
        if coding == RICE:
            mask, used = codes.rice_decode(rest, numel, kept, k)
        else:
            mask, used = codes.varint_decode(rest, numel, kept)
    except ValueError as error:
        raise DecodeError(f"{error}; the frame is damaged") from error
    stream.take(used)
    return mask
