"""The variants that study.py compares: name -> overrides of the default configuration."""

MOMENTUM = ["server.optimizer=momentum"]
NARROW = ["prune.density=1"]  # channels only: what is left is dense
ADAM = ["server.optimizer=adam"]
QUARTER = "explore.fraction=0.25"
INT4 = ["wire.values=int4", "wire.downlink=int4"]
N25 = [*NARROW, "prune.channels=0.25", *INT4, QUARTER]
N15 = [*N25, "prune.channels=0.15"]
N35 = [*N25, "prune.channels=0.35"]

VARIANTS: dict[str, list[str]] = {
    "fedavg": ["fed.method=fedavg"],
    "autoflip": [],
    "momentum 0.3": MOMENTUM,
    "momentum 1.0": [*MOMENTUM, "server.momentum_lr=1.0"],
    "adam 0.01": ["server.optimizer=adam"],
    "fedavgm": ["fed.method=fedavgm"],
    "no rescale": ["prune.rescale=1"],
    "all channels": ["prune.channels=1"],
    "no masks inside": ["prune.density=1"],
    "no agreement": ["explore.agreement=0"],
    "deviation": ["explore.signal=deviation"],
    "magnitude": ["explore.signal=magnitude"],
    "curvature": ["explore.signal=curvature"],
    "quarter explores": ["explore.fraction=0.25"],
    "int4": ["wire.values=int4"],
    "gradual": ["prune.until=15", "prune.every=3"],
    "lr x2": ["train.lr=0.1"],
    "narrow 0.25": [*NARROW, "prune.channels=0.25"],
    "narrow 0.15": [*NARROW, "prune.channels=0.15"],
    "narrow 0.15, int4": [*NARROW, "prune.channels=0.15", *INT4],
    "narrow 0.15, int4, lr x2": [*NARROW, "prune.channels=0.15", *INT4, "train.lr=0.1"],
    "narrow 0.15, int4, adam": [*NARROW, "prune.channels=0.15", *INT4, *ADAM],
    "narrow 0.15, int4, momentum": [*NARROW, "prune.channels=0.15", *INT4, *MOMENTUM, "server.momentum_lr=1.0"],
    "narrow 0.15, int4, quarter": [*NARROW, "prune.channels=0.15", *INT4, QUARTER],
    "narrow 0.15, int4, magnitude": [*NARROW, "prune.channels=0.15", *INT4, "explore.signal=magnitude"],
    "narrow 0.15, int4, deviation": [*NARROW, "prune.channels=0.15", *INT4, "explore.signal=deviation"],
    "N25": N25,
    "N25 lr x2": [*N25, "train.lr=0.1"],
    "N25 adam": [*N25, *ADAM],
    "N25 lr x2 adam": [*N25, *ADAM, "train.lr=0.1"],
    "N25 row": [*N25, "prune.restore=row"],
    "N25 row lr x2": [*N25, "prune.restore=row", "train.lr=0.1"],
    "N25 row adam": [*N25, *ADAM, "prune.restore=row"],
    "N15 row adam": [*N15, *ADAM, "prune.restore=row"],
    "N15 row lr x2": [*N15, "prune.restore=row", "train.lr=0.1"],
    "N35": [*N25, "prune.channels=0.35"],
    "N35 lr x2": [*N25, "prune.channels=0.35", "train.lr=0.1"],
    "N35 adam": [*N35, *ADAM],
    "N35 row adam": [*N35, *ADAM, "prune.restore=row"],
    "N35 row": [*N35, "prune.restore=row"],
    "N50": [*N25, "prune.channels=0.5"],
    "N50 adam": [*N25, *ADAM, "prune.channels=0.5"],
    "fedavg lr x2": ["fed.method=fedavg", "train.lr=0.1"],
    "fedadam": ["fed.method=fedadam"],
}
