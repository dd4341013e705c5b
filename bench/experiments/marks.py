"""The marks set before measuring, what the table's rows reached, and the curve of every row that missed one."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from rows import CLASSES, LONGER, NEAR_CHANCE
from table import against, load

# cost to dense FedAvg's final accuracy: key -> (name, median over rows at most, any row at most, digits)
MARKS = {
    "flops": ("FLOPs", 0.10, 0.25, 3),
    "bytes": ("bytes", 0.02, 0.05, 4),
    "seconds": ("seconds", 0.25, 0.50, 2),
}
STDERRS_BELOW = 0.5  # a row may end this many standard errors under dense
BUDGETS = (0.05, 0.10, 0.15, 0.20)
SEEDS = 3  # that a longer row needs before it stands for the short one


def entries(folder: Path) -> dict[str, dict]:
    """Return row -> autoflip against dense FedAvg, over all rows of the table (digits and MNIST are not of it)."""
    found = load(folder)
    both = {
        row: against(runs, found[row, "fedavg"])
        for (row, method), runs in found.items()
        if method == "autoflip" and (row, "fedavg") in found and not row.startswith(("digits", "mnist"))
    }
    return {row: entry for row, entry in both.items() if entry is not None}


def short(rows: dict[str, dict]) -> dict[str, dict]:
    """Return the rows as they were set, of 40 rounds each."""
    return {row: entry for row, entry in rows.items() if row not in LONGER.values()}


def near_chance(row: str, entry: dict) -> bool:
    """Tell whether a row's dense runs end below NEAR_CHANCE times chance."""
    return (entry["accuracy"] - entry["gap"]) * CLASSES.get(row.split("-")[0], 10) < NEAR_CHANCE


def longer(rows: dict[str, dict]) -> dict[str, dict]:
    """Return the rows with those near chance in their longer version; as they were set while one lacks seeds."""
    near = [row for row in LONGER if row in rows and near_chance(row, rows[row])]
    if any(rows.get(LONGER[row], {"seeds": 0})["seeds"] < SEEDS for row in near):
        return short(rows)
    stand_in = {LONGER[row] for row in near}
    return {
        row: entry for row, entry in rows.items() if row not in near and (row in stand_in or row not in LONGER.values())
    }


def ends_below(entry: dict) -> bool:
    """Tell whether a row ends further under dense than the mark allows."""
    return entry["gap"] < -STDERRS_BELOW * (entry["gap_stderr"] or 0.0)


def missed(rows: dict[str, dict]) -> list[str]:
    """Return the rows that miss a mark which holds for every row."""
    return [
        row
        for row, entry in rows.items()
        if ends_below(entry) or any(over(entry, key, limit) for key, (_, _, limit, _) in MARKS.items())
    ]


def over(entry: dict, key: str, limit: float) -> bool:
    """Tell whether a row costs more than any row may; one that never reached the target does."""
    ratio = entry["to_target"][key]
    return ratio is None or ratio > limit


def summary(folder: Path) -> str:
    """Return the table of marks in Markdown: what was wanted, what the rows reached; empty without results."""
    if not (rows := entries(folder)):
        return ""
    text = _summary(short(rows))
    if (others := longer(rows)) != short(rows):
        count = len(short(rows).keys() - others.keys())
        text += f"\n\nThe same with the {count} rows whose dense runs end near chance at twice the rounds:\n\n"
        text += _summary(others)
    return text


def _summary(rows: dict[str, dict]) -> str:
    lines = ["| cost to dense's final accuracy | median over rows | mark | worst row | mark | rows over it |"]
    lines.append("|---|---|---|---|---|---|")
    for key, (name, median, limit, digits) in MARKS.items():
        known = [e["to_target"][key] for e in rows.values()]
        ratios = [math.inf if ratio is None else ratio for ratio in known]
        values = (statistics.median(ratios), median, max(ratios), limit)
        cells = [f"{x:.{digits}f}x" if x < math.inf else "never" for x in values]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(over(e, key, limit) for e in rows.values())} |")
    below = [row for row, entry in rows.items() if ends_below(entry)]
    lines += ["", f"{len(rows) - len(below)} of {len(rows)} rows end at or above dense FedAvg"]
    lines[-1] += f", or within {STDERRS_BELOW:g} standard error of it" + ("; not: " if below else "") + ", ".join(below)
    lines[-1] += "."
    return "\n".join(lines)


def at(curve: dict, flops: float) -> float | None:
    """Return the accuracy of the last evaluation within ``flops``; None before the first one."""
    within = [a for a, spent in zip(curve["accuracy"], curve["flops"], strict=True) if spent <= flops]
    return within[-1] if within else None


def reachable(folder: Path) -> str:
    """Return accuracy minus dense FedAvg's final one at shares of its FLOPs, for rows that missed a mark; Markdown."""
    found = load(folder)
    heads = [f"{budget:g}x FLOPs" for budget in BUDGETS]
    lines = [f"| row | {' | '.join(heads)} | whole run |", "|" + "---|" * (len(BUDGETS) + 2)]
    for row in missed(entries(folder)):
        mine, dense = found[row, "autoflip"], found[row, "fedavg"]
        seeds = sorted(set(mine) & set(dense))
        cells = []
        for budget in (*BUDGETS, math.inf):
            gaps = []
            for seed in seeds:
                whole = dense[seed]["curve"]
                if (reached := at(mine[seed]["curve"], budget * whole["flops"][-1])) is not None:
                    gaps.append(100 * (reached - whole["accuracy"][-1]))
            error = f" ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.1f}" if len(gaps) > 1 else ""
            cells.append(f"{statistics.mean(gaps):+.1f}{error}" if gaps else "–")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""
