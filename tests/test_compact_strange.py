"""Forwards that do more than pass tensors from layer to layer: followed rightly or left whole, and left untouched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_compact import assert_same
from torch import nn

from autoflip.groups import find_groups
from autoflip.masks import MaskSet
from autoflip.nn import compact, sparsify


class Net(nn.Module):
    """Whatever layers and forward a test gives it; ``b`` reads eight channels."""

    def __init__(self, do, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.do, self.a, self.b = do, nn.Linear(6, 8), nn.Linear(8, 4)
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.double()

    def forward(self, x):
        return self.do(self, x)


def half(name="b.weight", rows=4):
    return MaskSet({name: torch.tensor([True, False] * 4).expand(rows, 8).clone()})


X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def leaves_attributes(m, x):
    h = torch.relu(m.a(x) + m.last)
    m.last, m.calls = h.detach().mean(0), m.calls + 1
    m.history.append(h)
    m.stats["h"] = h
    m.new = h
    return m.b(h)


def test_attributes_are_what_they_were():
    model = Net(leaves_attributes)
    model.last, model.calls, model.history, model.stats = torch.zeros(8).double(), 0, [], {}
    before = dict(vars(model))
    small = compact(model, X, half())
    for net in (model, small):
        assert type(net.last) is torch.Tensor
        assert (net.calls, net.history, net.stats, hasattr(net, "new")) == (0, [], {}, False)
    assert all(vars(model)[name] is value for name, value in before.items())
    torch.testing.assert_close(small(X), sparsify(copy.deepcopy(model), half())(X))


def writes_buffers(m, x):
    m.calls += 1
    h = m.spectral(m.a(x))
    if m.training:
        m.mean.mul_(0.9).add_(0.1)
        m.extra = m.mean + 1
    return m.b(h - m.mean)


@pytest.mark.parametrize("train", [False, True])
def test_buffers_are_what_they_were(train):
    parts = {"calls": torch.zeros(()), "mean": torch.ones(8), "extra": torch.ones(8)}
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    model = Net(writes_buffers, spectral=spectral, **parts).train(train)
    objects, values = dict(model.named_buffers()), copy.deepcopy(dict(model.named_buffers()))
    assert not find_groups(model).reason
    for name, buffer in model.named_buffers():
        assert buffer is objects[name]
        assert torch.equal(buffer, values[name]), name
    assert model.training == train


RANKS = {
    "mean of rows": (lambda m, y: m.b(m.e(y) - m.e(y).mean(1, keepdim=True)), (5,)),
    "sum of a Linear": (lambda m, y: m.b(m.c(m.e(y)) - m.c(m.e(y)).sum(2, keepdim=True)), (3, 5)),
    "softmax": (lambda m, y: m.b(F.softmax(m.e(y), 3)), (3, 2, 5)),
    "joined in time": (lambda m, y: m.b(torch.cat([m.e(y), m.e(y)], 1)), (3, 5)),
}


@pytest.mark.parametrize("given", [False, True], ids=["unknown", "given"])
@pytest.mark.parametrize("case", RANKS)
def test_a_dimension_by_its_number_may_be_that_of_the_channels(case, given):
    do, shape = RANKS[case]
    model, y = Net(do, e=nn.Embedding(9, 8), c=nn.Linear(8, 8)), torch.arange(9).repeat(5)[: torch.Size(shape).numel()]
    y = y.view(shape)
    assert_same(model, y, half(), compact(model, y if given else None, half()))


def test_the_last_dimension_by_its_number_is_that_of_the_channels():
    model = Net(lambda m, x: m.b(m.a(x) - m.a(x).sum(2, keepdim=True)))
    x = X.expand(2, 3, 6)
    assert_same(model, x, half())
    assert assert_same(model, x, half(), compact(model, x, half())).a.out_features == 8


def test_time_is_time_where_the_inputs_are_given():
    model, y = Net(lambda m, y: m.b(m.e(y).mean(1)), e=nn.Embedding(9, 8)), torch.arange(9).view(3, 3)
    assert assert_same(model, y, half(), compact(model, y, half())).e.embedding_dim == 4
    flat = Net(lambda m, y: m.b(m.e(y).flatten(1)), e=nn.Embedding(9, 4))
    for example in (None, y[:, :2]):
        assert assert_same(flat, y[:, :2], half(), compact(flat, example, half())).e.embedding_dim == 2


NORMS = [
    nn.BatchNorm1d(8, affine=False, track_running_stats=False),
    nn.BatchNorm1d(8),
    nn.GroupNorm(8, 8, affine=False),
    nn.GroupNorm(8, 8),
    nn.InstanceNorm1d(8),
    nn.InstanceNorm1d(8, affine=True),
    nn.PReLU(8),
]


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_norms_of_another_dimension(norm):
    def do(m, x):
        return m.b(torch.relu(m.n(m.a(x))))

    x = torch.randn(3, 8, 6, dtype=torch.float64)
    model = Net(do, n=copy.deepcopy(norm))
    assert assert_same(model, x, half(), compact(model, x, half())).a.out_features == 8
    if not norm.state_dict() or isinstance(norm, nn.InstanceNorm1d):  # nothing in it would notice another size
        assert_same(model, x, half())
        return
    small = compact(model, masks=half())
    assert small.a.out_features == 4
    assert_same(model, X, half(), small)
    with pytest.raises((RuntimeError, ValueError)):
        small(x)


def test_norms_without_tensors_shrink_where_the_rank_is_known():
    model = Net(lambda m, x: m.b(m.n(m.a(x))), n=copy.deepcopy(NORMS[0]))
    assert assert_same(model, X, half(), compact(model, X, half())).n.num_features == 4


OWN_READS = {
    "linear": lambda m, x: F.linear(m.b(m.e(m.a(x))), m.e.weight[:, :4]),
    "matmul": lambda m, x: m.b(m.a(x) @ m.e.weight),
    "norm": lambda m, x: m.b(m.e(m.a(x)) * m.e.weight.norm()) + m.e.weight.norm(),
    "sum": lambda m, x: m.b(m.e(m.a(x))) * m.e.bias.abs().sum(),
    "as an argument": lambda m, x: m.b(m.a(x)) + torch.stack([m.e.weight.sum(), m.e.bias.sum()])[0],
    "size": lambda m, x: m.b(m.e(m.a(x))) * m.e.weight.shape[0],
}


@pytest.mark.parametrize("case", OWN_READS)
def test_a_layer_whose_tensors_forward_reads_is_kept_whole(case):
    model = Net(OWN_READS[case], e=nn.Linear(8, 8))
    masks = MaskSet({**half(), **half("e.weight", 8)})
    small = assert_same(model, X, masks)
    assert small.e.weight.shape == (8, 8)
    assert "forward reads e." in small.plan.left["e"]


def test_asking_a_weight_for_its_dtype_keeps_nothing():
    model = Net(lambda m, x: m.b(m.a(x.to(m.a.weight.dtype))))
    assert assert_same(model, X, half()).a.out_features == 4


ELEMENTS = {
    "clamp": lambda m, h: torch.clamp(h, max=m.high),
    "clamp, by place": lambda m, h: h.clamp(m.high - 1, m.high),
    "clamp_max": lambda m, h: torch.clamp_max(h, m.high),
    "minimum": lambda m, h: torch.minimum(h, m.high),
}


@pytest.mark.parametrize("case", ELEMENTS)
def test_elementwise_functions_of_two_tensors(case):
    model = Net(lambda m, x: m.b(ELEMENTS[case](m, m.a(x))), high=torch.linspace(0, 1, 8))
    assert assert_same(model, X, half()).a.out_features == 8
    gated = Net(lambda m, x: m.b(torch.clamp(m.a(x), max=m.c(x))), c=nn.Linear(6, 8))
    assert_same(gated, X, half())


def _flip(module, args, out=None):
    return (args[0].flip(-1),) if out is None else out.flip(-1)


@pytest.mark.parametrize("where", ["a", "act", "b"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_layers_with_hooks_are_left_whole(where, kind):
    model = Net(lambda m, x: m.b(m.act(m.a(x))), act=nn.ReLU())
    getattr(model.get_submodule(where), kind)(_flip)
    small = assert_same(model, X, half())
    assert small.a.out_features == 8
    assert "hook" in small.plan.left[where]
    layer = sparsify(nn.Linear(6, 8), {"bias": torch.arange(8) > 0})  # with a hook of ours
    assert find_groups(layer).inputs


class Helper(Net):
    def forward(self, x):
        return self.b(self._extra(self.a(x)))

    def _extra(self, h):
        return h + self.c(h) if self.training else h


def test_train_mode_is_followed_whoever_asks_for_it():
    model = Helper(None, c=nn.Linear(8, 8)).eval()
    small = assert_same(model, X, half())
    assert small.c.weight.shape[0] == small.a.out_features
