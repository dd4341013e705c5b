"""The random signs of a Monte-Carlo draw, orthogonal to those of the other draws of its block."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from autoflip import ops


def signs_of(output: Tensor, shape: tuple[int, ...], seed: int, draw: int, block: int) -> Tensor:
    """Return a draw's signs: those of its block, times a row of a Hadamard matrix repeated along the output.

    Columns of S that meet different entries of the row are orthogonal over the block: their products, which are
    a draw's whole error, cancel. The heaviest columns of a sample are neighbours, so they do.
    """
    stream, row = divmod(draw, block)
    signs = ops.rademacher(seed, stream, shape, dtype=torch.promote_types(output.dtype, torch.float32))
    if row:
        turned = flips(block, block).to(signs)[row]
        signs *= turned.repeat(-(-signs.numel() // block))[: signs.numel()].view(signs.shape)
    return signs.to(output.device)


@lru_cache(maxsize=16)
def flips(block: int, width: int) -> Tensor:
    """Return ``(block, width)`` signs: a Hadamard matrix, whose rows are orthogonal, beside itself."""
    rows = [[1.0 - 2 * ((i & row).bit_count() & 1) for i in range(block)] for row in range(block)]
    return torch.tensor(rows).repeat(1, -(-width // block))[:, :width]
