"""The only door to the kernels: checks, dispatch, autograd, fake tensors and FLOP formulas, one file a family."""

# masked_matmul
from autoflip.ops.masked_matmul import Pack as Pack
from autoflip.ops.masked_matmul import masked_linear as masked_linear
from autoflip.ops.masked_matmul import masked_matmul as masked_matmul

# delta
from autoflip.ops import delta as delta

# hessian
