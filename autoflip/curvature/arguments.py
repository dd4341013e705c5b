"""Arguments that curvature's functions share: what they may be, and what a method's name stands for."""

from __future__ import annotations

from torch import Tensor, nn

from autoflip.curvature import sketch
from autoflip.curvature.gauss_newton import GaussNewton
from autoflip.curvature.problem import LossFn, Problem

__all__ = ["METHODS", "blocks_of", "check_counts", "check_per", "checked", "matrix_of"]

METHODS = ("auto", "ggn-mc", "ggn-exact", "hutchinson", "hutch++", "xtrace")
# draws with orthogonal signs: their errors cancel; the spread of the blocks is what the standard error comes from
_TRACE_BLOCK = 4


def checked(
    model: nn.Module, loss_fn: LossFn, batch: tuple[Tensor, Tensor], num_probes: int, method: str, chunk: int | None
) -> Problem:
    """Return what is asked about.

    Raises:
        ValueError: model, loss, batch or arguments do not fit.
    """
    if method not in METHODS:
        raise ValueError(f"curvature: there is no method {method!r}; there are {', '.join(METHODS)}")
    check_counts(num_probes, chunk)
    if num_probes < sketch.LEAST.get(method, 1):
        raise ValueError(
            f"curvature: {method} with num_probes={num_probes}; it needs at least {sketch.LEAST[method]} products"
        )
    return Problem.of(model, loss_fn, batch)


def check_counts(num_probes: int, chunk: int | None) -> None:
    """Raise ValueError unless both are numbers of something; ``chunk`` may be None."""
    if not all(isinstance(count, int) and count >= 1 for count in (num_probes, 1 if chunk is None else chunk)):
        raise ValueError(f"curvature: num_probes={num_probes!r}, chunk={chunk!r}; both must be whole and at least 1")


def check_per(function: str, per: str) -> None:
    """Raise ValueError unless a trace can be given ``per`` that."""
    if per not in ("parameter", "channel"):
        raise ValueError(f"{function}: per={per!r}; wanted 'parameter' or 'channel'")


def blocks_of(draws: int) -> tuple[int, int]:
    """Return how many independent blocks of how many draws a trace makes: whole ones, where there are two."""
    size = _TRACE_BLOCK if draws >= 2 * _TRACE_BLOCK else 1
    return -(-draws // size), size


def matrix_of(gn: GaussNewton) -> str:
    """Return whose diagonal the expected value is, as results say it."""
    return "ggn" if gn.graph.curved else "hessian"
