"""Triton kernels, reachable as autoflip.kernels; imported only by autoflip.ops (triton is optional)."""
