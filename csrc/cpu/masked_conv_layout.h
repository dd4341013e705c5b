// Builds and finds the layout that masked_conv.h describes; apart from it because kernels use no STL.
#pragma once
#include <vector>

#include "cpu/masked_conv.h"

namespace autoflip {

// The layout of mask (channels of `out`, channels of images, kernel) over a panel of images, for a product
// whose results are like `out`. `turned`: the layout of the gradient in x, images being those of dy, of a
// mask (channels of images, channels of `out`, kernel).
std::vector<uint8_t> masked_conv_layout(const MaskedConv& conv, const uint8_t* mask, Images images,
                                        Images out, Kernel kernel, int64_t tile_height, int64_t tile_width,
                                        bool turned);
Layout masked_conv_layout_at(const MaskedConv& conv, const uint8_t* bytes, int64_t kept, Images images,
                             Images out, Kernel kernel, int64_t tile_height, int64_t tile_width);

}  // namespace autoflip
