"""``autoflip info``: the machine, the extensions, and which backend serves which op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

__all__ = ["collect", "show"]

_LEVELS = ("base", "avx2", "avx512")
_SHOWN = 20  # choices of trials; a machine that is used a while remembers thousands


def collect() -> dict[str, Any]:
    """Return what this machine can do, as plain values."""
    import torch

    from autoflip import __version__, meter
    from autoflip.ops import backend, trials

    cpp, why_no_cpp = backend.extension("_C")
    isa = cpp.isa() if cpp is not None else None
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
        "wish": backend.wish(),
        "wish_error": backend.wish_error(),
        "extensions": {
            "cpp": {
                "isa": isa,
                "amx": cpp is not None and cpp.multiplies_tiles(),
                "note": _isa_note(isa),
                "why_not": why_no_cpp,
            },
            "cuda": {"built": cuda is not None, "why_not": why_no_cuda},
            "triton": {"version": triton or None, "why_not": why_no_triton},
        },
        "kernels": [
            {"op": op, "device": device, "backend": chosen, "why_not": why}
            for op, device, chosen, why in backend.table()
        ],
        "trials": {
            "wish": os.environ.get("AUTOFLIP_TRIALS") or "on",
            "file": str(trials.file()),
            "choices": trials.known(),
        },
    }


def _isa_note(isa: str | None) -> str:
    """Say where ``AUTOFLIP_CPU`` asks for an instruction set that does not run."""
    wish = os.environ.get("AUTOFLIP_CPU", "")
    if not isa or wish in ("", isa):
        return ""
    if wish not in _LEVELS:
        return f"; AUTOFLIP_CPU={wish!r} is ignored, wanted {', '.join(_LEVELS[:-1])} or {_LEVELS[-1]}"
    return f"; AUTOFLIP_CPU={wish} is more than this CPU has"


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
    code = f"{cpp['isa']} code{' and AMX' if cpp['amx'] else ''}"
    line("cpp", f"runs {code}{cpp['note']}" if cpp["isa"] else f"no: {cpp['why_not']}")
    line("cuda", f"no: {cuda['why_not'].removeprefix('_cuda: ')}" if cuda["why_not"] else "yes")
    line("triton", f"no: {triton['why_not']}" if triton["why_not"] else triton["version"])
    wrong = facts["wish_error"]
    line("backend", f"none, every op will refuse: {wrong}" if wrong else f"{facts['wish']} (AUTOFLIP_BACKEND)")
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("op", "device", "served by", "the others"):
        grid.add_column(heading)
    for row in facts["kernels"]:
        grid.add_row(*(Text(row[key]) for key in ("op", "device", "backend", "why_not")))
    console.print(grid)
    kept = facts["trials"]
    line("trials", f"{kept['wish']} (AUTOFLIP_TRIALS), {len(kept['choices'])} choices in {kept['file']}")
    choices = sorted(kept["choices"].items())
    for work, choice in choices[:_SHOWN]:
        console.print(Text(f"  {work}: {choice}"), soft_wrap=True)
    if len(choices) > _SHOWN:
        console.print(f"  and {len(choices) - _SHOWN} more: autoflip info --json")
