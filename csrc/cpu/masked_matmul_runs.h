// The walk along a layout, and the product over it, that masked products and convolutions share.
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

// Calls visit(pattern, runs), which reads the runs, for each pattern of one (block, chunk).
template <class Visit>
AF_INLINE void each_pattern(const Layout& layout, int64_t cell, const float* values, Visit&& visit) {
  const int32_t* table = layout.table + cell * kTable;
  Runs runs = {nullptr, nullptr, layout.columns + table[0], values + table[1]};
  unroll<0, kPatterns>([&](auto slot) AF_LAMBDA {
    runs.run = layout.runs + table[2 + slot.value];
    runs.end = layout.runs + table[3 + slot.value];
    visit(Int<kPattern[slot.value]>{}, runs);
  });
}

// sums[row][V vectors] += the runs of pattern P; the activations of column k begin k * Step vectors on
template <int P, int V, int Step>
AF_INLINE void add_runs(Runs& runs, const float* x, float* sums_at) {
  constexpr int kRows = popcount(P);
  // a multiply-add takes 4 cycles and two can begin in each: 8 chains of sums must be open
  constexpr int kSets = kRows * V >= 8 ? 1 : kRows * V >= 4 ? 2 : 4;
  const uint16_t* column = runs.column;
  const float* w = runs.value;
  for (; runs.run != runs.end; ++runs.run) {
    const int64_t row = *runs.run & 0xffff, count = *runs.run >> 16;
    const uint16_t* end = column + count;
    float* at = sums_at + row * V * kVector;
    vec set[kSets][kRows][V];
    unroll<0, kRows * V>([&](auto i) AF_LAMBDA {
      constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
      set[0][r][v] = load(at + (row_of(P, r) * V + v) * kVector);
      unroll<1, kSets>([&](auto s) AF_LAMBDA { set[s.value][r][v] = vec{}; });
    });
    const auto add = [&](int64_t k, const float* wk, vec(&to)[kRows][V]) AF_LAMBDA {
      const float* xk = x + k * Step * kVector;
      vec xs[V];
      unroll<0, V>([&](auto v) AF_LAMBDA { xs[v.value] = load(xk + v.value * kVector); });
      unroll<0, kRows>([&](auto r) AF_LAMBDA {
        const vec b = broadcast(wk[r.value * count]);
        unroll<0, V>([&](auto v)
                         AF_LAMBDA { to[r.value][v.value] = fma(b, xs[v.value], to[r.value][v.value]); });
      });
    };
    for (; end - column >= kSets; column += kSets, w += kSets)
      unroll<0, kSets>([&](auto s) AF_LAMBDA { add(column[s.value], w + s.value, set[s.value]); });
    if constexpr (P == 1 && kSets > 1)  // the others have whole fours of columns
      for (; column != end; ++column, ++w) add(*column, w, set[0]);
    w += (kRows - 1) * count;
    unroll<0, kRows * V>([&](auto i) AF_LAMBDA {
      constexpr int r = decltype(i)::value / V, v = decltype(i)::value % V;
      vec sum = set[0][r][v];
      if constexpr (kSets == 2) sum = sum + set[1][r][v];
      if constexpr (kSets == 4) sum = (sum + set[1][r][v]) + (set[2][r][v] + set[3][r][v]);
      store(at + (row_of(P, r) * V + v) * kVector, sum);
    });
  }
  runs.column = column;
  runs.value = w;
}

template <int V, int Step = V>
void add_cell(const Layout& layout, int64_t cell, const float* values, const float* x, float* sums) {
  each_pattern(layout, cell, values,
               [&](auto p, Runs& runs) AF_LAMBDA { add_runs<p.value, V, Step>(runs, x, sums); });
}

}  // namespace
}  // namespace autoflip
