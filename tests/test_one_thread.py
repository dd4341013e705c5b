"""A kernel asked for one thread does all of its work by itself, in whoever's team it is called."""

import ctypes

import pytest
import torch

from autoflip.ops import Pack
from autoflip.ops import _masked_kernels as kernels


def team(n, body):
    """Run ``body`` on each thread of an OpenMP team of ``n``."""
    try:
        openmp = ctypes.CDLL("libgomp.so.1")  # torch has loaded it, and the extension takes the same
    except OSError as error:
        pytest.skip(f"no libgomp here: {error}")
    openmp.GOMP_parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: body()), None, n, 0)


@pytest.mark.skipif(kernels.CPP is None, reason="the extension is not built")
@pytest.mark.parametrize("n", [1, 2])
def test_one_thread_computes_everything_inside_a_team_too(n):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(300, 400, generator=g) < 0.3
    x, w = torch.randn(64, 400, generator=g), torch.randn(300, 400, generator=g)
    parts, found = Pack(mask, path="sparse").parts(64), []
    torch.set_num_threads(1)
    want = kernels.cpu_forward(x, w, None, False, parts)
    team(n, lambda: found.append(kernels.cpu_forward(x, w, None, False, parts)))
    assert len(found) == n
    assert all(torch.equal(y, want) for y in found)
