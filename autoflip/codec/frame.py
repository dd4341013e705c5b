"""The outer layer of a frame: header, checksum and inline schema.

Layout: docs/wire_format.md. Order of checks: length, magic and version, checksum, flags and ids, schema,
then whatever the kind of frame holds.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from autoflip.codec import arguments
from autoflip.codec.packing import Buffer, length
from autoflip.codec.reader import DecodeError, Reader
from autoflip.codec.schema import Limits, Schema
from autoflip.codec.section import ENTROPIES, read_section, section
from autoflip.ops.delta_coding import crc32

__all__ = [
    "DELTA",
    "Frame",
    "MASKS",
    "PATCH",
    "check_base",
    "check_options",
    "open_frame",
    "seal",
]

_HEADER = struct.Struct("<4sBBHIBBHII16s16s16sQQII")
assert _HEADER.size == 96
_MAGIC, _MAJOR, _MINOR = b"AFD1", 1, 2
DELTA, PATCH, MASKS = 1, 2, 3
KINDS = {DELTA: "delta", PATCH: "patch", MASKS: "masks"}
_ADD, XOR, _SET, DIFFERENCE = 1, 2, 3, 4
INLINE_SCHEMA, MASKED, BASED = 1, 2, 4
NO_ID = bytes(16)


@dataclass(frozen=True)
class Frame:
    """A frame whose header, checksum and schema are in order.

    Attributes:
        kind: DELTA, PATCH or MASKS.
        flags: INLINE_SCHEMA | MASKED | BASED.
        apply: XOR or DIFFERENCE for patches with a base.
        round: round number, 0 to 2^32 - 1.
        schema_id: names the schema.
        base_id: names what the frame is relative to, zeros = not stated.
        mask_id: fingerprint of the mask, zeros = none.
        tensors: number of tensors in the schema.
        dense_bytes: bytes of the tensors it decodes to.
        schema: the schema, None when only its id travelled and the reader has none.
        body: what follows the header and the schema.
    """

    kind: int
    flags: int
    apply: int
    round: int
    schema_id: bytes
    base_id: bytes
    mask_id: bytes
    tensors: int
    dense_bytes: int
    schema: Schema | None
    body: memoryview


def check_options(what: str, entropy: str, level: int, round: int, base_id: bytes) -> bytes:
    """Return ``base_id`` as 16 bytes; raise ValueError for options that a frame cannot hold."""
    if not 1 <= arguments.whole(what, "level", level) <= 22:
        raise ValueError(f"{what}: level={level}, wanted 1 (fast) to 22 (small), a level of zstd")
    if entropy not in ENTROPIES:
        raise ValueError(f"{what}: entropy={entropy!r}, wanted one of {ENTROPIES}")
    if not 0 <= arguments.whole(what, "round", round) < 1 << 32:
        raise ValueError(f"{what}: round={round}, wanted 0 to 2^32 - 1")
    arguments.check_base_id(what, base_id)
    return bytes(base_id) or NO_ID


def check_base(frame: Frame, base_id: bytes | None) -> None:
    """Raise DecodeError when ``base_id`` is given and the frame names another base."""
    if base_id is not None and frame.base_id != (bytes(base_id) or NO_ID):
        raise DecodeError(
            f"frame is relative to base {frame.base_id.hex()}, the reader holds {bytes(base_id).hex() or 'none'}; "
            "its sender missed a broadcast: send it a complete one"
        )


def seal(
    kind: int,
    schema: Schema,
    body: list[Buffer],
    *,
    inline: bool,
    entropy: str,
    flags: int = 0,
    round: int = 0,
    base_id: bytes = NO_ID,
    mask_id: bytes = NO_ID,
) -> bytes:
    """Put header, schema and body together and sign them with a CRC-32."""
    if inline:
        flags |= INLINE_SCHEMA
        body = [*section([schema.to_bytes()], entropy), *body]
    apply = _ways(kind, flags)[-1]
    header = bytearray(_HEADER.pack(
        _MAGIC, _MAJOR, _MINOR, _HEADER.size, flags, kind, apply, 0, round, len(schema.entries),
        schema.id, base_id, mask_id, sum(map(length, body)), schema.dense_bytes, 0, 0,
    ))  # fmt: skip
    crc = crc32(header)
    for part in body:
        crc = crc32(part, crc)
    header[-4:] = struct.pack("<I", crc)
    return b"".join([header, *body])


def _ways(kind: int, flags: int) -> tuple[int, ...]:
    """Return the ways in which such a frame may be applied; the last one is written today."""
    return (_ADD,) if kind == DELTA else (XOR, DIFFERENCE) if kind == PATCH and flags & BASED else (_SET,)


def open_frame(
    blob: bytes, limits: Limits, kinds: tuple[int, ...], schema: Schema | None, *, need_schema: bool = True
) -> Frame:
    """Check everything that is common to all frames.

    Raises:
        DecodeError: the bytes are no frame of one of ``kinds``, damaged, over ``limits``, or of another schema.
    """
    if not isinstance(blob, (bytes, bytearray, memoryview)):
        raise DecodeError(f"blob is a {type(blob).__name__}, wanted bytes")
    data = memoryview(blob)
    if data.nbytes > limits.max_bytes:
        raise DecodeError(
            f"frame has {data.nbytes} bytes, Limits.max_bytes is {limits.max_bytes}; raise it if you trust"
        )
    # a view with gaps (or of nothing) has no bytes in a row to look at
    data = data.cast("B") if data.c_contiguous and data.nbytes else memoryview(data.tobytes())
    if len(data) < _HEADER.size:
        raise DecodeError(f"frame has {len(data)} bytes, a header alone has {_HEADER.size}; it is cut short")
    (magic, major, _, header_bytes, flags, kind, apply, spare, round, tensors, schema_id, base_id, mask_id,
     body_bytes, dense_bytes, spare2, crc) = _HEADER.unpack(data[: _HEADER.size])  # fmt: skip
    if magic != _MAGIC:
        raise DecodeError(f"frame starts with {magic!r}, wanted {_MAGIC!r}; these are not bytes of autoflip.codec")
    if major != _MAJOR:
        raise DecodeError(f"frame is of format version {major}, this autoflip reads {_MAJOR}; update the older side")
    if header_bytes != _HEADER.size or body_bytes != len(data) - _HEADER.size:
        raise DecodeError(
            f"frame says {body_bytes} bytes follow a header of {header_bytes}, but {len(data) - _HEADER.size} follow "
            f"one of {_HEADER.size}; it is cut short or has a tail"
        )
    if crc32(data[_HEADER.size :], crc32(bytes(4), crc32(data[: _HEADER.size - 4]))) != crc:
        raise DecodeError("frame fails its CRC-32; it was damaged on the way, ask for it again")
    if kind not in KINDS or spare or spare2 or flags & ~(INLINE_SCHEMA | MASKED | BASED):
        raise DecodeError(f"frame has kind {kind}, flags {flags:#x}, which this version does not know")
    if kind not in kinds:
        wanted = " or ".join(KINDS[k] for k in kinds)
        raise DecodeError(f"frame is a {KINDS[kind]} frame, wanted {wanted}; decode it with the function of that name")
    if apply not in _ways(kind, flags):
        raise DecodeError(f"a {KINDS[kind]} frame cannot be applied in way {apply}; the frame is damaged")
    if bool(flags & MASKED or kind == MASKS) != (mask_id != NO_ID):
        raise DecodeError("frame's mask id and flags contradict each other; the frame is damaged")
    reader = Reader(data[_HEADER.size :], "frame")
    schema = _schema(reader, limits, flags, schema_id, schema)
    if schema is not None:
        if len(schema.entries) != tensors or schema.dense_bytes != dense_bytes:
            raise DecodeError("frame's header and schema contradict each other; the frame is damaged")
        if dense_bytes > limits.max_bytes:
            raise DecodeError(f"frame decodes to {dense_bytes} bytes, Limits.max_bytes is {limits.max_bytes}")
    elif need_schema:
        raise DecodeError(
            f"frame carries only the id {schema_id.hex()} of its schema; pass schema=codec.Schema.of(tensors), made "
            "from the same tensors as the sender's"
        )
    return Frame(kind, flags, apply, round, schema_id, base_id, mask_id, tensors, dense_bytes, schema, reader.rest())


def _schema(reader: Reader, limits: Limits, flags: int, schema_id: bytes, local: Schema | None) -> Schema | None:
    if flags & INLINE_SCHEMA:
        sent = Schema.parse(read_section(reader, [(0, limits.max_schema_bytes)])[0], limits)
        if sent.id != schema_id:
            raise DecodeError("frame's schema does not have the id in its header; the frame is damaged")
    if local is not None and local.id != schema_id:
        raise DecodeError(
            f"frame is of schema {schema_id.hex()}, the reader's is {local.id.hex()}: names, shapes, kinds or their "
            "order differ. Do both sides hold the same model?"
        )
    return local if local is not None or not flags & INLINE_SCHEMA else sent
