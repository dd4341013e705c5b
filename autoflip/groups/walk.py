"""Walks a traced graph node by node: layers and functions carry the labels on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from autoflip.groups.flow import Flow, Value
from autoflip.groups.layers import call_module
from autoflip.groups.rules import HARMLESS, call_function

__all__ = ["walk"]


def walk(flow: Flow, graph: fx.Graph, ranks: Sequence[int | None] = ()) -> None:
    """Walk one graph, whose first inputs have these ranks; several graphs of the same model add up in ``flow``."""
    known = iter(ranks)
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
        elif node.op == "placeholder":
            values[node] = Value(rank=next(known, None), batch=True)
        else:
            values[node] = Value()
            if not all(_harmless(user) for user in node.users):
                flow.read_itself(str(node.target))


def _harmless(node: fx.Node) -> bool:
    """Tell whether a node only asks for a tensor's dtype, device or the like."""
    return node.target is getattr and node.args[1] in HARMLESS and node.args[1] != "shape"
