"""What others would send: named numpy arrays to bytes. Optional libraries that are missing are left out."""

import io
import pickle
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import safetensors.numpy
import torch
import zstandard

Arrays = Mapping[str, np.ndarray]


def _flat(arrays: Arrays) -> list[np.ndarray]:
    """One array a dtype: compressors see all like values in a row."""
    kinds: dict[str, list[np.ndarray]] = {}
    for array in arrays.values():
        kinds.setdefault(array.dtype.str, []).append(array.ravel())
    return [np.concatenate(parts) for parts in kinds.values()]


def _raw(arrays: Arrays) -> bytes:
    return b"".join(a.tobytes() for a in _flat(arrays))


def _shuffled(arrays: Arrays) -> bytes:
    parts = [a.view(np.uint8).reshape(-1, a.itemsize).T.tobytes() for a in _flat(arrays) if a.size]
    return b"".join(parts)


def _zstd(level: int, raw: Callable[[Arrays], bytes] = _raw) -> Callable[[Arrays], bytes]:
    return lambda arrays: zstandard.ZstdCompressor(level=level).compress(raw(arrays))


LEVELS = (1, 3, 9, 19)


def torch_save(tensors: object) -> bytes:
    """``torch.save`` into memory."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _npz(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{str(i): a for i, a in enumerate(arrays.values())})
    return buffer.getvalue()


def _signed(arrays: Arrays) -> dict[str, torch.Tensor]:
    """As torch tensors; two-byte words are bfloat16 in truth and as long as int16."""
    return {n: torch.from_numpy(a.view(np.int16) if a.dtype == np.uint16 else a) for n, a in arrays.items()}


def _coo(arrays: Arrays, level: int) -> bytes:
    parts = []
    for a in arrays.values():
        where = np.flatnonzero(a).astype(np.int32)
        parts += [where.tobytes(), a.ravel()[where].tobytes()]
    raw = b"".join(parts)
    return zstandard.ZstdCompressor(level=level).compress(raw) if level else raw


def _csr(arrays: Arrays) -> bytes:
    parts = []
    for a in arrays.values():
        rows = a.reshape(a.shape[0], -1) if a.ndim > 1 else a.reshape(1, -1)
        held = rows != 0
        ends = held.sum(1).cumsum().astype(np.int32)
        parts += [ends.tobytes(), np.nonzero(held)[1].astype(np.int32).tobytes(), rows[held].tobytes()]
    return b"".join(parts)


def _bitmap(arrays: Arrays, level: int) -> bytes:
    held = [a.ravel() != 0 for a in arrays.values()]
    raw = b"".join(np.packbits(h).tobytes() for h in held)
    raw += _shuffled({str(i): a.ravel()[h] for i, (a, h) in enumerate(zip(arrays.values(), held, strict=True))})
    return zstandard.ZstdCompressor(level=level).compress(raw) if level else raw


def explicit(levels: Sequence[int] = LEVELS) -> dict[str, Callable[[Arrays], bytes]]:
    """Name -> encoder of dense arrays, zeros included: the reader needs nothing else."""
    out: dict[str, Callable[[Arrays], bytes]] = {
        "pickle": lambda a: pickle.dumps(dict(a), protocol=5),
        "torch.save": lambda a: torch_save(_signed(a)),
        "torch.save, sparse COO": lambda a: torch_save({n: t.to_sparse() for n, t in _signed(a).items()}),
        "safetensors": lambda a: safetensors.numpy.save({n: np.ascontiguousarray(v) for n, v in a.items()}),
        "npz": _npz,
        **{f"zstd-{level}": _zstd(level) for level in levels},
        **{f"zstd-{level}, shuffled": _zstd(level, _shuffled) for level in levels},
        "COO int32": lambda a: _coo(a, 0),
        "COO int32 + zstd-3": lambda a: _coo(a, 3),
        "CSR": _csr,
        "bitmap": lambda a: _bitmap(a, 0),
        "bitmap + zstd-3": lambda a: _bitmap(a, 3),
    }
    return out | _libraries()


def known_mask(levels: Sequence[int] = LEVELS) -> dict[str, Callable[[Arrays], bytes]]:
    """Name -> encoder of kept values alone: what remains to be packed when both sides hold the mask."""
    out: dict[str, Callable[[Arrays], bytes]] = {
        "x[mask]": _raw,
        **{f"x[mask] + zstd-{level}, shuffled": _zstd(level, _shuffled) for level in levels},
    }
    return out | {f"x[mask] + {n}": f for n, f in _libraries().items()}


def _libraries() -> dict[str, Callable[[Arrays], bytes]]:
    out: dict[str, Callable[[Arrays], bytes]] = {}
    try:
        import blosc2
    except ImportError:
        pass
    else:
        # frames hold at most 2 GiB; 5 of 9 is the library's default level
        def blosc(arrays: Arrays, kind: object) -> bytes:
            settings = {"codec": blosc2.Codec.ZSTD, "clevel": 5, "nthreads": 1, "filters": [kind]}
            return b"".join(blosc2.compress2(a, typesize=a.itemsize, **settings) for a in _flat(arrays))

        out["blosc2 shuffle"] = lambda a: blosc(a, blosc2.Filter.SHUFFLE)
        out["blosc2 bitshuffle"] = lambda a: blosc(a, blosc2.Filter.BITSHUFFLE)
    try:
        from pcodec import ChunkConfig, standalone
    except ImportError:
        pass
    else:
        wide = {"i1": np.int16, "u1": np.uint16}  # pcodec takes two bytes and more
        out["pcodec"] = lambda arrays: b"".join(
            standalone.simple_compress(a.astype(wide.get(a.dtype.str[1:], a.dtype)), ChunkConfig())
            for a in _flat(arrays)
        )
    try:
        from zipnn import ZipNN
    except ImportError:
        pass
    else:

        def zip_nn(arrays: Arrays) -> bytes:
            kinds = {4: "float32", 2: "bfloat16", 1: "float32"}
            return b"".join(
                ZipNN(bytearray_dtype=kinds[a.itemsize], threads=1, input_format="byte").compress(a.tobytes())
                for a in _flat(arrays)
            )

        out["ZipNN"] = zip_nn
    return out
