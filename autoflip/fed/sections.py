"""The sections of a configuration, their defaults, and which values each key accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["CHOICES", "METHOD_NAMES", "RANGES", "Data", "Explore", "Fed", "Model", "Prune", "Server", "Train", "Wire"]


@dataclass(frozen=True)
class Fed:
    """Who takes part, how often, and by which method."""

    method: str = "autoflip"
    against: str = "fedavg"  # "none": no comparison
    rounds: int = 40  # exploration round included
    clients: int = 20
    fraction: float = 0.25  # share of the clients that a training round calls
    slow: float = 0.0  # share of the clients that train a narrower model, see prune.slow_channels
    seed: int = 0
    threads: int = 1  # 0: torch's own setting
    processes: int = 0  # that clients live in, so that several train at once; 0: one after the other in this one
    timeout: float = 0.0  # seconds that a client in a process may take for its answer; 0: as long as it likes
    quorum: float = 0.5  # a round fails below this share of usable updates
    eval_every: int = 1  # rounds from one test-set evaluation to the next; the last round always has one


@dataclass(frozen=True)
class Data:
    """Which data, and how it is cut between the clients."""

    name: str = "digits"
    root: str = ""  # empty: the environment variable AUTOFLIP_DATA
    partition: str = "dirichlet"
    alpha: float = 0.5  # Dirichlet concentration
    classes: int = 2  # classes per client (pathological)
    samples_per_client: int = 0  # 0: all
    test_examples: int = 0  # of the test set, drawn at random, the same ones for every seed; 0: all


@dataclass(frozen=True)
class Model:
    """Which network: a name of fed.models, or module:callable."""

    name: str = "auto"
    norm: str = "keep"  # BatchNorm: keep (its buffers are averaged like weights) | group (GroupNorm instead)


@dataclass(frozen=True)
class Train:
    """Local SGD."""

    epochs: int = 2
    batch_size: int = 16
    lr: float = 0.1
    lr_decay: float = 1.0  # factor per round
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 0.0  # 0: no clipping of the gradient's norm
    proximal: float = 0.01  # mu of method fedprox


@dataclass(frozen=True)
class Server:
    """How the server steps along the clients' mean update."""

    optimizer: str = "momentum"  # of autoflip: none | momentum | adam; fedavgm and fedadam have theirs
    momentum: float = 0.7
    momentum_lr: float = 1.0
    adam_lr: float = 0.01
    adam_eps: float = 1e-3
    average: float = 0.9  # of autoflip: its model is a mean over rounds, see state.Average; 0: it is the last one


@dataclass(frozen=True)
class Explore:
    """The exploration round."""

    fraction: float = 0.25  # share of the clients that explore
    epochs: int = 1
    signal: str = "fisher"  # what ranks a weight, see explore.SIGNALS
    agreement: float = 0.0  # exponent of the clients' agreement in a weight's score; 0: it does not count


@dataclass(frozen=True)
class Prune:
    """How much is kept."""

    density: float = 1.0  # kept share of the weights; 1: channels only, what is left is dense
    rival_density: float = 0.15  # the same for random, magnitude, prunefl and ssfl, which remove no channels
    channels: float = 0.0  # kept share of channels and neurons; 0: by the model, see budget.usual_shares
    flops_exponent: float = -1.0  # power of its FLOPs by which a channel's score is divided; below 0: by the model
    inputs: float = 1.0  # kept share of the model's inputs, where a linear layer reads them; autoflip only
    flops: float = 0.0  # budget: share of a dense round's FLOPs, met by fewer channels; 0: none, but see channels
    bytes: float = 0.0  # the same for bytes, both ways against float32
    round_to: int = 4  # channels of a layer are kept in multiples of this; 0: by its size, see prune.hybrid
    slow_channels: float = 0.1  # the same for slow clients (fed.slow); autoflip only
    block: tuple[int, ...] = ()  # (rows, columns) of a weight block; empty: single weights
    until: int = 1  # rounds over which density and channels fall to their targets; 1: at once
    every: int = 5  # rounds between two mask changes while they fall
    rescale: float = 3.0  # largest factor that restores a pruned layer's norm; 1: leave the weights alone
    restore: str = "row"  # whose norm: layer | row (of each output that is left)
    lr_factor: float = 0.0  # on train.lr once channels are gone; 0: by the model, see AutoFlip.lr_factor
    paper_quantile: float = 0.3  # T_p of method autoflip-paper: the pruned share


@dataclass(frozen=True)
class Wire:
    """What crosses the link. Applies to pruning methods; fedavg sends fp32 both ways."""

    values: str = "int4"  # uplink: fp32 | bf16 | int8 | int4
    levels: int = 0  # uplink: largest code of int8 (to 127) or int4 (to 7), see codec.encode; 0: 127 or 7
    downlink: str = "int4"  # against what the client holds: bf16 (XOR, lossless) | int8 | int4 | fp32 (whole)
    start: str = "seed"  # initial weights: seed (each client draws them itself) | broadcast


METHOD_NAMES = (
    "autoflip",
    "autoflip-paper",
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadam",
    "random",
    "magnitude",
    "prunefl",
    "ssfl",
)
CHOICES: dict[str, tuple[str, ...]] = {
    "data.partition": ("iid", "dirichlet", "pathological", "natural"),
    "wire.values": ("fp32", "bf16", "int8", "int4"),
    "wire.downlink": ("fp32", "bf16", "int8", "int4"),
    "wire.start": ("seed", "broadcast"),
    "model.norm": ("keep", "group"),
    "prune.restore": ("layer", "row"),
    "server.optimizer": ("none", "momentum", "adam"),
}


def _range(low: float, high: float, *, open_low: bool = False) -> tuple[Callable[[Any], bool], str]:
    left = "(" if open_low else "["
    return (lambda v: (v > low if open_low else v >= low) and v <= high), f"{left}{low:g}, {high:g}]"


_SHARE = _range(0, 1, open_low=True)
_COUNT = _range(1, 10**9)
RANGES = {
    "fed.rounds": _COUNT,
    "fed.clients": _COUNT,
    "fed.fraction": _SHARE,
    "fed.slow": _range(0, 1),
    "fed.seed": _range(0, 2**31 - 1),
    "fed.threads": _range(0, 1024),
    "fed.processes": _range(0, 1024),
    "fed.timeout": _range(0, 1e9),
    "fed.quorum": _range(0, 1),
    "fed.eval_every": _COUNT,
    "data.alpha": _range(0, 1e6, open_low=True),
    "data.classes": _COUNT,
    "data.samples_per_client": _range(0, 10**9),
    "data.test_examples": _range(0, 10**9),
    "train.epochs": _COUNT,
    "train.batch_size": _COUNT,
    "train.lr": _range(0, 1e3, open_low=True),
    "train.lr_decay": _SHARE,
    "train.momentum": _range(0, 1),
    "train.weight_decay": _range(0, 1e3),
    "train.clip_norm": _range(0, 1e9),
    "train.proximal": _range(0, 1e3),
    "server.momentum": _range(0, 1),
    "server.momentum_lr": _range(0, 1e3, open_low=True),
    "server.adam_lr": _range(0, 1e3, open_low=True),
    "server.adam_eps": _range(0, 1e3, open_low=True),
    "server.average": _range(0, 0.999),
    "explore.fraction": _SHARE,
    "explore.epochs": _COUNT,
    "explore.agreement": _range(0, 100),
    "prune.density": _SHARE,
    "prune.rival_density": _SHARE,
    "prune.channels": _range(0, 1),
    "prune.flops_exponent": _range(-1, 1),
    "prune.inputs": _SHARE,
    "prune.flops": _range(0, 1),
    "prune.bytes": _range(0, 1),
    "prune.round_to": _range(0, 1024),
    "prune.slow_channels": _SHARE,
    "prune.until": _COUNT,
    "prune.every": _COUNT,
    "prune.rescale": _range(1, 100),
    "prune.lr_factor": _range(0, 100),
    "prune.paper_quantile": _range(0, 0.999),
    "wire.levels": _range(0, 127),
}
