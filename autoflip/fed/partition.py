"""Deal the samples of a data set to clients: i.i.d., by a Dirichlet draw, a few classes each, or by who made them.

Every kind is a function of (labels, groups, arguments, seed) alone. The parts are disjoint and, without a cap,
cover every sample.
"""

from __future__ import annotations

import difflib
import math

import numpy as np
import torch
from torch import Tensor

from autoflip.fed.data import Split

__all__ = ["KINDS", "split"]

KINDS = ("iid", "dirichlet", "pathological", "natural")
# a Dirichlet draw leaves some clients nearly empty; each gets this many samples where there are enough for all
MIN_SAMPLES = 10


def split(
    split: Split,
    kind: str,
    *,
    clients: int,
    seed: int,
    num_classes: int,
    alpha: float = 0.5,
    classes: int = 2,
    samples_per_client: int | None = None,
) -> list[Tensor]:
    """Return for each client the indices of its samples, sorted, int64.

    Args:
        split: the samples; ``y`` and, for ``natural``, ``group`` are read.
        kind: ``iid``: equal parts at random.
            ``dirichlet``: each class is dealt out in shares drawn from Dirichlet(alpha) over the clients, as in
            Hsu et al., "Measuring the Effects of Non-Identical Data Distribution", arXiv:1909.06335, drawn class
            by class as Yurochkin et al., arXiv:1905.12022, do; a client left with fewer than
            ``min(10, N // (2 * clients))`` samples (at least 1) takes the difference, at random, from the largest.
            ``pathological``: every client holds exactly ``classes`` classes (McMahan et al.,
            "Communication-Efficient Learning", arXiv:1602.05629, but never the same class twice); a class is cut
            into equal shards, more of them the more samples it has.
            ``natural``: a client is a group (writer, role, subject) in the order of ids; for fewer clients than
            groups, the groups are shuffled by ``seed`` and dealt in turn.
        clients: number of clients.
        seed: of every draw.
        num_classes: number of labels; ``y`` lies in ``[0, num_classes)``.
        alpha: concentration of ``dirichlet``, > 0: small = one class a client, large = i.i.d.
        classes: classes a client of ``pathological``.
        samples_per_client: keep at most this many of a client's samples, at random, classes in proportion.

    Raises:
        ValueError: an argument is out of range, or the data cannot be split so.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"partition: there is no kind {kind!r}{hint} wanted one of {', '.join(KINDS)}")
    y = split.y.numpy()
    _check(y, clients, num_classes, samples_per_client)
    rng = np.random.default_rng([int(seed) & 0xFFFFFFFFFFFFFFFF, KINDS.index(kind)])
    if kind == "iid":
        parts = np.array_split(rng.permutation(len(y)), clients)
    elif kind == "dirichlet":
        parts = _dirichlet(y, clients, num_classes, alpha, rng)
    elif kind == "pathological":
        parts = _pathological(y, clients, num_classes, classes, rng)
    else:
        parts = _natural(split, clients, rng)
    if samples_per_client is not None:
        parts = [_cap(part, y, samples_per_client, num_classes, rng) for part in parts]
    return [torch.from_numpy(np.sort(part).astype(np.int64)) for part in parts]


def _check(y: np.ndarray, clients: int, num_classes: int, cap: int | None) -> None:
    if not isinstance(clients, int) or not 1 <= clients <= len(y):
        raise ValueError(f"partition: clients={clients!r}; wanted 1..{len(y)}, at least one sample for each client")
    if y.min() < 0 or y.max() >= num_classes:
        raise ValueError(f"partition: labels lie in {y.min()}..{y.max()} but num_classes={num_classes}; wanted a fit")
    if cap is not None and (not isinstance(cap, int) or cap < 1):
        raise ValueError(f"partition: samples_per_client={cap!r}; wanted a positive number, or None for all")


def _apportion(weights: np.ndarray, total: int, most: np.ndarray, least: int = 0) -> np.ndarray:
    """Return integers between ``least`` and ``most`` that sum to ``total`` and follow ``weights`` (highest quotient).

    Entry by entry, the next unit goes where ``weight / (units + 1)`` is largest (D'Hondt), ties to the lower index.
    """
    counts = np.minimum(np.full(len(weights), least), most)
    for _ in range(total - counts.sum()):
        room = np.where(counts < most, weights / (counts + 1), -1.0)
        counts[room.argmax()] += 1
    return counts


def _dirichlet(y: np.ndarray, clients: int, num_classes: int, alpha: float, rng: np.random.Generator) -> list:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"partition: alpha={alpha!r}; wanted a positive number (0.1 very uneven, 100 nearly i.i.d.)")
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in range(num_classes):
        own = rng.permutation(np.flatnonzero(y == label))
        shares = rng.dirichlet(np.full(clients, float(alpha)))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(own)).astype(np.int64)
        for part, piece in zip(parts, np.split(own, cuts)):
            part.append(piece)
    dealt = [rng.permutation(np.concatenate(part)) for part in parts]
    least = max(1, min(MIN_SAMPLES, len(y) // (2 * clients)))
    for poor in range(clients):
        while len(dealt[poor]) < least:
            rich = max(range(clients), key=lambda c: len(dealt[c]))
            take = min(least - len(dealt[poor]), len(dealt[rich]) - least)
            dealt[poor] = np.concatenate([dealt[poor], dealt[rich][:take]])
            dealt[rich] = dealt[rich][take:]
    return dealt


def _pathological(y: np.ndarray, clients: int, num_classes: int, classes: int, rng: np.random.Generator) -> list:
    sizes = np.bincount(y, minlength=num_classes)
    present = int((sizes > 0).sum())
    if not isinstance(classes, int) or not 1 <= classes <= present:
        raise ValueError(f"partition: classes={classes!r} a client; the data holds {present}, wanted 1..{present}")
    shards, most = clients * classes, np.minimum(sizes, clients)
    if not present <= shards <= most.sum():
        raise ValueError(
            f"partition: {clients} clients of {classes} classes are {shards} shards, but {present} classes of this "
            f"size make {present} to {most.sum()}; wanted a number in between: change clients or classes"
        )
    left = _apportion(sizes.astype(np.float64), shards, most, least=1)
    piles = [np.array_split(rng.permutation(np.flatnonzero(y == c)), n) if n else [] for c, n in enumerate(left)]
    parts = []
    for _ in range(clients):
        # the classes with most shards left first: then no client is ever left with too few classes (Gale-Ryser)
        order = np.lexsort((rng.random(num_classes), -left))[:classes]
        left[order] -= 1
        parts.append(np.concatenate([piles[c].pop() for c in order]))
    return [parts[i] for i in rng.permutation(clients)]


def _natural(split: Split, clients: int, rng: np.random.Generator) -> list:
    if split.group is None:
        raise ValueError(
            "partition: natural needs to know who made each sample and this data set does not say; "
            "femnist, qmnist, shakespeare and har do"
        )
    group = split.group.numpy()
    ids = np.unique(group)
    if clients > len(ids):
        raise ValueError(f"partition: clients={clients} but the data has {len(ids)} groups; wanted at most {len(ids)}")
    owner = np.arange(len(ids))
    if clients < len(ids):
        owner = rng.permutation(owner) % clients
    client = owner[np.searchsorted(ids, group)]
    return [np.flatnonzero(client == c) for c in range(clients)]


def _cap(part: np.ndarray, y: np.ndarray, cap: int, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    if len(part) <= cap:
        return part
    sizes = np.bincount(y[part], minlength=num_classes)
    exact = sizes * (cap / len(part))
    counts = np.floor(exact).astype(np.int64)
    # largest remainder: at most one above the exact share, so never more than there are
    counts[np.argsort(counts - exact, kind="stable")[: cap - counts.sum()]] += 1
    return np.concatenate([rng.permutation(part[y[part] == c])[:n] for c, n in enumerate(counts)])
