// Squares of per-sample gradients, summed over samples: one table of functions per instruction set.
#pragma once
#include <cstdint>

namespace autoflip {

// A convolution with its batch.
struct SquaresShape {
  int64_t factors, samples, outputs, groups;
  int64_t channels, height, width;      // of the input
  int64_t out_height, out_width;        // of d
  int64_t kernel_height, kernel_width;  // patch
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t entries;  // values of d per sample and output: positions(), or fewer when `at` says where they are

  int64_t positions() const { return out_height * out_width; }
  int64_t columns() const { return channels / groups * kernel_height * kernel_width; }
};

// A dense layer on sequences; strides in values, of d's factors (samples, outputs, positions).
struct StepsShape {
  int64_t factors, samples, outputs, positions, inputs;
  int64_t d_sample, d_output, d_position;
};

// Some columns of what it reads: (samples, positions, columns next to each other), strides in floats.
struct StepsInput {
  const float* values;
  int64_t columns, sample, position;
};

// Softmax's second derivative S S^T at C logits, and the two dense layers in front of them with O units
// between.
struct SoftmaxPull {
  // (samples, C): what a class adds to p's sum, and its column of S by the gradients J of the logits:
  // own[c] (J[c] - mean), where mean += step[c] (J[c] - mean) from class to class
  const float *own, *step;
  const int64_t* likeliest;                    // class of each sample
  const float *last, *gate, *weight, *before;  // (C, O), (samples, O), (O, K), (samples, K)
  float *hidden, *out;                         // (samples, O), and (samples, K) or (C - 1, samples, K)
  int64_t samples, classes, outputs, columns;
  bool squared;
};

struct HessianKernels {
  // Scratch, in floats, that `squares` needs for `threads` threads.
  int64_t (*squares_scratch)(const SquaresShape&, int threads);
  // out[o, k] = sum_qn (sum_e d[q][n, o, e] u[n, p, k])^2, p = at[n, o, e], or e when `at` is null; u the
  // patches of x; x is NCHW. Returns the multiply-adds that ran. The sums do
  // not depend on the number of threads.
  int64_t (*squares)(const float* const* d, const float* x, const int64_t* at, float* out, float* scratch,
                     const SquaresShape&, int threads);
  // Scratch of `pull_back`, in floats.
  int64_t (*pull_back_scratch)(const SquaresShape&, int threads);
  // dx[q, n, c, i, j] = sum_e d[q][n, o, e] weight[o, c, ...] over the outputs that read it, e at at[n, o,
  // e]. Returns the multiply-adds that ran.
  int64_t (*pull_back)(const float* const* d, const float* weight, const int64_t* at, float* dx,
                       float* scratch, const SquaresShape&, int threads);
  // Scratch of `squared_matmul`, in floats.
  int64_t (*squared_matmul_scratch)(int64_t samples, int64_t outputs, int threads);
  // out[o, k] = sum_n d[n, o]^2 a[at[n], k]^2 (`squared`: d as it is; no `at`: its row n). Returns the
  // multiply-adds that ran. Callers check every `at` (here and below).
  int64_t (*squared_matmul)(const float* d, const float* a, const int64_t* at, float* out, float* scratch,
                            int64_t samples, int64_t outputs, int64_t columns, bool squared, int threads);
  // out[q, n, k] = (sum_o d[q][n, o] w[o, k]) * (gate[at[n], k] > 0), gate may be null, so may `at`: its row
  // n; `squared`: out[n, k] is the sum over q of their squares. Returns the multiply-adds that ran.
  int64_t (*dense_pull_back)(const float* const* d, const float* w, const float* gate, const int64_t* at,
                             float* out, int64_t factors, int64_t samples, int64_t outputs, int64_t columns,
                             bool squared, int threads);
  // out[q, n, k] = sum_o S[n, :, q] last[:, o] (gate[n, o] > 0) weight[o, k] (before[n, k] > 0), gates may be
  // null; `squared`: out[n, k] is the sum over q of their squares; hidden's, always, those in front of
  // weight. Returns the multiply-adds with weight that ran.
  int64_t (*softmax_pull)(const SoftmaxPull&, int threads);
  // v[n, k] *= (gate[at[n], k] > 0), after squaring it when `squared`; gate may be null, so may `at`.
  void (*gate_rows)(float* v, const float* gate, const int64_t* at, int64_t samples, int64_t columns,
                    bool squared);
  // out[o, k] = sum_qn (sum_p d[q][n, o, p] u[n, p, k])^2, u's columns those of all inputs. Returns the
  // multiply-adds that ran.
  int64_t (*sequence_squares)(const float* const* d, const StepsInput* u, float* out, const StepsShape&,
                              int threads);
  // out[i] = +-1, bit i % 64 of SplitMix64's word i / 64
  void (*rademacher)(uint64_t seed, uint64_t stream, float* out, int64_t count, int threads);
  // whether no value is NaN or Inf
  bool (*finite)(const float* x, int64_t count);
};

extern const HessianKernels kHessianBase;
#if defined(__x86_64__)
extern const HessianKernels kHessianAvx2;
extern const HessianKernels kHessianAvx512;
#endif

}  // namespace autoflip
