"""The server: AutoFLIP in FedAvg's place, or FedAvg itself to compare with.

Here and on every node: pip install autoflip[flower]. README's figures come from a SuperLink, two SuperNodes and

    flower-superlink --insecure
    flower-supernode --insecure --superlink 127.0.0.1:8000 --port 9094 --node-config "partition-id=0 num-partitions=2"
    flower-supernode --insecure --superlink 127.0.0.1:8000 --port 9095 --node-config "partition-id=1 num-partitions=2"
    flwr run examples/flower_app here --stream
    flwr run examples/flower_app here --stream --run-config 'method="fedavg"'

with this in $FLWR_HOME/config.toml (~/.flwr without it):

    [superlink.here]
    address = "127.0.0.1:8000"
    insecure = true
"""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from task import Net, accuracy, load

from autoflip.integrations import flower

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.manual_seed(0)
    model = Net()

    def test(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord({"accuracy": accuracy(model, *load())})

    options = {"fraction_evaluate": 0.0}  # the server tests
    ours = context.run_config["method"] == "autoflip"
    strategy = flower.AutoFlip(model, **options) if ours else FedAvg(**options)
    start, rounds = ArrayRecord(model.state_dict()), int(context.run_config["rounds"])
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=rounds, evaluate_fn=test)
    right = float(result.evaluate_metrics_serverapp[rounds]["accuracy"])
    if ours:
        up, down = strategy.bytes_up, strategy.bytes_down
    else:
        whole = sum(len(array.data) for array in start.values())
        up = down = rounds * len(list(grid.get_node_ids())) * whole
    print(f"{context.run_config['method']}: accuracy {right:.4f}, {up:,} bytes up, {down:,} bytes down")
