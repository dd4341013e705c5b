"""From a plain model to a sparse one and back, in place and with the same Parameter objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from autoflip.masks import MaskSet
from autoflip.nn.conv import MaskedConv2d
from autoflip.nn.embedding import MaskedEmbedding
from autoflip.nn.keeper import Keeper
from autoflip.nn.linear import MaskedLinear, MaskedSelectingLinear, SelectingLinear
from autoflip.nn.masked import Masked
from autoflip.nn.recurrent import MaskedGRU, MaskedLSTM

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
        keeper = Keeper(model, rest, layers)
        keeper.zero(model, buffers=True)
        keeper.wake()
        model.register_state_dict_pre_hook(keeper.zero)
        model.register_load_state_dict_post_hook(keeper.zero)
    return model


def densify(model: Model) -> Model:
    """Turn every masked layer back into torch's, in place; pruned entries are exactly zero. Return ``model``.

    Raises:
        ValueError: a masked layer's weight is computed from other tensors (parametrized), none of which can be set to
            zero; the model is unchanged.
    """
    for path, module in model.named_modules():
        if isinstance(module, Masked) and parametrize.is_parametrized(module):
            name = next(iter(module.parametrizations))  # type: ignore[arg-type]
            raise ValueError(
                f"densify: {f'{path}.{name}'.lstrip('.')} is parametrized, so its pruned entries cannot be set to "
                f"zero; call torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) first"
            )
    for module in model.modules():
        if isinstance(module, Masked) and type(module) in _PLAIN:
            keeper = module.__dict__.get("_keeper")
            if keeper is not None and keeper.model is not model:
                keeper.forget(model)  # what looks after a whole of which this is a part
            module._forget()
            module.__class__ = _PLAIN[type(module)]  # type: ignore[assignment]
        for hooks in (module._forward_pre_hooks, module._state_dict_pre_hooks, module._load_state_dict_post_hooks):
            for key, hook in list(hooks.items()):
                keeper = getattr(hook, "__self__", hook)
                if isinstance(keeper, Keeper):
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
            if isinstance(keeper, Keeper):
                found.update(keeper.masks_in(module))
        masks.update({prefix + name: mask for name, mask in found.items()})
    return MaskSet(masks)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    # keep_vars: the Parameter objects themselves, to tell which of them are shared
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _shared(tensors: Mapping[str, Tensor]) -> set[int]:
    ids = [id(t) for t in tensors.values()]
    return {i for i in ids if ids.count(i) > 1}
