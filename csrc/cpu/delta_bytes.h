// 64 entries of a tensor at a time, as bytes (AVX-512 VBMI2). Included for AVX-512 only, where
// expands_bytes().
#pragma once
#include <immintrin.h>

#include "common/cpu.h"
#include "cpu/delta_bits.h"

// GCC 12 takes the undefined lanes of its own intrinsics for a mistake of ours (its bug 105593)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace autoflip {
namespace {

// int8 codes to floats: vpexpandb spreads the codes under their mask while they are bytes, and only then they
// become floats. As decode_any, for whole words; returns the rank behind them.
template <bool kAdd>
__attribute__((target("avx512vbmi2"))) int64_t expand_codes(const DeltaCoding& c, const uint64_t* words,
                                                            int64_t num_words, int64_t rank, float weight,
                                                            bool nt, float* out) {
  const __m512 factor = _mm512_set1_ps(weight);
  const bool ahead = kAdd && fetches_ahead();
  for (int64_t w = 0; w < num_words; ++w, out += 64) {
    const uint64_t word = words[w];
    if (ahead)  // 200 MB at density 0.2 took 15.5 ms with it and 18.7 without (Emerald Rapids)
      for (int i = 0; i < 64; i += 16)
        _mm_prefetch(reinterpret_cast<const char*>(out + i + kAhead), _MM_HINT_T0);
    if (kAdd && !word) continue;
    const int hits = __builtin_popcountll(word), left = int(kDeltaBlock - rank % kDeltaBlock);
    const float* scales = c.scales + rank / kDeltaBlock;
    const __m512 scale = _mm512_set1_ps(hits ? scales[0] : 0.0f);
    uint64_t later = 0;  // entries whose codes lie in the next block
    if (hits > left) later = word & ~_pdep_u64((1ULL << left) - 1, word);
    const __m512i dense = _mm512_maskz_loadu_epi8(_bzhi_u64(~0ULL, uint32_t(hits)), c.streams[0] + rank);
    const __m512i wide = _mm512_maskz_expand_epi8(word, dense);
    const __m128i quarter[4] = {_mm512_castsi512_si128(wide), _mm512_extracti32x4_epi32(wide, 1),
                                _mm512_extracti32x4_epi32(wide, 2), _mm512_extracti32x4_epi32(wide, 3)};
    for (int i = 0; i < 4; ++i) {
      float* p = out + 16 * i;
      const __m512 codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter[i]));
      __m512 values = _mm512_mul_ps(codes, scale);
      if (later)
        values = _mm512_mask_mul_ps(values, __mmask16(later >> 16 * i), codes, _mm512_set1_ps(scales[1]));
      if (kAdd) {
        const __m512 old = _mm512_loadu_ps(p);
        const __mmask16 kept = __mmask16(word >> 16 * i);
        _mm512_storeu_ps(p, _mm512_mask_add_ps(old, kept, old, _mm512_mul_ps(values, factor)));
      } else if (nt) {
        _mm512_stream_ps(p, values);
      } else {
        _mm512_storeu_ps(p, values);
      }
    }
    rank += hits;
  }
  return rank;
}

// As varint_encode: inside a word no gap needs a second byte, only that before its first bit may.
__attribute__((target("avx512vbmi,avx512vbmi2"))) int64_t varint_words(const uint64_t* words,
                                                                       int64_t num_words, uint64_t skipped,
                                                                       uint8_t* out) {
  alignas(64) uint8_t count[64];
  for (int i = 0; i < 64; ++i) count[i] = uint8_t(i);
  const __m512i places = _mm512_load_si512(count), one = _mm512_set1_epi8(1);
  const __m512i left = _mm512_sub_epi8(places, one);  // lane i takes lane i - 1
  uint8_t* to = out;
  for (int64_t w = 0; w < num_words; ++w) {
    const uint64_t word = words[w];
    if (!word) {
      skipped += 64;
      continue;
    }
    const __m512i set = _mm512_maskz_compress_epi8(word, places);
    const __m512i gaps = _mm512_sub_epi8(_mm512_sub_epi8(set, _mm512_permutexvar_epi8(left, set)), one);
    uint64_t first = skipped + uint64_t(__builtin_ctzll(word));
    for (; first >= 0x80; first >>= 7) *to++ = uint8_t(first | 0x80);
    _mm512_storeu_si512(to, gaps);
    *to = uint8_t(first);
    to += __builtin_popcountll(word);
    skipped = uint64_t(__builtin_clzll(word));
  }
  return to - out;
}

}  // namespace
}  // namespace autoflip

#pragma GCC diagnostic pop
