// The levels of a table that take fewest bits together with the bytes it codes: its neighbour's level is the
// cheapest for a symbol to tell, its own the cheapest to use.
#pragma once
#include "cpu/ans_table.h"

namespace autoflip {
namespace {

constexpr int kFewAbsent = 8;  // symbols in a row that do not occur, and may get slots all the same

// Bits of what a table with these levels codes.
inline float ans_coded_bits(const float* counts, const uint8_t* levels) {
  uint32_t start[257];
  ans_starts(levels, start);
  float bits = 0;
  for (int s = 0; s < 256; ++s)
    if (counts[s] > 0) bits += counts[s] * (float(kAnsBits) - ans_log2(float(start[s + 1] - start[s])));
  return bits;
}

// Dynamic programming over the symbols; its state is the level told last, within a band about the level that
// the symbol's count asks for. A weight's slots are reckoned as if the sum of weights stayed that of
// `levels`, and each has a price for what it takes from the others.
struct LevelSearch {
  static constexpr int kStates = kAnsLevels + 1;
  float coded[kStates], price[kStates];  // of a symbol's level: bits each time it comes, and at once
  float told[2 * kAnsLevels + 1];        // bits that tell a level, by its distance from the last one
  float run[257];                        // and so many absent symbols
  struct Column {
    float bits[kStates], absent[kStates];  // up to here; and if this ends a run of absent symbols
    int low, high;                         // levels that there are
  };
  Column columns[257];  // the one before all symbols first

  LevelSearch(const uint8_t* levels, float total, int k) {
    uint32_t weights = 0;
    int present = 0;
    for (int s = 0; s < 256; ++s)
      if (levels[s]) weights += ans_weight(levels[s]), ++present;
    const float share = float(kAnsScale - present) / float(weights);
    for (int l = 1; l <= kAnsLevels; ++l) {
      const float slots = float(ans_weight(l)) * share + 1;
      coded[l] = float(kAnsBits) - ans_log2(slots);
      price[l] = total * 1.442695f / float(kAnsScale) * slots;
    }
    for (int d = -kAnsLevels; d <= kAnsLevels; ++d)
      told[d + kAnsLevels] = float((ans_zigzag(d) >> k) + 1 + uint32_t(k));
    for (int n = 1, width = 0; n <= 256; ++n) {
      width += n >> (width + 1) > 0;
      run[n] = float(2 + k + 2 * width);
    }
    columns[0].low = columns[0].high = kAnsLevels;
    columns[0].bits[kAnsLevels] = 0;
  }

  // Symbol i, with a level about `middle`.
  void present(int i, float count, float middle) {
    const Column& last = columns[i];
    Column& here = columns[i + 1];
    const int half = 3 + int(6 / std::sqrt(count + 1)), about = int(middle + 0.5f);
    here.low = about - half < 1 ? 1 : about - half;
    here.high = about + half > kAnsLevels ? kAnsLevels : about + half;
    for (int l = here.low; l <= here.high; ++l) here.bits[l] = kNever, here.absent[l] = kNever;
    for (int from = last.low; from <= last.high; ++from) {
      const float before = last.bits[from], *step = told + kAnsLevels - from;
      for (int l = here.low; l <= here.high; ++l) {
        const float with = before + step[l];
        here.bits[l] = with < here.bits[l] ? with : here.bits[l];
      }
    }
    for (int l = here.low; l <= here.high; ++l) here.bits[l] += count * coded[l] + price[l];
  }

  // Symbols first to end - 1 do not occur: all are absent, or all have levels.
  void absent(int first, int end) {
    const Column& last = columns[first];
    Column& here = columns[end];
    const bool choice = end - first <= kFewAbsent && end < 256;
    for (int i = first; choice && i < end; ++i) present(i, 0, 1);
    const int low = here.low, high = here.high;
    here.low = choice && low < last.low ? low : last.low;
    here.high = choice && high > last.high ? high : last.high;
    for (int l = here.low; l <= here.high; ++l) {
      const bool known = choice && l >= low && l <= high, kept = l >= last.low && l <= last.high;
      here.absent[l] = kept ? last.bits[l] + run[end - first] : kNever;
      const float other = known ? here.bits[l] : kNever;
      here.bits[l] = here.absent[l] < other ? here.absent[l] : other;
    }
  }

  // The way here: levels by the order of symbols. begins[i]: where the run of symbols that do not occur began
  // whose last is i - 1, else -1.
  void trace(const int* begins, uint8_t* found) const {
    const auto least = [](const Column& c, auto cost) {
      int best = c.low;
      for (int l = c.low + 1; l <= c.high; ++l) best = cost(l) < cost(best) ? l : best;
      return best;
    };
    int level = least(columns[256], [&](int l) { return columns[256].bits[l]; });
    for (int i = 256; i > 0;) {
      if (begins[i] >= 0 && columns[i].absent[level] <= columns[i].bits[level]) {
        for (const int first = begins[i]; i > first; --i) found[i - 1] = 0;
        continue;
      }
      found[--i] = uint8_t(level);
      const Column& c = columns[i];
      level = least(c, [&](int l) { return c.bits[l] + told[found[i] - l + kAnsLevels]; });
    }
  }

  static constexpr float kNever = 1e30f;
};

// Looks for better levels under the table's Rice parameter k; `bits` are the table's and the coded bytes'
// under `levels`, which become those that are found if they take fewer.
inline void ans_better_levels(const float* counts, uint8_t flip, int k, float bits, uint8_t* levels) {
  float total = 0, exact[256];
  for (int s = 0; s < 256; ++s) total += counts[s];
  ans_exact_levels(counts, exact);
  LevelSearch search(levels, total, k);
  int begins[257];
  for (int i = 0; i < 256;) {
    int end = i;
    while (end < 256 && counts[end ^ flip] <= 0) begins[++end] = -1;
    if (end > i) {
      search.absent(i, end);
      begins[end] = i, i = end;
      continue;
    }
    search.present(i, counts[i ^ flip], exact[i ^ flip]);
    begins[++i] = -1;
  }
  uint8_t order[256], found[256];
  search.trace(begins, order);
  for (int i = 0; i < 256; ++i) found[i ^ flip] = order[i];
  const int64_t table = ans_write_levels(found, flip, ans_rice(found, flip), nullptr);
  if (float(table) + ans_coded_bits(counts, found) < bits) std::memcpy(levels, found, sizeof found);
}

}  // namespace
}  // namespace autoflip
