// Builds and finds the layout that masked_conv.h describes; apart from it because kernels use no STL.
#pragma once
#include <vector>

#include "cpu/masked_conv.h"

namespace autoflip {

// The layout of mask (rows, channels, kernel) over a panel of images. `turned`: the layout of the gradient in
// x, whose mask is (channels, rows, kernel turned round) of a weight (channels, rows, kernel).
std::vector<uint8_t> masked_conv_layout(const MaskedConv& conv, const uint8_t* mask, int64_t rows,
                                        Images images, Kernel kernel, int64_t tile_height, int64_t tile_width,
                                        bool turned);
Layout masked_conv_layout_at(const MaskedConv& conv, const uint8_t* bytes, int64_t kept, int64_t rows,
                             Images images, Kernel kernel, int64_t tile_height, int64_t tile_width);

}  // namespace autoflip
