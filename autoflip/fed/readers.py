"""Read the file formats that federated data sets come in: IDX, CIFAR batches, LEAF json, npz.

Files are taken as untrusted: every count is checked against the bytes that are there, nothing in a file can
run code, and whatever is wrong is one `DataError` that names the file and what it should have held.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
import pickletools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

__all__ = ["DataError", "class_ids", "find", "missing", "read_cifar", "read_idx", "read_leaf", "read_npz"]

_CHUNK = 1 << 22
_IDX_TYPES: dict[str, tuple[int, np.dtype]] = {"uint8": (0x08, np.dtype("u1")), "int32": (0x0C, np.dtype(">i4"))}


class DataError(ValueError):
    """A data file is missing or damaged; the message names it and says what was expected."""


def missing(path: Path, wanted: str, source: str) -> DataError:
    """Return the error for a file that is not there."""
    return DataError(
        f"{path} is missing; wanted {wanted}. Get it from {source}, or name another folder with --data-root "
        "or AUTOFLIP_DATA."
    )


def find(paths: Sequence[Path], wanted: str, source: str) -> Path:
    """Return the first of ``paths`` that exists as it is or with ``.gz``; `DataError` if none does."""
    for path in paths:
        for candidate in (path, path.with_name(path.name + ".gz")):
            if candidate.is_file():
                return candidate
    raise missing(paths[0], f"{wanted} (also as .gz)", source)


def _bytes_up_to(stream: IO[bytes], count: int) -> bytearray:
    """Read at most ``count`` bytes, chunk by chunk: a count from a header must not size an allocation."""
    got = bytearray()
    while len(got) < count:
        chunk = stream.read(min(_CHUNK, count - len(got)))
        if not chunk:
            break
        got += chunk
    return got


def read_idx(path: Path, dtype: str, ndim: int) -> np.ndarray:
    """Return the array of an IDX file (MNIST's format), gzip or plain.

    Args:
        path: the file; its first bytes tell whether it is compressed, not its name.
        dtype: ``"uint8"`` or ``"int32"``.
        ndim: number of dimensions.

    Returns:
        A writable array of that dtype (int32 in native byte order).

    Raises:
        DataError: another magic number, bytes that do not fit the header, a truncated gzip stream.
    """
    code, kind = _IDX_TYPES[dtype]
    magic = (code << 8) | ndim
    try:
        with path.open("rb") as plain:
            compressed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=plain) if compressed else plain)
            header = bytes(_bytes_up_to(stream, 4 + 4 * ndim))
            if len(header) < 4 + 4 * ndim or int.from_bytes(header[:4], "big") != magic:
                raise DataError(
                    f"{path}: begins with {header[:4].hex() or 'nothing'}; wanted an IDX file of {dtype} in {ndim} "
                    f"dimensions (magic {magic:08x} and {ndim} sizes). Is it the right file, complete?"
                )
            shape = tuple(int.from_bytes(header[4 * i : 4 * i + 4], "big") for i in range(1, ndim + 1))
            want = math.prod(shape) * kind.itemsize
            body = _bytes_up_to(stream, want + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read to its end ({error}); wanted a complete IDX file, gzip or plain. "
            "It was probably cut off while it was copied; fetch it again."
        ) from error
    if len(body) != want:
        have = "more than that" if len(body) > want else f"{len(body)}"
        raise DataError(
            f"{path}: its header promises {'x'.join(map(str, shape))} {dtype}, {want} bytes, but {have} follow; "
            "wanted exactly those. Fetch the file again."
        )
    array = np.frombuffer(body, kind).reshape(shape)
    return array if dtype == "uint8" else array.astype(np.int32)


class _Array:
    """Stands in for a pickled numpy array: remembers what the pickle says, runs nothing of numpy."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Kind:
    """Stands in for a pickled numpy dtype."""

    def __init__(self, *names: Any) -> None:
        self.name = names[0] if names else None

    def __setstate__(self, state: Any) -> None:
        pass


def _new_array(*_: Any) -> _Array:
    return _Array()


class _CifarUnpickler(pickle.Unpickler):
    """Knows the three names that CIFAR's batches hold, and gives inert stand-ins for them."""

    NAMES = {
        ("numpy.core.multiarray", "_reconstruct"): _new_array,
        ("numpy._core.multiarray", "_reconstruct"): _new_array,  # the same function as numpy 2 writes it
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Kind,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch does")
        return self.NAMES[module, name]


def _pixels(path: Path, value: Any) -> np.ndarray:
    """Return the (N, 3072) uint8 array that a batch's ``data`` stands for."""
    state = getattr(value, "state", None)
    if isinstance(state, tuple) and len(state) == 5:
        _, shape, kind, fortran, raw = state
        u1 = isinstance(kind, _Kind) and kind.name in ("u1", b"u1") and not fortran
        if u1 and isinstance(raw, bytes) and isinstance(shape, tuple) and len(shape) == 2:
            rows, columns = shape
            if isinstance(rows, int) and rows > 0 and columns == 3072 and len(raw) == rows * 3072:
                return np.frombuffer(raw, np.uint8).reshape(rows, 3072)
    raise DataError(f"{path}: 'data' is not (N, 3072) uint8, N above 0; wanted one row of 3x32x32 bytes an image")


_TUPLES = frozenset(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"))
_MOST_TUPLES = 1000


def read_cifar(path: Path, labels: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (images ``(N, 3, 32, 32)`` uint8, labels ``(N,)`` int64) of one batch of CIFAR's Python version.

    The batch is a pickle. It is read by an unpickler that knows CIFAR's three numpy names and replaces even
    those by inert objects, so a file can neither import nor call anything.

    Args:
        path: the batch.
        labels: key of the labels: ``"labels"`` (CIFAR-10), ``"fine_labels"`` (CIFAR-100).
        classes: number of classes; labels outside ``[0, classes)`` are an error.

    Raises:
        DataError: the pickle asks for another name, or does not hold a batch.
    """
    try:
        raw, tuples = path.read_bytes(), 0
        for opcode, argument, _ in pickletools.genops(raw):
            # one inside the other, a million deep, end the process when they are hashed; a batch has a handful
            tuples += opcode.name in _TUPLES
            if tuples > _MOST_TUPLES:
                raise pickle.UnpicklingError(f"it makes more than {_MOST_TUPLES} tuples")
            # the C unpickler allocates a memo as long as the largest index it meets, tens of GB if a file says so
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(raw):
                raise pickle.UnpicklingError(f"it numbers an object {argument} in {len(raw)} bytes")
        batch = _CifarUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a broken pickle may raise anything (documented so)
        raise DataError(
            f"{path}: is not a batch of CIFAR's Python version ({error}); wanted a dictionary of "
            f"'data' and '{labels}' and nothing that runs code. Fetch the file again from its publisher."
        ) from error
    if not isinstance(batch, dict):
        raise DataError(f"{path}: holds {type(batch).__name__}; wanted a dictionary with 'data' and '{labels}'")
    named = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in batch.items()}
    missing = [key for key in ("data", labels) if key not in named]
    if missing:
        raise DataError(f"{path}: has no {' and no '.join(missing)}; wanted the keys 'data' and '{labels}'")
    x = _pixels(path, named["data"])
    return x.reshape(-1, 3, 32, 32), class_ids(path, named[labels], len(x), classes)


def class_ids(where: Path | str, values: Any, count: int, classes: int) -> np.ndarray:
    """Return ``values`` as ``(count,)`` int64 labels in ``[0, classes)``, or raise `DataError` naming ``where``."""
    plain = isinstance(values, list) and all(type(v) is int and abs(v) < 1 << 31 for v in values)
    if not plain and not (isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.ndim == 1):
        raise DataError(f"{where}: its labels are not a list of integers; wanted {count} labels 0..{classes - 1}")
    y = np.asarray(values, np.int64)
    if len(y) != count:
        raise DataError(f"{where}: has {len(y)} labels for {count} samples; wanted one label a sample")
    if count and (y.min() < 0 or y.max() >= classes):
        raise DataError(f"{where}: has labels from {y.min()} to {y.max()}; wanted 0..{classes - 1}")
    return y


def read_leaf(folder: Path) -> Iterator[tuple[Path, str, list, list]]:
    """Yield (file, user, x, y) of every LEAF json file in ``folder``: files by name, users in a file's order.

    A file is ``{"users": [...], "num_samples": [...], "user_data": {user: {"x": [...], "y": [...]}}}``
    (Caldas et al., "LEAF: A Benchmark for Federated Settings", arXiv:1812.01097). One file is in memory at a time.

    Raises:
        DataError: no file, invalid json, or counts that disagree.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise DataError(f"{folder}: holds no .json file; wanted LEAF's all_data_*.json")
    for path in paths:
        samples = []
        try:
            content = json.loads(path.read_bytes())
            if len({str(user) for user in content["users"]}) < len(content["users"]):
                raise ValueError("a user is listed twice")
            for user, count in zip(content["users"], content["num_samples"], strict=True):
                own = content["user_data"][user]
                x, y = own["x"], own["y"]
                if not (isinstance(x, list) and isinstance(y, list) and len(x) == len(y) == count):
                    raise ValueError(f"user {user} has {len(x)} x and {len(y)} y, num_samples says {count}")
                samples.append((path, str(user), x, y))
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise DataError(
                f"{path}: is not a LEAF file ({type(error).__name__}: {error}); wanted json with users, num_samples "
                "and user_data[user] = {x, y} of that many samples. If it was cut off, fetch it again."
            ) from error
        yield from samples


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the named arrays of an .npz file; object arrays (pickles) are refused.

    Raises:
        DataError: not an npz file, damaged, or without one of ``names``.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except Exception as error:  # zipfile, zlib, numpy and the parser of its headers each have their own
        raise DataError(
            f"{path}: cannot be read ({error}); wanted an .npz file of plain arrays {', '.join(names)}. Fetch it again."
        ) from error
