"""The models of bench_hessian with a batch each, at the start, half trained and trained."""

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from autoflip.fed import models

STEPS = {"start": 0, "half": 30, "trained": 300}


def digits(samples, size, channels=1, classes=range(10)):
    """scikit-learn's 8x8 digits, enlarged to ``size``; only those of ``classes``."""
    data = load_digits()
    keep = torch.isin(torch.tensor(data.target), torch.tensor(list(classes)))
    images = torch.tensor(data.images[keep] / 16, dtype=torch.float32)[:, None]
    images = F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, channels, -1, -1).contiguous()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:samples]
    return images[chosen], torch.tensor(data.target)[keep][chosen]


def characters(samples, length=80):
    """Lines of this repository's licence and their next characters, as LEAF cuts Shakespeare."""
    text = Path(__file__).resolve().parents[1].joinpath("LICENSE").read_text()
    codes = torch.tensor([(ord(c) - 32) % 80 for c in text])
    at = torch.randint(len(codes) - length - 1, (samples,), generator=torch.Generator().manual_seed(1))
    return torch.stack([codes[i : i + length] for i in at]), codes[at + length]


def mlp():
    layers = nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def cnn():
    features = nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10))


def small(smooth):
    """A net so small that calls, not products, take the time."""
    act, pool = (nn.GELU, nn.AvgPool2d) if smooth else (nn.ReLU, nn.MaxPool2d)
    features = nn.Conv2d(1, 16, 3), act(), pool(2), nn.Conv2d(16, 32, 3, padding=1), act(), nn.Flatten()
    return nn.Sequential(*features, nn.Linear(288, 32), act(), nn.Linear(32, 10))


def normed():
    """The same with BatchNorm on the batch's own statistics."""
    layers = list(small(False))
    return nn.Sequential(layers[0], nn.BatchNorm2d(16), *layers[1:])


def resnet8():
    return models.build("resnet8", input_shape=(3, 32, 32), num_classes=10).eval()


def lstm():
    return models.build("char-lstm", input_shape=(80,), num_classes=80)


# name -> (model, batch of so many samples and classes, samples)
CASES = {
    "mlp B256": (mlp, lambda n, classes=range(10): digits(n, 28, 1, classes), 256),
    "cnn B64": (cnn, lambda n, classes=range(10): digits(n, 28, 1, classes), 64),
    "cnn B256": (cnn, lambda n, classes=range(10): digits(n, 28, 1, classes), 256),
    "digits B16": (lambda: small(False), lambda n, classes=range(10): digits(n, 8, 1, classes), 16),
    "digits GELU B16": (lambda: small(True), lambda n, classes=range(10): digits(n, 8, 1, classes), 16),
    "digits BatchNorm B16": (normed, lambda n, classes=range(10): digits(n, 8, 1, classes), 16),
    "resnet8 B64": (resnet8, lambda n, classes=range(10): digits(n, 32, 3, classes), 64),
    "lstm B64": (lstm, lambda n, classes=None: characters(n), 64),
}

TIMED = [case for case in CASES if case != "digits BatchNorm B16"]


def make(case, state="start", classes=range(10)):
    """Return (model, batch); training is Adam on batches of the same digits or lines, the batch among them."""
    build, batch, samples = CASES[case]
    torch.manual_seed(0)
    model = build()
    if STEPS[state]:
        mode = model.training
        x, y = batch(1024)
        optimizer = torch.optim.Adam(model.train().parameters(), 1e-3)
        for _ in range(STEPS[state]):
            chosen = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
        model.train(mode)
    return model, batch(samples, classes)
