"""What bench/results/layers-cpu.json says: geometric means over shapes, beside the marks that were set beforehand.

Beside it lie files of machines with narrower instructions, layers-cpu-avx2.json for one.
"""

import json
import statistics
from pathlib import Path

import limits

NEVER_SLOWER = 1.05
RESULTS = Path(__file__).parent / "results" / "layers-cpu.json"
RECURRENT = RESULTS.with_name("recurrent-cpu.json")
DENSITIES = [0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.01]
# full training step over torch's dense one, at most; set before anything was measured
MARKS = {
    "Linear, batch >= 32": [0.80, 0.60, 0.42, 0.32, 0.20, 0.12, 0.05],
    "Linear, batch 16": [0.90, 0.75, 0.48, 0.40, 0.24, 0.16, 0.09],
    "Conv2d": [0.85, 0.65, 0.47, 0.35, 0.22, 0.17, 0.11],
    "4x1 / 16x1 block Linear": [0.62, 0.48, 0.30, 0.20, 0.12, 0.08, 0.04],
}


def results(level: str, cpu: str = "") -> Path:
    """Return the file of machines whose best instruction set is ``level``: "avx512", "avx2" or "base".

    Intel's ``cpu`` has one of its own: where AVX-512 takes two whole vectors a cycle, torch's products take half as
    long as on a Zen 4 and leave less to gain.
    """
    maker = "-intel" if "Intel" in cpu else ""
    return RESULTS.with_stem(RESULTS.stem + ("" if level == "avx512" else f"-{level}") + maker)


def load(path: Path = RESULTS) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"sections": {}}


def column(case: dict) -> str | None:
    """Return the column of MARKS that a case counts in."""
    if case["layer"] == "conv":
        return "Conv2d"
    if case["block"] in ("4x1", "16x1"):
        return "4x1 / 16x1 block Linear"
    if case["block"] == "1x1":
        return "Linear, batch 16" if case["batch"] == 16 else "Linear, batch >= 32"
    return None


def means(content: dict, name: str = "ours") -> dict[str, dict[float, float]]:
    """Return column -> density -> geometric mean over shapes (and batches, blocks) of the median ratio."""
    found: dict[str, dict[float, list[float]]] = {}
    for section in ("linear", "conv", "blocks"):
        for case in content["sections"].get(section, {}).get("cases", []):
            where = column(case)
            if where and name in case["ratio"]:
                found.setdefault(where, {}).setdefault(case["density"], []).append(case["ratio"][name][1])
    return {c: {d: round(statistics.geometric_mean(v), 4) for d, v in by.items()} for c, by in found.items()}


def marks_table(content: dict) -> list[str]:
    """Return the lines of a table (markdown): measured / mark; an asterisk where the mark was missed."""
    measured = means(content)
    lines = ["| density | " + " | ".join(MARKS) + " |", "|---|" + "---|" * len(MARKS)]
    for i, density in enumerate(DENSITIES):
        cells = []
        for name, marks in MARKS.items():
            value = measured.get(name, {}).get(density)
            miss = "" if value is None or value <= marks[i] else "*"
            cells.append("-" if value is None else f"{value:.2f}{miss} / {marks[i]:.2f}")
        lines.append(f"| {density:g} | " + " | ".join(cells) + " |")
    return lines


def floors_table(content: dict) -> list[str]:
    """Return the lines of a table of what the machine leaves to reach (bench/limits.py), where it was measured."""
    found: dict[str, dict[float, list[float]]] = {}
    for name in ("linear", "conv", "blocks"):
        for case in content["sections"].get(name, {}).get("cases", []):
            where, least = column(case), limits.floor(case)
            if where and least is not None:
                found.setdefault(where, {}).setdefault(case["density"], []).append(least)
    if not found:
        return []
    lines = ["| floor at density | " + " | ".join(MARKS) + " |", "|---|" + "---|" * len(MARKS)]
    for density in DENSITIES:
        values = [found.get(name, {}).get(density) for name in MARKS]
        cells = [f"{statistics.geometric_mean(v):.2f}" if v else "-" for v in values]
        lines.append(f"| {density:g} | " + " | ".join(cells) + " |")
    return lines


def recurrent_table(path: Path = RECURRENT) -> list[str]:
    """Return the lines of the table of recurrent layers, one row a shape; empty without its result file."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text())["rows"]
    found: dict[tuple, dict[float, float]] = {}
    for row in rows:
        found.setdefault((row["kind"], *row["shape"]), {})[row["density"]] = row["ratio"]["ours"]
    lines = ["| layer | " + " | ".join(f"{d:g}" for d in DENSITIES) + " |", "|---|" + "---|" * len(DENSITIES)]
    for (kind, steps, batch, inputs, hidden), ratios in found.items():
        name = f"{kind} {inputs} -> {hidden}, {steps} steps, batch {batch}"
        lines.append(f"| {name} | " + " | ".join(f"{ratios[d]:.2f}" for d in DENSITIES) + " |")
    return lines


def _median(case: dict, name: str) -> float:
    """Return a case's ratio of ``name``; torch CSR's is that of its faster way to dw; NaN where there is none."""
    ratio = case["ratio"]
    if name == "ideal":
        return case["kept"]
    if name == "roofline":
        return case["roof"] or float("nan")
    if name == "torch CSR":
        return min((v[1] for n, v in ratio.items() if n.startswith(name)), default=float("nan"))
    return ratio[name][1] if name in ratio else float("nan")


def _rows(cases: list[dict], names: list[str], head: str) -> list[str]:
    """Return table lines: one row a name, one column a density, geometric means over the cases that have it."""
    lines = [f"| {head} | " + " | ".join(f"{d:g}" for d in DENSITIES) + " |", "|---|" + "---|" * len(DENSITIES)]
    for name in names:
        cells = []
        for density in DENSITIES:
            values = [_median(case, name) for case in cases if case["density"] == density]
            values = [v for v in values if v == v]
            cells.append(f"{statistics.geometric_mean(values):.2f}" if values else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def peers_table(content: dict, *, notes: bool = True) -> list[str]:
    """Return the lines of the tables of everything that ran in one process with ours, by kind of layer.

    ``notes`` adds why a peer is missing.
    """
    lines: list[str] = []
    cases = content["sections"].get("peers", {}).get("cases", [])
    linear = ["weight*mask", "torch prune", "torch CSR", "scipy", "sparseprop", "sparselab"]
    kinds = [
        ("Linear, batch 64", linear, lambda c: c["block"] == "1x1" and c["layer"] == "linear" and c["batch"] == 64),
        ("Linear, batch 16", linear, lambda c: c["block"] == "1x1" and c["layer"] == "linear" and c["batch"] == 16),
        ("Linear, 16x16 blocks", ["weight*mask", "torch BSR"], lambda c: c["block"] == "16x16"),
        (
            "Conv2d, batch 16",
            ["weight*mask", "torch prune", "unfold + torch CSR", "sparseprop"],
            lambda c: c["layer"] == "conv",
        ),
    ]
    for head, names, belongs in kinds:
        chosen = [case for case in cases if belongs(case)]
        if chosen:
            lines += [*_rows(chosen, [*names, "ours", "ideal", "roofline"], head), ""]
    missing = {f"{name}: {why}" for case in cases for name, why in case["why"].items()}
    return [*lines[:-1], *(sorted(missing) if notes else ())]


def shapes_table(content: dict, section: str) -> list[str]:
    """Return the lines of a table of ours, one row a shape and batch."""
    cases = content["sections"].get(section, {}).get("cases", [])
    lines = [f"| {section} | " + " | ".join(f"{d:g}" for d in DENSITIES) + " |", "|---|" + "---|" * len(DENSITIES)]
    rows: dict[str, dict[float, float]] = {}
    for case in cases:
        block = "" if case["block"] == "1x1" else f" {case['block']} blocks"
        rows.setdefault(f"{case['shape']} batch {case['batch']}{block}", {})[case["density"]] = _median(case, "ours")
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[d]:.2f}" if d in row else "-" for d in DENSITIES) + " |")
    return lines if rows else []


def slower(content: dict) -> tuple[list[dict], list[dict]]:
    """Return the cases above 1.05x dense, and all that were looked at for it."""
    cases = content["sections"].get("never-slower", {}).get("cases", [])
    return [case for case in cases if case["ratio"]["ours"][1] > NEVER_SLOWER], cases


def never_slower(content: dict) -> list[str]:
    """Return the cases above 1.05x dense, and how far dense strays from itself."""
    above, cases = slower(content)
    if not cases:
        return []
    noise = sorted(abs(case["ratio"]["dense"][1] - 1) for case in cases)
    lines = [
        f"{len(above)} of {len(cases)} cases above {NEVER_SLOWER}x dense; dense against itself strays by "
        f"{noise[len(noise) // 2]:.1%} (median) to {noise[-1]:.1%} (most)"
    ]
    for case in sorted(above, key=lambda c: -c["ratio"]["ours"][1]):
        low, middle, high = case["ratio"]["ours"]
        lines.append(
            f"  {case['layer']} {case['shape']} batch {case['batch']} density {case['density']:g}: "
            f"{middle:.2f} ({low:.2f} to {high:.2f}) of {case['dense_us']:.0f} us"
        )
    return lines


def threads_table(content: dict) -> list[str]:
    """Return the lines of a table of what a second thread brings, ours and dense."""
    lines = ["| 2 threads over 1 | density | ours | dense |", "|---|---|---|---|"]
    cases = content["sections"].get("threads", {}).get("cases", [])
    for case in cases:
        ours, dense = (case["speed_up"][name][1] for name in ("ours", "dense"))
        what = f"{case['layer']} {case['shape']} batch {case['batch']}"
        lines.append(f"| {what} | {case['density']:g} | {ours:.2f} | {dense:.2f} |")
    return lines if cases else []


def machine_line(content: dict) -> str:
    """Return what the figures were measured on."""
    m, peak = next(iter(content["sections"].values()))["machine"], content.get("fma_peak_gflops")
    line = f"{m['cpu']}, {m['threads']} thread of {m['cores']} cores, {m['isa']}, torch {m['torch']}"
    return line + (f", multiply-add peak {peak:.0f} GFLOP/s a core" if peak else "")


def report(content: dict) -> list[str]:
    """Return every table that the file has figures for."""
    if not content["sections"]:
        return ["nothing is measured yet"]
    parts = [
        [machine_line(content), "training step over torch's dense one, median of paired ratios; lower is better"],
        ["geometric means over shapes / mark; * = missed", *marks_table(content)],
        floors_table(content),
        *(shapes_table(content, section) for section in ("linear", "conv", "strided", "blocks")),
        peers_table(content),
        never_slower(content),
        threads_table(content),
    ]
    return [line for part in parts if part for line in ["", *part]][1:]


def dumps(content: dict) -> str:
    """Return the file's text: JSON, one line a case."""
    sections = []
    for name, section in content["sections"].items():
        rows = ",\n".join("   " + json.dumps(case) for case in section["cases"])
        head = {k: v for k, v in section.items() if k != "cases"}
        sections.append(f'  {json.dumps(name)}: {json.dumps(head)[:-1]}, "cases": [\n{rows}\n  ]}}')
    rest = {k: v for k, v in content.items() if k != "sections"}
    joined = ",\n".join(sections)
    return f'{json.dumps(rest)[:-1]}, "sections": {{\n{joined}\n}}}}\n'
