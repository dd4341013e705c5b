#include <vector>

#include "common/cpu.h"
#include "cpu/ans.h"
#include "cpu/ans_levels.h"
#include "cpu/ans_plan.h"
#include "cpu/ans_rows.h"

namespace autoflip {
namespace {

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
                     [[maybe_unused]] const uint32_t* packed, [[maybe_unused]] const uint32_t* offsets,
                     uint8_t* end) {
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
    const float* counts = how.counts[size_t(c)].data();
    ans_levels(counts, flip, levels);
    const int k = ans_rice(levels, flip);
    if (n <= kSample) {  // of more bytes the tables are a thousandth
      const float bits = float(ans_write_levels(levels, flip, k, nullptr)) + ans_coded_bits(counts, levels);
      ans_better_levels(counts, flip, k ? k - 1 : 0, bits, levels);
    }
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
