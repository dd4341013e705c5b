// A linear layer's step by addresses: what Python calls, and the functions of bind_step.cpp.
#pragma once
#include <cstdint>

namespace autoflip {

void masked_matmul_forward(uintptr_t x, uintptr_t weight, uintptr_t lay, int64_t chunk, uintptr_t bias,
                           int64_t n, int64_t rows, int64_t cols, bool relu, uintptr_t y, uintptr_t values,
                           int threads);
void masked_matmul_backward(uintptr_t dy, uintptr_t x, uintptr_t weight, uintptr_t values, uintptr_t lay,
                            int64_t chunk, int64_t n, int64_t rows, int64_t cols, uintptr_t dx, uintptr_t dw,
                            uintptr_t db, int threads);
bool masked_matmul_outer(uintptr_t dy, uintptr_t x, uintptr_t mask, uintptr_t bits, int64_t n, int64_t rows,
                         int64_t cols, uintptr_t dw, int threads);
void masked_blocks_forward(uintptr_t x, uintptr_t weight, uintptr_t lay, int64_t chunk, int height,
                           uintptr_t bias, int64_t n, int64_t rows, int64_t cols, bool relu, uintptr_t y,
                           uintptr_t values, int threads);
void masked_blocks_backward(uintptr_t dy, uintptr_t x, uintptr_t weight, uintptr_t values, uintptr_t lay,
                            int64_t chunk, int height, int64_t n, int64_t rows, int64_t cols, uintptr_t dx,
                            uintptr_t dw, uintptr_t db, int threads);
void masked_every_forward(uintptr_t w, uintptr_t bits, uintptr_t x, int64_t n, int64_t rows, int64_t cols,
                          uintptr_t bias, bool relu, uintptr_t y, int threads);
void masked_every_backward(uintptr_t w, uintptr_t bits, uintptr_t dy, uintptr_t x, int64_t n, int64_t rows,
                           int64_t cols, uintptr_t dx, uintptr_t dw, uintptr_t db, int threads);

}  // namespace autoflip
