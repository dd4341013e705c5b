"""What keeps the pruned entries of a sparse model at zero, those of tensors without a masked layer included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoflip.nn.masked import Hook, Masked, rows, transformed
from autoflip.ops import masked_weight, version_of, zero_pruned

__all__ = ["Keeper"]


class Keeper:
    """Keeps pruned entries at zero: by a look before each forward pass, and those of parameters that no masked layer
    looks after by hooks on their gradients too.

    A forward pre-hook of the model: copies of a parameter (``deepcopy``, ``load_state_dict(assign=True)``)
    come without the hooks of the original, so each forward pass gives them to those that lack them. The masked
    layers are looked at because a forward may read their weights past them: ``F.linear(x, self.fc.weight)``, or
    the fast path of ``nn.TransformerEncoderLayer``. Nothing is looked at where a mask keeps everything, and there is
    no pre-hook where all of them do: it costs a small model's training step 2 %.

    Args:
        model: whose tensors they are.
        masks: name -> mask, of tensors that no masked layer looks after.
        layers: the masked layers; their masks may change later.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], layers: Sequence[Masked]) -> None:
        self.model = model
        with torch.inference_mode(False):
            self.masks = {name: mask.clone() for name, mask in masks.items()}
        self.layers = tuple(layers)
        self._open = {name: _split(name) for name, mask in masks.items() if not bool(mask.all())}
        self._hooked: dict[str, Hook] = {}
        self._seen: list[_Seen] | None = None
        self._join()

    def _join(self) -> None:
        for layer in self.layers:
            layer.__dict__["_keeper"] = self

    def wake(self) -> None:
        """Begin to look before each forward pass as soon as there is something to look at."""
        if self in self.model._forward_pre_hooks.values():
            return
        masked = [layer for layer in self.layers if isinstance(layer, Masked)]  # a part may be dense again
        if self._open or any(layer._mask_of(name) is not None for layer in masked for name in layer.masks()):
            self(self.model, None)
            self.model.register_forward_pre_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # handles and versions belong to the original's parameters
        return self.__dict__ | {"_hooked": {}, "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._join()

    def __call__(self, model: nn.Module, _: Any) -> None:
        """Look, before a forward pass of ``model``."""
        rest = list(self._rest(model)) if self._open else []
        if not torch.compiler.is_compiling():
            if self._seen is None:
                masked = [layer for layer in self.layers if isinstance(layer, Masked)]
                # sparse=True: only its rows are ever read, and its table may be large
                watched = [layer for layer in masked if not getattr(layer, "sparse", False)]
                self._seen = [_Seen(layer, name) for layer in watched for name in layer._maskable()]
            written = [seen for seen in self._seen if seen.written()]
            if written or rest:
                zero_pruned([*(rows(s.tensor, s.mask) for s in written if not s.whole), *((t, m) for _, t, m in rest)])
                for seen in written:
                    seen.version = version_of(seen.tensor)
        for name, tensor, mask in rest:
            known = self._hooked.get(name)
            # a copy that nn.DataParallel made is no leaf: its gradient flows to the parameter, which has the hook
            if not tensor.requires_grad or not tensor.is_leaf:
                continue
            if known is None or not known.holds(tensor):
                self._hooked[name] = Hook(tensor, _GradientMask(mask))
                if known is not None:
                    known.remove()

    def zero(self, model: nn.Module, *_: Any, buffers: bool = False) -> None:
        """Set what is pruned to zero now."""
        # masked layers have their own way
        zero_pruned([(tensor, mask) for _, tensor, mask in self._rest(model, buffers=buffers)])

    def _rest(self, model: nn.Module, *, buffers: bool = False) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, (owner, attribute) in self._open.items():
            module, mask = _found(model, owner), self.masks[name]
            tensor = getattr(module, attribute, None)
            if not isinstance(tensor, Tensor) or tensor.shape != mask.shape:
                continue  # another layer stands there now, which nobody has pruned
            if attribute in module._parameters and not isinstance(tensor, nn.Parameter):
                continue  # it stands in for the parameter for a while (functional_call): somebody else's
            if mask.device != tensor.device:
                mask = self.masks[name] = mask.to(tensor.device)
            if buffers or attribute not in module._buffers:
                yield name, tensor, mask

    def masks_in(self, model: nn.Module) -> dict[str, Tensor]:
        """Return those masks whose tensors are there."""
        found = {}
        for name, mask in self.masks.items():
            owner, attribute = _split(name)
            tensor = getattr(_found(model, owner), attribute, None)
            if isinstance(tensor, Tensor) and tensor.shape == mask.shape:
                found[name] = mask
        return found

    def forget(self, part: nn.Module) -> None:
        """Look after nothing in ``part`` any more."""
        inside = set(part.modules())
        for name in [n for n in self.masks if _found(self.model, _split(n)[0]) in inside]:
            del self.masks[name]
            self._open.pop(name, None)
            if name in self._hooked:
                self._hooked.pop(name).remove()

    def release(self) -> None:
        """Take the hooks away."""
        for hook in self._hooked.values():
            hook.remove()
        self._hooked.clear()
        self._seen = None


class _Seen:
    """One parameter of a masked layer at the last look at it.

    A look at all that changed costs more than to ask first; a write through ``.data`` does not count as one: the
    layer ignores what stands there.
    """

    __slots__ = ("layer", "mask", "mask_name", "mask_version", "name", "tensor", "version", "whole")

    def __init__(self, layer: Masked, name: str) -> None:
        self.layer, self.name, self.mask_name = layer, name, f"{name}_mask"
        self.tensor: Any = None
        self.mask: Any = None
        self.whole = True
        self.version = self.mask_version = -1

    def written(self) -> bool:
        """Tell whether the parameter or its mask is another one than at the last look, or was written since."""
        mask = self.layer._buffers.get(self.mask_name)
        # where a part of the model was made dense again, or another tensor stands in (functional_call under vmap)
        if mask is None or transformed(mask):
            self.mask = None
            return False
        tensor = self.layer._parameters.get(self.name)
        if mask is not self.mask or version_of(mask) != self.mask_version:
            self.mask, self.mask_version = mask, version_of(mask)
            self.whole = self.layer._mask_of(self.name) is None
            self.version = -1
        if self.whole or tensor is None or not self.layer._owns(self.name, tensor):
            return False  # what stands in for a while is somebody else's
        if tensor is self.tensor and version_of(tensor) == self.version:
            return False
        self.tensor = tensor
        return True


class _GradientMask:
    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, gradient: Tensor) -> Tensor:
        self.mask = self.mask.to(gradient.device)
        return masked_weight(gradient, self.mask)


def _found(model: nn.Module, owner: Sequence[str]) -> Any:
    """Return the module at a path, None where there is none."""
    module: Any = model
    for part in owner:
        module = module._modules.get(part) if module is not None else None
    return module


def _split(name: str) -> tuple[tuple[str, ...], str]:
    owner, _, attribute = name.rpartition(".")
    return tuple(owner.split(".")) if owner else (), attribute
