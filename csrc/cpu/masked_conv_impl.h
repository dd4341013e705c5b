// The products of masked_conv.h for the instruction set that the including source is compiled for.
//
// Measured by bench/bench_layers.py --only conv.
#pragma once
#include <cstddef>

#include "cpu/masked_conv_panel.h"
#include "cpu/masked_matmul_runs.h"

namespace autoflip {
namespace {

constexpr int64_t kTall = 4, kWide = 8;  // the gradient's tiles
// Of narrower vectors a tile takes more positions, along lines first: each adds up its sums' lanes at its
// end, and each line begins the loop anew.
constexpr int64_t kWideTile = sizeof(vec) == 64 ? kWide : 32, kTileSize = 64;

void gather(const int32_t* index, int64_t kept, const float* w, float* values) {
  for (int64_t i = 0; i < kept; ++i) values[i] = w[index[i]];
}

// Lines that are finished together: as many as fill whole tiles of a transpose.
AF_INLINE int64_t lines_of_strip(int64_t height, int64_t width) {
  int64_t lines = 1;
  while (lines < height && lines * width % 16) ++lines;
  return lines;
}

int64_t strip_size(Images images, Kernel kernel, int64_t block) {
  const int64_t height = images.full_height() - kernel.span_height(),
                width = images.full_width() - kernel.span_width();
  // not a power of two: rows must not meet in one set of the cache
  return block * (lines_of_strip(height, width) * width + 4) * kVector;
}

// Positions of one row of a layout, at sums, come to their places in a strip: `step` vectors apart.
AF_INLINE void place_sums(const float* sums, int64_t count, float* strip, int64_t step) {
  for (int64_t v = 0; v < count; ++v) store(strip + v * step * kVector, load(sums + v * kVector));
}

void multiply(Layout layout, int64_t tile, const float* values, const float* panel, Images images,
              Kernel kernel, const float* bias, float* y, Images out, float* scratch, int threads) {
  const int64_t blocks = ceil_div(layout.rows, layout.block), chunks = ceil_div(layout.cols, layout.chunk);
  const int64_t full = images.full_width(), map = images.map() * kVector;
  const int64_t height = images.full_height() - kernel.span_height(), width = full - kernel.span_width();
  const int64_t area = out.height * out.width, step = layout.chunk / kernel.area() * map;
  const int64_t tiles = ceil_div(width, tile), deep = lines_of_strip(height, width);
  const int64_t strips = ceil_div(height, deep), groups = ceil_div(images.n, kVector);
  const int64_t stride = out.stride, phases = out.phases(), channels = layout.block / phases;
  const int64_t row_stride = (deep * width * phases + 4) * kVector, tasks = groups * strips;
  // channels that come last, or phases, lie too far apart in a strip to be added up there
  const bool apart = out.last || stride > 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    alignas(64) float sums[(kConvBlock + kGroup) * kPositions * kVector];
    float* strip = scratch + part * channels * row_stride;
    for (int64_t task = tasks * part / threads; task < tasks * (part + 1) / threads; ++task) {
      const int64_t first = task / strips * kVector, top = task % strips * deep;
      const int64_t lines = height - top < deep ? height - top : deep;
      const int64_t samples = images.n - first < kVector ? images.n - first : kVector;
      const float* x = panel + (task / strips * images.channels * map) + top * full * kVector;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t channel = b * channels;
        const int64_t some = out.channels - channel < channels ? out.channels - channel : channels;
        const int64_t row = channel * phases, rows = some * phases;
        for (int64_t t = 0; t < lines * tiles; ++t) {
          const int64_t line = t / tiles, column = t % tiles * width / tiles;
          const int64_t count = (t % tiles + 1) * width / tiles - column;
          float* to = apart ? sums : strip + (line * width + column) * kVector;
          const int64_t between = apart ? count * kVector : row_stride;
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t v = 0; v < count; ++v)
              store(to + r * between + v * kVector, broadcast(bias ? bias[row + r] : 0.0f));
          for (int64_t c = 0; c < chunks; ++c)
            add_tile(layout, b * chunks + c, values, x + c * step + (line * full + column) * kVector, count,
                     to, between);
          for (int64_t r = 0; apart && r < rows; ++r) {
            const int64_t phase = r / some, own = r % some;
            const int64_t at = ((line * stride + phase / stride) * width + column) * stride + phase % stride;
            place_sums(sums + r * between, count,
                       strip + (out.last ? (at * some + own) * kVector : own * row_stride + at * kVector),
                       out.last ? stride * some : stride);
          }
        }
        write_rows(strip, row_stride, channel, some, out.channels, top * width * phases,
                   lines * width * phases, area, samples, out.last, y + first * out.channels * area);
      }
    }
  }
}

// --- the gradient in w

// dy and x where a tile begins: of the block's first row, of the chunk's first channel
struct Tile {
  const float *dy, *x;
  int64_t row_stride, dy_line, x_line;  // floats between output channels, and between lines
  int64_t height, width;
};

// sums[row * Columns + j] += dy[row] * x[column j] over Step positions
template <int P, int Columns, int Step>
AF_INLINE void sample_step(const float* dy, int64_t row_stride, const float* x, const uint16_t* column,
                           int64_t count, vec* sums) {
  constexpr int kRows = popcount(P);
  vec d[kRows][Step];
  unroll<0, kRows * Step>([&](auto i) AF_LAMBDA {
    constexpr int r = decltype(i)::value / Step, v = decltype(i)::value % Step;
    d[r][v] = load(dy + row_of(P, r) * row_stride + v * kVector);
  });
  unroll<0, Columns>([&](auto j) AF_LAMBDA {
    const float* at = x + (j.value < count ? column[j.value] : column[0]) * int64_t{kVector};
    unroll<0, Step>([&](auto v) AF_LAMBDA {
      const vec xv = load(at + v.value * kVector);
      unroll<0, kRows>([&](auto r) AF_LAMBDA {
        vec& sum = sums[decltype(r)::value * Columns + decltype(j)::value];
        sum = fma(d[r.value][v.value], xv, sum);
      });
    });
  });
}

// the next `Columns` columns of a run; those past its end repeat the first and are not written
template <int P, int Columns>
AF_INLINE void sample_columns(const Tile& tile, const float* dy, const uint16_t* column, int64_t count,
                              float* out, int64_t out_stride) {
  constexpr int kRows = popcount(P), kSums = kRows * Columns, kFour = (kSums + 3) / 4 * 4;
  // 16 registers: dy at two positions side by side would not stay in them beside the sums of three rows
  constexpr int kStep = sizeof(vec) == 64 ? (kRows == 1 ? 4 : 2) : kRows > 2 ? 1 : 2;
  vec sums[kFour];
  unroll<0, kFour>([&](auto i) AF_LAMBDA { sums[i.value] = vec{}; });
  const float* x = tile.x;
  for (int64_t h = 0; h < tile.height; ++h, dy += tile.dy_line, x += tile.x_line) {
    int64_t v = 0;
    for (; v + kStep <= tile.width; v += kStep)
      sample_step<P, Columns, kStep>(dy + v * kVector, tile.row_stride, x + v * kVector, column, count, sums);
    for (; v < tile.width; ++v)
      sample_step<P, Columns, 1>(dy + v * kVector, tile.row_stride, x + v * kVector, column, count, sums);
  }
  alignas(64) float found[kFour];
#if defined(__AVX512F__)
  if constexpr (kFour == 16)
    sum_lanes16(sums, found);
  else
#endif
    unroll<0, kFour / 4>([&](auto i) AF_LAMBDA { sum_lanes(sums + 4 * i.value, found + 4 * i.value); });
  unroll<0, kRows>([&](auto r) AF_LAMBDA {
    float* to = out + r.value * out_stride;
    const float* from = found + r.value * Columns;
    if (count >= Columns)
      unroll<0, Columns>([&](auto j) AF_LAMBDA { to[j.value] += from[j.value]; });
    else
      for (int64_t j = 0; j < count; ++j) to[j] += from[j];
  });
}

template <int P>
AF_INLINE void sample_tile(Runs& runs, const Tile& tile, const float* values, float* sums) {
  constexpr int kSums = sizeof(vec) == 64 ? 16 : 8;                        // registers
  constexpr int kRows = popcount(P), kThree = kSums == 8 ? 4 : kSums / 4;  // columns: three rows' in 12 sums
  constexpr int kMost = kRows < 3 ? kSums / kRows : kRows == 3 ? kThree : kSums / 4;
  float* out = sums + (runs.value - values);
  for (; runs.run != runs.end; ++runs.run) {
    const int64_t row = *runs.run & 0xffff, count = *runs.run >> 16;
    const float* dy = tile.dy + row * tile.row_stride;
    int64_t done = 0;
    for (; count - done > (kMost > 4 ? kMost - 4 : 0); done += kMost)
      sample_columns<P, kMost>(tile, dy, runs.column + done, count - done, out + done, count);
    // what is left, in one piece: each piece reads dy again and waits for its own sums
    unroll<1, kMost / 4>([&](auto i) AF_LAMBDA {
      constexpr int kFew = kMost - 4 * decltype(i)::value;
      if (count - done > kFew - 4) {
        sample_columns<P, kFew>(tile, dy, runs.column + done, count - done, out + done, count);
        done = count;
      }
    });
    runs.column += count;
    out += kRows * count;
  }
  runs.value = values + (out - sums);
}

void gradient(Layout layout, const int32_t* index, int64_t kept, const float* x, Images x_images,
              const float* dy, Images dy_images, Kernel kernel, float* dw, float* scratch, int threads) {
  const int64_t chunks = ceil_div(layout.cols, layout.chunk),
                cells = ceil_div(layout.rows, layout.block) * chunks;
  const int64_t height = dy_images.height, width = dy_images.width, step = layout.chunk / kernel.area();
  const int64_t x_full = x_images.full_width(), x_map = x_images.map() * kVector;
  const int64_t dy_full = dy_images.full_width(), dy_map = dy_images.map() * kVector;
  const int64_t wide = ceil_div(width, kWideTile);
  const int64_t tall = ceil_div(height, sizeof(vec) == 64 ? kTall : kTileSize / ceil_div(width, wide));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (int64_t t = 0; t < cells; ++t) {
    const int64_t begin = layout.table[t * kTable + 1],
                  end = t + 1 < cells ? layout.table[(t + 1) * kTable + 1] : kept;
    for (int64_t i = begin; i < end; ++i) scratch[i] = 0;
    for (int64_t g = 0; g < ceil_div(x_images.n, kVector); ++g) {
      const float* x_at = x + (g * x_images.channels + t % chunks * step) * x_map;
      const float* dy_at = dy + (g * layout.rows + t / chunks * layout.block) * dy_map +
                           (dy_images.pad_height * dy_full + dy_images.pad_width) * kVector;
      for (int64_t s = 0; s < tall * wide; ++s) {
        const int64_t line = s / wide * height / tall, lines = (s / wide + 1) * height / tall - line;
        const int64_t column = s % wide * width / wide, columns = (s % wide + 1) * width / wide - column;
        const Tile tile = {dy_at + (line * dy_full + column) * kVector,
                           x_at + (line * x_full + column) * kVector,
                           dy_map,
                           dy_full * kVector,
                           x_full * kVector,
                           lines,
                           columns};
        Runs runs = runs_at(layout, t, scratch);
        each_pattern<0, kPatterns>(layout, t, runs, [&](auto p, Runs& found) AF_LAMBDA {
          sample_tile<p.value>(found, tile, scratch, scratch);
        });
      }
    }
    put(scratch + begin, index + begin, end - begin, dw);
  }
}

}  // namespace
}  // namespace autoflip
