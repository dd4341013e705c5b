// Codes of a Huffman table, and the table as zstd writes it (RFC 8878, 4.2.1). Included by huffman.cpp only.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "cpu/huffman.h"

namespace autoflip {
namespace {

constexpr int kLongest = 11;  // bits of a code: zstd allows no more

using HuffmanCounts = std::array<uint32_t, 256>;
using HuffmanLengths = std::array<uint8_t, 256>;

// Bits filled from the lowest; zstd reads such a stream from its end, which a set bit marks.
struct BackwardBits {
  uint8_t* to;
  uint64_t held = 0;
  int filled = 0;                        // below 8 between calls
  void put(uint64_t value, int count) {  // at most 56
    held |= value << filled;
    filled += count;
    std::memcpy(to, &held, 8);
    to += filled >> 3;
    held >>= filled & ~7;
    filled &= 7;
  }
  void finish() {
    put(1, 1);
    to += filled > 0;
  }
};

// Lengths of an optimal code of at most kLongest bits, of two symbols or more (package-merge): the packages
// of a level are the pairs of the level below, and lie among the symbols in order of their counts. The first
// 2 n - 2 of the top level are taken, and for each package the two that it is made of; a symbol's code is as
// long as it is often taken.
HuffmanLengths code_lengths(const HuffmanCounts& counts) {
  std::vector<std::pair<uint32_t, int>> leaves;
  for (int s = 0; s < 256; ++s)
    if (counts[size_t(s)]) leaves.push_back({counts[size_t(s)], s});
  std::sort(leaves.begin(), leaves.end());
  const size_t n = leaves.size();
  bool is_leaf[kLongest][512];
  std::array<uint64_t, 512> held, next;
  size_t size = 0;
  for (int level = 0; level < kLongest; ++level) {
    size_t leaf = 0, pair = 0, to = 0;
    while (leaf < n || pair + 1 < size) {
      const bool mine = leaf < n && (pair + 1 >= size || leaves[leaf].first <= held[pair] + held[pair + 1]);
      is_leaf[level][to] = mine;
      next[to++] = mine ? leaves[leaf].first : held[pair] + held[pair + 1];
      leaf += mine, pair += mine ? 0 : 2;
    }
    held = next, size = to;
  }
  HuffmanLengths lengths{};
  size_t take = 2 * n - 2;
  for (int level = kLongest - 1; level >= 0; --level) {
    size_t taken = 0;
    for (size_t i = 0; i < take; ++i) taken += is_leaf[level][i];
    for (size_t i = 0; i < taken; ++i) ++lengths[size_t(leaves[i].second)];
    take = 2 * (take - taken);
  }
  return lengths;
}

// Codes in the order of RFC 8878: the longest first, among equals by symbol.
void codes_of(const HuffmanLengths& lengths, HuffmanCodes& codes) {
  uint32_t next = 0;
  for (uint32_t length = kLongest; length; --length, next >>= 1)
    for (size_t s = 0; s < 256; ++s)
      if (lengths[s] == length) codes[s] = next++ | length << 16;
  for (size_t s = 0; s < 256; ++s)
    if (!lengths[s]) codes[s] = 0;
}

// Shares of 64 for each of the weights that occur, at least one each.
std::array<int, kLongest + 1> shares_of(const std::vector<uint8_t>& weights) {
  std::array<int, kLongest + 1> counts{}, shares{};
  for (uint8_t w : weights) ++counts[w];
  const int total = int(weights.size());
  int left = 64;
  for (size_t w = 0; w <= kLongest; ++w) {
    if (counts[w]) shares[w] = std::max(1, (64 * counts[w] + total / 2) / total);
    left -= shares[w];
  }
  for (; left; left += left < 0 ? 1 : -1)  // the largest share feels it least
    *std::max_element(shares.begin(), shares.end()) += left < 0 ? -1 : 1;
  return shares;
}

// The table's weights by finite state entropy coding with 64 states (RFC 8878, 4.1); returns where it ends.
uint8_t* write_weights(const std::vector<uint8_t>& weights, uint8_t* to) {
  constexpr int kBits = 6, kStates = 1 << kBits;
  const auto shares = shares_of(weights);
  // the shares: as many bits as what is left of 64 asks for
  BackwardBits head{to};
  head.put(kBits - 5, 4);
  int left = kStates + 1;
  for (size_t w = 0; left > 1; ++w) {
    const int value = shares[w] + 1;
    int bits = 0;
    while ((1 << bits) <= left) ++bits;  // values run from 0 to `left`
    const int spare = (1 << bits) - 1 - left;
    if (value < spare)
      head.put(uint64_t(value), bits - 1);
    else
      head.put(uint64_t(value >= 1 << (bits - 1) ? value + spare : value), bits);
    left -= shares[w];
    if (!shares[w]) {  // how many more are zero, three by three
      int zeros = 0;
      while (w + 1 + size_t(zeros) <= kLongest && !shares[w + 1 + size_t(zeros)]) ++zeros;
      w += size_t(zeros);
      for (; zeros >= 3; zeros -= 3) head.put(3, 2);
      head.put(uint64_t(zeros), 2);
    }
  }
  to = head.to + (head.filled > 0);
  // places of each weight among the states
  uint8_t of[kStates];
  int at = 0;
  for (size_t w = 0; w <= kLongest; ++w)
    for (int i = 0; i < shares[w]; ++i, at = (at + (kStates >> 1) + (kStates >> 3) + 3) & (kStates - 1))
      of[at] = uint8_t(w);
  std::array<std::vector<int>, kLongest + 1> places;
  for (int i = 0; i < kStates; ++i) places[of[i]].push_back(i);
  // two states in turn, from the last weight to the first; the reader begins with the first one
  int states[2] = {-1, -1};
  BackwardBits body{to};
  for (int i = int(weights.size()) - 1; i >= 0; --i) {
    int& state = states[i & 1];
    const size_t w = weights[size_t(i)];
    int x = shares[w];
    if (state >= 0) {
      int bits = 0;
      while ((state + kStates) >> bits >= 2 * shares[w]) ++bits;
      body.put(uint64_t(state) & ((1u << bits) - 1), bits);
      x = (state + kStates) >> bits;
    }
    state = places[w][size_t(x - shares[w])];
  }
  body.put(uint64_t(states[1]), kBits);
  body.put(uint64_t(states[0]), kBits);
  body.finish();
  return body.to;
}

// The table: weights of all symbols but the last one, whose weight the others tell. Returns its bytes, at
// most 129, or 0 where it cannot be written. `to` has room for 512 bytes.
int write_table(const HuffmanLengths& lengths, uint8_t* to) {
  const int longest = *std::max_element(lengths.begin(), lengths.end());
  size_t last = 255;
  while (!lengths[last]) --last;
  std::vector<uint8_t> weights(last);
  for (size_t s = 0; s < last; ++s) weights[s] = uint8_t(lengths[s] ? longest + 1 - lengths[s] : 0);
  const bool one = std::all_of(weights.begin(), weights.end(), [&](uint8_t w) { return w == weights[0]; });
  const int64_t coded = one || last < 2 ? 512 : write_weights(weights, to + 1) - (to + 1);
  if (coded < 128 && (last > 128 || coded < int64_t(last + 1) / 2)) {
    to[0] = uint8_t(coded);
    return int(coded) + 1;
  }
  if (last > 128) return 0;
  to[0] = uint8_t(127 + last);
  weights.push_back(0);
  for (size_t s = 0; s < last; s += 2) to[1 + s / 2] = uint8_t(weights[s] << 4 | weights[s + 1]);
  return int(1 + (last + 1) / 2);
}

}  // namespace
}  // namespace autoflip
