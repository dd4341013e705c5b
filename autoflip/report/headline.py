"""What a run saved, in one sentence, out of its summary; the page and the terminal say the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoflip.report.page import display_name
from autoflip.report.units import percent_text, points_text, ratio_text

__all__ = ["detail", "headline"]

_NOUNS = (("flops", "FLOPs"), ("bytes", "bytes"), ("seconds", "seconds"))


def _join(parts: Sequence[str]) -> str:
    if not parts:
        return "costs that cannot be compared"
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _savings(ratios: Mapping[str, float | None]) -> str:
    parts = []
    for key, noun in _NOUNS:
        ratio = ratios[key]
        if ratio is None:  # the other one spent nothing
            continue
        words = ratio_text(ratio, "×").split(" ")
        if words[-1] in ("less", "more"):
            word = "fewer" if words[-1] == "less" else "more"
            parts.append(f"{words[0]} {word} {noun}")
        else:
            parts.append(f"as many {noun}" if words[-1] == "same" else f"no {noun}")
    return _join(parts)


def headline(summary: Mapping[str, Any]) -> str:
    """Return the run's result as one sentence, exploration included in every cost."""
    method, against = summary["method"], summary.get("against")
    name, data = display_name(method["name"]), summary["dataset"]
    final = percent_text(method["final_accuracy"])
    if not against:
        return f"{name} reached {final} accuracy on {data} in {summary['rounds']} rounds."
    other, target = display_name(against["name"]), percent_text(summary["target_accuracy"])
    shares = (summary.get("ratios") or {}).get("to_target")
    if shares:
        return f"{name} reached the final accuracy of {other} on {data}, {target}, with {_savings(shares)}."
    best = percent_text(method["best_accuracy"])
    return f"{name} did not reach the final accuracy of {other} on {data}, {target}: its best was {best}."


def detail(summary: Mapping[str, Any]) -> str:
    """Return the second sentence: the whole run, all rounds."""
    method, against = summary["method"], summary.get("against")
    partition, seed = summary.get("partition"), summary.get("seed")
    where = f"Partition {partition}, seed {seed}. Exploration is part of every cost."
    if summary.get("parameters"):
        model = "" if summary.get("model") in (None, "auto") else f" {summary['model']}"
        where = f"Model{model} of {summary['parameters']:,} parameters. {where}"
    if not against:
        return where
    gap = points_text(method["final_accuracy"] - against["final_accuracy"])
    final = percent_text(method["final_accuracy"])
    spent = f"Over all {summary['rounds']} rounds it spent {_savings(summary['ratios'])}"
    return f"{spent} and ended at {final} ({gap}). {where}"
