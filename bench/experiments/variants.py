"""The variants that study.py compares: name -> overrides of the default configuration.

The first study (HAR by subject, digits; 22 November 2026) started from MASKED: half the channels, then single
weights inside to 15 % of all, int8 up and bfloat16 down, every client explores, a layer's norm restored as a whole.
"""

MASKED = ["prune.channels=0.5", "prune.density=0.15", "prune.restore=layer", "explore.fraction=1.0"]
MASKED += ["wire.values=int8", "wire.downlink=bf16"]
NARROW = [*MASKED, "prune.density=1"]  # channels only: what is left is dense
QUARTER = "explore.fraction=0.25"
INT8 = ["wire.values=int8", "wire.downlink=int8"]
INT4 = ["wire.values=int4", "wire.downlink=int4"]
ADAM = ["server.optimizer=adam"]
MOMENTUM = ["server.optimizer=momentum"]
FAST = ["train.lr=0.1"]
ROW = ["prune.restore=row"]


def _narrow(channels: float, *more: str) -> list[str]:
    return [*NARROW, f"prune.channels={channels}", *INT4, *more]


VARIANTS: dict[str, list[str]] = {
    "fedavg": ["fed.method=fedavg"],
    "fedavg lr x2": ["fed.method=fedavg", *FAST],
    "fedavgm": ["fed.method=fedavgm"],
    "fedadam": ["fed.method=fedadam"],
    "autoflip": [],
    # what the default brings
    "all explore": ["explore.fraction=1.0"],
    "no agreement": ["explore.agreement=0"],
    "curvature": ["explore.signal=curvature"],
    "deviation": ["explore.signal=deviation"],
    "magnitude": ["explore.signal=magnitude"],
    "no structure": ["prune.channels=1", "prune.density=0.25"],
    "masks inside": ["prune.density=0.15"],
    "no restoring": ["prune.rescale=1"],
    "int8": INT8,
    "gradual": ["prune.until=15", "prune.every=3"],
    # the first study
    "masked": MASKED,
    "masked, momentum 0.3": [*MASKED, *MOMENTUM],
    "masked, momentum 1.0": [*MASKED, *MOMENTUM, "server.momentum_lr=1.0"],
    "masked, adam": [*MASKED, *ADAM],
    "masked, no rescale": [*MASKED, "prune.rescale=1"],
    "masked, all channels": [*MASKED, "prune.channels=1"],
    "masked, no agreement": [*MASKED, "explore.agreement=0"],
    "narrow 0.5, int8/bf16": NARROW,
    "narrow 0.25, int8/bf16": [*NARROW, "prune.channels=0.25"],
    "narrow 0.15, int8/bf16": [*NARROW, "prune.channels=0.15"],
    "narrow 0.15, all explore": _narrow(0.15),
    "narrow 0.15, all explore, lr x2": _narrow(0.15, *FAST),
    "narrow 0.15, all explore, adam": _narrow(0.15, *ADAM),
    "narrow 0.15, all explore, momentum 1.0": _narrow(0.15, *MOMENTUM, "server.momentum_lr=1.0"),
    "narrow 0.15, all explore, magnitude": _narrow(0.15, "explore.signal=magnitude"),
    "narrow 0.15, all explore, deviation": _narrow(0.15, "explore.signal=deviation"),
    "narrow 0.15": _narrow(0.15, QUARTER),
    "narrow 0.25": _narrow(0.25, QUARTER),
    "narrow 0.25, lr x2": _narrow(0.25, QUARTER, *FAST),
    "narrow 0.25, adam": _narrow(0.25, QUARTER, *ADAM),
    "narrow 0.25, lr x2, adam": _narrow(0.25, QUARTER, *ADAM, *FAST),
    "narrow 0.25, row": _narrow(0.25, QUARTER, *ROW),
    "narrow 0.25, row, lr x2": _narrow(0.25, QUARTER, *ROW, *FAST),
    "narrow 0.35": _narrow(0.35, QUARTER),
    "narrow 0.35, lr x2": _narrow(0.35, QUARTER, *FAST),
    "narrow 0.35, row": _narrow(0.35, QUARTER, *ROW),
    "narrow 0.4, row": _narrow(0.4, QUARTER, *ROW),
    "narrow 0.5": _narrow(0.5, QUARTER),
    "narrow 0.5, row": _narrow(0.5, QUARTER, *ROW),
    "narrow 0.5, row, all explore": _narrow(0.5, *ROW),
    "narrow 0.5, row, int8": [*NARROW, *INT8, *ROW, QUARTER],
}
