#include "cpu/masked_matmul_grad.h"

namespace autoflip {
extern const MaskedMatmul masked_matmul_avx512 = {
    forward_scratch, backward_scratch, packs, forward, backward, select, is_clean, outer, outer_scratch};
}
