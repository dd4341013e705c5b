// Whole sequences through one direction of a recurrent layer: what depends on the step before. Addresses in.
//
// Step s runs at time t = s, or steps - 1 - s where `reverse`; states are (steps + 1, n, h): the state before
// the step at time t is states[t] forwards and states[t + 1] in reverse.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <vector>

#include "bindings.h"
#include "common/cpu.h"
#include "common/scratch.h"
#include "cpu/coarse.h"
#include "cpu/lstm_walk.h"
#include "cpu/masked_matmul_layout.h"
#include "cpu/recurrent.h"

namespace py = pybind11;

namespace autoflip {
namespace {

const MaskedMatmul& products() { return AUTOFLIP_PICK(masked_matmul); }
const RecurrentCell& cells() { return AUTOFLIP_PICK(recurrent); }

struct Sequence {
  int64_t steps, n, h, gates;
  bool reverse;
  int64_t time(int64_t step) const { return reverse ? steps - 1 - step : step; }
  int64_t before(int64_t t) const { return (reverse ? t + 1 : t) * n * h; }
  int64_t after(int64_t t) const { return (reverse ? t : t + 1) * n * h; }
};

// What the steps of one direction share: w (gates * h, h), masked, and a place for one step's products.
struct Steps {
  Steps(const Sequence& s, uintptr_t w, uintptr_t lay, int64_t chunk, int wanted)
      : rows(s.gates * s.h),
        n(s.n),
        h(s.h),
        weight(at<const float>(w)),
        orders(masked_matmul_orders_at(at<const uint8_t>(lay), rows, s.h, chunk)),
        threads(n * rows < kSerialElements ? 1 : wanted) {
    const MaskedMatmul& k = products();
    const int64_t inner = std::max(k.forward_scratch(orders, n), k.backward_scratch(orders, n));
    place = thread_scratch().take(inner + 16 + n * rows);
    product = place + (inner + 15) / 16 * 16;
  }
  ~Steps() { thread_scratch().settle(); }
  void forward(const float* state, const float* bias) {
    products().forward(orders, weight, state, n, bias, false, product, nullptr, place, threads);
  }
  void backward(const float* dgates, float* dstate) {
    products().backward(orders, weight, nullptr, dgates, nullptr, n, dstate, nullptr, nullptr, place,
                        threads);
  }
  int64_t rows, n, h;
  const float* weight;
  Orders orders;
  int threads;
  float *place, *product;
};

void lstm_forward(uintptr_t gates, uintptr_t w, uintptr_t lay, int64_t chunk, uintptr_t bias, int64_t steps,
                  int64_t n, int64_t h, bool reverse, uintptr_t states, uintptr_t cell_states, int threads) {
  py::gil_scoped_release release;
  const Sequence s{steps, n, h, 4, reverse};
  Steps step(s, w, lay, chunk, threads);
  float *y = at<float>(states), *c = at<float>(cell_states);
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t t = s.time(i);
    step.forward(y + s.before(t), at<const float>(bias));
    cells().lstm_forward(at<float>(gates) + t * n * 4 * h, step.product, c + s.before(t), n, h,
                         c + s.after(t), y + s.after(t), step.threads);
  }
}

void lstm_backward(uintptr_t gates, uintptr_t w, uintptr_t lay, int64_t chunk, int64_t steps, int64_t n,
                   int64_t h, bool reverse, bool first, uintptr_t cell_states, uintptr_t dy, uintptr_t dh,
                   uintptr_t dc, uintptr_t dgates, int threads) {
  py::gil_scoped_release release;
  const Sequence s{steps, n, h, 4, reverse};
  Steps step(s, w, lay, chunk, threads);
  const float* c = at<const float>(cell_states);
  for (int64_t i = steps - 1; i >= 0; --i) {
    const int64_t t = s.time(i);
    float* d = at<float>(dgates) + t * n * 4 * h;
    cells().lstm_backward(at<const float>(gates) + t * n * 4 * h, c + s.before(t), c + s.after(t),
                          at<const float>(dy) + t * n * h, at<const float>(dh), n, h, at<float>(dc), d,
                          step.threads);
    if (i || first) step.backward(d, at<float>(dh));
  }
}

void gru_forward(uintptr_t gates, uintptr_t w, uintptr_t lay, int64_t chunk, uintptr_t bias, int64_t steps,
                 int64_t n, int64_t h, bool reverse, uintptr_t states, uintptr_t candidates, int threads) {
  py::gil_scoped_release release;
  const Sequence s{steps, n, h, 3, reverse};
  Steps step(s, w, lay, chunk, threads);
  float* y = at<float>(states);
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t t = s.time(i);
    step.forward(y + s.before(t), at<const float>(bias));
    cells().gru_forward(at<float>(gates) + t * n * 3 * h, step.product, y + s.before(t), n, h,
                        at<float>(candidates) + t * n * h, y + s.after(t), step.threads);
  }
}

void gru_backward(uintptr_t gates, uintptr_t w, uintptr_t lay, int64_t chunk, int64_t steps, int64_t n,
                  int64_t h, bool reverse, bool first, uintptr_t states, uintptr_t candidates, uintptr_t dy,
                  uintptr_t dh, uintptr_t dgates, uintptr_t dback, int threads) {
  py::gil_scoped_release release;
  const Sequence s{steps, n, h, 3, reverse};
  Steps step(s, w, lay, chunk, threads);
  for (int64_t i = steps - 1; i >= 0; --i) {
    const int64_t t = s.time(i);
    float *d = at<float>(dback) + t * n * 3 * h, *carried = at<float>(dh);
    cells().gru_backward(at<const float>(gates) + t * n * 3 * h, at<const float>(candidates) + t * n * h,
                         at<const float>(states) + s.before(t), at<const float>(dy) + t * n * h, n, h,
                         carried, at<float>(dgates) + t * n * 3 * h, d, step.threads);
    if (!i && !first) break;
    step.backward(d, step.product);
    for (int64_t j = 0; j < n * h; ++j) carried[j] += step.product[j];
  }
}

// A dense LSTM layer's steps.

const LstmWalk& walk() { return AUTOFLIP_PICK(lstm_walk); }

using Sizes = std::array<int64_t, 4>;  // steps, samples, hidden, inputs

int threads_for(const LstmShape& s, int threads) {
  return s.factors * s.samples * s.hidden * 4 < kSerialElements ? 1 : threads;
}

void dense_lstm_forward(uintptr_t w, uintptr_t bias, uintptr_t h0, uintptr_t gates, uintptr_t states,
                        uintptr_t y, const Sizes& sizes, int threads) {
  LstmShape s = {sizes[0], sizes[1], sizes[2], sizes[3], 1};
  walk().forward(s, cells(), at<float>(w), at<float>(bias), at<float>(h0), at<float>(gates),
                 at<float>(states), at<float>(y), threads_for(s, threads));
}

using Addresses = std::vector<uintptr_t>;  // one a factor

template <class T>
std::vector<T*> pointers(const Addresses& factors) {
  std::vector<T*> found;
  for (uintptr_t address : factors) found.push_back(at<T>(address));
  return found;
}

void dense_lstm_back(uintptr_t w_hh, uintptr_t w_ih, uintptr_t gates, uintptr_t cells, const Addresses& dy,
                     int64_t dy_step, int64_t dy_sample, uintptr_t dh, uintptr_t dc, const Addresses& d,
                     const Addresses& dx, const Sizes& sizes, bool coarse, int threads) {
  LstmShape s = {sizes[0], sizes[1], sizes[2], sizes[3], static_cast<int64_t>(dy.size())};
  auto from = pointers<const float>(dy);
  auto to_d = pointers<void>(d);
  auto to_dx = pointers<float>(dx);
  const auto run = coarse ? coarse_kernels()->lstm_back : walk().back;
  run(s, at<float>(w_hh), at<float>(w_ih), at<float>(gates), at<float>(cells),
      {from.data(), dy_step, dy_sample}, at<float>(dh), at<float>(dc), to_d.data(), to_dx.data(),
      threads_for(s, threads));
}

}  // namespace

void bind_recurrent(py::module_& m) {
  m.def("recurrent_lstm_forward", lstm_forward,
        "gates (steps, n, 4 h): x's products in, activated out; states and cell_states (steps + 1, n, h): "
        "the first "
        "in time's direction in, the others out");
  m.def("recurrent_lstm_backward", lstm_backward,
        "dgates (steps, n, 4 h); dh and dc (n, h): gradients of the last states in, of the first out where "
        "`first` asks for it");
  m.def("recurrent_gru_forward", gru_forward,
        "as recurrent_lstm_forward, with 3 gates; candidates (steps, n, h): what the gradient needs");
  m.def("recurrent_gru_backward", gru_backward,
        "dgates and dback (steps, n, 3 h): of x's and of the state's products; dh (n, h): in and out");
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("coarse", [] { return coarse_kernels() != nullptr; }, "whether `coarse` may be asked for");
  m.def("lstm_forward", dense_lstm_forward,
        "gates (steps, n, 4 h): x's products in, activated out; cells (steps + 1, n, h): the "
        "first in",
        release());
  m.def(
      "lstm_back", dense_lstm_back,
      "each factor's d (steps, n, 4 h), bfloat16 where `coarse`; dh and dc (factors, n, h): in and out; w_ih "
      "may be 0",
      release());
}

}  // namespace autoflip
