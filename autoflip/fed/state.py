"""What the server knows between two rounds; immutable, so that a round either happens whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from autoflip.masks import MaskSet

__all__ = ["Average", "Guidance", "ServerState", "View", "make_view"]

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class View:
    """Parameters exactly as clients hold them after a broadcast.

    Attributes:
        id: 16 bytes that name the view; they depend on every word and on the masks.
        params: name -> tensor, bfloat16 or float32, in the coordinates of ``masks`` (see fed.coordinates), zero where
            masked inside.
        masks: what is kept; None: everything.
    """

    id: bytes
    params: Params
    masks: MaskSet | None


@dataclass(frozen=True)
class Guidance:
    """What pruning ranks by, per weight.

    Attributes:
        importance: name -> ``S2 / n`` (or the Gauss-Newton diagonal, when explorers upload it).
        agreement: name -> ``S1^2 / (n S2)`` in [0, 1], refreshed from ordinary training deltas.
        weights: name -> each weight as it was when it was last held, so that a cut one may be found worth more than
            a kept one and return (at zero).
    """

    importance: Params
    agreement: Params
    weights: Params


@dataclass(frozen=True)
class Average:
    """Running mean of the parameters over rounds, the latest counting most.

    ``mean_t = mean_{t-1} + s_t (w_t - mean_{t-1})`` with ``s_t = max(1 - b, 5 / (t + 4))``, t = 1, 2, ... counting
    the rounds since the masks last changed: over the last fifth of them at first, so that a young model, which
    still learns much in a round, does not lag; from ``t = 5 / (1 - b) - 4`` on with a fixed decay. A round of few
    clients with few classes each pulls the model to and fro; the mean stands still (Polyak and Juditsky 1992;
    Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018). Clients train
    on from the parameters, not from the mean, so it costs no byte and no FLOP of theirs.

    Attributes:
        params: name -> float32 tensor.
        rounds: t.
    """

    params: Params
    rounds: int

    @staticmethod
    def after(old: Average | None, params: Params, decay: float) -> Average:
        """Return the mean once ``params`` have joined ``old``; None: they are the first."""
        if old is None:
            return Average(params, 1)
        rounds = old.rounds + 1
        share = max(1 - decay, 5 / (rounds + 4))
        return Average({name: torch.lerp(old.params[name], value, share) for name, value in params.items()}, rounds)


@dataclass(frozen=True)
class ServerState:
    """State of one method after a round.

    Attributes:
        params: name -> float32 tensor: parameters and floating buffers, zero where pruned.
        masks: what is kept; None before pruning: everything.
        round: number of the next round.
        views: id -> view, those that some client still holds.
        held: client -> id of the view that it holds.
        guidance: what the exploration found; None before it, and again when no mask is to change any more.
        memory: of the server's optimizer, ``slot/name`` -> tensor.
        narrow: what slow clients keep, within ``masks``; None: what all keep.
        average: running mean of ``params``; None: the method keeps none.
    """

    params: Params
    masks: MaskSet | None = None
    round: int = 0
    views: Mapping[bytes, View] = field(default_factory=dict)
    held: Mapping[int, bytes] = field(default_factory=dict)
    guidance: Guidance | None = None
    memory: Params = field(default_factory=dict)
    narrow: MaskSet | None = None
    average: Average | None = None

    @property
    def served(self) -> Params:
        """The parameters to evaluate and to hand out: the average where there is one."""
        return self.params if self.average is None else self.average.params

    def holding(self, holders: Mapping[int, View], lost: Collection[int] = ()) -> ServerState:
        """Return the state once ``holders`` (client -> view) hold these; views that nobody holds are forgotten.

        Args:
            holders: client -> the view that it holds now.
            lost: clients of which nobody knows what they hold.
        """
        held = {client: name for client, name in self.held.items() if client not in lost}
        held |= {client: view.id for client, view in holders.items()}
        views = {**self.views, **{view.id: view for view in holders.values()}}
        wanted = set(held.values())
        return replace(self, held=held, views={name: view for name, view in views.items() if name in wanted})


def make_view(params: Params, masks: MaskSet | None, dtype: torch.dtype, inside: MaskSet | None = None) -> View:
    """Round ``params`` to ``dtype``, zero what is pruned, and name the result.

    Args:
        params: name -> tensor, in the coordinates of ``masks``.
        masks: what is kept; None: everything.
        dtype: bfloat16 or float32.
        inside: the same masks in these coordinates; None: all of ``params`` is kept.
    """
    rounded = {}
    # SHA-256: processors do it in hardware, at twice BLAKE2's speed
    digest = hashlib.sha256((masks.fingerprint() if masks is not None else "").encode())
    for name, tensor in sorted(params.items()):  # a view's id must not depend on the order of a dict
        value = tensor.to(dtype)
        if inside is not None and name in inside:
            value = torch.where(inside[name], value, torch.zeros((), dtype=dtype))
        rounded[name] = value
        words = value.contiguous().view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
        digest.update(words.numpy().data)
    return View(digest.digest()[:16], rounded, masks)
