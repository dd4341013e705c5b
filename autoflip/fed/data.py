"""Data sets as tensors, read from files that lie on this machine.

Nothing is downloaded, and CIFAR's pickles are read without running what they ask for.

Folders under the root are those of torchvision and LEAF::

    MNIST/raw  FashionMNIST/raw  QMNIST/raw  USPS/raw  IDX files, gzip or plain
    cifar-10-batches-py  cifar-100-python              the Python version's batches, complete or a subset
    femnist/data/{train,test}                          LEAF json
    shakespeare/data/{train,test}                      LEAF json
    HAR/har.npz                                        arrays x (N, 9, 128), y, subject, is_test

``idx:PREFIX`` reads any other pair of IDX files: PREFIX is the path below the root up to ``train-images``, so
``idx:KMNIST/raw/`` and ``idx:EMNIST/raw/emnist-balanced-`` work. ``digits`` comes with scikit-learn.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoflip.fed import readers
from autoflip.fed.dataset import Dataset, Split
from autoflip.fed.leaf import VOCABULARY, femnist, shakespeare
from autoflip.fed.readers import DataError

__all__ = ["NAMES", "VOCABULARY", "DataError", "Dataset", "Split", "load"]

# mean and standard deviation per channel of the published training sets, pixels in [0, 1]
_MOMENTS = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "digits": ((0.3053,), (0.3760,)),
}


def load(name: str, root: str | os.PathLike[str] | None = None) -> Dataset:
    """Return the data set ``name``, read from below ``root``.

    Args:
        name: one of `NAMES`, or ``idx:PREFIX``; case and dashes do not matter.
        root: folder of the data; default: the environment variable AUTOFLIP_DATA. ``digits`` needs none.

    Images are float32, ``(pixel / 255 - mean) / std`` per channel with the published moments of the training set
    (``idx:`` and ``usps``: those of the file; HAR: per channel of its training windows).

    Raises:
        DataError: a file is missing or damaged; the message names it, what was expected, and where it comes from.
        ValueError: no such data set.
    """
    if name.startswith("idx:"):
        return _idx(name, _root(name, root), name[4:], _ANY)
    key = _KEYS.get(_key(name))
    if key is None:
        near = difflib.get_close_matches(_key(name), _KEYS, n=1, cutoff=0.4)
        hint = f"; did you mean {_KEYS[near[0]]!r}?" if near else "."
        raise ValueError(
            f"data: there is no data set {name!r}{hint} Known: {', '.join(NAMES)}, and idx:PREFIX for other IDX files."
        )
    return _digits() if key == "digits" else _LOADERS[key](_root(key, root))


def canonical(name: str) -> str:
    """Return how :data:`NAMES` spells ``name`` (case and dashes do not matter); unknown names as they are."""
    return _KEYS.get(_key(name), name)


def _key(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _root(name: str, root: str | os.PathLike[str] | None) -> Path:
    chosen = root if root is not None else os.environ.get("AUTOFLIP_DATA", "")
    told = "--data-root" if root is not None else "AUTOFLIP_DATA"
    if not str(chosen):
        raise DataError(
            f"data: {name} lies in files and no folder was named; give --data-root DIR or set AUTOFLIP_DATA=DIR. "
            "The data set 'digits' needs no files."
        )
    path = Path(chosen).expanduser()
    if not path.is_dir():
        raise DataError(f"data: {path} ({told}) is no folder; wanted the folder that holds {name}")
    return path


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/ (four files *-ubyte.gz)"
_FASHION = "https://github.com/zalandoresearch/fashion-mnist (four files *-ubyte.gz)"
_QMNIST = "https://github.com/facebookresearch/qmnist (qmnist-{train,test}-labels-idx2-int.gz)"
_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html (the Python version, unpacked)"
_HAR = "https://archive.ics.uci.edu/dataset/240 (its windows as arrays x (N, 9, 128), y, subject, is_test)"
_ANY = "the publisher of that data set (IDX files as MNIST's)"
_USPS = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/ (usps, written as IDX files)"


def _image_split(
    images: np.ndarray, y: np.ndarray, moments: tuple[Sequence[float], Sequence[float]], group: Tensor | None = None
) -> Split:
    """Normalise uint8 images ``(N, C, H, W)`` in place of their float32 copy: one copy lives at a time."""
    x = torch.from_numpy(images).float()
    mean, std = (torch.tensor(m).view(1, -1, 1, 1) for m in moments)
    # x / 255 / std - mean / std in two passes over the memory instead of three
    x.mul_(1 / (255 * std)).sub_(mean / std)
    return Split(x, torch.from_numpy(y), group)


def _moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of uint8 images, pixels in [0, 1]."""
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256)
        for start in range(0, len(images), 4096):
            counts += np.bincount(images[start : start + 4096, channel].ravel(), minlength=256)
        share, value = counts / counts.sum(), np.arange(256) / 255
        means.append(float(share @ value))
        stds.append(max(float((share @ (value - means[-1]) ** 2) ** 0.5), 1e-6))
    return means, stds


def _idx_pair(images: Path, labels: Path, classes: int | None) -> tuple[np.ndarray, np.ndarray]:
    x, raw = readers.read_idx(images, "uint8", 3), readers.read_idx(labels, "uint8", 1)
    if x.size == 0:
        raise DataError(f"{images}: holds no pixels (shape {x.shape}); wanted at least one image")
    return x[:, None], readers.class_ids(labels, raw, len(x), classes or 256)


def _idx(name: str, root: Path, prefix: str, source: str, classes: int | None = None) -> Dataset:
    """Read ``PREFIX{train,t10k or test}-{images,labels}``, with MNIST's endings or bare."""
    raw = {}
    for side, spellings in (("train", ("train",)), ("test", ("t10k", "test"))):
        pair = []
        for what, ending in (("images", "-idx3-ubyte"), ("labels", "-idx1-ubyte")):
            paths = [root / f"{prefix}{s}-{what}{e}" for s in spellings for e in (ending, "")]
            pair.append(readers.find(paths, f"the {what} of the {side} set of {name} as an IDX file", source))
        raw[side] = _idx_pair(pair[0], pair[1], classes)
    (x, y), (x_test, y_test) = raw["train"], raw["test"]
    if x.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"{root / prefix}: training images are {x.shape[2:]}, test images {x_test.shape[2:]}; wanted one size"
        )
    moments = _MOMENTS.get(name) or _moments(x)
    count = classes or int(max(y.max(), y_test.max())) + 1
    return Dataset(name, _image_split(x, y, moments), _image_split(x_test, y_test, moments), count, x.shape[1:])


def _qmnist(root: Path) -> Dataset:
    """MNIST's images with the writer of each digit: column 2 of QMNIST's label files, row by row."""
    base = _idx("mnist", root, "MNIST/raw/", _MNIST, 10)
    splits = []
    for side, split in (("train", base.train), ("test", base.test)):
        wanted = f"the writers of MNIST's {side} digits"
        path = readers.find([root / f"QMNIST/raw/qmnist-{side}-labels-idx2-int"], wanted, _QMNIST)
        rows = readers.read_idx(path, "int32", 2)
        if rows.shape[1] < 3 or len(rows) < len(split):
            raise DataError(f"{path}: has shape {rows.shape}; wanted at least {len(split)} rows of 8 columns")
        rows = rows[: len(split)]
        if not np.array_equal(rows[:, 0], split.y.numpy()):
            raise DataError(f"{path}: its classes differ from MNIST's {side} labels; wanted the same digits in order")
        splits.append(Split(split.x, split.y, torch.from_numpy(rows[:, 2].astype(np.int64))))
    return Dataset("qmnist", splits[0], splits[1], 10, base.input_shape)


def _cifar(root: Path, name: str) -> Dataset:
    ten = name == "cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    files = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    if not ten:
        files = {"train": ["train"], "test": ["test"]}
    splits = []
    for names in files.values():
        parts = []
        for file in names:
            if not (folder / file).is_file():
                raise readers.missing(folder / file, f"a batch of {name} (Python version)", _CIFAR)
            parts.append(readers.read_cifar(folder / file, "labels" if ten else "fine_labels", 10 if ten else 100))
        x, y = (np.concatenate(p) for p in zip(*parts))
        splits.append(_image_split(x, y, _MOMENTS[name]))
    return Dataset(name, splits[0], splits[1], 10 if ten else 100, (3, 32, 32))


def _har(root: Path) -> Dataset:
    """UCI HAR windows: 9 channels of 128 steps, 6 activities, by subject."""
    path = root / "HAR" / "har.npz"
    if not path.is_file():
        raise readers.missing(path, "the windows of UCI HAR as an .npz file", _HAR)
    arrays = readers.read_npz(path, ("x", "y", "subject", "is_test"))
    x, subject, is_test = (arrays[n] for n in ("x", "subject", "is_test"))
    kind = x.dtype
    with np.errstate(all="ignore"):
        x = x.astype(np.float32) if kind.kind == "f" else x
    if x.ndim != 3 or x.shape[1:] != (9, 128) or kind.kind != "f" or not np.isfinite(x).all():
        raise DataError(f"{path}: x is {kind} {x.shape}; wanted finite floats (N, 9, 128)")
    y = readers.class_ids(path, arrays["y"], len(x), 6)
    group = readers.class_ids(path, subject, len(x), 1 << 31)
    marks = is_test.astype(np.uint8) if is_test.dtype == bool else is_test
    held = readers.class_ids(path, marks, len(x), 2).astype(bool)
    if held.all() or not held.any():
        raise DataError(f"{path}: is_test marks {held.sum()} of {len(x)} windows; wanted some of each")
    mean = x[~held].mean((0, 2), keepdims=True, dtype=np.float64)
    std = np.maximum(x[~held].std((0, 2), keepdims=True, dtype=np.float64), 1e-6)
    x = ((x - mean) / std).astype(np.float32)
    train, test = (Split(*(torch.from_numpy(a[side]) for a in (x, y, group))) for side in (~held, held))
    return Dataset("har", train, test, 6, (9, 128))


def _digits() -> Dataset:
    """scikit-learn's 8x8 digits; every fifth sample of a class, in the published order, is a test sample."""
    from sklearn.datasets import load_digits  # a second to import: only who asks for digits pays it

    images, y = load_digits(return_X_y=True)
    y = y.astype(np.int64)
    held = np.zeros(len(y), bool)
    for label in range(10):
        held[np.flatnonzero(y == label)[4::5]] = True
    mean, std = _MOMENTS["digits"][0][0], _MOMENTS["digits"][1][0]
    x = torch.from_numpy(((images / 16 - mean) / std).astype(np.float32)).view(-1, 1, 8, 8)
    train, test = (Split(x[torch.from_numpy(side)], torch.from_numpy(y[side])) for side in (~held, held))
    return Dataset("digits", train, test, 10, (1, 8, 8))


_LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "mnist": lambda root: _idx("mnist", root, "MNIST/raw/", _MNIST, 10),
    "fashion-mnist": lambda root: _idx("fashion-mnist", root, "FashionMNIST/raw/", _FASHION, 10),
    "qmnist": _qmnist,
    "usps": lambda root: _idx("usps", root, "USPS/raw/usps-", _USPS),
    "cifar10": lambda root: _cifar(root, "cifar10"),
    "cifar100": lambda root: _cifar(root, "cifar100"),
    "femnist": femnist,
    "shakespeare": shakespeare,
    "har": _har,
}
NAMES = ("digits", *_LOADERS)
_KEYS = {_key(name): name for name in NAMES}
