"""The map between a model and its compact twin."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoflip.masks import MaskSet

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Which entries of which tensors a compact model kept.

    Args:
        shapes: name -> full shape, for every tensor of ``state_dict()``.
        keep: name -> {dimension: kept indices, int64, ascending}; a tensor or dimension not named is whole.
        removed: layer -> number of units that are physically gone.
        left: layer -> why (some of) its units had to stay.
    """

    shapes: Mapping[str, tuple[int, ...]]
    keep: Mapping[str, Mapping[int, Tensor]]
    removed: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    def small_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of ``name`` in the compact model."""
        return tuple(len(self.keep.get(name, {}).get(d, range(n))) for d, n in enumerate(self.shapes[name]))

    def shrink(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the kept entries: full coordinates -> compact ones.

        Args:
            tensors: any of the model's tensors (parameters, buffers, deltas, optimizer state), full shapes.

        Returns:
            name -> compact tensor, same dtype and device; tensors that lost nothing are returned as they are.

        Raises:
            ValueError: a name or a shape is not the full model's.
        """
        small = {}
        for name, tensor in tensors.items():
            self._check(name, tensor, self.shapes.get(name), "full")
            for dim, kept in self.keep.get(name, {}).items():
                tensor = tensor.index_select(dim, kept.to(tensor.device))
            small[name] = tensor
        return small

    def expand(self, tensors: Mapping[str, Tensor], fill: float = 0) -> dict[str, Tensor]:
        """Put compact tensors back where they came from: ``shrink(expand(t)) == t``.

        Args:
            tensors: any of the compact model's tensors.
            fill: value of the entries that are physically gone.

        Returns:
            name -> full tensor, same dtype and device.

        Raises:
            ValueError: a name or a shape is not the compact model's.
        """
        full = {}
        for name, tensor in tensors.items():
            self._check(name, tensor, self.small_shape(name) if name in self.shapes else None, "compact")
            kept = {dim: index.to(tensor.device) for dim, index in self.keep.get(name, {}).items()}
            if kept:
                whole = tensor.new_full(self.shapes[name], fill)
                first, second = kept.get(0), kept.get(1)
                if second is None:
                    whole[first] = tensor
                elif first is None:
                    whole[:, second] = tensor
                else:
                    whole[first[:, None], second] = tensor
                tensor = whole
            full[name] = tensor
        return full

    def shrink_optimizer(self, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Take the kept entries of an optimizer's state: full model -> compact model.

        Momentum, second moments and all else that is shaped like its parameter follow it, row and column statistics
        (``(O, 1)``, ``(1, K)``, Adafactor) too; step counts and options stay.

        Args:
            state: ``optimizer.state_dict()`` of any torch optimizer that keeps its state per parameter.
            names: the optimizer's parameters by name, in its order: for ``SGD(model.parameters())`` those of
                ``model.named_parameters()``.

        Returns:
            What ``load_state_dict`` of an optimizer over the compact model's parameters, in the same order, takes; its
            tensors are copies.

        Raises:
            ValueError: ``names`` does not fit ``state``, or a tensor fits its parameter in no way known (LBFGS).

        Example:
            >>> names = [name for name, _ in model.named_parameters()]
            >>> later.load_state_dict(small.plan.shrink_optimizer(earlier.state_dict(), names))
        """
        return self._map_optimizer(state, names, "full")

    def expand_optimizer(self, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Put a compact model's optimizer state back, zeros where entries are gone; see :meth:`shrink_optimizer`."""
        return self._map_optimizer(state, names, "compact")

    def _map_optimizer(self, state: Mapping[str, Any], names: Sequence[str], which: str) -> dict[str, Any]:
        count = sum(len(group["params"]) for group in state["param_groups"])
        if count != len(names):
            raise ValueError(
                f"Plan: the optimizer holds {count} parameters but {len(names)} names came; wanted one name per "
                "parameter in the optimizer's order, such as [n for n, _ in model.named_parameters()]"
            )
        order = [index for group in state["param_groups"] for index in group["params"]]
        mapped = {}
        for index, name in zip(order, names, strict=True):
            if index in state["state"]:
                entries = state["state"][index].items()
                mapped[index] = {key: self._map_state(name, key, value, which) for key, value in entries}
        return {**state, "state": mapped}

    def _map_state(self, name: str, key: str, value: Any, which: str) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.clone()  # load_state_dict copies nothing: two optimizers would write into one step count
        if not value.ndim:
            return value
        if name not in self.shapes:
            raise ValueError(f"Plan: the model has no tensor {name!r}; names are those of its state_dict()")
        full, small = self.shapes[name], self.small_shape(name)
        known = full if which == "full" else small
        if value.ndim != len(full) or any(n not in (1, size) for n, size in zip(value.shape, known, strict=True)):
            raise ValueError(
                f"Plan: {key!r} of {name!r} has shape {tuple(value.shape)}, but in the {which} model the parameter has "
                f"{known}; only state that follows its parameter can be mapped"
            )
        # Adafactor's means over columns and rows: of one unit, their 1 is not the unit's
        averaged = {"row_var": value.ndim - 1, "col_var": value.ndim - 2}.get(key)
        for dim, kept in self.keep.get(name, {}).items():
            if value.shape[dim] == known[dim] and dim != averaged:
                kept = kept.to(value.device)
                if which == "full":
                    value = value.index_select(dim, kept)
                else:
                    whole = value.new_zeros((*value.shape[:dim], full[dim], *value.shape[dim + 1 :]))
                    value = whole.index_copy(dim, kept, value)
        return value

    def shrink_masks(self, masks: MaskSet) -> MaskSet:
        """Return the masks of the full model in compact coordinates."""
        return MaskSet(self.shrink(masks))

    def report(self) -> str:
        """Say in plain lines what is gone, what was left, and why."""
        before = sum(_count(shape) for shape in self.shapes.values())
        after = sum(_count(self.small_shape(name)) for name in self.shapes)
        lines = [f"{after} of {before} numbers left"]
        lines += [f"{layer}: {count} units removed" for layer, count in self.removed.items() if count]
        lines += [f"{layer or 'model'}: left as it is ({why})" for layer, why in self.left.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Plan({'; '.join(self.report().splitlines())})"  # not the kept indices: thousands of numbers

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a safetensors file, in one atomic step."""
        from safetensors.torch import save

        about = {"shapes": dict(self.shapes), "removed": dict(self.removed), "left": dict(self.left)}
        tensors = {f"{dim}:{name}": kept for name, dims in self.keep.items() for dim, kept in dims.items()}
        target = Path(path)
        scratch = target.with_name(target.name + ".tmp")
        scratch.write_bytes(save(tensors, metadata={"plan": json.dumps(about)}))
        os.replace(scratch, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no plan.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(Path(path).__fspath__(), "pt") as file:
                about = json.loads((file.metadata() or {})["plan"])
                keep: dict[str, dict[int, Tensor]] = {}
                for key in file.keys():  # noqa: SIM118 (no dict: it has no __iter__)
                    dim, name = key.split(":", 1)
                    keep.setdefault(name, {})[int(dim)] = file.get_tensor(key)
            shapes = {name: tuple(shape) for name, shape in about["shapes"].items()}
            return cls(shapes, keep, about["removed"], about["left"])
        except FileNotFoundError:
            raise
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"Plan.load: {path} is not a plan written by Plan.save ({error})") from error

    @staticmethod
    def _check(name: str, tensor: Tensor, shape: tuple[int, ...] | None, which: str) -> None:
        if shape is None:
            raise ValueError(f"Plan: the model has no tensor {name!r}; names are those of its state_dict()")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"Plan: {name!r} has shape {tuple(tensor.shape)}, but in the {which} model it has {shape}. "
                "shrink() takes full tensors, expand() takes compact ones"
            )


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
