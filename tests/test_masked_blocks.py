"""Triton's block kernels against float64: whole blocks, ragged edges, vectors; and the way to them through the op."""

import pytest
import torch

from autoflip import ops
from autoflip.ops import Pack

pytest.importorskip("triton")
blocks = pytest.importorskip("autoflip.kernels.masked_blocks")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py turns the interpreter on where there is no GPU
# the interpreter multiplies bfloat16 as if it were integers; bfloat16 is compiled here and tested on a GPU
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def block_mask(o, k, rows, cols, density):
    g = torch.Generator().manual_seed(1)
    live = torch.rand(-(-o // rows), -(-k // cols), generator=g) < density
    return live.repeat_interleave(rows, 0)[:o].repeat_interleave(cols, 1)[:, :k].contiguous().to(DEVICE)


def tolerance(dtype, terms):
    """Return what rounding explains: each factor and the result in ``dtype`` (float32: TF32 on a GPU), float32 sums."""
    unit = 2.0**-10 if dtype is torch.float32 and DEVICE == "cuda" else torch.finfo(dtype).eps
    return (8 * unit + 32 * torch.finfo(torch.float32).eps) * terms**0.5


def tensors(n, o, k, dtype):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).to(DEVICE, dtype) for s in ((n, k), (o, k), (o,), (n, o))]


@pytest.mark.parametrize("n, o, k", [(1, 64, 64), (40, 130, 150)])
@pytest.mark.parametrize("rows, cols", [(64, 64), (64, 32), (32, 1)])
@pytest.mark.parametrize("density", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_equal_float64(n, o, k, rows, cols, density, dtype):
    x, w, bias, dy = tensors(n, o, k, dtype)
    mask = block_mask(o, k, rows, cols, density)
    x64, w64, bias64, dy64 = (t.double() for t in (x, torch.where(mask, w, 0), bias, dy))
    table = blocks.table(mask)
    w = torch.where(mask, w, torch.nan)  # what stands at a pruned entry counts for nothing

    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.zeros_like(w)
    blocks.forward(x, w, bias, table, y, relu=True)
    blocks.dx(dy, w, mask, table, dx)
    blocks.dw(dy, x, table, dw)

    wants = (x64 @ w64.T + bias64).relu(), dy64 @ w64, (dy64.T @ x64) * mask
    for got, want, terms in zip((y, dx, dw), wants, (k, o, n), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance(dtype, terms))
    assert dw[~mask].eq(0).all()


def test_tables_name_the_largest_block_that_fits():
    for rows, cols in blocks.BLOCKS:
        table = blocks.table(block_mask(192, 192, rows, cols, 0.4))
        assert (table.rows, table.cols) == (rows, cols)
    assert blocks.table(torch.ones(70, 70, dtype=torch.bool))[:2] == (64, 64)
    assert blocks.table(torch.rand(64, 64) < 0.5) is None
    mask = block_mask(64, 70, 32, 1, 0.5)
    table, kept = blocks.table(mask), mask[::32]
    columns = [c[c < 70].tolist() for c in table.tile.view(-1, 32)]
    assert [sum(columns[a:b], []) for a, b in zip(table.start[:-1], table.start[1:])] == [
        row.nonzero().flatten().tolist() for row in kept
    ]
    assert blocks.table(mask) is table
    held = len(blocks._tables)
    del mask
    assert len(blocks._tables) == held - 1


@pytest.mark.parametrize("precision, served", [("high", True), ("highest", False)])
def test_the_op_comes_here_only_where_torch_may_use_tf32(precision, served, monkeypatch):
    calls = []
    for name in ("forward", "dx", "dw"):
        real = getattr(blocks, name)
        monkeypatch.setattr(blocks, name, lambda *a, _name=name, _real=real, **k: (calls.append(_name), _real(*a, **k)))
    monkeypatch.setenv("AUTOFLIP_BACKEND", "triton")
    x, w, bias, dy = tensors(5, 64, 96, torch.float32)
    mask = block_mask(64, 96, 64, 32, 0.5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        x, w = x.requires_grad_(), w.requires_grad_()
        y = ops.masked_linear(x, w, bias, Pack(mask))
        got = y, *torch.autograd.grad(y, (x, w), dy)
    finally:
        torch.set_float32_matmul_precision(before)
    x64, w64 = x.detach().double(), w.detach().double() * mask
    wants = x64 @ w64.T + bias.double(), dy.double() @ w64, (dy.double().T @ x64) * mask
    for a, want, terms in zip(got, wants, (96, 64, 5), strict=True):
        torch.testing.assert_close(a.double(), want, rtol=0, atol=tolerance(torch.float32, terms))
    assert calls == (["forward", "dx", "dw"] if served else [])
