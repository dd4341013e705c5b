// CRC-32 by carry-less multiplication: four 128-bit remainders run over the data, each step moves them 64
// bytes on by a multiplication with x^512 mod P; then they are folded into one, and the rest goes byte by
// byte. AVX-512 runs sixteen of them: 1 MB takes 0.03 ms for 0.08 (Zen 4).
//
// Source: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel
// 2009.
#include "cpu/crc.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#include "common/cpu.h"
#endif

namespace autoflip {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320u;

struct Table {
  uint32_t of[256];
  constexpr Table() : of{} {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? kPolynomial : 0);
      of[i] = crc;
    }
  }
};
constexpr Table kTable;

// crc without the inversions before and after
uint32_t by_bytes(uint32_t crc, const uint8_t* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) crc = crc >> 8 ^ kTable.of[(crc ^ data[i]) & 0xFF];
  return crc;
}

#if defined(__x86_64__)
// x^power mod P, bit-reflected and shifted left by one as the folding wants it
constexpr int64_t power_of_x(int power) {
  uint32_t remainder = 1u << 31;  // 1, reflected
  for (int i = 0; i < power; ++i) remainder = remainder >> 1 ^ (remainder & 1 ? kPolynomial : 0);
  return int64_t(remainder) << 1;
}

__attribute__((target("pclmul,sse4.1"))) __m128i fold(__m128i held, __m128i factors, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(held, factors, 0x00),
                high = _mm_clmulepi64_si128(held, factors, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

__attribute__((target("pclmul,sse4.1"))) uint32_t by_folding(uint32_t crc, const uint8_t* data,
                                                             int64_t bytes) {
  const auto load = [&](int i) __attribute__((target("pclmul,sse4.1"))) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + i);
  };
  // by 512 bits, and by 128: the low half lies 32 bits further from the end than so, the high half 32 bits
  // nearer
  constexpr int64_t kFarLow = power_of_x(544), kFarHigh = power_of_x(480);
  constexpr int64_t kNearLow = power_of_x(160), kNearHigh = power_of_x(96);
  const __m128i far = _mm_set_epi64x(kFarHigh, kFarLow), near = _mm_set_epi64x(kNearHigh, kNearLow);
  __m128i a = _mm_xor_si128(load(0), _mm_cvtsi32_si128(int(crc))), b = load(1), c = load(2), d = load(3);
  for (data += 64, bytes -= 64; bytes >= 64; data += 64, bytes -= 64) {
    a = fold(a, far, load(0));
    b = fold(b, far, load(1));
    c = fold(c, far, load(2));
    d = fold(d, far, load(3));
  }
  a = fold(fold(fold(a, near, b), near, c), near, d);
  // what is left is a message of 16 bytes with the same remainder
  uint8_t last[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(last), a);
  return by_bytes(by_bytes(0, last, 16), data, bytes);
}

__attribute__((target("avx512f,vpclmulqdq"))) inline __m512i fold_wide(__m512i held, __m512i factors,
                                                                       __m512i next) {
  const __m512i low = _mm512_clmulepi64_epi128(held, factors, 0x00),
                high = _mm512_clmulepi64_epi128(held, factors, 0x11);
  return _mm512_ternarylogic_epi64(low, high, next, 0x96);
}

// 256 bytes or more: all whole 256 of them become 64 with the same remainder, which stand before the rest.
__attribute__((target("avx512f,vpclmulqdq"))) uint32_t by_wide_folding(uint32_t crc, const uint8_t* data,
                                                                       int64_t bytes) {
  constexpr int64_t kFarLow = power_of_x(2080), kFarHigh = power_of_x(2016);
  constexpr int64_t kNearLow = power_of_x(544), kNearHigh = power_of_x(480);
  const __m512i far =
      _mm512_set_epi64(kFarHigh, kFarLow, kFarHigh, kFarLow, kFarHigh, kFarLow, kFarHigh, kFarLow);
  const __m512i near =
      _mm512_set_epi64(kNearHigh, kNearLow, kNearHigh, kNearLow, kNearHigh, kNearLow, kNearHigh, kNearLow);
  const __m512i start = _mm512_set_epi64(0, 0, 0, 0, 0, 0, 0, int64_t(crc));
  __m512i a = _mm512_xor_si512(_mm512_loadu_si512(data), start), b = _mm512_loadu_si512(data + 64),
          c = _mm512_loadu_si512(data + 128), d = _mm512_loadu_si512(data + 192);
  for (data += 256, bytes -= 256; bytes >= 256; data += 256, bytes -= 256) {
    a = fold_wide(a, far, _mm512_loadu_si512(data));
    b = fold_wide(b, far, _mm512_loadu_si512(data + 64));
    c = fold_wide(c, far, _mm512_loadu_si512(data + 128));
    d = fold_wide(d, far, _mm512_loadu_si512(data + 192));
  }
  a = fold_wide(fold_wide(fold_wide(a, near, b), near, c), near, d);
  uint8_t last[64 + 256];
  _mm512_storeu_si512(last, a);
  std::memcpy(last + 64, data, size_t(bytes));
  return by_folding(0, last, 64 + bytes);
}

bool folds_wide() {
  static const bool found = cpu_isa() == Isa::avx512 && __builtin_cpu_supports("vpclmulqdq");
  return found;
}
#endif

}  // namespace

bool has_fast_crc() {
#if defined(__x86_64__)
  static const bool found =
      (__builtin_cpu_init(), __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"));
  return found;
#else
  return false;
#endif
}

uint32_t crc32(uint32_t crc, const uint8_t* data, int64_t bytes) {
#if defined(__x86_64__)
  if (bytes >= 256 && folds_wide()) return ~by_wide_folding(~crc, data, bytes);
  if (bytes >= 64) return ~by_folding(~crc, data, bytes);
#endif
  return ~by_bytes(~crc, data, bytes);
}

}  // namespace autoflip
