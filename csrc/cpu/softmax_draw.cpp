#include "cpu/softmax_draw.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace autoflip {

void softmax_draw(const float* f, const float* scale, const float* signs, float* v, int64_t rows,
                  int64_t classes) {
  constexpr double tiny = std::numeric_limits<double>::min();
  std::vector<int64_t> order(classes);
  std::vector<double> p(classes), tail(classes + 1);
  for (int64_t n = 0; n < rows; ++n, f += classes, signs += classes, v += classes) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [f](int64_t a, int64_t b) { return f[a] > f[b]; });
    double top = f[order[0]];
    tail[classes] = 0;
    for (int64_t i = classes - 1; i >= 0; --i) {  // small numbers first: 1 - sum would cancel
      p[i] = std::exp(f[order[i]] - top);
      tail[i] = tail[i + 1] + p[i];
    }
    double total = tail[0], before = 0;
    for (int64_t i = 0; i < classes; ++i) {
      double here = p[i] / total, from = tail[i] / total, after = tail[i + 1] / total;
      double own = std::sqrt(scale[n] * here * after / std::max(from, tiny));
      v[order[i]] = static_cast<float>(own * signs[i] - here * before);
      before += std::sqrt(scale[n] * here / std::max(from * after, tiny)) * signs[i];
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
