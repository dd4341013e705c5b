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
from autoflip.ops import delta_stream, delta_zeros
from autoflip.ops.delta import Pack
from autoflip.ops.delta_coding import Key
from autoflip.ops.delta_stream import LEVELS, Coded

__all__ = ["Rounding", "Selection", "select", "single"]

# share of zeros among the entries of a mask from which naming the others is cheaper than sending the zeros: of floats
# the low bytes are left as they are by an entropy coder; from trials on the MLP and the CNN of bench/real_deltas.py
_RANKS_FROM = {FP32: 0.005, BF16: 0.01, INT8: 0.05, INT4: 0.05}
# share of zeros among codes, and number of them, from which their entries are left out: below, an index and codes of
# less save no more than a hundredth and the bytes that say where blocks end
_DROP_FROM, _DROP_LEAST = 0.01, 16


class Selection(NamedTuple):
    """Which entries of a tensor travel, how the reader learns of it, and as what they do.

    Attributes:
        coding: of the index (:mod:`autoflip.codec.index`).
        codec: of the values.
        entries: those of the tensor that travel, for who codes them; None = all.
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
    kept, finite = ops.gather(x, mask)
    if not finite:
        return shared
    stream, ranks, _ = _code_nonzero(torch.from_numpy(kept), how._replace(codec=codec))
    coding, k, size = index.choose(ranks, entropy, level)
    if _bytes(stream) + size >= values.value_bytes(codec, mask.kept):
        return shared
    return Selection(RANKS | coding, codec, named=ranks, k=k, coded=(stream, True))


def _explicit(entry: Entry, x: Tensor, how: Rounding, entropy: str, level: int) -> Selection:
    codec = how.codec
    if _filled(x):  # likely to travel whole: its values are not coded twice
        mask, coded = ops.pack_nonzero(x), None
        size_of_values = values.value_bytes(codec, mask.kept)
    else:
        stream, mask, finite = _code_nonzero(x, how)
        coded, size_of_values = (stream, finite), _bytes(stream)
        if not finite:
            return Selection(WHOLE, codec, coded=coded)
    coding, k, size, named = index.choose_order(mask, entry.shape, entropy, level)
    if values.value_bytes(codec, entry.numel) <= size_of_values + size:
        return Selection(WHOLE, codec)
    return Selection(coding, codec, mask, named, k, coded)


def _code_nonzero(x: Tensor, how: Rounding) -> tuple[Coded, Pack, bool]:
    """Code what is not zero, and leave out again what the code made zero, where those are many."""
    stream, mask, finite = delta_stream.code_nonzero(x, how.codec, how.key, how.levels_of(how.codec))
    if finite and delta_zeros.zero_codes(stream) >= max(_DROP_LEAST, _DROP_FROM * stream.count):
        return *delta_zeros.drop_zeros(stream, mask), True
    return stream, mask, finite


def _bytes(stream: Coded) -> int:
    return values.value_bytes(stream.kind, stream.count, stream.blocks)


def _filled(x: Tensor) -> bool:
    """Tell whether a few runs of ``x`` have hardly a zero."""
    flat = x.reshape(-1)
    run = 1 << 10
    runs = [flat[start : start + run] for start in range(0, len(flat), max(run, len(flat) // 4))]
    return bool(8 * sum(int(part.count_nonzero()) for part in runs) > 7 * sum(map(len, runs)))


def single(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as float32."""
    return tensor.detach().to(torch.float32)
