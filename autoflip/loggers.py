"""Sinks: one function of a round's Record each, for ``fed.run(..., sinks=[...])``.

The run folder has its own records.jsonl; these are for whatever else wants to know. TensorBoard, Weights & Biases
and MLflow are imported when their sink is made, and not before.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

__all__ = ["csv", "jsonl", "mlflow", "tensorboard", "wandb"]


class Recorded(Protocol):
    """What a sink needs of a Record."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        ...


Sink = Callable[[Recorded], None]


def jsonl(path: str | os.PathLike[str]) -> Sink:
    """Return a sink that appends each record to ``path`` as one line of JSON, unless the file holds that line already.

    A resumed run hands its sinks the records of earlier rounds again.
    """
    target = _ready(path)
    held = _lines(target)

    def sink(record: Recorded) -> None:
        line = json.dumps(record.as_dict()) + "\n"
        if line not in held:
            with target.open("a", encoding="utf-8", newline="") as file:
                file.write(line)

    return sink


def csv(path: str | os.PathLike[str]) -> Sink:
    """Return a sink that appends each record's single values to ``path``, under a head line; no layers, no clients.

    A row that the file holds already is not written again, see :func:`jsonl`.
    """
    import csv as writer

    target = _ready(path)
    held = _lines(target)

    def line(values: Iterable[Any]) -> str:
        text = io.StringIO(newline="")
        writer.writer(text).writerow(values)
        return text.getvalue()

    def sink(record: Recorded) -> None:
        row = {key: value for key, value in record.as_dict().items() if not isinstance(value, (Mapping, list, tuple))}
        if line(row.values()) in held:
            return
        head = "" if target.exists() and target.stat().st_size else line(row)
        with target.open("a", encoding="utf-8", newline="") as file:
            file.write(head + line(row.values()))

    return sink


def tensorboard(folder: str | os.PathLike[str]) -> Sink:
    """Return a sink that writes every number to TensorBoard under ``method/name``; needs ``tensorboard``.

    Raises:
        ValueError: the package is not installed.
    """
    _need("tensorboard")
    board = _need("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder))

    def sink(record: Recorded) -> None:
        line = record.as_dict()
        for name, value in _numbers(line).items():
            board.add_scalar(f"{line['method']}/{name}", value, line["round"])
        board.flush()

    return sink


def wandb(**options: Any) -> Sink:
    """Return a sink that logs every number to Weights & Biases; ``options`` go to ``wandb.init``; needs ``wandb``.

    Raises:
        ValueError: the package is not installed.
    """
    job = _need("wandb").init(**options)

    def sink(record: Recorded) -> None:
        line = record.as_dict()
        values = {f"{line['method']}/{name}": value for name, value in _numbers(line).items()}
        # the methods of a run alternate: the round is a value of its own, not W&B's step
        job.log({**values, "round": line["round"]})

    return sink


def mlflow(**options: Any) -> Sink:
    """Return a sink that logs every number to MLflow; ``options`` go to ``mlflow.start_run``; needs ``mlflow``.

    Raises:
        ValueError: the package is not installed.
    """
    tracker = _need("mlflow")
    tracker.start_run(**options)

    def sink(record: Recorded) -> None:
        line = record.as_dict()
        values = {f"{line['method']}/{name}": value for name, value in _numbers(line).items()}
        tracker.log_metrics(values, step=line["round"])

    return sink


def _ready(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _lines(path: Path) -> set[str]:
    """Return the lines that a file holds, ends included; records hold measured seconds, so no two runs' are equal."""
    if not path.exists():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        return set(file)


def _need(module: str, package: str = "") -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        name = package or module
        raise ValueError(f"loggers.{name} needs the package {name} ({error}); run: pip install {name}") from error


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record, densities of layers as ``layers/NAME``."""
    flat = {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, (int, float)) and name not in ("seed", "round")
    }
    return {**flat, **{f"layers/{name}": float(value) for name, value in (line.get("layers") or {}).items()}}
