#include "cpu/masked_matmul_impl.h"

namespace autoflip {
extern const MaskedMatmul masked_matmul_avx2 = {kLanes, kVector,  to_panels, multiply,
                                                select, is_clean, sample};
}
