// The copy of the kept weights, the gradient in w, a step forward and back for blocks: see masked_blocks.h.
#pragma once
#include <cstddef>

#include "cpu/masked_blocks_grad.h"
#include "cpu/masked_blocks_product.h"
#include "cpu/masked_matmul_step.h"

namespace autoflip {
namespace {

// values = the kept weights in the lists' order, a block side by side. Four rows are read side by side, from
// end to end; where most of their lines are wanted the next four are asked for meanwhile: a large weight
// comes from memory.
void pack_blocks(const Blocks& b, const float* w, float* values, int threads) {
  typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
  constexpr int64_t kMost = 128;  // chunks walked side by side
  const Lists& l = b.lists;
  const int64_t many = ceil_div(l.rows, l.block), chunks = ceil_div(l.cols, l.chunk),
                words = words_of(l.chunk), height = b.height, stride = l.cols;
  const bool most = copied(b) * 24 > b.rows * stride;
#pragma omp parallel for num_threads(threads) if (threads > 1 && many > 1)
  for (int64_t block = 0; block < many; ++block)
    for (int64_t c0 = 0; c0 < chunks; c0 += kMost) {
      float* to[kMost];
      const uint16_t* columns[kMost];
      const int64_t some = least(kMost, chunks - c0), cell = block * chunks + c0;
      for (int64_t c = 0; c < some; ++c) {
        columns[c] = l.columns + l.first[cell + c];
        to[c] = values + height * int64_t(l.first[cell + c]);
      }
      for (int64_t g = 0; g < least(l.block, l.rows - block * l.block); ++g) {
        for (int64_t r = 0; r < height; r += kFlat) {
          const int64_t row = (block * l.block + g) * height + r, live = b.rows - row;
          const int64_t ahead = live >= 2 * kFlat ? kFlat * stride : 0;
          for (int64_t c = 0; c < some; ++c) {
            const int64_t col = (c0 + c) * l.chunk, list = (cell + c) * l.block + g, count = l.counts[list];
            const float* from = w + row * stride + col;
            float* out = to[c] + r;
            const auto put = [&](const float* at) AF_LAMBDA {
              *reinterpret_cast<four*>(out) = four{at[0], at[stride], at[2 * stride], at[3 * stride]};
              out += height;
            };
            if (live < kFlat) {
              for (int64_t j = 0; j < count; ++j, out += height)
                for (int64_t i = 0; i < kFlat; ++i) out[i] = i < live ? from[columns[c][j] + i * stride] : 0;
            } else if (most) {
              const uint16_t* bits = l.bits + list * words;
              for (int64_t k = 0; k < least(l.chunk, stride - col); k += 16, from += 16, ++bits) {
                for (int64_t i = 0; i < kFlat; ++i) __builtin_prefetch(from + ahead + i * stride, 0, 2);
                for (unsigned left = *bits; left; left &= left - 1) put(from + __builtin_ctz(left));
              }
            } else {
              for (int64_t j = 0; j < count; ++j) put(from + columns[c][j]);
            }
          }
        }
        for (int64_t c = 0; c < some; ++c) {
          const int64_t count = l.counts[(cell + c) * l.block + g];
          columns[c] += count;
          to[c] += height * count;
        }
      }
    }
}

// --- the gradient in w

// dw of one cell. dy: [block][sample][16] for tall blocks, else panels; x: panels
void block_tile(const Blocks& b, int64_t cell, const float* dy, const float* x, int64_t n, float* dw) {
  constexpr int64_t kStride = kMaxChunk + 16;
  alignas(64) float sums[kTall * kStride], empty[kMaxChunk] = {};
  const Lists& l = b.lists;
  const int64_t chunks = ceil_div(l.cols, l.chunk), words = words_of(l.chunk), height = b.height;
  const int64_t block = cell / chunks, col = cell % chunks * l.chunk, cols = least(l.chunk, l.cols - col);
  const bool past = b.rows * l.cols >= kSpreadPast;
  const uint16_t *count = l.counts + cell * l.block, *column = l.columns + l.first[cell];
  const uint16_t* bits = l.bits + cell * l.block * words;
  for (int64_t g = block * l.block; g < least(l.rows, (block + 1) * l.block); ++g, ++count, bits += words) {
    const int64_t row = g * height;
    if (*count && height == kTall)
      tall_gradients(column, *count, dy + row * n, x, col, l.cols, n, sums, kStride);
    else if (*count)
      (n > kLanes ? &flat_gradients<0> : kFlatGradients.of(panel(0, n).width / kVector))(
          column, *count, dy, row, b.rows, x, col, l.cols, n, sums, kStride);
    spread_rows(sums, kStride, column, *count, bits, cols, dw + row * l.cols + col, l.cols,
                least(height, b.rows - row), past, empty);
    column += *count;
  }
#if defined(__AVX2__)
  if (past) _mm_sfence();
#endif
}

// --- a whole step forward and back

// As of single entries: whether the products' panels are made, used and forgotten one by one.
AF_INLINE bool one_by_one(const Blocks& b, int64_t n, int threads) {
  if (!several(n, kLanes, threads)) return false;
  return b.rows * b.lists.cols <= kLarge ||
         (copied(b) && 2 * kept(b.lists) * b.height < kLanes * (b.rows + b.lists.cols));
}

int64_t blocks_forward_scratch(const Blocks& b, int64_t n) { return padded(n) * b.lists.cols + copied(b); }
// dy as panels, dy by blocks, x; past a narrow chunk the gradient in w looks up columns that are not there
int64_t blocks_backward_scratch(const Blocks& b, int64_t n) {
  const int64_t more = b.height == kTall ? b.lists.rows * kTall : 0;
  return tall_padded(n) * (b.rows + more + b.lists.cols) + kMaxChunk * kLanes + copied(b);
}

void blocks_forward(const Blocks& b, const float* w, const float* x, int64_t n, const float* bias, bool relu,
                    float* y, float* values, float* scratch, int threads) {
  if (copied(b)) {
    if (!values) values = scratch + padded(n) * b.lists.cols;
    pack_blocks(b, w, values, threads);
  }
  const auto visit = [&](int64_t begin, int64_t count, int64_t place, int workers) {
    float* panels = scratch + place * b.lists.cols;
    to_panels(x + begin * b.lists.cols, count, b.lists.cols, panels, workers);
    blocks_product(b, w, copied(b) ? values : nullptr, panels, count, bias, relu, y + begin * b.rows,
                   workers);
  };
  each_panel(n, kLanes, one_by_one(b, n, threads), threads, visit);
}

void blocks_backward(const Blocks& b, const float* w, const float* values, const float* dy, const float* x,
                     int64_t n, float* dx, float* dw, float* db, float* scratch, int threads) {
  const Lists& l = b.lists;
  const bool tall = b.height == kTall;
  float *dy_panels = scratch, *dy_blocks = dy_panels + tall_padded(n) * b.rows,
        *x_panels = dy_blocks + (tall ? n * l.rows * kTall : 0);
  if (db) sum_samples(dy, n, b.rows, db);
  if (dx) {
    const float* copy = copied(b) ? values : nullptr;
    if (copied(b) && !values) {
      float* room = x_panels + tall_padded(n) * l.cols + kMaxChunk * kLanes;
      pack_blocks(b, w, room, threads);
      copy = room;
    }
    const auto visit = [&](int64_t begin, int64_t count, int64_t place, int workers) {
      float* panels = dy_panels + place * b.rows;
      to_panels(dy + begin * b.rows, count, b.rows, panels, workers);
      blocks_back(b, w, copy, panels, count, dx + begin * l.cols, workers);
    };
    each_panel(n, kLanes, one_by_one(b, n, threads), threads, visit);
  }
  if (!dw) return;
  if (n == 0) {
    __builtin_memset(dw, 0, std::size_t(b.rows * l.cols) * sizeof(float));
    return;
  }
  if (tall) {
    tall_samples(dy, n, b.rows, dy_blocks, threads);
    tall_panels(x, n, l.cols, x_panels, threads);
  } else {
    if (!dx || !flat_as_products(n) || one_by_one(b, n, threads))
      flat_panels(dy, n, b.rows, dy_panels, threads);
    flat_panels(x, n, l.cols, x_panels, threads);
  }
  const int64_t cells = ceil_div(l.rows, l.block) * ceil_div(l.cols, l.chunk);
  deal(cells, threads,
       [&](int64_t t) AF_LAMBDA { block_tile(b, t, tall ? dy_blocks : dy_panels, x_panels, n, dw); });
}

constexpr MaskedBlocks kMaskedBlocks = {blocks_forward_scratch, blocks_backward_scratch, blocks_forward,
                                        blocks_backward};

}  // namespace
}  // namespace autoflip
