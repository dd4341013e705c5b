"""Every bench prints its machine, carries it in extra_info, and checks its results before it times anything."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from timing import machine

torch.set_num_threads(int(os.environ.get("AUTOFLIP_BENCH_THREADS", "1")))


def pytest_report_header():
    return "machine: " + ", ".join(f"{k} {v}" for k, v in machine().items())


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(machine())


@pytest.fixture
def gate(benchmark):
    """Refuse to time a wrong result: ``gate(got, want, atol)``; also writes the machine into extra_info."""
    benchmark.extra_info.update(machine())

    def check(got, want, atol):
        torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol)

    return check
