"""What no kernel for a masked layer's training step can go below here, measured beside it: torch's autograd, memory.

``nothing``: the same step through one autograd function that allocates y, dx, dw and db and computes nothing.
``memory``: the lines of the weight that hold a kept entry are read once, and its dense gradient is written once.
The floor is ``nothing + max(multiply-adds at the core's peak, memory)``; activations are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LINE = 16  # float32 values that memory moves together


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.empty(shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *(torch.empty(t.shape) for t in ctx.saved_tensors), None


class Nothing(nn.Module):
    """A layer with a weight and a bias that does no work."""

    def __init__(self, weight: Tensor, bias: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.bias, self.shape = nn.Parameter(weight), nn.Parameter(bias), shape

    def forward(self, input: Tensor) -> Tensor:
        """Return memory shaped like the layer's output."""
        return _Nothing.apply(input, self._parameters["weight"], self._parameters["bias"], self.shape)


def memory(mask: Tensor) -> Callable[[], object]:
    """Return a function that moves what the step must move of a weight under ``mask``."""
    flat = mask.flatten()
    lines = int(flat[: len(flat) // LINE * LINE].view(-1, LINE).any(1).sum())
    read, written = torch.zeros(max(1, lines) * LINE), torch.empty(mask.numel())

    def move() -> object:
        written.zero_()
        return torch.dot(read, read)

    return move


def floor(case: dict) -> float | None:
    """Return a case's floor as a share of the dense step; None where it was not measured."""
    ratio = case["ratio"]
    if "nothing" not in ratio or not case["roof"]:
        return None
    return ratio["nothing"][1] + max(case["roof"], ratio["memory"][1])
