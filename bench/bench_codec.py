"""Bytes and seconds of a frame beside pickle, torch.save, safetensors, dense zstd-3 and memcpy.

Interleaved: every pass runs each method once, so that a busy moment hits all alike; the middle of the passes is
reported with its spread. Synthetic deltas (normal, 1e-3) flatter nobody: real ones have more zeros and pack better.

    python bench/bench_codec.py [--entries 4000000] [--passes 15]
"""

import argparse
import io
import pickle
import platform
import statistics
import time

import pytest
import safetensors.torch
import torch
import zstandard

from autoflip import MaskSet, codec
from autoflip.ops import backend


def methods(delta, masks):
    """Name -> (encode, decode); decode takes what encode returned."""
    schema = codec.Schema.of(delta)
    kept = {n: t * masks[n] for n, t in delta.items()}
    scratch = {n: torch.empty_like(t) for n, t in delta.items()}
    sums = {n: torch.zeros_like(t) for n, t in delta.items()}

    def save(tensors):
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        return buffer.getvalue()

    def raw():
        return b"".join(t.numpy().tobytes() for t in kept.values())

    def copy():
        for n, t in kept.items():
            scratch[n].copy_(t)
        return b""

    coo = {n: t.to_sparse() for n, t in kept.items()}
    out = {
        "memcpy": (copy, lambda _: copy()),
        "pickle": (lambda: pickle.dumps(kept), pickle.loads),
        "torch.save": (lambda: save(kept), lambda b: torch.load(io.BytesIO(b))),
        "torch.save, sparse COO": (lambda: save(coo), lambda b: torch.load(io.BytesIO(b))),
        "safetensors": (lambda: safetensors.torch.save(kept), safetensors.torch.load),
        "dense zstd-3": (
            lambda: zstandard.ZstdCompressor(level=3).compress(raw()),
            lambda b: zstandard.ZstdDecompressor().decompress(b),
        ),
    }
    for values in ("fp32", "bf16", "int8", "int4"):
        out[f"mask {values}"] = (
            lambda v=values: codec.encode(delta, masks=masks, values=v, schema=schema),
            lambda b: codec.decode(b, masks=masks, schema=schema),
        )
    out["mask int8, accumulate"] = (
        lambda: codec.encode(delta, masks=masks, values="int8", schema=schema),
        lambda b: codec.accumulate(b, sums, 1.0, masks=masks, schema=schema),
    )
    out["explicit int8"] = (
        lambda: codec.encode(kept, values="int8", schema=schema),
        lambda b: codec.decode(b, schema=schema),
    )
    new = {n: (t + 1).to(torch.bfloat16) for n, t in delta.items()}
    base = {n: torch.ones_like(t).to(torch.bfloat16) for n, t in delta.items()}
    out["patch"] = (
        lambda: codec.encode_patch(new, base, masks=masks, schema=schema),
        lambda b: codec.decode_patch(b, base, masks=masks, schema=schema),
    )
    return out


def seconds(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


@pytest.mark.parametrize("name", ["memcpy", "pickle", "safetensors", "mask int8", "mask bf16", "explicit int8"])
@pytest.mark.parametrize("density", [0.1, 0.05])
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_codec(benchmark, gate, way, density, name):
    benchmark.group = f"codec {way}, density {density}"
    delta, masks = example(2_000_000, density)
    encode, decode = methods(delta, masks)[name]
    blob = encode()
    if name.startswith(("mask", "explicit")):
        # a block's int8 step is its largest value over 127; bf16 keeps 8 bits
        gate(decode(blob)["w"], delta["w"] * masks["w"], atol=float(delta["w"].abs().max()) / 100)
    benchmark.extra_info.update(bytes=len(blob), dense_bytes=delta["w"].numel() * 4)
    benchmark(encode if way == "encode" else lambda: decode(blob))


def example(entries, density):
    """Return a square normal delta of about ``entries`` and a random mask."""
    g = torch.Generator().manual_seed(0)
    side = int(entries**0.5)
    delta = {"w": torch.randn(side, side, generator=g) * 1e-3}
    return delta, MaskSet({"w": torch.rand(side, side, generator=g) < density})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=4_000_000)
    parser.add_argument("--passes", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ext = backend.extension("_C")[0]
    machine = platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, 1 thread, {ext.isa() if ext else 'no _C'}")
    for density in (0.5, 0.1, 0.05):
        delta, masks = example(args.entries, density)
        dense = delta["w"].numel() * 4
        all_methods = methods(delta, masks)
        times = {name: ([], []) for name in all_methods}
        sizes = {}
        for _ in range(args.passes + 1):
            for name, (encode, decode) in all_methods.items():
                spent, blob = seconds(encode)
                times[name][0].append(spent)
                times[name][1].append(seconds(lambda d=decode, b=blob: d(b))[0])
                sizes[name] = len(blob)
        print(f"\n{dense / 1e6:.0f} MB dense, density {density}; GB/s of dense bytes, middle (10-90 %)")
        for name, (up, down) in times.items():
            cells = []
            for spent in (up[1:], down[1:]):  # the first pass warms up
                low, *_, high = (dense / q / 1e9 for q in reversed(statistics.quantiles(spent, n=10)))
                cells.append(f"{dense / statistics.median(spent) / 1e9:6.2f} ({low:.2f}-{high:.2f})")
            share = f"{dense / sizes[name]:6.1f}x" if sizes[name] else "      -"
            print(f"{name:24s} {sizes[name]:>10d} B {share}  encode {cells[0]:>22s}  decode {cells[1]:>22s}")


if __name__ == "__main__":
    main()
