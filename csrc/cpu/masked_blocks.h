// The products of masked_matmul.h for masks of blocks: 16 or 4 neighbouring rows that keep the same columns.
//
// Lists are those of the blocks: a row of them stands for `height` rows of the weight, the last one perhaps
// for fewer. The kept weights are copied once a step, block by block in the lists' order, `height` side by
// side (zeros below the last row). Blocks of 16 rows are a vector of outputs: forward and the gradient in w
// need no transposes of sums. Blocks of 4 rows have samples as lanes; an activation is loaded once for all
// four.
#pragma once
#include "cpu/masked_matmul.h"

namespace autoflip {

constexpr int kTall = 16, kFlat = 4;  // heights

struct Blocks {
  Lists lists;
  int64_t rows;  // of the weight
  int height;    // kTall or kFlat
};

struct MaskedBlocks {
  // floats of scratch that forward and backward take
  int64_t (*forward_scratch)(const Blocks& blocks, int64_t n);
  int64_t (*backward_scratch)(const Blocks& blocks, int64_t n);
  // as MaskedMatmul's; values: room for the copy of the kept weights, values_of(blocks) floats, or null
  void (*forward)(const Blocks& blocks, const float* w, const float* x, int64_t n, const float* bias,
                  bool relu, float* y, float* values, float* scratch, int threads);
  void (*backward)(const Blocks& blocks, const float* w, const float* values, const float* dy, const float* x,
                   int64_t n, float* dx, float* dw, float* db, float* scratch, int threads);
};

extern const MaskedBlocks masked_blocks_base;
extern const MaskedBlocks masked_blocks_avx2;
extern const MaskedBlocks masked_blocks_avx512;

inline int64_t values_of(const Blocks& b) {
  const Lists& l = b.lists;
  return b.height * int64_t(l.first[ceil_div(l.rows, l.block) * ceil_div(l.cols, l.chunk)]);
}

}  // namespace autoflip
