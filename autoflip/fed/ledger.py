"""The ledger: one record a round, and the summary that any reader can recompute from the records alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoflip.meter import Cost

__all__ = ["ClientRecord", "Record", "read_records", "summarise", "total_cost"]


@dataclass(frozen=True)
class ClientRecord:
    """One client in one round: payload bytes both ways, seconds and FLOPs it spent, or why it was rejected."""

    client: int
    bytes_up: int
    bytes_down: int
    seconds: float
    flops: int
    examples: int
    loss: float | None
    error: str | None
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class Record:
    """One round of one method; bytes, FLOPs and seconds are of this round alone.

    Attributes:
        method: name of the method.
        seed: of the run.
        round: number from 0.
        phase: "exploration" or "training".
        accuracy: test accuracy after the round, 0 to 1; None: this round was not evaluated (``fed.eval_every``).
        loss: mean test cross-entropy after the round, or None.
        flops: executed by clients.
        bytes_up: payload bytes from clients, damaged and rejected ones included.
        bytes_down: payload bytes to clients, resends included.
        seconds: client_seconds + server_seconds.
        client_seconds: decode, build, train, encode, summed over clients.
        server_seconds: encode, decode, aggregate, prune.
        eval_seconds: test-set evaluation, in no other sum.
        density: kept share of the weights after the round, 0 to 1: of the parameters that ``accuracy`` is of.
        channels: kept share of output channels and neurons.
        layers: density per weight tensor.
        clients: who took part.
        cpu_seconds: processor time of the process in this round, evaluation left out; unlike ``seconds`` it does not
            hang on what else the machine does, but the simulation's own counting and preparing is in it. What clients
            spent of it, and only that, stands with each of them.
    """

    method: str
    seed: int
    round: int
    phase: str
    accuracy: float | None
    loss: float | None
    flops: int
    bytes_up: int
    bytes_down: int
    seconds: float
    client_seconds: float
    server_seconds: float
    eval_seconds: float
    density: float
    channels: float
    layers: Mapping[str, float]
    clients: tuple[ClientRecord, ...]
    cpu_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values: one line of records.jsonl."""
        return asdict(self)

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Record:
        """Read what :meth:`as_dict` wrote; raises ValueError where a figure is no number."""
        for name in ("accuracy", "flops", "bytes_up", "bytes_down", "seconds"):
            missing = name == "accuracy" and line[name] is None
            if not isinstance(line[name], (int, float)) and not missing:
                raise ValueError(f"{name} is {line[name]!r}, wanted a number")
        return cls(**{**line, "clients": tuple(ClientRecord(**c) for c in line["clients"])})


def read_records(path: Path) -> list[Record]:
    """Read records.jsonl.

    Raises:
        ValueError: a line is damaged; the message gives its number.
    """
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            records.append(Record.from_dict(json.loads(line.decode("utf-8"))))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: not a round record ({error})") from error
    return records


def total_cost(records: Iterable[Record]) -> Cost:
    """Return the sum of the records' costs."""
    total = Cost()
    for r in records:
        total += Cost(r.flops, r.seconds, r.bytes_up, r.bytes_down)
    return total


def _split(records: Sequence[Record], value: str) -> dict[str, float]:
    parts = {
        phase: sum(getattr(r, value) for r in records if r.phase == phase) for phase in ("exploration", "training")
    }
    return {**parts, "total": parts["exploration"] + parts["training"]}


def _to_target(records: Sequence[Record], target: float) -> dict[str, float] | None:
    for position, record in enumerate(records):
        if record.accuracy is not None and record.accuracy >= target:
            spent = total_cost(records[: position + 1])
            return {
                "accuracy": record.accuracy,
                "flops": spent.flops,
                "bytes": spent.bytes,
                "seconds": spent.seconds,
                "round": record.round,
            }
    return None


def _method(records: Sequence[Record], target: float) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": records[0].method,
        "final_accuracy": records[-1].accuracy,
        "best_accuracy": max(r.accuracy for r in records if r.accuracy is not None),
        "density": records[-1].density,
        "channels": records[-1].channels,
    }
    for value in ("flops", "bytes_up", "bytes_down", "seconds"):
        entry[value] = _split(records, value)
    entry["to_target"] = _to_target(records, target)
    return entry


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def summarise(records: Sequence[Record], method: str, against: str | None, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what summary.json holds.

    The target accuracy is the final accuracy of ``against`` (of ``method`` itself when it runs alone). The cost
    to it is everything spent up to and including the first evaluated round that reaches it, exploration included;
    with ``fed.eval_every`` above 1 that may be later than the round which got there.

    Args:
        records: of one seed, both methods.
        method: name of the method.
        against: name of the method it is compared with, or None.
        about: what else belongs into the summary (data set, machine, ...).
    """
    mine = [r for r in records if r.method == method]
    theirs = [r for r in records if r.method == against]
    target = (theirs or mine)[-1].accuracy
    assert target is not None  # the last round is always evaluated
    ours = _method(mine, target)
    other = _method(theirs, target) if theirs else None
    ratios: dict[str, Any] | None = None
    if other is not None:
        ratios = {
            v: _ratio(ours[v]["total"], other[v]["total"]) for v in ("flops", "bytes_up", "bytes_down", "seconds")
        }
        ratios["bytes"] = _ratio(
            ours["bytes_up"]["total"] + ours["bytes_down"]["total"],
            other["bytes_up"]["total"] + other["bytes_down"]["total"],
        )
        reached, base = ours["to_target"], other["to_target"]
        ratios["to_target"] = (
            {v: _ratio(reached[v], base[v]) for v in ("flops", "bytes", "seconds")} if reached and base else None
        )
    return {
        "version": 1,
        **about,
        "target_accuracy": target,
        "method": ours,
        "against": other,
        "ratios": ratios,
    }
