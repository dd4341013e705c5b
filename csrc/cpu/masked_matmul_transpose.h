// Transposes with the vectors of masked_matmul_simd.h.
#pragma once
#include "cpu/masked_matmul_simd.h"

namespace autoflip {
namespace {

#if defined(__AVX512F__)
// a[c][r] = a[r][c]
AF_INLINE void transpose16(__m512 (&a)[16]) {
  __m512 b[16];
  unroll<0, 8>([&](auto i) AF_LAMBDA {
    constexpr int j = 2 * decltype(i)::value;
    b[j] = _mm512_unpacklo_ps(a[j], a[j + 1]);
    b[j + 1] = _mm512_unpackhi_ps(a[j], a[j + 1]);
  });
  unroll<0, 4>([&](auto i) AF_LAMBDA {  // a[4 q + c]: column c of rows 4 q to 4 q + 3, in each quarter
    constexpr int j = 4 * decltype(i)::value;
    a[j] = _mm512_shuffle_ps(b[j], b[j + 2], 0x44);
    a[j + 1] = _mm512_shuffle_ps(b[j], b[j + 2], 0xee);
    a[j + 2] = _mm512_shuffle_ps(b[j + 1], b[j + 3], 0x44);
    a[j + 3] = _mm512_shuffle_ps(b[j + 1], b[j + 3], 0xee);
  });
  unroll<0, 4>([&](auto i) AF_LAMBDA {
    constexpr int c = decltype(i)::value;
    const __m512 even_low = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x88),
                 odd_low = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88),
                 odd_high = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xdd);
    b[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    b[c + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    b[c + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    b[c + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  });
  unroll<0, 16>([&](auto i) AF_LAMBDA { a[i.value] = b[i.value]; });
}

// out[column * out_stride + row] = in[row * in_stride + column], at most 16 x 16. Inlined into a loop its 32
// addresses would be kept, and spilled, one by one. `ahead`: how far on the next call's output begins; stores
// that miss the first-level cache wait for each other unless their lines were asked for before. `skip`:
// columns from 8 on begin so much further on.
__attribute__((noinline)) void transpose_tile(const float* in, int64_t in_stride, int64_t rows, int64_t cols,
                                              float* out, int64_t out_stride, __mmask16 to, int64_t ahead,
                                              int64_t skip = 0) {
  __m512 a[16];
  if (rows >= 16 && cols >= 16) {
    unroll<0, 16>([&](auto i) AF_LAMBDA {
      __builtin_prefetch(out + i.value * out_stride + ahead, 1, 3);
      a[i.value] = _mm512_loadu_ps(in + i.value * in_stride);
    });
    transpose16(a);
    unroll<0, 16>([&](auto i) AF_LAMBDA {
      _mm512_storeu_ps(out + i.value * out_stride + (i.value < 8 ? 0 : skip), a[i.value]);
    });
    return;
  }
  const __mmask16 from = cols >= 16 ? __mmask16(0xffff) : __mmask16((1u << cols) - 1);
  unroll<0, 16>([&](auto i) AF_LAMBDA {
    a[i.value] = _mm512_maskz_loadu_ps(i.value < rows ? from : __mmask16(0), in + i.value * in_stride);
  });
  transpose16(a);
  unroll<0, 16>([&](auto i) AF_LAMBDA {
    if (i.value < cols)
      _mm512_mask_storeu_ps(out + i.value * out_stride + (i.value < 8 ? 0 : skip), to, a[i.value]);
  });
}

// out[column * out_stride + row] = in[row * in_stride + column]. Pad: rows up to the next multiple of 16 are
// written as zeros, and the walk is along in's rows; else along out's: along the array that is not in the
// cache.
template <bool Pad>
void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t cols, float* out,
               int64_t out_stride) {
  if constexpr (Pad) {
    for (int64_t r = 0; r < rows; r += 16)
      for (int64_t c = 0; c < cols; c += 16)
        transpose_tile(in + r * in_stride + c, in_stride, rows - r, cols - c, out + c * out_stride + r,
                       out_stride, 0xffff, 16 * out_stride);
  } else {
    for (int64_t c = 0; c < cols; c += 16)
      for (int64_t r = 0; r < rows; r += 16)
        transpose_tile(in + r * in_stride + c, in_stride, rows - r, cols - c, out + c * out_stride + r,
                       out_stride, rows - r >= 16 ? 0xffff : __mmask16((1u << (rows - r)) - 1), 32);
  }
}
#else
template <bool Pad>
__attribute__((noinline)) void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t cols,
                                         float* out, int64_t out_stride) {
  int64_t c = 0;
#if defined(__AVX2__)
  for (; c + 8 <= cols; c += 8) {
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) {
      const float* p = in + r * in_stride + c;
      __m256 a[8], b[8];
      unroll<0, 4>([&](auto i) AF_LAMBDA {
        constexpr int j = decltype(i)::value;
        // rows j and j + 4 side by side: what is left to do stays inside the 128-bit halves
        const float *q = p + j * in_stride, *s = q + 4 * in_stride;
        a[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(q)), _mm_loadu_ps(s), 1);
        a[j + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(q + 4)), _mm_loadu_ps(s + 4), 1);
      });
      unroll<0, 2>([&](auto i) AF_LAMBDA {
        constexpr int h = 4 * decltype(i)::value;
        const __m256 lo01 = _mm256_unpacklo_ps(a[h], a[h + 1]), hi01 = _mm256_unpackhi_ps(a[h], a[h + 1]);
        const __m256 lo23 = _mm256_unpacklo_ps(a[h + 2], a[h + 3]),
                     hi23 = _mm256_unpackhi_ps(a[h + 2], a[h + 3]);
        b[h] = _mm256_shuffle_ps(lo01, lo23, 0x44);
        b[h + 1] = _mm256_shuffle_ps(lo01, lo23, 0xee);
        b[h + 2] = _mm256_shuffle_ps(hi01, hi23, 0x44);
        b[h + 3] = _mm256_shuffle_ps(hi01, hi23, 0xee);
      });
      unroll<0, 8>([&](auto i) AF_LAMBDA {
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
  if constexpr (Pad)
    for (c = 0; c < cols; ++c)
      for (int64_t r = rows; r % kVector; ++r) out[c * out_stride + r] = 0;
}
#endif

}  // namespace
}  // namespace autoflip
