"""Masked matmul's kernels behind one door: which of them runs a step, and how it is called.

Every tensor that arrives here was checked by autoflip.ops.masked_matmul: 2-d, one dtype, one device.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoflip.ops import _masked_weight as weights
from autoflip.ops import backend
from autoflip.ops._masked_weight import CPP

backend.register("masked_matmul", "cpp", "cuda", "triton")

TILE = 32  # of kernels/masked_matmul.py and csrc/cuda/masked_matmul.cu
STEPS = ("forward", "dx", "dw")
HEIGHTS = {"t": 16, "q": 4}  # letter of a path -> rows that keep the same columns; the higher first
# rows of x that share what the kernels of path "fff" read of a weight; 0: there are no such kernels
FEW = CPP.masked_every_together() if CPP is not None else 0
# whether more rows than FEW meet tiles of the weight, as fast as a dense product, instead of going FEW at a time
TILES = CPP is not None and CPP.masked_every_tiles()


_HEIGHT = {3 * letter: height for letter, height in HEIGHTS.items()}  # by path: such a letter stands in all steps


class Parts(NamedTuple):
    """What the ops take of a Pack: see ``autoflip.ops.masked_matmul.Pack``."""

    mask: Tensor
    layout: Tensor
    chunk: int
    live: Tensor  # GPU: live_tiles; CPU: make_bits where a step but not every step is "f", else empty
    kept: int
    # one letter a step (forward, dx, dw): s = sparse kernel, d = dense product, f = every product computed by kernels
    # which read the weight through the mask, in bits ("fff": they are the layout); or "ttt", "qqq": kernels for masks
    # of blocks of 16 or 4 rows, the layout is that of the blocks then
    path: str


def serves(a: Tensor, parts: Parts, step: str) -> str:
    """Return what runs a step on the rows of ``a`` (dy or x): "cpp", "cuda", "triton" or "dense"."""
    if parts.path[STEPS.index(step)] == "d" or a.dtype is not torch.float32 or a.device.type not in ("cpu", "cuda"):
        return "dense"
    name = backend.serve("masked_matmul", a.device)
    if name == "cpp":
        return "cpp" if parts.layout.numel() else "dense"
    return "dense" if name == "reference" else name


def make_layout(mask: Tensor, chunk: int, groups: bool, back: bool) -> Tensor:
    """Return the CPU kernel's layout (uint8) of a contiguous 2-d CPU mask.

    ``groups``: rows are walked four at a time, else one by one; ``back``: with an order for dx alone.
    """
    rows, cols = mask.shape
    return _beside(mask, CPP.masked_matmul_layout(mask.data_ptr(), rows, cols, chunk, groups, back))


def block_letter(mask: Tensor) -> str:
    """Return the letter of HEIGHTS whose blocks (from row 0 on) a contiguous 2-d CPU mask is made of, or ""."""
    for letter, height in HEIGHTS.items():
        if len(mask) < height or not torch.equal(mask[:height], mask[:1].expand(height, -1)):
            continue
        if torch.equal(mask[::height].repeat_interleave(height, 0)[: len(mask)], mask):
            return letter
    return ""


def make_block_layout(mask: Tensor, chunk: int, letter: str) -> Tensor:
    """Return the layout of a mask that is made of blocks of ``HEIGHTS[letter]`` rows."""
    return make_layout(mask[:: HEIGHTS[letter]].contiguous(), chunk, False, False)


def make_bits(mask: Tensor) -> Tensor:
    """Return a contiguous 2-d CPU mask in bits (uint8): what the kernels that compute every product take of it."""
    return _beside(mask, CPP.masked_few_bits(mask.data_ptr(), *mask.shape))


def _beside(mask: Tensor, content: bytes) -> Tensor:
    """Return ``content`` as uint8 where ``mask`` is, whatever torch's default device is."""
    made = mask.new_empty(len(content), dtype=torch.uint8)
    made.numpy()[:] = np.frombuffer(content, np.uint8)
    return made


def live_tiles(mask: Tensor) -> Tensor:
    """Return uint8 ``(ceil(O/32), ceil(K/32))``, what the GPU kernels skip by: 1 where a tile keeps any entry."""
    o, k = mask.shape
    padded = F.pad(mask.to(torch.uint8), (0, -k % TILE, 0, -o % TILE))
    return padded.view(padded.shape[0] // TILE, TILE, padded.shape[1] // TILE, TILE).amax((1, 3)).contiguous()


# --- the three steps


def linear_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, *rest: Any) -> Tensor:
    parts = Parts(*rest)
    name = serves(x, parts, "forward")
    if name == "dense":
        y = F.linear(x, weights.operand(weight, parts.mask), bias)
        return y.relu_() if relu else y
    if name == "cpp":
        return cpu_forward(x, weight, bias, relu, parts)
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty(len(x), len(parts.mask))
    if name == "triton":
        _triton().forward(x, weight, bias, parts.mask, _live(parts), y, relu=relu)
    else:
        sizes = (0 if bias is None else bias.data_ptr(), len(x), *parts.mask.shape, relu, y.data_ptr())
        _launch("forward", x, weight, parts, sizes)
    return y


def dx_kernel(dy: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    parts = Parts(*rest)
    name = serves(dy, parts, "dx")
    if name == "dense":
        return dy @ weights.operand(weight, parts.mask)
    if name == "cpp":
        out = cpu_backward(dy, None, weight, parts, dx=True)[0]
        assert out is not None
        return out
    dy, weight = dy.contiguous(), weight.contiguous()
    out = dy.new_empty(len(dy), parts.mask.shape[1])
    if name == "triton":
        _triton().dx(dy, weight, parts.mask, _live(parts), out)
    else:
        _launch("dx", dy, weight, parts, (len(dy), *parts.mask.shape, out.data_ptr()))
    return out


def dw_kernel(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    parts = Parts(*rest)
    name = serves(dy, parts, "dw")
    if name == "dense":
        if weights.kernel_here(dy, x):
            return cpu_outer(dy, x, parts, dy.new_empty(parts.mask.shape))
        return weights.select(dy.T @ x, parts.mask)
    if name == "cpp":
        out = cpu_backward(dy, x, None, parts, dw=dy.new_empty(parts.mask.shape))[1]
        assert out is not None
        return out
    dy, x = dy.contiguous(), x.contiguous()
    out = dy.new_zeros(parts.mask.shape)
    if name == "triton":
        _triton().dw(dy, x, parts.mask, _live(parts), out)
    else:
        _launch("dw", dy, x, parts, (len(dy), *parts.mask.shape, out.data_ptr()))
    return out


# --- the CPU extension


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def new_values(parts: Parts) -> Tensor | None:
    """Return room for the copy of the kept weights that forward makes and dx reads again; None where there is none."""
    floats = _floats(parts)
    return torch.empty(floats, dtype=torch.float32) if floats else None


def _floats(parts: Parts) -> int:
    height = _HEIGHT.get(parts.path)
    if height is not None:
        if parts.kept < 1 << 13:  # copied again as fast as memory is found for them
            return 0
        return int(CPP.masked_blocks_values(parts.layout.data_ptr(), parts.chunk, height, *parts.mask.shape))
    if parts.mask.numel() < 1 << 18 or parts.path[:2] != "ss":  # smaller ones are read where they stand
        return 0
    packs = CPP.masked_matmul_packs(parts.layout.data_ptr(), *parts.mask.shape, parts.chunk)
    return parts.kept if packs else 0


def plan(parts: Parts) -> Any:
    """Return what the extension's own training step takes (csrc/bind_step.cpp); None where a step is dense."""
    if CPP is None or "d" in parts.path or not parts.layout.numel():
        return None
    every, bits = sum(1 << i for i, letter in enumerate(parts.path) if letter == "f"), _bits(parts)
    sizes = (parts.chunk, *parts.mask.shape, _floats(parts), _HEIGHT.get(parts.path, 0))
    return CPP.masked_plan(parts.layout.data_ptr(), *sizes, bits.data_ptr(), every, (parts.layout, bits))


def _bits(parts: Parts) -> Tensor:
    return parts.layout if parts.path == "fff" else parts.live


def cpu_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, parts: Parts, values: Tensor | None = None
) -> Tensor:
    """Return ``act(x @ (weight * mask).T + bias)``; ``values`` is written: what :func:`new_values` returned."""
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, cols = parts.mask.shape
    n = x.shape[0]  # len() of a tensor takes three times as long
    y = x.new_empty(n, rows)  # float32 whatever torch's default is
    layout, sizes, threads = parts.layout.data_ptr(), (n, rows, cols), torch.get_num_threads()
    if parts.path[0] == "f":
        bits = _bits(parts).data_ptr()
        CPP.masked_every_forward(weight.data_ptr(), bits, x.data_ptr(), *sizes, _at(bias), relu, y.data_ptr(), threads)
        return y
    sources = x.data_ptr(), weight.data_ptr(), layout, parts.chunk
    results = relu, y.data_ptr(), _at(values), threads
    height = _HEIGHT.get(parts.path)
    if height is not None:
        CPP.masked_blocks_forward(*sources, height, _at(bias), *sizes, *results)
    else:
        CPP.masked_matmul_forward(*sources, _at(bias), *sizes, *results)
    return y


def cpu_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    parts: Parts,
    *,
    dx: bool = False,
    dw: Tensor | None = None,
    db: bool = False,
    values: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, dw, db); dx takes ``weight``, dw takes ``x``; ``dw`` is written, zeros where it is pruned.

    ``values``: what :func:`cpu_forward` wrote there.
    """
    dy = dy.contiguous()
    x = None if x is None or dw is None else x.contiguous()
    weight = None if weight is None or not dx else weight.contiguous()
    rows, cols = parts.mask.shape
    n = dy.shape[0]
    out = dy.new_empty(n, cols) if dx else None
    sums = dy.new_empty(rows) if db else None
    sizes, layout, threads = (n, rows, cols), parts.layout.data_ptr(), torch.get_num_threads()
    if parts.path == "fff":
        results = _at(out), _at(dw), _at(sums), threads
        CPP.masked_every_backward(_at(weight), layout, dy.data_ptr(), _at(x), *sizes, *results)
        return out, dw, sums
    every_x, every_w = (letter == "f" for letter in parts.path[1:])
    if dx and every_x:
        bits = _bits(parts).data_ptr()
        CPP.masked_every_backward(_at(weight), bits, dy.data_ptr(), 0, *sizes, _at(out), 0, 0, threads)
    if x is not None and dw is not None and every_w:
        cpu_outer(dy, x, parts, dw)
    results = 0 if every_x else _at(out), 0 if every_w else _at(dw), _at(sums), threads
    sources = dy.data_ptr(), _at(x), _at(weight), _at(values), layout, parts.chunk
    height = _HEIGHT.get(parts.path)
    if height is not None:
        CPP.masked_blocks_backward(*sources, height, *sizes, *results)
    else:
        CPP.masked_matmul_backward(*sources, *sizes, *results)
    return out, dw, sums


def cpu_outer(dy: Tensor, x: Tensor, parts: Parts, out: Tensor) -> Tensor:
    """Write ``where(mask, dy.T @ x, 0)`` into ``out``, every product computed."""
    dy, x = dy.contiguous(), x.contiguous()
    threads, sizes = torch.get_num_threads(), (len(dy), *parts.mask.shape)
    bits = _bits(parts)
    sources = dy.data_ptr(), x.data_ptr(), parts.mask.data_ptr(), bits.data_ptr() if bits.numel() else 0
    if not CPP.masked_matmul_outer(*sources, *sizes, out.data_ptr(), threads):
        torch.mm(dy.T, x, out=out)
        words = out.numel(), out.element_size()
        CPP.masked_matmul_select(out.data_ptr(), parts.mask.data_ptr(), *words, out.data_ptr(), threads)
    return out


# --- GPUs


def _launch(step: str, a: Tensor, b: Tensor, parts: Parts, sizes: tuple[int, ...]) -> None:
    function = getattr(backend.extension("_cuda")[0], f"masked_matmul_{step}")
    live = _live(parts)
    if max(live.shape) > 65535:
        raise ValueError(f"masked_matmul: mask has shape {tuple(parts.mask.shape)}; CUDA's grid ends at 2097120")
    with torch.cuda.device(a.device):
        stream = torch.cuda.current_stream().cuda_stream
        function(a.data_ptr(), b.data_ptr(), parts.mask.data_ptr(), live.data_ptr(), *sizes, stream)


def _live(parts: Parts) -> Tensor:
    # a Pack made while another backend served has none, or the mask in bits
    return parts.live if parts.live.dim() == 2 else live_tiles(parts.mask)


def _triton() -> ModuleType:
    return import_module("autoflip.kernels.masked_matmul")
