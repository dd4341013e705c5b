"""The layers whose parameters' squares are summed where they run, and how they are found.

Known kinds: Linear (also on sequences), Conv1d/Conv2d, Embedding, and the affine part of normalisation layers
(BatchNorm in evaluation mode, LayerNorm, GroupNorm). Any other parameter is the caller's to handle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoflip.curvature.chained import Conv, Linear
from autoflip.curvature.layer import Layer, squares_of


class _Norm(Layer):
    def squares(self, d: Sequence[Tensor], x: Tensor, rows: slice) -> dict[str, Tensor]:
        m: Any = self.module
        if isinstance(m, nn.LayerNorm):
            normal = F.layer_norm(x, m.normalized_shape, None, None, m.eps)
            positions = tuple(range(1, x.dim() - len(m.normalized_shape)))
        elif isinstance(m, nn.GroupNorm):
            normal = F.group_norm(x, m.num_groups, None, None, m.eps)
            positions = tuple(range(2, x.dim()))
        else:
            normal = F.batch_norm(x, m.running_mean, m.running_var, None, None, False, 0.0, m.eps)
            positions = tuple(range(2, x.dim()))

        def summed(g: Tensor) -> Tensor:
            return g.sum(positions) if positions else g

        return {"weight": squares_of(d, lambda g: summed(g * normal)), "bias": squares_of(d, summed)}


class _Embedding(Layer):
    receives = True

    def squares(self, d: Sequence[Tensor], x: Tensor, rows: slice) -> dict[str, Tensor]:
        m: Any = self.module
        tokens = x.reshape(len(x), -1)  # (N, P)
        pairs, where = torch.unique(
            torch.arange(len(tokens), device=tokens.device)[:, None] * m.num_embeddings + tokens, return_inverse=True
        )
        total = d[0].new_zeros(m.num_embeddings, m.embedding_dim)
        for one in d:
            # a token that a sample reads twice adds up before it is squared
            sums = one.new_zeros(len(pairs), m.embedding_dim)
            sums.index_add_(0, where.flatten(), one.reshape(-1, m.embedding_dim))
            total.index_add_(0, pairs % m.num_embeddings, sums.square())
        if m.padding_idx is not None:
            total[m.padding_idx] = 0
        return {"weight": total}


def _kind(module: nn.Module) -> type[Layer] | None:
    """Return who can square this module's gradients; None for a subclass that computes something else."""

    def plain(base: type[nn.Module]) -> bool:
        # our masked layers are linear in their weight like their bases; of strangers only an unchanged forward is
        ours = type(module).__module__.startswith("autoflip.") and getattr(module, "activation", None) is None
        return isinstance(module, base) and (ours or type(module).forward is base.forward)

    if "weight" not in module._parameters:  # reparametrised: weight is computed from other tensors
        return None
    if "forward" in vars(module):  # someone's own, in this one's place
        return None
    if "inputs" in module._buffers:  # nn.SelectingLinear: its weight does not read all that reaches it
        return None
    if plain(nn.Linear):
        return Linear
    if plain(nn.Conv2d) or plain(nn.Conv1d):
        return Conv
    if plain(nn.Embedding):
        return None if module.max_norm is not None or module.scale_grad_by_freq or module.sparse else _Embedding
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if isinstance(module, batch_norms):
        frozen = not module.training and module.running_mean is not None
        return _Norm if frozen and type(module) in batch_norms else None
    return _Norm if type(module) in (nn.LayerNorm, nn.GroupNorm) else None


class _Watched:
    """Stands in for one module's ``forward`` and writes down that it ran; a forward hook costs three times as much."""

    def __init__(self, kind: type[Layer], module: nn.Module, samples: int, layers: list[Layer]) -> None:
        self.kind, self.module, self.samples, self.layers = kind, module, samples, layers
        self.run = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = self.run(*args, **kwargs)
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not y.requires_grad:
            return y
        if _first_is_sample(self.module, x, self.samples):
            self.layers.append(self.kind(self.module, x, y))
        return y


@contextmanager
def watch(modules: Iterable[nn.Module], samples: int) -> Iterator[list[Layer]]:
    """Collect the known layers that run inside the block; their ``forward`` is as it was afterwards."""
    layers: list[Layer] = []
    known = [(module, kind) for module in modules if (kind := _kind(module)) is not None]
    try:
        for module, kind in known:
            vars(module)["forward"] = _Watched(kind, module, samples, layers)
        yield layers
    finally:
        for module, _ in known:
            vars(module).pop("forward", None)


def _first_is_sample(module: nn.Module, x: Tensor, samples: int) -> bool:
    if x.dim() == 0 or x.shape[0] != samples:
        return False  # rows of several samples mixed, or time first
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return x.dim() == (3 if isinstance(module, nn.Conv1d) else 4)
    if isinstance(module, nn.Embedding):
        return x.dim() == 1 or samples == 1 or x.shape[1] != samples
    if isinstance(module, (nn.Linear, nn.LayerNorm)):
        # (T, N, K) with T == N cannot be told from (N, T, K)
        return x.dim() == 2 or (x.dim() > 2 and (samples == 1 or x.shape[1] != samples))
    return x.dim() >= 2
