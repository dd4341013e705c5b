"""What tests of a masked layer's training step share, whatever kind of layer it is."""

import torch
from torch.utils.flop_counter import FlopCounterMode


def counted(monkeypatch, kernels):
    """Return a list that grows by each pass that goes through Python."""
    calls = []
    for name in ("cpu_forward", "cpu_backward"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, kernel=kernel, **k: calls.append(kernel) or kernel(*a, **k))
    return calls


def check_step(layer, product, x, dy, wanted, atol):
    """Compare y and the ``wanted`` gradients of x, weight and bias with float64's; ``atol``: of the gradients."""
    leaves = {"x": x, "w": layer.weight, "b": layer.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted).grad = None
    y = layer(x)
    y.backward(dy)
    copies = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    want = product(copies["x"], torch.where(layer.weight_mask, copies["w"], 0), copies["b"])
    want.backward(dy.double())
    torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-4)  # float32 sums of 40 to 45 terms of size 1
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        if name in wanted:
            assert leaf.grad.dtype == torch.float32
            torch.testing.assert_close(leaf.grad.double(), copies[name].grad, rtol=0, atol=atol)
    if "w" in wanted:
        assert not layer.weight.grad[~layer.weight_mask].any()


def check_modes(layer, again, x):
    """Call the layer under autocast, a FLOP counter and vmap: no step may go the way of the last one there."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not again(layer, x)
        assert layer(x).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        assert not again(layer, x)
        layer(x)
    assert counter.get_total_flops() > 0
    batched = torch.func.vmap(layer)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(batched[1], layer(2 * x), rtol=1e-5, atol=1e-5)
