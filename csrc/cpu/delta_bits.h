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

}  // namespace
}  // namespace autoflip
