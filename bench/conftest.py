"""Every bench prints its machine, carries it in extra_info, and checks its results before it times anything."""

import os
import platform
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ.get("AUTOFLIP_BENCH_THREADS", "1")))


def machine() -> dict[str, str]:
    """Return what a number needs beside it: CPU, cores, threads, GPU, versions, load."""
    from autoflip.ops import backend

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    module, why = backend.extension("_C")
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "isa": module.isa() if module else why,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


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
