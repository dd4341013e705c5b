"""Which entries travel, told explicitly: bitmap, Rice code or varint gaps, whichever is smallest by exact size."""

from __future__ import annotations

import math

import numpy as np
import torch

from autoflip.codec.frame import read_section, section
from autoflip.codec.reader import DecodeError, Reader
from autoflip.ops import delta as ops
from autoflip.ops import delta_coding as codes
from autoflip.ops.delta import Pack

__all__ = ["BITMAP", "NAMES", "RICE", "VARINT", "WHOLE", "Set", "choose", "read_sets", "write_sets"]

WHOLE, BITMAP, RICE, VARINT = 0, 2, 3, 4  # 1 is "shared mask": it has no index
NAMES = {WHOLE: "whole", 1: "shared mask", BITMAP: "bitmap", RICE: "rice", VARINT: "varint"}
_MAX_K = 31

Set = tuple[int, int, Pack]  # (coding, Rice parameter, entries)


def _rice_parameter(mask: Pack) -> tuple[int, int]:
    """Return (k, bits) of the shortest Rice code, by exact count around the geometric guess."""
    guess = int(math.log2(max(1.0, 0.69 * mask.numel / max(1, mask.kept))))
    tried = {k: codes.rice_bits(mask, k) for k in range(max(0, guess - 1), min(_MAX_K, guess + 1) + 1)}
    best = min(tried, key=lambda k: tried[k])
    return best, tried[best]


def choose(mask: Pack) -> tuple[int, int, int]:
    """Return (coding, Rice parameter, bytes) of the smallest plain coding of a set."""
    if mask.whole:
        return WHOLE, 0, 0
    bitmap = -(-mask.numel // 8)
    # a code has at least one bit, a gap of two or more at least two: above half density no Rice code wins
    if mask.numel >= 1 << 32 or 2 * mask.kept > mask.numel:
        return BITMAP, 0, bitmap
    k, bits = _rice_parameter(mask)
    rice = -(-bits // 8)
    return (RICE, k, rice) if rice < bitmap else (BITMAP, 0, bitmap)


def write_sets(sets: list[Set], entropy: str) -> tuple[list[Set], list[bytes]]:
    """Return the sets with their final codings, and the sections (bitmaps, Rice codes, varints) that hold them."""
    plain = _sections(sets, entropy)
    if entropy == "none" or not any(coding for coding, _, _ in sets):
        return sets, plain
    candidates = [(sets, plain)]
    coded = [mask for coding, _, mask in sets if coding]
    kept, numel = sum(m.kept for m in coded), sum(m.numel for m in coded)
    others = [BITMAP]
    if 4 * kept <= numel:  # a varint has a byte or more: at higher density packing it is work for nothing
        others.append(VARINT)
    for other in others:
        again = [(other if coding else coding, 0, mask) for coding, _, mask in sets]
        candidates.append((again, _sections(again, entropy)))
    return min(candidates, key=lambda candidate: sum(map(len, candidate[1])))


def _sections(sets: list[Set], entropy: str) -> list[bytes]:
    parts: dict[int, list[bytes]] = {BITMAP: [], RICE: [], VARINT: []}
    for coding, k, mask in sets:
        if coding == BITMAP:
            parts[coding].append(mask.words.numpy().view(np.uint8)[: -(-mask.numel // 8)].tobytes())
        elif coding == RICE:
            parts[coding].append(codes.rice_encode(mask, k))
        elif coding == VARINT:
            parts[coding].append(codes.varint_encode(mask))
    return [section(b"".join(part), entropy) for part in parts.values() if part]


def read_sets(reader: Reader, wanted: list[tuple[int, int, int, int]]) -> list[Pack]:
    """Read sets of hostile origin.

    Args:
        reader: stands at the first index section.
        wanted: per set (coding, Rice parameter, numel from the schema, kept <= numel).

    Returns:
        One Pack a set, in order.
    """
    masks: list[Pack] = [ops.pack(torch.ones(0, dtype=torch.bool))] * len(wanted)
    for coding in (BITMAP, RICE, VARINT):
        mine = [(i, *w[1:]) for i, w in enumerate(wanted) if w[0] == coding]
        if not mine:
            continue
        kept = sum(w[3] for w in mine)
        exact = sum(-(-w[2] // 8) for w in mine)
        least, most = (exact, exact) if coding == BITMAP else (0, 8 * kept)
        stream = Reader(read_section(reader, least, most), f"{NAMES[coding]} index")
        for i, k, numel, count in mine:
            if coding == BITMAP:
                masks[i] = _read_bitmap(stream, numel, count)
            else:
                masks[i] = _read_code(stream, coding, numel, count, k)
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
