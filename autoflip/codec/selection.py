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
from autoflip.ops import delta_stream
from autoflip.ops.delta import Pack
from autoflip.ops.delta_coding import Key
from autoflip.ops.delta_stream import LEVELS, Coded

__all__ = ["Rounding", "Selection", "select", "single"]

# share of zeros among the entries of a mask from which naming the others is cheaper than sending the zeros: they
# cost an entropy coder of codes little, but of floats the low bytes that it leaves as they are; from trials on the MLP
# and the CNN of bench/real_deltas.py, the one for int4 a guess
_RANKS_FROM = {FP32: 0.005, BF16: 0.01, INT8: 0.25, INT4: 0.5}


class Selection(NamedTuple):
    """Which entries of a tensor travel, how the reader learns of it, and as what they do.

    Attributes:
        coding: of the index (:mod:`autoflip.codec.index`).
        codec: of the values.
        entries: those of the tensor that travel; None = all.
        named: what the frame names, entries (turned under COLUMNS) or ranks; None = nothing.
        k: Rice parameter.
        coded: the values, and whether all of the tensor is finite, where the choice took them; None = not yet.
    """

    coding: int
    codec: int
    entries: Pack | None = None
    named: Pack | None = None
    k: int = 0
    coded: tuple[Coded, bool] | None = None


class Rounding(NamedTuple):
    """How values are to be coded: the wanted codec, the key of the random numbers, and the largest code.

    None stands for rounding to the nearest, and for as many codes as the codec has.
    """

    codec: int
    key: Key
    levels: int | None

    def levels_of(self, codec: int) -> int | None:
        """The largest code, where ``codec`` has codes."""
        return self.levels if codec in LEVELS else None


def select(
    entry: Entry, tensor: Tensor, mask: Pack | None, explicit: bool, how: Rounding, entropy: str, level: int
) -> Selection:
    """Choose for one tensor; ``mask`` is the shared one, ``explicit`` says that there are none at all."""
    codec = how.codec
    if entry.kind:
        return Selection(WHOLE, INT)
    if codec in (INT8, INT4) and len(entry.shape) < 2:
        codec = BF16
    if explicit:
        return _explicit(entry, single(tensor), how._replace(codec=codec), entropy, level)
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


def _explicit(entry: Entry, x: Tensor, how: Rounding, entropy: str, level: int) -> Selection:
    codec = how.codec
    if _filled(x):  # likely to travel whole: its values are not coded twice
        mask, coded = ops.pack_nonzero(x), None
    else:
        stream, mask, finite = delta_stream.code_nonzero(x, codec, how.key, how.levels_of(codec))
        coded = stream, finite
        if not finite:
            return Selection(WHOLE, codec, coded=coded)
    coding, k, size, named = index.choose_order(mask, entry.shape, entropy, level)
    if values.value_bytes(codec, entry.numel) <= values.value_bytes(codec, mask.kept) + size:
        return Selection(WHOLE, codec)
    return Selection(coding, codec, mask, named, k, coded)


def _filled(x: Tensor) -> bool:
    """Tell whether a few runs of ``x`` have hardly a zero."""
    flat = x.reshape(-1)
    run = 1 << 10
    runs = [flat[start : start + run] for start in range(0, len(flat), max(run, len(flat) // 4))]
    return bool(8 * sum(int(part.count_nonzero()) for part in runs) > 7 * sum(map(len, runs)))


def single(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as float32."""
    return tensor.detach().to(torch.float32)
