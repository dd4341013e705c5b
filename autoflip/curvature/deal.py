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
from autoflip.curvature.root import Root
from autoflip.curvature.signs import signs_of

# draws -> rows dealt, by samples of the batch: where the model runs again on them, and where its layers go on.
# An estimate errs by the root of its rows: beyond _ALL_COUNT samples, rows grow with the root of the batch only
_AGAIN = {1: 0.75, 2: 1.0, 3: 1.125, 4: 1.25}
_ONWARD = {1: 0.75, 2: 1.25, 3: 1.5, 4: 1.75}
# rows of one sample; two orthogonal draws err less than four independent ones
_MOST = 4
# samples that carry the curvature, by samples of the batch: with more of them dealing saves less than it costs
_MOST_ALIKE = 0.6
_ALL_COUNT = 128
_LEAST_SAMPLES = 32  # of fewer a draw each costs little more than the calls it makes


@dataclass(frozen=True)
class Rows:
    """What is looked at: M rows, a sample's next to each other.

    Attributes:
        samples: ``(M,)``, int64: the sample that each row is.
        v: ``(M, ...)``: each row's gradient at the output, weighted with ``k_n^-1/2`` or ``m_n^-1/2``.
    """

    samples: Tensor
    v: Tensor


def rows_for(root: Root, output: Tensor, seed: int, draws: int, *, again: bool) -> Rows | None:
    """Return the rows that ``draws`` a sample are worth, None where dealing saves nothing: every sample gets its draws.

    That is where there are few samples, or all carry much alike, or many draws to average. Draws one number from
    torch's generator.

    Args:
        root: the loss's factors; as many orthogonal draws as it has are exact.
        output: of the batch, ``(N, width)``.
        seed: of the signs.
        draws: wanted of every sample.
        again: whether the model has to run again on the rows.
    """
    budget = _AGAIN if again else _ONWARD
    if draws not in budget or len(output) < _LEAST_SAMPLES:
        return None
    most = min(_MOST, 2 * power_from(draws), power_from(root.factors))
    rows = budget[draws] * min(len(output), (_ALL_COUNT * len(output)) ** 0.5)
    chance = float(torch.rand((), dtype=torch.float32))
    if root.softmax is not None:
        f, scale = root.softmax
        found = ops.softmax_deal(f, scale, seed, rows, most, _MOST_ALIKE, chance)
    else:
        signs = signs_of(output, tuple(output.shape), seed, 0, 1)
        found = ops.deal_draw(root.weight(), root.draw, signs, rows, most, _MOST_ALIKE, chance)
    return None if found is None else Rows(*found)


def power_from(count: int) -> int:
    """Return the power of two from ``count`` up."""
    return 1 << (count - 1).bit_length()
