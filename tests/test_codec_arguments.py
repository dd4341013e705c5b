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
