"""Settings per data set that a run takes unless the user says otherwise.

They are sized for two CPU cores: a few hundred samples a client, some minutes a run. The paper's own sizes
(arXiv:2405.10271) can be had by ``--set``.
"""

from __future__ import annotations

from typing import Any

_Preset = dict[str, dict[str, Any]]
_IMAGES: _Preset = {"data": {"samples_per_client": 500}, "train": {"lr": 0.05, "batch_size": 32}}
_NATURAL: dict[str, Any] = {"partition": "natural", "samples_per_client": 300}

PRESETS: dict[str, _Preset] = {
    "digits": {},
    "mnist": _IMAGES,
    "fashion-mnist": _IMAGES,
    "usps": _IMAGES,
    "cifar10": _IMAGES,
    "cifar100": _IMAGES,
    "qmnist": {"data": _NATURAL, "train": {"lr": 0.05, "batch_size": 32}},
    "femnist": {"data": _NATURAL, "train": {"lr": 0.05, "batch_size": 32}},
    "har": {"data": _NATURAL, "train": {"batch_size": 32}},
    "shakespeare": {"data": _NATURAL, "train": {"lr": 1.0, "clip_norm": 5.0, "batch_size": 32, "epochs": 1}},
}
