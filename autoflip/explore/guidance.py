"""The server's side of exploration: sums over clients, and what pruning makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["SIGNALS", "Scores", "Sums", "rank"]

SIGNALS = {
    "deviation": "S2 / n: the paper's mean squared deviation, without its normalisation",
    "fisher": "w^2 S2 / n at the explored weights w: squared deviations stand for the Fisher diagonal (no extra bytes)",
    "curvature": "w^2 h at the explored weights w: Gauss-Newton diagonal h, one more upload per explorer (OBD)",
    "magnitude": "w^2 at the explored weights w",
}


def rank(signal: str, weight: Tensor, importance: Tensor) -> Tensor:
    """Return what a signal ranks each weight by.

    Args:
        signal: one of :data:`SIGNALS`.
        weight: the explored weights.
        importance: ``S2 / n``, or the Gauss-Newton diagonal for "curvature".
    """
    if signal == "deviation":
        return importance
    return weight**2 if signal == "magnitude" else weight**2 * importance


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

    def __repr__(self) -> str:
        entries = sum(score.numel() for score in self._ranking.values())
        return f"Scores({len(self)} tensors, {entries} entries, by {self.signal!r})"


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
        self._curved_weight = 0.0  # of the clients that brought curvature
        self._absent: dict[str, Tensor] = {}  # weight of the clients that do not hold an entry

    def add(
        self,
        delta: Mapping[str, Tensor],
        weight: float,
        curvature: Mapping[str, Tensor] | None = None,
        held: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add one client's deviation (and curvature), weighted by its number of examples.

        Args:
            delta: deviation, name -> tensor.
            weight: of the client.
            curvature: name -> Gauss-Newton diagonal.
            held: name -> mask of what the client has at all, where others may have more: an entry's mean and
                agreement are those of its holders.

        Raises:
            ValueError: ``weight`` is not positive, or a tensor is missing or has another shape.
        """
        if not 0 < weight < float("inf"):
            raise ValueError(f"explore: weight {weight!r} of a scout; wanted its number of examples, above 0")
        for name, start in self.start.items():
            if name not in delta or delta[name].shape != start.shape:
                got = tuple(delta[name].shape) if name in delta else "nothing"
                raise ValueError(
                    f"explore: deviation {name!r} has {got}, wanted shape {tuple(start.shape)}; "
                    "did all scouts leave from the same model?"
                )
        if curvature is not None and self.curved is not None and curvature.keys() != self.curved.keys():
            raise ValueError(
                f"explore: curvature of {sorted(curvature)[:4]}, wanted that of {sorted(self.curved)[:4]}, as of the "
                "scouts before; did all compute it over the same parameters?"
            )
        for name in self.start:
            self.first[name].add_(delta[name], alpha=weight)
            self.second[name].addcmul_(delta[name], delta[name], value=weight)
        for name, mask in (held or {}).items():
            absent = weight * (~mask).float()
            self._absent[name] = self._absent[name] + absent if name in self._absent else absent
        if curvature is not None:
            if self.curved is None:
                self.curved = {name: torch.zeros_like(h) for name, h in curvature.items()}
            for name, h in curvature.items():
                self.curved[name].add_(h, alpha=weight)
            self._curved_weight += weight
        self.weight += weight

    def mean(self) -> dict[str, Tensor]:
        """Return the weighted mean deviation ``S1 / n``: one round of federated averaging."""
        return {name: s / self._of(name) for name, s in self.first.items()}

    def _of(self, name: str) -> Tensor | float:
        """Return ``n``, the weight of the clients that hold each entry; where nobody does, sums are 0 over any."""
        return (self.weight - self._absent[name]).clamp_min(1e-30) if name in self._absent else self.weight

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
        deviation = {name: s / self._of(name) for name, s in self.second.items()}
        agreement = {
            name: (self.first[name] ** 2 / (self._of(name) * s).clamp_min(1e-38)).clamp_(0, 1)
            for name, s in self.second.items()
        }
        ranking = {}
        for name, start in self.start.items():
            explored = start + self.first[name] / self._of(name)
            if signal != "curvature":
                ranking[name] = rank(signal, explored, deviation[name])
            elif self.curved is not None and name in self.curved:
                ranking[name] = rank(signal, explored, self.curved[name] / self._curved_weight)
        return Scores(ranking, deviation, agreement, signal)
