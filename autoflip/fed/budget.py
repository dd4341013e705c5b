"""From a budget (a share of dense FedAvg's FLOPs or bytes a round) to the share of channels that fits it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoflip import meter
from autoflip.groups import Groups
from autoflip.masks import MaskSet
from autoflip.nn import compact

__all__ = ["channels_within", "cost_of", "usual_share"]

BITS = {"fp32": 32.0, "bf16": 16.0, "int8": 8.125, "int4": 4.125}  # per value, block scales included
_STEPS = 8  # bisection: to 1/256 of the channels
_QUARTER, _CHANNELS = 0.25, 28


def cost_of(
    model: nn.Module, masks: MaskSet, example: Tensor, groups: Groups, values: str, downlink: str
) -> tuple[float, float]:
    """Return (FLOPs, bytes) of a training round under ``masks`` as shares of a dense float32 round.

    Args:
        model: the full model.
        masks: what is kept; channels that are gone count as gone, single masked weights as computed but not sent.
        example: inputs of a small batch.
        groups: of ``model``.
        values: what the uplink sends, see ``wire.values``.
        downlink: what the downlink sends, see ``wire.downlink``.
    """
    small = compact(model, masks=masks, groups=groups)
    sizes = [(p.numel(), int(masks[n].sum()) if n in masks else p.numel()) for n, p in model.named_parameters()]
    sent = sum(kept for _, kept in sizes) / sum(whole for whole, _ in sizes)
    return _step(small, example) / _step(model, example), sent * (BITS[values] + BITS[downlink]) / 64


def usual_share(groups: Groups) -> float:
    """Return the kept share of channels where the user names none: a quarter, more in a narrow model.

    A quarter of 16 to 64 channels is too little to learn from, so the share is at least what would leave 28 channels
    of the widest layer (README, "Limits, plainly").
    """
    widest = max((len(units) * groups.width(layer) for layer, units in groups.by_layer().items()), default=1)
    return min(1.0, max(_QUARTER, _CHANNELS / widest))


def _step(model: nn.Module, example: Tensor) -> int:
    twin = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=[]):
        return meter.count_flops(lambda: twin(example).sum().backward())


def channels_within(cost: Callable[[float], tuple[float, float]], flops: float, bytes: float, most: float) -> float:
    """Return the largest share of channels, up to ``most``, whose cost fits both budgets.

    Args:
        cost: share of channels -> (FLOPs, bytes), see :func:`cost_of`; should grow with the share.
        flops: budget of FLOPs; 0: none.
        bytes: budget of bytes; 0: none.
        most: upper limit of the share.

    Where not even the smallest model fits (every layer keeps a tenth of its channels, at least four), the
    smallest is what there is.
    """

    def fits(share: float) -> bool:
        spent = cost(share)
        return not (flops and spent[0] > flops) and not (bytes and spent[1] > bytes)

    if fits(most):
        return most
    low, high = 2.0**-_STEPS, most
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
