"""The rows of the table: data, partition and model, scaled so that two CPU cores can gather them.

Kept from arXiv:2405.10271: 20 clients, a quarter of them a round, the partitions, the models. Scaled down: at most
200 examples a client (300 for HAR, all of digits, 60 for FEMNIST), 2 local epochs (1 for Shakespeare), 40 rounds,
tests on 2000 images, the subsets of CIFAR that lie here.

A row whose dense runs end below ``NEAR_CHANCE`` times chance after 40 rounds tells a method from luck no better than a
coin: it is run for 80 rounds too, as a row of its own. The rule was written before any of the longer runs. Seeds that
were run later lifted one of the four rows over it: the longer version stands for those that are below it by all seeds.
"""

from __future__ import annotations

SCALED = ["fed.clients=20", "fed.fraction=0.25", "fed.rounds=40", "fed.eval_every=2"]
_FEW = ["data.samples_per_client=200", "data.test_examples=2000"]


def _images(name: str, model: str = "two-cnn") -> dict[str, list[str]]:
    data = [f"data.name={name}", f"model.name={model}", *_FEW]
    # 20 clients of two classes would hold 40 of CIFAR-100's
    few = ["data.classes=10"] if name == "cifar100" else []
    tail = "" if model == "two-cnn" else f"-{model}"
    return {
        f"{name}-pathological{tail}": [*data, "data.partition=pathological", *few],
        f"{name}-dirichlet-0.1{tail}": [*data, "data.partition=dirichlet", "data.alpha=0.1"],
        f"{name}-dirichlet-1.0{tail}": [*data, "data.partition=dirichlet", "data.alpha=1.0"],
    }


ROWS: dict[str, list[str]] = {
    **_images("fashion-mnist"),
    **_images("cifar10"),
    **_images("cifar100"),
    **_images("fashion-mnist", "resnet8-group"),
    **_images("cifar10", "resnet8-group"),
    **_images("cifar100", "resnet8-group"),
    "femnist-writer": ["data.name=femnist", "data.samples_per_client=60", "data.test_examples=2000"],
    "shakespeare-role": ["data.name=shakespeare", *_FEW],
    "har-subject": ["data.name=har"],
    # not of the paper's: an MLP on pixels, for prune.inputs
    "mnist-dirichlet-0.5-mlp": ["data.name=mnist", "model.name=mlp", "data.alpha=0.5", *_FEW],
    "digits-dirichlet-0.1": ["data.name=digits", "data.alpha=0.1"],  # not of the paper's: small, for quick looks
    "digits-dirichlet-0.5": ["data.name=digits", "data.alpha=0.5"],
}
NEAR_CHANCE = 2.5  # dense's mean accuracy after 40 rounds, in multiples of one over the number of classes
CLASSES = {"cifar100": 100, "femnist": 62, "har": 6, "shakespeare": 80}  # 10 of all others
LONGER = {  # row -> its longer version
    f"{row}-resnet8-group": f"{row}-resnet8-group-80-rounds"
    for row in ("cifar10-pathological", "cifar10-dirichlet-0.1", "cifar100-pathological", "cifar100-dirichlet-0.1")
}
ROWS |= {name: [*ROWS[row], "fed.rounds=80"] for row, name in LONGER.items()}
# chosen before any result was seen: an easy, a hard and a tabular one
ALL_METHODS_ON = ("fashion-mnist-pathological", "fashion-mnist-dirichlet-0.1", "har-subject")
EVERYWHERE = ("fedavg", "autoflip", "autoflip-paper")
