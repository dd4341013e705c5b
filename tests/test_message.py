"""The envelope: round trip, and every damaged byte refused."""

import pytest

from autoflip import codec
from autoflip.fed.message import EXPLORE, TRAIN, UPDATE, Message


def test_round_trip():
    message = Message(UPDATE, 7, 3, (b"abc", b""), b"v" * 16, b"b" * 16, examples=90, loss=0.5)
    assert Message.unpack(message.pack()) == message
    assert Message.unpack(Message(TRAIN, 0, 0).pack()) == Message(TRAIN, 0, 0)


def test_every_damaged_byte_of_the_envelope_is_refused():
    payload = Message(EXPLORE, 1, 2, (b"frame",), examples=1, loss=1.0).pack()
    envelope = len(payload) - len(b"frame")
    for position in range(envelope):
        for bit in range(8):
            bad = bytearray(payload)
            bad[position] ^= 1 << bit
            with pytest.raises(codec.DecodeError):
                Message.unpack(bytes(bad))


def test_every_truncation_and_any_tail_is_refused():
    payload = Message(UPDATE, 1, 2, (b"frame", b"x" * 40)).pack()
    for length in range(len(payload)):
        with pytest.raises(codec.DecodeError):
            Message.unpack(payload[:length])
    with pytest.raises(codec.DecodeError, match="announced"):
        Message.unpack(payload + b"!")


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(codec.DecodeError, match="loss is nan"):
        Message.unpack(Message(UPDATE, 1, 2, loss=float("nan")).pack())
