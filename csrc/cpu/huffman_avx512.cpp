#include <immintrin.h>

#include <cstring>

#include "cpu/huffman.h"

// GCC 12 takes the undefined lanes of its own intrinsics for a mistake of ours (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace autoflip {
namespace {

// Low bytes of the codes; and their upper three bits under the length.
struct Tables {
  alignas(64) uint8_t low[256], high[256];
};

__attribute__((target("avx512vbmi"))) inline __m512i look(const uint8_t* table, __m512i at) {
  const __m512i below = _mm512_permutex2var_epi8(_mm512_load_si512(table), at, _mm512_load_si512(table + 64));
  const __m512i above =
      _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), at, _mm512_load_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(at), below, above);
}

// Codes of four bytes in a row, the last one lowest, in each 64-bit lane, and how many bits they have.
struct Fours {
  alignas(64) uint64_t codes[16], bits[16];
};

// `codes` and `lengths` of 32 bytes, 16 bits each
inline void join(__m512i codes, __m512i lengths, uint64_t* codes_out, uint64_t* bits_out) {
  const __m512i low16 = _mm512_set1_epi32(0xFFFF), low32 = _mm512_set1_epi64(0xFFFFFFFF);
  const __m512i second = _mm512_srli_epi32(lengths, 16);
  const __m512i two = _mm512_or_si512(_mm512_srli_epi32(codes, 16),
                                      _mm512_sllv_epi32(_mm512_and_si512(codes, low16), second));
  const __m512i bits = _mm512_add_epi32(_mm512_and_si512(lengths, low16), second);
  const __m512i later = _mm512_srli_epi64(bits, 32);
  _mm512_store_si512(codes_out, _mm512_or_si512(_mm512_srli_epi64(two, 32),
                                                _mm512_sllv_epi64(_mm512_and_si512(two, low32), later)));
  _mm512_store_si512(bits_out, _mm512_add_epi64(_mm512_and_si512(bits, low32), later));
}

__attribute__((target("avx512vbmi"))) inline void fours(const Tables& t, const uint8_t* raw, Fours& out) {
  const __m512i at = _mm512_loadu_si512(raw), none = _mm512_setzero_si512();
  const __m512i low = look(t.low, at), mixed = look(t.high, at);
  const __m512i high = _mm512_and_si512(mixed, _mm512_set1_epi8(7));
  const __m512i length = _mm512_and_si512(_mm512_srli_epi16(mixed, 4), _mm512_set1_epi8(15));
  // in each 128 bits: bytes 0 to 7, and 8 to 15
  join(_mm512_unpacklo_epi8(low, high), _mm512_unpacklo_epi8(length, none), out.codes, out.bits);
  join(_mm512_unpackhi_epi8(low, high), _mm512_unpackhi_epi8(length, none), out.codes + 8, out.bits + 8);
}

// where the j-th four of 64 bytes stands
constexpr int order(int j) { return 2 * (j / 4) + (j & 1) + (j & 2) * 4; }

struct Stream {
  uint8_t* to;
  uint64_t held = 0, filled = 0;
  inline void put(uint64_t code, uint64_t bits) {
    held |= code << filled;
    std::memcpy(to, &held, 8);
    filled += bits;
    held >>= filled & ~7ULL;
    to += filled >> 3;
    filled &= 7;
  }
};

}  // namespace

__attribute__((target("avx512vbmi"))) void huffman_present(const uint8_t* raw, int64_t n, uint8_t* there) {
  alignas(64) uint8_t absent[256];
  for (int s = 0; s < 256; ++s) absent[s] = there[s] ? 0 : 0x80;
  int64_t at = 0;
  for (; at + 64 <= n; at += 64)
    for (uint64_t m = _mm512_movepi8_mask(look(absent, _mm512_loadu_si512(raw + at))); m; m &= m - 1) {
      const uint8_t s = raw[at + __builtin_ctzll(m)];
      there[s] = 1, absent[s] = 0;
    }
  for (; at < n; ++at) there[raw[at]] = 1;
}

void huffman_streams(const uint8_t* raw, const int64_t* size, const HuffmanCodes& codes, uint8_t** to) {
  Tables t;
  for (int s = 0; s < 256; ++s) {
    t.low[s] = uint8_t(codes[s]);
    t.high[s] = uint8_t((codes[s] >> 8 & 7) | codes[s] >> 16 << 4);
  }
  const uint8_t* from[4];
  Stream s[4];
  for (int i = 0; i < 4; raw += size[i++]) {
    from[i] = raw;
    s[i] = {to[i]};
    for (int64_t at = size[i]; at % 64; --at) s[i].put(codes[raw[at - 1]] & 0xFFFF, codes[raw[at - 1]] >> 16);
  }
  // the last stream is up to three bytes shorter
  const int64_t most = size[3] / 64 * 64;
  if (size[0] - most >= 64) {
    Fours f;
    for (int i = 0; i < 3; ++i) {
      if (size[i] - most < 64) continue;
      fours(t, from[i] + most, f);
      for (int j = 15; j >= 0; --j) s[i].put(f.codes[order(j)], f.bits[order(j)]);
    }
  }
  for (int64_t at = most; at; at -= 64) {
    Fours f[4];
    for (int i = 0; i < 4; ++i) fours(t, from[i] + at - 64, f[i]);
#pragma GCC unroll 16
    for (int j = 15; j >= 0; --j)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) s[i].put(f[i].codes[order(j)], f[i].bits[order(j)]);
  }
  for (int i = 0; i < 4; ++i) {
    s[i].put(1, 1);
    to[i] = s[i].to + (s[i].filled > 0);
  }
}

}  // namespace autoflip
