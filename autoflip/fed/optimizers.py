"""The server's optimizer: torch.optim on the pseudo-gradient, the negative mean update of the clients.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (FedAdam); Hsu et al., "Measuring the Effects of
Non-Identical Data Distribution for Federated Visual Classification", arXiv:1909.06335 (FedAvgM).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoflip.fed.sections import Server
from autoflip.masks import MaskSet

__all__ = ["OPTIMIZERS", "ServerOptimizer"]


@dataclass(frozen=True)
class ServerOptimizer:
    """One step of a torch optimizer over named tensors; between rounds its state is plain tensors.

    Attributes:
        make: parameters -> optimizer.
    """

    make: Callable[[list[Tensor]], torch.optim.Optimizer]

    def step(
        self,
        params: Mapping[str, Tensor],
        mean: Mapping[str, Tensor],
        memory: Mapping[str, Tensor],
        trained: Sequence[str],
        masks: MaskSet | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the parameters after the step, and the new memory.

        Args:
            params: name -> float32 tensor: parameters and floating buffers.
            mean: name -> mean update of the clients.
            memory: what this returned the round before, ``slot/name`` -> tensor; empty at first.
            trained: names of the parameters; buffers, such as running means, take the plain mean.
            masks: pruned weights stay zero and leave no trace in the memory.
        """
        after = {name: value + mean[name] for name, value in params.items()}
        leaves = [torch.nn.Parameter(params[name].clone()) for name in trained]
        optimizer = self.make(list(leaves))
        slots: dict[str, list[str]] = {}
        for key in memory:
            slot, _, name = key.partition("/")
            slots.setdefault(name, []).append(slot)
        for name, leaf in zip(trained, leaves, strict=True):
            leaf.grad = -mean[name]
            if name in slots:
                optimizer.state[leaf] = {slot: memory[f"{slot}/{name}"].clone() for slot in slots[name]}
        optimizer.step()
        kept: dict[str, Tensor] = {}
        for name, leaf in zip(trained, leaves, strict=True):
            after[name] = leaf.detach()
            for slot, value in optimizer.state[leaf].items():
                if isinstance(value, Tensor):
                    kept[f"{slot}/{name}"] = value
        if masks is not None:
            for name in masks:
                if name in after:
                    mask = masks[name]
                    after[name] = torch.where(mask, after[name], 0.0)
                    for key, value in kept.items():
                        if key.partition("/")[2] == name and value.shape == mask.shape:
                            kept[key] = torch.where(mask, value, 0.0)
        return after, kept


def _momentum(server: Server) -> ServerOptimizer:
    return ServerOptimizer(lambda p: torch.optim.SGD(p, lr=server.momentum_lr, momentum=server.momentum))


def _adam(server: Server) -> ServerOptimizer:
    # betas of Reddi et al.; torch's bias correction stays in, without it the first rounds hardly move
    return ServerOptimizer(
        lambda p: torch.optim.Adam(p, lr=server.adam_lr, betas=(0.9, 0.99), eps=server.adam_eps, foreach=False)
    )


OPTIMIZERS: dict[str, Callable[[Server], ServerOptimizer] | None] = {
    "none": None,
    "momentum": _momentum,
    "adam": _adam,
}
