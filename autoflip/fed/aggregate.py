"""Adds client updates up as they land: a mean over the clients that hold each coordinate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autoflip import codec
from autoflip.fed.coordinates import Coordinates, Locate
from autoflip.masks import MaskSet

__all__ = ["Aggregator"]


class _Part:
    """Sum of the updates of all clients of one mask, in its coordinates."""

    def __init__(self, masks: MaskSet | None, at: Coordinates) -> None:
        self.masks, self.at, self.weight = masks, at, 0.0
        self.sums = {name: torch.zeros(shape) for name, shape in at.schema.shapes.items()}


class Aggregator:
    """Weighted mean of deltas per coordinate, over holders only.

    ``mean_i = sum_k n_k delta_k,i / sum_k n_k m_k,i``, zero where nobody holds ``i``. Memory is one set of compact
    tensors per distinct mask, however many clients there are.

    Args:
        locate: masks -> coordinates of the updates of clients that hold them.
        limits: what a payload may make us allocate.
    """

    def __init__(self, locate: Locate, limits: codec.Limits | None = None) -> None:
        self.locate = locate
        self.limits = limits or codec.Limits()
        self._parts: dict[str, _Part] = {}

    @property
    def weight(self) -> float:
        """Sum of the weights of all updates so far."""
        return sum(part.weight for part in self._parts.values())

    def add(self, frame: bytes, weight: float, masks: MaskSet | None, cap: float | None = None) -> None:
        """Decode one delta and add it; one that is damaged or moves an entry by more than ``cap`` changes nothing.

        Raises:
            DecodeError: it is.
        """
        part = self._part(masks)
        at, limits = part.at, self.limits
        codec.accumulate(frame, part.sums, weight, masks=at.inside, schema=at.schema, limits=limits, cap=cap)
        part.weight += weight

    def add_decoded(self, delta: Mapping[str, Tensor], weight: float, masks: MaskSet | None) -> None:
        """Add a compact delta that was decoded already (guidance needs its squares too)."""
        part = self._part(masks)
        for name, total in part.sums.items():
            total.add_(delta[name], alpha=weight)
        part.weight += weight

    def _part(self, masks: MaskSet | None) -> _Part:
        key = masks.fingerprint() if masks is not None else ""
        if key not in self._parts:
            self._parts[key] = _Part(masks, self.locate(masks))
        return self._parts[key]

    def mean(self) -> dict[str, Tensor]:
        """Return the mean delta, in full coordinates."""
        parts = [part for part in self._parts.values() if part.weight]
        if len(parts) == 1:  # what is outside its mask is zero
            (part,) = parts
            return part.at.expand({name: s / part.weight for name, s in part.sums.items()})
        sums: dict[str, Tensor] = {}
        holders: dict[str, Tensor] = {}
        for part in parts:
            for name, s in part.at.expand(part.sums).items():
                held = part.weight * part.masks[name] if part.masks is not None and name in part.masks else part.weight
                sums[name] = sums[name] + s if name in sums else s
                holders[name] = holders.get(name, torch.zeros_like(s)) + held
        zero = torch.zeros(())
        return {
            name: torch.where(holders[name] > 0, s / holders[name].clamp_min(1e-30), zero) for name, s in sums.items()
        }
