"""LEAF's federated data sets from its json files: FEMNIST by writer, Shakespeare by role (arXiv:1812.01097)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoflip.fed import readers
from autoflip.fed.dataset import Dataset, Split
from autoflip.fed.readers import DataError

__all__ = ["VOCABULARY", "femnist", "shakespeare"]

# LEAF's 80 characters, in LEAF's order (models/utils/language_utils.py)
VOCABULARY = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
_SPACE = VOCABULARY.index(" ")
# of FEMNIST's pixels: the 8847 training samples in a 5 % LEAF sample
_MEAN, _STD = 0.9612, 0.1657
_SOURCE = "https://github.com/TalwalkarLab/leaf (preprocess.sh makes data/train and data/test)"


def femnist(root: Path) -> Dataset:
    """LEAF's FEMNIST: 28x28, 1 = paper and 0 = ink as in the files; digits, upper case, lower case; by writer."""

    def convert(where: str, x: list, y: list) -> tuple[Tensor, Tensor]:
        try:
            pixels = np.asarray(x, np.float32)
        except (ValueError, TypeError, OverflowError) as error:
            raise DataError(f"{where}: x is not numbers ({error}); wanted 784 in [0, 1] a sample") from error
        if pixels.shape != (len(y), 784) or not (pixels.min() >= 0 and pixels.max() <= 1):
            raise DataError(f"{where}: x has shape {pixels.shape}; wanted (N, 784) in [0, 1]")
        labels = readers.class_ids(where, y, len(x), 62)
        return torch.from_numpy(pixels).view(-1, 1, 28, 28).sub_(_MEAN).div_(_STD), torch.from_numpy(labels)

    train, test = _splits(root, "femnist", convert)
    return Dataset("femnist", train, test, 62, (1, 28, 28))


def shakespeare(root: Path) -> Dataset:
    """LEAF's next-character task: 80 characters -> the next; by role; whatever is not in `VOCABULARY` is a space."""
    table = {c: i for i, c in enumerate(VOCABULARY)}

    def convert(where: str, x: list, y: list) -> tuple[Tensor, Tensor]:
        if not all(isinstance(s, str) and len(s) == 80 for s in x):
            raise DataError(f"{where}: some x is not a string of 80 characters; wanted 80 in each")
        if not all(isinstance(c, str) and len(c) == 1 for c in y):
            raise DataError(f"{where}: some y is not one character; wanted the one that follows x")
        ids = np.array([[table.get(c, _SPACE) for c in s] for s in x], np.int64)
        return torch.from_numpy(ids), torch.tensor([table.get(c, _SPACE) for c in y])

    train, test = _splits(root, "shakespeare", convert)
    return Dataset("shakespeare", train, test, len(VOCABULARY), (80,))


def _splits(root: Path, name: str, convert: Callable[[str, list, list], tuple[Tensor, Tensor]]) -> list[Split]:
    """Read both sides; groups number the users of both in sorted order, samples lie by group.

    ``convert`` turns the x and y of one user into tensors; its first argument says where they come from.
    """
    sides: list[dict[str, list[tuple[Tensor, Tensor]]]] = []
    for side in ("train", "test"):
        folder = root / name / "data" / side
        if not folder.is_dir():
            raise readers.missing(folder, f"the folder of {name}'s {side} files all_data_*.json", _SOURCE)
        sides.append({})
        for path, user, x, y in readers.read_leaf(folder):
            if y:
                sides[-1].setdefault(user, []).append(convert(f"{path}: user {user}", x, y))
        if not sides[-1]:
            raise DataError(f"{folder}: its files hold no sample; wanted at least one")
    ids = {user: i for i, user in enumerate(sorted(sides[0].keys() | sides[1].keys()))}
    splits = []
    for users in sides:
        parts = [(x, y, torch.full_like(y, ids[user])) for user in sorted(users) for x, y in users[user]]
        splits.append(Split(*(torch.cat(tensors) for tensors in zip(*parts))))
    return splits
