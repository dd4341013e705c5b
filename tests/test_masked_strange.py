"""Masked layers in unusual hands: mixed paths, parameters of other shapes, copies inside function transforms."""

import copy
import subprocess
import sys

import pytest
import torch
from forced_path import forced_layer
from torch import nn
from torch.func import functional_call

import autoflip
from autoflip import codec, ops
from autoflip import nn as sparse
from autoflip.ops import conv_paths


@pytest.mark.parametrize("path", ["ddf", "dsf", "sdf", "fdd", "ffd", "ddd"])
@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False)])
def test_any_mix_of_ways_is_a_step(path, wanted, monkeypatch):
    layer = forced_layer(path, 48, 40, monkeypatch)
    x = torch.randn(33, 48, requires_grad=wanted[0])
    layer.weight.requires_grad_(wanted[1])
    g = torch.randn(33, 40)
    layer(x).backward(g)
    weight, mask = layer.weight.detach().double(), layer.weight_mask
    # float32 sums of 33 and 40 terms of size 1, in another order
    if wanted[0]:
        torch.testing.assert_close(x.grad.double(), g.double() @ (weight * mask), rtol=1e-5, atol=1e-5)
    if wanted[1]:
        dw = (g.double().T @ x.detach().double()) * mask
        torch.testing.assert_close(layer.weight.grad.double(), dw, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, g.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (3,), (32, 1)])
def test_a_bias_of_another_shape_is_refused(shape, monkeypatch):
    monkeypatch.setattr(conv_paths.Trial, "letters", lambda self: "sss")
    layer, mask = sparse.MaskedConv2d(16, 32, 3, padding=1), torch.rand(32, 16, 3, 3) < 0.1
    layer.set_mask(mask)
    x = torch.randn(16, 16, 8, 8)
    layer(x)
    layer.bias = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"bias has shape .*, wanted \(32,\)"):
        layer(x)
    with pytest.raises(ValueError, match=r"bias has shape .*, wanted \(32,\)"):
        ops.masked_conv2d(x, layer.weight, torch.zeros(shape), ops.ConvPack(mask, (1, 1), path="sparse"))


@pytest.mark.parametrize(("name", "shape"), [("bias_hh_l0", (1,)), ("bias_ih_l0", (8,))])
def test_recurrent_parameters_of_another_shape_do_what_they_do_in_torch(name, shape, monkeypatch):
    monkeypatch.setattr(sparse.MaskedLSTM, "_way", lambda self, *_: "sparse", raising=False)
    layer = sparse.MaskedLSTM(8, 16)
    layer.set_mask({"weight_ih_l0": torch.rand(64, 8) < 0.1})
    layer(torch.randn(5, 3, 8))
    setattr(layer, name, nn.Parameter(torch.zeros(shape)))
    x, plain = torch.randn(5, 3, 8), nn.LSTM(8, 16)
    for key, value in layer.named_parameters():
        setattr(plain, key, nn.Parameter(value.detach()))
    try:
        want = plain(x)[0]  # torch spreads what can be spread
    except RuntimeError:
        with pytest.raises(RuntimeError):
            layer(x)
    else:
        torch.testing.assert_close(layer(x)[0], want)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_a_copys_first_call_may_be_inside_a_transform(transform):
    model = autoflip.sparsify(nn.Sequential(nn.Linear(784, 200)), {"0.weight": torch.rand(200, 784) < 0.1})
    model, x = copy.deepcopy(model), torch.randn(32, 784)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params):
        return functional_call(model, params, (x,)).square().sum()

    if transform == "grad":
        got = torch.func.grad(loss)(params)["0.weight"]
    else:
        _, got = torch.func.jvp(loss, (params,), (params,))
    plain = {name: p.clone().requires_grad_() for name, p in params.items()}
    loss(plain).backward()
    want = plain["0.weight"].grad if transform == "grad" else sum((p.grad * p).sum() for p in plain.values())
    torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-3)  # sums of 784 and 32 terms


@pytest.mark.parametrize("call", ["vmap(layer)(x)", "jacrev(layer)(x)", "vmap(conv)(images)"])
def test_a_processes_first_call_may_be_inside_a_transform(call):
    code = f"""
import torch
from torch.func import jacrev, vmap
from autoflip import nn
layer, x = nn.MaskedLinear(8, 8), torch.randn(3, 8)
layer.set_mask(torch.rand(8, 8) < 0.5)
conv, images = nn.MaskedConv2d(2, 2, 3), torch.randn(3, 2, 6, 6)
conv.set_mask(torch.rand(2, 2, 3, 3) < 0.5)
{call}
"""
    env = {"AUTOFLIP_TRIALS": "off", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr


def test_sums_that_cannot_be_added_to_leave_the_others_alone():
    blob = codec.encode({"a": torch.ones(2), "w": torch.ones(2, 2)})
    for total in (torch.zeros(2, 2, dtype=torch.float64, requires_grad=True), torch.zeros(1, 2).expand(2, 2)):
        sums = {"a": torch.zeros(2), "w": total}
        with pytest.raises(ValueError, match="'w'.* requires grad or is expanded"):
            codec.accumulate(blob, sums, 1.0)
        assert not sums["a"].any()
