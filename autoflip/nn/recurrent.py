"""LSTM and GRU with pruned weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from autoflip.nn.masked import Masked

__all__ = ["MaskedGRU", "MaskedLSTM"]


class _MaskedRNN(Masked):
    _flat_weights: Any  # torch's: the parameters in the order that the fused layer takes them
    _flat_weights_names: list[str]
    _update_flat_weights: Any

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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run torch's fused layer on the kept weights; arguments and results are torch's."""
        if all(self._mask_of(name) is None for name in self._flat_weights_names):
            return super().forward(*args, **kwargs)
        self._update_flat_weights()  # torch's: parameters may have been exchanged, and the twin must not find out
        # on a twin that holds the kept weights: other threads may be running this very layer
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.__dict__["_flat_weights"] = [self._effective(name) for name in self._flat_weights_names]
        return super(_MaskedRNN, twin).forward(*args, **kwargs)


class MaskedLSTM(_MaskedRNN, nn.LSTM):
    """``torch.nn.LSTM`` on ``weight * mask`` for every weight and bias that has a mask.

    The fused dense layer runs on the masked weights: single pruned weights save bytes on the wire, not time.
    Arguments, parameters and ``state_dict()`` are torch's; pruned entries stay zero through training.
    """


class MaskedGRU(_MaskedRNN, nn.GRU):
    """``torch.nn.GRU`` on ``weight * mask`` for every weight and bias that has a mask.

    The fused dense layer runs on the masked weights: single pruned weights save bytes on the wire, not time.
    Arguments, parameters and ``state_dict()`` are torch's; pruned entries stay zero through training.
    """
