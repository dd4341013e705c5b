"""Sinks write what a record says, and say what to install when they cannot."""

import csv
import json
import sys
import types

import pytest
from fake_run import records

from autoflip import loggers


def feed(sink, rounds=3):
    lines = records("autoflip", rounds=rounds)
    for line in lines:
        sink(types.SimpleNamespace(as_dict=lambda line=line: line))
    return lines


def test_jsonl(tmp_path):
    lines = feed(loggers.jsonl(tmp_path / "deep" / "log.jsonl"))
    assert [json.loads(line) for line in (tmp_path / "deep" / "log.jsonl").read_text().splitlines()] == lines


def test_csv_has_one_head_line(tmp_path):
    lines = feed(loggers.csv(tmp_path / "log.csv"))
    again = loggers.csv(tmp_path / "log.csv")
    again(types.SimpleNamespace(as_dict=lambda: {**lines[0], "seconds": 1.5}))  # a second run appends
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert float(rows[2]["accuracy"]) == lines[2]["accuracy"]
    assert {"layers", "clients"}.isdisjoint(rows[0])


@pytest.mark.parametrize("sink", [loggers.jsonl, loggers.csv])
def test_a_resumed_run_writes_no_record_twice(sink, tmp_path):
    lines = feed(sink(tmp_path / "log"))
    once = (tmp_path / "log").read_bytes()
    again = sink(tmp_path / "log")
    for line in [*lines, {**lines[0], "round": 3}]:
        again(types.SimpleNamespace(as_dict=lambda line=line: line))
    more = (tmp_path / "log").read_bytes()
    assert more.startswith(once)
    assert more[len(once) :].count(b"\n") == 1


class Tracker(types.ModuleType):
    """Stands for wandb and mlflow."""

    def __init__(self):
        super().__init__("tracker")
        self.seen, self.options = [], None

    def init(self, **options):
        self.options = options
        return self

    start_run = init

    def log(self, values):
        self.seen.append(values)

    def log_metrics(self, values, step):
        self.seen.append({**values, "round": step})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_trackers_get_every_number(monkeypatch, name):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    lines = feed(getattr(loggers, name)(tags={"a": "b"}))
    assert tracker.options == {"tags": {"a": "b"}}
    assert tracker.seen[2]["autoflip/accuracy"] == lines[2]["accuracy"]
    assert tracker.seen[2]["autoflip/layers/fc1.weight"] == lines[2]["layers"]["fc1.weight"]
    assert tracker.seen[2]["round"] == 2


def test_tensorboard(monkeypatch, tmp_path):
    seen = []
    board = types.SimpleNamespace(add_scalar=lambda *a: seen.append(a), flush=lambda: None)
    fake = types.SimpleNamespace(SummaryWriter=lambda folder: board)
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    lines = feed(loggers.tensorboard(tmp_path), rounds=2)
    assert ("autoflip/bytes_up", float(lines[1]["bytes_up"]), 1) in seen


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_missing_package_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    with pytest.raises(ValueError, match=f"pip install {name}"):
        getattr(loggers, name)(*(["folder"] if name == "tensorboard" else []))
