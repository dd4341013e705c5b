"""A compact model is the masked model: values, gradients and buffers, in both modes."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nets import BUILDERS, build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoflip import curvature, prune
from autoflip.fed import models
from autoflip.groups import Groups
from autoflip.masks import MaskSet
from autoflip.nn import sparsify
from autoflip.nn.compact import Plan, compact


def scores_of(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=g) for name, w in prune.weights(model).items()}


def masked(model, masks):
    full = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in full.state_dict().items():
            if name in masks:
                tensor.mul_(masks[name])
    return full


def step(model, x, train):
    """One forward and backward; returns the output, the gradients and the buffers afterwards."""
    outputs = {}

    def keep(module, _, output):
        output.retain_grad()
        outputs[module] = output

    for module in model.modules():
        if getattr(module, "running_mean", None) is not None and module.weight is None:
            module.register_forward_hook(keep)
    model.train(train)
    y = model(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weight).sum().backward()
    for norm, output in outputs.items():  # whether anything reads its channels, as a gradient of its weight would tell
        norm.read = None if output.grad is None else output.grad.abs().sum((0, *range(2, output.dim())))
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return y.detach(), grads, {n: b for n, b in model.named_buffers() if n in model.state_dict()}


def assert_same(model, x, masks, small=None):
    small = compact(model, masks=masks) if small is None else small
    for train in (False, True):
        full, less = masked(model, masks), copy.deepcopy(small)
        y, grads, buffers = step(full, x, train)
        y2, grads2, buffers2 = step(less, x, train)
        # float64 sums in another order: 1e-12 is about 4000 eps
        torch.testing.assert_close(y2, y, rtol=1e-12, atol=1e-12)
        for name, grad in small.plan.expand(grads2).items():
            keep = masks[name] if name in masks else torch.ones_like(grad, dtype=torch.bool)
            torch.testing.assert_close(grad[keep], grads[name][keep], rtol=1e-9, atol=1e-11, msg=name)
        for name, buffer in small.plan.shrink(buffers).items():
            owner = name.rpartition(".")[0]
            grad = grads2.get(f"{owner}.weight", getattr(less.get_submodule(owner), "read", None))
            read = grad != 0 if grad is not None and grad.shape == buffer.shape else ...  # others may differ
            torch.testing.assert_close(buffers2[name][read], buffer[read], rtol=1e-12, atol=1e-12, msg=name)
    return small


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_compact_equals_masked_model(name, seed):
    model, x = build(name)
    masks = prune.hybrid(model, scores_of(model, seed), density=0.35, channels=0.6)
    small = assert_same(model, x, masks)
    assert sum(small.plan.removed.values()) > 0
    with pytest.raises(AttributeError):
        _ = model.plan  # the original is untouched


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_compact_equals_masked_model_when_channels_die_by_accident(name, density):
    model, x = build(name)
    assert_same(model, x, prune.random(model, density))


REMOVED = {
    "mlp": {"1", "5", "6.1"},
    "two_cnn": {"conv1", "conv2", "fc1"},
    "residual": {"stem", "a1", "a2", "b1"},  # a2, the shortcut and b2 leave together
    "concat": {"a", "b", "squeeze", "c"},
    "separable": {"stem", "point", "wide", "grouped", "last"},
    "text": {"embed", "lstm:0", "lstm:1"},
    "gru": {"conv", "gru", "rnn"},
    "encoder": {"encoder.layers.0.linear1", "encoder.layers.1.linear1", "head.0"},
    "decoder": {"down", "up"},
}


@pytest.mark.parametrize("name", BUILDERS)
def test_every_layer_that_can_shrink_does(name):
    model, _ = build(name)
    masks = prune.hybrid(model, scores_of(model), density=1, channels=0.6, round_to=1)
    small = compact(model, masks=masks)
    assert {layer for layer, count in small.plan.removed.items() if count} == REMOVED[name]


def test_sizes_of_the_small_layers():
    model, _ = build("separable")
    small = compact(model, masks=prune.hybrid(model, scores_of(model), density=1, channels=0.5, round_to=1))
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            fresh = nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size, groups=module.groups)
            assert fresh.weight.shape == module.weight.shape
    assert small.deep.groups == small.deep.in_channels == small.stem.out_channels < 8
    assert small.twice.out_channels == 2 * small.twice.groups == small.norm2.num_features
    assert small.grouped.groups == 4
    assert small.norm4.num_channels == 2 * small.norm4.num_groups == small.last.out_channels < 24
    assert small.norm.num_groups == small.norm.num_channels == small.stem.out_channels

    model, _ = build("text")
    small = compact(model, masks=prune.hybrid(model, scores_of(model), density=1, channels=0.5))
    assert small.lstm.hidden_size == small.out.in_features < 12
    assert small.lstm.input_size == small.embed.embedding_dim


def test_stacked_lstm_loses_equal_counts():
    model, x = build("text")
    masks = {n: torch.ones(t.shape, dtype=torch.bool) for n, t in model.state_dict().items() if "weight" in n}
    for unit in (1, 5):  # two dead units below ...
        masks["lstm.weight_hh_l0"][:, unit] = masks["lstm.weight_ih_l1"][:, unit] = False
    masks["lstm.weight_hh_l1"][:, 3] = masks["out.weight"][:, 3] = False  # ... and one above
    small = assert_same(model, x, MaskSet(masks))
    assert small.plan.removed == {"lstm:0": 1, "lstm:1": 1}
    assert "lstm:0: left as it is" in small.plan.report()


def test_a_chain_of_dead_units_goes_at_once():
    model, x = build("two_cnn")
    masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in prune.weights(model).items()}
    masks["fc2.weight"][:, :7] = False  # units 0-6 of fc1 reach nothing ...
    masks["fc1.weight"][7:, : 9 * 4] = False  # ... and only they read channels 0-3
    small = assert_same(model, x, MaskSet(masks))
    assert small.plan.removed == {"conv2": 4, "fc1": 7}


def test_units_that_are_exactly_zero_go_though_something_reads_them():
    model, x = build("mlp")
    masks = {n: torch.ones(t.shape, dtype=torch.bool) for n, t in model.state_dict().items() if t.ndim}
    for name in ("1.weight", "1.bias", "2.weight", "2.bias", "5.weight", "5.bias"):
        masks[name][:3] = False
    small = assert_same(model, x, MaskSet(masks))
    assert small.plan.removed == {"1": 3}  # layer 5 goes through a sigmoid: 0 becomes 1/2


def test_a_dead_layer_keeps_one_unit():
    model, x = build("two_cnn")
    masks = MaskSet({"conv2.weight": torch.zeros_like(model.conv2.weight, dtype=torch.bool)})
    small = assert_same(model, x, masks)
    assert small.conv1.out_channels == 1
    assert "conv1: left as it is" in small.plan.report()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else self.a(x)[:, :2]


class Lenet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(32, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).view(-1, 32))


def test_what_cannot_be_shrunk_is_left_and_reported():
    model = Branches()
    masks = MaskSet({"b.weight": torch.tensor([[True, False, True, False]] * 2)})
    small = compact(model, masks=masks)
    assert small.a.out_features == 4
    assert "torch.fx cannot trace Branches" in small.plan.report()
    assert torch.equal(small.b.weight != 0, masks["b.weight"])

    small = compact(Lenet(), torch.zeros(2, 1, 4, 4), MaskSet({"fc.weight": torch.zeros(3, 32, dtype=torch.bool)}))
    assert small.conv.out_channels == 8
    assert "x.flatten(1) can be followed" in small.plan.report()


def test_masks_of_another_model_are_refused():
    with pytest.raises(ValueError, match="another model"):
        compact(nn.Linear(2, 2), masks=MaskSet({"fc.weight": torch.ones(2, 2, dtype=torch.bool)}))
    with pytest.raises(ValueError, match="does not run on example_inputs"):
        compact(nn.Linear(2, 2), torch.zeros(1, 3), MaskSet({}))


def test_no_masks_and_no_groups_leave_the_model_alone():
    model, x = build("residual")
    small = assert_same(model, x, MaskSet({}))
    assert not small.plan.keep
    masks = prune.hybrid(model, scores_of(model), 0.3, 0.5)
    assert not compact(model, masks=masks, groups=Groups()).plan.keep


@pytest.mark.parametrize("name", BUILDERS)
def test_plan_maps_every_tensor_both_ways(name, tmp_path):
    model, _ = build(name)
    masks = prune.hybrid(model, scores_of(model), density=0.3, channels=0.5)
    small = compact(model, masks=masks)
    plan, full, less = small.plan, masked(model, masks).state_dict(), small.state_dict()
    assert set(plan.shapes) == set(full) == set(less)

    shrunk, grown = plan.shrink(full), plan.expand(less)
    for key in full:
        assert torch.equal(shrunk[key], less[key])
        assert torch.equal(plan.shrink({key: grown[key]})[key], less[key])
        outside = plan.expand({key: torch.zeros_like(less[key])}, fill=1)[key].bool()
        assert int(outside.sum()) == full[key].numel() - less[key].numel()
        assert torch.equal(grown[key][~outside], full[key][~outside])
    assert plan.shrink_masks(masks).kept <= masks.kept
    assert all(m.shape == less[key].shape for key, m in plan.shrink_masks(masks).items())

    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert all(torch.equal(again.shrink(full)[key], less[key]) for key in full)
    assert again.report() == plan.report()
    assert repr(plan).startswith("Plan(")
    assert "units removed" in repr(plan)
    assert "tensor(" not in repr(plan)


@pytest.mark.parametrize("name", [n for n in models.NAMES if n != "femnist-cnn"])  # two-cnn, eight times larger
def test_the_networks_of_federated_benchmarks_shrink(name):
    shape = {"char-lstm": (8,), "two-cnn": (1, 12, 12)}.get(name, (1, 8, 8))
    model = models.build(name, input_shape=shape, num_classes=10).double()
    x = torch.randint(10, (3, *shape)) if len(shape) == 1 else torch.rand(3, *shape, dtype=torch.float64)
    small = assert_same(model, x, prune.hybrid(model, scores_of(model), density=0.1, channels=0.4))
    kept = sum(int(torch.Size(small.plan.small_shape(n)).numel()) for n in small.plan.shapes)
    assert kept < 0.4 * sum(t.numel() for t in model.state_dict().values())


def test_plan_errors(tmp_path):
    plan = Plan({"w": (3,)}, {"w": {0: torch.tensor([1])}})
    with pytest.raises(ValueError, match="no tensor 'v'"):
        plan.shrink({"v": torch.zeros(3)})
    with pytest.raises(ValueError, match="expand\\(\\) takes compact ones"):
        plan.expand({"w": torch.zeros(3)})
    (tmp_path / "p").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a plan"):
        Plan.load(tmp_path / "p")


def test_flops_really_fall():
    model, x = build("residual")
    small = compact(model, x, prune.hybrid(model, scores_of(model), density=0.2, channels=0.5, round_to=1))

    def flops(net):
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
        return counter.get_total_flops()

    assert flops(small) < 0.4 * flops(model)  # half the channels: about a quarter, floors of four aside


def test_modes_gradients_and_flags_survive():
    model, x = build("two_cnn")
    model.conv1.weight.requires_grad_(False)
    model.fc1.eval()
    model(x).sum().backward()
    small = compact(model, x, prune.hybrid(model, scores_of(model), 0.3, 0.5))
    assert not small.conv1.weight.requires_grad
    assert small.fc2.weight.grad is None
    assert small.training
    assert not small.fc1.training


@settings(max_examples=25)
@given(st.sampled_from(sorted(BUILDERS)), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 99))
@example("separable", 0.03125, 0.5, 40)  # a norm without a weight keeps statistics of a channel that nothing reads
@example("mlp", 0.0625, 0.5, 67)  # layers of one channel that nothing reads, which read nothing themselves
def test_any_density_any_channels(name, density, channels, seed):
    model, x = build(name)
    assert_same(model, x, prune.hybrid(model, scores_of(model, seed), density, channels))


@pytest.mark.parametrize("name", BUILDERS)
def test_masks_come_from_the_sparse_model_itself(name):
    model, x = build(name)
    masks = prune.hybrid(model, scores_of(model), density=0.3, channels=0.5)
    sparse = sparsify(copy.deepcopy(model), masks)
    assert_same(model, x, masks, compact(sparse))
    small = compact(sparse)
    assert all(type(m).__module__.startswith(("torch.", "nets")) for m in small.modules())
    for train in (False, True):
        want, got = step(sparse, x, train), step(small, x, train)
        torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
    # and on: the small model takes the shrunk masks
    torch.testing.assert_close(sparsify(small, small.plan.shrink_masks(masks))(x), sparse(x), rtol=1e-12, atol=1e-12)


def test_hooks_outside_layers_count_as_masks():
    model = sparsify(nn.Sequential(nn.Conv1d(1, 4, 1), nn.Conv1d(4, 2, 1)), MaskSet({"1.weight": KEEP_TWO}))
    assert compact(model)[0].out_channels == 2


def test_the_package_name_is_the_function():
    import autoflip

    assert autoflip.compact is compact
    assert autoflip.nn.compact is compact


KEEP_TWO = torch.tensor([True, False, False, True]).expand(2, 4)[..., None].clone()


def _flat():
    """A model that flattens its input, in float64, and a batch of eight."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double(), torch.randn(8, 3, 16, dtype=torch.float64)


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_pruned_inputs_leave_the_first_layer(density):
    model, x = _flat()
    masks = prune.hybrid(model, scores_of(model), density=density, channels=0.75, inputs=0.25)
    small = assert_same(model, x, masks)
    assert small[1].weight.shape[1] == 12 if density == 1 else small[1].weight.shape[1] <= 12
    assert list(small.state_dict()) == list(model.state_dict())  # what is picked is no state
    assert small.plan.small_shape("1.weight") == tuple(small[1].weight.shape)
    sparse = sparsify(copy.deepcopy(small), small.plan.shrink_masks(masks))
    assert_same(model, x, masks, sparse)


def test_a_model_of_one_layer_and_one_compacted_twice():
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 3).double(), torch.randn(4, 16, dtype=torch.float64)
    first, second = torch.ones(3, 16, dtype=torch.bool), torch.ones(3, 8, dtype=torch.bool)
    first[:, ::2], second[:, :3] = False, False
    once = assert_same(layer, x, MaskSet({"weight": first}))
    assert once.weight.shape == (3, 8)
    twice = assert_same(once, x, MaskSet({"weight": second}))
    assert twice.weight.shape == (3, 5)
    torch.testing.assert_close(twice(x), x[:, [7, 9, 11, 13, 15]] @ layer.weight[:, [7, 9, 11, 13, 15]].T + layer.bias)


def test_a_few_dead_inputs_stay_as_zero_columns():
    model, x = _flat()
    mask = torch.ones(12, 48, dtype=torch.bool)
    mask[:, :11] = False  # 12 of 48 would be a quarter
    assert assert_same(model, x, MaskSet({"1.weight": mask}))[1].weight.shape == (12, 48)


def test_curvature_of_a_layer_that_picks_its_inputs():
    model, x = _flat()
    masks = prune.hybrid(model, scores_of(model), density=1, channels=1, inputs=0.5)
    small, y = compact(model, masks=masks).double(), torch.arange(8) % 3
    found = curvature.hessian_diagonal(small, nn.functional.cross_entropy, (x, y), method="ggn-exact")
    want = curvature.hessian_diagonal(masked(model, masks), nn.functional.cross_entropy, (x, y), method="ggn-exact")
    for name, h in small.plan.shrink(want).items():
        torch.testing.assert_close(found[name], h, rtol=1e-9, atol=1e-12)
