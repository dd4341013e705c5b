"""Frames of updates: what goes in comes out, rounded without bias, at the size that was promised."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip import MaskSet, codec, prune
from autoflip.codec import packing
from autoflip.ops.backend import BackendError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@st.composite
def updates(draw):
    """A dict of tensors and a mask over some of them: 0-d, empty, non-contiguous, all dtypes."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    tensors, masks = {}, {}
    for i in range(draw(st.integers(0, 5))):
        shape = draw(st.lists(st.integers(0, 19), max_size=4).filter(lambda s: np.prod(s) < 5000))
        dtype = draw(st.sampled_from(FLOATS + INTEGERS))
        name = draw(st.text(max_size=5)) + str(i)
        if dtype in INTEGERS:
            tensors[name] = torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=g).to(dtype)
            continue
        x = torch.randn(shape, generator=g).to(dtype)
        x[torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.5, 0.97, 1.0]))] = 0
        tensors[name] = x.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else x
        if draw(st.booleans()):
            density = draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
            masks[name] = torch.rand(tensors[name].shape, generator=g) < density
    return tensors, MaskSet(masks)


def masked(tensors, masks):
    return {
        n: torch.where(masks[n], t, torch.zeros((), dtype=t.dtype)) if n in masks else t for n, t in tensors.items()
    }


def coded_as(tensors):
    return {n: t.to(torch.float32) if t.is_floating_point() else t for n, t in tensors.items()}


def assert_same(got, want):
    assert list(got) == list(want)
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert got[name].shape == want[name].shape
        assert torch.equal(got[name], want[name]), name


@given(updates(), st.booleans(), st.booleans(), st.sampled_from(["zstd", "none"]))
@settings(max_examples=150)
def test_fp32_frame_returns_what_went_in(update, use_masks, use_schema, entropy):
    tensors, masks = update
    masks = masks if use_masks else None
    schema = codec.Schema.of(tensors) if use_schema else None
    blob = codec.encode(tensors, masks=masks, values="fp32", entropy=entropy, schema=schema)
    want = coded_as(tensors if masks is None else masked(tensors, masks))
    assert_same(codec.decode(blob, masks=masks, schema=schema), want)


WAYS = [("bf16", None), ("int8", None), ("int4", None), ("int8", 40), ("int8", 1), ("int4", 2)]  # values, levels


@given(updates(), st.booleans(), st.sampled_from(WAYS))
@settings(max_examples=150)
def test_rounded_frame_is_within_one_step(update, use_masks, way):
    tensors, masks = update
    masks, (values, levels) = masks if use_masks else None, way
    got = codec.decode(codec.encode(tensors, masks=masks, values=values, levels=levels, seed=3), masks=masks)
    for name, want in coded_as(tensors if masks is None else masked(tensors, masks)).items():
        if not want.is_floating_point():
            assert torch.equal(got[name], want)
            continue
        assert torch.equal(got[name] == 0, (want == 0) | (got[name] == 0))  # a zero stays zero
        top = float(want.abs().max()) if want.numel() else 0.0
        if values == "bf16" or want.dim() < 2:
            tol = want.abs() * 2**-7  # one unit in the last of bf16's 8 bits
        else:
            tol = top / (levels or (127 if values == "int8" else 7)) * (1 + 1e-6)  # one step, its scale rounded
        assert bool(((got[name] - want).abs() <= tol).all())


@pytest.mark.parametrize("values, levels", WAYS[:4])  # fewer levels: 400 draws are no normal law
def test_rounding_is_unbiased(values, levels):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 128, generator=g)
    x[0, :7] = torch.tensor([0.0, 1e-9, -1e-9, 1e-40, 0.5, -0.25, 1.0])
    way = {"values": values, "levels": levels}
    draws = torch.stack([codec.decode(codec.encode({"x": x}, seed=s, **way))["x"] for s in range(400)]).double()
    error = draws.mean(0) - x.double()
    stderr = (draws.std(0) / 400**0.5).clamp_min(1e-12)
    z = error / stderr
    exact = draws.std(0) == 0
    # an entry that never moved is exact or its chance of moving is below 1 in 400 draws
    step = x.abs().max() / (levels or 7)
    assert float(error[exact].abs().max()) <= 5 / 400 * float(step)
    assert float(z[~exact].abs().max()) < 5.5  # 2048 normal draws exceed that once in 10^4 seeds
    assert abs(float(z[~exact].mean())) * (~exact).sum() ** 0.5 < 4


def test_rounding_is_keyed_by_seed_round_client_and_tensor():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    base = codec.encode({"a": x, "b": x}, values="int8", seed=1, round=2, client=3)
    assert base == codec.encode({"a": x, "b": x}, values="int8", seed=1, round=2, client=3)
    two = codec.decode(base)
    assert not torch.equal(two["a"], two["b"])
    for other in ({"seed": 9}, {"round": 9}, {"client": 9}):
        key = {"seed": 1, "round": 2, "client": 3} | other
        assert not torch.equal(codec.decode(codec.encode({"a": x, "b": x}, values="int8", **key))["a"], two["a"])


@pytest.mark.parametrize("values", ["bf16", "int8", "int4"])
def test_extreme_values_stay_finite(values):
    top = torch.finfo(torch.float32).max
    x = torch.tensor([[top, -top, 0.0, 1.0], [top / 2, -1e38, 3e38, 0.0]])
    y = codec.decode(codec.encode({"x": x}, values=values, seed=1))["x"]
    assert bool(torch.isfinite(y).all())
    tiny = torch.tensor([[1e-45, -3e-45, 1e-38, 0.0]])
    assert float((codec.decode(codec.encode({"x": tiny}, values=values))["x"] - tiny).abs().max()) <= 1.2e-38


def striped():
    """A tensor of which a few columns hold all that is not zero."""
    g = torch.Generator().manual_seed(0)
    held = torch.rand(90, 2, 50, generator=g) * (torch.rand(2, 50, generator=g) < 0.1)
    return torch.where(torch.rand(held.shape, generator=g) < 0.6, held, 0)


@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_columns_are_told_by_columns(values):
    w = striped()
    for x, coding in ((w, "varint, by columns"), (w.permute(1, 2, 0).reshape(100, 90), None)):
        blob = codec.encode({"w": x}, values=values)
        assert (codec.inspect(blob)["tensors"][0]["coding"] == coding) == (coding is not None)
        got = codec.decode(blob)["w"]
        torch.testing.assert_close(got, x, rtol=0, atol=0 if values == "fp32" else 1 / 127)
        total = {"w": torch.ones_like(x)}
        codec.accumulate(blob, total, 2.0)
        assert torch.equal(total["w"], 1 + 2 * got)
    assert "columns" not in codec.inspect(codec.encode({"w": w}, entropy="none"))["tensors"][0]["coding"]


def test_explicit_index_takes_the_smallest_coding():
    g = torch.Generator().manual_seed(0)

    def coding(x):
        blob = codec.encode({"x": x}, values="fp32")
        assert torch.equal(codec.decode(blob)["x"], x)
        return codec.inspect(blob)["tensors"][0]["coding"]

    x = torch.randn(400, 500, generator=g)
    assert coding(x) == "whole"
    assert coding(x * (torch.rand(x.shape, generator=g) < 0.6)) == "bitmap"
    assert coding(x * (torch.rand(x.shape, generator=g) < 0.05)) == "rice"
    assert coding(torch.zeros(400, 500)) == "rice"  # no entries, no bytes
    every = torch.zeros(200_000)
    every[::50] = 1.5  # a repeated gap packs to nothing
    assert coding(every) in ("varint", "bitmap")
    holes = torch.zeros(1 << 21)
    holes[[5, 300, (1 << 21) - 1]] = 2.0  # gaps beyond any short code
    assert torch.equal(codec.decode(codec.encode({"x": holes}))["x"], holes)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1])
def test_rice_index_is_near_the_entropy(density):
    n = 500_000
    x = (torch.rand(n, generator=torch.Generator().manual_seed(0)) < density).float()
    blob = codec.encode({"x": x}, values="bf16", entropy="none")
    kept = int(x.sum())
    entropy = n * -(density * np.log2(density) + (1 - density) * np.log2(1 - density)) / 8
    assert len(blob) - 2 * kept < 1.05 * entropy + 200


def test_shared_mask_sends_values_only():
    g = torch.Generator().manual_seed(0)
    delta = {"w": torch.randn(500, 1000, generator=g), "b": torch.randn(500, generator=g)}
    masks = MaskSet({"w": torch.rand(500, 1000, generator=g) < 0.1})
    schema = codec.Schema.of(delta)
    blob = codec.encode(delta, masks=masks, values="int8", schema=schema)
    kept = masks.kept
    assert len(blob) <= kept + 4 * -(-kept // 256) + 2 * 500 + 200
    assert len(pickle.dumps(delta)) > 35 * len(blob)


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "int4"])
def test_entries_inside_the_mask_are_named_by_rank(values):
    """A top-k inside the mask: ranks are a quarter below positions, and what decodes is the same."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(700, 900, generator=g)
    masks = MaskSet({"w": torch.rand(700, 900, generator=g) < 0.1})
    x = torch.where(masks["w"] & (x.abs() > 1.96), x, 0)
    schema = codec.Schema.of({"w": x})
    blob = codec.encode({"w": x}, masks=masks, values=values, schema=schema)
    told = codec.inspect(blob, schema=schema)
    assert told["tensors"][0]["coding"].startswith("ranks")
    assert told["tensors"][0]["kept"] == int(x.count_nonzero())
    positions = codec.inspect(codec.encode({"w": x}, values=values, schema=schema), schema=schema)
    assert told["sections"][0]["bytes"] < 0.75 * positions["sections"][0]["bytes"]
    got = codec.decode(blob, masks=masks, schema=schema)["w"]
    assert bool((got == 0)[x == 0].all())
    if values == "fp32":
        assert torch.equal(got, x)
    total = {"w": torch.ones(700, 900)}
    codec.accumulate(blob, total, 2.0, masks=masks, schema=schema)
    assert torch.equal(total["w"], 1 + 2 * got)
    # fixed lengths for secure aggregation: no ranks there
    plain = codec.encode({"w": x}, masks=masks, values=values, entropy="none")
    assert codec.inspect(plain)["tensors"][0]["coding"] == "shared mask"


def test_decode_writes_into_out():
    delta = {
        "w": torch.randn(30, 40, generator=torch.Generator().manual_seed(0)),
        "b": torch.ones(3),
        "n": torch.tensor(2),
    }
    masks = MaskSet({"w": delta["w"] > 1})
    blob = codec.encode(delta, masks=masks, values="fp32")
    out = {"w": torch.full((30, 40), 9.0), "b": torch.zeros(3)}
    got = codec.decode(blob, masks=masks, out=out)
    assert got["w"].data_ptr() == out["w"].data_ptr()
    assert list(got) == list(delta)
    assert_same(got, masked(delta, masks))
    before = out["w"].clone()
    with pytest.raises(codec.DecodeError):
        codec.decode(blob[:-1] + b"?", masks=masks, out=out)
    with pytest.raises(codec.DecodeError, match="out holds no tensor of that name"):
        codec.decode(blob, masks=masks, out={"w": out["w"]})
    with pytest.raises(ValueError, match="leave integer tensors out"):
        codec.decode(blob, masks=masks, out=out | {"n": torch.tensor(1)})
    assert torch.equal(out["w"], before)


def test_a_higher_level_is_smaller_and_decodes_alike():
    x = torch.zeros(400, 500)
    x[:, ::7] = torch.arange(400.0).view(-1, 1) / 64
    small, fast = (codec.encode({"x": x}, values="fp32", level=level) for level in (19, 1))
    assert len(small) <= len(fast)
    assert torch.equal(codec.decode(small)["x"], x)


def test_length_without_entropy_stage_depends_on_mask_and_schema_alone():
    g = torch.Generator().manual_seed(0)
    masks = MaskSet({"w": torch.rand(100, 100, generator=g) < 0.3})
    for values in ("fp32", "bf16", "int8", "int4"):
        sizes = {
            len(codec.encode({"w": x, "b": x[0]}, masks=masks, values=values, entropy="none"))
            for x in (torch.zeros(100, 100), torch.randn(100, 100, generator=g), torch.full((100, 100), 3.0))
        }
        assert len(sizes) == 1


@given(updates(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60)
def test_accumulate_adds_the_weighted_update(update, use_masks, dtype):
    tensors, masks = update
    masks = masks if use_masks else None
    g = torch.Generator().manual_seed(1)
    sums = {n: torch.randn(t.shape, generator=g, dtype=dtype) for n, t in tensors.items()}
    want = {n: t.clone() for n, t in sums.items()}
    blob = codec.encode(tensors, masks=masks, values="int8")
    for name, update in codec.decode(blob, masks=masks).items():
        want[name] += 0.3 * update.to(torch.float64 if update.dtype in INTEGERS else torch.float32)
    codec.accumulate(blob, sums, 0.3, masks=masks)
    for name in sums:
        # one rounding of a product to float32, one of a sum
        torch.testing.assert_close(sums[name], want[name], rtol=3e-7, atol=3e-6)


def test_accumulate_writes_through_a_view_that_is_not_contiguous():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    masks = MaskSet({"x": x > 0})
    total = torch.zeros(5, 6).T
    codec.accumulate(codec.encode({"x": x}, masks=masks, values="fp32"), {"x": total}, 2.0, masks=masks)
    assert torch.equal(total, 2 * x.clamp_min(0))


def test_inspect_tells_coding_kept_bytes_and_value_type():
    delta = {"w": torch.ones(8, 8), "b": torch.ones(8), "n": torch.tensor(3)}
    masks = MaskSet({"w": torch.eye(8, dtype=torch.bool)})
    blob = codec.encode(delta, masks=masks, values="int8", round=7, base_id=b"b" * 16)
    told = codec.inspect(blob)
    assert told["kind"] == "delta"
    assert told["round"] == 7
    assert told["bytes"] == len(blob)
    assert told["mask_id"] == masks.fingerprint()
    assert told["base_id"] == (b"b" * 16).hex()
    assert [(t["name"], t["coding"], t["values"], t["kept"], t["bytes"]) for t in told["tensors"]] == [
        ("w", "shared mask", "int8", 8, 12),
        ("b", "whole", "bf16", 8, 16),
        ("n", "whole", "int", 1, 8),
    ]
    bare = codec.inspect(codec.encode(delta, masks=masks, values="int8", schema=codec.Schema.of(delta)))
    assert [t["kept"] for t in bare["tensors"]] == [8, None, None]


def test_schema_id_depends_on_names_shapes_kinds_and_order():
    a, b = torch.zeros(2, 3), torch.zeros(4)
    schema = codec.Schema.of({"a": a, "b": b})
    assert schema == codec.Schema.of({"a": a.half(), "b": b.double()})
    assert schema.shapes == {"a": (2, 3), "b": (4,)}
    others = ({"b": b, "a": a}, {"a": a, "c": b}, {"a": a.T, "b": b}, {"a": a, "b": b.long()}, {"a": a})
    assert len({codec.Schema.of(o).id for o in others} | {schema.id}) == 6


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d, m: codec.encode(d, values="int2"), "wanted one of fp32, bf16, int8, int4"),
        (lambda d, m: codec.encode(d, entropy="lz4"), "entropy='lz4'"),
        (lambda d, m: codec.encode(d, level=0), "level=0, wanted 1"),
        (lambda d, m: codec.encode(d, round=-1), "wanted 0 to 2"),
        (lambda d, m: codec.encode(d, base_id=b"short"), "base_id has 5 bytes, wanted 16"),
        (lambda d, m: codec.encode(d | {"w": d["w"] / 0}), "'w' has 12 entries of 12 that are NaN or infinite"),
        (lambda d, m: codec.encode(d | {"w": d["w"] / 0}, masks=m), "'w' has 12 entries"),
        (lambda d, m: codec.encode({"w": torch.full((2, 2), 1e200, dtype=torch.float64)}), "in float32"),
        (lambda d, m: codec.encode({"w": torch.zeros(2, dtype=torch.complex64)}), "convert it first"),
        (lambda d, m: codec.encode({"w": [1.0]}), "wanted a torch.Tensor"),
        (lambda d, m: codec.encode({"b": d["b"]}, masks=m), "there is no tensor 'w'"),
        (lambda d, m: codec.encode(d, masks=dict(m)), "wanted a MaskSet"),
        (lambda d, m: codec.encode({"w": d["w"].long()}, masks=m), "integers travel whole"),
        (lambda d, m: codec.encode({"w": d["w"]}, schema=codec.Schema.of(d)), "names 'b', but the tensors do not"),
        (lambda d, m: codec.encode(d, schema=codec.Schema.of({"w": d["w"]})), "are not in the schema"),
        (lambda d, m: codec.encode(d | {"b": d["w"]}, schema=codec.Schema.of(d)), "got compacted"),
        (lambda d, m: codec.encode(d | {"b": d["b"].int()}, schema=codec.Schema.of(d)), "is torch.int32"),
        (lambda d, m: codec.accumulate(codec.encode(d), d, float("nan")), "weight=nan"),
        (lambda d, m: codec.accumulate(codec.encode(d), {"w": d["w"].half()}, 1.0), "wanted torch.float32"),
    ],
)
def test_errors_say_what_came_and_what_to_do(call, message):
    delta = {"w": torch.ones(3, 4), "b": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        call(delta, MaskSet({"w": torch.ones(3, 4, dtype=torch.bool).tril()}))


def test_missing_zstandard_is_said_and_none_needs_it_not(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    monkeypatch.setattr(packing, "_kept", packing._Kept())  # compressors that an earlier test left
    with pytest.raises(ImportError, match="pip install zstandard"):
        codec.encode({"w": torch.ones(30, 4)})
    blob = codec.encode({"w": torch.ones(3, 4)}, entropy="none", values="fp32")
    assert torch.equal(codec.decode(blob)["w"], torch.ones(3, 4))


@pytest.mark.parametrize("served", ["triton", "cuda", "reference"])
def test_a_wish_for_a_gpu_backend_leaves_frames_alone(served, monkeypatch):
    delta = {"w": torch.randn(40, 40, generator=torch.Generator().manual_seed(0))}
    masks = MaskSet({"w": delta["w"] > 1})
    blob = codec.encode(delta, masks=masks, values="int8")
    monkeypatch.setenv("AUTOFLIP_BACKEND", served)
    if served == "cuda" and not torch.cuda.is_available():  # triton's interpreter can run here
        with pytest.raises(BackendError, match="cuda, which cannot run here"):
            codec.encode(delta, masks=MaskSet(dict(masks)), values="int8")
        return
    assert codec.encode(delta, masks=MaskSet(dict(masks)), values="int8") == blob


@pytest.mark.gpu
def test_gpu_tensors_make_the_same_frame():
    delta = {"w": torch.randn(40, 40, generator=torch.Generator().manual_seed(0))}
    masks = MaskSet({"w": delta["w"] > 1})
    for m in (None, masks):
        on_gpu = {n: t.cuda() for n, t in delta.items()}
        assert codec.encode(on_gpu, masks=m, values="int8") == codec.encode(delta, masks=m, values="int8")


def test_masks_may_cover_more_than_travels():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 3))
    scores = {name: p.detach().abs() for name, p in model.named_parameters()}
    masks = prune.hybrid(model, scores, density=0.5, channels=0.5)
    assert "1.running_var" in masks
    delta = {name: torch.where(masks[name], torch.randn(p.shape), 0) if name in masks else torch.randn(p.shape)
             for name, p in model.named_parameters()}  # fmt: skip
    blob = codec.encode(delta, masks=masks, values="fp32")
    found = codec.decode(blob, masks=masks)
    assert all(torch.equal(found[name], value) for name, value in delta.items())
    sums = {name: torch.zeros_like(value) for name, value in delta.items()}
    codec.accumulate(blob, sums, 2.0, masks=masks)
    assert all(torch.equal(sums[name], 2 * value) for name, value in delta.items())
    one = codec.encode({"2.weight": delta["2.weight"]}, masks=masks, values="fp32")
    assert torch.equal(codec.decode(one, masks=masks)["2.weight"], delta["2.weight"])
