"""Cuts: which units and which cells survive a budget. Stable, so that equal scores go to the earlier one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from autoflip.groups import Groups

__all__ = ["choose_inputs", "choose_units", "cut", "cut_inside"]


def choose_units(
    groups: Groups,
    scores: Mapping[str, Tensor],
    channels: float,
    steps: Mapping[str, tuple[int, int]],
    protect: Collection[str],
    flops: Mapping[str, float] | None = None,
    exponent: float = 0.0,
) -> Tensor:
    """Return ``(units,)``, bool: the units to remove so that a share of ``channels`` stays.

    Args:
        groups: the model's coupled channels.
        scores: weight name -> float32 scores.
        channels: kept share of the removable units of layers that are not protected, in (0, 1].
        steps: layer -> the multiple to which its kept channels are rounded, and the one for less than 3/4 of that.
        protect: layers that keep every unit.
        flops: weight name -> FLOPs of its layer; missing: 0.
        exponent: power of a unit's FLOPs per weight, against the mean of all, by which its score is divided.
    """
    removed = torch.zeros(len(groups), dtype=torch.bool)
    layers = {layer: units for layer, units in groups.by_layer().items() if layer.partition(":")[0] not in protect}
    count = sum(len(units) for units in layers.values())
    if channels == 1 or not count:
        return removed
    value = _unit_scores(groups, scores)
    if flops and exponent:
        value = value / _unit_flops(groups, flops, scores) ** exponent
    order = {layer: units[value[units].argsort(descending=True, stable=True)] for layer, units in layers.items()}
    width = {layer: groups.width(layer) for layer in layers}  # channels per unit
    floor = {layer: _at_least(len(units), width[layer]) for layer, units in layers.items()}
    want = _shares(order, value, floor, round(channels * count))
    fixed = {}
    for layer, units in order.items():
        step, fine = (-(-multiple // width[layer]) for multiple in steps[layer])
        if step > 1:
            step = step if want[layer] > 0.75 * step else fine
            fixed[layer] = min(len(units), max(round(want[layer] / step), -(-floor[layer] // step)) * step)
    free = {layer: units for layer, units in order.items() if layer not in fixed}
    want = {**_shares(free, value, floor, round(channels * count) - sum(fixed.values())), **fixed}
    for layer in order:  # the layers of one nn.LSTM share their size
        family = [other for other in order if ":" in layer and other.partition(":")[0] == layer.partition(":")[0]]
        if family and layer == family[0]:
            want.update(dict.fromkeys(family, round(sum(want[other] for other in family) / len(family))))
    for layer, units in order.items():
        removed[units[want[layer] :]] = True
    return groups.level(removed)


def choose_inputs(
    groups: Groups, scores: Mapping[str, Tensor], removed: Tensor, share: float, protect: Collection[str]
) -> Tensor:
    """Return ``(units,)``, bool: the model's inputs to drop so that every layer that reads them keeps ``share``.

    Args:
        groups: the model's coupled channels.
        scores: weight name -> float32 scores; an input's is the sum over its column, as far as its rows stay.
        removed: ``(units,)``, bool: the channels that go.
        share: kept share of each such layer's columns, in (0, 1].
        protect: layers that keep every input.
    """
    chosen = torch.zeros(len(groups), dtype=torch.bool)
    rows = {axis.tensor: axis.units for axis in groups.axes if axis.produces and not axis.dim}
    for path, units in groups.inputs.items() if share < 1 else ():
        name = f"{path}.weight" if path else "weight"
        if path in protect or name not in scores or not bool(groups.removable[units].all()):
            continue
        value = scores[name][~removed[rows[name]]].sum(0)
        order = units[value.argsort(descending=True, stable=True)]
        chosen[order[max(1, round(share * len(units))) :]] = True
    return groups.level(chosen)


def _at_least(units: int, width: int) -> int:
    """Return how many units a layer keeps in any case: a tenth, and four channels."""
    return min(units, max(-(-4 // width), -(-units // 10)))


def cut(cells: Mapping[str, Tensor], budget: int, sizes: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Keep the best cells of all tensors together.

    Args:
        cells: name -> ``(R, C)`` float scores.
        budget: entries to keep.
        sizes: name -> ``(R, C)`` int64 entries per cell; default: 1 each.

    Returns:
        name -> ``(R, C)`` bool. The best cell of every tensor is kept in any case, then the best of every row
        as far as the budget goes, then the best of all.
    """
    names = list(cells)
    flat = torch.cat([cells[name].flatten() for name in names])
    size = torch.ones(len(flat), dtype=torch.int64) if sizes is None else torch.cat([sizes[n].flatten() for n in names])
    kept = torch.zeros(len(flat), dtype=torch.bool)
    rows, start = [], 0
    for name in names:
        best = cells[name].argmax(1) + torch.arange(len(cells[name])) * cells[name].shape[1] + start
        kept[best[flat[best].argmax()]] = True
        rows.append(best)
        start += cells[name].numel()
    best = torch.cat(rows)
    _fill(kept, best[~kept[best]], flat, size, budget)
    _fill(kept, None, flat, size, budget)
    parts = kept.split([cells[name].numel() for name in names])
    return {name: part.reshape(cells[name].shape) for name, part in zip(names, parts, strict=True)}


def _fill(kept: Tensor, pool: Tensor | None, flat: Tensor, size: Tensor, budget: int) -> None:
    """Keep the best of ``pool`` (positions; None: all that is not kept yet) until ``budget`` is full."""
    left = budget - int(size[kept].sum())
    if pool is None:
        pool = (~kept).nonzero()[:, 0]
    if left <= 0 or not len(pool):
        return
    if int(size[pool].sum()) <= left:
        kept[pool] = True
        return
    values = flat[pool]
    if int(size.max()) > 1:
        order = values.argsort(descending=True, stable=True)
        kept[pool[order[size[pool[order]].cumsum(0) <= left]]] = True
        return
    at = len(values) - left  # numpy's partition: a tenth of the time of torch.kthvalue
    bar = float(np.partition(values.numpy(), at)[at])
    above = values > bar
    kept[pool[above]] = True
    kept[pool[(values == bar).nonzero()[: left - int(above.sum()), 0]]] = True


def cut_inside(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], budget: int, block: tuple[int, int]
) -> dict[str, Tensor]:
    """Cut weights in blocks laid over what the masks leave.

    Args:
        scores: name -> float32 scores.
        masks: name -> bool, True on whole rows and columns that stay (an outer product).
        budget: entries to keep.
        block: (rows, columns) of a block, in the coordinates of the rows and columns that stay.

    Returns:
        name -> bool masks, within ``masks``.
    """
    cells, sizes, places = {}, {}, {}
    for name, s in scores.items():
        mask = masks[name].flatten(1)
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        places[name] = (rows, columns)
        inner = s.flatten(1)[rows][:, columns]
        cells[name], sizes[name] = _pool(inner, block)
    kept = cut(cells, budget, None if block == (1, 1) else sizes)
    out = {}
    for name, s in scores.items():
        rows, columns = places[name]
        fine = kept[name].repeat_interleave(block[0], 0)[: len(rows)].repeat_interleave(block[1], 1)[:, : len(columns)]
        whole = torch.zeros(len(s), s[0].numel(), dtype=torch.bool)
        whole[rows[:, None], columns] = fine
        out[name] = whole.reshape(s.shape)
    return out


def _pool(s: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the mean score and the number of entries of every block, ``(R, C)`` each."""
    if block == (1, 1):
        return s, torch.ones(0)
    rows, columns = (torch.arange(n) // b for n, b in zip(s.shape, block, strict=True))
    sums = s.new_zeros(int(rows[-1]) + 1, s.shape[1]).index_add_(0, rows, s)
    sums = s.new_zeros(len(sums), int(columns[-1]) + 1).index_add_(1, columns, sums)
    sizes = rows.bincount()[:, None] * columns.bincount()
    return sums / sizes, sizes


def _shares(order: Mapping[str, Tensor], value: Tensor, floor: Mapping[str, int], budget: int) -> dict[str, int]:
    """Split ``budget`` kept units over layers by one cut, at least ``floor`` each."""
    first = sum(floor[layer] for layer in order)
    rest = [units[floor[layer] :] for layer, units in order.items()]
    if not rest or budget <= first:
        return {layer: floor[layer] for layer in order}
    pool = torch.cat(rest)
    kept = torch.zeros(len(value), dtype=torch.bool)
    kept[pool[value[pool].argsort(descending=True, stable=True)[: budget - first]]] = True
    return {layer: floor[layer] + int(kept[units].sum()) for layer, units in zip(order, rest, strict=True)}


def _unit_scores(groups: Groups, scores: Mapping[str, Tensor]) -> Tensor:
    # whatever the default dtype: the same cuts on every side
    total, parts = (torch.zeros(len(groups), dtype=torch.float32) for _ in range(2))
    for axis in groups.axes:
        if axis.tensor in scores:
            s = scores[axis.tensor]
            s = s - s.min().clamp(max=0)
            mean = float(s.mean())
            slices = s.movedim(axis.dim, 0).flatten(1).mean(1) / mean if mean else s.new_ones(len(axis.units))
            counts = torch.bincount(axis.units, minlength=len(groups))
            total += torch.zeros_like(total).index_add_(0, axis.units, slices) / counts.clamp(min=1)
            parts += counts > 0
    return total / parts.clamp(min=1)


def _unit_flops(groups: Groups, flops: Mapping[str, float], scores: Mapping[str, Tensor]) -> Tensor:
    """Return ``(units,)``: FLOPs per weight that a unit owns, over the mean of the units that cost anything."""
    spent, owned = (torch.zeros(len(groups), dtype=torch.float32) for _ in range(2))
    for axis in groups.axes:
        if axis.tensor in flops and axis.tensor in scores:
            counts = torch.bincount(axis.units, minlength=len(groups)).to(spent) / len(axis.units)
            spent += counts * flops[axis.tensor]
            owned += counts * scores[axis.tensor].numel()
    each = spent / owned.clamp(min=1)
    return torch.where(each > 0, each / each[each > 0].mean(), 1.0)
