// D[o, k] = sum_n v[n, o] a[at[n], k]^2, v = d^2 or given squared: a dense layer's sum of squared gradients.
//
// Work     a tile of 64 columns at a time: 96 samples' inputs are squared into a packed tile that stays in
// the
//          first-level cache, and each output adds up the rows of the samples that are alive for it. A tile
//          of D has one owner and samples come in order: the bits do not depend on the number of threads.
// Zeros    behind ReLU about half of d is zero; those products are not made. A row by itself needs a load for
//          each multiply-add, which still runs at full speed where loads are from the first level.
// Rows     of d that follow each other and read one row of a are added up before they meet it.
// Bound    with few zeros a matrix product wins: then nothing is done and -1 returned.
#pragma once
#include <omp.h>

#include <cstring>
#include <memory>

#include "cpu/hessian_plan.h"

namespace {

constexpr int64_t kDenseColumns = 64, kDenseSamples = 96;

// out[0 .. V * W) += sum_j values[j] * u[list[j]]; two sets of sums, because one would wait for itself
template <int V>
inline void add_rows(const float* u, const float* values, const int32_t* list, int64_t count, float* out) {
  Vec even[V], odd[V];
  for (int v = 0; v < V; ++v) even[v] = load(out + v * W), odd[v] = splat(0.f);
  int64_t j = 0;
  for (; j + 2 <= count; j += 2) {
    const float *one = u + list[j], *two = u + list[j + 1];
    Vec a = splat(values[j]), b = splat(values[j + 1]);
    for (int v = 0; v < V; ++v) {
      even[v] = fma(a, load(one + v * W), even[v]);
      odd[v] = fma(b, load(two + v * W), odd[v]);
    }
  }
  if (j < count) {
    Vec a = splat(values[j]);
    for (int v = 0; v < V; ++v) even[v] = fma(a, load(u + list[j] + v * W), even[v]);
  }
  for (int v = 0; v < V; ++v) store(out + v * W, fma(splat(1.f), odd[v], even[v]));
}

// Gather what is not zero of kDenseSamples values, and where their samples' inputs lie.
inline int32_t alive(const float* column, float* values, int32_t* list) {
  int32_t count = 0;
#if defined(__AVX512F__)
  const __m512i step = _mm512_set1_epi32(W * kDenseColumns);
  __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                    _mm512_set1_epi32(kDenseColumns));
  for (int64_t n = 0; n < kDenseSamples; n += W, rows = _mm512_add_epi32(rows, step)) {
    Vec v = load(column + n);
    __mmask16 on = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    store(values + count, _mm512_maskz_compress_ps(on, v));
    _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(on, rows));
    count += __builtin_popcount(on);
  }
#else
  for (int64_t n = 0; n < kDenseSamples; ++n) {
    values[count] = column[n];
    list[count] = static_cast<int32_t>(n * kDenseColumns);
    count += column[n] != 0.f;
  }
#endif
  return count;
}

int64_t squared_matmul(const float* d, const float* a, const int64_t* at, float* out, int64_t N, int64_t O,
                       int64_t K, bool squared, float most_alive, int threads) {
  int64_t live = 0;
  for (int64_t i = 0; i < N * O; ++i) live += d[i] != 0.f;
  // groups of d's rows that read one row of a: group u's are first[u] to first[u + 1], it reads a's from[u]
  std::unique_ptr<int64_t[]> first(new int64_t[N + 1]), from(new int64_t[N + 1]);
  int64_t U = 0;
  for (int64_t n = 0; n < N; ++n) {
    int64_t row = at == nullptr ? n : at[n];
    if (n == 0 || at == nullptr || row != from[U - 1]) first[U] = n, from[U++] = row;
  }
  first[U] = N;
  if (static_cast<float>(live) > most_alive * static_cast<float>(N * O)) return -1;
  int64_t blocks = (U + kDenseSamples - 1) / kDenseSamples;
  // of block b and output o: values and rows from (b * O + o) * kDenseSamples on
  std::unique_ptr<float[]> values(new float[blocks * O * kDenseSamples + kAlign]);
  std::unique_ptr<int32_t[]> lists(new int32_t[blocks * O * kDenseSamples + kAlign]);
  std::unique_ptr<int32_t[]> counts(new int32_t[blocks * O + 1]);
  int64_t ran = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t rows = least(kDenseSamples, U - b * kDenseSamples);
    for (int64_t left = 0; left < O; left += kAlign) {
      alignas(64) float column[kAlign][kDenseSamples] = {};
      int64_t some = least(kAlign, O - left);
      for (int64_t u = 0; u < rows; ++u)
        for (int64_t n = first[b * kDenseSamples + u]; n < first[b * kDenseSamples + u + 1]; ++n) {
          const float* v = d + n * O + left;
          for (int64_t o = 0; o < some; ++o) column[o][u] += squared ? v[o] : v[o] * v[o];
        }
      for (int64_t o = 0; o < some; ++o) {
        int64_t i = b * O + left + o;
        counts[i] = alive(column[o], values.get() + i * kDenseSamples, lists.get() + i * kDenseSamples);
        ran += counts[i];
      }
    }
  }
  int64_t tiles = (K + kDenseColumns - 1) / kDenseColumns;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<float[]> memory(new float[(kDenseSamples + O) * kDenseColumns + kAlign]);
    float *u = aligned(memory.get()), *D = u + kDenseSamples * kDenseColumns;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t) {
      int64_t begin = t * kDenseColumns, width = least(kDenseColumns, K - begin);
      std::memset(D, 0, sizeof(float) * O * kDenseColumns);
      for (int64_t b = 0; b < blocks; ++b) {
        int64_t rows = least(kDenseSamples, U - b * kDenseSamples);
        for (int64_t n = 0; n < rows; ++n) {
          const float* x = a + from[b * kDenseSamples + n] * K + begin;
          float* to = u + n * kDenseColumns;
          for (int64_t k = 0; k < width; ++k) to[k] = x[k] * x[k];
          for (int64_t k = width; k < kDenseColumns; ++k) to[k] = 0.f;
        }
        for (int64_t o = 0; o < O; ++o) {
          int64_t i = b * O + o;
          const float* v = values.get() + i * kDenseSamples;
          const int32_t* list = lists.get() + i * kDenseSamples;
          for (int64_t k = 0; k < width; k += 4 * W)
            if (width - k > W)
              add_rows<4>(u + k, v, list, counts[i], D + o * kDenseColumns + k);
            else
              add_rows<1>(u + k, v, list, counts[i], D + o * kDenseColumns + k);
        }
      }
      for (int64_t o = 0; o < O; ++o)
        std::memcpy(out + o * K + begin, D + o * kDenseColumns, sizeof(float) * width);
    }
  }
  return ran * K;
}

}  // namespace
