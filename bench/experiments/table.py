"""From the result files to the table: cost to dense FedAvg's final accuracy, and accuracy at the end."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from autoflip import fed
from autoflip.fed.ledger import Record

COSTS = ("flops", "bytes", "seconds", "client_seconds")
WIDER = "28-channels-at-any-FLOPs"  # tag of prune.channels=0.4375, what ResNet-8 had before a bound on FLOPs


def load(folder: Path) -> dict[tuple[str, str], dict[int, dict]]:
    """Return (row, method and tag) -> seed -> content of method-*.json."""
    found: dict[tuple[str, str], dict[int, dict]] = defaultdict(dict)
    for path in sorted(folder.glob("method-*.json")):
        content = json.loads(path.read_text())
        name = content["method"] + ("+" + content["tag"] if content["tag"] else "")
        found[content["row"], name][content["seed"]] = content
    return found


def told(config: fed.Config) -> dict:
    """Return what a result file says of its configuration: everything but where the data lies."""
    everything = config.as_dict()
    del everything["data"]["root"]
    return everything


def same(stored: dict, config: fed.Config) -> bool:
    """Tell whether a result file's configuration is this one; keys younger than the file have their default."""
    try:
        both = [told(fed.Config.from_dict(stored)), told(config)]
        if config.fed.method != "autoflip":  # nobody else asks how far clients agree, or removes channels
            for one in both:
                del one["explore"]["agreement"], one["prune"]["channels"], one["prune"]["flops_exponent"]
        return both[0] == both[1]
    except fed.ConfigError:  # a key or a value that is no more
        return False


def client_seconds(records: Sequence[Record]) -> list[float]:
    """Return the processor seconds of clients alone up to each round that was evaluated."""
    spent = accumulate(sum(c.cpu_seconds for c in r.clients) for r in records)
    return [round(s, 3) for s, r in zip(spent, records, strict=True) if r.accuracy is not None]


def cpu_seconds(records: Sequence[Record]) -> list[float]:
    """Return the processor seconds up to each round that was evaluated."""
    spent = accumulate(r.cpu_seconds for r in records)
    return [round(s, 3) for s, r in zip(spent, records, strict=True) if r.accuracy is not None]


def to_target(curve: dict, target: float) -> dict | None:
    """Return the cost up to the first evaluated round at ``target``; None if there is none."""
    for i, accuracy in enumerate(curve["accuracy"]):
        if accuracy >= target - 1e-5:  # accuracies are written with five digits
            return {key: curve[key][i] for key in (*COSTS, "round") if key in curve}
    return None


def timed(*runs: Sequence[dict]) -> str:
    """Return what to compare seconds by: clients' own, unless a curve is older than their being told apart."""
    return "client_seconds" if all("client_seconds" in curve for curves in runs for curve in curves) else "seconds"


def alike(*runs: dict) -> bool:
    """Tell whether runs had the same instruction set; files that name none had AVX-512."""
    return len({run.get("isa", "AVX512") for run in runs}) == 1


def against(mine: dict[int, dict], dense: dict[int, dict]) -> dict | None:
    """Return means over the seeds that both have: difference of final accuracy, ratios of cost.

    Seconds are of the seeds that had the same instruction set both times, None where there are none, like every cost
    to a target that was never reached.
    """
    seeds = sorted(set(mine) & set(dense))
    if not seeds:
        return None
    final = {s: (mine[s]["curve"]["accuracy"][-1], dense[s]["curve"]["accuracy"][-1]) for s in seeds}
    gaps = [ours - theirs for ours, theirs in final.values()]
    reached = {s: to_target(mine[s]["curve"], final[s][1]) for s in seeds}
    base = {s: to_target(dense[s]["curve"], final[s][1]) for s in seeds}
    clock = timed([mine[s]["curve"] for s in seeds], [dense[s]["curve"] for s in seeds])
    keys = {"flops": "flops", "bytes": "bytes", "seconds": clock}
    compared = {name: [s for s in seeds if name != "seconds" or alike(mine[s], dense[s])] for name in keys}
    ratios = {
        name: [reached[s][key] / base[s][key] for s in compared[name] if reached[s] and base[s]]
        for name, key in keys.items()
    }
    whole = {
        name: [mine[s]["curve"][key][-1] / dense[s]["curve"][key][-1] for s in compared[name]]
        for name, key in keys.items()
    }
    return {
        "seeds": len(seeds),
        "accuracy": statistics.mean(ours for ours, _ in final.values()),
        "gap": statistics.mean(gaps),
        "gap_stderr": statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None,
        "reached": sum(r is not None for r in reached.values()),
        "to_target": {name: statistics.mean(values) if values else None for name, values in ratios.items()},
        "whole": {name: statistics.mean(values) if values else None for name, values in whole.items()},
        "clients_alone": clock == "client_seconds",
    }


def _share(value: float | None, digits: int, mark: str = "") -> str:
    return "–" if value is None else f"{value:.{digits}f}x{mark}"


def table(folder: Path, rows: list[str] | None = None) -> str:
    """Return the table of all result files, in Markdown."""
    found = load(folder)
    lines = [
        "| row | method | seeds | accuracy | - dense | reached | FLOPs to target | bytes to target | seconds to target "
        "| FLOPs, whole run | bytes, whole run | seconds, whole run |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (row, method), runs in found.items():
        if (rows and row not in rows) or "+" in method:
            continue
        is_dense, dense = method == "fedavg", found.get((row, "fedavg"), {})
        entry = against(runs, dense)
        if entry is None:
            mean = statistics.mean(r["curve"]["accuracy"][-1] for r in runs.values())
            lines.append(f"| {row} | {method} | {len(runs)} | {100 * mean:.2f} % | | | | | | | | |")
            continue
        mark = "" if entry["clients_alone"] else "†"
        error = "" if entry["gap_stderr"] is None else f" ± {100 * entry['gap_stderr']:.2f}"
        gap = "" if is_dense else f"{100 * entry['gap']:+.2f}{error}"
        lines.append(
            f"| {row} | {method} | {entry['seeds']} | {100 * entry['accuracy']:.2f} % | {gap} "
            f"| {entry['reached']} of {entry['seeds']} | {_share(entry['to_target']['flops'], 3)} "
            f"| {_share(entry['to_target']['bytes'], 4)} | {_share(entry['to_target']['seconds'], 2, mark)} "
            f"| {_share(entry['whole']['flops'], 3)} | {_share(entry['whole']['bytes'], 4)} "
            f"| {_share(entry['whole']['seconds'], 2, mark)} |"
        )
    return "\n".join(lines)


def paired(found: dict[tuple[str, str], dict[int, dict]], name: str) -> dict | None:
    """Return how a variant (``method+tag``) differs from its method over all rows and seeds that both have.

    ``method+tag+other`` is compared with ``method+tag``, and what keeps the channels of ``method+WIDER`` with that.

    Returns:
        None where there are fewer than two pairs; else ``pairs``, and (mean, standard error) of ``final`` and ``last``
        (difference of accuracy at the end, and of the mean of the last five evaluations), ``flops`` and ``bytes``
        (ratios of the whole runs).
    """
    columns: dict[str, list[float]] = {"final": [], "last": [], "flops": [], "bytes": []}
    for row, seed in ((row, seed) for (row, other), runs in found.items() if other == name for seed in runs):
        if (whole := _base(found, row, name, seed)) is None:
            continue
        mine, theirs = found[row, name][seed]["curve"], whole["curve"]
        last = [statistics.mean(curve["accuracy"][-5:]) for curve in (mine, theirs)]
        columns["final"].append(mine["accuracy"][-1] - theirs["accuracy"][-1])
        columns["last"].append(last[0] - last[1])
        for cost in ("flops", "bytes"):
            columns[cost].append(mine[cost][-1] / theirs[cost][-1])
    pairs = len(columns["final"])
    if pairs < 2:
        return None
    return {"pairs": pairs, **{k: (statistics.mean(v), statistics.stdev(v) / pairs**0.5) for k, v in columns.items()}}


def _base(found: dict[tuple[str, str], dict[int, dict]], row: str, name: str, seed: int) -> dict | None:
    """Return the run that a variant is compared with, None if there is none."""
    method = name.rpartition("+")[0]
    wider = found.get((row, f"{method}+{WIDER}"), {}).get(seed)
    if wider is not None and not name.endswith(WIDER) and _channels(wider) == _channels(found[row, name][seed]):
        return wider
    return found.get((row, method), {}).get(seed)


def _channels(run: dict) -> float:
    return run["config"]["prune"]["channels"]


def variants(folder: Path) -> str:
    """Return the table of all tagged variants against the method they vary, in Markdown; empty if there are none."""
    found = load(folder)
    lines = [
        "| variant | runs | final accuracy | last five evaluations | FLOPs | bytes |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted({name for _, name in found if "+" in name}):
        if entry := paired(found, name):
            points = [f"{100 * entry[k][0]:+.2f} ± {100 * entry[k][1]:.2f}" for k in ("final", "last")]
            ratios = [f"{entry[k][0]:.3f}x ± {entry[k][1]:.3f}" for k in ("flops", "bytes")]
            lines.append(f"| {name} | {entry['pairs']} | {' | '.join([*points, *ratios])} |")
    return "\n".join(lines) if len(lines) > 2 else ""
