// A masked linear layer whose products are all computed, by the kernels that suit the number of samples on
// this CPU: rows of the weight for a few of them (masked_few.h), with AVX-512 tiles of it for more
// (every_forward and every_back of masked_matmul.h).
//
// bits: masked_few_bits of the mask.
#pragma once
#include "cpu/masked_few.h"
#include "cpu/masked_matmul.h"

namespace autoflip {

// the samples that share what is read of the weight; 0: there are no kernels for this CPU
int64_t every_together();

// whether more of them meet tiles of the weight
bool every_tiles();

// floats that the two functions below need; `back`: the second one
int64_t every_scratch(int64_t n, int64_t rows, int64_t cols, bool back);

// y (n, rows) = act(x (n, cols) @ (w * mask).T + bias); bias may be null
void every_forward(const float* w, const uint16_t* bits, const float* x, int64_t n, int64_t rows,
                   int64_t cols, const float* bias, bool relu, float* y, float* scratch, int threads);

// dx (n, cols) = dy (n, rows) @ (w * mask); dw (rows, cols) = mask ? dy.T @ x : 0; db (rows) = dy's sum over
// samples; those that are null are left out
void every_backward(const float* w, const uint16_t* bits, const float* dy, const float* x, int64_t n,
                    int64_t rows, int64_t cols, float* dx, float* dw, float* db, float* scratch, int threads);

}  // namespace autoflip
