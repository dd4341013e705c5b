"""The entropy stage: what goes in comes out, the numpy decoder agrees, and no bytes harm it."""

import hashlib
import os
import subprocess
import sys

import instruction_sets
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip.ops import backend, entropy, reference_entropy

KEYS = (entropy.SIGNED, entropy.MAGNITUDE, entropy.PLAIN)
needs_cpp = pytest.mark.skipif(backend.extension("_C")[0] is None, reason="writing needs the extension")


def streams(n, seed=0):
    """Return streams of ``n`` bytes: codes, one symbol, noise, gaps, neighbours alike; and what lies beside them."""
    g = np.random.default_rng(seed)
    walk = np.cumsum(g.normal(0, 4, n))
    out = {
        "codes": g.normal(0, 20, n).round().clip(-127, 127).astype(np.int8).view(np.uint8),
        "one": np.full(n, 7, np.uint8),
        "noise": g.integers(0, 256, n).astype(np.uint8),
        "gaps": (g.geometric(0.3, n) % 256).astype(np.uint8),
        "rare": np.where(g.random(n) < 0.999, 0, 255).astype(np.uint8),
        "walk": walk.astype(np.int64).astype(np.uint8),
    }
    return {name: (x, (x // 3 + g.integers(0, 3, n)).astype(np.uint8)) for name, x in out.items()}


@needs_cpp
@pytest.mark.parametrize("n", [1, 3, 8, 9, 63, 255, 1000, 32767, 32768, 70001])
@pytest.mark.parametrize("beside", [False, True])
def test_round_trip_and_numpy_agrees(n, beside):
    for i, (x, companion) in enumerate(streams(n).values()):
        known, key = companion if beside else None, KEYS[i % 3]
        blob = entropy.encode(x, key, known)
        assert np.array_equal(entropy.decode(blob, n, known), x)
        got, wrong = reference_entropy.decode(np.frombuffer(blob, np.uint8), n, known)
        assert wrong == 0
        assert np.array_equal(got, x)


@needs_cpp
def test_bytes_stay_near_the_entropy():
    n = 200_000
    held = streams(n)
    for name in ("codes", "noise", "gaps"):  # nothing but their frequencies to know
        counts = np.bincount(held[name][0], minlength=256)
        p = counts[counts > 0] / n
        ideal = -(p * np.log2(p)).sum() * n / 8
        # 64 bytes of states, a table of 3 bits a symbol, half a per cent for levels and 12 bits of precision
        assert len(entropy.encode(held[name][0], entropy.SIGNED)) < 1.005 * ideal + 64 + 96
    # a step of standard deviation 4 has 4.05 bits; 16 classes of the byte before leave an uncertainty of some steps
    assert len(entropy.encode(held["walk"][0], entropy.PLAIN)) < 0.85 * n
    # what lies beside leaves at most 3 * 3 values
    assert len(entropy.encode(held["noise"][0], entropy.PLAIN, held["noise"][1])) < 0.6 * n


@needs_cpp
@pytest.mark.parametrize("n", [4_000, 10_000])
def test_tables_of_few_bytes_are_short(n):
    g = np.random.default_rng(0)
    x = g.laplace(0, 15, n).round().clip(-127, 127).astype(np.int8).view(np.uint8)
    counts = np.bincount(x)
    ideal = float((counts[counts > 0] * -np.log2(counts[counts > 0] / n)).sum()) / 8
    # 7 bytes, some 3 bits for each of 160 to 200 symbols, more where one's level differs from its neighbours'
    assert len(entropy.encode(x, entropy.SIGNED)) < ideal + 120


@needs_cpp
def test_classes_end_where_the_bytes_change():
    g, n = np.random.default_rng(0), 10_000
    companion = g.integers(0, 256, n).astype(np.uint8)
    noisy = companion >= 30
    x = np.where(noisy, g.integers(0, 256, n), g.integers(0, 4, n)).astype(np.uint8)
    ideal = noisy.sum() + 0.25 * (~noisy).sum()
    # the nearest of 16 cuts lies 2 away from 30, tables are two
    assert len(entropy.encode(x, entropy.PLAIN, companion)) < 1.03 * ideal


@needs_cpp
def test_more_than_a_sample_shows():
    x = np.zeros((1 << 22) + 5, np.uint8)
    x[1_234_567] = 200  # of four million bytes a sample tells, which lacks this one
    x[-1] = 3
    assert np.array_equal(entropy.decode(entropy.encode(x, entropy.PLAIN), len(x)), x)


@needs_cpp
def test_estimate_is_near():
    for x, companion in streams(60_000).values():
        for known in (None, companion):
            size = len(entropy.encode(x, entropy.PLAIN, known))
            assert abs(entropy.encode_below(x, entropy.PLAIN, 0, known)[0] - size) <= 0.02 * size + 64


@needs_cpp
@pytest.mark.parametrize("n", [1, 300, 60_000])
def test_a_limit_withholds_the_bytes_alone(n):
    for x, companion in streams(n).values():
        for known in (None, companion):
            told = entropy.encode_below(x, entropy.PLAIN, 0, known)[0]
            assert entropy.encode_below(x, entropy.PLAIN, told, known) == (told, None)
            size, coded = entropy.encode_below(x, entropy.PLAIN, told + 1, known)
            assert size == len(coded)
            assert bytes(coded) == bytes(entropy.encode(x, entropy.PLAIN, known))
    assert entropy.encode_below(b"", entropy.PLAIN, 1) == (None, None)


def both(blob, n, known=None):
    """Decode hostile bytes by the extension and by numpy; they must agree."""
    got, wrong = reference_entropy.decode(np.frombuffer(bytes(blob), np.uint8), n, known)
    try:
        ours = entropy.decode(bytes(blob), n, known)
    except ValueError:
        assert wrong
    else:
        assert not wrong
        assert np.array_equal(ours, got)


@given(st.binary(max_size=400), st.sampled_from([0, 1, 7, 8, 100, 3000]))
def test_any_bytes_are_refused_or_decoded(blob, n):
    both(blob, n)


@needs_cpp
@settings(max_examples=300)
@given(st.data())
def test_mutations_are_refused_or_decoded(data):
    n = data.draw(st.sampled_from([50, 1000]))
    x, companion = streams(n)[data.draw(st.sampled_from(["codes", "rare", "gaps"]))]
    known = data.draw(st.sampled_from([None, companion]))
    blob = bytearray(entropy.encode(x, entropy.SIGNED, known))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    both(blob[: data.draw(st.integers(0, len(blob)))] if data.draw(st.booleans()) else blob, n, known)


@needs_cpp
@pytest.mark.parametrize("change, message", [
    (lambda b: b[:-1], "ends early|tail|does not end"),
    (lambda b: b + b"\0", "tail"),
    (lambda b: b"\x60" + b[1:], "table"),
    (lambda b: b"\x32\x05\x05" + b[1:], "table"),
    (lambda b: b[:1], "ends early"),
    (lambda b: b"", "ends early"),
])  # fmt: skip
def test_damage_has_a_name(change, message):
    blob = bytes(entropy.encode(streams(64)["codes"][0], entropy.SIGNED))
    assert blob[0] == 0x30  # one lane, one class
    with pytest.raises(ValueError, match=message):
        entropy.decode(change(blob), 64)


def literal_streams(n):
    """Return bytes that ask something of Huffman tables: name -> n bytes."""
    g = np.random.default_rng(n)
    held = {name: x for name, (x, _) in streams(n).items()}
    shifted, late, pause = (held["codes"].copy() for _ in range(3))
    shifted[n // 2 :] = held["gaps"][n // 2 :]  # wants a second table
    late[: n // 3] = g.integers(0, 256, n // 3)  # blocks that stay as they are come first
    pause[n // 3 : 2 * n // 3] = 9  # blocks of one symbol lie between
    begins = held["rare"].copy()
    begins[: n // 3] = 0  # a table that does not come with the first of the blocks it is for
    once = g.normal(0, 40, n).clip(-120, 120).astype(np.int8).view(np.uint8)
    once[g.choice(n, 7, replace=False)] = np.arange(121, 128)  # a sample shows but some of these
    return held | {
        "begins": begins,
        "shifted": shifted,
        "late": late,
        "once": once,
        "pause": pause,
        "two": np.where(g.random(n) < 0.1, 255, 254).astype(np.uint8),
        "few": g.integers(0, 3, n).astype(np.uint8),  # a table of plain weights
        "steep": (g.geometric(0.5, n) - 1).clip(0, 200).astype(np.uint8),  # codes cut at 11 bits
    }


@pytest.fixture
def threads():
    """Yield torch.set_num_threads; the number of before comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def by_zstd(blob, n):
    """Return what zstd makes of a frame, None where it refuses or the frame declares another size."""
    try:
        if zstandard.get_frame_parameters(blob).content_size != n:
            return None
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 17)
        return reader.decompress(blob, max_output_size=n, allow_extra_data=False)
    except zstandard.ZstdError:
        return None


@needs_cpp
@pytest.mark.parametrize("n", [4096, 4097, 16_383, 16_384, 65_791, 65_792, 131_072, 131_073, 140_000, 400_001, 700_001])
def test_literals_are_zstd_frames(n, threads):
    for i, (name, x) in enumerate(literal_streams(n).items()):
        threads(1 + i % 2)
        size, blob = entropy.literals(x, 2 * n)
        assert size == len(blob)
        assert by_zstd(blob, n) == x.tobytes()
        assert np.array_equal(entropy.read_literals(blob, n), x)
        assert entropy.read_literals(blob, n + 1) is None
        if name in ("codes", "gaps", "few", "steep", "noise"):  # elsewhere bytes repeat, or change within a block
            assert size < 1.001 * len(zstandard.ZstdCompressor(level=1).compress(x)) + 32
        over = 1 if n < 1 << 19 else 1 + size // 300  # counts of an eighth of the bytes are not that exact
        assert entropy.literals(x, size + over) == (size, blob)
        assert entropy.literals(x, size) in [(size, None), (entropy.literals(x, 0)[0], None)]
    assert entropy.literals(b"", 9) == entropy.literals(bytes(4095), 9) == (None, None)
    assert entropy.read_literals(zstandard.ZstdCompressor(level=1).compress(x), n) is None


@needs_cpp
def test_damaged_literals_read_as_zstd_reads_them(threads):
    g, both_read = np.random.default_rng(0), 0
    for n in (4096, 70_000, 270_000):
        for number, x in enumerate(literal_streams(n).values()):
            threads(1 + number % 2)
            whole = bytes(entropy.literals(x, 2 * n)[1])
            for i in range(60):
                blob = bytearray(whole[: g.integers(len(whole))] if i % 10 == 0 else whole)
                for _ in range(g.integers(1, 4)):  # most of them among the heads and the table
                    if blob:
                        blob[g.integers(min(len(blob), 200 if i % 3 else 1 << 20))] ^= 1 << g.integers(8)
                ours, zstds = entropy.read_literals(bytes(blob), n), by_zstd(bytes(blob), n)
                if ours is not None and zstds is not None:
                    assert ours.tobytes() == zstds
                    both_read += 1
    assert both_read > 100


@needs_cpp
def test_any_number_of_threads_writes_the_same_literals(threads):
    x = literal_streams(600_000)["shifted"]
    found = set()
    for number in (1, 2, 5):
        threads(number)
        found.add(bytes(entropy.literals(x, len(x))[1]))
    assert len(found) == 1
    for number in (1, 2, 5):
        threads(number)
        assert np.array_equal(entropy.read_literals(*found, len(x)), x)


def digest():
    """Return a hash of coded streams that fill vectors, and of short ones."""
    found = hashlib.sha256()
    for n in (1000, 40_003, 131_072):
        for x, companion in streams(n).values():
            for known in (None, companion):
                blob = entropy.encode(x, entropy.SIGNED, known)
                assert np.array_equal(entropy.decode(blob, n, known), x)
                found.update(blob)
    for n in (4097, 131_072, 300_001, 600_001):
        for x in literal_streams(n).values():
            found.update(entropy.literals(x, 2 * n)[1] or b"")
    return found.hexdigest()


@needs_cpp
@pytest.mark.parametrize("isa", instruction_sets.LEVELS)
def test_every_instruction_set_writes_the_same_bytes(isa):
    script = f"import sys; sys.path[:0] = {sys.path!r}; import test_entropy; print(test_entropy.digest())"
    env = {**os.environ, "AUTOFLIP_CPU": isa}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == digest()
