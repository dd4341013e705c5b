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
  for (int64_t i = 0; i < n; ++i) to[i] = Word(in[i] & Word(Word(0) - mask[i]));
}

template <class Word>
bool words_are_clean(const void* w, const uint8_t* mask, int64_t n) {
  const Word* in = static_cast<const Word*>(w);
  for (int64_t begin = 0; begin < n; begin += 4096) {
    const int64_t end = n - begin < 4096 ? n : begin + 4096;
    Word stray = 0;
#pragma omp simd reduction(| : stray)
    for (int64_t i = begin; i < end; ++i) {
      stray |= Word(Word(in[i] << 1) & Word(Word(mask[i]) - Word(1)));  // -0 is zero too
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

template <int V>
void sample_cell(const Lists& lists, int64_t cell, int64_t rows, const float* dy, const float* x, bool first,
                 float* sums) {
  const uint16_t *count = lists.counts + cell * lists.block, *column = lists.columns + lists.first[cell];
  for (int64_t r = 0; r < rows; ++r, ++count) {
    sample_row<V>(column, *count, dy + r * V * kVector, x, first, sums, [] {});
    column += *count;
    sums += ceil_div(*count, kWide) * kWide;
  }
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

// dw of one cell, all panels
void sample_tile(const Lists& lists, int64_t cell, const float* dy, const float* x, int64_t n, float* dw) {
  alignas(64) float sums[kRowBlock * kMaxChunk + 2 * kWide];
  const int64_t chunks = ceil_div(lists.cols, lists.chunk), words = words_of(lists.chunk);
  const int64_t row = cell / chunks * lists.block, col = cell % chunks * lists.chunk;
  const int64_t rows = lists.rows - row < lists.block ? lists.rows - row : lists.block;
  const int64_t cols = lists.cols - col < lists.chunk ? lists.cols - col : lists.chunk;
  const bool past = lists.rows * lists.cols >= kSpreadPast;
  dw += row * lists.cols + col;
#if defined(__AVX512F__)
  const bool many = (lists.first[cell + 1] - lists.first[cell]) * 16 > rows * cols;
  if (past && many && n > 0 && n <= kAloneLanes && whole_lines(dw, cols, lists.cols)) {
    const int64_t width = panel(0, n, kAloneLanes).width;
    kSamplePast.of(width / kVector)(lists, cell, rows, cols, dy + row * width, x + col * width, dw);
    return _mm_sfence();
  }
#endif
  for (int64_t i = 0; i < ceil_div(n, kAloneLanes); ++i) {
    const Panel p = panel(i, n, kAloneLanes);
    kSampleCell.of(p.width / kVector)(lists, cell, rows, dy + p.begin * lists.rows + row * p.width,
                                      x + p.begin * lists.cols + col * p.width, i == 0, sums);
  }
  const uint16_t *count = lists.counts + cell * lists.block, *column = lists.columns + lists.first[cell];
  const uint16_t* bits = lists.bits + cell * lists.block * words;
  alignas(64) float empty[kMaxChunk] = {};
  const float* from = sums;
  if (n == 0) __builtin_memset(sums, 0, sizeof sums);
  int64_t r = 0;
#if defined(__AVX512F__)
  for (; !past && many && r + 2 <= rows; r += 2, count += 2, bits += 2 * words) {
    const float* second = from + ceil_div(count[0], kWide) * kWide;
    spread_pair({from, second}, bits, words, cols, dw + r * lists.cols, lists.cols);
    column += count[0] + count[1];
    from = second + ceil_div(count[1], kWide) * kWide;
  }
#endif
  for (; r < rows; ++r, ++count, bits += words) {
    spread_row(from, column, *count, bits, cols, dw + r * lists.cols, past, empty);
    column += *count;
    from += ceil_div(*count, kWide) * kWide;
  }
#if defined(__AVX2__)
  if (past) _mm_sfence();
#endif
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

// --- a whole step forward and back

// lanes of the panels that the products take; the gradient in w walks rows one by one whatever they do
AF_INLINE int64_t lanes_of(const Orders& orders) { return orders.groups.rows ? kLanes : kAloneLanes; }

int64_t forward_scratch(const Orders& orders, int64_t n) {
  return padded(n) * orders.lists.cols + (packs(orders) ? kept(orders.lists) : 0);
}
// past the end of a row of a narrow chunk the gradient in w looks up columns of another chunk
int64_t backward_scratch(const Orders& orders, int64_t n) {
  return padded(n) * (orders.lists.rows + orders.lists.cols) + kMaxChunk * kAloneLanes +
         (packs(orders) ? 2 * kept(orders.lists) : 0);
}

void forward(const Orders& orders, const float* w, const float* x, int64_t n, const float* bias, bool relu,
             float* y, float* values, float* scratch, int threads) {
  const Lists& lists = orders.lists;
  to_panels(x, n, lists.cols, scratch, threads, lanes_of(orders));
  if (orders.groups.rows)
    return product(orders.groups, {w, lists.cols, 1, false}, scratch, n, bias, relu, y, threads);
  if (!packs(orders)) return product(lists, w, kRows, scratch, n, bias, relu, y, threads);
  if (!values) values = scratch + padded(n) * lists.cols;
  pack_values(lists, w, values, threads);
  product(lists, values, kPacked, scratch, n, bias, relu, y, threads);
}

// dx from the panels of dy; `room`: 2 * kept floats where the weights are copied
void gradient_in_x(const Orders& orders, const float* w, const float* values, const float* panels, int64_t n,
                   float* dx, float* room, int threads) {
  const Lists &lists = orders.lists, &back = orders.columns;
  if (orders.back.rows)
    return product(orders.back, {w, 1, lists.cols, false}, panels, n, nullptr, false, dx, threads);
  if (orders.groups.rows) return product_back(orders.groups, w, panels, n, dx, threads);
  if (!packs(orders)) {
    if (back.rows) return product(back, w, kColumns, panels, n, nullptr, false, dx, threads);
    return product_back(lists, w, kRows, panels, n, dx, threads);
  }
  if (!values) {
    pack_values(lists, w, room, threads);
    values = room;
  }
  if (!back.rows) return product_back(lists, values, kPacked, panels, n, dx, threads);
  room += kept(orders.lists);
  turn_values(back, orders.place, values, room, threads);
  product(back, room, kPacked, panels, n, nullptr, false, dx, threads);
}

void backward(const Orders& orders, const float* w, const float* values, const float* dy, const float* x,
              int64_t n, float* dx, float* dw, float* db, float* scratch, int threads) {
  const Lists& lists = orders.lists;
  if (db) sum_samples(dy, n, lists.rows, db);
  float* x_panels = scratch + padded(n) * lists.rows;
  if (dx) {
    to_panels(dy, n, lists.rows, scratch, threads, lanes_of(orders));
    gradient_in_x(orders, w, values, scratch, n, dx,
                  x_panels + padded(n) * lists.cols + kMaxChunk * kAloneLanes, threads);
  }
  if (!dw) return;
  if (!dx || lanes_of(orders) != kAloneLanes) to_panels(dy, n, lists.rows, scratch, threads, kAloneLanes);
  to_panels(x, n, lists.cols, x_panels, threads, kAloneLanes);
  const int64_t cells = ceil_div(lists.rows, lists.block) * ceil_div(lists.cols, lists.chunk);
  deal(cells, threads, [&](int64_t t) AF_LAMBDA { sample_tile(lists, t, scratch, x_panels, n, dw); });
}

}  // namespace
}  // namespace autoflip
