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

    Masks come out as copies, a byte per entry: to write into one changes nothing here. Take it out once, not in a
    loop.

    Raises:
        ValueError: ``masks`` is not a mapping from names, or a mask is not a bool tensor.

    Example:
        >>> masks = MaskSet({"fc.weight": torch.tensor([[True, False], [False, False]])})
        >>> masks.density
        0.25
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        if not isinstance(masks, Mapping):
            raise ValueError(
                f"MaskSet: masks is a {type(masks).__name__}, wanted a mapping from tensor name to bool mask, such "
                "as {'fc.weight': mask}; an empty one keeps everything"
            )
        source: Mapping[str, Tensor] = masks._masks if isinstance(masks, MaskSet) else masks
        for name, mask in source.items():
            if not isinstance(name, str):
                raise ValueError(f"MaskSet: {name!r} is no name, wanted names of model.state_dict() as str")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    f"MaskSet: {name!r} is {got}, wanted a torch.bool tensor (True = kept); for scores, "
                    "write scores > threshold"
                )
            if mask.is_meta or mask.layout is not torch.strided:
                where = "on the meta device, without values" if mask.is_meta else f"laid out as {mask.layout}"
                raise ValueError(
                    f"MaskSet: {name!r} is {where}, wanted a dense tensor; to_dense() makes one of a sparse one"
                )
        with torch.inference_mode(False):  # autograd could not save a mask that was made inside inference mode
            self._masks: dict[str, Tensor] = {
                name: mask.detach().to("cpu", copy=True).contiguous() for name, mask in source.items()
            }
        self._fingerprint: str | None = None

    def __getitem__(self, name: str) -> Tensor:
        with torch.inference_mode(False):
            return self._masks[name].clone()

    def __contains__(self, name: object) -> bool:
        return name in self._masks  # Mapping's own would copy the mask

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
        if not isinstance(other, MaskSet):
            raise ValueError(
                f"MaskSet: the right of & is a {type(other).__name__}, wanted a MaskSet; write & MaskSet(masks)"
            )
        both = dict(self._masks)
        for name, mask in other._masks.items():
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

    def check(self, tensors: Mapping[str, Tensor], *, some: bool = False) -> None:
        """Raise ValueError unless every mask names one of ``tensors`` and has its shape.

        Args:
            tensors: name -> tensor.
            some: not all masks need to find theirs; one does, where there are any.
        """
        absent = some and any(name in tensors for name in self._masks)
        for name, mask in self._masks.items():
            if absent and name not in tensors:
                continue
            if name not in tensors:
                why = "Were the masks made for another model?"
                if f"{name}_orig" in tensors:
                    module, _, short = name.rpartition(".")
                    why = (
                        "torch.nn.utils.prune has taken it apart; call torch.nn.utils.prune.remove("
                        f"model.get_submodule({module!r}), {short!r}) first"
                    )
                raise ValueError(
                    f"MaskSet: there is no tensor {name!r} in this model; it has {', '.join(list(tensors)[:8])}"
                    f"{', ...' if len(tensors) > 8 else ''}. {why}"
                )
            if tensors[name].shape != mask.shape:
                raise ValueError(
                    f"MaskSet: mask {name!r} has shape {tuple(mask.shape)} but the tensor has "
                    f"{tuple(tensors[name].shape)}. Did the model get compacted after the mask was made?"
                )


def _pack(mask: Tensor) -> bytes:
    import numpy as np

    return np.packbits(mask.reshape(-1).numpy(), bitorder="little").tobytes()
