// Where a byte of mask sends eight lanes: instead of AVX-512's compress and expand.
#pragma once
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>

namespace {

// For each byte of mask its set bits' numbers, packed to the left, and under each set bit its rank among
// them, 8 under the others. Tables, since Zen 1 and 2 take pext and pdep apart bit by bit.
struct LaneTables {
  uint64_t lanes[256] = {}, ranks[256] = {};

  constexpr LaneTables() {
    for (uint32_t m = 0; m < 256; ++m)
      for (uint32_t bit = 0, rank = 0; bit < 8; ++bit) {
        const bool set = m >> bit & 1;
        if (set) lanes[m] |= uint64_t(bit) << 8 * rank;
        ranks[m] |= uint64_t(set ? rank++ : 8) << 8 * bit;
      }
  }
};
alignas(64) constexpr LaneTables kLaneTables;

inline __m256i lanes_of(uint32_t m) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneTables.lanes + m)));
}

inline __m256i ranks_of(uint32_t m) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneTables.ranks + m)));
}

}  // namespace
#endif
