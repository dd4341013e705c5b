"""What a run is made of before its first round: data, clients, model, methods; the same in all of its processes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from autoflip import codec, meter
from autoflip.explore import local_steps
from autoflip.fed import checkpoint, data, models, partition
from autoflip.fed.client import Client
from autoflip.fed.config import Config
from autoflip.fed.norms import to_group_norm
from autoflip.fed.seeding import derive, sample
from autoflip.fed.server import Server
from autoflip.fed.state import ServerState
from autoflip.fed.strategies import METHODS
from autoflip.fed.transport import Transport
from autoflip.fed.workshop import Workshop

__all__ = ["Job", "torch_settings"]


@contextmanager
def torch_settings(threads: int) -> Iterator[None]:
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
            output = twin.eval()(x)
            if not isinstance(output, Tensor):
                raise ValueError(f"its output is a {type(output).__name__}, wanted a tensor of (samples, classes)")
            shape = tuple(output.shape)
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


class Job:
    """The parts of a run.

    Args:
        config: what to run.
        states: method -> state to go on from, of a checkpoint; None: from the start.

    Raises:
        ValueError: the data, the partition or the model does not fit.
    """

    def __init__(self, config: Config, states: dict[str, ServerState] | None = None) -> None:
        self.config = config
        self.methods = [config.fed.method] + ([config.fed.against] if config.fed.against != "none" else [])
        self.dataset = data.load(config.data.name, config.data.root or None)
        self._parts = partition.split(
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
        self.strategies = {m: METHODS[m](config, self.blank, self.dataset.train.x[:2]) for m in self.methods}
        self.states = states or {method: s.begin(ServerState(dict(start))) for method, s in self.strategies.items()}
        if set(self.states) != set(self.methods) or any(
            {k: v.shape for k, v in s.params.items()} != {k: v.shape for k, v in start.items()}
            for s in self.states.values()
        ):
            raise checkpoint.CheckpointError("the checkpoint is of other methods or another model than config.toml")
        self._schema = codec.Schema.of(start)
        self._workshops = {method: Workshop(self.blank) for method in self.methods}

    def clients(self, method: str, ids: Iterable[int] | None = None) -> dict[int, Client]:
        """Return those clients, all of them by default, each with the view that the method's state says it holds."""
        state = self.states[method]
        return {
            k: Client(
                k,
                self.dataset.train.x[self._parts[k]],
                self.dataset.train.y[self._parts[k]],
                self.config,
                self.strategies[method],
                self._schema,
                self._workshops[method],
                held=state.views.get(state.held.get(k, b"")),
            )
            for k in (range(len(self._parts)) if ids is None else ids)
        }

    def server(self, method: str, transport: Transport) -> Server:
        """Return the server of a method, which reaches its clients by ``transport``."""
        fed = self.config.fed
        examples = {k: len(part) for k, part in enumerate(self._parts)}
        slow = set(sample(derive(fed.seed, "slow"), 0, fed.clients, fed.slow)) if fed.slow else set()
        strategy, workshop = self.strategies[method], self._workshops[method]
        return Server(self.config, strategy, self._schema, transport, workshop, self.test(), examples, slow)

    def test(self) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets that rounds are evaluated on."""
        x, y, count = self.dataset.test.x, self.dataset.test.y, self.config.data.test_examples
        if not 0 < count < len(y):
            return x, y
        chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:count]
        return x[chosen], y[chosen]
