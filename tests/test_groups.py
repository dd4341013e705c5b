"""Coupled channels: what is tied, what is read, what is frozen and why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import BUILDERS, build
from torch import nn

from autoflip.groups import Slice, find_groups
from autoflip.masks import MaskSet
from autoflip.nn import compact


def owners(groups):
    """Layer -> the names of all tensors its units own slices of; the model's inputs left out."""
    found = {}
    for unit in groups.units:
        if unit.layer.endswith(":inputs"):
            continue
        found.setdefault(unit.layer, set()).update(s.tensor for s in unit.producers + unit.consumers)
    return found


def test_slices_of_one_unit():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    groups = find_groups(model)
    assert [u.layer for u in groups.units] == ["0", "0"]
    assert groups.units[1].producers == tuple(
        Slice(name, 0, (1,)) for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    )
    assert groups.units[1].consumers == (Slice("4.weight", 1, (4, 5, 6, 7)),)
    assert groups.frozen == {"4": "output of the model"}


def test_flattening_a_sequence_tiles_its_units():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = nn.LSTM(2, 3, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(self.lstm(x)[0].flatten(1))

    unit = find_groups(Net()).units[0]
    assert unit.consumers == (Slice("lstm.weight_hh_l0", 1, (0,)), Slice("out.weight", 1, (0, 3)))
    assert unit.producers[0] == Slice("lstm.weight_ih_l0", 0, (0, 3, 6, 9))


def test_residual_and_concatenation():
    groups = find_groups(build("residual")[0])
    tensors = owners(groups)["a2"]
    assert {"short.0.weight", "short.1.running_var", "b2.weight", "n4.bias", "b1.weight", "head.weight"} <= tensors
    assert not any(name.startswith("a1") for name in tensors)

    found = owners(find_groups(build("concat")[0]))
    assert {"a.weight", "b.weight", "norm.weight", "act.weight", "c.weight", "excite.weight"} <= found["a"]
    assert found["squeeze"] == {"squeeze.weight", "squeeze.bias", "excite.weight"}


def test_grouped_convolution_ties_the_same_ranks():
    groups = find_groups(build("separable")[0])
    wide = [u for u in groups.units if u.layer == "wide"]
    assert len(wide) == 8  # 32 channels in 4 groups
    assert wide[1].producers[0] == Slice("wide.weight", 0, (1, 9, 17, 25))
    assert wide[1].consumers == (Slice("grouped.weight", 1, (1,)),)
    assert groups.sizes.keys() == {"norm2", "norm4"}


def test_group_norm_ties_the_channels_of_a_group():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(4, 8), nn.Flatten(), nn.Linear(32, 2))
    groups = find_groups(model)
    assert groups.units[1].producers[0] == Slice("0.weight", 0, (2, 3))
    assert groups.width("0") == 2
    assert len(groups.by_layer()["0"]) == 4


@pytest.mark.parametrize("name", BUILDERS)
def test_finding_groups_changes_nothing(name):
    model, _ = build(name)
    model.train()
    next(model.children()).eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    find_groups(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]


class Body(nn.Module):
    """conv -> whatever a test does with it -> linear."""

    def __init__(self, forward, out=8, extra=None):
        super().__init__()
        self.conv, self.fc, self.extra, self.do = nn.Conv2d(1, 8, 3), nn.Linear(out, 2), extra, forward

    def forward(self, x):
        return self.fc(self.do(self, self.conv(x)))


FROZEN = {
    "layer norm": (lambda m, x: m.extra(x.mean((2, 3))), 8, nn.LayerNorm(8), "LayerNorm"),
    "sizes in code": (lambda m, x: x.view(-1, 8 * 4), 32, None, "sizes of its own"),
    "size in numbers": (lambda m, x: x.mean((2, 3)) * x.size(1) ** -0.5, 8, None, "pow"),
    "mean over channels": (lambda m, x: x.mean(1).flatten(1), 4, None, "mean"),
    "softmax over channels": (lambda m, x: x.softmax(1).mean((2, 3)), 8, None, "softmax"),
    "unknown function": (lambda m, x: torch.fft.fft(x).real.mean((2, 3)), 8, None, "fft"),
    "part of the channels": (lambda m, x: x[:, :4].mean((2, 3)), 4, None, "getitem"),
    "plus an input": (lambda m, x: (x + m.extra).mean((2, 3)), 8, nn.Parameter(torch.ones(8, 1, 1)), "add"),
    "matmul": (lambda m, x: x.mean((2, 3)) @ m.extra, 8, nn.Parameter(torch.ones(8, 8)), "matmul"),
    "attention": (lambda m, x: m.extra(*[x.flatten(2).transpose(1, 2)] * 3)[0].mean(1), 8,
                  nn.MultiheadAttention(8, 2, batch_first=True), "MultiheadAttention"),
    "one channel flattened": (lambda m, x: x.mean((2, 3)) + m.extra(x).flatten(1), 8,
                              nn.ConvTranspose2d(8, 1, (1, 3)), "add"),
    "weights tied": (lambda m, x: m.extra(x.mean((2, 3))), 8, "tie", "tied"),
}  # fmt: skip


@pytest.mark.parametrize("case", FROZEN)
def test_what_is_not_understood_is_frozen_with_a_reason(case):
    do, out, extra, why = FROZEN[case]
    model = Body(do, out, nn.Linear(8, 8) if extra == "tie" else extra)
    if extra == "tie":
        model.second = nn.Linear(8, 8)
        model.second.weight = model.extra.weight
    model(torch.zeros(2, 1, 4, 4))  # the network is a real one
    groups = find_groups(model)
    if case == "weights tied":
        assert "extra" in groups.frozen
    assert why in groups.frozen["conv"]
    assert "conv" not in groups.by_layer()


def test_the_batch_size_may_come_from_the_inputs():
    class Net(nn.Module):
        def __init__(self, turn):
            super().__init__()
            self.conv, self.fc, self.turn = nn.Conv2d(1, 8, 3), nn.Linear(8 * 4, 2), turn

        def forward(self, x):
            batch = x.shape[0]
            x = self.conv(x)
            return self.fc((x.transpose(0, 1) if self.turn else x).reshape(batch, -1))

    assert len(find_groups(Net(False)).by_layer()["conv"]) == 8
    assert "sizes of its own" in find_groups(Net(True)).frozen["conv"]


def test_shape_arithmetic_that_can_be_followed():
    for do in (
        lambda m, x: x.view(x.shape[0], -1),
        lambda m, x: torch.flatten(x, start_dim=1),
        lambda m, x: x.reshape(x.size(0), x.size(1), -1).mean(-1),
        lambda m, x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1),
        lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
        lambda m, x: x.permute(0, 2, 3, 1)[:, 0, ...].transpose(1, 2).amax(dim=2),
        lambda m, x: (2 * x - 1).sum(dim=(-1, -2), keepdim=True).flatten(1),
        lambda m, x: F.adaptive_avg_pool2d(x, 1).view(x.shape[0], x.shape[1]),
        lambda m, x: (F.max_pool2d(x, 2).view(x.size(0), x.size(1), 1, 1).expand_as(x) + x).reshape(x.size(0), -1),
    ):
        out = do(None, torch.zeros(2, 8, 2, 2)).shape[1]
        model, x = Body(do, out).eval(), torch.randn(2, 1, 4, 4)
        unit = find_groups(model).units[3]
        assert unit.producers[0] == Slice("conv.weight", 0, (3,))
        masks = {"fc.weight": torch.ones(2, out, dtype=torch.bool)}
        masks["fc.weight"][:, list(unit.consumers[0].indices)] = False
        small = compact(model, x, MaskSet(masks))
        assert small.conv.out_channels == 7
        with torch.no_grad():
            model.fc.weight *= masks["fc.weight"]
        torch.testing.assert_close(small(x), model(x))


def test_one_unit_spread_over_the_units_of_another_layer():
    class Net(nn.Module):
        def __init__(self, times):
            super().__init__()
            self.a, self.gate, self.b, self.times = nn.Linear(3, 6), nn.Linear(3, 1), nn.Linear(6, 2), times

        def forward(self, x):
            a, gate = self.a(x), self.gate(x)
            return self.b(gate * a if self.times else a - gate)

    for times in (True, False):
        groups = find_groups(Net(times))
        assert owners(groups) == {"a": {"a.weight", "a.bias", "b.weight"}}
        assert groups.frozen["gate"].startswith("spread by")
        assert bool(groups.pure[groups.by_layer()["a"]].all()) == times  # minus a number, zero is none any more


def test_both_directions_of_a_recurrent_layer_shrink_alike():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = nn.LSTM(2, 3, num_layers=2, bidirectional=True), nn.Linear(6, 2)

        def forward(self, x, lengths):
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
            y, (h, _) = self.lstm(packed)
            y, _ = nn.utils.rnn.pad_packed_sequence(y)
            return self.out(y[0] + torch.cat([h[2], h[-1, :, :]], dim=1))

    groups = find_groups(Net())
    assert [len(units) for units in groups.families[0]] == [3, 3, 3, 3]
    unit = next(u for u in groups.units if u.layer == "lstm:1_reverse")
    assert unit.consumers == (Slice("lstm.weight_hh_l1_reverse", 1, (0,)), Slice("out.weight", 1, (3,)))
    below = next(u for u in groups.units if u.layer == "lstm:0_reverse")
    assert below.consumers[1:] == (Slice("lstm.weight_ih_l1", 1, (3,)), Slice("lstm.weight_ih_l1_reverse", 1, (3,)))


def test_both_modes_are_followed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.a(x)
            return self.c(x + self.b(x) if self.training else self.b(x))

    groups = find_groups(Net().eval())
    assert owners(groups) == {"a": {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight"}}


def test_parametrized_and_shared_layers():
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    model.append(nn.Linear(6, 2))
    groups = find_groups(model)
    assert len(groups.by_layer()) == 0
    assert "parametrized" in groups.frozen["0"]
    assert set(find_groups(build("decoder")[0]).by_layer()) == {"down", "up"}  # `same` follows `down`: called twice


def test_models_that_cannot_be_traced_give_an_empty_result():
    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    groups = find_groups(Net(2, 2))
    assert len(groups) == 0
    assert not groups.axes
    assert "cannot trace Net" in groups.reason
    assert find_groups(nn.Linear(2, 2)).frozen == {"": "output of the model"}


def test_buffers_may_be_cut_by_a_size_or_asked_for_their_value():
    class Net(nn.Module):
        def __init__(self, ask):
            super().__init__()
            self.a, self.b, self.ask = nn.Linear(3, 6), nn.Linear(6, 2), ask
            self.register_buffer("table", torch.ones(9, 1))

        def forward(self, x):
            x = x + self.table[: x.size(0)] if not self.ask else x * float(self.table.sum())
            return self.b(self.a(x))

    for ask in (False, True):
        assert len(find_groups(Net(ask)).by_layer()["a"]) == 6


def test_level_takes_back_what_cannot_go():
    groups = find_groups(build("text")[0])
    lower, upper = groups.by_layer()["lstm:0"], groups.by_layer()["lstm:1"]
    removed = torch.zeros(len(groups), dtype=torch.bool)
    removed[lower[:5]] = removed[upper[:2]] = True
    removed[groups.by_layer()["embed"]] = True
    level = groups.level(removed)
    assert int(level[lower].sum()) == int(level[upper].sum()) == 2
    assert int((~level[groups.by_layer()["embed"]]).sum()) == 1
    assert not (level & ~removed).any()


class _TwoReaders(nn.Module):
    """``first`` reads the input; ``again``: and then its own output."""

    def __init__(self, again=False):
        super().__init__()
        self.first, self.skip, self.last, self.again = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2), again

    def forward(self, x):
        hidden = self.first(x / 2)
        return self.last(torch.relu(self.first(hidden) if self.again else hidden) + self.skip(x))


def test_the_columns_of_a_linear_that_reads_the_input_are_units():
    groups = find_groups(_TwoReaders())
    assert set(groups.inputs) == {"first", "skip"}
    unit = next(u for u in groups.units if u.id == int(groups.inputs["first"][2]))
    assert (unit.layer, unit.producers, unit.consumers) == ("first:inputs", (), (Slice("first.weight", 1, (2,)),))
    assert not bool(groups.pure[groups.inputs["first"]].any())  # an input is not zero, whatever is pruned
    assert set(groups.by_layer()) == {"first"}  # no channels


def test_inputs_are_no_units_where_a_layer_also_reads_channels_or_convolves():
    groups = find_groups(_TwoReaders(again=True))
    assert not bool(groups.removable[groups.inputs["first"]].any())
    assert bool(groups.removable[groups.inputs["skip"]].all())
    assert not find_groups(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))).inputs
