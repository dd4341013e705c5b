// y = act(x @ (w * mask).T + b), its gradient in x and its sampled gradient in w, for one CPU instruction
// set.
//
// Layout of a mask (built once per mask, never from values): rows in groups of 4, columns in chunks of 256.
// In each (group, chunk) the columns are sorted by the 4-bit pattern of rows that keep them, 1 to 15, so that
// one loop per pattern runs without a branch per weight and does exactly nnz multiply-adds. In memory:
//   int32 table[groups][chunks][16]   begin of pattern p at [p - 1], end of pattern 15 at [15]
//   uint8 columns[]                   column - 256 * chunk
// Weights stay where they are: entry (row, column) is w[row * row_stride + column * column_stride], so the
// gradient in x is the same product with the layout of the transposed mask and the strides exchanged.
//
// Panels: activations feature-major, [sample block][feature][lane], a sample is a SIMD lane. Blocks have
// `lanes` samples, the last one as few vectors as hold the rest, padded with zeros.
//
// Sums do not depend on the thread count: no sum is ever cut between threads.
#pragma once
#include <cstdint>

namespace autoflip {

constexpr int kGroup = 4;
constexpr int64_t kChunk = 256;
constexpr int kTable = 16;

struct Layout {
  const int32_t* table;
  const uint8_t* columns;
  int64_t rows, cols;
};

struct Weight {
  const float* data;
  int64_t row_stride, column_stride;
};

struct MaskedMatmul {
  int64_t lanes;   // samples in a full panel
  int64_t vector;  // the sample count of a panel is a multiple of this

  // x (n, features) row-major -> panels
  void (*to_panels)(const float* x, int64_t n, int64_t features, float* panels, int threads);
  // y (n, rows) row-major = panels @ weight.T at the layout, plus bias (rows) or null, then relu if asked
  void (*multiply)(Layout layout, Weight weight, const float* panels, int64_t n, const float* bias, bool relu,
                   float* y, int threads);
  // out[i] = mask[i] ? w[i] : 0, the weight of the dense path (torch.where takes 20 times as long)
  void (*select)(const float* w, const uint8_t* mask, int64_t n, float* out, int threads);
  // whether w is zero wherever the mask is not set; reads only
  bool (*is_clean)(const float* w, const uint8_t* mask, int64_t n);
  // dw[row * cols + column] = sum over samples of dy[row] * x[column], written only where the mask is set
  void (*sample)(Layout layout, const float* dy_panels, const float* x_panels, int64_t n, float* dw,
                 int threads);
};

extern const MaskedMatmul masked_matmul_base;
extern const MaskedMatmul masked_matmul_avx2;
extern const MaskedMatmul masked_matmul_avx512;

// Most bytes that the layout of a mask can take.
int64_t masked_matmul_layout_bound(int64_t rows, int64_t cols);
// Fills the layout of mask (rows, cols), or that of its transpose, and returns the bytes it took. Entries are
// 0 or 1.
int64_t masked_matmul_layout(const uint8_t* mask, int64_t rows, int64_t cols, bool transposed,
                             uint8_t* layout);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace autoflip
