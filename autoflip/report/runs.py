"""A run folder as the report reads it: the summary, the records and the configuration, and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from pathlib import Path
from typing import Any

__all__ = ["Curve", "Row", "Run", "cost_to", "curve_of", "first_at", "load_run", "put_text", "rows_of"]

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """One method's way through a run; every list has one entry an evaluated round, costs are cumulative.

    ``flops`` in FLOPs, ``bytes`` up and down together, ``seconds`` of clients and server without evaluation.
    """

    name: str
    rounds: list[int]
    accuracy: list[float]
    flops: list[float]
    bytes: list[float]
    seconds: list[float]
    exploration: list[bool]


@dataclass(frozen=True)
class Run:
    """One finished run folder: summary.json, records.jsonl grouped by method, and the text of config.toml."""

    folder: Path
    summary: dict[str, Any]
    records: dict[str, list[Record]]
    config: str


@dataclass(frozen=True)
class Row:
    """One line of the table: ``key`` is its path in summary.json, ``ratio`` is method / against."""

    key: str
    label: str
    kind: str  # flops | bytes | seconds | share | count
    method: float | None
    against: float | None
    ratio: float | None = None
    detail: bool = False  # one share of the line above it


def _json(path: Path, text: str, line: int | None = None) -> dict[str, Any]:
    where = f"{path}, line {line}" if line else str(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"report: {where} is not JSON ({error}); was the file cut off or edited?") from error
    if not isinstance(value, dict):
        raise ValueError(f"report: {where} holds {type(value).__name__}, wanted a JSON object")
    return value


def load_run(run_dir: str | os.PathLike[str]) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: the folder, its records.jsonl or its summary.json is missing.
        ValueError: a file is not what a run writes.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"report: there is no run folder {folder}")
    for name in ("records.jsonl", "summary.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"report: {folder} has no {name}; a finished run has one. "
                f"If the run was stopped, finish it: autoflip resume {folder}"
            )
    records: dict[str, list[Record]] = {}
    lines = (folder / "records.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            record = _json(folder / "records.jsonl", line, number)
            records.setdefault(str(record.get("method")), []).append(record)
    summary = _json(folder / "summary.json", (folder / "summary.json").read_text(encoding="utf-8"))
    if summary.get("version") != 1:
        raise ValueError(
            f"report: {folder / 'summary.json'} has version {summary.get('version')!r}, this autoflip reads 1"
        )
    config = folder / "config.toml"
    return Run(folder, summary, records, config.read_text("utf-8", "replace") if config.is_file() else "")


def curve_of(name: str, records: Sequence[Record]) -> Curve:
    """Add up one method's records, in round order, into a :class:`Curve`.

    A round that was not evaluated (``fed.eval_every``) has no point, but its costs count from the next one on.
    """
    ordered = sorted(records, key=lambda record: record["round"])
    seen = [r["accuracy"] is not None for r in ordered]

    def spent(*keys: str) -> list[float]:
        return list(compress(accumulate(float(sum(r[key] for key in keys)) for r in ordered), seen))

    evaluated = list(compress(ordered, seen))
    return Curve(
        name=name,
        rounds=[int(r["round"]) for r in evaluated],
        accuracy=[float(r["accuracy"]) for r in evaluated],
        flops=spent("flops"),
        bytes=spent("bytes_up", "bytes_down"),
        seconds=spent("seconds"),
        exploration=[r.get("phase") == "exploration" for r in evaluated],
    )


def first_at(curve: Curve, target: float | None) -> int | None:
    """Return the index of the first round whose accuracy is at least ``target``; None if there is none."""
    if target is None:
        return None
    return next((i for i, accuracy in enumerate(curve.accuracy) if accuracy >= target), None)


def cost_to(curve: Curve, target: float) -> dict[str, float] | None:
    """Return what was spent up to and including the first round at ``target`` accuracy; None if there is none."""
    i = first_at(curve, target)
    if i is None:
        return None
    return {
        "accuracy": target,
        "flops": curve.flops[i],
        "bytes": curve.bytes[i],
        "seconds": curve.seconds[i],
        "round": curve.rounds[i],
    }


def put_text(path: Path, text: str) -> Path:
    """Write ``text`` in one atomic step and return ``path``."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
    return path


def rows_of(summary: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the table of method vs against, line by line; both the page and the terminal print these."""
    method, against = summary["method"], summary.get("against") or {}
    ratios = summary.get("ratios") or {}

    yield Row("final_accuracy", "Final accuracy", "share", method["final_accuracy"], against.get("final_accuracy"))
    yield Row("best_accuracy", "Best accuracy", "share", method["best_accuracy"], against.get("best_accuracy"))
    mine, theirs = method.get("to_target") or {}, against.get("to_target") or {}
    if mine or theirs:
        shares = ratios.get("to_target") or {}
        for key, label, kind in (
            ("flops", "FLOPs", "flops"),
            ("bytes", "Bytes", "bytes"),
            ("seconds", "Seconds", "seconds"),
            ("round", "Round", "count"),
        ):
            counted = ", from 0" if key == "round" else ""
            yield Row(
                f"to_target.{key}", f"{label} to target{counted}", kind, mine.get(key), theirs.get(key), shares.get(key)
            )
    both = [side["bytes_up"]["total"] + side["bytes_down"]["total"] if side else None for side in (method, against)]
    for key, label, kind in (
        ("flops", "FLOPs", "flops"),
        ("bytes_up", "Bytes up", "bytes"),
        ("bytes_down", "Bytes down", "bytes"),
        ("seconds", "Seconds", "seconds"),
    ):
        if key == "seconds":
            yield Row("bytes.total", "Bytes up and down", "bytes", both[0], both[1], ratios.get("bytes"))
        other = against.get(key) or {}
        yield Row(f"{key}.total", label, kind, method[key]["total"], other.get("total"), ratios.get(key))
        yield Row(
            f"{key}.exploration",
            "in exploration",
            kind,
            method[key]["exploration"],
            other.get("exploration"),
            detail=True,
        )
    yield Row("density", "Density at the end", "share", method.get("density"), against.get("density"))
