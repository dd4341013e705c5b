"""The masked convolution against float64, on every path and instruction set, with its derivatives and its ledger."""

import instruction_sets
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from autoflip import ops
from autoflip.ops import ConvPack

# batch, outputs, inputs, map, kernel, padding, dilation, stride: ragged in lanes, tiles, groups of rows and blocks
SHAPES = [
    (16, 8, 4, (8, 8), (3, 3), (1, 1), (1, 1), 1),
    (9, 7, 5, (6, 7), (3, 3), (1, 0), (1, 1), 1),
    (33, 37, 21, (9, 5), (5, 3), (2, 1), (1, 2), 1),
    (17, 70, 40, (7, 11), (1, 1), (0, 0), (1, 1), 1),
    (8, 5, 3, (13, 12), (5, 5), (2, 2), (2, 1), 1),
    (20, 6, 40, (9, 17), (3, 3), (0, 2), (1, 1), 1),
    (17, 6, 5, (5, 8), (3, 3), (1, 1), (1, 1), 1),  # lines of whole eights, the last of them alone
    (9, 70, 3, (3, 24), (1, 3), (0, 0), (1, 1), 1),
    (9, 6, 5, (5, 67), (3, 3), (1, 1), (1, 1), 1),  # lines longer than any tile
    (17, 8, 5, (8, 6), (3, 3), (1, 1), (1, 1), 2),
    (9, 7, 37, (4, 6), (1, 1), (0, 0), (1, 1), 2),  # three phases of four meet no tap; blocks of channels
    (8, 5, 3, (12, 8), (5, 4), (2, 1), (1, 1), 2),
    (9, 6, 4, (10, 70), (3, 3), (1, 2), (2, 1), 2),
    (16, 6, 5, (9, 12), (3, 2), (1, 0), (1, 1), 3),
    (9, 7, 9, (8, 16), (4, 4), (0, 0), (1, 1), 4),  # each position in one output
    (9, 7, 5, (8, 4), (2, 3), (0, 1), (1, 1), 4),  # some in none
]
EPS = torch.finfo(torch.float32).eps


def case(N, O, C, size, kernel, padding, dilation, stride, density):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, *size, generator=g).requires_grad_()
    w = torch.randn(O, C, *kernel, generator=g).requires_grad_()
    b = torch.randn(O, generator=g).requires_grad_()
    mask = torch.rand(O, C, *kernel, generator=g) < density
    mask[O // 2] = False  # an output that keeps nothing
    return x, w, b, mask


def pack_of(shape, mask, path="sparse"):
    *_, padding, dilation, stride = shape
    return ConvPack(mask, padding, dilation, stride=stride, path=path)


def last(t):
    return t.detach().to(memory_format=torch.channels_last).requires_grad_()


def both(x, w, b, mask, pack):
    """(y, dx, dw, db) of ours and of torch in float64."""
    y = ops.masked_conv2d(x, w, b, pack)
    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, w, b))
    y64 = F.conv2d(x64, torch.where(mask, w64, 0), b64, pack.stride, pack.padding, pack.dilation)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    got = (y, *torch.autograd.grad(y, (x, w, b), dy))
    return got, (y64, *torch.autograd.grad(y64, (x64, w64, b64), dy.double()))


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_equals_float64_reference(shape, density, path):
    x, w, b, mask = case(*shape, density)
    got, want = both(x, w, b, mask, pack_of(shape, mask, path))
    positions = len(x) * want[0].shape[2] * want[0].shape[3]
    terms = (w[0].numel() + 1, len(w) * w[0, 0].numel(), positions, positions)
    for a, c, n in zip(got, want, terms, strict=True):
        # rounding of the result + float32 sums (largest seen: 11 eps sqrt(terms))
        torch.testing.assert_close(a.double(), c, rtol=0, atol=36 * EPS * n**0.5)
    assert not got[2][~mask].any()


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channels_last_equals_row_major(shape, density):
    x, w, b, mask = case(*shape, density)
    pack = pack_of(shape, mask)
    dy = torch.randn(ops.masked_conv2d(x, w, b, pack).shape, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad(ops.masked_conv2d(x, w, b, pack), (x, w, b), dy)
    for a, c in ((last(x), w), (x, last(w)), (last(x), last(w))):
        for d in (dy, last(dy).detach()):
            y = ops.masked_conv2d(a, c, b, pack)
            assert torch.equal(y, ops.masked_conv2d(x, w, b, pack))
            assert y.is_contiguous(memory_format=torch.channels_last)
            got = torch.autograd.grad(y, (a, c, b), d)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
            assert got[0].stride() == a.stride()
            torch.testing.assert_close(got[2], want[2], rtol=0, atol=36 * EPS * dy[:, 0].numel() ** 0.5)  # other order


@pytest.mark.parametrize("stride", [1, 2])
def test_maps_beyond_sixteen_bits(stride):
    """An offset in a panel has 16 bits; of 260 x 260 a second channel begins beyond them."""
    size = 260 * stride, 260 * stride
    x, w, b, mask = case(1, 3, 4, size, (3, 3), (1, 1), (1, 1), stride, 0.5)
    pack = ConvPack(mask, (1, 1), stride=stride, path="sparse")
    assert (pack.parts(x, w) is None) == (stride == 2)  # where a channel's own phases lie beyond them
    got, want = both(x, w, b, mask, pack)
    for a, c in zip(got[:3], want[:3], strict=True):
        # torch's own sums of 67,600 terms err by 3e-5; a wrong offset by all of it
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-4 * c.abs().max().item())


def test_maps_that_a_stride_does_not_divide_are_left_to_torch():
    x, w, b, mask = case(9, 6, 5, (7, 8), (3, 3), (1, 1), (1, 1), 2, 0.5)
    pack = ConvPack(mask, (1, 1), stride=2, path="sparse")
    assert pack.parts(x, w) is None
    got, want = both(x, w, b, mask, pack)
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), c, rtol=0, atol=36 * EPS * got[0][:, 0].numel() ** 0.5)


def test_torchs_default_dtype_does_not_matter():
    x, w, b, mask = case(*SHAPES[0], 0.3)
    results = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            results.append(both(x, w, b, mask, ConvPack(mask, (1, 1), path="sparse"))[0])
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, c) for a, c in zip(*results, strict=True))


@pytest.mark.parametrize("isa", instruction_sets.LEVELS)
def test_every_instruction_set_equals_float64_reference(isa):
    names = (
        "test_every_path_equals_float64_reference",
        "test_channels_last_equals_row_major",
        "test_result_does_not_depend_on_the_thread_count",
    )
    instruction_sets.rerun(__file__, isa, *names)


def test_result_does_not_depend_on_the_thread_count():
    shape = (33, 70, 40, (9, 7), (3, 3), (1, 1), (1, 1), 1), (33, 70, 40, (10, 8), (3, 3), (1, 1), (1, 1), 2)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = []
        for one in shape:
            x, w, b, mask = case(*one, 0.2)
            found += [t for form in (x, last(x)) for t in both(form, w, b, mask, pack_of(one, mask))[0]]
        results.append(found)
    for other in results[1:]:
        assert all(torch.equal(a, c) for a, c in zip(results[0], other, strict=True))


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_what_stands_at_pruned_entries_is_ignored(path):
    x, w, b, mask = case(*SHAPES[0], 0.3)
    with torch.no_grad():
        clean = torch.where(mask, w, 0).requires_grad_()
        w[~mask] = float("nan")
    pack = ConvPack(mask, (1, 1), path=path)
    got, want = both(x, w, b, mask, pack)[0], both(x, clean, b, mask, pack)[0]
    assert all(torch.equal(a, c) for a, c in zip(got, want, strict=True))


def test_backward_may_run_twice_and_layers_do_not_share_panels():
    x, w, b, mask = case(*SHAPES[0], 0.3)
    pack = ConvPack(mask, (1, 1), path="sparse")
    first, second = (ops.masked_conv2d(t, w, b, pack) for t in (x, 2 * x))
    dy = torch.randn(first.shape)
    once = torch.autograd.grad(first, (x, w), dy, retain_graph=True)
    other = torch.autograd.grad(second, (x, w), dy)
    again = torch.autograd.grad(first, (x, w), dy)
    assert all(torch.equal(a, c) for a, c in zip(once, again, strict=True))
    torch.testing.assert_close(other[1], 2 * once[1])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_second_derivatives_exist(path, stride):
    x, w, b, mask = case(*SHAPES[0], 0.3)
    pack = ConvPack(mask, (1, 1), stride=stride, path=path)

    def hvp(layer, dtype):
        p = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
        g = torch.autograd.grad(layer(*p).pow(2).sum(), p, create_graph=True)
        return torch.autograd.grad(sum(t.sum() for t in g), p)

    got = hvp(lambda x, w, b: ops.masked_conv2d(x, w, b, pack), torch.float32)
    want = hvp(lambda x, w, b: F.conv2d(x, torch.where(mask, w, 0), b, stride, 1), torch.float64)
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-4 * c.abs().max().item())  # sums of sums
    assert not got[1][~mask].any()


@pytest.mark.parametrize("stride", [1, 2])
def test_flops_are_those_that_ran(stride):
    x, w, b, mask = case(*SHAPES[0], 0.3)
    positions = 16 * (8 // stride) ** 2
    dense, sparse = 2 * positions * mask.numel(), 2 * positions * int(mask.sum())
    for path, want in (("sparse", 3 * sparse), ("dense", 3 * dense)):
        with FlopCounterMode(display=False) as counter:
            ops.masked_conv2d(x, w, b, ConvPack(mask, (1, 1), stride=stride, path=path)).sum().backward()
        assert counter.get_total_flops() == want


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("letters", ["sss", "ddd"])
def test_ops_pass_opcheck(letters, stride):
    x, w, b, mask = case(9, 6, 3, (6, 4), (3, 3), (1, 1), (1, 1), stride, 0.4)
    parts = ConvPack(mask, (1, 1), stride=stride, path="sparse").parts(x, w)._replace(path=letters)
    dy = torch.randn(9, 6, 6 // stride, 4 // stride, requires_grad=True)
    for op, inputs in (
        (torch.ops.autoflip.masked_conv2d, (x, w, b)),
        (torch.ops.autoflip.masked_conv2d_dx, (dy, w)),
        (torch.ops.autoflip.masked_conv2d_dw, (dy, x)),
    ):
        torch.library.opcheck(op.default, (*inputs, *parts))


@pytest.mark.parametrize(
    "x, mask, match",
    [
        (torch.randn(8, 3, 5, 5), torch.ones(2, 4, 3, 3, dtype=torch.bool), "entry by entry"),
        (torch.randn(8, 2, 5, 5), torch.ones(2, 3, 3, 3, dtype=torch.bool), "wanted \\(N, 3, H, W\\)"),
    ],
)
def test_wrong_shapes_are_told(x, mask, match):
    with pytest.raises(ValueError, match=match):
        ops.masked_conv2d(x, torch.randn(2, 3, 3, 3), None, ConvPack(mask))


def test_wrong_packs_are_told():
    with pytest.raises(ValueError, match="4-d"):
        ConvPack(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="wanted one of"):
        ConvPack(torch.ones(1, 1, 1, 1, dtype=torch.bool), path="fast")
