// Builds the layout that masked_matmul.h describes.
#include "cpu/masked_matmul.h"

#include <cstring>

namespace autoflip {

int64_t masked_matmul_layout(const uint8_t* mask, int64_t rows, int64_t cols, int64_t row_stride,
                             int64_t column_stride, uint8_t* layout) {
  const int64_t groups = ceil_div(rows, kGroup), chunks = ceil_div(cols, kChunk);
  const int64_t table_bytes = groups * chunks * kTable * int64_t(sizeof(int32_t));
  int32_t* table = reinterpret_cast<int32_t*>(layout);
  uint8_t* columns = layout ? layout + table_bytes : nullptr;
  int64_t used = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t live = rows - g * kGroup < kGroup ? rows - g * kGroup : kGroup;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t width = cols - c * kChunk < kChunk ? cols - c * kChunk : kChunk;
      const uint8_t* corner = mask + g * kGroup * row_stride + c * kChunk * column_stride;
      uint8_t patterns[kChunk] = {};
      for (int64_t r = 0; r < live; ++r)
        for (int64_t k = 0; k < width; ++k)
          patterns[k] |= uint8_t((corner[r * row_stride + k * column_stride] != 0) << r);
      int32_t count[kTable] = {};
      for (int64_t k = 0; k < width; ++k) ++count[patterns[k]];
      if (!layout) {
        used += width - count[0];
        continue;
      }
      int32_t next[kTable] = {};
      for (int p = 1; p < kTable; ++p) {
        table[p - 1] = next[p] = int32_t(used);
        used += count[p];
      }
      table[kTable - 1] = int32_t(used);
      table += kTable;
      for (int64_t k = 0; k < width; ++k)
        if (patterns[k]) columns[next[patterns[k]]++] = uint8_t(k);
    }
  }
  return table_bytes + used;
}

}  // namespace autoflip
