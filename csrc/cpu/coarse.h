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
};

extern const CoarseKernels coarse_bf16, coarse_amx;

// Those of this CPU; null where it has none.
const CoarseKernels* coarse_kernels();

}  // namespace autoflip
