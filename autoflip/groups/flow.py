"""Follow channels through a model: the rules by which operations pass on, tie, read or freeze units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autoflip.groups.trace import is_leaf
from autoflip.groups.units import Axis, Groups

__all__ = ["Flow", "Size", "Value", "fit"]


@dataclass(frozen=True)
class Value:
    """What a tensor carries: ``ids`` along ``axis`` (negative), ``rank`` dimensions (None: not known).

    ``spread``: after flattening, every id stands for several neighbours ("each") or the whole list repeats
    ("tile"), how often shows at the layer that reads it. ``stack``: ids per layer of a recurrent state.
    ``batch``: dimension 0 is that of the model's inputs. ``assumed``: the rank is a guess that a reader of the units
    confirms; until one does, no dimension is moved. ``ones``: dimensions (negative) that surely have one entry.
    """

    rank: int | None = None
    axis: int = -1
    ids: tuple[int, ...] = ()
    spread: str = ""
    stack: tuple[tuple[int, ...], ...] = ()
    batch: bool = False
    assumed: bool = False
    ones: frozenset[int] = frozenset()

    def but(self, **changes: Any) -> Value:
        """Return this with changes; which dimensions have one entry is known only where the changes say it."""
        return replace(self, **{"ones": frozenset(), **changes})

    def moved(self, before: Value) -> bool:
        """Tell whether dimensions are others than ``before``."""
        return (self.rank, self.axis, self.spread) != (before.rank, before.axis, before.spread)

    def dim(self, dim: int) -> int | None:
        """Return ``dim`` counted from the end; None where it may be any, that of the units too.

        Dimension 0 of a tensor of unknown rank is that of the batch: some dimension before the units.
        """
        if dim < 0:
            return dim
        if self.rank is None:
            return None if dim else self.axis - 1
        return dim - self.rank if dim < self.rank else None


@dataclass(frozen=True)
class Size:
    """``value.shape[dim]`` inside a graph, or the whole shape where ``dim`` is None."""

    value: Value
    dim: int | None = None


class Flow:
    """Walk graphs of one model and collect what happens to every unit."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.bare = is_leaf(model)
        self.parent: list[int] = []
        self.layer: list[str] = []
        self.frozen: dict[int, str] = {}
        self.reasons: dict[str, str] = {}
        self.impure: set[int] = set()
        self.whole: dict[str, str] = {}
        self.axes: dict[tuple[str, int], tuple[bool, tuple[int, ...]]] = {}
        self.families: dict[str, list[tuple[int, ...]]] = {}
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.seen: dict[str, tuple[int, ...]] = {}
        owners: dict[int, set[int]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), set()).add(id(module))
        self.tied = {key for key, modules in owners.items() if len(modules) > 1}

    # ---- units
    def find(self, unit: int) -> int:
        """Return the representative of ``unit``: the smallest id it is tied to."""
        while self.parent[unit] != unit:
            self.parent[unit] = self.parent[self.parent[unit]]
            unit = self.parent[unit]
        return unit

    def tie(self, a: Sequence[int], b: Sequence[int]) -> None:
        """Make the units of ``a`` and ``b`` one, entry by entry."""
        for left, right in zip(a, b, strict=True):
            low, high = sorted((self.find(left), self.find(right)))
            self.parent[high] = low

    def new(self, layer: str, count: int) -> tuple[int, ...]:
        """Return ``count`` fresh units of ``layer``, the same ones when the layer is called again."""
        if layer not in self.seen:
            start = len(self.parent)
            self.parent += range(start, start + count)
            self.layer += [layer] * count
            self.seen[layer] = tuple(range(start, start + count))
        return self.seen[layer]

    def freeze_ids(self, ids: Sequence[int], reason: str) -> None:
        """Keep these units for good; the first reason stands."""
        for unit in ids:
            self.frozen.setdefault(unit, reason)

    def freeze(self, what: Any, reason: str) -> None:
        """Keep every unit that ``what`` (a value, a size, a container of them) carries."""
        if isinstance(what, Value):
            for ids in (what.ids, *what.stack):
                self.freeze_ids(ids, reason)
        elif isinstance(what, Size):
            if what.dim is None or what.value.dim(what.dim) in (None, what.value.axis):
                self.freeze(what.value, reason)
        elif isinstance(what, dict):
            self.freeze(tuple(what.values()), reason)
        elif isinstance(what, slice):
            self.freeze((what.start, what.stop, what.step), reason)
        elif isinstance(what, (tuple, list)):
            for item in what:
                self.freeze(item, reason)

    # ---- tensors
    def record(self, module: nn.Module, path: str, name: str, dim: int, ids: Sequence[int], produces: bool) -> None:
        """Label one dimension of ``path.name``; no-op where the layer has no such tensor."""
        if getattr(module, name, None) is None:
            return
        own = module._parameters.get(name, module._buffers.get(name))
        if own is None or id(own) in self.tied or own.shape[dim] != len(ids):
            why = (
                "its weights are tied to another layer"
                if own is not None and id(own) in self.tied
                else (
                    "its tensors are computed (parametrized)" if own is None else "its shape does not fit what it reads"
                )
            )
            self.freeze_ids(ids, why)
            return
        key = (f"{path}.{name}" if path else name, dim)
        if key in self.axes:  # the layer is called twice
            if len(self.axes[key][1]) != len(ids):
                self.freeze_ids(ids, f"{path} also reads something else")
                return
            self.tie(self.axes[key][1], ids)
        self.axes[key] = (produces, tuple(ids))

    def reads(self, module: nn.Module, path: str, name: str, dim: int, value: Value, size: int) -> None:
        """Let dimension ``dim`` (of ``size``) of a weight read ``value``."""
        ids = fit(value, size)
        if ids:
            self.record(module, path, name, dim, ids, produces=False)
            return
        self.freeze(value, f"read by {path or type(module).__name__}, whose {size} inputs do not fit")
        self.bar(module, path, name, dim=dim)

    def bar(self, module: nn.Module, path: str, *names: str, dim: int = 0) -> None:
        """Keep a dimension of ``path``'s tensors whole: a call is not followed, whatever other calls there are."""
        for name in names:
            if getattr(module, name, None) is None:
                continue
            key = (f"{path}.{name}" if path else name, dim)
            if key in self.axes:
                self.freeze_ids(self.axes.pop(key)[1], f"{path} also reads something else")
            self.axes[key] = (False, ())

    def read_itself(self, name: str) -> None:
        """Keep the layer whole that owns tensor ``name`` (or is ``name``): forward does with it what it likes."""
        modules = dict(self.model.named_modules())
        owner = name.rpartition(".")[0]
        parts = modules[name].named_modules(prefix=name) if name in modules else [(owner, modules.get(owner))]
        for path, module in parts:
            if module is not None and is_leaf(module) and not isinstance(module, (nn.ParameterList, nn.ParameterDict)):
                self.whole.setdefault(path, f"forward reads {name} itself")

    def groups(self) -> Groups:
        """Return what was found, units numbered in the order of the forward pass."""
        for (tensor, _), (_, ids) in self.axes.items():
            if why := self.whole.get(tensor.rpartition(".")[0]):
                self.freeze_ids(ids, why)
        roots = [self.find(unit) for unit in range(len(self.parent))]
        read = {roots[unit] for produces, ids in self.axes.values() if not produces for unit in ids}
        self.freeze_ids([unit for unit, root in enumerate(roots) if root not in read], "no layer reads it")
        number = {root: i for i, root in enumerate(sorted(set(roots)))}
        index = torch.tensor([number[root] for root in roots], dtype=torch.int64)
        removable = torch.ones(len(number), dtype=torch.bool)
        pure = torch.ones(len(number), dtype=torch.bool)
        reasons = self.whole | self.reasons
        for unit, why in self.frozen.items():
            removable[index[unit]] = False
            reasons.setdefault(self.layer[unit], why)
        held = {roots[unit]: self.layer[unit] for unit in reversed(self.frozen)}
        for unit, root in enumerate(roots):  # tied to a frozen one
            if not removable[index[unit]]:
                reasons.setdefault(self.layer[unit], f"tied to {held[root]}")
        if self.impure:
            pure[index[list(self.impure)]] = False
        return Groups(
            axes=tuple(
                Axis(tensor, dim, produces, index[list(ids)])
                for (tensor, dim), (produces, ids) in self.axes.items()
                if ids
            ),
            layers=tuple(self.layer[root] for root in number),
            removable=removable,
            pure=pure,
            families=tuple(tuple(index[list(ids)] for ids in family) for family in self.families.values()),
            sizes={path: index[list(ids)] for path, ids in self.sizes.items() if ids},
            inputs={path: index[list(ids)] for path, ids in self.inputs.items() if ids},
            frozen=reasons,
        )


def fit(value: Value, size: int) -> tuple[int, ...]:
    """Return the unit of each of ``size`` entries of the axis, () where it does not fit or there is none."""
    ids = value.ids
    if not ids or value.stack or size % len(ids) or (not value.spread and size != len(ids)):
        return ()
    times = size // len(ids)
    return ids * times if value.spread == "tile" else tuple(unit for unit in ids for _ in range(times))
