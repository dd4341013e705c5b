"""Entropy coding of byte streams: static rANS in lanes, each byte's table chosen by what is known before it; Huffman.

The coded part is specified in docs/wire_format.md.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from autoflip.ops import backend, memory
from autoflip.ops import reference_entropy as reference
from autoflip.ops.delta import Array, cpp

__all__ = [
    "MAGNITUDE",
    "PLAIN",
    "SAMPLE",
    "SIGNED",
    "decode",
    "encode",
    "encode_below",
    "literals",
    "read_literals",
]

# the order in which classes cut bytes: as int8, without the sign of a float's top byte, as they are
SIGNED, MAGNITUDE, PLAIN = range(3)
SAMPLE = 1 << 16  # bytes that an estimate counts, of more as many
_ANY = (1 << 63) - 1
Bytes = bytes | memoryview | Array
_ERRORS = {
    -1: "ends early",
    -2: "has a table that is none",
    -3: "has a tail",
    -4: "does not end where it began",
}


def encode(raw: Bytes, key: int, companion: Bytes | None = None) -> memoryview:
    """Code bytes; needs the extension.

    Args:
        raw: at least one byte.
        key: SIGNED, MAGNITUDE or PLAIN: the order of what is known, which classes cut.
        companion: as many bytes, which the reader knows; None = the byte before is what is known.
    """
    coded = encode_below(raw, key, _ANY, companion)[1]
    assert coded is not None
    return coded


def encode_below(
    raw: Bytes, key: int, limit: int, companion: Bytes | None = None
) -> tuple[int | None, memoryview | None]:
    """Return how many bytes :func:`encode` needs, and its bytes where a sample tells of fewer than ``limit``.

    Where it does not, the first is what the sample tells, the second None. Both are None where the extension does not
    serve, and for no bytes.
    """
    ext, n = _coder(), _length(raw)
    if ext is None or not n:
        return None, None
    at, known = ext.address(raw), _address(ext, companion, n)
    if not limit:
        return -ext.ans_encode(at, n, known, key, 0, 0), None
    out = np.empty(ext.ans_bound(n), np.uint8)
    start = ext.ans_encode(at, n, known, key, limit, ext.address(out))
    return (-start, None) if start < 0 else (len(out) - start, out[start:].data)


def literals(raw: Bytes, limit: int) -> tuple[int | None, memoryview | None]:
    """Return the bytes of a zstd frame that codes ``raw`` by Huffman tables alone, and that frame.

    It is what zstd writes where nothing repeats, at several times its speed, and on every thread that torch may use,
    with the same bytes for any number of them. The frame is None where it would take ``limit`` bytes or more; both are
    None where the extension does not serve, and for fewer than 4 kB.

    Source: RFC 8878; length-limited codes by Larmore and Hirschberg, JACM 37(3), 1990.
    """
    ext, n = _coder(), _length(raw)
    if ext is None or n < ext.HUFFMAN_LEAST:
        return None, None
    at, threads = ext.address(raw), torch.get_num_threads()
    if not limit:
        return -ext.huffman_encode(at, n, 0, threads, 0), None
    out = memory.empty_bytes(ext.huffman_bound(n))
    size = ext.huffman_encode(at, n, limit, threads, ext.address(out))
    return (-size, None) if size < 0 else (size, out[:size].data)


def read_literals(data: Bytes, n: int) -> Array | None:
    """Return the ``n`` bytes of a frame of :func:`literals`, read by the threads that torch may use.

    ``data`` may be of hostile origin. None for any other bytes, of which zstd may know more. 1 MB of int8 codes takes
    0.55 ms, two blocks at a time, zstd 0.75, and two threads half as long (Zen 4).
    """
    if n < 1 << 12 or (ext := cpp()) is None:
        return None
    out, threads = memory.empty_bytes(n), torch.get_num_threads()
    return out if ext.huffman_decode(ext.address(data), _length(data), n, threads, ext.address(out)) else None


def decode(data: Bytes, n: int, companion: Bytes | None = None) -> Array:
    """Decode ``n`` bytes of hostile origin.

    Raises:
        ValueError: the bytes are no coded part of ``n`` bytes.
    """
    if ext := cpp():
        out = np.empty(n, np.uint8)
        size = _length(data)
        wrong = ext.ans_decode(ext.address(data), size, _address(ext, companion, n), n, ext.address(out))
    else:
        part = np.frombuffer(data, np.uint8)
        held = None if companion is None else np.frombuffer(companion, np.uint8)
        out, wrong = reference.decode(part, n, held)
    if wrong:
        raise ValueError(f"an entropy-coded part {_ERRORS[wrong]}")
    return out


def _coder() -> ModuleType | None:
    """Return the extension, whatever backend is wished for: there is no other coder, and frames are to be the same."""
    return backend.extension("_C")[0]


def _length(held: Any) -> int:
    return memoryview(held).nbytes


def _address(ext: ModuleType, companion: Bytes | None, n: int) -> int:
    """Return where the companion lies, which its holder keeps there."""
    if companion is None:
        return 0
    assert _length(companion) == n
    return int(ext.address(companion))
