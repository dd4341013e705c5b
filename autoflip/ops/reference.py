"""Each op in a few lines of torch, at home in float64: the truth that every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

# --- masked matmul


def masked_matmul(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """``y = x @ (weight * mask).T`` for ``x (N, K)``, ``weight (O, K)``, ``mask (O, K)``."""
    return x @ torch.where(mask, weight, 0).T


# --- delta (sparse-delta coding)


# --- hessian (Gauss-Newton diagonal and traces)
