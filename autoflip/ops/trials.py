"""Which of several ways to do the same work is fastest here: short trials, remembered on disk per machine.

A trial times the ways in turn, so that load hits all of them, and writes the winner to
``$AUTOFLIP_CACHE/trials.json`` (default ``~/.cache/autoflip``). Later processes on the same machine read it, so that a
run repeats bit for bit: the way taken decides the order of float32 sums. ``AUTOFLIP_TRIALS=off`` times nothing and
reads nothing: callers then follow the rule that they pass along.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from autoflip.ops import backend

__all__ = ["choose", "enabled", "file", "forget", "known", "machine", "near"]

_VERSION = 18  # of the kernels that trials compare: raise it when one changes its speed
# the first way is left only for one that is at least 5 % faster, unless a caller says otherwise
_GAIN = 0.95
_BURST = 0.0005  # seconds that a way is timed for in a row, unless a caller says otherwise
_chosen: dict[str, str] = {}


def enabled() -> bool:
    """Tell whether trials may run; ``AUTOFLIP_TRIALS`` is "on" (default) or "off".

    Raises:
        ValueError: it is neither.
    """
    wish = os.environ.get("AUTOFLIP_TRIALS") or "on"
    if wish not in ("on", "off"):
        raise ValueError(f"AUTOFLIP_TRIALS={wish!r}; wanted on or off")
    return wish == "on"


def file() -> Path:
    """Return where choices are kept."""
    return Path(os.environ.get("AUTOFLIP_CACHE") or Path.home() / ".cache" / "autoflip") / "trials.json"


@cache
def machine() -> str:
    """Return what a choice depends on beside its key: CPU, its instruction set, torch and our kernels' version."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    module, _ = backend.extension("_C")
    isa = module.isa() if module else "none"
    return f"{cpu or platform.processor() or platform.machine()}, {isa}, torch {torch.__version__}, v{_VERSION}"


def known() -> dict[str, str]:
    """Return key -> choice for this machine, as kept on disk; a file that cannot be read counts as empty."""
    try:
        found = json.loads(file().read_text())[machine()]
        return {str(key): str(choice) for key, choice in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def forget() -> None:
    """Drop what this process remembers; what is on disk is read again."""
    _chosen.clear()


def near(density: float) -> str:
    """Return a density as keys name it, to the nearest quarter of a doubling: what lies between behaves alike."""
    return f"{2 ** (round(math.log2(max(density, 1e-4)) * 4) / 4):.3g}"


def choose(
    key: str,
    ways: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 0.03,
    gain: float = _GAIN,
    burst: float = _BURST,
) -> str:
    """Return the name of the fastest of ``ways``, by what is remembered under ``key`` or else by a trial.

    Args:
        key: names the work: sizes, density, threads.
        ways: name -> function of no argument.
        seconds: about how long the trial may take.
        gain: the first way is kept unless another takes less than this share of its time.
        burst: seconds that a way is timed for in a row, after an untimed call; what is longer runs once, after another
            way, and pays for what that one has left in the caches.
    """
    if not _chosen:
        _chosen.update(known())
    if _chosen.get(key) not in ways:
        with unseen():
            _chosen[key] = _remember(key, _fastest(ways, seconds, gain, burst), ways)
    return _chosen[key]


@contextmanager
def unseen() -> Iterator[None]:
    """Hide what is done from counters of FLOPs, autograd and who keeps its tensors, transforms and a default device."""
    with ExitStack() as stack:
        for hidden in (_disable_current_modes, torch._C.DisableTorchFunction, temporarily_clear_interpreter_stack):
            stack.enter_context(hidden())
        for plain in (torch.no_grad(), torch.inference_mode(False), _nobody_keeps(), _no_old_vmap()):
            stack.enter_context(plain)
        yield


@contextmanager
def _nobody_keeps() -> Iterator[None]:
    """Take away the hooks on saved tensors (``torch.utils.checkpoint``, ``save_on_cpu``) for a while."""
    autograd: Any = torch._C._autograd
    top = getattr(autograd, "_top_saved_tensors_default_hooks", lambda _: None)  # older torchs do not tell
    held = []
    while (hooks := top(True)) is not None:
        held.append(hooks)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for hooks in reversed(held):
            autograd._push_saved_tensors_default_hooks(*hooks)


@contextmanager
def _no_old_vmap() -> Iterator[None]:
    """Leave the vmap behind ``torch.autograd.functional`` for a while: nothing random may run in it."""
    levels = torch._C._vmapmode_increment_nesting()
    for _ in range(levels):
        torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        for _ in range(levels - 1):
            torch._C._vmapmode_increment_nesting()


def _fastest(ways: Mapping[str, Callable[[], object]], seconds: float, gain: float, burst: float) -> str:
    # on one thread CPU time: what other processes take of a shared core is not ours
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in ways}
    calls: dict[str, int] = {}
    for name, way in ways.items():
        way()
        start = now()
        way()
        # a short way several times in a row, as training does: in turns each would find the others' code in the caches
        calls[name] = max(1, min(50, int(burst / max(now() - start, 1e-6))))
    end = time.perf_counter() + seconds
    while len(times[next(iter(ways))]) < 3 or (time.perf_counter() < end and len(times[next(iter(ways))]) < 25):
        for name, way in ways.items():
            if calls[name] > 1:
                way()  # what the way before has left in the caches is not this one's cost
            start = now()
            for _ in range(calls[name]):
                way()
            times[name].append((now() - start) / calls[name])
    middle = {name: statistics.median(t) for name, t in times.items()}
    first = next(iter(ways))
    best = min(middle, key=lambda name: middle[name])
    return best if middle[best] < gain * middle[first] else first


def _remember(key: str, choice: str, ways: Container[str]) -> str:
    """Keep a choice; return the one that another process has kept in the meantime, if there is one."""
    path = file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            everything = json.loads(path.read_text())
            mine = everything.setdefault(machine(), {})
            if mine.get(key) in ways:
                return str(mine[key])
            mine[key] = choice
        except (OSError, ValueError, TypeError, AttributeError):
            everything = {machine(): {key: choice}}
        # replaced as a whole: a reader never meets half a file
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as new:
            json.dump(everything, new, indent=0, sort_keys=True)
        os.replace(new.name, path)
    except OSError as error:
        _warn(str(path), str(error))
    return choice


@cache
def _warn(path: str, error: str) -> None:
    warnings.warn(
        f"autoflip: {path} cannot be written ({error}): kernels are timed again in each process. "
        "Set AUTOFLIP_CACHE to a folder of yours, or AUTOFLIP_TRIALS=off to follow fixed rules",
        stacklevel=4,
    )
