"""Run tests again on each instruction set: AUTOFLIP_CPU is read once per process."""

import os
import subprocess
import sys

LEVELS = ("base", "avx2", "avx512")  # a CPU without one of them runs the best that it has


def rerun(file, isa, *names):
    """Run the named tests of ``file`` in a process of their own on one instruction set; they must pass."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"{file}::{name}" for name in names)],
        env={**os.environ, "AUTOFLIP_CPU": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
