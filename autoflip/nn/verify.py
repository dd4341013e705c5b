"""A small model verified on examples: does it run, and does it give what the masked model gives?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from autoflip.groups.trace import untouched

__all__ = ["outputs", "verify"]

_MISFITS = (RuntimeError, ValueError, TypeError, IndexError)  # what torch raises where sizes do not fit
_HINT = "pass groups=Groups() to leave every size alone"


def outputs(model: nn.Module, example_inputs: Any, seed: int = 0) -> list[Tensor] | Exception:
    """Return the model's floating outputs on the examples, in eval mode; or what it raised.

    Nothing is left on the model, nor on torch's generator of the CPU.
    """
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    try:
        with untouched(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for module in model.modules():
                module.training = False
            found = tree_flatten(model(*args))[0]
    except _MISFITS as error:
        return error
    return [t.detach().clone() for t in found if isinstance(t, Tensor) and t.is_floating_point() and not t.is_sparse]


def verify(small: nn.Module, example_inputs: Any, wanted: list[Tensor] | Exception | None) -> None:
    """Raise where a small model does not run, or gives other values than are wanted.

    Rounding differs, so outputs may by the root of their dtype's epsilon, relative to the largest: a thousand times
    what one sum is off by. Models that draw random numbers in eval mode are not compared.
    """
    given = outputs(small, example_inputs)
    if isinstance(given, Exception):
        raise ValueError(
            f"compact: the small model does not run on example_inputs ({given}). Do they suit the full model? "
            f"If so, forward or a hook relies on a size that changed; {_HINT}"
        ) from given
    if wanted is None or isinstance(wanted, Exception) or _alike(given, wanted):
        return
    again = outputs(small, example_inputs, seed=1)
    if isinstance(again, Exception) or not _alike(given, again):
        return
    raise ValueError(
        "compact: the small model gives other values on example_inputs than the masked one, so forward does "
        f"something that was not followed; {_HINT}, and report the model"
    )


def _alike(given: list[Tensor], wanted: list[Tensor]) -> bool:
    if [t.shape for t in given] != [t.shape for t in wanted]:
        return False
    for a, b in zip(given, wanted, strict=True):
        finite = b.isfinite()
        most = b[finite].abs().max().item() if bool(finite.any()) else 0.0
        slack = torch.finfo(b.dtype).eps ** 0.5
        if not torch.allclose(a, b, rtol=slack, atol=slack * most, equal_nan=True):
            return False
    return True
