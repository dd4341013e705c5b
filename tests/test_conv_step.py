"""A masked convolution's training step in the extension, and what it hands back to Python: the same gradients."""

import copy
import functools
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from steps import check_modes, check_step, counted
from torch.autograd.graph import saved_tensors_hooks

from autoflip import nn
from autoflip.ops import _masked_conv, _masked_weight

BATCH, INPUTS, OUTPUTS, SIDE = 9, 5, 6, 7
LAST = torch.channels_last


@pytest.fixture(params=["sss", "ssd", "dss"])
def layer(request):
    """A layer that takes a path, whatever a trial would choose."""
    if _masked_weight.CPP is None:
        pytest.skip("the CPU extension is not built")
    torch.manual_seed(0)
    layer = nn.MaskedConv2d(INPUTS, OUTPUTS, 3, padding=1)
    layer.set_mask(torch.rand(layer.weight.shape) < 0.4)
    pack = layer._conv_pack(layer.weight_mask)
    pack.path = "sparse"
    for form in (torch.contiguous_format, LAST):
        x = torch.empty(BATCH, INPUTS, SIDE, SIDE).to(memory_format=form)
        parts = pack.parts(x, layer.weight)
        pack._parts = {key: p._replace(path=request.param) if p is parts else p for key, p in pack._parts.items()}
    layer.path = request.param
    return layer


@pytest.fixture
def python(monkeypatch):
    """Count the passes that went to Python."""
    return counted(monkeypatch, _masked_conv)


def tensors(batch=BATCH):
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(batch, c, SIDE, SIDE, generator=g, dtype=torch.float32) for c in (INPUTS, OUTPUTS))


def again(layer, x):
    known = layer.__dict__.get("_again")
    return known is not None and _masked_weight.again(known, x, layer.weight, layer.bias, layer.weight_mask)


def check(layer, x, dy, wanted="xwb"):
    # dw sums 441 products, dx 54
    check_step(layer, functools.partial(F.conv2d, padding=1), x, dy, wanted, 1e-3)


@pytest.mark.parametrize("wanted", ["xwb", "xw", "wb", "xb", "x", "w", "b"])
def test_only_what_is_wanted_gets_a_gradient(layer, python, wanted):
    for _ in range(3):  # the second step goes the way of the first
        check(layer, *tensors(), wanted)
    assert again(layer, tensors()[0]) == (layer.path == "sss")
    assert "d" in layer.path or not python


@pytest.mark.parametrize("turned", ["x", "dy", "weight", "bias", "x and weight"])
def test_tensors_that_do_not_lie_row_by_row(layer, turned):
    x, dy = tensors()
    check(layer, x, dy)
    if "x" in turned:
        x = x.detach().to(memory_format=LAST)
    if "weight" in turned:
        layer.weight.data = layer.weight.data.to(memory_format=LAST)
    if turned == "dy":
        dy = dy[:1].expand(BATCH, -1, -1, -1)
    if turned == "bias":
        layer.bias.data = torch.randn(OUTPUTS, 2)[:, 0]
    check(layer, x, dy)
    check(layer, *tensors())


def test_what_has_changed_is_noticed(layer):
    x, dy = tensors()
    check(layer, x, dy)
    check(layer, *tensors(BATCH + 1))
    check(layer, *tensors(2))  # fewer than are tried
    check(layer, x, dy)
    layer.weight_mask.logical_not_()  # written into the buffer
    assert not again(layer, x)
    check(layer, x, dy)
    layer.set_mask(~layer.weight_mask)
    assert "_again" not in layer.__dict__
    check(layer, x, dy)
    check(copy.deepcopy(layer), x, dy)
    layer.weight.data = torch.randn(layer.weight.shape)  # pruned entries too
    check(layer, x, dy)
    layer.bias = None
    want = F.conv2d(x, torch.where(layer.weight_mask, layer.weight, 0), padding=1)
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-4)


def test_what_of_torch_is_at_work(layer):
    x, dy = tensors()
    check(layer, x, dy)
    check_modes(layer, again, x)
    with torch.no_grad():
        assert not layer(x).requires_grad
    threads, known = torch.get_num_threads(), layer.__dict__.get("_again")
    try:
        torch.set_num_threads(threads + 1)
        check(layer, x, dy)
        assert known is None or layer.__dict__["_again"] is not known
    finally:
        torch.set_num_threads(threads)


def test_backward_may_run_twice_and_steps_do_not_share_panels(layer):
    x, dy = tensors()
    x.requires_grad_()
    layer(x)
    first, second = layer(x), layer(2 * x)
    once = torch.autograd.grad(first, (x, layer.weight), dy, retain_graph=True)
    other = torch.autograd.grad(second, layer.weight, dy)[0]
    twice = torch.autograd.grad(first, (x, layer.weight), dy)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    torch.testing.assert_close(other, 2 * once[1])


def test_torchs_default_dtype_does_not_matter(layer):
    torch.set_default_dtype(torch.float64)
    try:
        check(layer, *tensors())
        check(layer, *tensors())
    finally:
        torch.set_default_dtype(torch.float32)


def test_hooks_may_bring_saved_tensors_back_otherwise(layer):
    with saved_tensors_hooks(lambda t: t.detach().to(memory_format=LAST), lambda t: t):
        check(layer, *tensors())
        check(layer, *tensors())


def test_nothing_outlives_the_layer(layer):
    check(layer, *tensors())
    mask = weakref.ref(layer.weight_mask)
    layer.set_mask(None)
    gc.collect()
    assert mask() is None
