#include <algorithm>
#include <cstring>

#include "cpu/masked_matmul_layout.h"

namespace autoflip {
namespace {

// vector multiply-adds below which a bucket of several rows costs more than it saves
constexpr int64_t kShortest = 12;

struct Run {
  int64_t row, begin, count;  // first row in the block; columns in the pool
};

// The runs of one (block, chunk), by pattern, and the pool of their columns.
class Cell {
 public:
  void clear() {
    pool_.clear();
    for (auto& runs : runs_) runs.clear();
  }

  // the four rows from `row` on; patterns of `width` columns
  void add(int64_t row, const uint8_t* patterns, int64_t width) {
    int64_t begin = int64_t(pool_.size());
    const Buckets found = bucket_columns(patterns, width, 4, kShortest, pool_);
    for (int slot = 0; slot + 1 < kPatterns; ++slot) {
      const int64_t count = found.whole[kPattern[slot]];
      if (count) runs_[slot].push_back({row, begin, count});
      begin += count;
    }
    for (int r = 0; r < kGroup; ++r) {
      if (found.singles[r]) runs_[kPatterns - 1].push_back({row + r, begin, found.singles[r]});
      begin += found.singles[r];
    }
  }

  void write(int32_t* table, std::vector<uint32_t>& runs, std::vector<uint16_t>& columns, int32_t& values) {
    table[0] = int32_t(columns.size());
    table[1] = values;
    for (int slot = 0; slot < kPatterns; ++slot) {
      auto& mine = runs_[slot];
      std::stable_sort(mine.begin(), mine.end(),
                       [](const Run& a, const Run& b) { return a.count > b.count; });
      table[2 + slot] = int32_t(runs.size());
      for (const Run& run : mine) {
        runs.push_back(uint32_t(run.row) | uint32_t(run.count) << 16);
        columns.insert(columns.end(), pool_.begin() + run.begin, pool_.begin() + run.begin + run.count);
        values += int32_t(run.count) * __builtin_popcount(unsigned(kPattern[slot]));
      }
    }
    table[2 + kPatterns] = int32_t(runs.size());
  }

 private:
  std::vector<Run> runs_[kPatterns];
  std::vector<uint16_t> pool_;
};

}  // namespace

void patterns_of_rows(const uint8_t* corner, int64_t stride, int64_t live, int64_t width, uint8_t* patterns) {
  std::memcpy(patterns, corner, size_t(width));
  for (int64_t r = 1; r < live; ++r) {
    const uint8_t* row = corner + r * stride;
    for (int64_t k = 0; k < width; ++k) patterns[k] = uint8_t(patterns[k] | (row[k] << r));
  }
}

Buckets bucket_columns(const uint8_t* patterns, int64_t width, int64_t unit, int64_t shortest,
                       std::vector<uint16_t>& pool) {
  Buckets found = {};
  int64_t count[16] = {}, next[16], left[16] = {}, begin = int64_t(pool.size());
  uint16_t at[kMaxChunk];
  for (int64_t k = 0; k < width; ++k) {  // without a branch: masks are random
    at[found.kept] = uint16_t(k);
    found.kept += patterns[k] != 0;
  }
  for (int64_t i = 0; i < found.kept; ++i) ++count[patterns[at[i]]];
  for (int slot = 0; slot + 1 < kPatterns; ++slot) {
    const int p = kPattern[slot];
    const int64_t whole = count[p] / unit * unit;
    if (whole * __builtin_popcount(unsigned(p)) >= shortest) left[p] = found.whole[p] = whole;
    next[p] = begin;
    begin += found.whole[p];
  }
  for (int r = 0; r < kGroup; ++r) {
    for (int p = 1; p < 16; ++p)
      if (p >> r & 1) found.singles[r] += count[p] - found.whole[p];
    next[1 << r] = begin;
    begin += found.singles[r];
  }
  pool.resize(size_t(begin));
  for (int64_t i = 0; i < found.kept; ++i) {
    const int p = patterns[at[i]];
    if (left[p] > 0) {
      pool[size_t(next[p]++)] = at[i];
      --left[p];
      continue;
    }
    for (int r = 0; r < kGroup; ++r)
      if (p >> r & 1) pool[size_t(next[1 << r]++)] = at[i];
  }
  return found;
}

std::vector<uint8_t> masked_matmul_layout(const uint8_t* mask, int64_t rows, int64_t cols, int64_t chunk,
                                          int64_t block) {
  const int64_t blocks = ceil_div(rows, block), chunks = ceil_div(cols, chunk);
  std::vector<int32_t> table(size_t(blocks * chunks * kTable));
  std::vector<uint32_t> runs;
  std::vector<uint16_t> columns;
  std::vector<uint8_t> patterns(size_t(chunk), 0);
  Cell cell;
  int32_t values = 0;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t first = c * chunk, width = std::min(chunk, cols - first);
      cell.clear();
      for (int64_t row = b * block; row < rows && row < (b + 1) * block; row += kGroup) {
        const int64_t live = std::min<int64_t>(kGroup, rows - row);
        patterns_of_rows(mask + row * cols + first, cols, live, width, patterns.data());
        cell.add(row - b * block, patterns.data(), width);
      }
      cell.write(&table[size_t((b * chunks + c) * kTable)], runs, columns, values);
    }
  // the number of runs tells a reader where the columns begin
  table.push_back(int32_t(runs.size()));
  constexpr size_t kAhead = 16;
  std::vector<uint8_t> bytes(table.size() * 4 + runs.size() * 4 + columns.size() * 2 + kAhead);
  uint8_t* to = bytes.data();
  const auto put = [&to](const void* from, size_t size) {
    if (size) std::memcpy(to, from, size);
    to += size;
  };
  put(table.data(), table.size() * 4);
  put(runs.data(), runs.size() * 4);
  put(columns.data(), columns.size() * 2);
  return bytes;  // and zeros: whoever reads columns ahead reads past the last one
}

Layout masked_matmul_layout_at(const uint8_t* bytes, int64_t rows, int64_t cols, int64_t chunk,
                               int64_t block) {
  const int64_t cells = ceil_div(rows, block) * ceil_div(cols, chunk);
  const int32_t* table = reinterpret_cast<const int32_t*>(bytes);
  const uint32_t* runs = reinterpret_cast<const uint32_t*>(table + cells * kTable + 1);
  return {table, runs, reinterpret_cast<const uint16_t*>(runs + table[cells * kTable]), rows, cols,
          block, chunk};
}

}  // namespace autoflip
