"""Pruning rivals, each after its paper, on autoflip's wire (``wire.values``, ``wire.downlink``) and schedule keys.

None of them removes channels on purpose; a unit that lost all its weights is removed physically all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from autoflip import prune
from autoflip.explore import Sums
from autoflip.fed.config import Config
from autoflip.fed.seeding import derive
from autoflip.fed.state import Guidance, ServerState
from autoflip.fed.strategies.base import Ask, Strategy
from autoflip.masks import MaskSet

__all__ = ["SSFL", "Magnitude", "PruneFL", "Random"]


class _Pruning(Strategy):
    stateful = True

    def __init__(self, config: Config, model: nn.Module, example: Tensor | None = None) -> None:
        super().__init__(config, model, example)
        self.values, self.levels, self.downlink = config.wire.values, config.wire.levels, config.wire.downlink
        self.covered = self.prunable()


class Random(_Pruning):
    """A random mask from the start, Erdos-Renyi-kernel densities per layer, never changed.

    Liu et al., "The Unreasonable Effectiveness of Random Pruning", ICLR 2022; the densities are those of Evci et
    al., "Rigging the Lottery", ICML 2020: proportional to (sum of a weight's dimensions) / (their product).
    """

    name = "random"

    def begin(self, state: ServerState) -> ServerState:
        """Draw the mask; what it cuts is zero from the first broadcast on."""
        shapes = {name: tuple(state.params[name].shape) for name in self.covered}
        generator = torch.Generator().manual_seed(derive(self.config.fed.seed, "random masks"))
        masks = {}
        for name, density in _erdos_renyi(shapes, self.config.prune.rival_density).items():
            scores = torch.rand(shapes[name], generator=generator)
            masks[name] = prune.by_scores({name: scores}, density)[name]
        drawn = MaskSet(masks)
        return replace(super().begin(state), params=self.settle(dict(state.params), drawn), masks=drawn)


def _erdos_renyi(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Return the density of every tensor; those that would exceed 1 stay whole and the others make up for it."""
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    want = {name: sum(shape) / size[name] for name, shape in shapes.items()}
    whole: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in whole]
        budget = density * sum(size.values()) - sum(size[name] for name in whole)
        scale = max(budget, 1.0) / sum(want[name] * size[name] for name in rest) if rest else 0.0
        over = {name for name in rest if scale * want[name] > 1}
        if not over:
            return {name: 1.0 if name in whole else scale * want[name] for name in shapes}
        whole |= over


class Magnitude(_Pruning):
    """The server cuts the smallest weights of the average, a little more each time, along a cubic.

    Stripelis et al., "Federated Progressive Sparsification (Purge, Merge, Tune)+", arXiv:2204.12430, with the
    schedule of Zhu and Gupta, arXiv:1710.01878, from round 0 to half of the rounds, every second round.
    """

    name = "magnitude"

    def masks(self, state: ServerState) -> MaskSet | None:
        """Global magnitude pruning at each step of the schedule."""
        end = max(1, self.config.fed.rounds // 2)
        if state.round >= end or (state.round % 2 and state.round != end - 1):
            return state.masks
        share = self.config.prune.rival_density
        density = share + (1 - share) * (1 - (state.round + 1) / end) ** 3
        return prune.by_scores({name: state.params[name].abs() for name in self.covered}, density)


class PruneFL(_Pruning):
    """One client prunes first; later all clients' gradients decide which weights come back.

    Jiang et al., "Model Pruning Enables Efficient Federated Learning on Edge Devices", TNNLS 2022: importance is
    the squared gradient, pruned weights included; of the kept ones only the smaller can be cut. The paper also
    lets a linear model of the round's time choose the size; here ``prune.rival_density`` does, so that methods compare
    at one size. Reconfigured every ``prune.every`` rounds up to half of the rounds, the exchanged share falling as
    ``0.3 * 0.5^k``.
    """

    name = "prunefl"
    swap = 0.3  # share of the budget that the first reconfiguration may exchange

    def _reconfigures(self, round_number: int) -> bool:
        return round_number % self.config.prune.every == 0 and round_number < max(1, self.config.fed.rounds // 2)

    def ask(self, round_number: int) -> Ask:
        """One client at first; then gradients with every reconfiguration."""
        fed = self.config.fed
        if round_number == 0:  # sample() calls at least one client
            return Ask("exploration", 1e-9, self.config.explore.epochs, "gradient")
        probe = "gradient" if self._reconfigures(round_number) else ""
        return Ask("training", fed.fraction, self.config.train.epochs, probe)

    def may_prune(self, state: ServerState) -> bool:
        """In the rounds that reconfigure."""
        return self._reconfigures(state.round)

    def guidance(self, state: ServerState, params: Mapping[str, Tensor], sums: Sums) -> Guidance | None:
        """The mean squared gradient."""
        assert sums.curved is not None
        nothing: dict[str, Tensor] = {}
        return Guidance({name: sums.curved[name] / sums.weight for name in self.covered}, nothing, nothing)

    def masks(self, state: ServerState) -> MaskSet | None:
        """Keep the largest weights, then the largest gradients, within one budget."""
        if not self._reconfigures(state.round) or state.guidance is None:
            return state.masks
        size = sum(state.params[name].numel() for name in self.covered)
        budget = max(1, round(self.config.prune.rival_density * size))
        exchanged = self.swap * 0.5 ** (state.round // self.config.prune.every)
        firm = prune.by_scores(
            {name: state.params[name].abs() for name in self.covered}, max(1, round((1 - exchanged) * budget)) / size
        )
        scores = {}
        for name in self.covered:  # gradients rank below any firm weight
            g = state.guidance.importance[name]
            scores[name] = torch.where(firm[name], float("1e30"), g)
        return prune.by_scores(scores, budget / size)


class SSFL(_Pruning):
    """One mask for all from ``|g * w|`` at the start, averaged over clients, never changed.

    Ohib et al., "Unmasking Efficiency: Learning Salient Sparse Models in Non-IID Federated Learning" (SSFL),
    arXiv:2405.09037, after SNIP (Lee et al., ICLR 2019). The first round only measures: every client sends its
    absolute gradient on up to 128 examples and takes no step.
    """

    name = "ssfl"

    def ask(self, round_number: int) -> Ask:
        """The saliency of all clients, then plain rounds."""
        if round_number == 0:
            return Ask("exploration", 1.0, 0, "gradient", power=1)
        return super().ask(round_number)

    def may_prune(self, state: ServerState) -> bool:
        """Before the first training round."""
        return state.round == 0

    def guidance(self, state: ServerState, params: Mapping[str, Tensor], sums: Sums) -> Guidance | None:
        """The mean absolute gradient."""
        assert sums.curved is not None
        nothing: dict[str, Tensor] = {}
        return Guidance({name: sums.curved[name] / sums.weight for name in self.covered}, nothing, nothing)

    def masks(self, state: ServerState) -> MaskSet | None:
        """A global cut by saliency, once."""
        if state.round or state.guidance is None:
            return state.masks
        importance = state.guidance.importance
        return prune.by_scores(
            {name: importance[name] * state.params[name].abs() for name in self.covered},
            self.config.prune.rival_density,
        )
