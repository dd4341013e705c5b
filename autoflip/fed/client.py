"""A client: bytes in, local steps on a compact model, bytes out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from autoflip import codec, explore, meter
from autoflip.fed.config import Config
from autoflip.fed.downlink import receive
from autoflip.fed.message import NO_VIEW, RESYNC, UPDATE, Message
from autoflip.fed.seeding import derive, generator
from autoflip.fed.state import View
from autoflip.fed.strategies import Strategy
from autoflip.fed.workshop import Prepared, Workshop

__all__ = ["Client"]


@dataclass
class Client:
    """One participant: its data, and the view of the model that it holds.

    Attributes:
        id: number of the client.
        inputs: its training inputs ``(n, ...)``.
        targets: their labels ``(n,)``.
        held: the view it received last; None: nothing yet.
        cost: FLOPs and seconds of its work since the caller last reset it.
        cpu_seconds: processor time of the same work, whatever else the machine does meanwhile.
    """

    id: int
    inputs: Tensor
    targets: Tensor
    config: Config
    strategy: Strategy
    schema: codec.Schema
    workshop: Workshop
    held: View | None = None

    def __post_init__(self) -> None:
        self.cost, self.cpu_seconds = meter.Cost(), 0.0
        self._built_for: str | None = None

    def handle(self, payload: bytes) -> bytes:
        """Answer one payload of the server.

        Raises:
            DecodeError: the payload is damaged.
        """
        start, cpu = time.perf_counter(), time.process_time()
        self._uncharged = self._uncharged_cpu = 0.0
        try:
            message = Message.unpack(payload)
            base = self.held if message.base != NO_VIEW else None
            if message.base != (base.id if base is not None else NO_VIEW):
                return Message(RESYNC, message.round, self.id).pack()
            view = receive(message, base, self.workshop.locate, self.strategy.downlink)
            self.held = view if self.strategy.stateful else None
            return self._work(message, view).pack()
        finally:  # failed work took its time, too
            meter.synchronise()
            self.cost.seconds += time.perf_counter() - start - self._uncharged
            self.cpu_seconds += time.process_time() - cpu - self._uncharged_cpu

    @contextmanager
    def _not_charged(self) -> Iterator[None]:
        """Leave what the simulation alone does out of the client's seconds."""
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self._uncharged += time.perf_counter() - start
        self._uncharged_cpu += time.process_time() - cpu

    def _work(self, message: Message, view: View) -> Message:
        cfg = self.config
        ask = self.strategy.ask(message.round)
        frames = []
        wire: dict[str, Any] = {
            "seed": cfg.fed.seed,
            "round": message.round,
            "client": self.id,
            "base_id": view.id,
        }
        prepared = self._prepare(view)
        prepared.put(view.params)
        loss = 0.0
        if ask.epochs:
            before = {name: t.clone() for name, t in prepared.read().items()}
            loss = self._train(prepared, message, ask.epochs)
            delta = {name: t - before[name] for name, t in prepared.read().items()}
            at, values, levels = prepared.at, self.strategy.values, self.strategy.levels or None
            frames.append(codec.encode(delta, masks=at.inside, schema=at.schema, values=values, levels=levels, **wire))
        if ask.probe:
            frames.append(self._probe(ask.probe, prepared, view, wire))
        return Message(UPDATE, message.round, self.id, tuple(frames), view.id, examples=len(self.targets), loss=loss)

    def _train(self, prepared: Prepared, message: Message, epochs: int) -> float:
        cfg = self.config
        keys = (cfg.fed.seed, "train", message.round, self.id)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(*keys, "dropout"))  # torch.manual_seed seeks GPUs for 1 ms
            return explore.local_steps(
                prepared.model,
                self.inputs,
                self.targets,
                F.cross_entropy,
                epochs=epochs,
                batch_size=cfg.train.batch_size,
                lr=cfg.train.lr * cfg.train.lr_decay**message.round * self.strategy.lr_factor(message.round),
                momentum=cfg.train.momentum,
                weight_decay=cfg.train.weight_decay,
                clip_norm=cfg.train.clip_norm,
                proximal=self.strategy.proximal,
                generator=generator(*keys),
                on_batch=lambda x, y: self._charge_step(prepared, x, y),
            )

    def _probe(self, kind: str, prepared: Prepared, view: View, wire: dict[str, Any]) -> bytes:
        data = self.inputs, self.targets, F.cross_entropy
        found: dict[str, Tensor] = {}

        def curvature() -> None:
            seed = derive(self.config.fed.seed, "curvature", wire["round"], self.id)
            diagonal = explore.curvature_diagonal(prepared.model, *data, seed=seed)
            # roots: a linear int8 scale covers their range, not that of the squares
            found.update({name: h.clamp_min(0).sqrt() for name, h in diagonal.items()})

        def gradient() -> None:
            whole = self.workshop.prepare(None)  # a pruned weight has a gradient too
            whole.load(prepared.at.expand(view.params))
            seed = derive(self.config.fed.seed, "gradient", wire["round"], self.id)
            found.update(explore.absolute_gradient(whole.model, *data, seed=seed))

        # counting slows it by its dispatch overhead only: one pass on a large batch
        self.cost.flops += meter.count_flops({"curvature": curvature, "gradient": gradient}[kind])
        dense = {n: found.get(n, torch.zeros(shape)) for n, shape in self.schema.shapes.items()}
        values = "int8" if self.strategy.values == "int4" else self.strategy.values  # ranks need the small ones too
        return codec.encode(dense, values=values, schema=self.schema, **wire)

    def _charge_step(self, prepared: Prepared, x: Tensor, y: Tensor) -> None:
        flops = prepared.flops_of(x)
        if flops is None:
            with self._not_charged():
                flops = prepared.step_flops(x, y)
        self.cost.flops += flops

    def _prepare(self, view: View) -> Prepared:
        # the simulation builds a compact model once for all clients; each would have built its own, once a mask
        with self._not_charged():
            prepared = self.workshop.prepare(view.masks)
        key = view.masks.fingerprint() if view.masks is not None else ""
        if key != self._built_for:
            self.cost.seconds += prepared.seconds
            self.cpu_seconds += prepared.cpu_seconds
            self._built_for = key
        return prepared
