// The inner loop: a team of rows times the rows of u that a list names, kept in registers.
#pragma once
#include "cpu/hessian_plan.h"

namespace {

// What becomes of a row's sums: they are what D is, or are added to it, or their squares are.
enum class Into { kSet, kAdd, kSquares };

// sums[r][v] = sum_j row r's value j * u[list[j]], then into D_r
template <Into kInto, int R, int V, bool kList>
inline void tile(const float* u, int64_t ld, const Plan::Row* rows, float* const* out) {
  Vec sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = kInto == Into::kAdd ? load(out[r] + v * W) : splat(0.f);
  const int32_t* list = rows->list;
  int64_t count = rows->count;
  const float* values[R];
  for (int r = 0; r < R; ++r) values[r] = rows[r].values;
  for (int64_t j = 0; j < count; ++j) {
    const float* row = u + (kList ? list[j] : j) * ld;
    Vec a[R];  // rather than V vectors of u: with them 3 x 4 sums just fit into 16 registers
    for (int r = 0; r < R; ++r) a[r] = splat(values[r][j]);
    for (int v = 0; v < V; ++v) {
      Vec b = load(row + v * W);
      for (int r = 0; r < R; ++r) sums[r][v] = fma(a[r], b, sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* to = out[r] + v * W;
      store(to, kInto == Into::kSquares ? fma(sums[r][v], sums[r][v], load(to)) : sums[r][v]);
    }
}

template <Into kInto, int R, bool kList>
inline void columns(const float* u, int64_t ld, const Plan::Row* rows, float* const* out, int64_t width) {
  float* at[R];
  int64_t k = 0;
  auto shift = [&] {
    for (int r = 0; r < R; ++r) at[r] = out[r] + k;
  };
  if constexpr (R == 1)  // four sums alone would wait for each other's latency
    for (; k + 8 * W <= width; k += 8 * W) shift(), tile<kInto, R, 8, kList>(u + k, ld, rows, at);
  for (; k + 4 * W <= width; k += 4 * W) shift(), tile<kInto, R, 4, kList>(u + k, ld, rows, at);
  if (k + 3 * W <= width) shift(), tile<kInto, R, 3, kList>(u + k, ld, rows, at), k += 3 * W;
  for (; k + 2 * W <= width; k += 2 * W) shift(), tile<kInto, R, 2, kList>(u + k, ld, rows, at);
  for (; k < width; k += W) shift(), tile<kInto, R, 1, kList>(u + k, ld, rows, at);
}

template <Into kInto, int R>
inline void columns(const float* u, int64_t ld, const Plan::Row* rows, float* const* out, int64_t width) {
  if (rows->list)
    columns<kInto, R, true>(u, ld, rows, out, width);
  else
    columns<kInto, R, false>(u, ld, rows, out, width);
}

template <Into kInto>
inline void columns(int64_t n, const float* u, int64_t ld, const Plan::Row* rows, float* const* out,
                    int64_t width) {
  switch (n) {
    case 1:
      return columns<kInto, 1>(u, ld, rows, out, width);
    case 2:
      return columns<kInto, 2>(u, ld, rows, out, width);
    case 3:
      return columns<kInto, 3>(u, ld, rows, out, width);
#if defined(__AVX512F__)
    case 4:
      return columns<kInto, 4>(u, ld, rows, out, width);
    case 5:
      return columns<kInto, 5>(u, ld, rows, out, width);
    case 6:
      return columns<kInto, 6>(u, ld, rows, out, width);
#endif
  }
}

}  // namespace
