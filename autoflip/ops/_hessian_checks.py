"""What the ops of hessian.py ask of their tensors before they hand addresses on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autoflip.ops.look import all_rows

Factors = Tensor | Sequence[Tensor]  # iterating gives one tensor a factor


def factors(op: str, d: Factors, *, contiguous: bool = True) -> list[Tensor]:
    found = [one.detach().contiguous() if contiguous else one.detach() for one in d]
    if not found or any(one.shape != found[0].shape or one.dtype != found[0].dtype for one in found):
        got = ", ".join(f"{one.dtype} {tuple(one.shape)}" for one in found[:4])
        raise ValueError(f"{op}: d holds {len(found)} factors ({got}); wanted one or more of one shape and dtype")
    return found


def rows(op: str, samples: Tensor, d: Tensor, name: str, there: Tensor) -> None:
    if samples.shape != d.shape[:1] or samples.dtype != torch.int64 or samples.device != d.device:
        raise ValueError(
            f"{op}: samples is {samples.dtype} {tuple(samples.shape)} on {samples.device}; wanted torch.int64 "
            f"({d.shape[0]},) on {d.device}: a row of {name} for each row of d"
        )
    # a GPU's answer would have to be waited for; torch's own indexing finds them there
    asked = samples.device.type == "cpu" and not torch.compiler.is_compiling()
    if asked and not all_rows(samples, len(there)):
        low, high = (int(v) for v in samples.aminmax())
        raise ValueError(f"{op}: samples holds rows {low} to {high} of {name}, which has {len(there)}")


def positions(op: str, at: Tensor, d: Tensor, positions: int) -> None:
    if at.shape != d.shape or at.dtype != torch.int64 or at.device != d.device:
        raise ValueError(
            f"{op}: at is {at.dtype} {tuple(at.shape)} on {at.device}; wanted torch.int64 {tuple(d.shape)} on "
            f"{d.device}, the position of each of d's values"
        )
    # on a GPU the answer would have to be waited for; there the kernel leaves out what is out of range
    if at.device.type == "cpu" and not torch.compiler.is_compiling() and at.numel():
        low, high = (int(v) for v in at.aminmax())
        if low < 0 or high >= positions:
            raise ValueError(f"{op}: at holds positions {low} to {high}; the output has {positions}")


def pair(
    op: str, left: str, a: Tensor, a_dims: int, right: str, b: Tensor, b_dims: int, *, rounded: bool = False
) -> None:
    if a.dim() != a_dims or b.dim() != b_dims:
        raise ValueError(
            f"{op}: {left} has shape {tuple(a.shape)} and {right} has {tuple(b.shape)}; "
            f"wanted {a_dims} and {b_dims} dimensions"
        )
    alike = a.dtype == b.dtype or (rounded and (a.dtype, b.dtype) == (torch.bfloat16, torch.float32))
    if not alike or a.device != b.device or not a.is_floating_point():
        raise ValueError(
            f"{op}: {left} is {a.dtype} on {a.device} and {right} is {b.dtype} on {b.device}; "
            "both need one floating dtype and one device"
        )
