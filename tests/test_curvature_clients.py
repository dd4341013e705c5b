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


def test_a_pass_holds_no_more_samples_than_asked():
    model, batches = clients(cnn)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    curvature.client_diagonals(model, F.cross_entropy, batches, samples=5)
    assert seen == [4, 5]


def test_mixed_samples_are_looked_at_client_by_client():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    batches = [(torch.randn(n, 3).double(), torch.arange(n) % 3) for n in (4, 6)]
    got = curvature.client_diagonals(model, F.cross_entropy, batches, method="ggn-exact")
    for one, batch in zip(got, batches):
        want = curvature.hessian_diagonal(model, F.cross_entropy, batch, method="ggn-exact")
        torch.testing.assert_close(flat(one), flat(want))


def test_wrong_arguments_are_named():
    model, batches = clients(cnn)
    with pytest.raises(ValueError, match="wanted 'ggn-mc' or 'ggn-exact'"):
        curvature.client_diagonals(model, F.cross_entropy, batches, method="hutchinson")
    with pytest.raises(ValueError, match="pair of tensors"):
        curvature.client_diagonals(model, F.cross_entropy, [batches[0][0]])
    assert curvature.client_diagonals(model, F.cross_entropy, []) == []
