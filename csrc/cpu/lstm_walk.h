// A dense LSTM layer's steps, forwards and backwards, for one CPU instruction set.
//
// All arrays are row-major float32 with time first; gates side by side in torch's order i, f, g, o.
#pragma once
#include <cstdint>

#include "cpu/recurrent.h"

namespace autoflip {

struct LstmShape {
  int64_t steps, samples, hidden, inputs, factors;
};

// Factors' gradients at the layer's output, (steps, samples, hidden): strides in floats.
struct LstmOutputs {
  const float* const* dy;
  int64_t step, sample;
};

struct LstmWalk {
  // gates (steps, samples, 4 hidden): x's products in, activated out; w (4 hidden, hidden); bias (4 hidden);
  // cells (steps + 1, samples, hidden): the first in, the others out; y (steps, samples, hidden)
  void (*forward)(const LstmShape&, const RecurrentCell&, const float* w, const float* bias, const float* h0,
                  float* gates, float* cells, float* y, int threads);
  // each factor's d (steps, samples, 4 hidden), float32 (or bfloat16: the bf16 walk), and, unless w_ih is
  // null, its dx (steps, samples, inputs); dh and dc (factors, samples, hidden): of the last states in, of
  // the first out
  void (*back)(const LstmShape&, const float* w_hh, const float* w_ih, const float* gates, const float* cells,
               const LstmOutputs&, float* dh, float* dc, void* const* d, float* const* dx, int threads);
};

extern const LstmWalk lstm_walk_base;
#if defined(__x86_64__)
extern const LstmWalk lstm_walk_avx2;
extern const LstmWalk lstm_walk_avx512;
#endif

}  // namespace autoflip
