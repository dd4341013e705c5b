"""README's tables of the codec, out of bench/results/codec-bytes.json, codec-accuracy.json and codec-speed.json."""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MODELS = {"mlp": "MLP, MNIST", "cnn": "CNN, Fashion-MNIST", "resnet": "ResNet-18/2, CIFAR-10"}
PEERS = (
    "pickle", "torch.save, sparse COO", "npz", "zstd-3", "zstd-3, shuffled", "blosc2 shuffle", "blosc2 bitshuffle",
    "pcodec", "ZipNN", "COO int32 + zstd-3", "CSR", "bitmap + zstd-3",
)  # fmt: skip
KNOWN = ("x[mask]", "x[mask] + zstd-3, shuffled", "x[mask] + pcodec", "x[mask] + ZipNN")
COPY = "torch's copy_"
SPEED = (
    "read", "read both", "pack", "subtract + pack", "subtract + int8", "expand fp32", "expand int8", "expand int8, new",
    "expand int8, first touch", "add int8",
    "mask int8: encode", "mask int8: decode", "mask int8, new: decode", "mask int8, accumulate: decode",
    "mask bf16: encode", "mask bf16: decode", "explicit int8: encode", "explicit int8: decode",
    "pickle: encode", "pickle: decode", "torch.save: encode", "dense zstd-3: encode",
)  # fmt: skip


def _load(name: str) -> dict:
    path = RESULTS / f"codec-{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _machine(content: dict) -> str:
    m = content["machine"]
    return f"{m['cpu']}, {m['cores']} cores, {m['threads']} thread used, torch {m['torch']}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def bytes_table(content: dict) -> list[str]:
    """Bytes a kept weight under a shared mask, per model."""
    cases = content["cases"]

    def cell(case: str, density: str, what: str) -> str:
        row = cases[case][density]
        size = row[what] if what in row else row["values"][what]["ours"]["shared"]
        return f"{size / row['kept']:.2f} B ({row['pickle'] / size:.0f}x)"

    names = {
        "int8": "int8, 127 levels",
        "int8, 63 levels": "int8, 63 levels",
        "int8, 40 levels": "int8, 40 levels",
        "int4": "int4",
        "bf16": "bf16",
        "fp32": "float32, lossless",
        "downlink": "server's bf16 model against the last one",
    }
    rows = [
        [f"{name}, density {density}", *(cell(case, density, what) for case in cases)]
        for what, name in names.items()
        for density in (("0.1", "0.05") if what.startswith("int8") else ("0.1",))
    ]
    for density in ("0.1", "0.05"):
        index = [cases[case][density]["index"] for case in cases]
        share = [f"{i['ours'] / i['entropy_per_tensor']:.2f}" for i in index]
        rows.append([f"the mask itself, density {density}, over its entropy per tensor", *share])
    for label in ("top 0.05", "top 0.01"):
        index = [cases[case][label]["index"] for case in cases]
        rows.append(
            [f"index of the {label} of all weights, over flat entropy"]
            + [f"{i['ours'] / i['entropy_flat']:.2f}" for i in index]
        )
    return _table(["a kept weight (times below pickled float32)", *(MODELS[c] for c in cases)], rows)


def accuracy_table(content: dict) -> list[str]:
    """Accuracy of masked rounds with uplinks coded in several ways, minus that of float32, and error of an update."""
    cases = content["cases"]
    rows = []
    for way in next(iter(cases.values()))["ways"]:
        cells = []
        for case in cases.values():
            apart = [100 * (a - b) for a, b in zip(*(case["ways"][w]["accuracy"] for w in (way, "fp32")), strict=True)]
            spread = statistics.stdev(apart) if len(apart) > 1 else 0.0
            cells.append(f"{statistics.mean(apart):+.2f} ± {spread:.2f} ({case['ways'][way]['error']:.3f})")
        rows.append([way, *cells])
    return _table(["points of accuracy beside float32 (error of an update)", *(MODELS[c] for c in cases)], rows)


def peers_table(content: dict) -> list[str]:
    """How many times our frame others need at density 0.1, the values equally precise."""
    cases, rows = content["cases"], []
    for way, peers in (("explicit", PEERS), ("shared", KNOWN)):
        for peer in peers:
            cells = []
            for case in cases:
                values = cases[case]["0.1"]["values"].values()
                found = [v[way][peer] / v["ours"][way] for v in values if peer in v[way]]
                cells.append(" / ".join(f"{f:.2f}" for f in found))
            rows.append([peer, *cells])
    first = next(iter(cases.values()))["0.1"]["values"]
    names = " / ".join({"fp32": "float32", "int8, 40 levels": "int8 of 40 levels"}.get(v, v) for v in first)
    return _table([f"times our bytes: {names}", *(MODELS[c] for c in cases)], rows)


def every_case(content: dict) -> list[str]:
    """Say how the smallest peer of each case stands to our frame, at our default level and at level 19."""
    found: dict[str, list[tuple[float, str]]] = {"ours": [], "ours, level 19": []}
    for model, rows in content["cases"].items():
        for density, row in rows.items():
            for values, cell in row["values"].items():
                for way, (ours, shares) in ((w, pair) for w in cell["ours"] for pair in found.items()):
                    name = f"{MODELS[model]}, {density}, {values}, {way}"
                    shares.append((min(cell[way].values()) / cell[ours][way], name))
    lines = []
    for ours, what in (("ours", "At the default level"), ("ours, level 19", "At level 19")):
        shares = [share for share, _ in found[ours]]
        lost = [f"{name} {share:.3f}" for share, name in sorted(found[ours]) if share < 1]
        few = f", fewer in {len(lost)}: {'; '.join(lost)}" if lost else ""
        lines.append(
            f"{what}, of all {len(shares)} cases (densities 1 to 0.05, top 5 and 1 %, all values, "
            "shared and explicit) the smallest of all peers, at any of their levels, takes "
            f"{statistics.median(shares):.3f} times our bytes (median; {min(shares):.3f} to {max(shares):.3f}){few}."
        )
    return lines


def speed_table(content: dict) -> list[str]:
    """Times memcpy per op and frame."""
    places = sorted(
        {(r["isa"], r["entries"], r["density"]) for r in content["rows"]},
        key=lambda p: (p[0] != "avx512", p[1], -p[2], p[0]),
    )
    found = {(r["isa"], r["entries"], r["density"], r["what"]): r for r in content["rows"]}
    head = [f"{isa}, {entries / 1e6:.0f} M, {density}" for isa, entries, density in places]
    copies = {"memcpy": "memcpy, GB/s", COPY: f"{COPY}, GB/s"}
    if not any(r["what"] == COPY for r in content["rows"]):  # of an earlier version of the bench
        copies = {"memcpy": f"{COPY}, here for memcpy, GB/s"}
    rows = [[name, *(f"{found[(*p, what)]['gb_per_second']:.1f}" for p in places)] for what, name in copies.items()]
    for what in SPEED:  # a file of an earlier version of the bench lacks some
        cells = [found.get((*p, what)) for p in places]
        if any(cells):
            rows.append([what, *(f"{cell['times_memcpy']:.2f}" if cell else "" for cell in cells)])
    return _table(["times memcpy: instruction set, weights, density", *head], rows)


def tables() -> str:
    """Return the part of README about the codec."""
    size, speed = _load("bytes"), _load("speed")
    lines = []
    if size:
        lines += [
            "Updates of real federated rounds (`bench/real_deltas.py`), both sides holding the mask, zstd-1:",
            "",
            *bytes_table(size),
            "",
        ]
    if accuracy := _load("accuracy"):
        rounds = ", ".join(f"{c['rounds']} rounds ({MODELS[n]})" for n, c in accuracy["cases"].items())
        lines += [
            f"What levels cost: {rounds} at density 0.1, mean ± deviation over "
            f"{min(c['seeds'] for c in accuracy['cases'].values())} seeds (`bench/codec_accuracy.py`):",
            "",
            *accuracy_table(accuracy),
            "",
        ]
    if size:
        lines += [
            "What others need for the same numbers at density 0.1. From `x[mask]` on the reader holds the mask, theirs "
            "and ours; before, neither does:",
            "",
            *peers_table(size),
            "",
            *every_case(size),
            "",
        ]
    if speed:
        lines += [
            "GB/s of dense float32 as a multiple of memcpy in the same run (40 or 200 MB, synthetic):",
            "",
            *speed_table(speed),
            "",
            f"CPU time of one thread, medians, interleaved, on a busy machine: {_machine(speed)}. Files: "
            "`bench/results/codec-*.json`, made by `bench/codec_bytes.py` and `bench/bench_codec.py`.",
        ]
    for where, file in (("On an Intel with AVX-512", "speed-intel"), ("On a machine without AVX-512", "speed-avx2")):
        if other := _load(file):
            lines += ["", f"{where} ({_machine(other)}):", "", *speed_table(other)]
    return "\n".join(lines)
