#include "cpu/masked_few.h"

#include "cpu/masked_matmul.h"

namespace autoflip {

std::vector<uint8_t> masked_few_bits(const uint8_t* mask, int64_t rows, int64_t cols) {
  const int64_t words = ceil_div(cols, 16);
  std::vector<uint8_t> bytes(std::size_t(rows * words) * 2);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < cols; ++k)
      if (mask[r * cols + k])
        bytes[std::size_t(2 * (r * words + k / 16) + k % 16 / 8)] |= uint8_t(1u << k % 8);
  return bytes;
}

}  // namespace autoflip
