"""From a plain model to a sparse one and back, in place and with the same Parameter objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autoflip.masks import MaskSet
from autoflip.nn.conv import MaskedConv2d
from autoflip.nn.embedding import MaskedEmbedding
from autoflip.nn.linear import MaskedLinear, MaskedSelectingLinear, SelectingLinear
from autoflip.nn.masked import Masked, rows, transformed
from autoflip.nn.recurrent import MaskedGRU, MaskedLSTM
from autoflip.ops import masked_weight, version_of, zero_pruned

__all__ = ["densify", "masks_of", "sparsify"]

Model = TypeVar("Model", bound=nn.Module)
_MASKED: dict[type[nn.Module], type[Masked]] = {
    nn.Linear: MaskedLinear,
    SelectingLinear: MaskedSelectingLinear,
    nn.Conv2d: MaskedConv2d,
    nn.Embedding: MaskedEmbedding,
    nn.LSTM: MaskedLSTM,
    nn.GRU: MaskedGRU,
}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {masked: plain for plain, masked in _MASKED.items()}


def sparsify(model: Model, masks: Mapping[str, Tensor]) -> Model:
    """Turn the layers that ``masks`` names into their masked versions, in place; return ``model``.

    ``nn.Linear``, ``nn.Conv2d``, ``nn.Embedding``, ``nn.LSTM`` and ``nn.GRU`` become the masked layers of
    ``autoflip.nn`` (the very same module objects, so hooks and references stay). Any other masked parameter (biases,
    norm weights, layers of other kinds, parameters shared between layers) is set to zero where it is pruned and its
    gradient is masked by a hook. A masked buffer (running statistics) is set to zero where it is pruned,
    once; what the layer writes there later stays.

    Parameter objects stay the same, so optimizers made earlier stay valid. Their momentum may move pruned
    entries: these are zero again when the next ``model(...)`` or ``model.state_dict()`` begins, and only entries
    that moved are written. Masked layers ignore them in any case; other parameters (the list above) are not set to
    zero by a call of a part of the model alone, of a compiled forward pass, or under ``torch.func``.

    ``masks`` replaces what an earlier call applied: afterwards ``masks_of(model) == MaskSet(masks)`` (a masked layer
    that the model holds under several names comes under each of them).

    Args:
        model: any module; changed in place.
        masks: a :class:`MaskSet`, or name in ``model.state_dict()`` -> bool tensor of that shape.

    Raises:
        ValueError: a mask names no tensor of the model or has another shape, or one on the meta device, where nothing
            can be zero; the model is unchanged then.
    """
    wanted = masks if isinstance(masks, MaskSet) else MaskSet(masks)
    tensors = _named_tensors(model)
    wanted.check(tensors)
    for name in wanted:
        if tensors[name].is_meta:
            raise ValueError(
                f"sparsify: {name!r} is on the meta device, without values; call model.to_empty(device=...) and load "
                "the weights first"
            )
    densify(model)

    by_module: dict[str, dict[str, Tensor]] = {}
    for name, mask in wanted.items():
        owner, _, attribute = name.rpartition(".")
        by_module.setdefault(owner, {})[attribute] = mask
    shared = _shared(tensors)
    rest: dict[str, Tensor] = {}
    layers: list[Masked] = []
    for owner, own in by_module.items():
        module = model.get_submodule(owner)
        prefix = f"{owner}." if owner else ""
        kind = _MASKED.get(type(module))
        layer_masks = {}
        for attribute, mask in own.items():
            fits = kind is not None and (attribute == "weight" or isinstance(module, nn.RNNBase))
            if fits:
                layer_masks[attribute] = mask
            if not fits or id(tensors[prefix + attribute]) in shared:
                rest[prefix + attribute] = mask
        if layer_masks:
            assert kind is not None
            module.__class__ = kind
            module._set_masks(layer_masks)  # type: ignore[operator]
            layers.append(module)  # type: ignore[arg-type]
    if len(wanted):
        keeper = _Keeper(model, rest, layers)
        keeper.zero(model, buffers=True)
        keeper.wake()
        model.register_state_dict_pre_hook(keeper.zero)
        model.register_load_state_dict_post_hook(keeper.zero)
    return model


def densify(model: Model) -> Model:
    """Turn every masked layer back into torch's, in place; pruned entries are exactly zero. Return ``model``."""
    for module in model.modules():
        if isinstance(module, Masked) and type(module) in _PLAIN:
            module._forget()
            module.__class__ = _PLAIN[type(module)]  # type: ignore[assignment]
        for hooks in (module._forward_pre_hooks, module._state_dict_pre_hooks, module._load_state_dict_post_hooks):
            for key, hook in list(hooks.items()):
                keeper = getattr(hook, "__self__", hook)
                if isinstance(keeper, _Keeper):
                    keeper.zero(module)
                    keeper.release()
                    del hooks[key]
    return model


def masks_of(model: nn.Module) -> MaskSet:
    """Return the masks in force: those of :func:`sparsify` and of masked layers that were built by hand."""
    masks: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        found = dict(module.masks()) if isinstance(module, Masked) else {}
        for hook in module._state_dict_pre_hooks.values():
            keeper = getattr(hook, "__self__", None)
            if isinstance(keeper, _Keeper):
                found.update(keeper.masks)
        masks.update({prefix + name: mask for name, mask in found.items()})
    return MaskSet(masks)


class _Keeper:
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
        self._hooked: dict[str, tuple[Tensor, Any]] = {}
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
            if tensor.requires_grad and tensor.is_leaf and (known is None or known[0] is not tensor):
                self._hooked[name] = (tensor, tensor.register_hook(_GradientMask(mask)))

    def zero(self, model: nn.Module, *_: Any, buffers: bool = False) -> None:
        # masked layers have their own way
        zero_pruned([(tensor, mask) for _, tensor, mask in self._rest(model, buffers=buffers)])

    def _rest(self, model: nn.Module, *, buffers: bool = False) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, (owner, attribute) in self._open.items():
            module: Any = model
            for part in owner:
                module = module._modules[part]
            tensor, mask = getattr(module, attribute), self.masks[name]
            if mask.device != tensor.device:
                mask = self.masks[name] = mask.to(tensor.device)
            if buffers or attribute not in module._buffers:
                yield name, tensor, mask

    def release(self) -> None:
        for _, handle in self._hooked.values():
            handle.remove()
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
        if self.whole or tensor is None or (tensor is self.tensor and version_of(tensor) == self.version):
            return False
        self.tensor = tensor
        return True


class _GradientMask:
    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, gradient: Tensor) -> Tensor:
        self.mask = self.mask.to(gradient.device)
        return masked_weight(gradient, self.mask)


def _split(name: str) -> tuple[tuple[str, ...], str]:
    owner, _, attribute = name.rpartition(".")
    return tuple(owner.split(".")) if owner else (), attribute


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    # keep_vars: the Parameter objects themselves, to tell which of them are shared
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _shared(tensors: Mapping[str, Tensor]) -> set[int]:
    ids = [id(t) for t in tensors.values()]
    return {i for i in ids if ids.count(i) > 1}
