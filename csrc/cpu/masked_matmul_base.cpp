#include "cpu/masked_matmul_grad.h"

namespace autoflip {
extern const MaskedMatmul masked_matmul_base = {panel_scratch, panels_scratch, pack,  multiply,     backward,
                                                select,        is_clean,       outer, outer_scratch};
}
