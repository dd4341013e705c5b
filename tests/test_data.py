"""The loaders, on tiny files in the published formats, on damaged and hostile ones, and on the real data."""

import gzip
import json
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from autoflip.fed import data
from autoflip.fed.data import DataError

RNG = np.random.default_rng(0)


def write_idx(path, array, compress=True):
    code = {"uint8": 0x08, "int32": 0x0C}[str(array.dtype)]
    body = (
        struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
        + array.astype(f">{array.dtype.str[1:]}").tobytes()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(body) if compress else body)


def write_mnist(root, folder="MNIST/raw/", n=30, size=28, compress=True, test="t10k", ending=True):
    made = {}
    for side, count in (("train", n), (test, n // 3)):
        made[side] = RNG.integers(0, 256, (count, size, size), np.uint8), (np.arange(count) % 10).astype(np.uint8)
        for what, array, dims in zip(("images", "labels"), made[side], (3, 1)):
            name = f"{side}-{what}" + (f"-idx{dims}-ubyte" if ending else "") + (".gz" if compress else "")
            write_idx(root / (folder + name), array, compress)
    return made


def py2(value):
    """Pickle as Python 2 with protocol 2 did: byte strings, and numpy's old module names."""
    if isinstance(value, np.ndarray):
        head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNI-1\nI-1\nK\x00tb"
        shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in value.shape) + b"t"
        return head + b"(K\x01" + shape + dtype + b"I00\n" + py2(value.tobytes()) + b"tb"
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(py2, value)) + b"e"
    return b"}(" + b"".join(py2(k) + py2(v) for k, v in value.items()) + b"u"


def write_cifar10(root, n=20):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        x, y = RNG.integers(0, 256, (n, 3072), np.uint8), [i % 10 for i in range(n)]
        content = {b"batch_label": b"some batch", b"labels": y, b"data": x, b"filenames": [b"a.png"] * n}
        (folder / name).write_bytes(b"\x80\x02" + py2(content) + b".")
        batches[name] = x, y
    return batches


def write_leaf(folder, users, name="all_data_0.json"):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"users": list(users), "num_samples": [len(u["y"]) for u in users.values()], "user_data": users}
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("compress", [True, False], ids=["gzip", "plain"])
def test_mnist_pixels_and_labels_arrive_normalised(tmp_path, compress):
    made = write_mnist(tmp_path, compress=compress)
    got = data.load("MNIST", tmp_path)
    assert (got.name, got.num_classes, got.input_shape) == ("mnist", 10, (1, 28, 28))
    for split, side in ((got.train, "train"), (got.test, "t10k")):
        want = (torch.from_numpy(made[side][0]).double()[:, None] / 255 - 0.1307) / 0.3081
        # float32 rounding of values below 3
        torch.testing.assert_close(split.x.double(), want, rtol=0, atol=1e-6)
        assert split.x.dtype is torch.float32
        assert split.y.tolist() == made[side][1].tolist()
        assert split.y.dtype is torch.int64
        assert split.group is None
        assert len(split) == len(made[side][1])


@pytest.mark.parametrize("ending", [True, False])
@pytest.mark.parametrize("name, prefix", [("usps", "USPS/raw/usps-"), ("idx:My/own-", "My/own-")])
def test_other_idx_files_use_their_own_moments(tmp_path, name, prefix, ending):
    made = write_mnist(tmp_path, prefix, size=16, test="test", ending=ending)
    got = data.load(name, tmp_path)
    assert (got.name, got.num_classes, got.input_shape) == (name, 10, (1, 16, 16))
    # moments of the pixels themselves: float32 sums over 7680 values
    assert abs(got.train.x.mean()) < 1e-5
    assert abs(got.train.x.std(unbiased=False) - 1) < 1e-5
    pixels = made["train"][0] / 255
    torch.testing.assert_close(
        got.test.x[:, 0].double(),
        torch.from_numpy((made["test"][0] / 255 - pixels.mean()) / pixels.std()),
        rtol=0,
        atol=1e-5,
    )


def test_qmnist_joins_writers_to_mnist_images(tmp_path):
    made = write_mnist(tmp_path)
    for side, mnist, rows in (("train", "train", 30), ("test", "t10k", 25)):
        table = RNG.integers(0, 9, (rows, 8)).astype(np.int32)
        y = made[mnist][1]
        table[: len(y), 0] = y
        write_idx(tmp_path / f"QMNIST/raw/qmnist-{side}-labels-idx2-int.gz", table)
    got = data.load("qmnist", tmp_path)
    assert torch.equal(got.test.group, torch.from_numpy(table[:10, 2].astype(np.int64)))
    assert got.test.group.dtype is torch.int64
    table[3, 0] += 1
    write_idx(tmp_path / "QMNIST/raw/qmnist-test-labels-idx2-int.gz", table)
    with pytest.raises(DataError, match="its classes differ from MNIST's test labels"):
        data.load("qmnist", tmp_path)


def test_cifar10_reads_the_published_pickles(tmp_path):
    batches = write_cifar10(tmp_path)
    got = data.load("cifar10", tmp_path)
    assert (len(got.train), len(got.test), got.input_shape, got.num_classes) == (100, 20, (3, 32, 32), 10)
    mean, std = (torch.tensor(m).view(3, 1, 1) for m in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    want = (torch.from_numpy(batches["data_batch_2"][0][1]).view(3, 32, 32) / 255 - mean) / std
    torch.testing.assert_close(got.train.x[21], want, rtol=0, atol=1e-6)  # float32 rounding of values below 3


def test_cifar_accepts_pickles_of_newer_pythons(tmp_path):
    # no batch is published so, but numpy 2 writes a user's own subset so
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for side in ("train", "test"):
        content = {
            "data": RNG.integers(0, 256, (5, 3072), np.uint8),
            "fine_labels": [0, 99, 5, 6, 7],
            "coarse_labels": [0] * 5,
        }
        (folder / side).write_bytes(pickle.dumps(content, protocol=4))
    got = data.load("cifar100", tmp_path)
    assert got.train.y.tolist() == [0, 99, 5, 6, 7]
    assert got.num_classes == 100


class Evil:
    """Runs a shell command when a plain unpickler meets it."""

    def __init__(self, command="true"):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


HOSTILE = {
    "os.system": lambda p: pickle.dumps({"data": Evil(f"touch {p}"), "labels": []}, protocol=2),
    "builtins": lambda p: pickle.dumps(getattr),
    "numpy.load": lambda p: b"\x80\x02cnumpy\nload\n(U\x03abctR.",
    "dotted name": lambda p: b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
    "memo of 2^31": lambda p: b"\x80\x02}r\xff\xff\xff\x7f.",
    "a string of 2 GB": lambda p: b"\x80\x02T\xff\xff\xff\x7fabc.",
    "deep nesting": lambda p: b"\x80\x02" + b"(" * 100000 + b"t" * 100000 + b".",
    "tuples to hash": lambda p: b"\x80\x02}(K\x01" + b"\x85" * 3_000_000 + b"K\x01u.",
    "persistent id": lambda p: b"\x80\x02Pabc\n.",
    "empty": lambda p: b"",
    "text": lambda p: b"<html>not found</html>",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_pickles_run_nothing(tmp_path, attack):
    write_cifar10(tmp_path)
    trace = tmp_path / "trace"
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = HOSTILE[attack](trace)
    if attack == "os.system":  # the attack is real: a plain unpickler runs it
        pickle.loads(content)
        trace.unlink()
    path.write_bytes(content)
    with pytest.raises(DataError, match="data_batch_3"):
        data.load("cifar10", tmp_path)
    assert not trace.exists()
    assert np.ndarray is type(np.zeros(1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({b"data": [1, 2]}, "not .N, 3072. uint8"),
        ({b"data": np.zeros((3, 10), np.uint8)}, "not .N, 3072. uint8"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "not .N, 3072. uint8, N above 0"),
        ({b"labels": [0] * 19}, "19 labels for 20 samples"),
        ({b"labels": [0] * 19 + [10]}, "labels from 0 to 10; wanted 0..9"),
        ({b"labels": [0] * 19 + [b"x"]}, "not a list of integers"),
        ({b"labels": b"abc"}, "not a list of integers"),
        (None, "has no labels"),
    ],
)
def test_cifar_batches_that_do_not_add_up(tmp_path, change, message):
    write_cifar10(tmp_path)
    content = {b"data": np.zeros((20, 3072), np.uint8)}
    if change is not None:
        content |= {b"labels": [0] * 20} | change
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"\x80\x02" + py2(content) + b".")
    with pytest.raises(DataError, match=f"data_batch_1: .*{message}"):
        data.load("cifar10", tmp_path)


def idx_bytes(magic, sizes, body):
    return struct.pack(f">I{len(sizes)}I", magic, *sizes) + body


IMAGES = idx_bytes(2051, (30, 28, 28), bytes(30 * 784))
DAMAGE = {
    "truncated gzip": (gzip.compress(IMAGES[:16] + RNG.bytes(23520))[:5000], "cannot be read to its end"),
    "no gzip trailer": (gzip.compress(IMAGES)[:-8], "cannot be read to its end"),
    "wrong checksum": (gzip.compress(IMAGES)[:-8] + bytes(8), "cannot be read to its end"),
    "too short": (IMAGES[:116], "promises 30x28x28 uint8, 23520 bytes, but 100 follow"),
    "too long": (IMAGES + b"x", "but more than that follow"),
    "sizes of 2^32 - 1": (idx_bytes(2051, (2**32 - 1,) * 3, bytes(100)), "but 100 follow"),
    "labels instead": (idx_bytes(2049, (30,), bytes(30)), "begins with 00000801; wanted .*magic 00000803"),
    "no images": (idx_bytes(2051, (0, 28, 28), b""), "holds no pixels"),
    "other count": (idx_bytes(2051, (29, 28, 28), bytes(29 * 784)), "30 labels for 29 samples"),
    "empty": (b"", "begins with nothing"),
    "html": (b"<html>404</html>", "begins with 3c68746d"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_idx_files_are_named(tmp_path, damage):
    write_mnist(tmp_path, compress=False)
    content, message = DAMAGE[damage]
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        data.load("mnist", tmp_path)
    assert "MNIST/raw/train-" in str(error.value)


def test_labels_out_of_range_are_named(tmp_path):
    write_mnist(tmp_path, compress=False)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(idx_bytes(2049, (10,), bytes([11] * 10)))
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: has labels from 11 to 11; wanted 0..9"):
        data.load("mnist", tmp_path)


def test_femnist_groups_by_writer_over_all_files(tmp_path):
    image = [1.0] * 783
    for side, n in (("train", 2), ("test", 1)):
        folder = tmp_path / "femnist/data" / side
        write_leaf(folder, {"w2": {"x": [[0.0, *image]] * n, "y": [61] * n}, "w0": {"x": [], "y": []}}, "a.json")
        write_leaf(folder, {"w1": {"x": [[0.5, *image]], "y": [3]}}, "b.json")
    got = data.load("femnist", tmp_path)
    assert got.train.group.tolist() == [0, 1, 1]
    assert got.train.y.tolist() == [3, 61, 61]
    assert got.test.group.tolist() == [0, 1]
    assert got.input_shape == tuple(got.train.x.shape[1:]) == (1, 28, 28)
    # 1 is paper, as in the file
    assert got.train.x[0, 0, 0, 0] < got.train.x[0, 0, 0, 1]
    assert got.train.x[1, 0, 0, 0] < got.train.x[0, 0, 0, 0]


def test_shakespeare_uses_leafs_alphabet(tmp_path):
    assert len(data.VOCABULARY) == len(set(data.VOCABULARY)) == 80
    window = "To be, or not to be: that is the question".ljust(79) + "$"
    for side in ("train", "test"):
        write_leaf(tmp_path / "shakespeare/data" / side, {"HAMLET": {"x": [window], "y": ["\n"]}})
    got = data.load("shakespeare", tmp_path)
    text = "".join(data.VOCABULARY[i] for i in got.train.x[0].tolist())
    assert text == window[:79] + " "
    assert got.train.y.tolist() == [0]
    assert (got.train.x.dtype, got.num_classes, got.input_shape) == (torch.int64, 80, (80,))


def leaf_of(x, y, count=1):
    return json.dumps({"users": ["a"], "num_samples": [count], "user_data": {"a": {"x": x, "y": y}}})


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("femnist", "{", "is not a LEAF file"),
        ("femnist", "[1]", "is not a LEAF file"),
        ("femnist", "[" * 200000, "is not a LEAF file"),
        ("femnist", '{"users": ["a"], "num_samples": [1], "user_data": {}}', "KeyError"),
        ("femnist", '{"users": ["a"], "num_samples": [], "user_data": {}}', "is not a LEAF file"),
        ("femnist", '{"users": [], "num_samples": [], "user_data": {}}', "hold no sample"),
        ("femnist", json.dumps(json.loads(leaf_of([], [], 0)) | {"users": ["a", "a"]}), "a user is listed twice"),
        ("femnist", leaf_of([[0]], [0], count=2), "has 1 x and 1 y, num_samples says 2"),
        ("femnist", leaf_of([[0]], [0, 0]), "has 1 x and 2 y"),
        ("femnist", leaf_of([[0]], [0]), r"user a: x has shape \(1, 1\)"),
        ("femnist", leaf_of([["b"]], [0]), "user a: x is not numbers"),
        ("femnist", leaf_of([[2.0] * 784], [0]), r"user a: .*in \[0, 1\]"),
        ("femnist", leaf_of([[float("nan")] * 784], [0]), r"user a: .*in \[0, 1\]"),
        ("femnist", leaf_of([[0.5] * 784], [62]), "user a: has labels from 62 to 62; wanted 0..61"),
        ("femnist", leaf_of([[0.5] * 784], [0.5]), "user a: its labels are not a list of integers"),
        ("shakespeare", leaf_of(["b"], ["c"]), "user a: some x is not a string of 80 characters"),
        ("shakespeare", leaf_of(["b" * 80], [3]), "user a: some y is not one character"),
    ],
    ids=range(17),
)
def test_damaged_leaf_files_are_named(tmp_path, name, content, message):
    folder = tmp_path / name / "data" / "train"
    folder.mkdir(parents=True)
    (tmp_path / name / "data" / "test").mkdir()
    (folder / "all_data_x.json").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        data.load(name, tmp_path)
    assert str(folder) in str(error.value)


def write_har(root, **change):
    n = 12
    arrays = {
        "x": RNG.normal(3, 5, (n, 9, 128)).astype(np.float16),
        "y": (np.arange(n) % 6).astype(np.uint8),
        "subject": (np.arange(n) % 4 + 1).astype(np.uint8),
        "is_test": (np.arange(n) % 3 == 0).astype(np.uint8),
    } | change
    (root / "HAR").mkdir(exist_ok=True)
    np.savez(root / "HAR" / "har.npz", **arrays)


def test_har_is_standardised_by_its_training_windows(tmp_path):
    write_har(tmp_path)
    got = data.load("har", tmp_path)
    assert (len(got.train), len(got.test), got.input_shape, got.num_classes) == (8, 4, (9, 128), 6)
    assert got.train.group.tolist() == [2, 3, 1, 2, 4, 1, 3, 4]
    # float32 rounding of a mean over 1024 values
    assert got.train.x.mean((0, 2)).abs().max() < 1e-5
    assert (got.train.x.std((0, 2), unbiased=False) - 1).abs().max() < 1e-5


def test_har_may_say_by_bools_what_is_a_test(tmp_path):
    write_har(tmp_path, is_test=np.arange(12) % 3 == 0)
    assert len(data.load("har", tmp_path).test) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": np.zeros((12, 9, 127))}, r"wanted finite floats \(N, 9, 128\)"),
        ({"x": np.full((12, 9, 128), np.nan)}, "wanted finite floats"),
        ({"x": np.full((12, 9, 128), 1e39)}, "wanted finite floats"),  # beyond float32
        ({"y": np.full(12, 6)}, "wanted 0..5"),
        ({"y": np.zeros(11, int)}, "11 labels for 12 samples"),
        ({"is_test": np.zeros(12, int)}, "is_test marks 0 of 12"),
        ({"y": np.array([Evil()] * 12, object)}, "cannot be read"),
    ],
)
def test_har_that_does_not_add_up(tmp_path, change, message):
    write_har(tmp_path, **change)
    with pytest.raises(DataError, match=f"har.npz: .*{message}"):
        data.load("har", tmp_path)


def test_damaged_archives_are_named(tmp_path):
    write_har(tmp_path)
    path = tmp_path / "HAR" / "har.npz"
    good = path.read_bytes()
    for at in (4, 6, 8):  # version, flags (1: encrypted) and method of the first entry, here and in the directory
        damaged = bytearray(good)
        for head, skipped in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
            place = good.index(head) + at + skipped
            damaged[place] ^= 0x61
        path.write_bytes(bytes(damaged))
        with pytest.raises(DataError, match="har.npz: cannot be read"):
            data.load("har", tmp_path)


def test_har_cut_off(tmp_path):
    write_har(tmp_path)
    path = tmp_path / "HAR/har.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="har.npz: cannot be read"):
        data.load("har", tmp_path)


def test_digits_need_no_files(monkeypatch):
    monkeypatch.delenv("AUTOFLIP_DATA", raising=False)
    got = data.load("digits")
    assert (len(got.train) + len(got.test), got.input_shape, got.num_classes) == (1797, (1, 8, 8), 10)
    share = got.test.y.bincount() / (got.train.y.bincount() + got.test.y.bincount())
    assert ((share > 0.19) & (share < 0.21)).all()
    assert abs(got.train.x.mean()) < 1e-2
    assert abs(got.train.x.std() - 1) < 1e-2
    assert torch.equal(data.load("digits").train.x, got.train.x)


def test_importing_data_does_not_import_sklearn():
    code = "import sys, autoflip.fed.data; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "name, source",
    [
        ("mnist", "ossci-datasets"),
        ("fashion-mnist", "zalandoresearch"),
        ("qmnist", "ossci-datasets"),
        ("usps", "libsvmtools"),
        ("cifar10", "kriz"),
        ("cifar100", "kriz"),
        ("femnist", "TalwalkarLab/leaf"),
        ("shakespeare", "TalwalkarLab/leaf"),
        ("har", "archive.ics.uci.edu"),
        ("idx:a/b-", "publisher"),
    ],
)
def test_missing_files_say_where_to_get_them(tmp_path, name, source):
    with pytest.raises(DataError, match="is missing; wanted") as error:
        data.load(name, tmp_path)
    for part in (str(tmp_path), source, "--data-root", "AUTOFLIP_DATA"):
        assert part in str(error.value)


def test_no_root(tmp_path, monkeypatch):
    monkeypatch.delenv("AUTOFLIP_DATA", raising=False)
    with pytest.raises(DataError, match="give --data-root DIR or set AUTOFLIP_DATA=DIR"):
        data.load("mnist")
    monkeypatch.setenv("AUTOFLIP_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere .AUTOFLIP_DATA. is no folder"):
        data.load("mnist")
    write_mnist(tmp_path)
    monkeypatch.setenv("AUTOFLIP_DATA", str(tmp_path))
    assert len(data.load("mnist").train) == 30


@pytest.mark.parametrize("name, near", [("cifar-11", "cifar1"), ("fashon", "fashion-mnist"), ("mnit", "mnist")])
def test_unknown_name_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"did you mean '{near}"):
        data.load(name, "/")


REAL = {  # who made the samples, where the files say so
    "mnist": None,
    "fashion-mnist": None,
    "qmnist": 539,
    "cifar10": None,
    "cifar100": None,
    "femnist": 62,
    "shakespeare": 60,
    "har": 30,
}


@pytest.mark.parametrize("name", REAL)
def test_real_data(data_root, name):
    try:
        got = data.load(name, data_root)
    except DataError as error:
        if "is missing" not in str(error):
            raise
        pytest.skip(str(error))
    assert set(got.train.y.unique().tolist()) == set(got.test.y.unique().tolist()) == set(range(got.num_classes)) or (
        name in ("femnist", "shakespeare")  # rare letters
    )
    if "mnist" in name and name != "femnist":
        assert (len(got.train), len(got.test)) == (60000, 10000)
    if REAL[name]:
        assert len(got.train.group.unique()) >= REAL[name]
    else:
        assert got.train.group is None
    if got.train.x.is_floating_point():
        # the moments are those of the complete published sets, in 4 digits; the files may hold a sample of them
        assert abs(got.train.x.mean()) < 0.05
        assert abs(got.train.x.std() - 1) < 0.05
