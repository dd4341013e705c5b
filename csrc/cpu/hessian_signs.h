// Random signs, and whether values are finite.
#pragma once
#include <omp.h>

#include "cpu/hessian_simd.h"

namespace {

// Finite times 0 is 0, anything else NaN.
bool finite(const float* x, int64_t n) {
  constexpr int kSums = 4;
  Vec sums[kSums];
  for (int s = 0; s < kSums; ++s) sums[s] = splat(0.f);
  int64_t i = 0;
  for (; i + kSums * W <= n; i += kSums * W)
    for (int s = 0; s < kSums; ++s) sums[s] = fma(load(x + i + s * W), splat(0.f), sums[s]);
  float lanes[W], all = 0.f;
  for (int s = 0; s < kSums; ++s) {
    store(lanes, sums[s]);
    for (int64_t j = 0; j < W; ++j) all += lanes[j];
  }
  for (; i < n; ++i) all += x[i] * 0.f;
  return all == 0.f;
}

inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

void rademacher(uint64_t seed, uint64_t stream, float* out, int64_t count, int threads) {
  uint64_t start = mix(mix(seed) ^ stream);
  int64_t words = (count + 63) / 64;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t w = 0; w < words; ++w) {
    uint64_t bits = mix(start + static_cast<uint64_t>(w + 1) * 0x9E3779B97F4A7C15ull);
    int64_t n = least(64, count - w * 64);
    for (int64_t i = 0; i < n; ++i) out[w * 64 + i] = 1.f - 2.f * static_cast<float>(bits >> i & 1);
  }
}

}  // namespace
