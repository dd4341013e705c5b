// The panels of masked_conv.h: images in, samples as SIMD lanes out, and back.
#pragma once
#include <cstddef>

#include "cpu/masked_conv.h"
#include "cpu/masked_matmul_transpose.h"

namespace autoflip {
namespace {

int64_t panel_size(Images images) {
  return ceil_div(images.n, kVector) * images.channels * images.map() * kVector;
}

AF_INLINE void copy(const float* from, int64_t vectors, float* to) {
  for (int64_t i = 0; i < vectors; ++i) store(to + i * kVector, load(from + i * kVector));
}
AF_INLINE void clear(float* to, int64_t vectors) {
  for (int64_t i = 0; i < vectors; ++i) store(to + i * kVector, vec{});
}

// what is added up to four vectors at a time: a sum waits four cycles for the one before it
struct Sums {
  vec part[4] = {};
  AF_INLINE void add(const float* from, int64_t vectors) {
    int64_t i = 0;
    for (; i + 4 <= vectors; i += 4)
      unroll<0, 4>([&](auto j)
                       AF_LAMBDA { part[j.value] = part[j.value] + load(from + (i + j.value) * kVector); });
    for (; i < vectors; ++i) part[0] = part[0] + load(from + i * kVector);
  }
  AF_INLINE float total() const {
    alignas(64) float lanes[kVector];
    store(lanes, (part[0] + part[1]) + (part[2] + part[3]));
    float sum = 0;
    for (float lane : lanes) sum += lane;
    return sum;
  }
};

#if defined(__AVX512F__)
// One channel whose lines are whole eights of positions: two eights at a time are turned round where they
// belong. `out`: its first line's first position.
template <bool Sum>
float pad_eights(const float* maps, int64_t stride, int64_t samples, Images images, float* out) {
  const int64_t full = images.full_width(), left = images.pad_width, width = images.width;
  const int64_t area = images.height * width;
  const auto place = [&](int64_t p) AF_LAMBDA { return out + (p / width * full + p % width) * kVector; };
  for (int64_t h = 0; full > width && h < images.height; ++h) {
    clear(out + (h * full - left) * kVector, left);
    clear(out + (h * full + width) * kVector, images.after_width);
  }
  for (int64_t p = 0; p < area; p += 16)
    transpose_tile(maps + p, stride, samples, area - p, place(p), kVector, 0xffff, 16 * kVector,
                   place(p + 8) - place(p) - 8 * kVector);
  Sums sums;
  for (int64_t h = 0; Sum && h < images.height; ++h) sums.add(out + h * full * kVector, width);
  return sums.total();
}
#endif

// One channel of one group of samples in its phases; `maps` are n apart by `stride`.
void split_channel(const float* maps, int64_t stride, int64_t samples, Images images, float* out) {
  constexpr int64_t kPiece = 64;
  const int64_t full = images.full_width(), s = images.stride, phase = images.phase() * kVector;
  clear(out, images.map());
  out += (images.pad_height * full + images.pad_width) * kVector;
  alignas(64) float piece[kPiece * kVector];
  for (int64_t h = 0; h < images.height; ++h) {
    float* line = out + h % s * s * phase + h / s * full * kVector;
    for (int64_t begin = 0; begin < images.width; begin += kPiece) {
      const int64_t count = images.width - begin < kPiece ? images.width - begin : kPiece;
      transpose<true>(maps + h * images.width + begin, stride, samples, count, piece, kVector);
      for (int64_t i = 0; i < count; ++i)
        store(line + (begin + i) % s * phase + (begin + i) / s * kVector, load(piece + i * kVector));
    }
  }
}

// One channel of one group of samples; `maps` are n apart by `stride`. Returns its sum if asked.
template <bool Sum>
float pad_channel(const float* maps, int64_t stride, int64_t samples, Images images, float* out) {
  constexpr int64_t kPiece = 64;
  const int64_t full = images.full_width(), left = images.pad_width, width = images.width;
  const int64_t area = images.height * width;
  Sums sums;
  clear(out, images.pad_height * full);
  out += images.pad_height * full * kVector;
#if defined(__AVX512F__)
  if (width % 8 == 0) {
    clear(out + images.height * full * kVector, images.after_height * full);
    return pad_eights<Sum>(maps, stride, samples, images, out + left * kVector);
  }
#endif
  alignas(64) float piece[kPiece * kVector];
  int64_t column = 0;
  float* to = out;
  for (int64_t begin = 0; begin < area; begin += kPiece) {
    const int64_t count = area - begin < kPiece ? area - begin : kPiece;
    const bool gaps = full > width;
    float* straight = gaps ? piece : to;
    transpose<true>(maps + begin, stride, samples, count, straight, kVector);
    if constexpr (Sum) sums.add(straight, count);
    if (!gaps) to += count * kVector;
    for (int64_t done = 0; gaps && done < count;) {
      if (column == 0) {
        clear(to, left);
        to += left * kVector;
      }
      const int64_t part = count - done < width - column ? count - done : width - column;
      copy(piece + done * kVector, part, to);
      to += part * kVector;
      done += part;
      column += part;
      if (column == width) {
        clear(to, images.after_width);
        to += images.after_width * kVector;
        column = 0;
      }
    }
  }
  clear(out + images.height * full * kVector, images.after_height * full);
  return Sum ? sums.total() : 0.0f;
}

// The lines of one group of samples whose channels come last, into all channels of the panel; `x` is the
// group's first sample.
void spread_lines(const float* x, int64_t samples, Images images, int64_t begin, int64_t end, float* out) {
  constexpr int64_t kPiece = 128;
  const int64_t full = images.full_width(), map = images.map() * kVector, phase = images.phase() * kVector;
  const int64_t left = images.pad_width, line = images.width * images.channels, stride = images.stride;
  alignas(64) float piece[kPiece * kVector];
  for (int64_t h = begin; h < end; ++h) {
    // the first of this line's phases
    float* to = out + h % stride * stride * phase + (images.pad_height + h / stride) * full * kVector;
    for (int64_t p = 0; full > images.width / stride && p < stride; ++p)
      for (int64_t c = 0; c < images.channels; ++c) {
        clear(to + p * phase + c * map, left);
        clear(to + p * phase + c * map + (left + images.width / stride) * kVector, images.after_width);
      }
    to += left * kVector;
    int64_t channel = 0, column = 0;
    for (int64_t at = 0; at < line; at += kPiece) {
      const int64_t count = line - at < kPiece ? line - at : kPiece;
      transpose<true>(x + h * line + at, images.height * line, samples, count, piece, kVector);
      for (int64_t i = 0; i < count; ++i) {
        store(to + channel * map, load(piece + i * kVector));
        if (++channel < images.channels) continue;
        channel = 0;
        to += phase;
        if (++column < stride) continue;
        column = 0;
        to += kVector - stride * phase;
      }
    }
  }
}

float sum_channel(Images images, const float* panel) {
  const int64_t full = images.full_width();
  Sums sums;
  panel += (images.pad_height * full + images.pad_width) * kVector;
  for (int64_t h = 0; h < images.height; ++h) sums.add(panel + h * full * kVector, images.width);
  return sums.total();
}

void last_to_panel(const float* x, Images images, float* panel, float* sums, int threads) {
  const int64_t sample = images.channels * images.height * images.width, groups = ceil_div(images.n, kVector),
                above = images.pad_height * images.full_width(),
                below = images.after_height * images.full_width(), phase = images.phase() * kVector;
  // a piece of lines a task, whichever thread takes it
  const int64_t pieces = threads > 1 ? ceil_div(images.height, 4) : 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for
    for (int64_t t = 0; t < groups * pieces; ++t) {
      const int64_t group = t / pieces, first = group * kVector, piece = t % pieces;
      spread_lines(x + first * sample, images.n - first < kVector ? images.n - first : kVector, images,
                   images.height * piece / pieces, images.height * (piece + 1) / pieces,
                   panel + group * images.channels * images.map() * kVector);
    }
#pragma omp for
    for (int64_t t = 0; t < groups * images.channels * images.phases(); ++t) {
      clear(panel + t * phase, above);
      clear(panel + (t + 1) * phase - below * kVector, below);
      if (sums) sums[t] = sum_channel(images, panel + t * phase);  // of images with one phase
    }
  }
}

void to_panel(const float* x, Images images, float* panel, float* sums, int threads) {
  if (images.last) return last_to_panel(x, images, panel, sums, threads);
  const int64_t stride = images.channels * images.height * images.width, area = images.height * images.width,
                map = images.map() * kVector;
  const int64_t tasks = ceil_div(images.n, kVector) * images.channels;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tasks; ++t) {
    const int64_t begin = t / images.channels * kVector, channel = t % images.channels;
    const int64_t samples = images.n - begin < kVector ? images.n - begin : kVector;
    const float* maps = x + begin * stride + channel * area;
    if (images.stride > 1)
      split_channel(maps, stride, samples, images, panel + t * map);
    else if (sums)
      sums[t] = pad_channel<true>(maps, stride, samples, images, panel + t * map);
    else
      pad_channel<false>(maps, stride, samples, images, panel + t * map);
  }
}

// y of one block's rows, a strip of positions: of (rows, positions), a row `stride` floats from the next, or
// of (positions, rows) where channels come last
AF_INLINE void write_rows(const float* strip, int64_t stride, int64_t row, int64_t rows, int64_t all_rows,
                          int64_t top, int64_t positions, int64_t area, int64_t samples, bool last,
                          float* y) {
  if (!last) {
    for (int64_t r = 0; r < rows; ++r)
      transpose<false>(strip + r * stride, kVector, positions, samples, y + (row + r) * area + top,
                       all_rows * area);
    return;
  }
  y += top * all_rows + row;
  if (rows == all_rows) {
    transpose<false>(strip, kVector, positions * rows, samples, y, all_rows * area);
    return;
  }
  for (int64_t p = 0; p < positions; ++p)
    transpose<false>(strip + p * rows * kVector, kVector, rows, samples, y + p * all_rows, all_rows * area);
}

}  // namespace
}  // namespace autoflip
