"""The only door to the kernels: checks, dispatch, autograd, fake tensors and FLOP formulas, one file a family."""

# masked_matmul
from autoflip.ops.masked_matmul import Pack as Pack
from autoflip.ops.masked_matmul import masked_linear as masked_linear
from autoflip.ops.masked_matmul import masked_matmul as masked_matmul
from autoflip.ops.masked_matmul import masked_weight as masked_weight

# delta

# hessian
