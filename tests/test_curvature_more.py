"""Beside the path that is followed: branches in vain, numbers as parameters, frozen fronts, changed losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autoflip
from autoflip import MaskSet, codec, curvature, explore, meter

HESSIAN = ("hutchinson", "hutch++", "xtrace")


def frozen_front():
    front = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()).requires_grad_(False)
    return nn.Sequential(front, nn.Linear(6, 3)).train()


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x - x.mean(0))


@pytest.mark.parametrize(
    "make", [frozen_front, lambda: nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)), Centred]
)
def test_clients_are_told_apart_whatever_mixes_them_before_the_first_parameter(make):
    torch.manual_seed(0)
    model = make()
    batches = [(torch.randn(7, 4) + 3 * i, torch.randint(0, 3, (7,))) for i in range(3)]
    found = curvature.client_diagonals(model, F.cross_entropy, batches, method="ggn-exact")
    for got, batch in zip(found, batches, strict=True):
        want = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-7)  # float32 sums in another order


def test_clients_whose_losses_look_otherwise():
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    loss = lambda out, y: F.cross_entropy(out.clamp(-2, 2), y)
    batches = [(torch.randn(8, 3) * size, torch.randint(0, 3, (8,))) for size in (0.1, 20)]
    found = curvature.client_diagonals(model, loss, batches, method="ggn-exact")
    for got, batch in zip(found, batches, strict=True):
        want = curvature.hessian_diagonal(model, loss, batch, method="ggn-exact")
        torch.testing.assert_close(got["weight"], want["weight"], rtol=1e-4, atol=1e-6)


class Vain(nn.Module):
    """Runs a head whose output nobody reads."""

    def __init__(self):
        super().__init__()
        self.body, self.aside, self.head = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        self.aside(h)
        return self.head(h)


class Scaled(nn.Module):
    """Has a number for a parameter."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.layer(x) * self.scale


def explicit(model, loss, batch):
    """The Hessian over all parameters, flat."""
    names = [name for name, _ in model.named_parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def of(flat):
        parts = flat.split([p.numel() for p in model.parameters()])
        values = {n: v.view(p.shape) for n, v, p in zip(names, parts, model.parameters())}
        return loss(torch.func.functional_call(model, values, batch[0]), batch[1])

    return torch.autograd.functional.hessian(of, flat)


@pytest.mark.parametrize("method", HESSIAN)
@pytest.mark.parametrize("make", [Vain, Scaled])
def test_a_head_in_vain_and_a_number_for_a_parameter(make, method):
    torch.manual_seed(0)
    model, batch = make().double(), (torch.randn(6, 3).double(), torch.randint(0, 2, (6,)))
    h = explicit(model, F.cross_entropy, batch)
    trace = curvature.hessian_trace(
        model, F.cross_entropy, batch, method=method, num_probes=3 * len(h), per="parameter"
    )
    # four standard errors, or rounding where the sketch is exact
    assert abs(trace.total - float(h.trace())) <= 4 * trace.stderr + 1e-8
    vectors = {name: torch.randn(2, *p.shape).double() for name, p in model.named_parameters()}
    product = curvature.hvp(model, F.cross_entropy, batch, vectors)
    want = torch.cat([v.reshape(2, -1) for v in vectors.values()], 1) @ h
    torch.testing.assert_close(torch.cat([v.reshape(2, -1) for v in product.values()], 1), want, rtol=1e-9, atol=1e-12)


def test_xtrace_says_exact_only_where_it_is():
    torch.manual_seed(0)
    n = 400_000
    model = nn.Linear(n, 1, bias=False)
    x, y = torch.randn(64, n) / n**0.5 / torch.arange(1, 65)[:, None], torch.randn(64, 1)
    exact = float(2 * x.square().sum() / 64)
    found = curvature.hessian_trace(model, F.mse_loss, (x, y), method="xtrace", num_probes=16, seed=1)
    assert found.stderr > 0
    assert abs(found.total - exact) <= 5 * found.stderr

    few = nn.Sequential(nn.Embedding(5000, 1), nn.Flatten()).double()
    weights = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    loss = lambda out, target: ((out - target) ** 2 * weights).sum()
    batch = torch.arange(4)[:, None], torch.randn(4, 1).double()
    for seed in range(60):
        found = curvature.hessian_trace(few, loss, batch, method="xtrace", num_probes=6, seed=seed)
        assert found.stderr > 1e-6 or found.total == pytest.approx(20)
    found = curvature.hessian_trace(few, loss, batch, method="xtrace", num_probes=40)
    assert (found.total, found.stderr) == (pytest.approx(20), pytest.approx(0, abs=1e-6))


def test_losses_that_are_infinite_at_zero_outputs():
    torch.manual_seed(0)
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    found = curvature.hessian_diagonal(model, lambda out, y: F.nll_loss(out.log(), y), (x, y), method="ggn-exact")
    assert all(bool(torch.isfinite(value).all()) for value in found.values())
    rates = nn.Sequential(nn.Linear(4, 3), nn.Softplus())
    poisson = lambda out, target: (out - target * out.log()).mean()
    assert curvature.hessian_diagonal(rates, poisson, (x, torch.ones(5, 3)), method="ggn-exact")["0.weight"].any()


class Counting(nn.Module):
    """Puts new tensors in its buffers' place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x.detach().mean(0)
        return self.layer(x)


def test_buffers_that_a_model_replaces_are_put_back():
    model = Counting()
    calls = model.calls
    curvature.hessian_diagonal(model, F.cross_entropy, (torch.randn(5, 4), torch.zeros(5, dtype=torch.long)))
    assert model.calls is calls
    assert model.last is None
    assert float(calls) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pruned_weights_neither_move_nor_answer(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    mask = torch.rand(4, 3) < 0.5
    autoflip.sparsify(model, MaskSet({"0.weight": mask}))
    batch = torch.randn(6, 3, dtype=dtype), torch.randint(0, 2, (6,))
    moved = torch.where(mask, 0, torch.ones(1, 4, 3, dtype=dtype))
    assert not curvature.hvp(model, F.cross_entropy, batch, {"0.weight": moved})["0.weight"].any()
    answer = curvature.hvp(model, F.cross_entropy, batch, {"0.weight": torch.ones(1, 4, 3, dtype=dtype)})["0.weight"]
    assert not answer[0][~mask].any()
    assert answer[0][mask].any()


def tripled():
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, args, out: 3 * out)
    return loss


def replaced():
    loss = nn.CrossEntropyLoss()
    forward = loss.forward
    loss.forward = lambda out, y: 2 * forward(out, y)
    return loss


@pytest.mark.parametrize("make, factor", [(tripled, 3), (replaced, 2), (nn.CrossEntropyLoss, 1)])
def test_a_changed_cross_entropy_is_no_plain_one(make, factor):
    torch.manual_seed(0)
    model, batch = nn.Linear(4, 3), (torch.randn(5, 4), torch.randint(0, 3, (5,)))
    plain = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")["weight"]
    found = curvature.hessian_diagonal(model, make(), batch, method="ggn-exact")["weight"]
    torch.testing.assert_close(found, factor * plain, rtol=1e-4, atol=1e-7)


def test_draws_that_are_exact_are_not_rounded():
    torch.manual_seed(0)
    model, batch = (
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)),
        (torch.randn(64, 64), torch.arange(64) % 2),
    )
    exact = curvature.hessian_trace(model, F.cross_entropy, batch, method="ggn-exact").total
    found = curvature.hessian_trace(model, F.cross_entropy, batch, method="ggn-mc", num_probes=16)
    # float32 sums; rounding to bfloat16 would be off by 1e-3
    assert found.total == pytest.approx(exact, rel=2e-5)


def test_tensors_of_inference_mode():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.inference_mode():
        batch = torch.randn(5, 4), torch.arange(5) % 3
        inside = curvature.hessian_trace(model, F.cross_entropy, batch, method="hutchinson", num_probes=4)
    plain = tuple(t.clone() for t in batch)
    assert (
        inside.total == curvature.hessian_trace(model, F.cross_entropy, plain, method="hutchinson", num_probes=4).total
    )


def test_counters_that_overlap_leave_the_fast_path_as_it_was():
    layer = nn.Linear(2, 2)
    first, second = meter.measure(layer), meter.measure(layer)
    before = torch.backends.mha.get_fastpath_enabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_scouts_without_curvature_do_not_thin_that_of_others():
    start, move = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    sums = explore.Sums(start)
    sums.add(move, 10.0, {"w": torch.tensor([1.0, 2.0])})
    alone = sums.scores("curvature")["w"]
    sums.add(move, 30.0)
    assert torch.equal(sums.scores("curvature")["w"], alone)


def test_feedback_refuses_a_mask_of_another_shape():
    mask = MaskSet({"w": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="has shape"):
        codec.Feedback().encode({"w": torch.ones(3)}, masks=mask)
