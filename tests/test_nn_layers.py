"""Masked layers are torch's layers with zeros: same state_dict, same Parameter objects, zeros that stay."""

import copy
import io

import pytest
import torch
from torch import nn

from autoflip import MaskSet
from autoflip import nn as sparse


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 36, 64)
        self.rnn = nn.LSTM(64, 16, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(32, 12, batch_first=True)
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        h = self.fc(self.norm(self.conv(x)).relu().flatten(1)).relu()
        return self.out(self.gru(self.rnn(h.unsqueeze(1))[0])[0][:, -1])


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def random_masks(model, density=0.2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return MaskSet(
        {n: torch.rand(t.shape, generator=g) < density for n, t in model.state_dict().items() if t.is_floating_point()}
    )


def train(model, optimizer, steps=4, seed=2):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(80, 1, 8, 8, generator=g), torch.randint(4, (80,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("copied", [False, True])
def test_pruned_entries_stay_zero_through_training(optimizer, copied):
    model = net()
    early = optimizer(model.parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = random_masks(model)
    assert sparse.sparsify(model, masks) is model
    if copied:
        model = copy.deepcopy(model)
        early = optimizer(model.parameters())
    train(model, early)
    for name, p in model.named_parameters():
        assert not p[~masks[name]].any(), name
        assert (p != before[name])[masks[name]].any() or not masks[name].any(), name
    assert sparse.masks_of(model) == masks


def test_state_dict_keys_and_parameter_objects_are_torchs():
    model, masks = net(), random_masks(net())
    parameters, keys = list(model.parameters()), list(model.state_dict())
    sparse.sparsify(model, masks)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert list(model.state_dict()) == keys
    dense = net(1)
    dense.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(net(3).state_dict(), strict=True)  # unpruned values come in, and are pruned
    for name, p in model.named_parameters():
        assert not p[~masks[name]].any(), name


def test_densify_leaves_torchs_model_with_exact_zeros():
    model, masks = net(), random_masks(net())
    x = torch.randn(5, 1, 8, 8)
    sparse.sparsify(model, masks).eval()
    y = model(x)
    sparse.densify(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]
    for module, plain in zip(model.modules(), net().modules(), strict=True):
        assert module.__dict__.keys() == plain.__dict__.keys()
        assert module._buffers.keys() == plain._buffers.keys()
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_post_hooks
    assert not any(p._backward_hooks for p in model.parameters())
    torch.testing.assert_close(model(x), y)
    assert all(not t[~masks[n]].any() for n, t in model.state_dict().items() if n in masks)
    assert len(sparse.masks_of(model)) == 0
    model(x).sum().backward()
    assert model.fc.bias.grad[~masks["fc.bias"]].any()


def test_second_call_replaces_the_first():
    model = net()
    sparse.sparsify(model, random_masks(model))
    only_fc = MaskSet({"fc.weight": torch.ones(64, 288, dtype=torch.bool)})
    sparse.sparsify(model, only_fc)
    assert sparse.masks_of(model) == only_fc
    assert type(model.conv) is nn.Conv2d


def test_whole_masks_change_nothing():
    model, x = net(), torch.randn(6, 1, 8, 8)
    plain = copy.deepcopy(model)
    sparse.sparsify(model, {n: torch.ones_like(t, dtype=torch.bool) for n, t in model.named_parameters()})
    assert torch.equal(model(x), plain(x))
    circular = {"padding": 1, "padding_mode": "circular"}
    for layer, torchs, x in [
        (sparse.MaskedLinear(5, 3, bias=False), nn.Linear(5, 3, bias=False), torch.randn(2, 4, 5)),
        (sparse.MaskedConv2d(2, 3, 3, **circular), nn.Conv2d(2, 3, 3, **circular), torch.randn(2, 2, 6, 6)),
        (sparse.MaskedLSTM(5, 3, proj_size=2), nn.LSTM(5, 3, proj_size=2), torch.randn(4, 2, 5)),
        (sparse.MaskedGRU(5, 3), nn.GRU(5, 3), torch.randn(4, 2, 5)),
    ]:
        torchs.load_state_dict(layer.state_dict(), strict=True)
        got, want = layer(x), torchs(x)
        assert torch.equal(got[0], want[0])
        assert layer.density == 1
        assert repr(layer).startswith("Masked" + repr(torchs)[:-1])


def test_density_repr_and_set_mask():
    layer = sparse.MaskedLinear(4, 2)
    mask = torch.tensor([[True, False, True, False], [False, True, False, True]])
    layer.set_mask(mask)
    assert layer.density == 0.5
    assert "density=0.5" in repr(layer)
    mask[:] = False  # the layer has its own copy
    assert layer.density == 0.5
    layer.set_mask(None)
    assert layer.density == 1
    rnn = sparse.MaskedLSTM(3, 2)
    rnn.set_mask({"weight_hh_l0": torch.zeros(8, 2, dtype=torch.bool)})
    assert rnn.density == 0
    assert not rnn.weight_hh_l0.any()
    h = rnn(torch.randn(5, 1, 3))[0]
    h.sum().backward()
    assert not rnn.weight_hh_l0.grad.any()
    assert rnn.weight_ih_l0.grad.any()
    rnn.set_mask(None)
    assert rnn.density == 1
    assert not rnn.masks()


def test_copies_and_files_carry_the_masks():
    model, x = net(), torch.randn(5, 1, 8, 8)
    sparse.sparsify(model, random_masks(model)).eval()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert twin.fc._pack.mask is twin.fc.weight_mask
    twin.fc.set_mask(torch.zeros(64, 288, dtype=torch.bool))
    assert model.fc.density > 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))


def test_written_buffer_is_seen():
    layer = sparse.MaskedLinear(300, 80)
    layer.set_mask(torch.rand(80, 300) < 0.1)
    x = torch.randn(64, 300)
    layer(x)
    layer.weight_mask.zero_()
    torch.testing.assert_close(layer(x), layer.bias.expand(64, 80))


def test_shared_parameter_is_masked_wherever_it_is_used():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 5)
            self.out = nn.Linear(5, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.embed(x))

    model = Tied()
    mask = torch.rand(7, 5) < 0.5
    sparse.sparsify(model, {"out.weight": mask})
    model(torch.arange(7)).pow(2).sum().backward()
    assert not model.embed.weight.grad[~mask].any()


class Past(nn.Module):
    """Reads its weights past the layers: by F.linear, and in the fast path of torch's encoder layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.encoder(nn.functional.linear(x.flatten(2), self.fc.weight, self.fc.bias))[:, 0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [Net, Past])
def test_momentum_from_before_the_mask_counts_for_nothing(make, optimizer):
    torch.manual_seed(0)
    model, x = make(), torch.randn(5, 1, 8, 8)
    masks = MaskSet({n: m for n, m in random_masks(model).items() if "running" not in n})
    early = optimizer(model.parameters())
    train(model, early, 3)
    sparse.sparsify(model, masks)
    train(model, early, 2)
    assert any(p[~masks[n]].any() for n, p in model.named_parameters())  # the case is the one we mean
    model.eval()
    with torch.no_grad():
        y = model(x)
        assert not any(p[~masks[n]].any() for n, p in model.named_parameters())
        model.state_dict()
        assert torch.equal(model(x), y)
        # another order of sums where the compact layers are smaller
        torch.testing.assert_close(sparse.compact(model)(x), y, rtol=1e-4, atol=1e-5)
    train(model, early, 1)
    assert not any(t[~masks[n]].any() for n, t in model.state_dict().items() if n in masks)


def test_layer_compiles_in_one_graph():
    layer = sparse.MaskedLinear(60, 40)
    layer.set_mask(torch.rand(40, 60) < 0.2)
    x = torch.randn(8, 60)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_errors_name_what_does_not_fit():
    model = net()
    with pytest.raises(ValueError, match="no tensor 'fc9.weight'"):
        sparse.sparsify(model, {"fc9.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"'fc.weight' has shape \(2, 2\)"):
        sparse.sparsify(model, {"fc.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="torch.bool"):
        sparse.sparsify(model, {"fc.weight": torch.ones(64, 288)})
    hollow = net().to("meta")
    with pytest.raises(ValueError, match="'fc.weight' is on the meta device, without values; call model.to_empty"):
        sparse.sparsify(hollow, {"fc.weight": torch.ones(64, 288, dtype=torch.bool)})
    assert type(model.fc) is type(hollow.fc) is nn.Linear
    with pytest.raises(ValueError, match="entry by entry"):
        sparse.MaskedLinear(3, 2).set_mask(torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no mask fits 'weight'; wanted one of weight_ih_l0"):
        sparse.MaskedGRU(3, 2).set_mask({"weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match="masks is a Tensor, wanted parameter name -> bool tensor.*'weight_ih_l0'"):
        sparse.MaskedGRU(3, 2).set_mask(torch.ones(6, 3, dtype=torch.bool))
    for wrong in (None, [mask := torch.ones(64, 288, dtype=torch.bool)], mask):
        with pytest.raises(ValueError, match="MaskSet: masks is a .*, wanted a mapping from tensor name"):
            sparse.sparsify(model, wrong)
