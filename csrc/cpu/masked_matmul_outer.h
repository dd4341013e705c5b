// The weight's gradient with every product computed, masked where it is stored.
#pragma once
#include "cpu/masked_matmul_product.h"

namespace autoflip {
namespace {

#if defined(__AVX2__)

constexpr int kTileRows = 6, kTileVectors = kVector == 16 ? 4 : 2;  // 24 sums of 32 registers, 12 of 16
constexpr int64_t kTileColumns = kVector * kTileVectors;
constexpr int64_t kOuterTiles = 1024 / kTileColumns;  // tiles of columns whose x is packed at once
constexpr int64_t kOuterWords = 1024 / 16;            // of their bits, a row
constexpr int64_t kOuterFloats = 4096;  // of x that the first-level cache holds beside a tile of dy

int64_t outer_scratch(int64_t n, int64_t rows) {
  return n * (ceil_div(rows, kTileRows) * kTileRows + kOuterTiles * kTileColumns);
}

#if defined(__AVX512F__)
// the first `live` of a vector, zeros where no bit is set
AF_INLINE void store_masked(float* to, vec v, unsigned bits, int64_t live, bool past) {
  if (live <= 0) return;
  v = _mm512_maskz_mov_ps(__mmask16(bits), v);
  if (past && live >= kVector && reinterpret_cast<std::uintptr_t>(to) % 64 == 0)
    return _mm512_stream_ps(to, v);
  _mm512_mask_storeu_ps(to, live >= kVector ? __mmask16(0xffff) : __mmask16((1u << live) - 1), v);
}

// the first `live` of six floats, zeros behind them
AF_INLINE void copy_six(const float* from, int64_t live, float* to) {
  _mm512_mask_storeu_ps(to, (1u << kTileRows) - 1, _mm512_maskz_loadu_ps(__mmask16((1u << live) - 1), from));
}

AF_INLINE unsigned word_of(const uint8_t* mask) {
  const __m128i m = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
  return _mm_test_epi8_mask(m, m);
}
#else
AF_INLINE void store_masked(float* to, vec v, unsigned bits, int64_t live, bool past) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i none = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), bit), __m256i{});
  v = _mm256_andnot_ps(_mm256_castsi256_ps(none), v);
  if (live >= kVector) {
    if (past && reinterpret_cast<std::uintptr_t>(to) % 32 == 0) return _mm256_stream_ps(to, v);
    return store(to, v);
  }
  alignas(32) float lanes[kVector];
  store(lanes, v);
  for (int64_t i = 0; i < live; ++i) to[i] = lanes[i];
}

AF_INLINE void copy_six(const float* from, int64_t live, float* to) {
  for (int64_t r = 0; r < kTileRows; ++r) to[r] = r < live ? from[r] : 0;
}

AF_INLINE unsigned word_of(const uint8_t* mask) {
  const __m128i m = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
  return ~unsigned(_mm_movemask_epi8(_mm_cmpeq_epi8(m, __m128i{}))) & 0xffff;
}
#endif

// Where the bits of a tile's rows stand, from its first column on.
struct Bits {
  const uint16_t* row[kTileRows];
};

// Bytes of a mask as bits, of up to kTileRows rows and `cols` columns.
AF_INLINE void to_bits(const uint8_t* mask, int64_t stride, int64_t rows, int64_t cols, int64_t words,
                       uint16_t* bits) {
  for (int64_t r = 0; r < rows; ++r, mask += stride, bits += words) {
    int64_t k = 0;
    for (; k + 16 <= cols; k += 16) bits[k / 16] = uint16_t(word_of(mask + k));
    if (k == cols) continue;
    unsigned last = 0;
    for (int64_t j = k; j < cols; ++j) last |= unsigned(mask[j] != 0) << (j - k);
    bits[k / 16] = uint16_t(last);
  }
}

// dw (up to 6 rows, up to V vectors of columns) = dy tile (n, 6) transposed @ x tile (n, kTileColumns)
template <int V>
void outer_tile(const float* dy, const float* x, const Bits& bits, int64_t n, int64_t rows, int64_t live,
                int64_t cols, float* dw, bool past) {
  vec sums[kTileRows][V];
  unroll<0, kTileRows * V>([&](auto i) AF_LAMBDA { sums[i.value / V][i.value % V] = vec{}; });
  // the stores at the end miss the first-level cache, and would wait for each other
  unroll<0, kTileRows * V>([&](auto i) AF_LAMBDA {
    if (!past && i.value / V < rows)
      __builtin_prefetch(dw + i.value / V * cols + i.value % V * kVector, 1, 3);
  });
  for (int64_t i = 0; i < n; ++i, dy += kTileRows, x += kTileColumns) {
    vec xs[V];
    unroll<0, V>([&](auto v) AF_LAMBDA { xs[v.value] = load(x + v.value * kVector); });
    unroll<0, kTileRows>([&](auto r) AF_LAMBDA {
      const vec d = broadcast(dy[r.value]);
      unroll<0, V>([&](auto v)
                       AF_LAMBDA { sums[r.value][v.value] = fma(d, xs[v.value], sums[r.value][v.value]); });
    });
  }
#if defined(__AVX512F__)
  if (!past && rows >= kTileRows && live >= V * kVector)  // a whole tile, without a question for each vector
    return unroll<0, kTileRows * V>([&](auto i) AF_LAMBDA {
      constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
      store(dw + r * cols + v * kVector, _mm512_maskz_mov_ps(__mmask16(bits.row[r][v]), sums[r][v]));
    });
#endif
  unroll<0, kTileRows>([&](auto r) AF_LAMBDA {
    if (r.value < rows)
      unroll<0, V>([&](auto v) AF_LAMBDA {
        constexpr int at = v.value * kVector;
        const unsigned word = at < live ? bits.row[r.value][at / 16] : 0u;
        store_masked(dw + r.value * cols + at, sums[r.value][v.value], word >> at % 16, live - at, past);
      });
  });
}
constexpr auto kOuterTile = widths<kTileVectors>([](auto v) { return &outer_tile<decltype(v)::value>; });

void outer(const float* dy, const float* x, const Kept& kept, int64_t n, int64_t rows, int64_t cols,
           float* dw, float* scratch, int threads) {
  const int64_t row_tiles = ceil_div(rows, kTileRows), col_tiles = ceil_div(cols, kTileColumns);
  const bool past = rows * cols >= kPastCache;
  float* packed = scratch + row_tiles * kTileRows * n;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < row_tiles; ++t) {
    const int64_t row = t * kTileRows, live = rows - row < kTileRows ? rows - row : kTileRows;
    for (int64_t i = 0; i < n; ++i) copy_six(dy + i * rows + row, live, scratch + (t * n + i) * kTileRows);
  }
  // Where the cache holds dw, as much of x at once as stays near for all its rows; else along the rows of dw,
  // so that its pages are met one after the other.
  const int64_t near = rows * cols < kPackFrom ? kOuterFloats / (kTileColumns * n + 1) : kOuterTiles;
  const int64_t together = near < 1 ? 1 : least(near, kOuterTiles);
  for (int64_t first = 0; first < col_tiles; first += together) {
    const int64_t tiles = least(together, col_tiles - first);
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
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < row_tiles; ++t) {
      uint16_t own[kTileRows][kOuterWords];
      const int64_t row = t * kTileRows, begin = first * kTileColumns;
      if (!kept.bits)
        to_bits(kept.mask + row * cols + begin, cols, least(kTileRows, rows - row),
                least(tiles * kTileColumns, cols - begin), kOuterWords, own[0]);
      for (int64_t c = 0; c < tiles; ++c) {
        const int64_t col = (first + c) * kTileColumns;
        Bits bits;
        for (int64_t r = 0; r < kTileRows; ++r)
          bits.row[r] = kept.bits ? kept.bits + least(row + r, rows - 1) * words_of(cols) + col / 16
                                  : own[r] + (col - begin) / 16;
        const int64_t vectors = ceil_div(least(cols - col, kTileColumns), kVector);
        kOuterTile.of(vectors)(scratch + row * n, packed + c * n * kTileColumns, bits, n, rows - row,
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
