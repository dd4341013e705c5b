"""Sparse-delta ops: from a tensor to the byte streams of its kept values and back, in one pass.

Floats exist in a cache-sized scratch only; the numbers of the kinds are those of docs/wire_format.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from autoflip.ops import backend, delta_gpu, memory
from autoflip.ops import delta_coding as coding
from autoflip.ops.delta import CHUNK, Array, Pack, cpp, empty_words, expand, expand_add, gather, pack_nonzero

__all__ = [
    "BF16",
    "FP32",
    "INT4",
    "INT8",
    "LEVELS",
    "Coded",
    "accumulate",
    "code",
    "code_nonzero",
    "codes_of",
    "decode",
    "gpu_server",
    "new_streams",
    "valid",
]

FP32, BF16, INT8, INT4 = range(4)
LEVELS = {INT8: 127, INT4: 7}
_PLANES = {FP32: 4, BF16: 2}
_GPU = {FP32: None, BF16: 0, **LEVELS}  # what delta_gpu.code calls them


@dataclass(frozen=True, eq=False)
class Coded:
    """Kept values as byte streams.

    Attributes:
        kind: FP32, BF16, INT8 or INT4.
        count: values.
        streams: contiguous uint8: for FP32 and BF16 byte planes of ``(count,)``, lowest first; for INT8 the codes
            ``(count,)`` as bytes; for INT4 two codes a byte, the first in the low half.
        scales: float32 for INT8 and INT4, one a block: ``(ceil(count / 256),)``, or as many as ``survivors``; else
            empty.
        survivors: ``(blocks,)`` uint8, None = each block has 256 values, the last one the rest; else how many each
            has, less one (:mod:`autoflip.ops.delta_zeros`).
    """

    kind: int
    count: int
    streams: tuple[Array, ...]
    scales: Array
    survivors: Array | None = None

    @cached_property
    def starts(self) -> Array | None:
        """``(blocks + 1,)`` int64: values before each block, last the number of them all; None without survivors."""
        if self.survivors is None:
            return None
        return np.append(0, np.cumsum(self.survivors + np.int64(1)))

    @property
    def blocks(self) -> int:
        """Blocks of which ``survivors`` tells."""
        return 0 if self.survivors is None else len(self.survivors)

    def places(self, ext: ModuleType) -> tuple[tuple[int, int, int, int], int]:
        """Addresses of the streams and of the scales, as the extension takes them."""
        first, second, third, fourth = (*map(ext.address, self.streams), 0, 0, 0)[:4]
        return (first, second, third, fourth), ext.address(self.scales)

    def places_and_blocks(self, ext: ModuleType) -> tuple[tuple[int, int, int, int], int, int, int]:
        """As ``places``, and where blocks start and how many there are, as decoding takes them."""
        return (*self.places(ext), 0 if self.starts is None else ext.address(self.starts), self.blocks)


def new_streams(kind: int, count: int) -> Coded:
    """Return streams of the right sizes, not filled."""
    planes = _PLANES.get(kind, 1)
    size = -(-count // 2) if kind == INT4 else count
    scales = -(-count // coding.BLOCK) if kind in LEVELS else 0
    return Coded(
        kind, count, tuple(memory.empty_bytes(planes * size).reshape(planes, size)), np.empty(scales, np.float32)
    )


def code(
    x: Tensor, mask: Pack | None, kind: int, key: coding.Key, base: Tensor | None = None, levels: int | None = None
) -> tuple[Coded, bool]:
    """Code ``(x - base)[mask]`` as ``kind``, and tell whether all of ``x - base`` is finite.

    Args:
        x: any shape with ``mask.numel`` entries, float32, any device.
        mask: a Pack, None = every entry.
        kind: FP32, BF16, INT8 or INT4; the last three round at random, without bias.
        key: two uint32 that the random numbers depend on, None = to the nearest; rank i among the kept draws number i.
        base: like ``x``; None = zeros.
        levels: largest code of INT8 or INT4, 1 to ``LEVELS[kind]``; None = that.

    Returns:
        The streams, and a bool that covers dropped entries too; the streams mean nothing where it is False.

    Raises:
        ValueError: sizes or dtypes do not fit.
    """
    mask = None if mask is None or mask.whole else mask
    ext = cpp(x.device)
    server = gpu_server(x.device)
    fits = x.dtype is torch.float32 and (mask is None or mask.numel == x.numel())
    fits = fits and (base is None or (base.shape == x.shape and base.dtype == x.dtype and base.device == x.device))
    if server and fits:
        start = None if base is None else base.detach().contiguous()
        how = levels or _GPU[kind]
        return _from_gpu(kind, *delta_gpu.code(x.detach().contiguous(), mask, how, key, start, server))
    if ext is None or not fits:
        values, finite = gather(x, mask, base)  # says what does not fit
        if not finite:
            return new_streams(kind, len(values)), False
        return _code_values(values, kind, key, levels), True
    x = x.detach().contiguous()
    base = None if base is None else base.detach().contiguous()
    out = new_streams(kind, x.numel() if mask is None else mask.kept)
    where = (0, 0) if mask is None else (mask.words.data_ptr(), mask.offsets.data_ptr())
    places = (x.data_ptr(), 0 if base is None else base.data_ptr(), *where, x.numel(), kind, *out.places(ext))
    return out, ext.delta_encode(*places, *_rules(kind, key, levels), False, torch.get_num_threads())


def _rules(kind: int, key: coding.Key, levels: int | None) -> tuple[int, float, int, int, bool]:
    most = levels or LEVELS.get(kind, 0)
    return (most, coding.largest_scale(most) if most else 0.0, *coding.words_of(key))


def code_nonzero(x: Tensor, kind: int, key: coding.Key, levels: int | None = None) -> tuple[Coded, Pack, bool]:
    """``code(x, pack_nonzero(x), kind, key)``, and that Pack between the two; one thread reads ``x`` once.

    Raises:
        ValueError: as :func:`code`.
    """
    if x.dtype is not torch.float32 or not x.numel() or (ext := cpp(x.device)) is None:
        mask = pack_nonzero(x)
        coded, finite = code(x, mask, kind, key, levels=levels)
        return coded, mask, finite
    x, room = x.detach().contiguous(), new_streams(kind, x.numel())  # memory that is never written is never there
    words = empty_words(x.numel())
    offsets = torch.zeros(-(-x.numel() // CHUNK) + 1, dtype=torch.int64)
    places = (x.data_ptr(), 0, words.data_ptr(), offsets.data_ptr(), x.numel(), kind, *room.places(ext))
    finite = ext.delta_encode(*places, *_rules(kind, key, levels), True, torch.get_num_threads())
    mask = Pack.counted(words, x.numel(), offsets)
    kept = mask.kept
    size = -(-kept // 2) if kind == INT4 else kept
    scales = room.scales[: -(-kept // coding.BLOCK)]
    return Coded(kind, kept, tuple(s[:size] for s in room.streams), scales), mask, finite


def gpu_server(device: torch.device) -> str:
    """Return "cuda" or "triton" when ``AUTOFLIP_BACKEND`` names it and ``device`` is a GPU, else nothing."""
    name = backend.serve("delta", device) if device.type == "cuda" else ""
    return name if name in ("cuda", "triton") else ""


def _from_gpu(kind: int, values: Tensor, scales: Tensor, finite: bool) -> tuple[Coded, bool]:
    if not finite:
        return new_streams(kind, 0), False
    held, none = values.cpu().numpy(), np.empty(0, np.float32)
    if kind in _PLANES:
        planes = np.frombuffer(coding.split_planes(held.view(np.uint16 if kind == BF16 else np.float32)), np.uint8)
        return Coded(kind, len(held), tuple(planes.reshape(_PLANES[kind], len(held))), none), True
    codes = coding.nibbles(held) if kind == INT4 else held.view(np.uint8)
    return Coded(kind, len(held), (codes,), scales.cpu().numpy()), True


def _code_values(values: Array, kind: int, key: coding.Key, levels: int | None) -> Coded:
    if ext := cpp():  # of a tensor on another device
        values = np.ascontiguousarray(values, np.float32)
        out = new_streams(kind, len(values))
        places = (values.ctypes.data, 0, 0, 0, len(values), kind, *out.places(ext))
        ext.delta_encode(*places, *_rules(kind, key, levels), False, torch.get_num_threads())
        return out
    none = np.empty(0, np.float32)
    if kind in _PLANES:
        words = values if kind == FP32 else coding.round_bf16(values, key)
        planes = np.frombuffer(coding.split_planes(words), np.uint8).reshape(_PLANES[kind], len(values))
        return Coded(kind, len(values), tuple(planes), none)
    codes, scales = coding.quantise(values, levels or LEVELS[kind], key)
    packed = coding.nibbles(codes) if kind == INT4 else codes.view(np.uint8)
    return Coded(kind, len(values), (packed,), scales)


def _values(coded: Coded) -> Array:
    if coded.kind in _PLANES:
        raw = b"".join(s.tobytes() for s in coded.streams)
        if coded.kind == FP32:
            return coding.merge_planes(raw, np.dtype("<f4"))
        words = coding.merge_planes(raw, np.dtype("<u2"))
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    codes = codes_of(coded)
    if coded.survivors is None:
        return coding.dequantise(codes, coded.scales)
    return codes * np.repeat(coded.scales, coded.survivors + np.int64(1))


def codes_of(coded: Coded) -> Array:
    """Return the ``(count,)`` int8 codes of an INT8 or INT4 stream."""
    codes = coded.streams[0]
    return coding.from_nibbles(codes, coded.count) if coded.kind == INT4 else codes.view(np.int8)


def decode(coded: Coded, mask: Pack | None, out: Tensor | None = None) -> Tensor:
    """``out[mask] = values`` and zero elsewhere.

    Args:
        coded: valid streams (:func:`valid`).
        mask: a Pack that keeps ``coded.count`` entries, None = every entry.
        out: contiguous float32 on the CPU, written over; None = fresh memory.

    Returns:
        ``(numel,)`` float32, or ``out``.
    """
    _check(coded, mask)
    numel = coded.count if mask is None else mask.numel
    if out is None:
        out = memory.empty(numel)
    if out.numel() != numel or out.dtype is not torch.float32 or not out.is_contiguous():
        raise ValueError(f"decode: out is {out.dtype} {tuple(out.shape)}, wanted contiguous float32 of {numel} entries")
    if ext := cpp(out.device):
        where = (0, 0) if mask is None or mask.whole else (mask.words.data_ptr(), mask.offsets.data_ptr())
        ext.delta_decode(
            coded.kind, *coded.places_and_blocks(ext), *where, numel, out.data_ptr(), torch.get_num_threads()
        )
        return out
    values = _values(coded)
    flat = torch.from_numpy(values) if mask is None else expand(values, mask)
    return out.copy_(flat.view(out.shape))


def accumulate(coded: Coded, mask: Pack | None, out: Tensor, weight: float) -> None:
    """``out[mask] += weight * values`` in place, the product rounded to float32 first.

    Args:
        coded: valid streams.
        mask: a Pack that keeps ``coded.count`` entries, None = every entry.
        out: as many entries as the mask covers, float32 or float64, any device.
        weight: factor, rounded to float32.
    """
    _check(coded, mask)
    if out.dtype is torch.float32 and out.is_contiguous() and (ext := cpp(out.device)):
        where = (0, 0) if mask is None or mask.whole else (mask.words.data_ptr(), mask.offsets.data_ptr())
        places = (*coded.places_and_blocks(ext), *where, out.numel(), weight, out.data_ptr(), torch.get_num_threads())
        ext.delta_decode_add(coded.kind, *places)
        return
    server = gpu_server(out.device)
    if server and mask is not None and out.dtype is torch.float32 and out.is_contiguous():
        if coded.kind == INT8 and coded.survivors is None:  # one byte a value crosses to the device, not four
            values, scales = torch.from_numpy(coded.streams[0].view(np.int8)), torch.from_numpy(coded.scales)
            delta_gpu.expand(values.to(out.device), scales.to(out.device), mask, weight, out, server)
        else:
            delta_gpu.expand(torch.from_numpy(_values(coded)).to(out.device), None, mask, weight, out, server)
        return
    expand_add(_values(coded), mask, out, weight)


def valid(coded: Coded) -> bool:
    """Tell whether streams of hostile origin hold only what :func:`code` writes: finite values, codes in range."""
    # negative scales and NaN lie above, as unsigned numbers
    if coded.kind in LEVELS and int(coded.scales.view(np.uint32).max(initial=0)) > _largest_word(coded.kind):
        return False
    if ext := cpp():
        return ext.delta_valid(coded.kind, coded.places(ext)[0], coded.count)
    if coded.kind in _PLANES:
        high, low = coded.streams[-1], coded.streams[-2]
        return not bool((((high & 0x7F) == 0x7F) & (low >= 0x80)).any())
    codes = coded.streams[0]
    if coded.kind == INT8:
        return not bool((codes == 0x80).any())
    past = coded.count % 2 and codes[-1] >> 4
    return not (bool(((codes & 15) == 8).any()) or bool((codes >> 4 == 8).any()) or past)


@cache
def _largest_word(kind: int) -> int:
    return int(np.float32(coding.largest_scale(LEVELS[kind])).view(np.uint32))


def _check(coded: Coded, mask: Pack | None) -> None:
    if mask is not None and mask.kept != coded.count:
        raise ValueError(f"decode: {coded.count} values for a mask that keeps {mask.kept}; they are of two tensors")
