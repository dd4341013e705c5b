// The products of masked_matmul.h for masks of blocks: 16 or 4 neighbouring rows that keep the same columns.
//
// Lists are those of the blocks: a row of them stands for `height` rows of the weight, the last one perhaps
// for fewer. All three products take four rows at a time: an activation is loaded, or turned round, once for
// all of them. Weights are read where they stand, unless a large weight keeps so few that its lines are worth
// meeting once only: then forward copies what is kept, block by block in the lists' order, `height` side by
// side (zeros below the last row).
#pragma once
#include "cpu/masked_matmul.h"

namespace autoflip {

constexpr int kTall = 16, kFlat = 4;  // heights

struct Blocks {
  Lists lists;
  int64_t rows;  // of the weight
  int height;    // of a block: kTall or kFlat
};

struct MaskedBlocks {
  // floats of scratch that forward and backward take
  int64_t (*forward_scratch)(const Blocks& blocks, int64_t n);
  int64_t (*backward_scratch)(const Blocks& blocks, int64_t n);
  // as MaskedMatmul's; values: room for the copy of the kept weights, copied(blocks) floats, or null
  void (*forward)(const Blocks& blocks, const float* w, const float* x, int64_t n, const float* bias,
                  bool relu, float* y, float* values, float* scratch, int threads);
  void (*backward)(const Blocks& blocks, const float* w, const float* values, const float* dy, const float* x,
                   int64_t n, float* dx, float* dw, float* db, float* scratch, int threads);
};

extern const MaskedBlocks masked_blocks_base;
extern const MaskedBlocks masked_blocks_avx2;
extern const MaskedBlocks masked_blocks_avx512;

// floats of the copy of the kept weights; 0: they are read where they stand
inline int64_t copied(const Blocks& b) {
  constexpr int64_t kLeast = int64_t(1) << 18;  // entries: 1 MB
  const Lists& l = b.lists;
  const int64_t all = b.rows * l.cols, held = b.height * kept(l);
  return all >= kLeast && held * 4 < all ? held : 0;
}

}  // namespace autoflip
