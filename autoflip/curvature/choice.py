"""What ``method="auto"`` goes by: whether the exact Gauss-Newton diagonal is right for a model, and worth its price."""

from __future__ import annotations

from autoflip.curvature.gauss_newton import GaussNewton

# exact costs a backward pass a factor, and a product of the size of the forward pass's for layers that see maps
_MAX_FACTORS, _MAX_MAPS = 16, 6


def against_exact(gn: GaussNewton) -> str:
    """Return why the exact diagonal is not the Hessian's or costs far more than some draws; empty when neither."""
    if gn.graph.curved:
        return f"the model is curved ({', '.join(sorted(gn.graph.curved)[:3])}), so Gauss-Newton is an approximation"
    if gn.output.shape[0] != gn.problem.samples:
        return f"the output has {gn.output.shape[0]} rows for {gn.problem.samples} samples"
    if gn.rest:
        return f"{', '.join(gn.rest[:3])} would take a backward pass for every sample and factor"
    if gn.root.factors > _MAX_FACTORS:
        return f"the loss has {gn.root.factors} factors a sample, a backward pass each"
    whole, maps = sum(layer.work for layer in gn.layers), sum(layer.work for layer in gn.layers if layer.dense)
    if gn.root.factors * maps > _MAX_MAPS * whole:
        return f"whole feature maps without pooling would be squared for each of {gn.root.factors} factors"
    return ""
