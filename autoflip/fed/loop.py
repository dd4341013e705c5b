"""The whole run: data, clients, rounds of the method and of what it is compared with, files, resume."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoflip import meter
from autoflip.fed import checkpoint
from autoflip.fed.config import Config, ConfigError
from autoflip.fed.job import Job, torch_settings
from autoflip.fed.ledger import Record, read_records, summarise, total_cost
from autoflip.fed.pool import Processes
from autoflip.fed.transport import InProcess, Transport
from autoflip.masks import MaskSet

__all__ = ["Result", "resume", "run"]

Sink = Callable[[Record], object]


@dataclass(frozen=True)
class Result:
    """What a run gives back.

    Attributes:
        config: what was run.
        accuracy: final test accuracy of ``config.fed.method``.
        cost: its FLOPs, seconds and bytes, exploration included.
        records: one a round, of every method.
        summary: what summary.json holds.
        params: final parameters of the method (where ``server.average`` keeps a running mean, that), name -> float32
            tensor, zero where pruned.
        masks: what is kept; None when the method does not prune.
        run_dir: the run folder; None when nothing was written.
    """

    config: Config
    accuracy: float
    cost: meter.Cost
    records: tuple[Record, ...]
    summary: dict[str, Any]
    params: dict[str, Tensor]
    masks: MaskSet | None
    run_dir: Path | None
    _blank: nn.Module = field(repr=False)

    def model(self) -> nn.Module:
        """Return the trained model, dense, with pruned weights zero."""
        model = copy.deepcopy(self._blank)
        model.load_state_dict({**model.state_dict(), **self.params})
        return model.eval()


def run(config: Config | None = None, *, out: str | Path | None = None, sinks: Iterable[Sink] = ()) -> Result:
    """Train by ``config.fed.method`` and, in the same run, by ``config.fed.against``.

    The methods share data, partition, initial weights and the choice of clients; their rounds alternate, so
    that a drifting machine slows both alike.

    Args:
        config: what to run; None: the defaults (scikit-learn's digits).
        out: folder for config.toml, records.jsonl, summary.json, the model, the masks and the checkpoint;
            None: nothing is written.
        sinks: functions that are called with each :class:`Record` as it is made.

    Raises:
        ValueError: the configuration or the data does not fit, or ``out`` already holds a run.
        RoundError: a round had too few usable updates.
    """
    config = Config.load() if config is None else config
    if not isinstance(config, Config):
        raise ConfigError(
            f"run: config is a {type(config).__name__}; wanted a fed.Config: Config.load(path) reads a file, "
            "Config.from_dict(...) nested values"
        )
    config.check()
    folder = Path(out) if out is not None else None
    if folder is not None and (folder / "records.jsonl").exists():
        raise ValueError(
            f"{folder} already holds a run; continue it by `autoflip resume`, remove it, or name another folder"
        )
    with torch_settings(config.fed.threads):
        job = Job(config)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            written, text = folder / "config.toml", config.to_toml().encode()
            if written.exists() and written.read_bytes() != text:
                os.replace(written, folder / "config.toml.old")  # the user's own, maybe with comments
            checkpoint.write_atomically(written, text)
            checkpoint.save(folder, job.states, 0, config.fingerprint())
            (folder / "records.jsonl").touch()  # last: only a folder that can be resumed holds a run
        return _finish(job, folder, [], list(sinks))


def resume(run_dir: str | Path, *, sinks: Iterable[Sink] = ()) -> Result:
    """Continue a run where its last checkpoint stands; the result equals that of an uninterrupted run.

    Sinks get the records of earlier rounds again, then the new ones.

    Raises:
        ValueError: the folder holds no run, or its checkpoint or records are damaged.
    """
    folder = Path(run_dir)
    if not (folder / "config.toml").exists():
        raise ValueError(f"{folder} holds no run (there is no config.toml); wanted a folder that `autoflip run` made")
    config = Config.load(folder / "config.toml")
    if not any((folder / name).exists() for name in (checkpoint.NAME, "records.jsonl")):
        return run(config, out=folder, sinks=sinks)  # it was stopped before it began
    states, count = checkpoint.load(folder, config.fingerprint())
    path = folder / "records.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    if len(lines) < count:
        raise checkpoint.CheckpointError(
            f"{path} has {len(lines)} records but the checkpoint counts {count}; start the run again"
        )
    checkpoint.write_atomically(path, "".join(lines[:count]).encode())  # what came after is run again
    records = read_records(path)
    with torch_settings(config.fed.threads):
        job = Job(config, states)
        everything = list(sinks)
        for record in records:
            for sink in everything:
                sink(record)
        return _finish(job, folder, records, everything)


@contextmanager
def _reached(job: Job, folder: Path | None) -> Iterator[dict[str, Transport]]:
    """Yield, for each method, what reaches its clients: in this process, or in others as long as the block lasts."""
    fed = job.config.fed
    if not fed.processes:
        yield {method: InProcess(job.clients(method)) for method in job.methods}
        return
    with Processes(job.config, folder, fed.processes, fed.timeout) as pool:
        yield {method: pool.of(method) for method in job.methods}


def _finish(job: Job, folder: Path | None, records: list[Record], sinks: list[Sink]) -> Result:
    """Run what is left, write what is asked for, and return the result."""
    with _reached(job, folder) as transports:
        servers = {method: job.server(method, transports[method]) for method in job.methods}
        for number in range(job.config.fed.rounds):
            for method in job.methods:
                if job.states[method].round != number:
                    continue  # a resumed run has done this one
                job.states[method], record = servers[method].run_round(job.states[method])
                records.append(record)
                if folder is not None:
                    with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record.as_dict()) + "\n")
                        file.flush()
                        os.fsync(file.fileno())  # a checkpoint must not outlive the records that it counts
                    checkpoint.save(folder, job.states, len(records), job.config.fingerprint())
                for sink in sinks:
                    sink(record)
    config, method = job.config, job.config.fed.method
    against = config.fed.against if config.fed.against != "none" else None
    about = {
        "dataset": job.dataset.name,
        "partition": config.data.partition,
        "model": job.model_name,
        "parameters": sum(p.numel() for p in job.blank.parameters()),
        "seed": config.fed.seed,
        "rounds": config.fed.rounds,
        "machine": meter.machine(),
    }
    summary = summarise(records, method, against, about)
    state = job.states[method]
    mine = [r for r in records if r.method == method]
    params = dict(state.served)
    accuracy = mine[-1].accuracy
    assert accuracy is not None  # the last round is always evaluated
    result = Result(
        config,
        accuracy,
        total_cost(mine),
        tuple(records),
        summary,
        params,
        state.masks,
        folder,
        job.blank,
    )
    if folder is not None:
        from safetensors.torch import save

        full = MaskSet({n: torch.ones(p.shape, dtype=torch.bool) for n, p in job.blank.named_parameters()})
        (state.masks or full).save(folder / "masks.safetensors")
        whole = {k: v.contiguous() for k, v in result.model().state_dict().items()}
        checkpoint.write_atomically(folder / "model.safetensors", save(whole))
        checkpoint.write_atomically(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return result
