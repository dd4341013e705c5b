"""A convolution with pruned weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from autoflip.nn.masked import Known, Masked, transformed
from autoflip.ops import (
    ConvPack,
    again,
    channels_last,
    conv_job,
    conv_step,
    conv_weight,
    few_channels,
    masked_conv2d,
    narrow_conv2d,
    traced,
    version_of,
)

_compiling, _threads = torch.compiler.is_compiling, torch.get_num_threads

__all__ = ["MaskedConv2d"]


def _any(weight: Tensor) -> bool:
    """Tell that a weight may be multiplied by as it is."""
    del weight
    return True


class MaskedConv2d(Masked, nn.Conv2d):
    """``torch.nn.Conv2d`` on ``weight * mask``; torch's own until a mask is set.

    Pruned weights do no work where the sparse kernel is the faster one: on a CPU, one group, zero padding, a stride
    that divides the map, 8 samples or more (fewer where the layer is small), the first 16 sizes of maps, float32 or
    what is narrower; see :func:`autoflip.ops.masked_conv2d`. Elsewhere the dense convolution runs, and time and FLOPs
    fall when whole channels go: :func:`autoflip.compact` removes them. Of fewer than 48 channels the kernel may be the
    faster one without a pruned weight too: a mask that keeps everything has it tried.

    Arguments, parameters and ``state_dict()`` are torch's. Pruned weights are zero, get exactly zero
    gradients, and so stay zero under SGD with momentum and weight decay and under Adam(W). Momentum gathered
    before the mask counts for nothing: ``forward`` ignores what it leaves, ``state_dict()`` sets it to zero.
    """

    def set_mask(self, mask: Tensor | None) -> None:
        """Keep the weights where ``mask`` (bool, shaped like ``weight``) is True, None = keep all.

        Raises:
            ValueError: ``mask`` is no bool tensor shaped like ``weight``.
        """
        self._set_masks({} if mask is None else {"weight": mask})

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        super()._set_masks(masks)
        self.__dict__.pop("_pack", None)
        self.__dict__.pop("_again", None)
        if (mask := self._mask_of("weight")) is not None:
            self._conv_pack(mask)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``input`` with the kept weights plus the bias."""
        if isinstance(input, Proxy):
            return self._as_a_node(input, input)
        mask = self._buffers.get("weight_mask")
        # past nn.Module.__getattr__, a microsecond a step; what is parametrized is no such parameter
        found = self._parameters.get("weight")
        weight: Any = self.weight if found is None else found
        bias = self._parameters["bias"] if "bias" in self._parameters else self.bias  # noqa: SIM401 (asks both)
        if mask is not None and self._stands_still(input, found, mask):
            return self._conv_forward(input, weight, bias)
        went = self.__dict__.get("_again")
        if (
            went is not None
            and not _compiling()
            and went.threads == _threads()
            and again(went, input, found, bias, mask)
            and input.is_contiguous()
        ):
            return conv_step(input, weight, bias, went.job)
        if _compiling():
            return self._conv_forward(input, weight if mask is None else conv_weight(weight, mask), bias)
        known = self.__dict__.get("_pack")  # asked first: the rest of the way costs a small layer a percent or two
        if known is None or mask is None or known[0] is not mask or known[1] != version_of(mask):
            if mask is not None and transformed(mask):
                return self._conv_forward(input, self._effective("weight"), bias)
            if mask is None or (self._mask_of("weight") is None and not few_channels(mask)):
                return self._conv_forward(input, weight, bias)
            pack = self._conv_pack(mask)
        else:
            pack = known[2]
        cast = torch.is_autocast_enabled("cpu")
        if pack is not None and (cast or weight.dtype is not torch.float32):
            y = narrow_conv2d(input, weight, bias, pack)
            if y is not None:
                return y
        if pack is None or cast or self._all_dense(pack, input, weight):
            whole = self._mask_of("weight") is None if pack is None else pack.whole
            # not a tensor that stands in for the layer's own for a while (functional_call)
            own = found if found is not None and self._owns("weight", found) else None
            if whole and own is not None and not cast and mask is not None and not mask.is_inference():
                # nothing to look for
                self.__dict__["_still"] = (own, mask, mask._version, input.shape, _any, own._cdata)
            if whole or (not traced() and self._stands(input, weight, mask, again=not cast)):
                return self._conv_forward(input, weight, bias)
            if channels_last(weight):  # torch's convolution keeps that layout
                return self._conv_forward(input, self._effective("weight"), bias)
            return self._conv_forward(input, conv_weight(weight, mask), bias)
        return masked_conv2d(input, weight, bias, pack) if found is None else self._step(input, found, bias, pack)

    def _step(self, input: Tensor, weight: Tensor, bias: Tensor | None, pack: ConvPack) -> Tensor:
        """Convolve by the kernels, and note what must not change for the next call to go straight to them."""
        job = conv_job(input, weight, bias, pack)
        if job is None:
            return masked_conv2d(input, weight, bias, pack)
        mask = self._buffers["weight_mask"]
        if job.plan is not None and mask is not None and not mask.is_inference() and self._owns("weight", weight):
            shapes = input.shape, weight.shape, None if bias is None else bias.shape
            self.__dict__["_again"] = Known(weight, bias, mask, mask._version, *shapes, _threads(), job)
        return conv_step(input, weight, bias, job)

    @staticmethod
    def _all_dense(pack: ConvPack, input: Tensor, weight: Tensor) -> bool:
        return input.dim() != 4 or input.dtype is not torch.float32 or pack.parts(input, weight) is None

    def _forget(self) -> None:
        super()._forget()
        self.__dict__.pop("_pack", None)
        self.__dict__.pop("_again", None)

    def _conv_pack(self, mask: Tensor) -> ConvPack | None:
        known = self.__dict__.get("_pack")
        if known is None or known[0] is not mask or known[1] != version_of(mask):
            self._unhook_other(mask)
            known = self.__dict__["_pack"] = (mask, version_of(mask), self._make_pack(mask))
        found: ConvPack | None = known[2]
        return found

    def _make_pack(self, mask: Tensor) -> ConvPack | None:
        """Return what the sparse kernels take of a mask, None where there are none for this layer."""
        if not mask.is_cpu or self.groups != 1 or self.stride[0] != self.stride[1] or self.padding_mode != "zeros":
            return None
        span = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        padding = self.padding
        if isinstance(padding, str):
            if padding == "same" and any(s % 2 for s in span):
                return None  # one side gets more than the other
            padding = (span[0] // 2, span[1] // 2) if padding == "same" else (0, 0)
        dilation = self.dilation[0], self.dilation[1]
        return ConvPack(mask, (padding[0], padding[1]), dilation, stride=self.stride[0])
