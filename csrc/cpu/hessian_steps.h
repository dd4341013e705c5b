// D[o, k] = sum_qn (sum_p d[q][n, o, p] u[n, p, k])^2: a dense layer's squares where a sample has many
// positions.
//
// Work     per sample: its inputs as tiles of four vectors of columns, its gradients as panels of a few
// outputs,
//          both packed, so that tensors may lie time first. A panel times a tile stays in registers over all
//          positions, is squared and added to D; no sample's gradient is ever stored. (A matrix product by
//          itself writes and reads each of them, as large as the weight.)
// Threads  each owns a range of outputs: sums have one order, the bits do not depend on their number.
#pragma once
#include <omp.h>

#include <cstring>
#include <memory>

#include "cpu/hessian.h"
#include "cpu/hessian_plan.h"
#include "cpu/hessian_simd.h"

namespace {

using autoflip::StepsShape;

constexpr int64_t kStepColumns = 4 * W;

// D_r += (sum_p d[p, r] u[p])^2 for kMaxRows outputs and V vectors
template <int V>
inline void steps_tile(const float* u, const float* d, int64_t P, float* D, int64_t ld) {
  Vec sum[kMaxRows][V];
  for (int r = 0; r < kMaxRows; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = splat(0.f);
  for (int64_t p = 0; p < P; ++p) {
    Vec b[V];
    for (int v = 0; v < V; ++v) b[v] = load(u + p * kStepColumns + v * W);
    for (int r = 0; r < kMaxRows; ++r) {
      Vec a = splat(d[p * kMaxRows + r]);
      for (int v = 0; v < V; ++v) sum[r][v] = fma(a, b[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kMaxRows; ++r)
    for (int v = 0; v < V; ++v) {
      float* to = D + r * ld + v * W;
      store(to, fma(sum[r][v], sum[r][v], load(to)));
    }
}

// d's outputs [begin, end) of one sample as panels [panel][p][kMaxRows], zeros behind the last
inline void steps_panels(const float* d, const StepsShape& s, int64_t begin, int64_t end, float* to) {
  for (int64_t first = begin; first < end; first += kMaxRows, to += s.positions * kMaxRows) {
    int64_t some = least(kMaxRows, end - first);
    for (int64_t p = 0; p < s.positions; ++p) {
      const float* from = d + first * s.d_output + p * s.d_position;
      for (int64_t r = 0; r < kMaxRows; ++r) to[p * kMaxRows + r] = r < some ? from[r * s.d_output] : 0.f;
    }
  }
}

inline void steps_columns(const float* u, const StepsShape& s, float* to) {
  for (int64_t first = 0; first < s.columns; first += kStepColumns) {
    int64_t width = least(kStepColumns, s.columns - first);
    for (int64_t p = 0; p < s.positions; ++p, to += kStepColumns) {
      std::memcpy(to, u + p * s.u_position + first, sizeof(float) * width);
      std::memset(to + width, 0, sizeof(float) * (kStepColumns - width));
    }
  }
}

int64_t sequence_squares(const float* const* d, const float* u, float* out, const StepsShape& s,
                         int threads) {
  int64_t tiles = (s.columns + kStepColumns - 1) / kStepColumns, ld = tiles * kStepColumns;
  int64_t panels = (s.outputs + kMaxRows - 1) / kMaxRows;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int64_t own = omp_get_thread_num(), all = omp_get_num_threads();
    int64_t first = panels * own / all, count = panels * (own + 1) / all - first;
    int64_t begin = first * kMaxRows, end = least(s.outputs, (first + count) * kMaxRows);
    int64_t d_floats = count * s.positions * kMaxRows, u_floats = s.positions * ld;
    d_floats = (d_floats + kAlign - 1) / kAlign * kAlign;
    std::unique_ptr<float[]> memory(new float[d_floats + u_floats + count * kMaxRows * ld + kAlign]);
    float *to_u = aligned(memory.get()), *to_d = to_u + u_floats, *D = to_d + d_floats;
    std::memset(D, 0, sizeof(float) * count * kMaxRows * ld);
    for (int64_t n = 0; n < s.samples && count > 0; ++n) {
      steps_columns(u + n * s.u_sample, s, to_u);
      for (int64_t q = 0; q < s.factors; ++q) {
        steps_panels(d[q] + n * s.d_sample, s, begin, end, to_d);
        for (int64_t t = 0; t < tiles; ++t)
          for (int64_t i = 0; i < count; ++i) {
            const float *tile = to_u + t * s.positions * kStepColumns,
                        *panel = to_d + i * s.positions * kMaxRows;
            float* sums = D + i * kMaxRows * ld + t * kStepColumns;
            if (s.columns - t * kStepColumns > W)
              steps_tile<4>(tile, panel, s.positions, sums, ld);
            else
              steps_tile<1>(tile, panel, s.positions, sums, ld);
          }
      }
    }
    for (int64_t o = begin; o < end; ++o)
      std::memcpy(out + o * s.columns, D + (o - begin) * ld, sizeof(float) * s.columns);
  }
  return s.factors * s.samples * s.outputs * s.positions * s.columns;
}

}  // namespace
