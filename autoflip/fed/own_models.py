"""Networks that users bring: ``module:callable``, and what federated training needs of them."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["imported", "trainable"]


def trainable(name: str, model: Any) -> nn.Module:
    """Return ``model`` if a federated run can train it.

    Raises:
        ValueError: it is no module, or its state is not all there, not all tensors or not float32.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"models: {name} returned {type(model).__name__}; wanted a torch.nn.Module")
    lazy = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)]
    if lazy:
        raise ValueError(f"models: {name}: {lazy[0]!r} has no shape yet; run the model once before you return it")
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"models: {name}: {key!r} of its state_dict is {type(value).__name__} (get_extra_state?), which has no "
                "mean over clients; wanted tensors only"
            )
        if value.is_complex() or (value.is_floating_point() and value.dtype != torch.float32):
            raise ValueError(f"models: {name}: {key!r} is {value.dtype}; clients train in float32, call model.float()")
    return model


def imported(spec: str, input_shape: tuple[int, ...], num_classes: int, options: dict[str, Any]) -> Callable[[], Any]:
    """Return the user's callable of ``module:callable`` with its arguments bound."""
    module_name, _, attribute = spec.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise ValueError(f"models: {spec!r} is no module:callable; wanted for example mypackage.nets:make_model")
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:  # the installed command does not look into the working folder, `python -m` does
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (module_name == missing or module_name.startswith(missing + ".")):
            raise ValueError(
                f"models: {spec!r}: there is no module {missing!r}; wanted one that can be imported from here ({here}) "
                "or is installed"
            ) from error
        raise ValueError(f"models: importing {module_name!r} failed: {type(error).__name__}: {error}") from error
    finally:
        if added:
            sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(found) if not n.startswith("_")]
            near = difflib.get_close_matches(part, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"models: {spec!r}: {module_name} has no {part!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"models: {spec!r} is {type(found).__name__}; wanted a function or class that makes a model")
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # some built-in callables have none
        return lambda: found(**options)
    every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    offered = {"input_shape": tuple(input_shape), "num_classes": num_classes}
    given = options | {k: v for k, v in offered.items() if every or k in parameters}
    try:
        inspect.signature(found).bind(**given)
    except TypeError as error:
        raise ValueError(
            f"models: {spec!r} cannot be called with {', '.join(given) or 'no arguments'} ({error}); wanted a callable "
            "that needs nothing beyond input_shape and num_classes"
        ) from error
    return lambda: found(**given)
