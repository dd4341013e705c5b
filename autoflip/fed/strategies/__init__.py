"""The methods, by name."""

from __future__ import annotations

from autoflip.fed.strategies.autoflip import AutoFlip, AutoFlipPaper
from autoflip.fed.strategies.base import Ask, Strategy
from autoflip.fed.strategies.dense import FedAdam, FedAvgM, FedProx
from autoflip.fed.strategies.pruning import SSFL, Magnitude, PruneFL, Random

__all__ = ["METHODS", "Ask", "Strategy"]

METHODS: dict[str, type[Strategy]] = {
    kind.name: kind
    for kind in (AutoFlip, AutoFlipPaper, Strategy, FedProx, FedAvgM, FedAdam, Random, Magnitude, PruneFL, SSFL)
}
