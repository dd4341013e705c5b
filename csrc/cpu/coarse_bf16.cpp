#include "cpu/coarse.h"
#include "cpu/hessian_steps.h"
#include "cpu/lstm_walk_impl.h"

namespace autoflip {
const CoarseKernels coarse_bf16 = {lstm_back<Halves, uint16_t>, squares_of_steps<Halves, uint16_t>};
}
