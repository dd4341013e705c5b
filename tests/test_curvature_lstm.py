"""LSTM layers in curvature: their steps forwards and backwards, many factors at once, and who hands what on."""

import instruction_sets
import pytest
import torch
import torch.nn.functional as F
from curvature_nets import flat
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoflip import curvature, ops
from autoflip.curvature.gauss_newton import GaussNewton
from autoflip.curvature.lstm import Recurrent
from autoflip.curvature.problem import Problem
from autoflip.ops import backend

EPS = torch.finfo(torch.float32).eps
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 5, 7, 3), (1, 7, 20, 64, 70), (5, 4, 33, 9, 130), (4, 3, 40, 24, 40)]


def walk(Q, T, N, H, K, dtype=torch.float32):
    """An LSTM's products of x, its weights, and gradients at its outputs and last states."""
    g = torch.Generator().manual_seed(0)
    sizes = {"x": (T, N, K), "w_ih": (4 * H, K), "w_hh": (4 * H, H), "bias": (4 * H,), "h": (N, H), "c": (N, H)}
    sizes |= {"dy": (Q, T, N, H), "dh": (Q, N, H), "dc": (Q, N, H)}
    return {
        name: torch.randn(size, generator=g).div(H**0.5 if name[0] == "w" else 1).to(dtype)
        for name, size in sizes.items()
    }


def ours(v, **options):
    """Forwards and backwards by the ops."""
    gates, cells, states = ops.lstm_states(v["x"], v["w_ih"], v["w_hh"], v["bias"], v["h"], v["c"])
    back = ops.lstm_pull_back(
        v["dy"], v["w_hh"], gates, cells, dh=v["dh"], dc=v["dc"], input_weight=v["w_ih"], **options
    )
    return cells, states, back


def torch_itself(v):
    """The same by nn.LSTM and autograd, in float64."""
    v = {name: t.double() for name, t in v.items()}
    cell = nn.LSTM(v["x"].shape[2], v["h"].shape[1]).double()
    with torch.no_grad():
        cell.weight_ih_l0.copy_(v["w_ih"])
        cell.weight_hh_l0.copy_(v["w_hh"])
        cell.bias_ih_l0.copy_(v["bias"])
        cell.bias_hh_l0.zero_()
    x, h, c = (v[name].requires_grad_() for name in ("x", "h", "c"))
    y, last = cell(x, (h.unsqueeze(0), c.unsqueeze(0)))
    outputs = y, last[0][0], last[1][0]
    got = [
        torch.autograd.grad(outputs, (x, h, c, cell.bias_hh_l0), one, retain_graph=True)
        for one in zip(v["dy"], v["dh"], v["dc"])
    ]
    return y, last[1][0], [torch.stack(some) for some in zip(*got)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_equal_torchs_own_layer(shape, dtype):
    v = walk(*shape, dtype)
    cells, states, (d, dx, dh, dc) = ours(v)
    y, last, (want_x, want_h, want_c, want_bias) = torch_itself(v)
    eps = torch.finfo(dtype).eps
    found = {"y": (states[1:], y), "c": (cells[-1], last), "dx": (torch.stack(dx), want_x), "dh": (dh, want_h)}
    found |= {"dc": (dc, want_c), "bias": (torch.stack(d).sum((1, 2)), want_bias)}
    assert torch.equal(states[0], v["h"])
    assert torch.equal(cells[0], v["c"])
    for name, (got, want) in found.items():
        # sums of up to 4 H and T N terms, rounded at each of T steps (largest seen: 6 eps)
        assert (got.double() - want).abs().max() <= 32 * eps * want.abs().max(), name


COARSE = (
    "test_coarse_products_round_to_bfloat16_and_no_further",
    "test_positions_where_gradients_have_faded_are_left_out",
    "test_results_do_not_depend_on_threads",
)


@pytest.mark.parametrize("isa", instruction_sets.LEVELS)
def test_on_each_instruction_set(isa):
    instruction_sets.rerun(__file__, isa, "test_steps_equal_torchs_own_layer", COARSE[0])


def tiles():
    """Whether AMX serves here."""
    module, _ = backend.extension("_C")
    return module is not None and module.multiplies_tiles()


@pytest.mark.skipif(not tiles(), reason="no AMX, or AUTOFLIP_CPU rules it out: the other tests run without it")
def test_without_amx():
    instruction_sets.rerun(__file__, "avx512", *COARSE)


@pytest.mark.skipif(not tiles(), reason="no AMX, or AUTOFLIP_CPU rules it out")
def test_amx_and_torchs_products_take_turns():
    """torch's own products configure the thread's tiles once for many calls."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(70, 70, generator=g).bfloat16() for _ in range(2))
    v, want = walk(2, 3, 5, 7, 4), a @ b
    first = ours(v, coarse=True)[2].d
    for _ in range(3):
        assert torch.equal(a @ b, want)
        assert all(torch.equal(*pair) for pair in zip(ours(v, coarse=True)[2].d, first))


@pytest.mark.parametrize("shape", SHAPES)
def test_coarse_products_round_to_bfloat16_and_no_further(shape):
    v = walk(*shape)
    d, dx, _, _ = ours(v, coarse=True)[2]
    fine, fine_x, _, _ = ours(v)[2]
    half = torch.finfo(torch.bfloat16).eps / 2
    for got, want in zip([*d, *dx], [*fine, *fine_x]):
        # each entry of d is rounded once, and passes on through up to 7 steps
        assert (got.float() - want).norm() <= 4 * half * want.norm()
    rounded = d[0].dtype == torch.bfloat16
    _, N, K = v["x"].shape
    inputs = [ours(v)[1][:-1].transpose(0, 1), v["x"].transpose(0, 1), torch.ones(1, 1, 1).expand(N, len(v["x"]), 1)]
    got = ops.sequence_squares([one.permute(1, 2, 0) for one in d], inputs)
    want = ops.sequence_squares([one.double().permute(1, 2, 0) for one in fine], [one.double() for one in inputs])
    assert (got.dtype, got.shape[1]) == (torch.float32, v["h"].shape[1] + K + 1)
    assert (got - want).norm() <= (8 * half if rounded else 64 * EPS) * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_where_gradients_have_faded_are_left_out(dtype):
    g = torch.Generator().manual_seed(0)
    fade = 0.5 ** torch.arange(60).flip(0).float()  # from the last position back
    fade[:20] = 0
    d, u = (torch.randn(3, 5, 70, 60, generator=g) * fade).to(dtype), torch.randn(5, 60, 9, generator=g)
    with FlopCounterMode(display=False) as counter:
        got = ops.sequence_squares(d, u)
    want = (d.double() @ u.double()).square().sum((0, 1))
    half = torch.finfo(torch.bfloat16).eps / 2
    # rounding u costs more than what is left out; measured: 3e-3 and 1e-7
    assert (got - want).norm() <= (4 * half if dtype == torch.bfloat16 else 64 * EPS) * want.norm()
    if backend.serve("sequence_squares", d.device) == "cpp":
        coarse = dtype == torch.bfloat16 and backend.extension("_C")[0].coarse()
        assert counter.get_total_flops() <= 2 * d.numel() * 9 * (16 / 60 if coarse else 40 / 60)
    d[0, 0, 0, 5] = torch.nan
    assert ops.sequence_squares(d, u)[0].isnan().all()


def test_results_do_not_depend_on_threads():
    v, before, results = walk(3, 4, 70, 40, 5), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            cells, states, back = ours(v, coarse=True)
            inputs = [states[:-1].transpose(0, 1)]
            squares = ops.sequence_squares([one.permute(1, 2, 0) for one in back.d], inputs)
            results.append([cells, states, *back.d, *back.dx, back.dh, back.dc, squares])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_ops_count_and_say_what_is_wrong():
    v = walk(2, 3, 5, 7, 4)
    with FlopCounterMode(display=False) as counter:
        cells, states, back = ours(v)
    assert counter.get_total_flops() == 2 * 3 * 5 * 28 * (4 + 7 + 2 * (7 + 4))
    plain = ours(v)
    assert torch.equal(cells, plain[0])
    assert torch.equal(states, plain[1])
    assert all(torch.equal(a, b) for a, b in zip(back.d, plain[2].d))
    gates = torch.ones(3, 5, 28)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \(7, 28\).*wanted torch.float32 \(28, 7\)"):
        ops.lstm_states(v["x"], v["w_ih"], v["w_hh"].T, v["bias"], v["h"], v["c"])
    with pytest.raises(ValueError, match="time first"):
        ops.lstm_states(v["x"][0], v["w_ih"], v["w_hh"], v["bias"], v["h"], v["c"])
    with pytest.raises(ValueError, match="dy's factors is"):
        ops.lstm_pull_back(v["dy"][:, 1:], v["w_hh"], gates, cells)
    with pytest.raises(ValueError, match="cells is torch.float64"):
        ops.lstm_pull_back(v["dy"], v["w_hh"], gates, cells.double())


class Reader(nn.Module):
    """Reads characters; what the head sees is chosen."""

    def __init__(self, sees, dropout=0.0, bidirectional=False):
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.cell = nn.LSTM(3, 4, num_layers=2, batch_first=True, dropout=dropout, bidirectional=bidirectional)
        self.head, self.sees = nn.Linear(4 * (1 + bidirectional), 5), sees

    def forward(self, tokens):
        x = self.embed(tokens)
        y, (h, c) = self.cell(x)
        seen = {"last": y[:, -1], "state": h[-1], "cell": c[-1], "mean": y.mean(1)}
        return self.head(seen[self.sees] if self.sees in seen else y[:, -1] + x.sum((1, 2), keepdim=True)[:, :, 0])


def tokens():
    g = torch.Generator().manual_seed(1)
    return torch.randint(6, (7, 9), generator=g), torch.randint(5, (7,), generator=g)


# which of the two layers take gradients in at their output; h and c are stacked of both layers' last states
READERS = {
    "last": [True, True],
    "mean": [True, True],
    "state": [True, False],
    "cell": [False, False],
    "both": [False, False],  # a way around the layers
}


@pytest.mark.parametrize("method, draws", [("ggn-exact", 1), ("ggn-mc", 3)])
@pytest.mark.parametrize("sees", READERS)
def test_by_hand_or_by_autograd_is_the_same(monkeypatch, sees, method, draws):
    torch.manual_seed(0)
    model, batch = Reader(sees).double(), tokens()
    gn = GaussNewton.of(Problem.of(model, F.cross_entropy, batch), 0, 4)
    assert [layer.by_hand for layer in gn.layers if isinstance(layer, Recurrent)] == READERS[sees]
    assert not gn.rest

    def look():
        return flat(curvature.hessian_diagonal(model, F.cross_entropy, batch, draws, method=method))

    got = look()
    monkeypatch.setattr("autoflip.curvature.lstm.Recurrent.follow", lambda *_: None)
    torch.testing.assert_close(got, look(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"bidirectional": True}], ids=lambda o: next(iter(o)))
def test_what_is_not_handed_on_goes_through_autograd(monkeypatch, options):
    torch.manual_seed(0)
    model, batch = Reader("mean", **options).double(), tokens()

    def look():
        torch.manual_seed(1)  # dropout's
        return flat(curvature.hessian_diagonal(model, F.cross_entropy, batch, 3, method="ggn-mc"))

    got = look()
    monkeypatch.setattr("autoflip.curvature.lstm.Recurrent.follow", lambda *_: None)
    torch.testing.assert_close(got, look(), rtol=1e-10, atol=0)


def test_exact_stays_in_float32_and_draws_may_round():
    torch.manual_seed(0)
    model, batch, wide = Reader("last"), tokens(), Reader("last")
    model.head, wide.head = nn.Linear(4, 7), nn.Linear(4, 7)  # of five classes four draws are exact, and do not round
    wide.double().load_state_dict(model.state_dict())

    def apart(method):
        got, want = (
            flat(curvature.hessian_diagonal(m, F.cross_entropy, batch, 2, method=method)).double()
            for m in (model, wide)
        )
        return ((got - want).norm() / want.norm()).item()

    assert apart("ggn-exact") < 1e-5
    kernels = backend.extension("_C")[0] if backend.serve("lstm_pull_back", torch.device("cpu")) == "cpp" else None
    rounds = kernels is not None and kernels.coarse()
    # far below what draws err by themselves
    assert (1e-5 if rounds else 0) < apart("ggn-mc") < (2e-3 if rounds else 1e-5)
