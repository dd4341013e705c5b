// The products of masked_matmul.h for the instruction set that the including source is compiled for.
//
// Measured by bench/bench_masked_matmul.py and bench/bench_layers.py.
#pragma once
#include <cstddef>

#include "cpu/masked_matmul_transpose.h"

namespace autoflip {
namespace {

constexpr int64_t kRound = 4;  // panels that meet a cell of a large weight one after the other
constexpr int64_t kLarge = int64_t(1)
                           << 18;  // floats of a weight that leaves no room for panels in the cache

// The weight at a row and a column of a cell: at[row * rows + column * columns]. `ask`: it lies far away, and
// so many of its lines are wanted that the next rows are asked for ahead.
struct Weight {
  const float* at;
  int64_t rows, columns;
  bool ask;
};

// the columns that the orders of a cell name
AF_INLINE int64_t named(const Groups& g, int64_t cell) { return g.first[cell + 1] - g.first[cell]; }

AF_INLINE void ask_for(const float* at, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) __builtin_prefetch(at + j, 0, 3);
}

// Asks for a sixteenth of the rows after the group at `row`: all at once would have to wait for each other.
AF_INLINE void ask_for_next(const Weight& w, int piece, int64_t row, int64_t rows, int64_t cols) {
  const int64_t r = kGroup + piece % kGroup, quarter = cols / 64 * 16;
  if (!w.ask || row + r >= rows) return;
  ask_for(w.at + r * w.rows + piece / kGroup * quarter, piece / kGroup < 3 ? quarter : cols - 3 * quarter);
}

// `count` panels of x (n, features) row-major, each feature-major; of(i) is the i-th.
template <class Of>
void fill_panels(const float* x, int64_t count, int64_t features, float* out, int threads, const Of& of) {
  constexpr int64_t kBlock = 512;  // features of one task
  const int64_t blocks = ceil_div(features, kBlock);
  deal(count * blocks, threads, [&](int64_t t) AF_LAMBDA {
    const Panel p = of(t / blocks);
    const int64_t first = t % blocks * kBlock, cols = features - first < kBlock ? features - first : kBlock;
    transpose<true>(x + p.begin * features + first, features, p.count, cols,
                    out + p.begin * features + first * p.width, p.width);
  });
}

AF_INLINE int64_t padded(int64_t n) { return ceil_div(n, kVector) * kVector; }

void to_panels(const float* x, int64_t n, int64_t features, float* out, int threads, int64_t lanes = kLanes) {
  fill_panels(x, ceil_div(n, lanes), features, out, threads, [=](int64_t i) { return panel(i, n, lanes); });
}

constexpr int pattern_of(int slot) {
  return slot + 1 < kPatterns ? kPattern[slot] : 1 << (slot + 1 - kPatterns);
}

// a multiply-add takes 4 cycles and one or two can begin in each: short rows of lanes take turns between sets
// (1, 2 or 4 of them, which are added up in pairs)
template <int V>
constexpr int kSets = kVectors == 3 && V == 1 ? 2 : kVectors / V;

// sums += the columns of pattern P
template <int P, int V>
AF_INLINE void add_columns(const uint16_t*& column, int64_t count, const Weight& w, const float* x,
                           vec (&sums)[kSets<V>][kGroup][V]) {
  const uint16_t* end = column + count;
  const auto add = [&](int64_t k, vec(&to)[kGroup][V]) AF_LAMBDA {
    const float *xk = x + k * (V * kVector), *wk = w.at + k * w.columns;
    vec xs[V];
    unroll<0, V>([&](auto v) AF_LAMBDA { xs[v.value] = load(xk + v.value * kVector); });
    unroll<0, popcount(P)>([&](auto i) AF_LAMBDA {
      constexpr int r = row_of(P, decltype(i)::value);
      const vec b = broadcast(wk[r * w.rows]);
      unroll<0, V>([&](auto v) AF_LAMBDA { to[r][v.value] = fma(b, xs[v.value], to[r][v.value]); });
    });
  };
  if constexpr (kSets<V> > 1)
    for (; end - column >= kSets<V>; column += kSets<V>)
      unroll<0, kSets<V>>([&](auto s) AF_LAMBDA { add(column[s.value], sums[s.value]); });
  for (; column != end; ++column) add(*column, sums[0]);
}

// sums[row][V vectors] += the groups of a cell
template <int V>
void add_cell(const Groups& g, int64_t cell, int64_t rows, int64_t cols, Weight w, const float* x,
              float* at) {
  const uint16_t* count = g.counts + cell * (g.block / kGroup) * kSlots;
  const uint16_t* column = g.columns + g.first[cell];
  for (int64_t row = 0; row < rows;
       row += kGroup, count += kSlots, at += kGroup * V * kVector, w.at += kGroup * w.rows) {
    if (!count[kSlots - 1]) continue;
    vec sums[kSets<V>][kGroup][V];
    unroll<0, kGroup * V>([&](auto i) AF_LAMBDA {
      constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
      sums[0][r][v] = load(at + i.value * kVector);
      unroll<1, kSets<V>>([&](auto s) AF_LAMBDA { sums[s.value][r][v] = vec{}; });
    });
    if (count[kSlots - 1] > 1)
      unroll<0, kPatterns - 1>([&](auto slot) AF_LAMBDA {
        ask_for_next(w, slot.value, row, rows, cols);
        add_columns<pattern_of(slot.value), V>(column, count[slot.value], w, x, sums);
      });
    unroll<kPatterns - 1, kSlots - 1>([&](auto slot) AF_LAMBDA {
      constexpr int piece = slot.value + 1;
      ask_for_next(w, piece, row, rows, cols);
      if (count[kSlots - 1] == 1)
        unroll<1, 4>([&](auto i) AF_LAMBDA { ask_for_next(w, piece - kGroup * i.value, row, rows, cols); });
      add_columns<pattern_of(slot.value), V>(column, count[slot.value], w, x, sums);
    });
    unroll<0, kGroup * V>([&](auto i) AF_LAMBDA {
      constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
      vec sum = sums[0][r][v];
      if constexpr (kSets<V> == 2) sum = sum + sums[1][r][v];
      if constexpr (kSets<V> == 4) sum = (sum + sums[1][r][v]) + (sums[2][r][v] + sums[3][r][v]);
      store(at + i.value * kVector, sum);
    });
  }
}

// sums[column][V vectors] += the columns of pattern P, whose rows have these dy
template <int P, int V>
AF_INLINE void scatter_columns(const uint16_t*& column, int64_t count, const Weight& w,
                               const vec (&dy)[kGroup][V], float* sums) {
  const uint16_t* end = column + count;
  for (; column != end; ++column) {
    float* at = sums + *column * int64_t(V * kVector);
    const float* wk = w.at + *column;
    vec sum[V];
    unroll<0, V>([&](auto v) AF_LAMBDA { sum[v.value] = load(at + v.value * kVector); });
    unroll<0, popcount(P)>([&](auto i) AF_LAMBDA {
      constexpr int r = row_of(P, decltype(i)::value);
      const vec b = broadcast(wk[r * w.rows]);
      unroll<0, V>([&](auto v) AF_LAMBDA { sum[v.value] = fma(b, dy[r][v.value], sum[v.value]); });
    });
    unroll<0, V>([&](auto v) AF_LAMBDA { store(at + v.value * kVector, sum[v.value]); });
  }
}

// dy: the panel at the first row of the block; its rows past the last one are read, and count for nothing
template <int V>
void scatter_cell(const Groups& g, int64_t cell, int64_t rows, int64_t cols, Weight w, const float* dy,
                  float* sums) {
  const uint16_t* count = g.counts + cell * (g.block / kGroup) * kSlots;
  const uint16_t* column = g.columns + g.first[cell];
  for (int64_t row = 0; row < rows; row += kGroup, count += kSlots, w.at += kGroup * w.rows) {
    if (!count[kSlots - 1]) continue;
    vec d[kGroup][V];
    unroll<0, kGroup * V>([&](auto i) AF_LAMBDA {
      constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
      d[r][v] = row + r < rows ? load(dy + ((row + r) * V + v) * kVector) : vec{};
    });
    if (count[kSlots - 1] > 1)
      unroll<0, kPatterns - 1>([&](auto slot) AF_LAMBDA {
        ask_for_next(w, slot.value, row, rows, cols);
        scatter_columns<pattern_of(slot.value), V>(column, count[slot.value], w, d, sums);
      });
    unroll<kPatterns - 1, kSlots - 1>([&](auto slot) AF_LAMBDA {
      constexpr int piece = slot.value + 1;
      ask_for_next(w, piece, row, rows, cols);
      if (count[kSlots - 1] == 1)
        unroll<1, 4>([&](auto i) AF_LAMBDA { ask_for_next(w, piece - kGroup * i.value, row, rows, cols); });
      scatter_columns<pattern_of(slot.value), V>(column, count[slot.value], w, d, sums);
    });
  }
}

constexpr auto kAddCell = widths([](auto v) { return &add_cell<decltype(v)::value>; });
constexpr auto kScatterCell = widths([](auto v) { return &scatter_cell<decltype(v)::value>; });

constexpr int64_t kPastCache = int64_t(1) << 22;  // floats: 16 MB

AF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

AF_INLINE void start_sums(const float* bias, int64_t row, int64_t rows, int64_t width, float* sums) {
  // five times as fast where they do not fit the first-level cache (Zen 4)
  if (!bias) return void(__builtin_memset(sums, 0, std::size_t(rows * width) * sizeof(float)));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t v = 0; v < width; v += kVector) store(sums + r * width + v, broadcast(bias[row + r]));
}

AF_INLINE void finish_sums(float* sums, Panel p, int64_t rows, bool relu, float* out, int64_t stride) {
  if (relu)
    for (int64_t j = 0; j < rows * p.width; ++j) sums[j] = sums[j] < 0 ? 0 : sums[j];  // NaN stays NaN
  transpose<false>(sums, p.width, rows, p.count, out, stride);
}

// Whether enough of a cell's weights is used, by `uses` panels, to fetch or copy them all.
AF_INLINE bool busy(const Groups& g, int64_t cell, int64_t rows, int64_t cols, int64_t uses) {
  return named(g, cell) * uses * (g.rows * g.cols >= kPastCache ? 40 : 12) > rows * cols;
}

// The weights of a cell, whose columns are rows of the weight, copied to rows of an odd number of cache
// lines: where they stand a large power of two apart they would fight for the same few lines of the cache.
AF_INLINE Weight near(Weight w, int64_t rows, int64_t cols, float* tile) {
  constexpr int64_t kStride = kRowBlock + 16, kAhead = 6;
  for (int64_t c = 0; c < cols && c < kAhead; ++c) ask_for(w.at + c * w.columns, rows);
  for (int64_t c = 0; c < cols; ++c) {
    if (c + kAhead < cols) ask_for(w.at + (c + kAhead) * w.columns, rows);
    __builtin_memcpy(tile + c * kStride, w.at + c * w.columns, std::size_t(rows) * sizeof(float));
  }
  return {tile, 1, kStride, false};
}

// out (n, g.rows) row-major = act(in @ weight.T + bias) for the `n` samples of panels[feature][lane]
void product(const Groups& g, Weight w, const float* panels, int64_t n, const float* bias, bool relu,
             float* out, int threads) {
  const int64_t blocks = ceil_div(g.rows, g.block), chunks = ceil_div(g.cols, g.chunk);
  const int64_t count = ceil_div(n, kLanes), round = g.rows * g.cols > kLarge ? kRound : 1;
  deal(ceil_div(count, round) * blocks, threads, [&](int64_t t) AF_LAMBDA {
    alignas(64) float sums[kRound][(kRowBlock + kGroup) * kLanes];
    alignas(64) float tile[(kRowBlock + 16) * kMaxChunk];
    const int64_t first = t / blocks * round, end = count - first < round ? count : first + round,
                  b = t % blocks;
    const int64_t row = b * g.block, rows = g.rows - row < g.block ? g.rows - row : g.block;
    for (int64_t i = first; i < end; ++i) start_sums(bias, row, rows, panel(i, n).width, sums[i - first]);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t col = c * g.chunk, cols = g.cols - col < g.chunk ? g.cols - col : g.chunk;
      Weight here = {w.at + row * w.rows + col * w.columns, w.rows, w.columns, false};
      const bool many = busy(g, b * chunks + c, rows, cols, end - first);
      if (w.rows == 1 && w.columns % 64 == 0 && many) here = near(here, rows, cols, tile);
      here.ask = w.columns == 1 && many && round > 1;
      for (int64_t i = first; i < end; ++i) {
        const Panel p = panel(i, n);
        kAddCell.of(p.width / kVector)(g, b * chunks + c, rows, cols, here,
                                       panels + p.begin * g.cols + col * p.width, sums[i - first]);
        here.ask = false;
      }
    }
    for (int64_t i = first; i < end; ++i) {
      const Panel p = panel(i, n);
      finish_sums(sums[i - first], p, rows, relu, out + p.begin * g.rows + row, g.rows);
    }
  });
}

// dx of all panels by way of the groups of the forward product: few lanes are added up in memory
void product_back(const Groups& g, const float* w, const float* panels, int64_t n, float* dx, int threads) {
  const int64_t blocks = ceil_div(g.rows, g.block), chunks = ceil_div(g.cols, g.chunk);
  deal(ceil_div(n, kLanes) * chunks, threads, [&](int64_t t) AF_LAMBDA {
    alignas(64) float sums[kMaxChunk * kLanes];
    const Panel p = panel(t / chunks, n);
    const int64_t c = t % chunks;
    const int64_t col = c * g.chunk, cols = g.cols - col < g.chunk ? g.cols - col : g.chunk;
    start_sums(nullptr, 0, cols, p.width, sums);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = b * g.block, rows = g.rows - row < g.block ? g.rows - row : g.block;
      const bool ask = g.rows * g.cols > kLarge && busy(g, b * chunks + c, rows, cols, 1);
      kScatterCell.of(p.width / kVector)(g, b * chunks + c, rows, cols,
                                         {w + row * g.cols + col, g.cols, 1, ask},
                                         panels + p.begin * g.rows + row * p.width, sums);
    }
    finish_sums(sums, p, cols, false, dx + p.begin * g.cols + col, g.cols);
  });
}

}  // namespace
}  // namespace autoflip
