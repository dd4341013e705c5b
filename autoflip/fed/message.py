"""The envelope of a payload: who, which round, which view, and the codec frames inside.

Layout, little-endian: magic ``AFM1``, kind u8, number of frames u8, reserved u16 (0), round u32, client u32,
examples u32, loss f32, view id 16 bytes, base id 16 bytes, one u32 length a frame, CRC-32 of all that, then the
frames. A frame carries a checksum of its own.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

from autoflip import codec

__all__ = ["EXPLORE", "NO_VIEW", "RESYNC", "TRAIN", "UPDATE", "Message"]

_HEADER = struct.Struct("<4sBBHIIIf16s16s")
_MAGIC = b"AFM1"
_MAX_FRAMES = 4

TRAIN, EXPLORE, UPDATE, RESYNC = 1, 2, 3, 4
NO_VIEW = bytes(16)


@dataclass(frozen=True)
class Message:
    """One payload between the server and a client.

    Attributes:
        kind: TRAIN or EXPLORE (down), UPDATE or RESYNC (up: the client lacks the base that a patch needs).
        round: round number.
        client: id of the client that sends or receives.
        frames: codec frames.
        view: id of the parameters that the client trains from.
        base: id of the view that a downlink patch changes; zeros: none, the patch is complete.
        examples: training examples behind an update.
        loss: mean training loss behind an update.
    """

    kind: int
    round: int
    client: int
    frames: tuple[bytes, ...] = ()
    view: bytes = NO_VIEW
    base: bytes = NO_VIEW
    examples: int = 0
    loss: float = 0.0

    def pack(self) -> bytes:
        """Return the bytes that travel."""
        head = _HEADER.pack(
            _MAGIC,
            self.kind,
            len(self.frames),
            0,
            self.round,
            self.client,
            self.examples,
            self.loss,
            self.view,
            self.base,
        )
        head += struct.pack(f"<{len(self.frames)}I", *map(len, self.frames))
        return b"".join([head, struct.pack("<I", zlib.crc32(head)), *self.frames])

    @classmethod
    def unpack(cls, payload: bytes) -> Message:
        """Read a payload from a stranger.

        Raises:
            DecodeError: anything is off; nothing is allocated from a number in the payload.
        """
        view = memoryview(payload)
        if len(view) < _HEADER.size + 4:
            raise codec.DecodeError(f"message: {len(view)} bytes, an envelope has at least {_HEADER.size + 4}")
        magic, kind, count, reserved, round_number, client, examples, loss, named, base = _HEADER.unpack_from(view)
        if magic != _MAGIC or reserved:
            raise codec.DecodeError(f"message: begins with {magic!r}, wanted {_MAGIC!r}: not an autoflip payload")
        if kind not in (TRAIN, EXPLORE, UPDATE, RESYNC):
            raise codec.DecodeError(f"message: unknown kind {kind}")
        if count > _MAX_FRAMES or len(view) < _HEADER.size + 4 * count + 4:
            raise codec.DecodeError(f"message: {count} frames do not fit; at most {_MAX_FRAMES}")
        end = _HEADER.size + 4 * count
        (crc,) = struct.unpack_from("<I", view, end)
        if zlib.crc32(view[:end]) != crc:
            raise codec.DecodeError("message: the envelope's checksum does not match: bytes were damaged on the way")
        lengths = struct.unpack_from(f"<{count}I", view, _HEADER.size)
        if end + 4 + sum(lengths) != len(view):
            raise codec.DecodeError(f"message: frames of {sum(lengths)} bytes announced, {len(view) - end - 4} came")
        if not math.isfinite(loss):
            raise codec.DecodeError(f"message: the training loss is {loss}")
        frames, at = [], end + 4
        for length in lengths:
            frames.append(bytes(view[at : at + length]))
            at += length
        return cls(kind, round_number, client, tuple(frames), named, base, examples, loss)
