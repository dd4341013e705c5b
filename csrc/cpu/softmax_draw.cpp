#include "cpu/softmax_draw.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/deal.h"

namespace autoflip {

namespace {

constexpr double kTiny = std::numeric_limits<double>::min();
constexpr int64_t kFew = 32;  // classes

// e[c] = exp(f[c] - top) of one row; returns the likeliest class.
int64_t exponentials(const float* f, int64_t classes, double* e) {
  int64_t likeliest = std::max_element(f, f + classes) - f;
  for (int64_t c = 0; c < classes; ++c)
    e[c] = c == likeliest ? 1 : std::exp(static_cast<double>(f[c]) - f[likeliest]);
  return likeliest;
}

// scale (1 - sum p^2), of exponentials
double trace(const double* e, int64_t likeliest, int64_t classes, double scale) {
  double others = 0, squares = 0;
  for (int64_t c = 0; c < classes; ++c)
    if (c != likeliest) others += e[c], squares += e[c] * e[c];
  double total = 1 + others;  // the likeliest counts 1
  return scale * (others * (2 + others) - squares) / (total * total);
}

// One row's classes, likeliest first, and what they and those after them sum up to.
class Row {
 public:
  explicit Row(int64_t classes) : order(classes), p_(classes), tail_(classes + 1) {}

  // e: each class's exponential
  void sort(const double* e) {
    int64_t classes = static_cast<int64_t>(order.size());
    std::iota(order.begin(), order.end(), 0);
    if (classes > kFew) {
      std::stable_sort(order.begin(), order.end(), [e](int64_t a, int64_t b) { return e[a] > e[b]; });
    } else {  // by insertion: no memory is asked for
      for (int64_t i = 1; i < classes; ++i) {
        int64_t one = order[i], to = i;
        for (; to > 0 && e[order[to - 1]] < e[one]; --to) order[to] = order[to - 1];
        order[to] = one;
      }
    }
    tail_[classes] = 0;
    for (int64_t i = classes - 1; i >= 0; --i) {  // small numbers first: 1 - sum would cancel
      p_[i] = e[order[i]];
      tail_[i] = tail_[i + 1] + p_[i];
    }
    double share = 1 / tail_[0];
    for (double& p : p_) p *= share;
    for (double& tail : tail_) tail *= share;
  }
  double here(int64_t i) const { return p_[i]; }
  double own(int64_t i, double scale) const {  // S[i, i]
    return std::sqrt(scale * here(i) * after(i) / std::max(tail_[i], kTiny));
  }
  double below(int64_t i, double scale) const {  // S[j, i] = -here(j) times this for each later j
    return std::sqrt(scale * here(i) / std::max(tail_[i] * after(i), kTiny));
  }

  // v = factor S sign, classes as they came
  template <class Sign>
  void draw(double scale, float factor, Sign sign, float* v) const {
    double before = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(order.size()); ++i) {
      v[order[i]] = static_cast<float>(own(i, scale) * sign(i) - here(i) * before) * factor;
      before += below(i, scale) * sign(i);
    }
  }

  std::vector<int64_t> order;

 private:
  double after(int64_t i) const { return tail_[i + 1]; }
  std::vector<double> p_, tail_;
};

}  // namespace

void softmax_draw(const float* f, const float* scale, const float* signs, float* v, int64_t rows,
                  int64_t classes) {
  Row row(classes);
  std::vector<double> e(classes);
  for (int64_t n = 0; n < rows; ++n, f += classes, signs += classes, v += classes) {
    exponentials(f, classes, e.data());
    row.sort(e.data());
    row.draw(scale[n], 1, [signs](int64_t i) { return signs[i]; }, v);
  }
}

int64_t softmax_deal(const float* f, const float* scale, const float* signs, int64_t samples, int64_t classes,
                     const Deal& how, int64_t* sample, float* v) {
  std::vector<double> e(samples * classes), weight(samples), size(samples * how.most);
  std::vector<int64_t> turn(samples * how.most), from(samples * how.most);
  double total = 0, squares = 0;
  for (int64_t n = 0; n < samples; ++n) {
    int64_t likeliest = exponentials(f + n * classes, classes, &e[n * classes]);
    weight[n] = trace(&e[n * classes], likeliest, classes, scale[n]);
    total += weight[n], squares += weight[n] * weight[n];
  }
  if (!(total > 0) || total * total > how.alike * static_cast<double>(samples) * squares) return 0;
  int64_t rows = deal_rows(weight.data(), samples, how.budget, how.most, how.chance, from.data(), turn.data(),
                           size.data());
  Row row(classes);
  for (int64_t r = 0; r < rows; ++r, v += classes) {
    int64_t n = sample[r] = from[r], t = turn[r];
    if (r == 0 || n != from[r - 1]) row.sort(&e[n * classes]);
    // times a row of a Hadamard matrix, orthogonal to those of the sample's other rows
    auto sign = [own = signs + n * classes, t](int64_t i) {
      return __builtin_parityll(static_cast<uint64_t>(i & t)) ? -own[i] : own[i];
    };
    row.draw(scale[n], static_cast<float>(size[r]), sign, v);
  }
  return rows;
}

void softmax_columns(const float* f, const float* scale, float* v, int64_t rows, int64_t classes) {
  Row row(classes);
  std::vector<double> e(classes);
  for (int64_t n = 0; n < rows; ++n, f += classes, v += classes) {
    exponentials(f, classes, e.data());
    row.sort(e.data());
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
  std::vector<double> e(classes);
  for (int64_t n = 0; n < rows; ++n, f += classes) {
    int64_t likeliest = exponentials(f, classes, e.data());
    out[n] = trace(e.data(), likeliest, classes, scale[n]);
  }
}

}  // namespace autoflip
