"""Which backend serves an op on a device, and why the others do not.

Backends: ``reference`` (torch), ``cpp`` (the CPU extension), ``cuda`` (the CUDA extension), ``triton``.
The environment variable ``AUTOFLIP_BACKEND`` asks for one of them; asking for one that cannot run is an
error that says why.
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


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


def register(op: str, *backends: str) -> None:
    """Declare that ``op`` has an implementation in each of ``backends`` beside its reference."""
    _SERVED[op] = (*backends, "reference")


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
    return _serve(op, device.type, os.environ.get("AUTOFLIP_BACKEND", "auto"))


@cache
def _serve(op: str, device_type: str, wish: str) -> str:
    served = _SERVED[op]
    if wish != "auto":
        if wish not in BACKENDS:
            raise BackendError(f"AUTOFLIP_BACKEND={wish!r}; wanted auto or one of {', '.join(BACKENDS)}")
        reason = unavailable(wish, device_type)
        if not reason and wish not in served:
            reason = f"{op} has no {wish} kernel; it has {', '.join(served)}"
        if reason:
            raise BackendError(f"AUTOFLIP_BACKEND={wish} cannot serve {op} on {device_type}: {reason}")
        return wish
    for backend in _ORDER.get(device_type, ("reference",)):
        # the interpreter is for tests: it is never chosen, only asked for
        if backend == "triton" and device_type == "cpu":
            continue
        if backend in served and not unavailable(backend, device_type):
            return backend
    return "reference"


def table() -> list[tuple[str, str, str, str]]:
    """Return rows (op, device, backend that serves it, why each other backend does not) for ``autoflip info``."""
    import_module("autoflip.ops")  # the families register themselves when they are imported
    rows = []
    for op, served in sorted(_SERVED.items()):
        for device_type in ("cpu", "cuda"):
            if device_type == "cuda" and not torch.cuda.is_available():
                rows.append((op, "cuda", "-", "torch sees no CUDA device"))
                continue
            chosen = _serve(op, device_type, os.environ.get("AUTOFLIP_BACKEND", "auto"))
            whys = []
            for backend in _ORDER[device_type]:
                if backend != chosen:
                    missing = "" if backend in served else f"no {backend} kernel"
                    why = missing or unavailable(backend, device_type) or "available, not first choice"
                    whys.append(f"{backend}: {why}")
            rows.append((op, device_type, chosen, "; ".join(whys)))
    return rows
