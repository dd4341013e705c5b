"""The round end to end, on real payloads: what it costs is what ran, and nothing a client does breaks it."""

import copy
import re
import statistics
import time
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from autoflip import MaskSet, codec, fed, meter, nn, prune
from autoflip.explore import Sums
from autoflip.fed import models
from autoflip.fed.client import Client
from autoflip.fed.job import Job
from autoflip.fed.message import Message
from autoflip.fed.state import Guidance, ServerState
from autoflip.fed.strategies import METHODS
from autoflip.fed.transport import InProcess
from autoflip.fed.workshop import Prepared
from autoflip.ops import backend

SMALL = ["fed.rounds=4", "fed.clients=4", "fed.fraction=0.5", "train.epochs=1", "data.samples_per_client=40"]
SMALL += ["explore.fraction=1.0", "prune.channels=0.5", "prune.density=0.15", "wire.values=int8", "wire.downlink=bf16"]


def _config(*overrides):
    return fed.Config.load(overrides=[*SMALL, *overrides])


class _Tap(InProcess):
    """Keeps every payload that crosses."""

    def __init__(self, clients, log):
        super().__init__(clients)
        self.log = log

    def exchange(self, client, payload):
        reply = super().exchange(client, payload)
        self.log.append((client, payload, reply.payload))
        return reply


@pytest.fixture
def tapped(monkeypatch):
    log = []
    monkeypatch.setattr("autoflip.fed.loop.InProcess", lambda clients: _Tap(clients, log))
    return log


@pytest.mark.parametrize("method", ["autoflip", "autoflip-paper", "fedavg"])
def test_bytes_in_the_ledger_are_the_lengths_of_the_payloads(tapped, method):
    result = fed.run(_config(f"fed.method={method}", "fed.against=none"))
    assert result.cost.bytes_down == sum(len(down) for _, down, _ in tapped) > 0
    assert result.cost.bytes_up == sum(len(up) for _, _, up in tapped) > 0
    for record in result.records:
        assert record.bytes_up == sum(c.bytes_up for c in record.clients)
        assert record.bytes_down == sum(c.bytes_down for c in record.clients)


def test_flops_in_the_ledger_equal_torchs_count_on_the_compact_dense_model():
    config = _config("fed.against=none", "prune.density=1", "prune.channels=0.5", "train.batch_size=16")
    result = fed.run(config)
    job = Job(config)
    sizes = {k: len(client.targets) for k, client in job.clients("autoflip").items()}
    compact = nn.compact(job.blank, masks=result.masks)
    assert sum(p.numel() for p in compact.parameters()) < 0.6 * sum(p.numel() for p in job.blank.parameters())

    def count(model, examples):
        total = 0
        for size in (min(16, examples - at) for at in range(0, examples, 16)):
            with FlopCounterMode(display=False) as counter:
                x = torch.zeros(size, *job.dataset.input_shape)
                F.cross_entropy(model(x), torch.zeros(size, dtype=torch.long)).backward()
            total += counter.get_total_flops()
        return total

    for record in result.records:
        model = job.blank if record.phase == "exploration" else compact
        want = sum(count(copy.deepcopy(model), sizes[c.client]) for c in record.clients)
        assert record.flops == pytest.approx(want, rel=0.01)


def test_processor_seconds_are_of_the_rounds_without_evaluation(monkeypatch):
    from autoflip.fed.workshop import Workshop

    evaluate = Workshop.evaluate

    def busy(*args):
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass
        return evaluate(*args)

    monkeypatch.setattr(Workshop, "evaluate", busy)
    start = time.process_time()
    result = fed.run(_config("fed.against=none", "fed.rounds=4"))
    spent, rounds = time.process_time() - start, [r.cpu_seconds for r in result.records]
    assert min(rounds) > 0
    assert sum(rounds) < spent - 4 * 0.5


def test_clients_are_not_charged_the_seconds_of_the_simulations_counting(monkeypatch):
    count = Prepared.step_flops

    def busy(*args):
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass
        return count(*args)

    monkeypatch.setattr(Prepared, "step_flops", busy)
    (record,) = fed.run(_config("fed.against=none", "fed.rounds=1")).records
    clients = [c.cpu_seconds for c in record.clients]
    assert min(clients) > 0
    assert sum(clients) < record.cpu_seconds - 0.5


def test_masked_weights_lower_the_executed_flops_further():
    wide = [
        "fed.against=none",
        "model.name=mlp",
        "train.batch_size=64",
        "data.samples_per_client=64",
        "prune.channels=1",
    ]
    dense = fed.run(_config(*wide, "prune.density=1"))
    sparse = fed.run(_config(*wide, "prune.density=0.05"))
    assert sparse.records[-1].flops < 0.9 * dense.records[-1].flops


@pytest.mark.parametrize(
    "capability, inputs, last", [("AVX2", 6, False), ("AVX2", 8, True), ("AVX512", 15, False), ("AVX512", 16, True)]
)
def test_models_whose_gradients_onednn_corrupts_memory_for_stay_row_major(capability, inputs, last, monkeypatch):
    from autoflip.fed.workshop import Workshop

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, inputs, 3), torch.nn.Conv2d(inputs, 16, 1, stride=2))
    weight = Workshop(model).prepare(None).model[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is last


@pytest.mark.parametrize(
    "name, channels, last", [("resnet8-group", 0.4, False), ("resnet8-group", 1.0, True), ("two-cnn", 0.2, True)]
)
def test_narrow_models_with_group_norm_stay_row_major(name, channels, last):
    """GroupNorm takes several times as long channels-last; where oneDNN convolves, that gains more."""
    from autoflip.fed.workshop import Workshop

    if backend.serve("masked_matmul", torch.device("cpu")) != "cpp":
        pytest.skip("no kernel convolves few channels faster than oneDNN")
    model = models.build(name, input_shape=(3, 32, 32), num_classes=10)
    scores = {name: p.detach().abs() for name, p in model.named_parameters()}
    masks = prune.hybrid(model, scores, density=1.0, channels=channels) if channels < 1 else None
    small = Workshop(model).prepare(masks).model
    convs = [m for m in small.modules() if isinstance(m, torch.nn.Conv2d) and m.weight[0, 0].numel() > 1]
    assert all(isinstance(m, nn.MaskedConv2d) for m in convs) is (channels < 1)
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) is last for m in convs)


def test_a_training_step_takes_fewer_seconds_when_channels_are_removed():
    model = models.build("two-cnn", input_shape=(1, 28, 28), num_classes=10)
    scores = {name: p.detach().abs() for name, p in model.named_parameters()}
    small = nn.compact(model, masks=prune.hybrid(model, scores, density=1.0, channels=0.5))
    x, y = torch.randn(32, 1, 28, 28), torch.randint(10, (32,))

    def step(network):
        start = time.perf_counter()
        F.cross_entropy(network(x), y).backward()
        return time.perf_counter() - start

    step(model), step(small)
    ratios = [step(small) / step(model) for _ in range(7)]
    # half of the channels: about 0.3 of the FLOPs; 0.75 leaves room for a busy machine, not for a mask on a dense net
    assert statistics.median(ratios) < 0.75


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not():
    first, again = fed.run(_config()), fed.run(_config())
    other = fed.run(_config("fed.seed=1"))
    assert all(torch.equal(first.params[k], again.params[k]) for k in first.params)
    assert [(r.accuracy, r.flops, r.bytes_up) for r in first.records] == [
        (r.accuracy, r.flops, r.bytes_up) for r in again.records
    ]
    assert not all(torch.equal(first.params[k], other.params[k]) for k in first.params)


def test_a_run_leaves_torch_as_it_was_and_does_not_depend_on_it():
    want = fed.run(_config("fed.rounds=2"))
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    try:
        got = fed.run(_config("fed.rounds=2"))
        assert (torch.get_num_threads(), torch.get_default_dtype()) == (2, torch.float64)
        with pytest.raises(ValueError, match="no data set"):
            fed.run(_config("data.name=nope"))
        assert (torch.get_num_threads(), torch.get_default_dtype()) == (2, torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(v, got.params[k]) for k, v in want.params.items())


def test_pruned_weights_stay_zero_and_the_model_is_the_one_that_was_measured():
    result = fed.run(_config("fed.against=none", "prune.density=0.2"))
    assert result.masks is not None
    assert result.records[-1].density == pytest.approx(0.2, rel=0.02)
    for name, mask in result.masks.items():
        assert float(result.params[name][~mask].abs().sum()) == 0
    data = Job(result.config).dataset.test
    with torch.no_grad():
        right = (result.model()(data.x).argmax(1) == data.y).float().mean()
    # the compact model rounds differently: at most one image in 360 may tip over
    assert float(right) == pytest.approx(result.accuracy, abs=1.5 / 360)


def test_downlink_patches_are_lossless_and_smaller_than_full_broadcasts(tapped):
    fed.run(_config("fed.against=none", "fed.fraction=1.0", "fed.rounds=5", "wire.start=broadcast"))
    sizes = [len(down) for client, down, _ in tapped if client == 0]
    assert sizes[1] < 0.4 * sizes[0]  # pruned
    assert sizes[3] < sizes[1]  # masks have travelled, words change little


def _with_client(monkeypatch, change):
    """Make client 1 of every run misbehave."""
    handle = Client.handle

    def bad(self, payload):
        return change(self, payload, handle) if self.id == 1 else handle(self, payload)

    monkeypatch.setattr(Client, "handle", bad)


def _raise(self, payload, handle):
    raise RuntimeError("out of memory")


def _garbage(self, payload, handle):
    return b"garbage"


def _flip(self, payload, handle):
    answer = bytearray(handle(self, payload))
    answer[-3] ^= 4
    return bytes(answer)


def _stale(self, payload, handle):
    return replace(Message.unpack(handle(self, payload)), round=99).pack()


def _greedy(self, payload, handle):
    return replace(Message.unpack(handle(self, payload)), examples=10**6).pack()


@pytest.mark.parametrize(
    "change, reason",
    [
        (_raise, "RuntimeError: out of memory"),
        (_garbage, "message"),
        (_flip, "checksum|CRC"),
        (_stale, "for round 99"),
        (_greedy, "claims 1000000 examples"),
    ],
)
def test_a_bad_client_costs_its_own_update_only(monkeypatch, change, reason):
    _with_client(monkeypatch, change)
    result = fed.run(_config("fed.against=none", "fed.fraction=1.0"))
    for record in result.records:
        errors = {c.client: c.error for c in record.clients}
        assert errors.pop(1)
        assert set(errors.values()) == {None}
    assert re.search(reason, next(c.error for c in result.records[0].clients if c.client == 1))


def test_the_aggregate_equals_the_honest_clients_alone(monkeypatch):
    _with_client(monkeypatch, _garbage)
    with_garbage = fed.run(_config("fed.against=none", "fed.fraction=1.0", "fed.rounds=2"))
    _with_client(monkeypatch, _raise)
    without = fed.run(_config("fed.against=none", "fed.fraction=1.0", "fed.rounds=2"))
    assert all(torch.equal(with_garbage.params[k], without.params[k]) for k in without.params)


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("size", [1e37, 1e30, 2e6])
def test_an_absurd_update_costs_its_own_update_only_in_every_round(monkeypatch, size, values):
    def huge(self, payload, handle):
        message = Message.unpack(handle(self, payload))
        at = self.workshop.locate(self.held.masks)
        delta = {name: torch.full(shape, size) for name, shape in at.schema.shapes.items()}
        frame = codec.encode(delta, masks=at.inside, schema=at.schema, values=values)
        return replace(message, frames=(frame, *message.frames[1:])).pack()

    _with_client(monkeypatch, huge)
    result = fed.run(_config("fed.against=none", "fed.fraction=1.0"))
    assert {r.phase for r in result.records} == {"exploration", "training"}
    for record in result.records:
        errors = {c.client: c.error for c in record.clients}
        assert re.fullmatch(r"the update moves '[\w.]+' by more than 1e\+06", errors.pop(1))
        assert set(errors.values()) == {None}


def test_below_the_quorum_the_round_fails_in_words(monkeypatch):
    monkeypatch.setattr(Client, "handle", lambda self, payload: b"")
    with pytest.raises(fed.RoundError, match="0 of 4 updates usable, wanted at least 50%"):
        fed.run(_config())


def test_a_client_that_lost_its_base_is_sent_everything(monkeypatch):
    def forget(self, payload, handle):
        if Message.unpack(payload).round >= 2:
            self.held = None if Message.unpack(payload).base != bytes(16) else self.held
        return handle(self, payload)

    _with_client(monkeypatch, forget)
    result = fed.run(_config("fed.against=none", "fed.fraction=1.0"))
    monkeypatch.undo()
    plain = fed.run(_config("fed.against=none", "fed.fraction=1.0"))
    assert all(c.error is None for r in result.records for c in r.clients)
    assert result.records[2].bytes_down > plain.records[2].bytes_down
    assert all(torch.equal(result.params[k], plain.params[k]) for k in plain.params)


def test_open_measurements_see_the_payloads():
    with meter.measure() as cost:
        result = fed.run(_config("fed.against=none", "fed.rounds=1"))
    assert (cost.bytes_up, cost.bytes_down) == (result.cost.bytes_up, result.cost.bytes_down)


def test_curvature_exploration_is_charged():
    plain = fed.run(_config("fed.against=none", "fed.rounds=2"))
    curved = fed.run(_config("fed.against=none", "fed.rounds=2", "explore.signal=curvature"))
    assert curved.records[0].bytes_up > 1.2 * plain.records[0].bytes_up
    assert curved.records[0].flops > plain.records[0].flops


def test_a_schedule_walks_down_to_the_density():
    result = fed.run(_config("fed.against=none", "fed.rounds=8", "prune.until=6", "prune.every=2", "prune.density=0.1"))
    densities = [r.density for r in result.records]
    assert 0.1 < densities[0] < 1
    assert all(a >= b - 1e-9 for a, b in zip(densities, densities[1:]))
    assert len(set(densities)) >= 4
    assert densities[-1] == pytest.approx(0.1, rel=0.03)
    channels = [r.channels for r in result.records]
    assert 0.5 < channels[0] < 1
    assert channels[-1] < channels[2] < channels[0]


def test_a_cut_weight_returns_when_it_is_worth_more_than_a_kept_one():
    config = _config("prune.channels=1", "prune.density=0.5", "prune.until=4", "prune.every=1", "explore.agreement=1")
    strategy = METHODS["autoflip"](config, torch.nn.Linear(4, 2))
    ones = {"weight": torch.ones(2, 4), "bias": torch.ones(2)}
    mask = MaskSet({"weight": torch.tensor([[True, True, False, False]] * 2)})
    params = {"weight": torch.tensor([[1e-3, 5.0, 0, 0]] * 2), "bias": torch.ones(2)}
    before = {"weight": torch.tensor([[4.0, 5.0, 3.0, 0.1]] * 2), "bias": torch.ones(2)}  # when last held
    state = ServerState(params, mask, 3, guidance=Guidance(ones, ones, before))
    sums = Sums({k: torch.zeros_like(v) for k, v in params.items()})
    sums.add({"weight": mask["weight"].float(), "bias": torch.ones(2)}, 1.0)
    guidance = strategy.guidance(state, params, sums)
    kept = strategy.masks(ServerState(params, mask, 3, guidance=guidance))
    assert kept["weight"].tolist() == [[False, True, True, False]] * 2


def test_batch_norm_travels_and_trains():
    result = fed.run(
        _config("fed.against=none", "model.name=tests.test_fed:NormNet", "fed.rounds=3", "prune.density=0.5")
    )
    assert "norm.running_var" in result.params
    assert not torch.equal(result.params["norm.running_mean"], torch.zeros_like(result.params["norm.running_mean"]))


class NormNet(torch.nn.Module):
    """A user's own model with BatchNorm."""

    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(input_shape[0], 16, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(16)
        self.fc = torch.nn.Linear(16 * 64, num_classes)

    def forward(self, x):
        return self.fc(torch.flatten(torch.relu(self.norm(self.conv(x))), 1))


class Tied(torch.nn.Module):
    """Two layers that share their weights."""

    def __init__(self, num_classes):
        super().__init__()
        self.one, self.two = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.two.weight = self.one.weight
        self.head = torch.nn.Linear(64, num_classes)

    def forward(self, x):
        return self.head(self.two(self.one(x.flatten(1))))


def narrow():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 7))


def broken():
    raise RuntimeError("no weights today")


@pytest.mark.parametrize(
    "model, message",
    [
        ("tests.test_fed:Tied", "ties parameters"),
        ("tests.test_fed:narrow", r"shape \(2, 7\), wanted \(2, 10\)"),
        ("tests.test_fed:broken", "making .* failed: RuntimeError: no weights today"),
        ("char-lstm", "char-lstm"),
    ],
)
def test_a_model_that_cannot_train_is_refused_before_any_client_is_asked(model, message):
    with pytest.raises(ValueError, match=message):
        fed.run(_config(f"model.name={model}"))


def test_codec_is_asked_for_nothing_it_does_not_know():
    job = Job(_config())
    assert set(codec.Schema.of(job.states["fedavg"].params).shapes) == set(job.states["fedavg"].params)
