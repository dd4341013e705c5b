"""Values to streams and back in one pass: the same bits as gather, quantise and expand one after another."""

import dataclasses

import numpy as np
import pytest
import torch

from autoflip.ops import backend, delta, delta_stream

SIZES = [0, 1, 63, 257, 4096, 4097, (1 << 18) - 1, (1 << 18) + 77, (1 << 19) + 300]
KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}


def case(n, density):
    g = torch.Generator().manual_seed(n)
    x, base = torch.randn(n, generator=g), torch.randn(n, generator=g)
    mask = None if density is None else delta.pack(torch.rand(n, generator=g) < density)
    return x, base, mask


@pytest.mark.skipif(backend.extension("_C")[0] is None, reason="autoflip._C is not built")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.0005, 0.3, 1.0, None])  # 0.0005: a block of 256 spans several ranges
def test_cpp_equals_reference_bit_by_bit(n, density, threads, monkeypatch):
    x, base, mask = case(n, density)
    held = torch.get_num_threads()
    for kind, levels in [*((kind, None) for kind in KINDS.values()), (KINDS["int8"], 40), (KINDS["int4"], 3)]:
        for start in (None, base):
            monkeypatch.setenv("AUTOFLIP_BACKEND", "auto")
            torch.set_num_threads(threads)
            try:
                fast, finite = delta_stream.code(x, mask, kind, (3, n), start, levels)
                dense = delta_stream.decode(fast, mask)
                total = x.clone()
                delta_stream.accumulate(fast, mask, total, 0.3)
            finally:
                torch.set_num_threads(held)
            monkeypatch.setenv("AUTOFLIP_BACKEND", "reference")
            slow, _ = delta_stream.code(x, mask, kind, (3, n), start, levels)
            assert finite
            assert np.array_equal(np.stack(fast.streams), np.stack(slow.streams))
            assert np.array_equal(fast.scales, slow.scales)
            assert torch.equal(dense, delta_stream.decode(slow, mask))
            assert torch.equal(total, x + dense * torch.tensor(0.3))


@pytest.mark.skipif(backend.extension("_C")[0] is None, reason="autoflip._C is not built")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.0005, 0.3, 1.0])
def test_what_is_not_zero_is_found_and_coded_in_one_pass(n, density, threads):
    x, _, mask = case(n, density)
    x = torch.where(delta.bits(mask), x, -0.0)
    held = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kind in KINDS.values():
            fused, found, finite = delta_stream.code_nonzero(x, kind, (3, n))
            apart, _ = delta_stream.code(x, mask, kind, (3, n))
            assert finite
            assert torch.equal(found.words, mask.words)
            assert torch.equal(found.offsets, mask.offsets)
            assert fused.count == apart.count == mask.kept
            assert np.array_equal(np.stack(fused.streams), np.stack(apart.streams))
            assert np.array_equal(fused.scales, apart.scales)
    finally:
        torch.set_num_threads(held)
    if n:
        x[n // 2] = float("nan")
        assert not delta_stream.code_nonzero(x, 2, (3, n))[2]


@pytest.mark.parametrize("served", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_out_is_written_over(kind, served, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_BACKEND", served)
    x, _, mask = case(1000, 0.2)
    coded, _ = delta_stream.code(x, mask, KINDS[kind], (1, 2))
    out = torch.full((10, 100), 7.0)
    assert delta_stream.decode(coded, mask, out) is out
    assert torch.equal(out.view(-1), delta_stream.decode(coded, mask))
    with pytest.raises(ValueError, match="wanted contiguous float32 of 1000"):
        delta_stream.decode(coded, mask, torch.zeros(999))
    with pytest.raises(ValueError, match="of two tensors"):
        delta_stream.decode(coded, case(1000, 0.9)[2])


@pytest.mark.parametrize("served", ["auto", "reference"])
def test_streams_that_no_encoder_writes_are_not_valid(served, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_BACKEND", served)
    x = torch.randn(301, generator=torch.Generator().manual_seed(0))

    def bad(kind, stream, place, value):
        coded, _ = delta_stream.code(x, None, KINDS[kind], (1, 2))
        assert delta_stream.valid(coded)
        streams = np.stack(coded.streams)
        streams[stream, place] = value
        return not delta_stream.valid(dataclasses.replace(coded, streams=tuple(streams)))

    for place in (0, 150, 300):
        assert bad("int8", 0, place, 0x80)
        x[place] = 1.5  # the low exponent bit is set: 0x7F above it makes infinity
        assert bad("fp32", 3, place, 0x7F)
        assert bad("bf16", 1, place, 0xFF)
    assert bad("int4", 0, 20, 0x80)
    assert bad("int4", 0, 20, 0x08)
    assert bad("int4", 0, 150, 0x10)  # a code past the end
    coded, _ = delta_stream.code(x, None, KINDS["int8"], (1, 2))
    for scale in (-1.0, np.nan, np.inf, 3e38):
        scales = np.array([1.0, scale], np.float32)
        assert not delta_stream.valid(dataclasses.replace(coded, scales=scales))


@pytest.mark.parametrize("served", ["auto", "reference"])
@pytest.mark.parametrize("place", [0, 500, 999])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_bad_entry_is_seen_kept_or_not(place, value, served, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_BACKEND", served)
    for density in (0.0, 0.5, None):
        x, _, mask = case(1000, density)
        x[place] = float(value)
        for kind in KINDS.values():
            assert not delta_stream.code(x, mask, kind, (1, 2))[1]


@pytest.mark.parametrize("served", ["auto", "reference"])
def test_within_keeps_the_ranks(served, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_BACKEND", served)
    g = torch.Generator().manual_seed(0)
    for n in (0, 1, 63, 64, 1000, (1 << 18) + 77):
        mask = torch.rand(n, generator=g) < 0.3
        ranks = torch.rand(int(mask.sum()), generator=g) < 0.4
        want = torch.zeros(n, dtype=torch.bool)
        want[mask.nonzero().flatten()[ranks]] = True
        got = delta.within(delta.pack(mask), delta.pack(ranks))
        assert torch.equal(delta.bits(got), want)
        assert got.kept == int(ranks.sum())
    with pytest.raises(ValueError, match="ranks cover 3 entries"):
        delta.within(delta.pack(torch.ones(5, dtype=torch.bool)), delta.pack(torch.ones(3, dtype=torch.bool)))


def test_zero_share_is_near_the_truth():
    g = torch.Generator().manual_seed(0)
    for n in (100, 1 << 20):
        x, mask = torch.randn(n, generator=g), torch.rand(n, generator=g) < 0.5
        x[torch.rand(n, generator=g) < 0.4] = 0
        # about 8000 draws of probability 0.4, or 50: five standard errors
        share = delta.zero_share(x, delta.pack(mask))
        assert abs(share - 0.4) < 5 * (0.24 / min(8000, n / 2)) ** 0.5
    assert delta.zero_share(torch.zeros(0), delta.pack(torch.zeros(0, dtype=torch.bool))) == 0
