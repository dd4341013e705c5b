"""The curvature bench: its truth stands on the linear piece of the float32 run that it judges."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import hessian_gates
import hessian_truth

from autoflip import curvature


def on_a_kink():
    """Unit 0 reads ``2**24 + 1 - 2**24``: nothing is left of it in float32, 1 in float64."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0**24, 1.0], [1.0, 0.5]]))
        model[0].bias.zero_()
        model[1].weight.copy_(torch.eye(2))
        model[1].bias.copy_(torch.tensor([-(2.0**24), 0.5]))
        model[3].weight.copy_(torch.tensor([[1.0, 0.5], [-1.0, 0.25], [0.5, -1.0]]))
        model[3].bias.zero_()
    return model, (torch.ones(1, 2), torch.tensor([0]))


def test_truth_is_of_the_piece_that_float32_is_on():
    model, batch = on_a_kink()
    got = curvature.hessian_diagonal(model, nn.functional.cross_entropy, batch, method="ggn-exact")
    exact, matrix = hessian_truth.truth(model, batch)
    assert matrix == got.matrix == "hessian"
    assert hessian_truth.errors(got, exact)[0] < 1e-6
    told = hessian_truth.kinks(model, batch, exact)
    assert told["gates_that_float64_sets_otherwise"] == 1
    assert told["its_diagonal_is_off_by"] > 0.1
    assert told["plain_gradient_error_against_it"] > 0.1


@pytest.mark.parametrize("pool", [False, True])
def test_gates_taken_over_are_the_network_itself_in_one_precision(pool):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else []), nn.Flatten(), nn.LazyLinear(4)]
    model, x = nn.Sequential(*layers), torch.randn(5, 1, 8, 8)
    want = model(x)
    gates = hessian_gates.gates_of(model, x)
    assert len(gates) == 1 + pool
    with hessian_gates.following(gates):
        assert torch.equal(model(x), want)
    gates[0] = torch.zeros_like(gates[0])  # all closed
    with hessian_gates.following(gates):
        assert torch.equal(model(x), model[-1].bias.expand(5, 4))
