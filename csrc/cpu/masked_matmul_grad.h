// The weight's gradient at the mask, and the masks of the dense path.
#pragma once
#include <cstddef>

#include "cpu/masked_matmul_every.h"
#include "cpu/masked_matmul_lists.h"
#include "cpu/masked_matmul_spread.h"

namespace autoflip {
namespace {

// Word: what holds an entry, whichever floating type it is.
template <class Word>
void select_words(const void* w, const uint8_t* mask, int64_t n, void* out, int threads) {
  const Word* in = static_cast<const Word*>(w);
  Word* to = static_cast<Word*>(out);
#pragma omp parallel for simd num_threads(threads) if (parallel : threads > 1)
  // without a branch, on which not every instruction set works in vectors
  for (int64_t i = 0; i < n; ++i) to[i] = Word(in[i] & Word(Word(0) - Word(mask[i] != 0)));
}

template <class Word>
bool words_are_clean(const void* w, const uint8_t* mask, int64_t n) {
  const Word* in = static_cast<const Word*>(w);
  for (int64_t begin = 0; begin < n; begin += 4096) {
    const int64_t end = n - begin < 4096 ? n : begin + 4096;
    Word stray = 0;
#pragma omp simd reduction(| : stray)
    for (int64_t i = begin; i < end; ++i) {
      stray |= Word(Word(in[i] << 1) & Word(Word(mask[i] != 0) - Word(1)));  // -0 is zero too
    }
    if (stray) return false;
  }
  return true;
}

void select(const void* w, const uint8_t* mask, int64_t n, int bytes, void* out, int threads) {
  if (bytes == 2) return select_words<uint16_t>(w, mask, n, out, threads);
  if (bytes == 8) return select_words<uint64_t>(w, mask, n, out, threads);
  select_words<uint32_t>(w, mask, n, out, threads);
}

bool is_clean(const void* w, const uint8_t* mask, int64_t n, int bytes) {
  if (bytes == 2) return words_are_clean<uint16_t>(w, mask, n);
  if (bytes == 8) return words_are_clean<uint64_t>(w, mask, n);
  return words_are_clean<uint32_t>(w, mask, n);
}

// --- the gradient in w

// sums[j] = the sum over lanes of dy * x at column[j] (plus sums[j] unless `first`), j < Columns
template <int Columns, int V>
AF_INLINE void sample(const uint16_t* column, const vec (&dy)[V], const float* x, bool first, float* sums) {
  half products[Columns];
#if defined(__AVX512F__)
  if constexpr (V <= 2) {  // in halves, which need no fold; more of them would wait for their loads
    half d[2 * V];
    unroll<0, V>([&](auto v) AF_LAMBDA {
      d[2 * v.value] = _mm512_castps512_ps256(dy[v.value]);
      d[2 * v.value + 1] = _mm512_extractf32x8_ps(dy[v.value], 1);
    });
    unroll<0, Columns>([&](auto j) AF_LAMBDA {
      const float* xk = x + column[j.value] * int64_t(V * kVector);
      products[j.value] = d[0] * load_half(xk);
      unroll<1, 2 * V>([&](auto h) AF_LAMBDA {
        products[j.value] = fma(d[h.value], load_half(xk + h.value * kHalf), products[j.value]);
      });
    });
    return sum_halves<Columns>(products, first, sums);
  }
#endif
  unroll<0, Columns>([&](auto j) AF_LAMBDA {
    const float* xk = x + column[j.value] * int64_t(V * kVector);
    vec product = dy[0] * load(xk);
    unroll<1, V>([&](auto v)
                     AF_LAMBDA { product = fma(dy[v.value], load(xk + v.value * kVector), product); });
    products[j.value] = fold(product);
  });
  sum_halves<Columns>(products, first, sums);
}

constexpr int kWide = sizeof(vec) == 64 ? 16 : sizeof(vec) == 32 ? 8 : 4;  // columns that registers hold

// The gradients of one row, from a whole vector on. sums: written, or added to; between(): called where other
// work may be done
template <int V, class Between>
AF_INLINE void sample_row(const uint16_t* column, int64_t count, const float* dy, const float* x, bool first,
                          float* sums, Between&& between) {
  vec d[V];
  unroll<0, V>([&](auto v) AF_LAMBDA { d[v.value] = load(dy + v.value * kVector); });
  // past the end of a row its next columns are sampled too, into room that nobody reads
  int64_t j = 0;
  for (; count - j > kWide - 4; j += kWide) {
    sample<kWide, V>(column + j, d, x, first, sums + j);
    between();
  }
  if constexpr (kWide > 8)
    for (; count - j > 4; j += 8) sample<8, V>(column + j, d, x, first, sums + j);
  if constexpr (kWide > 4)
    for (; count - j > 0; j += 4) sample<4, V>(column + j, d, x, first, sums + j);
}

template <int V>  // returns where the sums of the next cell stand
float* sample_cell(const Lists& lists, int64_t cell, int64_t rows, const float* dy, const float* x,
                   bool first, float* sums) {
  const uint16_t *count = lists.counts + cell * lists.block, *column = lists.columns + lists.first[cell];
  for (int64_t r = 0; r < rows; ++r, ++count) {
    sample_row<V>(column, *count, dy + r * V * kVector, x, first, sums, [] {});
    column += *count;
    sums += ceil_div(*count, kWide) * kWide;
  }
  return sums;
}
constexpr auto kSampleCell = widths<kAlone>([](auto v) { return &sample_cell<decltype(v)::value>; });
#if defined(__AVX512F__)

// sample_cell of all samples, each row put past the cache while the next one is computed; dw: the cell's
// first entry, rows of whole lines
template <int V>
void sample_past(const Lists& lists, int64_t cell, int64_t rows, int64_t cols, const float* dy,
                 const float* x, float* dw) {
  alignas(64) float sums[2][kMaxChunk + 2 * kWide];
  const uint16_t *count = lists.counts + cell * lists.block, *column = lists.columns + lists.first[cell];
  const int64_t words = words_of(lists.chunk), all = lists.first[cell + 1] - lists.first[cell];
  const uint16_t* bits = lists.bits + cell * lists.block * words;
  const int64_t some = rows * cols / (all + 1) + 1;  // words that go with sixteen entries
  Pending pending;
  for (int64_t r = 0; r < rows; ++r, ++count, bits += words) {
    float* own = sums[r % 2];
    sample_row<V>(column, *count, dy + r * V * kVector, x, true, own,
                  [&]() AF_LAMBDA { pending.advance(some); });
    pending.finish();
    pending.start(own, bits, cols, dw + r * lists.cols);
    column += *count;
  }
  pending.finish();
}
constexpr auto kSamplePast = widths<kAlone>([](auto v) { return &sample_past<decltype(v)::value>; });
#endif

// where a cell stands in the weight
struct Place {
  int64_t row, col, rows, cols;
};
AF_INLINE Place place_of(const Lists& l, int64_t cell) {
  const int64_t chunks = ceil_div(l.cols, l.chunk), row = cell / chunks * l.block,
                col = cell % chunks * l.chunk;
  return {row, col, least(l.block, l.rows - row), least(l.chunk, l.cols - col)};
}
AF_INLINE bool many(const Lists& l, int64_t cell, Place at) {
  return (l.first[cell + 1] - l.first[cell]) * 16 > at.rows * at.cols;
}
AF_INLINE bool past(const Lists& l) { return l.rows * l.cols >= kSpreadPast; }

// dw of one cell = its sums, zeros elsewhere. Returns where the sums of the next cell stand.
const float* spread_cell(const Lists& lists, int64_t cell, const float* from, float* dw) {
  const Place at = place_of(lists, cell);
  const int64_t words = words_of(lists.chunk);
  const uint16_t *count = lists.counts + cell * lists.block, *column = lists.columns + lists.first[cell];
  const uint16_t* bits = lists.bits + cell * lists.block * words;
  alignas(64) float empty[kMaxChunk] = {};
  dw += at.row * lists.cols + at.col;
  int64_t r = 0;
#if defined(__AVX512F__)
  for (; !past(lists) && many(lists, cell, at) && r + 2 <= at.rows; r += 2, count += 2, bits += 2 * words) {
    const float* second = from + ceil_div(count[0], kWide) * kWide;
    spread_pair({from, second}, bits, words, at.cols, dw + r * lists.cols, lists.cols);
    column += count[0] + count[1];
    from = second + ceil_div(count[1], kWide) * kWide;
  }
#endif
  for (; r < at.rows; ++r, ++count, bits += words) {
    spread_row(from, column, *count, bits, at.cols, dw + r * lists.cols, past(lists), empty);
    column += *count;
    from += ceil_div(*count, kWide) * kWide;
  }
#if defined(__AVX2__)
  if (past(lists)) _mm_sfence();
#endif
  return from;
}

// dw of one cell, all panels
void sample_tile(const Lists& lists, int64_t cell, const float* dy, const float* x, int64_t n, float* dw) {
  alignas(64) float sums[kRowBlock * kMaxChunk + 2 * kWide];
  const Place at = place_of(lists, cell);
#if defined(__AVX512F__)
  float* to = dw + at.row * lists.cols + at.col;
  if (past(lists) && many(lists, cell, at) && n > 0 && n <= kAloneLanes &&
      whole_lines(to, at.cols, lists.cols)) {
    const int64_t width = panel(0, n, kAloneLanes).width;
    kSamplePast.of(width / kVector)(lists, cell, at.rows, at.cols, dy + at.row * width, x + at.col * width,
                                    to);
    return _mm_sfence();
  }
#endif
  for (int64_t i = 0; i < ceil_div(n, kAloneLanes); ++i) {
    const Panel p = panel(i, n, kAloneLanes);
    kSampleCell.of(p.width / kVector)(lists, cell, at.rows, dy + p.begin * lists.rows + at.row * p.width,
                                      x + p.begin * lists.cols + at.col * p.width, i == 0, sums);
  }
  if (n == 0) __builtin_memset(sums, 0, sizeof sums);
  spread_cell(lists, cell, sums, dw);
}

// sums of dw at all cells (+)= those of one panel
void sample_panel(const Lists& lists, const float* dy, const float* x, int64_t n, bool first, float* sums) {
  const int64_t cells = ceil_div(lists.rows, lists.block) * ceil_div(lists.cols, lists.chunk);
  const int64_t width = panel(0, n, kAloneLanes).width;
  for (int64_t t = 0; t < cells; ++t) {
    const Place at = place_of(lists, t);
    sums = kSampleCell.of(width / kVector)(lists, t, at.rows, dy + at.row * width, x + at.col * width, first,
                                           sums);
  }
}

// db[j] = the sum of column j of dy (n, rows), four samples at a time
void sum_samples(const float* dy, int64_t n, int64_t rows, float* db) {
  __builtin_memset(db, 0, std::size_t(rows) * sizeof(float));
  int64_t i = 0;
  for (; i + 4 <= n; i += 4, dy += 4 * rows)
#pragma omp simd
    for (int64_t j = 0; j < rows; ++j)
      db[j] += (dy[j] + dy[j + rows]) + (dy[j + 2 * rows] + dy[j + 3 * rows]);
  for (; i < n; ++i, dy += rows)
#pragma omp simd
    for (int64_t j = 0; j < rows; ++j) db[j] += dy[j];
}

}  // namespace
}  // namespace autoflip
