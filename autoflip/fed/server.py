"""The server: one round, from the broadcast to the new state and its record."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoflip import codec
from autoflip.explore import Sums
from autoflip.fed import downlink
from autoflip.fed.aggregate import Aggregator
from autoflip.fed.config import Config
from autoflip.fed.ledger import ClientRecord, Record
from autoflip.fed.message import EXPLORE, NO_VIEW, RESYNC, TRAIN, UPDATE, Message
from autoflip.fed.seeding import sample
from autoflip.fed.state import Average, ServerState, View
from autoflip.fed.strategies import Ask, Strategy
from autoflip.fed.transport import Reply, Transport
from autoflip.fed.workshop import Workshop
from autoflip.masks import MaskSet

__all__ = ["RoundError", "Server"]


_ABSURD = 1e12


class RoundError(RuntimeError):
    """Too few usable updates came back; the state before the round is unchanged."""


@dataclass
class Server:
    """Runs rounds of one method; holds nothing that changes between them.

    Attributes:
        config: the run's configuration.
        strategy: the method.
        schema: names and shapes of everything that travels.
        transport: how clients are reached.
        workshop: builds compact models, for evaluation.
        test: ``(inputs, targets)`` to evaluate on.
        examples: client -> number of its training examples, as registered.
        slow: clients that get the narrow model.
    """

    config: Config
    strategy: Strategy
    schema: codec.Schema
    transport: Transport
    workshop: Workshop
    test: tuple[Tensor, Tensor]
    examples: Mapping[int, int]
    slow: Collection[int] = ()

    def run_round(self, state: ServerState) -> tuple[ServerState, Record]:
        """Run one round and return the next state and the round's record.

        Raises:
            RoundError: fewer updates than the quorum were usable.
        """
        cfg = self.config.fed
        ask = self.strategy.ask(state.round)
        called = sample(cfg.seed, state.round, cfg.clients, ask.fraction)
        start, cpu = time.perf_counter(), time.process_time()
        work = _Round(self, state, ask)
        clients = [work.call(client) for client in called]
        accepted = [c for c in clients if c.error is None]
        if len(accepted) < max(1, cfg.quorum * len(called)):
            reasons = "; ".join(f"client {c.client}: {c.error}" for c in clients if c.error)
            raise RoundError(
                f"round {state.round} of {self.strategy.name}: {len(accepted)} of {len(called)} updates usable, "
                f"wanted at least {cfg.quorum:.0%} ({reasons})"
            )
        after = work.finish()
        client_seconds = sum(c.seconds for c in clients)
        server_seconds = time.perf_counter() - start - work.client_wall
        cpu = time.process_time() - cpu
        start = time.perf_counter()
        last = after.round == cfg.rounds
        accuracy, loss = None, None
        if last or after.round % cfg.eval_every == 0:
            accuracy, loss = self.workshop.evaluate(after.served, after.masks, *self.test)
        record = Record(
            method=self.strategy.name,
            seed=cfg.seed,
            round=state.round,
            phase=ask.phase,
            accuracy=accuracy,
            loss=loss,
            flops=sum(c.flops for c in clients),
            bytes_up=sum(c.bytes_up for c in clients),
            bytes_down=sum(c.bytes_down for c in clients),
            seconds=client_seconds + server_seconds,
            client_seconds=client_seconds,
            server_seconds=server_seconds,
            eval_seconds=time.perf_counter() - start,
            **self._kept(after.masks),
            clients=tuple(clients),
            cpu_seconds=cpu,
        )
        return after, record

    def _kept(self, masks: MaskSet | None) -> dict:
        full = {n: p for n, p in self.workshop.full.named_parameters() if p.ndim >= 2}
        layers = {
            name: float(masks[name].float().mean()) if masks is not None and name in masks else 1.0 for name in full
        }
        small = dict(self.workshop.prepare(masks).model.named_parameters())
        return {
            "density": sum(layers[n] * p.numel() for n, p in full.items())
            / max(1, sum(p.numel() for p in full.values())),
            "channels": sum(small[n].shape[0] for n in full) / max(1, sum(p.shape[0] for p in full.values())),
            "layers": layers,
        }


class _Round:
    """What one round gathers before it is known whether it counts."""

    def __init__(self, server: Server, state: ServerState, ask: Ask) -> None:
        self.server, self.state, self.ask = server, state, ask
        self.kind = EXPLORE if ask.phase == "exploration" else TRAIN
        self.aggregator = Aggregator(server.workshop.locate)
        sums = server.strategy.may_prune(state)
        self.sums = Sums(state.params) if sums else None
        self.holders: dict[int, View] = {}
        self.client_wall = 0.0
        self._sent: dict[tuple[bytes, bool], tuple[View, tuple[bytes, ...]]] = {}

    def call(self, client: int) -> ClientRecord:
        """Exchange payloads with one client, take its update in, and write down what it cost."""
        held = self.state.views.get(self.state.held.get(client, b""))
        view, reply = self._exchange(client, held)
        replies = [reply]
        examples, loss, error = 0, None, replies[0].error
        try:
            if error is None:
                message = Message.unpack(replies[0].payload)
                if message.kind == RESYNC and held is not None:  # the client lost its base: send everything
                    view, reply = self._exchange(client, None)
                    replies.append(reply)
                    error = reply.error
                    if error is None:
                        message = Message.unpack(replies[1].payload)
            if error is None:
                self._accept(client, message, view)
                examples, loss = message.examples, message.loss
                self.holders[client] = view
        except codec.DecodeError as fault:
            error = str(fault)
        return ClientRecord(
            client=client,
            bytes_up=sum(r.cost.bytes_up for r in replies),
            bytes_down=sum(r.cost.bytes_down for r in replies),
            seconds=sum(r.cost.seconds for r in replies),
            flops=sum(r.cost.flops for r in replies),
            examples=examples,
            loss=loss,
            error=error,
            cpu_seconds=sum(r.cpu_seconds for r in replies),
        )

    def _exchange(self, client: int, held: View | None) -> tuple[View, Reply]:
        state, server = self.state, self.server
        base = held.id if held is not None else NO_VIEW
        slow = client in server.slow and state.narrow is not None
        if (base, slow) not in self._sent:
            kind, keys = server.strategy.downlink, {"seed": server.config.fed.seed, "round_number": state.round}
            masks = state.narrow if slow else state.masks
            self._sent[base, slow] = downlink.send(state.params, masks, held, kind, server.workshop.locate, **keys)
        view, frames = self._sent[base, slow]
        message = Message(self.kind, state.round, client, frames, view.id, base)
        start = time.perf_counter()
        reply = self.server.transport.exchange(client, message.pack())
        self.client_wall += time.perf_counter() - start
        return view, reply

    def _accept(self, client: int, message: Message, view: View) -> None:
        if message.kind != UPDATE or message.client != client or message.round != self.state.round:
            raise codec.DecodeError(
                f"an answer of kind {message.kind} from client {message.client} for round {message.round}; "
                f"wanted an update of client {client} for round {self.state.round}"
            )
        if message.view != view.id:
            raise codec.DecodeError("the update was made from another view than this round's broadcast")
        if not 1 <= message.examples <= self.server.examples[client]:
            raise codec.DecodeError(
                f"the update claims {message.examples} examples; the client registered {self.server.examples[client]}"
            )
        trained, probed = bool(self.ask.epochs), bool(self.ask.probe)
        if len(message.frames) != trained + probed:
            raise codec.DecodeError(f"the update has {len(message.frames)} frames, wanted {trained + probed}")
        weight, masks = float(message.examples), view.masks
        if self.sums is None:
            self.aggregator.add(message.frames[0], weight, masks)
            return
        at = self.server.workshop.locate(masks)
        delta = {name: torch.zeros(shape) for name, shape in at.schema.shapes.items()}
        if trained:
            delta = codec.decode(message.frames[0], masks=at.inside, schema=at.schema)
        powers = None
        if probed:
            probe = codec.decode(message.frames[-1], schema=self.server.schema)
            powers = {name: p**self.ask.power for name, p in probe.items()}
        for name, t in (*delta.items(), *(powers or {}).items()):
            if t.numel() and float(t.abs().max()) > _ABSURD:  # its square would drown all guidance
                raise codec.DecodeError(f"the update moves {name!r} by more than {_ABSURD:g}")
        self.aggregator.add_decoded(delta, weight, masks)
        self.sums.add(at.expand(delta), weight, powers)

    def finish(self) -> ServerState:
        """Return the state after the round: new parameters, guidance and masks, and who holds what."""
        state, strategy = self.state, self.server.strategy
        params, memory = strategy.step(state, self.aggregator.mean())
        guidance = strategy.guidance(state, params, self.sums) if self.sums is not None else state.guidance
        masks = strategy.masks(ServerState(params, state.masks, state.round, guidance=guidance))
        narrow, average = state.narrow, state.average
        if masks is not None and masks is not state.masks:
            average = None  # what was averaged is another model
            params = strategy.settle(params, masks)
            narrow = strategy.narrow(masks, guidance) if self.server.slow else None
        held, views = dict(state.held), dict(state.views)
        if strategy.stateful:
            held.update({client: view.id for client, view in self.holders.items()})
            views.update({view.id: view for view in self.holders.values()})
            views = {name: view for name, view in views.items() if name in set(held.values())}
        if strategy.average:
            average = Average.after(average, params, strategy.average)
        following = ServerState(
            params, masks, state.round + 1, views, held, memory=memory, narrow=narrow, average=average
        )
        return replace(following, guidance=guidance) if strategy.may_prune(following) else following
