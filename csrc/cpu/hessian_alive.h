// Where rows that share registers are not all zero.
#pragma once
#include <cstdint>

#include "cpu/hessian_simd.h"
#include "cpu/lanes.h"

namespace {

// Of `count` values in each of Q rows: the places that are not zero in all of them, and what each row has
// there. Returns how many there are. List and values have room for whole vectors; a row's values may be the
// row.
inline int64_t gather_alive(const float* const* rows, int64_t Q, int64_t count, int32_t* list,
                            float* const* values) {
  int64_t some = 0;
#if defined(__AVX512F__)
  const __m512i step = _mm512_set1_epi32(W);
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < count; i += W, index = _mm512_add_epi32(index, step)) {
    __mmask16 in = static_cast<__mmask16>(count - i < W ? (1u << (count - i)) - 1 : 0xFFFFu), on = 0;
    for (int64_t q = 0; q < Q; ++q)
      on |= _mm512_mask_cmp_ps_mask(in, _mm512_maskz_loadu_ps(in, rows[q] + i), _mm512_setzero_ps(),
                                    _CMP_NEQ_UQ);
    _mm512_storeu_si512(list + some, _mm512_maskz_compress_epi32(on, index));
    for (int64_t q = 0; q < Q; ++q)
      store(values[q] + some, _mm512_maskz_compress_ps(on, _mm512_maskz_loadu_ps(in, rows[q] + i)));
    some += __builtin_popcount(on);
  }
#else
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + W <= count; i += W) {
    Vec any = _mm256_setzero_ps();
    for (int64_t q = 0; q < Q; ++q)
      any = _mm256_or_ps(any, _mm256_cmp_ps(load(rows[q] + i), _mm256_setzero_ps(), _CMP_NEQ_UQ));
    uint32_t on = static_cast<uint32_t>(_mm256_movemask_ps(any));
    __m256i lanes = lanes_of(on);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(list + some),
                        _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int32_t>(i))));
    for (int64_t q = 0; q < Q; ++q)
      store(values[q] + some, _mm256_permutevar8x32_ps(load(rows[q] + i), lanes));
    some += __builtin_popcount(on);
  }
#endif
  for (; i < count; ++i) {
    bool on = false;
    for (int64_t q = 0; q < Q; ++q) {
      on |= rows[q][i] != 0.f;
      values[q][some] = rows[q][i];
    }
    list[some] = static_cast<int32_t>(i);
    some += on;
  }
#endif
  return some;
}

// Bit i: value i of 64 is not zero.
inline uint64_t alive_bits(const float* values) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < 64; i += W)
    bits |= uint64_t(_mm512_cmp_ps_mask(load(values + i), _mm512_setzero_ps(), _CMP_NEQ_UQ)) << i;
#elif defined(__AVX2__)
  for (int i = 0; i < 64; i += W) {
    Vec on = _mm256_cmp_ps(load(values + i), _mm256_setzero_ps(), _CMP_NEQ_UQ);
    bits |= static_cast<uint64_t>(_mm256_movemask_ps(on)) << i;
  }
#else
  for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(values[i] != 0.f) << i;
#endif
  return bits;
}

}  // namespace
