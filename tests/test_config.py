"""fed.Config: what it accepts, what it refuses, and in which words."""

import pytest

from autoflip import fed
from autoflip.fed import sections


def test_overrides_are_typed_and_presets_give_way():
    config = fed.Config.load(overrides=["data.name=fashion-mnist", "fed.rounds=7", "prune.density=1", "data.root=/x y"])
    assert config.fed.rounds == 7
    assert config.prune.density == 1.0
    assert isinstance(config.prune.density, float)
    assert config.data.root == "/x y"
    assert config.data.samples_per_client == 500  # the preset of fashion-mnist


def test_toml_round_trip_is_equal(tmp_path):
    config = fed.Config.load(overrides=['data.root="a\\"b\\\\c\\u00e9"', "prune.block=[4, 1]", "train.lr=1e-3"])
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert fed.Config.load(path) == config


def test_file_then_overrides(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[fed]\nrounds = 3\nclients = 5\n")
    config = fed.Config.load(path, overrides=["fed.rounds=4"])
    assert (config.fed.rounds, config.fed.clients) == (4, 5)


@pytest.mark.parametrize(
    "override, message",
    [
        ("fed.round=3", "did you mean 'fed.rounds'"),
        ("fedd.rounds=3", "did you mean 'fed'"),
        ("fed.rounds=0", "out of range"),
        ("fed.rounds=2.5", "a whole number"),
        ("fed.rounds=true", "a whole number"),
        ("prune.density=0", r"\(0, 1\]"),
        ("prune.density=1.5", r"\(0, 1\]"),
        ("prune.density=nan", "wanted a number"),
        ("fed.method=autoflap", "did you mean 'autoflip'"),
        ("fed.against=autoflip", "is the method itself"),
        ("wire.levels=8", "wire.levels=8 with wire.values=int4; wanted 0 to 7"),
        ("wire.levels=128", "out of range"),
        ("wire.values=int7", "wanted one of fp32, bf16, int8, int4"),
        ("prune.block=[4]", "rows, columns"),
        ("prune.block=[1, true]", "list of whole numbers"),
        ("prune.block=4", "list of whole numbers"),
        ("rounds=3", "section.key=value"),
        ("fed.rounds", "section.key=value"),
        ("data.partition=diri", "dirichlet"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(fed.ConfigError, match=message):
        fed.Config.load(overrides=[override])


def test_a_configuration_built_by_hand_is_checked_too():
    import dataclasses

    config = fed.Config.load()
    with pytest.raises(fed.ConfigError, match="fed.rounds=0 is out of range"):
        fed.run(dataclasses.replace(config, fed=dataclasses.replace(config.fed, rounds=0)))


@pytest.mark.parametrize("spelling", ["FEMNIST", "Fashion_MNIST", "cifar-10"])
def test_presets_do_not_hang_on_how_a_data_set_is_spelt(spelling):
    plain = {"FEMNIST": "femnist", "Fashion_MNIST": "fashion-mnist", "cifar-10": "cifar10"}[spelling]
    assert fed.Config.load(overrides=[f"data.name={spelling}"]) == fed.Config.load(overrides=[f"data.name={plain}"])


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[fed\n")
    with pytest.raises(fed.ConfigError, match="not valid TOML"):
        fed.Config.load(path)
    path.write_text("rounds = 3\n")
    with pytest.raises(fed.ConfigError, match="outside a section"):
        fed.Config.load(path)
    with pytest.raises(FileNotFoundError):
        fed.Config.load(tmp_path / "none.toml")


def test_every_method_that_the_configuration_names_exists():
    from autoflip.fed.sections import METHOD_NAMES
    from autoflip.fed.strategies import METHODS

    assert set(METHOD_NAMES) == set(METHODS)


@pytest.mark.parametrize(
    "override, value",
    [("fed.slow=.5", 0.5), ("train.lr=1.", 1.0), ("data.root=1_000", "1_000"), ("data.root=2026-12-01", "2026-12-01")],
)
def test_overrides_are_read_as_their_key_wants_them(override, value):
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(fed.Config.load(overrides=[override]), section), key) == value


def test_sections_made_in_python_are_typed_as_those_of_a_file(tmp_path):
    made = fed.Config(train=sections.Train(lr=1), prune=sections.Prune(block=[4, 1]), data=sections.Data(root=tmp_path))
    (tmp_path / "config.toml").write_text(made.to_toml(), encoding="utf-8")
    read = fed.Config.load(tmp_path / "config.toml")
    assert (read, read.fingerprint()) == (made, made.fingerprint())
    with pytest.raises(fed.ConfigError, match="fed.rounds='3'; wanted a whole number"):
        fed.Config(fed=sections.Fed(rounds="3"))
    with pytest.raises(fed.ConfigError, match=r"fed is a dict; wanted fed.sections.Fed\(...\)"):
        fed.Config(fed={"rounds": 3})
    with pytest.raises(fed.ConfigError, match="data.root=.* is not UTF-8"):
        fed.Config(data=sections.Data(root="/data/\udcff"))


def test_dense_averaging_alone_is_compared_with_nothing():
    assert fed.Config.load(overrides=["fed.method=fedavg"]).fed.against == "none"
    assert fed.Config(fed=sections.Fed(method="fedavg")).fed.against == "none"
    assert fed.Config.load(overrides=["fed.method=fedprox"]).fed.against == "fedavg"
    with pytest.raises(fed.ConfigError, match="fed.against='fedavg' is the method itself; write fed.against=none"):
        fed.Config.load(overrides=["fed.method=fedavg", "fed.against=fedavg"])
    with pytest.raises(fed.ConfigError, match="run: config is a str; wanted a fed.Config"):
        fed.run("digits.toml")
