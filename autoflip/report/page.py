"""The shell that both pages share: style sheet, head, cards, tables of exact values; all text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from autoflip.report import units
from autoflip.report.svg import Axis

__all__ = ["ACCURACY", "ROUND", "card", "cell", "display_name", "legend", "pairs", "prose", "shell", "table"]

UNIT_OF = {"flops": " FLOPs", "bytes": " bytes", "seconds": " seconds", "share": " of 1", "count": ""}
ACCURACY = Axis("accuracy", units.TICK_OF["share"])
ROUND = Axis("round", units.TICK_OF["count"])

_CSS = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#14181f;--soft:#5b6472;--rule:#dfe3e8;--good:#12723d;
--bad:#b3261e;--c0:#2563eb;--c1:#d9660a;--c2:#12855a;--c3:#8b3fd1;--c4:#c02a5e;--c5:#0d8296;--c6:#7d6207;--c7:#5b6472;
--c8:#93461c;--c9:#4a6b1f}
@media(prefers-color-scheme:dark){:root{--bg:#0f1318;--card:#181d24;--ink:#e8ebf0;--soft:#9aa4b2;--rule:#2c343f;
--good:#5fd394;--bad:#ff8a80;--c0:#6ea8ff;--c1:#ffa657;--c2:#4fd1a0;--c3:#c69aff;--c4:#ff86ae;--c5:#5fd0e4;--c6:#e0c25a;
--c7:#9aa4b2;--c8:#dd9a72;--c9:#a9cf7a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:1.05rem;font-weight:600;color:var(--soft);margin:0 0 6px;overflow-wrap:anywhere}
.headline{font-size:clamp(1.3rem,3.2vw,1.9rem);line-height:1.25;font-weight:680;margin:0 0 10px;max-width:40em;
text-wrap:balance}
.sub{color:var(--soft);margin:0 0 22px;max-width:56em}
h2{font-size:1.12rem;margin:34px 0 12px}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(46%,210px),1fr));gap:12px;margin:0 0 8px}
.card,.tile{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px 16px;min-width:0}
.tile b{display:block;font-size:1.6rem;line-height:1.2;font-weight:680;font-variant-numeric:tabular-nums}
.tile span{display:block;color:var(--soft);font-size:.86rem}
.tile .what{color:var(--ink);font-weight:600;margin-bottom:4px}
.good{color:var(--good)}.bad{color:var(--bad)}
.card h3{font-size:.95rem;margin:0 0 2px}
.card p{color:var(--soft);font-size:.84rem;margin:0 0 8px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.94rem}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:2px}
td.words,th.words{text-align:left;white-space:normal;overflow-wrap:anywhere}
thead th{color:var(--soft);font-weight:600;font-size:.92em}
tbody th{font-weight:500}
tr:last-child th,tr:last-child td{border-bottom:0}
tr.detail th,tr.detail td{color:var(--soft);font-size:.92em;padding-top:2px}
tr.detail th:first-child{padding-left:16px}
tr.open th,tr.open td{border-bottom-color:transparent;padding-bottom:2px}
td[title],b[title]{cursor:help}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;color:var(--soft);font-size:.88rem;margin:0 0 12px;
padding:0;list-style:none}
.key{display:inline-block;width:20px;height:3px;border-radius:2px;margin-right:7px;vertical-align:middle}
.key.dash{height:0;border-top:2px dashed var(--soft);border-radius:0}
.key.hollow{width:10px;height:10px;border:2px solid var(--soft);border-radius:50%}
.key.full{width:10px;height:10px;border-radius:50%;background:var(--soft)}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--soft);font-family:inherit}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .axis{stroke:var(--soft);stroke-width:1}
svg .line{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
svg .band{opacity:.16}
svg .ring{fill:var(--card);stroke-width:2}
svg .tip{fill-opacity:0}svg .tip:hover{fill-opacity:.4}
svg .dot{stroke:var(--card);stroke-width:2}
svg .drop{stroke-width:1.2;stroke-dasharray:2 3}
svg .target{stroke:var(--soft);stroke-width:1.4;stroke-dasharray:6 4}
.pale{opacity:.42}
.bars{display:grid;grid-template-columns:minmax(60px,max-content) 1fr max-content;gap:5px 12px;align-items:center;
font-size:.86rem;font-variant-numeric:tabular-nums}
.bars .name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;max-width:34vw}
.bars .rail{background:var(--rule);border-radius:4px;height:10px}
.bars .rail i{display:block;height:10px;border-radius:4px;background:var(--c0);min-width:2px}
.bars .num{text-align:right;color:var(--soft)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;margin:0;font-size:.92rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
pre{margin:0;overflow-x:auto;font:.84rem/1.5 ui-monospace,"DejaVu Sans Mono",monospace}
footer{color:var(--soft);font-size:.84rem;margin-top:34px}
@media(max-width:520px){main{padding:18px 12px 36px}table{font-size:.8rem}
th,td{padding:6px 5px}thead th,tbody th{white-space:normal}
.tile b{font-size:1.25rem}
.card,.tile{padding:12px}svg text{font-size:13px}}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}}
""" + "".join(f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}.b{i}{{background:var(--c{i})}}" for i in range(10))


def shell(title: str, body: Iterable[str]) -> str:
    """Return the whole page; its policy forbids scripts and every fetch, so it stays self-contained."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body><main>\n" + "\n".join(body) + "\n"
        "<footer>Made by autoflip out of records.jsonl, summary.json and config.toml alone. FLOPs are those that "
        "ran (a multiply-add is 2), bytes are the length of what crossed the transport, seconds are those of clients "
        "and server without evaluation; 1 MB is 1,000,000 bytes. Exact values stand in the tooltips.</footer>\n"
        "</main></body></html>\n"
    )


def display_name(method: str) -> str:
    """Return a method's name for readers: ``fedavg`` is dense FedAvg."""
    return {"fedavg": "dense FedAvg", "fedprox": "dense FedProx"}.get(method, method)


def prose(text: str) -> str:
    """Return a sentence, escaped, whose numbers stay beside their percent signs."""
    return escape(text.replace(" %", "\N{NO-BREAK SPACE}%"))


def cell(key: str, kind: str, value: float | None) -> str:
    """Return one table cell: rounded text, the exact value in its tooltip and in ``data-value``."""
    if value is None:
        return f'<td data-key="{escape(key)}">–</td>'
    exact = f"{value:,}" if isinstance(value, int) else repr(value)
    return (
        f'<td data-key="{escape(key)}" data-value="{value!r}" title="{exact}{UNIT_OF[kind]}">'
        f"{escape(units.TEXT_OF[kind](value))}</td>"
    )


def table(head: Sequence[str], rows: Iterable[str]) -> str:
    """Return a table in a card; ``head`` is text, ``rows`` are finished ``<tr>`` elements."""
    # a column of words is left-aligned down to its heading
    css = {"why": ' class="words"'}
    cells = "".join(f"<th{css.get(word, '')}>{escape(word)}</th>" for word in head)
    return (
        f'<div class="card scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def card(title: str, note: str, body: str) -> str:
    """Return a titled card around ``body``, which is finished HTML."""
    return f'<div class="card"><h3>{escape(title)}</h3><p>{escape(note)}</p>{body}</div>'


def legend(names: Sequence[str], extras: Sequence[tuple[str, str]]) -> str:
    """Return one key per method in colour order, then ``extras``: pairs of (css class, words)."""
    items = [f'<li><i class="key b{i}"></i>{escape(name)}</li>' for i, name in enumerate(names)]
    items += [f'<li><i class="key {escape(css)}"></i>{escape(words)}</li>' for css, words in extras]
    return f'<ul class="legend">{"".join(items)}</ul>'


def pairs(values: Mapping[str, Any]) -> str:
    """Return a definition list of names and values; None is shown as a dash."""
    items = [
        f"<dt>{escape(str(name))}</dt><dd>{escape('–' if value is None else str(value))}</dd>"
        for name, value in values.items()
    ]
    return f"<dl>{''.join(items)}</dl>"
