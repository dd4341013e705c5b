"""BatchNorm in federated averaging: keep it and average its buffers, or replace it by GroupNorm."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

__all__ = ["floored", "has_norms", "to_group_norm"]


def has_norms(model: nn.Module) -> bool:
    """Tell whether a model has a normalisation layer of torch's."""
    return any(isinstance(layer, (_NormBase, nn.GroupNorm, nn.LayerNorm)) for layer in model.modules())


def floored(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``params`` with no running variance below 0.

    Where a channel falls silent its variance goes from 1 to next to nothing; the difference, and what clients hold, are
    rounded at the size of the former, and a variance below 0 makes every output NaN.
    """
    return {name: t.clamp_min(0) if name.endswith("running_var") else t for name, t in params.items()}


def to_group_norm(model: nn.Module, groups: int = 8) -> nn.Module:
    """Replace every BatchNorm of ``model``, in place, by a GroupNorm of the same channels, and return the model.

    A client's batch statistics are those of its own classes, so their average normalises no client well; groups of
    channels need no statistics across examples (Hsieh et al., "The Non-IID Data Quagmire", ICML 2020).

    Args:
        model: any module; weights and biases of the norms are kept where there are some.
        groups: wanted number of groups; where it does not divide the channels, the largest common divisor. A
            BatchNorm1d gets fewer, at least eight channels each where it has so many: what it normalises may be one
            number a channel, and a group of one number is zero.

    Raises:
        ValueError: a norm is lazy and does not know its channels yet, or it is a BatchNorm1d of a single one.
    """
    for path, module in list(model.named_modules()):
        if not isinstance(module, _BatchNorm):
            continue
        if not module.num_features:
            raise ValueError(f"to_group_norm: {path or 'the model'} does not know its channels yet; run the model once")
        count = math.gcd(groups, module.num_features)
        if isinstance(module, nn.BatchNorm1d):
            if module.num_features == 1:
                raise ValueError(f"to_group_norm: {path or 'the model'} has one channel, of which a group norm is zero")
            fits = (c for c in range(count, 1, -1) if not module.num_features % c and module.num_features >= 8 * c)
            count = next(fits, 1)
        norm = nn.GroupNorm(count, module.num_features, module.eps, module.affine)
        if module.affine:
            norm.weight, norm.bias = module.weight, module.bias
        if not path:
            return norm
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, norm)
    return model
