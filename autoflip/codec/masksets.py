"""Mask frames: a whole MaskSet, or what changed since another one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from autoflip.codec import arguments, index, layout
from autoflip.codec import frame as frames
from autoflip.codec.reader import DecodeError, Reader, varint
from autoflip.codec.schema import Limits, Schema
from autoflip.masks import MaskSet
from autoflip.ops import delta as ops
from autoflip.ops.delta import Pack

__all__ = ["decode_masks", "encode_masks"]

_UNCOVERED, _EXPLICIT, _CHANGED = 0, 1, 2


@dataclass(frozen=True)
class _Plan:
    """How one tensor's mask travels: its way, and the sets that say so (one, or drops and grows)."""

    way: int
    sets: tuple[index.Set, ...] = ()


def encode_masks(
    masks: MaskSet,
    base: MaskSet | None = None,
    *,
    schema: Schema | None = None,
    entropy: str = "zstd",
    level: int = 1,
    round: int = 0,
) -> bytes:
    """Code a MaskSet, relative to ``base`` where that is smaller.

    A change travels as ranks: dropped entries by their rank among those ``base`` keeps, grown ones by their rank
    among those it does not.

    Args:
        masks: what the reader is to get.
        base: a MaskSet that the reader holds; its fingerprint travels and is compared.
        schema: a Schema that names (at least) the tensors of ``masks``; None: names and shapes travel.
        entropy: ``zstd`` or ``none``.
        level: of zstd, 1 (fast) to 22 (small).
        round: round number, 0 to 2^32 - 1.

    Returns:
        The frame.

    Raises:
        ValueError: a mask does not fit the schema.
    """
    frames.check_options("encode_masks", entropy, level, round, b"")
    if masks is None:
        raise ValueError("encode_masks: masks is None, wanted a MaskSet")
    arguments.check_masks("encode_masks", masks)
    arguments.check_masks("encode_masks", base, "base")
    arguments.check_schema("encode_masks", schema)
    inline = schema is None
    schema = Schema.of(masks) if schema is None else schema
    by_name = {e.name: e for e in schema.entries}
    for name, mask in masks.items():
        if name not in by_name or by_name[name].shape != tuple(mask.shape):
            raise ValueError(
                f"encode_masks: mask {name!r} of shape {tuple(mask.shape)} is not in the schema; "
                "make both from the same model"
            )
    packs, old = layout.packs_of(masks), {} if base is None else layout.packs_of(base)
    plans = [_plan(packs.get(e.name), old.get(e.name), entropy, level) for e in schema.entries]
    table = bytearray()
    for plan in plans:
        table.append(plan.way)
        for coding, k, entries in plan.sets:
            table += bytes((coding,)) + varint(entries.kept) + bytes((k,))
    sections = index.write_sets([s for plan in plans for s in plan.sets], entropy, level)
    return frames.seal(
        frames.MASKS,
        schema,
        [bytes(table), *sections],
        inline=inline,
        entropy=entropy,
        flags=0 if base is None else frames.BASED,
        round=round,
        base_id=frames.NO_ID if base is None else bytes.fromhex(base.fingerprint()),
        mask_id=bytes.fromhex(masks.fingerprint()),
    )


def _plan(new: Pack | None, old: Pack | None, entropy: str, level: int) -> _Plan:
    if new is None:
        return _Plan(_UNCOVERED)
    coding, k, size = index.choose(new, entropy, level)
    explicit = _Plan(_EXPLICIT, ((coding, k, new),))
    if old is None or old.numel != new.numel:
        return explicit
    after, before = ops.bits(new), ops.bits(old)
    change = [ops.pack(~after[before]), ops.pack(after[~before])]  # drops, grows
    chosen = [index.choose(mask, entropy, level) for mask in change]
    if sum(c[2] for c in chosen) + 4 > size:
        return explicit
    return _Plan(_CHANGED, tuple((c[0], c[1], mask) for c, mask in zip(chosen, change, strict=True)))


def decode_masks(
    blob: bytes,
    base: MaskSet | None = None,
    *,
    schema: Schema | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> MaskSet:
    """Decode a frame of :func:`encode_masks`; the result has the fingerprint that the frame names.

    Args:
        blob: the frame.
        base: the MaskSet it is relative to; complete frames ignore it.
        schema: needed when the frame carries only a schema's id.
        limits: as in :func:`decode`.

    Returns:
        The MaskSet.

    Raises:
        DecodeError: whatever is wrong with the frame.
        ValueError: another argument is of the wrong type.
    """
    arguments.check_reader("decode_masks", schema=schema, limits=limits)
    arguments.check_masks("decode_masks", base, "base")
    frame = frames.open_frame(blob, limits, (frames.MASKS,), schema)
    assert frame.schema is not None
    old: dict[str, Pack] = {}
    if frame.flags & frames.BASED:
        if base is None or base.fingerprint() != frame.base_id.hex():
            have = "none" if base is None else base.fingerprint()
            raise DecodeError(
                f"frame is relative to mask {frame.base_id.hex()}, the reader holds {have}; "
                "ask its sender for a complete one (base=None)"
            )
        old = layout.packs_of(base)
    reader = Reader(frame.body, "frame")
    ways: list[int] = []
    wanted: list[tuple[int, int, int, int]] = []
    for entry in frame.schema.entries:
        way = reader.take(1)[0]
        mine = old.get(entry.name)
        if way > _CHANGED or (way == _CHANGED and (mine is None or mine.numel != entry.numel)):
            raise DecodeError(f"mask {entry.name!r} travels in way {way}, which cannot be; the frame is damaged")
        universes = [entry.numel] if way == _EXPLICIT else []
        if way == _CHANGED:
            assert mine is not None
            universes = [mine.kept, mine.numel - mine.kept]
        wanted += [_read_set(reader, numel) for numel in universes]
        ways.append(way)
    sets = iter(index.read_sets(reader, wanted))
    reader.finish()
    masks: dict[str, Tensor] = {}
    for entry, way in zip(frame.schema.entries, ways, strict=True):
        if way == _UNCOVERED:
            continue
        mask = ops.bits(next(sets))
        if way == _CHANGED:
            drops, before = mask, ops.bits(old[entry.name])
            mask = before.clone()
            mask[before] = ~drops
            mask[~before] = ops.bits(next(sets))
        masks[entry.name] = mask.view(entry.shape)
    found = MaskSet(masks)
    if found.fingerprint() != frame.mask_id.hex():
        raise DecodeError(
            f"frame promises mask {frame.mask_id.hex()} but holds {found.fingerprint()}; the frame is damaged"
        )
    return found


def _read_set(reader: Reader, numel: int) -> tuple[int, int, int, int]:
    coding, kept, k = reader.take(1)[0], reader.varint(), reader.take(1)[0]
    known = coding in (index.WHOLE, index.BITMAP, index.RICE, index.VARINT)
    if not known or kept > numel or k > 31 or (coding == index.WHOLE and kept != numel):
        raise DecodeError(f"a set of {kept} in {numel} is coded as {coding}, {k}; the frame is damaged")
    return coding, k, numel, kept
