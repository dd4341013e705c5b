"""Sparse models whose parts change: layers that are replaced, parts that get masks of their own, masks that go."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import autoflip
from autoflip.nn import MaskedConv2d, MaskedLinear, masks_of


def random_masks(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=g) < 0.5 for name, p in model.named_parameters()}


@pytest.mark.parametrize("new", [nn.Linear(6, 5), nn.Linear(6, 3, bias=False), nn.Identity(), None])
def test_a_layer_with_a_masked_bias_may_be_replaced(new):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    masks = random_masks(model)
    autoflip.sparsify(model, masks)
    if new is None:
        del model[2]
    else:
        model[2] = copy.deepcopy(new)
    model(torch.randn(2, 4))
    assert set(masks_of(model)) == {"0.weight", "0.bias"}
    assert not model.state_dict()["0.bias"][~masks["0.bias"]].any()
    autoflip.densify(model)
    assert not masks_of(model)


def test_a_part_may_get_masks_of_its_own_or_none():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 3))
    masks, x = random_masks(model), torch.randn(20, 4)
    for free in (autoflip.densify, lambda part: autoflip.sparsify(part, {"0.weight": torch.eye(6, 4) > 0})):
        autoflip.sparsify(model, masks)
        free(model[0])
        with torch.no_grad():
            model[0][0].bias.fill_(1.0)
        model(x).sum().backward()
        assert model[0][0].bias.all()
        assert "0.0.bias" not in masks_of(model)
        assert not model.state_dict()["1.bias"][~masks["1.bias"]].any()
    assert torch.equal(masks_of(model)["0.0.weight"], torch.eye(6, 4) > 0)


@pytest.mark.parametrize("make", [lambda: MaskedLinear(256, 256), lambda: MaskedConv2d(16, 32, 3, padding=1)])
def test_a_buffer_that_is_replaced_takes_its_hook_with_it_on_the_sparse_way_too(make, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_TRIALS", "off")
    torch.manual_seed(0)
    layer = make()
    few, many = (torch.randn(n, 256) if layer.weight.dim() == 2 else torch.randn(n, 16, 6, 6) for n in (1, 64))
    layer.set_mask(torch.rand(layer.weight.shape) < 0.1)
    layer(few).sum().backward()  # dense: a hook masks the gradient
    assert "_hooked" in layer.__dict__
    new = layer.weight_mask = torch.rand(layer.weight.shape) < 0.1
    layer.weight.grad = None
    layer(many).square().sum().backward()
    assert layer.weight.grad[new].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_rows_of_a_narrow_type(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_TRIALS", "on")
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path))
    layer = MaskedLinear(65, 48).to(dtype)
    layer.set_mask(torch.rand(48, 65) < 0.02)
    assert layer(torch.randn(2, 0, 65, dtype=dtype)).shape == (2, 0, 48)
    with torch.autocast("cpu", dtype):
        assert MaskedLinear.forward(layer, torch.randn(0, 65)).shape == (0, 48)


def test_frozen_layers_by_hand():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    data = torch.randn(30, 6), torch.arange(30) % 3
    scores = autoflip.explore.guide(
        [autoflip.explore.scout(model, data, F.cross_entropy, curvature=True)], signal="curvature"
    )
    assert "0.weight" not in scores
    masks = autoflip.prune.hybrid(model, scores, 0.6, 1.0, protect=["0"])
    assert masks["0.weight"].all()
    assert masks.density == pytest.approx(0.6, abs=0.01)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        autoflip.explore.scout(model, data, F.cross_entropy)
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        autoflip.explore.absolute_gradient(model, *data, F.cross_entropy)


def test_nothing_to_cut():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    scores = {name: p.detach().abs() for name, p in model.named_parameters()}
    assert autoflip.prune.hybrid(model, scores, 1.0, 1.0, protect=["0", "1"]).density == 1
    with pytest.raises(ValueError, match="the protected layers alone keep 72 of 72 weights, and density=0.5 keeps 36"):
        autoflip.prune.hybrid(model, scores, 0.5, 1.0, protect=["0", "1"])
    for nothing in ({}, {"w": torch.zeros(0, 3)}):
        with pytest.raises(ValueError, match="there is no score to cut by"):
            autoflip.prune.by_scores(nothing, 0.5)


def test_arrays_explore_as_tensors_do():
    model = nn.Linear(6, 3)
    x, y = torch.randn(30, 6), torch.arange(30) % 3
    ways = [autoflip.explore.scout(model, data, F.cross_entropy) for data in ((x, y), (x.numpy(), y.numpy()))]
    assert torch.equal(ways[0].delta["weight"], ways[1].delta["weight"])
