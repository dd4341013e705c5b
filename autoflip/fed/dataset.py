"""What a data set is: two sides of samples and labels, and who made them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Dataset", "Split"]


@dataclass(frozen=True)
class Split:
    """One side of a data set.

    Args:
        x: ``(N, ...)`` samples: images ``(N, C, H, W)`` float32 normalised, characters ``(N, 80)`` int64, or
            HAR windows ``(N, 9, 128)`` float32.
        y: ``(N,)`` int64, class of each sample.
        group: ``(N,)`` int64, who made each sample (writer, role, subject), or None.
    """

    x: Tensor
    y: Tensor
    group: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Dataset:
    """A data set; ``input_shape`` is the shape of one sample, ``num_classes`` the number of labels."""

    name: str
    train: Split
    test: Split
    num_classes: int
    input_shape: tuple[int, ...]
