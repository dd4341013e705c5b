"""The truth in float64 on the piece of a piecewise linear network that its float32 run is on.

Where ReLU's input is 0 up to rounding, float32 and float64 may stand on two sides of the kink. Each then is right about
its own side, the gradients as little alike as the curvatures (one of 2.7 million gates of a trained ResNet-8: 1.5e-4
and 6e-5). What is to be measured is the rounding of sums, so the gates are taken over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_RELU = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_POOL = (F.max_pool2d,)


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.gates: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RELU:
            self.gates.append(args[0].detach() > 0)
        if func in _POOL:
            self.gates.append(F.max_pool2d(*args, **kwargs | {"return_indices": True})[1])
        return func(*args, **kwargs)


class _Follower(TorchFunctionMode):
    def __init__(self, gates: Sequence[Tensor]) -> None:
        super().__init__()
        self.gates = iter(gates)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RELU:
            return args[0] * next(self.gates)
        if func in _POOL:
            at = next(self.gates)
            return args[0].flatten(2).gather(2, at.flatten(2)).view(at.shape)
        return func(*args, **(kwargs or {}))


def gates_of(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """Return what opens and closes in a forward pass: a mask of each ReLU, the chosen positions of each max-pooling."""
    with torch.no_grad(), _Recorder() as recorder:
        model(x)
    return recorder.gates


def apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> int:
    """Return how many gates differ."""
    return sum(int((a != b).sum()) for a, b in zip(one, other, strict=True))


@contextmanager
def following(gates: Sequence[Tensor]) -> Iterator[None]:
    """Let the one forward pass in the block stand on these gates' piece, whatever its own numbers say."""
    with _Follower(gates):
        yield
