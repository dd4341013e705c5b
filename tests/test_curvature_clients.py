"""Many clients in one pass: each gets what it would get alone."""

import pytest
import torch
import torch.nn.functional as F
from curvature_nets import EPS, LOSSES, cnn, flat, make, pooled, residual, sequence, wide
from torch import nn

from autoflip import curvature


def clients(build, sizes=(3, 1, 5)):
    model, (x, y) = make(build, samples=sum(sizes))
    return model, list(zip(x.split(sizes), y.split(sizes)))


def lstm():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.cell, self.head = nn.Linear(3, 2), nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.cell(self.embed(x))[0][:, -1])

    return Last(), (6, 3)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "weighted"])
@pytest.mark.parametrize("build", [cnn, pooled, residual, sequence, lstm])
def test_each_client_gets_its_own_exact_diagonal(build, loss):
    model, batches = clients(build)
    got = curvature.client_diagonals(model, LOSSES[loss], batches, method="ggn-exact")
    assert len(got) == len(batches)
    for one, batch in zip(got, batches):
        want = curvature.hessian_diagonal(model, LOSSES[loss], batch, method="ggn-exact")
        assert (one.method, one.matrix) == ("ggn-exact", want.matrix)
        torch.testing.assert_close(flat(one), flat(want), rtol=0, atol=64 * EPS * flat(want).max().item())


def test_draws_are_unbiased_for_each_client():
    model, batches = clients(wide)
    draws = [curvature.client_diagonals(model, F.cross_entropy, batches, 4, seed) for seed in range(60)]
    for k, batch in enumerate(batches):
        want = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")
        totals = torch.stack([flat(run[k]).sum() for run in draws])
        assert abs(totals.mean() - flat(want).sum()) < 4 * totals.std() / len(draws) ** 0.5
        assert totals.std() < 0.2 * totals.mean()


@pytest.mark.parametrize("per", ["parameter", "channel"])
@pytest.mark.parametrize("build", [cnn, residual, lstm])
def test_each_client_gets_its_own_exact_trace(build, per):
    model, batches = clients(build)
    got = curvature.client_traces(model, F.cross_entropy, batches, per=per, method="ggn-exact")
    assert len(got) == len(batches)
    for one, batch in zip(got, batches):
        want = curvature.hessian_trace(model, F.cross_entropy, batch, per=per, method="ggn-exact")
        assert (one.method, one.matrix, one.stderr, one.repeats) == (want.method, want.matrix, 0.0, 1)
        assert one.total == pytest.approx(want.total, rel=64 * EPS)
        assert one.by_parameter == pytest.approx(want.by_parameter, rel=1e-12, abs=64 * EPS * want.total)
        assert (one.by_channel is None) == (per == "parameter")
        for name, sums in (one.by_channel or {}).items():
            torch.testing.assert_close(sums, want.by_channel[name], rtol=1e-12, atol=64 * EPS * want.total)


def test_drawn_traces_err_as_they_say_for_each_client():
    model, batches = clients(wide)
    runs = [curvature.client_traces(model, F.cross_entropy, batches, 16, seed) for seed in range(60)]
    for k, batch in enumerate(batches):
        want = curvature.hessian_trace(model, F.cross_entropy, batch, method="ggn-exact").total
        totals = torch.tensor([run[k].total for run in runs], dtype=torch.float64)
        assert abs(totals.mean() - want) < 4 * totals.std() / len(runs) ** 0.5
        said = torch.tensor([run[k].stderr for run in runs]).mean()
        assert 0.7 < said / totals.std() < 1.4  # 60 runs know a spread to a tenth; four blocks know theirs to a third
        assert {run[k].repeats for run in runs} == {4}
        inside = sum(low <= want <= high for low, high in (run[k].interval for run in runs))
        assert inside >= 51  # 95 % of 60, less three and a half standard deviations


def test_a_pass_holds_no_more_samples_than_asked():
    model, batches = clients(cnn)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    curvature.client_diagonals(model, F.cross_entropy, batches, samples=5)
    assert [n for n in seen if n > 2] == [4, 5]  # whether samples mix is asked with two


def test_mixed_samples_are_looked_at_client_by_client():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    batches = [(torch.randn(n, 3).double(), torch.arange(n) % 3) for n in (4, 6)]
    got = curvature.client_diagonals(model, F.cross_entropy, batches, method="ggn-exact")
    traces = curvature.client_traces(model, F.cross_entropy, batches, method="ggn-exact")
    for one, trace, batch in zip(got, traces, batches):
        want = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")
        torch.testing.assert_close(flat(one), flat(want))
        assert trace.total == pytest.approx(float(flat(want).sum()))


def test_wrong_arguments_are_named():
    model, batches = clients(cnn)
    with pytest.raises(ValueError, match="wanted 'ggn-mc' or 'ggn-exact'"):
        curvature.client_diagonals(model, F.cross_entropy, batches, method="hutchinson")
    with pytest.raises(ValueError, match="pair of tensors"):
        curvature.client_diagonals(model, F.cross_entropy, [batches[0][0]])
    with pytest.raises(ValueError, match="client_traces: method='xtrace'"):
        curvature.client_traces(model, F.cross_entropy, batches, method="xtrace")
    with pytest.raises(ValueError, match="client_traces: per='layer'"):
        curvature.client_traces(model, F.cross_entropy, batches, per="layer")
    assert curvature.client_diagonals(model, F.cross_entropy, []) == []
    assert curvature.client_traces(model, F.cross_entropy, []) == []
