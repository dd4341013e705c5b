"""Checkpoints: what comes back is what went in, and a damaged file never passes for a good one."""

import pytest
import torch

from autoflip import MaskSet
from autoflip.fed import checkpoint
from autoflip.fed.state import Average, Guidance, ServerState, make_view


def _state():
    g = torch.Generator().manual_seed(0)
    params = {"a.weight": torch.randn(4, 3, generator=g), "a.bias": torch.randn(4, generator=g)}
    old, new = (MaskSet({"a.weight": torch.rand(4, 3, generator=g) < share}) for share in (0.8, 0.4))
    views = [make_view(params, old, torch.bfloat16), make_view(params, None, torch.bfloat16)]
    held, guidance = {0: views[0].id, 7: views[1].id}, Guidance(params, params, params)
    return ServerState(params, new, 5, {v.id: v for v in views}, held, guidance, average=Average(params, 3))


def test_round_trip(tmp_path):
    state = _state()
    dense = ServerState({"w": torch.ones(2)})
    checkpoint.save(tmp_path, {"autoflip": state, "fedavg": dense}, 11, "c")
    states, records = checkpoint.load(tmp_path, "c")
    assert records == 11
    back = states["autoflip"]
    assert (back.round, back.held, back.masks) == (5, state.held, state.masks)
    assert set(back.views) == set(state.views)
    for name, view in state.views.items():
        assert back.views[name].masks == view.masks
        for key, tensor in view.params.items():
            assert torch.equal(back.views[name].params[key], tensor)
    assert back.average.rounds == state.average.rounds
    guidance = back.guidance
    for part in (back.params, back.average.params, guidance.importance, guidance.agreement, guidance.weights):
        assert all(torch.equal(part[key], tensor) for key, tensor in state.params.items())
    assert states["fedavg"].masks is None
    assert states["fedavg"].guidance is None
    assert states["fedavg"].average is None


def test_any_damage_is_refused(tmp_path):
    checkpoint.save(tmp_path, {"autoflip": _state()}, 0, "c")
    path = tmp_path / checkpoint.NAME
    good = path.read_bytes()
    for bad in (b"", good[:20], good[:-1], good + b"x", good[:60] + bytes([good[60] ^ 1]) + good[61:], b"Z" + good[1:]):
        path.write_bytes(bad)
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            checkpoint.load(tmp_path, "c")
    path.write_bytes(good)
    with pytest.raises(checkpoint.CheckpointError, match="not the configuration"):
        checkpoint.load(tmp_path, "d")
    path.unlink()
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        checkpoint.load(tmp_path, "c")


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "f"
    checkpoint.write_atomically(target, b"old")

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
