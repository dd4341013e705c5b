// The elementwise half of a step of an LSTM or a GRU, and of its gradient, for one CPU instruction set.
//
// All arrays are row-major float32; n rows (samples) of h hidden units, gates side by side in torch's order:
// LSTM i, f, g, o (4 h a row), GRU r, z, n (3 h a row).
#pragma once
#include <cstdint>

namespace autoflip {

struct RecurrentCell {
  // gates: x's products in, activated gates out. back: the hidden state's products.
  // c = f * c0 + i * g;  y = o * tanh(c)
  void (*lstm_forward)(float* gates, const float* back, const float* c0, int64_t n, int64_t h, float* c,
                       float* y, int threads);
  // dy: the output's gradient at this step; dh: what the later step hands back; dc: in: that of c, out: of c0
  void (*lstm_backward)(const float* gates, const float* c0, const float* c, const float* dy, const float* dh,
                        int64_t n, int64_t h, float* dc, float* dgates, int threads);
  // back_n, out: the candidate's share of back, which the gradient needs.
  // n = tanh(gates_n + r * back_n);  y = (1 - z) * n + z * h0
  void (*gru_forward)(float* gates, const float* back, const float* h0, int64_t n, int64_t h, float* back_n,
                      float* y, int threads);
  // dback (n, 3 h): the gradient of back; dgates: of x's products; dh: in: the later step's, out: z's share
  // of h0's
  void (*gru_backward)(const float* gates, const float* back_n, const float* h0, const float* dy, int64_t n,
                       int64_t h, float* dh, float* dgates, float* dback, int threads);
};

extern const RecurrentCell recurrent_base;
extern const RecurrentCell recurrent_avx2;
extern const RecurrentCell recurrent_avx512;

}  // namespace autoflip
