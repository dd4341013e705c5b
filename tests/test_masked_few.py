"""The kernels that compute every product, against float64; as a path of the masked product."""

import pytest
import second_derivatives
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoflip import ops
from autoflip.ops import Pack, _masked_kernels, paths, reference

FEW = _masked_kernels.FEW
pytestmark = pytest.mark.skipif(FEW == 0, reason="no kernels for few rows on this CPU")


@pytest.fixture
def few(monkeypatch):
    """Every Pack made now takes the kernels for few rows."""
    monkeypatch.setattr(paths, "letters", lambda *_, **__: "fff")


def case(N, O, K, density):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g).requires_grad_() for s in [(N, K), (O, K), (O,)])
    return x, w, b, torch.rand(O, K, generator=g) < density, torch.randn(N, O, generator=g)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
# ragged in rows that go together, in vectors and in chunks of columns
@pytest.mark.parametrize("O, K", [(1, 1), (7, 16), (5, 33), (3, 2063)])
@pytest.mark.parametrize("N", [*range(1, FEW + 1), FEW + 1, 3 * FEW - 1, 4 * FEW])
def test_equals_float64_reference(few, N, O, K, density, activation):
    check_against_float64(N, O, K, density, activation)


# with AVX-512 more than FEW rows meet tiles of 64 x 128 and 128 x 64 weights, whole vectors of them in panels of 64 and
# less, others one by one; a weight of 2^20 entries is copied also for few
@pytest.mark.parametrize("O, K", [(64, 128), (145, 200), (50, 3), (2100, 20), (130, 8100)])
@pytest.mark.parametrize("N", [16, 22, 23, 25, 33, 64, 80, 81, 200])
def test_tiles_equal_float64_reference(few, N, O, K):
    check_against_float64(N, O, K, 0.4, "relu" if N % 2 else None)


@pytest.mark.parametrize("N", range(2, FEW + 1))
def test_few_rows_of_a_large_weight_equal_float64_reference(few, N):
    check_against_float64(N, 130, 8100, 0.4, None)


def check_against_float64(N, O, K, density, activation):
    x, w, b, mask, dy = case(N, O, K, density)
    with torch.no_grad():
        w[~mask] = float("nan")  # what stands at pruned entries is ignored
    w64 = torch.where(mask, w.detach(), 0).double().requires_grad_()
    x64, b64 = (t.detach().double().requires_grad_() for t in (x, b))
    y = ops.masked_linear(x, w, b, Pack(mask), activation)
    y64 = reference.masked_matmul(x64, w64, mask) + b64
    y64 = y64.relu() if activation else y64
    got = (y, *torch.autograd.grad(y, (x, w, b), dy))
    want = (y64, *torch.autograd.grad(y64, (x64, w64, b64), dy.double()))
    for a, c, terms in zip(got, want, (K, O, N, N), strict=True):
        # rounding of the result + float32 sums, as in tests/test_masked_matmul.py
        torch.testing.assert_close(a.double(), c, rtol=0, atol=36 * torch.finfo(torch.float32).eps * terms**0.5)
    assert not got[2][~mask].any()


@pytest.mark.parametrize("N", [3, 20, 40])
def test_result_does_not_depend_on_the_thread_count(few, N):
    x, w, b, mask, dy = case(N, 130, 2100, 0.3)  # chunks and rows for more than one thread
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = ops.masked_linear(x, w, b, Pack(mask))
        results.append((y, *torch.autograd.grad(y, (x, w, b), dy)))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, c) for a, c in zip(results[0], other, strict=True))


@pytest.mark.parametrize("path", ["ssf", "sff", "fsf", "fss"])
@pytest.mark.parametrize("N", [5, 40])
def test_a_step_by_several_kinds_of_kernels(monkeypatch, path, N):
    monkeypatch.setattr(paths, "letters", lambda *_, **__: path)
    check_against_float64(N, 70, 150, 0.4, None)
    check_against_float64(N, 70, 150, 0.4, "relu")  # by way of Python
    x, w, b, mask, dy = case(N, 70, 150, 0.4)
    pack = Pack(mask)
    with FlopCounterMode(display=False) as count:
        ops.masked_linear(x, w, b, pack).backward(dy)
    each = {"s": pack.kept, "f": mask.numel()}
    assert count.get_total_flops() == 2 * N * sum(each[letter] for letter in path)


def test_it_is_the_same_op_to_counters_checks_and_second_derivatives(few):
    x, w, b, mask, dy = case(4, 9, 20, 0.4)
    pack = Pack(mask)
    with FlopCounterMode(display=False) as count:
        ops.masked_linear(x, w, b, pack).backward(dy)
    assert count.get_total_flops() == 3 * 2 * 4 * mask.numel()  # every product is computed
    torch.library.opcheck(torch.ops.autoflip.masked_linear.default, (x, w, b, True, *pack.parts(4)))
    second_derivatives.check(x, w, b, mask, pack, atol=1e-2)  # cubes of sums: values reach 1e5
