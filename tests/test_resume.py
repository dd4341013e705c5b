"""A run killed at any instant and resumed ends in the figures, and the bits, of one that was left alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autoflip import fed
from autoflip.fed import checkpoint

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [
    "fed.rounds=5",
    "fed.clients=4",
    "fed.fraction=0.5",
    "train.epochs=1",
    "explore.fraction=1.0",
    "data.samples_per_client=30",
    "prune.until=4",
    "prune.every=1",
]
# kills its own process, as kill -9 does, at the given call of the given function
KILLED = """
import os, signal, sys
from autoflip import fed
from autoflip.fed import checkpoint, client
place, calls, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
owner, name = (client.Client, "handle") if place == "client" else (checkpoint, place)
plain, seen = getattr(owner, name), 0
def deadly(*args, **kwargs):
    global seen
    seen += 1
    if seen == calls:
        if place == "write_atomically":  # leaves half a file behind, as a crash in the middle of a write does
            args[0].with_name(args[0].name + ".tmp").write_bytes(args[1][: len(args[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args, **kwargs)
setattr(owner, name, deadly)
fed.run(fed.Config.load(overrides=sys.argv[4:]), out=folder)
"""


def _figures(folder):
    summary = json.loads((folder / "summary.json").read_text())
    for entry in (summary["method"], summary["against"], summary["ratios"]):
        entry.pop("seconds")
        if entry["to_target"]:
            entry["to_target"].pop("seconds")
    return summary


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    fed.run(fed.Config.load(overrides=SETTINGS), out=folder)
    return folder


@pytest.mark.parametrize(
    "place, calls", [("client", 1), ("client", 9), ("client", 18), ("write_atomically", 6), ("save", 4)]
)
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, place, calls):
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, place, str(calls), str(folder), *SETTINGS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "summary.json").exists()
    seen = []
    result = fed.resume(folder, sinks=[seen.append])
    assert len(seen) == len(result.records) == 10
    assert _figures(folder) == _figures(uninterrupted)
    for name in ("model.safetensors", "masks.safetensors"):
        ours, whole = load_file(folder / name), load_file(uninterrupted / name)
        assert ours.keys() == whole.keys()
        assert all(torch.equal(ours[k], whole[k]) for k in whole)


def test_a_finished_run_resumes_to_itself(uninterrupted):
    before = _figures(uninterrupted)
    fed.resume(uninterrupted)
    assert _figures(uninterrupted) == before


def test_records_beyond_the_checkpoint_are_run_again(uninterrupted, tmp_path):
    config = fed.Config.load(overrides=SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        fed.run(config, out=tmp_path / "run", sinks=[_stop_at(3)])
    path = tmp_path / "run" / "records.jsonl"
    path.write_text(path.read_text() + '{"method": "autofl')  # half a line
    fed.resume(tmp_path / "run")
    assert _figures(tmp_path / "run") == _figures(uninterrupted)


def test_another_configuration_is_refused_but_data_may_move(uninterrupted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fed.run(fed.Config.load(overrides=SETTINGS), out=tmp_path / "run", sinks=[_stop_at(3)])
    path = tmp_path / "run" / "config.toml"
    text = path.read_text()
    path.write_text(text.replace("lr = 0.1", "lr = 0.2"))
    with pytest.raises(checkpoint.CheckpointError, match="not the configuration"):
        fed.resume(tmp_path / "run")
    path.write_text(text.replace('root = ""', 'root = "/elsewhere"'))
    fed.resume(tmp_path / "run")
    assert _figures(tmp_path / "run") == _figures(uninterrupted)


def test_a_run_killed_before_its_first_checkpoint_starts_afresh(tmp_path, monkeypatch):
    def crash(*_):
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "save", crash)
        with pytest.raises(OSError, match="disk full"):
            fed.run(fed.Config.load(overrides=SETTINGS), out=tmp_path / "run")
    fed.resume(tmp_path / "run")
    (tmp_path / "run" / checkpoint.NAME).unlink()
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        fed.resume(tmp_path / "run")  # it has records that nothing counts


def _stop_at(count):
    seen = []

    def sink(record):
        seen.append(record)
        if len(seen) == count:
            raise KeyboardInterrupt

    return sink


def test_mistakes_are_named(uninterrupted, tmp_path):
    with pytest.raises(ValueError, match="already holds a run"):
        fed.run(fed.Config.load(overrides=SETTINGS), out=uninterrupted)
    with pytest.raises(ValueError, match="holds no run"):
        fed.resume(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fed.run(fed.Config.load(overrides=SETTINGS), out=tmp_path / "run", sinks=[_stop_at(2)])
    (tmp_path / "run" / "records.jsonl").write_text("")
    with pytest.raises(checkpoint.CheckpointError, match="0 records but the checkpoint counts 2"):
        fed.resume(tmp_path / "run")
    path = tmp_path / "run" / checkpoint.NAME
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        fed.resume(tmp_path / "run")
