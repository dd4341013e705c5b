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
from torch.nn import functional as F  # noqa: N812

from autoflip import codec, meter
from autoflip.explore import local_steps
from autoflip.fed import checkpoint, data, models, partition
from autoflip.fed.client import Client
from autoflip.fed.config import Config
from autoflip.fed.ledger import Record, read_records, summarise, total_cost
from autoflip.fed.norms import to_group_norm
from autoflip.fed.seeding import derive, sample
from autoflip.fed.server import Server
from autoflip.fed.state import ServerState
from autoflip.fed.strategies import METHODS, Strategy
from autoflip.fed.transport import InProcess
from autoflip.fed.workshop import Workshop
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
    config = config or Config.load()
    config.check()
    folder = Path(out) if out is not None else None
    if folder is not None and (folder / "records.jsonl").exists():
        raise ValueError(
            f"{folder} already holds a run; continue it by `autoflip resume`, remove it, or name another folder"
        )
    with _torch_settings(config.fed.threads):
        job = _Job(config)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            written, text = folder / "config.toml", config.to_toml().encode()
            if written.exists() and written.read_bytes() != text:
                os.replace(written, folder / "config.toml.old")  # the user's own, maybe with comments
            checkpoint.write_atomically(written, text)
            checkpoint.save(folder, job.states, 0, config.fingerprint())
            (folder / "records.jsonl").touch()  # last: only a folder that can be resumed holds a run
        return job.finish(folder, [], list(sinks))


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
    states, count = checkpoint.load(folder, config.fingerprint())
    path = folder / "records.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    if len(lines) < count:
        raise checkpoint.CheckpointError(
            f"{path} has {len(lines)} records but the checkpoint counts {count}; start the run again"
        )
    checkpoint.write_atomically(path, "".join(lines[:count]).encode())  # what came after is run again
    records = read_records(path)
    with _torch_settings(config.fed.threads):
        job = _Job(config, states)
        everything = list(sinks)
        for record in records:
            for sink in everything:
                sink(record)
        return job.finish(folder, records, everything)


@contextmanager
def _torch_settings(threads: int) -> Iterator[None]:
    """Let a run compute on so many threads and in float32, and leave torch as it was."""
    before, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(threads or before)
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_default_dtype(dtype)


def _warm_up(model: nn.Module, name: str, dataset: data.Dataset) -> None:
    """Take one step on a copy: what torch loads at its first step belongs to no method's seconds.

    A model that cannot take that step is a mistake to name before any client is asked.
    """
    x, y = dataset.train.x[:2], dataset.train.y[:2]
    twin = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        try:
            shape = tuple(twin.eval()(x).shape)
            if shape != (2, dataset.num_classes):
                raise ValueError(f"its output for two samples has shape {shape}, wanted {(2, dataset.num_classes)}")
            generator = torch.Generator().manual_seed(0)
            meter.count_flops(  # torch's counter loads for a second, too
                lambda: local_steps(twin, x, y, F.cross_entropy, epochs=1, batch_size=2, lr=1e-3, generator=generator)
            )
        except Exception as error:
            raise ValueError(
                f"model {name!r} cannot take a training step on {dataset.name}, whose samples are {tuple(x.shape[1:])} "
                f"{x.dtype}: {error}"
            ) from error
        names = [n for n, _ in twin.named_parameters(remove_duplicate=False)]
        if len(names) != len(list(twin.parameters())):
            raise ValueError(f"model {name!r} ties parameters ({len(names)} names share fewer); untie them first")
        codec.encode(twin.state_dict(), values="int8")


class _Job:
    def __init__(self, config: Config, states: dict[str, ServerState] | None = None) -> None:
        self.config = config
        self.methods = [config.fed.method] + ([config.fed.against] if config.fed.against != "none" else [])
        self.dataset = data.load(config.data.name, config.data.root or None)
        parts = partition.split(
            self.dataset.train,
            config.data.partition,
            clients=config.fed.clients,
            seed=derive(config.fed.seed, "partition"),
            num_classes=self.dataset.num_classes,
            alpha=config.data.alpha,
            classes=config.data.classes,
            samples_per_client=config.data.samples_per_client or None,
        )
        name = config.model.name if config.model.name != "auto" else models.default_for(self.dataset.name)
        self.model_name = name
        seed = derive(config.fed.seed, "model")
        self.blank = models.build(
            name, input_shape=self.dataset.input_shape, num_classes=self.dataset.num_classes, seed=seed
        )
        if config.model.norm == "group":
            self.blank = to_group_norm(self.blank)
        start = {k: v.detach().clone() for k, v in self.blank.state_dict().items() if v.is_floating_point()}
        _warm_up(self.blank, name, self.dataset)  # says what does not fit
        strategies = {method: METHODS[method](config, self.blank, self.dataset.train.x[:2]) for method in self.methods}
        self.states = states or {method: s.begin(ServerState(dict(start))) for method, s in strategies.items()}
        if set(self.states) != set(self.methods) or any(
            {k: v.shape for k, v in s.params.items()} != {k: v.shape for k, v in start.items()}
            for s in self.states.values()
        ):
            raise checkpoint.CheckpointError("the checkpoint is of other methods or another model than config.toml")
        self.servers = {method: self._server(method, s, start, parts) for method, s in strategies.items()}

    def _server(self, method: str, strategy: Strategy, start: dict[str, Tensor], parts: list[Tensor]) -> Server:
        schema = codec.Schema.of(start)
        workshop = Workshop(self.blank)
        state = self.states[method]
        clients = {
            k: Client(
                k,
                self.dataset.train.x[part],
                self.dataset.train.y[part],
                self.config,
                strategy,
                schema,
                workshop,
                held=state.views.get(state.held.get(k, b"")),
            )
            for k, part in enumerate(parts)
        }
        test = self._test()
        examples = {k: len(part) for k, part in enumerate(parts)}
        fed = self.config.fed
        slow = set(sample(derive(fed.seed, "slow"), 0, fed.clients, fed.slow)) if fed.slow else set()
        return Server(self.config, strategy, schema, InProcess(clients), workshop, test, examples, slow)

    def _test(self) -> tuple[Tensor, Tensor]:
        x, y, count = self.dataset.test.x, self.dataset.test.y, self.config.data.test_examples
        if not 0 < count < len(y):
            return x, y
        chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:count]
        return x[chosen], y[chosen]

    def finish(self, folder: Path | None, records: list[Record], sinks: list[Sink]) -> Result:
        """Run what is left, write what is asked for, and return the result."""
        for number in range(self.config.fed.rounds):
            for method in self.methods:
                if self.states[method].round != number:
                    continue  # a resumed run has done this one
                self.states[method], record = self.servers[method].run_round(self.states[method])
                records.append(record)
                if folder is not None:
                    with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record.as_dict()) + "\n")
                        file.flush()
                        os.fsync(file.fileno())  # a checkpoint must not outlive the records that it counts
                    checkpoint.save(folder, self.states, len(records), self.config.fingerprint())
                for sink in sinks:
                    sink(record)
        config, method = self.config, self.config.fed.method
        against = config.fed.against if config.fed.against != "none" else None
        about = {
            "dataset": self.dataset.name,
            "partition": config.data.partition,
            "model": self.model_name,
            "parameters": sum(p.numel() for p in self.blank.parameters()),
            "seed": config.fed.seed,
            "rounds": config.fed.rounds,
            "machine": meter.machine(),
        }
        summary = summarise(records, method, against, about)
        state = self.states[method]
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
            self.blank,
        )
        if folder is not None:
            from safetensors.torch import save

            full = MaskSet({n: torch.ones(p.shape, dtype=torch.bool) for n, p in self.blank.named_parameters()})
            (state.masks or full).save(folder / "masks.safetensors")
            whole = {k: v.contiguous() for k, v in result.model().state_dict().items()}
            checkpoint.write_atomically(folder / "model.safetensors", save(whole))
            checkpoint.write_atomically(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        return result
