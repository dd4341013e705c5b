// Builds the layout that masked_matmul.h describes.
#include "cpu/masked_matmul.h"

#include <cstring>

namespace autoflip {
namespace {

// patterns[k] = which of `live` rows, `stride` apart, keep column k
void patterns_of_rows(const uint8_t* corner, int64_t stride, int64_t live, int64_t width, uint8_t* patterns) {
  std::memcpy(patterns, corner, size_t(width));
  for (int64_t r = 1; r < live; ++r) {
    const uint8_t* row = corner + r * stride;
    for (int64_t k = 0; k < width; ++k) patterns[k] = uint8_t(patterns[k] | (row[k] << r));
  }
}

// the same for `live` neighbours in memory, columns `stride` apart
void patterns_of_columns(const uint8_t* corner, int64_t stride, int64_t live, int64_t width,
                         uint8_t* patterns) {
  if (live == kGroup) {
    for (int64_t k = 0; k < width; ++k) {
      const uint8_t* p = corner + k * stride;
      patterns[k] = uint8_t(p[0] | p[1] << 1 | p[2] << 2 | p[3] << 3);
    }
    return;
  }
  for (int64_t k = 0; k < width; ++k) {
    patterns[k] = 0;
    for (int64_t r = 0; r < live; ++r) patterns[k] = uint8_t(patterns[k] | corner[k * stride + r] << r);
  }
}

}  // namespace

int64_t masked_matmul_layout_bound(int64_t rows, int64_t cols) {
  const int64_t groups = ceil_div(rows, kGroup);
  return groups * (ceil_div(cols, kChunk) * kTable * int64_t(sizeof(int32_t)) + cols);
}

int64_t masked_matmul_layout(const uint8_t* mask, int64_t mask_rows, int64_t mask_cols, bool transposed,
                             uint8_t* layout) {
  const int64_t rows = transposed ? mask_cols : mask_rows, cols = transposed ? mask_rows : mask_cols;
  const int64_t groups = ceil_div(rows, kGroup), chunks = ceil_div(cols, kChunk);
  int32_t* table = reinterpret_cast<int32_t*>(layout);
  uint8_t* columns = layout + groups * chunks * kTable * int64_t(sizeof(int32_t));
  int32_t used = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t live = rows - g * kGroup < kGroup ? rows - g * kGroup : kGroup;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t width = cols - c * kChunk < kChunk ? cols - c * kChunk : kChunk;
      uint8_t patterns[kChunk], kept[kChunk];
      if (transposed)
        patterns_of_columns(mask + c * kChunk * mask_cols + g * kGroup, mask_cols, live, width, patterns);
      else
        patterns_of_rows(mask + g * kGroup * mask_cols + c * kChunk, mask_cols, live, width, patterns);
      int count[kTable] = {}, n = 0;
      for (int64_t k = 0; k < width; ++k) {  // without a branch: masks are random
        kept[n] = uint8_t(k);
        n += patterns[k] != 0;
      }
      for (int i = 0; i < n; ++i) ++count[patterns[kept[i]]];
      int32_t next[kTable];
      for (int p = 1; p < kTable; ++p) {
        table[p - 1] = next[p] = used;
        used += count[p];
      }
      table[kTable - 1] = used;
      table += kTable;
      for (int i = 0; i < n; ++i) columns[next[patterns[kept[i]]]++] = kept[i];
    }
  }
  return columns + used - layout;
}

}  // namespace autoflip
