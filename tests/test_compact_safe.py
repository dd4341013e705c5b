"""What compact does not follow stays; and where it should follow wrongly, it says so on the examples."""

import pytest
import torch
from test_compact_more import Called, check, without
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import rnn

import autoflip
from autoflip.groups import Groups, find_groups


def removable(model, example, layer):
    return layer in find_groups(model, example).by_layer()


@pytest.mark.parametrize("dim", [2, -2])
def test_squeeze_of_a_dimension_that_stays(dim):
    def forward(m, x):
        h = m.conv(x)
        return m.out(h.mean((2, 3))) * h.squeeze(dim).size(-3)  # the number of channels: nothing was squeezed

    model = Called(forward, conv=nn.Conv2d(2, 6, 3), out=nn.Linear(6, 3))
    check(model, torch.randn(2, 2, 5, 6), {"out.weight": without((3, 6), 1, 4)})


@pytest.mark.parametrize(
    "pooled",
    [
        lambda m, x: m.pool(x).squeeze(3).squeeze(2),
        lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
        lambda m, x: x.mean((2, 3), keepdim=True).relu().squeeze(-1).squeeze(2),
        lambda m, x: x.mean((2, 3)).unsqueeze(1).squeeze(1),
    ],
    ids=["module", "function", "keepdim", "unsqueeze"],
)
def test_squeeze_of_one_entry_is_followed(pooled):
    model = Called(
        lambda m, x: m.out(pooled(m, m.conv(x))),
        conv=nn.Conv2d(2, 6, 3),
        pool=nn.AdaptiveMaxPool2d(1),
        out=nn.Linear(6, 3),
    )
    small = check(model, torch.randn(2, 2, 5, 5), {"out.weight": without((3, 6), 1, 4)})
    assert small.conv.out_channels == 4


class LoRA(nn.Linear):
    """Adds a product of two thin matrices."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down = nn.Parameter(torch.randn(2, self.in_features))
        self.up = nn.Parameter(torch.randn(self.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Doubled(nn.Dropout):
    def forward(self, x):
        return x + 1


class Rolled(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return self.linear2(self.linear1(x).relu().roll(1, -1))


def lora(layer):
    layer.linear1 = LoRA(8, 12)
    return layer


def dropout(layer):
    layer.dropout = Doubled()
    return layer


def block(layer):
    layer._ff_block = lambda x: layer.linear2(layer.linear1(x).relu().roll(1, -1))
    return layer


def activation(layer):
    layer.activation = torch.cos
    return layer


SIZES = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}


@pytest.mark.parametrize(
    "change", [lora, dropout, block, activation, None], ids=lambda c: getattr(c, "__name__", "own")
)
def test_transformer_layers_that_compute_something_else_keep_their_hidden_units(change):
    layer = change(nn.TransformerEncoderLayer(**SIZES)) if change else Rolled(**SIZES)
    model = Called(lambda m, x: m.out(m.body(x).mean(1)), body=nn.TransformerEncoder(layer, 1), out=nn.Linear(8, 3))
    if change is block:  # a deep copy of the encoder's still calls the first layer's
        block(model.body.layers[0])
    rows = torch.arange(12) > 3
    masks = {
        "body.layers.0.linear1.weight": rows[:, None].expand(12, 8).clone(),
        "body.layers.0.linear1.bias": rows,
        "body.layers.0.linear2.weight": without((8, 12), 4, 5),
    }
    if change is block:
        assert not removable(model, torch.randn(2, 5, 8), "body.layers.0.linear1")
        return
    example = torch.randn(2, 5, 8)
    small = check(model, example, masks)
    want = autoflip.sparsify(model, masks)(
        example
    )  # with gradients: without, torch fuses the layer and skips its parts
    torch.testing.assert_close(small(example), want, rtol=1e-5, atol=1e-6)


def test_indices_computed_from_units():
    def forward(m, x):
        h = m.first(x)
        return m.out(m.table(h.abs().to(torch.int64)).mean(1)) + m.head(h)

    layers = {"first": nn.Linear(4, 6), "table": nn.Embedding(9, 5), "out": nn.Linear(5, 3), "head": nn.Linear(6, 3)}
    model, example = Called(forward, **layers), torch.randn(2, 4)
    check(model, example, {"head.weight": without((3, 6), 1, 4)})
    assert not removable(model, example, "first")


@pytest.mark.parametrize("what", ["lengths", "total_length"])
def test_sizes_that_packing_reads(what):
    def forward(m, x):
        width = m.first(x).size(-1)  # 6, unless units of the first layer go
        lengths = [width, 4] if what == "lengths" else [5, 4]
        packed = rnn.pack_padded_sequence(m.lift(x), lengths, batch_first=True)
        states, _ = rnn.pad_packed_sequence(m.lstm(packed)[0], batch_first=True, total_length=width)
        return m.out(states[:, :5].flatten(1)) + m.head(m.first(x)).mean((1, 2))[:, None]

    layers = {"first": nn.Linear(4, 6), "lift": nn.Linear(4, 7), "lstm": nn.LSTM(7, 8, batch_first=True)}
    model = Called(forward, **layers, out=nn.Linear(40, 3), head=nn.Linear(6, 2))
    example = torch.randn(2, 6, 4)
    check(model, example, {"head.weight": without((2, 6), 1)})
    assert not removable(model, example, "first")


def test_joined_tensors_that_are_resized():
    model = Called(
        lambda m, x: m.out(F.interpolate(torch.cat((m.a(x), m.b(x)), 1), 12)),
        a=nn.Linear(4, 6),
        b=nn.Linear(4, 6),
        out=nn.Linear(12, 3),
    )
    rows = torch.arange(6) > 1
    masks = {f"{n}.weight": rows[:, None].expand(6, 4).clone() for n in "ab"} | {"a.bias": rows, "b.bias": rows}
    example = torch.randn(2, 5, 4)
    small = autoflip.compact(model, None, masks)  # without example inputs: nothing says that there are three dimensions
    with torch.no_grad():
        torch.testing.assert_close(small(example), autoflip.sparsify(model, masks)(example), rtol=1e-5, atol=1e-6)


class Widened(nn.Module):
    """Reads how wide a layer is where tracing does not see it."""

    def __init__(self):
        super().__init__()
        self.first, self.out, self.scale = nn.Linear(4, 6), nn.Linear(6, 3), "whole"

    def forward(self, x):
        y = self.out(self.first(x).relu())
        return y * (self.first.out_features if self.scale == "whole" else 1)


MASKS = {"out.weight": without((3, 6), 1, 4)}


def test_what_tracing_does_not_see_is_found_on_the_examples():
    model, example = Widened(), torch.randn(5, 4)
    with pytest.raises(ValueError, match="gives other values on example_inputs than the masked one"):
        autoflip.compact(model, example, MASKS)
    check_values = autoflip.compact(model, example, MASKS, groups=Groups())
    with torch.no_grad():
        torch.testing.assert_close(check_values(example), autoflip.sparsify(model, MASKS)(example))
    model.scale = "none"
    assert autoflip.compact(model, example, MASKS).first.out_features == 4


def test_random_models_and_outputs_without_numbers_are_not_compared():
    model = Called(
        lambda m, x: (F.dropout(m.out(m.first(x).relu()), 0.5), m.out(m.first(x)).argmax(1), "text"),
        first=nn.Linear(4, 6),
        out=nn.Linear(6, 3),
    )
    before = torch.random.get_rng_state()
    small = autoflip.compact(model, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), MASKS)
    assert small.first.out_features == 4
    assert torch.equal(before, torch.random.get_rng_state())
    noisy = Called(lambda m, x: m.out(F.dropout(m.first(x), 0.5)), first=nn.Linear(4, 6), out=nn.Linear(6, 3))
    assert autoflip.compact(noisy, torch.ones(5, 4), MASKS).first.out_features == 4


def test_masked_values_that_are_not_finite_are_compared_too():
    model = Called(lambda m, x: m.out(m.first(x)).log(), first=nn.Linear(4, 6), out=nn.Linear(6, 3))
    small = autoflip.compact(model, torch.randn(50, 4), MASKS)  # the log of a negative number is not a number
    assert small.first.out_features == 4
