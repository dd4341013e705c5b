"""From a budget (a share of dense FedAvg's FLOPs or bytes a round) to the share of channels that fits it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoflip import codec, meter
from autoflip.groups import Groups
from autoflip.masks import MaskSet
from autoflip.nn import compact
from autoflip.nn.plan import Plan

__all__ = ["USUAL_FLOPS", "channels_within", "cost_of", "usual_shares"]

_STEPS = 8  # bisection: to 1/256 of the channels
_QUARTER, _CHANNELS, USUAL_FLOPS = 0.25, (20, 28), 0.18  # see usual_shares


def cost_of(
    model: nn.Module, masks: MaskSet, example: Tensor, groups: Groups, wire: tuple[str, str] | None = None
) -> tuple[float, float]:
    """Return (FLOPs, bytes) of a training round under ``masks`` as shares of a dense float32 round.

    Bytes are those of frames that hold the weights as ``model`` has them; deltas take as many or fewer.

    Args:
        model: the full model.
        masks: what is kept; channels that are gone count as gone, single masked weights as computed but not sent.
        example: inputs of a small batch.
        groups: of ``model``.
        wire: what the uplink and the downlink send, see ``wire.values`` and ``wire.downlink``; None: bytes are not
            asked for, and 0.
    """
    small = compact(model, masks=masks, groups=groups)
    flops = _step(small, example) / _step(model, example)
    if wire is None:
        return flops, 0.0
    assert isinstance(small.plan, Plan)
    inside = MaskSet({name: mask for name, mask in small.plan.shrink_masks(masks).items() if not bool(mask.all())})
    sent = sum(_frame(small, values, inside) for values in wire)
    return flops, sent / (len(wire) * _frame(model, "fp32"))


def _frame(model: nn.Module, values: str, masks: MaskSet | None = None) -> int:
    """Return the bytes of a frame that holds a model's parameters and floating buffers."""
    state = {name: t.detach() for name, t in model.state_dict().items() if t.is_floating_point()}
    return len(codec.encode(state, values=values, masks=masks or None, schema=codec.Schema.of(state)))


def usual_shares(groups: Groups, protect: Collection[str] = ()) -> tuple[float, float]:
    """Return the least and the most channels that are kept where the user names neither them nor a budget, as shares.

    A quarter of 16 to 64 channels is too little to learn from. The most is what leaves 28 channels of the widest
    layer, the least what leaves 20, and a quarter in wider models; between them, what keeps a round within
    ``USUAL_FLOPS`` of a dense round's FLOPs (README, "Limits, plainly"). The least stays whatever it costs: what
    cannot be removed may be dear. Layers in ``protect`` keep all of theirs and do not count.
    """
    layers = {layer: units for layer, units in groups.by_layer().items() if layer.partition(":")[0] not in protect}
    widest = max((len(units) * groups.width(layer) for layer, units in layers.items()), default=1)
    least, most = (min(1.0, max(_QUARTER, channels / widest)) for channels in _CHANNELS)
    return least, most


def _step(model: nn.Module, example: Tensor) -> int:
    twin = copy.deepcopy(model).eval()  # BatchNorm takes no batch of one otherwise
    with torch.random.fork_rng(devices=[]):
        return meter.count_flops(lambda: _total(twin(example)).backward())


def _total(output: Any) -> Tensor:
    """Return the sum of all tensors in a model's output that depend on its weights."""
    if isinstance(output, Tensor):
        return output.sum() if output.requires_grad else torch.zeros(())
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return sum((_total(part) for part in parts), torch.zeros(()))


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
