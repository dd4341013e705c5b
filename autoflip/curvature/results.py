"""What curvature answers with: diagonals and traces that say how they came about and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Diagonal(dict[str, Tensor]):
    """Parameter name -> diagonal entries shaped like the parameter, and how they came about.

    Attributes:
        method: "ggn-exact", "ggn-mc" or "hutchinson".
        matrix: "hessian" when the expected value is the Hessian's diagonal, "ggn" when it is only Gauss-Newton's.
        note: why "auto" did not take the exact method; empty when it did, or was not asked.
    """

    def __init__(self, entries: Mapping[str, Tensor], method: str, matrix: str, note: str = "") -> None:
        super().__init__(entries)
        self.method, self.matrix, self.note = method, matrix, note


@dataclass(frozen=True)
class Trace:
    """A trace and its parts.

    Attributes:
        total: sum of the diagonal over all parameters that require grad.
        stderr: standard error of ``total``, from the spread of the repeats; 0 for an exact method, infinite
            for a single one (which says nothing about its own error). Repeats are independent, but those of "xtrace":
            the covariance that their shared basis gives them (:mod:`sketch`) is in it.
        repeats: how many repeats that was; draws of ``ggn-mc`` are repeats in blocks of four.
        by_parameter: parameter name -> its part of ``total``.
        by_channel: parameter name -> ``(shape[0],)`` sums over all but the first axis, or None if not asked for.
        method: "ggn-exact", "ggn-mc" or "hutchinson".
        matrix: "hessian" or "ggn", as in Diagonal.
        note: as in Diagonal.
    """

    total: float
    stderr: float
    by_parameter: dict[str, float]
    by_channel: dict[str, Tensor] | None
    method: str
    matrix: str
    repeats: int
    note: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        """Interval that holds the expected value 19 times in 20: Student's t for the few repeats that there are."""
        freedom = self.repeats - 1
        quantile = _STUDENT[freedom - 1] if 0 < freedom <= len(_STUDENT) else 1.96 + 2.4 / max(freedom, 1)
        half = quantile * self.stderr if self.stderr else 0.0
        return self.total - half, self.total + half


def mean_of(draws: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average estimates, entry by entry."""
    total, count = dict(next(draws)), 1
    for draw in draws:
        count += 1
        for name, value in draw.items():
            total[name] += value
    return {name: value / count for name, value in total.items()}


class Tally:
    """Sums of estimates of a diagonal as they come; what they leave is a trace, their spread its standard error.

    Args:
        per: "parameter", or "channel" to keep the sums over each parameter's first axis as well.
    """

    def __init__(self, per: str) -> None:
        self.per = per
        self.totals: list[dict[str, float]] = []
        self.channels: dict[str, Tensor] = {}

    def add(self, draw: Mapping[str, Tensor]) -> None:
        """Take one estimate in."""
        rows = {n: d.reshape(len(d) if d.dim() else 1, -1).sum(1, dtype=torch.float64) for n, d in draw.items()}
        self.totals.append({name: float(row.sum()) for name, row in rows.items()})
        if self.per == "channel":
            known = self.channels
            self.channels = {name: known[name] + row if known else row for name, row in rows.items()}

    def trace(self, method: str, matrix: str, note: str = "", covariance: float = 0.0) -> Trace:
        """Return the mean of what came, and its standard error; ``covariance``: that of two estimates' totals."""
        totals, count = self.totals, len(self.totals)
        by_parameter = {name: math.fsum(t[name] for t in totals) / count for name in totals[0]}
        sums = [math.fsum(t.values()) for t in totals]
        total = math.fsum(sums) / count
        if method == "ggn-exact":
            stderr = 0.0
        elif count == 1:
            stderr = math.inf
        else:
            # the spread of estimates with a covariance c is too small by c; their mean's variance is larger by c
            stderr = math.sqrt(math.fsum((s - total) ** 2 for s in sums) / (count - 1) / count + max(covariance, 0.0))
        by_channel = {name: value / count for name, value in self.channels.items()} if self.per == "channel" else None
        return Trace(total, stderr, by_parameter, by_channel, method, matrix, count, note)


def trace_of(
    draws: Iterator[dict[str, Tensor]], per: str, method: str, matrix: str, note: str = "", covariance: float = 0.0
) -> Trace:
    """Sum estimates of the diagonal; their spread is the standard error."""
    tally = Tally(per)
    for draw in draws:
        tally.add(draw)
    return tally.trace(method, matrix, note, covariance)
