// See recurrent.h. Plain loops, written so that the compiler turns each into vectors: no branch, no call.
#pragma once
#include <cstdint>

#include "cpu/recurrent.h"
#include "cpu/squash.h"

namespace autoflip {
namespace {

void lstm_forward(float* gates, const float* back, const float* c0, int64_t n, int64_t h, float* c, float* y,
                  int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < n; ++row) {
    float* a = gates + row * 4 * h;
    const float *b = back + row * 4 * h, *before = c0 + row * h;
    float *cell = c + row * h, *out = y + row * h;
#pragma omp simd
    for (int64_t j = 0; j < h; ++j) {
      const float i = sigmoid(a[j] + b[j]), f = sigmoid(a[h + j] + b[h + j]);
      const float g = tanh_of(a[2 * h + j] + b[2 * h + j]), o = sigmoid(a[3 * h + j] + b[3 * h + j]);
      const float now = f * before[j] + i * g;
      a[j] = i;
      a[h + j] = f;
      a[2 * h + j] = g;
      a[3 * h + j] = o;
      cell[j] = now;
      out[j] = o * tanh_of(now);
    }
  }
}

void lstm_backward(const float* gates, const float* c0, const float* c, const float* dy, const float* dh,
                   int64_t n, int64_t h, float* dc, float* dgates, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < n; ++row) {
    const float *a = gates + row * 4 * h, *before = c0 + row * h, *cell = c + row * h;
    const float *top = dy + row * h, *later = dh + row * h;
    float *d = dgates + row * 4 * h, *carried = dc + row * h;
#pragma omp simd
    for (int64_t j = 0; j < h; ++j) {
      const float i = a[j], f = a[h + j], g = a[2 * h + j], o = a[3 * h + j];
      const float t = tanh_of(cell[j]), dout = top[j] + later[j];
      const float dcell = carried[j] + dout * o * (1.0f - t * t);
      d[j] = dcell * g * i * (1.0f - i);
      d[h + j] = dcell * before[j] * f * (1.0f - f);
      d[2 * h + j] = dcell * i * (1.0f - g * g);
      d[3 * h + j] = dout * t * o * (1.0f - o);
      carried[j] = dcell * f;
    }
  }
}

void gru_forward(float* gates, const float* back, const float* h0, int64_t n, int64_t h, float* back_n,
                 float* y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < n; ++row) {
    float *a = gates + row * 3 * h, *kept = back_n + row * h, *out = y + row * h;
    const float *b = back + row * 3 * h, *before = h0 + row * h;
#pragma omp simd
    for (int64_t j = 0; j < h; ++j) {
      const float r = sigmoid(a[j] + b[j]), z = sigmoid(a[h + j] + b[h + j]);
      const float candidate = tanh_of(a[2 * h + j] + r * b[2 * h + j]);
      kept[j] = b[2 * h + j];
      a[j] = r;
      a[h + j] = z;
      a[2 * h + j] = candidate;
      out[j] = (1.0f - z) * candidate + z * before[j];
    }
  }
}

void gru_backward(const float* gates, const float* back_n, const float* h0, const float* dy, int64_t n,
                  int64_t h, float* dh, float* dgates, float* dback, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < n; ++row) {
    const float *a = gates + row * 3 * h, *kept = back_n + row * h, *before = h0 + row * h,
                *top = dy + row * h;
    float *d = dgates + row * 3 * h, *db = dback + row * 3 * h, *carried = dh + row * h;
#pragma omp simd
    for (int64_t j = 0; j < h; ++j) {
      const float r = a[j], z = a[h + j], candidate = a[2 * h + j], dout = top[j] + carried[j];
      const float dn = dout * (1.0f - z) * (1.0f - candidate * candidate);
      const float dr = dn * kept[j] * r * (1.0f - r), dz = dout * (before[j] - candidate) * z * (1.0f - z);
      d[j] = db[j] = dr;
      d[h + j] = db[h + j] = dz;
      d[2 * h + j] = dn;
      db[2 * h + j] = dn * r;
      carried[j] = dout * z;
    }
  }
}

}  // namespace
}  // namespace autoflip
