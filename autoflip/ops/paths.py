"""Which path a masked product takes, step by step: the sparse kernel or the dense product.

Forward, dx and dw choose each for itself, per weight shape, batch size, density, shape of the mask's blocks and thread
count: by a short trial that is remembered on disk (:mod:`autoflip.ops.trials`), or by :func:`rule` where trials are
off. A trial compares the products; what autograd in Python adds to either (some 15 us a step) is not in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from autoflip.ops import _masked_kernels as kernels
from autoflip.ops import _masked_weight as weights
from autoflip.ops import backend, trials

__all__ = ["PATHS", "bucket", "chunk", "letters", "rule"]

PATHS = ("auto", "sparse", "dense")
# multiply-adds of the dense product below which a sparse call costs more than it saves, and is not tried
LEAST_WORK = 400_000
# density above which element masks are not tried: no CPU measured (bench/bench_layers.py) gained there
TRIED_BELOW = 0.6
# step -> (least rows of x, density below which the kernel was at least 10 % faster than torch 2.13's dense float32
# product (MKL; "avx2" with MKL_ENABLE_INSTRUCTIONS=AVX2) at every weight of bench/bench_masked_matmul.py). Intel Xeon
# (Sapphire Rapids), 1 thread, CPU time, 2026-11-22. "base" was not measured: it runs where a trial finds it faster.
RULE: dict[str, dict[str, tuple[tuple[int, float], ...]]] = {
    "avx512": {
        "forward": ((16, 0.25), (64, 0.3), (128, 0.35)),
        "dx": ((16, 0.08), (64, 0.12), (128, 0.15)),
        "dw": ((16, 0.08), (64, 0.25)),
    },
    "avx2": {"forward": ((16, 0.35),), "dx": ((16, 0.2),), "dw": ((16, 0.2),)},
    "base": {"forward": (), "dx": (), "dw": ()},
}


def bucket(n_rows: int) -> int:
    """Return the batch size that stands for ``n_rows``: the next power of two, 512 at most."""
    return min(512, 1 << max(0, n_rows - 1).bit_length())


def chunk(n_rows: int) -> int:
    """Return the layout's columns a chunk: as many as keep their activations in the first-level cache."""
    return 128 if n_rows > 16 else 512


def rule(n_rows: int, out_features: int, in_features: int, density: float, *, step: str = "forward") -> str:
    """Return "sparse" where the kernel was measured to beat the dense product, else "dense": no timing here.

    Args:
        n_rows: rows of ``x`` (all leading dimensions multiplied).
        out_features: rows of the weight.
        in_features: columns of the weight.
        density: kept share of the weight, 0 to 1.
        step: "forward", "dx" or "dw".
    """
    module, _ = backend.extension("_C")
    if module is None or n_rows * out_features * in_features < LEAST_WORK:
        return "dense"
    limit = max((d for least, d in RULE[module.isa()][step] if n_rows >= least), default=0.0)
    return "sparse" if density < limit else "dense"


def letters(mask: Tensor, kept: int, n_rows: int, layout: Callable[[], Tensor], *, timed: bool) -> str:
    """Return one letter a step (forward, dx, dw) for the CPU kernel: s = sparse, d = dense.

    Args:
        mask: ``(O, K)``, contiguous bool on the CPU.
        kept: its kept entries.
        n_rows: a :func:`bucket`.
        layout: makes the mask's layout for ``chunk(n_rows)``.
        timed: whether a trial may run, or what one found be used.
    """
    rows, cols = mask.shape
    density = kept / mask.numel() if mask.numel() else 1.0
    if not (timed and trials.enabled()):
        return "".join(rule(n_rows, rows, cols, density, step=step)[0] for step in kernels.STEPS)
    if n_rows * rows * cols < LEAST_WORK or kept == 0 or kept == mask.numel():
        return "ddd"
    blocks = _rows_together(mask, kept)
    if density > TRIED_BELOW and blocks < 2:
        return "ddd"
    key = (
        f"masked_linear {rows}x{cols} n{n_rows} density {trials.near(density)} rows {blocks:.1f} "
        f"threads {torch.get_num_threads()}"
    )
    ways = _ways(mask, kept, n_rows, layout)
    return "".join(trials.choose(f"{key} {step}", both)[0] for step, both in ways.items())


def _rows_together(mask: Tensor, kept: int) -> float:
    """Return how many of four neighbouring rows keep a column that one of them keeps: 1 (elements) to 4 (blocks)."""
    whole = mask[: len(mask) // 4 * 4]
    columns = int(whole.view(-1, 4, mask.shape[1]).any(1).sum())
    share = int(whole.sum()) / columns if columns else 1.0
    # random masks share columns by chance; what counts is what lies above that
    density = kept / mask.numel()
    chance = 4 * density / (1 - (1 - density) ** 4)
    return round(2 * max(1.0, share / chance)) / 2


def _ways(
    mask: Tensor, kept: int, n_rows: int, layout: Callable[[], Tensor]
) -> dict[str, dict[str, Callable[[], object]]]:
    rows, cols = mask.shape
    made: dict[str, object] = {}

    def case() -> tuple[Tensor, Tensor, Tensor, kernels.Parts, Tensor, Tensor]:
        if not made:
            g = torch.Generator().manual_seed(0)
            x, dy = torch.randn(n_rows, cols, generator=g), torch.randn(n_rows, rows, generator=g)
            w = weights.select(torch.randn(rows, cols, generator=g), mask)
            parts = kernels.Parts(mask, layout(), chunk(n_rows), mask.new_empty(0), kept, "sss")
            values = kernels.cpu_forward(x, w, None, False, parts)[1]
            made["case"] = (x, dy, w, parts, values, torch.zeros(rows, cols))
        return made["case"]  # type: ignore[return-value]

    def forward() -> object:
        x, _, w, parts, *_ = case()
        return kernels.cpu_forward(x, w, None, False, parts)

    def forward_dense() -> object:
        x, _, w, *_ = case()
        return F.linear(x, weights.operand(w, mask))

    def dx() -> object:
        _, dy, w, parts, values, _ = case()
        return kernels.cpu_backward(dy, None, w, values, parts, dx=True)

    def dx_dense() -> object:
        _, dy, w, *_ = case()
        return dy @ w

    def dw() -> object:
        x, dy, _, parts, _, out = case()
        return kernels.cpu_backward(dy, x, None, None, parts, dw=out)

    def dw_dense() -> object:
        x, dy, _, parts, _, out = case()
        return kernels.cpu_outer(dy, x, parts, out)

    return {
        "forward": {"dense": forward_dense, "sparse": forward},
        "dx": {"dense": dx_dense, "sparse": dx},
        "dw": {"dense": dw_dense, "sparse": dw},
    }
