"""The random signs that the estimators draw: the same on every device, and in whatever order they are asked for."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from autoflip.ops import _hessian, backend, reference

__all__ = ["flips", "rademacher"]


def rademacher(
    seed: int,
    stream: int,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw signs: each entry is +1 or -1 with equal chance, a function of (seed, stream, position) alone.

    Args:
        seed: any integer, taken modulo 2**64.
        stream: any integer; streams of one seed are independent of each other.
        shape: of the result.
        dtype: floating.
        device: of the result; the signs do not depend on it.

    Returns:
        ``shape``, ``dtype``.

    Source: SplitMix64, Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    device = torch.device(device)
    if backend.serve("rademacher", device) == "cpp":
        out = torch.empty(shape, dtype=torch.float32)
        kernels = backend.extension("_C")[0]
        assert kernels is not None
        words = (seed % (1 << 64), stream % (1 << 64))
        kernels.rademacher(*words, out.data_ptr(), out.numel(), torch.get_num_threads())
        return out.to(dtype)
    if backend.serve("rademacher", device) == "triton":
        from autoflip.kernels import hessian

        return hessian.rademacher(reference.rademacher_start(seed, stream), tuple(shape), device).to(dtype)
    if backend.serve("rademacher", device) == "cuda":
        start = int(reference.rademacher_start(seed, stream))
        return _hessian.cuda_rademacher(start, tuple(shape), device).to(dtype)
    return reference.rademacher(seed, stream, tuple(shape)).to(device, dtype)


@lru_cache(maxsize=16)
def flips(block: int, width: int) -> Tensor:
    """Return ``(block, width)`` signs: a Hadamard matrix, whose rows are orthogonal, beside itself."""
    rows = [[1.0 - 2 * ((i & row).bit_count() & 1) for i in range(block)] for row in range(block)]
    return torch.tensor(rows).repeat(1, -(-width // block))[:, :width]
