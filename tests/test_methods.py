"""Every method through the same loop: what it evaluates, what it keeps, what its server does with the updates."""

import copy
import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

from autoflip import MaskSet, explore, fed, report
from autoflip.fed.client import Client
from autoflip.fed.job import Job
from autoflip.fed.sections import METHOD_NAMES
from autoflip.fed.state import ServerState
from autoflip.fed.strategies import METHODS
from autoflip.fed.transport import InProcess
from autoflip.report.runs import curve_of

SMALL = ["fed.rounds=5", "fed.clients=4", "fed.fraction=0.5", "train.epochs=1", "data.samples_per_client=40"]


def _config(*overrides):
    return fed.Config.load(overrides=[*SMALL, *overrides])


def test_rounds_between_evaluations_cost_the_same_and_have_no_accuracy(tmp_path):
    every = fed.run(_config("fed.against=none"))
    some = fed.run(_config("fed.against=none", "fed.eval_every=3"), out=tmp_path / "run")
    assert [r.accuracy is None for r in some.records] == [True, True, False, True, False]  # after 3, and the last
    assert some.records[2].accuracy == every.records[2].accuracy
    assert some.accuracy == every.accuracy
    for a, b in zip(some.records, every.records):
        assert (a.flops, a.bytes_up, a.bytes_down) == (b.flops, b.bytes_up, b.bytes_down)
    assert some.summary["method"]["flops"] == every.summary["method"]["flops"]
    assert fed.resume(tmp_path / "run").summary == some.summary
    curve = curve_of("autoflip", [json.loads(json.dumps(r.as_dict())) for r in some.records])
    assert curve.rounds == [2, 4]
    assert curve.flops == [sum(r.flops for r in some.records[: n + 1]) for n in (2, 4)]
    assert report.write(tmp_path / "run").exists()


def test_a_part_of_the_test_set_is_the_same_for_every_seed_and_changes_no_cost():
    whole = Job(_config()).test()
    parts = [Job(_config("data.test_examples=50", f"fed.seed={seed}")).test() for seed in (0, 1)]
    assert len(parts[0][1]) == 50
    assert all(torch.equal(a, b) for a, b in zip(*parts))
    rows = {x.numpy().tobytes() for x in whole[0]}
    assert all(x.numpy().tobytes() in rows for x in parts[0][0])
    assert len(Job(_config("data.test_examples=1000000")).test()[1]) == len(whole[1])
    some, every = (fed.run(_config("fed.against=none", *more)) for more in (["data.test_examples=50"], []))
    assert [(r.flops, r.bytes_up) for r in some.records] == [(r.flops, r.bytes_up) for r in every.records]
    assert some.accuracy * 50 == round(some.accuracy * 50)


def test_the_target_is_looked_for_in_evaluated_rounds_only():
    from autoflip.fed.ledger import summarise

    ours = list(fed.run(_config("fed.against=none")).records)
    at = [0.1, 0.9, None, 0.5, 0.6]
    seen = [dataclasses.replace(r, accuracy=a) for r, a in zip(ours, at)]
    assert summarise(seen, "autoflip", None, {})["method"]["to_target"]["round"] == 1
    seen[1] = dataclasses.replace(seen[1], accuracy=None)
    assert summarise(seen, "autoflip", None, {})["method"]["to_target"]["round"] == 4


def _same(a, b):
    assert [(r.accuracy, r.flops, r.bytes_up, r.bytes_down) for r in a.records] == [
        (r.accuracy, r.flops, r.bytes_up, r.bytes_down) for r in b.records
    ]
    assert all(torch.equal(a.params[k], b.params[k]) for k in a.params)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_stopped_and_resumed_ends_in_the_same_bits(method, tmp_path):
    config = _config(f"fed.method={method}", "fed.against=none", "prune.every=2", "fed.rounds=6")
    whole = fed.run(config)
    seen = []

    def stop(record):
        seen.append(record)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fed.run(config, out=tmp_path / "run", sinks=[stop])
    _same(fed.resume(tmp_path / "run"), whole)
    assert {r.method for r in whole.records} == {method}
    assert (whole.records[0].phase == "exploration") == (method in {"autoflip", "autoflip-paper", "prunefl", "ssfl"})


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_bad_client_costs_its_own_update_only(method, monkeypatch):
    handle = Client.handle

    def bad(self, payload):
        answer = bytearray(handle(self, payload))
        if self.id == 1:
            answer[-3] ^= 4
        return bytes(answer)

    monkeypatch.setattr(Client, "handle", bad)
    result = fed.run(_config(f"fed.method={method}", "fed.against=none", "fed.fraction=1.0", "fed.rounds=4"))
    for record in result.records:
        errors = {c.client: c.error for c in record.clients}
        assert 1 not in errors or errors.pop(1)
        assert set(errors.values()) <= {None}


def test_a_probe_beyond_reason_is_refused(monkeypatch):

    monkeypatch.setattr(
        explore, "absolute_gradient", lambda model, x, y, loss, seed: {"fc2.bias": torch.full((10,), 1e20)}
    )
    with pytest.raises(fed.RoundError, match="moves 'fc2.bias' by more than"):
        fed.run(_config("fed.method=ssfl", "fed.against=none"))


@pytest.mark.parametrize("method", ["random", "magnitude", "prunefl", "ssfl"])
def test_pruning_rivals_reach_the_density_and_keep_pruned_weights_zero(method):
    result = fed.run(_config(f"fed.method={method}", "fed.against=none", "prune.rival_density=0.2", "fed.rounds=6"))
    assert result.records[-1].density == pytest.approx(0.2, rel=0.02)
    for name, mask in result.masks.items():
        assert float(result.params[name][~mask].abs().sum()) == 0


def test_random_masks_follow_erdos_renyi_and_come_before_any_round():
    config = _config("fed.method=random", "fed.against=none", "prune.rival_density=0.1")
    state = Job(config).states["random"]
    size = {n: p.numel() for n, p in state.params.items() if n in state.masks}
    shape = {n: tuple(state.params[n].shape) for n in size}
    kept = {n: float(state.masks[n].float().mean()) for n in size}
    want = {n: sum(shape[n]) / size[n] for n in size}
    rest = [n for n in size if kept[n] < 1]
    assert len(rest) >= 2
    for a, b in zip(rest, rest[1:]):
        assert kept[a] / kept[b] == pytest.approx(want[a] / want[b], rel=0.02)  # whole entries
    assert sum(kept[n] * size[n] for n in size) / sum(size.values()) == pytest.approx(0.1, rel=1e-3)


def test_ssfl_measures_first_and_moves_nothing():
    config = _config(
        "fed.method=ssfl",
        "fed.against=none",
        "fed.rounds=1",
        "prune.rival_density=0.3",
        "wire.values=fp32",
        "wire.downlink=bf16",
    )
    job = Job(config)
    result = fed.run(config)
    start = job.states["ssfl"].params
    server = job.server("ssfl", InProcess(job.clients("ssfl")))
    saliency = {n: torch.zeros_like(start[n]) for n in result.masks}
    for client in server.transport.clients.values():
        model = copy.deepcopy(job.blank)
        model.load_state_dict({n: p.bfloat16().float() for n, p in start.items()})  # as it crossed the wire
        loss = F.cross_entropy(model(client.inputs[:128]), client.targets[:128])
        for name, g in zip(start, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            if name in saliency:
                saliency[name] += len(client.targets) * g.abs() * start[name].abs()
    flat = torch.cat([s.flatten() for s in saliency.values()])
    bar = flat.kthvalue(int(0.7 * len(flat))).values
    for name, mask in result.masks.items():
        assert torch.equal(result.params[name], torch.where(mask, start[name], 0.0))
        # ties in the last bits of float32 sums may fall either way
        assert (mask != (saliency[name] > bar)).float().mean() < 1e-3


def test_prunefl_starts_from_one_client_and_exchanges_weights():
    result = fed.run(
        _config("fed.method=prunefl", "fed.against=none", "prune.every=2", "fed.rounds=8", "prune.rival_density=0.1")
    )
    assert len(result.records[0].clients) == 1
    assert [r.density for r in result.records] == pytest.approx([0.1] * 8, rel=0.01)
    before = fed.run(_config("fed.method=prunefl", "fed.against=none", "fed.rounds=1", "prune.rival_density=0.1"))
    changed = sum(int((before.masks[n] != result.masks[n]).sum()) for n in result.masks)
    assert 0 < changed < 2 * 0.45 * result.masks.kept
    probing, plain = result.records[2], result.records[3]
    assert probing.bytes_up > 1.5 * plain.bytes_up  # gradients of every weight travel


def test_server_momentum_and_adam_are_the_formulas():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, generator=g)
    means = [torch.randn(3, 4, generator=g) for _ in range(4)]
    for kind in ("momentum", "adam"):
        config = _config(f"server.optimizer={kind}", "server.momentum=0.8", "server.adam_eps=1e-2")
        strategy = METHODS["autoflip"](config, torch.nn.Linear(4, 3))
        state = ServerState({"weight": w, "bias": torch.zeros(3), "running": torch.ones(2)})
        want, first, second = w.double(), torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
        for t, mean in enumerate(means, 1):
            params, memory = strategy.step(state, {"weight": mean, "bias": torch.zeros(3), "running": torch.ones(2)})
            state = dataclasses.replace(state, params=params, memory=memory)
            if kind == "momentum":
                first = 0.8 * first + mean.double()
                want = want + config.server.momentum_lr * first
            else:
                first, second = 0.9 * first + 0.1 * mean.double(), 0.99 * second + 0.01 * mean.double() ** 2
                root = (second / (1 - 0.99**t)).sqrt() + 1e-2
                want = want + config.server.adam_lr * first / (1 - 0.9**t) / root
        # four float32 steps
        torch.testing.assert_close(state.params["weight"].double(), want, rtol=1e-5, atol=1e-6)
        assert state.params["running"].tolist() == [5.0, 5.0]  # buffers take the plain mean


def test_server_momentum_leaves_pruned_weights_alone():
    config = _config("server.optimizer=momentum")
    strategy = METHODS["autoflip"](config, torch.nn.Linear(2, 1))
    mean = {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}
    state = ServerState({"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    params, memory = strategy.step(state, mean)
    masks = MaskSet({"weight": torch.tensor([[True, False]])})
    pruned = dataclasses.replace(state, params=strategy.settle(params, masks), memory=memory, masks=masks)
    params, memory = strategy.step(pruned, {"weight": torch.tensor([[1.0, 0.0]]), "bias": torch.zeros(1)})
    assert params["weight"][0, 1] == 0
    assert memory["momentum_buffer/weight"][0, 1] == 0


def test_the_model_handed_out_is_the_running_mean_since_the_last_pruning():
    job = Job(_config("server.average=0.4", "prune.until=2", "prune.every=1", "fed.rounds=8"))
    server, state, seen = job.server("autoflip", InProcess(job.clients("autoflip"))), job.states["autoflip"], []
    for _ in range(8):
        before = state.masks
        state, record = server.run_round(state)
        if state.masks is not before:
            seen = []
        seen.append(state.params)
        for name, value in state.served.items():
            want = seen[0][name].double()
            for t, params in enumerate(seen[1:], start=2):
                share = {2: 5 / 6, 3: 5 / 7, 4: 0.625}.get(t, 0.6)  # 5 / (t + 4), from t = 5 on 1 - 0.4
                want = want + share * (params[name].double() - want)
            torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-7)  # seven float32 steps
        assert record.accuracy == server.workshop.evaluate(state.served, state.masks, *server.test)[0]
    assert len(seen) == 7  # past the change to a fixed decay
    assert METHODS["fedavg"](job.config, job.blank).average == 0
    result = fed.run(job.config)
    assert all(torch.equal(result.params[name], value) for name, value in state.served.items())
    assert result.accuracy == record.accuracy


def test_the_proximal_term_pulls_local_steps_back():
    from autoflip.explore import local_steps

    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
    twin = copy.deepcopy(model)
    local_steps(model, x, y, F.cross_entropy, epochs=3, batch_size=8, lr=0.5, proximal=0.7)
    w = [p.detach().clone().requires_grad_() for p in twin.parameters()]
    for _ in range(3):
        loss = F.cross_entropy(F.linear(x, *w), y)
        loss = loss + 0.35 * sum(((a - b.detach()) ** 2).sum() for a, b in zip(w, twin.parameters()))
        w = [(a - 0.5 * g).detach().requires_grad_() for a, g in zip(w, torch.autograd.grad(loss, w))]
    for a, b in zip(model.parameters(), w):
        # float32; the order of examples differs
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    far = fed.run(_config("fed.method=fedprox", "fed.against=none", "train.proximal=0", "fed.rounds=1"))
    near = fed.run(_config("fed.method=fedprox", "fed.against=none", "train.proximal=1", "fed.rounds=1"))
    start = Job(far.config).states["fedprox"].params
    moved = [sum(float((r.params[n] - start[n]).norm()) for n in start) for r in (near, far)]
    assert moved[0] < 0.95 * moved[1]


def test_batch_norm_may_be_replaced_by_group_norm():
    net = ["model.name=tests.test_fed:NormNet", "fed.against=none", "fed.rounds=3", "prune.channels=0.5"]
    result = fed.run(_config(*net, "model.norm=group"))
    assert not any("running" in name for name in result.params)
    assert isinstance(result.model().norm, torch.nn.GroupNorm)
    assert result.records[-1].channels < 1
    kept = fed.run(_config(*net))
    assert isinstance(kept.model().norm, torch.nn.BatchNorm2d)
    there = kept.masks["norm.weight"]  # a removed channel has no variance
    assert float(kept.params["norm.running_var"][there].min()) > 0


def test_group_norm_keeps_affine_weights_and_divides_any_width():
    from autoflip.fed.norms import to_group_norm

    model = torch.nn.Sequential(torch.nn.BatchNorm2d(12), torch.nn.BatchNorm2d(7, affine=False))
    weight = model[0].weight
    to_group_norm(model)
    assert (model[0].num_groups, model[1].num_groups) == (4, 1)
    assert model[0].weight is weight
    assert model[1].weight is None
    with pytest.raises(ValueError, match="run the model once"):
        to_group_norm(torch.nn.Sequential(torch.nn.LazyBatchNorm2d()))
