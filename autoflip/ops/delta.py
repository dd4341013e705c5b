"""Sparse-delta ops: pack a mask into bits, gather kept entries, expand them again.

They move data and take no part in autograd; :mod:`autoflip.ops.delta_coding` turns what they move into bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoflip.ops import backend, memory, reference

__all__ = [
    "CHUNK",
    "Pack",
    "bits",
    "expand",
    "expand_add",
    "gather",
    "pack",
    "pack_nonzero",
    "pack_words",
    "within",
    "zero_share",
]

CHUNK = 1 << 18  # entries of a thread's range; Pack.offsets counts by it

Array = np.ndarray[Any, Any]

# the GPU's kernels are unmeasured: torch gathers on a GPU, so that only kept entries cross to the host, unless
# AUTOFLIP_BACKEND names one of them (delta_stream.gpu_server); frames are finished on the host all the same
backend.register("delta", "cpp", "cuda", "triton", optional=True, asked=("cuda", "triton"))
_HOST = torch.device("cpu")


def cpp(device: torch.device = _HOST) -> ModuleType | None:
    """Return the extension when it serves ``device``."""
    return backend.extension("_C")[0] if backend.serve("delta", device) == "cpp" else None


@dataclass(frozen=True, eq=False)
class Pack:
    """A mask as bits.

    Attributes:
        words: ``(ceil(numel / 64),)`` int64 on the CPU; bit i of the whole is entry i, spare bits are 0.
        numel: entries of the mask.
    """

    words: Tensor
    numel: int

    @classmethod
    def counted(cls, words: Tensor, numel: int, offsets: Tensor) -> Pack:
        """Return the Pack of ``words`` whose ``offsets`` are known already."""
        made = cls(words, numel)
        vars(made)["offsets"] = offsets  # where the cached property looks first
        return made

    @cached_property
    def offsets(self) -> Tensor:
        """``(ceil(numel / 2^18) + 1,)`` int64: kept entries before each range, last the number of them all."""
        out = torch.zeros(-(-self.numel // CHUNK) + 1, dtype=torch.int64)
        if ext := cpp():
            ext.delta_offsets(self.words.data_ptr(), self.numel, out.data_ptr(), torch.get_num_threads())
            return out
        for i in range(len(out) - 1):
            words = self.words[i * CHUNK // 64 : (i + 1) * CHUNK // 64].numpy().view(np.uint8)
            out[i + 1] = out[i] + int(np.unpackbits(words).sum(dtype=np.int64))
        return out

    @cached_property
    def kept(self) -> int:
        """Set bits."""
        return int(self.offsets[-1])

    @property
    def whole(self) -> bool:
        """Whether every entry is kept."""
        return self.kept == self.numel


def pack(mask: Tensor) -> Pack:
    """Pack a bool mask of any shape, True = kept.

    Raises:
        ValueError: ``mask`` is not bool.
    """
    if mask.dtype is not torch.bool:
        raise ValueError(f"pack: mask is {mask.dtype}, wanted torch.bool (True = kept); for scores, write scores > t")
    mask = mask.detach().cpu().contiguous()
    if ext := cpp():
        words = empty_words(mask.numel())
        ext.delta_pack(mask.data_ptr(), mask.numel(), words.data_ptr(), torch.get_num_threads())
        return Pack(words, mask.numel())
    return Pack(reference.delta_words(mask), mask.numel())


def pack_nonzero(x: Tensor) -> Pack:
    """Pack ``x != 0`` of a float32 tensor; NaN counts as nonzero."""
    if x.dtype is torch.float32 and (ext := cpp(x.device)):
        x, words = x.detach().contiguous(), empty_words(x.numel())
        ext.delta_pack_nonzero(x.data_ptr(), x.numel(), words.data_ptr(), torch.get_num_threads())
        return Pack(words, x.numel())
    return pack(x.detach() != 0)


def pack_words(words: Tensor, numel: int) -> Pack:
    """Wrap int64 words whose spare bits are 0."""
    assert words.dtype is torch.int64
    assert len(words) == -(-numel // 64)
    return Pack(words, numel)


def new_words(numel: int) -> Tensor:
    """Return zeroed words for ``numel`` entries."""
    return torch.zeros(-(-numel // 64), dtype=torch.int64)


def empty_words(numel: int) -> Tensor:
    """Return words for ``numel`` entries, not filled."""
    return torch.empty(-(-numel // 64), dtype=torch.int64)


def bits(mask: Pack) -> Tensor:
    """Return the mask as ``(numel,)`` bool."""
    return reference.delta_mask(mask.words, mask.numel)


def within(mask: Pack, ranks: Pack) -> Pack:
    """Return the entries of ``mask`` whose rank among its kept ones ``ranks`` keeps.

    Raises:
        ValueError: ``ranks`` does not cover as many entries as ``mask`` keeps.
    """
    if ranks.numel != mask.kept:
        raise ValueError(f"within: ranks cover {ranks.numel} entries but the mask keeps {mask.kept}; wanted the same")
    words = new_words(mask.numel)
    if ext := cpp():
        places = (mask.words.data_ptr(), mask.offsets.data_ptr(), ranks.words.data_ptr(), ranks.numel)
        ext.delta_within(*places, mask.numel, words.data_ptr(), torch.get_num_threads())
        return Pack(words, mask.numel)
    out = bits(mask)
    out[out.clone()] = bits(ranks)
    return pack(out)


def zero_share(x: Tensor, mask: Pack) -> float:
    """Return about which share of the kept entries of float32 ``x`` is zero: 2^14 entries stand for the whole."""
    x = x.detach().reshape(-1)
    run, size = 1 << 12, x.numel()
    starts = [0] if size <= 4 * run else [*range(0, size - run + 1, (size - run) // 3 // 64 * 64)]
    run = size if size <= 4 * run else run
    if x.dtype is torch.float32 and x.is_contiguous() and (ext := cpp(x.device)):
        kept, nonzero = ext.delta_count_nonzero(x.data_ptr(), mask.words.data_ptr(), starts, run)
        return 1 - nonzero / kept if kept else 0.0
    kept = nonzero = 0
    for start in starts:
        part = x[start : start + run]
        words = mask.words[start // 64 : -(-(start + run) // 64)]
        values = part[bits(pack_words(words, len(part))).to(x.device)]
        kept, nonzero = kept + len(values), nonzero + int(values.count_nonzero())
    return 1 - nonzero / kept if kept else 0.0


def gather(x: Tensor, mask: Pack | None, base: Tensor | None = None) -> tuple[Array, bool]:
    """``(x - base)[mask]`` in order, and whether all of ``x - base`` is finite.

    Args:
        x: any shape with ``mask.numel`` entries, float32, any device; only kept entries leave the device.
        mask: a Pack, None = every entry.
        base: like ``x``; None = zeros.

    Returns:
        ``(kept,)`` float32 on the CPU, perhaps memory of ``x``, and a bool that covers dropped entries too.

    Raises:
        ValueError: sizes or dtypes do not fit.
    """
    for name, t in (("x", x), ("base", base)):
        if t is not None and (t.dtype is not torch.float32 or t.shape != x.shape or t.device != x.device):
            raise ValueError(
                f"gather: {name} is {t.dtype} {tuple(t.shape)} on {t.device}, wanted torch.float32 "
                f"{tuple(x.shape)} on {x.device}"
            )
    if mask is not None and mask.numel != x.numel():
        raise ValueError(
            f"gather: x has {x.numel()} entries but the mask covers {mask.numel}; both must be of one tensor"
        )
    x = x.detach().contiguous().view(-1)
    base = None if base is None else base.detach().contiguous().view(-1)
    if mask is None or mask.whole:
        values = x if base is None else x - base
        return values.cpu().numpy(), bool(torch.isfinite(values).all())
    if ext := cpp(x.device):
        out = memory.empty_bytes(4 * mask.kept).view(np.float32)
        base_at = 0 if base is None else base.data_ptr()
        places = (x.data_ptr(), base_at, mask.words.data_ptr(), mask.offsets.data_ptr())
        return out, ext.delta_gather(*places, mask.numel, out.ctypes.data, torch.get_num_threads())
    finite = bool(torch.isfinite(x if base is None else x - base).all())
    return reference.delta_gather(x, mask.words, base).cpu().numpy(), finite


def expand(values: Array, mask: Pack) -> Tensor:
    """``out[mask] = values`` and zero elsewhere: ``(numel,)`` from ``(kept,)``, both float32 on the CPU."""
    _check_values("expand", values, mask)
    if ext := cpp():
        out = memory.empty(mask.numel)
        places = (values.ctypes.data, mask.words.data_ptr(), mask.offsets.data_ptr())
        ext.delta_expand(*places, mask.numel, out.data_ptr(), torch.get_num_threads())
        return out
    return reference.delta_expand(torch.from_numpy(values), mask.words, mask.numel)


def expand_add(values: Array, mask: Pack | None, out: Tensor, weight: float) -> None:
    """``out[mask] += weight * values`` in place, the product rounded to float32 first.

    Args:
        values: ``(kept,)`` float32.
        mask: a Pack, None = every entry.
        out: ``mask.numel`` entries of any shape, float32 or float64, any device.
        weight: factor, rounded to float32.
    """
    if mask is not None:
        _check_values("expand_add", values, mask)
    if mask is None or mask.whole:
        out += torch.from_numpy(values * np.float32(weight)).view(out.shape).to(out)
        return
    plain = out.dtype is torch.float32 and out.is_contiguous()
    if plain and (ext := cpp(out.device)):
        places = (values.ctypes.data, mask.words.data_ptr(), mask.offsets.data_ptr())
        ext.delta_expand_add(*places, mask.numel, weight, out.data_ptr(), torch.get_num_threads())
        return
    scaled = torch.from_numpy(values * np.float32(weight)).to(out)
    out[bits(mask).view(out.shape).to(out.device)] += scaled


def _check_values(what: str, values: Array, mask: Pack) -> None:
    if values.dtype != np.float32 or values.shape != (mask.kept,) or not values.flags.c_contiguous:
        raise ValueError(
            f"{what}: values are {values.dtype} {values.shape}, wanted contiguous float32 ({mask.kept},), one for "
            "each entry that the mask keeps"
        )
