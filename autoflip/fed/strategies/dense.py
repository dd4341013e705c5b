"""Dense rivals of FedAvg: a proximal term for clients, an optimizer for the server."""

from __future__ import annotations

from torch import Tensor, nn

from autoflip.fed.config import Config
from autoflip.fed.strategies.base import Strategy

__all__ = ["FedAdam", "FedAvgM", "FedProx"]


class FedProx(Strategy):
    """Local steps on ``f_k(w) + mu/2 |w - w_received|^2``; mu is ``train.proximal``.

    Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020.
    """

    name = "fedprox"

    def __init__(self, config: Config, model: nn.Module, example: Tensor | None = None) -> None:
        super().__init__(config, model, example)
        self.proximal = config.train.proximal


class FedAvgM(Strategy):
    """Server momentum (Hsu et al., arXiv:1909.06335): ``server.momentum``, ``server.momentum_lr``."""

    name = "fedavgm"
    optimizer = "momentum"


class FedAdam(Strategy):
    """Adam on the server (Reddi et al., ICLR 2021): ``server.adam_lr``, ``server.adam_eps``."""

    name = "fedadam"
    optimizer = "adam"
