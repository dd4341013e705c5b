"""What bench/results/hessian-cpu.json and -avx2.json say, as README shows it."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "hessian-cpu.json"
NETS = {
    "mlp B256": "MLP 784-200-200-10, batch 256",
    "cnn B64": "CNN, 582k weights, batch 64",
    "cnn B256": "CNN, batch 256",
    "resnet8 B64": "ResNet-8, batch 64",
    "lstm B64": "char LSTM 256x2, batch 64",
    "digits GELU B16": "small GELU net, batch 16",
}
# method -> heading; the two traces are of as many probes, named in the method
DIAGONALS = {
    "ggn-mc, 1 draw": "one draw",
    "ggn-mc, 4 draws": "four draws",
    "ggn-exact": "exact",
    "BackPACK DiagGGNExact": "BackPACK, exact",
}
TRACES = {"hutchinson trace": "Hutchinson trace", "PyHessian trace": "PyHessian's"}


def table(path: Path = RESULTS) -> list[str]:
    """Return the lines of README's part on curvature; empty without the result file."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    found: dict[str, dict[str, float]] = {}
    probes: dict[str, str] = {}
    for row in content["rows"]:
        name, _, count = row["method"].partition(", ")
        in_row = found.setdefault(row["case"], {})
        in_row[name if name in TRACES else row["method"]] = row["gradients"]
        if name in TRACES:
            probes[row["case"]] = count.split()[0]
    columns = {**DIAGONALS, **TRACES}
    lines = [f"| in gradients of the same batch | {' | '.join(columns.values())} | probes |"]
    lines.append("|---|" + "---|" * (len(columns) + 1))
    for case, name in NETS.items():
        cells = [f"{found[case][m]:.2f}" if m in found[case] else "–" for m in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {probes[case]} |")
    equal, machine = content.get("equal_error"), content["machine"]
    text = (
        "Gauss-Newton diagonals by draws (the LSTM's of bfloat16 products with float32 sums, where the CPU has them, "
        "in AMX's tiles, through dense layers too, if it has those) "
        "and exactly, then traces of the Hessian by as many probes. "
    )
    if equal:  # where PyHessian was installed
        text += (
            f"At equal error ({abs(equal['pyhessian_stderr']):.1%} of the trace, {equal['case']}, trained) PyHessian "
            f"takes {equal['pyhessian_probes']} probes and {equal['pyhessian_seconds']:.1f} s, `{equal['method']}` "
            f"{1000 * equal['seconds']:.0f} ms: {equal['times_faster']:.0f} times less. "
        )
    lines += [
        "",
        f"{text}{machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}; medians, interleaved. "
        f"`bench/results/{path.name}`, made by `bench/bench_hessian.py`.",
    ]
    return lines


def tables() -> list[str]:
    """Return the table of the first machine with AVX-512, and those of the others."""
    lines = table()
    for where, name in (("On an Intel with AVX-512", "intel"), ("On a machine without AVX-512", "avx2")):
        if other := table(RESULTS.with_name(f"hessian-cpu-{name}.json")):
            lines += ["", f"{where}:", "", *other]
    return lines
