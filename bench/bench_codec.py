"""Speed of the codec in GB/s of dense float32, beside memcpy, pickle, torch.save and dense zstd-3.

Interleaved: every pass runs each method once, so that a busy moment hits all alike; medians of CPU seconds of one
thread. "memcpy" is the C library's (numpy's copy, too): beyond the caches it takes less than half of the time of
torch's ``copy_`` on an Intel. Outputs are memory that is used again; "new": a new tensor, in memory of dead ones
(autoflip.ops.memory); "first touch": in memory that the system hands out anew and clears, page by page. Synthetic
deltas (normal, 1e-3, random mask) flatter nobody: real ones have more zeros and pack better (bench/codec_bytes.py).

    python bench/bench_codec.py [--entries 10000000 50000000] [--densities 0.5 0.2 0.1 0.05] [--passes 7] [--out FILE]

``--threads N`` compares N threads with one instead: wall-clock seconds, both in turn, the first quarter of the passes
(another program on one of the cores makes all threads wait). It wants as many idle cores.

Results are added to FILE (default bench/results/codec-speed.json) under the instruction set that served:
AUTOFLIP_CPU=base|avx2|avx512 chooses it.
"""

import argparse
import ctypes
import io
import json
import pickle
import statistics
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import zstandard
from conftest import machine

from autoflip import MaskSet, codec
from autoflip.ops import backend, delta_stream, memory
from autoflip.ops import delta as ops

KEY = (1, 2)
PLACE = ("isa", "entries", "density")


def example(entries, density):
    """Return a delta of about ``entries`` in rows of 1000, and a random mask."""
    g = torch.Generator().manual_seed(0)
    rows = max(1, entries // 1000)
    delta = {"w": torch.randn(rows, 1000, generator=g) * 1e-3}
    return delta, MaskSet({"w": torch.rand(rows, 1000, generator=g) < density})


def kernels(delta, masks):
    """Name -> call of one op alone."""
    x = delta["w"].view(-1)
    base, out, total = torch.randn_like(x), torch.zeros_like(x), torch.zeros_like(x)
    mask, none = ops.pack(masks["w"]), ops.pack(torch.zeros_like(masks["w"]))
    values, _ = delta_stream.code(x, mask, delta_stream.FP32, KEY)
    codes, _ = delta_stream.code(x, mask, delta_stream.INT8, KEY)
    return {
        "memcpy": lambda: ctypes.memmove(out.data_ptr(), x.data_ptr(), x.nbytes),
        "torch's copy_": lambda: out.copy_(x),
        "memcpy, first touch": lambda: x.clone(),
        "read": lambda: ops.gather(x, none),  # what no kernel that looks at every entry can beat
        "read both": lambda: ops.gather(x, none, base),
        "pack": lambda: ops.gather(x, mask),
        "nonzero to bits": lambda: ops.pack_nonzero(x),
        "subtract + pack": lambda: ops.gather(x, mask, base),
        "subtract + int8": lambda: delta_stream.code(x, mask, delta_stream.INT8, KEY, base),
        "int8": lambda: delta_stream.code(x, mask, delta_stream.INT8, KEY),
        "expand fp32": lambda: delta_stream.decode(values, mask, out),
        "expand int8": lambda: delta_stream.decode(codes, mask, out),
        "expand int8, new": lambda: delta_stream.decode(codes, mask),
        "expand int8, first touch": lambda: (memory.forget(), delta_stream.decode(codes, mask)),
        "add int8": lambda: delta_stream.accumulate(codes, mask, total, 0.5),
    }


def frames(delta, masks):
    """Name -> (encode, decode) of whole frames; decode takes what encode returned."""
    schema = codec.Schema.of(delta)
    kept = {n: t * masks[n] for n, t in delta.items()}
    sums = {n: torch.zeros_like(t) for n, t in delta.items()}
    out = {n: torch.zeros_like(t) for n, t in delta.items()}
    local = {"masks": masks, "schema": schema}

    def encode(values):
        return lambda: codec.encode(delta, values=values, **local)

    return {
        "mask fp32": (encode("fp32"), lambda b: codec.decode(b, **local, out=out)),
        "mask bf16": (encode("bf16"), lambda b: codec.decode(b, **local, out=out)),
        "mask int8": (encode("int8"), lambda b: codec.decode(b, **local, out=out)),
        "mask int8, new": (encode("int8"), lambda b: codec.decode(b, **local)),
        "mask int8, accumulate": (encode("int8"), lambda b: codec.accumulate(b, sums, 1.0, **local)),
        "explicit int8": (
            lambda: codec.encode(kept, values="int8", schema=schema),
            lambda b: codec.decode(b, schema=schema, out=out),
        ),
    }


def peers(delta, masks):
    kept = {n: t * masks[n] for n, t in delta.items()}

    def save():
        buffer = io.BytesIO()
        torch.save(kept, buffer)
        return buffer.getvalue()

    return {
        "pickle": (lambda: pickle.dumps({n: t.numpy() for n, t in kept.items()}, protocol=5), pickle.loads),
        "torch.save": (save, lambda b: torch.load(io.BytesIO(b))),
        "dense zstd-3": (
            lambda: zstandard.ZstdCompressor(level=3).compress(kept["w"].numpy().data.cast("B")),
            lambda b: zstandard.ZstdDecompressor().decompress(b),
        ),
    }


def seconds(call):
    start = time.thread_time()
    result = call()
    return time.thread_time() - start, result


def measure(entries, density, passes):
    """Return rows: what, GB/s, times memcpy (median of the pairs of one pass), bytes."""
    delta, masks = example(entries, density)
    dense = delta["w"].numel() * 4
    alone, whole = kernels(delta, masks), frames(delta, masks) | peers(delta, masks)
    times, sizes = {}, {}
    for i in range(passes + 1):
        took = {name: seconds(call)[0] for name, call in alone.items()}
        for name, (encode, decode) in whole.items():
            took[f"{name}: encode"], blob = seconds(encode)
            took[f"{name}: decode"] = seconds(lambda d=decode, b=blob: d(b))[0]
            sizes[name] = len(blob)
        for name, spent in took.items():
            if i:  # the first pass warms up
                times.setdefault(name, []).append(spent)
    rows = []
    for name, spent in times.items():
        ratio = statistics.median(m / s for m, s in zip(times["memcpy"], spent, strict=True))
        row = {"what": name, "gb_per_second": dense / statistics.median(spent) / 1e9, "times_memcpy": ratio}
        if size := sizes.get(name.rpartition(":")[0]):
            row["bytes"] = size
        rows.append({"entries": delta["w"].numel(), "density": density, **row})
    return rows


def scaling(entries, density, passes, threads):
    """Return rows: what, GB/s of one thread and of ``threads``, how many times faster."""
    delta, masks = example(entries, density)
    dense, calls = delta["w"].numel() * 4, kernels(delta, masks)
    calls = {name: calls[name] for name in ("memcpy", "pack", "subtract + int8", "int8", "expand int8", "add int8")}
    for name, (encode, decode) in frames(delta, masks).items():
        calls[f"{name}: encode"] = encode
        calls[f"{name}: decode"] = partial(decode, encode())
    times = {}
    for _ in range(passes + 1):
        for name, call in calls.items():
            for number in (1, threads):
                torch.set_num_threads(number)
                start = time.perf_counter()
                call()
                times.setdefault((name, number), []).append(time.perf_counter() - start)
    torch.set_num_threads(1)
    rows = []
    for name in calls:
        one, many = (sorted(times[name, number][1:])[passes // 4] for number in (1, threads))
        speeds = {"gb_per_second": dense / one / 1e9, "gb_per_second_threads": dense / many / 1e9}
        rows.append({"entries": delta["w"].numel(), "density": density, "threads": threads, "what": name, **speeds})
        rows[-1]["times_one"] = one / many
    return rows


@pytest.mark.parametrize("name", ["pickle", "mask int8", "mask bf16", "explicit int8"])
@pytest.mark.parametrize("density", [0.1, 0.05])
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_codec(benchmark, gate, way, density, name):
    benchmark.group = f"codec {way}, density {density}"
    delta, masks = example(2_000_000, density)
    encode, decode = (frames(delta, masks) | peers(delta, masks))[name]
    blob = encode()
    if name != "pickle":
        # a block's int8 step is its largest value over 127; bf16 keeps 8 bits
        gate(decode(blob)["w"], delta["w"] * masks["w"], atol=float(delta["w"].abs().max()) / 100)
    benchmark.extra_info.update(bytes=len(blob), dense_bytes=delta["w"].numel() * 4)
    benchmark(encode if way == "encode" else lambda: decode(blob))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[10_000_000, 50_000_000])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.2, 0.1, 0.05])
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "codec-speed.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    isa = backend.extension("_C")[0].isa()
    result = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    result["machine"] = machine()
    for entries in args.entries:
        for density in args.densities:
            if args.threads > 1:
                rows = [{"isa": isa, **row} for row in scaling(entries, density, args.passes, args.threads)]
                place = (isa, rows[0]["entries"], density, args.threads)
                kept = [r for r in result.get("threads", []) if (*map(r.get, PLACE), r["threads"]) != place]
                result["threads"] = kept + rows
                print(f"\n{isa}, {entries / 1e6:.0f} M entries, density {density}: times one of {args.threads} threads")
                for row in rows:
                    print(f"{row['what']:32s} {row['gb_per_second']:7.2f} {row['times_one']:7.2f}x", flush=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n")
                continue
            rows = [{"isa": isa, **row} for row in measure(entries, density, args.passes)]
            place = (isa, rows[0]["entries"], density)
            result["rows"] = [r for r in result["rows"] if (*map(r.get, PLACE),) != place] + rows
            print(f"\n{isa}, {entries / 1e6:.0f} M entries, density {density}: GB/s of dense float32, times memcpy")
            for row in rows:
                size = f"  {row['bytes']} B" if "bytes" in row else ""
                print(f"{row['what']:32s} {row['gb_per_second']:7.2f} {row['times_memcpy']:7.2f}x{size}", flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
