#include <vector>

#include "common/cpu.h"
#include "cpu/ans.h"
#include "cpu/ans_rows.h"
#include "cpu/ans_table.h"

namespace autoflip {
namespace {

// A slot: symbol, frequency - 1, how far into the symbol's slots.
inline uint32_t slot_of(uint32_t symbol, uint32_t freq, uint32_t at) {
  return symbol | (freq - 1) << 8 | at << 20;
}

struct Decoder {
  std::vector<uint32_t> slots;  // kAnsScale a class
  uint32_t tables[256];         // by the byte that is known: where its class begins
  const uint8_t *from, *end;
};

// Reads states and words. Where `companion` is null the byte before is what is known.
template <int kLanes, bool kCompanion>
int64_t decode_rows(Decoder& d, const uint8_t* companion, int64_t n, uint8_t* out) {
  const int64_t rows = n / kLanes;
  if (d.end - d.from < 4 * kLanes) return kAnsShort;
  uint32_t x[kLanes], table[kLanes];
  for (int l = 0; l < kLanes; ++l, d.from += 4) {
    std::memcpy(&x[l], d.from, 4);
    if (x[l] < kLow) return kAnsState;
    table[l] = d.tables[0];
  }
  const uint32_t* slots = d.slots.data();
  const uint8_t *from = d.from, *end = d.end;
  // No branch on `low`: it is as good as random. kRoom: a word is there, whether or not it is wanted.
  auto step = [&](int l, int64_t r, const uint8_t* word) {
    const int64_t i = l * rows + r;
    const uint32_t slot = slots[(kCompanion ? d.tables[companion[i]] : table[l]) + (x[l] & (kAnsScale - 1))];
    out[i] = uint8_t(slot);
    if (!kCompanion) table[l] = d.tables[uint8_t(slot)];
    const uint32_t next = ((slot >> 8 & (kAnsScale - 1)) + 1) * (x[l] >> kAnsBits) + (slot >> 20);
    const uint32_t low = next < kLow;
    x[l] = next << 16 * low | (uint32_t(word[0] | word[1] << 8) & (0 - low));
    return 2 * low;
  };
  int64_t r = 0;
#if defined(__x86_64__)
  if (kLanes == kAnsMany && n < INT32_MAX && cpu_isa() == Isa::avx512)
    r = ans_decode_rows({x, table, slots, d.tables, kCompanion ? companion : nullptr}, rows, from, end, out);
#endif
  for (; r < rows && end - from >= 2 * kLanes; ++r) {
#pragma GCC unroll 8
    for (int l = 0; l < kLanes; ++l) from += step(l, r, from);
  }
  const uint8_t none[2] = {};
  for (; r < rows; ++r)
    for (int l = 0; l < kLanes; ++l) {
      const bool there = end - from >= 2;
      const uint32_t used = step(l, r, there ? from : none);
      if (used && !there) return kAnsShort;
      from += used;
    }
  d.from = from;
  for (uint32_t state : x)
    if (state != kLow) return kAnsState;
  return 0;
}

}  // namespace

int64_t ans_decode(const uint8_t* data, int64_t bytes, const uint8_t* companion, int64_t n, uint8_t* out) {
  if (bytes < 1) return kAnsShort;
  const int held = data[0] >> 4, classes = (data[0] & 15) + 1;
  const bool one = held >= kAnsOne;
  const int key = one ? held - kAnsOne : held;
  if (key > kPlain) return kAnsTable;
  const int64_t tail = one ? 0 : n % (n < kAnsLong ? kAnsFew : kAnsMany);
  if (bytes < classes + tail) return kAnsShort;
  const uint8_t flip = ans_flip(key), *cuts = data + 1;
  for (int c = 1; c < classes; ++c)
    if (cuts[c - 1] <= (c > 1 ? cuts[c - 2] : 0)) return kAnsTable;
  Decoder d;
  d.slots.resize(size_t(classes) * kAnsScale);
  for (int b = 0; b < 256; ++b) {
    int c = 0;
    while (c + 1 < classes && ans_key(uint8_t(b), key) >= cuts[c]) ++c;
    d.tables[b] = uint32_t(c * kAnsScale);
  }
  BitReader reader{data + classes, data + bytes - tail};
  for (int c = 0; c < classes; ++c) {
    uint8_t levels[256];
    uint32_t start[257];
    if (!ans_read_levels(reader, flip, levels)) return reader.over ? kAnsShort : kAnsTable;
    ans_starts(levels, start);
    for (uint32_t s = 0; s < 256; ++s)
      for (uint32_t at = start[s]; at < start[s + 1]; ++at)
        d.slots[size_t(c * kAnsScale) + at] = slot_of(s, start[s + 1] - start[s], at - start[s]);
  }
  if (!reader.finish()) return kAnsTable;
  d.from = reader.from, d.end = data + bytes - tail;
  const auto rows = one            ? companion ? decode_rows<1, true> : decode_rows<1, false>
                    : n < kAnsLong ? companion ? decode_rows<kAnsFew, true> : decode_rows<kAnsFew, false>
                    : companion    ? decode_rows<kAnsMany, true>
                                   : decode_rows<kAnsMany, false>;
  const int64_t bad = rows(d, companion, n, out);
  if (bad) return bad;
  if (d.from != d.end) return kAnsTail;
  if (tail) std::memcpy(out + n - tail, d.end, size_t(tail));
  return 0;
}

}  // namespace autoflip
