"""A linear layer whose pruned weights do no work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from autoflip.nn.masked import Known, Masked, transformed
from autoflip.ops import Pack, again, linear_job, linear_step, masked_linear, narrow_linear, traced, version_of

_compiling, _threads = torch.compiler.is_compiling, torch.get_num_threads


__all__ = ["MaskedLinear", "MaskedSelectingLinear", "SelectingLinear", "select"]


class MaskedLinear(Masked, nn.Linear):
    """``y = x @ (weight * mask).T + bias``; ``torch.nn.Linear`` until a mask is set.

    Arguments, parameters and ``state_dict()`` are torch's. Pruned weights are zero, get exactly zero
    gradients, and so stay zero under SGD with momentum and weight decay and under Adam(W). Momentum gathered
    before the mask counts for nothing: ``forward`` ignores what it leaves, ``state_dict()`` sets it to zero.

    Shapes: ``(..., in_features)`` -> ``(..., out_features)``.
    Cost: see :func:`autoflip.ops.masked_linear`, which chooses between the sparse kernel and the dense product.

    Example:
        >>> layer = MaskedLinear(4, 2)
        >>> layer.set_mask(torch.tensor([[True, False, True, False], [False, True, False, True]]))
        >>> layer.density
        0.5
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, bias, **kwargs)

    def set_mask(self, mask: Tensor | None) -> None:
        """Keep the weights where ``mask`` (``(out_features, in_features)``, bool) is True, None = keep all.

        Raises:
            ValueError: ``mask`` is no bool tensor shaped like ``weight``.
        """
        self._set_masks({} if mask is None else {"weight": mask})

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        super()._set_masks(masks)
        self._repack()

    def _forget(self) -> None:
        super()._forget()
        self.__dict__.pop("_pack", None)
        self.__dict__.pop("_packed_version", None)
        self.__dict__.pop("_again", None)

    def _repack(self) -> None:
        self.__dict__.pop("_again", None)
        mask = self._buffers.get("weight_mask")
        self._unhook_other(mask)
        self._pack = None if mask is None else Pack(mask)
        self._packed_version = 0 if mask is None else version_of(mask)

    @property
    def density(self) -> float:
        """Kept share of the weight, 0 to 1."""
        pack = self.__dict__.get("_pack")
        return super().density if pack is None else pack.density

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ (weight * mask).T + bias``."""
        if isinstance(input, Proxy):
            return self._as_a_node(input, input)
        mask = self._buffers.get("weight_mask")
        # past nn.Module.__getattr__, a microsecond a step; what is parametrized is no such parameter
        found = self._parameters.get("weight")
        weight: Any = self.weight if found is None else found
        bias = self._parameters["bias"] if "bias" in self._parameters else self.bias  # noqa: SIM401 (asks both)
        if mask is None or self._stands_still(input, found, mask):
            return F.linear(input, weight, bias)
        known = self.__dict__.get("_again")
        if (
            known is not None
            and not _compiling()
            and known.threads == _threads()
            and again(known, input, found, bias, mask)
        ):
            return linear_step(input, weight, bias, known.job)
        if input.is_nested or input.layout is not torch.strided:  # bags of words, sets of rows: torch's product serves
            return F.linear(input, self._effective("weight"), bias)
        pack = self._pack
        if not torch.compiler.is_compiling():
            if pack is None or pack.mask is not mask or self._packed_version != version_of(mask):
                if transformed(mask):
                    return F.linear(input, self._effective("weight"), bias)
                self._repack()  # the module moved to another device, or someone wrote into the buffer
                pack = self._pack
            assert pack is not None
            if pack.density < 1 and not traced():
                if weight.dtype is not torch.float32 or torch.is_autocast_enabled(weight.device.type):
                    y = narrow_linear(input, weight, bias, pack)
                    if y is not None:
                        return y
                    if self._stands(input, weight, mask, again=weight.dtype is not torch.float32):
                        return F.linear(input, weight, bias)
                elif pack.all_dense(input.shape[:-1].numel()):
                    if self._stands(input, weight, mask):
                        return F.linear(input, weight, bias)
                elif found is not None:
                    return self._step(input, found, bias, pack)
        assert pack is not None
        if pack.density == 1:
            return F.linear(input, weight, bias)
        return masked_linear(input, weight, bias, pack)

    def _step(self, input: Tensor, weight: Tensor, bias: Tensor | None, pack: Pack) -> Tensor:
        """Multiply by the kernels, and note what must not change for the next call to go straight to them."""
        job = linear_job(input, weight, bias, pack)
        if job is None:
            return masked_linear(input, weight, bias, pack)
        mask = pack.mask
        if not mask.is_inference() and self._owns("weight", weight):
            shapes = input.shape, weight.shape, None if bias is None else bias.shape
            self.__dict__["_again"] = Known(weight, bias, mask, mask._version, *shapes, _threads(), job)
        return linear_step(input, weight, bias, job)


class _Selecting(nn.Module):
    """Picks the columns that a linear layer still reads; comes first among a layer's bases."""

    inputs: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Return what the layer makes of ``input[..., inputs]``."""
        if isinstance(input, Proxy) and isinstance(self, Masked):
            return self._as_a_node(input, input)
        return super().forward(input.index_select(-1, self.inputs))  # type: ignore[misc]


class SelectingLinear(_Selecting, nn.Linear):
    """``y = x[..., inputs] @ weight.T + bias``: what :func:`autoflip.compact` makes of a Linear that lost inputs.

    ``weight`` is ``(out_features, len(inputs))``; the buffer ``inputs`` (int64, ascending) is in no ``state_dict()``.
    """


class MaskedSelectingLinear(_Selecting, MaskedLinear):
    """:class:`SelectingLinear` with a mask over the columns that are left."""


def select(layer: nn.Linear, kept: Tensor) -> None:
    """Let ``layer``, whose weight has lost its other columns, read ``kept`` (indices, int64) of its inputs only."""
    if isinstance(layer, _Selecting):
        layer.inputs = layer.inputs[kept.to(layer.inputs.device)]
        return
    layer.__class__ = SelectingLinear
    # persistent=False: the keys of state_dict() stay torch's
    layer.register_buffer("inputs", kept.to(layer.weight.device), persistent=False)
