"""Delta frames: what a client changed, on its way to the server."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from autoflip.codec import arguments, index, layout, selection, values
from autoflip.codec import frame as frames
from autoflip.codec.index import WHOLE
from autoflip.codec.layout import Coding
from autoflip.codec.reader import DecodeError, Reader
from autoflip.codec.schema import DTYPES, NUMPY, Entry, Limits, Schema
from autoflip.codec.selection import Rounding, Selection
from autoflip.codec.values import BF16, FP32, INT, INT4, INT8, Stream
from autoflip.masks import MaskSet
from autoflip.ops import delta_stream
from autoflip.ops.delta import Pack
from autoflip.ops.delta_stream import Coded

__all__ = ["accumulate", "decode", "encode"]

_VALUES = {"fp32": FP32, "bf16": BF16, "int8": INT8, "int4": INT4}


def encode(
    delta: Mapping[str, Tensor],
    *,
    masks: MaskSet | None = None,
    values: str = "bf16",
    rounding: str = "stochastic",
    levels: int | None = None,
    entropy: str = "zstd",
    level: int = 1,
    schema: Schema | None = None,
    seed: int = 0,
    round: int = 0,
    client: int = 0,
    base_id: bytes = b"",
) -> bytes:
    """Code named tensors into one frame: ``decode(encode(delta)) ~ delta``, exactly for ``values="fp32"``.

    A tensor that ``masks`` covers sends its kept entries only: **what lies outside the mask is dropped** and
    decodes to zero. Where many of them are zero (a top-k inside the mask), the others are named by their rank
    in it. A tensor it does not cover travels whole. Without ``masks`` the nonzero entries travel with an explicit
    index. Where the frame names entries, those whose int8 or int4 code is zero do not travel either, if they are
    many. Integer and bool tensors travel whole and exactly, whatever ``values`` says.

    Args:
        delta: name -> tensor of any shape and device; float16, bfloat16, float32, float64 (through float32), bool
            or integer.
        masks: what both sides keep; only its 16-byte fingerprint travels. It may cover more tensors than ``delta`` has.
        values: ``fp32`` (exact), ``bf16``, ``int8`` or ``int4`` (a float32 scale per 256 kept entries). The last
            three round stochastically: the expected decoded value is the value itself, zeros stay zero, the same
            arguments give the same bytes. Under int8 and int4 tensors of fewer than two dimensions travel as bf16:
            a running variance rounded at the scale of its block could turn negative.
        rounding: ``stochastic``, or ``nearest``: half the error of one update, but it does not average out over
            rounds and clients unless what was lost is added to the next update: :class:`Feedback` does both.
        levels: the largest code of int8 (1 to 127) or int4 (1 to 7); None = 127 or 7. Half as many levels
            save a bit of each value and double the step, which is a block's largest magnitude over ``levels``;
            an entry's error is below one step (below half of it under ``nearest``).
        entropy: ``zstd`` packs each section, by zstd, or Huffman codes or rANS of our own, when that saves over
            half a percent (3 % from 768 KiB on); ``none`` keeps the length a function of masks and schema alone, as
            secure aggregation needs it (with ``masks``).
        level: of zstd, 1 (fast) to 22 (small, slow: 19 takes 0.2 s for each megabyte that is sent).
        schema: ``Schema.of(tensors)`` that the reader holds too: only its id travels. None: names and shapes do.
        seed: with ``round``, ``client`` and the tensor's number the key of the random rounding.
        round: round number, 0 to 2^32 - 1; also written into the frame.
        client: number of the client.
        base_id: 16 bytes that name what ``delta`` is relative to, compared by :func:`decode`.

    Returns:
        The frame; its length is what crosses the link.

    Raises:
        ValueError: NaN or infinity in a tensor (named), values too large for ``levels``, a tensor without data, masks
            or schema that do not fit, unknown options.

    Source: fixed rounding and blocks as in QSGD (NeurIPS 2017); the format is docs/wire_format.md.

    Example:
        >>> blob = encode({"w": torch.tensor([[0.0, 1.5], [0.0, 0.0]])}, values="fp32")
        >>> decode(blob)["w"]
        tensor([[0.0000, 1.5000],
                [0.0000, 0.0000]])
    """
    if values not in _VALUES:
        raise ValueError(f"encode: values={values!r}, wanted one of {', '.join(_VALUES)}")
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(f"encode: rounding={rounding!r}, wanted 'stochastic' or 'nearest'")
    _check_levels(levels, _VALUES[values])
    id = frames.check_options("encode", entropy, level, round, base_id)
    seed, client = arguments.whole("encode", "seed", seed), arguments.whole("encode", "client", client)
    arguments.check_tensors("encode", delta)
    arguments.check_schema("encode", schema)
    inline = schema is None
    if schema is None:
        schema = Schema.of(delta)
    else:
        schema.check(delta, "encode")
    layout.check_masks(masks, delta, "encode")
    packs = {} if masks is None else layout.packs_of(masks)

    rows: list[Coding] = []
    sets: list[index.Set] = []
    streams: list[Stream] = []
    for number, entry in enumerate(schema.entries):
        mask, tensor = packs.get(entry.name), delta[entry.name]
        key = None if rounding == "nearest" else _key(seed, round, client, number)
        how = Rounding(_VALUES[values], key, levels)
        where = selection.select(entry, tensor, mask, masks is None, how, entropy, level)
        row, stream = _code(entry, tensor, where, how)
        rows.append(row)
        streams.append(stream)
        if where.named is not None:
            sets.append((row.coding, row.k, where.named))
    body = [
        layout.write_table(rows),
        *index.write_sets(sets, entropy, level),
        *_write_values(streams, entropy, level),
    ]
    mask_id = frames.NO_ID if masks is None else bytes.fromhex(masks.fingerprint())
    flags = 0 if masks is None else frames.MASKED
    return frames.seal(
        frames.DELTA,
        schema,
        body,
        inline=inline,
        entropy=entropy,
        flags=flags,
        round=round,
        base_id=id,
        mask_id=mask_id,
    )


# the keyword ``values`` of encode() hides the module of that name in there
_key, _write_values, _check_levels = values.rounding_key, values.write_values, values.check_levels
_check_scales, _plain_bytes = values.check_scales, values.plain_bytes


def _code(entry: Entry, tensor: Tensor, where: Selection, how: Rounding) -> tuple[Coding, Stream]:
    if entry.kind:
        return Coding(WHOLE, INT, entry.numel), _plain_bytes(tensor)
    x = selection.single(tensor)
    stream, finite = where.coded or delta_stream.code(
        x, where.entries, where.codec, how.key, levels=how.levels_of(where.codec)
    )
    if not finite:
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(
            f"encode: {entry.name!r} has {bad} entries of {entry.numel} that are NaN or infinite (in float32); "
            "training diverged: lower the learning rate, or leave this update out"
        )
    _check_scales(entry.name, stream, how.levels_of(where.codec))
    return Coding(where.coding, where.codec, stream.count, where.k, stream.blocks), stream


def _open(
    blob: bytes, masks: MaskSet | None, schema: Schema | None, limits: Limits, base_id: bytes | None
) -> tuple[Schema, list[Pack | None], list[Stream]]:
    """Check a delta frame to its last byte; return its schema, which entries it holds, and their coded values."""
    frame = frames.open_frame(blob, limits, (frames.DELTA,), schema)
    frames.check_base(frame, base_id)
    assert frame.schema is not None
    reader = Reader(frame.body, "frame")
    rows = layout.read_table(reader, frame, (FP32, BF16, INT8, INT4, INT))
    where = layout.locate(reader, frame, rows, masks)
    streams = values.read_values(reader, layout.wanted(rows, frame.schema))
    reader.finish()
    for stream in streams:
        if isinstance(stream, Coded) and stream.kind == BF16:
            values.check(stream)
    return frame.schema, where, streams


def decode(
    blob: bytes,
    *,
    masks: MaskSet | None = None,
    schema: Schema | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    base_id: bytes | None = None,
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Decode a frame of :func:`encode` from anyone, hostile or not.

    Args:
        blob: the frame.
        masks: the MaskSet that it was encoded under, None if it was encoded without.
        schema: the reader's own schema; needed when the frame carries only an id.
        limits: what the frame may ask for.
        base_id: 16 bytes that the frame must name as its base; None = any.
        out: name -> contiguous float32 CPU tensor for every floating tensor, written over once the whole frame has
            passed every check. Memory that is used again is several times faster than fresh memory. None = fresh.

    Returns:
        name -> CPU tensor of the original shape (those of ``out`` where given), in the frame's order: float32 for
        every floating type that went in (float16 and bfloat16 lose nothing under ``values="fp32"``, float64 keeps
        24 bits), integers as they were.

    Raises:
        DecodeError: whatever is wrong with the frame; the message says what, and what to do.
        ValueError: another argument is of the wrong type.
    """
    arguments.check_reader("decode", masks=masks, schema=schema, limits=limits, base_id=base_id)
    arguments.check_out("decode", out)
    found, where, streams = _open(blob, masks, schema, limits, base_id)
    got: dict[str, Tensor] = {
        entry.name: integers(entry, stream)
        for entry, stream in zip(found.entries, streams, strict=True)
        if not isinstance(stream, Coded)
    }
    places = {entry.name: _place(entry, out) for entry in found.entries if not entry.kind}
    for entry, mask, stream in zip(found.entries, where, streams, strict=True):
        if isinstance(stream, Coded):
            got[entry.name] = delta_stream.decode(stream, mask, places[entry.name]).view(entry.shape)
    return {entry.name: got[entry.name] for entry in found.entries}


def _place(entry: Entry, out: Mapping[str, Tensor] | None) -> Tensor | None:
    if out is None:
        return None
    if entry.name not in out or tuple(out[entry.name].shape) != entry.shape:
        have = tuple(out[entry.name].shape) if entry.name in out else "no tensor"
        raise DecodeError(f"frame holds {entry.name!r} of shape {entry.shape}, out holds {have} of that name")
    return out[entry.name]


def integers(entry: Entry, raw: np.ndarray) -> Tensor:
    """Return the bytes of an integer tensor as that tensor; a bool above 1 is a DecodeError."""
    dtype = DTYPES[entry.kind]
    if dtype is torch.bool and raw.max(initial=0) > 1:
        raise DecodeError(f"{entry.name!r} holds bytes that are no bool; the frame is damaged")
    plain = torch.from_numpy(raw.copy().view(NUMPY[entry.kind]))
    return (plain.to(torch.bool) if dtype is torch.bool else plain).view(entry.shape)


def accumulate(
    blob: bytes,
    sums: MutableMapping[str, Tensor],
    weight: float,
    *,
    masks: MaskSet | None = None,
    schema: Schema | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    base_id: bytes | None = None,
    cap: float | None = None,
) -> None:
    """``sums[name] += weight * decode(blob)[name]`` in place, without making the dense update.

    Nothing is touched before the whole frame has passed every check.

    Args:
        blob: the frame.
        sums: name -> float32 or float64 tensor of the tensor's shape, for every tensor of the frame (integer
            tensors of the frame that ``sums`` does not name are left out).
        weight: finite factor; the product with a value is rounded to float32 before it is added.
        masks: as in :func:`decode`.
        schema: as in :func:`decode`.
        limits: as in :func:`decode`.
        base_id: as in :func:`decode`.
        cap: a frame that moves an entry by more, before the weight, is refused; None = none is.

    Raises:
        DecodeError: whatever is wrong with the frame, or it does not fit ``sums`` or ``cap``.
        ValueError: ``weight`` is not finite, ``cap`` is not above 0, ``sums`` holds other than dense float32 or
            float64, or another argument is of the wrong type.
    """
    arguments.check_reader("accumulate", masks=masks, schema=schema, limits=limits, base_id=base_id)
    arguments.check_sums(sums)
    if not isinstance(weight, (Real, Tensor)) or not math.isfinite(weight):
        raise ValueError(f"accumulate: weight={weight!r}, wanted a finite number")
    if cap is not None and not (isinstance(cap, Real) and cap > 0):
        raise ValueError(f"accumulate: cap={cap!r}, wanted a number above 0, or None for no bound")
    found, where, streams = _open(blob, masks, schema, limits, base_id)
    steps: list[tuple[Entry, Pack | None, Tensor | Coded]] = []
    for entry, mask, stream in zip(found.entries, where, streams, strict=True):
        if entry.name in sums and tuple(sums[entry.name].shape) == entry.shape:
            steps.append((entry, mask, stream if isinstance(stream, Coded) else integers(entry, stream)))
        elif entry.name in sums or not entry.kind:
            have = tuple(sums[entry.name].shape) if entry.name in sums else "no tensor"
            raise DecodeError(f"frame holds {entry.name!r} of shape {entry.shape}, sums holds {have} of that name")
    for entry, _, update in steps:
        if cap is not None and values.exceeds(update, cap):
            raise DecodeError(f"the update moves {entry.name!r} by more than {cap:g}")
    for entry, mask, update in steps:
        total = sums[entry.name]
        if isinstance(update, Tensor):
            total += (weight * update.to(torch.float64)).to(total)
        else:
            delta_stream.accumulate(update, mask, total, weight)
