"""A masked linear layer's training step in the extension, and what it hands back to Python: the same gradients."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from forced_path import forced_layer
from steps import check_step, counted
from torch.autograd.graph import saved_tensors_hooks

from autoflip.ops import _masked_matmul

ROWS, INPUTS, OUTPUTS = 6, 40, 32


@pytest.fixture(params=["sss", "fff", "qqq", "ttt", "ssf", "sff", "fsf", "ssd", "dss"])
def layer(request, monkeypatch):
    layer = forced_layer(request.param, INPUTS, OUTPUTS, monkeypatch, {"qqq": 4, "ttt": 16}.get(request.param, 1))
    layer.path = request.param
    return layer


@pytest.fixture
def python(monkeypatch):
    """Count the passes that went to Python."""
    return counted(monkeypatch, _masked_matmul.kernels)


def check(layer, x, dy, wanted="xwb"):
    check_step(layer, F.linear, x, dy, wanted, 1e-4)


def tensors():
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(ROWS, size, generator=g, dtype=torch.float32) for size in (INPUTS, OUTPUTS))


@pytest.mark.parametrize("wanted", ["xwb", "xw", "wb", "xb", "x", "w", "b"])
def test_only_what_is_wanted_gets_a_gradient(layer, python, wanted):
    for _ in range(2):  # the second step goes the way of the first
        check(layer, *tensors(), wanted)
    assert "d" in layer.path or not python or wanted == "b"  # a bias alone is summed in Python


@pytest.mark.parametrize("turned", ["x", "dy", "weight", "bias"])
def test_tensors_that_do_not_lie_row_by_row(layer, turned):
    x, dy = tensors()
    check(layer, x, dy)
    if turned == "x":
        x = x.detach().t().contiguous().t()
    elif turned == "dy":
        dy = dy[:1].expand(ROWS, -1)
    elif turned == "weight":
        layer.weight.data = layer.weight.data.t().contiguous().t()
    else:
        layer.bias.data = torch.randn(OUTPUTS, 2)[:, 0]
    check(layer, x, dy)


def test_no_rows_and_no_bias(layer):
    check(layer, torch.randn(0, INPUTS), torch.randn(0, OUTPUTS))
    layer.bias = None
    x, dy = tensors()
    x.requires_grad_()
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ torch.where(layer.weight_mask, layer.weight, 0), rtol=0, atol=1e-4)


def test_torchs_default_dtype_does_not_matter(layer):
    torch.set_default_dtype(torch.float64)
    try:
        check(layer, *tensors())
    finally:
        torch.set_default_dtype(torch.float32)


def test_hooks_may_bring_saved_tensors_back_otherwise(layer):
    x, dy = tensors()
    with saved_tensors_hooks(lambda t: t.detach().t().contiguous(), lambda t: t.t()):
        check(layer, x, dy)


def test_a_saved_tensor_that_was_written_into_is_an_error(layer):
    x, dy = tensors()
    x = x.requires_grad_().clone()
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_second_derivatives(layer):
    x, dy = tensors()
    x.requires_grad_()
    dx, dw = torch.autograd.grad(layer(x), (x, layer.weight), dy.requires_grad_(), create_graph=True)
    got = torch.autograd.grad((dx.square().sum() + dw.square().sum()), (x, layer.weight, dy))
    x64, w64, dy64 = (t.detach().double().requires_grad_() for t in (x, layer.weight, dy))
    y64 = x64 @ torch.where(layer.weight_mask, w64, 0).T
    dx, dw = torch.autograd.grad(y64, (x64, w64), dy64, create_graph=True)
    want = torch.autograd.grad((dx.square().sum() + dw.square().sum()), (x64, w64, dy64))
    for a, b in zip(got, want, strict=True):
        # two products of 40 and 6 terms, sizes up to some 100
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)


def test_nothing_outlives_the_layer(layer):
    check(layer, *tensors())
    mask = weakref.ref(layer.weight_mask)
    layer.set_mask(None)
    gc.collect()
    assert mask() is None
