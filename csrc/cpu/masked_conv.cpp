#include <algorithm>
#include <cstring>

#include "cpu/masked_conv_layout.h"
#include "cpu/masked_matmul_layout.h"

namespace autoflip {
namespace {

// What a row of a layout stands for: a channel of `out` in one of its phases.
struct Row {
  int64_t channel, phase;
};

// blocks of channels, in each of them phase by phase
Row row_of_layout(Images out, int64_t row) {
  const int64_t block = channels_of_block(out), phases = out.phases();
  const int64_t first = row / (block * phases) * block, some = std::min(block, out.channels - first);
  const int64_t inside = row - first * phases;
  return {first + inside % some, inside / some};
}

// A column of a layout within its channel: a tap of the kernel.
struct Column {
  int64_t tap;     // in the weight
  int64_t phase;   // of x, that it meets
  int64_t offset;  // vectors from the first of its channel in the panel
};

// in the order of their offsets, so the turned kernel's from the last one on
std::vector<Column> columns_of(Images images, int64_t stride, Kernel kernel, bool turned) {
  std::vector<Column> found;
  for (int64_t k = 0; k < kernel.area(); ++k) {
    const int64_t tap = turned ? kernel.area() - 1 - k : k;
    const Tap y = kernel.down.at(tap / kernel.across.taps), x = kernel.across.at(tap % kernel.across.taps);
    const int64_t phase = y.phase * stride + x.phase,
                  line = images.pad_height + (turned ? -y.shift : y.shift),
                  column = images.pad_width + (turned ? -x.shift : x.shift);
    found.push_back(
        {tap, phase, ((turned ? 0 : phase) * images.full_height() + line) * images.full_width() + column});
  }
  return found;
}

}  // namespace

std::vector<uint8_t> masked_conv_layout(const MaskedConv& conv, const uint8_t* mask, Images images,
                                        Images out, Kernel kernel, int64_t tile_height, int64_t tile_width,
                                        bool turned) {
  const int64_t area = kernel.area(), rows = out.channels * out.phases(), cols = images.channels * area,
                chunk = channels_of_chunk(conv, images, kernel, tile_height, tile_width) * area,
                block = channels_of_block(out) * out.phases();
  if (chunk == 0 || block == 0) return {};
  const std::vector<Column> taps = columns_of(images, turned ? out.stride : images.stride, kernel, turned);
  // where in the weight a row's and a channel's taps begin
  const auto entry = [&](Row row, int64_t channel) {
    return (turned ? channel * out.channels + row.channel : row.channel * images.channels + channel) * area;
  };
  std::vector<uint8_t> other;
  if (turned) {  // else the mask's rows and columns are the layout's
    other.resize(size_t(rows * cols));
    uint8_t* to = other.data();
    for (int64_t r = 0; r < rows; ++r) {
      const Row row = row_of_layout(out, r);
      for (int64_t c = 0; c < images.channels; ++c) {
        const uint8_t* from = mask + entry(row, c);
        for (const Column& k : taps) *to++ = k.phase == row.phase ? from[k.tap] : 0;
      }
    }
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
        const int64_t first = t / chunks * block + (layout.runs[i] & 0xffff), count = layout.runs[i] >> 16;
        for (int r = 0; r < kGroup; ++r) {
          if (!(kPattern[slot] >> r & 1)) continue;
          const Row row = row_of_layout(out, first + r);
          for (int64_t j = 0; j < count; ++j)
            index.push_back(int32_t(entry(row, t % chunks * (chunk / area) + column[j] / area) +
                                    taps[size_t(column[j] % area)].tap));
        }
        for (int64_t j = 0; j < count; ++j, ++column)
          *column = uint16_t(*column / area * images.map() + taps[size_t(*column % area)].offset);
      }
  std::vector<uint8_t> made(index.size() * 4 + bytes.size());
  if (!index.empty()) std::memcpy(made.data(), index.data(), index.size() * 4);
  std::memcpy(made.data() + index.size() * 4, bytes.data(), bytes.size());
  return made;
}

Layout masked_conv_layout_at(const MaskedConv& conv, const uint8_t* bytes, int64_t kept, Images images,
                             Images out, Kernel kernel, int64_t tile_height, int64_t tile_width) {
  const int64_t area = kernel.area(),
                chunk = channels_of_chunk(conv, images, kernel, tile_height, tile_width) * area;
  return masked_matmul_layout_at(bytes + kept * 4, out.channels * out.phases(), images.channels * area, chunk,
                                 channels_of_block(out) * out.phases());
}

}  // namespace autoflip
