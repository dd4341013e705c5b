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

// Where in a weight (outputs, channels, area) the tap at a row and a column of a layout stands.
struct Entries {
  Images images, out;
  Kernel kernel;
  bool turned;

  int64_t rows() const { return out.channels * out.phases(); }
  int64_t cols() const { return images.channels * kernel.area(); }
  // taps in the order of their offsets, so the turned kernel's from the last one on
  int64_t tap(int64_t col) const {
    const int64_t k = col % kernel.area();
    return turned ? kernel.area() - 1 - k : k;
  }
  Tap down(int64_t col) const { return kernel.down.at(tap(col) / kernel.across.taps); }
  Tap across(int64_t col) const { return kernel.across.at(tap(col) % kernel.across.taps); }

  // -1: the row is of a phase that this tap does not meet
  int64_t at(Row row, int64_t col) const {
    const int64_t channel = col / kernel.area();
    if (!turned) return (row.channel * images.channels + channel) * kernel.area() + tap(col);
    if (down(col).phase * out.stride + across(col).phase != row.phase) return -1;
    return (channel * out.channels + row.channel) * kernel.area() + tap(col);
  }
  // vectors from the first of the panel of the column's channel
  int64_t offset(int64_t col) const {
    const Tap y = down(col), x = across(col);
    const int64_t line = turned ? images.pad_height - y.shift : images.pad_height + y.shift,
                  column = turned ? images.pad_width - x.shift : images.pad_width + x.shift;
    const int64_t phase = turned ? 0 : y.phase * images.stride + x.phase;
    return (phase * images.full_height() + line) * images.full_width() + column;
  }
};

}  // namespace

std::vector<uint8_t> masked_conv_layout(const MaskedConv& conv, const uint8_t* mask, Images images,
                                        Images out, Kernel kernel, int64_t tile_height, int64_t tile_width,
                                        bool turned) {
  const Entries entries = {images, out, kernel, turned};
  const int64_t area = kernel.area(), rows = entries.rows(), cols = entries.cols(),
                chunk = channels_of_chunk(conv, images, kernel, tile_height, tile_width) * area,
                block = channels_of_block(out) * out.phases();
  if (chunk == 0 || block == 0) return {};
  std::vector<uint8_t> other;
  if (turned) {  // else the mask's rows and columns are the layout's
    other.resize(size_t(rows * cols));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        const int64_t from = entries.at(row_of_layout(out, r), c);
        other[size_t(r * cols + c)] = from >= 0 && mask[from];
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
        const int64_t row = t / chunks * block + (layout.runs[i] & 0xffff), count = layout.runs[i] >> 16;
        for (int r = 0; r < kGroup; ++r) {
          if (!(kPattern[slot] >> r & 1)) continue;
          for (int64_t j = 0; j < count; ++j)
            index.push_back(int32_t(entries.at(row_of_layout(out, row + r), t % chunks * chunk + column[j])));
        }
        for (int64_t j = 0; j < count; ++j, ++column)
          *column = uint16_t(*column / area * images.map() + entries.offset(*column));
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
