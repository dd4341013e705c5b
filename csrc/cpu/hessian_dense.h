// D[o, k] = sum_n v[n, o] a[at[n], k]^2, v = d^2 or given squared: a dense layer's sum of squared gradients.
//
// Work     a tile of up to 64 columns at a time: 96 samples' inputs are squared into a packed tile that
//          stays in the first-level cache, and teams of outputs add up the rows of the samples that are alive
//          for one of them, each row loaded once for all. A tile of D has one owner and samples come in
//          order: the bits do not depend on the number of threads.
// Zeros    behind ReLU about half of d is zero, for many outputs nearly always and for others nearly never:
//          next to others that are alive as often, an output shares most of its zeros with its team. Where it
//          does not, the team is cut. (MLP B 256, trained: 58 % alive, 64 % in pairs, 68 % in sixes.)
// Rows     of d that follow each other and read one row of a are added up before they meet it.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "common/cpu.h"
#include "cpu/hessian_alive.h"
#include "cpu/hessian_groups.h"
#include "cpu/hessian_tile.h"
#include "cpu/masked_matmul_transpose.h"

namespace {

constexpr int64_t kDenseColumns = 64, kDenseSamples = 96;

// v by output: each one's sums over groups, `stride` apart, and a bit for each that is not zero.
struct DenseOutputs {
  int64_t stride, words;
  float* values;
  std::vector<uint64_t> alive;

  static constexpr int64_t kRows = 16;  // that are turned round together
  static int64_t stride_of(int64_t groups) { return (groups + 63) / 64 * 64; }
  // rows: room for kRows of d's
  DenseOutputs(const float* d, const DenseGroups& groups, int64_t O, bool squared, float* memory, float* rows)
      : stride(stride_of(groups.count())), words(stride / 64), values(memory), alive(O * words) {
    int64_t filled = padded(groups.count());
    for (int64_t o = 0; o < O && filled < stride; ++o)
      std::memset(values + o * stride + filled, 0, sizeof(float) * (stride - filled));
    for (int64_t begin = 0; begin < groups.count(); begin += kRows) {
      int64_t some = least(kRows, groups.count() - begin);
      std::memset(rows, 0, sizeof(float) * some * O);
      for (int64_t n = groups.first[begin], u = 0; n < groups.first[begin + some]; ++n) {
        while (n >= groups.first[begin + u + 1]) ++u;
        const float* v = d + n * O;
        float* to = rows + u * O;
        for (int64_t o = 0; o < O; ++o) to[o] += squared ? v[o] : v[o] * v[o];
      }
      autoflip::transpose<true>(rows, O, some, O, values + begin, stride);
    }
    for (int64_t i = 0; i < O * words; ++i) alive[i] = alive_bits(values + i * 64);
  }
  int64_t together(const int32_t* outputs, int64_t count) const {
    int64_t total = 0;
    for (int64_t w = 0; w < words; ++w) {
      uint64_t any = 0;
      for (int64_t i = 0; i < count; ++i) any |= alive[outputs[i] * words + w];
      total += __builtin_popcountll(any);
    }
    return total;
  }
};

// Outputs that are not all zero, those that are alive most first, cut into teams that share registers; the
// others.
struct DenseTeams {
  std::vector<int32_t> order;
  int64_t all;
  std::vector<int64_t> begin;

  DenseTeams(const DenseOutputs& v, int64_t O) : order(O) {
    std::iota(order.begin(), order.end(), 0);
    std::vector<int64_t> count(O);
    for (int32_t o : order) count[o] = v.together(&o, 1);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return count[a] > count[b]; });
    all = O - std::count(count.begin(), count.end(), 0);
    for (int64_t first = 0; first < all; first += kMaxRows) {
      int64_t size = least(kMaxRows, all - first), best = size, cost = -1;
      for (int64_t cut = 1; cut <= size; ++cut) {  // largest pieces
        int64_t this_cost = 0;
        for (int64_t i = 0; i < size; i += cut)
          this_cost += v.together(&order[first + i], least(cut, size - i)) * cost_of(least(cut, size - i));
        if (cost < 0 || this_cost <= cost) best = cut, cost = this_cost;
      }
      for (int64_t i = 0; i < size; i += best) begin.push_back(first + i);
    }
    begin.push_back(all);
  }
  // A row of u costs as long as loads take, or the products. Intel's CPUs, which make two vectors of them a
  // cycle, are sooner done with them than with what else a small team's rows take: 200 x 784, 256 samples,
  // 482 us without the 4, 442 with it (Emerald Rapids).
  static int64_t cost_of(int64_t team) { return most(2 * team + (autoflip::fetches_ahead() ? 4 : 0), 3); }
  int64_t count() const { return static_cast<int64_t>(begin.size()) - 1; }
  int64_t size(int64_t team) const { return begin[team + 1] - begin[team]; }
};

int64_t squared_matmul_scratch(int64_t N, int64_t O, int threads) {
  return O * (2 * DenseOutputs::stride_of(N) + DenseOutputs::kRows) +
         threads * (kDenseSamples + O) * kDenseColumns + kAlign;
}

int64_t squared_matmul(const float* d, const float* a, const int64_t* at, float* out, float* scratch,
                       int64_t N, int64_t O, int64_t K, bool squared, int threads) {
  DenseGroups groups(at, N);
  float* loose = aligned(scratch) + 2 * O * DenseOutputs::stride_of(groups.count());
  DenseOutputs outputs(d, groups, O, squared, aligned(scratch), loose);
  DenseTeams teams(outputs, O);
  int64_t blocks = (groups.count() + kDenseSamples - 1) / kDenseSamples, stride = outputs.stride, ran = 0;
  int64_t alive = teams.all;
  // of each team, where the samples that are alive for it lie in u: block b's from b * kDenseSamples on, as
  // values
  int32_t* lists = reinterpret_cast<int32_t*>(outputs.values + O * stride);
  float* memory = loose + DenseOutputs::kRows * O;
  std::vector<int64_t> counts(teams.count() * blocks);
  auto rows_of = [&](int64_t t, int64_t b, float** rows) {
    for (int64_t r = 0; r < teams.size(t); ++r)
      rows[r] = outputs.values + teams.order[teams.begin[t] + r] * stride + b * kDenseSamples;
  };
  for (int64_t t = 0; t < teams.count(); ++t)
    for (int64_t b = 0; b < blocks; ++b) {
      float* rows[kMaxRows];
      rows_of(t, b, rows);
      int64_t begin = b * kDenseSamples, some = least(kDenseSamples, groups.count() - begin);
      counts[t * blocks + b] = gather_alive(rows, teams.size(t), some, lists + t * stride + begin, rows);
      ran += counts[t * blocks + b] * teams.size(t);
    }
  // tiles of one width: what is left over for a last one would be too narrow to hide latencies
  int64_t tiles = (K + kDenseColumns - 1) / kDenseColumns, vectors = (K + W - 1) / W;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* u = memory + omp_get_thread_num() * (kDenseSamples + O) * kDenseColumns;
    float* D = u + kDenseSamples * kDenseColumns;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
      int64_t first = i * vectors / tiles * W, width = least((i + 1) * vectors / tiles * W, K) - first;
      std::memset(D, 0, sizeof(float) * alive * kDenseColumns);
      for (int64_t b = 0; b < blocks; ++b) {
        int64_t begin = b * kDenseSamples, some = least(kDenseSamples, groups.count() - begin);
        for (int64_t n = 0; n < some; ++n) {
          const float* x = a + groups.from[begin + n] * K + first;
          float* to = u + n * kDenseColumns;
          for (int64_t k = 0; k < width; ++k) to[k] = x[k] * x[k];
          for (int64_t k = width; k < kDenseColumns; ++k) to[k] = 0.f;
        }
        for (int64_t t = 0; t < teams.count(); ++t) {
          Plan::Row rows[kMaxRows];
          float *values[kMaxRows], *sums[kMaxRows];
          rows_of(t, b, values);
          for (int64_t r = 0; r < teams.size(t); ++r) {
            rows[r] = {values[r], lists + t * stride + begin, counts[t * blocks + b]};
            sums[r] = D + (teams.begin[t] + r) * kDenseColumns;
          }
          columns<Into::kAdd>(teams.size(t), u, kDenseColumns, rows, sums, (width + W - 1) / W * W);
        }
      }
      for (int64_t o = 0; o < alive; ++o)
        std::memcpy(out + teams.order[o] * K + first, D + o * kDenseColumns, sizeof(float) * width);
    }
  }
  for (int64_t o = alive; o < O; ++o) std::memset(out + teams.order[o] * K, 0, sizeof(float) * K);
  return ran * K;
}

}  // namespace
