"""The headline: AutoFLIP against dense FedAvg, whole runs, several seeds, every figure out of the ledger.

    python bench/bench_round.py digits fashion-mnist --data-root DIR [--seeds 3]

Writes bench/results/round-<data set>.json, from which README's table is made (tools/readme.py). A seed that the
file already holds, made by the same settings, is not run again.
"""

import argparse
import json
import statistics
from pathlib import Path

import pytest

from autoflip import fed

RESULTS = Path(__file__).parent / "results"
CASES = {
    "digits": [],
    "fashion-mnist": [
        "data.partition=pathological",
        "data.samples_per_client=200",
        "data.test_examples=2000",
        "fed.eval_every=2",
    ],
}


def run_case(name: str, seeds: int, root: str, settings: list[str]) -> dict:
    path = RESULTS / f"round-{name}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = []
    for seed in range(seeds):
        overrides = [f"data.name={name}", *CASES[name], *settings, f"fed.seed={seed}"]
        config = fed.Config.load(overrides=[*overrides, f"data.root={root}"])
        told = {k: v for k, v in config.as_dict().items() if k != "data"}
        told["data"] = {k: v for k, v in config.as_dict()["data"].items() if k != "root"}
        known = next((r for r in old if r["config"] == told), None)
        if known is None:
            result = fed.run(config)
            known = {"config": told, "summary": result.summary}
        runs.append(known)
        mine, theirs = known["summary"]["method"], known["summary"]["against"]
        print(
            f"{name} seed {seed}: {mine['final_accuracy']:.4f} against {theirs['final_accuracy']:.4f}, "
            f"ratios {known['summary']['ratios']}",
            flush=True,
        )
        content = {"runs": runs, "mean": means([r["summary"] for r in runs])}
        path.write_text(json.dumps(content, indent=1) + "\n")
    return content


def means(summaries: list[dict]) -> dict:
    """Return means over seeds, and the standard error of the mean accuracy difference (paired by seed)."""
    gaps = [s["method"]["final_accuracy"] - s["against"]["final_accuracy"] for s in summaries]
    mean = {
        "seeds": len(summaries),
        "accuracy_difference": statistics.mean(gaps),
        "accuracy_difference_stderr": statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None,
        "ratios": {v: statistics.mean(s["ratios"][v] for s in summaries) for v in ("flops", "bytes", "seconds")},
    }
    reached = [s["ratios"]["to_target"] for s in summaries if s["ratios"]["to_target"]]
    mean["reached_target"] = len(reached)
    mean["ratios_to_target"] = (
        {v: statistics.mean(r[v] for r in reached) for v in ("flops", "bytes", "seconds")} if reached else None
    )
    for side in ("method", "against"):
        mean[side] = {"final_accuracy": statistics.mean(s[side]["final_accuracy"] for s in summaries)}
        for value in ("flops", "bytes_up", "bytes_down", "seconds"):
            mean[side][value] = statistics.mean(s[side][value]["total"] for s in summaries)
    return mean


@pytest.mark.parametrize("method", ["fedavg", "autoflip"])
def test_round(benchmark, method):
    """One short run on digits: five rounds, the exploration round included."""
    benchmark.group = "five rounds on digits"
    config = fed.Config.load(overrides=[f"fed.method={method}", "fed.against=none", "fed.rounds=5"])
    result = benchmark.pedantic(lambda: fed.run(config), rounds=2, warmup_rounds=1)
    benchmark.extra_info.update(result.cost.as_dict())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-root", default="", help="folder of the real data sets; default: AUTOFLIP_DATA")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    chosen = parser.parse_args()
    for case in chosen.cases:
        print(json.dumps(run_case(case, chosen.seeds, chosen.data_root, chosen.set)["mean"], indent=1))
