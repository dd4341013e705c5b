"""Functions that move, merge, split or drop dimensions: where the units lie afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from autoflip.groups.flow import Flow, Size, Value

__all__ = ["SHAPES", "every", "flatten", "index", "pool", "softmax", "spatial"]


def index(x: Value, key: tuple) -> Value | None:
    """Follow ``x[key]`` where the units' dimension stays whole; None where that cannot be followed."""
    if x.rank is None or not all(isinstance(k, (int, slice)) or k is Ellipsis for k in key) or key.count(...) > 1:
        return None
    if ... in key:
        at = key.index(...)
        key = key[:at] + (slice(None),) * (x.rank - len(key) + 1) + key[at + 1 :]
    if len(key) > x.rank:
        return None
    key += (slice(None),) * (x.rank - len(key))
    at = x.rank + x.axis
    if x.ids and key[at] != slice(None):
        return None
    gone_after = sum(isinstance(k, int) for k in key[at + 1 :])
    gone = sum(isinstance(k, int) for k in key)
    return x.but(rank=x.rank - gone, axis=x.axis + gone_after, batch=x.batch and key[:1] == (slice(None),))


def spatial(flow: Flow, x: Value, dims: int, name: str) -> Value:
    """Pass x on if its units do not lie along the last ``dims`` dimensions."""
    if x.ids and (x.axis >= -dims or x.spread or x.assumed):
        flow.freeze(x, f"read by {name} across channels")
        x = x.but(ids=())
    return x.but()


def pool(flow: Flow, x: Value, name: str, output_size: Any) -> Value:
    """Follow a pooling function: adaptive ones to size 1 leave dimensions of one entry."""
    dims = int(name[-2])
    x = spatial(flow, x, dims, name)
    alone = name.startswith("adaptive") and output_size in (1, (1,) * dims, [1] * dims)
    return x.but(ones=frozenset(range(-dims, 0))) if alone else x


def every(x: Value) -> int:
    """Return how many dimensions of x may be spatial to a function that goes by its rank."""
    return (x.rank or 9) - 2


def flatten(flow: Flow, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value | None:
    """Repeat units over the dimensions that are merged with theirs; None where that cannot be followed."""
    if not x.ids or x.rank is None and x.axis == -1 and (start_dim, end_dim) == (1, -1):
        # a tensor of unknown rank whose units lie last: their list repeats, or there is nothing to flatten
        whole = (start_dim, end_dim) == (1, -1)
        if x.spread == "each":
            return None
        return x.but(rank=2 if whole else None, spread="tile" if x.ids else "", batch=x.batch and start_dim > 0)
    start, end = x.dim(start_dim), x.dim(end_dim)
    if start is None or end is None:
        return None
    if start >= end:
        return x
    if start == x.dim(0):
        x = x.but(batch=False)
    if x.axis > end:
        return x.but(rank=x.rank and x.rank - (end - start))
    rank, axis = x.rank and x.rank - (end - start), x.axis + (end - start if x.axis < start else 0)
    if x.axis < start:
        return x.but(rank=rank, axis=axis)
    if x.spread or x.axis not in (start, end):
        return None
    return x.but(rank=rank, axis=end, spread="each" if x.axis == start else "tile")


def _view(flow: Flow, x: Value, *sizes: Any, shape: Any = ()) -> Value | None:
    """Follow view(x.size(0), -1) and its like: leading sizes of x itself, then -1."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    sizes = sizes or tuple(shape)
    own = [
        isinstance(s, Size) and s.dim == i and (s.value == x or (i == 0 and _is_batch(s, x)))
        for i, s in enumerate(sizes[:-1])
    ]
    if sizes and own and all(own) and sizes[-1] == -1:
        return flatten(flow, x, len(sizes) - 1, -1)
    if x.ids and not x.spread and sizes and _is_batch(sizes[0], x):
        # view(b, c) of (b, c, 1, 1) and back: beside the batch and x's own channels there are only ones
        at = [i for i, s in enumerate(sizes) if i and isinstance(s, Size)]
        others = [s for i, s in enumerate(sizes) if i not in (0, *at)]
        if len(at) == 1 and _counts(sizes[at[0]], x) and all(type(s) is int and s == 1 for s in others):
            flow.tie(x.ids, sizes[at[0]].value.ids)  # the count may be that of another layer's channels
            return Value(rank=len(sizes), axis=at[0] - len(sizes), ids=x.ids, batch=True)
    if x.ids:
        return None
    flow.freeze(sizes, "its size shapes another tensor")
    return Value()


def _is_batch(size: Any, x: Value) -> bool:
    return isinstance(size, Size) and size.dim == 0 and (size.value == x or (size.value.batch and x.batch))


def _counts(size: Size, x: Value) -> bool:
    """Tell whether a size is a number of units, as many as x has."""
    value = size.value
    if size.dim is None or value.spread or value.stack or value.dim(size.dim) != value.axis:
        return False
    return len(value.ids) == len(x.ids)


def _expand_as(flow: Flow, x: Value, other: Any) -> Value | None:
    if not isinstance(other, Value) or other.stack or not other.ids:
        return None
    if len(x.ids) != len(other.ids) or (x.axis, x.spread) != (other.axis, other.spread):
        return None
    flow.tie(x.ids, other.ids)
    return x.but(rank=other.rank, batch=x.batch and other.batch)


def _permute(flow: Flow, x: Value, *dims: Any) -> Value | None:
    order = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    if not all(isinstance(d, int) for d in order) or x.rank not in (None, len(order)):
        return None
    at = [d % len(order) for d in order]
    axis = at.index(len(order) + x.axis) - len(order) if x.ids else -1
    return x.but(rank=len(order), axis=axis, batch=x.batch and at[0] == 0)


def _transpose(flow: Flow, x: Value, dim0: int, dim1: int) -> Value | None:
    if x.rank is None and x.ids and (dim0 >= 0 or dim1 >= 0):
        return None
    a, b = x.dim(dim0), x.dim(dim1)
    if a is None or b is None:
        return None if x.ids else Value()
    batch = x.batch and x.rank is not None and -x.rank not in (a, b)
    return x.but(batch=batch, axis=b if x.axis == a else a if x.axis == b else x.axis)


def _squeeze(flow: Flow, x: Value, dim: Any = None) -> Value | None:
    """Follow squeeze where the dimension surely has one entry: otherwise it stays, and all others where they are."""
    if not isinstance(dim, int) or x.rank is None:
        return None if x.ids else Value()
    at = x.dim(dim)
    if at is None or at not in x.ones or (x.ids and at == x.axis):
        return None if x.ids else Value()
    ones = frozenset(one + (one < at) for one in x.ones if one != at)
    axis = x.axis + (1 if x.ids and at > x.axis else 0)
    return x.but(rank=x.rank - 1, axis=axis, batch=x.batch and at != -x.rank, ones=ones)


def _unsqueeze(flow: Flow, x: Value, dim: int) -> Value | None:
    if x.rank is None:
        return None if x.ids else Value()
    at = dim if dim < 0 else dim - x.rank - 1
    batch = x.batch and at != -x.rank - 1
    ones = frozenset([at, *(one - (one <= at) for one in x.ones)])
    axis = x.axis - (1 if x.ids and at > x.axis - 1 else 0)
    return x.but(rank=x.rank + 1, axis=axis, batch=batch, ones=ones)


def softmax(flow: Flow, x: Value, dim: Any = None, **_: Any) -> Value | None:
    """Pass x on if the sum does not run across its units."""
    if not x.ids:
        return x
    if not isinstance(dim, int) or x.rank is None or x.dim(dim) in (None, x.axis):
        flow.freeze(x, "read by softmax across units")
        return Value(rank=x.rank)
    flow.impure.update(x.ids)
    return x


def _reduce(flow: Flow, x: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Value | None:
    dims: Sequence[Any] = (dim,) if isinstance(dim, int) else dim if isinstance(dim, (tuple, list)) else ()
    if not x.ids or not dims or not all(isinstance(d, int) for d in dims):
        return None if x.ids else Value()
    at = {at for d in dims if (at := x.dim(d)) is not None}
    if len(at) < len(dims) or x.axis in at or x.spread:
        return None
    batch = x.batch and not (x.rank is None or -x.rank in at)
    if keepdim:
        return x.but(batch=batch, ones=x.ones | at)
    axis = x.axis + sum(d > x.axis for d in at)
    return x.but(rank=x.rank and x.rank - len(at), axis=axis, batch=batch)


def _interpolate(flow: Flow, x: Value, *_: Any, **__: Any) -> Value:
    return spatial(flow, x, every(x), "interpolate")


def _pad_function(flow: Flow, x: Value, pad: Any, *_: Any, **__: Any) -> Value | None:
    flow.impure.update(x.ids)
    return spatial(flow, x, len(pad) // 2, "pad") if isinstance(pad, (tuple, list)) else None


SHAPES: dict[str, Callable[..., Value | None]] = {
    "flatten": flatten,
    "expand_as": _expand_as,
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
