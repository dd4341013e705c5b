// Blocks of 16 rows: see masked_blocks.h. A block times one sample is one multiply-add of 16 lanes.
#pragma once
#include "cpu/masked_blocks.h"
#include "cpu/masked_matmul_product.h"

namespace autoflip {
namespace {

constexpr int kParts = kTall / kVector;  // vectors of a block
#if defined(__AVX512F__)
constexpr int kSamples = 16, kTallRows = 16, kTallColumns = 8;
#elif defined(__AVX2__)
constexpr int kSamples = 4, kTallRows = 8, kTallColumns = 4;
#else
constexpr int kSamples = 2, kTallRows = 4, kTallColumns = 4;
#endif

// Activations in panels of 16 samples: wider ones would put a column's lines where they fight for the same
// few places of the first-level cache.
AF_INLINE Panel tall_panel(int64_t i, int64_t n) { return {i * kTall, least(kTall, n - i * kTall), kTall}; }
AF_INLINE int64_t tall_padded(int64_t n) { return ceil_div(n, kTall) * kTall; }
void tall_panels(const float* x, int64_t n, int64_t features, float* out, int threads) {
  for (int64_t i = 0; i < ceil_div(n, kTall); ++i) {
    const Panel p = tall_panel(i, n);
    to_panel(x, p, features, out + p.begin * features, threads);
  }
}

// y (kSamples rows, `stride` apart) += the blocks of one list; `live`: of the block's rows, `count` of the
// samples. first: y begins as bias (or zero); last: relu if asked
struct Tall {
  const uint16_t *column, *end;
  const float *values, *x;
};
AF_INLINE void tall_add(Tall t, vec (&sums)[kSamples][kParts]) {
  for (; t.column != t.end; ++t.column, t.values += kTall) {
    const float* xk = t.x + *t.column * int64_t(kTall);
    vec w[kParts];
    unroll<0, kParts>([&](auto p) AF_LAMBDA { w[p.value] = load(t.values + p.value * kVector); });
    unroll<0, kSamples>([&](auto i) AF_LAMBDA {
      const vec b = broadcast(xk[i.value]);
      unroll<0, kParts>(
          [&](auto p) AF_LAMBDA { sums[i.value][p.value] = fma(b, w[p.value], sums[i.value][p.value]); });
    });
  }
}

void tall_list(const Tall& t, const float* bias, bool first, bool relu, float* y, int64_t stride,
               int64_t count, int64_t live) {
  alignas(64) float edge[kTall];
  vec sums[kSamples][kParts], start[kParts];
  unroll<0, kParts>([&](auto p) AF_LAMBDA { start[p.value] = vec{}; });
  if (first && bias) {
    for (int64_t r = 0; r < kTall; ++r) edge[r] = r < live ? bias[r] : 0;
    unroll<0, kParts>([&](auto p) AF_LAMBDA { start[p.value] = load(edge + p.value * kVector); });
  }
  const bool whole = live >= kTall;
  unroll<0, kSamples>([&](auto i) AF_LAMBDA {
    const float* from = y + i.value * stride;
    if (!first && i.value < count && !whole) {
      __builtin_memcpy(edge, from, std::size_t(live) * sizeof(float));
      from = edge;
    }
    unroll<0, kParts>([&](auto p) AF_LAMBDA {
      sums[i.value][p.value] = first || i.value >= count ? start[p.value] : load(from + p.value * kVector);
    });
  });
  tall_add(t, sums);
  unroll<0, kSamples>([&](auto i) AF_LAMBDA {
    if (i.value >= count) return;
    float *to = y + i.value * stride, *at = whole && !relu ? to : edge;
    unroll<0, kParts>([&](auto p) AF_LAMBDA { store(at + p.value * kVector, sums[i.value][p.value]); });
    if (relu)
      for (int64_t r = 0; r < kTall; ++r) edge[r] = edge[r] < 0 ? 0 : edge[r];  // NaN stays NaN
    if (at == edge) __builtin_memcpy(to, edge, std::size_t(whole ? kTall : live) * sizeof(float));
  });
}

// y (n, rows) row-major = act(x @ weight.T + bias) for the samples of `panels`
void tall_product(const Blocks& blocks, const float* values, const float* panels, int64_t n,
                  const float* bias, bool relu, float* y, int threads) {
  const Lists& l = blocks.lists;
  const int64_t many = ceil_div(l.rows, l.block), chunks = ceil_div(l.cols, l.chunk);
  const int64_t passes = ceil_div(n, kSamples);
  const auto work = [&](int64_t b, int64_t pass, int64_t end) {
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t t = pass; t < end; ++t) {
        const int64_t cell = b * chunks + c, sample = t * kSamples;
        const float* x = panels + sample / kTall * kTall * l.cols + c * l.chunk * kTall + sample % kTall;
        const uint16_t *count = l.counts + cell * l.block, *column = l.columns + l.first[cell];
        const float* v = values + int64_t(l.first[cell]) * kTall;
        for (int64_t g = b * l.block; g < least(l.rows, (b + 1) * l.block); ++g, ++count) {
          const int64_t row = g * kTall;
          if (*count || !c || (relu && c + 1 == chunks))
            tall_list({column, column + *count, v, x}, bias ? bias + row : nullptr, c == 0,
                      relu && c + 1 == chunks, y + sample * blocks.rows + row, blocks.rows, n - sample,
                      blocks.rows - row);
          column += *count;
          v += *count * kTall;
        }
      }
  };
  if (many == 1 && threads > 1) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < passes; ++t) work(0, t, t + 1);
  } else {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < many; ++b) work(b, 0, passes);
  }
}

// sums[column][vector v] += weights * dy[row] at one list: R of the block's rows, C columns at once
template <int R, int C>
AF_INLINE void tall_scatter(const uint16_t* column, const float* values, const vec (&dy)[R], float* sums) {
  vec sum[C];
  unroll<0, C>([&](auto c) AF_LAMBDA { sum[c.value] = load(sums + column[c.value] * int64_t(kTall)); });
  unroll<0, R>([&](auto r) AF_LAMBDA {
    unroll<0, C>([&](auto c) AF_LAMBDA {
      sum[c.value] = fma(broadcast(values[c.value * kTall + r.value]), dy[r.value], sum[c.value]);
    });
  });
  unroll<0, C>([&](auto c) AF_LAMBDA { store(sums + column[c.value] * int64_t(kTall), sum[c.value]); });
}

void tall_back(const Blocks& blocks, const float* values, const float* panels, int64_t n, float* dx,
               int threads) {
  const Lists& l = blocks.lists;
  const int64_t many = ceil_div(l.rows, l.block), chunks = ceil_div(l.cols, l.chunk);
#pragma omp parallel for num_threads(threads) if (threads > 1 && chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    alignas(64) float sums[kMaxChunk * kTall];
    const int64_t col = c * l.chunk, cols = least(l.chunk, l.cols - col);
    for (int64_t i = 0; i < ceil_div(n, kTall); ++i) {
      const Panel p = tall_panel(i, n);
      const float* dy = panels + p.begin * blocks.rows;
      start_sums(nullptr, 0, cols, kTall, sums);
      for (int64_t b = 0; b < many; ++b) {
        const int64_t cell = b * chunks + c;
        const uint16_t *count = l.counts + cell * l.block, *column = l.columns + l.first[cell];
        const float* w = values + int64_t(l.first[cell]) * kTall;
        for (int64_t g = b * l.block; g < least(l.rows, (b + 1) * l.block); ++g, ++count) {
          if (!*count) continue;
          for (int64_t r = 0; r < kTall; r += kTallRows)
            for (int64_t v = 0; v < kTall; v += kVector) {
              vec d[kTallRows];
              unroll<0, kTallRows>([&](auto i) AF_LAMBDA {
                const int64_t row = g * kTall + r + i.value;
                d[i.value] = row < blocks.rows ? load(dy + row * kTall + v) : vec{};
              });
              int64_t j = 0;
              for (; j + 4 <= *count; j += 4)
                tall_scatter<kTallRows, 4>(column + j, w + j * kTall + r, d, sums + v);
              for (; j < *count; ++j) tall_scatter<kTallRows, 1>(column + j, w + j * kTall + r, d, sums + v);
            }
          column += *count;
          w += *count * kTall;
        }
      }
      finish_sums(sums, p, cols, false, dx + p.begin * l.cols + col, l.cols);
    }
  }
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

}  // namespace
}  // namespace autoflip
