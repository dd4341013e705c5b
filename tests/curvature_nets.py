"""Models small enough to have a full Hessian, and that Hessian."""

import torch
import torch.nn.functional as F
from torch import nn

EPS = torch.finfo(torch.float64).eps


class Residual(nn.Module):
    """Convolutions (one grouped), eval-mode BatchNorm, a skip connection, in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        x = F.relu(x + self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,)


def wide():
    """More outputs than a block has draws: 8 factors a sample for cross-entropy."""
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 9)), (4,)


def cnn():
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=2, dilation=2)
    return nn.Sequential(
        conv, nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)
    ), (2, 8, 8)


def pooled():
    """Two convolutions in a row behind max-pooling: pool before ReLU, overlapping windows, groups."""
    first = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)
    second = nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2), nn.MaxPool2d(2, 1), nn.ReLU()
    return nn.Sequential(*first, *second, nn.Conv2d(6, 3, 2, padding=1), nn.MaxPool2d(3), nn.Flatten()), (1, 11, 12)


def residual():
    model = Residual()
    for norm in (model.norm1, model.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.running_mean), norm.running_var.uniform_(0.5, 2)
    return model.eval(), (2, 5, 5)


def sequence():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 3)), (3, 4)


def conv1d():
    conv = nn.Conv1d(2, 4, 3, padding="same", padding_mode="circular")
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(28, 3)), (2, 7)


LOSSES = {
    "cross_entropy": F.cross_entropy,
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).double(), label_smoothing=0.1, reduction="sum"),
    "mse": lambda out, y: F.mse_loss(out, F.one_hot(y, 3).to(out)),
    "bce": lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, 3).to(out)),
    "other": lambda out, y: (out.exp().sum(1) * (1 + y)).mean() + out.logsumexp(1).sum(),
}


def make(build, samples=6):
    torch.manual_seed(1)
    model, shape = build()
    g = torch.Generator().manual_seed(2)
    batch = torch.randn(samples, *shape, generator=g).double(), torch.randint(3, (samples,), generator=g)
    return model.double(), batch


def true_hessian(model, loss_fn, batch):
    """Return (names, the full Hessian in all parameters)."""
    params = dict(model.named_parameters())
    sizes = [p.numel() for p in params.values()]

    def loss(flat):
        parts = {n: v.view_as(p) for (n, p), v in zip(params.items(), flat.split(sizes))}
        return loss_fn(torch.func.functional_call(model, parts, batch[0]), batch[1])

    return torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in params.values()]))


def flat(entries):
    return torch.cat([v.flatten() for v in entries.values()])
