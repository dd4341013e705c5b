"""Masked LSTM and GRU layers on kept weights alone, against torch's fused layers in float64."""

import copy

import instruction_sets
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoflip import nn as sparse
from autoflip import ops

KINDS = {"lstm": (sparse.MaskedLSTM, nn.LSTM), "gru": (sparse.MaskedGRU, nn.GRU)}
FORMS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "batch_first": True, "bias": False},
    {"bidirectional": True, "batch_first": True},
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair(kind, density, inputs=7, hidden=19, way="sparse", **form):
    """A masked layer, forced to one way, and torch's in float64 with the same kept weights."""
    ours, torchs = KINDS[kind]
    layer = ours(inputs, hidden, **form)
    layer.set_mask({n: torch.rand(p.shape) < density for n, p in layer.named_parameters()})
    layer._way = lambda *_: way
    want = torchs(inputs, hidden, **form).double()
    want.load_state_dict(layer.state_dict())
    return layer, want


def flat(result):
    y, last = result
    return [y, *(last if isinstance(last, tuple) else (last,))]


def states(kind, shape):
    first = tuple(torch.randn(shape, requires_grad=True) for _ in range(2 if kind == "lstm" else 1))
    return first if kind == "lstm" else first[0]


def compare(layer, want, x, hx):
    """Values, and the gradients of everything, of a loss that weighs every output differently."""
    wide_x = x.detach().double().requires_grad_()
    wide_hx = [h.detach().double().requires_grad_() for h in (hx if isinstance(hx, tuple) else (hx,))]
    got = flat(layer(x, hx))
    exact = flat(want(wide_x, tuple(wide_hx) if isinstance(hx, tuple) else wide_hx[0]))
    given = list(hx) if isinstance(hx, tuple) else [hx]
    factors = [torch.randn(t.shape) for t in got]
    loss = sum((f * t).sum() for f, t in zip(factors, got, strict=True))
    wide_loss = sum((f.double() * t).sum() for f, t in zip(factors, exact, strict=True))
    gradients = torch.autograd.grad(loss, [x, *given, *layer.parameters()])
    wide = list(torch.autograd.grad(wide_loss, [wide_x, *wide_hx, *want.parameters()]))
    for i, (name, _) in enumerate(layer.named_parameters(), start=1 + len(given)):
        if (mask := layer.masks().get(name)) is not None:
            assert not gradients[i][~mask].any()
            wide[i] = torch.where(mask, wide[i], 0)
    for a, b in zip([*got, *gradients], [*exact, *wide], strict=True):
        # float32 sums of up to 55 terms, handed on through up to 11 steps (largest seen: 6e-6 of terms of size 1 to 20)
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_equals_torchs_layer_in_float64(kind, form, density):
    layer, want = pair(kind, density, **form)
    x = torch.randn(11, 5, 7, requires_grad=True)
    directions = layer.num_layers * (2 if layer.bidirectional else 1)
    compare(layer, want, x, states(kind, (directions, 11 if layer.batch_first else 5, 19)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 16, 40, 150])
def test_every_number_of_rows(kind, rows):
    layer, want = pair(kind, 0.3, inputs=33, hidden=50)
    compare(layer, want, torch.randn(4, rows, 33, requires_grad=True), states(kind, (1, rows, 50)))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_batch_and_without_a_state(kind):
    layer, want = pair(kind, 0.5)
    x = torch.randn(6, 7)
    for a, b in zip(flat(layer(x)), flat(want(x.double())), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_saturate_and_nan_passes(kind):
    layer, want = pair(kind, 1.0, inputs=3, hidden=17)
    x = torch.tensor([0.0, 1e-3, -1e-3, 0.6, -0.63, 20, -20, 90, -90, 1e4, -1e4, 3e38, -3e38])[:, None, None]
    x = x.expand(-1, 1, 3)
    with torch.no_grad():
        for a, b in zip(flat(layer(x)), flat(want(x.double())), strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        y, _ = layer(torch.full((2, 1, 3), torch.nan))
    assert y.isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_derivative_in_float64(kind, reverse):
    gates, n, i, h = {"lstm": 4, "gru": 3}[kind], 2, 3, 3
    shapes = (
        [(3, n, i)] + [(n, h)] * (2 if kind == "lstm" else 1) + [(gates * h, i), (gates * h, h)] + [(gates * h,)] * 2
    )
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    pack = ops.RecurrentPack.of(kind.upper(), *(torch.rand(t.shape) < 0.6 for t in tensors[-4:-2]))

    def run(x, *rest):
        return ops.masked_recurrent(x, rest[:-4], rest[-4:], pack, reverse=reverse)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivative_of_the_fast_path(kind):
    layer, want = pair(kind, 0.5, hidden=5)
    x = torch.randn(3, 2, 7)

    def penalty(module, x):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(module(x)[0].pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), list(module.parameters()))

    for (name, _), a, b in zip(layer.named_parameters(), penalty(layer, x), penalty(want, x.double()), strict=True):
        exact = torch.where(layer.masks()[name], b, 0)
        torch.testing.assert_close(a.double(), exact, rtol=1e-4, atol=1e-5)  # float32, two passes over 3 steps


@pytest.mark.parametrize("kind", KINDS)
def test_a_default_dtype_changes_nothing(kind):
    layer, _ = pair(kind, 0.3)
    x = torch.randn(5, 4, 7)
    want = flat(layer(x))
    torch.set_default_dtype(torch.float64)
    try:
        got = flat(layer(x))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_results_may_be_written_before_the_gradient(kind):
    layer, _ = pair(kind, 0.5)
    x = torch.randn(4, 3, 7)
    results = []
    for write in (False, True):
        y, last = layer(x)
        loss = y.pow(2).sum() if not write else y.pow_(2).sum()
        if write:
            flat((y, last))[1].detach().zero_()
        results.append(torch.autograd.grad(loss, list(layer.parameters())))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_sees_the_kept_products(kind):
    layer, _ = pair(kind, 0.3, inputs=40, hidden=32)
    layer._packs = {}
    pack = layer._pack("_l0")
    # path "sparse" for the input's weight too: which way it takes is a trial's to say
    sparse_input = ops.Pack(pack.input.mask, path="sparse")
    layer._pack = lambda _: pack._replace(input=sparse_input, state=pack.step)
    x = torch.randn(5, 3, 40, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    # forward, dx and dw each; the first step has no state to hand a gradient back to, which is no parameter's
    steps = 3 * 2 * 5 * 3 * (pack.input.kept + pack.state.kept) - 2 * 3 * pack.state.kept
    assert counter.get_total_flops() == steps


def test_a_trial_chooses_once_and_draws_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path))
    monkeypatch.setenv("AUTOFLIP_TRIALS", "on")
    ops.trials.forget()
    layer = sparse.MaskedGRU(30, 40, 2, dropout=0.5, bidirectional=True)
    layer.set_mask({n: torch.rand(p.shape) < 0.2 for n, p in layer.named_parameters() if "weight" in n})
    state = torch.get_rng_state()
    ways = [layer._way(6, 20), layer._way(6, 20)]
    assert torch.equal(torch.get_rng_state(), state)
    (key,) = [k for k in ops.trials.known() if k.startswith("masked_gru")]
    assert "30x40 x4 steps 5 n17" in key  # what stands for 6 steps
    assert ways == [ops.trials.known()[key]] * 2
    assert all(p.grad is None for p in layer.parameters())
    monkeypatch.setenv("AUTOFLIP_TRIALS", "off")
    layer.set_mask({"weight_hh_l0": torch.ones(120, 40, dtype=torch.bool)})
    assert layer._way(6, 20) == "dense"


@pytest.mark.parametrize("kind", KINDS)
def test_new_masks_and_copies(kind):
    layer, _ = pair(kind, 0.5)
    x = torch.randn(4, 3, 7)
    before = layer(x)[0]
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x)[0], before)
    layer.weight_hh_l0_mask.zero_()  # written in place
    layer.set_mask({"weight_ih_l0": torch.zeros_like(layer.weight_ih_l0, dtype=torch.bool)})
    torch.testing.assert_close(layer(x)[0], layer(torch.zeros_like(x))[0])
    assert torch.equal(twin(x)[0], before)
    layer.set_mask(None)
    assert layer.density == 1


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers(kind):
    layer, want = pair(kind, 0.5, num_layers=2, dropout=0.5)
    x = torch.randn(4, 3, 7)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    torch.testing.assert_close(layer(x)[0].double(), want.eval()(x.double())[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_do_not_fit_get_torchs_error(kind):
    layer, _ = pair(kind, 0.5)
    with pytest.raises(RuntimeError, match="must have last dimension|must be equal to input_size|Expected 7, got 6"):
        layer(torch.randn(4, 3, 6))
    with pytest.raises(RuntimeError, match="hidden"):
        layer(torch.randn(4, 3, 7), states(kind, (1, 2, 19)))


@pytest.mark.parametrize("isa", instruction_sets.LEVELS)
def test_every_instruction_set(isa):
    names = (
        "test_every_number_of_rows",
        "test_gates_saturate_and_nan_passes",
        "test_without_a_batch_and_without_a_state",
    )
    instruction_sets.rerun(__file__, isa, *names)


def test_threads_change_nothing():
    layer, _ = pair("lstm", 0.3, inputs=64, hidden=64)
    x = torch.randn(3, 160, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            y, _ = layer(x)
            results.append([y, *torch.autograd.grad(y.sum(), list(layer.parameters()))])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))
