"""Exploration: clients feel the loss landscape from the common start; the server fuses it into guidance.

A client trains a little from the common start and reports its deviation ``d_k``. The server needs sums only,
so secure aggregation still fits: ``S1 = sum_k n_k d_k`` and ``S2 = sum_k n_k d_k^2``. From them, with
``n = sum_k n_k``:

* *guidance* ``S2 / n``: how far the clients' losses moved a weight (AutoFLIP, arXiv:2405.10271);
* *agreement* ``S1^2 / (n S2)``: in [0, 1], 1 when all clients moved it the same way;
* *signal*: what pruning ranks by, see :data:`SIGNALS`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from autoflip import curvature as _curvature
from autoflip import meter
from autoflip.explore.guidance import SIGNALS, Scores, Sums, rank
from autoflip.explore.local import LossFn, local_steps

__all__ = [
    "SIGNALS",
    "Scores",
    "Scout",
    "Sums",
    "absolute_gradient",
    "curvature_diagonal",
    "guide",
    "local_steps",
    "rank",
    "scout",
]


@dataclass(frozen=True)
class Scout:
    """What one client brings back from exploring.

    Attributes:
        start: the common start, parameter name -> tensor.
        delta: the deviation ``d_k = explored - start``.
        curvature: Gauss-Newton diagonal at the explored weights, or None when it was not asked for.
        num_examples: training examples of the client.
        loss: mean training loss of the last epoch.
        cost: FLOPs and seconds spent.
    """

    start: Mapping[str, Tensor]
    delta: Mapping[str, Tensor]
    curvature: Mapping[str, Tensor] | None
    num_examples: int
    loss: float
    cost: meter.Cost = field(default_factory=meter.Cost)

    def __repr__(self) -> str:
        also = "" if self.curvature is None else ", with curvature"
        return (
            f"Scout({len(self.delta)} tensors{also}, {self.num_examples} examples, loss {self.loss:.4g}, "
            f"{self.cost.flops:.3g} FLOPs, {self.cost.seconds:.3g} s)"
        )


def guide(scouts: Iterable[Scout], weights: Sequence[float] | None = None, *, signal: str = "fisher") -> Scores:
    """Fuse scouts into scores, from sums only.

    Args:
        scouts: what :func:`scout` returned, all from the same start.
        weights: one positive number per scout; None: its number of examples.
        signal: what pruning will rank by, one of :data:`SIGNALS`.

    Raises:
        ValueError: no scouts, another number of weights, or scouts that do not fit each other.
    """
    scouts = list(scouts)
    if not scouts:
        raise ValueError("guide: no scouts; send at least one client exploring")
    shares = [s.num_examples for s in scouts] if weights is None else list(weights)
    if len(shares) != len(scouts):
        raise ValueError(f"guide: {len(shares)} weights for {len(scouts)} scouts; wanted one for each")
    sums = Sums(scouts[0].start)
    for one, share in zip(scouts, shares):
        sums.add(one.delta, float(share), one.curvature)
    return sums.scores(signal)


def scout(
    model: nn.Module,
    data: Any,
    loss_fn: LossFn,
    epochs: int = 1,
    seed: int = 0,
    *,
    lr: float = 0.05,
    momentum: float = 0.9,
    batch_size: int = 32,
    curvature: bool = False,
) -> Scout:
    """Explore the loss landscape of one client from the common start; ``model`` itself stays as it is.

    Args:
        model: the common start; any module.
        data: ``(inputs, targets)``, tensors or arrays, a ``torch.utils.data.Dataset`` of pairs, or an iterable of such
            batches (a ``DataLoader``).
        loss_fn: ``loss_fn(output, target)``, a scalar.
        epochs: passes over the data.
        seed: of the order of the examples.
        lr: learning rate of local SGD.
        momentum: of local SGD.
        batch_size: examples a step.
        curvature: also measure the Gauss-Newton diagonal at the explored weights (arXiv:2405.10271 has none;
            Optimal Brain Damage, LeCun et al. 1990, ranks by it).

    Raises:
        ValueError: the data is empty, the loss is not finite, or ``epochs`` or ``batch_size`` is below 1.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"scout: epochs={epochs!r}; wanted a whole number of passes over the data, at least 1")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"scout: batch_size={batch_size!r}; wanted a whole number of examples, at least 1")
    inputs, targets = _tensors(data)
    explorer = copy.deepcopy(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.random.fork_rng(devices=[]), meter.measure(explorer) as cost:
        torch.manual_seed(seed)  # dropout
        generator = torch.Generator().manual_seed(seed)
        loss = local_steps(
            explorer, inputs, targets, loss_fn, epochs=epochs, batch_size=batch_size, lr=lr, momentum=momentum,
            generator=generator,
        )  # fmt: skip
        curved = curvature_diagonal(explorer, inputs, targets, loss_fn, seed=seed) if curvature else None
    delta = {name: p.detach() - start[name] for name, p in explorer.named_parameters()}
    return Scout(start, delta, curved, len(targets), loss, cost)


def curvature_diagonal(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFn, *, seed: int, examples: int = 128
) -> dict[str, Tensor]:
    """Return the Gauss-Newton diagonal on at most ``examples`` examples, one Monte-Carlo draw."""
    batch = inputs[:examples], targets[:examples]
    return _curvature.hessian_diagonal(model, loss_fn, batch, num_probes=1, seed=seed, method="ggn-mc")


def absolute_gradient(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFn, *, seed: int = 0, examples: int = 128
) -> dict[str, Tensor]:
    """Return name -> ``|dL/dw|`` of the mean loss on at most ``examples`` examples; the model stays as it is.

    Dropout draws from ``seed``; torch's generator is left as it was.
    """
    twin = copy.deepcopy(model).train()
    parameters = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("absolute_gradient: no parameter of the model requires grad; wanted at least one")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        loss = loss_fn(twin(inputs[:examples]), targets[:examples])
        found = torch.autograd.grad(loss, tuple(parameters.values()), allow_unused=True)
    return {n: g.abs() for n, g in zip(parameters, found) if g is not None}


def _tensors(data: Any) -> tuple[Tensor, Tensor]:
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, (Tensor, np.ndarray)) for t in data):
        inputs, targets = (torch.as_tensor(t) for t in data)
    elif isinstance(data, (Dataset, Iterable)):
        if isinstance(data, Dataset):
            data = DataLoader(data, batch_size=256, generator=torch.Generator())  # the global one stays as it is
        pairs = [(x, y) for x, y in data]
        if not pairs:
            raise ValueError("scout: the data is empty; wanted (inputs, targets) or batches of them")
        inputs = torch.cat([torch.as_tensor(x) for x, _ in pairs])
        targets = torch.cat([torch.atleast_1d(torch.as_tensor(y)) for _, y in pairs])
    else:
        raise ValueError(
            f"scout: data is {type(data).__name__}; wanted (inputs, targets), a Dataset of pairs or an "
            "iterable of batches"
        )
    if len(inputs) != len(targets):
        raise ValueError(f"scout: {len(inputs)} inputs but {len(targets)} targets; wanted one target an input")
    return inputs, targets
