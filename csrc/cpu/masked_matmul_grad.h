// The weight's gradient at the mask, and the masks of the dense path.
#pragma once
#include <cstddef>

#include "cpu/masked_matmul_impl.h"

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

struct Visit {
  const float *dy, *x;  // the panel at the first row of the block and the first column of the chunk
  float* dw;            // at both
  int64_t cols;
  bool first;  // panel: sums are written, else added
};

// dw at the next `Columns` columns of a run; those past the end repeat the first and are not written
template <int P, int V, int Columns>
AF_INLINE void sample_block(const uint16_t* column, const uint16_t* end, const vec (&d)[popcount(P)][V],
                            const Visit& at, float* dw) {
  constexpr int kRows = popcount(P), kSums = kRows * Columns, kFour = (kSums + 3) / 4 * 4;
  vec sums[kFour];
  unroll<kSums, kFour>([&](auto i) AF_LAMBDA { sums[i.value] = vec{}; });
  unroll<0, Columns>([&](auto j) AF_LAMBDA {
    const int64_t k = j.value < end - column ? column[j.value] : column[0];
    const float* x = at.x + k * V * kVector;
    unroll<0, V>([&](auto v) AF_LAMBDA {
      const vec xv = load(x + v.value * kVector);
      unroll<0, kRows>([&](auto r) AF_LAMBDA {
        constexpr int i = decltype(j)::value * kRows + decltype(r)::value;
        sums[i] = v.value ? fma(d[r.value][v.value], xv, sums[i]) : d[r.value][0] * xv;
      });
    });
  });
  float out[kFour];
#if defined(__AVX512F__)
  if constexpr (kFour == 16)
    sum_lanes16(sums, out);
  else
#endif
    unroll<0, kFour / 4>([&](auto i) AF_LAMBDA { sum_lanes(sums + 4 * i.value, out + 4 * i.value); });
  unroll<0, Columns>([&](auto j) AF_LAMBDA {
    if (j.value < end - column)
      unroll<0, kRows>([&](auto r) AF_LAMBDA {
        float& entry = dw[column[j.value] + row_of(P, decltype(r)::value) * at.cols];
        const float sum = out[decltype(j)::value * kRows + decltype(r)::value];
        entry = at.first ? sum : entry + sum;
      });
  });
}

template <int P, int V>
AF_INLINE void sample_runs(Runs& runs, const Visit& at) {
  constexpr int kSums = sizeof(vec) == 64 ? 16 : 8;  // registers
  constexpr int kRows = popcount(P), kWide = kRows == 1 ? kSums : kRows == 2 ? kSums / 2 : kSums / 4;
  constexpr int kNarrow = kWide > 4 ? 4 : kWide;
  for (; runs.run != runs.end; ++runs.run) {
    const int64_t row = *runs.run & 0xffff;
    const uint16_t *column = runs.column, *end = column + (*runs.run >> 16);
    float* dw = at.dw + row * at.cols;
    vec d[kRows][V];
    unroll<0, kRows * V>([&](auto i) AF_LAMBDA {
      constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
      d[r][v] = load(at.dy + ((row + row_of(P, r)) * V + v) * kVector);
    });
    for (; end - column > kWide - kNarrow; column += kWide) sample_block<P, V, kWide>(column, end, d, at, dw);
    if constexpr (kNarrow < kWide)
      for (; column < end; column += kNarrow) sample_block<P, V, kNarrow>(column, end, d, at, dw);
    runs.column = end;
  }
}

template <int V>
void sample_cell(const Layout& layout, int64_t cell, const Visit& at) {
  each_pattern(layout, cell, nullptr,
               [&](auto p, Runs& runs) AF_LAMBDA { sample_runs<p.value, V>(runs, at); });
}
typedef void (*SampleCell)(const Layout&, int64_t, const Visit&);
#if defined(__AVX512F__)
constexpr SampleCell kSampleCell[] = {sample_cell<1>, sample_cell<2>, sample_cell<3>, sample_cell<4>};
#else
constexpr SampleCell kSampleCell[] = {sample_cell<1>, sample_cell<2>};
#endif

constexpr int64_t kPastCache = int64_t(1) << 22;  // floats: 16 MB

AF_INLINE void copy_row(const float* from, int64_t n, float* to, bool past) {
  int64_t j = 0;
#if defined(__AVX512F__)
  if (past && reinterpret_cast<std::uintptr_t>(to) % 64 == 0)
    for (; j + kVector <= n; j += kVector) _mm512_stream_ps(to + j, load(from + j));
#endif
  (void)past;
  __builtin_memcpy(to + j, from + j, std::size_t(n - j) * sizeof(float));
}

// dw of one (block, chunk), all panels, by way of a tile: rows of a weight whose width is a power of two
// would otherwise fight for the same few lines of the cache
void sample_tile(const Layout& layout, int64_t cell, const float* dy, const float* x, int64_t n, float* dw) {
  alignas(64) float tile[(kRowBlock + kGroup) * kMaxChunk];
  const int64_t chunks = ceil_div(layout.cols, layout.chunk);
  const int64_t row = cell / chunks * layout.block, col = cell % chunks * layout.chunk;
  const int64_t rows = layout.rows - row < layout.block ? layout.rows - row : layout.block;
  const int64_t cols = layout.cols - col < layout.chunk ? layout.cols - col : layout.chunk;
  __builtin_memset(tile, 0, std::size_t(rows * cols) * sizeof(float));
  for (int64_t i = 0; i < ceil_div(n, kLanes); ++i) {
    const Panel p = panel(i, n);
    kSampleCell[p.width / kVector - 1](layout, cell,
                                       {dy + p.begin * layout.rows + row * p.width,
                                        x + p.begin * layout.cols + col * p.width, tile, cols, i == 0});
  }
  // what no cache will hold until it is read again need not pass through one
  const bool past = layout.rows * layout.cols >= kPastCache;
  for (int64_t r = 0; r < rows; ++r)
    copy_row(tile + r * cols, cols, dw + (row + r) * layout.cols + col, past);
#if defined(__AVX512F__)
  if (past) _mm_sfence();
#endif
}

void backward(Layout layout, const float* values, const float* dy, const float* x, int64_t n, float* dx,
              float* dw, float* scratch, int threads) {
  const int64_t chunks = ceil_div(layout.cols, layout.chunk),
                cells = ceil_div(layout.rows, layout.block) * chunks;
  float* x_panels = scratch + padded(n) * layout.rows;
  for (int64_t i = 0; i < ceil_div(n, kLanes); ++i) {
    const Panel p = panel(i, n);
    to_panel(dy, p, layout.rows, scratch + p.begin * layout.rows, threads);
    if (dx) multiply_back(layout, values, scratch + p.begin * layout.rows, p, dx, threads);
    if (dw) to_panel(x, p, layout.cols, x_panels + p.begin * layout.cols, threads);
  }
  if (!dw) return;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < cells; ++t) sample_tile(layout, t, scratch, x_panels, n, dw);
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
