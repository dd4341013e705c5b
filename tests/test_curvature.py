"""Curvature against the full float64 Hessian of models small enough to have one."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autoflip
from autoflip import curvature

EPS = torch.finfo(torch.float64).eps


class Residual(nn.Module):
    """Convolutions (one grouped), eval-mode BatchNorm, a skip connection, in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        x = F.relu(x + self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,)


def cnn():
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=2, dilation=2)
    return nn.Sequential(
        conv, nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)
    ), (2, 8, 8)


def residual():
    model = Residual()
    for norm in (model.norm1, model.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.running_mean), norm.running_var.uniform_(0.5, 2)
    return model.eval(), (2, 5, 5)


def sequence():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 3)), (3, 4)


def conv1d():
    conv = nn.Conv1d(2, 4, 3, padding="same", padding_mode="circular")
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(28, 3)), (2, 7)


LOSSES = {
    "cross_entropy": F.cross_entropy,
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).double(), label_smoothing=0.1, reduction="sum"),
    "mse": lambda out, y: F.mse_loss(out, F.one_hot(y, 3).to(out)),
    "bce": lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, 3).to(out)),
    "other": lambda out, y: (out.exp().sum(1) * (1 + y)).mean() + out.logsumexp(1).sum(),
}


def make(build, samples=6):
    torch.manual_seed(1)
    model, shape = build()
    g = torch.Generator().manual_seed(2)
    batch = torch.randn(samples, *shape, generator=g).double(), torch.randint(3, (samples,), generator=g)
    return model.double(), batch


def true_hessian(model, loss_fn, batch):
    """Return (names, the full Hessian in all parameters)."""
    params = dict(model.named_parameters())
    sizes = [p.numel() for p in params.values()]

    def loss(flat):
        parts = {n: v.view_as(p) for (n, p), v in zip(params.items(), flat.split(sizes))}
        return loss_fn(torch.func.functional_call(model, parts, batch[0]), batch[1])

    return torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in params.values()]))


def flat(entries):
    return torch.cat([v.flatten() for v in entries.values()])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("build", [mlp, cnn, residual, sequence, conv1d])
def test_exact_diagonal_equals_the_full_hessian(build, loss):
    model, batch = make(build)
    want = true_hessian(model, LOSSES[loss], batch).diag()
    got = curvature.hessian_diagonal(model, LOSSES[loss], batch)
    assert (got.method, got.matrix) == ("ggn-exact", "hessian")
    # float64 rounding of two ways through the network (largest seen: 10 eps)
    torch.testing.assert_close(flat(got), want, rtol=0, atol=64 * EPS * want.abs().max().item())
    assert {n: v.shape for n, v in got.items()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize("build", [mlp, cnn, residual])
def test_draws_are_unbiased_and_their_error_is_honest(build):
    model, batch = make(build)
    exact = curvature.hessian_trace(model, F.cross_entropy, batch, per="channel")
    assert exact.method == "ggn-exact"
    assert exact.stderr == 0
    for method, probes in (("ggn-mc", 64), ("hutchinson", 128)):
        got = curvature.hessian_trace(model, F.cross_entropy, batch, probes, seed=3, per="channel", method=method)
        assert got.matrix == "hessian"
        assert 0 < got.stderr < math.inf
        assert abs(got.total - exact.total) < 4 * got.stderr
        assert math.isclose(sum(got.by_parameter.values()), got.total, rel_tol=1e-12)
        for name, rows in got.by_channel.items():
            assert rows.shape == (dict(model.named_parameters())[name].shape[0],)
            assert math.isclose(rows.sum().item(), got.by_parameter[name], rel_tol=1e-9, abs_tol=1e-12)


def test_standard_error_covers_what_it_says():
    model, batch = make(mlp)
    exact = curvature.hessian_trace(model, F.cross_entropy, batch).total
    runs = [curvature.hessian_trace(model, F.cross_entropy, batch, 24, seed, method="ggn-mc") for seed in range(100)]
    covered = sum(abs(run.total - exact) <= 1.96 * run.stderr for run in runs)
    # 95 expected (93.8 with 23 degrees of freedom), standard deviation 2.4: 4.5 of them either way
    assert 83 <= covered <= 100
    # and it is no wider than it needs to be: the spread of the totals is the error they report
    spread = torch.tensor([run.total for run in runs]).std().item()
    reported = sum(run.stderr for run in runs) / len(runs)
    # 100 runs know a standard deviation to 7 %
    assert 0.7 < reported / spread < 1.4


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


@pytest.mark.parametrize("build", [tokens, batch_norm(True), batch_norm(False), group_norm, shared, lstm])
def test_gauss_newton_of_curved_models_is_right_and_named(build):
    torch.manual_seed(0)
    model, x, y = build()
    batch = (x.double() if x.is_floating_point() else x), y
    model.double()
    want = true_gauss_newton(model, batch)
    exact = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")
    assert exact.matrix == "ggn"
    scale = flat(want).max().item()
    for name, value in want.items():
        torch.testing.assert_close(
            exact[name], value, rtol=0, atol=256 * EPS * scale, msg=lambda m, n=name: f"{n}: {m}"
        )

    draws = 256
    mean = flat(curvature.hessian_diagonal(model, F.cross_entropy, batch, draws, method="ggn-mc"))
    trace = curvature.hessian_trace(model, F.cross_entropy, batch, draws, method="ggn-mc")
    assert math.isclose(trace.total, mean.sum().item(), rel_tol=1e-9)
    assert abs(trace.total - flat(want).sum().item()) < 4 * trace.stderr
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


def test_auto_draws_for_many_classes_and_falls_back_where_gauss_newton_is_zero():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 40).double(), torch.randn(5, 3).double(), torch.arange(5)
    assert curvature.hessian_diagonal(model, F.cross_entropy, (x, y)).method == "ggn-mc"
    assert curvature.hessian_trace(model, F.cross_entropy, (x, y), 1).stderr < math.inf
    model = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(1)).double()
    assert curvature.hessian_diagonal(model, F.nll_loss, (x, y % 4)).method == "hutchinson"
    with pytest.raises(curvature.NotDescribedError, match="log_softmax"):
        curvature.hessian_diagonal(model, F.nll_loss, (x, y % 4), method="ggn-mc")


def test_saturated_and_half_precision_outputs_are_recognised():
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[30.0, 0], [0, 30], [0, 0]]))
    batch = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([0, 1])
    for dtype in (torch.float32, torch.bfloat16):
        got = curvature.hessian_diagonal(model.to(dtype), F.cross_entropy, (batch[0].to(dtype), batch[1]))
        assert got.method == "ggn-exact"
        assert got["weight"].dtype == dtype
        assert (got["weight"] >= 0).all()


def test_one_draw_admits_that_it_knows_no_error():
    model, batch = make(mlp)
    assert curvature.hessian_trace(model, F.cross_entropy, batch, 1, method="ggn-mc").stderr == math.inf


def test_seed_decides_every_bit_and_nothing_else_does():
    model, batch = make(cnn)
    model, batch = model.float(), (batch[0].float(), batch[1])
    runs = []
    for threads, seed in ((1, 7), (2, 7), (1, 8)):
        torch.set_num_threads(threads)
        torch.manual_seed(threads)
        runs.append(flat(curvature.hessian_diagonal(model, F.cross_entropy, batch, seed=seed, method="ggn-mc")))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("method", ["ggn-mc", "ggn-exact", "hutchinson"])
def test_nothing_is_left_behind(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).train()
    batch = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    one = curvature.hessian_diagonal(model, F.cross_entropy, batch, 2, method=method)
    with torch.no_grad():
        two = curvature.hessian_diagonal(model, F.cross_entropy, batch, 2, method=method)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(flat(one), flat(two), rtol=0, atol=0)  # dropout drew the same
    assert not flat(one).requires_grad


def test_hooks_are_gone_after_a_failure():
    model, (x, y) = make(mlp)
    with pytest.raises(IndexError):
        curvature.hessian_diagonal(model, F.cross_entropy, (x, y + 5))
    with pytest.raises(RuntimeError):
        curvature.hessian_diagonal(model, F.cross_entropy, (x[:, :2], y))
    assert not any(m._forward_hooks for m in model.modules())


def test_wrong_input_is_named():
    model, (x, y) = make(mlp)
    diagonal = curvature.hessian_diagonal
    with pytest.raises(ValueError, match="reduction='none'"):
        diagonal(model, nn.CrossEntropyLoss(reduction="none"), (x, y))
    with pytest.raises(ValueError, match="no method 'hutch'; there are auto, ggn-mc"):
        diagonal(model, F.cross_entropy, (x, y), method="hutch")
    spoiled = x.clone()
    spoiled[0, 0] = math.nan
    with pytest.raises(ValueError, match="inputs holds 1 NaN"):
        diagonal(model, F.cross_entropy, (spoiled, y))
    with pytest.raises(ValueError, match="the loss is nan"):
        diagonal(model, lambda out, y: out.sum() * math.nan, (x, y))
    with pytest.raises(ValueError, match="pair of tensors"):
        diagonal(model, F.cross_entropy, x)
    with pytest.raises(ValueError, match="at least one sample"):
        diagonal(model, F.cross_entropy, (x[:0], y[:0]))
    with pytest.raises(ValueError, match="at least 1"):
        diagonal(model, F.cross_entropy, (x, y), num_probes=0)
    with pytest.raises(ValueError, match="per='layer'"):
        curvature.hessian_trace(model, F.cross_entropy, (x, y), per="layer")
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        curvature.hvp(model, F.cross_entropy, (x, y), {"nobody": x})
    with pytest.raises(ValueError, match="leading axis of probes"):
        curvature.hvp(model, F.cross_entropy, (x, y), {"0.weight": model[0].weight})
    with pytest.raises(ValueError, match="couples the samples"):
        diagonal(model, lambda out, y: out.sum(0).square().sum(), (x, y), method="ggn-mc")
    with pytest.raises(ValueError, match="not convex"):
        diagonal(model, lambda out, y: out.sin().sum(), (x, y), method="ggn-mc")
    frozen = nn.Linear(4, 3).double().requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad_"):
        diagonal(frozen, F.cross_entropy, (x, y))
    with torch.no_grad():
        model[0].weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"'0\.weight' holds 1 NaN or Inf"):
        diagonal(model, F.cross_entropy, (x, y))


def test_a_layer_input_changed_in_place_is_named():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.one(x)
            out = self.two(h.detach())
            h.detach().mul_(2)
            return out + h.sum()

    model, (x, y) = make(lambda: (Late(), (4,)))
    with pytest.raises(ValueError, match="changed in place"):
        curvature.hessian_diagonal(model, F.cross_entropy, (x, y), method="ggn-mc")


def test_frozen_parameters_are_left_out():
    model, batch = make(cnn)
    model[0].requires_grad_(False)
    got = curvature.hessian_diagonal(model, F.cross_entropy, batch)
    assert set(got) == {n for n, p in model.named_parameters() if p.requires_grad}
    full = curvature.hessian_diagonal(model.requires_grad_(True), F.cross_entropy, batch)
    for name, value in got.items():
        torch.testing.assert_close(value, full[name], rtol=1e-12, atol=0)
