"""A smaller plain model that computes what the masked one computes: dead channels physically gone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autoflip.groups import Groups, find_groups
from autoflip.masks import MaskSet
from autoflip.nn.linear import select
from autoflip.nn.plan import Plan
from autoflip.nn.verify import outputs, verify

__all__ = ["Plan", "compact"]


def compact(
    model: nn.Module,
    example_inputs: Any = None,
    masks: Mapping[str, Tensor] | None = None,
    *,
    groups: Groups | None = None,
) -> nn.Module:
    """Build a smaller model without the channels that reach nothing.

    A unit goes when no kept weight reads it (also through cycles and chains of dead units), or when all its
    weights, biases and norm parameters are pruned and it reaches its readers as exactly zero. The result equals
    the masked model to float rounding in eval and in train mode, gradients at the entries it has included; a dead unit
    that stays to fill a layer may read less than it did, and so have other running statistics. A Linear that reads the
    model's input, and no more than three quarters of it, picks what it reads (``nn.SelectingLinear``). What
    cannot be removed safely stays and is named in ``small.plan.report()``.

    Args:
        model: plain or sparsified; it is not changed.
        example_inputs: one input, or a tuple of arguments: how many dimensions they have decides what can be followed
            (:func:`autoflip.groups.find_groups`), and both models are run on them (no gradients, eval mode), to find
            out here rather than later that ``forward`` has sizes written into it or does what was not seen.
        masks: which entries are kept, a :class:`MaskSet` or name -> bool tensor; default: those the model's masked
            layers hold.
        groups: :func:`autoflip.groups.find_groups` of the same model, to save tracing it again.

    Returns:
        A new model of the same class made of torch's layers, pruned weights exactly zero, with ``.plan``
        (:class:`Plan`) mapping ``state_dict()`` names and coordinates to those of ``model`` and back.

    Raises:
        ValueError: the masks do not fit the model, a layer computes its weight from other tensors, or the small model
            does not run on ``example_inputs``, or gives other values there than the masked one.
    """
    from autoflip.nn.convert import densify, masks_of  # here: the package imports this module first

    if masks is None:
        masks = masks_of(model)
    elif not isinstance(masks, MaskSet):
        masks = MaskSet(masks)
    groups = find_groups(model, example_inputs) if groups is None else groups
    named = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    masks.check(named)
    dead = _dead(groups, masks, named)
    for units in groups.inputs.values():  # picking has to cost less than what it saves
        if int(dead[units].sum()) < len(units) / 4:
            dead[units] = False
    removed = groups.level(dead)
    small = densify(_copy(model))
    small.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, tensor in small.state_dict(keep_vars=True).items():
            if name in masks:
                tensor.masked_fill_(~masks[name].to(tensor.device), 0)
    plan = _plan(groups, removed, dead, named)
    wanted = outputs(small, example_inputs) if example_inputs is not None and bool(removed.any()) else None
    _apply(small, plan)
    for path, units in groups.sizes.items():  # norms that hold no tensor to measure
        layer: Any = small.get_submodule(path)
        size = int((~removed[units]).sum())
        if isinstance(layer, nn.GroupNorm):
            _regroup(layer, size)
        else:
            layer.num_features = size
    for path, units in groups.inputs.items():
        if bool(removed[units].any()):
            reader: Any = small.get_submodule(path)
            select(reader, (~removed[units]).nonzero()[:, 0])
    small.__dict__["plan"] = plan
    if example_inputs is not None:
        verify(small, example_inputs, wanted)
    return small


def _dead(groups: Groups, masks: MaskSet, tensors: dict[str, Any]) -> Tensor:
    """Return ``(units,)``, bool: units that reach nothing, or that are exactly zero."""
    if not len(groups):
        return torch.zeros(0, dtype=torch.bool)
    rows = {axis.tensor: axis.units for axis in groups.axes if axis.produces}
    alive, zero = ~groups.removable, groups.pure.clone()
    for axis in groups.axes:
        if axis.produces and isinstance(tensors[axis.tensor], nn.Parameter):
            kept = masks.get(axis.tensor)
            if kept is None:
                zero[axis.units] = False
            else:
                kept = kept.movedim(axis.dim, 0)
                zero[axis.units[kept.flatten(1).any(1) if kept.ndim > 1 else kept]] = False
    edges = []
    for axis in reversed(groups.axes):
        if not axis.produces:
            mask = masks.get(axis.tensor)
            if mask is not None:
                mask = mask.movedim(axis.dim, 1).flatten(2).any(2) if mask.ndim > 2 else mask.movedim(axis.dim, 1)
            edges.append((axis.units, rows.get(axis.tensor), mask))  # mask: [rows, columns]
    while True:
        before = int(alive.sum())
        for units, producers, mask in edges:
            if mask is not None:
                live = mask if producers is None else mask[alive[producers]]
                alive[units[live.any(0)]] = True
            elif producers is None or bool(alive[producers].any()):
                alive[units] = True
        if int(alive.sum()) == before:
            return (~alive | zero) & groups.removable


def _copy(model: nn.Module) -> nn.Module:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:  # torch copies none such, and says so of no layer
                raise ValueError(
                    f"compact: {f'{path}.{name}'.lstrip('.')} is computed from other tensors, and no copy of the "
                    "model can be made; where torch.nn.utils.prune or weight_norm did it, make it a parameter again "
                    "first (prune.remove, remove_weight_norm), where a forward pass left it, set it to None"
                )
    return copy.deepcopy(model)


def _plan(groups: Groups, removed: Tensor, dead: Tensor, tensors: dict[str, Any]) -> Plan:
    first: dict[int, str] = {}
    alias = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    keep: dict[str, dict[int, Tensor]] = {}
    for axis in groups.axes:
        gone = removed[axis.units]
        if bool(gone.any()):
            keep.setdefault(axis.tensor, {})[axis.dim] = (~gone).nonzero()[:, 0]
    left = dict(groups.frozen)
    count: dict[str, int] = {}
    for unit in dead.nonzero()[:, 0].tolist():
        layer = groups.layers[unit]
        count[layer] = count.get(layer, 0) + int(removed[unit])
        if not removed[unit]:
            left.setdefault(layer, "some dead units stay: its layers must keep equal sizes, and at least one unit")
    if groups.reason:
        left[""] = groups.reason
    return Plan(
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        keep={name: keep[source] for name, source in alias.items() if source in keep},
        removed=count,
        left=left,
    )


def _apply(small: nn.Module, plan: Plan) -> None:
    """Replace the tensors of ``small`` by their kept entries and set its layers' sizes."""
    for path, module in small.named_modules():
        touched = False
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            full = f"{path}.{name}" if path else name
            if tensor is None or full not in plan.keep:
                continue
            less = plan.shrink({full: tensor.detach()})[full].contiguous()
            if isinstance(tensor, nn.Parameter):
                setattr(module, name, nn.Parameter(less, requires_grad=tensor.requires_grad))
            else:
                module._buffers[name] = less
            touched = True
        if touched:
            _resize(module)


def _resize(module: Any) -> None:
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _ConvTransposeNd):
        module.in_channels, module.out_channels = weight.shape[:2]
    elif isinstance(module, _ConvNd):
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise: a group per channel
            module.groups = len(weight) // (module.out_channels // module.groups)
        module.in_channels = weight.shape[1] * module.groups
        module.out_channels = len(weight)
    elif isinstance(module, nn.GroupNorm):
        _regroup(module, len(weight))
    elif isinstance(module, _NormBase):
        sized: Any = weight if weight is not None else module.running_mean
        module.num_features = len(sized)
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.RNNBase):
        module.input_size = _columns(module.weight_ih_l0)
        if not module.proj_size:  # else the hidden size stays, and a column is an output's
            module.hidden_size = _columns(module.weight_hh_l0)
        module.flatten_parameters()
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]


def _regroup(norm: nn.GroupNorm, channels: int) -> None:
    norm.num_groups, norm.num_channels = channels * norm.num_groups // norm.num_channels, channels


def _columns(tensor: Any) -> int:
    return int(tensor.shape[1])
