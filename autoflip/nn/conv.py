"""A convolution with pruned weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from autoflip.nn.masked import Masked

__all__ = ["MaskedConv2d"]


class MaskedConv2d(Masked, nn.Conv2d):
    """``torch.nn.Conv2d`` on ``weight * mask``; torch's own until a mask is set.

    Single pruned weights save bytes on the wire but no time here: the dense convolution runs at 65 to 100 % of
    a CPU's peak, which no sparse one reaches below very low densities. Time and FLOPs fall when whole channels
    go: :func:`autoflip.compact` removes them.

    Arguments, parameters and ``state_dict()`` are torch's. Pruned weights are zero, get exactly zero
    gradients, and so stay zero under SGD with momentum and weight decay and under Adam(W). Momentum gathered
    before the mask counts for nothing: ``forward`` ignores what it leaves, ``state_dict()`` sets it to zero.
    """

    def set_mask(self, mask: Tensor | None) -> None:
        """Keep the weights where ``mask`` (bool, shaped like ``weight``) is True, None = keep all.

        Raises:
            ValueError: ``mask`` is no bool tensor shaped like ``weight``.
        """
        self._set_masks({} if mask is None else {"weight": mask})

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``input`` with the kept weights plus the bias."""
        bias: Any = self.bias
        return self._conv_forward(input, self._effective("weight"), bias)
