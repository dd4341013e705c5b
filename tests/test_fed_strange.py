"""Federated runs of unusual models, failing clients and odd folders."""

import copy
import dataclasses
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from autoflip import explore, fed, meter
from autoflip.cli.overrides import overrides_of
from autoflip.fed import client
from autoflip.fed.norms import floored
from autoflip.fed.strategies.base import Strategy

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


@pytest.fixture
def models(monkeypatch):
    module = types.ModuleType("strange_models")
    module.shuffled, module.remembering = Shuffled, Remembering
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
    for method in ("fedavg", "fedavgm", "magnitude"):
        config = fed.Config.load(overrides=[f"fed.method={method}", "fed.against=none"])
        strategy = fed.strategies.METHODS[method](config, nn.BatchNorm1d(2), torch.zeros(2, 2))
        assert isinstance(strategy, Strategy)
        params = {"weight": torch.ones(2), "bias": torch.ones(2), "running_var": torch.tensor([1e-3, 1.0])}
        mean = {name: torch.zeros(2) for name in params} | {"running_var": torch.tensor([-2e-3, 0.0])}
        moved, _ = strategy.step(fed.state.ServerState(params), mean)
        assert moved["running_var"].tolist() == [0.0, 1.0]


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
