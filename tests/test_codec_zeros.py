"""Codes that rounding made 0 are left out of explicit frames: nothing else about them changes."""

import dataclasses

import numpy as np
import pytest
import torch

from autoflip import MaskSet, codec
from autoflip.codec import selection
from autoflip.ops import backend, delta, delta_stream, delta_zeros

SIZES = [1, 2, 63, 255, 256, 257, 511, 4099, (1 << 18) + 77]
KINDS = {"int8": 2, "int4": 3}


def coded(n, density, kind, levels=None):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g) ** 3 * (torch.rand(n, generator=g) < density)
    x[n // 3] = 1.0
    stream, mask, _ = delta_stream.code_nonzero(x, KINDS[kind], (3, n), levels)
    return dataclasses.replace(stream, streams=tuple(s.copy() for s in stream.streams)), mask


@pytest.mark.parametrize("served", ["auto", "reference"])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_decodes_to_the_same_numbers(kind, density, n, served, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_BACKEND", served)
    whole, mask = coded(n, density, kind)
    want, zeros = delta_stream.decode(whole, mask), delta_zeros.zero_codes(whole)
    assert zeros == int((delta_stream.codes_of(whole) == 0).sum())
    left, entries = delta_zeros.drop_zeros(whole, mask)
    assert left.count == entries.kept == mask.kept - zeros + delta_zeros.zero_codes(left)
    assert delta_zeros.zero_codes(left) == int((left.survivors == 0).sum()) - _lone(left)
    assert delta_stream.valid(left)
    assert torch.equal(delta_stream.decode(left, entries), want)
    total = torch.linspace(-1, 1, n)
    expected = total + want * 0.25
    delta_stream.accumulate(left, entries, total, 0.25)
    assert torch.equal(total, expected)
    wide = torch.zeros(n, dtype=torch.float64)
    delta_stream.accumulate(left, entries, wide, 0.25)
    assert torch.equal(wide, (want * 0.25).double())


def _lone(stream):
    """Blocks of one code that is not 0."""
    alone = np.flatnonzero(stream.survivors == 0)
    return int((delta_stream.codes_of(stream)[stream.starts[alone]] != 0).sum())


@pytest.mark.skipif(backend.extension("_C")[0] is None, reason="autoflip._C is not built")
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_cpp_equals_reference_bit_by_bit(kind, n, monkeypatch):
    found = {}
    for served in ("auto", "reference"):
        monkeypatch.setenv("AUTOFLIP_BACKEND", served)
        found[served] = delta_zeros.drop_zeros(*coded(n, 0.4, kind, 5))
    (fast, here), (slow, there) = found.values()
    assert np.array_equal(fast.streams[0], slow.streams[0])
    assert np.array_equal(fast.survivors, slow.survivors)
    assert torch.equal(here.words, there.words)


@pytest.mark.parametrize("served", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_zeros_keeps_one(kind, served, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_BACKEND", served)
    x = torch.full((700,), 1e-45)  # a scale is a normal number: these are far below it
    x[300] = 1.0
    stream, mask, _ = delta_stream.code_nonzero(x, KINDS[kind], None)
    left, entries = delta_zeros.drop_zeros(stream, mask)
    assert left.survivors.tolist() == [0, 0, 0]
    assert delta.bits(entries).nonzero().view(-1).tolist() == [0, 300, 512]
    assert delta_stream.decode(left, entries).nonzero().tolist() == [[300]]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("way", [{"values": "int8", "levels": 10}, {"values": "int4"}], ids=str)
def test_frames_are_smaller_and_mean_the_same(way, rounding, shared, monkeypatch):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 300, generator=g) * (torch.rand(200, 300, generator=g) < 0.1)
    masks = MaskSet({"w": torch.rand(200, 300, generator=g) < 0.7}) if shared else None
    delta_ = {"w": x, "bias": torch.randn(200, generator=g)}
    blob = codec.encode(delta_, masks=masks, rounding=rounding, **way)
    row = codec.inspect(blob)["tensors"][0]
    assert row["blocks"]
    monkeypatch.setattr(selection, "_DROP_FROM", 2.0)  # never
    before = codec.encode(delta_, masks=masks, rounding=rounding, **way)
    old = codec.inspect(before)["tensors"][0]
    assert old["kept"] > row["kept"]
    assert not old["blocks"]
    assert len(blob) < 0.95 * len(before)  # at 10 levels a tenth less, at 7 more
    got, want = codec.decode(blob, masks=masks), codec.decode(before, masks=masks)
    assert all(torch.equal(got[n], want[n]) for n in want)
    sums = {n: torch.ones(t.shape) for n, t in want.items()}
    codec.accumulate(blob, sums, 0.5, masks=masks)
    assert all(torch.equal(sums[n], 1 + 0.5 * want[n]) for n in want)


def test_few_zeros_stay():
    g = torch.Generator().manual_seed(0)
    x = (1 + torch.rand(100, 100, generator=g)) * (torch.rand(100, 100, generator=g) < 0.1)
    assert not codec.inspect(codec.encode({"w": x}, values="int8"))["tensors"][0]["blocks"]
    small = torch.zeros(10, 30)
    small[:, 0], small[0, 0] = 0.01, 1.0  # nine of ten codes of int4 are 0, too few for the bytes it takes
    assert not codec.inspect(codec.encode({"w": small}, values="int4", rounding="nearest"))["tensors"][0]["blocks"]


def test_rounding_stays_unbiased():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 50, generator=g) * (torch.rand(40, 50, generator=g) < 0.3)
    trials = 400
    total = torch.zeros(40, 50, dtype=torch.float64)
    for seed in range(trials):
        blob = codec.encode({"w": x}, values="int4", seed=seed)
        assert codec.inspect(blob)["tensors"][0]["blocks"]
        total += codec.decode(blob)["w"]
    step = x.abs().max() / 7  # no scale is above it; a mean of rounded values deviates by half a step over sqrt(trials)
    apart = (total / trials - x) / (0.5 * step / trials**0.5)
    assert apart.abs().max() < 5  # 600 values that are not zero: five deviations have odds of 3e-4
    assert not total[x == 0].any()
