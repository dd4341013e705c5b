"""Flower: what apps and users of the strategy do, forget and are told."""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from flower_nodes import (  # noqa: F401
    PLAIN,
    RECORD,
    ClientApp,
    LocalDpMod,
    Memory,
    Net,
    Nodes,
    Terms,
    copied,
    fit,
    flower,
    flwr,
    make_app,
    message_outside_a_task,
    needs_flower,
    run,
    start,
    strategies,
)

import autoflip
from autoflip import MaskSet, codec


@needs_flower
def test_apps_that_forget_something_hear_what():
    context = flwr.Context(1, 5, {}, flwr.RecordDict(), {})
    strategy = flower.AutoFlip(Net())
    nodes = Nodes(None)

    def offered():
        return copied(strategy.configure_train(1, start(), flwr.ConfigRecord(), nodes)[0])

    def replying(records):
        return lambda message, context: flwr.Message(flwr.RecordDict(records), reply_to=message)

    good = flwr.MetricRecord({"num-examples": 3})
    with pytest.raises(ValueError, match="holds 0 ArrayRecords, wanted one"):
        flower.mod(offered(), context, replying({"metrics": good}))
    with pytest.raises(ValueError, match=r"no such array for 'fc1.weight'"):
        flower.mod(offered(), context, replying({"arrays": flwr.ArrayRecord([torch.zeros(1).numpy()]), "m": good}))
    with pytest.raises(ValueError, match="whole number of training examples"):
        flower.mod(offered(), context, replying({"arrays": start()}))
    with pytest.raises(ValueError, match="whole number of training examples"):
        flower.mod(offered(), context, replying({"arrays": start(), "m": flwr.MetricRecord({"num-examples": 0.5})}))
    diverged = {name: torch.full_like(v, float("nan")) for name, v in Net().state_dict().items()}
    with pytest.raises(ValueError, match="NaN or infinite"):
        flower.mod(offered(), context, replying({"arrays": flwr.ArrayRecord(diverged), "m": good}))


@needs_flower
def test_users_of_the_strategy_hear_what_is_wrong():
    with pytest.raises(ValueError, match=r"prune.density=1.5 is out of range"):
        flower.AutoFlip(Net(), density=1.5)
    with pytest.raises(ValueError, match="second upload"):
        flower.AutoFlip(Net(), settings=["explore.signal=curvature"])
    strategy = flower.AutoFlip(Net())
    with pytest.raises(ValueError, match="the initial arrays are 0, 1"):
        strategy.configure_train(1, flwr.ArrayRecord([torch.zeros(3).numpy()] * 2), flwr.ConfigRecord(), Nodes(None))
    assert strategy.masks is None


@needs_flower
def test_masks_of_a_context():
    context = flwr.Context(1, 5, {}, flwr.RecordDict(), {})
    assert flower.masks(context) == MaskSet({})
    nodes = Nodes(make_app([flower.mod]))
    strategy = flower.AutoFlip(Net(), channels=0.5)
    run(strategy, nodes, rounds=2)
    assert flower.masks(nodes.contexts[10**12]) == strategy.masks


@needs_flower
def test_a_compact_model_may_train_and_go_back_through_its_plan():
    app = ClientApp(mods=[flower.mod])

    @app.train()
    def train(message, context):
        model = Net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        small = autoflip.compact(model, masks=flower.masks(context))
        n = fit(small, context.node_config["partition-id"])
        arrays = flwr.ArrayRecord(small.plan.expand(small.state_dict()))
        content = flwr.RecordDict({"arrays": arrays, "metrics": flwr.MetricRecord({"num-examples": n})})
        return flwr.Message(content, reply_to=message)

    results = []
    for each in (app, make_app([flower.mod], sparsify=True)):
        strategy = flower.AutoFlip(Net(), channels=0.5, values="fp32", downlink="fp32", fraction_evaluate=0.0)
        results.append(run(strategy, Nodes(each), rounds=3).arrays.to_torch_state_dict())
        assert strategy.rejected == []
    for name, value in results[0].items():
        # the same training, sums in another order
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=1e-5)


@needs_flower
def test_other_strategies_pass_through_the_mod():
    theirs = run(strategies.FedAvg(), Nodes(make_app([]))).arrays.to_torch_state_dict()
    ours = run(strategies.FedAvg(), Nodes(make_app([flower.mod]))).arrays.to_torch_state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


@needs_flower
def test_terms_survive_the_wire_and_their_damage_is_named():
    state = Net(norm=True).double().state_dict()
    terms = Terms(
        codec.Schema.of(state),
        {"norm.num_batches_tracked": torch.tensor(3)},
        ("float64",) * 8,
        *("arrays", "num-examples", "int4", 7, "bf16", 5, True),
    )
    fields = flwr.ConfigRecord(terms.write())
    assert Terms.read(flwr.ConfigRecord.inflate(fields.deflate())) == terms
    arrays = terms.arrays_of({name: value.float() for name, value in state.items() if value.is_floating_point()})
    assert list(arrays) == list(state)
    assert arrays["fc1.weight"].dtype == "float64"
    assert int(arrays["norm.num_batches_tracked"].numpy()) == 3
    for name in ("schema", "values", "dtypes"):
        broken = {k: v for k, v in terms.write().items() if k != name}
        with pytest.raises(codec.DecodeError, match="terms are damaged"):
            Terms.read(broken)


@needs_flower
def test_damaged_memory_is_no_memory():
    nodes = Nodes(make_app([flower.mod]))
    run(flower.AutoFlip(Net()), nodes, rounds=2)
    context = nodes.contexts[10**12]
    whole = dict(context.state[RECORD])
    for name in ("schema", "params", "masks"):
        damaged = bytearray(whole[name])
        damaged[len(damaged) // 2] ^= 1
        context.state[RECORD] = flwr.ConfigRecord({**whole, name: bytes(damaged)})
        assert Memory.load(context) is None, name
    context.state[RECORD] = flwr.ConfigRecord(whole)
    assert Memory.load(context) is not None


@needs_flower
@pytest.mark.parametrize("method", ["autoflip", "fedavg"])
def test_the_example_app_runs(method, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples" / "flower_app"))
    client, server = (importlib.import_module(f"{side}_app") for side in ("client", "server"))
    nodes = Nodes(client.app)
    for context in nodes.contexts.values():
        context.node_config["num-partitions"] = 2
    server.app(nodes, flwr.Context(1, 1, {}, flwr.RecordDict(), {"method": method, "rounds": 3}))
    line = capsys.readouterr().out.splitlines()[-1]
    accuracy, up, down = re.fullmatch(rf"{method}: accuracy (\S+), (\S+) bytes up, (\S+) bytes down", line).groups()
    up, down = (int(number.replace(",", "")) for number in (up, down))
    assert float(accuracy) > 0.8
    dense = 3 * 2 * sum(p.numel() * 4 for p in client.Net().parameters())
    if method == "autoflip":  # the exploration round is most of three
        assert up < dense / 25
        assert down < dense / 8
    else:
        assert dense < up == down < 1.01 * dense


@needs_flower
@pytest.mark.parametrize("evaluated", [0.0, 1.0])
def test_a_strategy_around_it_that_changes_arrays_is_an_error(evaluated):
    ours = flower.AutoFlip(Net(), fraction_evaluate=evaluated)
    noisy = strategies.DifferentialPrivacyServerSideFixedClipping(ours, 1.0, 1.0, 2)
    with pytest.raises(ValueError, match="arrays are not those that the last round made.*LocalDpMod"):
        run(noisy, Nodes(make_app([flower.mod])))
    assert ours.masks is not None  # round 1 went as always


@needs_flower
def test_arrays_may_be_copied_on_their_way():
    class Copied(flower.AutoFlip):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            return flwr.ArrayRecord(arrays.to_torch_state_dict()), metrics

    strategy = Copied(Net())
    run(strategy, Nodes(make_app([flower.mod])))
    assert strategy.rejected == []


@needs_flower
def test_local_privacy_clips_and_bends_what_is_sent():
    lengths, noises = [], []
    for sensitivity in (0.0, 0.01):
        mods = [flower.mod, LocalDpMod(clipping_norm=0.01, sensitivity=sensitivity, epsilon=1.0, delta=1e-5)]
        strategy = flower.AutoFlip(
            Net(), channels=1, density=1, values="fp32", downlink="fp32", fraction_evaluate=0.0, settings=PLAIN
        )
        result = run(strategy, Nodes(make_app(mods)), rounds=1).arrays.to_torch_state_dict()
        assert strategy.rejected == []
        moved = torch.cat([(result[name] - value).flatten() for name, value in start().to_torch_state_dict().items()])
        lengths.append(moved.norm().item())
        noises.append(moved.std().item())
    assert lengths[0] <= 0.01 * (1 + 1e-5)  # a mean of two that were clipped; float32
    # of two nodes' means: sensitivity * sqrt(2 ln(1.25 / delta)) / epsilon over a root of 2 or a bit less, weighted
    std = 0.01 * (2 * math.log(1.25 / 1e-5)) ** 0.5
    assert std * 0.65 < noises[1] < std * 0.8


@needs_flower
def test_privacy_in_front_of_the_mod_is_refused():
    strategy = flower.AutoFlip(Net(), fraction_evaluate=0.0)
    nodes = Nodes(make_app([LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=1.0, delta=1e-5), flower.mod]))
    result = run(strategy, nodes, rounds=1)
    assert not result.arrays  # nothing went out without noise
    assert len(strategy.rejected) == 2
