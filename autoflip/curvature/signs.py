"""The random signs of a Monte-Carlo draw, orthogonal to those of the other draws of its block."""

from __future__ import annotations

import torch
from torch import Tensor

from autoflip import ops
from autoflip.ops.signs import flips


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
