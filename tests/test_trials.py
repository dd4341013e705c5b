"""Trials: the faster way is found, remembered on disk, and nothing else in the process notices."""

import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoflip import nn, ops
from autoflip.ops import Pack, backend, batches, conv_paths, paths, trials


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Trials on, with a folder of their own and an empty memory."""
    monkeypatch.setenv("AUTOFLIP_TRIALS", "on")
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path / "cache"))
    trials.forget()
    yield tmp_path / "cache" / "trials.json"
    trials.forget()


def long():
    return sum(range(20000))


def short():
    return None


def test_the_faster_way_wins_and_the_first_keeps_a_tie(kept, monkeypatch):
    spent = [0.0]
    clock = SimpleNamespace(thread_time=lambda: spent[0], perf_counter=lambda: spent[0])
    monkeypatch.setattr(trials, "time", clock)  # what a busy machine does to real times is no fault of the choice

    def takes(seconds):
        return lambda: spent.__setitem__(0, spent[0] + seconds)

    assert trials.choose("a", {"dense": takes(2e-4), "sparse": takes(1e-6)}) == "sparse"
    assert trials.choose("b", {"dense": takes(1e-6), "sparse": takes(2e-4)}) == "dense"
    assert trials.choose("c", {"dense": takes(2e-4), "sparse": takes(2e-4)}) == "dense"
    assert trials.choose("d", {"dense": takes(2.00e-4), "sparse": takes(1.94e-4)}) == "dense"  # less than 5 % faster
    assert trials.choose("e", {"dense": takes(2.00e-4), "sparse": takes(1.86e-4)}) == "sparse"
    almost = {"dense": takes(2.00e-4), "sparse": takes(1.94e-4)}
    assert trials.choose("f", almost, gain=0.99) == "sparse"
    assert trials.choose("g", almost, gain=0.96) == "dense"
    want = {"a": "sparse", "b": "dense", "c": "dense", "d": "dense", "e": "sparse", "f": "sparse", "g": "dense"}
    assert json.loads(kept.read_text())[trials.machine()] == want


def test_what_is_kept_is_not_timed_again_by_another_process(kept):
    trials.choose("a", {"dense": long, "sparse": short})
    code = (
        "from autoflip.ops import trials\n"
        "def never(): raise AssertionError('timed again')\n"
        "print(trials.choose('a', {'dense': never, 'sparse': never}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "sparse"


def test_two_processes_that_try_at_once_agree(kept):
    def other_process_is_faster():
        if not kept.exists():
            kept.parent.mkdir()
            kept.write_text(json.dumps({trials.machine(): {"a": "dense"}}))

    # this trial alone would find "sparse", but "dense" was kept while it ran
    assert trials.choose("a", {"dense": long, "sparse": other_process_is_faster}) == "dense"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 3}', "null"])
def test_a_spoilt_file_counts_as_empty_and_is_written_anew(kept, text):
    kept.parent.mkdir()
    kept.write_text(text)
    assert trials.known() == {}
    assert trials.choose("a", {"dense": long, "sparse": short}) == "sparse"
    trials.forget()
    assert trials.known() == {"a": "sparse"}


def test_a_choice_that_no_longer_exists_is_made_again(kept):
    trials.choose("a", {"dense": long, "old": short})
    trials.forget()
    assert trials.choose("a", {"dense": long, "sparse": short}) == "sparse"


def test_a_folder_that_cannot_be_written_warns_once_and_works(kept, monkeypatch):
    kept.parent.write_text("a file where the folder should be")
    trials._warn.cache_clear()
    with pytest.warns(UserWarning, match="Set AUTOFLIP_CACHE"):
        assert trials.choose("a", {"dense": long, "sparse": short}) == "sparse"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trials.choose("b", {"dense": long, "sparse": short}) == "sparse"


def test_trials_can_be_turned_off(kept, monkeypatch):
    monkeypatch.setenv("AUTOFLIP_TRIALS", "off")
    mask = torch.rand(200, 784) < 0.05
    letters = Pack(mask).parts(64).path
    density = float(mask.float().mean())
    assert letters == "".join(paths.rule(64, 200, 784, density, step=s)[0] for s in ("forward", "dx", "dw"))
    assert not kept.exists()
    monkeypatch.setenv("AUTOFLIP_TRIALS", "maybe")
    with pytest.raises(ValueError, match="wanted on or off"):
        trials.enabled()


@pytest.mark.skipif(backend.extension("_C")[0] is None, reason="the CPU extension is not built: nothing to choose from")
def test_a_layer_chooses_once_per_batch_size_and_no_counter_sees_it(kept, monkeypatch):
    mask = torch.rand(96, 300, generator=torch.Generator().manual_seed(0)) < 0.05
    layer = nn.MaskedLinear(300, 96)
    layer.set_mask(mask)
    x = torch.randn(60, 300, requires_grad=True)
    with FlopCounterMode(display=False) as count:
        layer(x).sum().backward()
    letters = layer._pack.parts(60).path
    kept_entries = int(mask.sum())
    want = sum(2 * 60 * (kept_entries if letter == "s" else mask.numel()) for letter in letters)
    assert count.get_total_flops() == want
    keys = [key for key in trials.known() if key.startswith("masked_linear 96x300 n49")]
    assert len(keys) == 4  # three products and the whole step
    assert all("threads 1" in key for key in keys)

    monkeypatch.setattr(trials, "_fastest", lambda *_: pytest.fail("timed again"))
    trials.forget()  # what is on disk is enough
    assert Pack(mask).parts(52).path == letters  # 52 rows stand with 60
    with torch.inference_mode():
        assert Pack(mask).parts(60).path == letters


LAYERS = {
    "linear": (lambda: nn.MaskedLinear(48, 32, dtype=torch.float32), (32, 48)),
    "conv": (lambda: nn.MaskedConv2d(3, 8, 3, padding=1, dtype=torch.float32), (16, 3, 6, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_function_transforms_and_a_default_device_do_not_reach_a_trial(kept, kind):
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    layer.set_mask(torch.rand(layer.weight.shape) < 0.05)
    rows = torch.stack([x, 2 * x])
    want = torch.stack([layer(row) for row in rows])
    tried = trials.known()
    assert tried

    def again(run):
        trials.forget()
        kept.unlink()
        layer.set_mask(layer.weight_mask)  # forgets what it found
        y = run()
        assert trials.known().keys() == tried.keys()
        return y

    torch.testing.assert_close(again(lambda: torch.func.vmap(layer)(rows)), want)
    weight = layer.weight.detach()

    def loss(w):
        return torch.func.functional_call(layer, {"weight": w}, (x,)).square().sum()

    slope = again(lambda: torch.func.jacrev(loss)(weight))
    torch.testing.assert_close(slope, torch.func.grad(loss)(weight))
    along = again(lambda: torch.func.jvp(loss, (weight,), (weight,)))[1]
    torch.testing.assert_close(along, (slope * weight).sum())
    with torch.device("meta"):
        torch.testing.assert_close(again(lambda: layer(x)), want[0])


def test_a_default_dtype_is_not_what_a_trial_multiplies(kept):
    # in a process of its own: kernels that take bfloat16 for float32 write past its end
    code = """
import torch
from autoflip import nn
torch.set_default_dtype(torch.bfloat16)
wide = {"dtype": torch.float32}
x = torch.randn(16, 12, 16, **wide)
layers = [
    (nn.MaskedLinear(16, 32, **wide), x.flatten(0, 1)),
    (nn.MaskedConv2d(3, 8, 3, **wide), x.view(16, 3, 8, 8)),
    (nn.MaskedLSTM(16, 32, **wide), x),
    (nn.MaskedGRU(16, 32, **wide), x),
]
for layer, x in layers:
    masks = {n: torch.rand(p.shape) < 0.05 for n, p in layer.named_parameters() if p.dim() > 1}
    layer.set_mask(masks if isinstance(layer, torch.nn.RNNBase) else masks["weight"])
    for _ in range(2):
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        assert y.dtype is torch.float32
        y.sum().backward()
print("done")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "done"), run.stderr
    assert len(trials.known()) > 3


def test_nothing_is_tried_where_nothing_can_be_gained(kept):
    assert Pack(torch.ones(300, 300, dtype=torch.bool)).parts(64).path == "ddd"
    assert not kept.exists()


def test_a_mask_that_keeps_nothing_takes_the_kernels_that_do_nothing(kept):
    assert "d" not in Pack(torch.zeros(300, 300, dtype=torch.bool)).parts(64).path


def test_result_is_the_same_on_either_side_of_a_choice(kept):
    mask = torch.rand(96, 300) < 0.1
    x, w = torch.randn(64, 300), torch.randn(96, 300)
    y = ops.masked_linear(x, w, None, Pack(mask))
    # float32 sums in another order, see tests/test_masked_matmul.py
    torch.testing.assert_close(y, x @ (w * mask).T, rtol=0, atol=64 * torch.finfo(torch.float32).eps * 300**0.5)


@pytest.mark.parametrize("most", [64, 512])
def test_what_stands_for_a_batch_is_no_larger_and_fills_vectors_as_badly(most):
    kept = {batches.bucket(n, most) for n in range(1, 2000)}
    small = {1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 25, 32, 33, 49, 64, 65}
    assert kept == (small if most == 64 else small | {97, 128, 129, 193, 256, 257, 385, 512, 513})
    for n in range(1, most + 1):
        stands = batches.bucket(n, most)
        assert stands <= n <= 1.5 * stands
        lanes, those = -(-n // 16), -(-stands // 16)  # vectors of 16 samples
        assert those <= lanes <= those * 1.5
    assert [batches.bucket(n, most) for n in (most + 1, most + 16, 5000, 5008)] == [most + 1, most, most + 1, most]
    assert batches.bucket(0) == 1


def test_a_rule_counts_lanes_that_are_not_filled():
    assert [batches.filled(n) for n in (16, 64, 8, 24)] == [1, 1, 0.5, 0.75]
    limit = paths.RULE["avx512"]["forward"][0][1]
    if backend.extension("_C")[0] is not None and backend.extension("_C")[0].isa() == "avx512":
        assert [paths.rule(n, 512, 2304, 0.9 * limit) for n in (16, 17, 25)] == ["sparse", "dense", "dense"]


def test_few_images_are_tried_below_a_density_only():
    mask = torch.zeros(64, 64, 3, 3, dtype=torch.bool)
    for n, density, wanted in ((1, 0.05, True), (1, 0.1, False), (4, 0.2, True), (4, 0.3, False), (40, 0.8, False)):
        assert conv_paths.tried(mask, int(density * mask.numel()), n, 256) == wanted
    assert conv_paths.tried(mask[:8], mask[:8].numel(), 40, 2560)  # few channels, all kept
