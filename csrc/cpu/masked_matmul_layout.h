// Builds and finds the layout that masked_matmul.h describes; apart from it because kernels use no STL.
#pragma once
#include <vector>

#include "cpu/masked_matmul.h"

namespace autoflip {

// The layout of mask (rows, cols); entries are 0 or 1; chunk <= kMaxChunk, block <= kRowBlock.
std::vector<uint8_t> masked_matmul_layout(const uint8_t* mask, int64_t rows, int64_t cols, int64_t chunk,
                                          int64_t block);
// What masked_matmul_layout made of a mask of this shape.
Layout masked_matmul_layout_at(const uint8_t* bytes, int64_t rows, int64_t cols, int64_t chunk,
                               int64_t block);

// The orders of mask (rows, cols) that linear layers walk; `back`: the gradient in x has groups of its own.
std::vector<uint8_t> masked_matmul_orders(const uint8_t* mask, int64_t rows, int64_t cols, int64_t chunk,
                                          bool back);
// What masked_matmul_orders made of a mask of this shape.
Orders masked_matmul_orders_at(const uint8_t* bytes, int64_t rows, int64_t cols, int64_t chunk);

}  // namespace autoflip
