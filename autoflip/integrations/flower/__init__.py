"""AutoFLIP inside Flower: a client mod and a strategy; models travel as coded differences, not as arrays.

The client's app gets one mod, and keeps its own train function::

    from autoflip.integrations import flower

    app = ClientApp(mods=[flower.mod])


    @app.train()
    def train(message, context):
        model = Net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        autoflip.sparsify(model, flower.masks(context))  # pruned weights cost no FLOPs; without it they cost no bytes
        ...

The server's app gets the strategy in FedAvg's place::

    strategy = flower.AutoFlip(Net(), fraction_train=0.5)
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(Net().state_dict()), num_rounds=20)
    strategy.bytes_up, strategy.bytes_down, strategy.masks

Needs ``pip install 'autoflip[flower]'`` wherever an app runs: server, clients, simulation. Runs in simulation and in
deployment; the bytes are those that a SuperLink carries.
"""

try:
    from flwr.serverapp.strategy import FedAvg as _FedAvg  # noqa: F401 - Flower's message API, 1.41 or newer
except ImportError as error:
    raise ImportError(
        f"autoflip.integrations.flower needs Flower 1.41 or newer ({error}); "
        "install it beside autoflip: pip install 'autoflip[flower]'"
    ) from error

from autoflip.integrations.flower.client import masks, mod
from autoflip.integrations.flower.strategy import AutoFlip

__all__ = ["AutoFlip", "masks", "mod"]
