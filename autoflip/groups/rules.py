"""What each function does to the units that reach it: pass on, tie, join, repeat, read or freeze."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils import rnn

from autoflip.groups.flow import Flow, Size, Value
from autoflip.groups.shapes import SHAPES, index, pool

__all__ = ["HARMLESS", "POOLS", "call_function"]


def _words(text: str) -> list[str]:
    return text.split()


_ZERO = _words(
    "relu relu_ relu6 gelu tanh silu leaky_relu elu selu celu mish hardswish softsign tanhshrink softshrink hardshrink"
    " dropout dropout1d dropout2d dropout3d abs neg contiguous clone detach float double half bfloat16 to sqrt square"
    " sign sin erf expm1 log1p cpu cuda"
)
_ELEMENT = _words(
    "sigmoid hardsigmoid softplus exp logsigmoid clamp clamp_min clamp_max hardtanh cos log rsqrt reciprocal threshold"
    " alpha_dropout feature_alpha_dropout"
)
_BINARY = _words("add sub mul div truediv iadd isub imul itruediv add_ sub_ mul_ div_ maximum minimum pow")
_TIMES = ("mul", "imul", "mul_", "div", "truediv", "itruediv", "div_")
POOLS = [f"{a}{b}_pool{n}d" for a in ("", "adaptive_") for b in ("max", "avg") for n in (1, 2, 3)]
POOLS += [f"lp_pool{n}d" for n in (1, 2, 3)]
_REDUCE = ("mean", "sum", "amax", "amin", "max", "min")
_OTHERS = _words(
    "flatten view reshape cat concat concatenate size getitem getattr transpose swapaxes permute squeeze unsqueeze"
    " softmax log_softmax interpolate pad expand_as"
)
_PACKED = ("pack_padded_sequence", "pad_packed_sequence")
_SIZED = ("view", "reshape", "expand_as")  # what other tensors' sizes mean to them is followed
HARMLESS = ("shape", "device", "dtype", "ndim", "is_cuda", "requires_grad")


def _known_functions() -> dict[Any, str]:
    names = [*_ZERO, *_ELEMENT, *_BINARY, *POOLS, *_REDUCE, *_OTHERS, *_PACKED]
    homes = (torch, F, operator, rnn)
    known = {getattr(home, name): name for home in homes for name in names if callable(getattr(home, name, 0))}
    return {**known, getattr: "getattr"}


_FUNCTIONS = _known_functions()
_METHODS = {*_ZERO, *_ELEMENT, *_BINARY, *_REDUCE, *_OTHERS} - {"getattr", "getitem"}


def call_function(flow: Flow, target: Any, args: tuple, kwargs: dict) -> Any:
    """Return what a function or a method (``target`` a string) makes of its arguments."""
    name = target if isinstance(target, str) else _FUNCTIONS.get(target, "")
    if isinstance(target, str) and target not in _METHODS:
        name = ""
    if name in ("getitem", "getattr", "size"):
        return _look(flow, name, args, kwargs)
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    x, rest = (args[0], args[1:]) if args else (None, ())
    if name in _BINARY and len(args) == 2 and not _holds(kwargs):
        return _binary(flow, name, x, rest[0])
    if name in ("cat", "concat", "concatenate") and isinstance(x, (tuple, list)):
        return _cat(flow, list(x), rest[0] if rest else kwargs.get("dim", 0))
    tensors = name in (*_ZERO, *_ELEMENT, *POOLS) and name != "to" and _holds((rest, kwargs))
    if isinstance(x, Value) and not x.stack and name and not tensors:
        if name in _ZERO or name in _ELEMENT:
            if name in _ELEMENT:
                flow.impure.update(x.ids)
            return x
        if name in _PACKED:  # the units lie last in either form
            whole = x.but(rank=3, batch=False)
            flow.freeze((rest, kwargs), f"its size is read by {name}")
            return (whole, Value()) if name == "pad_packed_sequence" else whole
        if name in POOLS and not kwargs.get("return_indices"):
            return pool(flow, x, name, rest[0] if rest else kwargs.get("output_size"))
        if name in SHAPES:
            done = SHAPES[name](flow, x, *rest, **kwargs)
            if done is not None and not (x.assumed and done.moved(x)):
                if name not in _SIZED:
                    flow.freeze((rest, kwargs), f"its size is read by {name}")
                return done
    known = getattr(target, "__name__", str(target))
    flow.freeze((args, kwargs), _CONSTANT if name in ("view", "reshape") else f"read by {known}, which is not followed")
    return Value()


_CONSTANT = "forward reshapes with sizes of its own; x.flatten(1) can be followed"


def _holds(what: Any) -> bool:
    """Tell whether there are tensors, or sizes of tensors, in a container of arguments."""
    if isinstance(what, (tuple, list, dict)):
        return any(_holds(item) for item in (what.values() if isinstance(what, dict) else what))
    return isinstance(what, (Value, Size))


def _look(flow: Flow, name: str, args: tuple, kwargs: dict) -> Any:
    """Answer x.shape, x.size(), x[...], and items of tuples."""
    x, key = args[0], args[1] if len(args) > 1 else kwargs.get("dim")
    if isinstance(x, Value) and (name == "size" or (name == "getattr" and key in HARMLESS)):
        return Size(x, key if name == "size" else None) if name == "size" or key == "shape" else None
    if name == "getitem" and isinstance(x, Size) and x.dim is None and isinstance(key, int):
        return Size(x.value, key)
    if name == "getitem" and isinstance(x, (tuple, list)) and isinstance(key, (int, slice)):
        return x[key]
    if name == "getitem" and isinstance(x, Value):
        if x.stack:
            first, *others = key if isinstance(key, tuple) else (key,)
            if isinstance(first, int) and all(k == slice(None) for k in others):
                return Value(rank=2, ids=x.stack[first])
        else:
            found = index(x, key if isinstance(key, tuple) else (key,))
            if found is not None and not (x.assumed and found.moved(x)):
                flow.freeze(key, "its size cuts another tensor")
                return found
    flow.freeze((args, kwargs), f"read by {name}, which is not followed here")
    return Value()


def _binary(flow: Flow, name: str, a: Any, b: Any) -> Any:
    x, y = (a, b) if isinstance(a, Value) and (a.ids or not isinstance(b, Value)) else (b, a)
    if isinstance(x, Value) and not x.stack:
        if isinstance(y, (int, float)):
            if not (name in _TIMES and x is a or name.endswith(("mul", "mul_"))):
                flow.impure.update(x.ids)
            return x
        if isinstance(y, Value) and not y.stack and (spread := _broadcast(flow, name, x, y)) is not None:
            return spread
        if isinstance(y, Value) and not y.stack and _alike(x, y):
            flow.tie(x.ids, y.ids)
            if "div" in name or name == "pow":
                flow.impure.update(x.ids)
            return x.but(rank=_rank(x, y), batch=x.batch and y.batch)
    flow.freeze((a, b), f"read by {name} together with something else")
    return Value()


def _broadcast(flow: Flow, name: str, x: Value, y: Value) -> Value | None:
    """Follow one unit that is spread over the units of another layer; None where that is not the case."""
    one, many = (x, y) if len(x.ids) == 1 else (y, x)
    if len(one.ids) != 1 or len(many.ids) < 2 or one.spread or one.axis != many.axis:
        return None
    flow.freeze(one, f"spread by {name} over the channels of another layer")
    if not name.endswith(("mul", "mul_")):
        flow.impure.update(many.ids)
    return many.but(rank=_rank(x, y), batch=x.batch and y.batch)


def _rank(x: Value, y: Value) -> int | None:
    return max(x.rank, y.rank) if x.rank and y.rank else None


def _alike(x: Value, y: Value) -> bool:
    return len(x.ids) == len(y.ids) and (not x.ids or (x.axis == y.axis and x.spread == y.spread))


def _cat(flow: Flow, parts: list[Any], dim: Any) -> Value:
    first = parts[0] if parts else None
    if all(isinstance(p, Value) and p.ids and not p.stack and not p.spread for p in parts) and isinstance(dim, int):
        assert isinstance(first, Value)
        if all(p.axis == first.axis and p.rank == first.rank for p in parts):
            if first.rank is None and dim == 1:  # taken for one row per example; otherwise no reader fits
                first = first.but(rank=1 - first.axis, assumed=True)
            at = first.dim(dim)
            if at == first.axis:
                return first.but(ids=tuple(unit for p in parts for unit in p.ids))
            if at is not None and all(len(p.ids) == len(first.ids) for p in parts):
                for p in parts[1:]:
                    flow.tie(first.ids, p.ids)
                return first.but(batch=False)
    flow.freeze(parts, "joined with something that is not followed")
    return Value()
