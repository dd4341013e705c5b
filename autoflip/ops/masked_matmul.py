"""Multiply by the kept weights only: ``y = act(x @ (w * mask).T + b)``, with every derivative."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from autoflip.ops import _masked_kernels as kernels
from autoflip.ops import _masked_matmul as steps
from autoflip.ops import backend, paths

__all__ = ["Pack", "masked_linear", "masked_matmul", "masked_weight", "version_of", "zero_pruned"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CPU = torch.device("cpu")
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
        self.mask = mask.contiguous()
        self.path = path
        self.kept = int(mask.sum())
        self.density = self.kept / mask.numel() if mask.numel() else 1.0
        self._forget()

    def _forget(self) -> None:
        self._layouts: dict[int, Tensor] = {}
        self._live: Tensor | None = None
        self._parts: dict[tuple[int, int, str], kernels.Parts] = {}
        self._gradient: Tensor | None = None
        self._traced = self._make_parts(64, timed=False)
        self.recent = (-1, 0, self._traced)  # rows, threads, parts of the last call: what most calls need

    def __getstate__(self) -> dict[str, Any]:
        return {"mask": self.mask, "path": self.path, "kept": self.kept, "density": self.density}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def parts(self, n_rows: int) -> kernels.Parts:
        """Return what the ops take for ``n_rows`` rows of x."""
        if torch.compiler.is_compiling():
            return self._traced  # a graph serves all batch sizes, and nothing can be built while it is traced
        key = (paths.bucket(n_rows), torch.get_num_threads(), backend.wish())
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = self._make_parts(key[0])
        return found

    def _make_parts(self, n_rows: int, *, timed: bool = True) -> kernels.Parts:
        server = backend.serve("masked_matmul", self.mask.device)
        nothing = torch.empty(0, dtype=torch.uint8, device=self.mask.device)
        chunk = paths.chunk(n_rows)
        if server == "reference" or self.path == "dense":
            return kernels.Parts(self.mask, nothing, chunk, nothing, self.kept, "ddd")
        if server != "cpp":
            # no GPU has measured these kernels against dense: they run when asked for by name
            if self.path != "sparse" and backend.wish() == "auto":
                return kernels.Parts(self.mask, nothing, chunk, nothing, self.kept, "ddd")
            if self._live is None:
                self._live = kernels.live_tiles(self.mask)
            return kernels.Parts(self.mask, nothing, chunk, self._live, self.kept, "sss")
        layout = lambda: self._layout(chunk)
        letters = "sss" if self.path == "sparse" else paths.letters(self.mask, self.kept, n_rows, layout, timed=timed)
        return kernels.Parts(self.mask, layout() if "s" in letters else nothing, chunk, nothing, self.kept, letters)

    def _layout(self, chunk: int) -> Tensor:
        if chunk not in self._layouts:
            self._layouts[chunk] = kernels.make_layout(self.mask, chunk)
        return self._layouts[chunk]

    def new_gradient(self) -> Tensor:
        """Return float32 memory shaped like the mask that nobody else holds; what stands in it means nothing."""
        if self.mask.numel() < _KEEP_FROM:
            return torch.empty(self.mask.shape)
        own = self.__dict__.pop("_gradient", None)  # popped: another thread must not take it too
        if own is None or _holders(own) > _ALONE:
            own = torch.empty(self.mask.shape)
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


def masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pack: Pack, activation: str | None = None) -> Tensor:
    """Apply a linear layer whose pruned weights do no work: ``y = act(x @ (weight * mask).T + bias)``.

    Args:
        x: ``(..., K)``, float32, bfloat16, float16 or float64.
        weight: ``(O, K)``, dtype and device of ``x``; what stands at pruned entries is ignored.
        bias: ``(O,)`` or None.
        pack: ``Pack(mask)``, made once per mask.
        activation: None or "relu".

    Returns:
        ``(..., O)``, dtype of ``x``. The gradient of ``weight`` is exactly zero at pruned entries.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``2 * N * pack.kept`` FLOPs on the sparse path (CPU, float32, see :mod:`autoflip.ops.paths`), the same for
    each gradient; ``2 * N * O * K`` on the dense path.
    """
    if activation not in (None, "relu"):
        raise ValueError(f"masked_linear: activation={activation!r}; wanted None or 'relu'")
    if (
        x.dim() == 2
        and kernels.kernel_here(x, weight)
        and weight.shape == pack.mask.shape
        and x.shape[1] == weight.shape[1]
        and (bias is None or (bias.shape == weight.shape[:1] and kernels.kernel_here(bias)))
        and not torch.is_autocast_enabled("cpu")
    ):
        return layer_linear(x, weight, bias, pack, activation == "relu")
    if torch.is_autocast_enabled(x.device.type) or kernels.traced():
        y = F.linear(x, torch.where(pack.mask, weight, 0), bias)
        return y.relu() if activation else y
    _check(x, weight, bias, pack.mask, "masked_linear")
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), weight.shape[1])
    parts = pack.parts(len(rows))
    if kernels.kernel_here(rows, weight):
        y = steps.train(rows, weight, bias, parts, pack.new_gradient, relu=activation == "relu")
    else:
        y = steps.linear(rows, weight, bias, parts, relu=activation == "relu")
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def layer_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pack: Pack, relu: bool) -> Tensor:
    """Do what :func:`masked_linear` does where its caller has checked everything: 2-d, ``kernels.kernel_here``."""
    n, threads = x.shape[0], torch.get_num_threads()
    if pack.recent[0] != n or pack.recent[1] != threads:
        pack.recent = (n, threads, pack.parts(n))
    return steps.train(x, weight, bias, pack.recent[2], pack.new_gradient, relu)


def masked_matmul(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Multiply by the kept weights only: ``y = x @ (weight * mask).T``.

    The mask's Pack is remembered as long as the mask lives and is not changed; loops that make a new mask
    tensor per call should make the Pack themselves and call :func:`masked_linear`. Under ``torch.compile``
    the dense path is taken.

    Args:
        x: ``(N, K)``, float32, bfloat16, float16 or float64.
        weight: ``(O, K)``, dtype and device of ``x``.
        mask: ``(O, K)``, bool, True = kept.

    Returns:
        ``(N, O)``, dtype of ``x``; sums are kept in float32 at least.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Cost: ``2 * N * mask.sum()`` FLOPs on the sparse path, else ``2 * N * O * K``.
    Source: column buckets by row pattern are ours; row groups as in Gale et al., "Sparse GPU Kernels for Deep
    Learning", SC 2020.

    Example:
        >>> x, w = torch.ones(1, 3), torch.tensor([[1., 2., 4.]])
        >>> masked_matmul(x, w, torch.tensor([[True, False, True]]))
        tensor([[5.]])
    """
    if x.dim() != 2:
        raise ValueError(f"masked_matmul: x has shape {tuple(x.shape)}, wanted (N, K)")
    _check(x, weight, None, mask, "masked_matmul")
    if torch.compiler.is_compiling():
        return F.linear(x, torch.where(mask, weight, 0))
    return masked_linear(x, weight, None, _pack_of(mask))


def masked_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """Set pruned entries to zero: ``torch.where(mask, weight, 0)``, NaN at a pruned entry included.

    Args:
        weight: any shape, any float dtype.
        mask: shape and device of ``weight``, bool, True = kept.

    Returns:
        A new tensor like ``weight``; its gradient is exactly zero at pruned entries.

    Raises:
        ValueError: ``mask`` is not a bool tensor shaped like ``weight``.

    Cost: 0 FLOPs, 9 bytes moved per float32 entry.
    """
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"masked_weight: mask has shape {tuple(mask.shape)} and dtype {mask.dtype} but weight has "
            f"{tuple(weight.shape)}; a bool mask covers its weight entry by entry"
        )
    return kernels.select(weight, mask)


def zero_pruned(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write zeros at the pruned entries, in place, of the tensors in which one of them is not zero.

    The others are only read: a backward pass that saved them still works. Nothing is looked at or written under
    ``torch.compile``, ``torch.jit.trace``, a function transform or CUDA graph capture, nor in tensors without data.

    Args:
        pairs: tensor and its mask: equal shapes and devices, bool, True = kept.

    Cost: 0 FLOPs, 5 bytes read per float32 entry; one wait for each device that is not the CPU.
    """
    if torch.compiler.is_compiling() or kernels.traced():
        return
    if torch._C._len_torch_dispatch_stack() and detect_fake_mode() is not None:
        return
    with torch.no_grad():
        looks: list[tuple[Tensor, Tensor, bool | Tensor]] = []
        look = _look()
        for tensor, mask in pairs:
            if look is not None and _is_plain(tensor) and mask.is_cpu and mask.is_contiguous():
                if not look(tensor.data_ptr(), mask.data_ptr(), mask.numel()):
                    looks.append((tensor, mask, True))
                continue
            if not _readable(tensor):
                continue
            clean = kernels.reads_clean(tensor, mask)
            # not yet a bool: all looks are on their way to the device before the first is waited for
            looks.append((tensor, mask, torch.where(mask, 0, tensor).any() if clean is None else not clean))
        for tensor, mask, dirty in looks:
            if dirty:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(torch.where(mask, tensor, 0))


def _look() -> Callable[[int, int, int], bool] | None:
    """Return the CPU kernel that tells whether all pruned entries are zero, None where it cannot be asked now.

    What holds for all tensors is asked once: per tensor it costs more than the kernel needs for a small one.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if backend.serve("masked_matmul", _CPU) != "cpp":
        return None
    return backend.extension("_C")[0].masked_matmul_is_clean  # type: ignore[union-attr]


def _is_plain(tensor: Tensor) -> bool:
    kind = type(tensor) is torch.nn.Parameter and tensor.is_cpu and tensor.dtype is torch.float32
    return kind and tensor.is_contiguous()


def _readable(tensor: Tensor) -> bool:
    capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (capturing or tensor.is_meta or isinstance(tensor, FakeTensor) or kernels.transformed(tensor))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, op: str) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; wanted (..., K) and (O, K)"
        )
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"{op}: mask has shape {tuple(mask.shape)} and dtype {mask.dtype} but weight has "
            f"{tuple(weight.shape)}; a bool mask covers its weight entry by entry. "
            "Did the layer get compacted after the mask was made?"
        )
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        raise ValueError(
            f"{op}: x is {x.dtype} and weight is {weight.dtype}; wanted one dtype of "
            f"{', '.join(map(str, _DTYPES))} for both. Convert one with .to(dtype)"
        )
    if weight.device != x.device or mask.device != x.device:
        raise ValueError(
            f"{op}: x is on {x.device}, weight on {weight.device}, mask on {mask.device}; "
            "wanted all on one device. Move the module with .to(device)"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"{op}: bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}, wanted {x.dtype} "
            f"({weight.shape[0]},) on {x.device}"
        )


def version_of(tensor: Tensor) -> int:
    """Return the count of in-place writes to a tensor; 0 for inference tensors, which keep none."""
    return 0 if tensor.is_inference() else tensor._version


_packs: dict[int, tuple[weakref.ref, int, Pack]] = {}


def _pack_of(mask: Tensor) -> Pack:
    key, version = id(mask), version_of(mask)
    if (found := _packs.get(key)) and found[0]() is mask and found[1] == version:
        return found[2]
    # the Pack must not hold the key itself, or the mask would live for good
    pack = Pack(mask.detach())
    _packs[key] = (weakref.ref(mask, lambda _: _packs.pop(key, None)), version, pack)
    return pack
