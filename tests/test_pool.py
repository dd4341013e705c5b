"""Clients in processes of their own: the same bits, and one that dies or hangs costs its own update."""

import dataclasses
import sys
import types

import pytest
import torch
from torch import nn

from autoflip import fed
from autoflip.fed import loop

SMALL = [
    "fed.rounds=3",
    "fed.clients=5",
    "fed.fraction=0.6",
    "explore.fraction=0.6",
    "train.epochs=1",
    "data.samples_per_client=40",
]
ODD = """
import os, pathlib, sys, time
from torch import nn

class Odd(nn.Sequential):
    def forward(self, x):
        print("a model may print")
        wish = pathlib.Path(os.environ["ODD_WISH"])
        if len(x) > 2 and sys.argv[0] == "-c" and wish.exists():
            text = wish.read_text()
            wish.unlink()
            os._exit(3) if text == "die" else time.sleep(600)
        return super().forward(x)

def make():
    return Odd(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
"""


def told(record):
    """What a record says that is not time."""
    timed = {"seconds", "client_seconds", "server_seconds", "eval_seconds", "cpu_seconds"}
    line = {key: value for key, value in record.as_dict().items() if key not in timed}
    clients = [{key: value for key, value in c.items() if key not in timed} for c in line.pop("clients")]
    return line, clients


def test_processes_give_the_bits_that_one_gives(tmp_path):
    whole = fed.run(fed.Config.load(overrides=SMALL))
    config = fed.Config.load(overrides=[*SMALL, "fed.processes=2"])

    def stop(record):
        if record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fed.run(config, out=tmp_path / "run", sinks=[stop])
    parted = fed.resume(tmp_path / "run")  # what clients held when it stopped is in its checkpoint
    assert [told(record) for record in parted.records] == [told(record) for record in whole.records]
    assert all(torch.equal(parted.params[name], value) for name, value in whole.params.items())
    assert all(client.seconds > 0 and client.cpu_seconds > 0 for client in parted.records[0].clients)


def test_processes_do_not_import_what_lies_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise ImportError('not the one of the standard library')\n")
    monkeypatch.chdir(tmp_path)
    config = fed.Config.load(overrides=[*SMALL, "fed.processes=2", "fed.rounds=1", "fed.against=none"])
    assert all(client.error is None for client in fed.run(config).records[0].clients)


def test_a_client_that_dies_or_hangs_costs_its_own_update(tmp_path, monkeypatch):
    (tmp_path / "odd_model.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ODD_WISH", str(tmp_path / "wish"))
    wishes = ["die", "hang"]

    def sink(record):
        if wishes:
            (tmp_path / "wish").write_text(wishes.pop(0))

    # enough for a step of 40 samples on a machine that does much else
    settings = ["model.name=odd_model:make", "fed.processes=1", "fed.timeout=20", "fed.against=none", "fed.fraction=1"]
    result = fed.run(fed.Config.load(overrides=[*SMALL, *settings]), out=tmp_path / "run", sinks=[sink])
    errors = [[client.error for client in record.clients if client.error] for record in result.records]
    assert errors == [[], ["its process ended (exit status 3)"], ["no answer within 20 s"]]
    assert result.records[2].client_seconds >= 20
    # whoever shared that process has lost what it held since the last checkpoint, and is sent the whole model
    assert all(record.accuracy is not None for record in result.records)


def test_a_process_that_cannot_start_ends_the_run(monkeypatch, capfd):
    module = types.ModuleType("only_here")
    module.make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setitem(sys.modules, "only_here", module)
    config = fed.Config.load(overrides=[*SMALL, "model.name=only_here:make", "fed.processes=1"])
    with pytest.raises(RuntimeError, match=r"ended as it started \(exit status 1\); it says why above"):
        fed.run(config)
    assert "there is no module 'only_here'" in capfd.readouterr().err


def test_a_timeout_needs_processes():
    with pytest.raises(fed.ConfigError, match="fed.timeout needs fed.processes"):
        fed.Config.load(overrides=["fed.timeout=3"])
    assert dataclasses.replace(fed.Config(), fed=fed.sections.Fed(processes=1, timeout=3)).check() is None
    assert loop.InProcess.ahead == 1
