"""Aggregation: the mean over the clients that hold a coordinate, from real payloads."""

import pytest
import torch

from autoflip import MaskSet, codec, prune
from autoflip.fed.aggregate import Aggregator
from autoflip.fed.coordinates import Coordinates
from autoflip.nn import compact


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
    total = Aggregator(lambda kept: Coordinates(schema, kept))
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
    total = Aggregator(lambda kept: Coordinates(schema, kept))
    for mask in (torch.tensor([True, False, False, False]), torch.tensor([True, True, False, False])):
        kept = MaskSet({"w": mask})
        total.add(codec.encode(delta, masks=kept, values="fp32", schema=schema), 2.0, kept)
    assert total.mean()["w"].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_a_damaged_update_changes_nothing():
    delta = _parts()
    schema = codec.Schema.of(delta)
    blob = codec.encode(delta, values="int8", schema=schema)
    total = Aggregator(lambda kept: Coordinates(schema, kept))
    total.add(blob, 1.0, None)
    before = total.mean()
    bad = bytearray(blob)
    bad[-1] ^= 1
    with pytest.raises(codec.DecodeError):
        total.add(bytes(bad), 1.0, None)
    after = total.mean()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert total.weight == 1.0


def test_updates_of_compact_models_of_two_widths_meet_in_full_coordinates():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3))
    scores = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    shares = {4: 0.34, 8: 0.67}
    masks = {units: prune.hybrid(model, scores, density=1.0, channels=share) for units, share in shares.items()}
    plans = {kept.fingerprint(): compact(model, masks=kept).plan for kept in masks.values()}

    def locate(kept):
        plan = plans[kept.fingerprint()]
        shapes = {name: torch.zeros(plan.small_shape(name)) for name in dict(model.named_parameters())}
        return Coordinates(codec.Schema.of(shapes), None, plan)

    total, sums, held = Aggregator(locate), 0.0, 0.0
    for weight, (units, kept) in zip((3.0, 5.0), masks.items()):
        at = locate(kept)
        delta = {name: torch.rand(shape) + 1 for name, shape in at.schema.shapes.items()}
        assert len(delta["0.weight"]) == units
        total.add(codec.encode(delta, values="fp32", schema=at.schema), weight, kept)
        sums = sums + weight * at.expand(delta)["0.weight"].double()
        held = held + weight * kept["0.weight"].double()
    want = torch.where(held > 0, sums / held.clamp_min(1e-9), 0.0)
    assert (held == 5.0).any()  # some are held by one of them
    assert (held == 8.0).any()
    # float32 sums of two terms
    torch.testing.assert_close(total.mean()["0.weight"].double(), want, rtol=1e-5, atol=0)
