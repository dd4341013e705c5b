"""Sparse models between forward and backward, in inference mode, under a tracer, and with parts exchanged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_nn_layers import net, random_masks
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torchs
from torch.utils.flop_counter import FlopCounterMode

from autoflip import MaskSet, compact, prune
from autoflip import nn as sparse
from autoflip.nn.linear import select


def test_clean_parameters_are_not_written():
    model = net()
    sparse.sparsify(model, random_masks(model))
    versions = [p._version for p in model.parameters()]
    x = torch.randn(5, 1, 8, 8)
    loss = model(x).sum() + model(x).sum()
    model.state_dict()
    assert [p._version for p in model.parameters()] == versions
    loss.backward()  # raises if what the graph saved was written


def test_replaced_head_and_new_layer_mask_are_respected():
    model = net()
    sparse.sparsify(model, random_masks(model))
    mask = torch.zeros(64, 288, dtype=torch.bool)
    model.fc.set_mask(mask)
    model.norm = nn.BatchNorm2d(8)
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        model.fc.weight += 1
    model(x)
    assert not model.fc.weight.any()
    only_fc = sparse.sparsify(net(), {"fc.weight": mask})
    only_fc.fc = nn.Linear(288, 64)
    only_fc(x)
    assert only_fc.fc.weight.all()
    sparse.densify(model.fc)  # a part of the model
    model(x)
    assert type(model.fc) is nn.Linear


@pytest.mark.parametrize("copied", [False, True])
def test_masks_that_keep_everything_hook_nothing_until_one_prunes(copied):
    model = net()
    whole = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    sparse.sparsify(model, whole)
    assert sparse.masks_of(model) == MaskSet(whole)
    assert not any(p._backward_hooks for p in model.parameters())
    assert not model._forward_pre_hooks
    x = torch.randn(5, 1, 8, 8)
    model(x)
    mask = torch.rand(64, 288) < 0.5
    if copied:
        assert not hasattr(copy.deepcopy(model.fc), "_keeper")  # it would bring the whole model along
        model = copy.deepcopy(model)
    model.fc.set_mask(mask)
    with torch.no_grad():
        model.fc.weight += 1
    model(x)
    assert torch.equal(model.fc.weight != 0, mask)
    model.fc.weight_mask[:32] = False  # written into the buffer: seen too
    model(x)
    assert not model.fc.weight[:32].any()


@pytest.mark.parametrize("born_inside", [False, True])
def test_inference_mode_at_the_start_does_not_matter_later(born_inside):
    x = torch.randn(5, 1, 8, 8)
    model = net()
    with torch.inference_mode():
        if born_inside:
            model = net()
        sparse.sparsify(model, random_masks(model))
        y = model.eval()(x)
        copy.deepcopy(model)(x)
    with torch.no_grad():
        assert torch.equal(model(x), y)
    if not born_inside:  # torch trains no parameter that was made in inference mode
        model.bfloat16()(x.bfloat16()).sum().backward()


def test_traced_model_passes_torchs_own_check():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8))
    sparse.sparsify(model, random_masks(model))
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(torch.jit.trace(model, torch.randn(2, 1, 8, 8))(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_a_batch_of_any_size_is_exported_and_compiled_after_eager_steps(strict, monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOFLIP_TRIALS", "on")  # a layer that went by a kernel remembers how
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 32)).eval()
    sparse.sparsify(model, {n: torch.rand(p.shape) < 0.05 for n, p in model.named_parameters() if p.dim() > 1})
    x = torch.randn(32, 3, 6, 6)
    for _ in range(3):
        model(x).sum().backward()
    assert "_again" in vars(model[3])
    for module in (model, model[0], model[3]):
        given = x if module is not model[3] else x.flatten(1)[:, :96].repeat(1, 3)
        whole = torch.export.export(module, (given,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=strict)
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (5, 32):
            torch.testing.assert_close(whole.module()(given[:n]), module(given[:n]))
            torch.testing.assert_close(compiled(given[:n]), module(given[:n]))


@pytest.mark.parametrize("channels, kernel", [(8, 3), (1, 3), (8, 1)])  # sizes of 1 leave the layout open
@pytest.mark.parametrize("first", ["mask", "format"])
def test_channels_last_is_kept(first, channels, kernel):
    torch.manual_seed(0)
    conv, plain = sparse.MaskedConv2d(channels, 6, kernel), nn.Conv2d(channels, 6, kernel)
    mask = torch.rand(conv.weight.shape) < 0.5
    steps = [lambda: conv.set_mask(mask), lambda: conv.to(memory_format=torch.channels_last)]
    for step in steps if first == "mask" else steps[::-1]:
        step()
    with torch.no_grad():
        conv.weight += torch.where(mask, 0, torch.nan)
        plain.load_state_dict(conv.state_dict())
        conv.weight += torch.where(mask, 0, torch.nan)  # and what stands there now is ignored
    assert conv._effective("weight").stride() == conv.weight.stride() == conv.weight_mask.stride()
    assert conv(torch.randn(2, channels, 5, 5)).is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, channels, 5, 5).contiguous(memory_format=torch.channels_last)
    y, want = conv(x), plain(x)
    # two layouts add in another order: 8 * 9 terms of size 1/10
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(conv.weight.grad, torch.where(mask, plain.weight.grad, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trials", ["on", "off"])
def test_many_models_train_at_once_under_vmap(trials, monkeypatch, tmp_path):
    """torch.func.stack_module_state stacks masks, too: each model keeps its own weights at zero."""
    monkeypatch.setenv("AUTOFLIP_TRIALS", trials)
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path))
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        parts = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 20), nn.ReLU(), nn.Linear(20, 5)
        models.append(sparse.sparsify(nn.Sequential(*parts), prune.random(nn.Sequential(*parts), 0.3, seed)))
    params, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0])
    x, target = torch.randn(3, 6, 1, 8, 8), torch.randint(5, (3, 6))

    def loss(p, b, x, target):
        return nn.functional.cross_entropy(torch.func.functional_call(base, (p, b), (x,)), target)

    got = torch.func.vmap(torch.func.grad(loss))(params, buffers, x, target)
    for k, model in enumerate(models):
        want = torch.autograd.grad(nn.functional.cross_entropy(model(x[k]), target[k]), list(model.parameters()))
        for (name, value), one in zip(got.items(), want, strict=True):
            torch.testing.assert_close(value[k], one)
            mask = buffers.get(f"{name}_mask")
            assert mask is None or not value[k][~mask[k]].any()


@pytest.mark.parametrize("looked", [False, True])  # before and after eager steps, which leave shortcuts behind
def test_fx_writes_a_masked_layer_down_as_one_node(looked):
    model = net()
    sparse.sparsify(model, random_masks(model))
    x = torch.randn(5, 1, 8, 8)
    for _ in range(3 if looked else 0):
        model(x).sum().backward()
    traced = torch.fx.symbolic_trace(model)
    named = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert named == {"conv", "norm", "fc", "rnn", "gru", "out"}
    assert {type(traced.get_submodule(name)) for name in ("conv", "fc", "rnn")} == {
        sparse.MaskedConv2d, sparse.MaskedLinear, sparse.MaskedLSTM,
    }  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):  # the graph's layers are the model's own
        optimizer.zero_grad()
        traced(x).square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    for layer in (model.conv, model.fc, model.rnn, model.gru, model.out):
        for name, mask in layer.masks().items():
            assert not layer.state_dict()[name][~mask].any(), name


def test_fx_writes_embeddings_and_selecting_layers_down_as_one_node():
    last, kept = nn.Linear(6, 6), torch.tensor([0, 2, 3])
    last.weight = nn.Parameter(last.weight[:, kept].detach())
    select(last, kept)
    model = nn.Sequential(nn.Embedding(9, 6), nn.ReLU(), last)
    sparse.sparsify(model, random_masks(model))
    words = torch.randint(0, 9, (4, 7))
    want = model(words)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 3
    assert torch.equal(traced(words), want)


def test_a_bare_masked_layer_tells_fx_what_to_trace_instead():
    layer = sparse.MaskedLinear(4, 3)
    layer.set_mask(torch.rand(3, 4) < 0.5)
    with pytest.raises(ValueError, match=r"trace torch\.nn\.Sequential\(layer\) instead"):
        torch.fx.symbolic_trace(layer)
    x = torch.randn(2, 4)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x), layer(x))


@pytest.mark.parametrize("masked", [False, True])
def test_torchs_own_pruning_cannot_take_a_mask_s_place(masked):
    layer = sparse.MaskedLinear(6, 5)
    if masked:
        layer.set_mask(torch.rand(5, 6) < 0.5)
    before, mask = layer.weight, layer.masks().get("weight")
    with pytest.raises(ValueError, match="a mask of torch.nn.utils.prune would take its place. Prune with set_mask"):
        torchs.l1_unstructured(layer, "weight", 0.3)
    assert layer.weight is before
    assert layer.masks().get("weight") is mask


@pytest.mark.parametrize("density", [1.0, 0.5, None])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_bias_may_be_computed_from_other_tensors(kind, density):
    layer = sparse.MaskedLinear(6, 5) if kind == "linear" else sparse.MaskedConv2d(6, 5, 3)
    x, by_hand = (torch.randn(2, 6), F.linear) if kind == "linear" else (torch.randn(16, 6, 5, 5), F.conv2d)
    if density is not None:
        layer.set_mask(torch.rand(layer.weight.shape) < density)
    layer(x)  # leaves shortcuts behind
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    for _ in range(3):
        y = layer(x)
        torch.testing.assert_close(y, by_hand(x, layer.weight, layer.bias))
        assert torch.autograd.grad(y.sum(), layer.parametrizations.bias.original)[0].all()


def test_what_torchs_own_pruning_has_taken_apart_is_named():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    torchs.l1_unstructured(model[0], "weight", 0.3)
    kept = model[0].weight != 0
    with pytest.raises(ValueError, match=r"prune\.remove\(model\.get_submodule\('0'\), 'weight'\) first"):
        sparse.sparsify(model, {"0.weight": kept})
    with pytest.raises(ValueError, match=r"compact: 0\.weight is computed from other tensors"):
        compact(model)
    torchs.remove(model.get_submodule("0"), "weight")
    x = torch.randn(3, 6)
    want = model(x)
    sparse.sparsify(model, {"0.weight": kept})
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(compact(model)(x), want)


@pytest.mark.parametrize("path", ["trials off", "sparse"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("kind", ["linear", "blocks", "conv"])
def test_who_counts_flops_changes_no_bit(kind, density, path):
    torch.manual_seed(0)
    if kind == "conv":
        layer, x = sparse.MaskedConv2d(8, 16, 3, padding=1), torch.randn(16, 8, 12, 12)
    else:
        layer, x = sparse.MaskedLinear(200, 96), torch.randn(64, 200)
    mask = torch.rand(layer.weight.shape) < density
    layer.set_mask((torch.rand(6, 200) < density).repeat_interleave(16, 0) if kind == "blocks" else mask)
    if path == "sparse":
        (layer._conv_pack(layer.weight_mask) if kind == "conv" else layer._pack).path = "sparse"

    def step():
        layer.zero_grad()
        own = x.clone().requires_grad_()
        y = layer(own)
        y.square().sum().backward()
        return y.detach(), own.grad, layer.weight.grad.clone(), layer.bias.grad.clone()

    step()
    plain = step()
    with FlopCounterMode(display=False):
        counted = step()
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))
