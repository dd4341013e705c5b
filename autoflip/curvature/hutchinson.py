"""True Hessian-vector products by double backward, and Hutchinson's estimator on top of them.

``diag H = E[r * (H r)]`` for signs r, with variance ``sum_{j != i} H_ij^2`` a draw: right for every smooth model, but
hundreds of draws are needed where the Gauss-Newton route needs one. The gradient's graph is built once; products
follow one by one, because batching them is slower on a CPU (measured with vmap and is_grads_batched).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoflip import ops
from autoflip.curvature.problem import Problem

Vectors = dict[str, Tensor]


@contextmanager
def hessian_product(problem: Problem, names: list[str]) -> Iterator[Callable[[Mapping[str, Tensor]], Vectors]]:
    """Yield ``v -> H v`` over the named parameters, H the loss's Hessian in them."""
    params = [problem.params[name] for name in names]
    with _twice_differentiable(problem.model):
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

        yield product


def draws(problem: Problem, count: int, seed: int) -> Iterator[Vectors]:
    """Yield ``count`` independent estimates ``r * (H r)`` of the Hessian's diagonal."""
    names = list(problem.params)
    with hessian_product(problem, names) as product:
        for i in range(count):
            signs = {
                name: ops.rademacher(seed, i * len(names) + j, tuple(p.shape), dtype=p.dtype, device=p.device)
                for j, (name, p) in enumerate(problem.params.items())
            }
            hv = product(signs)
            yield {name: signs[name] * hv[name] for name in names}


@contextmanager
def _twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Let our masked layers compute densely meanwhile: their kernels have a first derivative only."""
    changed: list[nn.Module] = []
    for module in model.modules():
        mask = getattr(module, "mask", None)
        if not type(module).__module__.startswith("autoflip.") or not isinstance(mask, Tensor):
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)) and "forward" not in vars(module):
            module.forward = _dense_forward(module, mask)  # type: ignore[assignment,method-assign]
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _dense_forward(module: nn.Linear | nn.Conv2d, mask: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight = torch.where(mask, module.weight, 0)
        if isinstance(module, nn.Conv2d):
            return module._conv_forward(x, weight, module.bias)
        return F.linear(x, weight, module.bias)

    return forward
