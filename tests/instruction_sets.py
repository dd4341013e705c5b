"""Run tests again on the instruction sets below this process's own: AUTOFLIP_CPU is read once per process."""

import os
import subprocess
import sys

import pytest

from autoflip.ops import backend

_ALL = ("base", "avx2", "avx512")


def _levels():
    module, _ = backend.extension("_C")
    own = _ALL.index(module.isa()) if module is not None else len(_ALL)
    for i, isa in enumerate(_ALL):
        why = f"{isa} is what this file's other tests run on here" if i == own else f"no {isa} in this process"
        yield pytest.param(isa, marks=pytest.mark.skip(reason=why) if i >= own else ())


LEVELS = tuple(_levels())


def rerun(file, isa, *names):
    """Run the named tests of ``file`` in a process of their own on one instruction set; they must pass."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"{file}::{name}" for name in names)],
        env={**os.environ, "AUTOFLIP_CPU": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
