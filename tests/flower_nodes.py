"""Two Flower nodes and their grid by hand: real Flower messages; no SuperLink, no simulation engine."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoflip

__all__ = [
    "PLAIN", "RECORD", "ClientApp", "LocalDpMod", "Memory", "Net", "Nodes", "Terms", "copied", "count", "fit",
    "flower", "flwr", "make_app", "message_outside_a_task", "message_to", "needs_flower", "run", "start", "strategies",
]  # fmt: skip

try:
    from flwr import app as flwr
    from flwr import serverapp
    from flwr.clientapp import ClientApp
    from flwr.clientapp.mod import LocalDpMod
    from flwr.serverapp import strategy as strategies

    from autoflip.integrations import flower
    from autoflip.integrations.flower.records import RECORD, Memory, Terms, count

    Grid, MISSING = serverapp.Grid, ""
except ImportError as reason:
    flwr = ClientApp = LocalDpMod = strategies = flower = RECORD = Memory = Terms = count = None
    Grid, MISSING = object, str(reason)
needs_flower = pytest.mark.skipif(flower is None, reason=f"Flower is not installed here ({MISSING})")


class Net(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(20, 48), nn.Linear(48, 3)
        self.norm = nn.BatchNorm1d(48) if norm else nn.Identity()

    def forward(self, x):
        return self.fc2(F.relu(self.norm(self.fc1(x))))


def examples(node, n=60):
    g = torch.Generator().manual_seed(node)
    y = torch.randint(3, (n,), generator=g)
    x = torch.randn(n, 20, generator=g)
    x[:, :3] += 2 * F.one_hot(y, 3)
    return x, y


def fit(model, node, steps=5, lr=0.2):
    x, y = examples(node, 40 + 20 * node)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return len(y)


def make_app(mods, norm=False, sparsify=False):
    app = ClientApp(mods=mods)

    def load(message):
        model = Net(norm)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        return model

    @app.train()
    def train(message, context):
        model = load(message)
        if sparsify:
            autoflip.sparsify(model, flower.masks(context))
        n = fit(model, context.node_config["partition-id"])
        context.state["mine"] = flwr.MetricRecord({"rounds": 1 + context.state.get("mine", {}).get("rounds", 0)})
        metrics = flwr.MetricRecord({"loss": 0.5, "num-examples": n})
        content = flwr.RecordDict({"arrays": flwr.ArrayRecord(model.state_dict()), "metrics": metrics})
        return flwr.Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        model = load(message).eval()
        x, y = examples(context.node_config["partition-id"] + 100)
        right = float((model(x).argmax(1) == y).float().mean())
        metrics = flwr.MetricRecord({"accuracy": right, "num-examples": len(y)})
        return flwr.Message(flwr.RecordDict({"metrics": metrics}), reply_to=message)

    return app


class Nodes(Grid):
    """A SuperLink of this process: contexts last, replies may be bent on their way back."""

    def __init__(self, app, nodes=2, bend=None):
        self.app, self.bend = app, bend
        self.contexts = {
            10**12 + k: flwr.Context(1, 10**12 + k, {"partition-id": k}, flwr.RecordDict(), {}) for k in range(nodes)
        }
        self.sent, self.came = [], []

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            message = copied(message)
            self.sent.append((node, message.content))
            try:
                reply = self.app(message, self.contexts[node])
            except Exception as fault:
                reply = flwr.Message(flwr.Error(2, str(fault)), reply_to=message)
            reply = copied(reply)
            if self.bend is not None:
                reply = self.bend(node, len(self.sent), reply)
            self.came.append((node, reply))
            replies.append(reply)
        return replies

    run = create_message = set_run = push_messages = pull_messages = None


if flower is not None:
    Nodes.__abstractmethods__ = frozenset()


def copied(message):
    """As the wire leaves it: every record through Flower's own bytes."""
    if message.has_error():
        return message
    records = {}
    for name, record in message.content.items():
        if isinstance(record, flwr.ArrayRecord):
            records[name] = flwr.ArrayRecord(dict(record.items()))
        else:
            records[name] = type(record).inflate(record.deflate())
    return flwr.Message(content=flwr.RecordDict(records), metadata=message.metadata)


@pytest.fixture(autouse=True)
def message_outside_a_task(monkeypatch):
    """Flower's Message asks the running task for its run and node; there is none here."""
    if flower is None:
        return
    monkeypatch.setattr("flwr.serverapp.strategy.fedavg.Message", message_to)


def message_to(content, message_type, dst_node_id):
    metadata = flwr.Metadata(1, "", 1, dst_node_id, "", "", 1e10, 1e6, message_type)
    return flwr.Message(content=content, metadata=metadata)


def start(norm=False):
    torch.manual_seed(0)
    return flwr.ArrayRecord(Net(norm).state_dict())


def run(strategy, nodes, rounds=3, norm=False, **options):
    return strategy.start(grid=nodes, initial_arrays=start(norm), num_rounds=rounds, **options)


PLAIN = ["server.optimizer=none", "server.average=0"]
