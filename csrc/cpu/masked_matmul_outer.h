// The weight's gradient with every product computed, masked where it is stored: with half as wide vectors and
// half as many registers a vendor's product and a pass over its result are twice as fast.
#pragma once
#include "cpu/masked_matmul_product.h"

namespace autoflip {
namespace {

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
