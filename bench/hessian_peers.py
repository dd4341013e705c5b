"""Other people's curvature estimators behind one call each: ``pip install pyhessian curvlinops-for-pytorch
backpack-for-pytorch``. Each function returns what that library gives: a diagonal by name, or a trace."""

import copy
import importlib.util

import torch
import torch.nn.functional as F
from torch import nn


def missing(*packages):
    """Return those of ``packages`` that are not installed, in words; empty when all are."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def pyhessian_trace(model, batch, probes):
    from pyhessian import hessian

    mode = model.training
    values = hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=False).trace(maxIter=probes, tol=-1)
    model.zero_grad(set_to_none=True)  # it leaves gradients with graphs behind, and evaluation mode
    model.train(mode)
    return values


def _operator(model, batch):
    from curvlinops import HessianLinearOperator

    params = [p for p in model.parameters() if p.requires_grad]
    return HessianLinearOperator(model, nn.CrossEntropyLoss(), params, [batch], check_deterministic=False)


def curvlinops_trace(model, batch, probes, method):
    import curvlinops

    estimate = {
        "hutchinson": curvlinops.hutchinson_trace,
        "hutch++": curvlinops.hutchpp_trace,
        "xtrace": curvlinops.xtrace,
    }[method]
    return float(estimate(_operator(model, batch), probes))


def curvlinops_diagonal(model, batch, probes, method):
    import curvlinops

    estimate = {"hutchinson": curvlinops.hutchinson_diag, "xdiag": curvlinops.xdiag}[method]
    flat = estimate(_operator(model, batch), probes)
    sizes = [p.numel() for p in model.parameters()]
    return {n: v.view_as(p) for (n, p), v in zip(model.named_parameters(), flat.split(sizes))}


def backpack_extended(model):
    """Return (model, loss) as BackPACK wants them; made once, outside the clock."""
    from backpack import extend

    return extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())


def backpack_diagonal(extended, batch, exact):
    from backpack import backpack
    from backpack.extensions import DiagGGNExact, DiagGGNMC

    model, loss_fn = extended
    model.zero_grad(set_to_none=True)
    extension = DiagGGNExact() if exact else DiagGGNMC(mc_samples=1)
    with backpack(extension):
        loss_fn(model(batch[0]), batch[1]).backward()
    return {n: getattr(p, extension.savefield) for n, p in model.named_parameters()}


def functional_diagonal(model, batch, probes, chunk):
    """Hutchinson by torch.func: vmap over jvp of grad, ``chunk`` probes at once."""
    from torch.func import functional_call, grad, jvp, vmap

    params = {n: p.detach() for n, p in model.named_parameters()}
    gradient = grad(lambda w: F.cross_entropy(functional_call(model, w, batch[0]), batch[1]))

    def product(v):
        h = jvp(gradient, (params,), (v,))[1]
        return {n: v[n] * h[n] for n in v}

    signs = {n: torch.randint(0, 2, (probes, *p.shape)).to(p) * 2 - 1 for n, p in params.items()}
    return {n: v.mean(0) for n, v in vmap(product, chunk_size=chunk)(signs).items()}


def double_backward_diagonal(model, batch, probes):
    """Hutchinson as PyHessian has it, for the diagonal: one graph, one double backward a probe."""
    params = dict(model.named_parameters())
    loss = F.cross_entropy(model(batch[0]), batch[1])
    grads = torch.autograd.grad(loss, params.values(), create_graph=True)
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    for _ in range(probes):
        signs = [torch.randint_like(p, 2) * 2 - 1 for p in params.values()]
        products = torch.autograd.grad(grads, params.values(), signs, retain_graph=True)
        for n, r, h in zip(params, signs, products):
            total[n] += r * h / probes
    return total
