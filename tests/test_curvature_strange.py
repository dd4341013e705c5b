"""Losses and models that look like others, and calls that are not as they should be: right numbers, or clear errors."""

import pytest
import torch
import torch.nn.functional as F
from curvature_nets import flat
from torch import nn

from autoflip import curvature


def hessian(model, loss, batch):
    """The true diagonal, a product an entry."""
    parts = []
    for name, p in model.named_parameters():
        eye = torch.eye(p.numel(), dtype=p.dtype)
        rows = curvature.hvp(model, loss, batch, {name: eye.view(-1, *p.shape)})[name]
        parts.append((rows.flatten(1) * eye).sum(1))
    return torch.cat(parts)


LOSSES = {
    "warm": lambda out, y: F.cross_entropy(4 * out, y),
    "sum squared": lambda out, y: out.sum(1).square().mean(),
    "both": lambda out, y: out.square().mean() + out.sum(1).square().mean(),
    "mean squared": lambda out, y: out.mean() ** 2,  # of all samples: they are coupled
    "variance": lambda out, y: (out - out.mean(0)).square().sum(),
}


@pytest.mark.parametrize("samples, width", [(1, 2), (2, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_not_taken_for_another_whatever_the_seed(loss, samples, width):
    torch.manual_seed(0)
    model = nn.Linear(3, width).double()
    batch = torch.randn(samples, 3).double(), torch.arange(samples) % width
    want = hessian(model, LOSSES[loss], batch)
    coupled = loss in ("mean squared", "variance") and samples > 1
    for seed in range(12):
        got = curvature.hessian_diagonal(model, LOSSES[loss], batch, seed=seed)
        if got.method == "ggn-exact":  # else draws of the true Hessian
            torch.testing.assert_close(flat(got), want, rtol=1e-9, atol=1e-12 * (1 + want.abs().max().item()))
        else:
            assert got.method == "hutchinson"
            assert coupled or not want.any()


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        share = torch.rand(8, 8, dtype=torch.float64)
        self.register_buffer("share", share / share.sum(1, keepdim=True))
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.share[: len(x), : len(x)] @ self.b(F.relu(self.share[: len(x), : len(x)] @ self.a(x)))


class Fixed(Graph):
    def forward(self, x):
        return self.share @ self.b(F.relu(self.share @ self.a(x)))


class Centred(Graph):
    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h - h.mean(0))


class Neighbour(Graph):
    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h + h.roll(1, 0))


class Turned(Graph):
    """Products along the samples, of as many as there are features."""

    def __init__(self):
        super().__init__()
        self.across = nn.Linear(8, 8)
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.across(self.a(x).relu().T).T)


class Folded(Turned):
    def forward(self, x):
        pairs = F.linear(self.a(x).relu().view(4, 16), self.across.weight.repeat(2, 2))
        return self.b(pairs.view(8, 8))


@pytest.mark.parametrize("net", [Graph, Fixed, Centred, Neighbour, Turned, Folded])
def test_samples_that_mix_are_not_squared_one_by_one(net):
    torch.manual_seed(0)
    model, batch = net().double(), (torch.randn(8, 5).double(), torch.arange(8) % 3)
    want = hessian(model, F.cross_entropy, batch)
    got = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")
    torch.testing.assert_close(flat(got), want, rtol=0, atol=1e-12)
    draws = torch.stack(
        [flat(curvature.hessian_diagonal(model, F.cross_entropy, batch, 1, s, method="ggn-mc")) for s in range(300)]
    )
    error = (draws.mean(0) - want).abs() / (draws.std(0) / 300**0.5 + 1e-12)
    assert error.max() < 5  # standard errors, of at most 147 entries


def test_a_model_that_runs_only_once_is_taken_to_look_at_each_sample_by_itself():
    class Once(Graph):
        turns = iter([None])

        def forward(self, x):
            next(self.turns)
            return self.b(self.a(x).tanh())

    batch = torch.randn(8, 5), torch.arange(8) % 3
    result = curvature.hessian_diagonal(Once(), F.cross_entropy, batch, method="ggn-mc")
    assert all(value.isfinite().all() for value in result.values())


def test_clients_whose_samples_mix_are_looked_at_one_by_one():
    torch.manual_seed(0)
    model = Centred().double()
    batches = [(torch.randn(4, 5).double(), torch.randint(0, 3, (4,))) for _ in range(3)]
    together = curvature.client_diagonals(model, F.cross_entropy, batches, method="ggn-exact")
    for one, batch in zip(together, batches, strict=True):
        torch.testing.assert_close(flat(one), hessian(model, F.cross_entropy, batch), rtol=0, atol=1e-12)


def test_clients_may_have_sequences_of_different_length():
    torch.manual_seed(0)
    mean = nn.AdaptiveAvgPool2d((1, 4)), nn.Flatten()
    model = nn.Sequential(nn.Embedding(9, 4), *mean, nn.Linear(4, 3))
    batches = [(torch.randint(9, (3, length)), torch.arange(3)) for length in (5, 7, 5)]
    together = curvature.client_diagonals(model, F.cross_entropy, batches, method="ggn-exact")
    for one, batch in zip(together, batches, strict=True):
        alone = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")
        torch.testing.assert_close(flat(one), flat(alone), rtol=0, atol=1e-6 * flat(alone).max().item())


def test_models_without_a_batch_of_another_size_and_dropout_stay_as_they_are():
    torch.manual_seed(0)
    x, y = torch.randn(6, 5), torch.arange(6) % 3
    fixed = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(4, 3))
    dropping = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))
    for model in (fixed, dropping):
        first, again = (
            flat(curvature.hessian_diagonal(model, F.cross_entropy, (x, y), method="ggn-exact", seed=3)) for _ in "ab"
        )
        assert torch.equal(first, again)


class Cell(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


@pytest.mark.parametrize("frozen", ["bias_ih_l0", "bias_hh_l0", "weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_frozen_parts_of_a_cell_leave_the_others_as_they_were(kind, frozen):
    torch.manual_seed(1)
    model, batch = Cell(kind), (torch.randn(3, 6, 4), torch.arange(3))
    want = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")
    getattr(model.cell, frozen).requires_grad_(False)
    got = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")
    assert set(want) - set(got) == {"cell." + frozen}
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-9)


class Cast(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


@pytest.mark.parametrize("method", ["auto", "ggn-mc", "ggn-exact", "hutchinson"])
def test_autocast_around_the_call_is_off_and_inside_the_model_it_rounds(method):
    torch.manual_seed(0)
    batch = torch.randn(64, 5), torch.arange(64) % 3
    dense = nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)
    conv = nn.Unflatten(1, (1, 5, 1)), nn.Conv2d(1, 3, (2, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    for net in (nn.Sequential(*dense), nn.Sequential(*conv)):
        want = curvature.hessian_diagonal(net, F.cross_entropy, batch, method=method)
        with torch.autocast("cpu", torch.bfloat16):
            around = curvature.hessian_diagonal(net, F.cross_entropy, batch, method=method)
            assert torch.is_autocast_enabled("cpu")
        assert torch.equal(flat(around), flat(want))
        inside = curvature.hessian_diagonal(Cast(net), F.cross_entropy, batch, method=method)
        assert {value.dtype for value in inside.values()} == {torch.float32}
        # eight bits of significand at every layer, and a Hessian's draw has terms that cancel
        assert (flat(inside) - flat(want)).norm() < (0.2 if method == "hutchinson" else 0.05) * flat(want).norm()


def test_what_does_not_fit_is_a_value_error():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    y = torch.tensor([0, 1, 0, 1])
    diagonal = curvature.hessian_diagonal
    with pytest.raises(ValueError, match=r"loss_fn fails on an output of shape \(4, 2\)"):
        diagonal(model, F.cross_entropy, (x, y + 1))
    with pytest.raises(ValueError, match=r"a target of shape \(4,\), torch.int32"):
        diagonal(model, F.cross_entropy, (x, y.int()))
    with pytest.raises(ValueError, match="loss_fn NoneType; wanted"):
        diagonal(model, None, (x, y))
    with pytest.raises(ValueError, match="model is function"):
        diagonal(lambda x: x, F.cross_entropy, (x, y))
    with pytest.raises(ValueError, match="seed=1.5; wanted a whole number"):
        diagonal(model, F.cross_entropy, (x, y), seed=1.5)
    with pytest.raises(ValueError, match="chunk=0"):
        curvature.hvp(model, F.cross_entropy, (x, y), {"weight": torch.ones(1, 2, 3)}, chunk=0)
    with pytest.raises(ValueError, match="all targets ignored"):
        diagonal(model, F.cross_entropy, (x, torch.full((4,), -100)))


def test_a_forward_of_ones_own_is_what_runs_and_stays():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    first = model[0]
    own = first.forward = lambda x: F.linear(x, 2 * first.weight, first.bias)
    x, y = torch.randn(6, 5), torch.arange(6) % 3
    found = curvature.hessian_diagonal(model, F.cross_entropy, (x, y), method="ggn-exact")["0.weight"]

    def loss(weight):
        return F.cross_entropy(model[2](F.relu(F.linear(x, 2 * weight, first.bias))), y)

    exact = torch.autograd.functional.hessian(loss, first.weight.detach()).reshape(40, 40).diagonal().reshape(8, 5)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)  # float32 sums over 6 samples
    assert first.forward is own
    assert "forward" not in vars(model[2])


def test_layers_are_as_they_were_when_the_model_fails():
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(7, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        curvature.hessian_diagonal(model, F.cross_entropy, (torch.randn(6, 5), torch.arange(6) % 3))
    assert not any("forward" in vars(module) for module in model)
