"""Masked linear layers that are made to take a path, whatever a trial would choose."""

import pytest
import torch

from autoflip import nn as sparse
from autoflip.ops import _masked_weight, paths


def forced_layer(path, inputs, outputs, monkeypatch, height=1):
    """A layer that takes ``path``, half of it kept, in blocks of ``height`` rows; skips where this CPU has none."""
    if _masked_weight.CPP is None:
        pytest.skip("the CPU extension is not built")
    if "f" in path and not _masked_weight.CPP.masked_every_together():
        pytest.skip("no kernels that compute every product on this CPU")
    torch.manual_seed(0)
    monkeypatch.setattr(paths, "letters", lambda *_, **__: path)
    layer = sparse.MaskedLinear(inputs, outputs)
    layer.set_mask((torch.rand(outputs // height, inputs) < 0.5).repeat_interleave(height, 0))
    return layer
