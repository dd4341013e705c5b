"""Sparse steps of a linear layer that go the way of the step before: only while nothing has changed since."""

import pytest
import torch
import torch.nn.functional as F
from forced_path import forced_layer
from steps import check_modes
from torch import nn

from autoflip.ops import _masked_weight

ROWS = 5


@pytest.fixture(params=["sss", "fff"])
def layer(request, monkeypatch):
    """A layer that has taken the sparse path once."""
    layer = forced_layer(request.param, 12, 7, monkeypatch)
    layer(torch.randn(ROWS, 12)).sum().backward()
    assert "_again" in layer.__dict__
    layer.zero_grad()
    return layer


def check(layer, x):
    y = layer(x)
    weight = torch.where(layer.weight_mask, layer.weight, 0)
    torch.testing.assert_close(y, F.linear(x, weight, layer.bias), rtol=1e-5, atol=1e-5)  # float32, 12 terms of size 1
    return y


def again(layer, x):
    known = layer.__dict__["_again"]
    return _masked_weight.again(known, x, layer.weight, layer.bias, layer.weight_mask)


def test_the_next_step_goes_straight_and_gives_the_same(layer):
    x = torch.randn(ROWS, 12, requires_grad=True)
    assert again(layer, x)
    check(layer, x).square().sum().backward()
    assert x.grad is not None
    assert not layer.weight.grad[~layer.weight_mask].any()
    assert layer.weight.grad[layer.weight_mask].all()
    with torch.no_grad():
        assert not check(layer, x).requires_grad
    with torch.inference_mode():
        check(layer, x)


@pytest.mark.parametrize("shape", [(3, 12), (0, 12), (2, 3, 12), (12,)])
def test_another_shape(layer, shape):
    x = torch.randn(shape)
    assert not again(layer, x)
    check(layer, x)


def test_memory_behind_the_same_parameters_is_exchanged(layer):
    x = torch.randn(ROWS, 12)
    layer.weight.data = torch.randn(7, 12)
    layer.bias.data = torch.randn(7)
    assert again(layer, x)
    check(layer, x)
    layer.weight.data = torch.randn(12, 7).t()  # not contiguous
    check(layer, x)
    layer.bias.data = torch.randn(3)
    assert not again(layer, x)
    with pytest.raises(ValueError, match="bias"):
        layer(x)
    layer.bias.data = torch.randn(7)
    for shape in ((3, 4), (12, 7)):  # fewer entries; as many, the other way round
        layer.weight.data = torch.randn(shape)
        assert not again(layer, x)
        with pytest.raises(ValueError, match="weight"):
            layer(x)


def test_another_mask(layer):
    x = torch.randn(ROWS, 12)
    layer.weight_mask.logical_not_()  # written into the buffer
    assert not again(layer, x)
    check(layer, x)
    layer.set_mask(~layer.weight_mask)
    assert "_again" not in layer.__dict__
    check(layer, x)


def test_other_tensors(layer):
    x = torch.randn(ROWS, 12)
    other = {"weight": torch.randn(7, 12), "bias": torch.randn(7)}
    want = F.linear(x, torch.where(layer.weight_mask, other["weight"], 0), other["bias"])
    torch.testing.assert_close(torch.func.functional_call(layer, other, (x,)), want, rtol=1e-5, atol=1e-5)
    layer.bias = None
    assert not again(layer, x)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, torch.where(layer.weight_mask, layer.weight, 0)), rtol=1e-5, atol=1e-5)


def test_what_of_torch_is_at_work(layer):
    x = torch.randn(ROWS, 12)
    check_modes(layer, again, x)
    layer.double()
    check(layer, x.double())


def test_threads(layer):
    x = torch.randn(ROWS, 12)
    before, known = torch.get_num_threads(), layer.__dict__["_again"]
    try:
        torch.set_num_threads(before + 1)
        check(layer, x)
        assert layer.__dict__["_again"] is not known
    finally:
        torch.set_num_threads(before)


def test_a_module_around_it_trains(layer):
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(7, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    x = torch.randn(ROWS, 12)
    for _ in range(3):
        optimizer.zero_grad()
        check(layer, x)
        model(x).sum().backward()
        optimizer.step()
    assert not layer.weight.grad[~layer.weight_mask].any()
    assert not layer.weight[~layer.weight_mask].any()
