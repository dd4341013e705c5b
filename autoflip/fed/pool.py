"""Clients in processes of their own, on this machine: several train at once, and one that hangs can be ended.

A process (:mod:`autoflip.fed.worker`) holds a fixed share of the clients of all methods and makes its data and model
from the configuration, like this one. Payloads are those that a network would carry, and so are the figures that come
back. Nothing is pickled: frames of numbers and bytes go through pipes.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoAnswer  # Python 3.10's is not the built-in one
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from autoflip import meter
from autoflip.fed.config import Config
from autoflip.fed.transport import Reply, Transport

__all__ = ["ANSWER", "READY", "REQUEST", "Processes", "read_exactly"]

REQUEST = struct.Struct("<BIQ")  # method, client, bytes of the payload that follows
ANSWER = struct.Struct("<QddBQ")  # FLOPs, seconds, processor seconds, whether it failed, bytes that follow
READY = b"autoflip worker\n"


class _EndedError(RuntimeError):
    """The process is gone."""


def read_exactly(stream: IO[bytes], count: int) -> bytes:
    """Return ``count`` bytes; EOFError where there are fewer."""
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _status(process: subprocess.Popen[bytes]) -> int:
    """Return the exit status of a process that has closed its pipe."""
    try:
        return process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@dataclass
class _Task:
    """What one client was asked; ``began`` is when it reached the process, on the monotonic clock."""

    answer: Future[Reply]
    reached: threading.Event
    began: float = 0.0


class _Lane:
    """One process and the thread that speaks with it, one request after the other."""

    def __init__(self, spec: bytes) -> None:
        self._spec = spec
        self._thread = ThreadPoolExecutor(1)
        self._process = self._start()
        self.ready = self._thread.submit(self._greeted, self._process)

    def _start(self) -> subprocess.Popen[bytes]:
        # the caller's modules, a model's of its own for one, are found there too
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        # the working folder counts where it does in this process, and not by itself as it would with -m
        code = "import sys; sys.path[:] = filter(None, sys.path); from autoflip.fed.worker import main; main()"
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        with contextlib.suppress(OSError):  # it ended at once; whoever waits for its greeting says so
            self._write(process, self._spec)
        return process

    @staticmethod
    def _write(process: subprocess.Popen[bytes], *parts: bytes) -> None:
        assert process.stdin is not None
        for part in parts:
            process.stdin.write(part)
        process.stdin.flush()

    @staticmethod
    def _read(process: subprocess.Popen[bytes], count: int) -> bytes:
        assert process.stdout is not None
        return read_exactly(process.stdout, count)

    def _greeted(self, process: subprocess.Popen[bytes]) -> None:
        try:
            greeting = self._read(process, len(READY))
        except EOFError:
            greeting = b""
        if greeting != READY:
            raise _EndedError(
                f"a client process ended as it started (exit status {_status(process)}); it says why above"
            )

    def submit(self, method: int, client: int, payload: bytes) -> _Task:
        reached = threading.Event()
        task = _Task(Future(), reached)
        self._thread.submit(self._serve, task, method, client, payload)
        return task

    def _serve(self, task: _Task, method: int, client: int, payload: bytes) -> None:
        try:
            if self._process.poll() is not None:
                self._process = self._start()
                self._greeted(self._process)
            task.began = time.monotonic()
            task.reached.set()
            self._write(self._process, REQUEST.pack(method, client, len(payload)), payload)
            flops, seconds, cpu, failed, size = ANSWER.unpack(self._read(self._process, ANSWER.size))
            answer = self._read(self._process, size)
            error = answer.decode("utf-8", "replace") if failed else None
            answer = b"" if failed else answer
            cost = meter.Cost(flops, seconds, bytes_up=len(answer), bytes_down=len(payload))
            task.answer.set_result(Reply(answer, cost, error, cpu))
        except (EOFError, OSError):
            task.answer.set_exception(_EndedError(f"its process ended (exit status {_status(self._process)})"))
        except _EndedError as lost:
            task.answer.set_exception(lost)
        finally:
            task.reached.set()

    def kill(self) -> None:
        """End the process; its thread notices, and starts another for the next request."""
        self._process.kill()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):  # what was not flushed has no reader
                stream.close()


class Processes:
    """A context in which clients live in ``count`` processes.

    Args:
        config: of the run.
        folder: of the run; a process that starts reads from its checkpoint what its clients hold. None: from the start.
        count: processes; client ``k`` is in process ``k % count``.
        timeout: seconds after which a client that has not answered costs its update; its process is ended and started
            again. 0: never.

    Raises:
        RuntimeError: a process does not start.
    """

    def __init__(self, config: Config, folder: Path | None, count: int, timeout: float = 0.0) -> None:
        spec = {"config": config.as_dict(), "folder": None if folder is None else str(folder.absolute())}
        count = min(count, config.fed.clients)
        self.timeout = timeout
        self._methods = [config.fed.method, config.fed.against]
        self._lanes = [_Lane(json.dumps({**spec, "first": i, "step": count}).encode() + b"\n") for i in range(count)]

    def __enter__(self) -> Processes:
        try:
            for lane in self._lanes:
                lane.ready.result()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for lane in self._lanes:
            lane.close()

    def of(self, method: str) -> Transport:
        """Return the transport to the clients of a method."""
        return _Method(self, self._methods.index(method))

    def lane(self, client: int) -> _Lane:
        """Return where a client lives."""
        return self._lanes[client % len(self._lanes)]

    def __len__(self) -> int:
        return len(self._lanes)


class _Method:
    def __init__(self, pool: Processes, method: int) -> None:
        self.pool, self.method = pool, method
        self.ahead = 4 * len(pool)  # clients are not dealt evenly in each round
        self._tasks: dict[int, _Task] = {}

    def begin(self, client: int, payload: bytes) -> None:
        self._tasks[client] = self.pool.lane(client).submit(self.method, client, payload)

    def exchange(self, client: int, payload: bytes) -> Reply:
        lane = self.pool.lane(client)
        task = self._tasks.pop(client, None) or lane.submit(self.method, client, payload)
        task.reached.wait()
        most = self.pool.timeout
        try:
            reply = task.answer.result(max(0.0, task.began + most - time.monotonic()) if most else None)
        except NoAnswer:
            lane.kill()
            task.answer.exception()  # once its thread has noticed the next request finds another process
            reply = Reply(b"", meter.Cost(0, most, bytes_down=len(payload)), f"no answer within {most:g} s")
        except _EndedError as lost:
            reply = Reply(b"", meter.Cost(bytes_down=len(payload)), str(lost))
        meter.charge_bytes(up=reply.cost.bytes_up, down=reply.cost.bytes_down)
        return reply
