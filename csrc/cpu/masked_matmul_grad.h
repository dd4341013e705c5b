// The weight's gradient at the mask, and the masks of the dense path.
#pragma once
#include <cstddef>

#include "cpu/masked_matmul_product.h"

namespace autoflip {
namespace {

void select(const float* w, const uint8_t* mask, int64_t n, float* out, int threads) {
  const uint32_t* in = reinterpret_cast<const uint32_t*>(w);
  uint32_t* to = reinterpret_cast<uint32_t*>(out);
#pragma omp parallel for simd num_threads(threads) if (parallel : threads > 1)
  for (int64_t i = 0; i < n; ++i) to[i] = in[i] & (0u - uint32_t(mask[i]));
}

bool is_clean(const float* w, const uint8_t* mask, int64_t n) {
  const uint32_t* in = reinterpret_cast<const uint32_t*>(w);
  for (int64_t begin = 0; begin < n; begin += 4096) {
    const int64_t end = n - begin < 4096 ? n : begin + 4096;
    uint32_t stray = 0;
#pragma omp simd reduction(| : stray)
    for (int64_t i = begin; i < end; ++i) stray |= (in[i] << 1) & (uint32_t(mask[i]) - 1u);  // -0 is zero too
    if (stray) return false;
  }
  return true;
}

// --- the gradient in w

// sums[j] = the sum over lanes of dy * x at column[j] (plus sums[j] unless `first`), j < Columns
template <int Columns, int V>
AF_INLINE void sample(const uint16_t* column, const vec (&dy)[V], const float* x, bool first, float* sums) {
#if defined(__AVX512F__)
  if constexpr (V == 1) {  // in halves: the first fold is a multiply-add
    const __m256 low = _mm512_castps512_ps256(dy[0]), high = _mm512_extractf32x8_ps(dy[0], 1);
    __m256 half[Columns];
    unroll<0, Columns>([&](auto j) AF_LAMBDA {
      const float* xk = x + column[j.value] * int64_t(kVector);
      half[j.value] = _mm256_fmadd_ps(high, _mm256_loadu_ps(xk + 8), low * _mm256_loadu_ps(xk));
    });
    sum_halves<Columns>(half, first, sums);
    return;
  }
#endif
  vec products[Columns];
  unroll<0, Columns>([&](auto j) AF_LAMBDA {
    const float* xk = x + column[j.value] * int64_t(V * kVector);
    products[j.value] = dy[0] * load(xk);
    unroll<1, V>([&](auto v) AF_LAMBDA {
      products[j.value] = fma(dy[v.value], load(xk + v.value * kVector), products[j.value]);
    });
  });
  sum_columns<Columns>(products, first, sums);
}

constexpr int kWide = sizeof(vec) == 64 ? 16 : sizeof(vec) == 32 ? 8 : 4;  // columns that registers hold

// The gradients of a cell, row after row, each row's from a whole vector on. sums: written, or added to
template <int V>
void sample_cell(const Lists& lists, int64_t cell, int64_t rows, const float* dy, const float* x, bool first,
                 float* sums) {
  const int64_t slots = list_slots(lists.chunk);
  const uint16_t *count = lists.counts + cell * lists.block * slots,
                 *column = lists.columns + lists.first[cell];
  for (int64_t r = 0; r < rows; ++r, count += slots) {
    vec d[V];
    unroll<0, V>([&](auto v) AF_LAMBDA { d[v.value] = load(dy + (r * V + v.value) * kVector); });
    // past the end of a row its next columns are sampled too, into room that nobody reads
    int64_t j = 0;
    for (; *count - j > kWide - 4; j += kWide) sample<kWide, V>(column + j, d, x, first, sums + j);
    if constexpr (kWide > 8)
      for (; *count - j > 4; j += 8) sample<8, V>(column + j, d, x, first, sums + j);
    if constexpr (kWide > 4)
      for (; *count - j > 0; j += 4) sample<4, V>(column + j, d, x, first, sums + j);
    column += *count;
    sums += ceil_div(*count, kWide) * kWide;
  }
}
typedef decltype(&sample_cell<1>) SampleCell;
#if defined(__AVX512F__)
constexpr SampleCell kSampleCell[] = {sample_cell<1>, sample_cell<2>, sample_cell<3>, sample_cell<4>};
#else
constexpr SampleCell kSampleCell[] = {sample_cell<1>, sample_cell<2>};
#endif

// to[j] = bit j of `bits` ? the next of `from` : 0; `column`: the numbers of the bits that are set
AF_INLINE void spread_row(const float* from, const uint16_t* column, int64_t count, const uint16_t* bits,
                          int64_t n, float* to, bool past) {
#if defined(__AVX512F__)
  if (past || count * 16 > n) {
    past = past && reinterpret_cast<std::uintptr_t>(to) % 64 == 0;
    int64_t j = 0;
    for (; j + kVector <= n; j += kVector, ++bits) {
      const vec v = _mm512_maskz_expand_ps(__mmask16(*bits), load(from));
      if (past)
        _mm512_stream_ps(to + j, v);
      else
        store(to + j, v);
      from += __builtin_popcount(*bits);
    }
    if (j < n)
      _mm512_mask_storeu_ps(to + j, __mmask16((1u << (n - j)) - 1),
                            _mm512_maskz_expand_ps(__mmask16(*bits), load(from)));
    return;
  }
#endif
  (void)past;
  (void)bits;
  __builtin_memset(to, 0, std::size_t(n) * sizeof(float));
  for (int64_t j = 0; j < count; ++j) to[column[j]] = from[j];
}

// dw of one cell, all panels
void sample_tile(const Lists& lists, int64_t cell, const float* dy, const float* x, int64_t n, float* dw) {
  alignas(64) float sums[kRowBlock * kMaxChunk + 2 * kWide];
  const int64_t chunks = ceil_div(lists.cols, lists.chunk), slots = list_slots(lists.chunk);
  const int64_t row = cell / chunks * lists.block, col = cell % chunks * lists.chunk;
  const int64_t rows = lists.rows - row < lists.block ? lists.rows - row : lists.block;
  const int64_t cols = lists.cols - col < lists.chunk ? lists.cols - col : lists.chunk;
  for (int64_t i = 0; i < ceil_div(n, kLanes); ++i) {
    const Panel p = panel(i, n);
    kSampleCell[p.width / kVector - 1](lists, cell, rows, dy + p.begin * lists.rows + row * p.width,
                                       x + p.begin * lists.cols + col * p.width, i == 0, sums);
  }
  // what no cache will hold until it is read again need not pass through one
  const bool past = lists.rows * lists.cols >= kPastCache;
  const uint16_t *count = lists.counts + cell * lists.block * slots,
                 *column = lists.columns + lists.first[cell];
  const float* from = sums;
  if (n == 0) __builtin_memset(sums, 0, sizeof sums);
  for (int64_t r = 0; r < rows; ++r, count += slots) {
    spread_row(from, column, *count, count + 1, cols, dw + (row + r) * lists.cols + col, past);
    column += *count;
    from += ceil_div(*count, kWide) * kWide;
  }
#if defined(__AVX512F__)
  if (past) _mm_sfence();
#endif
}

// db[j] = the sum of column j of dy (n, rows), four samples at a time
void sum_samples(const float* dy, int64_t n, int64_t rows, float* db) {
  __builtin_memset(db, 0, std::size_t(rows) * sizeof(float));
  int64_t i = 0;
  for (; i + 4 <= n; i += 4, dy += 4 * rows)
#pragma omp simd
    for (int64_t j = 0; j < rows; ++j)
      db[j] += (dy[j] + dy[j + rows]) + (dy[j + 2 * rows] + dy[j + 3 * rows]);
  for (; i < n; ++i, dy += rows)
#pragma omp simd
    for (int64_t j = 0; j < rows; ++j) db[j] += dy[j];
}

void backward(const Orders& orders, const float* w, const float* dy, const float* x, int64_t n, float* dx,
              float* dw, float* db, float* scratch, int threads) {
  const Lists& lists = orders.lists;
  if (db) sum_samples(dy, n, lists.rows, db);
  const int64_t cells = ceil_div(lists.rows, lists.block) * ceil_div(lists.cols, lists.chunk);
  to_panels(dy, n, lists.rows, scratch, threads);
  if (dx && orders.back.rows)
    product(orders.back, {w, 1, lists.cols, false}, scratch, n, nullptr, false, dx, threads);
  else if (dx)
    product_back(orders.groups, w, scratch, n, dx, threads);
  if (!dw) return;
  float* x_panels = scratch + padded(n) * lists.rows;
  to_panels(x, n, lists.cols, x_panels, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < cells; ++t) sample_tile(lists, t, scratch, x_panels, n, dw);
}

// --- every product, masked where it is stored: with half as wide vectors and half as many registers a
// vendor's product and a pass over its result are twice as fast

#if defined(__AVX512F__)

constexpr int kTileRows = 6;         // 6 x kVectors sums
constexpr int64_t kOuterTiles = 16;  // tiles of columns whose x is packed at once: 1024 columns

int64_t outer_scratch(int64_t n, int64_t rows) {
  return n * (ceil_div(rows, kTileRows) * kTileRows + kOuterTiles * kLanes);
}

AF_INLINE void store_masked(float* to, vec v, const uint8_t* mask, int64_t live, bool past) {
  if (live <= 0) return;
  if (past && live >= kVector && reinterpret_cast<std::uintptr_t>(to) % 64 == 0) {
    const __m128i m = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
    _mm512_stream_ps(to, _mm512_maskz_mov_ps(_mm_test_epi8_mask(m, m), v));
    return;
  }
  const __mmask16 some = live >= kVector ? __mmask16(0xffff) : __mmask16((1u << live) - 1);
  const __m128i m = _mm_maskz_loadu_epi8(some, mask);
  _mm512_mask_storeu_ps(to, some, _mm512_maskz_mov_ps(_mm_test_epi8_mask(m, m), v));
}

// dw (up to 6 rows, up to kLanes columns) = dy tile (n, 6) transposed @ x tile (n, kLanes)
void outer_tile(const float* dy, const float* x, const uint8_t* mask, int64_t n, int64_t rows, int64_t live,
                int64_t cols, float* dw, bool past) {
  vec sums[kTileRows][kVectors];
  unroll<0, kTileRows * kVectors>([&](auto i)
                                      AF_LAMBDA { sums[i.value / kVectors][i.value % kVectors] = vec{}; });
  // the stores at the end miss the first-level cache, and would wait for each other
  unroll<0, kTileRows * kVectors>([&](auto i) AF_LAMBDA {
    if (!past && i.value / kVectors < rows)
      __builtin_prefetch(dw + i.value / kVectors * cols + i.value % kVectors * kVector, 1, 3);
  });
  for (int64_t i = 0; i < n; ++i, dy += kTileRows, x += kLanes) {
    vec xs[kVectors];
    unroll<0, kVectors>([&](auto v) AF_LAMBDA { xs[v.value] = load(x + v.value * kVector); });
    unroll<0, kTileRows>([&](auto r) AF_LAMBDA {
      const vec d = broadcast(dy[r.value]);
      unroll<0, kVectors>(
          [&](auto v) AF_LAMBDA { sums[r.value][v.value] = fma(d, xs[v.value], sums[r.value][v.value]); });
    });
  }
  unroll<0, kTileRows>([&](auto r) AF_LAMBDA {
    if (r.value < rows)
      unroll<0, kVectors>([&](auto v) AF_LAMBDA {
        const int64_t at = r.value * cols + v.value * kVector;
        store_masked(dw + at, sums[r.value][v.value], mask + at, live - v.value * kVector, past);
      });
  });
}

void outer(const float* dy, const float* x, const uint8_t* mask, int64_t n, int64_t rows, int64_t cols,
           float* dw, float* scratch, int threads) {
  const int64_t row_tiles = ceil_div(rows, kTileRows), col_tiles = ceil_div(cols, kLanes);
  const bool past = rows * cols >= kPastCache;
  float* packed = scratch + row_tiles * kTileRows * n;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < row_tiles; ++t) {
    const int64_t row = t * kTileRows, live = rows - row < kTileRows ? rows - row : kTileRows;
    for (int64_t i = 0; i < n; ++i)
      _mm512_mask_storeu_ps(scratch + (t * n + i) * kTileRows, (1u << kTileRows) - 1,
                            _mm512_maskz_loadu_ps(__mmask16((1u << live) - 1), dy + i * rows + row));
  }
  for (int64_t first = 0; first < col_tiles; first += kOuterTiles) {
    const int64_t tiles = col_tiles - first < kOuterTiles ? col_tiles - first : kOuterTiles;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < tiles; ++c) {
      const int64_t col = (first + c) * kLanes, live = cols - col < kLanes ? cols - col : kLanes;
      for (int64_t i = 0; i < n; ++i) {
        const float* from = x + i * cols + col;
        float* to = packed + (c * n + i) * kLanes;
        if (live == kLanes)
          for (int64_t j = 0; j < kLanes; j += kVector) store(to + j, load(from + j));
        else
          for (int64_t j = 0; j < kLanes; ++j) to[j] = j < live ? from[j] : 0;
      }
    }
    // along the rows of dw, so that its pages are met one after the other
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < row_tiles; ++t) {
      for (int64_t c = 0; c < tiles; ++c) {
        const int64_t row = t * kTileRows, col = (first + c) * kLanes;
        outer_tile(scratch + row * n, packed + c * n * kLanes, mask + row * cols + col, n, rows - row,
                   cols - col, cols, dw + row * cols + col, past);
      }
      if (past) _mm_sfence();
    }
  }
}
#else
constexpr auto outer = nullptr;
constexpr auto outer_scratch = nullptr;
#endif

}  // namespace
}  // namespace autoflip
