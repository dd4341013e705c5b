// Builds and finds the layout that masked_matmul.h describes; apart from it because kernels use no STL.
#pragma once
#include <vector>

#include "cpu/masked_matmul.h"

namespace autoflip {

// patterns[k] = which of `live` rows, `stride` apart, keep column k
void patterns_of_rows(const uint8_t* corner, int64_t stride, int64_t live, int64_t width, uint8_t* patterns);

// How many columns of a group each pattern of several rows got, and each row by itself.
struct Buckets {
  int64_t whole[16], singles[kGroup], kept;
};
// Appends a group's columns to `pool`: pattern by pattern in the order of kPattern, then what is left over
// row by row. Patterns of several rows get multiples of `unit`, or none where that would be fewer than
// `shortest` vector multiply-adds: a bucket would cost more than it saves.
Buckets bucket_columns(const uint8_t* patterns, int64_t width, int64_t unit, int64_t shortest,
                       std::vector<uint16_t>& pool);

// The layout of mask (rows, cols); entries are 0 or 1; chunk <= kMaxChunk, block <= kRowBlock.
std::vector<uint8_t> masked_matmul_layout(const uint8_t* mask, int64_t rows, int64_t cols, int64_t chunk,
                                          int64_t block);
// What masked_matmul_layout made of a mask of this shape.
Layout masked_matmul_layout_at(const uint8_t* bytes, int64_t rows, int64_t cols, int64_t chunk,
                               int64_t block);

// The orders of mask (rows, cols) that linear layers walk. `groups`: products walk groups, else lists;
// `back`: the gradient in x has an order of its own.
std::vector<uint8_t> masked_matmul_orders(const uint8_t* mask, int64_t rows, int64_t cols, int64_t chunk,
                                          bool groups, bool back);
// What masked_matmul_orders made of a mask of this shape.
Orders masked_matmul_orders_at(const uint8_t* bytes, int64_t rows, int64_t cols, int64_t chunk);

}  // namespace autoflip
