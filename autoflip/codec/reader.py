"""Bounded reading of hostile bytes."""

from __future__ import annotations

__all__ = ["DecodeError", "Reader", "varint"]

_MAX_VARINT_BYTES = 9  # 63 bits


class DecodeError(ValueError):
    """The frame cannot be decoded here: damaged, hostile, or made for another schema, mask or base."""


def varint(value: int) -> bytes:
    """Return ``value`` as LEB128: seven bits a byte, lowest first, the top bit set on all but the last."""
    assert 0 <= value < 1 << 63
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """A cursor that never leaves its buffer; every failure is a DecodeError that names ``what``."""

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self._data = memoryview(data)
        self._at = 0
        self._what = what

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, count: int) -> memoryview:
        """Return the next ``count`` bytes, not copied."""
        if count > self.left:
            raise DecodeError(
                f"{self._what} ends early: {count} bytes wanted, {self.left} left; the frame is cut short"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def rest(self) -> memoryview:
        """Return what is left without moving on."""
        return self._data[self._at :]

    def varint(self) -> int:
        """Read one number below 2^63, in its shortest form only."""
        value = 0
        for shift in range(_MAX_VARINT_BYTES):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << 7 * shift
            if byte < 0x80:
                if byte == 0 and shift:
                    raise DecodeError(f"{self._what} holds a number with needless bytes; the frame is damaged")
                return value
        raise DecodeError(f"{self._what} holds a number of over 63 bits; the frame is damaged")

    def finish(self) -> None:
        """Raise DecodeError unless everything has been read."""
        if self.left:
            raise DecodeError(f"{self._what} has {self.left} bytes too many; the frame is damaged")
