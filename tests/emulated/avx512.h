// AVX-512 out of AVX2, by SIMDe (cxx.py says how it is used): what its headers lack, or do otherwise than the
// CPU.
#pragma once
#include <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <cstdint>
#include <cstring>

#include "simde/x86/avx512.h"
#include "simde/x86/avx512/dpbf16.h"

// Only now: GCC's headers take these as leave to use the instructions.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#ifdef EMULATED_BF16
#define __AVX512BF16__ 1
#endif

namespace emulated {

// A whole vector from memory would read, and to memory write, where the mask says not to: beyond a page, or
// what another thread writes.
template <class Vector, class Lane>
inline Vector load(uint64_t mask, const void* from) {
  Lane lanes[sizeof(Vector) / sizeof(Lane)] = {};
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(Lane); ++i)
    if (mask >> i & 1) std::memcpy(lanes + i, static_cast<const Lane*>(from) + i, sizeof(Lane));
  Vector out;
  std::memcpy(&out, lanes, sizeof out);
  return out;
}

template <class Lane, class Vector>
inline void store(void* to, uint64_t mask, Vector value) {
  Lane lanes[sizeof(Vector) / sizeof(Lane)];
  std::memcpy(lanes, &value, sizeof value);
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(Lane); ++i)
    if (mask >> i & 1) std::memcpy(static_cast<Lane*>(to) + i, lanes + i, sizeof(Lane));
}

inline void stream(float* to, __m512 value) {
  if (reinterpret_cast<uintptr_t>(to) % 64) __builtin_trap();  // as the CPU does
  std::memcpy(to, &value, sizeof value);
}

inline __m512i gather(__m512i at, const void* base, int scale) {
  int32_t index[16], lanes[16];
  std::memcpy(index, &at, sizeof at);
  for (int i = 0; i < 16; ++i)
    std::memcpy(lanes + i, static_cast<const char*>(base) + static_cast<int64_t>(index[i]) * scale, 4);
  __m512i out;
  std::memcpy(&out, lanes, sizeof out);
  return out;
}

inline void scatter(void* base, __m512i at, __m512i value, int scale) {
  int32_t index[16], lanes[16];
  std::memcpy(index, &at, sizeof at);
  std::memcpy(lanes, &value, sizeof value);
  for (int i = 0; i < 16; ++i)
    std::memcpy(static_cast<char*>(base) + static_cast<int64_t>(index[i]) * scale, lanes + i, 4);
}

inline __mmask16 both(__m128i a, __m128i b) {
  __m128i none = _mm_cmpeq_epi8(_mm_and_si128(a, b), _mm_setzero_si128());
  return static_cast<__mmask16>(~_mm_movemask_epi8(none));
}

inline __mmask16 below(__m512i a, __m512i b) {
  uint32_t x[16], y[16];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(x[i] < y[i]) << i;
  return static_cast<__mmask16>(mask);
}

// To the nearest, ties to even; denormals become zero and NaN quiet.
inline __m256bh to_bf16(__m512 value) {
  uint32_t from[16];
  uint16_t to[16];
  std::memcpy(from, &value, sizeof value);
  for (int i = 0; i < 16; ++i) {
    uint32_t size = from[i] & 0x7fffffffu, high = from[i] >> 16;
    if (size > 0x7f800000u)
      to[i] = static_cast<uint16_t>(high | 0x40);
    else if (size < 0x00800000u)
      to[i] = static_cast<uint16_t>(high & 0x8000);
    else
      to[i] = static_cast<uint16_t>((from[i] + 0x7fff + (high & 1)) >> 16);
  }
  __m256bh out;
  std::memcpy(&out, to, sizeof out);
  return out;
}

}  // namespace emulated

// Macros, since SIMDe's names are: a name of its own there would be replaced in ours.
#undef _mm512_maskz_loadu_ps
#undef _mm512_maskz_loadu_epi8
#undef _mm_maskz_loadu_epi8
#undef _mm512_mask_storeu_ps
#undef _mm512_mask_storeu_epi32
#undef _mm256_mask_storeu_epi16
#undef _mm512_stream_ps
#undef _mm512_i32gather_epi32
#undef _mm512_i32scatter_epi32
#undef _mm512_mask_cmp_ps_mask
#undef _mm512_cmplt_epu32_mask
#undef _mm_test_epi8_mask
#undef _mm512_cvtneps_pbh
#define _mm512_maskz_loadu_ps(k, p) (emulated::load<__m512, float>(k, p))
#define _mm512_maskz_loadu_epi8(k, p) (emulated::load<__m512i, uint8_t>(k, p))
#define _mm_maskz_loadu_epi8(k, p) (emulated::load<__m128i, uint8_t>(k, p))
#define _mm512_mask_storeu_ps(p, k, v) emulated::store<float>(p, k, v)
#define _mm512_mask_storeu_epi32(p, k, v) emulated::store<int32_t>(p, k, v)
#define _mm256_mask_storeu_epi16(p, k, v) emulated::store<int16_t>(p, k, v)
#define _mm512_stream_ps(p, v) emulated::stream(p, v)
#define _mm512_i32gather_epi32(at, base, scale) emulated::gather(at, base, scale)
#define _mm512_i32scatter_epi32(base, at, v, scale) emulated::scatter(base, at, v, scale)
#define _mm512_mask_cmp_ps_mask(k, a, b, op) static_cast<__mmask16>((k) & _mm512_cmp_ps_mask(a, b, op))
#define _mm512_cmplt_epu32_mask(a, b) emulated::below(a, b)
#define _mm_test_epi8_mask(a, b) emulated::both(a, b)
#define _mm512_cvtneps_pbh(v) emulated::to_bf16(v)
#define target(...) unused  // in attributes: the compiler would use the real instructions
