// How a part is to be coded: classes of what is known before a byte, and the counts that make their tables.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <vector>

#include "cpu/ans_table.h"

namespace autoflip {
namespace {

constexpr int64_t kRun = 1 << 13, kSample = 8 * kRun;  // of more bytes, eight runs stand for the whole
constexpr int64_t kClass = 1 << 9;                     // bytes for each of the classes that are tried
constexpr int64_t kExact = 1 << 22;                    // of more bytes the sample makes the tables too
constexpr float kSeldom = 0.25f;                       // what a symbol that the sample lacks counts
constexpr float kTable = 32;                           // bits beside those of a table's symbols

using Counts = std::array<float, 256>;

// Counts of bytes by class, in four sets for bytes in turn: the same byte twice in a row would wait for its
// count to be stored.
constexpr int kApart = 4;

struct Joint {
  std::vector<uint32_t> held;
  uint32_t of[256];  // where the class of a known byte begins
  template <class Of>
  Joint(int classes, Of class_of) : held(size_t(classes) * kApart * 256) {
    for (int b = 0; b < 256; ++b) of[b] = uint32_t(class_of(uint8_t(b)) * kApart * 256);
  }

  void add(const uint8_t* known, const uint8_t* raw, int64_t n) {
    uint32_t* to = held.data();
    int64_t i = 0;
    for (; i + kApart <= n; i += kApart)
#pragma GCC unroll 4
      for (int a = 0; a < kApart; ++a) ++to[of[known[i + a]] + uint32_t(256 * a) + raw[i + a]];
    for (; i < n; ++i) ++to[of[known[i]] + raw[i]];
  }

  void sum(std::vector<Counts>& out) const {
    for (size_t c = 0; c < out.size(); ++c)
      for (size_t s = 0; s < 256; ++s) {
        uint32_t total = 0;
        for (size_t a = 0; a < kApart; ++a) total += held[(c * kApart + a) * 256 + s];
        out[c][s] = float(total);
      }
  }
};

// How a part is to be coded: classes of keys, and one table each.
struct Plan {
  int classes = 1;
  uint8_t cuts[kAnsClasses] = {};  // class of a key = cuts it is not below
  std::vector<Counts> counts;
  float bits = 0;  // that they take

  int of(uint8_t known, int key) const {
    int c = 0;
    while (c + 1 < classes && ans_key(known, key) >= cuts[c]) ++c;
    return c;
  }
};

// c log2 c: what a plan is made of are thousands of them, of whole numbers that are small for the most part.
struct Logs {
  static constexpr int kSmall = 1 << 10;
  float times[kSmall] = {};
  Logs() {
    for (int i = 1; i < kSmall; ++i) times[i] = float(i) * std::log2(float(i));
  }
  float of(float c) const { return c < kSmall ? times[int(c)] : c * ans_log2(c); }
  static const Logs& known() {
    static const Logs logs;
    return logs;
  }
};

// What a table costs: the more, the more symbols it tells of. A number that a sample tells costs, beside its
// place there, some bits a sample more than it seems to; 0.7 of them fits the streams of
// bench/real_deltas.py.
struct Price {
  float samples, table, symbol;

  Price(const Counts& all, uint8_t flip, float times) : samples(times), table(16), symbol(3 + 0.7f * times) {
    if (times > 1) return;
    uint8_t levels[256];
    ans_levels(all.data(), flip, levels);
    float present = 0;
    for (float c : all) present += c > 0;
    table = kTable;
    symbol = float(ans_write_levels(levels, flip, ans_rice(levels, flip), nullptr)) / present;
  }

  // Bits of these bytes, of whole counts, and of their table.
  float of(const Counts& counts) const {
    const Logs& logs = Logs::known();
    float total = 0, sum = 0, present = 0;
    for (float c : counts) total += c, sum += logs.of(c), present += c > 0;
    return samples * (logs.of(total) - sum) + table + present * symbol;
  }
};

// Calls each(first, bytes) for the runs that stand for all n.
template <class Each>
void each_of_sample(int64_t n, Each each) {
  const int64_t runs = n <= kSample ? 1 : kSample / kRun, size = n <= kSample ? n : kRun;
  for (int64_t r = 0; r < runs; ++r) each(runs == 1 ? 0 : (n - size) / (runs - 1) * r, size);
}

int64_t lanes_of(int64_t n) { return n < kAnsShortest ? 1 : n < kAnsLong ? kAnsFew : kAnsMany; }

// They follow none, as if on a zero.
template <class Each>
void first_of_lanes(const uint8_t* raw, int64_t n, Each each) {
  const int64_t lanes = lanes_of(n);
  for (int64_t l = 0; l < lanes; ++l) each(raw[l * (n / lanes)]);
}

Plan plan(const uint8_t* raw, int64_t n, const uint8_t* companion, int key) {
  // the first byte of all follows none: it counts apart
  const uint8_t* known = companion ? companion : raw - 1;
  const auto after_none = [&](int64_t first) { return int64_t(!companion && !first); };
  uint32_t each[kApart][256] = {}, keys[256] = {};
  each_of_sample(n, [&](int64_t first, int64_t size) {
    const int64_t skip = after_none(first);
    each[0][0] += uint32_t(skip);
    int64_t i = first + skip;
    for (; i + kApart <= first + size; i += kApart)
      for (int a = 0; a < kApart; ++a) ++each[a][known[i + a]];
    for (; i < first + size; ++i) ++each[0][known[i]];
  });
  for (int a = 0; a < kApart; ++a)
    for (int b = 0; b < 256; ++b) keys[ans_key(uint8_t(b), key)] += each[a][b];
  const int64_t seen = n < kSample ? n : kSample;
  // thin classes of equal shares of the sample; each ends with a key that occurs
  uint8_t cuts[kAnsClasses] = {}, of[256] = {};
  int classes = 1;
  int64_t below = 0, share = 0;
  const int64_t most = std::min<int64_t>(kAnsClasses, 1 + n / kClass);
  for (int k = 0; k < 256; ++k) {
    if (below < seen && below * most / seen != share) {
      share = below * most / seen;
      cuts[classes++ - 1] = uint8_t(k);
    }
    of[k] = uint8_t(classes - 1);
    below += keys[k];
  }
  Joint joint(classes, [&](uint8_t b) { return of[ans_key(b, key)]; });
  each_of_sample(n, [&](int64_t first, int64_t size) {
    const int64_t skip = after_none(first);
    if (skip) ++joint.held[joint.of[0] + raw[0]];
    joint.add(known + first + skip, raw + first + skip, size - skip);
  });
  if (!companion) first_of_lanes(raw, n, [&](uint8_t byte) { ++joint.held[joint.of[0] + byte]; });

  std::vector<Counts> counts(size_t(classes), Counts{});
  joint.sum(counts);
  Counts all{};
  for (const Counts& c : counts)
    for (size_t s = 0; s < 256; ++s) all[s] += c[s];
  const Price price(all, ans_flip(key), float(n) / float(seen));
  // of all ways to join neighbours, the one that costs least: the classes up to a cut, and one class more
  std::vector<float> least(size_t(classes) + 1, 0.0f);
  std::vector<size_t> from(size_t(classes) + 1, 0);
  for (size_t end = 1; end <= size_t(classes); ++end) {
    Counts joined{};
    for (size_t first = end; first-- > 0;) {
      for (size_t s = 0; s < 256; ++s) joined[s] += counts[first][s];
      const float bits = least[first] + price.of(joined);
      if (first + 1 == end || bits < least[end]) least[end] = bits, from[end] = first;
    }
  }
  Plan best;
  best.bits = least[size_t(classes)];
  std::vector<size_t> ends;
  for (size_t end = size_t(classes); end; end = from[end]) ends.push_back(end);
  std::reverse(ends.begin(), ends.end());
  best.classes = int(ends.size());
  best.counts.assign(ends.size(), Counts{});
  for (size_t c = 0; c < ends.size(); ++c) {
    if (c) best.cuts[c - 1] = cuts[ends[c - 1] - 1];
    for (size_t thin = c ? ends[c - 1] : 0; thin < ends[c]; ++thin)
      for (size_t s = 0; s < 256; ++s) best.counts[c][s] += counts[thin][s];
  }
  return best;
}

// Counts of all n bytes, or of a sample, in the classes of the plan.
void count(const uint8_t* raw, int64_t n, const uint8_t* companion, int key, Plan& how) {
  if (n <= kSample) return;
  if (n > kExact) {  // what the sample lacks may occur all the same
    uint8_t there[256] = {};
    for (int64_t i = 0; i < n; ++i) there[raw[i]] = 1;
    for (Counts& c : how.counts)
      for (size_t s = 0; s < 256; ++s) c[s] += there[s] ? kSeldom : 0;
    return;
  }
  Joint joint(int(how.counts.size()), [&](uint8_t b) { return how.of(b, key); });
  const int64_t skip = companion ? 0 : 1;  // the first byte follows none
  joint.add((companion ? companion : raw - 1) + skip, raw + skip, n - skip);
  if (!companion) first_of_lanes(raw, n, [&](uint8_t byte) { ++joint.held[joint.of[0] + byte]; });
  joint.sum(how.counts);
}

}  // namespace
}  // namespace autoflip
