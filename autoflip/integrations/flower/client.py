"""The client's side of Flower: a mod that turns payloads into arrays, and what an app returns into payloads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MessageType, RecordDict
from flwr.app import Message as FlowerMessage
from torch import Tensor

from autoflip import codec
from autoflip.fed.downlink import receive
from autoflip.fed.message import NO_VIEW, RESYNC, UPDATE, Message
from autoflip.integrations.flower.records import RECORD, Memory, Terms
from autoflip.masks import MaskSet

__all__ = ["masks", "mod"]

App = Callable[[FlowerMessage, Context], FlowerMessage]


def mod(message: FlowerMessage, context: Context, call_next: App) -> FlowerMessage:
    """Stand between Flower and an app: ``ClientApp(mods=[flower.mod])``, before other mods, which then see arrays.

    The app gets an ordinary ArrayRecord under the name that the strategy was given ("arrays") and returns one, with a
    metric that counts its training examples ("num-examples"). What it returns is sent as the coded difference to what
    it got; entries outside the masks are left out. Messages of other strategies pass as they are.

    Between messages ``context.state["autoflip"]`` keeps what this client holds. If that is lost, the client says so
    instead of working; its update of that round is missing, and the next message brings the whole model.

    Raises:
        ValueError: the app's reply has no ArrayRecord of the arrays' names and shapes, no count of examples, or holds
            NaN.
        DecodeError: the message is damaged. Either way Flower answers with an error and the round goes on.
    """
    letter = message.content.config_records.get(RECORD)
    if letter is None:
        return call_next(message, context)
    envelope = Message.unpack(letter["payload"])
    memory = Memory.load(context)
    held = memory.view if memory is not None and envelope.base != NO_VIEW else None
    terms = Terms.read(letter) if "schema" in letter else memory.terms if memory is not None else None
    if terms is None or envelope.base != (held.id if held is not None else NO_VIEW):
        lost = ConfigRecord({"payload": Message(RESYNC, envelope.round, envelope.client).pack()})
        return FlowerMessage(RecordDict({RECORD: lost}), reply_to=message)
    view = receive(envelope, held, terms.locate, terms.downlink)
    known = memory is not None and memory.terms.schema == terms.schema
    memory = Memory(terms, view, memory.residual if memory is not None and known else None)
    memory.save(context)
    start = {name: value.float() for name, value in view.params.items()}
    others = {name: record for name, record in message.content.items() if name != RECORD}
    message.content = RecordDict({terms.arrays: terms.arrays_of(start), **others})
    reply = call_next(message, context)
    if reply.has_error() or message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
        return reply
    delta = _delta(reply.content, start, terms)
    frame, residual = _encode(delta, memory, envelope)
    if terms.feedback:
        replace(memory, residual=residual).save(context)
    update = Message(
        UPDATE, envelope.round, envelope.client, (frame,), view.id, examples=_examples(reply.content, terms.weight)
    )
    kept = {name: record for name, record in reply.content.items() if not isinstance(record, ArrayRecord)}
    reply.content = RecordDict({**kept, RECORD: ConfigRecord({"payload": update.pack()})})
    return reply


def masks(context: Context) -> MaskSet:
    """Return what is kept of the model that this message brought; empty (everything) before anything is pruned.

    In a train function ``autoflip.sparsify(model, flower.masks(context))`` makes pruned weights cost no FLOPs; in
    evaluation it changes nothing but the time.
    """
    memory = Memory.load(context)
    return MaskSet({}) if memory is None or memory.view.masks is None else memory.view.masks


def _delta(content: RecordDict, start: dict[str, Tensor], terms: Terms) -> dict[str, Tensor]:
    records = list(content.array_records.values())
    if len(records) != 1:
        raise ValueError(
            f"flower.mod: the app's reply holds {len(records)} ArrayRecords, wanted one: the trained model, such as "
            f"RecordDict({{{terms.arrays!r}: ArrayRecord(model.state_dict()), 'metrics': ...}})"
        )
    trained = records[0].to_torch_state_dict()
    delta = {}
    for name in terms.floats.shapes:
        before = start[name]
        if name not in trained or trained[name].shape != before.shape:
            got = f"shape {tuple(trained[name].shape)}" if name in trained else "no such array"
            raise ValueError(
                f"flower.mod: the app's reply has {got} for {name!r}, wanted shape {tuple(before.shape)}; return all "
                "arrays that came. A compact model's go back through model.plan.expand(model.state_dict())"
            )
        # both in the app's own type, or what that type rounds would look like training
        delta[name] = trained[name].float() - before.to(trained[name].dtype).float()
    return delta


def _encode(delta: dict[str, Tensor], memory: Memory, envelope: Message) -> tuple[bytes, dict[str, Tensor] | None]:
    """Return the update's frame, and what error feedback keeps back."""
    terms, view = memory.terms, memory.view
    wire: dict[str, Any] = {
        "masks": view.masks,
        "schema": terms.floats,
        "values": terms.values,
        "levels": terms.levels or None,
        "seed": terms.seed,
        "round": envelope.round,
        "client": envelope.client,
        "base_id": view.id,
    }
    if not terms.feedback:
        return codec.encode(delta, **wire), None
    feedback = codec.Feedback(memory.residual)
    return feedback.encode(delta, **wire), feedback.residual


def _examples(content: RecordDict, key: str) -> int:
    found = [record[key] for record in content.metric_records.values() if key in record]
    value = found[0] if len(found) == 1 else None
    if isinstance(value, list) or value is None or value != int(value) or value < 1:
        raise ValueError(
            f"flower.mod: the app's reply says {key!r} = {found}, wanted one MetricRecord with a whole number of "
            f"training examples, such as MetricRecord({{{key!r}: len(dataset)}})"
        )
    return int(value)
