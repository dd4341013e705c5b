#include <immintrin.h>

#include "common/cpu.h"
#include "cpu/ans_rows.h"

// GCC 12 takes the undefined lanes of its own intrinsics for a mistake of ours (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace autoflip {
namespace {

constexpr int kBits = 12, kRows = 4;  // rows whose bytes make a vector's lane full

inline __m512i byte_of(__m512i four, int i) {
  return _mm512_and_si512(_mm512_srli_epi32(four, unsigned(8 * i)), _mm512_set1_epi32(255));
}

// Of 64 bytes at once what `table` says of each: a gather takes the time of ten of these.
__attribute__((target("avx512vbmi"), noinline)) __m512i bytes_of(const uint8_t* table, __m512i at) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), at, _mm512_loadu_si512(table + 64));
  const __m512i high =
      _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), at, _mm512_loadu_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(at), low, high);
}

inline __m512i lookup(const uint32_t* table, __m512i at) { return _mm512_i32gather_epi32(at, table, 4); }

// Where the 16 lanes from `first` on begin.
inline __m512i begins(int64_t rows, int first) {
  const __m512i lane = _mm512_add_epi32(
      _mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  return _mm512_mullo_epi32(lane, _mm512_set1_epi32(int(rows)));
}

}  // namespace

int64_t ans_decode_rows(const AnsLanes& lanes, int64_t rows, const uint8_t*& from, const uint8_t* end,
                        uint8_t* out) {
  const __m512i low12 = _mm512_set1_epi32((1 << kBits) - 1), one = _mm512_set1_epi32(1),
                least = _mm512_set1_epi32(1 << 16);
  __m512i x[2], table[2], place[2];
  for (int g = 0; g < 2; ++g) {
    x[g] = _mm512_loadu_si512(lanes.states + 16 * g);
    table[g] = _mm512_loadu_si512(lanes.tables + 16 * g);
    place[g] = begins(rows, 16 * g);
  }
  const uint8_t* word = from;
  int64_t r = 0;
  for (; r + kRows <= rows && end - word >= kRows * 64; r += kRows) {
    __m512i beside[2], symbols[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    if (lanes.companion)
      for (int g = 0; g < 2; ++g) beside[g] = _mm512_i32gather_epi32(place[g], lanes.companion + r, 1);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int g = 0; g < 2; ++g) {
        if (lanes.companion) table[g] = lookup(lanes.offsets, byte_of(beside[g], i));
        const __m512i slot = lookup(lanes.slots, _mm512_add_epi32(table[g], _mm512_and_si512(x[g], low12)));
        const __m512i symbol = byte_of(slot, 0);
        symbols[g] = _mm512_or_si512(symbols[g], _mm512_slli_epi32(symbol, unsigned(8 * i)));
        if (!lanes.companion) table[g] = lookup(lanes.offsets, symbol);
        const __m512i freq = _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(slot, 8), low12), one);
        x[g] = _mm512_add_epi32(_mm512_mullo_epi32(freq, _mm512_srli_epi32(x[g], kBits)),
                                _mm512_srli_epi32(slot, 20));
        const __mmask16 low = _mm512_cmplt_epu32_mask(x[g], least);
        const __m512i words =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(word)));
        x[g] = _mm512_mask_or_epi32(x[g], low, _mm512_slli_epi32(x[g], 16),
                                    _mm512_maskz_expand_epi32(low, words));
        word += 2 * __builtin_popcount(low);
      }
    for (int g = 0; g < 2; ++g) _mm512_i32scatter_epi32(out + r, place[g], symbols[g], 1);
  }
  for (int g = 0; g < 2; ++g) {
    _mm512_storeu_si512(lanes.states + 16 * g, x[g]);
    _mm512_storeu_si512(lanes.tables + 16 * g, table[g]);
  }
  from = word;
  return r;
}

int64_t ans_encode_rows(uint32_t* states, const uint32_t* packed, const uint32_t* offsets, const uint8_t* raw,
                        const uint8_t* companion, int64_t rows, uint8_t*& end) {
  const __m512i low12 = _mm512_set1_epi32((1 << kBits) - 1), scale = _mm512_set1_epi32(1 << kBits);
  const __m512 under = _mm512_set1_ps(1.0f - 1.0f / (1 << 21));
  __m512i x[2] = {_mm512_loadu_si512(states), _mm512_loadu_si512(states + 16)};
  const __m512i place[2] = {begins(rows, 0), begins(rows, 16)};
  const uint8_t* known = companion ? companion : raw - 1;
  const bool fast = expands_bytes();
  uint8_t classes[256];
  for (int b = 0; b < 256; ++b) classes[b] = uint8_t(offsets[b] / 256);
  uint8_t* to = end;
  int64_t r = rows;
  for (; r - kRows >= 1; r -= kRows) {  // row 0 may have no byte before
    __m512i symbols[2], before[2];
    for (int g = 0; g < 2; ++g) {
      symbols[g] = _mm512_i32gather_epi32(place[g], raw + r - kRows, 1);
      before[g] = _mm512_i32gather_epi32(place[g], known + r - kRows, 1);
      if (fast) before[g] = bytes_of(classes, before[g]);
    }
#pragma GCC unroll 4
    for (int i = kRows - 1; i >= 0; --i)
#pragma GCC unroll 2
      for (int g = 1; g >= 0; --g) {
        const __m512i held = byte_of(before[g], i);
        const __m512i table = fast ? _mm512_slli_epi32(held, 8) : lookup(offsets, held);
        const __m512i step = lookup(packed, _mm512_add_epi32(table, byte_of(symbols[g], i)));
        const __m512i freq = _mm512_srli_epi32(step, kBits), start = _mm512_and_si512(step, low12);
        const __mmask16 full = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(x[g], 32 - kBits), freq);
        const int count = __builtin_popcount(full);
        to -= 2 * count;
        _mm256_mask_storeu_epi16(to, __mmask16((1u << count) - 1),
                                 _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(full, x[g])));
        x[g] = _mm512_mask_srli_epi32(x[g], full, x[g], 16);
        // x / freq is below 2^20, and off by 3 parts in 2^24 in floats: with 8 parts less at most one too
        // few. What does not wait for the states comes first.
        const __m512 inverse = _mm512_div_ps(under, _mm512_cvtepi32_ps(freq));
        const __m512i once_more = _mm512_sub_epi32(scale, freq);
        const __m512i q = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_cvtepu32_ps(x[g]), inverse));
        const __m512i rest = _mm512_sub_epi32(x[g], _mm512_mullo_epi32(q, freq));
        const __mmask16 few = _mm512_cmpge_epi32_mask(rest, freq);
        x[g] = _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(q, kBits), start), rest);
        x[g] = _mm512_mask_add_epi32(x[g], few, x[g], once_more);
      }
  }
  _mm512_storeu_si512(states, x[0]);
  _mm512_storeu_si512(states + 16, x[1]);
  end = to;
  return r;
}

}  // namespace autoflip
