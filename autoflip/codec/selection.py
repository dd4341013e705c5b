"""Which entries of a tensor are worth sending: all, those of the mask, or only those that are not zero."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from autoflip.codec import index, values
from autoflip.codec.index import RANKS, SHARED, WHOLE
from autoflip.codec.schema import Entry
from autoflip.codec.values import BF16, FP32, INT, INT4, INT8
from autoflip.ops import delta as ops
from autoflip.ops.delta import Pack

__all__ = ["Selection", "select", "single"]

# share of zeros among the entries of a mask from which naming the others is cheaper than sending the zeros: they
# cost an entropy coder little, and fine codes more than coarse ones (bench/codec_bytes.py)
_RANKS_FROM = {FP32: 0.05, BF16: 0.05, INT8: 0.25, INT4: 0.5}


class Selection(NamedTuple):
    """Which entries of a tensor travel, how the reader learns of it, and as what they do.

    Attributes:
        coding: of the index (:mod:`autoflip.codec.index`).
        codec: of the values.
        entries: those of the tensor that travel; None = all.
        named: what the frame names, entries or ranks; None = nothing.
        k: Rice parameter.
    """

    coding: int
    codec: int
    entries: Pack | None = None
    named: Pack | None = None
    k: int = 0


def select(
    entry: Entry, tensor: Tensor, mask: Pack | None, explicit: bool, codec: int, entropy: str, level: int
) -> Selection:
    """Choose for one tensor; ``mask`` is the shared one, ``explicit`` says that there are none at all."""
    if entry.kind:
        return Selection(WHOLE, INT)
    if codec in (INT8, INT4) and len(entry.shape) < 2:
        codec = BF16
    if explicit:
        return _explicit(entry, single(tensor), codec, entropy, level)
    if mask is None:
        return Selection(WHOLE, codec)
    shared = Selection(SHARED, codec, mask)
    x = single(tensor)
    # without an entropy stage lengths must not depend on values
    if entropy == "none" or ops.zero_share(x, mask) < _RANKS_FROM[codec]:
        return shared
    inner = ops.pack_nonzero(torch.from_numpy(ops.gather(x, mask)[0]))
    coding, k, size = index.choose(inner, entropy, level)
    if values.value_bytes(codec, inner.kept) + size >= values.value_bytes(codec, mask.kept):
        return shared
    return Selection(RANKS | coding, codec, ops.within(mask, inner), inner, k)


def _explicit(entry: Entry, x: Tensor, codec: int, entropy: str, level: int) -> Selection:
    mask = ops.pack_nonzero(x)
    coding, k, size = index.choose(mask, entropy, level)
    if values.value_bytes(codec, entry.numel) <= values.value_bytes(codec, mask.kept) + size:
        return Selection(WHOLE, codec)
    return Selection(coding, codec, mask, mask, k)


def single(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as float32."""
    return tensor.detach().to(torch.float32)
