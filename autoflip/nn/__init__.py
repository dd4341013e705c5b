"""Drop-in sparse layers, and the way from a plain model to a sparse or a compact one and back."""

from __future__ import annotations

from autoflip.nn.compact import compact
from autoflip.nn.conv import MaskedConv2d
from autoflip.nn.convert import densify, masks_of, sparsify
from autoflip.nn.embedding import MaskedEmbedding
from autoflip.nn.linear import MaskedLinear, SelectingLinear
from autoflip.nn.recurrent import MaskedGRU, MaskedLSTM

__all__ = [
    "MaskedConv2d",
    "MaskedEmbedding",
    "MaskedGRU",
    "MaskedLSTM",
    "MaskedLinear",
    "SelectingLinear",
    "compact",
    "densify",
    "masks_of",
    "sparsify",
]
