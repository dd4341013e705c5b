"""Flower: bad replies cost no more than their own update."""

import random
import sys

import pytest
import torch
from flower_nodes import (  # noqa: F401
    PLAIN,
    RECORD,
    Net,
    Nodes,
    flower,
    flwr,
    make_app,
    message_outside_a_task,
    message_to,
    needs_flower,
    run,
    start,
)

from autoflip import codec
from autoflip.fed.message import RESYNC
from autoflip.fed.message import Message as Envelope


def bent(reply, payload):
    content = flwr.RecordDict({**dict(reply.content.items()), RECORD: flwr.ConfigRecord({"payload": payload})})
    return flwr.Message(content=content, metadata=reply.metadata)


def without_payload(reply):
    return flwr.Message(content=flwr.RecordDict(dict(reply.content.metric_records)), metadata=reply.metadata)


def arrays_instead(reply):
    records = {**dict(reply.content.metric_records), "arrays": start()}
    return flwr.Message(content=flwr.RecordDict(records), metadata=reply.metadata)


def altered(**changes):
    def bend(reply):
        old = Envelope.unpack(reply.content[RECORD]["payload"])
        fields = {**{name: getattr(old, name) for name in Envelope.__dataclass_fields__}, **changes}
        return bent(reply, Envelope(**fields).pack())

    return bend


def flipped(at):
    def bend(reply):
        payload = bytearray(reply.content[RECORD]["payload"])
        payload[at] ^= 0x40
        return bent(reply, bytes(payload))

    return bend


def wild(change):
    def bend(reply):
        old = Envelope.unpack(reply.content[RECORD]["payload"])
        delta = {name: torch.full_like(v, change) for name, v in Net().state_dict().items()}
        schema = codec.Schema.of(delta)  # without masks: what a stranger would send
        frames = (codec.encode(delta, values="fp32", schema=schema, base_id=old.view),)
        return altered(frames=frames)(reply)

    return bend


def wild_inside(reply):
    """Under the right masks, as far as a client can make it."""
    old = Envelope.unpack(reply.content[RECORD]["payload"])
    delta = {name: torch.full_like(v, 3e38) for name, v in Net().state_dict().items()}
    schema = codec.Schema.of(delta)
    frames = (codec.encode(delta, masks=LAST.masks, values="fp32", schema=schema, base_id=old.view),)
    return altered(frames=frames)(reply)


LAST = None  # the strategy that is being lied to
HOSTILE = {
    "under no masks": wild(1.0),
    "beyond all bounds": wild_inside,
    "no bytes": lambda reply: bent(reply, b""),
    "text": lambda reply: bent(reply, "hello"),
    "garbage": lambda reply: bent(reply, bytes(range(256)) * 9),
    "truncated": lambda reply: bent(reply, reply.content[RECORD]["payload"][:-3]),
    "envelope damaged": flipped(9),
    "frame damaged": flipped(-9),
    "of another round": altered(round=77),
    "of another client": altered(client=99),
    "of another view": altered(view=bytes(range(16))),
    "too many examples": altered(examples=10**9),
    "no examples": altered(examples=0),
    "no frame": altered(frames=()),
    "two frames": lambda reply: altered(frames=2 * Envelope.unpack(reply.content[RECORD]["payload"]).frames)(reply),
    "lost, it says": altered(kind=RESYNC, frames=()),
    "no payload": without_payload,
    "plain arrays": arrays_instead,
    "an error": lambda reply: flwr.Message(flwr.Error(8, "died"), reply_to=swapped(reply)),
}


def swapped(reply):
    m = reply.metadata
    return message_to(flwr.RecordDict(), m.message_type, m.src_node_id)


@needs_flower
@pytest.mark.parametrize("what", HOSTILE)
def test_a_bad_reply_costs_its_own_update_only(what, monkeypatch):
    honest = 10**12 + 1

    def bend(node, number, reply):
        training = RECORD in reply.content
        return HOSTILE[what](reply) if node == 10**12 and training and number > 4 else reply

    nodes = Nodes(make_app([flower.mod]), bend=bend)
    strategy = flower.AutoFlip(Net(), density=0.5)
    monkeypatch.setattr(sys.modules[__name__], "LAST", strategy)
    result = run(strategy, nodes, rounds=3)
    assert [(r, n) for r, n, _ in strategy.rejected] == [(2, 10**12), (3, 10**12)]
    assert result.evaluate_metrics_clientapp[3]["accuracy"] > 0.6
    alone = [m for m in result.train_metrics_clientapp[3] if m not in ("bytes-up", "bytes-down")]
    assert alone == ["loss"]
    assert strategy._state.round == 3
    assert strategy._numbers[honest] in strategy._state.held


@needs_flower
def test_after_a_bad_reply_a_client_is_back_in_the_next_round():
    def bend(node, number, reply):
        return HOSTILE["truncated"](reply) if node == 10**12 and number in (3, 4) else reply

    strategy = flower.AutoFlip(Net(), fraction_evaluate=0.0)
    result = run(strategy, Nodes(make_app([flower.mod]), bend=bend), rounds=4)
    assert [(r, n) for r, n, _ in strategy.rejected] == [(2, 10**12)]
    down = [result.train_metrics_clientapp[r]["bytes-down"] for r in (3, 4)]
    assert down[0] > 1.5 * down[1]  # whoever may or may not hold the last model is sent all of the next


@needs_flower
def test_refused_by_all_leaves_the_model_as_it_was():
    def bend(node, number, reply):
        return HOSTILE["garbage"](reply) if RECORD in reply.content and number > 4 else reply

    seen = {}
    strategy = flower.AutoFlip(Net(), settings=PLAIN)
    result = run(
        strategy,
        Nodes(make_app([flower.mod]), bend=bend),
        rounds=3,
        evaluate_fn=lambda r, arrays: seen.update({r: arrays.to_torch_state_dict()}),
    )
    assert len(strategy.rejected) == 4
    assert strategy._state.round == 1
    for name, value in seen[1].items():
        assert torch.equal(value, seen[3][name])
        assert torch.equal(value, result.arrays.to_torch_state_dict()[name])


@needs_flower
def test_a_second_answer_of_one_node_counts_once():
    once, twice = (flower.AutoFlip(Net(), fraction_evaluate=0.0) for _ in range(2))
    replies = []
    for s in (once, twice):
        nodes = Nodes(make_app([flower.mod]))
        random.seed(0)  # FedAvg samples by it, and a client's number is part of its rounding
        replies.append(nodes.send_and_receive(s.configure_train(1, start(), flwr.ConfigRecord(), nodes)))
    arrays = [
        once.aggregate_train(1, replies[0])[0].to_torch_state_dict(),
        twice.aggregate_train(1, [*replies[1], replies[1][0]])[0].to_torch_state_dict(),
    ]
    assert "not asked for one" in twice.rejected[0][2]
    for name, value in arrays[0].items():
        assert torch.equal(value, arrays[1][name])


def metrics(**values):
    return {"loss": 0.5, "num-examples": 10, **values}


ODD = [
    {"loss": float("nan"), "num-examples": 10},
    {"loss": 0.5, "num-examples": float("inf")},
    {"loss": 0.5, "num-examples": -1},
    {"loss": 0.5},
    {"loss": [0.5, 1.0], "num-examples": 10},
    {"loss": 0.5, "num-examples": [10]},
    {"loss": 0.5, "num-examples": 10, "more": 1.0},
]


@needs_flower
@pytest.mark.parametrize("odd", ODD, ids=str)
def test_odd_metrics_stop_nothing(odd):
    def bend(node, number, reply):
        if node != 10**12:
            return reply
        records = {k: v for k, v in reply.content.items() if not isinstance(v, flwr.MetricRecord)}
        return flwr.Message(
            content=flwr.RecordDict({**records, "metrics": flwr.MetricRecord(odd)}), metadata=reply.metadata
        )

    strategy = flower.AutoFlip(Net())
    result = run(strategy, Nodes(make_app([flower.mod]), nodes=3, bend=bend), rounds=1)
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(0.5)
    assert 0 < result.evaluate_metrics_clientapp[1]["accuracy"] <= 1
