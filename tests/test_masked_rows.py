"""The kernels for blocks of 16 and 4 rows against float64, on every instruction set of this CPU."""

import os
import subprocess
import sys

import pytest
import torch

from autoflip import ops
from autoflip.ops import Pack, _masked_kernels, paths, reference

pytestmark = pytest.mark.skipif(_masked_kernels.CPP is None, reason="no CPU extension")
ISAS = ["base", "avx2", "avx512"]


def block_mask(O, K, height, density):
    g = torch.Generator().manual_seed(1)
    drawn = torch.rand(-(-O // height), K, generator=g) < density
    if drawn.numel() > 1:
        drawn.view(-1)[:2] = torch.tensor([True, False])  # neither all nor none
    return drawn.repeat_interleave(height, 0)[:O].contiguous()


def case(N, O, K, height, density):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g).requires_grad_() for s in [(N, K), (O, K), (O,)])
    mask = block_mask(O, K, height, density)
    with torch.no_grad():
        w[~mask] = float("nan")  # what stands at pruned entries is ignored
    return x, w, b, mask, torch.randn(N, O, generator=g)


def results(x, w, b, pack, dy, activation=None):
    y = ops.masked_linear(x, w, b, pack, activation)
    return (y, *torch.autograd.grad(y, (x, w, b), dy))


def check(N, O, K, height, density, activation):
    x, w, b, mask, dy = case(N, O, K, height, density)
    pack = Pack(mask, path="sparse")
    assert _masked_kernels.HEIGHTS[pack.parts(N).path[0]] == height
    w64 = torch.where(mask, w.detach(), 0).double().requires_grad_()
    x64, b64 = (t.detach().double().requires_grad_() for t in (x, b))
    y64 = reference.masked_matmul(x64, w64, mask) + b64
    y64 = y64.relu() if activation else y64
    got = results(x, w, b, pack, dy, activation)
    want = (y64, *torch.autograd.grad(y64, (x64, w64, b64), dy.double()))
    for a, c, terms in zip(got, want, (K, O, N, N), strict=True):
        # rounding of the result, as in tests/test_masked_matmul.py, + one chain of float32 sums, which grow as the root
        # of their number and are rounded one by one: their roundings' standard deviation is eps * terms / 5
        atol = torch.finfo(torch.float32).eps * (36 * terms**0.5 + terms)
        torch.testing.assert_close(a.double(), c, rtol=0, atol=atol)
    assert not got[2][~mask].any()


# ragged in blocks, vectors, samples together, chunks of columns and blocks of rows
SHAPES = [(16, 1), (17, 5), (35, 33), (70, 700), (2 * 128 * 16 + 4, 3)]
BATCHES = [1, 3, 16, 17, 40, 64, 150]


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("height", [4, 16])
def test_equals_float64_reference(height, density, activation):
    for O, K in SHAPES:
        for N in BATCHES:
            check(N, O, K, height if density < 1 else 16, density, activation)


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_equals_float64_reference_on(isa):
    """The same on a lower instruction set: it is chosen when a process starts."""
    code = (
        "import test_masked_rows as t\n"
        f"assert t._masked_kernels.CPP.isa() == {isa!r} or {isa!r} == 'avx2'\n"
        "for height in (4, 16):\n"
        "    for density in (0.02, 0.5):\n"
        "        for (O, K), N in zip(t.SHAPES * 2, t.BATCHES + t.BATCHES[:3]):\n"
        "            t.check(N, O, K, height, density, 'relu')\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "AUTOFLIP_CPU": isa, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
