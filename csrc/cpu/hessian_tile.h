// The inner loop: a team of rows times the rows of u that a list names, kept in registers.
#pragma once
#include "cpu/hessian_plan.h"

namespace {

// sums[r][v] = sum_j row r's value j * u[list[j]], then D_r += sums^2, or D_r = sums
template <bool kSquare, int R, int V, bool kList>
inline void tile(const float* u, int64_t ld, const Plan::Row* rows, float* const* out) {
  Vec sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = splat(0.f);
  const int32_t* list = rows->list;
  int64_t count = rows->count;
  const float* values[R];
  for (int r = 0; r < R; ++r) values[r] = rows[r].values;
  for (int64_t j = 0; j < count; ++j) {
    const float* row = u + (kList ? list[j] : j) * ld;
    Vec b[V];
    for (int v = 0; v < V; ++v) b[v] = load(row + v * W);
    for (int r = 0; r < R; ++r) {
      Vec a = splat(values[r][j]);
      for (int v = 0; v < V; ++v) sums[r][v] = fma(a, b[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* to = out[r] + v * W;
      store(to, kSquare ? fma(sums[r][v], sums[r][v], load(to)) : sums[r][v]);
    }
}

template <bool kSquare, int R, bool kList>
inline void columns(const float* u, int64_t ld, const Plan::Row* rows, float* const* out, int64_t width) {
  float* at[R];
  int64_t k = 0;
  auto shift = [&] {
    for (int r = 0; r < R; ++r) at[r] = out[r] + k;
  };
  for (; k + 4 * W <= width; k += 4 * W) shift(), tile<kSquare, R, 4, kList>(u + k, ld, rows, at);
  for (; k + 2 * W <= width; k += 2 * W) shift(), tile<kSquare, R, 2, kList>(u + k, ld, rows, at);
  for (; k < width; k += W) shift(), tile<kSquare, R, 1, kList>(u + k, ld, rows, at);
}

template <bool kSquare, int R>
inline void columns(const float* u, int64_t ld, const Plan::Row* rows, float* const* out, int64_t width) {
  if (rows->list)
    columns<kSquare, R, true>(u, ld, rows, out, width);
  else
    columns<kSquare, R, false>(u, ld, rows, out, width);
}

template <bool kSquare>
inline void columns(int64_t n, const float* u, int64_t ld, const Plan::Row* rows, float* const* out,
                    int64_t width) {
  switch (n) {
    case 1:
      return columns<kSquare, 1>(u, ld, rows, out, width);
    case 2:
      return columns<kSquare, 2>(u, ld, rows, out, width);
    case 3:
      return columns<kSquare, 3>(u, ld, rows, out, width);
#if defined(__AVX512F__)
    case 4:
      return columns<kSquare, 4>(u, ld, rows, out, width);
    case 5:
      return columns<kSquare, 5>(u, ld, rows, out, width);
    case 6:
      return columns<kSquare, 6>(u, ld, rows, out, width);
#endif
  }
}

}  // namespace
