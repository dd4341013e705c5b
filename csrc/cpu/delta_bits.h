// Small pieces that all delta kernels share, compiled once per instruction set.
#pragma once
#include <cstring>

#include "cpu/delta.h"

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

// Set bits of a word; without the instruction the compiler's own function would be called for each.
inline int set_bits(uint64_t word) {
#if defined(__POPCNT__) || !defined(__x86_64__)
  return __builtin_popcountll(word);
#else
  word -= word >> 1 & 0x5555555555555555ULL;
  word = (word & 0x3333333333333333ULL) + (word >> 2 & 0x3333333333333333ULL);
  word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0FULL;
  return int(word * 0x0101010101010101ULL >> 56);
#endif
}

}  // namespace
}  // namespace autoflip
