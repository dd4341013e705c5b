// The gradient in w at blocks: see masked_blocks.h. Blocks of 16 rows are a vector of outputs, so that no
// sums have to be turned; of blocks of 4 rows samples are lanes, and four columns meet four rows at a time.
#pragma once
#include "cpu/masked_blocks_product.h"

namespace autoflip {
namespace {

#if defined(__AVX512F__)
constexpr int kTallColumns = 8, kFlatRows = 4;
#else
constexpr int kTallColumns = 4, kFlatRows = 2;
#endif
constexpr int kParts = kTall / kVector;  // vectors of a block of 16 rows

// --- blocks of 16 rows

// Activations in panels of 16 samples: wider ones would put a column's lines where they fight for the same
// few places of the first-level cache.
AF_INLINE Panel tall_panel(int64_t i, int64_t n) { return {i * kTall, least(kTall, n - i * kTall), kTall}; }
AF_INLINE int64_t tall_padded(int64_t n) { return ceil_div(n, kTall) * kTall; }
void tall_panels(const float* x, int64_t n, int64_t features, float* out, int threads) {
  fill_panels(x, ceil_div(n, kTall), features, out, threads, [n](int64_t i) { return tall_panel(i, n); });
}

// dy (n, rows) row-major -> [block][sample][16], zeros below the last row
void tall_samples(const float* dy, int64_t n, int64_t rows, float* out, int threads) {
  const int64_t many = ceil_div(rows, kTall);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t g = 0; g < many; ++g) {
    const int64_t live = least(kTall, rows - g * kTall);
    for (int64_t i = 0; i < n; ++i) {
      const float* from = dy + i * rows + g * kTall;
      float* to = out + (g * n + i) * kTall;
      if (live == kTall)
        __builtin_memcpy(to, from, kTall * sizeof(float));
      else
        for (int64_t r = 0; r < kTall; ++r) to[r] = r < live ? from[r] : 0;
    }
  }
}

// to[column][16 rows] = the sums over all samples of dy * x at C columns
template <int C>
AF_INLINE void tall_sample(const uint16_t* column, const float* dy, const float* panels, int64_t col,
                           int64_t cols, int64_t n, float* to) {
  vec sums[C][kParts];
  unroll<0, C * kParts>([&](auto i) AF_LAMBDA { sums[i.value / kParts][i.value % kParts] = vec{}; });
  for (int64_t i = 0; i < ceil_div(n, kTall); ++i) {
    const Panel p = tall_panel(i, n);
    const float* x[C];
    unroll<0, C>([&](auto c)
                     AF_LAMBDA { x[c.value] = panels + p.begin * cols + (col + column[c.value]) * kTall; });
    for (int64_t s = 0; s < p.count; ++s, dy += kTall) {
      vec d[kParts];
      unroll<0, kParts>([&](auto p) AF_LAMBDA { d[p.value] = load(dy + p.value * kVector); });
      unroll<0, C>([&](auto c) AF_LAMBDA {
        const vec b = broadcast(x[c.value][s]);
        unroll<0, kParts>(
            [&](auto p) AF_LAMBDA { sums[c.value][p.value] = fma(b, d[p.value], sums[c.value][p.value]); });
      });
    }
  }
  unroll<0, C * kParts>(
      [&](auto i) AF_LAMBDA { store(to + i.value * kVector, sums[i.value / kParts][i.value % kParts]); });
}

// The gradients of one list, a row of the block after the other, `stride` floats apart. dy: the block's
void tall_gradients(const uint16_t* column, int64_t count, const float* dy, const float* panels, int64_t col,
                    int64_t cols, int64_t n, float* to, int64_t stride) {
  alignas(64) float tile[(kMaxChunk + kTallColumns) * kTall];
  int64_t j = 0;
  for (; count - j > kTallColumns - 4; j += kTallColumns)
    tall_sample<kTallColumns>(column + j, dy, panels, col, cols, n, tile + j * kTall);
  if constexpr (kTallColumns > 4)
    for (; j < count; j += 4) tall_sample<4>(column + j, dy, panels, col, cols, n, tile + j * kTall);
  transpose<false>(tile, kTall, count, kTall, to, stride);
}

// --- blocks of 4 rows

// Samples in panels: the products' where one holds them all or vectors are long, else those of blocks of 16
// rows, all of one width, so that nothing is worked out for each
constexpr int64_t kFlatLanes = kVector == 16 ? kLanes : kTall;
AF_INLINE bool flat_as_products(int64_t n) { return kVector == 16 || n <= kLanes; }
AF_INLINE Panel flat_panel(int64_t i, int64_t n) { return kVector == 16 ? panel(i, n) : tall_panel(i, n); }
AF_INLINE void flat_panels(const float* x, int64_t n, int64_t features, float* out, int threads) {
  flat_as_products(n) ? to_panels(x, n, features, out, threads) : tall_panels(x, n, features, out, threads);
}

// to[row][column] = the sums over all samples of dy * x at four columns and R rows from `row` on; V: vectors
// of samples where one panel holds them all, else 0; in vectors of 8 also where there are longer ones: what
// does not have to be folded is worth more than what is done at once
template <int R, int V>
AF_INLINE void flat_sample(const uint16_t* column, const float* dy, int64_t row, int64_t rows,
                           const float* panels, int64_t col, int64_t cols, int64_t n, float* to,
                           int64_t stride) {
  half sums[R][4];
  const auto add = [&](const float* x, const float* d, int64_t width, auto first) AF_LAMBDA {
    half xs[4];
    unroll<0, 4>([&](auto c) AF_LAMBDA {
      xs[c.value] = load_half(x + column[c.value] * width);
#if defined(__AVX2__) && !defined(__AVX512F__)
      asm("" : "+x"(xs[c.value]));  // held, not loaded for each row again
#endif
    });
    unroll<0, R>([&](auto r) AF_LAMBDA {
      const half ds = load_half(d + r.value * width);
      unroll<0, 4>([&](auto c) AF_LAMBDA {
        half& sum = sums[r.value][c.value];
        sum = first.value ? ds * xs[c.value] : fma(ds, xs[c.value], sum);
      });
    });
  };
  if constexpr (V > 0) {
    constexpr int width = V * kVector;
    unroll<0, width / kHalf>([&](auto i) AF_LAMBDA {
      constexpr int v = decltype(i)::value * kHalf;
      add(panels + col * width + v, dy + row * width + v, width, Int<v == 0>{});
    });
  } else {
    unroll<0, R * 4>([&](auto i) AF_LAMBDA { sums[i.value / 4][i.value % 4] = half{}; });
    for (int64_t i = 0; i < ceil_div(n, kFlatLanes); ++i) {
      const Panel p = flat_panel(i, n);
      const float *x = panels + p.begin * cols + col * p.width, *d = dy + p.begin * rows + row * p.width;
      if (p.count > kFlatLanes - kHalf)
        unroll<0, kFlatLanes / kHalf>(
            [&](auto v) AF_LAMBDA { add(x + v.value * kHalf, d + v.value * kHalf, kFlatLanes, Int<0>{}); });
      else
        for (int64_t v = 0; v < p.count; v += kHalf) add(x + v, d + v, p.width, Int<0>{});
    }
  }
  unroll<0, R>([&](auto r) AF_LAMBDA { sum_halves<4>(sums[r.value], true, to + r.value * stride); });
}

// The gradients of one list, a row of the block after the other, `stride` floats apart
template <int V>
void flat_gradients(const uint16_t* column, int64_t count, const float* dy, int64_t row, int64_t rows,
                    const float* panels, int64_t col, int64_t cols, int64_t n, float* to, int64_t stride) {
  for (int64_t j = 0; j < count; j += 4)
    for (int64_t r = 0; r < kFlat; r += kFlatRows)
      flat_sample<kFlatRows, V>(column + j, dy, row + r, rows, panels, col, cols, n, to + r * stride + j,
                                stride);
}
constexpr auto kFlatGradients = widths([](auto v) { return &flat_gradients<decltype(v)::value>; });

}  // namespace
}  // namespace autoflip
