"""Flower: the strategy and the mod by hand, on real Flower messages; no SuperLink, no simulation engine."""

import importlib
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoflip
from autoflip import MaskSet, codec
from autoflip.fed.message import RESYNC
from autoflip.fed.message import Message as Envelope

try:
    from flwr import app as flwr
    from flwr import serverapp
    from flwr.clientapp import ClientApp
    from flwr.clientapp.mod import LocalDpMod
    from flwr.serverapp import strategy as strategies

    from autoflip.integrations import flower
    from autoflip.integrations.flower.records import RECORD, Memory, Terms, count

    Grid = serverapp.Grid
except ImportError as reason:
    flower, Grid, MISSING = None, object, str(reason)
else:
    MISSING = ""
needs_flower = pytest.mark.skipif(flower is None, reason=f"Flower is not installed here ({MISSING})")


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


# --- two nodes, one task ---


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


def bent(reply, payload):
    content = flwr.RecordDict({**dict(reply.content.items()), RECORD: flwr.ConfigRecord({"payload": payload})})
    return flwr.Message(content=content, metadata=reply.metadata)


def without_payload(reply):
    return flwr.Message(content=flwr.RecordDict(dict(reply.content.metric_records)), metadata=reply.metadata)


def arrays_instead(reply):
    records = {**dict(reply.content.metric_records), "arrays": start()}
    return flwr.Message(content=flwr.RecordDict(records), metadata=reply.metadata)


def altered(**changes):
    def bend(reply):
        old = Envelope.unpack(reply.content[RECORD]["payload"])
        fields = {**{name: getattr(old, name) for name in Envelope.__dataclass_fields__}, **changes}
        return bent(reply, Envelope(**fields).pack())

    return bend


def flipped(at):
    def bend(reply):
        payload = bytearray(reply.content[RECORD]["payload"])
        payload[at] ^= 0x40
        return bent(reply, bytes(payload))

    return bend


def wild(change):
    def bend(reply):
        old = Envelope.unpack(reply.content[RECORD]["payload"])
        delta = {name: torch.full_like(v, change) for name, v in Net().state_dict().items()}
        schema = codec.Schema.of(delta)  # without masks: what a stranger would send
        frames = (codec.encode(delta, values="fp32", schema=schema, base_id=old.view),)
        return altered(frames=frames)(reply)

    return bend


def wild_inside(reply):
    """Under the right masks, as far as a client can make it."""
    old = Envelope.unpack(reply.content[RECORD]["payload"])
    delta = {name: torch.full_like(v, 3e38) for name, v in Net().state_dict().items()}
    schema = codec.Schema.of(delta)
    frames = (codec.encode(delta, masks=LAST.masks, values="fp32", schema=schema, base_id=old.view),)
    return altered(frames=frames)(reply)


LAST = None  # the strategy that is being lied to
HOSTILE = {
    "under no masks": wild(1.0),
    "beyond all bounds": wild_inside,
    "no bytes": lambda reply: bent(reply, b""),
    "text": lambda reply: bent(reply, "hello"),
    "garbage": lambda reply: bent(reply, bytes(range(256)) * 9),
    "truncated": lambda reply: bent(reply, reply.content[RECORD]["payload"][:-3]),
    "envelope damaged": flipped(9),
    "frame damaged": flipped(-9),
    "of another round": altered(round=77),
    "of another client": altered(client=99),
    "of another view": altered(view=bytes(range(16))),
    "too many examples": altered(examples=10**9),
    "no examples": altered(examples=0),
    "no frame": altered(frames=()),
    "two frames": lambda reply: altered(frames=2 * Envelope.unpack(reply.content[RECORD]["payload"]).frames)(reply),
    "lost, it says": altered(kind=RESYNC, frames=()),
    "no payload": without_payload,
    "plain arrays": arrays_instead,
    "an error": lambda reply: flwr.Message(flwr.Error(8, "died"), reply_to=swapped(reply)),
}


def swapped(reply):
    m = reply.metadata
    return message_to(flwr.RecordDict(), m.message_type, m.src_node_id)


@needs_flower
@pytest.mark.parametrize("what", HOSTILE)
def test_a_bad_reply_costs_its_own_update_only(what, monkeypatch):
    honest = 10**12 + 1

    def bend(node, number, reply):
        training = RECORD in reply.content
        return HOSTILE[what](reply) if node == 10**12 and training and number > 4 else reply

    nodes = Nodes(make_app([flower.mod]), bend=bend)
    strategy = flower.AutoFlip(Net(), density=0.5)
    monkeypatch.setattr(sys.modules[__name__], "LAST", strategy)
    result = run(strategy, nodes, rounds=3)
    assert [(r, n) for r, n, _ in strategy.rejected] == [(2, 10**12), (3, 10**12)]
    assert result.evaluate_metrics_clientapp[3]["accuracy"] > 0.6
    alone = [m for m in result.train_metrics_clientapp[3] if m not in ("bytes-up", "bytes-down")]
    assert alone == ["loss"]
    assert strategy._state.round == 3
    assert strategy._numbers[honest] in strategy._state.held


@needs_flower
def test_after_a_bad_reply_a_client_is_back_in_the_next_round():
    def bend(node, number, reply):
        return HOSTILE["truncated"](reply) if node == 10**12 and number in (3, 4) else reply

    strategy = flower.AutoFlip(Net(), fraction_evaluate=0.0)
    result = run(strategy, Nodes(make_app([flower.mod]), bend=bend), rounds=4)
    assert [(r, n) for r, n, _ in strategy.rejected] == [(2, 10**12)]
    down = [result.train_metrics_clientapp[r]["bytes-down"] for r in (3, 4)]
    assert down[0] > 1.5 * down[1]  # whoever may or may not hold the last model is sent all of the next


@needs_flower
def test_refused_by_all_leaves_the_model_as_it_was():
    def bend(node, number, reply):
        return HOSTILE["garbage"](reply) if RECORD in reply.content and number > 4 else reply

    seen = {}
    strategy = flower.AutoFlip(Net(), settings=PLAIN)
    result = run(
        strategy,
        Nodes(make_app([flower.mod]), bend=bend),
        rounds=3,
        evaluate_fn=lambda r, arrays: seen.update({r: arrays.to_torch_state_dict()}),
    )
    assert len(strategy.rejected) == 4
    assert strategy._state.round == 1
    for name, value in seen[1].items():
        assert torch.equal(value, seen[3][name])
        assert torch.equal(value, result.arrays.to_torch_state_dict()[name])


@needs_flower
def test_a_second_answer_of_one_node_counts_once():
    once, twice = (flower.AutoFlip(Net(), fraction_evaluate=0.0) for _ in range(2))
    replies = []
    for s in (once, twice):
        nodes = Nodes(make_app([flower.mod]))
        random.seed(0)  # FedAvg samples by it, and a client's number is part of its rounding
        replies.append(nodes.send_and_receive(s.configure_train(1, start(), flwr.ConfigRecord(), nodes)))
    arrays = [
        once.aggregate_train(1, replies[0])[0].to_torch_state_dict(),
        twice.aggregate_train(1, [*replies[1], replies[1][0]])[0].to_torch_state_dict(),
    ]
    assert "not asked for one" in twice.rejected[0][2]
    for name, value in arrays[0].items():
        assert torch.equal(value, arrays[1][name])


def metrics(**values):
    return {"loss": 0.5, "num-examples": 10, **values}


ODD = [
    {"loss": float("nan"), "num-examples": 10},
    {"loss": 0.5, "num-examples": float("inf")},
    {"loss": 0.5, "num-examples": -1},
    {"loss": 0.5},
    {"loss": [0.5, 1.0], "num-examples": 10},
    {"loss": 0.5, "num-examples": [10]},
    {"loss": 0.5, "num-examples": 10, "more": 1.0},
]


@needs_flower
@pytest.mark.parametrize("odd", ODD, ids=str)
def test_odd_metrics_stop_nothing(odd):
    def bend(node, number, reply):
        if node != 10**12:
            return reply
        records = {k: v for k, v in reply.content.items() if not isinstance(v, flwr.MetricRecord)}
        return flwr.Message(
            content=flwr.RecordDict({**records, "metrics": flwr.MetricRecord(odd)}), metadata=reply.metadata
        )

    strategy = flower.AutoFlip(Net())
    result = run(strategy, Nodes(make_app([flower.mod]), nodes=3, bend=bend), rounds=1)
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(0.5)
    assert 0 < result.evaluate_metrics_clientapp[1]["accuracy"] <= 1


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
