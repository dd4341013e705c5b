"""What both sides know of the tensors in a frame: names, shapes, kinds; and what a decoder lets a frame ask for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoflip.codec.reader import DecodeError, Reader, varint

__all__ = ["Entry", "Limits", "Schema"]

_INTEGERS = {
    torch.int64: 1,
    torch.int32: 2,
    torch.int16: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.bool: 6,
}
FLOAT = 0
DTYPES: dict[int, torch.dtype] = {number: dtype for dtype, number in _INTEGERS.items()}
NUMPY: dict[int, np.dtype[Any]] = {
    n: np.dtype(code) for n, code in enumerate(("<i8", "<i4", "<i2", "i1", "u1", "u1"), 1)
}
_MAX_DIMS = 32
_MAX_NAME = 4096
_SMALL = 1 << 15  # bytes of a schema that is kept for the next frame: clients of a model all send the same one


@dataclass(frozen=True)
class Limits:
    """What a frame may ask of its reader.

    Args:
        max_bytes: bytes, both of the frame and of the dense tensors it decodes to (4 an entry for floats).
        max_tensors: tensors in a schema that travels in the frame.
        max_schema_bytes: bytes of that schema, unpacked.

    Raises:
        ValueError: one of them is no whole number or below 0.
    """

    max_bytes: int = 1 << 30
    max_tensors: int = 1 << 16
    max_schema_bytes: int = 1 << 22

    def __post_init__(self) -> None:
        """Check them: a limit that nothing can meet would look like bad frames."""
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"Limits: {name}={value!r}; wanted a whole number, at least 0")


class Entry(NamedTuple):
    """One tensor: its name, its shape, and its kind (0 = floating, else an integer type's number)."""

    name: str
    shape: tuple[int, ...]
    kind: int

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensor that decoding makes."""
        return self.numel * (NUMPY[self.kind].itemsize if self.kind else 4)


class Schema:
    """An ordered list of (name, shape, kind), named on the wire by 16 bytes of its SHA-256.

    Floating types are one kind: float16, bfloat16, float32 and float64 tensors share a schema.

    Example:
        >>> Schema.of({"w": torch.zeros(2, 3)})
        Schema(1 tensors, 6 entries, id 5e9a...)
    """

    def __init__(self, entries: tuple[Entry, ...]) -> None:
        self.entries = entries

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Schema:
        """Return the schema of ``tensors``, in their order.

        Raises:
            ValueError: a tensor is complex or quantised, has over 32 dimensions, or its name over 4096 bytes.
        """
        if not isinstance(tensors, Mapping):
            raise ValueError(f"codec: got a {type(tensors).__name__}, wanted a dict: name -> torch.Tensor")
        entries = []
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"codec: {name!r} is a {type(tensor).__name__}, wanted a torch.Tensor")
            kind = FLOAT if tensor.dtype.is_floating_point else _INTEGERS.get(tensor.dtype, -1)
            if kind < 0 or tensor.dtype.itemsize == 1 and kind == FLOAT:
                raise ValueError(
                    f"codec: {name!r} is {tensor.dtype}; wanted float16, bfloat16, float32, float64, bool or an "
                    "integer type; convert it first"
                )
            if tensor.dim() > _MAX_DIMS or len(name.encode()) > _MAX_NAME:
                raise ValueError(
                    f"codec: {name[:80]!r} has {tensor.dim()} dimensions and a name of {len(name.encode())} bytes; "
                    f"a frame holds at most {_MAX_DIMS} and {_MAX_NAME}"
                )
            entries.append(Entry(name, tuple(tensor.shape), kind))
        return _shared(tuple(entries))

    def __repr__(self) -> str:
        entries = sum(e.numel for e in self.entries)
        return f"Schema({len(self.entries)} tensors, {entries} entries, id {self.id.hex()[:8]}...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(self.entries)

    @cached_property
    def id(self) -> bytes:
        """16 bytes that change with any name, shape, kind or the order."""
        return hashlib.sha256(b"AFD1 schema\0" + self.to_bytes()).digest()[:16]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name -> shape, in order."""
        return {entry.name: torch.Size(entry.shape) for entry in self.entries}

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of all tensors that decoding makes."""
        return sum(e.dense_bytes for e in self.entries)

    def to_bytes(self) -> bytes:
        """Return the wire form: count, then per tensor name length, name, kind, dimensions, sizes."""
        return self._wire

    @cached_property
    def _wire(self) -> bytes:
        out = bytearray(varint(len(self.entries)))
        for entry in self.entries:
            name = entry.name.encode()
            out += varint(len(name)) + name + bytes((entry.kind, len(entry.shape)))
            for size in entry.shape:
                out += varint(size)
        return bytes(out)

    @classmethod
    def parse(cls, raw: bytes | memoryview, limits: Limits) -> Schema:
        """Read :meth:`to_bytes` of hostile origin; allocates no tensor.

        Raises:
            DecodeError: it is malformed or asks for more than ``limits``.
        """
        return _parse(bytes(raw), limits) if len(raw) <= _SMALL else cls._read(raw, limits)

    @classmethod
    def _read(cls, raw: bytes | memoryview, limits: Limits) -> Schema:
        reader = Reader(raw, "schema")
        count = reader.varint()
        if count > limits.max_tensors:
            raise DecodeError(f"frame names {count} tensors, Limits.max_tensors is {limits.max_tensors}")
        entries: list[Entry] = []
        seen: set[str] = set()
        for _ in range(count):
            length = reader.varint()
            if length > _MAX_NAME:
                raise DecodeError(f"a tensor's name has {length} bytes, at most {_MAX_NAME} are allowed")
            try:
                name = bytes(reader.take(length)).decode()
            except UnicodeDecodeError as error:
                raise DecodeError("a tensor's name is not UTF-8; the frame is damaged") from error
            kind, dims = reader.take(2)
            if name in seen or (kind != FLOAT and kind not in DTYPES) or dims > _MAX_DIMS:
                raise DecodeError(f"tensor {name[:80]!r}: named twice, of unknown kind {kind}, or {dims} dimensions")
            seen.add(name)
            shape = tuple(reader.varint() for _ in range(dims))
            # zero sizes count as one here: torch multiplies the others into strides all the same
            if math.prod(max(1, size) for size in shape) > limits.max_bytes:
                raise DecodeError(f"tensor {name[:80]!r} of shape {shape} exceeds Limits.max_bytes={limits.max_bytes}")
            entries.append(Entry(name, shape, kind))
        reader.finish()
        return cls(tuple(entries))

    def check(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Raise ValueError unless ``tensors`` has exactly these names, shapes and kinds."""
        sent = Schema.of({e.name: tensors[e.name] for e in self.entries if e.name in tensors})
        if len(tensors) == len(self.entries) and sent == self:
            return
        for entry in self.entries:
            if entry.name not in tensors:
                raise ValueError(f"{what}: the schema names {entry.name!r}, but the tensors do not; pass all of them")
            shape = tuple(tensors[entry.name].shape)
            if shape != entry.shape:
                raise ValueError(
                    f"{what}: {entry.name!r} has shape {shape} but the schema says {entry.shape}. "
                    "Was the schema made before the model got compacted?"
                )
            if Schema.of({entry.name: tensors[entry.name]}).entries[0] != entry:
                raise ValueError(
                    f"{what}: {entry.name!r} is {tensors[entry.name].dtype}, but the schema says "
                    f"{DTYPES.get(entry.kind, 'floating')}; make the schema from the tensors that are sent"
                )
        extra = [name for name in tensors if name not in {e.name for e in self.entries}]
        raise ValueError(f"{what}: {extra[:4]} are not in the schema; make it with Schema.of(tensors) from all tensors")


@lru_cache(maxsize=32)
def _shared(entries: tuple[Entry, ...]) -> Schema:
    return Schema(entries)


@lru_cache(maxsize=32)
def _parse(raw: bytes, limits: Limits) -> Schema:
    return Schema._read(raw, limits)
