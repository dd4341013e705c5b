"""What every masked layer shares: masks as non-persistent buffers, pruned entries that stay zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from autoflip.ops import channels_last, gradient_hook, looker, masked_weight, traced, version_of, zero_pruned

_compiling = torch.compiler.is_compiling

__all__ = ["Hook", "Known", "Masked", "rows", "transformed"]


def transformed(mask: Tensor) -> bool:
    """Tell whether ``mask`` came through a function transform.

    Then it may stand for many models' masks (``torch.func.stack_module_state`` under ``vmap``): none to pack by.
    """
    return not _compiling() and bool(torch._C._functorch.is_functorch_wrapped_tensor(mask))


class Hook:
    """A hook on a parameter that is still there after ``torch.utils.swap_tensors``, which takes hooks away.

    Args:
        parameter: the tensor.
        hook: what masks its gradient.
    """

    def __init__(self, parameter: Tensor, hook: Any) -> None:
        self.parameter, self.inside = parameter, parameter._cdata
        self.handle = parameter.register_hook(hook)

    def holds(self, parameter: Tensor) -> bool:
        """Tell whether ``parameter`` has the hook; one whose inside was swapped gets its hooks back, all but this."""
        if self.parameter is not parameter:
            return False
        if self.inside == parameter._cdata:
            return True
        parameter._backward_hooks = parameter._backward_hooks  # torch hangs them on what is inside now
        return False

    def remove(self) -> None:
        """Take the hook away."""
        self.handle.remove()


def _laid_out(parameter: Tensor, mask: Tensor) -> Tensor:
    """Return a copy of ``mask`` laid out like ``parameter``: the kernels walk both entry by entry."""
    if channels_last(parameter):
        return torch.empty_like(parameter, dtype=torch.bool).copy_(mask)
    return mask.to(parameter.device, copy=True).contiguous()


def rows(parameter: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as they lie in memory where they agree, so that the kernels can walk them."""
    if channels_last(parameter) and channels_last(mask):
        return parameter.permute(0, 2, 3, 1), mask.permute(0, 2, 3, 1)
    return parameter, mask


class Known(NamedTuple):
    """What a layer's last sparse step went by; ``ops.again`` compares the first seven, in this order."""

    weight: Tensor
    bias: Tensor | None
    mask: Tensor
    version: int
    input_shape: torch.Size
    weight_shape: torch.Size
    bias_shape: torch.Size | None
    threads: int
    job: Any


class Masked(nn.Module):
    """A torch layer some of whose parameters have masks; comes first among a layer's bases.

    The mask of parameter ``weight`` is the non-persistent buffer ``weight_mask``; a parameter without one is
    kept whole. ``state_dict()`` has torch's keys and shows pruned entries as zeros, and loading sets them to zero.
    What an optimizer from before the mask (momentum) or a write into the parameter leaves at a pruned entry counts
    for nothing in ``forward``, and ``state_dict()`` sets it to zero. A loss that reads the parameter itself (a penalty)
    gives pruned entries a gradient of their own, unless the layer multiplies densely, where a hook masks what comes.
    """

    def __getstate__(self) -> dict[str, Any]:
        # a copy of this layer alone must not carry the whole model; in a copy of the model its keeper's copy joins
        inherited = getattr(super(), "__getstate__", None)  # Python 3.10's object has none
        state = self.__dict__ if inherited is None else inherited()
        # handles of hooks and functions of the extension are of this layer alone
        return {key: value for key, value in state.items() if key not in ("_keeper", "_hooked", "_still", "_again")}

    def masks(self) -> dict[str, Tensor]:
        """Return parameter name -> mask, for the parameters that have one."""
        return {n[: -len("_mask")]: b for n, b in self._buffers.items() if n.endswith("_mask") and b is not None}

    @property
    def density(self) -> float:
        """Kept share of the masked parameters, 0 to 1 (1 when none has a mask)."""
        masks = self.masks().values()
        total = sum(m.numel() for m in masks)
        return sum(int(m.sum()) for m in masks) / total if total else 1.0

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Add a buffer, as torch does; but none in place of a mask, where ``torch.nn.utils.prune`` would keep its own.

        Raises:
            ValueError: ``name`` is that of one of this layer's masks.
        """
        if persistent and name.endswith("_mask") and name[: -len("_mask")] in self._maskable():
            raise ValueError(
                f"{type(self).__name__}: {name!r} is where this layer has its own mask, and a mask of "
                "torch.nn.utils.prune would take its place. Prune with set_mask(layer.weight != 0) and the like; or "
                "use torch.nn.utils.prune, then prune.remove, before autoflip.sparsify"
            )
        super().register_buffer(name, tensor, persistent)

    def _maskable(self) -> tuple[str, ...]:
        return ("weight",)

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Replace all masks; names that are not given are kept whole."""
        kind = type(self).__name__
        for name, mask in masks.items():
            if name not in self._maskable():
                raise ValueError(f"{kind}: no mask fits {name!r}; wanted one of {', '.join(self._maskable())}")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"{kind}: the mask of {name!r} is {got}, wanted a torch.bool tensor (True = kept)")
            parameter = getattr(self, name)
            if mask.shape != parameter.shape:
                raise ValueError(
                    f"{kind}: the mask of {name!r} has shape {tuple(mask.shape)} but the parameter has "
                    f"{tuple(parameter.shape)}; a mask covers its weight entry by entry. "
                    "Did the layer get compacted after the mask was made?"
                )
        self._drop_masks()
        for name, mask in masks.items():
            # a copy: whoever gave the mask may change it; contiguous: the kernels walk it row by row
            # inference_mode(False): autograd could not save a mask that was made inside inference mode
            with torch.inference_mode(False):
                own = _laid_out(getattr(self, name).detach(), mask.detach())
            # persistent=False: FL codebases average state_dict(); a bool mask must not be in it
            self.register_buffer(f"{name}_mask", own, persistent=False)
        self._zero()
        self._own_these()
        keeper = self.__dict__.get("_keeper")  # of sparsify: there may be something to keep now
        if keeper is not None:
            keeper.wake()

    def _drop_masks(self) -> None:
        for name in self.masks():
            delattr(self, f"{name}_mask")
        self.__dict__.pop("_whole", None)
        self.__dict__.pop("_own", None)
        self._unhook()

    def _own_these(self) -> None:
        """Take the parameters of now for the layer's own: others may stand in for a while (``functional_call``)."""
        if self.masks():
            self.__dict__["_own"] = dict(self._parameters)

    def _owns(self, name: str, parameter: Tensor) -> bool:
        return self.__dict__.get("_own", {}).get(name) is parameter

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add or replace a parameter, as torch does."""
        super().register_parameter(name, param)
        self._own_these()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        self._own_these()
        return result

    def _forget(self) -> None:
        """Undo everything that a masked layer has and torch's layer has not."""
        self._zero()
        self._drop_masks()
        self.__dict__.pop("_keeper", None)

    def _zero(self) -> None:
        zero_pruned(rows(getattr(self, name), mask) for name, mask in self.masks().items())

    def _mask_of(self, name: str) -> Tensor | None:
        """Return the mask of a parameter, None where it keeps everything."""
        mask = self._buffers.get(f"{name}_mask")
        if mask is None or torch.compiler.is_compiling() or transformed(mask):
            return mask
        whole = self.__dict__.setdefault("_whole", {})
        known = whole.get(name)
        if known is None or known[0] is not mask or known[1] != version_of(mask):
            if traced():
                return mask  # whether it keeps everything would become a part of the trace
            known = whole[name] = (mask, version_of(mask), bool(mask.all()))
        return None if known[2] else mask

    def _stands(self, input: Tensor, weight: Tensor, mask: Tensor, *, again: bool = True) -> bool:
        """Tell whether ``weight`` itself may be multiplied by: zero where it is pruned, its gradient masked by a hook.

        Never true of a tensor that stands in for the layer's own parameter for a while (``functional_call``): a hook
        would stay with it. From now on :meth:`_stands_still` is asked first for an ``input`` of this shape, unless the
        next call may want another way (``again=False``: autocast ends).
        """
        state = self.__dict__
        look = looker(mask) if self._owns("weight", weight) else None
        hooked = state.get("_hooked")
        if look is None or not look(weight):
            self._unhook_other(mask)  # of a mask that is the layer's no more
            return False
        if weight.requires_grad:
            if hooked is None or hooked[0] is not mask or not hooked[1].holds(weight):
                hook = Hook(weight, gradient_hook(mask))
                self._unhook()  # after: a graph may still wait for its gradient
                state["_hooked"] = (mask, hook)
            if again and not mask.is_inference():
                state["_still"] = (weight, mask, mask._version, input.shape, look, weight._cdata)
        return True

    def _stands_still(self, input: Tensor, weight: Tensor | None, mask: Tensor) -> bool:
        """Tell whether :meth:`_stands` was true and nothing has changed since, in a third of the time."""
        known = self.__dict__.get("_still")
        return (
            known is not None
            and known[0] is weight
            and known[1] is mask
            and not _compiling()
            and not input.is_nested
            and known[2] == mask._version
            and known[3] == input.shape
            and known[5] == weight._cdata  # else torch.utils.swap_tensors has taken the hook away
            and known[4](weight)
        )

    def _as_a_node(self, proxy: Proxy, *args: Any, **kwargs: Any) -> Any:
        """Return what torch.fx writes down of a call with ``args``: this layer as one node, as torch's own are."""
        tracer: Any = proxy.tracer
        name = tracer.path_of_module(self)
        if not name:
            raise ValueError(
                f"{type(self).__name__}: torch.fx always looks into the module that it is given, and here it finds "
                "kernels; trace torch.nn.Sequential(layer) instead"
            )
        return tracer.create_proxy("call_module", name, args, kwargs)

    def _unhook(self) -> None:
        self.__dict__.pop("_still", None)
        hooked = self.__dict__.pop("_hooked", None)
        if hooked is not None:
            hooked[1].remove()

    def _unhook_other(self, mask: Tensor | None) -> None:
        """Take the hook away that masks the weight's gradient by another mask than this one."""
        hooked = self.__dict__.get("_hooked")
        if hooked is not None and hooked[0] is not mask:
            self._unhook()

    def _effective(self, name: str) -> Tensor:
        """Return the parameter with zeros where it is pruned."""
        parameter, mask = getattr(self, name), self._mask_of(name)
        if mask is None:
            return parameter
        if channels_last(parameter) and channels_last(mask):  # so that the convolution keeps its fast layout
            return masked_weight(*rows(parameter, mask)).permute(0, 3, 1, 2)
        return masked_weight(parameter, mask)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._zero()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._own_these()
        self._zero()

    def extra_repr(self) -> str:
        """Return torch's line with the density at its end."""
        return f"{super().extra_repr()}, density={self.density:.4g}"
