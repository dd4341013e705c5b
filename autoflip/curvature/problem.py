"""A model, a loss and a batch, checked once; and the promise that looking at them changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoflip import ops

LossFn = Callable[[Tensor, Tensor], Tensor]


class NotFiniteError(ValueError):
    """The loss is NaN or infinite."""


@dataclass(frozen=True)
class Problem:
    """What curvature is asked about: ``loss_fn(model(inputs), target)`` as a function of ``params``."""

    model: nn.Module
    loss_fn: LossFn
    inputs: Tensor
    target: Tensor
    params: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    modules: Sequence[nn.Module]

    @staticmethod
    def of(model: nn.Module, loss_fn: LossFn, batch: tuple[Tensor, Tensor]) -> Problem:
        """Check what a user passed.

        Raises:
            ValueError: the batch is no pair of tensors or is empty; no parameter requires grad or one is NaN or Inf.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
            raise ValueError(
                f"curvature: batch is {type(batch).__name__}, wanted a pair of tensors (inputs, target); "
                "for a model with other inputs wrap it in a module that takes one tensor"
            )
        if not isinstance(model, nn.Module) or not callable(loss_fn):
            raise ValueError(
                f"curvature: model is {type(model).__name__} and loss_fn {type(loss_fn).__name__}; wanted an nn.Module "
                "and a function of (output, target)"
            )
        with torch.inference_mode(False):  # autograd saves no tensor that was made in inference mode
            inputs, target = (t.clone() if t.is_inference() else t for t in batch)
        if inputs.dim() == 0 or inputs.shape[0] == 0:
            raise ValueError(f"curvature: inputs have shape {tuple(inputs.shape)}; wanted at least one sample")
        modules = list(model.named_modules(remove_duplicate=False))  # walked once: small models are done in no time
        params = _trainable(modules)
        if not params:
            raise ValueError(
                "curvature: no parameter of the model requires grad, so there is nothing to take a second "
                "derivative of; call requires_grad_() on those you mean"
            )
        if not ops.all_finite(params.values()):
            for name, p in params.items():
                _check_finite(f"parameter {name!r}", p)
        once = list({id(module): module for _, module in modules}.values())
        return Problem(model, loss_fn, inputs, target, params, _masks(modules), once)

    def kept(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """Set entries of pruned weights to zero, in place: they do not move the output."""
        for name, mask in self.masks.items():
            if name in entries:
                entries[name] *= mask.to(entries[name].device)
        return entries

    @property
    def samples(self) -> int:
        """Number of samples in the batch."""
        return self.inputs.shape[0]

    def output(self) -> Tensor:
        """Run the model forward.

        Raises:
            ValueError: the model gives something else than one floating tensor that depends on a parameter.
        """
        out = self.model(self.inputs)
        if not isinstance(out, Tensor) or not out.is_floating_point():
            got = out.dtype if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"curvature: the model returned {got}, wanted one floating tensor; wrap the model")
        if not out.requires_grad:
            raise ValueError("curvature: the model's output does not depend on any parameter that requires grad")
        return out

    def loss(self, output: Tensor) -> Tensor:
        """Apply the loss.

        Raises:
            ValueError: the loss is not a scalar, or is NaN or Inf; then the message says where that came from.
        """
        try:
            loss = self.loss_fn(output, self.target)
        except (IndexError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"curvature: loss_fn fails on an output of shape {tuple(output.shape)}, {output.dtype}, and a target "
                f"of shape {tuple(self.target.shape)}, {self.target.dtype}: {error}"
            ) from error
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"curvature: loss_fn(output, target) returned {got}, wanted a scalar tensor; "
                "a loss with reduction='none' has one Hessian a sample, so use 'mean' or 'sum'"
            )
        if not torch.isfinite(loss):
            _check_finite("the batch's inputs", self.inputs)
            _check_finite("the batch's target", self.target)
            raise NotFiniteError(
                f"curvature: the loss is {loss.item()}; look for diverged weights, for logits that overflow (log of a "
                "softmax instead of log_softmax), or for a mean over no sample (all targets ignored)"
            )
        return loss

    @contextmanager
    def undisturbed(self, seed: int) -> Iterator[None]:
        """Leave buffers (running statistics), random state and grad mode as they were; dropout draws from ``seed``.

        Autocast around the call is off inside: a second derivative is of the parameters' own type.
        """
        if not isinstance(seed, int):
            raise ValueError(f"curvature: seed={seed!r}; wanted a whole number (int)")
        held = [(m, dict(m._buffers)) for m in self.modules if m._buffers]
        buffers = [(b, b.detach().clone()) for _, own in held for b in own.values() if b is not None]
        devices = {p.device.index or 0 for p in self.params.values() if p.is_cuda}
        # not torch.manual_seed: it reseeds every device, and those that are not in use would not be restored
        generators = [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]
        states = [generator.get_state() for generator in generators]
        # entered only where they are on: a small model is done in the time that a few contexts take
        inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
        with inference, nullcontext() if torch.is_grad_enabled() else torch.enable_grad(), _no_autocast(devices):
            try:
                for generator in generators:
                    generator.manual_seed(seed % (1 << 63))
                yield
            finally:
                for generator, state in zip(generators, states):
                    generator.set_state(state)
                for module, own in held:  # a forward may have put others in their place
                    if any(module._buffers.get(name) is not b for name, b in own.items()):
                        module._buffers.update(own)
                for buffer, before in buffers:
                    # compared, not just copied: who packs a mask must not see it written again
                    if not torch.equal(buffer, before):
                        with torch.no_grad():
                            buffer.copy_(before)


def _no_autocast(devices: set[int]) -> AbstractContextManager[object]:
    kinds = [kind for kind in ("cpu", "cuda")[: 1 + bool(devices)] if torch.is_autocast_enabled(kind)]
    if not kinds:
        return nullcontext()
    entered = ExitStack()
    for kind in kinds:
        entered.enter_context(torch.autocast(kind, enabled=False))
    return entered


def _trainable(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """Return what ``named_parameters`` has that requires grad: each tensor once, by its first name."""
    seen: set[int] = set()
    params: dict[str, Tensor] = {}
    for path, module in modules:
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                params[f"{path}.{name}" if path else name] = p
    return params


def _masks(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """Return parameter name -> mask: of masked layers, and of the hooks that look after other parameters."""
    found: dict[str, Tensor] = {}
    for path, module in modules:
        prefix = f"{path}." if path else ""
        # nn stands above this floor, so its masks are known by how they are had, not by class
        own = getattr(type(module), "masks", None)
        sources = [own(module) if callable(own) else None]
        sources += [getattr(hook, "masks", None) for hook in module._forward_pre_hooks.values()]
        for masks in sources:
            if isinstance(masks, Mapping):
                found.update(
                    {prefix + n: m for n, m in masks.items() if isinstance(m, Tensor) and m.dtype == torch.bool}
                )
    return found


def _check_finite(what: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor.detach()).all():
        bad = int((~torch.isfinite(tensor.detach())).sum())
        raise ValueError(f"curvature: {what} holds {bad} NaN or Inf of {tensor.numel()} values; clean the data first")
