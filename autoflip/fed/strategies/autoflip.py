"""AutoFLIP (arXiv:2405.10271) done for real: channels removed, weights masked inside; and the paper's own rule."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoflip import meter, prune
from autoflip.explore import Sums, rank
from autoflip.fed.budget import USUAL_FLOPS, channels_within, cost_of, usual_shares
from autoflip.fed.config import Config
from autoflip.fed.norms import has_norms
from autoflip.fed.state import Guidance, ServerState
from autoflip.fed.strategies.base import Ask, Strategy
from autoflip.groups import find_groups
from autoflip.masks import MaskSet
from autoflip.prune.arguments import check_block

__all__ = ["AutoFlip", "AutoFlipPaper"]


class AutoFlip(Strategy):
    """Explore once, remove channels, mask weights inside what is left, refine while training."""

    name = "autoflip"
    stateful = True

    def __init__(self, config: Config, model: nn.Module, example: Tensor | None = None) -> None:
        super().__init__(config, model, example)
        self.values, self.levels = config.wire.values, config.wire.levels
        self.downlink = config.wire.downlink
        self.optimizer = config.server.optimizer
        self.average = config.server.average
        self.probe = "curvature" if config.explore.signal == "curvature" else ""
        covered = prune.weights(model)
        check_block(config.prune.block or None, covered)  # type: ignore[arg-type]  # Config has counted them
        self._groups = find_groups(model)
        self._normalised = has_norms(model)
        still = covered.keys() - self.prunable()
        self._frozen = {name.rpartition(".")[0] for name in still}  # layers
        self._settled = sum(covered[n].numel() for n in still) / sum(w.numel() for w in covered.values())
        self._least, most = usual_shares(self._groups, self._frozen)
        self._share = config.prune.channels or most
        self._flops = meter.layer_flops(model, example) if self.flops_exponent() and example is not None else {}

    def ask(self, round_number: int) -> Ask:
        """Explore first, then train."""
        if round_number:
            return super().ask(round_number)
        return Ask("exploration", self.config.explore.fraction, self.config.explore.epochs, self.probe)

    def lr_factor(self, round_number: int) -> float:
        """As configured; else 2 in a model with normalisation layers that loses channels, 1 in others and exploring.

        What follows a norm does not grow with the weights before it, so that a step which is too long for a plain
        narrow model may be right there: with ``train.lr`` doubled ResNet-8 with GroupNorm ended higher
        (``autoflip+lr-as-dense`` in bench/results is what it was without), TwoCNN stayed at chance on two classes a
        client. Dense ResNet-8 gained nothing by it.
        """
        if not round_number:
            return 1.0
        return self.config.prune.lr_factor or (2.0 if self._normalised and self._share < 1 else 1.0)

    def flops_exponent(self) -> float:
        """As configured; else 0.05, and 0 in a model with normalisation layers, where it was not tried.

        Scores within a layer lie close together, so that little decides between layers. Where all weights cost as
        much, as in an MLP or an LSTM, it decides nothing.
        """
        exponent = self.config.prune.flops_exponent
        return exponent if exponent >= 0 else 0.0 if self._normalised else 0.05

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
                {name: source[name] / sums.weight for name in self.weights},
                {name: found.agreement[name] for name in self.weights},
                {name: params[name] for name in self.weights},
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

    def after(self, round_number: int, share: float) -> float:
        """Return what is kept after a round: falls from 1 to ``share`` along a cubic (Zhu and Gupta 2017)."""
        progress = min(1.0, (round_number + 1) / self.config.prune.until)
        return share + (1 - share) * (1 - progress) ** 3

    def masks(self, state: ServerState) -> MaskSet | None:
        """Hybrid pruning after the exploration round and at each step of the schedule."""
        cfg = self.config.prune
        last = state.round + 1 == cfg.until
        if state.guidance is None or not (state.round == 0 or last or state.round % cfg.every == 0):
            return state.masks
        channels = self.after(state.round, self._channels(state.guidance))
        inputs = self.after(state.round, cfg.inputs)
        return self._hybrid(state.guidance, self.after(state.round, cfg.density), channels, inputs)

    def _channels(self, guidance: Guidance) -> float:
        """Return the share of channels: as configured, or what the budgets leave; by the model, see usual_shares."""
        cfg, sent = self.config.prune, (self.config.wire.values, self.config.wire.downlink)
        flops, least = cfg.flops, 0.0
        if not (cfg.channels or cfg.flops or cfg.bytes):
            flops, least = USUAL_FLOPS, self._least
        if not (flops or cfg.bytes) or least >= self._share or self.example is None:
            return self._share
        example = self.example

        def cost(share: float) -> tuple[float, float]:
            masks = self._hybrid(guidance, cfg.density, share, cfg.inputs)
            return cost_of(self.model, masks, example, self._groups, sent if cfg.bytes else None)

        return max(least, channels_within(cost, flops, cfg.bytes, self._share))

    def narrow(self, masks: MaskSet, guidance: Guidance | None) -> MaskSet | None:
        """The best channels only (as HeteroFL, Diao et al., ICLR 2021, but by guidance, not by position)."""
        cfg = self.config.prune
        if guidance is None or cfg.slow_channels >= self._share:
            return None
        return masks & self._hybrid(guidance, 1.0, cfg.slow_channels)

    def _hybrid(self, guidance: Guidance, density: float, channels: float, inputs: float = 1.0) -> MaskSet:
        block = self.config.prune.block
        return prune.hybrid(
            self.model,
            {name: self._score(name, guidance) for name in self.weights},
            density=self._settled + (1 - self._settled) * density,
            channels=channels,
            inputs=inputs,
            block=(block[0], block[1]) if block else None,
            round_to=self.config.prune.round_to or None,
            protect=self._frozen,
            groups=self._groups,
            flops=self._flops,
            flops_exponent=self.flops_exponent() if self._flops else 0.0,
        )

    def settle(self, params: dict[str, Tensor], masks: MaskSet) -> dict[str, Tensor]:
        """Zero pruned entries, then give each layer its Frobenius norm back.

        A layer that lost most of its weights passes a fainter signal, and local steps at the old learning rate
        first have to win it back. The factor is at most ``prune.rescale``.
        """
        settled = super().settle(params, masks)
        most, whole = self.config.prune.rescale, self.config.prune.restore == "layer"
        for name in (n for n in self.weights if n in masks and params[n].ndim >= 2):
            old, new = ((t.flatten() if whole else t.flatten(1)).norm(dim=-1) for t in (params[name], settled[name]))
            factor = torch.where(new > 0, old / new, 1.0).clamp(max=most)
            settled[name] = settled[name] * factor.reshape(-1, *[1] * (params[name].ndim - 1))
        return settled

    def _score(self, name: str, guidance: Guidance) -> Tensor:
        score = rank(self.config.explore.signal, guidance.weights[name], guidance.importance[name])
        exponent = self.config.explore.agreement
        return score * guidance.agreement[name] ** exponent if exponent else score


class AutoFlipPaper(AutoFlip):
    """The paper's rule: min-max normalised mean squared deviation, one global quantile, no structure."""

    name = "autoflip-paper"

    def __init__(self, config: Config, model: nn.Module, example: Tensor | None = None) -> None:
        super().__init__(config, model, example)
        self.values = self.downlink = "fp32"
        self.optimizer = "none"
        self.average = 0.0
        self.probe = ""
        self._share = 1.0  # no channel goes

    def ask(self, round_number: int) -> Ask:
        """Every client explores, as the paper has it."""
        return super().ask(round_number) if round_number else Ask("exploration", 1.0, self.config.explore.epochs)

    def narrow(self, masks: MaskSet, guidance: Guidance | None) -> MaskSet | None:
        """None: slow clients get what the others get, as no channel ever goes."""
        return None

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
