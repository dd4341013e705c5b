"""``autoflip info``: the machine, the extensions, and which backend serves which op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

__all__ = ["collect", "show"]


def collect() -> dict[str, Any]:
    """Return what this machine can do, as plain values."""
    import torch

    from autoflip import __version__, meter
    from autoflip.ops import backend

    cpp, why_no_cpp = backend.extension("_C")
    cuda, why_no_cuda = backend.extension("_cuda")
    try:
        triton, why_no_triton = importlib.metadata.version("triton"), ""
    except importlib.metadata.PackageNotFoundError:
        triton, why_no_triton = "", backend.unavailable("triton", "cuda")
    if triton and not torch.cuda.is_available():
        why_no_triton = "installed, but torch sees no CUDA device"
    if cuda is not None and not torch.cuda.is_available():
        why_no_cuda = "built, but torch sees no CUDA device"
    return {
        "autoflip": __version__,
        "python": platform.python_version(),
        "machine": meter.machine(),
        "wish": os.environ.get("AUTOFLIP_BACKEND", "auto"),
        "extensions": {
            "cpp": {"isa": cpp.isa() if cpp is not None else None, "why_not": why_no_cpp},
            "cuda": {"built": cuda is not None, "why_not": why_no_cuda},
            "triton": {"version": triton or None, "why_not": why_no_triton},
        },
        "kernels": [
            {"op": op, "device": device, "backend": chosen, "why_not": why}
            for op, device, chosen, why in backend.table()
        ],
    }


def show(facts: dict[str, Any]) -> None:
    """Print what :func:`collect` returned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    def line(name: str, words: object) -> None:
        console.print(Text(f"{name:<10}", style="bold") + Text(str(words)))

    extensions = facts["extensions"]
    line("autoflip", f"{facts['autoflip']}, Python {facts['python']}")
    for name, value in facts["machine"].items():
        if name != "autoflip":
            line(name, "-" if value is None else value)
    cpp, cuda, triton = (extensions[name] for name in ("cpp", "cuda", "triton"))
    line("cpp", f"runs {cpp['isa']} code" if cpp["isa"] else f"no: {cpp['why_not']}")
    line("cuda", f"no: {cuda['why_not'].removeprefix('_cuda: ')}" if cuda["why_not"] else "yes")
    line("triton", f"no: {triton['why_not']}" if triton["why_not"] else triton["version"])
    line("backend", f"{facts['wish']} (AUTOFLIP_BACKEND)")
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("op", "device", "served by", "the others"):
        grid.add_column(heading)
    for row in facts["kernels"]:
        grid.add_row(*(Text(row[key]) for key in ("op", "device", "backend", "why_not")))
    console.print(grid)
