"""Shared fixtures: GPU marker, Triton's interpreter where there is no GPU, where real data lies."""

import os

import torch

# by rule, not by a timing of the machine at hand: tests/test_trials.py turns trials on
os.environ.setdefault("AUTOFLIP_TRIALS", "off")

if not torch.cuda.is_available():  # must stand before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pathlib import Path

import pytest

try:
    from hypothesis import settings
except ImportError:  # most tests do without
    pass
else:  # how long an example takes depends on what else the machine does
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() or os.environ.get("AUTOFLIP_REQUIRE_GPU") == "1":
        return  # a GPU run must not pass by skipping
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads of a busy machine make sums depend on nothing but luck; the default is one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data sets (AUTOFLIP_DATA); tests that need it are skipped elsewhere."""
    root = os.environ.get("AUTOFLIP_DATA")
    if not root:
        pytest.skip("AUTOFLIP_DATA does not name a folder of real data sets")
    return Path(root)
