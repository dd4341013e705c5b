"""The methods: what each sends, whether it explores, and which weights it keeps after a round.

``fedavg``: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, dense, float32 both ways. ``autoflip``: arXiv:2405.10271 done for real (channels removed, weights
masked inside, int8 deltas). ``autoflip-paper``: that paper's own rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autoflip import prune
from autoflip.explore import Sums, rank
from autoflip.fed.config import Config
from autoflip.fed.state import Guidance, ServerState
from autoflip.groups import find_groups
from autoflip.masks import MaskSet

__all__ = ["METHODS", "Strategy"]


class Strategy:
    """A method of federated learning: dense federated averaging unless a subclass says otherwise.

    Args:
        config: the run's configuration.
        model: the full model, whose layers pruning looks at.
    """

    name = "fedavg"
    explores = False
    curvature = False  # explorers also upload a Gauss-Newton diagonal
    stateful = False  # clients keep the view that they received last

    def __init__(self, config: Config, model: torch.nn.Module) -> None:
        self.config = config
        self.model = model
        self.values = "fp32"
        self.downlink = "fp32"

    def guidance(self, state: ServerState, params: Mapping[str, Tensor], sums: Sums) -> Guidance | None:
        """Return the guidance after a round from ``state`` to ``params`` whose updates are in ``sums``."""
        return state.guidance

    def may_prune(self, state: ServerState) -> bool:
        """Whether masks may change after the round that ``state`` is about to run, or a later one.

        While they may, updates also feed the guidance (sums of squares, at no extra bytes).
        """
        return False

    def masks(self, state: ServerState) -> MaskSet | None:
        """Return what is kept from the next round on, given the new parameters and guidance of this one."""
        return state.masks

    def settle(self, params: dict[str, Tensor], masks: MaskSet) -> dict[str, Tensor]:
        """Return parameters with pruned entries zero, when masks have changed."""
        return {
            name: torch.where(masks[name], value, torch.zeros(())) if name in masks else value
            for name, value in params.items()
        }


class AutoFlip(Strategy):
    """Explore once, remove channels, mask weights inside what is left, refine while training."""

    name = "autoflip"
    explores = True
    stateful = True

    def __init__(self, config: Config, model: torch.nn.Module) -> None:
        super().__init__(config, model)
        self.values = config.wire.values
        self.downlink = config.wire.downlink
        self.curvature = config.explore.signal == "curvature"
        self._weights = [name for name, _ in model.named_parameters()]
        self._groups = find_groups(model)

    def may_prune(self, state: ServerState) -> bool:
        """Until the schedule has reached its end."""
        return state.round < self.config.prune.until

    def guidance(self, state: ServerState, params: Mapping[str, Tensor], sums: Sums) -> Guidance | None:
        """The exploration's importance, and an agreement that follows the clients' later updates.

        A later round is one more voice of half the weight; what it did not train keeps its agreement.
        """
        found = sums.scores("deviation")
        if state.round == 0:
            source = sums.curved if sums.curved is not None else sums.second
            return Guidance(
                {name: source[name] / sums.weight for name in self._weights},
                {name: found.agreement[name] for name in self._weights},
                {name: params[name] for name in self._weights},
            )
        if state.guidance is None:
            return None
        agreement, weights = {}, {}
        for name, old in state.guidance.agreement.items():
            trained = found.deviation[name] > 0
            agreement[name] = torch.where(trained, (old + found.agreement[name]) / 2, old)
            held = state.masks[name] if state.masks is not None and name in state.masks else torch.tensor(True)
            weights[name] = torch.where(held, params[name], state.guidance.weights[name])
        return Guidance(state.guidance.importance, agreement, weights)

    def target_density(self, round_number: int) -> float:
        """Return the density after a round: falls from 1 to its target along a cubic (Zhu and Gupta 2017)."""
        cfg = self.config.prune
        progress = min(1.0, (round_number + 1) / cfg.until)
        return cfg.density + (1 - cfg.density) * (1 - progress) ** 3

    def masks(self, state: ServerState) -> MaskSet | None:
        """Hybrid pruning after the exploration round and at each step of the schedule."""
        cfg = self.config.prune
        last = state.round + 1 == cfg.until
        if state.guidance is None or not (state.round == 0 or last or state.round % cfg.every == 0):
            return state.masks
        return prune.hybrid(
            self.model,
            {name: self._score(name, state.guidance) for name in self._weights},
            density=self.target_density(state.round),
            channels=cfg.channels,
            block=(cfg.block[0], cfg.block[1]) if cfg.block else None,
            groups=self._groups,
        )

    def settle(self, params: dict[str, Tensor], masks: MaskSet) -> dict[str, Tensor]:
        """Zero pruned entries, then give each layer its Frobenius norm back.

        A layer that lost most of its weights passes a fainter signal, and local steps at the old learning rate
        first have to win it back. The factor is at most ``prune.rescale``.
        """
        settled = super().settle(params, masks)
        most = self.config.prune.rescale
        for name in (n for n in self._weights if n in masks):
            if params[name].ndim >= 2 and (norm := float(settled[name].norm())) > 0:
                settled[name] = settled[name] * min(most, float(params[name].norm()) / norm)
        return settled

    def _score(self, name: str, guidance: Guidance) -> Tensor:
        score = rank(self.config.explore.signal, guidance.weights[name], guidance.importance[name])
        exponent = self.config.explore.agreement
        return score * guidance.agreement[name] ** exponent if exponent else score


class AutoFlipPaper(AutoFlip):
    """The paper's rule: min-max normalised mean squared deviation, one global quantile, no structure."""

    name = "autoflip-paper"

    def __init__(self, config: Config, model: torch.nn.Module) -> None:
        super().__init__(config, model)
        self.values = self.downlink = "fp32"
        self.curvature = False

    def settle(self, params: dict[str, Tensor], masks: MaskSet) -> dict[str, Tensor]:
        """Zero pruned entries and nothing else."""
        return Strategy.settle(self, params, masks)

    def may_prune(self, state: ServerState) -> bool:
        """Never after the exploration round."""
        return state.round == 0

    def masks(self, state: ServerState) -> MaskSet | None:
        """Once, after the exploration round."""
        if state.round or state.guidance is None:
            return state.masks
        return prune.paper(state.guidance.importance, self.config.prune.paper_quantile)


METHODS: dict[str, Callable[[Config, torch.nn.Module], Strategy]] = {
    "autoflip": AutoFlip,
    "autoflip-paper": AutoFlipPaper,
    "fedavg": Strategy,
}
