// The products with every multiply-add computed: tiles of the weight are copied into the first-level cache,
// through the mask, and meet all samples there. A product takes as long at any density, and no weight has to
// be looked through for what stands at its pruned entries.
#pragma once
#include "cpu/masked_matmul_outer.h"

namespace autoflip {
namespace {

#if defined(__AVX512F__)

// rows and columns of a tile, 32 KB: forward sums along columns, dx along rows
constexpr int64_t kTileHigh = 64, kTileWide = 128;
constexpr int64_t kBackHigh = 128, kBackWide = 64;

AF_INLINE int64_t whole(int64_t n) { return ceil_div(n, 16) * 16; }  // what tiles are filled up to

// tile (rows, Wide) = the weights whose bits are set, zeros elsewhere, up to whole vectors. Asks for
// nothing ahead: rows are read as the CPU expects them, and prefetching took 3 to 10 % longer (Emerald
// Rapids).
template <int64_t Wide>
AF_INLINE void fill_tile(const float* w, int64_t stride, const uint16_t* bits, int64_t rows, int64_t cols,
                         float* tile) {
  const int64_t words = words_of(stride);
  for (int64_t r = 0; r < rows; ++r, w += stride, bits += words, tile += Wide) {
    for (int64_t k = 0; k < cols; k += kVector)  // no bit stands past a row's end, nothing is read there
      store(tile + k, _mm512_maskz_loadu_ps(__mmask16(bits[k / 16]), w + k));
  }
}

// sums[j][V vectors] += the sum over i < count of tile[j][i] * in[i][V vectors], j < R
template <int R, int V>
AF_INLINE void add_products(const float* tile, int64_t count, const float* in, float* sums) {
  vec sum[R][V];
  unroll<0, R * V>([&](auto i) AF_LAMBDA { sum[i.value / V][i.value % V] = vec{}; });
  for (int64_t i = 0; i < count; ++i, in += V * kVector, ++tile) {
    vec xs[V];
    unroll<0, V>([&](auto v) AF_LAMBDA { xs[v.value] = load(in + v.value * kVector); });
    unroll<0, R>([&](auto r) AF_LAMBDA {
      const vec b = broadcast(tile[r.value * kTileWide]);
      unroll<0, V>([&](auto v)
                       AF_LAMBDA { sum[r.value][v.value] = fma(b, xs[v.value], sum[r.value][v.value]); });
    });
  }
  // added at the end, not begun with: a tile's terms are rounded among themselves
  unroll<0, R * V>([&](auto i) AF_LAMBDA {
    store(sums + i.value * kVector, load(sums + i.value * kVector) + sum[i.value / V][i.value % V]);
  });
}

// rows of a tile whose sums lie in registers: a load for each multiply-add at most, 16 of them open
constexpr int open(int V) { return V == 1 ? 16 : V == 4 ? 4 : 8; }

// sums[row] += tile @ x
template <int V>
void meet_rows(const float* tile, int64_t rows, int64_t cols, const float* x, float* sums) {
  for (int64_t r = 0; r < rows; r += open(V))
    add_products<open(V), V>(tile + r * kTileWide, cols, x, sums + r * V * kVector);
}
constexpr auto kMeetRows = widths([](auto v) { return &meet_rows<decltype(v)::value>; });

// Weights of a strip of columns, one row after the other: a tile's, or those of the weight itself.
struct OfTile {
  const float* at;
  AF_INLINE vec take(int64_t v) const { return load(at + v * kVector); }
  AF_INLINE void next() { at += kBackWide; }
};
// Those of the weight, which become a tile on their way: multiply-adds hide what that takes.
struct ToTile {
  const float* at;
  const uint16_t* bits;
  int64_t cols, words;
  float* tile;
  AF_INLINE vec take(int64_t v) const {
    const vec kept = _mm512_maskz_loadu_ps(__mmask16(bits[v]), at + v * kVector);
    store(tile + v * kVector, kept);
    return kept;
  }
  AF_INLINE void next() {
    at += cols;
    bits += words;
    tile += kBackWide;
  }
};
struct OfWeight {
  const float* at;
  const uint16_t* bits;
  int64_t cols, words;
  AF_INLINE vec take(int64_t v) const { return _mm512_maskz_loadu_ps(__mmask16(bits[v]), at + v * kVector); }
  AF_INLINE void next() {
    at += cols;
    bits += words;
  }
};

// dx[sample] (+)= dy[sample] @ weights: V vectors of columns of S samples; `live`: columns that are there
template <int S, int V, class Weights>
AF_INLINE void meet_columns(Weights weights, int64_t rows, const float* dy, int64_t dy_stride, bool first,
                            int64_t live, float* dx, int64_t dx_stride) {
  vec sum[S][V];
  unroll<0, S * V>([&](auto i) AF_LAMBDA { sum[i.value / V][i.value % V] = vec{}; });
  for (int64_t r = 0; r < rows; ++r, weights.next()) {
    vec ws[V];
    unroll<0, V>([&](auto v) AF_LAMBDA { ws[v.value] = weights.take(v.value); });
    unroll<0, S>([&](auto s) AF_LAMBDA {
      const vec d = broadcast(dy[s.value * dy_stride + r]);
      unroll<0, V>([&](auto v)
                       AF_LAMBDA { sum[s.value][v.value] = fma(d, ws[v.value], sum[s.value][v.value]); });
    });
  }
  if (live >= V * kVector)  // whole vectors, without a question for each
    return unroll<0, S * V>([&](auto i) AF_LAMBDA {
      constexpr int s = decltype(i)::value / V, v = decltype(i)::value % V;
      float* to = dx + s * dx_stride + v * kVector;
      store(to, first ? sum[s][v] : load(to) + sum[s][v]);
    });
  unroll<0, S * V>([&](auto i) AF_LAMBDA {
    constexpr int s = decltype(i)::value / V, v = decltype(i)::value % V;
    float* to = dx + s * dx_stride + v * kVector;
    const int64_t left = live - v * kVector;
    if (left <= 0) return;
    const __mmask16 some = left >= kVector ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
    _mm512_mask_storeu_ps(to, some, first ? sum[s][v] : _mm512_maskz_loadu_ps(some, to) + sum[s][v]);
  });
}

constexpr int kAbreast = 6;  // samples whose sums of a tile's columns lie in registers

// V vectors of columns of dx of all samples; the first ones fill the tile for those behind them
template <int V>
void meet_samples(const ToTile& weights, int64_t rows, int64_t cols, const float* dy, int64_t n,
                  int64_t dy_stride, bool first, float* dx, int64_t dx_stride) {
  int64_t i = 0;
  const auto some = [&](auto count) AF_LAMBDA {
    const float* from = dy + i * dy_stride;
    float* to = dx + i * dx_stride;
    if (i == 0)
      meet_columns<count.value, V>(weights, rows, from, dy_stride, first, cols, to, dx_stride);
    else
      meet_columns<count.value, V>(OfTile{weights.tile}, rows, from, dy_stride, first, cols, to, dx_stride);
    i += count.value;
  };
  while (n - i >= kAbreast + 4 || n - i == kAbreast) some(Int<kAbreast>{});
  if (n - i > kAbreast) some(Int<5>{});  // 7 to 9: not one by itself
  unroll<1, kAbreast>([&](auto left) AF_LAMBDA {
    if (n - i == left.value) some(left);
  });
}
constexpr auto kMeetSamples =
    widths<kBackWide / kVector>([](auto v) { return &meet_samples<decltype(v)::value>; });

constexpr int64_t kStripHigh = 1024;  // rows whose terms are rounded among themselves

// dx of N samples from the weight as it stands
template <int N>
void meet_strips(const float* w, const uint16_t* bits, const float* dy, int64_t rows, int64_t cols, float* dx,
                 int threads) {
  constexpr int V = N <= kAbreast ? 4 : 3;
  deal(ceil_div(cols, V * kVector), threads, [&](int64_t t) AF_LAMBDA {
    const int64_t col = t * V * kVector, live = cols - col;
    const auto strip = [&](auto vectors) AF_LAMBDA {
      for (int64_t row = 0; row < rows; row += kStripHigh) {
        const OfWeight weights = {w + row * cols + col, bits + row * words_of(cols) + col / 16, cols,
                                  words_of(cols)};
        meet_columns<N, vectors.value>(weights, least(kStripHigh, rows - row), dy + row, rows, row == 0, live,
                                       dx + col, cols);
      }
    };
    if (live > (V - 1) * kVector) return strip(Int<V>{});
    unroll<1, V>([&](auto vectors) AF_LAMBDA {
      if (ceil_div(live, kVector) == vectors.value) strip(vectors);
    });
  });
}
constexpr int64_t kStrips = 8;
constexpr auto kMeetStrips = widths<kStrips>([](auto n) { return &meet_strips<decltype(n)::value>; });

int64_t every_scratch(int64_t n, int64_t rows, int64_t cols) {
  return padded(n) * (whole(rows) + whole(cols));
}

constexpr int64_t kOver = 6;  // samples over whole vectors that would take longer as a vector of their own

// sums[row] += tile @ x of one sample, whose columns are the lanes; rows in sixteens
AF_INLINE void meet_sample(const float* tile, int64_t rows, int64_t cols, const float* x, float* sums) {
  for (int64_t r = 0; r < rows; r += 16, tile += 16 * kTileWide) {
    vec sum[16];
    alignas(64) float found[16];
    unroll<0, 16>([&](auto j) AF_LAMBDA { sum[j.value] = vec{}; });
    for (int64_t k = 0; k < cols; k += kVector) {
      const __mmask16 some = cols - k >= kVector ? __mmask16(0xffff) : __mmask16((1u << (cols - k)) - 1);
      const vec xs = _mm512_maskz_loadu_ps(some, x + k);
      unroll<0, 16>([&](auto j) AF_LAMBDA {
        sum[j.value] = fma(load(tile + j.value * kTileWide + k), xs, sum[j.value]);
      });
    }
    sum_lanes16(sum, found);
    store(sums + r, load(sums + r) + load(found));
  }
}

void every_forward(const float* w, const uint16_t* bits, const float* x, int64_t n, int64_t rows,
                   int64_t cols, const float* bias, bool relu, float* y, float* scratch, int threads) {
  const int64_t over = n % kVector <= kOver ? n % kVector : 0, most = n - over;
  const int64_t count = ceil_div(most, kLanes), words = words_of(cols);
  float *panels = scratch, *all = scratch + padded(most) * cols;
  to_panels(x, most, cols, panels, threads);
  deal(ceil_div(rows, kTileHigh), threads, [&](int64_t b) AF_LAMBDA {
    alignas(64) float tile[kTileHigh * kTileWide], lone[kOver][kTileHigh];
    const int64_t row = b * kTileHigh, high = least(kTileHigh, rows - row);
    float* sums = all + padded(most) * row;
    for (int64_t r = high; r < whole(high); ++r) start_sums(nullptr, 0, 1, kTileWide, tile + r * kTileWide);
    for (int64_t i = 0; i < count; ++i) {
      const Panel p = panel(i, most);
      float* own = sums + p.begin * whole(high);
      start_sums(bias, row, high, p.width, own);
      start_sums(nullptr, 0, whole(high) - high, p.width, own + high * p.width);
    }
    for (int64_t i = 0; i < over; ++i)
      for (int64_t r = 0; r < kTileHigh; ++r) lone[i][r] = bias && r < high ? bias[row + r] : 0;
    for (int64_t col = 0; col < cols; col += kTileWide) {
      const int64_t wide = least(kTileWide, cols - col);
      fill_tile<kTileWide>(w + row * cols + col, cols, bits + row * words + col / 16, high, wide, tile);
      for (int64_t i = 0; i < count; ++i) {
        const Panel p = panel(i, most);
        kMeetRows.of(p.width / kVector)(tile, high, wide, panels + p.begin * cols + col * p.width,
                                        sums + p.begin * whole(high));
      }
      for (int64_t i = 0; i < over; ++i) meet_sample(tile, high, wide, x + (most + i) * cols + col, lone[i]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Panel p = panel(i, most);
      finish_sums(sums + p.begin * whole(high), p, high, relu, y + p.begin * rows + row, rows);
    }
    for (int64_t i = 0; i < over; ++i)
      for (int64_t r = 0; r < high; ++r)
        y[(most + i) * rows + row + r] = relu && lone[i][r] < 0 ? 0 : lone[i][r];  // NaN stays NaN
  });
}

// dx; each thread has columns of its own, and meets all rows with them
void every_back(const float* w, const uint16_t* bits, const float* dy, int64_t n, int64_t rows, int64_t cols,
                float* dx, int threads) {
  const int64_t words = words_of(cols), chunks = ceil_div(cols, kBackWide);
  const int64_t shares = threads > 1 ? least(chunks, 2 * threads) : 1;
  const int64_t each = rows ? ceil_div(rows, ceil_div(rows, kBackHigh)) : 1;  // rows of a tile: equal shares
  if (rows == 0) return void(__builtin_memset(dx, 0, std::size_t(n * cols) * sizeof(float)));
  // a few samples meet a weight that the cache holds where it stands
  if (n <= kStrips && rows * cols < kPackFrom) return kMeetStrips.of(n)(w, bits, dy, rows, cols, dx, threads);
  deal(shares, threads, [&](int64_t t) AF_LAMBDA {
    alignas(64) float tile[kBackHigh * kBackWide];
    const int64_t begin = chunks * t / shares * kBackWide,
                  end = least(chunks * (t + 1) / shares * kBackWide, cols);
    for (int64_t row = 0; row < rows; row += each) {
      const int64_t high = least(each, rows - row);
      for (int64_t col = begin; col < end; col += kBackWide) {
        const int64_t wide = least(kBackWide, end - col);
        const ToTile weights = {w + row * cols + col, bits + row * words + col / 16, cols, words, tile};
        kMeetSamples.of(ceil_div(wide, kVector))(weights, high, wide, dy + row, n, rows, row == 0, dx + col,
                                                 cols);
      }
    }
  });
}

#else
constexpr auto every_scratch = nullptr;
constexpr auto every_forward = nullptr;
constexpr auto every_back = nullptr;
#endif

}  // namespace
}  // namespace autoflip
