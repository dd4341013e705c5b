"""The R-operator over the tape: products, their sums by parameter, and when it leaves the work to double backward."""

import pytest
import torch
import torch.nn.functional as F
from curvature_nets import LOSSES, cnn, conv1d, make, mlp, pooled, residual, sequence, true_hessian
from torch import nn

from autoflip import curvature
from autoflip.curvature.problem import Problem
from autoflip.curvature.products import Products


class Gated(nn.Module):
    """Smooth activations, a product of two branches, a shared weight, constants, in-place operations, broadcasting."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3, bias=False)
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, x):
        h = F.silu(self.one(x), inplace=True)
        h = self.two(h) * torch.sigmoid(self.two(h / 2)) - self.scale
        return self.head(F.gelu(h + 1, approximate="tanh").mul_(self.scale))


def smooth():
    conv = nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(4, 3, 2), nn.Tanh()
    return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)), (2, 5, 5)


def tied(samples=6):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.norm = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            h = self.norm(F.softplus(self.mix(self.embed(x))).sum(1))
            return torch.mm(h, self.mix.weight)

    torch.manual_seed(0)
    model = Tied().double().eval()
    x = torch.tensor([[0, 1, 2], [3, 3, 0], [4, 2, 1], [1, 1, 1], [2, 0, 4], [3, 4, 0]])
    return model, (x, torch.randint(3, (samples,)))


def probes(model, count=3):
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(count, *p.shape, generator=g, dtype=p.dtype) for n, p in model.named_parameters()}


def products_of(model, loss, batch, chunk=None):
    return Products(Problem.of(model, loss, batch), [n for n, _ in model.named_parameters()], chunk)


BUILDS = [mlp, cnn, pooled, residual, sequence, conv1d, smooth, lambda: (Gated(), (4,))]


@pytest.mark.parametrize("loss", ["cross_entropy", "weighted", "mse", "bce", "other"])
@pytest.mark.parametrize("build", BUILDS)
def test_products_and_dots_equal_the_full_hessian(build, loss):
    model, batch = make(build)
    h, v = true_hessian(model, LOSSES[loss], batch), probes(model)
    want = torch.cat([t.flatten(1) for t in v.values()], 1) @ h
    for chunk in (None, 1, 2):
        products = products_of(model, LOSSES[loss], batch, chunk)
        assert products.shared is not None
        got = products(v)
        # float64 rounding of two ways through the network
        tolerance = {"rtol": 0, "atol": 1e-12 * want.abs().max().item()}
        torch.testing.assert_close(torch.cat([t.flatten(1) for t in got.values()], 1), want, **tolerance)
        dots = products.dots(v)
        for name, one in got.items():
            part = (one * v[name]).flatten(1).sum(1)
            torch.testing.assert_close(dots[name], part, rtol=0, atol=1e-11 * want.abs().max().item())


def test_embeddings_and_frozen_parameters():
    model, batch = tied()
    model.norm.weight.requires_grad_(False)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    v = {n: t for n, t in probes(model).items() if n in names}
    products = Products(Problem.of(model, F.cross_entropy, batch), names)
    assert products.shared is not None
    got, dots = products(v), products.dots(v)
    loss = F.cross_entropy(model(batch[0]), batch[1])
    params = [model.get_parameter(n) for n in names]
    gradients = torch.autograd.grad(loss, params, create_graph=True)
    for i in range(3):
        want = torch.autograd.grad(gradients, params, [v[n][i] for n in names], retain_graph=True)
        for name, one in zip(names, want):
            torch.testing.assert_close(got[name][i], one, rtol=1e-10, atol=1e-13)
            torch.testing.assert_close(dots[name][i], (one * v[name][i]).sum(), rtol=1e-10, atol=1e-13)


class Ladder(torch.autograd.Function):
    """A gradient that is not the function's."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return 2 * d


def stopped(h):
    return h + h.detach() ** 2


def raw(h):
    return h + h.data**2


def quiet(h):
    with torch.no_grad():
        size = h.tanh()
    return h * size


def through_a_view(h):
    h = h * 2
    h.view(-1).mul_(h.detach().view(-1).sign())
    return h


def unknown(h):
    return h.logsumexp(1, keepdim=True) + h


@pytest.mark.parametrize("step", [Ladder.apply, stopped, raw, quiet, through_a_view, unknown], ids=lambda s: s.__name__)
def test_what_the_tape_cannot_know_is_left_to_double_backward(step):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.two(step(self.one(x).tanh()))

    model, batch = make(lambda: (Net(), (4,)))
    v = probes(model, 1)
    products = products_of(model, F.cross_entropy, batch)
    assert products.shared is None
    params = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), params, create_graph=True)
    want = torch.autograd.grad(gradients, params, [t[0] for t in v.values()])
    for got, one in zip(products(v).values(), want):
        torch.testing.assert_close(got[0], one)
    assert set(products.dots(v)) == set(v)


def test_weight_penalties_and_constant_losses_go_by_double_backward():
    model, batch = make(mlp)
    penalised = lambda out, y: F.cross_entropy(out, y) + model[0].weight.pow(4).sum()
    v = probes(model)
    assert products_of(model, penalised, batch).shared is None
    h = true_hessian(model, F.cross_entropy, batch)
    extra = 12 * model[0].weight.detach() ** 2 * v["0.weight"]
    got = curvature.hvp(model, penalised, batch, v)["0.weight"] - extra
    stacked = torch.cat([t.flatten(1) for t in v.values()], 1) @ h
    torch.testing.assert_close(got.flatten(1), stacked[:, :20], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("per", ["parameter", "channel"])
def test_chunks_change_nothing_but_rounding(per):
    model, batch = make(smooth)
    runs = [
        curvature.hessian_trace(model, F.cross_entropy, batch, 7, 3, per, "hutchinson", chunk=c) for c in (None, 1, 3)
    ]
    for run in runs[1:]:
        assert run.repeats == 7
        assert run.by_parameter == pytest.approx(runs[0].by_parameter, rel=1e-9, abs=1e-12)
        assert run.stderr == pytest.approx(runs[0].stderr, rel=1e-9)


def test_a_trace_is_the_diagonal_summed():
    model, batch = make(residual)
    trace = curvature.hessian_trace(model, F.cross_entropy, batch, 5, 1, method="hutchinson")
    diagonal = curvature.hessian_diagonal(model, F.cross_entropy, batch, 5, 1, method="hutchinson")
    sums = {name: d.sum().item() for name, d in diagonal.items()}
    assert trace.by_parameter == pytest.approx(sums, rel=1e-9, abs=1e-12)


class _Overwritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        read = x.clone()
        y = self.first(read)
        read.mul_(2)
        return self.second(y)


def test_an_input_that_is_overwritten_is_an_error():
    batch = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(RuntimeError, match="inplace operation"):
        curvature.hessian_trace(_Overwritten(), F.cross_entropy, batch, 2, method="hutchinson")
