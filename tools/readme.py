"""Write README's tables out of the committed result files: ``python tools/readme.py`` (--check: only compare).

Everything between ``<!-- NAME -->`` and ``<!-- /NAME -->`` (results, methods, layers, codec, curvature) is made here;
no figure is typed by hand.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("bench", "bench/experiments")]
import bench_narrow  # noqa: E402
import codec_marks  # noqa: E402
import hessian_marks  # noqa: E402
import layer_marks  # noqa: E402
import marks  # noqa: E402
import study  # noqa: E402
import table  # noqa: E402
from rows import NEAR_CHANCE  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "digits": "scikit-learn digits, Dirichlet 0.5",
    "fashion-mnist": "Fashion-MNIST, 2 classes and 200 images a client",
}


def _case(name: str, content: dict) -> list[str]:
    mean, seeds = content["mean"], content["mean"]["seeds"]
    ours, dense, ratio = mean["method"], mean["against"], mean["ratios"]
    gap, stderr = 100 * mean["accuracy_difference"], 100 * (mean["accuracy_difference_stderr"] or 0)
    target = mean["ratios_to_target"]
    reach = (
        f"{target['flops']:.2f}x FLOPs, {target['bytes']:.3f}x bytes, {target['seconds']:.2f}x seconds"
        f" ({mean['reached_target']} of {seeds} seeds got there)"
        if target
        else "not reached"
    )

    def row(what: str, value: str, scale: float, unit: str, rate: str) -> str:
        return f"| {what} | {dense[value] / scale:,.1f} {unit} | {ours[value] / scale:,.1f} {unit} | {rate} |"

    both = {
        side: {**mean[side], "bytes": mean[side]["bytes_up"] + mean[side]["bytes_down"]}
        for side in ("method", "against")
    }
    ours, dense = both["method"], both["against"]
    return [
        f"| **{NAMES[name]}** | dense FedAvg | AutoFLIP | |",
        f"| final accuracy | {100 * dense['final_accuracy']:.2f} % | {100 * ours['final_accuracy']:.2f} % "
        f"| {gap:+.2f} ± {stderr:.2f} points |",
        row("client FLOPs", "flops", 1e9, "GFLOP", f"**{ratio['flops']:.2f}x**"),
        row("bytes, up + down", "bytes", 1e6, "MB", f"**{ratio['bytes']:.3f}x**"),
        row("seconds", "seconds", 1, "s", f"**{ratio['seconds']:.2f}x**"),
        f"| to FedAvg's final accuracy | 1x | {reach} | |",
    ]


def tables() -> str:
    """Return the generated part of README."""
    lines, machine, parts = ["| | | | |", "|---|---|---|---|"], {}, []
    for name in NAMES:
        path = ROOT / "bench" / "results" / f"round-{name}.json"
        content = json.loads(path.read_text())
        lines += _case(name, content)
        first = content["runs"][0]["summary"]
        machine = first["machine"]
        parts.append(f"{name}: {first['rounds']} rounds, {first['parameters']:,} parameters")
    seeds = content["mean"]["seeds"]
    lines += [
        "",
        f"Means of {seeds} seeds, whole runs, the exploration round included; {'; '.join(parts)}; 20 clients, "
        f"a quarter a round. Accuracy: mean difference ± its standard error, paired by seed. Seconds: clients and "
        f"server, without evaluation. Machine: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} thread used, torch {machine['torch']}. "
        "Files: `bench/results/round-*.json`, made by `bench/bench_round.py`.",
    ]
    return "\n".join(lines)


def methods() -> str:
    """Return the part of README that compares methods, row by row; empty while no result file is committed."""
    results = ROOT / "bench" / "results"
    if not any(results.glob("method-*.json")):
        return ""
    lines = [
        "Real non-IID data, against dense FedAvg of the same seed: difference of final accuracy in points, and cost up "
        "to the first evaluated round that reaches FedAvg's final accuracy, in shares of what FedAvg itself spent to "
        "it, over the seeds that reached it.",
        "",
        table.table(results),
        "",
        "20 clients, a quarter a round, 40 rounds, 200 examples a client (HAR 300, digits all), tested every second "
        f"round (images: on 2000 examples). Rows of 80 rounds: those whose dense runs end below {NEAR_CHANCE} times "
        "chance after 40. Seconds: processor time of clients (†: of clients, server and the simulation's own counting) "
        "on a busy machine, with AVX-512 but for the first seeds of ResNet-8; – where a method and dense ran on "
        "different ones (`isa` in the files). Files: `bench/results/method-*.json`, made by `bench/experiments`.",
    ]
    if of_marks := marks.summary(results):
        lines += [
            "",
            "The marks that were set before measuring, over all rows but digits (a row where no seed reaches dense's "
            "accuracy counts as the dearest):",
            "",
            of_marks,
        ]
    if curves := marks.reachable(results):
        lines += [
            "",
            "What is reachable where a row missed one of them: accuracy minus dense FedAvg's final one, in points, "
            "once this share of dense's FLOPs is spent:",
            "",
            curves,
        ]
    if others := table.variants(results):
        lines += [
            "",
            "Variants over all rows and seeds that were run both ways, against the method itself:",
            "",
            others,
        ]
    for path in sorted(results.glob("study-*.json")):
        row = path.stem.removeprefix("study-")
        about = f"`bench/experiments/study.py {row}`; seconds of clients where both runs tell them apart, else of all"
        lines += ["", f"Variants of the default on {row} ({about}):", ""]
        lines += [study.table(json.loads(path.read_text()))]
    return "\n".join(lines)


def layers() -> str:
    """Return the part of README about single layers; empty while no result file is committed."""
    content = layer_marks.load()
    if not content["sections"]:
        return ""
    lines = [
        "A whole training step of a masked layer (forward, dx, dw, through autograd) over torch's dense layer in the "
        "same run; lower is better. Geometric means over shapes / the mark set before measuring; * = mark missed.",
        "",
        *layer_marks.marks_table(content),
        "",
        f"{layer_marks.machine_line(content)}. `bench/results/layers-cpu.json`, made by `bench/bench_layers.py`.",
    ]
    others = (
        ("On an Intel, whose AVX-512 has two multiply-add units that torch's products use", "avx512", "Intel"),
        ("On a machine without AVX-512", "avx2", ""),
    )
    for where, level, cpu in others:
        other = layer_marks.load(layer_marks.results(level, cpu))
        if other["sections"]:
            above, looked_at = layer_marks.slower(other)
            lines += [
                "",
                f"{where} ({layer_marks.machine_line(other)}), {len(above)} of {len(looked_at)} cases from 1 to 512 "
                "rows and density 1 to 0.01 take more than 1.05 times torch's layer:",
                "",
                *layer_marks.marks_table(other),
            ]
        if strided := layer_marks.shapes_table(other, "strided"):
            lines += [
                "",
                "Convolutions with a stride of 2 there (no mark was set), one column a density:",
                "",
                *strided,
            ]
    if floors := layer_marks.floors_table(content):
        lines += [
            "",
            "What the machine leaves to reach in these steps: one through autograd that computes nothing, and then the "
            "kept multiply-adds at peak rate or moving the weight once (its kept lines read, its dense gradient "
            "written), whichever takes longer. `bench/limits.py`.",
            "",
            *floors,
        ]
    if recurrent := layer_marks.recurrent_table():
        lines += [
            "",
            "Recurrent layers over torch's fused ones, the same step, one column a density (no mark was set; "
            "`bench/bench_recurrent.py`):",
            "",
            *recurrent,
        ]
    if narrow := bench_narrow.table():
        lines += [
            "",
            "Narrow types on the CPU, the same step over torch's dense layer in that type (weight * mask in brackets; "
            "no mark was set; `bench/bench_narrow.py`):",
            "",
            *narrow,
        ]
    if peers := layer_marks.peers_table(content, notes=False):
        lines += ["", "The same step, everything in one process, masks of single weights unless said:", "", *peers]
    return "\n".join(lines)


def filled(text: str, marker: str, part: str) -> str:
    """Return ``text`` with ``part`` between its two comments."""
    head, rest = text.split(f"<!-- {marker} -->\n", 1)
    tail = rest.split(f"<!-- /{marker} -->", 1)[1]
    return f"{head}<!-- {marker} -->\n{part}\n<!-- /{marker} -->{tail}"


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    parts = {"results": tables(), "methods": methods(), "layers": layers(), "codec": codec_marks.tables()}
    parts["curvature"] = "\n".join(hessian_marks.tables())
    new = text
    for marker, part in parts.items():
        new = filled(new, marker, part)
    if "--check" in sys.argv:
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
