#include "cpu/masked_few.h"

#include <cstring>

#include "cpu/masked_matmul.h"

namespace autoflip {

std::vector<uint8_t> masked_few_bits(const uint8_t* mask, int64_t rows, int64_t cols) {
  const int64_t words = ceil_div(cols, 16);
  std::vector<uint8_t> bytes(std::size_t(rows * words) * 2);
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* row = bytes.data() + 2 * r * words;
    int64_t k = 0;
    for (; k + 8 <= cols; k += 8) {
      uint64_t eight;  // entries, each 0 or 1; the product brings them side by side at its top
      std::memcpy(&eight, mask + r * cols + k, sizeof eight);
      row[k / 8] = uint8_t(eight * 0x0102040810204080u >> 56);
    }
    for (; k < cols; ++k) row[k / 8] = uint8_t(row[k / 8] | mask[r * cols + k] << k % 8);
  }
  return bytes;
}

}  // namespace autoflip
