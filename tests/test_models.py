"""The benchmark networks: published sizes, reproducible weights, traceable, and the door for a user's own."""

import pytest
import torch
from torch import nn

from autoflip.fed import data, models

SHAPES = {"char-lstm": ((80,), 80), "femnist-cnn": ((1, 28, 28), 62), "digits-cnn": ((1, 8, 8), 10)}


def make(name, **options):
    shape, classes = SHAPES.get(name, ((3, 32, 32), 10))
    return models.build(name, input_shape=shape, num_classes=classes, **options), shape, classes


def batch(shape, n=3):
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 80, (n, *shape), generator=g) if len(shape) == 1 else torch.randn(n, *shape, generator=g)


@pytest.mark.parametrize(
    "name, shape, classes, count",
    [
        ("two-cnn", (1, 28, 28), 10, 1_663_370),
        ("two-cnn", (3, 32, 32), 10, 1_664_970),
        ("femnist-cnn", (1, 28, 28), 62, 13_180_734),
        ("char-lstm", (80,), 80, 819_920),
        ("mlp", (1, 28, 28), 10, 199_210),
        ("resnet8", (3, 32, 32), 10, 78_042),
        ("resnet8-group", (3, 32, 32), 10, 78_042),
        ("digits-cnn", (1, 8, 8), 10, 338_058),
    ],
)
def test_parameter_counts(name, shape, classes, count):
    model = models.build(name, input_shape=shape, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(batch(shape)).shape == (3, classes)


@pytest.mark.parametrize("name", models.NAMES)
def test_seed_fixes_the_weights_and_leaves_torchs_rng_alone(name):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, shape, _ = make(name, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    same, _, _ = make(name, seed=1)
    other, _, _ = make(name, seed=2)
    pairs = list(zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    assert torch.equal(one.eval()(batch(shape)), same.eval()(batch(shape)))


@pytest.mark.parametrize("name", models.NAMES)
def test_traces_to_the_same_function(name):
    model, shape, classes = make(name)
    traced = torch.fx.symbolic_trace(model.eval())
    for n in (1, 4):
        y = model(batch(shape, n))
        assert y.shape == (n, classes)
        assert torch.equal(traced(batch(shape, n)), y)


@pytest.mark.parametrize("name", models.NAMES)
def test_every_parameter_learns(name):
    model, shape, classes = make(name)
    loss = nn.functional.cross_entropy(model(batch(shape, 8)), torch.arange(8) % classes)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_names_are_plain():
    model, _, _ = make("two-cnn")
    assert [n for n, _ in model.named_parameters()] == [
        f"{m}.{p}" for m in ("conv1", "conv2", "fc1", "fc2") for p in ("weight", "bias")
    ]


def test_options_reach_the_model():
    # AutoFLIP's CIFAR-100 network
    wide = models.build("two-cnn", input_shape=(3, 32, 32), num_classes=100, hidden=128)
    assert wide.conv2.out_channels == 256
    assert isinstance(models.build("resnet8", input_shape=(3, 8, 8), num_classes=2, norm="group").norm1, nn.GroupNorm)
    assert not list(models.build("resnet8-group", input_shape=(3, 8, 8), num_classes=2).buffers())
    with pytest.raises(ValueError, match="norm='layer'; wanted 'batch' or 'group'"):
        models.build("resnet8", input_shape=(3, 8, 8), num_classes=2, norm="layer")


@pytest.mark.parametrize("name", [n for n in data.NAMES if n != "digits"] + ["digits", "idx:KMNIST/raw/"])
def test_every_data_set_has_a_model_that_reads_it(name):
    shape = {"shakespeare": (80,), "har": (9, 128), "digits": (1, 8, 8), "usps": (1, 16, 16)}.get(name, (3, 32, 32))
    model = models.build(models.default_for(name), input_shape=shape, num_classes=80)
    assert model(batch(shape)).shape == (3, 80)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("tow-cnn", (1, 8, 8), "did you mean 'two-cnn'"),
        ("transformer", (1, 8, 8), "or your own as module:callable"),
        ("two-cnn", (80,), "two-cnn reads images .C, H, W. but a sample has shape .80,."),
        ("resnet8", (9, 128), "resnet8 reads images"),
        ("char-lstm", (1, 28, 28), "char-lstm reads characters"),
        ("digits-cnn", (1, 1, 8), "wanted >= 2x2"),
    ],
)
def test_wrong_names_and_shapes(name, shape, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, input_shape=shape, num_classes=10)


OWN = """
from torch import nn
def plain(): return nn.Linear(4, 2)
def sized(input_shape, num_classes): return nn.Linear(input_shape[0], num_classes)
def part(num_classes=3, bias=True): return nn.Linear(4, num_classes, bias)
def any_of(**kw): return nn.Linear(kw["input_shape"][0], kw["num_classes"])
def needs(depth): return nn.Linear(4, depth)
def wrong(): return 5
class Net(nn.Module):
    inner = plain
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(4, num_classes)
value = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("import surely_not_installed")
    monkeypatch.chdir(tmp_path)
    return lambda spec, **kw: models.build(spec, input_shape=(4,), num_classes=2, **kw)


@pytest.mark.parametrize("attribute", ["plain", "sized", "part", "any_of"])
def test_a_users_own_model(own, attribute):
    model = own(f"own_nets:{attribute}", seed=3)
    assert model(torch.zeros(1, 4)).shape == (1, 2)
    assert torch.equal(model.weight, own(f"own_nets:{attribute}", seed=3).weight)


def test_a_users_own_class_and_options(own):
    assert own("own_nets:Net").fc.out_features == 2
    assert own("own_nets:part", bias=False).bias is None
    assert own("own_nets:needs", depth=5).out_features == 5


@pytest.mark.parametrize(
    "spec, message",
    [
        ("own_nets:", "is no module:callable"),
        (":plain", "is no module:callable"),
        ("own nets:plain", "is no module:callable"),
        ("no_such_module:plain", "there is no module 'no_such_module'"),
        ("own_nets.deeper:plain", "there is no module"),
        ("own_nets:plan", "has no 'plan'; did you mean 'plain'"),
        ("own_nets:value", "is int; wanted a function or class"),
        ("own_nets:needs", "missing a required argument: 'depth'"),
        ("own_nets:wrong", "returned int; wanted a torch.nn.Module"),
    ],
)
def test_wrong_specs(own, spec, message):
    with pytest.raises(ValueError, match=message):
        own(spec)


def test_an_import_error_inside_the_users_module_is_named(own):
    with pytest.raises(ValueError, match="importing 'own_broken' failed: ModuleNotFoundError.*surely_not_installed"):
        own("own_broken:plain")
