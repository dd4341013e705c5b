// The weight's gradient with every product computed, masked where it is stored.
#pragma once
#include "cpu/masked_matmul_product.h"

namespace autoflip {
namespace {

#if defined(__AVX2__)

constexpr int kTileRows = 6, kTileVectors = kVector == 16 ? 4 : 2;  // 24 sums of 32 registers, 12 of 16
constexpr int64_t kTileColumns = kVector * kTileVectors;
constexpr int64_t kOuterTiles = 1024 / kTileColumns;  // tiles of columns whose x is packed at once

int64_t outer_scratch(int64_t n, int64_t rows) {
  return n * (ceil_div(rows, kTileRows) * kTileRows + kOuterTiles * kTileColumns);
}

#if defined(__AVX512F__)
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

// the first `live` of six floats, zeros behind them
AF_INLINE void copy_six(const float* from, int64_t live, float* to) {
  _mm512_mask_storeu_ps(to, (1u << kTileRows) - 1, _mm512_maskz_loadu_ps(__mmask16((1u << live) - 1), from));
}
#else
AF_INLINE void store_masked(float* to, vec v, const uint8_t* mask, int64_t live, bool past) {
  if (live >= kVector) {
    const __m256i m = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask)));
    const vec kept = _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(m, _mm256_setzero_si256())), v);
    if (past && reinterpret_cast<std::uintptr_t>(to) % 32 == 0)
      _mm256_stream_ps(to, kept);
    else
      store(to, kept);
    return;
  }
  alignas(32) float lanes[kVector];
  store(lanes, v);
  for (int64_t i = 0; i < live; ++i) to[i] = mask[i] ? lanes[i] : 0;
}

AF_INLINE void copy_six(const float* from, int64_t live, float* to) {
  for (int64_t r = 0; r < kTileRows; ++r) to[r] = r < live ? from[r] : 0;
}
#endif

// dw (up to 6 rows, up to kTileColumns columns) = dy tile (n, 6) transposed @ x tile (n, kTileColumns)
void outer_tile(const float* dy, const float* x, const uint8_t* mask, int64_t n, int64_t rows, int64_t live,
                int64_t cols, float* dw, bool past) {
  vec sums[kTileRows][kTileVectors];
  unroll<0, kTileRows * kTileVectors>(
      [&](auto i) AF_LAMBDA { sums[i.value / kTileVectors][i.value % kTileVectors] = vec{}; });
  // the stores at the end miss the first-level cache, and would wait for each other
  unroll<0, kTileRows * kTileVectors>([&](auto i) AF_LAMBDA {
    if (!past && i.value / kTileVectors < rows)
      __builtin_prefetch(dw + i.value / kTileVectors * cols + i.value % kTileVectors * kVector, 1, 3);
  });
  for (int64_t i = 0; i < n; ++i, dy += kTileRows, x += kTileColumns) {
    vec xs[kTileVectors];
    unroll<0, kTileVectors>([&](auto v) AF_LAMBDA { xs[v.value] = load(x + v.value * kVector); });
    unroll<0, kTileRows>([&](auto r) AF_LAMBDA {
      const vec d = broadcast(dy[r.value]);
      unroll<0, kTileVectors>(
          [&](auto v) AF_LAMBDA { sums[r.value][v.value] = fma(d, xs[v.value], sums[r.value][v.value]); });
    });
  }
  unroll<0, kTileRows>([&](auto r) AF_LAMBDA {
    if (r.value < rows)
      unroll<0, kTileVectors>([&](auto v) AF_LAMBDA {
        const int64_t at = r.value * cols + v.value * kVector;
        store_masked(dw + at, sums[r.value][v.value], mask + at, live - v.value * kVector, past);
      });
  });
}

void outer(const float* dy, const float* x, const uint8_t* mask, int64_t n, int64_t rows, int64_t cols,
           float* dw, float* scratch, int threads) {
  const int64_t row_tiles = ceil_div(rows, kTileRows), col_tiles = ceil_div(cols, kTileColumns);
  const bool past = rows * cols >= kPastCache;
  float* packed = scratch + row_tiles * kTileRows * n;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < row_tiles; ++t) {
    const int64_t row = t * kTileRows, live = rows - row < kTileRows ? rows - row : kTileRows;
    for (int64_t i = 0; i < n; ++i) copy_six(dy + i * rows + row, live, scratch + (t * n + i) * kTileRows);
  }
  for (int64_t first = 0; first < col_tiles; first += kOuterTiles) {
    const int64_t tiles = col_tiles - first < kOuterTiles ? col_tiles - first : kOuterTiles;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < tiles; ++c) {
      const int64_t col = (first + c) * kTileColumns,
                    live = cols - col < kTileColumns ? cols - col : kTileColumns;
      for (int64_t i = 0; i < n; ++i) {
        const float* from = x + i * cols + col;
        float* to = packed + (c * n + i) * kTileColumns;
        if (live == kTileColumns)
          for (int64_t j = 0; j < kTileColumns; j += kVector) store(to + j, load(from + j));
        else
          for (int64_t j = 0; j < kTileColumns; ++j) to[j] = j < live ? from[j] : 0;
      }
    }
    // along the rows of dw, so that its pages are met one after the other
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < row_tiles; ++t) {
      for (int64_t c = 0; c < tiles; ++c) {
        const int64_t row = t * kTileRows, col = (first + c) * kTileColumns;
        outer_tile(scratch + row * n, packed + c * n * kTileColumns, mask + row * cols + col, n, rows - row,
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
