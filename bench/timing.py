"""Time several ways of doing one thing against the plain one, in turns; and what machine it was."""

import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

Step = Callable[[], object]


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


def clock(step: Step, calls: int) -> float:
    """Return seconds a call."""
    # on one thread its CPU time: what other processes take of a shared core is not ours
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    for _ in range(calls):
        step()
    return (now() - start) / calls


def keep_memory() -> None:
    """Tell glibc to keep freed memory, so that no step pays page faults by the luck of what was freed before it.

    Blocks above 32 MiB (the gradient of a 4096 x 4096 weight) otherwise come now from the heap, now from the system:
    dense at batch 16 took 34 or 60 ms, case by case. Smaller blocks stay in the process anyway.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def gpu_clock(step: Step, calls: int) -> float:
    """Return seconds a call on the current CUDA device, calls queued one after the other."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def interleaved(
    dense: Step,
    others: dict[str, Step],
    pairs: int = 15,
    seconds: float = 0.001,
    limit: float = 60.0,
    clock: Callable[[Step, int], float] = clock,
) -> tuple[dict[str, list[float]], float]:
    """Return (name -> step / dense, one number a pair; median seconds of dense).

    Each of ``others`` is timed for about ``seconds`` right after ``dense`` was; the order of ``others`` turns by one
    every round. ``limit`` seconds end it early, after three rounds at least.
    """
    began = time.perf_counter()

    def calls_of(step: Step) -> int:
        # the first call may build what later ones use; three more settle caches, but not of what takes long anyway
        if clock(step, 1) > 10 * seconds:
            return 1
        return max(1, int(seconds / max(clock(step, 3), 1e-9)))

    calls, names = {name: calls_of(step) for name, step in {"": dense, **others}.items()}, list(others)
    found: dict[str, list[float]] = {name: [] for name in names}
    base = []
    for i in range(pairs):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            base.append(clock(dense, calls[""]))
            found[name].append(clock(others[name], calls[name]) / base[-1])
        if i >= 2 and time.perf_counter() - began > limit:
            break
    return found, statistics.median(base)


def quartiles(values: list[float]) -> list[float]:
    """Return [lower quartile, median, upper quartile]."""
    return [round(v, 4) for v in statistics.quantiles(values, n=4, method="inclusive")]


# twelve chains hide the latency of a fused multiply-add on two ports; the empty asm keeps each sum in its register
_FMA = """
typedef float v __attribute__((vector_size(BYTES)));
float run(long n) {
  v x = {1e-6f}, y = {0.5f};
  v a0 = x, a1 = x, a2 = x, a3 = x, a4 = x, a5 = x, a6 = x, a7 = x, a8 = x, a9 = x, a10 = x, a11 = x;
  for (long j = 0; j < n; ++j) {
#define F(a) a = a * y + x; __asm__ volatile("" : "+x"(a));
    F(a0) F(a1) F(a2) F(a3) F(a4) F(a5) F(a6) F(a7) F(a8) F(a9) F(a10) F(a11)
  }
  v s = a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9 + a10 + a11;
  return s[0];
}
"""


def fma_peak() -> float | None:
    """Return this core's float32 multiply-add rate in GFLOP/s from registers; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    best = 0.0
    for width in (64, 32):
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "fma.c"), Path(folder, "fma.so")
            source.write_text(_FMA if width == 32 else _FMA.replace("+x", "+v"))
            flags = ["-O2", f"-DBYTES={width}", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
            if subprocess.run([compiler, *flags, source, "-o", library], capture_output=True).returncode:
                continue
            run = ctypes.CDLL(str(library)).run
            run.argtypes, run.restype = [ctypes.c_long], ctypes.c_float
            run(10**6)  # the core's clock settles
            for _ in range(5):
                start = time.thread_time()
                run(4 * 10**6)
                best = max(best, 4e6 * 12 * 2 * (width // 4) / (time.thread_time() - start) / 1e9)
    return round(best, 1) or None
