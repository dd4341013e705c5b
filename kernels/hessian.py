"""D[O, K] = (d * d)[N, O].T @ (a * a)[N, K], squares taken after the load: they never exist in memory.

Layout   row-major.
Grid     (cdiv(O, BO) * cdiv(K, BK),); each program walks N, float32 sums, IEEE (no TF32).
Unmeasured on a GPU.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def squared_matmul_kernel(p_d, p_a, p_out, N, O, K, BN: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):  # noqa: E741
    """One tile of D."""
    i_tile = tl.program_id(0).to(tl.int64)
    n_k = tl.cdiv(K, BK)
    o_o = i_tile // n_k * BO + tl.arange(0, BO)
    o_k = i_tile % n_k * BK + tl.arange(0, BK)
    m_o, m_k = o_o < O, o_k < K
    b_out = tl.zeros([BO, BK], tl.float32)
    for i_n in range(0, N, BN):
        o_n = (i_n + tl.arange(0, BN)).to(tl.int64)
        m_n = o_n < N
        b_d = tl.load(p_d + o_n[None, :] * O + o_o[:, None], m_n[None, :] & m_o[:, None], 0.0)  # [BO, BN]
        b_a = tl.load(p_a + o_n[:, None] * K + o_k[None, :], m_n[:, None] & m_k[None, :], 0.0)  # [BN, BK]
        b_d, b_a = b_d.to(tl.float32), b_a.to(tl.float32)
        b_out = tl.dot(b_d * b_d, b_a * b_a, b_out, input_precision="ieee")
    p_tile = p_out + o_o[:, None] * K + o_k[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), m_o[:, None] & m_k[None, :])


def squared_matmul(d: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Launch; d and a are contiguous, of one dtype and on one device (checked by autoflip.ops)."""
    N, O, K = *d.shape, a.shape[1]  # noqa: E741
    out = torch.empty(O, K, dtype=d.dtype, device=d.device)
    BN, BO, BK = 32, 64, 64
    grid = (triton.cdiv(O, BO) * triton.cdiv(K, BK),)
    squared_matmul_kernel[grid](d, a, out, N, O, K, BN=BN, BO=BO, BK=BK, num_warps=4)
    return out
