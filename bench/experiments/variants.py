"""The variants that study.py compares: name -> overrides of the default configuration."""

MOMENTUM = ["server.optimizer=momentum"]

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
}
