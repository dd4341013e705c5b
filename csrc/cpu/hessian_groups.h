// Which rows of a dense layer's gradients are of one sample, so that their squares add up before a product.
#pragma once
#include <cstdint>
#include <vector>

namespace {

// Rows of d that read one row of a: group u's are first[u] to first[u + 1], it reads a's from[u].
struct DenseGroups {
  std::vector<int64_t> first, from;

  DenseGroups(const int64_t* at, int64_t N) {
    for (int64_t n = 0; n < N; ++n) {
      int64_t row = at == nullptr ? n : at[n];
      if (n == 0 || at == nullptr || row != from.back()) first.push_back(n), from.push_back(row);
    }
    first.push_back(N);
  }
  int64_t count() const { return static_cast<int64_t>(from.size()); }
};

}  // namespace
