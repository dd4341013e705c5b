"""Write the golden frames of format version 2.2; run once per version, never to make a test green.

Version 1.0 wrote the v1_ files, without those named ranks, 1.1 the v11_ ones, 1.2 the v12_ ones and added those named
lanes; 2.0 (v20_) had a shorter header, lanes of one, and columns; 2.1 has codes of numbered tensors, 2.2 codes without
zeros.
"""

import sys
from pathlib import Path

import torch

from autoflip import MaskSet, codec

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from test_codec_hostile import (  # noqa: E402
    golden_inside,
    golden_shallow,
    golden_stripes,
    golden_unlike,
    golden_update,
    golden_walk,
)

update, masks = golden_update()
frames = {f"shared_{v}": codec.encode(update, masks=masks, values=v, seed=1) for v in ("fp32", "bf16", "int8", "int4")}
sparse = update | {"w": torch.where(masks["w"], update["w"], 0)}
frames["explicit_fp32"] = codec.encode(sparse, values="fp32")
frames["explicit_int8"] = codec.encode(sparse, values="int8", entropy="none")
twos = {n: torch.full_like(t, 2) for n, t in update.items()}
frames["patch_difference"] = codec.encode_patch(update, twos, base_id=b"golden base 0001")
frames["masks"] = codec.encode_masks(masks)
frames["change"] = codec.encode_masks(masks, MaskSet({"w": update["w"] > 0.15}))
part = update | {"w": torch.where(update["w"] > 0.4, update["w"], 0)}  # some of what the mask keeps
for v in ("fp32", "bf16", "int8", "int4"):
    frames[f"ranks_{v}"] = codec.encode(part, masks=masks, values=v, seed=1)
for v in ("fp32", "bf16", "int8"):
    frames[f"lanes_{v}"] = codec.encode(golden_walk(), values=v, seed=1)
frames["lanes_long"] = codec.encode(golden_walk(40_000), values="int8", seed=1)
frames["lanes_middle"] = codec.encode(golden_walk(20_000), values="int8", seed=1)
frames["columns"] = codec.encode({"w": golden_stripes()}, values="fp32")
frames["shared_levels"] = codec.encode(update, masks=masks, values="int8", levels=40, seed=1)
frames["numbered_int8"] = codec.encode(golden_unlike(), values="int8", rounding="nearest")
for v in ("int8", "int4"):
    frames[f"dropped_{v}"] = codec.encode(golden_shallow(), values=v, rounding="nearest")
frames["dropped_ranks"] = codec.encode(golden_shallow(), masks=golden_inside(), values="int4", rounding="nearest")
for name, blob in frames.items():
    with open(HERE / f"v22_{name}.afd", "xb") as file:
        file.write(blob)
