"""The method's table, piece by piece: every (row, method, seed) that has no result yet is run.

    python bench/experiments [ROW ...] --data-root DIR [--methods a,b] [--seeds 3] [--set a.b=c --tag NAME]
    python bench/experiments --table

Each run goes through a folder under runs/experiments, so that a killed one is continued, and ends as
bench/results/method-ROW-METHOD-seedN.json. One whose configuration is the same is not run again. FLOPs and bytes
are exact whatever else the machine does; seconds are processor time, of clients alone (``client_seconds``: receive,
train, send) and of all but the evaluation (``seconds``); each file says under which load and with which instruction
set they were measured, and the table compares those of one instruction set only.
The table compares the clients' seconds; † marks rows with files that hold only those of all.
A --tag keeps variants (--set) apart: method-ROW-METHOD+TAG-seedN.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import marks
import torch
from rows import ALL_METHODS_ON, EVERYWHERE, ROWS, SCALED
from table import client_seconds, cpu_seconds, same, table, told, variants

from autoflip import fed
from autoflip.fed.sections import METHOD_NAMES
from autoflip.report.runs import curve_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


def run_one(row: str, method: str, seed: int, root: str, settings: list[str], tag: str) -> dict:
    """Run one piece unless its result is there; return the content of its result file."""
    name = f"{row}-{method}{'+' + tag if tag else ''}-seed{seed}"
    path, folder = RESULTS / f"method-{name}.json", ROOT / "runs" / "experiments" / name
    overrides = [*SCALED, *ROWS[row], *settings, f"fed.method={method}", "fed.against=none", f"fed.seed={seed}"]
    config = fed.Config.load(overrides=[*overrides, f"data.root={root}"])
    if path.exists() and same(json.loads(path.read_text())["config"], config):
        return json.loads(path.read_text())
    before = os.getloadavg()[0]
    if (folder / "config.toml").exists() and fed.Config.load(folder / "config.toml") != config:
        shutil.rmtree(folder)  # other settings
    if (folder / "records.jsonl").exists():
        result = fed.resume(folder)
    else:
        result = fed.run(config, out=folder)
    curve = curve_of(method, [r.as_dict() for r in result.records])
    content = {
        "row": row,
        "method": method,
        "tag": tag,
        "seed": seed,
        "config": told(config),
        "summary": result.summary,
        "load": [round(before, 1), round(os.getloadavg()[0], 1)],
        "isa": torch.backends.cpu.get_cpu_capability(),
        "curve": {
            "round": curve.rounds,
            "accuracy": [round(a, 5) for a in curve.accuracy],
            "flops": curve.flops,
            "bytes": curve.bytes,
            "seconds": cpu_seconds(result.records),
            "client_seconds": client_seconds(result.records),
        },
        "density": [round(r.density, 4) for r in result.records],
        "channels": [round(r.channels, 4) for r in result.records],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n")
    shutil.rmtree(folder)
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--methods", default="", help="names separated by commas; default: what the table asks for")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--data-root", default=os.environ.get("AUTOFLIP_DATA", ""))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--tag", default="", help="name of the variant that --set makes")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    chosen = parser.parse_args()
    if unknown := set(chosen.rows) - set(ROWS):
        parser.error(f"there is no row {sorted(unknown)[0]!r}; wanted some of {', '.join(ROWS)}")
    if chosen.set and not chosen.tag:
        parser.error("--set makes a variant; name it by --tag")
    rows = chosen.rows or [row for row in ROWS if not row.startswith(("digits", "mnist"))]
    for seed in [] if chosen.table else range(chosen.first_seed, chosen.first_seed + chosen.seeds):
        for row in rows:
            rest = [m for m in METHOD_NAMES if m not in EVERYWHERE] if row in ALL_METHODS_ON else []
            for method in chosen.methods.split(",") if chosen.methods else [*EVERYWHERE, *rest]:
                content = run_one(row, method, seed, chosen.data_root, chosen.set, chosen.tag)
                final, spent = content["summary"]["method"]["final_accuracy"], content["curve"]
                print(
                    f"{row} {method}{'+' + chosen.tag if chosen.tag else ''} seed {seed}: accuracy {final:.4f}, "
                    f"{spent['flops'][-1] / 1e9:.0f} GFLOP, {spent['bytes'][-1] / 1e6:.1f} MB",
                    flush=True,
                )
    print(table(RESULTS, chosen.rows))
    if of_marks := marks.summary(RESULTS):
        print(f"\n{of_marks}")
    if curves := marks.reachable(RESULTS):
        print(f"\naccuracy minus dense FedAvg's final one, where a row missed a mark\n\n{curves}")
    if others := variants(RESULTS):
        print(f"\nvariants against the method itself, same rows and seeds\n\n{others}")


if __name__ == "__main__":
    main()
