"""Curvature against the full float64 Hessian of models small enough to have one."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from curvature_nets import EPS, LOSSES, cnn, conv1d, flat, make, mlp, pooled, residual, sequence, true_hessian, wide
from torch import nn

import autoflip
from autoflip import curvature, ops
from autoflip.curvature.recurrent import unrolled


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("build", [mlp, cnn, pooled, residual, sequence, conv1d])
def test_exact_diagonal_equals_the_full_hessian(build, loss):
    model, batch = make(build)
    want = true_hessian(model, LOSSES[loss], batch).diag()
    got = curvature.hessian_diagonal(model, LOSSES[loss], batch)
    assert (got.method, got.matrix) == ("ggn-exact", "hessian")
    # float64 rounding of two ways through the network (largest seen: 10 eps)
    torch.testing.assert_close(flat(got), want, rtol=0, atol=64 * EPS * want.abs().max().item())
    assert {n: v.shape for n, v in got.items()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize("build", [wide, cnn, residual])
def test_draws_are_unbiased_and_their_error_is_honest(build):
    model, batch = make(build)
    exact = curvature.hessian_trace(model, F.cross_entropy, batch, per="channel")
    assert exact.method == "ggn-exact"
    assert exact.stderr == 0
    for method, probes in (("ggn-mc", 64 if build is wide else 7), ("hutchinson", 128)):
        got = curvature.hessian_trace(model, F.cross_entropy, batch, probes, seed=3, per="channel", method=method)
        assert got.matrix == "hessian"
        assert 0 < got.stderr < math.inf
        # 4 standard errors; of 7 repeats as far out as that of 6 degrees of freedom (0.01 %)
        assert abs(got.total - exact.total) < (8 if got.repeats == 7 else 4) * got.stderr
        assert math.isclose(sum(got.by_parameter.values()), got.total, rel_tol=1e-12)
        for name, rows in got.by_channel.items():
            assert rows.shape == (dict(model.named_parameters())[name].shape[0],)
            assert math.isclose(rows.sum().item(), got.by_parameter[name], rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("method, probes, repeats", [("ggn-mc", 24, 6), ("ggn-mc", 5, 5), ("hutchinson", 12, 12)])
def test_intervals_cover_what_they_say(method, probes, repeats):
    model, batch = make(wide)
    exact = curvature.hessian_trace(model, F.cross_entropy, batch).total
    runs = [curvature.hessian_trace(model, F.cross_entropy, batch, probes, seed, method=method) for seed in range(200)]
    assert {run.repeats for run in runs} == {repeats}
    covered = sum(run.interval[0] <= exact <= run.interval[1] for run in runs)
    assert 180 <= covered <= 198  # 95 % of 200, within three standard deviations of 1.5 %
    # and it is no wider than it needs to be: the spread of the totals is the error they report (known to 5 %)
    totals, errors = torch.tensor([[run.total, run.stderr] for run in runs]).T
    assert 0.7 < errors.square().mean().sqrt() / totals.std() < 1.4
    assert abs(totals.mean() - exact) < 4 * totals.std() / 200**0.5


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "other"])
@pytest.mark.parametrize("build", [cnn, residual])
def test_a_block_of_as_many_draws_as_factors_is_exact(build, loss):
    model, batch = make(build)
    exact = flat(curvature.hessian_diagonal(model, LOSSES[loss], batch))
    block = flat(curvature.hessian_diagonal(model, LOSSES[loss], batch, 4, method="ggn-mc"))
    torch.testing.assert_close(block, exact, rtol=0, atol=64 * EPS * exact.max().item())
    single = flat(curvature.hessian_diagonal(model, LOSSES[loss], batch, 1, method="ggn-mc"))
    assert (single - exact).norm() > 1e-3 * exact.norm()


def test_pooling_is_seen_through_in_float32_too(monkeypatch):
    # float32 goes to the C++ kernels, float64 above to the references
    model, (x, y) = make(pooled, samples=16)
    want = flat(curvature.hessian_diagonal(model, F.cross_entropy, (x, y)))
    handed = []
    pull_back = ops.conv_pull_back
    monkeypatch.setattr(ops, "conv_pull_back", lambda *a, **k: handed.append(k) or pull_back(*a, **k))
    got = flat(curvature.hessian_diagonal(model.float(), F.cross_entropy, (x.float(), y)))
    # two ways through the network in float32 (largest seen: 3e-7)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-6 * want.max().item())
    # the third hands to the second, past the ReLU that comes after its pooling, and that to the first
    assert len(handed) == 2


class Tokens(nn.Module):
    """Embedding, LayerNorm, a Linear on sequences, one output row of classes at each position."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(4, 3, padding_idx=0), nn.LayerNorm(3)
        self.hidden, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.gelu(self.hidden(self.norm(self.embed(x))))).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x.transpose(0, 1))[0][-1])


class TimeFirst(nn.Module):
    """As many steps as samples, so shapes alone cannot tell which axis is which; a weight used twice."""

    def __init__(self):
        super().__init__()
        self.one, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = self.one(x.transpose(0, 1)).relu()
        return self.head(self.head(x).relu().mean(0))


def tokens():
    x = torch.tensor([[1, 2, 1, 0], [3, 3, 3, 2], [0, 1, 2, 3]])
    return Tokens(), x, torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0], [1, 0, 2, 2]])


def batch_norm(training):
    def build():
        model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))
        return model.train(training), torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 2])

    return build


def group_norm():
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    return model, torch.randn(3, 2, 4), torch.tensor([0, 1, 2])


def shared():
    return TimeFirst(), torch.randn(4, 4, 3), torch.tensor([0, 1, 2, 2])


def lstm():
    return Recurrent(), torch.randn(4, 5, 3), torch.tensor([0, 1, 2, 2])


def attention():
    """Attention's weights are no layer's, so they go the general way; the norms' and dense layers' are squared."""
    encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(12, 3)), torch.randn(5, 3, 4), torch.arange(5) % 3


class Stacked(nn.Module):
    """Two layers, two directions, a state that comes in and one that goes out, no second bias."""

    def __init__(self, kind, bias):
        super().__init__()
        self.one = kind(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.two, self.head = kind(8, 4, bias=bias), nn.Linear(8, 3)

    def forward(self, x):
        y, state = self.one(x)
        state = tuple(s[:1] for s in state) if isinstance(state, tuple) else state[:1]
        y, last = self.two(y.transpose(0, 1), state)
        return self.head(torch.cat([y[0], last[0][0] if isinstance(last, tuple) else last[0]], 1))


class Twice(nn.Module):
    """A recurrent layer that runs twice: its weights go the general way."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.cell(self.cell(x)[0])[0][:, -1])


def recurrent(make_model):
    def build():
        model = make_model()
        if isinstance(model, Stacked):
            g = torch.Generator().manual_seed(0)
            masks = {f"one.{n}": torch.rand(p.shape, generator=g) < 0.7 for n, p in model.one.named_parameters()}
            autoflip.sparsify(model, autoflip.MaskSet(masks))
        return model, torch.randn(4, 5, 3), torch.tensor([0, 1, 2, 2])

    return build


RECURRENT = [
    recurrent(lambda: Stacked(nn.LSTM, True)),
    recurrent(lambda: Stacked(nn.GRU, False)),
    recurrent(lambda: Stacked(nn.LSTM, False)),
    recurrent(Twice),
]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=lambda kind: kind.__name__)
def test_unrolled_layers_compute_what_torch_does(kind):
    torch.manual_seed(0)
    layer = kind(3, 4, num_layers=2, bidirectional=True, dropout=0.5).double().eval()
    x, seen = torch.randn(5, 2, 3).double(), []
    want, want_state = layer(x)
    with unrolled(layer.modules(), 2, seen):
        got, got_state = layer(x)
        layer(x[:, :1])  # another number of samples: torch's own
    assert len(seen) == (4 if kind is nn.LSTM else 8)  # two layers, two ways, a GRU's two weights
    assert "forward" not in vars(layer)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_state, want_state)


def true_gauss_newton(model, batch):
    """Return diag(sum_n J_n^T H_n J_n) for mean cross-entropy, from a full Jacobian."""
    params = dict(model.named_parameters())

    def output(*values):
        out = torch.func.functional_call(model, dict(zip(params, values)), batch[0])
        return out.movedim(1, -1).reshape(-1, out.shape[1])

    p = output(*params.values()).detach().softmax(1)
    h = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(p)
    jacobians = torch.autograd.functional.jacobian(output, tuple(params.values()))
    return {
        name: torch.einsum("rck,rcd,rdk->k", j.flatten(2), h, j.flatten(2)).view_as(params[name])
        for name, j in zip(params, jacobians)
    }


@pytest.mark.parametrize(
    "build", [tokens, batch_norm(True), batch_norm(False), group_norm, shared, lstm, attention, *RECURRENT]
)
def test_gauss_newton_of_curved_models_is_right_and_named(build):
    torch.manual_seed(0)
    model, x, y = build()
    batch = (x.double() if x.is_floating_point() else x), y
    model.double()
    want = true_gauss_newton(model, batch)
    exact = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")
    assert exact.matrix == "ggn"
    for name, mask in model.one.masks().items() if isinstance(model, Stacked) else ():
        want[f"one.{name}"] *= mask
    scale = flat(want).max().item()
    for name, value in want.items():
        torch.testing.assert_close(
            exact[name], value, rtol=0, atol=256 * EPS * scale, msg=lambda m, n=name: f"{n}: {m}"
        )

    trace = curvature.hessian_trace(model, F.cross_entropy, batch, 256, method="ggn-mc")
    assert abs(trace.total - flat(want).sum().item()) <= 4 * trace.stderr + 256 * EPS * scale
    assert curvature.hessian_trace(model, F.cross_entropy, batch, 2).method == "hutchinson"


@pytest.mark.parametrize(
    "curve",
    [nn.GroupNorm(1, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Tanh(), nn.GELU(), nn.Softmax(1)],
    ids=lambda m: type(m).__name__,
)
def test_whatever_is_not_piecewise_linear_is_noticed(curve):
    model = nn.Sequential(nn.Linear(3, 4), curve, nn.ReLU(), nn.Linear(4, 3))
    batch = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    assert curvature.hessian_diagonal(model, F.cross_entropy, batch).matrix == "ggn"
    assert curvature.hessian_trace(model, F.cross_entropy, batch, 2).method == "hutchinson"


def test_functions_without_modules_are_noticed_too():
    class Functional(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.layer, self.act = nn.Linear(3, 3), act

        def forward(self, x):
            return self.act(self.layer(x), self.layer.weight)

    batch = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    flat_ones = (lambda h, w: h.clamp(min=0) / 2 - 1, lambda h, w: torch.where(h > 0, h, 0.1 * h).abs())
    curved_ones = (lambda h, w: h * h, lambda h, w: 1 / (2 + h * 0 + h.abs()), lambda h, w: h @ w, lambda h, w: h.exp())
    for act in (*flat_ones, *curved_ones):
        got = curvature.hessian_diagonal(Functional(act), F.cross_entropy, batch)
        assert got.matrix == ("hessian" if act in flat_ones else "ggn")


def test_sequences_are_squared_sample_by_sample():
    # with one draw, whole-batch squares would be off by order one; per-sample ones are exact here: one sample's
    # output is one number, so its sign squares away
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 1)).double()
    batch = torch.randn(4, 5, 3).double(), torch.randn(4, 1).double()
    exact = curvature.hessian_diagonal(model, F.mse_loss, batch, method="ggn-exact")
    draw = curvature.hessian_diagonal(model, F.mse_loss, batch, method="ggn-mc")
    torch.testing.assert_close(flat(draw), flat(exact), rtol=1e-12, atol=0)


@pytest.mark.parametrize("build", [mlp, residual, lambda: (Recurrent(), (5, 3))])
def test_products_equal_the_full_hessian(build):
    model, batch = make(build, samples=4)
    h = true_hessian(model, F.cross_entropy, batch)
    g = torch.Generator().manual_seed(0)
    v = {n: torch.randn(3, *p.shape, generator=g, dtype=p.dtype) for n, p in model.named_parameters()}
    got = curvature.hvp(model, F.cross_entropy, batch, v)
    stacked = torch.cat([t.flatten(1) for t in v.values()], 1)
    torch.testing.assert_close(torch.cat([t.flatten(1) for t in got.values()], 1), stacked @ h, rtol=1e-9, atol=1e-12)
    first = dict(list(v.items())[:1])
    block = curvature.hvp(model, F.cross_entropy, batch, first)
    size = next(model.parameters()).numel()
    (name,) = first
    torch.testing.assert_close(block[name].flatten(1), stacked[:, :size] @ h[:size, :size], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["ggn-exact", "ggn-mc", "hutchinson"])
def test_masked_models_curve_only_where_they_are_kept(method):
    model, batch = make(cnn)
    g = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(p.shape, generator=g) < 0.5 for n, p in model.named_parameters()}
    autoflip.sparsify(model, autoflip.MaskSet(masks))
    h = true_hessian(autoflip.densify(copy.deepcopy(model)), F.cross_entropy, batch)
    kept = flat(masks)
    trace = curvature.hessian_trace(model, F.cross_entropy, batch, 64, method=method)
    assert abs(trace.total - h.diag()[kept].sum().item()) <= 4 * trace.stderr + 1e-12
    diagonal = flat(curvature.hessian_diagonal(model, F.cross_entropy, batch, method=method))
    assert (diagonal[~kept] == 0).all()
    if method == "ggn-exact":
        assert trace.matrix == "hessian"
        torch.testing.assert_close(diagonal[kept], h.diag()[kept], rtol=1e-9, atol=1e-12)
