"""A stranger's networks and training loops, with three changed lines: masks, sparsify, compact."""

import copy

import pytest
import torch
from published_nets import NETS
from torch import nn

from autoflip import compact, prune, sparsify
from autoflip.nn import densify

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def setting(name, dtype=torch.float32):
    torch.manual_seed(0)
    make, inputs = NETS[name]
    batches = [(as_type(inputs(), dtype), torch.randint(10, (6,))) for _ in range(4)]
    return make().to(dtype), batches


def as_type(inputs, dtype):
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def train(model, optimizer, batches):
    """The user's own loop: knows nothing of masks."""
    model.train()
    for inputs, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(*inputs), labels)
        loss.backward()
        optimizer.step()


def masks_for(model):
    return prune.hybrid(model, {n: w.abs() for n, w in prune.weights(model).items()}, density=0.2, channels=0.5)


def close(a, b):
    # float64 sums in another order through up to a dozen layers: 1e-10 is some 500,000 eps, any lost channel is more
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
def test_three_lines(name):
    model, batches = setting(name)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, batches)

    masks = masks_for(model)  # 1
    sparsify(model, masks)  # 2
    train(model, optimizer, batches)
    small = compact(model, batches[0][0])  # 3

    for key, tensor in model.state_dict().items():
        assert key not in masks or "running" in key or not tensor[~masks[key]].any(), key
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    assert sum(small.plan.removed.values()) > 0
    assert not any(type(m).__module__.startswith("autoflip") for m in small.modules())
    inputs, labels = batches[0]
    inputs = as_type(inputs, torch.float64)
    model, on = model.double(), copy.deepcopy(small)
    small.double()
    for mode in (False, True):
        model.train(mode)
        small.train(mode)
        got, want = small(*inputs), model(*inputs)
        close(got, want)
    for net in (small, model):
        net.zero_grad()
        nn.functional.cross_entropy(net(*inputs), labels).backward()
    for key, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        mask = masks[key] if key in masks else torch.ones_like(grad, dtype=torch.bool)
        less = small.get_parameter(key).grad
        grad, mask = (small.plan.shrink({key: t})[key] for t in (grad, mask))
        close(torch.zeros_like(grad) if less is None else less * mask, grad * mask)
    buffers = {k: b for k, b in model.named_buffers() if k in small.plan.shapes}
    for key, buffer in small.plan.shrink(buffers).items():
        close(small.get_buffer(key), buffer)
    train(on, OPTIMIZERS["sgd"](on.parameters()), batches)  # and the loop goes on


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "transformer", "lstm"])
def test_training_goes_on_in_the_small_model_with_the_optimizers_state(name, optimizer):
    model, batches = setting(name, torch.float64)  # so that what differs is no rounding
    early = OPTIMIZERS[optimizer](model.parameters())
    masks = masks_for(model)
    sparsify(model, masks)
    train(model, early, batches[:2])
    small = compact(model, batches[0][0])
    names = [n for n, _ in model.named_parameters()]
    assert names == [n for n, _ in small.named_parameters()]

    state = early.state_dict()
    less = small.plan.shrink_optimizer(state, names)
    back = small.plan.expand_optimizer(less, names)
    again = small.plan.shrink_optimizer(back, names)
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                assert back["state"][index][key].shape == value.shape
                assert torch.equal(again["state"][index][key], less["state"][index][key])
    late = OPTIMIZERS[optimizer](small.parameters())
    late.load_state_dict(less)
    if optimizer == "adafactor":  # its rows and columns average over what is gone
        train(small, late, batches[2:])
        return
    sparse = sparsify(small, small.plan.shrink_masks(masks))
    train(sparse, late, batches[2:])
    train(model, early, batches[2:])
    whole = densify(copy.deepcopy(model))
    for key, tensor in small.plan.shrink(whole.state_dict()).items():
        # two more steps; Adam divides by what may be small
        torch.testing.assert_close(small.state_dict()[key], tensor, rtol=1e-6, atol=1e-6, msg=key)


def test_state_that_follows_no_parameter_is_refused():
    model, batches = setting("last_step")
    small = compact(sparsify(model, masks_for(model)))
    names = [n for n, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, batches)
    with pytest.raises(ValueError, match="one name per parameter in the optimizer's order"):
        small.plan.shrink_optimizer(optimizer.state_dict(), names[:-1])
    with pytest.raises(ValueError, match="only state that follows its parameter"):
        small.plan.shrink_optimizer(optimizer.state_dict(), names[::-1])
    with pytest.raises(ValueError, match="in the compact model the parameter has"):
        small.plan.expand_optimizer(optimizer.state_dict(), names)
