"""MaskedEmbedding is torch's on weight * mask, whatever its options, and touches only the rows it is asked for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoflip import nn as sparse
from autoflip import sparsify

ROWS, SIZE = 11, 6


def pair(density=0.5, seed=0, dtype=torch.float32, **options):
    """A masked layer and torch's own on ``weight * mask``."""
    torch.manual_seed(seed)
    ours, torchs = (kind(ROWS, SIZE, dtype=dtype, **options) for kind in (sparse.MaskedEmbedding, nn.Embedding))
    mask = torch.rand(ROWS, SIZE) < density
    mask[3] = False  # a row of which nothing is left
    with torch.no_grad():
        torchs.weight.copy_(ours.weight * mask)
    ours.set_mask(mask)
    return ours, torchs, mask


OPTIONS = [
    {},
    {"padding_idx": 2},
    {"padding_idx": -1, "sparse": True},
    {"sparse": True},
    {"scale_grad_by_freq": True},
    {"max_norm": 0.7},
    {"max_norm": 0.7, "norm_type": 1.0, "padding_idx": 0, "scale_grad_by_freq": True},
]


@settings(max_examples=60)
@given(
    options=st.sampled_from(OPTIONS), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    shape=st.sampled_from([(0,), (1,), (5,), (4, 7), (2, 3, 2)]), density=st.floats(0, 1), seed=st.integers(0, 99),
    index=st.sampled_from([torch.int64, torch.int32]),
)  # fmt: skip
def test_equals_torchs_on_the_masked_weight(options, dtype, shape, density, seed, index):
    ours, torchs, mask = pair(density, seed, dtype, **options)
    x = torch.randint(ROWS, shape, dtype=index)
    got, want = ours(x), torchs(x)
    assert torch.equal(got, want)  # the same numbers are copied: nothing is rounded
    dy = torch.randn_like(want)
    got.backward(dy)
    want.backward(dy)
    assert ours.weight.grad.is_sparse == torchs.weight.grad.is_sparse
    a, b = (layer.weight.grad.to_dense() for layer in (ours, torchs))
    assert torch.equal(a, torch.where(mask, b, 0))
    assert torch.equal(ours.weight, torchs.weight)  # max_norm wrote the same norms


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.7}, {"sparse": True}], ids=str)
def test_what_stands_at_pruned_entries_counts_for_nothing(options):
    ours, torchs, _ = pair(**options)
    with torch.no_grad():
        ours.weight += torch.where(ours.weight_mask, 0, torch.nan)
    x = torch.tensor([0, 3, 3, 10])
    assert torch.equal(ours(x), torchs(x))
    assert torch.equal(ours.state_dict()["weight"], torchs.state_dict()["weight"])


@pytest.mark.parametrize(
    "optimizer, options",
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1), {}),
        (lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1), {"max_norm": 1.0}),
        (lambda p: torch.optim.SparseAdam(p, 0.1), {"sparse": True}),
    ],
)
def test_pruned_entries_stay_zero_through_training(optimizer, options):
    ours, torchs, mask = pair(**options)
    start = ours.weight.detach().clone()
    steps = [(layer, optimizer(layer.parameters())) for layer in (ours, torchs)]
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randint(ROWS, (9,), generator=g)
        for layer, step in steps:
            step.zero_grad()
            (layer(x) - 1).pow(2).sum().backward()
            step.step()
    assert not ours.weight[~mask].any()
    assert torchs.weight[~mask].any()  # torch's own moves them
    assert (ours.weight != start)[mask].any()


def test_the_table_is_not_walked():
    """A step reads and writes rows of the input only: no result, however hidden, is as large as the table."""
    layer = sparse.MaskedEmbedding(50_000, 4, sparse=True)
    layer.set_mask(torch.rand(50_000, 4) < 0.5)
    x = torch.randint(50_000, (8,))
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(x).sum().backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < layer.weight_mask.numel()


def test_sparsify_takes_embeddings_and_gives_them_back():
    model = nn.Sequential(nn.Embedding(7, 5, padding_idx=1), nn.Linear(5, 3))
    mask = torch.rand(7, 5) < 0.5
    sparse.sparsify(model, {"0.weight": mask})
    assert type(model[0]) is sparse.MaskedEmbedding
    assert repr(model[0]).startswith("MaskedEmbedding(7, 5, padding_idx=1, density=0.")
    assert torch.equal(model(torch.arange(7)), model[1](model[0].weight))
    sparse.densify(model)
    assert type(model[0]) is nn.Embedding
    assert not model[0].weight[~mask].any()


class Tied(nn.Module):
    """The output reads the embedding's table past the layer, as many language models do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(ROWS, SIZE)

    def forward(self, x):
        return F.linear(self.embed(x), self.embed.weight)


def test_a_table_that_is_read_past_the_layer_is_masked_there_too():
    torch.manual_seed(0)
    model = Tied()
    early = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.arange(ROWS)
    model(x).pow(2).sum().backward()
    early.step()
    mask = torch.rand(ROWS, SIZE) < 0.5
    sparse.sparsify(model, {"embed.weight": mask})
    early.step()  # momentum moves what is pruned
    assert model.embed.weight[~mask].any()
    weight = model.embed.weight.detach() * mask
    assert torch.equal(model(x), weight @ weight.T)


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.7}], ids=str)
def test_compiles_in_one_graph(options):
    ours, torchs, _ = pair(**options)
    x = torch.randint(ROWS, (9,))
    assert torch.equal(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), torchs(x))


def test_errors():
    with pytest.raises(ValueError, match="entry by entry"):
        sparse.MaskedEmbedding(3, 2).set_mask(torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(sparse.MaskedEmbedding.from_pretrained(torch.ones(3, 2)).weight, torch.ones(3, 2))


@pytest.mark.parametrize("tied", [False, True])
def test_sparse_gradients_of_tables_that_sparsify_keeps_are_masked(tied):
    mask, seen = torch.rand(20, 8) < 0.5, torch.tensor([[3, 3, 7], [1, 0, 3]])
    grads = []
    for sparse_gradient in (True, False):
        torch.manual_seed(0)
        bag = nn.EmbeddingBag(20, 8, sparse=sparse_gradient)
        model = nn.ModuleDict({"bag": bag})
        if tied:
            model["table"] = nn.Embedding(20, 8, sparse=sparse_gradient)
            model["table"].weight = bag.weight
        sparsify(model, {"bag.weight": mask})
        model["bag"](seen).sum().backward()
        grads.append(model["bag"].weight.grad)
    assert grads[0].is_sparse
    assert torch.equal(grads[0].to_dense(), grads[1])
    assert not grads[1][~mask].any()
    assert grads[1].any()
