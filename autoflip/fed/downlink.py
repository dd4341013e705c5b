"""The way down: what a client lacks since it last took part, as bytes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autoflip import codec
from autoflip.fed.coordinates import Coordinates, Locate
from autoflip.fed.message import EXPLORE, NO_VIEW, TRAIN, Message
from autoflip.fed.norms import floored
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
    locate: Locate,
    *,
    seed: int = 0,
    round_number: int = 0,
) -> tuple[View, tuple[bytes, ...]]:
    """Return the view that a client will hold, and the codec frames that turn ``held`` into it.

    Masks travel only when the client holds others, and then as their change.

    Args:
        params: the server's parameters, full size, float32.
        masks: what this client is to keep.
        held: the view that it holds; None: nothing.
        kind: ``fp32``: the parameters themselves. ``bf16``: difference of bfloat16 words from ``held`` (lossless).
            ``int8``, ``int4``: the quantised difference to ``held``; the view then lags behind ``params`` by the
            rounding, which is part of the next difference (error feedback, Seide et al., INTERSPEECH 2014). Where
            masks travel too, and the difference is large, int8; to a client that holds nothing, bf16.
        locate: masks -> coordinates of what travels under them.
        seed: of the stochastic rounding.
        round_number: the same.
    """
    frames = []
    if masks is not None and masks != (held.masks if held is not None else None):
        frames.append(codec.encode_masks(masks, held.masks if held is not None else None, schema=locate(None).schema))
    at = locate(masks)
    small, base = at.shrink(params), _base(held, masks, locate)
    wire: dict[str, Any] = {"masks": at.inside, "schema": at.schema}
    if kind in QUANTISED and held is not None and base is not None:
        # what bfloat16 cannot hold is not worth sending: nothing has changed, nothing travels
        change = {name: value.bfloat16().float() - base[name].float() for name, value in small.items()}
        values = "int8" if frames else kind
        frame = codec.encode(change, values=values, seed=seed, round=round_number, base_id=held.id, **wire)
        return _moved(held, base, frame, masks, at), (*frames, frame)
    view = make_view(small, masks, _DTYPES[kind], at.inside)
    if kind == "fp32":
        frames.append(codec.encode(view.params, values="fp32", **wire))
    else:
        base_id = held.id if held is not None else NO_VIEW
        frames.append(codec.encode_patch(view.params, base, base_id=base_id, **wire))
    return view, tuple(frames)


def receive(message: Message, held: View | None, locate: Locate, kind: str) -> View:
    """Return the view that ``message`` describes, given the one that the client holds (the message's base).

    Raises:
        DecodeError: the frames are damaged, or do not lead to the view that the message names.
    """
    if message.kind not in (TRAIN, EXPLORE) or len(message.frames) > 2:
        raise codec.DecodeError(
            f"client {message.client}: kind {message.kind} with {len(message.frames)} frames; a server sends "
            "TRAIN or EXPLORE with [masks and] parameters"
        )
    if not message.frames:  # nothing has changed
        if held is None or held.id != message.view:
            raise codec.DecodeError(f"client {message.client}: no frames, and what is held is not the view they name")
        return held
    masks = held.masks if held is not None else None
    if len(message.frames) == 2:
        masks = codec.decode_masks(message.frames[0], masks, schema=locate(None).schema)
    frame, at, base = message.frames[-1], locate(masks), _base(held, masks, locate)
    if kind in QUANTISED and held is not None and base is not None:
        view = _moved(held, base, frame, masks, at)
    elif kind == "fp32":
        view = make_view(codec.decode(frame, masks=at.inside, schema=at.schema), masks, torch.float32, at.inside)
    else:
        params = codec.decode_patch(frame, base, masks=at.inside, schema=at.schema, base_id=message.base)
        view = make_view(params, masks, torch.bfloat16, at.inside)
    if view.id != message.view:
        raise codec.DecodeError(
            f"client {message.client}: the broadcast of round {message.round} decodes to another view than it names"
        )
    return view


def _base(held: View | None, masks: MaskSet | None, locate: Locate) -> Mapping[str, Tensor] | None:
    """Return what is held in the coordinates of ``masks``; what was not held is zero."""
    if held is None or held.masks == masks:
        return held.params if held is not None else None
    return locate(masks).shrink(locate(held.masks).expand(held.params))


def _moved(held: View, base: Mapping[str, Tensor], frame: bytes, masks: MaskSet | None, at: Coordinates) -> View:
    """Return ``base`` after a quantised difference: the same additions at both ends, so the same bits."""
    change = codec.decode(frame, masks=at.inside, schema=at.schema, base_id=held.id)
    moved = {name: value.float() + change[name] for name, value in base.items()}
    return make_view(floored(moved), masks, torch.bfloat16, at.inside)
