"""Which path a masked convolution takes, step by step: the sparse kernel or torch's dense convolution.

Forward, dx and dw choose each for itself, per shape, batch size, density and thread count: by a short trial that is
remembered on disk (:mod:`autoflip.ops.trials`), or by :data:`RULE` where trials are off. A last trial puts what was
chosen, as a whole training step through autograd, against the dense convolution (not where channels come last).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoflip.ops import _masked_conv as steps
from autoflip.ops import _masked_conv_kernels as conv
from autoflip.ops import _masked_kernels as kernels
from autoflip.ops import _masked_weight as weights
from autoflip.ops import batches, paths, trials
from autoflip.ops._masked_conv_kernels import Parts
from autoflip.ops._masked_weight import CPP

__all__ = ["MOST", "Trial", "few_channels", "tried"]

MOST = 64  # images: a trial of more would take long to say the same
LEAST_BATCH = 5  # images from which few channels are tried at any density; what is tried of others, see tried()
# multiply-adds of the dense convolution below which calls cost more than products: of any batch and density the
# kernels' whole step, two calls, may then be the faster one
SMALL_WORK = 2_000_000
# density above which the sparse kernels are not tried: none gained there (bench/bench_layers.py --only conv), but for
# few channels, which oneDNN convolves slower per channel than 64: the kernels were faster with 3 to 40 row-major, 3 to
# 28 and 40 channels-last; a step took 0.42 of oneDNN's time with 8 and 0.68 with 28, 0.71 and 0.81 (Xeon, AVX-512)
TRIED_BELOW, FEW_CHANNELS = 0.75, 48
# step -> density below which the kernel was at least 10 % faster than torch 2.13's dense convolution (oneDNN) at
# every shape of bench/bench_layers.py, batch 16. Intel Xeon (Sapphire Rapids), 1 thread, CPU time, 2026-11-22.
RULE = {
    "avx512": {"forward": 0.5, "dx": 0.5, "dw": 0.3},
    "avx2": {"forward": 0.2, "dx": 0.2, "dw": 0.2},
    "base": {"forward": 0.05, "dx": 0.05, "dw": 0.0},
}


def few_channels(mask: Tensor) -> bool:
    """Tell whether so few channels go in or out that the sparse kernels may gain at any density."""
    return min(mask.shape[:2]) < FEW_CHANNELS


def tried(mask: Tensor, kept: int, n: int, positions: int) -> bool:
    """Tell whether the sparse kernels may gain for ``n`` samples whose outputs have so many positions each."""
    if n * positions * mask.numel() < SMALL_WORK:
        return trials.enabled()
    return kept <= min(TRIED_BELOW, n / batches.LANES) * mask.numel() or (n >= LEAST_BATCH and few_channels(mask))


class Trial:
    """What one geometry's trials compare.

    Args:
        n, height, width: of x.
        x_last, last: whether channels come last in x, and in what the step returns.
        parts: all but the layouts.
        layout: (step, sizes) -> a layout.
    """

    def __init__(
        self, n: int, height: int, width: int, x_last: bool, last: bool, parts: Parts, layout: Callable[..., Tensor]
    ) -> None:
        self.n, self.size, self._bare, self._layout = n, (height, width), parts, layout
        self.x_last, self.last = x_last, last
        self._jobs: dict[str, steps.Job] = {}
        self.geometry = conv.served(torch.empty(1).expand(n, parts.mask.shape[1], height, width), parts, False)

    def layout(self, step: str) -> Tensor:
        """Return the layout of a step, empty where its offsets do not fit."""
        return self._layout(step, self.geometry)

    def parts(self, path: str) -> Parts:
        """Return what the ops take for a path."""
        nothing = self._bare.mask.new_empty(0, dtype=torch.uint8)
        forward, dx, dw = (
            self.layout(step) if letter == "s" else nothing for letter, step in zip(path, kernels.STEPS, strict=True)
        )
        return self._bare._replace(path=path, forward=forward, dx=dx, dw=dw)

    def letters(self) -> str:
        """Return the fastest path, a letter a step."""
        mask, kept = self._bare.mask, self._bare.kept
        density = kept / mask.numel()
        if not trials.enabled():
            if self.last:
                return "ddd"
            limits, share = RULE[CPP.isa()], batches.filled(self.n)
            return "".join("s" if density < limits[step] * share else "d" for step in kernels.STEPS)
        shape = "x".join(map(str, mask.shape))
        form = " channels last" * self.last + " but in x" * (self.last and not self.x_last)
        stride = f" stride {self._bare.stride}" * (self._bare.stride > 1)
        key = (
            f"masked_conv2d {shape} map {self.size[0]}x{self.size[1]} padding {self._bare.padding} dilation "
            f"{self._bare.dilation}{stride} n{self.n} density {trials.near(density)}{form} "
            f"threads {torch.get_num_threads()}"
        )
        found = ""
        for step in kernels.STEPS:
            # what a step costs depends on the panels that those before it have made
            ways: dict[str, Callable[[], object]] = {
                "dense": partial(self.dense, step),
                "sparse": partial(self.sparse, step, found),
            }
            found += trials.choose(f"{key} {step} {found}".rstrip(), ways)[0]
        if self.last:  # the dense path of such a layer is another one
            return found
        whole = {path: partial(self.whole, path) for path in ("ddd", found, "sss")}
        return trials.choose(f"{key} whole", whole, seconds=0.06, gain=paths.GAIN, burst=paths.WHOLE)

    @cached_property
    def case(self) -> tuple[Tensor, Tensor, Tensor, Parts]:
        """x, dy, a weight whose pruned entries are zero, and what the ops take."""
        g = torch.Generator().manual_seed(0)
        parts = self.parts("sss")
        x, dy = (torch.randn(sizes[:4], generator=g, dtype=torch.float32) for sizes in self.geometry[:2])
        weight = weights.select(torch.randn(parts.mask.shape, generator=g, dtype=torch.float32), parts.mask)
        if self.last:
            dy, weight = (t.to(memory_format=torch.channels_last) for t in (dy, weight))
        return x.to(memory_format=torch.channels_last) if self.x_last else x, dy, weight, parts

    @cached_property
    def panels(self) -> tuple[Any, Any]:
        """Panels of x and of dy, all zeros: they take as long as any numbers."""
        made = tuple(CPP.MaskedConvPanel(n) for n in (self.geometry.shape.x_floats, self.geometry.shape.dy_floats))
        for panel in made:
            panel.clear()
        return made[0], made[1]

    def dense(self, step: str) -> object:
        """Take one step by torch."""
        x, dy, weight, parts = self.case
        if step == "forward":
            return F.conv2d(x, weights.operand(weight, parts.mask), None, parts.stride, parts.padding, parts.dilation)
        return conv.dense_backward(dy, x, weight, parts, (step == "dx", step == "dw"))

    def sparse(self, step: str, before: str) -> object:
        """Take one step by the kernels after those before it went by the letters ``before``."""
        x, dy, weight, parts = self.case
        if step == "forward":
            return conv.cpu_forward(x, weight, None, parts)[0]
        wanted = conv.Gradients(step == "dx", step == "dw", False)
        # a panel that a step before has made costs nothing here
        x_panel = self.panels[0] if step == "dw" and before[0] == "s" else None
        dy_panel = self.panels[1] if step == "dw" and before[1] == "s" else None
        return conv.cpu_backward(dy, x, weight, parts, wanted, x_panel=x_panel, dy_panel=dy_panel)

    @cached_property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Callable[[Tensor], bool] | None]:
        """x, the weight, the same with the dense path's hook, a bias, and what looks at that weight."""
        x, _, weight, parts = self.case
        hooked, look = weight.detach().requires_grad_(), None
        if parts.kept < parts.mask.numel():
            hooked.register_hook(weights.gradient_hook(parts.mask))
            look = weights.looker(parts.mask)
        bias = weight.new_zeros(len(weight)).requires_grad_()
        return x.detach().requires_grad_(), weight.detach().requires_grad_(), hooked, bias, look

    def whole(self, path: str) -> object:
        """Take a training step through autograd, as the layers of autoflip.nn do."""
        x, weight, hooked, bias, look = self.leaves
        with torch.enable_grad():
            x.grad = weight.grad = hooked.grad = bias.grad = None
            if path == "ddd":
                if look is not None:
                    look(hooked)
                y = F.conv2d(x, hooked, bias, self._bare.stride, self._bare.padding, self._bare.dilation)
            else:
                weights.kernel_here(x, weight, bias)
                y = steps.conv_step(x, weight, bias, self._job(path))
            y.backward(self.case[1])
        return y

    def _job(self, path: str) -> steps.Job:
        if path not in self._jobs:
            x, _, weight, _ = self.case
            self._jobs[path] = steps.make_job(x, weight, self.parts(path))
        return self._jobs[path]
