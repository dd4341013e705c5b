// D[o, k] = sum_qn (sum_p d[q][n, o, p] u[n, p, k])^2: a dense layer's squares where a sample has many
// positions. u's columns may lie in several tensors.
//
// Work     per sample: its inputs as panels of a few columns, packed once for all factors, and each factor's
//          gradients as panels of four vectors of outputs. One times the other stays in registers over all
//          positions, is squared and added to D; no sample's gradient is ever stored. (A matrix product by
//          itself writes and reads each of them, as large as the weight.)
// Threads  each owns panels of outputs: sums have one order, the bits do not depend on their number.
#pragma once
#include <omp.h>

#include <cstring>
#include <memory>

#include "cpu/hessian.h"
#include "cpu/hessian_plan.h"
#include "cpu/rows_tile.h"

namespace {

using autoflip::StepsInput;
using autoflip::StepsShape;

// One sample's outputs [first, first + width) as words [p][kPanel], zeros behind the last.
inline void steps_outputs(const float* d, const StepsShape& s, int64_t first, int64_t width, float* to,
                          Floats) {
  for (int64_t p = 0; p < s.positions; ++p, to += kPanel) {
    const float* from = d + first * s.d_output + p * s.d_position;
    if (s.d_output == 1)
      std::memcpy(to, from, sizeof(float) * width);
    else
      for (int64_t o = 0; o < width; ++o) to[o] = from[o * s.d_output];
    std::memset(to + width, 0, sizeof(float) * (kPanel - width));
  }
}

#if defined(__AVX512BF16__)
// d is bfloat16 with outputs next to each other.
inline void steps_outputs(const uint16_t* d, const StepsShape& s, int64_t first, int64_t width, float* to,
                          Halves) {
  for (int64_t p = 0; p < s.positions; p += 2, to += kPanel) {
    const uint16_t* from = d + first + p * s.d_position;
    pair_up(from, p + 1 < s.positions ? from + s.d_position : nullptr, width, to);
    std::memset(to + width, 0, sizeof(float) * (kPanel - width));
  }
}
#endif

// One sample's columns as words [panel][p][kMaxRows]; `row` has room for two positions.
template <class E>
inline void steps_columns(const StepsInput* u, const StepsShape& s, int64_t n, int64_t panels, float* row,
                          float* to) {
  int64_t words = (s.positions + E::kValues - 1) / E::kValues, padded_columns = panels * kMaxRows;
  std::memset(row, 0, sizeof(float) * 2 * padded_columns);
  for (int64_t j = 0; j < words; ++j) {
    for (int64_t i = 0; i < E::kValues; ++i) {
      int64_t p = j * E::kValues + i, at = i * padded_columns;
      for (int64_t piece = 0; piece < s.inputs; at += u[piece].columns, ++piece)
        if (p < s.positions)
          std::memcpy(row + at, u[piece].values + n * u[piece].sample + p * u[piece].position,
                      sizeof(float) * u[piece].columns);
        else
          std::memset(row + at, 0, sizeof(float) * u[piece].columns);
    }
    E::words(row, padded_columns);
    for (int64_t i = 0; i < panels; ++i)
      std::memcpy(to + (i * words + j) * kMaxRows, row + i * kMaxRows, sizeof(float) * kMaxRows);
  }
}

// D += (panel of columns * panel of outputs)^2
template <class E, int V>
inline void steps_square(const float* outputs, const float* columns, int64_t words, float* D) {
  const float* rows[kMaxRows];
  for (int r = 0; r < kMaxRows; ++r) rows[r] = columns + r;
  rows_tile<E, kMaxRows, V>(outputs, rows, kMaxRows, words, [D](int r, int v, Vec sum) {
    float* to = D + r * kPanel + v * W;
    store(to, fma(sum, sum, load(to)));
  });
}

template <class E, class Value>
int64_t squares_of_steps(const Value* const* d, const StepsInput* u, float* out, const StepsShape& s,
                         int threads) {
  int64_t columns = 0;
  for (int64_t i = 0; i < s.inputs; ++i) columns += u[i].columns;
  int64_t tiles = (s.outputs + kPanel - 1) / kPanel, panels = (columns + kMaxRows - 1) / kMaxRows;
  int64_t words = (s.positions + E::kValues - 1) / E::kValues;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int64_t own = omp_get_thread_num(), all = omp_get_num_threads();
    int64_t first = tiles * own / all, count = tiles * (own + 1) / all - first;
    int64_t one = panels * kMaxRows;
    std::unique_ptr<float[]> memory(
        new float[padded(one * words) + padded(2 * one) + words * kPanel + count * one * kPanel + kAlign]);
    float *to_u = aligned(memory.get()), *row = to_u + padded(one * words), *to_d = row + padded(2 * one),
          *D = to_d + words * kPanel;
    std::memset(D, 0, sizeof(float) * count * one * kPanel);
    for (int64_t n = 0; n < s.samples && count > 0; ++n) {
      steps_columns<E>(u, s, n, panels, row, to_u);
      for (int64_t t = 0; t < count; ++t) {
        int64_t begin = (first + t) * kPanel, width = least(kPanel, s.outputs - begin);
        for (int64_t q = 0; q < s.factors; ++q) {
          steps_outputs(d[q] + n * s.d_sample, s, begin, width, to_d, E());
          for (int64_t i = 0; i < panels; ++i) {
            float* sums = D + (t * one + i * kMaxRows) * kPanel;
            if (width > W)
              steps_square<E, 4>(to_d, to_u + i * words * kMaxRows, words, sums);
            else
              steps_square<E, 1>(to_d, to_u + i * words * kMaxRows, words, sums);
          }
        }
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      int64_t begin = (first + t) * kPanel, width = least(kPanel, s.outputs - begin);
      for (int64_t o = 0; o < width; ++o)
        for (int64_t k = 0; k < columns; ++k) out[(begin + o) * columns + k] = D[(t * one + k) * kPanel + o];
    }
  }
  return s.factors * s.samples * s.outputs * s.positions * columns;
}

}  // namespace
