#include "cpu/masked_conv_impl.h"

namespace autoflip {
extern const MaskedConv masked_conv_avx512 = {kVector,  kShared, kTall,    kWide,      panel_size,
                                              to_panel, gather,  multiply, strip_size, gradient};
}
