"""What is kept: exact densities, the order of scores, whole channels, the paper's rule."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import BUILDERS, TwoCnn, build
from torch import nn

from autoflip import explore, meter, prune
from autoflip.groups import find_groups
from autoflip.masks import MaskSet
from autoflip.nn import sparsify
from autoflip.nn.compact import compact


def scores_of(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=g) for name, w in prune.weights(model).items()}


def image_model(width=32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 2 * width, 3), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Flatten(), nn.Linear(2 * width * 16, 128), nn.ReLU(), nn.Linear(128, 10)
    )  # fmt: skip


class TiedText(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.middle, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(torch.relu(self.middle(self.words(x))))


def test_a_shared_weight_has_the_name_that_optimizers_and_scouts_know():
    model = TiedText()
    assert list(prune.weights(model)) == ["middle.weight", "words.weight"]
    x = torch.randint(0, 30, (8, 5))
    scout = explore.scout(model, [(x, x.flip(1))], loss_fn=lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten()))
    masks = prune.hybrid(model, explore.guide([scout], signal="deviation"), density=0.5)
    want = torch.where(masks["words.weight"], model.words.weight, 0).detach()
    sparsify(model, masks)
    assert model.head.weight is model.words.weight
    middle = torch.relu(F.linear(F.embedding(x, want), model.middle.weight, model.middle.bias))
    torch.testing.assert_close(model(x), F.linear(middle, want))
    torch.testing.assert_close(compact(model)(x), model(x))


def test_weights_are_those_of_layers_that_run():
    assert set(prune.weights(build("text")[0])) == {
        "lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_ih_l1", "lstm.weight_hh_l1", "out.weight"
    }  # fmt: skip
    names = set(prune.weights(build("encoder")[0]))
    assert "encoder.layers.0.linear1.weight" in names
    assert not any("attn" in name for name in names)
    assert set(prune.weights(nn.Linear(2, 2))) == {"weight"}


@pytest.mark.parametrize("density", [0.003, 0.1, 0.5, 1.0])
def test_magnitude_keeps_the_largest(density):
    model = image_model()
    masks = prune.magnitude(model, density)
    assert masks.kept == round(density * masks.total)
    kept = torch.cat([w.abs()[masks[n]] for n, w in prune.weights(model).items()])
    lost = torch.cat([w.abs()[~masks[n]] for n, w in prune.weights(model).items()])
    # every tensor keeps its best entry in any case
    assert density == 1 or lost.max() <= kept.sort().values[len(masks) - 1]


def test_random_depends_on_the_seed_alone():
    model = image_model()
    masks = prune.random(model, 0.3, seed=1)
    torch.manual_seed(99)
    assert masks == prune.random(model, 0.3, seed=1)
    assert masks != prune.random(model, 0.3, seed=2)
    for mask in masks.values():  # 4 standard errors of a binomial
        assert abs(mask.float().mean() - 0.3) < 4 * (0.21 / mask.numel()) ** 0.5


def test_masks_do_not_depend_on_the_default_dtype():
    model = image_model()
    flops = meter.layer_flops(model, torch.zeros(1, 1, 8, 8))

    scores = scores_of(model)

    def made():
        given = {"flops": flops, "flops_exponent": 0.5, "block": (4, 2)}
        return prune.random(model, 0.3, seed=1), prune.hybrid(model, scores, 0.1, 0.5, **given)

    want = made()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            got = made()
        finally:
            torch.set_default_dtype(torch.float32)
        assert got == want


def test_equal_scores_go_to_the_earlier_entry():
    masks = prune.by_scores({"a": torch.zeros(2, 4), "b": torch.zeros(4)}, 0.5)
    assert masks["a"].flatten().tolist() == [True] * 5 + [False] * 3  # b keeps its best entry in any case
    assert masks["b"].tolist() == [True, False, False, False]
    assert prune.by_scores({"a": torch.ones(3, dtype=torch.bfloat16), "none": torch.zeros(0)}, 1).kept == 3


def test_a_cut_over_more_entries_than_torch_quantile_takes():
    masks = prune.by_scores({"a": torch.arange(2**24 + 6, dtype=torch.int32).float()}, 0.25)
    assert masks.kept == 2**22 + 2  # ties in float32 above 2^24 included


@pytest.mark.parametrize("density, channels", [(0.1, 0.4), (0.05, 0.3), (0.3, 0.8), (0.5, 1.0), (1.0, 1.0)])
def test_hybrid_hits_the_density(density, channels):
    model = image_model()
    masks = prune.hybrid(model, scores_of(model), density, channels)
    # shown against every covered tensor, biases and norms of removed channels included
    assert masks.kept == round(density * masks.total)
    own = MaskSet({n: masks[n] for n in prune.weights(model)})
    assert own.density == pytest.approx(density, rel=0.02)


def test_hybrid_removes_whole_channels_and_all_that_is_theirs():
    model = image_model()
    masks = prune.hybrid(model, scores_of(model), density=1, channels=0.5)
    for unit in find_groups(model).units:
        slices = [masks[s.tensor].movedim(s.dim, 0)[list(s.indices)] for s in unit.producers if s.tensor in masks]
        gone = not slices[0].any()
        assert all(bool(s.any()) != gone for s in slices)
        if gone:
            assert not any(
                masks[s.tensor].movedim(s.dim, 0)[list(s.indices)].any() for s in unit.producers + unit.consumers
            )
    assert {"3.running_mean", "3.running_var", "3.weight", "3.bias", "0.bias"} <= set(masks)


def test_kept_channels_fit_the_machine():
    model = image_model()
    for channels in (0.2, 0.4, 0.6, 0.8):
        small = compact(model, masks=prune.hybrid(model, scores_of(model), 0.5, channels))
        assert small[0].out_channels % 16 == small[2].out_channels % 16 == 0
        wanted = channels * 224  # rounding is made up for where any width is as good
        kept = small[0].out_channels + small[2].out_channels + small[6].out_features
        assert kept == pytest.approx(wanted, abs=1)
    small = compact(model, masks=prune.hybrid(model, scores_of(model), 1, 0.4, round_to=1))
    assert small[2].out_channels % 16
    small = compact(model, masks=prune.hybrid(model, scores_of(model), 1, 0.4, round_to=8))
    assert all(n % 8 == 0 for n in (small[0].out_channels, small[2].out_channels, small[6].out_features))
    tiny = image_model(8)
    assert compact(tiny, masks=prune.hybrid(tiny, scores_of(tiny), 1, 0.1))[0].out_channels == 4


@pytest.mark.parametrize("cpu, wide, narrow", [("AVX512", 16, 8), ("AVX2", 8, 8), ("DEFAULT", 8, 8)])
def test_the_pruner_knows_its_machine_when_asked(monkeypatch, cpu, wide, narrow):
    model = image_model(24)  # convolutions of 24 and 48 channels
    before = prune.hybrid(model, scores_of(model), 1, 0.45)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    assert prune.hybrid(model, scores_of(model), 1, 0.45) == before  # only when asked
    kept = set()
    for channels in (0.3, 0.45, 0.6, 0.75):
        small = compact(model, masks=prune.hybrid(model, scores_of(model), 1, channels, round_to="auto"))
        assert (
            small[0].out_channels % narrow == small[2].out_channels % (wide if small[2].out_channels > 12 else 8) == 0
        )
        kept |= {small[0].out_channels, small[2].out_channels}
    assert any(n % 16 for n in kept)  # 8 is really used
    assert compact(model, masks=prune.hybrid(model, scores_of(model), 1, 0.1, round_to="auto"))[2].out_channels == 8
    with pytest.raises(ValueError, match="or 'auto' for the multiple that pays"):
        prune.hybrid(model, scores_of(model), round_to="best")


def test_channel_choice_does_not_depend_on_a_tensors_scale():
    model, scores = image_model(), scores_of(image_model())
    scaled = {n: s * 10.0 ** (3 * i - 4) for i, (n, s) in enumerate(scores.items())}
    a, b = (prune.hybrid(model, s, density=1, channels=0.4) for s in (scores, scaled))
    assert a == b


def test_good_channels_stay():
    model = image_model()
    scores = {n: torch.zeros_like(s) for n, s in scores_of(model).items()}
    scores["2.weight"][40:] += 1  # 24 channels of 64, all in the second layer
    masks = prune.hybrid(model, scores, density=1, channels=0.5)
    assert masks["2.weight"][40:].flatten(1).any(1).all()


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (16, 1), (1, 16), (7, 5)])
def test_blocks_live_and_die_together_in_the_compact_model(block):
    model = image_model()
    masks = prune.hybrid(model, scores_of(model), 0.1, 0.5, block)
    assert masks.density == pytest.approx(0.1, abs=block[0] * block[1] / masks.total)
    small = compact(model, masks=masks, groups=find_groups(model))
    compacted = small.plan.shrink_masks(masks)["6.weight"]
    if compacted.shape[0] == int(masks["6.bias"].sum()):  # no further unit died
        for tile in compacted.split(block[0]):
            for part in tile.split(block[1], dim=1):
                assert part.all() or not part.any()


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("density, channels", [(0.001, 0.01), (0.05, 1.0)])
def test_no_layer_dies(name, density, channels):
    model, x = build(name)
    masks = prune.hybrid(model, scores_of(model), density, channels)
    assert all(masks[n].any() for n in prune.weights(model))
    for layer, units in find_groups(model).by_layer().items():
        gone = compact(model, masks=prune.hybrid(model, scores_of(model), 1, channels)).plan.removed.get(layer, 0)
        assert (len(units) - gone) * find_groups(model).width(layer) >= min(len(units), 4)
    assert torch.isfinite(model(x)).all()


def test_rows_that_stay_keep_a_weight():
    model = image_model()
    masks = prune.hybrid(model, scores_of(model), 0.02, 0.5)
    whole = prune.hybrid(model, scores_of(model), 1, 0.5)
    for name in prune.weights(model):
        assert torch.equal(masks[name].flatten(1).any(1), whole[name].flatten(1).any(1))


def test_protected_layers_keep_everything_that_is_left():
    model = TwoCnn()
    masks = prune.hybrid(model, scores_of(model), 0.2, 0.5, protect=("conv1", "fc2"))
    assert masks["conv1.weight"].all()
    assert masks["fc2.weight"][:, masks["fc1.bias"]].all()
    with pytest.raises(ValueError, match="protect names 'conv9'"):
        prune.hybrid(model, scores_of(model), protect=["conv9"])
    with pytest.raises(ValueError, match="the protected layers alone keep .* in all. Protect fewer"):
        prune.hybrid(model, scores_of(model), 0.05, protect=["fc1"])


def test_paper_rule():
    deviations = {"w": torch.tensor([[1.0, 2.0], [3.0, 5.0]]), "b": torch.tensor([0.1, 0.2]), "c": torch.ones(3)}
    masks = prune.paper(deviations, 0.3)
    # G': w 0 .25 .5 1, b 0 1; quantile .3 of (0 0 .25 .5 1 1) = .125
    assert masks["w"].flatten().tolist() == [False, True, True, True]
    assert masks["b"].tolist() == [False, True]
    assert masks["c"].all()
    assert prune.paper({"c": torch.ones(3)}).density == 1

    g = torch.Generator().manual_seed(0)
    large = {n: torch.rand(size, generator=g) ** 4 * 7 for n, size in (("a", (50, 40)), ("b", (999,)))}
    flat = [((t - t.min()) / (t.max() - t.min())).numpy().ravel() for t in (large["a"].double(), large["b"].double())]
    tau = torch.quantile(torch.tensor(np.concatenate(flat)), 0.3)
    masks = prune.paper(large, 0.3)
    assert [int(masks[n].sum()) for n in "ab"] == [int((f > float(tau)).sum()) for f in flat]
    assert masks.density == pytest.approx(0.7, abs=1e-3)


def test_errors_say_what_to_do():
    model, scores = TwoCnn(), scores_of(TwoCnn())
    with pytest.raises(ValueError, match="density is 0, wanted the kept share"):
        prune.magnitude(model, 0)
    with pytest.raises(ValueError, match="density is '0.1', wanted the kept share"):
        prune.magnitude(model, density="0.1")
    for wrong, kind in ((None, "NoneType"), ([1], "list"), (torch.ones(2), "Tensor")):
        for ask in (lambda s: prune.hybrid(model, s), prune.by_scores, prune.paper):
            with pytest.raises(ValueError, match=f"scores are a {kind}, wanted a mapping"):
                ask(wrong)
    with pytest.raises(ValueError, match="scores of 'fc2.weight' are a float, wanted a tensor"):
        prune.hybrid(model, {**scores, "fc2.weight": 1.0})
    with pytest.raises(ValueError, match="threshold is '0.3'"):
        prune.paper(scores, "0.3")
    for block in (16, "16", (4,), (4.0, 1)):
        with pytest.raises(ValueError, match="two positive counts"):
            prune.hybrid(model, scores, block=block)
    with pytest.raises(ValueError, match="channels is 1.5"):
        prune.hybrid(model, scores, channels=1.5)
    with pytest.raises(ValueError, match="no scores for 'fc2.weight'"):
        prune.hybrid(model, {n: s for n, s in scores.items() if n != "fc2.weight"})
    with pytest.raises(ValueError, match="compacted after the scores"):
        prune.hybrid(model, {**scores, "fc2.weight": torch.ones(5, 4)})
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="1 values that are NaN or infinite"):
            prune.hybrid(model, {**scores, "fc2.weight": torch.ones(5, 20).index_fill(1, torch.tensor([]).long(), 0)
                                 .masked_fill(torch.arange(100).view(5, 20) == 7, bad)})  # fmt: skip
    with pytest.raises(ValueError, match="two positive counts"):
        prune.hybrid(model, scores, block=(4, 0))
    with pytest.raises(ValueError, match="fits no weight"):
        prune.hybrid(model, scores, block=(64, 64))
    with pytest.raises(ValueError, match="round_to is 0"):
        prune.hybrid(model, scores, round_to=0)
    with pytest.raises(ValueError, match="nothing|no Linear"):
        prune.random(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="threshold is 1"):
        prune.paper(scores, 1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        prune.paper({"w": torch.tensor([torch.nan])})


@settings(max_examples=40)
@given(st.sampled_from(sorted(BUILDERS)), st.floats(0.005, 1), st.floats(0.01, 1), st.integers(0, 99))
def test_hybrid_is_deterministic_and_never_above_its_density(name, density, channels, seed):
    model, _ = build(name)
    scores = scores_of(model, seed)
    masks = prune.hybrid(model, scores, density, channels)
    assert masks == prune.hybrid(model, scores, density, channels)
    covered = prune.weights(model)
    others = sum(int(m.sum()) for n, m in masks.items() if n not in covered)
    assert masks.kept <= max(round(density * masks.total), others + len(covered))
    masks.check(model.state_dict())


@settings(max_examples=40)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.floats(0.01, 1), st.integers(0, 99))
def test_by_scores_is_a_stable_sort(sizes, density, seed):
    g = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.randint(4, (n,), generator=g).float() for i, n in enumerate(sizes)}  # many ties
    flat = torch.cat([*scores.values()])
    best = {sum(sizes[:i]) + int(s.argmax()) for i, s in enumerate(scores.values())}
    order = [*best, *(i for i in flat.argsort(descending=True, stable=True).tolist() if i not in best)]
    want = torch.zeros(len(flat), dtype=torch.bool)
    want[order[: max(len(best), round(density * len(flat)))]] = True
    masks = prune.by_scores(scores, density)
    assert torch.equal(torch.cat([masks[n] for n in scores]), want)


def test_inputs_are_ranked_by_what_is_left_of_their_columns():
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2))
    scores = {"1.weight": torch.full((16, 20), 0.1), "3.weight": torch.ones(2, 16)}
    scores["1.weight"][:8, :5] = 1.0  # of the eight rows that stay
    scores["1.weight"][8:, 5:10] = 2.0  # larger columns, but their rows go
    scores["3.weight"][:, 8:] = 0.01
    masks = prune.hybrid(model, scores, density=1, channels=0.5, inputs=0.25)
    kept = masks["1.weight"]
    assert kept.any(1).nonzero()[:, 0].tolist() == list(range(8))
    assert kept.any(0).nonzero()[:, 0].tolist() == list(range(5))
    shielded = prune.hybrid(model, scores, density=1, channels=0.5, inputs=0.25, protect=["1"])
    assert bool(shielded["1.weight"].all())
    with pytest.raises(ValueError, match="inputs is 0"):
        prune.hybrid(model, scores, inputs=0)


def test_channels_that_cost_more_flops_go_first():
    model = image_model()
    scores = {name: torch.ones_like(s) for name, s in scores_of(model).items()}  # no channel is better than another
    for name in scores:
        scores[name] += torch.rand(scores[name].shape, generator=torch.Generator().manual_seed(0))
    flops = meter.layer_flops(model, torch.zeros(2, 1, 8, 8))
    assert flops["0.weight"] == 2 * model[0].weight.numel() * 36

    def kept(exponent):
        masks = prune.hybrid(model, scores, 1, 0.5, round_to=1, flops=flops, flops_exponent=exponent)
        small = compact(model, masks=masks)
        x = torch.zeros(2, 1, 8, 8)
        return small[0].out_channels + small[2].out_channels, meter.count_flops(lambda: small(x))

    convs, spent = zip(*(kept(e) for e in (0, 0.1, 1.0)), strict=True)
    assert convs[0] > convs[1] >= convs[2]
    assert spent[0] > spent[1] >= spent[2]
    assert kept(0)[0] == kept(1e-9)[0]
    with pytest.raises(ValueError, match=r"above 0, flops=meter.layer_flops\(model, example\)"):
        prune.hybrid(model, scores, flops_exponent=0.5)
    with pytest.raises(ValueError, match="flops_exponent is 2"):
        prune.hybrid(model, scores, flops=flops, flops_exponent=2)
