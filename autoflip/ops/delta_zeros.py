"""Sparse-delta ops: leave out the codes that rounding made 0, so that their entries need neither code nor index."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from autoflip.ops import delta_coding as coding
from autoflip.ops import delta_stream
from autoflip.ops.delta import Pack, cpp, empty_words, pack, within
from autoflip.ops.delta_stream import INT4, LEVELS, Coded

__all__ = ["drop_zeros", "zero_codes"]


def zero_codes(coded: Coded) -> int:
    """Return how many codes are 0; of what has none, 0."""
    if coded.kind not in LEVELS:
        return 0
    codes = coded.streams[0]
    if coded.kind == INT4:  # a spare half is 0 too
        return coded.count - int(np.count_nonzero(codes & 15)) - int(np.count_nonzero(codes >> 4))
    return coded.count - int(np.count_nonzero(codes))


def drop_zeros(coded: Coded, mask: Pack) -> tuple[Coded, Pack]:
    """Leave out the codes that are 0, and their entries; what is left decodes to the same numbers.

    Each block of 256 keeps its scale, hence one code at least: the first, where all are 0.

    Args:
        coded: int8 or int4 codes of blocks of 256; its memory is written over.
        mask: the entries that they are of.

    Returns:
        The codes that are left, with ``survivors``, and their entries.
    """
    assert coded.kind in LEVELS
    assert coded.survivors is None
    counts = np.empty(len(coded.scales), np.uint8)
    codes = coded.streams[0]
    if ext := cpp():
        stays = Pack(empty_words(coded.count), coded.count)
        places = (ext.address(codes), coded.count, stays.words.data_ptr(), ext.address(counts))
        kept = int(ext.delta_drop_zeros(coded.kind, *places))
        left = codes[: -(-kept // 2) if coded.kind == INT4 else kept]
    else:
        plain = delta_stream.codes_of(coded)
        keep = plain != 0
        starts = np.arange(0, len(plain), coding.BLOCK)
        keep[starts[np.add.reduceat(keep, starts, dtype=np.int64) == 0]] = True
        counts[:] = np.add.reduceat(keep, starts, dtype=np.int64) - 1
        stays, kept = pack(torch.from_numpy(keep)), int(keep.sum())
        left = coding.nibbles(plain[keep]) if coded.kind == INT4 else plain[keep].view(np.uint8)
    return dataclasses.replace(coded, count=kept, streams=(left,), survivors=counts), within(mask, stays)
