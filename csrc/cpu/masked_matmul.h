// y = act(x @ (w * mask).T + b), its gradient in x and its sampled gradient in w, for one CPU instruction
// set.
//
// Orders of a mask (built once per mask, never from values): rows in blocks, columns in chunks small enough
// that their activations stay in the first-level cache. The weights are read where they stand: a column
// number finds the activations and the weights of its rows alike, so no step copies what is kept.
//
// Groups, for the products: in each (block, chunk) the columns of four neighbouring rows are bucketed by the
// pattern of rows that keep them: one loop per pattern loads an activation once for all rows that want it,
// and the sums of the four rows stay in registers through all of them. Buckets too small to pay for their
// loop go to the rows one by one. No branch per weight, no padding, exactly nnz multiply-adds. In memory,
// little-endian:
//   int32  first[blocks][chunks], end             where the columns of a cell begin
//   uint16 counts[blocks][chunks][groups][16]     columns of each of the 15 patterns; the last is 0: none,
//                                                 1: single rows only, 2: any
//   uint16 columns[]                              column - first column of the chunk, pattern by pattern
// Lists, for the gradient in w, and for the products where few weights are kept: the kept columns of each
// row.
//   int32  first[blocks][chunks], end
//   uint16 counts[blocks][chunks][rows of a block]
//   uint16 columns[]                                     and 16 zeros
//   uint16 bits[blocks][chunks][rows of a block][words]  the row's mask, 16 to a word; not in lists of
//   columns int32  place[]                                         of the lists of columns only
//
// Panels: activations feature-major, [sample block][feature][lane], a sample is a SIMD lane. Blocks have as
// many samples as the sums of the rows that are walked together leave registers for, or fewer: equal shares,
// in whole vectors, padded with zeros.
//
// Sums do not depend on the thread count: no sum is ever cut between threads.
#pragma once
#include <cstdint>

namespace autoflip {

constexpr int kGroup = 4;
constexpr int64_t kRowBlock = 128;  // most rows of a block: with 64 lanes their sums take 32 KB
constexpr int64_t kMaxChunk = 512;
constexpr int64_t kPackFrom = int64_t(1) << 20;  // floats of a weight that is not found in the cache: 4 MB
constexpr int64_t kUnrolled = 128;  // columns of a chunk above which loops take several columns at once
constexpr int kPatterns = 12;
constexpr int kPattern[kPatterns] = {15, 14, 13, 11, 7, 12, 10, 9, 6, 5, 3, 1};  // 1: any single row
constexpr int kTable = kPatterns + 3;

// The order that masked convolutions walk: as Groups, but pattern by pattern through a whole cell, values in
// the order of the runs. The runs of a pattern are sorted by length, so that the branch predictor knows where
// each ends.
//   int32  table[blocks][chunks][15]  first column, first value, first run of each of the 12 patterns, end
//   uint32 runs[]                     row - first row of the block (low half), columns of the run (high half)
//   uint16 columns[]                  column - first column of the chunk, run by run
struct Layout {
  const int32_t* table;
  const uint32_t* runs;
  const uint16_t* columns;
  int64_t rows, cols, block, chunk;
};

constexpr int kSlots =
    16;  // of Groups' counts: patterns of several rows in kPattern's order, rows 0 to 3, what

struct Groups {
  const int32_t* first;
  const uint16_t* counts;
  const uint16_t* columns;
  int64_t rows, cols, block, chunk;
};

struct Lists {
  const int32_t* first;
  const uint16_t* counts;
  const uint16_t* columns;
  const uint16_t* bits;
  int64_t rows, cols, block, chunk;
};

// Orders of one mask: its groups or none, its lists, and for the gradient in x groups or lists of the mask
// turned round (rows are columns) or none: it then walks along the forward product's. What is not there has
// no rows. place[j]: where the j-th entry of `columns` stands in `lists`.
struct Orders {
  Groups groups, back;
  Lists lists, columns;
  const int32_t* place;
};

// A mask in one of two forms: a byte an entry, or bits, which are an eighth to read: 16 columns to a word,
// row by row, each row from a whole word on, zeros past its end. Bits count where they are not null.
struct Kept {
  const uint8_t* mask;
  const uint16_t* bits;
};

struct MaskedMatmul {
  // floats of scratch that forward and backward take
  int64_t (*forward_scratch)(const Orders& orders, int64_t n);
  int64_t (*backward_scratch)(const Orders& orders, int64_t n);
  // whether forward copies the kept weights
  bool (*packs)(const Orders& orders);
  // y (n, rows) = x (n, cols) @ (w * mask).T, plus bias (rows) or null, then relu if asked; all row-major.
  // values: room for the copy of the kept weights, or null: it is made in scratch
  void (*forward)(const Orders& orders, const float* w, const float* x, int64_t n, const float* bias,
                  bool relu, float* y, float* values, float* scratch, int threads);
  // dx (n, cols) = dy (n, rows) @ (w * mask); dw (rows, cols) = mask ? dy.T @ x : 0; db (rows) = dy's sum
  // over samples; those that are null are left out. values: what forward wrote there, or null
  void (*backward)(const Orders& orders, const float* w, const float* values, const float* dy, const float* x,
                   int64_t n, float* dx, float* dw, float* db, float* scratch, int threads);
  // out[i] = mask[i] ? w[i] : 0, the weight of the dense path (torch.where takes 20 times as long); entries
  // of 2, 4 or 8 bytes
  void (*select)(const void* w, const uint8_t* mask, int64_t n, int bytes, void* out, int threads);
  // whether w is zero wherever the mask is not set; reads only
  bool (*is_clean)(const void* w, const uint8_t* mask, int64_t n, int bytes);
  // dw (rows, cols) = mask ? dy.T @ x : 0, every product computed; all row-major. scratch:
  // outer_scratch(n, rows) floats. Null without vectors, where a vendor's product is faster
  void (*outer)(const float* dy, const float* x, const Kept& kept, int64_t n, int64_t rows, int64_t cols,
                float* dw, float* scratch, int threads);
  int64_t (*outer_scratch)(int64_t n, int64_t rows);
  // y and dx as of forward and backward, every product computed; bits: as in Kept. scratch:
  // every_scratch(n, rows, cols) floats. Null without AVX-512
  void (*every_forward)(const float* w, const uint16_t* bits, const float* x, int64_t n, int64_t rows,
                        int64_t cols, const float* bias, bool relu, float* y, float* scratch, int threads);
  void (*every_back)(const float* w, const uint16_t* bits, const float* dy, int64_t n, int64_t rows,
                     int64_t cols, float* dx, int threads);
  int64_t (*every_scratch)(int64_t n, int64_t rows, int64_t cols);
  // db (rows) = dy's sum over samples
  void (*sum_samples)(const float* dy, int64_t n, int64_t rows, float* db);
};

extern const MaskedMatmul masked_matmul_base;
extern const MaskedMatmul masked_matmul_avx2;
extern const MaskedMatmul masked_matmul_avx512;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t kept(const Lists& l) { return l.first[ceil_div(l.rows, l.block) * ceil_div(l.cols, l.chunk)]; }

// Threads for products of so many multiply-adds: with two 784x200 took 1.14 times as long as with one at 64
// rows and density 0.05 (half a million), as long at 0.1, 0.8 at 0.2 (Zen 1).
inline int threads_of_product(int64_t multiply_adds, int threads) {
  return multiply_adds < (int64_t(1) << 20) ? 1 : threads;
}

inline int64_t words_of(int64_t chunk) { return ceil_div(chunk, 16); }  // of Lists' bits, a row

// Rows of a block: equal shares, two of them at least where there is work for two threads.
inline int64_t rows_of_block(int64_t rows) {
  const int64_t blocks = ceil_div(rows, rows < 2 * kRowBlock && rows >= 32 ? ceil_div(rows, 2) : kRowBlock);
  return rows ? ceil_div(ceil_div(rows, blocks), kGroup) * kGroup : kGroup;
}

}  // namespace autoflip
