"""Draws dealt to the samples that carry the curvature: unbiased, better at the price, and only where it is sound."""

import pytest
import torch
import torch.nn.functional as F
from curvature_nets import EPS, cnn, flat, make, mlp, residual
from torch import nn

from autoflip import curvature, ops
from autoflip.curvature.gauss_newton import GaussNewton
from autoflip.curvature.problem import Problem
from autoflip.ops.deal import effective

# two samples carry nearly all, one next to nothing, one nothing
HEAVY = torch.tensor([0.01, 3, 0.02, 2, 0.005, 0.3, 0.01, 0.02, 1e-9, 0.0, 0.01, 0.01] + 4 * [0.02, 0.01, 0.5, 0, 0.01])
HEAVY = HEAVY.double()
N = len(HEAVY)


class Heavy(nn.CrossEntropyLoss):
    """The same for the rows of a batch whatever they are: a sample's target says how much it weighs."""

    def forward(self, out, y):
        return (HEAVY[y] * F.cross_entropy(out, y % out.shape[1], reduction="none")).sum()


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def cell():
    return Cell(), (5, 3)


def problem_of(build):
    model, (x, _) = make(build, N)
    return model, (x, torch.arange(N))


@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("budget", [4.0, 9.0, 15.0])
def test_every_sample_counts_once_on_average(budget, most):
    steps = 20000
    total = torch.zeros(N).double()
    for i in range(0, steps, 10):
        samples, turns, scale = ops.deal_rows(HEAVY, budget, most, (i + 0.5) / steps)
        counts = torch.bincount(samples, minlength=N)
        assert counts.max() <= most
        assert len(samples) <= budget + 1
        assert counts[9] == 0
        assert len(samples.unique_consecutive()) == int((counts > 0).sum())
        assert all(turns[samples == n].tolist() == list(range(counts[n])) for n in range(N))
        total.index_add_(0, samples, scale.square())
    mean = total / (steps / 10)
    due = HEAVY * budget / HEAVY.sum()
    # the chance is walked in steps of 1/2000: a sample's count is off by one step, and each weighs 1 / due
    seen = due > 1e-3
    assert (mean - 1)[seen].abs().mul(due[seen].clamp(max=1)).max() <= 1.5 / 2000


def test_how_many_carry_the_curvature():
    assert effective(torch.ones(7).double()) == pytest.approx(7)
    assert effective(torch.tensor([1.0, 0, 0]).double()) == pytest.approx(1)
    assert effective(torch.zeros(3).double()) == 0


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("build", [mlp, cnn, residual, cell], ids=lambda build: build.__name__)
def test_dealt_draws_are_unbiased(build, draws):
    model, batch = problem_of(build)
    problem = Problem.of(model, Heavy(), batch)
    gn = GaussNewton.of(problem, 0, 5).dealt(draws)
    assert gn.rows is not None
    assert (gn.chain is not None) == (build in (mlp, cnn))  # a chain goes on with some rows, others run again
    assert len(gn.output) == (N if gn.chain is not None else len(gn.rows.samples))
    exact = flat(curvature.hessian_diagonal(model, Heavy(), batch, method="ggn-exact"))
    seeds = 300
    got = torch.stack(
        [flat(curvature.hessian_diagonal(model, Heavy(), batch, draws, s, method="ggn-mc")) for s in range(seeds)]
    )
    error = got.mean(0) - exact
    stderr = got.std(0) / seeds**0.5
    # of some dozens of entries a few lie outside two standard errors, none outside five; where a rarely dealt
    # sample is all that an entry has, its spread is not seen in 300 seeds
    clear = exact > 0.01 * exact.max()
    assert (error[clear].abs() <= 5 * stderr[clear] + 64 * EPS * exact.max()).all()
    assert (error[clear].abs() > 2 * stderr[clear] + 64 * EPS * exact.max()).double().mean() < 0.2


def test_heavy_samples_err_less_than_with_a_draw_each(monkeypatch):
    model, batch = problem_of(cnn)
    exact = flat(curvature.hessian_diagonal(model, Heavy(), batch, method="ggn-exact"))

    def error():
        each = [flat(curvature.hessian_diagonal(model, Heavy(), batch, 1, s, method="ggn-mc")) for s in range(40)]
        return torch.stack([(one - exact).norm() for one in each]).mean()

    dealt = error()
    monkeypatch.setattr(GaussNewton, "dealt", lambda self, draws: self)
    assert dealt < 0.5 * error()


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(108, 3)

    def forward(self, x):
        return self.head(self.conv(x).tanh().view(N, 108))


class Mixing(nn.Module):
    """Every sample sees the others' mean, by hand."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(108, 3)

    def forward(self, x):
        z = self.conv(x).relu().flatten(1)
        return self.head(z - z.mean(0))


def dropped():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(108, 3)), (2, 8, 8)


def normed():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3)), (2, 8, 8)


@pytest.mark.parametrize("build", [lambda: (Fixed(), (2, 8, 8)), lambda: (Mixing(), (2, 8, 8)), dropped, normed])
def test_a_model_that_looks_at_the_batch_is_asked_about_all_of_it(build):
    model, batch = problem_of(build)
    problem = Problem.of(model, Heavy(), batch)
    with problem.undisturbed(0):
        gn = GaussNewton.of(problem, 0, 5).dealt(1)
    assert gn.rows is None
    assert gn.output.shape == (N, 3)
    result = curvature.hessian_diagonal(model, Heavy(), batch, method="ggn-mc")
    assert all(v.isfinite().all() for v in result.values())


def test_samples_that_carry_alike_are_all_looked_at():
    model, (x, y) = make(cnn, N)
    weighty = torch.arange(N)
    few = Heavy(), (x[:31], weighty[:31])  # of few samples each is worth a row
    for loss, batch, draws in ((F.cross_entropy, (x, y), 1), (Heavy(), (x, weighty), 16), (*few, 1)):
        gn = GaussNewton.of(Problem.of(model, loss, batch), 0, 5)
        assert gn.dealt(draws) is gn
        assert gn.rows is None


@pytest.mark.parametrize(("draws", "share"), [(1, 0.75), (4, 1.75)])
def test_rows_grow_with_the_root_of_a_large_batch(monkeypatch, draws, share):
    budgets = {}

    def spied(f, scale, seed, budget, *rest):
        budgets[len(f)] = budget
        return softmax_deal(f, scale, seed, budget, *rest)

    softmax_deal = ops.softmax_deal
    monkeypatch.setattr(ops, "softmax_deal", spied)
    for count in (32, 128, 512):
        model, (x, _) = make(mlp, count)
        gn = GaussNewton.of(Problem.of(model, Heavy(), (x, torch.arange(count) % N)), 0, 5).dealt(draws)
        assert gn.rows is not None
    assert budgets == {32: share * 32, 128: share * 128, 512: share * 256}
