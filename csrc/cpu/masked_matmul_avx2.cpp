#include "cpu/masked_blocks_impl.h"

namespace autoflip {
extern const MaskedMatmul masked_matmul_avx2 = {
    forward_scratch, backward_scratch, packs,         forward,    backward,      select,     is_clean,
    outer,           outer_scratch,    every_forward, every_back, every_scratch, sum_samples};
extern const MaskedBlocks masked_blocks_avx2 = kMaskedBlocks;
}  // namespace autoflip
