"""A second decoder, in plain numpy, written from docs/wire_format.md alone: it shares no line with autoflip.codec.

It reads every golden frame, and whatever frames the encoder makes today, to the same numbers; on a big-endian reader
too, since each number's byte order is spelt out.
"""

import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from test_codec_hostile import golden_inside, golden_update

from autoflip import MaskSet, codec

INTEGERS = {1: "<i8", 2: "<i4", 3: "<i2", 4: "i1", 5: "u1", 6: "?"}
WHOLE, SHARED, BITMAP, RICE, VARINT, COLUMNS, RANKS = 0, 1, 2, 3, 4, 5, 8


class Bytes:
    def __init__(self, data):
        self.data, self.at = bytes(data), 0

    def take(self, n):
        assert self.at + n <= len(self.data)
        self.at += n
        return self.data[self.at - n : self.at]

    def byte(self):
        return self.take(1)[0]

    def varint(self):
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7


class Bits:
    def __init__(self, data):
        self.data, self.at = data, 0  # a Bytes, and bits used of its next byte

    def take(self, n):
        value = 0
        for i in range(n):
            value |= (self.data.data[self.data.at] >> self.at & 1) << i
            self.at += 1
            if self.at == 8:
                self.data.at, self.at = self.data.at + 1, 0
        return value

    def ones(self):
        return 1 + self.ones() if self.take(1) else 0


def frequencies(bits, order):
    """Read one table: symbol -> (first slot, slots), and the symbol of each of the 4096 slots."""
    k, level, weights, place = bits.take(2), 48, {}, 0
    while place < 256:
        z = bits.ones() << k
        z |= bits.take(k)
        if z == 0:
            width = bits.ones()
            place += 2**width + bits.take(width)
            continue
        level += z // 2 if z % 2 else -(z // 2)
        weights[order[place]] = (16, 19, 23, 27)[(level - 1) % 4] * 2 ** ((level - 1) // 4)
        place += 1
    total, before, seen, slots, where = sum(weights.values()), 0, 0, [], {}
    for symbol in sorted(weights):
        first = before * (4096 - len(weights)) // total + seen
        before, seen = before + weights[symbol], seen + 1
        last = before * (4096 - len(weights)) // total + seen
        where[symbol] = first, last - first
        slots += [symbol] * (last - first)
    assert len(slots) == 4096
    return where, slots


def lanes(stored, companion=None):
    """Entropy stage 3, or 4 with a companion."""
    data = Bytes(stored)
    n, first = data.varint(), data.byte()
    key = [lambda b: b ^ 128, lambda b: 2 * b % 256, lambda b: b][first // 16 % 3]
    cuts = list(data.take(first % 16))
    bits = Bits(data)
    order = [i ^ 128 if first // 16 % 3 == 0 else i for i in range(256)]
    tables = [frequencies(bits, order) for _ in range(first % 16 + 1)]
    data.at += bits.at > 0
    width = 1 if first >= 48 else 8 if n < 32768 else 32
    rows, tail = divmod(n, width)
    x = list(struct.unpack(f"<{width}I", data.take(4 * width)))
    out, before = bytearray(n), [0] * width
    for r in range(rows):
        for lane in range(width):
            i = lane * rows + r
            known = before[lane] if companion is None else int(companion[i])
            where, slots = tables[sum(key(known) >= cut for cut in cuts)]
            slot = x[lane] % 4096
            out[i] = before[lane] = slots[slot]
            start, count = where[slots[slot]]
            x[lane] = count * (x[lane] // 4096) + slot - start
            if x[lane] < 65536:
                x[lane] = x[lane] * 65536 + struct.unpack("<H", data.take(2))[0]
    assert x == [65536] * width
    out[n - tail :] = data.take(tail)
    assert data.at == len(data.data)
    return bytes(out)


def unpack(entropy, stored):
    if entropy == 1:
        return zstandard.ZstdDecompressor().decompress(stored)
    return lanes(stored) if entropy == 3 else stored


def section(data, parts=1, companion=None):
    """The raw bytes of a section; `parts` says how many pieces stage 2 holds."""
    entropy, stored = data.byte(), data.take(data.varint())
    if entropy == 4:
        assert companion is not None
        return lanes(stored, companion)
    if entropy != 2:
        return unpack(entropy, stored)
    inner = Bytes(stored)
    return b"".join(section(inner) for _ in range(parts))


def float_section(data, width):
    """The byte planes of a section of floats."""
    entropy, stored = data.byte(), data.take(data.varint())
    if entropy != 2:
        return unpack(entropy, stored)
    inner = Bytes(stored)
    parts = [(inner.byte(), inner.take(inner.varint())) for _ in range(width)]
    assert inner.at == len(stored)
    found = {}
    for i in range(width - 1, -1, -1):
        if parts[i][0] == 4:
            top = np.frombuffer(found[width - 1], np.uint8)
            beside = top
            if i < width - 2:
                beside = top.astype(int) * 2 % 256 + np.frombuffer(found[width - 2], np.uint8) // 128
            found[i] = lanes(parts[i][1], beside)
        else:
            found[i] = unpack(*parts[i])
    return b"".join(found[i] for i in range(width))


def planes(raw, width, dtype):
    split = np.frombuffer(raw, np.uint8).reshape(width, -1)
    return np.frombuffer(split.T.tobytes(), dtype)


def read_schema(data):
    tensors = []
    for _ in range(data.varint()):
        name = data.take(data.varint()).decode()
        kind, dims = data.byte(), data.byte()
        tensors.append((name, kind, tuple(data.varint() for _ in range(dims))))
    return tensors


def positions(data, coding, k, n, kept):
    """Read one set of `kept` among `n` from an index stream."""
    if coding == BITMAP:
        bits = np.unpackbits(np.frombuffer(data.take(-(-n // 8)), np.uint8), bitorder="little")
        return np.flatnonzero(bits[:n])
    gaps = []
    if coding == VARINT:
        gaps = [data.varint() for _ in range(kept)]
    else:
        bits = np.unpackbits(np.frombuffer(data.data[data.at :], np.uint8), bitorder="little")
        at = 0
        for _ in range(kept):
            ones = 0
            while ones < 24 and bits[at]:
                ones, at = ones + 1, at + 1
            low, top = (32, 0) if ones == 24 else (k, ones << k)
            at += ones < 24
            gaps.append(top + sum(int(b) << i for i, b in enumerate(bits[at : at + low])))
            at += low
        data.take(-(-at // 8))
    return np.cumsum(np.array(gaps, np.int64) + 1) - 1


def read_sets(data, wanted):
    """wanted: (coding, k, n, kept) each; the sets in that order."""
    found = [np.arange(n) if coding == WHOLE else None for coding, _, n, _ in wanted]
    for coding in (BITMAP, RICE, VARINT):
        mine = [i for i, w in enumerate(wanted) if w[0] == coding]
        if mine:
            raw = Bytes(section(data, len(mine)))
            for i in mine:
                found[i] = positions(raw, *wanted[i])
            assert raw.at == len(raw.data)
    return found


def header(blob, schema):
    if blob[4] == 2:
        return second_header(blob, schema)
    (magic, major, _, size, flags, kind, apply, _, _, count, schema_id, _, mask_id, body, _, _, crc) = struct.unpack(
        "<4sBBHIBBHII16s16s16sQQII", blob[:96]
    )
    assert (magic, major, size, body) == (b"AFD1", 1, 96, len(blob) - 96)
    assert zlib.crc32(blob[:92] + bytes(4) + blob[96:]) == crc
    data = Bytes(blob[96:])
    return apply, flags, mask_id, schema_of(data, flags, schema_id, schema, count), data


def schema_of(data, flags, schema_id, schema, count):
    if flags & 1:
        raw = section(data)
        assert hashlib.sha256(b"AFD1 schema\0" + raw).digest()[:16] == schema_id
        schema = read_schema(Bytes(raw))
    assert len(schema) == count
    return schema


def second_header(blob, schema):
    assert blob[:4] == b"AFD1"
    flags, kind, apply = blob[6], blob[7] // 16, blob[7] % 16
    assert zlib.crc32(blob[:8] + bytes(4) + blob[12:]) == struct.unpack("<I", blob[8:12])[0]
    data = Bytes(blob[12:])
    schema_id = data.take(16)
    assert not flags & 8 or any(data.take(16))
    mask_id = data.take(16) if flags & 2 or kind == 3 else bytes(16)
    data.varint()  # the round
    return apply, flags, mask_id, schema_of(data, flags, schema_id, schema, data.varint()), data


def read_frame(blob, masks=None, schema=None, base=None):
    """Decode a delta or patch frame; masks: name -> flat positions kept; base: name -> uint16 words or bytes."""
    apply, flags, _, schema, data = header(blob, schema)
    masks = masks or {}
    rows, blocks, survivors = [], {}, {}
    for name, tensor_kind, shape in schema:
        n = int(np.prod(shape, dtype=np.int64))
        byte = data.byte()
        index, values = byte >> 4, byte & 15
        kept = data.varint() if index else n
        k = data.byte() if index & ~RANKS == RICE else 0
        blocks[name] = -(-kept // 256)
        if values in (5, 6):  # int8 and int4 without the codes that are 0
            values, blocks[name] = values - 3, data.varint()
            survivors[name] = None
        rows.append((name, tensor_kind, shape, n, index, values, kept, k))
    coded = [r for r in rows if r[4] & ~RANKS >= BITMAP]
    sets = iter(read_sets(data, [(min(i & ~RANKS, VARINT), k, len(masks[name]) if i & RANKS else n, kept)
                                 for name, _, _, n, i, _, kept, k in coded]))  # fmt: skip
    where = []
    for name, _, shape, n, index, *_ in rows:
        found = next(sets) if index & ~RANKS >= BITMAP else None
        if index == COLUMNS:
            found = np.sort(np.arange(n).reshape(shape[0], -1).T.ravel()[found])
        base_set = masks[name] if index == SHARED or index & RANKS else np.arange(n)
        where.append(base_set if found is None else base_set[found])
    streams = {}
    for codec_number in range(5):
        mine = [(i, r) for i, r in enumerate(rows) if r[5] == codec_number and r[6]]
        if not mine:
            continue
        counts = [r[6] for _, r in mine]
        if codec_number == 0:
            flat = planes(float_section(data, 4), 4, "<f4")
        elif codec_number == 1:
            flat = planes(float_section(data, 2), 2, "<u2")
        elif codec_number == 4:
            counts = [r[6] * np.dtype(INTEGERS[r[1]]).itemsize for _, r in mine]
            flat = np.frombuffer(section(data), np.uint8)
        else:
            sizes = [count if codec_number == 2 else -(-count // 2) for count in counts]
            beside = [min(i, 127) for i, n in enumerate(sizes) for _ in range(n)]
            raw = np.frombuffer(section(data, companion=beside), np.uint8)
            if codec_number == 3:
                pieces, at = [], 0
                for count in counts:
                    pairs = raw[at : at + -(-count // 2)].astype(np.int64)
                    at += len(pairs)
                    pieces.append(np.stack([pairs & 15, pairs >> 4], 1).ravel()[:count])
                codes = np.concatenate(pieces)
                codes = codes - 16 * (codes > 7)
            else:
                codes = raw.view(np.int8)
            scales = planes(float_section(data, 4), 4, "<f4")
            thinned = [r[0] for _, r in mine if r[0] in survivors]
            if thinned:
                left = Bytes(section(data))
                survivors |= {n: [1 + b for b in left.take(blocks[n])] for n in thinned}
                assert left.at == len(left.data)
            each, start = [], 0
            for _, (name, *_, count, _) in mine:
                sizes = survivors.get(name, 256)
                each.append(np.repeat(scales[start : start + blocks[name]], sizes)[:count])
                start += blocks[name]
                assert len(each[-1]) == count
                assert name not in survivors or sum(sizes) == count
            flat = codes.astype(np.float32) * np.concatenate(each)
        for (i, _), piece in zip(mine, np.split(flat, np.cumsum(counts)[:-1]), strict=True):
            streams[i] = piece
    assert data.at == len(data.data)
    out = {}
    for i, (name, tensor_kind, shape, n, *_) in enumerate(rows):
        stream = streams.get(i, np.empty(0, np.uint8))
        if base is not None and flags & 4:
            held = base[name] if tensor_kind else base[name][where[i]]
            if apply == 4 and not tensor_kind:
                signed = stream.astype(np.int64)
                stream = (held + (signed >> 1 ^ -(signed & 1))).astype(np.uint16)
            else:
                stream = stream ^ held
        if tensor_kind:
            out[name] = np.frombuffer(stream.tobytes(), INTEGERS[tensor_kind]).reshape(shape)
            continue
        if stream.dtype == np.uint16:
            stream = (stream.astype(np.uint32) << 16).view(np.float32)
        out[name] = np.zeros(n, np.float32)
        out[name][where[i]] = stream
        out[name] = out[name].reshape(shape)
    return out


def read_masks(blob, base=None):
    _, _, _, schema, data = header(blob, None)
    ways, wanted = [], []
    for name, _, shape in schema:
        n, way = int(np.prod(shape, dtype=np.int64)), data.byte()
        held = len(base[name]) if way == 2 else 0
        for size in {0: (), 1: (n,), 2: (held, n - held)}[way]:
            coding, kept, k = data.byte(), data.varint(), data.byte()
            wanted.append((coding, k, size, kept))
        ways.append((name, n, shape, way))
    sets = iter(read_sets(data, wanted))
    out = {}
    for name, n, shape, way in ways:
        mask = np.zeros(n, bool)
        if way == 1:
            mask[next(sets)] = True
        elif way == 2:
            mask[base[name]] = True
            dropped, grown = base[name][next(sets)], np.flatnonzero(~mask)[next(sets)]
            mask[dropped], mask[grown] = False, True
        if way:
            out[name] = mask.reshape(shape)
    return out


def flat(masks):
    return {name: np.flatnonzero(mask.numpy()) for name, mask in masks.items()}


def same(got, want):
    assert list(got) == list(want)
    for name in want:
        assert np.array_equal(got[name], want[name].float().numpy() if want[name].is_floating_point() else want[name])


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "golden").glob("*.afd")), ids=lambda p: p.stem)
def test_golden_frames_mean_the_same_to_both(path):
    update, masks = golden_update()
    blob, name = path.read_bytes(), path.stem.partition("_")[2]
    if name in ("masks", "change"):
        base = MaskSet({"w": update["w"] > 0.15})
        got = read_masks(blob, flat(base))
        assert list(got) == ["w"]
        assert np.array_equal(got["w"], masks["w"].numpy())
    elif name.startswith("patch"):
        two = "difference" in name
        base = {n: torch.full_like(t, 2 * two) for n, t in update.items()}
        words = {n: np.full(t.numel(), 0x4000 * two, np.uint16) for n, t in update.items()}  # 2 in bf16, or 0
        words["steps"] = np.array([2 * two, 0, 0, 0, 0, 0, 0, 0], np.uint8)
        same(read_frame(blob, base=words), codec.decode_patch(blob, base))
    else:
        shared = masks if name.startswith(("shared", "ranks")) else golden_inside() if name == "dropped_ranks" else None
        same(read_frame(blob, flat(shared or masks)), codec.decode(blob, masks=shared))


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("density", [0.0, 0.003, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("entropy", ["zstd", "none"])
@pytest.mark.parametrize("shared", [True, False])
def test_todays_frames_mean_the_same_to_both(values, density, entropy, shared):
    g = torch.Generator().manual_seed(0)
    delta = {
        "a": torch.randn(41, 97, generator=g),
        "b": torch.randn(97, generator=g),
        "half": torch.randn(33, 5, generator=g).to(torch.bfloat16),
        "none": torch.zeros(0, 3),
        "count": torch.tensor(12),
        "flags": torch.tensor([True, False, True]),
        "c": torch.randn(250, 160, generator=g).cumsum(1) * 0.01,  # neighbours are alike
        "d": torch.randn(50, 90, generator=g) ** 9,  # nearly all codes are 0
    }
    for name in ("a", "c"):
        delta[name] *= torch.rand(delta[name].shape, generator=g) < density
    delta["c"][:, ::3] = 0
    masks = MaskSet({n: torch.rand(delta[n].shape, generator=g) < 0.3 for n in ("a", "c")}) if shared else None
    blob = codec.encode(delta, masks=masks, values=values, entropy=entropy)
    tensors = codec.inspect(blob)["tensors"]
    if values == "int4" and density == 0.4 and not shared:
        assert {t["name"] for t in tensors if t["blocks"]} == {"a", "c"}  # their zeros are left out
    same(read_frame(blob, flat(masks) if masks else None), codec.decode(blob, masks=masks))
