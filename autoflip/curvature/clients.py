"""Many clients' curvature at one model, several clients a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from autoflip.curvature.arguments import blocks_of, check_per, checked, matrix_of
from autoflip.curvature.gauss_newton import GaussNewton, MixedError
from autoflip.curvature.problem import LossFn, Problem
from autoflip.curvature.results import Diagonal, Tally, Trace

__all__ = ["client_diagonals", "client_traces"]

Batches = Sequence[tuple[Tensor, Tensor]]
T = TypeVar("T")


def client_diagonals(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Batches,
    num_probes: int = 1,
    seed: int = 0,
    method: str = "ggn-mc",
    *,
    chunk: int | None = None,
    samples: int = 256,
) -> list[Diagonal]:
    """Return many clients' Gauss-Newton diagonals at one model, several clients a pass.

    Each is that of the client's own loss, as :func:`hessian_diagonal` gives it (draws differ, since signs go by place).
    Small batches share the price of a pass; large ones gain nothing from it on a CPU. Models whose parameters do
    not all belong to known layers, or that mix samples, are looked at client by client.

    Args:
        model: as for :func:`hessian_diagonal`, like the next.
        loss_fn: scalar loss, of each client by itself.
        batches: one ``(inputs, target)`` a client; inputs alike but for the number of samples.
        num_probes: draws for "ggn-mc".
        seed: of the draws.
        method: "ggn-mc" or "ggn-exact".
        chunk: factors held at once (None: as for one); bounds the peak memory, as does the next.
        samples: most samples in a pass; a client with more has one of its own.

    Raises:
        NotDescribedError: Gauss-Newton does not describe this loss.
        ValueError: model, loss, a batch or arguments do not fit; the message says which.
    """

    def look(gn: GaussNewton) -> list[Diagonal]:
        found = gn.exact() if method == "ggn-exact" else gn.mean(num_probes)
        return [Diagonal(one, method, matrix_of(gn)) for one in found]

    problems = _problems("client_diagonals", model, loss_fn, batches, num_probes, method, chunk)
    return _each(problems, seed, chunk, samples, look)


def client_traces(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Batches,
    num_probes: int = 32,
    seed: int = 0,
    per: str = "parameter",
    method: str = "ggn-mc",
    *,
    chunk: int | None = None,
    samples: int = 256,
) -> list[Trace]:
    """Return many clients' Gauss-Newton traces at one model with their standard errors, several clients a pass.

    Each is that of the client's own loss, as :func:`hessian_trace` gives it (draws differ, since signs go by place).
    What shares a pass, and what does not, is as for :func:`client_diagonals`.

    Args:
        model: as for :func:`hessian_diagonal`, like the next.
        loss_fn: scalar loss, of each client by itself.
        batches: one ``(inputs, target)`` a client; inputs alike but for the number of samples.
        num_probes: draws for "ggn-mc", rounded up to whole blocks of four from 8 on.
        seed: of the draws.
        per: "parameter", or "channel" for sums over each parameter's first axis as well.
        method: "ggn-mc" or "ggn-exact".
        chunk: factors held at once (None: as for one); bounds the peak memory, as does the next.
        samples: most samples in a pass; a client with more has one of its own.

    Raises:
        NotDescribedError: Gauss-Newton does not describe this loss.
        ValueError: model, loss, a batch or arguments do not fit; the message says which.
    """
    check_per("client_traces", per)

    def look(gn: GaussNewton) -> list[Trace]:
        blocks = iter([gn.exact()]) if method == "ggn-exact" else gn.blocks(*blocks_of(num_probes))
        tallies: list[Tally] = []
        for block in blocks:
            tallies = tallies or [Tally(per) for _ in block]
            for tally, diagonal in zip(tallies, block):
                tally.add(diagonal)
        return [tally.trace(method, matrix_of(gn)) for tally in tallies]

    problems = _problems("client_traces", model, loss_fn, batches, num_probes, method, chunk)
    return _each(problems, seed, chunk, samples, look)


def _problems(
    function: str,
    model: nn.Module,
    loss_fn: LossFn,
    batches: Batches,
    num_probes: int,
    method: str,
    chunk: int | None,
) -> list[Problem]:
    if method not in ("ggn-mc", "ggn-exact"):
        raise ValueError(f"{function}: method={method!r}; wanted 'ggn-mc' or 'ggn-exact'")
    return [checked(model, loss_fn, batch, num_probes, method, chunk) for batch in batches]


def _each(
    problems: list[Problem], seed: int, chunk: int | None, samples: int, look: Callable[[GaussNewton], list[T]]
) -> list[T]:
    """Return what ``look`` sees of each client, in passes over whole clients of ``samples`` in all."""
    out: list[T] = []
    for group in _groups(problems, samples):
        try:
            out += _look(group, seed, chunk, look)
        except MixedError:
            out += [found for one in group for found in _look([one], seed, chunk, look)]
    return out


def _look(group: list[Problem], seed: int, chunk: int | None, look: Callable[[GaussNewton], list[T]]) -> list[T]:
    inputs, target = (torch.cat([getattr(one, what) for one in group]) for what in ("inputs", "target"))
    problem = replace(group[0], inputs=inputs, target=target)
    with problem.undisturbed(seed):
        return look(GaussNewton.of(problem, seed, chunk, [one.samples for one in group]))


def _alike(a: Problem, b: Problem) -> bool:
    pairs = (a.inputs, b.inputs), (a.target, b.target)
    return all(s.shape[1:] == t.shape[1:] and (s.dtype, s.device) == (t.dtype, t.device) for s, t in pairs)


def _groups(problems: list[Problem], samples: int) -> Iterator[list[Problem]]:
    group: list[Problem] = []
    for one in problems:
        full = group and sum(other.samples for other in group) + one.samples > samples
        if full or (group and not _alike(group[0], one)):  # sequences of another length, say
            yield group
            group = []
        group.append(one)
    if group:
        yield group
