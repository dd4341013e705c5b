"""Settings per data set that a run takes unless the user says otherwise.

They are sized for two CPU cores: a few hundred samples a client, some minutes a run. The paper's own sizes
(arXiv:2405.10271) can be had by ``--set``.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {},
    "fashion-mnist": {
        "fed": {"rounds": 40},
        "data": {"samples_per_client": 500},
    },
}
