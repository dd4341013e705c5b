"""A mask and what the kernels need of it, made when it is first needed and kept as long as the mask."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from autoflip.ops import _masked_kernels as kernels
from autoflip.ops import _masked_weight as weights
from autoflip.ops import backend, batches, paths, trials
from autoflip.ops._masked_matmul import Job
from autoflip.ops.look import ones_and_zeros

__all__ = ["Pack"]

# entries of a gradient from which its memory is kept: beyond 32 MB malloc asks the system for fresh pages each time,
# below it hands out what is still in the cache
_KEEP_FROM = 1 << 23


class Pack:
    """A mask and the orders in which the kernels visit its kept entries, built once per mask, when first needed.

    Args:
        mask: ``(O, K)``, bool, True = kept. Copied nowhere: change it only by making another Pack.
        path: "auto" chooses per batch size and step, see :mod:`autoflip.ops.paths`; "sparse" or "dense" force one.

    Attributes:
        mask: the mask, contiguous.
        kept: number of kept entries.
        density: kept share, 0 to 1 (1 for an empty mask).

    A Pack keeps the memory of the last weight gradient where that is 32 MB or more, and hands it out again once
    nobody else holds it: fresh pages cost more than a sparse gradient.

    Raises:
        ValueError: ``mask`` is not a 2-d bool tensor, or ``path`` is not one of the three.
    """

    def __init__(self, mask: Tensor, *, path: str = "auto") -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"Pack: mask is {got}, wanted a 2-d torch.bool tensor (True = kept)")
        if path not in paths.PATHS:
            raise ValueError(f"Pack: path={path!r}; wanted one of {', '.join(paths.PATHS)}")
        self.mask = ones_and_zeros(mask.contiguous())
        self.path = path
        self.kept = int(mask.sum())
        self.density = self.kept / mask.numel() if mask.numel() else 1.0
        self._forget()

    def _forget(self) -> None:
        self._layouts: dict[tuple[Any, ...], Tensor] = {}
        self._letter: str | None = None  # of kernels.block_letter, once it is known
        self._live: Tensor | None = None
        self._parts: dict[tuple[int, int, str], kernels.Parts] = {}
        self.narrow: dict[tuple[Any, ...], bool] = {}  # of autoflip.ops.narrow
        self._gradient: Tensor | None = None
        self._keeps = self.mask.numel() >= _KEEP_FROM
        with trials.unseen() if weights.transformed() else nullcontext():  # a copy's first call may be in a transform
            self._traced = self._make_parts(64, timed=False)
        # rows, threads, parts and plan of the last call: what most calls need
        self._recent: tuple[int, int, kernels.Parts, Any] = (-1, 0, self._traced, None)

    def __getstate__(self) -> dict[str, Any]:
        return {"mask": self.mask, "path": self.path, "kept": self.kept, "density": self.density}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def parts(self, n_rows: int) -> kernels.Parts:
        """Return what the ops take for ``n_rows`` rows of x."""
        if torch.compiler.is_compiling():
            return self._traced  # a graph serves all batch sizes, and nothing can be built while it is traced
        key = (batches.bucket(n_rows), torch.get_num_threads(), backend.wish())
        found = self._parts.get(key)
        if found is None:
            with trials.unseen():  # a tensor made under a function transform would belong to it
                found = self._parts[key] = self._make_parts(key[0])
        return found

    def cpu_parts(self, n_rows: int) -> kernels.Parts:
        """Return :meth:`parts` where the CPU extension is known to serve, in a third of the time."""
        threads = torch.get_num_threads()
        if self._recent[0] != n_rows or self._recent[1] != threads:
            parts = self.parts(n_rows)
            self._recent = (n_rows, threads, parts, kernels.plan(parts))
        return self._recent[2]

    def cpu_job(self, n_rows: int, *, relu: bool) -> Job:
        """Return what a training step takes where the CPU extension is known to serve."""
        parts = self.cpu_parts(n_rows)
        return relu, parts, self.new_gradient if self._keeps else None, None if relu else self._recent[3]

    def all_dense(self, n_rows: int) -> bool:
        """Tell whether every step takes the dense product for this many rows on a CPU."""
        return self.cpu_parts(n_rows).path == "ddd"

    def _make_parts(self, n_rows: int, *, timed: bool = True) -> kernels.Parts:
        server = backend.serve("masked_matmul", self.mask.device)
        nothing = torch.empty(0, dtype=torch.uint8, device=self.mask.device)
        if server == "reference" or self.path == "dense":
            return kernels.Parts(self.mask, nothing, 0, nothing, self.kept, "ddd")
        if server != "cpp":
            # no GPU has measured these kernels against dense: they run when asked for by name
            if self.path != "sparse" and backend.wish() == "auto":
                return kernels.Parts(self.mask, nothing, 0, nothing, self.kept, "ddd")
            if self._live is None:
                self._live = kernels.live_tiles(self.mask)
            return kernels.Parts(self.mask, nothing, 0, self._live, self.kept, "sss")
        make = lambda path: self._make_path(n_rows, path)
        path = "sss"
        if self.path == "auto":
            path = paths.letters(self.mask, self.kept, n_rows, self._block_letter(), make, timed=timed)
        return make(path)

    def _block_letter(self) -> str:
        if self._letter is None:
            self._letter = kernels.block_letter(self.mask)
        return self._letter

    def _make_path(self, n_rows: int, path: str) -> kernels.Parts:
        """Return what a path of the CPU extension takes."""
        letter, chunk = path[0], paths.chunk(n_rows, self.density, path[0], self.mask.numel())
        if path == "fff":
            layout = self._bits()
        elif letter in kernels.HEIGHTS:
            layout = self._layout(kernels.make_block_layout, chunk, letter)
        elif path != "ddd":  # what is left of a mixed step's backward pass walks it, too
            case = n_rows, self.mask.numel(), self.density
            layout = self._layout(kernels.make_layout, chunk, paths.groups(*case), paths.back(*case))
        else:
            layout = self.mask.new_empty(0, dtype=torch.uint8)
        mixed = "f" in path and path != "fff"
        live = self._bits() if mixed else self.mask.new_empty(0, dtype=torch.uint8)
        return kernels.Parts(self.mask, layout, chunk, live, self.kept, path)

    def _layout(self, make: Callable[..., Tensor], *key: Any) -> Tensor:
        if key not in self._layouts:
            self._layouts[key] = make(self.mask, *key)
        return self._layouts[key]

    def _bits(self) -> Tensor:
        key = (0, False, False)  # no layout has chunks of 0 columns
        if key not in self._layouts:
            self._layouts[key] = kernels.make_bits(self.mask)
        return self._layouts[key]

    def new_gradient(self) -> Tensor:
        """Return kept float32 memory shaped like the mask that nobody else holds; what stands in it means nothing."""
        own = self.__dict__.pop("_gradient", None)  # popped: another thread must not take it too
        if own is None or _holders(own) > _ALONE:
            own = torch.empty(self.mask.shape, dtype=torch.float32)
        self._gradient = own
        # another tensor on the same memory: autograd keeps a gradient as it is only where it is the one holder
        return own.detach()

    def __repr__(self) -> str:
        return f"Pack({tuple(self.mask.shape)}, density {self.density:.4f}, path {self.path!r})"


def _holders(tensor: Tensor) -> int:
    """Return how many tensors and storages hold ``tensor``'s memory; a number above _ALONE where torch cannot tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return int(count(tensor.untyped_storage()._cdata)) if count else 1 << 30


_ALONE = _holders(torch.empty(1))
