"""What a federated round really puts on the wire, made once and kept outside the checkout.

Three models, trained by FedAvg on real data (Dirichlet 0.3, 10 clients, 4 of them a round): a dense start, then per
density a one-shot magnitude mask over the whole model and masked rounds. Kept from the last round: the update of
one client, its mask, and the server's model before and after, which is what the downlink carries. Density 1 is one
more dense round; top-k deltas are cut from its update.

    AUTOFLIP_DATA=DIR python bench/real_deltas.py      # half an hour of one core; the benches call it when they need it

Folder: the environment variable AUTOFLIP_BENCH_CACHE, default ~/.cache/autoflip-bench.
"""

import copy
import os
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from autoflip import MaskSet, explore, prune
from autoflip.fed import data, models, partition

DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
TOP = (0.05, 0.01)
CLIENTS, A_ROUND = 10, 4
VERSION = 2  # part of the file names: raise it when anything here changes what is made


class ResNet18(nn.Module):
    """He et al.'s ResNet-18 for 32x32 images at half width: 32-64-128-256 channels, 2.8 M parameters."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], width, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        blocks, inputs = [], width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(models.BasicBlock(inputs, width << stage, stride, "batch"))
                inputs = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores ``(N, num_classes)``."""
        return self.fc(self.flatten(self.pool(self.blocks(self.relu1(self.norm1(self.conv1(x)))))))


CASES = {  # name -> (data set, model, learning rate, samples a client, dense rounds, masked rounds)
    "mlp": (
        "mnist",
        lambda shape, classes: models.build("mlp", input_shape=shape, num_classes=classes),
        0.05,
        500,
        10,
        3,
    ),
    "cnn": (
        "fashion-mnist",
        lambda shape, classes: models.build("two-cnn", input_shape=shape, num_classes=classes),
        0.05,
        400,
        10,
        3,
    ),
    "resnet": ("cifar10", ResNet18, 0.03, 1000, 20, 3),
}


@dataclass
class Example:
    """One update, dense tensors; ``masks`` is None at density 1.

    Attributes:
        delta: a client's change, zero outside the mask.
        masks: what both sides hold.
        old: the server's bfloat16 model that the client started from.
        new: the server's bfloat16 model after the round.
        accuracy: of ``new`` on the test set.
    """

    delta: dict[str, Tensor]
    masks: MaskSet | None
    old: dict[str, Tensor]
    new: dict[str, Tensor]
    accuracy: float


def top_k(delta: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Keep the ``share`` of largest magnitude over the whole update, zero the rest."""
    magnitudes = torch.cat([t.abs().flatten() for t in delta.values()])
    cut = magnitudes.kthvalue(max(1, round((1 - share) * len(magnitudes)))).values
    return {n: torch.where(t.abs() > cut, t, torch.zeros(())) for n, t in delta.items()}


def load(case: str, density: float) -> Example:
    """Return an example from the cache, made first where it is not there."""
    path = _path(case, density)
    if not path.exists():
        _make(case)
    held = safetensors.torch.load_file(path)
    part = {p: {n[len(p) + 1 :]: t for n, t in held.items() if n.startswith(p + "/")} for p in ("delta", "old", "new")}
    masks = {n[6:]: t.to(torch.bool) for n, t in held.items() if n.startswith("masks/")}
    return Example(part["delta"], MaskSet(masks) if masks else None, part["old"], part["new"], float(held["accuracy"]))


def _path(case: str, density: float) -> Path:
    folder = Path(os.environ.get("AUTOFLIP_BENCH_CACHE", "~/.cache/autoflip-bench")).expanduser()
    return folder / f"delta-v{VERSION}-{case}-{density}.safetensors"


def _make(case: str) -> None:
    name, make_model, lr, samples, start_rounds, masked_rounds = CASES[case]
    dataset = data.load(name)
    shape, classes = tuple(dataset.train.x.shape[1:]), dataset.num_classes
    parts = partition.split(
        dataset.train, "dirichlet", clients=CLIENTS, seed=0, num_classes=classes, alpha=0.3, samples_per_client=samples
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model(shape, classes).train()
    server = {n: t.clone() for n, t in model.state_dict().items() if t.is_floating_point()}
    for step in range(start_rounds):
        server, _ = _round(model, server, None, dataset.train, parts, step, lr)
    start = server
    for density in DENSITIES:
        model.load_state_dict(start, strict=False)
        masks = None if density == 1 else prune.magnitude(model, density)
        server = _masked(start, masks)
        for step in range(masked_rounds):
            old = server
            server, delta = _round(model, old, masks, dataset.train, parts, start_rounds + step, lr)
        model.load_state_dict(server, strict=False)
        held = {"accuracy": torch.tensor(_accuracy(model, dataset.test))}
        for part, tensors in (("delta", delta), ("old", old), ("new", server)):
            held |= {f"{part}/{n}": t.to(torch.float32 if part == "delta" else torch.bfloat16).contiguous()
                     for n, t in tensors.items()}  # fmt: skip
        held |= {f"masks/{n}": m.to(torch.uint8) for n, m in (masks or {}).items()}
        path = _path(case, density)
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(held, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        print(f"{case} density {density}: accuracy {float(held['accuracy']):.3f}, {path}", flush=True)


def _round(model, server, masks, train, parts, step, lr):
    """One round: the mean of the clients' models, and the first client's change."""
    generator = torch.Generator().manual_seed(step)
    chosen = torch.randperm(CLIENTS, generator=generator)[:A_ROUND].tolist()
    total, examples, first = {n: torch.zeros_like(t) for n, t in server.items()}, 0, None
    # clients start from what crosses the link: bfloat16
    base = {n: t.to(torch.bfloat16).to(torch.float32) for n, t in server.items()}
    named = dict(model.named_parameters())
    hooks = [named[n].register_hook(lambda g, m=m: g * m) for n, m in (masks or {}).items()]
    for client in chosen:
        model.load_state_dict(base, strict=False)  # without counts of batches
        x, y = train.x[parts[client]], train.y[parts[client]]
        settings = {"epochs": 1, "batch_size": 32, "lr": lr, "momentum": 0.9}
        explore.local_steps(model, x, y, F.cross_entropy, generator=generator, **settings)
        delta = {n: t - base[n] for n, t in model.state_dict().items() if n in base}
        first = delta if first is None else first
        for n, t in delta.items():
            total[n] += len(y) * t
        examples += len(y)
    for hook in hooks:
        hook.remove()
    return {n: base[n] + t / examples for n, t in total.items()}, {n: t.clone() for n, t in first.items()}


def _masked(tensors, masks):
    return {n: t * masks[n] if masks is not None and n in masks else t.clone() for n, t in tensors.items()}


@torch.no_grad()
def _accuracy(model, test) -> float:
    model = copy.deepcopy(model).eval()
    x, y = test.x[:1000], test.y[:1000]
    return float(torch.cat([model(part).argmax(1) for part in x.split(200)]).eq(y).float().mean())


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("AUTOFLIP_BENCH_THREADS", "1")))
    for case in CASES:
        start = time.perf_counter()
        for density in DENSITIES:
            load(case, density)
        print(f"{case}: {time.perf_counter() - start:.0f} s")
