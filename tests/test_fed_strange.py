"""Federated runs of unusual models, failing clients and odd folders."""

import copy
import dataclasses
import json
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from autoflip import explore, fed, meter
from autoflip.cli.overrides import overrides_of
from autoflip.fed import client
from autoflip.fed.job import Job
from autoflip.fed.norms import floored, to_group_norm
from autoflip.fed.strategies.base import Strategy
from autoflip.fed.workshop import Workshop

SMALL = [
    "fed.rounds=3",
    "fed.clients=4",
    "fed.fraction=0.5",
    "fed.against=none",
    "train.epochs=1",
    "explore.fraction=0.5",
    "data.samples_per_client=40",
]


class Shuffled(nn.Module):
    """Reads its inputs in an order that an integer buffer keeps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.randperm(64, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("used", torch.arange(64) % 3 > 0)
        self.fc1, self.fc2 = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = x.flatten(1).index_select(1, self.order) * self.used
        return self.fc2(F.relu(self.fc1(x)))


class Remembering(nn.Module):
    """Keeps a mean of what it saw in a buffer that no state_dict has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(64), persistent=False)
        self.fc1, self.fc2 = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            with torch.no_grad():
                self.seen.mul_(0.5).add_(x.mean(0), alpha=2)
        return self.fc2(F.relu(self.fc1(x - self.seen)))


def frozen_below():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model[1].requires_grad_(False)
    return model


def frozen():
    model = frozen_below()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def norm_of_numbers():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def double():
    return norm_of_numbers().double()


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


class Remembers(nn.Linear):
    """Has state that is no tensor."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


def remembers():
    return nn.Sequential(nn.Flatten(), Remembers(64, 10))


def turned():
    return nn.Sequential(
        nn.ConvTranspose2d(1, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)
    )


@pytest.fixture
def models(monkeypatch):
    module = types.ModuleType("strange_models")
    module.shuffled, module.remembering = Shuffled, Remembering
    for make in (frozen_below, frozen, norm_of_numbers, double, lazy, remembers, turned):
        setattr(module, make.__name__, make)
    monkeypatch.setitem(sys.modules, "strange_models", module)


@pytest.mark.parametrize("name", ["shuffled", "remembering"])
@pytest.mark.parametrize("method", ["fedavg", "autoflip"])
def test_buffers_that_do_not_travel_stay_as_they_are(models, method, name):
    config = fed.Config.load(overrides=[*SMALL, f"fed.method={method}", f"model.name=strange_models:{name}"])
    result = fed.run(config)
    model = result.model().eval()
    if name == "shuffled":
        assert torch.equal(model.order, Shuffled().order)
    data = fed.data.load("digits", None).test
    with torch.no_grad():
        accuracy = (model(data.x).argmax(1) == data.y).float().mean().item()
    # the run itself tests a compact model: float32 sums in another order may turn a close call
    assert result.accuracy == pytest.approx(accuracy, abs=2 / len(data.y))


def test_no_variance_falls_below_zero():
    params = {"norm.running_var": torch.tensor([-1e-3, 0.5]), "norm.weight": torch.tensor([-1.0])}
    assert floored(params)["norm.running_var"].tolist() == [0.0, 0.5]
    assert floored(params)["norm.weight"] is params["norm.weight"]
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for method in ("fedavg", "fedavgm", "magnitude"):
        config = fed.Config.load(overrides=[f"fed.method={method}", "fed.against=none"])
        strategy = fed.strategies.METHODS[method](config, model, torch.zeros(2, 2))
        assert isinstance(strategy, Strategy)
        params = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
        params["1.running_var"] = torch.tensor([1e-3, 1.0])
        mean = {n: torch.zeros_like(t) for n, t in params.items()} | {"1.running_var": torch.tensor([-2e-3, 0.0])}
        moved, _ = strategy.step(fed.state.ServerState(params), mean)
        assert moved["1.running_var"].tolist() == [0.0, 1.0]


def test_a_gradient_with_dropout_draws_from_its_seed_alone():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    x, y = torch.randn(16, 4), torch.arange(16) % 2
    before = torch.random.get_rng_state()
    first = explore.absolute_gradient(model, x, y, F.cross_entropy, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    again = explore.absolute_gradient(model, x, y, F.cross_entropy, seed=3)
    other = explore.absolute_gradient(model, x, y, F.cross_entropy, seed=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["2.weight"], other["2.weight"])


@pytest.mark.parametrize("kind", ["fails", "is refused"])
def test_after_a_client_is_left_out_a_resumed_run_is_the_same(kind, monkeypatch, tmp_path):
    plain = client.Client._work

    def work(self, message, view):
        reply = plain(self, message, view)
        if message.round == 1 and self.id % 2:
            if kind == "fails":
                raise RuntimeError("out of battery")
            return dataclasses.replace(reply, examples=10**6)  # more than it has
        return reply

    monkeypatch.setattr(client.Client, "_work", work)
    config = fed.Config.load(overrides=[*SMALL, "fed.rounds=4", "fed.fraction=1.0", "fed.quorum=0"])
    whole = fed.run(config)
    failed = [c for c in whole.records[1].clients if c.error]
    assert len(failed) == 2
    assert all(c.seconds > 0.001 for c in failed)  # a step takes longer

    monkeypatch.setattr(client.Client, "handle", stop_after(client.Client.handle, rounds=2))
    with pytest.raises(KeyboardInterrupt):
        fed.run(config, out=tmp_path / "run")
    monkeypatch.setattr(client.Client, "handle", client.Client.handle.plain)
    resumed = fed.resume(tmp_path / "run")
    assert [r.bytes_down for r in resumed.records] == [r.bytes_down for r in whole.records]
    assert all(torch.equal(resumed.params[name], value) for name, value in whole.params.items())


def stop_after(handle, rounds):
    def stopped(self, payload):
        if client.Message.unpack(payload).round == rounds:
            raise KeyboardInterrupt
        return handle(self, payload)

    stopped.plain = handle
    return stopped


def test_exactly_the_quorum_is_enough(monkeypatch):
    plain = client.Client._train

    def train(self, prepared, message, epochs):
        if self.id >= 14:
            raise RuntimeError("away")
        return plain(self, prepared, message, epochs)

    monkeypatch.setattr(client.Client, "_train", train)
    settings = [*SMALL, "fed.rounds=1", "fed.clients=25", "fed.fraction=1.0", "fed.quorum=0.56", "fed.method=fedavg"]
    result = fed.run(fed.Config.load(overrides=[*settings, "data.partition=iid"]))
    assert sum(c.error is None for c in result.records[0].clients) == 14


def test_flops_of_a_transposed_convolution_are_those_that_are_counted():
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 2, stride=2, bias=False))
    x = torch.zeros(2, 3, 16, 16)
    assert 2 * meter.layer_flops(model, x)["0.weight"] == meter.count_flops(lambda: copy.deepcopy(model)(x))


def test_a_configuration_of_ones_own_in_the_folder_is_kept(tmp_path):
    mine = "# mine\n[fed]\nrounds = 1\n"
    (tmp_path / "config.toml").write_text(mine)
    fed.run(fed.Config.load(tmp_path / "config.toml", overrides=SMALL[1:]), out=tmp_path)
    assert (tmp_path / "config.toml.old").read_text() == mine
    assert fed.Config.load(tmp_path / "config.toml").fed.rounds == 1


@pytest.mark.parametrize("folder", ["emo\U0001f600", "flag\U000e0067", 'quo"te', "back\\slash", "línea"])
def test_folders_of_any_name_come_through(folder, tmp_path):
    config = fed.Config.load(overrides=overrides_of(data__root=folder))
    assert config.data.root == folder
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert fed.Config.load(tmp_path / "config.toml").data.root == folder


@pytest.mark.parametrize("method", ["autoflip", "magnitude", "prunefl", "random", "ssfl"])
def test_frozen_layers_are_not_pruned(models, method):
    settings = [f"fed.method={method}", "prune.density=0.3", "prune.rival_density=0.3", "prune.channels=0.5"]
    result = fed.run(fed.Config.load(overrides=[*SMALL, *settings, "model.name=strange_models:frozen_below"]))
    kept = dict(result.masks)
    assert "1.weight" not in kept or kept.pop("1.weight").all()
    size = sum(kept[name].numel() for name in ("3.weight", "5.weight"))
    assert 0.25 < sum(int(kept[name].sum()) for name in ("3.weight", "5.weight")) / size < 0.35
    with pytest.raises(ValueError, match=f"method '{method}': there is no trainable"):
        fed.run(fed.Config.load(overrides=[*SMALL, *settings, "model.name=strange_models:frozen"]))


def test_group_norm_of_single_numbers_lets_them_through(models):
    model = to_group_norm(norm_of_numbers()).eval()
    assert (model[2].num_groups, to_group_norm(nn.BatchNorm1d(48)).num_groups) == (1, 6)
    assert to_group_norm(nn.BatchNorm2d(8)).num_groups == 8
    assert model(torch.randn(50, 64)).std(0).min() > 1e-3
    with pytest.raises(ValueError, match="has one channel"):
        to_group_norm(nn.BatchNorm1d(1))


@pytest.mark.parametrize(
    "name, message",
    [("double", "is torch.float64; .* call model.float"), ("lazy", "no shape yet"), ("remembers", "get_extra_state")],
)
def test_models_that_cannot_travel_are_named(models, name, message):
    with pytest.raises(ValueError, match=f"strange_models:{name}: .*{message}"):
        fed.run(fed.Config.load(overrides=[*SMALL, f"model.name=strange_models:{name}"]))


def test_channels_of_a_transposed_convolution_are_its_outputs(models):
    settings = ["model.name=strange_models:turned", "prune.channels=0.5", "prune.round_to=1"]
    result = fed.run(fed.Config.load(overrides=[*SMALL, *settings]))
    assert result.records[-1].channels == pytest.approx(18 / 26)  # 8 of 16, and the 10 classes


def test_a_block_that_fits_no_weight_is_named_before_any_client_works():
    with pytest.raises(ValueError, match="fits no weight"):
        Job(fed.Config.load(overrides=[*SMALL, "prune.block=[4096, 4096]"]))


def test_the_smallest_density_keeps_a_weight_a_layer():
    config = fed.Config.load(overrides=[*SMALL, "fed.method=prunefl", "prune.rival_density=1e-6"])
    assert all(int(mask.sum()) == 1 for mask in fed.run(config).masks.values())


def test_records_of_a_model_that_overflows_are_json(tmp_path, monkeypatch):
    monkeypatch.setattr(Workshop, "evaluate", lambda self, params, masks, x, y: (0.1, float("inf")))
    fed.run(fed.Config.load(overrides=SMALL), out=tmp_path / "run")
    for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["loss"] is None


def test_a_run_that_was_stopped_before_it_began_begins(tmp_path):
    config = fed.Config.load(overrides=[*SMALL, "fed.rounds=1"])
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert len(fed.resume(tmp_path).records) == 1
    assert (tmp_path / "summary.json").exists()
    assert fed.resume(tmp_path).accuracy is not None


@pytest.mark.parametrize("answer", [None, "text", SystemExit(3)])
def test_answers_that_are_no_bytes_cost_their_update(monkeypatch, answer):
    plain = client.Client.handle

    def handle(self, payload):
        if self.id % 2:
            return plain(self, payload)
        if isinstance(answer, SystemExit):
            raise answer
        return answer

    monkeypatch.setattr(client.Client, "handle", handle)
    settings = ["fed.rounds=1", "fed.fraction=1", "explore.fraction=1"]
    record = fed.run(fed.Config.load(overrides=[*SMALL, *settings])).records[0]
    wrong = [c.error for c in record.clients if c.error]
    assert len(wrong) == 2
    assert all(error.startswith(("its answer is", "SystemExit: 3")) for error in wrong)


class Answers(nn.Sequential):
    """Returns a dict, as many published models do."""

    def forward(self, x):
        return {"logits": super().forward(x)}


def test_a_model_that_returns_no_tensor_is_named(monkeypatch):
    module = types.ModuleType("answers")
    module.make = lambda: Answers(nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setitem(sys.modules, "answers", module)
    with pytest.raises(ValueError, match=r"its output is a dict, wanted a tensor of \(samples, classes\)"):
        fed.run(fed.Config.load(overrides=[*SMALL, "model.name=answers:make"]))
