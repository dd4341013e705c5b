"""Models that use a layer, a size or a shape in two ways: what is not followed stays, and no result is wrong."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import autoflip
from autoflip import MaskSet, prune
from autoflip.groups import find_groups


class Called(nn.Module):
    """Runs ``forward_of(self, x)`` on the layers it is given."""

    def __init__(self, forward_of, **layers):
        super().__init__()
        self.forward_of = forward_of
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.forward_of(self, x)


def without(shape, *columns):
    """A mask without those entries of its second dimension."""
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, list(columns)] = False
    return mask


def check(model, example, masks):
    """Return the compact model, after it has given what the masked one gives."""
    small = autoflip.compact(model, example, masks)
    with torch.no_grad():
        want = autoflip.sparsify(model.eval(), masks)(example)
        torch.testing.assert_close(small.eval()(example), want, rtol=1e-5, atol=1e-6)  # float32 sums in another order
    return small


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_projected_lstm_keeps_its_hidden_size(hybrid):
    model = Called(
        lambda m, x: m.out(m.lstm(m.table(x))[0][:, -1]),
        table=nn.Embedding(9, 16),
        lstm=nn.LSTM(16, 8, proj_size=4, batch_first=True),
        out=nn.Linear(4, 3),
    )
    masks = {"lstm.weight_ih_l0": without((32, 16), *range(6))}
    if hybrid:
        masks = prune.hybrid(model, {name: w.abs() for name, w in prune.weights(model).items()}, 0.5, 0.5)
    small = check(model, torch.randint(0, 9, (3, 5)), masks)
    assert small.lstm.input_size < 16
    assert (small.lstm.hidden_size, small.lstm.proj_size) == (8, 4)


def twice(layer, order):
    layers = {"layer": layer, "mid": nn.Conv2d(4, 4, 3), "out": nn.Linear(4, 3)}
    if order == "before":
        return Called(lambda m, x: m.out(m.layer(m.mid(m.layer(x))).mean((2, 3))), **layers)
    return Called(lambda m, x: m.out(m.layer(m.mid(x)).mean((2, 3))) + m.layer(x).mean((1, 2, 3))[:, None], **layers)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        nn.GroupNorm(4, 4),
        nn.GroupNorm(2, 4, affine=False),
        nn.PReLU(4),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
    ],
    ids=repr,
)
def test_a_layer_that_also_reads_the_input_keeps_its_channels(layer, order):
    model = twice(layer, order)
    small = check(model, torch.randn(2, 4, 6, 6), {"out.weight": without((3, 4), 1, 2)})
    assert small.mid.weight.shape == (4, 4, 3, 3)


def test_one_activation_for_all_layers_of_which_one_is_not_followed():
    model = Called(
        lambda m, x: m.out(m.act(m.b(m.act(m.norm(m.a(x)))))),
        act=nn.PReLU(8), norm=nn.LayerNorm(8), a=nn.Linear(6, 8), b=nn.Linear(8, 8), out=nn.Linear(8, 3),
    )  # fmt: skip
    check(model, torch.randn(4, 6), {"out.weight": without((3, 8), 0, 5), "b.weight": without((8, 8), 1)})


@pytest.mark.parametrize("at", [0, 1])
def test_a_layer_whose_forward_was_replaced_is_not_torchs(at):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    plain = type(model[at]).forward
    model[at].forward = types.MethodType(lambda self, x: plain(self, x).softmax(-1).cumsum(-1), model[at])
    small = check(model, torch.randn(5, 4), {"2.weight": without((3, 6), 0, 1)})
    assert small[0].out_features == 6


def test_tensors_of_unknown_rank_joined_along_time():
    model = Called(
        lambda m, x: m.out(torch.cat([m.a(m.norm(x)), m.a(m.norm(-x))], 1).unsqueeze(-1).flatten(1)),
        norm=nn.LayerNorm(6), a=nn.Linear(6, 4), out=nn.Linear(40, 3),
    )  # fmt: skip
    check(model, torch.randn(2, 5, 6), {"out.weight": without((3, 40), *range(5), *range(20, 25))})


def test_rows_of_unknown_rank_that_are_joined_are_followed():
    layers = {"a": nn.Linear(6, 4), "b": nn.Linear(6, 4), "out": nn.Linear(8, 3)}
    model = Called(lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], 1).flatten(1)), **layers)
    masks = MaskSet({"out.weight": without((3, 8), 1, 2, 6)})
    small = autoflip.compact(model, masks=masks)
    assert (small.a.out_features, small.b.out_features, small.out.in_features) == (2, 3, 5)


@pytest.mark.parametrize(
    "forward_of",
    [
        lambda m, x: m.out(m.conv(x).mean(2) + x.view(x.size(0), m.conv(x).size(1), -1).mean(2)),
        lambda m, x: m.out(m.conv(x).mean(2) + x[:, : m.conv(x).size(1)].mean((1, 2))[:, None]),
        lambda m, x: m.out(m.conv(x).mean(2) + F.pad(x, (0, m.conv(x).size(1)))[:, :1].mean(2)),
        lambda m, x: m.out(m.conv(x).mean(2) + F.interpolate(x, size=m.conv(x).shape[1]).mean((1, 2))[:, None]),
    ],
)
def test_a_count_of_channels_that_shapes_another_tensor(forward_of):
    model = Called(forward_of, conv=nn.Conv1d(4, 4, 3), out=nn.Linear(4, 3))
    check(model, torch.randn(2, 4, 9), {"out.weight": without((3, 4), 1, 2)})


def test_weights_of_a_bags_samples_are_read():
    model = Called(
        lambda m, x: m.head(m.bag(torch.zeros(3, 4, dtype=torch.long), per_sample_weights=m.a(x))) + m.out(m.a(x)),
        bag=nn.EmbeddingBag(5, 6, mode="sum"), a=nn.Linear(6, 4), head=nn.Linear(6, 3), out=nn.Linear(4, 3),
    )  # fmt: skip
    check(model, torch.randn(3, 6), {"out.weight": without((3, 4), 1, 2)})


def test_adafactors_means_of_one_unit_come_back():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)
    small = check(model, x, {"2.weight": without((3, 6), 0, 1, 2, 3, 4)})
    assert small[0].out_features == 1
    names = [name for name, _ in small.named_parameters()]
    little, large = torch.optim.Adafactor(small.parameters()), torch.optim.Adafactor(model.parameters())
    small(x).square().sum().backward()
    little.step()
    large.load_state_dict(small.plan.expand_optimizer(little.state_dict(), names))
    model(x).square().sum().backward()
    large.step()  # row_var (3, 1) and col_var (1, 6), or the shapes do not multiply
    back = small.plan.shrink_optimizer(large.state_dict(), names)["state"]
    assert {key: value.shape for key, value in back[2].items()} == {
        key: value.shape for key, value in little.state_dict()["state"][2].items()
    }


def test_a_transformer_layer_with_a_wrapped_linear_leaves_the_rest_alone():
    class Wrapped(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder.linear1 = Wrapped(encoder.linear1)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 3))
    groups = find_groups(model, torch.randn(2, 5, 8))
    assert not groups.reason
    assert set(groups.by_layer()) == {"2"}


def test_plain_mappings_are_masks_too():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    assert autoflip.compact(model, torch.randn(2, 4), {"1.weight": without((3, 6), 0, 1)})[0].out_features == 4
