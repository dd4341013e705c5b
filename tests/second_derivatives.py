"""What second derivatives of a masked product must be: those of the float64 reference."""

import torch

from autoflip import ops
from autoflip.ops import reference


def check(x, w, b, mask, pack, *, atol):
    """Compare Hessian-vector products of ``masked_linear`` cubed with float64's; nothing may reach what is pruned."""

    def hvp(layer, dtype):
        p = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
        g = torch.autograd.grad(layer(*p).pow(3).sum(), p, create_graph=True)
        return torch.autograd.grad(sum(t.pow(2).sum() for t in g), p)

    got = hvp(lambda x, w, b: ops.masked_linear(x, w, b, pack), torch.float32)
    want = hvp(lambda x, w, b: reference.masked_matmul(x, w, mask) + b, torch.float64)
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=atol)
    assert not got[1][~mask].any()
