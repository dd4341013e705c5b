"""A node: an ordinary Flower app with one mod, and one line that makes its training sparse."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from task import Net, accuracy, load, train

import autoflip
from autoflip.integrations import flower

app = ClientApp(mods=[flower.mod])  # 1: arrays travel as coded differences


def mine(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    return load(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))


@app.train()
def train_(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    autoflip.sparsify(model, flower.masks(context))  # 2: pruned weights stay zero and cost no FLOPs
    x, y = mine(context)
    loss = train(model, x, y)
    metrics = MetricRecord({"loss": loss, "num-examples": len(y)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y = mine(context)
    metrics = MetricRecord({"accuracy": accuracy(model, x, y), "num-examples": len(y)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
