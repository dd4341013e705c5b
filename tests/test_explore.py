"""Exploration: the sums, the signals, and a scout on a model whose answer is known."""

import pytest
import torch
from torch.nn import functional as F

from autoflip import explore


def _scouts(count=4, n=6):
    g = torch.Generator().manual_seed(0)
    start = {"w": torch.randn(n, generator=g)}
    return [
        explore.Scout(start, {"w": torch.randn(n, generator=g)}, None, num_examples=10 * (k + 1), loss=0.0)
        for k in range(count)
    ]


def test_guidance_and_agreement_are_the_formulas_in_float64():
    scouts = _scouts()
    scores = explore.guide(scouts, signal="deviation")
    n = torch.tensor([s.num_examples for s in scouts]).double()
    d = torch.stack([s.delta["w"] for s in scouts]).double()
    second = (n[:, None] * d**2).sum(0)
    first = (n[:, None] * d).sum(0)
    # sums of four float32 terms: a few roundings
    torch.testing.assert_close(scores["w"].double(), second / n.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.agreement["w"].double(), first**2 / (n.sum() * second), rtol=1e-5, atol=1e-7)
    assert scores.guidance["w"].max() == 1


def test_agreement_is_one_when_all_move_alike_and_zero_when_they_cancel():
    start = {"w": torch.zeros(2)}
    moves = [torch.tensor([0.5, 1.0]), torch.tensor([0.5, -1.0])]
    scouts = [explore.Scout(start, {"w": m}, None, 10, 0.0) for m in moves]
    torch.testing.assert_close(explore.guide(scouts).agreement["w"], torch.tensor([1.0, 0.0]))


def test_who_does_not_hold_a_weight_has_no_say_in_it():
    start, move = {"w": torch.zeros(3)}, torch.tensor([0.5, 1.0, 0.0])
    sums = explore.Sums(start)
    sums.add({"w": move}, 10.0, held={"w": torch.tensor([True, True, False])})
    sums.add({"w": move * torch.tensor([1.0, 0.0, 0.0])}, 30.0, held={"w": torch.tensor([True, False, False])})
    torch.testing.assert_close(sums.scores().agreement["w"], torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(sums.mean()["w"], move)
    torch.testing.assert_close(sums.scores().deviation["w"], move**2)


@pytest.mark.parametrize("signal", ["fisher", "magnitude", "deviation"])
def test_signals_rank_by_the_explored_weights(signal):
    scouts = _scouts()
    sums = explore.Sums(scouts[0].start)
    for s in scouts:
        sums.add(s.delta, s.num_examples)
    explored = scouts[0].start["w"] + sums.mean()["w"]
    deviation = sums.second["w"] / sums.weight
    want = {"fisher": explored**2 * deviation, "magnitude": explored**2, "deviation": deviation}[signal]
    torch.testing.assert_close(sums.scores(signal)["w"], want)


def test_scout_leaves_the_model_alone_and_reports_its_deviation_and_cost():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    found = explore.scout(model, (x, y), F.cross_entropy, epochs=2, seed=1, batch_size=10)
    again = explore.scout(model, [(x, y)], F.cross_entropy, epochs=2, seed=1, batch_size=10)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert found.delta[name].abs().max() > 0
        assert torch.equal(found.delta[name], again.delta[name])
    assert found.num_examples == 20
    assert found.cost.seconds > 0
    # two epochs of two batches: forward 2*10*4*3, weight gradient the same, no input gradient
    assert found.cost.flops == 2 * 2 * 2 * (2 * 10 * 4 * 3)


def test_scout_brings_curvature_when_asked():
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    found = explore.scout(torch.nn.Linear(4, 3), (x, y), F.cross_entropy, curvature=True)
    assert found.curvature is not None
    assert found.curvature["weight"].shape == (3, 4)
    assert float(found.curvature["weight"].min()) >= 0
    assert set(explore.guide([found], signal="curvature")) == {"weight", "bias"}


def test_scouts_and_scores_print_as_a_line_each():
    scouts = _scouts()
    assert repr(scouts[1]) == "Scout(1 tensors, 20 examples, loss 0, 0 FLOPs, 0 s)"
    assert repr(explore.guide(scouts)) == "Scores(1 tensors, 6 entries, by 'fisher')"


def test_equal_seeds_explore_alike_dropout_included():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3))
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    deltas = [explore.scout(model, (x, y), F.cross_entropy, seed=s).delta["0.weight"] for s in (1, 1, 2)]
    assert torch.equal(deltas[0], deltas[1])
    assert not torch.equal(deltas[0], deltas[2])


def test_batches_of_vectors_as_targets_and_a_left_over_example():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    batches = [(torch.randn(8, 4), torch.randn(8, 3)), (torch.randn(1, 4), torch.randn(1, 3))]
    found = explore.scout(model, batches, F.mse_loss, batch_size=8)  # 9 examples: the last joins the others
    assert found.num_examples == 9


def test_a_dataset_and_a_loader_explore_like_their_tensors():
    inputs, targets = torch.randn(300, 4), torch.randint(0, 3, (300,))
    pairs = [(x, int(y)) for x, y in zip(inputs, targets, strict=True)]  # what a map-style data set gives one by one
    data = torch.utils.data.TensorDataset(inputs, targets)
    model = torch.nn.Linear(4, 3)
    loader = torch.utils.data.DataLoader(data, batch_size=7)
    found = [explore.scout(model, given, F.cross_entropy) for given in ((inputs, targets), data, loader, _Pairs(pairs))]
    for other in found[1:]:
        assert other.num_examples == 300
        assert torch.equal(other.delta["weight"], found[0].delta["weight"])


class _Pairs(torch.utils.data.Dataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


def test_mistakes_are_named():
    scouts = _scouts()
    with pytest.raises(ValueError, match="at least one client"):
        explore.guide([])
    with pytest.raises(ValueError, match="2 weights for 4 scouts"):
        explore.guide(scouts, [1.0, 2.0])
    with pytest.raises(ValueError, match="above 0"):
        explore.guide(scouts, [0.0] * 4)
    with pytest.raises(ValueError, match="above 0"):
        explore.guide(scouts, [1.0, 1.0, 1.0, float("inf")])
    with pytest.raises(ValueError, match="epochs=0; wanted a whole number"):
        explore.scout(torch.nn.Linear(4, 3), (torch.zeros(2, 4), torch.zeros(2).long()), F.cross_entropy, epochs=0)
    with pytest.raises(ValueError, match="batch_size=0; wanted a whole number"):
        explore.scout(torch.nn.Linear(4, 3), (torch.zeros(2, 4), torch.zeros(2).long()), F.cross_entropy, batch_size=0)
    with pytest.raises(ValueError, match="unknown signal 'x'"):
        explore.guide(scouts, signal="x")
    with pytest.raises(ValueError, match="curvature=True"):
        explore.guide(scouts, signal="curvature")
    other = explore.Scout({"w": torch.zeros(3)}, {"w": torch.zeros(3)}, None, 10, 0.0)
    with pytest.raises(ValueError, match="same model"):
        explore.guide([scouts[0], other])
    with pytest.raises(ValueError, match="one target an input"):
        explore.scout(torch.nn.Linear(4, 3), (torch.zeros(2, 4), torch.zeros(3, dtype=torch.long)), F.cross_entropy)
    bad = torch.full((4, 4), float("nan")), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="training loss is nan"):
        explore.scout(torch.nn.Linear(4, 3), bad, F.cross_entropy)
