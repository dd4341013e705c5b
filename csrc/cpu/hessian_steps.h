// D[o, k] = sum_qn (sum_p d[q][n, o, p] u[n, p, k])^2: a dense layer's squares where a sample has many
// positions. u's columns may lie in several tensors.
//
// Work     a few samples at a time: their inputs as panels of a few columns, packed once for all factors, and
//          each factor's gradients as panels of four vectors of outputs. One times the other stays in
//          registers over all positions, is squared and added to D; no sample's gradient is ever stored. (A
//          matrix product by itself writes and reads each of them, as large as the weight.) Those samples'
//          inputs and a panel of D share the second-level cache, so D comes by once for all of them.
// Threads  each owns panels of outputs: sums have one order, the bits do not depend on their number.
#pragma once
#include <omp.h>

#include <cstring>
#include <memory>

#include "cpu/amx_tile.h"
#include "cpu/hessian.h"
#include "cpu/hessian_plan.h"
#include "cpu/rows_tile.h"

namespace {

using autoflip::StepsInput;
using autoflip::StepsShape;

constexpr int64_t kStepsFloats = 1 << 17;  // inputs packed at once, 512 KiB

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

// How columns' words lie: [panel][word][rows of a panel].
template <class E>
struct StepsColumns {
  static constexpr int64_t kRows = kMaxRows;
  static int64_t room(int64_t words) { return words; }  // of a column, and of the panel that it meets
  static void put(const float* row, int64_t panels, int64_t words, int64_t j, float* to) {
    for (int64_t i = 0; i < panels; ++i)
      std::memcpy(to + (i * words + j) * kRows, row + i * kRows, sizeof(float) * kRows);
  }
  // panel p from word j on
  static const float* at(const float* from, int64_t words, int64_t p, int64_t j) {
    return from + (p * words + j) * kRows;
  }
};

#if defined(__AMX_BF16__)
// [column][word]: a tile's rows. Where a span begins and ends inside a tile, zeros follow the words.
template <>
struct StepsColumns<Tiles> {
  static constexpr int64_t kRows = Tiles::kRows;
  static int64_t room(int64_t words) { return Tiles::whole(words + Tiles::kWords - 1); }
  static void put(const float* row, int64_t panels, int64_t words, int64_t j, float* to) {
    for (int64_t c = 0, stride = room(words); c < panels * kRows; ++c) to[c * stride + j] = row[c];
  }
  static const float* at(const float* from, int64_t words, int64_t p, int64_t j) {
    return from + p * kRows * room(words) + j;
  }
};
#endif

// One sample's columns as words; `row` has room for two positions.
template <class E>
inline void steps_columns(const StepsInput* u, const StepsShape& s, int64_t n, int64_t panels, float* row,
                          float* to) {
  int64_t words = (s.positions + E::kValues - 1) / E::kValues,
          padded_columns = panels * StepsColumns<E>::kRows;
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
    StepsColumns<E>::put(row, panels, words, j, to);
  }
}

// Words of a panel that matter. Gradients fade on their way back through time: the outer ones, so small that
// all of them together are within the rounding of the largest, are left out; in float32 only zeros are.
struct StepsSpan {
  int64_t first, count;
};

template <class E>
inline StepsSpan steps_span(const float* panel, int64_t words, float* sizes) {
  float largest = 0.f;
  for (int64_t j = 0; j < words; ++j) {
    uint32_t most = 0;
    for (int64_t c = 0; c < kPanel; ++c) {
      uint32_t word;
      std::memcpy(&word, panel + j * kPanel + c, sizeof word);
      uint32_t size = E::size(word);
      most = size > most ? size : most;
    }
    if (most >= 0x7f800000u) return {0, words};  // Inf or NaN
    std::memcpy(sizes + j, &most, sizeof most);
    largest = sizes[j] > largest ? sizes[j] : largest;
  }
  int64_t first = 0, last = words;
  float left = E::kNegligible * largest;
  while (first < last && sizes[first] <= left) left -= sizes[first++];
  while (first < last && sizes[last - 1] <= left) left -= sizes[--last];
  return {first, last - first};
}

// D += (panel of columns * `width` columns of a panel of outputs)^2; a column has room for `stride` words
template <class E>
inline void steps_square(const float* outputs, const float* columns, int64_t, int64_t words, int64_t width,
                         float* D, E) {
  const float* rows[kMaxRows];
  for (int r = 0; r < kMaxRows; ++r) rows[r] = columns + r;
  auto square = [D](int r, int v, Vec sum) {
    float* to = D + r * kPanel + v * W;
    store(to, fma(sum, sum, load(to)));
  };
  if (width > W)
    rows_tile<E, kMaxRows, 4>(outputs, rows, kMaxRows, words, square);
  else
    rows_tile<E, kMaxRows, 1>(outputs, rows, kMaxRows, words, square);
}

#if defined(__AMX_BF16__)
inline void steps_square(const float* outputs, const float* columns, int64_t stride, int64_t words,
                         int64_t width, float* D, Tiles) {
  alignas(64) float sums[Tiles::kRows * Tiles::kColumns];
  for (int64_t c = 0; c < width; c += Tiles::kColumns, outputs += Tiles::kColumns, D += Tiles::kColumns) {
    tile_product<2, 2>(columns, stride, outputs, Tiles::whole(words), sums);
    for (int64_t r = 0; r < Tiles::kRows; ++r)
      for (int64_t v = 0; v < Tiles::kColumns; v += W) {
        Vec sum = load(sums + r * Tiles::kColumns + v);
        store(D + r * kPanel + v, fma(sum, sum, load(D + r * kPanel + v)));
      }
  }
}
#endif

template <class E, class Value>
int64_t squares_of_steps(const Value* const* d, const StepsInput* u, float* out, const StepsShape& s,
                         int threads) {
  int64_t columns = 0;
  for (int64_t i = 0; i < s.inputs; ++i) columns += u[i].columns;
  using Columns = StepsColumns<E>;
  int64_t tiles = (s.outputs + kPanel - 1) / kPanel, panels = (columns + Columns::kRows - 1) / Columns::kRows;
  int64_t words = (s.positions + E::kValues - 1) / E::kValues, room = Columns::room(words);
  int64_t one = panels * Columns::kRows, size = padded(one * room);  // a sample's columns, and their words
  int64_t together = least(s.samples, most(1, kStepsFloats / size));
  int64_t ran = 0;
#pragma omp parallel num_threads(threads) reduction(+ : ran) if (threads > 1)
  {
    typename E::Held held;
    int64_t own = omp_get_thread_num(), all = omp_get_num_threads();
    int64_t first = tiles * own / all, count = tiles * (own + 1) / all - first;
    int64_t floats = together * size + padded(2 * one) + room * kPanel + padded(words) + count * one * kPanel;
    std::unique_ptr<float[]> memory(new float[floats + kAlign]);
    float *to_u = aligned(memory.get()), *row = to_u + together * size, *to_d = row + padded(2 * one),
          *sizes = to_d + room * kPanel, *D = sizes + padded(words);
    std::memset(to_u, 0, sizeof(float) * floats);
    for (int64_t from = 0; from < s.samples && count > 0; from += together) {
      int64_t some = least(together, s.samples - from);
      for (int64_t n = 0; n < some; ++n) steps_columns<E>(u, s, from + n, panels, row, to_u + n * size);
      for (int64_t t = 0; t < count; ++t) {
        int64_t begin = (first + t) * kPanel, width = least(kPanel, s.outputs - begin);
        for (int64_t i = 0; i < some * s.factors; ++i) {
          int64_t n = i / s.factors;
          steps_outputs(d[i % s.factors] + (from + n) * s.d_sample, s, begin, width, to_d, E());
          StepsSpan span = steps_span<E>(to_d, words, sizes);
          ran += least(span.count * E::kValues, s.positions) * width * columns;
          for (int64_t p = 0; p < panels && span.count > 0; ++p) {
            const float* these = Columns::at(to_u + n * size, words, p, span.first);
            float* sums = D + (t * one + p * Columns::kRows) * kPanel;
            steps_square(to_d + span.first * kPanel, these, room, span.count, width, sums, E());
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
  return ran;
}

}  // namespace
