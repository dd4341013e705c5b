"""Entropy coding of byte streams: static rANS in lanes, each byte's table chosen by what is known before it.

The coded part is specified in docs/wire_format.md.
"""

from __future__ import annotations

import numpy as np

from autoflip.ops import reference_entropy as reference
from autoflip.ops.delta import Array, cpp

__all__ = ["MAGNITUDE", "PLAIN", "SIGNED", "decode", "encode", "estimate"]

# the order in which classes cut bytes: as int8, without the sign of a float's top byte, as they are
SIGNED, MAGNITUDE, PLAIN = range(3)
Bytes = bytes | memoryview | Array
_ERRORS = {
    -1: "ends early",
    -2: "has a table that is none",
    -3: "has a tail",
    -4: "does not end where it began",
}


def estimate(raw: Bytes, key: int, companion: Bytes | None = None) -> int | None:
    """Return about how many bytes :func:`encode` needs, from a sample; None where the extension does not serve."""
    ext, data = cpp(), np.frombuffer(raw, np.uint8)
    if ext is None or not len(data):
        return None
    known, _keep = _address(companion, len(data))
    return int(ext.ans_estimate(data.ctypes.data, len(data), known, key))


def encode(raw: Bytes, key: int, companion: Bytes | None = None) -> memoryview:
    """Code bytes; needs the extension.

    Args:
        raw: at least one byte.
        key: SIGNED, MAGNITUDE or PLAIN: the order of what is known, which classes cut.
        companion: as many bytes, which the reader knows; None = the byte before is what is known.
    """
    ext, data = cpp(), np.frombuffer(raw, np.uint8)
    assert ext is not None
    assert len(data)
    known, _keep = _address(companion, len(data))
    out = np.empty(ext.ans_bound(len(data)), np.uint8)
    start = ext.ans_encode(data.ctypes.data, len(data), known, key, out.ctypes.data)
    return out[start:].data


def decode(data: Bytes, n: int, companion: Bytes | None = None) -> Array:
    """Decode ``n`` bytes of hostile origin.

    Raises:
        ValueError: the bytes are no coded part of ``n`` bytes.
    """
    part = np.frombuffer(data, np.uint8)
    if ext := cpp():
        known, _keep = _address(companion, n)
        out = np.empty(n, np.uint8)
        wrong = ext.ans_decode(part.ctypes.data, len(part), known, n, out.ctypes.data)
    else:
        held = None if companion is None else np.frombuffer(companion, np.uint8)
        out, wrong = reference.decode(part, n, held)
    if wrong:
        raise ValueError(f"an entropy-coded part {_ERRORS[wrong]}")
    return out


def _address(companion: Bytes | None, n: int) -> tuple[int, Array | None]:
    """Return where the companion lies, and what keeps it there."""
    if companion is None:
        return 0, None
    held = np.frombuffer(companion, np.uint8)
    assert len(held) == n
    return held.ctypes.data, held
