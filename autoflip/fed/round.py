"""One round, from what clients are offered to the state after it; whoever carries the payloads is not its business."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from autoflip import codec
from autoflip.explore import Sums
from autoflip.fed import downlink
from autoflip.fed.aggregate import Aggregator
from autoflip.fed.coordinates import Locate
from autoflip.fed.message import EXPLORE, NO_VIEW, RESYNC, TRAIN, UPDATE, Message
from autoflip.fed.state import Average, ServerState, View
from autoflip.fed.strategies import Strategy

__all__ = ["Round", "enough"]

_MOST = 1e6  # training moves no entry by more in a round; sums of far larger updates overflow
_ABSURD = 1e12  # more would drown all guidance


def enough(accepted: int, called: int, quorum: float) -> bool:
    """Tell whether a round counts: at least one client answered well, and that share of all that were called."""
    return accepted >= max(1, quorum * called - 1e-9)  # 0.56 * 25 is a little more than 14


class Round:
    """What one round gathers before it is known whether it counts.

    Args:
        strategy: the method.
        state: before the round; stays as it is.
        locate: masks -> coordinates of what travels under them.
        seed: of the stochastic rounding.
        slow: clients that get the narrow model.
        cap: an update that moves an entry by more is refused, and so is guidance of more; None: 1e6 and 1e12.
        current: ids of views that were made from exactly ``state.params``: who holds one is sent nothing more.
    """

    def __init__(
        self,
        strategy: Strategy,
        state: ServerState,
        locate: Locate,
        *,
        seed: int = 0,
        slow: Collection[int] = (),
        cap: float | None = None,
        current: Collection[bytes] = (),
    ) -> None:
        self.strategy, self.state, self.locate = strategy, state, locate
        self.ask = strategy.ask(state.round)
        self.kind = EXPLORE if self.ask.phase == "exploration" else TRAIN
        self.aggregator = Aggregator(locate)
        self.sums = Sums(state.params) if strategy.may_prune(state) else None
        self.holders: dict[int, View] = {}
        self._seed, self._slow, self._cap, self._current = seed, slow, cap, current
        self._schema = locate(None).schema
        self._sent: dict[tuple[bytes, bool], tuple[View, tuple[bytes, ...]]] = {}
        self._offered: dict[int, tuple[View, View | None]] = {}

    def offer(self, client: int, *, whole: bool = False) -> bytes:
        """Return the payload that brings ``client`` up to date; ``whole``: it has lost what it held."""
        state = self.state
        held = None if whole else state.views.get(state.held.get(client, b""))
        base = held.id if held is not None else NO_VIEW
        slow = client in self._slow and state.narrow is not None
        if held is not None and base in self._current and held.masks == (state.narrow if slow else state.masks):
            self._sent[base, slow] = held, ()
        if (base, slow) not in self._sent:
            masks = state.narrow if slow else state.masks
            keys = {"seed": self._seed, "round_number": state.round}
            kind = self.strategy.downlink
            self._sent[base, slow] = downlink.send(state.params, masks, held, kind, self.locate, **keys)
        view, frames = self._sent[base, slow]
        self._offered[client] = view, held
        return Message(self.kind, state.round, client, frames, view.id, base).pack()

    def take(self, client: int, payload: bytes, most: int) -> Message:
        """Add the answer of ``client`` to the round, or learn (RESYNC) that it lost what it held.

        Args:
            client: who was offered something.
            payload: its bytes, hostile or not.
            most: training examples that it may claim.

        Raises:
            DecodeError: the payload is of no use; nothing has changed.
        """
        message = Message.unpack(payload)
        if client not in self._offered or client in self.holders:
            raise codec.DecodeError(f"an answer from client {client}, which was not asked for one (any more)")
        view, held = self._offered[client]
        if message.kind == RESYNC and held is not None:
            return message
        self._accept(client, message, view, most)
        self.received(client)
        return message

    def received(self, client: int) -> None:
        """Write down that ``client`` holds what it was offered."""
        self.holders[client] = self._offered[client][0]

    @property
    def lost(self) -> set[int]:
        """Clients that were offered something and have not shown that they hold it."""
        return set(self._offered) - set(self.holders)

    def _accept(self, client: int, message: Message, view: View, most: int) -> None:
        if message.kind != UPDATE or message.client != client or message.round != self.state.round:
            raise codec.DecodeError(
                f"an answer of kind {message.kind} from client {message.client} for round {message.round}; "
                f"wanted an update of client {client} for round {self.state.round}"
            )
        if message.view != view.id:
            raise codec.DecodeError("the update was made from another view than this round's broadcast")
        if not 1 <= message.examples <= most:
            raise codec.DecodeError(f"the update claims {message.examples} examples; the client registered {most}")
        trained, probed = bool(self.ask.epochs), bool(self.ask.probe)
        if len(message.frames) != trained + probed:
            raise codec.DecodeError(f"the update has {len(message.frames)} frames, wanted {trained + probed}")
        weight, masks = float(message.examples), view.masks
        most_moved, most_guidance = (_MOST, _ABSURD) if self._cap is None else (self._cap, self._cap)
        if self.sums is None and trained:  # added as it is decoded
            self.aggregator.add(message.frames[0], weight, masks, most_moved)
            return
        at = self.locate(masks)
        delta = {name: torch.zeros(shape) for name, shape in at.schema.shapes.items()}
        if trained:
            delta = codec.decode(message.frames[0], masks=at.inside, schema=at.schema)
        powers = None
        if probed:
            probe = codec.decode(message.frames[-1], schema=self._schema)
            powers = {name: p**self.ask.power for name, p in probe.items()}
        for tensors, cap in ((delta, most_moved), (powers or {}, most_guidance)):
            for name, t in tensors.items():
                if t.numel() and float(t.abs().max()) > cap:
                    raise codec.DecodeError(f"the update moves {name!r} by more than {cap:g}")
        self.aggregator.add_decoded(delta, weight, masks)
        if self.sums is not None:
            some = masks if self.state.narrow is not None else None  # else all clients hold the same
            self.sums.add(at.expand(delta), weight, powers, some)

    def finish(self) -> ServerState:
        """Return the state after the round: new parameters, guidance and masks, and who holds what."""
        state, strategy = self.state, self.strategy
        params, memory = strategy.step(state, self.aggregator.mean())
        guidance = strategy.guidance(state, params, self.sums) if self.sums is not None else state.guidance
        masks = strategy.masks(ServerState(params, state.masks, state.round, guidance=guidance))
        narrow, average = state.narrow, state.average
        if masks is not None and masks is not state.masks:
            average = None  # what was averaged is another model
            params = strategy.settle(params, masks)
            narrow = strategy.narrow(masks, guidance) if self._slow else None
        if strategy.average:
            average = Average.after(average, params, strategy.average)
        following = ServerState(
            params, masks, state.round + 1, state.views, state.held, memory=memory, narrow=narrow, average=average
        )
        if strategy.stateful:
            following = following.holding(self.holders, self.lost)
        return replace(following, guidance=guidance) if strategy.may_prune(following) else following
