"""Whether a model looks at a sample by itself, found out by running it on other batches.

Batch statistics are seen in autograd's graph; a graph convolution, a mean over the batch or a transposed product is an
operation like any other there, but then a sample's output changes with the company it is in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoflip.curvature.problem import Problem

_FEW = 2  # samples that are run by themselves


def mixes(problem: Problem, output: Tensor) -> bool:
    """Return whether a sample's output depends on the others in the batch; False where that cannot be told.

    Asked with a few samples by themselves; a model that takes no other batch size, with the first in the place of all
    others. A model that says something else each time (dropout) is taken to look at each by itself.

    Args:
        problem: model and batch.
        output: of the whole batch.
    """
    count = problem.samples
    if count < 2 or output.shape[0] != count:
        return False
    few = min(_FEW, count // 2)
    batch, seen = problem.inputs[:few].clone(), few
    again = _run(problem, batch)
    if again is None or again.shape[0] != few:
        seen, batch = 1, torch.cat([problem.inputs[:1]] * count)
        again = _run(problem, batch)
    if again is None or again.shape[1:] != output.shape[1:] or close(again[:seen], output.detach()[:seen]):
        return False
    once_more = _run(problem, batch)
    return once_more is not None and close(once_more, again)


def close(got: Tensor, want: Tensor) -> bool:
    """Return whether two outputs are equal but for the order of sums; another sample's influence is off by far more."""
    return bool((got - want).abs().max() <= torch.finfo(got.dtype).eps ** 0.5 * want.abs().max())


def _run(problem: Problem, inputs: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            output = problem.model(inputs)
    except Exception:  # a batch of another size does not pass, or a second one
        return None
    return output if isinstance(output, Tensor) and output.dim() else None
