"""What each torch layer does to the units that reach it, and which of its tensors they label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autoflip.groups.flow import Flow, Value, fit
from autoflip.groups.rules import POOLS
from autoflip.groups.shapes import every, flatten, pool, softmax, spatial
from autoflip.groups.trace import is_leaf

__all__ = ["call_module", "hooked"]

_ZERO = (  # f(0) = 0
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.Tanh, nn.SiLU, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish),
    *(nn.Hardswish, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
_OF_LAYER = ("forward", "_ff_block")  # what a transformer layer runs
_OF_CHANNELS = ("weight", "bias", "running_mean", "running_var")  # a norm's tensors
_ELEMENT = (
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid, nn.Hardtanh, nn.Threshold),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)


def call_module(flow: Flow, module: nn.Module, path: str, args: tuple, kwargs: dict) -> Any:
    """Return what a torch layer makes of its arguments, and write down its tensors."""
    x = args[0] if args else kwargs.get("input", Value())
    rest = (args[1:], {k: v for k, v in kwargs.items() if k != "input"})
    if not isinstance(x, Value):
        flow.freeze((args, kwargs), f"read by {path} in a way that is not known")
        return Value()
    if any(hooked(part) for part in module.modules()):
        flow.reasons[path] = "a hook, or a forward of its own, may change what it reads or returns"
        flow.freeze((args, kwargs), f"read by {path}, which has a hook or a forward of its own")
        return Value()
    for kinds, rule in _MODULES:
        if isinstance(module, kinds):
            return rule(flow, module, path, x, rest)
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(module).__name__).strip("_")
    name = name.replace("l_p_pool", "lp_pool")
    if name in POOLS and not getattr(module, "return_indices", False):
        return pool(flow, x, name, getattr(module, "output_size", None))
    for part, inner in module.named_modules(prefix=path):
        if isinstance(inner, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            _feed_forward(flow, inner, part)
    flow.freeze((args, kwargs), f"read by {path} ({type(module).__name__}), which is kept whole")
    return Value()


def hooked(module: nn.Module) -> bool:
    """Tell whether a module may read or return something else than torch's: by hooks, or a forward put in its place.

    Hooks of autoflip's own change neither.
    """
    if "forward" in vars(module):
        return True
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(not (getattr(hook, "__module__", None) or "").startswith("autoflip.") for hook in hooks)


def _linear(flow: Flow, module: Any, path: str, x: Value, rest: Any) -> Value:
    source: tuple[int, ...] = ()
    if x.batch and not x.ids and not x.stack:  # no layer's channels: the layer itself may pick what it reads
        source = flow.new(f"{path}:inputs", module.in_features)
        x = replace(x, axis=-1, ids=source)
        flow.impure.update(source)
    if flow.inputs.setdefault(path, source) != source:
        flow.freeze_ids((*source, *flow.inputs[path]), f"{path} also reads something else")
    if x.ids and x.axis != -1:
        flow.freeze(x, f"{path} works along another dimension")
        x = replace(x, ids=())
    flow.reads(module, path, "weight", 1, x, module.in_features)
    ids = flow.new(path, module.out_features)
    flow.record(module, path, "weight", 0, ids, produces=True)
    flow.record(module, path, "bias", 0, ids, produces=True)
    return Value(rank=x.rank, ids=ids, batch=x.batch)


def _conv(flow: Flow, module: Any, path: str, x: Value, rest: Any) -> Value:
    spatial = len(module.kernel_size)
    axis, groups, outs = -1 - spatial, module.groups, module.out_channels
    if rest[0] or rest[1] or (x.ids and (x.axis != axis or x.spread)):
        flow.freeze((x, rest), f"read by {path} in a way that is not known")
        x = replace(x, ids=())
    in_dim, out_dim = (0, 1) if isinstance(module, _ConvTransposeNd) else (1, 0)
    ids: tuple[int, ...]
    if groups == 1:
        flow.reads(module, path, "weight", in_dim, x, module.in_channels)
        ids = flow.new(path, outs)
    elif in_dim == 0 or len(x.ids) != module.in_channels:
        flow.freeze(x, f"read by {path}, a grouped convolution")
        flow.bar(module, path, "weight", dim=in_dim)
        ids = flow.new(path, outs)
        flow.freeze_ids(ids, "a grouped convolution whose input channels stay")
    elif groups == module.in_channels:  # depthwise: no units of its own
        ids = tuple(unit for unit in x.ids for _ in range(outs // groups))
    else:  # the same ranks must leave every group, so that all groups stay equally wide
        width, height = module.in_channels // groups, outs // groups
        for start in range(width, len(x.ids), width):
            flow.tie(x.ids[:width], x.ids[start : start + width])
        flow.record(module, path, "weight", 1, x.ids[:width], produces=False)
        ids = flow.new(path, height) * groups
    flow.record(module, path, "weight", out_dim, ids, produces=True)
    flow.record(module, path, "bias", 0, ids, produces=True)
    return Value(rank=2 + spatial, axis=axis, ids=ids, batch=x.batch)


def _norm(flow: Flow, module: Any, path: str, x: Value, rest: Any) -> Value:
    grouped = isinstance(module, nn.GroupNorm)
    size = module.num_channels if grouped else module.num_features
    ids = fit(x, size)
    stateless = getattr(module, "weight", None) is None and getattr(module, "running_mean", None) is None
    flat = isinstance(module, nn.modules.instancenorm._InstanceNorm) and (x.rank or 0) < 3  # (N, C) is (C, L) to it
    if not ids or flat or not _second(x, checked=not stateless):
        flow.freeze(x, f"read by {path}, whose {size} channels do not fit")
        flow.bar(module, path, *_OF_CHANNELS)
        flow.freeze_ids(flow.sizes.get(path, ()), f"{path} is called with different inputs")
        flow.sizes[path] = ()
        return replace(x, ids=())
    if grouped:  # the channels of a group are averaged together, so they go together
        width = size // module.num_groups
        for start in range(0, size, width):
            flow.tie(ids[start : start + 1] * width, ids[start : start + width])
    for name in _OF_CHANNELS:
        flow.record(module, path, name, 0, ids, produces=True)
    if stateless:
        if len(flow.sizes.setdefault(path, ids)) == len(ids):
            flow.tie(flow.sizes[path], ids)
        else:
            flow.freeze_ids((*flow.sizes[path], *ids), f"{path} is called with different inputs")
    if getattr(module, "weight", None) is None:
        flow.impure.update(ids)
    return replace(x, ids=ids, spread="")


def _second(x: Value, *, checked: bool) -> bool:
    """Tell whether the units lie along dimension 1, as per-channel layers want them.

    Where the rank is not known they are taken to, if the layer has tensors whose size is ``checked``: should they
    not, the smaller layer raises.
    """
    return checked if x.rank is None else x.dim(1) == x.axis


def _embedding(flow: Flow, module: Any, path: str, x: Value, rest: Any) -> Value:
    ids = flow.new(path, module.embedding_dim)
    flow.record(module, path, "weight", 1, ids, produces=True)
    if module.max_norm is not None:
        flow.freeze_ids(ids, "max_norm depends on the whole row")
    flow.freeze((x, rest), f"read by {path} as indices, or beside them")
    bag = isinstance(module, nn.EmbeddingBag)
    return Value(rank=2 if bag else x.rank and x.rank + 1, ids=ids, batch=x.batch and not bag)


def _recurrent(flow: Flow, module: Any, path: str, x: Value, rest: Any) -> Any:
    if x.ids and x.axis != -1:
        flow.freeze(x, f"{path} works along another dimension")
        x = replace(x, ids=())
    gates = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}[module.mode]
    turns = ("", "_reverse") if module.bidirectional else ("",)
    for turn in turns:
        flow.reads(module, path, f"weight_ih_l0{turn}", 1, x, module.input_size)
    lstm = module.mode == "LSTM"
    if module.proj_size:
        flow.reasons[path] = "projected recurrent layers keep their hidden size"
        plain = Value(rank=3, batch=x.batch)
        return (plain, (plain, plain) if lstm else plain)
    stack: list[tuple[int, ...]] = []  # in the order of torch's states: layer by layer, forward then reverse
    for k in range(module.num_layers):
        below = tuple(unit for ids in stack[-len(turns) :] for unit in ids)
        for turn in turns:
            several = module.num_layers * len(turns) > 1
            ids = flow.new(f"{path}:{k}{turn}" if several else path, module.hidden_size)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                flow.record(module, path, f"{name}_l{k}{turn}", 0, ids * gates, produces=True)
            flow.record(module, path, f"weight_hh_l{k}{turn}", 1, ids, produces=False)
            if k:
                flow.record(module, path, f"weight_ih_l{k}{turn}", 1, below, produces=False)
            if any(rest[0]) or any(rest[1].values()):
                flow.freeze_ids(ids, "its first state is given from outside")
            stack.append(ids)
    flow.freeze(rest, f"read by {path} as a state")
    if len(stack) > 1:
        flow.families[path] = stack
    out = Value(rank=3, ids=tuple(unit for ids in stack[-len(turns) :] for unit in ids), batch=x.batch)
    state = Value(rank=3, ids=stack[-1]) if len(stack) == 1 else Value(rank=3, stack=tuple(stack))
    return (out, (state, state) if lstm else state)


def _feed_forward(flow: Flow, layer: Any, path: str) -> None:
    """Label the hidden units between linear1 and linear2 of a transformer layer, where all in it is torch's or ours."""
    kind = nn.TransformerEncoderLayer if isinstance(layer, nn.TransformerEncoderLayer) else nn.TransformerDecoderLayer
    parts = (layer.linear1, layer.linear2, layer.dropout)
    own = "_ff_block" in vars(layer) or any(getattr(type(layer), n) is not getattr(kind, n) for n in _OF_LAYER)
    first = f"{path}.linear1".strip(".")
    if own or not all(isinstance(part, nn.Linear) for part in parts[:2]) or not all(is_leaf(part) for part in parts):
        flow.reasons[first] = f"{path or 'the model'} computes, or holds, something else than torch's layer"
        return
    ids = flow.new(first, layer.linear1.out_features)
    if getattr(layer, "activation", F.relu) not in (F.relu, F.gelu) or not isinstance(layer.dropout, _ZERO):
        flow.freeze_ids(ids, "its activation or dropout is not known")
    flow.record(layer.linear1, first, "weight", 0, ids, produces=True)
    flow.record(layer.linear1, first, "bias", 0, ids, produces=True)
    flow.record(layer.linear2, f"{path}.linear2".strip("."), "weight", 1, ids, produces=False)


def _pass(flow: Flow, module: nn.Module, path: str, x: Value, rest: Any) -> Value:
    if not isinstance(module, _ZERO):
        flow.impure.update(x.ids)
    return x


def _prelu(flow: Flow, module: Any, path: str, x: Value, rest: Any) -> Value:
    return x if module.num_parameters == 1 else _norm_like(flow, module, path, x)


def _norm_like(flow: Flow, module: Any, path: str, x: Value) -> Value:
    ids = fit(x, module.num_parameters)
    if not ids or not _second(x, checked=True):
        flow.freeze(x, f"read by {path}, whose channels do not fit")
        flow.bar(module, path, "weight")
        return replace(x, ids=())
    flow.record(module, path, "weight", 0, ids, produces=True)
    return replace(x, ids=ids, spread="")


def _soften(flow: Flow, module: Any, path: str, x: Value, rest: Any) -> Value:
    return softmax(flow, x, module.dim) or Value()


def _flatten(flow: Flow, module: Any, path: str, x: Value, rest: Any) -> Value:
    found = flatten(flow, x, module.start_dim, module.end_dim)
    if found is None or (x.assumed and found.moved(x)):
        flow.freeze(x, f"flattened by {path} in a way that is not followed")
        return Value()
    return found


def _upsample(flow: Flow, module: Any, path: str, x: Value, rest: Any) -> Value:
    return spatial(flow, x, every(x), path)


def _pad(flow: Flow, module: Any, path: str, x: Value, rest: Any) -> Value:
    flow.impure.update(x.ids)
    return spatial(flow, x, len(module.padding) // 2, path)


_MODULES: tuple[tuple[Any, Callable[..., Any]], ...] = (
    (nn.Linear, _linear),
    (_ConvNd, _conv),
    ((nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm), _norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.RNNBase, _recurrent),
    (_ZERO + _ELEMENT, _pass),
    (nn.PReLU, _prelu),
    (nn.Flatten, _flatten),
    ((nn.Softmax, nn.LogSoftmax), _soften),
    (nn.Upsample, _upsample),
    ((nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd), _pad),
)
