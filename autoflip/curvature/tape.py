"""What a model computed, operation by operation, so that many probes can share its one forward pass.

The operations are those below autograd (``aten``), so modules and functional code look alike. There is no tape, and
double backward does the work, when anything runs that has no rule, when gradients are stopped or written by hand
(``detach``, ``no_grad``, custom functions), or when something that is needed was changed in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autoflip.curvature._layer_rules import RULES, MaxPool, Relu
from autoflip.curvature._rules import SHAPES, Rule
from autoflip.curvature.graph import nodes
from autoflip.curvature.problem import Problem

Key = tuple[Any, ...]


class _UnknownError(Exception):
    """The tape cannot go on; double backward can."""


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        rule: how tangents and gradients pass.
        inputs: the value (its number on the tape) of each operand of the rule; None where nothing moves.
        output: the value it wrote.
    """

    rule: Rule
    inputs: Sequence[int | None]
    output: int


@dataclass(frozen=True)
class Tape:
    """A recorded forward pass.

    Attributes:
        nodes: in the order in which they ran.
        leaves: parameter name -> its value.
        owner: value -> the parameter that it is, seen through changes of shape.
        last: the output's value.
        output: the model's output, detached.
    """

    nodes: Sequence[Node]
    leaves: dict[str, int]
    owner: dict[int, str]
    last: int
    output: Tensor


def record(problem: Problem, names: Sequence[str]) -> Tape | None:
    """Run the model once; None when double backward has to do."""
    params = {name: problem.params[name] for name in names}
    if any(p.dtype not in (torch.float32, torch.float64) or p.numel() == 0 for p in params.values()):
        return None
    recorder = _Recorder(params)
    try:
        with _Stops(), recorder:
            output = problem.model(problem.inputs)
    except _UnknownError:
        return None
    if not isinstance(output, Tensor) or not output.requires_grad or _key(output) not in recorder.values:
        return None
    if any(isinstance(node, BackwardCFunction) for node in nodes(output.grad_fn)):
        return None
    recorder.settle()
    if any(tensor._version != version for tensor, version in recorder.read):
        return None
    leaves = {name: i for i, name in enumerate(names)}
    return Tape(_pooled_first(recorder.nodes), leaves, recorder.owner, recorder.values[_key(output)], output.detach())


def _pooled_first(nodes: list[Node]) -> list[Node]:
    """Turn ``pool(relu(z))`` into ``relu(pool(z))``, the same with a quarter of the values to look at."""
    readers = Counter(value for node in nodes for value in node.inputs)
    out: list[Node] = []
    for node in nodes:
        before = out[-1] if out else node
        behind = isinstance(before.rule, Relu) and node.inputs[0] == before.output and readers[before.output] == 1
        if isinstance(node.rule, MaxPool) and behind:
            out[-1] = Node(node.rule, before.inputs, before.output)
            out.append(Node(Relu([], node.rule.y), [before.output], node.output))
        else:
            out.append(node)
    return out


_STOPS = (Tensor.detach, Tensor.detach_, vars(torch._C.TensorBase)["data"].__get__)


class _Stops(TorchFunctionMode):
    """Give up where the user stops gradients: below autograd that looks like its own bookkeeping."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _STOPS:
            raise _UnknownError
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        # a value is known by where it lies: autograd may wrap a view anew, so objects come and go
        self.values = {_key(p): i for i, p in enumerate(params.values())}
        self.owner = dict(enumerate(params))
        self.held: dict[int, list[Tensor]] = {}  # storage -> what lies in it; alive, so that no address is used twice
        self.nodes: list[Node] = []
        self.read: list[tuple[Tensor, int]] = []
        self.fresh: list[Tensor] = []
        self.kept: set[int] = set()  # storages that rules read
        self.count = len(params)
        for p in params.values():
            self._hold(p)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.settle()
        moving = [t for t in _tensors((args, kwargs)) if _key(t) in self.values]
        if not moving:
            if func._schema.is_mutable and any(_place(t) in self.kept for t in _tensors((args, kwargs))):
                raise _UnknownError  # what a rule reads changes: double backward says so
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "detach":  # autograd keeping an output for later; the user's stop at _Stops
            return func(*args, **kwargs)
        in_place = name.endswith("_")
        rule = RULES.get(name.removesuffix("_"))
        if rule is None or not torch.is_grad_enabled():
            raise _UnknownError
        if in_place and (_key(args[0]) not in self.values or len(self.held[_place(args[0])]) > 1):
            raise _UnknownError
        # ReLU is known by what it leaves; what others overwrite they may need
        given = [args[0].clone(), *args[1:]] if in_place and name != "relu_" else list(args)
        inputs = [self._value(a) for a in rule.operands(args)]
        out = func(*args, **kwargs)
        first = out[0] if isinstance(out, (tuple, list)) else out
        made = rule.of([a.detach() if isinstance(a, Tensor) else a for a in given], kwargs, out)
        if made is None or sum(i is not None for i in inputs) != len(moving):
            raise _UnknownError
        self.fresh = made.kept()
        number, self.count = self.count, self.count + 1
        if name in SHAPES and inputs[0] in self.owner:
            self.owner[number] = self.owner[inputs[0]]
        self.values[_key(first)] = number
        if not in_place:
            self._hold(first)
        self.nodes.append(Node(made, inputs, number))
        return out

    def settle(self) -> None:
        """Note the versions of what the last operation keeps: autograd counts an operation in place after it ran."""
        self.read += [(t, t._version) for t in self.fresh]
        self.kept.update(map(_place, self.fresh))
        self.fresh = []

    def _value(self, operand: Any) -> int | None:
        return self.values.get(_key(operand)) if isinstance(operand, Tensor) else None

    def _hold(self, tensor: Tensor) -> None:
        self.held.setdefault(_place(tensor), []).append(tensor)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _key(tensor: Tensor) -> Key:
    return _place(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    return [t for one in tree for t in _tensors(one)] if isinstance(tree, (tuple, list, type({}.values()))) else []
