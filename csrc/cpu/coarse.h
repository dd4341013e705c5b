// Products of bfloat16 with sums in float32, for CPUs with AVX512_BF16 (twice the multiply-adds an
// instruction) or AMX (tiles of them). For estimates whose own error is far above bfloat16's.
#pragma once
#include "cpu/hessian.h"
#include "cpu/lstm_walk.h"

namespace autoflip {

// Null where this build has none of them.
struct CoarseKernels {
  // As in lstm_walk.h; d is bfloat16.
  decltype(LstmWalk::back) lstm_back;
  // As in hessian.h; d is bfloat16 with outputs next to each other.
  int64_t (*sequence_squares)(const uint16_t* const* d, const StepsInput* u, float* out, const StepsShape&,
                              int threads);
  // As in hessian.h; null where looking for zeros in float32 is faster.
  decltype(HessianKernels::squared_matmul_scratch) squared_matmul_scratch;
  decltype(HessianKernels::squared_matmul) squared_matmul;
  // As in hessian.h, with scratch for all factors' rows; null where a library's float32 product is as fast.
  int64_t (*dense_pull_back_scratch)(int64_t rows, int64_t outputs, int threads);
  int64_t (*dense_pull_back)(const float* const* d, const float* w, const float* gate, const int64_t* at,
                             float* out, float* scratch, int64_t factors, int64_t samples, int64_t outputs,
                             int64_t columns, bool squared, int threads);
};

extern const CoarseKernels coarse_bf16, coarse_amx;

// Those of this CPU; null where it has none.
const CoarseKernels* coarse_kernels();

}  // namespace autoflip
