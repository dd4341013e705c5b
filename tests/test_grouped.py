"""Many clients' masked layers in one launch: against float64, in torch and in Triton's interpreter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoflip import ops
from autoflip.ops import GroupedPack, backend, grouped, reference

EPS = torch.finfo(torch.float32).eps
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py turns the interpreter on where there is no GPU


def case(C, N, O, K, density, device=DEVICE):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g).to(device).requires_grad_() for s in [(C, N, K), (C, O, K), (C, O)])
    masks = torch.rand(C, O, K, generator=g) < density
    if C > 1:
        masks[C // 2] = False  # a client that keeps nothing
    return x, w, b, masks.to(device), torch.randn(C, N, O, generator=g).to(device)


@pytest.fixture(params=["reference", "triton"])
def way(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("AUTOFLIP_BACKEND", request.param)
    assert backend.serve("grouped_linear", torch.device(DEVICE)) == request.param
    return request.param


@pytest.mark.parametrize("C, N, O, K", [(1, 3, 5, 7), (3, 40, 33, 65), (4, 1, 32, 64)])
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_every_client_equals_float64_reference(C, N, O, K, density, way):
    x, w, b, masks, dy = case(C, N, O, K, density)
    y = ops.grouped_linear(x, w, b, GroupedPack(masks))
    got = (y, *torch.autograd.grad(y, (x, w, b), dy))
    for c in range(C):  # one by one: a client that read another's rows would be seen
        x64, w64, b64 = (t.detach()[c].double().requires_grad_() for t in (x, w, b))
        y64 = reference.masked_matmul(x64, w64, masks[c]) + b64
        want = (y64, *torch.autograd.grad(y64, (x64, w64, b64), dy[c].double()))
        for a, e, terms in zip(got, want, (K + 1, O, N, N), strict=True):
            # rounding of the result + float32 sums (largest seen: 4 eps sqrt(terms))
            torch.testing.assert_close(a[c].double(), e, rtol=0, atol=16 * EPS * terms**0.5)
        assert not got[2][c][~masks[c]].any()


def test_what_stands_at_pruned_entries_is_ignored(way):
    x, w, b, masks, dy = case(3, 5, 40, 33, 0.3)
    pack = GroupedPack(masks)
    with torch.no_grad():
        want = ops.grouped_linear(x, torch.where(masks, w, 0), b, pack)
        w[~masks] = float("nan")
        assert torch.equal(ops.grouped_linear(x, w, b, pack), want)


def test_derivatives_of_every_order():
    x, w, b, masks, _ = (t.double() if t.dtype.is_floating_point else t for t in case(2, 3, 4, 5, 0.5, "cpu"))
    x, w, b, pack = *(t.detach().requires_grad_() for t in (x, w, b)), GroupedPack(masks)
    assert torch.autograd.gradcheck(lambda x, w, b: ops.grouped_linear(x, w, b, pack), (x, w, b))
    assert torch.autograd.gradgradcheck(lambda x, w, b: ops.grouped_linear(x, w, b, pack), (x, w, b))


def test_registered_ops_keep_their_promises():
    x, w, b, masks, dy = case(2, 3, 4, 5, 0.5, "cpu")
    pack = GroupedPack(masks)
    table = (masks, pack.live, pack.tiles)
    for op, tensors in (
        (torch.ops.autoflip.grouped_linear, (x, w, b)),
        (torch.ops.autoflip.grouped_linear_dx, (dy, w)),
        (torch.ops.autoflip.grouped_linear_dw, (dy, x)),
    ):
        torch.library.opcheck(op, (*tensors, *table))


def test_compiles_without_a_graph_break():
    x, w, b, masks, _ = case(2, 3, 4, 5, 0.5, "cpu")
    pack = GroupedPack(masks)
    step = torch.compile(lambda x: ops.grouped_linear(x, w, b, pack), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(x), ops.grouped_linear(x, w, b, pack))


def test_flops_are_those_that_ran(way):
    x, w, b, masks, dy = case(3, 4, 64, 64, 0.0)
    masks = masks.clone()
    masks[0, 3, 40] = masks[2, 33, 1] = masks[2, 34, 2] = True  # three entries in two tiles
    with FlopCounterMode(display=False) as counter:
        ops.grouped_linear(x, w, b, GroupedPack(masks)).backward(dy)
    weights = 2 * grouped.TILE**2 if way == "triton" else masks.numel()
    assert counter.get_total_flops() == 3 * 2 * 4 * weights


def test_mistakes_say_what_came_and_what_was_wanted():
    x, w, b, masks, _ = case(2, 3, 4, 5, 0.5, "cpu")
    pack = GroupedPack(masks)
    for masks_, message in ((masks[0], "wanted a .clients, O, K."), (masks.float(), "torch.float32"), (3, "int")):
        with pytest.raises(ValueError, match=message):
            GroupedPack(masks_)
    with pytest.raises(ValueError, match="at most 65535"):
        GroupedPack(torch.zeros(65536, 0, 0, dtype=torch.bool))
    for arguments, message in (
        ((x, w[:, :3], b), "entry by entry"),
        ((x[:1], w, b), "one batch of rows a client"),
        ((x, w, b[0]), "bias has shape"),
        ((x, w.double(), b), "weight is torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.grouped_linear(*arguments, pack)
