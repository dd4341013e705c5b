"""Coupled channels: which slices of which tensors must leave a model together."""

from __future__ import annotations

from torch import nn

from autoflip.groups.flow import Flow, graphs_of
from autoflip.groups.units import Axis, Groups, Slice, Unit
from autoflip.groups.walk import walk

__all__ = ["Axis", "Groups", "Slice", "Unit", "find_groups"]


def find_groups(model: nn.Module) -> Groups:
    """Find the coupled channels of ``model``: everything that must be removed together.

    The model is traced with torch.fx (torch's own layers are not entered) and every tensor carries a vector of
    unit ids along one axis: Linear, convolution, LSTM, GRU and Embedding make new units; elementwise functions,
    pooling, dropout and per-channel norms pass them on; adding and multiplying ties them; concatenation joins
    them; flattening repeats them; the next layer's columns read them. Outputs of the model, sizes written as
    constants in ``forward``, and operations that are not known freeze the units that reach them. The columns of a
    Linear that reads the model's input are units too (``Groups.inputs``).

    Inputs are taken to be batched, and optional arguments of ``forward`` to have their defaults.

    Args:
        model: any module. Neither its weights nor its mode change.

    Returns:
        The groups. Where the model cannot be traced they are empty and ``reason`` says why.
    """
    try:
        flow = Flow(model)
        for graph in graphs_of(model):
            walk(flow, graph)
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        return Groups(reason=f"torch.fx cannot trace {type(model).__name__}: {str(error).strip().splitlines()[:1]}")
    return flow.groups()
