"""Masked convolution layers: which of their kinds the kernels serve, and that all of them compute what torch's do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from autoflip import nn, ops


def forbid_torch(layer, monkeypatch):
    """Let a layer that has chosen take the kernels from here on; torch's convolution must not run."""
    pack = layer._conv_pack(layer.weight_mask)
    pack.path = "sparse"
    pack._parts.clear()
    layer._unhook()  # the choice for x is remembered with it
    monkeypatch.setattr(F, "conv2d", None)


def test_layer_takes_the_sparse_path_where_it_is_forced_and_falls_back_elsewhere(monkeypatch):
    layer = nn.MaskedConv2d(4, 8, 3, padding="same", dilation=2)
    mask = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    layer.set_mask(mask)
    x = torch.randn(9, 4, 7, 7)
    want = F.conv2d(x, layer.weight, layer.bias, padding="same", dilation=2)
    torch.testing.assert_close(layer(x), want)
    forbid_torch(layer, monkeypatch)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), want)
    torch.testing.assert_close(layer(x[:1]), want[:1])
    with pytest.raises(TypeError, match="not callable"):
        layer(x.double())  # torch's
    monkeypatch.undo()
    torch.testing.assert_close(copy.deepcopy(layer)(x), want)


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 2},
        {"stride": (1, 2)},
        {"groups": 2},
        {"padding": 3},
        {"padding_mode": "reflect", "padding": 1},
        {"padding": "valid"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_of_every_kind_equal_torchs(arguments, dtype):
    g = torch.Generator().manual_seed(0)
    layer = nn.MaskedConv2d(4, 8, 3, dtype=dtype, **arguments)
    mask = torch.rand(layer.weight.shape, generator=g) < 0.3
    plain = torch.nn.Conv2d(4, 8, 3, dtype=dtype, **arguments)
    plain.load_state_dict(layer.state_dict())
    layer.set_mask(mask)
    with torch.no_grad():
        plain.weight *= mask
    x = torch.randn(9, 4, 7, 7, generator=g).to(dtype)
    got, want = layer(x), plain(x)
    torch.testing.assert_close(got, want)
    (gw,) = torch.autograd.grad(got.float().pow(2).sum(), layer.weight)
    (ww,) = torch.autograd.grad(want.float().pow(2).sum(), plain.weight)
    torch.testing.assert_close(gw, ww * mask)


def test_function_transforms_and_compile_see_the_same_function():
    layer = nn.MaskedConv2d(3, 5, 3, padding=1)
    mask = torch.rand(5, 3, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    layer.set_mask(mask)
    layer._conv_pack(layer.weight_mask).path = "sparse"
    x, w = torch.randn(8, 3, 6, 6), layer.weight.detach()

    def loss(w, x):
        return torch.func.functional_call(layer, {"weight": w}, (x,)).pow(2).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(w, x[:, None])
    want = torch.func.grad(lambda w: F.conv2d(x, w, layer.bias, padding=1).pow(2).sum())(w) * mask
    torch.testing.assert_close(per_sample.sum(0), want, rtol=1e-4, atol=1e-4)  # sums in another order
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_few_channels_that_are_all_kept_may_take_the_kernel(form, monkeypatch):
    layer = nn.MaskedConv2d(8, 8, 3, padding=1).to(memory_format=form)
    layer.set_mask(torch.ones(8, 8, 3, 3, dtype=torch.bool))
    x = torch.randn(9, 8, 6, 5).to(memory_format=form)
    want = F.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), want)
    forbid_torch(layer, monkeypatch)
    torch.testing.assert_close(layer(x), want)


def test_trials_choose_once_and_see_no_flops(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path))
    monkeypatch.setenv("AUTOFLIP_TRIALS", "on")
    ops.trials.forget()
    g = torch.Generator().manual_seed(0)
    layer = nn.MaskedConv2d(32, 32, 3, padding=1)
    layer.set_mask(torch.rand(32, 32, 3, 3, generator=g) < 0.02)
    x = torch.randn(16, 32, 8, 8, generator=g)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    dense = 2 * 16 * 64 * layer.weight.numel()
    assert counter.get_total_flops() in (dense, round(dense * layer.density))
    assert sum("masked_conv2d 32x32x3x3" in key for key in ops.trials.known()) == 4  # three steps and the whole
    ops.trials.forget()


def test_a_whole_layer_that_runs_dense_remembers_its_own_weight_alone(monkeypatch):
    layer = nn.MaskedConv2d(3, 4, 1)
    layer.set_mask(torch.ones(4, 3, 1, 1, dtype=torch.bool))
    layer._conv_pack(layer.weight_mask).path = "dense"
    x, other = torch.randn(2, 3, 4, 4), torch.randn(4, 3, 1, 1)
    torch.testing.assert_close(
        torch.func.functional_call(layer, {"weight": other}, (x,)), F.conv2d(x, other, layer.bias)
    )
    assert "_still" not in layer.__dict__
    want = layer(x)
    assert layer.__dict__["_still"][0] is layer.weight
    monkeypatch.setattr(layer, "_all_dense", None)  # not asked again
    assert torch.equal(layer(x), want)
    monkeypatch.undo()
    mask = torch.zeros(4, 3, 1, 1, dtype=torch.bool)
    layer.set_mask(mask)
    assert torch.equal(layer(x), layer.bias.view(1, -1, 1, 1).expand(2, 4, 4, 4))
