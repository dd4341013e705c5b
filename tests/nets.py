"""Networks for the pruning tests: name -> (module, one batch of inputs), all in float64."""

import torch
import torch.nn.functional as F
from torch import nn


class TwoCnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3)
        self.fc1, self.fc2 = nn.Linear(16 * 9, 20), nn.Linear(20, 5)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x))
        return self.fc2(F.relu(self.fc1(x.view(x.size(0), -1))))


class Residual(nn.Module):
    """Two blocks: one with a 1x1 shortcut, one that adds to itself; batch norm everywhere."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a1, self.n1 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.a2, self.n2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.short = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
        self.b1, self.n3 = nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b2, self.n4 = nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.n2(self.a2(F.relu(self.n1(self.a1(x))))) + self.short(x))
        y = self.n4(self.b2(F.relu(self.n3(self.b1(x)))))
        y += x
        return self.head(F.adaptive_avg_pool2d(F.relu(y), 1).flatten(1))


class Concat(nn.Module):
    """Dense connections, a squeeze-and-excite gate and a per-channel PReLU."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(14), nn.PReLU(14)
        self.squeeze, self.excite = nn.Linear(14, 6), nn.Linear(6, 14)
        self.c, self.head = nn.Conv2d(14, 10, 3), nn.Linear(10, 3)

    def forward(self, x):
        a = F.relu(self.a(x))
        x = self.act(self.norm(torch.cat([a, self.b(a)], dim=1)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3))))))
        x = x * gate.unsqueeze(-1).unsqueeze(-1)
        return self.head(self.c(x).tanh().mean([-2, -1]))


class Separable(nn.Module):
    """Depthwise (also with two outputs per input) and grouped convolutions, three kinds of norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.norm, self.point = nn.GroupNorm(8, 8), nn.Conv2d(8, 12, 1)
        self.twice, self.norm2 = nn.Conv2d(12, 24, 3, groups=12, bias=False), nn.InstanceNorm2d(24)
        self.wide, self.grouped = nn.Conv2d(24, 32, 1), nn.Conv2d(32, 24, 1, groups=4)
        self.norm3, self.head = nn.BatchNorm2d(24, affine=False), nn.Linear(24, 4)
        self.last, self.norm4 = nn.Conv2d(24, 24, 1), nn.GroupNorm(12, 24, affine=False)

    def forward(self, x):
        x = F.relu6(self.norm(self.deep(self.stem(x))))
        x = F.silu(self.norm2(self.twice(F.relu(self.point(x)))))
        x = self.norm4(self.last(self.norm3(self.grouped(self.wide(x)))))
        return self.head(torch.flatten(x.amax((2, 3)), 1))


class Text(nn.Module):
    """A published recipe: embedding, stacked LSTM, last step, linear."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.out = nn.Linear(12, 30)

    def forward(self, x, state=None):
        y, _ = self.lstm(self.embed(x), state)
        return self.out(y[:, -1])


class Gru(nn.Module):
    """Convolutions in time, a GRU whose state is read, an unused bidirectional twin's sum."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)
        self.gru, self.rnn = nn.GRU(8, 10, batch_first=True), nn.RNN(10, 6, batch_first=True)
        self.both = nn.LSTM(6, 4, bidirectional=True, batch_first=True)
        self.a, self.b = nn.Linear(8, 5), nn.Linear(10, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x))).transpose(1, 2)
        y, state = self.gru(x)
        y, _ = self.both(self.rnn(y)[0])
        return self.a(y.mean(dim=1)) + self.b(state[-1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Sequential(nn.Linear(16, 12), nn.ReLU())
        self.out = nn.Linear(12, 5)

    def forward(self, x):
        return self.out(self.head(self.encoder(self.embed(x)).mean(1)))


class Decoder(nn.Module):
    """Transposed convolution and upsampling back to an image; a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.down, self.same = nn.Conv2d(1, 8, 2, stride=2), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x):
        x = F.gelu(self.down(x))
        x = self.same(F.relu(self.same(x)))
        return self.out(F.pad(F.relu(self.up(x)), (1, 1, 1, 1)))


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 10),
        nn.Sequential(nn.Sigmoid(), nn.Linear(10, 8), nn.LeakyReLU()), nn.Linear(8, 4)
    )  # fmt: skip


def build(name: str):
    """Return (module in float64, inputs) with weights and inputs that depend on nothing but the name."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = {"two_cnn": (1, 10), "residual": (3, 8), "concat": (2, 8), "separable": (3, 9), "decoder": (1, 8)}
        if name in image:
            x = torch.randn(4, image[name][0], image[name][1], image[name][1], dtype=torch.float64)
        elif name in ("text", "encoder"):
            x = torch.randint(30, (4, 7))
        else:
            x = torch.randn(4, 3, 9 if name == "gru" else 4, dtype=torch.float64)
        model = BUILDERS[name]().double()
        for buffer in model.buffers():  # fresh running stats are all alike
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model, x


BUILDERS = {
    "mlp": mlp,
    "two_cnn": TwoCnn,
    "residual": Residual,
    "concat": Concat,
    "separable": Separable,
    "text": Text,
    "gru": Gru,
    "encoder": Encoder,
    "decoder": Decoder,
}
