"""Bytes on the wire of real updates, ours beside everybody's, at equal precision of the values.

    AUTOFLIP_DATA=DIR python bench/codec_bytes.py [--cases mlp cnn resnet] [--out bench/results/codec-bytes.json]

Equal precision: the others get what our frame decodes to, as float32, as bfloat16 words, or as int8 codes with their
scales (vectors as bfloat16 words, as our int8 frames hold them), of 127 levels and of 40. "explicit" frames tell the
reader which entries they hold; "shared" ones are read by one who holds the mask, and are compared with packers of
x[mask] too.
"""

import argparse
import json
import math
import pickle
from pathlib import Path

import codec_peers
import numpy as np
import real_deltas
import torch
from conftest import machine

from autoflip import codec
from autoflip.codec import index, layout
from autoflip.codec.values import rounding_key
from autoflip.ops import delta as ops
from autoflip.ops import delta_coding

VALUES = {  # name -> arguments of encode
    "fp32": {"values": "fp32"},
    "bf16": {"values": "bf16"},
    "int8": {"values": "int8"},
    "int8, 40 levels": {"values": "int8", "levels": 40},
}


def as_sent(delta, masks, values, levels=None):
    """Return the dense arrays at the precision of ``values``, exactly those that our frame decodes to."""
    out = {}
    for i, (name, tensor) in enumerate(delta.items()):
        key = rounding_key(0, 0, 0, i)
        mask = None if masks is None or name not in masks else ops.pack(masks[name])
        if masks is None:
            mask = ops.pack_nonzero(tensor)
        kept, _ = ops.gather(tensor, mask)
        if values == "fp32":
            coded, scales = kept, None
        elif values == "bf16" or tensor.dim() < 2:
            coded, scales = delta_coding.round_bf16(kept, key), None
        else:
            coded, scales = delta_coding.quantise(kept, levels or 127, key)
        dense = np.zeros(tensor.numel(), coded.dtype)
        dense[slice(None) if mask is None else ops.bits(mask).numpy()] = coded
        out[name] = dense.reshape(tensor.shape)
        if scales is not None:
            out[name + "/scales"] = scales
    return out


def kept_only(arrays, masks):
    return {n: a[masks[n].numpy()] if masks is not None and n in masks else a for n, a in arrays.items()}


def entropy_bytes(n, kept):
    p = kept / n if n else 0
    return 0.0 if p in (0, 1) else n * -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8


def index_bytes(shaped):
    """Bytes of our index of these sets (with shapes), of the entropy of each tensor's density, and of the flat one."""
    packs = [p for p, _ in shaped]
    chosen = (index.choose_order(p, tuple(shape), "zstd", 1) for p, shape in shaped if p.kept)
    sets = [(coding, k, named) for coding, k, _, named in chosen]
    sections = index.write_sets(sets, "zstd")
    numel, kept = sum(p.numel for p in packs), sum(p.kept for p in packs)
    return sum(map(len, sections)), sum(entropy_bytes(p.numel, p.kept) for p in packs), entropy_bytes(numel, kept)


def compare(delta, masks, way):
    """Return bytes: ours explicit and shared, and every peer's, of values that ``way`` (of VALUES) makes."""
    schema = codec.Schema.of(delta)
    arrays = as_sent(delta, masks, **way)
    sparse = {n: t if masks is None or n not in masks else t * masks[n] for n, t in delta.items()}
    out = {"ours": {"explicit": len(codec.encode(sparse, **way, schema=schema))}}
    # zstd-19 takes seconds for a megabyte that does not pack: it is asked about the small model only
    levels = [v for v in codec_peers.LEVELS if v < 19 or schema.dense_bytes < 1 << 20]
    out["ours, level 19"] = {"explicit": len(codec.encode(sparse, **way, schema=schema, level=19))}
    out["explicit"] = {n: len(f(arrays)) for n, f in codec_peers.explicit(levels).items()}
    if masks is not None:
        out["ours"]["shared"] = len(codec.encode(delta, masks=masks, **way, schema=schema))
        packed = kept_only(arrays, masks)
        out["shared"] = {n: len(f(packed)) for n, f in codec_peers.known_mask(levels).items()}
        small = codec.encode(delta, masks=masks, **way, schema=schema, level=19)
        out["ours, level 19"]["shared"] = len(small)
    return out


def case(name, density):
    example = real_deltas.load(name, density)
    delta, masks = example.delta, example.masks
    schema = codec.Schema.of(delta)
    dense = {n: t.numpy() for n, t in delta.items()}
    kept = sum(int(masks[n].sum()) if masks and n in masks else t.numel() for n, t in delta.items())
    row = {"entries": sum(t.numel() for t in delta.values()), "kept": kept, "tensors": len(delta)}
    row["zeros_among_kept"] = 1 - sum(int(t.count_nonzero()) for t in delta.values()) / kept
    row["pickle"] = len(pickle.dumps(dense, protocol=5))
    row["accuracy"] = example.accuracy
    row["values"] = {v: compare(delta, masks, way) for v, way in VALUES.items()}
    row["int8, 63 levels"] = len(codec.encode(delta, masks=masks, values="int8", levels=63, schema=schema))
    row["int4"] = len(codec.encode(delta, masks=masks, values="int4", schema=schema))
    row["downlink"] = len(codec.encode_patch(example.new, example.old, masks=masks, schema=schema))
    # what frames cost beyond values and index: fixed lengths show it
    plain = codec.encode(delta, masks=masks, values="fp32", schema=schema, entropy="none")
    if masks is not None:
        row["framing"] = len(plain) - 4 * kept
        shaped = [(pack, masks[n].shape) for n, pack in layout.packs_of(masks).items()]
        ours, per_tensor, flat = index_bytes(shaped)
        row["index"] = {"ours": ours, "entropy_per_tensor": per_tensor, "entropy_flat": flat}
    return row


def top(name, share):
    delta = real_deltas.top_k(real_deltas.load(name, 1.0).delta, share)
    shaped = [(ops.pack_nonzero(t), t.shape) for t in delta.values()]
    ours, per_tensor, flat = index_bytes(shaped)
    row = {"entries": sum(t.numel() for t in delta.values()), "kept": sum(p.kept for p, _ in shaped)}
    row["index"] = {"ours": ours, "entropy_per_tensor": per_tensor, "entropy_flat": flat}
    row["values"] = {v: compare(delta, None, way) for v, way in VALUES.items()}
    return row


def marks(row):
    """Return the issue's byte marks that a case answers: name -> (measured, wanted)."""
    out = {}
    kept, shared = row["kept"], {v: c["ours"].get("shared") for v, c in row["values"].items()}
    if shared["int8"]:
        out["int8 B/kept"] = shared["int8"] / kept, 0.82
        for coarser, size in (("63 levels", row["int8, 63 levels"]), ("40 levels", shared["int8, 40 levels"])):
            out[f"int8, {coarser}, B/kept"] = size / kept, 0.82
            out[f"int8, {coarser}, below pickle"] = row["pickle"] / size, None
        out["bf16 B/kept"] = shared["bf16"] / kept, 1.5
        out["int4 B/kept"] = row["int4"] / kept, 0.45
        out["downlink B/kept"] = row["downlink"] / kept, 0.70
        out["below pickle"] = row["pickle"] / shared["int8"], None
        out["framing B"] = row["framing"], 400
        out["fp32 / dense pcodec"] = shared["fp32"] / row["values"]["fp32"]["explicit"].get("pcodec", math.nan), 1.0
        out["index / entropy per tensor"] = row["index"]["ours"] / row["index"]["entropy_per_tensor"], 1.03
    elif "index" in row:
        out["index / flat entropy"] = row["index"]["ours"] / row["index"]["entropy_flat"], 0.70
    for values, cells in row["values"].items():
        for way in ("explicit", "shared"):
            if way in cells:
                best = min(cells[way], key=cells[way].get)
                for ours in ("ours", "ours, level 19"):
                    out[f"{values} {way} {ours[6:]} / best peer ({best})"] = cells[ours][way] / cells[way][best], 1.0
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(real_deltas.CASES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "codec-bytes.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {"machine": machine(), "cases": {}}
    for name in args.cases:
        rows = {str(d): case(name, d) for d in real_deltas.DENSITIES}
        rows |= {f"top {share}": top(name, share) for share in real_deltas.TOP}
        result["cases"][name] = rows
        for label, row in rows.items():
            print(f"\n{name}, {label}: {row['kept']} of {row['entries']} travel")
            for what, (got, wanted) in marks(row).items():
                print(f"    {what:60s} {got:8.3f}" + (f"  wanted {wanted}" if wanted else ""))
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
