"""What the caller of the codec got wrong is a plain ValueError; only bytes make a DecodeError."""

import pytest
import torch
from torch import nn

from autoflip import MaskSet, codec

DELTA = {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(3)}
MASKS = MaskSet({"w": torch.ones(3, 4, dtype=torch.bool).tril()})
BLOB, PATCH, MASK_BLOB = codec.encode(DELTA), codec.encode_patch(DELTA, DELTA), codec.encode_masks(MASKS)
READERS = {
    "decode": lambda **more: codec.decode(BLOB, **more),
    "accumulate": lambda **more: codec.accumulate(BLOB, {n: t.clone() for n, t in DELTA.items()}, 1.0, **more),
    "decode_patch": lambda **more: codec.decode_patch(PATCH, DELTA, **more),
}
WRITERS = {"encode": codec.encode, "encode_patch": codec.encode_patch}


def refused(message, call, *args, **more):
    with pytest.raises(ValueError, match=message) as caught:
        call(*args, **more)
    assert not isinstance(caught.value, codec.DecodeError)


@pytest.mark.parametrize("reader", READERS)
def test_readers_name_a_wrong_argument(reader):
    call = READERS[reader]
    refused(f"{reader}: masks is a dict, wanted a MaskSet", call, masks=dict(MASKS))
    refused(f"{reader}: base_id is a str, wanted 16 bytes; write bytes.fromhex", call, base_id="00" * 16)
    refused(f"{reader}: base_id is a int", call, base_id=16)
    refused(f"{reader}: base_id has 3 bytes", call, base_id=b"abc")
    refused(f"{reader}: schema is a dict, wanted a Schema", call, schema=DELTA)
    refused(f"{reader}: limits is a int", call, limits=1 << 20)


@pytest.mark.parametrize("writer", WRITERS)
def test_writers_name_a_wrong_argument(writer):
    call = WRITERS[writer]
    refused(f"{writer}: got a Linear, wanted a dict: .* pass model.state_dict()", call, nn.Linear(2, 2))
    refused(f"{writer}: got a list, wanted a dict", call, [torch.ones(2)])
    refused(f"{writer}: got a list", call, [torch.ones(2)], schema=codec.Schema.of(DELTA))
    refused(f"{writer}: the name 0 is a int, wanted a str", call, {0: torch.ones(2)})
    refused(f"{writer}: round=1.5, wanted a whole number", call, DELTA, round=1.5)
    refused(f"{writer}: base_id is a str", call, DELTA, base_id="0" * 16)
    refused(f"{writer}: schema is a dict", call, DELTA, schema=DELTA)
    refused(f"{writer}: masks is a dict", call, DELTA, masks=dict(MASKS))
    refused(f"{writer}: 'w' is on the meta device and holds no data", call, {"w": torch.ones(2, device="meta")})
    refused(f"{writer}: 'w' is torch.sparse_coo, wanted a dense tensor", call, {"w": torch.eye(3).to_sparse()})


def test_levels_are_those_of_the_codes():
    for levels in (0, 128, -3):
        refused(f"encode: levels={levels}, wanted 1 to 127, the largest code of int8", codec.encode, DELTA,
                values="int8", levels=levels)  # fmt: skip
    refused("encode: levels=8, wanted 1 to 7, the largest code of int4", codec.encode, DELTA, values="int4", levels=8)
    refused("levels=1.5, wanted a whole number", codec.encode, DELTA, values="int8", levels=1.5)
    refused("encode: levels=7 with values='bf16', wanted None", codec.encode, DELTA, levels=7)


@pytest.mark.parametrize("values, levels", [("int8", 40), ("int4", 3)])
def test_levels_leave_room_for_the_largest_scale(values, levels):
    huge = {"w": torch.full((2, 3), 3e38)}
    message = rf"encode: 'w' has entries of 3e\+38, too large for levels={levels}, .* leave levels out"
    refused(message, codec.encode, huge, values=values, levels=levels)
    full = {"int8": 127, "int4": 7}[values]
    for most in (None, full):
        assert codec.decode(codec.encode(huge, values=values, levels=most))["w"].isfinite().all()
    held = {"w": torch.full((2, 3), 3.4e38 * levels / full)}
    assert codec.decode(codec.encode(held, values=values, levels=levels))["w"].isfinite().all()


def test_keys_of_the_rounding_are_whole():
    refused("encode: seed=1.5, wanted a whole number", codec.encode, DELTA, seed=1.5)
    refused("encode: client='a', wanted a whole number", codec.encode, DELTA, client="a")


def test_bases_and_sums_are_named():
    refused("encode_patch: base: got a list", codec.encode_patch, DELTA, list(DELTA.values()))
    refused("decode_patch: base: got a list", codec.decode_patch, PATCH, list(DELTA.values()))
    refused("accumulate: sums: got a list", codec.accumulate, BLOB, [], 1.0)


def test_masks_are_a_maskset():
    refused("encode_masks: masks is a dict", codec.encode_masks, dict(MASKS))
    refused("encode_masks: masks is None", codec.encode_masks, None)
    refused("encode_masks: base is a dict", codec.encode_masks, MASKS, dict(MASKS))
    refused("decode_masks: base is a dict", codec.decode_masks, MASK_BLOB, dict(MASKS))


def test_a_schema_needs_names_but_no_data():
    refused("got a list, wanted a dict", codec.Schema.of, [torch.ones(2)])
    refused("inspect: schema is a dict", codec.inspect, BLOB, schema=DELTA)
    assert codec.Schema.of({n: t.to("meta") for n, t in DELTA.items()}) == codec.Schema.of(DELTA)


def test_a_view_with_gaps_is_read():
    wide = bytearray(2 * len(BLOB))
    wide[::2] = BLOB
    view = memoryview(wide)[::2]
    assert not view.contiguous
    got = codec.decode(view)
    assert all(torch.equal(got[n], t) for n, t in DELTA.items())
    assert codec.inspect(view) == codec.inspect(BLOB)
    with pytest.raises(codec.DecodeError, match="a header alone has 30"):
        codec.decode(memoryview(b"abc")[3:])
    with pytest.raises(codec.DecodeError, match="Limits.max_bytes"):
        codec.decode(view, limits=codec.Limits(max_bytes=10))


@pytest.mark.parametrize(
    "view",
    [torch.arange(2)[::2], torch.zeros(1, 2, dtype=torch.int32)[:, ::2], torch.tensor([True, False])[::2]],
    ids=["vector", "matrix", "bool"],
)
def test_one_integer_of_a_view_with_gaps_is_read(view):
    assert torch.equal(codec.decode(codec.encode({"n": view}))["n"], view)
    assert torch.equal(codec.decode_patch(codec.encode_patch({"n": view}))["n"], view)
    patch = codec.encode_patch({"n": view}, {"n": view})
    assert torch.equal(codec.decode_patch(patch, {"n": view})["n"], view)


@pytest.mark.parametrize("masks", [None, MASKS], ids=["dense", "masked"])
@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "int4"])
def test_a_cap_refuses_before_anything_is_added(values, masks):
    schema = codec.Schema.of({"v": torch.zeros(300), "w": torch.zeros(30, 40), "n": torch.tensor(0)})
    masks = masks and MaskSet({"w": torch.ones(30, 40, dtype=torch.bool).tril()})

    def add(largest, cap, number=3):
        delta = {"v": torch.full((300,), -1.0), "w": torch.full((30, 40), 0.5), "n": torch.tensor(number)}
        delta["w"][20, 7] = -largest
        blob = codec.encode(delta, masks=masks, values=values, rounding="nearest", schema=schema)
        sums = {n: torch.zeros(t.shape) for n, t in delta.items()}
        try:
            codec.accumulate(blob, sums, 2.0, masks=masks, schema=schema, cap=cap)
        except codec.DecodeError:
            assert not any(t.any() for t in sums.values())
            raise
        return float(sums["w"][20, 7])

    for cap in (8.0, 96.0, 2.0**20):  # the largest that is let in, and the first bf16 above it
        assert add(cap, cap) == pytest.approx(-2 * cap)
        with pytest.raises(codec.DecodeError, match=f"the update moves 'w' by more than {cap:g}".replace("+", r"\+")):
            add(cap * 1.0078125, cap)
    assert add(1e37, None) == pytest.approx(-2e37, rel=0.01)
    with pytest.raises(codec.DecodeError, match="moves 'n' by more than 8"):
        add(1.0, 8.0, number=-9)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="wanted a number above 0"):
            add(1.0, wrong)
