// dx[q][n, c, i, j]: a convolution's gradient at its input from few values of its gradient at the output.
//
// Work     a sample at a time. Values are sorted by position; a position's patch gradient is the sum of the
// filters
//          of the outputs that are alive there, in registers, one load of a filter for all factors of a team.
//          Each patch is added once to a padded channels-last image, which is turned into NCHW at the end.
// Zeros    never meet: under ReLU and 2x2 max-pooling an eighth of a dense product remains.
// Bound    CNN's second layer, B 64, five factors: 10 ms where five dense products take 20 (AVX-512, one
// thread).
#pragma once
#include <omp.h>

#include <cstring>

#include "cpu/hessian_tile.h"

namespace {

using autoflip::SquaresShape;

// One thread's memory: images and patches of a team, and the live values by position.
struct Back {
  int64_t ld, image,
      values;  // floats of a filter, of an image (with room for whole vectors), of a factor's values
  int64_t positions, outputs, factors;

  explicit Back(const SquaresShape& c)
      : ld(padded(c.columns())),
        image(padded(c.channels / c.groups * (c.height + 2 * c.pad_h) * (c.width + 2 * c.pad_w)) + kAlign),
        values(padded(c.outputs / c.groups * c.entries)),
        positions(c.positions()),
        outputs(c.outputs),
        factors(least(c.factors, kMaxRows)) {}
  int64_t filter_floats() const { return outputs * ld; }
  int64_t thread_floats() const {
    return factors * (image + ld + values) + values + 2 * padded(positions + 1);
  }
};

int64_t pull_back_scratch(const SquaresShape& c, int threads) {
  Back b(c);
  return b.filter_floats() + b.thread_floats() * threads + kAlign;
}

inline void add(float* to, const float* from, int64_t count) {
  int64_t k = 0;
  for (; k + W <= count; k += W) store(to + k, fma(splat(1.f), load(from + k), load(to + k)));
  for (; k < count; ++k) to[k] += from[k];
}

// One group of one sample for `team` factors; returns the live values.
int64_t pull_back(const float* const* d, const int64_t* at, const float* filters, float* mine, const Back& b,
                  const SquaresShape& c, int64_t team) {
  int64_t C = c.channels / c.groups, wide = c.width + 2 * c.pad_w, E = c.entries * (c.outputs / c.groups);
  float *images = mine, *patch = images + b.factors * b.image, *values = patch + b.factors * b.ld;
  int32_t* from = reinterpret_cast<int32_t*>(values + b.factors * b.values);  // outputs, by position
  int32_t* begin = from + b.values;                                           // of each position
  int32_t* next = begin + padded(b.positions + 1);
  auto alive = [&](int64_t e) {
    bool any = false;
    for (int64_t q = 0; q < team; ++q) any |= d[q][e] != 0.f;
    return any;
  };
  std::memset(images, 0, sizeof(float) * team * b.image);
  std::memset(begin, 0, sizeof(int32_t) * (b.positions + 1));
  for (int64_t e = 0; e < E; ++e) begin[at[e] + 1] += alive(e);
  for (int64_t p = 0; p < b.positions; ++p) begin[p + 1] += begin[p];
  std::memcpy(next, begin, sizeof(int32_t) * b.positions);
  for (int64_t e = 0; e < E; ++e) {
    if (!alive(e)) continue;
    int32_t to = next[at[e]]++;
    from[to] = static_cast<int32_t>(e / c.entries);
    for (int64_t q = 0; q < team; ++q) values[q * b.values + to] = d[q][e];
  }
  int64_t run = c.dilation_w == 1 ? c.kernel_width * C : C;
  int64_t runs = c.dilation_w == 1 ? 1 : c.kernel_width;
  for (int64_t p = 0; p < b.positions; ++p) {
    int64_t count = begin[p + 1] - begin[p];
    if (!count) continue;
    Plan::Row rows[kMaxRows];
    float* out[kMaxRows];
    for (int64_t q = 0; q < team; ++q) {
      rows[q] = {values + q * b.values + begin[p], from + begin[p], count};
      out[q] = patch + q * b.ld;
    }
    columns<Into::kSet>(team, filters, b.ld, rows, out, b.ld);
    int64_t top = p / c.out_width * c.stride_h, left = p % c.out_width * c.stride_w;
    for (int64_t q = 0; q < team; ++q)
      for (int64_t i = 0; i < c.kernel_height; ++i)
        for (int64_t j = 0; j < runs; ++j)
          add(images + q * b.image + ((top + i * c.dilation_h) * wide + left + j * c.dilation_w) * C,
              out[q] + (i * runs + j) * run, run);
  }
  return begin[b.positions] * team;
}

int64_t pull_back(const float* const* d, const float* weight, const int64_t* at, float* dx, float* scratch,
                  const SquaresShape& c, int threads) {
  Back b(c);
  int64_t C = c.channels / c.groups, wide = c.width + 2 * c.pad_w, K = c.columns(), live = 0;
  int64_t taps = c.kernel_height * c.kernel_width, per = c.outputs / c.groups;
  float* filters = aligned(scratch);  // (i, j, c), the weight's are (c, i, j)
  float* rest = filters + b.filter_floats();
  for (int64_t o = 0; o < c.outputs; ++o) {
    for (int64_t k = 0; k < K; ++k) filters[o * b.ld + k] = weight[o * K + k % C * taps + k / C];
    for (int64_t k = K; k < b.ld; ++k) filters[o * b.ld + k] = 0.f;
  }
#pragma omp parallel for num_threads(threads) reduction(+ : live) schedule(static) if (threads > 1)
  for (int64_t item = 0; item < c.samples * c.groups; ++item) {
    int64_t n = item / c.groups, g = item % c.groups, first = (n * c.outputs + g * per) * c.entries;
    float* mine = rest + b.thread_floats() * omp_get_thread_num();
    for (int64_t q0 = 0; q0 < c.factors; q0 += b.factors) {
      int64_t team = least(b.factors, c.factors - q0);
      const float* values[kMaxRows];
      for (int64_t q = 0; q < team; ++q) values[q] = d[q0 + q] + first;
      live += pull_back(values, at + first, filters + g * per * b.ld, mine, b, c, team);
      for (int64_t q = 0; q < team; ++q) {
        float* to = dx + (((q0 + q) * c.samples + n) * c.channels + g * C) * c.height * c.width;
        for (int64_t ch = 0; ch < C; ++ch)
          for (int64_t i = 0; i < c.height; ++i) {
            const float* row = mine + q * b.image + ((i + c.pad_h) * wide + c.pad_w) * C + ch;
            for (int64_t j = 0; j < c.width; ++j) *to++ = row[j * C];
          }
      }
    }
  }
  return live * K;
}

}  // namespace
