#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "common/cpu.h"
#include "cpu/ans.h"
#include "cpu/ans_rows.h"
#include "cpu/ans_table.h"

namespace autoflip {
namespace {

constexpr int64_t kRun = 1 << 13, kSample = 8 * kRun;  // of more bytes, eight runs stand for the whole
constexpr int64_t kClass = 1 << 10;                    // bytes for each class, at least
constexpr int64_t kExact = 1 << 22;                    // of more bytes the sample makes the tables too
constexpr float kSeldom = 0.25f;                       // what a symbol that the sample lacks counts

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
float times_log(float c) {
  struct Known {
    float of[1 << 10] = {};
    Known() {
      for (int i = 1; i < 1 << 10; ++i) of[i] = float(i) * std::log2(float(i));
    }
  };
  static const Known known;
  const int whole = c < 1 << 10 ? int(c) : 0;
  return c == float(whole) ? known.of[whole] : c * std::log2(c);
}

float bits_of(const Counts& counts) {
  float total = 0, sum = 0;
  for (float c : counts) total += c, sum += times_log(c);
  return total > 0 ? total * std::log2(total) - sum : 0;
}

// Bits of a table. A number that a sample tells costs, beside its place there, some bits a sample more than
// it seems to; 0.7 of them fits the streams of bench/real_deltas.py.
float table_bits(const Counts& counts, uint8_t flip, float samples) {
  if (samples > 1) {
    float present = 0;
    for (float c : counts) present += c > 0;
    return 16 + present * (3 + 0.7f * samples);
  }
  uint8_t levels[256];
  ans_levels(counts.data(), flip, levels);
  return float(ans_write_levels(levels, flip, ans_rice(levels, flip), nullptr));
}

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
  // classes of equal shares of the sample; each ends with a key that occurs
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
  const float times = float(n) / float(seen);
  Plan best;
  while (true) {
    float bits = 0;
    for (const Counts& c : counts) bits += times * bits_of(c) + table_bits(c, ans_flip(key), times);
    if (best.counts.empty() || bits < best.bits) {
      best.bits = bits;
      best.classes = int(counts.size()), best.counts = counts;
      std::copy(cuts, cuts + kAnsClasses, best.cuts);
    }
    if (counts.size() == 1) break;
    std::vector<Counts> merged((counts.size() + 1) / 2, Counts{});
    for (size_t c = 0; c < counts.size(); ++c)
      for (size_t s = 0; s < 256; ++s) merged[c / 2][s] += counts[c][s];
    for (size_t c = 1; c < merged.size(); ++c) cuts[c - 1] = cuts[2 * c - 1];
    counts = std::move(merged);
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

// x / freq by multiplication, for x below 2^32
struct Step {
  uint64_t reciprocal;
  uint32_t bias;
  uint16_t freq, rest;
};

Step step_of(uint32_t start, uint32_t freq) {
  if (freq <= 1) return {~uint64_t(0), start + kAnsScale - 1, uint16_t(freq), uint16_t(kAnsScale - 1)};
  return {~uint64_t(0) / freq + 1, start, uint16_t(freq), uint16_t(kAnsScale - freq)};
}

// Writes everything behind the header before `end`; returns where it starts.
template <int kLanes>
uint8_t* encode_rows(const uint8_t* raw, int64_t n, const uint8_t* companion, const Step* const* tables,
                     const uint32_t* packed, const uint32_t* offsets, uint8_t* end) {
  const int64_t rows = n / kLanes, tail = n % kLanes;
  if (tail) std::memcpy(end -= tail, raw + n - tail, size_t(tail));
  uint32_t x[kLanes];
  for (uint32_t& state : x) state = kLow;
  auto code = [&](uint32_t state, const Step& s) {
    const uint32_t full = state >> (32 - kAnsBits) >= s.freq;  // no branch: it is as good as random
    const uint16_t word = uint16_t(state);
    std::memcpy(end - 2, &word, 2);
    end -= 2 * full;
    state >>= 16 * full;
    const uint32_t q = uint32_t((unsigned __int128)(state)*s.reciprocal >> 64);
    return state + s.bias + q * s.rest;
  };
  const uint8_t* known = companion ? companion : raw - 1;
  const int64_t least = companion ? 0 : 1;
  int64_t r = rows;
#if defined(__x86_64__)
  if (kLanes == kAnsMany && n < INT32_MAX && cpu_isa() == Isa::avx512)
    r = ans_encode_rows(x, packed, offsets, raw, companion, rows, end);
#endif
  while (--r >= least) {
#pragma GCC unroll 8
    for (int l = kLanes - 1; l >= 0; --l) {
      const int64_t i = l * rows + r;
      x[l] = code(x[l], tables[known[i]][raw[i]]);
    }
  }
  if (!companion && rows)  // the first of each lane knows nothing
    for (int l = kLanes - 1; l >= 0; --l) x[l] = code(x[l], tables[0][raw[l * rows]]);
  for (int l = kLanes - 1; l >= 0; --l) std::memcpy(end -= 4, &x[l], 4);
  return end;
}

}  // namespace

int64_t ans_encode(const uint8_t* raw, int64_t n, const uint8_t* companion, int key, int64_t limit,
                   uint8_t* out) {
  Plan how = plan(raw, n, companion, key);
  const int64_t size = int64_t(how.bits / 8) + 4 * lanes_of(n);
  if (size >= limit) return -size;
  count(raw, n, companion, key, how);
  const uint8_t flip = ans_flip(key);
  std::vector<uint8_t> head(static_cast<size_t>(kAnsHeader));
  uint8_t* to = head.data();
  *to++ = uint8_t((lanes_of(n) == 1 ? kAnsOne + key : key) << 4 | (how.classes - 1));
  for (int c = 1; c < how.classes; ++c) *to++ = how.cuts[c - 1];
  BitWriter writer{to};
  std::vector<Step> steps(size_t(how.classes) * 256);
  std::vector<uint32_t> packed(steps.size());  // start and frequency, for vectors
  for (int c = 0; c < how.classes; ++c) {
    uint8_t levels[256];
    uint32_t start[257];
    ans_levels(how.counts[size_t(c)].data(), flip, levels);
    ans_write_levels(levels, flip, ans_rice(levels, flip), &writer);
    ans_starts(levels, start);
    for (int s = 0; s < 256; ++s) {
      steps[size_t(c * 256 + s)] = step_of(start[s], start[s + 1] - start[s]);
      packed[size_t(c * 256 + s)] = start[s] | (start[s + 1] - start[s]) << kAnsBits;
    }
  }
  writer.finish();

  const Step* tables[256];  // by the byte that is known
  uint32_t offsets[256];
  for (int b = 0; b < 256; ++b) {
    offsets[b] = uint32_t(how.of(uint8_t(b), key)) * 256;
    tables[b] = &steps[offsets[b]];
  }
  uint8_t* end = out + n + n / 2 + kAnsHeader + 64;
  const auto rows = n < kAnsShortest ? encode_rows<1>
                    : n < kAnsLong   ? encode_rows<kAnsFew>
                                     : encode_rows<kAnsMany>;
  end = rows(raw, n, companion, tables, packed.data(), offsets, end);
  const int64_t header = writer.to - head.data();
  std::memcpy(end -= header, head.data(), size_t(header));
  return end - out;
}

}  // namespace autoflip
