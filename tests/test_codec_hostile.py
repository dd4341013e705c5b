"""What a decoder refuses, said in words; and that nothing is allocated on a frame's word."""

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from autoflip import MaskSet, codec
from autoflip.codec.reader import varint

DELTA = {"w": torch.ones(4, 6), "b": torch.ones(4)}
MASKS = MaskSet({"w": torch.eye(4, 6, dtype=torch.bool)})


def sign(blob):
    """Give a frame the checksum of a sender who means it, and one of version 1 its length."""
    blob, at = bytearray(blob), 92 if blob[4] == 1 else 8
    if blob[4] == 1:
        blob[72:80] = struct.pack("<Q", len(blob) - 96)
    blob[at : at + 4] = bytes(4)
    blob[at : at + 4] = struct.pack("<I", zlib.crc32(blob))
    return bytes(blob)


def head_of(blob):
    """Bytes of a header of version 2 whose numbers have a byte each."""
    return 30 + 16 * bool(blob[6] & 8) + 16 * (bool(blob[6] & 2) or blob[7] >> 4 == 3)


@pytest.mark.parametrize(
    "blob, message",
    [
        ([], "is a list, wanted bytes"),
        (b"", "a header alone has 30"),
        (b"PK" + bytes(200), "not bytes of autoflip.codec"),
        (b"AFD1\x03" + bytes(200), "format version 3, this autoflip reads 1 and 2"),
        (codec.encode(DELTA)[:-3], "damaged or cut short"),
        (codec.encode(DELTA)[:-1] + b"\xaa", "ask for it again"),
        (codec.encode(DELTA, schema=codec.Schema.of(DELTA)), "carries only the id"),
        (codec.encode(DELTA, masks=MASKS), "pass masks= with that fingerprint"),
        (codec.encode_masks(MASKS), "is a masks frame, wanted delta"),
    ],
)
def test_messages_say_what_is_wrong(blob, message):
    with pytest.raises(codec.DecodeError, match=message):
        codec.decode(blob)


def test_another_mask_schema_or_base_is_refused():
    blob = codec.encode(DELTA, masks=MASKS, base_id=b"a" * 16)
    with pytest.raises(codec.DecodeError, match="missed a mask update"):
        codec.decode(blob, masks=MaskSet({"w": ~MASKS["w"]}))
    with pytest.raises(codec.DecodeError, match="Do both sides hold the same model"):
        codec.decode(blob, masks=MASKS, schema=codec.Schema.of({"w": DELTA["w"]}))
    with pytest.raises(codec.DecodeError, match="missed a broadcast"):
        codec.decode(blob, masks=MASKS, base_id=b"b" * 16)
    with pytest.raises(codec.DecodeError, match="encoded without masks"):
        codec.decode(codec.encode(DELTA), masks=MASKS)
    with pytest.raises(codec.DecodeError, match="sums holds no tensor of that name"):
        codec.accumulate(blob, {"w": torch.zeros(4, 6)}, 1.0, masks=MASKS)
    codec.decode(blob, masks=MASKS, base_id=b"a" * 16)


@pytest.mark.parametrize("wrong", [{"max_bytes": -1}, {"max_tensors": 1.5}, {"max_schema_bytes": None}])
def test_limits_that_nothing_can_meet_are_named(wrong):
    with pytest.raises(ValueError, match=f"Limits: {next(iter(wrong))}=.*; wanted a whole number, at least 0"):
        codec.Limits(**wrong)


def test_limits_are_arguments():
    blob = codec.encode({"w": torch.zeros(1000, 1000)})
    with pytest.raises(codec.DecodeError, match="Limits.max_bytes"):
        codec.decode(blob, limits=codec.Limits(max_bytes=3_999_999))
    codec.decode(blob, limits=codec.Limits(max_bytes=4_000_000))
    many = codec.encode({str(i): torch.zeros(1) for i in range(100)})
    with pytest.raises(codec.DecodeError, match="names 100 tensors, Limits.max_tensors is 99"):
        codec.decode(many, limits=codec.Limits(max_tensors=99))
    with pytest.raises(codec.DecodeError, match="wanted 0 to 50"):
        codec.decode(many, limits=codec.Limits(max_schema_bytes=50))


def schema_frame(entries):
    """Return a delta frame of no tensors whose inline schema is made by hand."""
    raw = varint(len(entries))
    for name, kind, shape in entries:
        raw += varint(len(name)) + name + bytes((kind, len(shape))) + b"".join(map(varint, shape))
    blob = codec.encode({})
    return sign(blob[: head_of(blob)] + b"\0" + varint(len(raw)) + raw)


@pytest.mark.parametrize(
    "entries, message",
    [
        ([(b"w", 0, (1 << 40, 1 << 20))], "exceeds Limits.max_bytes"),
        ([(b"w", 0, (1 << 40, 0))], "exceeds Limits.max_bytes"),
        ([(b"w", 9, (1,))], "of unknown kind 9"),
        ([(b"w", 0, (1,)), (b"w", 0, (1,))], "named twice"),
        ([(b"\xff", 0, (1,))], "not UTF-8"),
        ([(b"w", 0, (1,) * 33)], "33 dimensions"),
        ([(b"w", 0, (3,))], "does not have the id in its header"),
    ],
)
def test_inline_schemas_are_bounded(entries, message):
    with pytest.raises(codec.DecodeError, match=message):
        codec.decode(schema_frame(entries))


def test_a_zstd_bomb_is_refused_before_it_unpacks():
    w = {"w": torch.arange(4096.0).view(64, 64)}
    blob = codec.encode(w, values="int8", schema=codec.Schema.of(w))
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(200_000_000))
    at = head_of(blob) + 1  # the table has one byte
    assert blob[at] == 1  # the codes went through zstd
    tracemalloc.start()
    with pytest.raises(codec.DecodeError, match="unpacks to 200000000 bytes, wanted 4096"):
        codec.decode(sign(blob[:at] + b"\1" + varint(len(bomb)) + bomb), schema=codec.Schema.of(w))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_values_on_the_wire_must_be_finite_and_in_range():
    schema = codec.Schema.of({"w": torch.ones(2, 2)})

    def frame(values, raw):
        blob = codec.encode({"w": torch.ones(2, 2)}, values=values, schema=schema, entropy="none")
        return sign(blob[: len(blob) - len(raw)] + raw)

    def refused(blob, message):
        with pytest.raises(codec.DecodeError, match=message):
            codec.decode(blob, schema=schema)

    planes = lambda x: np.frombuffer(np.float32(x).tobytes(), np.uint8).reshape(-1, 4).T.tobytes()  # noqa: E731
    codec.decode(frame("fp32", planes([1, 2, 3, 4])), schema=schema)
    for bad in (np.nan, np.inf, -np.inf):
        refused(frame("fp32", planes([1, 2, bad, 4])), "NaN or infinity")
        refused(frame("int8", planes(bad)), "a scale is negative, infinite or NaN")
    refused(frame("bf16", b"\0\0\x80\0" + b"\0\0\x7f\0"), "NaN or infinity")
    refused(frame("int8", planes(-1.0)), "a scale is negative")
    refused(frame("int8", planes(3e38)), "a scale is negative, infinite")  # 127 of them overflow
    refused(frame("int8", b"\x80" + bytes([0, 0, 0, 0, 4]) + planes(1.0)), "outside -127 to 127|bytes")
    refused(frame("int4", b"\x08\0" + b"\0\4" + planes(1.0)), "outside -7 to 7")
    odd = {"v": torch.ones(1, 3)}
    blob = codec.encode(odd, values="int4", entropy="none")
    at = len(blob) - 6 - 1
    assert blob[at] >> 4 == 0
    with pytest.raises(codec.DecodeError, match="a code past its end"):
        codec.decode(sign(blob[:at] + bytes([blob[at] | 0x70]) + blob[at + 1 :]))


def test_vectors_have_no_columns():
    for shape in ((6,), (), (0, 3)):
        schema = codec.Schema.of({"w": torch.zeros(shape)})
        blob = codec.encode({"w": torch.zeros(shape)}, values="fp32", schema=schema, entropy="none")
        head = blob[: head_of(blob)]
        with pytest.raises(codec.DecodeError, match="coded by columns"):
            codec.decode(sign(head + b"\x50\0" + b"\0\0"), schema=schema)
    schema = codec.Schema.of({"w": torch.zeros(2, 3)})
    head = codec.encode({"w": torch.zeros(2, 3)}, values="fp32", schema=schema)[:32]
    table, gaps, value = b"\x50\1", b"\0\1\3", b"\0\4" + b"\0\0\x80\x3f"
    got = codec.decode(sign(head[: head_of(head)] + table + gaps + value), schema=schema)["w"]
    assert got.flatten().tolist() == [0, 0, 0, 0, 1, 0]  # the fourth of 0, 3, 1, 4, 2, 5


def test_codes_without_zeros_hold_to_their_blocks():
    x = torch.zeros(20, 30)
    x[:, ::2] = torch.linspace(0.001, 0.05, 300).view(20, 15)  # int4 of 7 levels: 1 a block is the largest
    x[0, 0] = x[19, 28] = 1
    schema = codec.Schema.of({"w": x})
    blob = codec.encode({"w": x}, values="int4", rounding="nearest", entropy="none", schema=schema)
    assert codec.inspect(blob, schema=schema)["tensors"][0] | {"bytes": 0} == {
        "name": "w", "shape": [20, 30], "coding": "rice", "values": "int4", "kept": 2, "blocks": 2, "bytes": 0
    }  # fmt: skip
    at = head_of(blob)
    assert blob[at : at + 2] + blob[at + 3 : at + 4] == b"\x36\2\2"  # index and values, kept, blocks; k between
    assert blob[-3:] == b"\2" + b"\0\0"  # of each block one is left
    assert codec.decode(blob, schema=schema)["w"].nonzero().tolist() == [[0, 0], [19, 28]]

    def refused(message, **changed):
        with pytest.raises(codec.DecodeError, match=message):
            codec.decode(sign(bytes(changed.get(f"_{i - at}", byte) for i, byte in enumerate(blob))), schema=schema)

    refused("do not make up 2 codes", **{f"_{len(blob) - 1 - at}": 1})
    refused("2 codes of 1 to 256 a block are in 0 blocks", _3=0)
    refused("2 codes of 1 to 256 a block are in 3 blocks", _3=3)
    refused("0 codes of 1 to 256 a block are in 2 blocks", _1=0)
    with pytest.raises(codec.DecodeError, match="has 4 blocks of 600 entries"):
        codec.decode(sign(blob[: at + 1] + b"\4" + blob[at + 2 : at + 3] + b"\4" + blob[at + 4 :]), schema=schema)
    for index, message in ((0, "without an index leaves out zeros"), (1, "without an index leaves out zeros")):
        refused(message, _0=index << 4 | 6)
    refused("coded as 0x37, which this version does not know", _0=0x37)


def test_bool_bytes_above_one_are_refused():
    blob = codec.encode({"f": torch.tensor([True, False])}, entropy="none")
    with pytest.raises(codec.DecodeError, match="no bool"):
        codec.decode(sign(blob[:-1] + b"\2"))


GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.afd"))


def golden_update():
    """The tensors that tests/golden/*.afd were made from: simple enough to rebuild anywhere."""
    w = (torch.arange(240, dtype=torch.float32).view(12, 20) % 17 - 8) / 16
    return {"w": w, "b": torch.arange(12) / 4, "steps": torch.tensor(7)}, MaskSet({"w": w > 0.2})


def golden_walk(n=3000):
    """A tensor whose neighbours are alike, of numbers that bf16 holds."""
    i = torch.arange(n)
    noise = i * 2654435761 % 2**32
    noise = (noise ^ noise >> 15) * 2246822519 % 2**32 >> 16 & 31
    steps = torch.cumsum(2 * noise - 31, 0) // 2
    return {"w": ((steps % 256 - 128) / 64).view(10, -1)}


def golden_stripes():
    """A matrix of which a few columns hold all, in no order, that is not zero."""
    i = torch.arange(90 * 100).view(90, 100)
    noise = i * 2654435761 % 2**32
    noise = (noise ^ noise >> 15) * 2246822519 % 2**32 >> 16 & 31
    return torch.where((i % 100 * 37 % 101 < 10) & (noise < 20), noise / 8, 0.0)


def golden_unlike():
    """Two matrices of steps of 1/128: one of every magnitude up to 1, one of little else than zeros and a 1."""
    i = torch.arange(2 * 64 * 64).view(2, 64, 64)
    noise = i * 2654435761 % 2**32
    noise = (noise ^ noise >> 15) * 2246822519 % 2**32 >> 12 & 255
    steps = torch.where(i[0] % 64 == 0, 128, noise - 128)
    return {"wide": steps[0] / 128, "steep": torch.where(i[0] % 64 == 0, 128, (noise[1] - 128) // 110) / 128}


def golden_shallow():
    """A sparse matrix of steps of 1/1024, few of them large: rounding to codes makes most of the others zero."""
    i = torch.arange(60 * 50).view(60, 50)
    noise = i * 2654435761 % 2**32
    noise = (noise ^ noise >> 15) * 2246822519 % 2**32 >> 12 & 255
    steps = torch.where(i % 97 == 0, 1024, (noise - 128) // 16)
    return {"w": torch.where(i * 37 % 101 < 30, steps, 0) / 1024}


def golden_inside():
    """A mask that keeps most of golden_shallow, and zeros of it."""
    return MaskSet({"w": torch.arange(60 * 50).view(60, 50) % 5 > 0})


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_frames_decode_for_ever(path):
    update, masks = golden_update()
    blob, name = path.read_bytes(), path.stem.partition("_")[2]
    if name == "masks":
        assert codec.decode_masks(blob) == masks
    elif name == "change":
        assert codec.decode_masks(blob, MaskSet({"w": update["w"] > 0.15})) == masks
    elif name.startswith("patch"):
        base = {n: torch.full_like(t, 2) if "difference" in name else torch.zeros_like(t) for n, t in update.items()}
        got = codec.decode_patch(blob, base, base_id=b"golden base 0001")
        assert torch.equal(got["w"], update["w"].to(torch.bfloat16))
    elif name == "columns":
        assert codec.inspect(blob)["tensors"][0]["coding"] == "varint, by columns"
        assert torch.equal(codec.decode(blob)["w"], golden_stripes())
    elif name.startswith("numbered"):
        assert codec.inspect(blob)["sections"][-2]["entropy"] == "lanes by tensor"  # before the scales
        got, step = codec.decode(blob), 1 / {"int8": 127, "int4": 7}[name.partition("_")[2]]
        for tensor, want in golden_unlike().items():  # to the nearest, and float32's rounding of codes times scale
            torch.testing.assert_close(got[tensor], want, rtol=0, atol=0.5 * step * (1 + 1e-6))
    elif name.startswith("dropped"):
        assert codec.inspect(blob)["tensors"][0]["blocks"]
        want, inside = golden_shallow()["w"], golden_inside() if name == "dropped_ranks" else None
        want = want if inside is None else want * inside["w"]
        step = 1 / {"int8": 127}.get(name.partition("_")[2], 7)
        got = codec.decode(blob, masks=inside)["w"]
        torch.testing.assert_close(got, want, rtol=0, atol=0.5 * step * (1 + 1e-6))
        if inside is None:  # of the others one block has small ones only
            assert not got[want.abs() < 0.49 * step].any()
    elif name.startswith("lanes"):
        stages = [s["entropy"] for s in codec.inspect(blob)["sections"]]
        assert ("parts apart" if name.endswith(("fp32", "bf16")) else "lanes") in stages
        want = golden_walk({"long": 40_000, "middle": 20_000}.get(name.partition("_")[2], 3000))["w"]
        # int8: less than a step of the largest value, 2, over 127
        torch.testing.assert_close(
            codec.decode(blob)["w"], want, rtol=0, atol=0 if name.endswith(("fp32", "bf16")) else 2 / 127
        )
    else:
        shared = name.startswith(("shared", "ranks"))
        if name.startswith("ranks"):
            assert codec.inspect(blob)["tensors"][0]["coding"].startswith("ranks")
            update["w"] = torch.where(update["w"] > 0.4, update["w"], 0)
        got = codec.decode(blob, masks=masks if shared else None)
        want = torch.where(masks["w"], update["w"], 0)
        assert torch.equal(got["b"], update["b"])
        assert got["steps"] == 7
        if name.endswith(("fp32", "bf16")):
            assert torch.equal(got["w"], want)
        else:
            torch.testing.assert_close(
                got["w"], want, rtol=0, atol=0.5 / {"int8": 127, "levels": 40}.get(name.partition("_")[2], 7)
            )


def test_golden_frames_are_there():
    assert len(GOLDEN) == 9 + 14 + 17 + 20 + 22 + 24
