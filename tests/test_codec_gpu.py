"""The GPU's delta kernels write the CPU's bytes: in Triton's interpreter always, on a device where there is one."""

import importlib.util
import os

import numpy as np
import pytest
import torch

from autoflip.ops import delta, delta_gpu, delta_stream

KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
SERVERS = [
    pytest.param(
        "triton", "cpu", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
    ),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
]


def case(n, density, device="cpu"):
    g = torch.Generator().manual_seed(n)
    x, base = torch.randn(n, generator=g).to(device), torch.randn(n, generator=g).to(device)
    x[: n // 3] = 0  # blocks without a scale
    base[: n // 3] = 0
    return x, base, delta.pack(torch.rand(n, generator=g) < density)


@pytest.mark.parametrize("server, device", SERVERS)
@pytest.mark.parametrize("n, density", [(1, 1.0), (1023, 0.3), (2600, 0.5), (2048, 0.0)])
@pytest.mark.parametrize("key", [(7, 0xFFFFFFFF), None], ids=["stochastic", "nearest"])
def test_gpu_kernels_write_the_cpus_bytes(n, density, key, server, device):
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton runs on a device here")
    x, base, mask = case(n, density, device)
    for kind, levels in [*zip(KINDS.values(), (None, 0, 127, 7)), (KINDS["int8"], 40)]:
        for start in (None, base):
            want, _ = delta_stream.code(x.cpu(), mask, kind, key, None if start is None else start.cpu(), levels)
            got, finite = delta_stream._from_gpu(kind, *delta_gpu.code(x, mask, levels, key, start, server))
            assert finite
            assert np.array_equal(np.stack(got.streams), np.stack(want.streams))
            assert np.array_equal(got.scales, want.scales)
        dense = delta_stream.decode(want, mask)
        codes = (
            torch.from_numpy(want.streams[0].view(np.int8))
            if kind == 2
            else torch.from_numpy(delta_stream._values(want))
        )
        scales = torch.from_numpy(want.scales).to(device) if kind == 2 else None
        out = torch.full((n,), 3.0, device=device)
        delta_gpu.expand(codes.to(device), scales, mask, None, out, server)
        assert torch.equal(out.cpu(), dense)
        delta_gpu.expand(codes.to(device), scales, mask, 0.3, out, server)
        total = dense.clone()
        delta_stream.accumulate(want, mask, total, 0.3)
        assert torch.equal(out.cpu(), total)


@pytest.mark.parametrize("server, device", SERVERS)
def test_gpu_gather_sees_every_bad_entry(server, device):
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton runs on a device here")
    for place in (0, 1024, 1499):
        x, _, mask = case(1500, 0.1, device)
        assert delta_gpu.code(x, mask, 127, (1, 2), None, server)[2]
        x[place] = float("nan") if place else float("-inf")
        assert not delta_gpu.code(x, mask, 127, (1, 2), None, server)[2]


def test_a_mask_is_located_once():
    _, _, mask = case(5000, 0.2)
    where = delta_gpu.locate(mask, torch.device("cpu"))
    assert delta_gpu.locate(mask, torch.device("cpu")) is where
    assert int(where.offsets[-1]) == mask.kept
    assert torch.equal(
        where.offsets[1:], torch.tensor([int(delta.bits(mask)[: 1024 * (i + 1)].sum()) for i in range(5)])
    )
