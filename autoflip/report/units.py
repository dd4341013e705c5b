"""Numbers as people read them: ``3.21 GFLOP``, ``1.5 MB``, ``4 min 05 s``, ``93.1 %``, ``3.2x less``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["TEXT_OF", "TICK_OF", "error_text", "points_text", "ratio_text"]

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _three(value: float) -> str:
    """Return ``value`` in three significant digits, never in powers of ten."""
    size = abs(value)
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{value:.{digits}f}"


def _prefix(value: float) -> tuple[float, str]:
    # 0.9995: what would round to 1000 of a unit is shown as 1 of the next
    return next(((scale, prefix) for scale, prefix in _PREFIXES if abs(value) >= 0.9995 * scale), (1.0, ""))


def _scaled(value: float, unit: str) -> str:
    scale, prefix = _prefix(value)
    number = f"{value:.0f}" if scale == 1 and value == int(value) else _three(value / scale)
    return f"{number} {prefix}{unit}"


def flops_text(value: float) -> str:
    """Return FLOPs with a decimal prefix: ``3.21 GFLOP``."""
    return _scaled(value, "FLOP")


def bytes_text(value: float) -> str:
    """Return bytes with a decimal prefix: ``1.50 MB`` is 1,500,000 bytes."""
    return _scaled(value, "B")


def seconds_text(value: float) -> str:
    """Return seconds as ``85 ms``, ``12.3 s``, ``4 min 05 s`` or ``2 h 03 min``."""
    if value < 0.9995:
        return f"{_three(value * 1e3)} ms" if value else "0 s"
    if value < 99.95:
        return f"{_three(value)} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent_text(value: float) -> str:
    """Return a share (0 to 1) as ``93.1 %``; two more digits where one would hide a small share."""
    return f"{value * 100:.1f} %" if value >= 0.01 or value == 0 else f"{value * 100:.3f} %"


def points_text(value: float) -> str:
    """Return a difference of two shares in percentage points: ``+0.4 points``."""
    return f"{value * 100:+.1f} points"


def ratio_text(value: float, times: str = "x") -> str:
    """Return how much less (or more) a cost is than the other's: ``3.2x less`` for 0.31."""
    if value <= 0:
        return "nothing spent" if value == 0 else "?"
    if 0.995 <= value <= 1.005:
        return "the same"
    factor, word = (1 / value, "less") if value < 1 else (value, "more")
    return f"{factor:,.0f}{times} {word}" if factor >= 99.5 else f"{factor:.3g}{times} {word}"


def _tick(unit: str) -> Callable[[float], str]:
    def text(value: float) -> str:
        scale, prefix = _prefix(value)
        return f"{value / scale:g} {prefix}{unit}".strip()

    return text


TEXT_OF: Mapping[str, Callable[[float], str]] = {
    "flops": flops_text,
    "bytes": bytes_text,
    "seconds": seconds_text,
    "share": percent_text,
    "count": lambda value: f"{value:,.0f}",
}
# on an axis there is room for a few letters only
TICK_OF: Mapping[str, Callable[[float], str]] = {
    "flops": _tick(""),
    "bytes": _tick("B"),
    "seconds": lambda value: f"{value:g} s" if value < 600 else f"{value / 60:g} min",
    "share": lambda value: f"{value * 100:g} %",
    "count": lambda value: f"{value:g}",
}


def error_text(kind: str, mean: float, error: float | None) -> str:
    """Return ``4.75 ± 0.01 GFLOP``: a mean and its standard error in the mean's unit; no error for one seed."""
    if error is None:
        return TEXT_OF[kind](mean)
    if kind == "share":
        return f"{mean * 100:.1f} ± {_small(error * 100, 1)} %"
    scale, prefix = (1.0, "") if kind in ("seconds", "count") else _prefix(mean)
    unit = prefix + {"flops": "FLOP", "bytes": "B", "seconds": "s"}.get(kind, "")
    return f"{_three(mean / scale)} ± {_small(error / scale, 2)} {unit}".strip()


def _small(value: float, digits: int) -> str:
    least = 10.0**-digits
    return f"<{least:g}" if 0 < value < least / 2 else f"{value:.{digits}f}" if value < 9.995 else _three(value)
