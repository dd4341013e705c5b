"""``autoflip export``: the trained model of a run folder, compacted, as an ONNX file."""

from __future__ import annotations

import logging
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

from autoflip.cli.errors import UsageMistake
from autoflip.cli.overrides import load_config

__all__ = ["to_onnx"]


def to_onnx(run_dir: Path, target: Path) -> Path:
    """Write the model of ``run_dir``, dead channels removed, to ``target``; the batch size stays free.

    Raises:
        UsageMistake: the folder holds no finished run, or ONNX's packages are not installed.
        ValueError: model.safetensors does not fit config.toml.
    """
    for name in ("config.toml", "model.safetensors", "masks.safetensors"):
        if not (run_dir / name).is_file():
            raise UsageMistake(f"{run_dir} has no {name}; wanted the folder of a finished run (see autoflip resume)")
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UsageMistake(f"export needs {' and '.join(missing)}; run: pip install {' '.join(missing)}")
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    from autoflip import nn
    from autoflip.fed import data, models
    from autoflip.fed.norms import to_group_norm
    from autoflip.masks import MaskSet

    config = load_config(run_dir / "config.toml", [])
    # the data set decides the shapes and the type of the inputs
    dataset = data.load(config.data.name, config.data.root or None)
    name = models.default_for(dataset.name) if config.model.name == "auto" else config.model.name
    model = models.build(name, input_shape=dataset.input_shape, num_classes=dataset.num_classes)
    if config.model.norm == "group":
        model = to_group_norm(model)
    try:
        model.load_state_dict(load((run_dir / "model.safetensors").read_bytes()))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{run_dir / 'model.safetensors'} does not fit the model {name!r}: {error}") from error
    example = dataset.test.x[:2]
    small = nn.compact(model.eval(), example, MaskSet.load(run_dir / "masks.safetensors")).eval()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(target.name + ".tmp")
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports every package that it does not need
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # external_data=False: one file, which can be renamed
        torch.onnx.export(
            small, (example,), str(scratch), dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
        )
    os.replace(scratch, target)
    return target
