// Sigmoid and tanh, written so that the compiler turns a loop of them into vectors: no branch, no call.
// exp and tanh: the range reductions and polynomials of Moshier's Cephes, within 2 ulp of the exact value.
#pragma once
#include <cstdint>
#include <cstring>

namespace autoflip {
namespace {

inline float as_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The comparisons are false for NaN, which so passes through.
inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  constexpr float kRound =
      12582912.0f;  // 1.5 * 2^23: adding it rounds, and leaves the integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  const float p =
      ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
       1.6666665459e-1f) *
          r +
      5.0000001201e-1f;
  const float power = as_float(int32_t(uint32_t(bits_of(shifted)) << 23) + 0x3f800000);
  return (p * r * r + r + 1.0f) * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

inline float tanh_of(float x) {
  const float z = x * x;
  const float p =
      (((-5.70498872745e-3f * z + 2.06390887954e-2f) * z - 5.37397155531e-2f) * z + 1.33314422036e-1f) * z -
      3.33332819422e-1f;
  const float near_zero = x + x * z * p;
  const float magnitude = as_float(bits_of(x) & 0x7fffffff);
  const float far = 1.0f - 2.0f / (exponential(2.0f * magnitude) + 1.0f);
  return magnitude < 0.625f ? near_zero : as_float(bits_of(far) | (bits_of(x) & int32_t(0x80000000)));
}

}  // namespace
}  // namespace autoflip
