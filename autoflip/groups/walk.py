"""Walks a traced graph node by node: layers and functions carry the labels on."""

from __future__ import annotations

from typing import Any

from torch import fx

from autoflip.groups.flow import Flow, Value
from autoflip.groups.layers import call_module
from autoflip.groups.rules import call_function

__all__ = ["walk"]


def walk(flow: Flow, graph: fx.Graph) -> None:
    """Walk one graph; several graphs of the same model add up in ``flow``."""
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            flow.freeze(args, "output of the model")
        elif node.op == "call_module":
            assert isinstance(node.target, str)
            path = "" if flow.bare else node.target
            module = flow.model if flow.bare else flow.model.get_submodule(node.target)
            values[node] = call_module(flow, module, path, args, kwargs)
        elif node.op in ("call_function", "call_method"):
            values[node] = call_function(flow, node.target, args, kwargs)
        else:
            values[node] = Value(batch=node.op == "placeholder")
