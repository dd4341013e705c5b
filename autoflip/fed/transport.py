"""Carries payloads to clients and back, and writes down how long each was and what the client spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from autoflip import meter

__all__ = ["InProcess", "Reply", "Transport"]


class _Handles(Protocol):
    cost: meter.Cost
    cpu_seconds: float

    def handle(self, payload: bytes) -> bytes: ...


@dataclass(frozen=True)
class Reply:
    """A client's answer.

    Attributes:
        payload: its bytes; empty when the client failed.
        cost: its FLOPs and seconds, and the bytes of both payloads.
        error: why the client failed, or None.
        cpu_seconds: processor time of the client's work; 0 where the engine cannot tell.
    """

    payload: bytes
    cost: meter.Cost
    error: str | None = None
    cpu_seconds: float = 0.0


class Transport(Protocol):
    """What the server needs of an engine: bytes to a client, bytes back.

    Attributes:
        ahead: clients of a round that may be working, the next one to be waited for included.
    """

    ahead: int

    def begin(self, client: int, payload: bytes) -> None:
        """Let ``client`` begin, if the engine can; :meth:`exchange` with the same arguments follows."""
        ...

    def exchange(self, client: int, payload: bytes) -> Reply:
        """Carry ``payload`` to ``client`` and return its answer; never raises for a client's fault."""
        ...


class InProcess:
    """Clients in this process, called one after the other, on the bytes that a network would carry.

    Args:
        clients: id -> client.
    """

    ahead = 1

    def __init__(self, clients: Mapping[int, _Handles]) -> None:
        self.clients = clients

    def begin(self, client: int, payload: bytes) -> None:
        """Do nothing: clients work one after the other."""

    def exchange(self, client: int, payload: bytes) -> Reply:
        """Carry ``payload`` to ``client`` and return its answer; a client that raises costs its own update only."""
        participant = self.clients[client]
        participant.cost, participant.cpu_seconds = meter.Cost(), 0.0
        error, answer = None, b""
        try:
            answer = participant.handle(payload)
            if not isinstance(answer, bytes):
                error, answer = f"its answer is {type(answer).__name__}, wanted bytes", b""
        except (Exception, SystemExit) as fault:  # noqa: BLE001 - whatever a client does wrong must not end the round
            error = f"{type(fault).__name__}: {fault}"
        spent = participant.cost
        meter.charge_bytes(up=len(answer), down=len(payload))
        cost = meter.Cost(spent.flops, spent.seconds, bytes_up=len(answer), bytes_down=len(payload))
        return Reply(answer, cost, error, participant.cpu_seconds)
