// Tables of the entropy stage: from counts to levels (quarters of an octave), their code, and frequencies.
#pragma once
#include <cmath>
#include <cstring>

#include "cpu/ans.h"

namespace autoflip {
namespace {

constexpr int kAnsScale = 1 << kAnsBits;
constexpr uint32_t kLow = 1u << 16;  // states lie in [2^16, 2^32)

inline uint8_t ans_key(uint8_t byte, int key) {
  return key == kSigned ? uint8_t(byte ^ 0x80) : key == kMagnitude ? uint8_t(byte << 1) : byte;
}
// Tables list symbols in the order in which neighbours are alike.
inline uint8_t ans_flip(int key) { return key == kSigned ? 0x80 : 0; }

struct BitWriter {
  uint8_t* to;
  uint64_t held = 0;
  int bits = 0;
  void put(uint32_t value, int count) {
    held |= uint64_t(value) << bits;
    for (bits += count; bits >= 8; bits -= 8, held >>= 8) *to++ = uint8_t(held);
  }
  void finish() {
    if (bits) *to++ = uint8_t(held);
  }
};

// Past the end it reads zeros and says so.
struct BitReader {
  const uint8_t *from, *end;
  int used = 0;  // bits of *from
  bool over = false;
  uint32_t bit() {
    if (from == end) {
      over = true;
      return 0;
    }
    const uint32_t b = *from >> used & 1;
    if (++used == 8) used = 0, ++from;
    return b;
  }
  uint32_t number(int count) {
    uint32_t value = 0;
    for (int i = 0; i < count; ++i) value |= bit() << i;
    return value;
  }
  // whether the bits up to the next byte are zero; moves there
  bool finish() {
    bool zero = true;
    while (used) zero &= !bit();
    return zero && !over;
  }
};

inline uint32_t ans_weight(int level) {
  constexpr uint32_t kQuarter[4] = {16, 19, 23, 27};  // 16 * 2^(i / 4)
  return kQuarter[(level - 1) & 3] << ((level - 1) >> 2);
}

// start[s] for s = 0..256, of 256 symbols with levels 0 (absent) to 48; at least one is present.
inline void ans_starts(const uint8_t* levels, uint32_t* start) {
  uint64_t total = 0, before = 0;
  uint32_t present = 0;
  for (int s = 0; s < 256; ++s)
    if (levels[s]) total += ans_weight(levels[s]), ++present;
  const uint64_t share = kAnsScale - present;
  uint32_t seen = 0;
  for (int s = 0; s < 256; ++s) {
    start[s] = uint32_t(before * share / total) + seen;
    if (levels[s]) before += ans_weight(levels[s]), ++seen;
  }
  start[256] = kAnsScale;
}

// log2 of x > 0 to four digits and more, of all symbols at once where a compiler has vectors.
inline float ans_log2(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const int32_t exponent = int32_t(bits >> 23) - 127;
  bits = (bits & 0x7FFFFF) | 0x3F800000;
  std::memcpy(&x, &bits, 4);
  const float s = (x - 1) / (x + 1), q = s * s;
  return float(exponent) + s * (2.885390f + q * (0.961797f + q * (0.577078f + q * 0.412199f)));
}

// The level that each count asks for, as if there were others between them; 1 where it is below all.
inline void ans_exact_levels(const float* counts, float* exact) {
  float total = 0, most = 0;
  for (int s = 0; s < 256; ++s) total += counts[s], most = counts[s] > most ? counts[s] : most;
  const float unit = float(kAnsScale) / total, top = most * unit > 2 ? most * unit - 1 : 1;
  const float low = float(kAnsLevels) - 4 * ans_log2(top), least = top * (1.0f / 4096);
  for (int s = 0; s < 256; ++s) {
    const float share = counts[s] * unit - 1, level = low + 4 * ans_log2(share > least ? share : least);
    exact[s] = level > 1 ? level : 1;
  }
}

// counts (at least one of them > 0) to levels. A level stays that of the symbol before where the counts do
// not tell them apart: that makes the table short.
inline void ans_levels(const float* counts, uint8_t flip, uint8_t* levels) {
  float exact[256];
  ans_exact_levels(counts, exact);
  int last = 0;
  for (int i = 0; i < 256; ++i) {
    const int s = i ^ flip;
    levels[s] = 0;
    if (counts[s] <= 0) continue;
    const float apart = exact[s] - float(last);
    int level = int(exact[s] + 0.5f);
    if (last && apart * apart * counts[s] < 25) level = last;  // a standard deviation is 5.8 / sqrt(counts)
    levels[s] = uint8_t(last = level);
  }
}

inline uint32_t ans_zigzag(int step) { return step < 0 ? uint32_t(-2 * step) : uint32_t(2 * step + 1); }

// Bits of a table under Rice parameter k; with `to`, writes them.
inline int64_t ans_write_levels(const uint8_t* levels, uint8_t flip, int k, BitWriter* to) {
  int64_t bits = 2;
  if (to) to->put(uint32_t(k), 2);
  int last = kAnsLevels;
  for (int i = 0; i < 256;) {
    const int level = levels[i ^ flip];
    const uint32_t z = level ? ans_zigzag(level - last) : 0;
    bits += (z >> k) + 1 + k;
    if (to) {
      for (uint32_t u = z >> k; u; --u) to->put(1, 1);
      to->put(0, 1);
      to->put(z & ((1u << k) - 1), k);
    }
    if (level) {
      last = level, ++i;
      continue;
    }
    uint32_t run = 0;
    while (i < 256 && !levels[i ^ flip]) ++run, ++i;
    int width = 0;
    while (run >> (width + 1)) ++width;
    bits += 2 * width + 1;
    if (to) {
      for (int j = 0; j < width; ++j) to->put(1, 1);
      to->put(0, 1);
      to->put(run & ((1u << width) - 1), width);
    }
  }
  return bits;
}

inline int ans_rice(const uint8_t* levels, uint8_t flip) {
  int best = 0;
  int64_t least = INT64_MAX;
  for (int k = 0; k < 4; ++k) {
    const int64_t bits = ans_write_levels(levels, flip, k, nullptr);
    if (bits < least) least = bits, best = k;
  }
  return best;
}

// Returns whether the bits are a table.
inline bool ans_read_levels(BitReader& from, uint8_t flip, uint8_t* levels) {
  const int k = int(from.number(2));
  int last = kAnsLevels;
  bool any = false;
  for (int i = 0; i < 256;) {
    uint32_t z = 0;
    while (from.bit())
      if (++z > 2 * kAnsLevels) return false;
    z = z << k | from.number(k);
    if (from.over) return false;
    if (z) {
      const int level = last + (z & 1 ? int(z / 2) : -int(z / 2));
      if (level < 1 || level > kAnsLevels) return false;
      levels[i++ ^ flip] = uint8_t(last = level);
      any = true;
      continue;
    }
    int width = 0;
    while (from.bit())
      if (++width > 8) return false;
    const int run = 1 << width | int(from.number(width));
    if (from.over || run > 256 - i) return false;
    for (int j = 0; j < run; ++j) levels[i++ ^ flip] = 0;
  }
  return any;
}

}  // namespace
}  // namespace autoflip
