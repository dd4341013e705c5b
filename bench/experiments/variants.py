"""The variants that study.py compares: name -> overrides of the default configuration, and what no option turns off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from autoflip.fed import downlink

DENSE = ["prune.channels=1", "wire.values=fp32", "wire.downlink=fp32"]
PLAIN = ["server.optimizer=none", "server.average=0"]  # the clients' mean, as FedAvg has it

ALIKE = ["prune.flops_exponent=0"]  # what every one of them has: the parts are told apart as if all channels cost alike
VARIANTS: dict[str, list[str]] = {
    "fedavg": ["fed.method=fedavg"],
    "fedavg, lr / 2": ["fed.method=fedavg", "train.lr=0.05"],
    "fedavg, lr x 2": ["fed.method=fedavg", "train.lr=0.2"],
    "fedavg, momentum": ["fed.method=fedavgm"],
    "fedavg, momentum, average": DENSE,
    "autoflip": [],
    "half of the channels": ["prune.channels=0.5"],
    "35 % of the channels": ["prune.channels=0.35"],
    "15 % of the channels": ["prune.channels=0.15"],
    # what each part of the default brings
    "no momentum": ["server.optimizer=none"],
    "momentum 0.5": ["server.momentum=0.5"],
    "adam": ["server.optimizer=adam"],
    "no average": ["server.average=0"],
    "neither": PLAIN,
    "magnitude instead of exploration": ["explore.signal=magnitude"],
    "deviation": ["explore.signal=deviation"],
    "curvature": ["explore.signal=curvature"],
    "agreement": ["explore.agreement=0.5"],
    "all explore": ["explore.fraction=1.0"],
    "no restoring": ["prune.rescale=1"],
    "restored by layer": ["prune.restore=layer"],
    "no structure": ["prune.channels=1", "prune.density=0.1"],
    "masks inside": ["prune.channels=0.5", "prune.density=0.1"],
    "gradual": ["prune.until=10", "prune.every=3"],
    "int8": ["wire.values=int8", "wire.downlink=int8"],
    "no error feedback": [],
    "half of the inputs": ["prune.inputs=0.5"],
    "35 % of the inputs": ["prune.inputs=0.35"],
}


@contextmanager
def _without_feedback() -> Iterator[None]:
    """Let the server send what changed since a client's last call, whatever the rounding made of it there."""
    real, meant = downlink.send, {}

    def send(params: Any, masks: Any, held: Any, kind: str, locate: Any, **keys: Any) -> Any:
        goal = dict(params)
        if held is not None and held.id in meant:
            there = locate(held.masks).expand({name: value.float() for name, value in held.params.items()})
            goal = {name: value - meant[held.id][name] + there[name] for name, value in goal.items()}
        view, frames = real(goal, masks, held, kind, locate, **keys)
        meant[view.id] = dict(params)
        return view, frames

    downlink.send = send
    try:
        yield
    finally:
        downlink.send = real


PATCHES: dict[str, Callable[[], AbstractContextManager[None]]] = {"no error feedback": _without_feedback}
