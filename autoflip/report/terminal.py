"""The table at the end of a run, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoflip.report.page import display_name
from autoflip.report.runs import rows_of
from autoflip.report.units import TEXT_OF, points_text, ratio_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["summary_table"]


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return what the method cost beside what ``against`` cost, as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def text(kind: str, value: float | None) -> str:
        return "-" if value is None else TEXT_OF[kind](value)

    against = summary.get("against")
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("")
    grid.add_column(Text(display_name(summary["method"]["name"])), justify="right")
    if against:
        grid.add_column(Text(display_name(against["name"])), justify="right")
        grid.add_column("difference", justify="right")
    for row in rows_of(summary):
        label = Text(f"  {row.label}" if row.detail else row.label, style="dim" if row.detail else "")
        cells = [label, Text(text(row.kind, row.method))]
        if against:
            change = ""
            if row.ratio is not None:
                change = ratio_text(row.ratio)
            elif row.key.endswith("accuracy") and row.method is not None and row.against is not None:
                change = points_text(row.method - row.against)
            style = "green" if row.ratio is not None and row.ratio < 0.995 else ""
            cells += [Text(text(row.kind, row.against)), Text(change, style=style)]
        grid.add_row(*cells)
    return grid
