"""The kernels for blocks of 16 and 4 rows against float64, on every instruction set of this CPU."""

import instruction_sets
import pytest
import second_derivatives
import torch

from autoflip import ops
from autoflip.ops import Pack, _masked_kernels, paths, reference, trials

pytestmark = pytest.mark.skipif(_masked_kernels.CPP is None, reason="no CPU extension")


def block_mask(O, K, height, density):
    g = torch.Generator().manual_seed(1)
    drawn = torch.rand(-(-O // height), K, generator=g) < density
    if drawn.numel() > 1:
        drawn.view(-1)[:2] = torch.tensor([True, False])  # neither all nor none
    return drawn.repeat_interleave(height, 0)[:O].contiguous()


def case(N, O, K, height, density):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g).requires_grad_() for s in [(N, K), (O, K), (O,)])
    mask = block_mask(O, K, height, density)
    with torch.no_grad():
        w[~mask] = float("nan")  # what stands at pruned entries is ignored
    return x, w, b, mask, torch.randn(N, O, generator=g)


class BlockPack(Pack):
    """A Pack that takes the kernels for blocks in every step."""

    def _make_parts(self, n_rows, *, timed=True):
        return self._make_path(n_rows, 3 * self._block_letter())


def block_pack(mask, height):
    pack = BlockPack(mask)
    assert _masked_kernels.HEIGHTS[pack.parts(1).path[0]] == height
    return pack


def results(x, w, b, pack, dy, activation=None):
    y = ops.masked_linear(x, w, b, pack, activation)
    return (y, *torch.autograd.grad(y, (x, w, b), dy))


def check(N, O, K, height, density, activation):
    x, w, b, mask, dy = case(N, O, K, height, density)
    pack = block_pack(mask, height)
    w64 = torch.where(mask, w.detach(), 0).double().requires_grad_()
    x64, b64 = (t.detach().double().requires_grad_() for t in (x, b))
    y64 = reference.masked_matmul(x64, w64, mask) + b64
    y64 = y64.relu() if activation else y64
    got = results(x, w, b, pack, dy, activation)
    want = (y64, *torch.autograd.grad(y64, (x64, w64, b64), dy.double()))
    for a, c, terms in zip(got, want, (K, O, N, N), strict=True):
        # rounding of the result, as in tests/test_masked_matmul.py, + one chain of float32 sums, which grow as the root
        # of their number and are rounded one by one: their roundings' standard deviation is eps * terms / 5
        atol = torch.finfo(torch.float32).eps * (36 * terms**0.5 + terms)
        torch.testing.assert_close(a.double(), c, rtol=0, atol=atol)
    assert not got[2][~mask].any()


# ragged in blocks, vectors, samples together, chunks of columns and blocks of rows
SHAPES = [(16, 1), (17, 5), (35, 33), (70, 700), (2 * 128 * 16 + 4, 3)]
BATCHES = [1, 3, 16, 17, 24, 25, 40, 64, 150]
LARGE = "test_a_large_weight_is_read_where_it_stands_or_copied"
PAST = "test_a_gradient_past_every_cache_equals_float64_reference"


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("height", [4, 16])
def test_equals_float64_reference(height, density, activation):
    for O, K in SHAPES:
        for N in BATCHES:
            check(N, O, K, height if density < 1 else 16, density, activation)


@pytest.mark.parametrize("isa", instruction_sets.LEVELS)
def test_every_instruction_set_equals_float64_reference(isa):
    instruction_sets.rerun(__file__, isa, "test_equals_float64_reference", LARGE, PAST)


# blocks of rows, chunks and samples for several threads; panels that each thread takes as wholes
@pytest.mark.parametrize("N, O, K, density", [(70, 300, 2100, 0.1), (200, 70, 600, 0.2), (150, 1030, 1040, 0.01)])
@pytest.mark.parametrize("height", [4, 16])
def test_result_does_not_depend_on_the_thread_count(N, O, K, density, height):
    x, w, b, mask, dy = case(N, O, K, height, density)
    got = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        got.append(results(x, w, b, block_pack(mask, height), dy))
    for other in got[1:]:
        assert all(torch.equal(a, c) for a, c in zip(got[0], other, strict=True))


@pytest.mark.parametrize("height", [4, 16])
def test_a_large_weight_is_read_where_it_stands_or_copied(height):
    # the last one's gradient goes past every cache in whole lines where vectors have 16 lanes
    cases = ((1035, 700, 0.1, True), (523, 530, 0.02, False), (523, 530, 0.5, None), (1050, 1008, 0.2, True))
    for O, K, density, kept_until_backward in cases:
        parts = block_pack(block_mask(O, K, height, density), height).parts(20)
        sizes = (parts.layout.data_ptr(), parts.chunk, height, O, K)
        assert (_masked_kernels.CPP.masked_blocks_values(*sizes) > 0) == (kept_until_backward is not None)
        assert (_masked_kernels.new_values(parts) is not None) == bool(kept_until_backward)
        for N in (3, 20, 130, 300):
            check(N, O, K, height, density, "relu" if N == 20 else None)


@pytest.mark.parametrize("height", [4, 16])
def test_a_gradient_past_every_cache_equals_float64_reference(height):
    for K in (2048, 2050):  # in whole lines, and not
        check(20, 2052, K, height, 0.05, None)


def test_only_masks_of_blocks_have_a_letter():
    for height, letter in ((16, "t"), (4, "q")):
        for O in (height, 2 * height, 3 * height + 1):
            mask = block_mask(O, 40, height, 0.3)
            assert _masked_kernels.block_letter(mask) == letter
            mask[O // height * height - 1, 5] ^= True  # the last row of a whole block
            assert _masked_kernels.block_letter(mask) == ""
    assert _masked_kernels.block_letter(torch.ones(3, 40, dtype=torch.bool)) == ""
    assert _masked_kernels.block_letter(torch.ones(0, 40, dtype=torch.bool)) == ""


def test_a_trial_and_the_rule_may_take_them(monkeypatch, tmp_path):
    mask = block_mask(64, 784, 16, 0.05)
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path))
    trials.forget()
    monkeypatch.setattr(trials, "_fastest", lambda ways, *_: list(ways)[-1])
    assert Pack(mask).parts(64).path == "ttt"
    trials.forget()
    monkeypatch.setenv("AUTOFLIP_TRIALS", "off")
    monkeypatch.setattr(paths, "rule", lambda *_, **__: "sparse")
    assert Pack(mask).parts(64).path == "ttt"
    assert Pack(block_mask(64, 784, 16, 0.5)).parts(64).path == "sss"


def test_double_backward_and_the_registered_op():
    x, w, b, mask, dy = case(4, 32, 20, 16, 0.4)
    with torch.no_grad():
        w.nan_to_num_(0.0)
    pack = block_pack(mask, 16)
    torch.library.opcheck(torch.ops.autoflip.masked_linear.default, (x, w, b, True, *pack.parts(4)))
    second_derivatives.check(x, w, b, mask, pack, atol=1e-2)  # cubes of sums: values reach 1e5
