// The products of masked_matmul.h along the lists of each row: where few weights are kept, neighbouring rows
// share too few columns for groups to gain by.
//
// The kept weights of a large weight are copied once a step, in the order of the lists: it is then read once,
// from end to end, and what follows finds its weights side by side. Those of a small one are read where they
// stand.
#pragma once
#include "cpu/masked_matmul_product.h"

namespace autoflip {
namespace {

AF_INLINE bool packs(const Orders& o) { return !o.groups.rows && o.lists.rows * o.lists.cols >= kPackFrom; }

// --- the kept weights, copied

// to = those of `cols` weights whose bits are set; asks for all their lines and as many weights ahead
constexpr int64_t kAhead = 2048;  // floats
AF_INLINE void pack_row(const float* from, int64_t cols, const uint16_t* bits, const uint16_t* column,
                        int64_t count, float* to) {
#if defined(__AVX512F__)
  // fewer are faster one by one: their loop ends where nobody knows, which long rows pay for
  if (count * (cols > 256 ? 8 : 14) > cols) {
    for (int64_t j = 0; j < cols; j += kVector, ++bits) {
      __builtin_prefetch(from + kAhead + j, 0, 3);
      const __mmask16 kept = __mmask16(*bits);
      const int64_t some = __builtin_popcount(*bits);
      // not past the last of them: there may stand what was packed before
      _mm512_mask_storeu_ps(to, __mmask16((1u << some) - 1),
                            _mm512_maskz_compress_ps(kept, _mm512_maskz_loadu_ps(kept, from + j)));
      to += some;
    }
    return;
  }
#endif
  (void)bits;
  for (int64_t j = 0; j < cols; j += 16) __builtin_prefetch(from + kAhead + j, 0, 3);
  for (int64_t j = 0; j < count; ++j) to[j] = from[column[j]];
}

// values = the kept weights of all blocks of rows, cell by cell, row by row; read row by row, from end to
// end. Lines asked for 8 KB ahead came from memory at 12 to 16 GB/s, 16 KB or none ahead at 8 to 15
// (densities 0.05 and 0.1).
void pack_values(const Lists& l, const float* w, float* values, int threads) {
  constexpr int64_t kMost = 128;  // chunks walked side by side
  const int64_t blocks = ceil_div(l.rows, l.block), chunks = ceil_div(l.cols, l.chunk);
  const int64_t words = words_of(l.chunk);
  const bool most = int64_t(l.first[blocks * chunks]) * 32 > l.rows * l.cols;  // of its lines are wanted
#pragma omp parallel for num_threads(threads) if (threads > 1 && blocks > 1)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = b * l.block, rows = least(l.block, l.rows - row);
    for (int64_t c0 = 0; c0 < chunks; c0 += kMost) {
      const uint16_t *counts[kMost], *columns[kMost];
      float* to[kMost];
      const int64_t some = least(kMost, chunks - c0);
      for (int64_t c = 0; c < some; ++c) {
        const int64_t cell = b * chunks + c0 + c;
        counts[c] = l.counts + cell * l.block;
        columns[c] = l.columns + l.first[cell];
        to[c] = values + l.first[cell];
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < some; ++c) {
          const int64_t col = (c0 + c) * l.chunk, cols = least(l.chunk, l.cols - col), count = *counts[c]++;
          const float* from = w + (row + r) * l.cols + col;
          if (most) {
            const int64_t list = (b * chunks + c0 + c) * l.block + r;
            pack_row(from, cols, l.bits + list * words, columns[c], count, to[c]);
          } else {
            for (int64_t j = 0; j < count; ++j) to[c][j] = from[columns[c][j]];
          }
          columns[c] += count;
          to[c] += count;
        }
    }
  }
}

// --- one cell

enum { kPacked, kRows, kColumns };  // weights side by side, in a row of the weight, in a column of it

// sums[row][V vectors] += the weights * x at the lists of a cell; `stride`: floats between columns of the
// weight
template <int V, int From>
void add_lists(const Lists& l, int64_t cell, int64_t rows, const float* w, int64_t stride, const float* x,
               float* sums) {
  constexpr int kSums = V >= 4 ? 1 : V >= 2 ? 2 : 4;  // chains of sums: a multiply-add takes 4 cycles
  constexpr int kOpen = kAheadPays ? 4 : kSums;
  const uint16_t *count = l.counts + cell * l.block, *column = l.columns + l.first[cell];
  Numbers<kOpen, kAheadPays> numbers(column);  // past the end of a row go on with the next one's
  for (int64_t r = 0; r < rows; ++r, ++count, sums += V * kVector) {
    const uint16_t* end = column + *count;
    vec sum[kSums][V];
    unroll<0, V>([&](auto v) AF_LAMBDA {
      sum[0][v.value] = load(sums + v.value * kVector);
      unroll<1, kSums>([&](auto s) AF_LAMBDA { sum[s.value][v.value] = vec{}; });
    });
    const auto add = [&](int64_t k, int64_t i, vec(&to)[V]) AF_LAMBDA {
      const float* xk = x + k * (V * kVector);
      const vec b = broadcast(w[From == kPacked ? i : From == kRows ? k : k * stride]);
      unroll<0, V>([&](auto v)
                       AF_LAMBDA { to[v.value] = fma(b, load(xk + v.value * kVector), to[v.value]); });
    };
    for (; end - column >= kOpen; column += kOpen) {
      unroll<0, kOpen>([&](auto s)
                           AF_LAMBDA { add(numbers.take(column, s), s.value, sum[s.value % kSums]); });
      if constexpr (From == kPacked) w += kOpen;
    }
    if constexpr (kOpen > 1)
      for (; column != end; ++column) {
        add(numbers.next(column), 0, sum[0]);
        if constexpr (From == kPacked) ++w;
      }
    if constexpr (From == kRows) w += l.cols;
    if constexpr (From == kColumns) ++w;
    unroll<0, V>([&](auto v) AF_LAMBDA {
      vec all = sum[0][v.value];
      if constexpr (kSums == 2) all = all + sum[1][v.value];
      if constexpr (kSums == 4) all = (all + sum[1][v.value]) + (sum[2][v.value] + sum[3][v.value]);
      store(sums + v.value * kVector, all);
    });
  }
}

// sums[column][V vectors] += the weights * dy[row] at the lists of a cell
template <int V, int From>
void scatter_lists(const Lists& l, int64_t cell, int64_t rows, const float* w, const float* dy, float* sums) {
  const uint16_t *count = l.counts + cell * l.block, *column = l.columns + l.first[cell];
  for (int64_t r = 0; r < rows; ++r, ++count, dy += V * kVector) {
    const uint16_t* end = column + *count;
    vec d[V];
    unroll<0, V>([&](auto v) AF_LAMBDA { d[v.value] = load(dy + v.value * kVector); });
    for (; column != end; ++column) {
      float* to = sums + *column * int64_t(V * kVector);
      const vec b = broadcast(From == kPacked ? *w : w[*column]);
      unroll<0, V>([&](auto v) AF_LAMBDA {
        store(to + v.value * kVector, fma(b, d[v.value], load(to + v.value * kVector)));
      });
      if constexpr (From == kPacked) ++w;
    }
    if constexpr (From == kRows) w += l.cols;
  }
}

template <int From>
constexpr auto kAddListsOf = widths<kAlone>([](auto v) { return &add_lists<decltype(v)::value, From>; });
template <int From>
constexpr auto kScatterListsOf =
    widths<kAlone>([](auto v) { return &scatter_lists<decltype(v)::value, From>; });
constexpr decltype(kAddListsOf<kPacked>) kAddLists[] = {kAddListsOf<kPacked>, kAddListsOf<kRows>,
                                                        kAddListsOf<kColumns>};
constexpr decltype(kScatterListsOf<kPacked>) kScatterLists[] = {kScatterListsOf<kPacked>,
                                                                kScatterListsOf<kRows>};

// --- all cells

// out (n, l.rows) row-major = act(in @ weight.T + bias) for the `n` samples of panels[feature][lane]; `from`
// tells where w's entries stand, `stride` how far apart those of two columns (kColumns) are
void product(const Lists& l, const float* w, int from, const float* panels, int64_t n, const float* bias,
             bool relu, float* out, int threads) {
  const int64_t blocks = ceil_div(l.rows, l.block), chunks = ceil_div(l.cols, l.chunk);
  const int64_t count = ceil_div(n, kAloneLanes), round = l.rows * l.cols > kLarge ? kRound : 1;
  deal(ceil_div(count, round) * blocks, threads, [&](int64_t t) AF_LAMBDA {
    alignas(64) float sums[kRound][kRowBlock * kAloneLanes];
    const int64_t first = t / blocks * round, end = least(count, first + round), b = t % blocks;
    const int64_t row = b * l.block, rows = least(l.block, l.rows - row);
    for (int64_t i = first; i < end; ++i)
      start_sums(bias, row, rows, panel(i, n, kAloneLanes).width, sums[i - first]);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t cell = b * chunks + c, col = c * l.chunk;
      const float* here = w + (from == kPacked ? l.first[cell]
                               : from == kRows ? row * l.cols + col
                                               : col * l.rows + row);
      for (int64_t i = first; i < end; ++i) {
        const Panel p = panel(i, n, kAloneLanes);
        kAddLists[from].of(p.width / kVector)(l, cell, rows, here, l.rows,
                                              panels + p.begin * l.cols + col * p.width, sums[i - first]);
      }
    }
    for (int64_t i = first; i < end; ++i) {
      const Panel p = panel(i, n, kAloneLanes);
      finish_sums(sums[i - first], p, rows, relu, out + p.begin * l.rows + row, l.rows);
    }
  });
}

// dx of all panels along the lists of the forward product: few lanes are added up in memory
void product_back(const Lists& l, const float* w, int from, const float* panels, int64_t n, float* dx,
                  int threads) {
  const int64_t blocks = ceil_div(l.rows, l.block), chunks = ceil_div(l.cols, l.chunk);
  deal(ceil_div(n, kAloneLanes) * chunks, threads, [&](int64_t t) AF_LAMBDA {
    alignas(64) float sums[kMaxChunk * kAloneLanes];
    const Panel p = panel(t / chunks, n, kAloneLanes);
    const int64_t c = t % chunks;
    const int64_t col = c * l.chunk, cols = least(l.chunk, l.cols - col);
    start_sums(nullptr, 0, cols, p.width, sums);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t cell = b * chunks + c, row = b * l.block;
      kScatterLists[from].of(p.width / kVector)(l, cell, least(l.block, l.rows - row),
                                                w + (from == kPacked ? l.first[cell] : row * l.cols + col),
                                                panels + p.begin * l.rows + row * p.width, sums);
    }
    finish_sums(sums, p, cols, false, dx + p.begin * l.cols + col, l.cols);
  });
}

// turned = values in the order of the lists of columns
void turn_values(const Lists& back, const int32_t* place, const float* values, float* turned, int threads) {
  const int64_t cells = ceil_div(back.rows, back.block) * ceil_div(back.cols, back.chunk);
#pragma omp parallel for num_threads(threads) if (threads > 1 && cells > 1)
  for (int64_t t = 0; t < cells; ++t)
    for (int64_t j = back.first[t]; j < back.first[t + 1]; ++j) turned[j] = values[place[j]];
}

}  // namespace
}  // namespace autoflip
