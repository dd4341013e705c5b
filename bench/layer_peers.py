"""Other ways to train a layer with a masked weight: one full step each (forward, dx, dw) as a function of no argument.

A builder takes (weight, bias, mask, x, dy, padding) and returns a step; the step returns (y, dx) for the check before
the timing. What has no backward of its own (torch CSR and BSR, scipy) gets one by hand, without autograd: that favours
them. It raises where its library is missing or cannot do the case; the reason stands in the results.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

Step = Callable[[], tuple[Tensor, Tensor]]


def through_autograd(layer: nn.Module, x: Tensor, dy: Tensor) -> Step:
    """Return a training step: gradients cleared, forward, backward into ``x.grad`` and each parameter's ``.grad``."""
    leaves = [x, *layer.parameters()]

    def step() -> tuple[Tensor, Tensor]:
        for leaf in leaves:
            leaf.grad = None
        y = layer(x)
        y.backward(dy)
        return y, x.grad

    return step


def plain(weight: Tensor, bias: Tensor, padding: int, stride: int = 1) -> nn.Module:
    """Return torch's own layer with these parameters (copied)."""
    o, i, *k = weight.shape
    layer = nn.Conv2d(i, o, k, padding=padding, stride=stride) if k else nn.Linear(i, o)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


class Product(nn.Module):
    def __init__(self, layer: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.layer, self.mask = layer, mask.float()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight * self.mask
        if weight.dim() == 2:
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


def masked_product(weight, bias, mask, x, dy, padding):
    return through_autograd(Product(plain(weight, bias, padding), mask), x, dy)


def torch_prune(weight, bias, mask, x, dy, padding):
    layer = plain(weight, bias, padding)
    prune.custom_from_mask(layer, "weight", mask)
    return through_autograd(layer, x, dy)


def sparseprop(weight, bias, mask, x, dy, padding):
    from sparseprop.modules import SparseConv2d, SparseLinear

    layer = plain(weight * mask, bias, padding)
    if weight.dim() == 2:
        return through_autograd(SparseLinear.from_dense(layer), x, dy)
    # its own automatic choice times both ways round and keeps the faster one
    steps = [through_autograd(SparseConv2d.from_dense(layer, vectorizing_over_on=way), x, dy) for way in (True, False)]
    return fastest(steps)


def sparselab(weight, bias, mask, x, dy, padding):
    import numpy
    from sparselab import PaddedCSR, SparseLinear

    layer = SparseLinear(weight.shape[1], weight.shape[0])
    layer._csr = PaddedCSR.from_dense(weight * mask)
    layer._values = nn.Parameter(torch.from_numpy(numpy.asarray(layer._csr.values)))
    with torch.no_grad():
        layer.bias.copy_(bias)
    step = through_autograd(layer, x, dy)
    step()  # its cached transpose fails at some masks
    return step


def _csr_parts(weight, mask):
    """Return (W, W.T as CSR, places of W's values inside W.T's, row and column of each value)."""
    rows, cols = mask.nonzero(as_tuple=True)
    values = weight[mask]
    number = torch.zeros(weight.shape, dtype=torch.int64)
    number[rows, cols] = torch.arange(len(rows))
    order = number.t()[mask.t()]

    def csr(kept, values):
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
        return torch.sparse_csr_tensor(starts, kept.nonzero()[:, 1], values, kept.shape, check_invariants=False)

    return csr(mask, values), csr(mask.t(), values[order]), order, rows, cols


def torch_csr(dw: str):
    def build(weight, bias, mask, x, dy, padding):
        w, wt, order, rows, cols = _csr_parts(weight, mask)
        x = x.detach()
        if dw == "sampled":
            torch.sparse.sampled_addmm(w, dy.t(), x, beta=0.0)  # raises where torch was built without MKL

        def step():
            y = (w @ x.t()).t() + bias
            wt.values().copy_(w.values()[order])
            dx = (wt @ dy.t()).t()
            if dw == "sampled":
                torch.sparse.sampled_addmm(w, dy.t(), x, beta=0.0)
            else:
                (dy.t() @ x)[rows, cols]
            dy.sum(0)
            return y, dx

        return step

    return build


def torch_bsr(block: int):
    def build(weight, bias, mask, x, dy, padding):
        masked = weight * mask
        w, wt = masked.to_sparse_bsr((block, block)), masked.t().contiguous().to_sparse_bsr((block, block))
        x, live = x.detach(), mask.view(len(mask) // block, block, -1, block).any(3).any(1)
        rows, cols = live.nonzero(as_tuple=True)
        number = torch.zeros(live.shape, dtype=torch.int64)
        number[rows, cols] = torch.arange(len(rows))
        order = number.t()[live.t()]

        def step():
            y = (w @ x.t()).t() + bias
            wt.values().copy_(w.values()[order].transpose(1, 2))
            dx = (wt @ dy.t()).t()
            dw = dy.t() @ x
            dw.view(live.shape[0], block, live.shape[1], block).transpose(1, 2)[rows, cols]
            dy.sum(0)
            return y, dx

        return step

    return build


def scipy_csr(weight, bias, mask, x, dy, padding):
    from scipy.sparse import csr_matrix

    torch_w, _, _, rows, cols = _csr_parts(weight, mask)
    parts = [t.numpy() for t in (torch_w.values(), torch_w.col_indices().int(), torch_w.crow_indices().int())]
    w = csr_matrix(tuple(parts), shape=weight.shape)
    x, d, b = x.detach().numpy(), dy.numpy(), bias.numpy()
    rows, cols = rows.numpy(), cols.numpy()

    def step():
        y = (w @ x.T).T + b
        dx = (w.T @ d.T).T
        (d.T @ x)[rows, cols]
        d.sum(0)
        return torch.from_numpy(y), torch.from_numpy(dx)

    return step


def unfolded_csr(weight, bias, mask, x, dy, padding):
    """A convolution as unfold + CSR; dw by a dense product, gathered."""
    o, _, size, _ = weight.shape
    w, wt, order, rows, cols = _csr_parts(weight.flatten(1), mask.flatten(1))
    x, (n, _, height, width) = x.detach(), x.shape

    def step():
        columns = F.unfold(x, size, padding=padding).transpose(0, 1).flatten(1)  # [c * size * size, n * pixels]
        y = (w @ columns).view(o, n, *dy.shape[2:]).transpose(0, 1) + bias.view(-1, 1, 1)
        d = dy.transpose(0, 1).flatten(1)
        wt.values().copy_(w.values()[order])
        dx = F.fold((wt @ d).view(len(columns), n, -1).transpose(0, 1), (height, width), size, padding=padding)
        (d @ columns.t())[rows, cols]
        d.sum(1)
        return y, dx

    return step


def fastest(steps):
    """Return the step that takes least time, best of three."""
    from timing import clock

    return min(steps, key=lambda step: min(clock(step, 1) for _ in range(3)))


LINEAR = {
    "weight*mask": masked_product,
    "torch prune": torch_prune,
    "torch CSR, sampled_addmm": torch_csr("sampled"),
    "torch CSR, dense dw": torch_csr("dense"),
    "scipy": scipy_csr,
    "sparseprop": sparseprop,
    "sparselab": sparselab,
}
BLOCKS = {"weight*mask": masked_product, "torch BSR": torch_bsr(16)}
CONV = {
    "weight*mask": masked_product,
    "torch prune": torch_prune,
    "unfold + torch CSR": unfolded_csr,
    "sparseprop": sparseprop,
}
