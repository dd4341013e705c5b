"""Kernels of the Gauss-Newton diagonal against float64, at every instruction set."""

import instruction_sets
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoflip import ops
from autoflip.ops import backend, reference

EPS = torch.finfo(torch.float32).eps
# Q, N, O, C, H, W, kernel, stride, padding, dilation, groups
CONVS = [
    (1, 1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (1, 3, 4, 2, 8, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (4, 5, 6, 3, 9, 9, (3, 2), (2, 1), (1, 0), (1, 1), 3),
    (9, 2, 7, 1, 28, 28, (5, 5), (1, 1), (2, 2), (1, 1), 1),
    (2, 3, 10, 16, 7, 7, (3, 3), (1, 1), (2, 2), (2, 2), 2),
    (13, 1, 5, 32, 6, 6, (5, 5), (1, 1), (0, 0), (1, 1), 1),
    (2, 3, 10, 32, 9, 7, (3, 3), (2, 1), (2, 1), (2, 1), 2),
]


def conv(q, n, o, c, h, w, kernel, stride, padding, dilation, groups, density=1.0):
    g = torch.Generator().manual_seed(0)
    size = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in zip((h, w), kernel, stride, padding, dilation)]
    d = torch.randn(q, n, o, *size, generator=g) * (torch.rand(q, n, o, *size, generator=g) < density)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return d, torch.randn(n, c, h, w, generator=g), kernel, options


def check_conv(shape, density):
    d, x, kernel, options = conv(*shape, density)
    got = ops.conv_squares(d, x, kernel, **options)
    want = reference.conv_squares(d.double(), x.double(), kernel, **options)
    assert got.shape == want.shape
    # float32 sums over positions, squared, then summed over samples (largest seen: 5 eps of the largest entry)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=32 * EPS * want.abs().max().item())


@pytest.mark.parametrize("density", [1.0, 0.2, 0.02, 0.0])
@pytest.mark.parametrize("shape", CONVS, ids=str)
def test_conv_squares_equals_float64_reference(shape, density):
    check_conv(shape, density)


@pytest.mark.parametrize("shape", CONVS[1:4], ids=str)
def test_conv_reference_equals_autograd(shape):
    d, x, kernel, options = conv(*shape)
    d, x = d.double(), x.double()
    weight = torch.zeros(d.shape[2], x.shape[1] // options["groups"], *kernel).double().requires_grad_()
    want = torch.zeros_like(weight)
    for q in range(d.shape[0]):
        for n in range(d.shape[1]):
            y = torch.nn.functional.conv2d(x[n : n + 1], weight, **options)
            want += torch.autograd.grad(y, weight, d[q, n : n + 1])[0].square()
    torch.testing.assert_close(reference.conv_squares(d, x, kernel, **options), want.flatten(1))


def pooled(q, n, o, c, h, w, kernel, stride, padding, dilation, groups, density):
    """Values that stand at random positions, some of them twice."""
    d, x, kernel, options = conv(q, n, o, c, h, w, kernel, stride, padding, dilation, groups)
    g = torch.Generator().manual_seed(1)
    at = torch.randint(d[0, 0, 0].numel(), (n, o, 3, 2), generator=g)
    live = torch.rand(n, o, 3, 2, generator=g) < density
    weight = torch.randn(o, c // groups, *kernel, generator=g)
    return torch.randn(q, n, o, 3, 2, generator=g) * live, x, weight, at, kernel, options


def check_pooled(shape, density):
    d, x, weight, at, kernel, options = pooled(*shape, density)
    got = ops.conv_squares(d, x, kernel, at=at, **options)
    want = reference.conv_squares(d.double(), x.double(), kernel, at=at, **options)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=32 * EPS * want.abs().max().item())
    back = ops.conv_pull_back(d, weight, tuple(x.shape[1:]), at, **options)
    want = reference.conv_pull_back(d.double(), weight.double(), tuple(x.shape[1:]), at, **options)
    assert back.shape == want.shape
    torch.testing.assert_close(back.double(), want, rtol=0, atol=32 * EPS * want.abs().max().item())


@pytest.mark.parametrize("density", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("shape", CONVS, ids=str)
def test_pooled_ops_equal_float64_reference(shape, density):
    check_pooled(shape, density)


def test_pooled_references_equal_autograd():
    d, x, weight, at, kernel, options = pooled(*CONVS[2], 0.5)
    d, x, weight = d.double(), x.double().requires_grad_(), weight.double()
    y = torch.nn.functional.conv2d(x, weight, **options)
    taken = y.flatten(2).gather(2, at.flatten(2)).view(d.shape[1:])
    for one, back in zip(d, reference.conv_pull_back(d, weight, x.shape[1:], at, **options)):
        torch.testing.assert_close(back, torch.autograd.grad(taken, x, one, retain_graph=True)[0])


@pytest.mark.parametrize("Q, N, O, P, K", [(1, 1, 1, 1, 1), (3, 4, 33, 7, 65), (7, 2, 5, 80, 20)])
def test_sequence_squares_equals_float64_reference(Q, N, O, P, K):
    g = torch.Generator().manual_seed(0)
    d, u = torch.randn(Q, N, O, P, generator=g), torch.randn(N, P, K, generator=g)
    want = reference.sequence_squares(d.double(), u.double())
    torch.testing.assert_close(ops.sequence_squares(d, u).double(), want, rtol=0, atol=32 * EPS * want.max().item())
    loop = sum((d[q, n].double() @ u[n].double()).square() for q in range(Q) for n in range(N))
    torch.testing.assert_close(want, loop)


DENSE = [(1, 1, 1), (3, 5, 16), (97, 33, 65), (200, 18, 130), (96, 4, 81)]


def check_dense(shape, density):
    N, O, K = shape
    g = torch.Generator().manual_seed(0)
    d, a = torch.randn(N, O, generator=g) * (torch.rand(N, O, generator=g) < density), torch.randn(N, K, generator=g)
    for squared in (False, True):
        given = d.square() if squared else d
        want = reference.squared_matmul(d.double(), a.double())
        got = ops.squared_matmul(given, a, squared=squared)
        # float32 sums of up to N terms of one sign (largest seen: 3 eps)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=16 * EPS * max(want.max().item(), EPS))
        # rows that share a sample, some of them neighbours; fewer inputs than rows
        samples = torch.arange(N) // 3 * 5 % max(N // 2, 1)
        want = reference.squared_matmul(d.double(), a[samples].double())
        got = ops.squared_matmul(given, a[: max(N // 2, 1)], squared=squared, samples=samples)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=16 * EPS * max(want.max().item(), EPS))


@pytest.mark.parametrize("density", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("shape", DENSE)
def test_squared_matmul_equals_float64_reference(shape, density):
    check_dense(shape, density)


# (samples, outputs, columns) below, at and beyond a tile's rows, a panel and the samples that share one
COARSE = [(1, 1, 1), (5, 33, 65), (32, 16, 64), (200, 40, 130), (600, 70, 50)]
BF16 = (1 + 2.0**-8) ** 2 - 1  # what a product is off at most, of two numbers that round to eight bits


def same_bits(call):
    results = [(torch.set_num_threads(n), call())[1] for n in (1, 2, 3)]
    assert all(torch.equal(results[0], one) for one in results)


@pytest.mark.parametrize("shape", COARSE)
def test_coarse_squared_matmul_rounds_to_bfloat16_and_no_further(shape):
    N, O, K = shape
    g = torch.Generator().manual_seed(0)
    d, a = torch.randn(N, O, generator=g).relu(), torch.randn(N, K, generator=g)
    for squared in (False, True):
        given, samples = d.square() if squared else d, torch.arange(N) // 3 * 2 % max(N // 2, 1)
        for at, inputs in ((None, a), (samples, a[: max(N // 2, 1)])):
            v = d.double().square()
            want = v.T @ (inputs if at is None else inputs[at]).double().square()
            got = ops.squared_matmul(given, inputs, squared=squared, samples=at, coarse=True)
            # all terms have one sign, so sums are off as little as a term
            assert (got.double() - want).abs().le((BF16 + 32 * EPS) * want + 1e-30).all()
    same_bits(lambda: ops.squared_matmul(d, a, coarse=True))


@pytest.mark.parametrize("factors", [1, 2, 4])
@pytest.mark.parametrize("shape", COARSE)
def test_coarse_pull_back_rounds_to_bfloat16_and_no_further(shape, factors):
    N, O, K = shape
    g = torch.Generator().manual_seed(0)
    d, weight = torch.randn(factors, N, O, generator=g), torch.randn(O, K, generator=g)
    opened, samples = torch.randn(N, K, generator=g), torch.randint(N, (N,), generator=g)
    off = (BF16 + 32 * EPS) * (d.double().abs() @ weight.double().abs())
    for gate, at in ((None, None), (opened, None), (opened, samples)):
        open_ = 1 if gate is None else (gate if at is None else gate[at]) > 0
        want = (d.double() @ weight.double()) * open_
        got = ops.dense_pull_back(d, weight, gate, samples=at, coarse=True)
        assert (got.double() - want).abs().le(off).all()
        got = ops.dense_pull_back(d, weight, gate, squared=True, samples=at, coarse=True)
        squares = want.square().sum(0)
        assert (got.double() - squares).abs().le((2 * off * want.abs() + off**2).sum(0) + 32 * EPS * squares).all()
    same_bits(lambda: ops.dense_pull_back(d, weight, opened, coarse=True))


@pytest.mark.parametrize("isa", instruction_sets.LEVELS)
def test_each_instruction_set(isa):
    names = (
        "test_conv_squares_equals_float64_reference",
        "test_pooled_ops_equal_float64_reference",
        "test_sequence_squares_equals_float64_reference",
        "test_squared_matmul_equals_float64_reference",
        "test_signs_do_not_depend_on_who_draws_them",
    )
    instruction_sets.rerun(__file__, isa, *names)


def test_threads_do_not_change_a_bit():
    d, x, kernel, options = conv(9, 5, 7, 4, 28, 28, (5, 5), (1, 1), (2, 2), (1, 1), 1)
    same_bits(lambda: ops.conv_squares(d, x, kernel, **options))
    rows, inputs = torch.randn(256, 200).relu(), torch.randn(256, 784)
    same_bits(lambda: ops.squared_matmul(rows, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("N, O, K", [(1, 1, 1), (33, 65, 70)])
def test_squared_matmul_in_triton_equals_float64_reference(N, O, K, dtype, monkeypatch):
    pytest.importorskip("triton")
    g = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    d, a = torch.randn(N, O, generator=g).to(device, dtype), torch.randn(N, K, generator=g).to(device, dtype)
    monkeypatch.setenv("AUTOFLIP_BACKEND", "triton")
    got = ops.squared_matmul(d, a)
    assert got.dtype == dtype
    want = reference.squared_matmul(d.double(), a.double())
    # one rounding of the result, and float32 sums of N terms of one sign
    tolerance = (torch.finfo(dtype).eps + 8 * EPS) * want.max().item()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [*CONVS[:3], CONVS[4]], ids=str)
def test_conv_squares_in_triton_equals_float64_reference(shape, monkeypatch):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setenv("AUTOFLIP_BACKEND", "triton")
    d, x, kernel, options = conv(*shape)
    got = ops.conv_squares(d.to(device), x.to(device), kernel, **options)
    want = reference.conv_squares(d.double(), x.double(), kernel, **options)
    torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=32 * EPS * want.abs().max().item())
    d, x, _, at, kernel, options = pooled(*shape, 0.5)
    got = ops.conv_squares(d.to(device), x.to(device), kernel, at=at.to(device), **options)
    want = reference.conv_squares(d.double(), x.double(), kernel, at=at, **options)
    torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=32 * EPS * want.abs().max().item())
    rows, u = d.flatten(3)[..., :5], x.flatten(1)[:, :1, None].expand(-1, 5, 33) * torch.arange(33) + 1
    got = ops.sequence_squares(rows.to(device), u.to(device))
    want = reference.sequence_squares(rows.double(), u.double())
    torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=32 * EPS * want.abs().max().item())


def test_signs_in_triton_are_the_same(monkeypatch):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setenv("AUTOFLIP_BACKEND", "triton")
    for seed, stream, shape in ((0, 0, (3, 1000)), (-1, 5, (65,)), (2**70 + 3, -2, (1,)), (7, 1, (0,))):
        signs = ops.rademacher(seed, stream, shape, device=device)
        assert torch.equal(signs.cpu(), reference.rademacher(seed, stream, shape))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", CONVS)
def test_cuda_kernels_equal_float64_reference(shape, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_BACKEND", "cuda")
    assert backend.serve("conv_squares", torch.device("cuda")) == "cuda"
    d, x, kernel, options = conv(*shape)
    want = reference.conv_squares(d.double(), x.double(), kernel, **options)
    tolerance = 32 * EPS * want.max().item()
    got = ops.conv_squares(d.cuda(), x.cuda(), kernel, **options)
    torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=tolerance)
    rows, u = d.flatten(3), torch.randn(d.shape[1], d[0, 0, 0].numel(), 37)
    want = reference.sequence_squares(rows.double(), u.double())
    got = ops.sequence_squares(rows.cuda(), u.cuda())
    torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=32 * EPS * want.max().item())
    left, right = torch.randn(65, 33), torch.randn(65, 70)
    for squared in (False, True):
        want = reference.squared_matmul(left.double(), right.double(), squared)
        got = ops.squared_matmul(left.cuda(), right.cuda(), squared=squared)
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=32 * EPS * want.abs().max().item())
    signs = ops.rademacher(5, -3, (3, 700), device="cuda")
    assert torch.equal(signs.cpu(), reference.rademacher(5, -3, (3, 700)))


def test_cuda_kernels_serve_only_when_asked_for(monkeypatch):
    # as if there were a GPU and everything were built
    monkeypatch.setattr(backend, "unavailable", lambda name, device: "")
    backend._serve.cache_clear()
    served = {wish: backend._serve("conv_squares", "cuda", wish) for wish in ("auto", "cuda", "triton")}
    backend._serve.cache_clear()
    assert served == {"auto": "triton", "cuda": "cuda", "triton": "triton"}


def test_signs_do_not_depend_on_who_draws_them():
    for shape in ((), (1,), (63,), (64,), (65,), (3, 1000)):
        for seed, stream in ((0, 0), (-1, 5), (2**70 + 3, -2)):
            signs = ops.rademacher(seed, stream, shape)
            assert torch.equal(signs, reference.rademacher(seed, stream, shape))
            assert (signs.abs() == 1).all()


def test_signs_are_fair_and_streams_independent():
    n = 1 << 16
    streams = torch.stack([ops.rademacher(seed, stream, (n,)) for seed in (0, 1) for stream in range(8)])
    products = (streams @ streams.T / n).fill_diagonal_(0)
    # 120 pairs and 16 means, each with standard deviation 1/sqrt(n): 4.5 of them are passed once in 1000 runs
    assert products.abs().max() < 4.5 / n**0.5
    assert streams.mean(1).abs().max() < 4.5 / n**0.5
    neighbours = (streams[:, 1:] * streams[:, :-1]).mean(1)
    assert neighbours.abs().max() < 4.5 / n**0.5


def test_registered_ops():
    d, x, kernel, o = conv(*CONVS[4])
    arguments = ([*d], x, [*kernel], [*o["stride"]], [*o["padding"]], [*o["dilation"]], o["groups"])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.autoflip.conv_squares.default, arguments, test_utils=tests)
    back, y, weight, at, _, o = pooled(*CONVS[4], 0.5)
    geometry = ([*o["stride"]], [*o["padding"]], [*o["dilation"]], o["groups"])
    torch.library.opcheck(
        torch.ops.autoflip.conv_pull_back.default, ([*back], weight, [*y.shape[1:]], at, *geometry), test_utils=tests
    )
    torch.library.opcheck(torch.ops.autoflip.squared_matmul.default, (x[0, 0], x[1, 1]), test_utils=tests)
    sequence = ([one[..., 0].contiguous() for one in d], [torch.randn(d.shape[1], d.shape[3], k) for k in (4, 1)])
    torch.library.opcheck(torch.ops.autoflip.sequence_squares.default, sequence, test_utils=tests)


def test_flops_are_those_that_ran():
    d, x, kernel, options = conv(1, 3, 12, 8, 9, 9, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    full = 2 * d.numel() * 8 * 9

    def count(d):
        with FlopCounterMode(display=False) as counter:
            ops.conv_squares(d, x, kernel, **options)
        return counter.get_total_flops()

    assert count(d) == full
    live = d * (torch.arange(81).view(9, 9) % 4 == 0)  # 21 of 81 positions
    served = backend.serve("conv_squares", x.device)
    assert count(live) == (full * 21 // 81 if served == "cpp" else full)
    with FlopCounterMode(display=False) as counter:
        ops.squared_matmul(torch.full_like(x[0, 0], 2.0), x[1, 1])
        ops.sequence_squares(d.flatten(3), x[:, 0].flatten(1)[:, :, None])
    assert counter.get_total_flops() == 2 * 9 * 9 * 9 + 2 * d.numel()
    with FlopCounterMode(display=False) as counter:
        ops.squared_matmul(torch.eye(9), x[1, 1])
    assert counter.get_total_flops() == 2 * 9 * 9 * (1 if backend.serve("squared_matmul", x.device) == "cpp" else 9)


def test_compiles_without_a_graph_break():
    d, x, kernel, options = conv(*CONVS[1])

    def squares(d, x):
        return ops.conv_squares(d, x, kernel, **options) + 1

    compiled = torch.compile(squares, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(d, x), squares(d, x))


def test_wrong_shapes_are_named():
    d, x, kernel, options = conv(*CONVS[1])
    with pytest.raises(ValueError, match="own stride, padding and dilation"):
        ops.conv_squares(d, x, kernel)
    with pytest.raises(ValueError, match="3 groups must divide"):
        ops.conv_squares(d, x, kernel, padding=(1, 1), groups=3)
    with pytest.raises(ValueError, match="one floating dtype"):
        ops.conv_squares(d.double(), x, kernel, **options)
    values, _, weight, at, _, _ = pooled(*CONVS[1], 1.0)
    with pytest.raises(ValueError, match="holds positions 0 to 99; the output has 56"):
        ops.conv_squares(values, x, kernel, at=at * 0 + torch.tensor([0, 99]), **options)
    with pytest.raises(ValueError, match="wanted torch.int64"):
        ops.conv_pull_back(values, weight, x.shape[1:], at.int(), **options)
    with pytest.raises(ValueError, match="outputs and channels must agree"):
        ops.conv_pull_back(values, weight[1:], x.shape[1:], at, **options)
    with pytest.raises(ValueError, match="wanted one or more"):
        ops.conv_squares([], x, kernel, **options)
    with pytest.raises(ValueError, match="wanted 2 and 2 dimensions"):
        ops.squared_matmul(d, x)
    with pytest.raises(ValueError, match="use sequence_squares"):
        ops.squared_matmul(torch.ones(2, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"wanted torch.int64 \(2,\)"):
        ops.squared_matmul(torch.ones(2, 3), torch.ones(4, 3), samples=torch.arange(3))
    with pytest.raises(ValueError, match="rows -1 to 0 of a, which has 4"):
        ops.squared_matmul(torch.ones(2, 3), torch.ones(4, 3), samples=torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="transpose it"):
        ops.sequence_squares(torch.ones(1, 2, 3, 4), torch.ones(2, 5, 4))
