"""An embedding with pruned weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from autoflip.nn.masked import Masked
from autoflip.ops import masked_weight

__all__ = ["MaskedEmbedding"]


class MaskedEmbedding(Masked, nn.Embedding):
    """``y = (weight * mask)[input]``; ``torch.nn.Embedding`` until a mask is set.

    Only the rows that ``input`` names are masked, so a step costs in proportion to ``input``, not to the table.
    Arguments (``padding_idx``, ``max_norm``, ``scale_grad_by_freq`` and ``sparse`` included), parameters and
    ``state_dict()`` are torch's; ``max_norm`` bounds the norm of what is kept of a row. Pruned weights are zero, get
    exactly zero gradients, and so stay zero under SGD with momentum and weight decay, Adam(W) and SparseAdam. Momentum
    gathered before the mask counts for nothing: ``forward`` ignores what it leaves, ``state_dict()`` sets it to zero.

    Shapes: ``(...)`` int32 or int64 -> ``(..., embedding_dim)``.
    Cost: 0 FLOPs; beyond torch's, 1 byte of mask is read and 8 bytes are moved per float32 result, both ways.

    Example:
        >>> layer = MaskedEmbedding(3, 2)
        >>> layer.set_mask(torch.tensor([[True, False], [True, True], [False, False]]))
        >>> layer(torch.tensor([2]))
        tensor([[0., 0.]], grad_fn=...)
    """

    def set_mask(self, mask: Tensor | None) -> None:
        """Keep the weights where ``mask`` (``(num_embeddings, embedding_dim)``, bool) is True, None = keep all.

        Raises:
            ValueError: ``mask`` is no bool tensor shaped like ``weight``.
        """
        self._set_masks({} if mask is None else {"weight": mask})

    def forward(self, input: Tensor) -> Tensor:
        """Return the kept entries of the rows that ``input`` names, zeros at the others."""
        if isinstance(input, Proxy):
            return self._as_a_node(input, input)
        mask = self._mask_of("weight")
        if mask is None:
            return super().forward(input)
        if self.max_norm is not None:
            self._zero_rows(input, mask)
        return masked_weight(super().forward(input), F.embedding(input, mask))

    def _zero_rows(self, input: Tensor, mask: Tensor) -> None:
        """Set the pruned entries of the rows in ``input`` to zero: the norm that torch bounds is that of whole rows."""
        with torch.no_grad():
            rows = input.flatten() if torch.compiler.is_compiling() else input.unique()
            self.weight[rows] = torch.where(mask[rows], self.weight[rows], 0)
