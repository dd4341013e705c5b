#include "cpu/deal.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace autoflip {

int64_t deal_rows(const double* weight, int64_t samples, double budget, int64_t most, double chance,
                  int64_t* sample, int64_t* turn, double* scale) {
  std::vector<int64_t> order(samples);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [weight](int64_t a, int64_t b) { return weight[a] > weight[b]; });
  double unit = budget / std::accumulate(weight, weight + samples, 0.0), running = 0;
  int64_t rows = 0;
  for (int64_t n : order) {
    double due = std::min(weight[n] * unit, static_cast<double>(most));
    int64_t count = 1;
    if (due < 1) {
      double before = std::floor(running + chance);
      running += due;
      count = static_cast<int64_t>(std::floor(running + chance) - before);
    } else {
      while (2 * count <= due) count *= 2;
    }
    double factor = 1 / std::sqrt(due < 1 ? due : static_cast<double>(count));
    for (int64_t i = 0; i < count; ++i, ++rows) sample[rows] = n, turn[rows] = i, scale[rows] = factor;
  }
  return rows;
}

}  // namespace autoflip
