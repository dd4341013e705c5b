#include "cpu/coarse.h"

#if defined(__AMX_BF16__)
#include "cpu/hessian_steps.h"
#include "cpu/lstm_walk_impl.h"

namespace autoflip {
const CoarseKernels coarse_amx = {lstm_back<Tiles, uint16_t>, squares_of_steps<Tiles, uint16_t>};
}
#else  // another kind of CPU, or a compiler from before these instructions
namespace autoflip {
const CoarseKernels coarse_amx = {nullptr, nullptr};
}
#endif
