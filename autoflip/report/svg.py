"""Line charts and stacked bars as inline SVG text: no script, no network; colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

__all__ = ["Axis", "Line", "Mark", "line_chart", "stacked_bars", "wants_log"]

_WIDTH, _HEIGHT = 440, 264
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 40
# a tooltip target for every point of a long run would make the page heavy
_MAX_TIPS = 200


@dataclass(frozen=True)
class Axis:
    """What an axis shows: ``label`` beside it, ``text`` turns a tick into words, ``log`` spaces by decades."""

    label: str
    text: Callable[[float], str]
    log: bool = False


@dataclass(frozen=True)
class Line:
    """One method's curve; ``style`` 0 to 9 picks its colour, ``rings`` marks single points with a ring."""

    style: int
    x: Sequence[float]
    y: Sequence[float]
    tips: Sequence[str]
    rings: Sequence[bool] = ()
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Mark:
    """A dot on a curve with a dotted line down to the x axis: the round in which a target was reached."""

    style: int
    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        share = (at - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 2)


def wants_log(curves: Sequence[Sequence[float]]) -> bool:
    """Return whether a log axis serves these rising costs: all positive, and one curve is far longer than another."""
    ends = [curve[-1] for curve in curves if curve]
    return bool(ends) and min(min(curve) for curve in curves if curve) > 0 and max(ends) > 4 * min(ends)


def _linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    rough = (high - low) / wanted or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5)):
        finer = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
        if ticks and len(finer) > 5:
            break
        ticks = finer
    return ticks[:: max(1, math.ceil(len(ticks) / 5))]


def _scale(values: Sequence[float], start: float, end: float, *, log: bool = False) -> _Scale:
    low, high = min(values), max(values)
    if log and low > 0:
        low, high = low / 1.08, high * 1.08
        return _Scale(low, high, start, end, True, _log_ticks(low, high))
    if low == high:
        low, high = low - 0.5, high + 0.5
    return _Scale(low, high, start, end, False, _linear_ticks(low, high))


def _frame(xs: _Scale, ys: _Scale, x: Axis, y: Axis) -> list[str]:
    parts = []
    for tick in ys.ticks:
        at = ys(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:g}" text-anchor="end">{escape(y.text(tick))}</text>')
    bottom = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for tick in xs.ticks:
        at = xs(tick)
        parts.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}"/>')
        anchor = "end" if at > _WIDTH - 30 else "middle"
        parts.append(f'<text x="{at}" y="{bottom + 17}" text-anchor="{anchor}">{escape(x.text(tick))}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    words = escape(x.label + (" (log scale)" if xs.log else ""))
    parts.append(f'<text class="label" x="{middle:g}" y="{_HEIGHT - 5}" text-anchor="middle">{words}</text>')
    return parts


def _curve(line: Line, xs: _Scale, ys: _Scale) -> list[str]:
    parts = []
    points = [(xs(a), ys(b)) for a, b in zip(line.x, line.y, strict=True)]
    if line.low and line.high:
        there = [f"{xs(a)},{ys(b)}" for a, b in zip(line.x, line.low, strict=True)]
        back = [f"{xs(a)},{ys(b)}" for a, b in zip(line.x, line.high, strict=True)]
        parts.append(f'<polygon class="band f{line.style}" points="{" ".join(there + back[::-1])}"/>')
    path = " ".join(f"{a},{b}" for a, b in points)
    parts.append(f'<polyline class="line s{line.style}" points="{path}"/>')
    rings = line.rings or [False] * len(points)
    stride = max(1, math.ceil(len(points) / _MAX_TIPS))
    for i, ((a, b), tip, ring) in enumerate(zip(points, line.tips, rings, strict=True)):
        if ring:
            parts.append(f'<circle class="ring s{line.style}" cx="{a}" cy="{b}" r="4"/>')
        if ring or i % stride == 0 or i == len(points) - 1:
            title = f"<title>{escape(tip)}</title>"
            parts.append(f'<circle class="tip f{line.style}" cx="{a}" cy="{b}" r="6">{title}</circle>')
    return parts


def line_chart(
    lines: Sequence[Line], *, x: Axis, y: Axis, name: str, target: float | None = None, marks: Sequence[Mark] = ()
) -> str:
    """Draw curves of ``y`` over ``x``.

    Args:
        lines: at least one, each with at least one point.
        x: the horizontal axis; ``log`` needs positive values and is dropped without them.
        y: the vertical axis.
        name: what the chart shows, for screen readers.
        target: a horizontal dashed line at this ``y``.
        marks: dots, drawn over the curves.

    Returns:
        One ``<svg>`` element.
    """
    across = [value for line in lines for value in line.x]
    up = [value for line in lines for value in (*line.y, *line.low, *line.high)] + ([] if target is None else [target])
    up.append(max(up) + 0.04 * (max(up) - min(up)))
    xs = _scale(across, _LEFT + 6, _WIDTH - _RIGHT - 4, log=x.log)
    ys = _scale(up, _HEIGHT - _BOTTOM - 4, _TOP)
    parts = _frame(xs, ys, x, y)
    if target is not None:
        at = ys(target)
        parts.append(
            f'<line class="target" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}">'
            f"<title>target {escape(y.text(target))}</title></line>"
        )
    for line in reversed(lines):  # the first one is ours: drawn last, on top
        parts += _curve(line, xs, ys)
    for mark in marks:
        a, b = xs(mark.x), ys(mark.y)
        parts.append(f'<line class="drop s{mark.style}" x1="{a}" x2="{a}" y1="{b}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(
            f'<circle class="dot f{mark.style}" cx="{a}" cy="{b}" r="5"><title>{escape(mark.tip)}</title></circle>'
        )
    return _svg(name, parts)


def stacked_bars(
    style: int, bottoms: Sequence[float], tops: Sequence[float], *, x: Axis, y: Axis, name: str, tips: Sequence[str]
) -> str:
    """Draw one bar a round, from round 0: ``bottoms`` in full colour, ``tops`` paler on top of it.

    Returns:
        One ``<svg>`` element.
    """
    count = len(bottoms)
    high = max((a + b for a, b in zip(bottoms, tops, strict=True)), default=0) or 1.0
    ys = _scale([0.0, high], _HEIGHT - _BOTTOM, _TOP)
    xs = _scale([-0.5, count - 0.5], _LEFT + 2, _WIDTH - _RIGHT)
    xs = _Scale(xs.low, xs.high, xs.start, xs.end, False, [t for t in xs.ticks if t == int(t) and t >= 0])
    parts = _frame(xs, ys, x, y)
    width = (xs.end - xs.start) / max(count, 1)
    gap = min(2.0, width * 0.2)
    for i, (a, b, tip) in enumerate(zip(bottoms, tops, tips, strict=True)):
        left, base, middle, top = xs(i - 0.5) + gap / 2, ys(0), ys(a), ys(a + b)
        rect = f'x="{left:.2f}" width="{width - gap:.2f}"'
        parts.append(
            f"<g><title>{escape(tip)}</title>"
            f'<rect class="f{style}" {rect} y="{middle}" height="{base - middle:.2f}"/>'
            f'<rect class="f{style} pale" {rect} y="{top}" height="{middle - top:.2f}"/></g>'
        )
    return _svg(name, parts)


def _svg(name: str, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)}">{body}</svg>'
