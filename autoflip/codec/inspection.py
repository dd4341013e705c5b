"""What a frame holds, without decoding it."""

from __future__ import annotations

from typing import Any

from autoflip.codec import arguments, index, layout, values
from autoflip.codec import frame as frames
from autoflip.codec.reader import DecodeError, Reader
from autoflip.codec.schema import NUMPY, Limits, Schema

__all__ = ["inspect"]

_STAGES = ("none", "zstd", "parts apart", "lanes", "lanes by tensor")


def inspect(
    blob: bytes,
    *,
    schema: Schema | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Describe a frame: checks header, checksum, schema and table, unpacks and allocates no tensor.

    Args:
        blob: a frame of any kind.
        schema: gives names and shapes when the frame carries only a schema's id.
        limits: as in :func:`decode`.

    Returns:
        A dict fit for JSON: ``kind``, ``round``, ``bytes`` (of the frame), ``dense_bytes``, ``schema_id``,
        ``mask_id``, ``base_id`` (32 hex digits or None), ``complete`` (no base needed), ``sections`` (stored
        bytes and entropy stage of each) and, except for mask frames, ``tensors``: per tensor ``name``, ``shape``,
        ``coding`` (whole, shared mask, bitmap, rice,
        varint; "ranks, ..." inside a shared mask), ``values``, ``kept``, ``blocks`` (scales of int8 and int4 codes
        of which those that are 0 were left out; else 0: there is a scale per 256 codes) and ``bytes`` of its values
        before the entropy stage. None stands for what cannot be known without the schema.

    Raises:
        DecodeError: the bytes are no frame.
        ValueError: another argument is of the wrong type.
    """
    arguments.check_reader("inspect", schema=schema, limits=limits)
    frame = frames.open_frame(blob, limits, tuple(frames.KINDS), schema, need_schema=False)
    out: dict[str, Any] = {
        "kind": frames.KINDS[frame.kind],
        "round": frame.round,
        "bytes": memoryview(blob).nbytes,
        "dense_bytes": frame.dense_bytes if frame.schema is None else frame.schema.dense_bytes,
        "schema_id": frame.schema_id.hex(),
        "mask_id": frame.mask_id.hex() if any(frame.mask_id) else None,
        "base_id": frame.base_id.hex() if any(frame.base_id) else None,
        "complete": not frame.flags & frames.BASED,
        "entries": None if frame.schema is None else sum(e.numel for e in frame.schema.entries),
    }
    if frame.kind == frames.MASKS:
        return out
    reader = Reader(frame.body, "frame")
    rows = layout.read_table(reader, frame, tuple(range(len(values.NAMES))))
    out["tensors"] = []
    for i, row in enumerate(rows):
        entry = None if frame.schema is None else frame.schema.entries[i]
        count = row.kept * (NUMPY[entry.kind].itemsize if entry is not None and entry.kind else 1)
        known = row.kept >= 0
        out["tensors"].append({
            "name": None if entry is None else entry.name,
            "shape": None if entry is None else list(entry.shape),
            "coding": index.NAMES[row.index],
            "values": values.NAMES[row.values],
            "kept": row.kept if known else None,
            "blocks": row.blocks,
            "bytes": values.value_bytes(row.values, count, row.blocks) if known else None,
        })  # fmt: skip
    out["sections"] = []
    while reader.left:
        entropy, size = reader.take(1)[0], reader.varint()
        reader.take(size)
        if entropy >= len(_STAGES):
            raise DecodeError(f"a section has entropy stage {entropy}, which this version does not know")
        out["sections"].append({"bytes": size, "entropy": _STAGES[entropy]})
    return out
