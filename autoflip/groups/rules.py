"""What each function does to the units that reach it: pass on, tie, join, repeat, read or freeze."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from autoflip.groups.flow import Flow, Size, Value

__all__ = ["POOLS", "call_function", "flatten", "softmax", "spatial"]


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
    " softmax log_softmax interpolate pad"
)
_HARMLESS = ("shape", "device", "dtype", "ndim", "is_cuda", "requires_grad")


def _known_functions() -> dict[Any, str]:
    names = [*_ZERO, *_ELEMENT, *_BINARY, *POOLS, *_REDUCE, *_OTHERS]
    known = {
        getattr(home, name): name for home in (torch, F, operator) for name in names if callable(getattr(home, name, 0))
    }
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
    if name in _BINARY and len(args) == 2:
        return _binary(flow, name, x, rest[0])
    if name in ("cat", "concat", "concatenate") and isinstance(x, (tuple, list)):
        return _cat(flow, list(x), rest[0] if rest else kwargs.get("dim", 0))
    if isinstance(x, Value) and not x.stack and name:
        if name in _ZERO or name in _ELEMENT:
            if name in _ELEMENT:
                flow.impure.update(x.ids)
            return x
        if name in POOLS and not kwargs.get("return_indices"):
            return spatial(flow, x, int(name[-2]), name)
        if name in _SHAPES:
            done = _SHAPES[name](flow, x, *rest, **kwargs)
            if done is not None:
                return done
    known = getattr(target, "__name__", str(target))
    flow.freeze((args, kwargs), _CONSTANT if name in ("view", "reshape") else f"read by {known}, which is not followed")
    return Value()


_CONSTANT = "forward reshapes with sizes of its own; x.flatten(1) can be followed"


def _look(flow: Flow, name: str, args: tuple, kwargs: dict) -> Any:
    """Answer x.shape, x.size(), x[...], and items of tuples."""
    x, key = args[0], args[1] if len(args) > 1 else kwargs.get("dim")
    if isinstance(x, Value) and (name == "size" or (name == "getattr" and key in _HARMLESS)):
        return Size(x, key if name == "size" else None) if name == "size" or key == "shape" else None
    if name == "getitem" and isinstance(x, Size) and x.dim is None and isinstance(key, int):
        return Size(x.value, key)
    if name == "getitem" and isinstance(x, (tuple, list)) and isinstance(key, (int, slice)):
        return x[key]
    if name == "getitem" and isinstance(x, Value):
        if x.stack:
            if isinstance(key, int):
                return Value(rank=2, ids=x.stack[key])
        elif (found := _index(x, key if isinstance(key, tuple) else (key,))) is not None:
            return found
    flow.freeze((args, kwargs), f"read by {name}, which is not followed here")
    return Value()


def _index(x: Value, key: tuple) -> Value | None:
    if x.rank is None or not all(isinstance(k, (int, slice)) or k is Ellipsis for k in key) or key.count(...) > 1:
        return None
    if ... in key:
        at = key.index(...)
        key = key[:at] + (slice(None),) * (x.rank - len(key) + 1) + key[at + 1 :]
    key += (slice(None),) * (x.rank - len(key))
    at = x.rank + x.axis
    if x.ids and key[at] != slice(None):
        return None
    gone_after = sum(isinstance(k, int) for k in key[at + 1 :])
    gone = sum(isinstance(k, int) for k in key)
    return replace(x, rank=x.rank - gone, axis=x.axis + gone_after, batch=x.batch and key[:1] == (slice(None),))


def _binary(flow: Flow, name: str, a: Any, b: Any) -> Any:
    x, y = (a, b) if isinstance(a, Value) and (a.ids or not isinstance(b, Value)) else (b, a)
    if isinstance(x, Value) and not x.stack:
        if isinstance(y, (int, float)):
            if not (name in _TIMES and x is a or name.endswith(("mul", "mul_"))):
                flow.impure.update(x.ids)
            return x
        if isinstance(y, Value) and not y.stack and _alike(x, y):
            flow.tie(x.ids, y.ids)
            if "div" in name or name == "pow":
                flow.impure.update(x.ids)
            rank = max(x.rank, y.rank) if x.rank and y.rank else x.rank or y.rank
            return replace(x, rank=rank, batch=x.batch and y.batch)
    flow.freeze((a, b), f"read by {name} together with something else")
    return Value()


def _alike(x: Value, y: Value) -> bool:
    return len(x.ids) == len(y.ids) and (not x.ids or (x.axis == y.axis and x.spread == y.spread))


def _cat(flow: Flow, parts: list[Any], dim: Any) -> Value:
    first = parts[0] if parts else None
    if all(isinstance(p, Value) and p.ids and not p.stack and not p.spread for p in parts) and isinstance(dim, int):
        assert isinstance(first, Value)
        if all(p.axis == first.axis and p.rank == first.rank for p in parts):
            if first.dim(dim) == first.axis:
                return replace(first, ids=tuple(unit for p in parts for unit in p.ids))
            if all(len(p.ids) == len(first.ids) for p in parts):
                for p in parts[1:]:
                    flow.tie(first.ids, p.ids)
                return replace(first, batch=False)
    flow.freeze(parts, "joined with something that is not followed")
    return Value()


def spatial(flow: Flow, x: Value, dims: int, name: str) -> Value:
    """Pass x on if its units do not lie along the last ``dims`` dimensions."""
    if x.ids and (x.axis >= -dims or x.spread):
        flow.freeze(x, f"read by {name} across channels")
        return replace(x, ids=())
    return x


def flatten(flow: Flow, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value | None:
    """Repeat units over the dimensions that are merged with theirs; None where that cannot be followed."""
    if not x.ids or x.rank is None and x.axis == -1 and (start_dim, end_dim) == (1, -1):
        # a tensor of unknown rank whose units lie last: one row per example
        whole = (start_dim, end_dim) == (1, -1)
        return replace(x, rank=2 if whole else None, batch=x.batch and start_dim > 0)
    start, end = x.dim(start_dim), x.dim(end_dim)
    if start >= end:
        return x
    if start == x.dim(0):
        x = replace(x, batch=False)
    if x.axis > end:
        return replace(x, rank=x.rank and x.rank - (end - start))
    rank, axis = x.rank and x.rank - (end - start), x.axis + (end - start if x.axis < start else 0)
    if x.axis < start:
        return replace(x, rank=rank, axis=axis)
    if x.spread or x.axis not in (start, end):
        return None
    return replace(x, rank=rank, axis=end, spread="each" if x.axis == start else "tile")


def _view(flow: Flow, x: Value, *sizes: Any, shape: Any = ()) -> Value | None:
    """Follow view(x.size(0), -1) and its like: leading sizes of x itself, then -1."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    sizes = sizes or tuple(shape)
    own = [
        isinstance(s, Size) and s.dim == i and (s.value == x or (i == 0 and s.value.batch and x.batch))
        for i, s in enumerate(sizes[:-1])
    ]
    if sizes and own and all(own) and sizes[-1] == -1:
        return flatten(flow, x, len(sizes) - 1, -1)
    return None if x.ids else Value()


def _permute(flow: Flow, x: Value, *dims: Any) -> Value | None:
    order = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    if not all(isinstance(d, int) for d in order):
        return None
    at = [d % len(order) for d in order]
    axis = at.index(len(order) + x.axis) - len(order) if x.ids else -1
    return replace(x, rank=len(order), axis=axis, batch=x.batch and at[0] == 0)


def _transpose(flow: Flow, x: Value, dim0: int, dim1: int) -> Value | None:
    if x.rank is None and x.ids and (dim0 >= 0 or dim1 >= 0):
        return None
    a, b = x.dim(dim0), x.dim(dim1)
    batch = x.batch and x.rank is not None and -x.rank not in (a, b)
    return replace(x, batch=batch, axis=b if x.axis == a else a if x.axis == b else x.axis)


def _squeeze(flow: Flow, x: Value, dim: Any = None) -> Value | None:
    if not isinstance(dim, int) or x.rank is None:
        return None if x.ids else Value()
    at = x.dim(dim)
    if x.ids and at == x.axis:
        return None
    return replace(
        x, rank=x.rank - 1, axis=x.axis + (1 if x.ids and at > x.axis else 0), batch=x.batch and at != -x.rank
    )


def _unsqueeze(flow: Flow, x: Value, dim: int) -> Value | None:
    if x.rank is None:
        return None if x.ids else Value()
    at = dim if dim < 0 else dim - x.rank - 1
    batch = x.batch and at != -x.rank - 1
    return replace(x, rank=x.rank + 1, axis=x.axis - (1 if x.ids and at > x.axis - 1 else 0), batch=batch)


def softmax(flow: Flow, x: Value, dim: Any = None, **_: Any) -> Value | None:
    """Pass x on if the sum does not run across its units."""
    if not x.ids:
        return x
    if not isinstance(dim, int) or x.rank is None or x.dim(dim) == x.axis:
        flow.freeze(x, "read by softmax across units")
        return Value(rank=x.rank)
    flow.impure.update(x.ids)
    return x


def _reduce(flow: Flow, x: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Value | None:
    dims: Sequence[Any] = (dim,) if isinstance(dim, int) else dim if isinstance(dim, (tuple, list)) else ()
    if not x.ids or not dims or not all(isinstance(d, int) for d in dims):
        return None if x.ids else Value()
    at = {x.dim(d) for d in dims}
    if x.axis in at or x.spread:
        return None
    batch = x.batch and not (x.rank is None or -x.rank in at)
    if keepdim:
        return replace(x, batch=batch)
    return replace(x, rank=x.rank and x.rank - len(at), axis=x.axis + sum(d > x.axis for d in at), batch=batch)


def _interpolate(flow: Flow, x: Value, *_: Any, **__: Any) -> Value:
    return spatial(flow, x, (x.rank or 4) - 2, "interpolate")


def _pad_function(flow: Flow, x: Value, pad: Any, *_: Any, **__: Any) -> Value | None:
    flow.impure.update(x.ids)
    return spatial(flow, x, len(pad) // 2, "pad") if isinstance(pad, (tuple, list)) else None


_SHAPES: dict[str, Callable[..., Value | None]] = {
    "flatten": flatten,
    "view": _view,
    "reshape": _view,
    "permute": _permute,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "softmax": softmax,
    "log_softmax": softmax,
    "mean": _reduce,
    "sum": _reduce,
    "amax": _reduce,
    "amin": _reduce,
    "interpolate": _interpolate,
    "pad": _pad_function,
}
