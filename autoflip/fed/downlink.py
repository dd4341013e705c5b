"""The way down: what a client lacks since it last took part, as bytes, and back."""

from __future__ import annotations

import torch

from autoflip import codec
from autoflip.fed.message import EXPLORE, NO_VIEW, TRAIN, Message
from autoflip.fed.state import View, make_view

__all__ = ["DTYPES", "receive", "send"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def send(view: View, held: View | None, schema: codec.Schema) -> tuple[bytes, ...]:
    """Return the codec frames that turn ``held`` into ``view``.

    bfloat16 views travel as the difference of words from ``held`` (lossless); float32 views stand alone. Masks travel
    only when the client holds others, and then as their change.
    """
    old_masks = held.masks if held is not None else None
    frames = []
    if view.masks is not None and view.masks != old_masks:
        frames.append(codec.encode_masks(view.masks, old_masks, schema=schema))
    if any(t.dtype == torch.bfloat16 for t in view.params.values()):
        base = held.params if held is not None else None
        base_id = held.id if held is not None else NO_VIEW
        frames.append(codec.encode_patch(view.params, base, masks=view.masks, schema=schema, base_id=base_id))
    else:
        frames.append(codec.encode(view.params, masks=view.masks, values="fp32", schema=schema))
    return tuple(frames)


def receive(message: Message, held: View | None, schema: codec.Schema, dtype: torch.dtype) -> View:
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
    if dtype == torch.bfloat16:
        base = held.params if held is not None else None
        params = codec.decode_patch(frame, base, masks=masks, schema=schema, base_id=message.base)
    else:
        params = codec.decode(frame, masks=masks, schema=schema)
    view = make_view(params, masks, dtype)
    if view.id != message.view:
        raise codec.DecodeError(
            f"client {message.client}: the broadcast of round {message.round} decodes to another view than it names"
        )
    return view
