"""From parameters and masks to a model that trains: compacted, sparsified, its FLOPs counted, built once a mask."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.conv import _ConvNd

from autoflip import codec, meter, ops
from autoflip.fed.coordinates import Coordinates
from autoflip.groups import find_groups
from autoflip.masks import MaskSet
from autoflip.nn import MaskedConv2d, compact, sparsify
from autoflip.nn.plan import Plan
from autoflip.ops import backend

__all__ = ["Prepared", "Workshop"]


@dataclass
class Prepared:
    """A model that serves one mask.

    Attributes:
        model: dead channels gone, what is left masked inside.
        at: its coordinates, and how they map to those of the full model.
        seconds: wall seconds it took to build.
        cpu_seconds: processor seconds of the same.
    """

    model: nn.Module
    at: Coordinates
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    _flops: dict[tuple, int] = field(default_factory=dict)
    _fixed: dict[str, Tensor] = field(default_factory=dict)  # buffers that do not travel, as they were at the start

    def __post_init__(self) -> None:
        # integers of the state_dict and floats that are not in it: masks are neither
        state, buffers = self.model.state_dict(), self.model.named_buffers()
        self._fixed = {n: b.detach().clone() for n, b in buffers if (n in state) != b.is_floating_point()}

    def load(self, params: Mapping[str, Tensor]) -> None:
        """Copy full-size ``params`` in."""
        self.put(self.at.shrink(params))

    def put(self, small: Mapping[str, Tensor]) -> None:
        """Copy ``small`` in, which has this model's shapes."""
        with torch.no_grad():
            for name, tensor in self.model.state_dict(keep_vars=True).items():
                if name in small:
                    tensor.copy_(small[name])
            buffers = dict(self.model.named_buffers()) if self._fixed else {}
            for name, value in self._fixed.items():  # num_batches_tracked: no client sees another's count
                buffers[name].copy_(value)

    def read(self) -> dict[str, Tensor]:
        """Return parameters and floating buffers, small, row-major; not copied where they lie so already."""
        return {name: tensor.contiguous() for name, tensor in _floating(self.model).items()}

    def step_flops(self, x: Tensor, y: Tensor) -> int:
        """Return the FLOPs of a training step on a batch of this shape, counted once on a copy."""
        key = (x.shape, x.dtype)
        if key not in self._flops:
            twin = copy.deepcopy(self.model).train()
            for parameter in twin.parameters():
                parameter.grad = None
            with torch.random.fork_rng(devices=[]):
                self._flops[key] = meter.count_flops(lambda: F.cross_entropy(twin(x), y).backward())
        return self._flops[key]

    def flops_of(self, x: Tensor) -> int | None:
        """Return what :meth:`step_flops` has counted for such a batch; None: nothing yet."""
        return self._flops.get((x.shape, x.dtype))


def _floating(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def _channels_last(model: nn.Module) -> nn.Module:
    """Let 2-d convolutions run channels-last: 0.75 of a TwoCNN step's time with AVX-512, 0.5 to 0.65 of a test's.

    Models with pruned weights in a convolution stay row-major: where the sparse kernels do not gain, the dense path of
    a masked layer is faster there. So do those that oneDNN would corrupt memory for, and those with GroupNorm, which
    takes two to three times as long channels-last, where most convolutions may run by our kernels, which take as long
    either way: 0.70 to 0.76 of a step of ResNet-8 with 4 to 32 channels (Xeon, AVX-512).
    """
    convs = [m for m in model.modules() if isinstance(m, _ConvNd)]
    if any(isinstance(m, nn.GroupNorm) for m in model.modules()):
        ours = sum(isinstance(m, MaskedConv2d) for m in convs)
        if 2 * ours > len(convs) and backend.serve("masked_matmul", torch.device("cpu")) == "cpp":
            return model
    plain = all(type(m) is nn.Conv2d or (isinstance(m, MaskedConv2d) and m.density == 1) for m in convs)
    if convs and plain and not any(map(_corrupts, convs)):
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch does not list it
    return model


def _corrupts(conv: nn.Module) -> bool:
    """Return whether torch 2.13 writes past a buffer in this convolution's gradient, channels last.

    oneDNN's, 1x1 with a stride and fewer input channels than a vector has lanes: seen with 3 to 6 of them under AVX2,
    not with 8 and more; under AVX-512 with 3 to 15 on maps of 56 to 128 pixels, not with 16 and more up to 224.
    """
    assert isinstance(conv, _ConvNd)
    strided = all(size == 1 for size in conv.kernel_size) and any(step > 1 for step in conv.stride)
    return strided and conv.in_channels < (16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8)


def _narrow(model: nn.Module) -> dict[str, Tensor]:
    """Return masks that keep everything for the convolutions that the masked layer may run faster all the same."""
    found = {f"{n}.weight": m.weight for n, m in model.named_modules() if type(m) is nn.Conv2d and m.groups == 1}
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in found.items() if ops.few_channels(w)}


class Workshop:
    """Builds models for masks and keeps the last few.

    Args:
        full: the dense model; copied, never changed.
    """

    def __init__(self, full: nn.Module) -> None:
        self.full = copy.deepcopy(full)
        self.schema = codec.Schema.of(_floating(self.full))
        self._groups = find_groups(full)
        self._kept: OrderedDict[str, Prepared] = OrderedDict()

    def prepare(self, masks: MaskSet | None) -> Prepared:
        """Return the model that serves ``masks``; its parameters are whatever was loaded last."""
        key = masks.fingerprint() if masks is not None else ""
        if key not in self._kept:
            start, cpu = time.perf_counter(), time.process_time()
            if masks is None:
                prepared = Prepared(_channels_last(copy.deepcopy(self.full)), Coordinates(self.schema))
            else:
                small = compact(self.full, masks=masks, groups=self._groups)
                plan = small.plan
                assert isinstance(plan, Plan)
                inside = {name: mask for name, mask in plan.shrink_masks(masks).items() if not bool(mask.all())}
                some = _narrow(small) | inside  # another layer that keeps all stays a plain one
                model = sparsify(small, some) if some else small
                schema = codec.Schema.of(_floating(model))
                at = Coordinates(schema, MaskSet(inside) if inside else None, plan)
                prepared = Prepared(_channels_last(model), at)
            prepared.seconds, prepared.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
            self._kept[key] = prepared
        self._kept.move_to_end(key)
        while len(self._kept) > 4:
            self._kept.popitem(last=False)
        return self._kept[key]

    def locate(self, masks: MaskSet | None) -> Coordinates:
        """Return where the numbers of the model that serves ``masks`` live."""
        return self.prepare(masks).at

    def evaluate(
        self, params: Mapping[str, Tensor], masks: MaskSet | None, x: Tensor, y: Tensor
    ) -> tuple[float, float]:
        """Return (accuracy, mean cross-entropy) of ``params`` on a test set."""
        prepared = self.prepare(masks)
        prepared.load(params)
        model = prepared.model.eval()
        right, loss = 0, 0.0
        with torch.no_grad():
            for inputs, targets in zip(x.split(512), y.split(512)):
                output = model(inputs)
                right += int((output.argmax(1) == targets).sum())
                loss += float(F.cross_entropy(output, targets, reduction="sum"))
        return right / len(y), loss / len(y)
