// The products of masked_matmul.h for the instruction set that the including source is compiled for.
//
// Measured by bench/bench_masked_matmul.py and bench/bench_layers.py.
#pragma once
#include "cpu/masked_matmul_runs.h"

namespace autoflip {
namespace {

// One panel of x (n, features) row-major, feature-major.
void to_panel(const float* x, Panel p, int64_t features, float* out, int threads) {
  constexpr int64_t kBlock = 512;  // features of one task
  const int64_t tasks = ceil_div(features, kBlock);
#pragma omp parallel for num_threads(threads) if (threads > 1 && tasks > 1)
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t first = t * kBlock, cols = features - first < kBlock ? features - first : kBlock;
    transpose<true>(x + p.begin * features + first, features, p.count, cols, out + first * p.width, p.width);
  }
}

void pack(Layout layout, const float* w, float* values, int threads) {
  const int64_t chunks = ceil_div(layout.cols, layout.chunk),
                cells = ceil_div(layout.rows, layout.block) * chunks;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < cells; ++t) {
    const float* corner = w + t / chunks * layout.block * layout.cols + t % chunks * layout.chunk;
    float* value = values + layout.table[t * kTable + 1];
    each_pattern(layout, t, values, [&](auto pattern, Runs& runs) AF_LAMBDA {
      constexpr int P = decltype(pattern)::value;
      for (; runs.run != runs.end; ++runs.run) {
        const int64_t row = *runs.run & 0xffff, count = *runs.run >> 16;
        unroll<0, popcount(P)>([&](auto r) AF_LAMBDA {
          const float* from = corner + (row + row_of(P, decltype(r)::value)) * layout.cols;
          for (int64_t j = 0; j < count; ++j) value[j] = from[runs.column[j]];
          value += count;
        });
        runs.column += count;
      }
    });
  }
}

// sums[column][V vectors] += the runs of pattern P
template <int P, int V>
AF_INLINE void scatter_runs(Runs& runs, const float* dy, float* sums_at) {
  constexpr int kRows = popcount(P);
  for (; runs.run != runs.end; ++runs.run) {
    const int64_t row = *runs.run & 0xffff, count = *runs.run >> 16;
    const uint16_t *column = runs.column, *end = column + count;
    const float* w = runs.value;
    vec d[kRows][V];
    unroll<0, kRows * V>([&](auto i) AF_LAMBDA {
      constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
      d[r][v] = load(dy + ((row + row_of(P, r)) * V + v) * kVector);
    });
    for (; column != end; ++column, ++w) {
      float* at = sums_at + *column * int64_t(V * kVector);
      vec sum[V];
      unroll<0, V>([&](auto v) AF_LAMBDA { sum[v.value] = load(at + v.value * kVector); });
      unroll<0, kRows>([&](auto r) AF_LAMBDA {
        const vec b = broadcast(w[r.value * count]);
        unroll<0, V>([&](auto v) AF_LAMBDA { sum[v.value] = fma(b, d[r.value][v.value], sum[v.value]); });
      });
      unroll<0, V>([&](auto v) AF_LAMBDA { store(at + v.value * kVector, sum[v.value]); });
    }
    runs.column = end;
    runs.value += kRows * count;
  }
}

template <int V>
void scatter_cell(const Layout& layout, int64_t cell, const float* values, const float* dy, float* sums) {
  each_pattern(layout, cell, values,
               [&](auto p, Runs& runs) AF_LAMBDA { scatter_runs<p.value, V>(runs, dy, sums); });
}

#if defined(__AVX512F__)
constexpr decltype(&add_cell<1>) kAddCell[] = {add_cell<1>, add_cell<2>, add_cell<3>, add_cell<4>};
constexpr decltype(&scatter_cell<1>) kScatterCell[] = {scatter_cell<1>, scatter_cell<2>, scatter_cell<3>,
                                                       scatter_cell<4>};
#else
constexpr decltype(&add_cell<1>) kAddCell[] = {add_cell<1>, add_cell<2>};
constexpr decltype(&scatter_cell<1>) kScatterCell[] = {scatter_cell<1>, scatter_cell<2>};
#endif

AF_INLINE int64_t padded(int64_t n) { return ceil_div(n, kVector) * kVector; }

int64_t panel_scratch(int64_t n, int64_t features) { return panel(0, n).width * features; }
int64_t panels_scratch(int64_t n, int64_t features) { return padded(n) * features; }

void multiply(Layout layout, const float* values, const float* x, int64_t n, const float* bias, bool relu,
              float* y, float* scratch, int threads) {
  const int64_t blocks = ceil_div(layout.rows, layout.block), chunks = ceil_div(layout.cols, layout.chunk);
  for (int64_t i = 0; i < ceil_div(n, kLanes); ++i) {
    const Panel p = panel(i, n);
    to_panel(x, p, layout.cols, scratch, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1 && blocks > 1)
    for (int64_t b = 0; b < blocks; ++b) {
      alignas(64) float sums[(kRowBlock + kGroup) * kLanes];
      const int64_t row = b * layout.block;
      const int64_t rows = layout.rows - row < layout.block ? layout.rows - row : layout.block;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t v = 0; v < p.width; v += kVector)
          store(sums + r * p.width + v, broadcast(bias ? bias[row + r] : 0.0f));
      for (int64_t c = 0; c < chunks; ++c)
        kAddCell[p.width / kVector - 1](layout, b * chunks + c, values, scratch + c * layout.chunk * p.width,
                                        sums);
      if (relu)
        for (int64_t j = 0; j < rows * p.width; ++j) sums[j] = sums[j] < 0 ? 0 : sums[j];  // NaN stays NaN
      transpose<false>(sums, p.width, rows, p.count, y + p.begin * layout.rows + row, layout.rows);
    }
  }
}

// dx of one panel
void multiply_back(const Layout& layout, const float* values, const float* dy, Panel p, float* dx,
                   int threads) {
  const int64_t blocks = ceil_div(layout.rows, layout.block), chunks = ceil_div(layout.cols, layout.chunk);
#pragma omp parallel for num_threads(threads) if (threads > 1 && chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    alignas(64) float sums[kMaxChunk * kLanes];
    const int64_t col = c * layout.chunk;
    const int64_t cols = layout.cols - col < layout.chunk ? layout.cols - col : layout.chunk;
    for (int64_t j = 0; j < cols * p.width; j += kVector) store(sums + j, vec{});
    for (int64_t b = 0; b < blocks; ++b)
      kScatterCell[p.width / kVector - 1](layout, b * chunks + c, values, dy + b * layout.block * p.width,
                                          sums);
    transpose<false>(sums, p.width, cols, p.count, dx + p.begin * layout.cols + col, layout.cols);
  }
}

}  // namespace
}  // namespace autoflip
