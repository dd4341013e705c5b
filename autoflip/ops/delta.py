"""Sparse-delta ops: pack a mask, gather and expand kept entries, quantise them, Rice-code positions.

All of them move data of a fixed layout and take no part in autograd. Stochastic rounding draws
``u[i]`` from ``(key, i)`` alone, so that every backend and instruction set gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    "positions",
    "quantise",
    "rice_bits",
    "rice_decode",
    "rice_encode",
    "round_bf16",
    "scatter",
    "select",
    "split_planes",
]

BLOCK = 256  # kept entries that share one scale

_POPCOUNT = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)

backend.register("delta")


@dataclass(frozen=True, eq=False)
class Pack:
    """A mask as bits.

    Attributes:
        words: ``(ceil(numel / 64),)`` int64 on the CPU; bit i of the whole is entry i, spare bits are 0.
        numel: entries of the mask.
        kept: set bits.
    """

    words: Tensor
    numel: int
    kept: int

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
    return pack_words(reference.delta_words(mask), mask.numel())


def pack_nonzero(x: Tensor) -> Pack:
    """Pack ``x != 0``."""
    return pack(x != 0)


def pack_words(words: Tensor, numel: int) -> Pack:
    """Wrap words whose spare bits are 0 and count them."""
    return Pack(words, numel, int(_POPCOUNT[words.numpy().view(np.uint8)].sum(dtype=np.int64)))


def gather(x: Tensor, mask: Pack | None, base: Tensor | None = None) -> tuple[np.ndarray, bool]:
    """``(x - base)[mask]`` in order, and whether all of ``x - base`` is finite.

    Args:
        x: any shape with ``mask.numel`` entries, float32, any device; only kept entries leave the device.
        mask: a Pack, None = every entry.
        base: like ``x``; None = zeros.

    Returns:
        ``(kept,)`` float32 on the CPU, and a bool that covers dropped entries too.

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
        raise ValueError(f"gather: x has {x.numel()} entries but the mask covers {mask.numel}")
    x = x.detach().reshape(-1)
    base = None if base is None else base.detach().reshape(-1)
    if mask is None or mask.whole:
        values = x if base is None else x - base
        return values.cpu().contiguous().numpy(), bool(torch.isfinite(values).all())
    finite = bool(torch.isfinite(x if base is None else x - base).all())
    return reference.delta_gather(x, mask.words, base).cpu().numpy(), finite


def bits(mask: Pack) -> Tensor:
    """Return the mask as ``(numel,)`` bool."""
    return reference.delta_mask(mask.words, mask.numel)


def select(words: Tensor, mask: Pack) -> Tensor:
    """``words[mask]`` of ``(numel,)`` int16 words on the CPU."""
    return words[bits(mask)]


def scatter(words: np.ndarray, mask: Pack) -> Tensor:
    """``out[mask] = words`` and zero elsewhere: ``(numel,)`` int16 from ``(kept,)`` uint16."""
    return reference.delta_expand(torch.from_numpy(words.view(np.int16)), mask.words, mask.numel)


def expand(values: np.ndarray, mask: Pack) -> Tensor:
    """``out[mask] = values`` and zero elsewhere: ``(numel,)`` from ``(kept,)``, both float32."""
    assert len(values) == mask.kept
    return reference.delta_expand(torch.from_numpy(values), mask.words, mask.numel)


def expand_add(values: np.ndarray, mask: Pack | None, out: Tensor, weight: float) -> None:
    """``out[mask] += weight * values`` in place, the product rounded to float32 first.

    Args:
        values: ``(kept,)`` float32.
        mask: a Pack, None = every entry.
        out: ``mask.numel`` entries of any shape, float32 or float64, any device.
        weight: factor.
    """
    scaled = torch.from_numpy(values * np.float32(weight))
    if mask is None or mask.whole:
        out += scaled.view(out.shape).to(out)
        return
    out += reference.delta_expand(scaled, mask.words, mask.numel).view(out.shape).to(out)


def largest_scale(levels: int) -> float:
    """Largest float32 ``s`` for which ``levels * s`` is finite."""
    top = np.finfo(np.float32).max
    scale = top / np.float32(levels)
    with np.errstate(over="ignore"):
        fits = np.isfinite(scale * np.float32(levels))
    return float(scale if fits else np.nextafter(scale, np.float32(0)))


def quantise(values: np.ndarray, levels: int, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """``codes[i] = stochastic_round(values[i] / scales[i // 256])``, unbiased; zeros stay zero.

    Args:
        values: ``(n,)`` float32, finite.
        levels: largest code: 127 (int8) or 7 (int4).
        key: two uint32 that the random numbers depend on.

    Returns:
        ``(n,)`` int8 in [-levels, levels] and ``(ceil(n / 256),)`` float32; the error of an entry is below its scale.

    Source: unbiased rounding as in Alistarh et al., "QSGD", NeurIPS 2017.
    """
    return reference.delta_quantise(values, levels, largest_scale(levels), key)


def dequantise(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """``values[i] = codes[i] * scales[i // 256]``: ``(n,)`` float32."""
    return reference.delta_dequantise(codes, scales)


def round_bf16(values: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Round ``(n,)`` float32 to bf16 words (uint16), up or down at random so that the mean is exact."""
    return reference.delta_round_bf16(values, key)


def split_planes(values: np.ndarray) -> bytes:
    """All lowest bytes, then all second bytes, ...: entropy coders see one kind of byte at a time."""
    return np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T).tobytes()


def merge_planes(raw: bytes | memoryview, dtype: np.dtype) -> np.ndarray:
    """Undo :func:`split_planes`."""
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1)
    return planes.T.copy().reshape(-1).view(dtype)


def rice_bits(mask: Pack, k: int) -> int:
    """Bits that :func:`rice_encode` writes for parameter ``k``."""
    return reference.rice_bits(mask.words, mask.numel, k)


def rice_encode(mask: Pack, k: int) -> bytes:
    """Rice code of the gaps between kept entries (Golomb 1966, Rice 1979); at most 56 bits a gap.

    Raises:
        ValueError: the mask has 2^32 entries or more.
    """
    if mask.numel >= 1 << 32:
        raise ValueError(f"rice_encode: {mask.numel} entries, wanted fewer than 2^32; send a bitmap")
    return reference.rice_encode(mask.words, mask.numel, k)


def rice_decode(data: bytes | memoryview, numel: int, kept: int, k: int) -> tuple[Pack, int]:
    """Read ``kept`` positions below ``numel`` from the start of hostile ``data``.

    Returns:
        The mask, and how many bytes of ``data`` it took.

    Raises:
        ValueError: the stream ends early, leaves the range, or pads with ones.
    """
    words, used = reference.rice_decode(bytes(data), numel, kept, k)
    return Pack(words, numel, kept), used


def positions(mask: Pack) -> np.ndarray:
    """Return the kept positions in rising order: ``(kept,)`` int64."""
    return np.flatnonzero(reference.delta_mask(mask.words, mask.numel).numpy())
