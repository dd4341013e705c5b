// See lstm_walk.h.
//
// Work     the weight is packed once for all steps. A block of rows (samples of one or several factors) walks
//          through all steps: their gates' gradients, then one product with the hidden and the input weight
//          side by side while they are in the cache.
// Threads  each has its own blocks; a row's bits depend neither on their number nor on its block.
#pragma once
#include <omp.h>

#include <cstring>
#include <memory>

#include "cpu/amx_tile.h"
#include "cpu/hessian_plan.h"
#include "cpu/lstm_walk.h"
#include "cpu/rows_tile.h"
#include "cpu/squash.h"

namespace {

using autoflip::LstmOutputs;
using autoflip::LstmShape;
using autoflip::RecurrentCell;

constexpr int64_t kBlockRows = 22 * kMaxRows;

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Words [panel][words][kPanel] of value(inner, column), zeros behind the last column.
template <class Value>
void pack(int64_t inner, int64_t columns, Value value, float* to, Floats) {
  for (int64_t first = 0; first < columns; first += kPanel)
    for (int64_t i = 0; i < inner; ++i, to += kPanel)
      for (int64_t c = 0; c < kPanel; ++c) to[c] = first + c < columns ? value(i, first + c) : 0.f;
}

#if defined(__AVX512BF16__)
template <class Value>
void pack(int64_t inner, int64_t columns, Value value, float* to, Halves) {
  for (int64_t first = 0; first < columns; first += kPanel)
    for (int64_t i = 0; i < inner; i += 2, to += kPanel) {
      float rows[2 * kPanel];
      for (int64_t c = 0; c < kPanel; ++c)
        for (int64_t j = 0; j < 2; ++j)
          rows[j * kPanel + c] = first + c < columns ? value(i + j, first + c) : 0.f;
      Halves::words(rows, kPanel);
      std::memcpy(to, rows, sizeof(float) * kPanel);
    }
}
#endif

// out[r] = row r * a packed panel + bias (of kPanel columns), `width` columns of it.
template <class E, int R>
inline void panel_product(const float* panel, int64_t words, const float* const* rows, const float* bias,
                          int64_t width, float* const* out) {
  alignas(64) float sums[R][kPanel];
  auto keep = [&sums, bias](int r, int v, Vec sum) { store(sums[r] + v * W, sum + load(bias + v * W)); };
  if (width > W)
    rows_tile<E, R, 4>(panel, rows, 1, words, keep);
  else
    rows_tile<E, R, 1>(panel, rows, 1, words, keep);
  for (int r = 0; r < R; ++r) std::memcpy(out[r], sums[r], sizeof(float) * width);
}

template <class E>
constexpr decltype(&panel_product<E, 1>) kPanelProducts[] = {
    panel_product<E, 1>, panel_product<E, 2>, panel_product<E, 3>,
#if defined(__AVX512F__)
    panel_product<E, 4>, panel_product<E, 5>, panel_product<E, 6>,
#endif
};
static_assert(sizeof(kPanelProducts<Floats>) == kMaxRows * sizeof(void*), "one for each number of rows");

// out(r) + column = row(r) * packed + bias (whole panels; null: none), for `count` rows in even groups and
// all columns.
template <class E, class RowOf, class OutOf>
inline void product(const float* packed, int64_t words, int64_t columns, const float* bias, int64_t count,
                    RowOf row, OutOf out, E) {
  alignas(64) static const float kNone[kPanel] = {};
  int64_t groups = (count + kMaxRows - 1) / kMaxRows;
  for (int64_t first = 0; first < columns; first += kPanel, packed += words * kPanel)
    for (int64_t g = 0; g < groups; ++g) {
      int64_t begin = g * count / groups, some = (g + 1) * count / groups - begin;
      const float* rows[kMaxRows];
      float* to[kMaxRows];
      for (int64_t r = 0; r < some; ++r) rows[r] = row(begin + r), to[r] = out(begin + r) + first;
      kPanelProducts<E>[some - 1](packed, words, rows, bias == nullptr ? kNone : bias + first,
                                  least(kPanel, columns - first), to);
    }
}

#if defined(__AMX_BF16__)
template <class RowOf, class OutOf>
inline void product(const float* packed, int64_t words, int64_t columns, const float*, int64_t count,
                    RowOf row, OutOf out, Tiles) {
  alignas(64) float sums[Tiles::kRows * Tiles::kColumns];
  for (int64_t first = 0; first < columns; first += Tiles::kColumns) {
    const float* panel = packed + first / kPanel * words * kPanel + first % kPanel;
    int64_t width = least(Tiles::kColumns, columns - first);
    for (int64_t begin = 0; begin < count; begin += Tiles::kRows) {
      int64_t some = least(Tiles::kRows, count - begin);
      tile_product(row(begin), words, some, panel, width, words, sums);
      for (int64_t r = 0; r < some; ++r)
        std::memcpy(out(begin + r) + first, sums + r * Tiles::kColumns, sizeof(float) * width);
    }
  }
}
#endif

template <class E>
void lstm_forward(const LstmShape& s, const RecurrentCell& cell, const float* w, const float* bias,
                  const float* h0, float* gates, float* cells, float* y, int threads) {
  int64_t H = s.hidden, N = s.samples;
  int64_t wide = panels_of(4 * H) * kPanel;
  std::unique_ptr<float[]> memory(new float[wide * H + wide + kAlign]);
  float *packed = aligned(memory.get()), *all_biases = packed + wide * H;
  for (int64_t i = 0; i < wide; ++i) all_biases[i] = i < 4 * H ? bias[i] : 0.f;
  pack(H, 4 * H, [&](int64_t i, int64_t c) { return w[c * H + i]; }, packed, E());
  int64_t blocks = most((N + kBlockRows - 1) / kBlockRows, least(threads, N));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<float[]> place(new float[((N + blocks - 1) / blocks) * 4 * H]);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      int64_t begin = b * N / blocks, count = (b + 1) * N / blocks - begin;
      const float* before = h0 + begin * H;
      for (int64_t t = 0; t < s.steps; ++t) {
        product(
            packed, H, 4 * H, all_biases, count, [&](int64_t r) { return before + r * H; },
            [&](int64_t r) { return place.get() + r * 4 * H; }, E());
        int64_t at = t * N + begin;
        cell.lstm_forward(gates + at * 4 * H, place.get(), cells + at * H, count, H, cells + (at + N) * H,
                          y + at * H, 1);
        before = y + at * H;
      }
    }
  }
}

// A row's gradients at the gates where they stay, and the words of them that a product reads.
inline const float* kept(const float* d, float* to, int64_t count) {
  std::memcpy(to, d, sizeof(float) * count);
  return to;
}

#if defined(__AVX512BF16__)
inline const float* kept(const float* d, uint16_t* to, int64_t count) {
  round_to_bf16(d, count, to);
  return reinterpret_cast<const float*>(to);
}
#endif

// What a sample's gates and cells do to all factors' gradients: six rows of `h`.
inline void slopes_of(const float* gates, const float* c0, const float* c, int64_t h, float* slopes) {
#pragma omp simd
  for (int64_t j = 0; j < h; ++j) {
    const float i = gates[j], f = gates[h + j], g = gates[2 * h + j], o = gates[3 * h + j];
    const float t = autoflip::tanh_of(c[j]);
    slopes[j] = g * i * (1.0f - i);
    slopes[h + j] = c0[j] * f * (1.0f - f);
    slopes[2 * h + j] = i * (1.0f - g * g);
    slopes[3 * h + j] = t * o * (1.0f - o);
    slopes[4 * h + j] = o * (1.0f - t * t);
    slopes[5 * h + j] = f;
  }
}

// dh: what the later step hands back; dc: in: that of the cell behind the step, out: of that before it.
inline void gates_gradient(const float* slopes, const float* dy, const float* dh, int64_t h, float* dc,
                           float* d) {
#pragma omp simd
  for (int64_t j = 0; j < h; ++j) {
    const float dout = dy[j] + dh[j], dcell = dc[j] + dout * slopes[4 * h + j];
    d[j] = dcell * slopes[j];
    d[h + j] = dcell * slopes[h + j];
    d[2 * h + j] = dcell * slopes[2 * h + j];
    d[3 * h + j] = dout * slopes[3 * h + j];
    dc[j] = dcell * slopes[5 * h + j];
  }
}

template <class E, class Value>
void lstm_back(const LstmShape& s, const float* w_hh, const float* w_ih, const float* gates,
               const float* cells, const LstmOutputs& outputs, float* dh, float* dc, void* const* d,
               float* const* dx, int threads) {
  int64_t H = s.hidden, N = s.samples, Q = s.factors, K = w_ih == nullptr ? 0 : s.inputs, G = 4 * H;
  int64_t words = E::whole(G / E::kValues), inner = words * E::kValues;
  std::unique_ptr<float[]> memory(new float[(panels_of(H) + panels_of(K)) * words * kPanel + kAlign]);
  float *hidden = aligned(memory.get()), *input = hidden + panels_of(H) * words * kPanel;
  pack(inner, H, [&](int64_t i, int64_t c) { return i < G ? w_hh[i * H + c] : 0.f; }, hidden, E());
  pack(inner, K, [&](int64_t i, int64_t c) { return i < G ? w_ih[i * K + c] : 0.f; }, input, E());
  int64_t blocks = least(N, most((N * Q + kBlockRows - 1) / kBlockRows, threads)),
          most_samples = (N + blocks - 1) / blocks;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    typename E::Held held;
    std::unique_ptr<float[]> place(new float[G + 6 * H]);
    float* slopes = place.get() + G;
    std::unique_ptr<const float*[]> rows(new const float*[most_samples * Q]);
    int64_t in_tiles = E::kTiled ? padded(most_samples * Q) * words : 0;
    std::unique_ptr<float[]> tiles(new float[in_tiles]());
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      int64_t begin = b * N / blocks, count = (b + 1) * N / blocks - begin;
      for (int64_t t = s.steps - 1; t >= 0; --t) {
        for (int64_t n = begin; n < begin + count; ++n) {
          int64_t at = t * N + n;
          slopes_of(gates + at * G, cells + at * H, cells + (at + N) * H, H, slopes);
          for (int64_t q = 0; q < Q; ++q) {
            gates_gradient(slopes, outputs.dy[q] + t * outputs.step + n * outputs.sample,
                           dh + (q * N + n) * H, H, dc + (q * N + n) * H, place.get());
            int64_t r = (n - begin) * Q + q;
            rows[r] = kept(place.get(), static_cast<Value*>(d[q]) + at * G, G);
            if constexpr (E::kTiled)
              rows[r] = static_cast<float*>(std::memcpy(tiles.get() + r * words, rows[r], sizeof(Value) * G));
          }
        }
        auto row = [&](int64_t r) { return rows[r]; };
        product(
            hidden, words, H, nullptr, count * Q, row,
            [&](int64_t r) { return dh + (r % Q * N + begin + r / Q) * H; }, E());
        if (K)
          product(
              input, words, K, nullptr, count * Q, row,
              [&](int64_t r) { return dx[r % Q] + (t * N + begin + r / Q) * K; }, E());
      }
    }
  }
}

}  // namespace
