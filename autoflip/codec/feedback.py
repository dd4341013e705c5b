"""Error feedback: what rounding and top-k left out of one update is added to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autoflip.codec import arguments, layout
from autoflip.codec.delta import decode, encode
from autoflip.masks import MaskSet

__all__ = ["Feedback"]


class Feedback:
    """Encodes one client's updates with memory: ``r += delta; send C(r); r -= C(r)``.

    ``C`` rounds to the nearest and, if asked, keeps the largest entries only: a contraction, which is what error
    feedback needs. It is the other way to int8, int4 and top-k, not an addition to stochastic rounding: together
    they lose accuracy (the residual of a map that is unbiased but no contraction grows).

    Args:
        residual: name -> float32 tensor left over from an earlier run; None = nothing.

    Attributes:
        residual: what has not been sent yet, name -> float32; keep it with the client's state.

    Source: Seide et al., "1-Bit SGD", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019.

    Example:
        >>> feedback = Feedback()
        >>> blob = feedback.encode({"w": torch.tensor([[0.4, 1.0]])}, values="int4")
        >>> bool(feedback.residual["w"].abs().max() <= 0.5 / 7)
        True
    """

    def __init__(self, residual: Mapping[str, Tensor] | None = None) -> None:
        if residual is not None:
            arguments.check_tensors("Feedback: residual", residual)
        self.residual: dict[str, Tensor] = {n: t.detach().to(torch.float32) for n, t in (residual or {}).items()}

    def encode(
        self,
        delta: Mapping[str, Tensor],
        *,
        masks: MaskSet | None = None,
        values: str = "int4",
        top: float = 1.0,
        **options: Any,
    ) -> bytes:
        """Code ``delta`` plus what is left over, and remember what this frame leaves out.

        Args:
            delta: as in :func:`encode`. Integer tensors travel whole and leave nothing over. What is left over of
                names that it lacks waits for an update that has them.
            masks: as in :func:`encode`; entries outside it are dropped from the residual too.
            values: as in :func:`encode`.
            top: share, above 0 to 1, of the entries (of ``masks`` where it covers them) of tensors with two or more
                dimensions that travel: those of largest magnitude, one cut through all of them, the first ones of
                equal ones. The rest waits.
            options: ``schema``, ``seed``, ``entropy``, ... of :func:`encode`; not ``rounding``.

        Returns:
            The frame.

        Raises:
            ValueError: as :func:`encode`; ``top`` is out of range; a tensor has another shape than its residual; or
                ``rounding`` is given. The residual is then what it was.
        """
        if "rounding" in options:
            raise ValueError("Feedback.encode: rounding is given; error feedback rounds to the nearest, leave it out")
        if not 0 < top <= 1:
            raise ValueError(f"Feedback.encode: top={top}, wanted a share above 0, at most 1")
        arguments.check_tensors("Feedback.encode", delta)
        layout.check_masks(masks, delta, "Feedback.encode")
        carried = {name: self._carried(name, tensor) for name, tensor in delta.items()}
        inside = {n: t * masks[n] if masks is not None and n in masks else t for n, t in carried.items()}
        blob = encode(_largest(inside, masks, top), masks=masks, values=values, rounding="nearest", **options)
        sent = decode(blob, masks=masks, schema=options.get("schema"))
        waiting = {n: t for n, t in self.residual.items() if n not in inside}
        self.residual = waiting | {n: t - sent[n] for n, t in inside.items() if t.is_floating_point()}
        return blob

    def _carried(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        left = self.residual.get(name)
        now = tensor.detach().to("cpu", torch.float32)
        if left is None:
            return now
        if left.shape != now.shape:
            raise ValueError(
                f"Feedback.encode: {name!r} has shape {tuple(now.shape)} but its residual {tuple(left.shape)}; "
                "after a change of model start a new Feedback()"
            )
        return now + left


def _largest(tensors: Mapping[str, Tensor], masks: MaskSet | None, top: float) -> dict[str, Tensor]:
    """Zero all but the largest entries, the first ones of equal ones; at least one entry is kept."""
    chosen = {n: t.abs() for n, t in tensors.items() if t.is_floating_point() and t.dim() > 1 and t.numel()}
    if top == 1 or not chosen:
        return dict(tensors)
    magnitudes = torch.cat([t.flatten() for t in chosen.values()])
    held = sum(int(masks[n].sum()) if masks is not None and n in masks else t.numel() for n, t in chosen.items())
    keep = max(1, round(top * held))
    cut = magnitudes.kthvalue(len(magnitudes) - keep + 1).values
    kept = ~(magnitudes < cut)  # NaN stays, for encode() to name
    if spare := int(kept.count_nonzero()) - keep:
        kept[(magnitudes == cut).nonzero().flatten()[-spare:]] = False
    parts = dict(zip(chosen, kept.split([t.numel() for t in chosen.values()]), strict=True))
    return {n: torch.where(parts[n].view(t.shape), t, torch.zeros(())) if n in parts else t for n, t in tensors.items()}
