#include <algorithm>
#include <cstring>

#include "cpu/masked_conv_layout.h"
#include "cpu/masked_matmul_layout.h"

namespace autoflip {
namespace {

// Equal shares: threads take positions, not blocks.
int64_t conv_block(int64_t rows) {
  const int64_t blocks = std::max<int64_t>(1, ceil_div(rows, kConvBlock));
  return std::max<int64_t>(1, ceil_div(ceil_div(rows, blocks), kGroup)) * kGroup;
}

// mask (channels, rows, area) as (rows, channels, area), each kernel turned round
std::vector<uint8_t> turn(const uint8_t* mask, int64_t rows, int64_t channels, int64_t area) {
  std::vector<uint8_t> out(size_t(rows * channels * area));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c)
      std::reverse_copy(mask + (c * rows + r) * area, mask + (c * rows + r + 1) * area,
                        out.begin() + (r * channels + c) * area);
  return out;
}

}  // namespace

std::vector<uint8_t> masked_conv_layout(const MaskedConv& conv, const uint8_t* mask, int64_t rows,
                                        Images images, Kernel kernel, int64_t tile_height, int64_t tile_width,
                                        bool turned) {
  const int64_t area = kernel.area(), cols = images.channels * area, block = conv_block(rows);
  const int64_t chunk = channels_of_chunk(conv, images, kernel, tile_height, tile_width) * area;
  if (chunk == 0) return {};
  std::vector<uint8_t> other;
  if (turned) {
    other = turn(mask, rows, images.channels, area);
    mask = other.data();
  }
  std::vector<uint8_t> bytes = masked_matmul_layout(mask, rows, cols, chunk, block);
  const Layout layout = masked_matmul_layout_at(bytes.data(), rows, cols, chunk, block);

  std::vector<int32_t> index;
  const int64_t chunks = ceil_div(cols, chunk), cells = ceil_div(rows, block) * chunks;
  uint16_t* column = const_cast<uint16_t*>(layout.columns);  // of `bytes`, which is ours
  for (int64_t t = 0; t < cells; ++t)
    for (int slot = 0; slot < kPatterns; ++slot)
      for (int64_t i = layout.table[t * kTable + 2 + slot]; i < layout.table[t * kTable + 3 + slot]; ++i) {
        const int64_t row = t / chunks * block + (layout.runs[i] & 0xffff), count = layout.runs[i] >> 16;
        for (int r = 0; r < kGroup; ++r) {
          if (!(kPattern[slot] >> r & 1)) continue;
          for (int64_t j = 0; j < count; ++j) {
            const int64_t col = t % chunks * chunk + column[j], c = col / area, k = col % area;
            index.push_back(
                int32_t(turned ? (c * rows + row + r) * area + area - 1 - k : (row + r) * cols + col));
          }
        }
        for (int64_t j = 0; j < count; ++j, ++column) {
          const int64_t c = *column / area, k = *column % area;
          *column = uint16_t((c * images.full_height() + k / kernel.width * kernel.dilation_height) *
                                 images.full_width() +
                             k % kernel.width * kernel.dilation_width);
        }
      }
  std::vector<uint8_t> out(index.size() * 4 + bytes.size());
  if (!index.empty()) std::memcpy(out.data(), index.data(), index.size() * 4);
  std::memcpy(out.data() + index.size() * 4, bytes.data(), bytes.size());
  return out;
}

Layout masked_conv_layout_at(const MaskedConv& conv, const uint8_t* bytes, int64_t kept, int64_t rows,
                             Images images, Kernel kernel, int64_t tile_height, int64_t tile_width) {
  const int64_t area = kernel.area(),
                chunk = channels_of_chunk(conv, images, kernel, tile_height, tile_width) * area;
  return masked_matmul_layout_at(bytes + kept * 4, rows, images.channels * area, chunk, conv_block(rows));
}

}  // namespace autoflip
