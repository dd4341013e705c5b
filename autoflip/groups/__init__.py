"""Coupled channels: which slices of which tensors must leave a model together."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from autoflip.groups.flow import Flow
from autoflip.groups.layers import hooked
from autoflip.groups.trace import graphs_of, untouched
from autoflip.groups.units import Axis, Groups, Slice, Unit
from autoflip.groups.walk import walk

__all__ = ["Axis", "Groups", "Slice", "Unit", "find_groups"]


def find_groups(model: nn.Module, example_inputs: Any = None) -> Groups:
    """Find the coupled channels of ``model``: everything that must be removed together.

    The model is traced with torch.fx (torch's own layers are not entered) and every tensor carries a vector of
    unit ids along one axis: Linear, convolution, LSTM, GRU and Embedding make new units; elementwise functions,
    pooling, dropout and per-channel norms pass them on; adding and multiplying ties them; concatenation joins
    them; flattening repeats them; the next layer's columns read them. Outputs of the model, sizes written as
    constants in ``forward``, operations that are not known, hooks on a layer and a layer's tensors that ``forward``
    reads itself freeze the units that reach them. The columns of a Linear that reads the model's input are units too
    (``Groups.inputs``).

    Inputs are taken to be batched, and optional arguments of ``forward`` to have their defaults. Without
    ``example_inputs`` it is not known how many dimensions Linear and Embedding return: what works along one of them
    by its number then freezes; a per-channel norm with tensors of its own takes them for ``(N, C)``, and raises in
    a smaller model where they are not.

    Args:
        model: any module. Neither its weights nor its mode change, nor its buffers and attributes.
        example_inputs: one input, or a tuple of arguments; only their numbers of dimensions are looked at.

    Returns:
        The groups. Where the model cannot be traced they are empty and ``reason`` says why.
    """
    try:
        graphs, flow = graphs_of(model), Flow(model)
        with untouched(model):  # a parametrization in train mode may count how often its tensor is asked for
            for graph in graphs:
                walk(flow, graph, () if hooked(model) else _ranks(example_inputs))
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        return Groups(reason=f"torch.fx cannot trace {type(model).__name__}: {str(error).strip().splitlines()[:1]}")
    return flow.groups()


def _ranks(example_inputs: Any) -> list[int | None]:
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    return [arg.ndim or None if isinstance(arg, Tensor) else None for arg in args]
