"""Each op in a few lines of torch, at home in float64: the truth that every kernel is tested against."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

# --- masked matmul


def masked_matmul(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """``y = x @ (weight * mask).T`` for ``x (N, K)``, ``weight (O, K)``, ``mask (O, K)``."""
    return x @ torch.where(mask, weight, 0).T


# --- delta (sparse-delta coding)


def delta_words(mask: Tensor) -> Tensor:
    """Pack a bool mask (any shape, n entries) into ``ceil(n / 64)`` int64 words; bit i is entry i, spare bits 0."""
    packed = np.packbits(mask.reshape(-1).cpu().numpy(), bitorder="little")
    words = np.zeros(-(-mask.numel() // 64) * 8, np.uint8)
    words[: len(packed)] = packed
    return torch.from_numpy(words.view(np.int64))


def delta_mask(words: Tensor, numel: int) -> Tensor:
    """Undo :func:`delta_words`: the flat bool mask."""
    bits = np.unpackbits(words.numpy().view(np.uint8), count=numel, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


def delta_gather(x: Tensor, words: Tensor, base: Tensor | None = None) -> Tensor:
    """``(x - base)[mask]`` of flat ``x``, in order."""
    mask = delta_mask(words, x.numel()).to(x.device)
    return x[mask] if base is None else (x - base)[mask]


def delta_expand(values: Tensor, words: Tensor, numel: int) -> Tensor:
    """``out[mask] = values``, zero elsewhere."""
    out = torch.zeros(numel, dtype=values.dtype)
    out[delta_mask(words, numel)] = values
    return out


def delta_random(key: tuple[int, int] | None, count: int) -> np.ndarray:
    """``r[i] = mix(mix(i + key0) ^ key1)`` in uint32; mix is lowbias32 (Wellons, "Hash function prospector").

    Without a key every number is one half: rounding to the nearest.
    """
    if key is None:
        return np.full(count, 1 << 31, np.uint32)
    x = np.arange(count, dtype=np.uint32) + np.uint32(key[0])
    for flip in (key[1], 0):
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x7FEB352D)
        x ^= x >> np.uint32(15)
        x *= np.uint32(0x846CA68B)
        x ^= x >> np.uint32(16)
        x ^= np.uint32(flip)
    return x


def delta_round_bf16(values: np.ndarray, key: tuple[int, int] | None) -> np.ndarray:
    """Float32 -> bf16 words (uint16) by stochastic rounding; never rounds a finite value to infinity."""
    bits = values.view(np.uint32)
    words = (bits + (delta_random(key, len(bits)) >> np.uint32(16))) >> np.uint32(16)
    return np.where((words & 0x7F80) == 0x7F80, bits >> np.uint32(16), words).astype(np.uint16)


def delta_quantise(
    values: np.ndarray, levels: int, largest: float, key: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """``codes = floor(x / scale) + (u < frac)`` per block of 256, ``scale = clip(max |x| / levels, tiny, largest)``."""
    blocks = -(-len(values) // 256)
    x = np.zeros((blocks, 256), np.float32)
    x.reshape(-1)[: len(values)] = values
    amax = np.abs(x).max(1)
    clipped = np.clip(amax / np.float32(levels), np.finfo(np.float32).tiny, np.float32(largest))
    scales = np.where(amax > 0, clipped, np.float32(0))
    inverse = np.where(amax > 0, np.float32(1) / clipped, np.float32(0))
    y = (x * inverse[:, None]).reshape(-1)[: len(values)]
    low = np.floor(y)
    u = (delta_random(key, len(values)) >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
    codes = np.clip(low + (u < y - low), -levels, levels)
    return codes.astype(np.int8), scales


def delta_dequantise(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """``x[i] = codes[i] * scales[i // 256]`` in float32."""
    return codes.astype(np.float32) * np.repeat(scales, 256)[: len(codes)]


def _gaps(words: Tensor, numel: int) -> np.ndarray:
    positions = np.flatnonzero(delta_mask(words, numel).numpy())
    return np.diff(positions, prepend=-1) - 1


def rice_bits(words: Tensor, numel: int, k: int) -> int:
    """Bits that :func:`rice_encode` writes."""
    quotients = _gaps(words, numel) >> k
    return int(np.where(quotients < 24, quotients + 1 + k, 56).sum())


def rice_encode(words: Tensor, numel: int, k: int) -> bytes:
    """Code each gap as ``gap >> k`` ones, a zero and k low bits; from 24 ones on, the gap itself in 32 bits.

    Bits fill bytes from the lowest; the last byte is padded with zeros.
    """
    bits: list[np.ndarray] = []
    for gap in _gaps(words, numel).tolist():
        ones, tail, width = (gap >> k, gap & ((1 << k) - 1), k) if gap >> k < 24 else (24, gap, 32)
        stop = [0] if ones < 24 else []
        bits.append(np.array([1] * ones + stop + [tail >> b & 1 for b in range(width)], np.uint8))
    return np.packbits(np.concatenate(bits) if bits else np.zeros(0, np.uint8), bitorder="little").tobytes()


def rice_decode(data: np.ndarray, numel: int, kept: int, k: int) -> tuple[Tensor, int]:
    """Undo :func:`rice_encode` at the start of ``data``: (words, bytes used, or -1 short, -2 range, -3 padding)."""
    bits = np.unpackbits(data, bitorder="little").tolist()
    mask = torch.zeros(numel, dtype=torch.bool)
    at, position = 0, -1
    for _ in range(kept):
        ones = next((i for i, bit in enumerate(bits[at : at + 24]) if not bit), 24)
        at += min(ones + 1, 24)
        width = k if ones < 24 else 32
        if at + width > len(bits):
            return delta_words(mask), -1
        tail = sum(bit << b for b, bit in enumerate(bits[at : at + width]))
        at += width
        position += 1 + (tail if ones == 24 else (ones << k) + tail)
        if position >= numel:
            return delta_words(mask), -2
        mask[position] = True
    used = -(-at // 8)
    return delta_words(mask), -3 if any(bits[at : used * 8]) else used


def varint_encode(words: Tensor, numel: int) -> bytes:
    """Code each gap as LEB128: seven bits a byte, lowest first, the top bit set on all but the last."""
    out = bytearray()
    for gap in _gaps(words, numel).tolist():
        while gap >= 0x80:
            out.append(gap & 0x7F | 0x80)
            gap >>= 7
        out.append(gap)
    return bytes(out)


def varint_decode(data: np.ndarray, numel: int, kept: int) -> tuple[Tensor, int]:
    """Undo :func:`varint_encode`: (words, bytes used, or -1 short, -2 range, -4 a number too long)."""
    mask = torch.zeros(numel, dtype=torch.bool)
    stream, at, position = data.tolist(), 0, -1
    for _ in range(kept):
        gap = shift = 0
        while True:
            if at == len(stream):
                return delta_words(mask), -1
            byte, at = stream[at], at + 1
            gap |= (byte & 0x7F) << shift
            if byte < 0x80 and (byte or not shift):
                break
            if byte < 0x80 or shift == 56:
                return delta_words(mask), -4
            shift += 7
        position += 1 + gap
        if position >= numel:
            return delta_words(mask), -2
        mask[position] = True
    return delta_words(mask), at


def delta_split(values: np.ndarray) -> bytes:
    """Byte planes: all lowest bytes first."""
    return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def delta_merge(planes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Undo :func:`delta_split`."""
    return planes.reshape(dtype.itemsize, -1).T.copy().reshape(-1).view(dtype)


# --- hessian (Gauss-Newton diagonal and traces)


def rademacher(seed: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Signs +-1 (float32) that depend on (seed, stream, position) alone: bit i % 64 of SplitMix64's word i / 64."""
    count = 1
    for size in shape:
        count *= size
    words = _mix(rademacher_start(seed, stream) + (torch.arange((count + 63) // 64) + 1) * _int64(0x9E3779B97F4A7C15))
    bits = words[:, None] >> torch.arange(64) & 1
    return (1.0 - 2.0 * bits.reshape(-1)[:count].float()).reshape(shape)


def rademacher_start(seed: int, stream: int) -> Tensor:
    """State, an int64 scalar, from which SplitMix64 counts the words of (seed, stream)."""
    return _mix(_mix(torch.tensor(_int64(seed))) ^ _int64(stream))


def _int64(value: int) -> int:
    """Return ``value`` modulo 2**64, read as a signed number: torch's int64 wraps like C's uint64."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def _mix(z: Tensor) -> Tensor:
    """Finish SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014)."""

    def right(z: Tensor, by: int) -> Tensor:
        return z >> by & ((1 << 64 - by) - 1)  # torch shifts the sign in; C's uint64 shifts in zeros

    z = (z ^ right(z, 30)) * _int64(0xBF58476D1CE4E5B9)
    z = (z ^ right(z, 27)) * _int64(0x94D049BB133111EB)
    return z ^ right(z, 31)


def squared_matmul(d: Tensor, a: Tensor, squared: bool = False) -> Tensor:
    """``D[o, k] = sum_n d[n, o]^2 a[n, k]^2`` for ``d (N, O)``, ``a (N, K)``; ``d`` as it is when ``squared``."""
    return (d if squared else d.square()).T @ a.square()


def factor_squares(d: Tensor) -> Tensor:
    """``sum_q d[q]^2``."""
    return d.square().sum(0)


def dense_pull_back(d: Tensor, weight: Tensor, gate: Tensor | None = None, squared: bool = False) -> Tensor:
    """``v[q, n] = (d[q, n] @ weight) * (gate[n] > 0)`` for ``d (Q, N, O)``; ``sum_q v[q]^2`` when ``squared``."""
    v = (d.flatten(0, 1) @ weight).view(*d.shape[:2], weight.shape[1])
    if gate is not None:
        v = torch.ops.aten.threshold_backward(v, gate.expand_as(v), 0)
    return v.square().sum(0) if squared else v


def sequence_squares(d: Tensor, u: Tensor) -> Tensor:
    """``D[o, k] = sum_qn (sum_p d[q, n, o, p] u[n, p, k])^2`` for ``d (Q, N, O, P)``, ``u (N, P, K)``."""
    out = u.new_zeros(d.shape[2], u.shape[2])
    for n in range(len(u)):  # one sample at a time: the gradients of all samples are never held at once
        out += (d[:, n] @ u[n]).square().sum(0)
    return out


def conv_squares(
    d: Tensor,
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    at: Tensor | None = None,
) -> Tensor:
    """``D[o, k] = sum_qn (sum_p d[q, n, o, p] u[n, k, p])^2``, ``u`` the patches (im2col) of ``x (N, C, H, W)``.

    ``d`` is ``(Q, N, O, H', W')``, the result ``(O, C // groups * kernel height * kernel width)``; with ``at`` the
    values of ``d (Q, N, O, h, w)`` stand at positions ``at (N, O, h, w)`` and all others are zero.
    """
    o_group = d.shape[2] // groups
    out = [x.new_zeros(o_group, x.shape[1] // groups * kernel_size[0] * kernel_size[1]) for _ in range(groups)]
    for n in range(len(x)):
        patches = torch.nn.functional.unfold(x[n : n + 1], kernel_size, dilation, padding, stride)[0].chunk(groups)
        rows = d[:, n].flatten(2)
        if at is not None:
            whole = rows.new_zeros(*rows.shape[:2], patches[0].shape[1])
            rows = whole.scatter_add_(2, at[n].flatten(1).expand_as(rows), rows)
        for i, (total, u) in enumerate(zip(out, patches)):
            total += (rows[:, i * o_group : (i + 1) * o_group] @ u.T).square().sum(0)
    return torch.cat(out)


def conv_pull_back(
    d: Tensor,
    weight: Tensor,
    input_size: tuple[int, ...],
    at: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Gradient ``(Q, N, C, H, W)`` at a convolution's input from values ``d (Q, N, O, h, w)`` at positions ``at``."""
    sizes = [
        (input_size[1 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    out = []
    for one in d:
        rows = one.flatten(2)
        whole = rows.new_zeros(*rows.shape[:2], sizes[0] * sizes[1]).scatter_add_(2, at.flatten(2), rows)
        whole = whole.unflatten(2, sizes)
        shape = (len(one), *input_size)
        out.append(conv2d_input(shape, weight, whole, stride, padding, dilation, groups))
    return torch.stack(out)
