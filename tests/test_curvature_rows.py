"""What looking at some rows of a batch rests on: softmax's factor, dealt rows, gradients handed on by hand."""

import pytest
import torch
import torch.nn.functional as F
from curvature_nets import flat
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoflip import curvature, ops
from autoflip.curvature.gauss_newton import GaussNewton
from autoflip.curvature.problem import Problem
from autoflip.ops import backend, reference, reference_softmax

EPS = torch.finfo(torch.float32).eps
PULLS = [(1, 3, 5, 7), (3, 4, 33, 65), (5, 7, 20, 16), (9, 6, 10, 130), (13, 2, 1, 1)]


def pull(Q, N, O, K):
    """Factors of a sample share their zeros; one sample has none alive."""
    g = torch.Generator().manual_seed(0)
    d = torch.randn(Q, N, O, generator=g) * (torch.rand(N, O, generator=g) < 0.6)
    d[:, 0] = 0
    d[0, -1, :1] = 0  # of one factor only
    return d, torch.randn(O, K, generator=g), torch.randn(N, K, generator=g).relu()


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", PULLS)
def test_dense_pull_back_equals_float64_reference(shape, gated, squared):
    d, weight, gate = pull(*shape)
    gate = gate if gated else None
    got = ops.dense_pull_back(d, weight, gate, squared=squared)
    want = (d.double() @ weight.double()) * (1 if gate is None else gate > 0)
    want = want.square().sum(0) if squared else want
    # float32 sums of up to 33 terms, of up to 13 squares (largest seen: 2 eps)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=16 * EPS * max(want.abs().max().item(), EPS))
    there = reference.dense_pull_back(d.double(), weight.double(), None if gate is None else gate.double(), squared)
    torch.testing.assert_close(there, want)
    if gate is not None:  # rows of d that share a gate, in any order
        samples = torch.arange(len(gate)).flip(0) // 2
        again = ops.dense_pull_back(d, weight, gate[: len(gate) // 2 + 1], squared=squared, samples=samples)
        assert torch.equal(again, ops.dense_pull_back(d, weight, gate[samples], squared=squared))


def test_factor_squares():
    d = pull(9, 6, 10, 130)[0]
    torch.testing.assert_close(ops.factor_squares(d), reference.factor_squares(d), rtol=9 * EPS, atol=0)
    large = torch.arange(2 * 2500.0).view(2, 2500)  # more than one part of the kernel's
    assert torch.equal(ops.factor_squares(large), large[0] * large[0] + large[1] * large[1])
    with pytest.raises(ValueError, match="one shape and dtype"):
        ops.factor_squares([d[0], d[1, :2]])


def test_dense_pull_back_does_not_depend_on_threads():
    d, weight, gate = pull(5, 64, 70, 300)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.dense_pull_back(d, weight, gate))
            results.append(ops.dense_pull_back(d, weight, gate, squared=True))
            results.append(ops.sequence_squares(d[..., None].expand(-1, -1, -1, 3), gate[:, None].expand(-1, 3, -1)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(results[:3], results[3:]):
        assert torch.equal(one, two)


def test_dense_pull_back_counts_and_registers():
    d, weight, gate = pull(4, 6, 8, 3)
    with FlopCounterMode(display=False) as counter:
        ops.dense_pull_back(d, weight, gate)
    live = int((d != 0).any(0).sum()) if backend.serve("dense_pull_back", d.device) == "cpp" else 6 * 8
    assert counter.get_total_flops() == 2 * 4 * live * 3
    with FlopCounterMode(display=False) as counter:  # a unit that no sample has open is not made
        closed = gate.repeat(1, 64) * (torch.arange(192) < 64)
        ops.dense_pull_back(d, weight.repeat(1, 64), closed, squared=True)
    if backend.serve("dense_pull_back", d.device) == "cpp":
        assert counter.get_total_flops() <= 2 * 4 * live * 64
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.autoflip.dense_pull_back.default, (list(d), weight, gate), test_utils=tests)
    with pytest.raises(ValueError, match="O must agree"):
        ops.dense_pull_back(d, weight[1:])
    with pytest.raises(ValueError, match="what the layer read"):
        ops.dense_pull_back(d, weight, gate[1:])
    with pytest.raises(ValueError, match="rows 1 to 6 of gate, which has 6"):
        ops.dense_pull_back(d, weight, gate, samples=torch.arange(1, 7))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_sequence_squares_takes_any_order_of_axes(order):
    g = torch.Generator().manual_seed(0)
    back = [order.index(i) for i in range(3)]
    sizes = [4, 33, 7]
    d = [torch.randn([sizes[i] for i in order], generator=g).permute(back) for _ in range(2)]
    u = torch.randn([[4, 7, 65][i] for i in order], generator=g).permute(back)
    want = sum((one[n].double() @ u[n].double()).square() for one in d for n in range(4))
    got = ops.sequence_squares(d, u)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=32 * EPS * want.max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 10, 65])
def test_softmax_factor_and_draw(classes, dtype):
    g = torch.Generator().manual_seed(0)
    f = (3 * torch.randn(7, classes, generator=g)).to(dtype)
    f[0] *= 20  # nearly sure
    scale = torch.rand(7, 1, generator=g).to(dtype)
    p = f.double().softmax(1)
    want = scale.double()[:, :, None] * (p.diag_embed() - p[:, :, None] * p[:, None, :])
    columns = [ops.softmax_draw(f, scale, one.to(f).expand(7, -1)) for one in torch.eye(classes)]
    s = torch.stack(columns, 2).double()
    eps = torch.finfo(dtype).eps
    # the factor's entries are roots: their products are as exact as they are (largest seen: 3 eps)
    torch.testing.assert_close(s @ s.mT, want, rtol=0, atol=32 * eps)
    together = ops.softmax_columns(f, scale).permute(1, 2, 0)
    torch.testing.assert_close(together.double(), s[:, :, :-1], rtol=0, atol=32 * eps)
    here, below, q, order = ops.softmax_factor(f, scale, 1)
    lower = torch.diag_embed(here) - torch.tril(q[:, :, None] * below[:, None, :], -1)
    sorted_s = s.gather(1, order[:, :, None].expand_as(s))
    torch.testing.assert_close(sorted_s, lower.double(), rtol=0, atol=32 * eps)
    weight = ops.softmax_weight(f, scale).double()
    torch.testing.assert_close(weight, want.diagonal(dim1=1, dim2=2).sum(1), rtol=64 * eps, atol=4 * eps)


def test_a_sure_row_has_a_weight():
    f = torch.tensor([[30.0, 0, 0], [0, 50.0, 0]])
    weight = ops.softmax_weight(f, torch.ones(2, 1))
    small = 4 * torch.tensor([-30.0, -50.0]).double().exp()  # 1 - sum p^2 is 2 (1 - p) to first order
    torch.testing.assert_close(weight, small, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="one class in axis 1"):
        ops.softmax_weight(f, torch.ones(2))
    with pytest.raises(ValueError, match="wanted the same"):
        ops.softmax_draw(f, torch.ones(2, 1), f[:1])
    with pytest.raises(ValueError, match="wanted \\(N, classes\\)"):
        ops.softmax_columns(f[0], torch.ones(2, 1))


@pytest.mark.parametrize("most", [1, 2, 4, 8])
@pytest.mark.parametrize("budget", [0.7, 5.0, 40.0])
def test_dealt_rows_equal_the_reference(budget, most):
    weight = torch.rand(50, generator=torch.Generator().manual_seed(0)).double() ** 6
    weight[7] = 0
    for chance in (0.0, 0.25, 0.9):
        got, want = (f(weight, budget, most, chance) for f in (ops.deal_rows, reference_softmax.deal_rows))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"wanted torch\.float64"):
        ops.deal_rows(weight.float(), budget, most, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # float64 has no kernel
@pytest.mark.parametrize("most", [1, 2, 4, 8])
@pytest.mark.parametrize("classes", [2, 10, 65])
def test_dealt_draws_equal_the_reference(classes, most, dtype):
    g = torch.Generator().manual_seed(0)
    f = (torch.randn(50, classes, generator=g) * (1 + 20 * torch.rand(50, 1, generator=g))).to(dtype)
    scale = torch.rand(50, 1, generator=g).to(dtype)
    signs = ops.rademacher(7, 0, tuple(f.shape), dtype=dtype)
    draw = lambda signs, rows: ops.softmax_draw(f[rows], scale[rows], signs)
    for budget in (3.0, 20.0, 60.0):
        how = budget, most, 0.9, 0.25
        samples, v = ops.softmax_deal(f, scale, 7, *how)
        want, rows = ops.deal_draw(ops.softmax_weight(f, scale), draw, signs, *how)
        assert torch.equal(samples, want)
        assert v.dtype == dtype
        # both are exact to rounding, of numbers whose weights at most are a row's (largest seen: 1 eps)
        torch.testing.assert_close(v, rows, rtol=0, atol=8 * torch.finfo(dtype).eps * rows.abs().max().item())
    assert ops.softmax_deal(f, scale, 7, 20.0, most, 0.01, 0.25) is None  # more than one in a hundred carries it
    assert ops.softmax_deal(f, scale, 7, 0.01, most, 0.9, 0.25) is None  # no row is dealt
    assert ops.softmax_deal(torch.zeros_like(f), scale * 0, 7, 20.0, most, 0.9, 0.25) is None  # none does
    with pytest.raises(ValueError, match="one class in axis 1"):
        ops.softmax_deal(f, scale[0], 7, 20.0, most, 0.9, 0.25)


def test_a_samples_rows_are_orthogonal_draws():
    f, scale = torch.zeros(40, 8), torch.full((40, 1), 1e-3)
    scale[3] = 1.0
    samples, v = ops.softmax_deal(f, scale, 7, 12.0, 8, 0.9, 0.25)
    rows = v[samples == 3].double()
    assert len(rows) == 8
    want = torch.eye(8).double() / 8 - 1 / 64  # eight orthogonal draws of eight columns are exact
    torch.testing.assert_close(rows.T @ rows, want, rtol=0, atol=1e-7)


def dense():
    tail = nn.Linear(9, 8, bias=False), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), *tail)


def maps():
    tail = nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5)
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.MaxPool2d(1), nn.ReLU(), *tail)


class Skip(nn.Module):
    """A product that two read: gradients add up there, so it is left to autograd."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        z = self.a(x.flatten(1)).relu()
        return self.c(self.b(z).relu() + z)


@pytest.mark.parametrize("build, whole", [(dense, True), (maps, True), (Skip, False)])
def test_gradients_handed_on_are_autograds(build, whole):
    torch.manual_seed(0)
    model = build().double()
    x, y = torch.randn(40, 3, 2, 2).double(), torch.randint(5, (40,))
    problem = Problem.of(model, F.cross_entropy, (x, y))
    assert (GaussNewton.of(problem, 0, 5).chain is not None) == whole
    want = 0
    for n in range(40):  # a column of the loss's factor at a time, by autograd alone
        out = model(x[n : n + 1])
        p = out.detach().softmax(1)[0]
        root = torch.linalg.cholesky((p.diag() - p[:, None] * p[None] + 1e-15 * torch.eye(5)) / 40)
        for c in range(5):
            grads = torch.autograd.grad(out, list(model.parameters()), root[:, c][None], retain_graph=True)
            want = want + torch.cat([g.flatten() for g in grads]).square()
    for dtype in (torch.float64, torch.float32):
        got = flat(curvature.hessian_diagonal(model.to(dtype), F.cross_entropy, (x.to(dtype), y), method="ggn-exact"))
        tolerance = 1e-9 if dtype == torch.float64 else 64 * EPS  # the first is the jitter's
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * want.max().item())


@pytest.mark.parametrize("draws, rounds", [(4, True), (256, True), (257, False)])
def test_hundreds_of_draws_do_not_round(draws, rounds, monkeypatch):
    asked, square = [], ops.squared_matmul
    monkeypatch.setattr(ops, "squared_matmul", lambda *a, coarse, **k: (asked.append(coarse), square(*a, **k))[1])
    model, batch = dense(), (torch.randn(8, 12), torch.arange(8) % 5)
    model[-1] = nn.Linear(6, 7)  # of five classes four draws are exact, and do not round
    curvature.hessian_diagonal(model, F.cross_entropy, batch, draws, method="ggn-mc")
    curvature.hessian_trace(model, F.cross_entropy, batch, draws, method="ggn-mc")
    assert asked
    assert set(asked) == {rounds}
