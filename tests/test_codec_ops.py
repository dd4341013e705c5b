"""The delta kernels: numpy reference and C++ give the same bits at every instruction level."""

import hashlib
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoflip.ops import backend, delta, delta_coding, reference

needs_cpp = pytest.mark.skipif(backend.extension("_C")[0] is None, reason="autoflip._C is not built")
SIZES = [0, 1, 15, 16, 63, 64, 65, 255, 256, 257, 1000, (1 << 18) - 1, (1 << 18) + 77]
DENSITIES = [0.0, 0.01, 0.5, 1.0]


def case(n, density):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, generator=g), torch.randn(n, generator=g), torch.rand(n, generator=g) < density


def everything(n, density):
    """Return the result of every op as bytes; the subprocesses below hash it."""
    x, base, mask = case(n, density)
    mask[n // 2 :: 7] = True  # so that the tail of the last word is used
    x[~mask & (x > 0.5)] = 0
    pack = delta.pack(mask)
    values, finite = delta.gather(x, pack)
    shares = [delta.zero_share(x, pack), delta.zero_share(x[n // 3 :], delta.pack(mask[n // 3 :]))]
    out = [pack.words.numpy(), delta.pack_nonzero(x).words.numpy(), pack.offsets.numpy(), values, np.array([finite])]
    out.append(np.array(shares))
    out.append(delta.gather(x, pack, base)[0])
    out.append(delta.expand(values, pack).numpy())
    total = base.clone()
    delta.expand_add(values, pack, total, 0.7)
    out.append(total.numpy())
    for levels in (127, 7):
        codes, scales = delta_coding.quantise(values, levels, (n, 77))
        out += [codes, scales, delta_coding.dequantise(codes, scales)]
    words = delta_coding.round_bf16(values, (5, n))
    out += [
        words,
        np.frombuffer(delta_coding.split_planes(words), np.uint8),
        np.frombuffer(delta_coding.split_planes(values), np.uint8),
    ]
    for k in (0, 3, 12):
        code = delta_coding.rice_encode(pack, k) if n < 5000 or backend.serve("delta", x.device) == "cpp" else b""
        out.append(np.frombuffer(code, np.uint8))
    out.append(np.frombuffer(delta_coding.varint_encode(pack), np.uint8))
    return [np.ascontiguousarray(a) for a in out]


def digest(sizes):
    total = hashlib.sha256()
    for n in sizes:
        for density in DENSITIES:
            for array in everything(n, density):
                total.update(array.tobytes())
    return total.hexdigest()


@needs_cpp
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
def test_cpp_equals_reference_bit_by_bit(n, density, monkeypatch):
    fast = everything(n, density)
    monkeypatch.setenv("AUTOFLIP_BACKEND", "reference")
    for i, (a, b) in enumerate(zip(fast, everything(n, density), strict=True)):
        if len(b) or not len(a):
            assert a.dtype == b.dtype
            assert np.array_equal(a.view(np.uint8), b.view(np.uint8)), f"result {i}"


@needs_cpp
def test_every_instruction_level_and_thread_count_gives_the_same_bytes():
    code = (
        "import torch, test_codec_ops as t; torch.set_num_threads({threads}); "
        "print(t.backend.extension('_C')[0].isa(), t.digest({sizes}))"
    )
    seen = {}
    for level, threads in (("base", 1), ("avx2", 2), ("avx512", 1)):
        env = os.environ | {"AUTOFLIP_CPU": level, "AUTOFLIP_BACKEND": "cpp"}
        env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
        program = code.format(threads=threads, sizes=[n for n in SIZES if n > 60])
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        isa, seen[level, threads] = done.stdout.split()
        assert isa == level or level != "base"  # a CPU without AVX serves what it has
    assert len(set(seen.values())) == 1


@needs_cpp
def test_crc_is_zlibs():
    raw = np.random.default_rng(0).integers(0, 256, 3000, np.uint8)
    ext = backend.extension("_C")[0]
    for first in (0, 1, 7):
        for size in (*range(0, 200), 255, 256, 319, 511, 512, 1023, 1024, 2990):
            part = raw[first : first + size].tobytes()
            wanted = zlib.crc32(part, zlib.crc32(b"before"))
            assert delta_coding.crc32(part, zlib.crc32(b"before")) == wanted
            if ext.has_fast_crc():
                assert ext.crc32(zlib.crc32(b"before"), raw[first:].ctypes.data, size) == wanted
    large = raw.tobytes() * 9
    assert delta_coding.crc32(large) == delta_coding.crc32(memoryview(large)) == zlib.crc32(large)


@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 31), st.integers(0, 1 << 30))
@settings(max_examples=200)
def test_rice_round_trip(n, density, k, seed):
    mask = delta.pack(torch.rand(n, generator=torch.Generator().manual_seed(seed)) < density)
    code = delta_coding.rice_encode(mask, k)
    assert len(code) == -(-delta_coding.rice_bits(mask, k) // 8)
    again, used = delta_coding.rice_decode(code + b"tail", n, mask.kept, k)
    assert used == len(code)
    assert torch.equal(again.words, mask.words)


@pytest.mark.parametrize("served", ["auto", "reference"])
def test_rice_decode_refuses_bad_streams(served, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_BACKEND", served)
    mask = delta.pack(torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.2)
    code = delta_coding.rice_encode(mask, 2)
    with pytest.raises(ValueError, match="ends early"):
        delta_coding.rice_decode(code[:-1], 300, mask.kept, 2)
    with pytest.raises(ValueError, match="leaves the tensor"):
        delta_coding.rice_decode(code, 250, mask.kept, 2)
    with pytest.raises(ValueError, match="leaves the tensor"):
        delta_coding.rice_decode(b"\xff" * 50, 300, 2, 2)
    with pytest.raises(ValueError, match="padding that is not zero"):
        delta_coding.rice_decode(b"\xfe", 300, 1, 0)
    with pytest.raises(ValueError, match="ends early"):
        delta_coding.rice_decode(b"", 300, 1, 0)


@needs_cpp
@given(st.binary(max_size=60), st.integers(1, 500), st.integers(0, 60), st.integers(0, 31))
@settings(max_examples=300)
def test_rice_decoders_agree_on_any_bytes(data, n, kept, k):
    def outcome(call):
        try:
            pack, used = call()
            return used, pack.words.tolist()
        except ValueError as error:
            return str(error)

    def slow():
        words, used = reference.rice_decode(np.frombuffer(data, np.uint8)[: 7 * kept], n, kept, k)
        if used < 0:
            raise ValueError("a Rice stream " + delta_coding._INDEX_ERRORS[used])
        return delta.Pack(words, n), used

    assert outcome(lambda: delta_coding.rice_decode(data, n, kept, k)) == outcome(slow)


@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 1 << 30), st.sampled_from(["auto", "reference"]))
@settings(max_examples=200)
def test_varint_round_trip(n, density, seed, served):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOFLIP_BACKEND", served)
        mask = delta.pack(torch.rand(n, generator=torch.Generator().manual_seed(seed)) < density)
        code = bytes(delta_coding.varint_encode(mask))
        again, used = delta_coding.varint_decode(code + b"tail", n, mask.kept)
        assert used == len(code)
        assert torch.equal(again.words, mask.words)


@needs_cpp
@pytest.mark.parametrize("kept", [[], [0], [5], [1_300_000], [262_143, 262_144, 1_048_575], range(3, 1_300_000, 129)])
def test_any_number_of_threads_writes_the_same_varints(kept):
    mask = torch.zeros(5 * delta.CHUNK + 77, dtype=torch.bool)
    mask[list(kept)] = True
    pack, found, before = delta.pack(mask), set(), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.add(bytes(delta_coding.varint_encode(pack)))
    finally:
        torch.set_num_threads(before)
    assert found == {bytes(reference.varint_encode(pack.words, pack.numel))}


@pytest.mark.parametrize("served", ["auto", "reference"])
def test_varint_decode_refuses_bad_streams(served, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_BACKEND", served)
    for data, message in [
        (b"", "ends early"),
        (b"\x80", "ends early"),
        (b"\x80\0", "too long"),
        (b"\xff" * 20, "too long"),
        (b"\x88\x02", "leaves the tensor"),
        (b"\xff" * 8 + b"\x7f", "leaves the tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            delta_coding.varint_decode(data, 264, 1)
    assert delta_coding.varint_decode(b"\x87\x02", 264, 1)[0].kept == 1


@pytest.mark.parametrize("served", ["auto", "reference"])
@pytest.mark.parametrize("place", ["kept", "dropped", "tail", "infinite"])
def test_gather_sees_every_bad_entry(served, place, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_BACKEND", served)
    x, _, mask = case(1000, 0.3)
    where = {"kept": mask.nonzero()[5], "dropped": (~mask).nonzero()[5], "tail": 999, "infinite": 300}[place]
    assert delta.gather(x, delta.pack(mask))[1]
    x[where] = float("-inf") if place == "infinite" else float("nan")
    assert not delta.gather(x, delta.pack(mask))[1]
    assert delta.gather(x, None)[1] is False


def test_random_numbers_are_uniform_and_differ_between_keys():
    a, b = (reference.delta_random(key, 1 << 20) for key in ((1, 2), (2, 3)))
    for shift in (0, 8, 16, 24):
        counts = np.bincount((a >> np.uint32(shift)) & 255, minlength=256)
        chi2 = float(((counts - 4096.0) ** 2 / 4096).sum())
        assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5
    u, v = a / 2**32 - 0.5, b / 2**32 - 0.5
    for lag in (0, 1, 2):  # neighbouring keys must not be shifted copies of each other
        r = float((u[lag:] * v[: len(v) - lag]).mean() * 12)
        assert abs(r) < 5 / 1024
    assert abs(float((u[1:] * u[:-1]).mean() * 12)) < 5 / 1024


def test_a_default_dtype_changes_nothing():
    x, _, mask = case(300, 0.5)
    pack = delta.pack(mask)
    values, _ = delta.gather(x, pack)
    torch.set_default_dtype(torch.float64)
    try:
        whole = delta.expand(values, pack)
    finally:
        torch.set_default_dtype(torch.float32)
    assert whole.dtype is torch.float32
    assert torch.equal(whole, torch.where(mask, x, 0))


def test_ops_say_what_does_not_fit():
    mask = delta.pack(torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask covers 5"):
        delta.gather(torch.zeros(4), mask)
    with pytest.raises(ValueError, match="wanted torch.float32"):
        delta.gather(torch.zeros(5).double(), mask)
    with pytest.raises(ValueError, match=r"wanted contiguous float32 \(5,\)"):
        delta.expand(np.zeros(4, np.float32), mask)
    with pytest.raises(ValueError, match="write scores > t"):
        delta.pack(torch.zeros(3))
