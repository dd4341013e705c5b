"""The masked product against float64, on every path and instruction set, with its derivatives and its ledger."""

import subprocess
from pathlib import Path

import instruction_sets
import pytest
import second_derivatives
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoflip import ops
from autoflip.ops import Pack, backend, paths, reference
from autoflip.ops import _masked_matmul as steps

SHAPES = [(1, 1, 1), (33, 65, 257), (70, 9, 530), (300, 21, 40)]  # ragged in rows, groups, chunks and panels
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def eps(dtype):
    return torch.finfo(dtype).eps


def case(N, O, K, density, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g).to(device, dtype).requires_grad_() for s in [(N, K), (O, K)])
    b = torch.randn(O, generator=g).to(device, dtype).requires_grad_()
    mask = (torch.rand(O, K, generator=g) < density).to(device)
    dy = torch.randn(N, O, generator=g).to(device, dtype)
    return x, w, b, mask, dy


def tolerance(dtype, terms):
    # rounding of the result + float32 sums (largest seen: 19 eps sqrt(terms))
    return (4 * eps(dtype) + 32 * eps(torch.float32)) * terms**0.5


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("N, O, K", [(1, 1, 1), (33, 65, 257), (128, 256, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_masked_matmul_equals_float64_reference(N, O, K, density, dtype, device):
    x, w, _, mask, dy = case(N, O, K, density, dtype, device)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))

    y, y64 = ops.masked_matmul(x, w, mask), reference.masked_matmul(x64, w64, mask)
    got = (y, *torch.autograd.grad(y, (x, w), dy))
    want = (y64, *torch.autograd.grad(y64, (x64, w64), dy.double()))

    for a, b, terms in zip(got, want, (K, O, N), strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=0, atol=tolerance(dtype, terms) * max(1, 4 * (dtype == torch.bfloat16))
        )
    assert not got[2][~mask].any()


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("N, O, K", SHAPES)
def test_sparse_path_equals_float64_reference(N, O, K, density, activation):
    x, w, b, mask, dy = case(N, O, K, density)
    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, w, b))

    y = ops.masked_linear(x, w, b, Pack(mask, path="sparse"), activation)
    y64 = reference.masked_matmul(x64, w64, mask) + b64
    y64 = getattr(torch.nn.functional, activation)(y64) if activation else y64
    got = (y, *torch.autograd.grad(y, (x, w, b), dy))
    want = (y64, *torch.autograd.grad(y64, (x64, w64, b64), dy.double()))

    for a, c, terms in zip(got, want, (K, O, N, N), strict=True):
        # gelu's slope is taken at a sum of K terms, whose rounding then weighs in every term of a gradient
        slope = 8 * eps(torch.float32) * (K * terms) ** 0.5 if activation == "gelu" else 0
        torch.testing.assert_close(a.double(), c, rtol=0, atol=tolerance(torch.float32, terms) + slope)
    assert not got[2][~mask].any()


# several rounds of panels over a weight past the second-level cache whose rows lie a power of two apart; a gradient
# that goes past every cache, of few rows and of many, in whole lines or not; weights whose kept entries are copied, and
# whose rows are walked in fours
LARGE = [
    (300, 130, 2112, 0.3),
    (9, 2051, 2052, 0.1),
    (70, 2048, 2048, 0.02),
    (20, 1027, 1030, 0.22),
    (17, 1030, 1040, 0.4),
    (40, 515, 2064, 0.1),
    (130, 1027, 1030, 0.1),
    (4, 17, 70001, 0.02),
    (16, 1030, 1040, 0.3),
    (40, 1030, 1040, 0.5),
    # panels one by one: of large weights of which little is kept, copied or not; with sums of all of dw, or a cell's
    (150, 1030, 1040, 0.01),
    (200, 600, 700, 0.02),
    (150, 512, 512, 0.5),
]


@pytest.mark.parametrize("N, O, K, density", LARGE)
def test_large_weights_equal_float64_reference(N, O, K, density):
    x, w, b, mask, dy = case(N, O, K, density)
    mask[5] = False
    mask[:, 17] = False
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    pack = Pack(mask, path="sparse")
    y = ops.masked_linear(x, w, b, pack)
    y64 = reference.masked_matmul(x64, w64, mask) + b.detach().double()
    got = (y, *torch.autograd.grad(y, (x, w, b), dy))
    want = (y64, *torch.autograd.grad(y64, (x64, w64), dy.double()), dy.double().sum(0))
    for a, c, terms in zip(got, want, (K, O, N, N), strict=True):
        torch.testing.assert_close(a.double(), c, rtol=0, atol=tolerance(torch.float32, terms))
    assert not got[2][~mask].any()
    # the step by itself has no copy of the kept weights from the forward product
    assert torch.equal(steps.dx(dy, w, pack.parts(N)), got[1])


@pytest.mark.parametrize("isa", instruction_sets.LEVELS)
def test_every_instruction_set_equals_float64_reference(isa):
    names = (
        "test_sparse_path_equals_float64_reference",
        "test_large_weights_equal_float64_reference",
        "test_result_does_not_depend_on_the_thread_count",
    )
    instruction_sets.rerun(__file__, isa, *names)


@pytest.mark.parametrize(
    "N, O, K, density", [(200, 70, 600, 0.2), (200, 70, 600, 0.05), (40, 1030, 1040, 0.1), *LARGE[-3:]]
)
def test_result_does_not_depend_on_the_thread_count(N, O, K, density):
    x, w, b, mask, dy = case(N, O, K, density)
    results = []
    for threads in (1, 2, 3, 4):  # 2 and 4 deal whole panels out, 3 do not
        torch.set_num_threads(threads)
        y = ops.masked_linear(x, w, b, Pack(mask, path="sparse"), "relu")
        results.append((y, *torch.autograd.grad(y, (x, w, b), dy)))
    for other in results[1:]:
        assert all(torch.equal(a, c) for a, c in zip(results[0], other, strict=True))


def test_every_order_of_derivative_exists():
    x, w, b, mask, _ = case(3, 5, 4, 0.5)
    pack = Pack(mask, path="sparse")
    second_derivatives.check(x, w, b, mask, pack, atol=1e-3)  # cubes of sums: values reach 1e4
    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, w, b))
    assert torch.autograd.gradgradcheck(lambda *p: ops.masked_linear(*p, pack, "relu"), (x64, w64, b64))


def test_function_transforms_see_the_same_function():
    x, w, _, mask, _ = case(6, 5, 4, 0.5)
    x, w = x.detach(), w.detach()
    pack = Pack(mask, path="sparse")

    def loss(w, row):
        return ops.masked_linear(row, w, None, pack).pow(2).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(w, x)
    want = torch.stack([2 * reference.masked_matmul(row[None], w, mask).T * row * mask for row in x])
    torch.testing.assert_close(per_sample, want)
    w = w.requires_grad_()
    y = ops.masked_linear(x, w, None, pack)
    (batched,) = torch.autograd.grad(y, w, torch.eye(y.numel()).view(-1, *y.shape), is_grads_batched=True)
    torch.testing.assert_close(batched.sum(0), x.sum(0) * mask)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_leading_dimensions_and_strides_are_free(lead):
    _, w, b, mask, _ = case(1, 20, 30, 0.3)
    x = torch.randn(30, *lead).movedim(0, -1)
    y = ops.masked_linear(x, w.detach().T.contiguous().T, b, Pack(mask, path="sparse"))
    assert y.shape == (*lead, 20)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w * mask, b))


@pytest.mark.parametrize("N, O, K", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_shapes(N, O, K):
    for p in ("sparse", "dense"):
        x, w, b, mask, dy = case(N, O, K, 0.5)
        y = ops.masked_linear(x, w, b, Pack(mask, path=p))
        dx, dw = torch.autograd.grad(y, (x, w), dy)
        assert (y.shape, dx.shape, dw.shape) == ((N, O), (N, K), (O, K))
        assert K or torch.equal(y, b.expand(N, O))


def test_dense_path_gives_exact_zeros_even_for_pruned_nan():
    x, w, _, mask, dy = case(8, 6, 5, 0.5)
    with torch.no_grad():
        w[~mask] = float("nan")
    for p in ("dense", "sparse"):
        y = ops.masked_linear(x, w, None, Pack(mask, path=p))
        dw = torch.autograd.grad(y, w, dy)[0]
        assert y.isfinite().all()
        assert not dw[~mask].any()


def test_dense_path_does_not_trust_the_weight():
    x, w, _, mask, _ = case(40, 30, 300, 0.5)
    y = ops.masked_linear(x, w, None, Pack(mask, path="dense"))  # w is not zero where it is pruned
    torch.testing.assert_close(y, x @ (w * mask).T)
    clean = (w * mask).detach()
    clean[0, 0] = float(mask[0, 0])
    clean[~mask] *= -1  # minus zero is clean too
    torch.testing.assert_close(ops.masked_linear(x, clean, None, Pack(mask, path="dense")), x @ clean.T)
    before = clean.clone()
    clean[-1][~mask[-1]] = 1.0
    torch.testing.assert_close(ops.masked_linear(x, clean, None, Pack(mask, path="dense")), x @ before.T)


def test_masked_weight_equals_where():
    for shape in [(), (5,), (3, 4, 5, 6), (0, 3)]:
        w = torch.randn(shape, requires_grad=True)
        mask = torch.rand(shape) < 0.5
        assert torch.equal(ops.masked_weight(w, mask), torch.where(mask, w, 0))
        (g,) = torch.autograd.grad(ops.masked_weight(w, mask).pow(2).sum(), w)
        assert torch.equal(g, torch.where(mask, 2 * w, 0))
    with pytest.raises(ValueError, match="entry by entry"):
        ops.masked_weight(torch.ones(3), torch.ones(2, dtype=torch.bool))


def test_changed_mask_is_seen():
    x, w, _, mask, _ = case(3, 4, 5, 1.0)
    ops.masked_matmul(x, w, mask)
    mask[0] = False
    assert not ops.masked_matmul(x, w, mask)[:, 0].any()


@pytest.mark.parametrize("want", ["sparse", "dense", "auto"])
def test_flops_are_those_that_ran(want):
    N, O, K = 64, 96, 300
    x, w, b, mask, dy = case(N, O, K, 0.1)
    pack = Pack(mask, path=want)
    with FlopCounterMode(display=False) as count:
        ops.masked_linear(x, w, b, pack).backward(dy)
    letters = {"sparse": "sss", "dense": "ddd", "auto": pack.parts(N).path}[want]
    executed = sum(2 * N * (int(mask.sum()) if letter == "s" else O * K) for letter in letters)
    assert count.get_total_flops() == executed


def test_rule_is_dense_where_nothing_can_be_gained():
    isa = backend.extension("_C")[0].isa()
    assert paths.rule(1, 4, 4, 0.01) == "dense"  # too small to pay for a call
    assert paths.rule(64, 512, 2304, 1.0) == "dense"
    if isa != "base":
        assert paths.rule(64, 512, 2304, 0.05) == "sparse"


def test_opcheck():
    x, w, b, mask, dy = case(9, 7, 11, 0.4)
    parts = Pack(mask, path="sparse").parts(9)
    torch.library.opcheck(torch.ops.autoflip.masked_linear.default, (x, w, b, True, *parts))
    torch.library.opcheck(torch.ops.autoflip.masked_linear_dx.default, (dy.requires_grad_(), w, *parts))
    torch.library.opcheck(torch.ops.autoflip.masked_linear_dw.default, (dy, x, *parts))


@pytest.mark.parametrize("want", ["sparse", "dense"])
def test_compile_fullgraph(want):
    x, w, b, mask, dy = case(9, 7, 11, 0.4)
    pack = Pack(mask, path=want)
    layer = lambda x, w, b: ops.masked_linear(x, w, b, pack, "relu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x, w, b), layer(x, w, b)
    torch.testing.assert_close(got, expected)
    for a, c in zip(torch.autograd.grad(got, (x, w, b), dy), torch.autograd.grad(expected, (x, w, b), dy), strict=True):
        torch.testing.assert_close(a, c)
    torch.testing.assert_close(
        torch.compile(ops.masked_matmul, fullgraph=True, backend="aot_eager")(x, w, mask), ops.masked_matmul(x, w, mask)
    )


def test_autocast_and_half_take_the_dense_path():
    x, w, b, mask, _ = case(9, 7, 11, 0.4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.masked_linear(x, w, b, Pack(mask, path="sparse")).dtype == torch.bfloat16
    assert ops.masked_linear(x.half(), w.half(), b.half(), Pack(mask, path="sparse")).dtype == torch.float16


def test_errors_say_what_came_and_what_was_wanted():
    x, w, b, mask, _ = case(3, 4, 5, 0.5)
    with pytest.raises(ValueError, match="entry by entry"):
        ops.masked_matmul(x, w, mask[:, :4])
    with pytest.raises(ValueError, match=r"wanted \(N, K\)"):
        ops.masked_matmul(x[0], w, mask)
    with pytest.raises(ValueError, match=r"wanted \(..., K\) and \(O, K\)"):
        ops.masked_matmul(x[:, :4], w, mask)
    with pytest.raises(ValueError, match="one dtype"):
        ops.masked_matmul(x, w.double(), mask)
    with pytest.raises(ValueError, match="bias is"):
        ops.masked_linear(x, w, b[:2], Pack(mask))
    with pytest.raises(ValueError, match="activation='tanh'"):
        ops.masked_linear(x, w, b, Pack(mask), "tanh")
    with pytest.raises(ValueError, match="2-d torch.bool"):
        Pack(w)
    with pytest.raises(ValueError, match="path='fast'"):
        Pack(mask, path="fast")


def test_backend_that_cannot_run_says_why(monkeypatch):
    x, w, _, mask, _ = case(3, 4, 5, 0.5)
    monkeypatch.setenv("AUTOFLIP_BACKEND", "cuda")
    with pytest.raises(backend.BackendError, match="cuda runs on CUDA tensors only|=cuda, which cannot run here: ."):
        ops.masked_matmul(x, w, mask)
    monkeypatch.setenv("AUTOFLIP_BACKEND", "reference")
    torch.testing.assert_close(ops.masked_matmul(x, w, mask), reference.masked_matmul(x, w, mask))


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_instruction_set_sources_share_no_code(isa):
    # a weak symbol compiled for AVX-512 could be the copy that the linker picks for every CPU
    objects = list(Path(__file__).parents[1].glob(f"build/*-opt/*masked_matmul_{isa}.cpp.o"))
    if not objects:
        pytest.skip("no object files: installed from a wheel")
    for o in objects:
        names = subprocess.run(["nm", "-g", "--defined-only", o], capture_output=True, text=True, check=True).stdout
        # DW.ref.* is a data reference to the exception handler, not code
        symbols = [line.split()[-1] for line in names.splitlines() if line and "DW.ref" not in line]
        assert len(symbols) == 2, symbols  # the kernels for any mask and for blocks


@pytest.mark.parametrize("N, O, K", [(3, 5, 7), (40, 33, 65)])
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_triton_equals_float64_reference(N, O, K, density, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("AUTOFLIP_BACKEND", "triton")  # conftest.py turns the interpreter on where there is no GPU
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, w, b, mask, dy = case(N, O, K, density, device=device)
    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, w, b))
    y = ops.masked_linear(x, w, b, Pack(mask), "relu")
    y64 = (reference.masked_matmul(x64, w64, mask) + b64).relu()
    got = (y, *torch.autograd.grad(y, (x, w), dy))
    want = (y64, *torch.autograd.grad(y64, (x64, w64), dy.double()))
    for a, c, terms in zip(got, want, (K, O, N), strict=True):
        torch.testing.assert_close(a.double(), c, rtol=0, atol=tolerance(torch.float32, terms))


@pytest.mark.gpu
@pytest.mark.parametrize("N, O, K", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gpu_kernels_equal_float64_reference(N, O, K, density, name, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_BACKEND", name)
    x, w, b, mask, dy = case(N, O, K, density, device="cuda")
    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, w, b))
    y = ops.masked_linear(x, w, b, Pack(mask))
    y64 = reference.masked_matmul(x64, w64, mask) + b64
    got = (y, *torch.autograd.grad(y, (x, w), dy))
    want = (y64, *torch.autograd.grad(y64, (x64, w64), dy.double()))
    for a, c, terms in zip(got, want, (K, O, N), strict=True):
        torch.testing.assert_close(a.double(), c, rtol=0, atol=tolerance(torch.float32, terms))


def test_pack_outlives_a_change_of_backend(monkeypatch):
    x, w, b, mask, _ = case(5, 6, 7, 0.4)
    pack = Pack(mask, path="sparse")
    want = ops.masked_linear(x, w, b, pack)
    for name in ("reference", "triton"):
        if name == "triton" and backend.unavailable("triton", "cpu"):
            continue
        monkeypatch.setenv("AUTOFLIP_BACKEND", name)
        torch.testing.assert_close(ops.masked_linear(x, w, b, pack), want)
        torch.testing.assert_close(ops.masked_linear(x, w, b, Pack(mask, path="sparse")), want)
