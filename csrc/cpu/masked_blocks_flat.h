// Blocks of 4 rows: see masked_blocks.h. Samples are lanes; a column's activations serve four rows.
#pragma once
#include "cpu/masked_blocks.h"
#include "cpu/masked_matmul_product.h"

namespace autoflip {
namespace {

// sums[4 rows][V vectors] += the blocks of one list
template <int V>
AF_INLINE void flat_list(const uint16_t* column, int64_t count, const float* w, const float* x, float* at) {
  constexpr int S = kSets<V>;
  vec sums[S][kFlat][V];
  unroll<0, kFlat * V>([&](auto i) AF_LAMBDA {
    sums[0][i.value / V][i.value % V] = load(at + i.value * kVector);
    unroll<1, S>([&](auto s) AF_LAMBDA { sums[s.value][i.value / V][i.value % V] = vec{}; });
  });
  const auto add = [&](int64_t j, vec(&to)[kFlat][V]) AF_LAMBDA {
    const float* xk = x + column[j] * int64_t(V * kVector);
    vec xs[V];
    unroll<0, V>([&](auto v) AF_LAMBDA { xs[v.value] = load(xk + v.value * kVector); });
    unroll<0, kFlat>([&](auto r) AF_LAMBDA {
      const vec b = broadcast(w[j * kFlat + r.value]);
      unroll<0, V>([&](auto v)
                       AF_LAMBDA { to[r.value][v.value] = fma(b, xs[v.value], to[r.value][v.value]); });
    });
  };
  int64_t j = 0;
  for (; j + S <= count; j += S) unroll<0, S>([&](auto s) AF_LAMBDA { add(j + s.value, sums[s.value]); });
  if constexpr (S > 1)
    for (; j < count; ++j) add(j, sums[0]);
  unroll<0, kFlat * V>([&](auto i) AF_LAMBDA {
    constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
    vec sum = sums[0][r][v];
    if constexpr (S == 2) sum = sum + sums[1][r][v];
    if constexpr (S == 4) sum = (sum + sums[1][r][v]) + (sums[2][r][v] + sums[3][r][v]);
    store(at + i.value * kVector, sum);
  });
}

template <int V>
void flat_cell(const Lists& l, int64_t cell, int64_t blocks, const float* w, const float* x, float* sums) {
  const uint16_t *count = l.counts + cell * l.block, *column = l.columns + l.first[cell];
  for (int64_t g = 0; g < blocks; ++g, ++count, sums += kFlat * V * kVector) {
    if (*count) flat_list<V>(column, *count, w, x, sums);
    column += *count;
    w += *count * kFlat;
  }
}

// sums[column][V vectors] += weights * dy at the blocks of a cell; dy: the panel at the first row, `rows`
// long
template <int V>
void flat_scatter(const Lists& l, int64_t cell, int64_t rows, const float* w, const float* dy, float* sums) {
  const uint16_t *count = l.counts + cell * l.block, *column = l.columns + l.first[cell];
  for (int64_t row = 0; row < rows; row += kFlat, ++count) {
    vec d[kFlat][V];
    unroll<0, kFlat * V>([&](auto i) AF_LAMBDA {
      constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
      d[r][v] = row + r < rows ? load(dy + ((row + r) * V + v) * kVector) : vec{};
    });
    for (const uint16_t* end = column + *count; column != end; ++column, w += kFlat) {
      float* at = sums + *column * int64_t(V * kVector);
      vec sum[V];
      unroll<0, V>([&](auto v) AF_LAMBDA { sum[v.value] = load(at + v.value * kVector); });
      unroll<0, kFlat>([&](auto r) AF_LAMBDA {
        const vec b = broadcast(w[r.value]);
        unroll<0, V>([&](auto v) AF_LAMBDA { sum[v.value] = fma(b, d[r.value][v.value], sum[v.value]); });
      });
      unroll<0, V>([&](auto v) AF_LAMBDA { store(at + v.value * kVector, sum[v.value]); });
    }
  }
}

#if defined(__AVX512F__)
constexpr decltype(&flat_cell<1>) kFlatCell[] = {flat_cell<1>, flat_cell<2>, flat_cell<3>, flat_cell<4>};
constexpr decltype(&flat_scatter<1>) kFlatScatter[] = {flat_scatter<1>, flat_scatter<2>, flat_scatter<3>,
                                                       flat_scatter<4>};
#else
constexpr decltype(&flat_cell<1>) kFlatCell[] = {flat_cell<1>, flat_cell<2>};
constexpr decltype(&flat_scatter<1>) kFlatScatter[] = {flat_scatter<1>, flat_scatter<2>};
#endif

void flat_product(const Blocks& blocks, const float* values, const float* panels, int64_t n,
                  const float* bias, bool relu, float* y, int threads) {
  const Lists& l = blocks.lists;
  const int64_t many = ceil_div(l.rows, l.block), chunks = ceil_div(l.cols, l.chunk);
#pragma omp parallel for num_threads(threads) if (threads > 1 && many > 1)
  for (int64_t b = 0; b < many; ++b) {
    alignas(64) float sums[kRowBlock * kFlat * kLanes];
    const int64_t row = b * l.block * kFlat, rows = least(l.block * kFlat, blocks.rows - row);
    for (int64_t i = 0; i < ceil_div(n, kLanes); ++i) {
      const Panel p = panel(i, n);
      start_sums(bias, row, rows, p.width, sums);
      for (int64_t r = rows; r % kFlat; ++r) start_sums(nullptr, 0, 1, p.width, sums + r * p.width);
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t cell = b * chunks + c;
        kFlatCell[p.width / kVector - 1](l, cell, ceil_div(rows, kFlat),
                                         values + int64_t(l.first[cell]) * kFlat,
                                         panels + p.begin * l.cols + c * l.chunk * p.width, sums);
      }
      finish_sums(sums, p, rows, relu, y + p.begin * blocks.rows + row, blocks.rows);
    }
  }
}

void flat_back(const Blocks& blocks, const float* values, const float* panels, int64_t n, float* dx,
               int threads) {
  const Lists& l = blocks.lists;
  const int64_t many = ceil_div(l.rows, l.block), chunks = ceil_div(l.cols, l.chunk);
  for (int64_t i = 0; i < ceil_div(n, kLanes); ++i) {
    const Panel p = panel(i, n);
#pragma omp parallel for num_threads(threads) if (threads > 1 && chunks > 1)
    for (int64_t c = 0; c < chunks; ++c) {
      alignas(64) float sums[kMaxChunk * kLanes];
      const int64_t col = c * l.chunk, cols = least(l.chunk, l.cols - col);
      start_sums(nullptr, 0, cols, p.width, sums);
      for (int64_t b = 0; b < many; ++b) {
        const int64_t cell = b * chunks + c, row = b * l.block * kFlat;
        kFlatScatter[p.width / kVector - 1](l, cell, least(l.block * kFlat, blocks.rows - row),
                                            values + int64_t(l.first[cell]) * kFlat,
                                            panels + p.begin * blocks.rows + row * p.width, sums);
      }
      finish_sums(sums, p, cols, false, dx + p.begin * l.cols + col, l.cols);
    }
  }
}

#if defined(__AVX512F__)
constexpr int kFlatRows = 4;  // x 4 columns of sums
#else
constexpr int kFlatRows = 2;
#endif

// to[row][column] = the sums over all samples of dy * x at four columns and R rows from `row` on
template <int R>
AF_INLINE void flat_sample(const uint16_t* column, const float* dy, int64_t row, int64_t rows,
                           const float* panels, int64_t col, int64_t cols, int64_t n, float* to,
                           int64_t stride) {
#if defined(__AVX512F__)
  if (n <= kVector) {  // in halves: the first fold is a multiply-add
    __m256 low[4], high[4];
    unroll<0, 4>([&](auto c) AF_LAMBDA {
      const float* x = panels + (col + column[c.value]) * kVector;
      low[c.value] = _mm256_loadu_ps(x);
      high[c.value] = _mm256_loadu_ps(x + 8);
    });
    unroll<0, R>([&](auto r) AF_LAMBDA {
      const float* at = dy + (row + r.value) * kVector;
      const __m256 d = _mm256_loadu_ps(at), e = _mm256_loadu_ps(at + 8);
      __m256 half[4];
      unroll<0, 4>([&](auto c)
                       AF_LAMBDA { half[c.value] = _mm256_fmadd_ps(e, high[c.value], d * low[c.value]); });
      sum_halves<4>(half, true, to + r.value * stride);
    });
    return;
  }
#endif
  vec sums[R][4];
  unroll<0, R * 4>([&](auto i) AF_LAMBDA { sums[i.value / 4][i.value % 4] = vec{}; });
  for (int64_t i = 0; i < n; i += kLanes) {
    const Panel p = panel(i / kLanes, n);
    const float *x = panels + p.begin * cols + col * p.width, *d = dy + p.begin * rows + row * p.width;
    const float* at[4];
    unroll<0, 4>([&](auto c) AF_LAMBDA { at[c.value] = x + column[c.value] * p.width; });
    for (int64_t v = 0; v < p.width; v += kVector) {
      vec xs[4];
      unroll<0, 4>([&](auto c) AF_LAMBDA { xs[c.value] = load(at[c.value] + v); });
      unroll<0, R>([&](auto r) AF_LAMBDA {
        const vec ds = load(d + r.value * p.width + v);
        unroll<0, 4>(
            [&](auto c) AF_LAMBDA { sums[r.value][c.value] = fma(ds, xs[c.value], sums[r.value][c.value]); });
      });
    }
  }
  unroll<0, R>([&](auto r) AF_LAMBDA { sum_columns<4>(sums[r.value], true, to + r.value * stride); });
}

// The gradients of one list, a row of the block after the other, `stride` floats apart
void flat_gradients(const uint16_t* column, int64_t count, const float* dy, int64_t row, int64_t rows,
                    const float* panels, int64_t col, int64_t cols, int64_t n, float* to, int64_t stride) {
  for (int64_t j = 0; j < count; j += 4)
    for (int64_t r = 0; r < kFlat; r += kFlatRows)
      flat_sample<kFlatRows>(column + j, dy, row + r, rows, panels, col, cols, n, to + r * stride + j,
                             stride);
}

}  // namespace
}  // namespace autoflip
