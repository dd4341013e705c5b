"""Where a mask's numbers live: what travels, is rounded and is added up has the compact model's shapes.

Both ends know the masks, so a tensor of which a sixteenth is left costs a sixteenth of the work, not a full-size array
of zeros at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from autoflip import codec
from autoflip.masks import MaskSet
from autoflip.nn.plan import Plan

__all__ = ["Coordinates", "Locate"]


@dataclass(frozen=True)
class Coordinates:
    """Those of the model that serves one mask.

    Attributes:
        schema: of the compact tensors.
        inside: masks of what is left, compact; None: all of it is kept.
        plan: maps full coordinates to these; None: they are the full ones.
    """

    schema: codec.Schema
    inside: MaskSet | None = None
    plan: Plan | None = None

    def shrink(self, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the kept part of full-size tensors."""
        return self.plan.shrink(full) if self.plan is not None else dict(full)

    def expand(self, small: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return full-size tensors, zero where a channel is gone."""
        return self.plan.expand(small) if self.plan is not None else dict(small)


Locate = Callable[[MaskSet | None], Coordinates]
