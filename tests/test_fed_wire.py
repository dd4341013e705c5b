"""The way down and unequal clients: what each client is sent, what it holds, and what the server makes of it."""

import pytest
import torch

from autoflip import MaskSet, codec, fed
from autoflip.fed import downlink
from autoflip.fed.client import Client
from autoflip.fed.coordinates import Coordinates
from autoflip.fed.job import Job
from autoflip.fed.message import TRAIN, Message
from autoflip.fed.round import enough
from autoflip.fed.state import make_view
from autoflip.fed.transport import InProcess

SMALL = ["fed.rounds=6", "fed.clients=4", "fed.fraction=0.5", "train.epochs=1", "data.samples_per_client=40"]


def _config(*overrides):
    return fed.Config.load(overrides=[*SMALL, "fed.against=none", *overrides])


def _locate(kept):
    return Coordinates(codec.Schema.of(_params(0)), kept)


def _params(seed):
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(40, 30, generator=g), "b": torch.randn(40, generator=g)}


@pytest.mark.parametrize("kind, within", [("bf16", 2**-8), ("int8", 0.05), ("int4", 0.8), ("fp32", 0.0)])
def test_what_a_client_decodes_is_the_view_that_the_server_keeps(kind, within):
    masks = MaskSet({"w": torch.rand(40, 30, generator=torch.Generator().manual_seed(5)) < 0.3})
    held = make_view(_params(0), None, torch.bfloat16)
    for number, kept in enumerate([None, masks, masks]):
        params = _params(number)
        view, frames = downlink.send(params, kept, held, kind, _locate, round_number=number)
        message = Message(TRAIN, number, 0, frames, view.id, held.id)
        got = downlink.receive(message, held, _locate, kind)
        assert got.id == view.id
        for name, value in params.items():
            want = torch.where(kept[name], value, 0.0) if kept is not None and name in kept else value
            assert torch.equal(got.params[name], view.params[name])
            # int8, int4: a step of the largest of 256 changes (here up to 2 * 4), and bfloat16's rounding
            assert float((got.params[name].float() - want).abs().max()) <= within * max(1.0, float(want.abs().max()))
        held = view


def test_quantised_broadcasts_feed_their_error_back():
    target = _params(1)
    held, gaps = make_view(_params(0), None, torch.bfloat16), []
    for number in range(4):
        held, _ = downlink.send(target, None, held, "int4", _locate, round_number=number)
        gaps.append(float((held.params["w"].float() - target["w"]).norm()))
    # the step is 1/7 of the largest change: each broadcast divides the gap by more than 4, down to bfloat16's rounding
    assert gaps[1] < gaps[0] / 4
    assert gaps[3] < 2**-8 * float(target["w"].norm())


def test_a_wrong_base_or_a_damaged_patch_is_refused():
    held, other = make_view(_params(0), None, torch.bfloat16), make_view(_params(2), None, torch.bfloat16)
    view, frames = downlink.send(_params(1), None, held, "int8", _locate)
    message = Message(TRAIN, 0, 0, frames, view.id, held.id)
    with pytest.raises(codec.DecodeError):
        downlink.receive(message, other, _locate, "int8")
    named = Message(TRAIN, 0, 0, frames, other.id, held.id)
    with pytest.raises(codec.DecodeError, match="another view"):
        downlink.receive(named, held, _locate, "int8")


def test_a_start_by_seed_sends_no_initial_weights_and_changes_nothing_else():
    exact = ["wire.downlink=bf16", "explore.fraction=1"]
    seeded = fed.run(_config(*exact))
    sent = fed.run(_config(*exact, "wire.start=broadcast"))
    assert seeded.records[0].bytes_down < 0.01 * sent.records[0].bytes_down
    assert all(torch.equal(seeded.params[k], sent.params[k]) for k in sent.params)
    assert [r.bytes_down for r in seeded.records[1:]] == [r.bytes_down for r in sent.records[1:]]


def test_quantised_downlinks_cost_less_and_resume_in_the_same_bits(tmp_path):
    small = ["prune.density=0.3", "fed.fraction=1.0"]
    plain = fed.run(_config(*small, "fed.rounds=3", "wire.downlink=bf16"))
    config = _config(*small, "wire.downlink=int4", "wire.values=int4", "server.optimizer=momentum")
    whole, seen = fed.run(config), []
    assert whole.records[2].bytes_down < 0.6 * plain.records[2].bytes_down  # no masks travel any more

    def stop(record):
        seen.append(record)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fed.run(config, out=tmp_path / "run", sinks=[stop])
    again = fed.resume(tmp_path / "run")
    assert all(torch.equal(again.params[k], whole.params[k]) for k in whole.params)
    assert [(r.bytes_up, r.bytes_down) for r in again.records] == [(r.bytes_up, r.bytes_down) for r in whole.records]


def test_fewer_levels_make_smaller_updates(monkeypatch):
    encode, asked = codec.encode, set()

    def watched(*args, **keys):
        if "levels" in keys:  # a client's update
            asked.add((keys["values"], keys["levels"]))
        return encode(*args, **keys)

    monkeypatch.setattr(codec, "encode", watched)
    whole, fewer = (fed.run(_config("wire.values=int8", f"wire.levels={n}", "fed.rounds=2")) for n in (0, 40))
    assert asked == {("int8", None), ("int8", 40)}
    assert fewer.records[1].bytes_up < 0.85 * whole.records[1].bytes_up


def test_a_client_that_lost_its_base_is_sent_everything(monkeypatch):
    handle = Client.handle

    def forgetful(self, payload):
        message = Message.unpack(payload)
        if self.id == 1 and message.round >= 2 and message.base != bytes(16):
            self.held = None
        return handle(self, payload)

    monkeypatch.setattr(Client, "handle", forgetful)
    result = fed.run(_config("wire.downlink=int8", "fed.fraction=1.0"))
    assert all(c.error is None for r in result.records for c in r.clients)
    mine = {c.client: c.bytes_down for c in result.records[3].clients}
    assert mine[1] > 1.5 * mine[0]


def test_the_papers_rule_gives_slow_clients_what_the_others_get():
    job = Job(_config("fed.method=autoflip-paper", "fed.slow=0.5", "fed.fraction=1.0", "fed.against=none"))
    server = job.server("autoflip-paper", InProcess(job.clients("autoflip-paper")))
    state, _ = server.run_round(job.states["autoflip-paper"])
    assert state.masks is not None
    assert state.narrow is None


def test_a_quorum_is_a_share_of_whole_clients():
    assert enough(14, 25, 0.56)  # as floats, 0.56 * 25 is a little more than 14
    assert not enough(13, 25, 0.56)
    assert not enough(0, 5, 0.0)


def test_slow_clients_train_a_narrower_model_and_the_rest_is_averaged_over_holders(tmp_path):
    config = _config("fed.slow=0.5", "fed.fraction=1.0", "prune.channels=0.8", "prune.slow_channels=0.3")
    job = Job(config)
    server = job.server("autoflip", InProcess(job.clients("autoflip")))
    slow = server.slow
    assert len(slow) == 2
    result = fed.run(config, out=tmp_path / "run")
    for record in result.records[1:]:
        cost = {c.client: (c.flops / c.examples, c.bytes_up, c.bytes_down) for c in record.clients}
        for a in slow:
            for b in set(cost) - set(slow):
                assert all(x < 0.7 * y for x, y in zip(cost[a], cost[b]))
    assert fed.resume(tmp_path / "run").summary == result.summary
    state, _ = server.run_round(job.states["autoflip"])
    assert state.narrow is not None
    assert state.narrow & state.masks == state.narrow  # within what the others keep
    after, _ = server.run_round(state)
    only_fast = state.masks["fc1.weight"] & ~state.narrow["fc1.weight"]
    moved = after.params["fc1.weight"] != state.params["fc1.weight"]
    assert float(moved[only_fast].float().mean()) > 0.5
