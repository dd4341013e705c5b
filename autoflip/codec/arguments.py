"""Mistakes of the caller: plain ValueErrors. What is wrong with the bytes is a DecodeError and not said here."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor

from autoflip.codec.schema import Limits, Schema
from autoflip.masks import MaskSet

__all__ = [
    "check_base_id",
    "check_masks",
    "check_out",
    "check_reader",
    "check_schema",
    "check_sums",
    "check_tensors",
    "whole",
]


def whole(what: str, name: str, value: object) -> int:
    """Return ``value`` as an int; raise ValueError unless it is a whole number."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{what}: {name}={value!r}, wanted a whole number") from None


def check_tensors(what: str, tensors: object) -> None:
    """Raise ValueError unless ``tensors`` maps names to dense tensors that hold data."""
    if not isinstance(tensors, Mapping):
        hint = "; pass model.state_dict()" if isinstance(tensors, torch.nn.Module) else ""
        raise ValueError(f"{what}: got a {type(tensors).__name__}, wanted a dict: name -> torch.Tensor{hint}")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"{what}: the name {name!r} is a {type(name).__name__}, wanted a str")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{what}: {name!r} is a {type(tensor).__name__}, wanted a torch.Tensor")
        if tensor.is_meta:
            raise ValueError(f"{what}: {name!r} is on the meta device and holds no data; load the weights first")
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else str(tensor.layout)
            raise ValueError(f"{what}: {name!r} is {kind}, wanted a dense tensor; write tensor.to_dense()")
        if tensor.is_neg():
            raise ValueError(
                f"{what}: {name!r} is a view that negates, wanted plain memory; write tensor.resolve_neg()"
            )


def check_sums(sums: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless ``sums`` maps names to memory that can be added to."""
    check_tensors("accumulate: sums", sums)
    for name, total in sums.items():
        if total.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"accumulate: sums[{name!r}] is {total.dtype}, wanted torch.float32 or torch.float64")
        if total.requires_grad or any(step == 0 and size > 1 for step, size in zip(total.stride(), total.shape)):
            raise ValueError(
                f"accumulate: sums[{name!r}] requires grad or is expanded, wanted plain memory; pass .detach().clone()"
            )


def check_masks(what: str, masks: object, name: str = "masks") -> None:
    """Raise ValueError unless ``masks`` is a MaskSet or None."""
    if masks is not None and not isinstance(masks, MaskSet):
        raise ValueError(f"{what}: {name} is a {type(masks).__name__}, wanted a MaskSet; write MaskSet({name})")


def check_schema(what: str, schema: object) -> None:
    """Raise ValueError unless ``schema`` is a Schema or None."""
    if schema is not None and not isinstance(schema, Schema):
        raise ValueError(
            f"{what}: schema is a {type(schema).__name__}, wanted a Schema; write codec.Schema.of(tensors)"
        )


def check_base_id(what: str, base_id: object) -> None:
    """Raise ValueError unless ``base_id`` is 16 bytes, or none."""
    if not isinstance(base_id, (bytes, bytearray, memoryview)):
        hint = "; write bytes.fromhex(base_id)" if isinstance(base_id, str) else ""
        raise ValueError(f"{what}: base_id is a {type(base_id).__name__}, wanted 16 bytes{hint}")
    if len(bytes(base_id)) not in (0, 16):
        raise ValueError(
            f"{what}: base_id has {len(bytes(base_id))} bytes, wanted 16 (a truncated hash of the base) or none"
        )


def check_reader(
    what: str, *, masks: object = None, schema: object = None, limits: object, base_id: object = None
) -> None:
    """Raise ValueError for what a reader passes besides the bytes."""
    check_masks(what, masks)
    check_schema(what, schema)
    if not isinstance(limits, Limits):
        raise ValueError(f"{what}: limits is a {type(limits).__name__}, wanted codec.Limits(...)")
    if base_id is not None:
        check_base_id(what, base_id)


def check_out(what: str, out: object) -> None:
    """Raise ValueError unless ``out`` is None or maps names to tensors that a decoder can write into."""
    if out is None:
        return
    check_tensors(f"{what}: out", out)
    assert isinstance(out, Mapping)
    for name, tensor in out.items():
        if tensor.dtype is not torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(
                f"{what}: out[{name!r}] is {tensor.dtype} on {tensor.device}, wanted contiguous float32 on the CPU; "
                "leave integer tensors out of it"
            )
