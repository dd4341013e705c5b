"""How each tensor of a frame travels: index coding, value codec, kept entries; a table of a few bytes each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from weakref import WeakKeyDictionary

from torch import Tensor

from autoflip.codec import arguments, index, values
from autoflip.codec.frame import Frame
from autoflip.codec.index import COLUMNS, RANKS, RICE, SHARED, WHOLE
from autoflip.codec.reader import DecodeError, Reader, varint
from autoflip.codec.schema import Entry, Schema
from autoflip.masks import MaskSet
from autoflip.ops import delta as ops
from autoflip.ops.delta import Pack
from autoflip.ops.delta_coding import BLOCK
from autoflip.ops.delta_stream import LEVELS

__all__ = ["Coding", "check_masks", "locate", "packs_of", "read_table", "wanted", "write_table"]

_WITHOUT_ZEROS = 3  # added to INT8 or INT4 where no code is 0 but for a block's only one
_Held = tuple[dict[str, Pack], dict[str, tuple[int, ...]]]  # masks as bits, and their shapes
_HELD: WeakKeyDictionary[MaskSet, _Held] = WeakKeyDictionary()


@dataclass(frozen=True)
class Coding:
    """One tensor's row of the table.

    Attributes:
        index: WHOLE, SHARED, COLUMNS, or BITMAP, RICE or VARINT with RANKS or not (:mod:`autoflip.codec.index`).
        values: FP32, BF16, INT8, INT4 or INT (:mod:`autoflip.codec.values`).
        kept: entries that travel; -1 when the reader cannot know (whole tensors without a schema).
        k: Rice parameter, 0 elsewhere.
        blocks: scales of INT8 or INT4 codes without zeros, 0 elsewhere: there is one per 256 codes.
    """

    index: int
    values: int
    kept: int
    k: int = 0
    blocks: int = 0

    @property
    def coding(self) -> int:
        """The index coding, whatever it counts."""
        return self.index & ~RANKS

    @property
    def explicit(self) -> bool:
        """Whether the frame says which entries travel."""
        return self.index not in (WHOLE, SHARED)

    @property
    def masked(self) -> bool:
        """Whether a shared mask has a part in it."""
        return self.index == SHARED or bool(self.index & RANKS)


def _held(masks: MaskSet) -> _Held:
    found = _HELD.get(masks)
    if found is None:  # a look into a MaskSet copies
        copies = dict(masks.items())
        shapes = {name: tuple(mask.shape) for name, mask in copies.items()}
        found = _HELD[masks] = ({name: ops.pack(mask) for name, mask in copies.items()}, shapes)
    return found


def packs_of(masks: MaskSet) -> dict[str, Pack]:
    """Return the masks as bits, made once per MaskSet."""
    return _held(masks)[0]


def check_masks(masks: MaskSet | None, tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError unless ``masks`` is a MaskSet (or None) that fits ``tensors`` and covers no integers.

    It may cover more than them, such as the buffers of a model whose parameters alone travel.
    """
    arguments.check_masks(what, masks)
    if masks is None:
        return
    masks.check(tensors, some=True)
    for name in masks:
        if name in tensors and not tensors[name].dtype.is_floating_point:
            raise ValueError(f"{what}: mask {name!r} covers a {tensors[name].dtype} tensor; integers travel whole")


def write_table(rows: list[Coding]) -> bytes:
    """Per tensor one byte ``index << 4 | values``; then, unless whole, kept as a varint; then k for Rice codes, and
    blocks as a varint for codes without zeros.
    """
    out = bytearray()
    for row in rows:
        out.append(row.index << 4 | (row.values + _WITHOUT_ZEROS if row.blocks else row.values))
        if row.index != WHOLE:
            out += varint(row.kept)
        if row.coding == RICE:
            out.append(row.k)
        if row.blocks:
            out += varint(row.blocks)
    return bytes(out)


def read_table(reader: Reader, frame: Frame, kinds: tuple[int, ...]) -> list[Coding]:
    """Read the table and hold it against the schema as far as there is one; ``kinds`` are the allowed value codecs."""
    # without a schema the header's count is only a bound: each row takes a byte that must be there
    entries = frame.schema.entries if frame.schema is not None else repeat(None, frame.tensors)
    return [_row(reader, entry, kinds) for entry in entries]


def _row(reader: Reader, entry: Entry | None, kinds: tuple[int, ...]) -> Coding:
    byte = reader.take(1)[0]
    coding, codec = byte >> 4, byte & 15
    thinned = codec - _WITHOUT_ZEROS in LEVELS
    if thinned:
        codec -= _WITHOUT_ZEROS
    if coding not in index.NAMES or codec not in kinds:
        raise DecodeError(f"a tensor is coded as {byte:#04x}, which this version does not know; the frame is damaged")
    if entry is not None and (entry.kind != 0) != (codec == values.INT):
        raise DecodeError(
            f"{entry.name!r} travels as {values.NAMES[codec]}, which is not its kind; the frame is damaged"
        )
    if codec == values.INT and coding != WHOLE:
        raise DecodeError("an integer tensor does not travel whole; the frame is damaged")
    if thinned and coding in (WHOLE, SHARED):
        raise DecodeError("a tensor without an index leaves out zeros; the frame is damaged")
    if coding == WHOLE:
        return Coding(coding, codec, -1 if entry is None else entry.numel)
    kept = reader.varint()
    if entry is not None and kept > entry.numel:
        raise DecodeError(f"{entry.name!r} has {entry.numel} entries, the frame says {kept}; the frame is damaged")
    k = reader.take(1)[0] if coding & ~RANKS == RICE else 0
    if k > 31:
        raise DecodeError(f"Rice parameter {k} is over 31; the frame is damaged")
    blocks = reader.varint() if thinned else 0
    if thinned and not max(1, -(-kept // BLOCK)) <= blocks <= kept:
        raise DecodeError(f"{kept} codes of 1 to {BLOCK} a block are in {blocks} blocks; the frame is damaged")
    return Coding(coding, codec, kept, k, blocks)


def locate(reader: Reader, frame: Frame, rows: list[Coding], masks: MaskSet | None) -> list[Pack | None]:
    """Return which entries of each tensor the frame holds, None = all; reads the explicit indices.

    Raises:
        DecodeError: the frame's mask is not the reader's, or an index is malformed.
    """
    schema = frame.schema
    assert isinstance(schema, Schema)
    packs = _shared(frame, schema, masks)
    sets = []
    for row, entry in zip(rows, schema.entries, strict=True):
        if row.masked != (entry.name in packs):
            raise DecodeError(f"{entry.name!r} is coded as {index.NAMES[row.index]}; the frame contradicts its mask")
        held = packs[entry.name].kept if row.masked else entry.numel
        if row.kept > held or row.index == SHARED and row.kept != held:
            raise DecodeError(f"{entry.name!r}: the mask keeps {held}, the frame says {row.kept}")
        if row.blocks > -(-held // BLOCK):
            raise DecodeError(f"{entry.name!r} has {row.blocks} blocks of {held} entries; the frame is damaged")
        if row.index == COLUMNS and not (len(entry.shape) > 1 and entry.numel):
            raise DecodeError(f"{entry.name!r} of shape {entry.shape} is coded by columns; the frame is damaged")
        if row.explicit:
            sets.append((row.coding, row.k, held, row.kept))
    explicit = iter(index.read_sets(reader, sets))
    out: list[Pack | None] = []
    for row, entry in zip(rows, schema.entries, strict=True):
        where = packs.get(entry.name)
        if row.explicit:
            found = next(explicit)
            if row.index == COLUMNS:  # turned back
                found = index.turn(found, entry.shape[0])
            where = found if where is None else ops.within(where, found)
        out.append(where)
    return out


def wanted(rows: list[Coding], schema: Schema) -> list[tuple[int, int, int]]:
    """Return what :func:`values.read_values` is to read of each tensor."""
    return [
        (row.values, entry.dense_bytes if row.values == values.INT else row.kept, row.blocks)
        for row, entry in zip(rows, schema.entries, strict=True)
    ]


def _shared(frame: Frame, schema: Schema, masks: MaskSet | None) -> dict[str, Pack]:
    id = frame.mask_id.hex()
    if not any(frame.mask_id):
        if masks is not None:
            raise DecodeError("frame was encoded without masks; decode it with masks=None, or encode with masks=masks")
        return {}
    if masks is None:
        raise DecodeError(f"frame was encoded under mask {id}; pass masks= with that fingerprint")
    if masks.fingerprint() != id:
        raise DecodeError(
            f"frame was encoded under mask {id}, the reader's mask is {masks.fingerprint()}; "
            "its sender missed a mask update: send it the new mask and ask again"
        )
    by_name = {entry.name: entry for entry in schema.entries}
    for name, shape in _held(masks)[1].items():
        if name in by_name and (by_name[name].shape != shape or by_name[name].kind):
            raise DecodeError(f"mask {name!r} of shape {shape} fits no float tensor of the frame's schema")
    return packs_of(masks)
