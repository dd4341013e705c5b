"""Sparse models in the hands of torch's other tools: checkpoints, tangents, swaps, stand-ins, odd masks and inputs."""

import dataclasses
import gc
import weakref

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import autoflip
from autoflip import MaskSet, codec, explore, ops, prune
from autoflip import nn as sparse
from autoflip.ops import Pack, reference, trials


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Trials on, with a folder of their own and an empty memory."""
    monkeypatch.setenv("AUTOFLIP_TRIALS", "on")
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path))
    trials.forget()
    yield
    trials.forget()


def linears(density=0.1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 96), nn.Tanh(), nn.Linear(96, 10))
    return autoflip.sparsify(model, prune.magnitude(model, density)), torch.randn(64, 200)


def plain(model, *sizes):
    """The same layers of torch's, with the same weights."""
    twin = nn.Sequential(nn.Linear(200, 96), nn.Tanh(), nn.Linear(96, 10))
    twin.load_state_dict(model.state_dict())
    return twin


def layer_and_input(kind):
    torch.manual_seed(0)
    layer, x = {
        "linear": (sparse.MaskedLinear(200, 96), torch.randn(64, 200)),
        "conv": (sparse.MaskedConv2d(16, 32, 3, padding=1), torch.randn(8, 16, 12, 12)),
        "lstm": (sparse.MaskedLSTM(40, 64), torch.randn(12, 20, 40)),
    }[kind]
    masks = {n: torch.rand(p.shape) < 0.1 for n, p in layer.named_parameters() if "weight" in n}
    layer.set_mask(masks if kind == "lstm" else masks["weight"])
    return layer, x


@pytest.mark.parametrize("kind", ["linear", "conv", "lstm"])
def test_a_first_call_under_checkpoint(kept, kind):
    layer, x = layer_and_input(kind)
    stored = []

    def keep(tensor):
        stored.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    assert len(stored) < 100, "trials ran under the hooks"
    trials.forget()
    layer, x = layer_and_input(kind)
    y = checkpoint(layer, x, use_reentrant=False)
    (y[0] if kind == "lstm" else y).sum().backward()
    assert any(bool(p.grad.any()) for p in layer.parameters())


class Half(nn.Module):
    def forward(self, w):
        return w / 2


def test_a_parametrized_recurrent_layer_keeps_its_mask():
    torch.manual_seed(0)
    model, mask = nn.Sequential(nn.LSTM(6, 8)).double(), torch.rand(32, 8) < 0.3
    autoflip.sparsify(model, {"0.weight_hh_l0": mask})
    parametrize.register_parametrization(model[0], "weight_hh_l0", Half())
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    y = model(x)[0]
    y.square().sum().backward()
    own = model[0].parametrizations.weight_hh_l0.original
    assert bool(own.grad[mask].any())
    assert not bool(own.grad[~mask].any())
    twin = nn.LSTM(6, 8).double()
    with torch.no_grad():
        twin.load_state_dict({n: getattr(model[0], n).detach() for n in dict(twin.named_parameters())})
        twin.weight_hh_l0.mul_(mask)
        torch.testing.assert_close(y, twin(x)[0])


def tangent(run):
    with fw.dual_level():
        return fw.unpack_dual(run()).tangent


@pytest.mark.parametrize("gradients", [False, True])
def test_forward_mode_through_linears(kept, gradients):
    model, x = linears()
    t, twin = torch.randn(64, 200), plain(model)
    model.requires_grad_(gradients)
    got = tangent(lambda: model(fw.make_dual(x, t)))
    torch.testing.assert_close(got, tangent(lambda: twin(fw.make_dual(x, t))))
    jacobian = torch.autograd.functional.jacobian(model, x[:2], vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(twin, x[:2]))


def test_forward_mode_through_other_layers():
    layer, x = layer_and_input("conv")
    twin = nn.Conv2d(16, 32, 3, padding=1)
    twin.load_state_dict(layer.state_dict())
    t = torch.randn_like(x)
    want = tangent(lambda: twin(fw.make_dual(x, t)))
    torch.testing.assert_close(tangent(lambda: layer(fw.make_dual(x, t))), want, rtol=1e-4, atol=1e-5)
    w, mask = torch.randn(3, 3), torch.rand(3, 3) < 0.5
    got = tangent(lambda: ops.masked_weight(fw.make_dual(w, torch.ones(3, 3)), mask))
    assert torch.equal(got, mask.float())


@pytest.mark.parametrize("how", ["double", "load", "swap"])
def test_swapped_tensors_keep_pruned_entries_at_zero(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48))
    masks = {"0.weight": torch.rand(48, 64) < 0.3, "1.weight": torch.rand(48) < 0.5}
    autoflip.sparsify(model, masks)
    model(torch.randn(4, 64)).square().sum().backward()
    model.zero_grad()
    seen = []
    model[0].weight.register_hook(lambda g: seen.append(g.shape))
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        if how == "double":
            model.double()
        elif how == "load":
            model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
        else:
            torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.randn(48, 64)))
            torch.utils.swap_tensors(model[1].weight, nn.Parameter(torch.randn(48)))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    for _ in range(2):
        model.zero_grad()
        y = model(torch.randn(4, 64, dtype=model[0].weight.dtype))
        (y * torch.linspace(-1, 1, 48)).sum().backward()
        for name, mask in masks.items():
            gradient = model.get_parameter(name).grad
            assert bool(gradient.any()), name
            assert not bool(gradient[~mask].any()), name


def test_tensors_that_stand_in_are_neither_written_nor_kept():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48)), torch.randn(4, 64)
    autoflip.sparsify(model, {"0.weight": torch.rand(48, 64) < 0.1, "1.weight": torch.rand(48) < 0.5})
    model(x)
    given = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    before = {name: t.clone() for name, t in given.items()}
    functional_call(model, given, (x,))
    assert all(torch.equal(given[name], t) for name, t in before.items())

    given = {name: (p * 2).clone() for name, p in model.named_parameters()}
    model[0]._pack.path = "sparse"
    functional_call(model, given, (x,)).sum().backward()
    held = [weakref.ref(t) for t in given.values()]
    del given
    gc.collect()
    assert not any(t() is not None for t in held)


def test_parameters_that_are_assigned_are_looked_after():
    model, x = linears(0.3)
    mask = model[0].weight_mask.clone()
    model(x)
    model[0].weight = nn.Parameter(torch.randn(96, 200))
    model(x).sum().backward()
    assert not bool(model[0].weight[~mask].any())
    assert not bool(model[0].weight.grad[~mask].any())
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True)
    model(x).sum().backward()
    assert not bool(model[0].weight[~mask].any())
    assert not bool(model[0].weight.grad[~mask].any())


@pytest.mark.parametrize("byte", [2, 255])
def test_masks_of_other_bytes(byte):
    torch.manual_seed(0)
    mask = torch.rand(48, 64) < 0.3
    raw = (mask.to(torch.uint8) * byte).view(torch.bool)
    x, w = torch.randn(20, 64), torch.randn(48, 64)
    want = reference.masked_matmul(x.double(), w.double(), mask).float()
    for path in ("sparse", "dense"):
        torch.testing.assert_close(ops.masked_linear(x, w, None, Pack(raw, path=path)), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(ops.masked_weight(w, raw), torch.where(mask, w, 0))
    layer = sparse.MaskedLinear(64, 48, bias=False)
    layer.set_mask(mask)
    layer.weight_mask = raw
    layer(x).square().sum().backward()
    assert not bool(layer.weight.grad[~mask].any())
    conv = sparse.MaskedConv2d(8, 6, 8, bias=False)
    conv.set_mask(mask.reshape(6, 8, 8, 8))
    conv.weight_mask = raw.reshape(6, 8, 8, 8)
    conv(torch.randn(2, 8, 9, 9)).sum().backward()
    assert not bool(conv.weight.grad[~mask.reshape(6, 8, 8, 8)].any())


def test_inputs_that_are_not_dense():
    layer, x = layer_and_input("linear")
    layer._pack.path = "sparse"
    x = x * (x > 0.5)
    want = layer(x)
    for given in (x.to_sparse(), x.to_sparse_csr(), x.to_mkldnn()):
        y = layer(given)
        y = y if y.layout is torch.strided else y.to_dense()
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    nested = torch.nested.nested_tensor([x[:5], x[5:14]], layout=torch.jagged)
    torch.testing.assert_close(torch.cat(layer(nested).unbind()), want[:14], rtol=1e-4, atol=1e-5)


def test_ever_new_sizes_cost_a_bounded_number_of_trials(kept):
    layer = sparse.MaskedConv2d(16, 16, 3, padding=1)
    layer.set_mask(torch.rand(16, 16, 3, 3) < 0.1)
    for side in range(8, 32):
        layer(torch.randn(4, 16, side, 8)).sum().backward()
    pack = layer._pack[2]
    assert len({key[1:3] for key in pack._parts}) == 16
    assert all(pack.parts(torch.empty(4, 16, side, 8), layer.weight) is None for side in range(24, 32))
    layer = sparse.MaskedLSTM(30, 40)
    layer.set_mask({"weight_hh_l0": torch.rand(160, 40) < 0.1})
    for steps in range(9, 33):
        layer._way(steps, 20)
    assert len([key for key in trials.known() if key.startswith("masked_lstm")]) <= 6


def test_a_trace_as_the_first_call():
    layer = sparse.MaskedEmbedding(30, 12)
    layer.set_mask(torch.rand(30, 12) < 0.5)
    x = torch.randint(30, (4, 5))
    traced = torch.jit.trace(nn.Sequential(layer), (x,))
    assert torch.equal(traced(x), layer(x))


def test_a_weight_turned_round_in_place():
    layer = sparse.MaskedLinear(32, 32, bias=False)
    mask = torch.rand(32, 32) < 0.5
    layer.set_mask(mask)
    layer._pack.path = "dense"
    x = torch.randn(4, 32)
    layer(x)
    layer.weight.data = layer.weight.data.t()
    torch.testing.assert_close(layer(x), x @ (layer.weight * mask).T)


def test_densify_says_what_is_in_its_way():
    model, _ = linears()
    parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match=r"0\.weight is parametrized.*remove_parametrizations"):
        autoflip.densify(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(autoflip.densify(model)[0]) is nn.Linear


def test_scores_are_compared_as_exactly_as_they_come():
    close = 1 + torch.arange(1000, dtype=torch.float64) * 1e-12
    assert prune.by_scores({"w": close}, 0.1)["w"].nonzero()[:, 0].tolist() == list(range(900, 1000))
    ranks = 2**30 + torch.arange(1000)
    assert prune.by_scores({"w": ranks}, 0.1)["w"].nonzero()[:, 0].tolist() == list(range(900, 1000))
    far = torch.tensor([1e-60, 1e-50, 1e-55, 2e-50], dtype=torch.float64)
    assert prune.by_scores({"w": far}, 0.5)["w"].tolist() == [False, True, False, True]


def frame():
    return codec.encode({"w": torch.randn(4, 4)})


def other_curvature():
    model, data = nn.Linear(20, 4), (torch.randn(40, 20), torch.randint(4, (40,)))
    scout = explore.scout(model, data, nn.functional.cross_entropy, curvature=True)
    explore.guide([dataclasses.replace(scout, curvature={"bias": scout.curvature["bias"]}), scout], signal="curvature")


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: prune.random(nn.Linear(4, 4), 0.5, seed=1.5), "seed is 1.5"),
        (lambda: prune.random(nn.Linear(4, 4), 0.5, seed=1 << 70), "seed is 1180"),
        (lambda: prune.by_scores({"w": torch.rand(4, device="meta")}), "without values"),
        (lambda: prune.by_scores({"w": torch.rand(4, 4).to_sparse()}), "wanted a dense tensor of real"),
        (lambda: prune.by_scores({"w": torch.rand(4, dtype=torch.complex64)}), "complex64"),
        (lambda: MaskSet({"w": (torch.rand(4, 4) > 0.5).to_sparse()}), "to_dense"),
        (lambda: MaskSet({"w": torch.zeros(4, dtype=torch.bool, device="meta")}), "meta device"),
        (lambda: codec.accumulate(frame(), {"w": torch.zeros(4, 4)}, "x"), "weight='x'"),
        (lambda: codec.accumulate(frame(), {"w": torch.zeros(4, 4)}, 1.0, cap="x"), "cap='x'"),
        (lambda: codec.encode({"w": torch._neg_view(torch.ones(4))}), "resolve_neg"),
        (other_curvature, "curvature of"),
    ],
)
def test_errors_say_what_came(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
