"""Memory of dead tensors is used again, and never that of living ones."""

import gc
import mmap

import pytest
import torch

from autoflip.ops import delta, delta_stream, memory

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="no MADV_FREE: torch's own memory serves")
NUMEL = memory.LEAST // 4 + 5


@pytest.fixture(autouse=True)
def clean():
    memory.forget()
    yield
    memory.forget()


def test_a_dead_tensors_block_serves_the_next_one():
    a = memory.empty(NUMEL)
    assert (a.shape, a.dtype, a.data_ptr() % 64) == ((NUMEL,), torch.float32, 0)
    place = a.fill_(1.0).data_ptr()
    view = a.view(-1)[3:7]
    del a
    assert memory.empty(NUMEL).data_ptr() != place  # a view keeps its memory alive
    assert view.tolist() == [1.0] * 4
    memory.forget()
    del view
    assert memory.empty(NUMEL - 3).data_ptr() == place


def test_living_tensors_never_share_memory():
    held = [memory.empty(NUMEL).fill_(i) for i in range(4)]
    del held[1]
    held += [memory.empty(NUMEL).fill_(10 + i) for i in range(3)]
    assert [float(t.min()) for t in held] == [float(t.max()) for t in held] == [0, 2, 3, 10, 11, 12]
    assert len({t.data_ptr() for t in held}) == 6


def test_a_block_serves_nothing_much_smaller():
    place = memory.empty(8 * NUMEL).data_ptr()
    small = memory.empty(NUMEL)
    assert small.data_ptr() != place
    assert memory.empty(6 * NUMEL).data_ptr() == place


def test_dead_blocks_stay_within_their_bound(monkeypatch):
    monkeypatch.setattr(memory, "KEEP", 3 * memory.LEAST)
    held = [memory.empty(memory.LEAST // 4) for _ in range(5)]
    del held
    gc.collect()
    assert sum(map(len, memory._dead)) == 3 * memory.LEAST
    memory.forget()
    assert not memory._dead


def test_gathers_and_codes_use_blocks_again_and_keep_what_lives():
    x, mask = torch.arange(2.0 * NUMEL), delta.pack(torch.arange(2 * NUMEL) % 10 > 0)
    first, _ = delta.gather(x, mask)
    place, want = first.ctypes.data, first.copy()
    part, second = first[5:8], delta.gather(-x, mask)[0]
    assert (first == want).all()
    assert (second == -want).all()
    del first
    assert delta.gather(x, mask)[0].ctypes.data != place  # a part keeps its memory alive
    assert (part == want[5:8]).all()
    del part
    gc.collect()
    dense = delta.expand(second, mask)
    assert torch.equal(dense[dense != 0], torch.from_numpy(-want[want != 0]))


def test_streams_use_blocks_again_too():
    size = memory.LEAST + 3
    a = memory.empty_bytes(size)
    assert (a.shape, a.dtype.name) == ((size,), "uint8")
    place, view = a.ctypes.data, a[5:9].reshape(2, 2)
    view[:] = 7
    del a
    assert memory.empty_bytes(size).ctypes.data != place  # a view keeps its memory alive
    assert view.tolist() == [[7, 7], [7, 7]]
    memory.forget()
    del view
    assert memory.empty(size // 4).data_ptr() == place
    assert memory.empty_bytes(100).shape == (100,)


def test_small_outputs_are_torchs_own():
    assert memory.empty(100).shape == (100,)
    assert not memory._dead


@pytest.mark.parametrize("kind", [delta_stream.FP32, delta_stream.INT8])
def test_used_memory_is_written_over_whole(kind, monkeypatch):
    # as many entries as are written around the caches, and a last word that is not whole
    n, g = (1 << 21) + 300, torch.Generator().manual_seed(0)
    x, mask = torch.randn(n, generator=g), delta.pack(torch.rand(n, generator=g) < 0.1)
    coded, _ = delta_stream.code(x, mask, kind, (1, 2))
    place = memory.empty(n).fill_(7.0).data_ptr()
    got = delta_stream.decode(coded, mask)
    assert got.data_ptr() == place
    monkeypatch.setenv("AUTOFLIP_BACKEND", "reference")
    assert torch.equal(got, delta_stream.decode(coded, mask))
