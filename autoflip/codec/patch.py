"""Patch frames: the server's new model as bf16, as the difference from what the client already holds; lossless."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from autoflip.codec import arguments, index, layout, values
from autoflip.codec import frame as frames
from autoflip.codec.delta import integers
from autoflip.codec.index import SHARED
from autoflip.codec.layout import Coding
from autoflip.codec.reader import DecodeError, Reader
from autoflip.codec.schema import Entry, Limits, Schema
from autoflip.codec.values import BF16, INT
from autoflip.masks import MaskSet
from autoflip.ops import delta as ops
from autoflip.ops.delta import Pack

__all__ = ["decode_patch", "encode_patch"]


def encode_patch(
    new: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None = None,
    *,
    masks: MaskSet | None = None,
    entropy: str = "zstd",
    level: int = 1,
    schema: Schema | None = None,
    round: int = 0,
    base_id: bytes = b"",
) -> bytes:
    """Code ``bf16(new) - bf16(base)``, as 16-bit words, at the kept entries: the reader gets ``bf16(new)`` bit by bit.

    Equal words cost next to nothing after the entropy stage; close ones differ by a small number. No drift can
    build up: the reader ends with exactly what :func:`decode_patch` returns, and so does a server that calls it.

    Args:
        new: name -> tensor; floats are rounded to the nearest bf16, bool and integers travel exactly.
        base: the tensors that the reader already holds (names and shapes of ``new``), bf16 or what rounds to the
            same bf16 on both sides; None = zeros: a complete frame, which any reader can decode.
        masks: entries outside the mask do not travel and decode to zero; None = everything travels.
        entropy: as in :func:`encode`.
        level: as in :func:`encode`.
        schema: as in :func:`encode`.
        round: as in :func:`encode`.
        base_id: 16 bytes that name ``base``; readers that pass ``base_id`` are held to it.

    Returns:
        The frame.

    Raises:
        ValueError: NaN or infinity (in bf16) in a tensor (named); base, masks or schema that do not fit.

    Source: the idea is PULSE's (arXiv:2602.03839): most bf16 words do not change in a step.
    """
    id = frames.check_options("encode_patch", entropy, level, round, base_id)
    arguments.check_tensors("encode_patch", new)
    arguments.check_schema("encode_patch", schema)
    inline = schema is None
    if schema is None:
        schema = Schema.of(new)
    else:
        schema.check(new, "encode_patch")
    layout.check_masks(masks, new, "encode_patch")
    if base is not None:
        arguments.check_tensors("encode_patch: base", base)
        schema.check({e.name: base[e.name] for e in schema.entries if e.name in base}, "encode_patch: base")
    packs = {} if masks is None else layout.packs_of(masks)
    rows: list[Coding] = []
    streams: list[values.Stream] = []
    for entry in schema.entries:
        mask = packs.get(entry.name)
        words = _words(entry, new[entry.name], mask)
        if not entry.kind and bool(((words & 0x7F80) == 0x7F80).any()):
            raise ValueError(
                f"encode_patch: {entry.name!r} has entries that are NaN or infinite in bf16; do not send it"
            )
        if base is not None:
            words = _difference(words, _words(entry, base[entry.name], mask))
        codec = INT if entry.kind else BF16
        rows.append(Coding(index.WHOLE if mask is None else SHARED, codec, len(words)))
        streams.append(words if entry.kind else values.from_words(words))
    body = [layout.write_table(rows), *values.write_values(streams, entropy, level)]
    mask_id = frames.NO_ID if masks is None else bytes.fromhex(masks.fingerprint())
    flags = (0 if masks is None else frames.MASKED) | (0 if base is None else frames.BASED)
    return frames.seal(
        frames.PATCH,
        schema,
        body,
        inline=inline,
        entropy=entropy,
        flags=flags,
        round=round,
        base_id=id,
        mask_id=mask_id,
    )


def _difference(new: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Return ``new - held`` mod 2^16 with the sign in the lowest bit, bytes XORed: small where words are close."""
    if new.dtype != np.uint16:
        return new ^ held
    step = new - held
    return step << np.uint16(1) ^ np.uint16(0) - (step >> np.uint16(15))


def _sum(words: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Undo :func:`_difference` of words."""
    return held + (words >> np.uint16(1) ^ np.uint16(0) - (words & np.uint16(1)))


def _words(entry: Entry, tensor: Tensor, mask: Pack | None) -> np.ndarray:
    """Return the kept entries as uint16 bf16 words, or the bytes of an integer tensor."""
    if entry.kind:
        return values.plain_bytes(tensor)
    kept, _ = ops.gather(tensor.detach().to(torch.float32), mask)
    return torch.from_numpy(kept).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def decode_patch(
    blob: bytes,
    base: Mapping[str, Tensor] | None = None,
    *,
    masks: MaskSet | None = None,
    schema: Schema | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    base_id: bytes | None = None,
) -> dict[str, Tensor]:
    """Decode a frame of :func:`encode_patch`; ``base`` is not changed.

    Args:
        blob: the frame.
        base: what the sender took as base; complete frames ignore it.
        masks: as in :func:`decode`.
        schema: as in :func:`decode`.
        limits: as in :func:`decode`.
        base_id: 16 bytes that the frame must name as its base; None = any.

    Returns:
        name -> CPU tensor: bfloat16 for floats (zero outside the mask), integers as they were.

    Raises:
        DecodeError: whatever is wrong; a base that differs from the sender's shows only through ``base_id`` or a
            NaN, so do name it.
        ValueError: another argument is of the wrong type.
    """
    arguments.check_reader("decode_patch", masks=masks, schema=schema, limits=limits, base_id=base_id)
    frame = frames.open_frame(blob, limits, (frames.PATCH,), schema)
    frames.check_base(frame, base_id)
    assert frame.schema is not None
    if frame.flags & frames.BASED:
        if base is None:
            raise DecodeError("frame is relative to a base; pass base=, or ask its sender for a complete one")
        arguments.check_tensors("decode_patch: base", base)
        _check_base_tensors(frame.schema, base)
    else:
        base = None
    reader = Reader(frame.body, "frame")
    rows = layout.read_table(reader, frame, (BF16, INT))
    if any(row.index not in (index.WHOLE, SHARED) for row in rows):
        raise DecodeError("a patch frame holds an explicit index; the frame is damaged")
    where = layout.locate(reader, frame, rows, masks)
    read = values.read_values(reader, layout.wanted(rows, frame.schema))
    streams = [values.to_words(stream) for stream in read]
    reader.finish()
    out: dict[str, Tensor] = {}
    for entry, mask, words in zip(frame.schema.entries, where, streams, strict=True):
        if base is not None:
            held = _words(entry, base[entry.name], mask)
            xor = entry.kind or frame.apply == frames.XOR
            words = words ^ held if xor else _sum(words, held)
        if entry.kind:
            out[entry.name] = integers(entry, words)
            continue
        values.check_finite_words(words)
        if mask is None:
            dense = torch.from_numpy(words.copy().view(np.int16)).view(torch.bfloat16)
        else:
            dense = ops.expand(values.widen(words), mask).to(torch.bfloat16)
        out[entry.name] = dense.view(entry.shape)
    return out


def _check_base_tensors(schema: Schema, base: Mapping[str, Tensor]) -> None:
    try:
        schema.check({e.name: base[e.name] for e in schema.entries if e.name in base}, "decode_patch: base")
    except ValueError as error:
        raise DecodeError(str(error)) from error
