#include "cpu/masked_few_impl.h"

namespace autoflip {
extern const MaskedFew masked_few_avx512 = {any_forward, any_backward};
}
