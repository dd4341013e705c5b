"""Patches and mask frames: lossless, relative to what the reader holds, checked by id."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip import MaskSet, codec


def model(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(60, 70, generator=g),
        "b": torch.randn(60, generator=g),
        "n": torch.tensor(seed),
        "flag": torch.tensor([True, False]),
    }


MASKS = MaskSet({"w": torch.rand(60, 70, generator=torch.Generator().manual_seed(5)) < 0.2})


@pytest.mark.parametrize("masks", [None, MASKS], ids=["dense", "masked"])
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("entropy", ["zstd", "none"])
def test_patch_chain_is_bit_exact(masks, inline, entropy):
    schema = None if inline else codec.Schema.of(model())
    new, held = model(), None
    for step in range(4):
        id = bytes([step]) * 16
        blob = codec.encode_patch(new, held, masks=masks, schema=schema, base_id=id, entropy=entropy, round=step)
        held = codec.decode_patch(blob, held, masks=masks, schema=schema, base_id=id)
        want = torch.where(masks["w"], new["w"], 0) if masks else new["w"]
        assert torch.equal(held["w"], want.to(torch.bfloat16))
        assert torch.equal(held["b"], new["b"].to(torch.bfloat16))
        assert held["n"] == new["n"]
        assert held["n"].dtype == torch.int64
        assert held["flag"].dtype == torch.bool
        new = {n: t * 1.001 if t.is_floating_point() else t + 1 if t.dim() == 0 else t for n, t in new.items()}


def test_patch_of_an_unchanged_model_is_nearly_empty():
    held = codec.decode_patch(codec.encode_patch(model()))
    assert len(codec.encode_patch(model(), held, schema=codec.Schema.of(held))) < 250


def test_complete_patch_ignores_the_base_and_leaves_it_alone():
    blob = codec.encode_patch(model())
    base = model(9)
    before = {n: t.clone() for n, t in base.items()}
    assert torch.equal(codec.decode_patch(blob, base)["w"], model()["w"].to(torch.bfloat16))
    codec.decode_patch(codec.encode_patch(model(), base), base)
    assert all(torch.equal(base[n], before[n]) for n in base)


def test_patch_errors():
    with pytest.raises(ValueError, match="'w' has entries that are NaN or infinite in bf16"):
        codec.encode_patch({"w": torch.tensor([3.4e38])})  # finite in float32, not in bf16
    with pytest.raises(ValueError, match="encode_patch: base: the schema names 'w'"):
        codec.encode_patch(model(), {"b": model()["b"]})
    blob = codec.encode_patch(model(), model(1), base_id=b"1" * 16)
    with pytest.raises(codec.DecodeError, match="ask its sender for a complete one"):
        codec.decode_patch(blob)
    with pytest.raises(codec.DecodeError, match="missed a broadcast"):
        codec.decode_patch(blob, model(1), base_id=b"2" * 16)
    with pytest.raises(codec.DecodeError, match="has shape"):
        codec.decode_patch(blob, model(1) | {"w": torch.zeros(2)})
    with pytest.raises(codec.DecodeError, match="wanted delta"):
        codec.decode(blob)


@st.composite
def mask_pairs(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    old, new = {}, {}
    for i in range(draw(st.integers(0, 4))):
        shape = draw(st.lists(st.integers(0, 40), max_size=2))
        mask = torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.03, 0.5, 1.0]))
        new[f"t{i}"] = mask
        if draw(st.booleans()):
            old[f"t{i}"] = mask ^ (torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.02, 0.5])))
    if draw(st.booleans()):
        old["gone"] = torch.ones(3, dtype=torch.bool)
    return MaskSet(old), MaskSet(new)


@given(mask_pairs(), st.booleans(), st.booleans(), st.sampled_from(["zstd", "none"]))
@settings(max_examples=150)
def test_masks_return_with_their_fingerprint(pair, relative, use_schema, entropy):
    base, masks = pair if relative else (None, pair[1])
    schema = (
        codec.Schema.of({"extra": torch.zeros(3)} | {n: m.float() for n, m in masks.items()}) if use_schema else None
    )
    blob = codec.encode_masks(masks, base, schema=schema, entropy=entropy)
    got = codec.decode_masks(blob, base, schema=schema)
    assert got == masks
    assert set(got) == set(masks)


def test_a_small_change_of_masks_is_a_small_frame():
    g = torch.Generator().manual_seed(0)
    old = torch.rand(500, 500, generator=g) < 0.1
    new = old.clone()
    kept, free = old.flatten().nonzero().flatten(), (~old).flatten().nonzero().flatten()
    new.view(-1)[kept[torch.randperm(len(kept), generator=g)[:1000]]] = False
    new.view(-1)[free[torch.randperm(len(free), generator=g)[:1000]]] = True
    whole = codec.encode_masks(MaskSet({"w": new}))
    change = codec.encode_masks(MaskSet({"w": new}), MaskSet({"w": old}))
    assert len(change) < 0.3 * len(whole) < 0.3 * 500 * 500 / 8
    assert codec.decode_masks(change, MaskSet({"w": old}))["w"].equal(new)


def test_mask_frame_errors():
    base, masks = MaskSet({"w": MASKS["w"]}), MaskSet({"w": ~MASKS["w"]})
    blob = codec.encode_masks(masks, base)
    for wrong in (None, masks):
        with pytest.raises(codec.DecodeError, match="ask its sender for a complete one"):
            codec.decode_masks(blob, wrong)
    with pytest.raises(ValueError, match="is not in the schema"):
        codec.encode_masks(masks, schema=codec.Schema.of({"v": torch.zeros(3)}))
    with pytest.raises(codec.DecodeError, match="wanted masks"):
        codec.decode_masks(codec.encode({"w": torch.ones(3)}))
    assert codec.inspect(blob)["kind"] == "masks"
