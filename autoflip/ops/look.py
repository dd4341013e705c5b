"""Looks at values before they are used: are they finite, are they rows of a tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from autoflip.ops import backend

__all__ = ["all_finite", "all_rows", "ones_and_zeros"]


def all_rows(samples: Tensor, count: int) -> bool:
    """Return whether ``samples``, ``(N,)`` and int64, are all rows of a tensor that has ``count`` of them."""
    kernels = backend.extension("_C")[0] if samples.device.type == "cpu" and samples.is_contiguous() else None
    if kernels is not None:
        return bool(kernels.all_rows(samples.data_ptr(), len(samples), count))
    return bool(((samples >= 0) & (samples < count)).all())


def ones_and_zeros(mask: Tensor) -> Tensor:
    """Return a bool tensor whose bytes are 1 and 0: itself, unless it came from other bytes (``view(torch.bool)``)."""
    if mask.is_meta or not mask.numel():
        return mask
    octets = mask.view(torch.uint8)
    return mask if int(octets.max()) <= 1 else octets != 0


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no value of ``tensors``, floating and of any devices, is NaN or Inf."""
    kernels = backend.extension("_C")[0]
    ours: list[tuple[int, int]] = []
    others: list[Tensor] = []
    for t in tensors:
        if kernels is not None and t.dtype is torch.float32 and t.is_cpu and t.is_contiguous():
            ours.append((t.data_ptr(), t.numel()))
        else:
            others.append(t)
    if kernels is not None and ours and not kernels.all_finite(ours):
        return False
    return all(bool(torch.isfinite(t.detach()).all()) for t in others)
