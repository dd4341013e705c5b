"""Your own federated code, three lines changed: sparse local training, small updates, a smaller model to ship."""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import autoflip
from autoflip import codec, prune


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int = 60) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for step in range(steps):
        chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(step))[:64]
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    train(model, x, y)  # a start worth pruning

    masks = prune.magnitude(model, density=0.1)  # 1: which weights stay
    autoflip.sparsify(model, masks)  # 2: same parameters, same state_dict() keys; pruned weights stay zero
    before = copy.deepcopy(model.state_dict())
    train(model, x, y)
    delta = {name: new - before[name] for name, new in model.state_dict().items()}
    blob = codec.encode(delta, masks=masks, values="int8")  # 3: what goes over the wire
    dense = sum(t.numel() * 4 for t in delta.values())
    print(f"update: {len(blob):,} bytes instead of {dense:,} ({dense / len(blob):.0f}x smaller)")

    received = codec.decode(blob, masks=masks)  # the server's side
    server = {name: before[name] + received[name] for name in before}
    model.load_state_dict(server)
    accuracy = (model(x).argmax(1) == y).float().mean()
    print(f"accuracy after the update travelled as int8: {accuracy:.3f}")

    hybrid = prune.hybrid(model, {n: p.detach() ** 2 for n, p in model.named_parameters()}, density=0.1, channels=0.5)
    autoflip.sparsify(model, hybrid)
    small = autoflip.compact(model, x[:1])  # plain torch, dead neurons gone
    count = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    print(f"compact model: {count[1]:,} parameters instead of {count[0]:,}, {small}")
    torch.testing.assert_close(small(x), model(x))


if __name__ == "__main__":
    main()
