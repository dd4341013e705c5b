"""Aggregation: the mean over the clients that hold a coordinate, from real payloads."""

import pytest
import torch

from autoflip import MaskSet, codec
from autoflip.fed.aggregate import Aggregator


def _parts(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(6, 5, generator=g), "b": torch.randn(6, generator=g)}


def test_mean_over_holders_equals_float64():
    deltas = [_parts(k) for k in range(4)]
    schema = codec.Schema.of(deltas[0])
    masks = [
        None,
        *(MaskSet({"w": torch.rand(6, 5, generator=torch.Generator().manual_seed(9 + k)) < 0.4}) for k in range(3)),
    ]
    weights = [10.0, 20.0, 30.0, 5.0]
    total = Aggregator({k: v.shape for k, v in deltas[0].items()}, schema)
    for delta, mask, weight in zip(deltas, masks, weights):
        total.add(codec.encode(delta, masks=mask, values="fp32", schema=schema), weight, mask)
    holds = torch.stack([(m["w"] if m is not None else torch.ones(6, 5)).double() for m in masks])
    w = torch.tensor(weights).double()[:, None, None]
    stacked = torch.stack([d["w"] for d in deltas]).double()
    want = (w * holds * stacked).sum(0) / (w * holds).sum(0)
    got = total.mean()
    # float32 sums of four terms
    torch.testing.assert_close(got["w"].double(), want, rtol=1e-5, atol=1e-6)
    bias = torch.stack([d["b"] for d in deltas]).double()
    torch.testing.assert_close(got["b"].double(), (w[:, 0] * bias).sum(0) / sum(weights), rtol=1e-5, atol=1e-6)


def test_nobody_holding_a_coordinate_leaves_it_alone():
    delta = {"w": torch.ones(4)}
    schema = codec.Schema.of(delta)
    total = Aggregator({"w": torch.Size([4])}, schema)
    for mask in (torch.tensor([True, False, False, False]), torch.tensor([True, True, False, False])):
        kept = MaskSet({"w": mask})
        total.add(codec.encode(delta, masks=kept, values="fp32", schema=schema), 2.0, kept)
    assert total.mean()["w"].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_a_damaged_update_changes_nothing():
    delta = _parts()
    schema = codec.Schema.of(delta)
    blob = codec.encode(delta, values="int8", schema=schema)
    total = Aggregator({k: v.shape for k, v in delta.items()}, schema)
    total.add(blob, 1.0, None)
    before = {k: v.clone() for k, v in total.sums.items()}
    bad = bytearray(blob)
    bad[-1] ^= 1
    with pytest.raises(codec.DecodeError):
        total.add(bytes(bad), 1.0, None)
    assert all(torch.equal(before[k], total.sums[k]) for k in before)
    assert total.weight == 1.0
