// A masked linear layer for a few samples: weights are read where they stand, all of them, and those that are
// pruned become zeros on their way to a register. No order of the kept ones, no panels: with so few samples
// to share them they would cost more than the multiply-adds that they save. Without AVX-512 more samples go
// eight at a time, which suits a weight that stays in the first-level cache; with it they meet tiles of the
// weight (masked_matmul_every.h).
//
// bits: the mask, 16 columns to a word, row by row, each row from a whole word on; zeros past its end.
#pragma once
#include <cstdint>
#include <vector>

namespace autoflip {

constexpr int kFewSamples = 8;  // that share what is read of the weight

struct MaskedFew {
  // y (n, rows) = x (n, cols) @ (w * mask).T, plus bias (rows) or null, then relu if asked; all row-major
  void (*forward)(const float* w, const uint16_t* bits, const float* x, int64_t n, int64_t rows, int64_t cols,
                  const float* bias, bool relu, float* y, int threads);
  // dx (n, cols) = dy (n, rows) @ (w * mask); dw (rows, cols) = mask ? dy.T @ x : 0; db (rows) = dy's sum
  // over samples; those that are null are left out
  void (*backward)(const float* w, const uint16_t* bits, const float* dy, const float* x, int64_t n,
                   int64_t rows, int64_t cols, float* dx, float* dw, float* db, int threads);
};

extern const MaskedFew masked_few_avx512, masked_few_avx2;

std::vector<uint8_t> masked_few_bits(const uint8_t* mask, int64_t rows, int64_t cols);

}  // namespace autoflip
