"""The wire: named tensors to bytes and back, sparse, quantised, checked.

``encode``/``decode``/``accumulate`` carry a client's update, ``encode_patch``/``decode_patch`` the server's model
as a lossless difference, ``encode_masks``/``decode_masks`` a MaskSet. Bytes from outside are treated as hostile:
decoding raises :class:`DecodeError` and nothing else. The format is docs/wire_format.md.
"""

from autoflip.codec.delta import accumulate, decode, encode
from autoflip.codec.feedback import Feedback
from autoflip.codec.inspection import inspect
from autoflip.codec.masksets import decode_masks, encode_masks
from autoflip.codec.patch import decode_patch, encode_patch
from autoflip.codec.reader import DecodeError
from autoflip.codec.schema import Limits, Schema

__all__ = [
    "DecodeError",
    "Feedback",
    "Limits",
    "Schema",
    "accumulate",
    "decode",
    "decode_masks",
    "decode_patch",
    "encode",
    "encode_masks",
    "encode_patch",
    "inspect",
]
