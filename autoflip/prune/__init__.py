"""Choose what to keep: single weights, blocks and whole channels, from magnitudes or from any scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from autoflip.groups import Groups, find_groups
from autoflip.masks import MaskSet
from autoflip.prune.arguments import check_block, check_finite, check_share, layers_named, scores_of
from autoflip.prune.cuts import choose_inputs, choose_units, cut, cut_inside

__all__ = ["by_scores", "hybrid", "magnitude", "paper", "random", "weights"]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that pruning covers: weights of Linear, convolution and recurrent layers, by name.

    Biases, norms and embeddings are left out; so are tensors inside attention, which never run as layers. A weight
    that several layers share comes once, under the name that ``model.named_parameters()`` has for it.
    """
    inside = {id(m) for a in model.modules() if isinstance(a, nn.MultiheadAttention) for m in a.modules()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: parameter.detach()
        for module in model.modules()
        if isinstance(module, (nn.Linear, _ConvNd, nn.RNNBase)) and id(module) not in inside
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim >= 2
    }


def magnitude(model: nn.Module, density: float = 0.2) -> MaskSet:
    """Keep the weights of largest absolute value, one cut through the whole model.

    Args:
        model: its :func:`weights` are covered.
        density: kept share of the covered weights, in (0, 1].

    Returns:
        One mask per weight tensor; every tensor keeps at least its best entry.

    Raises:
        ValueError: density is outside (0, 1], or the model has nothing to prune.
    """
    return by_scores({name: w.abs() for name, w in _weights(model, "magnitude").items()}, density)


def random(model: nn.Module, density: float = 0.2, seed: int = 0) -> MaskSet:
    """Keep weights at random, uniformly over the whole model; the same ones for the same ``seed``.

    Args, returns and errors as in :func:`magnitude`.
    """
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"random: seed is {seed!r}, wanted an integer of 64 bits")
    g, found = torch.Generator().manual_seed(seed), _weights(model, "random")
    return by_scores(
        {name: torch.rand(w.shape, generator=g, dtype=torch.float32) for name, w in found.items()}, density
    )


def by_scores(scores: Mapping[str, Tensor], density: float = 0.2) -> MaskSet:
    """Keep the entries of highest score, one cut through all tensors.

    Args:
        scores: name -> tensor of real numbers, higher = keep; compared as float64 where one is float64 or holds wide
            integers.
        density: kept share of all their entries, in (0, 1]; met to half an entry.

    Returns:
        One mask per tensor. Equal scores go to the earlier entry; every tensor keeps at least its best entry.

    Raises:
        ValueError: density is outside (0, 1], there is no score, or one is not finite.
    """
    check_share("density", density)
    check_finite(scores)
    if not any(s.numel() for s in scores.values()):
        raise ValueError("by_scores: there is no score to cut by; wanted name -> tensor for at least one weight")
    wide = any(s.dtype in (torch.float64, torch.int64, torch.int32) for s in scores.values())
    dtype = torch.float64 if wide else torch.float32  # in which no two scores become one
    cells = {name: s.detach().to("cpu", dtype).reshape(1, -1) for name, s in scores.items() if s.numel()}
    kept = cut(cells, round(density * sum(c.numel() for c in cells.values())))
    kept |= {name: torch.ones(s.shape, dtype=torch.bool) for name, s in scores.items() if not s.numel()}
    return MaskSet({name: kept[name].reshape(s.shape) for name, s in scores.items()})


def hybrid(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    density: float = 0.1,
    channels: float = 0.4,
    block: tuple[int, int] | None = None,
    *,
    inputs: float = 1.0,
    round_to: int | str | None = None,
    protect: Iterable[str] = (),
    groups: Groups | None = None,
    flops: Mapping[str, float] | None = None,
    flops_exponent: float = 0.0,
) -> MaskSet:
    """Remove whole channels first, then single weights inside what is left.

    A channel's score is the mean, over the weight tensors it owns rows or columns of, of (mean score of its
    slice) / (mean score of that tensor), so it does not change when one tensor's scores are scaled. One cut
    through all layers keeps ``channels`` of the units; every layer keeps at least a tenth of its units and at
    least four channels. Units are those of :func:`autoflip.groups.find_groups`: all coupled channels go together, with
    their rows, columns, biases, norm parameters and running stats. Inputs of the model that a Linear reads are ranked
    by the sum of their column's scores. Weights are then cut globally by raw score.

    Args:
        model: its :func:`weights` are covered, and every tensor of a removed channel.
        scores: name -> float tensor for every covered weight, taken as float32, higher = keep; protected layers may do
            without. Those of exploration are 0 where a weight is frozen: protect its layer.
        density: wanted ``MaskSet.density`` of the result, in (0, 1]. Where removing channels alone goes below
            it, nothing more is cut.
        channels: kept share of the removable units, in (0, 1]; 1 keeps all.
        block: (rows, columns) that live or die together, counted in the compact model (a convolution's weight
            read as ``(out, in * kh * kw)``); blocks at the rim are smaller.
        inputs: kept share of the model's inputs, where a Linear reads them, in (0, 1]; 1 keeps all.
        round_to: kept channels of a layer are rounded to a multiple of this. Default: 16 for convolutions of 32
            channels or more, 4 for smaller ones, 1 elsewhere: the same masks on every machine. "auto" asks the
            machine that prunes, for its own sake: oneDNN's cost is a staircase in channels. Of 64 (3x3, forward and
            backward, 1 thread) 32 cost 0.4, 33 to 48 0.5 to 0.6 and 52 to 60 0.9 with AVX-512, so 16 pays there, and 8
            below that (of 16, 12 cost 0.7 to 1.1, 8 0.6 to 0.7); with AVX2 8 pays throughout (of 64, 24 cost
            0.20, 32 0.28, 40 0.49, 48 0.59). Xeon (Sapphire Rapids), bench/bench_compact.py.
        protect: layers (names as in ``named_modules()``) that keep all units and all weights of what is left.
        groups: the model's groups, to save finding them again.
        flops: weight name -> what it costs, see :func:`autoflip.meter.layer_flops`; missing: nothing.
        flops_exponent: power of a channel's FLOPs per weight, against the mean of all channels, by which its score is
            divided, in [0, 1]: 0 ranks what its weights bring, 1 what they bring per FLOP.

    Returns:
        Masks of all covered weights, and of the other tensors that lost a channel. Every remaining row of
        weights keeps its best entry (or block) as far as the density allows, so that no layer dies.

    Raises:
        ValueError: shares outside (0, 1], scores that are missing, not finite or of another shape, a block or a
            layer name that does not fit, protected layers that are more than ``density`` keeps.
    """
    check_share("density", density)
    check_share("channels", channels)
    check_share("inputs", inputs)
    if not isinstance(flops_exponent, Real) or not 0 <= flops_exponent <= 1 or (flops_exponent and not flops):
        raise ValueError(
            f"hybrid: flops_exponent is {flops_exponent!r} and flops names {len(flops or ())} weights; wanted a power "
            "in [0, 1] and, above 0, flops=meter.layer_flops(model, example)"
        )
    covered = _weights(model, "hybrid")
    shielded = layers_named(covered, protect)
    scores = scores_of(covered, scores, [name for name in covered if name.rpartition(".")[0] in shielded])
    check_block(block, covered)
    groups = find_groups(model) if groups is None else groups
    removed = choose_units(groups, scores, channels, _steps(model, groups, round_to), shielded, flops, flops_exponent)
    removed |= choose_inputs(groups, scores, removed, inputs, shielded)
    state = model.state_dict()
    touched = {axis.tensor for axis in groups.axes if bool(removed[axis.units].any())}
    masks = {name: torch.ones(state[name].shape, dtype=torch.bool) for name in state if name in touched | {*covered}}
    for axis in groups.axes:
        if axis.tensor in masks:
            masks[axis.tensor].movedim(axis.dim, 0)[removed[axis.units]] = False
    total = sum(mask.numel() for mask in masks.values())
    open_to_cut = {name: scores[name] for name in covered if name.rpartition(".")[0] not in shielded}
    whole = sum(int(mask.sum()) for name, mask in masks.items() if name not in open_to_cut)
    budget = round(density * total) - whole
    if shielded and (budget < 0 or (open_to_cut and not budget)):
        raise ValueError(
            f"hybrid: the protected layers alone keep {whole} of {total} weights, and density={density:g} keeps "
            f"{budget + whole} in all. Protect fewer, or keep more"
        )
    if open_to_cut and sum(int(masks[name].sum()) for name in open_to_cut) > budget:
        masks.update(cut_inside(open_to_cut, masks, budget, block or (1, 1)))
    return MaskSet(masks)


def paper(deviations: Mapping[str, Tensor], threshold: float = 0.3) -> MaskSet:
    """Apply the pruning rule of AutoFLIP: min-max per tensor, then one quantile over everything.

    ``G' = (G - min G) / (max G - min G)`` per tensor; kept where ``G' > tau``, tau the ``threshold`` quantile
    (linear interpolation) of all ``G'`` together. Biases and norms are treated like weights. A constant tensor
    has no G' and is kept whole.

    Args:
        deviations: name -> mean squared deviation of the explorers from the start, >= 0.
        threshold: T_p, share of all entries that is pruned, in [0, 1).

    Returns:
        One mask per tensor.

    Raises:
        ValueError: threshold is outside [0, 1), or a value is not finite.

    Source: Internò et al., arXiv:2405.10271.
    """
    if not isinstance(threshold, Real) or not 0 <= threshold < 1:
        raise ValueError(f"paper: threshold is {threshold!r}, wanted a share in [0, 1); 0.3 prunes 30 % of all entries")
    check_finite(deviations)
    scaled = {}
    for name, tensor in deviations.items():
        values = tensor.detach().double().cpu()
        if values.numel() and float(values.max()) > float(values.min()):
            scaled[name] = (values - values.min()) / (values.max() - values.min())
    if not scaled:
        return MaskSet({name: torch.ones(t.shape, dtype=torch.bool) for name, t in deviations.items()})
    # torch.quantile refuses more than 2^24 entries
    tau = float(np.quantile(torch.cat([values.flatten() for values in scaled.values()]).numpy(), threshold))
    return MaskSet(
        {n: scaled[n] > tau if n in scaled else torch.ones(t.shape, dtype=torch.bool) for n, t in deviations.items()}
    )


def _weights(model: nn.Module, what: str) -> dict[str, Tensor]:
    found = weights(model)
    if not found:
        raise ValueError(
            f"{what}: {type(model).__name__} has no Linear, convolution or recurrent weights to prune; "
            "give by_scores() the tensors you mean"
        )
    return found


def _steps(model: nn.Module, groups: Groups, round_to: int | str | None) -> dict[str, tuple[int, int]]:
    """Return layer -> the multiples its kept channels are rounded to: many of them, and few."""
    counts = isinstance(round_to, int) and not isinstance(round_to, bool) and round_to >= 1
    if not (round_to is None or round_to == "auto" or counts):
        raise ValueError(
            f"hybrid: round_to is {round_to!r}, wanted a count of channels, at least 1 (1 does not round), or 'auto' "
            "for the multiple that pays on this machine"
        )
    wide, narrow = 16, 4
    if round_to == "auto":
        wide, narrow = (16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8), 8
    modules = dict(model.named_modules())
    steps = {}
    for layer, units in groups.by_layer().items():
        size = len(units) * groups.width(layer)
        fits = (wide if size >= 32 else narrow) if isinstance(modules.get(layer), _ConvNd) else 1
        step = round_to if isinstance(round_to, int) else fits
        step = step if size >= step else 1
        steps[layer] = (step, min(step, narrow) if round_to == "auto" else step)
    return steps
