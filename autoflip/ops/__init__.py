"""The only door to the kernels: checks, dispatch, autograd, fake tensors and FLOP formulas, one file a family."""

# masked_matmul

# delta
from autoflip.ops import delta as delta

# hessian
