"""Masked matmul's kernels behind one door: which of them runs a step, and how it is called.

Every tensor that arrives here was checked by autoflip.ops.masked_matmul: 2-d, one dtype, one device.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from autoflip.ops import backend

backend.register("masked_matmul", "cpp", "cuda", "triton")

PATHS = ("auto", "sparse", "dense")
TILE = 32  # of kernels/masked_matmul.py and csrc/cuda/masked_matmul.cu
# (least rows of x, density below which the kernel runs), last fitting row counts: there it was at least 10 % faster
# than torch 2.13's dense float32 product (MKL) at every weight of bench/bench_masked_matmul.py with at least
# LEAST_WORK multiply-adds. Intel Xeon (Sapphire Rapids), 1 thread, CPU time, machine under load, 2026-11-22;
# "avx2" against MKL_ENABLE_INSTRUCTIONS=AVX2. "base" was not measured: it never runs unless a Pack forces it.
CROSSOVER: dict[str, dict[str, tuple[tuple[int, float], ...]]] = {
    "avx512": {
        "forward": ((16, 0.12), (32, 0.22)),
        "dx": ((32, 0.06), (64, 0.12)),
        "dw": ((64, 0.06), (256, 0.07)),
    },
    "avx2": {"forward": ((16, 0.12),), "dx": ((32, 0.06),), "dw": ((64, 0.06),)},
    "base": {"forward": (), "dx": (), "dw": ()},
}
LEAST_WORK = 1_500_000


class Parts(NamedTuple):
    """What the ops take of a Pack: see ``autoflip.ops.masked_matmul.Pack``."""

    mask: Tensor
    layout: Tensor
    layout_t: Tensor
    live: Tensor
    kept: int
    path: str


def crossover(n_rows: float, step: str) -> float:
    """Return the density below which this machine's CPU kernel runs a step on ``n_rows`` rows; 0 = never."""
    module, _ = backend.extension("_C")
    limits = CROSSOVER[module.isa()][step] if module else ()
    return max((density for least, density in limits if n_rows >= least), default=0.0)


def path(n_rows: int, out_features: int, in_features: int, density: float, *, step: str = "forward") -> str:
    """Return "sparse" where the CPU kernel is known to beat the dense product, else "dense".

    A rule on numbers that were measured once, never a timing at run time: the path decides the order of
    float32 sums, and a run must repeat bit for bit.

    Args:
        n_rows: rows of ``x`` (all leading dimensions multiplied).
        out_features: rows of the weight.
        in_features: columns of the weight.
        density: kept share of the weight, 0 to 1.
        step: "forward", "dx" or "dw".
    """
    if n_rows * out_features * in_features < LEAST_WORK:
        return "dense"
    return "sparse" if density < crossover(n_rows, step) else "dense"


def serves(a: Tensor, parts: Parts, step: str) -> str:
    """Return what runs a step on the rows of ``a`` (dy or x): "cpp", "cuda", "triton" or "dense"."""
    if parts.path == "dense" or a.dtype is not torch.float32 or a.device.type not in ("cpu", "cuda"):
        return "dense"
    name = backend.serve("masked_matmul", a.device)
    if name == "cpp":
        density = parts.kept / parts.mask.numel() if parts.mask.numel() else 1.0
        rows, cols = parts.mask.shape
        fast = parts.path == "sparse" or path(len(a), rows, cols, density, step=step) == "sparse"
        return "cpp" if fast and parts.layout.numel() else "dense"
    # no GPU has measured the others against dense: they run when asked for by name
    asked = parts.path == "sparse" or backend.wish() != "auto"
    return name if asked and name != "reference" else "dense"


def make_layout(mask: Tensor, *, transposed: bool) -> Tensor:
    """Return the CPU kernel's layout (uint8) of a contiguous 2-d CPU mask or of its transpose."""
    kernels = backend.extension("_C")[0]
    assert kernels is not None
    rows, cols = mask.shape
    layout = torch.empty(kernels.masked_matmul_layout_bound(rows, cols, transposed), dtype=torch.uint8)
    size = kernels.masked_matmul_layout(mask.data_ptr(), rows, cols, transposed, layout.data_ptr())
    return layout[:size].clone()


def live_tiles(mask: Tensor) -> Tensor:
    """Return uint8 ``(ceil(O/32), ceil(K/32))``, what the GPU kernels skip by: 1 where a tile keeps any entry."""
    o, k = mask.shape
    padded = F.pad(mask.to(torch.uint8), (0, -k % TILE, 0, -o % TILE))
    return padded.view(padded.shape[0] // TILE, TILE, padded.shape[1] // TILE, TILE).amax((1, 3)).contiguous()


# --- where(mask, weight, 0): the dense path's weight


def transformed(*tensors: Tensor) -> bool:
    """Tell whether a function transform (vmap, grad, jvp) is at work on the tensors."""
    # is_grads_batched=True runs under an older vmap that functorch's stack does not show
    old_vmap = torch._C._functorch.is_legacy_batchedtensor
    return torch._C._functorch.peek_interpreter_stack() is not None or any(old_vmap(t) for t in tensors)


def traced() -> bool:
    """Tell whether ``torch.jit.trace`` is at work, to which a kernel's result would look like a constant."""
    return not torch.compiler.is_compiling() and bool(torch._C._is_tracing())


def has_memory(t: Tensor) -> bool:
    """Tell whether ``t`` is an ordinary tensor outside any dispatch mode, so that its address means something."""
    return type(t) in (Tensor, torch.nn.Parameter) and not torch._C._len_torch_dispatch_stack()


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.mask = mask
        return _select_kernel(weight, mask)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return select(g, ctx.mask), None


def _select_kernel(weight: Tensor, mask: Tensor, *, out: Tensor | None = None) -> Tensor:
    mask, weight = mask.contiguous(), weight.contiguous()
    out = torch.empty(weight.shape) if out is None else out
    backend.extension("_C")[0].masked_matmul_select(  # type: ignore[union-attr]
        weight.data_ptr(), mask.data_ptr(), mask.numel(), out.data_ptr(), torch.get_num_threads()
    )
    return out


def _select_here(weight: Tensor) -> bool:
    return (
        weight.dtype is torch.float32
        and weight.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not traced()
        and has_memory(weight)
        and not transformed(weight)
        and backend.serve("masked_matmul", weight.device) == "cpp"
    )


def _operand(weight: Tensor, mask: Tensor) -> Tensor:
    """Return what the dense path multiplies by: ``weight`` itself where its pruned entries are zero already.

    Layers keep them at zero, and to look (read only) costs a third of a masked copy or less; a copy of a 784x200
    weight costs half of its product with 32 rows.
    """
    return weight if reads_clean(weight, mask) else select(weight, mask)


def reads_clean(weight: Tensor, mask: Tensor) -> bool | None:
    """Tell whether all pruned entries are zero; None where the CPU kernel cannot look."""
    if not (_select_here(weight) and weight.is_contiguous() and mask.is_contiguous()):
        return None
    clean = backend.extension("_C")[0].masked_matmul_is_clean  # type: ignore[union-attr]
    return bool(clean(weight.data_ptr(), mask.data_ptr(), mask.numel()))


def _select_own(a: Tensor, mask: Tensor) -> Tensor:
    """Select in place where that is possible: ``a`` is contiguous, was made by the caller and has no history."""
    if _select_here(a) and not a.requires_grad:
        return _select_kernel(a, mask, out=a)
    return torch.where(mask, a, 0)


def select(weight: Tensor, mask: Tensor) -> Tensor:
    """Return ``torch.where(mask, weight, 0)``, on the CPU about 20 times as fast; equal shapes, any number of dims."""
    if not _select_here(weight):
        return torch.where(mask, weight, 0)
    if weight.requires_grad and torch.is_grad_enabled():
        return _Select.apply(weight, mask)
    return _select_kernel(weight, mask)


# --- the three kernels


def linear_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, *rest: Any) -> Tensor:
    parts = Parts(*rest)
    name = serves(x, parts, "forward")
    if name == "dense":
        y = F.linear(x, _operand(weight, parts.mask), bias)
        return y.relu_() if relu else y
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty(len(x), len(parts.mask))
    if name == "triton":
        _triton().forward(x, weight, bias, parts.mask, _live(parts), y, relu=relu)
    else:
        sizes = (0 if bias is None else bias.data_ptr(), len(x), *parts.mask.shape, relu, y.data_ptr())
        _launch(name, "forward", x, weight, parts, parts.layout, sizes)
    return y


def dx_kernel(dy: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    parts = Parts(*rest)
    name = serves(dy, parts, "dx")
    if name == "dense":
        return dy @ _operand(weight, parts.mask)
    dy, weight = dy.contiguous(), weight.contiguous()
    out = dy.new_empty(len(dy), parts.mask.shape[1])
    if name == "triton":
        _triton().dx(dy, weight, parts.mask, _live(parts), out)
    else:
        _launch(name, "dx", dy, weight, parts, parts.layout_t, (len(dy), *parts.mask.shape, out.data_ptr()))
    return out


def dw_kernel(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    parts = Parts(*rest)
    name = serves(dy, parts, "dw")
    if name == "dense":
        return _select_own(dy.T @ x, parts.mask)
    dy, x = dy.contiguous(), x.contiguous()
    out = dy.new_zeros(parts.mask.shape)
    if name == "triton":
        _triton().dw(dy, x, parts.mask, _live(parts), out)
    else:
        _launch(name, "dw", dy, x, parts, parts.layout, (len(dy), *parts.mask.shape, out.data_ptr()))
    return out


def _launch(name: str, step: str, a: Tensor, b: Tensor, parts: Parts, layout: Tensor, sizes: tuple[int, ...]) -> None:
    if name == "cpp":
        function = getattr(backend.extension("_C")[0], f"masked_matmul_{step}")
        function(a.data_ptr(), b.data_ptr(), layout.data_ptr(), *sizes, torch.get_num_threads())
        return
    function = getattr(backend.extension("_cuda")[0], f"masked_matmul_{step}")
    live = _live(parts)
    if max(live.shape) > 65535:
        raise ValueError(f"masked_matmul: mask has shape {tuple(parts.mask.shape)}; CUDA's grid ends at 2097120")
    with torch.cuda.device(a.device):
        stream = torch.cuda.current_stream().cuda_stream
        function(a.data_ptr(), b.data_ptr(), parts.mask.data_ptr(), live.data_ptr(), *sizes, stream)


def _live(parts: Parts) -> Tensor:
    # a Pack made while another backend served has none
    return parts.live if parts.live.numel() else live_tiles(parts.mask)


def _triton() -> ModuleType:
    return import_module("autoflip.kernels.masked_matmul")
