"""Hostile frames: whatever the bytes, decoding raises DecodeError or returns tensors that keep every promise."""

import random
import struct
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from autoflip import MaskSet, codec
from autoflip.codec import packing, section
from autoflip.ops import entropy

LIMITS = codec.Limits(max_bytes=1 << 16, max_tensors=64, max_schema_bytes=1 << 12)
_G = torch.Generator().manual_seed(0)
DELTA = {"w": torch.randn(20, 30, generator=_G), "b": torch.randn(20, generator=_G), "n": torch.tensor(4)}
SPARSE = {n: t * (torch.rand(t.shape, generator=_G) < 0.1) for n, t in DELTA.items()}
MASKS = MaskSet({"w": torch.rand(20, 30, generator=_G) < 0.2})
OTHER = MaskSet({"w": torch.rand(20, 30, generator=_G) < 0.2})
PART = {n: t * (torch.rand(t.shape, generator=_G) < 0.2) for n, t in DELTA.items()}
SCHEMA = codec.Schema.of(DELTA)
BASE = codec.decode_patch(codec.encode_patch(DELTA))
WALK = {"w": torch.randn(48, 64, generator=_G).cumsum(1) * 0.01}  # neighbours are alike
COMB = {"w": torch.zeros(64, 256).index_fill_(1, torch.arange(0, 256, 40), 1.25)}
STRIPES = {"w": (torch.rand(90, 100, generator=_G) < 0.6) * (torch.rand(100, generator=_G) < 0.1) * 1.5}
STEEP = {"w": torch.randn(48, 96, generator=_G) ** 9}
SHALLOW = {"w": torch.randn(60, 50, generator=_G) ** 5 * (torch.rand(60, 50, generator=_G) < 0.3), "b": DELTA["b"]}
WIDE = MaskSet({"w": torch.rand(60, 50, generator=_G) < 0.8})
UNLIKE = {"wide": torch.rand(50, 40, generator=_G) - 0.5, "steep": STEEP["w"][:20]}


def _by_huffman(tensors):
    """Return an int8 frame whose codes are a zstd frame of literals alone, as those of large frames are."""

    def smallest(raw, *way, **ways):
        frame = entropy.literals(raw, 1 << 20)[1]
        return (packing.ZSTD, frame) if frame else packing.smallest(raw, *way, **ways)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(section, "smallest", smallest)
        return codec.encode(tensors, values="int8")


def _golden(name):
    return (Path(__file__).parents[1] / "golden" / f"{name}.afd").read_bytes()


def _accumulate(blob):
    sums = {n: torch.zeros(t.shape) for n, t in DELTA.items()}
    try:
        codec.accumulate(blob, sums, 0.5, masks=MASKS, limits=LIMITS)
    except codec.DecodeError:
        assert not any(t.any() for t in sums.values())  # nothing half done
        raise
    return sums


FRAMES = {
    **{
        f"{values}-{entropy}": (
            codec.encode(DELTA, masks=MASKS, values=values, entropy=entropy),
            partial(codec.decode, masks=MASKS),
        )
        for values in ("fp32", "bf16", "int8", "int4")
        for entropy in ("zstd", "none")
    },
    "ranks": (codec.encode(PART, masks=MASKS, values="int4"), partial(codec.decode, masks=MASKS)),
    "nearest": (codec.encode(SPARSE, values="bf16", rounding="nearest", level=19), codec.decode),
    "id-only": (codec.encode(DELTA, masks=MASKS, schema=SCHEMA), partial(codec.decode, masks=MASKS, schema=SCHEMA)),
    "explicit": (codec.encode(SPARSE, entropy="none"), codec.decode),
    **{
        f"without zeros, {values}-{entropy}": (codec.encode(SHALLOW, values=values, entropy=entropy), codec.decode)
        for values in ("int8", "int4")
        for entropy in ("zstd", "none")
    },
    "ranks without zeros": (codec.encode(SHALLOW, masks=WIDE, values="int4"), partial(codec.decode, masks=WIDE)),
    **{f"walk {v}": (codec.encode(WALK, values=v), codec.decode) for v in ("fp32", "bf16", "int8")},
    "literals": (_by_huffman(STEEP), codec.decode),
    "numbered": (codec.encode(UNLIKE, values="int8"), codec.decode),
    "numbered int4": (_golden("v21_numbered_int4"), codec.decode),
    "columns": (codec.encode(STRIPES, values="int4"), codec.decode),
    "comb": (codec.encode(COMB, values="int8"), codec.decode),
    "patch": (codec.encode_patch(DELTA, BASE, masks=MASKS), partial(codec.decode_patch, base=BASE, masks=MASKS)),
    "masks": (codec.encode_masks(MASKS), codec.decode_masks),
    **{f"{v} of version 1": (_golden(f"v12_{v}"), codec.decode) for v in ("explicit_fp32", "lanes_bf16")},
    "masks of version 1": (_golden("v12_masks"), codec.decode_masks),
    "change": (codec.encode_masks(OTHER, MASKS), partial(codec.decode_masks, base=MASKS)),
}  # fmt: skip


def sign(blob):
    """Give a mutated frame the checksum and length of a sender who means it."""
    blob = bytearray(blob)
    if len(blob) < (96 if blob[4:5] == b"\1" else 12):
        return bytes(blob)
    if blob[4] == 1:
        blob[72:80] = struct.pack("<Q", len(blob) - 96)
    at = 92 if blob[4] == 1 else 8
    blob[at : at + 4] = bytes(4)
    blob[at : at + 4] = struct.pack("<I", zlib.crc32(blob))
    return bytes(blob)


def _places(blob):
    """Every byte but those that sign() writes."""
    written = [*range(72, 80), *range(92, 96)] if blob[4] == 1 else range(8, 12)
    return [i for i in range(len(blob)) if i not in written]


def _body_from(blob):
    """Where a header ends, or before."""
    return 96 if blob[4] == 1 else 30


def mutated(blob, rng):
    """Return ``blob`` with one to six bytes changed, put in, left out, or pieces of other frames spliced in."""
    bad, places, others = bytearray(blob), _places(blob), [other for other, _ in FRAMES.values()]
    for _ in range(rng.randint(1, 6)):
        kind, i, other = rng.randrange(4), rng.choice(places), rng.choice(others)
        if kind == 0:
            bad[i % len(bad)] = rng.randrange(256)
        elif kind == 1:
            bad[i:i] = rng.randbytes(rng.randint(1, 9))
        elif kind == 2:
            del bad[i : i + rng.randint(1, 9)]
        else:
            j = rng.randrange(_body_from(other), len(other))
            bad[i:i] = other[j : j + rng.randint(1, 40)]
        bad = bad if len(bad) > _body_from(blob) else bytearray(blob)
    return bad


def survives(blob, decode):
    """Decode; only DecodeError may leave, and what comes back is finite and within the limits."""
    for look in (partial(decode, limits=LIMITS), partial(codec.inspect, limits=LIMITS)):
        try:
            got = look(blob)
        except codec.DecodeError:
            continue
        if look.func is codec.inspect:
            continue
        assert sum(t.numel() * t.element_size() for t in got.values()) <= LIMITS.max_bytes
        assert all(bool(torch.isfinite(t).all()) for t in got.values())


@pytest.mark.parametrize("name", [name for name in FRAMES if "without zeros" in name])
def test_frames_without_zeros_are_that(name):
    assert [t["blocks"] > 0 for t in codec.inspect(FRAMES[name][0])["tensors"]] == [True, False]


@pytest.mark.parametrize("name", FRAMES)
def test_a_flipped_byte_never_passes_the_checksum(name):
    blob, decode = FRAMES[name]
    for i in range(len(blob)):
        bad = bytearray(blob)
        bad[i] ^= 1 + (i * 37) % 255
        with pytest.raises(codec.DecodeError):
            decode(bytes(bad))


@pytest.mark.parametrize("name", FRAMES)
def test_a_cut_or_lengthened_frame_is_refused(name):
    blob, decode = FRAMES[name]
    for bad in [blob[:i] for i in range(len(blob))] + [blob + b"\0", b"\0" + blob, blob * 2]:
        with pytest.raises(codec.DecodeError):
            decode(bad)
    for i in range(_body_from(blob), len(blob)):
        survives(sign(blob[:i]), decode)


@pytest.mark.parametrize("name", FRAMES)
def test_signed_mutations_end_in_an_error_or_in_order(name):
    blob, decode = FRAMES[name]
    rng = random.Random(name)
    places = _places(blob)
    for i in places[:400]:
        for value in {0, 1, 0x7F, 0x80, 0xFF, blob[i] ^ 1, blob[i] ^ 0x80}:
            survives(sign(blob[:i] + bytes([value]) + blob[i + 1 :]), decode)
    for _ in range(400):
        survives(sign(mutated(blob, rng)), decode)


def test_accumulate_touches_nothing_unless_all_is_well():
    blob, _ = FRAMES["int8-none"]
    for i in range(_body_from(blob), len(blob)):
        for value in (0, 0x80, 0xFF, blob[i] ^ 4):
            with suppress(codec.DecodeError):
                _accumulate(sign(blob[:i] + bytes([value]) + blob[i + 1 :]))


def test_random_bytes_are_refused():
    rng = random.Random(0)
    for _ in range(300):
        starts = (b"", b"AFD1\1\0\x60\0", b"AFD1\2\0")
        for bad in (start + rng.randbytes(rng.randint(0, 200)) for start in starts):
            for _, decode in FRAMES.values():
                with pytest.raises(codec.DecodeError):
                    decode(sign(bad))
