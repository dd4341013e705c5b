"""All columns of softmax's factor through the last two dense layers: whose samples open what, and what comes of it."""

import instruction_sets
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoflip import curvature, ops
from autoflip.ops import backend, reference_softmax

EPS = torch.finfo(torch.float32).eps
# more than one part of a class's samples (64), of the weight's columns (131072 values), of the classes' teams
SIZES = [(1, 1, 1, 1), (3, 2, 5, 7), (150, 3, 20, 37), (40, 13, 300, 500), (9, 10, 33, 64)]


def layers(N, classes, O, K):
    """Samples of a class open nearly the same units; one is nearly sure of its class."""
    g = torch.Generator().manual_seed(0)
    f = 2 * torch.randn(N, classes, generator=g)
    f[-1] *= 20
    last, weight = torch.randn(classes, O, generator=g), torch.randn(O, K, generator=g)
    alike = torch.randn(classes, O, generator=g)[f.argmax(1)] + torch.randn(N, O, generator=g) / 4
    return f, torch.rand(N, 1, generator=g), last, alike.relu(), weight, torch.randn(N, K, generator=g).relu()


def check(size, gated, squared):
    f, scale, last, gate, weight, before = layers(*size)
    gate, before = (gate, before) if gated else (None, None)
    got = ops.softmax_pull_back(f, scale, last, gate, weight, before, squared=squared)
    p = f.double().softmax(1)
    H = scale.double()[:, :, None] * (p.diag_embed() - p[:, :, None] * p[:, None, :])
    u = last.double() if gate is None else last.double() * (gate > 0)[:, None]  # (N, classes, O)
    v = (u @ weight.double()).expand(len(f), -1, -1)
    v = v if before is None else v * (before > 0)[:, None]
    pulled = got[2].double()
    if squared:
        wanted = torch.einsum("nck,ncd,ndk->nk", v, H, v)
    else:
        assert len(pulled) == f.shape[1] - 1
        pulled, wanted = torch.einsum("qnk,qnj->nkj", pulled, pulled), v.mT @ H @ v
    hidden = torch.einsum("nco,ncd,ndo->no", u.expand(len(f), -1, -1), H, u.expand(len(f), -1, -1))
    for one, want in ((got[0].double(), H.diagonal(dim1=1, dim2=2)), (got[1].double(), hidden), (pulled, wanted)):
        # float32 sums of up to 300 terms, squared; each sample by itself, the sure one too (largest seen: 4 eps)
        apart, size = (one - want).flatten(1).norm(dim=1), want.flatten(1).norm(dim=1)
        assert (apart <= 32 * EPS * size + torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_softmax_pull_back_equals_float64(size, gated, squared):
    check(size, gated, squared)


@pytest.mark.parametrize("isa", instruction_sets.LEVELS)
def test_on_each_instruction_set(isa):
    instruction_sets.rerun(__file__, isa, "test_softmax_pull_back_equals_float64")


@pytest.mark.parametrize("squared", [False, True])
def test_the_kernel_makes_the_reference_s_columns(squared):
    tensors = layers(9, 10, 33, 64)
    got = ops.softmax_pull_back(*tensors, squared=squared)
    want = reference_softmax.softmax_pull_back(*(t.double() for t in tensors), squared)
    for one, two in zip(got, want):
        # column for column, with its sign (largest seen: 2 eps)
        torch.testing.assert_close(one.double(), two, rtol=0, atol=16 * EPS * two.abs().max().item())


def test_softmax_pull_back_does_not_depend_on_threads():
    tensors, before = layers(150, 3, 60, 150), torch.get_num_threads()
    try:
        results = [(torch.set_num_threads(n), ops.softmax_pull_back(*tensors))[1] for n in (1, 2)]
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_softmax_pull_back_counts_and_registers():
    f, scale, last, gate, weight, before = layers(30, 2, 40, 8)
    cpp = backend.serve("dense_pull_back", f.device) == "cpp"
    with FlopCounterMode(display=False) as counter:  # all alike: what is open is summed once a class, then nothing
        ops.softmax_pull_back(f, scale, last, gate[:1].expand(30, -1), weight, before)
    assert counter.get_total_flops() == (2 * 2 * 1 * int((gate[0] > 0).sum()) * 8 if cpp else 2 * 30 * 40 * (2 + 8))
    tests = ("test_schema", "test_faketensor")
    op = torch.ops.autoflip.softmax_pull_back.default
    torch.library.opcheck(op, (f, scale, last, gate, weight, None, True), test_utils=tests)
    with pytest.raises(ValueError, match="weight is .* wanted torch.float32 \\(40, 7\\)"):
        ops.softmax_pull_back(f, scale, last, gate, weight[1:, 1:])
    with pytest.raises(ValueError, match="before is .* wanted torch.float32 \\(30, 8\\)"):
        ops.softmax_pull_back(f, scale, last, gate, weight, before.double())
    with pytest.raises(ValueError, match="two dimensions each"):
        ops.softmax_pull_back(f, scale, last[0], gate, weight)
    with pytest.raises(ValueError, match="one class in axis 1"):
        ops.softmax_pull_back(f, scale[0], last, gate, weight)


def nets():
    second = nn.Conv2d(4, 6, 3, padding=1)
    pool = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2))
    dense = nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5)
    return {
        "two": nn.Sequential(nn.Flatten(), nn.Linear(144, 5)),
        "last two": nn.Sequential(nn.Flatten(), nn.Linear(144, 9), nn.ReLU(), nn.Linear(9, 5)),
        "no ReLU": nn.Sequential(nn.Flatten(), nn.Linear(144, 9), nn.Linear(9, 8), nn.Linear(8, 5)),
        "deep": nn.Sequential(nn.Flatten(), nn.Linear(144, 24), nn.ReLU(), *dense),
        "convolutions": nn.Sequential(pool, nn.Flatten(), *dense[:3], nn.ReLU(), nn.Linear(9, 5)),
        "convolution first": nn.Sequential(pool, nn.Flatten(), nn.Linear(24, 9), nn.ReLU(), nn.Linear(9, 5)),
    }


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("name", nets())
def test_exact_is_the_sum_over_the_factor_s_columns(name, chunk):
    """Each column's gradient a sample, by autograd in float64."""
    torch.manual_seed(0)
    model = nets()[name]
    x, y = torch.randn(6, 1, 12, 12), torch.tensor([0, 1, 2, 3, -100, 4])
    found = curvature.hessian_diagonal(model, F.cross_entropy, (x, y), method="ggn-exact", chunk=chunk)
    double = nets()[name].double()
    double.load_state_dict(model.state_dict())
    params = list(double.parameters())
    want = [torch.zeros_like(p) for p in params]
    for n in range(6):
        f = double(x[n : n + 1].double())[0]
        p = f.detach().softmax(0)
        values, vectors = torch.linalg.eigh((p.diag() - p[:, None] * p) * (float(y[n] >= 0) / 5))
        for s in (vectors * values.clamp(min=0).sqrt()).T:
            for total, g in zip(want, torch.autograd.grad(f, params, s, retain_graph=True)):
                total += g.square()
    for (key, _), total in zip(double.named_parameters(), want):
        apart = (found[key].double() - total).norm() / total.norm()
        assert apart <= 32 * EPS, (key, apart)  # largest seen: 4 eps
