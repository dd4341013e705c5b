// Bodies of the delta kernels; included once by each delta_<isa>.cpp, all in an anonymous namespace.
//
// The quantisers and plane shuffles are plain loops that the compiler vectorises at every level with the
// same result (no FMA contraction, integer max instead of float max). Gather and expand need intrinsics:
// compress in registers and store whole vectors, because vpcompressd to memory is microcoded on Zen 4.
#pragma once
#include <cstring>

#include "cpu/delta.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace autoflip {
namespace {

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

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
      for (int i = 0; i < 4; ++i)
        word |= uint64_t(_mm512_cmp_ps_mask(_mm512_loadu_ps(p + 16 * i), _mm512_setzero_ps(), _CMP_NEQ_UQ))
                << 16 * i;
#elif defined(__AVX2__)
      for (int i = 0; i < 8; ++i) {
        const __m256 hit = _mm256_cmp_ps(_mm256_loadu_ps(p + 8 * i), _mm256_setzero_ps(), _CMP_NEQ_UQ);
        word |= uint64_t(uint32_t(_mm256_movemask_ps(hit))) << 8 * i;
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

int64_t count(const uint64_t* words, int64_t num_words) {
  int64_t total = 0;
  for (int64_t i = 0; i < num_words; ++i) total += __builtin_popcountll(words[i]);
  return total;
}

// --- gather and expand

// One word's worth of entries without vectors: also the tail of every tensor.
inline int64_t gather_word(const float* x, const float* base, uint64_t word, int64_t size, uint32_t& bad,
                           float* out) {
  for (int64_t i = 0; i < size; ++i) {
    const float d = base ? x[i] - base[i] : x[i];
    bad |= (bits_of(d) & 0x7F800000u) == 0x7F800000u;
  }
  int64_t rank = 0;
  for (; word; word &= word - 1) {
    const int i = __builtin_ctzll(word);
    out[rank++] = base ? x[i] - base[i] : x[i];
  }
  return rank;
}

#if defined(__AVX512F__)
template <bool kBase>
bool gather_vectors(const float* x, const float* base, const uint64_t* words, int64_t n, int64_t kept,
                    float* out) {
  __mmask16 bad = 0;
  int64_t rank = 0;
  const int64_t full = n / 64;
  for (int64_t w = 0; w < full; ++w) {
    uint64_t word = words[w];
    const float* p = x + 64 * w;
    for (int i = 0; i < 4; ++i, word >>= 16) {
      __m512 d = _mm512_loadu_ps(p + 16 * i);
      if (kBase) d = _mm512_sub_ps(d, _mm512_loadu_ps(base + 64 * w + 16 * i));
      bad |= _mm512_fpclass_ps_mask(d, 0x99);  // quiet and signalling NaN, both infinities
      const __mmask16 m = __mmask16(word);
      const int hits = __builtin_popcount(m);
      const __m512 dense = _mm512_maskz_compress_ps(m, d);
      if (rank + 16 <= kept)
        _mm512_storeu_ps(out + rank, dense);
      else
        _mm512_mask_storeu_ps(out + rank, __mmask16((1u << hits) - 1), dense);
      rank += hits;
    }
  }
  uint32_t tail = bad != 0;
  if (n % 64)
    gather_word(x + 64 * full, kBase ? base + 64 * full : nullptr, words[full], n % 64, tail, out + rank);
  return tail;
}

bool gather(const float* x, const float* base, const uint64_t* words, int64_t n, int64_t kept, float* out) {
  return base ? gather_vectors<true>(x, base, words, n, kept, out)
              : gather_vectors<false>(x, base, words, n, kept, out);
}
#elif defined(__AVX2__)
// Lane numbers of the set bits of m, packed to the left.
inline __m256i lanes_of(uint32_t m) {
  const uint64_t bytes = _pdep_u64(m, 0x0101010101010101ULL) * 0xFF;
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(_pext_u64(0x0706050403020100ULL, bytes))));
}

bool gather(const float* x, const float* base, const uint64_t* words, int64_t n, int64_t kept, float* out) {
  const __m256i exponent = _mm256_set1_epi32(0x7F800000);
  __m256i bad = _mm256_setzero_si256();
  int64_t rank = 0;
  const int64_t full = n / 64;
  for (int64_t w = 0; w < full; ++w) {
    uint64_t word = words[w];
    for (int i = 0; i < 8; ++i, word >>= 8) {
      __m256 d = _mm256_loadu_ps(x + 64 * w + 8 * i);
      if (base) d = _mm256_sub_ps(d, _mm256_loadu_ps(base + 64 * w + 8 * i));
      const __m256i field = _mm256_and_si256(_mm256_castps_si256(d), exponent);
      bad = _mm256_or_si256(bad, _mm256_cmpeq_epi32(field, exponent));
      uint32_t m = uint32_t(word & 0xFF);
      if (rank + 8 <= kept) {
        _mm256_storeu_ps(out + rank, _mm256_permutevar8x32_ps(d, lanes_of(m)));
        rank += __builtin_popcount(m);
      } else {
        float lanes[8];
        _mm256_storeu_ps(lanes, d);
        for (; m; m &= m - 1) out[rank++] = lanes[__builtin_ctz(m)];
      }
    }
  }
  uint32_t tail = !_mm256_testz_si256(bad, bad);
  if (n % 64)
    gather_word(x + 64 * full, base ? base + 64 * full : nullptr, words[full], n % 64, tail, out + rank);
  return tail;
}
#else
bool gather(const float* x, const float* base, const uint64_t* words, int64_t n, int64_t, float* out) {
  uint32_t bad = 0;
  for (int64_t start = 0; start < n; start += 64)
    out += gather_word(x + start, base ? base + start : nullptr, words[start / 64], lesser(64, n - start),
                       bad, out);
  return bad;
}
#endif

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

template <bool kAdd>
void expand_any(const float* values, const uint64_t* words, int64_t n, int64_t kept, float weight,
                float* out) {
  int64_t rank = 0, start = 0;
#if defined(__AVX512F__)
  const __m512 factor = _mm512_set1_ps(weight);
  for (; start + 64 <= n; start += 64) {
    uint64_t word = words[start / 64];
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
      } else {
        _mm512_storeu_ps(p, _mm512_maskz_expand_ps(m, dense));
      }
    }
  }
#else
  (void)kept;
#endif
  for (; start < n; start += 64)
    rank += expand_word<kAdd>(values + rank, words[start / 64], lesser(64, n - start), weight, out + start);
}

void expand(const float* values, const uint64_t* words, int64_t n, int64_t kept, float* out) {
  expand_any<false>(values, words, n, kept, 1.0f, out);
}

void expand_add(const float* values, const uint64_t* words, int64_t n, int64_t kept, float weight,
                float* out) {
  expand_any<true>(values, words, n, kept, weight, out);
}

// --- values

inline uint32_t mix(uint32_t x) {  // lowbias32
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ x >> 16;
}

inline uint32_t random_bits(uint32_t rank, uint32_t key0, uint32_t key1) {
  return mix(mix(rank + key0) ^ key1);
}

void quantise_block(const float* x, int size, int levels, float largest, uint32_t key0, uint32_t key1,
                    uint32_t first, int8_t* codes, float* scale_out) {
  int32_t top = 0;  // the order of finite non-negative floats is that of their bits
  for (int i = 0; i < size; ++i) {
    const int32_t magnitude = int32_t(bits_of(x[i]) & 0x7FFFFFFFu);
    top = magnitude > top ? magnitude : top;
  }
  float scale = 0, inverse = 0;
  if (top) {
    scale = float_of(uint32_t(top)) / float(levels);
    const float tiny = 1.17549435e-38f;
    scale = scale < tiny ? tiny : scale > largest ? largest : scale;
    inverse = 1.0f / scale;
  }
  *scale_out = scale;
  for (int i = 0; i < size; ++i) {
    const float y = x[i] * inverse;
    const int32_t cut = int32_t(y);
    const int32_t low = cut - (float(cut) > y);
    const float u =
        float(int32_t(random_bits(first + uint32_t(i), key0, key1) >> 8)) * 5.9604644775390625e-08f;
    int32_t code = low + (u < y - float(low));
    code = code > levels ? levels : code;
    codes[i] = int8_t(code < -levels ? -levels : code);
  }
}

void quantise(const float* values, int64_t n, int levels, float largest, uint32_t key0, uint32_t key1,
              int64_t first, int8_t* codes, float* scales) {
  int64_t i = 0;
  for (; i + kDeltaBlock <= n; i += kDeltaBlock)  // a constant size lets the compiler unroll
    quantise_block(values + i, kDeltaBlock, levels, largest, key0, key1, uint32_t(first + i), codes + i,
                   scales++);
  if (i < n)
    quantise_block(values + i, int(n - i), levels, largest, key0, key1, uint32_t(first + i), codes + i,
                   scales);
}

void dequantise(const int8_t* codes, const float* scales, int64_t n, float* values) {
  for (int64_t start = 0; start < n; start += kDeltaBlock) {
    const float scale = scales[start / kDeltaBlock];
    const int64_t size = lesser(kDeltaBlock, n - start);
    for (int64_t i = 0; i < size; ++i) values[start + i] = float(codes[start + i]) * scale;
  }
}

void round_bf16(const float* values, int64_t n, uint32_t key0, uint32_t key1, int64_t first,
                uint16_t* words) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(values[i]);
    const uint32_t up = (bits + (random_bits(uint32_t(first + i), key0, key1) >> 16)) >> 16;
    words[i] = uint16_t((up & 0x7F80u) == 0x7F80u ? bits >> 16 : up);  // finite stays finite
  }
}

void split2(const uint16_t* values, int64_t n, uint8_t* planes) {
  for (int64_t i = 0; i < n; ++i) planes[i] = uint8_t(values[i]);
  for (int64_t i = 0; i < n; ++i) planes[n + i] = uint8_t(values[i] >> 8);
}

void split4(const uint32_t* values, int64_t n, uint8_t* planes) {
  for (int b = 0; b < 4; ++b)
    for (int64_t i = 0; i < n; ++i) planes[b * n + i] = uint8_t(values[i] >> 8 * b);
}

void merge2(const uint8_t* planes, int64_t n, uint16_t* values) {
  for (int64_t i = 0; i < n; ++i) values[i] = uint16_t(planes[i] | planes[n + i] << 8);
}

void merge4(const uint8_t* planes, int64_t n, uint32_t* values) {
  for (int64_t i = 0; i < n; ++i)
    values[i] = planes[i] | uint32_t(planes[n + i]) << 8 | uint32_t(planes[2 * n + i]) << 16 |
                uint32_t(planes[3 * n + i]) << 24;
}

// --- Rice codes

template <class Each>
inline void each_gap(const uint64_t* words, int64_t num_words, Each each) {
  int64_t next = 0;  // the position that a gap of zero would mean
  for (int64_t w = 0; w < num_words; ++w)
    for (uint64_t word = words[w]; word; word &= word - 1) {
      const int64_t position = 64 * w + __builtin_ctzll(word);
      each(uint64_t(position - next));
      next = position + 1;
    }
}

int64_t rice_bits(const uint64_t* words, int64_t num_words, int k) {
  int64_t total = 0;
  each_gap(words, num_words, [&](uint64_t gap) {
    const uint64_t ones = gap >> k;
    total += ones < kRiceEscape ? int64_t(ones) + 1 + k : kRiceEscape + 32;
  });
  return total;
}

void rice_encode(const uint64_t* words, int64_t num_words, int k, uint8_t* out, int64_t out_bytes) {
  uint64_t hold = 0;
  int filled = 0;
  int64_t at = 0;
  each_gap(words, num_words, [&](uint64_t gap) {
    const uint64_t ones = gap >> k;
    uint64_t code;
    int size;
    if (ones < kRiceEscape) {
      code = ((1ULL << ones) - 1) | (gap & ((1ULL << k) - 1)) << (ones + 1);
      size = int(ones) + 1 + k;
    } else {
      code = ((1ULL << kRiceEscape) - 1) | gap << kRiceEscape;
      size = kRiceEscape + 32;
    }
    hold |= code << filled;
    if (filled + size >= 64) {
      std::memcpy(out + at, &hold, 8);
      at += 8;
      hold = code >> (64 - filled);  // size <= 56, so filled >= 8 here
      filled += size - 64;
    } else {
      filled += size;
    }
  });
  std::memcpy(out + at, &hold, size_t(out_bytes - at));
}

int64_t rice_decode(const uint8_t* data, int64_t bytes, int64_t n, int64_t kept, int k, uint64_t* words) {
  const int64_t end = 8 * bytes;
  int64_t at = 0, next = 0;
  for (int64_t j = 0; j < kept; ++j) {
    const int64_t byte = at >> 3;
    uint64_t window = 0;  // 57 bits or more; past the end there are zeros
    if (byte < bytes) std::memcpy(&window, data + byte, size_t(lesser(8, bytes - byte)));
    window >>= at & 7;
    const int ones = ~window ? __builtin_ctzll(~window) : 64;
    uint64_t gap;
    if (ones < kRiceEscape) {
      gap = uint64_t(ones) << k | ((window >> (ones + 1)) & ((1ULL << k) - 1));
      at += ones + 1 + k;
    } else {
      gap = (window >> kRiceEscape) & 0xFFFFFFFFu;
      at += kRiceEscape + 32;
    }
    if (at > end) return kShort;
    if (gap >= uint64_t(n - next)) return kRange;
    next += int64_t(gap) + 1;
    words[(next - 1) >> 6] |= 1ULL << ((next - 1) & 63);
  }
  const int64_t used = (at + 7) >> 3;
  if ((at & 7) && data[used - 1] >> (at & 7)) return kPadding;
  return used;
}

int64_t varint_encode(const uint64_t* words, int64_t num_words, uint8_t* out) {
  int64_t at = 0;
  each_gap(words, num_words, [&](uint64_t gap) {
    for (; gap >= 0x80; gap >>= 7, ++at)
      if (out) out[at] = uint8_t(gap | 0x80);
    if (out) out[at] = uint8_t(gap);
    ++at;
  });
  return at;
}

int64_t varint_decode(const uint8_t* data, int64_t bytes, int64_t n, int64_t kept, uint64_t* words) {
  int64_t at = 0, next = 0;
  for (int64_t j = 0; j < kept; ++j) {
    uint64_t gap = 0;
    for (int shift = 0;; shift += 7) {
      if (at == bytes) return kShort;
      const uint8_t byte = data[at++];
      gap |= uint64_t(byte & 0x7F) << shift;
      if (byte < 0x80) {
        if (byte == 0 && shift) return kLong;  // the shortest form only
        break;
      }
      if (shift == 56) return kLong;
    }
    if (gap >= uint64_t(n - next)) return kRange;
    next += int64_t(gap) + 1;
    words[(next - 1) >> 6] |= 1ULL << ((next - 1) & 63);
  }
  return at;
}

constexpr DeltaKernels kTable = {
    pack,   pack_nonzero, count,  gather, expand,    expand_add,  quantise,    dequantise,    round_bf16,
    split2, split4,       merge2, merge4, rice_bits, rice_encode, rice_decode, varint_encode, varint_decode};

}  // namespace
}  // namespace autoflip
