"""What a round of autoflip keeps: budgets, narrow models, norms and inputs."""

import pytest
import torch

from autoflip import MaskSet, codec, explore, fed, meter, prune
from autoflip.fed.budget import USUAL_FLOPS, channels_within, cost_of, usual_shares
from autoflip.fed.job import Job
from autoflip.fed.models import build
from autoflip.fed.state import Guidance
from autoflip.fed.strategies import METHODS
from autoflip.groups import find_groups
from autoflip.nn import compact

SMALL = ["fed.rounds=5", "fed.clients=4", "fed.fraction=0.5", "train.epochs=1", "data.samples_per_client=40"]


def _config(*overrides):
    return fed.Config.load(overrides=[*SMALL, *overrides])


@pytest.mark.parametrize("budget, value", [("flops", 0.3), ("bytes", 0.05)])
def test_budgets_are_met_by_fewer_channels_and_not_by_far_fewer(budget, value):
    wire = ["wire.values=int4", "wire.downlink=int4", "prune.density=1", "prune.channels=1", "prune.round_to=1"]
    config = _config("fed.against=none", "fed.rounds=2", *wire, f"prune.{budget}={value}")
    result = fed.run(config)
    job = Job(config)
    small = compact(job.blank, masks=result.masks)

    def cost(net):
        if budget == "bytes":
            state = {n: t for n, t in net.state_dict().items() if t.is_floating_point()}
            return len(codec.encode(state, values="int4" if net is small else "fp32", schema=codec.Schema.of(state)))
        x = torch.zeros(2, *job.dataset.input_shape)
        return meter.count_flops(lambda: net(x).sum().backward())

    assert 0.9 * value < cost(small) / cost(job.blank) <= 1.01 * value
    assert fed.run(_config("fed.against=none", "fed.rounds=2", *wire)).records[-1].channels == 1


class _Boxed(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return {"logits": self.model(x), "more": (x, [self.model(x)], None)}


def test_a_round_is_priced_whatever_the_model_returns_and_with_a_batch_of_one():
    def cost(model):
        scores = {name: p.detach().abs() for name, p in model.named_parameters() if p.ndim == 2}
        masks = prune.hybrid(model, scores, density=1.0, channels=0.5, round_to=1)
        return cost_of(model, masks, torch.ones(1, 5), find_groups(model), ("int4", "int4"))

    layers = [torch.nn.Linear(5, 20), torch.nn.BatchNorm1d(20), torch.nn.ReLU(), torch.nn.Linear(20, 3)]
    model = torch.nn.Sequential(*layers)
    assert cost(_Boxed(model)) == cost(model)
    assert cost(model)[0] == pytest.approx(0.5)


def test_a_budget_that_nothing_fits_gives_the_smallest_model():
    assert channels_within(lambda share: (0.2 + share, 0.0), 0.1, 0.0, 1.0) < 0.01
    assert channels_within(lambda share: (share**2, share), 0.25, 0.9, 1.0) == pytest.approx(0.5, abs=0.01)
    assert channels_within(lambda share: (share**2, share), 0.25, 0.3, 1.0) == pytest.approx(0.3, abs=0.01)
    assert channels_within(lambda share: (share, share), 0.0, 0.0, 0.7) == 0.7


def test_channels_that_cost_flops_go_first_unless_told_otherwise_or_in_a_model_with_norms():
    def kept(*settings):
        masks = fed.run(_config("fed.against=none", "fed.rounds=2", "prune.round_to=1", *settings)).masks
        return [int(masks[name].flatten(1).any(1).sum()) for name in masks if masks[name].ndim == 4]

    plain = kept("prune.flops_exponent=0")
    assert sum(kept("prune.flops_exponent=0.5")) < sum(kept()) < sum(plain)
    normed = ["model.name=resnet8-group", "data.samples_per_client=32"]
    assert kept(*normed) == kept(*normed, "prune.flops_exponent=0") != kept(*normed, "prune.flops_exponent=0.5")


def test_a_narrow_model_keeps_more_of_its_channels_unless_told_otherwise():
    def share(name, shape):
        return usual_shares(find_groups(build(name, input_shape=shape, num_classes=10)))

    # 64 channels at most, in units of whole norm groups
    assert share("resnet8-group", (3, 32, 32)) == (20 / 64, 28 / 64)
    assert share("two-cnn", (3, 32, 32)) == share("mlp", (561,)) == (0.25, 0.25)
    assert usual_shares(find_groups(torch.nn.Sequential(torch.nn.Linear(4, 20), torch.nn.Linear(20, 2)))) == (1, 1)
    assert usual_shares(find_groups(torch.nn.Linear(4, 2))) == (1, 1)  # nothing to remove
    small = ["fed.against=none", "model.name=resnet8-group", "fed.rounds=2"]
    kept = [fed.run(_config(*small, f"prune.channels={c}")).records[-1].channels for c in (0, 0.25, 28 / 64)]
    assert kept[1] < 0.75 * kept[0]
    assert kept[0] < kept[2]


def _with_attention(heads: int) -> torch.nn.Module:
    """Return a narrow model; its attention, if any, costs what it costs: its projections are never shrunk."""
    attention = [torch.nn.TransformerEncoderLayer(16, heads, 64, dropout=0.0, batch_first=True)] if heads else []
    layers = [
        torch.nn.Linear(16, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 16),
    ]
    return torch.nn.Sequential(*layers, *attention)


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("settings", [[], ["prune.channels=0.4"], ["prune.flops=0.9"], ["prune.bytes=0.09"]])
def test_a_narrow_model_keeps_no_more_than_its_usual_flops_and_no_less_than_20_channels(heads, settings):
    torch.manual_seed(heads)
    model, example = _with_attention(heads), torch.randn(4, 8, 16)
    strategy = METHODS["autoflip"](_config("prune.round_to=1", *settings), model, example)
    params = {name: p.detach() for name, p in model.named_parameters()}
    ones = {name: torch.ones_like(p) for name, p in params.items()}
    guidance = Guidance(ones, ones, params)
    share = strategy._channels(guidance)
    least, most = usual_shares(strategy._groups)
    assert (least, most) == (20 / 64, 28 / 64)

    def flops(kept):
        masks = strategy._hybrid(guidance, 1.0, kept)
        return cost_of(model, masks, example, strategy._groups)[0]

    if settings:  # the user's word is taken: up to the usual share, but not down to the usual FLOPs
        assert flops(share) > USUAL_FLOPS
        assert share == {"prune.channels=0.4": 0.4}.get(settings[0], most)
    elif heads:
        assert share == least
        assert flops(share) > USUAL_FLOPS
    else:
        assert least < share < most
        assert 0.9 * USUAL_FLOPS < flops(share) <= USUAL_FLOPS


def test_narrow_models_with_norms_take_longer_steps_once_they_are_narrow(monkeypatch):
    def factors(name, *overrides):
        model = build(name, input_shape=(1, 8, 8), num_classes=10)
        strategy = METHODS["autoflip"](_config(*overrides), model)
        return [strategy.lr_factor(r) for r in (0, 1, 7)]

    assert factors("mlp") == [1, 1, 1]
    assert factors("resnet8-group") == factors("resnet8") == [1, 2, 2]
    assert factors("resnet8-group", "prune.lr_factor=1.5") == factors("mlp", "prune.lr_factor=1.5") == [1, 1.5, 1.5]
    assert METHODS["fedavg"](_config(), build("resnet8", input_shape=(1, 8, 8), num_classes=10)).lr_factor(3) == 1
    norms = build("resnet8", input_shape=(1, 8, 8), num_classes=10)
    assert METHODS["autoflip-paper"](_config(), norms, torch.zeros(2, 1, 8, 8)).lr_factor(3) == 1  # no channel goes
    assert METHODS["autoflip"](_config("prune.channels=1"), norms, torch.zeros(2, 1, 8, 8)).lr_factor(3) == 1

    taken = []
    real = explore.local_steps
    monkeypatch.setattr(explore, "local_steps", lambda *a, **k: taken.append(k["lr"]) or real(*a, **k))
    config = _config("fed.against=none", "fed.rounds=2", "prune.lr_factor=3")
    fed.run(config)
    assert set(taken) == {config.train.lr, 3 * config.train.lr}


@pytest.mark.parametrize("restore", ["layer", "row"])
def test_pruned_layers_get_their_norm_back(restore):
    strategy = METHODS["autoflip"](_config(f"prune.restore={restore}", "prune.rescale=100"), torch.nn.Linear(6, 3))
    g = torch.Generator().manual_seed(0)
    params = {"weight": torch.randn(3, 6, generator=g), "bias": torch.ones(3)}
    mask = torch.tensor([[True, False] * 3, [False] * 6, [True] * 6])
    settled = strategy.settle(params, MaskSet({"weight": mask}))["weight"]
    assert float(settled[~mask].abs().sum()) == 0
    if restore == "layer":
        assert float(settled.norm()) == pytest.approx(float(params["weight"].norm()), rel=1e-5)
    else:
        assert settled.norm(dim=1)[[0, 2]].tolist() == pytest.approx(params["weight"].norm(dim=1)[[0, 2]].tolist())
        assert torch.equal(settled[2], params["weight"][2])


def test_fewer_inputs_cost_fewer_flops_and_bytes_and_the_model_still_learns():
    wide = ["fed.against=none", "model.name=mlp", "prune.channels=0.5"]
    whole, less = (fed.run(_config(*wide, f"prune.inputs={share}")) for share in (1.0, 0.5))
    assert less.masks["fc1.weight"].any(0).sum() == 32
    assert whole.masks["fc1.weight"].any(0).sum() == 64
    last = whole.records[-1]
    # two products a step (forward, weight gradient) over 32 columns less
    saved = 2 * 2 * 32 * int(less.masks["fc1.weight"].any(1).sum()) * sum(c.examples for c in last.clients)
    assert last.flops - less.records[-1].flops == saved
    assert less.cost.bytes < whole.cost.bytes
    assert torch.equal(less.params["fc1.weight"] != 0, less.masks["fc1.weight"])
    assert less.accuracy > 0.3  # ten classes
