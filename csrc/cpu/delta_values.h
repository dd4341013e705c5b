// Quantisers and byte planes: plain loops that the compiler vectorises at every level with the same result
// (no FMA contraction, integer max instead of float max). Included by delta_impl.h only.
#pragma once
#include "cpu/delta_bits.h"

namespace autoflip {
namespace {

inline uint32_t mix(uint32_t x) {  // lowbias32
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ x >> 16;
}

inline uint32_t random_bits(uint32_t rank, DeltaKey key) {
  return (mix(mix(rank + key.key0) ^ key.key1) & key.keep) | key.half;
}

void quantise_block(const float* x, int size, int levels, float largest, DeltaKey key, uint32_t first,
                    int8_t* codes, float* scale_out) {
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
  const float most = float(levels);  // rounded up, the quotient may be more
  for (int i = 0; i < size; ++i) {
    float y = x[i] * inverse;
    y = y > most ? most : y;
    y = y < -most ? -most : y;
    const int32_t cut = int32_t(y);
    const int32_t low = cut - (float(cut) > y);
    const float u = float(int32_t(random_bits(first + uint32_t(i), key) >> 8)) * 5.9604644775390625e-08f;
    codes[i] = int8_t(low + (u < y - float(low)));
  }
}

// What is read next: asked for block by block, while the CPU computes and memory would have nothing to do.
struct Ahead {
  const float *x = nullptr, *base = nullptr;
  int64_t left = 0;  // of each

  void ask() {
    for (int64_t lines = base ? 12 : 24; lines > 0 && left >= 16; --lines, left -= 16) {
      __builtin_prefetch(x, 0, 2);
      x += 16;
      if (!base) continue;
      __builtin_prefetch(base, 0, 2);
      base += 16;
    }
  }
};

void quantise(const float* values, int64_t n, int levels, float largest, DeltaKey key, int64_t first,
              int8_t* codes, float* scales, Ahead ahead) {
  int64_t i = 0;
  for (; i + kDeltaBlock <= n; i += kDeltaBlock) {  // a constant size lets the compiler unroll
    ahead.ask();
    quantise_block(values + i, kDeltaBlock, levels, largest, key, uint32_t(first + i), codes + i, scales++);
  }
  if (i < n)
    quantise_block(values + i, int(n - i), levels, largest, key, uint32_t(first + i), codes + i, scales);
}

void quantise(const float* values, int64_t n, int levels, float largest, DeltaKey key, int64_t first,
              int8_t* codes, float* scales) {
  quantise(values, n, levels, largest, key, first, codes, scales, {});
}

void dequantise(const int8_t* codes, const float* scales, int64_t n, float* values) {
  for (int64_t start = 0; start < n; start += kDeltaBlock) {
    const float scale = scales[start / kDeltaBlock];
    const int64_t size = lesser(kDeltaBlock, n - start);
    for (int64_t i = 0; i < size; ++i) values[start + i] = float(codes[start + i]) * scale;
  }
}

inline uint32_t rounded_bf16(float value, DeltaKey key, uint32_t rank) {
  const uint32_t bits = bits_of(value), up = (bits + (random_bits(rank, key) >> 16)) >> 16;
  return (up & 0x7F80u) == 0x7F80u ? bits >> 16 : up;  // finite stays finite
}

void round_bf16(const float* values, int64_t n, DeltaKey key, int64_t first, uint16_t* words) {
  for (int64_t i = 0; i < n; ++i) words[i] = uint16_t(rounded_bf16(values[i], key, uint32_t(first + i)));
}

// The same as two byte planes. Words of 32 bits in between: narrowed twice they take twice as long.
void round_bf16_planes(const float* values, int64_t n, DeltaKey key, int64_t first, uint8_t* low,
                       uint8_t* high) {
  uint32_t words[kDeltaBlock];
  for (int64_t start = 0; start < n; start += kDeltaBlock) {
    const int64_t size = lesser(kDeltaBlock, n - start);
    for (int64_t i = 0; i < size; ++i)
      words[i] = rounded_bf16(values[start + i], key, uint32_t(first + start + i));
    for (int64_t i = 0; i < size; ++i) low[start + i] = uint8_t(words[i]);
    for (int64_t i = 0; i < size; ++i) high[start + i] = uint8_t(words[i] >> 8);
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

}  // namespace
}  // namespace autoflip
