// v[q][n, k] = (sum_o d[q][n, o] w[o, k]) * (gate[at[n], k] > 0): a dense layer's pull of Q factors.
//
// Work     a tile of columns of w at a time, which stays in the second-level cache; for each sample its
// factors'
//          sums stand in registers while the rows of w go by, so each row is loaded once for all of them.
// Zeros    a row whose factors are all zero, as behind a ReLU, is not read: factors of one sample share them.
//          A matrix product of all samples could skip none.
// Threads  tiles have one owner each, sums have one order: the bits do not depend on the number of threads.
#pragma once
#include <omp.h>

#include <cstring>
#include <memory>

#include "cpu/hessian_plan.h"
#include "cpu/hessian_simd.h"

namespace {

constexpr int64_t kPullColumns = 4 * W;

// Sums of Q factors over the `count` rows of u that the list names, V vectors wide.
template <int Q, int V>
inline void pull_tile(const float* u, const float* const* d, const int32_t* list, int64_t count, float* out) {
  const float* values[Q];
  for (int q = 0; q < Q; ++q) values[q] = d[q];
  Vec sum[Q][V];
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) sum[q][v] = splat(0.f);
  for (int64_t j = 0; j < count; ++j) {
    int64_t o = list[j];
    Vec b[V];
    for (int v = 0; v < V; ++v) b[v] = load(u + o * kPullColumns + v * W);
    for (int q = 0; q < Q; ++q) {
      Vec a = splat(values[q][o]);
      for (int v = 0; v < V; ++v) sum[q][v] = fma(a, b[v], sum[q][v]);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) store(out + q * kPullColumns + v * W, sum[q][v]);
}

template <int V>
inline void pull_tile(int64_t factors, const float* u, const float* const* d, const int32_t* list,
                      int64_t count, float* out) {
  switch (factors) {
    case 1:
      return pull_tile<1, V>(u, d, list, count, out);
    case 2:
      return pull_tile<2, V>(u, d, list, count, out);
    case 3:
      return pull_tile<3, V>(u, d, list, count, out);
#if defined(__AVX512F__)
    case 4:
      return pull_tile<4, V>(u, d, list, count, out);
    case 5:
      return pull_tile<5, V>(u, d, list, count, out);
    case 6:
      return pull_tile<6, V>(u, d, list, count, out);
#endif
  }
}

// The factors go by in even groups of up to kMaxRows: group g has those from begin(g) on.
struct PullGroups {
  int64_t factors, groups;
  int64_t begin(int64_t g) const { return g * factors / groups; }
};

// Of sample n from n * O on: the outputs that are not zero in all its factors. Returns how many there are in
// all.
inline int64_t pull_lists(const float* const* d, int64_t Q, int64_t N, int64_t O, int32_t* lists,
                          int64_t* counts) {
  std::unique_ptr<int32_t[]> memory(new int32_t[O + 1]);
  int32_t* __restrict alive = memory.get();
  int64_t live = 0;
  for (int64_t n = 0; n < N; ++n) {
    std::memset(alive, 0, sizeof(int32_t) * O);
    for (int64_t q = 0; q < Q; ++q) {
      const float* row = d[q] + n * O;
      for (int64_t o = 0; o < O; ++o) alive[o] |= row[o] != 0.f ? 1 : 0;
    }
    int32_t* list = lists + n * O;
    int64_t count = 0;
    for (int64_t o = 0; o < O; ++o) {
      list[count] = static_cast<int32_t>(o);
      count += alive[o];
    }
    counts[n] = count, live += count;
  }
  return live;
}

// What ReLU left of v, or of its squares: for one factor, whose product is a matrix product.
void gate_rows(float* v, const float* gate, const int64_t* at, int64_t N, int64_t K, bool squared) {
  for (int64_t n = 0; n < N; ++n) {
    float* __restrict to = v + n * K;
    const float* __restrict open = gate == nullptr ? nullptr : gate + (at == nullptr ? n : at[n]) * K;
    if (squared)
      for (int64_t k = 0; k < K; ++k) to[k] *= to[k];
    if (open != nullptr)
      for (int64_t k = 0; k < K; ++k) to[k] = open[k] > 0.f ? to[k] : 0.f;
  }
}

int64_t dense_pull(const float* const* d, const float* w, const float* gate, const int64_t* at, float* out,
                   int64_t Q, int64_t N, int64_t O, int64_t K, int threads) {
  PullGroups parts{Q, (Q + kMaxRows - 1) / kMaxRows};
  std::unique_ptr<int32_t[]> lists(new int32_t[N * O + 1]);
  std::unique_ptr<int64_t[]> counts(new int64_t[N + 1]);
  int64_t live = pull_lists(d, Q, N, O, lists.get(), counts.get());
  int64_t tiles = (K + kPullColumns - 1) / kPullColumns;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<float[]> memory(new float[(O + kMaxRows) * kPullColumns + kAlign]);
    float *u = aligned(memory.get()), *sums = u + O * kPullColumns;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t) {
      int64_t begin = t * kPullColumns, width = least(kPullColumns, K - begin);
      for (int64_t o = 0; o < O; ++o) {
        std::memcpy(u + o * kPullColumns, w + o * K + begin, sizeof(float) * width);
        std::memset(u + o * kPullColumns + width, 0, sizeof(float) * (kPullColumns - width));
      }
      for (int64_t n = 0; n < N; ++n) {
        const float* open = gate == nullptr ? nullptr : gate + (at == nullptr ? n : at[n]) * K + begin;
        for (int64_t g = 0; g < parts.groups; ++g) {
          int64_t first = parts.begin(g), some = parts.begin(g + 1) - first;
          const float* rows[kMaxRows];
          for (int64_t q = 0; q < some; ++q) rows[q] = d[first + q] + n * O;
          if (width > W)
            pull_tile<4>(some, u, rows, lists.get() + n * O, counts[n], sums);
          else
            pull_tile<1>(some, u, rows, lists.get() + n * O, counts[n], sums);
          for (int64_t q = 0; q < some; ++q) {
            const float* sum = sums + q * kPullColumns;
            float* to = out + ((first + q) * N + n) * K + begin;
            for (int64_t k = 0; k < width; ++k) to[k] = open == nullptr || open[k] > 0.f ? sum[k] : 0.f;
          }
        }
      }
    }
  }
  return live * Q * K;
}

}  // namespace
