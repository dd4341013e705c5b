"""Which setting of autoflip brings what: variants of the default on the cheap rows, each against dense FedAvg.

    python bench/experiments/study.py har-subject digits-dirichlet-0.1 --data-root DIR [--seeds 3] [--only "a;b"]

Writes bench/results/study-ROW.json and prints its table; a (variant, seed) whose configuration is there is not run
again. Costs are of the whole run and up to dense FedAvg's final accuracy with the same seed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from rows import ROWS, SCALED
from table import client_seconds, cpu_seconds, same, timed, to_target, told
from variants import ALIKE, PATCHES, VARIANTS

from autoflip import fed
from autoflip.report.runs import curve_of

RESULTS = Path(__file__).resolve().parents[1] / "results"


def run_one(row: str, variant: str, seed: int, root: str, known: dict) -> dict:
    """Return the entry of one run: its configuration and its curve."""
    fixed = [*SCALED, *ROWS[row], *ALIKE, "fed.against=none", f"fed.seed={seed}", f"data.root={root}"]
    overrides = [*fixed, *VARIANTS[variant]]
    config = fed.Config.load(overrides=overrides)
    if known and same(known["config"], config):
        return known
    with PATCHES.get(variant, nullcontext)():
        result = fed.run(config)
    curve = curve_of(config.fed.method, [r.as_dict() for r in result.records])
    seconds = {"seconds": cpu_seconds(result.records), "client_seconds": client_seconds(result.records)}
    spent = {"flops": curve.flops, "bytes": curve.bytes, "round": curve.rounds, **seconds}
    return {"config": told(config), "curve": {"accuracy": [round(a, 5) for a in curve.accuracy], **spent}}


def line(variant: str, runs: dict[str, dict], dense: dict[str, dict]) -> str:
    """Return one line of the table: means over the seeds that both have."""
    seeds = sorted(set(runs) & set(dense))
    final = {s: (runs[s]["curve"]["accuracy"][-1], dense[s]["curve"]["accuracy"][-1]) for s in seeds}
    gaps = [100 * (a - b) for a, b in final.values()]
    error = f" ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.2f}" if len(gaps) > 1 else ""
    late = statistics.mean(100 * statistics.mean(runs[s]["curve"]["accuracy"][-5:]) for s in seeds)
    cells = [variant, f"{100 * statistics.mean(a for a, _ in final.values()):.2f}", f"{late:.2f}"]
    cells.append(f"{statistics.mean(gaps):+.2f}{error}")
    for key in ("flops", "bytes", timed([runs[s]["curve"] for s in seeds], [dense[s]["curve"] for s in seeds])):
        whole = [runs[s]["curve"][key][-1] / dense[s]["curve"][key][-1] for s in seeds]
        ours = {s: to_target(runs[s]["curve"], final[s][1]) for s in seeds}
        base = {s: to_target(dense[s]["curve"], final[s][1]) for s in seeds}
        ratios = [ours[s][key] / base[s][key] for s in seeds if ours[s]]
        reach = f"{statistics.mean(ratios):.4f} ({len(ratios)}/{len(seeds)})" if ratios else "–"
        cells += [f"{statistics.mean(whole):.4f}", reach]
    return "| " + " | ".join(cells) + " |"


def table(found: dict[str, dict]) -> str:
    """Return the table of what study-ROW.json holds, in Markdown; costs are shares of dense FedAvg's."""
    head = "| variant | final | last 10 rounds | - dense | FLOPs | FLOPs to target | bytes | bytes to target |"
    lines = [f"{head} seconds | seconds to target |", "|" + "---|" * 10]
    dense = found.get("fedavg", {})
    return "\n".join(lines + [line(name, runs, dense) for name, runs in found.items() if set(runs) & set(dense)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="variants, separated by semicolons; default: all")
    parser.add_argument("--data-root", default=os.environ.get("AUTOFLIP_DATA", ""))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    chosen = parser.parse_args()
    names = ["fedavg", *(chosen.only.split(";") if chosen.only else VARIANTS)]
    for row in chosen.rows:
        path = RESULTS / f"study-{row}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        for name in dict.fromkeys(names):
            for seed in range(0 if chosen.table else chosen.seeds):
                runs = found.setdefault(name, {})
                runs[str(seed)] = run_one(row, name, seed, chosen.data_root, runs.get(str(seed), {}))
                path.write_text(json.dumps(found) + "\n")
            if not chosen.table:
                print(row, line(name, found[name], found["fedavg"]), flush=True)
        if chosen.table:
            print(f"\n{row}\n\n{table(found)}")


if __name__ == "__main__":
    main()
