"""What pruning's functions are given: checked, with errors that say what came and what was wanted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_block", "check_finite", "check_share", "layers_named", "scores_of"]


def check_share(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a share in (0, 1]."""
    if not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise ValueError(f"prune: {name} is {value!r}, wanted the kept share, above 0 and at most 1 (1 keeps all)")


def check_mapping(scores: Any) -> None:
    """Raise ValueError unless ``scores`` maps names to tensors."""
    if not isinstance(scores, Mapping):
        raise ValueError(
            f"prune: scores are a {type(scores).__name__}, wanted a mapping from weight name to float tensor, such "
            "as {name: w.abs() for name, w in prune.weights(model).items()}"
        )
    for name, tensor in scores.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"prune: scores of {name!r} are a {type(tensor).__name__}, wanted a tensor of numbers")
        if tensor.is_complex() or tensor.is_meta or tensor.layout is not torch.strided:
            got = "without values (meta)" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            raise ValueError(f"prune: scores of {name!r} are {got}, wanted a dense tensor of real numbers")


def check_finite(scores: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless ``scores`` maps names to tensors of finite numbers."""
    check_mapping(scores)
    for name, tensor in scores.items():
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"prune: scores of {name!r} hold {bad} values that are NaN or infinite; every score must be a "
                "number. Did an exploring client diverge?"
            )


def scores_of(
    covered: Mapping[str, Tensor], scores: Mapping[str, Tensor], spared: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return the ``covered`` weights' scores, float32 on the CPU; only those in ``spared`` may be missing.

    Raises:
        ValueError: one is missing or does not fit.
    """
    check_mapping(scores)
    for name, weight in covered.items():
        if name not in scores and name in spared:
            continue
        if name not in scores:
            raise ValueError(
                f"hybrid: there are no scores for {name!r}; every weight needs one. Scores came for "
                f"{', '.join(list(scores)[:8]) or 'nothing'}. Were they made for another model?"
            )
        if scores[name].shape != weight.shape:
            raise ValueError(
                f"hybrid: scores of {name!r} have shape {tuple(scores[name].shape)} but the weight has "
                f"{tuple(weight.shape)}. Did the model get compacted after the scores were made?"
            )
    mine = {name: scores[name].detach().float().cpu() for name in covered if name in scores}
    check_finite(mine)
    return mine


def check_block(block: tuple[int, int] | None, covered: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless ``block`` is None or a pair of counts that fits a covered weight."""
    if block is None:
        return
    pair = isinstance(block, (tuple, list)) and len(block) == 2
    if not pair or not all(isinstance(n, int) and n > 0 for n in block):
        raise ValueError(f"hybrid: block is {block!r}, wanted two positive counts (rows, columns), such as (16, 1)")
    sizes = [(len(w), w[0].numel()) for w in covered.values()]
    if not any(block[0] <= rows and block[1] <= columns for rows, columns in sizes):
        raise ValueError(
            f"hybrid: a block of {block[0]} rows and {block[1]} columns fits no weight of this model; the largest "
            f"has {max(sizes, key=lambda size: size[0] * size[1])}. Choose a smaller block"
        )


def layers_named(covered: Mapping[str, Tensor], protect: Iterable[str]) -> set[str]:
    """Return the names in ``protect``; ValueError where one is no layer of a covered weight."""
    layers = {name.rpartition(".")[0] for name in covered}
    names = {protect} if isinstance(protect, str) else set(protect)
    if unknown := sorted(names - layers):
        raise ValueError(f"hybrid: protect names {unknown[0]!r}, but the layers are {', '.join(sorted(layers))}")
    return names
