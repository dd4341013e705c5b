// The walk along a layout of masked_conv.h, and the product over it.
#pragma once
#include "cpu/masked_matmul_simd.h"

namespace autoflip {
namespace {

// The runs of one pattern in one (block, chunk), and how far columns and values have been read.
struct Runs {
  const uint32_t *run, *end;
  const uint16_t* column;
  const float* value;
};

AF_INLINE Runs runs_at(const Layout& layout, int64_t cell, const float* values) {
  const int32_t* table = layout.table + cell * kTable;
  return {nullptr, nullptr, layout.columns + table[0], values + table[1]};
}

// Calls visit(pattern, runs), which reads the runs, for the patterns [Begin, End) of one (block, chunk).
template <int Begin, int End, class Visit>
AF_INLINE void each_pattern(const Layout& layout, int64_t cell, Runs& runs, Visit&& visit) {
  const int32_t* table = layout.table + cell * kTable;
  unroll<Begin, End>([&](auto slot) AF_LAMBDA {
    runs.run = layout.runs + table[2 + slot.value];
    runs.end = layout.runs + table[3 + slot.value];
    visit(Int<kPattern[slot.value]>{}, runs);
  });
}

// sums += the runs of pattern P at V positions side by side. The activations of column k begin k vectors on;
// a row's sums begin `stride` floats after those of the row before.
template <int P, int V>
AF_INLINE void add_runs(Runs& runs, const float* x, float* sums, int64_t stride) {
  constexpr int kRows = popcount(P);
  // a multiply-add takes 4 cycles and two can begin in each: 8 chains of sums must be open
  constexpr int kSets = kRows * V >= 8 ? 1 : kRows * V >= 4 ? 2 : 4;
  constexpr bool kAhead = P == 1 && kAheadPays;
  constexpr int kOpen = kAhead ? 4 : kSets;
  const uint16_t* column = runs.column;
  const float* w = runs.value;
  Numbers<kOpen, kAhead> numbers(column);
  for (; runs.run != runs.end; ++runs.run) {
    const int64_t row = *runs.run & 0xffff, count = *runs.run >> 16;
    const uint16_t* end = column + count;
    float* at = sums + row * stride;
    vec set[kSets][kRows][V];
    unroll<0, kRows * V>([&](auto i) AF_LAMBDA {
      constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
      set[0][r][v] = load(at + row_of(P, r) * stride + v * kVector);
      unroll<1, kSets>([&](auto s) AF_LAMBDA { set[s.value][r][v] = vec{}; });
    });
    const auto add = [&](int64_t k, const float* wk, vec(&to)[kRows][V]) AF_LAMBDA {
      const float* xk = x + k * kVector;
      vec xs[V];
      unroll<0, V>([&](auto v) AF_LAMBDA { xs[v.value] = load(xk + v.value * kVector); });
      unroll<0, kRows>([&](auto r) AF_LAMBDA {
        const vec b = broadcast(wk[r.value * count]);
        unroll<0, V>([&](auto v)
                         AF_LAMBDA { to[r.value][v.value] = fma(b, xs[v.value], to[r.value][v.value]); });
      });
    };
    for (; end - column >= kOpen; column += kOpen, w += kOpen)
      unroll<0, kOpen>([&](auto s)
                           AF_LAMBDA { add(numbers.take(column, s), w + s.value, set[s.value % kSets]); });
    if constexpr (P == 1 && kOpen > 1)  // the others have whole fours of columns
      for (; column != end; ++column, ++w) add(numbers.next(column), w, set[0]);
    w += (kRows - 1) * count;
    unroll<0, kRows * V>([&](auto i) AF_LAMBDA {
      constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
      vec sum = set[0][r][v];
      if constexpr (kSets == 2) sum = sum + set[1][r][v];
      if constexpr (kSets == 4) sum = (sum + set[1][r][v]) + (set[2][r][v] + set[3][r][v]);
      store(at + row_of(P, r) * stride + v * kVector, sum);
    });
  }
  runs.column = column;
  runs.value = w;
}

typedef Runs AddShared(const Layout& layout, int64_t cell, const float* values, const float* x, float* sums,
                       int64_t stride);
typedef void AddSingles(const Layout& layout, int64_t cell, Runs runs, const float* x, float* sums,
                        int64_t stride);

// the runs of several rows; returns those of single rows
template <int V>
Runs add_shared(const Layout& layout, int64_t cell, const float* values, const float* x, float* sums,
                int64_t stride) {
  Runs runs = runs_at(layout, cell, values);
  each_pattern<0, kPatterns - 1>(layout, cell, runs, [&](auto p, Runs& found) AF_LAMBDA {
    add_runs<p.value, V>(found, x, sums, stride);
  });
  return runs;
}

template <int V>
void add_singles(const Layout& layout, int64_t cell, Runs runs, const float* x, float* sums, int64_t stride) {
  each_pattern<kPatterns - 1, kPatterns>(layout, cell, runs, [&](auto p, Runs& found) AF_LAMBDA {
    add_runs<p.value, V>(found, x, sums, stride);
  });
}

#if defined(__AVX512F__)
constexpr AddShared* kAddShared[] = {add_shared<1>, add_shared<2>, add_shared<3>, add_shared<4>};
constexpr AddSingles* kAddSingles[] = {add_singles<1>, add_singles<2>, add_singles<3>, add_singles<4>,
                                       add_singles<5>, add_singles<6>, add_singles<7>, add_singles<8>};
#else
constexpr AddShared* kAddShared[] = {add_shared<1>, add_shared<2>, add_shared<3>};
constexpr AddSingles* kAddSingles[] = {add_singles<1>, add_singles<2>, add_singles<3>,
                                       add_singles<4>, add_singles<5>, add_singles<6>};
#endif
constexpr int kShared = sizeof(kAddShared) / sizeof(*kAddShared);
constexpr int64_t kPositions = 2 * kShared;  // that a single row's sums take side by side

// sums[row][positions] += a cell at `count` positions, kPositions at most. A weight of a single row asks for
// as many loads as multiply-adds, and one for itself: it meets twice the positions that the sums of four rows
// leave room for.
AF_INLINE void add_tile(const Layout& layout, int64_t cell, const float* values, const float* x,
                        int64_t count, float* sums, int64_t stride) {
  const int64_t some = count < kShared ? count : kShared;
  Runs singles = kAddShared[some - 1](layout, cell, values, x, sums, stride);
  if (count > some)
    singles =
        kAddShared[count - some - 1](layout, cell, values, x + some * kVector, sums + some * kVector, stride);
  kAddSingles[count - 1](layout, cell, singles, x, sums, stride);
}

}  // namespace
}  // namespace autoflip
