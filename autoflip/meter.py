"""What a piece of work cost: executed FLOPs, wall seconds, bytes on the link, and the machine it ran on."""

from __future__ import annotations

import copy
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Cost", "count_flops", "layer_flops", "machine", "measure", "synchronise"]

_OPEN: ContextVar[tuple[Cost, ...]] = ContextVar("autoflip_open_costs", default=())


@dataclass
class Cost:
    """A sum of work.

    Attributes:
        flops: executed floating point operations of matrix products and convolutions, forward and
            backward; a multiply-add is 2. Elementwise work is not counted.
        seconds: wall seconds, after the device has finished.
        bytes_up: bytes of payloads from clients to the server.
        bytes_down: bytes of payloads from the server to clients.
    """

    flops: int = 0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.seconds + other.seconds,
            self.bytes_up + other.bytes_up,
            self.bytes_down + other.bytes_down,
        )

    @property
    def bytes(self) -> int:
        """Bytes in both directions."""
        return self.bytes_up + self.bytes_down

    def as_dict(self) -> dict[str, float]:
        """Return the four sums by name."""
        return asdict(self)


def count_flops(work: Callable[[], Any]) -> int:
    """Run ``work`` once and return the FLOPs that its matrix products, convolutions and RNNs executed.

    Counts with torch's FlopCounterMode, to which autoflip's kernels report their own work and to which the
    CPU's fused LSTM and attention, unknown to torch's table, are added here. Transformer layers in evaluation
    mode run without torch's fast path meanwhile: it hides a layer's products in one operation.
    """
    with _counter() as counter:
        work()
    return int(counter.get_total_flops())


def layer_flops(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Return weight name -> FLOPs of a Linear's, convolution's or RNN's weight in the forward pass of one example.

    ``2 * entries * places``: places are a convolution's output positions (a transposed one's input positions), a
    sequence's steps, 1 otherwise. Weights that do not run are missing; a layer that runs twice counts twice.

    Args:
        model: it runs once, on a copy, in evaluation mode.
        example: inputs of a small batch.
    """
    twin, found = copy.deepcopy(model).eval(), Counter[str]()

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def add(layer: nn.Module, inputs: Any, output: Any) -> None:
            # a transposed convolution multiplies where it reads
            y = inputs[0] if inputs and isinstance(layer, _ConvTransposeNd) else output
            y = y[0] if isinstance(layer, nn.RNNBase) else y
            y = y.data if isinstance(y, PackedSequence) else y
            places = y.numel() // (y.shape[1 if isinstance(layer, _ConvNd) else -1] * len(example))
            for name, weight in layer.named_parameters(path, recurse=False):
                if weight.ndim >= 2:
                    found[name] += 2 * weight.numel() * places

        return add

    for path, layer in twin.named_modules():
        if isinstance(layer, (nn.Linear, _ConvNd, nn.RNNBase)):
            layer.register_forward_hook(watch(path))
    with torch.no_grad():
        twin(example)
    return dict(found)


@contextmanager
def measure(model: nn.Module | None = None) -> Iterator[Cost]:
    """Measure what runs inside the ``with`` block.

    Args:
        model: decides the device to wait for; None: the current one.

    Yields:
        A :class:`Cost`, complete when the block ends. Transports add payload bytes to every open block.
        Counting FLOPs slows small models down, so ``seconds`` here is an upper bound; the federated loop
        counts a step's FLOPs apart and times the plain steps.

    Example:
        >>> layer = torch.nn.Linear(4, 2, bias=False)
        >>> with measure(layer) as cost:
        ...     _ = layer(torch.ones(3, 4))
        >>> cost.flops
        48
    """
    cost = Cost()
    token = _OPEN.set((*_OPEN.get(), cost))
    device = next((p.device for p in model.parameters()), None) if model is not None else None
    synchronise(device)
    start = time.perf_counter()
    counter = None
    try:
        with _counter() as counter:
            yield cost
    finally:
        synchronise(device)
        cost.seconds += time.perf_counter() - start
        cost.flops += int(counter.get_total_flops()) if counter is not None else 0
        _OPEN.reset(token)


def charge_bytes(*, up: int = 0, down: int = 0) -> None:
    """Add payload bytes to every open :func:`measure` block; transports call this with ``len(payload)``."""
    for cost in _OPEN.get():
        cost.bytes_up += up
        cost.bytes_down += down


def synchronise(device: torch.device | None = None) -> None:
    """Wait until a CUDA device has finished; nothing to do on a CPU."""
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        torch.cuda.synchronize(device)


def machine() -> dict[str, Any]:
    """Return what a number needs beside it: processor, cores, threads, GPU, versions."""
    from autoflip import __version__

    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass  # no /proc on this system
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "autoflip": __version__,
    }


@contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    """Count with all formulas, without the fused transformer layers that have none."""
    with _FAST.lock:
        _FAST.counters += 1
        if _FAST.counters == 1:
            _FAST.before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False, custom_mapping=_formulas())
        counter.mod_tracker = _NoModules()  # type: ignore[assignment]
        with counter:
            yield counter
    finally:
        with _FAST.lock:
            _FAST.counters -= 1
            if not _FAST.counters:
                torch.backends.mha.set_fastpath_enabled(_FAST.before)


class _NoModules:
    """Stands in for torch's tracker of modules.

    Only totals are read, and its hooks break ``torch.autograd.grad`` where a module is given a parameter itself.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class _FastPath:
    """Torch's switch is the whole process's, and counters of several threads may overlap."""

    def __init__(self) -> None:
        self.lock, self.counters, self.before = threading.Lock(), 0, True


_FAST = _FastPath()


def _rnn_forward(  # type: ignore[no-untyped-def]
    x, w_ih, w_hh, b_ih, b_hh, hx, cx, reverse, batch_sizes, mode, hidden_size, *args, out_shape=None, **kwargs
) -> int:
    steps = x[0] * x[1]
    return 2 * steps * (w_ih[0] * w_ih[1] + w_hh[0] * w_hh[1])


def _rnn_backward(x, w_ih, w_hh, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    # gradients of the input and of the weights: each as many products as the forward pass
    return 2 * 2 * x[0] * x[1] * (w_ih[0] * w_ih[1] + w_hh[0] * w_hh[1])


def _attention_forward(q, k, v, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    # scores q k^T, then scores times v; shapes (batch, heads, positions, width)
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _attention_backward(dy, q, k, v, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    # the scores once more, dy v^T, and the gradients of q, k and v
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


def _formulas() -> dict[Any, Any]:
    """Return formulas for what torch's own table lacks."""
    aten = torch.ops.aten
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    formulas = {
        "mkldnn_rnn_layer": _rnn_forward,
        "mkldnn_rnn_layer_backward": _rnn_backward,
        attention: _attention_forward,
        f"{attention}_backward": _attention_backward,
    }
    return {getattr(aten, name): formula for name, formula in formulas.items() if hasattr(aten, name)}
