"""Adds client updates up as they land: a mean over the clients that hold each coordinate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autoflip import codec
from autoflip.masks import MaskSet

__all__ = ["Aggregator"]


class Aggregator:
    """Weighted mean of deltas per coordinate, over holders only.

    ``mean_i = sum_k n_k delta_k,i / sum_k n_k m_k,i``, zero where nobody holds ``i``. Memory is one tensor set
    plus one number per distinct mask, however many clients there are.

    Args:
        shapes: name -> shape of every tensor.
        schema: of the payloads.
        limits: what a payload may make us allocate.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], schema: codec.Schema, limits: codec.Limits | None = None
    ) -> None:
        self.schema = schema
        self.limits = limits or codec.Limits()
        self.sums = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self._weights: dict[str, tuple[MaskSet | None, float]] = {}

    @property
    def weight(self) -> float:
        """Sum of the weights of all updates so far."""
        return sum(weight for _, weight in self._weights.values())

    def add(self, frame: bytes, weight: float, masks: MaskSet | None) -> None:
        """Decode one delta and add it; a damaged frame raises DecodeError and changes nothing."""
        codec.accumulate(frame, self.sums, weight, masks=masks, schema=self.schema, limits=self.limits)
        self._count(weight, masks)

    def add_decoded(self, delta: Mapping[str, Tensor], weight: float, masks: MaskSet | None) -> None:
        """Add a delta that was decoded already (guidance needs its squares too)."""
        for name, total in self.sums.items():
            total.add_(delta[name], alpha=weight)
        self._count(weight, masks)

    def _count(self, weight: float, masks: MaskSet | None) -> None:
        key = masks.fingerprint() if masks is not None else ""
        self._weights[key] = (masks, weight + self._weights.get(key, (None, 0.0))[1])

    def mean(self) -> dict[str, Tensor]:
        """Return the mean delta."""
        if len(self._weights) <= 1:  # one mask for all: coordinates outside it hold zero sums
            total = self.weight
            return {name: s / total if total else s.clone() for name, s in self.sums.items()}
        means = {}
        for name, s in self.sums.items():
            holders = torch.zeros_like(s)
            for masks, weight in self._weights.values():
                holders += weight * masks[name] if masks is not None and name in masks else weight
            means[name] = torch.where(holders > 0, s / holders.clamp_min(1e-30), torch.zeros(()))
        return means
