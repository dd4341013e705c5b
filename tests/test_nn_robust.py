"""Masked layers in the situations that real programs bring: copies, replicas, autocast, compilers, long runs."""

import copy
import gc
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoflip import nn as sparse
from autoflip.ops import Pack


def linear(density=0.3, bias=True):
    layer = sparse.MaskedLinear(24, 20, bias)
    layer.set_mask(torch.rand(20, 24) < density)
    return layer, torch.randn(7, 24)


def conv(density=0.3, **options):
    layer = sparse.MaskedConv2d(8, 12, 3, padding=1, **options)
    layer.set_mask(torch.rand(layer.weight.shape) < density)
    return layer, torch.randn(3, 8, 6, 6)


def embedding(density=0.3):
    layer = sparse.MaskedEmbedding(9, 5)
    layer.set_mask(torch.rand(9, 5) < density)
    return layer, torch.randint(9, (4, 3))


def recurrent(kind, density=0.3):
    layer = kind(5, 6, 2, bidirectional=True)
    layer.set_mask({n: torch.rand(p.shape) < density for n, p in layer.named_parameters()})
    return layer, torch.randn(4, 2, 5)


LAYERS = {
    "linear": linear,
    "conv": conv,
    "embedding": embedding,
    "lstm": lambda **o: recurrent(sparse.MaskedLSTM, **o),
    "gru": lambda **o: recurrent(sparse.MaskedGRU, **o),
}


def result(layer, x):
    y = layer(x)
    return y if isinstance(y, torch.Tensor) else y[0]


def plain(layer):
    return sparse.densify(nn.Sequential(copy.deepcopy(layer)))[0]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_equals_torchs_layer_on_masked_weights(name, density):
    layer, x = LAYERS[name](density=density)
    twin = plain(layer)
    assert type(twin).__module__.startswith("torch.nn")
    y, want = result(layer, x), result(twin, x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)  # float32, up to 72 terms of size 1
    y.sum().backward()
    want.sum().backward()
    for parameter, p in zip(layer.parameters(), twin.parameters(), strict=True):
        mask = layer.masks().get(next(n for n, q in layer.named_parameters() if q is parameter))
        grad = p.grad if mask is None else torch.where(mask, p.grad, 0)
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_deepcopy_is_apart(name):
    layer, x = LAYERS[name]()
    twin = copy.deepcopy(layer)
    y = result(layer, x)
    assert torch.equal(result(twin, x), y)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    for mask in twin.masks().values():
        mask.zero_()
    assert torch.equal(result(layer, x), y)
    assert not torch.equal(result(twin, x), y)


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_is_torchs_both_ways(name):
    layer, x = LAYERS[name]()
    twin = type(plain(layer))(*ARGUMENTS[name][0], **ARGUMENTS[name][1])
    assert list(twin.state_dict()) == list(layer.state_dict())
    twin.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(result(twin, x), result(layer, x)) or name == "linear"  # another kernel may add in another order
    fresh = type(plain(layer))(*ARGUMENTS[name][0], **ARGUMENTS[name][1])
    layer.load_state_dict(fresh.state_dict(), strict=True)
    for key, mask in layer.masks().items():
        assert torch.equal(layer.state_dict()[key], torch.where(mask, fresh.state_dict()[key], 0))


ARGUMENTS = {
    "linear": ((24, 20), {}),
    "conv": ((8, 12, 3), {"padding": 1}),
    "embedding": ((9, 5), {}),
    "lstm": ((5, 6, 2), {"bidirectional": True}),
    "gru": ((5, 6, 2), {"bidirectional": True}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_replicas_as_data_parallel_makes_them(name):
    """nn.DataParallel runs shallow copies whose tensors are no leaves, in threads; gradients reach the original."""
    layer, x = LAYERS[name]()
    model = sparse.sparsify(nn.Sequential(plain(layer)), {f"0.{n}": m for n, m in layer.masks().items()})
    want = result(model[0], x)
    want.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    outputs = {}

    def run(i):
        replica = model._replicate_for_data_parallel()
        inner = model[0]._replicate_for_data_parallel()
        for key, p in model[0]._parameters.items():
            inner._parameters[key] = None if p is None else p * 1
        for key, b in model[0]._buffers.items():
            inner._buffers[key] = b.clone()
        if isinstance(inner, nn.RNNBase):
            inner._flat_weights = [inner._parameters[n] for n in inner._flat_weights_names]
        replica._modules = {"0": inner}
        y = replica(x)
        outputs[i] = y if isinstance(y, torch.Tensor) else y[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(outputs[i], want) for i in range(2))
    sum(y.sum() for y in outputs.values()).backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad, rtol=1e-5, atol=1e-5)  # two replicas' sums


@pytest.mark.parametrize("name", LAYERS)
def test_threads_may_share_a_layer(name):
    layer, x = LAYERS[name]()
    with torch.no_grad():
        want, wrong = result(layer, x), []

    def run():
        torch.set_num_threads(1)  # torch's products of a new thread take all cores until it is asked for their number
        with torch.no_grad():
            wrong.extend(1 for _ in range(50) if not torch.equal(result(layer, x), want))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    if isinstance(layer, nn.RNNBase):
        assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_autocast(name):
    layer, x = LAYERS[name]()
    twin = plain(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, want = layer(x), twin(x)
    assert y.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=2**-7, atol=2**-7)  # one rounding to bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert not layer.weight.grad[~layer.weight_mask].any()


@pytest.mark.parametrize("name", ["linear", "conv", "embedding"])
def test_compiles_in_one_graph(name):
    layer, x = LAYERS[name]()
    model = sparse.sparsify(nn.Sequential(plain(layer)), {f"0.{n}": m for n, m in layer.masks().items()})
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)  # float32, up to 72 terms of size 1
    y.sum().backward()
    assert not model[0].weight.grad[~layer.weight_mask].any()


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_opcheck(path):
    layer, x = linear()
    parts = Pack(layer.weight_mask, path=path).parts(8)
    weight, bias = layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()
    torch.library.opcheck(torch.ops.autoflip.masked_linear.default, (x.requires_grad_(), weight, bias, False, *parts))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's count of resident pages")
@pytest.mark.slow
def test_no_memory_growth():
    """10,000 training steps; a tensor that stays behind at each of the last 8,000 would be 4 MB and more."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    sparse.sparsify(model, {n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters()})
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, y = torch.randint(5, (3,)), torch.tensor([0, 1, 1])

    def resident(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # bytes

    before = resident(2000)
    assert resident(8000) - before < 2**20


@settings(max_examples=30)
@given(
    groups=st.sampled_from([1, 2, 4]), stride=st.integers(1, 3), dilation=st.integers(1, 2), kernel=st.integers(1, 3),
    padding=st.integers(0, 2), mode=st.sampled_from(["zeros", "reflect"]), density=st.floats(0, 1),
    last=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_convolutions_of_any_kind(groups, stride, dilation, kernel, padding, mode, density, last, seed):
    torch.manual_seed(seed)
    options = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups, "padding_mode": mode}
    layer = sparse.MaskedConv2d(4, 8, kernel, **options)
    mask = torch.rand(layer.weight.shape) < density
    mask[seed % 8] = False  # a channel of which nothing is left
    layer.set_mask(mask)
    x = torch.randn(2, 4, 9, 8)
    if last:
        layer, x = layer.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    twin = plain(layer)
    y, want = layer(x), twin(x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)  # float32, up to 36 terms of size 1
    dy = torch.randn_like(want)
    y.backward(dy)
    want.backward(dy)
    torch.testing.assert_close(layer.weight.grad, torch.where(mask, twin.weight.grad, 0), rtol=1e-4, atol=1e-4)
    assert not layer.weight.grad[~mask].any()


@settings(max_examples=30)
@given(
    rows=st.integers(0, 9), inputs=st.integers(1, 40), outputs=st.integers(1, 40), density=st.floats(0, 1),
    bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_linear_of_any_size(rows, inputs, outputs, density, bias, seed):
    torch.manual_seed(seed)
    layer = sparse.MaskedLinear(inputs, outputs, bias)
    mask = torch.rand(outputs, inputs) < density
    mask[seed % outputs] = False  # an empty row
    layer.set_mask(mask)
    twin = plain(layer)
    x = torch.randn(2, rows, inputs)
    y, want = layer(x), twin(x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)  # float32, up to 40 terms of size 1
    y.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.where(mask, twin.weight.grad, 0), rtol=1e-4, atol=1e-4)
