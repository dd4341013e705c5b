"""Dense steps of masked layers: torch's own product, and a hook that masks the gradient and touches nothing else."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoflip import nn as sparse
from autoflip.ops import gradient_hook, paths


@pytest.fixture(autouse=True)
def dense(monkeypatch):
    """Layers made now take the dense product."""
    torch.manual_seed(0)
    monkeypatch.setattr(paths, "letters", lambda *_, **__: "ddd")


def layer_of(kind):
    if kind == "linear":
        layer, x = sparse.MaskedLinear(6, 5), torch.randn(4, 6)
    else:
        layer, x = sparse.MaskedConv2d(3, 5, 3), torch.randn(4, 3, 6, 6)
    layer.set_mask(torch.rand(layer.weight.shape) < 0.5)
    return layer, x


def masked(layer):
    return not layer.weight.grad[~layer.weight_mask].any() and layer.weight.grad[layer.weight_mask].all()


KINDS = pytest.mark.parametrize("kind", ["linear", "conv"])


@KINDS
def test_each_way_to_a_gradient_is_masked(kind):
    layer, x = layer_of(kind)
    for _ in range(3):  # the second pass finds what the first has set up
        layer.weight.grad = None
        layer(x).pow(2).sum().backward()
        assert masked(layer)
    assert len(layer.weight._backward_hooks) == 1
    want = layer.weight.grad
    (got,) = torch.autograd.grad(layer(x).pow(2).sum(), layer.weight)
    assert torch.equal(got, want)
    (got,) = torch.autograd.grad(layer(x).pow(2).sum(), layer.weight, create_graph=True)
    torch.testing.assert_close(got, want)
    (second,) = torch.autograd.grad(got.pow(2).sum(), layer.weight)
    assert second[layer.weight_mask].all()
    assert not second[~layer.weight_mask].any()
    y = layer(x).flatten()[:3]
    (batched,) = torch.autograd.grad(y, layer.weight, torch.eye(3), is_grads_batched=True)
    assert not batched[:, ~layer.weight_mask].any()
    layer.weight.grad = None
    twice = layer(x).sum() + layer(x[:2]).sum() + layer.weight.sum()
    twice.backward()
    assert masked(layer)


@KINDS
def test_nothing_is_written_that_others_see(kind):
    layer, _ = layer_of(kind)
    shape, mask = layer.weight.shape, layer.weight_mask
    upstream = torch.ones(shape)
    weights = {name: layer.weight.detach().clone().requires_grad_() for name in "ab"}
    seen = []
    weights["b"].register_hook(lambda gradient: seen.append(gradient))
    for w in weights.values():
        w.register_hook(gradient_hook(mask))
    (weights["a"] + weights["b"]).backward(upstream)  # one gradient for both
    flat = torch.ones(upstream.numel())
    got = [
        weights["a"].grad,
        torch.autograd.grad(weights["a"].view(-1), weights["a"], flat)[0],
        torch.autograd.grad(weights["a"].t() if kind == "linear" else weights["a"].flip(0), weights["a"],
                            upstream.t() if kind == "linear" else upstream)[0],
        weights["b"].grad,
        torch.autograd.grad(2 * weights["b"], weights["b"], upstream)[0],
    ]  # fmt: skip
    assert upstream.all()
    assert flat.all()
    assert all(gradient.all() for gradient in seen)  # a hook of the user's, before ours
    assert len(seen) == 2
    assert all(torch.equal(gradient != 0, mask) for gradient in got)


@KINDS
def test_in_place_where_autograd_alone_holds_the_gradient(kind, monkeypatch):
    from autoflip.ops import _masked_weight

    if _masked_weight.CPP is None:
        pytest.skip("the CPU extension is not built")
    monkeypatch.setattr(_masked_weight, "_masked_gradient", lambda *_: pytest.fail("a copy was made"))
    layer, x = layer_of(kind)
    layer(x).sum().backward()
    assert masked(layer)


@KINDS
def test_in_place_also_where_the_first_layer_of_a_process_runs_under_autocast(kind, monkeypatch):
    from autoflip.ops import _masked_weight

    _masked_weight._count_holders.cache_clear()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _masked_weight._count_holders()
        test_in_place_where_autograd_alone_holds_the_gradient(kind, monkeypatch)
    finally:
        _masked_weight._count_holders.cache_clear()


@KINDS
def test_tensors_that_stand_in_for_the_parameter_get_no_hook(kind):
    layer, x = layer_of(kind)
    for other in (nn.Parameter(torch.randn_like(layer.weight)), torch.randn_like(layer.weight).requires_grad_()):
        torch.func.functional_call(layer, {"weight": other}, (x,)).pow(2).sum().backward()
        assert not other._backward_hooks
        assert not other.grad[~layer.weight_mask].any()
        assert other.grad[layer.weight_mask].all()


@KINDS
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_hook_themselves(kind, way):
    layer, x = layer_of(kind)
    layer(x).sum().backward()
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert not twin.weight._backward_hooks
    twin.weight.grad = None
    twin(x).sum().backward()
    assert len(twin.weight._backward_hooks) == 1
    assert masked(twin)
    twin.set_mask(~layer.weight_mask)
    twin.weight.grad = layer.weight.grad = None
    twin(x).sum().backward()
    layer(x).sum().backward()
    assert masked(twin)
    assert masked(layer)


@KINDS
def test_a_hook_goes_with_its_mask(kind):
    layer, x = layer_of(kind)
    layer(x).sum().backward()
    layer.set_mask(~layer.weight_mask)
    layer.weight.grad = None
    layer(x).sum().backward()
    assert len(layer.weight._backward_hooks) == 1
    assert masked(layer)
    layer.weight_mask.logical_not_()  # written into the buffer
    layer.weight.grad = None
    layer(x).sum().backward()
    assert masked(layer)
    layer.set_mask(None)
    assert not layer.weight._backward_hooks
    layer.weight.grad = None
    layer(x).sum().backward()
    assert layer.weight.grad.all()


@KINDS
def test_what_is_written_at_pruned_entries_is_ignored_even_past_versions(kind):
    layer, x = layer_of(kind)
    want = layer(x)
    version = layer.weight._version
    layer.weight.data[~layer.weight_mask] = torch.nan
    assert layer.weight._version == version
    torch.testing.assert_close(layer(x), want)
    layer.weight.data = torch.where(layer.weight_mask, layer.weight.detach(), 3.0)
    torch.testing.assert_close(layer(x), want)


@KINDS
def test_other_dtypes_and_frozen_weights(kind):
    layer, x = layer_of(kind)
    layer.weight.requires_grad_(False)
    want = layer(x)
    assert not layer.weight._backward_hooks
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert masked(layer)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.1)):  # of the first type; 8 bits of sums of 27
        layer.weight.grad = None
        layer.to(dtype)
        y = layer(x.to(dtype))
        torch.testing.assert_close(y.float(), want, rtol=tolerance, atol=tolerance)
        y.sum().backward()
        assert layer.weight.grad.dtype == dtype
        assert not layer.weight.grad[~layer.weight_mask].any()


@KINDS
def test_compiled_and_differentiated_by_transforms(kind):
    layer, x = layer_of(kind)
    want = layer(x)
    want.sum().backward()
    grad = layer.weight.grad.clone()
    layer.weight.grad = None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    torch.testing.assert_close(layer.weight.grad, grad)
    rows = torch.func.vmap(lambda row: layer(row[None])[0])(x)
    torch.testing.assert_close(rows, want)
    tangent = torch.func.grad(lambda x: F.relu(layer(x)).sum())(x)
    assert tangent.shape == x.shape


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_buffer_that_is_replaced_takes_the_old_hook_with_it(kind):
    layer, x = layer_of(kind)
    layer(x).sum().backward()
    layer.weight.grad = None
    with torch.no_grad():
        layer.weight.add_(1)  # not zero under any mask: the weight itself is not multiplied by
    layer.weight_mask = ~layer.weight_mask
    layer(x).sum().backward()
    kept = layer.weight_mask
    assert (layer.weight.grad[kept] != 0).all()
    assert not layer.weight.grad[~kept].any()
