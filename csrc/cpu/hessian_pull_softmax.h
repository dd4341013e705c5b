// All columns of softmax's factor, pulled through the last two dense layers and what ReLU left between them.
//
// Work     the last layer's weight is every sample's gradient of the logits, so J = last diag(gate > 0)
//          weight differs between two samples only by the units that one of them has open and the other
//          closed. Samples of one likeliest class open nearly the same: the sum over the units that most of
//          them open is made once for all (up to kPullTogether), and each sample adds and takes what it has
//          otherwise. (MLP 784-200-200-10, trained: 63 % of 200 units are open, 8 % otherwise than most.)
// Factor   v_c = own_c (J_c - mean of those before it by p), the mean kept from class to class: the columns
//          of S times J for a tenth of a product, and sums of squares that cancel nowhere. Only differences
//          of classes count, so J stands for J - J_0, whose first row is zero: `rows` of them are left.
// Threads  each has its own samples, sums have one order: the bits do not depend on the number of threads.
#pragma once
#include <omp.h>

#include <cstring>
#include <memory>
#include <vector>

#include "cpu/hessian_alive.h"
#include "cpu/hessian_tile.h"

namespace {

using autoflip::SoftmaxPull;

constexpr int64_t kPullTogether = 64;
constexpr int64_t kPullFloats = 1 << 17;  // of weight: columns that are dealt with at once, 512 KiB

// Samples by likeliest class, and where each part of those that have one in common begins.
struct PullParts {
  std::vector<int64_t> order, begin;

  explicit PullParts(const SoftmaxPull& s) {
    std::vector<int64_t> first(s.classes + 1);
    for (int64_t n = 0; n < s.samples; ++n) ++first[s.likeliest[n] + 1];
    for (int64_t c = 0; c < s.classes; ++c) {
      for (int64_t at = 0; at < first[c + 1]; at += kPullTogether) begin.push_back(first[c] + at);
      first[c + 1] += first[c];
    }
    begin.push_back(s.samples);
    order.resize(s.samples);
    for (int64_t n = 0; n < s.samples; ++n) order[first[s.likeliest[n]]++] = n;
  }
};

// One thread's memory: the units that a sample, or most of a part, have open, and those that a sample has
// otherwise; each class's weights there; the gradients of the logits by what most have open, and what a
// sample adds to them.
struct PullRows {
  int64_t rows, stride, ld;
  std::unique_ptr<float[]> memory;
  std::unique_ptr<int32_t[]> list;
  float *opened, *otherwise, *signs, *values, *common, *own;

  PullRows(const SoftmaxPull& s, int64_t ld)
      : rows(s.classes - 1),
        stride(padded(s.outputs) + kAlign),
        ld(ld),
        memory(new float[(3 + rows) * stride + 2 * rows * ld + kAlign]),
        list(new int32_t[stride]),
        opened(aligned(memory.get())),
        otherwise(opened + stride),
        signs(otherwise + stride),
        values(signs + stride),
        common(values + rows * stride),
        own(common + rows * ld) {}

  // out[c] = sum_o by[o] last[c, o] u[o], by +-1 or 0; last's rows are `apart`. Returns for how many o it is
  // not 0.
  int64_t sum(const float* last, int64_t apart, int64_t outputs, const float* u, const float* by,
              float* out) {
    int64_t count = gather_alive(&by, 1, outputs, list.get(), &signs);
    for (int64_t c = 0; c < rows; ++c)
      for (int64_t j = 0; j < count; ++j) values[c * stride + j] = signs[j] * last[c * apart + list[j]];
    int64_t teams = (rows + kMaxRows - 1) / kMaxRows;
    for (int64_t t = 0; t < teams; ++t) {
      int64_t first = t * rows / teams, some = (t + 1) * rows / teams - first;
      Plan::Row team[kMaxRows];
      float* to[kMaxRows];
      for (int64_t r = 0; r < some; ++r) {
        team[r] = {values + (first + r) * stride, list.get(), count};
        to[r] = out + (first + r) * ld;
      }
      columns<Into::kSet>(some, u, ld, team, to, ld);
    }
    return count;
  }
};

// 1 for the units that most of these samples have open, else 0; all without a gate.
inline void pull_opened(const SoftmaxPull& s, const int64_t* samples, int64_t count, float* opened) {
  for (int64_t o = 0; o < s.outputs; ++o) opened[o] = s.gate == nullptr ? 1.f : 0.f;
  if (s.gate == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    const float* row = s.gate + samples[i] * s.outputs;
    for (int64_t o = 0; o < s.outputs; ++o) opened[o] += row[o] > 0.f ? 1.f : 0.f;
  }
  for (int64_t o = 0; o < s.outputs; ++o) opened[o] = 2.f * opened[o] > static_cast<float>(count) ? 1.f : 0.f;
}

// 1 for the units that this sample has open and most have not, -1 for those that most have and it has not,
// else 0.
inline void pull_otherwise(const SoftmaxPull& s, int64_t n, const float* opened, float* otherwise) {
  const float* row = s.gate == nullptr ? nullptr : s.gate + n * s.outputs;
  for (int64_t o = 0; o < s.outputs; ++o)
    otherwise[o] = row == nullptr ? 0.f : (row[o] > 0.f ? 1.f : 0.f) - opened[o];
}

// V vectors of J, or of J + more, `rows` of them `ld` apart: to(c, k, v_c), or to(0, k, sum_c v_c^2) when
// kSquared, for each k.
template <bool kSquared, int V, class To>
inline void softmax_tile(const float* J, const float* more, int64_t ld, const float* own, const float* step,
                         int64_t rows, int64_t k, To to) {
  auto row = [=](int64_t c, int v) {
    int64_t at = c * ld + k + v * W;
    return more == nullptr ? load(J + at) : load(J + at) + load(more + at);
  };
  Vec mean[V], total[V];
  for (int v = 0; v < V; ++v) mean[v] = total[v] = splat(0.f);
  for (int64_t c = 0; c < rows; ++c) {
    Vec size = splat(own[c + 1]), next = splat(step[c + 1]);
    for (int v = 0; v < V; ++v) {
      Vec apart = row(c, v) - mean[v], value = size * apart;
      if (kSquared)
        total[v] = fma(value, value, total[v]);
      else
        to(c, k + v * W, value);
      mean[v] = fma(next, apart, mean[v]);
    }
  }
  if (kSquared)
    for (int v = 0; v < V; ++v) to(0, k + v * W, total[v]);
}

template <bool kSquared, class To>
inline void softmax_rows(const float* J, const float* more, int64_t ld, const float* own, const float* step,
                         int64_t rows, int64_t width, To to) {
  int64_t k = 0;
  for (; k + 3 * W < width; k += 4 * W) softmax_tile<kSquared, 4>(J, more, ld, own, step, rows, k, to);
  for (; k < width; k += W) softmax_tile<kSquared, 1>(J, more, ld, own, step, rows, k, to);
}

// to[0 .. W) = v where the gate is open, of columns that are there
inline void pull_store(float* __restrict to, Vec v, const float* __restrict open, int64_t there) {
  alignas(64) float values[W];
  store(values, v);
  if (there < W || open == nullptr) {
    for (int64_t i = 0; i < least(W, there); ++i) to[i] = open == nullptr || open[i] > 0.f ? values[i] : 0.f;
  } else {
    for (int i = 0; i < W; ++i) to[i] = open[i] > 0.f ? values[i] : 0.f;
  }
}

// A sample's v: rows of J are `ld` apart, those of out `apart`.
inline void pull_factors(const float* J, const float* more, int64_t ld, const SoftmaxPull& s, int64_t n,
                         bool squared, const float* open, int64_t width, float* out, int64_t apart) {
  const float *own = s.own + n * s.classes, *step = s.step + n * s.classes;
  auto to = [&](int64_t c, int64_t k, Vec v) {
    pull_store(out + c * apart + k, v, open == nullptr ? nullptr : open + k, width - k);
  };
  if (squared)
    softmax_rows<true>(J, more, ld, own, step, s.classes - 1, width, to);
  else
    softmax_rows<false>(J, more, ld, own, step, s.classes - 1, width, to);
}

int64_t softmax_pull(const SoftmaxPull& s, int threads) {
  int64_t K = s.columns, panels = (K * s.outputs + kPullFloats - 1) / kPullFloats, wide = padded(s.outputs);
  int64_t ld = padded((K + panels - 1) / panels), ran = 0;
  PullParts parts(s);
  std::unique_ptr<float[]> memory(new float[s.outputs * ld + s.classes * wide + kAlign]);
  float *u = aligned(memory.get()), *last = u + s.outputs * ld;
  for (int64_t c = 1; c < s.classes; ++c) {
    float* to = last + (c - 1) * wide;
    for (int64_t o = 0; o < s.outputs; ++o) to[o] = s.last[c * s.outputs + o] - s.last[o];
    std::memset(to + s.outputs, 0, sizeof(float) * (wide - s.outputs));
  }
#pragma omp parallel num_threads(threads) reduction(+ : ran) if (threads > 1)
  {
    PullRows mine(s, ld);
    for (int64_t p = 0; p < panels; ++p) {
      int64_t begin = p * ld, width = least(ld, K - begin);
#pragma omp for schedule(static)
      for (int64_t o = 0; o < s.outputs; ++o) {
        std::memcpy(u + o * ld, s.weight + o * K + begin, sizeof(float) * width);
        std::memset(u + o * ld + width, 0, sizeof(float) * (ld - width));
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < static_cast<int64_t>(parts.begin.size()) - 1; ++i) {
        const int64_t* samples = parts.order.data() + parts.begin[i];
        int64_t count = parts.begin[i + 1] - parts.begin[i];
        pull_opened(s, samples, count, mine.opened);
        int64_t units = mine.sum(last, wide, s.outputs, u, mine.opened, mine.common);
        for (int64_t j = 0; j < count; ++j) {
          int64_t n = samples[j];
          pull_otherwise(s, n, mine.opened, mine.otherwise);
          units += mine.sum(last, wide, s.outputs, u, mine.otherwise, mine.own);
          const float* open = s.before == nullptr ? nullptr : s.before + n * K + begin;
          pull_factors(mine.common, mine.own, ld, s, n, s.squared, open, width, s.out + n * K + begin,
                       s.samples * K);
          if (p == 0)
            pull_factors(last, nullptr, wide, s, n, true,
                         s.gate == nullptr ? nullptr : s.gate + n * s.outputs, s.outputs,
                         s.hidden + n * s.outputs, 0);
        }
        ran += units * mine.rows * width;
      }
    }
  }
  return ran;
}

}  // namespace
