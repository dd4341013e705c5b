"""What every method decides: what a round asks of clients, how the server steps, which weights are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autoflip import prune
from autoflip.explore import Sums
from autoflip.fed.config import Config
from autoflip.fed.norms import floored
from autoflip.fed.optimizers import OPTIMIZERS
from autoflip.fed.state import Guidance, ServerState, make_view
from autoflip.masks import MaskSet

__all__ = ["Ask", "Strategy", "zeroed"]


@dataclass(frozen=True)
class Ask:
    """What a round wants of the clients that it calls.

    Attributes:
        phase: "exploration" or "training"; where the ledger books the round.
        fraction: share of the clients that is called.
        epochs: local passes over the data; 0: no step is taken and no delta travels.
        probe: a further upload, dense and >= 0: "curvature" (roots of the Gauss-Newton diagonal after the local
            steps) or "gradient" (absolute gradient at the received weights, pruned ones included); "": none.
        power: the server adds the probe's entries up to this power.
    """

    phase: str
    fraction: float
    epochs: int
    probe: str = ""
    power: int = 2


class Strategy:
    """A method of federated learning: dense federated averaging unless a subclass says otherwise.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017;
    float32 both ways.

    Args:
        config: the run's configuration.
        model: the full model, whose layers pruning looks at.
        example: inputs of a small batch, to count FLOPs on; only budgets need it.
    """

    name = "fedavg"
    stateful = False  # clients keep the view that they received last
    proximal = 0.0  # pull of local steps towards the received weights
    values = "fp32"
    levels = 0  # of ``values``, see codec.encode; 0: all
    downlink = "fp32"
    optimizer = "none"  # of the server, see fed.optimizers
    average = 0.0  # decay of the running mean of the parameters, see fed.state.Average; 0: none

    def __init__(self, config: Config, model: nn.Module, example: Tensor | None = None) -> None:
        self.config = config
        self.model = model
        self.example = example
        self.weights = [name for name, _ in model.named_parameters()]
        self.frozen = {name for name, p in model.named_parameters() if not p.requires_grad}  # no client moves them

    def prunable(self) -> list[str]:
        """Return the names of the weights that pruning covers and clients train: nothing else can be judged.

        Raises:
            ValueError: there are none.
        """
        found = [name for name in prune.weights(self.model) if name not in self.frozen]
        if not found:
            raise ValueError(f"method {self.name!r}: there is no trainable Linear, convolution or recurrent weight")
        return found

    def begin(self, state: ServerState) -> ServerState:
        """Return the state from which round 0 starts; ``state`` holds the initial parameters only.

        With ``wire.start=seed`` every client that keeps views has drawn the initial weights itself.
        """
        if not self.stateful or self.downlink == "fp32" or self.config.wire.start != "seed":
            return state
        view = make_view(state.params, None, torch.bfloat16)
        return replace(state, views={view.id: view}, held=dict.fromkeys(range(self.config.fed.clients), view.id))

    def ask(self, round_number: int) -> Ask:
        """Return what a round wants of its clients."""
        return Ask("training", self.config.fed.fraction, self.config.train.epochs)

    def lr_factor(self, round_number: int) -> float:
        """Return what multiplies ``train.lr`` in a round's local steps."""
        return 1.0

    def step(self, state: ServerState, mean: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
        """Move the parameters along the clients' mean update; return them and the optimizer's new memory."""
        make = OPTIMIZERS[self.optimizer]
        if make is None:
            return floored({name: value + mean[name] for name, value in state.params.items()}), state.memory
        moved, memory = make(self.config.server).step(state.params, mean, state.memory, self.weights, state.masks)
        return floored(moved), memory

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

    def narrow(self, masks: MaskSet, guidance: Guidance | None) -> MaskSet | None:
        """Return what slow clients keep, within the new ``masks``; None: the same."""
        return None

    def settle(self, params: dict[str, Tensor], masks: MaskSet) -> dict[str, Tensor]:
        """Return parameters with pruned entries zero, when masks have changed."""
        return zeroed(params, masks)


def zeroed(params: Mapping[str, Tensor], masks: MaskSet) -> dict[str, Tensor]:
    """Return ``params`` with zeros where ``masks`` prune."""
    nothing = torch.zeros(())
    return {name: torch.where(masks[name], t, nothing) if name in masks else t for name, t in params.items()}
