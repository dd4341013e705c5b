"""Sections: bytes of every size and kind return, and cost no more than their head where nothing packs them."""

import threading

import numpy as np
import pytest
import zstandard

from autoflip.codec import packing
from autoflip.codec.reader import DecodeError, Reader, varint
from autoflip.codec.section import code_section, numbers, plane_section, read_planes, read_section, section
from autoflip.ops.delta import cpp
from autoflip.ops.entropy import PLAIN, SIGNED

# below and from where a section is packed at all, in several ways, given up as noise, thoroughly no more, by a sample
SIZES = [0, 1, 15, 16, 511, 512, (1 << 14) + 1, (1 << 15) + 1, (1 << 17) + 1]


def kinds(n):
    """Return noise, one symbol, codes and a repetition: name -> n bytes."""
    g = np.random.default_rng(n)
    codes = g.normal(0, 6, n).round().clip(-127, 127).astype(np.int8).view(np.uint8)
    repeated = np.resize(g.integers(0, 256, 100).astype(np.uint8), n)
    return {"noise": g.integers(0, 256, n).astype(np.uint8), "one": np.full(n, 7, np.uint8), "codes": codes} | {
        "repeated": repeated
    }


@pytest.mark.parametrize("level", [1, 9])
@pytest.mark.parametrize("n", SIZES)
def test_sections_return_and_pack_what_packs(n, level):
    sizes = {}
    for name, raw in kinds(n).items():
        blob = b"".join(section([raw.tobytes()], "zstd", level, key=SIGNED))
        reader = Reader(blob, "test")
        assert bytes(read_section(reader, [(n, n)])[0]) == raw.tobytes()
        reader.finish()
        sizes[name] = len(blob)
        assert len(blob) <= n + 1 + len(varint(n))
    if n >= 512:
        assert sizes["one"] < 64
        assert sizes["repeated"] < n / 3
    if n > 1 << 14 and (cpp() or level == 1):  # 4.63 bits a code; zstd's high levels see repetitions in them
        assert sizes["codes"] < 0.6 * n


def motifs(n, number):
    """Return ``n`` bytes out of ``number`` walks of 40 steps, which come again and again."""
    g = np.random.default_rng(n)
    held = (g.integers(0, 256, (number, 1)) + g.normal(0, 4, (number, 40)).cumsum(1)).round().astype(np.uint8)
    return held[g.integers(0, number, -(-n // 40))].tobytes()[:n]


# neighbours tell our own coder half, and of what repeats a sample shows zstd little
@pytest.mark.parametrize(("n", "number"), [(200_000, 2000), (900_000, 4000), (1_500_000, 3000)])
def test_what_repeats_is_left_to_zstd(n, number):
    raw = motifs(n, number)
    size = sum(map(len, section([raw], "zstd", key=SIGNED)))
    assert size < 1.001 * len(zstandard.ZstdCompressor(level=1).compress(raw)) + 8


def test_small_parts_are_packed_together_where_that_is_smaller():
    g = np.random.default_rng(0)
    alike = [g.geometric(0.2, 300).astype(np.uint8).tobytes() for _ in range(20)]
    unlike = [bytes(range(k, k + 40)) * 40 for k in (0, 40, 80)] + [g.integers(0, 256, 4000, np.uint8).tobytes()]
    for parts in (alike, unlike):
        blobs = [b"".join(section(parts, "zstd", apart=apart)) for apart in (True, False)]
        alone = sum(len(b"".join(section([part], "zstd"))) for part in parts)
        assert len(blobs[0]) <= min(len(blobs[1]), alone + 4)
        bounds = [(len(part), len(part)) for part in parts]
        assert b"".join(read_section(Reader(blobs[0], "test"), bounds)) == b"".join(parts)
    assert len(b"".join(section(alike, "zstd", apart=True))) < 0.9 * sum(
        len(b"".join(section([part], "zstd"))) for part in alike
    )


def spread(n, deviation, seed=0):
    """Return ``n`` int8 codes as bytes."""
    codes = np.random.default_rng(seed).normal(0, deviation, n).round().clip(-127, 127)
    return codes.astype(np.int8).view(np.uint8)


@pytest.mark.skipif(cpp() is None, reason="our own coder's estimates need the extension")
@pytest.mark.parametrize("n", [1000, 20_000])
def test_codes_of_tensors_that_are_unlike_have_tables_of_their_own(n):
    unlike, alike = [spread(n, 1), spread(n, 40)], [spread(n, 20), spread(n, 20, seed=1)]
    for parts, stage in ((unlike, 4 if n <= 1 << 14 else 3), (alike, 3)):
        blob = b"".join(code_section(parts, "zstd", 1, SIGNED))
        assert blob[0] == stage
        whole = b"".join(section([part.data for part in parts], "zstd", key=SIGNED))
        assert blob == whole if stage == 3 else len(blob) < 0.97 * len(whole)
        reader, held = Reader(blob, "test"), lambda: numbers([n, n])
        assert bytes(read_section(reader, [(2 * n, 2 * n)], held)[0]) == b"".join(part.tobytes() for part in parts)
        reader.finish()
        with pytest.raises(DecodeError):  # not so many
            read_section(Reader(blob, "test"), [(3 * n, 3 * n)], lambda: numbers([n, n, n]))
        if stage == 4:
            with pytest.raises(DecodeError, match="stage 4"):  # there is nothing beside the parts of others
                read_section(Reader(blob, "test"), [(2 * n, 2 * n)])
            wrong = Reader(blob, "test"), [(2 * n, 2 * n)], lambda: numbers([n - 1, n + 1])
            with pytest.raises(DecodeError, match="entropy-coded part"):
                read_section(*wrong)
    assert b"".join(code_section(unlike, "none", 1, SIGNED))[0] == 0
    assert b"".join(code_section(unlike[:1], "zstd", 1, SIGNED))[0] == 3


def test_codes_of_the_128th_tensor_and_later_have_one_number():
    assert numbers([2, 0, 1]).tolist() == [0, 0, 2]
    assert numbers([1] * 200).tolist() == [*range(127), *[127] * 73]


@pytest.mark.parametrize("n", SIZES)
def test_planes_that_tell_of_each_other_return(n):
    g = np.random.default_rng(n)
    top = g.integers(0, 256, n).astype(np.uint8)
    low = top + g.integers(0, 4, n).astype(np.uint8)  # each of them is noise to who does not know the other
    blob = b"".join(plane_section([low, top], "zstd"))
    if n > 1 << 14 and cpp():  # one of 16 classes, 8 bytes and their negatives, leaves log2(2 * 11) = 4.5 bits
        assert len(blob) < 1.6 * n
    got = read_planes(Reader(blob, "test"), n, 2)
    assert np.array_equal(got[0], low)
    assert np.array_equal(got[1], top)


def test_threads_pack_for_themselves_and_a_damaged_section_harms_no_later_one():
    raw = kinds(300)["codes"].tobytes()
    blob = b"".join(section([raw], "zstd"))
    found = []

    def work():
        for _ in range(50):
            assert b"".join(section([raw], "zstd")) == blob
            with pytest.raises(DecodeError, match="damaged"):
                read_section(Reader(blob[:-3] + bytes(b ^ 255 for b in blob[-3:]), "test"), [(300, 300)])
            assert bytes(read_section(Reader(blob, "test"), [(300, 300)])[0]) == raw
        found.append(True)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3


@pytest.mark.skipif(cpp() is None, reason="our own coder needs the extension")
def test_what_a_quarter_of_the_bytes_does_not_pay_for_the_whole_may():
    g, n = np.random.default_rng(0), 20_000
    companion = g.integers(0, 256, n).astype(np.uint8)
    x = np.where(companion >= 8, g.integers(0, 256, n), g.integers(0, 4, n)).astype(np.uint8)
    stage, packed = packing.smallest(x.data, 1, PLAIN, companion)
    assert stage == packing.BESIDE
    assert len(packed) < 0.995 * n  # 2.3 % of it are known, two tables take 0.8, cuts that miss by some 0.5
    assert packing.smallest(g.integers(0, 256, n).astype(np.uint8).data, 1, PLAIN)[0] == packing.STORED
