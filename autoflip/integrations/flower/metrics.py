"""Which replies' metrics can be averaged: Flower's own aggregation stops the run at one that cannot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from flwr.app import MetricRecord, RecordDict

__all__ = ["usable"]


def usable(contents: Sequence[RecordDict], weight: str, most: float) -> tuple[list[RecordDict], list[str]]:
    """Return the contents whose metrics fit together, and why the others do not.

    One MetricRecord each, all numbers finite, ``weight`` in (0, most]; of those the largest group of equal keys and
    lengths.

    Args:
        contents: of replies.
        weight: name of the metric that weighs.
        most: its largest value.
    """
    fine: list[tuple[tuple, RecordDict]] = []
    bad = []
    for content in contents:
        records = list(content.metric_records.values())
        why = _fault(records, weight, most)
        if why is None:
            fine.append((_form(records[0]), content))
        else:
            bad.append(why)
    common = Counter(form for form, _ in fine).most_common(1)
    good = [RecordDict(dict(content.metric_records)) for form, content in fine if form == common[0][0]]
    odd = len(fine) - len(good)
    return good, bad + ["its keys are not those of the other replies"] * odd


def _form(record: MetricRecord) -> tuple:
    return tuple(sorted((key, len(v) if isinstance(v, list) else -1) for key, v in record.items()))


def _fault(records: list[MetricRecord], weight: str, most: float) -> str | None:
    if len(records) != 1:
        return f"{len(records)} MetricRecords, wanted one"
    value = records[0].get(weight)
    if value is None or isinstance(value, list) or not 0 < value <= most:
        return f"{weight!r} is {value!r}, wanted a number above 0, at most {most:g}"
    numbers = [n for v in records[0].values() for n in (v if isinstance(v, list) else [v])]
    if not all(math.isfinite(n) for n in numbers):
        return "a metric is NaN or infinite"
    return None
