#include "cpu/coarse.h"

#if defined(__AVX512BF16__)
#include "cpu/hessian_steps.h"
#include "cpu/lstm_walk_impl.h"

namespace autoflip {
const CoarseKernels coarse_bf16 = {
    lstm_back<Halves, uint16_t>, squares_of_steps<Halves, uint16_t>, nullptr, nullptr, nullptr, nullptr};
}
#else  // another kind of CPU, or a compiler from before these instructions
namespace autoflip {
const CoarseKernels coarse_bf16 = {};
}
#endif
