// Tables of Huffman codes as zstd writes them (RFC 8878, 4.2.1), read from bytes of anyone. Included by
// huffman_decode.cpp only.
#pragma once
#include <array>
#include <cstdint>

namespace autoflip {
namespace {

constexpr int kLongest = 11, kSlots = 1 << kLongest;

using Lengths = std::array<uint8_t, 256>;

// Bits below the set one that ends `bytes` bytes, or -1 where there is none.
int64_t bits_below_mark(const uint8_t* from, int64_t bytes) {
  if (bytes < 1 || !from[bytes - 1]) return -1;
  return 8 * bytes - 1 - __builtin_clz(uint32_t(from[bytes - 1]) << 24);
}

// `count` bits from bit `at` on, which may lie before the first or behind the last byte: zeros.
uint32_t bits_at(const uint8_t* from, int64_t bytes, int64_t at, int count) {
  uint32_t value = 0;
  for (int i = 0; i < count; ++i, ++at)
    if (at >= 0 && at < 8 * bytes) value |= uint32_t(from[at >> 3] >> (at & 7) & 1) << i;
  return value;
}

// Weights coded with up to 64 states in two turns (RFC 8878, 4.1 and 4.2.1.2); returns how many, or 0.
int read_weights(const uint8_t* from, int64_t bytes, uint8_t* weights) {
  const int log = 5 + int(bits_at(from, bytes, 0, 4)), size = 1 << log;
  if (log > 6) return 0;
  int shares[kLongest + 1] = {}, left = size + 1, w = 0;
  int64_t at = 4;
  while (left > 1) {
    if (w > kLongest) return 0;
    int width = 0;
    while ((1 << width) <= left) ++width;
    const int spare = (1 << width) - 1 - left;
    int value = int(bits_at(from, bytes, at, width - 1));
    if (value < spare) {
      at += width - 1;
    } else {
      value = int(bits_at(from, bytes, at, width));
      if (value >= 1 << (width - 1)) value -= spare;
      at += width;
    }
    if (value < 1 || value > left) return 0;
    shares[w++] = value - 1;
    left -= value - 1;
    for (uint32_t zeros = value == 1 ? 3 : 0; zeros == 3; at += 2)
      w += int(zeros = bits_at(from, bytes, at, 2));
  }
  uint8_t of[64], bits[64], base[64];
  int place = 0;
  for (int s = 0; s <= kLongest; ++s)
    for (int i = 0; i < shares[s]; ++i, place = (place + (size >> 1) + (size >> 3) + 3) & (size - 1))
      of[place] = uint8_t(s);
  for (int i = 0; i < size; ++i) {
    const int x = shares[of[i]]++, nb = log - (31 - __builtin_clz(uint32_t(x)));
    bits[i] = uint8_t(nb), base[i] = uint8_t((x << nb) - size);
  }
  const int64_t used = (at + 7) / 8;
  if (used >= bytes) return 0;
  from += used, bytes -= used;
  int64_t pos = bits_below_mark(from, bytes);
  if (pos < 2 * log) return 0;
  uint32_t states[2];
  for (uint32_t& state : states) state = bits_at(from, bytes, pos -= log, log);
  for (int n = 0; n < 254; ++n) {
    uint32_t& state = states[n & 1];
    weights[n] = of[state];
    if (bits[state] > pos) {  // the other state's is the last one
      weights[n + 1] = of[states[~n & 1]];
      return n + 2;
    }
    pos -= bits[state];
    state = base[state] + bits_at(from, bytes, pos, bits[state]);
  }
  return 0;
}

// Returns the bytes of a table, or 0 where it is none.
int64_t read_table(const uint8_t* from, int64_t bytes, Lengths& lengths) {
  if (bytes < 1) return 0;
  uint8_t weights[256] = {};
  int64_t used = 1 + from[0];
  int n = from[0] - 127;
  if (n > 0) {
    used = 1 + (n + 1) / 2;
    if (used > bytes) return 0;
    for (int s = 0; s < n; ++s) weights[s] = from[1 + s / 2] >> (s % 2 ? 0 : 4) & 15;
  } else {
    if (used > bytes) return 0;
    n = read_weights(from + 1, used - 1, weights);
  }
  uint32_t total = 0;
  for (int s = 0; s < n; ++s) {
    if (weights[s] > kLongest) return 0;
    total += weights[s] ? 1u << (weights[s] - 1) : 0;
  }
  if (!total || total >= kSlots) return 0;
  const int longest = 32 - __builtin_clz(total);
  const uint32_t rest = (1u << longest) - total;  // what the last symbol is left with
  if (rest & (rest - 1)) return 0;
  weights[n] = uint8_t(1 + __builtin_ctz(rest));
  for (int s = 0; s < 256; ++s) lengths[size_t(s)] = uint8_t(weights[s] ? longest + 1 - weights[s] : 0);
  return used;
}

// Lengths low, symbols high, by the next 11 bits.
void fill(const Lengths& lengths, uint16_t* slots) {
  for (int length = kLongest; length; --length)
    for (int s = 0; s < 256; ++s)
      if (lengths[size_t(s)] == length)
        for (int i = 0; i < 1 << (kLongest - length); ++i) *slots++ = uint16_t(length | s << 8);
}

}  // namespace
}  // namespace autoflip
