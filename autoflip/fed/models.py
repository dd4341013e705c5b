"""The networks of federated benchmarks, in plain torch: every layer is a named attribute and traces with torch.fx."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoflip.fed.own_models import imported, trainable

__all__ = ["NAMES", "MLP", "CharLSTM", "DigitsCNN", "FEMNISTCNN", "ResNet8", "TwoCNN", "build", "default_for"]

Shape = tuple[int, ...]


def _image(model: str, input_shape: Shape) -> tuple[int, int, int]:
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(f"models: {model} reads images (C, H, W) but a sample has shape {input_shape}; choose another")
    return input_shape[0], input_shape[1], input_shape[2]


class _ConvPair(nn.Module):
    """Two 5x5 convolutions, 7x7 averages, two linear layers; the subclasses set the sizes."""

    def __init__(
        self, name: str, input_shape: Shape, num_classes: int, hidden: int, wide: int, padding: int, pool_padding: int
    ) -> None:
        super().__init__()
        channels, _, _ = _image(name, input_shape)
        self.conv1 = nn.Conv2d(channels, hidden, 5, padding=padding)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2, padding=pool_padding)
        self.conv2 = nn.Conv2d(hidden, 2 * hidden, 5, padding=padding)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2, padding=pool_padding)
        self.pool3 = nn.AdaptiveAvgPool2d(7)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(2 * hidden * 49, wide)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(wide, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores ``(N, num_classes)``."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        return self.fc2(self.relu3(self.fc1(self.flatten(self.pool3(x)))))


class TwoCNN(_ConvPair):
    """The network of AutoFLIP's image experiments: ``(N, C, H, W)`` float -> ``(N, num_classes)``.

    1,663,370 parameters for 28x28 grey images and 10 classes. Raises ValueError for samples that are not images.
    """

    def __init__(self, input_shape: Shape, num_classes: int, hidden: int = 32) -> None:
        super().__init__("two-cnn", input_shape, num_classes, hidden, wide=512, padding=1, pool_padding=1)


class FEMNISTCNN(_ConvPair):
    """AutoFLIP's network for handwriting: ``(N, C, H, W)`` float -> ``(N, num_classes)``.

    13,180,734 parameters for 28x28 grey images and 62 classes. Raises ValueError for samples that are not images.
    """

    def __init__(self, input_shape: Shape, num_classes: int, hidden: int = 64) -> None:
        super().__init__("femnist-cnn", input_shape, num_classes, hidden, wide=2048, padding=2, pool_padding=0)


class DigitsCNN(nn.Module):
    """A small network for 8x8 digits: ``(N, C, H, W)`` float -> ``(N, num_classes)``.

    Raises ValueError for samples that are not images of at least 2x2 pixels.
    """

    def __init__(self, input_shape: Shape, num_classes: int, hidden: int = 64) -> None:
        super().__init__()
        channels, height, width = _image("digits-cnn", input_shape)
        if min(height, width) < 2:
            raise ValueError(f"models: digits-cnn halves the image but a sample has shape {input_shape}; wanted >= 2x2")
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, 2 * hidden, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(2 * hidden * (height // 2) * (width // 2), 128)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores ``(N, num_classes)``."""
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.fc2(self.relu3(self.fc1(self.flatten(self.pool(x)))))


class MLP(nn.Module):
    """The "2NN" of McMahan et al. (arXiv:1602.05629): ``(N, ...)`` float, flattened -> ``(N, num_classes)``."""

    def __init__(self, input_shape: Shape, num_classes: int, hidden: int = 200) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(math.prod(input_shape), hidden)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(hidden, hidden)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores ``(N, num_classes)``."""
        return self.fc3(self.relu2(self.fc2(self.relu1(self.fc1(self.flatten(x))))))


class CharLSTM(nn.Module):
    """LEAF's next-character network: ``(N, T)`` int64 -> ``(N, num_classes)``, scores after the last character.

    Embedding of 8, two LSTM layers of 256; 819,920 parameters for 80 characters.
    Raises ValueError for samples that are not one sequence.
    """

    def __init__(self, input_shape: Shape, num_classes: int, hidden: int = 256) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ValueError(
                f"models: char-lstm reads characters (T,) but a sample has shape {input_shape}; choose another"
            )
        self.embedding = nn.Embedding(num_classes, 8)
        self.lstm = nn.LSTM(8, hidden, num_layers=2, batch_first=True)
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of the next character ``(N, num_classes)``."""
        return self.fc(self.lstm(self.embedding(x))[0][:, -1])


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(8, channels)
    raise ValueError(f"models: norm={kind!r}; wanted 'batch' or 'group'")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., arXiv:1512.03385); the shortcut is 1x1 where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = _norm(norm, outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = _norm(norm, outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, _norm(norm, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``relu(f(x) + shortcut(x))``."""
        out = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(out + self.shortcut(x))


class ResNet8(nn.Module):
    """A residual network of one block per stage, 16-32-64 channels: ``(N, C, H, W)`` float -> ``(N, num_classes)``.

    ``norm="group"`` replaces batch by group normalisation, which federated averaging of uneven clients needs
    (Hsieh et al., arXiv:1910.00189). Raises ValueError for samples that are not images.
    """

    def __init__(self, input_shape: Shape, num_classes: int, norm: str = "batch") -> None:
        super().__init__()
        channels, _, _ = _image("resnet8", input_shape)
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.norm1 = _norm(norm, 16)
        self.relu1 = nn.ReLU()
        self.block1 = BasicBlock(16, 16, 1, norm)
        self.block2 = BasicBlock(16, 32, 2, norm)
        self.block3 = BasicBlock(32, 64, 2, norm)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores ``(N, num_classes)``."""
        x = self.relu1(self.norm1(self.conv1(x)))
        return self.fc(self.flatten(self.pool(self.block3(self.block2(self.block1(x))))))


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits-cnn": DigitsCNN,
    "two-cnn": TwoCNN,
    "femnist-cnn": FEMNISTCNN,
    "char-lstm": CharLSTM,
    "resnet8": ResNet8,
    "resnet8-group": lambda **shape: ResNet8(**shape, norm="group"),
    "mlp": MLP,
}
NAMES = tuple(_MODELS)
_DEFAULTS = {"digits": "digits-cnn", "femnist": "femnist-cnn", "shakespeare": "char-lstm", "har": "mlp"}


def default_for(dataset: str) -> str:
    """Return the name of the model to use for a data set when none is named."""
    return _DEFAULTS.get(dataset, "two-cnn")


def build(name: str, *, input_shape: Shape, num_classes: int, seed: int = 0, **options: Any) -> nn.Module:
    """Return a freshly initialised model; the same arguments give the same bits, and torch's own RNG is left alone.

    Args:
        name: one of `NAMES`, or ``module:callable`` for your own: the callable gets ``input_shape`` and
            ``num_classes`` if it takes arguments of these names, and returns an ``nn.Module``.
        input_shape: shape of one sample, without the batch.
        num_classes: number of outputs.
        seed: of the initial weights.
        options: further arguments of the model, such as ``hidden=128`` or ``norm="group"``.

    Raises:
        ValueError: no such model, or it cannot read samples of this shape.
    """
    if ":" in name:
        make = imported(name, input_shape, num_classes, options)
    elif name in _MODELS:
        make = lambda: _MODELS[name](input_shape=tuple(input_shape), num_classes=num_classes, **options)
    else:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(
            f"models: there is no model {name!r}{hint} wanted one of {', '.join(NAMES)}, or your own as module:callable"
        )
    with torch.random.fork_rng(devices=[]):
        # the default generator alone: torch.manual_seed would seed the GPUs' too
        torch.default_generator.manual_seed(seed)
        try:
            model = make()
        except Exception as error:
            raise ValueError(f"models: making {name!r} failed: {type(error).__name__}: {error}") from error
    return trainable(name, model)
