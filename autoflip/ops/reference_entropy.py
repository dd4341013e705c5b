"""The entropy stage's decoder in numpy: what the extension is tested against, and what serves without it."""

from __future__ import annotations

import numpy as np

from autoflip.ops.delta import Array

__all__ = ["decode"]

_BITS, _LEVELS, _LONG = 12, 48, 1 << 15
_SHORT, _TABLE, _TAIL, _STATE = -1, -2, -3, -4


class _Bits:
    def __init__(self, data: Array) -> None:
        self.bits = np.unpackbits(data, bitorder="little").tolist()
        self.at = 0

    def number(self, count: int) -> int:
        if self.at + count > len(self.bits):
            raise EOFError
        self.at += count
        return sum(bit << i for i, bit in enumerate(self.bits[self.at - count : self.at]))

    def ones(self) -> int:
        count = 0
        while self.number(1):
            count += 1
        return count


def _levels(bits: _Bits, flip: int) -> Array | None:
    levels, k, last, i = np.zeros(256, np.int64), bits.number(2), _LEVELS, 0
    while i < 256:
        high = bits.ones()
        if high > 2 * _LEVELS:
            return None
        z = high << k | bits.number(k)
        if z:
            last += z // 2 if z % 2 else -(z // 2)
            if not 1 <= last <= _LEVELS:
                return None
            levels[i ^ flip] = last
            i += 1
            continue
        width = bits.ones()
        if width > 8:
            return None
        i += 1 << width | bits.number(width)
        if i > 256:
            return None
    return levels if levels.any() else None


def _starts(levels: Array) -> Array:
    weights = np.where(levels > 0, np.array([16, 19, 23, 27])[(levels - 1) & 3] << (np.maximum(levels, 1) - 1 >> 2), 0)
    before, seen = np.append(0, np.cumsum(weights)), np.append(0, np.cumsum(levels > 0))
    starts: Array = before * ((1 << _BITS) - seen[-1]) // before[-1] + seen
    return starts


def decode(data: Array, n: int, companion: Array | None) -> tuple[Array, int]:
    """Return ``n`` bytes and 0, or anything and the extension's number of what is wrong."""
    out = np.empty(n, np.uint8)
    if not len(data):
        return out, _SHORT
    key, classes = int(data[0]) >> 4, int(data[0] & 15) + 1
    key, lanes = (key - 3, 1) if key > 2 else (key, 8 if n < _LONG else 32)
    rows, tail = divmod(n, lanes)
    if key > 2:
        return out, _TABLE
    if len(data) < classes + tail:
        return out, _SHORT
    cuts = data[1:classes].astype(np.int64)
    if (np.diff(cuts, prepend=0) <= 0).any():
        return out, _TABLE
    end = len(data) - tail
    bits = _Bits(data[classes : min(end, classes + (1 << 14))])
    symbols, freqs, ats = (np.empty((classes, 1 << _BITS), np.int64) for _ in range(3))
    try:
        for c in range(classes):
            levels = _levels(bits, 0x80 if key == 0 else 0)
            if levels is None:
                return out, _TABLE
            starts = _starts(levels)
            symbols[c] = np.repeat(np.arange(256), np.diff(starts))
            freqs[c] = np.diff(starts)[symbols[c]]
            ats[c] = np.arange(1 << _BITS) - starts[symbols[c]]
        if bits.number(-bits.at % 8):
            return out, _TABLE
    except EOFError:
        return out, _SHORT
    at = classes + bits.at // 8
    if end - at < 4 * lanes:
        return out, _SHORT
    x = np.frombuffer(data[at : at + 4 * lanes].tobytes(), "<u4").astype(np.int64)
    if (x < 1 << 16).any():
        return out, _STATE
    at += 4 * lanes
    known = np.arange(256) ^ 0x80 if key == 0 else np.arange(256) << 1 & 255 if key == 1 else np.arange(256)
    of = np.searchsorted(cuts, known, side="right")
    body, table = out[: rows * lanes].reshape(lanes, rows), np.full(lanes, of[0])
    beside = None if companion is None else companion[: rows * lanes].reshape(lanes, rows)
    for r in range(rows):
        if beside is not None:
            table = of[beside[:, r]]
        slot = x & (1 << _BITS) - 1
        body[:, r] = symbols[table, slot]
        x = freqs[table, slot] * (x >> _BITS) + ats[table, slot]
        low = x < 1 << 16
        wanted = int(low.sum())
        if end - at < 2 * wanted:
            return out, _SHORT
        x[low] = x[low] << 16 | np.frombuffer(data[at : at + 2 * wanted].tobytes(), "<u2")
        at += 2 * wanted
        table = of[body[:, r]]
    if (x != 1 << 16).any():
        return out, _STATE
    if at != end:
        return out, _TAIL
    out[n - tail :] = data[end:]
    return out, 0
