"""bfloat16, float16 and autocast on the CPU: rounded once, never more work than the dense product, zeros stay zeros."""

import pytest
import torch
import torch.nn.functional as F
from forced_path import forced_layer
from torch.utils.flop_counter import FlopCounterMode

from autoflip import nn as sparse
from autoflip import ops
from autoflip.ops import ConvPack, Pack, _masked_weight, narrow, trials

pytestmark = pytest.mark.skipif(_masked_weight.CPP is None, reason="the CPU extension is not built")
NARROW = [torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps


def tensors(shape_x, shape_w, dtype, weight_dtype=None):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape_x, generator=g).to(dtype).requires_grad_()
    w = torch.randn(shape_w, generator=g).to(weight_dtype or dtype).requires_grad_()
    b = torch.randn(shape_w[0], generator=g).to(weight_dtype or dtype).requires_grad_()
    return x, w, b, torch.rand(shape_w, generator=g) < 0.3


def close(got, want, terms):
    # the result's one rounding, relative to itself, and float32 sums of terms of size 1
    unit = torch.finfo(got.dtype).eps / 2 if got.dtype in NARROW else EPS
    torch.testing.assert_close(got.double(), want, rtol=unit * 1.01, atol=32 * EPS * terms**0.5)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_linear_is_float64_rounded_once(dtype, autocast, activation):
    x, w, b, mask = tensors((6, 7, 65), (33, 65), dtype, torch.float32 if autocast else None)
    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, w, b))
    dy = torch.randn(6, 7, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = ops.masked_linear(x, w, b, Pack(mask, path="sparse"), activation)
    want = F.linear(x64, torch.where(mask, w64, 0), b64)
    want = want.relu() if activation else want
    assert y.dtype == dtype
    close(y, want, 65)
    got = torch.autograd.grad(y, (x, w, b), dy)
    wanted = torch.autograd.grad(want, (x64, w64, b64), dy.double())
    for one, other, terms in zip(got, wanted, (33, 42, 42), strict=True):
        close(one, other, terms)
    assert not got[1][~mask].any()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_convolution_is_float64_rounded_once(dtype, autocast, last):
    x, w, b, mask = tensors((9, 5, 6, 7), (8, 5, 3, 3), dtype, torch.float32 if autocast else None)
    if last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, w, b))
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = ops.masked_conv2d(x, w, b, ConvPack(mask, (1, 1), path="sparse"))
    want = F.conv2d(x64, torch.where(mask, w64, 0), b64, padding=1)
    assert y.dtype == dtype
    close(y, want, 45)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = torch.autograd.grad(y, (x, w, b), dy)
    wanted = torch.autograd.grad(want, (x64, w64, b64), dy.double())
    for one, other, terms in zip(got, wanted, (72, 378, 378), strict=True):
        close(one, other, terms)
    assert not got[1][~mask].any()


def test_a_counter_sees_the_kept_products_only():
    x, w, b, mask = tensors((16, 40), (24, 40), torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        ops.masked_linear(x, w, b, Pack(mask, path="sparse")).float().sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 16 * int(mask.sum())


@pytest.mark.parametrize("choice", ["dense", "wide"])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float64, None], ids=str)  # None: autocast
def test_layers_keep_zeros_whatever_a_trial_finds(dtype, choice, monkeypatch):
    tried = []

    def choose(key, ways, **_):
        tried.append(key)
        for way in ways.values():
            way()
        return choice

    layer = forced_layer("sss", 40, 24, monkeypatch).to(dtype or torch.float32)
    monkeypatch.setattr(trials, "choose", choose)
    monkeypatch.setenv("AUTOFLIP_TRIALS", "on")
    mask, low = layer.weight_mask, dtype or torch.bfloat16
    with torch.no_grad():
        layer.weight[~mask] = float("nan")  # as if an optimizer had left something there
    x = torch.randn(16, 40).to(low).requires_grad_()
    seen = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            y = layer(x)
        y.float().sum().backward()
        seen.append((y, layer.weight.grad.clone()))
        assert not layer.weight.grad[~mask].any()
        with torch.no_grad():
            layer.weight[~mask] = 0  # from now on the weight itself may be multiplied by
        layer.weight.grad = None
    want = F.linear(x.double(), torch.where(mask, layer.weight, 0).double(), layer.bias.double())
    for y, _ in seen:
        assert y.dtype == low
        # under autocast the dense product rounds 40 weights and the bias as well
        rounded = 2 ** (-9 if low == torch.bfloat16 else -12)
        torch.testing.assert_close(y.double(), want, rtol=2 * rounded, atol=8 * rounded * 40**0.5)
    assert len(tried) == (0 if dtype is torch.float64 else 1)


def test_after_autocast_the_layer_goes_back_to_its_kernel(monkeypatch):
    layer = forced_layer("sss", 40, 24, monkeypatch)
    monkeypatch.setattr(narrow, "_faster", lambda *_: False)
    x = torch.randn(16, 40)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 16 * int(layer.weight_mask.sum())


def test_after_autocast_the_convolution_goes_back_to_its_kernel(monkeypatch):
    torch.manual_seed(0)
    layer = sparse.MaskedConv2d(8, 12, 3, padding=1)
    layer.set_mask(torch.rand(layer.weight.shape) < 0.5)
    mask = layer.weight_mask
    layer.__dict__["_pack"] = (mask, mask._version, ConvPack(mask, (1, 1), path="sparse"))
    monkeypatch.setattr(narrow, "_faster", lambda *_: False)
    x = torch.randn(16, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16  # as a layer before it hands it on
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 16 * 36 * int(mask.sum())


@pytest.mark.parametrize("size", [1, 5, 4099, 70_001])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32, torch.float64], ids=str)
def test_entries_of_every_size_are_looked_at_and_masked(dtype, size):
    g = torch.Generator().manual_seed(0)
    weight, mask = torch.randn(size, generator=g).to(dtype), torch.rand(size, generator=g) < 0.5
    mask[-1] = False
    weight[-1] = float("nan")
    want = torch.where(mask, weight, 0)
    assert torch.equal(_masked_weight.select(weight, mask), want)
    look = _masked_weight.looker(mask)
    assert not look(weight)
    assert _masked_weight.is_clean(weight, mask) is False
    weight[~mask] = -0.0  # zero too
    assert look(weight)
    assert _masked_weight.is_clean(weight, mask) is True
    weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize])[-1] = 1  # the lowest bit of a word
    assert not look(weight)

    leaf = want.clone().requires_grad_()
    leaf.register_hook(_masked_weight.gradient_hook(mask))
    (leaf * 3).sum().backward()
    assert torch.equal(leaf.grad, 3.0 * mask.to(dtype))


def test_a_look_at_another_type_is_another_look():
    """The same address may hold a weight of another type: .to(dtype) frees the old one."""
    mask = torch.tensor([True, False])
    look, memory = _masked_weight.looker(mask), torch.zeros(2, dtype=torch.float64)
    assert look(memory)
    words = memory.view(torch.float32)[:2]
    assert look(words)
    words[1] = 1.0
    assert not look(words)


def test_without_trials_the_dense_product_is_taken(monkeypatch):
    monkeypatch.setenv("AUTOFLIP_TRIALS", "off")
    x, w, _, mask = tensors((64, 512), (256, 512), torch.bfloat16)
    pack = Pack(mask & (torch.rand(mask.shape) < 0.1))
    assert ops.narrow_linear(x, w, None, pack) is None
    layer = sparse.MaskedLinear(512, 256).bfloat16()
    layer.set_mask(pack.mask)
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_first_call_of_a_shape_may_be_in_inference_mode(kind, dtype, autocast, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path))
    monkeypatch.setenv("AUTOFLIP_TRIALS", "on")
    monkeypatch.setattr(trials, "_chosen", {})
    torch.manual_seed(0)
    if kind == "linear":
        layer, x = sparse.MaskedLinear(300, 200), torch.randn(64, 300)
    else:
        layer, x = sparse.MaskedConv2d(16, 32, 3), torch.randn(4, 16, 12, 12)
    layer.set_mask(torch.rand(layer.weight.shape) < 0.1)
    layer, x = layer.to(dtype), x.to(dtype)
    with torch.inference_mode(), torch.autocast("cpu", enabled=autocast):
        got = layer(x)
    with torch.autocast("cpu", enabled=autocast):
        torch.testing.assert_close(layer(x).detach(), got.clone())
