// The code of masked_matmul.h for the instruction set that the including source is compiled for.
//
// Measured (bench/bench_masked_matmul.py); see autoflip/ops/masked_matmul.py for where it beats dense.
// Accumulators live in registers only while every loop over them is unrolled at compile time: hence unroll<>.
#pragma once
#include "cpu/masked_matmul.h"
#if defined(__AVX2__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593, in its own avx512fintrin.h
#endif
#endif

#define AF_INLINE inline __attribute__((always_inline))

namespace autoflip {
namespace {

#if defined(__AVX512F__)
constexpr int kVector = 16, kVectors = 4;  // 16 accumulators + 4 inputs of 32 registers
typedef __m512 vec;
AF_INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
constexpr int kVector = 8, kVectors = 2;  // 8 + 2 of 16 registers
typedef __m256 vec;
AF_INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
#else
constexpr int kVector = 4, kVectors = 2;
typedef float vec __attribute__((vector_size(16)));
AF_INLINE vec fma(vec a, vec b, vec c) { return a * b + c; }
#endif
typedef vec unaligned_vec __attribute__((aligned(4), may_alias));
constexpr int64_t kLanes = kVector * kVectors;
constexpr int64_t kRowBlock = 64;  // rows whose sums stay in the first-level cache while chunks go by
constexpr int64_t kPanelPass = 4;  // panels that one visit of the weight gradient sums over

AF_INLINE vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
AF_INLINE void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }
AF_INLINE vec broadcast(float f) { return vec{} + f; }

template <int I>
struct Int {
  static constexpr int value = I;
};
template <int Begin, int End, class F>
AF_INLINE void unroll(F&& f) {
  if constexpr (Begin < End) {
    f(Int<Begin>{});
    unroll<Begin + 1, End>(f);
  }
}
constexpr int popcount(int p) { return p ? (p & 1) + popcount(p >> 1) : 0; }
// the i-th row that pattern p keeps
constexpr int row_of(int p, int i) {
  int r = 0;
  while (!((p >> r) & 1) || i-- > 0) ++r;
  return r;
}

struct Panel {
  int64_t begin, count, width;  // samples; width is count rounded up to whole vectors
};
AF_INLINE Panel panel(int64_t i, int64_t n) {
  const int64_t begin = i * kLanes, count = n - begin < kLanes ? n - begin : kLanes;
  return {begin, count, ceil_div(count, kVector) * kVector};
}

// out[column * out_stride + row] = in[row * in_stride + column]
void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t cols, float* out,
               int64_t out_stride) {
  int64_t c = 0;
#if defined(__AVX2__)
  for (; c + 8 <= cols; c += 8) {
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) {
      const float* p = in + r * in_stride + c;
      __m256 a[8], b[8];
      unroll<0, 4>([&](auto i) __attribute__((always_inline)) {
        constexpr int j = decltype(i)::value;
        // rows j and j + 4 side by side: what is left to do stays inside the 128-bit halves
        const float *q = p + j * in_stride, *s = q + 4 * in_stride;
        a[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(q)), _mm_loadu_ps(s), 1);
        a[j + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(q + 4)), _mm_loadu_ps(s + 4), 1);
      });
      unroll<0, 2>([&](auto i) __attribute__((always_inline)) {
        constexpr int h = 4 * decltype(i)::value;
        const __m256 lo01 = _mm256_unpacklo_ps(a[h], a[h + 1]), hi01 = _mm256_unpackhi_ps(a[h], a[h + 1]);
        const __m256 lo23 = _mm256_unpacklo_ps(a[h + 2], a[h + 3]),
                     hi23 = _mm256_unpackhi_ps(a[h + 2], a[h + 3]);
        b[h] = _mm256_shuffle_ps(lo01, lo23, 0x44);
        b[h + 1] = _mm256_shuffle_ps(lo01, lo23, 0xee);
        b[h + 2] = _mm256_shuffle_ps(hi01, hi23, 0x44);
        b[h + 3] = _mm256_shuffle_ps(hi01, hi23, 0xee);
      });
      unroll<0, 8>([&](auto i) __attribute__((always_inline)) {
        constexpr int j = decltype(i)::value;
        _mm256_storeu_ps(out + (c + j) * out_stride + r, b[j]);
      });
    }
    for (; r < rows; ++r)
      for (int64_t j = c; j < c + 8; ++j) out[j * out_stride + r] = in[r * in_stride + j];
  }
#endif
  for (; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) out[c * out_stride + r] = in[r * in_stride + c];
}

void to_panels(const float* x, int64_t n, int64_t features, float* panels, int threads) {
  constexpr int64_t kBlock = 512;  // features of one task
  const int64_t blocks = ceil_div(features, kBlock), tasks = ceil_div(n, kLanes) * blocks;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tasks; ++t) {
    const Panel p = panel(t / blocks, n);
    const int64_t first = t % blocks * kBlock, cols = features - first < kBlock ? features - first : kBlock;
    float* out = panels + p.begin * features + first * p.width;
    transpose(x + p.begin * features + first, features, p.count, cols, out, p.width);
    for (int64_t k = 0; k < cols && p.count < p.width; ++k)
      for (int64_t lane = p.count; lane < p.width; ++lane) out[k * p.width + lane] = 0;
  }
}

// sums[4][V vectors] += the columns of one pattern
template <int P, int V>
AF_INLINE void add_pattern(vec (&sums)[kGroup][V], const uint8_t* column, const uint8_t* end, const float* w,
                           int64_t row_stride, int64_t column_stride, const float* x) {
  for (; column != end; ++column) {
    const int64_t k = *column;
    const float *wk = w + k * column_stride, *xk = x + k * V * kVector;
    vec xs[V];
    unroll<0, V>([&](auto v) __attribute__((always_inline)) { xs[v.value] = load(xk + v.value * kVector); });
    unroll<0, kGroup>([&](auto r) __attribute__((always_inline)) {
      if constexpr ((P >> decltype(r)::value) & 1) {
        const vec b = broadcast(wk[r.value * row_stride]);
        unroll<0, V>([&](auto v) __attribute__((always_inline)) {
          sums[decltype(r)::value][v.value] = fma(b, xs[v.value], sums[decltype(r)::value][v.value]);
        });
      }
    });
  }
}

// One group of 4 rows over one chunk of columns; `first` begins the sums with the bias, else they go on.
template <int V>
void add_chunk(const int32_t* table, const uint8_t* columns, Weight w, const float* x, bool first,
               const float* bias, int64_t live, float* sums_at) {
  vec sums[kGroup][V];
  unroll<0, kGroup>([&](auto r) __attribute__((always_inline)) {
    constexpr int row = decltype(r)::value;
    const vec start = broadcast(first && bias && row < live ? bias[row] : 0.0f);
    unroll<0, V>([&](auto v) __attribute__((always_inline)) {
      sums[row][v.value] = first ? start : load(sums_at + (row * V + v.value) * kVector);
    });
  });
  unroll<1, kTable>([&](auto p) __attribute__((always_inline)) {
    add_pattern<decltype(p)::value, V>(sums, columns + table[p.value - 1], columns + table[p.value], w.data,
                                       w.row_stride, w.column_stride, x);
  });
  unroll<0, kGroup * V>([&](auto i) __attribute__((always_inline)) {
    store(sums_at + i.value * kVector, sums[i.value / V][i.value % V]);
  });
}

typedef void (*AddChunk)(const int32_t*, const uint8_t*, Weight, const float*, bool, const float*, int64_t,
                         float*);

AF_INLINE AddChunk add_chunk_for(int64_t vectors) {
#if defined(__AVX512F__)
  if (vectors == 4) return add_chunk<4>;
  if (vectors == 3) return add_chunk<3>;
#endif
  return vectors == 2 ? add_chunk<2> : add_chunk<1>;
}

void multiply(Layout layout, Weight w, const float* panels, int64_t n, const float* bias, bool relu, float* y,
              int threads) {
  const int64_t blocks = ceil_div(layout.rows, kRowBlock), chunks = ceil_div(layout.cols, kChunk);
  const int64_t tasks = ceil_div(n, kLanes) * blocks;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tasks; ++t) {
    alignas(64) float sums[kRowBlock * kLanes];
    const Panel p = panel(t / blocks, n);
    const int64_t row0 = t % blocks * kRowBlock;
    const int64_t rows = layout.rows - row0 < kRowBlock ? layout.rows - row0 : kRowBlock;
    const AddChunk add = add_chunk_for(p.width / kVector);
    for (int64_t c = 0; c < (chunks ? chunks : 1); ++c)
      for (int64_t r = 0; r < rows; r += kGroup) {
        const int64_t row = row0 + r;
        static const int32_t nothing[kTable] = {};
        const int32_t* table = chunks ? layout.table + (row / kGroup * chunks + c) * kTable : nothing;
        const Weight corner = {w.data + row * w.row_stride + c * kChunk * w.column_stride, w.row_stride,
                               w.column_stride};
        add(table, layout.columns, corner, panels + p.begin * layout.cols + c * kChunk * p.width, c == 0,
            bias ? bias + row : nullptr, layout.rows - row, sums + r * p.width);
      }
    if (relu)
      for (int64_t i = 0; i < rows * p.width; ++i) sums[i] = sums[i] < 0 ? 0 : sums[i];  // NaN stays NaN
    transpose(sums, p.width, rows, p.count, y + p.begin * layout.rows + row0, layout.rows);
  }
}

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

// the sums of the lanes of four vectors
AF_INLINE void sum_lanes(const vec* v, float* out) {
#if defined(__AVX512F__)
  const vec a = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
  const vec b = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
  const vec c = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
  const __m256 d = _mm512_castps512_ps256(c) + _mm512_extractf32x8_ps(c, 1);
  _mm_storeu_ps(out, _mm256_castps256_ps128(d) + _mm256_extractf128_ps(d, 1));
#elif defined(__AVX2__)
  const vec a = _mm256_unpacklo_ps(v[0], v[1]) + _mm256_unpackhi_ps(v[0], v[1]);
  const vec b = _mm256_unpacklo_ps(v[2], v[3]) + _mm256_unpackhi_ps(v[2], v[3]);
  const vec d = _mm256_shuffle_ps(a, b, 0x44) + _mm256_shuffle_ps(a, b, 0xee);
  _mm_storeu_ps(out, _mm256_castps256_ps128(d) + _mm256_extractf128_ps(d, 1));
#else
  for (int i = 0; i < 4; ++i) out[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
#endif
}

struct Visit {
  const float *dy, *x;           // panels
  int64_t rows, cols, row, col;  // features of dy and of x; first row of the group, first column of the chunk
  int64_t n, first_panel, end_panel;
};

// dw at the columns of one pattern, four columns at a time (the first one repeated to make four)
template <int P>
AF_INLINE void sample_pattern(const uint8_t* column, const uint8_t* end, const Visit& at, float* dw) {
  constexpr int kRows = popcount(P);
  for (; column < end; column += 4) {
    int64_t k[4];
    unroll<0, 4>([&](auto j) __attribute__((always_inline)) {
      k[j.value] = at.col + (column + j.value < end ? column[j.value] : column[0]);
    });
    vec sums[kRows][4];
    unroll<0, kRows * 4>([&](auto i)
                             __attribute__((always_inline)) { sums[i.value / 4][i.value % 4] = vec{}; });
    for (int64_t i = at.first_panel; i < at.end_panel; ++i) {
      const Panel p = panel(i, at.n);
      const float* dy = at.dy + p.begin * at.rows + at.row * p.width;
      const float* x = at.x + p.begin * at.cols;
      for (int64_t v = 0; v < p.width; v += kVector) {
        vec xs[4];
        unroll<0, 4>(
            [&](auto j) __attribute__((always_inline)) { xs[j.value] = load(x + k[j.value] * p.width + v); });
        unroll<0, kRows>([&](auto r) __attribute__((always_inline)) {
          const vec d = load(dy + row_of(P, decltype(r)::value) * p.width + v);
          unroll<0, 4>([&](auto j) __attribute__((always_inline)) {
            sums[r.value][j.value] = fma(d, xs[j.value], sums[r.value][j.value]);
          });
        });
      }
    }
    unroll<0, kRows>([&](auto r) __attribute__((always_inline)) {
      float four[4];
      sum_lanes(sums[r.value], four);
      float* row = dw + (at.row + row_of(P, decltype(r)::value)) * at.cols;
      for (int j = 0; j < 4 && column + j < end; ++j)
        row[k[j]] = at.first_panel ? row[k[j]] + four[j] : four[j];
    });
  }
}

void sample(Layout layout, const float* dy_panels, const float* x_panels, int64_t n, float* dw, int threads) {
  const int64_t groups = ceil_div(layout.rows, kGroup), chunks = ceil_div(layout.cols, kChunk);
  const int64_t panels = ceil_div(n, kLanes);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t first = 0; first < panels; first += kPanelPass)
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t end = first + kPanelPass < panels ? first + kPanelPass : panels;
        const Visit at = {dy_panels,  x_panels, layout.rows, layout.cols, g * kGroup,
                          c * kChunk, n,        first,       end};
        const int32_t* table = layout.table + (g * chunks + c) * kTable;
        unroll<1, kTable>([&](auto p) __attribute__((always_inline)) {
          sample_pattern<decltype(p)::value>(layout.columns + table[p.value - 1],
                                             layout.columns + table[p.value], at, dw);
        });
      }
}

}  // namespace
}  // namespace autoflip
