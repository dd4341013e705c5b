"""Which backend serves an op on a device, and why the others do not.

Backends: ``reference`` (torch), ``cpp`` (the CPU extension), ``cuda`` (the CUDA extension), ``triton``.
The environment variable ``AUTOFLIP_BACKEND`` asks for one of them; unset, empty and ``auto`` leave the choice to
us. Asking for one that cannot run is an error that says why. One that runs here is no error for helper ops
(``optional`` in :func:`register`) that have no such kernel for that kind of device: those run as ever.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

BACKENDS = ("reference", "cpp", "cuda", "triton")
# first choice first; CUDA before Triton until a GPU has measured which of them wins
_ORDER = {"cpu": ("cpp", "triton", "reference"), "cuda": ("cuda", "triton", "reference")}
_SERVED: dict[str, tuple[str, ...]] = {}
_OPTIONAL: set[str] = set()
_ASKED: dict[str, tuple[str, ...]] = {}
# a wish for one of these is about tensors of that device
_HOME = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


def register(op: str, *backends: str, optional: bool = False, asked: tuple[str, ...] = ()) -> None:
    """Declare that ``op`` has an implementation in each of ``backends`` beside its reference.

    Args:
        op: name that :func:`serve` is asked for.
        backends: any of BACKENDS.
        optional: a wish for a backend in which ``op`` has no kernel, or for one of another device, does not apply
            to it: torch's own products are as good there.
        asked: those of ``backends`` that serve only when they are asked for by name.
    """
    _SERVED[op] = (*backends, "reference")
    _ASKED[op] = asked
    if optional:
        _OPTIONAL.add(op)


def wish() -> str:
    """Return the backend that ``AUTOFLIP_BACKEND`` asks for, "auto" when it asks for none."""
    return os.environ.get("AUTOFLIP_BACKEND") or "auto"


def wish_error() -> str:
    """Return what is wrong with :func:`wish` whatever the op; empty when nothing is."""
    wished = wish()
    if wished not in ("auto", *BACKENDS):
        return f"AUTOFLIP_BACKEND={wished!r}; wanted auto or one of {', '.join(BACKENDS)}"
    reason = _nowhere(wished)
    return f"AUTOFLIP_BACKEND={wished}, which cannot run here: {reason}" if reason else ""


def _nowhere(backend: str) -> str:
    """Return why ``backend`` can run on no device here; empty when it can."""
    if backend not in _HOME or not unavailable(backend, "cpu"):
        return ""
    if reason := unavailable(backend, _HOME[backend]):
        return reason
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _build_note(module: str) -> str:
    note = Path(__file__).resolve().parents[1] / "_build.txt"
    for line in note.read_text().splitlines() if note.exists() else ():
        if line.startswith(module):
            return line
    return f"{module} is not built; run: pip install --no-build-isolation -e ."


@cache
def extension(name: str) -> tuple[ModuleType | None, str]:
    """Return (the extension module ``_C`` or ``_cuda``, "") or (None, why it is missing)."""
    try:
        return import_module(f"autoflip.{name}"), ""
    except ImportError as error:
        if find_spec(f"autoflip.{name}") is None:
            return None, _build_note(name)
        return None, f"{name} does not load: {error}"


@cache
def unavailable(backend: str, device_type: str) -> str:
    """Return why ``backend`` cannot run on ``device_type`` ("cpu" or "cuda"); empty when it can."""
    if backend == "reference":
        return ""
    if backend == "cpp":
        return "cpp runs on CPU tensors only" if device_type != "cpu" else extension("_C")[1]
    if backend == "cuda":
        if device_type != "cuda":
            return "cuda runs on CUDA tensors only"
        return extension("_cuda")[1]
    if find_spec("triton") is None:
        return "triton is not installed; run: pip install 'autoflip[triton]'"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton runs on CUDA tensors only (TRITON_INTERPRET=1 interprets it on the CPU, slowly)"
    return ""


def serve(op: str, device: torch.device) -> str:
    """Return the backend that serves ``op`` on ``device``.

    Raises:
        BackendError: ``AUTOFLIP_BACKEND`` names a backend that does not exist or cannot serve this op here.
    """
    return _serve(op, device.type, wish())


@cache
def _serve(op: str, device_type: str, wished: str) -> str:
    if error := wish_error():
        raise BackendError(error)
    served = _SERVED[op]
    if wished != "auto":
        reason = unavailable(wished, device_type)
        if not reason and wished not in served:
            reason = f"{op} has no {wished} kernel; it has {', '.join(served)}"
        if not reason:
            return wished
        if op not in _OPTIONAL or (wished in served and _HOME[wished] == device_type):
            raise BackendError(f"AUTOFLIP_BACKEND={wished} cannot serve {op} on {device_type}: {reason}")
    for backend in _ORDER.get(device_type, ("reference",)):
        # the interpreter is for tests: it is never chosen, only asked for
        if (backend == "triton" and device_type == "cpu") or backend in _ASKED[op]:
            continue
        if backend in served and not unavailable(backend, device_type):
            return backend
    return "reference"


def table() -> list[tuple[str, str, str, str]]:
    """Return rows (op, device, backend that serves it, why each other backend does not) for ``autoflip info``.

    Where ``AUTOFLIP_BACKEND`` asks for what cannot be, the backend is "-" and the reason stands in their place.
    """
    import_module("autoflip.ops")  # the families register themselves when they are imported
    rows = []
    for op, served in sorted(_SERVED.items()):
        for device_type in ("cpu", "cuda"):
            if device_type == "cuda" and not torch.cuda.is_available():
                rows.append((op, "cuda", "-", "torch sees no CUDA device"))
                continue
            try:
                chosen = serve(op, torch.device(device_type))
            except BackendError as error:
                # a name that does not exist is said once, by who prints the table
                rows.append((op, device_type, "-", "" if wish_error() else str(error)))
                continue
            whys = []
            for backend in _ORDER[device_type]:
                if backend != chosen:
                    missing = "" if backend in served else f"no {backend} kernel"
                    why = missing or unavailable(backend, device_type) or "available, not first choice"
                    whys.append(f"{backend}: {why}")
            rows.append((op, device_type, chosen, "; ".join(whys)))
    return rows
