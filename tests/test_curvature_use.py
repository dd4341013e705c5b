"""What curvature chooses, what it leaves behind, and what it says to wrong input."""

import math

import pytest
import torch
import torch.nn.functional as F
from curvature_nets import cnn, flat, make, mlp, true_hessian
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoflip import curvature


def test_auto_draws_for_many_classes_and_falls_back_where_gauss_newton_is_zero():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 40).double(), torch.randn(5, 3).double(), torch.arange(5)
    drawn = curvature.hessian_diagonal(model, F.cross_entropy, (x, y))
    assert (drawn.method, drawn.note) == ("ggn-mc", "the loss has 39 factors a sample, a backward pass each")
    assert curvature.hessian_trace(model, F.cross_entropy, (x, y), 1).stderr < math.inf
    model = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(1)).double()
    assert curvature.hessian_diagonal(model, F.nll_loss, (x, y % 4)).method == "hutchinson"
    with pytest.raises(curvature.NotDescribedError, match="log_softmax"):
        curvature.hessian_diagonal(model, F.nll_loss, (x, y % 4), method="ggn-mc")


@pytest.mark.parametrize("method", ["auto", "ggn-exact", "ggn-mc"])
def test_cross_entropy_of_one_class_is_flat(method):
    x = torch.randn(6, 2, 4, 4)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1))
    batch = x, torch.zeros(6, dtype=torch.long)
    found = curvature.hessian_diagonal(model, F.cross_entropy, batch, method=method)
    assert {n: v.shape for n, v in found.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert not any(v.any() for v in found.values())
    assert curvature.hessian_trace(model, F.cross_entropy, batch, method=method).total == 0


def test_auto_draws_where_maps_are_not_pooled_and_says_so():
    torch.manual_seed(0)
    batch = torch.randn(2, 1, 6, 6), torch.tensor([0, 1])
    features = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
    plain = nn.Sequential(*features, nn.AvgPool2d(6), nn.Flatten(), nn.Linear(4, 10))
    pooled = nn.Sequential(*features, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10))
    few = nn.Sequential(*features, nn.AvgPool2d(6), nn.Flatten(), nn.Linear(4, 3))
    for diagonal in (True, False):
        ask = curvature.hessian_diagonal if diagonal else curvature.hessian_trace
        drawn = ask(plain, F.cross_entropy, batch)
        assert (drawn.method, drawn.matrix) == ("ggn-mc", "hessian")
        assert "maps without pooling" in drawn.note
        for model in (pooled, few):
            exact = ask(model, F.cross_entropy, batch)
            assert (exact.method, exact.note) == ("ggn-exact", "")


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
    with pytest.raises(ValueError, match="Target 5 is out of bounds"):
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
    for wrong in (0, 2.5, "2"):
        with pytest.raises(ValueError, match="at least 1"):
            diagonal(model, F.cross_entropy, (x, y), num_probes=wrong)
    with pytest.raises(ValueError, match="per='layer'"):
        curvature.hessian_trace(model, F.cross_entropy, (x, y), per="layer")
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        curvature.hvp(model, F.cross_entropy, (x, y), {"nobody": x})
    with pytest.raises(ValueError, match="vectors is list, wanted a dict"):
        curvature.hvp(model, F.cross_entropy, (x, y), [x])
    with pytest.raises(ValueError, match="vectors is dict of list, wanted a dict"):
        curvature.hvp(model, F.cross_entropy, (x, y), {"0.weight": [1.0]})
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
            return out + h.sum(1, keepdim=True)

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


def penalty_problem():
    torch.manual_seed(0)
    net = nn.Linear(2, 1, bias=False).double()
    batch = torch.tensor([[1.0, 2.0]]).double(), torch.zeros(1, 1).double()
    return net, lambda out, y: F.mse_loss(out, y) + net.weight.pow(2).sum(), batch


def test_a_weight_penalty_is_not_lost():
    net, loss, batch = penalty_problem()
    got = curvature.hessian_diagonal(net, loss, batch, 2000)
    assert got.method == "hutchinson"
    # H = [[4, 4], [4, 10]]: a draw of the diagonal has standard deviation 4
    torch.testing.assert_close(got["weight"], torch.tensor([[4.0, 10.0]]).double(), rtol=0, atol=4 * 4 / 2000**0.5)
    trace = curvature.hessian_trace(net, loss, batch, 2000)
    assert trace.method == "hutchinson"
    assert abs(trace.total - 14) < 4 * trace.stderr
    # a penalty alone: the output does not matter at all
    alone = curvature.hessian_diagonal(net, lambda out, y: net.weight.pow(2).sum(), batch)
    assert alone["weight"].tolist() == [[2, 2]]


@pytest.mark.parametrize("method", ["ggn-exact", "ggn-mc"])
def test_a_weight_penalty_is_named_where_gauss_newton_is_asked_for(method):
    net, loss, batch = penalty_problem()
    with pytest.raises(curvature.NotDescribedError, match="depends on weight other than through"):
        curvature.hessian_diagonal(net, loss, batch, method=method)
    with pytest.raises(curvature.NotDescribedError, match="depends on weight other than through"):
        curvature.hessian_trace(net, loss, batch, method=method)


def test_a_learnable_loss_of_somebody_else_is_no_penalty():
    net, _, batch = penalty_problem()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    got = curvature.hessian_diagonal(net, lambda out, y: F.mse_loss(out, y) * scale, batch)
    assert got.method == "ggn-exact"
    torch.testing.assert_close(got["weight"], torch.tensor([[2.0, 8.0]]).double())


def test_attention_is_differentiated_twice():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(12, 3)).double()
    batch = torch.randn(5, 3, 4).double(), torch.arange(5) % 3
    with sdpa_kernel(SDPBackend.MATH):
        hessian = true_hessian(model, F.cross_entropy, batch)
    g = torch.Generator().manual_seed(3)
    vectors = {name: torch.randn(2, *p.shape, generator=g, dtype=p.dtype) for name, p in model.named_parameters()}
    got = curvature.hvp(model, F.cross_entropy, batch, vectors)
    for i in range(2):
        want = hessian @ flat({name: v[i] for name, v in vectors.items()})
        torch.testing.assert_close(flat({name: v[i] for name, v in got.items()}), want)
    trace = curvature.hessian_trace(model, F.cross_entropy, batch)
    assert abs(trace.total - float(hessian.trace())) < 4 * trace.stderr
    assert torch.backends.cuda.flash_sdp_enabled()
