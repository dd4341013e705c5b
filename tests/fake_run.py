"""A run folder as a run would leave it, out of formulas: for tests of whatever reads run folders."""

import json
import math
import random
from pathlib import Path

CONFIG = """[fed]
method = "autoflip"
against = "fedavg"
rounds = 40
seed = 0

[data]
name = "digits"
partition = "dirichlet"
alpha = 0.5

[wire]
values = "int8"
"""
LAYERS = ("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight")


def records(method: str, *, seed: int = 0, rounds: int = 40) -> list[dict]:
    """One dict a round; the sparse method learns about as well for a fraction of the cost."""
    luck = random.Random(f"{method}-{seed}")
    dense = method == "fedavg"
    lines = []
    for at in range(rounds):
        exploring = not dense and at < 2
        density = 1.0 if dense or exploring else 0.1
        clients = []
        for client in range(10):
            broken = method == "autoflip" and (at, client) in {(5, 3), (17, 8)}
            clients.append(
                {
                    "client": client,
                    "bytes_up": 0
                    if broken
                    else int((820_000 if dense else 190_000 * density + 4_000) * luck.uniform(0.98, 1.02)),
                    "bytes_down": int((820_000 if dense else 410_000 * density + 6_000) * luck.uniform(0.99, 1.01)),
                    "seconds": (0.11 if dense else 0.05 + 0.06 * density) * luck.uniform(0.9, 1.2),
                    "flops": int(48_000_000 * (0.12 + 0.88 * density)) + luck.randrange(1000),
                    "examples": 90 + client,
                    "loss": 2.3 * math.exp(-at / 9),
                    "error": "update <rejected>: 3 values of 'fc1.weight' are NaN" if broken else None,
                }
            )
        client_seconds, server_seconds = sum(c["seconds"] for c in clients), 0.02 * luck.uniform(0.8, 1.5)
        pace, top = (11.0, 0.931) if dense else (9.0, 0.937)
        lines.append(
            {
                "method": method,
                "seed": seed,
                "round": at,
                "phase": "exploration" if exploring else "training",
                "accuracy": round(0.1 + (top - 0.1) * (1 - math.exp(-(at + 1) / pace)) + luck.gauss(0, 0.006), 4),
                "loss": 2.3 * math.exp(-at / 9),
                "flops": sum(c["flops"] for c in clients),
                "bytes_up": sum(c["bytes_up"] for c in clients),
                "bytes_down": sum(c["bytes_down"] for c in clients),
                "seconds": client_seconds + server_seconds,
                "client_seconds": client_seconds,
                "server_seconds": server_seconds,
                "eval_seconds": 0.2,
                "density": density,
                "channels": 1.0 if dense or exploring else 0.4,
                "layers": {name: min(1.0, density * (1 + i)) for i, name in enumerate(LAYERS)},
                "clients": clients,
            }
        )
    return lines


def summarize(by_method: dict[str, list[dict]], *, dataset: str = "digits") -> dict:
    """The summary of one or two methods' records: the first is the method, the second what it stands against."""
    names = list(by_method)
    target = by_method[names[1]][-1]["accuracy"] if len(names) > 1 else None

    def total(lines, *keys):
        split = {
            phase: sum(r[k] for r in lines if r["phase"] == phase for k in keys)
            for phase in ("exploration", "training")
        }
        return {**split, "total": split["exploration"] + split["training"]}

    def side(name):
        lines = by_method[name]
        reached = None
        for i, line in enumerate(lines):
            if target is not None and line["accuracy"] >= target:
                spent = lines[: i + 1]
                reached = {
                    "accuracy": target,
                    "flops": sum(r["flops"] for r in spent),
                    "bytes": sum(r["bytes_up"] + r["bytes_down"] for r in spent),
                    "seconds": sum(r["seconds"] for r in spent),
                    "round": line["round"],
                }
                break
        return {
            "name": name,
            "final_accuracy": lines[-1]["accuracy"],
            "best_accuracy": max(r["accuracy"] for r in lines),
            **{key: total(lines, key) for key in ("flops", "bytes_up", "bytes_down", "seconds")},
            "density": lines[-1]["density"],
            "to_target": reached,
        }

    method = side(names[0])
    against = side(names[1]) if len(names) > 1 else None
    ratios = None
    if against:
        both = [s["bytes_up"]["total"] + s["bytes_down"]["total"] for s in (method, against)]
        ratios = {
            key: method[key]["total"] / against[key]["total"] for key in ("flops", "bytes_up", "bytes_down", "seconds")
        }
        ratios["bytes"] = both[0] / both[1]
        ratios["to_target"] = None
        if method["to_target"]:
            ratios["to_target"] = {
                k: method["to_target"][k] / against["to_target"][k] for k in ("flops", "bytes", "seconds")
            }
    return {
        "version": 1,
        "dataset": dataset,
        "partition": "dirichlet",
        "seed": 0,
        "rounds": len(by_method[names[0]]),
        "machine": {"cpu": "A CPU @ 2.0 GHz", "cores": 2, "torch": "2.13.0", "autoflip": "0.1.0", "gpu": None},
        "target_accuracy": target,
        "method": method,
        "against": against,
        "ratios": ratios,
    }


def write_run(folder: Path, *methods: str, seed: int = 0, rounds: int = 40, **more) -> Path:
    """Write config.toml, records.jsonl and summary.json of a run of one or two methods; return the folder."""
    by_method = {method: records(method, seed=seed, rounds=rounds) for method in methods or ("autoflip", "fedavg")}
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line) for lines in by_method.values() for line in lines]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps(summarize(by_method, **more)))
    (folder / "config.toml").write_text(CONFIG)
    return folder
