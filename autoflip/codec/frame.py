"""The outer layer of a frame: header, checksum and inline schema.

Layout: docs/wire_format.md. Order of checks: length, magic and version, checksum, flags and ids, schema,
then whatever the kind of frame holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoflip.codec import arguments
from autoflip.codec import header as headers
from autoflip.codec.header import BASED, INLINE_SCHEMA, MASKED, MASKS, NO_ID, Header
from autoflip.codec.packing import Buffer
from autoflip.codec.reader import DecodeError, Reader
from autoflip.codec.schema import Limits, Schema
from autoflip.codec.section import ENTROPIES, read_section, section

__all__ = [
    "BASED",
    "DELTA",
    "Frame",
    "INLINE_SCHEMA",
    "MASKED",
    "MASKS",
    "NO_ID",
    "PATCH",
    "check_base",
    "check_options",
    "open_frame",
    "seal",
]

DELTA, PATCH = 1, 2
KINDS = {DELTA: "delta", PATCH: "patch", MASKS: "masks"}
_ADD, XOR, _SET, DIFFERENCE = 1, 2, 3, 4


@dataclass(frozen=True)
class Frame(Header):
    """A frame whose header, checksum and schema are in order.

    Attributes:
        schema: the schema, None when only its id travelled and the reader has none.
        body: what follows the header and the schema.
    """

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
    head = Header(
        flags, kind, _ways(kind, flags)[-1], round, len(schema.entries), schema.id, base_id, mask_id, schema.dense_bytes
    )
    return b"".join([headers.write(head, body), *body])


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
    head, body = headers.read(data)
    kind, flags = head.kind, head.flags
    if kind not in KINDS:
        raise DecodeError(f"frame has kind {kind}, which this version does not know")
    if kind not in kinds:
        wanted = " or ".join(KINDS[k] for k in kinds)
        raise DecodeError(f"frame is a {KINDS[kind]} frame, wanted {wanted}; decode it with the function of that name")
    if head.apply not in _ways(kind, flags):
        raise DecodeError(f"a {KINDS[kind]} frame cannot be applied in way {head.apply}; the frame is damaged")
    reader = Reader(body, "frame")
    schema = _schema(reader, limits, flags, head.schema_id, schema)
    if schema is not None:
        if len(schema.entries) != head.tensors or head.dense_bytes not in (None, schema.dense_bytes):
            raise DecodeError("frame's header and schema contradict each other; the frame is damaged")
        if schema.dense_bytes > limits.max_bytes:
            raise DecodeError(f"frame decodes to {schema.dense_bytes} bytes, Limits.max_bytes is {limits.max_bytes}")
    elif need_schema:
        raise DecodeError(
            f"frame carries only the id {head.schema_id.hex()} of its schema; pass schema=codec.Schema.of(tensors), "
            "made from the same tensors as the sender's"
        )
    return Frame(**vars(head), schema=schema, body=reader.rest())


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
