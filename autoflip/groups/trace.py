"""Graphs of a model: its forward runs on stand-ins for tensors, and leaves nothing of them behind."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import rnn

__all__ = ["graphs_of", "is_leaf", "untouched"]

_OWN = ("torch.nn.", "torch.ao.nn.", "autoflip.nn.")


class _Tracer(fx.Tracer):
    def __init__(self, *, buffers: bool) -> None:
        super().__init__(autowrap_functions=(rnn.pack_padded_sequence, rnn.pad_packed_sequence))
        self.proxy_buffer_attributes = buffers
        self._autowrap_search.append(rnn)  # also where they are called as nn.utils.rnn.pack_padded_sequence

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


def is_leaf(module: nn.Module) -> bool:
    """Tell whether a module is a layer of torch's (or autoflip's), which tracing does not enter."""
    return f"{type(module).__module__}.".startswith(_OWN) and not isinstance(module, nn.Sequential)


def graphs_of(model: nn.Module) -> list[fx.Graph]:
    """Return the model's graphs in eval and in train mode: which of them asks for ``training``, no code shows."""
    defaults = {
        name: p.default
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.default is None or isinstance(p.default, (bool, int, float, str))
    }
    if is_leaf(model):  # the tracer always enters the root; a bare layer must stay one node
        model, defaults = nn.Sequential(model), {}
    graphs = []
    for training in (False, True):
        try:
            graphs.append(_trace(model, defaults, training=training, buffers=False))
        except Exception:  # self.table[: x.size(0)]: a tensor cannot be cut by a size that is not known yet
            graphs.append(_trace(model, defaults, training=training, buffers=True))
    return graphs


def _trace(model: nn.Module, defaults: dict[str, Any], *, training: bool, buffers: bool) -> fx.Graph:
    with untouched(model):
        for module in model.modules():  # not train(): a model's own may do more, to its weights too
            module.training = training
        return _Tracer(buffers=buffers).trace(model, concrete_args=defaults or None)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back afterwards what code inside writes on modules.

    These are attributes (the mode, lists and dicts too), entries and values of buffers, and values of tensors that
    are plain attributes; not values of parameters.
    """
    boxes: list[Any] = [vars(module) for module in model.modules()]
    boxes += [value for box in boxes for value in box.values() if isinstance(value, (dict, list, set, deque))]
    before = [(box, _content(box)) for box in boxes]
    found = {id(value): value for _, content in before for value in content if isinstance(value, Tensor)}
    tensors = [(tensor, tensor.detach().clone()) for tensor in found.values() if _can_be_kept(tensor)]
    try:
        yield
    finally:
        for box, content in before:
            now = _content(box)
            if len(now) != len(content) or any(a is not b for a, b in zip(now, content, strict=True)):
                box.clear()
                if isinstance(box, dict):
                    box.update(zip(content[::2], content[1::2], strict=True))
                else:
                    (box.update if isinstance(box, set) else box.extend)(content)
        with torch.no_grad():
            for tensor, value in tensors:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _content(box: Any) -> list[Any]:
    return [part for item in box.items() for part in item] if isinstance(box, dict) else list(box)


def _can_be_kept(tensor: Tensor) -> bool:
    strided = tensor.layout is torch.strided and not tensor.is_meta
    return strided and not isinstance(tensor, nn.Parameter) and not is_lazy(tensor)
