"""Every random choice of a run is drawn from a seed named by what it is for: no state to save, none to lose."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(*keys: object) -> int:
    """Return a 63-bit seed that depends on every key, for example ``derive(seed, "sample", round)``."""
    digest = hashlib.blake2b("\0".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*keys: object) -> torch.Generator:
    """Return a torch CPU generator seeded by ``derive``."""
    return torch.Generator().manual_seed(derive(*keys))


def sample(seed: int, round_number: int, clients: int, fraction: float) -> list[int]:
    """Return the sorted ids of the clients that a round calls: at least one, the same for every method."""
    count = max(1, round(clients * fraction))
    chosen = np.random.default_rng(derive(seed, "sample", round_number)).choice(clients, count, replace=False)
    return sorted(int(c) for c in chosen)
