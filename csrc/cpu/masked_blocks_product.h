// Forward and the gradient in x for blocks: see masked_blocks.h. Samples are lanes; a column's activations
// serve four rows.
#pragma once
#include "cpu/masked_blocks.h"
#include "cpu/masked_matmul_product.h"

namespace autoflip {
namespace {

constexpr int64_t kSumRows = kRowBlock * kFlat;  // of one task: with 64 lanes their sums take 128 KB

// Four rows of kept weights: side by side, `stride` floats from column to column of the list (Copied), or
// `stride` floats from row to row of the weight. Ask: the four rows after them are asked for on the way.
template <bool Copied, bool Ask = false>
struct Four {
  const float* at;
  int64_t stride;
};

// Four rows of one list, those from `live` on zeros, side by side in `to`
Four<true> beside(const uint16_t* column, int64_t count, const float* w, int64_t stride, int64_t live,
                  float* to) {
  for (int64_t j = 0; j < count; ++j)
    for (int64_t r = 0; r < kFlat; ++r) to[j * kFlat + r] = r < live ? w[r * stride + column[j]] : 0;
  return {to, kFlat};
}

// Calls visit(weights, list, first row, live rows) for every four rows of the groups [from, end) of a cell;
// w: the cell's weights, or the copy of the kept ones; `far`: weights come from memory
template <bool Copied, class Visit>
AF_INLINE void each_four(const Blocks& b, int64_t cell, int64_t from, int64_t end, int64_t rows,
                         const float* w, bool far, Visit&& visit) {
  const Lists& l = b.lists;
  alignas(64) float edge[kMaxChunk * kFlat];
  const uint16_t *count = l.counts + cell * l.block, *column = l.columns + l.first[cell];
  for (int64_t g = 0; g < from; ++g) column += *count++;
  if (Copied) w += (column - l.columns - l.first[cell]) * b.height;
  for (int64_t g = from; g < end; column += *count++, ++g) {
    for (int64_t r = 0; r < b.height; r += kFlat) {
      const int64_t row = (g - from) * b.height + r, live = rows - row;
      if (live <= 0) break;
      if constexpr (Copied) {
        visit(Four<true>{w + r, b.height}, column, *count, row, live);
      } else {
        const float* here = w + (from * b.height + row) * l.cols;
        if (far && live >= 2 * kFlat)
          visit(Four<false, true>{here, l.cols}, column, *count, row, live);
        else if (live >= kFlat)
          visit(Four<false>{here, l.cols}, column, *count, row, live);
        else
          visit(beside(column, *count, here, l.cols, live, edge), column, *count, row, live);
      }
    }
    if (Copied) w += *count * b.height;
  }
}

// the weights of four rows at entry j of a list
template <bool Copied>
struct Entry {
  template <bool Ask>
  AF_INLINE Entry(Four<Copied, Ask> w, const uint16_t* column, int64_t j)
      : at(Copied ? w.at + j * w.stride : w.at + column[j]), stride(Copied ? 1 : w.stride) {}
  AF_INLINE vec operator[](int r) const { return broadcast(at[r * stride]); }
  AF_INLINE void ask(int64_t r) const { __builtin_prefetch(at + (kFlat + r) * stride, 0, 2); }
  const float* at;
  int64_t stride;
};

// sums[4 rows][V vectors] += the blocks of one list
template <int V, bool Copied, bool Ask>
AF_INLINE void add_list(const uint16_t* column, int64_t count, Four<Copied, Ask> w, const float* x,
                        float* at) {
  constexpr int S = kSets<V>;
  vec sums[S][kFlat][V];
  unroll<0, kFlat * V>([&](auto i) AF_LAMBDA {
    sums[0][i.value / V][i.value % V] = load(at + i.value * kVector);
    unroll<1, S>([&](auto s) AF_LAMBDA { sums[s.value][i.value / V][i.value % V] = vec{}; });
  });
  const auto add = [&](int64_t j, auto s) AF_LAMBDA {
    auto& to = sums[s.value];
    const float* xk = x + column[j] * int64_t(V * kVector);
    const Entry<Copied> entry(w, column, j);
    if constexpr (Ask)  // neighbouring columns share lines: each asks for its share of the rows
      unroll<0, kFlat / S>([&](auto i) AF_LAMBDA { entry.ask(s.value * (kFlat / S) + i.value); });
    vec xs[V];
    unroll<0, V>([&](auto v) AF_LAMBDA { xs[v.value] = load(xk + v.value * kVector); });
    unroll<0, kFlat>([&](auto r) AF_LAMBDA {
      const vec b = entry[r.value];
      unroll<0, V>([&](auto v)
                       AF_LAMBDA { to[r.value][v.value] = fma(b, xs[v.value], to[r.value][v.value]); });
    });
  };
  int64_t j = 0;
  for (; j + S <= count; j += S) unroll<0, S>([&](auto s) AF_LAMBDA { add(j + s.value, s); });
  if constexpr (S > 1)
    for (; j < count; ++j) add(j, Int<0>{});
  unroll<0, kFlat * V>([&](auto i) AF_LAMBDA {
    constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
    vec sum = sums[0][r][v];
    if constexpr (S == 2) sum = sum + sums[1][r][v];
    if constexpr (S == 4) sum = (sum + sums[1][r][v]) + (sums[2][r][v] + sums[3][r][v]);
    store(at + i.value * kVector, sum);
  });
}

template <int V, bool Copied>
void add_blocks(const Blocks& b, int64_t cell, int64_t from, int64_t end, int64_t rows, const float* w,
                bool far, const float* x, float* sums) {
  each_four<Copied>(b, cell, from, end, rows, w, far,
                    [&](auto four, const uint16_t* column, int64_t count, int64_t row, int64_t) AF_LAMBDA {
                      if (count) add_list<V>(column, count, four, x, sums + row * V * kVector);
                    });
}

// sums[column][V vectors] += weights * dy at one list; dy: the panel at its first row
template <int V, bool Copied, bool Ask>
AF_INLINE void scatter_list(const uint16_t* column, int64_t count, Four<Copied, Ask> w, const float* dy,
                            int64_t live, float* sums) {
  vec d[kFlat][V];
  unroll<0, kFlat * V>([&](auto i) AF_LAMBDA {
    constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
    d[r][v] = r < live ? load(dy + i.value * kVector) : vec{};
  });
  for (int64_t j = 0; j < count; ++j) {
    float* at = sums + column[j] * int64_t(V * kVector);
    const Entry<Copied> entry(w, column, j);
    if constexpr (Ask) entry.ask(j % kFlat);
    vec sum[V];
    unroll<0, V>([&](auto v) AF_LAMBDA { sum[v.value] = load(at + v.value * kVector); });
    unroll<0, kFlat>([&](auto r) AF_LAMBDA {
      const vec b = entry[r.value];
      unroll<0, V>([&](auto v) AF_LAMBDA { sum[v.value] = fma(b, d[r.value][v.value], sum[v.value]); });
    });
    unroll<0, V>([&](auto v) AF_LAMBDA { store(at + v.value * kVector, sum[v.value]); });
  }
}

template <int V, bool Copied>
void scatter_blocks(const Blocks& b, int64_t cell, int64_t from, int64_t end, int64_t rows, const float* w,
                    bool far, const float* dy, float* sums) {
  each_four<Copied>(
      b, cell, from, end, rows, w, far,
      [&](auto four, const uint16_t* column, int64_t count, int64_t row, int64_t live)
          AF_LAMBDA { scatter_list<V>(column, count, four, dy + row * V * kVector, live, sums); });
}

template <bool Copied>
constexpr auto kAddBlocksOf = widths([](auto v) { return &add_blocks<decltype(v)::value, Copied>; });
template <bool Copied>
constexpr auto kScatterBlocksOf = widths([](auto v) { return &scatter_blocks<decltype(v)::value, Copied>; });
constexpr decltype(kAddBlocksOf<true>) kAddBlocks[] = {kAddBlocksOf<false>, kAddBlocksOf<true>};
constexpr decltype(kScatterBlocksOf<true>) kScatterBlocks[] = {kScatterBlocksOf<false>,
                                                               kScatterBlocksOf<true>};

// Where the weights of a cell begin, `row` and `col` the first of them: in the copy, or in the weight itself.
AF_INLINE const float* weights_at(const Blocks& b, int64_t cell, int64_t row, int64_t col, const float* w,
                                  const float* copy) {
  return copy ? copy + int64_t(b.lists.first[cell]) * b.height : w + row * b.lists.cols + col;
}

// How many panels meet a piece of the weight one after the other: as many as spare a large one that is read
// where it stands from coming from memory for each.
AF_INLINE int64_t round_of(const Blocks& b, const float* copy) {
  return !copy && b.rows * b.lists.cols > kLarge ? kRound : 1;
}

// y (n, rows) row-major = act(x @ weight.T + bias) for the samples of `panels`; copy: the kept weights, or
// null
void blocks_product(const Blocks& b, const float* w, const float* copy, const float* panels, int64_t n,
                    const float* bias, bool relu, float* y, int threads) {
  const Lists& l = b.lists;
  const int64_t count = ceil_div(n, kLanes), round = least(round_of(b, copy), count > 0 ? count : 1);
  const int64_t chunks = ceil_div(l.cols, l.chunk), room = kSumRows / round, groups = room / b.height,
                pieces = ceil_div(l.block, groups), tasks = ceil_div(l.rows, l.block) * pieces,
                rounds = ceil_div(count, round);
  const bool far = round_of(b, copy) > 1;
  deal(tasks * rounds, threads, [&](int64_t task) AF_LAMBDA {
    alignas(64) float sums[kSumRows * kLanes];
    const int64_t t = task / rounds, first = task % rounds * round, block = t / pieces,
                  from = t % pieces * groups,
                  end = least(least(from + groups, l.block), l.rows - block * l.block),
                  top = block * l.block * b.height, row = top + from * b.height,
                  rows = least((end - from) * b.height, b.rows - row);
    if (from >= end) return;
    const auto each = [&](auto&& visit) AF_LAMBDA {  // visit(panel, its sums)
      for (int64_t i = first; i < least(first + round, count); ++i)
        visit(panel(i, n), sums + (i - first) * room * kLanes);
    };
    each([&](Panel p, float* own) AF_LAMBDA {
      start_sums(bias, row, rows, p.width, own);
      for (int64_t r = rows; r % kFlat; ++r) start_sums(nullptr, 0, 1, p.width, own + r * p.width);
    });
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t cell = block * chunks + c, col = c * l.chunk;
      const float* here = weights_at(b, cell, top, col, w, copy);
      each([&](Panel p, float* own) AF_LAMBDA {
        kAddBlocks[copy != nullptr].of(p.width / kVector)(b, cell, from, end, rows, here, far && own == sums,
                                                          panels + p.begin * l.cols + col * p.width, own);
      });
    }
    each([&](Panel p, float* own)
             AF_LAMBDA { finish_sums(own, p, rows, relu, y + p.begin * b.rows + row, b.rows); });
  });
}

void blocks_back(const Blocks& b, const float* w, const float* copy, const float* panels, int64_t n,
                 float* dx, int threads) {
  const Lists& l = b.lists;
  // a chunk of columns for each panel of a round: more room would be met cold
  const int64_t count = ceil_div(n, kLanes), room = l.chunk * kLanes,
                round = least(least(round_of(b, copy), kMaxChunk / l.chunk), count > 0 ? count : 1);
  const int64_t many = ceil_div(l.rows, l.block), chunks = ceil_div(l.cols, l.chunk);
  const int64_t groups = round > 1 ? kSumRows / round / b.height : l.block;
  const bool far = round_of(b, copy) > 1;
  deal(ceil_div(count, round) * chunks, threads, [&](int64_t t) AF_LAMBDA {
    alignas(64) float sums[kMaxChunk * kLanes];
    const int64_t first = t / chunks * round, last = least(first + round, count), c = t % chunks;
    const int64_t col = c * l.chunk, cols = least(l.chunk, l.cols - col);
    for (int64_t i = first; i < last; ++i)
      start_sums(nullptr, 0, cols, panel(i, n).width, sums + (i - first) * room);
    for (int64_t block = 0; block < many; ++block) {
      const int64_t cell = block * chunks + c, top = block * l.block * b.height,
                    all = least(l.block, l.rows - block * l.block);
      const float* here = weights_at(b, cell, top, col, w, copy);
      for (int64_t from = 0; from < all; from += groups)
        for (int64_t i = first; i < last; ++i) {
          const Panel p = panel(i, n);
          const int64_t row = top + from * b.height, end = least(from + groups, all);
          kScatterBlocks[copy != nullptr].of(p.width / kVector)(
              b, cell, from, end, least((end - from) * b.height, b.rows - row), here, far && i == first,
              panels + p.begin * b.rows + row * p.width, sums + (i - first) * room);
        }
    }
    for (int64_t i = first; i < last; ++i) {
      const Panel p = panel(i, n);
      finish_sums(sums + (i - first) * room, p, cols, false, dx + p.begin * l.cols + col, l.cols);
    }
  });
}

}  // namespace
}  // namespace autoflip
