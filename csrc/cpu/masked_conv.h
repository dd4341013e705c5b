// y = conv2d(x, w * mask) + bias, its gradient in x and its sampled gradient in w, for one CPU instruction
// set. No im2col: a column of the weight (input channel, ky, kx) is an offset into the input.
//
// With a stride s x comes apart into s * s phases, of each s-th line and column. A tap of the kernel meets
// one of them, at positions next to each other: products and the gradient in w know of no stride. The
// gradient in x has rows (block of channels, phase, channel), each of which keeps the taps that meet its
// phase.
//
// The layout of a mask is masked_matmul.h's, with rows = output channels, columns = (input channel, ky, kx)
// and a chunk of whole input channels, as many as keep the input of one tile in the first-level cache. Its
// column numbers are replaced by offsets into a panel, in vectors from the chunk's first channel. The
// gradient in x is the same product over dy, with rows = input channels and columns = (output channel, ky,
// kx) turned round. In memory, little-endian:
//   int32 index[kept]   where the value that comes i-th in the layout stands in the weight
//   then the layout
//
// Panels: [group of lanes][channel][phase][padded height][padded width][lane]; a sample is a SIMD lane,
// missing samples and the border are zeros.
//
// Sums do not depend on the thread count: no sum is ever cut between threads.
#pragma once
#include "cpu/masked_matmul.h"

namespace autoflip {

constexpr int64_t kConvBlock = 64;  // most rows of a block

// n images of some channels, in panels apart into phases of height / stride lines of width / stride, each
// padded by (pad_height, pad_width) before and (after_height, after_width) behind. `last`: outside of panels
// they lie (n, height, width, channels), else (n, channels, height, width)
struct Images {
  int64_t n, channels, height, width, pad_height, pad_width;
  bool last;
  int64_t after_height, after_width, stride;
  int64_t phases() const { return stride * stride; }
  int64_t full_height() const { return pad_height + height / stride + after_height; }
  int64_t full_width() const { return pad_width + width / stride + after_width; }
  int64_t phase() const { return full_height() * full_width(); }  // vectors
  int64_t map() const { return phases() * phase(); }
};

// Where along one axis of x the tap at k stands: output o meets it at line o + shift of a phase.
struct Tap {
  int64_t phase, shift;
};

struct Axis {
  int64_t taps, dilation, pad, stride;
  Tap at(int64_t k) const {
    const int64_t from = k * dilation - pad, shift = (from >= 0 ? from : from - stride + 1) / stride;
    return {from - shift * stride, shift};
  }
  // how far its last tap is from its first
  int64_t span() const { return at(taps - 1).shift - at(0).shift; }
};

struct Kernel {
  Axis down, across;
  int64_t area() const { return down.taps * across.taps; }
  int64_t span_height() const { return down.span(); }
  int64_t span_width() const { return across.span(); }
};

struct MaskedConv {
  int64_t lanes;                        // of a panel
  int64_t tile;                         // positions in a row that a product takes at once, or twice as many
  int64_t sample_height, sample_width;  // and the gradient's rectangle
  // floats of a panel
  int64_t (*panel_size)(Images images);
  // panel = x. sums, unless null (stride 1): (groups of lanes, channels), what each channel adds up to over
  // its group's samples and positions
  void (*to_panel)(const float* x, Images images, float* panel, float* sums, int threads);
  // values[i] = w[index[i]]
  void (*gather)(const int32_t* index, int64_t kept, const float* w, float* values);
  // y, images like `out`, = convolution of the panel plus bias (a value a row) or null. tile: tile_of;
  // scratch: strip_size floats a thread
  void (*multiply)(Layout layout, int64_t tile, const float* values, const float* panel, Images images,
                   Kernel kernel, const float* bias, float* y, Images out, float* scratch, int threads);
  int64_t (*strip_size)(Images images, Kernel kernel, int64_t block);
  // dw[index[i]] = sum over samples and positions of dy * x at the i-th kept weight. Panels of x and dy.
  // scratch: kept floats
  void (*gradient)(Layout layout, const int32_t* index, int64_t kept, const float* x, Images x_images,
                   const float* dy, Images dy_images, Kernel kernel, float* dw, float* scratch, int threads);
};

extern const MaskedConv masked_conv_base;
extern const MaskedConv masked_conv_avx2;
extern const MaskedConv masked_conv_avx512;

// Positions that a product takes at once. Where few weights are kept most are alone in their group of rows:
// such a one asks for as many loads as multiply-adds and one for itself, whose share falls with the
// positions.
inline int64_t tile_of(const MaskedConv& conv, int64_t kept, int64_t entries) {
  return kept * 6 < entries ? 2 * conv.tile : conv.tile;
}

// Input channels of a chunk for tiles of height x width positions, 0 where offsets do not fit 16 bits.
inline int64_t channels_of_chunk(const MaskedConv& conv, Images images, Kernel kernel, int64_t tile_height,
                                 int64_t tile_width) {
  const int64_t cache = (tile_width > conv.tile ? 48 : 64) << 10;  // bytes
  const int64_t touched = (tile_height + kernel.span_height()) * (tile_width + kernel.span_width()) *
                          images.phases() * conv.lanes * 4;
  // equal chunks, of about as many channels as the cache holds: a short one at the end would have short runs
  const int64_t chunks = (2 * images.channels * touched + cache) / (2 * cache);
  int64_t channels = ceil_div(images.channels, chunks > 1 ? chunks : 1);
  const auto at_most = [&](int64_t most) {
    if (most > 0 && channels > most) channels = ceil_div(images.channels, ceil_div(images.channels, most));
  };
  at_most(kMaxChunk / kernel.area());
  // vectors to the last tap in one channel
  const int64_t reach =
      ((images.phases() - 1) * images.full_height() + kernel.span_height()) * images.full_width() +
      kernel.span_width();
  if (kernel.area() > kMaxChunk || reach > 65535) return 0;
  at_most(1 + (65535 - reach) / images.map());
  return channels;
}

// Channels of a block of a layout whose rows are those of `out`, in all their phases; 0 where none fits.
inline int64_t channels_of_block(Images out) {
  const int64_t phases = out.phases();
  int64_t step = 1;  // blocks are whole groups of rows
  while (step * phases % kGroup) ++step;
  if (step * phases > kConvBlock) return 0;
  const int64_t blocks = ceil_div(out.channels, kConvBlock / phases / step * step);
  return ceil_div(ceil_div(out.channels, blocks > 1 ? blocks : 1), step) * step;
}

}  // namespace autoflip
