"""Several methods, several seeds: means with standard errors, and curves with bands from lowest to highest seed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from autoflip.report import page
from autoflip.report.page import ACCURACY, ROUND, display_name
from autoflip.report.runs import Curve, cost_to, curve_of, load_run, put_text
from autoflip.report.svg import Axis, Line, line_chart, wants_log
from autoflip.report.units import TICK_OF, error_text, percent_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["collect", "compare_report", "compare_table"]

# key in compare.json, heading, kind of number
_COLUMNS = (
    ("final_accuracy", "Final accuracy", "share"),
    ("best_accuracy", "Best accuracy", "share"),
    ("flops", "FLOPs", "flops"),
    ("bytes_up", "Bytes up", "bytes"),
    ("bytes_down", "Bytes down", "bytes"),
    ("bytes", "Bytes up and down", "bytes"),
    ("seconds", "Seconds", "seconds"),
    ("to_target.flops", "FLOPs to target", "flops"),
    ("to_target.bytes", "Bytes to target", "bytes"),
    ("to_target.seconds", "Seconds to target", "seconds"),
)


def _mean(values: Sequence[float]) -> dict[str, float | None] | None:
    if not values:
        return None
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": fmean(values), "stderr": error}


def collect(folder: str | os.PathLike[str], runs: Sequence[tuple[str, int, str]]) -> dict[str, Any]:
    """Add up finished runs into the content of compare.json.

    Args:
        folder: the folder of the comparison.
        runs: (method, seed, name of its run folder in ``folder``); every method has the same seeds.

    Returns:
        ``runs`` (one entry a run) and ``methods`` (mean and standard error over seeds). The target of a seed is the
        final accuracy of ``fedavg`` (else of the first method) with that seed.

    Raises:
        FileNotFoundError: a run is not finished.
    """
    methods = list(dict.fromkeys(method for method, _, _ in runs))
    seeds = sorted({seed for _, seed, _ in runs})
    reference = "fedavg" if "fedavg" in methods else methods[0]
    loaded = {(method, seed): load_run(Path(folder) / name) for method, seed, name in runs}
    curves = {key: curve_of(key[0], run.records.get(key[0], [])) for key, run in loaded.items()}
    targets = {seed: loaded[reference, seed].summary["method"]["final_accuracy"] for seed in seeds}
    entries = []
    for method, seed, name in runs:
        side = loaded[method, seed].summary["method"]
        totals = {key: side[key]["total"] for key in ("flops", "bytes_up", "bytes_down", "seconds")}
        entries.append(
            {
                "method": method,
                "seed": seed,
                "folder": name,
                "final_accuracy": side["final_accuracy"],
                "best_accuracy": side["best_accuracy"],
                **totals,
                "bytes": totals["bytes_up"] + totals["bytes_down"],
                "density": side.get("density"),
                "target_accuracy": targets[seed],
                "to_target": cost_to(curves[method, seed], targets[seed]),
            }
        )
    first = loaded[runs[0][0], runs[0][1]].summary
    means: dict[str, Any] = {}
    for method in methods:
        mine = [entry for entry in entries if entry["method"] == method]
        reached = [entry["to_target"] for entry in mine if entry["to_target"]]
        means[method] = {
            "seeds": len(mine),
            "reached": len(reached),
            **{key: _mean([entry[key] for entry in mine]) for key, _, _ in _COLUMNS if "." not in key},
            "to_target": {key: _mean([cost[key] for cost in reached]) for key in ("flops", "bytes", "seconds")},
        }
    return {
        "version": 1,
        **{key: first.get(key) for key in ("dataset", "partition", "rounds", "machine")},
        "seeds": seeds,
        "reference": reference,
        "runs": entries,
        "methods": means,
    }


def _look_up(entry: Mapping[str, Any], key: str) -> Mapping[str, float | None] | None:
    value: Any = entry
    for part in key.split("."):
        value = value[part]
    return value


def _with_error(kind: str, value: Mapping[str, float | None] | None) -> str:
    if value is None or value["mean"] is None:
        return "–"
    return error_text(kind, value["mean"], value["stderr"])


def _note(entry: Mapping[str, Any]) -> str:
    return f"{entry['reached']} of {entry['seeds']}"


def compare_table(content: Mapping[str, Any]) -> Table:
    """Return one line per method, mean ± standard error over seeds, as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("", no_wrap=True)
    columns = [column for column in _COLUMNS if column[0] not in ("best_accuracy", "bytes_up", "bytes_down")]
    for _, heading, _ in columns:
        grid.add_column(heading, justify="right")
    grid.add_column("Seeds at target", justify="right")
    for method, entry in content["methods"].items():
        cells = [_with_error(kind, _look_up(entry, key)) for key, _, kind in columns]
        grid.add_row(Text(display_name(method)), *(Text(text) for text in cells), _note(entry))
    return grid


def compare_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``compare.html`` into the folder of a comparison, out of its compare.json and the records of its runs.

    Raises:
        FileNotFoundError: compare.json or a run folder is missing.
        ValueError: compare.json is not what ``autoflip compare`` writes.
    """
    source = Path(folder) / "compare.json"
    if not source.is_file():
        raise FileNotFoundError(f"report: {source} is missing; autoflip compare writes it when all its runs are done")
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        return put_text(Path(folder) / "compare.html", _render(Path(folder), content))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"report: {source} is not what autoflip compare writes ({type(error).__name__}: {error}); "
            "run autoflip compare again with the same --out"
        ) from error


def _render(folder: Path, content: dict[str, Any]) -> str:
    methods = list(content["methods"])
    curves: dict[str, list[Curve]] = {method: [] for method in methods}
    for entry in content["runs"]:
        run = load_run(folder / entry["folder"])
        curves[entry["method"]].append(curve_of(entry["method"], run.records[entry["method"]]))
    targets = [entry["target_accuracy"] for entry in content["runs"] if entry["method"] == content["reference"]]
    title = f"{len(methods)} methods on {content['dataset']}"
    body = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="headline">{page.prose(_headline(content))}</p>',
        f'<p class="sub">{page.prose(_detail(content))}</p></header>',
        *_means(content),
        *_charts(curves, fmean(targets)),
        *_seeds(content),
        "<h2>Set-up</h2>",
        page.card("Machine", "where the seconds were measured", page.pairs(content.get("machine") or {})),
    ]
    return page.shell(title, body)


def _headline(content: Mapping[str, Any]) -> str:
    best = max(content["methods"], key=lambda method: content["methods"][method]["final_accuracy"]["mean"])
    words = _with_error("share", content["methods"][best]["final_accuracy"])
    return f"{display_name(best)} ends highest on {content['dataset']}: {words} after {content['rounds']} rounds."


def _detail(content: Mapping[str, Any]) -> str:
    return (
        f"Partition {content['partition']}, seeds {', '.join(str(seed) for seed in content['seeds'])}; mean ± standard "
        f"error over seeds. Target: the final accuracy of {display_name(content['reference'])} with the same seed; "
        "costs to target are means over the seeds that reached it. Exploration is part of every cost."
    )


def _means(content: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for key, heading, kind in _COLUMNS:
        cells = ""
        for method, entry in content["methods"].items():
            value = _look_up(entry, key)
            title = "" if value is None else f"mean {value['mean']!r}, standard error {value['stderr']!r}"
            path = escape(f"{method}.{key}")
            exact = "" if value is None else f' data-value="{value["mean"]!r}"'
            cells += f'<td data-key="{path}"{exact} title="{escape(title)}">{escape(_with_error(kind, value))}</td>'
        rows.append(f"<tr><th>{heading}</th>{cells}</tr>")
    reached = "".join(f"<td>{_note(entry)}</td>" for entry in content["methods"].values())
    rows.append(f"<tr><th>Seeds at the target</th>{reached}</tr>")
    yield "<h2>What it cost</h2>"
    yield page.table(["", *(display_name(method) for method in content["methods"])], rows)


def _across(curves: Sequence[Curve], field: str) -> list[list[float]]:
    """Return one list a round: that round's value of every seed; cut at the shortest run."""
    return [list(values) for values in zip(*(getattr(curve, field) for curve in curves), strict=False)]


def _charts(curves: Mapping[str, Sequence[Curve]], target: float) -> Iterator[str]:
    accuracy = {method: _across(runs, "accuracy") for method, runs in curves.items()}

    def chart(field: str, text: Any, name: str) -> str:
        spent = {method: [fmean(values) for values in _across(runs, field)] for method, runs in curves.items()}
        lines = [
            Line(
                style % 10,
                spent[method],
                [fmean(values) for values in seen],
                [
                    f"{display_name(method)}, round {round}: mean {fmean(values):.4f}, seeds {min(values):.4f} to "
                    f"{max(values):.4f}"
                    for round, values in zip(curves[method][0].rounds, seen, strict=False)
                ],
                low=[min(values) for values in seen],
                high=[max(values) for values in seen],
            )
            for style, (method, seen) in enumerate(accuracy.items())
        ]
        log = field != "rounds" and wants_log(list(spent.values()))
        return line_chart(lines, x=Axis(name, text, log), y=ACCURACY, name=f"accuracy over {name}", target=target)

    yield "<h2>How accuracy was paid for</h2>"
    extras = [("dash", f"target {percent_text(target)}, mean over seeds")]
    yield page.legend([display_name(method) for method in curves], extras)
    yield '<div class="grid2">'
    yield page.card("Accuracy over rounds", "mean; band: lowest to highest seed", chart("rounds", ROUND.text, "round"))
    for key, title in (("bytes", "bytes"), ("flops", "FLOPs"), ("seconds", "seconds")):
        words = f"{title} so far"
        yield page.card(
            f"Accuracy over {title}",
            "mean over seeds of both; band: lowest to highest seed",
            chart(key, TICK_OF[key], words),
        )
    yield "</div>"


def _seeds(content: Mapping[str, Any]) -> Iterator[str]:
    kinds = [(key, heading, kind) for key, heading, kind in _COLUMNS if "." not in key]
    rows = []
    for entry in content["runs"]:
        cells = "".join(
            page.cell(f"{entry['method']}.{entry['seed']}.{key}", kind, entry[key]) for key, _, kind in kinds
        )
        rows.append(f"<tr><th>{escape(display_name(entry['method']))}</th><td>{entry['seed']}</td>{cells}</tr>")
    yield "<h2>Every run</h2>"
    yield page.table(["", "seed", *(heading for _, heading, _ in kinds)], rows)
