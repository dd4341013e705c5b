"""Sparse-delta ops: pack a mask, gather and expand kept entries, quantise them, Rice-code positions.

They move data of a fixed layout and take no part in autograd. Stochastic rounding draws ``u[i]`` from
``(key, i)`` alone, so every backend and instruction set gives the same bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoflip.ops import backend, reference

__all__ = [
    "BLOCK",
    "Pack",
    "bits",
    "dequantise",
    "expand",
    "expand_add",
    "gather",
    "largest_scale",
    "merge_planes",
    "pack",
    "pack_nonzero",
    "pack_words",
    "quantise",
    "rice_bits",
    "rice_decode",
    "rice_encode",
    "round_bf16",
    "split_planes",
    "varint_decode",
    "varint_encode",
]

BLOCK = 256  # kept entries that share one scale
_CHUNK = 1 << 18  # entries of a thread's range; Pack.offsets counts by it
_RICE_BYTES = 7  # the longest Rice code has 56 bits
_INDEX_ERRORS = {
    -1: "ends early",
    -2: "leaves the tensor",
    -3: "has padding that is not zero",
    -4: "holds a number that is too long",
}

Array = np.ndarray[Any, Any]

# there is no CUDA or Triton kernel: on a GPU torch gathers, so that only kept entries cross to the host
backend.register("delta", "cpp")
_HOST = torch.device("cpu")


def _cpp(device: torch.device = _HOST) -> ModuleType | None:
    """Return the extension when it serves ``device``."""
    if device.type != "cpu":
        return None
    # a wish for a GPU backend is about GPU tensors; a frame is made on the host all the same
    if os.environ.get("AUTOFLIP_BACKEND") not in ("cuda", "triton") and backend.serve("delta", device) != "cpp":
        return None
    return backend.extension("_C")[0]


@dataclass(frozen=True, eq=False)
class Pack:
    """A mask as bits.

    Attributes:
        words: ``(ceil(numel / 64),)`` int64 on the CPU; bit i of the whole is entry i, spare bits are 0.
        numel: entries of the mask.
    """

    words: Tensor
    numel: int

    @cached_property
    def offsets(self) -> Tensor:
        """``(ceil(numel / 2^18) + 1,)`` int64: kept entries before each range, last the number of them all."""
        out = torch.zeros(-(-self.numel // _CHUNK) + 1, dtype=torch.int64)
        if ext := _cpp():
            ext.delta_offsets(self.words.data_ptr(), self.numel, out.data_ptr(), torch.get_num_threads())
            return out
        for i in range(len(out) - 1):
            words = self.words[i * _CHUNK // 64 : (i + 1) * _CHUNK // 64].numpy().view(np.uint8)
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
    if ext := _cpp():
        words = _new_words(mask.numel())
        ext.delta_pack(mask.data_ptr(), mask.numel(), words.data_ptr(), torch.get_num_threads())
        return Pack(words, mask.numel())
    return Pack(reference.delta_words(mask), mask.numel())


def pack_nonzero(x: Tensor) -> Pack:
    """Pack ``x != 0`` of a float32 tensor; NaN counts as nonzero."""
    if x.dtype is torch.float32 and (ext := _cpp(x.device)):
        x, words = x.detach().contiguous(), _new_words(x.numel())
        ext.delta_pack_nonzero(x.data_ptr(), x.numel(), words.data_ptr(), torch.get_num_threads())
        return Pack(words, x.numel())
    return pack(x.detach() != 0)


def pack_words(words: Tensor, numel: int) -> Pack:
    """Wrap int64 words whose spare bits are 0."""
    assert words.dtype is torch.int64
    assert len(words) == -(-numel // 64)
    return Pack(words, numel)


def _new_words(numel: int) -> Tensor:
    return torch.zeros(-(-numel // 64), dtype=torch.int64)


def bits(mask: Pack) -> Tensor:
    """Return the mask as ``(numel,)`` bool."""
    return reference.delta_mask(mask.words, mask.numel)


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
    if ext := _cpp(x.device):
        out = np.empty(mask.kept, np.float32)
        base_at = 0 if base is None else base.data_ptr()
        places = (x.data_ptr(), base_at, mask.words.data_ptr(), mask.offsets.data_ptr())
        return out, ext.delta_gather(*places, mask.numel, out.ctypes.data, torch.get_num_threads())
    finite = bool(torch.isfinite(x if base is None else x - base).all())
    return reference.delta_gather(x, mask.words, base).cpu().numpy(), finite


def expand(values: Array, mask: Pack) -> Tensor:
    """``out[mask] = values`` and zero elsewhere: ``(numel,)`` from ``(kept,)``, both float32 on the CPU."""
    _check_values("expand", values, mask)
    if ext := _cpp():
        out = torch.empty(mask.numel)
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
    if plain and (ext := _cpp(out.device)):
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


def largest_scale(levels: int) -> float:
    """Return the largest float32 ``s`` for which ``levels * s`` is finite."""
    top = np.finfo(np.float32).max
    scale = top / np.float32(levels)
    with np.errstate(over="ignore"):
        fits = np.isfinite(scale * np.float32(levels))
    return float(scale if fits else np.nextafter(scale, np.float32(0)))


def quantise(values: Array, levels: int, key: tuple[int, int]) -> tuple[Array, Array]:
    """``codes[i] = stochastic_round(values[i] / scales[i // 256])``, unbiased; zeros stay zero.

    Args:
        values: ``(n,)`` float32, finite.
        levels: largest code: 127 (int8) or 7 (int4).
        key: two uint32 that the random numbers depend on.

    Returns:
        ``(n,)`` int8 in [-levels, levels] and ``(ceil(n / 256),)`` float32; the error of an entry is below its scale.

    Source: unbiased rounding as in Alistarh et al., "QSGD", NeurIPS 2017.
    """
    values = np.ascontiguousarray(values, np.float32)
    if ext := _cpp():
        codes, scales = np.empty(len(values), np.int8), np.empty(-(-len(values) // BLOCK), np.float32)
        places = (codes.ctypes.data, scales.ctypes.data, torch.get_num_threads())
        ext.delta_quantise(values.ctypes.data, len(values), levels, largest_scale(levels), *key, *places)
        return codes, scales
    return reference.delta_quantise(values, levels, largest_scale(levels), key)


def dequantise(codes: Array, scales: Array) -> Array:
    """``values[i] = codes[i] * scales[i // 256]``: ``(n,)`` float32 from int8 codes."""
    assert len(scales) == -(-len(codes) // BLOCK)
    if ext := _cpp():
        codes, scales = np.ascontiguousarray(codes, np.int8), np.ascontiguousarray(scales, np.float32)
        out = np.empty(len(codes), np.float32)
        places = (codes.ctypes.data, scales.ctypes.data, len(codes), out.ctypes.data)
        ext.delta_dequantise(*places, torch.get_num_threads())
        return out
    return reference.delta_dequantise(codes, scales)


def round_bf16(values: Array, key: tuple[int, int]) -> Array:
    """Round ``(n,)`` float32 to bf16 words (uint16), up or down at random so that the mean is exact."""
    values = np.ascontiguousarray(values, np.float32)
    if ext := _cpp():
        out = np.empty(len(values), np.uint16)
        ext.delta_round_bf16(values.ctypes.data, len(values), *key, out.ctypes.data, torch.get_num_threads())
        return out
    return reference.delta_round_bf16(values, key)


def split_planes(values: Array) -> bytes:
    """All lowest bytes, then all second bytes, ...: entropy coders see one kind of byte at a time.

    Args:
        values: ``(n,)`` of 2 or 4 bytes each.
    """
    if ext := _cpp():
        values = np.ascontiguousarray(values)
        out = np.empty(values.nbytes, np.uint8)
        ext.delta_split(values.ctypes.data, len(values), values.itemsize, out.ctypes.data)
        return out.tobytes()
    return reference.delta_split(values)


def merge_planes(raw: bytes | memoryview, dtype: np.dtype[Any]) -> Array:
    """Undo :func:`split_planes` into ``dtype``, which has 2 or 4 bytes."""
    planes = np.frombuffer(raw, np.uint8)
    if ext := _cpp():
        out = np.empty(len(planes) // dtype.itemsize, dtype)
        ext.delta_merge(planes.ctypes.data, len(out), dtype.itemsize, out.ctypes.data)
        return out
    return reference.delta_merge(planes, dtype)


def rice_bits(mask: Pack, k: int) -> int:
    """Bits that :func:`rice_encode` writes for parameter ``k``, 0 to 31."""
    if ext := _cpp():
        return int(ext.delta_rice_bits(mask.words.data_ptr(), mask.numel, k))
    return reference.rice_bits(mask.words, mask.numel, k)


def rice_encode(mask: Pack, k: int) -> bytes:
    """Rice code of the gaps between kept entries (Golomb 1966, Rice 1979); at most 56 bits a gap.

    Raises:
        ValueError: the mask has 2^32 entries or more.
    """
    if mask.numel >= 1 << 32:
        raise ValueError(f"rice_encode: {mask.numel} entries, wanted fewer than 2^32; send a bitmap")
    if ext := _cpp():
        out = np.empty(-(-rice_bits(mask, k) // 8), np.uint8)
        ext.delta_rice_encode(mask.words.data_ptr(), mask.numel, k, out.ctypes.data, len(out))
        return out.tobytes()
    return reference.rice_encode(mask.words, mask.numel, k)


def rice_decode(data: bytes | memoryview, numel: int, kept: int, k: int) -> tuple[Pack, int]:
    """Read ``kept`` positions below ``numel`` from the start of hostile ``data``.

    Returns:
        The mask, and how many bytes of ``data`` it took.

    Raises:
        ValueError: the stream ends early, leaves the range, or pads with ones.
    """
    raw = np.frombuffer(data, np.uint8)[: _RICE_BYTES * kept]
    words = _new_words(numel)
    if ext := _cpp():
        used = int(ext.delta_rice_decode(raw.ctypes.data, len(raw), numel, kept, k, words.data_ptr()))
    else:
        words, used = reference.rice_decode(raw, numel, kept, k)
    return _checked("a Rice stream", words, numel, used)


def varint_encode(mask: Pack) -> bytes:
    """LEB128 code of the gaps between kept entries."""
    if ext := _cpp():
        out = np.empty(ext.delta_varint_encode(mask.words.data_ptr(), mask.numel, 0), np.uint8)
        ext.delta_varint_encode(mask.words.data_ptr(), mask.numel, out.ctypes.data)
        return out.tobytes()
    return reference.varint_encode(mask.words, mask.numel)


def varint_decode(data: bytes | memoryview, numel: int, kept: int) -> tuple[Pack, int]:
    """Read ``kept`` positions below ``numel`` from the start of hostile ``data``, as :func:`rice_decode` does."""
    raw = np.frombuffer(data, np.uint8)
    words = _new_words(numel)
    if ext := _cpp():
        used = int(ext.delta_varint_decode(raw.ctypes.data, len(raw), numel, kept, words.data_ptr()))
    else:
        words, used = reference.varint_decode(raw, numel, kept)
    return _checked("a varint stream", words, numel, used)


def _checked(what: str, words: Tensor, numel: int, used: int) -> tuple[Pack, int]:
    if used < 0:
        raise ValueError(f"{what} {_INDEX_ERRORS[used]}")
    return Pack(words, numel), used
