"""autoflip: federated learning that is cheap for real.

Pruned, physically compacted and sparsely coded models, and a ledger that measures every FLOP, byte and
second. The method is AutoFLIP (arXiv:2405.10271), done for real.

Submodules load on first use, so that ``import autoflip`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_SUBMODULES = ("codec", "curvature", "explore", "fed", "masks", "meter", "nn", "ops", "prune")
_NAMES = {"MaskSet": "masks", "sparsify": "nn", "densify": "nn", "compact": "nn"}
__all__ = [
    "MaskSet",
    "__version__",
    "codec",
    "compact",
    "curvature",
    "densify",
    "explore",
    "fed",
    "masks",
    "meter",
    "nn",
    "ops",
    "prune",
    "sparsify",
]

if TYPE_CHECKING:
    from autoflip import codec, curvature, explore, fed, masks, meter, nn, ops, prune
    from autoflip.masks import MaskSet
    from autoflip.nn import compact, densify, sparsify


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"autoflip.{name}")
    if name in _NAMES:
        return getattr(import_module(f"autoflip.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'autoflip' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
