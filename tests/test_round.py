"""A round by hand, its payloads carried by nobody: what is offered, what is taken in, who holds what after it."""

import pytest
import torch
from torch import nn

from autoflip import codec, fed
from autoflip.fed.coordinates import Coordinates
from autoflip.fed.downlink import receive
from autoflip.fed.message import NO_VIEW, RESYNC, UPDATE, Message
from autoflip.fed.round import Round
from autoflip.fed.state import ServerState, make_view
from autoflip.fed.strategies import METHODS

MODEL = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
PARAMS = {name: value.clone() for name, value in MODEL.state_dict().items()}
SCHEMA = codec.Schema.of(PARAMS)


def locate(masks):
    return Coordinates(SCHEMA, masks)


def a_round(held=None, number=0, **options):
    strategy = METHODS["autoflip"](fed.Config(), MODEL)
    state = ServerState(PARAMS, round=number)
    return Round(strategy, state.holding(held or {}), locate, **options)


def answer(offered, client=3, change=0.5, kind=UPDATE):
    asked = Message.unpack(offered)
    delta = {name: torch.full_like(value, change) for name, value in PARAMS.items()}
    frames = (codec.encode(delta, values="fp32", schema=SCHEMA),) if kind == UPDATE else ()
    return Message(kind, asked.round, client, frames, asked.view, examples=5).pack()


def test_one_update_becomes_the_next_state():
    work = a_round()
    assert work.lost == set()
    offered = work.offer(3)
    assert work.lost == {3}
    assert receive(Message.unpack(offered), None, locate, "int4").id == Message.unpack(offered).view
    assert work.take(3, answer(offered), 5).examples == 5
    assert work.lost == set()
    after = work.finish()
    assert after.round == 1
    assert after.held == {3: Message.unpack(offered).view}
    assert after.masks is not None


def test_nobody_answers_twice_or_unasked():
    work = a_round()
    offered = work.offer(3)
    work.take(3, answer(offered), 5)
    before = {name: value.clone() for name, value in work.aggregator.mean().items()}
    with pytest.raises(codec.DecodeError, match="client 3, which was not asked"):
        work.take(3, answer(offered, change=9.0), 5)
    with pytest.raises(codec.DecodeError, match="client 4, which was not asked"):
        work.take(4, answer(offered, client=4, change=9.0), 5)
    assert all(torch.equal(value, before[name]) for name, value in work.aggregator.mean().items())


@pytest.mark.parametrize("phase", ["exploration", "training"])
@pytest.mark.parametrize("cap, most", [(None, 1e6), (4.0, 4.0)])
def test_an_update_beyond_the_cap_is_refused_and_changes_nothing(cap, most, phase):
    work = a_round(cap=cap) if phase == "exploration" else a_round(cap=cap, number=10)
    assert (work.sums is None) == (phase == "training")
    offered = {client: work.offer(client) for client in (3, 4)}
    work.take(3, answer(offered[3], change=most), 5)
    with pytest.raises(codec.DecodeError, match=r"the update moves '0.weight' by more than"):
        work.take(4, answer(offered[4], client=4, change=1.01 * most), 5)
    assert work.lost == {4}
    assert all(bool((value == most).all()) for value in work.aggregator.mean().values())


def test_who_lost_what_it_held_says_so_once():
    view = make_view(PARAMS, None, torch.bfloat16)
    work = a_round({3: view})
    offered = work.offer(3)
    assert Message.unpack(offered).base == view.id
    assert work.take(3, answer(offered, kind=RESYNC), 5).kind == RESYNC
    assert work.lost == {3}
    whole = work.offer(3, whole=True)
    assert Message.unpack(whole).base == NO_VIEW
    with pytest.raises(codec.DecodeError, match="kind 4"):
        work.take(3, answer(whole, kind=RESYNC), 5)
    assert work.take(3, answer(whole), 5).kind == UPDATE


def test_who_holds_the_present_model_is_sent_no_frames():
    view = make_view(PARAMS, None, torch.bfloat16)
    work = a_round({3: view, 4: view}, current={view.id})
    message = Message.unpack(work.offer(3))
    assert (message.frames, message.view, message.base) == ((), view.id, view.id)
    assert receive(message, view, locate, "int4") is view
    other = make_view({name: value + 1 for name, value in PARAMS.items()}, None, torch.bfloat16)
    for held in (None, other):
        with pytest.raises(codec.DecodeError, match="no frames"):
            receive(message, held, locate, "int4")
    assert Message.unpack(work.offer(4, whole=True)).frames


def test_views_that_nobody_holds_are_forgotten():
    first, second = (make_view({"w": torch.full((2,), float(n))}, None, torch.float32) for n in (1, 2))
    state = ServerState({}).holding({1: first, 2: first})
    assert set(state.views) == {first.id}
    assert set(state.holding({1: second}).views) == {first.id, second.id}
    assert set(state.holding({1: second}, lost={2}).views) == {second.id}
    assert state.holding({}, lost={1, 2}).held == {}
