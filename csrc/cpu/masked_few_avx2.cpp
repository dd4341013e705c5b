#include "cpu/masked_few_impl.h"

namespace autoflip {
extern const MaskedFew masked_few_avx2 = {any_forward, any_backward};
}
