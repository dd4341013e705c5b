"""The header of a frame: of version 2 as it is written, of version 1 as it is still read (docs/wire_format.md)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from autoflip.codec.reader import DecodeError, Reader, varint
from autoflip.ops.delta_coding import crc32

__all__ = ["BASED", "INLINE_SCHEMA", "MASKED", "MASKS", "NO_ID", "Header", "read", "write"]

_MAGIC, _MAJOR, _MINOR = b"AFD1", 2, 2
_FIRST = struct.Struct("<4sBBHIBBHII16s16s16sQQII")  # version 1
_START = struct.Struct("<4sBBBBI16s")  # version 2, before what is there only where it tells something
_FIRST_CRC, _CRC = _FIRST.size - 4, 8
_LEAST = _START.size + 2
INLINE_SCHEMA, MASKED, BASED, _BASE_NAMED = 1, 2, 4, 8
MASKS = 3  # the kind of frame that has a mask id whatever its flags
NO_ID = bytes(16)


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes:
        flags: INLINE_SCHEMA | MASKED | BASED.
        kind: of the frame.
        apply: what the reader is to do with its values.
        round: round number.
        tensors: number of tensors in the schema.
        schema_id: names the schema.
        base_id: names what the frame is relative to, zeros = not stated.
        mask_id: fingerprint of the mask, zeros = none.
        dense_bytes: bytes of the tensors it decodes to; None where the header does not say (version 2).
    """

    flags: int
    kind: int
    apply: int
    round: int
    tensors: int
    schema_id: bytes
    base_id: bytes
    mask_id: bytes
    dense_bytes: int | None


def write(head: Header, body: list[bytes | memoryview]) -> bytes:
    """Return the header of a frame of that body, checksum included."""
    flags = head.flags | (_BASE_NAMED if head.base_id != NO_ID else 0)
    start = (_MAGIC, _MAJOR, _MINOR, flags, head.kind << 4 | head.apply, 0, head.schema_id)
    out = bytearray(_START.pack(*start))
    out += head.base_id if flags & _BASE_NAMED else b""
    out += head.mask_id if _has_mask(flags, head.kind) else b""
    out += varint(head.round) + varint(head.tensors)
    crc = crc32(out)
    for part in body:
        crc = crc32(part, crc)
    struct.pack_into("<I", out, _CRC, crc)
    return bytes(out)


def _has_mask(flags: int, kind: int) -> bool:
    return bool(flags & MASKED) or kind == MASKS


def read(data: memoryview) -> tuple[Header, memoryview]:
    """Return header and body of a frame whose checksum is right.

    Raises:
        DecodeError: the bytes are no frame, damaged, or of a version that is not known.
    """
    if len(data) < _LEAST:
        raise DecodeError(f"frame has {len(data)} bytes, a header alone has {_LEAST}; it is cut short")
    if data[:4] != _MAGIC:
        raise DecodeError(
            f"frame starts with {bytes(data[:4])!r}, wanted {_MAGIC!r}; these are not bytes of autoflip.codec"
        )
    if data[4] not in (1, _MAJOR):
        raise DecodeError(
            f"frame is of format version {data[4]}, this autoflip reads 1 and {_MAJOR}; update the older side"
        )
    head, body = _read_first(data) if data[4] == 1 else _read(data)
    if head.flags & ~(INLINE_SCHEMA | MASKED | BASED):
        raise DecodeError(f"frame has flags {head.flags:#x}, which this version does not know")
    if _has_mask(head.flags, head.kind) != (head.mask_id != NO_ID):
        raise DecodeError("frame's mask id and flags contradict each other; the frame is damaged")
    return head, body


def _check(data: memoryview, at: int, crc: int) -> None:
    if crc32(data[at + 4 :], crc32(bytes(4), crc32(data[:at]))) != crc:
        raise DecodeError("frame fails its CRC-32; it was damaged or cut short on the way, ask for it again")


def _read(data: memoryview) -> tuple[Header, memoryview]:
    _, _, _, flags, way, crc, schema_id = _START.unpack(data[: _START.size])
    _check(data, _CRC, crc)
    reader, kind = Reader(data[_START.size :], "frame"), way >> 4
    base_id = bytes(reader.take(16)) if flags & _BASE_NAMED else NO_ID
    if flags & _BASE_NAMED and base_id == NO_ID:
        raise DecodeError("frame names a base of zeros, which stands for none; the frame is damaged")
    mask_id = bytes(reader.take(16)) if _has_mask(flags, kind) else NO_ID
    round, tensors = reader.varint(), reader.varint()
    if max(round, tensors) >= 1 << 32:
        raise DecodeError(f"frame is of round {round}, of {tensors} tensors; the frame is damaged")
    head = Header(flags & ~_BASE_NAMED, kind, way & 15, round, tensors, schema_id, base_id, mask_id, None)
    return head, reader.rest()


def _read_first(data: memoryview) -> tuple[Header, memoryview]:
    if len(data) < _FIRST.size:
        raise DecodeError(f"frame has {len(data)} bytes, a header alone has {_FIRST.size}; it is cut short")
    (_, _, _, size, flags, kind, apply, spare, round, tensors, schema_id, base_id, mask_id, body_bytes, dense_bytes,
     spare2, crc) = _FIRST.unpack(data[: _FIRST.size])  # fmt: skip
    if size != _FIRST.size or body_bytes != len(data) - _FIRST.size:
        raise DecodeError(
            f"frame says {body_bytes} bytes follow a header of {size}, but {len(data) - _FIRST.size} follow "
            f"one of {_FIRST.size}; it is cut short or has a tail"
        )
    _check(data, _FIRST_CRC, crc)
    if spare or spare2:
        raise DecodeError("frame's header holds bytes that this version does not know; the frame is damaged")
    head = Header(flags, kind, apply, round, tensors, schema_id, base_id, mask_id, dense_bytes)
    return head, data[_FIRST.size :]
