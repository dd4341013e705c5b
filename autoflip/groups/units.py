"""What is found: units, the slices that they own, and what cannot be removed, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Axis", "Groups", "Slice", "Unit"]


@dataclass(frozen=True)
class Axis:
    """One dimension of one tensor, labelled with units.

    Args:
        tensor: its name in ``state_dict()``.
        dim: the dimension, 0 or 1.
        produces: True where an entry along ``dim`` computes its unit (rows, biases, norm parameters), False
            where it reads the unit (columns of the next layer).
        units: ``(size of dim,)``, int64, the unit of every index.
    """

    tensor: str
    dim: int
    produces: bool
    units: Tensor


@dataclass(frozen=True)
class Slice:
    """``indices`` along ``dim`` of ``tensor``."""

    tensor: str
    dim: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """One class of coupled channels: all that leaves when it is removed."""

    id: int
    layer: str
    producers: tuple[Slice, ...]
    consumers: tuple[Slice, ...]


@dataclass(frozen=True)
class Groups:
    """The coupled channels of a model.

    Args:
        axes: every labelled dimension of every tensor.
        layers: per unit, the layer that produces it first.
        removable: ``(units,)``, bool.
        pure: ``(units,)``, bool, True where a unit whose producers are all zero reaches its consumers as zero.
        families: sets of layers (as lists of units) that must lose equally many units.
        sizes: path of a norm layer that holds no tensors -> its units.
        inputs: path of a Linear that reads the model's input -> the units of its columns, ``(in_features,)``. Nothing
            produces them: whoever removes one lets the layer pick what it still reads (:func:`autoflip.compact`).
        frozen: layer -> why its units stay.
        reason: why nothing is known about this model; empty when it was traced.
    """

    axes: tuple[Axis, ...] = ()
    layers: tuple[str, ...] = ()
    removable: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    pure: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    families: tuple[tuple[Tensor, ...], ...] = ()
    sizes: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    def __len__(self) -> int:
        return len(self.layers)

    def by_layer(self) -> dict[str, Tensor]:
        """Return layer -> its removable units, ``(n,)`` int64 each, in the order of the forward pass; no inputs."""
        found: dict[str, list[int]] = {}
        made = self.removable.clone()
        for units in self.inputs.values():
            made[units] = False
        for unit in made.nonzero()[:, 0].tolist():
            found.setdefault(self.layers[unit], []).append(unit)
        return {layer: torch.tensor(units) for layer, units in found.items()}

    def width(self, layer: str) -> int:
        """Return how many channels of ``layer`` make one of its units (more than 1 in grouped layers)."""
        for axis in self.axes:
            own = axis.tensor.startswith(f"{layer}.") or not layer
            if own and axis.produces and axis.tensor.endswith("weight"):
                return max(1, len(axis.units) // len(axis.units.unique()))
        return 1

    @property
    def units(self) -> tuple[Unit, ...]:
        """Every removable unit with the slices it owns as a producer and as a consumer."""
        slices: dict[int, tuple[list[Slice], list[Slice]]] = {
            unit: ([], []) for unit in self.removable.nonzero()[:, 0].tolist()
        }
        for axis in self.axes:
            members: dict[int, list[int]] = {}
            for index, unit in enumerate(axis.units.tolist()):
                members.setdefault(unit, []).append(index)
            for unit, indices in members.items():
                if unit in slices:
                    slices[unit][0 if axis.produces else 1].append(Slice(axis.tensor, axis.dim, tuple(indices)))
        return tuple(Unit(unit, self.layers[unit], tuple(p), tuple(c)) for unit, (p, c) in slices.items())

    def level(self, removed: Tensor) -> Tensor:
        """Return ``removed`` (``(units,)``, bool) made possible: equal counts in a family, no empty layer.

        Units are only ever taken back, from the last one down.
        """
        removed = removed & self.removable
        while True:
            before = removed.clone()
            for family in self.families:
                least = min(int(removed[units].sum()) for units in family)
                for units in family:
                    removed[units[removed[units]][least:]] = False
            for axis in self.axes:
                if bool(removed[axis.units].all()):
                    removed[axis.units[0]] = False
            if torch.equal(before, removed):
                return removed
