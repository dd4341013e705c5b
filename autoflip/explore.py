"""Exploration: clients feel the loss landscape from the common start; the server fuses it into guidance.

A client trains a little from the common start and reports its deviation ``d_k``. The server needs sums only,
so secure aggregation still fits: ``S1 = sum_k n_k d_k`` and ``S2 = sum_k n_k d_k^2``. From them, with
``n = sum_k n_k``:

* *guidance* ``S2 / n``: how far the clients' losses moved a weight (AutoFLIP, arXiv:2405.10271);
* *agreement* ``S1^2 / (n S2)``: in [0, 1], 1 when all clients moved it the same way;
* *signal*: what pruning ranks by, see :data:`SIGNALS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoflip import curvature as _curvature
from autoflip import meter

__all__ = ["SIGNALS", "Scores", "Scout", "Sums", "guide", "local_steps", "scout"]

LossFn = Callable[[Tensor, Tensor], Tensor]

SIGNALS = {
    "deviation": "S2 / n: the paper's mean squared deviation, without its normalisation",
    "fisher": "w^2 S2 / n at the explored weights w: squared deviations stand for the Fisher diagonal (no extra bytes)",
    "curvature": "w^2 h at the explored weights w: Gauss-Newton diagonal h, one more upload per explorer (OBD)",
    "magnitude": "w^2 at the explored weights w",
}


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


class Scores(Mapping[str, Tensor]):
    """Name -> score per weight, higher = keep; ``prune.hybrid`` takes it as it is.

    Attributes:
        guidance: ``S2 / n`` divided by its tensor's maximum, in [0, 1].
        agreement: ``S1^2 / (n S2)``, in [0, 1].
        deviation: ``S2 / n``, not normalised (what the paper's rule starts from).
        signal: name of the signal that the scores rank by.
    """

    def __init__(
        self,
        ranking: Mapping[str, Tensor],
        deviation: Mapping[str, Tensor],
        agreement: Mapping[str, Tensor],
        signal: str,
    ) -> None:
        self._ranking = dict(ranking)
        self.deviation = dict(deviation)
        self.agreement = dict(agreement)
        self.signal = signal

    @property
    def guidance(self) -> dict[str, Tensor]:
        """``S2 / n`` divided by its tensor's maximum (a tensor that nothing moved is all zero)."""
        return {name: d / d.max() if d.numel() and d.max() > 0 else d for name, d in self.deviation.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._ranking[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranking)

    def __len__(self) -> int:
        return len(self._ranking)


class Sums:
    """The server's side: adds scouts up as they land; memory does not grow with their number.

    Args:
        start: the common start, name -> float tensor.
    """

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self.start = dict(start)
        self.weight = 0.0
        self.first = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in start.items()}
        self.second = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in start.items()}
        self.curved: dict[str, Tensor] | None = None

    def add(self, delta: Mapping[str, Tensor], weight: float, curvature: Mapping[str, Tensor] | None = None) -> None:
        """Add one client's deviation (and curvature), weighted by its number of examples.

        Raises:
            ValueError: ``weight`` is not positive, or a tensor is missing or has another shape.
        """
        if not weight > 0:
            raise ValueError(f"explore: weight {weight!r} of a scout; wanted its number of examples, above 0")
        for name, start in self.start.items():
            if name not in delta or delta[name].shape != start.shape:
                got = tuple(delta[name].shape) if name in delta else "nothing"
                raise ValueError(
                    f"explore: deviation {name!r} has {got}, wanted shape {tuple(start.shape)}; "
                    "did all scouts leave from the same model?"
                )
        for name in self.start:
            self.first[name].add_(delta[name], alpha=weight)
            self.second[name].addcmul_(delta[name], delta[name], value=weight)
        if curvature is not None:
            if self.curved is None:
                self.curved = {name: torch.zeros_like(h) for name, h in curvature.items()}
            for name, h in curvature.items():
                self.curved[name].add_(h, alpha=weight)
        self.weight += weight

    def mean(self) -> dict[str, Tensor]:
        """Return the weighted mean deviation ``S1 / n``: one round of federated averaging."""
        return {name: s / self.weight for name, s in self.first.items()}

    def scores(self, signal: str = "fisher") -> Scores:
        """Return the fused guidance.

        Raises:
            ValueError: no scout was added, the signal is unknown, or it needs curvature that nobody sent.
        """
        if not self.weight:
            raise ValueError("explore: no scout was added; guidance needs at least one")
        if signal not in SIGNALS:
            raise ValueError(f"explore: unknown signal {signal!r}; wanted one of {', '.join(SIGNALS)}")
        if signal == "curvature" and self.curved is None:
            raise ValueError("explore: signal 'curvature' needs scouts made with curvature=True")
        deviation = {name: s / self.weight for name, s in self.second.items()}
        agreement = {
            name: (self.first[name] ** 2 / (self.weight * s).clamp_min(1e-38)).clamp_(0, 1)
            for name, s in self.second.items()
        }
        ranking = {}
        for name, start in self.start.items():
            explored = start + self.first[name] / self.weight
            if signal == "deviation":
                ranking[name] = deviation[name]
            elif signal == "fisher":
                ranking[name] = explored**2 * deviation[name]
            elif signal == "magnitude":
                ranking[name] = explored**2
            elif self.curved is not None and name in self.curved:
                ranking[name] = explored**2 * self.curved[name] / self.weight
        return Scores(ranking, deviation, agreement, signal)


def guide(scouts: Sequence[Scout], weights: Sequence[float] | None = None, *, signal: str = "fisher") -> Scores:
    """Fuse scouts into scores, from sums only.

    Args:
        scouts: what :func:`scout` returned, all from the same start.
        weights: one positive number per scout; None: its number of examples.
        signal: what pruning will rank by, one of :data:`SIGNALS`.

    Raises:
        ValueError: no scouts, another number of weights, or scouts that do not fit each other.
    """
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
        data: ``(inputs, targets)`` tensors, or an iterable of such batches.
        loss_fn: ``loss_fn(output, target)``, a scalar.
        epochs: passes over the data.
        seed: of the order of the examples.
        lr: learning rate of local SGD.
        momentum: of local SGD.
        batch_size: examples a step.
        curvature: also measure the Gauss-Newton diagonal at the explored weights (arXiv:2405.10271 has none;
            Optimal Brain Damage, LeCun et al. 1990, ranks by it).

    Raises:
        ValueError: the data is empty or the loss is not finite.
    """
    import copy

    inputs, targets = _tensors(data)
    explorer = copy.deepcopy(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with meter.measure(explorer) as cost:
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


def local_steps(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    generator: torch.Generator | None = None,
    on_batch: Callable[[Tensor, Tensor], None] | None = None,
) -> float:
    """Train ``model`` in place by local SGD and return the mean loss of the last epoch.

    Args:
        model: trained in place.
        inputs: ``(n, ...)``.
        targets: ``(n, ...)``.
        loss_fn: mean loss of a batch.
        epochs: passes over the data.
        batch_size: examples a step; the last batch may be smaller.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of SGD.
        clip_norm: largest norm of a step's gradient; 0: no clipping.
        generator: decides the order of the examples.
        on_batch: called before each step with its batch (the ledger counts FLOPs there).

    Raises:
        ValueError: there are no examples, or the loss is not finite.
    """
    count = len(targets)
    if not count:
        raise ValueError("local_steps: there are no examples; wanted at least one per client")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    model.train()
    total = 0.0
    for _ in range(epochs):
        total = 0.0
        for chosen in torch.randperm(count, generator=generator).split(batch_size):
            x, y = inputs[chosen], targets[chosen]
            if on_batch is not None:
                on_batch(x, y)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(model(x), y)
            loss.backward()
            if clip_norm:
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            total += float(loss.detach()) * len(y)
    mean = total / count
    if not mean < float("inf"):
        raise ValueError(f"local_steps: the training loss is {mean}; lower train.lr (it is {lr:g}) or look at the data")
    return mean


def _tensors(data: Any) -> tuple[Tensor, Tensor]:
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        inputs, targets = data
    elif isinstance(data, Iterable):
        pairs = [(x, y) for x, y in data]
        if not pairs:
            raise ValueError("scout: the data is empty; wanted (inputs, targets) or batches of them")
        inputs = torch.cat([torch.as_tensor(x) for x, _ in pairs])
        targets = torch.cat([torch.as_tensor(y).reshape(-1) for _, y in pairs])
    else:
        raise ValueError(f"scout: data is {type(data).__name__}; wanted (inputs, targets) or an iterable of batches")
    if len(inputs) != len(targets):
        raise ValueError(f"scout: {len(inputs)} inputs but {len(targets)} targets; wanted one target an input")
    return inputs, targets
