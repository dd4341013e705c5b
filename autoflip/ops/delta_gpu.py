"""Shared-mask coding on a GPU, CUDA C++ or Triton: raw streams leave the device, nothing dense does.

Unmeasured on a GPU; :mod:`autoflip.ops.delta_stream` comes here when ``AUTOFLIP_BACKEND`` names one of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from autoflip.ops import backend
from autoflip.ops.delta import Pack
from autoflip.ops.delta_coding import BLOCK, Key, largest_scale, words_of

__all__ = ["Located", "code", "expand", "locate"]

_ENTRIES = 1024  # of a block in kernels/delta.py and csrc/cuda/delta.cu
_LOCATED: WeakKeyDictionary[Pack, dict[torch.device, Located]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Located:
    """A mask on a device, ready for kernels without a scan.

    Attributes:
        words: ``(8 * ceil(numel / 64),)`` uint8, bit i of the whole is entry i.
        offsets: ``(ceil(numel / 1024) + 1,)`` int64, kept entries before each block of 1024.
        numel: entries of the mask.
        kept: set bits.
    """

    words: Tensor
    offsets: Tensor
    numel: int
    kept: int


def locate(mask: Pack, device: torch.device) -> Located:
    """Return ``mask`` on ``device``, made once."""
    held = _LOCATED.setdefault(mask, {})
    if device not in held:
        size = -(-mask.numel // _ENTRIES)
        bits = np.zeros(size * _ENTRIES // 8, np.uint8)
        raw = mask.words.numpy().view(np.uint8)
        bits[: len(raw)] = raw
        counts = np.unpackbits(bits).reshape(size, _ENTRIES).sum(1, dtype=np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        words = torch.from_numpy(bits).to(device)
        held[device] = Located(words, torch.from_numpy(offsets).to(device), mask.numel, mask.kept)
    return held[device]


def code(
    x: Tensor, mask: Pack | None, levels: int | None, key: Key, base: Tensor | None, server: str
) -> tuple[Tensor, Tensor, bool]:
    """Gather ``(x - base)[mask]`` and code it on the device of ``x``.

    Args:
        x: contiguous float32.
        mask: a Pack of as many entries, None = every entry.
        levels: the largest code for codes with scales, 0 for bf16 words, None for float32 as it is.
        key: as in :func:`autoflip.ops.delta_coding.quantise`.
        base: like ``x``, or None.
        server: ``cuda`` or ``triton``.

    Returns:
        Values (int8 codes, int16 words or float32), scales (empty but for codes), and whether all of ``x - base``
        is finite; the tensors are on the device.
    """
    if mask is None:
        values = x.flatten() if base is None else (x - base).flatten()
        finite = bool(torch.isfinite(values).all())
    else:
        where = locate(mask, x.device)
        values, bad = x.new_empty(where.kept), torch.zeros(1, dtype=torch.int32, device=x.device)
        _run(server, "gather", x, base, where.words, where.offsets, values, bad)
        finite = not bool(bad)
    none = x.new_empty(0)
    if not finite or levels is None or not len(values):
        kinds = {None: torch.float32, 0: torch.int16}
        return values.to(kinds.get(levels, torch.int8)) if finite else none, none, finite
    if levels == 0:
        words = torch.empty(len(values), dtype=torch.int16, device=x.device)
        _run(server, "round_bf16", values, words_of(key), words)
        return words, none, True
    codes = torch.empty(len(values), dtype=torch.int8, device=x.device)
    scales = x.new_empty(-(-len(values) // BLOCK))
    _run(server, "quantise", values, levels, largest_scale(levels), words_of(key), codes, scales)
    return codes, scales, True


def expand(values: Tensor, scales: Tensor | None, mask: Pack, weight: float | None, out: Tensor, server: str) -> None:
    """``out[mask] = values * scales``, zero elsewhere; with a weight ``out[mask] += weight * values * scales``.

    Args:
        values: ``(mask.kept,)`` float32, or int8 codes with ``scales``, on the device of ``out``.
        scales: one float32 per 256 codes, or None.
        mask: a Pack of as many entries as ``out``.
        weight: factor, or None to write over ``out``.
        out: contiguous float32.
        server: ``cuda`` or ``triton``.
    """
    where = locate(mask, out.device)
    _run(server, "expand", values, scales, where.words, where.offsets, weight, out)


def _run(server: str, name: str, *arguments: object) -> None:
    if server == "triton":
        getattr(import_module("autoflip.kernels.delta"), name)(*arguments)
        return
    module, why = backend.extension("_cuda")
    assert module is not None, why
    stream = torch.cuda.current_stream().cuda_stream
    _CUDA[name](module, stream, *arguments)


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


_CUDA: dict[str, Callable[..., None]] = {
    "gather": lambda m, stream, x, base, words, offsets, out, bad: m.delta_gather(
        _at(x), _at(base), _at(words), _at(offsets), x.numel(), _at(out), _at(bad), stream
    ),
    "quantise": lambda m, stream, x, levels, largest, key, codes, scales: m.delta_quantise(
        _at(x), x.numel(), levels, largest, *key, _at(codes), _at(scales), stream
    ),
    "round_bf16": lambda m, stream, x, key, words: m.delta_round(_at(x), x.numel(), *key, _at(words), stream),
    "expand": lambda m, stream, values, scales, words, offsets, weight, out: m.delta_expand(
        _at(values),
        _at(scales),
        _at(words),
        _at(offsets),
        out.numel(),
        weight or 0.0,
        weight is not None,
        _at(out),
        stream,
    ),
}
