"""One client process of :mod:`autoflip.fed.pool`: requests from standard input, answers to standard output."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path

from autoflip.fed import checkpoint
from autoflip.fed.config import Config
from autoflip.fed.job import Job, torch_settings
from autoflip.fed.pool import ANSWER, READY, REQUEST, read_exactly
from autoflip.fed.transport import InProcess

_PARENT_DIES = 1  # PR_SET_PDEATHSIG: the signal that the kernel sends then


def main() -> None:
    """Serve until standard input ends, even where a client hangs."""
    if sys.platform == "linux":  # even where it holds the interpreter, and nobody listens
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PARENT_DIES, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a model prints is no answer
    spec = json.loads(sys.stdin.buffer.readline())
    requests: queue.SimpleQueue[tuple[int, int, bytes]] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                method, client, size = REQUEST.unpack(read_exactly(sys.stdin.buffer, REQUEST.size))
                requests.put((method, client, read_exactly(sys.stdin.buffer, size)))
        except EOFError:
            os._exit(0)

    config = Config.from_dict(spec["config"])
    states = None
    if spec["folder"] is not None:
        states, _ = checkpoint.load(Path(spec["folder"]), config.fingerprint())
    with torch_settings(config.fed.threads):
        job = Job(config, states)
        ids = range(spec["first"], config.fed.clients, spec["step"])
        transports = [InProcess(job.clients(method, ids)) for method in job.methods]
        answers.write(READY)
        answers.flush()
        threading.Thread(target=listen, daemon=True).start()  # an error above could not end a process that listens
        while True:
            method, client, payload = requests.get()
            reply = transports[method].exchange(client, payload)
            body = reply.payload if reply.error is None else reply.error.encode("utf-8", "replace")
            cost, failed = reply.cost, reply.error is not None
            answers.write(ANSWER.pack(cost.flops, cost.seconds, reply.cpu_seconds, failed, len(body)) + body)
            answers.flush()
