"""Partitions: disjoint, complete, reproducible, and of the shape that their names promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip.fed.data import Split
from autoflip.fed.partition import KINDS, split


def labelled(sizes, groups=None, seed=0):
    """A split of ``sizes[c]`` samples of class c in random order."""
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    group = None if groups is None else torch.arange(len(y)) % groups * 7 + 3
    return Split(torch.zeros(len(y), 1), y, group)


def histogram(s, parts, classes):
    return torch.stack([s.y[p].bincount(minlength=classes) for p in parts])


@pytest.mark.parametrize("clients", [1, 7, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_disjoint_complete_and_reproducible(kind, clients):
    s = labelled([50, 30, 70, 60], groups=30)
    classes = 4 if clients == 1 else 2
    deal = lambda seed: split(s, kind, clients=clients, seed=seed, num_classes=4, alpha=0.3, classes=classes)
    parts = deal(5)
    assert len(parts) == clients
    assert all(p.dtype is torch.int64 and len(p) for p in parts)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(s)))
    assert all(torch.equal(p, p.sort().values) for p in parts)
    assert all(torch.equal(p, q) for p, q in zip(parts, deal(5)))
    if clients == 7:
        assert not all(torch.equal(p, q) for p, q in zip(parts, deal(6)))


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda s: sum(s) > 0),
    clients=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    alpha=st.floats(1e-3, 1e3),
    classes=st.integers(1, 8),
    cap=st.none() | st.integers(1, 20),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_arguments_give_a_partition_or_a_clear_error(sizes, clients, kind, alpha, classes, cap, seed):
    s = labelled(sizes, groups=9)
    arguments = {"clients": clients, "seed": seed, "num_classes": len(sizes), "alpha": alpha, "classes": classes}
    try:
        parts = split(s, kind, **arguments, samples_per_client=cap)
    except ValueError:
        with pytest.raises(ValueError, match="wanted"):
            split(s, kind, **arguments, samples_per_client=cap)
        return
    everything = torch.cat(parts)
    assert len(parts) == clients
    assert len(everything.unique()) == len(everything)
    assert all(len(p) for p in parts)
    whole = split(s, kind, **arguments)
    assert [len(p) for p in parts] == [min(len(p), cap or len(p)) for p in whole]
    assert sum(map(len, whole)) == len(s)
    assert all(set(p.tolist()) <= set(q.tolist()) for p, q in zip(parts, whole))


def test_iid_parts_are_equal_and_mixed():
    s = labelled([500] * 10)
    parts = split(s, "iid", clients=10, seed=0, num_classes=10)
    assert {len(p) for p in parts} == {500}
    # each count is hypergeometric: mean 50, standard deviation 6.4; 100 of them within 5 deviations
    assert (histogram(s, parts, 10) - 50).abs().max() < 32


def test_dirichlet_follows_its_alpha():
    s = labelled([1000] * 10)
    spread = {}
    for alpha in (0.05, 0.5, 1000.0):
        shares = torch.cat(
            [
                histogram(s, split(s, "dirichlet", clients=10, seed=i, num_classes=10, alpha=alpha), 10)
                for i in range(10)
            ]
        )
        spread[alpha] = (shares / 1000).var(unbiased=False).item()
    # variance of one Dirichlet share among K = 10 clients: (K - 1) / (K^2 (K alpha + 1))
    for alpha, got in spread.items():
        want = 9 / (100 * (10 * alpha + 1))
        # 100 draws of 10 shares: a relative standard error near 0.1 for small alpha; 3 of them. Whole samples add
        # at most 1/12 / 1000^2; topping up poor clients is below 1 % of the samples
        assert got == pytest.approx(want, rel=0.3, abs=1e-6)


def test_dirichlet_leaves_nobody_without_samples():
    s = labelled([100] * 10)
    for seed in range(5):
        parts = split(s, "dirichlet", clients=50, seed=seed, num_classes=10, alpha=0.01)
        assert min(map(len, parts)) >= 10
    parts = split(labelled([10] * 2), "dirichlet", clients=20, seed=0, num_classes=2, alpha=0.01)
    assert [len(p) for p in parts] == [1] * 20


@pytest.mark.parametrize("clients, classes", [(5, 2), (20, 2), (10, 1), (7, 3), (100, 2), (3, 10), (1, 10)])
def test_pathological_clients_hold_exactly_their_number_of_classes(clients, classes):
    s = labelled([200] * 10)
    parts = split(s, "pathological", clients=clients, seed=3, num_classes=10, classes=classes)
    counts = histogram(s, parts, 10)
    assert ((counts > 0).sum(1) == classes).all()
    assert counts.sum(0).tolist() == [200] * 10
    if clients % 10 == 0:  # every class is cut into equal shards
        assert len({len(p) for p in parts}) == 1


def test_pathological_gives_large_classes_more_shards():
    s = labelled([10, 1000, 0, 90])
    counts = histogram(s, split(s, "pathological", clients=11, seed=0, num_classes=4, classes=1), 4)
    assert (counts > 0).sum(0).tolist() == [1, 9, 0, 1]


def test_natural_keeps_makers_together():
    s = labelled([40, 50], groups=9)
    parts = split(s, "natural", clients=9, seed=0, num_classes=2)
    assert [s.group[p].unique().tolist() for p in parts] == [[3 + 7 * g] for g in range(9)]
    merged = split(s, "natural", clients=4, seed=0, num_classes=2)
    makers = [set(s.group[p].tolist()) for p in merged]
    assert sorted(map(len, makers)) == [2, 2, 2, 3]
    assert len(set.union(*makers)) == 9


def test_cap_keeps_classes_in_proportion():
    s = labelled([300, 150, 50])
    (part,) = split(s, "iid", clients=1, seed=0, num_classes=3, samples_per_client=100)
    assert s.y[part].bincount().tolist() == [60, 30, 10]
    other = split(s, "iid", clients=1, seed=1, num_classes=3, samples_per_client=100)[0]
    assert not np.array_equal(part, other)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "pathologic"}, "did you mean 'pathological'"),
        ({"clients": 0}, r"clients=0; wanted 1\.\.100"),
        ({"clients": 101}, r"clients=101; wanted 1\.\.100"),
        ({"clients": 2.5}, "clients=2.5"),
        ({"num_classes": 3}, "num_classes=3"),
        ({"kind": "dirichlet", "alpha": 0.0}, "alpha=0.0; wanted a positive number"),
        ({"kind": "dirichlet", "alpha": float("nan")}, "alpha=nan"),
        ({"kind": "dirichlet", "alpha": float("inf")}, "alpha=inf"),
        ({"kind": "pathological", "classes": 0}, "classes=0 a client; the data holds 4"),
        ({"kind": "pathological", "classes": 5}, "classes=5 a client; the data holds 4"),
        ({"kind": "pathological", "classes": 1, "clients": 3}, "3 shards, but 4 classes"),
        ({"kind": "natural", "clients": 6}, "the data has 5 groups; wanted at most 5"),
        ({"samples_per_client": 0}, "samples_per_client=0"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"kind": "iid", "clients": 5, "seed": 0, "num_classes": 4} | change
    with pytest.raises(ValueError, match=message):
        split(labelled([25] * 4, groups=5), **arguments)


def test_natural_needs_groups():
    with pytest.raises(ValueError, match="femnist, qmnist, shakespeare and har do"):
        split(labelled([5]), "natural", clients=1, seed=0, num_classes=1)
