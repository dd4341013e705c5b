"""LSTM and GRU with pruned weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from autoflip.nn.masked import Masked
from autoflip.ops import RecurrentPack, batches, masked_recurrent, paths, recurrent_here, trials, version_of

__all__ = ["MaskedGRU", "MaskedLSTM"]

# a trial's sequence is cut to about so many multiply-adds, but not to fewer steps: what a call costs once counts less
# the longer the sequence is, and little where steps are large
_TRIAL_WORK, _TRIAL_STEPS = 400_000_000, 16
_RULE = 0.3  # the density below which the sparse way is taken where trials are off


def _keep_them() -> None:
    """Leave a layer's flat weights as they are."""


class _MaskedRNN(Masked):
    _flat_weights: Any  # torch's: the parameters in the order that the fused layer takes them
    _flat_weights_names: list[str]
    _update_flat_weights: Any
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    mode: str

    def _maskable(self) -> tuple[str, ...]:
        return tuple(self._flat_weights_names)

    def set_mask(self, masks: Mapping[str, Tensor] | None) -> None:
        """Keep the entries where the masks are True, None = keep all; replaces all earlier masks.

        Args:
            masks: parameter name ("weight_ih_l0", "bias_hh_l1_reverse", ...) -> bool tensor of its shape;
                parameters that are not named are kept whole.

        Raises:
            ValueError: ``masks`` is no mapping, an unknown name, or a mask that is no bool tensor shaped like its
                parameter.
        """
        if masks is not None and not isinstance(masks, Mapping):
            kind, name = type(self).__name__, self._flat_weights_names[0]
            raise ValueError(
                f"{kind}: masks is a {type(masks).__name__}, wanted parameter name -> bool tensor, such as "
                f"{{{name!r}: mask}}: a recurrent layer has several weights"
            )
        self._set_masks({} if masks is None else masks)

    def _drop_masks(self) -> None:
        super()._drop_masks()
        self.__dict__.pop("_packs", None)
        self.__dict__.pop("_found", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on the kept weights; arguments and results are torch's."""
        for given in (*args, *kwargs.values()):
            if isinstance(given, Proxy):
                return self._as_a_node(given, *args, **kwargs)
        if all(self._mask_of(name) is None for name in self._flat_weights_names):
            return super().forward(*args, **kwargs)
        return self._sparse(*args, **kwargs) or self._dense(*args, **kwargs)

    def _dense(self, *args: Any, **kwargs: Any) -> Any:
        self._update_flat_weights()  # torch's: parameters may have been exchanged, and the twin must not find out
        # on a twin that holds the kept weights: other threads may be running this very layer
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.__dict__["_flat_weights"] = [self._effective(name) for name in self._flat_weights_names]
        # what is parametrized is another tensor each time, for which torch would look for its weights anew
        twin.__dict__["_update_flat_weights"] = _keep_them
        return super(_MaskedRNN, twin).forward(*args, **kwargs)

    def _sparse(self, input: Any, hx: Any = None) -> Any:
        """Return what torch's layer would, computed on the kept weights alone; None where the dense layer serves."""
        if not isinstance(input, Tensor) or input.dim() not in (2, 3) or self.proj_size:
            return None
        x = input if input.dim() == 3 else input.unsqueeze(1)
        x = x.transpose(0, 1) if self.batch_first and input.dim() == 3 else x
        if not recurrent_here(x) or self._way(*x.shape[:2]) == "dense":
            return None
        first = (self.num_layers * (2 if self.bidirectional else 1), x.shape[1], self.hidden_size)
        count = 2 if self.mode == "LSTM" else 1
        state = (hx,) if isinstance(hx, Tensor) else hx
        if state is None:
            state = (x.new_zeros(first),) * count
        elif input.dim() == 2:
            state = tuple(s.unsqueeze(1) for s in state)
        # arguments that do not fit go the dense way, where torch says what is wrong with them
        if x.shape[2] != self.input_size or len(state) != count or any(s.shape != first for s in state):
            return None
        if any(p is not None and p.shape != self._shape_of(name) for name, p in self._parameters.items()):
            return None
        y, last = self._run(x, state)
        y = y.transpose(0, 1) if self.batch_first and input.dim() == 3 else y
        if input.dim() == 2:
            y, last = y.squeeze(1), tuple(s.squeeze(1) for s in last)
        return y, last if self.mode == "LSTM" else last[0]

    def _shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape that torch gives a parameter of this layer."""
        gates = (4 if self.mode == "LSTM" else 3) * self.hidden_size
        if name.startswith("bias"):
            return (gates,)
        below = self.input_size if "_l0" in name else self.hidden_size * (2 if self.bidirectional else 1)
        return (gates, self.hidden_size if name.startswith("weight_hh") else below)

    def _run(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        lasts: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in (f"_l{layer}", f"_l{layer}_reverse")[: 2 if self.bidirectional else 1]:
                weights = getattr(self, f"weight_ih{suffix}"), getattr(self, f"weight_hh{suffix}")
                if self.bias:
                    biases = self._effective(f"bias_ih{suffix}"), self._effective(f"bias_hh{suffix}")
                else:
                    biases = (weights[0].new_zeros(len(weights[0])),) * 2
                begin = tuple(s[len(lasts)] for s in state)
                reverse = suffix.endswith("reverse")
                y, *last = masked_recurrent(x, begin, (*weights, *biases), self._pack(suffix), reverse=reverse)
                outputs.append(y)
                lasts.append(tuple(last))
            x = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))

    def _suffixes(self) -> list[str]:
        return [name[len("weight_ih") :] for name in self._flat_weights_names if name.startswith("weight_ih")]

    def _way(self, steps: int, n: int) -> str:
        """Return "sparse" where a trial found it faster as a whole training step, else "dense"."""
        found = self.__dict__.setdefault("_found", {})
        wish = (batches.bucket(steps), batches.bucket(n), torch.get_num_threads())
        if wish not in found:
            packs = [self._pack(suffix) for suffix in self._suffixes()]
            found[wish] = self._choose(packs, *wish[:2])
        return found[wish]  # type: ignore[no-any-return]

    def _choose(self, packs: list[RecurrentPack], steps: int, n: int) -> str:
        entries = sum(pack.input.mask.numel() + pack.state.mask.numel() for pack in packs)
        density = sum(pack.input.kept + pack.state.kept for pack in packs) / entries
        steps = min(steps, max(_TRIAL_STEPS, _TRIAL_WORK // (n * entries)))
        if not trials.enabled():
            return "sparse" if n >= 16 and density < _RULE and n * entries >= paths.LEAST_WORK else "dense"
        key = (
            f"masked_{self.mode.lower()} {self.input_size}x{self.hidden_size} x{len(packs)} steps {steps} n{n} "
            f"density {trials.near(density)} threads {torch.get_num_threads()}"
        )
        return trials.choose(key, self._ways(steps, n))

    def _ways(self, steps: int, n: int) -> dict[str, Callable[[], object]]:
        made: dict[str, Any] = {}

        def probe() -> _MaskedRNN:
            if not made:
                shape: dict[str, Any] = {"bias": self.bias, "bidirectional": self.bidirectional, "dtype": torch.float32}
                # whoever draws random numbers must not notice the trial
                with torch.random.fork_rng(devices=()), torch.enable_grad():
                    made["probe"] = type(self)(self.input_size, self.hidden_size, self.num_layers, **shape)
                    made["probe"]._set_masks(self.masks())
            return made["probe"]  # type: ignore[no-any-return]

        def step(run: Callable[[_MaskedRNN, Tensor, tuple[Tensor, ...]], Tensor]) -> object:
            layer = probe()
            x = torch.ones(steps, n, self.input_size, dtype=torch.float32, requires_grad=True)
            zeros = x.new_zeros(len(self._suffixes()), n, self.hidden_size)
            with torch.enable_grad():
                y = run(layer, x, (zeros,) * (2 if self.mode == "LSTM" else 1))
                return torch.autograd.grad(y.sum(), [x, *layer.parameters()])

        def dense(layer: _MaskedRNN, x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
            return layer._dense(x, state if self.mode == "LSTM" else state[0])[0]  # type: ignore[no-any-return]

        return {
            "dense": lambda: step(dense),
            "sparse": lambda: step(lambda layer, x, state: layer._run(x, state)[0]),
        }

    def _pack(self, suffix: str) -> RecurrentPack:
        """Return the packs of one direction, made once for its two masks; a weight without a mask is kept whole."""
        names = f"weight_ih{suffix}", f"weight_hh{suffix}"
        masks = [self._buffers.get(f"{name}_mask") for name in names]
        versions = [0 if mask is None else version_of(mask) for mask in masks]
        packs = self.__dict__.setdefault("_packs", {})
        known = packs.get(suffix)
        if known is None or known[1] != versions or any(a is not b for a, b in zip(known[0], masks, strict=True)):
            whole = [
                torch.ones(w.shape, dtype=torch.bool, device=w.device) if mask is None else mask
                for w, mask in zip((getattr(self, name) for name in names), masks, strict=True)
            ]
            known = packs[suffix] = (masks, versions, RecurrentPack.of(self.mode, *whole))
            self.__dict__.pop("_found", None)
        return known[2]  # type: ignore[no-any-return]


class MaskedLSTM(_MaskedRNN, nn.LSTM):
    """``torch.nn.LSTM`` on ``weight * mask`` for every weight and bias that has a mask.

    A short trial chooses, per shape of the input, between the kept weights alone
    (:func:`autoflip.ops.masked_recurrent`: CPU, float32) and torch's fused dense layer on masked weights, which also
    serves packed sequences, projections, other dtypes and GPUs.
    Arguments, parameters and ``state_dict()`` are torch's; pruned entries stay zero through training.
    """


class MaskedGRU(_MaskedRNN, nn.GRU):
    """``torch.nn.GRU`` on ``weight * mask`` for every weight and bias that has a mask.

    Runs as :class:`MaskedLSTM` does. Arguments, parameters and ``state_dict()`` are torch's; pruned entries stay zero
    through training.
    """
