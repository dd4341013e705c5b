"""The report of one run: headline, table, plots, rejected clients, set-up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from autoflip.report import page
from autoflip.report.headline import detail, headline
from autoflip.report.page import ACCURACY, ROUND, display_name
from autoflip.report.runs import Curve, Row, Run, curve_of, first_at, rows_of
from autoflip.report.svg import Axis, Line, Mark, line_chart, stacked_bars, wants_log
from autoflip.report.units import TICK_OF, bytes_text, percent_text, ratio_text

__all__ = ["render"]

_COSTS = (
    ("bytes", "Accuracy over bytes", "bytes up and down so far"),
    ("flops", "Accuracy over FLOPs", "FLOPs so far"),
    ("seconds", "Accuracy over seconds", "seconds so far"),
)
_MAX_ERRORS = 200


def render(run: Run) -> str:
    """Return the page of one run as HTML text."""
    summary = run.summary
    names = [side["name"] for side in (summary["method"], summary.get("against")) if side]
    for name in names:
        if not run.records.get(name):
            raise ValueError(
                f"report: summary.json speaks of {name!r} but records.jsonl has no line of it; "
                f"it has {', '.join(run.records) or 'none at all'}"
            )
    curves = [curve_of(name, run.records[name]) for name in names]
    dataset, title = str(summary["dataset"]), " against ".join(display_name(name) for name in names)
    body = [
        f"<header><h1>{escape(title)} · {escape(dataset)}</h1>",
        f'<p class="headline">{page.prose(headline(summary))}</p>',
        f'<p class="sub">{page.prose(detail(summary))}</p></header>',
        *_tiles(summary),
        *_costs_table(summary, names),
        *_curves(curves, summary.get("target_accuracy")),
        *_bytes(run, names),
        *_density(run, names[0]),
        *_rejected(run, names),
        *_setup(run),
    ]
    return page.shell(f"{title} on {dataset}", body)


def _tiles(summary: dict[str, Any]) -> Iterator[str]:
    ratios, against = summary.get("ratios") or {}, summary.get("against")
    if not against:
        return
    shares = ratios.get("to_target")
    scope = "to the same accuracy" if shares else "over all rounds"
    yield '<div class="tiles">'
    final, other = summary["method"]["final_accuracy"], against["final_accuracy"]
    yield (
        f'<div class="tile"><span class="what">Final accuracy</span><b title="{final!r} of 1">{percent_text(final)}</b>'
        f"<span>{escape(display_name(against['name']))}: {percent_text(other)}</span></div>"
    )
    for key, word in (("flops", "FLOPs"), ("bytes", "Bytes"), ("seconds", "Seconds")):
        value = (shares or ratios)[key]
        if value is None:
            continue
        css = "good" if value < 0.995 else "bad" if value > 1.005 else ""
        path = f"ratios.to_target.{key}" if shares else f"ratios.{key}"
        yield (
            f'<div class="tile"><span class="what">{word}</span>'
            f'<b class="{css}" data-key="{path}" data-value="{value!r}" title="{value!r} of the other\'s">'
            f"{escape(ratio_text(value, '×'))}</b><span>{scope}</span></div>"
        )
    yield "</div>"


def _row(row: Row, open_below: bool) -> str:
    css = "detail" if row.detail else "open" if open_below else ""
    cells = page.cell(f"method.{row.key}", row.kind, row.method)
    cells += page.cell(f"against.{row.key}", row.kind, row.against)
    if row.ratio is not None:
        stem = row.key.removesuffix(".total")
        cells += (
            f'<td data-key="ratios.{stem}" data-value="{row.ratio!r}" title="{row.ratio!r}">'
            f"{escape(ratio_text(row.ratio, '×'))}</td>"
        )
    elif row.kind == "share" and row.key.endswith("accuracy") and None not in (row.method, row.against):
        gap = (row.method or 0.0) - (row.against or 0.0)
        cells += f'<td title="{gap!r}">{gap * 100:+.1f} points</td>'
    else:
        cells += "<td></td>"
    return f'<tr class="{css}"><th>{escape(row.label)}</th>{cells}</tr>'


def _costs_table(summary: dict[str, Any], names: Sequence[str]) -> Iterator[str]:
    rows = list(rows_of(summary))
    followed = [below.detail for below in rows[1:]] + [False]
    yield "<h2>What it cost</h2>"
    head = ["", display_name(names[0]), display_name(names[1]) if len(names) > 1 else "–", "difference"]
    yield page.table(head, (_row(row, below) for row, below in zip(rows, followed, strict=True)))


def _tip(curve: Curve, i: int) -> str:
    return (
        f"{display_name(curve.name)}, round {curve.rounds[i]}: accuracy {curve.accuracy[i]!r}; so far "
        f"{curve.flops[i]:,.0f} FLOPs, {curve.bytes[i]:,.0f} bytes, {curve.seconds[i]:.3f} seconds"
    )


def _curves(curves: Sequence[Curve], target: float | None) -> Iterator[str]:
    tips = [[_tip(curve, i) for i in range(len(curve.rounds))] for curve in curves]
    reached = [(curve, style, first_at(curve, target)) for style, curve in enumerate(curves)]

    def chart(field: str, axis: Axis, name: str) -> str:
        lines = [
            Line(i, getattr(curve, field), curve.accuracy, tips[i], curve.exploration) for i, curve in enumerate(curves)
        ]
        marks = [
            Mark(style, getattr(curve, field)[at], curve.accuracy[at], "first at the target. " + tips[style][at])
            for curve, style, at in reached
            if at is not None
        ]
        return line_chart(lines, x=axis, y=ACCURACY, name=name, target=target, marks=marks)

    yield "<h2>How accuracy was paid for</h2>"
    extras = [] if target is None else [("dash", f"target {percent_text(target)}"), ("full", "first at the target")]
    if any(any(curve.exploration) for curve in curves):
        extras.append(("hollow", "exploration round"))
    yield page.legend([display_name(curve.name) for curve in curves], extras)
    yield '<div class="grid2">'
    yield page.card("Accuracy over rounds", "on the test set", chart("rounds", ROUND, "accuracy over rounds"))
    for key, title, note in _COSTS:
        axis = Axis(note, TICK_OF[key], wants_log([getattr(curve, key) for curve in curves]))
        yield page.card(title, "on the test set", chart(key, axis, title))
    yield "</div>"


def _bytes(run: Run, names: Sequence[str]) -> Iterator[str]:
    yield "<h2>Bytes of every round</h2>"
    yield '<div class="grid2">'
    for style, name in enumerate(names):
        records = sorted(run.records[name], key=lambda record: record["round"])
        up, down = [r["bytes_up"] for r in records], [r["bytes_down"] for r in records]
        tips = [
            f"round {r['round']}: {r['bytes_up']:,} bytes up, {r['bytes_down']:,} bytes down, {r.get('phase', '')}"
            for r in records
        ]
        note = f"up (full) and down (pale), mean {bytes_text((sum(up) + sum(down)) / len(up))} a round; own scale"
        chart = stacked_bars(style, up, down, x=ROUND, y=Axis("", TICK_OF["bytes"]), name=f"bytes of {name}", tips=tips)
        yield page.card(display_name(name), note, chart)
    yield "</div>"


def _density(run: Run, name: str) -> Iterator[str]:
    last = max(run.records[name], key=lambda record: record["round"])
    layers = last.get("layers") or {}
    if not layers:
        return
    bars = [
        f'<span class="name" title="{escape(str(layer))}">{escape(str(layer))}</span>'
        f'<span class="rail"><i style="width:{min(max(float(share), 0.0), 1.0) * 100:.2f}%"></i></span>'
        f'<span class="num" title="{float(share)!r} of 1">{percent_text(share)}</span>'
        for layer, share in layers.items()
    ]
    whole = f"{percent_text(last['density'])} of the covered weights are kept after the last round"
    if last.get("channels") is not None:
        whole += f", {percent_text(last['channels'])} of the channels"
    yield "<h2>Density per layer</h2>"
    yield page.card(display_name(name), whole, f'<div class="bars">{"".join(bars)}</div>')


def _rejected(run: Run, names: Sequence[str]) -> Iterator[str]:
    errors = [
        (name, record["round"], client["client"], client["error"])
        for name in names
        for record in run.records[name]
        for client in record.get("clients") or ()
        if client.get("error")
    ]
    if not errors:
        return
    more = f", the first {_MAX_ERRORS}" if len(errors) > _MAX_ERRORS else ""
    yield f"<h2>Rejected updates ({len(errors)}{more})</h2>"
    rows = (
        f"<tr><td>{escape(display_name(name))}</td><td>{escape(str(at))}</td><td>{escape(str(client))}</td>"
        f'<td class="words">{escape(str(why))}</td></tr>'
        for name, at, client, why in errors[:_MAX_ERRORS]
    )
    yield page.table(["method", "round", "client", "why"], rows)


def _setup(run: Run) -> Iterator[str]:
    yield "<h2>Set-up</h2>"
    yield '<div class="grid2">'
    yield page.card("Machine", "where the seconds were measured", page.pairs(run.summary.get("machine") or {}))
    yield page.card("Configuration", "config.toml of this run", f"<pre>{escape(run.config) or '–'}</pre>")
    yield "</div>"
