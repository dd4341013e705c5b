"""The way down: what a client lacks since it last took part, as bytes, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autoflip import codec
from autoflip.fed.message import EXPLORE, NO_VIEW, TRAIN, Message
from autoflip.fed.state import View, make_view
from autoflip.masks import MaskSet

__all__ = ["QUANTISED", "receive", "send"]

QUANTISED = ("int8", "int4")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "int4": torch.bfloat16}


def send(
    params: Mapping[str, Tensor],
    masks: MaskSet | None,
    held: View | None,
    kind: str,
    schema: codec.Schema,
    *,
    seed: int = 0,
    round_number: int = 0,
) -> tuple[View, tuple[bytes, ...]]:
    """Return the view that a client will hold, and the codec frames that turn ``held`` into it.

    Masks travel only when the client holds others, and then as their change.

    Args:
        params: the server's parameters, float32.
        masks: what this client is to keep.
        held: the view that it holds; None: nothing.
        kind: ``fp32``: the parameters themselves. ``bf16``: difference of bfloat16 words from ``held`` (lossless).
            ``int8``, ``int4``: the quantised difference to ``held``; the view then lags behind ``params`` by the
            rounding, which is part of the next difference (error feedback, Seide et al., INTERSPEECH 2014). Where
            masks travel too, and the difference is large, int8; to a client that holds nothing, bf16.
        schema: of the parameters.
        seed: of the stochastic rounding.
        round_number: the same.
    """
    frames = []
    if masks is not None and masks != (held.masks if held is not None else None):
        frames.append(codec.encode_masks(masks, held.masks if held is not None else None, schema=schema))
    if kind in QUANTISED and held is not None:
        # what bfloat16 cannot hold is not worth sending: nothing has changed, nothing travels
        change = {name: value.bfloat16().float() - held.params[name].float() for name, value in params.items()}
        values = "int8" if frames else kind
        frame = codec.encode(
            change, masks=masks, values=values, schema=schema, seed=seed, round=round_number, base_id=held.id
        )
        return _moved(held, frame, masks, schema), (*frames, frame)
    view = make_view(params, masks, _DTYPES[kind])
    if kind == "fp32":
        frames.append(codec.encode(view.params, masks=masks, values="fp32", schema=schema))
    else:
        base, base_id = (held.params, held.id) if held is not None else (None, NO_VIEW)
        frames.append(codec.encode_patch(view.params, base, masks=masks, schema=schema, base_id=base_id))
    return view, tuple(frames)


def receive(message: Message, held: View | None, schema: codec.Schema, kind: str) -> View:
    """Return the view that ``message`` describes, given the one that the client holds (the message's base).

    Raises:
        DecodeError: the frames are damaged, or do not lead to the view that the message names.
    """
    if message.kind not in (TRAIN, EXPLORE) or not 1 <= len(message.frames) <= 2:
        raise codec.DecodeError(
            f"client {message.client}: kind {message.kind} with {len(message.frames)} frames; a server sends "
            "TRAIN or EXPLORE with [masks and] parameters"
        )
    masks = held.masks if held is not None else None
    if len(message.frames) == 2:
        masks = codec.decode_masks(message.frames[0], masks, schema=schema)
    frame = message.frames[-1]
    if kind in QUANTISED and held is not None:
        view = _moved(held, frame, masks, schema)
    elif kind == "fp32":
        view = make_view(codec.decode(frame, masks=masks, schema=schema), masks, torch.float32)
    else:
        base = held.params if held is not None else None
        params = codec.decode_patch(frame, base, masks=masks, schema=schema, base_id=message.base)
        view = make_view(params, masks, torch.bfloat16)
    if view.id != message.view:
        raise codec.DecodeError(
            f"client {message.client}: the broadcast of round {message.round} decodes to another view than it names"
        )
    return view


def _moved(held: View, frame: bytes, masks: MaskSet | None, schema: codec.Schema) -> View:
    """Return ``held`` after a quantised difference: the same additions at both ends, so the same bits."""
    change = codec.decode(frame, masks=masks, schema=schema, base_id=held.id)
    return make_view({name: value.float() + change[name] for name, value in held.params.items()}, masks, torch.bfloat16)
