"""Products with the true Hessian, many vectors a pass: an R-operator over the tape, else double backward.

The tape holds one forward pass and one backward pass; each chunk of probes adds tangents to the first and their
changes to the second. A trace needs no product of the weights' own shape: with ``y = x W``, probe ``V`` and gradients
``d`` at ``y``, ``<V, H V>`` is ``<R d, x V> + <d V^T, R x>``, whose four products the passes make anyway, where
double backward makes six.

Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoflip.curvature._product_rules import Product
from autoflip.curvature.problem import Problem
from autoflip.curvature.root import cross_entropy_scale
from autoflip.curvature.tape import Tape, record

Vectors = dict[str, Tensor]
Values = dict[int, Tensor]  # by their number on the tape
# tangents that a pass holds, in floats: they should stay near the core (1 MiB of cache, MLP and CNNs measured)
_PASS_FLOATS = 1 << 20
_MOST_PROBES = 16


class Products:
    """The Hessian of a problem's loss in some parameters, ready to be multiplied.

    Args:
        problem: model, loss and batch.
        names: the parameters; others stay fixed.
        chunk: most probes a pass; None: as many as stay in the cache.
    """

    def __init__(self, problem: Problem, names: Sequence[str], chunk: int | None = None) -> None:
        self.names, self.params = list(names), [problem.params[name] for name in names]
        self.masks = {name: problem.masks[name].to(problem.params[name]) for name in names if name in problem.masks}
        tape = record(problem, self.names)
        curvature = None if tape is None else _loss_curvature(problem, tape.output)
        self.shared = None if tape is None or curvature is None else _Shared(tape, *curvature)
        self.double = _double_backward(problem, self.names) if self.shared is None else None
        least = 1 if self.shared is None else max(1, min(_MOST_PROBES, _PASS_FLOATS // max(1, self.shared.floats())))
        self.chunk = chunk or least

    def __call__(self, v: Mapping[str, Tensor]) -> Vectors:
        """Multiply vectors ``(P, *parameter.shape)``; pruned weights neither move nor answer."""
        v = {name: v[name] * self.masks[name] if name in self.masks else v[name] for name in self.names}
        count = len(v[self.names[0]])
        out = {name: torch.empty_like(v[name]) for name in self.names}
        for i in range(0, count, self.chunk):
            part = {name: v[name][i : i + self.chunk] for name in self.names}
            if self.shared is not None:
                for name, value in self.shared.products(part).items():
                    out[name][i : i + self.chunk] = value
            else:
                assert self.double is not None
                for j in range(len(part[self.names[0]])):
                    for name, value in self.double({name: one[j] for name, one in part.items()}).items():
                        out[name][i + j] = value
        for name, mask in self.masks.items():
            out[name] *= mask
        return out

    def dots(self, v: Mapping[str, Tensor]) -> Vectors:
        """Return ``<v, H v>``, the part of each parameter, ``(P,)``."""
        if self.shared is not None:
            parts = [
                self.shared.dots({name: v[name][i : i + self.chunk] for name in self.names})
                for i in range(0, len(v[self.names[0]]), self.chunk)
            ]
            return {name: torch.cat([part[name] for part in parts]) for name in self.names}
        return {name: _dot(v[name], product) for name, product in self(v).items()}


class _Shared:
    """The R-operator over a tape; ``d`` is the loss's gradient at the output, ``h`` multiplies by its derivative."""

    def __init__(self, tape: Tape, d: Tensor, h: Callable[[Tensor], Tensor]) -> None:
        self.tape, self.h = tape, h
        gradients = {tape.last: d[None]}
        # what the probes change of an operation reads the gradient at its output
        self.gradients: dict[int, Tensor] = {}
        for node in reversed(tape.nodes):
            if (one := gradients.pop(node.output, None)) is None:
                continue
            if node.rule.crosses:
                self.gradients[node.output] = one[0]
            for which, value in enumerate(node.inputs):
                if value is not None and value not in tape.owner:
                    _into(gradients, value, node.rule.pull(one, which))
        self.weights = {
            i: tape.owner[weight]
            for i, node in enumerate(tape.nodes)
            if isinstance(node.rule, Product) and (weight := node.inputs[1]) in tape.owner and weight is not None
        }
        self.last_use = {v: i for i, node in enumerate(tape.nodes) for v in node.inputs if v is not None}

    def floats(self) -> int:
        """Return the size of a probe and of what its products read and write."""
        total = 0
        for node in self.tape.nodes:
            if isinstance(node.rule, Product) and node.output in self.gradients:  # else it was run in vain
                total += node.rule.x.numel() + node.rule.w.numel() + self.gradients[node.output].numel()
        return total

    def products(self, v: Mapping[str, Tensor]) -> Vectors:
        """Return ``H v``."""
        changes = self._pass(v, {})
        leaves = self.tape.leaves.items()
        return {name: changes[i] if i in changes else torch.zeros_like(v[name]) for name, i in leaves}

    def dots(self, v: Mapping[str, Tensor]) -> Vectors:
        """Return ``<v, H v>`` by parameter."""
        sums: Vectors = {}
        changes = self._pass(v, self.weights, sums)
        for name, i in self.tape.leaves.items():
            if i in changes:
                _into(sums, name, _dot(v[name], changes[i]))
            elif name not in sums:
                sums[name] = v[name].new_zeros(len(v[name]))
        return sums

    def _pass(self, v: Mapping[str, Tensor], summed: Mapping[int, str], sums: Vectors | None = None) -> Values:
        """Return the change of each parameter's gradient.

        Of products ``summed`` (node -> whose weight it is) the weight's is not made; its part of ``<v, H v>`` goes to
        ``sums``.
        """
        nodes = self.tape.nodes
        tangents = {i: v[name] for name, i in self.tape.leaves.items()}
        seen: dict[int, list[Any]] = {}
        written: Values = {}  # by a product's own parameters
        for i, node in enumerate(nodes):
            t: list[Any] = [None if value is None else tangents.get(value) for value in node.inputs]
            if i in summed and isinstance(node.rule, Product):
                written[i] = node.rule.by_own(*t[1:])
                tangents[node.output] = node.rule.tangent(t, written[i])
            else:
                tangents[node.output] = node.rule.tangent(t)
            if node.rule.crosses:
                seen[i] = t
            for value in node.inputs:
                if value is not None and self.last_use[value] == i:
                    tangents.pop(value, None)
        last = self.tape.last
        changes = {last: self.h(tangents.pop(last))}
        for i in range(len(nodes) - 1, -1, -1):
            if (change := changes.pop(nodes[i].output, None)) is None:
                continue
            rule, t, cross = nodes[i].rule, seen.pop(i, []), None
            for which, value in enumerate(nodes[i].inputs):
                if value is None:
                    continue
                if which == 1 and i in summed:  # its first operand came before
                    assert sums is not None
                    dot = _dot(change, written.pop(i))
                    _into(sums, summed[i], dot if cross is None else dot + _dot(t[0], cross))
                    continue
                back = rule.pull(change, which)
                cross = rule.cross(self.gradients[nodes[i].output], t, which) if rule.crosses else None
                _into(changes, value, back if cross is None else back + cross)
                if which == 2 and i in summed and sums is not None:
                    _into(sums, summed[i], -_dot(t[2], back))  # the bias's part has its own place
        return changes


def _loss_curvature(problem: Problem, output: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """Return the loss's gradient at ``output``, and the product with its derivative there for many vectors at once.

    None when the loss depends on the weights other than through the output.
    """
    f = output.detach()
    scale = cross_entropy_scale(problem, f) if f.dim() == 2 else None
    f = f.requires_grad_()
    loss = problem.loss(f)
    if not loss.requires_grad:
        return None
    wanted = [f, *problem.params.values()]
    gradient, *direct = torch.autograd.grad(loss, wanted, create_graph=scale is None, allow_unused=True)
    if gradient is None or any(g is not None for g in direct):
        return None
    if scale is not None:
        p = f.detach().softmax(1)
        return gradient, lambda r: scale * p * (r - (p * r).sum(-1, keepdim=True))

    def product(r: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(r)
        rows = [torch.autograd.grad(gradient, f, one, retain_graph=True, allow_unused=True)[0] for one in r]
        return torch.stack([torch.zeros_like(f) if row is None else row for row in rows]).detach()

    return gradient.detach(), product


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if len(a) == 1:  # vecdot would hold the product of large maps
        return torch.dot(a.flatten(), b.flatten()).unsqueeze(0)
    return torch.linalg.vecdot(a.reshape(len(a), -1), b.reshape(len(b), -1))  # of a number, flatten(1) fails


def _into(sums: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _double_backward(problem: Problem, names: list[str]) -> Callable[[Mapping[str, Tensor]], Vectors]:
    """Return ``v -> H v`` for one vector, by differentiating the gradient's graph again."""
    params = [problem.params[name] for name in names]
    # torch's fused attention and cuDNN's recurrent layers have a first derivative only
    recurrent = any(isinstance(module, nn.RNNBase) for module in problem.modules)
    cells = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), cells:
        loss = problem.loss(problem.output())
        gradients = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    moving = [(g, name) for g, name in zip(gradients, names) if g is not None and g.requires_grad]

    def product(v: Mapping[str, Tensor]) -> Vectors:
        if not moving:  # the loss is linear in every parameter
            return {name: torch.zeros_like(p) for name, p in zip(names, params)}
        out = torch.autograd.grad(
            [g for g, _ in moving],
            params,
            [v[name] for _, name in moving],
            retain_graph=True,
            allow_unused=True,
        )
        return {n: torch.zeros_like(p) if h is None else h.detach() for n, p, h in zip(names, params, out)}

    return product
