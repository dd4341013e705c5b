// out[n, k] = sum_q (sum_o d[q][n, o] w[o, k])^2 * (gate[at[n], k] > 0): a dense layer's pull of Q factors,
// of which only the sum of squares is kept; and the choice between the two pulls.
//
// Work     a panel of w's columns at a time, which stays in the second-level cache; tiles as in
// hessian_pull.h. Zeros    rows as there. Of columns, vectors that ReLU has closed for a sample are not made:
// columns are sorted
//          by how many samples have them open, since many units are closed for nearly all. (MLP
//          784-200-200-10, trained: 58 % of the values are open, 69 % of the sorted vectors, all of the
//          unsorted.)
// Threads  each has its own samples, sums have one order: the bits do not depend on the number of threads.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/hessian_alive.h"
#include "cpu/hessian_pull.h"

namespace {

constexpr int64_t kPullPanel = 1 << 17;  // floats of w, 512 KiB

// Sums of Q factors over the `count` rows of u, `ld` floats apart, that the list names; of V vectors of them,
// whose places are `vectors`. A factor's values at those rows are `stride` apart. Their squares are added to
// out.
template <int Q, int V>
void pull_tile_squares(const float* u, int64_t ld, const int32_t* vectors, const float* values,
                       int64_t stride, const int32_t* list, int64_t count, Vec* out) {
  const float* from[V];
  for (int v = 0; v < V; ++v) from[v] = u + vectors[v] * W;
  Vec sum[Q][V];
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) sum[q][v] = splat(0.f);
  for (int64_t j = 0; j < count; ++j, ++values) {
    int64_t row = list[j] * ld;
    Vec b[V];
    for (int v = 0; v < V; ++v) b[v] = load(from[v] + row);
    for (int q = 0; q < Q; ++q) {
      Vec a = splat(values[q * stride]);
      for (int v = 0; v < V; ++v) sum[q][v] = fma(a, b[v], sum[q][v]);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) out[v] = fma(sum[q][v], sum[q][v], out[v]);
}

constexpr int64_t kSquaresVectors = 4;
using PullTile = decltype(&pull_tile_squares<1, 1>);
template <int Q>
constexpr PullTile kPullTile[] = {pull_tile_squares<Q, 1>, pull_tile_squares<Q, 2>, pull_tile_squares<Q, 3>,
                                  pull_tile_squares<Q, 4>};
constexpr const PullTile* kPullTiles[] = {
    // [factors - 1][vectors - 1]
    kPullTile<1>, kPullTile<2>, kPullTile<3>,
#if defined(__AVX512F__)
    kPullTile<4>, kPullTile<5>, kPullTile<6>,
#endif
};
static_assert(sizeof(kPullTiles) == kMaxRows * sizeof(void*), "one for each number of factors");

// Columns, those that most samples have open first; as they are without a gate.
inline std::unique_ptr<int32_t[]> pull_order(const float* gate, const int64_t* at, int64_t N, int64_t K) {
  std::unique_ptr<int32_t[]> order(new int32_t[K + 1]), open(new int32_t[K + 1]());
  for (int64_t n = 0; n < N && gate != nullptr; ++n) {
    const float* row = gate + (at == nullptr ? n : at[n]) * K;
    for (int64_t k = 0; k < K; ++k) open[k] += row[k] > 0.f;
  }
  std::iota(order.get(), order.get() + K, 0);
  std::stable_sort(order.get(), order.get() + K, [&](int32_t a, int32_t b) { return open[a] > open[b]; });
  return order;
}

inline bool pull_any(const float* open) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(load(open), _mm512_setzero_ps(), _CMP_GT_OQ) != 0;
#else
  bool any = false;
  for (int64_t k = 0; k < W; ++k) any |= open[k] > 0.f;
  return any;
#endif
}

int64_t dense_pull_squares(const float* const* d, const float* w, const float* gate, const int64_t* at,
                           float* out, int64_t Q, int64_t N, int64_t O, int64_t K, int threads) {
  PullGroups parts{Q, (Q + kMaxRows - 1) / kMaxRows};
  int64_t all = (K + W - 1) / W;  // vectors
  int64_t panels = most(least((all * W * O + kPullPanel - 1) / kPullPanel, all / kSquaresVectors), 1);
  int64_t ld = (all + panels - 1) / panels * W, stride = padded(O) + kAlign, live = 0;
  std::unique_ptr<int32_t[]> order = pull_order(gate, at, N, K);
  std::unique_ptr<float[]> memory(new float[ld * O + kAlign]);
  float* u = aligned(memory.get());
#pragma omp parallel num_threads(threads) reduction(+ : live) if (threads > 1)
  {
    std::unique_ptr<float[]> open(new float[ld]), values(new float[Q * stride]);
    std::unique_ptr<int32_t[]> vectors(new int32_t[ld / W]), list(new int32_t[stride]);
    std::vector<const float*> factors(Q);
    std::vector<float*> to_values(Q);
    for (int64_t q = 0; q < Q; ++q) to_values[q] = values.get() + q * stride;
    for (int64_t p = 0; p < panels; ++p) {
      int64_t begin = p * all / panels * W, width = least((p + 1) * all / panels * W, K) - begin;
      const int32_t* columns = order.get() + begin;
#pragma omp for schedule(static)
      for (int64_t o = 0; o < O; ++o) {
        for (int64_t k = 0; k < width; ++k) u[o * ld + k] = w[o * K + columns[k]];
        std::memset(u + o * ld + width, 0, sizeof(float) * (ld - width));
      }
      for (int64_t k = 0; k < ld; ++k) open[k] = k < width ? 1.f : 0.f;
#pragma omp for schedule(static)
      for (int64_t n = 0; n < N; ++n) {
        const float* row = gate == nullptr ? nullptr : gate + (at == nullptr ? n : at[n]) * K;
        for (int64_t k = 0; k < width && row != nullptr; ++k) open[k] = row[columns[k]];
        int64_t some = 0, made = 0;
        for (int64_t v = 0; v * W < width; ++v)
          if (pull_any(open.get() + v * W)) {
            vectors[some++] = static_cast<int32_t>(v);
            made += least(W, width - v * W);
          }
        float* to = out + n * K;
        if (p == 0) std::memset(to, 0, sizeof(float) * K);
        for (int64_t q = 0; q < Q; ++q) factors[q] = d[q] + n * O;
        int64_t count = gather_alive(factors.data(), Q, O, list.get(), to_values.data());
        live += count * made;
        int64_t tiles = (some + kSquaresVectors - 1) / kSquaresVectors;
        for (int64_t t = 0; t < tiles; ++t) {
          const int32_t* these = vectors.get() + t * some / tiles;
          int64_t V = (t + 1) * some / tiles - t * some / tiles;
          alignas(64) Vec sums[kSquaresVectors];
          for (int64_t v = 0; v < V; ++v) sums[v] = splat(0.f);
          for (int64_t g = 0; g < parts.groups; ++g) {
            int64_t first = parts.begin(g), here = parts.begin(g + 1) - first;
            kPullTiles[here - 1][V - 1](u, ld, these, values.get() + first * stride, stride, list.get(),
                                        count, sums);
          }
          alignas(64) float squares[kSquaresVectors * W];
          for (int64_t v = 0; v < V; ++v) store(squares + v * W, sums[v]);
          for (int64_t v = 0; v < V; ++v)
            for (int64_t i = 0, k = these[v] * W; i < least(W, width - these[v] * W); ++i, ++k)
              to[columns[k]] = open[k] > 0.f ? squares[v * W + i] : 0.f;
        }
      }
    }
  }
  return live * Q;
}

int64_t dense_pull_back(const float* const* d, const float* w, const float* gate, const int64_t* at,
                        float* out, int64_t Q, int64_t N, int64_t O, int64_t K, bool squared, int threads) {
  auto pull = squared ? dense_pull_squares : dense_pull;
  return pull(d, w, gate, at, out, Q, N, O, K, threads);
}

}  // namespace
