"""How draws are dealt to the samples: to each by its share of the loss's curvature at the output.

A trained network is sure of most samples, whose second derivative at the output is next to nothing, and a few carry
the curvature. A sample's trace there, ``h_n = tr S_n S_n^T``, is known from the output alone. With ``M`` rows to deal,
a sample is due ``m_n = M h_n / sum h`` of them, at most ``most``. It gets ``k_n``, the power of two below that,
whose signs are orthogonal; one that is due less than one gets one with the chance ``m_n``, weighted with its inverse
(systematic sampling, Madow 1949). Both leave the expected value as it is. What full samples leave is not dealt again:
it would go to those that carry little.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoflip import ops

# draws -> rows dealt, by samples of the batch: where the model runs again on them, and where its layers go on with them
_AGAIN = {1: 0.75, 2: 1.0, 3: 1.125, 4: 1.25}
_ONWARD = {1: 0.75, 2: 1.25, 3: 1.5, 4: 1.75}
# rows of one sample; two orthogonal draws err less than four independent ones
_MOST = 4
# samples that carry the curvature, by samples of the batch: with more of them dealing saves less than it costs
_MOST_ALIKE = 0.6
_LEAST_SAMPLES = 32  # of fewer a draw each costs little more than the calls it makes


@dataclass(frozen=True)
class Rows:
    """What is looked at: M rows, a sample's next to each other.

    Attributes:
        samples: ``(M,)``, int64: the sample that each row is.
        turns: ``(M,)``, int64: which of its sample's draws it is.
        scale: ``(M,)``, float64: factor of the row's gradient at the output, ``k_n^-1/2`` or ``m_n^-1/2``.
    """

    samples: Tensor
    turns: Tensor
    scale: Tensor

    def to(self, device: torch.device) -> Rows:
        """Return the same on a device."""
        return Rows(self.samples.to(device), self.turns.to(device), self.scale.to(device))


def effective(weight: Tensor) -> float:
    """Return how many samples would carry the curvature if all carried alike: ``(sum h)^2 / sum h^2``."""
    total = float(weight.sum())
    return total * total / float(weight.dot(weight)) if total > 0 else 0.0


def deal(weight: Tensor, budget: float, most: int, chance: float) -> Rows:
    """Deal rows out.

    Args:
        weight: ``(N,)``, float64 on the CPU, no entry below 0, some above: ``h_n``.
        budget: ``M``; fewer rows are dealt where samples are full.
        most: rows of one sample, a power of two.
        chance: uniform in [0, 1): where the sampling begins.
    """
    return Rows(*ops.deal_rows(weight, budget, most, chance))


def rows_for(weight: Tensor, draws: int, factors: int, *, again: bool) -> Rows | None:
    """Return the rows that ``draws`` a sample are worth, None where dealing saves nothing: every sample gets its draws.

    That is where there are few samples, or all carry much alike, or many draws to average. Draws one number from
    torch's generator where it deals.

    Args:
        weight: ``(N,)``: ``h_n``.
        draws: wanted of every sample.
        factors: columns of ``S_n``; as many orthogonal draws are exact.
        again: whether the model has to run again on the rows.
    """
    h, budget = weight.detach().double().cpu(), _AGAIN if again else _ONWARD
    if draws not in budget or len(h) < _LEAST_SAMPLES or effective(h) > _MOST_ALIKE * len(h):
        return None
    most = min(_MOST, 2 * power_from(draws), power_from(factors))
    return deal(h, budget[draws] * len(h), most, float(torch.rand((), dtype=torch.float32)))


def power_from(count: int) -> int:
    """Return the power of two from ``count`` up."""
    return 1 << (count - 1).bit_length()
