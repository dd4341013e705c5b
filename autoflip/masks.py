"""MaskSet: which entries of a model's tensors are kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["MaskSet"]


class MaskSet(Mapping[str, Tensor]):
    """An immutable map from tensor name to a bool mask shaped like that tensor, True = kept.

    Names are those of ``model.state_dict()``; tensors that are not named are kept whole.

    Args:
        masks: name -> bool tensor, any shape; copied to the CPU.

    Raises:
        ValueError: a mask is not a bool tensor.

    Example:
        >>> masks = MaskSet({"fc.weight": torch.tensor([[True, False], [False, False]])})
        >>> masks.density
        0.25
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    f"MaskSet: {name!r} is {got}, wanted a torch.bool tensor (True = kept); for scores, "
                    "write scores > threshold"
                )
        self._masks = {name: mask.detach().to("cpu").contiguous().clone() for name, mask in masks.items()}
        self._fingerprint: str | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskSet) and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} tensors, {self.kept} of {self.total} kept, density {self.density:.4f})"

    def __and__(self, other: MaskSet) -> MaskSet:
        """Keep what both keep; a tensor that only one of them names takes that one's mask."""
        both = dict(self._masks)
        for name, mask in other.items():
            if name in both and both[name].shape != mask.shape:
                raise ValueError(
                    f"MaskSet: {name!r} has shape {tuple(both[name].shape)} on the left and "
                    f"{tuple(mask.shape)} on the right of &; both must cover the same model"
                )
            both[name] = both[name] & mask if name in both else mask
        return MaskSet(both)

    @property
    def kept(self) -> int:
        """Number of kept entries."""
        return sum(int(m.sum()) for m in self._masks.values())

    @property
    def total(self) -> int:
        """Number of covered entries."""
        return sum(m.numel() for m in self._masks.values())

    @property
    def density(self) -> float:
        """Kept share of the covered entries, 0 to 1 (1 when nothing is covered)."""
        return self.kept / self.total if self.total else 1.0

    def fingerprint(self) -> str:
        """Return 32 hex digits that change with any name, shape or bit: truncated SHA-256."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name in sorted(self._masks):
                mask = self._masks[name]
                digest.update(f"{name}\0{tuple(mask.shape)}\0".encode())
                digest.update(_pack(mask))
            self._fingerprint = digest.hexdigest()[:32]
        return self._fingerprint

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to a safetensors file, in one atomic step."""
        from safetensors.torch import save

        target = Path(path)
        scratch = target.with_name(target.name + ".tmp")
        scratch.write_bytes(save(dict(self._masks)))
        os.replace(scratch, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """Read masks written by :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no safetensors file of bool tensors.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return cls(load(Path(path).read_bytes()))
        except SafetensorError as error:
            raise ValueError(f"MaskSet.load: {path} is not a safetensors file of masks ({error})") from error

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless every mask names one of ``tensors`` and has its shape."""
        for name, mask in self._masks.items():
            if name not in tensors:
                raise ValueError(
                    f"MaskSet: there is no tensor {name!r} in this model; it has {', '.join(list(tensors)[:8])}"
                    f"{', ...' if len(tensors) > 8 else ''}. Were the masks made for another model?"
                )
            if tensors[name].shape != mask.shape:
                raise ValueError(
                    f"MaskSet: mask {name!r} has shape {tuple(mask.shape)} but the tensor has "
                    f"{tuple(tensors[name].shape)}. Did the model get compacted after the mask was made?"
                )


def _pack(mask: Tensor) -> bytes:
    import numpy as np

    return np.packbits(mask.reshape(-1).numpy(), bitorder="little").tobytes()
