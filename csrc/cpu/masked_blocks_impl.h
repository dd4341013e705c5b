// What blocks of both heights share: the copy of the kept weights, the gradient in w, a step forward and
// back.
#pragma once
#include <cstddef>

#include "cpu/masked_blocks_flat.h"
#include "cpu/masked_blocks_tall.h"
#include "cpu/masked_matmul_grad.h"

namespace autoflip {
namespace {

// values = the kept weights in the lists' order, a block side by side. Four rows are read side by side, from
// end to end.
void pack_blocks(const Blocks& blocks, const float* w, float* values, int threads) {
  typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
  constexpr int64_t kMost = 128, kAhead = 256;  // chunks walked side by side; floats
  const Lists& l = blocks.lists;
  const int64_t many = ceil_div(l.rows, l.block), chunks = ceil_div(l.cols, l.chunk), height = blocks.height;
  const bool far = blocks.rows * l.cols >= kPackFrom;
  const float* none = w;  // stands in for rows below the last one: what is read there is not kept
#pragma omp parallel for num_threads(threads) if (threads > 1 && many > 1)
  for (int64_t b = 0; b < many; ++b)
    for (int64_t c0 = 0; c0 < chunks; c0 += kMost) {
      const uint16_t* columns[kMost];
      float* to[kMost];
      const int64_t some = least(kMost, chunks - c0);
      for (int64_t c = 0; c < some; ++c) {
        const int64_t cell = b * chunks + c0 + c;
        columns[c] = l.columns + l.first[cell];
        to[c] = values + height * int64_t(l.first[cell]);
      }
      for (int64_t g = 0; g < least(l.block, l.rows - b * l.block); ++g) {
        for (int64_t r = 0; r < height; r += 4) {
          const int64_t row = (b * l.block + g) * height + r, live = blocks.rows - row;
          for (int64_t c = 0; c < some; ++c) {
            const int64_t cell = b * chunks + c0 + c, col = (c0 + c) * l.chunk;
            const int64_t count = l.counts[cell * l.block + g], cols = least(l.chunk, l.cols - col);
            const float* from[4];
            for (int i = 0; i < 4; ++i) from[i] = (i < live ? w + (row + i) * l.cols : none) + col;
            if (far && count * 24 > cols)  // most of their lines are wanted
              for (int i = 0; i < 4; ++i)
                for (int64_t j = 0; j < cols; j += 16) __builtin_prefetch(from[i] + kAhead + j, 0, 3);
            const uint16_t* column = columns[c];
            float* out = to[c] + r;
            if (live >= 4)
              for (int64_t j = 0; j < count; ++j, out += height) {
                const int64_t k = column[j];
                *reinterpret_cast<four*>(out) = four{from[0][k], from[1][k], from[2][k], from[3][k]};
              }
            else
              for (int64_t j = 0; j < count; ++j, out += height)
                for (int i = 0; i < 4; ++i) out[i] = i < live ? from[i][column[j]] : 0;
          }
        }
        for (int64_t c = 0; c < some; ++c) {
          const int64_t count = l.counts[(b * chunks + c0 + c) * l.block + g];
          columns[c] += count;
          to[c] += count * height;
        }
      }
    }
}

// dw of one cell. dy: [block][sample][16] for tall blocks, else panels; x: panels
void block_tile(const Blocks& blocks, int64_t cell, const float* dy, const float* x, int64_t n, float* dw) {
  constexpr int64_t kStride = kMaxChunk + 16;
  alignas(64) float sums[kTall * kStride], empty[kMaxChunk] = {};
  const Lists& l = blocks.lists;
  const int64_t chunks = ceil_div(l.cols, l.chunk), words = words_of(l.chunk), height = blocks.height;
  const int64_t b = cell / chunks, col = cell % chunks * l.chunk, cols = least(l.chunk, l.cols - col);
  // what no cache will hold until it is read again need not pass through one
  const bool past = blocks.rows * l.cols >= kPackFrom;
  const uint16_t *count = l.counts + cell * l.block, *column = l.columns + l.first[cell];
  const uint16_t* bits = l.bits + cell * l.block * words;
  for (int64_t g = b * l.block; g < least(l.rows, (b + 1) * l.block); ++g, ++count, bits += words) {
    const int64_t row = g * height;
    if (*count && height == kTall)
      tall_gradients(column, *count, dy + row * n, x, col, l.cols, n, sums, kStride);
    else if (*count)
      flat_gradients(column, *count, dy, row, blocks.rows, x, col, l.cols, n, sums, kStride);
    for (int64_t r = 0; r < least(height, blocks.rows - row); ++r)
      spread_row(sums + r * kStride, column, *count, bits, cols, dw + (row + r) * l.cols + col, past, empty);
    column += *count;
  }
#if defined(__AVX512F__)
  if (past) _mm_sfence();
#endif
}

int64_t samples_of(const Blocks& b, int64_t n) { return b.height == kTall ? tall_padded(n) : padded(n); }

int64_t blocks_forward_scratch(const Blocks& b, int64_t n) {
  return samples_of(b, n) * b.lists.cols + values_of(b);
}
// dy as panels, dy by blocks, x; past a narrow chunk the gradient in w looks up columns that are not there
int64_t blocks_backward_scratch(const Blocks& b, int64_t n) {
  const int64_t columns = b.height == kTall ? b.lists.rows * kTall : 0;
  return samples_of(b, n) * (b.rows + columns + b.lists.cols) + kMaxChunk * kLanes + values_of(b);
}

void blocks_forward(const Blocks& b, const float* w, const float* x, int64_t n, const float* bias, bool relu,
                    float* y, float* values, float* scratch, int threads) {
  (b.height == kTall ? tall_panels : to_panels)(x, n, b.lists.cols, scratch, threads);
  if (!values) values = scratch + samples_of(b, n) * b.lists.cols;
  pack_blocks(b, w, values, threads);
  (b.height == kTall ? tall_product : flat_product)(b, values, scratch, n, bias, relu, y, threads);
}

void blocks_backward(const Blocks& b, const float* w, const float* values, const float* dy, const float* x,
                     int64_t n, float* dx, float* dw, float* db, float* scratch, int threads) {
  const Lists& l = b.lists;
  const bool tall = b.height == kTall;
  const int64_t samples = samples_of(b, n);
  const auto turn = tall ? tall_panels : to_panels;
  float* dy_panels = scratch;
  float* dy_blocks = dy_panels + samples * b.rows;
  float* x_panels = dy_blocks + (tall ? samples * l.rows * kTall : 0);
  float* room = x_panels + samples * l.cols + kMaxChunk * kLanes;
  if (db) sum_samples(dy, n, b.rows, db);
  if (dx || !tall) turn(dy, n, b.rows, dy_panels, threads);
  if (dx) {
    if (!values) pack_blocks(b, w, room, threads);
    (tall ? tall_back : flat_back)(b, values ? values : room, dy_panels, n, dx, threads);
  }
  if (!dw) return;
  if (n == 0) {
    __builtin_memset(dw, 0, std::size_t(b.rows * l.cols) * sizeof(float));
    return;
  }
  if (tall) tall_samples(dy, n, b.rows, dy_blocks, threads);
  turn(x, n, l.cols, x_panels, threads);
  const int64_t cells = ceil_div(l.rows, l.block) * ceil_div(l.cols, l.chunk);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < cells; ++t) block_tile(b, t, tall ? dy_blocks : dy_panels, x_panels, n, dw);
}

constexpr MaskedBlocks kMaskedBlocks = {blocks_forward_scratch, blocks_backward_scratch, blocks_forward,
                                        blocks_backward};

}  // namespace
}  // namespace autoflip
