"""True Hessian-vector products by double backward, and Hutchinson's estimator on top of them.

``diag H = E[r * (H r)]`` for signs r, with variance ``sum_{j != i} H_ij^2`` a draw: right for every smooth model, but
hundreds of draws are needed where the Gauss-Newton route needs one. The gradient's graph is built once; products
follow one by one, because batching them is slower on a CPU (measured with vmap and is_grads_batched).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoflip import ops
from autoflip.curvature.problem import Problem

Vectors = dict[str, Tensor]


def hessian_product(problem: Problem, names: list[str]) -> Callable[[Mapping[str, Tensor]], Vectors]:
    """Return ``v -> H v`` over the named parameters, H the loss's Hessian in them."""
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


def draws(problem: Problem, count: int, seed: int) -> Iterator[Vectors]:
    """Yield ``count`` independent estimates ``r * (H r)`` of the Hessian's diagonal."""
    names = list(problem.params)
    product = hessian_product(problem, names)
    for i in range(count):
        signs = {
            name: ops.rademacher(seed, i * len(names) + j, tuple(p.shape), dtype=p.dtype, device=p.device)
            for j, (name, p) in enumerate(problem.params.items())
        }
        hv = product(signs)
        yield problem.kept({name: signs[name] * hv[name] for name in names})
