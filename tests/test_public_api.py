"""The public names and signatures of DESIGN, section 3, and that `import autoflip` stays light."""

import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest

# object -> (positional parameters in order, keyword-only or later parameters that must exist)
SIGNATURES = {
    "autoflip.sparsify": (["model", "masks"], []),
    "autoflip.densify": (["model"], []),
    "autoflip.compact": (["model", "example_inputs", "masks"], []),
    "autoflip.nn.MaskedLinear": (["in_features", "out_features", "bias"], []),
    "autoflip.nn.MaskedConv2d": (["in_channels", "out_channels", "kernel_size", "stride", "padding"], []),
    "autoflip.nn.MaskedEmbedding": (["num_embeddings", "embedding_dim", "padding_idx", "max_norm"], []),
    "autoflip.nn.MaskedLSTM": ([], []),
    "autoflip.nn.MaskedGRU": ([], []),
    "autoflip.nn.MaskedLinear.set_mask": (["self", "mask"], []),
    "autoflip.nn.masks_of": (["model"], []),
    "autoflip.masks.MaskSet": (["masks"], []),
    "autoflip.masks.MaskSet.save": (["self", "path"], []),
    "autoflip.masks.MaskSet.load": (["path"], []),
    "autoflip.masks.MaskSet.fingerprint": (["self"], []),
    "autoflip.prune.magnitude": (["model", "density"], []),
    "autoflip.prune.random": (["model", "density"], ["seed"]),
    "autoflip.prune.hybrid": (["model", "scores"], ["density", "channels", "block"]),
    "autoflip.codec.encode": (
        ["delta"],
        ["masks", "values", "entropy", "schema", "seed", "round", "client", "base_id"],
    ),
    "autoflip.codec.decode": (["blob"], ["masks", "schema", "limits"]),
    "autoflip.codec.inspect": (["blob"], []),
    "autoflip.codec.Schema.of": (["tensors"], []),
    "autoflip.curvature.hessian_trace": (["model", "loss_fn", "batch"], ["num_probes", "seed", "per"]),
    "autoflip.curvature.hessian_diagonal": (["model", "loss_fn", "batch"], ["num_probes", "seed"]),
    "autoflip.curvature.hvp": (["model", "loss_fn", "batch", "vectors"], []),
    "autoflip.explore.scout": (["model", "data", "loss_fn"], ["epochs", "seed"]),
    "autoflip.explore.guide": (["scouts"], ["weights"]),
    "autoflip.meter.measure": (["model"], []),
    "autoflip.fed.run": (["config"], ["out", "sinks"]),
    "autoflip.fed.resume": (["run_dir"], ["sinks"]),
    "autoflip.fed.Config.load": (["path", "overrides"], []),
    "autoflip.report.write": (["run_dir"], []),
    "autoflip.report.summary_table": (["summary"], []),
    "autoflip.loggers.jsonl": (["path"], []),
    "autoflip.loggers.csv": (["path"], []),
    "autoflip.cli.main": ([], []),
}
FIELDS = {
    "autoflip.fed.Result": {"accuracy", "cost", "records"},
    "autoflip.codec.Limits": {"max_bytes"},
    "autoflip.meter.Cost": {"flops", "seconds", "bytes_up", "bytes_down"},
    "autoflip.fed.Record": {"method", "round", "phase", "accuracy", "flops", "bytes_up", "bytes_down", "seconds"},
}


def find(path):
    """Import as much of the dotted path as is a module, then take attributes."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if not path.startswith(str(error.name)):
                raise
            continue
        for part in parts[cut:]:
            value = getattr(value, part)
        return value
    raise AssertionError(path)


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature_is_as_promised(path):
    first, others = SIGNATURES[path]
    found = inspect.signature(find(path)).parameters
    positional = [name for name, p in found.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    assert positional[: len(first)] == first
    assert set(others) <= set(found)


@pytest.mark.parametrize("path", FIELDS)
def test_fields_are_as_promised(path):
    kind = find(path)
    have = {f.name for f in dataclasses.fields(kind)} | {name for name in dir(kind) if not name.startswith("_")}
    assert FIELDS[path] <= have


def test_errors_of_users_are_value_errors():
    for path in ("autoflip.codec.DecodeError", "autoflip.fed.ConfigError", "autoflip.fed.data.DataError"):
        assert issubclass(find(path), ValueError)


def test_every_name_in_all_exists():
    import autoflip

    for name in autoflip.__all__:
        assert getattr(autoflip, name) is not None
    assert set(autoflip.__all__) <= set(dir(autoflip))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = autoflip.nonsense


def test_import_stays_light():
    heavy = ("typer", "rich", "matplotlib", "sklearn", "flwr", "click", "pandas", "tensorboard", "onnx")
    code = f"import sys, autoflip; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_submodules_stay_light():
    heavy = ("typer", "rich", "matplotlib", "flwr", "onnx")
    code = (
        "import sys, autoflip\n"
        "from autoflip import MaskSet, codec, curvature, explore, fed, loggers, meter, nn, prune, report\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
