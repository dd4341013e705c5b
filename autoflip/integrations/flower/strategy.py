"""The server's side of Flower: FedAvg's sampling, evaluation and metrics around autoflip's rounds."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from autoflip import codec
from autoflip.fed.config import Config
from autoflip.fed.message import RESYNC, Message
from autoflip.fed.round import Round, enough
from autoflip.fed.state import ServerState
from autoflip.fed.strategies import METHODS
from autoflip.integrations.flower.metrics import usable
from autoflip.integrations.flower.records import RECORD, Terms, count
from autoflip.masks import MaskSet

__all__ = ["AutoFlip"]

_LOG = logging.getLogger("flwr.autoflip")  # Flower's handlers print it
_RESYNC = "it lost what it held; the next message brings the whole model"


class AutoFlip(FedAvg):
    """Explore in round 1, prune, then exchange coded differences; to be used in FedAvg's place.

    Clients need ``mods=[flower.mod]``. The method is ``autoflip run``'s (README): guidance from sums of round 1,
    whole channels pruned and single weights inside, server momentum, a running mean of the rounds' models. Two things
    differ: an app's model keeps its shape (masks zero a channel, nothing is cut out of the tensors), and local steps
    are the app's own.

    Args:
        model: whose layers are looked at; its ``state_dict()`` names the initial arrays. Never trained.
        example: inputs of a small batch, on which FLOPs are counted; needed for ``prune.flops`` and ``prune.bytes``,
            and for FLOPs to count in a channel's score and in how much of a narrow model is kept.
        density: kept share of the weights. This and the next three: None: as ``autoflip run`` has it.
        channels: kept share of channels and neurons.
        values: of an update on its way up: fp32 | bf16 | int8 | int4.
        downlink: of the difference to what a client holds: bf16 (lossless) | int8 | int4; fp32: the whole model.
        feedback: clients round to the nearest and add what was lost to their next update, instead of rounding
            stochastically.
        settings: further ``section.key=value`` of ``fed.Config``: sections prune, explore, server and wire,
            ``fed.seed`` and ``fed.quorum`` count here.
        max_examples: a reply that claims more training examples is refused.
        max_change: so is an update that moves any entry by more.
        fedavg: arguments of Flower's FedAvg: ``fraction_train``, ``min_train_nodes``, ``arrayrecord_key``, ...

    Attributes:
        bytes_up: bytes of all records that came from clients in the arrays' place; a round's are in its metrics as
            "bytes-up". Flower's envelopes, metrics and configs are not counted.
        bytes_down: the same to clients.
        rejected: (round, node, why) of every reply that was of no use.

    Raises:
        ConfigError: a share is outside (0, 1], or a value is unknown.

    No strategy may stand around it and change arrays, as Flower's central differential privacy does (an error says so
    after round 1). Local privacy works: ``mods=[flower.mod, LocalDpMod(...)]`` sees and changes whole arrays.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor | None = None,
        *,
        density: float | None = None,
        channels: float | None = None,
        values: str | None = None,
        downlink: str | None = None,
        feedback: bool = False,
        settings: Iterable[str] = (),
        max_examples: int = 10**6,
        max_change: float = 1e6,
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        named = {
            "prune.density": density,
            "prune.channels": channels,
            "wire.values": values,
            "wire.downlink": downlink,
        }
        given = [f"{key}={value}" for key, value in named.items() if value is not None]
        self.config = Config.load(overrides=[*given, *settings])
        if self.config.explore.signal == "curvature":
            raise ValueError(
                "flower.AutoFlip: explore.signal=curvature needs a second upload, which an app's train function does "
                "not make; choose fisher, deviation or magnitude"
            )
        self.method = METHODS["autoflip"](self.config, model, example)
        self.feedback, self.max_examples, self.max_change = feedback, max_examples, max_change
        self.bytes_up = self.bytes_down = 0
        self.rejected: list[tuple[int, int, str]] = []
        self._model = model
        self._terms: Terms | None = None
        self._arrays = ArrayRecord()
        self._state: ServerState | None = None
        self._round: Round | None = None
        self._current: set[bytes] = set()
        self._numbers: dict[int, int] = {}  # node -> client: an envelope has 32 bits for it
        self._counted = 0, 0

    @property
    def masks(self) -> MaskSet | None:
        """What is kept; None before the end of round 1."""
        return self._state.masks if self._state is not None else None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[FlowerMessage]:
        """Sample nodes as FedAvg does; each is sent what it lacks of ``arrays``, which are those of the last round."""
        self._begin_or_check(arrays, first=server_round == 1)
        return self._offer(super().configure_train(server_round, arrays, config, grid), average=False)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[FlowerMessage]:
        """Sample nodes as FedAvg does; each is sent what it lacks of the model that is handed out."""
        self._begin_or_check(arrays, first=False)
        return self._offer(super().configure_evaluate(server_round, arrays, config, grid), average=True)

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the updates over the clients that hold a weight; a bad reply costs its own update only."""
        work, state = self._round, self._state
        if work is None or state is None or self._terms is None:
            return None, None
        accepted = []
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                payload = self._open(reply)
                message = work.take(self._numbers.get(node, -1), payload, self.max_examples)
                if message.kind == RESYNC:
                    raise codec.DecodeError(_RESYNC)
                accepted.append(reply.content)
            except codec.DecodeError as fault:
                self._reject(server_round, node, str(fault))
        called = len(work.holders) + len(work.lost)
        if not called:
            return None, None
        metrics = self._sum_up(server_round, accepted, self.train_metrics_aggr_fn)
        if not enough(len(accepted), called, self.config.fed.quorum):
            self._state = state.holding(work.holders, work.lost)
            _LOG.warning("round %d: %d of %d updates usable; the model stays", server_round, len(accepted), called)
            return None, metrics
        self._state = work.finish()
        self._current = set()
        self._arrays = self._terms.arrays_of(self._state.served)
        return self._arrays, metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[FlowerMessage]) -> MetricRecord | None:
        """Aggregate the metrics as FedAvg does, without those that are of no use."""
        work, state = self._round, self._state
        if work is None or state is None:
            return None
        accepted = []
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                if not reply.has_error() and RECORD not in reply.content.config_records:
                    work.received(self._numbers[node])
                    accepted.append(reply.content)
                else:
                    kind = Message.unpack(self._open(reply)).kind
                    raise codec.DecodeError(_RESYNC if kind == RESYNC else f"an answer of kind {kind} to an evaluation")
            except (codec.DecodeError, KeyError) as fault:
                self._reject(server_round, node, str(fault))
        if not work.holders and not work.lost:
            return None
        self._state = state.holding(work.holders, work.lost)
        if state.served is state.params:
            self._current |= {view.id for view in work.holders.values()}
        return self._sum_up(server_round, accepted, self.evaluate_metrics_aggr_fn)

    def summary(self) -> None:
        """Log the configuration."""
        cfg = self.config
        _LOG.info(
            "\t├──> AutoFLIP: density %g, channels %g (0: by the model's width)", cfg.prune.density, cfg.prune.channels
        )
        _LOG.info("\t├──> Wire: %s up, %s down", cfg.wire.values, cfg.wire.downlink)
        super().summary()

    def _begin_or_check(self, arrays: ArrayRecord, *, first: bool) -> None:
        """Begin with these arrays, or see that nobody changed what the last round made."""
        if first or self._state is None:
            self._begin(arrays)
        elif arrays is not self._arrays and _contents(arrays) != _contents(self._arrays):
            raise ValueError(
                "flower.AutoFlip: the arrays are not those that the last round made; whoever changed them (a strategy "
                "around this one that clips or adds noise?) had no say, since nodes are sent differences to what they "
                "hold. For differential privacy noise belongs to the nodes: "
                "ClientApp(mods=[flower.mod, LocalDpMod(...)])"
            )

    def _begin(self, arrays: ArrayRecord) -> None:
        """Take the initial arrays for the state before round 1."""
        found: dict[str, Tensor] = dict(arrays.to_torch_state_dict())
        schema, wanted = codec.Schema.of(found), codec.Schema.of(self._model.state_dict())
        if {(e.name, e.shape) for e in schema.entries} != {(e.name, e.shape) for e in wanted.entries}:
            raise ValueError(
                f"flower.AutoFlip: the initial arrays are {', '.join(list(found)[:4])}, ... but the model's are "
                f"{', '.join(list(wanted.shapes)[:4])}, ...; start with initial_arrays=ArrayRecord(model.state_dict()) "
                "of the same model"
            )
        floats = {name: value for name, value in found.items() if value.is_floating_point()}
        wire = self.config.wire
        self._terms = Terms(
            schema=schema,
            integers={name: value for name, value in found.items() if name not in floats},
            dtypes=tuple(str(value.dtype).removeprefix("torch.") for value in floats.values()),
            arrays=self.arrayrecord_key,
            weight=self.weighted_by_key,
            values=wire.values,
            levels=wire.levels,
            downlink=wire.downlink,
            seed=self.config.fed.seed,
            feedback=self.feedback,
        )
        self._arrays = arrays
        self._state = ServerState({name: value.float() for name, value in floats.items()})
        self._current = set()

    def _offer(self, messages: Iterable[FlowerMessage], *, average: bool) -> list[FlowerMessage]:
        """Put payloads in the place of the arrays."""
        state, terms, seed = self._state, self._terms, self.config.fed.seed
        assert state is not None
        assert terms is not None
        if average:
            state, seed = replace(state, params=state.served), seed + 1  # other random rounding than in training
        self._round = Round(self.method, state, terms.locate, seed=seed, cap=self.max_change, current=self._current)
        self._counted = self.bytes_up, self.bytes_down
        offered = []
        for message in messages:
            client = self._numbers.setdefault(message.metadata.dst_node_id, len(self._numbers))
            fields: dict[str, Any] = {"payload": self._round.offer(client)}
            if client not in state.held:
                fields |= terms.write()
            kept = {name: record for name, record in message.content.items() if name != self.arrayrecord_key}
            message.content = RecordDict({**kept, RECORD: ConfigRecord(fields)})
            self.bytes_down += count(fields)
            offered.append(message)
        return offered

    def _open(self, reply: FlowerMessage) -> bytes:
        """Return a reply's payload, counted; raises DecodeError where there is none."""
        if reply.has_error():
            raise codec.DecodeError(f"error {reply.error.code}: {reply.error.reason}")
        record = reply.content.config_records.get(RECORD)
        if record is None:
            raise codec.DecodeError("the reply holds no payload; does its ClientApp have mods=[flower.mod]?")
        self.bytes_up += count(record)
        payload = record.get("payload")
        if not isinstance(payload, bytes):
            raise codec.DecodeError(f"the reply's payload is {type(payload).__name__}, wanted bytes")
        return payload

    def _reject(self, server_round: int, node: int, why: str) -> None:
        self.rejected.append((server_round, node, why))
        _LOG.warning("round %d: node %d: %s", server_round, node, why)

    def _sum_up(self, server_round: int, contents: list[RecordDict], aggregate: Any) -> MetricRecord:
        """Aggregate metrics, and add what crossed the link since the messages were configured."""
        good, bad = usable(contents, self.weighted_by_key, self.max_examples)
        if bad:
            _LOG.warning("round %d: metrics of %d replies left out (%s)", server_round, len(bad), bad[0])
        metrics = MetricRecord(dict(aggregate(good, self.weighted_by_key))) if good else MetricRecord()
        metrics["bytes-up"] = self.bytes_up - self._counted[0]
        metrics["bytes-down"] = self.bytes_down - self._counted[1]
        return metrics


def _contents(arrays: ArrayRecord) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    return [(name, array.dtype, tuple(array.shape), array.data) for name, array in arrays.items()]
