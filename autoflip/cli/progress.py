"""What is seen while a run goes on: a bar per method on a terminal, a line every few rounds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from autoflip.report.units import bytes_text, percent_text, seconds_text

__all__ = ["watch"]

Sink = Callable[[Any], None]


@contextmanager
def watch(config: Any, *, quiet: bool = False, prefix: str = "") -> Iterator[Sink]:
    """Yield a sink of Records that shows how far each method is.

    Args:
        config: the run's configuration; its methods and rounds are known from it.
        quiet: show nothing.
        prefix: stands before each line, for example which run of several this is.
    """
    methods = [name for name in (config.fed.method, config.fed.against) if name != "none"]
    if quiet:
        yield lambda record: None
    elif sys.stdout.isatty():
        with _bars(methods, config.fed.rounds, prefix) as sink:
            yield sink
    else:
        yield _lines(config.fed.rounds, prefix)


def _seen(record: Any) -> str:
    return "–" if record.accuracy is None else percent_text(record.accuracy)


class _Spent:
    """Bytes of a method so far."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}

    def add(self, record: Any) -> int:
        total = self._bytes.get(record.method, 0) + record.bytes_up + record.bytes_down
        self._bytes[record.method] = total
        return total


@contextmanager
def _bars(methods: list[str], rounds: int, prefix: str) -> Iterator[Sink]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        TimeRemainingColumn(),
    )
    spent = _Spent()
    with Progress(*columns) as progress:
        tasks = {name: progress.add_task(f"{prefix}{name}", total=rounds, state="starting") for name in methods}

        def sink(record: Any) -> None:
            state = f"accuracy {_seen(record)}, density {percent_text(record.density)}, {bytes_text(spent.add(record))}"
            progress.update(tasks[record.method], completed=record.round + 1, state=state)

        yield sink


def _lines(rounds: int, prefix: str) -> Sink:
    stride, spent, start = max(1, rounds // 10), _Spent(), time.monotonic()

    def sink(record: Any) -> None:
        total, done = spent.add(record), record.round + 1
        if done % stride == 0 or done in (1, rounds):
            print(
                f"{prefix}{record.method:<14} round {done:>{len(str(rounds))}}/{rounds}  "
                f"accuracy {_seen(record):>7}  density {percent_text(record.density):>7}  "
                f"{bytes_text(total):>8} so far  {seconds_text(time.monotonic() - start)}",
                flush=True,
            )

    return sink
