"""Drop-in sparse layers, and the way from a plain model to a sparse or a compact one and back."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from autoflip.nn.conv import MaskedConv2d
from autoflip.nn.convert import densify, masks_of, sparsify
from autoflip.nn.linear import MaskedLinear
from autoflip.nn.recurrent import MaskedGRU, MaskedLSTM

if TYPE_CHECKING:
    from autoflip.nn.compact import compact

__all__ = [
    "MaskedConv2d",
    "MaskedGRU",
    "MaskedLSTM",
    "MaskedLinear",
    "compact",
    "densify",
    "masks_of",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    if name == "compact":
        # the import binds the submodule to this very name; the function takes its place
        globals()["compact"] = import_module("autoflip.nn.compact").compact
        return globals()["compact"]
    raise AttributeError(f"module 'autoflip.nn' has no attribute {name!r}; it has {', '.join(__all__)}")
