"""What a run cost and what it bought, out of its folder alone: a self-contained page and a table for the terminal."""

from __future__ import annotations

import os
from pathlib import Path

from autoflip.report.compare import collect, compare_report, compare_table
from autoflip.report.headline import headline
from autoflip.report.runs import load_run, put_text
from autoflip.report.single import render
from autoflip.report.terminal import summary_table

__all__ = ["collect", "compare_report", "compare_table", "headline", "load_run", "summary_table", "write"]


def write(run_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run folder out of its records.jsonl, summary.json and config.toml.

    Returns:
        The path of the page, which needs no network, no script and no other file.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not what a run writes.
    """
    run = load_run(run_dir)
    try:
        text = render(run)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"report: {run.folder} lacks something that a run writes ({type(error).__name__}: {error}); "
            "were summary.json or records.jsonl edited?"
        ) from error
    return put_text(run.folder / "report.html", text)
