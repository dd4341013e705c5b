"""A model of your own through the whole federated run: ``python examples/your_model.py``.

On the command line the same is ``autoflip run --model examples.your_model:Net``.
"""

import torch
from torch import nn

from autoflip import fed


class Net(nn.Module):
    """A residual network with BatchNorm; channels that meet in the addition are removed together."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(input_shape[0], 32, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.stem(x)))
        x = torch.relu(x + self.norm2(self.conv(x)))
        return self.head(x.mean((2, 3)))


def main(rounds: int = 6) -> None:
    config = fed.Config.load(overrides=[f"fed.rounds={rounds}", "model.name=examples.your_model:Net"])
    result = fed.run(config, sinks=[lambda r: print(f"{r.method:9} round {r.round}: accuracy {r.accuracy:.3f}")])
    ratios = result.summary["ratios"]
    print(f"FLOPs {ratios['flops']:.2f}x, bytes {ratios['bytes']:.2f}x of dense FedAvg, {result.model()}")


if __name__ == "__main__":
    main()
