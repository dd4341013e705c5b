"""What travels in Flower's records, and what a client keeps between two messages.

A message holds one ConfigRecord of name ``autoflip`` in the place of the ArrayRecord: ``payload`` is an envelope of
:mod:`autoflip.fed.message`, and to a client that holds nothing come the terms (:class:`Terms`), once. Bytes and not
an ArrayRecord: that one holds neither bfloat16 nor masked tensors, and costs about 440 bytes a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from torch import Tensor

from autoflip import codec
from autoflip.fed.coordinates import Coordinates
from autoflip.fed.state import View, make_view
from autoflip.masks import MaskSet

__all__ = ["RECORD", "Memory", "Terms", "count"]

RECORD = "autoflip"


def count(record: Mapping[str, Any]) -> int:
    """Return the bytes of a record: keys and values, a number as 8."""
    values = [(v if isinstance(v, list) else [v]) for v in record.values()]
    inside = sum(len(v) if isinstance(v, (bytes, str)) else 8 for many in values for v in many)
    return inside + sum(len(key) for key in record)


@dataclass(frozen=True)
class Terms:
    """What both ends must agree on before a difference means anything; sent to a client that holds nothing.

    Attributes:
        schema: of all arrays, in their order.
        integers: integer arrays, such as BatchNorm's counters; handed down as they were in the beginning.
        dtypes: of the floating arrays, in their order, as numpy calls them.
        arrays: name of the ArrayRecord that the app gets and returns.
        weight: name of the metric that counts the examples.
        values: uplink, see codec.encode.
        levels: uplink, the same; 0: all.
        downlink: see fed.downlink.
        seed: of the stochastic rounding.
        feedback: round to the nearest and add what is lost to the next update.
    """

    schema: codec.Schema
    integers: Mapping[str, Tensor]
    dtypes: tuple[str, ...]
    arrays: str
    weight: str
    values: str
    levels: int
    downlink: str
    seed: int
    feedback: bool

    @property
    def floats(self) -> codec.Schema:
        """The schema of what travels: floating arrays."""
        return codec.Schema(tuple(entry for entry in self.schema.entries if not entry.kind))

    def locate(self, masks: MaskSet | None) -> Coordinates:
        """Return the full coordinates, whatever the masks: an app's model keeps its shape."""
        return Coordinates(self.floats, masks)

    def arrays_of(self, params: Mapping[str, Tensor]) -> ArrayRecord:
        """Return the record that an app knows: every array by name, in order, of its type."""
        kinds = dict(zip(self.floats.shapes, self.dtypes, strict=True))
        cast = {name: params[name].to(getattr(torch, kind)) for name, kind in kinds.items()}
        return ArrayRecord({name: cast.get(name, self.integers.get(name)) for name in self.schema.shapes})

    def write(self) -> dict[str, Any]:
        """Return the fields of a ConfigRecord."""
        fields = {
            "schema": self.schema.to_bytes(),
            "dtypes": list(self.dtypes),
            "arrays": self.arrays,
            "weight": self.weight,
            "values": self.values,
            "levels": self.levels,
            "downlink": self.downlink,
            "seed": self.seed,
            "feedback": self.feedback,
        }
        return {**fields, "integers": codec.encode(self.integers)} if self.integers else fields

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Terms:
        """Read what :meth:`write` returned.

        Raises:
            DecodeError: a field is missing or damaged.
        """
        try:
            integers = codec.decode(record["integers"]) if "integers" in record else {}
            schema = codec.Schema.parse(record["schema"], codec.Limits())
            names = ("arrays", "weight", "values", "levels", "downlink", "seed", "feedback")
            return cls(schema, integers, tuple(record["dtypes"]), **{name: record[name] for name in names})
        except (KeyError, TypeError) as error:
            raise codec.DecodeError(f"the server's terms are damaged: {type(error).__name__} {error}") from error


@dataclass(frozen=True)
class Memory:
    """What a client keeps in ``Context.state``: every message finds a new process.

    Attributes:
        terms: as agreed.
        view: the model as it was received last.
        residual: what error feedback has not sent yet.
    """

    terms: Terms
    view: View
    residual: Mapping[str, Tensor] | None = None

    def save(self, context: Context) -> None:
        """Write it into the context's state."""
        kept: dict[str, Any] = {"masks": self.view.masks, "schema": self.terms.floats, "entropy": "none"}
        exact = self.terms.downlink == "fp32"
        code = (lambda p, **o: codec.encode(p, values="fp32", **o)) if exact else codec.encode_patch
        fields = {**self.terms.write(), "params": code(self.view.params, **kept)}
        if self.view.masks is not None:
            fields["masks"] = codec.encode_masks(self.view.masks, schema=self.terms.floats)
        if self.residual:
            fields["residual"] = codec.encode(self.residual, values="fp32", schema=self.terms.floats, entropy="none")
        context.state[RECORD] = ConfigRecord(fields)

    @classmethod
    def load(cls, context: Context) -> Memory | None:
        """Read it back; None: there is none, or it is damaged."""
        record = context.state.config_records.get(RECORD)
        if record is None:
            return None
        try:
            terms = Terms.read(record)
            schema = terms.floats
            masks = codec.decode_masks(record["masks"], schema=schema) if "masks" in record else None
            exact = terms.downlink == "fp32"
            decode = codec.decode if exact else codec.decode_patch
            params = decode(record["params"], masks=masks, schema=schema)
            view = make_view(params, masks, torch.float32 if exact else torch.bfloat16, masks)
            residual = codec.decode(record["residual"], schema=schema) if "residual" in record else None
        except (codec.DecodeError, KeyError, TypeError):
            return None
        return cls(terms, view, residual)
