// y = act(x @ (w * mask).T + b), its gradient in x and its sampled gradient in w, for one CPU instruction
// set.
//
// Layout of a mask (built once per mask, never from values): rows in blocks, columns in chunks small enough
// that their activations stay in the first-level cache. In each (block, chunk) the columns of four
// neighbouring rows are bucketed by the pattern of rows that keep them: one loop per pattern loads an
// activation once for all rows that want it. Buckets of several rows hold a multiple of four columns; what is
// left over goes to the rows one by one. The runs of a pattern are sorted by length, so that the branch
// predictor knows where each ends. No branch per weight, no padding, exactly nnz multiply-adds. In memory,
// little-endian:
//   int32  table[blocks][chunks][15]  first column, first value, first run of each of the 12 patterns, end
//   uint32 runs[]                     row - first row of the block (low half), columns of the run (high half)
//   uint16 columns[]                  column - first column of the chunk, run by run
// Values: the kept weights in the order of the runs, within a run row by row: read in sequence by the product
// and by the gradient in x, which walks the same layout and adds to the columns.
//
// Panels: activations feature-major, [sample block][feature][lane], a sample is a SIMD lane. Blocks have
// `lanes` samples, the last one as few vectors as hold the rest, padded with zeros.
//
// Sums do not depend on the thread count: no sum is ever cut between threads.
#pragma once
#include <cstdint>

namespace autoflip {

constexpr int kGroup = 4;
constexpr int64_t kRowBlock = 128;  // most rows of a block: with 64 lanes their sums take 32 KB
constexpr int64_t kMaxChunk = 512;
constexpr int kPatterns = 12;
constexpr int kPattern[kPatterns] = {15, 14, 13, 11, 7, 12, 10, 9, 6, 5, 3, 1};  // 1: any single row
constexpr int kTable = kPatterns + 3;

struct Layout {
  const int32_t* table;
  const uint32_t* runs;
  const uint16_t* columns;
  int64_t rows, cols, block, chunk;
};

struct MaskedMatmul {
  // floats of scratch that the first panel of n samples takes, and all of them
  int64_t (*panel_scratch)(int64_t n, int64_t features);
  int64_t (*panels_scratch)(int64_t n, int64_t features);
  // values (kept) = w (rows, cols) row-major at the layout
  void (*pack)(Layout layout, const float* w, float* values, int threads);
  // y (n, rows) = x (n, cols) @ weight.T, plus bias (rows) or null, then relu if asked; all row-major.
  // scratch: panel_scratch(n, cols) floats
  void (*multiply)(Layout layout, const float* values, const float* x, int64_t n, const float* bias,
                   bool relu, float* y, float* scratch, int threads);
  // dx (n, cols) = dy (n, rows) @ weight, unless dx is null; dw (rows, cols) = mask ? dy.T @ x : 0, unless
  // dw is null. scratch: panels_scratch(n, rows + cols) floats
  void (*backward)(Layout layout, const float* values, const float* dy, const float* x, int64_t n, float* dx,
                   float* dw, float* scratch, int threads);
  // out[i] = mask[i] ? w[i] : 0, the weight of the dense path (torch.where takes 20 times as long)
  void (*select)(const float* w, const uint8_t* mask, int64_t n, float* out, int threads);
  // whether w is zero wherever the mask is not set; reads only
  bool (*is_clean)(const float* w, const uint8_t* mask, int64_t n);
  // dw (rows, cols) = mask ? dy.T @ x : 0, every product computed; all row-major. scratch:
  // outer_scratch(n, rows) floats. Null where a vendor's product is faster
  void (*outer)(const float* dy, const float* x, const uint8_t* mask, int64_t n, int64_t rows, int64_t cols,
                float* dw, float* scratch, int threads);
  int64_t (*outer_scratch)(int64_t n, int64_t rows);
};

extern const MaskedMatmul masked_matmul_base;
extern const MaskedMatmul masked_matmul_avx2;
extern const MaskedMatmul masked_matmul_avx512;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a block: equal shares, two of them at least where there is work for two threads.
inline int64_t rows_of_block(int64_t rows) {
  const int64_t blocks = ceil_div(rows, rows < 2 * kRowBlock && rows >= 32 ? ceil_div(rows, 2) : kRowBlock);
  return rows ? ceil_div(ceil_div(rows, blocks), kGroup) * kGroup : kGroup;
}

}  // namespace autoflip
