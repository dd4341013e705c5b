"""The server: one round, from the broadcast to the new state and its record."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd

from autoflip import codec
from autoflip.fed.config import Config
from autoflip.fed.ledger import ClientRecord, Record
from autoflip.fed.message import RESYNC
from autoflip.fed.round import Round, enough
from autoflip.fed.seeding import sample
from autoflip.fed.state import ServerState
from autoflip.fed.strategies import Strategy
from autoflip.fed.transport import Transport
from autoflip.fed.workshop import Workshop
from autoflip.masks import MaskSet

__all__ = ["RoundError", "Server"]


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
        work = Round(self.strategy, state, self.workshop.locate, seed=cfg.seed, slow=self.slow)
        offers: list[bytes] = []
        calls = []
        for i, client in enumerate(called):
            for coming in called[len(offers) : i + self.transport.ahead]:
                offers.append(work.offer(coming))
                self.transport.begin(coming, offers[-1])
            calls.append(self._call(work, client, offers[i]))
            offers[i] = b""
        clients, client_wall = [record for record, _ in calls], sum(wall for _, wall in calls)
        accepted = [c for c in clients if c.error is None]
        if not enough(len(accepted), len(called), cfg.quorum):
            reasons = "; ".join(f"client {c.client}: {c.error}" for c in clients if c.error)
            raise RoundError(
                f"round {state.round} of {self.strategy.name}: {len(accepted)} of {len(called)} updates usable, "
                f"wanted at least {cfg.quorum:.0%} ({reasons})"
            )
        after = work.finish()
        client_seconds = sum(c.seconds for c in clients)
        server_seconds = time.perf_counter() - start - client_wall
        cpu = time.process_time() - cpu
        start = time.perf_counter()
        last = after.round == cfg.rounds
        accuracy, loss = None, None
        if last or after.round % cfg.eval_every == 0:
            accuracy, loss = self.workshop.evaluate(after.served, after.masks, *self.test)
            loss = loss if math.isfinite(loss) else None  # JSON has no infinity
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

    def _call(self, work: Round, client: int, offer: bytes) -> tuple[ClientRecord, float]:
        """Let one client's update in; return what it cost, and the wall seconds that the transport took."""
        replies, wall = [], 0.0

        def exchange(payload: bytes) -> str | None:
            nonlocal wall
            start = time.perf_counter()
            replies.append(self.transport.exchange(client, payload))
            wall += time.perf_counter() - start
            return replies[-1].error

        error = exchange(offer)
        examples, loss = 0, None
        try:
            if error is None:
                message = work.take(client, replies[-1].payload, self.examples[client])
                if message.kind == RESYNC:  # the client lost its base: send everything
                    error = exchange(work.offer(client, whole=True))
                    if error is None:
                        message = work.take(client, replies[-1].payload, self.examples[client])
            if error is None:
                examples, loss = message.examples, message.loss
        except codec.DecodeError as fault:
            error = str(fault)
        record = ClientRecord(
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
        return record, wall

    def _kept(self, masks: MaskSet | None) -> dict:
        full = {n: p for n, p in self.workshop.full.named_parameters() if p.ndim >= 2}
        layers = {
            name: float(masks[name].float().mean()) if masks is not None and name in masks else 1.0 for name in full
        }
        small = dict(self.workshop.prepare(masks).model.named_parameters())
        turned = (m.weight for m in self.workshop.full.modules() if isinstance(m, _ConvTransposeNd))
        outputs = dict.fromkeys(map(id, turned), 1)  # which dimension counts a layer's channels; 0 elsewhere
        at = {n: outputs.get(id(p), 0) for n, p in full.items()}
        return {
            "density": sum(layers[n] * p.numel() for n, p in full.items())
            / max(1, sum(p.numel() for p in full.values())),
            "channels": sum(small[n].shape[at[n]] for n in full) / max(1, sum(p.shape[at[n]] for n, p in full.items())),
            "layers": layers,
        }
