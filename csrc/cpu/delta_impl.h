// Bodies of the delta kernels; included once by each delta_<isa>.cpp, all in an anonymous namespace.
//
#pragma once
#include "cpu/delta_bits.h"
#include "cpu/delta_gather.h"
#include "cpu/delta_index.h"
#include "cpu/delta_values.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace autoflip {
namespace {

// --- masks to words

void pack(const uint8_t* mask, int64_t n, uint64_t* words) {
  for (int64_t start = 0; start < n; start += 64) {
    const int64_t size = lesser(64, n - start);
    uint64_t word = 0;
    if (size == 64) {
#if defined(__AVX512BW__)
      const __m512i bytes = _mm512_loadu_si512(mask + start);
      word = _mm512_test_epi8_mask(bytes, bytes);
#else
      for (int i = 0; i < 8; ++i) {
        uint64_t eight;
        std::memcpy(&eight, mask + start + 8 * i, 8);
        // byte j of eight, 0 or 1, lands on bit 56 + j; no two products meet
        word |= (eight * 0x0102040810204080ULL >> 56) << (8 * i);
      }
#endif
    } else {
      for (int64_t i = 0; i < size; ++i) word |= uint64_t(mask[start + i] & 1) << i;
    }
    words[start / 64] = word;
  }
}

void pack_nonzero(const float* x, int64_t n, uint64_t* words) {
  for (int64_t start = 0; start < n; start += 64) {
    const int64_t size = lesser(64, n - start);
    const float* p = x + start;
    uint64_t word = 0;
    if (size == 64) {
#if defined(__AVX512F__)
      for (int i = 0; i < 4; ++i) {
        word |= uint64_t(_mm512_cmp_ps_mask(_mm512_loadu_ps(p + 16 * i), _mm512_setzero_ps(), _CMP_NEQ_UQ))
                << 16 * i;
      }
#elif defined(__AVX2__)
      for (int i = 0; i < 8; ++i) {
        const __m256 hit = _mm256_cmp_ps(_mm256_loadu_ps(p + 8 * i), _mm256_setzero_ps(), _CMP_NEQ_UQ);
        word |= uint64_t(uint32_t(_mm256_movemask_ps(hit))) << 8 * i;
      }
#elif defined(__SSE2__)
      const auto four = [&](int i) {
        return _mm_castps_si128(_mm_cmpneq_ps(_mm_loadu_ps(p + i), _mm_setzero_ps()));
      };
      for (int i = 0; i < 64; i += 16) {
        const __m128i low = _mm_packs_epi32(four(i), four(i + 4)),
                      high = _mm_packs_epi32(four(i + 8), four(i + 12));
        word |= uint64_t(uint32_t(_mm_movemask_epi8(_mm_packs_epi16(low, high)))) << i;
      }
#else
      for (int i = 0; i < 64; ++i) word |= uint64_t(p[i] != 0.0f) << i;
#endif
    } else {
      for (int64_t i = 0; i < size; ++i) word |= uint64_t(p[i] != 0.0f) << i;
    }
    words[start / 64] = word;
  }
}

void within(const uint64_t* mask, int64_t num_words, const uint64_t* ranks, int64_t num_ranks, int64_t first,
            uint64_t* out) {
  for (int64_t w = 0; w < num_words; ++w) {
    uint64_t word = mask[w], bits = 0;
    if (first < num_ranks) {
      const int64_t at = first / 64, shift = first % 64;
      bits = ranks[at] >> shift;
      if (shift && 64 * (at + 1) < num_ranks) bits |= ranks[at + 1] << (64 - shift);
    }
    const int hits = set_bits(word);
    first += hits;
#if defined(__AVX512F__)
    out[w] = _pdep_u64(bits, word);
#else  // Zen 1 and 2 take pdep apart bit by bit; eight at a time as in positions()
    uint64_t chosen = 0;
    if (!(~bits & ((hits < 64 ? 1ULL << hits : 0) - 1))) chosen = word, word = 0;  // all of them
    while (word)
      for (int i = 0; i < 8; ++i, bits >>= 1) {
        const uint64_t low = word & -word;
        chosen |= low & (0 - (bits & 1));
        word ^= low;
      }
    out[w] = chosen;
#endif
  }
}

// --- expand

template <bool kAdd>
inline int64_t expand_word(const float* values, uint64_t word, int64_t size, float weight, float* out) {
  if (!kAdd) std::memset(out, 0, size_t(size) * 4);
  int64_t rank = 0;
  for (; word; word &= word - 1) {
    const int i = __builtin_ctzll(word);
    if (kAdd)
      out[i] += weight * values[rank++];
    else
      out[i] = values[rank++];
  }
  return rank;
}

// Of 64 entries so few are added one by one where eight lanes are all that a vector has.
constexpr int64_t kOneByOne = 5;

// Values are read in whole vectors while `kept` says that they are there. nt: stores go around the caches,
// and the caller fences them.
template <bool kAdd>
void expand_any(const float* values, const uint64_t* words, int64_t n, int64_t kept, float weight, bool nt,
                float* out) {
  int64_t rank = 0, start = 0;
#if defined(__AVX512F__)
  const __m512 factor = _mm512_set1_ps(weight);
  for (; start + 64 <= n; start += 64) {
    uint64_t word = words[start / 64];
    if (kAdd && !word) continue;
    for (int i = 0; i < 4; ++i, word >>= 16) {
      const __mmask16 m = __mmask16(word);
      const int hits = __builtin_popcount(m);
      float* p = out + start + 16 * i;
      __m512 dense = rank + 16 <= kept ? _mm512_loadu_ps(values + rank)
                                       : _mm512_maskz_loadu_ps(__mmask16((1u << hits) - 1), values + rank);
      rank += hits;
      if (kAdd) {
        const __m512 old = _mm512_loadu_ps(p);
        dense = _mm512_maskz_expand_ps(m, _mm512_mul_ps(dense, factor));
        _mm512_storeu_ps(p, _mm512_mask_add_ps(old, m, old, dense));
      } else if (nt) {
        _mm512_stream_ps(p, _mm512_maskz_expand_ps(m, dense));
      } else {
        _mm512_storeu_ps(p, _mm512_maskz_expand_ps(m, dense));
      }
    }
  }
#elif defined(__AVX2__)
  const __m256 factor = _mm256_set1_ps(weight);
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (; start + 64 <= n && rank + 64 <= kept; start += 64) {
    uint64_t word = words[start / 64];
    if (kAdd && set_bits(word) <= kOneByOne) {
      rank += expand_word<true>(values + rank, word, 64, weight, out + start);
      continue;
    }
    for (int i = 0; i < 8; ++i, word >>= 8) {
      const uint32_t m = word & 0xFF;
      float* p = out + start + 8 * i;
      const __m256i hit = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(m)), bit), bit);
      __m256 dense = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values + rank), ranks_of(m));
      rank += __builtin_popcount(m);
      if (kAdd) {
        const __m256 old = _mm256_loadu_ps(p);
        dense = _mm256_add_ps(old, _mm256_mul_ps(dense, factor));
        _mm256_storeu_ps(p, _mm256_blendv_ps(old, dense, _mm256_castsi256_ps(hit)));
      } else if (nt) {
        _mm256_stream_ps(p, _mm256_and_ps(dense, _mm256_castsi256_ps(hit)));
      } else {
        _mm256_storeu_ps(p, _mm256_and_ps(dense, _mm256_castsi256_ps(hit)));
      }
    }
  }
#else
  (void)kept, (void)nt;
#endif
  for (; start < n; start += 64)
    rank += expand_word<kAdd>(values + rank, words[start / 64], lesser(64, n - start), weight, out + start);
}

void expand(const float* values, const uint64_t* words, int64_t n, int64_t kept, float* out) {
  expand_any<false>(values, words, n, kept, 1.0f, false, out);
}

void expand_add(const float* values, const uint64_t* words, int64_t n, int64_t kept, float weight,
                float* out) {
  expand_any<true>(values, words, n, kept, weight, false, out);
}

}  // namespace
}  // namespace autoflip

#include "cpu/delta_stream.h"

namespace autoflip {
namespace {

constexpr DeltaKernels kTable = {pack,      pack_nonzero, count,       within,        gather,
                                 expand,    expand_add,   quantise,    dequantise,    round_bf16,
                                 encode,    decode,       decode_add,  code_values,   drop_zeros,
                                 valid,     split2,       split4,      merge2,        merge4,
                                 rice_bits, rice_encode,  rice_decode, varint_encode, varint_decode};

}  // namespace
}  // namespace autoflip
