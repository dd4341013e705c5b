"""Flower: rounds of the strategy and the mod by hand, on real Flower messages."""

import subprocess
import sys

import pytest
import torch
from flower_nodes import (  # noqa: F401
    PLAIN,
    RECORD,
    Memory,
    Net,
    Nodes,
    count,
    flower,
    flwr,
    make_app,
    message_outside_a_task,
    needs_flower,
    run,
    strategies,
)


def test_without_flower_the_error_says_what_to_install():
    code = (
        "import sys\n"
        "sys.modules['flwr'] = None\n"
        "import autoflip, autoflip.integrations\n"
        "try:\n    import autoflip.integrations.flower\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs Flower 1.41 or newer" in done.stdout
    assert "pip install 'autoflip[flower]'" in done.stdout


def test_autoflip_does_not_import_flower():
    code = (
        "import sys, autoflip, autoflip.integrations\n"
        "from autoflip import codec, fed, nn, report\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'flwr'])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@needs_flower
def test_rounds_prune_and_learn_on_few_bytes():
    dense = Nodes(make_app([]))
    theirs = run(strategies.FedAvg(), dense, rounds=6)
    nodes = Nodes(make_app([flower.mod], sparsify=True))
    strategy = flower.AutoFlip(Net(), density=0.25)
    result = run(strategy, nodes, rounds=6)
    arrays = result.arrays.to_torch_state_dict()
    assert strategy.rejected == []
    assert strategy.masks.density <= 0.26
    for name, mask in strategy.masks.items():
        assert not arrays[name][~mask].any(), name
    assert list(arrays) == list(Net().state_dict())
    ours, others = (r.evaluate_metrics_clientapp[6]["accuracy"] for r in (result, theirs))
    assert ours > 0.8
    assert ours > others - 0.1
    # dense float32: 1,155 parameters, to two clients for training and evaluation, back from training
    assert strategy.bytes_up < 6 * 2 * 1155 * 4 / 7
    assert strategy.bytes_down < 6 * 4 * 1155 * 4 / 5
    metrics = [*result.train_metrics_clientapp.values(), *result.evaluate_metrics_clientapp.values()]
    assert sum(m["bytes-up"] for m in metrics) == strategy.bytes_up
    assert sum(m["bytes-down"] for m in metrics) == strategy.bytes_down
    sent = sum(count(content[RECORD]) for _, content in nodes.sent)
    came = sum(count(r.content[RECORD]) for _, r in nodes.came if RECORD in r.content)
    assert (sent, came) == (strategy.bytes_down, strategy.bytes_up)


@needs_flower
@pytest.mark.parametrize("norm", [False, True])
def test_with_everything_kept_and_exact_it_is_fedavg(norm):
    theirs = run(strategies.FedAvg(), Nodes(make_app([], norm)), norm=norm).arrays.to_torch_state_dict()
    strategy = flower.AutoFlip(Net(norm), density=1, channels=1, values="fp32", downlink="fp32", settings=PLAIN)
    ours = run(strategy, Nodes(make_app([flower.mod], norm)), norm=norm).arrays.to_torch_state_dict()
    assert strategy.rejected == []
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        if not theirs[name].is_floating_point() or "num_batches" in name:
            assert value == 0  # counters stay as they came
            continue
        # w + mean(w_k - w) against mean(w_k): a few roundings a round, carried through three rounds of local steps
        torch.testing.assert_close(value, theirs[name].float(), rtol=0, atol=64 * 2**-24 * float(value.abs().max()))


@needs_flower
def test_what_an_app_gets_is_what_the_server_thinks_it_holds():
    nodes = Nodes(make_app([flower.mod]))
    strategy = flower.AutoFlip(Net(), settings=PLAIN)
    run(strategy, nodes, rounds=3)
    state = strategy._state
    for node, context in nodes.contexts.items():
        view = Memory.load(context).view
        assert view.id == state.held[strategy._numbers[node]]
        for name, value in view.params.items():  # int4: behind by at most a step of the last difference
            assert torch.equal(value, state.views[view.id].params[name])
    assert len(state.views) == 1
    assert nodes.contexts[10**12].state["mine"]["rounds"] == 3  # the app's own state is left alone


@needs_flower
def test_training_after_an_evaluation_of_the_same_model_sends_nothing_twice():
    nodes = Nodes(make_app([flower.mod]))
    strategy = flower.AutoFlip(Net(), settings=PLAIN)
    result = run(strategy, nodes, rounds=3)
    assert result.train_metrics_clientapp[2]["bytes-down"] < 250  # two envelopes
    assert result.evaluate_metrics_clientapp[2]["bytes-down"] > 800
    whole = flower.AutoFlip(Net())  # what is handed out is a mean of rounds: training goes on from another model
    assert run(whole, Nodes(make_app([flower.mod])), rounds=3).train_metrics_clientapp[3]["bytes-down"] > 250


@needs_flower
@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("downlink", ["fp32", "bf16", "int8", "int4"])
def test_every_way_up_and_down_learns(values, downlink):
    strategy = flower.AutoFlip(Net(), values=values, downlink=downlink, density=0.5, feedback=values == "int4")
    result = run(strategy, Nodes(make_app([flower.mod])), rounds=4)
    assert strategy.rejected == []
    assert result.evaluate_metrics_clientapp[4]["accuracy"] > 0.7


@needs_flower
def test_error_feedback_remembers_across_processes():
    nodes = Nodes(make_app([flower.mod]))
    run(flower.AutoFlip(Net(), feedback=True), nodes, rounds=2)
    memory = Memory.load(nodes.contexts[10**12])
    left = torch.cat([r.flatten() for r in memory.residual.values()])
    assert float(left.abs().max()) > 0
    assert set(memory.residual) == set(Net().state_dict())


@needs_flower
def test_a_client_that_lost_its_state_misses_one_round():
    nodes = Nodes(make_app([flower.mod]))

    def forget(server_round, arrays):
        if server_round == 2:
            nodes.contexts[10**12].state = flwr.RecordDict()

    strategy = flower.AutoFlip(Net(), fraction_evaluate=0.0)
    result = run(strategy, nodes, rounds=5, evaluate_fn=forget)
    assert [(r, n) for r, n, _ in strategy.rejected] == [(3, 10**12)]
    assert "lost what it held" in strategy.rejected[0][2]
    down = {r: m["bytes-down"] for r, m in result.train_metrics_clientapp.items()}
    assert down[4] > 1.5 * down[3]  # everything again, to one of the two
    assert result.evaluate_metrics_clientapp == {}  # nobody was asked


@needs_flower
def test_a_new_node_gets_everything_without_a_round_lost():
    nodes = Nodes(make_app([flower.mod]))

    def restart(server_round, arrays):
        if server_round == 2:
            old = nodes.contexts.pop(10**12)
            nodes.contexts[7] = flwr.Context(1, 7, old.node_config, flwr.RecordDict(), {})

    strategy = flower.AutoFlip(Net())
    run(strategy, nodes, rounds=4, evaluate_fn=restart)
    assert strategy.rejected == []
