"""Which path a masked product takes, step by step: the sparse kernel or the dense product.

Forward, dx and dw choose each for itself, per weight shape, batch size, density, shape of the mask's blocks and thread
count: by a short trial that is remembered on disk (:mod:`autoflip.ops.trials`), or by :func:`rule` where trials are
off. A last trial puts what was chosen, as a whole training step through autograd, against the dense path and against
kernels that compute every product and read the weight through its mask: with AVX-512 for any number of rows, with AVX2
for up to 8 and small products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from autoflip.ops import _masked_kernels as kernels
from autoflip.ops import _masked_matmul as steps
from autoflip.ops import _masked_weight as weights
from autoflip.ops import backend, trials
from autoflip.ops.batches import filled

__all__ = ["PATHS", "chunk", "letters", "rule"]

PATHS = ("auto", "sparse", "dense")
# multiply-adds of the dense product below which :func:`rule` takes no sparse call
LEAST_WORK = 400_000
# seconds that whole steps are timed for in a row. After another way a step finds the weight in memory, not in the
# cache, which favours what reads little of it: 2304x512, 1 row, density 0.05 took 0.7 of the time of every product
# computed, and 1.2 to 1.5 of it step after step. Every product computed is as fast as dense in both (Zen 4, 1 thread)
WHOLE = 0.003
# density below which a rule takes the kernels for blocks where all of the sparse ones would run: at 0.1 and less they
# were as fast or faster at every weight and batch tried, 200x200 to 4096x4096 at 16 and 64 rows (Zen 4, 1 thread)
BLOCK_DENSITY = 0.15
# multiply-adds up to which AVX2 may compute every product by the kernels for few rows, whatever the rows
FEW_WORK = 1 << 20
# share of the first way's time that another whole step must come below: as a layer goes, all ways ask as much of the
# tensors, and the dense path of a small layer, which masks dw in a hook, is itself slower than torch's layer
GAIN = 0.99
# step -> (least rows of x, density below which the kernel was at least 10 % faster than torch 2.13's dense float32
# product at every weight tried: 784x200, 2304x512 and 4096x4096, densities 0.7 to 0.01). "avx512": AMD EPYC (Zen 4),
# 1 thread, CPU time, 2026-11-28. "avx2": AMD EPYC (Zen 1; 784x200 and 2304x512), 2026-11-29. "base" was not measured:
# it runs where a trial finds it faster.
RULE: dict[str, dict[str, tuple[tuple[int, float], ...]]] = {
    "avx512": {
        "forward": ((16, 0.5), (64, 0.7)),
        "dx": ((16, 0.2), (64, 0.6)),
        "dw": ((16, 0.2), (64, 0.5)),
    },
    "avx2": {"forward": ((16, 0.5),), "dx": ((16, 0.3),), "dw": ((16, 0.1), (64, 0.2))},
    "base": {"forward": (), "dx": (), "dw": ()},
}


def chunk(n_rows: int, density: float, letter: str = "s", entries: int = 0) -> int:
    """Return the layout's columns a chunk: as many as keep what they are multiplied by in the first-level cache.

    The fewer of them are kept, the more are needed to fill a loop. Blocks share a load between rows, and may go to the
    second-level cache for it: the gradient in the weight, where a chunk ends in a loop that is not full, gains by wide
    ones (at 32 to 256 rows a step of 4x1 blocks took 2 to 8 % less at density 0.1 by 512 than by 128 columns). Where
    the kept weights are copied first (1 << 20 entries and more, rows walked one by one) twice as many are faster: the
    copy goes along rows of a chunk. The three products of 2304x512 to 4096x4096 gained 3 to 19 % at 32 to 128 rows.
    Rows of a huge weight that is read where it stands are met in shorter pieces: 4096x4096 at 16 rows took 5 to 13 %
    less by 256 columns than by 512, densities 0.7 to 0.25; 2048x2048 2 %.
    24 and 32 lanes (AVX2) leave room for more columns than 64: 256 of them took 10 to 20 % less than 128, and where
    less than a fifth is kept 512 up to 5 % less than 256 (Zen 1).
    """
    together = groups(n_rows, entries, density)
    if _narrow() and letter not in kernels.HEIGHTS:
        return 256 if n_rows > 16 and (together or density >= 0.22) else 512
    if n_rows <= 16 and letter == "s" and entries >= 1 << 22 and together:
        return 256
    if n_rows <= 16 or density < 0.03:
        return 512
    if letter in kernels.HEIGHTS:
        return 512 if density < 0.12 else 256
    few = 256 if n_rows <= 32 or density < 0.07 else 128
    copied = entries >= 1 << 20 and not together
    return 2 * few if copied and n_rows <= 128 else few


def groups(n_rows: int, entries: int, density: float) -> bool:
    """Return whether rows are walked four at a time, for the columns that they share, instead of one by one.

    Few lanes do too little with a column that is shared to pay for the smaller buckets. With AVX2 rows walked one by
    one meet 32 lanes, in fours 24, and take less up to density 0.5: 784x200 and 2304x512 at 0.3 0.77 to 0.9 of it from
    32 rows on. Those of a large weight would be copied first, which few rows pay for dearly (Zen 1). Where two units
    multiply, the end of each short loop costs as much as half of what is in it: walked one by one 784x200 and 512x512
    take 0.91 to 0.97 of it at 0.2 and 0.3, 2304x512 and 2048x2048 0.9 to 0.93 at 0.2 from 64 rows on, 4096x4096 1.06
    (Emerald Rapids).
    """
    if _two_units() and entries < 1 << 23:
        return density >= (0.35 if entries < 1 << 20 else 0.15 if n_rows <= 32 else 0.25)
    if _narrow():
        large = entries >= 1 << 20
        return density >= ((0.25 if large else 0.4) if n_rows <= 16 else 0.45 if large and n_rows <= 32 else 0.6)
    return density >= (0.25 if n_rows <= 32 else 0.15)


def back(n_rows: int, entries: int, density: float) -> bool:
    """Return whether dx walks an order of its own, else along the forward product's, adding up in memory.

    With few lanes a large weight, read in the order in which it stands, is worth more than sums that stay in registers:
    at 16 and 32 rows dx of 784x200 took 0.7 to 0.9 of the time by an order of its own, of 4096x4096 1.1 to 2.6 times,
    at 64 rows 1.0 to 1.3 times, of 2304x512 0.9 (Zen 4, 1 thread). With at most 24 lanes (AVX2) rows walked one by one
    gain by an order of their own at any size: 2304x512 at density 0.1 takes half the time (Zen 1).
    """
    if _narrow():
        return n_rows > 24 or entries < 1 << 18 or not groups(n_rows, entries, density)
    return n_rows > (32 if entries < 1 << 23 else 64) or entries < 1 << 18


@cache
def _two_units() -> bool:
    """Return whether two of the CPU's units multiply 16 floats at once: Intel's since it has AMX, Zen has one."""
    module, _ = backend.extension("_C")
    return module is not None and bool(module.multiplies_tiles())


@cache
def _narrow() -> bool:
    """Return whether vectors are shorter than AVX-512's."""
    module, _ = backend.extension("_C")
    return module is None or module.isa() != "avx512"


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
    return "sparse" if density < limit * filled(n_rows) else "dense"


def letters(
    mask: Tensor, kept: int, n_rows: int, block: str, make: Callable[[str], kernels.Parts], *, timed: bool
) -> str:
    """Return the path of the CPU kernels, see :class:`autoflip.ops._masked_kernels.Parts`.

    Args:
        mask: ``(O, K)``, contiguous bool on the CPU.
        kept: its kept entries.
        n_rows: a :func:`batches.bucket`.
        block: the letter of the kernels for its blocks, or "".
        make: path -> what it takes.
        timed: whether a trial may run, or what one found be used.
    """
    rows, cols = mask.shape
    density = kept / mask.numel() if mask.numel() else 1.0
    if not (timed and trials.enabled()):
        found = "".join(rule(n_rows, rows, cols, density, step=step)[0] for step in kernels.STEPS)
        if found == "ssd" and kernels.FEW:
            return "ssf"
        return 3 * block if block and found == "sss" and density < BLOCK_DENSITY else found
    if kept == mask.numel():
        return "ddd"
    key = (
        f"masked_linear {rows}x{cols} n{n_rows} density {trials.near(density)} "
        f"rows {kernels.HEIGHTS[block] if block else _rows_together(mask, kept):.1f} threads {torch.get_num_threads()}"
    )
    ways, whole = _ways(mask, n_rows, make)
    found = "".join(_LETTER[trials.choose(f"{key} {step}", some)] for step, some in ways.items())
    # one call forward and one back, with every product of dw computed or not: the least of autograd's cost, which is
    # most of a small layer's
    candidates = ["ddd", found, "sss", *(["ssf"] if found[2] == "f" else []), *([3 * block] if block else [])]
    if kernels.FEW and (_every(n_rows) or n_rows * mask.numel() <= FEW_WORK):
        candidates.append("fff")
    steps = {path: partial(whole, path) for path in candidates}
    return trials.choose(f"{key} whole", steps, seconds=0.1, gain=GAIN, burst=WHOLE)


_LETTER = {"dense": "d", "sparse": "s", "every": "f"}


def _every(n_rows: int) -> bool:
    """Return whether kernels that compute every product are as fast as a dense one at any size of the weight."""
    return kernels.TILES or 0 < n_rows <= kernels.FEW


def _rows_together(mask: Tensor, kept: int) -> float:
    """Return how many of four neighbouring rows keep a column that one of them keeps: 1 (elements) to 4 (blocks)."""
    whole = mask[: len(mask) // 4 * 4]
    columns = int(whole.view(-1, 4, mask.shape[1]).any(1).sum())
    share = int(whole.sum()) / columns if columns else 1.0
    # random masks share columns by chance; what counts is what lies above that
    density = max(kept, 1) / mask.numel()
    chance = 4 * density / (1 - (1 - density) ** 4)
    return round(2 * max(1.0, share / chance)) / 2


def _ways(
    mask: Tensor, n_rows: int, make: Callable[[str], kernels.Parts]
) -> tuple[dict[str, dict[str, Callable[[], object]]], Callable[[str], object]]:
    """Return step -> its two ways, and a training step along a path."""
    rows, cols = mask.shape
    made: dict[str, object] = {}
    look = weights.looker(mask)

    def case() -> tuple[Tensor, Tensor, Tensor, kernels.Parts, Tensor]:
        if not made:
            g = torch.Generator().manual_seed(0)
            sizes = (n_rows, cols), (n_rows, rows), (rows, cols)
            x, dy, w = (torch.randn(size, generator=g, dtype=torch.float32) for size in sizes)
            w = weights.select(w, mask)
            made["case"] = (x, dy, w, make("sss"), torch.zeros_like(w))
        return made["case"]  # type: ignore[return-value]

    def forward() -> object:
        x, _, w, parts, _ = case()
        return kernels.cpu_forward(x, w, None, False, parts)

    def forward_dense() -> object:
        x, _, w, *_ = case()
        return F.linear(x, weights.operand(w, mask))

    def dx() -> object:
        _, dy, w, parts, _ = case()
        return kernels.cpu_backward(dy, None, w, parts, dx=True)

    def dx_dense() -> object:
        _, dy, w, *_ = case()
        return dy @ w

    def dw() -> object:
        x, dy, _, parts, out = case()
        return kernels.cpu_backward(dy, x, None, parts, dw=out)

    def dw_of_all() -> object:
        x, dy, _, parts, out = case()
        return kernels.cpu_outer(dy, x, every() if kernels.FEW else parts, out)

    @cache
    def every() -> kernels.Parts:
        return make("fff")

    def forward_every() -> object:
        x, _, w, *_ = case()
        return kernels.cpu_forward(x, w, None, False, every())

    def dx_every() -> object:
        _, dy, w, *_ = case()
        return kernels.cpu_backward(dy, None, w, every(), dx=True)

    @cache
    def leaves() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, _, w, *_ = case()
        hooked = w.detach().requires_grad_()
        hooked.register_hook(weights.gradient_hook(mask))
        return x.detach().requires_grad_(), w.detach().requires_grad_(), hooked, w.new_zeros(rows).requires_grad_()

    @cache
    def parts_of(path: str) -> tuple[kernels.Parts, Callable[[], Tensor], object]:
        parts = make(path)
        return parts, case()[4].detach, kernels.plan(parts)

    def whole(path: str) -> object:
        dy = case()[1]
        with torch.enable_grad():
            x, w, hooked, bias = leaves()
            x.grad = w.grad = hooked.grad = bias.grad = None
            if path == "ddd":  # as the layers of autoflip.nn do it
                assert look is not None
                look(hooked)
                y = F.linear(x, hooked, bias)
            else:
                weights.kernel_here(x, w, bias)
                # a Pack keeps the memory of a large gradient: fresh pages would hide what the ways differ by
                y = steps.linear_step(x, w, bias, (False, *parts_of(path)))
            y.backward(dy)
            return y

    # torch's product is none of a mixed step's ways where ours is as fast: it has the weight looked through first
    forward_of_all, dx_of_all = (
        ({"every": forward_every}, {"every": dx_every})
        if _every(n_rows)
        else ({"dense": forward_dense}, {"dense": dx_dense})
    )
    return {
        "forward": {**forward_of_all, "sparse": forward},
        "dx": {**dx_of_all, "sparse": dx},
        "dw": {"every" if kernels.FEW else "dense": dw_of_all, "sparse": dw},
    }, whole
