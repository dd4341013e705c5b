#include "cpu/softmax_draw.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace autoflip {

namespace {

constexpr double kTiny = std::numeric_limits<double>::min();

// One row's classes, likeliest first, and what they and those after them sum up to.
class Row {
 public:
  explicit Row(int64_t classes) : order(classes), p_(classes), tail_(classes + 1) {}

  void sort(const float* f) {
    int64_t classes = static_cast<int64_t>(order.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [f](int64_t a, int64_t b) { return f[a] > f[b]; });
    double top = f[order[0]];
    tail_[classes] = 0;
    for (int64_t i = classes - 1; i >= 0; --i) {  // small numbers first: 1 - sum would cancel
      p_[i] = std::exp(f[order[i]] - top);
      tail_[i] = tail_[i + 1] + p_[i];
    }
  }
  double here(int64_t i) const { return p_[i] / tail_[0]; }
  double own(int64_t i, double scale) const {  // S[i, i]
    return std::sqrt(scale * here(i) * after(i) / std::max(tail_[i] / tail_[0], kTiny));
  }
  double below(int64_t i, double scale) const {  // S[j, i] = -here(j) times this for each later j
    return std::sqrt(scale * here(i) / std::max(tail_[i] / tail_[0] * after(i), kTiny));
  }

  std::vector<int64_t> order;

 private:
  double after(int64_t i) const { return tail_[i + 1] / tail_[0]; }
  std::vector<double> p_, tail_;
};

}  // namespace

void softmax_draw(const float* f, const float* scale, const float* signs, float* v, int64_t rows,
                  int64_t classes) {
  Row row(classes);
  for (int64_t n = 0; n < rows; ++n, f += classes, signs += classes, v += classes) {
    row.sort(f);
    double before = 0;
    for (int64_t i = 0; i < classes; ++i) {
      v[row.order[i]] = static_cast<float>(row.own(i, scale[n]) * signs[i] - row.here(i) * before);
      before += row.below(i, scale[n]) * signs[i];
    }
  }
}

void softmax_columns(const float* f, const float* scale, float* v, int64_t rows, int64_t classes) {
  Row row(classes);
  for (int64_t n = 0; n < rows; ++n, f += classes, v += classes) {
    row.sort(f);
    for (int64_t c = 0; c + 1 < classes; ++c) {
      float* to = v + c * rows * classes;
      double below = row.below(c, scale[n]);
      for (int64_t i = 0; i < c; ++i) to[row.order[i]] = 0.f;
      to[row.order[c]] = static_cast<float>(row.own(c, scale[n]));
      for (int64_t i = c + 1; i < classes; ++i) to[row.order[i]] = static_cast<float>(-row.here(i) * below);
    }
  }
}

void softmax_steps(const float* f, const float* scale, float* own, float* step, float* diagonal,
                   int64_t* likeliest, int64_t rows, int64_t classes) {
  std::vector<double> p(classes), before(classes + 1), after(classes + 1);
  for (int64_t n = 0; n < rows; ++n, f += classes, own += classes, step += classes, diagonal += classes) {
    likeliest[n] = std::max_element(f, f + classes) - f;
    double top = f[likeliest[n]];
    for (int64_t c = 0; c < classes; ++c) {
      p[c] = std::exp(f[c] - top);
      before[c + 1] = before[c] + p[c];
    }
    for (int64_t c = classes - 1; c >= 0; --c) after[c] = after[c + 1] + p[c];
    double size = scale[n] / after[0], share = size / after[0];  // the likeliest counts 1
    for (int64_t c = 0; c < classes; ++c) {
      double part = p[c] / std::max(before[c + 1], kTiny);
      own[c] = static_cast<float>(std::sqrt(size * part * before[c]));
      step[c] = static_cast<float>(part);
      diagonal[c] = static_cast<float>(share * p[c] * (before[c] + after[c + 1]));
    }
  }
}

void softmax_weight(const float* f, const float* scale, double* out, int64_t rows, int64_t classes) {
  for (int64_t n = 0; n < rows; ++n, f += classes) {
    int64_t likeliest = std::max_element(f, f + classes) - f;
    double others = 0, squares = 0;
    for (int64_t c = 0; c < classes; ++c) {
      if (c == likeliest) continue;
      double p = std::exp(static_cast<double>(f[c]) - f[likeliest]);
      others += p, squares += p * p;
    }
    double total = 1 + others;  // the likeliest counts 1
    out[n] = scale[n] * (others * (2 + others) - squares) / (total * total);
  }
}

}  // namespace autoflip
